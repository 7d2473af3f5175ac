"""Steps of scikit-learn as ONNX models, by skl2onnx, and whether these say what the steps say."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
from sklearn.base import is_classifier
from sklearn.utils.validation import check_is_fitted

from sktransfer._estimators.exported import parameters_of
from sktransfer._optional import load_optional
from sktransfer._training.onnx_file import OPSET, OPSET_ML

_N_ROWS = 6  # by which a model is compared with its step
_TOLERANCE = 1e-2  # of the largest value: what is written wrongly is far off
_SHARE_OF_LABELS = 0.7  # that must be equal: of rows that are noise, some lie between classes


def step_models(steps: list[tuple[str, Any]], given: str) -> list[Any]:
    """Return each step behind the network as an ONNX model, which takes what the last one gives.

    One by one: an error is that of a step, and skl2onnx does not know all pipelines whose steps it
    knows.
    """
    for name, step in steps:
        check_is_fitted(step, msg=f"Step {name!r}, a %(name)s, is not fitted: call fit first.")
    for module in ("skl2onnx", "onnx"):
        load_optional(module, "to_onnx of a pipeline", "'.[onnx]'")
    width = steps[0][1].n_features_in_
    rows = np.random.RandomState(0).standard_normal((_N_ROWS, width)).astype(np.float32)
    models = []
    for number, (name, step) in enumerate(steps, 1):
        is_last = number == len(steps)
        try:
            model = _checked(step, given, rows, is_last)
        except Exception as error:
            raise ValueError(
                f"Step {name!r}, a {type(step).__name__}, can't be exported: {_first_line(error)}"
            ) from error
        if not is_last:
            inner = f"{name}_{number}"
            model, given = _renamed(model, model.graph.output[-1].name, inner), inner
            rows = step.transform(rows).astype(np.float32)
        models.append(model)
    return models


def _checked(step: Any, given: str, rows: np.ndarray, is_last: bool) -> Any:
    """Return a step as a model that says what it says, as far as some rows tell."""
    if is_classifier(step) and not is_last:
        raise ValueError(
            "it is a classifier in front of other steps, and skl2onnx writes its predictions, not "
            "what it transforms."
        )
    if any(getattr(part, "method", None) == "isotonic" for part in [step, *parameters_of(step)]):
        raise ValueError(
            "skl2onnx writes other probabilities than those of method='isotonic'. Pass "
            "method='sigmoid'."
        )
    import onnx

    with warnings.catch_warnings():
        # Of attributes that scikit-learn will rename one day, and of rows that are noise.
        warnings.simplefilter("ignore")
        for model in _converted(step, given):
            onnx.checker.check_model(model, full_check=True)
            if others := {one.domain for one in model.graph.node} - {"", "ai.onnx.ml"}:
                raise ValueError(f"skl2onnx needs operators of {sorted(others)}, not ONNX's own.")
            if _says_the_same(step, model, rows):
                return model
    raise ValueError("what skl2onnx writes computes other numbers than the step itself.")


# ------------------------------------------------------------------------------ conversion


def _converted(step: Any, given: str) -> list[Any]:
    """Return a step as an ONNX model that takes float32 rows; several if it may be any of them."""
    import skl2onnx
    from skl2onnx.common.data_types import FloatTensorType

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
    if is_classifier(step) and len(step.classes_) == 2:
        return [_with_one_score(model, column) for column in (0, -1)]
    return [_renamed(model, "probabilities", "scores")]


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
    try:
        found = _outputs(model, rows)
        pairs = zip([output.name for output in model.graph.output], found, strict=True)
        return all(_are_alike(value, _said(step, name, rows)) for name, value in pairs)
    except Exception:  # not all estimators take noise, and ONNX's own program not all of a graph
        return True


def _outputs(model: Any, rows: np.ndarray) -> Any:
    """Return what a model says: by ONNX Runtime, where it is there, or by ONNX's own program."""
    given = {model.graph.input[0].name: rows}
    if find_spec("onnxruntime"):
        import onnxruntime

        return onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        ).run(None, given)
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(model).run(None, given)


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
    said, found = np.asarray(said), np.asarray(found)
    if said.size != found.size:
        return False
    found = found.reshape(said.shape)
    if said.dtype.kind == "f" and found.dtype.kind == "f":
        return bool(np.abs(found - said).max() <= _TOLERANCE * max(np.abs(said).max(), 1e-12))
    said = said.astype(int) if said.dtype.kind == "b" else said
    return bool((found.astype(str) == said.astype(str)).mean() >= _SHARE_OF_LABELS)
