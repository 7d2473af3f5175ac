"""Which network to transfer, and whether to transfer at all."""

from sktransfer.model_selection._ranking import (
    TransferGain,
    rank_backbones,
    transfer_gain,
)

__all__ = [
    "TransferGain",
    "rank_backbones",
    "transfer_gain",
]
