import pickle
import re
import signal

import numpy as np
import pytest
import skops.io
import torch
import xxhash
from networks import Untraceable, small
from sklearn.base import clone
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from skorch.callbacks import Callback
from torch import nn

from sktransfer import FineTunedClassifier, FineTunedRegressor, register_model
from sktransfer._training.depth_search import _candidates, _choose
from sktransfer.io import check_images
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))


class Deep(nn.Module):
    """Ten blocks; the last of them is blind to red, so that only training it finds red."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 4, 4)
        self.body = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(9)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(3, 2)
        for module in (self.stem, *self.body):
            nn.init.dirac_(module.weight)
            nn.init.zeros_(module.bias)
        nn.init.zeros_(self.body[-1].weight[:, 0])

    def forward(self, x):
        return self.head(self.pool(self.body(self.stem(x))).flatten(1))


def compact():
    """The counted network, its activations smaller than the image: all are worth keeping."""
    network = small()
    network.stem[0] = nn.Conv2d(3, 8, 7, 4, 3)
    nn.init.normal_(network.stem[0].weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return Backbone(network, SIZE)


@pytest.fixture(autouse=True, scope="module")
def _models():
    with torch.no_grad():
        deep = Deep()
    register_model("small", lambda weights: Backbone(small(), SIZE))
    register_model("deep", lambda weights: Backbone(deep, SIZE))


def classifier(**options):
    defaults = {"unfreeze": "auto", "max_epochs": 3, "batch_size": 8, "random_state": 0}
    return FineTunedClassifier(options.pop("backbone", "small"), **{**defaults, **options})


def pictures(n=24, n_classes=2, channels=slice(None), step=60):
    """Noise, in some channels the brighter, the higher the number of its class."""
    y = np.arange(n) % n_classes
    X = np.random.default_rng(0).integers(0, 120, (n, 32, 32, 3))
    X[..., channels] += (y * step // (n_classes - 1))[:, None, None, None]
    return X.astype(np.uint8), y


# ------------------------------------------------------------------------------ what is chosen


@pytest.fixture(scope="module")
def found_easy(_models):
    """Images that any depth tells apart, and a search on them."""
    X, y = pictures(step=120)
    return X, y, classifier().fit(X, y)


def test_depths_that_are_as_good_go_to_the_shallowest(found_easy):
    *_, model = found_easy
    found = model.depth_search_
    assert found["cv_results_"]["mean_test_score"].min() == 1
    assert found["unfreeze"] == found["best"] == 0 and model.unfrozen_block_names_ == []


@pytest.fixture(scope="module")
def found_deep(_models):
    """Images of which only red tells, and a search on them."""
    X, y = pictures(36, channels=[0])
    options = {"backbone": "deep", "lr": 0.05, "max_epochs": 6, "callbacks": [Counting()]}
    Counting.calls = 0
    return X, y, options, classifier(**options).fit(X, y)


class Counting(Callback):
    calls = 0

    def on_train_begin(self, net, **_):
        Counting.calls += 1


def test_a_depth_that_is_needed_is_found(found_deep):
    X, y, _, model = found_deep
    assert Counting.calls == 1  # callbacks are for the last fit
    found = model.depth_search_
    assert found["unfreeze"] >= 1
    assert len(model.unfrozen_block_names_) == found["unfreeze"]
    results = found["cv_results_"]
    frozen = results["mean_test_score"][results["param_unfreeze"] == 0].max()
    assert frozen < found["threshold"] <= results["mean_test_score"].max()
    assert model.score(X, y) > 0.9


def test_it_is_a_fit_at_the_depth_found(found_deep):
    X, y, options, model = found_deep
    plain = classifier(**options, unfreeze=model.depth_search_["unfreeze"]).fit(X, y)
    assert np.array_equal(model.predict_proba(X), plain.predict_proba(X))
    assert model.history_[0]["train_loss"] == plain.history_[0]["train_loss"]


def test_candidates_and_rounds(found_deep):
    found = found_deep[-1].depth_search_
    # Eight of ten blocks have less than two thirds of the operations, as the stem is large.
    assert found["depths"].tolist() == [0, 1, 2, 4, 8]
    assert found["shares"][0] == 0 and (np.diff(found["shares"]) > 0).all()
    results = found["cv_results_"]
    assert results["iter"].tolist() == [0] * 5 + [1] * 2
    assert results["param_max_epochs"].tolist() == [2] * 5 + [6] * 2
    assert sorted(results["param_unfreeze"][:5]) == [0, 1, 2, 4, 8]
    assert len([name for name in results if name.startswith("split")]) == 3


@pytest.mark.parametrize("max_epochs", [1, 2])
def test_few_epochs_leave_one_round(max_epochs):
    X, y = pictures(12)
    found = classifier(max_epochs=max_epochs).fit(X, y).depth_search_
    assert found["cv_results_"]["param_max_epochs"].tolist() == [max_epochs] * 3


def test_candidates_of_the_embedded_network():
    depths, shares = _candidates(FineTunedClassifier(unfreeze="auto"))
    assert depths.tolist() == [0, 1, 2, 4, 8]
    assert 0.4 < shares[-1] < 2 / 3


def results_of(*rows):
    """Results as the search has them, of rows (round, depth, score of each fold)."""
    rounds, depths, scores = zip(*rows, strict=True)
    scores = np.array(scores, float)
    splits = {f"split{k}_test_score": scores[:, k] for k in range(scores.shape[1])}
    means = {"mean_test_score": scores.mean(axis=1)}
    return {"iter": np.array(rounds), "param_unfreeze": np.array(depths), **splits, **means}


def test_one_standard_error_by_hand():
    # Three folds of variances 0.01 and 0.03, so one error is sqrt(0.02 / 3) = 0.0816.
    wide, narrow = np.array([-0.2, 0.1, 0.1]), np.array([-0.1, 0, 0.1])
    rows = [(0, 1, [0.99] * 3), (1, 4, 0.8 + wide), (1, 2, 0.72 + narrow)]
    found = _choose(results_of(*rows), takes_epochs=True)
    assert (found["unfreeze"], found["best"]) == (2, 4)
    assert found["threshold"] == pytest.approx(0.8 - np.sqrt(0.02 / 3))
    rows[2] = (1, 2, 0.71 + narrow)
    assert _choose(results_of(*rows), takes_epochs=True)["unfreeze"] == 4


def test_a_head_that_is_solved_for_takes_part_to_the_end():
    rows = [(0, 0, [0.79, 0.8, 0.81]), (1, 4, [0.79, 0.8, 0.82]), (1, 2, [0.5, 0.5, 0.5])]
    assert _choose(results_of(*rows), takes_epochs=False)["unfreeze"] == 0
    assert _choose(results_of(*rows), takes_epochs=True)["unfreeze"] == 4


# ------------------------------------------------------------------------------ images run once


def without_blank(digests):
    """Leave out the blank image by which blocks are timed."""
    blank = SIZE.normalize(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0]
    return [d for d in digests if d != xxhash.xxh3_64_hexdigest(blank.contiguous().numpy())]


@pytest.mark.parametrize("with_memory, n_runs", [(True, 1), (False, 2)])
def test_frozen_blocks_run_once_an_image(tiles, tmp_path, run_log, with_memory, n_runs):
    _, paths, labels = tiles
    model = classifier(backbone=compact(), memory=tmp_path if with_memory else None)
    model.fit(paths[::2], labels[::2])
    runs = without_blank(run_log())
    assert len(set(runs)) == 20
    assert len(runs) == n_runs * 20  # without a memory, the search has one of its own


# ------------------------------------------------------------------------------ repeatable


def test_seed_and_order_of_rows():
    X, y = pictures(36, step=12)
    options = {"dropout": 0.2, "augment": "flip", "max_epochs": 1}
    model = classifier(**options)
    expected = model.fit(X, y).depth_search_
    order = np.random.default_rng(1).permutation(36)
    again = clone(model).fit(X[order], y[order])
    for name, values in expected["cv_results_"].items():
        if not name.endswith("_time"):
            assert np.array_equal(again.depth_search_["cv_results_"][name], values)
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    other = classifier(**{**options, "random_state": 1}).fit(X, y).depth_search_
    scores = [r["cv_results_"]["split0_test_score"] for r in (expected, other)]
    assert not np.array_equal(*scores)


def test_copies(found_easy):
    X, _, model = found_easy
    data = skops.io.dumps(model)
    unknown = skops.io.get_untrusted_types(data=data)
    assert all(name.startswith("sktransfer.") for name in unknown)
    for copy in (pickle.loads(pickle.dumps(model)), skops.io.loads(data, trusted=unknown)):
        assert np.array_equal(copy.predict_proba(X), model.predict_proba(X))
        assert copy.depth_search_["unfreeze"] == 0
        assert copy.depth_search_["cv_results_"]["params"] == [
            {"unfreeze": depth, "max_epochs": 3} for depth in (2, 1, 0)
        ]
    assert not hasattr(clone(model), "depth_search_") and clone(model).unfreeze == "auto"


def test_another_fit_forgets_the_search(found_easy):
    X, y, model = found_easy
    model = pickle.loads(pickle.dumps(model)).set_params(unfreeze=1).fit(X, y)
    assert not hasattr(model, "depth_search_") and model.unfrozen_block_names_ == ["body.1"]


def test_going_on_keeps_the_depth(found_easy):
    X, y, model = found_easy
    model = pickle.loads(pickle.dumps(model)).set_params(warm_start=True)
    found = model.depth_search_
    assert model.fit(X, y).depth_search_ is found
    assert model.partial_fit(X, y).depth_search_ is found


# ------------------------------------------------------------------------------ in scikit-learn


def test_inside_cross_validation_and_a_grid(tmp_path):
    X, y = pictures(step=120)
    model = classifier(max_epochs=1, memory=tmp_path)
    search = GridSearchCV(model, {"unfreeze": ["auto", 1]}, cv=2)
    search.set_params(error_score="raise").fit(X, np.array(["b", "a"])[y])
    scores = [search.cv_results_[f"split{i}_test_score"][0] for i in range(2)]
    assert search.best_params_ == {"unfreeze": "auto"} and scores == [1, 1]
    assert search.best_estimator_.depth_search_["unfreeze"] == 0


@pytest.mark.parametrize("kind", ["class_weight", "sample_weight"])
def test_weights_weigh_the_score(kind):
    X, y = pictures(36, step=6)
    rows = np.flatnonzero((y == 0) | (np.arange(36) % 3 == 0))  # three times as many of class 0
    digests = check_images(X).digests(1)
    rows = np.array(sorted(rows, key=digests.__getitem__))  # the order of the search
    X, y = X[rows], y[rows]
    each = len(y) / (2 * np.bincount(y)[y])  # of class_weight="balanced"
    if kind == "class_weight":
        model = classifier(max_epochs=1, class_weight="balanced").fit(X, y)
    else:
        model = classifier(max_epochs=1).fit(X, y, each)
    results = model.depth_search_["cv_results_"]
    seed = np.random.RandomState(0).randint(2**31 - 1)
    folds = StratifiedKFold(3, shuffle=True, random_state=seed).split(X, y)
    for k, (train, test) in enumerate(folds):
        for column, depth in enumerate(results["param_unfreeze"]):
            plain = classifier(unfreeze=int(depth), max_epochs=1, random_state=seed)
            predicted = plain.fit(X[train], y[train], each[train]).predict(X[test])
            # Weights are those of balanced classes, and so is the accuracy.
            expected = balanced_accuracy_score(y[test], predicted)
            assert results[f"split{k}_test_score"][column] == pytest.approx(expected)


def test_flat_rows_are_searched_as_images_are():
    X, y = pictures(12, step=20)
    options = {"max_epochs": 1}
    expected = classifier(**options).fit(X, y)
    flat = classifier(**options, image_shape=(32, 32, 3)).fit(X.reshape(12, -1), y)
    scores = [m.depth_search_["cv_results_"]["mean_test_score"] for m in (expected, flat)]
    assert np.array_equal(*scores)
    assert np.array_equal(flat.predict_proba(X.reshape(12, -1)), expected.predict_proba(X))


def test_several_labels_an_image():
    X, y = pictures(24, 4, step=180)
    Y = np.stack([y % 2, y // 2], axis=1)
    model = classifier(backbone="small").fit(X, Y)
    assert model.depth_search_["cv_results_"]["mean_test_score"].shape == (3,)
    assert model.predict(X).shape == (24, 2)


@pytest.mark.parametrize("n_outputs", [1, 2])
def test_values(n_outputs):
    X, y = pictures(24, 4, step=180)
    Y = 100.0 + 10 * np.stack([y, -y][:n_outputs], axis=1)
    Y = Y[:, 0] if n_outputs == 1 else Y
    model = FineTunedRegressor("small", unfreeze="auto", max_epochs=3, random_state=0).fit(X, Y)
    assert model.depth_search_["cv_results_"]["mean_test_score"].max() > 0.2  # of R²
    assert model.predict(X).shape == Y.shape


def test_it_says_what_it_took(capsys):
    X, y = pictures(step=120)
    classifier(verbose=1).fit(X, y)
    assert "unfreeze='auto' took 0 of 0, 1, 2" in capsys.readouterr().out


# ------------------------------------------------------------------------------ bad input


def test_a_class_of_one_image_falls_back_to_the_head():
    X, y = pictures(12, step=120)
    y[0] = 2
    with pytest.warns(UserWarning, match="can't compare depths on 12 images, of a class of which"):
        model = classifier().fit(X, y)
    assert model.depth_search_["unfreeze"] == 0 and model.unfrozen_block_names_ == []
    assert len(pickle.loads(pickle.dumps(model)).predict(X)) == 12


def test_two_images_of_a_class_make_two_folds():
    X, y = pictures(4, step=120)
    results = classifier().fit(X, y).depth_search_["cv_results_"]
    assert len([name for name in results if name.startswith("split")]) == 2


def test_three_values_are_too_few():
    X, y = pictures(3, 3)
    with pytest.warns(UserWarning, match="can't compare depths on 3 images: the head alone"):
        FineTunedRegressor("small", unfreeze="auto", random_state=0).fit(X, y)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weights": None}, "weights=None has none: pass unfreeze='all'"),
        ({"max_epochs": 0}, "max_epochs=0 trains nothing"),
        ({"backbone": Backbone(Untraceable(), SIZE)}, "can't be traced: pass unfreeze=0 or 'all'"),
    ],
)
def test_nothing_to_search_over(options, message):
    with pytest.raises(ValueError, match=message):
        classifier(**options).fit(*pictures())


def test_parts_are_too_few():
    with pytest.raises(ValueError, match="on a part of the images: call fit first"):
        classifier().partial_fit(*pictures(), classes=[0, 1])
    with pytest.raises(ValueError, match="on a part of the images"):
        FineTunedRegressor("small", unfreeze="auto").partial_fit(*pictures())


def test_a_bad_image_is_named():
    X, y = pictures()
    X = [*X[:-1], np.zeros((2, 2, 7), np.uint8)]
    with pytest.raises(ValueError, match="row 23"):
        classifier().fit(X, y)


class PressingHead(nn.Linear):
    """A head in whose third batch somebody presses Ctrl-C."""

    n_calls = 0

    def forward(self, x):
        if self.training:
            self.n_calls += 1
            if self.n_calls == 3:
                signal.raise_signal(signal.SIGINT)
        return super().forward(x)


def test_ctrl_c_in_the_search(tmp_path):
    model = classifier(head=PressingHead(16, 2), memory=tmp_path)
    with pytest.raises(KeyboardInterrupt, match="searched for the depth.*lies in the memory"):
        model.fit(*pictures())
    assert not hasattr(model, "depth_search_")


def test_the_model_is_left_as_it_is():
    X, y = pictures(12)
    model = classifier(class_weight="balanced", callbacks=[], verbose=0)
    before = model.get_params()
    model.fit(X, y)
    assert model.get_params() == before


def test_a_bar_counts_the_fits_of_a_search(tiles, capfd):
    _, paths, labels = tiles
    model = FineTunedClassifier(small(), unfreeze="auto", max_epochs=1, image_size=32, verbose=1)
    model.fit(paths[10:30], labels[10:30])
    shown = capfd.readouterr().err
    n_fits = 3 * len(model.depth_search_["depths"])
    assert re.search(rf"searching the depth: 100%.* {n_fits}/{n_fits} ", shown)
