"""Small images for the tests, and their files."""

import io

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

CHINA, FLOWER = load_sample_images().images  # uint8 (427, 640, 3)
SMALL = np.ascontiguousarray(FLOWER[100:340:8, 100:420:8])  # (30, 40, 3)


def encode(image, format, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def hwc(tensor):
    assert tensor.dtype == torch.uint8 and tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy()
