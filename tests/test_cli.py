"""The command line: what each command prints and writes, and how it says no."""

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import pandas
import pytest
import skops.io
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor, load_model
from sktransfer._cli import main

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
    assert "trained on 32 images of 2 classes: the head alone, 2,562 parameters" in out
    assert "on 8 images that were held out" in out and "macro avg" in out
    assert f"written: {path}" in out
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


def test_fit_searches_for_the_depth(tiles, tmp_path, capsys):
    root, files, _ = tiles
    path, memory = tmp_path / "model.skops", tmp_path / "memory"
    arguments = ["--depth", "auto", "--max-epochs", 1, "--memory", memory, "--test-size", 0]
    out = run(capsys, "fit", root, "-o", path, "--image-size", 32, *arguments)
    assert "accuracy in the search" in out and "unfreeze='auto' took " in out
    assert "held out" not in out and "trained on 40 images" in out
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
    run(capsys, "embed", root / "china", "-o", output, "--layer", "0", *SMALL)
    table = pandas.read_csv(output, keep_default_na=False)
    assert table["path"].tolist() == files[:20] and set(table["label"]) == {""}


def test_rank(tiles, tmp_path, capsys):
    output = tmp_path / "ranking.csv"
    names = ["--backbone", "efficientnet_lite0", "--backbone", "efficientnet_lite1"]
    out = run(capsys, "rank", tiles[0], *names, "--cv", 2, "-o", output, *SMALL)
    assert "efficientnet_lite1" in out and "logme" in out and "±" in out
    table = pandas.read_csv(output)
    assert set(table["backbone"]) == {"efficientnet_lite0", "efficientnet_lite1"}
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
    assert f"{memory}: 40 results" in run(capsys, "cache", "info", memory)
    assert "now: 10 results" in run(capsys, "cache", "reduce", memory, "--items", 10)
    assert "now: 10 results" in run(capsys, "cache", "reduce", memory, "--days", 1)
    assert "now: 0 results" in run(capsys, "cache", "reduce", memory, "--bytes", "1K")
    run(capsys, "embed", root, "-o", output, "--memory", memory, *SMALL)
    assert "now: 0 results" in run(capsys, "cache", "clear", memory)


def test_the_commands_of_the_guide(tiles, tmp_path, monkeypatch, capsys):
    root, files, _ = tiles
    (tmp_path / "photos").symlink_to(root)
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
        words += {"fit": ["--max-epochs", "1"], "benchmark": ["--splits", "1"]}.get(words[0], [])
        run(capsys, *words)


# ------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def place(tiles, model, tmp_path_factory):
    """A folder of things that are wrong."""
    root = tmp_path_factory.mktemp("bad")
    _, files, _ = tiles
    shutil.copytree(Path(files[0]).parent, root / "single" / "china")
    shutil.copytree(tiles[0], root / "damaged")
    (root / "damaged" / "china" / "00.jpg").write_bytes(Path(files[0]).read_bytes()[:900])
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
        ("fit {1} -o {0}/m.skops --depth 99 --image-size 64", "18 blocks"),
        ("fit {1} -o {0}/m.skops --test-size 2", "test_size"),
        ("predict nowhere.skops {0}/photo.jpg", "no such file"),
        ("predict {0}/text.skops {0}/photo.jpg", "is not a skops file"),
        ("predict {0}/foreign.skops {0}/photo.jpg", "test_cli.Foreign"),
        ("predict {0}/scaler.skops {0}/photo.jpg", "can't predict"),
        ("predict {0}/model.skops {0}/nowhere.jpg", "nowhere.jpg"),
        ("predict {0}/model.skops {0}/text.skops", "text.skops"),
        ("predict {0}/model.skops {0}/empty", "No image in"),
        ("embed nowhere -o {0}/e.csv", "'nowhere' does not exist"),
        ("embed {1} -o {0}/e.xlsx", "must end in .parquet or .csv"),
        ("embed {0}/damaged -o {0}/e.csv --image-size 64", "row 0"),
        ("embed {1} -o {0}/e.csv --layer nolayer --image-size 64", "nolayer"),
        ("rank {0}/single", "has one class only"),
        ("rank {1} --backbone lite0", "lite0"),
        ("rank {1} --backbone efficientnet_lite0 --cv 1", "range [2, inf)"),
        ("classify {0}/nowhere.jpg", "nowhere.jpg"),
        ("classify {0}/photo.jpg -k 5000", "from 1 to 1000"),
        ("classify {0}/photo.jpg --weights nope.pth", "no such file"),
        ("cache info {0}/empty", "is not a folder that --memory"),
        ("cache clear nowhere", "is not a folder that --memory"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_input_ends_with_one_line_and_code_2(tiles, place, capsys, arguments, message):
    assert main([word.format(place, tiles[0]) for word in arguments.split()]) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if not line.startswith("sktransfer: warning")]
    assert len(errors) == 1 and errors[0].startswith("sktransfer: error: ")
    assert message in errors[0] and "Traceback" not in err and out == ""


def test_nothing_to_reduce_by(tiles, tmp_path, capsys):
    run(capsys, "embed", tiles[0], "-o", tmp_path / "e.csv", "--memory", tmp_path / "m", *SMALL)
    assert main(["cache", "reduce", str(tmp_path / "m")]) == 2
    assert "pass --bytes, --items or --days" in capsys.readouterr().err
