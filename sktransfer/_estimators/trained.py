"""What all estimators share that train blocks of a network: going on, copies, the result."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from sklearn.utils.validation import check_is_fitted

from sktransfer._estimators.base import ImageEstimator, Interval, StrOptions
from sktransfer._estimators.pretrained import PretrainedFeatureExtractor
from sktransfer._training.net import Interrupted
from sktransfer._training.settings import Settings
from sktransfer._training.trainer import Trainer
from sktransfer.io import ImageSequence
from sktransfer.models import Backbone

_SHAPE = ("unfreeze", "head", "pooling", "image_size", "precision")  # of what a fit trains


class TrainedEstimator(ImageEstimator):
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
        "precision": [StrOptions({"float32", "bfloat16"})],
        "random_state": ["random_state"],
    }

    _trainer_class: ClassVar[type[Trainer]] = Trainer
    _settings_class: ClassVar[type[Settings]] = Settings
    _prefix = "fine-tuned"  # of the resulting network's name
    _kind: str
    _trainer: Trainer | None
    _shape: dict[str, Any]

    # ------------------------------------------------------------------------ fitting

    def _keep_shape(self, seed: int) -> None:
        """Remember what a new fit trains, whatever is set later, and the seed of random weights."""
        self._shape = {name: getattr(self, name) for name in _SHAPE}
        self._weights_seed = seed

    def _settings(self, n_outputs: int) -> Settings:
        parameters = self.get_params(deep=False)
        names = [n for n in self._settings_class.taken_from_parameters() if n in parameters]
        values = {name: self._shape.get(name, parameters[name]) for name in names}
        return self._settings_class(kind=self._kind, n_outputs=n_outputs, **values)

    def _new_trainer(self, n_outputs: int) -> Trainer:
        runner, preprocessing = self._load()
        return self._trainer_class(runner, preprocessing, self._settings(n_outputs))

    def _resume(self) -> Trainer:
        """Return the trainer as it stands, with the parameters as they now are."""
        for name, fitted in self._shape.items():
            if (value := getattr(self, name)) is not fitted and value != fitted:
                raise ValueError(
                    f"{name} has changed from {fitted!r} to {value!r} since the first fit, with "
                    "which warm_start and partial_fit go on. Set it back, or fit a new estimator, "
                    "as sklearn.base.clone makes it."
                )
        trainer = self._trained
        trainer.settings = self._settings(trainer.settings.n_outputs)
        return trainer

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
    ) -> None:
        """Train, and take what was learnt until Ctrl-C, if it comes."""
        stopped: Interrupted | None = None
        try:
            if in_parts:
                trainer.train_part(images, targets, weights, seed)
            else:
                trainer.train(images, targets, weights, seed, goes_on=goes_on)
        except Interrupted as error:
            stopped = error
        self._take(trainer)
        if stopped is not None:
            raise KeyboardInterrupt(str(stopped)) from None

    def _take(self, trainer: Trainer) -> None:
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

    @property
    def _trained(self) -> Trainer:
        """The trainer; rebuilt after unpickling."""
        check_is_fitted(self, "plan_")
        if self._trainer is None:
            shape = {name: self._shape[name] for name in ("precision", "image_size")}
            runner, preprocessing = self._load(**shape)
            if runner.fingerprint != self._fingerprint:
                raise ValueError(
                    f"The weights that backbone={self.backbone!r}, weights={self.weights!r} name "
                    "are not those on which this estimator was fitted (fingerprint "
                    f"{runner.fingerprint[:8]}, then {self._fingerprint[:8]}), and its trained "
                    "blocks do not fit to others. Pass the old weights by "
                    "set_params(weights='path/to/file.pth'), or fit it again."
                )
            settings = self._settings(self._n_outputs)
            trainer = self._trainer_class(runner, preprocessing, settings)
            trainer.restore(self._state, self.history_, self.plan_, self._n_left)
            self._trainer = trainer
        return self._trainer

    @property
    def net_(self) -> Any:
        """The skorch net, whose module is what follows the cut."""
        return self._trained.net

    def __getstate__(self) -> dict[str, Any]:
        # Kept is what cannot be rebuilt: the trained blocks and the head, as NumPy arrays. The
        # frozen rest is loaded again, and checked, when it is needed.
        state = super().__getstate__()
        if state.get("_trainer") is not None:
            trainer = state["_trainer"]
            state = {
                **state,
                "_trainer": None,
                "_state": trainer.state(),
                "_n_outputs": trainer.settings.n_outputs,
                "_n_left": trainer.n_left,
            }
        return state

    def _prepare(self) -> None:
        self._trained  # noqa: B018 restores it

    def to_backbone(self) -> Backbone:
        """Return the trained network, without the new head, as other estimators take it.

        An estimator that gets this one as its `backbone` does this by itself.

        Returns
        -------
        Backbone
            A copy, with the preprocessing of the training: its image size included.
        """
        return self._trained.backbone(self._prefix)

    def to_feature_extractor(self) -> PretrainedFeatureExtractor:
        """Return a transformer whose embeddings are those of the trained network.

        Returns
        -------
        PretrainedFeatureExtractor
            On a copy of the network, with the parameters that both have.
        """
        backbone = self.to_backbone()  # or an error, if nothing is fitted
        shared = PretrainedFeatureExtractor().get_params().keys() & self.get_params().keys()
        parameters = {name: getattr(self, name) for name in shared - {"weights"}}
        parameters |= {name: self._shape[name] for name in shared & self._shape.keys()}
        parameters["backbone"] = backbone
        if not self._trained.frozen.runner.can_be_cut:  # all of it is its embedding
            parameters["layer"] = "output"
        return PretrainedFeatureExtractor(**parameters)
