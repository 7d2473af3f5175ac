"""
None of these
=============

A classifier answers with one of its classes, whatever it is shown. Two numbers tell when not to
believe it: the probability of its answer, and how far an image lies from all that it learnt.
"""

# %%
# It learns the digits 0 to 6. Then it is shown others of these, and 7, 8 and 9, of which it never
# heard: every answer to those is wrong.

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

images, labels = load_digits(return_X_y=True)
images = images / 16
known = labels < 7
learnt, rest, y_learnt, y_rest = train_test_split(
    images[known], labels[known], train_size=200, random_state=0, stratify=labels[known]
)
held_out, new, _, y_new = train_test_split(
    rest, y_rest, train_size=120, test_size=120, random_state=0
)
unknown, y_unknown = images[~known][:120], labels[~known][:120]
shown, y_shown = np.concatenate([new, unknown]), np.concatenate([y_new, y_unknown])

figure, axes = plt.subplots(2, 8, figsize=(8, 2.6), layout="constrained")
for row, name, digits in zip(axes, ["known", "unknown"], [new, unknown], strict=True):
    row[0].set_title(name, loc="left")
    for ax, digit in zip(row, digits, strict=False):
        ax.imshow(digit.reshape(8, 8), cmap="gray_r")
        ax.set_axis_off()
plt.show()

# %%
# One memory serves both: the classifier and the novelty detector stand on the same features, and
# each image runs through the network once. The classifier scales them; here the novelty detector
# finds more without a scaler. Try both on a few images that you know to be of no class.

import tempfile

from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline

from sktransfer import PretrainedFeatureExtractor, make_classifier

memory = tempfile.TemporaryDirectory()
options = {"image_shape": (8, 8), "image_size": 64, "memory": memory.name}
model = make_classifier(**options).fit(learnt, y_learnt)
features = PretrainedFeatureExtractor(
    layer="all", pooling=("avg", "max"), normalize=True, **options
)
novelty = make_pipeline(features, LocalOutlierFactor(n_neighbors=5, novelty=True)).fit(learnt)

# %%
# Both numbers on both kinds of images. Known digits of which the classifier is not sure are to the
# left; what it never saw lies low.

proba, normal = model.predict_proba(shown).max(1), novelty.score_samples(shown)
is_known = y_shown < 7

figure, ax = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
for name, part in {"known classes": is_known, "7, 8 and 9": ~is_known}.items():
    ax.plot(proba[part], normal[part], ".", alpha=0.6, label=name)
ax.set(xlabel="probability of the answer", ylabel="score of the novelty detector")
ax.legend()
plt.show()

# %%
# To put them together, bring them to one scale: the share of known images, held out from both, that
# are less sure, or stranger. An answer is as good as the lower of the two.


def share_below(values, reference):
    """Return for each value the share of the reference below it."""
    return np.searchsorted(np.sort(reference), values) / len(reference)


sure = share_below(proba, model.predict_proba(held_out).max(1))
usual = share_below(normal, novelty.score_samples(held_out))
both = np.minimum(sure, usual)

# %%
# What rejecting gains: the error rate of the answers that are left, when those with the lowest
# confidence are rejected. The mean of a curve says how well it sorts right from wrong. Here the two
# together are no better in the mean than the probability alone; they are where about as many are
# rejected as are of no known class, at the dotted line.

from sktransfer.inspection import RejectionCurveDisplay

display = RejectionCurveDisplay.from_estimator(model, shown, y_shown, name="probability")
predicted = model.predict(shown)
for name, confidence in {"novelty": normal, "both": both}.items():
    RejectionCurveDisplay.from_predictions(
        y_shown, predicted, confidence, name=name, ax=display.ax_
    )
display.ax_.axvline(np.mean(~is_known), color="0.7", linestyle=":")  # as many are of no known class
plt.show()

# %%
# In use: answer "none of these" below a share that you can afford, here 5 % of the known images
# by each of the two numbers.

answers = np.where(both < 0.05, "none of these", predicted.astype(str))
for name, part in {"known classes": is_known, "7, 8 and 9": ~is_known}.items():
    rejected = np.mean(answers[part] == "none of these")
    print(f"{name}: {rejected:.0%} answered with 'none of these'")
right = (answers == y_shown.astype(str))[answers != "none of these"]
print(f"of the other answers, {right.mean():.1%} are right; without rejection, ", end="")
print(f"{np.mean(predicted == y_shown):.1%}")
