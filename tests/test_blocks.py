import copy
import functools
import os
import sys

import einops
import pytest
import timm
import torch
import torchvision
from packaging.version import Version
from timm.models import register_notrace_module
from timm.models.cait import Cait
from timm.models.convit import ConVit
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vgg import make_layers

from sktransfer.models._blocks import TracedNetwork, TracingError

# Number of blocks -> the classification networks of torchvision that have it.
COUNTS = {
    7: "alexnet",
    8: "densenet121 densenet161 densenet169 densenet201",
    9: "resnet18 squeezenet1_0 squeezenet1_1",
    10: "vgg11 vgg11_bn",
    12: "googlenet vgg13 vgg13_bn",
    13: "vit_b_16 vit_b_32",
    14: "maxvit_t mobilenet_v3_small",
    15: "regnet_y_800mf vgg16 vgg16_bn",
    16: "inception_v3 swin_t swin_v2_t",
    17: "regnet_x_800mf regnet_y_400mf resnet34 resnet50 resnext50_32x4d wide_resnet50_2",
    18: "efficientnet_b0 mobilenet_v3_large regnet_y_8gf shufflenet_v2_x0_5 "
    "shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 vgg19 vgg19_bn",
    19: "mobilenet_v2 regnet_x_1_6gf regnet_y_16gf",
    20: "mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3",
    21: "regnet_y_32gf",
    22: "convnext_tiny regnet_y_3_2gf",
    23: "regnet_x_16gf regnet_x_400mf",
    24: "regnet_x_32gf regnet_x_8gf",
    25: "efficientnet_b1 efficientnet_b2 vit_l_16 vit_l_32",
    26: "regnet_x_3_2gf",
    28: "efficientnet_b3 regnet_y_128gf regnet_y_1_6gf swin_b swin_s swin_v2_b swin_v2_s",
    33: "vit_h_14",
    34: "efficientnet_b4 resnet101 resnext101_32x8d resnext101_64x4d wide_resnet101_2",
    40: "convnext_base convnext_large convnext_small",
    41: "efficientnet_b5",
    42: "efficientnet_v2_s",
    47: "efficientnet_b6",
    51: "resnet152",
    57: "efficientnet_b7",
    59: "efficientnet_v2_m",
    81: "efficientnet_v2_l",
}
N_BLOCKS = {name: count for count, names in COUNTS.items() for name in names.split()}
TORCHVISION = torchvision.models.list_models(module=torchvision.models)
# Others of a family differ in how many blocks of which width they have, and small networks of each
# are looked at below. All of them take a minute.
ALL = "SKTRANSFER_TEST_ALL" in os.environ
OF_A_FAMILY = set("convnext_tiny efficientnet_b1 resnext50_32x4d shufflenet_v2_x1_0".split())


def small_vgg(norm):
    with torch.device("meta"):
        network = torchvision.models.VGG(nn.Identity(), init_weights=False)
    network.features = make_layers([8, "M", 16, 16, "M"], norm)
    for name, size in [("0", (784, 32)), ("3", (32, 24)), ("6", (24, 5))]:
        network.classifier[int(name)] = nn.Linear(*size)
    return network


def small_swin(**options):
    return SwinTransformer([4, 4], 16, [2, 2], [2, 4], [3, 3], **options)


def small_swin_v2():
    return small_swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


def small_efficientnet():
    fused, not_fused = FusedMBConvConfig(2, 3, 2, 8, 16, 2), MBConvConfig(4, 3, 2, 16, 24, 2)
    return torchvision.models.EfficientNet([fused, not_fused], 0.2)


# The smallest of each family, whose slices are run, and small networks of the families that have
# large ones only, with their number of blocks. Of the others only the graph is looked at.
SMALLEST = (
    "alexnet googlenet inception_v3 mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_x_400mf "
    "regnet_y_400mf resnet18 resnet50 shufflenet_v2_x0_5 squeezenet1_1"
).split()
FAMILIES = {
    "convnext": (
        5,
        lambda: torchvision.models.ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 2)]),
    ),
    "densenet": (4, lambda: torchvision.models.DenseNet(8, (2, 2), 16)),
    "efficientnet": (6, small_efficientnet),
    "maxvit": (6, lambda: torchvision.models.MaxVit((64, 64), 8, 4, [8, 16], [1, 2], 8, 0.2)),
    "swin": (6, small_swin),
    "swin_v2": (6, small_swin_v2),
    "vgg": (5, lambda: small_vgg(norm=False)),
    "vgg_bn": (5, lambda: small_vgg(norm=True)),
    "vit": (3, lambda: torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64)),
}

VIT = {"depth": 2, "embed_dim": 64, "num_heads": 2}
OF_64 = {"img_size": 64}
# Before timm 1.0.31, two tensors led from one unit to the next: there was nothing to cut at.
DPN = 23 if Version(timm.__version__) >= Version("1.0.31") else 2
# name -> number of blocks, image size, what makes the network take such small images, and what
# makes a small network of the family, whose slices are run, with its number of blocks
TIMM = {
    "resnet50": (17, 64, {}, {"layers": (1, 1, 1, 1)}, 5),
    "convnextv2_tiny": (22, 64, {}, {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}, 7),
    "vit_small_patch14_dinov2": (13, 56, {"img_size": 56}, VIT, 3),
    "vit_small_patch16_dinov3": (13, 64, OF_64, VIT, 3),
    "vit_base_patch16_clip_224": (13, 64, OF_64, VIT, 3),
    "vit_base_patch16_siglip_224": (13, 64, OF_64, VIT, 3),
    "deit3_small_patch16_224": (13, 64, OF_64, VIT, 3),
    "deit_small_distilled_patch16_224": (13, 64, OF_64, VIT, 3),
    "swin_tiny_patch4_window7_224": (
        16,
        112,
        {"img_size": 112},
        {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 16},
        6,
    ),
    "eva02_small_patch14_336": (13, 56, {"img_size": 56}, VIT, 3),
    "mobilenetv4_conv_small": (19, 64, {}, {}, 19),
    "efficientvit_b1": (17, 64, {}, {"depths": (1, 1, 2, 2)}, 9),
    "regnety_002": (14, 64, {}, {}, 14),
    "test_nfnet": (9, 64, {}, {}, 9),
    "maxvit_tiny_tf_224": (13, 64, OF_64, {"depths": (1, 1), "embed_dim": (32, 32)}, 4),
    "coatnet_0_rw_224": (15, 64, OF_64, {"depths": (1, 1, 1, 1)}, 5),
    "hiera_tiny_224": (13, 64, OF_64, {"embed_dim": 16, "stages": (1, 1, 2, 1)}, 6),
    "caformer_s18": (23, 64, {}, {}, 23),
    "tf_efficientnet_lite0": (18, 64, {}, {}, 18),
    "dpn68": (DPN, 64, {}, {}, DPN),
    "hrnet_w18_small": (5, 64, {}, {}, 5),
}
# Of these, large ones have more blocks than the small one, which are of the same kinds.
TIMM_WITHOUT_WEIGHTS = "efficientvit_b1 resnet50 vit_small_patch14_dinov2".split()
if ALL:
    TIMM_WITHOUT_WEIGHTS = [name for name, (*_, small, _) in TIMM.items() if small]


class WithoutWeights(TorchFunctionMode):
    """Makes empty tensors, as parameters are before they are drawn, on the meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def torchvision_network(name):
    options = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}
    return torchvision.models.get_model(name, weights=None, **options).eval()


def timm_network(name, **options):
    _, _, at_that_size, *_ = TIMM[name]
    return timm.create_model(name, pretrained=False, **at_that_size, **options).eval()


def draw(network):
    """Give parameters that start as zeros, or nearly, values that matter."""
    for parameter in network.parameters():
        if parameter.detach().abs().max() < 1e-3:
            nn.init.uniform_(parameter, -0.1, 0.1)
    return network.eval()


@functools.cache
def trace_without_weights(name):
    with WithoutWeights():
        return TracedNetwork(torchvision_network(name))


@functools.cache
def trace_timm_without_weights(name):
    with WithoutWeights():
        return TracedNetwork(timm_network(name), (TIMM[name][1],) * 2)


def assert_same(actual, expected):
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def check_slices(network, image_size, n_images=4):
    """Every slice between neighbours, then the two slices at a cut in the middle."""
    traced = TracedNetwork(network, image_size)
    image = torch.rand(1, 3, *image_size)
    activation = image
    middle = len(traced.names) // 2
    for position in range(1, traced.output + 1):
        activation = traced.slice(position - 1, position)(activation)
        assert tuple(activation.shape[1:]) == traced.shape(position)
        if position == middle:
            kept = activation
    images = torch.cat([image, torch.rand(n_images - 1, 3, *image_size)])
    expected = network(images)
    assert_same(activation, expected[:1])
    front = traced.slice(0, middle)(images)
    if middle:
        assert_same(front[:1], kept)
    assert_same(traced.slice(middle, traced.output)(front), expected)
    assert len(set(traced.names)) == len(traced.names)
    return traced


@pytest.mark.parametrize("name", SMALLEST)
def test_torchvision(name):
    torch.manual_seed(0)
    side = 96 if name == "inception_v3" else 64
    traced = check_slices(draw(torchvision_network(name)), (side, side), n_images=2)
    assert len(traced.names) == N_BLOCKS[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_torchvision(family):
    torch.manual_seed(0)
    n_blocks, build = FAMILIES[family]
    assert len(check_slices(draw(build()), (64, 64)).names) == n_blocks


def test_torchvision_has_no_other_networks():
    assert {*TORCHVISION} == N_BLOCKS.keys()


@pytest.mark.parametrize("name", sorted((set(TORCHVISION) if ALL else OF_A_FAMILY) - set(SMALLEST)))
def test_torchvision_without_weights(name):
    traced = trace_without_weights(name)
    assert len(traced.names) == N_BLOCKS[name]
    assert traced.shape(traced.output) == (1000,)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    torch.manual_seed(0)
    _, size, _, small, n_blocks = TIMM[name]
    traced = check_slices(draw(timm_network(name, **small)), (size, size))
    assert len(traced.names) == n_blocks


@pytest.mark.parametrize("name", TIMM_WITHOUT_WEIGHTS)
def test_timm_without_weights(name):
    traced = trace_timm_without_weights(name)
    assert len(traced.names) == TIMM[name][0]
    network = traced.network  # self-supervised ones have no head
    assert traced.shape(traced.output) == (network.num_classes or network.num_features,)


NAMES = {
    "vgg16": "features.0 features.2 features.5 features.7 features.10 features.12 features.14 "
    "features.17 features.19 features.21 features.24 features.26 features.28 "
    "classifier.0 classifier.3",
    "googlenet": "conv1 conv2 conv3 inception3a inception3b inception4a inception4b inception4c "
    "inception4d inception4e inception5a inception5b",
    "inception_v3": "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Conv2d_3b_1x1 Conv2d_4a_3x3 "
    "Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b "
    "Mixed_7c",
    "resnet18": "conv1 layer1.0 layer1.1 layer2.0 layer2.1 layer3.0 layer3.1 layer4.0 layer4.1",
    "densenet121": "features.conv0 features.denseblock1 features.transition1 features.denseblock2 "
    "features.transition2 features.denseblock3 features.transition3 features.denseblock4",
    "vit_b_16": "conv_proj " + " ".join(f"encoder.layers.encoder_layer_{i}" for i in range(12)),
    "squeezenet1_1": "features.0 features.3 features.4 features.6 features.7 features.9 "
    "features.10 features.11 features.12",
    "shufflenet_v2_x0_5": "conv1 stage2.0 stage2.1 stage2.2 stage2.3 stage3.0 stage3.1 stage3.2 "
    "stage3.3 stage3.4 stage3.5 stage3.6 stage3.7 stage4.0 stage4.1 stage4.2 stage4.3 conv5",
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    assert trace_without_weights(name).names == tuple(NAMES[name].split())


@pytest.mark.parametrize(
    "name, last, embedding",
    [
        ("resnet50", (2048, 7, 7), (2048,)),
        ("vit_b_16", (197, 768), (768,)),
        ("vgg16", (4096,), (4096,)),
        ("squeezenet1_0", (512, 13, 13), (512, 13, 13)),
        ("maxvit_t", (512,), (512,)),
    ],
)
def test_shapes_at_the_end(name, last, embedding):
    traced = trace_without_weights(name)
    assert traced.shape(0) == (3, 224, 224)
    assert traced.shape(len(traced.names)) == last
    assert traced.shape(traced.embedding) == embedding


def test_shapes_inside():
    assert trace_without_weights("vgg16").shape(13) == (512, 7, 7)  # before it is flattened
    traced = trace_without_weights("resnet50")
    assert traced.shape(1) == (64, 56, 56)  # the pooling belongs to the stem
    assert traced.shape(1, image_size=(64, 96)) == (64, 16, 24)


@pytest.mark.parametrize(
    "name, n_prefix_tokens, last",
    [
        ("vit_small_patch14_dinov2", 1, (17, 384)),
        ("vit_small_patch16_dinov3", 5, (21, 384)),
        ("vit_base_patch16_siglip_224", 0, (16, 768)),
        ("eva02_small_patch14_336", 1, (17, 384)),
    ],
)
def test_tokens_stay_together(name, n_prefix_tokens, last):
    traced = trace_timm_without_weights(name)
    assert traced.n_prefix_tokens(len(traced.names)) == n_prefix_tokens
    assert traced.shape(len(traced.names)) == last
    assert traced.names == ("patch_embed", *(f"blocks.{i}" for i in range(12)))


def test_class_token_of_torchvision():
    assert trace_without_weights("vit_b_32").n_prefix_tokens(1) == 1
    assert trace_without_weights("resnet18").n_prefix_tokens(1) == 0


@pytest.mark.parametrize(
    "build, counts",
    [
        (lambda: Cait(64, depth=2), {"blocks.1": 0, "blocks_token_only": 1}),
        (lambda: ConVit(64, depth=2, local_up_to_layer=1), {"patch_embed": 0, "blocks.1": 1}),
        (
            lambda: MultiScaleVit(MultiScaleVitCfg(depths=(1, 1), use_cls_token=True), img_size=64),
            {"stages.0": 1, "stages.1": 1},
        ),
    ],
    ids=["later", "in the middle", "while others go"],
)
def test_class_tokens_that_come_later_or_stay_while_others_go(build, counts):
    with WithoutWeights():
        network = build().eval()
    traced = TracedNetwork(network, (64, 64))
    for block, n_prefix_tokens in counts.items():
        assert traced.n_prefix_tokens(traced.position(block)) == n_prefix_tokens


class OfEinops(nn.Module):
    """A transformer as tutorials write it, with a class token and functions of einops."""

    def __init__(self, goes=False):
        super().__init__()
        self.goes = goes
        self.to_tokens = nn.Linear(48, 16)
        self.cls_token = nn.Parameter(torch.randn(2, 16))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(2))
        self.last, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, image):
        x = einops.rearrange(image, "n c (h a) (w b) -> n (h w) (a b c)", a=4, b=4)
        x = self.to_tokens(x)
        tokens = einops.repeat(self.cls_token, "t c -> n t c", n=image.shape[0])
        x = torch.cat((tokens, x), dim=1)
        for layer in self.layers:
            x = x + layer(x.transpose(0, 1)).transpose(0, 1)
        if self.goes:
            x = self.last(x[:, 2:])
        return self.head(einops.reduce(x, "n t c -> n c", "mean"))


def test_functions_of_einops_and_tokens_of_ones_own():
    x = torch.rand(2, 3, 16, 16)
    for goes, names in ((False, ()), (True, ("last",))):
        network = OfEinops(goes).eval()
        traced = TracedNetwork(network, (16, 16))
        assert traced.names == ("to_tokens", "layers.0", "layers.1", *names)
        assert [traced.n_prefix_tokens(i) for i in range(5)] == [0, 2, 2, 2, 0]
        with torch.no_grad():
            for cut in range(traced.output + 1):
                part = traced.slice(cut, traced.output)(traced.slice(0, cut)(x))
                torch.testing.assert_close(part, network(x))


class OfTokens(nn.Module):
    """Its class token of its own is joined to the others in one of many ways."""

    def __init__(self, join):
        super().__init__()
        self.join = join
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.registers = nn.Parameter(torch.randn(1, 2, 8))
        self.layer, self.last, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = self.join(x, self.cls_token, self.registers.expand(x.shape[0], -1, -1))
        return self.head(self.last(self.layer(x)).mean(1))


def with_registers(x, token, registers):
    x = torch.cat((token.expand(x.shape[0], -1, -1), x), dim=1)
    return torch.cat((x[:, :1], registers, x[:, 1:]), dim=1)


def split_and_joined(x, token, registers):
    token, registers, x = with_registers(x, token, registers).split([1, 2, x.shape[1]], dim=1)
    return torch.cat((token, x * 2), dim=1)


def gated(x, token, registers):
    x = torch.cat((registers, x), dim=1)
    return (x[..., :4] * x[..., 4:].sigmoid()).repeat(1, 1, 2)


def beside_memory(x, token, registers):
    keys = torch.cat((registers, x), dim=1)
    return x + F.scaled_dot_product_attention(x, keys, keys)


class InOne(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(8))

    def forward(self, x, *_):
        if len(x.shape) != 3 or x.shape[2] != 8:  # so that it is not looked into
            raise ValueError
        return torch.cat((self.class_token.expand(len(x), 1, -1), x), dim=1)


@pytest.mark.parametrize(
    "join, n_prefix_tokens",
    [
        (lambda x, token, _: torch.cat((token.expand_as(x[:, :1]), x), dim=1), 1),
        (lambda x, token, _: torch.cat((token.repeat(x.shape[0], 1, 1).to(x), x), dim=1), 1),
        (lambda x, token, _: torch.cat((x.new_zeros(x.shape[0], 1, 8) + token, x), dim=1), 1),
        (lambda x, token, _: torch.hstack((token.expand(x.shape[0], -1, -1), x)), 1),
        (lambda x, _, registers: einops.pack([registers, x], "n * c")[0], 2),
        (lambda x, _, registers: torch.cat((registers, x), dim=1)[:, 1:6], 1),
        (lambda x, token, _: torch.cat((x, token.expand(x.shape[0], -1, -1)), dim=1), 0),
        (with_registers, 3),
        (split_and_joined, 1),
        (gated, 2),
        (beside_memory, 0),
        (InOne(), 1),
    ],
    ids="like to zeros hstack pack sliced behind registers split gated memory whole".split(),
)
def test_tokens_are_counted_however_they_are_joined(join, n_prefix_tokens):
    traced = TracedNetwork(OfTokens(join).eval(), (16, 16))
    assert traced.n_prefix_tokens(traced.position("layer")) == n_prefix_tokens
    assert traced.n_prefix_tokens(traced.embedding) == 0


def test_where_only_tokens_of_ones_own_are_left_none_is_in_front():
    network = OfTokens(lambda x, _, registers: torch.cat((registers, x), dim=1)[:, :2])
    traced = TracedNetwork(network.eval(), (16, 16))
    assert traced.shape(traced.position("layer")) == (2, 8)
    assert traced.n_prefix_tokens(traced.position("layer")) == 0


class OneNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.last(self.first(x)).mean((1, 2, 3))


def test_a_single_number_has_no_tokens():
    traced = TracedNetwork(OneNumber().eval(), (16, 16))
    assert traced.n_prefix_tokens(traced.embedding) == 0


class ImportsLate(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        from einops import rearrange

        return self.head(self.last(rearrange(self.first(x), "n c h w -> n (h w) c")).mean(1))


def test_einops_is_imported_by_a_forward(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "einops"]:
        monkeypatch.delitem(sys.modules, name)
    assert TracedNetwork(ImportsLate().eval(), (8, 8)).names == ("first", "last")
    assert "einops" in sys.modules


def test_without_head():
    network = timm_network("vit_base_patch16_siglip_224", num_classes=0, **VIT)
    traced = check_slices(draw(network), (64, 64))
    assert len(traced.names) == 3
    assert traced.shape(traced.embedding) == traced.shape(traced.output) == (64,)
    mobilenet = timm.create_model("mobilenetv4_conv_small", num_classes=0)
    assert TracedNetwork(mobilenet.eval(), (64, 64)).names[-1] == "conv_head"
    resnet = torchvision_network("resnet18")
    resnet.fc = nn.Identity()
    assert TracedNetwork(resnet, (64, 64)).names == tuple(NAMES["resnet18"].split())
    vgg = small_vgg(norm=False)
    vgg.classifier[6] = nn.Identity()
    assert TracedNetwork(vgg.eval(), (64, 64)).names[-1] == "classifier.3"


@pytest.mark.parametrize(
    "build",
    [
        small_swin_v2,
        FAMILIES["densenet"][1],
        lambda: timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **VIT),
        lambda: timm.create_model("eva02_tiny_patch14_224", dynamic_img_size=True, **VIT),
        lambda: timm.create_model("vit_small_patch16_dinov3", dynamic_img_size=True, **VIT),
        lambda: timm.create_model("efficientvit_b0"),
    ],
    ids=["swin_v2", "densenet", "vit", "eva02", "dinov3", "efficientvit"],
)
@torch.no_grad()
def test_other_image_sizes(build):
    network, size = draw(build()), (112, 224)
    traced = TracedNetwork(network)
    image = torch.rand(2, 3, *size)
    activation = image
    for position in range(1, traced.output + 1):
        activation = traced.slice(position - 1, position, image_size=size)(activation)
        assert tuple(activation.shape[1:]) == traced.shape(position, image_size=size)
    assert_same(activation, network(image))


def test_image_size_that_the_network_does_not_take():
    traced = trace_without_weights("vit_b_32")
    with pytest.raises(ValueError, match="VisionTransformer takes no images of 64 x 65 pixels"):
        traced.shape(1, image_size=(64, 65))


# --- Positions -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    return trace_without_weights("resnet50")


@pytest.mark.parametrize(
    "layer, position",
    [
        (0, 1),
        (16, 17),
        (-1, 17),
        (-17, 1),
        ("conv1", 1),
        ("layer1.0", 2),
        ("layer1", 4),
        ("layer4", 17),
        ("auto", 18),
        ("output", 19),
    ],
)
def test_position(resnet, layer, position):
    assert resnet.position(layer) == position


def test_blocks(resnet):
    assert resnet.blocks("layer4") == range(14, 17)
    assert resnet.blocks("layer4.1") == range(15, 16)
    assert resnet.blocks(-2) == range(15, 16)
    assert trace_without_weights("vgg16").blocks("features") == range(13)


def test_prefix_is_dotted():
    network = nn.Sequential()
    network.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    network.layer10 = nn.Conv2d(4, 4, 3)
    traced = TracedNetwork(network.eval(), (16, 16))
    assert traced.names == ("layer1.0", "layer1.1", "layer10")
    assert traced.position("layer1") == 2


@pytest.mark.parametrize("layer", [17, -18])
def test_number_out_of_range(resnet, layer):
    with pytest.raises(ValueError, match=f"from -17 to 16; got {layer}"):
        resnet.position(layer)


def test_unknown_name(resnet):
    with pytest.raises(ValueError, match=r"'layer5'. Did you mean .*'layer4'.* Blocks: conv1, l"):
        resnet.position("layer5")


@pytest.mark.parametrize("layer", [True, None, 1.0])
def test_layer_of_another_type(resnet, layer):
    with pytest.raises(TypeError, match="int or a str"):
        resnet.position(layer)


def test_impossible_slices(resnet):
    with pytest.raises(ValueError, match="Positions are 0 to 19, got 20"):
        resnet.slice(0, 20)
    with pytest.raises(ValueError, match="cannot start at 3"):
        resnet.slice(3, 2)


# --- Networks of one's own -----------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, n_channels, in_place=False):
        super().__init__()
        self.conv1 = nn.Conv2d(n_channels, n_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(n_channels, n_channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=in_place)

    def forward(self, x):
        y = self.relu(x)  # in place: the block changes what it was given
        return x + self.conv2(self.conv1(y).relu())


class Small(nn.Module):
    def __init__(self, in_place=False, n_classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Residual(8, in_place), nn.Dropout(0.5), Residual(8, in_place))
        self.fc = nn.Linear(8, n_classes)

    def forward(self, x, scale=None):
        x = self.blocks(self.norm(self.stem(x)))  # (n, 8, height, width)
        if scale is not None:
            x = x * scale
        return self.fc(x.mean((2, 3)))


def small(*args, **kwargs):
    torch.manual_seed(0)
    return Small(*args, **kwargs).eval()


def test_own_network():
    traced = check_slices(small(), (20, 30))
    assert traced.names == ("stem", "blocks.0", "blocks.2")
    assert [traced.shape(i) for i in (1, 3, 4, 5)] == [(8, 9, 14), (8, 9, 14), (8,), (5,)]


class ByKeyword(nn.Module):
    """Names the arguments of functions that are skipped where only shapes are wanted."""

    def forward(self, x):
        x = F.layer_norm(input=x, normalized_shape=x.shape[1:])
        return F.batch_norm(
            input=F.gelu(input=x), running_mean=torch.zeros(8), running_var=torch.ones(8)
        )


def test_a_network_that_names_arguments_of_functions():
    network = small()
    network.blocks.insert(1, ByKeyword())
    check_slices(network, (20, 30))


@register_notrace_module
class AsksForDevice(nn.Module):
    """Computes in float32, as timm's EfficientViT does, with tensors made where it runs."""

    def forward(self, x):
        with torch.autocast(device_type=x.device.type, enabled=False):
            x = x.float() * torch.arange(1, 1 + len(x), device=x.device).view(-1, 1, 1, 1)
            return x / torch.arange(1, 1 + len(x), device=x.device.type).view(-1, 1, 1, 1)


def test_a_unit_that_asks_for_its_device():
    network = small()
    network.blocks.insert(1, AsksForDevice())
    assert check_slices(network, (20, 30)).names == ("stem", "blocks.0", "blocks.3")


def test_wrapped_network():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.rand(3, 1, 1))
            self.vgg = torchvision.models.vgg11(num_classes=4)

        def forward(self, x):
            return self.vgg(x - self.mean)

    with WithoutWeights():
        wrapped = Wrapper().eval()
    names = TracedNetwork(wrapped).names
    assert len(names) == 10 and names[-1] == "vgg.classifier.3"


def test_sequential():
    network = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2), nn.Softmax(1)),
    ).eval()
    traced = check_slices(network, (16, 16))
    assert traced.names == ("0", "3")
    assert [traced.shape(i) for i in range(1, 5)] == [(4, 7, 7), (6, 5, 5), (6,), (2,)]
    headless = check_slices(network[:7], (16, 16))
    assert headless.names == ("0", "3")
    assert headless.shape(headless.embedding) == headless.shape(headless.output) == (6,)


def test_network_that_is_only_a_head():
    traced = check_slices(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)).eval(), (4, 4))
    assert traced.names == ()
    assert traced.position("auto") == 1
    assert traced.shape(1) == (48,)
    with pytest.raises(ValueError, match="no number: it has none"):
        traced.position(0)
    with pytest.raises(ValueError, match="Blocks: none"):
        traced.position("1")


def test_units_without_a_cut_between_them_are_one_block():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.left = nn.Conv2d(4, 4, 1)
            self.right = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.left(x) * self.right(x)

    traced = check_slices(Parallel().eval(), (8, 8))
    assert traced.names == ("stem", "left")


@pytest.mark.parametrize("in_place", [False, True])
@torch.no_grad()
def test_slices_leave_their_input_alone(in_place):
    network = small(in_place)
    traced = check_slices(network, (16, 16))
    activation = traced.slice(0, 1)(torch.randn(2, 3, 16, 16))
    before = activation.clone()
    traced.slice(1, traced.output)(activation)
    assert torch.equal(activation, before)


class Viewing(Small):
    """Takes views of maps; if it `writes`, what it writes to a view is in the map as well."""

    def __init__(self, writes):
        super().__init__()
        self.writes = writes

    def forward(self, x):
        x = self.stem(x)
        rows = x.view(x.size(0), -1)
        if self.writes:
            rows *= 2
        bits = x.view(torch.int32).view(torch.float32)
        return self.fc(self.blocks(x + rows.view(x.shape) + bits).mean((2, 3)))


@torch.no_grad()
def test_views_of_maps_in_any_memory_format():
    check_slices(Viewing(writes=True).eval(), (16, 16))
    network = Viewing(writes=False).eval()
    traced = check_slices(network, (16, 16))
    images = torch.rand(2, 3, 16, 16)
    expected = network(images)
    network.to(memory_format=torch.channels_last)
    assert_same(traced.slice(0, traced.output)(images), expected)


class InPlace(Small):
    """Changes its input and numbers that have other names, too."""

    def forward(self, x):
        x = given = self.stem(x)
        n = n_rows = x.shape[2]
        x *= 2
        n += 1
        x = self.blocks(x + given) * n
        x /= n_rows
        shifted = x
        shifted -= 1
        return self.fc(x.mean((2, 3)))


def test_other_names_of_what_is_changed_in_place():
    check_slices(InPlace().eval(), (16, 16))


@torch.no_grad()
def test_hooks_of_the_network_itself_are_called():
    network = Small().eval()
    network.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    network.register_forward_hook(lambda module, inputs, output: output + 1)
    check_slices(network, (16, 16))


def test_a_missing_key_is_named_as_one():
    class Keyed(Small):
        def forward(self, x):
            return {}["features"]

    with pytest.raises(TracingError, match="into blocks: KeyError: 'features'."):
        TracedNetwork(Keyed(), (16, 16))


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        x = x.mean((2, 3))
        return self.fc(x) if x.sum() > 0 else x


class Pair(Small):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("network", [DataDependent(), Pair()], ids=["control flow", "pair"])
def test_network_that_cannot_be_traced(network):
    keys = [set(vars(module)) for module in network.modules()]
    with pytest.raises(TracingError, match=r"(DataDependent|Pair) cannot be cut into blocks: "):
        TracedNetwork(network, (16, 16))
    assert network.training
    assert [set(vars(module)) for module in network.modules()] == keys


# --- The network stays as it is ------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision_network("resnet18"),
        small_swin,
        FAMILIES["vit"][1],
        lambda: torchvision_network("googlenet"),
    ],
    ids=["resnet18", "swin", "vit", "googlenet"],
)
@torch.no_grad()
def test_network_is_unchanged(build):
    network = build()
    network.train()
    next(network.children()).eval()
    state = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    keys = [set(vars(module)) for module in network.modules()]
    traced = TracedNetwork(network, (64, 64))
    traced.slice(0, traced.output)
    assert [module.training for module in network.modules()] == modes
    assert [set(vars(module)) for module in network.modules()] == keys
    assert list(network.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_parameters_are_shared_and_trained():
    network = small()
    traced = TracedNetwork(network, (16, 16))
    end = traced.slice(1, traced.output)
    inner = {id(parameter) for parameter in network.parameters()}
    assert {id(parameter) for parameter in end.parameters()} < inner
    end(torch.randn(2, 8, 7, 7)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.blocks.parameters())
    assert network.stem.weight.grad is None
    assert not any(module.training for module in end.modules())


def test_slices_are_kept():
    traced = TracedNetwork(small(), (16, 16))
    assert traced.slice(1, 2) is traced.slice(1, 2, image_size=(16, 16))
    assert traced.slice(1, 2) is not traced.slice(1, 2, image_size=(16, 24))


@torch.no_grad()
def test_precision_and_layout():
    network = draw(timm.create_model("eva02_tiny_patch14_224", img_size=56, **VIT))
    traced = TracedNetwork(network, (56, 56))
    slices = [(0, 2), (2, traced.output)]
    image = torch.rand(2, 3, 56, 56)
    front, end = (traced.slice(*cut) for cut in slices)
    assert_same(end(front(image.to(memory_format=torch.channels_last))), network(image))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(end(front(image)), network(image))
    network.double()  # replaces the buffers, as a move to another device does
    front, end = (traced.slice(*cut) for cut in slices)
    assert_same(end(front(image.double())), network(image.double()))


@pytest.mark.parametrize(
    "name, options",
    [("eva02_tiny_patch14_224", VIT), ("vit_small_patch16_dinov3", VIT), ("levit_128s", {})],
)
@torch.no_grad()
def test_no_slice_depends_on_the_device_of_the_tracing(name, options):
    network = timm.create_model(name, **options).eval()
    traced = TracedNetwork(network)
    traced.slice(1, 3)
    network.to("meta")
    activation = torch.rand(3, 3, 224, 224, device="meta")
    for position in range(1, traced.output + 1):
        activation = traced.slice(position - 1, position)(activation)
        assert activation.is_meta
        assert tuple(activation.shape) == (3, *traced.shape(position))


@torch.no_grad()
def test_copies_of_slices():
    traced = TracedNetwork(small(), (16, 16))
    end = traced.slice(1, traced.output)
    activation = torch.randn(2, 8, 7, 7)
    twin = copy.deepcopy(end)
    expected = end(activation)
    for parameter in traced.network.parameters():
        parameter.zero_()
    assert_same(twin(activation), expected)


def test_traced_on_the_meta_device():
    with torch.device("meta"):
        network = torchvision_network("vit_b_32")
    traced = TracedNetwork(network)
    assert len(traced.names) == 13
    assert traced.shape(13) == (50, 768)


def test_a_norm_still_refuses_sizes_that_are_not_its_own():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(4 * 30 * 30), nn.ReLU6(inplace=True)
    )
    blocks = TracedNetwork(network, (32, 32))
    assert blocks.shape(blocks.output, (32, 32)) == (3600,)
    norm = next(node for node in blocks._nodes if node.target == "2")
    assert norm in blocks._values[32, 32].overwritten  # by what follows
    with pytest.raises(TracingError, match="running_mean should contain"):
        TracedNetwork(network, (40, 40))
    over_maps = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 30, 30]), nn.ReLU())
    assert TracedNetwork(over_maps, (32, 32)).shape(1) == (4, 30, 30)
    with pytest.raises(TracingError, match="normalized_shape"):
        TracedNetwork(over_maps, (40, 40))


# ------------------------------------------------------------------------------ control flow


class Choosy(nn.Module):
    """What it does depends on the size and the type of its input, or, if it `looks`, on pixels."""

    def __init__(self, looks=False):
        super().__init__()
        self.conv, self.looks = nn.Conv2d(4, 4, 3, padding=1), looks

    def forward(self, x):
        if x.shape[-1] != 4 and (not self.looks or x.sum() > 0):
            x = x + self.conv(x)
        return x


class Converting(nn.Module):
    """It converts images to the type of its weights, if they have another one."""

    def __init__(self, looks=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.Sequential(Choosy(), Choosy(looks))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        if x.dtype != self.stem.weight.dtype:
            x = x.to(self.stem.weight.dtype)
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def test_modules_whose_flow_depends_on_sizes_are_taken_whole():
    network = Converting().eval()
    traced = TracedNetwork(network, (16, 16))
    assert traced.names == ("stem", "blocks.0", "blocks.1")
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        for cut in range(traced.output + 1):
            part = traced.slice(cut, traced.output)(traced.slice(0, cut)(x))
            torch.testing.assert_close(part, network(x))
    with pytest.raises(TracingError, match="cannot be cut into blocks"):
        TracedNetwork(Converting(looks=True), (16, 16))
