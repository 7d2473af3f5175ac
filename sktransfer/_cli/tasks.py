"""What a comparison is about: images with labels, of a folder or the ELPV solar cells."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sktransfer._cli.classes import refuse_one_class, refuse_to_compare
from sktransfer._cli.groups import groups_of
from sktransfer._cli.words import in_options
from sktransfer._escaping import escape
from sktransfer._splits import check_groups
from sktransfer.io import find_unreadable, list_images, load_image_folder


@dataclass
class Task:
    """Images with labels, under one or several conventions of what the labels are.

    Parameters
    ----------
    name : str
    images : list of str
        Paths.
    targets : dict of str to ndarray of shape (n,)
        The labels under each convention.
    strata : ndarray of shape (n,) or None
        Splits are stratified by label and, if given, by this as well.
    groups : ndarray of int, shape (n,), or None
        Images of one group are never on both sides of a split, which is then stratified by label
        alone.
    published : list of dict
        Figures of others: `convention`, `classifier`, and those of `METRICS` that they give.
    note : str
        Source and licence.
    positive : str or None
        Of two classes, the one that F1 and the ROC curve are about; None for the second.
    names : dict of str to str
        What the labels stand for, of those that are escaped.
    skipped : dict of str to str
        Paths of images that were left out, and why.
    """

    name: str
    images: list[str]
    targets: dict[str, np.ndarray]
    strata: np.ndarray | None = None
    published: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""
    positive: str | None = None
    names: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    groups: np.ndarray | None = None


def read_elpv() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the paths of the ELPV solar cells, their probabilities, and their module types.

    2,624 electroluminescence photographs, 300 × 300 pixels. Deitsch et al., "Automatic
    classification of defective photovoltaic module cells in electroluminescence images", Solar
    Energy 185 (2019). Experts gave each cell a probability p of being defective: 0, 1/3, 2/3 or 1.
    """
    try:
        import elpv_dataset
    except ImportError as error:
        raise ImportError(
            "The ELPV solar cells come with an extra: pip install '.[demo]'. "
            "Or name a folder of your own with one subfolder of images a class."
        ) from error
    data = Path(elpv_dataset.__file__).parent / "data"
    table = [line.split() for line in (data / "labels.csv").read_text().splitlines() if line]
    paths, probability, kinds = zip(*table, strict=True)
    return [str(data / path) for path in paths], np.array(probability, float), np.array(kinds)


def load_elpv() -> Task:
    """Make a task of the ELPV solar cells, by two conventions of which cells are defective."""
    paths, probability, kinds = read_elpv()
    return Task(
        "ELPV solar cells",
        paths,
        {
            f"defective: p > {threshold}": np.where(probability > threshold, "defective", "sound")
            for threshold in (0.5, 0)
        },
        kinds,
        [
            {
                "convention": "defective: p > 0.5",
                "classifier": f"Deitsch et al. 2019, {classifier} (published)",
                "accuracy": accuracy,
                "roc_auc": auc,
            }
            for classifier, accuracy, auc in (
                ("SVM on features", 0.824, 0.885),
                ("fine-tuned VGG-19", 0.884, 0.944),
            )
        ],
        "Images: elpv-dataset, CC BY-NC-SA 4.0. Splits 75/25, stratified by label and module "
        "type. The published figures are of one split of the authors' own, and count p = 1/3 as "
        "positive with weight 0.33.",
        "defective",
    )


def load_folder(folder: str, options: argparse.Namespace | None = None) -> Task:
    """Make a task of a folder with one subfolder of images a class, names escaped to be shown."""
    files, y, skipped = labelled(folder, options)
    refuse_to_compare(folder, y)
    groups, note = check_groups(groups_of(files, options) if options else None, len(files)), ""
    if groups is not None:
        refuse_to_compare(folder, y, groups)
        note = f"{groups.max() + 1:,} groups of images, each on one side of every split."
    shown = {name: escape(name) for name in np.unique(y).tolist()}
    labels = np.array([shown[name] for name in y.tolist()])
    names = {escaped: name for name, escaped in shown.items()}
    name = escape(Path(folder).resolve().name)
    task = Task(name, list(files), {"": labels}, note=note, names=names, skipped=skipped)
    task.groups = groups
    return task


def labelled(
    folder: str, options: argparse.Namespace | None = None
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Return paths and labels of a folder of at least two classes, and what was left out, and why.

    With `skip_unreadable` of the options, that is what can't be read, else nothing.
    """
    skips = options is not None and options.skip_unreadable
    errors = "skip" if skips else None
    with warnings.catch_warnings():
        if skips:  # they are listed at the end
            warnings.filterwarnings("ignore", r"\d+ unreadable image", UserWarning)
        data = load_image_folder(folder, errors=errors, verbose=sys.stderr.isatty())
    files, y, skipped = data.data, data.target, {}
    if options is not None and skips:
        skipped = {file: in_options(why, options) for file, why in data.unreadable.items()}
    refuse_one_class(folder, y)
    return files, y, skipped


def readable(
    files: list[str], options: argparse.Namespace | None
) -> tuple[list[str], dict[str, str]]:
    """Return the files that can be read, and the others with the reason.

    All of them without `skip_unreadable`: then the first that can't be read is an error later.
    """
    if options is None or not options.skip_unreadable:
        return files, {}
    n_jobs = getattr(options, "n_jobs", None)
    reasons = find_unreadable(files, n_jobs=n_jobs, verbose=sys.stderr.isatty())
    skipped = {files[row]: in_options(reason, options) for row, reason in reasons.items()}
    kept = [file for file in files if file not in skipped]
    if not kept:
        file, reason = next(iter(skipped.items()))
        raise ValueError(f"No image of {len(files)} can be read. The first, {file!r}: {reason}")
    return kept, skipped


def files_of(given: Iterable[str]) -> list[str]:
    """Return files, with folders replaced by the images in them."""
    return [
        file for item in given for file in (list_images(item) if os.path.isdir(item) else [item])
    ]
