"""Labels in any container come back as scikit-learn's classifiers give them."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
from networks import small
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression

from sktransfer import FineTunedClassifier
from sktransfer.model_selection import rank_backbones
from sktransfer.models import Backbone
from sktransfer.transforms import Preprocessing

SIZE = Preprocessing(size=(32, 32), resize=(32, 32))
BACKBONE = Backbone(small(), SIZE)
NUMBERS = np.arange(12) % 2
X = np.random.default_rng(0).integers(0, 120, (12, 32, 32, 3)) + 120 * NUMBERS[:, None, None, None]
X = X.astype(np.uint8)
NAMES = np.array(["a", "b"])[NUMBERS]

LABELS = {
    "list": NUMBERS.tolist(),
    "numbers of numpy": list(NUMBERS),
    "booleans": (NUMBERS == 1).tolist(),
    "uint8": NUMBERS.astype(np.uint8),
    "float": NUMBERS * 2.0,
    "strings": NAMES.tolist(),
    "strings that are numbers": [str(number) for number in NUMBERS],
    "objects": NAMES.astype(object),
    "dates": np.array(["2020-01-01", "2021-01-01"], "M8[D]")[NUMBERS],
    "string": pd.Series(NAMES, dtype="string", index=range(5, 17)),
    "category": pd.Series(NAMES, dtype="category"),
    "category of numbers": pd.Series(NUMBERS, dtype="category"),
    "polars": pl.Series(NUMBERS),
    "polars strings": pl.Series(NAMES),
    "polars categories": pl.Series(NAMES, dtype=pl.Categorical),
    "polars booleans": pl.Series(NUMBERS == 1),
}
# Of these, scikit-learn's classifiers that check y make floats; its DummyClassifier does not.
NULLABLE = {
    "Int64": pd.Series(NUMBERS, dtype="Int64"),
    "boolean": pd.Series(NUMBERS == 1, dtype="boolean"),
    "array of Int8": pd.array(NUMBERS, dtype="Int8"),
}


def classifier(**options):
    defaults = {"unfreeze": 0, "max_epochs": 1, "random_state": 0}
    return FineTunedClassifier(BACKBONE, **{**defaults, **options})


def same_labels(ours, theirs):
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("y", [*LABELS.values(), *NULLABLE.values()], ids=[*LABELS, *NULLABLE])
def test_labels_come_back_as_those_of_scikit_learn(y):
    flat = X.reshape(12, -1) / 255
    logistic = LogisticRegression().fit(flat, y)
    is_nullable = any(y is nullable for nullable in NULLABLE.values())
    reference = DummyClassifier().fit(flat, y) if is_nullable else logistic
    model = classifier().fit(X, y)
    same_labels(model.classes_, reference.classes_)
    np.testing.assert_array_equal(model.classes_, logistic.classes_)
    assert model.predict(X).dtype == reference.predict(flat).dtype
    np.testing.assert_array_equal(model.predict(X), logistic.predict(flat))
    assert model.score(X, y) == logistic.score(flat, y) == 1.0


@pytest.mark.parametrize("name", ["Int64", "boolean", "category", "polars booleans"])
def test_labels_in_weights_parts_and_held_out_images(name):
    y = {**LABELS, **NULLABLE}[name]
    classes = classifier().fit(X, y).classes_
    weights = dict(zip(classes.tolist(), (1.0, 3.0), strict=True))
    options = {"unfreeze": 1, "early_stopping": True, "validation_fraction": 0.25}
    weighted = classifier(class_weight=weights, **options)
    same_labels(weighted.fit(X, y).classes_, classes)
    in_parts = classifier(unfreeze=1)
    for _ in range(2):
        in_parts.partial_fit(X, y, classes=y[:2])
    same_labels(in_parts.classes_, classes)


def test_numbers_among_objects_are_numbers():
    for y in (NUMBERS.astype(object), pd.Series(NUMBERS == 1, dtype=object)):
        model = classifier().fit(X, y)
        assert model.classes_.dtype == np.array(list(y)).dtype
        assert model.score(X, y) == 1.0


def test_a_nullable_table_is_an_indicator():
    y = pd.DataFrame({"a": NUMBERS == 1, "b": NUMBERS == 0}).astype("boolean")
    model = classifier().fit(X, y)
    np.testing.assert_array_equal(model.predict(X), y.to_numpy(int))
    assert model.score(X, y) == 1.0


def test_ranks_take_the_same_labels():
    table = rank_backbones(X, NULLABLE["boolean"], [BACKBONE], cv=2, scoring="knn")
    assert table["knn"].tolist() == [1.0]
    with pytest.raises(ValueError, match=r"NaN, None or NA in 1 of 2 rows \(1\)"):
        rank_backbones(X[:2], ["a", None], [BACKBONE])
