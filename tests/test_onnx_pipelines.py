import json

import numpy as np
import onnx
import onnxruntime
import pytest
import skops.io
import torch
from networks import small
from packaging.version import Version
from PIL import Image
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import StackingClassifier, VotingClassifier
from sklearn.frozen import FrozenEstimator
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC, LinearSVC
from test_detection import make as make_detector
from test_detection import make_scenes, small_detector
from torchvision.models.detection.ssd import SSD

from sktransfer import (
    ChannelAdapter,
    FineTunedClassifier,
    PatchAnomalyDetector,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
    register_model,
    to_onnx,
)
from sktransfer._cli import main
from sktransfer._engine.openvino_program import core  # one a process
from sktransfer._estimators.exported import steps_of
from sktransfer._estimators.onnx_steps import step_models
from sktransfer._training.onnx_preprocessing import preprocessing_model
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 40), resize=(36, 44), interpolation="bicubic", std=(0.5,) * 3)


def session_of(model):
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1)[np.newaxis]


def outputs(path, batches):
    """Return each output for batches of images, of one size each."""
    session = session_of(path)
    names = [output.name for output in session.get_outputs()]
    found = [session.run(None, {"images": batch}) for batch in batches]
    return dict(zip(names, map(np.concatenate, zip(*found, strict=True)), strict=True))


def extractor(**options):
    return PretrainedFeatureExtractor(Backbone(small(), SIZE), **options)


# ------------------------------------------------------------------------------ preprocessing


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("mode", ["center", "floor", "squash", "border"])
@pytest.mark.parametrize("n_channels", [3, 5])
def test_the_graph_scales_as_the_library_does(mode, interpolation, n_channels):
    statistics = {"mean": (0.4,) * n_channels, "std": (1,) * n_channels}
    own = Preprocessing((32, 40), (36, 44), mode, interpolation, **statistics)
    model = preprocessing_model(own, 18, 10)
    onnx.checker.check_model(model, full_check=True)
    session = session_of(model.SerializeToString())
    random = np.random.default_rng(0)
    for shape in [(100, 80), (36, 44), (35, 47), (20, 90), (200, 60), (1, 1)]:
        last = random.integers(256, size=(*shape, n_channels), dtype=np.uint8)
        image = torch.from_numpy(last).permute(2, 0, 1)
        (found,) = session.run(None, {"images": image.numpy()[np.newaxis]})
        difference = np.abs(found[0] - own.fit_size(image).numpy())
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


# ------------------------------------------------------------------------------ whole models


def test_a_pipeline_on_files(tiles, tmp_path):
    pytest.importorskip("skl2onnx")
    _, paths, labels = tiles
    first = extractor(layer="all", pooling=("avg", "max"), normalize=True)
    model = make_pipeline(first, StandardScaler(), LogisticRegression()).fit(paths, labels)
    path = to_onnx(model, tmp_path / "model.onnx")
    onnx.checker.check_model(path, full_check=True)
    found = outputs(path, map(pixels, paths))
    expected = model.predict_proba(paths)
    np.testing.assert_allclose(found["probabilities"], expected, atol=1e-4)
    assert expected.std() > 0.1
    np.testing.assert_array_equal(found["label"], model.predict(paths))
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["labels"]) == model.classes_.tolist()


def test_a_search_of_rows_with_other_channels_through_the_command_line(tmp_path, capsys):
    pytest.importorskip("skl2onnx")
    X = np.random.default_rng(0).integers(0, 4096, (8, 50, 40, 4)).astype(np.uint16)
    y = ["a", "b"] * 4
    X[::2, ..., 3] //= 3
    register_model("small", lambda weights: Backbone(small(), SIZE))  # a model file holds the name
    backbone = ChannelAdapter("small", value_range=(0, 4095)).fit(X)
    first = PretrainedFeatureExtractor(backbone, image_size=32)
    pipeline = make_pipeline(first, LogisticRegression())
    search = GridSearchCV(pipeline, {"logisticregression__C": [1.0, 10.0]}, cv=2).fit(X, y)
    skops.io.dump(search, tmp_path / "model.skops")
    target = tmp_path / "model.onnx"
    assert main(["export", str(tmp_path / "model.skops"), "-o", str(target)]) == 0
    assert "written: " in capsys.readouterr().out
    bytes_of = np.rint(X / 4095 * 255).astype(np.uint8).transpose(0, 3, 1, 2)
    found = outputs(target, [bytes_of])
    np.testing.assert_allclose(found["probabilities"], search.predict_proba(X), atol=1e-4)
    metadata = {entry.key: entry.value for entry in onnx.load(target).metadata_props}
    assert metadata["input"].startswith("4 channels, uint8: 0 and 255 at the ends of [(0.0, 4095")
    assert main(["export", str(tmp_path / "model.skops"), "-o", "model.txt"]) == 2
    assert "must end in .onnx or .xml" in capsys.readouterr().err


def test_networks_of_the_library_alone(tiles, tmp_path):
    _, paths, labels = tiles
    files = paths[::8]
    views = extractor(augment="dihedral", pooling="max", layer="body")
    assert outputs(to_onnx(views, tmp_path / "rows.onnx"), map(pixels, files)).keys() == {"rows"}
    found = outputs(tmp_path / "rows.onnx", map(pixels, files))["rows"]
    np.testing.assert_allclose(found, views.transform(files), atol=1e-4)
    classifier = PretrainedClassifier(Backbone(small(), SIZE, tuple("abcde")))
    path = to_onnx(classifier, tmp_path / "classes.onnx")
    found = outputs(path, map(pixels, files))["probabilities"]
    np.testing.assert_allclose(found, classifier.predict_proba(files), atol=1e-4)
    tuned = FineTunedClassifier(Backbone(small(), SIZE), unfreeze=1, max_epochs=1, random_state=0)
    tuned.fit(paths, labels).set_params(augment="flip", predict_views=2)
    path = to_onnx(tuned, tmp_path / "views.onnx")
    found = outputs(path, map(pixels, files))["probabilities"]
    expected = tuned.predict_proba(files)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - tuned.set_params(predict_views=1).predict_proba(files)).max() > 1e-3
    pytest.importorskip("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core().compile_model(core().read_model(path), "CPU", settings)
    found = [compiled({"images": pixels(file)})["probabilities"] for file in files]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-4)


def test_scores_by_distances_to_clusters(tiles, tmp_path):
    """Of a step in the middle, only what it transforms is written; and no probabilities."""
    pytest.importorskip("skl2onnx")
    _, paths, labels = tiles
    classes = np.array([f"{label} {i % 2}" for i, label in enumerate(labels)])
    model = make_pipeline(extractor(), KMeans(3, random_state=0), LinearSVC()).fit(paths, classes)
    found = outputs(to_onnx(model, tmp_path / "model.onnx"), map(pixels, paths[::8]))
    assert found.keys() == {"label", "scores"}
    np.testing.assert_allclose(found["scores"], model.decision_function(paths[::8]), atol=1e-4)


@pytest.mark.parametrize(
    "detector, unfreeze", [("fcos", 1), ("faster_rcnn", "all"), (SSD, 0)], ids=str
)
def test_detectors_on_files(detector, unfreeze, tmp_path):
    X, y = make_scenes()
    network = detector if isinstance(detector, str) else small_detector(detector)
    model = make_detector(
        network, unfreeze=unfreeze, max_epochs=2, score_threshold=0.01, max_detections=15
    )
    model.fit(X, y)
    session = session_of(to_onnx(model, tmp_path / "model.onnx"))
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["labels"]) == model.classes_.tolist() == ["bright", "dark"]
    sizes = [(64, 64), (150, 100), (30, 90)]
    paths = [tmp_path / f"{i}.png" for i in range(len(sizes))]
    for path, size, image in zip(paths, sizes, X, strict=False):
        Image.fromarray(image).resize(size).save(path)
    n_found = 0
    for path, expected in zip(paths, model.predict(paths), strict=True):
        names = ["boxes", "labels", "scores"]
        found = dict(zip(names, session.run(names, {"images": pixels(path)}), strict=True))
        assert found["boxes"].shape == expected["boxes"].shape
        np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-4)
        # Of boxes with equal scores, either may be the first.
        labels = model.classes_[found["labels"]][:, np.newaxis] == expected["labels"]
        apart = np.abs(found["boxes"][:, np.newaxis] - expected["boxes"]).max(2) + 1e3 * ~labels
        assert np.append(apart.min(1), apart.min(0)).max() < 0.01  # pixels
        n_found += len(apart)
    assert n_found > 10
    with pytest.raises(Exception, match="Got invalid dimensions"):
        session.run(None, {"images": X[:2].transpose(0, 3, 1, 2)})


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_mlflow_keeps_a_model_as_a_skops_file(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    X = np.random.default_rng(0).integers(256, size=(4, 40, 40, 3), dtype=np.uint8)
    first = PretrainedFeatureExtractor(image_size=32)
    model = make_pipeline(first, LogisticRegression()).fit(X, [0, 1, 0, 1])
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    with mlflow.start_run():
        info = mlflow.sklearn.log_model(
            model,
            name="model",
            serialization_format="skops",
            skops_trusted_types=["sktransfer._estimators.pretrained.PretrainedFeatureExtractor"],
            pip_requirements=["sktransfer"],
        )
    assert info.flavors["sklearn"]["pickled_model"] == "model.skops"
    loaded = mlflow.sklearn.load_model(info.model_uri)
    np.testing.assert_allclose(loaded.predict_proba(X), model.predict_proba(X), atol=1e-6)


# Of a linear classifier's coefficients; an earlier one computes with what lies behind them.
RUNTIME_LOOKS_AT_SIZES = Version(onnxruntime.__version__) >= Version("1.26")

STEPS = [
    (SVC(), 2, "scores"),
    (LinearSVC(), 2, "scores"),
    (SGDClassifier(random_state=0), 2, "scores"),
    (SVC(), 3, "scores"),
    (SVC(decision_function_shape="ovo"), 3, "scores"),
    (SVC(decision_function_shape="ovo"), 4, "scores"),
    (SVC(decision_function_shape="ovo"), 2, "scores"),
    (GridSearchCV(RidgeClassifier(), {"alpha": [1, 10]}, cv=2), 2, "scores"),
    (CalibratedClassifierCV(LinearSVC(), cv=2), 3, "probabilities"),
    (StackingClassifier([("a", LogisticRegression())], cv=2), 3, "probabilities"),
    (ColumnTransformer([("a", StandardScaler(), [0, 2])]), 2, "variable"),
    (FeatureUnion([("a", PCA(2)), ("b", StandardScaler())]), 2, "variable"),
    (FrozenEstimator(LogisticRegression()), 3, "probabilities"),
    (SVC(probability=True, random_state=0), 2, "probabilities"),
    (KNeighborsClassifier(3), 2, "probabilities"),
]


@pytest.mark.parametrize("step, n_classes, output", STEPS, ids=lambda value: str(value)[:30])
@pytest.mark.filterwarnings("ignore:The `probability` parameter:FutureWarning")
def test_steps_say_what_scikit_learn_says(step, n_classes, output):
    pytest.importorskip("skl2onnx")
    y = np.arange(24) % n_classes
    X = np.random.default_rng(0).normal(y[:, np.newaxis], 1, (24, 5)).astype(np.float32)
    if isinstance(step, FrozenEstimator):
        step.estimator.fit(X, y)
    steps = steps_of(make_pipeline(clone(step).fit(X, y)))
    (model,) = step_models(steps, "rows")
    session = session_of(model.SerializeToString())
    names = [each.name for each in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"rows": X}), strict=True))
    methods = {"scores": "decision_function", "probabilities": "predict_proba"}
    expected = getattr(steps[0][1], methods.get(output, "transform"))(X)
    np.testing.assert_allclose(found[output], expected.reshape(24, -1), atol=1e-4)


@pytest.mark.parametrize("voting", ["hard", "soft"])
@pytest.mark.parametrize("labels", [["é", "a, b", "c"], [10, -3, 7], [False, True]], ids=str)
@pytest.mark.parametrize("weights", [None, [3, 1, 2, 9]], ids=str)
def test_a_vote_on_labels_that_are_no_numbers_from_0(voting, labels, weights, tiles, tmp_path):
    pytest.importorskip("skl2onnx")
    _, paths, _ = tiles
    members = [("a", LogisticRegression()), ("b", KNeighborsClassifier(3)), ("c", GaussianNB())]
    vote = VotingClassifier([*members, ("d", "drop")], voting=voting, weights=weights)
    X = extractor().transform(paths)
    y = np.array(labels)[np.argsort(np.argsort(X[:, 0])) * len(labels) // len(X)]
    rows = StandardScaler().fit_transform(X)
    vote.fit(rows, y)
    (model,) = step_models([("vote", vote)], "rows")
    session = session_of(model.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    assert names == (["label"] if voting == "hard" else ["label", "probabilities"])
    found = dict(zip(names, session.run(None, {"rows": rows}), strict=True))
    expected = vote.predict(rows)
    assert len(set(expected)) == len(labels)
    np.testing.assert_array_equal(found["label"], expected)
    if voting == "soft":
        np.testing.assert_allclose(found["probabilities"], vote.predict_proba(rows), atol=1e-4)
    assert vote.flatten_transform and vote.weights is weights  # left as it was


@pytest.mark.parametrize(
    "step, reason",
    [
        (KNeighborsClassifier(3, weights="distance"), "Pass weights='uniform'; export_openvino"),
        (
            StackingClassifier([("a", LogisticRegression()), ("b", SVC())], cv=2),
            "ONNX Runtime can't run what skl2onnx writes"
            if RUNTIME_LOOKS_AT_SIZES
            else "computes other numbers than the step itself",
        ),
        (OneVsRestClassifier(LinearSVC()), "computes other numbers than the step itself"),
        (CalibratedClassifierCV(LinearSVC(), method="isotonic", cv=2), "Pass method='sigmoid'"),
        (GaussianProcessClassifier(), r"operators of \['com.microsoft'\]"),
        (DummyClassifier(), "skl2onnx says: Unable to find a shape calculator"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_steps_that_skl2onnx_writes_wrongly_or_not_at_all(step, reason):
    pytest.importorskip("skl2onnx")
    X = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
    with pytest.raises(ValueError, match=f"Step 'last', a .*can't be exported: .*{reason}"):
        step_models([("last", step.fit(X, np.arange(24) % 2))], "rows")


@pytest.mark.parametrize("solver", ["full", "randomized"])
def test_components_that_are_rounding_are_not_whitened(solver):
    """Of doubled images: 6 different ones have 5 components."""
    pytest.importorskip("skl2onnx")
    X = np.random.default_rng(0).normal(3, 1, (6, 12)).astype(np.float32)
    X = np.concatenate([X] * 30)
    step = PCA(8, whiten=True, svd_solver=solver, random_state=0).fit(X)
    with pytest.raises(ValueError, match=r"'pca', .* of 3 of its 8 .*n_components=5 or whiten="):
        step_models([("pca", step)], "rows")
    for step in (PCA(5, whiten=True, svd_solver=solver, random_state=0), PCA(8)):
        (model,) = step_models([("pca", step.fit(X))], "rows")
        (found,) = session_of(model.SerializeToString()).run(None, {"rows": X})
        np.testing.assert_allclose(found, step.transform(X), atol=1e-4)


def test_labels_of_several_targets(tmp_path):
    pytest.importorskip("skl2onnx")
    X = np.random.default_rng(0).integers(256, size=(8, 40, 40, 3), dtype=np.uint8)
    y = np.stack([np.arange(8) % 2, 3 + np.arange(8) // 4], 1)
    model = make_pipeline(extractor(), PCA(6), KNeighborsClassifier(3)).fit(X, y)
    path = to_onnx(model, tmp_path / "model.onnx")
    found = outputs(path, [X.transpose(0, 3, 1, 2)])
    np.testing.assert_array_equal(found["label"], model.predict(X))
    metadata = session_of(path).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["labels"]) == [[0, 1], [3, 4]]


# ------------------------------------------------------------------------------ bad input


def test_a_step_that_cannot_be_exported_is_named(tiles, tmp_path):
    pytest.importorskip("skl2onnx")
    _, paths, labels = tiles
    target = tmp_path / "model.onnx"
    steps = extractor(), StandardScaler(), FunctionTransformer(np.abs), LogisticRegression()
    model = make_pipeline(*steps).fit(paths[::4], labels[::4])
    with pytest.raises(
        ValueError, match="Step 'functiontransformer', a FunctionTransformer, can't"
    ):
        to_onnx(model, target)
    middle = make_pipeline(extractor(), LinearDiscriminantAnalysis(), SVC())
    with pytest.raises(ValueError, match="Step 'lineardisc.* a classifier in front of other steps"):
        to_onnx(middle.fit(paths[::4], labels[::4]), target)
    unfitted = make_pipeline(extractor(), LogisticRegression())
    with pytest.raises(ValueError, match="Step 'logisticregression', a LogisticRegr.* not fitted"):
        to_onnx(unfitted, target)
    unfitted = make_pipeline(extractor(), StandardScaler(), LogisticRegression())
    with pytest.raises(ValueError, match="Step 'standardscaler', a StandardScaler, is not fitted"):
        to_onnx(unfitted, target)
    wider = make_pipeline(extractor(), StandardScaler(), SVC()).fit(paths[::4], labels[::4])
    wider[0].set_params(layer="all")
    with pytest.raises(ValueError, match="'standardscaler', .* of 16 .* the network gives 36 now"):
        to_onnx(wider, target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "model, message",
    [
        (make_pipeline(StandardScaler(), SVC()), "Step 'standardscaler', .* takes no images"),
        (FeatureUnion([("a", extractor())]), "'FeatureUnion', .* one extractor takes several"),
        (CalibratedClassifierCV(make_pipeline(extractor(), SVC())), "network is inside of it"),
        (GridSearchCV(make_pipeline(extractor(), SVC()), {}), "no best_estimator_"),
        (PatchAnomalyDetector(), "'PatchAnomalyDetector', .* bank of patches"),
        ("model.skops", "a str, can't be exported"),
    ],
)
def test_models_that_cannot_be_exported(model, message, tmp_path):
    with pytest.raises(TypeError, match=message):
        to_onnx(model, tmp_path / "model.onnx")


def test_there_is_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere/model.onnx': there is no folder"):
        to_onnx(extractor(), tmp_path / "nowhere" / "model.onnx")
