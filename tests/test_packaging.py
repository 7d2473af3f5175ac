"""What is built, installed and published: the wheel, all modules of it, the public names."""

import importlib
import inspect
import json
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sktransfer

ROOT = Path(__file__).parent.parent
PUBLIC = ["", ".base", ".inspection", ".io", ".metrics", ".model_selection", ".models"]
PUBLIC = [f"sktransfer{name}" for name in (*PUBLIC, ".transforms")]


def module_names(folder):
    """Names of the modules in the files below a folder."""
    files = (folder / "sktransfer").rglob("*.py")
    parts = [file.relative_to(folder).with_suffix("").parts for file in files]
    return {".".join(name).removesuffix(".__init__") for name in parts}


def test_all_modules_are_walked():
    walked = {module.name for module in pkgutil.walk_packages(sktransfer.__path__, "sktransfer.")}
    assert walked | {"sktransfer"} == module_names(ROOT)
    assert {"sktransfer.base", "sktransfer.models._registry"} <= walked


READ_ALL = """
import importlib, json, pkgutil, sys
sys.path[:] = [sys.argv[1], *(path for path in sys.path if path not in ("", sys.argv[2]))]
import sktransfer
sktransfer.PretrainedFeatureExtractor
loaded = list(sys.modules)
names = [m.name for m in pkgutil.walk_packages(sktransfer.__path__, "sktransfer.")]
modules = map(importlib.import_module, ["sktransfer", *names])
print(json.dumps([loaded, {module.__name__: module.__file__ for module in modules}]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder in which the wheel is installed, alone."""
    source, wheels, target = (
        tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "sktransfer", source / "sktransfer", ignore=shutil.ignore_patterns("__pycache__")
    )
    # Neither building nor installing it asks a registry: setuptools comes with the extra "test".
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = wheels.glob("sktransfer-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)  # of a pure wheel, installing it does no more
    shutil.rmtree(source)
    return target


def test_the_wheel_alone_has_all_modules_and_the_extractor_needs_few(installed, tmp_path):
    command = [sys.executable, "-P", "-c", READ_ALL, str(installed), str(ROOT)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    loaded, files = json.loads(ran.stdout)
    # These would add a quarter of a second to the import.
    heavy = {"matplotlib", "sklearn.datasets", "sklearn.model_selection", "skorch"}
    assert not heavy.intersection(loaded)
    assert files.keys() == module_names(ROOT)
    assert all(Path(file).is_relative_to(installed) for file in files.values())


def test_the_wheel_has_types_a_license_and_a_command(installed):
    (info,) = installed.glob("*.dist-info")
    assert (installed / "sktransfer" / "py.typed").exists()
    assert (info / "licenses" / "LICENSE").exists()
    assert "sktransfer = sktransfer._cli:main" in (info / "entry_points.txt").read_text()
    assert {path.name for path in installed.iterdir()} == {"sktransfer", info.name}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_our_own(name):
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    shown = {word for word in dir(module) if not word.startswith("_")}
    assert shown - {public.rpartition(".")[2] for public in PUBLIC} == {*module.__all__}
    for word in module.__all__:
        assert not word.startswith("_")
        value = getattr(module, word)
        if callable(value):  # what is only data tells no module
            assert inspect.getmodule(value).__name__.startswith("sktransfer")


def test_all_public_modules_are_known():
    found = {module.name for module in pkgutil.iter_modules(sktransfer.__path__, "sktransfer.")}
    assert {n for n in found if "._" not in n} == {*PUBLIC} - {"sktransfer"}
