"""What the defaults of fine-tuning are worth: ELPV and scikit-learn's digits, with few labels.

A parameter by depth, at 50, 200 and more labels, on random splits with 500 test images: accuracy
and log-loss, the mean over the splits ± the standard deviation. All but the depth and the named
parameter is the default.
`--parameter C` is the regularisation of the head that is solved for: of a head alone at depth 0,
else of the start of training.
"""

import argparse
import ast
import tempfile
import time

import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import train_test_split

from sktransfer import FineTunedClassifier
from sktransfer._cli.benchmark import load_elpv
from sktransfer._training import heads as _head

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--labels", nargs="+", type=int, default=[50, 200, 1200])
parser.add_argument("--depths", nargs="+", type=int, default=[0, 1, 2, 4, 8])
parser.add_argument("--parameter", default="lr")
parser.add_argument(
    "--values", nargs="+", type=ast.literal_eval, default=[1e-4, 5e-4, 1e-3], help="in Python"
)
parser.add_argument("--tasks", nargs="+", choices=["elpv", "digits"], default=["elpv", "digits"])
parser.add_argument("--splits", type=int, default=3)
parser.add_argument("--memory", help="by default, a temporary folder")
options = parser.parse_args()

elpv, digits = load_elpv(), load_digits()
tasks = {
    "elpv": (np.array(elpv.images), elpv.targets["defective: p > 0.5"], {}),
    "digits": (digits.images / 16, digits.target, {"image_size": 112}),
}


def score(name: str, n_labels: int, **parameters) -> str:
    """Return what is printed of one setting."""
    X, y, own = tasks[name]
    scores = []
    start = time.perf_counter()
    for seed in range(options.splits):
        train, test = train_test_split(
            np.arange(len(y)), train_size=n_labels, test_size=500, stratify=y, random_state=seed
        )
        model = FineTunedClassifier(random_state=seed, **own, **parameters).fit(X[train], y[train])
        p = model.predict_proba(X[test]).astype(float).clip(1e-6)
        p /= p.sum(axis=1, keepdims=True)
        predicted = model.classes_[p.argmax(axis=1)]
        scores.append((accuracy_score(y[test], predicted), log_loss(y[test], p)))
    (accuracy, loss), spread = np.mean(scores, axis=0), np.std(scores, axis=0)
    seconds = (time.perf_counter() - start) / options.splits
    return (
        f"accuracy {accuracy:.3f} ± {spread[0]:.3f}  log-loss {loss:.3f} ± {spread[1]:.3f}  "
        f"{seconds:.0f} s"
    )


with tempfile.TemporaryDirectory() as folder:
    memory = options.memory or folder
    for name in options.tasks:
        for n_labels in options.labels:
            for depth in options.depths:
                for value in options.values:
                    setting = {"unfreeze": depth, options.parameter: value}
                    given = {**setting, "memory": memory}
                    if options.parameter == "C":
                        C = given.pop("C")
                        _head._FIXED["class"] = _head._START["class"] = C
                        _head._FACTORS = np.ones(1)  # nothing to choose from
                    found = score(name, n_labels, **given)
                    print(f"{name}, {n_labels} labels, {setting}: {found}", flush=True)
