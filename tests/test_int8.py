"""Networks in 8 bits: rows, what the memory keeps, and what can't be had."""

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import psutil
import pytest
import timm
import torch
from networks import Untraceable, small
from torch import nn

from sktransfer import (
    ContrastivePretrainer,
    FineTunedClassifier,
    FineTunedRegressor,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
    get_model,
)
from sktransfer._cli import main
from sktransfer._engine import nncf_child, quantising, runner, runtime
from sktransfer._engine.nncf_child import quantise
from sktransfer._engine.openvino_program import read_model
from sktransfer._engine.program_file import ProgramFile
from sktransfer._engine.quantising import run_apart
from sktransfer._engine.runner import get_runner
from sktransfer._engine.runtime import check_can_quantise
from sktransfer._estimators.pretrained import embedding_of
from sktransfer._memory.memory import check_memory
from sktransfer.io import check_images

pytest.importorskip("nncf", reason="needs the extra int8")

SIZE = 32


class Residual(nn.Module):
    """A stem, two residual blocks, of which OpenVINO makes other sums if asked for, and a head."""

    def __init__(self, between=None):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6())
        self.between = nn.Identity() if between is None else between
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, 1, 1) for _ in range(3))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.between(self.stem(x))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


def residual(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Residual(**options)


@pytest.fixture(autouse=True)
def makes(monkeypatch):
    """Let NNCF work on few crops, in this process, whose import takes seconds; return the calls."""
    made = []

    def run_here(folder):
        made.append(folder)
        classes = logging.getLoggerClass()
        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setitem(sys.modules, "openvino_telemetry", None)
            quantise(folder)
        logging.setLoggerClass(classes)

    monkeypatch.setattr(quantising, "_N_CROPS", 4)
    monkeypatch.setattr(quantising, "run_apart", run_here)
    return made


def extractor(backbone, **options):
    return PretrainedFeatureExtractor(
        backbone, **{"precision": "int8", "image_size": SIZE, **options}
    )


def pictures(n=3, seed=0):
    return np.random.default_rng(seed).integers(256, size=(n, SIZE, SIZE, 3), dtype=np.uint8)


def anew(network):
    """Return a network of which this process knows nothing, as another one would load it."""
    backbone = get_model(network)
    backbone.runners.clear()
    return backbone


# ------------------------------------------------------------------------------ rows


def test_rows_are_those_of_float32_nearly(photos):
    network = residual(10)
    for layer in ("auto", "output", 1):
        rows = extractor(network, layer=layer).transform(photos)
        exact = extractor(network, layer=layer, precision="float32").transform(photos)
        assert rows.dtype == np.float32 and rows.shape == exact.shape
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(exact, axis=1)
        assert ((rows * exact).sum(1) / lengths > 0.95).all() and (rows != exact).any()


def test_a_row_does_not_depend_on_what_else_is_asked_for(tmp_path, makes):
    network, X = residual(11), pictures()
    layers = [0, 1, 2, 3, "output"]
    for pooling in ("avg", "max", "flatten"):
        widths = [16 * 16 * 16 if pooling == "flatten" else 16] * 4 + [3]
        together = extractor(network, layer=layers, pooling=pooling, memory=tmp_path / "one")
        parts = np.split(together.transform(X), np.cumsum(widths)[:-1], axis=1)
        check_memory(tmp_path / "one").memory.reduce_size(items_limit=0)  # rows
        anew(network)
        for layer, part in zip(layers, parts, strict=True):
            alone = together.set_params(layer=layer)
            assert np.array_equal(alone.transform(X), part), layer
    assert len(makes) == 1


def test_a_network_is_quantised_the_same_way_every_time():
    backbone = get_model(residual(11))
    mine = get_runner(backbone, "cpu", "int8")
    preprocessing = backbone.preprocessing.with_size(SIZE)
    first, second = (quantising._make(mine, preprocessing) for _ in range(2))
    assert first.digest == second.digest and first.cosine == second.cosine > 0.95
    images = quantising.calibration_images(preprocessing)
    assert images.shape == (4, SIZE, SIZE, 3) and images.dtype == np.uint8
    assert np.array_equal(images, quantising.calibration_images(preprocessing))
    is_grey = (images == images[..., :1]).all((1, 2, 3))
    assert is_grey.tolist() == [False, False, True, True]


def test_small_networks_of_tokens(photos):
    torch.manual_seed(0)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, depth=2, embed_dim=64, num_heads=2
    )
    model = extractor(network, pooling="token")
    rows = model.set_params(layer=[0, "auto"]).transform(photos)
    alone = model.set_params(layer=0).transform(photos)
    assert np.array_equal(rows[:, :64], alone)


def test_all_that_run_a_frozen_network_take_it(tmp_path, tiles, capsys, makes):
    root, paths, y = tiles
    backbone = get_model(small())
    options = {"precision": "int8", "image_size": SIZE, "memory": tmp_path}
    found = PretrainedClassifier(backbone, **options).predict_proba(paths[:4])
    assert np.allclose(found.sum(1), 1, atol=1e-5)
    model = FineTunedClassifier(backbone, unfreeze=0, random_state=0, **options).fit(paths, y)
    assert model.score(paths, y) > 0.5
    FineTunedRegressor(backbone, unfreeze=0, **options).fit(paths, np.arange(len(y)))
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(paths), model.predict_proba(paths))
    assert model.to_feature_extractor().transform(paths[:2]).shape == (2, 16)
    assert len(makes) == 1


# ------------------------------------------------------------------------------ the memory


def test_the_memory_keeps_the_network(tmp_path, makes):
    network, X = residual(12), pictures(5)
    rows = extractor(network, memory=tmp_path).transform(X[:3])
    (path,) = tmp_path.rglob("*.quantised")
    again = extractor(anew(network), memory=tmp_path)
    assert np.array_equal(again.transform(X)[:3], rows) and len(makes) == 1
    embedding = embedding_of(again)
    embedding(check_images(X))
    assert embedding.n_computed == 0
    assert check_memory(tmp_path).info()["n_bytes"] > path.stat().st_size
    exact = embedding_of(extractor(network, memory=tmp_path, precision="float32"))
    exact(check_images(X))
    assert exact.n_computed == 5
    check_memory(tmp_path).memory.clear(warn=False)
    assert not path.exists()


def test_a_network_that_is_damaged_is_made_anew(tmp_path, makes):
    network, X = residual(44), pictures()
    model = extractor(network, memory=tmp_path)
    rows = model.transform(X)
    place, folder = model.load_network(), check_memory(tmp_path).companions
    file = quantising._file(*place, folder)
    whole, made = file.path.read_bytes(), quantising._kept(file)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (b"", b"anything", whole[:20], whole + b"0", flipped, whole[:-1]):
        file.path.write_bytes(damaged)
        assert quantising._kept(file) is None
    other = ProgramFile(folder, "another network", suffix=".quantised")
    other.path.write_bytes(whole)
    assert quantising._kept(other) is None
    for program in file.path.parent.glob("*.program"):
        program.unlink()
    check_memory(tmp_path).memory.reduce_size(items_limit=0)  # rows
    anew(network)
    assert np.array_equal(model.transform(X), rows)
    assert quantising._kept(file).digest == made.digest and len(makes) == 2


def test_a_network_of_another_version_is_made_anew(tmp_path, makes, monkeypatch):
    network, X = residual(14), pictures()
    extractor(network, memory=tmp_path).transform(X)
    for module in (quantising, runner):
        monkeypatch.setattr(module, "versions", lambda: ("1", "3.5", "2026.4"))
    extractor(anew(network), memory=tmp_path).transform(X)
    assert len(makes) == 2 and len(list(tmp_path.rglob("*.quantised"))) == 2


@pytest.mark.parametrize("keeps", [True, False])
def test_who_needs_the_same_network_waits_for_it(keeps, tmp_path, makes):
    backbone, X = get_model(residual(15 + keeps)), pictures()
    # Another object of the same network is what another process has.
    others = [backbone, anew(backbone) if keeps else backbone]
    models = [extractor(b, memory=tmp_path if keeps else None) for b in others]
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda model: model.transform(X), models)
    assert np.array_equal(first, second) and len(makes) == 1


def test_a_folder_that_cannot_be_written(tmp_path, makes):
    (tmp_path / "file").write_text("no folder")
    backbone = get_model(residual(36))
    mine = get_runner(backbone, "cpu", "int8")
    place = backbone.preprocessing.with_size(SIZE), str(tmp_path / "file" / "compiled")
    assert mine._quantised.get(*place) is mine._quantised.get(*place)
    assert len(makes) == 1


# ------------------------------------------------------------------------------ the process of NNCF


def test_nncf_works_apart_and_in_silence(tmp_path, monkeypatch, capfd):
    monkeypatch.undo()  # what runs it here
    monkeypatch.setattr(quantising, "_N_CROPS", 2)
    loggers = logging.getLoggerClass()
    rows = extractor(residual(17)).transform(pictures())
    assert rows.shape == (3, 16)
    assert capfd.readouterr() == ("", "") and logging.getLoggerClass() is loggers


def test_what_nncf_says_of_a_failure(tmp_path):
    np.save(tmp_path / "images.npy", pictures(1))
    assert "network.xml" in run_apart(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_it_ends_with_who_started_it_and_its_end_is_told(tmp_path):
    os.mkfifo(tmp_path / "images.npy")  # it waits for them
    command = [sys.executable, nncf_child.__file__, str(tmp_path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.communicate(timeout=300) == (None, b"")
    assert child.returncode == 1

    others = {*psutil.Process().children()}
    with ThreadPoolExecutor(1) as thread:
        failure = thread.submit(run_apart, tmp_path)
        while not (started := {*psutil.Process().children()} - others):
            time.sleep(0.01)
        started.pop().kill()
        assert "signal 9 ended NNCF" in failure.result()


@pytest.mark.skipif(sys.platform == "win32", reason="has no signals of threads")
def test_an_interruption_ends_it_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.undo()
    model = extractor(residual(18), memory=tmp_path)
    me, started = psutil.Process(), threading.Event()
    others = {*me.children()}  # the servers of other tests' processes

    def interrupt():
        while not {*me.children()} - others:
            time.sleep(0.01)
        started.set()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        model.transform(pictures())
    assert started.is_set() and not {*me.children()} - others
    assert not list(tmp_path.rglob("*.quantised"))


# ------------------------------------------------------------------------------ refusals


class Bessel(nn.Module):
    """An operation that OpenVINO does not know."""

    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_networks_that_cannot_be_quantised(makes):
    for network, reason in [
        (residual(between=Bessel()), "No conversion rule found for.*bessel"),
        (Untraceable(), "it can't be traced"),
    ]:
        model = extractor(network, layer="output")
        with pytest.raises(ValueError, match=f"'int8': .*{reason}.* Use precision='bfloat16'"):
            model.transform(pictures())
    assert not makes


def test_a_failure_of_nncf_is_told(monkeypatch):
    monkeypatch.setattr(quantising, "run_apart", lambda folder: "RuntimeError: no such pattern")
    with pytest.raises(ValueError, match=r"'int8': RuntimeError: no such pattern\. Use precision"):
        extractor(residual(19)).transform(pictures())


def test_an_nncf_that_can_not_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ImportError, match="NNCF can't be imported .*pip install --upgrade nncf"):
        nncf_child._quantised(None, [], halves_weights=False)


def test_a_loss_warns_and_a_large_one_is_an_error(monkeypatch, tmp_path):
    network = residual(20)
    monkeypatch.setattr(quantising, "_WARN_BELOW", 1.1)
    with pytest.warns(UserWarning, match=r"mean cosine .* is (0\.9\d\d|1\.000) on 4 crops.*Use pr"):
        extractor(network, memory=tmp_path).transform(pictures())
    extractor(anew(network), memory=tmp_path).transform(pictures())  # said once
    monkeypatch.setattr(quantising, "_REFUSE_BELOW", 1.1)
    with pytest.raises(ValueError, match="mean cosine .* Use precision='bfloat16' or 'float32'"):
        extractor(anew(network), memory=tmp_path).transform(pictures(seed=1))
    mine, made = get_runner(get_model(network), "cpu", "int8"), quantising.Made(b"", b"", {}, 0, "")
    with pytest.raises(ValueError, match="is nan on"):
        quantising.check_loss(mine, made._replace(cosine=float("nan")))


def test_a_loss_may_be_an_error_and_the_network_is_kept(monkeypatch, tmp_path, makes):
    network = residual(23)
    monkeypatch.setattr(quantising, "_WARN_BELOW", 1.1)
    for _ in range(2):  # pytest makes errors of warnings
        with suppress(UserWarning):
            extractor(anew(network), memory=tmp_path).transform(pictures())
    assert len(makes) == 1


def test_where_it_cannot_be_had(monkeypatch):
    with pytest.raises(ValueError, match=r"device is 'cuda:0'\. Pass precision='bfloat16'"):
        check_can_quantise("auto", torch.device("cuda:0"))
    with pytest.raises(ValueError, match="Pass runtime='auto' or 'openvino'"):
        extractor(small(), runtime="torch").transform(pictures())
    for package in ("nncf", "openvino"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(ImportError, match=rf"{package}.*pip install '\.\[int8\]'"):
                extractor(small()).transform(pictures())


def test_blocks_are_not_trained_in_it():
    X, y = pictures(6), [0, 1] * 3
    for unfreeze in (1, "all", "auto"):
        model = FineTunedClassifier(small(), unfreeze=unfreeze, precision="int8", image_size=SIZE)
        with pytest.raises(ValueError, match="can't be trained in 8 bits. Pass unfreeze=0"):
            model.fit(X, y)
    with pytest.raises(ValueError, match=r"'precision' parameter.*'bfloat16'.*Got 'int8'"):
        ContrastivePretrainer(small(), precision="int8").fit(X)


def test_a_full_disk():
    resource = pytest.importorskip("resource", reason="needs limits of files")
    model = extractor(residual(22))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(ValueError, match="'int8': .*is the disk of .* full"):
            model.transform(pictures())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert model.transform(pictures()).shape == (3, 16)


def test_a_cpu_without_instructions_is_told(monkeypatch):
    monkeypatch.setattr(runtime, "has_int8", lambda: False)
    message = r"no instructions for 8 bits \(VNNI\): precision='int8' gains less here"
    with pytest.warns(UserWarning, match=message):
        slow = extractor(get_model(small(3))).transform(pictures())  # and works
    monkeypatch.setattr(runtime, "has_int8", lambda: True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message)
        get_runner(anew(small(3)), "cpu", "int8")
    assert np.isfinite(slow).all()


def _largest_weight(made):
    """Return that of all layers but the first, whose range is always halved."""
    model = read_model(made.graph, made.weights)
    weights = [
        np.abs(node.data.astype(int)).max()
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and node.get_element_type().to_string() == "i8"
    ]
    return max(weights[1:])


def test_weights_have_half_of_their_range_where_sums_overflow(monkeypatch):
    names = []  # of what the keys of rows and of kept networks hold
    for seed, (has_int8, largest) in enumerate([(True, 127), (False, 64)]):
        monkeypatch.setattr(quantising, "has_int8", lambda value=has_int8: value)
        quantising.versions.cache_clear()
        found = embedding_of(extractor(residual(30 + seed)))
        made = found.runner.in_8_bits(found.preprocessing).made
        assert largest / 2 < _largest_weight(made) <= largest
        names.append(quantising.versions())
    quantising.versions.cache_clear()
    assert names[0] != names[1]


def _ask_in_fork(connection, model):
    try:
        model.transform(pictures())
    except RuntimeError as error:
        connection.send(str(error))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_is_told_what_to_do():
    model = extractor(residual(21))
    model.transform(pictures())
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_ask_in_fork, args=(theirs, model))
    process.start()
    assert mine.poll(300) and "'spawn' or 'forkserver'" in mine.recv()
    process.join()


def test_the_command_line(tiles, tmp_path, capsys):
    options = ["--depth", "1", "--precision", "int8", "-o", str(tmp_path / "model.skops")]
    assert main(["fit", str(tiles[0]), *options])
    assert "can't be trained in 8 bits. Pass --depth 0" in capsys.readouterr().err
