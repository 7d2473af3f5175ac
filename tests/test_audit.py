"""Copies, doubtful labels and odd images: found, said in words, and written safely."""

import csv
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from sktransfer._cli import main
from sktransfer._cli.audit_page import audit_page
from sktransfer.inspection import AuditDisplay, find_similar
from sktransfer.io import check_images
from sktransfer.model_selection import _audit, audit, suggest_groups
from sktransfer.model_selection._image_facts import look_at
from sktransfer.model_selection._label_suspects import (
    _other_classes,
    label_suspects,
    out_of_fold,
)

SMALL = {"image_size": 64}


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return str(tmp_path_factory.mktemp("memory"))


def again(picture, how):
    """An array (h, w, 3) saved again, cropped, mirrored or turned."""
    height, width = picture.shape[:2]
    if how == "jpeg":
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(picture)).save(file, "JPEG", quality=80)
        return np.asarray(Image.open(file))
    if how == "crop":
        return picture[: height - height // 50, width // 50 :]
    return {"mirrored": picture[:, ::-1], "turned": np.rot90(picture)}[how]


def kinds_of(table, row):
    return set(table["kind"][table["row"] == row])


# ------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("how", ["jpeg", "crop", "mirrored", "turned"])
def test_copies_are_one_group(tiles, photos, how, memory):
    _, paths, _ = tiles
    originals = [np.asarray(Image.open(path)) for path in paths[:30]]
    X = [*originals, *(again(originals[i], how) for i in (13, 25))]
    groups = suggest_groups(X, memory=memory, **SMALL)
    expected = [*range(30), 13, 25]
    assert groups.tolist() == expected and groups.dtype.kind == "i"


def test_no_copies_and_nothing_but_copies(tiles, photos, memory):
    _, paths, _ = tiles
    assert len(np.unique(suggest_groups(paths, memory=memory, **SMALL))) == len(paths)
    digits = load_digits().images[:200] / 16  # which look alike, and none of which comes twice
    assert len(np.unique(suggest_groups(digits, memory=memory, **SMALL))) >= 198
    thrice = [*paths[:10], *paths[:10], *paths[:10]]
    assert suggest_groups(thrice, memory=memory, **SMALL).tolist() == [*range(10)] * 3
    corners = [(top, left) for top in (60, 230) for left in (0, 200, 400)]
    some = [photo[y : y + 190, x : x + 190] for photo in photos for y, x in corners]
    ways = ("jpeg", "mirrored", "turned")
    all_copies = [*some, *(again(one, how) for how in ways for one in some)]
    assert suggest_groups(all_copies, memory=memory, **SMALL).tolist() == [*range(12)] * 4


def test_one_image_and_two_of_one_colour(memory, sample_files):
    grey = np.full((20, 20, 3), 90, np.uint8)
    assert suggest_groups([grey], memory=memory, **SMALL).tolist() == [0]
    assert suggest_groups([grey, grey], memory=memory, **SMALL).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"row 1 \('nowhere.png'\): there is no such file"):
        suggest_groups([sample_files[0], "nowhere.png"], **SMALL)


# ------------------------------------------------------------------------------ the audit


@pytest.fixture(scope="module")
def odd(tiles, tmp_path_factory):
    """Class folders of tiles, with copies, a wrong label and odd files; what is odd by name."""
    root = tmp_path_factory.mktemp("odd")
    _, paths, labels = tiles
    for path, label in zip(paths, labels, strict=True):
        (root / label).mkdir(exist_ok=True)
        (root / label / path.rpartition("/")[2]).write_bytes(Path(path).read_bytes())
    first = Image.open(paths[0])
    (root / "china" / "copy.jpg").write_bytes(Path(paths[1]).read_bytes())
    first.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / "flower" / "mirrored.png")
    (root / "china" / "broken.jpg").write_bytes(Path(paths[5]).read_bytes()[:500])
    (root / "china" / "text.png").write_text("no image")
    Image.new("RGB", (64, 64), "red").save(root / "flower" / "red.png")
    Image.open(paths[30]).resize((16, 16)).save(root / "flower" / "tiny.png")
    Image.open(paths[31]).resize((320, 64)).save(root / "flower" / "wide.png")
    blurred = Image.open(paths[7]).filter(ImageFilter.GaussianBlur(8))
    blurred.save(root / "china" / "blurred.png")
    Image.open(paths[26]).point(lambda v: v // 12).save(root / "flower" / "dark.png")
    Image.open(paths[12]).point(lambda v: 244 + v // 24).save(root / "china" / "bright.png")
    (root / "rare").mkdir()
    Image.open(paths[33]).rotate(45).save(root / "rare" / "one.png")
    return root


def test_what_an_audit_finds(odd, memory, monkeypatch):
    paths = sorted(map(str, odd.rglob("*.*")))
    y = [path.split("/")[-2] for path in paths]
    table = audit(paths, y, memory=memory, **SMALL)
    found = {(kind, path.rpartition("/")[2]) for kind, path in zip(table.kind, table.path)}  # noqa: B905
    assert {
        ("damaged", "broken.jpg"),
        ("damaged", "text.png"),
        ("small class", "one.png"),
        ("duplicate across classes", "mirrored.png"),
        ("exact duplicate", "copy.jpg"),
        ("blank", "red.png"),
        ("tiny", "tiny.png"),
        ("odd shape", "wide.png"),
        ("blurred", "blurred.png"),
        ("dark", "dark.png"),
        ("bright", "bright.png"),
    } <= found
    assert table["rank"].tolist() == [*range(1, len(table) + 1)]
    assert table["kind"].iloc[:2].tolist() == ["damaged"] * 2
    across = table[table.kind == "duplicate across classes"].iloc[0]
    assert (across.label, across.other_label) == ("flower", "china")
    assert across.other_path.endswith("china/00.jpg") and "labels differ" in across.reason
    assert paths[across.other_row] == across.other_path
    # A warm audit decodes damaged images alone, and says the same.
    decoded = []
    from sktransfer.io._decoding import OpenImage

    for name in ("examine", "decode"):
        method = getattr(OpenImage, name)

        def count(self, *args, method=method):
            decoded.append(self.where)
            return method(self, *args)

        monkeypatch.setattr(OpenImage, name, count)
    again_ = audit(paths, y, memory=memory, **SMALL)
    assert (
        again_.equals(table)
        and len(decoded) == 1
        and "broken.jpg" in decoded[0]
        or (sorted(where.rpartition("/")[2] for where in decoded) == ["broken.jpg')", "text.png')"])
    )


def test_leaks(tiles, memory):
    _, paths, labels = tiles
    X = [*paths, paths[4]]
    y = [*labels, labels[4]]
    for test in ([40], np.arange(41) == 40):
        table = audit(X, y, test=test, memory=memory, **SMALL)
        assert table.kind[0] == "leak" and (table.row[0], table.other_row[0]) == (40, 4)
        assert "not in the test part" in table.reason[0]
    table = audit(X, groups=[*range(40), 40], memory=memory, **SMALL)
    assert table.kind[0] == "leak" and "another group" in table.reason[0]
    same = audit(X, groups=[*range(40), 4], memory=memory, **SMALL)
    assert "leak" not in set(same.kind) and "exact duplicate" in set(same.kind)


def test_labels_that_are_wrong_come_first(tiles, memory, monkeypatch):
    _, paths, labels = tiles
    y = labels.copy()
    wrong = [2, 11, 27]
    y[wrong] = np.where(y[wrong] == "china", "flower", "china")
    table = audit(paths, y, memory=memory, image_size=64)
    suspects = table[table.kind == "label"]
    assert set(wrong) <= set(suspects.row[:5])
    assert set(suspects.other_label) <= {"china", "flower"}
    assert (np.diff(suspects.score) <= 0).all() and (suspects.score <= 1).all()
    monkeypatch.setattr(_audit, "_SAMPLE", 30)
    monkeypatch.setattr(_audit, "_DIRECTIONS", 12)
    fewer = audit(paths, y, memory=memory, image_size=64)
    assert set(wrong) <= set(fewer.row[fewer.kind == "label"][:6])
    assert not fewer.equals(table)
    monkeypatch.undo()
    numbers = audit(paths, np.where(y == "china", 0, 1), memory=memory, image_size=64)
    other = numbers.other_label[numbers.kind == "label"]
    assert other.tolist() == np.where(suspects.other_label == "china", 0, 1).tolist()


def test_copies_are_no_witnesses_and_small_classes_are_not_judged():
    chance = np.random.default_rng(0)
    X = np.r_[chance.normal(size=(20, 3)), chance.normal(size=(20, 3)) + 6, [[0, 0, 0]] * 2]
    codes = np.repeat([0, 1, 0, 1], [20, 20, 1, 1])
    groups = np.r_[np.arange(40), 40, 40]
    found = label_suspects(LogisticRegression(), X, codes, groups, random_state=0)
    assert [(one.row, one.other) for one in found if one.best > one.given] == [(41, 0)]
    lonely = np.r_[codes, 2]
    p = out_of_fold(
        LogisticRegression(), np.r_[X, [[9, 9, 9]]], lonely, np.r_[groups, 41], random_state=0
    )
    assert np.isnan(p[-1]).all() and np.isfinite(p[:-1]).all()


def test_bad_input(tmp_path, memory):
    with pytest.raises(ValueError, match="0 sample"):
        audit([], **SMALL)
    image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3) * 9
    assert set(audit([image], ["a"], memory=memory, **SMALL).kind) == {"small class"}
    alone = audit([image], memory=memory, **SMALL)
    assert len(alone) == 0 and "reason" in alone and str(alone.other_row.dtype) == "Int64"
    (tmp_path / "a.jpg").write_bytes(b"no image")
    (tmp_path / "b.jpg").write_bytes(b"")
    damaged = audit([str(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg")], **SMALL)
    assert damaged.kind.tolist() == ["damaged"] * 3 and "empty" in damaged.reason[1]
    two = [image, image[::-1]]
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        audit(two, ["a"], **SMALL)
    with pytest.raises(ValueError, match="groups has 3 entries for 2 images"):
        audit(two, groups=[1, 2, 3], **SMALL)
    with pytest.raises(ValueError, match=r"groups contains NaN.* in 1 of 2 rows \(1\)"):
        audit(two, groups=["a", np.nan], **SMALL)
    with pytest.raises(ValueError, match=r"groups has shape \(2, 2\)"):
        audit(two, groups=np.eye(2), **SMALL)
    for groups in (5, "ab"):
        with pytest.raises(TypeError, match="groups is of type"):
            audit(two, groups=groups, **SMALL)
    for test in ([2], [-1], [0.5], [[0]], [True], ([0, 1], [1]), ["a"]):
        with pytest.raises(ValueError, match="test must be a mask of 2 booleans"):
            audit(two, test=test, **SMALL)
    with pytest.raises(ValueError, match="n_neighbors=3, but there are 2 images"):
        find_similar(two, two, n_neighbors=3, **SMALL)
    for wrong in ("layer", "normalize", "imagesize"):
        for call in (audit, suggest_groups, partial(find_similar, two)):
            with pytest.raises(TypeError, match=f"{wrong}'. Of PretrainedFeatureExtractor, it"):
                call(two, **{wrong: 1})
    for call in (audit, suggest_groups, partial(find_similar, two)):
        with pytest.raises(ValueError, match="'batch_size' parameter"):
            call(two, batch_size=0)
    for n_neighbors in (0, "2", None, 1.5):
        with pytest.raises(ValueError, match="'n_neighbors' parameter of find_similar"):
            find_similar(two, two, n_neighbors=n_neighbors, **SMALL)


def test_facts_of_images_of_any_size():
    images = [np.zeros((1, 1, 3), np.uint8), np.full((2, 900, 3), 255, np.uint8)]
    facts = look_at(check_images(images))
    assert facts.column("height").tolist() == [1, 2] and facts.column("width")[1] == 900
    assert np.isnan(facts.column("sharpness")).all() and facts.small[1].min() >= 254


# ------------------------------------------------------------------------------ shown and written


def test_display(odd, memory):
    paths = sorted(map(str, odd.rglob("*.*")))
    table = audit(paths, [p.split("/")[-2] for p in paths], memory=memory, **SMALL)
    display = AuditDisplay.from_audit(table, paths, n_findings=8)
    assert display.axes_.shape == (3, 6) and len(display.images) == 8
    assert display.images[0] is None or display.images[1] is None  # of a file that is no image
    assert display.axes_[0, 0].get_title().startswith("damaged\nchina (image ")
    with pytest.raises(ValueError, match="nothing to plot"):
        AuditDisplay.from_audit(table.head(0), paths)


NAMES = ["=1+1.png", "<script>alert(1).png", "two\nlines.png", "quo\"te's.png", "-a.png"]


@pytest.fixture
def names(tmp_path, photos):
    folder = tmp_path / "in"
    for label in ("=cmd", "<b>x"):
        (folder / label).mkdir(parents=True)
        for i, name in enumerate(NAMES):
            tile = photos[0][60 * i : 60 * i + 60, 70 * i : 70 * i + 60]
            Image.fromarray(np.ascontiguousarray(tile)).save(folder / label / name)
    return folder


def test_names_in_pages_tables_and_csv(names, tmp_path, capsys, memory):
    common = ["--memory", memory, "--image-size", "64"]
    assert main(["audit", str(names), "--output", str(tmp_path / "out"), *common]) == 0
    text = capsys.readouterr().out
    assert "duplicate across classes" in text
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 80
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>x" not in page
    assert "http" not in page.replace("http-equiv", "")
    with open(tmp_path / "out" / "findings.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) > 5 and all(
        not cell.startswith(("=", "+", "-", "@")) for r in rows for cell in r
    )
    assert "\n" not in "".join(map("".join, rows))
    assert main(["audit", str(names), "--json", *common]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["counts"]["duplicate across classes"] == 5 and document["n_images"] == 10
    query = str(names / "=cmd" / NAMES[1])
    html = str(tmp_path / "similar.html")
    assert main(["similar", str(names), query, "-k", "3", "--html", html, *common]) == 0
    assert "alert(1)" in capsys.readouterr().out and "<script" not in Path(html).read_text()
    assert main(["similar", str(names), query, "--csv", *common]) == 0
    lines = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert lines[0] == ["query", "rank", "path", "distance"] and len(lines) == 6
    assert float(lines[1][3]) == 0


def test_commands_of_bad_input(tmp_path, tiles, capsys, memory):
    root, paths, _ = tiles
    assert main(["audit", str(tmp_path)]) == 2
    assert "No image in" in capsys.readouterr().err
    (tmp_path / "no.jpg").write_bytes(b"no image")
    assert main(["audit", str(tmp_path)]) == 0
    assert "1 image, 1 finding\n" in (out := capsys.readouterr().out) and "damaged" in out
    assert main(["similar", str(root), str(tmp_path / "no.jpg"), "--memory", memory]) == 2
    assert "no.jpg" in capsys.readouterr().err
    some = [str(root), paths[0], str(tmp_path / "no.jpg"), "--skip-unreadable", "--json"]
    assert main(["similar", *some, "--memory", memory, "--image-size", "64"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {row["query"] for row in document["similar"]} == {paths[0]}
    assert [row["path"] for row in document["skipped"]] == [some[2]]
    assert main(["similar", str(root), some[2], "--skip-unreadable"]) == 2
    assert "No image of 1 can be read" in capsys.readouterr().err
    assert main(["similar", str(root), str(tmp_path / "gone.jpg")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["similar", str(root), paths[0], "--html", "page.txt"]) == 2
    for empty in ("--output", "--memory", "--test", "--groups"):
        assert main(["audit", str(root), empty, ""]) == 2
        assert f"error: {empty} is empty: pass a value." in capsys.readouterr().err
    assert main(["benchmark", ""]) == 2  # would otherwise take the solar cells
    assert "error: FOLDER is empty" in capsys.readouterr().err
    assert main(["audit", str(root), "--test", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    common = ["--memory", memory, "--image-size", "64"]
    assert main(["audit", str(root), "--test", str(root), *common]) == 0
    assert "leak" in capsys.readouterr().out


def test_a_command_that_knows_groups(tmp_path, tiles, capsys, memory):
    for name in ("learnt/p1.jpg", "learnt/p2.jpg", "tested/p3.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(Path(tiles[1][0]).read_bytes())
    common = [str(tmp_path / "learnt"), "--memory", memory, "--image-size", "64"]
    assert main(["audit", *common, "--groups", "(p[0-9])", "--json"]) == 0
    (leak,) = json.loads(capsys.readouterr().out)["findings"]
    assert leak["kind"] == "leak" and "another group" in leak["reason"]
    tested = ["--test", str(tmp_path / "tested"), "--json"]
    assert main(["audit", *common, *tested, "--groups", "(p[0-9])"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"leak": 2}
    assert main(["audit", *common, "--groups", "(q[0-9])"]) == 2
    assert "finds no group in the paths of 2 of 2 images" in capsys.readouterr().err


def test_an_empty_page():
    assert "Nothing was found" in audit_page(audit([np.eye(9)], **SMALL), "<script>")


def test_a_label_that_another_class_leads_by_far_is_suspect():
    """Of classes that are told easily, hardly an image is as sure as the mean."""
    x = np.r_[np.linspace(-5, -3, 20), np.linspace(3, 5, 20), 1.2, 0.1]
    codes = np.repeat([0, 1, 0], [20, 20, 2])
    model = LogisticRegression(C=1.0)
    found = label_suspects(model, x[:, None], codes, np.arange(42), random_state=0)
    assert (found[0].row, found[0].other) == (40, 1)
    assert all(one.best < 3 * one.given for one in found[1:])
    own = model.fit(x[:40, None], codes[:40]).predict_proba(x[20:40, None])[:, 1].mean()
    assert found[0].best < own  # so it is not credible for that class


def test_a_few_labels_that_are_not_sure_are_listed_too():
    """An image in a wrong class may be as like that class as its own."""
    x = np.r_[np.linspace(-5, -3, 30), np.linspace(3, 5, 30), 3.5, -0.4]
    codes = np.repeat([0, 1, 0, 1], [30, 30, 1, 1])
    found = label_suspects(LogisticRegression(), x[:, None], codes, np.arange(62), random_state=0)
    assert [one.row for one in found[:2]] == [60, 61] and found[1].best > 0.4
    close = np.r_[np.linspace(-2, 1, 30), np.linspace(-1, 2, 30)][:, None]
    found = label_suspects(
        LogisticRegression(), close, np.repeat([0, 1], 30), np.arange(60), random_state=0
    )
    shares = [one.best / (one.best + one.given) for one in found]
    assert len(found) == 15 and shares == sorted(shares, reverse=True)
    few = slice(0, 60, 3)
    found = label_suspects(
        LogisticRegression(), close[few], np.repeat([0, 1], 10), np.arange(20), random_state=0
    )
    assert len(found) <= 5


def test_of_many_classes_one_that_is_three_times_as_probable_makes_a_label_suspect():
    """Many classes share the rest, so that none of them leads by one half."""
    p = np.full((61, 12), 0.05)
    p[:60, 0], p[:60, 1:] = 0.9, 0.1 / 11
    p[60, [0, 1]] = 0.1, 0.4
    best, is_suspect = _other_classes(p, np.zeros(61, int))
    assert is_suspect.tolist() == [False] * 60 + [True] and best[60] == 1
