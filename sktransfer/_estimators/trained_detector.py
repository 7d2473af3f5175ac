"""What a detector has learnt: how it comes about, is kept, and is rebuilt where it is needed."""

from __future__ import annotations

import copy
import threading
from dataclasses import fields
from typing import Any, Self

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from sktransfer._engine.device import resolve_device
from sktransfer._estimators.base import (
    KeepsTrainer,
    check_fingerprint,
    interrupted_fit,
    interrupted_refit,
    refuse_auto_depth,
    twin_of,
)
from sktransfer._threads import n_threads
from sktransfer._torch_state import ready_to_train
from sktransfer._training.detector_networks import NEW
from sktransfer._training.detector_part import DetectorPart, part_of_detector, part_on_backbone
from sktransfer._training.detector_trainer import DetectorSettings, DetectorTrainer
from sktransfer._training.interrupt import Interrupted
from sktransfer.io._boxes import check_inside, check_objects, encode, find_classes, image_sizes

# What a fit trains: a later change counts for one that starts anew.
_SHAPE = ("detector", "unfreeze", "width", "image_size")


class TrainedDetector(KeepsTrainer):
    """Base of the detector: all but its parameters, and what its methods mean."""

    detector: Any
    unfreeze: Any
    classes_: np.ndarray
    warm_start: bool
    max_epochs: int
    n_jobs: int | None
    random_state: Any
    # A fit sets the following. A pickle leaves out those that can be None.
    _trainer: DetectorTrainer | None
    _state: dict[str, np.ndarray]

    # ------------------------------------------------------------------------ fitting

    def _fit(self, X: Any, y: Any, *, in_parts: bool) -> Self:
        """Fit or, with `in_parts` or `warm_start`, go on with what is fitted."""
        if y is None:
            raise ValueError(
                f"This {type(self).__name__} estimator requires y to be passed, but the target y "
                "is None."
            )
        refuse_auto_depth(self.unfreeze, f"{type(self).__name__} learns boxes")
        goes_on = (in_parts or self.warm_start) and hasattr(self, "_trainer")
        is_refit = hasattr(self, "_trainer") and not goes_on
        images = self._check_images(X, reset=not goes_on)
        objects = check_objects(y, len(images))
        classes = self.classes_ if goes_on else find_classes(objects)
        numbers = encode(objects, classes)
        sizes = image_sizes(images, n_threads(self.n_jobs))
        objects = check_inside(objects, sizes)
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        trainer = self._resume() if goes_on else self._new_trainer(classes, seed)
        learn = trainer.train_part if in_parts else trainer.train
        try:
            learn(images, objects, numbers, sizes, seed)
        except Interrupted as stopped:
            if is_refit:
                raise interrupted_refit() from None
            self._set_fitted(trainer)
            n_epochs = 1 if in_parts else self.max_epochs
            raise interrupted_fit(stopped.n_done, n_epochs) from None
        self._set_fitted(trainer)
        return self

    def _new_trainer(self, classes: np.ndarray, seed: int) -> DetectorTrainer:
        """Return the trainer of a new fit."""
        self.classes_, self._weights_seed = classes, seed
        self._shape = {name: getattr(self, name) for name in _SHAPE}
        self._shape["is_from_scratch"] = self._is_from_scratch
        self._load_named()
        self._place = self._wanted_place()
        return DetectorTrainer(self._new_part(), self._settings())

    def _resume(self) -> DetectorTrainer:
        """Return a trainer that goes on from what is fitted, by the parameters as they now are."""
        self._check_shape()
        return self.trainer().continued(self._settings())

    def _named_fingerprint(self) -> str:
        twin = twin_of(self)
        twin._load_named()
        return twin._new_part().fingerprint

    def _set_fitted(self, trainer: DetectorTrainer) -> None:
        """Set the fitted attributes."""
        part = trainer.part
        self._trainer = trainer
        self._fingerprint = part.fingerprint
        self.net_ = trainer.net
        self.history_ = trainer.history
        self.n_iter_ = len(self.history_)
        self.block_names_ = part.block_names
        self.unfrozen_block_names_ = [part.block_names[i] for i in sorted(part.unfrozen)]
        self.n_trainable_parameters_ = part.n_trainable_parameters

    def _settings(self) -> DetectorSettings:
        return DetectorSettings(**{f.name: getattr(self, f.name) for f in fields(DetectorSettings)})

    # ------------------------------------------------------------------------ what is fitted

    @property
    def _is_from_scratch(self) -> bool:
        if _is_new(self.detector):
            return super()._is_from_scratch
        return self.weights is None and isinstance(self.detector, str)

    def _load_named(self) -> None:
        """Load the pretrained network that the parameters name, and remember their values."""
        is_new = _is_new(self._shape["detector"])
        names = ("backbone" if is_new else "detector", "weights")
        self._named = {name: getattr(self, name) for name in names}
        self._network = self._backbone() if is_new else None

    def _new_part(self) -> DetectorPart:
        """Return the detector of the fit, its new layers not trained."""
        assert self._named is not None
        options: dict[str, Any] = {
            "device": self.device,
            "moves_statistics": self._shape["is_from_scratch"],
            "seed": self._weights_seed,
        }
        n_classes, making = len(self.classes_), threading.Lock()
        # What is moved to a GPU in inference mode could not be trained.
        with making, ready_to_train(making):
            if self._network is None:
                return part_of_detector(self._shape, self._named["weights"], n_classes, **options)
            options["runtime"] = self.runtime
            return part_on_backbone(self._shape, self._network, n_classes, **options)

    def trainer(self) -> DetectorTrainer:
        """Return what was trained, where the parameters want it; for other parts of this library.

        It is rebuilt after unpickling, and where `device` or `runtime` has changed.
        """
        check_is_fitted(self, "_trainer")
        return self._trainer_in_place()

    def _wanted_place(self) -> tuple[Any, ...]:
        return resolve_device(self.device), self.runtime

    def _rebuilt(self) -> DetectorTrainer:
        """Return a new trainer with the trained values."""
        state = self._state if self._trainer is None else self._trainer.part.trained_state()
        if self._named is None:  # unpickled
            self._load_named()
        part = self._new_part()
        check_fingerprint(part.fingerprint, self._fingerprint, self._named or {})
        part.load_trained_state(state)
        trainer = DetectorTrainer(part, self._settings())
        trainer.history = self.history_
        return trainer

    def predictor(self) -> DetectorTrainer:
        """Return the trainer with the parameters as they now are, to predict with."""
        trainer = copy.copy(self.trainer())
        trainer.settings = self._settings()
        return trainer

    def __getstate__(self) -> dict[str, Any]:
        # Kept is what cannot be rebuilt: the trained layers, as NumPy arrays.
        state = super().__getstate__()
        if (trainer := state.get("_trainer")) is not None:
            state = {**state, "_trainer": None, "_state": trainer.part.trained_state()}
        if "_trainer" in state:
            state = {**state, "_network": None, "_named": None, "_place": None}
        state.pop("net_", None)
        return state


def _is_new(detector: Any) -> bool:
    """Tell whether a detector is a new one on a backbone, and none of torchvision's."""
    return isinstance(detector, str) and detector in NEW
