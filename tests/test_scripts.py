"""The list of benchmarks, the runner of their quick forms, and the charts of the documentation."""

import importlib
import re
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    path.name
    for path in (ROOT / "benchmarks").iterdir()
    if path.suffix in (".py", ".sh") and not path.name.startswith("_")
)


def load(name, folder, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / folder))
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)  # another test may mean another module by this name
    return module


@pytest.fixture
def quick(monkeypatch):
    return load("quick", "benchmarks", monkeypatch)


@pytest.fixture
def charts(monkeypatch):
    pytest.importorskip("sphinx")
    return load("charts", "docs", monkeypatch)


def test_every_script_is_listed_once():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+\.(?:py|sh))`", text, re.M)) == SCRIPTS


def test_every_script_has_a_quick_form_of_options_that_it_takes(quick):
    assert sorted([*quick.QUICK, "quick.py"]) == SCRIPTS
    for name, form in quick.QUICK.items():
        source = (ROOT / "benchmarks" / name).read_text()
        for option in re.findall(r"(?<!\S)--?[a-z][\w-]*", form.arguments):
            assert f'"{option}"' in source, f"{name} has no {option}"


def test_what_fails_hangs_or_lacks_a_library_is_named(quick, tmp_path, capsys):
    sources = {
        "fine.py": "import sktransfer, sys; print(sys.argv[1:])",
        "fails.py": "print('why it fails'); raise SystemExit(3)",
        "lacks.py": "",
    }
    forms = {}
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
        forms[tmp_path / name] = quick.Quick("--images 1")
    forms[tmp_path / "lacks.py"] = quick.Quick(needs=["a_library_that_is_not_there"])
    assert quick.run_each(forms, 600) == ["fails.py"]
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"fine\.py +[\d.]+ s  exit code 0", lines[0])
    assert re.fullmatch(r"fails\.py +[\d.]+ s  exit code 3", lines[1])
    assert lines[2].strip() == "why it fails"
    assert lines[-1].split() == "lacks.py left out: no a_library_that_is_not_there".split()


def test_a_script_that_hangs_is_ended_with_its_children(quick, tmp_path):
    script = tmp_path / "hangs.sh"
    script.write_text(f"sleep 600 & echo $! > {tmp_path}/child; wait")
    for limit in (1, 10, 100):  # seconds, in which a busy machine may not even start it
        assert quick.run(script, [], limit)[0] == 124
        if written := (tmp_path / "child").exists() and (tmp_path / "child").read_text():
            break
    child = int(written)
    end = time.monotonic() + 300
    while is_running(child) and time.monotonic() < end:  # a signal takes its time
        time.sleep(0.02)
    assert not is_running(child)


def is_running(process):
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    "cell, value",
    [
        ("0.881 ± 0.012", (0.881, 0.869, 0.893, "0.881 ± 0.012")),
        ("1,035.8", (1035.8, 1035.8, 1035.8, "1,035.8")),
        ("2.5e-06", (2.5e-6, 2.5e-6, 2.5e-6, "2.5e-06")),
        ("-0.041 (-0.098 to +0.017)", (-0.041, -0.098, 0.017, "-0.041")),
        ("116 (10.4 ms)", (116, 116, 116, "116")),
        ("not measured", None),
        ("", None),
    ],
)
def test_a_cell_of_a_chart(charts, cell, value):
    found = charts.read(cell)
    if value is None:
        assert found is None
    else:
        assert found[:3] == pytest.approx(value[:3])
        assert found.text == value[3]


@pytest.mark.parametrize("kind", ["bars", "dots", "lines"])
def test_a_chart_shows_the_figures_of_its_table(charts, kind):
    rows = [
        charts.Mark("<b>pixels</b>", [charts.read("0.8 ± 0.1"), None], False),
        charts.Mark("ours", [charts.read("0.9"), charts.read("1.25")], True),
    ]
    picture = charts.KINDS[kind]("Accuracy & more", rows, ["25", "1,968"])
    assert "&lt;b&gt;pixels" in picture and "Accuracy &amp; more" in picture
    assert picture.count("<circle") == (0 if kind == "bars" else 3)
    written = [] if kind == "lines" else ["0.8 ± 0.1", "0.9", "1.25"]
    assert all(f">{text}</text>" in picture for text in written)


def test_a_chart_that_would_mislead_is_refused(charts):
    rows = [charts.Mark("loss", [charts.read("-0.5")], False)]
    with pytest.raises(ValueError, match="below zero: kind dots"):
        charts.bars("", rows, ["gain"])
    with pytest.raises(ValueError, match="two columns"):
        charts.lines("", rows, ["25"])
    assert "nan" not in charts.dots("", rows, ["gain"])  # a single value has no range
