"""
What no sound image has
=======================

Often there are plenty of sound images, and hardly any defective ones, or not of each kind. Then a
detector learns from sound images alone, and says which new ones differ, and where.
"""

# %%
# Photographs of solar cells of the monocrystalline kind, whose ground is even: 200 sound ones to
# learn from, and 60 others, of which 30 are defective. No defective cell is used to learn.

from pathlib import Path

import elpv_dataset
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

folder = Path(elpv_dataset.__file__).parent / "data"
cells = pd.read_csv(folder / "labels.csv", sep=r"\s+", names=["file", "probability", "kind"])
cells = cells[cells.kind == "mono"].assign(path=lambda t: [str(folder / file) for file in t.file])
sound = cells[cells.probability == 0].path.to_numpy()
defective = cells[cells.probability == 1].path.sample(30, random_state=0).to_numpy()
learnt, others = sound[:200], np.concatenate([sound[-30:], defective])
is_defective = np.arange(60) >= 30

# %%
# The network is cut in its middle, where it still knows places. What some blocks have there at each
# place of the sound cells is kept, a choice of it; a new cell is as strange as its strangest place.

from sktransfer import PatchAnomalyDetector

detector = PatchAnomalyDetector(image_size=160, random_state=0)
detector.fit(learnt)
scores = detector.score_samples(others)  # the higher, the more normal
print(detector.predict(others[:3]), [bank.shape for bank in detector.bank_])

# %%
# Where is it? All maps have one scale: from half the threshold to one and a half of it.

from sktransfer.inspection import AnomalyMapDisplay

worst = others[np.argsort(scores)[:5]]
AnomalyMapDisplay.from_estimator(detector, [*worst, *sound[-5:]], n_cols=5)
plt.show()

# %%
# The simple way beside it: one row for a whole image, and any detector of scikit-learn. It is a
# pipeline, and runs at the speed of the embeddings. It says nothing of where. Which of the two
# finds more depends on the images. On more cells of this kind the patches do; on polycrystalline
# ones, whose grains differ at every place, the rows do: try both.

from sklearn.metrics import RocCurveDisplay
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sktransfer import PretrainedFeatureExtractor

whole = make_pipeline(
    PretrainedFeatureExtractor(image_size=160), StandardScaler(), LocalOutlierFactor(novelty=True)
).fit(learnt)

figure, ax = plt.subplots(figsize=(4.4, 4.2), layout="constrained")
for name, model in {"patches": detector, "whole images, LOF": whole}.items():
    found = scores if model is detector else model.score_samples(others)
    RocCurveDisplay.from_predictions(is_defective, -found, name=name, ax=ax)
plt.show()

# %%
# Where to put the threshold? ``contamination`` is the share of the images of the training that lie
# beyond it. Each of them is compared with the patches of the others alone, so new sound images of
# the same series have about the same share beyond it. The sound cells here are of other modules,
# and have a larger one.

shares = [0.02, 0.05, 0.1, 0.2]
of_training = detector.score_samples(learnt)
rows = []
for share in shares:
    threshold = np.percentile(of_training, 100 * share)
    beyond = scores < threshold
    rows.append([share, beyond[~is_defective].mean(), beyond[is_defective].mean()])
pd.DataFrame(rows, columns=["contamination", "of new sound cells", "of defective cells"]).round(2)
