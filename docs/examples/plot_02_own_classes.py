"""
Classes of your own
===================

The quickest way to a classifier of your own: a frozen network turns each image into a row of
numbers, and a classifier of scikit-learn learns from the rows. A few images of each class will do.
"""

# %%
# Seven photographs, cut into small pieces. The task: of which photograph is a piece? Pieces to
# learn from are of the left half of a photograph, pieces to test on are of the right half, so
# that no pixel is in both.

import matplotlib.pyplot as plt
import numpy as np
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
    "tissue": data.immunohistochemistry(),
}


def pieces(photo, n, random, size=64):
    """Return pieces (n, size, size, 3) of random places."""
    places = zip(*(random.integers(0, length - size, n) for length in photo.shape[:2]), strict=True)
    return [photo[top : top + size, left : left + size] for top, left in places]


random, n_each = np.random.default_rng(0), 30
labels = np.repeat(list(photos), n_each)
halves = {name: np.array_split(photo, 2, axis=1) for name, photo in photos.items()}
train, test = (
    np.concatenate([pieces(halves[name][side], n_each, random) for name in photos])
    for side in (0, 1)
)

figure, axes = plt.subplots(3, 7, figsize=(7.2, 3.4), layout="constrained")
for column, name in zip(axes.T, photos, strict=True):
    column[0].set_title(name, fontsize=9)
    for ax, piece in zip(column, test[labels == name], strict=False):
        ax.imshow(piece)
        ax.set_axis_off()
plt.show()

# %%
# ``make_classifier`` is the one recipe that was among the best on every task that was
# :doc:`measured </results/features>`: the features of all layers of a network, scaled, and a
# logistic regression. It is a pipeline, and searched like any other. ``memory`` keeps the row of
# each image, so that the network runs once for an image, and not once for each fold and candidate.
# The extractor learns nothing, so there is nothing that could leak from a test fold.

import tempfile

from sklearn.model_selection import GridSearchCV, StratifiedKFold

from sktransfer import make_classifier

memory = tempfile.TemporaryDirectory()  # or memory="cache": tomorrow the rows are still there
model = make_classifier(image_size=64, memory=memory.name)

folds = StratifiedKFold(5, shuffle=True, random_state=0)
search = GridSearchCV(model, {"logisticregression__C": [0.001, 0.01, 0.1]}, cv=folds)
search.fit(train, labels)
print(search.best_params_, f"{search.score(test, labels):.3f} of the other halves are right")

# %%
# How many labels does it take? The same pipeline, on the first few pieces of each photograph; and
# beside it a logistic regression on the pixels, which has no pretrained network to stand on.

from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def pixels(images):
    """Return the colours (n, 768) of small pictures of 16 × 16 pixels."""
    return images.reshape(len(images), 16, 4, 16, 4, 3).mean((2, 4)).reshape(len(images), -1)


numbers = [1, 2, 5, 10, 30]
scores = {"make_classifier": [], "pixels": []}
for number in numbers:
    few = np.arange(len(labels)) % n_each < number
    fitted = clone(search.best_estimator_).fit(train[few], labels[few])
    scores["make_classifier"].append(fitted.score(test, labels))
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    plain.fit(pixels(train[few]), labels[few])
    scores["pixels"].append(plain.score(pixels(test), labels))

figure, ax = plt.subplots(figsize=(5.6, 3), layout="constrained")
for name, values in scores.items():
    ax.plot(numbers, values, "o-", label=name)
ax.axhline(1 / len(photos), color="0.6", linestyle=":", label="guessing")
ax.set(xscale="log", ylim=(0, 1.02), xlabel="labelled pieces of each photograph", ylabel="accuracy")
ax.set_xticks(numbers, numbers)
ax.minorticks_off()
ax.legend(loc="lower right")
plt.show()

# %%
# A map of the embeddings by their first two principal components. Nothing was fitted for it: the
# network was never told which pieces belong together. The classifier has thousands of dimensions to
# tell them apart, of which two are shown.

# sphinx_gallery_thumbnail_number = 3
from sktransfer import PretrainedFeatureExtractor
from sktransfer.inspection import EmbeddingDisplay

extractor = PretrainedFeatureExtractor(image_size=64, memory=memory.name)
display = EmbeddingDisplay.from_estimator(extractor, test, labels, n_thumbnails=60, random_state=0)
display.figure_.set_size_inches(7.2, 5)
display.ax_.legend(loc="best", fontsize=8)
plt.show()
