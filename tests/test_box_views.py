import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from sktransfer._engine.box_views import BoxAugmentation, BoxViews
from sktransfer.io import check_images
from sktransfer.transforms import Preprocessing

SIZE = (40, 64)
BOX = [10, 5, 30, 14]  # x1, y1, x2, y2


def scene(size=SIZE):
    """A black image with a bright rectangle, and the box around it."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    image[:, BOX[1] : BOX[3], BOX[0] : BOX[2]] = 200
    boxes = torch.tensor([BOX], dtype=torch.float32)
    return image, {"boxes": boxes, "labels": torch.tensor([7])}


def bright(image):
    """The box around what is bright."""
    rows, columns = (image.amax(0) > 60).nonzero().unbind(1)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def views_of(augment, size=SIZE, n_views=None, targets=None):
    image, target = scene(size)
    images = check_images([image, image])
    augmentation = BoxAugmentation(augment, n_views, size)
    preprocessing = Preprocessing(size, size, "border")
    targets = targets or [target, target]
    return BoxViews(images, preprocessing, augmentation, targets, augmentation.n_views)


@pytest.mark.parametrize(
    "augment, size, n_views",
    [
        ("flip", SIZE, 2),
        ("dihedral", SIZE, 4),
        ("dihedral", (64, 64), 8),
        ("auto", SIZE, 4),
        (v2.RandomAffine(0, (0.1, 0.1), (0.9, 1.1)), SIZE, 4),
        (v2.RandomHorizontalFlip(1.0), SIZE, 4),
    ],
)
def test_boxes_move_with_the_picture(augment, size, n_views):
    views = views_of(augment, size)
    assert views.n_views == n_views and len(views) == 2 * n_views
    targets = views.find_targets(2)
    assert len(targets) == len(views)
    drawn = [views.draw(scene(size)[0], 0, seed) for seed in range(12)]
    shown = [(views.load(i), targets[i]) for i in range(len(views))]
    for image, target in [*shown, *drawn]:
        assert type(image) is type(target["boxes"]) is torch.Tensor
        assert image.dtype == torch.uint8 and target["labels"].tolist() == [7]
        np.testing.assert_allclose(target["boxes"][0], bright(image), atol=1.5)
    assert targets[0]["boxes"].tolist() == [BOX]  # the image itself comes first


def test_what_leaves_the_picture_is_dropped():
    def shift(image, target):
        moved = target["boxes"] + torch.tensor([40.0, 0, 40, 0])
        return torch.roll(image, 40, 2), {**target, "boxes": moved}

    image, target = scene()
    target = {
        "boxes": torch.tensor([BOX, [20, 5, 40, 14], [24, 5, 40, 14]], dtype=torch.float32),
        "labels": torch.tensor([7, 8, 9]),
    }
    augmentation = BoxAugmentation(shift, 2, SIZE)
    _, moved = augmentation.view_with_boxes(image, target, 1, b"any")
    assert moved["labels"].tolist() == [7, 8]  # the last begins where the picture ends
    assert moved["boxes"].tolist() == [[50, 5, 64, 14], [60, 5, 64, 14]]
    assert target["boxes"][0].tolist() == BOX  # those that came are as they were


def test_random_views_of_other_boxes_are_others():
    _, target = scene()
    other = {**target, "boxes": target["boxes"] + 1}
    for augment, are_equal in [("auto", False), ("flip", True)]:
        here, there = views_of(augment), views_of(augment, targets=[other, other])
        assert here.digest(0) == there.digest(0)  # the image itself
        assert (here.digest(1) == there.digest(1)) is are_equal
