"""What a detector has learnt: how it comes about, is kept, and is rebuilt where it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Self

import numpy as np
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from sktransfer._estimators.base import ImageEstimator
from sktransfer._threads import n_threads
from sktransfer._training.detector_networks import NEW
from sktransfer._training.detector_part import DetectorPart, part_of_detector, part_on_backbone
from sktransfer._training.detector_trainer import DetectorSettings, DetectorTrainer
from sktransfer._training.net import Interrupted
from sktransfer.io._boxes import check_inside, check_objects, encode, find_classes, image_sizes

_SHAPE = ("detector", "unfreeze", "width", "image_size")  # of what a fit trains
_PLACE = ("backbone", "weights", "device", "runtime")  # of what is frozen, and where it runs


class TrainedDetector(ImageEstimator):
    """Base of the detector: all but its parameters, and what its methods mean."""

    classes_: np.ndarray
    warm_start: bool
    n_jobs: int | None
    random_state: Any
    _trainer: DetectorTrainer | None
    _shape: dict[str, Any]
    _place: dict[str, Any]
    _state: dict[str, np.ndarray]

    # ------------------------------------------------------------------------ fitting

    def _fit(self, X: Any, y: Any, *, in_parts: bool) -> Self:
        if y is None:
            raise ValueError(
                f"This {type(self).__name__} estimator requires y to be passed, but the target y "
                "is None."
            )
        stopped: Interrupted | None = None
        with _unchanged_on_failure(self):
            goes_on = (in_parts or self.warm_start) and hasattr(self, "_trainer")
            images = self._check_images(X, reset=not goes_on)
            objects = check_objects(y, len(images))
            classes = self.classes_ if goes_on else find_classes(objects)
            numbers = encode(objects, classes)
            sizes = image_sizes(images, n_threads(self.n_jobs))
            objects = check_inside(objects, sizes)
            seed = check_random_state(self.random_state).randint(2**31 - 1)
            trainer = self.trainer() if goes_on else self._new_trainer(classes, seed)
            learn = trainer.train_part if in_parts else trainer.train
            try:
                learn(images, objects, numbers, sizes, seed)
            except Interrupted as error:
                stopped = error
            self._keep(trainer)
        if stopped is not None:
            raise KeyboardInterrupt(
                f"fit was interrupted after {self.n_iter_} epochs, whose detector is kept."
            ) from None
        return self

    def _new_trainer(self, classes: np.ndarray, seed: int) -> DetectorTrainer:
        """Return the trainer of a new fit."""
        self.classes_, self._seed, self._weights_seed = classes, seed, seed
        self._shape = {name: getattr(self, name) for name in _SHAPE}
        return DetectorTrainer(self._new_part(), self._settings())

    def _keep(self, trainer: DetectorTrainer) -> None:
        """Set the fitted attributes."""
        part = trainer.part
        self._trainer = trainer
        self._place = {name: getattr(self, name) for name in _PLACE}
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

    def _new_part(self) -> DetectorPart:
        """Return the detector that the parameters name, its new layers not trained."""
        n_classes, place = len(self.classes_), {"device": self.device, "seed": self._seed}
        detector = self._shape["detector"]
        if not (isinstance(detector, str) and detector in NEW):
            return part_of_detector(self._shape, self.weights, n_classes, **place)
        return part_on_backbone(
            self._shape,
            self._backbone(),
            n_classes,
            runtime=self.runtime,
            # A network of the user's own has its weights, and weights=None then says nothing.
            moves_statistics=isinstance(self.backbone, str) and self.weights is None,
            **place,
        )

    def trainer(self) -> DetectorTrainer:
        """Return what is fitted, with the parameters as they now are; rebuilt after unpickling."""
        check_is_fitted(self, "_trainer")
        for name, fitted in self._shape.items():
            if _differs(value := getattr(self, name), fitted):
                raise ValueError(
                    f"{name} has changed from {fitted!r} to {value!r} since the first fit, whose "
                    "layers depend on it. Set it back, or fit a new estimator, as "
                    "sklearn.base.clone makes it."
                )
        trainer = self._trainer
        place = {name: getattr(self, name) for name in _PLACE}
        if trainer is None or any(_differs(place[name], self._place[name]) for name in _PLACE):
            state = self._state if trainer is None else trainer.part.trained_state()
            trainer = self._rebuilt(state)
            self._trainer, self._place = trainer, place
            self.__dict__.pop("net_", None)  # of layers that are no longer these
        trainer.settings = self._settings()
        return trainer

    def _rebuilt(self, state: dict[str, np.ndarray]) -> DetectorTrainer:
        """Return a trainer, its frozen layers loaded anew, with trained values as they were."""
        part = self._new_part()
        if part.fingerprint != self._fingerprint:
            raise ValueError(
                f"The weights that detector={self.detector!r}, backbone={self.backbone!r} and "
                f"weights={self.weights!r} name are not those on which this estimator was "
                f"fitted (fingerprint {part.fingerprint[:8]}, then {self._fingerprint[:8]}). "
                "Pass the old ones by set_params(weights='path/to/file.pth'), or fit it again."
            )
        part.load_trained_state(state)
        trainer = DetectorTrainer(part, self._settings())
        trainer.history = self.history_
        return trainer

    def __getstate__(self) -> dict[str, Any]:
        # Kept is what cannot be rebuilt: the trained layers, as NumPy arrays.
        state = super().__getstate__()
        if (trainer := state.get("_trainer")) is not None:
            state = {**state, "_trainer": None, "_state": trainer.part.trained_state()}
        for name in ("net_", "_place"):
            state.pop(name, None)
        return state

    def _prepare(self) -> None:
        self.trainer()


def _differs(value: Any, fitted: Any) -> bool:
    """Tell whether a parameter is another one than it was."""
    return value is not fitted and bool(value != fitted)


@contextmanager
def _unchanged_on_failure(estimator: Any) -> Iterator[None]:
    """Give an estimator the attributes back that it had, if what is done in the block fails."""
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise
