"""Memory that does not suffice, devices that are shared."""

import os

import numpy as np
import psutil
import pytest
import torch
from networks import small
from torch import nn

from sktransfer import FineTunedClassifier, PretrainedFeatureExtractor, get_model
from sktransfer._engine.runner import get_runner
from sktransfer._estimators.pretrained import embedding_of
from sktransfer._training import data

SHARE = 0.4  # of the machine's memory that an image asks for: one or two can be had, more not


def ask(x: torch.Tensor, n_bytes: int) -> torch.Tensor:
    """Ask the system for memory for each image, and give it back untouched."""
    if x.device.type != "meta":
        torch.empty(len(x), n_bytes, dtype=torch.uint8)
    return x


torch.fx.wrap("ask")


class Greedy(nn.Module):
    def __init__(self, share):
        super().__init__()
        self.n_bytes = int(share * psutil.virtual_memory().total)
        self.body, self.last = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 6, 3, 2)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = ask(self.last(ask(self.body(x), self.n_bytes)), self.n_bytes)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(256, size=(10, 32, 32, 3), dtype=np.uint8)


def test_a_batch_that_does_not_fit_is_halved(pictures):
    extractor = PretrainedFeatureExtractor(Greedy(SHARE), image_size=32)
    with pytest.warns(UserWarning, match="did not suffice.* goes on with [12] images at once"):
        rows = extractor.transform(pictures)
    assert rows.shape == (10, 6)
    with pytest.warns(UserWarning, match="did not suffice"):  # every pass tries anew
        assert (rows[3] == extractor.transform(pictures[3:4])[0]).all()


def lack(x: torch.Tensor) -> torch.Tensor:
    """Have no memory for more than two images, while there is said to be little."""
    if Forgetful.has_little and x.device.type != "meta" and len(x) > 2:
        raise MemoryError
    return x


torch.fx.wrap("lack")


class Forgetful(Greedy):
    has_little = False

    def __init__(self):
        super().__init__(0)

    def forward(self, x):
        return super().forward(lack(x))


def test_other_estimators_run_as_many_images_as_before(pictures, monkeypatch):
    backbone, labels = get_model(Forgetful()), np.arange(10) % 2
    options = {"image_size": 32, "max_epochs": 1, "unfreeze": 1, "random_state": 0}

    def fit():
        return FineTunedClassifier(backbone, **options).fit(pictures, labels)

    expected = fit().predict_proba(pictures)
    monkeypatch.setattr(Forgetful, "has_little", True)
    with pytest.warns(UserWarning, match="goes on with 2 images at once"):
        fit()
    with pytest.warns(UserWarning, match="goes on with 2 images at once"):
        PretrainedFeatureExtractor(backbone, image_size=32).transform(pictures)
    monkeypatch.setattr(Forgetful, "has_little", False)
    stream = embedding_of(PretrainedFeatureExtractor(backbone, image_size=32))
    assert stream.step == 4
    assert (fit().predict_proba(pictures) == expected).all()  # bit by bit: in the same batches


def test_not_even_one_image_fits(pictures):
    extractor = PretrainedFeatureExtractor(Greedy(50), image_size=32)
    with (
        pytest.warns(UserWarning, match="did not suffice"),
        pytest.raises(MemoryError, match="Not even one image fits .* smaller image_size"),
    ):
        extractor.transform(pictures)


def test_a_training_step_that_does_not_fit_is_taken_in_parts(pictures):
    labels = np.arange(10) % 2
    options = {"image_size": 32, "max_epochs": 2, "unfreeze": "all", "random_state": 0}
    with pytest.warns(UserWarning, match="did not suffice"):
        model = FineTunedClassifier(Greedy(SHARE), **options).fit(pictures, labels)
    network = Greedy(0)
    network.load_state_dict(get_model(model.backbone).network.state_dict())
    plain = FineTunedClassifier(network, **options).fit(pictures, labels)
    with pytest.warns(UserWarning, match="did not suffice"):
        found = model.predict_proba(pictures)
    np.testing.assert_allclose(found, plain.predict_proba(pictures), atol=1e-4)


def test_automatic_batch_size(pictures):
    runner = get_runner(get_model(small()), "cpu", "float32")
    assert runner.batch_size("auto", (32, 32)) == 32
    assert runner.batch_size(7, (32, 32)) == 7
    rows = [
        PretrainedFeatureExtractor(small(), image_size=32, batch_size=size).transform(pictures)
        for size in ("auto", 3, 64)
    ]
    assert (rows[0] == rows[2]).all() and np.allclose(rows[0], rows[1], atol=1e-6)
    labels = np.arange(10) % 2
    model = FineTunedClassifier(small(), image_size=32, batch_size="auto", max_epochs=1)
    assert model.fit(pictures, labels).n_iter_ == 1


@pytest.mark.parametrize("is_reserved_at_once", [True, False])
def test_activations_in_a_file(monkeypatch, is_reserved_at_once):
    """Also where the system cannot reserve space for a file at once, such as macOS."""
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(data, "in_ram", lambda n_bytes: False)
    monkeypatch.setattr(data, "_PIECE", 3000)
    if not is_reserved_at_once:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    found = data.allocate((70, 50), np.float32)
    assert isinstance(found, np.memmap) and found.shape == (70, 50)
    found[:] = 3
    assert (found == 3).all()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a full disk would
    try:
        assert data.allocate((70, 50), np.float32) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
