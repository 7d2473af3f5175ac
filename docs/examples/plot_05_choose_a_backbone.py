"""
Choose a backbone
=================

About 1,900 networks have names here. Which of them suits a task can be told, roughly, without
fine-tuning any: embed the images once with each, and look at how well the classes lie apart.
"""

# %%
# 240 small pieces of six photographs. The task: of which photograph is a piece? Some overlap, which
# makes all scores a little too good, and those of all networks alike.

import tempfile

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
}

random, size, pieces = np.random.default_rng(0), 32, []
for photo in photos.values():
    for _ in range(40):
        top, left = (random.integers(0, length - size) for length in photo.shape[:2])
        pieces.append(photo[top : top + size, left : left + size])
labels = np.repeat(list(photos), 40)

figure, axes = plt.subplots(2, 12, figsize=(8, 1.6), layout="constrained")
for ax, piece in zip(axes.T.flat, pieces[::10], strict=True):
    ax.imshow(piece)
    ax.set_axis_off()
plt.show()

# %%
# Candidates are names, or pairs of a name and its weights. ``None`` stands for random weights:
# a network that has learnt nothing is the zero of the ranking. The weights of these two are
# packages (of the second by the extra ``demo``); with internet, add ``"resnet50"``,
# ``"convnext_tiny"``, ``"timm/vit_small_patch14_dinov2.lvd142m"``.

from sktransfer.model_selection import rank_backbones

memory = tempfile.TemporaryDirectory()
table = rank_backbones(
    pieces,
    labels,
    ["efficientnet_lite0", "efficientnet_lite1", ("efficientnet_lite0", None)],
    scoring=["logistic", "knn", "logme", "h_score"],
    cv=5,
    pairs=False,  # True ranks the best two side by side as well, in one row more
    image_size=64,
    memory=memory.name,
    random_state=0,
)
shown = ["backbone", "weights", "logistic", "knn", "logme", "h_score", "n_parameters", "n_features"]
table[shown].round(3)

# %%
# Two scores are accuracies in cross-validation, of logistic regression and of the five nearest
# neighbours. Bars: one standard deviation over the five folds. Differences that are smaller than
# these don't say which network is better.

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
# The other two are formulas, and can be misled: the H-score compares scatter between
# classes with scatter as a whole, and of a few hundred points in 1,280 dimensions that is hard to
# estimate. So take several scores, and a few networks from the top
# by most of them, and fine-tune those. LEEP (``"leep"``) asks the network's own classes; all
# scores stand alone in :mod:`sktransfer.metrics`, on arrays.
