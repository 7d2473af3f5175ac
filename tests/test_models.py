import copy
import gc
import importlib
import os
import pickle
import socket
import sys
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import skops.io
import timm
import torch
import torchvision
from huggingface_hub import constants
from networks import Small, small
from processes import run_code
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from torch import nn
from torchvision.models import ResNet18_Weights

from sktransfer import (
    FineTunedClassifier,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
    get_model,
    list_models,
    register_model,
)
from sktransfer._engine.runner import get_runner
from sktransfer._engine.text_model import load_text_model
from sktransfer._training.detector_networks import load_detector
from sktransfer.models import _hub, _registry
from sktransfer.models._builders import published_weights
from sktransfer.models._hub import check_connection
from sktransfer.models._registry import Backbone, unique_labels
from sktransfer.models._weights import fingerprint


def test_lists_embedded_torchvision_and_timm_names():
    names = list_models()
    assert {"efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"} <= set(names)
    assert set(torchvision.models.list_models(module=torchvision.models)) <= set(names)
    assert "timm/vit_small_patch14_dinov2.lvd142m" in names
    assert {"resnet18", "wide_resnet50_2"} <= set(list_models("*resnet*"))
    assert list_models("efficientnet_lite?") == [f"efficientnet_lite{i}" for i in range(3)]


@pytest.mark.parametrize("number, size", [(0, 224), (1, 240), (2, 260)])
def test_embedded_backbones_come_with_weights_and_preprocessing(number, size):
    backbone = get_model(f"efficientnet_lite{number}")
    assert backbone.preprocessing.size == (size, size)
    assert backbone.preprocessing.mean == backbone.preprocessing.std == (0.5, 0.5, 0.5)
    assert backbone.preprocessing.interpolation == "bicubic"
    assert len(set(backbone.categories)) == 1000
    assert not backbone.network.training
    assert not any(p.requires_grad for p in backbone.network.parameters())


def test_lite0_is_resized_to_256_and_cropped_to_224():
    assert get_model("efficientnet_lite0").preprocessing.resize == (256, 256)


def test_one_copy_per_process():
    assert get_model("efficientnet_lite0") is get_model("efficientnet_lite0")
    network = small()
    assert get_model(network) is get_model(copy.deepcopy(network))
    assert get_model(network).network is not network


def test_who_uses_a_loaded_network_does_not_wait_while_another_is_built():
    building, go_on, network = threading.Event(), threading.Event(), small()
    loaded = get_model(network)

    def build(weights):
        building.set()
        assert go_on.wait(600)  # as a download takes its time
        return Backbone(small(12))

    register_model("test_slow", build)
    with ThreadPoolExecutor(3) as threads:
        slow = [threads.submit(get_model, "test_slow") for _ in range(2)]
        try:
            assert building.wait(300)
            assert threads.submit(get_model, network).result(300) is loaded
            assert not any(one.done() for one in slow)
        finally:
            go_on.set()
        assert slow[0].result(300) is slow[1].result(300)  # built once


def fitted_on(network):
    X = np.zeros((2, 32, 32, 3), np.uint8)
    return FineTunedClassifier(network, unfreeze=0, image_size=32, max_epochs=1).fit(X, [0, 1])


def test_one_copy_of_more_backbones_than_stay_loaded():
    networks = [small(seed) for seed in range(7)]
    models = [fitted_on(network) for network in networks]
    copies = [get_model(network) for network in networks]
    for network, model, copied in zip(networks, models, copies, strict=True):
        runner = get_runner(get_model(network), "cpu", "float32")
        assert runner is model._trainer.frozen.runner
        assert runner.network is get_model(network).network is copied.network


def test_what_nobody_uses_is_freed():
    # No other test has such networks: whoever uses an equal one uses the same copy.
    networks = [small(seed) for seed in range(900, 907)]
    model = fitted_on(networks[0])
    copies = [weakref.ref(get_model(network).network) for network in networks]
    gc.collect()
    assert [copied() is None for copied in copies] == [False, True, True] + 4 * [False]
    del model
    for _ in range(2000):  # threads that decoded images may be about to end
        gc.collect()
        if copies[0]() is None:
            break
        time.sleep(0.05)
    assert copies[0]() is None


def test_the_weights_of_a_large_backbone_are_freed_at_once():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.large = nn.Parameter(torch.zeros(4_000, 4_000))

        def forward(self, x):
            return x.mean((2, 3))

    copied = weakref.ref(get_model(Large()).network)
    get_runner(get_model(Large()), "cpu", "float32")
    for seed in range(4):
        assert copied() is not None
        get_model(small(seed))
    assert copied() is None


def test_a_fingerprint_is_computed_once_for_a_backbone(monkeypatch):
    computed = []

    def counted(network):
        computed.append(network)
        return fingerprint(network)

    monkeypatch.setattr(_registry, "fingerprint", counted)
    register_model("test_counted", lambda weights: Backbone(small(11)))
    fitted_on("test_counted").predict(np.zeros((1, 32, 32, 3), np.uint8))
    assert len(computed) == 1
    network = small(12)
    fitted_on(network)
    assert computed[1:] == [network]  # the user may have changed it; the copy is the same
    half = small(13).half()
    assert get_model(half).fingerprint == fingerprint(half.float())


def test_random_weights_are_always_the_same_and_leave_the_seed_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = get_model("resnet18", None).fingerprint
    assert torch.rand(1) == expected
    get_model("squeezenet1_1", None)
    assert get_model("resnet18", None).fingerprint == first
    assert get_model("resnet18", None).categories is None


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "efficientnet_lite0"])
def test_weights_from_a_file(tmp_path, name, suffix):
    plain = {"efficientnet_lite0": "timm/tf_efficientnet_lite0"}.get(name, name)
    if plain.startswith("timm/"):
        network = timm.create_model(plain.removeprefix("timm/"), num_classes=7)
    else:
        network = torchvision.models.resnet18(num_classes=7)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": network.state_dict()}, path)
    else:
        safetensors.torch.save_file(network.state_dict(), path)
    loaded = get_model(name, str(path)).network
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), network.eval()(x))


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    first = get_model("resnet18", path).fingerprint
    torch.save(torchvision.models.resnet18().state_dict(), path)
    assert get_model("resnet18", path).fingerprint != first


def test_checkpoints_saved_from_data_parallel_load(tmp_path):
    network = torchvision.models.resnet18()
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    get_model("resnet18", tmp_path / "weights.pth")


def test_googlenet_loads_a_file_with_auxiliary_heads_and_leaves_them_out(tmp_path):
    with pytest.warns(FutureWarning, match="initialization"):
        network = torchvision.models.googlenet(aux_logits=True)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    loaded = get_model("googlenet", tmp_path / "weights.pth").network
    assert loaded.aux1 is None and not loaded.transform_input


def test_published_weights_are_known_by_their_digest():
    v1, v2 = torchvision.models.ResNet50_Weights
    assert published_weights("resnet50", "0676ba61" + "0" * 56) is v1
    assert published_weights("resnet50", "11ad3fa6" + "0" * 56) is v2
    assert published_weights("resnet50", "0" * 64) is None


def test_published_weights_are_read_from_torchs_own_folder(tmp_path, monkeypatch):
    # The loading code runs as it does after a download; only the file's digest is our own.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = ResNet18_Weights.DEFAULT.url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), folder / url.rpartition("/")[2])
    backbone = get_model("resnet18", "IMAGENET1K_V1")
    assert torch.equal(backbone.network.fc.weight, network.fc.weight)
    assert backbone.categories[985] == "daisy"
    assert get_model("resnet18", ResNet18_Weights.IMAGENET1K_V1).categories == backbone.categories


def test_labels_stay_unique():
    assert unique_labels(["crane", "dog", "crane"]) == ("crane (0)", "dog", "crane (2)")
    for name in ("efficientnet_lite0",):
        labels = get_model(name).categories
        assert len(set(labels)) == len(labels)


def test_registered_names_are_found():
    register_model("test_small", lambda weights: Backbone(small()))
    assert "test_small" in list_models("test_*")
    assert get_model("test_small").fingerprint == get_model(small()).fingerprint


# ------------------------------------------------------------------------------ connections


@pytest.fixture
def no_connection(monkeypatch, tmp_path):
    """A hub that refuses connections, and empty folders for what was downloaded before."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    return tmp_path / "hub"


@pytest.mark.parametrize(
    "load, name",
    [
        (get_model, "timm/resnet18.a1_in1k"),
        (get_model, "timm/gcvit_xxtiny"),  # not on the hub
        (get_model, "resnet34"),
        (lambda name: load_detector(name, "default"), "fcos_resnet50_fpn"),
        (lambda name: load_text_model(name, None), "distilbert-base-uncased"),
    ],
)
def test_without_a_connection_nothing_is_tried_twice(no_connection, capfd, caplog, load, name):
    with pytest.raises(OSError, match=f"{name}.* could not be .*(?s:refused.*onnected machine)"):
        load(name)
    assert capfd.readouterr() == ("", "") and "Retrying" not in caplog.text


def test_what_the_hub_gave_before_needs_no_connection(no_connection, caplog):
    network = timm.create_model("resnet18")
    folder = no_connection / "models--timm--resnet18.a1_in1k"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    file = folder / "snapshots" / commit / "model.safetensors"
    safetensors.torch.save_file(network.state_dict(), file)
    loaded = get_model("timm/resnet18.a1_in1k").network
    assert torch.equal(loaded.fc.weight, network.fc.weight)
    assert "Retrying" not in caplog.text


def test_a_server_that_listens_is_reached(monkeypatch):
    monkeypatch.setattr(_hub, "_SECONDS", 300)
    monkeypatch.setenv("no_proxy", "localhost")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        check_connection(f"http://{address}/a/file")  # at one of the name's addresses
        monkeypatch.setenv("https_proxy", f"http://{address}")
        check_connection("https://nowhere.invalid")  # by the proxy
    with pytest.raises(OSError, match="refused"):
        check_connection("https://nowhere.invalid")


# ------------------------------------------------------------------------------ fingerprints


def test_fingerprint_changes_with_weights_buffers_and_settings():
    def changed(change):
        network = small()
        with torch.no_grad():
            change(network)
        return get_model(network).fingerprint

    prints = [
        get_model(small()).fingerprint,
        changed(lambda n: n.head.bias[0].add_(1e-3)),
        changed(lambda n: n.stem[1].running_mean[0].add_(1)),
        changed(lambda n: setattr(n.stem[0], "stride", (1, 1))),
        changed(lambda n: setattr(n, "scale", 2.0)),
        changed(lambda n: setattr(n, "activation", nn.functional.relu)),
        changed(lambda n: setattr(n, "activation", nn.functional.gelu)),
        changed(lambda n: n.stem.__setitem__(2, nn.GELU())),
    ]
    assert len(set(prints)) == len(prints)


def test_fingerprint_is_the_same_in_training_mode_and_after_pickling():
    network = small()
    first = get_model(network).fingerprint
    assert get_model(network.train()).fingerprint == first
    assert get_model(pickle.loads(pickle.dumps(network))).fingerprint == first


def test_what_was_imported_of_torch_does_not_count(monkeypatch):
    """Its version does; a network's code may name the whole of torch."""
    known = get_model(small()).fingerprint
    timer = importlib.import_module("torch.utils.benchmark").Timer
    for module in (torch, nn):
        monkeypatch.setattr(module, "imported_later", timer, raising=False)
    assert get_model(small()).fingerprint == known


def test_a_module_changed_in_place_is_another_backbone():
    network = small()
    first = get_model(network).fingerprint
    network.head.weight.data.mul_(2)
    assert get_model(network).fingerprint != first


# ------------------------------------------------------------------------------ code


PACKAGE = {
    "__init__.py": "from installed.ops import scaled",
    "ops.py": "def scaled(x): return unused(x) * 2.0\ndef unused(x): return x",
    "other.py": "A = 1",
    "net.py": """
import installed_helper
from torch import nn
from installed import ops
FACTOR = 1.0
def helper(x): return x + 0.25
class Base(nn.Module):
    def forward(self, x): return self.pooled(ops.scaled(installed_helper.f(helper(x))) * FACTOR)
    def pooled(self, x): return x.mean((2, 3))
class Net(Base):
    pass
""",
    "../installed_helper.py": "def f(x): return x",
}
EDITS = {  # file: what stands there instead of what
    "as it was": ("other.py", "1", "1"),
    "what it does not use": ("other.py", "1", "2"),
    "a method of a base class": ("net.py", "mean((2, 3))", "amax((2, 3))"),
    "a constant": ("net.py", "FACTOR = 1.0", "FACTOR = 3.0"),
    "a function beside it": ("net.py", "0.25", "0.5"),
    "a function of another file": ("ops.py", "2.0", "4.0"),
    "a function of a function": ("ops.py", "return x", "return -x"),
    "another package": ("../installed_helper.py", "return x", "return x / 2"),
}
SCRIPT = """
import sys
import numpy as np
from sktransfer import PretrainedFeatureExtractor, get_model
X = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
for folder in sys.argv[2:]:
    sys.path.insert(0, folder)
    from installed.net import Net
    options = {"layer": "output", "image_size": 32, "runtime": "torch"}
    expected = PretrainedFeatureExtractor(Net(), **options).transform(X)
    rows = PretrainedFeatureExtractor(Net(), memory=sys.argv[1], **options).transform(X)
    print(get_model(Net()).fingerprint, (rows == expected).all())
    for name in [name for name in sys.modules if name.startswith("installed")]:
        del sys.modules[name]
"""


def write_package(folder, edited=None, old="", new=""):
    (folder / "installed").mkdir(parents=True)
    for name, text in PACKAGE.items():
        text = text.replace(old, new) if name == edited else text
        (folder / "installed" / name).write_text(text)


def test_edited_code_of_an_installed_package_is_another_network(tmp_path):
    folders = [tmp_path / edit / "site-packages" for edit in EDITS]
    for folder, (edited, old, new) in zip(folders, EDITS.values(), strict=True):
        assert old in PACKAGE[edited]
        write_package(folder, edited, old, new)
    ran = run_code(SCRIPT, tmp_path / "memory", *folders)
    prints, are_true = zip(*map(str.split, ran.stdout.splitlines()), strict=True)
    assert len(prints) == len(EDITS) and set(are_true) == {"True"}
    assert prints[0] == prints[1] and len(set(prints[1:])) == len(prints) - 1


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package that was written after this process began, and is imported."""
    write_package(tmp_path / "site-packages")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    yield importlib.import_module("installed.net")
    for name in [name for name in sys.modules if name.startswith("installed")]:
        del sys.modules[name]


def test_installed_code_that_was_edited_since_is_known_by_what_is_loaded(installed):
    known = fingerprint(installed.Net())
    path = Path(installed.__file__)
    path.write_text(path.read_text().replace("0.25", "0.5") + "# no comment is compiled")
    assert fingerprint(installed.Net()) == known
    importlib.reload(installed)
    assert fingerprint(installed.Net()) != known


def test_replaced_methods_of_installed_classes_count(installed, monkeypatch):
    known = fingerprint(installed.Net())
    monkeypatch.setattr(installed.Base, "pooled", lambda self, x: x.amax((2, 3)))
    assert fingerprint(installed.Net()) != known
    network = timm.create_model("test_vit").eval()
    known = fingerprint(network)
    block = type(network.blocks[0])
    monkeypatch.setattr(block.__mro__[0], "extra", property(lambda self: 1), raising=False)
    assert fingerprint(network) != known


def test_classes_without_a_file_are_known_by_their_code():
    def of_cell(factor):
        module = types.ModuleType("cell")
        exec(PACKAGE["ops.py"].replace("2.0", factor), vars(module))
        exec(
            "from torch import nn\nclass Net(nn.Module):\n"
            "    def forward(self, x): return scaled(x).mean((2, 3))",
            vars(module),
        )
        return module.Net()

    for module in ("cell", "gone"):
        sys.modules.setdefault("cell", types.ModuleType("cell"))
        networks = [of_cell(factor) for factor in ("2.0", "2.0", "3.0")]
        for network in networks:
            type(network).__module__ = module
        first, again, other = map(fingerprint, networks)
        assert first == again != other
    del sys.modules["cell"]


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "name, near",
    [
        ("resnet5", "'resnet50'"),
        ("ResNet50", "'resnet50'"),
        ("timm/vit_small_patch14_dinov", "'timm/vit_small_patch14_dinov2'"),
        ("vit_small_patch14_dinov2", "'timm/vit_small_patch14_dinov2'"),
        ("nothing like it", "list_models"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"Unknown backbone '{name}'.*{near}"):
        get_model(name)


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet18", "efficientnet_lite0"])
def test_unknown_weights(name):
    with pytest.raises(ValueError, match="weights='IMAGENET1K_V9' is neither a published name"):
        get_model(name, "IMAGENET1K_V9")


def test_unknown_tag_of_timm():
    with pytest.raises(ValueError, match="a1_in1k"):
        get_model("timm/resnet18.nope")


def test_missing_weights_file():
    with pytest.raises(ValueError, match="'nope.pth': there is no such file"):
        get_model("resnet18", "nope.pth")


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "timm/test_vit", "efficientnet_lite0"])
def test_weights_of_another_architecture(tmp_path, name):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"does not hold the weights of '{name}'.*missing"):
        get_model(name, tmp_path / "w.pth")


def test_malicious_pickle_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"fc.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="was refused.*could run code"):
        get_model("resnet18", tmp_path / "evil.pth")
    with (tmp_path / "plain.pth").open("wb") as file:
        pickle.dump(Evil(), file)
    with pytest.raises(ValueError, match="plain.pth"):
        get_model("resnet18", tmp_path / "plain.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 half a zip"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_hold_no_weights(tmp_path, content, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="weights"):
        get_model("resnet18", path)


def test_a_whole_model_in_a_file_is_refused(tmp_path):
    torch.save(Small(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="Save the tensors alone"):
        get_model("resnet18", tmp_path / "model.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        get_model("resnet18", tmp_path / "list.pth")


def test_wrong_kind_of_backbone():
    with pytest.raises(TypeError, match="got int"):
        get_model(3)


def test_wrong_builders():
    with pytest.raises(TypeError, match="builder of 'test_wrong' must be a function.* got str"):
        register_model("test_wrong", "resnet18")
    for built, came in ((None, "NoneType"), (small(), "Small"), ((small(), None), "tuple")):
        register_model("test_wrong", lambda weights, built=built: built)
        with pytest.raises(TypeError, match=f"for 'test_wrong' returned {came}, not a .*Backbone"):
            get_model("test_wrong")


# ------------------------------------------------------------------------------ values in files


def quantised(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def filled(value):
    return lambda tensor: tensor.index_fill(0, torch.tensor([1]), value)


PROBLEMS = {
    "holds NaN 1 times, among 8 values": ("stem.1.running_var", filled(torch.nan)),
    "holds infinity 108 times": ("body.1.weight", filled(-torch.inf)),
    "is torch.int64, not floating-point": ("head.bias", torch.Tensor.long),
    "is torch.complex64": ("stem.1.weight", lambda tensor: tensor.to(torch.complex64)),
}
PICKLED = {
    "is sparse": ("head.weight", torch.Tensor.to_sparse),
    "has a shape but no values": ("stem.0.weight", lambda tensor: tensor.to("meta")),
    "is quantised": ("head.weight", quantised),
}


@pytest.mark.filterwarnings("ignore:.*[Ss]parse", "ignore:.*[Qq]uantize", "ignore:TypedStorage")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tensors_with_which_no_network_can_compute(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    state = small().state_dict()
    for problem, (name, change) in (PROBLEMS | (PICKLED if suffix == ".pth" else {})).items():
        changed = {**state, name: change(state[name])}
        if suffix == ".pth":
            torch.save(changed, path)
        else:
            safetensors.torch.save_file(changed, path)
        with pytest.raises(ValueError, match=f"weights{suffix}.*: {name} .*{problem}"):
            get_model(small(), path)


def test_other_floats_are_loaded(tmp_path):
    network = small()
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2):
        torch.save({k: v.to(dtype) for k, v in network.state_dict().items()}, tmp_path / "w.pth")
        loaded = get_model(small(1), tmp_path / "w.pth").network
        assert torch.equal(loaded.head.weight, network.head.weight.to(dtype).float())


class Masked(nn.Module):
    """A network with a buffer that is infinite on purpose."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))


def test_masks_may_be_infinite(tmp_path):
    torch.save(Masked().state_dict(), tmp_path / "w.pth")
    assert get_model(Masked(), tmp_path / "w.pth").network.mask[0, 1] == -torch.inf


# ------------------------------------------------------------------------------ weights= beside it


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_is_loaded_into_a_copy_of_a_module(tmp_path, wrapped):
    network, other = small(), small(1)
    backbone = Backbone(network, categories=tuple("abcde")) if wrapped else network
    own = network.head.weight.clone()
    torch.save(other.state_dict(), tmp_path / "w.pth")
    loaded = get_model(backbone, str(tmp_path / "w.pth"))
    assert loaded.fingerprint == get_model(other).fingerprint
    assert torch.equal(network.head.weight, own)
    assert loaded.categories == (tuple("abcde") if wrapped else None)
    assert get_model(backbone).fingerprint == get_model(network).fingerprint != loaded.fingerprint
    assert get_model(backbone, None) is get_model(backbone, "default")
    torch.save(small(2).state_dict(), tmp_path / "w.pth")
    assert get_model(backbone, tmp_path / "w.pth").fingerprint == get_model(small(2)).fingerprint


def test_a_file_is_loaded_into_a_copy_of_a_trained_network(tmp_path, photos):
    model = FineTunedClassifier(small(), image_size=32, unfreeze=0).fit(photos, ["a", "b"])
    torch.save(small(1).state_dict(), tmp_path / "w.pth")
    expected = get_model(small(1)).network.head.weight
    assert torch.equal(get_model(model, tmp_path / "w.pth").network.head.weight, expected)


def test_weights_that_can_not_be_those_of_a_module(tmp_path):
    with pytest.raises(ValueError, match="'no/such/file.pth': there is no such file in "):
        get_model(small(), "no/such/file.pth")
    for name in ("IMAGENET1K_V1", ResNet18_Weights.DEFAULT):
        with pytest.raises(ValueError, match=r"beside a network \(Small\).*'default'"):
            PretrainedFeatureExtractor(small(), weights=name).transform(np.zeros((1, 32, 32)))
    torch.save({**small().state_dict(), "stem.0.weight": torch.ones(7, 3)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"the weights of 'Small': stem.0.weight is \(7, 3\)"):
        get_model(small(), tmp_path / "w.pth")


# ------------------------------------------------------------------------------ relative paths


@pytest.fixture
def in_other_folder(tmp_path, monkeypatch):
    """A function that enters an empty folder; a file weights/w.pth lies in the one before."""
    for name in ("here/weights", "there"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    torch.save(torchvision.models.squeezenet1_1().state_dict(), "weights/w.pth")
    return lambda: monkeypatch.chdir(tmp_path / "there")


@pytest.mark.parametrize("as_given", [str, Path])
def test_pickles_find_their_weights_from_another_folder(in_other_folder, photos, as_given):
    given = as_given("weights/w.pth")
    options = {"weights": given, "image_size": 32, "runtime": "torch"}
    fitted = FineTunedClassifier("squeezenet1_1", unfreeze=0, **options).fit(photos, ["a", "b"])
    extractor = make_pipeline(PretrainedFeatureExtractor("squeezenet1_1", **options))
    as_it_is = PretrainedClassifier("squeezenet1_1", **options)
    expected = fitted.predict_proba(photos), extractor.transform(photos), as_it_is.predict(photos)
    copies = pickle.dumps([fitted, extractor, as_it_is]), skops.io.dumps(fitted)
    for estimator in (fitted, extractor[0], as_it_is, clone(fitted)):
        assert estimator.weights == given and type(estimator.weights) is type(given)
    in_other_folder()
    first, second, third = pickle.loads(copies[0])
    trusted = skops.io.get_untrusted_types(data=copies[1])
    assert not [name for name in trusted if not name.startswith("sktransfer.")]
    for model in (first, skops.io.loads(copies[1], trusted=trusted)):
        np.testing.assert_array_equal(model.predict_proba(photos), expected[0])
    np.testing.assert_array_equal(second.transform(photos), expected[1])
    np.testing.assert_array_equal(third.predict(photos), expected[2])


def test_files_that_were_moved_are_named(in_other_folder, tmp_path, photos):
    extractor = PretrainedFeatureExtractor("squeezenet1_1", weights="weights/w.pth", image_size=32)
    copy = pickle.loads(pickle.dumps(extractor))
    Path("weights/w.pth").rename("weights/new.pth")
    with pytest.raises(ValueError, match=r"here/weights/w.pth': there .* set_params\(weights="):
        copy.transform(photos)
    expected = copy.set_params(weights="weights/new.pth").transform(photos)
    in_other_folder()
    with pytest.raises(ValueError, match="'weights/w.pth': .* in '.*there', from which"):
        extractor.transform(photos)
    extractor.set_params(weights=tmp_path / "here/weights/new.pth")
    np.testing.assert_array_equal(extractor.transform(photos), expected)
    with pytest.raises(ValueError, match="here/weights' can't be read: this is a folder"):
        extractor.set_params(weights=str(tmp_path / "here/weights")).transform(photos)


def test_paths_may_begin_at_home(in_other_folder, monkeypatch):
    monkeypatch.setenv("HOME", os.getcwd())
    backbone = get_model("squeezenet1_1", "~/weights/w.pth")
    assert get_model("squeezenet1_1", Path("~/weights/w.pth")) is backbone
    assert get_model("squeezenet1_1", "weights/w.pth") is backbone
    copy = pickle.loads(pickle.dumps(PretrainedFeatureExtractor(weights="~/weights/w.pth")))
    assert copy.weights == os.path.realpath("weights/w.pth")
