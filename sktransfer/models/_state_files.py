"""Files of weights: found, recognised by their content, and read without running their code."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from sktransfer.io._files import open_regular

# Under which the tensors of a checkpoint lie; of two of them, the first is taken. Averages over
# the steps of a training, and teachers, come first: they are what was meant to be used.
_CONTAINERS = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema_model", "ema", "teacher"),
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module"),
    *("weights", "params", "shadow", "backbone", "encoder", "student"),
)
_DEEPEST = 4  # containers in containers
_MOST_SHARDS = 1024
_LARGEST_INDEX = 2**26  # bytes: a name and a file for each tensor
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
INDEX = ".index.json"  # ends the name of a file that lists shards
_STARTS = {  # of files that hold something else
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as Keras saves its weights",
    b"\x93NUMPY": "an array of NumPy",
    b"GGUF": "a GGUF file, as language models are quantised to",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"version https://git-lfs": "a pointer of git-lfs, not the file itself: run `git lfs pull`",
    b"# xet version": "a pointer of xet, not the file itself: download the file from its hub",
}
_MEMBERS = {  # of ZIP archives
    "constants.pkl": "a program of TorchScript: load it by torch.jit.load and pass the module",
    ".weights.h5": "a model of Keras",
    ".npy": "an archive of NumPy's arrays",
    "serialized_exported_program.json": "a program of torch.export",
    "models/model.json": "a program of torch.export",
    "archive_format": "a program of torch.export",
    "schema.json": "a file of skops, as sktransfer.load_model reads",
}
_SAVE = "Save the tensors alone: torch.save(network.state_dict(), path)."

# ------------------------------------------------------------------------------ paths


def weights_path(weights: Any) -> Path | None:
    """Return the file that `weights` names, or None if it is no path."""
    if not _is_path(weights):
        return None
    path = Path(weights).expanduser()
    try:
        open_regular(path).close()
    except FileNotFoundError as error:
        where = "" if path.is_absolute() else f" in {os.getcwd()!r}, from which it is looked for"
        raise ValueError(
            f"weights={str(weights)!r}: there is no such file{where}. If it was moved, name its "
            "new place by set_params(weights='path/to/the/file')."
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"weights={str(weights)!r} can't be read: {reason}.") from error
    return _absolute(path)


def file_beside(weights: Any, name: str) -> Path | None:
    """Return the file to load into a network that has weights; None to leave it as it is.

    Raises
    ------
    ValueError
        If `weights` names published ones, or a file that is not there.
    """
    if weights is None or (isinstance(weights, str) and weights == "default"):
        return None
    if (path := weights_path(weights)) is not None:
        return path
    raise ValueError(
        f"weights={weights!r} names published weights, beside a network ({name}) that has its own. "
        "Pass weights='default' for these, a path to a state dict, or the network by its name."
    )


def portable_weights(weights: Any) -> Any:
    """Return `weights` as another process, in another folder, finds them: files by full path."""
    if not _is_path(weights):
        return weights
    # A text: paths of another system can't be unpickled, and skops does not know them.
    path = Path(weights).expanduser()
    return str(_absolute(path)) if path.exists() else os.fspath(weights)


def _absolute(path: Path) -> Path:
    # A link keeps its name: the hub's client keeps files as links, and shards lie beside these.
    return path.parent.resolve() / path.name


def _is_path(weights: Any) -> bool:
    if isinstance(weights, str):
        return os.sep in weights or Path(weights).suffix != ""
    return isinstance(weights, os.PathLike)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stamp(path: Path) -> tuple[Any, ...]:
    """Return what tells a file of weights apart: place, age and size, those of its shards too."""
    files = [path]
    if is_index(path):
        files += sorted({*shards_of(path).values()})
    stats = [(file, file.stat()) for file in files if file is path or file.exists()]
    return tuple((file, status.st_mtime_ns, status.st_size) for file, status in stats)


# ------------------------------------------------------------------------------ reading


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a file by their names, without running code that it may hold.

    Parameters
    ----------
    path : Path
        A state dict or a checkpoint of torch, of any version; safetensors; or the index of
        shards (`model.safetensors.index.json`). Its content tells, not its suffix.

    Returns
    -------
    dict of str to torch.Tensor
        Of a checkpoint, those of the network, without what lies beside it.

    Raises
    ------
    ValueError
        It says what the file is instead, or what it holds.
    """
    if (shards := shards_of(path) if is_index(path) else None) is None:
        return _tensors(_read_file(path, path), path)
    state: dict[str, torch.Tensor] = {}
    for file in sorted(set(shards.values())):
        state.update(_tensors(_read_file(file, path), path))
    if lost := [name for name in shards if name not in state]:
        raise ValueError(
            f"weights={str(path)!r} lists {lost[0]} in {shards[lost[0]].name}, which does not "
            f"hold it ({len(lost)} of {len(shards)} are lost): the shards belong to another index."
        )
    return state


def shards_of(path: Path) -> dict[str, Path]:
    """Return the file of each tensor that an index lists; all lie in the folder of the index."""
    if path.stat().st_size > _LARGEST_INDEX:
        raise ValueError(f"weights={str(path)!r} is too large for an index of shards.")
    try:
        files = json.loads(path.read_bytes())["weight_map"]
        names = dict(files.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"weights={str(path)!r} is no index of shards, a JSON object with a weight_map of "
            "names to files."
        ) from error
    for file in set(map(str, names.values())):
        if file in ("", ".", "..") or re.search(r"[/\\:\0]", file):
            raise ValueError(
                f"weights={str(path)!r} was refused: it names {file!r}, and shards must lie in the "
                "folder of their index."
            )
    if not names or len(set(map(str, names.values()))) > _MOST_SHARDS:
        raise ValueError(f"weights={str(path)!r} lists no shards, or more than {_MOST_SHARDS}.")
    return {name: path.parent / str(file) for name, file in names.items()}


def _read_file(path: Path, named: Path) -> Any:
    """Read what a file holds; messages call it `named`, unless it is a shard of that."""
    where = f"weights={str(named)!r}" + (f", shard {path.name}" if path != named else "")
    try:
        with open_regular(path) as file:
            start = file.read(512)
    except OSError as error:
        raise ValueError(f"{where} can't be read: {error.strerror or error}.") from error
    if (other := _what_else(start, path)) is not None:
        raise ValueError(f"{where} holds no weights: it is {other}.")
    try:
        if start.startswith(b"PK"):
            _warn_of_checksums(path, where)
        if _is_safetensors(start):
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")
            with open_regular(path) as file:  # given a path, torch believes its suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of both readers a dozen kinds, if a file is damaged or forged
        if "weights_only" in str(error).lower() or "weights only" in str(error).lower():
            raise ValueError(
                f"{where} was refused: it is not a plain state dict, and reading it could run code"
                f"{_named_code(path, error)}. {_SAVE}"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{where} can't be read as a state dict: {reason}") from error


def _is_safetensors(start: bytes) -> bool:
    """Return whether a file begins with a number of bytes and a JSON object."""
    return start[8:9] == b"{"


def _what_else(start: bytes, path: Path) -> str | None:
    """Say what a file is that holds no tensors; None if it may hold some."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "empty"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a page of HTML or XML: what a server says instead of a file that it does not give"
    for known, what in _STARTS.items():
        if start.startswith(known):
            return what
    if start.startswith(b"PK"):
        return _what_archive(path)
    if b"ustar" in start[257:265]:
        return _what_tar(path)
    if start.startswith(b"\x80") or _is_safetensors(start):
        return None
    if text.startswith((b"{", b"[")):
        return f"JSON; an index of shards has a name that ends in {INDEX}"
    kind = "a text" if start.isascii() and b"\0" not in start else "of an unknown format"
    return f"{kind}, beginning with {start[:16]!r}"


def _what_tar(path: Path) -> str | None:
    """Say what a tar archive is, unless torch saved it, as it did in its first versions."""
    try:
        with tarfile.open(path) as archive:
            names = [member.name for member in itertools.islice(archive, 5)]
    except (tarfile.TarError, OSError, ValueError) as error:
        return f"a damaged tar archive ({error})"
    if {"storages", "tensors", "pickle"} & set(names):
        return None
    return f"a tar archive of {', '.join(names[:3]) or 'nothing'}: unpack it first"


def _what_archive(path: Path) -> str | None:
    """Say what an archive is, unless torch saved it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return f"a damaged ZIP archive ({error})"
    names = [member.filename for member in members]
    for ending, what in _MEMBERS.items():
        if any(name.endswith(ending) for name in names):
            return what
    if not any(name.endswith("data.pkl") for name in names):
        return f"a ZIP archive of {', '.join(names[:3]) or 'nothing'}"
    # torch never compresses: what is larger than its file was made to fill the memory.
    if sum(member.file_size for member in members) > path.stat().st_size:
        return "a ZIP archive that unpacks to more than its own size, as torch never saves it"
    return None


def _warn_of_checksums(path: Path, where: str) -> None:
    """Warn of values that are not those that were saved: torch does not look at checksums."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        warnings.warn(
            f"{where}: the checksum of {damaged} is wrong, so the file is damaged, or was saved "
            "without checksums. Download it again, or compare it with what its author says.",
            UserWarning,
            stacklevel=2,
        )


def _named_code(path: Path, error: Exception) -> str:
    """Say which objects of other packages a file holds, as far as torch can tell."""
    try:
        with open_regular(path) as file:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # of older files it can't
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))
    names = sorted({name for name in names if name != "argparse.Namespace"})
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f" (it names {', '.join(names[:3])}{more})"


# ------------------------------------------------------------------------------ checkpoints


def _tensors(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a network, of all that a checkpoint holds."""
    state, left = _innermost(content)
    tensors = {}
    if isinstance(state, Mapping):
        tensors = {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise ValueError(
            f"weights={str(path)!r} holds no state dict (a mapping of names to tensors) but "
            f"{_described(state)}. Save one with torch.save(network.state_dict(), path)."
        )
    if left:
        warnings.warn(f"weights={str(path)!r}: {left}.", UserWarning, stacklevel=2)
    return tensors


def _innermost(content: Any) -> tuple[Any, str]:
    """Return what lies in the containers of a checkpoint, and a line on which were left out."""
    left = ""
    for _ in range(_DEEPEST):
        inner = _containers(content)
        if not inner:
            break
        if len(inner) > 1:
            left = f"{inner[0]!r} is loaded; {' and '.join(map(repr, inner[1:]))} left out"
        content = content[inner[0]]
    return content, left


def _containers(content: Any) -> list[str]:
    """Return the keys of a mapping under which weights lie, the best first."""
    if not isinstance(content, Mapping):
        return []
    known = [key for key in _CONTAINERS if _holds_tensors(content.get(key))]
    if known or any(isinstance(value, torch.Tensor) for value in content.values()):
        return known
    others = [key for key, value in content.items() if _holds_tensors(value)]
    return others if len(others) == 1 else []


def _holds_tensors(value: Any, depth: int = _DEEPEST) -> bool:
    """Return whether a value is a state dict, or a container of one."""
    if not isinstance(value, Mapping) or "param_groups" in value:  # those of an optimizer
        return False
    # Single numbers are counters and decays, such as those of an average, and no weights.
    return any(isinstance(inner, torch.Tensor) and inner.ndim for inner in value.values()) or (
        depth > 0 and any(_holds_tensors(value.get(key), depth - 1) for key in _CONTAINERS)
    )


def _described(state: Any) -> str:
    if not isinstance(state, Mapping):
        return f"a {type(state).__name__}"
    keys = ", ".join(map(repr, list(state)[:5])) or "nothing"
    return f"a {type(state).__name__} of {keys}"


def is_index(path: Path) -> bool:
    """Return whether the name of a file says that it lists shards."""
    return path.name.lower().endswith(INDEX)


def is_one_of_shards(path: Path) -> bool:
    """Return whether the name of a file says that it is one of several."""
    return _SHARD.search(path.name) is not None
