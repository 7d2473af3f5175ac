import pickle
from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import torch
from networks import small
from sklearn.base import clone, is_classifier
from sklearn.metrics import accuracy_score
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from sktransfer import (
    PretrainedClassifier,
    PretrainedFeatureExtractor,
    get_model,
    register_model,
)
from sktransfer.io import load_image
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))
NAMES = ("ant", "bee", "cat", "dog", "eel")


def named(n_classes=5, names=NAMES, seed=0):
    network = small(seed)
    network.head = nn.Linear(16, n_classes)
    return Backbone(network, SIZE, names)


@pytest.fixture
def scaled():
    """A network with named classes that is sure enough of itself for ranks to be distinct."""
    backbone = named()
    with torch.no_grad():
        backbone.network.head.weight *= 50
    return backbone


# ------------------------------------------------------------------------------ right answers


def test_the_embedded_network_knows_a_palace_and_a_daisy(photos):
    model = PretrainedClassifier()
    assert model.classes_.shape == (1000,) and model.classes_[985] == "daisy"
    assert model.predict(photos).tolist() == ["palace", "daisy"]
    probabilities = model.predict_proba(photos)
    assert probabilities.dtype == np.float32 and probabilities.shape == (2, 1000)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert probabilities.argmax(1).tolist() == [698, 985]


def test_equals_the_plain_forward_pass(tiles, scaled):
    _, paths, _ = tiles
    batch = torch.stack([SIZE.fit_size(load_image(path)) for path in paths[:6]])
    with torch.inference_mode():
        logits = scaled.network.eval()(SIZE.normalize(batch)).numpy()
    model = PretrainedClassifier(scaled)
    np.testing.assert_allclose(model.decision_function(paths[:6]), logits, rtol=1e-4, atol=1e-4)
    exact = np.exp(logits - logits.max(1, keepdims=True))
    exact /= exact.sum(1, keepdims=True)
    np.testing.assert_allclose(model.predict_proba(paths[:6]), exact, atol=1e-4)
    assert model.predict(paths[:6]).tolist() == [NAMES[i] for i in logits.argmax(1)]


def test_top_k(tiles, scaled):
    _, paths, _ = tiles
    model = PretrainedClassifier(scaled)
    table = model.top_k(paths[:4], k=3)
    assert list(table.columns) == ["row", "file", "rank", "label", "probability"]
    assert table["row"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert table["rank"].tolist() == [1, 2, 3] * 4
    assert table["file"].tolist() == [path for path in paths[:4] for _ in range(3)]
    probabilities = model.predict_proba(paths[:4])
    for row, part in table.groupby("row"):
        expected = np.sort(probabilities[row])[::-1][:3]
        np.testing.assert_allclose(part["probability"], expected, rtol=1e-5)
        columns = [NAMES.index(label) for label in part["label"]]
        np.testing.assert_allclose(probabilities[row, columns], expected, rtol=1e-5)
    whole = model.top_k(np.zeros((1, 32, 32), np.uint8))
    assert len(whole) == 5 and "file" not in whole.columns
    assert abs(whole["probability"].sum() - 1) < 1e-5


def test_two_classes_have_one_decision(tiles):
    _, paths, _ = tiles
    model = PretrainedClassifier(named(2, ("no", "yes")))
    lead = model.decision_function(paths[:8])
    assert lead.shape == (8,)
    np.testing.assert_array_equal(model.predict(paths[:8]), np.where(lead > 0, "yes", "no"))


def test_the_memory_is_that_of_the_extractor(tiles, tmp_path, run_log, scaled):
    _, paths, _ = tiles
    PretrainedFeatureExtractor(scaled, layer="output", memory=tmp_path).transform(paths)
    n_runs = len(run_log())
    assert n_runs >= 40
    model = PretrainedClassifier(scaled, memory=tmp_path)
    model.predict(paths[::-1])
    model.top_k(paths)
    assert len(run_log()) == n_runs


# ------------------------------------------------------------------------------ which network


@pytest.mark.parametrize("name", ["resnet50", "vgg16"])
def test_networks_by_name(name, tiles):
    _, paths, _ = tiles
    model = PretrainedClassifier(name, weights=None, image_size=32).fit(paths[:2])
    np.testing.assert_array_equal(model.classes_, np.arange(1000))
    assert model.predict_proba(paths[:2]).shape == (2, 1000)
    assert model.predict(paths[:2]).dtype.kind == "i"


def test_weights_from_a_file_have_numbers_for_classes(tiles, tmp_path):
    _, paths, _ = tiles
    network = get_model("squeezenet1_1", None).network
    state = {
        name: value[:7] if "classifier" in name else value
        for name, value in network.state_dict().items()
    }
    torch.save(state, tmp_path / "seven.pth")
    model = PretrainedClassifier("squeezenet1_1", weights=tmp_path / "seven.pth", image_size=64)
    assert model.classes_.tolist() == list(range(7))
    assert set(model.predict(paths[:5])) <= set(range(7))


# ------------------------------------------------------------------------------ scikit-learn


@pytest.mark.filterwarnings("ignore:.*outside.*:UserWarning")
def test_check_estimator_whole():
    # Of a network without names: four checks compare predictions by numpy.isclose, which takes no
    # strings. The tests of order, subsets, clones and pickles below compare names.
    register_model("small-nameless", lambda weights: named(names=None))
    results = check_estimator(PretrainedClassifier("small-nameless", image_shape=(1, -1)))
    assert len(results) > 35
    assert {result["status"] for result in results} == {"passed"}


@pytest.mark.parametrize("method", ["predict", "predict_proba", "decision_function"])
def test_order_and_subsets_change_nothing(tiles, scaled, method):
    _, paths, _ = tiles
    predict = getattr(PretrainedClassifier(scaled), method)
    whole = predict(paths[:12])
    np.testing.assert_array_equal(predict(paths[:12][::-1])[::-1], whole)
    parts = [predict(paths[i : i + 3]) for i in range(0, 12, 3)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_what_scikit_learn_sees(tiles, scaled):
    _, paths, _ = tiles
    model = PretrainedClassifier(scaled)
    assert not is_classifier(model)  # it does not learn the classes of y
    assert not model.__sklearn_tags__().requires_fit
    y = model.predict(paths)
    y[::4] = "none of these"
    assert accuracy_score(y, model.predict(paths)) == 0.75
    assert cross_val_score(model, paths, y, cv=4, scoring="accuracy").mean() == 0.75


def test_clone_and_pickle(tiles):
    _, paths, _ = tiles
    register_model("small-named", lambda weights: named())
    model = PretrainedClassifier("small-named").fit(paths[:2])
    assert len(pickle.dumps(model)) < 1_000  # not the network
    for copy in (clone(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(copy.predict(paths[:2]), model.predict(paths[:2]))
        np.testing.assert_array_equal(copy.predict_proba(paths[:2]), model.predict_proba(paths[:2]))


def test_frames_and_flat_rows(tiles, scaled):
    _, paths, _ = tiles
    model = PretrainedClassifier(scaled).fit(pd.DataFrame({"image": paths}))
    with pytest.raises(ValueError, match="feature names"):
        model.predict(pd.DataFrame({"photo": paths}))
    flat = PretrainedClassifier(scaled, image_shape=(32, 32))
    assert flat.predict(np.full((2, 1024), 0.5)).shape == (2,)


def test_verbose_shows_one_progress_bar(tiles, scaled, capfd):
    _, paths, _ = tiles
    PretrainedClassifier(scaled, verbose=1).predict(paths)
    shown = capfd.readouterr()
    assert "40/40" in shown.err and shown.out == ""


# ------------------------------------------------------------------------------ bad input


class Maps(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    "backbone, message",
    [
        (Backbone(Maps(), SIZE), r"shape \(3, 32, 32\) an image.*FineTunedClassifier"),
        (named(1, None), r"shape \(1,\) an image: no logits"),
        (named(4), "names 5 categories, but its output has 4 columns"),
    ],
)
def test_networks_that_do_not_classify(backbone, message, tiles):
    _, paths, _ = tiles
    model = PretrainedClassifier(backbone)
    for method in (model.fit, model.predict, model.predict_proba, model.top_k):
        with pytest.raises(ValueError, match=message):
            method(paths[:2])


def test_a_network_without_a_head():
    network = small()
    network.head, network.num_classes = nn.Identity(), 0  # as timm makes them
    with pytest.raises(ValueError, match="an embedding, as it has no head"):
        PretrainedClassifier(Backbone(network, SIZE)).predict(np.zeros((1, 32, 32), np.uint8))


@pytest.mark.parametrize("k", [0, 6, 2.0, True, "5"])
def test_bad_k(k, scaled):
    with pytest.raises(ValueError, match="k must be an int from 1 to 5 classes"):
        PretrainedClassifier(scaled).top_k(np.zeros((1, 8, 8), np.uint8), k=k)


def test_bad_images_are_named(tiles, tmp_path, scaled):
    _, paths, _ = tiles
    Path(tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"row 1 \(.*broken.jpg"):
        PretrainedClassifier(scaled).predict([paths[0], tmp_path / "broken.jpg"])


def test_dask_collections(tiles, scaled):
    paths = tiles[1][:6]
    model, lazy = PretrainedClassifier(scaled), da.from_array(np.array(paths), chunks=4)
    for method in ("predict", "predict_proba", "decision_function"):
        found, expected = getattr(model, method)(lazy), getattr(model, method)(paths)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        computed = found.compute(scheduler="synchronous")
        if method == "predict":
            assert (computed == expected).all()
        else:
            np.testing.assert_allclose(computed, expected, rtol=1e-4, atol=1e-5)
