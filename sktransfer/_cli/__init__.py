"""The command line: arguments in, the public functions called, text out."""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

from sktransfer._cli.checks import announcement, check
from sktransfer._cli.groups import add_groups
from sktransfer._cli.options import (
    add_csv_or_json,
    add_files,
    add_json,
    add_network,
    add_output,
    add_reading,
    add_running,
    add_training,
)
from sktransfer._cli.words import in_options
from sktransfer._config import config_context
from sktransfer._escaping import printable

_CLASSES = "a folder with one subfolder of images for each class"
_FORMATTER = argparse.RawDescriptionHelpFormatter
_filled = partial(textwrap.fill, width=78)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0, 2 for bad input, 130 after Ctrl-C, 141 where the reader of the output went away.
    """
    _escape_what_the_encoding_lacks()
    try:
        return _run(arguments)
    except BrokenPipeError:
        return 141  # what a shell says of a program that SIGPIPE ended
    finally:
        _flush_or_drop_output()


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    with warnings.catch_warnings():  # who calls `main` from Python gets their own way back
        warnings.showwarning = partial(_show_warning, warnings.showwarning, options)
        return _run_command(options)


def _run_command(options: argparse.Namespace) -> int:
    names = "damaged", "max_pixels", "background"
    settings = {name: getattr(options, name, None) for name in names}
    try:
        check(options)
        if options.command == "benchmark":
            print(announcement(options), file=sys.stderr if options.json else None, flush=True)
        # Imported here: `--help`, and an error, should not wait for torch.
        with config_context(**settings):
            getattr(import_module("sktransfer._cli.commands"), options.command)(options)
        print(end="", flush=True)  # a full disk is an error of the command as well
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        _tell("error: ", _one_line(error, options))
        return 2
    except KeyboardInterrupt:
        kept = getattr(options, "memory", None)
        hint = f"; what was computed is in {kept}" if kept else ""
        _tell("interrupted", printable(hint))
        return 130
    return 0


def _show_warning(
    show: Callable[..., None],
    options: argparse.Namespace,
    message: Any,
    category: type[Warning],
    *where: Any,
) -> None:
    """Show a warning to users in one line; `show` has all others, as Python shows them."""
    if issubclass(category, UserWarning):
        _tell("warning: ", _one_line(message, options))
    else:
        show(message, category, *where)


def _tell(what: str, text: str) -> None:
    """Print what a command says of itself."""
    print(_wrapped(f"sktransfer: {what}{text}"), file=sys.stderr)


def _wrapped(text: str) -> str:
    """Return text as lines of the terminal, if it is to be shown on one; else it stays one line.

    Words are never cut, so that paths can be copied.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return textwrap.fill(
        text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _one_line(message: Any, options: argparse.Namespace) -> str:
    lines = (line.strip() for line in in_options(str(message), options).split("\n"))
    text = printable(" ".join(line for line in lines if line))
    return re.sub(r"(\S{100})\S{300,}(\S{100})", r"\1...\2", text)  # a data URI given as a path


def _escape_what_the_encoding_lacks() -> None:
    """Let the terminal show escapes of characters that it has not, instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _flush_or_drop_output() -> None:
    try:
        print(end="", flush=True)
    except OSError:
        # Python would write the rest once more when it exits, and print the error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Quotes arguments, which may be names of files, without what a terminal would obey."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, _wrapped(f"{self.prog}: error: {printable(message)}") + "\n")


# ------------------------------------------------------------------------------ commands


def _parser() -> argparse.ArgumentParser:
    from sktransfer import __version__

    parser = _Parser(prog="sktransfer", description="Reuse pretrained networks on your own images.")
    parser.add_argument("--version", action="version", version=f"sktransfer {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (_fit, _predict, _export, _embed, _rank, _classify, _benchmark):
        add(commands.add_parser)
    for add in (_audit, _similar, _cache):
        add(commands.add_parser)
    return parser


def _fit(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add_parser(
        "fit",
        help="fine-tune a pretrained network on a folder of classes",
        description=_filled(
            "Fine-tune a pretrained network: a new head and, with --depth, its last blocks. A "
            "part of the images is held out and scored; the model is trained on the others."
        ),
        epilog="""
examples:
  sktransfer fit photos/ -o model.skops                a new head alone
  sktransfer fit photos/ -o model.skops --depth auto   and its best depth
  sktransfer fit photos/ -o model.skops --depth 2 --memory cache/ --test-size 0
  sktransfer fit photos/ -o model.skops --groups '(patient[0-9]+)'
  sktransfer fit photos/ -o model.skops --groups table.csv:patient
""",
        formatter_class=_FORMATTER,
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help=_CLASSES)
    add_output(parser, "FILE.skops", "the file to write the model to", required=True)
    add(
        "--depth",
        default="0",
        metavar="N|NAME|all|auto",
        help="blocks to unfreeze, from the end; a block's name: from there on; 'auto' searches "
        "(default 0: the head alone, on all layers)",
    )
    add_network(parser)
    add_training(parser)
    add(
        "--test-size",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="of the images, held out to score the model; 0 for none (default 0.2)",
    )
    add_groups(parser)
    add("--seed", type=int, default=0, metavar="N", help="of the split and of training (default 0)")
    add_running(parser, precisions=("auto", "float32", "bfloat16", "int8"))
    add_json(parser)


def _predict(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add_parser(
        "predict",
        help="label images with a model that `fit` or `benchmark` wrote",
        description=(
            "Label images with a model that `fit` or `benchmark` wrote, or that skops wrote of an "
            "estimator or pipeline of this library and scikit-learn. Columns: path, label and "
            "probability; labels, as numbers of columns of y, if an image may have several; value "
            "of a regressor."
        ),
    )
    parser.add_argument("model", metavar="FILE.skops")
    add_files(parser)
    add_csv_or_json(parser)
    add_reading(parser)


def _export(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add_parser(
        "export",
        help="write a model that `fit` or `benchmark` wrote as a file of ONNX or OpenVINO",
        description=(
            "Write a model, as `predict` takes it, to a file for other programs: from uint8 images "
            "of any size to predictions. FILE.onnx needs the 'onnx' extra, FILE.xml, beside which "
            "FILE.bin is written, the 'openvino' extra, or 'int8' for 8 bits."
        ),
    )
    parser.add_argument("model", metavar="FILE.skops")
    add_output(parser, "FILE", "the file to write: .onnx or, for OpenVINO, .xml", required=True)
    parser.add_argument(
        "--precision",
        choices=["float32", "bfloat16", "int8"],
        help="of an .xml file: what the network computes in (default float32)",
    )
    add_json(parser)


def _embed(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add_parser(
        "embed",
        help="write the embeddings of a folder of images to a table",
        description=(
            "Write one row for each image of a folder and its subfolders: its path, its label "
            "(the name of the subfolder of FOLDER in which it lies) and its embedding. In names, "
            "control characters and bytes that are not UTF-8 are escapes, as \\x1b; in CSV, text "
            "that a spreadsheet would compute has an apostrophe before it."
        ),
    )
    parser.add_argument("folder", metavar="FOLDER", help="with images, or subfolders of them")
    add_output(parser, "FILE", "the table to write: .parquet or .csv", required=True)
    add_network(parser)
    parser.add_argument(
        "--layer",
        default="auto",
        help="a block's name or number, several with commas, or all, stages, output (default: what "
        "the network's head sees)",
    )
    parser.add_argument(
        "--pooling", default="avg", help="avg, max, token, flatten; several: avg,max (default avg)"
    )
    add_json(parser)
    add_running(parser)


def _rank(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add_parser(
        "rank",
        help="which pretrained network suits these images best?",
        description=(
            "Embed the images once with each network and score how well the classes can be told "
            "apart: cross-validated k-NN and logistic regression, LogME and H-score. Of several "
            "networks, the best pair is scored as well."
        ),
    )
    parser.add_argument("folder", metavar="FOLDER", help=_CLASSES)
    add_network(
        parser, several="default: those whose weights are installed: efficientnet_lite0, 1 and 2"
    )
    parser.add_argument(
        "--sort-by",
        default="logistic",
        choices=["knn", "logistic", "logme", "h_score"],
        help="(default logistic)",
    )
    parser.add_argument("--cv", type=int, default=5, metavar="N", help="folds (default 5)")
    add_groups(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the folds (default 0)")
    add_output(parser, "FILE.csv", "write the whole table there as well")
    add_json(parser)
    add_running(parser)


def _classify(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add_parser(
        "classify",
        help="what does a pretrained network, as it is, see in these images?",
        description="Print the best labels, of those a network was trained on, for each image.",
    )
    add_files(parser)
    add_network(parser)
    parser.add_argument("-k", type=int, default=5, help="labels an image (default 5)")
    add_csv_or_json(parser)
    add_running(parser)


def _benchmark(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add_parser(
        "benchmark",
        help="how well do classifiers on a pretrained network's embeddings do?",
        description=_filled(
            "Embed images with pretrained networks; compare k-NN, logistic regression, linear "
            "and RBF SVM on the embeddings with an SVM on the pixels and the majority class, on "
            "repeated 75/25 splits. All tuning happens inside the training part."
        ),
        epilog="""
examples:
  sktransfer benchmark                       the ELPV solar cells, some minutes
  sktransfer benchmark photos/               your own: photos/cat/1.jpg, ...
  sktransfer benchmark photos/ --backbone efficientnet_lite0 --backbone resnet50
  sktransfer benchmark photos/ --output report/ --memory cache/
  sktransfer benchmark photos/ --save-best model.skops   for `predict`
  sktransfer benchmark photos/ --depth       how many blocks to fine-tune?
  sktransfer benchmark photos/ --groups '(patient[0-9]+)'   whole patients
""",
        formatter_class=_FORMATTER,
    )
    add = parser.add_argument
    add(
        "folder",
        nargs="?",
        metavar="FOLDER",
        help=f"{_CLASSES}; without it the ELPV solar cells, which the 'demo' extra brings",
    )
    add_network(parser, several="default efficientnet_lite0")
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
    add_output(parser, "DIR", "write results.csv and report.html with plots there")
    add(
        "--save-best",
        metavar="FILE.skops",
        help="fit the most accurate classifier on all images, and write it there for `predict`",
    )
    add("--splits", type=int, default=5, metavar="N", help="number of random splits (default 5)")
    add_groups(parser)
    add("--seed", type=int, default=0, metavar="N", help="of the splits (default 0)")
    add_json(parser)
    add_running(parser)


def _audit(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add_parser(
        "audit",
        help="what is wrong with these images: copies, labels, damage?",
        description=_filled(
            "List what should be looked at before a model is trained: damaged images, copies "
            "within a class, across classes and across a split, labels that may be wrong, images "
            "that are blank, dark, bright, blurred, tiny, of an odd shape or unlike all others, "
            "and classes that are too small. Damaged images are listed; no option skips them."
        ),
        epilog="""
examples:
  sktransfer audit photos/                             first findings, as text
  sktransfer audit photos/ -o audit/ --memory cache/   all, as a page and as CSV
  sktransfer audit train/ --test test/                 copies across the split
  sktransfer audit photos/ --groups '(patient[0-9]+)'  copies across patients
""",
        formatter_class=_FORMATTER,
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help=f"with images, or {_CLASSES}")
    add("--test", metavar="FOLDER", help="the test part of a split, a folder of the same kind")
    add_groups(parser)
    add_output(parser, "DIR", "write audit.html, with images, and findings.csv there")
    add_network(parser)
    add("--seed", type=int, default=0, metavar="N", help="of the folds (default 0)")
    add_json(parser)
    add_running(parser, skips=False)


def _similar(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add_parser(
        "similar",
        help="which images of a folder are most like these?",
        description="Print the images of a folder whose embeddings are nearest to those of others.",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="with the images that are searched, or subfolders of them")
    add("files", nargs="+", metavar="QUERY", help="images, or folders of them, to look for")
    add("-k", type=int, default=5, help="images for each query (default 5)")
    add("--html", metavar="FILE.html", help="write a page with the images there")
    add_network(parser)
    add_csv_or_json(parser)
    add_running(parser)


def _cache(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    parser = add_parser(
        "cache",
        help="look at, clear or reduce a folder that --memory named",
        description="Look at, clear or reduce a folder that --memory, or memory=, named.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    for name, text in (
        ("info", "print how many results it holds, of which networks and layers, and their size"),
        ("clear", "delete all of them"),
        ("reduce", "delete those that were not used for longest"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("folder", metavar="DIR")
        add_json(action)
    add = action.add_argument
    add("--bytes", metavar="SIZE", help="keep at most so many, as in 500M or 10G")
    add("--items", type=int, metavar="N", help="keep at most so many results")
    add("--days", type=float, metavar="N", help="keep what was used in the last N days")
