"""
A network as it is
==================

A network that was trained on ImageNet knows 1,000 classes. To use these, nothing has to be fitted.
"""

# %%
# Some photographs, which scikit-image and scikit-learn ship, as arrays of different content and
# size. An estimator of this library takes a list of them, of paths, of PIL images, or one array of
# all.

import matplotlib.pyplot as plt
from skimage import data
from sklearn.datasets import load_sample_images

from sktransfer import PretrainedClassifier

china, flower = load_sample_images().images  # two arrays (427, 640, 3), uint8
images = [data.chelsea(), data.coffee(), data.stereo_motorcycle()[0], flower, china, data.rocket()]

model = PretrainedClassifier()  # "efficientnet_lite0"; or "resnet50", "vgg16", ...
predicted, probabilities = model.predict(images), model.predict_proba(images)

figure, axes = plt.subplots(2, 3, figsize=(7.2, 4.2), layout="constrained")
for ax, image, label, row in zip(axes.flat, images, predicted, probabilities, strict=True):
    ax.imshow(image)
    ax.set_title(f"{label}, {row.max():.0%}")
    ax.set_axis_off()
plt.show()

# %%
# A network can say nothing but what it was taught. There is no "china" in ImageNet, so that the
# building is a palace, and no "rocket", so that one becomes a missile; the low probability says
# that the network is not sure. ``top_k`` is a data frame of the best classes of each image. Here
# are those of the cat, of which ImageNet has several kinds, and of the rocket.

model.top_k([images[0], images[-1]], k=3).round(3)

# %%
# ``predict_proba`` has all of them, a column for each entry of ``classes_``.

print(probabilities.shape, model.classes_[:3])

# %%
# Where does it see that? Grad-CAM marks the places that speak for a class, by default for the
# one that is predicted. ``targets`` asks for others: for the flower, what speaks for "daisy",
# and what would speak for "bee"? The same petals. A map shows where, not why, and each has a
# scale of its own.

from sktransfer.inspection import SaliencyDisplay

display = SaliencyDisplay.from_estimator(
    model, [images[0], flower, flower], targets=["tiger cat", "daisy", "bee"]
)
display.figure_.set_size_inches(8, 3.1)
plt.show()

# %%
# What is in the network, block by block: shapes, parameters, and what a kept result takes. No
# image runs through it for that.

from sktransfer import model_summary

model_summary(model).to_frame().iloc[1:9].round(3)
