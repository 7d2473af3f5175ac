"""Labels in any container come back as scikit-learn's classifiers give them."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from networks import small
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression

from sktransfer import FineTunedClassifier, FineTunedRegressor
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
    "arrays of no dimension": [np.array(number) for number in NUMBERS],
    "arrays of one string": [np.array(name) for name in NAMES],
    "arrays among numbers": [np.array(0), 1] * 6,
    "tensor": torch.tensor(NUMBERS),
    "tensors": list(torch.tensor(NUMBERS)),
    "tensors of fractions": list(torch.tensor(NUMBERS, dtype=torch.float32)),
    "tensors of booleans": list(torch.tensor(NUMBERS) == 1),
    "numbers and booleans": [0, True] * 6,
    "nothing masked": np.ma.array(NUMBERS, mask=np.zeros(12)),
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


MASKED = {
    "array": np.ma.array(NUMBERS, mask=NUMBERS),
    "objects": np.ma.array(NUMBERS, mask=NUMBERS, dtype=object),
    "table": np.ma.array(np.eye(2, dtype=int)[NUMBERS], mask=np.array([[0, 0], [0, 1]])[NUMBERS]),
    "list": [0, np.ma.masked] * 6,
    "list of rows": list(np.ma.array(np.eye(2)[NUMBERS], mask=np.array([[0, 0], [1, 0]])[NUMBERS])),
    "Int64": pd.Series([0, None] * 6, dtype="Int64"),
    "int64[pyarrow]": pd.Series([0, None] * 6, dtype="int64[pyarrow]"),
    "series of tensors": pd.Series([torch.tensor(0.0), torch.tensor(np.nan)] * 6, dtype=object),
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
    with pytest.raises(ValueError, match=r"NA or masked values in 1 of 2 rows \(1\)"):
        rank_backbones(X[:2], ["a", None], [BACKBONE])


def regressor():
    return FineTunedRegressor(BACKBONE, unfreeze=0, max_epochs=1, random_state=0)


@pytest.mark.parametrize("name", ["arrays of no dimension", "tensor", "tensors"])
def test_a_regressor_takes_numbers_in_arrays(name):
    model = regressor().fit(X, LABELS[name])
    np.testing.assert_array_equal(model.predict(X), regressor().fit(X, NUMBERS).predict(X))
    assert model.score(X, LABELS[name]) == model.score(X, NUMBERS)


@pytest.mark.parametrize("kind", [torch.tensor, np.array], ids=["tensors", "arrays"])
def test_rows_of_a_list_make_a_table(kind):
    table = np.column_stack([NUMBERS, 1 - NUMBERS])
    rows = [kind(row.tolist()) for row in table]
    np.testing.assert_array_equal(classifier().fit(X, rows).predict(X), table)
    assert regressor().fit(X, rows).predict(X).shape == (12, 2)


@pytest.mark.parametrize("y", [[], np.array([]), torch.tensor([]), pd.Series([], dtype=float)])
def test_no_label_is_an_error_of_length(y):
    for model in (classifier(), regressor()):
        with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[12, 0\]"):
            model.fit(X, y)


@pytest.mark.parametrize("y", MASKED.values(), ids=MASKED)
def test_masked_labels_are_missing(y):
    message = r"masked values in 6 of 12 rows \(1, 3, 5, 7, 9, \.\.\.\)"
    for model in (classifier(), regressor()):
        with pytest.raises(ValueError, match=message):
            model.fit(X, y)
        model.fit(X, NUMBERS)
        for use in (model.score, model.partial_fit):
            with pytest.raises(ValueError, match=message):
                use(X, y)
