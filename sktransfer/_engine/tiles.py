"""Tiles: random crops of a picture, changed as far as its kind allows, for learning from pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import xxhash
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sktransfer._engine.augmentation import Augmentation, OfAnyChannels, Views, check_bytes, seeded
from sktransfer._torch_state import cpu_by_default
from sktransfer.io import ImageSequence
from sktransfer.models._weights import Describer
from sktransfer.transforms import Preprocessing

TILES = ("auto", "dihedral")

_ROOM = 2  # a picture is kept at so many times the size of a tile, which so is not blurred
_FIXED = 4  # tiles of a picture that frozen blocks run on
_BLURRED = 32  # pixels of the side from which on a tile may be blurred: small ones are blurred now
_SHADES = 0.2  # brightness and contrast of grey pictures, which are all that they have
_VERSION = 2  # of what "auto" and "dihedral" do


class Tiles(Augmentation):
    """What `augment` stands for, on uint8 pictures (c, height, width) with room for crops.

    Parameters
    ----------
    augment : {"auto", "dihedral"} or callable
        See `ContrastivePretrainer`.
    n_views : int or None
        Fixed tiles of each picture; None for 4.
    size : tuple of (int, int)
        Of a tile.
    crop_scale : tuple of (float, float)
        Least and greatest share of the picture's area that a tile shows.
    """

    starts_with_image = False

    def __init__(
        self,
        augment: str | Callable[[torch.Tensor], torch.Tensor],
        n_views: int | None,
        size: tuple[int, int],
        crop_scale: tuple[float, float],
    ) -> None:
        self.size, self.n_views = size, n_views or _FIXED
        self._symmetry: Augmentation | None = None
        if isinstance(augment, str):
            self._transform = _Crop(size, crop_scale)
            self._symmetry = Augmentation("flip" if augment == "auto" else augment, None, size)
            self._name = f"tiles {_VERSION} {augment} {size} {crop_scale}"
        else:
            self._transform = augment
            self._name = f"tiles {_VERSION} {Describer()(augment)} {size}"

    def view(self, image: torch.Tensor, number: int, digest: bytes) -> torch.Tensor:
        """Return fixed tile `number` of a picture; `digest` and number are its seed."""
        return self.draw(image, xxhash.xxh3_64_intdigest(digest, seed=number))

    def digest(self, number: int, digest: bytes) -> bytes:
        """Return the digest of a fixed tile of the picture with this digest."""
        return xxhash.xxh3_128_digest(digest + f"{self._name} {number}".encode())

    def draw(self, image: torch.Tensor, seed: int) -> torch.Tensor:
        """Return a random tile, uint8 (c, *size)."""
        assert self._transform is not None
        tile = seeded(self._transform, image, seed)
        if not isinstance(tile, torch.Tensor) or tile.ndim != 3 or len(tile) != len(image):
            came = f"a tensor {tuple(tile.shape)}" if hasattr(tile, "shape") else type(tile)
            raise ValueError(
                f"augment must return a tensor ({len(image)}, height, width) of any size; of one "
                f"{tuple(image.shape)} it returned {came}."
            )
        check_bytes(tile)
        if tile.shape[1:] != self.size:
            tile = F.resize(tile, list(self.size), antialias=True)
        return tile if self._symmetry is None else self._symmetry.draw(tile, seed)


class _Crop:
    """Crop, change colours, blur: as in SimCLR, where the picture's kind allows it.

    Of grey pictures, X-rays for one, shades and fine texture are all there is to see: the former
    are changed by half as much as colours are, and the latter is not blurred. So it is with
    channels that are no colours, which are changed alike.
    """

    def __init__(self, size: tuple[int, int], crop_scale: tuple[float, float]) -> None:
        with cpu_by_default():  # it keeps a tensor
            self.crop = v2.RandomResizedCrop(size, scale=crop_scale, antialias=True)
        colours = v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
        self.colours = v2.Compose([v2.RandomApply([colours], 0.8), v2.RandomGrayscale(0.2)])
        self.shades = OfAnyChannels(v2.RandomApply([v2.ColorJitter(_SHADES, _SHADES)], 0.8))
        kernel = min(size) // 10 // 2 * 2 + 1
        blur = v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], 0.5)
        self.blur = blur if min(size) >= _BLURRED else v2.Identity()

    def __call__(self, picture: torch.Tensor) -> torch.Tensor:
        tile = self.crop(picture)
        if len(picture) != 3 or _is_grey(picture):
            return self.shades(tile)
        return self.blur(self.colours(tile))


def _is_grey(picture: torch.Tensor) -> bool:
    return torch.equal(picture[0], picture[1]) and torch.equal(picture[1], picture[2])


class TileViews(Views):
    """Fixed tiles of pictures, or of frames: those of half a clip are cut and changed alike.

    Parameters
    ----------
    images : ImageSequence
        Pictures; or frames, those of a clip one behind the other.
    preprocessing : Preprocessing
        Of the network.
    tiles : Tiles
    n_views : int
    n_together : int, default=1
        Frames that are cut alike.
    """

    def __init__(
        self,
        images: ImageSequence,
        preprocessing: Preprocessing,
        tiles: Tiles,
        n_views: int,
        n_together: int = 1,
    ) -> None:
        height, width = preprocessing.size
        roomy = preprocessing.with_size((_ROOM * height, _ROOM * width))
        super().__init__(images, roomy, tiles, n_views)
        self.n_together = n_together

    def digest(self, i: int) -> bytes:
        """Return the digest of number `i`: of its frame, its tile, and those that are cut alike."""
        of_tile = super().digest(i)
        if self.n_together == 1:
            return of_tile
        return xxhash.xxh3_128_digest(of_tile + self.chance(i // self.n_views))

    def chance(self, number: int) -> bytes:
        """Return what stands for a picture, or for the half of a clip, in seeds."""
        first = number // self.n_together * self.n_together
        return b"".join(self.images.digest(first + i) for i in range(self.n_together))

    def __getitem__(self, numbers: Any) -> Views:
        raise NotImplementedError("tiles are for training only")
