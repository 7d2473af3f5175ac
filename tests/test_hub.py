"""Networks from folders and from the hub: timm's, and vision models of transformers."""

import http.server
import json
import os
import pickle
import shutil
import threading
import time

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants

from sktransfer import (
    FineTunedClassifier,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
    get_model,
    model_summary,
    to_onnx,
)
from sktransfer.models import _hub, _origins
from sktransfer.models._blocks import TracedNetwork
from sktransfer.transforms import Preprocessing

tr = pytest.importorskip("transformers")

SIDE = {"size": {"height": 32, "width": 32}}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
DINO = {k: v for k, v in TINY.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
WORDS = {k: TINY[k] for k in ("hidden_size", "num_attention_heads", "intermediate_size")}
WORDS |= {"num_hidden_layers": 1, "vocab_size": 49500}
NAMES = {"id2label": {0: "cat", 1: "dog", 2: "eel"}, "label2id": {"cat": 0, "dog": 1, "eel": 2}}


def vit():
    return tr.ViTForImageClassification(tr.ViTConfig(**TINY, **NAMES))


def clip_model():
    both = {"text_config": WORDS, "vision_config": TINY, "projection_dim": 24}
    return tr.CLIPModel(tr.CLIPConfig(**both))


def siglip_model():
    return tr.SiglipModel(tr.SiglipConfig(text_config=WORDS, vision_config=TINY))


def swin():
    sizes = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2}
    return tr.Swinv2ForImageClassification(tr.Swinv2Config(**sizes, image_size=32, patch_size=2))


def convnext():
    sizes = tr.ConvNextV2Config(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
    return tr.ConvNextV2ForImageClassification(sizes)


BIT = {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}}
ALL = "SKTRANSFER_TEST_ALL" in os.environ  # families that differ in little, too
MODELS = {  # model, its image processor, what of its output counts, blocks, values in the embedding
    "vit": (vit, lambda: tr.ViTImageProcessor(**SIDE), "logits", 3, 32),
    "vit without a head": (
        lambda: tr.ViTModel(tr.ViTConfig(**TINY), add_pooling_layer=False),
        lambda: tr.ViTImageProcessor(**SIDE),
        "last_hidden_state",
        3,
        32,
    ),
    "dinov2": (
        lambda: tr.Dinov2Model(tr.Dinov2Config(**DINO)),
        lambda: tr.BitImageProcessor(**BIT),
        "pooler_output",
        3,
        32,
    ),
    "dinov3": (
        lambda: tr.DINOv3ViTModel(tr.DINOv3ViTConfig(**TINY, num_register_tokens=2)),
        lambda: tr.DINOv3ViTImageProcessor(**SIDE),
        "pooler_output",
        3,
        32,
    ),
    "siglip": (siglip_model, lambda: tr.SiglipImageProcessor(**SIDE), "pooler_output", 3, 32),
    "clip": (
        clip_model,
        lambda: tr.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        "image_embeds",
        3,
        32,
    ),
    "convnext": (
        convnext,
        lambda: tr.ConvNextImageProcessor(size={"shortest_edge": 40}),
        "logits",
        7,
        32,
    ),
    "swin": (swin, lambda: tr.ViTImageProcessor(**SIDE, resample=3), "logits", 5, 32),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each kind of model, as transformers saves it."""
    root = tmp_path_factory.mktemp("models")
    tr.utils.logging.disable_progress_bar()
    for name, (model, processor, *_) in MODELS.items():
        torch.manual_seed(0)
        model().save_pretrained(root / name)
        processor().save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    sizes = ((50, 70), (91, 40), (33, 33), (47, 120))
    return [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in sizes]


@pytest.fixture
def folder(folders, tmp_path):
    """A ViT in a folder that a test may change."""
    return shutil.copytree(folders / "vit", tmp_path / "vit")


def edited(folder, file="config.json", **changes):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**content, **changes}))
    return folder


@pytest.mark.parametrize("name", [kind for kind in MODELS if ALL or kind == "siglip"])
def test_export_to_onnx(name, folders, images, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    extractor = PretrainedFeatureExtractor(f"hf:{folders / name}")
    path = to_onnx(extractor, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for image, row in zip(images, extractor.transform(images), strict=True):
        (found,) = session.run(["rows"], {"images": image.transpose(2, 0, 1)[np.newaxis]})
        np.testing.assert_allclose(found[0], row, atol=1e-4)


def print_of(name, *args):
    return get_model(str(name), *args).fingerprint


# ------------------------------------------------------------------------------ transformers


def own_output(kind, folder, pixels):
    """What transformers computes from pixels by itself."""
    output = MODELS[kind][2]
    auto = tr.AutoModelForImageClassification if output == "logits" else tr.AutoModel
    model = auto.from_pretrained(folder).eval()
    with torch.no_grad():
        if kind in ("clip", "siglip"):
            rows = model.vision_model(pixel_values=pixels).pooler_output
            return model.visual_projection(rows) if kind == "clip" else rows
        rows = getattr(model(pixel_values=pixels), output)
        return rows[:, 0] if output == "last_hidden_state" else rows


@pytest.mark.parametrize("kind", MODELS)
def test_rows_are_those_of_transformers(folders, images, kind):
    folder = folders / kind
    processor = tr.AutoImageProcessor.from_pretrained(folder)
    theirs = torch.cat([processor(x, return_tensors="pt")["pixel_values"] for x in images])
    preprocessing = get_model(f"hf:{folder}").preprocessing
    tensors = [torch.from_numpy(x).permute(2, 0, 1) for x in images]
    ours = torch.cat([preprocessing.normalize(preprocessing.fit_size(x)[None]) for x in tensors])
    # DINOv3's processor scales floats; here, pixels are rounded to 8 bits first.
    within = 1.01 / 255 / min(preprocessing.std) if kind == "dinov3" else 1e-5
    assert (ours - theirs).abs().max() < within
    rows = PretrainedFeatureExtractor(f"hf:{folder}", layer="output", runtime="torch")
    np.testing.assert_allclose(
        rows.transform(images), own_output(kind, folder, ours).numpy(), atol=1e-5
    )


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_and_cuts(folders, kind):
    *_, n_blocks, width = MODELS[kind]
    backbone = get_model(str(folders / kind))
    traced = TracedNetwork(backbone.network, backbone.preprocessing.size)
    assert len(traced.names) == n_blocks
    assert traced.shape(traced.embedding) == (width,)
    x = torch.rand(2, 3, *backbone.preprocessing.size)
    with torch.no_grad():
        expected = backbone.network(x)
        for cut in range(traced.output + 1):
            part = traced.slice(cut, traced.output)(traced.slice(0, cut)(x))
            torch.testing.assert_close(part, expected)


def test_tokens_in_front_are_counted(folders):
    counts = {"vit": 1, "dinov3": 3, "siglip": 0, "clip": 1, "swin": 0}
    for kind, n_tokens in counts.items():
        traced = TracedNetwork(get_model(f"hf:{folders / kind}").network, (32, 32))
        assert traced.n_prefix_tokens(len(traced.names)) == n_tokens


@pytest.mark.parametrize("kind", [kind for kind in MODELS if ALL or kind in ("dinov3", "swin")])
def test_every_depth_is_trained(folders, photos, kind):
    name = f"hf:{folders / kind}"
    frozen = PretrainedFeatureExtractor(name, runtime="torch").fit(photos)
    before = get_model(name).network.state_dict()
    for unfreeze, n_blocks in ((0, 0), (1, 1), ("all", len(frozen.block_names_))):
        model = FineTunedClassifier(name, unfreeze=unfreeze, max_epochs=1, random_state=0)
        model.fit(photos, ["a", "b"])
        assert (
            model.unfrozen_block_names_
            == frozen.block_names_[len(frozen.block_names_) - n_blocks :]
        )
        changed = model.to_feature_extractor().transform(photos) - frozen.transform(photos)
        assert (np.abs(changed).max() > 1e-5) == (unfreeze != 0)
        if unfreeze == 1:
            copied = pickle.loads(pickle.dumps(model))
            np.testing.assert_allclose(
                copied.predict_proba(photos), model.predict_proba(photos), atol=1e-6
            )
    after = get_model(name).network.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_memory_and_another_image_size(folders, photos, tmp_path):
    options = {"image_size": 48, "memory": tmp_path / "memory", "layer": "stages"}
    rows = PretrainedFeatureExtractor(f"hf:{folders / 'vit'}", **options).transform(photos)
    moved = shutil.copytree(folders / "vit", tmp_path / "moved")
    again = PretrainedFeatureExtractor(f"local-dir:{moved}", **options)
    np.testing.assert_array_equal(again.transform(photos), rows)


def test_the_place_does_not_count_but_the_content(folders, folder):
    first = print_of(folders / "vit")
    assert print_of(f"hf:{folder}") == print_of(f"local-dir:{folder}") == first
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["classifier.bias"] += 1
    safetensors.torch.save_file(state, folder / "model.safetensors")
    assert print_of(folder) != first
    assert print_of(edited(folder, layer_norm_eps=1e-3)) != first


def test_categories(folders, folder, photos):
    model = PretrainedClassifier(f"hf:{folders / 'vit'}")
    assert set(model.predict(photos)) <= {"cat", "dog", "eel"}
    assert get_model(f"hf:{folders / 'swin'}").categories is None  # LABEL_0 and LABEL_1
    assert get_model(str(folder), None).categories is None  # random weights
    assert "layers.1" in str(model_summary(f"hf:{folders / 'vit'}"))


def test_shards_and_half_precision(folder):
    expected = print_of(folder)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    assert print_of(folder) == expected  # the only safetensors
    state = safetensors.torch.load_file(folder / "one.safetensors")
    (folder / "one.safetensors").unlink()
    tr.ViTForImageClassification.from_pretrained(
        None, config=tr.ViTConfig.from_pretrained(folder), state_dict=dict(state)
    ).save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert print_of(folder) == expected
    for file in folder.glob("model-*"):
        half = {k: v.half() for k, v in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(half, file)
    network = get_model(str(folder)).network
    assert all(p.dtype == torch.float32 for p in network.parameters())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../model.safetensors")
    edited(folder, "model.safetensors.index.json", weight_map=index["weight_map"])
    with pytest.raises(ValueError, match="must lie in the folder of their index"):
        get_model(str(folder))


def test_pickles_only_where_they_are_named(folder):
    expected = print_of(folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no safetensors .*weights='pytorch_model.bin'"):
        get_model(str(folder))
    assert print_of(folder, "pytorch_model.bin") == expected
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match="but config.json, preprocessor_config.json, in"):
        get_model(f"hf:{folder}")
    with pytest.raises(OSError, match="there is no file pytorch_model.bin, but"):
        get_model(f"hf:{folder}", "pytorch_model.bin")
    for name in ("../nowhere/w.bin", "/nowhere/w.bin"):
        with pytest.raises(ValueError, match="there is no such file, and files of"):
            get_model(f"hf:{folder}", name)


def test_a_file_of_ones_own_beside_a_folder(folder, tmp_path):
    expected = print_of(folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}}, path)
    assert print_of(folder, path) == expected
    other = {k: v for k, v in state.items() if not k.startswith("classifier")}
    torch.save({"model": {**other, "classifier.weight": torch.ones(9, 32)}}, path)
    with pytest.warns(UserWarning, match="its head is not from the file .*classifier.bias"):
        network = get_model(str(folder), path).network
    assert torch.equal(network.model.vit.layernorm.weight, state["vit.layernorm.weight"])


# ------------------------------------------------------------------------------ refused


def test_weights_of_another_architecture(folder, folders):
    shutil.copy(folders / "clip" / "model.safetensors", folder)
    with pytest.raises(ValueError, match="does not hold the weights of .*is missing"):
        get_model(str(folder))
    wide = edited(folder, hidden_size=2**16, intermediate_size=2**18)
    with pytest.raises(ValueError, match="they do not belong together"):
        get_model(str(wide))
    with pytest.raises(ValueError, match="num_hidden_layers=1000000000 in its config.json"):
        get_model(str(edited(folder, num_hidden_layers=10**9)))


def test_values_that_are_no_numbers(folder):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    state["classifier.bias"][0] = torch.nan
    safetensors.torch.save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match="classifier.bias holds NaN 1 times"):
        get_model(str(folder))


def test_a_processor_that_is_missing_or_does_something_else(folder):
    file = "preprocessor_config.json"
    for changes, reason in (
        ({"resample": 0}, "resample=0 is neither"),
        ({"do_resize": False}, "images of one size"),
        ({"size": {"shortest_edge": 32}}, "nothing is cropped"),
        ({"rescale_factor": 1.0}, "its pixels are others"),
        ({"image_mean": "red"}, "mean must have a number for each"),
        ({"image_processor_type": "NoSuchProcessor"}, "NoSuchProcessor|[Uu]nrecognized|None"),
    ):
        kept = (folder / file).read_text()
        with pytest.raises(ValueError, match=f"can't be done here.*(?:{reason})"):
            get_model(str(edited(folder, file, **changes)))
        (folder / file).write_text(kept)
    (folder / file).unlink()
    with pytest.raises(OSError, match="has no preprocessor_config.json"):
        get_model(str(folder))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"model_type": "vit_mae"}, "hides patches at random.*timm/vit_base_patch16_224.mae"),
        ({"model_type": "siglip2"}, "keep their proportions"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "takes input_ids rather than"),
        ({"model_type": "no_such_model"}, "nor a model_type that the installed transformers knows"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
        ({"architecture": "no_such_net"}, "an architecture that the installed timm does not know"),
        ({"architecture": "resnet18"}, "timm could not build 'resnet18'"),
        ({"architecture": "resnet18", "model_args": {"stem_width": 10**9}}, "model_args="),
        ({"architecture": "resnet18", "model_args": {"checkpoint_path": "x"}}, "model_args="),
        ({"architecture": "resnet18", "model_args": {"nothing": 1}}, "could not build"),
    ],
)
def test_a_config_of_something_else(folder, changes, reason):
    with pytest.raises(ValueError, match=reason):
        get_model(str(edited(folder, **changes)))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"architecture"', "[" * 10**5])
def test_a_config_that_is_no_json(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json is no JSON file"):
        get_model(str(folder))


REMOTE = """
from pathlib import Path
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
Path(TRACE).touch()
class OwnConfig(PretrainedConfig):
    model_type = "sktransfer_own"
class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    main_input_name = "pixel_values"
    def __init__(self, config):
        super().__init__(config)
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.post_init()
    def forward(self, pixel_values):
        maps = self.conv(pixel_values)
        return BaseModelOutputWithPooling(maps, maps.mean((2, 3)))
"""


def test_code_of_others_runs_only_where_it_is_trusted(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    trace = tmp_path / "ran"
    (folder / "own.py").write_text(f"TRACE = {str(trace)!r}{REMOTE}")
    classes = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    # A known kind of model needs no code of others; that which is named is not run.
    edited(
        folder, auto_map=classes, attn_implementation="someone/kernel", _attn_implementation="x/y"
    )
    get_model(str(folder))
    edited(folder, model_type="sktransfer_own", architectures=["OwnModel"])
    with pytest.raises(ValueError, match=r"not run\..*get_model\(.*, trust_remote_code=True\)"):
        get_model(str(folder))
    edited(folder, model_type="vit", architectures=["ViTModel"])
    own = {"auto_map": {"AutoImageProcessor": "own.OwnModel"}, "image_processor_type": "Own"}
    edited(folder, "preprocessor_config.json", **own)
    with pytest.raises(ValueError, match="can't be done here"):
        get_model(str(folder))
    assert not trace.exists()


def test_trusted_code_runs(folder, tmp_path, monkeypatch, photos):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "c"))
    monkeypatch.syspath_prepend(str(tmp_path / "c"))
    trace = tmp_path / "ran"
    (folder / "own.py").write_text(f"TRACE = {str(trace)!r}{REMOTE}")
    state = {"conv.weight": torch.ones(4, 3, 3, 3), "conv.bias": torch.zeros(4)}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    classes = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    edited(folder, model_type="sktransfer_own", architectures=["OwnModel"], auto_map=classes)
    backbone = get_model(str(folder), trust_remote_code=True)
    assert trace.exists()
    assert PretrainedFeatureExtractor(backbone).transform(photos).shape == (2, 4)
    with pytest.raises(ValueError, match="is for a folder or a repository"):
        get_model("resnet18", None, trust_remote_code=True)


# ------------------------------------------------------------------------------ timm


@pytest.fixture(scope="module")
def of_timm(tmp_path_factory):
    """A folder that timm wrote for its hub."""
    folder = tmp_path_factory.mktemp("timm") / "net"
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    names = {"label_names": ["a", "b", "c"]}
    timm.models.save_for_hf(model, folder, model_config=names, safe_serialization="both")
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    return edited(folder, pretrained_cfg={**config, "mean": [0.1, 0.2, 0.3]})


def test_folders_of_timm(of_timm, photos, monkeypatch):
    backbone = get_model(f"local-dir:{of_timm}")
    state = safetensors.torch.load_file(of_timm / "model.safetensors")
    assert torch.equal(backbone.network.head.weight, state["head.weight"])
    assert backbone.preprocessing.mean == (0.1, 0.2, 0.3)
    assert backbone.categories == ("a", "b", "c")
    assert print_of(f"local-dir:{of_timm}", "pytorch_model.bin") == backbone.fingerprint
    assert print_of(f"hf:{of_timm}") == print_of(of_timm) == backbone.fingerprint
    model = FineTunedClassifier(f"local-dir:{of_timm}", unfreeze=1, max_epochs=1, image_size=64)
    model.fit(photos, ["a", "b"]).predict(photos)
    monkeypatch.chdir(of_timm.parent)
    relative = PretrainedFeatureExtractor("local-dir:net", image_size=64)
    rows, copy = relative.transform(photos), pickle.dumps(relative)
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(pickle.loads(copy).transform(photos), rows)
    with pytest.raises(ValueError, match="no such folder in '/', from which it is looked for"):
        relative.transform(photos)


def test_a_config_of_timm_can_not_name_other_files(of_timm, tmp_path):
    folder = shutil.copytree(of_timm, tmp_path / "net")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"url": "file:///x", "file": "/etc/hostname", "custom_load": "hf"}
    edited(folder, pretrained_cfg=config["pretrained_cfg"])
    assert print_of(folder) == print_of(of_timm)


# ------------------------------------------------------------------------------ names


def test_known_names_are_not_taken_for_folders(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder.rename(tmp_path / "resnet18")
    assert type(get_model("resnet18", None).network).__name__ == "ResNet"
    assert type(get_model("hf:resnet18").network).__name__ == "VisionNetwork"
    known = PretrainedFeatureExtractor("resnet18", weights=None)
    assert pickle.loads(pickle.dumps(known)).backbone == "resnet18"
    with pytest.raises(ValueError, match="local-dir:nowhere': there is no such folder in "):
        get_model("local-dir:nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there is no config.json in .*empty"):
        get_model("local-dir:empty")
    with pytest.raises(ValueError, match="Did you mean 'hf:facebook/dinov2-small'"):
        get_model("facebook/dinov2-small")
    for name in ("hf:a/b/c", "hf-hub:", "hf:", "hf:a b/c"):
        with pytest.raises(ValueError, match=f"{name}' names no repository of the hub"):
            get_model(name)


# ------------------------------------------------------------------------------ the hub's cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Files that the client of the hub has kept, and no connection."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def keep(folder, repository, revision="main"):
        commit = f"{len(list(tmp_path.glob('hub/*/refs/*'))):040d}"
        place = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        shutil.copytree(folder, place / "snapshots" / commit)

    return keep


def test_what_the_hub_gave_before_is_found(cache, folders, of_timm, folder):
    cache(folders / "vit", "someone/vit")
    assert print_of("hf:someone/vit") == print_of(folders / "vit")
    cache(of_timm, "someone/net")
    expected = print_of(of_timm)
    assert print_of("hf-hub:someone/net") == print_of("hf:someone/net") == expected
    cache(edited(folder, layer_norm_eps=0.1), "someone/vit", "v2")
    assert print_of("hf:someone/vit@v2") == print_of(folder) != print_of("hf:someone/vit")
    assert get_model("hf-hub:someone/net", "pytorch_model.bin").fingerprint == expected


def test_without_a_connection_an_error_says_what_was_looked_for(cache, folders, tmp_path):
    cache(folders / "vit", "someone/more")
    message = (
        r"its config.json was looked for in .*hub.models--other--net, is not there.*"
        r"HF_HUB_OFFLINE is set.*hf download other/net.*'local-dir:PATH'.*"
        r"someone/more.*lite0', which sees images and reads no words"
    )
    for name in ("hf:other/net", "hf-hub:other/net"):
        with pytest.raises(OSError, match=message):
            get_model(name)
    with pytest.raises(OSError, match="json at 'v9' was looked for.*someone/more --revision v9"):
        get_model("hf:someone/more@v9")
    commit = next(tmp_path.glob("hub/*/snapshots/*"))
    (commit / "model.safetensors").unlink()
    looked = "{} was looked for in .*models--someone--more, is not there.*OFFLINE is set.*lite0"
    with pytest.raises(OSError, match=looked.format("model.safetensors")):
        get_model("hf:someone/more")
    with pytest.raises(OSError, match=looked.format("other.bin")):
        get_model("hf:someone/more", "other.bin")
    (commit / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match=looked.format("preprocessor_config.json")):
        get_model("hf:someone/more")
    # Its client notes which files the hub does not have: then no connection would help.
    absent = commit.parent.parent / ".no_exist" / commit.name
    absent.mkdir(parents=True)
    for file in ("preprocessor_config.json", "processor_config.json"):
        (absent / file).touch()
    with pytest.raises(OSError, match="has no preprocessor_config.json in 'someone/more'"):
        get_model("hf:someone/more")


def test_pickles_of_the_cache_are_named_without_a_connection(cache, folder):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    cache(folder, "someone/pickled")
    with pytest.raises(OSError, match="Pass weights='pytorch_model.bin', which is read without"):
        get_model("hf:someone/pickled")


def test_a_hub_that_refuses_connections(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "")
    with pytest.raises(OSError, match="could not be downloaded .no connection.*efficientnet_lite0"):
        get_model("hf:other/net")


class _Busy(http.server.BaseHTTPRequestHandler):
    """What a hub answers that can't answer."""

    def do_HEAD(self):  # noqa: N802  (the name is that of the method of HTTP)
        self.server.asked.append(self.path)
        self.send_response(503)
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *args):
        pass


def test_what_a_hub_answers_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(_hub, "_SECONDS", 300)
    monkeypatch.setattr(_origins, "_SOON", 600)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Busy)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    pattern = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the tries of its client
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "")
    message = f"its config.json was looked for in .*a--b.* \\({url} did not give it: .*503.*lite0"
    try:
        with pytest.raises(OSError, match=message):
            get_model("hf:a/b")
        tries = len(server.asked)
        with pytest.raises(OSError, match=message):  # and is not asked for half a minute once more
            get_model("hf:a/b")
    finally:
        server.shutdown()
        server.server_close()
    assert len(server.asked) == tries > 0


# ------------------------------------------------------------------------------ preprocessing


def test_settings_of_image_processors():
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    read = Preprocessing.from_transformers
    edge = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}
    assert (read({**settings, **edge}).mode, read({**settings, **edge}).size) == (
        "floor",
        (224,) * 2,
    )
    large = read({**settings, "size": {"shortest_edge": 384}, "crop_pct": 0.9})
    assert (large.mode, large.resize, large.size) == ("squash", (384, 384), (384, 384))
    small = read({**settings, "size": {"shortest_edge": 224}, "crop_pct": 0.875})
    assert (small.mode, small.resize, small.size) == ("floor", (256, 256), (224, 224))
    assert read({**settings, "size": 64, "do_normalize": False}).std == (1, 1, 1)
