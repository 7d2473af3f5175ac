"""
Your own folder
===============

From a folder of images to a model in a file: read, fine-tune, look at what went wrong, save, load.
"""

# %%
# Your images lie in a folder that has one subfolder for each class. Here it is written first: small
# pieces of six photographs, 30 of each, and one file that is broken. Some pieces overlap, which
# makes the score below a little too good.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

china, flower = load_sample_images().images
photos = {
    "astronaut": data.astronaut(),
    "cat": data.chelsea(),
    "china": china,
    "coffee": data.coffee(),
    "flower": flower,
    "motorcycle": data.stereo_motorcycle()[0],
}

work, random = tempfile.TemporaryDirectory(), np.random.default_rng(0)
folder = Path(work.name, "photos")
for name, photo in photos.items():
    (folder / name).mkdir(parents=True)
    for number in range(30):
        top, left = (random.integers(0, length - 64) for length in photo.shape[:2])
        piece = Image.fromarray(photo[top : top + 64, left : left + 64])
        piece.save(folder / name / f"{number:02}.png")
(folder / "cat" / "empty.png").touch()

# %%
# ``load_image_folder`` lists it, as scikit-learn's ``load_files`` would, with the names of the
# folders as labels; images are read later. A file that can't be read is left out with a warning
# that names it, or raises, as you like.

import warnings

from sktransfer import load_image_folder

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = load_image_folder(folder)
print(str(caught[0].message).replace(str(folder), "photos"))

print(len(found.data), "images of", found.target_names)

# %%
# Held out before anything else: a third. The rest is learnt from, with two blocks unfrozen. There
# is ``augment="flip"``, which shows the network each image in its mirror as well, and
# ``augment="dihedral"`` for images without an upright direction; that takes longer, and is left out
# here.

from sklearn.model_selection import train_test_split

from sktransfer import FineTunedClassifier

X_train, X_test, y_train, y_test = train_test_split(
    found.data, found.target, test_size=1 / 3, stratify=found.target, random_state=0
)
model = FineTunedClassifier(
    unfreeze=2,
    max_epochs=4,
    image_size=64,
    memory=str(Path(work.name, "cache")),
    runtime="torch",  # so few images are not worth a compilation
    random_state=0,
)
model.fit(X_train, y_train)
print(f"accuracy on {len(y_test)} other pieces: {model.score(X_test, y_test):.2f}")

# %%
# What went wrong? The images with the largest losses, what was said of them and what is true.
# This is where wrong labels, odd crops and classes that can't be told apart are found.

from sktransfer.inspection import TopLossesDisplay

TopLossesDisplay.from_estimator(model, X_test, y_test, n_images=8)
plt.show()

# %%
# Numbers from labels and predictions are scikit-learn's.

from sklearn.metrics import ConfusionMatrixDisplay

figure, ax = plt.subplots(figsize=(4.8, 4.2), layout="constrained")
ConfusionMatrixDisplay.from_estimator(
    model, X_test, y_test, ax=ax, cmap="Blues", colorbar=False, xticks_rotation=45
)
plt.show()

# %%
# To a file, by skops, and back by ``load_model``, which runs no code that a file may name: it
# refuses files with other types than those of this library, scikit-learn and NumPy, and lists
# them. ``pickle`` and ``joblib`` work as well, on files that you trust. The file holds the trained
# block and the head; the frozen rest is loaded by its name and compared.

import skops.io as sio

from sktransfer import load_model

file = Path(work.name, "photos.skops")
sio.dump(model, file)
print(f"{file.stat().st_size / 1e6:.1f} MB")

loaded = load_model(file)
print(np.array_equal(loaded.predict_proba(X_test), model.predict_proba(X_test)))
