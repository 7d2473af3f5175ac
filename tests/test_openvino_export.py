"""Files of OpenVINO: what they say of real files, the steps of scikit-learn, what is refused."""

import json
import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import skops.io
import torch
from networks import Untraceable, small
from PIL import Image
from sklearn.base import clone
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier, VotingClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.metrics.pairwise import linear_kernel
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, Normalizer, StandardScaler
from sklearn.svm import SVC, LinearSVC, NuSVC

from sktransfer import (
    FineTunedClassifier,
    FineTunedDetector,
    FineTunedRegressor,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
    ZeroShotClassifier,
    export_openvino,
    make_classifier,
    register_model,
)
from sktransfer._cli import main
from sktransfer._engine import quantising
from sktransfer._engine.openvino_program import core  # one a process
from sktransfer._estimators.exported import (
    network_of,
    rows_in_float32,
    smooth_noise,
    steps_of,
)
from sktransfer._estimators.openvino_check import Case, check_file
from sktransfer._estimators.openvino_steps import steps_module
from sktransfer._training.openvino_file import WrongFile, rows_part
from sktransfer._training.openvino_scaling import scaling
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

openvino = pytest.importorskip("openvino", reason="needs the extra openvino")

SIZE = Preprocessing(size=(32, 40), resize=(36, 44), interpolation="bicubic", std=(0.5,) * 3)
PIXELS = 5e-3  # of the largest value: what a pixel in a hundred does that is off by 1


def compiled(path, hint="f32"):
    return core().compile_model(core().read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": hint})


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1)[np.newaxis]


def said(path, batches, hint="f32"):
    """Return the name of the one output, and what it is for batches, of one size each."""
    model = compiled(path, hint)
    (output,) = model.outputs
    return output.any_name, np.concatenate([model({"images": x})[0] for x in batches])


def facts(path, name):
    return core().read_model(path).get_rt_info(name).value


def extractor(**options):
    return PretrainedFeatureExtractor(Backbone(small(), SIZE), **options)


def near(found, expected, tolerance):
    return np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.fixture(scope="module")
def files(photos, tmp_path_factory):
    """Photographs of several sizes, as files: wide, tall, small, of the size that is cropped."""
    folder = tmp_path_factory.mktemp("photographs")
    sizes = [(320, 214), (300, 400), (60, 90), (128, 128)]
    paths = [folder / f"{i}.png" for i in range(2 * len(sizes))]
    for i, path in enumerate(paths):
        Image.fromarray(photos[i % 2]).resize(sizes[i // 2]).save(path)
    return [str(path) for path in paths]


# ------------------------------------------------------------------------------ scaling


ALL = "SKTRANSFER_TEST_ALL" in os.environ
WAYS = [
    (resize, mode, interpolation)
    for interpolation in ("bilinear", "bicubic")
    for mode in ("center", "floor", "squash", "border")
    for resize in ((36, 44), (25, 30), (25, 44))  # some are padded, whatever interpolates
    if ALL or interpolation == "bicubic" or resize == (36, 44)
]


@pytest.mark.parametrize("resize, mode, interpolation", WAYS, ids=str)
def test_scaling_is_that_of_the_library_in_any_precision(resize, mode, interpolation, photos):
    own = Preprocessing((32, 40), resize, mode, interpolation, mean=(0.4, 0.3, 0.6), std=(1,) * 3)
    images, fitted = scaling(own)
    # With a convolution behind it, OpenVINO would compute all of it in bfloat16.
    op = openvino.opset13
    first = op.transpose(op.convert(fitted, "f32"), op.constant(np.array([0, 3, 1, 2])))
    kernel = op.constant(np.eye(3, dtype=np.float32)[:, :, np.newaxis, np.newaxis])
    output = op.convolution(first, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    model = openvino.Model([op.result(output)], [images], "scaling")
    for hint in ("f32", "bf16"):
        settings = {"INFERENCE_PRECISION_HINT": hint}
        program = core().compile_model(model, "CPU", settings)
        n_off = n = 0
        for height, width in [(427, 640), (36, 44), (200, 60), (35, 47), (3, 40), (1, 1)]:
            crop = torch.from_numpy(photos[0][:height, :width].copy()).permute(2, 0, 1)
            batch = torch.stack([crop, crop.flip(1)])
            off = np.abs(program({0: batch.numpy()})[0] - own.fit_size(batch).numpy())
            assert off.max() <= 1
            n_off, n = n_off + (off > 0).sum(), n + off.size
        assert n_off < 0.02 * n


# ------------------------------------------------------------------------------ whole models


def test_the_recommended_pipeline_on_photographs(files, tmp_path):
    """Of files that need no scaling, the file says what the model says to 1e-4."""
    classes = ["a, b", 'c "d" <é>'] * 4
    model = make_classifier(image_size=112).fit(files, classes)
    path = export_openvino(model, tmp_path / "with spaces.xml")
    assert sorted(os.listdir(tmp_path)) == ["with spaces.bin", "with spaces.xml"]
    expected = model.predict_proba(files)
    name, found = said(path, map(pixels, files))
    assert name == "probabilities" and expected.std() > 0.1
    np.testing.assert_allclose(found, expected, atol=5e-3)
    np.testing.assert_allclose(found[6:], expected[6:], atol=1e-4)  # these are not scaled
    assert json.loads(facts(path, "labels")) == model.classes_.tolist() == sorted(set(classes))
    assert facts(path, "backbone") == "efficientnet_lite0"
    assert facts(path, "producer").startswith("sktransfer ")
    assert facts(path, "INFERENCE_PRECISION_HINT") == "f32"
    # In a process that has neither this library nor scikit-learn; in batches; as it is compiled
    # by those who do not say how, in bfloat16 where the CPU has it.
    batch = np.concatenate([pixels(file) for file in files[:2]])
    np.save(tmp_path / "batch.npy", batch)
    code = (
        "import sys, numpy, openvino; folder = sys.argv[1]\n"
        "model = openvino.Core().compile_model(folder + '/with spaces.xml', 'CPU')\n"
        "found = model({'images': numpy.load(folder + '/batch.npy')})['probabilities']\n"
        "numpy.save(folder + '/found.npy', found)\n"
        "assert not {'torch', 'sklearn', 'sktransfer'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path)], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), expected[:2], atol=0.1)


def test_bfloat16_is_as_near_as_that_of_the_library(files, tmp_path):
    exact = PretrainedFeatureExtractor(image_size=64)
    path = export_openvino(exact, tmp_path / "rows.xml", precision="bfloat16")
    assert facts(path, "INFERENCE_PRECISION_HINT") == "bf16"
    expected = exact.transform(files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a CPU that has none
        own = clone(exact).set_params(precision="bfloat16").transform(files)
    name, found = said(path, map(pixels, files), "bf16")
    assert name == "rows"
    if near(own, expected, 1e-4):
        pytest.skip("this CPU computes bfloat16 in float32")
    assert np.abs(found - expected).max() < 1.3 * np.abs(own - expected).max()


def test_networks_of_the_library_alone(tiles, tmp_path):
    _, paths, labels = tiles
    some = paths[::8]
    views = extractor(augment="dihedral", pooling=("avg", "max"), layer="all", normalize=True)
    name, found = said(export_openvino(views, tmp_path / "rows.xml"), map(pixels, some))
    assert name == "rows" and near(found, views.transform(some), 2 * PIXELS)
    classifier = PretrainedClassifier(Backbone(small(), SIZE, tuple("abcde")))
    path = export_openvino(classifier, tmp_path / "classes.xml")
    name, found = said(path, map(pixels, some))
    assert name == "probabilities" and json.loads(facts(path, "labels")) == list("abcde")
    np.testing.assert_allclose(found, classifier.predict_proba(some), atol=PIXELS)
    options = {"unfreeze": 1, "max_epochs": 1, "random_state": 0}
    truths = np.array(labels) == labels[0]
    tuned = FineTunedClassifier(Backbone(small(), SIZE), **options).fit(paths, truths)
    path = export_openvino(tuned, tmp_path / "tuned.xml")
    assert json.loads(facts(path, "labels")) == [False, True]
    _, found = said(path, map(pixels, some))
    np.testing.assert_allclose(found, tuned.predict_proba(some), atol=PIXELS)
    y = np.stack([np.arange(40.0), np.arange(40.0) % 7], 1)
    regressor = FineTunedRegressor(Backbone(small(), SIZE), **options).fit(paths, y)
    name, found = said(export_openvino(regressor, tmp_path / "tuned.xml"), map(pixels, some))
    assert name == "values" and near(found, regressor.predict(some), 2 * PIXELS)
    assert facts(tmp_path / "tuned.xml", "labels") == "null"  # the file before is replaced


def test_a_prediction_over_views_is_that_of_the_file(tiles, tmp_path):
    _, paths, labels = tiles
    options = {"augment": "flip", "max_epochs": 2, "lr": 0.1, "random_state": 0}
    tuned = FineTunedClassifier(Backbone(small(), SIZE), unfreeze=1, **options).fit(paths, labels)
    alone = tuned.predict_proba(paths)
    tuned.set_params(predict_views=2)
    expected = tuned.predict_proba(paths)
    assert np.abs(expected - alone).max() > 10 * PIXELS
    _, found = said(export_openvino(tuned, tmp_path / "model.xml"), map(pixels, paths))
    np.testing.assert_allclose(found, expected, atol=PIXELS)
    tuned.set_params(augment="auto")
    with pytest.raises(ValueError, match=r"drawn by chance.* after set_params\(predict_views=1"):
        export_openvino(tuned, tmp_path / "model.xml")


def test_images_of_any_shape_and_of_other_channels(tmp_path):
    path = export_openvino(extractor(), tmp_path / "rows.xml")
    random = np.random.default_rng(0)
    for shape in [(1, 30), (30, 1), (300, 20), (37, 45)]:
        image = random.integers(256, size=(*shape, 3), dtype=np.uint8)
        _, found = said(path, [image.transpose(2, 0, 1)[np.newaxis]])
        assert near(found, extractor().transform([image]), 2 * PIXELS)
    with pytest.raises(RuntimeError, match="images|shape"):
        said(path, [np.zeros((1, 4, 40, 40), np.uint8)])
    many = torch.nn.Sequential(torch.nn.Conv2d(5, 8, 3, 2), torch.nn.ReLU())
    own = Preprocessing((32, 32), (32, 32), mean=(0.5,) * 5, std=(0.5,) * 5)
    five = PretrainedFeatureExtractor(Backbone(many, own))
    X = random.integers(256, size=(2, 40, 50, 5), dtype=np.uint8)
    _, found = said(export_openvino(five, tmp_path / "five.xml"), [X.transpose(0, 3, 1, 2)])
    assert near(found, five.transform(X), PIXELS)
    assert facts(tmp_path / "five.xml", "input").startswith("5 channels, uint8")
    if pytest.importorskip("nncf"):
        with pytest.raises(ValueError, match="takes images of 5 channels .*'bfloat16' or 'float3"):
            export_openvino(five, tmp_path / "five.xml", precision="int8")


# ------------------------------------------------------------------------------ 8 bits


@pytest.fixture(scope="module")
def in_8_bits():
    """A network of which the one copy in 8 bits is made once."""
    pytest.importorskip("nncf")
    backbone = Backbone(small(), SIZE, tuple("abcde"))
    register_model("small in 8 bits", lambda weights: backbone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantising, "_N_CROPS", 4)
        yield backbone


def test_8_bits_say_what_an_extractor_in_8_bits_says(in_8_bits, tiles, tmp_path, capsys):
    _, paths, labels = tiles
    options = {"layer": "all", "pooling": ("avg", "max"), "precision": "int8"}
    first = PretrainedFeatureExtractor("small in 8 bits", **options)
    model = make_pipeline(first, StandardScaler(), LogisticRegression(C=0.01))
    model.fit(paths[::2], labels[::2])
    skops.io.dump(model, tmp_path / "model.skops")
    path = tmp_path / "model.xml"
    asked = ["export", str(tmp_path / "model.skops"), "-o", f"{path}/", "--precision", "int8"]
    assert main(asked) == 0  # as where the path has no slash at its end
    assert f"written: {path}" in capsys.readouterr().out
    assert facts(path, "precision") == "int8"
    for hint in ("f32", "bf16"):
        _, found = said(path, map(pixels, paths[::5]), hint)
        np.testing.assert_allclose(found, model.predict_proba(paths[::5]), atol=0.03)
    whole = tmp_path / "not_scaled.png"
    Image.open(paths[0]).resize((44, 36)).save(whole)
    _, found = said(path, [pixels(whole)])
    np.testing.assert_allclose(found, model.predict_proba([whole]), atol=1e-3)
    graph = path.read_text()
    assert graph.count("FakeQuantize") > 3
    exact = export_openvino(model, path).read_text()
    assert "FakeQuantize" not in exact


def test_heads_on_a_network_in_8_bits(in_8_bits, tiles, tmp_path):
    _, paths, labels = tiles
    # Of the size that is cropped, so nothing is scaled.
    X = np.stack([np.asarray(Image.open(file).resize((44, 36))) for file in paths])
    int8 = {"precision": "int8"}
    views = PretrainedFeatureExtractor(in_8_bits, augment="flip", pooling="max", layer="body")
    head = FineTunedClassifier(in_8_bits, unfreeze=0, augment="flip", max_epochs=3, random_state=0)
    head.fit(X, labels)
    models = {
        "logits": PretrainedClassifier(in_8_bits, **int8),
        "head": clone(head).set_params(**int8).fit(X, labels),
        "head, fitted in float32": head.set_params(predict_views=2, **int8),
        "views": make_pipeline(views.set_params(**int8), SVC()).fit(X, labels),
    }
    for what, model in models.items():
        path = export_openvino(model, tmp_path / "model.xml", **int8)
        name, found = said(path, [X[::8].transpose(0, 3, 1, 2)])
        method = {"probabilities": "predict_proba", "scores": "decision_function"}[name]
        expected = getattr(model, method)(X[::8])
        assert near(found.reshape(expected.shape), expected, 1e-4), what
        assert np.ptp(expected, 0).max() > 0.01 * np.abs(expected).max()  # images are told apart


def test_trained_blocks_in_8_bits(in_8_bits, tiles, tmp_path):
    """The file is the network in 8 bits with its trained blocks, and the trained head."""
    _, paths, labels = tiles
    X = np.stack([np.asarray(Image.open(file).resize((44, 36))) for file in paths])
    options = {"max_epochs": 4, "lr": 0.03, "random_state": 0}
    tuned = FineTunedClassifier(in_8_bits, unfreeze=1, **options).fit(X, labels)
    path = export_openvino(tuned, tmp_path / "model.xml", precision="int8")
    _, found = said(path, [X[::8].transpose(0, 3, 1, 2)])
    first = tuned.to_feature_extractor().set_params(precision="int8")
    with torch.inference_mode():
        rows = torch.from_numpy(first.transform(X[::8]))
        expected = tuned.net_.module_.head(rows).softmax(1).numpy()
    assert near(found, expected, 1e-4)
    assert near(found, tuned.predict_proba(X[::8]), 0.1)
    start = PretrainedFeatureExtractor(in_8_bits, precision="int8")
    assert not near(rows.numpy(), start.transform(X[::8]), 0.1)  # its blocks are other ones
    assert path.read_text().count("FakeQuantize") > 3


# ------------------------------------------------------------------------------ steps


STEPS = [
    (StandardScaler(), 2),
    (StandardScaler(with_mean=False), 2),
    (StandardScaler(with_std=False), 2),
    (MinMaxScaler(), 2),
    (MinMaxScaler((-1, 2), clip=True), 2),
    (MaxAbsScaler(), 2),
    (Normalizer(), 2),
    (Normalizer("l1"), 2),
    (Normalizer("max"), 2),
    (PCA(3), 2),
    (TruncatedSVD(3), 2),
    (LogisticRegression(), 2),
    (LogisticRegression(), 3),
    (LinearDiscriminantAnalysis(), 3),
    (LinearSVC(), 2),
    (LinearSVC(), 3),
    (RidgeClassifier(), 3),
    (SGDClassifier(random_state=0), 3),
    (SGDClassifier(loss="log_loss", random_state=0), 2),
    (SGDClassifier(loss="log_loss", learning_rate="constant", eta0=1e4, random_state=0), 3),
    (SVC(), 2),
    (SVC(), 4),
    (SVC(kernel="linear", decision_function_shape="ovo"), 4),
    (SVC(decision_function_shape="ovo"), 3),
    (SVC(decision_function_shape="ovo"), 2),
    (SVC(kernel="poly", gamma=0.5, coef0=1), 3),
    (SVC(kernel="sigmoid", gamma=0.1), 3),
    (SVC(probability=True, random_state=0), 2),
    (KNeighborsClassifier(3, weights=None, metric="l2"), 3),
    (KNeighborsClassifier(4, weights="distance"), 3),
    (GridSearchCV(SVC(), {"C": [1.0, 3.0]}, cv=2), 3),
    (FrozenEstimator(LogisticRegression()), 2),
]


@pytest.mark.parametrize("step, n_classes", STEPS, ids=lambda value: str(value)[:45])
@pytest.mark.filterwarnings("ignore:The `probability` parameter:FutureWarning")
def test_steps_say_what_scikit_learn_says(step, n_classes):
    y = np.arange(36) % n_classes
    X = np.random.default_rng(0).normal(0.5 * y[:, np.newaxis], 1, (36, 5)).astype(np.float32)
    step = clone(step)
    getattr(step, "estimator", step).fit(X, y)
    step.fit(X, y)
    nested = make_pipeline(make_pipeline("passthrough"), make_pipeline(step))
    ((_, fitted),) = steps = steps_of(nested)
    model = rows_part(steps_module(steps), 5)
    model.reshape([-1, 5])
    found = core().compile_model(model, "CPU")(X + 0.1)[0]  # by whatever it computes in
    (name,) = [
        n for n in ("predict_proba", "decision_function", "transform") if hasattr(fitted, n)
    ][:1]
    expected = getattr(fitted, name)(X + 0.1).reshape(36, -1)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    if isinstance(fitted, KNeighborsClassifier):  # at distance 0
        same = core().compile_model(model, "CPU")(X)[0]
        np.testing.assert_allclose(same, fitted.predict_proba(X), atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_probabilities_of_scores_that_are_far_below_0(dtype):
    X = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    step = SGDClassifier(loss="log_loss", random_state=0).fit(X.astype(dtype), np.arange(40) % 3)
    step.coef_[:] = 0
    for scores in ([-60, -62, -80], [-150, -152, -80], [-150, -152, -155], [-900, -800, -801]):
        step.intercept_[:] = scores
        model = rows_part(steps_module([("last", step)]), 8)
        model.reshape([-1, 8])
        found = core().compile_model(model, "CPU")(X)[0]
        np.testing.assert_allclose(found, step.predict_proba(X), atol=1e-4)


def test_steps_of_rows_far_from_noise():
    X = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    steps_module([("last", PCA(2, whiten=True).fit(3e-5 * X))])
    rounded = SVC(kernel="linear").fit(X + 3e4, np.arange(40) % 3)  # float32 is too short for it
    with pytest.raises(ValueError, match="what is written of it computes other numbers"):
        steps_module([("last", rounded)])


@pytest.mark.parametrize(
    "step, reason",
    [
        (RandomForestClassifier(2), "it is none of the steps .*\\. to_onnx may take it"),
        (SVC(probability=True), "probabilities of several classes .* pass probability=False"),
        (NuSVC(), "was fitted with probability=False: fit it again"),
        (SVC(kernel=linear_kernel), "kernel must be linear, rbf, poly or sigmoid"),
        (KNeighborsClassifier(metric="manhattan"), "metric must be euclidean"),
        (SGDClassifier(loss="modified_huber"), "probabilities with loss='modified_huber'"),
        (LogisticRegression(), "not fitted: call fit first"),
        (PCA(whiten=True), "of 1 of its 5 components .* Fit it with n_components=4 or whiten=Fal"),
        (VotingClassifier([("a", LogisticRegression())]), "none of the steps .* to_onnx may take"),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0][:45],  # nor addresses
)
@pytest.mark.filterwarnings("ignore:The `probability` parameter:FutureWarning")
def test_steps_that_cannot_be_written(step, reason):
    X = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
    if isinstance(step, PCA):
        X[:, 4] = X[:, 3]
    if not isinstance(step, LogisticRegression):
        n_classes = 2 if isinstance(step, NuSVC) else 3
        step.fit(X, np.arange(24) % n_classes)
    if isinstance(step, NuSVC):
        step.set_params(probability=True)
    with pytest.raises(Exception, match=f"Step 'last', a .*{reason}"):
        steps_module([("last", step)])


# ------------------------------------------------------------------------------ bad input


def test_targets_precisions_and_models_that_cannot_be(tiles, tmp_path, monkeypatch, capsys):
    _, paths, labels = tiles
    with pytest.raises(ValueError, match="nowhere/model.xml': there is no folder"):
        export_openvino(extractor(), tmp_path / "nowhere" / "model.xml")
    with pytest.raises(ValueError, match=r"model.onnx' must end in .xml"):
        export_openvino(extractor(), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="'bfloat16' or 'int8', got 'float16'"):
        export_openvino(extractor(), tmp_path / "model.xml", precision="float16")
    two = make_pipeline(extractor(), KNeighborsClassifier(2))
    two.fit(paths[:4], np.array([[0, 1], [1, 1], [0, 2], [1, 2]]))
    with pytest.raises(ValueError, match="'kneighborsclassifier'.* it has several targets"):
        export_openvino(two, tmp_path / "model.xml")
    middle = make_pipeline(extractor(), LinearDiscriminantAnalysis(), SVC())
    with pytest.raises(ValueError, match="'lineardiscriminantanalysis'.*in the middle [^:]*$"):
        export_openvino(middle.fit(paths[::4], labels[::4]), tmp_path / "model.xml")
    for end in ("passthrough", make_pipeline("passthrough")):
        ends = make_pipeline(extractor(), LinearDiscriminantAnalysis(), end)
        with pytest.raises(ValueError, match="classifier 'linear.*' is followed by 'passthro"):
            export_openvino(ends.fit(paths[::4], labels[::4]), tmp_path / "model.xml")
    with pytest.raises(ValueError, match="'normalizer'.* it is not fitted"):
        export_openvino(make_pipeline(extractor(), Normalizer()), tmp_path / "model.xml")
    wider = make_pipeline(extractor(), StandardScaler()).fit(paths[:4])
    wider[0].set_params(layer="all")
    with pytest.raises(ValueError, match="'standardscaler', .* of 16 .* the network gives 36 now"):
        export_openvino(wider, tmp_path / "model.xml")
    wider = make_pipeline(extractor(), PCA(2), StandardScaler()).fit(paths[:4])
    wider.steps[1] = ("pca", PCA(1).fit(wider[0].transform(paths[:4])))
    with pytest.raises(ValueError, match="'standardscaler', .* of 2 .* step 'pca' gives 1 now"):
        export_openvino(wider, tmp_path / "model.xml")
    for model, message in (
        (make_pipeline(FeatureUnion([("a", extractor())]), SVC()), "joins rows of several steps"),
        (FineTunedDetector(), "FineTunedDetector can't be exported for OpenVINO: to_onnx takes"),
        (make_pipeline(StandardScaler(), SVC()), "takes no images"),
        (ZeroShotClassifier(), "estimators of this kind are not written"),
        (small(), "it is a network: pass PretrainedFeatureExtractor"),
        (PretrainedFeatureExtractor, "Extractor is a class: pass one of its objects"),
    ):
        with pytest.raises(TypeError, match=message):
            export_openvino(model, tmp_path / "model.xml")
    with pytest.raises(ValueError, match="can't be traced, so what it does may depend"):
        untraceable = PretrainedFeatureExtractor(Untraceable(), layer="output")
        export_openvino(untraceable, tmp_path / "model.xml")
    (tmp_path / "model.bin").mkdir()
    with pytest.raises(ValueError, match="there is a folder of this name, or with .bin"):
        export_openvino(extractor(), tmp_path / "model.xml")
    (tmp_path / "model.bin").rmdir()
    if os.path.isdir("/proc/self"):
        with pytest.raises(OSError, match="nothing can be written into its folder"):
            export_openvino(extractor(), "/proc/model.xml")
    register_model("small for openvino", lambda weights: Backbone(small(), SIZE))
    skops.io.dump(PretrainedFeatureExtractor("small for openvino"), tmp_path / "model.skops")
    asked = ["export", str(tmp_path / "model.skops"), "-o"]
    assert main([*asked, str(tmp_path / "model.onnx"), "--precision", "int8"]) == 2
    assert "--precision int8 is for OpenVINO" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[openvino\]'"):
        export_openvino(extractor(), tmp_path / "model.xml")
    with pytest.raises(ImportError, match=r"pip install '\.\[int8\]'"):
        export_openvino(extractor(), tmp_path / "model.xml", precision="int8")
    assert os.listdir(tmp_path) == ["model.skops"]


class Shifted(Preprocessing):
    """Its pixels are other ones than its settings say."""

    def fit_size(self, image):
        return 255 - super().fit_size(image)


def otherwise(x):
    """Return something else where it is traced than where it is run."""
    return 2 * x if torch.jit.is_tracing() else x


torch.fx.wrap("otherwise")


class Otherwise(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, 2)

    def forward(self, x):
        return self.conv(otherwise(x))


def test_a_file_that_says_something_else_is_not_kept(tmp_path):
    shifted = Shifted(size=(32, 32), resize=(32, 32))
    model = PretrainedFeatureExtractor(Backbone(small(), shifted))
    for name in ("model.xml", "model.bin"):
        (tmp_path / name).write_text("older")
    with pytest.raises(ValueError, match="The Shifted of this network brings images to its size"):
        export_openvino(model, tmp_path / "model.xml")
    message = r"The rows .* test image \d .*column \d+ is .*, expected .*; to_onnx may take this"
    with pytest.raises(ValueError, match=message):
        export_openvino(PretrainedFeatureExtractor(Otherwise()), tmp_path / "model.xml")
    assert sorted(os.listdir(tmp_path)) == ["model.bin", "model.xml"]
    assert {(tmp_path / name).read_text() for name in os.listdir(tmp_path)} == {"older"}


def case_of(first, steps, **options):
    network = network_of("first", first, is_last=not steps)
    images = smooth_noise(network.preprocessing.shape[0], network.preprocessing.resize)
    rows = rows_in_float32(network, network.preprocessing.fit_size(images)).numpy()
    return Case(images, rows, steps, **{"is_in_8_bits": False, **options})


def test_each_image_of_the_check_must_agree(tiles, tmp_path):
    """One image of five that is off by more than the tolerance is an error, in each precision."""
    _, paths, labels = tiles
    model = make_pipeline(extractor(), StandardScaler(), KNeighborsClassifier(3))
    model.fit(paths, labels)
    path = export_openvino(model, tmp_path / "model.xml")
    case = case_of(model[0], model.steps[1:])
    check_file(path, case)
    rows = case.rows.copy()
    rows[3, 5] += 0.05 * np.abs(rows).max()
    with pytest.raises(WrongFile, match=r"The rows .* by the model: of test image 3 .* column 5"):
        check_file(path, case._replace(rows=rows))
    check_file(path, case._replace(rows=rows, is_in_8_bits=True))
    rows[3, 5] += 0.1 * np.abs(rows).max()
    with pytest.raises(WrongFile, match="of test image 3"):
        check_file(path, case._replace(rows=rows, is_in_8_bits=True))
    other = KNeighborsClassifier(3).fit(model[:2].transform(paths), labels[::-1])
    with pytest.raises(WrongFile, match="The results of the file are others than by the model"):
        check_file(path, case._replace(steps=[model.steps[1], ("other", other)]))
    with pytest.raises(WrongFile, match=r"have the shape \(5, 2\), and \(5, 3\) by the model"):
        check_file(path, case._replace(rows=np.zeros((5, 3), np.float32), steps=[]))


def test_a_batch_must_say_what_its_images_say_alone(tmp_path):
    """The file adds the number of images to what it says of each."""
    op = openvino.opset13
    images = op.parameter(openvino.PartialShape([-1, 3, -1, -1]), np.uint8, name="images")
    means = op.reduce_mean(op.convert(images, "f32"), np.array([2, 3]), False)
    n_images = op.convert(op.gather(op.shape_of(images), np.array([0]), np.array(0)), "f32")
    model = openvino.Model([op.result(op.add(means, n_images))], [images], "of_batches")
    model.inputs[0].get_tensor().set_names({"images"})
    openvino.serialize(model, tmp_path / "model.xml")
    noise = smooth_noise(3, (8, 9))
    case = Case(noise, noise.float().mean((2, 3)).numpy() + 1, [], is_in_8_bits=False)
    with pytest.raises(WrongFile, match="In a batch, the rows .* than by each image alone"):
        check_file(tmp_path / "model.xml", case)
    model.reshape([1, 3, -1, -1])
    openvino.serialize(model, tmp_path / "one.xml")
    check_file(tmp_path / "one.xml", case)


def test_a_disk_that_is_full(tmp_path):
    resource = pytest.importorskip("resource", reason="needs limits of files")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match="model.xml': it can't be written .*is the disk full"):
            export_openvino(extractor(), tmp_path / "model.xml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not os.listdir(tmp_path)


def test_two_threads_write_one_file(tmp_path):
    models = [PretrainedFeatureExtractor(Backbone(small(seed), SIZE)) for seed in (0, 1)]
    path = tmp_path / "model.xml"
    errors = []

    def write(model):
        try:
            export_openvino(model, path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    X = np.random.default_rng(0).integers(256, size=(2, 40, 50, 3), dtype=np.uint8)
    _, found = said(path, [X.transpose(0, 3, 1, 2)])
    assert any(near(found, model.transform(X), PIXELS) for model in models)
