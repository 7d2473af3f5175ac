"""
Choose a backbone
=================

About 1,900 networks have names here. Which of them suits a task can be told, roughly, without
fine-tuning any: embed the images once with each, and look at how well the classes lie apart.
"""

# %%
# 300 solar cells, half of them defective.

import tempfile
from pathlib import Path

import elpv_dataset
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

folder = Path(elpv_dataset.__file__).parent / "data"
cells = pd.read_csv(folder / "labels.csv", sep=r"\s+", names=["file", "probability", "kind"])
cells = cells[cells.probability.isin([0, 1])].groupby("probability").sample(150, random_state=0)
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
# neighbours. By both, the pretrained networks are ahead of random weights; which of the two is
# better, 300 cells don't say. Bars: one standard deviation over the five folds.

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
# The other two are formulas, and one of them is misled here: the H-score puts random weights
# first. It compares scatter between classes with scatter as a whole, and of 300 points in 1,280
# dimensions that is hard to estimate. So take several scores, and a few networks from the top
# by most of them, and fine-tune those. LEEP (``"leep"``) asks the network's own classes; all
# scores stand alone in :mod:`sktransfer.metrics`, on arrays.
