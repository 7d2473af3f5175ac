"""Batch norms become a part of the convolutions in front of them, where torch runs a network."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights

_KNOWN = ("torch.nn.", "timm.layers.")  # convolutions and norms whose maths is known


def fold_batch_norms(module: fx.GraphModule) -> fx.GraphModule:
    """Return the module with every batch-norm behind a convolution made a part of it.

    All other modules are shared with the given one.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    folded = fx.GraphModule(module, graph)
    for node in list(graph.nodes):
        if (before := _foldable(folded, node)) is None:
            continue
        convolution, norm = _module_at(folded, before), _module_at(folded, node)
        # timm's norms have a dropout and an activation in them.
        rest = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
        folded.set_submodule(str(before.target), _fuse(convolution, norm))
        folded.set_submodule(str(node.target), nn.Sequential(*rest).eval())
    folded.recompile()
    return folded


def _fuse(convolution: nn.Conv2d, norm: Any) -> nn.Conv2d:
    """Return one layer for two; torch's own function copies the convolution's weights first."""
    fused = copy.copy(convolution)
    fused._parameters = dict(convolution._parameters)
    fused.weight, fused.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )
    return fused


def _module_at(module: nn.Module, node: fx.Node) -> Any:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _foldable(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the convolution whose only use is this batch-norm."""
    before = node.args[0] if len(node.args) == 1 else None
    if not isinstance(before, fx.Node) or len(before.users) > 1:
        return None
    convolution, norm = _module_at(module, before), _module_at(module, node)
    if not isinstance(convolution, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
        return None
    uses = [n.target for n in module.graph.nodes if n.op == "call_module"]
    if uses.count(before.target) > 1 or uses.count(node.target) > 1:
        return None  # shared layers
    known = all(type(m).__module__.startswith(_KNOWN) for m in (convolution, norm))
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in (convolution, norm))
    computed = parametrize.is_parametrized(convolution) or parametrize.is_parametrized(norm)
    return (
        before if known and not hooks and not computed and norm.running_mean is not None else None
    )
