"""What users set for scikit-learn as a whole, and the containers that hold images and labels."""

from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import numpy as np  # noqa: E402
import pandas as pd
import polars as pl
import pytest
import sklearn
from networks import small
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from sktransfer import (
    FineTunedClassifier,
    FineTunedRegressor,
    PatchAnomalyDetector,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
    model_summary,
    register_model,
)
from sktransfer._cli.benchmark import Task, compare
from sktransfer.inspection import (
    AnomalyMapDisplay,
    DepthCurveDisplay,
    EmbeddingDisplay,
    HistoryDisplay,
    PrototypeDisplay,
    RejectionCurveDisplay,
    SaliencyDisplay,
    TopLossesDisplay,
    TransferGainDisplay,
)
from sktransfer.metrics import h_score, leep_score, log_me_score
from sktransfer.model_selection import rank_backbones, transfer_gain
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))
BACKBONE = Backbone(small(), SIZE, tuple("abcde"), name="small")


def by_name(values):
    """A Series whose index holds names, out of order."""
    values = list(values)
    return pd.Series(values, index=[f"i{5 * i % len(values)}" for i in range(len(values))])


def backwards(values):
    """A Series whose index counts down: by label, another row is found than by position."""
    values = list(values)
    return pd.Series(values, index=range(len(values) - 1, -1, -1))


SURROUNDINGS = {
    "plain": ({}, list, list),
    "pandas": ({"transform_output": "pandas"}, by_name, backwards),
    "polars, routing": (
        {"transform_output": "polars", "enable_metadata_routing": True},
        pl.Series,
        pl.Series,
    ),
}


@pytest.fixture(scope="module")
def run(tiles):
    """A function that returns what one of `CALLS` does in one of the `SURROUNDINGS`."""
    _, paths, labels = tiles
    paths, labels = paths[::3], labels[::3]
    register_model("weighted", lambda weights: Backbone(small(0 if weights else 1), SIZE))
    net = fine_tuned(unfreeze=1, early_stopping=True, validation_fraction=0.3).fit(paths, labels)
    cases, results = {}, {}

    def case(name):
        _, of_images, of_labels = SURROUNDINGS[name]
        X, y = of_images(paths), of_labels(labels)
        extractor = PretrainedFeatureExtractor(BACKBONE)
        pipe = make_pipeline(extractor, LogisticRegression()).fit(X, y)
        proba = pd.DataFrame(net.predict_proba(paths), index=backwards(paths).index)
        return SimpleNamespace(
            X=X, y=y, first=of_images(paths[:3]), few=of_labels(labels[:3]), as_labels=of_labels,
            net=net, pipe=pipe, extractor=extractor, rows=extractor.transform(X), proba=proba,
        )  # fmt: skip

    def result(call, name):
        if (call, name) not in results:
            with sklearn.config_context(**SURROUNDINGS[name][0]):
                if name not in cases:
                    cases[name] = case(name)
                results[call, name] = np.asarray(CALLS[call](cases[name]))
        return results[call, name]

    return result


def fine_tuned(**options):
    return FineTunedClassifier(BACKBONE, max_epochs=1, random_state=0, **options)


def weighed(case):
    weights = case.as_labels(np.arange(1.0, 15))
    return fine_tuned(unfreeze="auto").fit(case.X, case.y, weights).predict_proba(case.X)


def searched(case):
    search = GridSearchCV(case.pipe, {"logisticregression__C": [0.1, 1]}, cv=2)
    return search.fit(case.X, case.y).cv_results_["mean_test_score"]


def ranked(case):
    scores = ["knn", "logistic", "logme", "h_score", "leep"]
    options = {"scoring": scores, "cv": 2, "random_state": 0}
    return rank_backbones(case.X, case.y, [BACKBONE], **options)[scores].to_numpy()


def gained(case):
    options = {"image_size": 32, "unfreeze": 0, "scratch": {"max_epochs": 1}, "cv": 2}
    options |= {"n_repeats": 1, "random_state": 0}
    return transfer_gain(case.X, case.y, backbone="weighted", **options).scores.to_numpy()


def compared(case):
    task = Task("tiles", list(case.X), {"": np.asarray(case.y)})
    return [one.scores["accuracy"] for one in compare(task, [], n_splits=1).results]


def depths(case):
    search = GridSearchCV(fine_tuned(), {"unfreeze": [0, 1]}, cv=2).fit(case.X, case.y)
    return DepthCurveDisplay.from_estimator(search).scores


CALLS = {
    "extractor": lambda c: c.extractor.fit(c.X).transform(c.X),
    "as it is": lambda c: PretrainedClassifier(BACKBONE).fit(c.X).predict_proba(c.X),
    "top_k": lambda c: PretrainedClassifier(BACKBONE).top_k(c.X, 2)["probability"],
    "score": lambda c: c.net.score(c.X, c.y),
    "unfreeze='auto', weighed": weighed,
    "regressor": lambda c: (
        FineTunedRegressor(BACKBONE, max_epochs=1, random_state=0)
        .fit(c.X, c.as_labels(np.arange(14.0)))
        .predict(c.X)
    ),
    "search": searched,
    "map of an extractor": lambda c: (
        EmbeddingDisplay.from_estimator(c.extractor, c.X, c.y, random_state=0).positions
    ),
    "map of a network": lambda c: (  # the last bits of a float move t-SNE's points far away
        EmbeddingDisplay.from_estimator(c.net, c.X, c.y, method="tsne").positions.shape
    ),
    "map of a pipeline": lambda c: EmbeddingDisplay.from_estimator(c.pipe, c.X, c.y).positions,
    "map of a table": lambda c: EmbeddingDisplay.from_embeddings(c.rows, c.X, c.y).positions,
    "prototypes of a network": lambda c: (
        PrototypeDisplay.from_estimator(c.net, c.first, c.X, c.y, n_neighbors=2).rows
    ),
    "prototypes of a pipeline": lambda c: (
        PrototypeDisplay.from_estimator(c.pipe, c.first, c.X, c.y, n_neighbors=2).neighbor_titles
    ),
    "prototypes of tables": lambda c: (
        PrototypeDisplay.from_embeddings(
            c.rows[:3], c.rows, c.first, c.X, c.y, predictions=c.few, n_neighbors=2
        ).titles
    ),
    "losses of a network": lambda c: TopLossesDisplay.from_estimator(c.net, c.X, c.y).losses,
    "losses of a pipeline": lambda c: TopLossesDisplay.from_estimator(c.pipe, c.X, c.y).true,
    "losses of a table": lambda c: (
        TopLossesDisplay.from_predictions(
            c.X, c.y, c.proba, classes=c.as_labels(c.net.classes_)
        ).rows
    ),
    "saliency": lambda c: SaliencyDisplay.from_estimator(c.net, c.first, targets=c.few).saliency,
    "saliency as it is": lambda c: (
        SaliencyDisplay.from_estimator(
            PretrainedClassifier(BACKBONE), c.first, targets=c.as_labels(list("cab"))
        ).saliency
    ),
    "anomalies": lambda c: (
        PatchAnomalyDetector(BACKBONE, coreset=30, random_state=0).fit(c.X).score_samples(c.X)
    ),
    "maps of anomalies": lambda c: (
        AnomalyMapDisplay.from_estimator(
            PatchAnomalyDetector(BACKBONE, coreset=30, random_state=0).fit(c.X), c.first
        ).maps
    ),
    "rejection": lambda c: (
        RejectionCurveDisplay.from_estimator(
            c.pipe, c.X, c.y, confidence=c.proba.max(axis=1)
        ).errors
    ),
    "history": lambda c: HistoryDisplay.from_estimator(c.net).train_loss,
    "depths": depths,
    "gains": lambda c: (
        TransferGainDisplay.from_result(
            c.as_labels(["a", "b"]), c.as_labels([0.1, 0.2]), pd.DataFrame([[0, 1], [0, 2]])
        ).gains
    ),
    "summary": lambda c: str(model_summary(c.net)),
    "rank_backbones": ranked,
    "transfer_gain": gained,
    "log_me_score": lambda c: log_me_score(c.rows, c.y),
    "h_score": lambda c: h_score(c.rows, c.y),
    "leep_score": lambda c: leep_score(c.proba, c.y),
    "benchmark": compared,
}


@pytest.mark.parametrize("surroundings", [name for name in SURROUNDINGS if name != "plain"])
@pytest.mark.parametrize("call", CALLS)
def test_results_are_the_same_in_all_surroundings(run, call, surroundings):
    expected, found = run(call, "plain"), run(call, surroundings)
    if expected.dtype.kind == "f":
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_array_equal(found, expected)
