"""What all estimators share that train blocks of a network: going on, copies, the result."""

from __future__ import annotations

import copy
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from sklearn.utils.validation import check_is_fitted

from sktransfer._engine.device import resolve_device
from sktransfer._estimators.base import (
    ImageEstimator,
    Interval,
    KeepsTrainer,
    StrOptions,
    check_fingerprint,
    interrupted_refit,
)
from sktransfer._estimators.pretrained import PretrainedFeatureExtractor
from sktransfer._training.interrupt import Interrupted
from sktransfer._training.settings import Settings
from sktransfer._training.trainer import Trainer
from sktransfer.io import ImageSequence
from sktransfer.models import Backbone

# What a fit trains: a later change counts for one that starts anew.
_SHAPE = ("unfreeze", "head", "layer", "pooling", "dropout", "head_epochs", "image_size")


class TrainedEstimator(KeepsTrainer):
    """Base of the estimators that train blocks behind a cut, by a `Trainer`."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        **ImageEstimator._parameter_constraints,
        "unfreeze": [Integral, str, list, tuple],
        "max_epochs": [Interval(Integral, 0, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="left")],
        "head_lr": [Interval(Real, 0, None, closed="left"), None],
        "lr_decay": [Interval(Real, 0, 1, closed="right")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "callbacks": [list, tuple, None],
        "warm_start": ["boolean"],
        "precision": [StrOptions({"auto", "float32", "bfloat16"})],
        "random_state": ["random_state"],
    }

    _trainer_class: ClassVar[type[Trainer]] = Trainer
    _settings_class: ClassVar[type[Settings]] = Settings
    _prefix = "fine-tuned"  # of the resulting network's name
    _kind: str
    # A fit sets the following. A pickle leaves out those that can be None.
    _trainer: Trainer | None

    # ------------------------------------------------------------------------ fitting

    def _keep_shape(self, seed: int) -> None:
        """Remember what a new fit trains, whatever is set later, and the seed of random weights."""
        parameters = self.get_params(deep=False)
        self._shape = {name: parameters[name] for name in _SHAPE if name in parameters}
        self._shape["is_from_scratch"] = self._is_from_scratch
        self._weights_seed = seed

    def _settings(self, n_outputs: int) -> Settings:
        """Return the parameters as they are, but for the shape, which is that of the fit."""
        parameters = self.get_params(deep=False) | self._shape
        names = self._settings_class.taken_from_parameters()
        values = {name: parameters[name] for name in names if name in parameters}
        return self._settings_class(kind=self._kind, n_outputs=n_outputs, **values)

    def _new_trainer(self, n_outputs: int) -> Trainer:
        self._network = self._backbone()
        self._named = {"backbone": self.backbone, "weights": self.weights}
        self._place = self._wanted_place()
        placed = self._placed(self._network, self.image_size)
        return self._trainer_class(*placed, self._settings(n_outputs))

    def _resume(self, *, in_parts: bool) -> Trainer:
        """Return a trainer that goes on from what is fitted, by the parameters as they now are.

        It is another one, with copies of the trained values: nobody sees what it learns before the
        fit ends, and nothing has to be undone if it fails.
        """
        self._check_shape()
        trainer = self.trainer()
        settings = self._settings(trainer.settings.n_outputs)
        return trainer.continued(settings, keeps_net=in_parts or trainer.n_left > 0)

    def _named_fingerprint(self) -> str:
        return self._backbone().fingerprint

    def _train(
        self,
        trainer: Trainer,
        images: ImageSequence,
        targets: np.ndarray,
        weights: np.ndarray | None,
        seed: int,
        *,
        in_parts: bool,
        goes_on: bool,
        groups: np.ndarray | None = None,
    ) -> None:
        """Train, and set the fitted attributes; on Ctrl-C, of what was learnt until then."""
        is_refit = hasattr(self, "_trainer") and not goes_on
        try:
            if in_parts:
                trainer.train_part(images, targets, weights, seed)
            else:
                trainer.train(images, targets, weights, seed, goes_on=goes_on, groups=groups)
        except Interrupted:
            if is_refit:
                raise interrupted_refit() from None
            self._set_fitted(trainer)
            raise
        self._set_fitted(trainer)

    def _set_fitted(self, trainer: Trainer) -> None:
        """Set the fitted attributes."""
        self._trainer = trainer
        self._fingerprint = trainer.frozen.runner.fingerprint
        self.block_names_ = trainer.frozen.runner.block_names
        self.unfrozen_block_names_ = [self.block_names_[i] for i in trainer.unfrozen_blocks]
        self.n_trainable_parameters_ = trainer.n_trainable_parameters
        self.history_ = trainer.history()
        self.n_iter_ = len(self.history_)
        self.plan_ = trainer.plan

    # ------------------------------------------------------------------------ what is fitted

    def trainer(self) -> Trainer:
        """Return what was trained, where the parameters want it; for other parts of this library.

        It is rebuilt after unpickling, and where `device`, `precision` or `runtime` has changed.
        """
        check_is_fitted(self, "plan_")
        return self._trainer_in_place()

    def _wanted_place(self) -> tuple[Any, ...]:
        return resolve_device(self.device), self.precision, self.runtime

    def _rebuilt(self) -> Trainer:
        """Return a new trainer with the trained values."""
        state = self.__dict__ if self._trainer is None else _kept(self._trainer)
        placed = self._placed(self._fitted_network(), self._shape["image_size"])
        trainer = self._trainer_class(*placed, self._settings(state["_n_outputs"]))
        trainer.restore(state["_state"], self.history_, self.plan_, state["_n_left"])
        return trainer

    def _fitted_network(self) -> Backbone:
        """Return the network of the fit; after unpickling, the one that the parameters name."""
        if self._network is None:
            network = self._backbone()
            named = {"backbone": self.backbone, "weights": self.weights}
            check_fingerprint(network.fingerprint, self._fingerprint, named)
            self._network, self._named = network, named
        return self._network

    def predictor(self) -> Trainer:
        """Return the trainer with the parameters as they now are, to predict with.

        It is a copy, so that several threads can predict, and a training goes on as it was.
        """
        trainer = copy.copy(self.trainer())
        trainer.settings = self._settings(trainer.settings.n_outputs)
        return trainer

    @property
    def net_(self) -> Any:
        """The skorch net, whose module is what follows the cut."""
        return self.trainer().net

    def __getstate__(self) -> dict[str, Any]:
        # Kept is what cannot be rebuilt: the trained blocks and the head, as NumPy arrays. The
        # frozen rest is loaded again, and checked, when it is needed.
        state = super().__getstate__()
        if state.get("_trainer") is not None:
            state = {**state, **_kept(state["_trainer"]), "_trainer": None}
        if "_trainer" in state:
            state = {**state, "_network": None, "_named": None, "_place": None}
        return state

    def to_backbone(self) -> Backbone:
        """Return the trained network, without the new head, as other estimators take it.

        An estimator that gets this one as its `backbone` does this by itself.

        Returns
        -------
        Backbone
            A copy, with the preprocessing of the training: its image size included.
        """
        return self.trainer().backbone(self._prefix)

    def to_feature_extractor(self) -> PretrainedFeatureExtractor:
        """Return a transformer whose embeddings are those of the trained network.

        Returns
        -------
        PretrainedFeatureExtractor
            On a copy of the network, with the parameters that both have, but for `augment` and
            `n_views`: one view an image.
        """
        backbone = self.to_backbone()  # or an error, if nothing is fitted
        shared = PretrainedFeatureExtractor().get_params().keys() & self.get_params().keys()
        of_training = {"weights", "augment", "n_views"}  # the extractor's are other views
        parameters = {name: getattr(self, name) for name in shared - of_training}
        parameters |= {name: self._shape[name] for name in shared & self._shape.keys()}
        parameters["backbone"] = backbone
        if not self.trainer().frozen.runner.can_be_cut:  # all of it is its embedding
            parameters["layer"] = "output"
        return PretrainedFeatureExtractor(**parameters)


def _kept(trainer: Trainer) -> dict[str, Any]:
    """Return what a trainer can be rebuilt from, by the names that an estimator gives it."""
    return {
        "_state": trainer.state(),
        "_n_outputs": trainer.settings.n_outputs,
        "_n_left": trainer.n_left,
    }
