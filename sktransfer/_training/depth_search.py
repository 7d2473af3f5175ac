"""`unfreeze="auto"`: how many blocks to train, by a short search inside the training images."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, clone
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import HalvingGridSearchCV

from sktransfer._bars import tqdm
from sktransfer._engine.frozen import FrozenBlocks
from sktransfer._splits import Split, UndividedWarning, class_sizes, inner_folds
from sktransfer._threads import WithoutWarnings
from sktransfer._training.cut import check_is_trainable
from sktransfer._training.plan import usual_depths
from sktransfer.io import ImageSequence

_FOLDS = 3
_FACTOR = 3  # of candidates dropped, and of epochs gained, from one round to the next
_undivided = WithoutWarnings(UndividedWarning)  # of heads on a part of the groups


class OnRows(BaseEstimator):
    """An estimator that is fitted on rows of something that it knows.

    scikit-learn's searches hand rows around, so that images are neither copied nor read again.

    Parameters
    ----------
    model : estimator
    X : ImageSequence or ndarray
    weights : ndarray of shape (n,), default=None
        Of the rows, in the fit and in the score.
    groups : ndarray of shape (n,), default=None
        Of the rows, in the fit.

    Attributes
    ----------
    fitted_ : estimator
    """

    def __init__(
        self,
        model: Any,
        X: Any,
        weights: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> None:
        self.model = model
        self.X = X
        self.weights = weights
        self.groups = groups

    def __sklearn_clone__(self) -> Self:
        return type(self)(**{**self.get_params(deep=False), "model": clone(self.model)})

    def fit(self, rows: np.ndarray, y: np.ndarray) -> Self:
        groups = {} if self.groups is None else {"groups": self.groups[rows]}
        self.fitted_ = self._new_model().fit(self.X[rows], y, **self._weights_of(rows), **groups)
        return self

    def score(self, rows: np.ndarray, y: np.ndarray) -> float:
        return self.fitted_.score(self.X[rows], y, **self._weights_of(rows))

    def _new_model(self) -> Any:
        return clone(self.model)

    def _weights_of(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {} if self.weights is None else {"sample_weight": self.weights[rows]}


class _Depth(OnRows):
    """A fine-tuned estimator of some depth.

    Parameters
    ----------
    model, X, weights, groups
        See `OnRows`.
    unfreeze, max_epochs : int
        What is searched over, and the resource of successive halving.
    progress : object with `update`, default=None
        Counts the fits.
    """

    def __init__(
        self,
        model: Any,
        X: ImageSequence,
        weights: np.ndarray | None,
        groups: np.ndarray | None,
        unfreeze: int = 0,
        max_epochs: int = 1,
        progress: Any = None,
    ) -> None:
        super().__init__(model, X, weights, groups)
        self.unfreeze = unfreeze
        self.max_epochs = max_epochs
        self.progress = progress

    def fit(self, rows: np.ndarray, y: np.ndarray) -> Self:
        super().fit(rows, y)
        if self.progress is not None:
            self.progress.update()
        return self

    def _new_model(self) -> Any:
        return clone(self.model).set_params(unfreeze=self.unfreeze, max_epochs=self.max_epochs)


def search_depth(
    model: Any,
    images: ImageSequence,
    targets: np.ndarray,
    weights: np.ndarray | None,
    groups: np.ndarray | None,
    seed: int,
    kind: str,
) -> dict[str, Any]:
    """Choose how many blocks `model` is to train, on its training images.

    Candidates are 0 and the powers of two, as long as the trained blocks hold at most two thirds of
    the network's operations: deeper ones share little frozen work, and cost as much as the whole
    network. Successive halving gives all of them a third of `max_epochs`, and the best third of
    them three times that; up to three candidates get all at once. Its resource is epochs, not
    images: how deep to train depends on the number of images above all, so a choice made on a part
    of them would be one for that part.

    Of the last round, and depth 0 if its head is solved for, as that takes no epochs, the
    shallowest depth is chosen whose score is within one standard error of the best.

    Parameters
    ----------
    model : FineTunedClassifier or FineTunedRegressor
        As the user set it; it is not changed.
    images : ImageSequence
    targets : ndarray of shape (n,) or (n, n_outputs)
        Encoded.
    weights : ndarray of shape (n,) or None
        Of the images, those of the classes included; they weigh the score as well.
    groups : ndarray of shape (n,) or None
        Of the images, which no fold tears apart.
    seed : int
    kind : {"class", "label", "value"}
        What the targets are.

    Returns
    -------
    dict
        See `depth_search_` of the estimators.

    References
    ----------
    Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter
    optimization" (2016), for successive halving. Breiman, Friedman, Olshen and Stone,
    "Classification and regression trees" (1984), for the rule of one standard error.
    """
    depths, shares = _candidates(model)
    # Of what a candidate learns from, early stopping holds out a part.
    n_left = 2 if model.early_stopping else 1
    splits = inner_folds(_FOLDS, targets, kind, groups, seed, n_left=n_left)
    if not splits:
        warnings.warn(
            f"unfreeze='auto' can't compare depths on {len(targets)} images"
            f"{_rare_class(kind, model, targets, groups)}: the head alone is trained. Pass more "
            f"images, {'' if groups is None else 'smaller groups, '}or a number of blocks.",
            UserWarning,
            stacklevel=7,
        )
        nothing = {"unfreeze": 0, "best": 0, "threshold": np.nan, "cv_results_": {}}
        return {**nothing, "depths": depths, "shares": shares}
    results = _halve(model, images, targets, weights, groups, seed, depths, splits)
    takes_epochs = not (isinstance(model.head, str) and model.head_epochs == "auto")
    choice = _choose(results, takes_epochs)
    return {**choice, "depths": depths, "shares": shares, "cv_results_": results}


def _halve(
    model: Any,
    images: ImageSequence,
    targets: np.ndarray,
    weights: np.ndarray | None,
    groups: np.ndarray | None,
    seed: int,
    depths: np.ndarray,
    splits: list[Split],
) -> dict[str, Any]:
    """Compare depths by successive halving; return what `cv_results_` of the search holds."""
    # Few candidates are compared at once: a second round would have one of them only.
    has_rounds = len(depths) > _FACTOR <= model.max_epochs
    # Of the next round, about; the first has all of them.
    n_fits = (len(depths) + has_rounds * -(-len(depths) // _FACTOR)) * len(splits)
    silent = not model.verbose
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=n_fits, desc="searching the depth", unit="fit", disable=silent) as progress,
    ):
        candidate = _candidate_of(model, folder, seed)
        search = HalvingGridSearchCV(
            _Depth(candidate, images, weights, groups, progress=progress),
            {"unfreeze": depths[::-1].tolist()},  # of equal scores, the search keeps the last
            resource="max_epochs",
            max_resources=model.max_epochs,
            min_resources="exhaust" if has_rounds else model.max_epochs,
            factor=_FACTOR,
            cv=splits,
            refit=False,
            error_score="raise",
            return_train_score=False,
        )
        try:
            with _undivided:
                search.fit(np.arange(len(images)), targets)
        except KeyboardInterrupt:
            kept = "lies in the memory" if model.memory is not None else "is lost without a memory"
            raise KeyboardInterrupt(
                "fit was interrupted while it searched for the depth: the estimator is as it was, "
                f"and what the frozen blocks computed {kept}."
            ) from None
    return {name: _plain(values) for name, values in search.cv_results_.items()}


def _candidate_of(model: Any, folder: str, seed: int) -> Any:
    """Return what the search fits instead of the user's model; `folder` is for its memory."""
    candidate = clone(model).set_params(
        memory=folder if model.memory is None else model.memory,
        random_state=seed,
        verbose=0,
        callbacks=None,  # those of the user are about the one fit that they asked for
        warm_start=False,
        image_shape=None,  # flat rows are images by now
    )
    if hasattr(candidate, "class_weight"):
        candidate.set_params(class_weight=None)  # it is in the weights
    return candidate


def _candidates(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the depths to compare, and the shares of the network's operations behind them."""
    if model.max_epochs == 0:
        raise ValueError(
            "unfreeze='auto' compares what training makes of each depth, and max_epochs=0 trains "
            "nothing: pass more epochs, or unfreeze=0."
        )
    check_is_trainable(model.precision)
    runner, preprocessing = model.load_network()
    n_blocks = len(runner.block_names)
    if n_blocks == 0:
        reason = "" if runner.can_be_cut else ", as it can't be traced"
        raise ValueError(
            f"unfreeze='auto' searches over numbers of blocks, and {runner.name!r} has none"
            f"{reason}: pass unfreeze=0 or 'all'."
        )
    return usual_depths(FrozenBlocks(runner, preprocessing, model.pooling).flops(), n_blocks)


def _rare_class(kind: str, model: Any, targets: np.ndarray, groups: np.ndarray | None) -> str:
    if kind != "class":
        return "" if groups is None else f" of {len(np.unique(groups))} groups"
    numbers, counts = class_sizes(targets, groups)
    name = str(model.classes_[numbers[counts.argmin()]])
    if groups is None:
        return f", of a class of which there is one only, {name!r}"
    return f" of {len(np.unique(groups))} groups, as class {name!r} lies in {counts.min()} of them"


def _plain(values: Any) -> Any:
    """Turn masked arrays of objects, as scikit-learn keeps parameters, into arrays."""
    return np.array(values.tolist()) if isinstance(values, np.ma.MaskedArray) else values


def _choose(results: dict[str, Any], takes_epochs: bool) -> dict[str, Any]:
    """Return the depth to take, the best one, and the score from which on depths are as good."""
    is_last = results["iter"] == results["iter"].max()
    if not takes_epochs:
        is_last |= results["param_unfreeze"] == 0
    depths, means = results["param_unfreeze"][is_last], results["mean_test_score"][is_last]
    names = sorted(name for name in results if name.startswith("split"))
    scores = np.stack([results[name][is_last] for name in names])  # (n_folds, n_compared)
    # One standard error for all that are compared: of three folds it is a rough one.
    error = np.sqrt(scores.var(axis=0, ddof=1).mean() / len(scores))
    threshold = means.max() - error
    return {
        "unfreeze": int(depths[means >= threshold].min()),
        "best": int(depths[means >= means.max()].min()),
        "threshold": float(threshold),
    }
