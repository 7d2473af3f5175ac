"""See what a network is made of, what an estimator does, and where it is wrong."""

from sktransfer._training.summary import ModelSummary, model_summary
from sktransfer.inspection._anomaly_displays import AnomalyMapDisplay, RejectionCurveDisplay
from sktransfer.inspection._audit_display import AuditDisplay
from sktransfer.inspection._curve_displays import (
    DepthCurveDisplay,
    HistoryDisplay,
    TransferGainDisplay,
)
from sktransfer.inspection._detection_display import DetectionDisplay
from sktransfer.inspection._embedding_display import EmbeddingDisplay
from sktransfer.inspection._image_displays import PrototypeDisplay, TopLossesDisplay
from sktransfer.inspection._saliency import SaliencyDisplay
from sktransfer.inspection._similar import find_similar

__all__ = [
    "AnomalyMapDisplay",
    "AuditDisplay",
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
    "find_similar",
    "model_summary",
]
