"""What decoding JPEG files at a half or a quarter of their resolution does to embeddings.

    python benchmarks/scaled_decoding.py

libjpeg can leave out high frequencies while it decodes, which is faster. Crops of scikit-learn's
two photographs, decoded in full and at a fraction, then brought to the network's size.
"""

import argparse
import io

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from sktransfer import PretrainedFeatureExtractor, get_model


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def decoded(data: bytes, fraction: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    if fraction > 1:
        image.draft("RGB", (image.width // fraction, image.height // fraction))
    return np.array(image.convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="efficientnet_lite0")
    options = parser.parse_args()
    offsets = [(top, left) for top in (0, 27) for left in (0, 60, 120)]
    photos = load_sample_images().images
    crops = [photo[t : t + 400, u : u + 520] for photo in photos for t, u in offsets]
    files = [encoded(crop) for crop in crops]
    print("| image size | decoded at | pixels left, by those wanted | largest | norm |")
    print("| --- | --- | --- | --- | --- |")
    for size in (64, 96, 128):
        extractor = PretrainedFeatureExtractor(options.backbone, image_size=size)
        full = extractor.transform([decoded(data, 1) for data in files])
        wanted = get_model(options.backbone).preprocessing.with_size(size).resize[0]
        for fraction in (2, 4):
            images = [decoded(data, fraction) for data in files]
            error = extractor.transform(images) - full
            largest = np.abs(error).max() / np.abs(full).max()
            norm = np.linalg.norm(error) / np.linalg.norm(full)
            left = images[0].shape[0] / wanted
            print(f"| {size} | 1/{fraction} | {left:.1f} | {largest:.3f} | {norm:.3f} |")


if __name__ == "__main__":
    main()
