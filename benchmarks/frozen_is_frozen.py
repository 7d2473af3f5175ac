"""Frozen blocks stay frozen: parameters and batch-norm statistics, in every torchvision network.

Each classification network of torchvision that has batch-norms is trained for one epoch on eight
random images from three depths: its last block, the middle, and all but the first block. Random
weights are trained from scratch, so the batch-norms of trained blocks do move. Then every parameter
and buffer in front of the cut must have the bits that it had, both in the network that all
estimators share and in the one that the fitted estimator returns; behind it, something must have
changed.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import sys
import time
import warnings
from functools import partial

import numpy as np
import torch
import torchvision
import xxhash
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sktransfer import FineTunedClassifier, get_model
from sktransfer._engine.runner import get_runner
from sktransfer.models import Backbone, _registry

SIZES = (64, 96, 128, 224)  # the first that the network takes


def with_batch_norm(pattern: str) -> dict[str, int]:
    """Return the names of the networks and their numbers of parameters, the smallest first."""
    found = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        if fnmatch.fnmatch(name, pattern):
            options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            build = partial(torchvision.models.get_model, name, weights=None, **options)
            try:
                with torch.device("meta"):
                    network = build()
            except NotImplementedError:  # it reads the values of a tensor
                network = build()
            if any(isinstance(module, _BatchNorm) for module in network.modules()):
                found[name] = sum(p.numel() for p in network.parameters())
    return dict(sorted(found.items(), key=lambda item: item[1]))


def digests(network: nn.Module) -> dict[str, str]:
    return {
        name: xxhash.xxh3_128_hexdigest(value.detach().contiguous().numpy())
        for name, value in network.state_dict().items()
    }


def fit(backbone: Backbone, unfreeze: int) -> FineTunedClassifier:
    X = np.random.RandomState(0).randint(0, 256, (8, 64, 64, 3), np.uint8)
    for size in SIZES:
        model = FineTunedClassifier(
            backbone,
            unfreeze=unfreeze,
            head_epochs=0,
            max_epochs=1,
            batch_size=4,  # two steps: at first the head is zero, so only it has gradients
            image_size=size,
            random_state=0,
        )
        try:
            return model.fit(X, np.arange(8) % 2)
        except ValueError as error:
            if "can't take images" not in str(error) or size == SIZES[-1]:
                raise
    raise AssertionError


def check(name: str) -> tuple[str, bool]:
    """Train from three depths; return what was found, and whether it is right."""
    backbone = get_model(name, None)
    runner = get_runner(backbone, "cpu", "float32")
    n_blocks = len(runner.block_names)
    before = digests(backbone.network)
    found, right = [], True
    for unfreeze in sorted({1, n_blocks // 2, n_blocks - 1}):
        model = fit(backbone, unfreeze)
        size = model.image_size
        segments = [runner.segment(i, (size, size)) for i in range(n_blocks - unfreeze)]
        frozen = {key for segment in segments for key in segment.state_dict()} & before.keys()
        after = digests(model.to_feature_extractor().backbone.network)
        moved = [key for key in frozen if after[key] != before[key]]
        shared = digests(backbone.network)
        moved += [f"shared {key}" for key in before if shared[key] != before[key]]
        n_changed = sum(after[key] != before[key] for key in before)
        right &= not moved and n_changed > 0 and len(frozen) > 0
        found.append(f"{unfreeze}: {len(frozen)} frozen, {n_changed} changed")
        found += [f"MOVED {key}" for key in moved[:3]]
    return f"{n_blocks} blocks, {size} pixels; " + "; ".join(found), right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pattern", default="*")
    parser.add_argument("--max-parameters", type=float, default=float("inf"), help="in millions")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # torchvision's notes on initialisation
    names = with_batch_norm(args.pattern)
    left_out = [name for name, n in names.items() if n > 1e6 * args.max_parameters]
    wrong = []
    for name in (name for name in names if name not in left_out):
        start = time.perf_counter()
        try:
            text, right = check(name)
        except Exception as error:  # the others are still to be checked
            text, right = f"{type(error).__name__}: {error}", False
        seconds = time.perf_counter() - start
        print(f"{name:24}{'OK' if right else 'FAILED':8}{text} ({seconds:.1f} s)", flush=True)
        wrong += [] if right else [name]
        _registry._recent.clear()  # the largest have gigabytes
        gc.collect()
    n_checked = len(names) - len(left_out)
    print(f"{n_checked - len(wrong)} of {n_checked} networks: every frozen tensor bit-identical")
    if left_out:
        print(f"left out, as they have more parameters: {', '.join(left_out)}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
