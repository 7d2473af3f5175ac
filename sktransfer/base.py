"""The base class of estimators on images, and what helps to write one."""

from sktransfer._estimators.base import (
    HasMethods,
    ImageEstimator,
    Interval,
    StrOptions,
    _fit_context,
    check_sample_weight,
    check_y,
    takes_dask,
    validate_params,
)

__all__ = [
    "HasMethods",
    "ImageEstimator",
    "Interval",
    "StrOptions",
    "_fit_context",
    "check_sample_weight",
    "check_y",
    "takes_dask",
    "validate_params",
]
