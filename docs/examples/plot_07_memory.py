"""
The memory
==========

With ``memory``, a network runs once for each image: in any order, fold or search, in any process,
today or tomorrow. The key of a result is the content of the image, and all that shaped the result.
"""

# %%
# 100 small pieces of a photograph, as files, and one more.

import shutil
import tempfile
import time
from pathlib import Path

import joblib
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from skimage import data

from sktransfer import PretrainedFeatureExtractor

work = tempfile.TemporaryDirectory()
photo = data.chelsea()  # a cat: (300, 451, 3)
for number in range(101):
    top, left = 20 * (number // 16), 25 * (number % 16)
    piece = Image.fromarray(photo[top : top + 64, left : left + 64])
    piece.save(Path(work.name, f"{number:03}.png"))
first, *files = sorted(Path(work.name).glob("*.png"))
extractor = PretrainedFeatureExtractor(image_size=64, memory=f"{work.name}/cache")

# %%
# The memory is a ``joblib.Memory``, whose entries can be counted. An image that adds an entry was
# computed; one that adds none was found.


def n_entries():
    memory = joblib.Memory(extractor.memory, backend="sktransfer-lmdb", verbose=0)
    return len(memory.store_backend.get_items())


computed = {}


def embed(what, images, extractor=extractor):
    """Embed images; note how many of them ran through the network."""
    before, start = n_entries(), time.perf_counter()
    rows = extractor.transform(images)
    seconds = time.perf_counter() - start
    computed[what] = n_entries() - before
    print(f"{what:22} {len(images):4} images, {computed[what]:4} computed, {seconds:6.2f} s")
    return rows


extractor.transform([first])  # loads and compiles the network, which is not to be timed

# %%
# The first time, all of them run. After that, another order, a part, or copies under other
# names are found.

rows = embed("the first time", files)
again = embed("once more", files)
print(np.array_equal(rows, again))

order = np.random.default_rng(0).permutation(len(files))
shuffled = embed("in another order", [files[i] for i in order])
print(np.array_equal(rows[order], shuffled))

embed("every third", files[::3])

copies = [shutil.copy(file, Path(work.name, f"copy of {file.name}")) for file in files]
embed("under other names", copies)

# %%
# What is another result is computed: an image that has changed, another layer, other weights.

with open(copies[0], "ab") as file:
    file.write(b"changed")
embed("one file changed", copies)

middle = PretrainedFeatureExtractor(layer="blocks.3", image_size=64, memory=extractor.memory)
embed("another layer", files, middle)

# %%
# The same as a picture. Seconds above are those of the machine that built this page.

figure, ax = plt.subplots(figsize=(5.6, 3), layout="constrained")
ax.barh(list(computed), list(computed.values()))
ax.invert_yaxis()
ax.set(xlabel="images that ran through the network", xlim=(0, 115))
for place, number in enumerate(computed.values()):
    ax.text(number + 1, place, number, va="center")
plt.show()

# %%
# That is why searches are cheap: five folds and ten candidates make 50 fits, and no image runs
# twice.

from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import make_pipeline

brightness = np.array([plt.imread(file).mean() for file in files])
pipeline = make_pipeline(extractor, KNeighborsRegressor())
search = GridSearchCV(
    pipeline, {"kneighborsregressor__n_neighbors": range(1, 11)}, cv=5, scoring="r2"
)
before = n_entries()
search.fit(files, brightness)
n_fits = len(search.cv_results_["params"]) * search.n_splits_
print(f"{n_fits} fits, {n_entries() - before} images computed")

# %%
# ``joblib.Memory.reduce_size`` deletes what was not read for the longest time, ``clear``
# everything.

memory = joblib.Memory(extractor.memory, backend="sktransfer-lmdb", verbose=0)
memory.reduce_size(items_limit=50)
print(n_entries(), "entries left")
