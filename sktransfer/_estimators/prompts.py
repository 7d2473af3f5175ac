"""What classes look like, in words: prompts, and the sentences that templates make of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.exceptions import NotFittedError

_ONCE = "it would count twice in their mean, so write it once"


def texts_of(texts: Any, what: str) -> list[str]:
    """Return one text or several as a list; an error for what is none."""
    listed = np.asarray(texts, dtype=object).tolist()
    listed = listed if isinstance(listed, list) else [listed]
    for text in listed:
        if not isinstance(text, str) or not text.strip() or not _is_unicode(text):
            raise ValueError(
                f"{what} holds {text!r}: pass a text that says something, or a list of such texts."
            )
    if not listed:
        raise ValueError(f"{what} is empty: pass a text or more.")
    return [str(text) for text in listed]


def _is_unicode(text: str) -> bool:
    """Tell whether a text can be written: halves of characters, of damaged files, can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def prompts_of(prompts: Any) -> dict[Any, list[str]]:
    """Return the prompts of each label."""
    if prompts is None:
        raise NotFittedError(
            "prompts=None takes the labels that fit gets: call fit(X, y), or pass prompts, such as "
            "{'cat': 'a cat', 'dog': ['a dog', 'a puppy']}."
        )
    if not isinstance(prompts, Mapping):
        names = texts_of(prompts, "prompts")
        _refuse_doubled(names, "prompts names", "name each class once")
        return {name: [name] for name in names}
    if not prompts:
        raise ValueError("prompts is empty: pass a prompt for each of two classes or more.")
    labels = [label.item() if isinstance(label, np.generic) else label for label in prompts]
    for label in labels:
        if not isinstance(label, (str, bool, int, float)) or label != label:
            raise ValueError(
                f"prompts has the label {label!r}: pass strings, numbers or booleans as labels."
            )
    if len({type(label) for label in labels}) > 1:
        raise ValueError(f"The labels of prompts mix types: {labels[:5]!r}. Pass one type.")
    named = zip(labels, prompts.values(), strict=True)
    listed = {label: texts_of(of, f"prompts[{label!r}]") for label, of in named}
    for label, texts in listed.items():
        _refuse_doubled(texts, f"prompts[{label!r}] holds", _ONCE)
    return listed


def _refuse_doubled(texts: list[str], what: str, remedy: str) -> None:
    """Raise an error if two texts are the same words."""
    seen: set[str] = set()
    for text in texts:
        if (words := _words(text)) in seen:
            raise ValueError(f"{what} {text!r} twice: {remedy}.")
        seen.add(words)


def _words(text: str) -> str:
    """Return a text without what no network could tell classes apart by: spaces and capitals."""
    return " ".join(text.split()).casefold()


def sentences_of(prompts: dict[Any, list[str]], templates: Any) -> dict[Any, list[str]]:
    """Put prompts into templates; an error if two classes are described by the same words."""
    frames = ["{}"] if templates is None else texts_of(templates, "templates")
    for frame in frames:
        if frame.count("{}") != 1:
            raise ValueError(
                f"templates holds {frame!r}, in which {{}} does not stand once: put it where the "
                "prompt goes."
            )
    _refuse_doubled(frames, "templates holds", _ONCE)
    described: dict[frozenset[str], Any] = {}
    for label, texts in prompts.items():
        other = described.setdefault(frozenset(map(_words, texts)), label)
        if other is not label:
            raise ValueError(
                f"The classes {other!r} and {label!r} have the same prompts, {texts}: say in what "
                "they differ."
            )
    return {
        label: [frame.replace("{}", text) for frame in frames for text in texts]
        for label, texts in prompts.items()
    }


def check_known(labels: np.ndarray | None, classes: np.ndarray) -> None:
    unknown = [] if labels is None else np.setdiff1d(labels, classes).tolist()
    if unknown:
        raise ValueError(
            f"y holds {unknown[:5]}, for which there is no prompt: prompts name {classes.tolist()}."
        )
