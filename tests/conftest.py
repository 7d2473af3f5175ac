import gc
import os
import signal
import sys
from pathlib import Path

os.environ["SCIPY_ARRAY_API"] = "1"  # before scipy: one of scikit-learn's checks skips itself else
# Before numpy: threads of BLAS that wait for each other cost small matrices several times as long.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# Before torch looks for a GPU, here and in all processes that are started: most tests are of what a
# CPU computes and decides. Those of test_cuda.py are run apart, with this variable set.
if not os.environ.get("SKTRANSFER_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np  # noqa: E402
import pytest
import torch
from networks import LOG
from PIL import Image
from sklearn.datasets import load_sample_images

# A shell has what it starts in the background ignore Ctrl-C, which some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Layers as small as those of most tests take several times as long on several threads.
torch.set_num_threads(1)


def pytest_collection_finish():
    # What is imported by now lives as long as the process: no collection looks at it again. With
    # it, a whole one takes half a second.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    if "matplotlib.pyplot" in sys.modules:  # which warns of more than 20 that are open
        sys.modules["matplotlib.pyplot"].close("all")


def _with_threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads():
    """As many threads as a user's machine has at least; OpenVINO then has two streams."""
    yield from _with_threads(2)


@pytest.fixture(scope="session", autouse=True)
def _log(tmp_path_factory):
    """A file for counted networks, which processes that are started at any time know."""
    os.environ[LOG] = str(tmp_path_factory.mktemp("log") / "runs")


@pytest.fixture
def run_log():
    """A function that returns the digests of all images that ran through a counted network."""
    log = Path(os.environ[LOG])
    log.touch()
    yield lambda: log.read_text().split()
    log.unlink()


@pytest.fixture(scope="session")
def photos():
    """The two photographs that scikit-learn ships: china.jpg and flower.jpg, (427, 640, 3)."""
    return load_sample_images().images


@pytest.fixture(scope="session")
def sample_files():
    return sorted(load_sample_images().filenames)


@pytest.fixture(scope="session")
def tiles(photos, tmp_path_factory):
    """Forty JPEG files of 64 × 64 pixels, cut from the photographs, in two class folders."""
    root = tmp_path_factory.mktemp("tiles")
    paths = []
    for name, photo in zip(("china", "flower"), photos, strict=True):
        os.makedirs(root / name)
        for i in range(20):
            top, left = 64 * (i // 5), 90 * (i % 5)
            tile = Image.fromarray(np.ascontiguousarray(photo[top : top + 64, left : left + 64]))
            paths.append(str(root / name / f"{i:02}.jpg"))
            tile.save(paths[-1], quality=92)
    return root, paths, np.repeat(["china", "flower"], 20)
