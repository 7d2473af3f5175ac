"""Clips: sequences of frames, as one sequence of images that knows which frame is whose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sktransfer.io import ImageSequence, check_images
from sktransfer.io._decoding import kind_of

_FRAMES = ("a path", "encoded bytes", "a PIL image")


class Frames(ImageSequence):
    """The frames of clips, one clip behind the other; `check_clips` makes it.

    Parameters
    ----------
    items : sequence of images
    lengths : ndarray of int, shape (n_clips,)
        Frames of each clip.
    """

    def __init__(
        self,
        items: Any,
        lengths: np.ndarray,
        rows: np.ndarray | None = None,
        digests: dict[Any, bytes] | None = None,
    ) -> None:
        super().__init__(items, rows, digests)
        self.lengths = lengths
        self._starts = np.cumsum(lengths) - lengths

    def __getitem__(self, indices: Any) -> Frames:
        """Return some of the frames; errors keep the numbers of clip and frame."""
        rows = np.atleast_1d(self._rows[indices])
        return Frames(self._items, self.lengths, rows, self._digests)

    def where(self, i: int) -> str:
        """Return the words by which an error calls a frame: its clip, its number, its file."""
        row = int(self._rows[i])
        clip = int(np.searchsorted(self._starts, row, side="right")) - 1
        _, _, file = super().where(i).partition(" (")
        return f"row {clip}, frame {row - self._starts[clip]}" + (f" ({file}" if file else "")

    def halves(self) -> tuple[Frames, int]:
        """Return the first and the last half of each clip, and the frames of both together.

        The middle frame of an odd number is left out.

        Raises
        ------
        ValueError
            For a clip of fewer than two frames, or of another length than the first.
        """
        for row, length in enumerate(self.lengths.tolist()):
            if length < 2:
                raise ValueError(
                    f"row {row} is a clip of {length} frame{'s' * (length != 1)}, but A and B are "
                    "the two halves of a clip: pass at least 2 frames, or single images as X."
                )
            if length != self.lengths[0]:
                raise ValueError(
                    f"row {row} is a clip of {length} frames, but row 0 has {self.lengths[0]}: cut "
                    f"all clips to one length, {self.lengths.min()} for the shortest."
                )
        length = int(self.lengths[0])
        kept = np.delete(np.arange(length), length // 2) if length % 2 else np.arange(length)
        return self[(self._starts[:, None] + kept).ravel()], len(kept)

    def means(self, rows: np.ndarray) -> np.ndarray:
        """Average the rows of all frames (n_frames, d) over each clip: (n_clips, d)."""
        sums = np.add.reduceat(rows, self._starts, axis=0, dtype=np.float64)
        return (sums / self.lengths[:, None]).astype(rows.dtype)


def is_clips(X: Any) -> bool:
    """Tell whether `X` is a sequence of clips, rather than one of images."""
    if isinstance(X, (np.ndarray, torch.Tensor)) and X.ndim == 5:
        return True
    if isinstance(X, np.ndarray) and X.dtype.kind in "OSUT" and X.ndim == 2 and X.shape[1] > 1:
        return _is_clip(X[0])
    is_sequence = isinstance(X, (list, tuple)) or (isinstance(X, np.ndarray) and X.ndim == 1)
    return is_sequence and len(X) > 0 and _is_clip(X[0])


def _is_clip(item: Any) -> bool:
    if isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 4:
        return True
    if not isinstance(item, (list, tuple, np.ndarray)) or getattr(item, "ndim", 1) != 1:
        return False
    if len(item) == 0:
        return True  # of no frames, which is said then
    return kind_of(item[0]) in _FRAMES or getattr(item[0], "ndim", 0) >= 2


def check_clips(X: Any) -> Frames:
    """Wrap clips as their frames, which are read when they are needed.

    Parameters
    ----------
    X : sequence of clips
        Each a sequence of frames: paths, encoded bytes, PIL images, arrays or tensors; an array
        (n_frames, height, width, channels) or a tensor (n_frames, channels, height, width). Or one
        array or tensor of all, with one axis more.

    Raises
    ------
    TypeError, ValueError
        For a row that is no clip, or has no frames.

    Examples
    --------
    >>> import numpy as np
    >>> from sktransfer.io._clips import check_clips
    >>> frames = check_clips(np.zeros((2, 4, 8, 8, 3), np.uint8))
    >>> len(frames), frames.lengths, frames.where(5)
    (8, array([4, 4]), 'row 1, frame 1')
    """
    for row, clip in enumerate(X):
        if not _is_clip(clip):
            raise TypeError(f"row {row} is {kind_of(clip)}, but row 0 is a clip: pass one kind.")
        if len(clip) == 0:
            raise ValueError(f"row {row} is a clip of 0 frames: drop it, or add its frames.")
    if isinstance(X, (np.ndarray, torch.Tensor)) and X.ndim == 5:
        flat: Sequence[Any] | Any = X.reshape(-1, *X.shape[2:])
    else:
        flat = [frame for clip in X for frame in clip]
    return Frames(check_images(flat)._items, np.array([len(clip) for clip in X]))
