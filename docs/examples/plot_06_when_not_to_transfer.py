"""
When not to transfer
====================

A pretrained network is not always worth it. ``transfer_gain`` compares it with what needs none,
and says so in words: transfer helps, it hurts, or that can't be told.
"""

# %%
# Scikit-learn's digits have 8 × 8 pixels. There is nothing in them that a network for
# photographs could see better than an SVM on the pixels; and to a network they are 64 blurred
# squares.

import tempfile

import matplotlib.pyplot as plt
from sklearn.datasets import load_digits

from sktransfer.model_selection import transfer_gain

digits = load_digits()
X, y = digits.images[:400] / 16, digits.target[:400]  # (400, 8, 8) in [0, 1]

figure, axes = plt.subplots(1, 8, figsize=(8, 1.1), layout="constrained")
for ax, image in zip(axes, X, strict=False):
    ax.imshow(image, cmap="gray_r")
    ax.set_axis_off()
plt.show()

# %%
# The pretrained network with a new head, in four folds, against an SVM on pixels and against
# the most frequent class. ``baselines`` can also name ``"scratch"``, the same network from
# random weights; that takes longest by far, and is left out here.

memory = tempfile.TemporaryDirectory()
gain = transfer_gain(
    X,
    y,
    unfreeze=0,
    baselines=["pixels", "majority"],
    cv=4,
    n_repeats=1,
    image_size=64,
    memory=memory.name,
    runtime="torch",  # so few images are not worth a compilation
    random_state=0,
)
print(gain)

# %%
# Intervals allow for the overlap of the training folds. Red: transfer hurts; blue: it helps;
# grey would be a gain that can't be told from none. Against a guess it helps, of course, so
# that it is the SVM on pixels to compare with.

from sktransfer.inspection import TransferGainDisplay

display = TransferGainDisplay.from_result(
    gain.gains.index, gain.gains.gain, gain.gains[["low", "high"]]
)
display.ax_.set_xlabel("gain by transfer (accuracy)")
plt.show()

# %%
# One frozen network at one image size is not all there is: training some of its blocks might
# well close the gap. But the comparison costs seconds, and where an SVM on pixels is ahead, a
# network has to show that it is worth its cost. On photographs of solar cells it is the other
# way around: see the :doc:`measured results </results>`.
