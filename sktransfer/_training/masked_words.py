"""Masked words: what is hidden in a sentence, and the net that learns to guess it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import skorch
import torch
from skorch.callbacks import PassthroughScoring
from skorch.utils import to_tensor
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from sktransfer._engine.text_model import TextModel, placed
from sktransfer._torch_state import float32_by_default, network_lock
from sktransfer._training.net import DrawingSteps

_HIDDEN = 0.8  # of the chosen tokens; a half of the others is replaced, the other half left
_SCORED = 16  # sentences of a batch that is scored
_IGNORED = -100  # torch's number for a target that does not count


def mask_tokens(
    ids: np.ndarray,
    model: TextModel,
    probability: float,
    random: np.random.Generator,
    *,
    hides_all: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose tokens of a sentence, at least one, and hide them.

    Of those chosen, 80 % are replaced by the mask token, 10 % by a random one, and 10 % stay, so
    that the model can't rely on what it sees; with `hides_all`, all are replaced by the mask token.

    Parameters
    ----------
    ids : ndarray of int, shape (t,)
    model : TextModel
    probability : float in (0, 1)
        Of each token that is a part of a word.
    random : numpy.random.Generator
    hides_all : bool, default=False

    Returns
    -------
    hidden, targets : ndarray of int, shape (t,)
        What the network sees, and what it is to say there: -100 where nothing was chosen.

    References
    ----------
    Devlin, Chang, Lee and Toutanova, "BERT: pre-training of deep bidirectional transformers for
    language understanding" (2019), section 3.1.
    """
    words = np.flatnonzero(~np.isin(ids, model.special))
    chosen = words[random.random(len(words)) < probability]
    if len(chosen) == 0:
        chosen = words[[random.integers(len(words))]]
    hidden, targets = ids.copy(), np.full_like(ids, _IGNORED)
    targets[chosen] = ids[chosen]
    fate = np.zeros(len(chosen)) if hides_all else random.random(len(chosen))
    hidden[chosen[fate < _HIDDEN]] = model.tokenizer.mask_token_id
    swapped = chosen[(fate >= _HIDDEN) & (fate < (1 + _HIDDEN) / 2)]
    hidden[swapped] = random.integers(model.n_words, size=len(swapped))
    return hidden, targets


class MaskedData(Dataset):
    """Batches of sentences, other words hidden in each epoch.

    Parameters
    ----------
    model : TextModel
    sentences : list of ndarray of int
        Their tokens.
    probability : float
    seed : int
    hides_all : bool, default=False
    """

    def __init__(
        self,
        model: TextModel,
        sentences: Sequence[np.ndarray],
        probability: float,
        seed: int,
        *,
        hides_all: bool = False,
    ) -> None:
        self.model, self.sentences, self.probability = model, sentences, probability
        self.seed, self.hides_all, self.epoch = seed, hides_all, 0

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitems__(self, numbers: Sequence[int]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return a batch (X, y), padded to its longest sentence; X says which words are hidden."""
        pairs = [self._masked(number) for number in numbers]
        length = max(len(hidden) for hidden, _ in pairs)
        targets = np.full((len(pairs), length), _IGNORED)  # (n, t)
        for row, (_, target) in enumerate(pairs):
            targets[row, : len(target)] = target
        y = torch.from_numpy(targets)
        X = self.model.padded([hidden for hidden, _ in pairs], length)
        return {**X, "is_hidden": y != _IGNORED}, y

    def __getitem__(self, number: int) -> Any:
        X, y = self.__getitems__([number])
        return {name: values[0] for name, values in X.items()}, y[0]

    def _masked(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng([self.seed, self.epoch, number])
        ids = self.sentences[number]
        return mask_tokens(ids, self.model, self.probability, random, hides_all=self.hides_all)


class WordGuesser(nn.Module):
    """A masked language model as skorch calls it.

    Parameters
    ----------
    network : transformers.PreTrainedModel
        All of it is trained.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(True)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, is_hidden: torch.Tensor
    ) -> torch.Tensor:
        """Return a logit for each word that may stand in place of a hidden one, (k, n_words)."""
        with network_lock.shared(), float32_by_default():
            return hidden_logits(self.network, is_hidden, input_ids, attention_mask)


class MaskedNet(DrawingSteps, skorch.NeuralNet):
    """A skorch net whose loss is that of the hidden words alone."""

    def get_loss(
        self, y_pred: torch.Tensor, y_true: torch.Tensor, X: Any = None, training: bool = False
    ) -> torch.Tensor:
        """Return the mean cross-entropy of the hidden words."""
        targets = to_tensor(y_true[y_true != _IGNORED], device=self.device)
        accuracy = (y_pred.argmax(1) == targets).float().mean().item()
        self.history.record_batch("masked_accuracy", accuracy)
        return F.cross_entropy(y_pred, targets)


def hidden_logits(
    network: Any, is_hidden: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Return the logits of the hidden words; the last layer, the largest, sees no others.

    Parameters
    ----------
    network : transformers.PreTrainedModel
        A masked language model.
    is_hidden : tensor of bool, shape (n, t)
    input_ids, attention_mask : tensor of int, shape (n, t)

    Returns
    -------
    tensor of shape (k, n_words), float32
        Of k hidden words, sentence by sentence.
    """

    asking = threading.get_ident()  # other threads may run the same network

    def only_hidden(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if threading.get_ident() != asking:
            return args
        return (args[0][is_hidden], *args[1:]) if args[0].ndim == 3 else args

    hook = network.get_output_embeddings().register_forward_pre_hook(only_hidden)
    try:
        logits = network(input_ids=input_ids, attention_mask=attention_mask).logits.float()
    finally:
        hook.remove()
    return logits if logits.ndim == 2 else logits[is_hidden]


def accuracy_scoring() -> tuple[str, PassthroughScoring]:
    """Return the callback that brings the accuracy of batches into the history of epochs."""
    scoring = PassthroughScoring("masked_accuracy", lower_is_better=False, on_train=True)
    return "masked_accuracy", scoring


def score_guesses(network: Any, data: MaskedData, device: torch.device) -> tuple[float, float]:
    """Return the share of hidden words that are guessed, and their mean cross-entropy."""
    network = placed(network, device)
    n_right, loss, n = 0, 0.0, 0
    for start in range(0, len(data), _SCORED):
        batch, y = data.__getitems__(range(start, min(start + _SCORED, len(data))))
        targets = y[batch["is_hidden"]]
        with network_lock.shared(), float32_by_default(), torch.inference_mode():
            moved = {name: value.to(device) for name, value in batch.items()}
            logits = hidden_logits(network, **moved).cpu()
            n_right += int((logits.argmax(1) == targets).sum())
            loss += F.cross_entropy(logits, targets, reduction="sum").item()
            n += len(targets)
    return n_right / n, loss / n
