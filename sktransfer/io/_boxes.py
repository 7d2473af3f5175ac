"""Boxes around objects: what a user gives, checked, and where they lie in a network's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from sktransfer.io import ImageSequence
from sktransfer.transforms import Preprocessing

_SLACK = 1.0  # pixels by which a box may leave its image, as rounded annotations do


class Objects(NamedTuple):
    """The objects of an image: boxes (n, 4), x1, y1, x2, y2 in pixels, and n labels."""

    boxes: np.ndarray
    labels: list[Any]


def image_sizes(images: ImageSequence, n_threads: int) -> np.ndarray:
    """Return height and width of all images, (n, 2)."""
    with ThreadPoolExecutor(n_threads) as threads:
        sizes = list(threads.map(lambda i: images.load(i).shape[1:], range(len(images))))
    return np.array(sizes, int).reshape(-1, 2)


def check_objects(y: Any, n_images: int) -> list[Objects]:
    """Check the form of `y`: a dict of boxes and labels for each image.

    Raises
    ------
    TypeError, ValueError
        That name the row, what came, and what should have.
    """
    if isinstance(y, (str, bytes, Mapping)) or not hasattr(y, "__len__"):
        raise TypeError(
            "y must be a sequence with a dict {'boxes': ..., 'labels': ...} for each image, got "
            f"{type(y).__name__}."
        )
    if len(y) != n_images:
        raise ValueError(
            f"Found input variables with inconsistent numbers of samples: X has {n_images} images "
            f"and y has {len(y)} dicts; y needs one for each image, also for those without objects."
        )
    return [_objects(target, row) for row, target in enumerate(y)]


def _objects(target: Any, row: int) -> Objects:
    if not isinstance(target, Mapping):
        raise TypeError(
            f"y, row {row}: expected a dict {{'boxes': (n, 4), 'labels': (n,)}}, got {target!r} of "
            f"type {type(target).__name__}."
        )
    if missing := [key for key in ("boxes", "labels") if key not in target]:
        raise ValueError(
            f"y, row {row}: the keys {missing} are missing; it has {sorted(map(str, target))}. An "
            "image without objects has empty boxes and labels."
        )
    try:
        boxes = np.asarray(target["boxes"], np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"y, row {row}: boxes must be numbers (n, 4): {error}") from error
    labels = np.asarray(target["labels"])
    boxes = boxes.reshape(0, 4) if boxes.size == 0 else boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.ndim != 1 or len(labels) != len(boxes):
        raise ValueError(
            f"y, row {row}: boxes of shape {boxes.shape} and labels of shape {labels.shape} do "
            "not go together: (n, 4), as x1, y1, x2, y2, and (n,) are needed."
        )
    for i, box in enumerate(boxes):
        where = f"y, row {row}: box {i}, {box.tolist()},"
        if not np.isfinite(box).all():
            raise ValueError(f"{where} holds NaN or infinity; drop it, with its label.")
        if (box[2:] <= box[:2]).any():
            raise ValueError(
                f"{where} is empty or reversed: x1 < x2 and y1 < y2 are needed, in pixels. For x, "
                "y, width and height, pass x, y, x + width and y + height."
            )
    return Objects(boxes, labels.tolist())


def check_inside(objects: Sequence[Objects], sizes: np.ndarray) -> list[Objects]:
    """Check that the boxes lie in their images; clip those that leave them by a pixel at most."""
    clipped = []
    for row, (of_image, (height, width)) in enumerate(zip(objects, sizes.tolist(), strict=True)):
        limits = np.array([width, height, width, height])
        outside = (of_image.boxes < -_SLACK) | (of_image.boxes > limits + _SLACK)
        if outside.any():
            i = int(np.flatnonzero(outside.any(1))[0])
            raise ValueError(
                f"y, row {row}: box {i}, {of_image.boxes[i].tolist()}, lies outside its image of "
                f"width {width} and height {height}. Boxes are x1, y1, x2, y2 in pixels of the "
                "image as it is given, turned upright."
            )
        boxes = np.clip(of_image.boxes, 0, limits)
        if (boxes[:, 2:] <= boxes[:, :2]).any():
            raise ValueError(f"y, row {row}: nothing is left of a box inside the image.")
        clipped.append(Objects(boxes, of_image.labels))
    return clipped


def find_classes(objects: Sequence[Objects]) -> np.ndarray:
    """Return the sorted categories."""
    labels = [label for of_image in objects for label in of_image.labels]
    if not labels:
        raise ValueError(
            "y holds no object in any image, so there is no category to learn. At least one image "
            "must have a box."
        )
    kinds = sorted({type(label).__name__ for label in labels})
    try:
        return np.array(sorted(set(labels)))
    except TypeError as error:
        raise TypeError(f"Labels of mixed types, {' and '.join(kinds)}, have no order.") from error


def encode(objects: Sequence[Objects], classes: np.ndarray) -> list[np.ndarray]:
    """Return the numbers of the labels, from 0; ValueError if a category is not known."""
    numbers = {label: i for i, label in enumerate(classes.tolist())}
    for row, of_image in enumerate(objects):
        if unknown := sorted({str(label) for label in of_image.labels if label not in numbers}):
            raise ValueError(
                f"y, row {row}: unknown categories {unknown}; the detector was fitted to "
                f"{[str(label) for label in classes.tolist()]}. Fit it with them, or drop them."
            )
    return [np.array([numbers[label] for label in of_image.labels], int) for of_image in objects]


# ------------------------------------------------------------------------------ the network's input


def letterbox(preprocessing: Preprocessing, height: int, width: int) -> tuple[Any, Any]:
    """Return scale and offset, (4,) each, from a box in an image to one in the network's input.

    The image lies in the middle of the input, at its own proportions.
    """
    scaled = preprocessing.scaled_size(height, width)
    top, left = (
        (side - extent) // 2 for side, extent in zip(preprocessing.size, scaled, strict=True)
    )
    scale = np.array([scaled[1] / width, scaled[0] / height] * 2)
    return scale, np.array([left, top, left, top], float)
