"""Views of images with boxes in them: where the picture moves, its boxes move along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import xxhash
from torchvision import tv_tensors
from torchvision.transforms import v2

from sktransfer._engine.augmentation import Augmentation, OfAnyChannels, Views, check_bytes, seeded
from sktransfer.io import ImageSequence
from sktransfer.transforms import Preprocessing

_COLOURS = (0.4, 0.4, 0.4, 0.1)  # by how much "auto" changes brightness, contrast, saturation, hue
_VERSION = 1  # of what "auto" does, and of how a transform is called

# Of an image: `boxes`, float32 (k, 4), x1, y1, x2, y2 in its pixels, and `labels`, int64 (k,).
Target = dict[str, torch.Tensor]


class BoxAugmentation(Augmentation):
    """What `augment` stands for, on uint8 images (c, height, width) and the boxes in them.

    Parameters
    ----------
    augment, n_views, size
        As of `Augmentation`. But "auto" changes colours in the place of what
        `TrivialAugmentWide` does, which boxes can't follow; and a callable gets an image and a
        target, and returns both.
    """

    def __init__(
        self,
        augment: str | Callable[..., Any] | None,
        n_views: int | None,
        size: tuple[int, int],
    ) -> None:
        super().__init__(augment, n_views, size)
        self.size = size
        self.is_random = self._transform is not None
        if augment == "auto":
            both = [v2.RandomHorizontalFlip(), v2.ColorJitter(*_COLOURS)]
            self._transform = OfAnyChannels(v2.Compose(both))
        if self.is_random:  # other views than a classifier's, under other names in the memory
            self._name = f"boxes {_VERSION} {self._name}"

    def view_with_boxes(
        self, image: torch.Tensor, target: Target, number: int, digest: bytes
    ) -> tuple[torch.Tensor, Target]:
        """Return fixed view `number` of an image with this digest, and its boxes there."""
        if number == 0:
            return image, target
        if self.is_random:
            return self._changed(image, target, xxhash.xxh3_64_intdigest(digest, seed=number))
        return self.view(image, number, digest), self.moved_target(target, number)

    def moved_target(self, target: Target, number: int) -> Target:
        """Return where the boxes of an image lie in its fixed view `number`, one by symmetry."""
        turns, is_flipped = self.symmetries[number]
        return {**target, "boxes": move_boxes(target["boxes"], self.size, turns, is_flipped)}

    def draw_with_boxes(
        self, image: torch.Tensor, target: Target, seed: int
    ) -> tuple[torch.Tensor, Target]:
        """Return a random view of an image, and its boxes there."""
        if self.is_random:
            return self._changed(image, target, seed)
        chance = xxhash.xxh3_64_intdigest(seed.to_bytes(8, "little"))
        return self.view_with_boxes(image, target, chance % len(self.symmetries), b"")

    def _changed(
        self, image: torch.Tensor, target: Target, seed: int
    ) -> tuple[torch.Tensor, Target]:
        """Call the random transform; what is left of no box is dropped."""
        boxes: Any = tv_tensors.BoundingBoxes(
            target["boxes"].clone(), format="XYXY", canvas_size=self.size
        )
        given = tv_tensors.Image(image), {"boxes": boxes, "labels": target["labels"]}
        view, moved = self._checked(image, seeded(self._call, given, seed))  # type: ignore[arg-type]
        boxes = torch.as_tensor(moved["boxes"]).as_subclass(torch.Tensor).float().clone()
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, self.size[1])
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, self.size[0])
        is_left = (boxes[:, 2:] > boxes[:, :2]).all(1)
        labels = torch.as_tensor(moved["labels"])[is_left]
        return view, {"boxes": boxes[is_left], "labels": labels}

    def _call(self, given: tuple[torch.Tensor, Target]) -> Any:
        assert self._transform is not None
        transform: Callable[..., Any] = self._transform
        try:
            return transform(*given)
        except TypeError as error:
            raise TypeError(
                f"augment could not be called with an image and a dict of its boxes and labels "
                f"({error}). Pass 'flip', 'dihedral', 'auto', transforms of "
                "torchvision.transforms.v2 that take boxes, or a function of both that returns "
                "both."
            ) from error

    def _checked(
        self, image: torch.Tensor, returned: Any
    ) -> tuple[torch.Tensor, Mapping[str, Any]]:
        """Return what a transform returned, if it is an image and boxes with their labels."""
        is_pair = isinstance(returned, tuple) and len(returned) == 2
        if (
            not is_pair
            or not isinstance(returned[1], Mapping)
            or not {"boxes", "labels"} <= {*returned[1]}
        ):
            raise ValueError(
                "augment must return what it gets, an image and a dict of `boxes` and `labels`; "
                f"it returned {type(returned).__name__}."
            )
        view, moved = returned
        if not isinstance(view, torch.Tensor) or view.shape != image.shape:
            came = f"a tensor {tuple(view.shape)}" if hasattr(view, "shape") else type(view)
            raise ValueError(
                f"augment must return an image of the shape that it gets, {tuple(image.shape)}; it "
                f"returned {came}. End it with torchvision's v2.Resize({self.size})."
            )
        shapes = tuple(moved["boxes"].shape), (len(moved["labels"]), 4)
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"augment must return a label for each box; it returned boxes of shape {shapes[0]} "
                f"and {shapes[1][0]} labels."
            )
        return check_bytes(view.as_subclass(torch.Tensor)), moved


def move_boxes(
    boxes: torch.Tensor, size: tuple[int, int], quarter_turns: int, is_flipped: bool
) -> torch.Tensor:
    """Return boxes (k, 4) of an image that is turned, as by `torch.rot90`, and then mirrored."""
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(1)
    for _ in range(quarter_turns):
        x1, y1, x2, y2 = y1, width - x2, y2, width - x1
        height, width = width, height
    if is_flipped:
        x1, x2 = width - x2, width - x1
    return torch.stack([x1, y1, x2, y2], 1)


class BoxViews(Views):
    """Images brought to the network's size, each in all its fixed views, with their boxes.

    Parameters
    ----------
    images : ImageSequence
    preprocessing : Preprocessing
    augmentation : BoxAugmentation
    targets : list of dict
        Of each image, in the network's input.
    n_views : int
    """

    augmentation: BoxAugmentation

    def __init__(
        self,
        images: ImageSequence,
        preprocessing: Preprocessing,
        augmentation: BoxAugmentation,
        targets: list[Target],
        n_views: int,
    ) -> None:
        super().__init__(images, preprocessing, augmentation, n_views)
        self.targets = targets

    def digest(self, i: int) -> bytes:
        """Return the digest of number `i`; a random transform may look at the boxes as well."""
        number, view = divmod(i, self.n_views)
        of_pixels = super().digest(i)
        if view == 0 or not self.augmentation.is_random:
            return of_pixels
        target = self.targets[number]
        return xxhash.xxh3_128_digest(
            of_pixels + target["boxes"].numpy().tobytes() + target["labels"].numpy().tobytes()
        )

    def show(self, fitted: torch.Tensor, number: int, view: int) -> torch.Tensor:
        """Return a view of image `number`, which was brought to the size of the preprocessing."""
        return self.with_boxes(fitted, number, view)[0]

    def with_boxes(
        self, fitted: torch.Tensor, number: int, view: int
    ) -> tuple[torch.Tensor, Target]:
        """Return a view of image `number`, and its boxes there."""
        chance = self.chance(number) if view else b""
        return self.augmentation.view_with_boxes(fitted, self.targets[number], view, chance)

    def draw(self, fitted: torch.Tensor, number: int, seed: int) -> tuple[torch.Tensor, Target]:
        """Return a fresh view of image `number`, and its boxes there."""
        return self.augmentation.draw_with_boxes(fitted, self.targets[number], seed)

    def find_targets(self, n_threads: int) -> list[Target]:
        """Return the boxes and labels of all views: of numbers 0, 1, ... of this."""
        if self.n_views == 1:
            return self.targets
        with ThreadPoolExecutor(n_threads) as threads:
            each = threads.map(self._targets_of, range(len(self.images)))
            return [target for targets in each for target in targets]

    def _targets_of(self, number: int) -> list[Target]:
        views = range(self.n_views)
        if not self.augmentation.is_random:
            target = self.targets[number]
            return [self.augmentation.moved_target(target, view) for view in views]
        fitted = self.images.load(number, None, self.preprocessing.fit_size)
        return [self.with_boxes(fitted, number, view)[1] for view in views]

    def __getitem__(self, numbers: Any) -> Views:
        raise NotImplementedError("views with boxes are for training only")
