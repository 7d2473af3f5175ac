"""What the parameters `layer` and `pooling` stand for: pooled rows at cuts of a network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import numpy as np

from sktransfer._engine.cut_network import POOLINGS, CutNetwork
from sktransfer._engine.program import Output

_LARGEST_ROW = 1 << 19  # values, 2 MB an image: of several layers, which are easily too many
_SAME_RESOLUTION = 1.5  # of numbers of places: convolutions without padding lose a few
_MIDDLE = 4  # pixels to a side of a place, where the middle of a network begins


def rows_of(
    network: CutNetwork, layer: Any, pooling: Any, image_size: tuple[int, int]
) -> list[Output]:
    """Return the rows that `layer` and `pooling` stand for, in order.

    See `PretrainedFeatureExtractor` for what they can be. Each layer has a row for each pooling,
    but a vector, which is not pooled, has one.

    Raises
    ------
    ValueError
        If a layer is unknown, named twice or can't be pooled so, or if there is nothing to do.
    """
    poolings = poolings_of(pooling)
    rows = []
    for position in _positions(network, layer, image_size):
        is_vector = network.layout(position, image_size) == "vector"
        rows += [Output(position, each) for each in (poolings[:1] if is_vector else poolings)]
    _check_widths(network, rows, image_size)
    return rows


def poolings_of(pooling: Any) -> list[str]:
    """Return the poolings that are named, each once."""
    poolings = list(pooling) if isinstance(pooling, (list, tuple)) else [pooling]
    known = ", ".join(map(repr, POOLINGS))
    if not poolings:
        raise ValueError(f"pooling={pooling!r} names no pooling; pass at least one of {known}.")
    for i, each in enumerate(poolings):
        if each not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} holds {each!r}, which is none of {known}.")
        if each in poolings[:i]:
            raise ValueError(f"pooling={pooling!r} names {each!r} twice. Pass it once.")
    return poolings


def columns_of(
    network: CutNetwork, rows: Sequence[Output], image_size: tuple[int, int]
) -> list[slice]:
    """Return where each row lies if they are concatenated."""
    ends = list(accumulate((network.width(*row, image_size) for row in rows), initial=0))
    return [slice(start, end) for start, end in pairwise(ends)]


def row_names(
    network: CutNetwork, rows: Sequence[Output], image_size: tuple[int, int]
) -> list[str]:
    """Name the features of concatenated rows by layer, pooling and number, as `stem_max_7`."""
    names = []
    for row in rows:
        is_vector = network.layout(row.position, image_size) == "vector"
        start = f"{network.layer_name(row.position)}_{'vector' if is_vector else row.form}"
        names += [f"{start}_{i}" for i in range(network.width(*row, image_size))]
    return names


def free_rows(
    network: CutNetwork, rows: Sequence[Output], image_size: tuple[int, int]
) -> list[Output]:
    """Return the rows of the embedding if it costs nothing once the last block has run."""
    end = network.embedding_or_output
    poolings = [row.form for row in rows if end is not None and row.position == end - 1]
    if end is None or not poolings or not network.embeds_without_weights(image_size):
        return []
    return [Output(end, each) for each in poolings if network.can_pool(end, each, image_size)]


def power_normalize(rows: np.ndarray, parts: Sequence[slice]) -> np.ndarray:
    """Replace values by their signed square roots; scale the parts of a row to one length.

    Parameters
    ----------
    rows : ndarray of shape (n, width), float32
        They are overwritten.
    parts : sequence of slice
        The columns of each part. A whole row then has length 1; a part of zeros stays so.

    Returns
    -------
    ndarray
        `rows`.
    """
    for part in parts:
        values = rows[:, part]
        np.copyto(values, np.copysign(np.sqrt(np.abs(values)), values))
        values /= np.linalg.norm(values, axis=1, keepdims=True).clip(np.finfo(np.float32).tiny)
    rows /= np.float32(np.sqrt(len(parts)))
    return rows


# ------------------------------------------------------------------------------ layers


def map_positions(network: CutNetwork, layer: Any, image_size: tuple[int, int]) -> list[int]:
    """Return the positions that `layer` stands for, of activations with places in the image.

    `"middle"` stands for those of `"stages"` with at least 8 × 8 pixels to a place, but for the
    last one. Vectors are left out of what stands for several layers.

    Raises
    ------
    ValueError
        If a named layer has no places.
    """
    is_keyword = isinstance(layer, str) and layer in ("middle", "stages", "all")
    found = _positions(network, "stages" if layer == "middle" else layer, image_size)
    maps = [p for p in found if p is not None and _has_places(network, p, image_size)]
    if not maps or (len(maps) < len(found) and not is_keyword):
        flat = next(position for position in found if position not in maps)
        raise ValueError(
            f"layer={layer!r} stands for {network.layer_name(flat)!r} of {network.name!r}, whose "
            f"output of shape {network.shape(flat, image_size)} has no places in the image. Pass "
            "earlier blocks: model_summary shows their shapes."
        )
    if layer != "middle":
        return maps
    most = prod(image_size) / _MIDDLE**2 * _SAME_RESOLUTION
    coarse = [p for p in maps if _n_places(network, p, image_size) <= most]
    return coarse[:-1] or maps[-1:]


def _has_places(network: CutNetwork, position: int, image_size: tuple[int, int]) -> bool:
    return network.layout(position, image_size) not in ("vector", "other")


def _positions(network: CutNetwork, layer: Any, image_size: tuple[int, int]) -> list[int | None]:
    named = layer if isinstance(layer, (list, tuple)) else [layer]
    if not named:
        raise ValueError(f"layer={layer!r} names no block; pass at least one, or 'auto'.")
    found: dict[Any, tuple[int | None, Any]] = {}  # what names a place first
    for each in named:
        for position in _named(network, each, image_size):
            place = None if position is None else network.trace.place(position)
            if place in found:
                first, name = found[place][1], network.layer_name(position)
                raise ValueError(
                    f"layer={layer!r} names the same layer twice: {first!r} and {each!r} both "
                    f"stand for {name!r} of {network.name!r}. Leave one of them out."
                )
            found[place] = position, each
    return [position for position, _ in found.values()]


def _named(network: CutNetwork, layer: Any, image_size: tuple[int, int]) -> Sequence[int | None]:
    """Return the positions that a value of `layer`, or of a list of them, stands for."""
    if not (isinstance(layer, str) and layer in ("all", "stages")):
        return [network.position(layer)]
    n_blocks = len(network.trace.names)
    if not n_blocks:
        raise ValueError(
            f"layer={layer!r} stands for blocks, and network {network.name!r} has none: pass "
            "layer='auto', what its head sees, or layer='output'."
        )
    return range(1, n_blocks + 1) if layer == "all" else _stages(network, n_blocks, image_size)


def _stages(network: CutNetwork, n_blocks: int, image_size: tuple[int, int]) -> list[int]:
    """Return the last block of each resolution; of a single one, the ends of its quarters."""
    stages: list[list[int]] = []
    sizes: list[int] = []
    for position in range(1, n_blocks + 1):
        size = _n_places(network, position, image_size)
        if not (sizes and _are_near(size, sizes[-1])):
            stages.append([])
            sizes.append(size)
        stages[-1].append(position)
    with_places = [stage for stage, size in zip(stages, sizes, strict=True) if size]
    ends = {stage[-1] for stage in stages}
    return sorted(ends if len(with_places) != 1 else ends.union(_quarters(with_places[0])))


def _n_places(network: CutNetwork, position: int, image_size: tuple[int, int]) -> int:
    """Return at how many places of an image a block has values; 0 for a vector."""
    shape, layout = network.shape(position, image_size), network.layout(position, image_size)
    if layout == "tokens":
        return shape[0]
    if layout == "map_last":
        return prod(shape[:2])
    return 0 if layout == "vector" else prod(shape[1:])


def _are_near(size: int, other: int) -> bool:
    return size == other or max(size, other) < _SAME_RESOLUTION * min(size, other)


def _quarters(blocks: list[int]) -> list[int]:
    """Return the ends of the quarters of an encoder, whose first block makes its tokens."""
    first, n = blocks[0], len(blocks) - 1
    return [first + -(-n * quarter // 4) for quarter in range(1, 5)]


# ------------------------------------------------------------------------------ widths


def _check_widths(network: CutNetwork, rows: Sequence[Output], image_size: tuple[int, int]) -> None:
    """Raise ValueError if a row can't be pooled so, or if several are too large together."""
    widths = {row: network.width(*row, image_size) for row in rows}
    if len(rows) == 1 or sum(widths.values()) <= _LARGEST_ROW:
        return
    largest = max(widths, key=lambda row: widths[row])
    raise ValueError(
        f"The rows of {len(rows)} layers and poolings would have {sum(widths.values()):,} values "
        f"an image, {widths[largest]:,} of them pooling={largest.form!r} of layer "
        f"{network.layer_name(largest.position)!r}; at most {_LARGEST_ROW:,} are taken together. "
        "Use pooling='avg' or 'max', or fewer layers."
    )
