"""Model files: genuine ones load, crafted ones are refused before anything of them is built."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from importlib import import_module

import joblib
import numpy as np
import pytest
import skops.io
import torch
from networks import small
from PIL import Image
from sklearn.base import BaseEstimator
from sklearn.ensemble import VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import sktransfer
from sktransfer import (
    ContrastivePretrainer,
    FineTunedClassifier,
    FineTunedDetector,
    FineTunedRegressor,
    MaskedLanguagePretrainer,
    PatchAnomalyDetector,
    PretrainedClassifier,
    PretrainedFeatureExtractor,
    load_model,
    register_model,
)
from sktransfer._cli import main
from sktransfer._estimators.model_audit import OURS, Audit
from sktransfer._training.detector_networks import load_detector
from sktransfer.models._registry import Backbone, _builders
from sktransfer.transforms import Preprocessing

RNG = np.random.default_rng(0)
X = RNG.integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
Y = np.array(["cat", "dog"] * 6)


@pytest.fixture(autouse=True)
def _small_is_a_name():
    register_model("small", lambda weights: Backbone(small(), Preprocessing((32, 32))))
    yield
    del _builders["small"]


def classifier(**options):
    defaults = {"backbone": "small", "max_epochs": 1, "random_state": 0}
    return FineTunedClassifier(**{**defaults, **options})


# ------------------------------------------------------------------------------ genuine files


GENUINE = {
    "head": lambda: classifier(unfreeze=0).fit(X, Y),
    "blocks": lambda: classifier(unfreeze=["body.1"], augment="flip").fit(X, Y),
    "all": lambda: classifier(unfreeze="all", class_weight={"cat": 1, "dog": 2}).fit(X, Y),
    "auto": lambda: classifier(unfreeze="auto").fit(X, Y),
    "objects": lambda: classifier(unfreeze=0).fit(X, Y.astype(object)),
    "several labels": lambda: classifier().fit(X, np.eye(2, dtype=int)[[0, 1] * 6]),
    "numbers": lambda: FineTunedRegressor("small", max_epochs=1).fit(X, np.arange(12.0)),
    "state": lambda: classifier(random_state=np.random.RandomState(0)).fit(X, Y),
    "as it is": lambda: PretrainedClassifier(image_size=32, runtime="torch"),
    "svm": lambda: make_pipeline(PretrainedFeatureExtractor("small"), StandardScaler(), SVC()).fit(
        X, Y
    ),
    "search": lambda: GridSearchCV(classifier(), {"unfreeze": [0, 1, "all"]}, cv=2).fit(X, Y),
    "search with a splitter": lambda: GridSearchCV(
        make_pipeline(PretrainedFeatureExtractor("small"), LogisticRegression()),
        {"logisticregression__C": [1, 10]},
        cv=KFold(2, shuffle=True, random_state=0),
    ).fit(X, Y),
    **{
        f"search with {type(cv).__name__}": lambda cv=cv: GridSearchCV(
            classifier(unfreeze=0), {"dropout": [0.0]}, cv=cv
        ).fit(X, Y, groups=np.arange(12) // 2 % 4)
        for cv in (GroupKFold(2), StratifiedGroupKFold(2))
    },
    "vote": lambda: VotingClassifier([("a", classifier(unfreeze=0)), ("b", classifier())]).fit(
        X, Y
    ),
    "anomalies": lambda: PatchAnomalyDetector("small", random_state=0).fit(X),
    "on a contrastive one": lambda: classifier(
        backbone=ContrastivePretrainer("small", max_epochs=1, random_state=0).fit(X), unfreeze=0
    ).fit(X, Y),
}


@pytest.mark.filterwarnings("ignore:unfreeze='auto'")
@pytest.mark.parametrize("kind", GENUINE)
def test_genuine_models_predict_the_same(kind, tmp_path):
    model = GENUINE[kind]()
    skops.io.dump(model, tmp_path / "model.skops")
    loaded = load_model(tmp_path / "model.skops")
    assert type(loaded) is type(model)
    assert np.array_equal(loaded.predict(X), model.predict(X))


def test_genuine_detectors_and_language_models(tmp_path):
    objects = [{"boxes": np.array([[2, 2, 20, 20.0]]), "labels": np.array(["a"])}]
    detector = FineTunedDetector(
        "small", detector="retinanet", width=64, image_size=64, max_epochs=1, runtime="torch"
    )
    for i, model in enumerate([detector.fit(X[:1], objects), MaskedLanguagePretrainer("nowhere")]):
        skops.io.dump(model, tmp_path / f"{i}.skops", compression=zipfile.ZIP_DEFLATED)
        loaded = load_model(str(tmp_path / f"{i}.skops"))
        assert repr(loaded) == repr(model)
    found = load_model(tmp_path / "0.skops").predict(X[:2])
    assert np.array_equal(found[0]["boxes"], detector.predict(X[:2])[0]["boxes"])


def test_a_long_search_names_few_types(tmp_path):
    """Repeated types share an id; of dicts with numbers, ten large ones are let pass."""
    search = GridSearchCV(LogisticRegression(), {"C": [1]})
    weights = [dict.fromkeys(range(1000), 1.0) for _ in range(10)]
    params = [{"a": i, "b": KFold(3), "c": i} for i in range(2000)]
    search.cv_results_ = {"params": params, "weights": weights}
    skops.io.dump(search, tmp_path / "search.skops")
    with zipfile.ZipFile(tmp_path / "search.skops") as archive:
        schema = archive.read("schema.json")
        audit = Audit(json.loads(schema), archive.namelist())
    assert schema.count(b"TypeNode") > 16_000 and audit._n_types < 2100
    assert len(load_model(tmp_path / "search.skops").cv_results_["params"]) == 2000


def changed(path, name, new):
    """Write a copy of a model's file in which an attribute is another node; return its path."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    root = json.loads(members.pop("schema.json"))
    root["content"]["content"][name] = new
    return write(path.parent / "changed.skops", root, members)


def test_files_without_trained_values_do_not_predict(tmp_path):
    objects = [{"boxes": np.array([[2, 2, 20, 20.0]]), "labels": np.array(["a"])}]
    detector = FineTunedDetector(
        "small", detector="retinanet", width=64, image_size=64, max_epochs=1, runtime="torch"
    )
    path = tmp_path / "model.skops"
    for model in (classifier(unfreeze=0).fit(X, Y), detector.fit(X[:1], objects)):
        skops.io.dump(model, path)
        for state in (table({}), value(None), table({"head.9": value(1.0)})):
            with pytest.raises(ValueError, match=r"trained values.* the file .* is damaged"):
                load_model(changed(path, "_state", state)).predict(X)


def test_damaged_attributes_end_the_command_line_in_one_line(tmp_path, capsys):
    path, photo = tmp_path / "model.skops", str(tmp_path / "photo.png")
    Image.fromarray(X[0]).save(photo)
    skops.io.dump(classifier(unfreeze=0).fit(X, Y), path)
    for name, new in {
        "_state": value(None),
        "plan_": value("text"),
        "callbacks": sequence(value("x"), kind="List"),
        "_n_outputs": value(10**9),
        "classes_": value(None),
        "_shape": value(3),
    }.items():
        assert main(["predict", changed(path, name, new), photo]) == 2, name
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("sktransfer: error: ") and err.count("\n") == 1
        assert "damaged" in err, name
    with pytest.raises(AttributeError):  # in Python, errors stay what they are
        load_model(changed(path, "plan_", value("text"))).predict(X)


def test_the_list_holds_our_estimators_and_nothing_else():
    exported = {getattr(sktransfer, name) for name in sktransfer.__all__}
    estimators = {c for c in exported if isinstance(c, type) and issubclass(c, BaseEstimator)}
    listed = set()
    for name in OURS:
        place, _, attribute = name.rpartition(".")
        found = getattr(import_module(place), attribute)
        assert f"{found.__module__}.{found.__qualname__}" == name and isinstance(found, type)
        listed.add(found)
    assert estimators < listed and {c.__name__ for c in listed - estimators} == {"Plan"}


def test_a_name_that_is_another_class_by_now_is_refused(tmp_path, monkeypatch):
    skops.io.dump(classifier(), tmp_path / "model.skops")
    monkeypatch.setattr(sktransfer._estimators.fine_tuning, "FineTunedClassifier", StandardScaler)
    with pytest.raises(ValueError, match="FineTunedClassifier, which is no class of this library"):
        load_model(tmp_path / "model.skops")


# ------------------------------------------------------------------------------ what runs code


def node(kind, name, **rest):
    place, _, attribute = name.rpartition(".")
    return {"__loader__": kind, "__module__": place, "__class__": attribute, **rest}


def value(of):
    return node("JsonNode", "builtins.str", content=json.dumps(of), is_json=True)


def sequence(*items, kind="Tuple", name=None):
    return node(f"{kind}Node", name or f"builtins.{kind.lower()}", content=list(items))


def table(content, types=None, name="builtins.dict"):
    types = types or [node("TypeNode", "builtins.str") for _ in content]
    return node("DictNode", name, content=content, key_types=sequence(*types, kind="List"))


def estimator(name="sktransfer._estimators.fine_tuning.FineTunedClassifier", **attributes):
    return node("ObjectNode", name, content=table(attributes))


def array(of, file="0.npy"):
    """A node of an array, and its member."""
    buffer = io.BytesIO()
    np.save(buffer, of)
    return node("NdArrayNode", "numpy.ndarray", type="numpy", file=file), {file: buffer.getvalue()}


def write(path, root, members=(), protocol=2, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in dict(members).items():
            archive.writestr(name, data)
        archive.writestr("schema.json", json.dumps({**root, "protocol": protocol}))
    return str(path)


PREPARE = "sktransfer._cli.report.prepare"  # makes the folder that it gets
IMPORT = "sktransfer._optional.import_module"  # not ours, but an attribute of a module of ours
CLF = "sktransfer._estimators.fine_tuning.FineTunedClassifier"
KEY = {"canary": value(1)}
OS = node("ConstructorFromReduceNode", IMPORT, content=sequence(value("os")))
SYSTEM = node("MethodNode", IMPORT, content={"obj": OS, "func": "system"})
BITS = table({"bit_generator": value("seed")})
ARRAY, FILE = array(np.array("canary"))
MASK, OTHER = array(np.array(False), "1.npy")

CODE = {  # root, members, what the error names
    "function": (table(KEY, [node("FunctionNode", PREPARE)]), PREPARE),
    "type": (table(KEY, [node("TypeNode", PREPARE)]), PREPARE),
    "constructor": (
        node("ConstructorFromReduceNode", PREPARE, content=sequence(value("canary"))),
        PREPARE,
    ),
    "method": (table({"mkdir canary": value(1)}, [SYSTEM]), f"{IMPORT}.system"),
    "the reported file": (
        node(
            "ConstructorFromReduceNode",
            "sktransfer.io._decoding._guarded",
            content=sequence(SYSTEM, value("mkdir canary"), value("")),
        ),
        "sktransfer.io._decoding._guarded",
    ),
    "loss": (
        node(
            "LossNode",
            PREPARE,
            __reduce__={"args": sequence(value("canary"))},
            content=table({}),
        ),
        PREPARE,
    ),
    "tree": (
        node(
            "TreeNode",
            "sktransfer._training.plan.Tree",
            __reduce__={"args": sequence(value(1))},
            content=table({}),
        ),
        "sktransfer._training.plan.Tree",
    ),
    "partial": (
        table(
            KEY,
            [
                node(
                    "PartialNode",
                    "sktransfer.partial",
                    content={
                        "func": node("FunctionNode", PREPARE),
                        "args": sequence(),
                        "kwds": table({}),
                        "namespace": value(None),
                    },
                )
            ],
        ),
        "sktransfer.partial",
    ),
    "operator": (
        node("OperatorFuncNode", "operator.methodcaller", attrs=sequence(value("clear"))),
        "operator.methodcaller",
    ),
    "object of another's class": (
        estimator(backbone=node("ObjectNode", "sktransfer._cli.cache.Memory", content=table({}))),
        "sktransfer._cli.cache.Memory",
    ),
    "object of a class of ours": (
        estimator(x=node("ObjectNode", "sktransfer._memory.store_backend.LmdbStoreBackend")),
        "sktransfer._memory.store_backend.LmdbStoreBackend",
    ),
    "dict": (table({}, name="sktransfer._cli.main"), "sktransfer._cli.main"),
    "list": (
        sequence(value("fit"), value("no"), kind="List", name="sktransfer._cli.main"),
        "sktransfer._cli.main",
    ),
    "set": (sequence(kind="Set", name="sktransfer._cli.main"), "sktransfer._cli.main"),
    "tuple": (sequence(name="sktransfer._cli.main"), "sktransfer._cli.main"),
    "array": ({**ARRAY, "__module__": "sktransfer._cli.report", "__class__": "prepare"}, PREPARE),
    "masked array": (
        node("MaskedArrayNode", PREPARE, content={"data": ARRAY, "mask": MASK}),
        PREPARE,
    ),
    "random state": (node("RandomStateNode", "sktransfer._cli.main", content=table({})), "main"),
    "generator": (
        node(
            "RandomGeneratorNode",
            "numpy.random._generator.Generator",
            content={"bit_generator": BITS, "seed_seq": table({})},
        ),
        "numpy.random.seed",
    ),
    "dtype": (node("DTypeNode", "sktransfer._cli.main", content=ARRAY), "sktransfer._cli.main"),
    "bytes": (node("BytesNode", "sktransfer._cli.main", file="0.npy"), "sktransfer._cli.main"),
    "bytearray": (node("BytearrayNode", "builtins.bytearray", file="0.npy"), "builtins.bytearray"),
    "sparse matrix": (
        node("SparseMatrixNode", "scipy.sparse._matrix.spmatrix", type="scipy", file="0.npy"),
        "scipy.sparse._matrix.spmatrix",
    ),
    "defaultdict": (
        node(
            "DefaultDictNode",
            "collections.defaultdict",
            content={"main": table({}), "default_factory": node("TypeNode", PREPARE)},
        ),
        PREPARE,
    ),
    # Of the classes that may be loaded, none may be called, nor a method of one be taken.
    "our class as a constructor": (
        node("ConstructorFromReduceNode", CLF, content=sequence(value("resnet50"))),
        CLF,
    ),
    "our class as a type of keys": (table(KEY, [node("TypeNode", CLF)]), CLF),
    "our class as a list": (sequence(value("a"), kind="List", name=CLF), CLF),
    "our class as a loss": (
        node("LossNode", CLF, __reduce__={"args": sequence(value("a"))}, content=table({})),
        CLF,
    ),
    "a method of our class": (
        node("MethodNode", CLF, content={"obj": estimator(), "func": "fit"}),
        f"{CLF}.fit",
    ),
    "attributes that are no dict": (
        node("ObjectNode", CLF, content=sequence(sequence(value("memory"), value("canary")))),
        CLF,
    ),
    "attributes that are an array": (
        node("ObjectNode", CLF, content={**array(np.array([["memory", "canary"]]))[0]}),
        CLF,
    ),
    "a link for a notebook": (estimator(_doc_link_template=value("javascript:alert(1)")), CLF),
}


@pytest.mark.parametrize("kind", CODE)
def test_no_node_runs_code(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root, name = CODE[kind]
    path = write(tmp_path / "crafted.skops", root, FILE | OTHER)
    with pytest.raises(ValueError, match="could run any code") as error:
        load_model(path)
    assert name in str(error.value) and "trusted=[...]" in str(error.value)
    assert os.listdir() == ["crafted.skops"]


@pytest.mark.parametrize("protocol", [0, 1, 3, -1, True, "2", None])
def test_other_protocols_are_refused(protocol, tmp_path):
    function = {"module_path": PREPARE.rpartition(".")[0], "function": "prepare"}
    root = node("FunctionNode", "numpy.exp", content=function)
    with pytest.raises(ValueError, match="protocol"):
        load_model(write(tmp_path / "crafted.skops", root, protocol=protocol))


def test_the_command_line_refuses_it_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("crafted.skops", CODE["the reported file"][0])
    open("photo.jpg", "w").close()
    assert main(["predict", "crafted.skops", "photo.jpg"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "sktransfer.io._decoding._guarded" in err and len(err.splitlines()) == 1
    assert sorted(os.listdir()) == ["crafted.skops", "photo.jpg"]


class Doubler(BaseEstimator):
    """A step of a user's own."""

    def fit(self, X, y=None):
        return self

    def transform(self, X):
        return 2 * X


def test_a_user_names_what_a_file_may_use(tmp_path):
    pipeline = make_pipeline(PretrainedFeatureExtractor("small"), Doubler(), SVC()).fit(X, Y)
    skops.io.dump(pipeline, tmp_path / "own.skops")
    with pytest.raises(ValueError, match="test_model_files.Doubler") as error:
        load_model(tmp_path / "own.skops")
    (name,) = re.findall(r"loaded: '([^']*)'", str(error.value))
    loaded = load_model(tmp_path / "own.skops", trusted=[name])
    assert np.array_equal(loaded.predict(X), pipeline.predict(X))
    for trusted in (name, True):
        with pytest.raises(TypeError, match="list of names"):
            load_model(tmp_path / "own.skops", trusted=trusted)


def test_names_are_exact(tmp_path):
    root = sequence(estimator(), node("TypeNode", "sktransfer._cli.report.prepare"))
    path = write(tmp_path / "crafted.skops", root)
    for trusted in (["sktransfer"], ["sktransfer."], ["sktransfer._cli.report"], ["*"]):
        with pytest.raises(ValueError, match="could run any code"):
            load_model(path, trusted=trusted)


def test_names_of_a_file_do_not_reach_the_terminal_as_they_are(tmp_path):
    roots = [node("TypeNode", f"os.\x1b]0;{i}\n") for i in range(100)]
    path = write(tmp_path / "crafted.skops", sequence(*roots))
    with pytest.raises(ValueError, match=r"and 80 more") as error:
        load_model(path)
    assert str(error.value).isprintable()
    path = write(tmp_path / "crafted.skops", node("\x1b[2JNode", "os.system"))
    with pytest.raises(ValueError, match="damaged") as error:
        load_model(path)
    assert str(error.value).isprintable()


# ------------------------------------------------------------------------------ no memory


def test_a_file_can_not_choose_a_folder_to_write_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    extractor = PretrainedFeatureExtractor("small", memory=joblib.Memory("cache", verbose=0))
    models = [
        make_pipeline(extractor, SVC(), memory="cache").fit(X, Y),
        classifier(unfreeze=0, memory="cache").fit(X, Y),
    ]
    shutil.rmtree("cache")
    for model in models:
        skops.io.dump(model, "model.skops")
        loaded = load_model("model.skops")
        assert {v for k, v in loaded.get_params().items() if k.endswith("memory")} == {None}
        assert len(loaded.predict(X)) == len(X)
    assert os.listdir() == ["model.skops"]


@pytest.mark.parametrize("place", ["attribute", "shape", "spaces", "array", "path"])
def test_a_memory_by_other_ways(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    skops.io.dump(classifier(unfreeze=0).fit(X, Y), "model.skops")
    with zipfile.ZipFile("model.skops") as archive:
        schema = json.loads(archive.read("schema.json"))
        members = {n: archive.read(n) for n in archive.namelist() if n != "schema.json"}
    attributes = schema["content"]["content"]
    folder = value("cache")
    if place == "spaces":
        folder["content"] = '  "cache"'
    elif place == "array":
        folder, own = array(np.array("cache"), "cache.npy")
        folder["__class__"] = "str_"
        members |= own
    elif place == "path":
        folder = node("ConstructorFromReduceNode", "pathlib.PosixPath", content=sequence(folder))
    if place == "shape":
        shape = attributes["_shape"]
        shape["content"]["memory"] = folder
        shape["key_types"]["content"].append(node("TypeNode", "builtins.str"))
    else:
        attributes["memory"] = folder
    write("model.skops", schema, members)
    assert len(load_model("model.skops").predict(X)) == len(X)
    assert os.listdir() == ["model.skops"]


# ------------------------------------------------------------------------------ bombs


def test_a_bomb_is_refused_by_the_sizes_in_the_archive(tmp_path):
    root, _ = array(np.zeros(1))
    zeros = zlib.compressobj(9, wbits=-15)
    deflated = b"".join(zeros.compress(bytes(2**20)) for _ in range(80)) + zeros.flush()
    path = tmp_path / "bomb.skops"
    write(path, root, {"0.npy": b"\x93NUMPY" + bytes(80 * 2**20)}, compression=8)
    assert path.stat().st_size < 2e5
    with pytest.raises(ValueError, match=r"unpacks from 0\.1 MB to 84 MB, and 67 MB are the limit"):
        load_model(path)
    # One that says it is small: not a byte more than it says is unpacked.
    data = bytearray(write_with(path, root, deflated))
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        measured(lambda: load_model(path), most=60e6)


def write_with(path, root, deflated):
    """An archive whose headers say that a member of megabytes has 100 bytes."""
    write(path, root, {"0.npy": b"x" * 200}, compression=8)
    name = b"0.npy"
    schema = json.dumps({**root, "protocol": 2}).encode()
    parts, central = b"", b""
    for member, body, method, size, check in (
        (name, deflated, 8, 100, zlib.crc32(bytes(100))),
        (b"schema.json", schema, 0, len(schema), zlib.crc32(schema)),
    ):
        sizes = check, len(body), size, len(member), 0
        header = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 0, *sizes)
        central += b"PK\1\2" + struct.pack("<H", 20) + header
        central += struct.pack("<HHHII", 0, 0, 0, 0, len(parts)) + member
        parts += b"PK\3\4" + header + member + body
    end = struct.pack("<HHHHIIH", 0, 0, 2, 2, len(central), len(parts), 0)
    return parts + central + b"PK\5\6" + end


def measured(call, most):
    import tracemalloc

    tracemalloc.start()
    try:
        call()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most, peak


def shared(depth):
    """Two nodes a level that stand for 2 ** depth, by their ids."""
    item = value(1)
    for i in range(depth):
        stub = {**sequence(kind="List"), "__id__": i + 1}
        item = sequence({**sequence(item, kind="List"), "__id__": i + 1}, stub, kind="List")
    return item


def several_of_one_file():
    first, members = array(np.zeros(10))
    return sequence(first, {**first, "__id__": 7}), members


def lying_array():
    root, members = array(np.zeros(10))
    data = members["0.npy"].replace(b"(10,), }" + b" " * 12, b"(10000000000000,), }")
    assert data != members["0.npy"]
    return root, {"0.npy": data}


def nested_archive():
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.zeros(10**6))
    return array(np.zeros(1))[0], {"0.npy": buffer.getvalue()}


def pickled_array():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    return array(np.zeros(1))[0], {"0.npy": buffer.getvalue()}


def square_of_arrays():
    item, members = array(np.zeros(10))
    shape = sequence(value(1), value(2))
    return node("NdArrayNode", "numpy.ndarray", type="json", content=[item], shape=shape), members


def deep(levels):
    root = value(1)
    for _ in range(levels):
        root = sequence(root, kind="List")
    return root


KFOLD = "sklearn.model_selection._split.KFold"
BOMBS = {
    "shared": (lambda: (shared(20), {}), "two objects of one id"),
    "in itself": (
        lambda: ({**sequence({**sequence(), "__id__": 1}), "__id__": 1}, {}),
        "two objects of one id",
    ),
    "no kind": (lambda: (sequence({**value(1), "__id__": 1}, {"__id__": 1}), {}), "but an id"),
    "cached": (
        lambda: (node("CachedNode", "builtins.list", __id__=3), {}),
        "refers to an unknown object",
    ),
    "one file, many arrays": (several_of_one_file, "for several objects"),
    "lying array": (lying_array, "a damaged array"),
    "archive for an array": (nested_archive, "magic string"),
    "pickle in an array": (pickled_array, "a damaged array"),
    "array of arrays": (square_of_arrays, "of what is no plain value"),
    "masked array of a list": (
        lambda: (
            node(
                "MaskedArrayNode",
                "numpy.ma.MaskedArray",
                content={"data": sequence(kind="List"), "mask": value(False)},
            ),
            {},
        ),
        "of what is no array",
    ),
    "JSON in JSON": (lambda: (value([[1]]), {}), "is a container"),
    "deep": (lambda: (deep(150), {}), "nested in more than 200 levels"),
    "ids of one hash": (lambda: ({**value(1), "__id__": 2**61 - 1}, {}), "no address"),
    "numbers of one hash": (
        lambda: (sequence(*[value(i * (2**61 - 1)) for i in range(10_001)], kind="Set"), {}),
        "more than 10,000 numbers",
    ),
    "keys of one hash": (
        lambda: (
            table(
                {str(i * (2**61 - 1)): value(1) for i in range(10_001)},
                [node("TypeNode", "builtins.int")] * 10_001,
            ),
            {},
        ),
        "more than 10,000 numbers",
    ),
    "a number for bytes": (
        lambda: ({**array(np.array(10**12))[0], "__class__": "void"}, array(np.array(10**12))[1]),
        "'numpy.void'",
    ),
    "functions": (
        lambda: (sequence(*[node("FunctionNode", "numpy.add")] * 20_001, kind="List"), {}),
        "names types, functions or objects more than 20,000 times",
    ),
    "objects": (
        lambda: (sequence(*[node("ObjectNode", KFOLD)] * 20_001, kind="List"), {}),
        "names types, functions or objects more than 20,000 times",
    ),
    "numbers of one hash in many sets": (
        lambda: (
            sequence(*[sequence(*map(value, range(3000)), kind="Set") for _ in range(12)]),
            {},
        ),
        "several with nearly as many",
    ),
    "objects that share no id": (lambda: ({**value(1), "__id__": 0}, {}), "no address"),
    "many values": (lambda: ({**value(1), "x": [0] * 1_000_000}, {}), "more than 1,000,000 values"),
    "missing member": (lambda: (array(1)[0], {}), "lacks a member"),
    "no object": (lambda: ({}, {}), "describes no object"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_of_other_kinds(kind, tmp_path):
    make, message = BOMBS[kind]
    path = write(tmp_path / "bomb.skops", *make(), compression=8)
    with pytest.raises(ValueError, match=message):
        load_model(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_are_odd(tmp_path):
    path = tmp_path / "odd.skops"
    root, members = array(np.zeros(3))
    write(path, root, members, compression=zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match="compressed by other means than deflate"):
        load_model(path)
    write(path, root, members)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("schema.json", "{}")
    with pytest.raises(ValueError, match="two members of one name"):
        load_model(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("schema.json", "[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match="RecursionError"):
        load_model(path)
    with zipfile.ZipFile(path, "w", compression=8) as archive:
        archive.writestr("schema.json", " " * (17 * 2**20))
    with pytest.raises(ValueError, match="has a schema.json of 18 MB, and 17 MB are the limit"):
        load_model(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.json", "{}")
    with pytest.raises(ValueError, match="it has no schema.json"):
        load_model(path)


# ------------------------------------------------------------------------------ other files


class Evil:
    def __reduce__(self):
        return os.mkdir, ("canary",)


def test_pickles_are_refused_and_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0").write_bytes(pickle.dumps(Evil()))
    joblib.dump(Evil(), "1")
    for i, method in enumerate(["zlib", "gzip", "bz2", "xz", "lzma"], 2):
        joblib.dump(Evil(), str(i), compress=(method, 3))
    torch.save(Evil(), "7")
    for i in range(8):
        with pytest.raises(ValueError, match="a pickle, as") as error:
            load_model(str(i))
        assert "can run any code" in str(error.value) or "runs any code" in str(error.value)
    assert not os.path.exists("canary")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in [("nowhere", "no such file"), ("pipe", "is a pipe"), (".", "is a folder")]:
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / name)
    with pytest.raises(ValueError, match="this is a device"):
        load_model("/dev/zero")
    (tmp_path / "text").write_text("a model")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("text", "empty"):
        with pytest.raises(ValueError, match="not a skops file"):
            load_model(tmp_path / name)


def test_published_weights_of_detectors_are_no_pickles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    os.mkdir("checkpoints")
    torch.save(Evil(), "checkpoints/ssdlite320_mobilenet_v3_large_coco-a79551df.pth")
    with pytest.raises(pickle.UnpicklingError):
        load_detector("ssdlite320_mobilenet_v3_large", "default")
    assert not os.path.exists("canary")
