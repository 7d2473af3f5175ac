"""What the fine-tuned classifier and regressor share: all but the meaning of `y`."""

from __future__ import annotations

import os
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_consistent_length, check_is_fitted
from torch import nn

from sktransfer._engine.augmentation import AUGMENTATIONS
from sktransfer._estimators.base import Interval, StrOptions, check_sample_weight
from sktransfer._estimators.pretrained import PretrainedFeatureExtractor
from sktransfer._estimators.trained import TrainedEstimator
from sktransfer._missing import refuse_missing
from sktransfer._splits import check_groups
from sktransfer._training.depth_search import search_depth
from sktransfer._training.settings import Settings, distinct
from sktransfer._training.whole import export_onnx
from sktransfer.io import ImageSequence


class FineTuned(TrainedEstimator):
    """Base of the classifier and the regressor, which say what `y` means."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **TrainedEstimator._parameter_constraints,
        "precision": [StrOptions({"auto", "float32", "bfloat16", "int8"})],
        "head": [StrOptions({"linear"}), list, tuple, nn.Module],
        "layer": PretrainedFeatureExtractor._parameter_constraints["layer"],
        "pooling": PretrainedFeatureExtractor._parameter_constraints["pooling"],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "head_epochs": [StrOptions({"auto"}), Interval(Integral, 0, None, closed="left")],
        "augment": [StrOptions(set(AUGMENTATIONS)), callable, None],
        "n_views": [Interval(Integral, 1, None, closed="left"), None],
        "predict_views": [Interval(Integral, 1, None, closed="left")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
    }

    # As of scikit-learn's splitters of groups: who has groups wants them in all splits.
    __metadata_request__fit = {"groups": True}

    _kind: str
    layer: Any
    _searches_depth = False

    def set_params(self, **params: Any) -> Self:
        """Set parameters, as in scikit-learn.

        Its searches set those of each candidate so. If `unfreeze` is one of them, a fit to this
        depth lets the `memory` keep what fits to other depths will want.
        """
        if "unfreeze" in params:
            self._searches_depth = True
        return super().set_params(**params)

    def __sklearn_clone__(self) -> Self:
        twin = super().__sklearn_clone__()
        twin._searches_depth = self._searches_depth
        return twin

    # ------------------------------------------------------------------------ fitting

    def _fit(
        self, X: Any, y: Any, sample_weight: Any, groups: Any = None, *, in_parts: bool = False
    ) -> Self:
        """Fit or, with `in_parts` or `warm_start`, go on with what is fitted."""
        y = self._check_given(y)
        goes_on = (in_parts or self.warm_start) and hasattr(self, "_trainer")
        if in_parts and not goes_on and self.unfreeze == "auto":
            raise ValueError(
                "unfreeze='auto' can't be searched for on a part of the images: call fit first, "
                "or pass a number of blocks."
            )
        images = self._check_images(X, reset=not goes_on)
        check_consistent_length(images, y)
        groups = check_groups(groups, len(images))
        is_announced = in_parts and hasattr(self, "classes_")
        targets = self._encode(y, goes_on or is_announced)
        weights = self._weights(y, sample_weight, images)
        rows, weights, groups = distinct(images, targets, weights, groups, self.n_jobs)
        images, targets = images[rows], targets[rows]
        self._check_targets(targets, groups, in_parts)
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        if goes_on:
            trainer = self._resume(in_parts=in_parts)
        else:
            self._keep_shape(seed)
            self._choose_depth(images, targets, weights, groups, seed)
            trainer = self._new_trainer(self._begin(targets, weights))
        targets = self._scaled(targets)
        how = {"in_parts": in_parts, "goes_on": goes_on}
        self._train(trainer, images, targets, weights, seed, groups=groups, **how)
        return self

    def _choose_depth(
        self,
        images: ImageSequence,
        targets: np.ndarray,
        weights: np.ndarray | None,
        groups: np.ndarray | None,
        seed: int,
    ) -> None:
        """Search for the depth, if it is to be searched for."""
        self.__dict__.pop("depth_search_", None)  # of an earlier fit
        if self.unfreeze != "auto":
            return
        if self._is_from_scratch:
            raise ValueError(
                "unfreeze='auto' searches for how much of the pretrained weights to keep, and "
                "weights=None has none: pass unfreeze='all'."
            )
        self.depth_search_ = search_depth(self, images, targets, weights, groups, seed, self._kind)
        if self.verbose:
            depths = ", ".join(map(str, self.depth_search_["depths"]))
            print(f"unfreeze='auto' took {self.depth_search_['unfreeze']} of {depths}")

    def _check_given(self, y: Any) -> Any:
        """Return `y` in a container that scikit-learn takes; raise an error if it misses some."""
        if y is None:
            raise ValueError(
                f"This {type(self).__name__} estimator requires y to be passed, but the target y "
                "is None."
            )
        refuse_missing(y)
        return y

    def _settings(self, n_outputs: int) -> Settings:
        settings = super()._settings(n_outputs)
        settings.searches_depth = self._searches_depth
        if settings.unfreeze == "auto":
            settings.unfreeze = self.depth_search_["unfreeze"]
        return settings

    def _encode(self, y: Any, is_known: bool) -> np.ndarray:
        """Turn `y` into targets, of the classes or columns that are known if some are."""
        raise NotImplementedError

    def _weights(self, y: Any, sample_weight: Any, images: ImageSequence) -> np.ndarray | None:
        if sample_weight is None:
            return None
        weights = check_sample_weight(
            sample_weight, images, dtype=np.float64, ensure_non_negative=True
        )
        if not weights.any():
            raise ValueError("sample_weight is zero everywhere: nothing is left to learn from.")
        return weights

    def _check_targets(
        self, targets: np.ndarray, groups: np.ndarray | None, in_parts: bool
    ) -> None:
        """Raise an error if nothing can be learnt from these encoded targets."""

    def _begin(self, targets: np.ndarray, weights: np.ndarray | None) -> int:
        """Prepare a new fit; return the number of outputs."""
        return targets.shape[1]

    def _scaled(self, targets: np.ndarray) -> np.ndarray:
        return targets

    # ------------------------------------------------------------------------ what is fitted

    def to_onnx(self, path: str | os.PathLike) -> Path:
        """Write the whole network, frozen and trained blocks and the head, to an ONNX file.

        Needs ``pip install '.[onnx]'`` here, and nothing of this library where the file
        is used.

        Parameters
        ----------
        path : path
            Of the file, `.onnx`. Weights of more than 2 GB go to a second one beside it.

        Returns
        -------
        pathlib.Path

        Raises
        ------
        ValueError
            If torch can't export the network, or there is no such folder.

        Notes
        -----
        The input `images` is uint8 RGB (n, 3, height, width) with any n, resized and cropped as
        the file's metadata says under `preprocessing` (the size is fixed); normalisation is part
        of the graph. The output is `probabilities` (n, n_classes), their names a JSON list under
        `labels`; or, of a regressor, `values` (n, n_outputs) in the unit of `y`. It computes in
        float32, and takes the image itself, whatever `precision` and `predict_views`.
        """
        check_is_fitted(self, "plan_")
        classes = getattr(self, "classes_", None)
        labels = None if classes is None else classes.tolist()
        return export_onnx(self.trainer(), path, self.last_layer(), labels)

    def last_layer(self) -> nn.Module:
        """Return what turns the head's outputs into predictions; for other parts of the library."""
        raise NotImplementedError

    def _outputs(self, X: Any) -> np.ndarray:
        """Return what the network says of each view: (n, predict_views, n_outputs)."""
        check_is_fitted(self, "plan_")
        self._validate_params()
        return self.predictor().outputs(self._check_images(X, reset=False))
