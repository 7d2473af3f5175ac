"""Odd networks, parameters and moments, as users meet them."""

import copy
import functools
import importlib
import os
import sys
import threading
import types
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torchvision
from networks import small
from processes import run_code
from torch import nn
from torchvision.models import ResNet18_Weights

from sktransfer import PretrainedFeatureExtractor, get_model
from sktransfer._engine.runner import get_runner
from sktransfer._estimators.pretrained import embedding_of
from sktransfer._memory.memory import check_memory
from sktransfer.models import Backbone
from sktransfer.models._sources import Sources
from sktransfer.models._weights import fingerprint
from sktransfer.transforms import Preprocessing

IMAGES = list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))


def rows(network, **options):
    return PretrainedFeatureExtractor(network, image_size=32, **options).transform(IMAGES)


# ------------------------------------------------------------------------------ fingerprints


def having(value):
    network = small()
    network.attribute = value
    return network


def times(factor):
    return lambda x: x * factor


class Settings:
    def __init__(self, factor):
        self.factor = factor


def with_buffer(tensor):
    network = small()
    network.register_buffer("extra", tensor, persistent=False)
    return network


def patched(factor):
    network = small()
    network.forward = types.MethodType(lambda self, x: self.stem(x * factor), network)
    return network


def hooked(factor):
    network = small()
    network.body[0].register_forward_hook(lambda module, inputs, output: output * factor)
    return network


def from_notebook(expression, **names):
    """A network whose class is always called __main__.Net."""
    scope = {"nn": nn, "torch": torch, "__name__": "__main__", "half": lambda x: x / 2, **names}
    exec(
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(3, 4, 3)\n"
        "        nn.init.ones_(self.conv.weight), nn.init.zeros_(self.conv.bias)\n"
        f"    def forward(self, x): return ({expression}).mean((2, 3))\n",
        scope,
    )
    return scope["Net"]()


def module_with(factor):
    module = types.ModuleType("helper")
    module.scaled = times(factor)
    return module


def calling_module(expression, factor):
    return from_notebook(expression, helper=module_with(factor))


def of_class(base=object, **members):
    return having(type("Member", (base,), members)())


def with_module(factor):
    return of_class(helper=module_with(factor))


def with_function(factor):
    def function(x):
        return x * function.factor

    function.factor = factor
    return having(function)


def executed(factor):
    """A network whose class seems to be one of Python's own: its code was run without a name."""
    scope = {"nn": nn}
    code = "    def scaled(self, x): return x * self.factor\n    def forward(self, x): pass\n"
    exec(f"class Net(nn.Module):\n    factor = {factor}\n{code}", scope)
    return scope["Net"]()


def listed(seed):
    return having([small(seed).head])


def sequence(*modules):
    return nn.Sequential(*modules)


def peak(at):
    values = np.zeros(5000)
    values[at] = 1
    return values


RELU, CONV = nn.ReLU(), nn.Conv2d(3, 3, 3)
PAIRS = {
    "constant of a lambda": (lambda: having(lambda x: x * 2), lambda: having(lambda x: x * 3)),
    "name in a lambda": (lambda: having(lambda x: x.relu()), lambda: having(lambda x: x.tanh())),
    "closure": (lambda: having(times(2)), lambda: having(times(3))),
    "partial": (
        lambda: having(functools.partial(times, 2)),
        lambda: having(functools.partial(times, 3)),
    ),
    "object": (lambda: having(Settings(1)), lambda: having(Settings(2))),
    "long array": (lambda: having(peak(2500)), lambda: having(peak(2501))),
    "shape of a tensor": (
        lambda: having(torch.zeros(2, 3)),
        lambda: having(torch.zeros(3, 2)),
    ),
    "bfloat16 buffer": (
        lambda: with_buffer(torch.zeros(2, dtype=torch.bfloat16)),
        lambda: with_buffer(torch.ones(2, dtype=torch.bfloat16)),
    ),
    "modules in a plain list": (lambda: listed(0), lambda: listed(1)),
    "a module used twice": (lambda: sequence(RELU, CONV, RELU), lambda: sequence(RELU, CONV)),
    "replaced forward": (lambda: patched(2), lambda: patched(3)),
    "hook": (lambda: hooked(2), lambda: hooked(3)),
    "no hook": (lambda: hooked(2), small),
    "class of equal name": (
        lambda: from_notebook("torch.relu(self.conv(x))"),
        lambda: from_notebook("torch.tanh(self.conv(x))"),
    ),
    "constant in forward": (
        lambda: from_notebook("self.conv(x * 2)"),
        lambda: from_notebook("self.conv(x * 3)"),
    ),
    "traced": (
        lambda: torch.fx.symbolic_trace(from_notebook("self.conv(x * 2)")),
        lambda: torch.fx.symbolic_trace(from_notebook("self.conv(x * 3)")),
    ),
    "set": (lambda: having({"a", "b"}), lambda: having({"a", "c"})),
    "module in a comprehension": (
        lambda: calling_module("sum([helper.scaled(self.conv(x)) for i in (1, 2)])", 2),
        lambda: calling_module("sum([helper.scaled(self.conv(x)) for i in (1, 2)])", 3),
    ),
    "name of a function as text": (
        lambda: calling_module("getattr(helper, 'scaled')(self.conv(x))", 2),
        lambda: calling_module("getattr(helper, 'scaled')(self.conv(x))", 3),
    ),
    "module on a class": (lambda: with_module(2), lambda: with_module(3)),
    "cached function": (
        lambda: having(functools.cache(lambda x: x * 2)),
        lambda: having(functools.cache(lambda x: x * 3)),
    ),
    "cached property": (
        lambda: of_class(factor=functools.cached_property(lambda self: 2)),
        lambda: of_class(factor=functools.cached_property(lambda self: 3)),
    ),
    "single dispatch": (
        lambda: of_class(scaled=functools.singledispatchmethod(times(2))),
        lambda: of_class(scaled=functools.singledispatchmethod(times(3))),
    ),
    "method of a dict": (
        lambda: of_class(dict, __missing__=lambda self, key: 2),
        lambda: of_class(dict, __missing__=lambda self, key: 3),
    ),
    "default of a dict": (
        lambda: having(defaultdict(functools.partial(int, "2"))),
        lambda: having(defaultdict(functools.partial(int, "3"))),
    ),
    "method in C": (lambda: having({"a": 2}.get), lambda: having({"a": 3}.get)),
    "attribute of a function": (lambda: with_function(2), lambda: with_function(3)),
    "class without a module": (lambda: executed(2), lambda: executed(3)),
}


@pytest.mark.parametrize("make, make_other", PAIRS.values(), ids=PAIRS)
def test_networks_that_compute_different_things_differ(make, make_other):
    network = make()
    assert fingerprint(network) != fingerprint(make_other())
    assert fingerprint(network) == fingerprint(make()) == fingerprint(copy.deepcopy(network))


def test_what_a_forward_calls_counts():
    def network(factor):
        made = from_notebook("half(self.conv(x))")
        type(made).forward.__globals__["half"] = times(factor)
        return made

    assert fingerprint(network(2)) == fingerprint(network(2)) != fingerprint(network(3))


IMPORTING = """
class Net(nn.Module):
    def forward(self, x):
        from helper_of_a_test.inner import scaled
        return scaled(x)
"""


def test_what_a_forward_imports_counts(tmp_path, monkeypatch):
    def print_of(factor):
        (folder / "constants.py").write_text(f"FACTOR = {factor}")
        exec(IMPORTING, scope := {"nn": nn, "__name__": "__main__"})
        return fingerprint(scope["Net"]())

    folder = tmp_path / "helper_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('not to be run')")
    code = "from . import constants\ndef scaled(x): return x * constants.FACTOR"
    (folder / "inner.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert print_of(2) == print_of(2) != print_of(3)


def test_imports_of_long_modules_and_of_edited_ones(tmp_path, monkeypatch):
    folder = tmp_path / "helper_of_a_test"
    folder.mkdir()
    names = "\n".join(f"name_{i} = {i}" for i in range(300))  # more than a byte counts
    inner = "from . import edited_of_a_test\nfrom json import dumps\ndef scaled(x): return x"
    (folder / "inner.py").write_text(f"{names}\n{inner}")
    (folder / "edited_of_a_test.py").write_text("FACTOR = 2")  # later than this process began
    monkeypatch.syspath_prepend(tmp_path)
    exec(IMPORTING, scope := {"nn": nn, "__name__": "__main__"})
    network = scope["Net"]()
    before = fingerprint(network)
    with patch.dict(sys.modules):  # which are forgotten afterwards
        importlib.import_module("helper_of_a_test.edited_of_a_test")
        assert fingerprint(network) == fingerprint(network) != before


@pytest.mark.parametrize(
    "make, cls, method",
    [
        (lambda: torchvision.models.squeezenet1_1(), torchvision.models.SqueezeNet, "forward"),
        (small, nn.Conv2d, "_conv_forward"),
        (small, nn.BatchNorm2d, "_check_input_dim"),
    ],
)
def test_a_method_replaced_on_a_class_of_torch_counts(monkeypatch, make, cls, method):
    with torch.random.fork_rng():
        network = make()
    original = fingerprint(network)
    monkeypatch.setattr(cls, method, times(2))
    replaced = fingerprint(network)
    monkeypatch.setattr(cls, method, times(3))
    assert len({original, replaced, fingerprint(network)}) == 3
    monkeypatch.undo()
    assert fingerprint(network) == original


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.number, self.tensor = float(factor), torch.tensor(factor)

    def forward(self, x):
        return x * self.number


class ScaledByTensor(Scaled):
    def forward(self, x):
        return x * self.tensor


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)
@pytest.mark.parametrize("kind", [Scaled, ScaledByTensor])
def test_attributes_of_a_scripted_network_count(kind):
    def print_of(factor):
        return fingerprint(torch.jit.script(nn.Sequential(kind(factor))))

    assert print_of(2) == print_of(2) != print_of(3)


def test_a_script_has_two_names():
    scopes = [{"nn": nn, "__name__": name} for name in ("__main__", "__mp_main__")]
    for scope in scopes:
        exec("class Net(nn.Module):\n    def forward(self, x): return x", scope)
    assert len({fingerprint(scope["Net"]()) for scope in scopes}) == 1


@functools.singledispatch
def dispatched(x):
    return x


class Decorated(nn.Module):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return dispatched(x)


def test_running_and_compiling_a_network_changes_no_fingerprint():
    network = nn.Sequential(nn.Identity(), Decorated())
    expected = fingerprint(network)
    network(torch.zeros(1))
    assert fingerprint(network) == expected
    network[0] = torch.compile(network[0])
    network.compile(backend="eager")
    assert fingerprint(network) == expected


def test_a_compiled_function_is_known_by_what_it_does():
    def print_of(factor):
        compiled = torch.compile(times(factor), backend="eager")
        first = fingerprint(having(compiled))
        compiled(torch.zeros(1))
        assert fingerprint(having(compiled)) == first
        return first

    assert print_of(2) == print_of(2) != print_of(3)


def test_a_class_defined_anew_in_a_notebook_is_computed_anew(tmp_path):
    first = rows(from_notebook("self.conv(x)"), layer="output", memory=tmp_path)
    second = rows(from_notebook("self.conv(x) * 2"), layer="output", memory=tmp_path)
    np.testing.assert_allclose(second, 2 * first, rtol=1e-5)


SCRIPT = """
print(hash("of the seed of this process"))
import timm
from test_hardening import PAIRS, fingerprint
networks = [make() for pair in PAIRS.values() for make in pair if "twice" not in str(pair)]
networks = [n for n in networks if type(n).__name__ != "Sequential"]  # random weights
print(*map(fingerprint, networks))
print(fingerprint(timm.create_model("tf_efficientnet_lite0", num_classes=0).apply(
    lambda m: [p.data.zero_() for p in m.parameters()])))
import logging, torch
log, _ = logging.getLogger("network"), logging.getLogger(str(hash("other")))
class Logs(torch.nn.Module):
    def forward(self, x):
        log.debug("runs")
        return x
first = fingerprint(Logs())
log.__class__ = type("Replaced", (logging.Logger,), {})  # as some packages do
print(first, fingerprint(Logs()) == first)
"""


def test_fingerprints_are_the_same_in_every_process(capsys):
    exec(compile(SCRIPT, "<code>", "exec"), {"__name__": "__main__"})
    seed, *prints = capsys.readouterr().out.splitlines()
    other_seed, *others = run_code(SCRIPT).stdout.splitlines()
    assert seed != other_seed or "PYTHONHASHSEED" in os.environ
    assert prints == others and len(prints) == 3 and prints[-1].endswith(" True")


def test_what_is_imported_of_torch_changes_no_fingerprint(monkeypatch):
    network = small()  # a function of it names torch
    expected = fingerprint(network)
    late = types.ModuleType("torch.late")
    late.__file__ = torch.__file__
    late.Class = type("Class", (), {"__module__": "torch.late"})
    monkeypatch.setitem(sys.modules, "torch.late", late)
    monkeypatch.setattr(torch, "Class", late.Class, raising=False)
    assert fingerprint(network) == expected


class Inverted(Preprocessing):
    def normalize(self, batch):
        return super().normalize(255 - batch)


def test_preprocessing_of_another_class_is_another_function():
    runner = get_runner(get_model(small()), "cpu", "float32")
    plain, other = Preprocessing((32, 32), (32, 32)), Inverted((32, 32), (32, 32))
    key = runner.key(1, "avg", other)
    Inverted.normalize = lambda self, batch: batch / 2
    keys = {key, runner.key(1, "avg", plain), runner.key(1, "avg", other)}
    vars(other)["gamma"] = 2  # no field, so it is not printed
    assert len(keys | {runner.key(1, "avg", other)}) == 4


def test_sources_are_read_of_what_no_version_tells():
    sources = Sources()
    assert [sources.digest(name) for name in ("torch.nn", "torchvision", "numpy")] == [None] * 3
    assert sources.digest("joblib")


# ------------------------------------------------------------------------------ rows


def test_equal_images_that_another_thread_computes_fill_their_own_rows(tmp_path):
    model = PretrainedFeatureExtractor(small(), image_size=32, memory=tmp_path)
    a, known, b = IMAGES
    X = [a, known, b, known, known, a]  # rows 0, 5 and 2 look like three rows in sequence
    expected = PretrainedFeatureExtractor(small(), image_size=32).transform(X)
    model.transform([known])
    names, memory = embedding_of(model).names(), check_memory(tmp_path)
    images = model.check_images(X)
    digests = [images.digest(0), images.digest(2)]
    assert all(memory.claim(names.claim, digests, "me"))
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(model.transform, X)
        threading.Event().wait(0.5)  # it looks up, claims in vain, and waits
        memory.write(names.wanted[0], digests, expected[[0, 2]])
        memory.release(names.claim, digests, "me")
        np.testing.assert_array_equal(result.result(), expected)


def test_a_replaced_forward_is_the_one_that_is_cut():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small()

        def forward(self, x):
            return self.inner(2 * x)

    replaced = Doubled()
    replaced.forward = types.MethodType(lambda self, x: self.inner(x), replaced)
    np.testing.assert_allclose(rows(replaced), rows(small()), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_precision_are_taken(dtype):
    network = small().to(dtype)
    np.testing.assert_allclose(rows(network), rows(small()), atol=2e-3)
    assert next(network.parameters()).dtype == dtype


def test_a_compiled_network_is_cut_like_the_original():
    np.testing.assert_array_equal(rows(torch.compile(small()), layer=0), rows(small(), layer=0))


def test_threads_load_more_backbones_than_are_kept():
    networks = [small(seed) for seed in range(12)] * 4
    with ThreadPoolExecutor(8) as threads:
        prints = list(threads.map(lambda network: get_model(network).fingerprint, networks))
    assert prints[:12] * 4 == prints and len(set(prints)) == 12


# ------------------------------------------------------------------------------ errors


class Returns(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.conv, self.wrap = nn.Conv2d(3, 4, 3), wrap

    def forward(self, x):
        return self.wrap(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    "wrap, kind",
    [
        (lambda x: {"out": x, "aux": x}, "dict of out and aux"),
        (lambda x: (x, x), "tuple of 2"),
        (torch.sum, r"tensor of shape \(\) for two images"),
    ],
)
def test_outputs_that_are_no_rows_are_named(wrap, kind):
    with pytest.raises(TypeError, match=f"'Returns' returns a {kind}, not one tensor.*Wrap it"):
        rows(Returns(wrap), layer="output")


@pytest.mark.parametrize(
    "make", [lambda: small().to("meta"), lambda: nn.Sequential(nn.LazyConv2d(3, 3))]
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_networks_without_values_are_refused(make):
    with pytest.raises(ValueError, match="has no values yet: load its weights"):
        rows(make())


@pytest.mark.parametrize(
    "size", [(32,), (32, 32, 3), (-3, 5), ("a", "b"), (32.5, 32), True, (0, 0), []]
)
def test_image_size_that_is_none(size):
    model = PretrainedFeatureExtractor(small(), image_size=size)
    with pytest.raises(ValueError, match="image_size must be a positive int or"):
        model.transform(IMAGES)


def test_preprocessing_takes_lists_and_arrays_and_says_what_is_wrong():
    plain = Preprocessing((32, 32), (36, 36), mean=(0.5, 0.5, 0.5))
    other = Preprocessing(32, np.array([36, 36]), mean=np.full(3, 0.5))
    assert plain == other and plain.fingerprint == other.fingerprint
    assert get_model(Backbone(small(), plain)) is get_model(Backbone(small(), other))
    for options, message in [
        ({"mode": "centre"}, "mode must be one of .*'center'.*'centre'"),
        ({"interpolation": "nearest"}, "interpolation must be one of"),
        ({"mean": (0.5,)}, "mean is for 1 channels, and std for 3"),
        ({"mean": "red"}, "mean must have a number for each channel"),
        ({"std": (0, 1, 1)}, "std=.*holds 0"),
        ({"size": (3, 4, 5)}, "size must be a positive int or"),
    ]:
        with pytest.raises(ValueError, match=message):
            Preprocessing(**options)


def test_other_wrong_arguments():
    with pytest.raises(ValueError, match="device='meta' can't be used here"):
        rows(small(), device="meta")
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
        Backbone("resnet18")
    with pytest.raises(ValueError, match="neither a published name of 'timm/resnet18'"):
        get_model("timm/resnet18", ResNet18_Weights.DEFAULT)
