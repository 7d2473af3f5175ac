"""
Choose a backbone
=================

About 1,900 networks have names here. Which of them suits a task can be told, roughly, without
fine-tuning any: embed the images once with each, and look at how well the classes lie apart.
"""

# %%
# 120 solar cells, half of them defective.

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
# Candidates are names, or pairs of a name and its weights. ``None`` stands for random weights:
# a network that has learnt nothing is the zero of the ranking. These two are embedded; with
# internet, add ``"resnet50"``, ``"convnext_tiny"``,
# ``"timm/vit_small_patch14_dinov2.lvd142m"``.

from sktransfer.model_selection import rank_backbones

memory = tempfile.TemporaryDirectory()
table = rank_backbones(
    paths,
    labels,
    ["efficientnet_lite0", "efficientnet_lite1", ("efficientnet_lite0", None)],
    scoring=["logistic", "knn", "logme", "h_score"],
    cv=5,
    image_size=96,
    memory=memory.name,
    random_state=0,
)
shown = ["backbone", "weights", "logistic", "knn", "logme", "h_score", "n_parameters", "n_features"]
table[shown].round(3)

# %%
# Two scores are accuracies in cross-validation, of logistic regression and of the five nearest
# neighbours; two are formulas. Bars: one standard deviation over the five folds. Both
# pretrained networks are ahead of random weights; which of the two is better, 120 cells don't
# say. Then the smaller one is a good choice, or fine-tune both.

figure, ax = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
places = np.arange(len(table))
for offset, score in ((-0.12, "logistic"), (0.12, "knn")):
    ax.errorbar(table[score], places + offset, xerr=table[f"{score}_std"], fmt="o", label=score)
random = np.where(table.weights.isna(), ", random weights", "")
ax.set_yticks(places, table.backbone + random)
ax.set(xlabel="accuracy", ylim=(len(table) - 0.5, -0.5))
ax.legend()
plt.show()

# %%
# Formulas and simple classifiers agree more or less, and none is best on every task. Take two
# or three networks from the top by several scores, and fine-tune those. LEEP (``"leep"``) asks
# the network's own classes; the scores stand alone in :mod:`sktransfer.metrics`, on arrays.
