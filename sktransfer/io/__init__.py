"""Images in any form (path, bytes, PIL image, array, tensor) become uint8 RGB tensors."""

from sktransfer.io._images import (
    DamagedImageWarning,
    ImageSequence,
    check_images,
    list_images,
    load_image,
    load_image_folder,
)

__all__ = [
    "DamagedImageWarning",
    "ImageSequence",
    "check_images",
    "list_images",
    "load_image",
    "load_image_folder",
]
