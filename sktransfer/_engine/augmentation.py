"""Views of an image: a fixed, numbered set of them, or a fresh one at every draw."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import xxhash
from torchvision import tv_tensors
from torchvision.transforms import v2

from sktransfer._torch_state import Chance, chance_lock, cpu_by_default, network_lock
from sktransfer.io import ImageSequence
from sktransfer.models._weights import Describer
from sktransfer.transforms import Preprocessing

AUGMENTATIONS = ("flip", "dihedral", "auto")

_RANDOM_VIEWS = 4  # of an augmentation that could give any number of them
_KEPT = 64  # images whose pixels wait for their next view
# Rotations by so many quarter turns, then a reflection or none; the first views are the mildest.
_SYMMETRIES = {
    "none": [(0, False)],
    "flip": [(0, False), (0, True)],
    "dihedral": [(0, False), (0, True), (2, False), (2, True)]
    + [(1, False), (1, True), (3, False), (3, True)],
}


class OfAnyChannels:
    """Calls a transform of pictures on images of any channels: each is changed as a grey picture.

    All of them are changed alike, but for what depends on their pixels, such as a contrast. What
    colours have besides, saturation and hue, other channels have not.
    """

    def __init__(self, transform: Callable[..., Any]) -> None:
        self.transform = transform

    def __call__(self, image: torch.Tensor, *others: Any) -> Any:
        if len(image) in (1, 3):
            return self.transform(image, *others)
        channels = image.unsqueeze(1)  # (c, 1, height, width)
        channels = tv_tensors.wrap(channels, like=image) if others else channels
        changed = self.transform(channels, *others)
        if not others:
            return changed.squeeze(1)
        return (changed[0].squeeze(1), *changed[1:])


class Augmentation:
    """What `augment` stands for, on uint8 images (c, height, width) of the network's size.

    `starts_with_image` says whether the first fixed view is the image itself.

    Parameters
    ----------
    augment : None, {"flip", "dihedral", "auto"} or callable
        See `FineTunedClassifier`.
    n_views : int or None
        Fixed views of each image, the image itself being the first; None for all symmetries, or
        4 of a random augmentation.
    size : tuple of (int, int)
        Of the images; "dihedral" has quarter turns only of square ones.
    """

    starts_with_image = True

    def __init__(
        self,
        augment: str | Callable[[torch.Tensor], torch.Tensor] | None,
        n_views: int | None,
        size: tuple[int, int],
    ) -> None:
        self.symmetries: list[tuple[int, bool]] = []
        self._transform: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._name = augment if isinstance(augment, str) else "none"
        if augment is None or augment in ("flip", "dihedral"):
            turns = (0, 1, 2, 3) if size[0] == size[1] else (0, 2)
            self.symmetries = [s for s in _SYMMETRIES[self._name] if s[0] in turns]
        elif augment == "auto":
            both = [v2.RandomHorizontalFlip(), v2.TrivialAugmentWide()]
            self._transform = OfAnyChannels(v2.Compose(both))
        else:
            assert not isinstance(augment, str)
            self._transform = augment
            self._name = Describer()(augment)
        most = len(self.symmetries)
        if n_views is not None and most and n_views > most:
            raise ValueError(
                f"n_views={n_views}, but augment={augment!r} has {most} views of an image of "
                f"{size[0]} × {size[1]} pixels. Leave n_views=None for all of them."
            )
        self.n_views = n_views or most or _RANDOM_VIEWS

    def view(self, image: torch.Tensor, number: int, digest: bytes) -> torch.Tensor:
        """Return fixed view `number` of an image with this digest; view 0 is the image."""
        if number == 0:
            return image
        if self._transform is None:
            return _symmetric(image, *self.symmetries[number])
        return self._random(image, xxhash.xxh3_64_intdigest(digest, seed=number))

    def digest(self, number: int, digest: bytes) -> bytes:
        """Return the digest of a fixed view of the image with this digest."""
        if number == 0:
            return digest
        if self._transform is None:  # equal views of different augmentations are one entry
            return xxhash.xxh3_128_digest(digest + repr(self.symmetries[number]).encode())
        return xxhash.xxh3_128_digest(digest + f"{self._name} {number}".encode())

    def draw(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """Return a random view."""
        if self._transform is not None:
            return self._random(image, seed)
        digest = xxhash.xxh3_64_intdigest(seed.to_bytes(8, "little"))
        return _symmetric(image, *self.symmetries[digest % len(self.symmetries)])

    def _random(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        assert self._transform is not None
        view = seeded(self._transform, image, seed)
        if not isinstance(view, torch.Tensor) or view.shape != image.shape:
            came = f"a tensor {tuple(view.shape)}" if hasattr(view, "shape") else type(view)
            raise ValueError(
                f"augment must return a tensor of the shape that it gets, {tuple(image.shape)}; "
                f"it returned {came}. End it with torchvision's v2.Resize({image.shape[1:]})."
            )
        return check_bytes(view)


def seeded(
    transform: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, seed: int
) -> torch.Tensor:
    """Call a random transform of one image with a seed of its own."""
    with chance_lock, network_lock.shared(), Chance(seed).in_torch(), cpu_by_default():
        return transform(image)


def check_bytes(view: torch.Tensor) -> torch.Tensor:
    """Return a view, if it is one of 8 bits."""
    if view.dtype != torch.uint8:
        raise ValueError(
            f"augment must return uint8 in 0 to 255, as it gets; it returned {view.dtype}. "
            "Leave v2.ToDtype and v2.Normalize out: the images are normalised afterwards."
        )
    return view


def _symmetric(image: torch.Tensor, quarter_turns: int, is_flipped: bool) -> torch.Tensor:
    turned = torch.rot90(image, quarter_turns, (1, 2))
    return (turned.flip(2) if is_flipped else turned).contiguous()


def fixed_views(augmentation: Augmentation, batch: torch.Tensor) -> list[torch.Tensor]:
    """Return the fixed views of a batch (n, c, h, w), of an augmentation by symmetries."""
    turned = []
    for quarter_turns, is_flipped in augmentation.symmetries[: augmentation.n_views]:
        view = torch.rot90(batch, quarter_turns, (2, 3))
        turned.append(view.flip(3) if is_flipped else view)
    return turned


class Views:
    """Images brought to the network's size, each in all its fixed views, one behind the other.

    Number ``i * n + v`` is view `v` of image `i`, with `n` views an image.

    Parameters
    ----------
    images : ImageSequence
    preprocessing : Preprocessing
    augmentation : Augmentation
    n_views : int, default=augmentation.n_views
    """

    def __init__(
        self,
        images: ImageSequence,
        preprocessing: Preprocessing,
        augmentation: Augmentation,
        n_views: int | None = None,
    ) -> None:
        self.images, self.preprocessing, self.augmentation = images, preprocessing, augmentation
        self.n_views = augmentation.n_views if n_views is None else n_views
        self._fitted: OrderedDict[int, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self.images) * self.n_views

    def digest(self, i: int) -> bytes:
        """Return the digest of number `i`, of image and view."""
        number, view = divmod(i, self.n_views)
        return self.augmentation.digest(view, self.images.digest(number))

    def load(self, i: int, digest: bytes | None = None) -> torch.Tensor:
        """Return number `i`, uint8 (c, *size); see `ImageSequence.load`."""
        number, view = divmod(i, self.n_views)
        is_image = view == 0 and self.augmentation.starts_with_image
        base = self.images.digest(number) if digest is not None or not is_image else None
        fitted = self._fitted.pop(number, None)
        if fitted is None:
            fitted = self.images.load(number, base, self.preprocessing.fit_size)
        if view < self.n_views - 1:  # the next view will ask for it
            self._fitted[number] = fitted
            while len(self._fitted) > _KEPT:
                self._fitted.popitem(last=False)
        return self.show(fitted, number, view)

    def where(self, i: int) -> str:
        """Return the row of number `i`, and its file."""
        return self.images.where(i // self.n_views)

    def show(self, fitted: torch.Tensor, number: int, view: int) -> torch.Tensor:
        """Return a view of image `number`, which was brought to the size of the preprocessing."""
        is_image = view == 0 and self.augmentation.starts_with_image
        return self.augmentation.view(fitted, view, b"" if is_image else self.chance(number))

    def chance(self, number: int) -> bytes:
        """Return what stands for image `number` in the seeds of its views."""
        return self.images.digest(number)

    def __getitem__(self, numbers: Any) -> Views:
        """Return the views of some of the images."""
        return Views(self.images[numbers], self.preprocessing, self.augmentation, self.n_views)
