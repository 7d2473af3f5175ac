"""Steps of scikit-learn as ONNX models, by skl2onnx, and whether these say what the steps say."""

from __future__ import annotations

import warnings
from contextlib import suppress
from copy import copy
from importlib.util import find_spec
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.base import is_classifier
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.ensemble import VotingClassifier
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.utils.validation import check_is_fitted

from sktransfer._estimators.exported import parameters_of, transformed
from sktransfer._optional import load_optional
from sktransfer._training.onnx_file import OPSET, OPSET_ML

_N_ROWS = 6  # of each kind, by which a model is compared with its step
_TOLERANCE = 1e-3  # of the largest value


def step_models(
    steps: list[tuple[str, Any]], given: str, of_images: np.ndarray | None = None
) -> list[Any]:
    """Return each step behind the network as an ONNX model, which takes what the last one gives.

    One by one: an error is that of a step, and skl2onnx does not know all pipelines whose steps it
    knows. Each is compared with its step on noise, and on `of_images`, rows that the network makes.
    """
    for name, step in steps:
        check_is_fitted(step, msg=f"Step {name!r}, a %(name)s, is not fitted: call fit first.")
    for module in ("skl2onnx", "onnx"):
        load_optional(module, "to_onnx of a pipeline", "'.[onnx]'")
    samples = [noise(steps[0][1])] + ([] if of_images is None else [of_images])
    models = []
    for number, (name, step) in enumerate(steps, 1):
        is_last = number == len(steps)
        try:
            model = _checked(step, given, samples, is_last)
        except Exception as error:
            raise ValueError(
                f"Step {name!r}, a {type(step).__name__}, can't be exported: {_first_line(error)}"
            ) from error
        if not is_last:
            inner = f"{name}_{number}"
            model, given = _with_one_output(model, inner), inner
            samples = _transformed(step, samples)
        models.append(model)
    return models


def noise(step: Any, n_rows: int = _N_ROWS) -> np.ndarray:
    """Return rows that a step takes, of standard normal values."""
    random = np.random.RandomState(0)
    return random.standard_normal((n_rows, step.n_features_in_)).astype(np.float32)


def rows_between(step: Any, n_rows: int = _N_ROWS) -> np.ndarray | None:
    """Return points between two rows of the fit; None if a step keeps none of them.

    Far from these rows, rounding decides which is the nearest, and kernels are 0.
    """
    known = getattr(step, "support_vectors_", getattr(step, "_fit_X", None))
    if known is None or issparse(known):
        return None
    random = np.random.RandomState(0)
    first, second = known[random.randint(len(known), size=(2, n_rows))]
    return (0.7 * first + 0.3 * second).astype(np.float32)


def _transformed(step: Any, samples: list[np.ndarray]) -> list[np.ndarray]:
    """Return what a step makes of rows; those that it does not take are left out."""
    found = []
    for rows in samples:
        with suppress(Exception):
            found.append(transformed(step, rows))
    return found


def _checked(step: Any, given: str, samples: list[np.ndarray], is_last: bool) -> Any:
    """Return a step as a model that says what it says, as far as some rows tell."""
    if is_classifier(step) and not is_last:
        raise ValueError(
            "it is a classifier in front of other steps, and skl2onnx writes its predictions, not "
            "what it transforms."
        )
    _check_parts([step, *parameters_of(step)])
    import onnx

    between = rows_between(step)
    samples = samples if between is None else [*samples, between]
    with warnings.catch_warnings():
        # Of attributes that scikit-learn will rename one day, and of rows that are noise.
        warnings.simplefilter("ignore")
        for model in _converted(step, given):
            onnx.checker.check_model(model, full_check=True)
            if others := {one.domain for one in model.graph.node} - {"", "ai.onnx.ml"}:
                raise ValueError(f"skl2onnx needs operators of {sorted(others)}, not ONNX's own.")
            if all(_says_the_same(step, model, rows) for rows in samples):
                return model
    raise ValueError("what skl2onnx writes computes other numbers than the step itself.")


def _check_parts(parts: list[Any]) -> None:
    """Raise an error if a step, or one inside of it, is one that skl2onnx writes wrongly."""
    if any(getattr(part, "method", None) == "isotonic" for part in parts):
        raise ValueError(
            "skl2onnx writes other probabilities than those of method='isotonic'. Pass "
            "method='sigmoid'."
        )
    for part in parts:
        check_whitening(part)
    neighbors = (KNeighborsClassifier, KNeighborsRegressor)
    if any(isinstance(part, neighbors) and part.weights == "distance" for part in parts):
        raise ValueError(
            "skl2onnx writes other numbers than those of weights='distance'. Pass "
            "weights='uniform'; export_openvino takes a KNeighborsClassifier with either."
        )


def check_whitening(step: Any) -> None:
    """Raise an error if a fitted PCA divides by standard deviations that are but rounding.

    A component has such a one if there are fewer different rows than components, for example. Then
    what it makes of a row is rounding as well, and no other program says the same.
    """
    is_pca = isinstance(step, (PCA, IncrementalPCA))
    if not (is_pca and step.whiten and hasattr(step, "explained_variance_")):
        return
    deviations = np.sqrt(step.explained_variance_)
    rounding = np.finfo(np.float32).eps * (np.linalg.norm(step.mean_) + deviations.max())
    n_sure = int((deviations * _TOLERANCE > rounding).sum())
    if n_sure < len(deviations):
        raise ValueError(
            f"with whiten=True it divides by the standard deviation of each component, and of "
            f"{len(deviations) - n_sure} of its {len(deviations)} components this is no more than "
            "rounding, as where there are fewer different images than components. Fit it with "
            f"n_components={n_sure} or whiten=False."
        )


# ------------------------------------------------------------------------------ conversion


def _converted(step: Any, given: str) -> list[Any]:
    """Return a step as an ONNX model that takes float32 rows; several if it may be any of them."""
    import skl2onnx
    from skl2onnx.common.data_types import FloatTensorType

    step = _as_skl2onnx_takes_it(step)
    rows = [(given, FloatTensorType([None, step.n_features_in_]))]
    versions = {"": OPSET, "ai.onnx.ml": OPSET_ML}

    def convert(options: Any) -> Any:
        try:
            model = skl2onnx.convert_sklearn(
                step, initial_types=rows, target_opset=versions, options=options
            )
        except Exception as error:
            raise ValueError(f"skl2onnx says: {_first_line(error)}") from error
        for each in model.opset_import:  # it states the lowest that knows what it used
            each.version = versions.get(each.domain, each.version)
        return model

    if not hasattr(step, "classes_"):
        model = convert(None)
        names = [output.name for output in model.graph.output]
        return [model if len(names) > 1 or "variable" in names else _with_variable(model)]
    try:
        model = convert({id(step): {"zipmap": False}})  # else it returns dicts
    except ValueError as error:
        if "zipmap" not in str(error):
            raise
        model = convert(None)  # it has no such option, and returns none
    if hasattr(step, "predict_proba"):
        return [model]
    if not hasattr(step, "decision_function") and is_classifier(step):
        return [_without_others(model, "label")]
    if is_classifier(step) and len(step.classes_) == 2:
        return [_with_one_score(model, column) for column in (0, -1)]
    return [_renamed(model, "probabilities", "scores")]


def _as_skl2onnx_takes_it(step: Any) -> Any:
    """Return a step that predicts the same, with parameters that skl2onnx takes.

    Of a VotingClassifier it wants weights as an array, one for each estimator that is not dropped,
    and refuses a parameter of `transform`.
    """
    if not isinstance(step, VotingClassifier):
        return step
    step = copy(step)
    step.flatten_transform = False
    if step.weights is not None:
        step.weights = np.array(step._weights_not_none)
    return step


def _with_variable(model: Any) -> Any:
    """Return a model whose output is called `variable`, as that of most steps is."""
    from onnx import compose

    # Something inside may be called so.
    model = compose.add_prefix(model, "inner/", rename_inputs=False, rename_outputs=False)
    return _renamed(model, model.graph.output[0].name, "variable")


def _with_one_score(model: Any, column: int) -> Any:
    """Return a model whose `scores` are one column of its `probabilities`, which are none.

    Of two classes, scikit-learn has one score. Of some estimators skl2onnx has it alone, of others
    its negative as well, before or behind it.
    """
    import onnx
    from onnx import helper

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    graph = _renamed(copied, copied.graph.output[-1].name, "all_scores").graph
    graph.node.append(helper.make_node("Constant", [], ["column"], value_ints=[column]))
    graph.node.append(helper.make_node("Gather", ["all_scores", "column"], ["scores"], axis=1))
    scores = helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, [None, 1])
    del graph.output[-1]
    graph.output.append(scores)
    return copied


def _with_one_output(model: Any, name: str) -> Any:
    """Return a model of which only the last output is left, under this name."""
    last = model.graph.output[-1].name
    return _renamed(_without_others(model, last), last, name)


def _without_others(model: Any, name: str) -> Any:
    """Return a model of which only one output is left."""
    kept = [output for output in model.graph.output if output.name == name]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    return model


def _renamed(model: Any, name: str, new: str) -> Any:
    """Return a model of which one output has another name."""
    for node in model.graph.node:
        node.output[:] = [new if output == name else output for output in node.output]
        node.input[:] = [new if given == name else given for given in node.input]
    for output in model.graph.output:
        output.name = new if output.name == name else output.name
    return model


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# ------------------------------------------------------------------------------ comparison


def _says_the_same(step: Any, model: Any, rows: np.ndarray) -> bool:
    """Tell whether a model says of rows what its step says; True where that can't be told."""
    names = [output.name for output in model.graph.output]
    try:
        said = [_said(step, name, rows) for name in names]
    except Exception:  # not all estimators take noise
        return True
    found = _outputs(model, rows)
    return found is None or all(map(_are_alike, found, said))


def _outputs(model: Any, rows: np.ndarray) -> Any:
    """Return what a model says by ONNX Runtime where it is there, or by ONNX's own program.

    None if that program, which does not know all graphs, can't tell.
    """
    given = {model.graph.input[0].name: rows}
    if not find_spec("onnxruntime"):
        from onnx.reference import ReferenceEvaluator

        try:
            return ReferenceEvaluator(model).run(None, given)
        except Exception:
            return None
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        ).run(None, given)
    except Exception as error:
        raise ValueError(
            f"ONNX Runtime can't run what skl2onnx writes: {_first_line(error)}"
        ) from error


def _said(step: Any, name: str, rows: np.ndarray) -> Any:
    """Return what a step says of rows under the name of an output; None if it has no such thing."""
    methods = {
        "label": ["predict"],
        "probabilities": ["predict_proba"],
        "scores": ["decision_function", "transform"],
    }
    for method in methods.get(name, ["predict", "transform"]):
        if hasattr(step, method):
            return getattr(step, method)(rows)
    return None


def _are_alike(found: Any, said: Any) -> bool:
    if said is None:
        return True
    if isinstance(said, list):  # of several targets
        return len(said) == len(found) and all(map(_are_alike, found, said))
    said, found = np.asarray(said), np.asarray(found)
    if said.size != found.size:
        return False
    found = found.reshape(said.shape)
    if said.dtype.kind == "f" and found.dtype.kind == "f":
        return bool(np.abs(found - said).max() <= _TOLERANCE * max(np.abs(said).max(), 1e-12))
    said = said.astype(int) if said.dtype.kind == "b" else said
    return bool((found.astype(str) == said.astype(str)).all())
