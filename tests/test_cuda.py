"""What only a GPU can show: a CPU's rows, memory that does not suffice, models that go back."""

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from networks import small

from sktransfer import (
    ContrastivePretrainer,
    FineTunedClassifier,
    FineTunedDetector,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
    get_model,
)
from sktransfer._engine.device import allows_tf32
from sktransfer._engine.runner import get_runner

GPU = "cuda"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_CPU = {"device": "cpu", "runtime": "torch"}


@pytest.fixture
def tf32():
    """A function that lets torch use TF32, or not; the setting is as before at the end."""
    before = torch.backends.cudnn.allow_tf32

    def allow(value):
        torch.backends.cudnn.allow_tf32 = value

    yield allow
    allow(before)


@pytest.fixture
def exact(tf32):
    tf32(False)


def difference(rows, expected):
    return np.abs(rows - expected).max() / np.abs(expected).max()


# ------------------------------------------------------------------------------ settings, anywhere


def test_tf32_is_read_by_either_kind_of_settings(tf32):
    tf32(True)
    assert allows_tf32()
    tf32(False)
    assert not allows_tf32()
    if (conv := getattr(torch.backends.cudnn, "conv", None)) is not None:  # from torch 2.9 on
        before = conv.fp32_precision
        for precision in ("tf32", "ieee"):
            conv.fp32_precision = precision
            assert allows_tf32() == (precision == "tf32")
        conv.fp32_precision = before


# ------------------------------------------------------------------------------ features


@needs_gpu
@pytest.mark.parametrize(
    "backbone, weights",
    [("efficientnet_lite0", "default"), ("resnet18", None), ("vit_b_16", None)],
)
def test_features_are_those_of_a_cpu(backbone, weights, photos, exact):
    rows, expected = (
        PretrainedFeatureExtractor(backbone, weights=weights, **options).transform(photos)
        for options in ({"device": GPU}, ON_CPU)
    )
    assert rows.dtype == np.float32 and difference(rows, expected) < 1e-3


@needs_gpu
@pytest.mark.parametrize("precision, most", [("bfloat16", 0.15), ("float16", 0.03)])
def test_features_of_lower_precision(precision, most, photos):
    rows = PretrainedFeatureExtractor(device=GPU, precision=precision).transform(photos)
    expected = PretrainedFeatureExtractor(**ON_CPU).transform(photos)
    assert rows.dtype == np.float32 and 0 < difference(rows, expected) < most


@needs_gpu
def test_classes_are_those_of_a_cpu(photos):
    on_gpu, on_cpu = PretrainedClassifier(device=GPU), PretrainedClassifier(**ON_CPU)
    assert on_gpu.predict(photos).tolist() == on_cpu.predict(photos).tolist()


@needs_gpu
def test_the_memory_tells_devices_apart_only_where_rows_differ(photos, tmp_path, tf32):
    def rows(device, precision="float32"):
        options = {"device": device, "precision": precision, "memory": tmp_path}
        return PretrainedFeatureExtractor(runtime="torch", **options).transform(photos)

    tf32(False)
    on_cpu = rows("cpu")
    np.testing.assert_array_equal(rows(GPU), on_cpu)  # they came from the memory
    assert not np.array_equal(rows(GPU, "bfloat16"), on_cpu)
    if torch.cuda.get_device_capability() >= (8, 0):
        tf32(True)
        assert not np.array_equal(rows(GPU), on_cpu)
        np.testing.assert_array_equal(rows("cpu"), on_cpu)


@needs_gpu
def test_one_copy_on_a_device_however_it_is_named():
    backbone = get_model(small())
    names = ("auto", "cuda", torch.device("cuda"), f"cuda:{torch.cuda.current_device()}")
    runners = [get_runner(backbone, name, "float32") for name in names]
    assert all(runner is runners[0] for runner in runners)
    assert next(runners[0].network.parameters()).is_cuda
    assert not next(backbone.network.parameters()).is_cuda


# ------------------------------------------------------------------------------ memory


@pytest.fixture
def little_memory():
    """Lets this process have 400 MB of the GPU."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(4e8 / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@needs_gpu
def test_batches_that_do_not_fit_are_halved(little_memory, exact):
    X = np.random.default_rng(0).integers(0, 256, (256, 224, 224, 3)).astype(np.uint8)
    options = {"weights": None, "image_size": 224}
    extractor = PretrainedFeatureExtractor("resnet18", device=GPU, batch_size=256, **options)
    with pytest.warns(UserWarning, match=r"'cuda:0' did not suffice: .* goes on with \d+ images"):
        rows = extractor.transform(X)
    expected = PretrainedFeatureExtractor("resnet18", **ON_CPU, **options).transform(X[::64])
    assert difference(rows[::64], expected) < 1e-3


@needs_gpu
def test_not_even_one_image(little_memory):
    X = np.zeros((1, 64, 64, 3), np.uint8)
    extractor = PretrainedFeatureExtractor("resnet18", weights=None, device=GPU, image_size=4096)
    with pytest.raises(MemoryError, match="Not even one image fits .* Pass a smaller image_size"):
        extractor.transform(X)


# ------------------------------------------------------------------------------ training


OPENED = """
import pickle, sys
import numpy as np, torch
assert not torch.cuda.is_available()
model, X = pickle.load(open(sys.argv[1], "rb"))
np.save(sys.argv[2], model.predict_proba(X))
"""


@needs_gpu
@pytest.mark.parametrize(
    "unfreeze, precision", [(0, "float32"), (1, "bfloat16"), ("all", "float32")]
)
def test_fine_tuning(tiles, unfreeze, precision):
    _, paths, labels = tiles
    options = {"max_epochs": 3, "image_size": 64, "random_state": 0}
    model = FineTunedClassifier(unfreeze=unfreeze, precision=precision, device=GPU, **options)
    assert model.fit(paths, labels).score(paths, labels) > 0.8
    proba = model.predict_proba(paths)
    assert np.isfinite(proba).all() and proba.shape == (40, 2)


@needs_gpu
def test_a_pickle_of_a_gpu_opens_on_a_cpu(tiles, tmp_path, exact):
    _, paths, labels = tiles
    options = {"max_epochs": 1, "image_size": 64, "random_state": 0}
    model = FineTunedClassifier(unfreeze=1, **options).fit(paths, labels)  # device="auto"
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((model, paths[::8])))
    path = os.pathsep.join([*sys.path, str(Path(__file__).parent)])
    subprocess.run(
        [sys.executable, "-c", OPENED, str(tmp_path / "model.pkl"), str(tmp_path / "proba.npy")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
        check=True,
    )
    np.testing.assert_allclose(
        np.load(tmp_path / "proba.npy"), model.predict_proba(paths[::8]), atol=1e-3
    )


@needs_gpu
def test_contrastive_pretraining(tiles):
    _, paths, _ = tiles
    options = {"max_epochs": 1, "image_size": 64, "random_state": 0, "unfreeze": 1}
    model = ContrastivePretrainer(device=GPU, **options).fit(paths)
    assert np.isfinite(model.transform(paths[:4])).all()


@needs_gpu
def test_detection():
    X = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3)).astype(np.uint8)
    y = [{"boxes": [[8, 8, 40, 40]], "labels": ["square"]}] * 8
    options = {"image_size": 64, "max_epochs": 2, "random_state": 0}
    model = FineTunedDetector(small(), device=GPU, **options).fit(X, y)
    found = model.predict(X)
    assert len(found) == 8 and set(found[0]) == {"boxes", "labels", "scores"}
    again = pickle.loads(pickle.dumps(model)).set_params(device="cpu").predict(X)
    assert [len(image["boxes"]) for image in again] == [len(image["boxes"]) for image in found]


# ------------------------------------------------------------------------------ processes


def words_of_a_worker():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PretrainedFeatureExtractor(device=GPU, image_size=32).transform(
            np.zeros((1, 32, 32, 3), np.uint8)
        )
    return [str(warning.message) for warning in caught]


@needs_gpu
def test_workers_say_that_each_has_a_copy():
    found = joblib.Parallel(2)(joblib.delayed(words_of_a_worker)() for _ in range(2))
    for words in found:
        assert any("with n_jobs > 1" in said and "Use n_jobs=1" in said for said in words) or (
            words == []  # it had a copy already
        )
    assert any(found)
