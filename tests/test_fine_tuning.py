import copy
import pickle
import warnings

import joblib
import numpy as np
import pytest
import torch
import xxhash
from networks import Untraceable, small
from processes import run_code
from sklearn import config_context
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import make_multilabel_classification
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, make_scorer, recall_score
from sklearn.model_selection import (
    GridSearchCV,
    TunedThresholdClassifierCV,
    cross_val_predict,
    cross_val_score,
    cross_validate,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.estimator_checks import check_estimator
from skorch.callbacks import Callback, Checkpoint, EpochScoring, LoadInitState
from torch import nn
from torchvision.transforms import v2

from sktransfer import (
    FineTunedClassifier,
    FineTunedRegressor,
    PretrainedFeatureExtractor,
    get_model,
    register_model,
)
from sktransfer._engine.runtime import has_bfloat16
from sktransfer._training.heads import (
    _ALPHA,
    _C,
    _C_START,
    _FACTORS,
    _RIDGE_FACTORS,
    make_head,
    solve_head,
)
from sktransfer._training.plan import Plan
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))


def unit(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, 2, 1), nn.BatchNorm2d(n_out), nn.ReLU())


class Normed(nn.Module):
    """Four blocks, each with a batch-norm whose statistics are not those of a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.layer1 = nn.Sequential(unit(8, 8), unit(8, 12))
        self.layer2 = nn.Sequential(unit(12, 12), nn.Dropout(0.5))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 2)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return self.head(self.pool(x).flatten(1))


class Convolutional(nn.Module):
    """Its head comes before the pooling, so there is something left to pool."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = unit(3, 8)
        self.body = unit(8, 16)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        return self.head(self.body(self.stem(x))).mean((2, 3))


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


NORMED_BLOCKS = ["stem", "layer1.0", "layer1.1", "layer2.0"]


@pytest.fixture(autouse=True, scope="module")
def _models():
    register_model("small", lambda weights: Backbone(small(), SIZE))
    register_model("normed", lambda weights: Backbone(seeded(Normed), SIZE))
    register_model("convolutional", lambda weights: Backbone(seeded(Convolutional), SIZE))


def classifier(**options):
    defaults = {"max_epochs": 3, "batch_size": 8, "random_state": 0}
    return FineTunedClassifier(options.pop("backbone", "small"), **{**defaults, **options})


def regressor(**options):
    return FineTunedRegressor("small", **{"max_epochs": 5, "random_state": 0, **options})


def pictures(n=24, n_classes=2, seed=0):
    """Noise that is the brighter, the higher the number of its class."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    X = rng.integers(0, 120, (n, 32, 32, 3)) + (y * 120 // (n_classes - 1))[:, None, None, None]
    return X.astype(np.uint8), y


def states(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def compact():
    """The counted network, its activations smaller than the image: all are worth keeping."""
    network = small()
    network.stem[0] = nn.Conv2d(3, 8, 7, 4, 3).requires_grad_(False)
    nn.init.normal_(network.stem[0].weight, std=0.1, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(network.stem[0].bias)
    return Backbone(network, SIZE)


@pytest.fixture
def slow_machine(monkeypatch):
    """A machine, or blocks as large, on which nothing is computed twice that can be kept."""
    monkeypatch.setattr("sktransfer._training.plan._FLOPS", {"cpu": 1e5})


def equal(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def without_blank(digests):
    """Leave out the blank image by which blocks are timed."""
    blank = SIZE.normalize(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0]
    return [d for d in digests if d != xxhash.xxh3_64_hexdigest(blank.contiguous().numpy())]


# ------------------------------------------------------------------------------ scikit-learn


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [FineTunedClassifier, FineTunedRegressor])
def test_check_estimator_whole(kind):
    options = {"image_shape": (1, -1), "image_size": 8, "batch_size": 256}
    results = check_estimator(kind("small", max_epochs=1, random_state=0, **options), on_fail=None)
    assert len(results) > 55
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] != "passed"}
    assert failed == {}


def search(paths, labels, memory, n_jobs=None, **grid):
    model = classifier(backbone=compact(), max_epochs=1, memory=memory)
    return GridSearchCV(model, grid, cv=2, n_jobs=n_jobs, error_score="raise").fit(paths, labels)


@pytest.mark.parametrize("depths", [[0, 1, 2], [2, 1, 0]])
def test_a_search_over_depths_runs_frozen_blocks_once_an_image(tiles, tmp_path, run_log, depths):
    _, paths, labels = tiles
    found = search(paths, labels, tmp_path, unfreeze=depths)
    assert set(found.predict(paths)) <= {"china", "flower"}
    runs = without_blank(run_log())
    assert len(runs) == len(set(runs)) == 40
    n_before = len(run_log())
    search(paths, labels, tmp_path, unfreeze=depths, lr=[1e-4])
    assert without_blank(run_log()[n_before:]) == []


def test_a_search_in_processes_runs_frozen_blocks_once_an_image(tiles, tmp_path, run_log):
    _, paths, labels = tiles
    found = search(paths, labels, tmp_path, n_jobs=2, unfreeze=[0, 1, 2])
    assert found.predict(paths).dtype == labels.dtype
    runs = without_blank(run_log())
    assert len(runs) == len(set(runs)) == 40


def test_calibration_runs_frozen_blocks_once_an_image(tiles, tmp_path, run_log):
    _, paths, labels = tiles
    model = classifier(backbone=compact(), max_epochs=1, memory=tmp_path)
    calibrated = CalibratedClassifierCV(model, method="temperature", cv=3).fit(paths, labels)
    runs = without_blank(run_log())
    assert len(runs) == len(set(runs)) == 40
    assert calibrated.predict_proba(paths).shape == (40, 2)
    fitted = model.fit(paths, labels)
    again = CalibratedClassifierCV(FrozenEstimator(fitted), method="temperature")
    again.fit(paths, labels)
    assert (again.predict(paths) == fitted.predict(paths)).all()  # only how sure it is changes
    assert not np.allclose(again.predict_proba(paths), fitted.predict_proba(paths))
    assert len(without_blank(run_log())) == 40


def test_thresholds(tiles, tmp_path):
    _, paths, labels = tiles
    model = classifier(backbone=compact(), max_epochs=1, memory=tmp_path, class_weight="balanced")
    recall = make_scorer(recall_score, pos_label="flower")
    tuned = TunedThresholdClassifierCV(model, scoring=recall, cv=2)
    tuned.fit(paths[:30], labels[:30])
    assert 0 <= tuned.best_threshold_ < 0.5  # all flowers are found where it is low
    assert recall_score(labels, tuned.predict(paths), pos_label="flower") == 1

    # Several labels an image: a threshold for each.
    indicators = np.column_stack([labels == "china", labels == "flower"]).astype(int)
    proba = cross_val_predict(
        model.set_params(class_weight=None), paths, indicators, cv=2, method="predict_proba"
    )
    assert np.shape(proba) == (40, 2) and 0 <= np.min(proba) <= np.max(proba) <= 1


def test_a_search_takes_the_whole_network_as_one_of_the_depths(tiles, tmp_path):
    _, paths, labels = tiles
    found = search(paths, labels, tmp_path, unfreeze=[0, 1, "all"])
    assert len(found.cv_results_["params"]) == 3
    assert found.best_score_ > 0.6
    assert set(found.predict(paths)) == {"china", "flower"}


def test_in_a_pipeline_and_in_cross_validation(tiles):
    _, paths, labels = tiles
    pipeline = make_pipeline(FunctionTransformer(), classifier(unfreeze=0))
    assert cross_val_predict(pipeline, paths, labels, cv=2).shape == (40,)
    pipeline.set_params(finetunedclassifier__unfreeze=1)
    assert pipeline.get_params()["finetunedclassifier__unfreeze"] == 1
    assert pipeline.fit(paths, labels)[-1].unfrozen_block_names_ == ["body.1"]


def test_sample_weight_is_routed():
    X, y = pictures()
    weights = np.where(y == 1, 10.0, 0.5)
    with config_context(enable_metadata_routing=True):
        model = classifier().set_fit_request(sample_weight=True)
        model.set_score_request(sample_weight=False)
        routed = cross_validate(
            model, X, y, cv=2, params={"sample_weight": weights}, return_estimator=True
        )
    plain = cross_validate(classifier(), X, y, cv=2, return_estimator=True)
    for one, other in zip(routed["estimator"], plain["estimator"], strict=True):
        assert not np.array_equal(one.predict_proba(X), other.predict_proba(X))


# ------------------------------------------------------------------------------ freezing


@pytest.mark.parametrize("unfreeze", [0, 1, 3])
def test_frozen_blocks_stay_as_they_are(unfreeze):
    X, y = pictures()
    shared = get_model("normed").network
    before = states(shared)
    model = classifier(backbone="normed", unfreeze=unfreeze, lr=0.01).fit(X, y)
    assert get_model("normed").network is shared
    assert equal(states(shared), before)
    assert equal(states(model.net_.module_.frozen.runner.network), before)
    trained = states(model.to_feature_extractor().backbone.network)
    changed = {name for name in before if not torch.equal(before[name], trained[name])}
    for name in NORMED_BLOCKS[: 4 - unfreeze]:
        assert not any(key.startswith(f"{name}.") for key in changed)
    for name in NORMED_BLOCKS[4 - unfreeze :]:
        assert {f"{name}.0.weight", f"{name}.1.bias"} & changed or f"{name}.0.0.weight" in changed


def test_blocks_behind_a_trained_one_can_be_frozen():
    X, y = pictures()
    before = states(get_model("normed").network)
    model = classifier(backbone="normed", unfreeze=["layer1.0"], lr=0.01).fit(X, y)
    assert model.unfrozen_block_names_ == ["layer1.0"]
    own = states(model.net_.module_.blocks)
    first = {name for name in own if name.startswith("0.")}
    for name, value in own.items():
        original = before[name.split(".", 1)[1]]
        is_statistic = "running" in name or "num_batches" in name
        assert torch.equal(value, original) == (name not in first or is_statistic), name
    assert equal(states(get_model("normed").network), before)


@pytest.mark.parametrize("unfreeze", [2, "all"])
@pytest.mark.parametrize("weights", ["default", None])
def test_statistics_of_batches_move_only_where_weights_are_random(unfreeze, weights):
    X, y = pictures()
    model = classifier(backbone="normed", unfreeze=unfreeze, weights=weights).fit(X, y)
    before, after = (
        states(network)
        for network in (get_model("normed").network, model.to_feature_extractor().backbone.network)
    )
    moved = {n for n in before if "running" in n and not torch.equal(before[n], after[n])}
    names = NORMED_BLOCKS if unfreeze == "all" else NORMED_BLOCKS[2:]
    norms = {n for n in before if "running" in n and n.startswith(tuple(names))}
    assert norms
    assert moved == (norms if weights is None else set())


@pytest.mark.parametrize(
    "unfreeze, blocks",
    [
        (0, []),
        (1, ["layer2.0"]),
        (np.int64(3), ["layer1.0", "layer1.1", "layer2.0"]),
        (4, NORMED_BLOCKS),
        ("all", NORMED_BLOCKS),
        ("layer1.1", ["layer1.1", "layer2.0"]),
        ("layer1", ["layer1.0", "layer1.1", "layer2.0"]),
        (["layer1"], ["layer1.0", "layer1.1"]),
        (("layer2.0", "stem"), ["stem", "layer2.0"]),
        ([], []),
    ],
)
def test_ways_to_name_what_is_trained(unfreeze, blocks):
    X, y = pictures(6)
    model = classifier(backbone="normed", unfreeze=unfreeze, max_epochs=1).fit(X, y)
    assert model.block_names_ == NORMED_BLOCKS
    assert model.unfrozen_block_names_ == blocks
    network = get_model("normed").network
    expected = (
        12 * 2
        + 2
        + sum(
            p.numel()
            for name, p in network.named_parameters()
            if name.startswith(tuple(f"{block}." for block in blocks))
        )
    )
    assert model.n_trainable_parameters_ == expected
    assert model.predict(X).shape == (6,)


@pytest.mark.parametrize("unfreeze, n_parameters", [(0, 10), ("all", 10 + 3 * 4 * 9 + 4)])
def test_a_network_that_cannot_be_traced(unfreeze, n_parameters):
    X, y = pictures()
    model = classifier(backbone=Backbone(Untraceable(), SIZE), unfreeze=unfreeze).fit(X, y)
    assert model.unfrozen_block_names_ == model.block_names_ == []
    assert model.n_trainable_parameters_ == n_parameters
    assert model.score(X, y) > 0.5


# ------------------------------------------------------------------------------ repeatable


VARIED = {"unfreeze": 2, "augment": "flip", "dropout": 0.2}


def test_the_memory_changes_no_result(tmp_path):
    X, y = pictures()
    expected = classifier(**VARIED).fit(X, y).predict_proba(X)
    for _ in ("cold", "warm"):
        model = classifier(**VARIED, memory=tmp_path).fit(X, y)
        assert np.array_equal(model.predict_proba(X), expected)


def test_threads_and_order_of_rows_change_no_result():
    X, y = pictures()
    expected = classifier(**VARIED, n_jobs=1).fit(X, y).predict_proba(X)
    assert np.array_equal(classifier(**VARIED, n_jobs=2).fit(X, y).predict_proba(X), expected)
    order = np.random.default_rng(0).permutation(len(y))
    shuffled = classifier(**VARIED).fit(X[order], y[order])
    assert np.array_equal(shuffled.predict_proba(X), expected)
    assert np.array_equal(shuffled.predict_proba(X[order]), expected[order])
    assert np.array_equal(shuffled.predict_proba(X[:1]), expected[:1])


@pytest.mark.parametrize("other, wanted", [(2, 1), (2, 0), (0, 2), (1, 2)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations_of_another_depth_change_no_result(
    tmp_path, run_log, slow_machine, other, wanted, precision
):
    X, y = pictures()
    options = {"augment": "flip", "precision": precision}
    expected = classifier(**options, unfreeze=wanted).fit(X, y).predict_proba(X)
    classifier(**options, memory=tmp_path).set_params(unfreeze=other).fit(X, y)  # as a search does
    n_before = len(run_log())
    model = classifier(**options, unfreeze=wanted, memory=tmp_path).fit(X, y)
    assert without_blank(run_log()[n_before:]) == []  # the memory was used
    assert np.array_equal(model.predict_proba(X), expected)


def test_order_of_equal_images_with_other_weights_changes_no_result():
    X, y = pictures(8)
    X, y, weights = np.concatenate([X, X]), np.concatenate([y, y]), np.linspace(0.3, 1.7, 16)
    order = np.random.default_rng(1).permutation(16)
    model = classifier(batch_size=4).fit(X, y, weights)
    shuffled = classifier(batch_size=4).fit(X[order], y[order], weights[order])
    assert np.array_equal(shuffled.predict_proba(X), model.predict_proba(X))


def test_fits_in_threads_change_no_result():
    X, y = pictures()
    options = {"cv": 3, "method": "predict_proba"}
    expected = cross_val_predict(classifier(**VARIED), X, y, **options)
    with joblib.parallel_backend("threading", n_jobs=3):
        found = cross_val_predict(classifier(**VARIED), X, y, n_jobs=3, **options)
    assert np.array_equal(found, expected)


def test_seeds_make_a_difference():
    X, y = pictures()
    same = [classifier().fit(X, y).predict_proba(X) for _ in range(2)]
    assert np.array_equal(*same)
    other = classifier(random_state=1).fit(X, y).predict_proba(X)
    assert not np.array_equal(other, same[0])


def test_a_fit_leaves_the_seed_of_torch_alone():
    X, y = pictures(6)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    classifier(**VARIED).fit(X, y)
    assert torch.equal(torch.rand(3), expected)


# ------------------------------------------------------------------------------ labels


@pytest.mark.parametrize(
    "labels",
    [
        ["zebra", "ant"],
        [7, 3],
        [True, False],
        np.array(["b", "a"], object),
        ["dog", "cat", "ant"],
        [-1, 5, 2],
    ],
)
@pytest.mark.parametrize("unfreeze", [0, 1])
def test_labels_of_any_type(labels, unfreeze):
    labels = np.asarray(labels)
    X, numbers = pictures(30, len(labels))
    y = labels[numbers]
    model = classifier(unfreeze=unfreeze, max_epochs=30, lr=5e-3).fit(X, y)
    assert model.classes_.dtype == y.dtype
    assert model.classes_.tolist() == sorted(labels.tolist())
    assert model.score(X, y) > 0.9  # also that columns are those of classes_
    probabilities, decisions = model.predict_proba(X), model.decision_function(X)
    assert probabilities.shape == (30, len(labels))
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    predicted = model.predict(X)
    assert predicted.dtype == y.dtype
    assert np.array_equal(predicted, model.classes_[probabilities.argmax(1)])
    best = (decisions > 0).astype(int) if len(labels) == 2 else decisions.argmax(1)
    assert np.array_equal(predicted, model.classes_[best])


def test_several_labels_an_image():
    X, _ = pictures(40)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (40, 3))
    X = X // 3
    for channel in range(3):
        X[..., channel] += (y[:, channel] * 150).astype(np.uint8)[:, None, None]
    model = classifier(max_epochs=20, lr=3e-3).fit(X, y)
    predicted, probabilities = model.predict(X), model.predict_proba(X)
    assert probabilities.shape == predicted.shape == (40, 3)
    assert set(np.unique(predicted)) == {0, 1}
    assert (probabilities >= 0).all() and (probabilities <= 1).all()
    assert not np.allclose(probabilities.sum(1), 1)
    assert (predicted == y).mean() > 0.8


def test_one_of_several_labels_may_be_constant():
    X, _ = pictures(12)
    _, y = make_multilabel_classification(12, 2, n_classes=2, random_state=0)
    y[:, 0] = 1
    assert (classifier(unfreeze=0).fit(X, y).predict(X)[:, 0] == 1).all()


# ------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("unfreeze", [0, 1])
@pytest.mark.parametrize("model", [classifier, regressor])
def test_a_weight_is_a_number_of_repetitions(model, unfreeze):
    X, y = pictures()
    weights = np.random.default_rng(0).integers(0, 4, len(y))
    weighted = model(unfreeze=unfreeze).fit(X, y, weights.astype(float))
    repeated = model(unfreeze=unfreeze).fit(np.repeat(X, weights, 0), np.repeat(y, weights))
    assert np.array_equal(weighted.predict(X), repeated.predict(X))
    assert np.array_equal(weighted._outputs(X), repeated._outputs(X))


@pytest.mark.parametrize("unfreeze", [0, 1])
@pytest.mark.parametrize("model", [classifier, regressor])
def test_weight_zero_leaves_an_image_out(model, unfreeze):
    X, y = pictures()
    rng = np.random.default_rng(0)
    weights = np.where(rng.random(len(y)) < 0.4, 0.0, rng.random(len(y)))
    some = weights > 0
    weighted = model(unfreeze=unfreeze).fit(X, y, weights)
    left = model(unfreeze=unfreeze).fit(X[some], y[some], weights[some])
    assert np.array_equal(weighted._outputs(X), left._outputs(X))


@pytest.mark.parametrize("class_weight", ["balanced", {"few": 3.5, "many": 0.5}])
@pytest.mark.parametrize("unfreeze", [0, 1])
def test_class_weight(class_weight, unfreeze):
    X, _ = pictures(24)
    y = np.array(["few"] * 6 + ["many"] * 18)
    model = classifier(unfreeze=unfreeze, class_weight=class_weight).fit(X, y)
    weights = compute_sample_weight(class_weight, y)
    expected = classifier(unfreeze=unfreeze).fit(X, y, weights)
    assert np.array_equal(model.predict_proba(X), expected.predict_proba(X))
    plain = classifier(unfreeze=unfreeze).fit(X, y)
    assert model.predict_proba(X)[:, 0].mean() > plain.predict_proba(X)[:, 0].mean() + 0.05


def test_score_with_weights():
    X, y = pictures()
    model = classifier(unfreeze=0).fit(X, y)
    wrong = np.where(np.arange(len(y)) < 6, 1 - y, y)
    weights = np.linspace(0.1, 2, len(y))
    expected = accuracy_score(wrong, model.predict(X), sample_weight=weights)
    assert model.score(X, wrong, weights) == expected != model.score(X, wrong)


# ------------------------------------------------------------------------------ values


def shades(n, seed):
    X, _ = pictures(n, 2, seed)
    rng = np.random.default_rng(seed)
    return (X * rng.uniform(0.1, 1, (n, 1, 1, 1))).astype(np.uint8)


@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
@pytest.mark.parametrize("n_outputs", [1, 2])
def test_values_in_any_unit(unfreeze, n_outputs):
    X, new = shades(48, 0), shades(24, 1)

    def value(images):
        bright = 1e6 * images.mean((1, 2, 3)) + 5e8
        return bright if n_outputs == 1 else np.column_stack([bright, -1e-3 * bright])

    model = regressor(unfreeze=unfreeze, max_epochs=10).fit(X, value(X))
    assert model.predict(new).shape == value(new).shape
    assert model.score(new, value(new)) > 0.5


def test_the_unit_of_values_does_not_matter():
    X = shades(24, 0)
    y = X.mean((1, 2, 3))
    model, other = regressor().fit(X, y), regressor().fit(X, 1e6 * y - 1e9)
    np.testing.assert_allclose(other.predict(X), 1e6 * model.predict(X) - 1e9, rtol=1e-5)


def test_a_column_of_values_stays_a_column():
    X = shades(8, 0)
    assert regressor(unfreeze=0).fit(X, X.mean((1, 2, 3))[:, None]).predict(X).shape == (8, 1)


# ------------------------------------------------------------------------------ heads


def pareto_scaled(rows):
    """Return rows of mean 0, each feature divided by the root of its deviation."""
    deviation = rows.std(0)
    return (rows - rows.mean(0)) / np.sqrt(deviation * deviation.mean() + 1e-30)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_a_linear_head_is_logistic_regression(n_classes, pooling):
    X, y = pictures(30, n_classes)
    model = classifier(backbone="convolutional", unfreeze=0, pooling=pooling).fit(X, y)
    embeddings = PretrainedFeatureExtractor("convolutional", pooling=pooling).transform(X)
    embeddings = pareto_scaled(embeddings)
    found = model.predict_proba(X)
    losses = {}
    for C in _C * 1280 / 16 * _FACTORS:
        logistic = LogisticRegression(C=C, max_iter=1000)
        losses[C] = -cross_val_score(logistic, embeddings, y, scoring="neg_log_loss").mean()
        expected = logistic.fit(embeddings, y).predict_proba(embeddings)
        if np.allclose(found, expected, atol=3e-3):
            chosen = C
    assert losses[chosen] < 1.1 * min(losses.values())  # the folds are others
    assert model.history_ == [] and model.n_iter_ == 0


def solved(rows, targets, kind, n_outputs, weights=None, **options):
    """Return the outputs of a linear head that was solved for, on its own rows."""
    head = make_head("linear", rows.shape[1], n_outputs, 0.0)
    solve_head(head, rows, targets, weights, kind, **options)
    return head(torch.from_numpy(rows)).detach().numpy()


def noisy_rows(n=60, width=40):
    chance = np.random.default_rng(0)
    rows = chance.normal(size=(n, width)).astype(np.float32)
    return rows, (rows[:, 0] > 0).astype(np.int64), chance.integers(0, 2, n)


def test_what_can_not_be_learnt_is_regularised_most():
    rows, real, noise = noisy_rows()
    for kind, form in (("class", lambda y: y), ("label", lambda y: np.stack([y, 1 - y], 1))):
        learnt, guessed = (solved(rows, form(y), kind, 2).std() for y in (real, noise))
        assert learnt > 1.5 * guessed
    line, noise = rows[:, 0] * 3, np.random.default_rng(1).normal(size=60)
    outputs = [solved(rows, y[:, None].astype(np.float32), "value", 1) for y in (line, noise)]
    assert np.corrcoef(outputs[0][:, 0], line)[0, 1] > 0.99
    assert outputs[1].std() < 0.3 * noise.std()


def test_views_of_an_image_are_held_out_together():
    rows, y, _ = noisy_rows()
    once = solved(rows, y, "class", 2, seed=3)
    twice = np.repeat(rows, 2, axis=0), np.repeat(y, 2), np.full(120, 0.5)
    found = solved(twice[0], twice[1], "class", 2, twice[2], n_views=2, seed=3)
    np.testing.assert_allclose(found[::2], once, rtol=1e-2, atol=1e-2)


def test_a_class_of_one_image_leaves_the_fixed_regularisation():
    rows, y, _ = noisy_rows()
    y[7] = 2
    C = _C * 1280 / rows.shape[1]  # of the embeddings for which it is good
    expected = LogisticRegression(C=C, max_iter=1000).fit(pareto_scaled(rows), y)
    found = torch.from_numpy(solved(rows, y, "class", 3)).softmax(1)
    np.testing.assert_allclose(found, expected.predict_proba(pareto_scaled(rows)), atol=1e-3)


def test_features_that_are_constant_do_no_harm():
    rows, y, _ = noisy_rows()
    rows[:, 5] = 7
    assert np.isfinite(solved(rows, y, "class", 2)).all()
    assert np.isfinite(solved(np.ones_like(rows), y, "class", 2)).all()


@pytest.mark.parametrize("width", [4, 1500])
def test_features_that_are_equal_do_no_harm(width):
    line = np.random.default_rng(0).normal(size=(1000, 1)).astype(np.float32)
    rows = np.repeat(
        line, width, axis=1
    )  # many of them: the system of equations is ill-conditioned
    np.testing.assert_allclose(solved(rows, line, "value", 1), line, atol=0.01)


@pytest.mark.parametrize("width", [20, 100])
def test_a_linear_head_for_values_is_ridge_regression(width):
    rows, _, _ = noisy_rows(width=width)
    values = rows[:, :2] + 3
    weights = np.random.default_rng(0).uniform(0.1, 1, len(rows))
    centred = rows - np.average(rows, axis=0, weights=weights)
    deviation = np.sqrt(np.average(centred**2, axis=0, weights=weights))
    scaled = centred / np.sqrt(deviation * deviation.mean())
    found = solved(rows, values, "value", 2, weights)
    errors = []
    for alpha in _ALPHA * width / 1280 * _RIDGE_FACTORS:
        expected = Ridge(alpha=alpha).fit(scaled, values, weights).predict(scaled)
        errors.append(np.abs(found - expected).max())
    assert min(errors) < 1e-4


def test_the_start_of_training_is_regularised_more():
    X, y = pictures(30, 3)
    model = classifier(backbone="convolutional", unfreeze=1, max_epochs=0).fit(X, y)
    embeddings = PretrainedFeatureExtractor("convolutional").transform(X)
    embeddings = (embeddings - embeddings.mean(0)) / np.sqrt(embeddings.var(0).mean())
    for C, is_it in ((_C_START, True), (_C, False)):
        expected = LogisticRegression(C=C).fit(embeddings, y).predict_proba(embeddings)
        assert np.allclose(model.predict_proba(X), expected, atol=2e-3) == is_it


def test_pieces_of_a_batch_are_even(monkeypatch):
    module = classifier(max_epochs=1).fit(*pictures()).net_.module_
    monkeypatch.setattr(module.frozen.runner, "fitting", lambda *_: 26)
    assert [module.piece(n) for n in (1, 26, 32, 53)] == [1, 26, 16, 18]
    monkeypatch.setattr(module.frozen.runner, "fitting", lambda *_: 0)
    assert module.piece(32) == 1


def test_poolings_differ():
    X, y = pictures()
    avg, top = (classifier(backbone="convolutional", pooling=p).fit(X, y) for p in ("avg", "max"))
    assert not np.allclose(avg.predict_proba(X), top.predict_proba(X), atol=1e-4)


def test_hidden_layers():
    X, y = pictures()
    model = classifier(head=(7, 5), dropout=0.25, unfreeze=0, max_epochs=40, lr=0.01).fit(X, y)
    kinds = [type(layer).__name__ for layer in model.net_.module_.head]
    assert kinds == ["Dropout", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert {m.p for m in model.net_.module_.head if isinstance(m, nn.Dropout)} == {0.25}
    assert model.n_trainable_parameters_ == 17 * 7 + 8 * 5 + 6 * 2
    assert model.n_iter_ == 40
    assert model.score(X, y) > 0.9
    assert np.array_equal(model.predict_proba(X), model.predict_proba(X))


@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(16, 2), lambda: nn.Sequential(nn.ReLU(), nn.LazyLinear(2))]
)
@pytest.mark.parametrize("unfreeze", [0, 1])
def test_the_head_may_be_a_module(build, unfreeze):
    X, y = pictures()
    head = build()
    was_lazy = any(nn.parameter.is_lazy(p) for p in head.parameters())
    before = None if was_lazy else states(head)
    model = classifier(head=head, unfreeze=unfreeze, max_epochs=15, lr=0.02).fit(X, y)
    assert model.head is head and head.training
    if was_lazy:
        assert all(nn.parameter.is_lazy(p) for p in head.parameters())
    else:
        assert equal(states(head), before)
    assert model.score(X, y) > 0.9
    assert clone(model).fit(X, y).score(X, y) > 0.9


def test_epochs_of_the_head_alone():
    X, y = pictures()
    before = states(get_model("small").network)
    options = {"head": (8,), "max_epochs": 0, "unfreeze": 1, "head_lr": 0.02}
    fresh = classifier(**options, head_epochs=0).fit(X, y)
    np.testing.assert_allclose(fresh.predict_proba(X), 0.5)  # at equal chances
    trained = classifier(**options, head_epochs=30).fit(X, y)
    assert trained.score(X, y) > 0.9
    assert trained.history_ == []
    assert equal(states(trained.to_feature_extractor().backbone.network), before)


def test_the_head_gets_as_many_epochs_as_the_blocks_by_default():
    X, y = pictures()
    auto, same, none = (
        classifier(head=(8,), head_epochs=n).fit(X, y).predict_proba(X) for n in ("auto", 3, 0)
    )
    assert np.array_equal(auto, same)
    assert not np.array_equal(auto, none)
    nothing_frozen = classifier(head=(8,), unfreeze=0).fit(X, y)  # one phase is enough
    assert nothing_frozen.n_iter_ == 3


# ------------------------------------------------------------------------------ views


def jitter():
    return v2.ColorJitter(brightness=0.5, contrast=0.5)


@pytest.mark.parametrize(
    "augment, n_views, expected",
    [
        (None, None, 1),
        ("flip", None, 2),
        ("dihedral", None, 8),
        ("dihedral", 3, 3),
        (jitter(), None, 4),
        (jitter(), 2, 2),
    ],
)
def test_every_view_runs_once_through_frozen_blocks(
    run_log, slow_machine, augment, n_views, expected
):
    X, y = pictures(10)
    model = classifier(augment=augment, n_views=n_views, max_epochs=12).fit(X, y)
    runs = without_blank(run_log())
    assert len(runs) == len(set(runs)) == 10 * expected
    assert model.predict(X).shape == (10,)


def test_a_network_without_frozen_blocks_sees_fresh_views(run_log):
    X, y = pictures(10)
    classifier(augment=jitter(), unfreeze="all", weights=None, max_epochs=5).fit(X, y)
    runs = without_blank(run_log())
    assert len(runs) == len(set(runs)) == 50


@pytest.mark.parametrize("unfreeze", [0, "all"])
def test_auto_augmentation(unfreeze):
    X, y = pictures()
    model = classifier(augment="auto", unfreeze=unfreeze).fit(X, y)
    again = classifier(augment="auto", unfreeze=unfreeze).fit(X, y)
    plain = classifier(unfreeze=unfreeze).fit(X, y)
    assert np.array_equal(model.predict_proba(X), again.predict_proba(X))
    assert not np.array_equal(model.predict_proba(X), plain.predict_proba(X))


@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
def test_a_prediction_is_the_mean_over_views(unfreeze):
    X, y = pictures()
    X[:, :, :16] //= 2  # so the mirror image is another one
    model = classifier(augment="flip", unfreeze=unfreeze).fit(X, y)
    one, mirrored = model.predict_proba(X), model.predict_proba(X[:, :, ::-1])
    decisions = model.decision_function(X), model.decision_function(X[:, :, ::-1])
    model.set_params(predict_views=2)
    np.testing.assert_allclose(model.predict_proba(X), (one + mirrored) / 2, atol=1e-6)
    np.testing.assert_allclose(model.decision_function(X), sum(decisions) / 2, atol=1e-5)
    assert not np.allclose(one, mirrored, atol=1e-5)


def test_a_value_is_the_mean_over_views():
    X = shades(12, 0)
    X[:, :, :16] //= 2
    model = regressor(augment="flip").fit(X, X.mean((1, 2, 3)))
    expected = (model.predict(X) + model.predict(X[:, :, ::-1])) / 2
    np.testing.assert_allclose(model.set_params(predict_views=2).predict(X), expected, rtol=1e-5)


# ------------------------------------------------------------------------------ going on


def test_learning_part_by_part():
    X, y = pictures(30, 3)
    model = classifier(lr=0.01)
    model.partial_fit(X[y < 2], y[y < 2], classes=[0, 1, 2])
    assert model.classes_.tolist() == [0, 1, 2]
    assert model.predict_proba(X).shape == (30, 3)
    for _ in range(30):
        model.partial_fit(X, y)
    model.partial_fit(X, y, classes=[2, 1, 0], sample_weight=np.ones(30))
    assert model.n_iter_ == 32
    assert model.score(X, y) > 0.8
    rates = {group["lr"] for group in model.net_.optimizer_.param_groups}
    assert rates == {0.01}


def test_every_part_is_learnt_with_random_weights():
    X, y = pictures()
    model = classifier(backbone="normed", weights=None, unfreeze="all")
    model.partial_fit(X[:9], y[:9], classes=[0, 1])
    before = states(model.net_.module_)
    model.partial_fit(X[:5], y[:5])
    assert not equal(states(model.net_.module_), before)
    assert all("train_loss" in epoch for epoch in model.history_)


def test_parts_may_leave_a_batch_of_one_image_with_random_weights():
    X, y = pictures()
    model = classifier(backbone="normed", weights=None, unfreeze="all", image_size=16)
    model.partial_fit(X[:8], y[:8], classes=[0, 1])
    assert model.partial_fit(X[:9], y[:9]).n_iter_ == 2


def test_learning_values_part_by_part():
    X = shades(24, 0)
    y = 1e6 * X.mean((1, 2, 3))
    model = regressor(lr=0.01, batch_size=8)
    for _ in range(30):
        model.partial_fit(X, y)
    assert model.n_iter_ == 30
    assert model.score(X, y) > 0.5


def test_a_fitted_estimator_learns_on_in_parts():
    X, y = pictures()
    model = classifier().fit(X, y)
    assert model.partial_fit(X[:5], y[:5]).n_iter_ == 4


@pytest.mark.parametrize("options", [{}, {"head": (8,)}, {"unfreeze": "all", "augment": "flip"}])
def test_warm_start_goes_on(options):
    X, y = pictures()
    model = classifier(warm_start=True, lr=3e-3, **options).fit(X, y)
    first = [epoch["train_loss"] for epoch in model.history_]
    module = model.net_.module_
    state = {name: value.clone() for name, value in module.state_dict().items()}
    model.fit(X, y)
    losses = [epoch["train_loss"] for epoch in model.history_]
    assert losses[:3] == first
    assert len(losses) == model.n_iter_ == 6
    assert losses[3] < losses[0]
    # Whoever predicts with it meanwhile is not disturbed.
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_without_warm_start_a_fit_starts_anew():
    X, y = pictures()
    model = classifier().fit(X, y)
    expected = model.predict_proba(X)
    assert np.array_equal(model.fit(X, y).predict_proba(X), expected)
    assert model.n_iter_ == 3


# ------------------------------------------------------------------------------ callbacks


class Counter(Callback):
    """Counts epochs, and keeps the weights at the end of each."""

    def __init__(self, stop_after=None):
        self.stop_after = stop_after

    def initialize(self):
        self.states_ = []
        return self

    def on_epoch_end(self, net, **kwargs):
        self.states_.append(states(net.module_))
        if len(self.states_) == self.stop_after:
            raise KeyboardInterrupt


def test_callbacks_of_the_user_are_called():
    X, y = pictures()
    counter = Counter()
    classifier(callbacks=[counter], head=(4,)).fit(X, y)
    assert len(counter.states_) == 3  # not in the epochs of the head alone


def test_a_callback_ends_the_training_as_in_skorch():
    X, y = pictures()
    model = classifier(callbacks=[Counter(stop_after=2)], max_epochs=10).fit(X, y)
    assert model.n_iter_ == len(model.history_) == 2
    assert model.predict(X).shape == y.shape


@pytest.mark.parametrize("weighted", [False, True])
def test_scores_after_every_epoch(weighted):
    X, y = pictures()
    scoring = EpochScoring("accuracy", on_train=True, name="train_accuracy", lower_is_better=False)
    weights = np.linspace(0.5, 1, len(y)) if weighted else None
    model = classifier(callbacks=[scoring], max_epochs=20, lr=3e-3, head=(8,), head_epochs=0)
    accuracies = [e["train_accuracy"] for e in model.fit(X, y, weights).history_]
    assert accuracies[-1] > 0.9 > accuracies[0] >= 0


def test_checkpoints_are_written_and_resumed(tmp_path):
    X, y = pictures()
    checkpoint = Checkpoint(dirname=tmp_path, monitor=None)
    first = classifier(callbacks=[checkpoint], lr=0.01).fit(X, y)
    assert (tmp_path / "params.pt").exists()
    resumed = classifier(callbacks=[LoadInitState(checkpoint)], max_epochs=2, random_state=1)
    resumed.fit(X, y)
    assert resumed.n_iter_ == 5
    losses = [[epoch["train_loss"] for epoch in m.history_] for m in (first, resumed)]
    assert losses[1][:3] == losses[0]
    assert losses[1][3] < losses[0][0]


def test_early_stopping_takes_the_best_weights():
    X, _ = pictures(40)
    y = np.random.default_rng(0).integers(0, 2, 40)  # nothing can be learnt
    counter = Counter()
    options = {"unfreeze": "all", "max_epochs": 60, "lr": 0.01, "validation_fraction": 0.25}
    model = classifier(early_stopping=True, n_iter_no_change=4, callbacks=[counter], **options).fit(
        X, y
    )
    losses = [epoch["valid_loss"] for epoch in model.history_]
    assert len(losses) == model.n_iter_ < 60
    assert np.argmin(losses) == len(losses) - 5
    best = counter.states_[len(losses) - 5]
    assert equal(states(model.net_.module_), best)
    assert not equal(counter.states_[-1], best)


@pytest.mark.parametrize("options", [{"unfreeze": 0}, {"max_epochs": 0}])
def test_early_stopping_of_no_epoch(options):
    X, y = pictures(40)
    model = classifier(early_stopping=True, **options).fit(X, y)
    assert model.history_ == [] and model.predict(X).shape == y.shape


@pytest.mark.parametrize("unfreeze", [0, 1])
def test_early_stopping_ends_no_part(unfreeze):
    X, y = pictures(40)
    options = {"unfreeze": unfreeze, "max_epochs": 2, "validation_fraction": 0.25}
    model = classifier(early_stopping=True, **options, warm_start=True).fit(X, y)
    n_epochs = model.n_iter_
    before = states(model.net_.module_)
    for _ in range(2):
        model.partial_fit(X, y)
    assert model.n_iter_ == n_epochs + 2
    assert not equal(states(model.net_.module_), before)
    assert ["valid_loss" in epoch for epoch in model.history_] == [True] * n_epochs + [False] * 2
    if unfreeze:  # what is left of epochs that learn nothing
        model.set_params(max_epochs=9, n_iter_no_change=2, lr=0.0, head_lr=0.0).fit(X, y)
        assert model.n_iter_ < n_epochs + 2 + 9
        assert "valid_loss" in model.history_[-1]


def test_a_part_after_a_fit_has_a_constant_learning_rate():
    X, y = pictures(20)
    model = classifier(unfreeze=1, max_epochs=2, lr=0.01, head_lr=0.01).fit(X, y)
    model.partial_fit(X, y)
    rates = {group["lr"] for group in model.net_.optimizer_.param_groups}
    model.partial_fit(X[:9], y[:9])
    assert rates == {group["lr"] for group in model.net_.optimizer_.param_groups} == {0.01}


def test_early_stopping_with_weights():
    X, y = pictures(40)
    options = {"early_stopping": True, "max_epochs": 2}
    weighted = classifier(**options, class_weight="balanced").fit(X, y, np.linspace(0.5, 1, 40))
    assert "valid_loss" in weighted.history_[0]
    repeated = regressor(**options).fit(X, y, np.linspace(0.5, 1, 40))
    assert "valid_loss" in repeated.history_[0]


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_early_stopping_of_values_and_of_labels(n_outputs):
    X = shades(24, 0)
    y = X.mean((1, 2, 3))
    table = np.column_stack([y, -y])[:, :n_outputs]
    model = regressor(early_stopping=True).fit(X, table)
    assert "valid_loss" in model.history_[0]
    labels = (table > np.median(table, axis=0)).astype(int)
    model = classifier(early_stopping=True).fit(X, np.column_stack([labels, labels]))
    assert "valid_loss" in model.history_[0]


# ------------------------------------------------------------------------------ copies


COPIES = {
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "joblib": lambda model, path: joblib.load(joblib.dump(model, path / "model.joblib")[0]),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize(
    "options",
    [
        {"unfreeze": 0},
        {"unfreeze": ["layer1.0"], "head": (4,)},
        {"unfreeze": "all", "weights": None, "augment": "flip", "predict_views": 2},
    ],
)
def test_copies_predict_the_same(tmp_path, how, options):
    X, y = pictures()
    model = classifier(backbone="normed", **options).fit(X, y)
    expected = model.predict_proba(X)
    copied = COPIES[how](model, tmp_path)
    assert np.array_equal(copied.predict_proba(X), expected)
    assert copied.history_ == model.history_
    assert copied.unfrozen_block_names_ == model.unfrozen_block_names_
    assert str(copied.plan_) == str(model.plan_)
    again = COPIES[how](copied, tmp_path)  # its trainer is there, or was never made
    assert np.array_equal(again.predict_proba(X), expected)
    copied.partial_fit(X, y)
    assert np.array_equal(model.predict_proba(X), expected)


@pytest.mark.parametrize(
    "options", [{"unfreeze": 0}, {"image_size": 16}, {"pooling": "max"}, {"unfreeze": 2}]
)
def test_copies_are_those_of_the_fit_whatever_was_set_since(options):
    X, y = pictures()
    model = classifier(backbone="convolutional", lr=0.01).fit(X, y)
    expected = model.predict_proba(X)
    model.set_params(**options)
    assert np.array_equal(model.predict_proba(X), expected)
    assert np.array_equal(copy.deepcopy(model).predict_proba(X), expected)


def test_a_copy_learns_on():
    X, y = pictures()
    model = classifier(warm_start=True, lr=3e-3).fit(X, y)
    copied = pickle.loads(pickle.dumps(model)).fit(X, y)
    assert copied.n_iter_ == 6
    assert copied.history_[3]["train_loss"] < copied.history_[0]["train_loss"]


def test_a_pickle_with_a_module_for_backbone_and_head():
    X, y = pictures()
    model = classifier(backbone=Backbone(small(), SIZE), head=nn.LazyLinear(2)).fit(X, y)
    copied = pickle.loads(pickle.dumps(model))
    assert np.array_equal(copied.predict_proba(X), model.predict_proba(X))


def test_a_clone_is_not_fitted():
    X, y = pictures()
    model = classifier(unfreeze=["layer1"], backbone="normed").fit(X, y)
    cloned = clone(model)
    assert cloned.get_params() == model.get_params()
    assert not [name for name in vars(cloned) if name.endswith("_")]


def test_skops_asks_for_no_trust_but_in_this_library():
    sio = pytest.importorskip("skops.io")
    X, y = pictures()
    for model in (classifier(augment="flip").fit(X, y), regressor().fit(X, y)):
        data = sio.dumps(model)
        names = sio.get_untrusted_types(data=data)
        assert all(name.startswith("sktransfer.") for name in names), names
        loaded = sio.loads(data, trusted=names)
        assert np.array_equal(loaded.predict(X), model.predict(X))
        assert np.array_equal(loaded._outputs(X), model._outputs(X))


def test_a_pickle_is_small_and_opens_in_a_new_process(tmp_path):
    X, y = pictures(8)
    # On torch: other runtimes are used once a process has run enough images.
    options = {"image_size": 64, "runtime": "torch", "random_state": 0}
    model = FineTunedClassifier(unfreeze=0, **options).fit(X, y)
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    network = get_model("efficientnet_lite0").network
    n_bytes = sum(value.nbytes for value in network.state_dict().values())
    assert (tmp_path / "model.pickle").stat().st_size < n_bytes / 3
    np.save(tmp_path / "X.npy", X)
    run_code(
        "import pickle, numpy as np, torch; torch.set_num_threads(1);"
        "model = pickle.load(open('model.pickle', 'rb'));"
        "np.save('out.npy', model.predict_proba(np.load('X.npy')))",
        folder=tmp_path,
    )
    assert np.array_equal(np.load(tmp_path / "out.npy"), model.predict_proba(X))


def test_the_fine_tuned_network_as_a_feature_extractor():
    X, y = pictures(30, 3)
    model = classifier(backbone="normed", unfreeze=2, lr=0.01, n_jobs=1).fit(X, y)
    extractor = model.to_feature_extractor()
    assert type(extractor) is PretrainedFeatureExtractor
    assert (extractor.pooling, extractor.n_jobs, extractor.batch_size) == ("avg", 1, 8)
    rows = extractor.fit_transform(X)
    assert rows.shape == (30, 12) == (30, len(extractor.get_feature_names_out()))
    assert extractor.block_names_ == model.block_names_
    with torch.no_grad():
        decisions = model.net_.module_.head(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(decisions, model.decision_function(X), atol=1e-2)
    before = PretrainedFeatureExtractor("normed").transform(X)
    assert not np.allclose(rows, before, atol=1e-2)
    model.partial_fit(X, y)  # the extractor's network is a copy
    assert np.array_equal(extractor.transform(X), rows)


# ------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize("unfreeze", [0, 2, "all"])
def test_half_precision_is_close(unfreeze, tmp_path):
    X, y = pictures()
    exact = classifier(unfreeze=unfreeze).fit(X, y).predict_proba(X)
    half = classifier(unfreeze=unfreeze, precision="bfloat16", memory=tmp_path).fit(X, y)
    rough = half.predict_proba(X)
    assert rough.dtype == np.float32
    np.testing.assert_allclose(rough, exact, atol=0.05)
    assert not np.array_equal(rough, exact)
    assert {p.dtype for p in half.net_.module_.parameters()} == {torch.float32}


@pytest.mark.parametrize("unfreeze", [1, "all"])
def test_auto_precision_trains_in_bfloat16_alone(unfreeze, tmp_path, run_log):
    X, y = pictures()
    model = classifier(unfreeze=unfreeze, precision="auto", memory=tmp_path).fit(X, y)
    found = model.predict_proba(X)
    apart = classifier(unfreeze=unfreeze, precision="auto").fit(X, y)
    assert np.array_equal(apart.predict_proba(X), found)
    assert np.array_equal(model.set_params(precision="float32").predict_proba(X), found)
    n_before = len(run_log())
    exact = classifier(unfreeze=unfreeze, memory=tmp_path).fit(X, y)  # by the same entries
    if unfreeze == 1:
        assert without_blank(run_log()[n_before:]) == []
    expected = exact.predict_proba(X)
    np.testing.assert_allclose(found, expected, atol=0.05)
    assert np.array_equal(found, expected) != has_bfloat16(if_unknown=False)


def test_auto_precision_is_float32_where_nothing_is_known_to_gain():
    X, y = pictures()
    options = {"unfreeze": 0, "head_epochs": 1}
    expected = classifier(**options).fit(X, y).predict_proba(X)
    head = classifier(**options, precision="auto").fit(X, y)
    assert np.array_equal(head.predict_proba(X), expected)
    settings = classifier(precision="auto").fit(X, y).trainer().settings
    assert settings.precision_of_steps(torch.device("cuda")) == "float32"


@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
def test_the_plan_is_one_line(unfreeze, capsys, tmp_path):
    X, y = pictures(6)
    model = classifier(unfreeze=unfreeze, verbose=2, memory=tmp_path).fit(X, y)
    assert isinstance(model.plan_, Plan)
    assert str(model.plan_) and "\n" not in str(model.plan_)
    assert str(model.plan_) in capsys.readouterr().out.splitlines()
    classifier(unfreeze=unfreeze).fit(X, y)
    assert capsys.readouterr().out == ""


def test_learning_rates_decay_with_depth():
    X, y = pictures(6)
    model = classifier(unfreeze=3, lr=0.01, lr_decay=0.5, head_lr=0.1, weight_decay=0.02)
    model.partial_fit(X, y, classes=[0, 1])
    of = {}
    for group in model.net_.optimizer_.param_groups:
        of |= {id(p): (group["lr"], group["weight_decay"]) for p in group["params"]}
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    rates = {
        name: of[id(p)][0]
        for name, p in model.net_.module_.named_parameters()
        if p.requires_grad and p.ndim > 1
    }
    assert sorted(rates.values()) == [0.0025, 0.005, 0.01, 0.1]
    assert rates["head.1.weight"] == 0.1 and rates["blocks.0.stem.0.weight"] == 0.0025


def test_paths_and_arrays_of_any_size(tiles, photos):
    _, paths, labels = tiles
    model = classifier().fit(paths[::4], labels[::4])
    assert model.predict([photos[0], photos[1][:50, :40]]).shape == (2,)


def test_no_warnings_in_normal_use(tiles, tmp_path):
    _, paths, labels = tiles
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for unfreeze in (0, 1, "all"):
            classifier(unfreeze=unfreeze, memory=tmp_path).fit(paths, labels).predict(paths)
