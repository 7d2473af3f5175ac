import multiprocessing
import os
import signal
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from networks import small
from PIL import Image
from processes import start_code
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils import shuffle

from sktransfer import PretrainedFeatureExtractor
from sktransfer._engine import cut_network
from sktransfer._engine import runner as _inference
from sktransfer._engine.cut_network import layout_of
from sktransfer._engine.device import warn_of_copies
from sktransfer._estimators.pretrained import embedding_of
from sktransfer.io import check_images
from sktransfer.models import Backbone


def extractor(memory, **options):
    return PretrainedFeatureExtractor(small(), image_size=32, memory=memory, **options)


# ------------------------------------------------------------------------------ every image once


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_a_search_runs_every_image_once(tiles, tmp_path, run_log, n_jobs):
    _, paths, labels = tiles
    pipeline = make_pipeline(extractor(tmp_path / "m"), StandardScaler(), SVC())

    def search(grid, X, y):
        GridSearchCV(pipeline, grid, cv=2, n_jobs=n_jobs, error_score="raise").fit(X, y)

    grid = {"svc__C": [0.1, 10]}
    search(grid, paths[:-1], labels[:-1])
    runs = Counter(run_log())
    assert len(runs) == len(paths) - 1 and set(runs.values()) == {1}
    search({"svc__C": [2]}, paths[:-1], labels[:-1])
    search(grid, *shuffle(paths[:-1], labels[:-1], random_state=0))
    assert len(run_log()) == len(paths) - 1
    search(grid, paths, labels)  # one image more: one run more
    assert len(run_log()) == len(paths)


def told() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_copies(torch.device("cuda"))
    return [str(warning.message) for warning in caught]


def test_workers_on_one_gpu_are_warned():
    """Behind a test whose workers are idle now: importing torch takes new ones seconds."""
    assert multiprocessing.parent_process() is None and told() == []
    for messages in joblib.Parallel(n_jobs=2)(joblib.delayed(told)() for _ in range(2)):
        assert len(messages) == 1 and "n_jobs=1" in messages[0]


def test_two_threads_share_the_work(tiles, tmp_path, run_log):
    _, paths, _ = tiles
    jobs = (joblib.delayed(extractor(tmp_path / "m").transform)(paths) for _ in range(2))
    first, second = joblib.Parallel(2, backend="threading")(jobs)
    np.testing.assert_array_equal(first, second)
    assert set(Counter(run_log()).values()) == {1}


def test_two_threads_trace_once(monkeypatch):
    traced = []

    class Counted(cut_network.TracedNetwork):
        def __init__(self, *args):
            traced.append(args)
            super().__init__(*args)

    monkeypatch.setattr(cut_network, "TracedNetwork", Counted)
    runner = _inference.get_runner(Backbone(small()), "cpu", "float32", "torch", (32, 32))
    with ThreadPoolExecutor(2) as threads:
        with _inference.network_lock.shared():  # both have looked, and wait
            found = [threads.submit(lambda: runner.trace) for _ in range(2)]
            time.sleep(0.1)
        assert found[0].result() is found[1].result()
    assert len(traced) == 1


def test_equal_images_run_once_in_one_call(tiles, tmp_path, run_log):
    _, paths, _ = tiles
    X = paths[:5] * 30
    rows = extractor(tmp_path / "m").transform(X)
    np.testing.assert_array_equal(rows, np.tile(rows[:5], (30, 1)))
    assert len(run_log()) == 5


@pytest.mark.parametrize("make", [str, lambda p: joblib.Memory(p, verbose=0)])
def test_hits_by_content_whatever_else_differs(tiles, tmp_path, run_log, make):
    _, paths, _ = tiles
    memory = make(tmp_path / "m")
    rows = extractor(memory).transform(paths)
    assert len(run_log()) == 40
    renamed = tmp_path / "another name.jpeg"
    renamed.write_bytes(Path(paths[3]).read_bytes())
    again = extractor(memory).transform([paths[7], renamed])
    np.testing.assert_array_equal(again, rows[[7, 3]])
    again = extractor(memory).transform([Path(paths[9]).read_bytes()])
    np.testing.assert_array_equal(again, rows[[9]])
    assert len(run_log()) == 40


def test_what_shapes_the_result_is_part_of_the_key(tiles, tmp_path, run_log):
    _, paths, _ = tiles
    memory, X = tmp_path / "m", paths[:4]
    extractor(memory).transform(X)
    variants = [
        {"image_size": 48},
        {"pooling": "max", "layer": "stem"},
        {"layer": "stem"},
        {"layer": "output"},
        {"precision": "bfloat16"},
        {"backbone": small(1)},
    ]
    for n, options in enumerate(variants, 2):
        extractor(memory).set_params(**options).transform(X)
        assert len(run_log()) == 4 * n, options
    for options in variants:
        fresh = extractor(None).set_params(**options).transform(X)
        kept = extractor(memory).set_params(**options).transform(X)
        np.testing.assert_array_equal(fresh, kept)


def test_a_changed_file_is_computed_again(tiles, tmp_path, run_log):
    _, paths, _ = tiles
    copy = tmp_path / "copy.jpg"
    copy.write_bytes(Path(paths[0]).read_bytes())
    first = extractor(tmp_path / "m").transform([copy])
    copy.write_bytes(Path(paths[30]).read_bytes())
    assert not np.allclose(extractor(tmp_path / "m").transform([copy]), first)
    assert len(run_log()) == 2


def test_a_file_that_changes_between_look_up_and_decoding_is_no_wrong_row(tiles, tmp_path):
    _, paths, _ = tiles
    copy = tmp_path / "copy.jpg"
    copy.write_bytes(Path(paths[0]).read_bytes())
    embedding = embedding_of(extractor(tmp_path / "m"))
    images = check_images([copy])
    digest = images.digest(0)
    copy.write_bytes(Path(paths[1]).read_bytes())
    embedding._images = images
    with pytest.raises(ValueError, match=r"row 0 .*copy\.jpg.*changed while it was read"):
        embedding._load(0, digest)


def test_pooling_is_no_part_of_the_key_where_there_is_nothing_to_pool(tiles, tmp_path, run_log):
    _, paths, _ = tiles
    extractor(tmp_path / "m", pooling="avg").transform(paths)
    extractor(tmp_path / "m", pooling="max").transform(paths)
    assert len(run_log()) == len(paths)


# ------------------------------------------------------------------------------ faults


def test_what_was_computed_before_a_bad_image_is_kept(tiles, tmp_path, run_log):
    _, paths, _ = tiles
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"not an image")
    model = extractor(tmp_path / "m", batch_size=4)
    with pytest.raises(ValueError, match=r"row 30 .*bad\.jpg"):
        model.transform([*paths[:30], str(bad), *paths[30:]])
    before = len(run_log())
    assert before >= 16
    model.transform(paths)
    assert len(run_log()) == len(paths)


def test_a_bad_image_loses_no_other_of_its_task(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3)).astype(np.uint8)
    paths = [tmp_path / f"{number}.png" for number in range(48)]
    for path, each in zip(paths, pixels, strict=True):
        Image.fromarray(each).save(path)
    paths[17].write_bytes(b"not an image")
    model = extractor(tmp_path / "m", runtime="openvino", n_jobs=2)
    with pytest.raises(ValueError, match=r"row 17 .*17\.png"):
        model.transform(paths)
    others = [paths[16], paths[18], paths[19]]  # which the same thread loads and runs
    embedding = embedding_of(model)
    rows = embedding(check_images(others))
    assert embedding.n_computed == 0
    expected = extractor(None, runtime="openvino").transform(others)
    np.testing.assert_array_equal(rows, expected)


def test_an_array_gives_the_rows_of_its_images(tmp_path, run_log):
    X = np.random.default_rng(0).integers(0, 256, (40, 36, 50, 3)).astype(np.uint8)
    expected = extractor(None).transform(list(X))
    frozen = X[::-1].copy()
    frozen.flags.writeable = False  # as joblib gives it to workers
    np.testing.assert_array_equal(extractor(None).transform(frozen), expected[::-1])
    model = extractor(tmp_path / "m")
    for some in ([3, 8, 5], slice(None)):
        np.testing.assert_array_equal(model.transform(X[some]), expected[some])
        pixels = X.astype(float)[some] / 255
        np.testing.assert_array_equal(model.transform(pixels), expected[some])  # of the memory
    grey = X[..., 0]
    np.testing.assert_array_equal(
        model.transform(grey), model.transform(np.repeat(grey[..., None], 3, 3))
    )
    assert max(Counter(run_log()).values()) == 3  # without a memory twice, with one once


def test_a_block_is_of_the_digests_it_was_asked_for():
    X = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    images = check_images(X)[[5, 1, 2, 3]]
    digests = [images.digest(row) for row in range(4)]
    assert np.array_equal(
        images.block([0, 3], digests[:1] + digests[3:]).permute(0, 2, 3, 1), X[[5, 3]]
    )
    X[2] += 1  # while its embedding is computed
    assert images.block(range(4), digests) is None
    with pytest.raises(ValueError, match="row 2: the file changed while it was read"):
        images.load(2, digests[2])
    assert check_images(list(X)).block([0, 1]) is None


SCRIPT = """
import itertools, signal, sys, threading, time
from networks import small
from sktransfer import PretrainedFeatureExtractor
import sktransfer._engine.embedding as embedding
pixels, numbers, interrupted = embedding.Embedding._load, itertools.count(), threading.Event()
def interrupt(*args):
    interrupted.set()
    raise KeyboardInterrupt
signal.signal(signal.SIGINT, interrupt)
def slow(self, *args):          # one image takes long enough for a person to press Ctrl-C
    time.sleep(0.1)
    if next(numbers) >= 24:     # however late that is
        interrupted.wait(600)
    return pixels(self, *args)
embedding.Embedding._load = slow
model = PretrainedFeatureExtractor(small(), image_size=32, memory=sys.argv[1], batch_size=2)
model.transform(sys.argv[2:])
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_goes_on_where_it_stopped(tiles, tmp_path, run_log, sent):
    _, paths, _ = tiles
    memory = str(tmp_path / "m")
    child, _, errors = start_code(SCRIPT, memory, *paths)
    deadline = time.monotonic() + 300
    while len(run_log()) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, sent)
    child.join(300)
    assert child.exitcode == (-sent if sent == signal.SIGKILL else 1)
    assert ("KeyboardInterrupt" in errors.read_text()) == (sent == signal.SIGINT)
    before = len(run_log())
    assert 10 <= before < len(paths)
    rows = extractor(memory).transform(paths)
    again = len(run_log()) - len(paths)  # computed twice: the batches that were in flight
    assert again <= (4 if sent == signal.SIGINT else 12)
    np.testing.assert_array_equal(rows, extractor(None).transform(paths))


def test_an_unusable_memory_warns_once_and_computes(tiles, tmp_path):
    _, paths, _ = tiles
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning) as caught:
        rows = extractor(tmp_path / "file" / "memory").transform(paths)
    assert len(caught) == 1 and "file" in str(caught[0].message)
    np.testing.assert_array_equal(rows, extractor(None).transform(paths))


# ------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize(
    "shape, size, layout",
    [
        ((5,), (32, 32), "vector"),
        ((50, 8), (32, 32), "tokens"),
        ((8, 4, 4), (32, 32), "map"),
        ((4, 4, 8), (32, 32), "map_last"),
        ((8, 8, 8), (32, 32), "map"),
        ((8, 4, 6), (32, 48), "map"),
        ((4, 6, 8), (32, 48), "map_last"),
        ((2, 3, 4, 5), (32, 32), "other"),
    ],
)
def test_layouts(shape, size, layout):
    assert layout_of(shape, size) == layout
