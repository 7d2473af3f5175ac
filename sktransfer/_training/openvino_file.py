"""OpenVINO's files from images of any size to predictions: scaling, a network, what follows it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sktransfer._engine.augmentation import Augmentation, fixed_views
from sktransfer._engine.openvino_program import converted, reason_of
from sktransfer._engine.program import Output
from sktransfer._engine.quantised import QuantisedNetwork
from sktransfer._engine.quantising import ImagesLast
from sktransfer._torch_state import float32_by_default
from sktransfer._training.openvino_scaling import scaling
from sktransfer._training.whole import facts_of, text_of
from sktransfer.transforms import Preprocessing

_ROWS = "sktransfer/rows/"  # what makes the rows of the network is called so in a file


class _Views(nn.Module):
    """From images with channels last to their views: first one view of all images, and so on."""

    def __init__(self, augmentation: Augmentation) -> None:
        super().__init__()
        self.__dict__["augmentation"] = augmentation

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        views = fixed_views(self.__dict__["augmentation"], images.permute(0, 3, 1, 2))
        return torch.cat([view.permute(0, 2, 3, 1) for view in views])


class _MeanOfViews(nn.Module):
    """From rows of views, in the order of `_Views`, to their mean for each image."""

    def __init__(self, n_views: int) -> None:
        super().__init__()
        self._n_views = n_views

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unflatten(0, (self._n_views, -1)).mean(0)


def network_parts(network: nn.Module, preprocessing: Preprocessing) -> list[Any]:
    """Return a network from images of its size, 0 to 255, as models; see `whole_model`."""
    height, width = preprocessing.size
    blank = torch.zeros(2, height, width, len(preprocessing.mean), dtype=torch.uint8, device="cpu")
    return [_converted(ImagesLast(network), blank)]


def quantised_parts(
    network: QuantisedNetwork,
    rows: Sequence[Output],
    of_view: nn.Module,
    augmentation: Augmentation | None,
    of_mean: nn.Module,
) -> list[Any]:
    """Return a network in 8 bits, and what follows its rows in float32, as models.

    Parameters
    ----------
    network : QuantisedNetwork
    rows : sequence of Output
    of_view : nn.Module
        Takes the rows of one view, side by side.
    augmentation : Augmentation or None
        Makes the views of an image; None if there is the image alone.
    of_mean : nn.Module
        Takes the mean over the views of what `of_view` returns.
    """
    model = network.rows_model(rows)
    width = model.outputs[0].get_partial_shape()[1].get_length()
    if augmentation is None:
        return [model, rows_part(nn.Sequential(of_view, of_mean), width)]
    blank = torch.zeros(list(model.inputs[0].get_shape()), dtype=torch.uint8, device="cpu")
    views = _converted(_Views(augmentation), blank.expand(2, -1, -1, -1))
    n_views = augmentation.n_views
    behind = nn.Sequential(of_view, _MeanOfViews(n_views), of_mean)
    return [views, model, rows_part(behind, width, n_views)]


def rows_part(module: nn.Module, width: int, n_views: int = 1) -> Any:
    """Return a module that takes float32 rows as a model."""
    return _converted(module, torch.zeros(2 * n_views, width, device="cpu"))


def _converted(module: nn.Module, example: torch.Tensor) -> Any:
    try:
        with float32_by_default(nullcontext()), torch.no_grad():
            return converted(module.eval(), example)
    except Exception as error:  # OpenVINO's own, of what it can't convert
        raise ValueError(f"OpenVINO can't take this network: {reason_of(error)}") from error


def whole_model(
    preprocessing: Preprocessing, network: Sequence[Any], behind: Any, output: str
) -> Any:
    """Return one model from images of any size.

    Parameters
    ----------
    preprocessing : Preprocessing
    network : sequence of openvino.Model
        Each takes what the one before it returns, the first one uint8 images (n, h, w, c).
    behind : openvino.Model or None
        Takes the rows of the network; None if these are the results.
    output : str
        What the output is called.
    """
    from openvino import Model, opset13

    images, fitted = scaling(preprocessing)
    source = fitted.output(0)
    for model in network:
        source = _continued(source, model)
    if behind is not None:
        source.get_node().set_friendly_name(f"{_ROWS}{source.get_index()}")
        source = _continued(source, behind)
    return _named(Model([opset13.result(source)], [images], "sktransfer"), output)


def _continued(source: Any, model: Any) -> Any:
    """Return what a model makes of a source, for any number of images."""
    given = model.inputs[0]
    shape = given.get_partial_shape()
    shape[0] = -1
    model.reshape({given: shape})
    for use in model.get_parameters()[0].output(0).get_target_inputs():
        use.replace_source_output(source)
    return model.get_results()[0].input_value(0)


def add_rows(model: Any) -> Any:
    """Return a copy of a `whole_model` whose second output are the rows of the network."""
    copied = model.clone()
    (node,) = [op for op in copied.get_ops() if op.get_friendly_name().startswith(_ROWS)]
    copied.add_outputs(node.output(int(node.get_friendly_name().removeprefix(_ROWS))))
    return copied


def scaling_model(preprocessing: Preprocessing) -> Any:
    """Return the first part of each model alone; see `scaling`."""
    from openvino import Model, opset13

    images, fitted = scaling(preprocessing)
    return _named(Model([opset13.result(fitted)], [images], "scaling"), "fitted")


def _named(model: Any, output: str) -> Any:
    """Return a model whose input is called `images`, whose output has this name, and only these."""
    for node in model.get_ops():  # names of what lies inside may become one more of the output
        for each in node.outputs():
            each.get_tensor().set_names(set())
    model.inputs[0].get_tensor().set_names({"images"})
    (result,) = model.get_results()
    for end in (result.input_value(0), result.output(0)):
        end.get_tensor().set_names({output})
    return model


def write_model(
    model: Any,
    path: Path,
    preprocessing: Preprocessing,
    facts: Mapping[str, Any],
    check: Callable[[Path], None],
) -> None:
    """Write a model and what it says of itself, unless the file turns out to be wrong.

    It has two parts, so no other thread may write a file of this name meanwhile.

    Parameters
    ----------
    model : openvino.Model
    path : path
        Of the graph; the weights lie beside it.
    preprocessing : Preprocessing
    facts : mapping
    check : callable
        Gets the path of the file before it has its name. Raises a WrongFile if it is wrong.
    """
    texts = {**facts_of(preprocessing), **facts}
    try:
        _write(model, path, texts, check)
    except WrongFile:
        # Of some networks, OpenVINO computes one image rightly, and wrongly what is made for any
        # number of them.
        model.reshape([1, len(preprocessing.mean), -1, -1])
        _write(model, path, {**texts, "input": f"{texts['input']}; one image a call"}, check)


class WrongFile(ValueError):
    """A file says something else than its model."""


def _write(model: Any, path: Path, texts: Mapping[str, Any], check: Callable[[Path], None]) -> None:
    import openvino

    for name, value in texts.items():
        model.set_rt_info(text_of(value), name)
    with tempfile.TemporaryDirectory(prefix=".sktransfer-", dir=path.parent) as folder:
        graph = Path(folder, "model.xml")
        weights = graph.with_suffix(".bin")
        try:
            openvino.serialize(model, graph, weights)
        except Exception as error:  # OpenVINO's own: "iostream error"
            raise OSError(
                f"path={str(path)!r}: it can't be written ({reason_of(error)}): is the disk full, "
                "or a quota used up?"
            ) from error
        check(graph)
        os.replace(weights, path.with_suffix(".bin"))
        os.replace(graph, path)
