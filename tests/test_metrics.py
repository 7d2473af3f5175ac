import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.covariance import ledoit_wolf
from sklearn.datasets import load_digits

from sktransfer.metrics import (
    expected_calibration_error,
    h_score,
    knn_score,
    leep_score,
    log_me_score,
)

OF_EMBEDDINGS = [log_me_score, h_score, knn_score]


def clusters(n=60, d=8, n_classes=3, spread=1.0, seed=0):
    """Embeddings around a centre for each class."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % n_classes
    return 3 * rng.normal(size=(n_classes, d))[y] + spread * rng.normal(size=(n, d)), y


def rotation(d, seed=1):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


# ------------------------------------------------------------------------------ LogME


def evidence(X, y, alpha, beta):
    """The evidence as the paper prints it, divided by n."""
    n, d = X.shape
    A = alpha * np.eye(d) + beta * X.T @ X
    m = beta * np.linalg.solve(A, X.T @ y)
    return (
        n / 2 * np.log(beta)
        + d / 2 * np.log(alpha)
        - n / 2 * np.log(2 * np.pi)
        - beta / 2 * np.square(X @ m - y).sum()
        - alpha / 2 * np.square(m).sum()
        - np.linalg.slogdet(A)[1] / 2
    ) / n


def highest_evidence(X, y):
    options = {"method": "Nelder-Mead", "tol": 1e-10, "bounds": [(-12, 18)] * 2}
    starts = [0, 0], [3, 0], [0, 3]
    found = [minimize(lambda v: -evidence(X, y, *np.exp(v)), x, **options) for x in starts]
    return -min(result.fun for result in found)


@pytest.mark.parametrize("n, d", [(60, 8), (24, 40)])
def test_log_me_is_the_highest_evidence(n, d):
    X, y = clusters(n, d, spread=3)
    expected = np.mean([highest_evidence(X, (y == k).astype(float)) for k in range(3)])
    # With more features than images, the noise that is best is none.
    assert log_me_score(X, y) == pytest.approx(expected, abs=1e-6 if n > d else 1e-4)


def test_log_me_by_hand():
    # For "a": s = 3, z² = 4/3, rest 2/3; the fixed point is t = 0.6, alpha = 2.7, beta = 4.5.
    # For "b" the rest is so large that the prior of no weight at all is best.
    X = np.array([[1.0], [1.0], [1.0], [0.0]])
    a = (2 * np.log(4.5 / (2 * np.pi)) - 2 - np.log(6) / 2) / 4
    b = np.log(1 / np.pi) / 2 - 1 / 2
    assert evidence(X, [1, 1, 0, 0], 2.7, 4.5) == pytest.approx(a)
    assert log_me_score(X, ["a", "a", "b", "b"]) == pytest.approx((a + b) / 2)


def test_log_me_of_values():
    X, _ = clusters()
    y = X @ np.linspace(-1, 1, 8) + np.random.default_rng(2).normal(size=60)
    expected = highest_evidence(X, y)
    assert log_me_score(X, y) == pytest.approx(expected, abs=1e-6)
    noise = np.random.default_rng(3).normal(size=60)
    both = (expected + highest_evidence(X, noise)) / 2
    assert log_me_score(X, np.stack([y, noise], 1)) == pytest.approx(both, abs=1e-6)


def test_log_me_stays_finite_where_nothing_is_left_to_explain():
    X = np.eye(3)[np.arange(12) % 3]  # the classes themselves
    score = log_me_score(X, np.arange(12) % 3)
    assert np.isfinite(score) and score > log_me_score(X + 0.1 * clusters(12, 3)[0], X.argmax(1))


# ------------------------------------------------------------------------------ H-score


def test_h_score_by_hand():
    y = ["a", "a", "b", "b"]
    assert h_score([[0.0], [0.0], [1.0], [1.0]], y) == pytest.approx(1)  # all variance is between
    assert h_score([[0.0], [1.0], [0.0], [1.0]], y) == 0
    # Variance 1/4 in all, class means 1/4 and 3/4 with a variance of 1/16.
    assert h_score([[0.0], [0.5], [0.5], [1.0]], y) == pytest.approx((1 / 16) / (1 / 8))
    square = [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]
    assert h_score(square, [0, 1, 2, 3]) == pytest.approx(2)  # as much as there are features
    assert h_score(square, [0, 0, 1, 1]) == pytest.approx(0)


@pytest.mark.parametrize("n, d", [(60, 8), (24, 40)])
def test_h_score_recomputed(n, d):
    X, y = clusters(n, d)
    covariance, shrinkage = ledoit_wolf(X)
    assert 0 < shrinkage < 1
    means = np.stack([X[y == k].mean(0) for k in y])  # (n, d): of each row's class
    between = np.cov(means.T, bias=True)
    expected = np.trace(np.linalg.inv(covariance) @ ((1 - shrinkage) * between))
    assert h_score(X, y) == pytest.approx(expected)
    assert 0 < expected < 2  # the number of classes less one


# ------------------------------------------------------------------------------ LEEP


def test_leep_by_hand():
    theta = [[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]]
    # P(a | z) is 14/15 and 2/5, P(b | z) 1/15 and 3/5.
    likelihoods = [0.8 * 14 / 15 + 0.2 * 2 / 5, 0.6 * 14 / 15 + 0.4 * 2 / 5, 0.1 / 15 + 0.9 * 3 / 5]
    assert leep_score(theta, ["a", "a", "b"]) == pytest.approx(np.mean(np.log(likelihoods)))


def test_leep_recomputed():
    theta, y = softmax(clusters(d=7)[0], axis=1), clusters()[1]
    n, total = len(y), 0.0
    for i in range(n):
        likelihood = 0.0
        for z in range(7):
            joint = sum(theta[j, z] for j in range(n) if y[j] == y[i]) / n
            likelihood += joint / (theta[:, z].sum() / n) * theta[i, z]
        total += np.log(likelihood) / n
    assert leep_score(theta, y) == pytest.approx(total)
    assert leep_score(theta.astype(np.float32), y) == pytest.approx(total, abs=1e-5)


def test_leep_of_a_network_that_says_the_same_of_all_is_the_entropy():
    y = ["a", "a", "a", "b"]
    expected = 0.75 * np.log(0.75) + 0.25 * np.log(0.25)
    assert leep_score(np.tile([0.2, 0.3, 0.5], (4, 1)), y) == pytest.approx(expected)


def test_leep_of_classes_that_are_those_of_the_network():
    assert leep_score(np.eye(4)[[0, 1, 1, 3]], ["a", "b", "b", "c"]) == 0  # class 2 never occurs


# ------------------------------------------------------------------------------ k-NN


def test_knn_recomputed():
    X, y = clusters(40, spread=3)
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    similarity = unit @ unit.T - 10 * np.eye(40)
    votes = y[np.argsort(-similarity, axis=1)[:, :5]]
    predicted = [np.bincount(row).argmax() for row in votes]
    score = knn_score(X, y)
    assert score == pytest.approx(np.mean(predicted == y)) and 0.4 < score < 1


def test_knn_over_folds():
    X = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    folds = [([0, 2], [1, 3]), ([0, 1, 2], [3])]
    assert knn_score(X, ["a", "a", "b", "b"], n_neighbors=1, cv=folds) == 1
    assert knn_score(X, ["a", "b", "b", "a"], n_neighbors=1, cv=folds) == 0


# ------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("score", OF_EMBEDDINGS)
def test_what_changes_nothing(score):
    X, y = clusters(spread=3)
    expected = score(X, y)
    rows = np.random.default_rng(4).permutation(len(X))
    for X2, y2 in (
        (X @ rotation(8), y),
        (X[:, ::-1], y),
        (X[rows], y[rows]),
        (100 * X, y),
        (X, np.array(["c", "a", "b"])[y]),  # other names, in another order
    ):
        assert score(X2, y2) == pytest.approx(expected, abs=1e-7)
    assert score(X.astype(np.float32), y) == pytest.approx(expected, abs=1e-4)


def test_a_shift_changes_all_but_the_h_score():
    X, y = clusters(spread=3)
    assert h_score(X + 5, y) == pytest.approx(h_score(X, y))
    assert abs(log_me_score(X + 5, y) - log_me_score(X, y)) > 1e-3


def test_leep_does_not_know_the_order_of_classes():
    theta, y = softmax(clusters(d=7)[0], axis=1), clusters()[1]
    expected = leep_score(theta, y)
    assert leep_score(theta[:, ::-1], y) == pytest.approx(expected)
    assert leep_score(theta, 2 - y) == pytest.approx(expected)


@pytest.mark.parametrize("score", [*OF_EMBEDDINGS, leep_score])
def test_the_more_separable_the_better(score):
    rng = np.random.default_rng(5)
    scores = []
    for spread in (0.5, 2, 6):
        X, y = clusters(300, 8, spread=spread)
        X = softmax(X / 5, axis=1) if score is leep_score else X
        scores.append(score(X, y))
    scores.append(score(X, rng.permutation(y)))
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4


@pytest.mark.parametrize("score", OF_EMBEDDINGS)
def test_pixels_of_digits_are_above_noise(score):
    X, y = load_digits(return_X_y=True)
    X, y = X[:300], y[:300]
    noise = np.random.default_rng(6).normal(size=X.shape)
    assert score(X, y) > score(noise, y) and score(X, y) > score(X, y[::-1])


@pytest.mark.parametrize("score", OF_EMBEDDINGS)
@pytest.mark.parametrize(
    "names", [["x", "y", "z"], [True, False], [-1, 10, 7], ["a", 1, 2.5], [0.0, 1.0, 2.0]]
)
def test_labels_of_any_type(score, names):
    X, y = clusters(n_classes=len(names))
    labels = np.array(names, dtype=object if names[0] == "a" else None)[y]
    if labels.dtype == object:
        labels = labels.astype(str)
    expected = score(X, y)
    for form in (labels, labels.tolist(), pd.Series(labels)):
        assert score(pd.DataFrame(X), form) == pytest.approx(expected)


@pytest.mark.parametrize("score", [*OF_EMBEDDINGS, leep_score])
@pytest.mark.parametrize(
    "y, message",
    [
        ([0, 1], "inconsistent numbers of samples"),
        ([1, 1, 1, 1], "one class only, 1"),
        (["a", "a", "a", "a"], "one class only, 'a'"),
        ([0, 1, np.nan, 1], "NaN"),
        ([[0, 1], [1, 0], [1, 1], [0, 0]], "shape"),
    ],
)
def test_bad_labels(score, y, message):
    X = [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    with pytest.raises(ValueError, match=message):
        score(X, y)


@pytest.mark.parametrize("score", [*OF_EMBEDDINGS, leep_score])
def test_bad_embeddings(score):
    with pytest.raises(ValueError, match="NaN"):
        score([[0.0, 1.0], [np.nan, 0.0]], [0, 1])
    with pytest.raises(ValueError, match="infinity"):
        score([[0.0, 1.0], [np.inf, 0.0]], [0, 1])
    with pytest.raises(ValueError, match="1D array"):
        score([0.0, 1.0], [0, 1])


def test_embeddings_that_say_nothing():
    with pytest.raises(ValueError, match="zero everywhere"):
        log_me_score(np.zeros((4, 2)), [0, 0, 1, 1])
    with pytest.raises(ValueError, match="rows of X are equal"):
        h_score(np.ones((4, 2)), [0, 0, 1, 1])


def test_values_are_for_log_me_only():
    X, _ = clusters()
    with pytest.raises(ValueError, match="continuous"):
        h_score(X, X[:, 0])


def test_too_many_neighbors():
    with pytest.raises(ValueError, match="n_neighbors=5.*only 3 others"):
        knn_score(np.eye(4), [0, 0, 1, 1])


def test_logits_are_no_probabilities():
    with pytest.raises(ValueError, match=r"Row 1 .*from -1 to 2 .*softmax\(logits"):
        leep_score([[0.5, 0.5], [-1.0, 2.0]], ["a", "b"])
    with pytest.raises(ValueError, match="Row 0 .*the sum 0.5"):
        leep_score([[0.25, 0.25], [0.5, 0.5]], ["a", "b"])


# ------------------------------------------------------------------------------ calibration


def drawn(n=4000, n_classes=3, sharpness=1.0, seed=0):
    """Labels that are drawn by probabilities, and these probabilities made sharper."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(n, n_classes))
    y = (softmax(logits, axis=1).cumsum(1) > rng.random((n, 1))).argmax(1)
    return y, softmax(sharpness * logits, axis=1)


def test_probabilities_that_are_right_have_no_calibration_error():
    errors = [expected_calibration_error(*drawn(sharpness=s)) for s in (0.3, 1, 3)]
    assert errors[1] < 0.03 < 0.1 < min(errors[0], errors[2])
    few = [expected_calibration_error(*drawn(200, seed=seed)) for seed in range(20)]
    assert 0.03 < np.mean(few) < 0.09  # as its documentation says


def test_calibration_error_by_hand():
    y = np.array(["no", "yes", "yes", "no"])
    of_yes = np.array([0.1, 0.8, 0.7, 0.6])
    # Two bins: of the confidences 0.9, 0.8, 0.7, 0.6 three are right.
    both = np.column_stack([1 - of_yes, of_yes])
    for proba in (of_yes, both, pd.DataFrame(both), both.tolist()):
        assert expected_calibration_error(y, proba, n_bins=1) == pytest.approx(0.0)
        # Bins from 0.5 to 0.75 and from there on: 1 of 2 right at 0.65, 2 of 2 at 0.85.
        assert expected_calibration_error(y, proba, n_bins=4) == pytest.approx(0.15)
    # Of the two weights that are left, one image each in a bin.
    weights = [1, 0, 0, 1]
    assert expected_calibration_error(y, both, n_bins=4, sample_weight=weights) == pytest.approx(
        (0.1 + 0.6) / 2
    )
    # One of the classes was never seen; a confidence of 1 belongs to the last bin.
    three = np.column_stack([of_yes, 1 - of_yes, np.zeros(4)])
    found = expected_calibration_error(y, three, n_bins=4, labels=["yes", "no", "maybe"])
    assert found == pytest.approx(0.15)
    assert expected_calibration_error([1, 0], [[0, 1], [1, 0]]) == 0


@pytest.mark.parametrize(
    "y, proba, options, message",
    [
        ([0, 1], [[0.5, 0.5]], {}, "inconsistent numbers"),
        (
            [0, 1],
            [[0.2, 0.3, 0.5]] * 2,
            {},
            "3 columns, but there are 2 classes: 0, 1",
        ),
        ([0, 1], [[-3.0, 4.0]] * 2, {}, r"Row 0 of y_prob .*softmax\(logits"),
        ([0, 1], [1.5, 0.5], {}, "Row 0 of y_prob"),
        ([0, 1], [[np.nan, 0.5]] * 2, {}, "NaN"),
        ([0, 1], [0.5, 0.5], {"n_bins": 0}, "n_bins must be at least 1"),
        ([], np.empty((0, 2)), {}, "0 sample"),
    ],
)
def test_bad_probabilities(y, proba, options, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(y, proba, **options)
