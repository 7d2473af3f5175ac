"""Networks in processes that multiprocessing and joblib start, after the parent has run them."""

import contextlib
import importlib
import multiprocessing
import os
import sys
import threading
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import torch
from networks import small
from PIL import Image
from processes import run_code
from torchvision.models import resnet18

from sktransfer import FineTunedClassifier, PretrainedFeatureExtractor
from sktransfer._engine.device import check_readable, resolve_device
from sktransfer._memory import store
from sktransfer._memory.memory import check_memory
from sktransfer._torch_state import Chance, chance_lock, network_lock
from sktransfer.io import _decoding, check_images
from sktransfer.models._graph import _Tracer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.usefixtures("two_threads"),  # so that OpenMP's threads are there
]
GPU = torch.device("cuda", 0)
IMAGES = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3)).astype(np.uint8)


def extractor(**options):
    return PretrainedFeatureExtractor(**{"image_size": 64, **options})


def in_child(method, function, *args):
    """Call a function in a worker of a pool; fail if it hangs."""
    with multiprocessing.get_context(method).Pool(1) as pool:
        return pool.apply_async(function, args).get(300)


def strictly(model, method, X):
    """Let no warning pass, but that of what a fork of threads may do."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return getattr(model, method)(X)


ALL = "SKTRANSFER_TEST_ALL" in os.environ


# As "spawn", "forkserver" gives a new process a pickled estimator, and joblib's workers import all.
@pytest.mark.parametrize("method", ["fork", "forkserver", *(["spawn"] if ALL else [])])
def test_start_methods_share_a_memory(tmp_path, method):
    model = extractor(memory=str(tmp_path))
    model.transform(IMAGES[:3])
    rows = in_child(method, strictly, model, "transform", IMAGES)
    assert check_memory(tmp_path).info()["n_entries"] == 6
    np.testing.assert_allclose(rows, extractor().transform(IMAGES), atol=1e-4)
    np.testing.assert_array_equal(rows, model.transform(IMAGES))  # from the memory


def test_a_fork_runs_what_its_parent_has_run():
    fitted = FineTunedClassifier(image_size=64, unfreeze=0, random_state=0)
    fitted.fit(IMAGES, [0, 1] * 3)
    for model, name in [
        (extractor(), "transform"),  # on OpenVINO, where it is installed
        (extractor(backbone=resnet18(weights=None).eval(), runtime="torch"), "transform"),
        (fitted, "predict_proba"),
    ]:
        expected = getattr(model, name)(IMAGES)
        found = in_child("fork", strictly, model, name, IMAGES)
        np.testing.assert_allclose(found, expected, atol=2e-3)


def _asks_for_openvino():
    model = extractor(runtime="openvino")
    with pytest.warns(UserWarning, match="forked from one in which OpenVINO.*'spawn'.*loky"):
        return model.transform(IMAGES)


def test_openvino_in_a_fork_is_refused_by_name():
    pytest.importorskip("openvino")
    expected = extractor(runtime="openvino").transform(IMAGES)
    np.testing.assert_allclose(in_child("fork", _asks_for_openvino), expected, atol=1e-4)


def test_a_fork_while_the_network_is_locked():
    extractor().transform(IMAGES)
    with network_lock.shared():
        in_child("fork", strictly, extractor(), "transform", IMAGES)


PICTURE = Image.fromarray(IMAGES[0])


def _reads():
    return check_images([PICTURE]).load(0).numpy()


def test_a_fork_while_a_pil_image_is_read():
    with _decoding._lock_of(PICTURE):
        np.testing.assert_array_equal(in_child("fork", _reads).transpose(1, 2, 0), IMAGES[0])


def _draws():
    return torch.rand(3), extractor(backbone=small(), runtime="torch").transform(IMAGES)


@pytest.mark.parametrize("busy", ["running", "tracing", "drawing"])
def test_a_fork_while_another_thread_is_busy(busy):
    torch.manual_seed(3)
    expected = _draws()
    held, go_on = threading.Event(), threading.Event()

    def work():
        held.set()
        assert go_on.wait(600)

    def trace():
        _Tracer().trace(torch.nn.Sequential(OrderedDict(a=Calls(work))))

    def hold():
        if busy == "running":
            with network_lock.shared():
                work()
        elif busy == "tracing":
            network_lock.alone(trace)
        else:
            with chance_lock, Chance(0).in_torch():
                work()

    torch.manual_seed(3)
    with ThreadPoolExecutor(1) as threads:
        holding = threads.submit(hold)
        assert held.wait(300)
        try:
            found = in_child("fork", _draws)
        finally:
            go_on.set()
        holding.result()
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


class Calls(torch.nn.Module):
    """Its forward calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        self.function()
        return x


def _locks():
    """Find the locks of all modules of the library, whose number no module says."""
    kinds = type(threading.Lock()), type(threading.RLock())
    modules = [m for name, m in sorted(sys.modules.items()) if name.startswith("sktransfer.")]
    found = [v for module in modules for _, v in sorted(vars(module).items())]
    return list({id(lock): lock for lock in found if isinstance(lock, kinds)}.values())


def _all_free():
    network_lock.alone(bool)
    return [lock.acquire(timeout=1) for lock in _locks()]


def test_a_fork_while_another_thread_holds_every_lock():
    pytest.importorskip("dask")
    importlib.import_module("sktransfer._estimators.dask_collections")
    held, go_on = threading.Event(), threading.Event()

    def hold():
        with contextlib.ExitStack() as stack:
            for lock in _locks():
                if lock is not store._REGISTRY:  # a fork waits until it is free
                    stack.enter_context(lock)
            stack.enter_context(network_lock.shared())
            held.set()
            go_on.wait(600)

    with ThreadPoolExecutor(1) as threads:
        threads.submit(hold)
        assert held.wait(300)
        try:
            found = in_child("fork", _all_free)
        finally:
            go_on.set()
    assert len(found) > 5 and all(found)


def _asks_for_the_gpu():
    asks = (resolve_device, check_readable)
    return [str(pytest.raises((ValueError, RuntimeError), ask, GPU).value) for ask in asks]


@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
def test_a_fork_is_told_how_to_use_a_gpu():
    resolve_device("auto")  # looks for one, after which torch lets no child use it
    found = in_child("fork", _asks_for_the_gpu)
    assert all("start processes by 'spawn' or 'forkserver'" in said for said in found)
    assert found[0].startswith("device='cuda:0' can't be used here (Cannot re-initialize CUDA")
    assert found[1].startswith("What was trained lies on 'cuda:0'.")
    check_readable(GPU)  # in a process that is no fork


def test_joblib_with_forked_workers(tmp_path):
    model = extractor(memory=str(tmp_path))
    expected = model.transform(IMAGES[:2])
    with joblib.parallel_config("multiprocessing", n_jobs=2):
        parts = joblib.Parallel()(
            joblib.delayed(strictly)(model, "transform", IMAGES[i : i + 2]) for i in (0, 2, 4)
        )
    np.testing.assert_array_equal(parts[0], expected)
    assert check_memory(tmp_path).info()["n_entries"] == 6


EXITS = """
import ctypes, os, warnings, numpy as np, torch
from networks import small
from PIL import Image
from sktransfer import PretrainedFeatureExtractor
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads
model = PretrainedFeatureExtractor(small(), image_size=64)
torch.set_num_threads(2)
torch.ones(500, 500) @ torch.ones(500, 500) + torch.ones(500, 500)  # not through this library
for works in (True, False):
    child = os.fork()
    if child == 0:
        if works:
            model.transform(np.zeros((2, 64, 64, 3), np.uint8))
        ctypes.pythonapi.Py_Exit(7)  # as at the end of a script
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    model.transform(np.zeros((2, 64, 64, 3), np.uint8))
"""


def test_a_forked_child_ends():
    run_code(EXITS)
