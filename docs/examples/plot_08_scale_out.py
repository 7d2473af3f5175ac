"""
Past one machine
================

For more images than a machine embeds in an hour: dask. ``transform`` and ``predict`` take its
collections, and return a lazy array, one task for each partition.
"""

# %%
# 120 small pieces of five photographs stand for a hundred million images. A dask array of their
# paths, cut into partitions of 24.

import tempfile
from pathlib import Path

import dask
import dask.array as da
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images

from sktransfer import PretrainedFeatureExtractor

work, random = tempfile.TemporaryDirectory(), np.random.default_rng(0)
china, flower = load_sample_images().images
photos = [data.chelsea(), china, data.coffee(), flower, data.stereo_motorcycle()[0]]
files = np.array([f"{work.name}/{number:03}.png" for number in range(120)])
for number, file in enumerate(files):
    photo = photos[number // 24]
    top, left = (random.integers(0, length - 96) for length in photo.shape[:2])
    Image.fromarray(photo[top : top + 96, left : left + 96]).save(file)
paths = da.from_array(files, chunks=24)

extractor = PretrainedFeatureExtractor(image_size=96, memory=f"{work.name}/cache")
rows = extractor.transform(paths)  # nothing has been computed yet
print(rows)

# %%
# A part is computed when it is asked for, here in threads of this process.

with dask.config.set(scheduler="threads"):
    some = rows.blocks[0].compute()
    everything = rows.compute()
print(some.shape, everything.shape, np.array_equal(everything[:24], some))

# %%
# Lazy arrays compose: the mean of all rows, or the distance of each from it, without ever
# holding all rows at once.

distance = da.linalg.norm(rows - rows.mean(axis=0), axis=1)
with dask.config.set(scheduler="threads"):
    odd = int(distance.argmax().compute())
print("the oddest piece:", Path(files[odd]).name)

# %%
# It, some others, and the pieces that are most like each.

from sktransfer.inspection import PrototypeDisplay

chosen = np.array([odd, *(i for i in (10, 60, 110) if i != odd)])
others = np.setdiff1d(np.arange(len(files)), chosen)
PrototypeDisplay.from_embeddings(
    everything[chosen], everything[others], files[chosen], files[others], n_neighbors=4
)
plt.show()

# %%
# On a cluster, the script is the same, below a client:
#
# .. code-block:: python
#
#     from dask.distributed import Client, LocalCluster
#
#     if __name__ == "__main__":
#         cluster = LocalCluster(n_workers=8, threads_per_worker=1)  # or SSH, Slurm, Kubernetes
#         client = Client(cluster)
#         rows = extractor.transform(paths)
#         rows.to_zarr("rows.zarr")  # the workers read, embed and write
#
# The estimator travels to each worker once, without the frozen network, which is loaded there
# by name. A worker that dies costs its own partitions; an image that can't be read is named,
# with its partition. :doc:`/scale_out` has clusters, GPUs, Parquet and Zarr, and what 100
# million images cost.
