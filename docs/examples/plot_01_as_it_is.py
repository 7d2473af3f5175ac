"""
A network as it is
==================

A network that was trained on ImageNet knows 1,000 classes. To use these, nothing has to be fitted.
"""

# %%
# Two photographs that scikit-learn ships, as arrays of different content and equal size. An
# estimator of this library takes a list of them, of paths, of PIL images, or one array of all.

import matplotlib.pyplot as plt
from sklearn.datasets import load_sample_images

from sktransfer import PretrainedClassifier

images = load_sample_images().images  # two arrays (427, 640, 3), uint8

model = PretrainedClassifier()  # "efficientnet_lite0"; or "resnet50", "vgg16", ...
print(model.predict(images))

# %%
# ``top_k`` is a data frame: the best classes of each image, with their probabilities.
# Scikit-learn calls the first photograph "china", which is no class of ImageNet; the network
# says what it knows.

model.top_k(images, k=4)

# %%
# ``predict_proba`` has all of them, a column for each entry of ``classes_``.

probabilities = model.predict_proba(images)
print(probabilities.shape, model.classes_[:3])

# %%
# Where does it see that? Grad-CAM marks the places that speak for a class, by default for the
# one that is predicted. ``targets`` asks for others: for the flower, what speaks for "daisy",
# and what would speak for "bee"? The same petals. A map shows where, not why, and each has a
# scale of its own.

from sktransfer.inspection import SaliencyDisplay

flower = images[1]
display = SaliencyDisplay.from_estimator(
    model, [images[0], flower, flower], targets=["palace", "daisy", "bee"]
)
display.figure_.set_size_inches(8, 3.1)
plt.show()

# %%
# What is in the network, block by block: shapes, parameters, and what a kept result takes. No
# image runs through it for that.

from sktransfer import model_summary

model_summary(model).to_frame().iloc[1:9].round(3)
