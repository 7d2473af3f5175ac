import os
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from processes import run_code
from torchvision.models import get_model_weights
from torchvision.transforms.v2 import functional as F

from sktransfer.transforms import Preprocessing

NAMES = torchvision.models.list_models(module=torchvision.models)


def photo(height=300, width=401):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 12, 16, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    return (smooth.clamp(0, 1) * 255).to(torch.uint8)


@pytest.mark.parametrize(
    "name", ["resnet50", "vgg16", "inception_v3", "efficientnet_b1", "vit_b_16"]
)
@pytest.mark.parametrize("size", [(300, 401), (500, 200), (100, 130)])
def test_equals_torchvisions_preset(name, size):
    for weights in get_model_weights(name):
        preset = weights.transforms()
        ours = Preprocessing.from_torchvision(preset)
        x = photo(*size)
        expected = preset(torchvision.transforms.functional.to_pil_image(x))
        got = ours.normalize(ours.fit_size(x)[None])[0]
        levels = (got - expected).abs() * torch.tensor(ours.std).view(3, 1, 1) * 255
        # Pillow and torch's 8-bit resize round a few pixels in a thousand to the next level or two.
        assert levels.max() < 2.01 and levels.mean() < 0.02


def test_reads_every_torchvision_preset():
    for name in NAMES:
        for weights in get_model_weights(name):
            preset = weights.transforms()
            ours = Preprocessing.from_torchvision(preset)
            assert ours.size == (preset.crop_size[0],) * 2
            assert ours.interpolation == preset.interpolation.value


@pytest.mark.parametrize(
    "name", ["resnet50.a1_in1k", "vit_base_patch16_siglip_224.webli", "convnext_tiny.fb_in22k"]
)
def test_equals_timms_transform(name):
    config = timm.get_pretrained_cfg(name).to_dict()
    resolved = timm.data.resolve_data_config({}, pretrained_cfg=config)
    theirs = timm.data.create_transform(**resolved, is_training=False)
    ours = Preprocessing.from_timm(resolved)
    x = photo()
    expected = theirs(torchvision.transforms.functional.to_pil_image(x))
    got = ours.normalize(ours.fit_size(x)[None])[0]
    # Pillow and torch resize with antialiasing alike, within rounding to 8 bits.
    assert (got - expected).abs().mean() < 0.5 / 255 / min(ours.std)


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_modes_give_the_size_that_was_asked_for(mode, size):
    preprocessing = Preprocessing(size=size, resize=(40, 60), mode=mode)
    for height, width in [(100, 100), (10, 200), (200, 10), (1, 1)]:
        result = preprocessing.fit_size(photo(height, width))
        assert result.shape == (3, *size) and result.dtype == torch.uint8


def test_border_keeps_the_whole_image_and_pads_with_the_mean_colour():
    preprocessing = Preprocessing((40, 40), (40, 40), mode="border", mean=(1.0, 0.0, 0.5))
    result = preprocessing.fit_size(torch.full((3, 20, 40), 77, dtype=torch.uint8))
    assert (result[:, 10:30] == 77).all()
    assert result[:, 0, 0].tolist() == [255, 0, 128]


def test_another_size_keeps_the_share_of_the_crop():
    preprocessing = Preprocessing(size=(224, 224), resize=(256, 256))
    assert preprocessing.with_size(112).resize == (128, 128)
    assert preprocessing.with_size((112, 224)).resize == (128, 256)
    assert preprocessing.with_size(None) is preprocessing


def test_fingerprint_tells_apart_what_differs():
    variants = [
        Preprocessing(),
        Preprocessing(size=(223, 224)),
        Preprocessing(resize=(255, 256)),
        Preprocessing(mode="squash"),
        Preprocessing(interpolation="bicubic"),
        Preprocessing(mean=(0.5, 0.5, 0.5)),
        Preprocessing(std=(0.5, 0.5, 0.5)),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)
    assert Preprocessing().fingerprint == Preprocessing().fingerprint


def whole_then_crop(preprocessing, image):
    """Scale the whole image, however large it becomes, and crop it then."""
    scaled = list(preprocessing.scaled_size(*image.shape[1:]))
    mode = torchvision.transforms.InterpolationMode(preprocessing.interpolation)
    image = F.resize(image, scaled, interpolation=mode, antialias=True)
    if preprocessing.mode == "border":
        missing = [max(0, a - b) for a, b in zip(preprocessing.size, image.shape[1:], strict=True)]
        top, left = missing[0] // 2, missing[1] // 2
        fill = [float(round(255 * value)) for value in preprocessing.mean]
        image = F.pad(image, [left, top, missing[1] - left, missing[0] - top], fill=fill)
    return F.center_crop(image, list(preprocessing.size))


EXTREME = [(1, 40), (2, 300), (3, 901), (1, 1500), (31, 700)]


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "size, resize",
    [((32, 32), (36, 36)), ((33, 47), (41, 60)), ((64, 64), (64, 64)), ((40, 40), (32, 32))],
)
def test_long_images_get_the_pixels_of_the_whole(mode, interpolation, size, resize):
    preprocessing = Preprocessing(size, resize, mode, interpolation)
    generator = torch.Generator().manual_seed(0)
    for shape in EXTREME + [shape[::-1] for shape in EXTREME]:
        for image in (
            torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=generator),
            photo(*shape),
        ):
            expected = whole_then_crop(preprocessing, image).int()
            levels = (preprocessing.fit_size(image).int() - expected).abs()
            # torch's 8-bit bicubic filter itself rounds a few pixels in a thousand by one more.
            assert levels.max() <= (1 if interpolation == "bilinear" else 2)
            assert levels.float().mean() < 0.5


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_pixels_of_photographs_are_exactly_those_of_torch(mode):
    for interpolation in ("bilinear", "bicubic"):
        preprocessing = Preprocessing((32, 32), (36, 40), mode, interpolation)
        for shape in [(100, 130), (48, 200), (500, 40), (1, 1), (20, 300)]:
            image = photo(*shape)
            assert torch.equal(preprocessing.fit_size(image), whole_then_crop(preprocessing, image))


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(70, 90), (36, 36), (20, 500)])
def test_several_images_get_the_pixels_of_each(mode, interpolation, size):
    preprocessing = Preprocessing((32, 32), (36, 36), mode, interpolation)
    last = torch.stack([photo(*size).roll(i, 2).permute(1, 2, 0) for i in range(3)])
    batch = last.permute(0, 3, 1, 2)  # channels last, as arrays of users lie in memory
    expected = torch.stack([preprocessing.fit_size(image) for image in batch])
    assert torch.equal(preprocessing.fit_size(batch), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="resource limits of POSIX")
def test_memory_that_a_very_long_image_takes():
    code = """
import resource, torch
from sktransfer.transforms import Preprocessing
torch.set_num_threads(1)
Preprocessing().fit_size(torch.zeros(3, 300, 400, dtype=torch.uint8))
images = torch.zeros(3, 1, 30_000, dtype=torch.uint8), torch.zeros(3, 2, 2_000_000).byte()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for mode in ("center", "squash", "border"):
    for image in images:
        Preprocessing(mode=mode).fit_size(image)
    Preprocessing(mode=mode).fit_size(images[0].mT)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = run_code(code)
    grown = int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 200e6  # the images are 12 MB; scaled whole, the smaller one took 6.3 GB


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(2, 1), (7, 1), (1, 7)])
def test_images_of_one_column_get_their_own_pixels(interpolation, size):
    own = Preprocessing((8, 8), (8, 8), "squash", interpolation)
    last = np.random.default_rng(0).integers(256, size=(*size, 3), dtype=np.uint8)
    resampling = Image.Resampling[interpolation.upper()]
    expected = np.asarray(Image.fromarray(last).resize((8, 8), resampling), int).transpose(2, 0, 1)
    image = torch.from_numpy(last).permute(2, 0, 1).contiguous()
    for found in (own.fit_size(image), own.fit_size(torch.stack([image, image]))[1]):
        assert np.abs(found.numpy() - expected).max() <= 1
