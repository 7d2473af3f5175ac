"""What `unfreeze` stands for: the blocks that are trained, and the cut in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sktransfer._engine.device import INT8
from sktransfer._engine.runner import Runner
from sktransfer.models._blocks import blocks_named


@dataclass(frozen=True)
class Unfrozen:
    """Where the trained part of a network begins, and which of its blocks are trained.

    Attributes
    ----------
    cut : int
        The position in front of the first trained block. It is that of the embedding where the
        head alone is trained.
    blocks : frozenset of int
        The numbers of the trained blocks.
    n_blocks : int
        The number of all blocks of the network, 0 if it can't be cut.
    """

    cut: int
    blocks: frozenset[int]
    n_blocks: int

    def trains(self, segment: int) -> bool:
        """Tell whether the slice from position `segment` to the next one is trained.

        What lies behind the last block belongs to it.
        """
        return min(segment, max(self.n_blocks - 1, 0)) in self.blocks


def find_cut(runner: Runner, unfreeze: int | str | Sequence[str]) -> Unfrozen:
    """Find the cut of a network, and the trained blocks, that a value of `unfreeze` stands for.

    Parameters
    ----------
    runner : Runner
    unfreeze : int, str or sequence of str
        As the user passes it: see :class:`sktransfer.FineTunedClassifier`.

    Returns
    -------
    Unfrozen

    Raises
    ------
    ValueError
        If the network has no such blocks, or if some are to be trained in 8 bits.
    TypeError
        If a list holds anything but names.
    """
    names = runner.block_names
    if isinstance(unfreeze, str) and unfreeze != "all":
        runner.trace  # noqa: B018 raises an error that says why a network can't be cut
    reason = "" if runner.can_be_cut else ", as it can't be traced"
    blocks = trained_blocks(unfreeze, names, f"{runner.name!r} has", reason)
    if blocks or unfreeze == "all":
        check_is_trainable(runner.precision)
    return Unfrozen(min(blocks, default=runner.embedding), blocks, len(names))


def check_is_trainable(precision: str) -> None:
    """Raise an error that says what to use, if blocks can't be trained in a precision."""
    if precision == INT8:
        raise ValueError(
            "precision='int8' is for frozen networks: blocks can't be trained in 8 bits. Pass "
            "unfreeze=0, which trains a head on the frozen network, or precision='bfloat16' or "
            "'float32'."
        )


def trained_blocks(
    unfreeze: int | str | Sequence[str], names: Sequence[str], owner: str, why_none: str = ""
) -> frozenset[int]:
    """Return the numbers of the blocks that a value of `unfreeze` stands for.

    Parameters
    ----------
    unfreeze : int, str or sequence of str
    names : sequence of str
        The names of all blocks, in order. Of a network without any, `"all"` is block 0.
    owner : str
        The words in front of the number of blocks in an error, as "'resnet18' has".
    why_none : str, default=""
        What the error says behind "no blocks".
    """
    n_blocks = len(names)
    if isinstance(unfreeze, str):
        start = 0 if unfreeze == "all" else blocks_named(names, unfreeze).start
        return frozenset(range(start, max(1, n_blocks)))
    if isinstance(unfreeze, (list, tuple)):
        if not all(isinstance(item, str) for item in unfreeze):
            raise TypeError(f"unfreeze={unfreeze!r}: a list holds names of blocks, of type str.")
        return frozenset(number for item in unfreeze for number in blocks_named(names, item))
    assert not isinstance(unfreeze, Sequence)
    if isinstance(unfreeze, bool) or not 0 <= unfreeze <= n_blocks:
        remedy = f"no blocks{why_none}. Pass 0 or 'all'."
        if names:
            remedy = (
                f"{n_blocks} blocks: {', '.join(names)}. Pass 0 to {n_blocks}, the name of a "
                "block, a prefix of names, a list of names, or 'all'."
            )
        raise ValueError(f"unfreeze={unfreeze!r}, but {owner} {remedy}")
    return frozenset(range(n_blocks - int(unfreeze), n_blocks))
