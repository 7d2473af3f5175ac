"""Passes over images to what a network has at its cuts, through the memory."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from sktransfer._bars import tqdm
from sktransfer._engine.augmentation import Augmentation, Views
from sktransfer._engine.layers import columns_of, free_rows
from sktransfer._engine.program import (
    ACTIVATION,
    Block,
    OfBlock,
    Output,
    Program,
    as_block,
)
from sktransfer._engine.results import Names
from sktransfer._engine.runner import Runner
from sktransfer._engine.stream import Images, Stream
from sktransfer.io import ImageSequence
from sktransfer.transforms import Preprocessing

_MUCH = 1e9  # bytes, of which a user is told before they are written
_VIEWS_BYTES = 2**28  # of rows of views that are held at once
_ASKED = 8  # images that are looked up to find how many are in the memory


class OutputsPass(Stream):
    """One pass over images to outputs of a network.

    Parameters
    ----------
    runner : Runner
    preprocessing : Preprocessing
    wanted : sequence of Output
        What is asked for.
    kept : collection of Output
        What the memory is to keep, also of what is only passed on the way to what is asked for.
    **options
        See `Stream`.
    """

    runner: Runner

    def __init__(
        self,
        runner: Runner,
        preprocessing: Preprocessing,
        wanted: Sequence[Output],
        kept: Collection[Output],
        **options: Any,
    ) -> None:
        super().__init__(runner, preprocessing.size, **options)
        self.preprocessing, self.wanted = preprocessing, list(wanted)
        self.kept = set() if self.memory is None else set(kept)
        by_products = sorted(self.kept - set(wanted), key=str)
        self.outputs = [*self.wanted, *by_products]
        # In one order, whatever is wanted: a fit and a prediction then have one program.
        self._in_order = sorted(set(self.outputs), key=str)
        self._program: Program | None = None
        self.n_expected = 0  # images of several calls, if they are more than those of one

    def fill(self, images: Images, outs: Sequence[np.ndarray]) -> None:
        """Fill an array for each wanted output, with a row for each image."""
        self._fill_outs(images, outs)

    def names(self) -> Names:
        """Name the outputs in the memory, once it is settled what computes them."""
        if self.runner.names_its_runtime:
            self._ensure_ready()
        keys = {output: self.runner.key(*output, self.preprocessing) for output in self.outputs}
        return Names(
            [keys[output] for output in self.wanted],
            [keys[output] for output in self.outputs[len(self.wanted) :]],
            {keys[output] for output in self.kept},
            self.runner.claim_key(self.preprocessing),
            {keys[output]: self._text(output) for output in self.kept},
        )

    def _text(self, output: Output) -> str:
        """Name an output for those who look into the memory: network, size, layer and form."""
        width, height = self.preprocessing.size[::-1]
        layer = self.runner.layer_name(output.position)
        layer = "embedding" if layer == "auto" else layer
        return "\t".join([self.runner.name, f"{width}×{height}", layer, output.form])

    def _tell_size(self) -> None:
        """Warn if much is about to be written; a few images tell how many are in the memory."""
        memory, n = self.memory, max(self.n_expected, len(self._images))
        n_bytes = sum(self._n_bytes(output) for output in self.kept)
        if memory is None or n * n_bytes <= _MUCH:
            return
        rows = np.unique(np.linspace(0, len(self._images) - 1, _ASKED).astype(int)).tolist()
        try:
            digests = [self._images.digest(row) for row in rows]
        except ValueError:
            return  # an image can't be read: that is said when its turn comes
        outs = [np.empty((len(rows), *out.shape[1:]), out.dtype) for out in self._outs]
        pairs = zip(self._names.wanted, outs, strict=True)
        hits = np.logical_and.reduce([memory.read(key, digests, out) for key, out in pairs])
        if (expected := n * n_bytes * (1 - hits.mean())) > _MUCH:
            memory.tell_size(
                f"are about to take {expected / 1e9:.1f} GB: {n_bytes / 1e3:,.0f} KB for each of "
                f"{n:,} images. Without memory (--memory) nothing is kept; `sktransfer cache` "
                "shows and frees what is."
            )

    def _n_bytes(self, output: Output) -> int:
        """Return the bytes of an image's result."""
        if output.form == ACTIVATION:
            return 2 * math.prod(self.runner.shape(output.position, self.preprocessing.size))
        return 4 * self.runner.width(*output, self.preprocessing.size)

    def _get_ready(self) -> None:
        self._program = self.runner.program(
            self._in_order,
            self.preprocessing,
            self._is_alone(),
            max(self.n_expected, len(self._images)),
            None if self.memory is None else self.memory.companions,
            bool(self.verbose),
        )
        self.in_threads = self._program.runs_in_threads

    def _is_alone(self) -> bool:
        """Tell whether all cores are to run one image."""
        return False

    def _load(self, row: int, digest: bytes | None) -> torch.Tensor:
        return self._images.load(row, digest)  # a view has the network's size already

    def _load_several(self, rows: Sequence[int], digests: Sequence[bytes | None]) -> list[Any]:
        loaded = super()._load_several(rows, digests)
        images = [image for image in loaded if not isinstance(image, Exception)]
        if self.runner.device.type != "cuda" or not images:
            return loaded
        of_block = iter(as_block(images, self.runner.device).split())
        return [image if isinstance(image, Exception) else next(of_block) for image in loaded]

    def _run(self, loaded: list[torch.Tensor | OfBlock]) -> list[Any]:
        assert self._program is not None
        results = dict(zip(self._in_order, self._program(loaded, self.step), strict=True))
        return [results[output] for output in self.outputs]


class Rows(OutputsPass):
    """One pass to the pooled rows of a feature extractor, which are concatenated.

    Parameters
    ----------
    runner : Runner
    rows : sequence of Output
    preprocessing : Preprocessing
    **options
        See `Stream`.
    """

    def __init__(
        self,
        runner: Runner,
        rows: Sequence[Output],
        preprocessing: Preprocessing,
        **options: Any,
    ) -> None:
        self.columns = columns_of(runner, rows, preprocessing.size)
        kept = [*rows, *free_rows(runner, rows, preprocessing.size)]
        super().__init__(runner, preprocessing, rows, kept, **options)

    @abstractmethod
    def __call__(self, images: ImageSequence) -> np.ndarray:
        """Return a row for each image, float32 of shape (n, width)."""

    def fill_rows(self, images: Images) -> np.ndarray:
        """Return a row for each of what is run, float32 of shape (n, width)."""
        rows = np.empty((len(images), self.columns[-1].stop), np.float32)
        self.fill(images, [rows[:, columns] for columns in self.columns])
        return rows


class Embedding(Rows):
    """The rows of images, exactly as the network has them."""

    _images: ImageSequence

    def __call__(self, images: ImageSequence) -> np.ndarray:
        return self.fill_rows(images)

    def _is_alone(self) -> bool:
        return len(self._images) == 1

    def _load(self, row: int, digest: bytes | None) -> torch.Tensor:
        # The file is read again: those that wait to be decoded would fill the memory.
        return self._images.load(row, digest, self.preprocessing.fit_size)  # (3, *size)

    def _load_several(self, rows: Sequence[int], digests: Sequence[bytes | None]) -> list[Any]:
        block = self._images.block(rows, digests)
        if block is None:
            return super()._load_several(rows, digests)
        upright = self.preprocessing.fit_size(block).permute(0, 2, 3, 1)
        return Block([upright], self.runner.device).split()


class MeanEmbedding(Rows):
    """The rows of images, each the mean over its views.

    Each view is an entry of the memory, which a fine-tuned network with these views shares.

    Parameters
    ----------
    augmentation : Augmentation
    *args, **options
        See `Rows`.
    """

    unit = "view"

    def __init__(self, augmentation: Augmentation, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.augmentation = augmentation

    def __call__(self, images: ImageSequence) -> np.ndarray:
        views = Views(images, self.preprocessing, self.augmentation)
        self.n_expected = len(views)
        width, n = self.columns[-1].stop, views.n_views
        rows = np.empty((len(images), width), np.float32)
        step = max(1, int(_VIEWS_BYTES / (4 * width * n)))
        with tqdm(
            total=len(views), unit=self.unit, desc=self.runner.name, disable=not self.verbose
        ) as self.shared_bar:
            for start in range(0, len(images), step):
                part = slice(start, start + step)
                rows[part] = self.fill_rows(views[part]).reshape(-1, n, width).mean(1)
        return rows
