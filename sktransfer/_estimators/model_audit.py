"""The schema of a skops file: what it names and would call, before anything of it is built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

# What a model file may name besides what skops trusts by itself, and the only kind of node in which
# it may: an object that gets its attributes back. All other kinds call what they name.
OURS = {
    "sktransfer._estimators.anomaly.PatchAnomalyDetector": "ObjectNode",
    "sktransfer._estimators.channel_adapter.ChannelAdapter": "ObjectNode",
    "sktransfer._estimators.contrastive.ContrastivePretrainer": "ObjectNode",
    "sktransfer._estimators.detection.FineTunedDetector": "ObjectNode",
    "sktransfer._estimators.fine_tuning.FineTunedClassifier": "ObjectNode",
    "sktransfer._estimators.fine_tuned_regressor.FineTunedRegressor": "ObjectNode",
    "sktransfer._estimators.masked_language.MaskedLanguagePretrainer": "ObjectNode",
    "sktransfer._training.plan.Plan": "ObjectNode",
    "sktransfer._estimators.pretrained.PretrainedFeatureExtractor": "ObjectNode",
    "sktransfer._estimators.zero_shot.ZeroShotClassifier": "ObjectNode",
    "sktransfer._estimators.pretrained_classifier.PretrainedClassifier": "ObjectNode",
}
KNOWN = OURS | {  # what searches and ensembles of scikit-learn hold besides estimators
    "sklearn.metrics._scorer._PassthroughScorer": "ObjectNode",
    "sklearn.model_selection._split.GroupKFold": "ObjectNode",
    "sklearn.model_selection._split.KFold": "ObjectNode",
    "sklearn.model_selection._split.StratifiedGroupKFold": "ObjectNode",
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
_LEVELS = 200  # of schema.json; a search over pipelines has 30
_PARTS = 1_000_000  # values in it
_TYPES = 20_000  # nodes of the kinds below
_OF_TYPES = {"FunctionNode", "ObjectNode", "TypeNode"}  # skops copies a list of names for each
_KEYS = 10_000  # numbers in a set or a dict: people can choose such as share a place in its table
_IDS = 2**60  # below, for the same reason; skops takes addresses
_NOTHING = {
    "__class__": "str",
    "__module__": "builtins",
    "__loader__": "JsonNode",
    "content": "null",
    "is_json": True,
}


class RefusedError(ValueError):
    """Says what is wrong with a file, after its name."""


class Audit:
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
        self._n_types = 0
        self._n_comparisons = 0  # of keys with each other, at worst
        _check_levels(schema)
        if not isinstance(schema, dict) or "__loader__" not in schema:
            raise RefusedError("is not a skops file: its schema.json describes no object.")
        if type(schema.get("protocol")) is not int or schema["protocol"] < _PROTOCOL:
            raise RefusedError(
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
                raise RefusedError("has a node that says nothing but an id.")
            for key, part in value.items():
                if not is_node or key not in ("__id__", "file"):
                    digest.update(repr(key).encode() + self._look(part))
            if is_node:
                self._check(value)
                if self._is_built(value, digest.digest()):
                    self._count(value)
        elif isinstance(value, list):
            for part in value:
                digest.update(self._look(part))
        else:
            digest.update(repr(value).encode())
        return type(value).__name__.encode() + digest.digest()

    def _check(self, node: dict[str, Any]) -> None:
        words = [node.get(key) for key in ("__loader__", "__module__", "__class__")]
        if not all(isinstance(word, str) for word in words):
            raise RefusedError(f"has a node without a kind, a module or a class: {words}.")
        kind, name = words[0], _name(node)
        if kind not in _VALUES or KNOWN.get(name, kind) != kind:
            self.calls.add(name)
        elif kind == "ObjectNode" and not _has_attributes(node):
            self.calls.add(name)  # its __setstate__ gets something else
        elif kind == "JsonNode":
            _value(node)
        elif kind in ("DictNode", "SetNode"):
            self.calls |= _callers_of_keys(node)
        elif kind == "MaskedArrayNode" and not _is_masked_array(node["content"]):
            raise RefusedError("has a masked array of what is no array.")
        elif kind == "NdArrayNode" and name in ("numpy.void", "numpy.bytes_"):
            self.calls.add(name)  # called with a number, they take as many bytes
        elif kind == "NdArrayNode" and node["type"] == "json" and not _is_table(node):
            raise RefusedError("has an array of several dimensions of what is no plain value.")
        if "file" in node:
            self._check_file(node, is_array=kind == "NdArrayNode")

    def _is_built(self, node: dict[str, Any], digest: bytes) -> bool:
        """Return whether an object is built of a node, and not taken from one of the same id."""
        # skops builds one object for one id, and dumps all of it wherever it occurs. Where this is
        # not so, a few nodes could stand for an exponential number, or for others than we saw.
        if (number := node.get("__id__")) is None:
            return True
        if type(number) is not int or not 0 < number < _IDS:  # skops builds each of those of id 0
            raise RefusedError("has an id that is no address.")
        is_new = number not in self._contents
        if self._contents.setdefault(number, digest) != digest:
            raise RefusedError(f"has two objects of one id, {number!r}.")
        return is_new

    def _count(self, node: dict[str, Any]) -> None:
        """Add up what costs much more than its bytes in the file."""
        if node["__loader__"] in _OF_TYPES:
            self._n_types += 1
        elif node["__loader__"] in ("DictNode", "SetNode"):
            self._n_comparisons += _are_texts(node).count(False) ** 2
        if self._n_types > _TYPES:
            raise RefusedError(f"names types, functions or objects more than {_TYPES:,} times.")
        if self._n_comparisons > _KEYS**2:
            raise RefusedError(
                f"has more than {_KEYS:,} numbers as the keys of a dict or a set, or several with "
                "nearly as many."
            )

    def _check_file(self, node: dict[str, Any], is_array: bool) -> None:
        name, owner = node["file"], node.get("__id__")
        if not isinstance(name, str) or name not in self._members:
            raise RefusedError(f"lacks a member of its archive, {name!r}.")
        if name in self._owners and (owner is None or self._owners[name] != owner):
            raise RefusedError(f"reads {name!r} for several objects.")  # each would hold a copy
        self._owners[name] = owner
        self.files.add(name)
        if is_array:
            self.arrays.add(name)


def _check_levels(value: Any) -> None:
    """Check that a value is not so large or deep that those that follow it down take for ever."""
    level, n_parts = [value], 0
    for _ in range(_LEVELS):
        level = [part for item in level for part in _parts(item)]
        n_parts += len(level)
        if n_parts > _PARTS:
            raise RefusedError(f"has a schema.json of more than {_PARTS:,} values.")
        if not level:
            return
    raise RefusedError(f"is nested in more than {_LEVELS} levels.")


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
        raise RefusedError("has a JSON value that is a container.")
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
    """Return the names of what is called with the keys of a dict or a set, but types."""
    types = _key_types(node) if node["__loader__"] == "DictNode" else []
    return {_name(item) for item in types if item["__loader__"] != "TypeNode"}


def _key_types(node: dict[str, Any]) -> list[dict[str, Any]]:
    of = node["key_types"]
    return of["content"] if of["__loader__"] == "ListNode" else [of]


def _are_texts(node: dict[str, Any]) -> list[bool]:
    """Return of each key of a dict or a set whether it is a text."""
    if node["__loader__"] == "SetNode":
        return [_is_text(item) for item in node["content"]]
    return [_name(item) == "builtins.str" for item in _key_types(node)]


def _is_text(node: dict[str, Any]) -> bool:
    return node["__loader__"] == "JsonNode" and isinstance(_value(node), str)


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
