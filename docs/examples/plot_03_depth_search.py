"""
How many blocks to train
========================

Between a frozen network and one that is trained from end to end lies a number: of blocks that are
trained. It is a parameter, ``unfreeze``, and is searched for like any other.
"""

# %%
# 160 handwritten digits, which are unlike the photographs that the network was trained on. Does it
# pay to train some of its blocks on them?

import matplotlib.pyplot as plt
from sklearn.datasets import load_digits

digits = load_digits()
X, y = digits.images[:160] / 16, digits.target[:160]  # (160, 8, 8) in [0, 1]
X_new, y_new = digits.images[160:400] / 16, digits.target[160:400]

# %%
# What lies before the first trained block is frozen: it runs once for each image, whatever the
# number of folds, candidates and epochs, and ``memory`` keeps its results.

import tempfile

from sklearn.model_selection import GridSearchCV

from sktransfer import FineTunedClassifier

memory = tempfile.TemporaryDirectory()
model = FineTunedClassifier(
    max_epochs=4,
    image_size=64,
    memory=memory.name,
    runtime="torch",  # so few images are not worth a compilation
    random_state=0,
)
search = GridSearchCV(model, {"unfreeze": [0, 1, 2, 4]}, cv=3)
search.fit(X, y)
print(search.best_params_)

# %%
# Bars are one standard deviation over three folds. Columns are seconds of a fit, on the machine
# that built this page. The first candidate pays for the frozen blocks of all others, which find
# their results in the memory. With so few images the bars overlap: no depth is surely the best.

from sktransfer.inspection import DepthCurveDisplay

DepthCurveDisplay.from_estimator(search)
plt.show()

# %%
# ``unfreeze="auto"`` makes such a comparison by itself, inside of the training images, and
# takes the shallowest depth that is within one standard error of the best: here, it leaves the
# network frozen.

from sklearn.base import clone

auto = clone(model).set_params(unfreeze="auto")
auto.fit(X, y)
print(auto.depth_search_["unfreeze"], "of", auto.depth_search_["depths"])
print(f"accuracy on {len(y_new)} other digits: {auto.score(X_new, y_new):.3f}")

# %%
# A fitted estimator knows what it trained, and what of the frozen blocks it kept.

deep = search.best_estimator_
print("trained:", *deep.unfrozen_block_names_)
print(f"{deep.n_trainable_parameters_:,} parameters")
print(deep.plan_)

# %%
# The loss on the training images, epoch by epoch, which says nothing about other images. With
# ``early_stopping=True`` a part of them is held out, and has a line of its own.

from sktransfer.inspection import HistoryDisplay

HistoryDisplay.from_estimator(deep)
plt.show()
