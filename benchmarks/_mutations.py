"""Seeds for `fuzz.py`, and what it does to them."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import skops.io
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from sktransfer import FineTunedClassifier, PretrainedFeatureExtractor

# ------------------------------------------------------------------------------ seeds


def images() -> dict[str, bytes]:
    """Small files of several formats and kinds."""
    photo = Image.fromarray(load_sample_images().images[0]).resize((56, 40))
    frames = [photo, photo.rotate(90), photo.rotate(180)]
    grey16 = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {
        "rgb.jpg": (photo, {"exif": exif}),
        "grey.jpg": (photo.convert("L"), {}),
        "cmyk.jpg": (photo.convert("CMYK"), {}),
        "progressive.jpg": (photo, {"progressive": True}),
        "rgb.png": (photo, {}),
        "rgba.png": (photo.convert("RGBA"), {}),
        "palette.png": (photo.quantize(16), {"transparency": 3}),
        "grey16.png": (grey16, {}),
        "bit.png": (photo.convert("1"), {}),
        "raw.tif": (photo, {}),
        "lzw.tif": (photo, {"compression": "tiff_lzw"}),
        "deflate.tif": (photo, {"compression": "tiff_adobe_deflate"}),
        "jpeg.tif": (photo, {"compression": "jpeg"}),
        "fax.tif": (photo.convert("1"), {"compression": "group4"}),
        "grey16.tif": (grey16, {}),
        "float.tif": (Image.fromarray(np.asarray(photo.convert("L")).astype(np.float32) / 255), {}),
        "pages.tif": (photo, {"save_all": True, "append_images": frames}),
        "lossy.webp": (photo, {}),
        "lossless.webp": (photo.convert("RGBA"), {"lossless": True}),
        "animated.webp": (photo, {"save_all": True, "append_images": frames}),
        "still.gif": (photo, {}),
        "animated.gif": (photo, {"save_all": True, "append_images": frames}),
        "rgb.bmp": (photo, {}),
        "palette.bmp": (photo.quantize(16), {}),
    }
    kinds = {"jpg": "JPEG", "tif": "TIFF"}
    files = {}
    for name, (image, options) in found.items():
        buffer = io.BytesIO()
        suffix = name.rpartition(".")[2]
        image.save(buffer, kinds.get(suffix, suffix.upper()), **options)
        files[name] = buffer.getvalue()
    return files


def models() -> dict[str, bytes]:
    """Genuine model files."""
    rows = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), np.uint8)
    labels = np.array(["cat", "dog", "emu"] * 4)
    options: dict[str, Any] = {"image_size": 32, "runtime": "torch"}
    extractor = PretrainedFeatureExtractor(memory=None, **options)
    logistic = make_pipeline(extractor, LogisticRegression())
    search = GridSearchCV(logistic, {"logisticregression__C": [1]}, cv=2)
    found = {
        "head.skops": FineTunedClassifier(unfreeze=0, random_state=0, **options),
        "block.skops": FineTunedClassifier(unfreeze=1, max_epochs=1, random_state=0, **options),
        "svm.skops": make_pipeline(extractor, StandardScaler(), SVC()),
        "search.skops": search,
    }
    return {name: skops.io.dumps(model.fit(rows, labels)) for name, model in found.items()}


# ------------------------------------------------------------------------------ mutations of bytes

INTERESTING = [
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
]


def flip(data: bytearray, chance: random.Random, others: list[bytes]) -> None:
    for _ in range(chance.choice([1, 2, 4, 16, 64])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def cut(data: bytearray, chance: random.Random, others: list[bytes]) -> None:
    del data[chance.randrange(1, max(2, len(data))) :]


def remove(data: bytearray, chance: random.Random, others: list[bytes]) -> None:
    start = chance.randrange(len(data))
    del data[start : start + chance.choice([1, 2, 4, 64, 512])]


def splice(data: bytearray, chance: random.Random, others: list[bytes]) -> None:
    other = chance.choice(others)
    start, place = chance.randrange(len(other)), chance.randrange(len(data))
    piece = other[start : start + chance.choice([4, 16, 256, 4096])]
    data[place : place + chance.choice([0, len(piece)])] = piece


def field(data: bytearray, chance: random.Random, others: list[bytes]) -> None:
    """Write a number where a header has one."""
    kind = chance.choice("BHI<>")
    kind = chance.choice("<>") + (kind if kind in "BHI" else "I")
    size = struct.calcsize(kind)
    place = chance.randrange(min(len(data), chance.choice([64, 256, 2**20])))
    number = chance.choice(INTERESTING) & (256**size - 1)
    data[place : place + size] = struct.pack(kind, number)


def with_checksums(data: bytes) -> bytes:
    """Return a PNG whose chunks have the right checksums, as far as they can be found."""
    found, place = data[:8], 8
    while place + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, place)
        body = data[place + 4 : place + 8 + size]
        found += data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + size
    return found


def mutated(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        if changed:
            chance.choice([flip, flip, field, field, cut, remove, splice])(changed, chance, others)
    found = bytes(changed) or b"\0"
    if found.startswith(b"\x89PNG") and chance.random() < 0.7:
        found = with_checksums(found)
    return found


# ------------------------------------------------------------------------------ model files

NAMES = """
os.system posix.system subprocess.Popen builtins.eval builtins.exec builtins.getattr
builtins.open builtins.map builtins.str builtins.list builtins.dict numpy.ndarray numpy.load
numpy.exp sktransfer._cli.report.prepare sktransfer._optional.import_module
sktransfer._optional.load_optional sktransfer.io._decoding._guarded
sktransfer._cli.cache.Memory sktransfer._cli.main sktransfer.io.os
sktransfer.models._weights.pickle sktransfer._memory.memory.check_memory
sktransfer._memory.store.open_store sktransfer._estimators.fine_tuning.FineTunedClassifier
sktransfer._training.plan.Plan sktransfer.models.Backbone sktransfer.models.register_model
sktransfer._estimators.pretrained.PretrainedFeatureExtractor
sktransfer._memory.store_backend.LmdbStoreBackend joblib.memory.Memory functools.partial
pathlib.PosixPath operator.methodcaller operator.attrgetter collections.OrderedDict
collections.defaultdict sklearn.pipeline.Pipeline sklearn.svm._classes.SVC
sklearn.tree._tree.Tree sklearn.utils._bunch.Bunch
sklearn.preprocessing._function_transformer.FunctionTransformer
numpy.random._generator.Generator sklearn.metrics._scorer._PassthroughScorer
sklearn.linear_model._sgd_fast.Hinge numpy.dtype numpy.ma.MaskedArray
scipy.sparse._matrix.spmatrix numpy.random.mtrand.RandomState torch.load
""".split()
KINDS = """
JsonNode DictNode DefaultDictNode ListNode TupleNode SetNode SliceNode BytesNode BytearrayNode
TypeNode FunctionNode PartialNode MethodNode OperatorFuncNode ObjectNode ConstructorFromReduceNode
NdArrayNode MaskedArrayNode DTypeNode RandomStateNode RandomGeneratorNode SparseMatrixNode LossNode
TreeNode QuantileForestNode CachedNode OtherNode
""".split()
WORDS = [
    "canary",
    "touch canary",
    "mkdir canary",
    "os",
    "system",
    "posix",
    "memory",
    "",
    "__class__",
]


def crafted(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """Return a node of any kind, that names anything, with what its kind needs."""
    kind = "JsonNode" if depth > 3 else chance.choice(KINDS)
    place, _, attribute = chance.choice(NAMES).rpartition(".")
    found = {"__loader__": kind, "__module__": place, "__class__": attribute}
    found |= content_of(kind, found, chance, depth + 1)
    if chance.random() < 0.3:
        found["__id__"] = chance.randrange(1, 5)
    return found


def content_of(
    kind: str, node: dict[str, Any], chance: random.Random, depth: int
) -> dict[str, Any]:
    def inner() -> dict[str, Any]:
        return crafted(chance, depth)

    def some() -> list[dict[str, Any]]:
        return [chance.choice([word, inner])() for _ in range(chance.randrange(3))]

    def word() -> dict[str, Any]:
        found = chance.choice([*WORDS, None, 1, [1], {"memory": "canary"}])
        return plain("Json", "str", json.dumps(found))

    def arguments() -> dict[str, Any]:
        return plain("Tuple", "tuple", some())

    def attributes() -> dict[str, Any]:
        values = {chance.choice(WORDS): word() for _ in range(chance.randrange(4))}
        types = [plain("Type", "str", None) for _ in values]
        if chance.random() < 0.5:
            types = [inner() for _ in values]
        return plain("Dict", "dict", values) | {"key_types": plain("List", "list", types)}

    array = {"type": "numpy", "file": "0.npy"}
    named = {key: node[key] for key in ("__module__", "__class__")}
    makers: dict[str, Any] = {
        "JsonNode": lambda: {"content": word()["content"]},
        "DictNode": lambda: {k: v for k, v in attributes().items() if k not in node},
        "DefaultDictNode": lambda: {"content": {"main": attributes(), "default_factory": inner()}},
        "SliceNode": lambda: {"content": {"start": 1, "stop": 2, "step": word()}},
        "PartialNode": lambda: {
            "content": {
                "func": inner(),
                "args": arguments(),
                "kwds": attributes(),
                "namespace": plain("Json", "str", "null"),
            }
        },
        "MethodNode": lambda: {"content": {"obj": inner() | named, "func": chance.choice(WORDS)}},
        "OperatorFuncNode": lambda: {"__module__": "operator", "attrs": arguments()},
        "ObjectNode": lambda: {"content": chance.choice([attributes, attributes, word, inner])()},
        "ConstructorFromReduceNode": lambda: {"content": arguments()},
        "NdArrayNode": lambda: chance.choice(
            [array, {"type": "json", "content": some(), "shape": arguments()}]
        ),
        "MaskedArrayNode": lambda: {"content": {"data": inner(), "mask": inner()}},
        "RandomStateNode": lambda: {"content": attributes()},
        "RandomGeneratorNode": lambda: {
            "content": {"bit_generator": attributes(), "seed_seq": attributes()}
        },
        "SparseMatrixNode": lambda: {"type": "scipy", "file": "0.npz"},
        "BytesNode": lambda: {"file": "0.npy"},
        "BytearrayNode": lambda: {"file": "0.npy"},
        "DTypeNode": lambda: {"content": inner()},
    }
    for name in ("LossNode", "TreeNode", "QuantileForestNode"):
        makers[name] = lambda: {"__reduce__": {"args": arguments()}, "content": attributes()}
    return makers.get(kind, lambda: {"content": some()})()


def plain(kind: str, name: str, content: Any) -> dict[str, Any]:
    """Return a node of Python's own types."""
    found = {"__loader__": f"{kind}Node", "__module__": "builtins", "__class__": name}
    return found | {"content": content}


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "__loader__" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from nodes(part)


def change_schema(schema: Any, chance: random.Random) -> None:
    """Change a node, or put another one in its place."""
    node = chance.choice(list(nodes(schema)))
    way = chance.randrange(6)
    if way == 0:
        other = crafted(chance)
        node.clear()
        node.update(other)
    elif way == 1:
        place, _, attribute = chance.choice(NAMES).rpartition(".")
        node.update({"__module__": place, "__class__": attribute})
    elif way == 2:
        node["__loader__"] = chance.choice(KINDS)
    elif way == 3:
        other = json.loads(json.dumps(chance.choice(list(nodes(schema)))))
        node.clear()
        node.update(other)
    elif way == 4:
        key = chance.choice(list(node))
        node[key] = chance.choice([None, 1, "canary", [], {}, -1, crafted(chance)])
    elif isinstance(node.get("content"), dict) and node["__loader__"] == "DictNode":
        key = chance.choice(
            ["memory", "backbone", "_trainer", "augment", "_state", "steps", "classes_"]
        )
        node["content"][key] = crafted(chance)


def model_file(seed: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    """Return a damaged or crafted model file."""
    way = chance.randrange(4)
    if way == 0:
        return mutated(seed, chance, others)
    with zipfile.ZipFile(io.BytesIO(seed)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    schema = json.loads(members.pop("schema.json"))
    if way == 1:
        schema = {**crafted(chance), "protocol": chance.choice([2, 2, 2, 1, 0])}
        arrays = list(members.values())
        members = {"0.npy": chance.choice(arrays), "0.npz": chance.choice(others)}
    elif way == 2:
        for _ in range(chance.choice([1, 1, 2, 5])):
            change_schema(schema, chance)
    else:
        name = chance.choice(list(members))
        members[name] = mutated(members[name], chance, others)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression=chance.choice([0, 8])) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr("schema.json", json.dumps(schema))
    return buffer.getvalue()
