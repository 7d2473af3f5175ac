"""The command line: what each command prints and writes, and how it says no."""

import contextlib
import csv
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas
import pytest
import skops.io
import torch
from networks import Small
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import (
    FineTunedClassifier,
    FineTunedRegressor,
    PretrainedFeatureExtractor,
    load_model,
)
from sktransfer._cli import _parser, main, tables
from sktransfer._cli.words import in_options
from sktransfer._escaping import csv_cell, map_text
from sktransfer.io import list_images
from sktransfer.models import Backbone, register_model

SMALL = ["--image-size", "64"]


class Foreign(BaseEstimator):
    """An estimator of neither this library nor scikit-learn."""

    def predict(self, X):
        return np.zeros(len(X))


@pytest.fixture(scope="module")
def model(tiles, tmp_path_factory):
    """A model that `fit` wrote, and what it printed."""
    path = tmp_path_factory.mktemp("model") / "tiles.skops"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", out := io.StringIO())
        assert main(["fit", str(tiles[0]), "-o", str(path), *SMALL]) == 0
    return path, out.getvalue()


def run(capsys, *arguments):
    """Return what a command prints."""
    assert main([str(argument) for argument in arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""  # neither a warning nor, in a pipe, a progress bar
    return out


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_fit_says_what_it_made(model):
    path, out = model
    assert (
        "trained on 32 images of 2 classes: the head alone, on all layers, 12,482 parameters" in out
    )
    assert "on 8 images that were held out" in out and "macro avg" in out
    assert re.search(r"1 china +\d", out) and max(map(len, out.splitlines())) <= 80 + len(str(path))
    assert f"written: {path}" in out and f"sktransfer predict {path} FOLDER" in out
    loaded = load_model(path)
    assert loaded.memory is None and loaded.unfreeze == 0 and loaded.image_size == 64


def test_predict_as_a_table_and_as_csv(model, tiles, capsys):
    path, _ = model
    _, files, labels = tiles
    out = run(capsys, "predict", path, *files[18:22])
    assert out.splitlines()[0].split() == ["path", "label", "probability"]
    rows = rows_of(run(capsys, "predict", path, *files, "--csv"))
    assert [row["path"] for row in rows] == files
    assert np.mean([row["label"] for row in rows] == labels) > 0.9
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)
    # A folder stands for its images.
    assert rows_of(run(capsys, "predict", path, tiles[0], "--csv")) == rows


def test_predict_by_a_pipeline_of_scikit_learn(tiles, tmp_path, capsys):
    _, files, labels = tiles
    pipeline = make_pipeline(
        PretrainedFeatureExtractor(image_size=64), StandardScaler(), LogisticRegression()
    )
    skops.io.dump(pipeline.fit(files, labels), tmp_path / "svm.skops")
    rows = rows_of(run(capsys, "predict", tmp_path / "svm.skops", *files, "--csv"))
    assert [row["label"] for row in rows] == pipeline.predict(files).tolist()


@pytest.fixture(scope="module")
def several(tiles):
    """Six tiles, and three labels as zeros and ones: flower, every seventh tile, none."""
    _, files, labels = tiles
    chosen = [*range(0, 20, 7), *range(20, 40, 7)]
    y = np.stack([labels == "flower", np.arange(40) % 7 == 0, labels == "no"], 1).astype(int)
    return [files[i] for i in chosen], y[chosen]


def test_predict_several_labels_an_image(several, tmp_path, capsys):
    files, y = several
    model = FineTunedClassifier(unfreeze=0, image_size=64, random_state=0).fit(files, y[:, :2])
    skops.io.dump(model, tmp_path / "m.skops")
    predicted, probabilities = model.predict(files), model.predict_proba(files)
    assert 0 < predicted.sum() < predicted.size
    rows = rows_of(run(capsys, "predict", tmp_path / "m.skops", *files, "--csv"))
    for row, found, wanted in zip(rows, predicted, probabilities, strict=True):
        assert row["labels"].split() == [str(i) for i in np.flatnonzero(found)]
        shown = [float(row["probability_0"]), float(row["probability_1"])]
        assert shown == pytest.approx(wanted, abs=1e-4)
    out = run(capsys, "predict", tmp_path / "m.skops", *files).splitlines()
    assert out[0].split() == ["path", "labels", "probabilities"]
    for line, found, wanted in zip(out[2:], predicted, probabilities, strict=True):
        labels = np.flatnonzero(found)
        assert line.split()[1:] == [*map(str, labels), *(f"{wanted[i]:.4f}" for i in labels)]


@pytest.mark.parametrize("last", [KNeighborsClassifier(1), RidgeClassifier()])
def test_predict_several_labels_by_scikit_learn(several, tmp_path, capsys, last):
    files, y = several  # no image has label 2
    pipeline = make_pipeline(PretrainedFeatureExtractor(image_size=64), last).fit(files, y)
    skops.io.dump(pipeline, tmp_path / "m.skops")
    rows = rows_of(run(capsys, "predict", tmp_path / "m.skops", *files, "--csv"))
    wanted = [" ".join(map(str, np.flatnonzero(row))) for row in pipeline.predict(files)]
    assert [row["labels"] for row in rows] == wanted
    if hasattr(last, "predict_proba"):
        shown = [[float(row[f"probability_{i}"]) for i in range(3)] for row in rows]
        np.testing.assert_array_equal(shown, y)
    run(capsys, "predict", tmp_path / "m.skops", *files)


def test_predict_several_labels_of_words(several, tmp_path, capsys):
    files, y = several
    words = np.stack([np.where(y[:, 0], "flower", "china"), np.where(y[:, 1], "-1", "b")], 1)
    extractor = PretrainedFeatureExtractor(image_size=64)
    skops.io.dump(
        make_pipeline(extractor, KNeighborsClassifier(1)).fit(files, words), tmp_path / "m.skops"
    )
    rows = rows_of(run(capsys, "predict", tmp_path / "m.skops", *files, "--csv"))
    assert [row["label_0"] for row in rows] == words[:, 0].tolist()
    assert [row["label_1"].removeprefix("'") for row in rows] == words[:, 1].tolist()


def test_predict_numbers(several, tmp_path, capsys):
    files, y = several
    values = np.arange(12.0).reshape(6, 2) - 5.5
    one = FineTunedRegressor(unfreeze=0, image_size=64).fit(files, values[:, 0])
    two = make_pipeline(PretrainedFeatureExtractor(image_size=64), Ridge()).fit(files, values)
    for model, names in ((one, ["value"]), (two, ["value_0", "value_1"])):
        skops.io.dump(model, tmp_path / "m.skops")
        rows = rows_of(run(capsys, "predict", tmp_path / "m.skops", *files, "--csv"))
        assert list(rows[0]) == ["path", *names] and float(rows[0][names[0]]) < 0
        shown = [[float(row[name]) for name in names] for row in rows]
        np.testing.assert_allclose(shown, model.predict(files).reshape(6, -1), rtol=1e-5)
        assert len(run(capsys, "predict", tmp_path / "m.skops", *files).splitlines()) == 8


def test_fit_searches_for_the_depth(tiles, tmp_path, capsys):
    root, files = tmp_path / "photos", tiles[1]
    shutil.copytree(tiles[0], root, ignore=shutil.ignore_patterns("1?.jpg"))
    path, memory = tmp_path / "model.skops", tmp_path / "memory"
    arguments = ["--depth", "auto", "--max-epochs", 1, "--memory", memory, "--test-size", 0]
    out = run(capsys, "fit", root, "-o", path, "--image-size", 32, *arguments)
    assert "accuracy in the search" in out and "--depth auto took " in out
    assert "held out" not in out and "trained on 20 images" in out
    assert len(rows_of(run(capsys, "predict", path, files[0], "--csv"))) == 1


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_embed(tiles, tmp_path, capsys, suffix):
    root, files, labels = tiles
    output = tmp_path / f"features{suffix}"
    out = run(capsys, "embed", root, "-o", output, "--layer", "blocks.1.0", *SMALL)
    assert out == f"written: {output} (40 images, 24 features)\n"
    read = pandas.read_parquet if suffix == ".parquet" else pandas.read_csv
    table = read(output)
    assert table["path"].tolist() == files and table["label"].tolist() == labels.tolist()
    extractor = PretrainedFeatureExtractor(layer="blocks.1.0", image_size=64)
    np.testing.assert_allclose(table.iloc[:, 2:], extractor.transform(files), rtol=1e-5)


def test_embed_images_without_classes(tiles, tmp_path, capsys):
    root, files, _ = tiles
    output = tmp_path / "features.csv"
    layers = ["--layer", "0,blocks.1", "--pooling", "avg,max"]
    run(capsys, "embed", root / "china", "-o", output, *layers, *SMALL)
    table = pandas.read_csv(output, keep_default_na=False)
    assert table["path"].tolist() == files[:20] and set(table["label"]) == {""}
    parts = dict.fromkeys(name.rsplit("_", 1)[0] for name in table.columns[2:])
    expected = ["conv_stem_avg", "conv_stem_max", "blocks.1.1_avg", "blocks.1.1_max"]
    assert list(parts) == expected and table.shape[1] == 2 + 2 * (32 + 24)


def test_rank(tiles, tmp_path, capsys):
    output = tmp_path / "ranking.csv"
    names = ["--backbone", "efficientnet_lite0", "--backbone", "efficientnet_lite1"]
    out = run(capsys, "rank", tiles[0], *names, "--cv", 2, "-o", output, *SMALL)
    assert "efficientnet_lite1" in out and "logme" in out and "±" in out
    table = pandas.read_csv(output)
    alone = {"efficientnet_lite0", "efficientnet_lite1"}
    (pair,) = set(table["backbone"]) - alone
    assert len(table) == 3 and set(pair.split(" + ")) == alone
    assert table["logistic"].is_monotonic_decreasing and table["logistic"].min() > 0.7


def test_classify(sample_files, capsys):
    out = run(capsys, "classify", *sample_files, "-k", 2)
    assert "palace" in out and "daisy" in out and out.count("china.jpg") == 1
    rows = rows_of(run(capsys, "classify", *sample_files, "-k", 2, "--csv"))
    assert [row["label"] for row in rows[::2]] == ["palace", "daisy"]
    assert [row["path"] for row in rows] == np.repeat(sample_files, 2).tolist()


def test_cache(tiles, tmp_path, capsys):
    root, _, _ = tiles
    memory, output = tmp_path / "memory", tmp_path / "features.csv"
    run(capsys, "embed", root, "-o", output, "--memory", memory, *SMALL)
    info = run(capsys, "cache", "info", memory)
    assert f"{memory}: 40 results" in info
    assert re.search(r"(?m)^efficientnet_lite0, \S+×\S+: 0\.\d MB, (\d+) %$", info)
    assert re.search(r"(?m)embedding +avg +40 +0\.\d +(\d+) %$", info)
    assert re.search(r"(?m)^keys, times of use, unfilled ends of pages: 0\.\d MB, \d+ %$", info)
    assert max(map(len, info.splitlines()[1:])) <= 80
    found = json.loads(run(capsys, "cache", "info", memory, "--json"))
    parts = [share["bytes"] for share in found["shares"]] + [*found["rest"].values()]
    assert sum(parts) == found["n_bytes"] and min(parts) >= 0 and len(parts) == 3
    percents = re.findall(r"(?m): [\d.]+ MB, (\d+) %$", info)
    assert sum(map(int, percents)) == pytest.approx(100, abs=1)  # each is rounded
    assert "now: 10 results" in run(capsys, "cache", "reduce", memory, "--items", 10)
    assert "now: 10 results" in run(capsys, "cache", "reduce", memory, "--days", 1)
    assert "now: 0 results" in run(capsys, "cache", "reduce", memory, "--bytes", "1K")
    run(capsys, "embed", root, "-o", output, "--memory", memory, *SMALL)
    assert "now: 0 results" in run(capsys, "cache", "clear", memory)


def test_json_is_one_document_with_names_as_they_are(model, odd, tmp_path, capsys):
    root, files, odd_model, _ = odd
    found = json.loads(run(capsys, "predict", odd_model, root, "--json"))["images"]
    assert [row["path"] for row in found] == files
    assert {row["label"] for row in found} <= {"=cmd()", "\x1b[2J\udcfe"}
    assert all(0.5 <= row["probability"] <= 1 for row in found)
    found = json.loads(run(capsys, "classify", files[0], "-k", 2, "--json", *SMALL))["labels"]
    assert [row["rank"] for row in found] == [1, 2] and found[0]["path"] == files[0]
    memory, output = tmp_path / "memory", tmp_path / "rows.csv"
    found = run(capsys, "embed", root, "-o", output, "--memory", memory, "--json", *SMALL)
    assert json.loads(found) == {"written": str(output), "n_images": 16, "n_features": 1280}
    found = json.loads(run(capsys, "cache", "reduce", memory, "--items", 3, "--json"))
    assert (found["n_results"], found["now"]["n_results"]) == (16, 3)
    names = ["--backbone", "efficientnet_lite0"]
    found = json.loads(run(capsys, "rank", root, *names, "--cv", 2, "--json", *SMALL))["ranking"]
    assert found[0]["backbone"] == "efficientnet_lite0" and found[0]["imagenet_accuracy"] is None


def test_json_of_fit_and_what_it_held_out(tiles, tmp_path, capsys):
    path = tmp_path / "m.skops"
    arguments = ["--json", "--test-size", 0.5, "--image-size", 32]
    found = json.loads(run(capsys, "fit", tiles[0], "-o", path, *arguments))
    held_out = found["held_out"]
    wrong = np.sum(held_out["confusion"]) - np.trace(held_out["confusion"])
    assert len(held_out["mistakes"]) == wrong == round(20 * (1 - held_out["accuracy"]))
    assert all(row["label"] != row["predicted"] for row in held_out["mistakes"])
    assert found["written"] == {"path": str(path), "n_bytes": path.stat().st_size}
    assert main(["benchmark", str(tiles[0]), "--depths", "99", "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("comparing 1 depth of fine-tuning: 40 images, ")


def test_tables_fit_80_columns():
    columns = {"path": ["a/" + "b" * 90 + "/c.jpg"], "label": ["two words " * 6], "n": [1]}
    lines = tables.as_table(columns).splitlines()
    assert max(map(len, lines)) == 80 and len(lines) > 3
    assert lines[2].startswith("a/bbb") and "/c.jpg  two words" in lines[2]
    classes = [f"class {i}" for i in range(30)]
    counts = np.diag(np.full(30, 9))
    counts[3, 5] = 2
    text = tables._confusion(classes, counts)
    assert text.splitlines()[-1].split() == ["class", "3", "class", "5", "2"]


def test_the_mistakes_of_fit_are_named():
    y = np.array(["a", "b", "b", "a"])
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.4, 0.6]])
    files = ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    found = tables.held_out(files, y, np.array([*"aabb"]), p)
    assert [row["path"] for row in found["mistakes"]] == ["2.jpg", "4.jpg"]  # the surest first
    assert found["accuracy"] == 0.5 and found["confusion"] == [[1, 1], [1, 1]]
    assert "50.0% right" in tables.held_out_text(found)


def test_messages_name_the_options_of_the_command():
    fit = Namespace(command="fit", depth="x", image_size=None, test_size=0.2, memory=None)
    benchmark = Namespace(command="benchmark", depth=False, depths="x", folder="y", k=1)
    for message, expected in {
        "unfreeze='bloks', but": "--depth bloks, but",
        "unfreeze='a b', but": "--depth 'a b', but",
        "pass unfreeze=0 or 'all'.": "pass --depth 0 or 'all'.",
        "Set `image_size` higher": "Set --image-size higher",
        "leave image_size=None for that.": "leave --image-size out for that.",
        "load_image_folder('a/b') has it": "`sktransfer fit a/b` has it",
        'as in load_image_folder("it\'s") if': "as in `sktransfer fit 'it'\"'\"'s'` if",
        "a file a_unfreeze=1, layer=2": "a file a_unfreeze=1, layer=2",
        "memory must be one": "--memory must be one",
        "a memory must be one": "a memory must be one",
        "memory=['a', 'b c'] holds": "--memory 'a,b c' holds",
    }.items():
        assert in_options(message, fit) == expected
    assert in_options("replace it, or drop the row.", fit) == "replace it, or remove it."
    fit.skip_unreadable = False
    wanted = "replace it, or pass --skip-unreadable."
    assert in_options("replace it, or drop the row.", fit) == wanted
    assert in_options("unfreeze=9, folder='y', k=5", benchmark) == "--depths 9, folder='y', -k 5"


@pytest.mark.parametrize(
    "given, said",
    [
        ("--pooling foo", r"--pooling must be one of \{'.*'\}\. Got 'foo' instead\."),
        ("--pooling avg,foo", "--pooling avg,foo holds 'foo', which is none of "),
        (
            "--backbone nosuch",
            ".*The names are those of torchvision and.*PATH' are taken",
        ),
        ("--weights None", "--weights None is neither .*names or a path to a state dict\\.$"),
        ("--background x", "--background must be .* or a code such as '#ffffff', got 'x'\\."),
        ("--n-jobs 0", "--n-jobs must not be 0"),
    ],
)
def test_messages_name_nothing_of_python(given, said, tiles, tmp_path, capsys):
    command = ["embed", str(tiles[0]), "-o", str(tmp_path / "x.csv"), *given.split()]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert re.search(f"error: {said}", error), error
    assert not re.search(r"instance of|None for|\w\(\)|Module|integers|parameter of", error)


@pytest.mark.parametrize(
    "name",
    ["unfreeze=3", "it's test_size", "a unfreeze=1/`image_size`", "a's \"x\" unfreeze=['b'", "\\'"],
)
def test_names_in_messages_stay_as_they_are(name):
    options = Namespace(command="fit", depth="x", image_size=None, test_size=0.2)
    for text in (f"row 3 ({name!r}): ", f"only {name!r}, {name!r}: the network's ", f"[{name!r}] "):
        assert in_options(f"{text}unfreeze=3.", options) == f"{text}--depth 3."


def test_the_commands_of_the_guide(tiles, tmp_path, monkeypatch, capsys):
    root, files, _ = tiles
    for file in files[:8] + files[-8:]:  # as few as `benchmark` takes
        photo = tmp_path / "photos" / Path(file).relative_to(root)
        photo.parent.mkdir(parents=True, exist_ok=True)
        photo.symlink_to(file)
    (tmp_path / "new").mkdir()
    shutil.copy(files[0], tmp_path / "new" / "1.jpg")
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parent.parent / "docs" / "guide.md").read_text()
    section = guide.partition("## On the command line")[2].partition("```console\n")[2]
    lines = section.partition("```")[0].splitlines()
    assert len(lines) == 7
    for line in lines:
        words = line.partition("#")[0].split()[1:]
        if words[0] in ("fit", "embed", "rank", "classify", "benchmark"):
            words += ["--image-size", "32"]  # for speed
        fewer = {"fit": "--max-epochs 1", "rank": "--cv 2", "benchmark": "--splits 1 --depths 0"}
        words += fewer.get(words[0], "").split()
        run(capsys, *words)


# ------------------------------------------------------------------------------ odd names


@pytest.fixture(scope="module")
def odd(tiles, tmp_path_factory):
    """A folder, classes and images of which have odd names; a model of it, and what fit said."""
    root = tmp_path_factory.mktemp("odd")
    names = [
        b"\xff.jpg",
        b"=1+1.jpg",
        b"\x1b[31m.jpg",
        b"a\nb.jpg",
        b"x" * 200 + b".jpg",
        b"\\x0a.jpg",
    ]
    names += ["\N{GRINNING FACE} ä.jpg".encode(), "\u202e.jpg".encode()]
    for k, label in enumerate((b"=cmd()", b"\x1b[2J\xfe")):
        folder = os.path.join(os.fsencode(root), label)
        os.mkdir(folder)
        for name, file in zip(names, tiles[1][20 * k :], strict=False):
            shutil.copy(file, os.path.join(folder, name))
    model = tmp_path_factory.mktemp("model") / "odd.skops"
    printed, code = run_encoded("utf-8", "fit", root, "-o", model, *SMALL)
    assert code == 0
    return root, list_images(root), model, printed


def run_encoded(encoding, *arguments):
    """Return what a command prints to an output of this encoding, and its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", output := io.TextIOWrapper(io.BytesIO(), encoding))
        code = main([str(argument) for argument in arguments])
    return output.buffer.getvalue().decode(encoding), code


def read_back(cell):
    """Return the name that a cell of a CSV file stands for, as the guide says."""
    escapes = r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})"
    return re.sub(escapes, lambda m: chr(int(m[1][1:], 16)), cell.removeprefix("'"))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_odd_names_are_printed(odd, encoding):
    _, files, model, _ = odd
    for command in (("predict", model), ("classify", "-k", "1", *SMALL)):
        out, code = run_encoded(encoding, *command, *files)
        lines = out.split("\n")
        assert code == 0 and len(lines) == len(files) + 3
        assert len({line.index("0.") for line in lines[2:-1] if "0.jpg" not in line}) <= 2
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", out)
        out, code = run_encoded(encoding, *command, "--csv", *files)
        rows = rows_of(out)
        assert code == 0 and [read_back(row["path"]) for row in rows] == files
        if command[0] == "predict":
            assert {row["label"] for row in rows} <= {"'=cmd()", r"\x1b[2J\udcfe"}


def test_the_scores_of_odd_classes_are_printed(odd):
    printed = odd[3]
    assert "=cmd()" in printed and r"\x1b[2J\udcfe" in printed and "\x1b" not in printed


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_embed_odd_names(odd, tmp_path, capsys, suffix):
    root, files, _, _ = odd
    output = tmp_path / f"\udcff{suffix}"
    out = run(capsys, "embed", root, "-o", output, "--layer", "0", "--image-size", 32)
    assert r"\udcff" in out
    with open(output, "rb") as file:
        table = (pandas.read_parquet if suffix == ".parquet" else pandas.read_csv)(file)
    assert [read_back(cell) for cell in table["path"]] == files
    assert {read_back(cell) for cell in table["label"]} == {"=cmd()", "\x1b[2J\udcfe"}
    assert table["label"].str.startswith("=").any() == (suffix == ".parquet")


def test_no_text_of_a_csv_file_is_a_formula():
    text = ["=1", "+1", "-1", "@a", "\t=1", "\r=1", "'=1", "cat", "", r"\x09=1"]
    cells = [csv_cell(name) for name in text]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)
    assert [read_back(cell) for cell in cells] == text and len({*cells}) == len(text)
    assert csv_cell(-0.5) == -0.5 and csv_cell(np.float32(-0.5)) == -0.5
    table = pandas.DataFrame({"=a": ["-x", None], "b": [-1.5, 2]})
    assert map_text(table, csv_cell).to_csv(index=False) == "'=a,b\n'-x,-1.5\n,2.0\n"


def closed_pipe():
    end, closed = os.pipe()
    os.close(end)
    return os.fdopen(closed, "w")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_an_output_that_nobody_takes(odd, monkeypatch, capsys):
    _, files, model, _ = odd
    arguments = ["predict", str(model), files[0]]
    for output, code, error in (
        (closed_pipe(), 141, ""),
        (open("/dev/full", "w"), 2, "sktransfer: error: [Errno 28] No space left on device\n"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", output)
            assert main(arguments) == code
        assert capsys.readouterr().err == error
        output.close()  # as Python does when it exits: it would raise, were there text to write


def test_no_output_at_all(odd, monkeypatch):
    _, files, model, _ = odd
    monkeypatch.setattr("sys.stdout", None)  # as Python has it where a shell closed it: `>&-`
    for option in ([], ["--csv"]):
        assert main(["predict", str(model), files[0], *option]) == 0


def test_help_that_nobody_reads():
    command = [sys.executable, "-m", "sktransfer", "--help"]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}  # Python writes all when it exits
    with closed_pipe() as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, env=environment)
    assert done.returncode == 0 and done.stderr == b""


# ------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def place(tiles, model, tmp_path_factory):
    """A folder of things that are wrong."""
    root = tmp_path_factory.mktemp("bad")
    _, files, _ = tiles
    shutil.copytree(Path(files[0]).parent, root / "single" / "china")
    shutil.copytree(tiles[0], root / "damaged")
    (root / "damaged" / "china" / "00.jpg").write_bytes(Path(files[0]).read_bytes()[:900])
    for name, counts in (("rare", (5, 1)), ("few", (2,) * 5), ("tiny", (2, 2))):
        for k, count in enumerate(counts):
            (root / name / f"class{k}").mkdir(parents=True)
            for file in files[8 * k : 8 * k + count]:
                shutil.copy(file, root / name / f"class{k}")
    (root / "empty").mkdir()
    (root / "text.skops").write_text("no model")
    skops.io.dump(Foreign(), root / "foreign.skops")
    skops.io.dump(StandardScaler(), root / "scaler.skops")
    (root / "photo.jpg").write_bytes(Path(files[0]).read_bytes())
    shutil.copy(model[0], root / "model.skops")
    return root


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("fit nowhere -o {0}/m.skops", "'nowhere' does not exist"),
        ("fit {0}/single -o {0}/m.skops", "has one class only, 'china'"),
        ("fit {0}/empty -o {0}/m.skops", "has no category folders"),
        ("fit {0}/damaged -o {0}/m.skops --image-size 64", "00.jpg"),
        ("fit {1} -o {0}/m.pickle", "must end in .skops"),
        ("fit {1} -o nowhere/m.skops", "no folder 'nowhere'"),
        ("fit {1} -o {0}/m.skops --backbone resnet5", "Did you mean 'resnet50'"),
        ("fit {1} -o {0}/m.skops --depth 99 --image-size 64", "--depth 99, but"),
        ("fit {1} -o {0}/m.skops --test-size 2", "pass 0 for none, or a number below 1"),
        ("fit {0}/rare -o {0}/m.skops", "'class1' has 1 image, but --test-size 0.2 needs 2"),
        ("fit {0}/few -o {0}/m.skops", "trains on 8 images and holds out 2, but"),
        ("predict nowhere.skops {0}/photo.jpg", "no such file"),
        ("predict {0}/text.skops {0}/photo.jpg", "is not a skops file"),
        ("predict {0}/foreign.skops {0}/photo.jpg", "test_cli.Foreign"),
        ("predict {0}/scaler.skops {0}/photo.jpg", "can't predict"),
        ("predict {0}/model.skops {0}/nowhere.jpg", "nowhere.jpg"),
        ("predict {0}/model.skops {0}/text.skops", "text.skops"),
        ("predict {0}/model.skops {0}/empty", "No image in"),
        ("embed {1} -o data:{2}/e.csv", "File name too long"),
        ("embed nowhere -o {0}/e.csv", "'nowhere' does not exist"),
        ("embed {1} -o {0}/e.xlsx", "must end in .parquet or .csv"),
        ("embed {0}/damaged -o {0}/e.csv --image-size 64", "it, or pass --skip-unreadable."),
        ("embed {1} -o {0}/e.csv --layer nolayer --image-size 64", "nolayer"),
        ("rank {0}/single", "has one class only"),
        ("rank {0}/tiny --cv 3", "'class1' has 2 images. To go on, pass --cv 2, or"),
        ("rank {0}/tiny --cv 2", "2 images of at least two classes, but 'class0' has 2 images"),
        ("benchmark {0}/few", "'class4' has 2 images. A comparison needs"),
        ("predict {0}/model.skops data:{2}", "AAA', 6,005 characters"),
        ("rank {1} --backbone lite0", "lite0"),
        ("rank {1} --backbone efficientnet_lite0 --cv 1", "--cv must be at least 2, got 1"),
        ("rank {1} --memory {0}/photo.jpg", "photo.jpg' is a file; name a folder"),
        ("classify {0}/nowhere.jpg", "nowhere.jpg"),
        ("classify {0}/photo.jpg -k 5000", "from 1 to 1000"),
        ("classify {0}/photo.jpg --weights nope.pth", "no such file"),
        ("cache info {0}/empty", "is not a folder that --memory"),
        ("cache clear nowhere", "is not a folder that --memory"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_input_ends_with_one_line_and_code_2(tiles, place, capsys, arguments, message):
    assert main([word.format(place, tiles[0], 6000 * "A") for word in arguments.split()]) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if not line.startswith("sktransfer: warning")]
    assert len(errors) == 1 and errors[0].startswith("sktransfer: error: ")
    assert message in errors[0] and "Traceback" not in err and len(err) < 3000
    assert out == "" or (arguments.startswith("benchmark") and out.count("\n") == 2)


EARLY = """
import sys
from sktransfer._cli import main
for command in sys.argv[1:]:
    main(command.split())
assert "torch" not in sys.modules
"""


def test_bad_folders_are_refused_before_torch_is_imported(place, capfd):
    groups = "--groups (/)"
    commands = [
        f"fit {place}/rare -o {place}/m.skops",
        f"fit {place}/few -o {place}/m.skops",
        f"fit {place}/tiny -o {place}/m.skops {groups}",
        f"benchmark {place}/rare",
        f"rank {place}/single",
        f"benchmark {place}/empty",
    ]
    subprocess.run([sys.executable, "-c", EARLY, *commands], check=True)
    early = capfd.readouterr().err.splitlines()
    with pytest.MonkeyPatch.context() as patch:  # in the same words as later
        patch.setattr("sktransfer._cli.classes.check_classes", lambda options: None)
        assert [main(command.split()) for command in commands] == [2] * 6
    late = capfd.readouterr().err.splitlines()
    assert early == late and sum("error: " in line for line in early) == 6


@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
def test_classes_are_counted_by_what_can_be_read(place, tmp_path, capsys):
    root = tmp_path / "photos"
    shutil.copytree(place / "rare", root)
    shutil.copytree(place / "rare" / "class0", root / "class2")
    (bad,) = (root / "class1").iterdir()
    command = ["fit", str(root), "-o", str(tmp_path / "m.skops"), *SMALL]
    assert main(command) == 2 and "'class1' has 1 image, but" in capsys.readouterr().err
    bad.write_bytes(b"no image")  # then there is no such class
    assert main(command) == 0
    shutil.copytree(root / "class0", root / ".hidden")
    shutil.copy(next((root / "class0").iterdir()), bad)
    bad.write_bytes(bad.read_bytes()[:300])  # the header of a file
    assert main([*command, "--skip-unreadable"]) == 0


def test_an_argument_is_quoted_without_escape_sequences(capsys):
    with pytest.raises(SystemExit):
        main(["classify", "photo.jpg", "--\x1b[2J"])
    assert r"arguments: --\x1b[2J" in capsys.readouterr().err


def test_unreadable_images_are_skipped_and_listed(tiles, place, model, tmp_path, capsys):
    root, bad, skip = tmp_path / "photos", tmp_path / "photos" / "china" / "bad.jpg", []
    shutil.copytree(tiles[0], root, ignore=shutil.ignore_patterns("1?.jpg"))
    data = bytearray(Path(tiles[1][0]).read_bytes())
    bad.write_bytes(data[:300])  # the header of a file, which shows its damage when it is decoded
    skip = ["--skip-unreadable", *SMALL]
    path, rows = tmp_path / "m.skops", tmp_path / "rows.csv"
    out = run(capsys, "fit", root, "-o", path, *skip)
    assert "skipped, as they can't be read" in out and "bad.jpg" in out
    assert "trained on 16 images" in out
    found = rows_of(run(capsys, "predict", path, root, "--csv", "--skip-unreadable"))
    assert len(found) == 21 and found[-1]["path"] == str(bad)
    assert found[-1]["label"] == found[-1]["probability"] == ""
    assert found[-1]["skipped"].endswith("or remove it.")  # in words of the command line
    assert {row["skipped"] for row in found[:-1]} == {""}
    found = json.loads(run(capsys, "predict", path, root, "--json", "--skip-unreadable"))
    assert len(found["images"]) == 20 and [r["path"] for r in found["skipped"]] == [str(bad)]
    out = run(capsys, "embed", root, "-o", rows, *skip)
    assert f"written: {rows} (20 images" in out and "bad.jpg" in out
    table = pandas.read_csv(rows)
    assert table["path"].iloc[-1] == str(bad) and table["skipped"].notna().sum() == 1
    assert table["skipped"].iloc[-1].endswith("or remove it.")
    assert table.iloc[-1, 3:].isna().all() and table.iloc[:-1, 3:].notna().all(axis=None)
    out = run(capsys, "rank", root, "--backbone", "efficientnet_lite0", "--cv", 2, *skip)
    assert "bad.jpg" in out
    arguments = ["benchmark", root, "--depths", 0, "--splits", 1, *skip]
    assert "bad.jpg" in run(capsys, *arguments)
    assert main(["predict", str(path), str(bad), "--skip-unreadable"]) == 2
    assert "No image of 1 can be read" in capsys.readouterr().err


def test_help_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = _parser()
    commands = next(a for a in parser._actions if a.dest == "command").choices
    for shown in [parser, *commands.values()]:
        assert max(map(len, shown.format_help().splitlines())) <= 80, shown.prog
    assert "--skip-unreadable" not in commands["audit"].format_help()  # which reports such


def test_long_errors_are_wrapped_on_a_terminal_alone(tmp_path, capsys, monkeypatch):
    missing = str(tmp_path / "a-folder-whose-name-can-be-copied" / "b")
    commands = ["fit", missing, "-o", "m.skops"], ["cache", "burn", "a long word " * 9]
    in_a_pipe = []
    for command in commands:
        with contextlib.suppress(SystemExit):  # of argparse
            main(command)
        in_a_pipe.append(capsys.readouterr().err.splitlines()[-1])
    monkeypatch.setenv("COLUMNS", "60")
    for command, expected in zip(commands, in_a_pipe, strict=True):
        ours, theirs = os.openpty()
        with open(theirs, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr("sys.stderr", terminal)
            with contextlib.suppress(SystemExit):
                main(command)
            terminal.flush()
            shown = ""
            while select.select([ours], [], [], 0)[0]:
                shown += os.read(ours, 4096).decode().replace("\r\n", "\n")
        os.close(ours)
        error = re.search(r"(?ms)^sktransfer[^\n]*: error:.*", shown)[0].splitlines()
        assert len(error) > 1 and max(len(line) for line in error if missing not in line) <= 60
        assert " ".join(line.strip() for line in error) == expected
        assert len(expected) > 80


def test_nothing_to_reduce_by(tiles, tmp_path, capsys):
    run(capsys, "embed", tiles[0], "-o", tmp_path / "e.csv", "--memory", tmp_path / "m", *SMALL)
    assert main(["cache", "reduce", str(tmp_path / "m")]) == 2
    assert "pass --bytes, --items or --days" in capsys.readouterr().err


class Warns(Small):
    """A network whose layers say something, each time they run."""

    def forward(self, x):
        say(UserWarning)
        say(FutureWarning)
        return super().forward(x)


@torch.fx.wrap
def say(category):
    warnings.warn(f"of {category.__name__}", category, stacklevel=1)


def test_warnings_of_all_kinds_are_shown_and_nothing_is_left_behind(tiles, tmp_path, capsys):
    register_model("warns", lambda weights: Backbone(Warns()))
    before = warnings.showwarning, warnings.filters[:]
    command = ["embed", str(tiles[0]), "-o", str(tmp_path / "rows.csv"), "--backbone", "warns"]
    with pytest.warns(FutureWarning, match="of FutureWarning") as others:
        assert main([*command, "--image-size", "32"]) == 0
    assert {warning.category for warning in others} == {FutureWarning}
    assert "sktransfer: warning: of UserWarning\n" in capsys.readouterr().err
    assert (warnings.showwarning, warnings.filters) == before
