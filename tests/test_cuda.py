"""What only a GPU can show: a CPU's rows, memory that does not suffice, models that go back.

The suite hides a GPU from all other tests, so these are run apart:
``SKTRANSFER_TEST_GPU=1 pytest tests/test_cuda.py``.
"""

import multiprocessing
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
from torchvision.models.detection import fcos_resnet50_fpn
from torchvision.ops import box_iou

from sktransfer import (
    ContrastivePretrainer,
    FineTunedClassifier,
    FineTunedDetector,
    MaskedLanguagePretrainer,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
    get_model,
)
from sktransfer._engine.device import allows_tf32
from sktransfer._engine.runner import get_runner

GPU = "cuda"
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, and SKTRANSFER_TEST_GPU=1"
)
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
    conv = torch.backends.cudnn.conv
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
@pytest.mark.filterwarnings("ignore:The memory of .* did not suffice:UserWarning")
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


X = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3)).astype(np.uint8)
Y = np.arange(8) % 2
SQUARES = [{"boxes": [[8, 8, 40, 40]], "labels": ["square"]}] * 8
OPTIONS = {"image_size": 64, "max_epochs": 1, "random_state": 0}
NETWORK = small()


def detector(**options):
    return FineTunedDetector(NETWORK, **{"device": GPU, **OPTIONS, **options})


def classifier(**options):
    return FineTunedClassifier(NETWORK, **{"device": GPU, "unfreeze": 1, **OPTIONS, **options})


def embed(network, **options):
    return PretrainedFeatureExtractor(network, image_size=64, **options).transform(X)


@needs_gpu
def test_detection(exact):
    model = detector(max_epochs=2).fit(X, SQUARES)
    found = model.predict(X)
    assert len(found) == 8 and set(found[0]) == {"boxes", "labels", "scores"}
    again = pickle.loads(pickle.dumps(model)).set_params(device="cpu").predict(X)
    for on_gpu, on_cpu in zip(found, again, strict=True):
        # Of two boxes that overlap, rounding may decide which is the better one and stays.
        best = np.argsort(-on_gpu["scores"])[:10]
        boxes = (torch.from_numpy(image["boxes"]) for image in (on_gpu, on_cpu))
        overlaps = box_iou(*boxes).numpy()[best]  # (10, n)
        score_of_nearest = on_cpu["scores"][overlaps.argmax(1)]
        assert len(best) == 10 and overlaps.max(1).min() > 0.45
        np.testing.assert_allclose(score_of_nearest, on_gpu["scores"][best], atol=0.02)


@needs_gpu
@pytest.mark.filterwarnings("ignore:.*[Dd]eterministic:UserWarning")
def test_torch_can_be_told_to_repeat_a_fit_of_a_detector():
    # Its convolutions would else add up in any order. What has no such way is only warned of.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        first, second = (detector(unfreeze="all").fit(X, SQUARES).predict(X) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one["boxes"], other["boxes"])
        np.testing.assert_array_equal(one["scores"], other["scores"])


@needs_gpu
@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
def test_fits_in_inference_mode(unfreeze):
    models = [
        detector(unfreeze=unfreeze),
        classifier(unfreeze=unfreeze),
        ContrastivePretrainer(NETWORK, device=GPU, batch_size=4, **{**OPTIONS, "unfreeze": 1}),
    ]
    with torch.inference_mode():
        for model, y in zip(models, (SQUARES, Y, None), strict=True):
            model.fit(X, y)
    for model, y in zip(models, (SQUARES, Y, None), strict=True):  # nor does it leave any trace
        model.set_params(warm_start=True).fit(X, y)
    assert np.isfinite(models[1].predict_proba(X)).all()


@needs_gpu
@pytest.mark.parametrize("device", [GPU, "cpu"])
def test_a_default_device_changes_nothing(device, exact):
    expected = embed(NETWORK, device=device, runtime="torch")
    torch.set_default_device("cuda")
    try:
        rows = embed(NETWORK, device=device, runtime="torch")
        assert difference(rows, expected) < 1e-3
        for unfreeze in (0, "all"):
            model = classifier(device=device, unfreeze=unfreeze).fit(X, Y)
            opened = pickle.loads(pickle.dumps(model))
            np.testing.assert_allclose(opened.predict_proba(X), model.predict_proba(X), atol=1e-5)
        found = detector(device=device, augment="auto").fit(X, SQUARES)
        assert len(pickle.loads(pickle.dumps(found)).predict(X)) == 8
        ContrastivePretrainer(NETWORK, device=device, batch_size=4, **OPTIONS).fit(X)
    finally:
        torch.set_default_device(None)


@needs_gpu
def test_modules_of_the_user_on_a_gpu(exact):
    expected = embed(NETWORK, **ON_CPU)
    network = small().cuda()
    assert difference(embed(network, **ON_CPU), expected) < 1e-5
    assert difference(embed(network, device=GPU), expected) < 1e-3
    assert next(network.parameters()).is_cuda  # it stays where it is
    for device in ("cpu", GPU):
        model = classifier(device=device, head=torch.nn.Linear(16, 2).cuda()).fit(X, Y)
        assert model.predict_proba(X).shape == (8, 2)
        given = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2).cuda()
        found = detector(detector=given, device=device, unfreeze=0)
        assert len(found.fit(X[:2], SQUARES[:2]).predict(X[:2])) == 2


@needs_gpu
def test_what_runs_on_a_cpu_alone_says_so():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit and torch.ao are not developed further
        frozen = torch.jit.freeze(torch.jit.script(torch.nn.Conv2d(3, 4, 3).eval()))
        layers = torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 4)
        network = torch.nn.Sequential(*layers).eval()
        quantised = torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear})
        for module in (frozen, quantised):
            for device in ("auto", GPU):
                with pytest.raises(ValueError, match="runs on a CPU alone: pass device='cpu'"):
                    embed(module, layer="output", device=device)
            assert embed(module, layer="output", device="cpu").shape == (8, 4)


@needs_gpu
def test_masked_words(tmp_path):
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "mat", "sat", "on", "the"]
    (tmp_path / "words").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "words"))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(tokenizer), intermediate_size=64, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sentences = ["the cat sat on the mat", "the dog sat on the cat", "on the mat sat the dog"]
    model = MaskedLanguagePretrainer(str(tmp_path), max_epochs=1, random_state=0, device=GPU)
    before = model.transform(sentences)  # of the pretrained network, which others may run on a CPU
    on_cpu = MaskedLanguagePretrainer(str(tmp_path), device="cpu").transform(sentences)
    assert difference(before, on_cpu) < 1e-2
    with torch.inference_mode():
        model.fit(sentences)
    rows = model.partial_fit(sentences).transform(sentences)
    assert np.isfinite(rows).all() and 0 <= model.score(sentences) <= 1
    assert difference(model.set_params(device="cpu").transform(sentences), rows) < 1e-2


# ------------------------------------------------------------------------------ processes


def words_of_a_worker():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PretrainedFeatureExtractor(device=GPU, image_size=32).transform(
            np.zeros((1, 32, 32, 3), np.uint8)
        )
    return [str(warning.message) for warning in caught]


def words_of_a_fork(model, words):
    """Put into a queue what goes wrong in a fork, and rows that a CPU has there."""
    said = []
    for device in ("auto", GPU, "cpu"):
        try:
            model.set_params(device=device).predict(X)
        except (ValueError, RuntimeError) as error:
            said.append(str(error))
    try:
        pickle.dumps(model)
    except RuntimeError as error:
        said.append(str(error))
    words.put((said, embed(NETWORK, device="cpu", runtime="torch")))


@needs_gpu
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("make, y", [(classifier, Y), (detector, SQUARES)])
def test_a_fork_is_told_how_to_use_a_gpu(make, y):
    expected = embed(NETWORK, device="cpu", runtime="torch")
    model = make().fit(X, y)
    fork = multiprocessing.get_context("fork")
    words = fork.Queue()
    # What it gets is not pickled, as for a pool.
    child = fork.Process(target=words_of_a_fork, args=(model, words), daemon=True)
    child.start()
    said, rows = words.get(timeout=300)
    child.join(300)
    assert child.exitcode == 0 and len(said) == 4
    assert all("start processes by 'spawn' or 'forkserver'" in text for text in said)
    np.testing.assert_allclose(rows, expected, atol=1e-4)
    assert len(model.predict(X)) == 8  # the parent goes on


@needs_gpu
def test_workers_say_that_each_has_a_copy():
    found = joblib.Parallel(2)(joblib.delayed(words_of_a_worker)() for _ in range(2))
    for words in found:
        assert any("with n_jobs > 1" in said and "Use n_jobs=1" in said for said in words) or (
            words == []  # it had a copy already
        )
    assert any(found)
