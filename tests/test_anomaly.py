"""Anomalies by patches: what is found, where, what is shared, and what is refused."""

import pickle

import numpy as np
import pytest
import skops.io
import torch
from networks import Untraceable, small
from sklearn.base import clone, is_outlier_detector
from sklearn.utils.estimator_checks import check_estimator
from test_not_finite import Blinded
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate

from sktransfer import (
    FineTunedClassifier,
    PatchAnomalyDetector,
    PretrainedFeatureExtractor,
    load_model,
    register_model,
)
from sktransfer._engine.patches import coreset
from sktransfer.models import Backbone
from sktransfer.models._registry import _builders
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))


@pytest.fixture(autouse=True)
def _small_is_a_name():
    register_model("small", lambda weights: Backbone(small(), SIZE))
    yield
    del _builders["small"]


def detector(**options):
    return PatchAnomalyDetector(**{"backbone": "small", "random_state": 0, **options})


@pytest.fixture(scope="module")
def cut(photos):
    """96 tiles of 64 × 64 pixels of a sky, and 12 more of which half are scratched."""
    chance = np.random.default_rng(0)
    corners = np.c_[chance.integers(0, 30, 108), chance.integers(0, 570, 108)]
    tiles = np.stack([photos[0][top : top + 64, left : left + 64] for top, left in corners])
    sound, scratched = tiles[:102], tiles[102:].copy()
    for i, tile in enumerate(scratched):
        tile[20 + 2 * i : 23 + 2 * i, 12:50] = (255, 0, 255)
    return sound[:96], sound[96:], scratched


@pytest.fixture(scope="module")
def fitted(cut):
    model = PatchAnomalyDetector(image_size=64, random_state=0, runtime="torch")
    return model.fit(cut[0])


# ------------------------------------------------------------------------------ scikit-learn


@pytest.mark.filterwarnings("ignore:.*outside.*:UserWarning")
@pytest.mark.filterwarnings("ignore:The brightest pixel:UserWarning")
@pytest.mark.filterwarnings("ignore:All .* images are the same:UserWarning")
def test_check_estimator_whole():
    results = check_estimator(detector(image_shape=(1, -1), image_size=16), on_fail=None)
    assert len(results) > 40
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] != "passed"}
    assert failed == {}


def test_what_scikit_learn_sees(cut, fitted):
    assert is_outlier_detector(fitted)
    sound, _, scratched = cut
    scores = fitted.score_samples(scratched)
    np.testing.assert_array_equal(fitted.decision_function(scratched), scores - fitted.offset_)
    assert clone(fitted).get_params()["random_state"] == 0
    assert fitted.block_names_[0] == "conv_stem"
    again = clone(fitted).fit(sound)
    for bank, same in zip(again.bank_, fitted.bank_, strict=True):
        np.testing.assert_array_equal(bank, same)


# ------------------------------------------------------------------------------ what is found


def test_scratches_are_found_and_located(cut, fitted):
    _, sound, scratched = cut
    assert fitted.predict(scratched).tolist() == [-1] * 6
    assert fitted.score_samples(scratched).max() < fitted.score_samples(sound).min()
    maps = fitted.anomaly_map(scratched)
    assert maps.shape == (6, 64, 64) and maps.dtype == np.float32
    for i, heat in enumerate(maps):  # the resize to 73 pixels and the crop move it a little
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        assert abs(row - (21 + 2 * i)) < 10 and 5 < column < 58


def test_images_of_other_sizes(cut, fitted, photos):
    _, _, scratched = cut
    odd = [scratched[0], photos[1], scratched[1][:40], np.zeros((3, 90), np.uint8)]
    scores = fitted.score_samples(odd)
    assert np.isfinite(scores).all() and fitted.anomaly_map(odd).shape == (4, 64, 64)
    assert scores[0] == pytest.approx(fitted.score_samples(scratched[:1])[0], rel=1e-5)


def test_images_of_the_training_are_compared_with_the_others(cut):
    """Else the patches of an image, some of which are in the bank, would make it look normal."""
    X = cut[0][:12]
    model = detector(coreset=1.0).fit(X)
    features = model.features()
    stored = features.stream()(features.views(model.check_images(X)))
    (patches,) = features(stored)  # (12, n_patches, n_features)
    n, n_patches, _ = patches.shape
    flat = patches.reshape(n * n_patches, -1)
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=2)
    owners = np.repeat(np.arange(n), n_patches)
    distances[owners[:, None] == owners] = np.inf
    nearest = distances.min(1).reshape(n, n_patches)
    expected = -nearest.max(1) / nearest.mean()
    np.testing.assert_allclose(model.score_samples(X), expected, rtol=1e-4)
    (bank,) = model.bank_
    assert bank.shape == flat.shape and bank.dtype == np.float32
    assert np.isclose(model.offset_, np.percentile(model.score_samples(X), 5))


@pytest.mark.parametrize("contamination", [0.05, 0.25])
def test_contamination_is_the_share_of_the_training_images(cut, contamination):
    model = detector(contamination=contamination).fit(cut[0])
    assert np.mean(model.predict(cut[0]) == -1) == pytest.approx(contamination, abs=0.011)
    assert (model.fit_predict(cut[0]) == model.predict(cut[0])).all()


# ------------------------------------------------------------------------------ patches


def test_each_block_has_patches_on_a_grid_of_its_own(cut):
    model = detector(layer=["stem", "body.1"]).fit(cut[0][:4])
    features = model.features()
    assert features.grids == [(4, 4), (4, 4)]  # a place for 8 × 8 pixels
    fine, coarse = (
        torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2)
        for x in features.stream()(features.views(model.check_images(cut[0][:4])))
    )
    assert fine.shape[2:] > coarse.shape[2:] == (4, 4)
    means = [avg_pool2d(x, 3, 1, 1, count_include_pad=False) for x in (fine, coarse)]
    expected = adaptive_avg_pool2d(means[0], 4), means[1]
    found = features([x.permute(0, 2, 3, 1).half().numpy() for x in (fine, coarse)])
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_distances_in_several_blocks_count_alike(cut):
    """Else the block with the longest rows would hide what the others see."""
    size = Preprocessing(size=(64, 48), resize=(64, 48))
    model = detector(backbone=Backbone(small(), size), layer="all", coreset=30).fit(cut[0][:8])
    features = model.features()
    assert features.grid == (8, 6) and [bank.shape[1] for bank in model.bank_] == [8, 12, 16]
    patches = features(features.stream()(features.views(model.check_images(cut[2]))))
    expected = 0
    for bank, usual, rows, grid in zip(
        *(model.bank_, model.usual_distances_, patches, features.grids), strict=True
    ):
        far = np.linalg.norm(rows[:, :, None] - bank, axis=3).min(2) / usual
        heat = torch.from_numpy(far.reshape(-1, 1, *grid))
        expected += interpolate(heat, features.grid, mode="bilinear")[:, 0].numpy() / 3
    scores = model.score_samples(cut[2])
    np.testing.assert_allclose(scores, -expected.reshape(6, -1).max(1), rtol=1e-4)
    assert model.anomaly_map(cut[0][:2]).shape == (2, 64, 48)


@pytest.mark.parametrize("network, grid", [("vit_tiny_patch16_224", (4, 6))])
def test_tokens_lie_on_a_grid_too(cut, network, grid):
    model = PatchAnomalyDetector(
        f"timm/{network}", weights=None, image_size=(64, 96), coreset=20, runtime="torch"
    )
    try:
        model.fit(cut[0][:4])
    except ValueError as error:  # it takes images of one size
        assert "can't take images" in str(error)
        model.set_params(image_size=None).fit(cut[0][:4])
        grid = (14, 14)
    assert model.features().grid == grid
    assert [bank.shape for bank in model.bank_] == [(20, 192)] * 3


def test_a_coreset_leaves_nothing_far():
    chance = np.random.RandomState(0)
    centers = chance.normal(0, 10, (20, 80))
    rows = np.repeat(centers, 50, 0) + chance.normal(0, 0.1, (1000, 80))
    told = []
    chosen = coreset(rows.astype(np.float32), 20, chance, lambda: told.append(1))
    assert sorted(chosen // 50) == list(range(20)) and len(told) == 19
    same = coreset(np.ones((10, 80), np.float32), 7, chance, lambda: None)
    assert len(set(same)) == 7
    assert coreset(rows.astype(np.float32)[:5], 9, chance, lambda: None).tolist() == [0, 1, 2, 3, 4]


def test_the_size_of_the_bank(cut):
    assert [len(bank) for bank in detector(coreset=7).fit(cut[0]).bank_] == [7]
    assert len(detector(coreset=0.5).fit(cut[0]).bank_[0]) == 96 * 16 / 2
    assert np.isfinite(detector(coreset=1).fit(cut[0]).score_samples(cut[1])).all()


# ------------------------------------------------------------------------------ memory, state


def test_activations_are_shared_through_the_memory(cut, tmp_path, run_log):
    X, y = cut[0][:10], np.arange(10) % 2
    options = {"memory": tmp_path, "layer": "body.0"}
    model = detector(**options).fit(X)
    n_images = len(run_log())
    assert n_images - len(set(run_log())) <= 2  # batches are padded
    model.score_samples(X)
    detector(**options, coreset=0.3).fit(X)
    extractor = PretrainedFeatureExtractor("small", layer="body.0", memory=tmp_path)
    extractor.transform(X)
    assert len(run_log()) == n_images
    FineTunedClassifier("small", unfreeze=1, memory=tmp_path, max_epochs=1).fit(X, y)
    n_images = len(run_log())
    detector(**options).fit(X)
    assert len(run_log()) == n_images


def test_copies_say_the_same(cut, fitted, tmp_path):
    _, sound, scratched = cut
    expected = fitted.score_samples(scratched)
    state = pickle.dumps(fitted)
    assert (
        len(state) < sum(bank.nbytes for bank in fitted.bank_) + 50_000
    )  # the network is loaded by name
    np.testing.assert_array_equal(pickle.loads(state).score_samples(scratched), expected)
    skops.io.dump(fitted, tmp_path / "model.skops")
    loaded = load_model(tmp_path / "model.skops")
    np.testing.assert_array_equal(loaded.score_samples(scratched), expected)
    np.testing.assert_array_equal(loaded.anomaly_map(sound), fitted.anomaly_map(sound))


def test_parameters_after_a_fit(cut, tmp_path):
    X = cut[0][:20]
    model = detector().fit(X)
    expected = model.score_samples(cut[1])
    later = {"layer": "stem", "image_size": 16, "coreset": 3, "contamination": 0.5}
    model.set_params(**later, weights=None, memory=tmp_path, batch_size=3, verbose=0)
    np.testing.assert_allclose(model.score_samples(cut[1]), expected, rtol=1e-5)
    assert list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="cuda:7"):
        model.set_params(device="cuda:7").score_samples(cut[1])
    model.set_params(device="cpu", batch_size=0)
    with pytest.raises(ValueError, match="batch_size"):
        model.predict(cut[1])
    copy = pickle.loads(pickle.dumps(detector().fit(X)))
    copy.set_params(backbone=Backbone(small(seed=1), SIZE))
    with pytest.raises(ValueError, match="not those on which this estimator was fitted"):
        copy.predict(cut[1])


def test_a_fit_that_fails_changes_nothing(cut, fitted):
    before = dict(vars(fitted))
    with pytest.raises(ValueError, match="at least 2"):
        fitted.fit(cut[0][:1])
    assert vars(fitted) == before


def test_dask_arrays(cut, fitted):
    da = pytest.importorskip("dask.array")
    X = np.concatenate([cut[1][:2], cut[2][:2]])
    lazy = fitted.predict(da.from_array(X, chunks=(2, -1, -1, -1)))
    assert lazy.compute().tolist() == fitted.predict(X).tolist()


# ------------------------------------------------------------------------------ bad input


def test_one_image_no_image_or_one_picture(cut):
    with pytest.raises(ValueError, match="at least 2, .*got 1 sample"):
        detector().fit(cut[0][:1])
    with pytest.warns(UserWarning, match="All 5 images are the same"):
        model = detector().fit(np.zeros((5, 32, 32, 3), np.uint8))
    assert model.predict(cut[0][:2]).tolist() == [-1, -1]
    for empty in ([], cut[0][:0]):
        with pytest.raises(ValueError, match="empty|0 images|no images|0 sample"):
            detector().fit(empty)
    model = detector().fit(cut[0][:4])
    with pytest.raises(ValueError, match="empty|0 images|no images|0 sample"):
        model.predict([])
    with pytest.raises(ValueError, match="not fitted"):
        detector().predict(cut[0])


def test_images_of_one_colour_each():
    greys = np.arange(100, 140, 2, dtype=np.uint8)
    X = np.broadcast_to(greys[:, None, None, None], (20, 32, 32, 3)).copy()
    model = detector().fit(X)
    assert np.isfinite(model.bank_[0]).all() and np.isfinite(model.score_samples(X)).all()
    assert model.predict(np.full((1, 32, 32, 3), 250, np.uint8)).tolist() == [-1]


@pytest.mark.parametrize(
    "options",
    [
        *({"contamination": value} for value in (0, -0.1, 0.51, 1, "auto", None, np.nan)),
        *({"coreset": value} for value in (0, 0.0, -1, 1.5, "all", None)),
        *({"layer": value} for value in (None, 1.5)),
        {"precision": "int8"},
    ],
)
def test_parameters_out_of_range(cut, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        detector(**options).fit(cut[0][:4])


def test_layers_without_a_map(cut):
    for layer in ("auto", "output", ["body.0", "auto"]):
        with pytest.raises(ValueError, match="has no places in the image"):
            detector(layer=layer).fit(cut[0][:4])
    with pytest.raises(ValueError, match="No block is called 'bodi'"):
        detector(layer="bodi").fit(cut[0][:4])
    flat = Backbone(nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.Linear(8, 3)), SIZE)
    with pytest.raises(ValueError, match="has no places in the image"):
        detector(backbone=flat).fit(cut[0][:4])
    with pytest.raises(ValueError, match="Untraceable cannot be cut"):
        detector(backbone=Backbone(Untraceable(), SIZE)).fit(cut[0][:4])


def test_nan_in_activations(cut):
    model = detector(backbone=Backbone(Blinded(torch.nan), SIZE), layer="body.0")
    X = np.random.default_rng(0).integers(200, size=(8, 32, 32, 3), dtype=np.uint8)
    X[5] = 255
    with pytest.raises(ValueError, match="row 5: network 'Blinded' returned NaN"):
        model.fit(X)
    model.fit(np.delete(X, 5, 0))
    with pytest.raises(ValueError, match="row 5: network 'Blinded' returned NaN"):
        model.predict(X)
