"""Language models: sentences to tokens, and tokens to pooled rows, through the memory."""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import xxhash

from sktransfer._engine.device import numerics
from sktransfer._engine.results import Names
from sktransfer._engine.runner import TORCH_VERSIONS, Runner
from sktransfer._engine.stream import Stream
from sktransfer._optional import load_optional
from sktransfer._threads import call_in_forks, renewed_in_forks
from sktransfer._torch_state import call_seeded, float32_by_default, network_lock
from sktransfer.models._hub import check_hub
from sktransfer.models._modules import copy_of
from sktransfer.models._transformers import silence
from sktransfer.models._weights import Describer

_VERSION = 1  # of the computation; a change that alters rows makes old entries unreachable
_BATCH = 32  # sentences in flight
_CPU_STEP = 4  # of them at once on a CPU
_BUCKET = 16  # tokens: sentences are padded to a multiple, so that a row depends on no other
# Tokenizers keep how they are to cut and pad, from one call to the next.
_tokenizing = renewed_in_forks(threading.Lock())
_SEED = 0  # of weights that a file lacks, such as those of the head that guesses words


class Sentences:
    """Texts that can be streamed; `check_sentences` makes it."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def digest(self, i: int) -> bytes:
        """Return 16 bytes that stand for the content of sentence `i`."""
        return xxhash.xxh3_128_digest(self.texts[i].encode("utf-8", "surrogatepass"))

    def where(self, i: int) -> str:
        """Return the row of sentence `i`."""
        return f"row {i}"


def check_sentences(X: Any) -> Sentences:
    """Check that `X` is a sequence of sentences.

    Parameters
    ----------
    X : sequence of str
        A list, array, Series or data frame of one column.

    Raises
    ------
    TypeError, ValueError
        Naming the row, what came and the remedy.

    Examples
    --------
    >>> from sktransfer._engine.text_model import check_sentences
    >>> len(check_sentences(["One sentence.", "And another."]))
    2
    """
    if isinstance(X, (str, bytes)):
        raise TypeError("Expected a sequence of sentences, got one text: pass [X].")
    if hasattr(X, "columns"):
        if X.shape[1] != 1:
            raise ValueError(f"Expected one column of sentences, got {X.shape[1]}: select one.")
        X = X[X.columns[0]]
    texts = np.asarray(X, dtype=object)
    texts = texts[:, 0] if texts.ndim == 2 and texts.shape[1] == 1 else texts
    if texts.ndim != 1:
        raise ValueError(
            f"Expected a sequence of sentences, got an array of shape {texts.shape}: pass one "
            "column of texts."
        )
    if len(texts) == 0:
        raise ValueError("Found array with 0 sample(s) while a minimum of 1 is required.")
    for row, text in enumerate(texts.tolist()):
        if not isinstance(text, str):
            raise TypeError(f"row {row} is of type {type(text).__name__}: pass texts, of type str.")
        if not text.strip():
            raise ValueError(f"row {row} is an empty sentence: drop it, or say what is missing.")
    return Sentences(texts.tolist())


class TextModel:
    """A masked language model with its tokenizer.

    Parameters
    ----------
    network : transformers.PreTrainedModel
        With a head that guesses words.
    tokenizer : transformers.PreTrainedTokenizerBase
    name : str
    """

    def __init__(self, network: Any, tokenizer: Any, name: str) -> None:
        _check_fit(network, tokenizer, name)
        self.network: Any = network.eval().requires_grad_(False)
        self.tokenizer, self.name = tokenizer, name
        config = network.config
        positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.max_length = int(min(positions, tokenizer.model_max_length))
        self.width = int(config.hidden_size)
        self.n_words = int(network.get_input_embeddings().num_embeddings)
        self.special = np.array(sorted(tokenizer.all_special_ids))

    def tokens(self, text: str, where: str, max_length: int | None, truncation: bool) -> np.ndarray:
        """Return the numbers of a sentence's tokens, those that mark its ends included."""
        most = min(max_length or self.max_length, self.max_length)
        with _tokenizing:
            ids = self.tokenizer(text, truncation=truncation, max_length=most, verbose=False)
        ids = np.array(ids["input_ids"], np.int64)
        if len(ids) > most:
            raise ValueError(
                f"{where} has {len(ids)} tokens, and {self.name!r} takes {most} of a sentence: "
                "split it, or pass truncation=True to cut its end off."
            )
        if np.isin(ids, self.special).all():
            raise ValueError(
                f"{where} has no word that {self.name!r} knows: {text[:40]!r}. Drop it, or pass "
                "the tokenizer that belongs to its language."
            )
        return ids

    def padded(self, sentences: Sequence[np.ndarray], length: int) -> dict[str, torch.Tensor]:
        """Return a batch as the network takes it, padded to `length` tokens."""
        ids = np.full((len(sentences), length), self.tokenizer.pad_token_id, np.int64)
        mask = np.zeros((len(sentences), length), np.int64)
        for row, sentence in enumerate(sentences):
            ids[row, : len(sentence)], mask[row, : len(sentence)] = sentence, 1
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def _tokenizing_rules(tokenizer: Any) -> list[Any]:
    """Return all by which a tokenizer turns a sentence into numbers."""
    words = sorted(tokenizer.get_vocab().items())  # it comes in any order
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = {} if fast is None else json.loads(fast.to_str())
    # Words are there already; how it last cut and padded is told anew by every call.
    known = ("model", "truncation", "padding")
    return [type(tokenizer), words, {k: v for k, v in rules.items() if k not in known}]


def _check_fit(network: Any, tokenizer: Any, name: str) -> None:
    n_known = network.get_input_embeddings().num_embeddings
    if len(tokenizer) > n_known:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, but {name!r} knows {n_known}: it does not "
            "belong to this model. Pass the one that was saved with it, or leave tokenizer=None."
        )
    lacking = [kind for kind in ("mask", "pad") if getattr(tokenizer, f"{kind}_token_id") is None]
    if lacking:
        raise ValueError(
            f"The tokenizer of {name!r} has no {' and no '.join(lacking)} token, so no word can be "
            "masked: pass a masked language model, such as BERT's relatives, and its tokenizer."
        )


@functools.lru_cache(maxsize=2)
def load_text_model(model: str, tokenizer: str | None) -> TextModel:
    """Load a model by its name on the hub, or from a folder; the same object for the same names.

    Raises
    ------
    ImportError
        Without transformers; it names the extra.
    OSError
        If there is no such model, or no connection.
    ValueError
        If the tokenizer does not fit.
    """
    load_optional("transformers", "MaskedLanguagePretrainer", "'.[text]'")
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    try:
        if not os.path.exists(model):
            check_hub(model)
        if tokenizer is not None and not os.path.exists(tokenizer):
            check_hub(tokenizer, (".json", ".txt", ".model"))
        with silence():
            words = AutoTokenizer.from_pretrained(tokenizer or model, trust_remote_code=False)
            network = call_seeded(
                _SEED,
                lambda: AutoModelForMaskedLM.from_pretrained(model, trust_remote_code=False),
            )
    except Exception as error:  # it has a dozen ways to say what is missing
        raise OSError(
            f"backbone={model!r}, tokenizer={tokenizer!r} could not be loaded "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]}). Pass a folder with "
            "the model's config.json, its weights and its tokenizer, or a name of the hub on a "
            "connected machine."
        ) from error
    return TextModel(network.float(), words, os.path.basename(os.path.normpath(model)))


# ------------------------------------------------------------------------------ embeddings


_copies: WeakKeyDictionary[Any, dict[torch.device, Any]] = WeakKeyDictionary()
_copying = renewed_in_forks(threading.Lock())
call_in_forks(_copies.clear)  # no child can use its parent's GPUs


def placed(network: Any, device: torch.device) -> Any:
    """Return a network on a device: on a GPU its one copy, as others may run it on a CPU."""
    if device.type == "cpu":
        return network
    with _copying, torch.inference_mode(False):
        copies = _copies.setdefault(network, {})
        if device not in copies:
            copies[device] = copy_of(network).to(device)
        return copies[device]


class TextRunner:
    """A language model on a device, as a `Stream` wants it.

    Parameters
    ----------
    model : TextModel
    network : nn.Module
        The model's own, or a trained copy.
    device : torch.device
    """

    in_smaller_steps = Runner.in_smaller_steps

    def __init__(self, model: TextModel, network: Any, device: torch.device) -> None:
        self.model, self.name, self.device = model, model.name, device
        self.network = placed(network, device)

    def batch_size(self, given: int | str, _: Any) -> int:
        """Return the sentences in flight."""
        return _BATCH if isinstance(given, str) else given

    def step(self, given: int | str, _: Any) -> int:
        """Return how many sentences run at once."""
        return _CPU_STEP if self.device.type == "cpu" else self.batch_size(given, None)

    def key(self, *settings: Any) -> str:
        """Name all that shapes a row but the sentence."""
        state = {name: value.cpu() for name, value in self.network.state_dict().items()}
        # Their code as well: it is that of an installed package.
        kinds = {type(module).__qualname__: type(module) for module in self.network.modules()}
        described = Describer()([state, kinds, _tokenizing_rules(self.model.tokenizer)])
        difference = numerics(self.device, "float32")
        config = self.network.config.to_json_string()
        parts = (_VERSION, *TORCH_VERSIONS, config, described, difference, *settings)
        return f"{self.name}-{xxhash.xxh3_128_hexdigest(repr(parts).encode())}"

    def rows(self, sentences: Sequence[np.ndarray], step: int, pooling: str) -> np.ndarray:
        """Return pooled rows, float32 (n, width); a row does not depend on the others."""
        rows = np.empty((len(sentences), self.model.width), np.float32)
        lengths = np.array([-(-len(ids) // _BUCKET) * _BUCKET for ids in sentences])
        lengths = np.minimum(lengths, self.model.max_length)
        for length in np.unique(lengths):
            numbers = np.flatnonzero(lengths == length)
            for first in range(0, len(numbers), step):
                batch = numbers[first : first + step]
                ids = [sentences[i] for i in batch]
                ids += ids[:1] * (step - len(batch))
                rows[batch] = self._pooled(ids, int(length), pooling)[: len(batch)]
        return rows

    def _pooled(self, ids: Sequence[np.ndarray], length: int, pooling: str) -> np.ndarray:
        batch = {k: v.to(self.device) for k, v in self.model.padded(ids, length).items()}
        with network_lock.shared(), float32_by_default(), torch.inference_mode():
            x = self.network.base_model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][:, :, None].bool()  # (n, t, 1)
            if pooling == "token":
                x = x[:, 0]
            elif pooling == "max":
                x = x.masked_fill(~mask, -torch.inf).amax(1)
            else:
                x = (x * mask).sum(1) / mask.sum(1)
        return x.cpu().numpy()  # (n, width)


class TextEmbedding(Stream):
    """One pass over sentences to their rows.

    Parameters
    ----------
    runner : TextRunner
    pooling : {"avg", "max", "token"}
    max_length : int or None
    truncation : bool
    **options
        See `Stream`.
    """

    unit = "sentence"
    runner: Any

    def __init__(
        self,
        runner: Any,
        pooling: str,
        max_length: int | None,
        truncation: bool,
        **options: Any,
    ) -> None:
        super().__init__(runner, (0, 0), **options)
        self.pool, self.model = runner.rows, runner.model
        self.pooling, self.max_length, self.truncation = pooling, max_length, truncation

    def __call__(self, sentences: Sentences) -> np.ndarray:
        """Return the rows of sentences, float32 (n, width)."""
        images: Any = sentences  # they are asked for their digests alone
        rows = np.empty((len(sentences), self.model.width), np.float32)
        self._texts = sentences.texts
        self._fill_outs(images, [rows])
        return rows

    def names(self) -> Names:
        """Name the rows."""
        key = self.runner.key(self.pooling, self.max_length, self.truncation)
        return Names([key], [], {key}, key)

    def _load(self, row: int, digest: bytes | None) -> np.ndarray:
        text = self._texts[row]
        return self.model.tokens(text, f"row {row}", self.max_length, self.truncation)

    def _run(self, loaded: list[Any]) -> list[Any]:
        return [self.pool(loaded, self.step, self.pooling)]
