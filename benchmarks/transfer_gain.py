"""Where transfer helps, and where it does not: ELPV solar cells, and 8 × 8 digits.

The solar cells are photographs of a kind that ImageNet does not have, and transfer is to help all
the same. The digits are so small and so clean that an SVM on their pixels is hard to beat.
Intervals are those of the corrected resampled t-test over repeated folds.
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits

from sktransfer._cli.benchmark import load_elpv
from sktransfer.model_selection import transfer_gain


def elpv(every: int) -> tuple[np.ndarray, np.ndarray]:
    task = load_elpv()
    return np.array(task.images)[::every], task.targets["defective: p > 0.5"][::every]


def digits(every: int) -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.images[::every] / 16, data.target[::every]


TASKS = {"digits": digits, "elpv": elpv}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--baselines", nargs="+", default=["scratch", "pixels", "majority"], help="what to compare"
    )
    parser.add_argument("--unfreeze", type=lambda x: int(x) if x.isdigit() else x, default=1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--cv", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="take every so manieth image only")
    parser.add_argument("--elpv-image-size", type=int, help="by default, the network's own")
    parser.add_argument("--digits-image-size", type=int, default=64)
    parser.add_argument("--scratch-image-size", type=int, default=64)
    parser.add_argument("--scratch-epochs", type=int, default=10)
    options = parser.parse_args()
    for name in options.tasks:
        X, y = TASKS[name](options.every)
        gain = transfer_gain(
            X,
            y,
            unfreeze=options.unfreeze,
            baselines=options.baselines,
            scratch={
                "image_size": options.scratch_image_size,
                "max_epochs": options.scratch_epochs,
                "lr": 1e-3,
            },
            cv=options.cv,
            n_repeats=options.repeats,
            image_size=vars(options)[f"{name}_image_size"],
            max_epochs=options.epochs,
            random_state=0,
        )
        print(f"{name}: {len(X)} images, accuracy, {options.repeats} × {options.cv} folds")
        print(gain, flush=True)
        print()


if __name__ == "__main__":
    main()
