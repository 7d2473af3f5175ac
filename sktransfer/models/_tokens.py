"""Class and register tokens, followed through the graph of a network."""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from sktransfer.models._graph import Values

# Of parameters that hold class and register tokens.
_TOKENS = re.compile(
    r"(^|\.)((cls|class|dist|distillation|reg|register)_tokens?|(cls|class)_embedding)$"
)
_JOINING = (torch.cat, torch.concat, torch.concatenate, torch.hstack)
_OF_THE_FIRST = ("expand_as", "reshape_as", "to", "type_as", "view_as")  # the others tell how
_OF_NONE = ("new_empty", "new_full", "new_ones", "new_zeros") + (
    *(torch.empty_like, torch.full_like, torch.ones_like, torch.zeros_like),
)


def find_prefixes(
    nodes: list[fx.Node], values: Values, lookup: Callable[[str], Any]
) -> dict[fx.Node, int]:
    """Of nodes that carry the image, the number of tokens in front of those of the image.

    These are class and register tokens. Followed from where they are joined to the others, as the
    axis of the tokens is known to be the second one, to all that is computed from them.
    """
    counts: dict[fx.Node, int] = {}
    for node in (node for node in nodes[:-1] if node in values.data):
        sources = [source for source in _sources(node) if source in counts]
        if node.op == "placeholder":
            counts[node] = 0
        elif (parts := _joined(node)) is not None and sources:
            counts[node] = _count_in_front(parts, counts, values)
        elif sources:
            length = _n_tokens(node, values)
            alike = [source for source in sources if _n_tokens(source, values) == length]
            count = min(counts[source] for source in alike or sources)
            if length is not None and node.target is torch.stack:
                count *= length
            count -= 0 if length is None else _first_kept(node, values)
            if node.op == "call_module" and not alike:
                count += _n_added(lookup(str(node.target)), node, values)
            counts[node] = max(0, count if length is None else min(count, length))
    return counts


def _sources(node: fx.Node) -> list[fx.Node]:
    """Return the nodes by whose values, not by whose sizes alone, a node is computed."""
    if node.target in _OF_NONE:
        return []
    return node.all_input_nodes[:1] if node.target in _OF_THE_FIRST else node.all_input_nodes


def _n_tokens(node: Any, values: Values) -> int | None:
    shape = values.shapes.get(node, ())
    return shape[0] if len(shape) == 2 else None


def _joined(node: fx.Node) -> Any:
    """Return the parts that a node joins along the axis of the tokens; None if it joins none."""
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    if node.target is getattr(sys.modules.get("einops"), "pack", None):
        pattern = node.args[1] if len(node.args) > 1 else node.kwargs["pattern"]
        return parts if str(pattern).split()[1:2] == ["*"] else None
    if node.target not in _JOINING or not isinstance(parts, (tuple, list)):
        return None
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis"))
    return parts if axis in (1, -2) or node.target is torch.hstack else None


def _count_in_front(parts: Any, counts: dict[fx.Node, int], values: Values) -> int:
    count = 0
    for part in parts:
        length = _n_tokens(part, values)
        if length is None:  # no tokens, but maps, say
            return min((counts[part] for part in parts if part in counts), default=0)
        if part in counts and counts[part] < length:
            return count + counts[part]
        count += length
    return count


def _first_kept(node: fx.Node, values: Values) -> int:
    """Return the number of the first token that a node takes of those of its source."""
    if node.target is not operator.getitem:
        return 0
    source: Any = node.args[0]
    index: Any = node.args[1]
    is_part = isinstance(index, int)  # of those into which the tokens were split
    whole = [*source.all_input_nodes, source][0] if is_part else source
    lost = (_n_tokens(whole, values) or 0) - (_n_tokens(node, values) or 0)
    if _n_tokens(whole, values) is None or lost == 0:  # another axis is indexed
        return 0
    if is_part:
        return lost if index else 0
    along = index[1] if isinstance(index, tuple) and len(index) > 1 else None
    start: Any = along.start if isinstance(along, slice) else None
    start = values.sizes.get(start) if isinstance(start, fx.Node) else start
    if not isinstance(start, int):
        return 0
    return start if start >= 0 else start + (_n_tokens(whole, values) or 0)


def _n_added(module: Any, node: fx.Node, values: Values) -> int:
    """Return how many tokens a module puts in front that is not looked into."""
    if not isinstance(module, nn.Module) or _n_tokens(node, values) is None:
        return 0
    tokens = [p for name, p in module.named_parameters() if _TOKENS.search(name)]
    return sum(p.shape[-2] if p.ndim > 1 else 1 for p in tokens)
