import copy
import pickle
import socket

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from huggingface_hub import constants
from networks import Small, small
from torch import nn
from torchvision.models import ResNet18_Weights

from sktransfer import get_model, list_models, register_model
from sktransfer._builders import published_weights
from sktransfer._detectors import load_detector
from sktransfer._hub import check_connection
from sktransfer._text_model import load_text_model
from sktransfer.models import Backbone, unique_labels


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


def test_a_module_changed_in_place_is_another_backbone():
    network = small()
    first = get_model(network).fingerprint
    network.head.weight.data.mul_(2)
    assert get_model(network).fingerprint != first


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


@pytest.mark.parametrize("name", ["resnet50", "timm/resnet50", "efficientnet_lite0"])
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
