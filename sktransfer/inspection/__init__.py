"""See what a network is made of, what an estimator does, and where it is wrong."""

from sktransfer._training.summary import ModelSummary, model_summary
from sktransfer.inspection._anomaly_displays import AnomalyMapDisplay, RejectionCurveDisplay
from sktransfer.inspection._curve_displays import (
    DepthCurveDisplay,
    HistoryDisplay,
    TransferGainDisplay,
)
from sktransfer.inspection._detection_display import DetectionDisplay
from sktransfer.inspection._embedding_display import EmbeddingDisplay
from sktransfer.inspection._image_displays import PrototypeDisplay, TopLossesDisplay
from sktransfer.inspection._saliency import SaliencyDisplay

__all__ = [
    "AnomalyMapDisplay",
    "DepthCurveDisplay",
    "DetectionDisplay",
    "EmbeddingDisplay",
    "HistoryDisplay",
    "ModelSummary",
    "PrototypeDisplay",
    "RejectionCurveDisplay",
    "SaliencyDisplay",
    "TopLossesDisplay",
    "TransferGainDisplay",
    "model_summary",
]
