"""Every snippet of README and docs runs as it is printed, and so does every docstring."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import sktransfer

ROOT = Path(__file__).parent.parent
MODULES = sorted(m.name for m in pkgutil.iter_modules(sktransfer.__path__) if m.name != "__main__")


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(f"sktransfer.{name}")
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_snippets(page, tiles, tmp_path, monkeypatch):
    root, _, _ = tiles
    (tmp_path / "photos").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert snippets
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), namespace)


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
