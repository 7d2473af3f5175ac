"""The main ways through the library, in seconds: run where the suite would take too long.

    python .ci/smoke.py

Every module is imported; images are embedded, in a pipeline and a search, through a memory; a
network is fine-tuned, pickled, written to a model file, read again, and used by the command line; a
table and a plot are written.
"""

import importlib
import pickle
import pkgutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import skops.io
from PIL import Image
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import sktransfer
from sktransfer import (
    FineTunedClassifier,
    PretrainedFeatureExtractor,
    load_image_folder,
    load_model,
)
from sktransfer.inspection import HistoryDisplay

SIZE = {"image_size": 64}


def import_all() -> None:
    for module in pkgutil.walk_packages(sktransfer.__path__, "sktransfer."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def write_images(folder: Path) -> None:
    """Write grey noise, in two folders of dark and bright images."""
    chance = np.random.default_rng(0)
    for name, level in (("bright", 130), ("dark", 0)):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            pixels = level + chance.integers(0, 120, (80, 90, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


def search(data, memory: Path) -> None:
    extractor = PretrainedFeatureExtractor(memory=memory, **SIZE)
    svm = make_pipeline(extractor, StandardScaler(), SVC())
    found = GridSearchCV(svm, {"svc__C": [1, 10]}, cv=2).fit(data.data, data.target)
    assert found.score(data.data, data.target) == 1
    without = PretrainedFeatureExtractor(**SIZE).transform(data.data)
    np.testing.assert_array_equal(extractor.transform(data.data), without)


def fine_tune(data, folder: Path) -> None:
    options = {"max_epochs": 2, "random_state": 0, "memory": folder / "memory", **SIZE}
    model = FineTunedClassifier(unfreeze=1, **options).fit(data.data, data.target)
    expected = model.predict_proba(data.data)
    skops.io.dump(model, folder / "model.skops")
    for copied in (pickle.loads(pickle.dumps(model)), load_model(folder / "model.skops")):
        np.testing.assert_allclose(copied.predict_proba(data.data), expected, atol=1e-6)


def use_command_line(data, folder: Path) -> None:
    command = [sys.executable, "-m", "sktransfer", "predict", "--csv"]
    command += [str(folder / "model.skops"), *data.data]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert len(ran.stdout.splitlines()) == len(data.data) + 1
    table = folder / "embeddings.csv"
    command = [sys.executable, "-m", "sktransfer", "embed", str(folder / "images"), "-o", table]
    subprocess.run(command, stdout=subprocess.PIPE, check=True)
    assert len(table.read_text().splitlines()) == len(data.data) + 1


def plot(folder: Path) -> None:
    HistoryDisplay([1.0, 0.5]).plot().figure_.savefig(folder / "history.svg")


def main() -> None:
    import_all()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images")
        data = load_image_folder(folder / "images")
        search(data, folder / "memory")
        fine_tune(data, folder)
        use_command_line(data, folder)
        plot(folder)
    names = ("numpy", "scipy", "scikit-learn", "pandas", "matplotlib", "torch", "torchvision")
    names += ("timm", "skorch", "skops")
    print("works with", ", ".join(f"{name} {version(name)}" for name in names))


if __name__ == "__main__":
    main()
