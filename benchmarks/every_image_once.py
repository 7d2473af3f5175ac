"""A grid search runs the network exactly once for each distinct image: counted, not timed.

The embedded EfficientNet-Lite0 is wrapped so that it writes the digest of every image that runs
through it to a file. 5-fold searches over 6 candidates, on ELPV solar cells; then, in the same
memory, over the freezing depth, which runs every image once more for the activations that it keeps.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
import xxhash
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils import shuffle
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # worker processes import this module, too

from sktransfer import FineTunedClassifier, PretrainedFeatureExtractor, get_model  # noqa: E402
from sktransfer._cli.benchmark import load_elpv  # noqa: E402
from sktransfer.models import Backbone  # noqa: E402


def count(x: torch.Tensor) -> torch.Tensor:
    if type(x) is torch.Tensor and x.device.type != "meta":
        digests = {xxhash.xxh3_64_hexdigest(row.contiguous().numpy()) for row in x}
        with Path(os.environ["RUN_LOG"]).open("a") as log:
            log.write("".join(f"{digest}\n" for digest in digests))
    return x


torch.fx.wrap("count")


class Counted(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(count(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    n_images = parser.parse_args().images
    import every_image_once as module  # so that worker processes find the class by this name

    plain = get_model("efficientnet_lite0")
    backbone = Backbone(module.Counted(plain.network), plain.preprocessing)
    task = load_elpv()
    every = len(task.images) // n_images
    X, y = task.images[::every][:n_images], task.targets["defective: p > 0.5"][::every][:n_images]
    grid = {"svc__C": [0.1, 1, 10], "svc__gamma": ["scale", 1e-4]}
    for n_jobs in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "log")
            log.touch()
            os.environ["RUN_LOG"] = str(log)
            extractor = PretrainedFeatureExtractor(backbone, memory=f"{folder}/memory")
            pipeline = make_pipeline(extractor, StandardScaler(), SVC())
            new = {"svc__C": [3], "svc__kernel": ["linear", "rbf"]}
            tuned = FineTunedClassifier(
                backbone, memory=f"{folder}/memory", max_epochs=1, random_state=0
            )
            depths = {"unfreeze": [0, 1, 2, 4]}
            for what, model, grid_, X_, y_ in [
                ("6 candidates, 5 folds", pipeline, grid, X[:-1], y[:-1]),
                ("other candidates", pipeline, new, X[:-1], y[:-1]),
                ("X shuffled", pipeline, grid, *shuffle(X[:-1], y[:-1], random_state=0)),
                ("one image more", pipeline, grid, X, y),
                ("4 depths", tuned, depths, X, y),
                ("4 depths, other rates", tuned, {**depths, "lr": [1e-4]}, X, y),
            ]:
                before = Counter(log.read_text().split())
                GridSearchCV(model, grid_, cv=5, n_jobs=n_jobs, error_score="raise").fit(X_, y_)
                # Before the first depth, operations are counted on one blank image a process.
                ran = Counter(log.read_text().split()) - before
                print(
                    f"n_jobs={n_jobs}, {what}: {len(X_)} images, {ran.total()} ran, "
                    f"{max(ran.values(), default=0)} time(s) at the most",
                    flush=True,
                )


if __name__ == "__main__":
    main()
