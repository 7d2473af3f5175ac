"""Torch's defaults, and the modes in which a notebook may call: they change no result."""

import contextlib
import pickle
import threading

import numpy as np
import pytest
import torch
from networks import small
from torch import nn

from sktransfer import (
    ContrastivePretrainer,
    FineTunedClassifier,
    FineTunedDetector,
    FineTunedRegressor,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
)
from sktransfer._estimators.pretrained import embedding_of
from sktransfer._torch_state import float32_by_default, network_lock
from sktransfer.inspection import SaliencyDisplay
from sktransfer.models import _registry

X = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
Y = np.arange(8) % 2
BOXES = [{"boxes": [[4, 4, 28, 28]], "labels": ["cell"]}] * 8
NETWORK = small()
OPTIONS = {"image_size": 32, "max_epochs": 1, "random_state": 0}


@contextlib.contextmanager
def float64():
    """A default dtype of the user's, in which scientists like to work."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def forget():
    """Let all networks be loaded anew."""
    _registry._loaded.clear()
    _registry._recent.clear()


def extracted():
    extractor = PretrainedFeatureExtractor("resnet18", weights=None, image_size=32)
    both = PretrainedFeatureExtractor(NETWORK, layer=["stem", "auto"], image_size=32)
    names = [*embedding_of(extractor).names().wanted, *embedding_of(both).names().wanted]
    keys = np.array(names)
    proba = PretrainedClassifier(NETWORK, image_size=32).predict_proba(X)
    return [extractor.transform(X), both.transform(X), keys, proba]


def fine_tuned():
    found = []
    for unfreeze in (0, 1, "all"):
        model = FineTunedClassifier(NETWORK, unfreeze=unfreeze, **OPTIONS).fit(X, Y)
        found.append(pickle.loads(pickle.dumps(model)).predict_proba(X))
        model.partial_fit(X, Y)
        found += [model.predict_proba(X), model.to_feature_extractor().transform(X)]
    return found


def of_other_kinds():
    options = {**OPTIONS, "unfreeze": 1}
    stopped = FineTunedClassifier(NETWORK, head=[4], early_stopping=True, **options)
    stopped.set_params(validation_fraction=0.5).fit(X, Y, sample_weight=np.full(8, 1.5))
    values = FineTunedRegressor(NETWORK, **options).fit(X, Y * 1.5).predict(X)
    pretrainer = ContrastivePretrainer(NETWORK, **{**options, "batch_size": 4}).fit(X)
    rows = PretrainedFeatureExtractor(pretrainer, image_size=32).transform(X)
    maps = SaliencyDisplay.from_estimator(stopped, X[:2]).saliency
    return [stopped.predict_proba(X), values, rows, maps]


def detected():
    options = {**OPTIONS, "unfreeze": 1, "width": 64}
    model = FineTunedDetector(backbone=NETWORK, **options).fit(X[:4], BOXES[:4])
    return [boxes["scores"] for boxes in model.predict(X[:2])]


def assert_same(results, expected):
    for result, same in zip(results, expected, strict=True):
        assert result.dtype == same.dtype
        np.testing.assert_array_equal(result, same)


@pytest.mark.parametrize("work", [extracted, fine_tuned, of_other_kinds, detected])
def test_no_default_and_no_mode_changes_a_result(work):
    expected = work()
    forget()
    with float64(), torch.inference_mode():
        assert_same(work(), expected)
    assert_same(work(), expected)  # what was loaded in inference mode can be used outside of it


def test_fits_under_no_grad():
    model = FineTunedClassifier(NETWORK, unfreeze=1, **OPTIONS)
    expected = model.fit(X, Y).predict_proba(X)
    with torch.no_grad():
        np.testing.assert_array_equal(model.fit(X, Y).predict_proba(X), expected)


def test_a_head_of_the_default_dtype():
    with float64():
        head = nn.Linear(16, 2)
        model = FineTunedClassifier(NETWORK, head=head, unfreeze=1, **OPTIONS).fit(X, Y)
        assert model.predict_proba(X).dtype == np.float32


def test_the_default_comes_back_when_the_last_thread_leaves():
    inside, leave = threading.Event(), threading.Event()

    def stay():
        own = threading.Lock()
        with own, float32_by_default(own):
            inside.set()
            leave.wait(600)

    with float64():
        thread = threading.Thread(target=stay)
        thread.start()
        inside.wait(300)
        lock = network_lock.shared()
        with lock, float32_by_default(), lock, float32_by_default():
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float32  # the thread still runs a network
        leave.set()
        thread.join()
        assert torch.get_default_dtype() == torch.float64


def in_thread(function, *args):
    """Start a function in a thread."""
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def test_threads_run_networks_at_once():
    both = threading.Barrier(2, timeout=300)

    def run():
        with network_lock.shared(), network_lock.shared():
            both.wait()

    thread = in_thread(run)
    run()
    thread.join(300)
    assert not thread.is_alive()


def test_who_is_alone_comes_to_its_turn_and_waits_for_the_others():
    inside, go_on, is_over = threading.Event(), threading.Event(), threading.Event()
    order = []

    def run_once():
        with network_lock.shared():
            inside.set()
            assert go_on.wait(600)
            order.append("run")

    def run_often():
        while not is_over.is_set():
            with network_lock.shared():
                pass

    def trace():
        order.append("alone")
        with network_lock.shared():
            return network_lock.alone(lambda: order.append("again"))

    runners = [in_thread(run_once), in_thread(run_often), in_thread(run_often)]
    assert inside.wait(300)
    tracing = in_thread(network_lock.alone, trace)
    tracing.join(0.05)
    assert tracing.is_alive() and not order
    go_on.set()
    tracing.join(300)
    is_over.set()
    assert not tracing.is_alive() and order == ["run", "alone", "again"]
    for thread in runners:
        thread.join(300)


def test_who_runs_a_network_cannot_be_alone():
    with network_lock.shared(), pytest.raises(RuntimeError, match="can't ask to be alone"):
        network_lock.alone(bool)
    assert network_lock.alone(lambda: 3) == 3


class MakesTensors(nn.Module):
    """Names no device for the tensors that it makes, of which its training needs one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        x = self.first(x).relu() * torch.linspace(1, 2, 8).view(8, 1, 1)
        return self.second(x).mean((2, 3)) + torch.arange(8)


class Branches(MakesTensors):
    """Can't be traced: what it does depends on the pixels."""

    def forward(self, x):
        return super().forward(x if x.isfinite().all() else x.nan_to_num())


@contextlib.contextmanager
def by_default_on(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("kind", [MakesTensors, Branches])
def test_what_a_network_makes_fits_to_it_in_any_mode(kind):
    network = kind()

    def work():
        forget()
        layer = "auto" if kind is MakesTensors else "output"
        options = {"layer": layer, "image_size": 32, "runtime": "torch"}
        rows = PretrainedFeatureExtractor(network, **options).transform(X)
        model = FineTunedClassifier(network, unfreeze="all", **OPTIONS).fit(X, Y)
        return [rows, model.predict_proba(X)]

    expected = work()
    with torch.inference_mode():
        assert_same(work(), expected)
    with by_default_on("meta"):
        assert_same(work(), expected)


def test_networks_load_on_the_cpu_whatever_the_default_device():
    expected = PretrainedFeatureExtractor("resnet18", weights=None, image_size=32).transform(X)
    forget()
    with by_default_on("meta"):
        extractor = PretrainedFeatureExtractor("resnet18", weights=None, image_size=32)
        np.testing.assert_array_equal(extractor.transform(X), expected)
        FineTunedClassifier(NETWORK, unfreeze=1, **OPTIONS).fit(X, Y).predict(X)
        ContrastivePretrainer(NETWORK, image_size=32, max_epochs=1).fit(X)
        boxes = [{"boxes": [[2, 2, 20, 20]], "labels": ["a"]}] * len(X)
        detector = FineTunedDetector(NETWORK, image_size=64, width=64, max_epochs=1, augment="auto")
        pickle.loads(pickle.dumps(detector.fit(X, boxes))).predict(X)
