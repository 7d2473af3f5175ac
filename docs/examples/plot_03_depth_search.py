"""
How many blocks to train
========================

Between a frozen network and one that is trained from end to end lies a number: of blocks that are
trained. It is a parameter, ``unfreeze``, and is searched for like any other.
"""

# %%
# 120 solar cells, half of them defective, as in :doc:`plot_02_svm_on_embeddings`.

import tempfile
from pathlib import Path

import elpv_dataset
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

folder = Path(elpv_dataset.__file__).parent / "data"
cells = pd.read_csv(folder / "labels.csv", sep=r"\s+", names=["file", "probability", "kind"])
cells = cells[cells.probability.isin([0, 1])].groupby("probability").sample(60, random_state=0)
paths = np.array([str(folder / file) for file in cells.file])
labels = np.where(cells.probability == 1, "defective", "sound")

# %%
# What lies before the first trained block is frozen: it runs once for each image, whatever the
# number of folds, candidates and epochs, and ``memory`` keeps its results.

from sklearn.model_selection import GridSearchCV

from sktransfer import FineTunedClassifier

memory = tempfile.TemporaryDirectory()
model = FineTunedClassifier(
    max_epochs=4,
    image_size=96,
    memory=memory.name,
    runtime="torch",  # so few images are not worth a compilation
    random_state=0,
)
search = GridSearchCV(model, {"unfreeze": [0, 1, 2, 4]}, cv=3)
search.fit(paths, labels)
print(search.best_params_)

# %%
# Bars are one standard deviation over three folds of 40 cells, as large as the differences:
# with 80 cells to learn from, these depths can't be told apart. Columns are seconds of a fit,
# on the machine that built this page. The first candidate pays for the frozen blocks of all
# others, which find their results in the memory.

from sktransfer.inspection import DepthCurveDisplay

DepthCurveDisplay.from_estimator(search)
plt.show()

# %%
# ``unfreeze="auto"`` makes such a comparison by itself, inside of the training images, and
# takes the shallowest depth that is within one standard error of the best.

from sklearn.base import clone

auto = clone(model).set_params(unfreeze="auto")
auto.fit(paths, labels)
print(auto.depth_search_["unfreeze"], "of", auto.depth_search_["depths"])

# %%
# A fitted estimator knows what it trained, and what of the frozen blocks it kept.

deep = clone(model).set_params(unfreeze=4)
deep.fit(paths, labels)
print(deep.unfrozen_block_names_, deep.n_trainable_parameters_)
print(deep.plan_)

# %%
# The loss on the training images, epoch by epoch, which says nothing about other images. With
# ``early_stopping=True`` a part of them is held out, and has a line of its own.

from sktransfer.inspection import HistoryDisplay

HistoryDisplay.from_estimator(deep)
plt.show()
