"""Several layers and several poolings: which rows they stand for, their names, their memory."""

import pickle

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import skops.io
import torch
from networks import Untraceable, small
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

from sktransfer import (
    FineTunedClassifier,
    FineTunedRegressor,
    PretrainedFeatureExtractor,
    load_model,
    make_classifier,
    model_summary,
    register_model,
)
from sktransfer._engine import embedding as embedding_module
from sktransfer._estimators.pretrained import embedding_of
from sktransfer._training.heads import make_head, solve_head
from sktransfer._training.whole import whole_of_trainer
from sktransfer.io import check_images
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing


def extractor(network=None, **options):
    network = small() if network is None else network
    return PretrainedFeatureExtractor(network, **{"image_size": 32, **options})


def pictures(n=64):
    return np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


def parts_of(model):
    """Return the layers and poolings by the names of the features, each once, in order."""
    return list(dict.fromkeys(n.rsplit("_", 1)[0] for n in model.get_feature_names_out()))


def conv(a, b, stride=1):
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.ReLU())


def vgg_like():
    """Two blocks of 32 × 32, two of 16 × 16, then two hidden linear layers."""
    maps = [conv(3, 4), conv(4, 4), conv(4, 6, 2), conv(6, 6)]
    pool = [nn.AdaptiveAvgPool2d(16), nn.Flatten()]
    hidden = [nn.Linear(6 * 256, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU()]
    return nn.Sequential(*maps, *pool, *hidden, nn.Linear(7, 2))


def vit(depth=8):
    return VisionTransformer(32, 8, embed_dim=12, depth=depth, num_heads=2, num_classes=3)


def short_vit():
    return vit(4)


def swin():
    return SwinTransformer([4, 4], 8, [2, 2], [1, 2], [2, 2], num_classes=3)


# ------------------------------------------------------------------------------ what they name


def test_all_names_every_block_once_for_each_pooling():
    model = extractor(layer="all", pooling=("max", "avg")).fit(pictures(2))
    expected = [f"{name}_{pooling}" for name in model.block_names_ for pooling in ("max", "avg")]
    assert parts_of(model) == expected
    rows = model.transform(pictures(5))
    each = [
        extractor(layer=layer, pooling=pooling).transform(pictures(5))
        for layer in range(3)
        for pooling in ("max", "avg")
    ]
    np.testing.assert_array_equal(rows, np.hstack(each))


@pytest.mark.parametrize(
    "network, stages",
    [
        (small, ["stem", "body.0", "body.1"]),
        (vgg_like, ["1", "3", "8"]),
        (vit, ["blocks.1", "blocks.3", "blocks.5", "blocks.7"]),
        (lambda: vit(3), ["blocks.0", "blocks.1", "blocks.2"]),
        (swin, ["features.1.1", "features.3.1"]),
        (lambda: nn.Sequential(conv(3, 4), conv(4, 4), nn.Flatten(), nn.Linear(4096, 2)), ["1"]),
    ],
)
def test_stages(network, stages):
    parts = parts_of(extractor(network(), layer="stages", pooling=("avg", "max")))
    assert list(dict.fromkeys(part.rsplit("_", 1)[0] for part in parts)) == stages


def test_a_vector_contributes_once():
    model = extractor(vgg_like(), layer=["3", "6", "auto"], pooling=("avg", "max", "flatten"))
    assert parts_of(model) == ["3_avg", "3_max", "3_flatten", "6_vector", "auto_vector"]
    assert model.transform(pictures(2)).shape == (2, 6 + 6 + 6 * 256 + 8 + 7)


def test_tokens_take_all_poolings():
    network = vit(2)
    model = extractor(network, layer="all", pooling=("token", "avg", "max", "flatten"))
    one = [
        extractor(network, layer=-1, pooling=pooling).transform(pictures(3))
        for pooling in ("token", "avg", "max", "flatten")
    ]
    both = model.transform(pictures(3))
    np.testing.assert_allclose(both[:, -both.shape[1] // 3 :], np.hstack(one), 1e-5, 1e-6)


def test_all_may_stand_in_a_list():
    assert parts_of(extractor(layer=["all", "auto", "output"]))[-2:] == [
        "auto_vector",
        "output_vector",
    ]


def test_normalized_layers_weigh_alike(tmp_path):
    options = {"layer": "all", "pooling": ("avg", "max"), "memory": tmp_path}
    rows = extractor(**options).transform(pictures(6))
    normalized = extractor(**options, normalize=True).transform(pictures(6))
    names = extractor(**options).get_feature_names_out()
    parts = np.array([name.rsplit("_", 1)[0] for name in names])
    for part in set(parts):
        roots = np.sign(rows[:, parts == part]) * np.sqrt(np.abs(rows[:, parts == part]))
        expected = roots / np.linalg.norm(roots, axis=1, keepdims=True) / np.sqrt(6)
        np.testing.assert_allclose(normalized[:, parts == part], expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(normalized, axis=1), 1, atol=1e-6)
    alone = extractor(**options, normalize=True).transform(pictures(6)[2:3])
    np.testing.assert_array_equal(alone, normalized[2:3])


def test_a_row_of_zeros_stays_one_when_it_is_normalized():
    network = nn.Sequential(conv(3, 4), conv(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for weight in network.parameters():
        nn.init.zeros_(weight)
    rows = extractor(network, normalize=True).transform(pictures(2))
    assert np.array_equal(rows, np.zeros((2, 4)))


# ------------------------------------------------------------------------------ memory


def test_after_all_layers_any_choice_of_them_runs_nothing(tmp_path, run_log):
    X = pictures()
    first = extractor(layer="all", pooling=("avg", "max"), memory=tmp_path).transform(X)
    assert set(np.unique(run_log(), return_counts=True)[1]) == {1}  # each image once
    n_runs = len(run_log())
    assert n_runs == 64
    for layer in ("stages", "auto", "body.0", -1, [-1, 0]):
        for pooling in (("max", "avg"), "max"):
            rows = extractor(layer=layer, pooling=pooling, memory=tmp_path).transform(X)
            fresh = extractor(layer=layer, pooling=pooling).transform(X[:2])
            np.testing.assert_allclose(rows[:2], fresh, 1e-5, 1e-6)
    assert len(run_log()) == n_runs + 2 * 10  # the fresh ones
    again = extractor(layer="all", pooling=("avg", "max"), memory=tmp_path).transform(X[::-1])
    assert again.tobytes() == first[::-1].tobytes()


@pytest.mark.parametrize("network", [vgg_like, vit, swin])
def test_the_embedding_comes_with_the_last_block_where_it_is_free(network, tmp_path):
    network, X = network(), pictures(4)
    extractor(network, layer=-1, memory=tmp_path).transform(X)
    embedding = embedding_of(extractor(network, layer="auto", pooling="max", memory=tmp_path))
    model = extractor(network, layer="auto", memory=tmp_path)
    rows = model.transform(X)
    embedding(model.check_images(X))
    assert embedding.n_computed == 0
    np.testing.assert_allclose(rows, extractor(network).transform(X), 1e-4, 1e-5)


def test_an_embedding_with_weights_of_its_own_is_not_computed_unasked(tmp_path):
    network = nn.Sequential(conv(3, 4), nn.Flatten(), nn.Linear(4096, 2))
    model = extractor(network, layer=0, memory=tmp_path)
    assert len(embedding_of(model).outputs) == 2  # flattening is free
    attentive = VisionTransformer(
        32, 8, embed_dim=12, depth=1, num_heads=2, class_token=False, global_pool="map"
    )
    model = extractor(attentive, layer=-1, memory=tmp_path)
    assert len(embedding_of(model).outputs) == 1


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_a_row_does_not_depend_on_the_other_images(runtime, two_threads):
    model, X = extractor(layer="all", pooling=("avg", "max"), runtime=runtime), pictures(6)
    rows = model.transform(X)
    order = [3, 0, 5, 1, 2, 4]
    assert model.transform(X[order]).tobytes() == rows[order].tobytes()


# ------------------------------------------------------------------------------ names


def test_names_survive_scikit_learn():
    model = extractor(layer="all", pooling=("avg", "max"))
    names = list(model.get_feature_names_out())
    assert names[:2] == ["stem_avg_0", "stem_avg_1"] and names[-1] == "body.1_max_15"
    assert len(set(names)) == 2 * (8 + 12 + 16)
    X = pictures(3)
    frame = extractor(layer="all", pooling=("avg", "max")).set_output(transform="pandas")
    assert list(frame.transform(X).columns) == names
    union = FeatureUnion([("deep", model), ("end", extractor(vgg_like()))])
    assert union.fit_transform(X).shape == (3, len(names) + 7)
    expected = [f"deep__{name}" for name in names]
    expected += [f"end__pretrainedfeatureextractor{i}" for i in range(7)]
    assert list(union.get_feature_names_out()) == expected
    assert list(union.set_output(transform="pandas").fit_transform(X).columns) == expected
    table = pd.DataFrame({"image": list(X)})
    columns = ColumnTransformer([("net", model, "image")]).set_output(transform="pandas")
    assert list(columns.fit_transform(table).columns) == [f"net__{name}" for name in names]


def test_one_layer_and_one_pooling_have_plain_names():
    for layer, pooling in (("stem", "avg"), (["stem"], ("avg",)), ("stem", ["max"])):
        names = extractor(layer=layer, pooling=pooling).get_feature_names_out()
        assert names[0] == "pretrainedfeatureextractor0" and len(names) == 8
    assert parts_of(extractor(layer="stem", pooling=("avg", "max"))) == ["stem_avg", "stem_max"]
    assert parts_of(extractor(layer="auto", pooling=("avg", "max"))) == ["auto_vector"]


def test_in_a_pipeline(tiles):
    _, paths, labels = tiles
    model = make_pipeline(extractor(layer="all", pooling=("avg", "max")), StandardScaler(), SVC())
    assert model.fit(paths, labels).score(paths, labels) > 0.8


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer": ["stem", "bodi"]}, "No block is called 'bodi'.*'body'"),
        ({"layer": ["stem", "stem"]}, "twice: 'stem' and 'stem' both stand for 'stem'"),
        ({"layer": [-1, "body.1"]}, "twice: -1 and 'body.1' both stand for 'body.1'.*Leave one"),
        ({"layer": ["body", -1]}, "twice: 'body' and -1 both stand for 'body.1'"),
        ({"layer": ["all", "stem"]}, "twice: 'all' and 'stem' both stand for 'stem'"),
        ({"layer": ["all", "stages"]}, "twice: 'all' and 'stages' both stand for 'stem'"),
        ({"layer": ["output", "output"]}, "twice: 'output' and 'output'"),
        ({"layer": ()}, "names no block"),
        ({"layer": [["stem"]]}, "must be an int or a str"),
        ({"layer": [True]}, "must be an int or a str"),
        ({"pooling": ()}, "names no pooling; pass at least one of 'avg'"),
        ({"pooling": ("avg", "mean")}, "holds 'mean', which is none of 'avg'"),
        ({"pooling": ["avg", None]}, "holds None"),
        ({"pooling": ("max", "avg", "max")}, "names 'max' twice"),
        ({"layer": "all", "pooling": ("avg", "token")}, "'token' can't .* layer 'stem'.*'avg'"),
    ],
)
def test_bad_layers_and_poolings(options, message):
    model = extractor(**options)
    for method in (model.fit, model.transform):
        with pytest.raises((ValueError, TypeError), match=message):
            method(pictures(2))


def test_the_embedding_may_be_the_last_block():
    with pytest.raises(ValueError, match="'auto' and -1 both stand for '8'"):
        extractor(vgg_like(), layer=["auto", -1]).fit(pictures(2))


def test_flattened_layers_that_are_too_large_together():
    model = PretrainedFeatureExtractor(layer="all", pooling=("avg", "flatten"))
    message = r"36 layers and poolings.*401,408 of them pooling='flatten' of layer 'conv_stem'.*avg"
    with pytest.raises(ValueError, match=message):
        model.fit(pictures(2))
    assert model.set_params(layer="conv_stem", pooling="flatten").fit(pictures(1))


def test_networks_without_blocks():
    for layer in ("all", "stages", ["output", "all"]):
        with pytest.raises(ValueError, match="Untraceable.*layer='output'"):
            extractor(Untraceable(), layer=layer).fit(pictures(2))
        with pytest.raises(ValueError, match="has none: pass layer='auto'"):
            extractor(nn.Sequential(nn.AvgPool2d(8)), layer=layer).fit(pictures(2))


def test_layouts_that_only_flatten_takes():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, 2, 1), nn.Linear(4 * 256, 2)

        def forward(self, x):
            return self.head(self.conv(x).unflatten(1, (2, 2)).flatten(1))

    model = extractor(Split(), layer=0, pooling=("flatten", "avg"))
    message = r"'avg'.*layer 'conv'.*\(2, 2, 16, 16\) have neither a map nor tokens.*'flatten'"
    with pytest.raises(ValueError, match=message):
        model.fit(pictures(2))
    assert model.set_params(pooling=["flatten"]).fit_transform(pictures(2)).shape == (2, 1024)


def test_the_recipe():
    X, y = pictures(16), np.arange(16) % 2
    X[y == 1] //= 2
    model = make_classifier(small(), image_size=32)
    assert model[0].get_params().items() >= {**BOTH, "normalize": True}.items()
    assert list(model.named_steps)[1:] == ["standardscaler", "logisticregression"]
    assert model.fit(X, y).score(X, y) == 1 and model.predict_proba(X).shape == (16, 2)
    own = make_classifier(small(), classifier=SVC(C=10), image_size=32, pooling="avg")
    assert own.fit(X, y)[:-1].transform(X).shape == (16, 36) and own[-1].C == 10
    whole = make_classifier(Untraceable(), image_size=32, layer="output", pooling="avg")
    assert whole.fit(X, y).predict(X).shape == (16,)


# ------------------------------------------------------------------------------ a head on them


BOTH = {"layer": "all", "pooling": ("avg", "max")}


def head_on_layers(kind=FineTunedClassifier, network=None, **options):
    network = small() if network is None else network
    options = {"image_size": 32, "random_state": 0, "unfreeze": 0, **BOTH, **options}
    return kind(network, **options)


def fitted(model, X):
    """Return images as the network takes them, uint8 (n, 3, h, w)."""
    images, size = check_images(X), model.trainer().frozen.preprocessing
    return torch.stack([images.load(i, None, size.fit_size) for i in range(len(X))])


def labels(n=64):
    return np.where(pictures(n)[..., 0].mean((1, 2)) > 127, "red", "blue")


def test_a_head_on_all_layers_takes_the_rows_of_an_extractor(tmp_path, run_log):
    X, y = pictures(), labels()
    rows = extractor(**BOTH, memory=tmp_path).transform(X)
    n_runs = len(run_log())
    model = head_on_layers(memory=tmp_path).fit(X, y)
    outputs = model.net_.module_.head(torch.from_numpy(rows)).detach().numpy()
    assert len(run_log()) == n_runs and model.n_trainable_parameters_ == 2 * (72 + 1)
    np.testing.assert_allclose(model.decision_function(X), np.diff(outputs)[:, 0], 1e-4, 1e-5)
    assert model.score(X, y) > 0.7
    head_on_layers(FineTunedRegressor, memory=tmp_path, layer="stages").fit(X, y == "red")
    assert len(run_log()) == n_runs


@pytest.mark.parametrize(
    "network, layer, pooling, unfreeze",
    [
        (vgg_like, ["auto", "output", 0], ("max", "avg"), 0),
        (short_vit, "stages", ("avg", "token"), 0),
        (swin, ["output", "all"], "max", 0),
        (Untraceable, "output", "avg", 0),
        (vgg_like, ["auto", 0, -3], ("max", "avg"), 2),
        (short_vit, "stages", ("avg", "token"), 3),
        (swin, "all", "max", "all"),
    ],
)
def test_what_a_head_on_layers_becomes(network, layer, pooling, unfreeze, tmp_path):
    X, y = pictures(12), labels(12)
    options = {"layer": layer, "pooling": pooling, "unfreeze": unfreeze, "max_epochs": 1}
    model = head_on_layers(network=network(), **options).fit(X, y)
    expected = model.predict_proba(X)
    opened = pickle.loads(pickle.dumps(model))
    assert np.array_equal(opened.predict_proba(X), expected)
    again = clone(model).fit(X, y)
    assert np.array_equal(again.predict_proba(X), expected)
    rows = model.to_feature_extractor().transform(X)
    assert rows.shape[1] == model.net_.module_.head[-1].in_features
    whole = whole_of_trainer(model.trainer())
    logits = whole(model.trainer().frozen.preprocessing.normalize(fitted(model, X)))
    np.testing.assert_allclose(logits.softmax(1), expected, 1e-3, 1e-4)
    *_, embedding, head = model_summary(model).rows
    assert embedding.shape == (rows.shape[1],) and head.shape == (2,)


def test_a_head_on_layers_goes_on():
    X, y = pictures(12), labels(12)
    model = head_on_layers(max_epochs=2, head_epochs=1, warm_start=True).fit(X, y)
    assert len(model.fit(X, y).history_) == 4
    assert len(model.partial_fit(X, y).history_) == 5
    with pytest.raises(ValueError, match="layer has changed from 'all' to 'stages'"):
        model.set_params(layer="stages").fit(X, y)


@pytest.mark.parametrize(
    "unfreeze, layer", [(0, ["body", "output", "stem"]), (1, ["body", "auto", "stem"])]
)
def test_a_head_on_layers_is_written_to_files(unfreeze, layer, tmp_path):
    X, y = pictures(6), np.arange(6) % 2
    register_model("small", lambda weights: Backbone(small()))  # a model file holds the name
    model = head_on_layers(network="small", unfreeze=unfreeze, max_epochs=1).fit(X, y)
    skops.io.dump(model, tmp_path / "model.skops")
    opened = load_model(tmp_path / "model.skops")
    assert np.array_equal(opened.predict_proba(X), model.predict_proba(X))
    model = head_on_layers(layer=layer, unfreeze=unfreeze, max_epochs=1).fit(X, y)
    session = onnxruntime.InferenceSession(model.to_onnx(tmp_path / "model.onnx"))
    (found,) = session.run(None, {"images": fitted(model, X).numpy()})
    np.testing.assert_allclose(found, model.predict_proba(X), 1e-3, 1e-4)


# ------------------------------------------------------------------ with blocks that are trained


@pytest.mark.parametrize("unfreeze, tolerance", [("all", 1e-5), (1, 1e-3), (["body.0"], 1e-3)])
def test_training_starts_at_the_head_on_frozen_layers(unfreeze, tolerance):
    X, y = pictures(), labels()
    expected = head_on_layers().fit(X, y).predict_proba(X)
    model = head_on_layers(unfreeze=unfreeze, max_epochs=0).fit(X, y)
    # What is kept at a cut is rounded to half precision, once.
    np.testing.assert_allclose(model.predict_proba(X), expected, atol=tolerance)
    assert model.set_params(max_epochs=3).fit(X, y).score(X, y) > 0.9


@pytest.mark.parametrize("width", [30, 3000])
def test_a_head_that_keeps_its_scales_has_the_same_outputs(width):
    random = np.random.default_rng(0)
    rows = random.normal(size=(60, width)).astype(np.float32) * random.uniform(0.01, 10, width)
    heads = [make_head("linear", width, 2, 0.0, scales) for scales in (False, True)]
    for head in heads:
        solve_head(head, rows.astype(np.float32), np.arange(60) % 2, None, "class")
    folded, scaled = (head(torch.from_numpy(rows).float()).detach().numpy() for head in heads)
    np.testing.assert_allclose(scaled, folded, 1e-3, 1e-3)
    sums = (heads[1][0](torch.from_numpy(rows).float())).abs().sum(1)
    assert sums.mean() < 700  # a step of the training then moves outputs as one on a single layer


def test_a_regressor_starts_there_as_well():
    X, y = pictures(), labels() == "red"
    models = [head_on_layers(FineTunedRegressor, unfreeze=n, max_epochs=0) for n in (0, "all")]
    np.testing.assert_allclose(*(model.fit(X, y).predict(X) for model in models), atol=1e-5)


@pytest.mark.parametrize("layer", [["stem", "body.0"], ["body.0", "stem"], "body.0"])
def test_blocks_learn_through_their_own_rows(layer):
    network, X, y = small(), pictures(16), labels(16)
    options = {"unfreeze": ["body.0"], "layer": layer, "lr": 1e-2, "max_epochs": 2}
    model = head_on_layers(network=network, **options).fit(X, y)
    blocks = model.net_.module_.blocks
    assert not torch.equal(blocks[0].state_dict()["body.0.weight"], network.body[0].weight)
    assert torch.equal(blocks[1].state_dict()["body.1.weight"], network.body[1].weight)
    head, rows = model.net_.module_.head, model.to_feature_extractor().transform(X)
    outputs = head(torch.from_numpy(rows)).softmax(1).detach().numpy()
    np.testing.assert_allclose(model.predict_proba(X), outputs, atol=1e-3)


def test_the_scales_of_layers_are_never_trained():
    model = head_on_layers(unfreeze=1, max_epochs=0).fit(pictures(), labels())
    before = model.net_.module_.trained_state()
    after = model.set_params(max_epochs=2).fit(pictures(), labels()).net_.module_.trained_state()
    is_same = {name: np.array_equal(before[name], after[name]) for name in before if "head" in name}
    assert list(is_same.values()) == [True, True, False, False] and "head.0.mean" in is_same


@pytest.mark.parametrize("keeps_cut", [True, False])
def test_frozen_layers_run_once(keeps_cut, tmp_path, run_log, monkeypatch):
    monkeypatch.setattr("sktransfer._training.plan._keeps_cut", lambda *_: keeps_cut)
    X, y = pictures(16), labels(16)
    options = {"unfreeze": 1, "max_epochs": 3, "augment": "dihedral", "n_views": 2}
    kept = head_on_layers(**options, memory=tmp_path).fit(X, y)
    n_runs = len(run_log())
    assert n_runs == 32 + (0 if keeps_cut else 3 * 16)  # of two views; images, in each epoch
    expected = kept.predict_proba(X)
    again = head_on_layers(**options, memory=tmp_path).partial_fit(X, y, np.unique(y))
    assert len(run_log()) == n_runs + (0 if keeps_cut else 16)
    np.testing.assert_allclose(head_on_layers(**options).fit(X, y).predict_proba(X), expected, 1e-5)
    assert again.predict_proba(X).shape == (16, 2)


def test_what_the_memory_has_stays_when_others_run_the_same_images(tiles, tmp_path, request):
    paths, options = tiles[1][:4], {"image_size": 32, "runtime": "torch"}
    embedding = PretrainedFeatureExtractor(**options, memory=tmp_path)
    stages = clone(embedding).set_params(layer="stages").fit(paths)
    rows, of_stages = embedding.transform(paths), stages.transform(paths)
    request.getfixturevalue("two_threads")  # which add up in another order
    assert (clone(stages).set_params(memory=None).transform(paths) != of_stages).any()
    everything = clone(stages).set_params(layer="all").fit(paths)
    names = everything.get_feature_names_out().tolist()
    columns = [names.index(name) for name in stages.get_feature_names_out()]
    for images in ([*paths, paths[0]], paths):  # computed, then read
        np.testing.assert_array_equal(everything.transform(images)[:4, columns], of_stages)
    np.testing.assert_array_equal(stages.transform(paths), of_stages)
    np.testing.assert_array_equal(embedding.transform(paths), rows)


def test_depths_share_the_rows_of_all_layers(tmp_path, run_log):
    X, y = pictures(24), labels(24)
    model = head_on_layers(memory=tmp_path, max_epochs=1)
    search = GridSearchCV(model, {"unfreeze": [0, ["body.0"]]}, cv=2).fit(X, y)
    assert len(set(run_log())) == 24 and len(run_log()) <= 2 * 24
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    model = head_on_layers(unfreeze="auto", max_epochs=1, memory=tmp_path).fit(X, y)
    assert model.depth_search_["unfreeze"] in (0, 1, 2) and len(set(run_log())) == 24


def test_training_on_layers_takes_pieces_goes_on_and_stops_early(monkeypatch):
    X, y = pictures(), labels()
    options = {"unfreeze": 2, "max_epochs": 2, "augment": "flip", "warm_start": True}
    model = head_on_layers(**options).fit(X, y)
    expected = model.predict_proba(X)
    monkeypatch.setattr("sktransfer._training.trained_part._PIECE", 5e4)
    assert 1 < model.net_.module_.piece(32) < 32
    in_pieces = head_on_layers(**options).fit(X, y)
    np.testing.assert_allclose(in_pieces.predict_proba(X), expected, atol=1e-3)
    assert len(model.fit(X, y).history_) == 4
    assert len(model.partial_fit(X, y).history_) == 5
    stopping = head_on_layers(**options, early_stopping=True, n_iter_no_change=1).fit(X, y)
    assert "valid_loss" in stopping.history_[0]
    fresh = head_on_layers(unfreeze=2).partial_fit(X, y, classes=np.unique(y))
    assert fresh.predict_proba(X).shape == (64, 2)


@pytest.mark.parametrize("head", [(5,), nn.Linear(72, 2)])
def test_other_heads_on_layers_and_trained_blocks(head):
    model = head_on_layers(unfreeze=1, head=head, max_epochs=1).fit(pictures(16), labels(16))
    assert model.predict(pictures(3)).shape == (3,)
    scratch = head_on_layers(unfreeze="all", weights=None, max_epochs=1)
    assert scratch.fit(pictures(16), labels(16)).predict(pictures(3)).shape == (3,)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer": "stem"}, "'stem' lies in front of block 'body.1', which unfreeze=1 trains.*Add"),
        ({"layer": [0, 1], "unfreeze": 2}, "'body.1', which unfreeze=2 trains.*or pass unfreeze=0"),
        ({"layer": -2, "unfreeze": "all"}, "'body.1', which unfreeze='all' trains"),
        ({"layer": "output"}, "what the pretrained head says, and unfreeze=1 trains.*'auto'"),
        ({"layer": ["all", "output"], "unfreeze": "auto"}, "pretrained head says.*'auto'"),
        ({"layer": ["all", "stem"]}, "twice: 'all' and 'stem'"),
        ({"precision": "int8"}, "blocks can't be trained in 8 bits"),
        ({"network": Untraceable(), "unfreeze": "all"}, "Untraceable cannot be cut.*'all' where"),
    ],
)
def test_layers_that_trained_blocks_do_not_reach(options, message):
    for kind in (FineTunedClassifier, FineTunedRegressor):
        model = head_on_layers(kind, **{"unfreeze": 1, **options})
        with pytest.raises(ValueError, match=message):
            model.fit(pictures(8), np.arange(8) % 2)


def test_several_poolings_of_trained_blocks():
    network = nn.Sequential(conv(3, 4), conv(4, 6, 2), nn.Flatten(), nn.Linear(1536, 2))
    model = FineTunedClassifier(
        network, unfreeze=1, pooling=("avg", "max"), image_size=32, max_epochs=1
    ).fit(pictures(8), labels(8))
    assert model.predict(pictures(3)).shape == (3,)


@pytest.mark.parametrize("options", [{"layer": [0, "stem"]}, {"pooling": ("avg", "avg")}])
def test_bad_layers_of_a_head(options):
    with pytest.raises(ValueError, match="twice"):
        head_on_layers(**options).fit(pictures(8), labels(8))


# ------------------------------------------------------------------------------ views


def symmetries(images, n):
    """Return the first views of square images: as they are, mirrored, turned upside down, both."""
    views = [images, images[:, :, ::-1], images[:, ::-1, ::-1], images[:, ::-1]]
    turned = images.transpose(0, 2, 1, 3)
    views += [turned[:, ::-1], turned[:, ::-1, ::-1], turned[:, :, ::-1], turned]
    return views[:n]


@pytest.mark.parametrize(
    "augment, n_views, n", [("flip", None, 2), ("dihedral", 4, 4), ("dihedral", None, 8)]
)
def test_a_row_is_the_mean_over_views(augment, n_views, n, tmp_path):
    # Nothing is cropped: the views are those of the images, too.
    network = Backbone(small(), Preprocessing(size=(32, 32), resize=(32, 32)))
    options = {"layer": "all", "pooling": ("avg", "max"), "memory": tmp_path}
    options["network"] = network
    model = extractor(**options, augment=augment, n_views=n_views)
    rows = model.transform(pictures(6))
    each = [extractor(**options).transform(view) for view in symmetries(pictures(6), n)]
    np.testing.assert_allclose(rows, np.mean(each, axis=0), atol=1e-5)
    assert model.get_feature_names_out().tolist() == [*extractor(**options).get_feature_names_out()]
    # In the memory each view is an entry of its own: other choices of layers run nothing.
    one = extractor(network, memory=tmp_path, layer=1, augment="flip")
    embedding = embedding_of(one)
    embedding(check_images(pictures(6)))
    assert embedding.n_computed == 0
    alone = model.transform(pictures(6)[3:4])
    np.testing.assert_allclose(alone, rows[3:4], atol=1e-6)


def test_views_in_parts_with_one_bar(monkeypatch, capsys):
    model = extractor(augment="dihedral", normalize=True)
    expected = model.transform(pictures(7))
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)
    monkeypatch.setattr(embedding_module, "_VIEWS_BYTES", 4 * expected.shape[1] * 8 * 3)
    rows = model.set_params(verbose=1).transform(pictures(7))
    np.testing.assert_array_equal(rows, expected)
    said = capsys.readouterr().err
    assert "56/56" in said and said.count("\n") == 1 and said.count(" 0/56") == 1 and "view" in said


def test_views_that_are_not_there():
    with pytest.raises(ValueError, match="n_views=3, but augment='flip' has 2 views"):
        extractor(augment="flip", n_views=3).transform(pictures(1))
    with pytest.raises(ValueError, match="n_views=2, but augment=None has 1"):
        extractor(n_views=2).transform(pictures(1))
    with pytest.raises(ValueError, match="has 4 views of an image of 32 × 48"):
        extractor(augment="dihedral", n_views=8, image_size=(32, 48)).transform(pictures(1))
    assert extractor(augment="dihedral", image_size=(32, 48)).transform(pictures(1)).shape[0] == 1
    with pytest.raises(ValueError, match="'augment' parameter"):
        extractor(augment="auto").transform(pictures(1))


def test_a_fine_tuned_network_shares_the_views(tmp_path):
    X, y = pictures(8), np.arange(8) % 2
    options = {"image_size": 32, "augment": "flip", "memory": tmp_path}
    FineTunedClassifier(small(), unfreeze=0, **options).fit(X, y)
    embedding = embedding_of(PretrainedFeatureExtractor(small(), **options))
    embedding(check_images(X))
    assert embedding.n_computed == 0
