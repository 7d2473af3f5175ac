"""OpenVINO or torch: the same rows, and what happens when OpenVINO can't do it."""

import copy
import gc
import os
import pickle
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from networks import Untraceable, small
from processes import run_code
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock

from sktransfer import FineTunedClassifier, PretrainedFeatureExtractor, get_model
from sktransfer._engine import openvino_program
from sktransfer._engine.augmentation import Augmentation, Views
from sktransfer._engine.folding import fold_batch_norms
from sktransfer._engine.frozen import Activations, FrozenBlocks
from sktransfer._engine.openvino_program import OpenVinoProgram
from sktransfer._engine.program import Output
from sktransfer._engine.program_file import KeptProgram, ProgramFile
from sktransfer._engine.runner import get_runner
from sktransfer._engine.runtime import has_bfloat16, is_worth_compiling
from sktransfer._estimators.pretrained import embedding_of
from sktransfer._memory.memory import check_memory
from sktransfer._torch_state import network_lock
from sktransfer.io import check_images

pytestmark = pytest.mark.usefixtures("two_threads")  # and streams

SIZE = 64  # pixels: the smallest that keeps positions until the last blocks


def extractor(runtime="openvino", **options):
    return PretrainedFeatureExtractor(runtime=runtime, **{"image_size": SIZE, **options})


def difference(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


class Wide(nn.Module):
    """A network that is large enough for `runtime="auto"` to choose OpenVINO."""

    def __init__(self, between=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 350, 5, 2)
        self.between = nn.Identity() if between is None else between
        self.wide = nn.Conv2d(350, 350, 1)
        self.head = nn.Linear(350, 2)

    def forward(self, x):
        x = self.wide(self.between(self.conv(x)).relu())
        return self.head(x.mean((2, 3)))


class Bessel(nn.Module):
    """An operation that OpenVINO does not know."""

    def forward(self, x):
        return torch.special.bessel_j0(x.float())


def test_rows_of_both_agree(photos):
    X = photos * 2
    options = {"layer": ["blocks.2", "auto", "output"], "pooling": "max"}
    rows = extractor(**options).transform(X)
    assert rows.dtype == np.float32
    assert difference(rows, extractor("torch", **options).transform(X)) < 1e-3
    runner, _ = extractor("auto").load_network()
    assert runner.runtime == "openvino"


ARCHITECTURES = {
    "resnet": lambda: models.ResNet(BasicBlock, [1, 1, 1, 1]),
    "shufflenet": lambda: models.ShuffleNetV2([2, 2, 2], [24, 48, 96, 192, 256]),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", img_size=SIZE, depth=2),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name, photos):
    backbone = ARCHITECTURES[name]()
    a, b = (extractor(rt, backbone=backbone) for rt in ("openvino", "torch"))
    assert difference(a.transform(photos), b.transform(photos)) < 1e-3


def test_a_row_does_not_depend_on_the_others(photos):
    rows = extractor().transform([*photos, *photos, photos[0]])
    assert (rows[:2] == extractor().transform(photos)).all()
    assert (rows[4] == rows[0]).all()


def test_a_single_image_takes_all_cores(photos):
    model = extractor(backbone=Wide())
    runner, _ = model.load_network()
    runner._n_cores = 2
    rows = model.transform(photos)
    row = model.transform(photos[:1])
    assert {streams for *_, streams in runner._programs} == {1, 2}
    assert difference(row, rows[:1]) < 1e-5


def test_any_slice_runs_on_either():
    X = np.random.default_rng(0).integers(256, size=(3, SIZE, SIZE, 3), dtype=np.uint8)
    backbone = get_model("efficientnet_lite0")
    preprocessing = backbone.preprocessing.with_size(SIZE)
    found = {}
    for runtime in ("torch", "openvino"):
        frozen = FrozenBlocks(get_runner(backbone, "cpu", "float32", runtime), preprocessing, "avg")
        views = Views(check_images(X), preprocessing, Augmentation(None, None, preprocessing.size))
        found[runtime] = Activations(frozen, [3, 11, frozen.embedding])(views)
    for mine, theirs in zip(found["openvino"], found["torch"], strict=True):
        # Rounding to half precision at each cut turns a last digit into a thousandth.
        assert difference(mine.astype(np.float32), theirs.astype(np.float32)) < 1e-2


def test_the_memory_is_shared_in_float32_alone():
    backbone = get_model("efficientnet_lite0")
    keys = {
        (precision, runtime): get_runner(backbone, "cpu", precision, runtime).key(
            2, "avg", backbone.preprocessing
        )
        for precision in ("float32", "bfloat16")
        for runtime in ("torch", "openvino")
    }
    assert keys["float32", "torch"] == keys["float32", "openvino"]
    assert len(set(keys.values())) == 3


def test_compiling_leaves_the_seed_alone(photos):
    model = extractor(backbone=Wide())
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    model.transform(photos)
    assert (torch.rand(2) == expected).all()


def test_nobody_waits_for_a_compilation(monkeypatch, photos):
    compiling, go_on, convert = threading.Event(), threading.Event(), openvino_program._convert

    def convert_late(*args):
        compiling.set()
        assert go_on.wait(600)
        return convert(*args)

    monkeypatch.setattr(openvino_program, "_convert", convert_late)
    with ThreadPoolExecutor(2) as threads:
        embedding = threads.submit(extractor(backbone=Wide()).transform, photos)
        try:
            assert compiling.wait(300)
            assert threads.submit(network_lock.alone, lambda: "traced").result(300) == "traced"
            assert not embedding.done()
        finally:
            go_on.set()
        assert embedding.result(300).shape == (2, 350)


def test_who_runs_a_network_cannot_ask_for_a_program():
    runner, preprocessing = extractor(backbone=Wide()).load_network()
    with network_lock.shared(), pytest.raises(RuntimeError, match="can't ask for another program"):
        runner.program([Output(None, "flatten")], preprocessing)
    known = runner.program([Output(None, "flatten")], preprocessing)
    with network_lock.shared():
        assert runner.program([Output(None, "flatten")], preprocessing) is known


@pytest.mark.filterwarnings("ignore:This CPU has no bfloat16")
def test_below_float32_one_runtime_computes_all_rows():
    runner, preprocessing = extractor(backbone=Wide(), precision="bfloat16").load_network()
    outputs = [Output(None, "flatten")]
    compiled = runner.program(outputs, preprocessing)
    assert compiled.runs_in_threads and runner.names_its_runtime
    runner.runtime = "torch"  # as if OpenVINO could not take other outputs of this network
    assert not runner.names_its_runtime
    assert not runner.program(outputs, preprocessing).runs_in_threads


def test_small_networks_stay_with_torch():
    assert get_runner(get_model(small()), "cpu", "float32").runtime == "torch"
    assert get_runner(get_model(small()), "cpu", "float32", "openvino").runtime == "openvino"


def test_fine_tuning_on_openvino(tiles, tmp_path):
    _, paths, labels = tiles
    X, y = paths[::4], labels[::4]
    options = {"image_size": SIZE, "max_epochs": 2, "random_state": 0, "unfreeze": 2}
    options["backbone"] = small()
    found = {}
    for runtime in ("torch", "openvino"):
        model = FineTunedClassifier(runtime=runtime, **options).fit(X, y)
        found[runtime] = model.predict_proba(X)
        again = pickle.loads(pickle.dumps(model))
        assert (again.predict_proba(X) == found[runtime]).all()
    assert np.abs(found["torch"] - found["openvino"]).max() < 0.05
    # Whatever an epoch starts from, the result is the same.
    model = FineTunedClassifier(runtime="openvino", memory=tmp_path, **options).fit(X, y)
    assert (model.predict_proba(X) == found["openvino"]).all()
    # Nor does it take the memory with which it was fitted.
    assert (model.set_params(memory=None).predict_proba(X) == found["openvino"]).all()


def test_what_was_computed_before_a_bad_image_is_kept(tiles, tmp_path):
    paths, bad = tiles[1][:12], tmp_path / "bad.jpg"
    bad.write_bytes(b"not an image")
    model = extractor(backbone=Wide(), memory=tmp_path / "memory", n_jobs=1)
    with pytest.raises(ValueError, match=r"row 10 .*bad\.jpg"):  # all in one batch
        model.transform([*paths[:10], str(bad), *paths[10:]])
    embedding = embedding_of(model)
    rows = embedding(check_images(paths))
    assert embedding.n_computed <= 2
    assert (rows == extractor(backbone=model.backbone).transform(paths)).all()


# ------------------------------------------------------------------------------ shared memory


class Twofold(nn.Module):
    """Returns its input, and what it computes of it."""

    def forward(self, x):
        return x, x.relu()


EMPTY = {
    "identity": nn.Identity(),
    "dropout": nn.Dropout(),
    "flatten": nn.Flatten(),
    "tokens": nn.Sequential(nn.Flatten(2), nn.Dropout(), nn.Unflatten(2, (49, 1))),
}


def program(module, *shape, n_streams=2):
    x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    return OpenVinoProgram(module.eval, x, "float32", 2, n_streams)


@pytest.mark.parametrize("name", EMPTY)
def test_what_only_passes_on_stays_off_openvino(name):
    run = program(EMPTY[name], 64, 7, 7)
    assert not hasattr(run, "_compiled")
    x = torch.rand(1, 64, 7, 7)
    expected = EMPTY[name](x.clone())
    (y,) = run(x)
    x.fill_(torch.nan)
    assert torch.equal(y, expected)  # it shares no memory with the input


def test_a_result_outlives_an_input_that_it_may_share():
    run = program(Twofold(), 64, 7, 7)
    found = []
    inputs = [torch.randn(1, 64, 7, 7) for _ in range(20)]
    for i, x in enumerate(inputs):
        layout = torch.channels_last if i % 2 else torch.contiguous_format
        copy = x.clone(memory_format=layout)  # the program makes another one of every second
        found.append(run(copy))
        copy.fill_(torch.nan)  # a request that goes on with another input does not look back
    for x, (same, positive) in zip(inputs, found, strict=True):
        assert torch.equal(same, x)
        assert torch.equal(positive, x.relu())
    assert len(run._idle) == 2


def test_a_program_outlives_the_network():
    module = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 1), nn.GELU())
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = module(x)
    run = program(module, 3, 16, 16)
    assert torch.allclose(run(x)[0], expected, atol=1e-5)
    shapes = [p.shape for p in module.parameters()]
    del module
    gc.collect()
    junk = [torch.full(shape, torch.nan) for shape in shapes * 50]  # takes what was freed
    assert torch.allclose(run(x)[0], expected, atol=1e-5)
    assert len(junk) == 200


def test_every_stream_is_compared_with_torch():
    run = program(Wide(), 3, 32, 32, n_streams=4)
    assert len(run._idle) == 4  # requests that ran at the same time


class Fickle(nn.Module):
    """Computes something else of small values, which a traced graph does not look at."""

    def forward(self, x):
        return x * 3 if x.max() < 0.5 else x * 2


def test_a_fault_that_the_first_input_does_not_show_is_found():
    with pytest.raises(ValueError, match="differs by .*: input 1, stream"):
        program(Fickle(), 4)


class OnceWrong(nn.Module):
    """Computes something else in its third call, by which it is traced."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * 3 if self.calls == 3 else x * 2


def test_what_was_compiled_wrongly_is_compiled_once_more():
    with pytest.warns(UserWarning, match="differs by .*Compiled once more, it is right"):
        run = program(OnceWrong(), 4)
    x = torch.rand(1, 4)
    assert torch.equal(run(x)[0], x * 2)


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet10t"])
def test_last_slices_that_compute_nothing(name):
    """In front of squeezenet's head is only a dropout; without head and pooling nothing is left."""
    backbone = get_model("squeezenet1_1", None)
    if name == "resnet10t":
        backbone = get_model(timm.create_model(name, num_classes=0, global_pool=""))
    preprocessing = backbone.preprocessing.with_size(SIZE)
    image = torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8)
    found = []
    for runtime in ("openvino", "torch"):
        runner = get_runner(backbone, "cpu", "float32", runtime)
        last = runner.embedding
        outputs = [Output(p, "flatten") for p in (last - 1, last)] + [
            Output(last - 1, "activation")
        ]
        found.append(runner.program(outputs, preprocessing)([image], 1))
        assert runner.runtime == runtime  # it did not fall back
    for mine, theirs in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype
        assert difference(mine.astype(np.float32), theirs.astype(np.float32)) < 2e-3
    before, behind, _ = found[0]
    assert np.array_equal(before, behind)


# ------------------------------------------------------------------------------ kept on disk


class Refuses(nn.Module):
    """What must not be run, as there is a file."""

    def forward(self, x):
        raise AssertionError("it is run")


def kept_program(path, module=None, n_streams=2):
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    file = ProgramFile(path, "name", n_streams)
    module = Refuses() if module is None else module.eval()
    return OpenVinoProgram(lambda: module, x, "float32", 2, n_streams, file)


def test_a_program_is_read_from_its_file(tmp_path):
    x = torch.rand(1, 3, 32, 32)
    for n_streams in (1, 2):
        expected = kept_program(tmp_path / "programs", Wide(), n_streams)(x)
        run = kept_program(tmp_path / "programs", n_streams=n_streams)
        assert torch.equal(run(x)[0], expected[0])
        assert len(run._idle) == n_streams
    assert len(os.listdir(tmp_path / "programs")) == 2  # and nothing unfinished


def damages(whole):
    yield b""
    yield b"anything"
    yield whole[:20]
    yield whole[:-1]
    yield whole + b"0"
    for place in (0, 10, 24, 40, 200, len(whole) // 2, len(whole) - 1):
        yield whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]


REPORTS = """
import sys, threading
import numpy as np
from sktransfer import PretrainedFeatureExtractor
X = np.zeros((2, 32, 32, 3), np.uint8)
PretrainedFeatureExtractor(image_size=32, runtime="openvino").transform(X)
assert "openvino" in sys.modules
found = [name for name in sys.modules if name.startswith("openvino_telemetry")]
import openvino_telemetry  # whoever wants it gets it
print(found, [thread.name for thread in threading.enumerate() if "Pool" in thread.name])
"""


def test_openvino_is_imported_without_its_reports():
    pytest.importorskip("openvino_telemetry")
    assert run_code(REPORTS).stdout == "[] []\n"


def test_a_damaged_file_is_compiled_anew(tmp_path):
    x, network = torch.rand(1, 3, 32, 32), Wide()
    expected = kept_program(tmp_path, network)(x)[0]
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in damages(whole):
        path.write_bytes(damaged)
        assert ProgramFile(tmp_path, "name", 2).read() is None
    assert torch.equal(kept_program(tmp_path, network)(x)[0], expected)
    kept_program(tmp_path)  # which was written anew
    path.unlink()
    os.mkfifo(path)
    assert torch.equal(kept_program(tmp_path, network)(x)[0], expected)


def test_a_file_of_another_program_is_not_used(tmp_path):
    x, network = torch.rand(1, 3, 32, 32), Wide()
    expected = kept_program(tmp_path / "own", network)(x)[0]
    (path,) = (tmp_path / "own").iterdir()
    own = ProgramFile(tmp_path / "own", "name", 2)
    kept = own.read()
    kept_program(tmp_path / "other", Wide())
    other = ProgramFile(tmp_path / "other", "name", 2).read()
    small_one = [[y[:, :1] for y in results] for results in kept.expected]
    for blob, results in (
        (other.blob, kept.expected),
        (b"no model", kept.expected),
        (kept.blob, small_one),
        (kept.blob, []),
    ):
        own.write(KeptProgram(blob, results))
        assert torch.equal(kept_program(tmp_path / "own", network)(x)[0], expected)
        assert own.read().blob != blob or results is not kept.expected
        kept_program(tmp_path / "own")  # which was written anew


def test_a_disk_that_takes_no_file_is_no_trouble(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    kept_program(tmp_path / "file" / "folder", Wide())
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    kept_program(tmp_path, Wide())
    assert os.listdir(tmp_path) == ["file"]


def test_the_name_of_a_file_tells_what_it_is_of(tmp_path):
    names = {ProgramFile(tmp_path, *parts).path for parts in ((), ("a", 1), ("a", 2), ("a1",))}
    assert len(names) == 4
    assert ProgramFile(tmp_path, "a", 1).path in names


def test_compiling_must_pay_off(tmp_path):
    lite0 = 0.77e9  # operations an image
    assert not is_worth_compiling(lite0, 1, 2)
    assert is_worth_compiling(lite0, 1_000, 2)
    least = [
        next(n for n in range(10**6) if is_worth_compiling(flops, n, 2))
        for flops in (0, lite0 / 10, lite0, 10 * lite0)
    ]
    assert least == sorted(least, reverse=True)
    file = ProgramFile(tmp_path, "name")
    n = least[2] // 2
    assert not is_worth_compiling(lite0, n, 2, file)
    file.write(KeptProgram(b"", []))
    assert is_worth_compiling(lite0, n, 2, file)


def test_torch_computes_until_compiling_pays_off(photos):
    backbone = get_model(Wide())
    preprocessing = backbone.preprocessing.with_size(SIZE)
    runner = get_runner(backbone, "cpu", "float32", "auto")
    outputs = [Output(runner.embedding, "avg")]
    few = runner.program(outputs, preprocessing, n_images=10)
    assert not few.runs_in_threads
    image = torch.randint(256, (3, SIZE, SIZE), dtype=torch.uint8)
    (row,) = few([image] * 3, 4)
    assert few.n_images == 4  # what a batch is filled up with takes time as well
    few.n_images = 10**6
    many = runner.program(outputs, preprocessing, n_images=10)
    assert many.runs_in_threads
    assert difference(row, many([image] * 3, 4)[0]) < 1e-3
    # What was compiled is used for few images, too.
    assert runner.program(outputs, preprocessing, n_images=1) is many
    for is_compiled in (False, True):  # the second single image shows that there will be more
        alone = runner.program([Output(None, "avg")], preprocessing, True, 1)
        assert alone.runs_in_threads == is_compiled
    asked = get_runner(backbone, "cpu", "float32", "openvino")
    assert asked.program(outputs, preprocessing, n_images=1).runs_in_threads


def test_a_memory_keeps_what_was_compiled(photos, tmp_path):
    network = Wide()
    for precision, n_files in (("float32", 1), ("float32", 1), ("bfloat16", 2)):
        options = {"precision": precision, "memory": tmp_path, "image_size": SIZE}
        # Another copy, as another process has one.
        backbone = get_model(copy.deepcopy(network))
        before = {path: path.stat().st_ino for path in tmp_path.rglob("*.program")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no bfloat16 instructions
            extractor("openvino", backbone=backbone, **options).transform([*photos, photos[0][:90]])
        check_memory(tmp_path).memory.reduce_size(items_limit=0)  # of rows
        found = {path: path.stat().st_ino for path in tmp_path.rglob("*.program")}
        assert len(found) == n_files
        assert before.items() <= found.items()  # read, not written anew
    info = check_memory(tmp_path).info()
    assert info["n_entries"] == 0 and info["n_bytes"] >= sum(p.stat().st_size for p in found)
    check_memory(tmp_path).memory.clear(warn=False)
    assert not list(tmp_path.rglob("*.program"))


# ------------------------------------------------------------------------------ falling back


def test_what_openvino_does_not_know_runs_on_torch(photos):
    network = Wide(Bessel())
    with pytest.warns(
        UserWarning, match=r"runs on torch, not on OpenVINO: it can't take.*No conv.*bessel"
    ):
        rows = extractor("openvino", backbone=network).transform(photos)
    assert difference(rows, extractor("torch", backbone=network).transform(photos)) < 1e-6
    again = extractor("openvino", backbone=network).transform(photos)  # without another warning
    assert difference(again, rows) < 1e-6


def test_rows_are_kept_under_the_name_of_what_computed_them(photos, tmp_path):
    """In bfloat16 rows of OpenVINO differ: what falls back on torch must not be named after it."""
    network = Wide(Bessel())
    options = {"backbone": network, "precision": "bfloat16", "memory": tmp_path}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = extractor("openvino", **options).transform(photos)
    assert any("runs on torch, not on OpenVINO" in str(w.message) for w in caught)
    on_torch = embedding_of(extractor("torch", **options))
    found = on_torch(check_images(photos))
    assert on_torch.n_computed == 0 and (found == rows).all()
    options["backbone"] = get_model(Wide(Bessel()))
    model = FineTunedClassifier(unfreeze=0, image_size=SIZE, runtime="openvino", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(photos, [0, 1])
    on_torch = embedding_of(extractor("torch", **options))
    on_torch(check_images(photos))
    assert on_torch.n_computed == 0


def test_a_network_that_cannot_be_traced_runs_on_torch(photos):
    network = nn.Sequential(Untraceable(), nn.Linear(4, 30_000))
    with pytest.warns(UserWarning, match="can't be traced"):
        rows = extractor("auto", backbone=network, layer="output").transform(photos)
    expected = extractor("torch", backbone=network, layer="output").transform(photos)
    assert difference(rows, expected) < 1e-5  # in the same batches: it is known beforehand


def test_float16_runs_on_torch():
    backbone = get_model(small())
    with pytest.warns(UserWarning, match="does not compute in float16"):
        assert get_runner(backbone, "cpu", "float16", "openvino").runtime == "torch"
    assert get_runner(get_model(small(1)), "cpu", "float16", "auto").runtime == "torch"


def test_without_openvino(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    backbone = get_model(Wide())
    assert get_runner(backbone, "cpu", "float32").runtime == "torch"
    with pytest.warns(UserWarning, match=r"not installed: pip install '\.\[openvino\]'"):
        assert get_runner(backbone, "cpu", "float32", "openvino").runtime == "torch"


def test_a_broken_openvino(tmp_path):
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "__init__.py").write_text("raise ImportError('libtbb is missing')")
    code = (
        "import sys\n"
        "assert 'openvino' not in sys.modules\n"
        "sys.path.insert(0, '.')\n"
        "from sklearn.datasets import load_sample_images\n"
        "from sktransfer import PretrainedFeatureExtractor\n"
        "extractor = PretrainedFeatureExtractor(image_size=32, runtime='openvino')\n"
        "print(extractor.transform(load_sample_images().images).shape)\n"
    )
    done = run_code(code, folder=tmp_path)
    assert "(2, 1280)" in done.stdout
    assert done.stderr.count("OpenVINO can't be imported (ImportError: libtbb is missing)") == 1


def test_bfloat16_warns_where_the_cpu_has_none(recwarn):
    get_runner(get_model(small(2)), "cpu", "bfloat16")
    told = any("no bfloat16 instructions" in str(w.message) for w in recwarn)
    assert told != has_bfloat16()


# ------------------------------------------------------------------------------ folding


class Shared(nn.Module):
    """A convolution with two uses can't be folded into either of its norms."""

    def __init__(self):
        super().__init__()
        self.first, self.norm_1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.twice, self.norm_2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm_1(self.first(x))
        return self.twice(self.norm_2(self.twice(x)))


def test_folding_keeps_the_function_and_the_network():
    network = Shared().eval()
    for norm in (network.norm_1, network.norm_2):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    traced = torch.fx.symbolic_trace(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folded = fold_batch_norms(traced)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(folded(x), network(x), atol=1e-5)
    norms = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [network.norm_2]
    assert folded.twice is network.twice
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_hooked_layer_is_not_folded():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    network[0].register_forward_hook(lambda module, args, output: output + 1)
    folded = fold_batch_norms(torch.fx.symbolic_trace(network))
    assert any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
