"""
On a GPU, if there is one
=========================

Nothing has to be said: ``device="auto"`` takes a CUDA device where there is one, else the CPU.
The same script runs on both, and so does a model that was trained on the other.
"""

# %%
# What is there?

import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_sample_images

from sktransfer import PretrainedFeatureExtractor

has_gpu = torch.cuda.is_available()
if has_gpu:
    print("A GPU:", torch.cuda.get_device_name())
else:
    print("No GPU on the machine that built this page: all of it ran on the CPU.")

# %%
# Some images: overlapping crops of two photographs, 96 on a GPU, where they come in large
# batches, and 32 on a CPU.

photos = load_sample_images().images  # two arrays (427, 640, 3)
n = 48 if has_gpu else 16
lefts = np.linspace(0, 640 - 240, n).astype(int)
crops = [photo[100:340, left : left + 240] for photo in photos for left in lefts]

figure, axes = plt.subplots(2, 6, figsize=(8, 2.8), layout="constrained")
for ax, crop in zip(axes.flat, [*crops[:n:2][:6], *crops[n::2][:6]], strict=True):
    ax.imshow(crop)
    ax.set_axis_off()
plt.show()

# %%
# ``batch_size="auto"`` is as many images as a GPU's memory takes, and on a CPU 32.
# A batch that does not fit is halved, with a warning, and the work goes on.

extractor = PretrainedFeatureExtractor(device="auto", batch_size="auto")
extractor.transform(crops[:1])  # loads the network
start = time.perf_counter()
extractor.transform(crops)
print(f"{len(crops)} images, {len(crops) / (time.perf_counter() - start):.0f} a second, float32")

# %%
# ``precision="bfloat16"`` is for GPUs, and for CPUs with instructions for it; others get a
# warning, as nothing gets faster. What does it change? Rows are float32 in any case, and here
# is how far they are from those that were computed in float32. (By torch, as OpenVINO stays in
# float32 on a CPU without the instructions; and of small images, as torch is slow there.)

some = crops[::4]
small = PretrainedFeatureExtractor(image_size=96, runtime="torch")
full = small.transform(some)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # on a CPU without such instructions
    half = small.set_params(precision="bfloat16").transform(some)
error = np.linalg.norm(half - full, axis=1) / np.linalg.norm(full, axis=1)
print(f"relative difference: {error.mean():.3f} on average, {error.max():.3f} at most")

# %%
# Small against what lies between one image and the next, two crops that overlap:

pairs = full.reshape(2, -1, full.shape[1])  # those of either photograph
apart = np.linalg.norm(np.diff(pairs, axis=1), axis=2) / np.linalg.norm(pairs[:, 1:], axis=2)
figure, ax = plt.subplots(figsize=(5.6, 2.2), layout="constrained")
ax.plot(error, np.zeros(error.size), "o", alpha=0.6)
ax.plot(apart.ravel(), np.ones(apart.size), "o", alpha=0.6)
ax.set_yticks([0, 1], ["one crop in bfloat16\nand in float32", "one crop\nand the next"])
ax.set(xlabel="relative difference of two rows", xlim=(0, None), ylim=(-0.6, 1.6))
plt.show()

# %%
# With several processes (``n_jobs=2`` in a search) each has a copy of the network on the card,
# and they take turns; a warning says so. Use ``n_jobs=1`` there. Several cards are for dask:
# :doc:`/scale_out`.
