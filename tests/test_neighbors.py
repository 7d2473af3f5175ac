"""The one place for neighbours: equal to all distances, with ties, zeros and an index."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from sktransfer import _neighbors
from sktransfer._neighbors import nearest, nearest_in_order


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).normal(size=(300, 12)).astype(np.float32)


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "cityblock"])
def test_neighbors_of_queries_are_those_of_all_distances(rows, metric):
    queries = rows[:7] + 0.1
    distances, indices = nearest(rows, queries, 5, metric=metric)
    expected = cdist(queries, rows, metric)
    np.testing.assert_array_equal(indices, expected.argsort(axis=1)[:, :5])
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :5], atol=1e-6)


def test_no_row_is_its_own_neighbor_though_others_equal_it(rows):
    doubled = np.vstack([rows, rows[:3], rows[:3]])
    distances, indices = nearest(doubled, None, 2)
    assert not (indices == np.arange(len(doubled))[:, None]).any()
    assert set(indices[1].tolist()) == {301, 304}
    np.testing.assert_allclose(distances[:3], 0, atol=1e-12)  # though rows are float32


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "cityblock"])
def test_of_equal_rows_the_first_comes_first(rows, metric):
    order = np.random.default_rng(0).permutation(1500) % 300  # each row five times
    queries = rows[:40] + 0.1
    expected = nearest(rows, queries, 3, metric=metric)
    copies = np.stack([np.flatnonzero(order == row) for row in expected[1].ravel()])
    distances, indices = nearest_in_order(rows[order], queries, 13, metric=metric)
    np.testing.assert_array_equal(indices, copies.reshape(40, 15)[:, :13])
    np.testing.assert_array_equal(distances, np.repeat(expected[0], 5, axis=1)[:, :13])
    same = nearest_in_order(np.ones((9, 3)), np.ones((2, 3)), 4, metric=metric)[1]
    assert same.tolist() == [[0, 1, 2, 3]] * 2


def test_zeros_are_far_from_others_by_the_cosine(rows):
    distances, indices = nearest(np.vstack([rows[:2], np.zeros((2, 12))]), None, 3)
    assert indices[2, 0] == 3 and distances[2].tolist() == pytest.approx([0, 1, 1])


def test_an_index_finds_what_all_distances_find(rows, monkeypatch):
    pytest.importorskip("faiss")
    expected = nearest(rows, None, 4)
    found_by_queries = nearest(rows, rows[:9] + 0.1, 250)
    monkeypatch.setattr(_neighbors, "EXACT", 10)
    monkeypatch.setattr(_neighbors, "_LISTS_READ", 69)
    distances, indices = nearest(rows, None, 4)
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_allclose(distances, expected[0], atol=1e-6)
    monkeypatch.setattr(_neighbors, "_LISTS_READ", 2)  # hold less than 250 rows: all are asked
    np.testing.assert_array_equal(nearest(rows, rows[:9] + 0.1, 250)[1], found_by_queries[1])
    same = np.ones((50, 3), np.float32)
    assert not (nearest(same, None, 3)[1] == np.arange(50)[:, None]).any()


def test_not_finite_rows_are_refused(rows):
    with pytest.raises(ValueError, match="NaN"):
        nearest(np.where(rows > 2, np.nan, rows), None, 2)
