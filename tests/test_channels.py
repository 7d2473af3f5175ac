import io
import pickle
import sys

import numpy as np
import pytest
import skops.io
import tifffile
import timm
import torch
import xxhash
from networks import small
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torchvision.models import googlenet

from sktransfer import (
    ChannelAdapter,
    ContrastivePretrainer,
    FineTunedClassifier,
    FineTunedDetector,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
    load_model,
)
from sktransfer._memory.memory import check_memory
from sktransfer.inspection import (
    EmbeddingDisplay,
    PrototypeDisplay,
    SaliencyDisplay,
    TopLossesDisplay,
    find_similar,
)
from sktransfer.io import check_images
from sktransfer.model_selection import audit, rank_backbones, suggest_groups
from sktransfer.model_selection._image_facts import look_at
from sktransfer.models import Backbone
from sktransfer.models._inflation import inflated
from sktransfer.transforms import RGB, Channels, Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(36, 36))
RANGE = (0, 4095)
FIVE = Channels(5, ((0.0, 4095.0),))


def scenes(n=6, n_channels=5, dtype=np.uint16):
    """Return noise of 12 bits (n, 40, 30, channels)."""
    noise = np.random.default_rng(0).integers(0, 4096, size=(n, 40, 30, n_channels))
    return noise.astype(dtype)


def adapter(n_channels=5, **other):
    return ChannelAdapter(
        Backbone(small(), SIZE), n_channels=n_channels, value_range=RANGE, **other
    )


def in_8_bits(pixels):
    return np.rint(pixels / 4095 * 255).astype(np.uint8)


# ------------------------------------------------------------------------------ the network


@pytest.mark.parametrize(
    "name, n_channels",
    [("test_resnet", 1), ("test_resnet", 12), ("test_vit", 2), ("crossvit_9_240", 4)],
)
def test_the_first_convolution_is_as_timm_inflates_it(name, n_channels):
    own = timm.create_model(name, num_classes=3)
    backbone = inflated(Backbone(own), n_channels)
    theirs = timm.create_model(name, num_classes=3, in_chans=n_channels)
    first = own.pretrained_cfg["first_conv"]
    for conv in [first] if isinstance(first, str) else first:
        weight = own.get_submodule(conv).weight
        wanted = timm.models.adapt_input_conv(n_channels, weight.detach().clone())
        torch.testing.assert_close(backbone.network.get_submodule(conv).weight.detach(), wanted)
    theirs.load_state_dict(backbone.network.state_dict())
    x = torch.randn(1, n_channels, *own.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        torch.testing.assert_close(backbone.network.eval()(x), theirs.eval()(x))
    assert own.get_submodule(conv).weight.shape[1] == 3  # the user's is left as it was


def test_grey_through_one_channel_is_grey_through_three():
    even = Preprocessing((32, 32), (36, 36), mean=(0.5,) * 3, std=(0.25,) * 3)
    grey = scenes(3, 1, np.uint8)
    one = ChannelAdapter(Backbone(small(), even), n_channels=1)
    rows = PretrainedFeatureExtractor(one).transform(grey)
    expected = PretrainedFeatureExtractor(Backbone(small(), even)).transform(grey)
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert one.to_backbone().preprocessing.mean == (0.5,)


def test_a_network_that_scales_its_input_by_itself():
    network = googlenet(weights=None, init_weights=False, aux_logits=False, transform_input=True)
    made = inflated(Backbone(network), 4)
    assert made.network.transform_input is False and network.transform_input is True
    assert made.preprocessing.mean == made.preprocessing.std == (0.5,) * 4


def test_modules_that_compare_their_number_of_channels():
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_channels, self.projection = 3, nn.Conv2d(3, 4, 8, 8)

        def forward(self, x):
            if x.shape[1] != self.num_channels:
                raise ValueError("other channels than in the configuration")
            return self.projection(x).mean((2, 3))

    made = ChannelAdapter(Backbone(nn.Sequential(Strict()), SIZE), n_channels=4)
    X = scenes(2, 4, np.uint8)
    assert PretrainedFeatureExtractor(made, layer="output").transform(X).shape == (2, 4)


@pytest.mark.parametrize(
    "network, message",
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), r"no convolution .* takes 3 channels"),
        (
            nn.Sequential(nn.Conv2d(3, 6, 3, groups=3)),
            r"Conv2d of one group\) that takes 3 channels",
        ),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)), "not its first .* alone wants 3"),
        (nn.Sequential(nn.Conv2d(48, 2, 3)), r"no convolution .* takes 3 channels"),
        (Backbone(nn.Conv2d(2, 2, 3), Preprocessing(mean=(0, 0), std=(1, 1))), "takes 2 channels"),
    ],
)
def test_networks_that_cannot_be_inflated(network, message):
    with pytest.raises(ValueError, match=message):
        ChannelAdapter(network, n_channels=4).to_backbone()


def test_the_convolutions_that_get_the_image_are_found_by_running_it():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Conv2d(3, 5, 1)  # defined first
            self.left, self.right = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.last(self.left(x) + self.right(x)).mean((2, 3))

    made = inflated(Backbone(Branches(), SIZE), 4).network
    sizes = [conv.weight.shape[1] for conv in (made.last, made.left, made.right)]
    assert sizes == [3, 4, 4]


def test_a_network_of_the_users_own_needs_no_adapter():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 3))
    own = Preprocessing((32, 32), (36, 36), mean=(0.1, 0.2), std=(1, 2), value_range=(0, 4095))
    X = scenes(2, 2)
    rows = PretrainedFeatureExtractor(Backbone(network, own), layer="output").transform(X)
    seen = [own.fit_size(check_images(X, channels=own.channels).load(i)) for i in (0, 1)]
    with torch.no_grad():
        expected = network(own.normalize(torch.stack(seen)))
    np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_weights_of_a_network_that_has_these_channels(tmp_path):
    other = inflated(Backbone(small(7), SIZE), 5).network
    torch.save(other.state_dict(), tmp_path / "five.pth")
    X = scenes(2)
    extractor = PretrainedFeatureExtractor(adapter(), weights=tmp_path / "five.pth")
    of_file = extractor.transform(X)
    direct = ChannelAdapter(Backbone(small(7), SIZE), n_channels=5, value_range=RANGE)
    np.testing.assert_array_equal(of_file, PretrainedFeatureExtractor(direct).transform(X))


# ------------------------------------------------------------------------------ statistics


def test_statistics_are_those_of_the_images_that_fit_gets(tmp_path):
    X = scenes()
    X[..., 2] //= 4
    X[..., 3] = 7  # the same everywhere
    learnt = adapter("auto").fit(list(X))
    scaled = in_8_bits(X) / 255
    np.testing.assert_allclose(learnt.mean_, scaled.mean((0, 1, 2)))
    np.testing.assert_allclose(learnt.std_[:3], scaled.std((0, 1, 2))[:3])
    assert learnt.n_channels_ == 5 and learnt.std_[3] == 1
    seen = learnt.to_backbone().preprocessing
    assert seen.mean == tuple(learnt.mean_) and seen.value_range == ((0.0, 4095.0),)
    given = adapter(mean=[0.5] * 5, std=[0.1] * 5).fit(X).to_backbone().preprocessing
    assert given.mean == (0.5,) * 5 and given.std == (0.1,) * 5
    unfitted = adapter().to_backbone().preprocessing
    assert unfitted.mean == (*SIZE.mean, *SIZE.mean[:2])  # in turn, as the weights


def n_run(run_log):
    """Return how many images ran, but for the blank one by which an inflated network is tried."""
    blank = {xxhash.xxh3_64_hexdigest(np.zeros((c, 32, 32), np.float32)) for c in (3, 5)}
    return len([digest for digest in run_log() if digest not in blank])


def test_statistics_are_part_of_the_key_and_of_the_fitted_state(tmp_path, run_log):
    X = scenes()
    first, second = adapter().fit(X), adapter().fit(X // 2)
    extractor = PretrainedFeatureExtractor(first, memory=tmp_path)
    rows = extractor.transform(X)
    assert n_run(run_log) == 6
    other = PretrainedFeatureExtractor(second, memory=tmp_path).transform(X)
    assert n_run(run_log) == 12 and np.abs(rows - other).max() > 1e-3
    copied = pickle.loads(pickle.dumps(extractor))
    kept = clone(extractor)
    for twin in (copied, kept):
        np.testing.assert_array_equal(twin.transform(X[::-1])[::-1], rows)
    assert n_run(run_log) == 12  # the same keys, in any order
    np.testing.assert_allclose(kept.backbone.mean_, first.mean_)
    one = PretrainedFeatureExtractor(first).transform(X[3:4])
    np.testing.assert_allclose(one, rows[3:4], atol=1e-6)


def test_a_change_after_fit_is_refused_or_honoured():
    learnt = adapter().fit(scenes())
    learnt.set_params(mean=[0.2] * 5)
    assert learnt.to_backbone().preprocessing.mean == (0.2,) * 5
    learnt.set_params(value_range=(0, 100))
    with pytest.raises(ValueError, match="value_range has changed"):
        learnt.to_backbone()
    assert learnt.fit(scenes() % 100).to_backbone().preprocessing.value_range == ((0.0, 100.0),)


# ------------------------------------------------------------------------------ estimators


def test_rows_by_all_that_computes(tmp_path):
    X, backbone = scenes(), adapter().fit(scenes())
    extractor = PretrainedFeatureExtractor(backbone, runtime="torch")
    rows = extractor.fit(X).transform(X)
    assert extractor.block_names_ == ["stem", "body.0", "body.1"]
    by_openvino = PretrainedFeatureExtractor(backbone, runtime="openvino").transform(X)
    np.testing.assert_allclose(by_openvino, rows, atol=1e-3 * np.abs(rows).max())
    low = PretrainedFeatureExtractor(backbone, precision="bfloat16").transform(X)
    np.testing.assert_allclose(low, rows, atol=0.03 * np.abs(rows).max())
    tensors = torch.from_numpy(in_8_bits(X)).permute(0, 3, 1, 2)
    eight = adapter().set_params(value_range=None, mean=backbone.mean_, std=backbone.std_)
    np.testing.assert_allclose(PretrainedFeatureExtractor(eight).transform(tensors), rows)
    layers = PretrainedFeatureExtractor(
        backbone, layer="all", pooling=("avg", "max"), augment="flip"
    )
    assert layers.transform(X).shape == (6, 2 * (8 + 12 + 16))
    assert PretrainedClassifier(backbone).predict_proba(X).shape == (6, 5)
    with pytest.raises(ValueError, match=r"precision='int8' is calibrated on photographs.*5 chan"):
        PretrainedFeatureExtractor(backbone, precision="int8").transform(X)


@pytest.mark.parametrize("unfreeze", [0, 1, "all"])
def test_fine_tuning(unfreeze, tmp_path):
    X, y = scenes(8), np.array(["field", "lake"] * 4)
    X[1::2, ..., 4] //= 4  # only the last channel tells them apart
    options = {"unfreeze": unfreeze, "max_epochs": 8, "lr": 0.01, "random_state": 0}
    model = FineTunedClassifier(adapter().fit(X), augment="auto", memory=tmp_path, **options)
    model.fit(X, y)
    if unfreeze == "all":
        assert model.score(X, y) == 1
    proba = model.predict_proba(X)
    copied = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(copied.predict_proba(X), proba, atol=1e-6)
    features = model.to_feature_extractor().transform(X)
    assert features.shape == (8, 16)


def test_model_files_with_an_adapter(tmp_path):
    X = scenes(1)
    named = ChannelAdapter("efficientnet_lite0", value_range=RANGE).fit(X)
    extractor = PretrainedFeatureExtractor(named, image_size=32)
    skops.io.dump(extractor, tmp_path / "model.skops")
    loaded = load_model(tmp_path / "model.skops")
    np.testing.assert_allclose(loaded.transform(X), extractor.transform(X), atol=1e-3)


def test_learning_without_labels_and_boxes():
    X = scenes(6, 4)
    options = {"max_epochs": 1, "random_state": 0}
    pretrainer = ContrastivePretrainer(adapter(4), unfreeze=1, **options).fit(X)
    assert PretrainedFeatureExtractor(pretrainer).transform(X).shape == (6, 16)
    y = [{"boxes": [[2, 2, 20, 20]], "labels": ["tree"]}] * 6
    detector = FineTunedDetector(adapter(4), image_size=32, augment="auto", width=64, **options)
    assert len(detector.fit(X, y).predict(X)) == 6
    clips = np.zeros((2, 4, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="Clips are read as RGB"):
        ContrastivePretrainer(adapter(4), unfreeze=1).fit(clips)


def test_flat_rows():
    X = scenes(3, 2)
    extractor = PretrainedFeatureExtractor(adapter(2), image_shape=(40, 30, 2))
    rows = extractor.fit_transform(X.reshape(3, -1))
    np.testing.assert_array_equal(rows, PretrainedFeatureExtractor(adapter(2)).transform(X))
    with pytest.raises(ValueError, match=r"has 1 channels; an image has 2 channels"):
        extractor.set_params(image_shape=(40, 60)).transform(X.reshape(3, -1))


# ------------------------------------------------------------------------------ files


def tiff(*pages, **options):
    buffer = io.BytesIO()
    options = {"photometric": "minisblack", **options}
    with tifffile.TiffWriter(buffer) as writer:
        for page in pages:
            writer.write(page, **options)
    return buffer.getvalue()


def picture(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


PIXELS = scenes(1)[0]
BANDS = np.ascontiguousarray(PIXELS.transpose(2, 0, 1))
CONTIG = {"planarconfig": "contig"}


@pytest.mark.parametrize(
    "data",
    [
        tiff(PIXELS, **CONTIG),
        tiff(BANDS, planarconfig="separate"),
        tiff(BANDS),
        tiff(*BANDS),  # pages one by one
        tiff(BANDS, metadata={"axes": "CYX"}),
        tiff(PIXELS, compression="zlib", **CONTIG),
        tiff(PIXELS.astype(np.float32), **CONTIG),
        tiff(PIXELS.astype(np.int16), **CONTIG),
        tiff(np.rot90(PIXELS), extratags=[(274, 3, 1, 6, True)], **CONTIG),
    ],
    ids="contig planes stack pages axes deflate float signed turned".split(),
)
def test_tiff_files(data):
    read = check_images([data], channels=FIVE).load(0).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(read, in_8_bits(PIXELS))


def test_smaller_copies_in_a_tiff_file_are_no_channels():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(PIXELS, photometric="minisblack", **CONTIG)
        writer.write(PIXELS[::2, ::2], photometric="minisblack", subfiletype=1, **CONTIG)
    read = check_images([buffer.getvalue()], channels=FIVE).load(0)
    np.testing.assert_array_equal(read.permute(1, 2, 0), in_8_bits(PIXELS))


GREY = in_8_bits(PIXELS[..., 0])
RGBA = np.dstack([GREY, GREY // 2, GREY, 255 - GREY])


@pytest.mark.parametrize(
    "image, n_channels, expected",
    [
        (picture(Image.fromarray(GREY), "PNG"), 1, GREY[..., None]),
        (picture(Image.fromarray(GREY > 99), "PNG"), 1, 255 * (GREY > 99)[..., None]),
        (picture(Image.fromarray(RGBA), "PNG"), 4, RGBA),  # stated, so alpha is a channel
        (Image.fromarray(RGBA), 4, RGBA),
        (picture(Image.fromarray(RGBA[..., :2]), "PNG"), 2, RGBA[..., :2]),
    ],
)
def test_files_of_pictures_count_as_what_they_hold(image, n_channels, expected):
    read = check_images([image], channels=Channels(n_channels)).load(0)
    np.testing.assert_array_equal(read.permute(1, 2, 0), expected)


def test_alpha_of_files_is_blended_where_a_network_takes_rgb():
    read = check_images([picture(Image.fromarray(RGBA), "PNG")]).load(0)
    white = Image.new("RGBA", (30, 40), "white")
    shown = Image.alpha_composite(white, Image.fromarray(RGBA)).convert("RGB")
    np.testing.assert_array_equal(read.permute(1, 2, 0), np.asarray(shown))


def test_files_of_16_bits_need_a_range():
    data = picture(Image.fromarray(PIXELS[..., 0]), "PNG")
    one = Channels(1, ((0.0, 4095.0),))
    read = check_images([data], channels=one).load(0)
    np.testing.assert_array_equal(read[0], GREY)
    with pytest.raises(ValueError, match="range of uint16 pixels is unknown.*value_range"):
        check_images([data], channels=Channels(1)).load(0)


@pytest.mark.parametrize(
    "data, message",
    [
        (tiff(PIXELS[..., 0], PIXELS[:20, :, 1]), "pages have different sizes.*20 × 30 uint16"),
        (tiff(PIXELS[..., 0], GREY), "pages have different sizes or types"),
        (tiff(PIXELS[..., :4], **CONTIG), r"\(40, 30, 4\); the network takes .* 5 channels"),
        (tiff(np.full((4, 4, 5), np.nan), **CONTIG), "NaN or infinity"),
        (tiff(np.zeros((2, 5, 8, 9), np.uint8), metadata={"axes": "TCYX"}), "axes 'TCYX'"),
        (tiff(GREY, photometric="miniswhite"), "its white is 0"),
        (tiff(PIXELS, **CONTIG)[:5000], "damaged or cut short"),
        (tiff(PIXELS, **CONTIG)[:60], "damaged or cut short"),
        (b"II*\0" + bytes(99), "damaged or cut short"),
        (picture(Image.fromarray(GREY), "JPEG"), r"\(40, 30\); the network takes .* 5 channels"),
        (picture(Image.fromarray(RGBA).quantize(), "PNG"), "its mode is 'P'"),
        (b"hello", "Pillow knows no image"),
    ],
)
def test_files_that_do_not_fit(data, message):
    images = check_images([tiff(PIXELS, **CONTIG), data], channels=FIVE)
    with pytest.raises(ValueError, match="row 1.*" + message):
        images.load(1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_fourth_channel_of_a_tiff_file_is_not_dropped(dtype, tmp_path):
    pixels = np.dstack([GREY, GREY // 2, GREY // 3, GREY[::-1]])
    values = pixels.astype(dtype) * (257 if dtype == np.uint16 else 1)
    rgb = {"photometric": "rgb", **CONTIG}
    path = tmp_path / "near_infrared.tif"
    path.write_bytes(tiff(values, extrasamples=["unspecified"], **rgb))
    message = r"in 4 channels, of which Pillow reads 3; .*n_channels=4\); or convert to RGB: pass "
    loaded = Image.open(path)
    loaded.load()
    for item in (path, path.read_bytes(), Image.open(path), loaded):
        with pytest.raises(ValueError, match=f"row 0.*{message}PIL.Image.open"):
            check_images([item]).load(0)
    converted = check_images([Image.open(path).convert("RGB")]).load(0).permute(1, 2, 0)
    np.testing.assert_array_equal(converted, pixels[..., :3])
    if dtype == np.uint8:
        read = check_images([path], channels=Channels(4)).load(0).permute(1, 2, 0)
        np.testing.assert_array_equal(read, pixels)
        with pytest.raises(ValueError, match=message):  # where the network takes three of any kind
            check_images([loaded], channels=Channels(3, ((0, 255),))).load(0)


@pytest.mark.parametrize("kind", ["assocalpha", "unassalpha"])
def test_alpha_of_a_tiff_file_stays_alpha(kind):
    clear = np.dstack([GREY, GREY, GREY, 0 * GREY])  # nothing of it is seen
    data = tiff(clear, photometric="rgb", extrasamples=[kind], **CONTIG)
    assert (check_images([data]).load(0) == 255).all()
    with pytest.raises(ValueError, match="in 5 channels, of which Pillow reads 4"):
        more = tiff(np.dstack([clear, GREY]), photometric="rgb", extrasamples=[kind, 0], **CONTIG)
        check_images([more]).load(0)


def test_tiff_files_need_tifffile(monkeypatch):
    data = tiff(PIXELS, **CONTIG)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImportError, match=r"needs tifffile: pip install '\.\[tiff\]'"):
        check_images([data], channels=FIVE).load(0)


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "X, message",
    [
        (scenes(2, 4), r"shape \(2, 40, 30, 4\). The network takes images of 5 channels"),
        (scenes(2).transpose(0, 3, 1, 2), r"pass X.transpose\(0, 2, 3, 1\)"),
        (scenes(2)[0], "5 channels: for a single one, pass"),
        (scenes(2)[..., 0], "5 channels: for a single one, pass"),
        (scenes(2)[:0], "0 sample"),
        (scenes(2) * np.nan, "row 0: the pixels hold NaN or infinity"),
        ([scenes(1)[0], scenes(1, 3)[0]], r"row 1: got .*\(40, 30, 3\); the network takes .* 5 ch"),
        ([scenes(1)[0].transpose(2, 0, 1)], "puts the channels last"),
        (torch.zeros(2, 4, 8, 8), "The network takes images of 5 channels"),
        (torch.zeros(2, 8, 8, 5), r"pass X.permute\(0, 3, 1, 2\)"),
        (np.full((1, 8, 8, 5), 1j), "Complex"),
    ],
)
def test_images_that_do_not_fit(X, message):
    with pytest.raises(ValueError, match=message):
        PretrainedFeatureExtractor(adapter()).transform(X)


def test_values_outside_of_the_range():
    X = scenes(2).astype(float)
    X[0, :3] = -9999  # a few are clipped
    read = check_images(X, channels=FIVE).load(0).permute(1, 2, 0).numpy()
    assert (read[:3] == 0).all() and (read[3:] == in_8_bits(X[0])[3:]).all()
    with pytest.warns(UserWarning, match="row 0: 100% of the values lie outside of value_range"):
        check_images(X - 9999, channels=FIVE).load(0)
    each = Channels(2, ((0.0, 1.0), (0.0, 10_000.0)))
    read = check_images(np.full((1, 2, 2, 2), 1), channels=each).load(0)
    assert read[0].eq(255).all() and read[1].eq(0).all()


@pytest.mark.parametrize(
    "parameters, error, message",
    [
        ({"n_channels": 0}, ValueError, "n_channels"),
        ({"n_channels": "many"}, ValueError, "n_channels"),
        ({"n_channels": 2.5}, ValueError, "n_channels"),
        ({"n_channels": "auto"}, NotFittedError, r"call ChannelAdapter.fit\(X\), or pass"),
        ({"mean": [0.5] * 4}, ValueError, r"mean has shape \(4,\), and there are 5"),
        ({"std": [0.0] * 5}, ValueError, "holds 0"),
        ({"mean": [np.nan] * 5}, ValueError, "mean must have a number for each channel"),
        ({"value_range": [(0, 1)] * 2}, ValueError, "value_range has 2 pairs for 5 channels"),
        ({"value_range": (1, 1)}, ValueError, r"\(low, high\) with low < high"),
        ({"value_range": (0, 10**400)}, ValueError, r"\(low, high\) with low < high"),
        ({"value_range": (0, np.inf)}, ValueError, r"\(low, high\) with low < high"),
        ({"value_range": []}, ValueError, r"\(low, high\) with low < high"),
        ({"value_range": 255}, ValueError, "value_range"),
    ],
)
def test_parameters_that_are_wrong(parameters, error, message):
    with pytest.raises(error, match=message):
        PretrainedFeatureExtractor(adapter().set_params(**parameters)).transform(scenes(2))


def test_channels_are_told_by_the_data():
    fitted = {
        2: [scenes(1, 2)[0], scenes(1, 2)[0]],
        1: scenes(2)[..., 0],
        4: torch.zeros(2, 4, 8, 8),
        5: [tiff(PIXELS, **CONTIG)],
        3: [Image.new("RGB", (8, 8))],
    }
    for n_channels, X in fitted.items():
        assert adapter("auto").fit(X).n_channels_ == n_channels
    with pytest.raises(ValueError, match=r"channels come last.*pass n_channels=30"):
        adapter("auto").fit(scenes(2).transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match="0 sample"):
        adapter("auto").fit([])


@pytest.mark.parametrize("n_channels", [2, 4, 12])
def test_an_error_names_both_remedies_where_a_network_takes_rgb(n_channels):
    X = np.zeros((2, 40, 30, n_channels), np.uint8)
    for given in (X, list(X), torch.from_numpy(X).permute(0, 3, 1, 2)):
        with pytest.raises(ValueError, match=rf"n_channels={n_channels}\); or convert to"):
            PretrainedFeatureExtractor(Backbone(small(), SIZE)).transform(given)


def test_what_looks_at_a_collection(tmp_path):
    X = np.repeat(scenes(10), 2, axis=0)
    X[1::2] += 1  # almost equal
    X[18:] = 0
    given = {"backbone": adapter(), "memory": tmp_path}
    groups = suggest_groups(X, **given)
    assert groups.tolist() == np.repeat(range(10), 2).tolist()
    table = audit(X, ["a", "b"] * 10, **given)
    assert {"duplicate across classes", "blank"} <= set(table["kind"])
    assert find_similar(X[2:3], X, n_neighbors=2, **given)["row"].tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"n_channels=5\); or convert to"):
        suggest_groups(X.astype(np.uint8))
    # One file, read in two ways, has two kinds of facts.
    data, memory = [picture(Image.fromarray(RGBA), "PNG")], check_memory(tmp_path)
    for channels in (Channels(4), RGB):
        images = check_images(data, channels=channels)
        np.testing.assert_array_equal(look_at(images, memory).rows, look_at(images).rows)


def test_networks_of_other_channels_are_ranked():
    X, y = scenes(12) // 2, np.repeat(["a", "b"], 6)
    X[6:, ..., 4] //= 4
    other = ChannelAdapter(Backbone(small(3), SIZE), n_channels=5, value_range=RANGE).fit(X)
    options = {"scoring": "knn", "cv": 2, "pairs": False, "random_state": 0}
    table = rank_backbones(X, y, [other, adapter().to_backbone()], **options)
    assert len(table) == 2 and (table["knn"] > 0.5).all()
    with pytest.raises(ValueError, match="n_channels=5"):
        rank_backbones(X.astype(np.uint8), y, [small()], **options)
    with pytest.raises(ValueError, match="the range of uint16 pixels is unknown"):
        rank_backbones(X, y, [other, "efficientnet_lite0"], **options)


def test_displays_show_the_first_three_channels():
    model = FineTunedClassifier(adapter(4), unfreeze=0, max_epochs=1, random_state=0)
    X, y = scenes(4, 4), ["a", "b"] * 2
    model.fit(X, y)
    assert TopLossesDisplay.from_estimator(model, X, y, n_images=1).images
    pipeline = make_pipeline(PretrainedFeatureExtractor(adapter(4)), StandardScaler())
    pipeline.fit(X)
    assert EmbeddingDisplay.from_estimator(pipeline, X, method="pca").thumbnails
    assert PrototypeDisplay.from_estimator(pipeline, X[:1], X, n_neighbors=2).images
    shown = SaliencyDisplay.from_estimator(model, X[:1])
    assert shown.images.shape == (1, 32, 32, 3)
