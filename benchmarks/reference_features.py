"""The same features as torchvision's own forward pass, for seven classic networks.

Random weights are saved to a file and loaded by name. The reference is torchvision's own
evaluation-mode network, cut at its head by a forward hook, on torchvision's own preprocessing of
the same JPEG files, in three forms:

- `transforms.v2` on the same decoded pixels;
- the preset that comes with the weights, on the same pixels as PIL images: Pillow's resize rounds
  a few pixels in a thousand to the next of 256 levels;
- that preset on the files, which Pillow decodes: what a user of torchvision would run.
"""

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tabulate import tabulate
from torchvision.models import get_model, get_model_weights
from torchvision.transforms import v2

from sktransfer import PretrainedFeatureExtractor

HEADS = {
    "vgg16": "classifier.6",
    "vgg19": "classifier.6",
    "googlenet": "fc",
    "inception_v3": "fc",
    "resnet50": "fc",
    "mobilenet_v3_large": "classifier.3",
    "vit_b_16": "heads.head",
}


def head_input(network: torch.nn.Module, head: str, batch: torch.Tensor) -> np.ndarray:
    """Run the plain network; return what its head is given."""
    caught: list[torch.Tensor] = []
    hook = network.get_submodule(head).register_forward_pre_hook(lambda _, x: caught.append(x[0]))
    with torch.inference_mode():
        network(batch)
    hook.remove()
    return caught[0].numpy()


def difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    largest = np.abs(ours - theirs).max() / np.abs(theirs).max()
    whole = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    return f"{largest:.1e}  {whole:.1e}"


def version_two(preset: Any) -> Any:
    """The same steps as the preset, from torchvision's current transforms."""
    return v2.Compose(
        [
            v2.Resize(preset.resize_size, preset.interpolation, antialias=True),
            v2.CenterCrop(preset.crop_size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(preset.mean, preset.std),
        ]
    )


def photographs(folder: Path) -> list[str]:
    """Cut scikit-learn's two photographs into eight JPEG files of several sizes."""
    paths = []
    for i, photo in enumerate(load_sample_images().images):
        for j, (h, w) in enumerate([(427, 640), (300, 300), (400, 250), (240, 500)]):
            paths.append(str(folder / f"{i}{j}.jpg"))
            Image.fromarray(np.ascontiguousarray(photo[:h, :w])).save(paths[-1], quality=95)
    return paths


def compare(name: str, head: str, paths: list[str], folder: Path) -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's note on slow initialisation
        aux = {"aux_logits": True} if name in ("googlenet", "inception_v3") else {}
        torch.manual_seed(0)
        network = get_model(name, weights=None, **aux).eval()
    torch.save(network.state_dict(), folder / f"{name}.pth")
    extractor = PretrainedFeatureExtractor(name, weights=folder / f"{name}.pth")
    preset = get_model_weights(name).DEFAULT.transforms()
    images = [Image.open(path).convert("RGB") for path in paths]
    pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    current = torch.stack([version_two(preset)(x) for x in pixels])
    classic = head_input(network, head, torch.stack([preset(image) for image in images]))
    rows = extractor.transform(images)
    return {
        "network": name,
        "features": str(rows.shape[1]),
        "v2, same pixels": difference(rows, head_input(network, head, current)),
        "preset, same pixels": difference(rows, classic),
        "preset, files": difference(extractor.transform(paths), classic),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help="by default, all seven")
    names = parser.parse_args().networks or HEADS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = photographs(folder)
        rows = [compare(name, HEADS[name], paths, folder) for name in names]
    print("Difference to torchvision's forward pass: largest, relative to the largest feature;")
    print("and of all features together, relative to their norm")
    print(tabulate(rows, headers="keys", disable_numparse=True))


if __name__ == "__main__":
    main()
