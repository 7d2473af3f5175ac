"""Folders of images: the files below them, and the classes that their subfolders are."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from sklearn.utils import Bunch

from sktransfer._listing import (
    IMAGE_EXTENSIONS,
    check_folder,
    counted,
    images_by_category,
    images_in,
)
from sktransfer.io._decoding import reason_of
from sktransfer.io._files import open_regular
from sktransfer.io._messages import pillow_warnings
from sktransfer.io._unreadable import find_unreadable


def load_image_folder(
    path: str | os.PathLike,
    *,
    categories: Sequence[str] | None = None,
    extensions: Sequence[str] | None = None,
    errors: str | None = None,
    verbose: bool = False,
) -> Bunch:
    """List the images of a folder that has one sub-folder for each category.

    The counterpart of `sklearn.datasets.load_files`, but that its labels are the names of the
    categories, which predictions and plots then show. Images are listed, not loaded; the order is
    that of the sorted paths. Files with other extensions are passed over, and so are hidden ones
    and what systems leave behind, such as ``Thumbs.db`` and ``__MACOSX``. Links to folders and
    files are followed, but not those that lead back to a folder above them; a folder that several
    links of a category lead to is listed once.

    Parameters
    ----------
    path : path
        The folder; images may also lie in sub-folders of a category's folder.
    categories : list of str, default=None
        The category folders to use; None means all but the hidden ones, with a warning if images
        lie beside them, or if there is none in a folder, which is then no category.
    extensions : list of str, default=None
        The file extensions of images, in lower case; None means the usual ones.
    errors : {"skip", "raise"}, default=None
        What to do with files that can't be read. None looks at their headers alone, and leaves out
        those without one, with a warning that names them; damage behind the header is an error
        when an estimator decodes the file. With "skip" and "raise", every file is decoded once
        by `sktransfer.io.find_unreadable`: those that can't be are left out in the same way,
        or raise a `ValueError` that names them.
    verbose : bool, default=False
        Show a progress bar while files are decoded.

    Returns
    -------
    sklearn.utils.Bunch
        `data` and `filenames` (the paths, an array of str), `target` (the name of each one's
        category, an array of str), `target_names` (the sorted names) and `unreadable` (a dict of
        the paths that were left out, and why).

    Raises
    ------
    ValueError
        If the folder, one of `categories`, or all images are missing; or if the folders are the
        parts of a data set, such as ``train`` and ``test``, with the categories one level below.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> from PIL import Image
    >>> from sktransfer.io import load_image_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ["cracked/1.png", "intact/1.png", "intact/2.png"]:
    ...         file = pathlib.Path(folder, name)
    ...         file.parent.mkdir(exist_ok=True)
    ...         Image.new("L", (8, 8)).save(file)
    ...     data = load_image_folder(folder)
    >>> data.target_names, data.target.tolist()
    (['cracked', 'intact'], ['cracked', 'intact', 'intact'])
    """
    _check_errors(errors)
    extensions = tuple(extensions or IMAGE_EXTENSIONS)
    files = images_by_category(path, categories, extensions)
    unreadable = _find_unreadable([*chain(*files.values())], errors, verbose)
    _report(unreadable, errors)
    kept = {name: [file for file in of if file not in unreadable] for name, of in files.items()}
    names = [name for name in kept if kept[name]]
    empty = [name for name in kept if not kept[name]]
    if empty and (categories is not None or not names):
        raise ValueError(
            f"No image in {[os.path.join(path, name) for name in empty]}: looked for readable "
            f"files that end in {', '.join(extensions)}."
        )
    _report_empty(empty, path)
    data = np.array([file for name in names for file in kept[name]], dtype=object)
    target = np.repeat(names, [len(kept[name]) for name in names])
    return Bunch(
        data=data, filenames=data, target=target, target_names=names, unreadable=unreadable
    )


def list_images(
    path: str | os.PathLike, *, errors: str | None = None, verbose: bool = False
) -> list[str]:
    """List the image files in a folder and its sub-folders.

    Files with other extensions are passed over, and so are hidden files and folders, and what
    systems leave behind, such as ``Thumbs.db`` and ``__MACOSX``. Links to folders and files are
    followed, but not those that lead back to a folder above them; a folder that several links
    lead to is listed once in each folder of `path`.

    Parameters
    ----------
    path : path
        The folder.
    errors : {"skip", "raise"}, default=None
        What to do with files that can't be read: leave them out, with a warning that names them, or
        raise a `ValueError`. Either decodes every file once. None opens none.
    verbose : bool, default=False
        Show a progress bar while files are decoded.

    Returns
    -------
    list of str
        Paths, sorted.

    Raises
    ------
    ValueError
        If there is no such folder, or no image in it.

    See Also
    --------
    find_unreadable : Which of many files can't be read, and why.

    Examples
    --------
    >>> import pathlib, sklearn.datasets
    >>> from sktransfer.io import list_images
    >>> folder = pathlib.Path(sklearn.datasets.__file__).parent / "images"
    >>> [pathlib.Path(file).name for file in list_images(folder)]
    ['china.jpg', 'flower.jpg']
    """
    _check_errors(errors)
    check_folder(Path(path), "pass a folder of images.")
    paths = images_in(path, "", IMAGE_EXTENSIONS)
    if errors is not None:
        unreadable = _find_unreadable(paths, errors, verbose)
        _report(unreadable, errors)
        paths = [file for file in paths if file not in unreadable]
    if not paths:
        raise ValueError(
            f"No image in {os.fspath(path)!r}: looked for {'readable ' * (errors is not None)}"
            f"files that end in {', '.join(IMAGE_EXTENSIONS)}."
        )
    return paths


def _report_empty(names: Sequence[str], path: str | os.PathLike) -> None:
    if names:
        warnings.warn(
            f"{counted(names, 'folders')} left out, without an image that can be read: each class "
            f"of {os.fspath(path)!r} needs images in its folder.",
            stacklevel=3,
        )


def _check_errors(errors: str | None) -> None:
    if errors not in (None, "skip", "raise"):
        raise ValueError(f"errors must be None, 'skip' or 'raise', got {errors!r}.")


def _find_unreadable(files: list[str], errors: str | None, verbose: bool) -> dict[str, str]:
    """Return the files that can't be read, and why; None looks at their headers alone."""
    if errors is None:
        return {file: reason for file in files if (reason := _header_error(file))}
    return {files[row]: why for row, why in find_unreadable(files, verbose=verbose).items()}


def _header_error(file: str) -> str:
    """Return why Pillow can't open a file, or nothing if it can."""
    try:
        with pillow_warnings(), open_regular(file) as stream, Image.open(stream):
            return ""  # what Pillow warns of is said when the file is decoded
    except UnidentifiedImageError:
        reason = "not an image that Pillow can read" if os.path.getsize(file) else "empty (0 bytes)"
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files
        reason = reason_of(error)
    return reason


def _report(unreadable: Mapping[str, str], errors: str | None) -> None:
    lines = [f"{file!r}: {reason}" for file, reason in unreadable.items()]
    if lines and errors == "raise":
        raise ValueError(f"{len(lines)} unreadable images:\n" + "\n".join(lines))
    if lines:
        first = "\n".join(lines[:5] + ["..."] * (len(lines) > 5))
        images = "images are" if len(lines) > 1 else "image is"
        warnings.warn(f"{len(lines)} unreadable {images} left out:\n{first}", stacklevel=3)
