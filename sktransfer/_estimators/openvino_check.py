"""Whether a file of OpenVINO says what its model says, of a few images, one by one and at once."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sktransfer._engine.openvino_program import core, reason_of
from sktransfer._estimators.exported import N_IMAGES
from sktransfer._estimators.openvino_steps import method_of
from sktransfer._training.openvino_file import WrongFile, add_rows

# By how much numbers may differ, as a share of the largest of all images. Of the rows of a network
# in 8 bits: OpenVINO rounds to 8 bits otherwise where it may merge other layers.
_TOLERANCE = 1e-3
_TOLERANCE_IN_8_BITS = 0.1


class Case(NamedTuple):
    """Images by which a file is compared with its model."""

    images: torch.Tensor  # uint8 (n, c, height, width), of a size that is not scaled
    rows: np.ndarray  # what the network makes of them
    steps: list[tuple[str, Any]]  # of scikit-learn, behind the network
    is_in_8_bits: bool

    @property
    def tolerance(self) -> float:
        """Of what the network makes of images; steps behind it may differ by `_TOLERANCE`."""
        return _TOLERANCE_IN_8_BITS if self.is_in_8_bits else _TOLERANCE


class _Said(NamedTuple):
    """What a file says of images."""

    rows: np.ndarray
    results: np.ndarray  # the rows, if no steps follow them


def check_file(graph: Path, case: Case) -> None:
    """Raise a WrongFile if a file says something else than its model.

    The rows of the network are those of the model, of each image alone and of all at once. What
    follows them is what scikit-learn makes of the file's own rows: where rows lie between two
    classes, their rounding decides.
    """
    try:
        alone, at_once = _run(graph, case)
    except Exception as error:  # OpenVINO's own, of what it can't compile
        raise WrongFile(f"OpenVINO can't run what is written: {reason_of(error)}") from error
    _compare("The rows", alone.rows, case.rows, "the model", case.tolerance)
    _compare_results(alone, case)
    if at_once is not None:
        words = "each image alone"
        _compare("In a batch, the rows", at_once.rows, alone.rows, words, case.tolerance)
        _compare_results(at_once, case)


def _run(graph: Path, case: Case) -> tuple[_Said, _Said | None]:
    """Return what a file says of images one by one, and of all at once; None if it takes one."""
    model = core().read_model(graph)
    whole = _compiled(model)
    inside = _compiled(add_rows(model)) if case.steps else whole
    alone = [_said(whole, inside, image) for image in case.images.split(1)]
    said = _Said(*(np.concatenate(each) for each in zip(*alone, strict=True)))
    takes_several = whole.inputs[0].get_partial_shape()[0].is_dynamic
    return said, _said(whole, inside, case.images) if takes_several else None


def _compiled(model: Any) -> Any:
    return core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def _said(whole: Any, inside: Any, images: torch.Tensor) -> _Said:
    """Return what a file says; the rows are those of a program that has them as an output."""
    results = whole({"images": images.numpy()})[0]
    return _Said(results if inside is whole else inside({"images": images.numpy()})[1], results)


def _compare_results(said: _Said, case: Case) -> None:
    if case.steps:
        expected = results_of(case.steps, said.rows)
        _compare("The results", said.results, expected, "the model", _TOLERANCE)


def results_of(steps: list[tuple[str, Any]], rows: np.ndarray) -> np.ndarray:
    """Return what the steps behind a network make of its rows, by scikit-learn."""
    results = rows
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn, which the user has heard
        for number, (_, step) in enumerate(steps, 1):
            method = "transform" if number < len(steps) else method_of(step)
            results = np.asarray(getattr(step, method)(results), np.float32)
    return results.reshape(len(rows), -1)


def _compare(
    what: str, found: np.ndarray, expected: np.ndarray, source: str, tolerance: float
) -> None:
    """Raise a WrongFile that names the image and the number that differ most, if they differ."""
    remedy = "Nothing is written; to_onnx may take this model."
    if found.shape != expected.shape:
        raise WrongFile(
            f"{what} of the file have the shape {found.shape}, and {expected.shape} by {source}. "
            f"{remedy}"
        )
    most = tolerance * max(np.abs(expected).max(), 1e-12)
    off = np.abs(found - expected)
    off[np.isnan(off)] = np.inf
    image, column = np.unravel_index(off.argmax(), off.shape)
    if off[image, column] > most:
        raise WrongFile(
            f"{what} of the file are others than by {source}: of test image {image} (smooth noise, "
            f"{N_IMAGES} such images), column {column} is {found[image, column]:.6g}, expected "
            f"{expected[image, column]:.6g} and up to {most:.2g} more or less. {remedy}"
        )
