"""Which network to transfer, whether to transfer at all, and what is wrong with the images."""

from sktransfer.model_selection._audit import audit
from sktransfer.model_selection._near_duplicates import suggest_groups
from sktransfer.model_selection._ranking import (
    TransferGain,
    rank_backbones,
    transfer_gain,
)

__all__ = [
    "TransferGain",
    "audit",
    "rank_backbones",
    "suggest_groups",
    "transfer_gain",
]
