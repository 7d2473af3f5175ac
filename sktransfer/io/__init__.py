"""Images in any form (path, bytes, PIL image, array, tensor) become uint8 RGB tensors."""

from sktransfer.io._images import (
    DamagedImageWarning,
    ImageSequence,
    check_images,
    list_images,
    load_image,
    load_image_folder,
)
from sktransfer.io._unreadable import find_unreadable

__all__ = [
    "DamagedImageWarning",
    "ImageSequence",
    "check_images",
    "find_unreadable",
    "list_images",
    "load_image",
    "load_image_folder",
]
