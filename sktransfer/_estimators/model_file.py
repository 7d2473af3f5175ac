"""Models from skops files, read without trust in whoever wrote them."""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import numpy as np
import skops.io

from sktransfer._escaping import printable
from sktransfer._estimators.model_audit import KNOWN, OURS, Audit, RefusedError
from sktransfer.io._files import open_regular

__all__ = ["load_model"]

_RATIO = 20  # times the size of the file: what it may unpack to
_SMALL = 64 * 2**20  # bytes: it may always unpack to so much
_SCHEMA = 16 * 2**20  # bytes of schema.json, which takes ten times as many once it is parsed
_SHOWN = 20  # names in an error
_PICKLES = (b"\x80", b"\x78", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\0\0", b"\x04\x22\x4d\x18")


def load_model(path: str | os.PathLike, *, trusted: Iterable[str] = ()) -> Any:
    """Load a model from a skops file, without running code that the file may name.

    Parameters
    ----------
    path : str or path
        A file that ``sktransfer fit -o`` wrote, or :func:`skops.io.dump` of an estimator of this
        library, alone or in pipelines, searches and ensembles of scikit-learn. It may unpack to
        64 MiB, or to 20 times its own size if that is more.
    trusted : iterable of str, default=()
        Full names of other types and functions that the file may use, such as the class of a step
        of your own. The error of a refused file lists them. What a trusted name does when it is
        called with what the file says, is not checked: name it only if you trust the author of the
        file.

    Returns
    -------
    estimator
        With ``memory=None``, whatever it was when the file was written: a file can't choose a
        folder that is read and written. Call ``set_params(memory=...)`` to choose one.

    Raises
    ------
    ValueError
        If there is no such file; if it is a pickle, or no skops file; if it is damaged, or unpacks
        to more than its limit; or if it names what is not trusted. Nothing was loaded then.

    See Also
    --------
    skops.io.dump : Write such a file.

    Examples
    --------
    >>> import tempfile
    >>> import skops.io
    >>> from sktransfer import PretrainedClassifier, load_model
    >>> path = tempfile.mkdtemp() + "/model.skops"
    >>> skops.io.dump(PretrainedClassifier(), path)
    >>> load_model(path)
    PretrainedClassifier()
    """
    if isinstance(trusted, (str, bool)):
        raise TypeError(f"trusted must be a list of names, got {trusted!r}: pass trusted=[...].")
    trusted, path = set(trusted), os.fspath(path)
    try:
        data, calls = _cleaned(path)
        named = set(skops.io.get_untrusted_types(data=data))
        unknown = sorted(((named - KNOWN.keys()) | calls) - trusted)
        if not unknown:
            _check_ours(named & OURS.keys())
            return skops.io.loads(data, trusted=sorted(named & (KNOWN.keys() | trusted)))
    except RefusedError as error:
        raise ValueError(f"{path!r} {error}") from error
    except MemoryError:
        raise
    except ImportError as error:
        raise ValueError(f"{path!r} needs a package that is not here: {error}") from error
    except Exception as error:  # of what is no such file, or is damaged, anything
        raise ValueError(
            f"{path!r} is not a skops file, or it is damaged ({type(error).__name__}: "
            f"{printable(str(error)[:200])}); pass one that `sktransfer fit -o` or skops.io.dump "
            "wrote."
        ) from error
    raise ValueError(_untrusted(path, unknown))


def _untrusted(path: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    shown = ", ".join(
        repr(name[:200]) for name in names[:_SHOWN]
    )  # as repr, since a name may hold control codes
    return (
        f"{path!r} names what could run any code when it is loaded: {shown}{more}. If you trust "
        f"its author, load it in Python, with all of these names in a list: "
        f"sktransfer.load_model({path!r}, trusted=[...])."
    )


def _check_ours(names: Iterable[str]) -> None:
    """Check that names stand for the classes that are defined there, and for nothing else."""
    for name in names:
        module, _, attribute = name.rpartition(".")
        named = getattr(import_module(module), attribute, None)
        if not isinstance(named, type) or f"{named.__module__}.{named.__qualname__}" != name:
            raise RefusedError(f"names {name}, which is no class of this library.")


# ------------------------------------------------------------------------------ the archive


def _cleaned(path: str) -> tuple[bytes, set[str]]:
    """Return a checked copy of a file, uncompressed, and the names of what it would call.

    skops gets this copy: what was checked is what is read, whatever happens to the file.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError as error:
        raise RefusedError("is no such file; pass one that `sktransfer fit -o` wrote.") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise RefusedError(f"can't be read: {reason}.") from error
    with file:
        _check_start(file.read(8))
        with zipfile.ZipFile(file) as archive:
            members = _members(archive, os.fstat(file.fileno()).st_size)
            schema = json.loads(_read(archive, members.pop("schema.json")))
            audit = Audit(schema, members.keys())
            copy = io.BytesIO()
            with zipfile.ZipFile(copy, "w") as clean:
                clean.writestr("schema.json", json.dumps(schema))
                for name in audit.files:
                    member = _read(archive, members[name])
                    if name in audit.arrays:
                        _check_array(name, member)
                    clean.writestr(name, member)
    return copy.getvalue(), audit.calls


def _check_start(start: bytes) -> None:
    if start.startswith(_PICKLES):
        raise RefusedError(
            "is a pickle, as pickle and joblib write it: reading one runs any code that its author "
            "put into it, so load_model does not. Write the model by "
            "skops.io.dump(model, 'model.skops'); read the pickle by joblib.load if you trust its "
            "author."
        )


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Return what is in an archive of so many bytes, if it does not unpack to too much."""
    entries = archive.infolist()
    members = {entry.filename: entry for entry in entries}
    if any(name.endswith("data.pkl") for name in members):
        raise RefusedError(
            "holds a pickle, as torch.save writes it, which can run any code: load_model reads "
            "skops files alone. A state dict goes to an estimator by weights='path/to/file.pth'."
        )
    if "schema.json" not in members:
        raise RefusedError("is not a skops file: it has no schema.json.")
    if len(members) < len(entries):
        raise RefusedError("holds two members of one name.")
    if any(e.flag_bits & 1 or e.compress_type not in (0, zipfile.ZIP_DEFLATED) for e in entries):
        # Others may unpack a few bytes to gigabytes in one step, whatever size they declare.
        raise RefusedError("is encrypted, or compressed by other means than deflate.")
    limit = max(_SMALL, _RATIO * size)
    if (unpacked := sum(entry.file_size for entry in entries)) > limit:
        raise RefusedError(
            f"unpacks from {size / 1e6:,.1f} MB to {unpacked / 1e6:,.0f} MB, and "
            f"{limit / 1e6:,.0f} MB are the limit. If you trust its author, write it again "
            "without compression, as skops.io.dump does by default."
        )
    if (n_bytes := members["schema.json"].file_size) > _SCHEMA:
        raise RefusedError(
            f"has a schema.json of {n_bytes / 1e6:,.0f} MB, and {_SCHEMA / 1e6:.0f} MB are the "
            "limit."
        )
    return members


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Read a member, and not a byte more than it declares."""
    with archive.open(entry) as file:
        return file.read(entry.file_size)  # without a size it may unpack 2 GB before it looks


def _check_array(name: str, data: bytes) -> None:
    """Check that an array is one, and has the bytes that its header promises."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)  # an archive or a pickle has another one
    read = np.lib.format.read_array_header_1_0
    shape: Any
    shape, _, dtype = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
    n_bytes = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or n_bytes != len(data) - file.tell() or (not n_bytes and math.prod(shape)):
        raise RefusedError(
            f"holds a damaged array: {name} says {dtype} {shape} and has "
            f"{len(data) - file.tell():,} bytes."
        )
