import csv
import io
import json
import locale
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import skops.io
from PIL import Image
from scipy.special import expit
from sklearn.base import clone
from sklearn.metrics.pairwise import rbf_kernel as sklearn_kernel

from sktransfer import load_model
from sktransfer._cli import _parser, main
from sktransfer._cli import benchmark as _benchmark
from sktransfer._cli import report as _report
from sktransfer._cli.checks import announcement
from sktransfer._cli.page import page
from sktransfer._cli.results import best_of, gains
from sktransfer._cli.tables import as_json
from sktransfer._threads import search_in_threads
from sktransfer.model_selection import _comparison
from sktransfer.model_selection._comparison import RowKernel, rbf_kernel


@pytest.fixture(scope="module")
def told(tiles):
    """A comparison on the tiles, and what it told after each result: lines, number of costs."""
    root, _, _ = tiles
    task, so_far = _benchmark.load_folder(str(root)), []

    def tell(report):
        i = len(report.results) - 1
        so_far.append((_report.lines_of(report, i), len(report.costs)))

    options = {"n_splits": 2, "image_size": 64, "on_result": tell}
    before = {*psutil.Process().children(recursive=True)}
    report = _benchmark.compare(task, ["efficientnet_lite0"], **options)
    assert {*psutil.Process().children(recursive=True)} <= before  # they would start for seconds
    return report, so_far


@pytest.fixture(scope="module")
def report(told):
    return told[0]


@pytest.fixture(scope="module")
def many_classes(tiles, tmp_path_factory):
    _, paths, _ = tiles
    root = tmp_path_factory.mktemp("classes")
    for i, path in enumerate(paths[:36]):
        folder = root / f"class {'abc'[i // 12]}"
        folder.mkdir(exist_ok=True)
        Image.open(path).save(folder / f"{i}.png")
    return root


def test_the_elpv_task():
    task = _benchmark.load_elpv()
    assert len(task.images) == 2624 and all(Path(path).is_file() for path in task.images)
    counts = {name: (y == "defective").sum() for name, y in task.targets.items()}
    assert counts == {"defective: p > 0.5": 821, "defective: p > 0": 1116}
    assert sorted(set(task.strata)) == ["mono", "poly"]
    assert [row["accuracy"] for row in task.published] == [0.824, 0.884]


def test_compares_embeddings_with_pixels_and_the_majority(report):
    names = [result.classifier for result in report.results]
    assert names == [
        "majority class",
        "RBF SVM on 32 × 32 pixels",
        "k-NN",
        "logistic regression",
        "linear SVM",
        "RBF SVM",
        "logistic regression, all layers",
        "RBF SVM, all layers",
    ]
    accuracy = {r.classifier: r.scores["accuracy"].mean() for r in report.results}
    assert accuracy["majority class"] == 0.5
    assert accuracy["logistic regression"] > 0.8
    for result in report.results:
        assert all(len(values) == 2 for values in result.scores.values())
    assert report.costs[0].n_computed == 40 and report.costs[0].n_features == 6240


def test_candidates_of_a_search_share_distances():
    random = np.random.default_rng(0)
    X, Y = random.normal(size=(30, 5)), random.normal(size=(20, 5))
    for gamma in (0.1, 2):
        for a, b in ((X, Y), (X, X), (X[::2], Y)):
            np.testing.assert_array_equal(rbf_kernel(a, b, gamma), sklearn_kernel(a, b, gamma))
    before = len(_comparison._distances)
    for i in range(10):
        rbf_kernel(X + i, Y, 1)
    assert before <= len(_comparison._distances) == 8


@pytest.mark.parametrize("most_paired", [5000, 10])
def test_a_kernel_of_numbers_is_that_of_their_rows(monkeypatch, most_paired):
    monkeypatch.setattr(_comparison, "_MOST_PAIRED", most_paired)
    random = np.random.default_rng(0)
    X, y = random.normal(size=(60, 5)), np.repeat(["a", "b"], 30)
    X[30:] += 1
    kernel = RowKernel(lambda: X)
    numbers = kernel.numbers()
    assert numbers.shape == (60, 1)
    np.testing.assert_allclose(
        kernel.rbf(numbers[::2], numbers[1:5], 0.3), sklearn_kernel(X[::2], X[1:5], 0.3)
    )
    with search_in_threads():
        expected = _benchmark.classifiers(60)["RBF SVM"].fit(X, y)
        found = _benchmark.classifiers(60, kernel.rbf)["RBF SVM"].fit(numbers, y)
    for scores in ("mean_test_score", "rank_test_score"):
        np.testing.assert_array_equal(found.cv_results_[scores], expected.cv_results_[scores])
    scores = found.decision_function(numbers[:9]), expected.decision_function(X[:9])
    np.testing.assert_allclose(*scores, atol=1e-6)


def test_each_result_is_told_when_it_is_known_and_never_changed(told):
    report, so_far = told
    assert [n_costs for _, n_costs in so_far] == [0, 0, 1, 1, 1, 1, 1, 1]  # no network before
    lines = [line for told_once, _ in so_far for line in told_once]
    assert _report.as_text(report).splitlines()[1 : len(lines) + 1] == lines
    heads = [i for i, line in enumerate(lines) if line.startswith("classifier ")]
    assert lines[heads[1] - 2].startswith("RBF SVM  ")  # the last layer, then a table of all
    assert lines[heads[1] + 2 :][0] == "efficientnet_lite0:" and len(heads) == 2


def test_tables_of_conventions_networks_and_published_figures(report):
    task = replace(report.task, published=[{"convention": "b", "classifier": "SVM (published)"}])
    task.published[0]["accuracy"] = 0.5
    task.targets = dict.fromkeys("ab", report.task.targets[""])
    by_two = [
        replace(r, convention=c, table=r.table.replace("efficientnet_lite0", "second"))
        if r.backbone == "none"
        else replace(r, convention=c, backbone=b, table=r.table.replace("efficientnet_lite0", b))
        for c in "ab"
        for b in ("second", "third")
        for r in report.results
        if r.backbone != "none" or b == "second"
    ]
    lines = _report.as_text(replace(report, task=task, results=by_two)).splitlines()
    starts = [line.split("  ")[0] for line in lines if not line.startswith("---")]
    last = ["k-NN", "logistic regression", "linear SVM", "RBF SVM", ""]
    both = ["logistic regression, all layers", "RBF SVM, all layers", ""]
    second = ["second:", *last, "classifier", "second:", *both]
    third = ["classifier", "third:", *last, "classifier", "third:", *both]
    none = ["classifier", "majority class", "RBF SVM on 32 × 32 pixels"]
    of_a = ["a", *none, *second, *third]
    assert starts[2 : len(of_a) + 2] == of_a
    of_b = ["b", *none, "SVM (published)", *second, *third]
    assert starts[2 + len(of_a) :][: len(of_b)] == of_b
    assert max(map(len, lines)) <= 80


def test_the_text(report):
    text = _report.as_text(report)
    assert re.search(r"efficientnet_lite0:.*\nRBF SVM +\d\.\d{3} ± \d\.\d{3} ", text, re.S)
    assert "40 images, 2 splits" in text and "second run" in text
    words = " ".join(text.split())
    assert re.search(r"gets \d+\.\d% of the images right: \+\d+\.\d points over", words)
    assert "F1 of 'flower'" in text and max(map(len, text.splitlines())) <= 80


def test_of_equals_the_recipe_is_best_and_no_empty_interval_is_told(report):
    def scored(result, accuracies):
        return replace(result, scores={**result.scores, "accuracy": np.array(accuracies)})

    network = [r for r in report.results if r.backbone != "none"]
    ties = [
        scored(r, [0.5, 0.7, 0.6][i % 3 :] + [0.5, 0.7, 0.6][: i % 3])
        for i, r in enumerate(network)
    ]
    recipe = "logistic regression, all layers"
    assert best_of(ties).classifier == recipe
    ties = [r for r in ties if r.classifier != recipe]
    assert best_of(ties).classifier == "RBF SVM, all layers"
    ties = [r for r in ties if "all layers" not in r.classifier]
    assert (
        best_of(ties) is ties[0]
        and best_of([*ties, scored(ties[1], [0.7])]).scores["accuracy"] == 0.7
    )
    none = next(r for r in report.results if r.classifier == "majority class")
    assert gains([scored(none, [0.25, 0.25])], scored(network[0], [1, 1])) == [
        "+75.0 points over always the largest class"
    ]
    (said,) = gains([scored(none, [0.25, 0.2])], scored(network[0], [1, 1]))
    assert re.search(r"95% interval \d+\.\d to 100\.0", said)


def test_the_document(report):
    found = json.loads(as_json(_report.as_document(report)))
    accuracy = [result.scores["accuracy"].mean() for result in report.results]
    assert [row["accuracy_mean"] for row in found["results"]] == pytest.approx(accuracy)
    assert found["n_images"] == 40 and found["embeddings"][0]["n_features"] == 6240


def test_csv_and_page(report, tmp_path):
    table, page = _report.write(report, str(tmp_path / "new" / "folder"))
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row, result in zip(rows, report.results, strict=True):
        assert float(row["roc_auc_mean"]) == pytest.approx(result.scores["roc_auc"].mean())
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 3 and text.count("data:image/jpeg;base64,") >= 4
    assert "of the images right" in text and text.count("±") >= 8
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert "http" not in text  # self-contained
    logistic = best_of([r for r in report.results if "logistic" in r.classifier])
    y, p = np.concatenate(logistic.y_true), expit(np.concatenate(logistic.y_score))
    right = (p > 0.5) == (y == logistic.positive)
    bins = np.minimum((np.maximum(p, 1 - p) * 15).astype(int), 14)
    gaps = [np.sum((right - np.maximum(p, 1 - p))[bins == b]) for b in range(15)]
    assert f"expected calibration error {np.abs(gaps).sum() / len(y):.3f}" in text


def test_names_of_classes_are_text_in_table_file_page_and_plots(tiles, tmp_path):
    names = [b"<script>", b"=cmd()", b"$x^$", b"\x1b[2J\xff\n", "\N{GRINNING FACE}".encode()]
    root = tmp_path / "<b>"
    for k, name in enumerate(names):
        folder = os.path.join(os.fsencode(root), name)
        os.makedirs(folder)
        for file in tiles[1][8 * k : 8 * k + 8]:
            shutil.copy(file, os.path.join(folder, os.path.basename(os.fsencode(file))))
    shutil.copy(tiles[1][0], os.path.join(os.fsencode(root), names[1], b"<img src=x>.jpg"))
    output = str(tmp_path / "report")
    task = _benchmark.load_folder(str(root))
    options = {"depths": [0], "image_size": 32, "with_audit": True}
    report = _benchmark.compare(task, n_splits=1, **options)
    assert r"8 \x1b[2J\udcff\x0a" in _report.as_text(report)
    table, page = _report.write(report, output)
    with table.open(encoding="utf-8") as file:
        assert {row["task"] for row in csv.DictReader(file)} == {"<b>"}
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "8 &lt;script&gt;, 9 =cmd()" in text
    assert "<b>" not in text and "&lt;b&gt;: 41 images" in text and "\x1b" not in text
    audited = text.partition("What to look at in the images")[2].partition("<h2>")[0]
    assert "× copies with different labels" in audited and "their labels differ" in audited
    assert "&lt;img src=x&gt;.jpg" in audited and "<strong>&lt;script&gt;</strong>" in audited
    assert (
        "<code>sktransfer audit FOLDER --output DIR</code>" in audited and "<img src=x" not in text
    )
    assert len(report.findings) > 5 and audited.count("<figcaption>") == 5


def test_the_encoding_of_files_is_not_that_of_the_locale(report, tmp_path):
    before = locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        table, _ = _report.write(report, str(tmp_path))
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    assert "RBF SVM on 32 × 32 pixels" in table.read_text(encoding="utf-8")


def test_a_report_that_can_not_be_written_is_printed(tiles, tmp_path, capsys):
    (tmp_path / "results.csv").mkdir()
    arguments = ["benchmark", str(tiles[0]), "--splits", "1", "--image-size", "32"]
    assert main([*arguments, "--depths", "0", "--output", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "fine-tuned, depth 0" in out and "results.csv" in err


class Interrupted(io.BytesIO):
    """An output that is interrupted, once, when the first table has arrived."""

    def write(self, data):
        if b"RBF SVM  " in data and self.getvalue():
            super().write(data)
            raise KeyboardInterrupt
        return super().write(data)


def test_an_interrupt_after_the_first_table_loses_nothing_of_it(tiles, monkeypatch, capsys):
    pipe = Interrupted()  # a text layer above it keeps what is not flushed
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(pipe, "utf-8", write_through=False))
    arguments = ["benchmark", str(tiles[0]), "--splits", "1", "--image-size", "32"]
    assert main(arguments) == 130
    rows = [line.split("  ")[0] for line in pipe.getvalue().decode().splitlines()]
    assert rows[-5:] == ["efficientnet_lite0:", *_benchmark.classifiers(40)]
    assert capsys.readouterr().err == "sktransfer: interrupted\n"


def test_a_reader_that_goes_away_does_not_stop_the_report(tiles, tmp_path, monkeypatch):
    read, written = os.pipe()

    def read_one_line():
        with os.fdopen(read) as lines:
            lines.readline()

    reader = threading.Thread(target=read_one_line)
    reader.start()
    arguments = ["benchmark", str(tiles[0]), "--splits", "1", "--image-size", "32", "--depths", "0"]
    with monkeypatch.context() as patch, os.fdopen(written, "w") as output:
        patch.setattr("sys.stdout", output)
        assert main([*arguments, "--output", str(tmp_path)]) == 141
    reader.join()
    assert "What to look at in the images" in (tmp_path / "report.html").read_text("utf-8")


def test_no_name_is_html(report):
    bad = "<script>{}</script>"
    task = replace(report.task, name=bad.format(1), note=bad.format(2))
    task.targets = {bad.format(3): np.where(report.task.targets[""] == "china", bad.format(4), "b")}
    results = [
        replace(r, convention=bad.format(3), backbone=bad.format(5), classifier=bad.format(i + 9))
        for i, r in enumerate(report.results)
    ]
    costs = [replace(cost, backbone=bad.format(6)) for cost in report.costs]
    text = page(replace(report, task=task, results=results, costs=costs))
    assert "<script" not in text and text.count("&lt;script&gt;") > len(results)


def test_a_memory_is_used_again(tiles, tmp_path):
    root, _, _ = tiles
    task = _benchmark.load_folder(str(root))
    options = {"n_splits": 1, "memory": str(tmp_path / "m"), "image_size": 64}
    first = _benchmark.compare(task, **options)
    second = _benchmark.compare(task, **options)
    assert (first.costs[0].n_computed, second.costs[0].n_computed) == (40, 0)
    assert "all in the memory" in _report.as_text(second)
    for one, two in zip(first.results, second.results, strict=True):
        np.testing.assert_array_equal(one.scores["accuracy"], two.scores["accuracy"])


def test_the_announcement_counts_what_may_be_an_image_of_a_class(tmp_path):
    names = ["a/1.jpg", "a/2.PNG", "b/deep/3.webp", "b/notes.txt", "a/.hidden.png", "stray.jpg"]
    for name in [*names, ".git/4.png", "a/.DS_Store", "a/Thumbs.db"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    options = _parser().parse_args(["benchmark", str(tmp_path)])
    assert announcement(options).startswith("comparing classifiers on frozen features: 3 images, ")


def test_several_classes_and_backbones_on_the_command_line(many_classes, tmp_path, capsys):
    arguments = ["benchmark", str(many_classes), "--splits", "1", "--image-size", "32"]
    arguments += ["--backbone", "efficientnet_lite0", "--backbone", "efficientnet_lite1"]
    best = tmp_path / "best.skops"
    assert main([*arguments, "--output", str(tmp_path), "--save-best", str(best)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("comparing classifiers on frozen features: 36 images, ")
    assert "12 class a, 12 class b, 12 class c" in out and "run it again" not in out
    told = [line for line in out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, told)) <= 80
    assert "efficientnet_lite1" in out and "report.html" in out
    assert err == ""  # no progress bar in a pipe
    assert (tmp_path / "report.html").is_file()
    with (tmp_path / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["backbone"] != "none"]
    first = max(rows, key=lambda row: float(row["accuracy_mean"]))
    name = f"the best: {first['classifier']} on {first['backbone']},\nfitted on all 36 images; "
    assert name in out and f"sktransfer predict {best} FOLDER" in out
    # The best as an estimator of images, which `predict` reads as any other file.
    assert main(["predict", str(best), str(many_classes), "--csv"]) == 0
    table = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(table) == 36
    right = [row["label"] == Path(row["path"]).parent.name for row in table]
    assert np.mean(right) > 0.9
    model = load_model(best)
    assert model[0].memory is None and model[0].backbone == first["backbone"]


@pytest.mark.parametrize("classifier", ["RBF SVM, all layers", "fine-tuned, depth 0"])
def test_the_best_is_tuned_as_in_the_comparison(tiles, tmp_path, classifier):
    task = _benchmark.load_folder(str(tiles[0]))
    task.names = {"china": "=china()", "flower": "flower"}
    options = {"memory": str(tmp_path), "verbose": 0, "image_size": 64}
    depths = [0] if "fine-tuned" in classifier else []
    networks = _benchmark._networks(task, ["efficientnet_lite0"], depths, options)
    candidates = _benchmark._candidates(task, networks, depths, 0, options)
    (chosen,) = [one for one in candidates if one.name == classifier]
    result = list(_benchmark._results(task, [chosen], bool(depths), 1, 0, 0))
    best, X = _benchmark._fit_best(task, [chosen], result), chosen.rows()
    with chosen.limited():
        plain = clone(chosen.model).fit(X, task.targets[""])
    wanted = [task.names[label] for label in plain.predict(X)]
    assert best.model.predict(task.images).tolist() == wanted
    skops.io.dump(best.model, tmp_path / "m.skops")
    assert load_model(tmp_path / "m.skops").predict(task.images).tolist() == wanted


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "nowhere"),
        (["{root}", "--backbone", "resnet5"], "Did you mean 'resnet50'"),
        (["{root}", "--device", "warp"], "--device warp can't be used here"),
        (["{root}", "--weights", "nope.pth"], "no such file"),
        (["{root}/china"], "no"),
        (["{root}", "--splits", "0"], "splits"),
        (["{root}", "--depths", "1,99"], "has 18 blocks: conv_stem"),
        (["{root}", "--depths", "1,bloks"], "Did you mean 'blocks'"),
        (["{root}", "--output", "{root}/china/00.jpg"], "is a file; name a folder"),
        (["{root}", "--memory", "{root}/china/00.jpg"], "is a file; name a folder"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(tiles, capsys, arguments, message):
    root, _, _ = tiles
    filled = [argument.format(root=root) for argument in arguments]
    assert main(["benchmark", *filled]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("sktransfer: error: ") and message in err
    assert err.count("\n") == 1 and "Traceback" not in err
    assert out == "" or (out.startswith("comparing ") and out.count("\n") == 2)


def test_the_freezing_depth_on_the_command_line(tiles, tmp_path, capsys):
    root, _, _ = tiles
    options = ["--image-size", "32", "--splits", "1", "--output", str(tmp_path)]
    assert main(["benchmark", str(root), "--depths", "0,1,blocks.6", *options]) == 0
    out = capsys.readouterr().out
    for depth, trained in (("0", "2,562"), ("1", "414,722"), ("blocks.6", "1,020,162")):
        wrapped = rf"fine-tuned, depth .* {trained} .*\n{depth}"  # a name that is long
        assert re.search(rf"fine-tuned, depth {depth} .* {trained} |{wrapped}", out)
    with (tmp_path / "results.csv").open() as file:
        rows = {row["unfreeze"]: row for row in csv.DictReader(file)}
    assert rows["0"]["n_trained"] == "2562" and float(rows["1"]["accuracy_mean"]) > 0.7
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Accuracy and seconds against the depth" in page


def test_too_few_images_of_a_class(tmp_path, tiles):
    _, paths, _ = tiles
    for name, n in (("a", 9), ("b", 3)):
        (tmp_path / name).mkdir()
        for path in paths[:n]:
            (tmp_path / name / Path(path).name).write_bytes(Path(path).read_bytes())
    with pytest.raises(ValueError, match="'b' has 3 images. A comparison needs 8"):
        _benchmark.load_folder(str(tmp_path))


def test_help_names_the_command(capsys):
    for arguments, text in ((["--help"], "benchmark"), (["benchmark", "--help"], "photos/")):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0 and text in capsys.readouterr().out
