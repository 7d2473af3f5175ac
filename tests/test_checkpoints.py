"""Files of weights as people have them: prefixes, containers, shards, heads; and forged ones."""

import argparse
import io
import json
import pickle
import re
import struct
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from networks import Small, small
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sktransfer import get_model
from sktransfer.models._registry import seeded_model


@pytest.fixture(scope="module")
def state():
    return small(1).state_dict()


@pytest.fixture(scope="module")
def expected():
    return get_model(small(1)).fingerprint


def saved(content, path, **options):
    torch.save(content, path, **options)
    return path


def with_prefix(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def loaded_print(path):
    return get_model(small(), path).fingerprint


# ------------------------------------------------------------------------------ names

PREFIXES = ["module.", "backbone.", "encoder.", "model.", "_orig_mod.", "net.", "image_tower."]
SEVERAL = ["module.backbone.", "model.encoder._orig_mod.", "_orig_mod.module.model.", "a.b.c."]


def test_prefixes_are_taken_off(tmp_path, state, expected):
    for prefix in PREFIXES + SEVERAL:
        assert loaded_print(saved(with_prefix(state, prefix), tmp_path / "w.pth")) == expected
    inside = {key.replace("body.", "body._orig_mod.module."): v for key, v in state.items()}
    assert loaded_print(saved(inside, tmp_path / "w.pth")) == expected
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(with_prefix(state, "module."), path)
    assert loaded_print(path) == expected


def test_a_wrapped_network_of_torch_is_loaded(tmp_path, expected):
    path = tmp_path / "w.pth"
    wrapped = nn.DataParallel(small(1))
    assert loaded_print(saved(wrapped.state_dict(), path)) == expected
    averaged = AveragedModel(small(1))  # counts its steps in a tensor beside the network
    assert loaded_print(saved(averaged.state_dict(), path)) == expected


def test_a_name_of_the_network_itself_is_no_prefix(tmp_path):
    network = nn.ModuleDict({"model": small(1)})
    network.forward = network["model"].forward
    loaded = get_model(network, saved(network.state_dict(), tmp_path / "w.pth"))
    assert loaded.fingerprint == get_model(network).fingerprint


def test_of_several_networks_in_a_file_the_average_is_loaded(tmp_path, state, expected):
    first = with_prefix(small(2).state_dict(), "student.backbone.")
    both = {**first, **with_prefix(state, "teacher.backbone.")}
    with pytest.warns(UserWarning, match=r"student.backbone.stem.0.weight, .* more left out\.$"):
        assert loaded_print(saved(both, tmp_path / "w.pth")) == expected


# ------------------------------------------------------------------------------ containers

CONTAINERS = ["state_dict", "state_dict_ema", "model", "net", "model_state", "weights", "teacher"]


def beside(state):
    """What trainings save with the weights."""
    network = small(1)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    settings = argparse.Namespace(lr=0.1, model="resnet", inner=argparse.Namespace(size=(1, 2)))
    return {
        "epoch": 3,
        "best": torch.tensor(0.5),
        "args": settings,
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 1.0},
        "rng": torch.get_rng_state(),
    }


def test_tensors_are_found_beside_what_a_training_keeps(tmp_path, state, expected):
    others = beside(state)
    for key in [*CONTAINERS, "model_state_dict", "a name that nobody knows"]:
        content = {**others, key: state}
        if key == CONTAINERS[0]:
            content = {"optimizer": others["optimizer"], "args": others["args"], key: state}
        if key.startswith("a name"):
            content = {"epoch": 3, "args": others["args"], key: state}
        assert loaded_print(saved(content, tmp_path / "w.pth")) == expected
    nested = {"model": {"state_dict": with_prefix(state, "module.")}, "epoch": 1}
    assert loaded_print(saved(nested, tmp_path / "w.pth")) == expected


def test_what_lightning_saves_is_loaded(tmp_path, state, expected):
    content = {
        "epoch": 1,
        "global_step": 10,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**with_prefix(state, "model."), "criterion.weight": torch.ones(5)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(1.0)}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "args": argparse.Namespace(size=3)},
    }
    with pytest.warns(UserWarning, match=r"w.ckpt' for 'Small': criterion.weight left out\.$"):
        assert loaded_print(saved(content, tmp_path / "w.ckpt")) == expected


def test_averaged_weights_are_preferred_and_the_others_named(tmp_path, state, expected):
    for best, other in (("state_dict_ema", "state_dict"), ("teacher", "student")):
        content = {other: small(2).state_dict(), best: state}
        with pytest.warns(UserWarning, match=f"'{best}' is loaded; '{other}' left out"):
            assert loaded_print(saved(content, tmp_path / "w.pth")) == expected


@pytest.mark.parametrize("key", ["module", "state_dict", "shadow", None])
def test_an_average_by_the_name_of_ema_is_loaded(tmp_path, state, expected, key):
    average = state if key is None else {key: state, "updates": 3, "decay": torch.tensor(0.9)}
    for best, other in (("ema", "model"), ("ema", "state_dict"), ("ema_model", "model")):
        content = {other: small(2).state_dict(), best: average, "epoch": 1}
        with pytest.warns(UserWarning, match=f"'{best}' is loaded; '{other}' left out"):
            assert loaded_print(saved(content, tmp_path / "w.pth")) == expected
    counted = {"model": state, "ema": {"updates": torch.tensor(3)}}  # no weights of its own
    assert loaded_print(saved(counted, tmp_path / "w.pth")) == expected


# ------------------------------------------------------------------------------ formats


def test_the_content_tells_the_format(tmp_path, state, expected):
    for name in ("w.bin", "W.PTH", "w.safetensors", "w.tar", "w.CKPT", "nothing"):
        path = saved(state, tmp_path / name)
        assert loaded_print(path) == expected
        saved(state, path, _use_new_zipfile_serialization=False)
        assert loaded_print(path) == expected
    for name in ("w.bin", "w.pt", "W.SAFETENSORS"):
        safetensors.torch.save_file(state, tmp_path / name)
        assert loaded_print(tmp_path / name) == expected


def test_half_precision_is_loaded_as_float32(tmp_path, state):
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    content = {"model": with_prefix(half, "module."), "args": argparse.Namespace()}
    weight = get_model(small(), saved(content, tmp_path / "w.bin")).network.head.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, half["head.weight"].float())


def sharded(state, folder, form, index="model{}.index.json"):
    """Write a state dict as two shards and their index; return the path of this."""
    save = torch.save if form == "bin" else safetensors.torch.save_file
    names = sorted(state)
    files = {}
    for i, part in enumerate((names[:4], names[4:]), 1):
        file = f"model-{i:05d}-of-00002.{form}"
        save({name: state[name] for name in part}, folder / file)
        files |= dict.fromkeys(part, file)
    path = folder / index.format(f".{form}")
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))
    return path


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_shards_are_loaded_by_their_index(tmp_path, state, expected, form):
    path = sharded(with_prefix(state, "model."), tmp_path, form)
    assert loaded_print(path) == expected
    loud = path.rename(path.with_name(path.name.upper()))
    assert loaded_print(loud) == expected
    loud.rename(path)
    sharded(small(2).state_dict(), tmp_path, form)
    assert loaded_print(path) == get_model(small(2)).fingerprint
    # Kept as links, as the client of the hub does it.
    (tmp_path / "links").mkdir()
    for file in tmp_path.glob("model*"):
        (tmp_path / "links" / file.name).symlink_to(file.rename(tmp_path / f"blob-{file.stem}"))
    assert loaded_print(tmp_path / "links" / path.name) == get_model(small(2)).fingerprint


def test_shards_that_are_lost_or_not_those_of_the_index(tmp_path, state):
    path = sharded(state, tmp_path, "safetensors")
    second = tmp_path / "model-00002-of-00002.safetensors"
    with pytest.raises(ValueError, match="one of several: pass the index beside it"):
        get_model(small(), second)
    safetensors.torch.save_file({"other": torch.ones(1)}, second)
    with pytest.raises(ValueError, match="lists .* in model-00002-of-00002.* does not hold it"):
        get_model(small(), path)
    second.unlink()
    with pytest.raises(ValueError, match="shard model-00002-of-00002.* can't be read: No such fil"):
        get_model(small(), path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"weight_map": 3}', b'{"weight_map": {}}', b"[" * 100_000]
)
def test_an_index_that_is_none(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match="no index of shards|lists no shards"):
        get_model(small(), tmp_path / "model.safetensors.index.json")


# ------------------------------------------------------------------------------ heads


def without_head(state):
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def test_a_file_with_another_head_is_loaded_up_to_it(tmp_path, state):
    body, own = without_head(state), small().state_dict()
    several = {"head.0.weight": torch.ones(4, 16), "head.2.weight": torch.ones(3, 4)}
    projector = {"projector.0.weight": torch.ones(8, 16), "fc.weight": torch.ones(5, 16)}
    head = r"its head is not from the file \(head.weight, head.bias\)"
    for others, line in (
        ({}, f"for 'Small': {head}"),
        (several, f"head.0.weight, head.2.weight left out; {head}"),
        (projector, f"projector.0.weight, fc.weight left out; {head}"),
        ({"head.weight": torch.ones(7, 16), "head.bias": torch.ones(7)}, head),
    ):
        path = saved({"model": with_prefix({**body, **others}, "module.")}, tmp_path / "w.pth")
        with pytest.warns(UserWarning, match=line) as caught:
            network = get_model(small(), path).network
        assert len(caught) == 1
        for key, value in network.state_dict().items():
            assert torch.equal(value, own[key] if key.startswith("head.") else state[key])


def test_a_head_that_a_file_lacks_is_always_the_same(tmp_path):
    network = timm.create_model("test_vit", num_classes=0)
    path = saved(network.state_dict(), tmp_path / "w.pth")
    prints = set()
    for seed in (1, 2):
        saved(network.state_dict(), path)  # another file, to be read again
        with pytest.warns(UserWarning, match=r"its head is not from the file \(head.weight, hea"):
            prints.add(seeded_model("timm/test_vit", path, seed).fingerprint)
    assert len(prints) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, "body.2.weight": torch.ones(4, 4, 3, 3)},
        lambda state: {**state, "body.1.se.weight": torch.ones(4, 4)},
        lambda state: {k: v for k, v in state.items() if k != "body.0.weight"},
        lambda state: {**state, "stem.0.weight": torch.ones(8, 4, 3, 3)},
        lambda state: {**without_head(state), "stem.3.weight": torch.ones(8)},
        lambda state: {"head.weight": state["head.weight"], "head.bias": state["head.bias"]},
        lambda state: {"epoch": torch.tensor(3.0)},
    ],
)
def test_what_lies_before_the_head_must_fit(tmp_path, state, change):
    with pytest.raises(ValueError, match="does not hold the weights of 'Small'"):
        get_model(small(), saved(change(state), tmp_path / "w.pth"))


def test_an_error_lists_the_first_names(tmp_path, state):
    other = {key.replace("body.", "layers."): value for key, value in state.items()}
    missing = "body.0.weight is missing; body.0.bias is missing; body.1.weight is missing"
    unknown = "layers.0.weight is not known; layers.0.bias is not known; layers.1.weight is not"
    with pytest.raises(ValueError, match=f"{missing}; {unknown}.*8 entries differ of 13"):
        get_model(small(), saved(other, tmp_path / "w.pth"))


def test_counters_and_tables_do_not_count(tmp_path, state, expected):
    without = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    table = {"body.position_ids": torch.arange(3)}
    loaded = get_model(small(), saved({**without, **table}, tmp_path / "w.pth")).network
    assert torch.equal(loaded.stem[1].running_var, state["stem.1.running_var"])


# ------------------------------------------------------------------------------ no weights


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return buffer.getvalue()


def as_bytes(save, content):
    buffer = io.BytesIO()
    save(buffer, content)
    return buffer.getvalue()


WHAT = {
    "empty": b"",
    "a page of HTML": b"\n<!DOCTYPE html><html>404</html>",
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "a pointer of xet": b'# xet version 0\nfilesize = 9\nhash = "00"\n',
    "an HDF5 file, as Keras": b"\x89HDF\r\n\x1a\n" + bytes(600),
    "a model of Keras": zipped(model_weights_h5=b"", config_json=b"{}"),
    "an array of NumPy": as_bytes(np.save, np.ones(3)),
    "an archive of NumPy": as_bytes(np.savez, np.ones(3)),
    "a ZIP archive of photo.jpg": zipped(photo_jpg=b"x"),
    "a ZIP archive of nothing": zipped(),
    "a damaged ZIP": b"PK\x03\x04 half a zip",
    "compressed by gzip": b"\x1f\x8b" + bytes(20),
    "JSON; an index": b'{"weight_map": {}}',
    "a text, beginning with b'hello": b"hello, world",
    "of an unknown format": bytes(range(100, 250)),
}


@pytest.mark.parametrize("what", WHAT)
def test_an_error_says_what_a_file_is(tmp_path, what):
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(WHAT[what])
        with pytest.raises(ValueError, match=f"{name}' holds no weights: it is {what}"):
            get_model(small(), tmp_path / name)


def test_archives_of_files_are_told_from_weights(tmp_path, state):
    saved(state, tmp_path / "inner.pth")
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        archive.add(tmp_path / "inner.pth", "inner.pth")
    with pytest.raises(ValueError, match="it is a tar archive of inner.pth: unpack it first"):
        get_model(small(), tmp_path / "w.tar")
    with pytest.raises(ValueError, match="can't be read: embedded null byte"):
        get_model(small(), "w\0.pth")


def test_a_flipped_bit_is_told(tmp_path, state):
    path = saved(state, tmp_path / "w.pth")
    content = bytearray(path.read_bytes())
    content[content.index(state["body.1.weight"].numpy().tobytes()) + 8] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"the checksum of w/data/\d+ is wrong, so the file is"):
        get_model(small(), path)


def test_programs_are_told_from_weights(tmp_path):
    path = tmp_path / "w.pt"
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(ValueError, match="a program of TorchScript: load it by torch.jit.load"):
        get_model(small(), path)
    program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "w.pt2")
    with pytest.raises(ValueError, match="a program of torch.export"):
        get_model(small(), tmp_path / "w.pt2")


# ------------------------------------------------------------------------------ forged


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


class Settings:
    """A class of somebody's training script."""


def test_no_part_of_a_file_runs_code(tmp_path, state):
    evil = Evil(tmp_path / "ran")
    namespace = argparse.Namespace(lr=evil)
    own_state = argparse.Namespace()
    own_state.__dict__.update(__setstate__=evil, __class__=evil)
    as_call = pickle.dumps(argparse.Namespace()).replace(b"argparse", b"argparsf")
    contents = [
        {"state_dict": state, "args": namespace},
        {"state_dict": state, "args": own_state},
        {"state_dict": state, "hyper_parameters": {"optimizer": evil}},
        {"state_dict": state, "hyper_parameters": Settings()},
        {"state_dict": {**state, "more": evil}},
        {"state_dict": state, "best": np.float64(3)},
        Small(),
        evil,
    ]
    path = tmp_path / "w.pth"
    for content in contents:
        for options in ({}, {"_use_new_zipfile_serialization": False}):
            saved(content, path, **options)
            with pytest.raises(ValueError, match="was refused.* could run code.*Save the tensors"):
                get_model(small(), path)
    for content in (pickle.dumps(evil), pickle.dumps({"a": evil}), as_call):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="w.pth"):
            get_model(small(), path)
    index = sharded({**state, "a": torch.ones(1)}, tmp_path, "bin")
    saved({"a": evil}, tmp_path / "model-00001-of-00002.bin")
    with pytest.raises(ValueError, match="shard model-00001-of-00002.bin was refused.*run code"):
        get_model(small(), index)
    assert not (tmp_path / "ran").exists()


def test_an_error_names_what_could_run(tmp_path, state):
    path = saved({"state_dict": state, "hparams": Settings(), "n": np.float64(1)}, tmp_path / "w")
    with pytest.raises(ValueError, match=r"it names .*numpy.*scalar.*test_checkpoints.Settings"):
        get_model(small(), path)


@pytest.mark.parametrize("file", ["../w.bin", "/etc/hostname", "a/b", "..", "", "a\\b", "C:w", 3])
def test_shards_lie_in_the_folder_of_their_index(tmp_path, state, file):
    saved(state, tmp_path / "w.bin")
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": dict.fromkeys(state, file)}))
    match = "can't be read" if file == 3 else "must lie in the folder of their index"
    with pytest.raises(ValueError, match=match):
        get_model(small(), path)


def test_sizes_that_a_file_only_declares(tmp_path, state):
    def safe(shape, end, length=None):
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
        header = json.dumps({"head.weight": entry}).encode()
        return struct.pack("<Q", length or len(header)) + header + bytes(16)

    large = 2**40
    files = [safe([large], 4 * large), safe([4], 16, 2**62), safe([2**33, 2**33], 16)]
    # How many values a storage has: in the pickle of the older format, and of the present one.
    n_values = b"\x8a\x06" + struct.pack("<q", large)[:6]
    old = saved(state, tmp_path / "old", _use_new_zipfile_serialization=False).read_bytes()
    files.append(re.sub(rb"(cpuq.)K.N", lambda m: m[1] + n_values + b"N", old, count=1, flags=re.S))
    forged = io.BytesIO()
    with (
        zipfile.ZipFile(saved(state, tmp_path / "new")) as plain,
        zipfile.ZipFile(forged, "w") as archive,
    ):
        for name in plain.namelist():
            pattern = rb"(cpuq.)K.t" if name.endswith("data.pkl") else rb"(never)"
            part = re.sub(pattern, lambda m: m[1] + n_values + b"t", plain.read(name), flags=re.S)
            archive.writestr(name, part)
    files.append(forged.getvalue())
    assert len(set(files)) == 5 and old not in files
    for content in files:
        (tmp_path / "w.pth").write_bytes(content)
        with pytest.raises(ValueError, match="w.pth' can't be read as a state dict"):
            get_model(small(), tmp_path / "w.pth")


def test_archives_do_not_unpack_to_more_than_they_are(tmp_path):
    saved({"head.weight": torch.zeros(2**20)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match="unpacks to more than its own size"):
        get_model(small(), tmp_path / "bomb.pth")


def test_a_view_without_values_is_no_weight(tmp_path, state):
    wide = torch.zeros(1).expand(2**40)  # of a terabyte, in one value
    with pytest.raises(ValueError, match=r"stem.0.weight is \(1099511627776,\), not"):
        get_model(small(), saved({**state, "stem.0.weight": wide}, tmp_path / "w.pth"))
