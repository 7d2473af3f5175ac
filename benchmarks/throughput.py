"""Images a second from JPEG files to embeddings: this library, its peers, and the limits.

Every side runs the same architecture on the same files, and takes its turn in every round; the
tables have medians. A side lives in a process of its own, where it is built, chooses its settings
and runs a batch before anything is timed: in one process, thread pools, allocators and torch's
global settings of one side would reach the next. Processes that wait use no core.

    ours            PretrainedFeatureExtractor(...).transform(paths), no memory
    loader          a DataLoader loop with the preprocessing of the weights, as fast as its user
                    finds it in PyTorch's tuning guide: channels last, inference_mode, persistent
                    workers; the number of workers, batch size and decoder are chosen by trial.
                    In bfloat16, with autocast
    loader-plain    the same as torchvision's documentation has it: no worker, contiguous memory,
                    no_grad, batches of 32
    img2vec         img2vec_pytorch, lists of Pillow images; their length is chosen by trial, and
                    in bfloat16 whether it runs under autocast. Of the three networks it knows
                    ResNet50; the others are set as its attributes `model` and `extraction_layer`
    embetter        ImageLoader and TimmEncoder, with timm's network of this architecture. It
                    can't run under autocast: NumPy has no bfloat16. It keeps the network in
                    training mode
    bare-torch      the forward pass alone, on ready tensors: batch size, and in bfloat16 autocast
                    or weights in bfloat16, chosen by trial
    bare-openvino   the same on OpenVINO: batch size and hint are chosen by trial
    decoding        decode_jpeg, resize of uint8 tensors with channels last, and crop, in threads;
                    number of threads, and Pillow's scaled decoding instead, chosen by trial
    one by one      decoding, then bare-openvino: computed from these two, as the seconds add up

Networks without embedded weights get random ones, on all sides (speed does not depend on them):
libraries that load published weights find files of random ones where these would have been
downloaded to. `difference` is that of the embeddings of eight images from ours, relative to their
norm: it shows the other preprocessing of `img2vec`, its other layer of MobileNetV3 (empty), and
the random weights of `embetter`'s MobileNetV3, whose parameters have other names.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from _common import (
    Built,
    Side,
    embedding_network,
    environment,
    kilobytes,
    median,
    our_runtime,
    say,
    sides,
    table,
    take_turns,
    tune,
    weights_of,
    write_photographs,
)
from PIL import Image
from runtimes import build_forward
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.models import get_model_weights
from torchvision.transforms import v2

from sktransfer import PretrainedFeatureExtractor, get_model
from sktransfer.transforms import Preprocessing

PEERS = ("loader", "loader-plain", "img2vec", "embetter")
TIMM_NAMES = {
    "resnet50": "resnet50",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "efficientnet_lite0": "tf_efficientnet_lite0",
}
CHUNK = 64  # images that peers without batches get at once: all would fill the memory
SAMPLE = 8  # images whose embeddings are compared


@dataclass
class Case:
    """A row of the asked figures.

    Parameters
    ----------
    backbone, precision : str
    size : tuple of (int, int)
        Of the files: width and height.
    asked : float
        Ours against each peer.
    asked_bare, asked_sequence : float or None
        Ours against the bare forward of the same runtime; against decoding, then that of OpenVINO.
    """

    backbone: str
    precision: str
    size: tuple[int, int]
    asked: float
    asked_bare: float | None = None
    asked_sequence: float | None = None


CASES = {
    "resnet50": Case("resnet50", "float32", (500, 375), 3, asked_bare=0.85),
    "resnet50-bfloat16": Case("resnet50", "bfloat16", (500, 375), 5, asked_bare=0.85),
    "mobilenet": Case("mobilenet_v3_large", "float32", (500, 375), 8, asked_sequence=0.95),
    "lite0": Case("efficientnet_lite0", "float32", (500, 375), 8, asked_sequence=0.95),
    "lite0-large": Case("efficientnet_lite0", "float32", (1600, 1200), 8),
}


@dataclass
class Job:
    """What a side is given."""

    case: Case
    files: list[str]
    n_tuning: int  # images by which it chooses its settings
    folder: str  # where it may write weights
    options: dict[str, Any]  # of our estimator


Embed = Callable[[int], Iterable[np.ndarray]]  # the embeddings of the first n files, by batches


def built(job: Job, axes: dict[str, Sequence[Any]], make: Callable[..., Embed]) -> Built:
    """Choose the settings by trial; return the side, warm."""
    warnings.simplefilter("ignore")

    def consume(embed: Embed, n: int) -> None:
        for _ in embed(n):
            pass

    settings = tune(axes, lambda **some: partial(consume, make(**some), job.n_tuning))
    embed = make(**settings)
    sample = np.concatenate(list(embed(min(SAMPLE, len(job.files)))))
    notes = {
        "settings": ", ".join(f"{name} {value}" for name, value in settings.items()),
        "images": len(job.files),
        "sample": sample.astype(np.float32),
    }
    return Built(partial(consume, embed, len(job.files)), notes)


def autocast(is_on: bool) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=is_on)


def batches_of(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


# ------------------------------------------------------------------------------ ours


def build_ours(job: Job) -> Built:
    model = PretrainedFeatureExtractor(
        job.case.backbone,
        weights=weights_of(job.case.backbone),
        precision=job.case.precision,
        memory=None,
        device="cpu",
        **job.options,
    )
    return built(job, {}, lambda: lambda n: [model.transform(job.files[:n])])


# ------------------------------------------------------------------------------ a plain loop


class Files(Dataset):
    """Decodes and preprocesses a file."""

    def __init__(self, files: Sequence[str], preprocess: Callable, decoder: str) -> None:
        self.files, self.preprocess, self.decoder = files, preprocess, decoder

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        if self.decoder == "torchvision":
            return self.preprocess(torchvision.io.decode_image(self.files[i], mode="RGB"))
        with Image.open(self.files[i]) as image:
            return self.preprocess(image.convert("RGB"))


class First(Sampler):
    """The first `n` files; persistent workers go on when it changes."""

    n = 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.n))

    def __len__(self) -> int:
        return self.n


def published_preprocessing(backbone: str) -> tuple[Callable, Sequence[str]]:
    """Return the preprocessing that comes with the weights, and decoders whose images it takes."""
    if backbone in TIMM_NAMES and backbone.startswith("efficientnet_lite"):
        import timm

        config = timm.get_pretrained_cfg(TIMM_NAMES[backbone]).to_dict()
        config = timm.data.resolve_data_config(pretrained_cfg=config)
        return timm.data.create_transform(**config, is_training=False), ("Pillow",)
    preset = get_model_weights(backbone).DEFAULT.transforms()
    return preset, ("Pillow", "torchvision")


def build_loader(job: Job, is_tuned: bool) -> Built:
    network = embedding_network(job.case.backbone)
    preprocess, decoders = published_preprocessing(job.case.backbone)
    layout = torch.channels_last if is_tuned else torch.contiguous_format
    network = network.to(memory_format=layout)
    gradients_off = torch.inference_mode if is_tuned else torch.no_grad

    def make(batch: int, workers: int, decoder: str) -> Embed:
        first = First()
        loader = DataLoader(
            Files(job.files, preprocess, decoder),
            batch_size=batch,
            sampler=first,
            num_workers=workers,
            persistent_workers=workers > 0,
        )

        def embed(n: int) -> Iterator[np.ndarray]:
            first.n = n
            with gradients_off(), autocast(job.case.precision == "bfloat16"):
                for x in loader:
                    x = x.contiguous(memory_format=layout)
                    yield network(x).float().numpy()

        return embed

    axes: dict[str, Sequence[Any]] = {"batch": [32], "workers": [0], "decoder": decoders[-1:]}
    if is_tuned:
        axes = {"batch": [32, 8, 64], "workers": [0, 1, 2], "decoder": decoders}
    return built(job, axes, make)


# ------------------------------------------------------------------------------ libraries


def build_img2vec(job: Job) -> Built:
    os.environ["TORCH_HOME"] = job.folder
    from img2vec_pytorch import Img2Vec

    backbone = job.case.backbone
    network = get_model(backbone, weights_of(backbone)).network
    is_known = backbone in Img2Vec.RESNET_OUTPUT_SIZES
    place_download("resnet50" if is_known else "resnet18", network if is_known else None)
    img2vec = Img2Vec(model=backbone if is_known else "resnet18")
    if not is_known:
        img2vec.model = network.eval()
        if backbone == "mobilenet_v3_large":
            # Of the four-dimensional outputs that it takes, the one behind the pooling.
            img2vec.extraction_layer, img2vec.layer_output_size = network.avgpool, 960
        else:
            # By this name it pools the last map, 7 × 7, itself.
            img2vec.model_name = backbone
            img2vec.extraction_layer, img2vec.layer_output_size = network.bn2, 1280

    def make(batch: int, is_autocast: bool = False) -> Embed:
        def embed(n: int) -> Iterator[np.ndarray]:
            for some in batches_of(job.files[:n], batch):
                with autocast(is_autocast):
                    yield img2vec.get_vec([Image.open(path).convert("RGB") for path in some])

        return embed

    axes: dict[str, Sequence[Any]] = {"batch": [32, 8, 1]}
    if job.case.precision == "bfloat16":
        axes["is_autocast"] = [True, False]
    return built(job, axes, make)


def place_download(name: str, network: nn.Module | None) -> None:
    """Write weights where torchvision would download the published ones of `name` to."""
    network = torchvision.models.get_model(name) if network is None else network
    published = Path(get_model_weights(name).DEFAULT.url).name
    file = Path(torch.hub.get_dir(), "checkpoints", published)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), file)


def build_embetter(job: Job) -> Built:
    import timm
    from embetter.vision import ImageLoader, TimmEncoder
    from sklearn.pipeline import make_pipeline
    from timm.models import save_for_hf

    network = timm.create_model(TIMM_NAMES[job.case.backbone])
    state = get_model(job.case.backbone, weights_of(job.case.backbone)).network.state_dict()
    if state.keys() == network.state_dict().keys():
        network.load_state_dict(state)
    folder = Path(job.folder, "timm", job.case.backbone)
    save_for_hf(network, str(folder))
    pipeline = make_pipeline(ImageLoader(), TimmEncoder(f"local-dir:{folder}"))
    return built(
        job, {}, lambda: lambda n: map(pipeline.fit_transform, batches_of(job.files[:n], CHUNK))
    )


# ------------------------------------------------------------------------------ decoding alone


def build_decoding(job: Job) -> Built:
    preprocessing = get_model(job.case.backbone, weights_of(job.case.backbone)).preprocessing
    torch.set_num_threads(1)  # each of ours takes an image

    def make(decoder: str, threads: int) -> Embed:
        pool = ThreadPoolExecutor(threads)
        decode = partial(decode_and_resize, preprocessing=preprocessing, decoder=decoder)
        return lambda n: [np.stack(list(pool.map(decode, job.files[:n])))]

    n_cores = len(os.sched_getaffinity(0))
    return built(
        job, {"decoder": ["torchvision", "Pillow"], "threads": [n_cores, 2 * n_cores]}, make
    )


def decode_and_resize(path: str, preprocessing: Preprocessing, decoder: str) -> np.ndarray:
    """Return what enters the network, uint8 (3, height, width)."""
    side = preprocessing.resize[0]
    if decoder == "Pillow":  # a half, a quarter or an eighth of the size while decoding
        with Image.open(path) as image:
            image.draft("RGB", (side, side))
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    else:
        encoded = torchvision.io.read_file(path)
        pixels = torchvision.io.decode_jpeg(encoded, torchvision.io.ImageReadMode.RGB)
    assert pixels.stride()[0] == 1  # channels last
    resized = v2.functional.resize(
        pixels, [side], v2.InterpolationMode(preprocessing.interpolation), antialias=True
    )
    return v2.functional.center_crop(resized, list(preprocessing.size)).numpy()


# ------------------------------------------------------------------------------ the comparison


def builders(job: Job, args: argparse.Namespace) -> dict[str, tuple[Any, ...]]:
    """Return what builds each side that is wanted."""
    case, bare = job.case, (len(job.files), job.n_tuning, args.batch, False)
    every: dict[str, tuple[Any, ...]] = {
        "ours": (build_ours, job),
        "loader": (build_loader, job, True),
        "loader-plain": (build_loader, job, False),
        "img2vec": (build_img2vec, job),
        "embetter": (build_embetter, job),
        "bare-torch": (build_forward, case.backbone, "torch", case.precision, *bare),
        "bare-openvino": (build_forward, case.backbone, "openvino", case.precision, *bare),
        "decoding": (build_decoding, job),
    }
    return {name: builder for name, builder in every.items() if name in args.sides}


def asked_of(name: str, case: Case, runtime: str) -> float | None:
    """Return what is asked of the ratio of ours to this side."""
    if name in PEERS:
        return case.asked
    if name == f"bare-{runtime}":
        return case.asked_bare
    return case.asked_sequence if name == "one by one" else None


def rows_of(
    job: Job, side_of: dict[str, Side], seconds: dict[str, list[float]], runtime: str
) -> list[dict[str, str]]:
    """Return the rows of a case's table."""
    speeds = {
        name: [side_of[name].notes["images"] / one for one in times]
        for name, times in seconds.items()
    }
    settings = {name: side.notes.get("settings", "") for name, side in side_of.items()}
    settings |= {"ours": f"runtime {runtime}"} if "ours" in settings else {}
    settings |= {
        name: f"not measured: {side.error}" for name, side in side_of.items() if side.error
    }
    both = speeds.get("decoding"), speeds.get("bare-openvino")
    if all(both):
        pairs = zip(*both, strict=False)
        speeds["one by one"] = [1 / (1 / decoding + 1 / forward) for decoding, forward in pairs]
    ours = median(speeds.get("ours", []))
    sample = side_of["ours"].notes.get("sample") if "ours" in side_of else None
    rows = []
    for name, found in speeds.items():
        asked = asked_of(name, job.case, runtime)
        theirs = side_of[name].notes.get("sample") if name in (*PEERS, "ours") else None
        rows.append(
            {
                "side": name,
                "images/s": f"{median(found):.1f}" if found else "",
                "range": f"{min(found):.1f} to {max(found):.1f}" if found else "",
                "ours / side": f"{ours / median(found):.2f}" if found else "",
                "asked": "" if asked is None else f"≥ {asked:g}",
                "difference": difference(theirs, sample),
                "settings": settings.get(name, ""),
            }
        )
    return rows


def difference(theirs: np.ndarray | None, ours: np.ndarray | None) -> str:
    if theirs is None or ours is None or theirs.shape != ours.shape:
        return ""
    return f"{np.linalg.norm(theirs - ours) / np.linalg.norm(ours):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = ("ours", *PEERS, "bare-torch", "bare-openvino", "decoding")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="+", choices=every, default=every)
    parser.add_argument("--images", type=int, default=256, help="files of a turn")
    parser.add_argument("--tune", type=int, default=64, help="files by which settings are chosen")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 1, 16], help="of bare passes")
    parser.add_argument("--runtime", help="of our estimator; not passed by default")
    parser.add_argument("--batch-size", type=int, help="of our estimator; not passed by default")
    args = parser.parse_args()
    options = {"runtime": args.runtime, "batch_size": args.batch_size}
    options = {name: value for name, value in options.items() if value is not None}
    print(environment("openvino", "img2vec_pytorch", "embetter"))
    print(f"\n{args.images} files a turn, medians of {args.repeats} turns.", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for case_name in args.cases:
            case = CASES[case_name]
            say(case_name)
            folder = Path(name, f"{case.size[0]}")
            files = write_photographs(folder, args.images, case.size, grain=5)
            job = Job(case, files, min(args.tune, args.images), name, options)
            with sides(builders(job, args)) as side_of:
                seconds = take_turns(side_of, args.repeats)
                rows = rows_of(job, side_of, seconds, our_runtime(args.runtime))
            width, height = case.size
            print(f"\n{case.backbone}, {case.precision}, files of {width} × {height} pixels,")
            print(f"{kilobytes(files)}:\n\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
