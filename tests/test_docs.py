"""Every snippet of README and docs runs as it is printed, and so does every docstring."""

import ast
import doctest
import importlib
import pkgutil
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import sktransfer

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for folder in ("traps", "migrate")
    for page in (ROOT / "docs" / folder).glob("*.md")
    if page.stem != "index"
)
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(sktransfer.__path__, "sktransfer.")
    if m.name != "sktransfer.__main__"
)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def snippets_of(page):
    """Return what stands in ```python fences; ```py is of other libraries, for the reader."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


def run_snippets(page, tiles, tmp_path, monkeypatch):
    for path in map(Path, tiles[1]):
        if int(path.stem) < 8:  # of each class, as few as the snippets can do with
            folder = tmp_path / "photos" / path.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    snippets = snippets_of(page)
    assert snippets
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), namespace)


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/guide.md", "docs/export.md"])
def test_snippets(page, tiles, tmp_path, monkeypatch):
    run_snippets(page, tiles, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_snippets_on_traps_and_for_newcomers(page, tiles, tmp_path, monkeypatch):
    run_snippets(page, tiles, tmp_path, monkeypatch)


def packages_named_on(page):
    """Return what a fresh environment holds that has just what a page says, as far as declared."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = " ".join(re.findall(r"pip install [^`\n]+", (ROOT / page).read_text()))
    extras = " ".join(re.findall(r"\[([\w,]+)\]", lines))
    wanted, found = re.findall(r"\w+", extras), {*re.findall(r" ([a-z][\w-]+)", lines)}
    needed = [*project["dependencies"]]
    while wanted:
        needed += project["optional-dependencies"][wanted.pop()]
        wanted += re.findall(r"\w+", "".join(re.findall(r"sktransfer\[(.*?)\]", " ".join(needed))))
        needed = [one for one in needed if not one.startswith("sktransfer[")]
    return {canonical(re.match(r"[\w.-]+", one)[0]) for one in [*needed, *found]}


def canonical(package):
    return re.sub(r"[-_.]+", "-", package).lower()


# What parts of the library take that a plain installation has not.
NEEDS = {"SaliencyDisplay": "grad-cam"}


@pytest.fixture(scope="module")
def packages_of():
    return packages_distributions()


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/guide.md", *PAGES])
def test_snippets_take_what_the_page_says(page, packages_of):
    needed = set()
    for node in ast.walk(ast.parse("\n".join(snippets_of(page)))):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        names = [alias.name for alias in getattr(node, "names", [])]
        modules += names if isinstance(node, ast.Import) else []
        needed |= {NEEDS[name] for name in [*modules, *names] if name in NEEDS}
        for name in {module.partition(".")[0] for module in modules}:
            if name != "sktransfer" and name not in sys.stdlib_module_names:
                needed |= {canonical(package) for package in packages_of.get(name, [name])[:1]}
    assert needed - packages_named_on(page) == set()


@pytest.mark.parametrize("folder", ["traps", "migrate"])
def test_every_page_is_in_the_index(folder):
    pages = {page.stem for page in (ROOT / "docs" / folder).glob("*.md")} - {"index"}
    tree = re.search(
        r"```{toctree}\n(.*?)```", (ROOT / f"docs/{folder}/index.md").read_text(), re.S
    )
    assert {line for line in tree[1].split() if not line.startswith(":")} - {"1"} == pages


def test_the_reference_names_every_module():
    table = (ROOT / "docs" / "contributing.md").read_text()
    packages = {name.rpartition(".")[0] for name in MODULES}
    assert [
        name for name in MODULES if name not in packages and f"`{name.split('.')[-1]}`" not in table
    ] == []


def public_names():
    """Yield what every public module says that it publishes, as module and name."""
    public = [name for name in MODULES if "._" not in name]
    for module in ["sktransfer", *public]:
        for name in importlib.import_module(module).__all__:
            yield module, name


def test_the_reference_lists_all_that_is_public():
    page = (ROOT / "docs" / "reference.md").read_text()
    listed = {f"sktransfer.{entry}" for entry in re.findall(r"^   ([\w.]+)$", page, re.M)}
    missing = [
        f"{module}.{name}"
        for module, name in public_names()
        if not {f"{module}.{name}", f"sktransfer.{name}"} & listed
    ]
    assert missing == []


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            if "auto_examples" not in target:  # written when the pages are built
                assert (page.parent / target).exists(), f"{page.name}: {target}"
