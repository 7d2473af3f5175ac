import pickle
import signal

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from networks import Untraceable, small
from processes import run_code
from scipy.sparse import csr_array, issparse
from sklearn.exceptions import NotFittedError
from skorch.callbacks import Callback
from torch import nn
from torchvision.transforms import v2

from sktransfer import FineTunedClassifier, FineTunedRegressor, get_model, register_model
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))


@pytest.fixture(autouse=True, scope="module")
def _models():
    register_model("small", lambda weights: Backbone(small(), SIZE))


def classifier(**options):
    defaults = {"max_epochs": 3, "batch_size": 8, "random_state": 0}
    return FineTunedClassifier(options.pop("backbone", "small"), **{**defaults, **options})


def regressor(**options):
    return FineTunedRegressor("small", **{"max_epochs": 3, "random_state": 0, **options})


def pictures(n=12):
    """Noise, of which the images of odd numbers are brighter."""
    y = np.arange(n) % 2
    X = np.random.default_rng(0).integers(0, 120, (n, 32, 32, 3)) + 120 * y[:, None, None, None]
    return X.astype(np.uint8), y


def refuses(model, y, message, error=ValueError, X=None, method="fit", **options):
    X = pictures(np.shape(y)[0] if issparse(y) else len(y))[0] if X is None else X
    with pytest.raises(error, match=message):
        getattr(model, method)(X, y, **options)


# ------------------------------------------------------------------------------ targets


def test_one_class():
    refuses(classifier(), ["cat"] * 5, "at least 2 classes and got 1 class: all 5 .* 'cat'")


def test_only_one_class_has_weight():
    X, y = pictures()
    refuses(classifier(), y, "at least 2 classes.*1 class", X=X, sample_weight=y.astype(float))


def test_no_weight_at_all():
    _, y = pictures()
    refuses(classifier(), y, "(?i)sample.weight.*zero", sample_weight=np.zeros(12))


def test_a_class_too_small_to_hold_out():
    y = ["cat"] + ["dog"] * 11
    message = (
        r"early_stopping=True .*validation_fraction=0\.1 .*needs 2 .*: 'cat' has 1 image\. Add"
    )
    refuses(classifier(early_stopping=True), y, message)
    two = ["cat", "cat"] + ["dog"] * 10  # one of them in the half that a search would fit on
    model = classifier(early_stopping=True, unfreeze="auto")
    refuses(model, two, r"needs 3 of them: 'cat' has 2 images")
    assert classifier(unfreeze=0).fit(pictures()[0], y).classes_.tolist() == ["cat", "dog"]


MISSING = {
    "float": np.array([0, 1, np.nan, 1]),
    "object": np.array(["a", "b", np.nan, "b"], object),
    "list": ["a", "b", None, "b"],
    "NaN in a list": ["a", "b", float("nan"), "b"],
    "Int64": pd.Series([0, 1, None, 1], dtype="Int64"),
    "boolean": pd.Series([True, False, None, True], dtype="boolean"),
    "string": pd.Series(["a", "b", None, "b"], dtype="string"),
    "category": pd.Series(["a", "b", None, "b"], dtype="category"),
    "NA": np.array(["a", "b", pd.NA, "b"], object),
    "NaT": np.array(["2020-01-01", "2021-01-01", "NaT", "2021-01-01"], "M8[D]"),
    "polars": pl.Series(["a", "b", None, "b"]),
    "polars integers": pl.Series([0, 1, None, 1]),
    "polars booleans": pl.Series([True, False, None, True]),
    "a table": [[0, 1], [1, 1], [None, 0], [1, 0]],
}


@pytest.mark.parametrize("y", MISSING.values(), ids=MISSING)
def test_missing_labels(y):
    message = r"NaN, None, NA or masked values in 1 of 4 rows \(2\)\. Leave these images out"
    refuses(classifier(), y, message)
    if not isinstance(y, pd.Series) or y.dtype == "Int64":
        refuses(regressor(), y, message)


def test_only_the_first_rows_without_labels_are_named():
    refuses(classifier(), ["a"] + [None] * 9, r"in 9 of 10 rows \(1, 2, 3, 4, 5, \.\.\.\)")
    model = classifier(max_epochs=1).fit(*pictures(4))
    for use in (model.score, model.partial_fit):
        with pytest.raises(ValueError, match=r"in 1 of 4 rows \(3\)"):
            use(pictures(4)[0], [0, 1, 0, None])


@pytest.mark.parametrize(
    "y, message",
    [
        ([["a", "b"], ["a"], ["b"], []], r"y\[0\] is \['a', 'b'\].*MultiLabelBinarizer"),
        ([{"a"}, {"b"}, {"a"}, {"b"}], r"y\[0\] is \{'a'\}, a set.*MultiLabelBinarizer"),
        ([("a", "b"), ("a", "c")] * 2, "2 columns.*MultiLabelBinarizer"),
        (csr_array(np.eye(4, 2, dtype=int)), r"sparse csr_array: pass y.toarray\(\)"),
        ([[0.3, 0.7]] * 4, r"Soft labels are not taken.*y.argmax\(1\).*sample_weight"),
        (
            ["1", 1, "1", 1],
            r"mixes types: y\[0\] is '1', y\[1\] is 1.*str\(label\)",
        ),
        (np.array([True, "a"] * 2, object), r"mixes types: y\[0\] is True, y\[1\] is 'a'"),
        ([pd.Timestamp(2020, 1, 1)] * 4, "Unknown label type: .*type Timestamp; pass strings"),
    ],
    ids=["lists", "sets", "even tuples", "sparse", "soft", "mixed", "mixed objects", "dates"],
)
def test_what_is_no_label(y, message):
    refuses(classifier(), y, message)


def test_missing_and_infinite_values():
    refuses(regressor(), [0.5, 1.0, np.nan], "y contains NaN")
    refuses(regressor(), [0.5, 1.0, np.inf], "y contains infinity")


@pytest.mark.parametrize("model", [classifier, regressor])
def test_lengths_differ(model):
    X, y = pictures()
    refuses(model(), y[:-2], r"inconsistent numbers of samples.*\[12, 10\]", X=X)
    refuses(model(), y, "sample_weight", X=X, sample_weight=np.ones(3))


@pytest.mark.parametrize("model", [classifier, regressor])
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_no_targets(model, method):
    options = {"classes": [0, 1]} if method == "partial_fit" and model is classifier else {}
    with pytest.raises(ValueError, match="requires y"):
        getattr(model(), method)(pictures()[0], None, **options)


def test_a_table_that_is_no_indicator():
    y = np.arange(24).reshape(12, 2) % 3
    refuses(classifier(), y, "(?i)multiclass-multioutput|2 columns.*indicator matrix")


def test_numbers_that_are_no_classes():
    refuses(classifier(), np.linspace(0, 1, 12), "(?i)unknown label type.*continuous")
    refuses(regressor(), ["a", "b"], "(?i)could not convert|dtype")


def test_negative_weights():
    _, y = pictures()
    refuses(classifier(), y, "(?i)negative", sample_weight=np.linspace(-1, 1, 12))


# ------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"unfreeze": 4}, ValueError, "unfreeze=4.*3 blocks: stem, body.0, body.1"),
        ({"unfreeze": -1}, ValueError, "unfreeze=-1.*3 blocks: stem, body.0, body.1"),
        ({"unfreeze": True}, ValueError, "unfreeze=True.*Pass 0 to 3"),
        ({"unfreeze": "steem"}, ValueError, "'steem'.*'stem'.*stem, body.0, body.1"),
        ({"unfreeze": ["body.0", "tail"]}, ValueError, "'tail'.*stem, body.0, body.1"),
        ({"unfreeze": [0, 1]}, TypeError, r"unfreeze=\[0, 1\].*names of blocks"),
        ({"unfreeze": 1.0}, ValueError, "'unfreeze' parameter"),
        ({"unfreeze": None}, ValueError, "'unfreeze' parameter"),
        ({"backbone": Untraceable(), "unfreeze": 1}, ValueError, "no blocks.*traced"),
        ({"backbone": Untraceable(), "unfreeze": "conv"}, ValueError, "(?i)untraceable"),
        ({"n_views": 3, "augment": "flip"}, ValueError, "n_views=3.*'flip' has 2 views"),
        ({"n_views": 2}, ValueError, "n_views=2.*None has 1 view"),
        ({"predict_views": 3, "augment": "flip"}, ValueError, "predict_views=3.*'flip' has\n? ?2"),
        ({"predict_views": 2}, ValueError, "predict_views=2.*None has\n? ?1 view"),
        (
            {"augment": "dihedral", "n_views": 8, "image_size": (32, 48)},
            ValueError,
            "n_views=8.*4 views.*32 × 48",
        ),
        ({"augment": "rotate"}, ValueError, "'augment' parameter"),
        ({"head": nn.Linear(16, 3)}, ValueError, "2 outputs.*"),
        ({"head": nn.Linear(15, 2)}, ValueError, r"embeddings of 16 features.*nn.Linear\(16"),
        ({"head": nn.Flatten(0)}, ValueError, "row of 2 outputs"),
        ({"head": "mlp"}, ValueError, "'head' parameter"),
        ({"dropout": 1.0}, ValueError, "'dropout' parameter"),
        ({"lr": -1.0}, ValueError, "'lr' parameter"),
        ({"head_epochs": -1}, ValueError, "'head_epochs' parameter"),
        ({"max_epochs": -1}, ValueError, "'max_epochs' parameter"),
        ({"precision": "float16"}, ValueError, "'precision' parameter"),
        ({"class_weight": "even"}, ValueError, "'class_weight' parameter"),
        ({"callbacks": 3}, ValueError, "'callbacks' parameter"),
        ({"pooling": "mean"}, ValueError, "'pooling' parameter"),
    ],
)
def test_bad_parameters(options, error, message):
    X, y = pictures()
    model = classifier(**{"image_size": 32, **options})
    with pytest.raises(error, match=message):
        model.fit(X, y)
    with pytest.raises(NotFittedError):
        model.predict(X)


@pytest.mark.parametrize("sizes", [(0,), (-3,), (8, 0), ("8",), (2.5,)])
def test_sizes_of_hidden_layers(sizes):
    _, y = pictures()
    refuses(classifier(head=sizes), y, "head", (ValueError, TypeError))


@pytest.mark.parametrize("unfreeze", [1, "all"])
@pytest.mark.parametrize(
    "augment, message",
    [
        (v2.ToDtype(torch.float32, scale=True), "augment must return uint8.*torch.float32"),
        (v2.CenterCrop(20), r"augment must return a tensor of the shape.*\(3, 20, 20\)"),
        (v2.ToPILImage(), "augment must return a tensor"),
    ],
)
def test_augmentations_that_return_something_else(augment, message, unfreeze):
    _, y = pictures()
    refuses(classifier(augment=augment, unfreeze=unfreeze), y, message)


# ------------------------------------------------------------------------------ predicting


@pytest.mark.parametrize("model", [classifier, regressor])
def test_predicting_before_fitting(model):
    X, _ = pictures()
    for method in ("predict", "predict_proba", "decision_function"):
        if hasattr(model(), method):
            with pytest.raises(NotFittedError):
                getattr(model(), method)(X)
    with pytest.raises(NotFittedError):
        model().to_feature_extractor()
    with pytest.raises(NotFittedError):
        _ = model().net_


def test_flat_rows_of_another_width():
    model = classifier(image_shape=(8, 8), image_size=16).fit(np.zeros((4, 64)), [0, 1, 0, 1])
    with pytest.raises(ValueError, match="63 features.*expecting 64 features"):
        model.predict(np.zeros((3, 63)))


def test_more_views_than_there_are_when_predicting():
    X, y = pictures()
    model = classifier().fit(X, y).set_params(predict_views=2)
    with pytest.raises(ValueError, match="predict_views=2"):
        model.predict(X)
    assert model.set_params(predict_views=1).predict(X).shape == (12,)


def test_a_pickle_of_a_network_whose_weights_have_changed():
    X, y = pictures()
    data = pickle.dumps(classifier().fit(X, y))
    old = get_model("small").fingerprint
    try:
        register_model("small", lambda weights: Backbone(small(seed=1), SIZE))
        new = get_model("small").fingerprint
        model = pickle.loads(data)
        for use in (lambda: model.predict(X), lambda: model.partial_fit(X, y)):
            with pytest.raises(ValueError, match=f"(?s)'small'.*{new[:8]}.*{old[:8]}"):
                use()
    finally:
        register_model("small", lambda weights: Backbone(small(), SIZE))
    assert pickle.loads(data).predict(X).shape == (12,)


# ------------------------------------------------------------------------------ going on


def test_classes_of_parts():
    X, y = pictures()
    refuses(classifier(), y, "classes must be passed on the first call", X=X, method="partial_fit")
    model = classifier().partial_fit(X, y, classes=[0, 1])
    refuses(model, y + 1, r"\[2\].*not announced.*\[0, 1\]", X=X, method="partial_fit")
    refuses(model, y, r"classes=\[0, 1, 2\]", X=X, method="partial_fit", classes=[0, 1, 2])
    assert model.partial_fit(X, y).n_iter_ == 2  # as if nothing had been


def test_unannounced_classes_in_the_first_part():
    X, y = pictures()
    model = classifier()
    refuses(model, y + 1, r"\[2\].*not announced", X=X, method="partial_fit", classes=[0, 1])
    assert model.partial_fit(X, y + 1, classes=[1, 2]).classes_.tolist() == [1, 2]


def test_balanced_weights_of_parts():
    _, y = pictures()
    model = classifier(class_weight="balanced")
    refuses(model, y, "class_weight='balanced'.*as a dict", method="partial_fit", classes=[0, 1])


def test_unknown_classes_in_a_warm_start():
    X, y = pictures()
    model = classifier(warm_start=True).fit(X, y)
    refuses(model, y + 1, r"\[2\].*\[0, 1\]", X=X)
    assert model.classes_.tolist() == [0, 1]
    assert model.predict(X).shape == (12,)


def test_another_number_of_outputs_in_a_warm_start():
    X, y = pictures()
    table = np.column_stack([y, 1 - y])
    model = regressor(warm_start=True).fit(X, y)
    refuses(model, table, "2 columns.*with 1", X=X)
    assert model.predict(X).shape == (12,)
    model = classifier(warm_start=True).fit(X, y)
    refuses(model, table, "label|columns|indicator", X=X)
    model = classifier(warm_start=True).fit(X, table)
    refuses(model, y, "label|columns|indicator", X=X)
    refuses(model, np.hstack([table, table]), "label|columns|indicator", X=X)


# ------------------------------------------------------------------------------ training


class Raise(Callback):
    def __init__(self, error):
        self.error = error

    def on_epoch_end(self, net, **kwargs):
        raise self.error


def test_an_error_of_a_callback_is_the_error_of_fit():
    X, y = pictures()
    model = classifier(callbacks=[Raise(ValueError("no more"))])
    refuses(model, y, "^no more$", X=X)
    with pytest.raises(NotFittedError):
        model.predict(X)
    assert model.set_params(callbacks=None).fit(X, y).predict(X).shape == (12,)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("model", [classifier, regressor])
@pytest.mark.parametrize("unfreeze", [1, "all"])
def test_a_loss_that_is_lost(model, unfreeze):
    X, y = pictures()
    lost = model(unfreeze=unfreeze, lr=1e30)
    refuses(lost, y, r"(?i)loss became (nan|inf) in epoch \d.*lower lr", X=X)
    with pytest.raises(NotFittedError):
        lost.predict(X)


class CtrlC(Callback):
    """Sends the signal in some epochs, counted over all fits."""

    def __init__(self, *epochs):
        self.epochs = epochs

    def on_epoch_end(self, net, **kwargs):
        if len(net.history) in self.epochs:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("unfreeze", [1, "all"])
def test_ctrl_c_keeps_what_was_learnt_and_fit_goes_on(unfreeze):
    X, y = pictures()
    options = {"max_epochs": 7, "warm_start": True, "unfreeze": unfreeze}
    model = classifier(callbacks=[CtrlC(2, 5)], **options)
    refuses(model, y, "after 2 of 7 epochs.*warm_start=True.* 5", KeyboardInterrupt, X=X)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert model.n_iter_ == len(model.history_) == 2
    assert model.predict(X).shape == (12,)
    refuses(model, y, "3 of 5 epochs", KeyboardInterrupt, X=X)
    model.fit(X, y)
    assert model.n_iter_ == len(model.history_) == 7
    model.fit(X, y)  # what was asked for is done: this one is new
    assert model.n_iter_ == 14


class Rates(Callback):
    """Keeps the learning rate of every batch."""

    def initialize(self):
        self.rates_ = []
        return self

    def on_batch_begin(self, net, training=False, **kwargs):
        if training:
            self.rates_.append(net.optimizer_.param_groups[0]["lr"])


def test_the_learning_rate_goes_on_after_ctrl_c():
    X, y = pictures()
    whole = Rates()
    classifier(max_epochs=6, callbacks=[whole]).fit(X, y)
    halves = Rates()
    model = classifier(max_epochs=6, callbacks=[halves, CtrlC(2)], warm_start=True)
    refuses(model, y, "2 of 6", KeyboardInterrupt, X=X)
    first = list(halves.rates_)
    model.fit(X, y)
    rest = halves.rates_ if halves.rates_[: len(first)] != first else halves.rates_[len(first) :]
    np.testing.assert_allclose(first + rest, whole.rates_)


def test_ctrl_c_without_warm_start():
    X, y = pictures()
    model = classifier(callbacks=[CtrlC(1)])
    refuses(model, y, "after 1 of 3 epochs", KeyboardInterrupt, X=X)
    assert model.predict(X).shape == (12,)
    expected = classifier().fit(X, y).predict_proba(X)
    model.set_params(callbacks=None).fit(X, y)
    assert model.n_iter_ == 3
    assert np.array_equal(model.predict_proba(X), expected)


def test_a_pickle_of_what_ctrl_c_left():
    X, y = pictures()
    model = classifier(callbacks=[CtrlC(2)], max_epochs=5, warm_start=True)
    refuses(model, y, "2 of 5", KeyboardInterrupt, X=X)
    copied = pickle.loads(pickle.dumps(model))
    assert np.array_equal(copied.predict_proba(X), model.predict_proba(X))
    assert copied.fit(X, y).n_iter_ == 5


class PressingHead(nn.Linear):
    """A head in whose third batch somebody presses Ctrl-C."""

    n_calls = 0

    def forward(self, x):
        if self.training:
            self.n_calls += 1
            if self.n_calls == 3:
                signal.raise_signal(signal.SIGINT)
        return super().forward(x)


def test_ctrl_c_while_the_head_is_trained_alone():
    X, y = pictures()
    model = classifier(head=PressingHead(16, 2), head_epochs=5)
    refuses(model, y, "interrupted in epoch 2 of 5.*head", KeyboardInterrupt, X=X)
    with pytest.raises(NotFittedError):
        model.predict(X)


presses = []  # of batches that were real, and not the two images by which networks are tried out


def press(x):
    """Somebody presses Ctrl-C in the third batch."""
    if x.device.type != "meta" and type(x) is torch.Tensor and len(x) > 2:
        presses.append(len(x))
        if len(presses) == 3:
            signal.raise_signal(signal.SIGINT)
    return x


torch.fx.wrap("press")


class Pressed(nn.Module):
    def forward(self, x):
        return press(x)


def test_ctrl_c_while_frozen_blocks_run(tmp_path):
    X, y = pictures()
    network = small()
    network.stem.insert(0, Pressed())
    backbone = Backbone(network, SIZE)
    model = classifier(backbone=backbone, memory=tmp_path)
    refuses(model, y, r"frozen blocks ran: [48] of 12 images.*memory", KeyboardInterrupt, X=X)
    assert model.fit(X, y).predict(X).shape == (12,)


# ------------------------------------------------------------------------------ disks


def test_a_memory_that_cannot_be_written(tmp_path):
    X, y = pictures()
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning) as caught:
        model = classifier(memory=tmp_path / "file" / "below").fit(X, y)
        probabilities = model.predict_proba(X)
    assert len(caught) == 1
    assert np.array_equal(probabilities, classifier().fit(X, y).predict_proba(X))


FULL_DISKS = """
import resource, warnings
import numpy as np
from networks import small
import sktransfer._training.plan
from sktransfer import FineTunedClassifier
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

X = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3)).astype(np.uint8)
y = np.arange(40) % 2
backbone = Backbone(small(), Preprocessing(size=(32, 32), resize=(32, 32)))

def fit(**options):
    options = {"max_epochs": 2, "random_state": 0, **options}
    return FineTunedClassifier(backbone, **options).fit(X, y)

sktransfer._training.plan._FLOPS = {"cpu": 1e5}  # so that all is worth keeping
expected, of_the_head = (fit(unfreeze=depth).predict_proba(X) for depth in (1, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # Python ignores SIGXFSZ

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = fit(memory="memory")
    assert np.array_equal(model.predict_proba(X), expected), "other predictions"
messages = [str(warning.message) for warning in caught]
assert len(messages) == 1 and "memory" in messages[0], messages

sktransfer._training.plan._IN_RAM = 10_000
model = fit()
assert "disk is full" in str(model.plan_), model.plan_
assert model.plan_.start == 0 < model.plan_.cut
np.testing.assert_allclose(model.predict_proba(X), expected, atol=1e-3)

# Rows, on which a head is trained, then stay in memory, however large they are.
sktransfer._training.plan._IN_RAM = 1_000
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, 30_000))
np.testing.assert_array_equal(fit(unfreeze=0).predict_proba(X), of_the_head)
print("done")
"""


def test_full_disks(tmp_path):
    assert run_code(FULL_DISKS, folder=tmp_path).stdout == "done\n"
