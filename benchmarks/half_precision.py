"""Keeping activations in half precision is harmless: measured against float32 activations.

The same head and blocks are trained on the same ELPV cells (defective: p > 0.5, the first 75/25
split) twice: from activations rounded to half precision at the cut, as the library keeps them, and
from float32 ones. What the probabilities of the test cells differ by is set against what they
differ by when the seed changes. The embedding, with `unfreeze=0`, is float32 in any case.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedShuffleSplit
from tabulate import tabulate

from sktransfer import FineTunedClassifier
from sktransfer._cli.benchmark import load_elpv
from sktransfer._engine import program
from sktransfer._engine.frozen import FrozenBlocks


@contextlib.contextmanager
def float32_activations() -> Iterator[None]:
    """Keep activations as they are; only without a memory, as their keys are the same."""
    dtype = FrozenBlocks.dtype
    with (
        mock.patch.object(program, "round_to_half", lambda x, _: x),
        mock.patch.object(
            FrozenBlocks, "dtype", lambda self, p: np.float32 if p else dtype(self, p)
        ),
    ):
        yield


def differences(name: str, one: np.ndarray, other: np.ndarray) -> dict[str, str]:
    difference = np.abs(one - other)
    changed = np.mean((one > 0.5) != (other > 0.5))
    return {
        "probabilities": name,
        "largest difference": f"{difference.max():.2e}",
        "mean difference": f"{difference.mean():.2e}",
        "predictions changed": f"{100 * changed:.2f} %",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--images", type=int, help="by default, all")
    args = parser.parse_args()
    task = load_elpv()
    chosen = slice(None) if args.images is None else slice(0, None, 2624 // args.images)
    X = np.array(task.images)[chosen]
    label, kinds = task.targets["defective: p > 0.5"][chosen], task.strata[chosen]
    strata = np.char.add(np.char.add(label, "/"), kinds)
    y = (label == "defective").astype(int)
    splitter = StratifiedShuffleSplit(5, test_size=0.25, random_state=0)
    train, test = next(splitter.split(strata, strata))

    def probabilities(depth: int, seed: int, kept: Any) -> np.ndarray:
        model = FineTunedClassifier(
            args.backbone,
            unfreeze=depth,
            # With depth 0, a solved head would have no epochs.
            head_epochs="auto" if depth else 0,
            max_epochs=args.epochs,
            image_size=args.image_size,
            random_state=seed,
        )
        with kept:
            found = model.fit(X[train], y[train]).predict_proba(X[test])[:, 1]
        accuracy, auc = accuracy_score(y[test], found > 0.5), roc_auc_score(y[test], found)
        name = "half precision" if isinstance(kept, contextlib.nullcontext) else "float32"
        print(
            f"unfreeze={depth}, seed {seed}, {name}: accuracy {accuracy:.4f}, ROC AUC {auc:.4f}",
            flush=True,
        )
        return found

    table = []
    for depth in args.depths:
        half = probabilities(depth, 0, contextlib.nullcontext())
        exact = probabilities(depth, 0, float32_activations())
        seed = probabilities(depth, 1, contextlib.nullcontext())
        table.append(differences(f"unfreeze={depth}, half against float32", half, exact))
        table.append(differences(f"unfreeze={depth}, seed 0 against seed 1", half, seed))
    print(tabulate(table, headers="keys", disable_numparse=True))


if __name__ == "__main__":
    main()
