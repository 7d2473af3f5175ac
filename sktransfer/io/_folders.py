"""Folders of images: the files below them, and the classes that their subfolders are."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from sklearn.utils import Bunch

from sktransfer.io._decoding import reason_of
from sktransfer.io._files import open_regular
from sktransfer.io._messages import pillow_warnings
from sktransfer.io._unreadable import find_unreadable

# HEIC needs a Pillow plugin: listed so that such photographs are reported, not passed over.
_IMAGE_EXTENSIONS = tuple(
    ".apng .avif .bmp .dib .gif .heic .heif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm"
    " .tga .tif .tiff .webp".split()
)
# What file managers, archives and disks leave behind, in lower case.
_OF_THE_SYSTEM = {
    *("thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"),
    *("lost+found", "system volume information"),
}
# What people call the parts of a data set.
_SPLITS = (
    "train training trainval val valid validation dev test testing eval evaluation holdout".split()
)


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
    extensions = tuple(extensions or _IMAGE_EXTENSIONS)
    names = _category_names(Path(path), categories, extensions)
    files = {name: _images_in(path, name, extensions) for name in names}
    if categories is None:
        _refuse_splits(path, files)
        _report_beside(_images_beside(path, extensions), path)
    unreadable = _find_unreadable([*chain(*files.values())], errors, verbose)
    _report(unreadable, errors)
    kept = {name: [file for file in files[name] if file not in unreadable] for name in names}
    names = [name for name in names if kept[name]]
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
    _check_folder(Path(path), "pass a folder of images.")
    paths = _images_in(path, "", _IMAGE_EXTENSIONS)
    if errors is not None:
        unreadable = _find_unreadable(paths, errors, verbose)
        _report(unreadable, errors)
        paths = [file for file in paths if file not in unreadable]
    if not paths:
        raise ValueError(
            f"No image in {os.fspath(path)!r}: looked for {'readable ' * (errors is not None)}"
            f"files that end in {', '.join(_IMAGE_EXTENSIONS)}."
        )
    return paths


def _category_names(
    folder: Path, categories: Sequence[str] | None, extensions: tuple[str, ...]
) -> list[str]:
    _check_folder(folder, "pass the folder that holds the categories.")
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and not _is_hidden(f.name))
    if categories is None:
        _report_dead_links(str(folder), [f.name for f in folder.iterdir()], extensions)
    if not names:
        beside = _images_beside(folder, extensions)
        hint = f"; {_counted(beside)} without one: list_images lists such"
        raise ValueError(
            f"{str(folder)!r} has no category folders: images are expected as "
            f"{str(folder / 'category' / 'image.jpg')!r}{hint if beside else ''}."
        )
    missing = sorted(set(categories or []) - set(names))
    if missing:
        raise ValueError(f"{str(folder)!r} has no categories {missing}; it has {names}.")
    return names if categories is None else [name for name in names if name in categories]


def _check_folder(folder: Path, remedy: str) -> None:
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{str(folder)!r} {reason}: {remedy}")


def _images_in(path: str | os.PathLike, name: str, extensions: tuple[str, ...]) -> list[str]:
    """Return the sorted images of a folder in `path`, and of the folders and links below it."""

    def refuse(error: OSError) -> None:  # os.walk would pass over what it can't list
        raise ValueError(f"The folder {error.filename!r} cannot be listed: {error}") from error

    top = os.path.join(path, name)
    starts = Path(os.path.realpath(path)), Path(os.path.realpath(top))
    above = {str(folder) for start in starts for folder in (start, *start.parents)}
    seen: dict[str, set[str]] = {}  # real paths of the folders listed for each folder of `path`
    paths = []
    for root, folders, files in os.walk(top, onerror=refuse, followlinks=True):
        # Folders before links, by which one may be met again.
        folders.sort(key=lambda folder: (os.path.islink(os.path.join(root, folder)), folder))
        kept = []
        for folder in folders:
            part = os.path.relpath(os.path.join(root, folder), path).split(os.sep)[0]
            listed = seen.setdefault(part, {*above})
            real = os.path.realpath(os.path.join(root, folder))
            if not _is_hidden(folder) and real not in listed:
                listed.add(real)
                kept.append(folder)
        folders[:] = kept
        paths += [os.path.join(root, file) for file in files if _is_image(file, extensions)]
        _report_dead_links(root, files, extensions)
    return sorted(paths)


def _is_image(name: str, extensions: tuple[str, ...]) -> bool:
    return not _is_hidden(name) and name.lower().endswith(extensions)


def _is_hidden(name: str) -> bool:
    return name[0] == "." or name.lower() in _OF_THE_SYSTEM


def _images_beside(folder: str | os.PathLike, extensions: tuple[str, ...]) -> list[str]:
    """Return the names of images that lie in the folder itself."""
    return sorted(
        f.name for f in Path(folder).iterdir() if _is_image(f.name, extensions) and not f.is_dir()
    )


def _refuse_splits(path: str | os.PathLike, files: dict[str, list[str]]) -> None:
    """Raise a `ValueError` if the categories are the parts of a data set, and hold its classes."""
    classes = {
        name: _first_folders(of_folder, os.path.join(path, name))
        for name, of_folder in files.items()
    }
    with_images = [name for name, of_folder in files.items() if of_folder]
    if not all(name.lower() in _SPLITS for name in with_images):
        return
    met = Counter(name for folders in classes.values() for name in folders)
    if max(map(len, classes.values())) < 2 and max(met.values(), default=0) < 2:
        return  # folders of one class each may be what they are called
    part = max(with_images, key=lambda name: (name.lower().startswith("train"), len(classes[name])))
    raise ValueError(
        f"{os.fspath(path)!r} holds the parts {with_images} of a data set, and its classes, "
        f"{_counted(sorted(met), 'folders')}, lie inside of them. Load one part, as in "
        f"load_image_folder({os.path.join(path, part)!r}); if the parts are the classes, pass "
        f"categories={with_images}."
    )


def _first_folders(files: Sequence[str], top: str) -> set[str]:
    """Return the names of the folders in `top` that some of the files lie in."""
    parts = (os.path.relpath(file, top).split(os.sep) for file in files)
    return {first for first, *rest in parts if rest}


def _counted(names: Sequence[str], what: str = "images") -> str:
    """Return a number of names, and the first of them."""
    first = ", ".join([*map(repr, names[:3])] + ["..."] * (len(names) > 3))
    return f"{len(names)} {what if len(names) > 1 else what[:-1]} ({first})"


def _report_beside(names: Sequence[str], path: str | os.PathLike) -> None:
    if names:
        warnings.warn(
            f"{_counted(names)} left out, which lie in {os.fspath(path)!r} beside the class "
            "folders: move each into the folder of its class.",
            stacklevel=3,
        )


def _report_empty(names: Sequence[str], path: str | os.PathLike) -> None:
    if names:
        warnings.warn(
            f"{_counted(names, 'folders')} left out, without an image that can be read: each class "
            f"of {os.fspath(path)!r} needs images in its folder.",
            stacklevel=3,
        )


def _report_dead_links(root: str, names: Sequence[str], extensions: tuple[str, ...]) -> None:
    """Warn of links that lead nowhere; those named as images are reported as unreadable later."""
    others = [name for name in names if not _is_hidden(name) and not _is_image(name, extensions)]
    paths = [os.path.join(root, name) for name in sorted(others)]
    dead = [path for path in paths if os.path.islink(path) and not os.path.exists(path)]
    if dead:
        warnings.warn(
            f"{_counted(dead, 'links')} left out: no file or folder is where the link leads.",
            stacklevel=4,
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
