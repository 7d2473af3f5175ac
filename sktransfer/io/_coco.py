"""Boxes in COCO's form: annotations of a JSON file, and COCO's average precision."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.utils import Bunch

from sktransfer._optional import load_optional

__all__ = ["coco_scores", "load_coco"]

_PARTS = ("images", "annotations", "categories")
_NAMED = 5  # files that an error lists


def load_coco(
    json_file: str | os.PathLike, image_folder: str | os.PathLike, *, crowd: bool = False
) -> Bunch:
    """Read boxes and categories from a file of annotations in COCO's format.

    Parameters
    ----------
    json_file : path
        With the lists `images` (`id`, `file_name`), `annotations` (`image_id`, `category_id`,
        `bbox` as x, y, width, height in pixels) and `categories` (`id`, `name`), as described at
        https://cocodataset.org/#format-data.
    image_folder : path
        To which the file names are relative.
    crowd : bool, default=False
        Whether to keep annotations with `iscrowd`, whose boxes hold many objects.

    Returns
    -------
    Bunch
        `data`, the paths (list of str), in the order of `images`; `target`, for each image a dict
        with `boxes`, float64 (n, 4), x1, y1, x2, y2 in pixels, and `labels`, the names of its
        categories (n,); images without objects have none of both. `target_names`, all categories;
        `DESCR`.

    Raises
    ------
    ValueError
        If the file or the folder is not there, if the file is no JSON of this form, if it refers
        to images or categories that it does not list, or if files of images are missing, which
        are named.

    Examples
    --------
    >>> import json, tempfile
    >>> from pathlib import Path
    >>> from sklearn.datasets import load_sample_images
    >>> from sktransfer import load_coco
    >>> folder = Path(load_sample_images().filenames[0]).parent
    >>> content = {
    ...     "images": [{"id": 7, "file_name": "flower.jpg"}],
    ...     "categories": [{"id": 1, "name": "blossom"}],
    ...     "annotations": [{"image_id": 7, "category_id": 1, "bbox": [200, 50, 240, 300]}],
    ... }
    >>> with tempfile.TemporaryDirectory() as temporary:
    ...     file = Path(temporary) / "annotations.json"
    ...     _ = file.write_text(json.dumps(content))
    ...     data = load_coco(file, folder)
    >>> data.target[0]["boxes"].tolist(), data.target[0]["labels"].tolist()
    ([[200.0, 50.0, 440.0, 350.0]], ['blossom'])
    """
    file, folder = Path(json_file), Path(image_folder)
    content = _read(file)
    if not folder.is_dir():
        raise ValueError(f"image_folder={str(folder)!r}: there is no such folder.")
    images, names, annotations = _entries(file, folder, content, crowd)
    _check_files(file, folder, list(images.values()))
    descr = f"{len(images)} images and {len(annotations)} boxes of {file.name}"
    return Bunch(
        data=list(images.values()),
        target=_targets(file, images, names, annotations),
        target_names=list(names.values()),
        DESCR=descr,
    )


def _entries(
    file: Path, folder: Path, content: Mapping[str, Any], crowd: bool
) -> tuple[dict[Any, str], dict[Any, str], list[tuple[Any, Any, list[float]]]]:
    """Return paths of images and names of categories by their id, and the annotations."""
    try:
        images = {image["id"]: str(folder / image["file_name"]) for image in content["images"]}
        names = {category["id"]: str(category["name"]) for category in content["categories"]}
        annotations = [
            (entry["image_id"], entry["category_id"], [float(value) for value in entry["bbox"]])
            for entry in content["annotations"]
            if crowd or not entry.get("iscrowd", 0)
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{str(file)!r} is not in COCO's format: an entry lacks a field, or it has another "
            f"type than that of the format ({type(error).__name__}: {error})."
        ) from error
    return images, names, annotations


def _targets(
    file: Path,
    images: Mapping[Any, str],
    names: Mapping[Any, str],
    annotations: Sequence[tuple[Any, Any, list[float]]],
) -> list[dict[str, np.ndarray]]:
    """Return boxes and labels of each image."""
    boxes: dict[Any, list[Any]] = {image: [] for image in images}
    labels: dict[Any, list[str]] = {image: [] for image in images}
    for number, (image, category, box) in enumerate(annotations):
        if image not in images or category not in names or len(box) != 4:
            raise ValueError(
                f"{str(file)!r}: annotation {number} is of image {image!r} and category "
                f"{category!r}, bbox {box}. It needs an image and a category that the file lists, "
                "and four numbers."
            )
        x, y, width, height = box
        boxes[image].append([x, y, x + width, y + height])
        labels[image].append(names[category])
    return [
        {
            "boxes": np.array(boxes[image], float).reshape(-1, 4),
            "labels": np.array(labels[image], dtype=str),
        }
        for image in images
    ]


def _read(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise ValueError(f"json_file={str(file)!r}: there is no such file.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"json_file={str(file)!r} is no JSON: {error}") from error
    lists = content if isinstance(content, dict) else {}
    if missing := [part for part in _PARTS if not isinstance(lists.get(part), list)]:
        raise ValueError(
            f"json_file={str(file)!r} is not in COCO's format: it has no list {missing}, of "
            f"{', '.join(_PARTS)}."
        )
    return lists


def _check_files(file: Path, folder: Path, paths: list[str]) -> None:
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        shown = "\n".join(missing[:_NAMED] + ["..."] * (len(missing) > _NAMED))
        raise ValueError(
            f"{len(missing)} of {len(paths)} images of {str(file)!r} are not in {str(folder)!r}. "
            f"Pass the folder to which its file names are relative. Missing:\n{shown}"
        )


# ------------------------------------------------------------------------------ scores


def coco_scores(
    y_true: Sequence[Mapping[str, Any]], y_pred: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Compute COCO's average precision of predicted boxes, by `pycocotools`.

    Needs ``pip install '.[detection]'``.

    Parameters
    ----------
    y_true : sequence of n dicts
        `boxes` (k, 4), x1, y1, x2, y2 in pixels, and `labels` (k,) of an image.
    y_pred : sequence of n dicts
        The same and `scores` (k,), as `FineTunedDetector.predict` returns them.

    Returns
    -------
    dict
        `map`, the mean over the categories of `y_true` and over ten thresholds of intersection
        over union, 0.5 to 0.95; `map_50` and `map_75`, at one threshold; `mar_100`, the mean
        recall of at most 100 boxes an image, each 0 to 1; and `map_per_class`, a dict from
        category to its own average precision.

    Raises
    ------
    ValueError
        If there are no true boxes, or the lengths differ.

    References
    ----------
    Lin et al., Microsoft COCO: common objects in context, ECCV 2014;
    https://cocodataset.org/#detection-eval.

    Examples
    --------
    >>> from sktransfer.metrics import coco_scores
    >>> y_true = [{"boxes": [[10, 10, 50, 40]], "labels": ["cat"]}]
    >>> y_pred = [{"boxes": [[10, 10, 50, 41]], "labels": ["cat"], "scores": [0.9]}]
    >>> round(coco_scores(y_true, y_pred)["map_50"], 3)
    1.0
    """
    load_optional("pycocotools", "coco_scores", "'.[detection]'")
    from pycocotools.cocoeval import COCOeval

    if len(y_true) != len(y_pred):
        raise ValueError(f"y_true has {len(y_true)} images, y_pred has {len(y_pred)}.")
    labels = [label for y in y_true for label in np.asarray(y["labels"]).tolist()]
    if not labels:
        raise ValueError("y_true has no boxes, so there is no precision to average.")
    numbers = {label: i for i, label in enumerate(dict.fromkeys(labels), 1)}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth = _dataset(y_true, numbers)
        evaluation = COCOeval(truth, _dataset(y_pred, numbers), "bbox")
        evaluation.params.catIds = list(numbers.values())
        evaluation.params.imgIds = list(range(1, len(y_true) + 1))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # (thresholds, recalls, categories, areas, maximal detections): all areas, 100 detections.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    stats = evaluation.stats
    per_class = {label: float(precision[:, :, i - 1].mean()) for label, i in numbers.items()}
    names = {"map": stats[0], "map_50": stats[1], "map_75": stats[2], "mar_100": stats[8]}
    return {**{name: float(value) for name, value in names.items()}, "map_per_class": per_class}


def _dataset(y: Sequence[Mapping[str, Any]], numbers: Mapping[Any, int]) -> Any:
    """Make the object that `pycocotools` evaluates, of what it would read from a file."""
    from pycocotools.coco import COCO

    entries: list[dict[str, Any]] = []
    for image, objects in enumerate(y, 1):
        boxes = np.asarray(objects["boxes"], float).reshape(-1, 4)
        scores = objects.get("scores", np.ones(len(boxes)))
        for box, label, score in zip(
            boxes.tolist(), np.asarray(objects["labels"]).tolist(), scores, strict=True
        ):
            x1, y1, x2, y2 = box
            width, height = x2 - x1, y2 - y1
            if label in numbers:  # what is not in the truth has no precision
                entries.append(
                    {
                        "id": len(entries) + 1,
                        "image_id": image,
                        "category_id": numbers[label],
                        "bbox": [x1, y1, width, height],
                        "area": width * height,
                        "iscrowd": 0,
                        "score": float(score),
                    }
                )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i} for i in range(1, len(y) + 1)],
        "annotations": entries,
        "categories": [{"id": number} for number in numbers.values()],
    }
    coco.createIndex()
    return coco
