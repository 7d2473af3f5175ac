"""The half of CLIP's and SigLIP's networks that reads words, beside the one that sees images."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sktransfer._optional import load_optional
from sktransfer._threads import renewed_in_forks
from sktransfer._torch_state import call_seeded, float32_by_default, network_lock
from sktransfer.models._origins import Origin
from sktransfer.models._registry import file_of, is_known, origin_of, unknown_name
from sktransfer.models._state_files import file_stamp, read_state_dict
from sktransfer.models._transformers import load_part, silence

_PARTS = {"clip": "CLIPTextModelWithProjection", "siglip": "SiglipTextModel"}
_INPUTS = ("input_ids", "attention_mask")  # of the networks; tokenizers of others have more
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model")
_BATCH = 32  # texts at once
_SHOWN = 60  # letters of a text in an error
_SEED = 0  # of random weights
_MOST = 2**15  # texts whose rows are kept
# Tokenizers keep how they are to cut and pad, from one call to the next.
_tokenizing = renewed_in_forks(threading.Lock())
_loading = renewed_in_forks(threading.Lock())
_loaded: dict[Any, TextTower] = {}  # the last one


class TextTower:
    """Turns texts into rows that are compared with those of images.

    Parameters
    ----------
    network : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    scale, bias : float
        A cosine times `scale` plus `bias` is a logit.
    is_sigmoid : bool
        Whether the logits were trained one by one, rather than against each other.
    name : str
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        scale: float,
        bias: float,
        is_sigmoid: bool,
        name: str,
    ) -> None:
        self.network: Any = network.eval().requires_grad_(False)
        self.tokenizer, self.name = tokenizer, name
        self.scale, self.bias, self.is_sigmoid = scale, bias, is_sigmoid
        self.max_length = int(network.config.max_position_embeddings)
        self._rows: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Return rows of length 1, float32 (n, width); each text runs once in a process."""
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        if len(self._rows) + len(new) > _MOST:
            self._rows, new = {}, list(dict.fromkeys(texts))
        kept = self._rows
        for start in range(0, len(new), _BATCH):
            batch = new[start : start + _BATCH]
            kept |= dict(zip(batch, self._embed(batch), strict=True))
        return np.stack([kept[text] for text in texts])

    def _embed(self, texts: list[str]) -> np.ndarray:
        # SigLIP was trained on texts that are padded to their most; CLIP does not see the padding.
        padding = {"padding": "max_length", "max_length": self.max_length}
        tokens = self._tokenize(texts, **(padding if self.is_sigmoid else {"padding": True}))
        self._check_tokens(texts, tokens["input_ids"])
        # On the CPU: words are few, and run once.
        with network_lock.shared(), float32_by_default(), torch.inference_mode():
            result = self.network(**tokens)
            rows = result.pooler_output if self.is_sigmoid else result.text_embeds
            return torch.nn.functional.normalize(rows.float(), dim=1).numpy()

    def _tokenize(self, texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        """Return what the network gets of texts; an error if the tokenizer can't say it."""
        try:
            with _tokenizing:
                tokens = self.tokenizer(
                    texts, return_tensors="pt", truncation=False, verbose=False, **options
                )
            return {name: tokens[name] for name in _INPUTS if name in tokens}
        except Exception as error:  # of tokenizers almost anything
            raise ValueError(
                f"The tokenizer of {self.name!r} can't read {_shortened(texts[0])} "
                f"({type(error).__name__}: {error}). Take it and the network from one place."
            ) from error

    def _check_tokens(self, texts: list[str], ids: torch.Tensor) -> None:
        if ids.shape[1] > self.max_length:
            counts = [self._tokenize([text])["input_ids"].shape[1] for text in texts]
            longest = int(np.argmax(counts))
            raise ValueError(
                f"The prompt {_shortened(texts[longest])} has {counts[longest]} tokens, and "
                f"{self.name!r} takes {self.max_length}; nothing is cut off unasked: say it in "
                "fewer words."
            )
        n_known = self.network.get_input_embeddings().num_embeddings
        if int(ids.max()) >= n_known:
            raise ValueError(
                f"The tokenizer of {self.name!r} gives the token {int(ids.max())}, and its network "
                f"knows {n_known}: they do not belong together. Take both from one place."
            )


def _shortened(text: str) -> str:
    """Return a text as errors quote it."""
    if len(text) <= _SHOWN:
        return repr(text)
    return f"{text[: _SHOWN // 2]!r}...{text[-_SHOWN // 2 :]!r}, {len(text):,} letters,"


def reads_words(backbone: Any) -> bool:
    """Tell whether a network, named as for `get_model`, has a half that reads words."""
    origin = origin_of(backbone) if isinstance(backbone, str) else None
    return origin is not None and origin.config().get("model_type") in _PARTS


def load_text_tower(backbone: Any, weights: Any) -> TextTower:
    """Load what reads words of a network that is named as for `get_model`; the last one is kept.

    Raises
    ------
    TypeError, ValueError
        If it has none, or if its tokenizer does not fit.
    ImportError
        Without transformers; it names the extra.
    OSError
        For files that are not there.
    """
    origin = origin_of(backbone) if isinstance(backbone, str) else None
    if origin is None:
        if isinstance(backbone, str) and not is_known(backbone):
            raise unknown_name(backbone)
        what = repr(backbone) if isinstance(backbone, str) else f"a {type(backbone).__name__}"
        raise ValueError(
            f"ZeroShotClassifier needs a network that was trained on images and texts, got "
            f"backbone={what}. Pass a CLIP or SigLIP of transformers: a folder with its files, "
            "or a name such as 'hf:google/siglip2-base-patch16-224'."
        )
    load_optional("transformers", f"backbone={origin.name!r}", "'.[hub]'")
    path = file_of(weights, backbone)
    key = origin, origin.stamp(), file_stamp(path) if path else str(weights)
    if (loaded := _loaded.get(key)) is not None:  # without waiting for who loads another one
        return loaded
    with _loading:
        if key not in _loaded:
            tower = _load(origin, path or weights)
            _loaded.clear()
            _loaded[key] = tower
        return _loaded[key]


def _load(origin: Origin, weights: Any) -> TextTower:
    import transformers

    config = origin.config()
    kind = str(config.get("model_type"))
    if kind not in _PARTS:
        raise ValueError(
            f"backbone={origin.name!r} ({kind}) reads no words that belong to its images. Pass a "
            f"network of a model_type among {', '.join(_PARTS)}; SigLIP 2 of a fixed resolution is "
            "one of them."
        )
    settings = transformers.CONFIG_MAPPING[kind].from_dict(config)
    words: Any = settings.text_config
    words.projection_dim = getattr(settings, "projection_dim", None)
    cls = getattr(transformers, _PARTS[kind])
    source = weights
    if isinstance(weights, str):
        source = origin.weights(None if weights == "default" else weights)
    state = {} if source is None else read_state_dict(source)
    with silence():
        network = call_seeded(_SEED, lambda: load_part(origin, words, cls, state, "text"))
    initial = getattr(settings, "logit_scale_init_value", 0.0)
    scale = state.get("logit_scale", torch.tensor(initial)).float().exp()
    bias = state.get("logit_bias", torch.zeros(())).float()
    tokenizer = _load_tokenizer(origin)
    return TextTower(network, tokenizer, float(scale), float(bias), kind == "siglip", origin.name)


def _load_tokenizer(origin: Origin) -> Any:
    from transformers import AutoTokenizer

    if origin.first_of(_TOKENIZERS) is None:
        raise OSError(
            f"backbone={origin.name!r} has no tokenizer ({', '.join(_TOKENIZERS[:2])}) in "
            f"{origin.place!r}, so no words can be read. Copy its files from the model that it was "
            "trained from, into a folder with the others."
        )
    revision = {} if origin.is_folder else {"revision": origin.revision}
    try:
        with silence():
            return AutoTokenizer.from_pretrained(origin.place, trust_remote_code=False, **revision)
    except Exception as error:  # it has a dozen ways to say what is wrong
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ValueError(
            f"backbone={origin.name!r}: its tokenizer can't be read ({type(error).__name__}: "
            f"{first})."
        ) from error
