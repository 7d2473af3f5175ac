"""Folders of classes that are refused before torch is imported, in the words of later."""

from __future__ import annotations

import argparse
import math
import os
import warnings
from collections.abc import Sequence
from itertools import chain

import numpy as np
from PIL import Image

from sktransfer._cli.groups import groups_of
from sktransfer._listing import images_by_category
from sktransfer._splits import check_groups, name_rare_classes


def check_classes(options: argparse.Namespace) -> None:
    """Refuse a folder without classes, or with too few images of one, for what a command does."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            error = None
            _check_listed(options)
        except ValueError as raised:
            error = raised
    if error is None:
        return  # what was said is said again when the folder is read
    for one in said:
        if issubclass(one.category, UserWarning):
            warnings.warn(one.message, stacklevel=2)
    raise error


def _check_listed(options: argparse.Namespace) -> None:
    files = images_by_category(options.folder)
    if options.skip_unreadable:
        return  # only when all are decoded it is known how many are left
    try:
        _refuse_small(files, options)
    except ValueError:
        if all(map(_can_be_opened, chain(*files.values()))):
            raise
        # Those that can't be opened do not count, which is found out when the folder is read.


def _refuse_small(files: dict[str, list[str]], options: argparse.Namespace) -> None:
    names = [name for name, of_class in files.items() if of_class]
    y = np.repeat(names, [len(files[name]) for name in names])
    if not names:
        return
    refuse_one_class(options.folder, y)
    if options.command == "benchmark":
        refuse_to_compare(options.folder, y)
    groups = check_groups(groups_of(chain(*files.values()), options), len(y))
    if options.command == "benchmark":
        refuse_to_compare(options.folder, y, groups)
    if options.command == "fit" and options.test_size:
        refuse_to_hold_out(options.folder, y, groups, options.test_size)


def _can_be_opened(file: str) -> bool:
    try:
        if os.path.isfile(file):
            with Image.open(file):
                return True
    except Exception:  # Pillow's plugins raise almost anything on damaged files
        pass
    return False


# ------------------------------------------------------------------------------ the words


def refuse_one_class(folder: str, y: Sequence[str] | np.ndarray) -> None:
    if len(classes := np.unique(y)) < 2:
        raise ValueError(
            f"{folder!r} has one class only, {str(classes[0])!r}: two are needed, each in a "
            "subfolder of its own."
        )


def refuse_to_compare(folder: str, y: np.ndarray, groups: np.ndarray | None = None) -> None:
    """Refuse classes of too few images or, if they are given, groups to compare classifiers on."""
    if groups is None and (rare := name_rare_classes(y, 8)):
        raise ValueError(
            f"{folder!r}: {rare}. A comparison needs 8 images of each class, and two classes: add "
            "images, or remove the folders of small classes."
        )
    if groups is not None and (rare := name_rare_classes(y, 3, groups)):
        raise ValueError(
            f"{folder!r}: {rare}. A comparison by groups needs 3 of each class, one to score "
            "on and two to tune with: add images, pass smaller --groups, or none."
        )


def refuse_to_hold_out(folder: str, y: np.ndarray, groups: np.ndarray | None, share: float) -> None:
    """Refuse classes that can't be on both sides of a split."""
    if rare := name_rare_classes(y, 2, groups):
        units, more = ("", "Add images") if groups is None else (" groups", "Pass smaller --groups")
        raise ValueError(
            f"{folder!r}: {rare}, but --test-size {share:g} needs 2{units} of each class, "
            f"to train on and to score on. {more}, or pass --test-size 0 to hold out none."
        )
    n_classes, n_test = len(np.unique(y)), math.ceil(share * len(y))
    if groups is None and n_classes > min(n_test, len(y) - n_test):
        raise ValueError(
            f"{folder!r}: --test-size {share:g} trains on {len(y) - n_test} images and "
            f"holds out {n_test}, but both parts need an image of each of the {n_classes} classes. "
            "Pass --test-size 0.5, or 0 to hold out none, or add images."
        )
