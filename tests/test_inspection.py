import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np
import pytest
import torch
from networks import Untraceable, small
from sklearn.decomposition import PCA
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.svm import SVC
from torch import nn

from sktransfer import (
    FineTunedClassifier,
    FineTunedRegressor,
    PatchAnomalyDetector,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
)
from sktransfer._engine.cut_network import as_map
from sktransfer._training.whole import whole_of_trainer
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
from sktransfer.io import load_image
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))


@pytest.fixture(autouse=True)
def _draw_and_close():
    """Draw all that a test plotted: what can't be drawn, or laid out, raises only then."""
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


def classifier(**options):
    options = {"max_epochs": 1, "random_state": 0, **options}
    return FineTunedClassifier(Backbone(small(), SIZE), **options)


@pytest.fixture(scope="module")
def fitted(tiles):
    _, paths, labels = tiles
    return classifier(unfreeze=2, max_epochs=3, early_stopping=True).fit(paths, labels)


@pytest.fixture(scope="module")
def linear(tiles):
    _, paths, labels = tiles
    extractor = PretrainedFeatureExtractor(Backbone(small(), SIZE))
    return make_pipeline(extractor, LogisticRegression(max_iter=1000)).fit(paths[::4], labels[::4])


def titles(display):
    return [axes.get_title() for axes in display.axes_.ravel()]


# ------------------------------------------------------------------------------ depth


def test_depth_curve_of_a_search(tiles):
    _, paths, labels = tiles
    grid = {"unfreeze": ["all", 1, ["stem"], 0], "lr": [1e-4, 1e-2]}
    search = GridSearchCV(classifier(), grid, cv=2, refit=False).fit(paths[::4], labels[::4])
    display = DepthCurveDisplay.from_estimator(search)
    assert display.depths == [0, 1, ["stem"], "all"]
    names = [text.get_text() for text in display.ax_.get_xticklabels()]
    assert names == ["0", "1", "stem", "all"]
    results = search.cv_results_
    for depth, score, std, seconds in zip(
        display.depths, display.scores, display.scores_std, display.seconds, strict=True
    ):
        rows = [i for i, p in enumerate(results["params"]) if p["unfreeze"] == depth]
        best = max(rows, key=lambda row: results["mean_test_score"][row])
        assert score == max(results["mean_test_score"][rows]) == results["mean_test_score"][best]
        assert std == results["std_test_score"][best]
        assert seconds == results["mean_fit_time"][best]
    line, _, _ = display.ax_.containers[0]
    np.testing.assert_array_equal(line.get_ydata(), display.scores)
    heights = [column.get_height() for column in display.ax_cost_.patches]
    np.testing.assert_array_equal(heights, display.seconds)


def test_what_the_first_candidate_pays_for_all_stands_apart():
    # Three fits of a first candidate that runs the network on 2/3, 1/3 and none of the images.
    paid = 9.0 * np.array([2 / 3, 1 / 3, 0])
    results = {
        "params": [{"unfreeze": 1}, {"unfreeze": 0}],
        "param_unfreeze": np.ma.array([1, 0], object),
        "mean_fit_time": np.array([(2 + paid).mean(), 1.0]),
        "std_fit_time": np.array([(2 + paid).std(), 0.1]),
        "mean_test_score": np.array([0.8, 0.7]),
        "std_test_score": np.zeros(2),
        **{f"split{i}_test_score": np.array([0.8, 0.7]) for i in range(3)},
    }
    search = GridSearchCV(classifier(), {"unfreeze": [1, 0]})
    search.cv_results_ = results
    display = DepthCurveDisplay.from_estimator(search)
    np.testing.assert_allclose(display.seconds, [1, 2])
    np.testing.assert_allclose(display.shared_seconds, [0, 3])
    heights = [column.get_height() for column in display.ax_cost_.patches]
    np.testing.assert_allclose(heights, [1, 2, 0, 3])


def test_depth_curve_of_a_pipeline_and_of_several_metrics(tiles):
    _, paths, labels = tiles
    search = GridSearchCV(
        Pipeline([("net", classifier())]),
        {"net__unfreeze": [1, 0]},
        cv=2,
        scoring=["accuracy", "roc_auc"],
        refit="roc_auc",
    ).fit(paths[::2], labels[::2])
    figure, ax = plt.subplots()
    display = DepthCurveDisplay.from_estimator(search, ax=ax)
    assert display.ax_ is ax and display.figure_ is figure
    assert ax.get_ylabel() == "cross-validated roc auc"
    np.testing.assert_array_equal(display.scores, search.cv_results_["mean_test_roc_auc"][::-1])
    other = DepthCurveDisplay.from_estimator(search, metric="accuracy")
    np.testing.assert_array_equal(other.scores, search.cv_results_["mean_test_accuracy"][::-1])
    with pytest.raises(ValueError, match="metric='f1', but the search has the metrics accuracy"):
        DepthCurveDisplay.from_estimator(search, metric="f1")


def test_depth_curve_of_a_halving_search_takes_the_last_round(tiles):
    _, paths, labels = tiles
    search = HalvingGridSearchCV(
        classifier(), {"unfreeze": [0, 1, 2]}, cv=2, min_resources=10, random_state=0
    ).fit(paths, labels)
    display = DepthCurveDisplay.from_estimator(search)
    results = search.cv_results_
    assert display.depths == [0, 1, 2]
    best = display.depths.index(search.best_params_["unfreeze"])
    last = np.flatnonzero(results["iter"] == results["iter"].max())
    assert display.scores[best] in results["mean_test_score"][last]


def test_depth_curve_of_another_search(tiles):
    _, paths, labels = tiles
    search = GridSearchCV(classifier(), {"lr": [0.1]}, cv=2).fit(paths[::4], labels[::4])
    with pytest.raises(ValueError, match="must vary one 'unfreeze' parameter; it varies lr"):
        DepthCurveDisplay.from_estimator(search)


# ------------------------------------------------------------------------------ numbers


def test_history(fitted):
    display = HistoryDisplay.from_estimator(fitted)
    train, valid, best = display.ax_.lines
    np.testing.assert_array_equal(train.get_ydata(), [e["train_loss"] for e in fitted.history_])
    losses = [e["valid_loss"] for e in fitted.history_]
    np.testing.assert_array_equal(valid.get_ydata(), losses)
    assert best.get_xdata().tolist() == [np.argmin(losses) + 1]
    plain = HistoryDisplay.from_history([{"train_loss": 2.0}, {"train_loss": 1.0}])
    assert len(plain.ax_.lines) == 1 and plain.valid_loss is None


def test_history_of_a_head_that_was_solved(tiles):
    _, paths, labels = tiles
    with pytest.raises(ValueError, match="history_ is empty"):
        HistoryDisplay.from_estimator(classifier(unfreeze=0).fit(paths[::4], labels[::4]))


def test_transfer_gain():
    intervals = [(0.1, 0.3), (-0.1, 0.1), (-0.3, -0.1)]
    names = np.array(["scratch", "pixels", "majority"])
    display = TransferGainDisplay.from_result(names, [0.2, 0.01, -0.15], intervals)
    colors = [bar.get_facecolor() for bar in display.ax_.patches]
    blue, grey, red = (matplotlib.colors.to_rgba(c) for c in ("C0", "0.6", "C3"))
    assert colors == [blue, grey, red]
    (errors,) = display.ax_.containers[0].lines[2]
    ends = np.array([segment[:, 0] for segment in errors.get_segments()])
    np.testing.assert_allclose(ends, intervals)
    with pytest.raises(ValueError, match=r"2 names, but gains of shape \(1,\)"):
        TransferGainDisplay.from_result(["a", "b"], [0.1], [(0, 1)])
    with pytest.raises(ValueError, match="0.5 of 'a' lies outside"):
        TransferGainDisplay.from_result(["a"], [0.5], [(0, 0.2)])


# ------------------------------------------------------------------------------ worst


def test_top_losses(tiles, linear):
    _, paths, labels = tiles
    display = TopLossesDisplay.from_estimator(linear, paths, labels, n_images=5)
    proba = linear.predict_proba(paths)
    losses = -np.log(proba[np.arange(40), (labels == "flower").astype(int)])
    order = np.argsort(-losses)[:5]
    np.testing.assert_array_equal(display.rows, order)
    np.testing.assert_allclose(display.losses, losses[order])
    np.testing.assert_array_equal(display.predicted, linear.predict([paths[i] for i in order]))
    np.testing.assert_array_equal(display.true, labels[order])
    first = f"said {display.predicted[0]} ({proba[order[0]].max():.2f})\nis {labels[order[0]]} ("
    assert titles(display)[0].startswith(first)
    assert display.axes_.shape == (5,)
    np.testing.assert_allclose(
        display.images[0].mean(), load_image(paths[order[0]]).float().mean(), 0.05
    )


def test_top_losses_show_wrong_ones_in_red(photos):
    proba = [[0.9, 0.1], [0.7, 0.3]]
    display = TopLossesDisplay.from_predictions(photos, [1, 0], proba, classes=[0, 1])
    colors = [axes.title.get_color() for axes in display.axes_]
    assert display.rows.tolist() == [0, 1] and colors == ["firebrick", "black"]


def test_top_losses_of_bad_input(photos, tiles):
    _, paths, labels = tiles
    with pytest.raises(TypeError, match="Pipeline has no predict_proba.*CalibratedClassifierCV"):
        TopLossesDisplay.from_estimator(make_pipeline(SVC()), paths, labels)
    with pytest.raises(ValueError, match="not in classes: 7, 9"):
        TopLossesDisplay.from_predictions(photos, [7, 9], np.eye(2), classes=[0, 1])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        TopLossesDisplay.from_predictions(photos, [0], np.eye(2), classes=[0, 1])
    with pytest.raises(ValueError, match="do not go together"):
        TopLossesDisplay.from_predictions(photos, [0, 1], np.eye(2), classes=[0, 1, 2])


# ------------------------------------------------------------------------------ map


def test_embedding_map_by_components(tiles, linear):
    _, paths, labels = tiles
    display = EmbeddingDisplay.from_estimator(linear, paths, labels)
    rows = linear[:-1].transform(paths)
    np.testing.assert_allclose(display.positions, PCA(2).fit_transform(rows), atol=1e-4)
    assert [text.get_text() for text in display.ax_.get_legend().get_texts()] == ["china", "flower"]
    assert "component 1" in display.ax_.get_xlabel()
    assert 2 <= len(display.thumbnails) == len(display.ax_.artists) <= 40
    extent = np.ptp(display.positions, axis=0)
    places = display.positions[list(display.thumbnails)] / extent
    gaps = np.abs(places[:, None] - places[None])
    assert ((gaps > (0.07, 0.09)).any(2) | np.eye(len(places), dtype=bool)).all()


def test_embedding_map_of_a_fine_tuned_network(tiles, fitted):
    _, paths, labels = tiles
    display = EmbeddingDisplay.from_estimator(fitted, paths, n_thumbnails=3)
    rows = fitted.to_feature_extractor().transform(paths)
    np.testing.assert_allclose(display.positions, PCA(2).fit_transform(rows), atol=1e-4)
    assert len(display.thumbnails) == 3 and display.ax_.get_legend() is None
    of_network = EmbeddingDisplay.from_estimator(
        PretrainedClassifier(Backbone(small(), SIZE)), paths
    )
    assert of_network.positions.shape == (40, 2)


def test_embedding_map_by_neighbours():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(12, 5)), rng.normal(20, size=(12, 5))])
    display = EmbeddingDisplay.from_embeddings(
        rows, y=np.repeat([0, 1], 12), method="tsne", random_state=0
    )
    centres = display.positions.reshape(2, 12, 2).mean(1)
    spread = display.positions.reshape(2, 12, 2).std(1).max()
    assert np.linalg.norm(centres[0] - centres[1]) > spread
    assert display.thumbnails is None


def test_colours_of_numbers_and_of_many_classes():
    rows = np.random.default_rng(0).normal(size=(60, 4))
    numbers = EmbeddingDisplay.from_embeddings(rows, y=np.linspace(0, 1, 60) ** 2)
    assert len(numbers.figure_.axes) == 2  # with a scale
    many = EmbeddingDisplay.from_embeddings(rows, y=np.arange(60) % 30)
    assert many.ax_.get_legend() is None and len(many.ax_.collections) == 30
    with pytest.raises(ValueError, match=r"one label an image, got shape \(60, 2\)"):
        EmbeddingDisplay.from_embeddings(rows, y=np.ones((60, 2), int))


def test_embedding_map_of_bad_input(tiles):
    _, paths, _ = tiles
    with pytest.raises(ValueError, match="at least 3 embeddings"):
        EmbeddingDisplay.from_embeddings(np.ones((2, 4)))
    with pytest.raises(ValueError, match="'pca' or 'tsne', got 'umap'"):
        EmbeddingDisplay.from_embeddings(np.ones((4, 4)), method="umap")
    with pytest.raises(TypeError, match="SVC does not embed images"):
        EmbeddingDisplay.from_estimator(SVC(), paths)


# ------------------------------------------------------------------------------ neighbours


def test_prototypes(tiles, linear):
    _, paths, labels = tiles
    some = [paths[3], paths[30]]
    display = PrototypeDisplay.from_estimator(linear, some, paths, labels, n_neighbors=3)
    assert display.rows[:, 0].tolist() == [3, 30]  # an image is nearest to itself
    np.testing.assert_allclose(display.distances[:, 0], 0, atol=1e-5)
    assert (np.diff(display.distances) >= 0).all()
    rows = linear[:-1].transform(paths)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = 1 - np.sort(unit @ unit[3])[::-1][:3]
    np.testing.assert_allclose(display.distances[0], expected, atol=1e-5)
    assert display.axes_.shape == (2, 4)
    assert titles(display)[0] == f"query\nsaid {linear.predict(some)[0]}"
    assert titles(display)[1] == "china\ncosine distance 0.00"


def test_prototypes_without_labels_or_predictions(tiles):
    _, paths, _ = tiles
    extractor = PretrainedFeatureExtractor(Backbone(small(), SIZE))
    display = PrototypeDisplay.from_estimator(
        extractor, paths[:1], paths[10:20], n_neighbors=2, metric="euclidean"
    )
    assert titles(display)[0] == "query\nimage 0" and titles(display)[1].startswith("image ")
    with pytest.raises(ValueError, match="n_neighbors=5, but there are 3 training images"):
        PrototypeDisplay.from_estimator(extractor, paths[:1], paths[:3])


# ------------------------------------------------------------------------------ saliency


@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
def test_the_whole_network_says_what_the_estimator_says(tiles, unfreeze):
    _, paths, labels = tiles
    model = classifier(unfreeze=unfreeze, max_epochs=2).fit(paths, labels)
    whole = whole_of_trainer(model.trainer())
    batch = torch.stack([SIZE.fit_size(load_image(path)) for path in paths])
    with torch.inference_mode():
        outputs = whole(SIZE.normalize(batch))
    np.testing.assert_allclose(outputs.softmax(1), model.predict_proba(paths), atol=1e-5)


def test_saliency_is_grad_cam(tiles, fitted):
    _, paths, _ = tiles
    display = SaliencyDisplay.from_estimator(fitted, paths[:3], layer="body.1")
    whole = whole_of_trainer(fitted.trainer())
    batch = torch.stack([SIZE.fit_size(load_image(path)) for path in paths[:3]])
    x = SIZE.normalize(batch).requires_grad_()
    for block in whole.blocks[:3]:
        x = block(x)
    activation = x  # (n, c, h, w), behind the last trained block: nothing is rounded there
    for block in whole.blocks[3:]:
        x = block(x)
    outputs = whole.head(x.flatten(1))
    (gradient,) = torch.autograd.grad(outputs.max(1).values.sum(), activation)
    weights = gradient.mean((2, 3), keepdim=True)
    expected = (weights * activation).sum(1).relu().detach().numpy()  # (n, h, w)
    # The corners of the map, which is scaled up from 4 × 4 positions, are those of the activation.
    corners = np.ix_(range(3), [0, -1], [0, -1])
    scaled = expected - expected.min((1, 2), keepdims=True)
    scaled /= np.maximum(scaled.max((1, 2), keepdims=True), 1e-7)
    np.testing.assert_allclose(display.saliency[corners], scaled[corners], atol=0.1)
    assert titles(display) == [
        f"{label} ({p:.2f})"
        for label, p in zip(
            fitted.predict(paths[:3]), fitted.predict_proba(paths[:3]).max(1), strict=True
        )
    ]


def test_saliency_shows_the_whole_image_around(photos):
    display = SaliencyDisplay.from_estimator(PretrainedClassifier(), photos)
    for axes, image, (whole, (top, left)) in zip(
        display.axes_, display.images, display.surroundings, strict=True
    ):
        assert whole.shape[:2] == (256, 383)
        part = whole[top : top + 224, left : left + 224].astype(int)
        assert np.abs(part - image).mean() < 4  # scaled by another filter
        shown = axes.images[-1]
        assert shown.get_alpha() == 0.3 and axes.get_xlim()[0] == -left - 0.5
        assert np.ptp(axes.get_xlim()) == 383 and abs(np.diff(axes.get_ylim())) == 256


def test_saliency_finds_the_flower(photos):
    display = SaliencyDisplay.from_estimator(
        PretrainedClassifier(), photos, targets=["palace", "daisy"]
    )
    flower = display.saliency[1]
    assert flower[60:160, 60:160].mean() > 3 * np.mean([flower[:40, :40], flower[:40, -40:]])
    assert display.images.shape == (2, 224, 224, 3) and "daisy (0.3" in titles(display)[1]


def test_saliency_of_tokens(photos):
    model = PretrainedClassifier("timm/test_vit", weights=None)
    display = SaliencyDisplay.from_estimator(model, photos[:1])
    # Behind the last block only the class token counts: a map from there would be empty.
    assert display.saliency.shape == (1, 160, 160) and display.saliency.std() > 0.05


def test_activations_as_maps():
    x = torch.arange(2 * 5 * 4 * 6.0).reshape(2, 5, 4, 6)  # (n, c, h, w)
    assert torch.equal(as_map(x, "map", 0, (64, 96)), x)
    assert torch.equal(as_map(x.permute(0, 2, 3, 1), "map_last", 0, (64, 96)), x)
    tokens = torch.cat([torch.full((2, 3, 5), -1.0), x.flatten(2).transpose(1, 2)], 1)
    assert torch.equal(as_map(tokens, "tokens", 3, (64, 96)), x)


def test_saliency_leaves_the_estimator_as_it_was(tiles, fitted):
    _, paths, _ = tiles
    before = fitted.predict_proba(paths[:4])
    module = fitted.trainer().net.module_
    modes = [m.training for m in module.modules()]
    SaliencyDisplay.from_estimator(fitted, paths[:2])
    assert all(not m._forward_hooks for m in module.modules())
    assert [m.training for m in module.modules()] == modes
    assert {p.requires_grad for p in module.head.parameters()} == {True}
    np.testing.assert_array_equal(fitted.predict_proba(paths[:4]), before)


def test_saliency_of_a_regressor_and_of_several_labels(tiles):
    _, paths, labels = tiles
    y = (labels == "flower").astype(float)
    model = FineTunedRegressor(Backbone(small(), SIZE), max_epochs=1, random_state=0).fit(paths, y)
    display = SaliencyDisplay.from_estimator(model, paths[:2])
    assert titles(display) == [f"{value:.3g}" for value in model.predict(paths[:2])]
    several = classifier().fit(paths, np.c_[y, 1 - y].astype(int))
    display = SaliencyDisplay.from_estimator(several, paths[:2], targets=[1, 0])
    proba = several.predict_proba(paths[:2])
    assert titles(display) == [f"1 ({proba[0, 1]:.2f})", f"0 ({proba[1, 0]:.2f})"]


def test_saliency_of_bad_input(tiles, fitted, linear):
    _, paths, _ = tiles
    with pytest.raises(TypeError, match="needs gradients.*got Pipeline"):
        SaliencyDisplay.from_estimator(linear, paths[:1])
    with pytest.raises(ValueError, match="targets holds tulip"):
        SaliencyDisplay.from_estimator(fitted, paths[:1], targets=["tulip"])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        SaliencyDisplay.from_estimator(fitted, paths[:1], targets=["china", "china"])
    with pytest.raises(ValueError, match="No block is called 'bodi'"):
        SaliencyDisplay.from_estimator(fitted, paths[:1], layer="bodi")
    layers = [nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 8), nn.ReLU()]
    late = PretrainedClassifier(Backbone(nn.Sequential(*layers, nn.Linear(8, 3)), SIZE))
    with pytest.raises(ValueError, match="layer='3' has an output of shape .8,., without position"):
        SaliencyDisplay.from_estimator(late, paths[:1], layer="3")
    flat = PretrainedClassifier(Backbone(nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)), SIZE))
    with pytest.raises(ValueError, match="No block|has an output with positions"):
        SaliencyDisplay.from_estimator(flat, paths[:1])
    free = PretrainedClassifier(Backbone(Untraceable(), SIZE))
    with pytest.raises(ValueError, match="Untraceable cannot be cut into blocks"):
        SaliencyDisplay.from_estimator(free, paths[:1])
    with pytest.raises(ValueError, match="not fitted"):
        SaliencyDisplay.from_estimator(classifier(), paths[:1])


# ------------------------------------------------------------------------------ anomalies


def anomalies(**options):
    return PatchAnomalyDetector(Backbone(small(), SIZE), random_state=0, **options)


def test_anomaly_maps_have_one_scale_and_say_what_is_an_anomaly(tiles):
    _, paths, _ = tiles
    model = anomalies(contamination=0.5).fit(paths)
    X = paths[::5]
    display = AnomalyMapDisplay.from_estimator(model, X)
    np.testing.assert_array_equal(display.maps, model.anomaly_map(X))
    scores, are = model.score_samples(X), model.predict(X)
    assert set(are) == {1, -1}
    words = [
        f"{'anomaly, ' if a < 0 else ''}score {s:.2f}" for a, s in zip(are, scores, strict=True)
    ]
    assert titles(display) == words
    limits = {axes.images[1].get_clim() for axes in display.axes_}
    assert limits == {(-model.offset_ / 2, -model.offset_ * 1.5)}
    again = AnomalyMapDisplay(display.images, display.maps).plot(n_cols=1, vmin=0)
    assert again.axes_[0].images[1].get_clim() == (0, display.maps.max())
    assert titles(again) == [""] * 8


def test_anomaly_maps_show_the_crop_in_the_whole(photos):
    size = Preprocessing(size=(32, 32), resize=(40, 40))
    model = PatchAnomalyDetector(Backbone(small(), size), random_state=0)
    model.fit([photos[0], photos[1], photos[0][:300]])
    display = AnomalyMapDisplay.from_estimator(model.set_params(image_size=16), photos)
    assert display.images.shape == (2, 32, 32, 3) and display.maps.shape == (2, 32, 32)
    assert np.ptp(display.axes_[0].get_xlim()) == 59 and display.surroundings[0][1] == (4, 14)


def test_anomaly_maps_of_what_has_none(tiles, linear):
    with pytest.raises(TypeError, match="Pipeline has no anomaly_map: pass a fitted"):
        AnomalyMapDisplay.from_estimator(linear, tiles[1][:1])
    with pytest.raises(ValueError, match="not fitted"):
        AnomalyMapDisplay.from_estimator(anomalies(), tiles[1][:1])


def test_a_rejection_curve_is_counted_by_hand():
    y_true = ["a", "b", "c", "a", "b"]
    y_pred = ["a", "b", "a", "b", "b"]
    confidence = [0.9, 0.8, 0.3, 0.8, 0.5]
    display = RejectionCurveDisplay.from_predictions(y_true, y_pred, confidence, name="words")
    np.testing.assert_allclose(display.rejected, [0, 0.2, 0.4, 0.8])
    np.testing.assert_allclose(display.errors, [2 / 5, 1 / 4, 1 / 3, 0])  # equal ones go together
    np.testing.assert_allclose(display.thresholds, [0.3, 0.5, 0.8, 0.9])
    assert display.area == pytest.approx(0.2 * 2 / 5 + 0.2 / 4 + 0.4 / 3)
    assert display.ax_.get_legend().get_texts()[0].get_text() == "words, mean 0.263"
    again = RejectionCurveDisplay.from_predictions(y_true, y_pred, np.ones(5), ax=display.ax_)
    assert again.ax_ is display.ax_ and again.errors.tolist() == [0.4]
    assert len(display.ax_.lines) == 2


def test_a_rejection_curve_of_a_classifier(tiles, fitted, linear):
    _, paths, labels = tiles
    y = np.where(np.arange(40) % 5 == 0, "tulip", labels)  # which it does not know
    for model in (fitted, linear):
        display = RejectionCurveDisplay.from_estimator(model, paths, y)
        assert display.errors[0] == np.mean(model.predict(paths) != y)
        assert display.name == type(model).__name__ and display.rejected[0] == 0
    given = RejectionCurveDisplay.from_estimator(
        linear, paths, y, confidence=(y != "tulip").astype(float), color="red"
    )
    assert given.rejected.tolist() == [0, pytest.approx(0.2)] and given.line_.get_color() == "red"


def test_rejection_curves_of_bad_input(tiles, linear):
    _, paths, labels = tiles
    curve = RejectionCurveDisplay.from_predictions
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        curve(["a", "b"], ["a", "b"], [0.1])
    with pytest.raises(ValueError, match="confidence contains NaN"):
        curve(["a", "b"], ["a", "b"], [0.1, np.nan])
    with pytest.raises(ValueError, match="0 sample"):
        curve([], [], [])
    with pytest.raises(ValueError, match="1d array|should be a 1d"):
        curve(["a", "b"], ["a", "b"], np.eye(2))
    with pytest.raises(ValueError, match="NaN, None"):
        curve(["a", None], ["a", "b"], [1, 2])
    svm = make_pipeline(PretrainedFeatureExtractor(Backbone(small(), SIZE)), SVC())
    with pytest.raises(TypeError, match="Pipeline has no predict_proba: pass confidence"):
        RejectionCurveDisplay.from_estimator(svm.fit(paths, labels), paths, labels)


# ------------------------------------------------------------------------------ axes, packages


def test_displays_draw_into_given_axes(tiles, fitted, linear):
    _, paths, labels = tiles
    figure, axes = plt.subplots(2, 4, figsize=(16, 7))
    displays = [
        HistoryDisplay.from_estimator(fitted, ax=axes[0, 0]),
        EmbeddingDisplay.from_estimator(linear, paths, labels, ax=axes[0, 1]),
        TopLossesDisplay.from_estimator(linear, paths, labels, n_images=4, ax=axes[0, 2]),
        SaliencyDisplay.from_estimator(fitted, paths[:3], ax=axes[1, 0], n_cols=1),
        PrototypeDisplay.from_estimator(linear, paths[:2], paths, labels, ax=axes[1, 1]),
        TransferGainDisplay(["a"], [0.1], [(0, 0.2)]).plot(axes[1, 2], score_name="accuracy"),
        AnomalyMapDisplay.from_estimator(anomalies().fit(paths), paths[:2], ax=axes[0, 3]),
        RejectionCurveDisplay.from_estimator(linear, paths, labels, ax=axes[1, 3]),
    ]
    places = [*axes[0, :3], *axes[1, :3], *axes[:, 3]]
    for display, ax in zip(displays, places, strict=True):
        assert display.ax_ is ax and display.figure_ is figure
    assert len(plt.get_fignums()) == 1
    with pytest.raises(ValueError, match="ax must be a subplot"):
        displays[2].plot(figure.add_axes((0, 0, 1, 1)))


def test_without_grad_cam(monkeypatch, tiles, fitted):
    _, paths, _ = tiles
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(ImportError, match=r"needs pytorch_grad_cam: pip install '\.\[insp"):
        SaliencyDisplay.from_estimator(fitted, paths[:1])
