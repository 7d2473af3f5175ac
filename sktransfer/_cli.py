"""The command line: arguments in, the public functions called, text out."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

_EXAMPLES = """
examples:
  sktransfer benchmark                        the ELPV solar cells, a few minutes
  sktransfer benchmark photos/                your own: photos/cat/1.jpg, photos/dog/7.jpg, ...
  sktransfer benchmark photos/ --backbone resnet50 --backbone timm/convnext_tiny.in12k_ft_in1k
  sktransfer benchmark photos/ --output report/ --memory cache/
  sktransfer benchmark photos/ --depth          how many blocks should be fine-tuned?
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, or 2 for bad input."""
    options = _parser().parse_args(arguments)
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        message = " ".join(str(error).split())
        print(f"sktransfer: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = getattr(options, "memory", None)
        hint = f"; what was computed is in {kept}" if kept else ""
        print(f"sktransfer: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


def _show_warning(message: Any, category: Any, *_: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"sktransfer: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    from sktransfer import __version__

    parser = argparse.ArgumentParser(
        prog="sktransfer", description="Reuse pretrained networks on your own images."
    )
    parser.add_argument("--version", action="version", version=f"sktransfer {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    benchmark = commands.add_parser(
        "benchmark",
        help="how well do classifiers on a pretrained network's embeddings do?",
        description=(
            "Embed images with pretrained networks; compare k-NN, logistic regression, linear "
            "and RBF SVM on the embeddings with an SVM on the pixels and the majority class, on "
            "repeated 75/25 splits. All tuning happens inside the training part."
        ),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmark.set_defaults(run=_benchmark)
    add = benchmark.add_argument
    add(
        "folder",
        nargs="?",
        metavar="FOLDER",
        help="a folder with one subfolder of images for each class; "
        "without it the ELPV solar cells, which the 'demo' extra brings",
    )
    add(
        "--backbone",
        action="append",
        metavar="NAME",
        help="a pretrained network: efficientnet_lite0 (default, needs no download), a name of "
        "torchvision such as resnet50, or timm/NAME; may be given several times",
    )
    add("--weights", default="default", metavar="NAME|FILE", help="published name or a file")
    add(
        "--depth",
        action="store_true",
        help="fine-tune the network instead, once for each number of unfrozen blocks",
    )
    add(
        "--depths",
        metavar="LIST",
        help="these numbers, names of blocks or 'all', separated by commas (default 0,1,2,4,8)",
    )
    add("--output", metavar="DIR", help="write results.csv and report.html with plots there")
    add("--memory", metavar="DIR", help="keep embeddings there for later runs")
    add("--image-size", type=int, metavar="PIXELS", help="size at which images enter the network")
    add("--splits", type=int, default=5, metavar="N", help="number of random splits (default 5)")
    add("--seed", type=int, default=0, metavar="N", help="of the splits (default 0)")
    add("--device", default="auto", help="cpu, cuda, ... (default: a GPU if there is one)")
    add("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    add("--n-jobs", type=int, metavar="N", help="threads that decode images (default: all cores)")
    return parser


def _benchmark(options: argparse.Namespace) -> None:
    # Imported here: `--help` should not wait for torch.
    from sktransfer import _benchmark as benchmark
    from sktransfer import _report

    if options.output:
        _report.prepare(options.output)
    task = benchmark.load_folder(options.folder) if options.folder else benchmark.load_elpv()
    depths = options.depths or ("0,1,2,4,8" if options.depth else "")
    report = benchmark.compare(
        task,
        options.backbone or ["efficientnet_lite0"],
        depths=[int(d) if d.isdecimal() else d for d in depths.split(",") if d],
        n_splits=options.splits,
        memory=options.memory,
        random_state=options.seed,
        verbose=int(sys.stderr.isatty()),
        weights=options.weights,
        image_size=options.image_size,
        device=options.device,
        precision=options.precision,
        n_jobs=options.n_jobs,
    )
    print(_report.as_text(report))
    if options.output:
        for path in _report.write(report, options.output):
            print(f"written: {path}")
