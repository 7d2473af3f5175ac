"""Images that belong together are on one side of every split."""

import csv
import json
import os
import re
import signal
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from networks import small
from sklearn import config_context
from sklearn.base import clone
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    KFold,
    LeaveOneGroupOut,
    RepeatedStratifiedKFold,
    ShuffleSplit,
    StratifiedGroupKFold,
    StratifiedKFold,
    StratifiedShuffleSplit,
    cross_val_score,
    cross_validate,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch.callbacks import Callback

from sktransfer import FineTunedClassifier, FineTunedRegressor, load_model, register_model
from sktransfer._cli import benchmark, main
from sktransfer._cli import groups as groups_option
from sktransfer._cli.groups import check_groups_option, groups_of
from sktransfer._escaping import csv_cell
from sktransfer._splits import Folds, check_groups, hold_outs, inner_folds
from sktransfer._training.heads import make_head, solve_head
from sktransfer.io import check_images
from sktransfer.metrics import knn_score
from sktransfer.model_selection import rank_backbones, transfer_gain
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))


@pytest.fixture(autouse=True, scope="module")
def _models():
    register_model("small", lambda weights: Backbone(small(), SIZE))


def classifier(**options):
    defaults = {"unfreeze": 0, "max_epochs": 1, "batch_size": 8, "random_state": 0}
    return FineTunedClassifier("small", **{**defaults, **options})


def pictures(n=36, n_groups=12, n_classes=2, step=60):
    """Noise, the brighter, the higher the number of its class; each group has all classes."""
    y = np.arange(n) % n_classes
    X = np.random.default_rng(0).integers(0, 120, (n, 32, 32, 3))
    X += (y * step // (n_classes - 1))[:, None, None, None]
    return X.astype(np.uint8), y, np.arange(n) * n_groups // n


def series(n_groups=12, of_each=6):
    """Series of near duplicates; of what class a series is, its pictures do not tell."""
    chance = np.random.default_rng(1)
    base = chance.integers(40, 216, (n_groups, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    X = base.repeat(of_each, axis=0) + chance.integers(-4, 5, (n_groups * of_each, 32, 32, 3))
    groups = np.arange(n_groups).repeat(of_each)
    return X.astype(np.uint8), groups // 2 % 2, groups


def in_order_of_search(X, *others):
    """Bring rows into the order in which an estimator splits them, which is that of the digests."""
    digests = check_images(X).digests(1)
    order = np.array(sorted(range(len(X)), key=digests.__getitem__))
    return X[order], *(values[order] for values in others)


# ------------------------------------------------------------------------------ the one place


def same(splits, expected):
    pairs = list(zip(splits, expected, strict=True))
    return all(np.array_equal(a[part], b[part]) for a, b in pairs for part in (0, 1))


@pytest.mark.parametrize(
    "kind, groups, expected",
    [
        ("class", None, StratifiedKFold(3, shuffle=True, random_state=7)),
        ("value", None, KFold(3, shuffle=True, random_state=7)),
        ("class", "some", StratifiedGroupKFold(3, shuffle=True, random_state=7)),
        ("value", "some", GroupKFold(3)),
        ("class", "each", StratifiedKFold(3, shuffle=True, random_state=7)),
        ("label", "each", KFold(3, shuffle=True, random_state=7)),
    ],
)
def test_folds_are_those_of_scikit_learn(kind, groups, expected):
    X, y, some = pictures()
    groups = {None: None, "some": some, "each": np.arange(len(y))[::-1]}[groups]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The groups parameter is ignored")
        splits = list(expected.split(y, y, groups))
    folds = Folds(3, kind, random_state=7)
    assert same(folds.split(y, y, groups), splits)
    assert same(inner_folds(3, y, kind, groups, 7), splits)
    assert folds.get_n_splits(y, y, groups) == 3


def test_repeats_that_deal_alike_count_once():
    y = np.tile([0, 1], 30)
    plain = RepeatedStratifiedKFold(n_splits=3, n_repeats=2, random_state=7)
    assert same(Folds(3, random_state=7, n_repeats=2).split(y, y), plain.split(y, y))
    alike = np.arange(60) // 4
    folds = Folds(3, random_state=7, n_repeats=2)
    assert len(list(folds.split(y, y, alike))) == folds.get_n_splits(y, y, alike) == 6
    # Of so different sizes, scikit-learn deals groups out in one way alone.
    sizes = np.repeat(np.arange(6), [20, 16, 10, 8, 4, 2])
    y = sizes % 2
    assert len(list(folds.split(y, y, sizes))) == folds.get_n_splits(y, y, sizes) == 3


@pytest.mark.parametrize("kind", ["class", "value"])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_whole_groups_are_held_out_near_the_share(kind, share):
    chance = np.random.default_rng(0)
    y = chance.integers(0, 3, 300)
    groups = np.minimum(chance.geometric(0.05, 300), 40)  # from 1 to some twenty images
    splits = hold_outs(5, share, y, kind, groups, 0)
    assert len({test.tobytes() for _, test in splits}) == 5
    for train, test in splits:
        assert not np.intersect1d(groups[train], groups[test]).size
        assert sorted([*train, *test]) == list(range(300))
        assert abs(len(test) - 300 * share) <= np.bincount(groups).max() / 2
        if kind == "class":
            assert np.abs(np.bincount(y[test]) - share * np.bincount(y)).max() < 0.1 * 100
    assert same(splits, hold_outs(5, share, y, kind, groups, 0))


def test_few_groups_of_many_classes_are_held_out_of_each():
    y, groups = np.repeat(np.arange(10), 20), np.repeat(np.arange(20), 10)
    for train, test in hold_outs(5, 0.1, y, "class", groups, 0):
        assert len(np.unique(y[train])) == len(np.unique(y[test])) == 10
        assert len(np.unique(groups[test])) == 10


def test_held_out_without_groups_is_what_it_was():
    y = np.tile([0, 1], 20)
    for groups in (None, np.arange(40)):
        stratified = StratifiedShuffleSplit(2, test_size=0.2, random_state=3)
        assert same(hold_outs(2, 0.2, y, "class", groups, 3), stratified.split(y, y))
        plain = ShuffleSplit(2, test_size=0.2, random_state=3)
        assert same(hold_outs(2, 0.2, y, "value", groups, 3), plain.split(y))


def test_fewer_folds_where_a_class_lies_in_few_groups():
    y = np.array([0] * 12 + [1] * 6)
    groups = np.array([0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3 + [5] * 3)
    splits = inner_folds(5, y, "class", groups, 0)
    assert len(splits) == 2  # class 1 lies in two groups
    for train, test in splits:
        assert np.unique(y[train]).tolist() == np.unique(y[test]).tolist() == [0, 1]
    assert inner_folds(5, y, "class", np.where(y == 1, 4, groups), 0) == []
    assert inner_folds(5, y, "value", np.zeros(18, int), 0) == []
    assert [len(test) for _, test in inner_folds(5, y, "value", groups // 2, 0)] == [6, 6, 6]
    # Each value would be alone in its fold.
    assert len(inner_folds(3, y[:6], "value", np.array([0, 0, 0, 0, 1, 2]), 0)) == 2


@pytest.mark.parametrize("n_left", [1, 2])
def test_what_is_learnt_from_keeps_groups_of_each_class(n_left):
    chance = np.random.default_rng(0)
    for seed in range(20):
        groups = chance.integers(0, 9, 60)
        y = (groups < 4).astype(int)  # a class lies in 4 or 5 groups
        for train, _ in inner_folds(5, y, "class", groups, seed, n_left=n_left):
            assert all(len(np.unique(groups[train][y[train] == k])) >= n_left for k in (0, 1))


# ------------------------------------------------------------------------------ what groups may be


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        np.array,
        lambda names: np.array(names, object),
        lambda names: pd.Series(names, index=range(100, 100 + len(names))),
        lambda names: pd.Series(names, dtype="string"),
        lambda names: pd.Series(names, dtype="category"),
        lambda names: pd.DataFrame({"patient": names}),
    ],
)
def test_groups_of_any_container(make):
    numbers = np.arange(12) // 3
    names = [f"patient {number}" for number in numbers]
    assert check_groups(make(names), 12).tolist() == numbers.tolist()


BAD_GROUPS = [
    ([0, 1, 2], "groups has 3 entries for 12 images: pass one for each image"),
    ([], "groups has 0 entries for 12 images"),
    ([*range(11), np.nan], r"groups contains NaN.* in 1 of 12 rows \(11\).*a group of its own"),
    ([None, *"bcdefghijkl"], r"groups contains .* in 1 of 12 rows \(0\)"),
    (pd.Series([pd.NA, *range(11)], dtype="Int64"), "groups contains NaN, None, NA"),
    (np.ma.masked_equal(np.arange(12), 3), r"groups contains .* rows \(3\)"),
    ([1, *"bcdefghijkl"], "groups can't be sorted, .* groups of one type"),
    (np.zeros((12, 2)), r"groups has shape \(12, 2\): pass one entry"),
    ([("a", 1)] * 12, r"groups has shape \(12, 2\)"),
    ("patient", "groups is of type str: pass a list"),
    (3, "groups is of type int"),
    ({"a": 1}, "groups is of type dict"),
    (iter("abc"), "groups is of type str_.*iterator"),
]


@pytest.mark.parametrize("groups, message", BAD_GROUPS)
def test_bad_groups(groups, message):
    with pytest.raises((ValueError, TypeError), match=message):
        check_groups(groups, 12)


def test_bad_groups_are_an_error_wherever_they_go():
    X, y, _ = pictures(12)
    for call in (
        lambda: classifier(unfreeze=1).fit(X, y, groups=[0]),
        lambda: FineTunedRegressor("small").fit(X, y, groups=[0]),
        lambda: rank_backbones(X, y, ["small"], groups=[0]),
        lambda: transfer_gain(X, y, backbone="small", groups=[0]),
        lambda: knn_score(X.reshape(12, -1), y, groups=[0]),
    ):
        with pytest.raises(ValueError, match="groups has 1 entries for 12 images"):
            call()


# ------------------------------------------------------------------------------ inside fit


@pytest.mark.parametrize("weighted", [None, "class_weight", "sample_weight"])
def test_the_search_for_the_depth(weighted):
    X, y, groups = in_order_of_search(*pictures(step=6))
    y[groups < 4] = 0  # more of class 0
    each = len(y) / (2 * np.bincount(y)[y])
    options = {"unfreeze": "auto"}
    options |= {"class_weight": "balanced"} if weighted == "class_weight" else {}
    weights = each if weighted == "sample_weight" else None
    found = classifier(**options).fit(X, y, weights, groups=groups.astype(str)).depth_search_
    seed = np.random.RandomState(0).randint(2**31 - 1)
    by_name = np.unique(groups.astype(str), return_inverse=True)[1]
    folds = StratifiedGroupKFold(3, shuffle=True, random_state=seed).split(X, y, by_name)
    for k, (train, test) in enumerate(folds):
        assert not np.intersect1d(groups[train], groups[test]).size
        plain = classifier(unfreeze=1, random_state=seed)
        plain.fit(X[train], y[train], each[train] if weighted else None, groups=groups[train])
        column = found["cv_results_"]["param_unfreeze"].tolist().index(1)
        of_test = each[test] if weighted else None
        expected = accuracy_score(y[test], plain.predict(X[test]), sample_weight=of_test)
        assert found["cv_results_"][f"split{k}_test_score"][column] == pytest.approx(expected)


class Looking(Callback):
    """Keeps the digests of what is learnt from and of what is held out."""

    parts = ()

    def on_train_begin(self, net, X=None, y=None, **_):
        valid = net.train_split(X, None)[1]
        Looking.parts = [{data.views.images.digest(i) for i in data.numbers} for data in (X, valid)]


@pytest.mark.parametrize("kind", ["class", "value"])
def test_early_stopping(kind):
    X, y, groups = pictures(n_groups=6)
    make = classifier if kind == "class" else regressor
    options = {"early_stopping": True, "validation_fraction": 0.3, "callbacks": [Looking()]}
    model = make(unfreeze=1, warm_start=True, **options).fit(X, y, groups=groups)
    group_of = dict(zip(check_images(X).digests(1), groups, strict=True))
    learnt, held_out = ({group_of[digest] for digest in part} for part in Looking.parts)
    assert len(learnt) == 4 and len(held_out) == 2 and not learnt & held_out
    before = Looking.parts
    model.fit(X, y, groups=groups)  # goes on, with the same images held out
    assert Looking.parts == before and model.n_iter_ == 2
    model.set_params(callbacks=None).partial_fit(X, y)  # holds nothing out


def regressor(**options):
    return FineTunedRegressor(
        "small", **{"max_epochs": 1, "batch_size": 8, "random_state": 0, **options}
    )


def test_how_much_the_head_is_regularised():
    X, y, groups = in_order_of_search(*series())
    seed = np.random.RandomState(0).randint(2**31 - 1)
    norms = []
    for given in (None, groups):
        model = classifier().fit(X, y, groups=given)
        embeddings = model.to_feature_extractor().transform(X)
        head = make_head("linear", 16, 2, 0.0)
        solve_head(head, embeddings, y, None, "class", seed=seed, groups=given)
        expected = head[-1].weight.detach().numpy()
        weight = model.net_.module_.head[-1].weight.detach().numpy()
        assert weight == pytest.approx(expected, abs=1e-5)
        norms.append(np.linalg.norm(weight))
    # What tells a series from others says nothing of its class.
    assert norms[1] < norms[0] / 3


def test_views_of_an_image_stay_in_its_group():
    X, y, groups = pictures(12, 4)
    model = classifier(augment="flip").fit(X, y, groups=groups)
    assert model.score(X, y) > 0.5


def test_values_and_several_labels():
    X, y, groups = in_order_of_search(*pictures(24, 6, 4))
    seed = np.random.RandomState(0).randint(2**31 - 1)
    found = regressor(unfreeze="auto").fit(X, y, groups=groups).depth_search_["cv_results_"]
    for k, (train, test) in enumerate(GroupKFold(3).split(X, y, groups)):
        plain = regressor(unfreeze=1, random_state=seed).fit(X[train], y[train])
        column = found["param_unfreeze"].tolist().index(1)
        expected = r2_score(y[test], plain.predict(X[test]))
        assert found[f"split{k}_test_score"][column] == pytest.approx(expected, abs=1e-4)
    labels = np.stack([y % 2, y // 2], axis=1)
    model = classifier(unfreeze="auto").fit(X, labels, groups=groups)
    assert model.depth_search_["cv_results_"]["split2_test_score"].shape == (3,)


def test_order_and_names_change_nothing():
    X, y, groups = pictures(24, 8)
    expected = classifier(unfreeze="auto").fit(X, y, groups=groups)
    order = np.random.default_rng(1).permutation(24)
    again = clone(expected).fit(X[order], y[order], groups=groups[order] + 100)
    assert np.array_equal(again.predict_proba(X), expected.predict_proba(X))
    assert again.depth_search_["threshold"] == expected.depth_search_["threshold"]


def test_an_image_that_comes_twice_is_in_the_first_of_its_groups():
    X, y, groups = pictures(24, 8)
    stopping = classifier(unfreeze=1, early_stopping=True, validation_fraction=0.3)
    twice = clone(stopping).fit(np.r_[X, X[:1]], np.r_[y, y[:1]], groups=np.r_[groups, 7])
    weights = np.where(np.arange(24) == 0, 2.0, 1.0)
    double = clone(stopping).fit(X, y, weights, groups=groups)
    assert np.array_equal(twice.predict_proba(X), double.predict_proba(X))


def test_groups_of_one_image_each_are_none():
    X, y, _ = pictures(24)
    plain = classifier(unfreeze=1, early_stopping=True, validation_fraction=0.3).fit(X, y)
    each = clone(plain).fit(X, y, groups=np.arange(24))
    assert np.array_equal(each.predict_proba(X), plain.predict_proba(X))


def test_groups_of_dask():
    da, dd = pytest.importorskip("dask.array"), pytest.importorskip("dask.dataframe")
    X, y, groups = pictures(24, 6)
    expected = classifier().fit(X, y, groups=groups).predict_proba(X)
    lazy = [da.from_array(groups, chunks=10)]
    lazy += [dd.from_pandas(pd.Series(groups), npartitions=2)]
    for each in lazy:
        model = classifier().fit(X, y, groups=each)
        assert np.array_equal(model.predict_proba(X), expected)
        assert model.predict(da.from_array(X, chunks=(12, -1, -1, -1))).compute().shape == (24,)


# ------------------------------------------------------------------------------ too few groups


def test_where_nothing_splits_any_groups_will_do():
    X, y, _ = pictures(12)
    for options in ({"unfreeze": 1}, {"head_epochs": 1}):  # no cross-validation of the head
        classifier(**options).fit(X, y, groups=np.zeros(12))


@pytest.mark.parametrize("groups", [np.zeros(12), np.arange(12) % 2, np.array([0] * 7 + [1] * 5)])
def test_too_few_groups_for_the_head_or_the_depth(groups):
    X, y, _ = pictures(12)
    y = y if groups[1] != 1 else groups  # one group; one a class; or two that both have all
    if len(np.unique(groups)) == 2 and groups[1] == 0:
        classifier(unfreeze="auto").fit(X, y, groups=groups)  # of parts of it, no warning
        return
    with pytest.warns(UserWarning, match="regularised can't be chosen .* smaller groups") as caught:
        classifier().fit(X, y, groups=groups)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning) as caught:
        model = classifier(unfreeze="auto").fit(X, y, groups=groups)
    n_groups = len(np.unique(groups))
    assert f"12 images of {n_groups} groups, as class '0' lies in 1" in str(caught[0].message)
    assert "smaller groups" in str(caught[0].message)
    assert model.depth_search_["unfreeze"] == 0


def test_too_few_groups_to_hold_out():
    X, y, _ = pictures(12)
    names = np.array(["sound", "broken"])[y]
    stopping = classifier(unfreeze=1, early_stopping=True, validation_fraction=0.3)
    message = "each class needs 2 groups: 'broken' lies in 1 group.*smaller groups"
    for groups in (y, np.zeros(12)):
        with pytest.raises(ValueError, match=message):
            stopping.fit(X, names, groups=groups)
    auto = clone(stopping).set_params(unfreeze="auto")
    with pytest.raises(ValueError, match="needs 3 groups: 'broken' lies in 2 groups"):
        auto.fit(X, names, groups=np.arange(12) // 6)
    values = regressor(unfreeze=1, early_stopping=True)
    with pytest.raises(ValueError, match="of 12 images: the images are of 1 group"):
        values.fit(X, y, groups=["a"] * 12)


@pytest.mark.parametrize("scoring", ["knn", "logistic"])
def test_too_few_groups_to_rank(scoring):
    X, y, _ = pictures(24)
    call = {"backbones": ["small"], "scoring": [scoring], "random_state": 0}
    for groups in (y, np.zeros(24)):
        with pytest.raises(ValueError, match="No class has groups for cv=5 folds: 0 lies in 1 gr"):
            rank_backbones(X, y, groups=groups, **call)
    with pytest.raises(ValueError, match="pass cv=3, or pass smaller groups"):
        rank_backbones(X, y, groups=np.arange(24) // 8, **call)
    uneven = np.where(y == 1, np.arange(24) // 12, 2 + np.arange(24) // 4)
    with pytest.warns(UserWarning, match="1 lies in 2 groups. If that matters, pass cv=2"):
        if scoring == "knn":
            assert rank_backbones(X, y, groups=uneven, **call | {"cv": 3}).knn[0] > 0.5
            return
        # Its C is chosen in folds of the training part.
        with pytest.raises(ValueError, match="part needs 2 groups of .*, but 1 lies in 2 groups"):
            rank_backbones(X, y, groups=uneven, **call | {"cv": 3})


def test_too_few_groups_for_a_gain():
    X, y, _ = pictures(24)
    with pytest.raises(ValueError, match="No class has groups for cv=5 folds"):
        transfer_gain(X, y, backbone="small", groups=y)


# ------------------------------------------------------------------------------ functions


@pytest.mark.parametrize("cv", [3, GroupKFold(3), LeaveOneGroupOut()])
def test_a_ranking_by_groups(cv):
    X, y, groups = pictures(36, 6, step=10)
    table = rank_backbones(
        X, y, ["small"], scoring=["knn"], cv=cv, groups=["abcdef"[g] for g in groups]
    )
    embeddings = rows_of(X)
    assert table.knn[0] == pytest.approx(knn_score(embeddings, y, cv=cv, groups=groups), abs=0.2)
    if cv != 3:
        splits = list(cv.split(X, y, groups))
        assert table.knn[0] == pytest.approx(knn_score(embeddings, y, cv=splits))


def rows_of(X):
    from sktransfer import PretrainedFeatureExtractor

    return PretrainedFeatureExtractor("small").transform(X)


def test_neighbours_of_other_groups():
    X, y, groups = series(6, 4)
    rows = rows_of(X)
    model = KNeighborsClassifier(5, metric="cosine")
    splits = LeaveOneGroupOut().split(rows, y, groups)
    expected = np.mean([model.fit(rows[a], y[a]).score(rows[b], y[b]) for a, b in splits])
    assert knn_score(rows, y, groups=groups) == pytest.approx(expected)
    assert knn_score(rows, y, groups=np.arange(24)) == pytest.approx(knn_score(rows, y))
    folds = StratifiedGroupKFold(3)
    expected = cross_val_score(model, rows, y, cv=folds, groups=groups).mean()
    assert knn_score(rows, y, cv=3, groups=groups) == pytest.approx(expected)


@pytest.mark.parametrize("cv", [3, GroupKFold(3)])
@pytest.mark.parametrize("routing", [False, True])
def test_a_gain_by_groups(cv, routing):
    X, y, groups = pictures(36, 9, step=100)
    options = {"baselines": ["pixels", "majority"], "n_repeats": 1, "random_state": 0}
    with config_context(enable_metadata_routing=routing):
        gain = transfer_gain(X, y, backbone="small", unfreeze=0, cv=cv, groups=groups, **options)
        table = rank_backbones(X, y, ["small"], scoring=["logistic"], cv=cv, groups=groups)
    assert len(gain.scores) == 3 and gain.scores.transfer.min() > 0.8
    assert table.logistic[0] > 0.8


# ------------------------------------------------------------------------------ what it is for


def test_scores_of_near_duplicates_are_honest_with_groups():
    X, y, groups = series()
    options = {"scoring": ["knn", "logistic"], "cv": 4, "random_state": 0}
    flattered = rank_backbones(X, y, ["small"], **options).iloc[0]
    honest = rank_backbones(X, y, ["small"], groups=groups, **options).iloc[0]
    assert min(flattered.knn, flattered.logistic) > 0.9
    assert max(honest.knn, honest.logistic) < 0.65
    scores = [
        classifier(unfreeze="auto")
        .fit(X, y, groups=given)
        .depth_search_["cv_results_"]["mean_test_score"]
        .max()
        for given in (None, groups)
    ]
    assert scores[0] > 0.95 and scores[1] < 0.7


# ------------------------------------------------------------------------------ metadata routing


@pytest.fixture
def routing():
    with config_context(enable_metadata_routing=True):
        yield


def head_of(model):
    """Return the weights of a head, of which the cross-validation says how large they are."""
    return model.net_.module_.head[-1].weight.detach().numpy()


def test_groups_are_requested_by_default(routing):
    X, y, groups = series()
    expected = head_of(classifier().fit(X, y, groups=groups))
    assert not np.allclose(expected, head_of(classifier().fit(X, y)), atol=0.1)
    for model in (classifier(), classifier().set_fit_request(groups=True)):
        pipeline = make_pipeline(FunctionTransformer(), model)
        assert np.array_equal(head_of(clone(pipeline).fit(X, y, groups=groups)[-1]), expected)
        search = GridSearchCV(model, {"unfreeze": [0]}, cv=GroupKFold(2))
        search.fit(X, y, groups=groups)
        assert np.array_equal(head_of(search.best_estimator_), expected)
        results = cross_validate(
            pipeline,
            X,
            y,
            params={"groups": groups},
            cv=[(np.arange(len(X)), np.arange(6))],
            return_estimator=True,
        )
        assert np.array_equal(head_of(results["estimator"][0][-1]), expected)


def test_groups_that_are_not_wanted(routing):
    X, y, groups = series()
    model = classifier().set_fit_request(groups=False)
    search = GridSearchCV(model, {"unfreeze": [0]}, cv=GroupKFold(2)).fit(X, y, groups=groups)
    assert np.array_equal(head_of(search.best_estimator_), head_of(classifier().fit(X, y)))


def test_groups_and_weights_together(routing):
    X, y, groups = series()
    weights = np.linspace(1, 2, len(y))
    model = classifier(class_weight={0: 1, 1: 2}).set_fit_request(sample_weight=True)
    expected = head_of(clone(model).fit(X, y, weights, groups))
    found = make_pipeline(FunctionTransformer(), model)
    found.fit(X, y, sample_weight=weights, groups=groups)
    assert np.array_equal(head_of(found[-1]), expected)
    assert not np.array_equal(head_of(clone(model).fit(X, y, groups=groups)), expected)


def test_without_routing_a_search_keeps_groups_for_its_own_folds():
    X, y, groups = series()
    search = GridSearchCV(classifier(), {"unfreeze": [0]}, cv=GroupKFold(2))
    search.fit(X, y, groups=groups)
    assert np.array_equal(head_of(search.best_estimator_), head_of(classifier().fit(X, y)))
    assert cross_val_score(classifier(), X, y, groups=groups, cv=GroupKFold(2)).shape == (2,)


# ------------------------------------------------------------------------------ the command line

NAMES = ["a/p1_x.jpg", "a/p1_y.jpg", "b/p2,'=\n.jpg", "b/=p3.jpg", "b/\udcffp4.jpg"]


def groups_by(text, folder, names=NAMES):
    check_groups_option(text)
    return groups_of(
        [os.path.join(folder, n) for n in names], Namespace(groups=text, folder=folder)
    )


def test_groups_by_names():
    assert groups_by(r"(p\d)", "photos") == ["p1", "p1", "p2", "p3", "p4"]
    assert groups_by(r"^(\w)/", "./photos/") == ["a", "a", "b", "b", "b"]
    assert groups_of(["x"], Namespace(groups=None, folder="")) is None


def test_groups_by_composed_and_decomposed_letters(tmp_path):
    names = ["M\u00fcller/1.jpg", "Mu\u0308ller/2.jpg"]
    for text in ("(M\u00fcl+er)", "(Mu\u0308l+er)"):
        assert groups_by(text, "photos", names) == ["M\u00fcller"] * 2
    (tmp_path / "t.csv").write_text("path,x\nMu\u0308ller/1.jpg,1\nM\u00fcller/2.jpg,2\n", "utf-8")
    assert groups_by(f"{tmp_path}/t.csv:x", "photos", names) == ["1", "2"]


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs the alarm of POSIX")
def test_an_expression_that_never_ends_is_given_up(monkeypatch):
    message = r"\(a\+\)\+\$' was given up after .*'\(a\+\)', or pass a"
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
        patch.setattr(groups_option, "_SECONDS", 0.1)
        groups_by("(a+)+$", "photos", ["a" * 60 + "!.jpg"])
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert groups_by("([[a]+)", "photos", ["ab.jpg"]) == ["a"]  # of which Python warns


@pytest.mark.parametrize("form", ["below", "whole", "as this library writes"])
def test_groups_by_a_table(form, tmp_path):
    table, folder = str(tmp_path / "t: able.CSV"), str(tmp_path / "photos")
    names = [n if form == "below" else os.path.join(folder, n) for n in NAMES]
    names = [csv_cell(n) for n in names] if form.startswith("as") else names
    rows = list(zip([" 1 ", "1", "2", "3", "x,y"], names, strict=True))
    # As Excel begins a file; a row may come twice, and rows of other images do no harm.
    with open(table, "w", newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        csv.writer(file).writerows([("a: b", "path"), *rows, *rows[1:], ("", "another"), ()])
    assert groups_by(f"{table}:a: b", folder) == ["1", "1", "2", "3", "x,y"]


TABLES = [
    ("", "no column 'path'. .*it has none"),
    ("path;patient\n", "no column 'path'. --groups needs .*commas.* it has 'path;patient'"),
    ("path,plate\n", "no column 'patient'.* it has 'path', 'plate'"),
    ("path,patient\n", "no group in the column 'patient' for 5 of 5 images; the first is 'a/p1_x"),
    ("path,patient\na/p1_x.jpg\n", "for 5 of 5 .*'a/p1_x.jpg'; its first path is 'a/p1_x.jpg'"),
    ("path,patient\nx,1\nx,2\n", "row 3: 'x' has the group '2', and in an earlier row '1'"),
    ('path,patient\n"' + "x" * 200_000, "can't be read as a table: field larger"),
]


@pytest.mark.parametrize("content, message", TABLES)
def test_bad_tables_of_groups(content, message, tmp_path):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        groups_by(f"{tmp_path}/t.csv:patient", "photos")


@pytest.mark.parametrize(
    "text, message",
    [
        ("(", "is no regular expression: missing \\).*FILE.csv:COLUMN"),
        ("(a{99999999999999999999})", "is no regular expression"),
        ("p1", "has no part in parentheses.*FILE.csv:COLUMN"),
        ("table.csv", "has no part in parentheses.*FILE.csv:COLUMN"),
        ("no.csv:patient", "'no.csv', which is no file"),
        ("(p1)", r"no group in the paths of 3 of 5 images; the first is \"b/p2.*table"),
        ("(z)?", "no group in the paths of 5 of 5 images"),
        ("(z*)", "no group in the paths of 5 of 5 images; the first is 'a/p1_x.jpg'"),
    ],
)
def test_bad_groups_by_names(text, message):
    with pytest.raises(ValueError, match=message):
        groups_by(text, "photos")


def test_fit_by_groups(tiles, tmp_path, capsys):
    root, path = str(tiles[0]), str(tmp_path / "m.skops")
    arguments = ["fit", root, "-o", path, "--image-size", "32", "--json", "--groups"]
    assert main([*arguments, r"(\d\d)\."]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["n_groups"], document["n_groups_held_out"]) == (16, 4)
    assert document["n_images"] == 32 and document["held_out"]["n_images"] == 8
    assert load_model(path).classes_.tolist() == ["china", "flower"]
    assert main([*arguments[:-2], "--groups", r"(\d)\."]) == 0
    assert "groups: 8 to train on, 2 held out" in capsys.readouterr().out
    for groups, message in (
        ("(.*)/", "'china' lies in 1 group, .*--test-size 0.2 needs 2 groups of each class"),
        ("(0.)", "finds no group in the paths of 18 of 40 images; the first is 'china/11.jpg'"),
    ):
        assert main([*arguments, groups]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_rank_by_groups(tiles, capsys):
    arguments = ["rank", str(tiles[0]), "--backbone", "efficientnet_lite0", "--image-size", "32"]
    assert main([*arguments, "--cv", "3", "--json", "--groups", r"(\d)\."]) == 0
    assert json.loads(capsys.readouterr().out)["ranking"][0]["logistic"] > 0.5
    assert main([*arguments, "--groups", r"(\d)\d\."]) == 2
    assert "pass --cv 2, or pass smaller groups" in capsys.readouterr().err


def test_benchmark_by_groups(tiles, tmp_path, capsys):
    root = str(tiles[0])
    options = Namespace(groups=r"(\d)\.", folder=root, skip_unreadable=False)
    task = benchmark.load_folder(root, options)
    assert "10 groups of images" in task.note
    options = {"image_size": 32, "depths": [0], "fit_best": True}
    report = benchmark.compare(task, n_splits=2, **options)
    for test in report.results[0].tests:
        of_test = {Path(task.images[row]).stem[1] for row in test}
        others = set(range(40)) - set(test.tolist())
        assert of_test and not of_test & {Path(task.images[row]).stem[1] for row in others}
    assert report.best.model.predict(task.images[:1]).shape == (1,)
    X, y, groups = series()
    X, search = rows_of(X), benchmark.classifiers(40)["k-NN"].set_params(n_jobs=None)
    expected = clone(search).set_params(cv=StratifiedGroupKFold(3)).fit(X, y, groups=groups)
    assert (
        benchmark._tuned(search, X, y, groups).n_neighbors == expected.best_params_["n_neighbors"]
    )
    assert main(["benchmark", root, "--groups", r"(\d)\d\."]) == 2
    assert "A comparison by groups needs 3 of each class" in capsys.readouterr().err
    assert main(["benchmark", "--groups", "(x)"]) == 2
    assert "name their FOLDER" in capsys.readouterr().err
