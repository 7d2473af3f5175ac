"""The base class of estimators on images, and what helps to write one."""

from sktransfer._estimators.base import ImageEstimator, takes_dask

__all__ = ["ImageEstimator", "takes_dask"]
