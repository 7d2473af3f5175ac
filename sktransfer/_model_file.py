"""Models from skops files, read without trust in whoever wrote them."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import skops.io

__all__ = ["load_model"]

# What a model file may name besides what skops trusts by itself, and the only kind of node in which
# it may: an object that gets its attributes back. All other kinds call what they name.
_OURS = {
    "sktransfer._contrastive.ContrastivePretrainer": "ObjectNode",
    "sktransfer._detection.FineTunedDetector": "ObjectNode",
    "sktransfer._fine_tuning.FineTunedClassifier": "ObjectNode",
    "sktransfer._fine_tuning.FineTunedRegressor": "ObjectNode",
    "sktransfer._masked_language.MaskedLanguagePretrainer": "ObjectNode",
    "sktransfer._plan.Plan": "ObjectNode",
    "sktransfer._pretrained.PretrainedFeatureExtractor": "ObjectNode",
    "sktransfer._pretrained_classifier.PretrainedClassifier": "ObjectNode",
}
_KNOWN = _OURS | {  # what searches and ensembles of scikit-learn hold besides estimators
    "sklearn.metrics._scorer._PassthroughScorer": "ObjectNode",
    "sklearn.model_selection._split.KFold": "ObjectNode",
    "sklearn.model_selection._split.StratifiedKFold": "ObjectNode",
    "sklearn.utils._bunch.Bunch": "DictNode",
}
# The kinds of nodes that hold values; skops checks what they name. All others build an object by a
# call, get a method of one, or unpack an archive of their own.
_VALUES = {
    *("JsonNode", "DictNode", "ListNode", "TupleNode", "SetNode", "SliceNode", "BytesNode"),
    *("NdArrayNode", "MaskedArrayNode", "DTypeNode", "RandomStateNode", "LossNode"),
    *("ObjectNode", "TypeNode", "FunctionNode"),
}
_PROTOCOL = 2  # of skops 0.11 and later; the nodes of older ones have other rules
_RATIO = 20  # times the size of the file: what it may unpack to
_SMALL = 64 * 2**20  # bytes: it may always unpack to so much
_SCHEMA = 16 * 2**20  # bytes of schema.json, which takes ten times as many once it is parsed
_LEVELS = 200  # of schema.json; a search over pipelines has 30
_SHOWN = 20  # names in an error
_PICKLES = (b"\x80", b"\x78", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x5d\0\0", b"\x04\x22\x4d\x18")
_NOTHING = {
    "__class__": "str",
    "__module__": "builtins",
    "__loader__": "JsonNode",
    "content": "null",
    "is_json": True,
}


class _RefusedError(ValueError):
    """Says what is wrong with a file, after its name."""


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
        unknown = sorted(((named - _KNOWN.keys()) | calls) - trusted)
        if not unknown:
            _check_ours(named & _OURS.keys())
            return skops.io.loads(data, trusted=sorted(named & (_KNOWN.keys() | trusted)))
    except _RefusedError as error:
        raise ValueError(f"{path!r} {error}") from error
    except Exception as error:  # of what is no such file, or is damaged, anything
        raise ValueError(
            f"{path!r} is not a skops file, or it is damaged ({type(error).__name__}: "
            f"{_printable(str(error))}); pass one that `sktransfer fit -o` or skops.io.dump wrote."
        ) from error
    raise ValueError(_untrusted(path, unknown))


def _untrusted(path: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    shown = ", ".join(map(repr, names[:_SHOWN]))  # as repr, since a name may hold control codes
    return (
        f"{path!r} names what could run any code when it is loaded: {shown}{more}. If you trust "
        f"its author, load it in Python, with all of these names in a list: "
        f"sktransfer.load_model({path!r}, trusted=[...])."
    )


def _printable(text: str) -> str:
    """Return a text of a file's author without control codes, and not all of a long one."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200])


def _check_ours(names: Iterable[str]) -> None:
    """Check that names stand for the classes that are defined there, and for nothing else."""
    for name in names:
        module, _, attribute = name.rpartition(".")
        found = getattr(import_module(module), attribute, None)
        if not isinstance(found, type) or f"{found.__module__}.{found.__qualname__}" != name:
            raise _RefusedError(f"names {name}, which is no class of this library.")


# ------------------------------------------------------------------------------ the archive


def _cleaned(path: str) -> tuple[bytes, set[str]]:
    """Return a checked copy of a file, uncompressed, and the names of what it would call.

    skops gets this copy: what was checked is what is read, whatever happens to the file.
    """
    if not os.path.exists(path):
        raise _RefusedError("is no such file; pass one that `sktransfer fit -o` wrote.")
    if not os.path.isfile(path):  # a pipe would block, a device never end
        raise _RefusedError("is no file; pass one that `sktransfer fit -o` wrote.")
    with open(path, "rb") as file:
        _check_start(file.read(8))
        with zipfile.ZipFile(file) as archive:
            members = _members(archive, os.fstat(file.fileno()).st_size)
            schema = json.loads(_read(archive, members.pop("schema.json")))
            audit = _Audit(schema, members.keys())
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
        raise _RefusedError(
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
        raise _RefusedError(
            "holds a pickle, as torch.save writes it, which can run any code: load_model reads "
            "skops files alone. A state dict goes to an estimator by weights='path/to/file.pth'."
        )
    if "schema.json" not in members:
        raise _RefusedError("is not a skops file: it has no schema.json.")
    if len(members) < len(entries):
        raise _RefusedError("holds two members of one name.")
    if any(e.flag_bits & 1 or e.compress_type not in (0, zipfile.ZIP_DEFLATED) for e in entries):
        # Others may unpack a few bytes to gigabytes in one step, whatever size they declare.
        raise _RefusedError("is encrypted, or compressed by other means than deflate.")
    limit = max(_SMALL, _RATIO * size)
    if (unpacked := sum(entry.file_size for entry in entries)) > limit:
        raise _RefusedError(
            f"unpacks from {size / 1e6:,.1f} MB to {unpacked / 1e6:,.0f} MB, and "
            f"{limit / 1e6:,.0f} MB are the limit. If you trust its author, write it again "
            "without compression, as skops.io.dump does by default."
        )
    if (n_bytes := members["schema.json"].file_size) > _SCHEMA:
        raise _RefusedError(
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
        raise _RefusedError(
            f"holds a damaged array: {name} says {dtype} {shape} and has "
            f"{len(data) - file.tell():,} bytes."
        )


# ------------------------------------------------------------------------------ the schema


class _Audit:
    """A look at every node of a schema, before skops builds anything.

    A memory in it is replaced by None.

    Parameters
    ----------
    schema : dict
    members : collection of str
        The other members of the archive.

    Attributes
    ----------
    calls : set of str
        Names of what is called, or built otherwise than by setting the attributes of an object.
    files, arrays : set of str
        The members that the nodes read, and those of them that are arrays.
    """

    def __init__(self, schema: Any, members: Iterable[str]) -> None:
        self.calls: set[str] = set()
        self.files: set[str] = set()
        self.arrays: set[str] = set()
        self._members = set(members)
        self._contents: dict[int, bytes] = {}  # by id, a digest of the node
        self._owners: dict[str, Any] = {}  # of files, the id of the node
        _check_levels(schema)
        if not isinstance(schema, dict) or "__loader__" not in schema:
            raise _RefusedError("is not a skops file: its schema.json describes no object.")
        if type(schema.get("protocol")) is not int or schema["protocol"] < _PROTOCOL:
            raise _RefusedError(
                f"was written by a skops before 0.11 (protocol {schema.get('protocol')!r}), of "
                "which load_model reads no files: write it again."
            )
        self._look(schema)

    def _look(self, value: Any) -> bytes:
        """Check all nodes in a value; return a digest of it, without ids and names of files."""
        digest = hashlib.blake2b(digest_size=16)
        if isinstance(value, dict):
            is_node = "__loader__" in value
            if is_node:
                _forget_memory(value)
            elif "__id__" in value:
                raise _RefusedError("has a node that says nothing but an id.")
            for key, part in value.items():
                if not is_node or key not in ("__id__", "file"):
                    digest.update(repr(key).encode() + self._look(part))
            if is_node:
                self._check(value)
                self._check_id(value, digest.digest())
        elif isinstance(value, list):
            for part in value:
                digest.update(self._look(part))
        else:
            digest.update(repr(value).encode())
        return type(value).__name__.encode() + digest.digest()

    def _check(self, node: dict[str, Any]) -> None:
        words = [node.get(key) for key in ("__loader__", "__module__", "__class__")]
        if not all(isinstance(word, str) for word in words):
            raise _RefusedError(f"has a node without a kind, a module or a class: {words}.")
        kind, name = words[0], _name(node)
        if kind not in _VALUES or _KNOWN.get(name, kind) != kind:
            self.calls.add(name)
        elif kind == "ObjectNode" and not _has_attributes(node):
            self.calls.add(name)  # its __setstate__ gets something else
        elif kind == "JsonNode":
            _value(node)
        elif kind == "DictNode":
            self.calls |= _callers_of_keys(node)
        elif kind == "MaskedArrayNode" and not _is_masked_array(node["content"]):
            raise _RefusedError("has a masked array of what is no array.")
        elif kind == "NdArrayNode" and node["type"] == "json" and not _is_table(node):
            raise _RefusedError("has an array of several dimensions of what is no plain value.")
        if "file" in node:
            self._check_file(node, is_array=kind == "NdArrayNode")

    def _check_id(self, node: dict[str, Any], digest: bytes) -> None:
        # skops builds one object for one id, and dumps all of it wherever it occurs. Where this is
        # not so, a few nodes could stand for an exponential number, or for others than we saw.
        if (number := node.get("__id__")) is None:
            return
        if type(number) is not int or self._contents.setdefault(number, digest) != digest:
            raise _RefusedError(f"has two objects of one id, {number!r}.")

    def _check_file(self, node: dict[str, Any], is_array: bool) -> None:
        name, owner = node["file"], node.get("__id__")
        if not isinstance(name, str) or name not in self._members:
            raise _RefusedError(f"lacks a member of its archive, {name!r}.")
        if name in self._owners and (owner is None or self._owners[name] != owner):
            raise _RefusedError(f"reads {name!r} for several objects.")  # each would hold a copy
        self._owners[name] = owner
        self.files.add(name)
        if is_array:
            self.arrays.add(name)


def _check_levels(value: Any) -> None:
    """Check that a value is not so deep that those that follow it down run out of stack."""
    level = [value]
    for _ in range(_LEVELS):
        level = [part for item in level for part in _parts(item)]
        if not level:
            return
    raise _RefusedError(f"is nested in more than {_LEVELS} levels.")


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _forget_memory(node: dict[str, Any]) -> None:
    """Replace what could name a folder, under the key "memory" of attributes or of any dict."""
    content = node.get("content")
    if node["__loader__"] != "DictNode" or not isinstance(content, dict):
        return
    value = content.get("memory")
    if isinstance(value, dict) and not _is_number(value):
        content["memory"] = dict(_NOTHING)


def _is_number(node: dict[str, Any]) -> bool:
    if node.get("__loader__") == "NdArrayNode":
        kinds = ("int", "uint", "float", "bool")
        return str(node.get("__class__")).startswith(kinds)
    return node.get("__loader__") == "JsonNode" and not isinstance(_value(node), str)


def _value(node: dict[str, Any]) -> Any:
    """Return what a JSON node holds."""
    if isinstance(value := json.loads(node["content"]), (dict, list)):
        raise _RefusedError("has a JSON value that is a container.")
    return value


def _has_attributes(node: dict[str, Any]) -> bool:
    """Return whether an object gets names and values, and no HTML as the link to its page."""
    if (content := node.get("content")) is None:
        return True
    if content["__loader__"] == "JsonNode":
        return _value(content) is None
    return content["__loader__"] == "DictNode" and all(
        name.isidentifier() and not name.startswith("_doc_link") for name in content["content"]
    )


def _callers_of_keys(node: dict[str, Any]) -> set[str]:
    """Return the names of what is called with the keys of a dict, but types."""
    types = node["key_types"]
    items = types["content"] if types["__loader__"] == "ListNode" else [types]
    return {_name(item) for item in items if item["__loader__"] != "TypeNode"}


def _name(node: dict[str, Any]) -> str:
    return f"{node['__module__']}.{node['__class__']}"


def _is_masked_array(content: dict[str, Any]) -> bool:
    return all(content[part]["__loader__"] == "NdArrayNode" for part in ("data", "mask"))


def _is_table(node: dict[str, Any]) -> bool:
    """Return whether a list of objects becomes an array of as many."""
    shape = node["shape"]
    return (shape["__loader__"] == "TupleNode" and len(shape["content"]) == 1) or all(
        item["__loader__"] in ("ListNode", "JsonNode") for item in _nodes_below(node["content"])
    )


def _nodes_below(value: Any) -> Iterator[dict[str, Any]]:
    for part in _parts(value):
        if isinstance(part, dict) and "__loader__" in part:
            yield part
        yield from _nodes_below(part)
