"""See what a network is made of, what an estimator does, and where it is wrong."""

from sktransfer._curve_displays import DepthCurveDisplay, HistoryDisplay, TransferGainDisplay
from sktransfer._detection_display import DetectionDisplay
from sktransfer._embedding_display import EmbeddingDisplay
from sktransfer._image_displays import PrototypeDisplay, TopLossesDisplay
from sktransfer._saliency import SaliencyDisplay
from sktransfer._summary import ModelSummary, model_summary

__all__ = [
    "DepthCurveDisplay",
    "DetectionDisplay",
    "EmbeddingDisplay",
    "HistoryDisplay",
    "ModelSummary",
    "PrototypeDisplay",
    "SaliencyDisplay",
    "TopLossesDisplay",
    "TransferGainDisplay",
    "model_summary",
]
