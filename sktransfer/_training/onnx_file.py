"""ONNX files from images of any size to predictions: preprocessing, network and what follows it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sktransfer._training.onnx_preprocessing import preprocessing_model
from sktransfer._training.whole import check_target, facts_of, onnx_program, text_of
from sktransfer.transforms import Preprocessing

_LARGE = 2**31 - 2**27  # bytes; protobuf, in which the file is written, ends at 2 GiB
OPSET = 18  # of ONNX: the first in which torch writes
OPSET_ML = 3  # of the operators of scikit-learn's models


def write_onnx(
    path: str | os.PathLike,
    preprocessing: Preprocessing,
    models: Sequence[Any],
    metadata: Mapping[str, Any],
) -> Path:
    """Write preprocessing, a network and what follows it to one file.

    Parameters
    ----------
    path : path
    preprocessing : Preprocessing
    models : sequence of onnx.ModelProto
        The first one takes `fitted`, images of the network's size, 0 to 255. Each of the others
        takes outputs of those before it, which have the names of its inputs.
    metadata : mapping
        What else the file says of itself.
    """
    target = check_target(path)
    import onnx

    model = joined_models(preprocessing, models)
    texts = {**facts_of(preprocessing), **metadata}
    onnx.helper.set_model_props(model, {k: text_of(value) for k, value in texts.items()})
    is_large = model.ByteSize() > _LARGE
    onnx.save(
        model,
        target,
        save_as_external_data=is_large,
        location=f"{target.name}.data" if is_large else None,
    )
    return target


def rows_model(network: nn.Module, preprocessing: Preprocessing, output: str) -> Any:
    """Return a network, from `fitted` to `output`, as an ONNX model."""
    blank = torch.zeros(2, *preprocessing.shape, device="cpu")
    return onnx_program(network, blank, "fitted", output, OPSET).model_proto


def joined_models(preprocessing: Preprocessing, models: Sequence[Any]) -> Any:
    """Return one ONNX model of preprocessing and of others, see `write_onnx`."""
    network, *tails = models
    places = {"offset", "scale", "ends"} & {i.name for tail in tails for i in tail.graph.input}
    front = preprocessing_model(preprocessing, OPSET, network.ir_version, bool(places))
    model = _joined(front, network, ("fit_size", ""))
    for number, tail in enumerate(tails):
        model = _joined(model, _in_versions_of(network, tail), ("", f"step_{number}"))
    if places:  # boxes are those of one image
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    return model


def _in_versions_of(model: Any, tail: Any) -> Any:
    """Return a tail that says the versions of a model.

    skl2onnx writes operators of the version that it was asked for, and states the lowest by which
    those that it used are known.
    """
    from onnx import helper

    tail.ir_version = model.ir_version
    asked = {"": OPSET, "ai.onnx.ml": OPSET_ML}
    stated = {each.domain: each.version for each in tail.opset_import}
    versions = {domain: asked.get(domain, version) for domain, version in stated.items()}
    del tail.opset_import[:]
    tail.opset_import.extend(helper.make_opsetid(*item) for item in versions.items())
    return tail


def _joined(first: Any, second: Any, prefixes: tuple[str, str]) -> Any:
    """Return one model in which `second` gets those outputs of `first` that it calls alike."""
    from onnx import compose

    given = {output.name for output in first.graph.output}
    shared = [(i.name, i.name) for i in second.graph.input if i.name in given]
    # Only names of what lies inside, which both may have.
    first, second = (
        compose.add_prefix(model, f"{prefix}/", rename_inputs=False, rename_outputs=False)
        if prefix
        else model
        for model, prefix in zip((first, second), prefixes, strict=True)
    )
    return compose.merge_models(first, second, shared)
