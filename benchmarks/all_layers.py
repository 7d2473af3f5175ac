"""What the features of all layers give beside the last one's, and what they cost.

`--part time`: seconds to embed ELPV solar cells from files, by the layers taken.

`--part head`: linear heads on the rows of frozen layers, by how they are regularised and scaled, on
ELPV (p > 0.5) and scikit-learn's digits as images, with 50, 200 and all labels of five splits.

`--part groups`: this head on all layers, with one strength of regularisation for all columns, or
with a factor for the columns of each resolution.

`--part fusion`: the linear head on all layers against an attentive fusion of them, on these two and
on noisy crops of 16 regions of scikit-learn's photographs.
"""

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import product
from time import perf_counter
from typing import Any

import numpy as np
import torch
from _common import Built, environment, median, say, sides, table, take_turns
from scipy.special import softmax
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import nn

from sktransfer import PretrainedFeatureExtractor
from sktransfer._cli import benchmark as _benchmark
from sktransfer._estimators.pretrained import embedding_of
from sktransfer._training import heads as _heads

ALL = {"layer": "all", "pooling": ("avg", "max")}
CHOICES = {
    "last layer": {"layer": "auto"},
    "stages, mean": {"layer": "stages"},
    "all layers, mean": {"layer": "all"},
    "all layers, mean and maximum": ALL,
}


# ------------------------------------------------------------------------------ time


def _build(options: dict, n: int) -> Built:
    files = _benchmark.load_elpv().images[:n]
    extractor = PretrainedFeatureExtractor(**options)
    extractor.transform(files)  # to warm up; it also settles what computes
    return Built(partial(extractor.transform, files), {})


def time(n: int, repeats: int, runtimes: Sequence[str]) -> None:
    """Print the seconds by the layers taken, the sides in turns."""
    print(environment("openvino"), "\n")
    for runtime in runtimes:
        builders = {
            name: (_build, {**options, "runtime": runtime}, n) for name, options in CHOICES.items()
        }
        with sides(builders) as built:
            seconds = {name: median(found) for name, found in take_turns(built, repeats).items()}
        first = seconds["last layer"]
        rows = [
            {"features of": name, "seconds": f"{s:.2f}", "of the last layer's": f"{s / first:.2f}"}
            for name, s in seconds.items()
        ]
        print(f"{runtime}: {n} ELPV cells from files, efficientnet_lite0, medians of {repeats}\n")
        print(table(rows), "\n")


# ------------------------------------------------------------------------------ heads

LABELS = (50, 200, "all")
HEADS = {  # regularisation, scales of the features
    "C = 0.03, one scale": (True, True),
    "chosen, one scale": (False, True),
    "chosen, Pareto": (False, False),
}


def _tasks() -> Iterator[tuple[str, Any, np.ndarray]]:
    task = _benchmark.load_elpv()
    is_defective = task.targets["defective: p > 0.5"] == "defective"
    yield "ELPV", task.images, is_defective.astype(np.int64)
    digits = load_digits()
    yield "digits", (digits.images / 16 * 255).astype(np.uint8), digits.target.astype(np.int64)


def _splits(y: np.ndarray, n: Any, n_splits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield training and test rows; of the former `n`, or "all"."""
    for split in range(n_splits):
        train, test = train_test_split(
            np.arange(len(y)), test_size=0.25, stratify=y, random_state=split
        )
        if n != "all":
            train, _ = train_test_split(train, train_size=n, stratify=y[train], random_state=split)
        yield train, test


def _features(images: Any, memory: str) -> dict[str, np.ndarray]:
    choices = dict(reversed(CHOICES.items()))  # the largest first: the others are read
    del choices["stages, mean"]
    return {
        name: PretrainedFeatureExtractor(memory=memory, **options).transform(images)
        for name, options in choices.items()
    }


def _probabilities(X: np.ndarray, y: np.ndarray, test: np.ndarray, how: str) -> np.ndarray:
    is_fixed, has_one_scale = HEADS[how]
    choose, scale = _heads._choose_strength, _heads._scale
    head: Any = _heads.make_head("linear", X.shape[1], int(y.max()) + 1, 0.0)
    try:
        if is_fixed:
            _heads._choose_strength = lambda *_: _heads._C
        if has_one_scale:
            _heads._scale = lambda variances, _: scale(variances, True)
        _heads.solve_head(head, X, y, None, "class")
    finally:
        _heads._choose_strength, _heads._scale = choose, scale
    with torch.inference_mode():
        return head.eval()(torch.from_numpy(test)).double().softmax(1).numpy()


def _scores(y: np.ndarray, p: np.ndarray) -> tuple[float, ...]:
    auc = roc_auc_score(y, p[:, 1]) if p.shape[1] == 2 else np.nan
    return float((p.argmax(1) == y).mean()), float(auc), float(log_loss(y, p))


def head(n_splits: int = 5, memory: str | None = None) -> None:
    """Print accuracy, ROC AUC and log-loss of linear heads, means over splits."""
    print(f"Accuracy (ROC AUC), log-loss of linear heads, means of {n_splits} splits 75/25\n")
    with tempfile.TemporaryDirectory() as folder:
        for task, images, y in _tasks():
            rows: list[dict[str, Any]] = []
            features = _features(images, memory or folder)
            for n in LABELS:
                found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
                for split, (train, test) in enumerate(_splits(y, n, n_splits)):
                    for name, X in features.items():
                        for how in HEADS:
                            p = _probabilities(X[train], y[train], X[test], how)
                            found.setdefault((name, how), []).append(_scores(y[test], p))
                    say(f"  {task}, {n} labels: split {split + 1} of {n_splits}")
                for (name, how), scores in found.items():
                    accuracy, auc, loss = np.mean(scores, axis=0)
                    cell = f"{accuracy:.3f}" + ("" if np.isnan(auc) else f" ({auc:.3f})")
                    start = {"task": task, "labels": n, "features of": name}
                    if not rows or any(rows[-1][key] != value for key, value in start.items()):
                        rows.append(start)
                    rows[-1][how] = f"{cell}, {loss:.2f}"
            print(table(rows), "\n", flush=True)


# ------------------------------------------------------------------------------ groups of layers

FACTORS = (0.5, 1.0, 2.0)
SIDES = ("one strength", "by groups")


def _stages(extractor: PretrainedFeatureExtractor) -> list[np.ndarray]:
    """Return the columns of the blocks of each resolution; the last block is a group of its own."""
    embedding = embedding_of(extractor)
    last, size = embedding.wanted[-1].position, embedding.preprocessing.size
    groups: dict[Any, list[np.ndarray]] = {}
    for row, part in zip(embedding.wanted, embedding.columns, strict=True):
        resolution = embedding.runner.shape(row.position, size)[1:]
        group = groups.setdefault((resolution, row.position == last), [])
        group.append(np.arange(part.start, part.stop))
    return [np.concatenate(parts) for parts in groups.values()]


class _Grouped:
    """The head on rows of which each group of columns has a factor, solved by their products.

    Rows (n, n) with the same products as the scaled ones (n, width) have the same optimum, and
    fewer columns. Factors leave the variance of a row as it is.

    Parameters
    ----------
    X, y : ndarray
        What is learnt from.
    test : ndarray
        Rows to predict.
    groups : sequence of ndarray
        Columns.
    """

    def __init__(
        self, X: np.ndarray, y: np.ndarray, test: np.ndarray, groups: Sequence[np.ndarray]
    ) -> None:
        mean, scale = X.mean(0), _heads._scale(X.var(0), False)
        rows, others = (((x - mean) / scale).astype(float) for x in (X, test))
        self.y, self.width, self.groups = y, X.shape[1], groups
        self.products = np.stack([rows[:, group] @ rows[:, group].T for group in groups])
        self.cross = np.stack([others[:, group] @ rows[:, group].T for group in groups])
        self.variances = self.products.trace(axis1=1, axis2=2)

    def squares(self, factors: Sequence[float]) -> np.ndarray:
        squares = np.square(factors)
        return squares * self.variances.sum() / (squares @ self.variances)

    def learnt(self, factors: Sequence[float]) -> _heads.Learnt:
        products = np.tensordot(self.squares(factors), self.products, 1)
        products.flat[:: len(products) + 1] += 1e-6 * products.trace() / len(products)
        rows = np.linalg.cholesky(products).astype(np.float32)
        return _heads.Learnt(rows, self.y, np.ones(len(rows)), "class", int(self.y.max()) + 1)

    def strength(self, learnt: _heads.Learnt) -> float:
        """Choose it as the head does, which goes by the width of the rows."""
        width = _heads._WIDTH
        try:
            _heads._WIDTH = width * learnt.rows.shape[1] / self.width
            return _heads._choose_strength(learnt, 1, None, 0)
        finally:
            _heads._WIDTH = width

    def probabilities(self, factors: Sequence[float]) -> np.ndarray:
        learnt = self.learnt(factors)
        coef, intercept = _heads._fit(learnt, self.strength(learnt))
        of_rows = np.linalg.solve(learnt.rows.T.astype(float), coef.T)  # (n, n_outputs)
        cross = np.tensordot(self.squares(factors), self.cross, 1)  # (n_test, n)
        return softmax(cross @ of_rows + intercept, axis=1)

    def factors(self) -> tuple[float, ...]:
        """Choose one factor after the other, twice around, by the loss that chooses the strength.

        The strength is the one without factors.
        """
        best = (1.0,) * len(self.groups)
        strength, folds = self.strength(self.learnt(best)), _heads._folds(self.y, "class", None, 0)

        @cache
        def loss(factors: tuple[float, ...]) -> float:
            learnt = self.learnt(factors)
            fits = [(rest, _heads._fit(learnt.part(part), strength, {})) for part, rest in folds]
            return sum(_heads._loss(learnt.part(rest), *fitted) for rest, fitted in fits)

        for group in [*range(len(best))] * 2:
            tried = [(*best[:group], factor, *best[group + 1 :]) for factor in FACTORS]
            best = min([best, *tried], key=loss)
        return best


def _compare_groups(
    X: np.ndarray, y: np.ndarray, stages: Sequence[np.ndarray], splits: Iterable
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and seconds (splits, 2, 4) of both heads, and factors (splits, groups)."""
    scores, chosen = [], []
    for train, test in splits:
        head = _Grouped(X[train], y[train], X[test], stages)
        times = [perf_counter()]
        found = [head.probabilities([1.0] * len(stages))]
        times.append(perf_counter())
        factors = head.factors()
        found.append(head.probabilities(factors))
        times.append(perf_counter())
        both = zip(found, np.diff(times), strict=True)
        scores.append([(*_scores(y[test], p), seconds) for p, seconds in both])
        chosen.append(factors)
        say(f"  {np.round(scores[-1], 4).tolist()}, {factors}")
    return np.array(scores), np.array(chosen)


def _change(changes: Sequence[np.ndarray]) -> dict[str, str]:
    """Return the means over rows of the changes (splits, 2) in each, ± standard errors."""
    means = np.mean([change.mean(0) for change in changes], axis=0)
    variances = [change.var(0, ddof=1) / len(change) for change in changes]
    errors = np.sqrt(np.sum(variances, axis=0)) / len(changes)
    cells = [f"{mean:+.4f} ± {error:.4f}" for mean, error in zip(means, errors, strict=True)]
    return dict(zip(("change of accuracy", "of log-loss"), cells, strict=True))


def groups(
    n_splits: int = 5, memory: str | None = None, labels: Sequence[Any] = LABELS, every: int = 1
) -> None:
    """Print scores of both heads, and what the factors change."""
    print("Accuracy (ROC AUC), log-loss and seconds of linear heads on all layers, mean and")
    few = min(n_splits, 3)
    print(f"maximum, and changes ± standard errors: {n_splits} splits 75/25, {few} of all labels\n")
    rows, changes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for task, images, y in _tasks():
            extractor = PretrainedFeatureExtractor(memory=memory or folder, **ALL)
            X, y, stages = extractor.transform(images[::every]), y[::every], _stages(extractor)
            for n in labels:
                say(f"{task}, {n} labels, groups of {[len(stage) for stage in stages]} columns")
                splits = _splits(y, n, few if n == "all" else n_splits)
                scores, factors = _compare_groups(X, y, stages, splits)
                row = {"task": task, "labels": n}
                for name, (accuracy, auc, loss, seconds) in zip(SIDES, scores.mean(0), strict=True):
                    cell = f"{accuracy:.3f}" + ("" if np.isnan(auc) else f" ({auc:.3f})")
                    row[name] = f"{cell}, {loss:.3f}, {seconds:.1f} s"
                changes.append(np.diff(scores, axis=1)[:, 0, [0, 2]])
                means = " ".join(f"{factor:.2f}" for factor in 2 ** np.log2(factors).mean(0))
                rows.append(row | _change(changes[-1:]) | {"factors": means})
    print(table([*rows, {"task": "all rows", **_change(changes)}]), "\n")


# ------------------------------------------------------------------------------ attentive fusion

FUSION_LABELS = {"ELPV": (50, 200, "all"), "digits": (100, "all"), "regions": (80, "all")}


class Fusion(nn.Module):
    """A learnt query attends to one token for each layer and pooling; a linear layer follows.

    After the attentive probes of all layers of 2025 and 2026, for layers of different widths: each
    has a norm and a projection of its own.
    """

    def __init__(self, widths: list[int], n_outputs: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.widths = widths
        self.project = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(w), nn.Dropout(0.1), nn.Linear(w, width)) for w in widths
        )
        self.place = nn.Parameter(torch.randn(len(widths), width) * 0.02)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, n_outputs)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        parts = zip(self.project, rows.split(self.widths, 1), strict=True)
        tokens = torch.stack([project(part) for project, part in parts], 1) + self.place
        attended, _ = self.attend(self.query.expand(len(rows), -1, -1), tokens, tokens)
        return self.output(self.norm(attended[:, 0]))


def _fused(
    X: torch.Tensor, y: torch.Tensor, widths: list[int], n_outputs: int, decay: float, epochs: int
) -> Fusion:
    torch.manual_seed(0)
    fusion = Fusion(widths, n_outputs)
    optimizer = torch.optim.AdamW(fusion.parameters(), lr=2e-3, weight_decay=decay)
    n_steps = epochs * -(-len(X) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=n_steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(X)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(fusion(X[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return fusion.eval()


def _fusion_probabilities(
    X: np.ndarray, y: np.ndarray, test: np.ndarray, widths: list[int]
) -> np.ndarray:
    """Train with the weight decay and the epochs of the least loss in three folds."""
    rows, targets, n_outputs = torch.from_numpy(X), torch.from_numpy(y), int(y.max()) + 1
    folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(X, y))

    def loss(choice: tuple[float, int]) -> float:
        total = 0.0
        for learnt, held_out in folds:
            fusion = _fused(rows[learnt], targets[learnt], widths, n_outputs, *choice)
            with torch.inference_mode():
                outputs = fusion(rows[held_out])
                total += nn.functional.cross_entropy(outputs, targets[held_out]).item()
        return total

    epochs = (10, 30) if len(X) > 500 else (20, 60)
    fusion = _fused(rows, targets, widths, n_outputs, *min(product((1e-2, 1.0), epochs), key=loss))
    with torch.inference_mode():
        return fusion(torch.from_numpy(test)).double().softmax(1).numpy()


def _regions() -> tuple[Any, np.ndarray]:
    """Return noisy crops of 16 regions of scikit-learn's photographs, and their regions."""
    chance, crops, regions = np.random.default_rng(0), [], []
    for number, photo in enumerate(load_sample_images().images):
        for strip in range(8):
            for _ in range(40):
                top, left = chance.integers(0, 380), 80 * strip + chance.integers(0, 40)
                crop = photo[top : top + 40, left : left + 40].mean(2, keepdims=True)
                crop = chance.uniform(0.5, 1.5) * crop + chance.uniform(-40, 40)
                noise = chance.normal(0, 15, crop.shape)
                crops.append((crop + noise).clip(0, 255).repeat(3, 2).astype(np.uint8))
                regions.append(8 * number + strip)
    return np.stack(crops), np.array(regions)


def _fusion_tasks(names: Sequence[str]) -> Iterator[tuple[str, Any, np.ndarray]]:
    for name, images, y in _tasks():
        if name in names:
            yield name, images, y
    if "regions" in names:
        yield "regions", *_regions()


def _compared(
    X: np.ndarray, y: np.ndarray, n: Any, n_splits: int, widths: list[int]
) -> dict[str, np.ndarray]:
    """Return the scores, (n_splits, 3), of either way of learning on `n` labels."""
    found: dict[str, list[tuple[float, ...]]] = {"linear": [], "fusion": []}
    for train, test in _splits(y, n, n_splits):
        linear = _probabilities(X[train], y[train], X[test], "chosen, Pareto")
        fused = _fusion_probabilities(X[train], y[train], X[test], widths)
        found["linear"].append(_scores(y[test], linear))
        found["fusion"].append(_scores(y[test], fused))
    return {name: np.array(scores) for name, scores in found.items()}


def _gain(gains: np.ndarray) -> str:
    return f"{gains.mean():+.3f} ± {gains.std():.3f}"


def fusion(
    n_splits: int = 3, memory: str | None = None, tasks: Sequence[str] = tuple(FUSION_LABELS)
) -> None:
    """Print accuracy, ROC AUC and log-loss of attentive fusion and of the linear head.

    Each row is printed as it comes, and the table of all at the end.
    """
    rows, gains = [], []
    print(f"Accuracy (ROC AUC), log-loss on all layers, mean of {n_splits} splits 75/25;")
    print("gain: in accuracy, of fusion over the linear head on the same split\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for task, images, y in _fusion_tasks(tasks):
            extractor = PretrainedFeatureExtractor(memory=memory or folder, **ALL)
            X = extractor.transform(images)
            widths = [part.stop - part.start for part in embedding_of(extractor).columns]
            for n in FUSION_LABELS[task]:
                row = {"task": task, "labels": n}
                found = _compared(X, y, n, n_splits, widths)
                for name, scores in found.items():
                    accuracy, auc, loss = scores.mean(0)
                    cell = f"{accuracy:.3f} ± {scores[:, 0].std():.3f}"
                    row[name] = f"{cell}{'' if np.isnan(auc) else f' ({auc:.3f})'}, {loss:.2f}"
                gains.append(found["fusion"][:, 0] - found["linear"][:, 0])
                rows.append({**row, "gain": _gain(gains[-1])})
                print(table(rows[-1:]), flush=True)
    print(f"\n{table(rows)}\n")
    print(f"Mean gain over these rows, ± over splits: {_gain(np.mean(gains, 0))}")


PARTS = {"time": time, "head": head, "groups": groups, "fusion": fusion}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="(default: all parts)")
    parser.add_argument("--memory", help="folder that keeps the rows")
    parser.add_argument("--images", type=int, default=300, help="of `time`")
    parser.add_argument("--repeats", type=int, default=7, help="of `time`")
    parser.add_argument("--runtimes", nargs="+", default=["openvino", "torch"], help="of `time`")
    parser.add_argument("--splits", type=int, default=5, help="of `groups`")
    parser.add_argument("--labels", nargs="+", default=LABELS, help="of `groups`")
    parser.add_argument(
        "--every", type=int, default=1, help="of how many images `groups` takes one"
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=FUSION_LABELS, default=[*FUSION_LABELS], help="of `fusion`"
    )
    options = parser.parse_args()
    for part in options.part or PARTS:
        if part == "time":
            time(options.images, options.repeats, options.runtimes)
        elif part == "groups":
            labels = [n if n == "all" else int(n) for n in options.labels]
            groups(options.splits, options.memory, labels, options.every)
        elif part == "fusion":
            fusion(memory=options.memory, tasks=options.tasks)
        else:
            PARTS[part](memory=options.memory)


if __name__ == "__main__":
    main()
