"""See what a network is made of, what an estimator does, and where it is wrong."""

from sktransfer._summary import ModelSummary, model_summary

__all__ = ["ModelSummary", "model_summary"]
