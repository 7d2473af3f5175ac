import copy
import io
import json
import os
import pickle
import signal
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from networks import count, small
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import (
    check_estimator_cloneable,
    check_estimator_repr,
    check_get_params_invariance,
    check_no_attributes_set_in_init,
    check_parameters_default_constructible,
    check_set_params,
)
from skorch.callbacks import Callback
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import get_model_builder, get_model_weights, mobilenet_v3_small
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSD, SSDFeatureExtractorVGG
from torchvision.models.detection.ssdlite import SSDLiteFeatureExtractorMobileNet
from torchvision.transforms import v2

from sktransfer import FineTunedDetector, load_coco
from sktransfer._engine.augmentation import Augmentation, Views
from sktransfer._training.detector_maps import FlatMaps
from sktransfer._training.detector_networks import (
    list_detectors,
    load_detector,
    with_published_norms,
)
from sktransfer._training.detector_start import start_at_cut
from sktransfer._training.net import Progress
from sktransfer.inspection import DetectionDisplay
from sktransfer.io import check_images
from sktransfer.metrics import coco_scores
from sktransfer.models import Backbone
from sktransfer.models._weights import fingerprint
from sktransfer.transforms import Preprocessing


def make_scenes(n=12, size=64, seed=0):
    """Grey images with one bright or dark square each; the last has none."""
    rng = np.random.RandomState(seed)
    X = rng.randint(110, 140, (n, size, size, 3)).astype(np.uint8)
    y = []
    for i, image in enumerate(X[:-1]):
        side = rng.randint(20, 32)
        left, top = rng.randint(0, size - side, 2)
        image[top : top + side, left : left + side] = 250 * (i % 2)
        box = [left, top, left + side, top + side]
        y.append({"boxes": [box], "labels": [("dark", "bright")[i % 2]]})
    return X, [*y, {"boxes": [], "labels": []}]


def make(detector="fcos", **parameters):
    given = {"backbone": small(), "image_size": 64, "width": 64, "runtime": "torch"}
    given |= {"max_epochs": 1, "random_state": 0, **parameters}
    return FineTunedDetector(detector=detector, **given)


class Maps(nn.Module):
    """A backbone of a detector, of one map at an eighth of the sides."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 32, 3, 4, 1)
        )

    def forward(self, x):
        return {"0": self.body(x)}


def small_detector(family):
    torch.manual_seed(0)
    options = {"min_size": 64, "max_size": 64}
    square = AnchorGenerator(((24,),), ((1.0,),))
    if family is SSD:
        boxes = DefaultBoxGenerator([[2]])
        found = SSD(_ListOfChannels(), boxes, (64, 64), 5)
    elif family is FasterRCNN:
        found = FasterRCNN(Maps(), 5, rpn_anchor_generator=square, **options)
    else:
        found = family(Maps(), 5, anchor_generator=square, **options)
    return found


torch.fx.wrap("count")


class Counted(nn.Sequential):
    def forward(self, x):
        return super().forward(count(x))


def pyramid():
    """A pyramid on a body of three blocks, of which the middle one ends with a norm."""
    body = {
        "stem": Counted(nn.Conv2d(3, 32, 4, 4), nn.ReLU()),
        "one": nn.Conv2d(32, 12, 3, 2, 1),
        "norm": nn.BatchNorm2d(12),
        "two": nn.Sequential(nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU()),
    }
    layers = {"stem": "0", "norm": "1", "two": "2"}
    return BackboneWithFPN(nn.Sequential(OrderedDict(body)), layers, [32, 12, 16], 32)


def pyramid_detector():
    torch.manual_seed(0)
    anchors = AnchorGenerator(tuple((s,) for s in (16, 32, 64, 128)), ((1.0,),) * 4)
    return FCOS(pyramid(), 5, anchor_generator=anchors, min_size=64, max_size=64)


class _ListOfChannels(Maps):
    out_channels = [32]


PLAIN = Augmentation(None, None, (64, 64))


@pytest.fixture(scope="module")
def scenes():
    return make_scenes()


@pytest.fixture(scope="module")
def fitted(scenes):
    return make(max_epochs=30, head_lr=3e-3, batch_size=4).fit(*scenes)


def same(a, b):
    return all(
        np.array_equal(one[key], other[key])
        for one, other in zip(a, b, strict=True)
        for key in ("boxes", "labels", "scores")
    )


# ------------------------------------------------------------------------------ learning


def test_it_learns_to_find_objects(fitted, scenes):
    X, y = scenes
    found = fitted.predict(X)
    scores = coco_scores(y, found)
    assert scores["map_50"] > 0.8
    assert fitted.score(X, y) == pytest.approx(scores["map"])
    assert fitted.classes_.tolist() == ["bright", "dark"]
    first = found[0]
    assert first["labels"][0] == "dark"
    assert first["boxes"].dtype == np.float32 and first["boxes"].shape[1] == 4
    assert (np.diff(first["scores"]) <= 0).all()
    assert fitted.history_[-1]["train_loss"] < fitted.history_[0]["train_loss"] / 1.5
    assert fitted.n_iter_ == len(fitted.history_) == 30


@pytest.mark.parametrize("head_lr, rate", [(0.003, 0.003), (None, 0.0007)])
def test_pretrained_layers_have_a_learning_rate_of_their_own(head_lr, rate, scenes):
    X, y = scenes
    model = make(unfreeze=1, lr=0.0007, head_lr=head_lr).partial_fit(X[:2], y[:2])
    detector = model.net_.module_.detector
    pretrained = {id(p) for p in detector.backbone.blocks.parameters()}
    rates = {True: set(), False: set()}
    for group in model.net_.optimizer_.param_groups:
        for parameter in group["params"]:
            rates[id(parameter) in pretrained].add(group["lr"])
    assert rates == {True: {0.0007}, False: {rate}}


def test_only_new_layers_are_trained(fitted):
    reference = small()
    detector = fitted.net_.module_.detector
    assert len(detector.backbone.blocks) == 0
    for ours, theirs in zip(
        fitted.backbone.state_dict().values(), reference.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)  # statistics of batch-norms among them
    assert fitted.unfrozen_block_names_ == []
    assert fitted.block_names_ == ["stem", "body.0", "body.1"]


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster_rcnn"])
@pytest.mark.parametrize(
    "unfreeze, names", [(1, ["body.1"]), ("body", ["body.0", "body.1"]), ("all", None)]
)
def test_depths(detector, unfreeze, names, scenes):
    model = make(detector, unfreeze=unfreeze).fit(scenes[0][:4], scenes[1][:4])
    names = names or ["stem", "body.0", "body.1"]
    assert model.unfrozen_block_names_ == names
    blocks = model.net_.module_.detector.backbone.blocks
    reference = dict(small().named_parameters())
    moved = {
        f"{name}.{key}".rpartition(".")[0]: True
        for name in names
        for key, value in reference.items()
        if key.startswith(name)
    }
    assert moved and len(blocks) == len(names)
    trained = torch.cat([p.detach().flatten() for p in blocks.parameters()])
    before = [p.flatten() for key, p in reference.items() if key.startswith(tuple(names))]
    assert not torch.equal(trained.sort().values, torch.cat(before).sort().values)
    for norm in (m for m in blocks.modules() if isinstance(m, _BatchNorm)):
        assert torch.equal(norm.running_mean, torch.zeros(8))  # as `small` made it
    assert len(model.predict(scenes[0][:2])) == 2


@pytest.mark.parametrize("network", [None, FCOS])
def test_a_list_unfreezes_its_blocks_alone(network, scenes):
    given = {"detector": small_detector(network)} if network else {}
    first, name = ("body.0", "body.0") if network else ("body.0", "0.")
    model = make(unfreeze=[first], **given).fit(scenes[0][:4], scenes[1][:4])
    assert model.unfrozen_block_names_ == [first]
    backbone = model.net_.module_.detector.backbone
    blocks = backbone if network else backbone.blocks
    trained = [key for key, value in blocks.named_parameters() if value.requires_grad]
    assert trained and all(key.startswith(name) for key in trained)


class OneLayer(nn.Conv2d):
    def forward(self, x):
        return {"0": super().forward(x)}


def test_a_backbone_of_one_layer_is_one_block(scenes):
    square = AnchorGenerator(((24,),), ((1.0,),))
    network = FCOS(OneLayer(3, 32, 8, 8), 5, anchor_generator=square, min_size=64, max_size=64)
    model = make(network, unfreeze="all").fit(scenes[0][:2], scenes[1][:2])
    assert model.unfrozen_block_names_ == ["backbone"]
    assert not torch.equal(model.net_.module_.detector.backbone.weight, network.backbone.weight)


def test_weights_none_beside_a_network_says_nothing(scenes):
    X, y = scenes[0][:4], scenes[1][:4]
    plain = make(unfreeze=1).fit(X, y)
    assert same(make(unfreeze=1, weights=None).fit(X, y).predict(X), plain.predict(X))


def test_from_random_weights_statistics_move(scenes):
    model = FineTunedDetector(
        backbone="mobilenet_v3_small",
        weights=None,
        unfreeze=1,
        image_size=64,
        width=64,
        max_epochs=1,
        runtime="torch",
    ).fit(scenes[0][:4], scenes[1][:4])
    norms = [
        m
        for m in model.net_.module_.detector.backbone.blocks.modules()
        if isinstance(m, _BatchNorm)
    ]
    assert norms and all(norm.running_mean.abs().sum() > 0 for norm in norms)


def test_default_backbone(scenes):
    X, y = scenes[0][:2], scenes[1][:2]
    model = make(backbone="efficientnet_lite0").fit(X, y)
    assert model.block_names_[-1] == "conv_head"
    assert len(model.predict(X)) == 2


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_maps_of_tokens_and_of_channels_last(name, scenes):
    options = {"depth": 2} if name.startswith("vit") else {"depths": (1, 1, 1, 1), "window_size": 2}
    heads = 2 if name.startswith("vit") else (1, 2, 2, 2)
    network = timm.create_model(name, img_size=64, embed_dim=16, num_heads=heads, **options)
    backbone = Backbone(network, Preprocessing(size=(64, 64), resize=(64, 64)))
    model = make(backbone=backbone, unfreeze=1).fit(scenes[0][:2], scenes[1][:2])
    assert len(model.predict(scenes[0][:1])) == 1


# ------------------------------------------------------------------------------ predictors cut off


@pytest.mark.parametrize("family", [FasterRCNN, RetinaNet, FCOS, SSD])
def test_predictor_is_replaced(family, scenes):
    network = small_detector(family)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    model = make(network, max_epochs=2).fit(*scenes)
    after = model.net_.module_.detector.state_dict()
    changed = {k for k in after if k in before and not _equal(after[k], before[k])}
    new = ("roi_heads.box_predictor", "head.classification_head")
    assert changed and all(key.startswith(new) for key in changed)
    assert not any(key.startswith("backbone") for key in after)  # its maps are kept
    found = model.predict(scenes[0])
    assert set(np.concatenate([f["labels"] for f in found])) <= {"bright", "dark"}
    assert all(_equal(v, before[k]) for k, v in network.state_dict().items())  # the user's own
    deeper = clone(model).set_params(unfreeze=1).fit(*scenes)
    assert deeper.unfrozen_block_names_ == ["body.3"]
    assert deeper.n_trainable_parameters_ > model.n_trainable_parameters_
    frozen = deeper.net_.module_.detector.state_dict()
    assert _equal(frozen["backbone.body.0.weight"], before["backbone.body.0.weight"])
    assert _equal(frozen["backbone.body.1.running_mean"], before["backbone.body.1.running_mean"])
    assert same(pickle.loads(pickle.dumps(deeper)).predict(scenes[0]), deeper.predict(scenes[0]))


def _equal(a, b):
    return a.shape == b.shape and torch.equal(a, b)


def vgg():
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)]
    for n_inputs, n_outputs in [(4, 4), (4, 4), (4, 512), (512, 512)]:
        conv = nn.Conv2d(n_inputs, n_outputs, 3, padding=1)
        layers += [conv, nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)]
    return SSDFeatureExtractorVGG(nn.Sequential(*layers), False)


def lite():
    features = mobilenet_v3_small(weights=None).features
    for norm in (m for m in features.modules() if isinstance(m, _BatchNorm)):
        norm.momentum = 1.0
    features(torch.randn(8, 3, 64, 64))  # else activations would vanish from layer to layer
    return SSDLiteFeatureExtractorMobileNet(features, 9, nn.BatchNorm2d, min_depth=16)


def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, 2, 1))


@pytest.mark.parametrize(
    "make_backbone, cuts",
    [
        # A norm is cut off with the block in front of it.
        (pyramid, {"stem": None, "one": [1], "norm": [1], "two": [1, 2]}),
        (vgg, {"0": None, "9": [3]}),
        (lite, {"0": None, "1": [10]}),
        (plain, {"0": None, "2": [1]}),
        (Maps, {"3": None}),  # whose forward is the user's
    ],
)
def test_a_detector_starts_at_the_cut_in_front_of_a_block(make_backbone, cuts):
    size = 300 if make_backbone is vgg else 64
    preprocessing = Preprocessing(size=(size, size), resize=(size, size))
    shown = np.random.default_rng(0).integers(0, 255, (1, size, size, 3)).astype(np.uint8)
    views = Views(check_images(shown), preprocessing, Augmentation(None, None, (size, size)))
    torch.manual_seed(0)
    whole = make_backbone().eval()
    with torch.no_grad():
        expected = FlatMaps(whole).maps(preprocessing.normalize(views.load(0)[None]))
    for unit, positions in cuts.items():
        detector = nn.Module()
        detector.backbone = copy.deepcopy(whole)
        maps = start_at_cut(detector, unit, preprocessing, "it", torch.device("cpu"))
        assert (maps and maps.positions) == positions
        if maps is None:
            continue
        stored = maps.empty(1)
        maps.fill(views, stored, memory=None)
        batch = maps.unpack([torch.from_numpy(x) for x in stored])
        with torch.no_grad():
            found = FlatMaps(detector.backbone.eval()).maps(batch)
        for mine, theirs in zip(found, expected, strict=True):  # activations in half precision
            assert (mine - theirs).norm() < 0.003 * theirs.norm()
        n_left = sum(p.numel() for p in detector.backbone.parameters())
        assert n_left < sum(p.numel() for p in whole.parameters())


def test_published_name_from_a_state_dict(tmp_path, scenes):
    name, path = "ssdlite320_mobilenet_v3_large", tmp_path / "detector.pth"
    network = load_detector(name, None)
    torch.save(network.state_dict(), path)
    model = make(name, weights=path, batch_size=2).fit(scenes[0][:2], scenes[1][:2])
    assert model.net_.module_.detector.head.classification_head.num_columns == 3
    again = pickle.loads(pickle.dumps(model))
    assert same(again.predict(scenes[0][:1]), model.predict(scenes[0][:1]))
    other = {k: v + 1 if k.endswith("0.0.weight") else v for k, v in network.state_dict().items()}
    torch.save(other, path)
    with pytest.raises(ValueError, match="not those on which this estimator was fitted"):
        pickle.loads(pickle.dumps(model)).predict(scenes[0][:1])


def test_state_dict_of_other_categories(tmp_path):
    name, path = "fasterrcnn_mobilenet_v3_large_320_fpn", tmp_path / "detector.pth"
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as build

    network = build(weights=None, weights_backbone=None, num_classes=4)
    # As torchvision publishes them: its frozen batch-norms count no batches.
    state = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    torch.save(state, path)
    loaded = load_detector(name, path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    torch.save({k: v for k, v in state.items() if not k.startswith("rpn")}, path)
    with pytest.raises(ValueError, match="does not hold the weights of .*rpn"):
        load_detector(name, path)


def test_a_published_file_is_read_once_and_as_torchvision_would(tmp_path, monkeypatch):
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    os.mkdir(tmp_path / "checkpoints")
    weights = get_model_weights(name).DEFAULT
    path = str(tmp_path / "checkpoints" / os.path.basename(weights.url))
    torch.save(load_detector(name, None, 1).state_dict(), path)
    opened = []

    def note(event, args):
        if event == "open" and args[0] == path:
            opened.append(args)

    sys.addaudithook(note)
    weights.get_state_dict(progress=False, weights_only=True)
    n_opened = len(opened)
    ours = load_detector(name, "default")
    assert len(opened) == 2 * n_opened > 0
    theirs = get_model_builder(name)(weights=weights)
    assert fingerprint(ours) == fingerprint(theirs)


@pytest.mark.parametrize("name", list_detectors())
def test_published_detectors_have_the_norms_of_torchvision(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    os.mkdir(tmp_path / "checkpoints")
    weights = get_model_weights(name).DEFAULT
    with torch.device("meta"):  # shapes, no values
        ours = get_model_builder(name)(weights=None, weights_backbone=None)
        file = tmp_path / "checkpoints" / os.path.basename(weights.url)
        torch.save(ours.state_dict(), file)
        ours = with_published_norms(name, ours)
        theirs = get_model_builder(name)(weights=weights)
    for (key, a), (_, b) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        assert type(a) is type(b), key
        assert getattr(a, "eps", None) == getattr(b, "eps", None), key


def test_random_weights_follow_the_seed():
    name = "ssdlite320_mobilenet_v3_large"
    first, again, other = (load_detector(name, None, seed).state_dict() for seed in (0, 0, 1))
    key = next(key for key, value in first.items() if value.ndim == 4)
    assert torch.equal(first[key], again[key]) and not torch.equal(first[key], other[key])


def test_names():
    assert {"fcos_resnet50_fpn", "ssd300_vgg16"} < set(list_detectors())
    with pytest.raises(ValueError, match="'yolo' is not known. Pass one of fcos, retinanet"):
        load_detector("yolo", "default")
    with pytest.raises(
        ValueError, match="not published for 'fcos_resnet50_fpn'; there are COCO_V1"
    ):
        load_detector("fcos_resnet50_fpn", "IMAGENET1K_V1")
    with pytest.raises(TypeError, match="Pass a classification network as `backbone`"):
        make(small()).fit(*make_scenes(2))


# ------------------------------------------------------------------------------ the memory


def test_each_image_runs_once(tmp_path, scenes, run_log):
    X, y = scenes
    model = make(memory=tmp_path, max_epochs=2).fit(X, y)
    n = len(run_log())
    assert n > 0
    model.predict(X)
    clone(model).set_params(head_lr=1e-2).fit(X[::-1], y[::-1])
    assert len(run_log()) == n


def test_frozen_blocks_of_a_detector_run_once(tmp_path, scenes, run_log):
    X, y = scenes[0][:6], scenes[1][:6]
    detector = pyramid_detector()
    model = make(detector, memory=tmp_path, unfreeze=1, max_epochs=2).fit(X, y)
    assert len(run_log()) == len(X)
    assert model.unfrozen_block_names_ == ["body.two"]
    model.predict(X)
    for depth in (2, ["body.one"]):  # whose cuts lie on the way
        clone(model).set_params(unfreeze=depth).fit(X[::-1], y[::-1])
    assert len(run_log()) == len(X)
    found = make(detector, unfreeze=1, max_epochs=2).fit(X, y).predict(X)
    assert same(found, model.predict(X))
    again = pickle.loads(pickle.dumps(model))
    assert same(again.predict(X), found)
    assert again.set_params(warm_start=True, max_epochs=1).fit(X, y).n_iter_ == 3


def test_cuts_on_the_way_are_kept_for_other_depths(tmp_path, scenes, run_log):
    backbone = nn.Sequential(*(nn.Conv2d(c, 8, 3, 2, 1) for c in (3, 8, 8, 8)))
    backbone[0], backbone.out_channels = Counted(backbone[0]), 8
    square = AnchorGenerator(((24,),), ((1.0,),))
    options = {"rpn_anchor_generator": square, "min_size": 64, "max_size": 64}
    model = make(FasterRCNN(backbone, 5, **options), memory=tmp_path, unfreeze=1)
    for depth in (1, 2, 3):
        clone(model).set_params(unfreeze=depth).fit(*scenes)
    ran = run_log()
    assert len(ran) == len(scenes[0])
    model.set_params(unfreeze=0).fit(*scenes)  # it starts from what lies behind the backbone
    assert all(run_log().count(digest) == 2 for digest in ran)


def test_maps_that_fit_nowhere_are_computed_in_each_step(scenes, run_log, monkeypatch):
    resource = pytest.importorskip("resource")
    X, y = scenes[0][:6], scenes[1][:6]
    model = make(pyramid_detector(), unfreeze=2, max_epochs=2).fit(X, y)
    found, n_runs = model.predict(X), len(run_log())
    monkeypatch.setattr("sktransfer._training.data.in_ram", lambda _: False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    n_bytes = X.nbytes + 1000  # the images, but not the maps of their first block
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))  # as a full disk would
    try:
        again = clone(model).fit(X, y)
        with pytest.raises(MemoryError, match="Pass a smaller image_size or fewer images"):
            clone(model).fit(np.concatenate([X, X]), [*y, *y])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(run_log()) - n_runs == 2 * len(X)  # in each of two epochs
    assert same(again.predict(X), found)


def test_memory_does_not_change_the_result(tmp_path, scenes):
    X, y = scenes
    plain = make().fit(X, y).predict(X)
    for _ in range(2):
        assert same(make(memory=tmp_path).fit(X, y).predict(X), plain)


def test_each_view_runs_once(tmp_path, scenes, run_log):
    X, y = scenes
    model = make(memory=tmp_path, max_epochs=3, augment="dihedral").fit(X, y)
    views = 8 * len(X)
    assert len(run_log()) == len(set(run_log())) == views
    clone(model).set_params(head_lr=1e-2, augment="flip").fit(X, y)
    model.predict(X)
    assert len(run_log()) == views
    random = clone(model).set_params(augment="auto", n_views=2).fit(X, y)
    assert len(run_log()) == views + len(X)
    assert same(clone(random).fit(X, y).predict(X), random.predict(X))
    assert len(run_log()) == views + len(X)


@pytest.mark.parametrize(
    "augment, unfreeze, family",
    [
        ("flip", 0, None),
        ("flip", 0, FCOS),
        ("auto", 0, None),
        ("auto", "all", None),
        (v2.RandomHorizontalFlip(1.0), "all", None),
        ("dihedral", 1, RetinaNet),
    ],
)
def test_views_are_learnt(augment, unfreeze, family, scenes):
    X, y = scenes[0][:6], scenes[1][:6]
    network = "fcos" if family is None else small_detector(family)
    options = {"augment": augment, "max_epochs": 2, "head_lr": 3e-3, "score_threshold": 0.0}
    model = make(network, unfreeze=unfreeze, **options)
    found = model.fit(X, y).predict(X)
    assert same(clone(model).fit(X, y).predict(X), found)  # by the seed
    assert not same(clone(model).set_params(augment=None).fit(X, y).predict(X), found)


def test_an_augmentation_without_boxes_says_what_it_needs(scenes):
    for augment, kind, reason in [
        (v2.TrivialAugmentWide(), TypeError, "transforms of torchvision.transforms.v2 that take b"),
        (lambda image: image, TypeError, "with an image and a dict of its boxes and labels"),
        (lambda image, target: image, ValueError, "must return what it gets"),
        (lambda image, target: (image[:, ::2], target), ValueError, "an image of the shape"),
        (lambda image, target: (image, {**target, "labels": []}), ValueError, "label for each box"),
    ]:
        with pytest.raises(kind, match=reason):
            make(augment=augment).fit(scenes[0][:2], scenes[1][:2])
    with pytest.raises(ValueError, match="n_views=3, but augment='flip' has 2 views"):
        make(augment="flip", n_views=3).fit(*scenes)


# ------------------------------------------------------------------------------ images and labels


def test_images_of_any_kind_and_size(tmp_path, scenes):
    X, y = scenes
    sizes = [(64, 128), (100, 50), (64, 64)]
    images, targets = [], []
    for image, found, (height, width) in zip(X, y, sizes, strict=False):
        images.append(np.array(Image.fromarray(image).resize((width, height))))
        scale = np.array([width, height] * 2) / 64
        targets.append({**found, "boxes": np.array(found["boxes"]) * scale})
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for image, file in zip(images, files, strict=True):
        Image.fromarray(image).save(file)
    found = make().fit(files, targets).predict(files)
    pictures = [Image.fromarray(image) for image in images]
    assert same(found, make().fit(images, targets).predict(pictures))
    for own, (height, width) in zip(found, sizes, strict=True):
        assert (own["boxes"] >= 0).all() and (own["boxes"] <= [width, height] * 2).all()
    frame = pd.DataFrame({"file": files[:1]})
    assert make().fit(frame, targets[:1]).feature_names_in_.tolist() == ["file"]


def test_boxes_of_wide_images_come_back(fitted, scenes):
    X, y = scenes
    wide = np.full((32, 128, 3), 125, np.uint8)
    wide[4:26, 70:92] = 0
    found = fitted.predict([wide])[0]
    expected = np.array([70, 4, 92, 26])
    assert np.abs(found["boxes"] - expected).max(1).min() < 12  # six pixels of the input


def test_labels_of_any_type(scenes):
    X, y = scenes
    numbered = [{**found, "labels": [len(s) * 10 for s in found["labels"]]} for found in y]
    model = make().fit(X, numbered)
    assert model.classes_.tolist() == [40, 60]
    assert model.predict(X[:1])[0]["labels"].dtype == model.classes_.dtype
    assert same(make().fit(X, numbered).predict(X), model.predict(X))


def test_flat_rows(scenes):
    X, y = scenes
    model = make(image_shape=(64, 64, 3)).fit(X.reshape(len(X), -1), y)
    assert model.n_features_in_ == 64 * 64 * 3
    assert same(model.predict(X.reshape(len(X), -1)), make().fit(X, y).predict(X))


# ------------------------------------------------------------------------------ the contract


@pytest.mark.parametrize(
    "check",
    [
        check_estimator_cloneable,
        check_estimator_repr,
        check_get_params_invariance,
        check_no_attributes_set_in_init,
        check_parameters_default_constructible,
        check_set_params,
    ],
)
def test_estimator_checks(check):
    check("FineTunedDetector", FineTunedDetector())


def test_seeds(scenes):
    X, y = scenes
    X, y = X[:4], y[:4]
    first = make("faster_rcnn", score_threshold=0.0).fit(X, y)
    torch.rand(3)
    assert same(clone(first).fit(X, y).predict(X), first.predict(X))
    assert not same(clone(first).set_params(random_state=1).fit(X, y).predict(X), first.predict(X))


def test_global_seed_is_left_alone(scenes):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    make("faster_rcnn").fit(scenes[0][:2], scenes[1][:2])
    assert torch.equal(torch.rand(1), expected)


def test_pickle(fitted, scenes):
    data = pickle.dumps(fitted)
    again = pickle.loads(data)
    assert same(again.predict(scenes[0]), fitted.predict(scenes[0]))
    assert again.history_ == fitted.history_
    again.set_params(warm_start=True, max_epochs=1).fit(*scenes)
    assert again.n_iter_ == fitted.n_iter_ + 1


def test_warm_start_and_partial_fit(scenes):
    X, y = scenes
    model = make().partial_fit(X, y)
    weights = model.net_.module_.detector.head.state_dict()
    before = {key: value.clone() for key, value in weights.items()}
    model.partial_fit(X[:1], y[:1])
    after = model.net_.module_.detector.head.state_dict()
    assert model.n_iter_ == 2 and model.classes_.tolist() == ["bright", "dark"]
    assert any(not torch.equal(after[key], before[key]) for key in before)
    with pytest.raises(ValueError, match="row 0: unknown categories .'round'"):
        model.partial_fit(X[:1], [{**y[0], "labels": ["round"]}])
    with pytest.raises(ValueError, match="width has changed from 64 to 96"):
        model.set_params(width=96).partial_fit(X, y)


def test_partial_fit_takes_the_parameters_as_they_are(scenes):
    X, y = scenes
    model = make(batch_size=12).partial_fit(X, y)
    assert all(len(epoch["batches"]) == 1 for epoch in model.net_.history)
    before = trained(model)
    model.set_params(head_lr=0.0, batch_size=6).partial_fit(X, y)
    assert all(torch.equal(before[key], value) for key, value in trained(model).items())
    assert len(model.net_.history[-1]["batches"]) == 2
    moments = next(iter(model.net_.optimizer_.state.values()))
    assert moments["step"] == 3  # those of the first call went on
    model.set_params(head_lr=1e-3).partial_fit(X, y)
    assert not all(torch.equal(before[key], value) for key, value in trained(model).items())
    assert model.n_iter_ == 3


def trained(model):
    return {k: v.clone() for k, v in model.net_.module_.detector.head.state_dict().items()}


def test_a_fit_that_fails_leaves_the_detector_as_it_was(scenes, tmp_path):
    X, y = scenes
    model = make().fit(X, y)
    before, found = dict(vars(model)), model.predict(X)
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad = [*map(Image.fromarray, X[:2]), Image.new("RGB", (64, 64))]
    renamed = [{**found, "labels": ["other"] * len(found["labels"])} for found in y]
    frame = pd.DataFrame({"file": [str(tmp_path / "bad.png")]})
    for changes, given in [
        ({}, (frame, renamed[:1])),
        ({"unfreeze": 99}, (X, renamed)),
        ({"head_lr": 1e30}, (X, renamed)),
        ({}, (bad, [*renamed[:2], {"boxes": [[0, 0, 9, 99]], "labels": ["other"]}])),
    ]:
        parameters = {name: model.get_params()[name] for name in changes}
        with pytest.raises(ValueError):
            model.set_params(**changes).fit(*given)
        model.set_params(**parameters)
        assert vars(model).keys() == before.keys()
        assert model.classes_ is before["classes_"] and model.net_ is before["net_"]
        assert same(model.predict(X), found)
    with pytest.raises(ValueError, match="training loss became"):
        model.set_params(head_lr=1e30).partial_fit(X, y)
    assert same(model.predict(X), found) and model.n_iter_ == 1


def test_ctrl_c_keeps_what_was_learnt(scenes):
    class CtrlC(Callback):
        def on_epoch_begin(self, net, **kwargs):
            if len(net.history) == 2:
                os.kill(os.getpid(), signal.SIGINT)

    model = make(max_epochs=3, callbacks=[CtrlC()])
    with pytest.raises(KeyboardInterrupt, match="interrupted after 1 of 3 epochs. What was le"):
        model.fit(*scenes)
    assert model.n_iter_ == 1 and len(model.predict(scenes[0])) == 12
    found = model.predict(scenes[0])
    with pytest.raises(KeyboardInterrupt, match="had been fitted before"):
        model.fit(*scenes)
    assert model.n_iter_ == 1 and same(model.predict(scenes[0]), found)


def test_a_part_that_fails_leaves_the_moments_as_they_were(scenes):
    X, y = scenes
    model, plain = (make(batch_size=4).partial_fit(X, y) for _ in range(2))

    class Fail(Callback):
        def on_epoch_end(self, net, **kwargs):
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        model.set_params(callbacks=[Fail()]).partial_fit(X, y)
    model.set_params(callbacks=None).partial_fit(X, y)
    assert same(model.predict(X), plain.partial_fit(X, y).predict(X))


def test_a_step_that_does_not_fit_into_the_memory_says_what_to_do(scenes):
    def exhaust(module, args):
        if module.training:
            raise torch.OutOfMemoryError("CUDA out of memory")

    network = small_detector(FCOS)
    network.head.register_forward_pre_hook(exhaust)
    with pytest.raises(MemoryError, match="A step of 8 images .* a smaller batch_size"):
        make(network).fit(*scenes)


def test_parameters_that_change_after_a_fit(scenes):
    X, y = scenes
    model = make().fit(X, y)
    found = model.predict(X)
    with pytest.raises(ValueError, match="device='cuda:7' can't be used here"):
        model.set_params(device="cuda:7").predict(X)
    assert same(model.set_params(device="cpu").predict(X), found)
    model.set_params(runtime="auto").predict(X)  # loaded anew
    assert not hasattr(model, "net_")
    assert same(model.set_params(runtime="torch", backbone=small(1)).predict(X), found)
    copied = pickle.loads(pickle.dumps(model))  # which knows the parameters alone
    with pytest.raises(ValueError, match="not those on which this estimator was fitted"):
        copied.predict(X)
    assert same(copied.set_params(backbone=small()).predict(X), found)
    assert copied.partial_fit(X, y).n_iter_ == 2


def test_a_detector_of_torchvision_goes_on_with_its_weights(scenes, tmp_path):
    X, y = scenes[0][:4], scenes[1][:4]
    network = small_detector(FCOS)
    path, other = tmp_path / "detector.pth", tmp_path / "other.pth"
    torch.save(network.state_dict(), path)
    torch.save({k: v + 1 for k, v in network.state_dict().items()}, other)
    model = make(network).fit(X, y)
    assert model.set_params(backbone="no such network").partial_fit(X, y).n_iter_ == 2
    assert model.set_params(weights=path).partial_fit(X, y).n_iter_ == 3  # the same ones
    found = model.predict(X)
    assert same(model.set_params(weights=other).predict(X), found)
    with pytest.raises(ValueError, match="weights has changed"):
        model.partial_fit(X, y)


def test_another_runtime_holds_from_the_next_prediction_on(scenes, run_log):
    pytest.importorskip("openvino")
    X, y = scenes
    model = make().fit(X, y)
    found, n_runs = model.predict(X), len(run_log())
    again = model.set_params(runtime="openvino").predict(X)
    n_compiled = len(run_log()) - n_runs
    assert n_compiled < len(X)  # torch's network ran to be converted alone
    for one, other in zip(again, found, strict=True):
        np.testing.assert_allclose(one["scores"], other["scores"], atol=0.01)


def test_batch_size(scenes):
    X, y = scenes
    model = make().fit(X, y)
    assert model.batch_size == "auto" and len(model.net_.history[0]["batches"]) == 2  # 8 and 4
    assert same(make(batch_size=8).fit(X, y).predict(X), model.predict(X))


def test_dask(scenes):
    bag = pytest.importorskip("dask.bag")
    array = pytest.importorskip("dask.array")
    X, y = scenes
    model = make().fit(X, y)
    found = model.predict(X)
    images = array.from_array(X, chunks=(5, -1, -1, -1))
    lazy = model.predict(images)
    assert lazy.shape == (12,) and lazy.chunks == ((5, 5, 2),) and lazy.dtype == object
    assert same(lazy.compute(scheduler="threads"), found)
    pictures = bag.from_sequence([*map(Image.fromarray, X)], npartitions=2)
    assert same(model.predict(pictures).compute(scheduler="sync"), found)
    with pytest.raises(TypeError, match="got a dask collection"):
        model.fit(images, y)


# ------------------------------------------------------------------------------ threads


class Held(io.BytesIO):
    """A file whose pixels are read only after another thread has come as far as is told."""

    def __init__(self, pixels, arrived, until):
        super().__init__()
        Image.fromarray(pixels).save(self, "BMP")
        self.seek(0)
        self.arrived, self.until, self.is_armed = arrived, until, False

    def read(self, *args):
        if self.is_armed:
            self.arrived.set()
            assert self.until.wait(300)
        return super().read(*args)


def held(*args):
    file = Held(*args)
    image = Image.open(file)
    file.is_armed = True
    return image


def test_a_prediction_that_ends_leaves_another_alone(fitted, scenes):
    X, _ = scenes
    expected = [fitted.predict(X[i : i + 1])[0] for i in (0, 1)]
    begun, first_begun, ended = (threading.Event() for _ in range(3))
    found = []

    def last():
        # Within its own bar, and all that belongs to it, until the other one has ended.
        found.extend(fitted.predict([held(X[1], begun, ended)]))

    thread = threading.Thread(target=last)
    thread.start()
    first = fitted.predict([held(X[0], first_begun, begun)])
    ended.set()
    thread.join()
    assert same([*first, *found], expected)


@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
def test_maps_are_handed_on_as_values(unfreeze, scenes):
    X, y = scenes
    part = make(unfreeze=unfreeze).fit(X[:2], y[:2]).net_.module_
    shown = [Views(check_images(X[i : i + 2]), part.preprocessing, PLAIN) for i in (0, 2)]
    stored = [part.source.empty(2) for _ in shown]
    for views, outs in zip(shown, stored, strict=True):
        part.source.fill(views, outs, memory=None, n_jobs=1, progress=Progress())
    batches = [part.source.unpack([torch.from_numpy(x) for x in outs]) for outs in stored]
    with torch.no_grad():
        expected = [part.detector(batch) for batch in batches]
        barrier, found = threading.Barrier(2), {}

        def wait(*_):  # both are behind the backbone, and have not looked at its maps yet
            barrier.wait(300)

        part.detector.head.register_forward_pre_hook(wait)

        def run(i):
            with torch.no_grad():
                found[i] = part.detector(batches[i])

        threads = [threading.Thread(target=run, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in (0, 1):
        for one, other in zip(found[i], expected[i], strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_two_fits_at_once_are_what_they_are_alone(scenes):
    X, y = scenes
    X, y = X[:6], y[:6]
    model = make("faster_rcnn", batch_size=3).fit(X, y)  # it draws samples of boxes
    again = [clone(model), clone(model)]
    threads = [threading.Thread(target=one.fit, args=(X, y)) for one in again]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in again:
        assert same(one.predict(X), model.predict(X))


def test_progress(scenes, capsys):
    make(verbose=2).fit(*scenes)
    captured = capsys.readouterr()
    assert "training 1/1" in captured.err and "train_loss" in captured.out


def test_not_fitted(scenes):
    with pytest.raises(NotFittedError):
        make().predict(scenes[0])
    with pytest.raises(NotFittedError):
        make().score(*scenes)
    model = make()
    with pytest.raises(ValueError, match="no object in any image"):
        model.fit(scenes[0][-1:], scenes[1][-1:])
    with pytest.raises(NotFittedError):
        model.predict(scenes[0])


def test_limits(fitted, scenes):
    X, _ = scenes
    model = pickle.loads(pickle.dumps(fitted))
    many = model.set_params(score_threshold=0.0, nms_threshold=1.0).predict(X[:1])[0]
    assert len(many["boxes"]) > 20
    assert len(model.set_params(max_detections=3).predict(X[:1])[0]["boxes"]) == 3
    few = model.set_params(score_threshold=0.9).predict(X[:1])[0]
    assert (few["scores"] >= 0.9).all()


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "box, reason",
    [
        ([10, 10, 10, 30], "box 0, .10.0, 10.0, 10.0, 30.0., is empty or reversed"),
        ([30, 10, 10, 30], "is empty or reversed"),
        ([np.nan, 10, 20, 30], "holds NaN or infinity"),
        ([0, 0, np.inf, 30], "holds NaN or infinity"),
        ([10, 10, 80, 30], "lies outside its image of width 64 and height 64"),
        ([-9, 10, 20, 30], "lies outside its image"),
        ([64.5, 10, 64.9, 30], "nothing is left of a box inside the image"),
        ([10, 10, 20], "boxes of shape .1, 3. and labels of shape .1,. do not go together"),
        (["left", 0, 1, 1], "boxes must be numbers"),
    ],
)
def test_bad_boxes(box, reason, scenes):
    X, y = scenes
    bad = [*y[:2], {"boxes": [box], "labels": ["dark"]}]
    with pytest.raises(ValueError, match=f"y, row 2: .*{reason}|y, row 2: {reason}"):
        make().fit(X[:3], bad)


def test_bad_y(fitted, scenes):
    X, y = scenes
    with pytest.raises(ValueError, match="X has 12 images and y has 11 dicts"):
        make().fit(X, y[:-1])
    with pytest.raises(ValueError, match="row 1: the keys .'labels'. are missing"):
        make().fit(X[:2], [y[0], {"boxes": []}])
    with pytest.raises(TypeError, match="row 1: expected a dict"):
        make().fit(X[:2], [y[0], [1, 2]])
    with pytest.raises(TypeError, match="must be a sequence with a dict"):
        make().fit(X[:2], {"boxes": [], "labels": []})
    with pytest.raises(ValueError, match="the target y is None"):
        make().fit(X, None)
    with pytest.raises(ValueError, match="no object in any image"):
        make().fit(X[:1], y[-1:])
    with pytest.raises(TypeError, match="mixed types, int and str"):
        make().fit(X[:2], [y[0], {**y[1], "labels": [1]}])
    with pytest.raises(ValueError, match="row 0: unknown categories .'round'.; .* fitted to"):
        fitted.score(X[:1], [{**y[0], "labels": ["round"]}])


def test_a_pixel_outside_is_clipped(scenes):
    X, y = scenes
    make().fit(X[:1], [{"boxes": [[-0.6, 3, 64.9, 50]], "labels": ["dark"]}])


def test_bad_depth_and_backbone(scenes):
    for unfreeze, reason in [
        (9, "uses 3 blocks"),
        (-1, "Pass 0 to 3"),
        ("layer9", "Blocks: stem, body.0, body.1"),
        (["body.0", "layer9"], "No block is called 'layer9'"),
        ("auto", "unfreeze='auto' compares depths by scores on labels .*FineTunedDetector learns"),
    ]:
        with pytest.raises(ValueError, match=reason):
            make(unfreeze=unfreeze).fit(*scenes)
    with pytest.raises(TypeError, match="a list holds names of blocks"):
        make(unfreeze=[1]).fit(*scenes)
    with pytest.raises(ValueError, match="no block whose result is a map"):
        make(backbone=nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())).fit(*scenes)
    with pytest.raises(ValueError, match="width=65: it must be a multiple of 32"):
        make(width=65).fit(*scenes)


# ------------------------------------------------------------------------------ COCO


def test_coco_scores_of_a_case_solved_by_hand():
    y = [{"boxes": [[0, 0, 10, 10]], "labels": [3]}, {"boxes": [[0, 0, 10, 10]], "labels": [3]}]
    # The first box is met by 0.8 of the union; the second image has a wrong one of a higher score.
    found = [
        {"boxes": [[0, 0, 10, 8]], "labels": [3], "scores": [0.5]},
        {"boxes": [[50, 50, 60, 60]], "labels": [3], "scores": [0.9]},
    ]
    scores = coco_scores(y, found)
    # One of two is found, behind a false one: precision 1/2 up to recall 1/2, of 101 points 51.
    assert scores["map_50"] == pytest.approx(0.5 * 51 / 101)
    assert scores["map_75"] == pytest.approx(0.5 * 51 / 101)
    assert scores["map"] == pytest.approx(0.5 * 51 / 101 * 7 / 10)  # from 0.5 to 0.8
    assert scores["map_per_class"] == {3: pytest.approx(scores["map"])}
    nothing = [{"boxes": [], "labels": [], "scores": []}] * 2
    assert coco_scores(y, nothing)["map"] == 0
    with pytest.raises(ValueError, match="has no boxes"):
        coco_scores(nothing, nothing)
    with pytest.raises(ValueError, match="2 images, y_pred has 1"):
        coco_scores(y, found[:1])


def test_missing_pycocotools_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    with pytest.raises(ImportError, match=r"coco_scores needs pycocotools.*'\.\[detection\]'"):
        coco_scores([], [])


@pytest.fixture
def coco(tmp_path, scenes):
    content = {
        "images": [{"id": 5, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {"image_id": 5, "category_id": 9, "bbox": [10, 20, 30, 15]},
            {"image_id": 5, "category_id": 1, "bbox": [0, 0, 30, 15], "iscrowd": 1},
        ],
    }
    for name in ("a.png", "b.png"):
        Image.fromarray(scenes[0][0]).save(tmp_path / name)

    def write(**changes):
        (tmp_path / "boxes.json").write_text(json.dumps({**content, **changes}))
        return tmp_path / "boxes.json"

    return write


def test_load_coco(coco, tmp_path):
    data = load_coco(coco(), tmp_path)
    assert [Path(path).name for path in data.data] == ["a.png", "b.png"]
    assert data.target[0]["boxes"].tolist() == [[10, 20, 40, 35]]
    assert data.target[0]["labels"].tolist() == ["dog"]
    assert data.target[1]["boxes"].shape == (0, 4) and data.target_names == ["cat", "dog"]
    assert len(load_coco(coco(), tmp_path, crowd=True).target[0]["boxes"]) == 2
    assert make().fit(data.data, data.target).classes_.tolist() == ["dog"]


def test_bad_coco(coco, tmp_path):
    missing = [{"id": 5, "file_name": "a.png"}, {"id": 2, "file_name": "c.png"}]
    with pytest.raises(ValueError, match="1 of 2 images .* Missing:\n.*c.png"):
        load_coco(coco(images=missing), tmp_path)
    with pytest.raises(ValueError, match="annotation 0 is of image 8"):
        load_coco(
            coco(annotations=[{"image_id": 8, "category_id": 9, "bbox": [0, 0, 1, 1]}]), tmp_path
        )
    with pytest.raises(ValueError, match="not in COCO's format: an entry lacks .*'bbox'"):
        load_coco(coco(annotations=[{"image_id": 5, "category_id": 9}]), tmp_path)
    with pytest.raises(ValueError, match="has no list .'categories'."):
        load_coco(coco(categories=None), tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        load_coco(coco(), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there is no such file"):
        load_coco(tmp_path / "nothing.json", tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_coco(tmp_path / "broken.json", tmp_path)


# ------------------------------------------------------------------------------ the display


def test_display(fitted, scenes):
    X, y = scenes
    display = DetectionDisplay.from_estimator(fitted, X, y, n_images=3)
    assert len(display.axes_) == 3 and display.rows.tolist() == [0, 1, 2]
    dashed = [patch for patch in display.axes_[0].patches if patch.get_linestyle() == "--"]
    assert len(dashed) == 1
    scale = display.images[0].shape[0] / 64
    assert np.allclose(dashed[0].get_bbox().extents / scale, y[0]["boxes"][0])
    texts = [text.get_text() for text in display.axes_[0].texts]
    assert texts and texts[0].startswith("dark ")


def test_display_of_true_boxes_alone(scenes):
    X, y = scenes
    display = DetectionDisplay.from_predictions(X, y, n_images=2, n_cols=1)
    assert display.classes == ["bright", "dark"]
    assert [text.get_text() for text in display.axes_[1].texts] == ["bright"]
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        DetectionDisplay.from_predictions(X, y[:3])


def test_weights_beside_a_detector_are_read(scenes, tmp_path):
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as build

    detector = build(weights=None, weights_backbone=None, num_classes=4)
    torch.save(
        build(weights=None, weights_backbone=None, num_classes=3).state_dict(), tmp_path / "w.pth"
    )
    for weights, message in (
        ("no/such/file.pth", "there is no such file"),
        ("COCO_V1", r"beside a network \(FasterRCNN\)"),
        (tmp_path / "w.pth", r"weights of 'FasterRCNN': .* is \(3, 1024\), not \(4, 1024\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make(detector=detector, weights=weights).fit(scenes[0][:2], scenes[1][:2])
