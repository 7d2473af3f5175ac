"""Whole models as files of OpenVINO, in 8 bits as well."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sktransfer._engine.augmentation import fixed_views
from sktransfer._engine.device import INT8
from sktransfer._engine.openvino_program import core
from sktransfer._engine.runner import get_runner
from sktransfer._engine.runtime import why_not_after_fork, why_not_imported
from sktransfer._estimators.detection import FineTunedDetector
from sktransfer._estimators.exported import (
    ExportedNetwork,
    check_widths,
    example_rows,
    frozen_again,
    labels_of,
    network_of,
    rows_in_float32,
    smooth_noise,
    steps_of,
)
from sktransfer._estimators.openvino_check import Case, check_file
from sktransfer._estimators.openvino_steps import method_of, steps_module
from sktransfer._memory.memory import check_memory
from sktransfer._optional import load_optional
from sktransfer._threads import renewed_in_forks
from sktransfer._training.openvino_file import (
    network_parts,
    quantised_parts,
    rows_part,
    scaling_model,
    whole_model,
    write_model,
)
from sktransfer._training.whole import path_in_folder
from sktransfer.transforms import Preprocessing

__all__ = ["export_openvino"]

_RowsOf = Callable[[torch.Tensor], torch.Tensor]

_HINTS = {"int8": "f32", "bfloat16": "bf16", "float32": "f32"}
_OUTPUTS = {
    "predict_proba": "probabilities",
    "decision_function": "scores",
    "transform": "rows",
}
_SHARE_OF_PIXELS = 0.01  # that may be off by more than 1
# One thread exports at a time: a file has two parts, and all threads share the filters of warnings.
_exporting = renewed_in_forks(threading.Lock())


def export_openvino(model: Any, path: str | os.PathLike, *, precision: str = "float32") -> Path:
    """Write a whole model to a file of OpenVINO, from images of any size to predictions.

    Needs ``pip install '.[openvino]'`` here, or ``'.[int8]'`` for 8 bits, and
    nothing but OpenVINO where the file is used.

    Parameters
    ----------
    model : estimator
        A fitted pipeline of a :class:`PretrainedFeatureExtractor` (or
        :class:`ContrastivePretrainer`) and steps of scikit-learn: see Notes. Or one of this library
        alone: an extractor, a :class:`PretrainedClassifier`, a fine-tuned classifier or regressor.
        Of a fitted search its best estimator is taken.
    path : path
        Of the file, `.xml`. The weights are written beside it, `.bin`.
    precision : {"float32", "bfloat16", "int8"}, default="float32"
        Of the network; what follows its rows computes in float32 in any case. `"int8"`: NNCF
        quantises the network, as for an extractor with this `precision`. This takes half a
        minute for the default network, unless the `memory` of the estimator keeps the result.
        `"bfloat16"`: the file is that of float32 with another hint; whoever compiles it passes the
        hint, and the CPU needs instructions for bfloat16.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    ValueError, TypeError
        If a step can't be exported; the message names the step and the reason. Before the file gets
        its name, it is run on five images, one by one and all at once. Of each of them, the rows of
        the network must be those of the model to 0.001 of the largest value, in 8 bits to 0.1; and
        what follows them must be what scikit-learn makes of the file's rows, to 0.001. If not, the
        message names the image and the numbers, and a file that has this name stays as it is.

    See Also
    --------
    to_onnx : For ONNX Runtime; it takes more steps, and detectors.

    Notes
    -----
    The input `images` is uint8 (n, channels, height, width) of any size; all images of a call have
    one size. The channels are RGB, unless the network takes others; of a network with a
    `value_range`, 0 and 255 stand for its ends. A few networks, such as ConvNeXt in 8 bits, take
    one image a call; the file says so under `input`. Whoever decodes an image turns it upright, as
    its EXIF data say, and fills what is transparent.

    Scaling, cropping and normalisation are part of the graph. Up to one pixel in a hundred differs
    by 1 of 255 from that of this library, where rounding decides. Of images that are scaled up, it
    is up to one in eight, and of images whose sides differ more than sixteenfold, even more.

    There is one output. It is called `probabilities`, what `predict_proba` returns; `scores` of a
    classifier without probabilities, what `decision_function` returns (one column for two
    classes); `rows` of what transforms; or `values` of a regressor. The file's `rt_info` has the
    classes as a JSON list under `labels`, and the hint for the compilation under
    `INFERENCE_PRECISION_HINT`. Without the hint, CPUs that have bfloat16 compute in it, also what
    of a network in 8 bits is not quantised.

    Steps that are written: `StandardScaler`, `MinMaxScaler`, `MaxAbsScaler`, `Normalizer`, `PCA`,
    `TruncatedSVD`, `LogisticRegression`, `LinearDiscriminantAnalysis`, `LinearSVC`,
    `RidgeClassifier`, `Perceptron`, `SGDClassifier`, `SVC` (probabilities of two classes only) and
    `KNeighborsClassifier`. The last two compare each image with all support vectors or training
    rows, which takes `4 * n_images * n_rows * n_features` bytes.

    Of a fine-tuned network whose blocks were trained, 8 bits take the blocks as they are now, and
    the head that was trained on their rows in float32: compare the predictions of the file with
    those of the model on images of your own.

    Examples
    --------
    >>> import tempfile
    >>> from torch import nn
    >>> from sktransfer import PretrainedFeatureExtractor, export_openvino
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> extractor = PretrainedFeatureExtractor(network, image_size=32)
    >>> export_openvino(extractor, tempfile.mkdtemp() + "/model.xml").name
    'model.xml'
    """
    _check_precision(precision)
    target = _check_target(path, precision)
    with _exporting:
        _export(model, target, precision)
    return target


def _export(model: Any, target: Path, precision: str) -> None:
    (name, first), *steps = steps_of(model)
    if isinstance(first, FineTunedDetector):
        raise TypeError("A FineTunedDetector can't be exported for OpenVINO: to_onnx takes it.")
    network = network_of(name, first, is_last=not steps)
    tail = steps_module(steps)
    _check_network(network)
    check_widths(example_rows(network), steps)
    make = _parts_in_8_bits if precision == INT8 else _parts_in_float32
    parts, rows_of = make(network, first)
    output, labels = network.output, network.labels
    if steps:
        last = steps[-1][1]
        output, labels = _OUTPUTS[method_of(last)], labels_of(getattr(last, "classes_", None))
    facts = {
        "labels": labels,
        "backbone": network.name,
        "precision": precision,
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
    }

    images = smooth_noise(network.preprocessing.shape[0], network.preprocessing.resize)
    rows = rows_of(network.preprocessing.fit_size(images)).numpy()
    case = Case(images, rows, steps, precision == INT8)
    behind = rows_part(tail, rows.shape[1]) if steps else None
    whole = whole_model(network.preprocessing, parts, behind, output)
    write_model(
        whole, target, network.preprocessing, facts, functools.partial(check_file, case=case)
    )


def _check_precision(precision: Any) -> None:
    if not isinstance(precision, str) or precision not in _HINTS:
        raise ValueError(f"precision must be 'float32', 'bfloat16' or 'int8', got {precision!r}.")


def _check_target(path: str | os.PathLike, precision: str) -> Path:
    """Return where the graph is to be written, if it can be."""
    extra = "'.[int8]'" if precision == INT8 else "'.[openvino]'"
    if (reason := why_not_after_fork()) is not None:
        raise RuntimeError(
            f"export_openvino runs what it writes, which can't be done here: {reason}."
        )
    why_not_imported()  # imports it, without its reports, if it is there
    load_optional("openvino", "export_openvino", extra)
    target = path_in_folder(path)
    if target.suffix != ".xml":
        raise ValueError(
            f"path={str(path)!r} must end in .xml: OpenVINO's files are a graph, .xml, and weights "
            "beside it, .bin."
        )
    if target.is_dir() or target.with_suffix(".bin").is_dir():
        raise ValueError(f"path={str(path)!r}: there is a folder of this name, or with .bin.")
    try:
        with tempfile.TemporaryDirectory(prefix=".sktransfer-", dir=target.parent):
            pass
    except OSError as error:  # now, and not after minutes
        raise OSError(
            error.errno,
            f"path={str(path)!r}: nothing can be written into its folder ({error.strerror}); pass "
            "a path in another one",
        ) from error
    return target


# ------------------------------------------------------------------------------ the network


def _check_network(network: ExportedNetwork) -> None:
    """Raise an error if a network, or how images are brought to its size, can't be written."""
    if not network.runner.can_be_cut:
        raise ValueError(
            f"Backbone {network.name!r} can't be traced, so what it does may depend on the pixels, "
            "which OpenVINO's files can't hold."
        )
    _check_scaling(network.preprocessing)


def _parts_in_float32(network: ExportedNetwork, first: Any) -> tuple[list[Any], _RowsOf]:
    """Return models of OpenVINO of a network, and how torch makes its rows."""
    parts = network_parts(network.module, network.preprocessing)
    return parts, functools.partial(rows_in_float32, network)


def _parts_in_8_bits(network: ExportedNetwork, first: Any) -> tuple[list[Any], _RowsOf]:
    """Return the same as `_parts_in_float32`, of the network in 8 bits.

    The rows are those of the programs by which an extractor with this precision computes.
    """
    frozen, preprocessing = network.frozen or frozen_again(first), network.preprocessing
    runner = get_runner(frozen.backbone, "cpu", INT8, "openvino", image_size=preprocessing.size)
    memory = check_memory(first.memory)
    folder = None if memory is None else memory.companions
    quantised = runner.in_8_bits(preprocessing, folder, bool(first.verbose))
    run = quantised.run_of(frozen.rows, 1, folder)

    def rows_of(fitted: torch.Tensor) -> torch.Tensor:
        views = [fitted]
        if frozen.augmentation is not None:
            views = fixed_views(frozen.augmentation, fitted)
        rows = [[torch.cat(run(image), 1) for image in view.split(1)] for view in views]
        of_views = torch.stack([frozen.of_view(torch.cat(each)) for each in rows])
        return frozen.of_mean(of_views.mean(0))

    behind = frozen.of_view, frozen.augmentation, frozen.of_mean
    return quantised_parts(quantised, frozen.rows, *behind), rows_of


# ------------------------------------------------------------------------------ comparison


def _check_scaling(preprocessing: Preprocessing) -> None:
    """Raise an error if a preprocessing does something else than what its settings say."""
    height, width = preprocessing.resize
    images = smooth_noise(preprocessing.shape[0], (height * 5 // 4 + 3, width * 4 // 3 + 5))
    program = core().compile_model(scaling_model(preprocessing), "CPU")
    found = program({"images": images.numpy()})[0].transpose(0, 3, 1, 2)
    off = np.abs(found.astype(int) - preprocessing.fit_size(images).numpy())
    if (off > 1).mean() > _SHARE_OF_PIXELS:
        raise ValueError(
            f"The {type(preprocessing).__name__} of this network brings images to its size by "
            "other ways than Preprocessing, which can't be written."
        )
