import pickle
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from networks import Untraceable, small
from PIL import Image
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import check_estimator

from sktransfer import PretrainedFeatureExtractor, get_model, register_model
from sktransfer._engine.runtime import has_bfloat16
from sktransfer._estimators.pretrained import embedding_of
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing


def extractor(**options):
    return PretrainedFeatureExtractor(small(), **{"image_size": 32, **options})


# ------------------------------------------------------------------------------ right numbers


def test_the_embedded_weights_are_right(photos):
    logits = PretrainedFeatureExtractor(layer="output").transform(photos)
    categories = np.array(get_model("efficientnet_lite0").categories)
    assert categories[logits.argmax(axis=1)].tolist() == ["palace", "daisy"]


def test_equals_the_plain_forward_pass(photos):
    backbone = get_model("efficientnet_lite0")
    network, preprocessing = backbone.network, backbone.preprocessing
    for photo, row in zip(photos, PretrainedFeatureExtractor().transform(photos), strict=True):
        pixels = preprocessing.fit_size(torch.from_numpy(photo.copy()).permute(2, 0, 1))
        with torch.inference_mode():
            maps = network.forward_features(preprocessing.normalize(pixels[None]))
            expected = network.forward_head(maps, pre_logits=True)[0]
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["avg", "max", "flatten"])
@pytest.mark.parametrize("layer, shape", [("stem", (8, 16, 16)), ("body.1", (16, 4, 4))])
def test_pooling_of_feature_maps(tiles, pooling, layer, shape):
    _, paths, _ = tiles
    flat = extractor(layer=layer, pooling="flatten").transform(paths[:3])
    assert flat.shape == (3, np.prod(shape))
    maps = flat.reshape(3, *shape)
    expected = {"avg": maps.mean((2, 3)), "max": maps.max((2, 3)), "flatten": flat}[pooling]
    rows = extractor(layer=layer, pooling=pooling).transform(paths[:3])
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


def test_pooling_of_tokens(tiles):
    _, paths, _ = tiles
    name = "timm/vit_tiny_patch16_224"

    def rows(pooling, layer=-1):
        return PretrainedFeatureExtractor(
            name, weights=None, layer=layer, pooling=pooling
        ).transform(paths[:2])

    tokens = rows("flatten").reshape(2, 197, 192)
    np.testing.assert_allclose(rows("token"), tokens[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows("avg"), tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows("max"), tokens[:, 1:].max(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows("avg", "auto"), tokens[:, 0], rtol=1e-4, atol=1e-5)


def test_maps_with_channels_last_are_pooled_over_positions():
    rows = PretrainedFeatureExtractor("swin_t", weights=None, layer="features.1")
    assert len(rows.get_feature_names_out()) == 96


def test_layers_are_concatenated(tiles):
    _, paths, _ = tiles
    layers = ["body.0", 0, "auto", "output"]
    rows = extractor(layer=layers).transform(paths[:4])
    each = [extractor(layer=layer).transform(paths[:4]) for layer in layers]
    assert [part.shape[1] for part in each] == [12, 8, 16, 5]
    np.testing.assert_allclose(rows, np.hstack(each), rtol=1e-5, atol=1e-6)


def test_a_row_does_not_depend_on_the_others(tiles):
    _, paths, _ = tiles
    rows = extractor().transform(paths)
    order = np.random.default_rng(0).permutation(len(paths))
    np.testing.assert_allclose(extractor().transform(np.array(paths)[order]), rows[order], 1e-6)
    one_by_one = np.vstack([extractor().transform([path]) for path in paths[:5]])
    np.testing.assert_allclose(one_by_one, rows[:5], 1e-6)
    np.testing.assert_allclose(extractor(batch_size=7).transform(paths), rows, 1e-5, 1e-6)


def test_precision_changes_little_and_rows_stay_float32(photos):
    exact = PretrainedFeatureExtractor().transform(photos)
    rough = PretrainedFeatureExtractor(precision="bfloat16").transform(photos)
    assert rough.dtype == np.float32
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert error < 0.05
    assert error > 0 or not has_bfloat16()  # without instructions OpenVINO takes float32


def test_preprocessing_can_come_with_the_module(tiles):
    _, paths, _ = tiles
    grey = Preprocessing(size=(32, 32), resize=(36, 36), mean=(0.5,) * 3, std=(0.5,) * 3)
    backbone = Backbone(small(), grey)
    rows = PretrainedFeatureExtractor(backbone).transform(paths[:3])
    assert not np.allclose(rows, extractor().transform(paths[:3]))


def test_the_module_of_the_user_is_left_as_it_was(tiles):
    _, paths, _ = tiles
    network = small().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    PretrainedFeatureExtractor(network, image_size=32).fit(paths).transform(paths)
    assert network.training and all(p.requires_grad for p in network.parameters())
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])


# ------------------------------------------------------------------------------ kinds of input


def test_all_kinds_of_images_give_the_same_rows(tiles):
    _, paths, _ = tiles
    paths = paths[:6]
    pil = [Image.open(path).convert("RGB") for path in paths]
    arrays = [np.asarray(image) for image in pil]
    block = np.stack(arrays)
    kinds = {
        "paths": paths,
        "Path": [Path(path) for path in paths],
        "array of paths": np.array(paths),
        "series": pd.Series(paths),
        "polars series": pl.Series("image", paths),
        "frame": pd.DataFrame({"image": paths}),
        "polars frame": pl.DataFrame({"image": paths}),
        "bytes": [Path(path).read_bytes() for path in paths],
        "frame of bytes": pd.DataFrame({"image": [Path(path).read_bytes() for path in paths]}),
        "PIL": pil,
        "arrays": arrays,
        "one array": block,
        "float array": block / 255,
        "tensor": torch.from_numpy(block).permute(0, 3, 1, 2),
        "float tensor": torch.from_numpy(block).permute(0, 3, 1, 2) / 255,
    }
    reference = extractor().transform(kinds["arrays"])
    for kind, X in kinds.items():
        rows = extractor().fit_transform(X)
        # Two decoders of JPEG may differ by a level or two.
        np.testing.assert_allclose(rows, reference, rtol=0.02, atol=0.01, err_msg=kind)
    flat = extractor(image_shape=(64, 64, 3)).fit_transform(block.reshape(6, -1))
    np.testing.assert_array_equal(flat, reference)
    inferred = extractor(image_shape=(-1, 64, 3)).fit_transform(block.reshape(6, -1))
    np.testing.assert_array_equal(inferred, reference)


@pytest.mark.parametrize("memory", [False, True])
def test_arrays_in_any_layout(memory, tmp_path):
    """Several images of one array are scaled at once, where they lie."""
    X = np.random.default_rng(0).integers(0, 256, (40, 24, 36, 3)).astype(np.uint8)
    read_only, stored = X.copy(), np.memmap(tmp_path / "X", np.uint8, "w+", shape=X.shape)
    read_only.flags.writeable = False
    stored[:] = X
    layouts = [
        X[::-1],
        X[..., ::-1],  # as people turn BGR into RGB
        X[:, ::-1, ::2],
        X[::3],
        X.transpose(0, 2, 1, 3),
        np.asfortranarray(X),
        np.broadcast_to(X[:1], X.shape),
        read_only,
        stored,
        np.ascontiguousarray(X.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1),
    ]
    options = {"memory": str(tmp_path / "memory")} if memory else {}
    for images in layouts:
        found = extractor(**options).transform(images)
        expected = extractor().transform([image.copy() for image in images])
        np.testing.assert_array_equal(found, expected)


def test_a_data_frame_needs_no_fit(tiles):
    _, paths, _ = tiles
    rows = extractor().transform(pd.DataFrame({"path": paths[:3]}))  # warnings are errors
    assert np.array_equal(rows, extractor().transform(paths[:3]))


def test_images_of_any_sizes(photos):
    X = [photos[0], photos[1][:100], photos[0][:, :50, 0], photos[0][:9, :9]]
    assert extractor().transform(X).shape == (4, 16)


def test_digits_as_flat_rows():
    X, _ = load_digits(return_X_y=True)
    assert extractor(image_shape=(8, 8)).transform(X[:10] / 16).shape == (10, 16)
    with pytest.warns(UserWarning, match="outside"):
        extractor(image_shape=(8, 8)).transform(X[:10])


# ------------------------------------------------------------------------------ scikit-learn


@pytest.mark.filterwarnings("ignore:.*outside.*:UserWarning")
@pytest.mark.parametrize("backbone, size", [("small", 32), ("efficientnet_lite0", 64)])
def test_check_estimator_whole(backbone, size):
    # By name: joblib.hash, which one check compares parameters with, gives a copy of a torch
    # module another hash than the module.
    register_model("small", lambda weights: Backbone(small()))
    model = PretrainedFeatureExtractor(backbone, image_size=size, image_shape=(1, -1))
    results = check_estimator(model)
    assert len(results) > 35
    assert {result["status"] for result in results} == {"passed"}


def test_in_pipelines_and_searches(tiles, tmp_path):
    _, paths, labels = tiles
    pipeline = make_pipeline(extractor(memory=tmp_path), StandardScaler(), SVC())
    assert cross_val_score(pipeline, paths, labels, cv=3).mean() > 0.8
    search = GridSearchCV(
        pipeline,
        {"svc__C": [1, 10], "pretrainedfeatureextractor__layer": ["auto", "stem"]},
        cv=3,
        error_score="raise",
    ).fit(paths, labels)
    assert set(search.predict(paths)) == {"china", "flower"}


def test_in_a_column_transformer_and_a_union(tiles):
    _, paths, _ = tiles
    frame = pd.DataFrame({"image": paths[:6], "kind": list("aabbcc")})
    for column in ("image", ["image"]):
        columns = ColumnTransformer(
            [("net", extractor(), column), ("kind", OneHotEncoder(), ["kind"])]
        )
        assert columns.fit_transform(frame).shape == (6, 16 + 3)
        assert list(columns.get_feature_names_out())[:1] == ["net__pretrainedfeatureextractor0"]
    union = FeatureUnion([("auto", extractor()), ("stem", extractor(layer="stem"))])
    assert union.fit_transform(paths[:6]).shape == (6, 16 + 8)


@pytest.mark.parametrize("kind, frame", [("pandas", pd.DataFrame), ("polars", pl.DataFrame)])
@pytest.mark.parametrize("fit", [True, False])
def test_set_output(tiles, kind, frame, fit):
    _, paths, _ = tiles
    model = extractor().set_output(transform=kind)
    result = model.fit(paths[:3]).transform(paths[:3]) if fit else model.transform(paths[:3])
    assert isinstance(result, frame)
    assert list(result.columns) == [f"pretrainedfeatureextractor{i}" for i in range(16)]


def test_feature_names_and_block_names(tiles):
    _, paths, _ = tiles
    model = extractor()
    assert len(model.get_feature_names_out()) == 16  # stateless: no fit needed
    assert model.fit(paths).block_names_ == ["stem", "body.0", "body.1"]


def test_frames_with_another_column_name_are_refused(tiles):
    _, paths, _ = tiles
    model = extractor().fit(pd.DataFrame({"image": paths}))
    with pytest.raises(ValueError, match="feature names"):
        model.transform(pd.DataFrame({"photo": paths}))


def test_clone_and_pickle(tiles):
    _, paths, _ = tiles
    model = extractor(layer=-1).fit(paths[:3])
    rows = model.transform(paths[:3])
    np.testing.assert_array_equal(clone(model).transform(paths[:3]), rows)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(model)).transform(paths[:3]), rows)
    named = PretrainedFeatureExtractor().fit(paths[:3])
    named.transform(paths[:1])
    assert len(pickle.dumps(named)) < 5_000  # not the network


def test_clones_share_one_copy():
    first, second = PretrainedFeatureExtractor(), clone(PretrainedFeatureExtractor())
    assert embedding_of(first).runner is embedding_of(second).runner


def test_html_repr():
    assert "PretrainedFeatureExtractor" in PretrainedFeatureExtractor()._repr_html_()


def test_verbose_shows_a_progress_bar(tiles, capfd):
    _, paths, _ = tiles
    extractor(verbose=1).transform(paths)
    assert "40/40" in capfd.readouterr().err
    extractor().transform(paths)
    assert capfd.readouterr().err == ""


# ------------------------------------------------------------------------------ bad parameters


def test_untraceable_network_still_gives_its_output(tiles):
    _, paths, _ = tiles
    with pytest.raises(ValueError, match="Untraceable.*layer='output'"):
        PretrainedFeatureExtractor(Untraceable()).transform(paths[:2])
    model = PretrainedFeatureExtractor(Untraceable(), layer="output", image_size=32)
    assert model.fit_transform(paths[:2]).shape == (2, 4)
    assert model.block_names_ == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layer": "stemm"}, "stem.*body.0"),
        ({"layer": 3}, "from -3 to 2; got 3"),
        ({"layer": -4}, "from -3 to 2; got -4"),
        ({"layer": []}, "names no block"),
        ({"pooling": "mean"}, "'pooling' parameter"),
        ({"pooling": "token", "layer": "stem"}, "no class token.*'avg'"),
        ({"device": "cuda:99"}, "device='cuda:99' can't be used"),
        ({"device": "warp"}, "device='warp' can't be used"),
        ({"precision": "int4"}, "'precision' parameter"),
        ({"batch_size": 0}, "'batch_size' parameter"),
        ({"image_size": 0}, "'image_size' parameter"),
        ({"memory": 3}, "'memory' parameter"),
        ({"memory": ""}, "names no folder"),
        ({"backbone": "resnet5"}, "Did you mean 'resnet50'"),
    ],
)
def test_bad_parameters(tiles, options, message):
    _, paths, _ = tiles
    model = extractor().set_params(**options)
    for method in (model.fit, model.transform):
        with pytest.raises((ValueError, TypeError), match=message):
            method(paths[:2])


def test_a_size_that_the_network_does_not_take(tiles):
    _, paths, _ = tiles
    model = PretrainedFeatureExtractor("vit_b_16", weights=None, image_size=100)
    with pytest.raises(ValueError, match="'vit_b_16' can't take images of 100 × 100.*224 × 224"):
        model.transform(paths[:1])


def test_flat_rows_of_another_width():
    model = extractor(image_shape=(8, 8)).fit(np.zeros((3, 64)))
    with pytest.raises(ValueError, match="64 features"):
        model.transform(np.zeros((3, 63)))


def test_no_warnings_in_normal_use(tiles):
    _, paths, labels = tiles
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_pipeline(extractor(), StandardScaler(), LogisticRegression()).fit(paths, labels)
