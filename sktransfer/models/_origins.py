"""Where the files of a network lie: a folder, or a repository of the hub."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)

from sktransfer.models._hub import check_connection
from sktransfer.models._state_files import INDEX, is_index, shards_of

_HUB = ("hf-hub:", "hf_hub:", "hf:")  # the first two are timm's
FOLDER = "local-dir:"  # timm's, too
_OF_PATHS = (".", "/", "~", "\\")  # begin no name
_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}")
_UNSAFE = ("pytorch_model.bin", f"pytorch_model.bin{INDEX}")
_SOON = 10.0  # seconds in which a hub that gave no answer is not asked again, for the next file
_refusals: dict[str, tuple[float, str]] = {}  # when it gave none, and why
_LARGEST_JSON = 2**24  # bytes: classes are named in it, twenty thousand at most


class Origin(NamedTuple):
    """A folder or a repository with a `config.json` and weights.

    Attributes
    ----------
    name : str
        As it was given, for messages.
    place : str
        Of a folder, its full path; of a repository, ``owner/name``.
    revision : str or None
        Of a repository: a branch, a tag or a commit; None for its main branch.
    is_folder : bool
    """

    name: str
    place: str
    revision: str | None
    is_folder: bool

    def stamp(self) -> Any:
        """Return what tells the content of a folder apart; of the hub, the name does."""
        if not self.is_folder:
            return None
        with os.scandir(self.place) as entries:
            files = ((entry.name, entry.stat()) for entry in entries if entry.is_file())
            listed = sorted((name, s.st_mtime_ns, s.st_size) for name, s in files)
        return self.place, tuple(listed)

    def config(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        return self.json(self.need(_CONFIG))

    def json(self, path: Path) -> dict[str, Any]:
        """Return the object in a JSON file."""
        try:
            if path.stat().st_size > _LARGEST_JSON:
                raise ValueError("it is too large")
            content = json.loads(path.read_bytes())
            if not isinstance(content, dict):
                raise ValueError("it holds no object")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"backbone={self.name!r}: {path} is no JSON file: {error}.") from error
        return content

    def need(self, file: str) -> Path:
        """Return the path of a file, downloaded if it must be; OSError if there is none."""
        path = self.first_of((file,))
        if path is not None:
            return path
        raise OSError(f"backbone={self.name!r} has no file {file} in {self.place!r}.")

    def first_of(self, files: Sequence[str]) -> Path | None:
        """Return the path of the first of some files that is there; None if all are known to lack.

        Raises
        ------
        OSError
            If none is there and the hub could not be asked for one of them.
        """
        unknown = ""
        for file in files:
            path, why = self._look_for(file)
            if path is not None:
                return path
            unknown = unknown or (why and self._missing(file, why))
        if unknown:
            raise OSError(unknown)
        return None

    def find(self, file: str) -> Path | None:
        """Return the path of a file, downloaded if it must be; None if there is no such file."""
        return self._look_for(file)[0]

    def _look_for(self, file: str) -> tuple[Path | None, str]:
        """Return the path of a file if there is one, and why nobody knows whether there is."""
        if self.is_folder:
            path = Path(self.place, file)
            return (path if path.is_file() else None), ""
        why_offline = _why_offline()
        try:
            found = huggingface_hub.hf_hub_download(
                self.place, file, revision=self.revision, local_files_only=bool(why_offline)
            )
            return Path(found), ""
        except HFValidationError as error:
            raise ValueError(
                f"backbone={self.name!r} names no repository of the hub, which is called "
                f"owner/name, nor a folder that is there: {error}"
            ) from error
        except LocalEntryNotFoundError as error:  # and nothing is known of the one on the hub
            if self._is_known_to_lack(file):
                return None, ""
            return None, why_offline or _remember_refusal(error.__cause__ or error)
        except EntryNotFoundError:
            return None, ""
        except Exception as error:  # its client has a dozen ways to say no
            raise OSError(
                f"backbone={self.name!r}: {file} could not be downloaded from {self.place!r} at "
                f"{constants.ENDPOINT} ({_in_a_line(error)}). Check the name. If it is "
                "private or gated, ask for access and log in by `hf auth login`, or set HF_TOKEN."
            ) from error

    def _is_known_to_lack(self, file: str) -> bool:
        """Return whether the client of the hub has noted that the hub has no such file."""
        found = huggingface_hub.try_to_load_from_cache(
            self.place, file, revision=self.revision, cache_dir=constants.HF_HUB_CACHE
        )
        return found is not None and not isinstance(found, str)  # an object that stands for it

    def _missing(self, file: str, why: str) -> str:
        """Say what was looked for without a connection, where, and what can be used instead."""
        folder = os.path.join(constants.HF_HUB_CACHE, "models--" + self.place.replace("/", "--"))
        kept = [name for name in _kept_repositories() if name != self.place]
        others = f"what was downloaded before ({', '.join(kept[:3])}), " if kept else ""
        revision = f" at {self.revision!r}" if self.revision else ""
        option = f" --revision {self.revision}" if self.revision else ""
        return (
            f"backbone={self.name!r} could not be loaded: its {file}{revision} was looked for in "
            f"{folder}, is not there, and could not be downloaded ({why}). Download it on a "
            f"connected machine by `hf download {self.place}{option}`, and copy that folder or "
            f"pass the files as 'local-dir:PATH'. Without a connection also work: {others}"
            "backbone='efficientnet_lite0', which sees images and reads no words."
        )

    def weights(self, file: str | None) -> Path:
        """Return the file of weights: that of a name, else safetensors, with all shards there.

        Raises
        ------
        OSError
            If there is none; it says what there is.
        """
        if file and (Path(file).is_absolute() or ".." in Path(file).parts):
            raise ValueError(
                f"weights={file!r}: there is no such file, and files of {self.name!r} lie in its "
                "folder."
            )
        names = [file] if file else _WEIGHTS
        found = next(filter(None, map(self.find, names)), None)
        if found is None and file is None and self.is_folder:
            others = sorted(Path(self.place).glob("*.safetensors"))
            found = others[0] if len(others) == 1 else None
        if found is None:
            pickles = [name for name in _UNSAFE if self.find(name)]
            if not pickles:
                self.first_of(names)  # the hub may have them, but could not be asked
            raise OSError(self._no_weights(file, pickles))
        if is_index(found):
            for shard in sorted({path.name for path in shards_of(found).values()}):
                self.need(shard)
        return found

    def _no_weights(self, file: str | None, pickles: list[str]) -> str:
        what = f"no file {file}" if file else f"no safetensors ({' or '.join(_WEIGHTS)})"
        remedy = f"weights={pickles[0]!r}, which is read without running code" if pickles else ""
        if self.is_folder and not pickles:
            files = sorted(entry.name for entry in os.scandir(self.place) if entry.is_file())
            what += f", but {', '.join(files[:5]) or 'nothing'},"
        return f"backbone={self.name!r}: there is {what} in {self.place!r}. " + (
            f"Pass {remedy}."
            if remedy
            else "Pass weights='path/to/the/weights', or None for random ones."
        )


def find_origin(name: str) -> Origin | None:
    """Return where the files of a network lie if its name says so.

    Parameters
    ----------
    name : str
        ``hf-hub:owner/name`` or ``hf:owner/name``, with ``@revision`` behind it if there is one;
        ``hf:`` or ``local-dir:`` and a folder; or a folder. Known names of networks are not
        asked for here.

    Raises
    ------
    ValueError
        If there is no such folder, or no `config.json` in it.
    """
    prefix = next((each for each in (*_HUB, FOLDER) if name.startswith(each)), "")
    place = name.removeprefix(prefix)
    folder = os.path.expanduser(place)
    if prefix != "hf-hub:" and os.path.isdir(folder):
        folder = os.path.realpath(folder)
        if not os.path.isfile(os.path.join(folder, _CONFIG)):
            raise ValueError(
                f"backbone={name!r}: there is no {_CONFIG} in {folder!r}, to say what network its "
                "weights are of. Pass the name of the architecture as backbone, and the file of "
                "weights as weights."
            )
        return Origin(name, folder, None, True)
    if prefix == FOLDER or (place.startswith(_OF_PATHS) and prefix != "hf-hub:"):
        raise ValueError(f"backbone={name!r}: {_why_no_folder(folder)}")
    if not prefix:
        return None
    repository, _, revision = place.partition("@")
    return Origin(name, repository, revision or None, False)


def _why_no_folder(folder: str) -> str:
    if os.path.isfile(folder):
        return (
            "it is a file. Pass the folder in which it lies with its config.json, or the name of "
            "the architecture, and the file as weights."
        )
    where = "" if os.path.isabs(folder) else f" in {os.getcwd()!r}, from which it is looked for"
    return f"there is no such folder{where}."


def _why_offline() -> str:
    """Say why the hub can't be asked; an empty text if it can."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    known = _refusals.get(constants.ENDPOINT)
    if known is not None and time.monotonic() - known[0] < _SOON:
        return known[1]
    try:
        check_connection(constants.ENDPOINT)
    except OSError as error:
        why = f"no connection: {error}"
        _refusals[constants.ENDPOINT] = time.monotonic(), why
        return why
    return ""


def _remember_refusal(error: BaseException) -> str:
    """Say what a hub that was reached answered; it is not asked again soon, for other files."""
    why = f"{constants.ENDPOINT} did not give it: {_in_a_line(error)}; try again later"
    _refusals[constants.ENDPOINT] = time.monotonic(), why
    return why


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def _kept_repositories() -> list[str]:
    """Return the names of the repositories that the client of the hub has on disk."""
    try:
        folders = sorted(os.listdir(constants.HF_HUB_CACHE))
    except OSError:
        return []
    return [
        name.removeprefix("models--").replace("--", "/")
        for name in folders
        if name.startswith("models--")
    ]
