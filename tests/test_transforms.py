import pytest
import timm
import torch
import torchvision
from torchvision.models import get_model_weights

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
