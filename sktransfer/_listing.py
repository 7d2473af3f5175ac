"""Which files of a folder are images, and of which class: by their names, without torch."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# HEIC needs a Pillow plugin: listed so that such photographs are reported, not passed over.
IMAGE_EXTENSIONS = tuple(
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


def images_by_category(
    path: str | os.PathLike,
    categories: Sequence[str] | None = None,
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS,
) -> dict[str, list[str]]:
    """Return the images of each category folder, sorted, none of an empty one.

    Raise a `ValueError` if there is no such folder, or if the folders are the parts of a data set.
    """
    names = _category_names(Path(path), categories, extensions)
    files = {name: images_in(path, name, extensions) for name in names}
    if categories is None:
        _refuse_splits(path, files)
        _report_beside(_images_beside(path, extensions), path)
    return files


def _category_names(
    folder: Path, categories: Sequence[str] | None, extensions: tuple[str, ...]
) -> list[str]:
    check_folder(folder, "pass the folder that holds the categories.")
    names = sorted(f.name for f in folder.iterdir() if f.is_dir() and not _is_hidden(f.name))
    if categories is None:
        _report_dead_links(str(folder), [f.name for f in folder.iterdir()], extensions, 5)
    if not names:
        beside = _images_beside(folder, extensions)
        hint = f"; {counted(beside)} without one: list_images lists such"
        raise ValueError(
            f"{str(folder)!r} has no category folders: images are expected as "
            f"{str(folder / 'category' / 'image.jpg')!r}{hint if beside else ''}."
        )
    missing = sorted(set(categories or []) - set(names))
    if missing:
        raise ValueError(f"{str(folder)!r} has no categories {missing}; it has {names}.")
    return names if categories is None else [name for name in names if name in categories]


def check_folder(folder: Path, remedy: str) -> None:
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"{str(folder)!r} {reason}: {remedy}")


def images_in(path: str | os.PathLike, name: str, extensions: tuple[str, ...]) -> list[str]:
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
        f"{counted(sorted(met), 'folders')}, lie inside of them. Load one part, as in "
        f"load_image_folder({os.path.join(path, part)!r}); if the parts are the classes, pass "
        f"categories={with_images}."
    )


def _first_folders(files: Sequence[str], top: str) -> set[str]:
    """Return the names of the folders in `top` that some of the files lie in."""
    parts = (os.path.relpath(file, top).split(os.sep) for file in files)
    return {first for first, *rest in parts if rest}


def counted(names: Sequence[str], what: str = "images") -> str:
    """Return a number of names, and the first of them."""
    first = ", ".join([*map(repr, names[:3])] + ["..."] * (len(names) > 3))
    return f"{len(names)} {what if len(names) > 1 else what[:-1]} ({first})"


def _report_beside(names: Sequence[str], path: str | os.PathLike) -> None:
    if names:
        warnings.warn(
            f"{counted(names)} left out, which lie in {os.fspath(path)!r} beside the class "
            "folders: move each into the folder of its class.",
            stacklevel=4,
        )


def _report_dead_links(
    root: str, names: Sequence[str], extensions: tuple[str, ...], stacklevel: int = 4
) -> None:
    """Warn of links that lead nowhere; those named as images are reported as unreadable later."""
    others = [name for name in names if not _is_hidden(name) and not _is_image(name, extensions)]
    paths = [os.path.join(root, name) for name in sorted(others)]
    dead = [path for path in paths if os.path.islink(path) and not os.path.exists(path)]
    if dead:
        warnings.warn(
            f"{counted(dead, 'links')} left out: no file or folder is where the link leads.",
            stacklevel=stacklevel,
        )
