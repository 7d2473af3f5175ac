"""What `verbose` shows: 0 nothing, 1 one bar for a whole fit or prediction, 2 a table as well."""

import re
import subprocess
import sys

import pytest
from networks import small

from sktransfer import FineTunedClassifier
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))
KINDS = {
    "solved head, then a block": {"unfreeze": 1},
    "head alone": {"unfreeze": 0},
    "trained head, then a block": {"unfreeze": 1, "head": (4,)},
    "everything": {"unfreeze": "all", "early_stopping": True},
    "views": {"unfreeze": 1, "augment": "flip", "predict_views": 2},
}


def classifier(**options):
    return FineTunedClassifier(Backbone(small(), SIZE), max_epochs=2, random_state=0, **options)


def bars(text):
    """Return the last state of each bar: a bar is written over itself until it is closed."""
    return [line.split("\r")[-1] for line in text.split("\n") if line.strip()]


@pytest.mark.parametrize("kind", KINDS)
def test_one_bar(tiles, capfd, kind):
    _, paths, labels = tiles
    model = classifier(verbose=1, **KINDS[kind]).fit(paths, labels)
    shown = capfd.readouterr()
    assert shown.out == ""
    (bar,) = bars(shown.err)
    assert "100%" in bar
    assert ("epoch 2/2" in bar and "train_loss=" in bar) == (kind != "head alone")
    assert ("valid_loss=" in bar) == (kind == "everything")
    assert ("frozen blocks: " in shown.err) and ("head" in shown.err)
    model.predict(paths)
    (bar,) = bars(capfd.readouterr().err)
    assert re.search(r"100%.*(\d+)/\1 ", bar)


def test_the_bar_counts_images(tiles, capfd):
    _, paths, labels = tiles
    model = classifier(verbose=1).fit(paths, labels)
    shown = capfd.readouterr().err
    # Once through the frozen blocks, and two epochs: a third of the images each.
    assert re.search(r"epoch 1/2.* 2[0-6]/40 ", shown) and "40/40" in shown
    assert max(int(n) for n in re.findall(r" (\d+)/40 ", shown)) == 40
    model.partial_fit(paths[10:30], labels[10:30])
    assert "20/20" in capfd.readouterr().err
    model.predict(paths[:30])
    assert "30/30" in capfd.readouterr().err


def test_an_early_end_fills_the_bar(tiles, capfd):
    _, paths, labels = tiles
    model = classifier(unfreeze="all", early_stopping=True, n_iter_no_change=1, lr=0.0)
    model.set_params(max_epochs=50, verbose=1).fit(paths, labels)
    assert model.n_iter_ < 5
    (bar,) = bars(capfd.readouterr().err)
    assert "100%" in bar and "/50" in bar


def test_a_table_with_two(tiles, capfd):
    _, paths, labels = tiles
    model = classifier(verbose=2, early_stopping=True).fit(paths, labels)
    shown = capfd.readouterr()
    assert str(model.plan_) in shown.out.splitlines()
    assert "train_loss" in shown.out and "valid_loss" in shown.out
    assert len(re.findall(r"^ +[12] +", shown.out, re.M)) == 2
    assert "100%" in shown.err


def test_nothing_with_zero(tiles, capfd):
    _, paths, labels = tiles
    classifier(early_stopping=True).fit(paths, labels).predict(paths)
    assert capfd.readouterr() == ("", "")


NOTEBOOK = """
import sys, types, warnings
class ZMQInteractiveShell:  # what tqdm takes for a notebook
    config = {"IPKernelApp": {}}
sys.modules["ipykernel.zmqshell"] = types.SimpleNamespace()
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=ZMQInteractiveShell)
sys.modules["ipywidgets"] = None  # it is not installed
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from sktransfer._bars import tqdm
from tqdm.std import tqdm as plain
assert not said
assert issubclass(tqdm, plain) and not any("notebook" in t.__module__ for t in tqdm.__mro__)
"""


def test_a_notebook_without_widgets_has_a_plain_bar_and_no_warning():
    subprocess.run([sys.executable, "-c", NOTEBOOK], check=True)  # tqdm must not be there yet
