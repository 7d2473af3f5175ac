"""What can be refused before torch is imported, which takes seconds."""

from __future__ import annotations

import argparse
import mimetypes
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from sktransfer._cli.groups import check_groups_option
from sktransfer._escaping import printable

_EPOCHS = 10  # of a fine-tuned network
_LONGEST = 1000  # characters; a longer one is no path, but an image given as text
_SUFFIXES = {
    "fit": (".skops",),
    "export": (".onnx", ".xml"),
    "embed": (".parquet", ".csv"),
    "rank": (".csv",),
}
_SMALLEST = {
    "splits": 1,
    "cv": 2,
    "k": 1,
    "max_epochs": 0,
    "image_size": 1,
    "max_pixels": 1,
    "seed": 0,
}


def check(options: argparse.Namespace) -> None:
    """Refuse wrong numbers, and files and folders that are missing or can't be written."""
    if empty := [name for name, value in vars(options).items() if value == ""]:
        name = empty[0].upper() if empty[0] in ("folder", "model") else option(empty[0])
        raise ValueError(f"{name} is empty: pass a value. Is a variable of the shell not set?")
    for name, smallest in _SMALLEST.items():
        value = getattr(options, name, None)
        if value is not None and value < smallest:
            raise ValueError(f"{option(name)} must be at least {smallest}, got {value}.")
    if getattr(options, "n_jobs", None) == 0:
        raise ValueError("--n-jobs must not be 0: pass a number of threads, or leave it out.")
    share = getattr(options, "test_size", None)
    if share is not None and not 0 <= share < 1:
        raise ValueError(
            f"--test-size {share:g} is not a share of the images: pass 0 for none, or a number "
            "below 1."
        )
    _check_inputs(options)
    _check_outputs(options)


def option(parameter: str) -> str:
    """Return the option of a parameter's name."""
    return "-k" if parameter == "k" else "--" + parameter.replace("_", "-")


def announcement(options: argparse.Namespace) -> str:
    """Return what `benchmark` is going to do, and about how long it takes."""
    n_images = _n_images(options.folder) if options.folder else 2624
    networks = options.backbone or ["efficientnet_lite0"]
    depths = (options.depths or "0,1,2,4,8").split(",") if options.depths or options.depth else []
    what = (
        f"{counted(len(depths), 'depth')} of fine-tuning"
        if depths
        else "classifiers on frozen features"
    )
    seconds = _seconds(n_images, networks, len(depths), options)
    said = (
        f"comparing {what}: {counted(n_images, 'image')}, {', '.join(map(printable, networks))}, "
        f"{counted(options.splits, 'split')}; about {_in_words(seconds)}, without a GPU"
    )
    return textwrap.fill(said, 80, break_on_hyphens=False)


def _n_images(folder: str) -> int:
    """Count what may be an image by its name, in the folders of the classes."""
    inside = (
        name
        for root, _, names in os.walk(folder)
        if root != folder and not _is_hidden(os.path.relpath(root, folder))
        for name in names
    )
    kinds = (mimetypes.guess_type(name, strict=False)[0] for name in inside if name[0] != ".")
    return sum(kind is not None and kind.startswith("image/") for kind in kinds)


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in Path(path).parts)


def counted(n: int, what: str) -> str:
    """Return a number and what it counts, with an s unless it is one."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def _seconds(n: int, networks: Sequence[str], n_depths: int, options: argparse.Namespace) -> float:
    """Return roughly how long a comparison takes, by what it took on two idle cores."""
    speeds = [100 if name.startswith("efficientnet_lite") else 15 for name in networks]  # images/s
    n_fits = options.splits * (1 if options.folder or n_depths else 2)
    fits = n_fits * len(networks) * (1 + 5 * (n / 2624) ** 1.5)
    epochs = n_fits * n_depths * _EPOCHS if n_depths else 0
    embedding = sum(n / speed * (1 + epochs) for speed in speeds)
    return 15 + (embedding + fits) * 2 / (os.cpu_count() or 2)


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.0f} hours"


def _check_inputs(options: argparse.Namespace) -> None:
    if (model := getattr(options, "model", None)) and not os.path.exists(model):
        raise ValueError(
            f"{model!r} is no such file; pass one that `sktransfer fit -o` or `benchmark "
            "--save-best` wrote."
        )
    for file in getattr(options, "files", None) or ():
        if len(file) < _LONGEST and not os.path.lexists(file):
            raise ValueError(f"{file!r} does not exist: pass files or folders of images.")
    if groups := getattr(options, "groups", None):
        if not options.folder:
            raise ValueError("--groups is about images of your own: name their FOLDER as well.")
        check_groups_option(groups)
    if options.command == "cache" or not (folder := getattr(options, "folder", None)):
        return
    if not os.path.isdir(folder):
        reason = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
        is_any = options.command in ("audit", "embed", "similar")
        what = "of images" if is_any else "that holds a folder for each class"
        raise ValueError(f"{folder!r} {reason}: pass the folder {what}.")
    if (test := getattr(options, "test", None)) and not os.path.isdir(test):
        raise ValueError(f"--test {test!r} is no folder: pass that of the test images.")
    if options.command in ("fit", "rank", "benchmark"):
        from sktransfer._cli.classes import check_classes  # takes a second, which `--help` has not

        check_classes(options)


def _check_outputs(options: argparse.Namespace) -> None:
    if (output := getattr(options, "output", None)) and options.command in _SUFFIXES:
        check_output(output, _SUFFIXES[options.command])
    elif output and os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"{output!r} is a file; name a folder for the report.")
    if options.command == "export" and options.precision and Path(options.output).suffix != ".xml":
        raise ValueError(
            f"--precision {options.precision} is for OpenVINO: name a FILE.xml. FILE.onnx computes "
            "in float32."
        )
    if page := getattr(options, "html", None):
        check_output(page, (".html",))
    if best := getattr(options, "save_best", None):
        check_output(best, (".skops",))
    if (memory := getattr(options, "memory", None)) and os.path.isfile(memory):
        raise ValueError(f"--memory {memory!r} is a file; name a folder.")


def check_output(path: str, suffixes: Sequence[str]) -> str:
    """Return a file's suffix; refuse what can't be written, before any work."""
    file = Path(path)
    if file.suffix not in suffixes:
        raise ValueError(f"{path!r} must end in {' or '.join(suffixes)}.")
    if not file.parent.is_dir():
        raise ValueError(f"There is no folder {str(file.parent)!r} to write {file.name!r} to.")
    if file.is_dir():
        raise ValueError(f"{path!r} is a folder; name a file.")
    return file.suffix
