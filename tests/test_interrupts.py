"""Ctrl-C while images run through the memory: claims, rows and locks afterwards."""

import contextlib
import dis
import fcntl
import gc
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from networks import small
from PIL import Image

from sktransfer import PretrainedFeatureExtractor, _torch_state
from sktransfer._engine import stream as _stream
from sktransfer._memory import claims as _claims
from sktransfer._memory import memory as _memory
from sktransfer._memory import store as _store
from sktransfer._memory import store_backend as _store_backend
from sktransfer._memory.memory import check_memory
from sktransfer._torch_state import (
    Chance,
    chance_lock,
    float32_by_default,
    network_lock,
    ready_to_train,
)
from sktransfer.io import _decoding, _messages, load_image

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]
MODULES = (_claims, _memory, _store, _store_backend, _stream, _torch_state)
FILES = {module.__file__ for module in MODULES}
HERE = {*FILES, contextlib.__file__, __file__}
NETWORK = small()


def pictures(n, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (n, 32, 32, 3)).astype(np.uint8)


def extractor(**options):
    defaults = {"image_size": 32, "n_jobs": 2, "batch_size": 2}
    return PretrainedFeatureExtractor(NETWORK, **{**defaults, **options})


def _try_to_lock(connection):
    """Tell of every claims file that is named whether somebody holds a claim."""
    while path := connection.recv():
        try:
            with open(path, "r+b") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            connection.send(False)
        except FileNotFoundError:
            connection.send(False)
        except OSError:
            connection.send(True)


@pytest.fixture(scope="module")
def is_claimed():
    """A function that asks another process whether claims of a memory are held."""
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_try_to_lock, args=(theirs,))
    child.start()

    def ask(folder):
        ours.send(os.path.join(folder, "joblib", "claims"))
        return ours.recv()

    yield ask
    ours.send("")
    child.join()


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_at_every_claim(tmp_path, monkeypatch, is_claimed, when):
    lock = _claims.Claims._lock
    calls = []

    def press(self, place):
        calls.append(place)
        found = when == "before" or lock(self, place)
        if len(calls) == stop:
            signal.raise_signal(signal.SIGINT)
        return found if when == "after" else lock(self, place)

    model, images = extractor(memory=str(tmp_path)), pictures(64)
    with monkeypatch.context() as patch:
        patch.setattr(_claims.Claims, "_lock", press)
        for stop in (1, *range(35, 65)) if when == "before" else range(1, 65):
            calls.clear()
            with pytest.raises(KeyboardInterrupt):
                model.transform(images)
            assert len(calls) == stop
            assert not is_claimed(tmp_path)
            assert not check_memory(tmp_path)._claims._owners
    np.testing.assert_array_equal(model.transform(images), extractor().transform(images))


def is_finalizer(frame, files):
    """Python itself drops what is raised there."""
    while frame.f_code.co_filename in files:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


class CtrlC:
    """Presses Ctrl-C where CPython looks for signals, at the n-th such place in our files.

    That is behind calls and jumps back, and where a function begins; not between the two steps of
    leaving a lock, for instance, and not on the way from a call that raises to its handler: there
    the handler's exception would stay the current one of the thread for ever.
    """

    looks = ("CALL", "RESUME", "JUMP_BACKWARD")

    def __init__(self, *at, files=FILES):
        self.left, self.files = list(at), files
        self.n_places = 0
        self.before = {}  # of a frame: the instruction that ran last
        self.where = []

    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename not in self.files or is_finalizer(frame, self.files):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self.look

    def look(self, frame, event, arg):
        if event in ("return", "exception"):
            self.before.pop(frame, None)
        elif event == "opcode":
            before, self.before[frame] = self.before.get(frame), frame.f_lasti
            if before is not None:
                name = dis.opname[frame.f_code.co_code[before]]
                if name.startswith(self.looks):
                    self.count(frame)
        return self.look

    def count(self, frame):
        self.n_places += 1
        if self.left and self.n_places == self.left[0]:
            del self.left[0]
            self.n_places = 0
            self.where.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
            raise KeyboardInterrupt

    def during(self, function, *args):
        sys.settrace(self)
        try:
            function(*args)
        except KeyboardInterrupt as error:
            self.error = error  # as a notebook keeps the last one, with all frames
        finally:
            sys.settrace(None)
            self.before.clear()


def press_at(places, folder, images, is_claimed):
    """Press Ctrl-C at these places of a transform; return the extractor when all is well."""
    model, ctrl_c = extractor(memory=str(folder)), CtrlC(*places)
    ctrl_c.during(model.transform, images)
    # By then it may be over: not every run comes by as many places as the one that was counted.
    assert ctrl_c.where or places[0] > 300
    for thread in threading.enumerate():
        if (
            thread.name.endswith("(_clean_up)") and thread.is_alive()
        ):  # a second Ctrl-C keeps one from waiting for it
            thread.join()
    assert not is_claimed(folder), ctrl_c.where
    assert not check_memory(folder)._claims._owners, ctrl_c.where
    return model


def n_places(folder):
    """Count the places in a transform of three images."""
    seen = CtrlC()
    extractor(memory=str(folder)).transform(pictures(3))  # loads what comes later, too
    seen.during(extractor(memory=str(folder)).transform, pictures(3, 1))
    assert seen.n_places > 300
    return seen.n_places


@pytest.mark.parametrize("is_new", [False, True], ids=["memory", "new memory"])
def test_ctrl_c_anywhere(tmp_path, is_claimed, is_new):
    """At every 29th place; benchmarks/interrupts.py presses at random moments."""
    for n in range(1 + 14 * is_new, n_places(tmp_path), 29):
        folder, images = tmp_path / str(n) if is_new else tmp_path, pictures(3, n + 1)
        model = press_at([n], folder, images, is_claimed)
        np.testing.assert_array_equal(model.transform(images), extractor().transform(images))


def test_ctrl_c_twice(tmp_path, is_claimed):
    """The second one comes while the first one is dealt with."""
    for n in range(60, n_places(tmp_path), 60):
        for further in (1, 2, 4):
            images = pictures(3, 4 * n + further)
            model = press_at([n, further], tmp_path, images, is_claimed)
            np.testing.assert_array_equal(model.transform(images), extractor().transform(images))


def test_threads_that_share_an_estimator_go_on(tmp_path, is_claimed):
    """Of two threads in the same transform, one is interrupted while it claims."""
    images, model = pictures(8), extractor(memory=str(tmp_path))
    n_places(tmp_path)
    with ThreadPoolExecutor(2) as threads:
        for n in range(5):
            images = pictures(8, 100 + n)
            others = [threads.submit(model.transform, images) for _ in range(2)]
            CtrlC(40 * n + 150).during(model.transform, images)
            for other in others:
                np.testing.assert_array_equal(other.result(300), extractor().transform(images))
    assert not is_claimed(tmp_path)


# PIL images ---------------------------------------------------------------------------------------


def test_ctrl_c_leaves_no_pil_image_locked():
    files = {_decoding.__file__, contextlib.__file__}
    image = Image.fromarray(pictures(1)[0])
    load_image(image)  # the first time comes by more places
    seen = CtrlC(files=files)
    seen.during(load_image, image)
    assert seen.n_places > 30
    for n in range(1, seen.n_places):
        ctrl_c, image = CtrlC(n, files=files), Image.fromarray(pictures(1)[0])
        ctrl_c.during(load_image, image)
        assert ctrl_c.where
        assert not _decoding._lock_of(image).locked(), ctrl_c.where
    del ctrl_c
    gc.collect()  # of what decoded nothing is left, so nothing is said of it any more
    assert _messages._current("where") is _messages._current("warnings") is None


# The lock of the networks, and torch's default ----------------------------------------------------


def run_and_build():
    """Do with the locks what a batch does, and what creates or traces a network."""
    own = threading.Lock()
    with network_lock.shared(), float32_by_default():
        assert torch.zeros(1).dtype == torch.float32
        with own, ready_to_train(own):
            assert torch.zeros(1).dtype == torch.float32
    with chance_lock, Chance(0).in_torch(), ready_to_train(chance_lock):
        assert torch.zeros(1).dtype == torch.float32
    network_lock.alone(trace)


def trace():
    with float32_by_default(), network_lock.shared(), float32_by_default():
        assert torch.zeros(1).dtype == torch.float32


def take_all():
    """Take every lock, as another thread would."""
    network_lock.alone(bool)
    assert chance_lock.acquire(timeout=300)
    chance_lock.release()


def assert_back():
    """Nothing is locked, and torch makes what its user has asked for."""
    for thread in threading.enumerate():
        if thread.name.endswith("(_leave_after)"):
            thread.join(300)
    other = threading.Thread(target=take_all, daemon=True)
    other.start()
    other.join(300)
    assert not other.is_alive()
    assert torch.get_default_dtype() == torch.float64


@pytest.mark.parametrize("further", [(), (1,), (2,), (5,)], ids=str)
def test_ctrl_c_leaves_no_network_locked(further):
    torch.set_default_dtype(torch.float64)
    with ThreadPoolExecutor(1) as others:
        others.submit(network_lock.shared).result()  # its lock is one of those to take
        try:
            run_and_build()  # the first time comes by more places
            seen = CtrlC(files=HERE)
            seen.during(run_and_build)
            assert seen.n_places > 60
            for n in range(1, seen.n_places):
                ctrl_c = CtrlC(n, *further, files=HERE)
                ctrl_c.during(run_and_build)
                assert ctrl_c.where
                assert_back()
            run_and_build()
            assert_back()
        finally:
            torch.set_default_dtype(torch.float32)
