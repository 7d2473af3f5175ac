"""What classes look like, in words: prompts, and the sentences that templates make of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.exceptions import NotFittedError


def texts_of(texts: Any, what: str) -> list[str]:
    """Return one text or several as a list; an error for what is none."""
    listed = [texts] if isinstance(texts, str) else list(texts) if np.iterable(texts) else [texts]
    for text in listed:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{what} holds {text!r}: pass texts that say something.")
    if not listed:
        raise ValueError(f"{what} is empty: pass a text or more.")
    return [str(text) for text in listed]


def prompts_of(prompts: Any) -> dict[Any, list[str]]:
    """Return the prompts of each label."""
    if prompts is None:
        raise NotFittedError(
            "prompts=None takes the labels that fit gets: call fit(X, y), or pass prompts, such as "
            "{'cat': 'a cat', 'dog': ['a dog', 'a puppy']}."
        )
    if not isinstance(prompts, Mapping):
        names = texts_of(prompts, "prompts")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"prompts names {twice[0]!r} twice: name each class once.")
        return {name: [name] for name in names}
    kinds = {type(label) for label in prompts}
    if len(kinds) > 1:
        raise ValueError(f"The labels of prompts mix types: {list(prompts)[:5]!r}. Pass one type.")
    if not prompts:
        raise ValueError("prompts is empty: pass a prompt for each of two classes or more.")
    return {label: texts_of(of, f"prompts[{label!r}]") for label, of in prompts.items()}


def sentences_of(prompts: dict[Any, list[str]], templates: Any) -> dict[Any, list[str]]:
    """Put prompts into templates; an error if two classes are described by the same words."""
    frames = ["{}"] if templates is None else texts_of(templates, "templates")
    for frame in frames:
        if frame.count("{}") != 1:
            raise ValueError(
                f"templates holds {frame!r}, in which {{}} does not stand once: put it where the "
                "prompt goes."
            )
    described: dict[frozenset[str], Any] = {}
    for label, texts in prompts.items():
        other = described.setdefault(frozenset(texts), label)
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
