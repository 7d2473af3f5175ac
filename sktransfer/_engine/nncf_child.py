"""What runs in a process of its own: NNCF quantises a network of OpenVINO to 8 bits.

Run as a script, without this package: NNCF prints, replaces the class of all loggers and would
report its use over the network. In here, nobody sees or hears of it.

The folder that it is given holds ``network.xml``, whose last result is the embedding and whose
others are those of the cuts before it, ``images.npy`` and ``settings.json``. It writes
``quantised.xml`` and ``report.json``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np


def quantise(folder: Path) -> None:
    """Quantise the network of a folder; see the module."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # NNCF then has none
    import openvino
    from openvino._offline_transformations import apply_moc_transformations

    images = [image[None] for image in np.load(folder / "images.npy")]
    model = openvino.Core().read_model(folder / "network.xml")
    # What NNCF expects of a network: its patterns, and the places of biases, are those.
    apply_moc_transformations(model, cf=False)
    sources = [result.input_value(0) for result in model.get_results()]
    places = [(source.get_node().get_friendly_name(), source.get_index()) for source in sources]
    network = _ending_at(model, sources[-1])
    settings = json.loads((folder / "settings.json").read_text())
    quantised = _quantised(network, images, **settings)
    openvino.serialize(quantised, folder / "quantised.xml", folder / "quantised.bin")
    # What was written is what is measured: the disk may be full.
    written = openvino.Core().read_model(folder / "quantised.xml")
    cosines = _cosines(_rows(network, images), _rows(written, images))
    report = {"places": places, "cosine": float(np.mean(cosines))}
    (folder / "report.json").write_text(json.dumps(report))


def _ending_at(model: Any, source: Any) -> Any:
    from openvino import Model, opset13

    return Model([opset13.result(source)], model.get_parameters(), "network")


def _quantised(model: Any, images: list[np.ndarray], halves_weights: bool) -> Any:
    """Return the network in 8 bits.

    With `halves_weights`, weights have half of their range: a CPU without VNNI adds two products in
    16 bits, where those of the whole range overflow.
    """
    try:
        import nncf
    except Exception as error:  # it and OpenVINO may be of versions that don't fit
        raise ImportError(
            f"NNCF can't be imported ({error}); pip install --upgrade nncf openvino"
        ) from error
    nodes = model.get_ops()
    kinds = {node.get_type_name() for node in nodes}
    depthwise = [node.get_friendly_name() for node in nodes if _is_depthwise(node)]
    overflow_fix = nncf.OverflowFix.ENABLE if halves_weights else None
    has_attention = bool(kinds & {"Softmax", "ScaledDotProductAttention"})
    return nncf.quantize(
        model,
        nncf.Dataset(images),
        subset_size=len(images),
        model_type=nncf.ModelType.TRANSFORMER if has_attention else None,
        # They lose most of all, and gain least: their few operations wait for memory.
        ignored_scope=nncf.IgnoredScope(names=depthwise),
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow_fix),
    )


def _is_depthwise(node: Any) -> bool:
    """Tell whether a node is a depthwise convolution: each of its groups has one channel."""
    if node.get_type_name() != "GroupConvolution":
        return False
    return bool(node.input_value(1).get_partial_shape()[2] == 1)  # (groups, out, in, h, w)


def _rows(model: Any, images: list[np.ndarray]) -> np.ndarray:
    from openvino import Core

    compiled = Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    rows = []
    for image in images:
        request.infer({0: image})
        rows.append(request.output_tensors[0].data.ravel().copy())
    return np.array(rows)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.maximum(lengths, 1e-30)


def _end_with_parent() -> None:
    os.read(0, 1)  # returns once the process that started this one is gone
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quantise(Path(sys.argv[1]))
