"""The command ``stillhouse predict``: what a sentence names in an image, by a stored grounder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from methods.grounding.prediction import Prediction
    from orchestrator.store import Store

__all__ = ["add_predict_command"]

DESCRIPTION = """\
Find what sentences name in an image, by the grounder that an artifact holds. Writes one JSON document with masks (COCO
run lengths at the size of the image), boxes and warnings, and a picture per text. The data set need not be there.
"""
EXAMPLE = """\
example: stillhouse predict 3f2a --image kitchen.jpg --text "the red mug" --text "the mug on the left" --out found
"""


def add_predict_command(commands: Any, open_store: Callable[[str], Store]) -> None:
    """Add it to the parser; ``open_store`` gives the store that ``--storage`` names, or refuses it."""
    command = commands.add_parser(
        "predict", help="find what a sentence names in an image, by a stored grounder", description=DESCRIPTION,
        epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument("key", metavar="KEY", help="key of a grounder, or the first digits of it")
    command.add_argument("--image", metavar="FILE", required=True, help="any image that Pillow reads")
    command.add_argument(
        "--text", metavar="SENTENCE", action="append", required=True, help="what to find; may be given several times"
    )  # fmt: skip
    command.add_argument("--out", metavar="FOLDER", default=".", help="where to write (default: here)")
    command.add_argument("--storage", default="runs", help="where the artifacts are (default: runs)")
    command.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU where there is one)")
    command.set_defaults(command=lambda options: _predict(options, open_store))


def _predict(options: argparse.Namespace, open_store: Callable[[str], Store]) -> int:
    from orchestrator.prediction import predict

    store = open_store(options.storage)
    found = predict(options.key, options.image, options.text, storage=store, device=options.device)
    document, *overlays = found.write(options.out)
    height, width = found.pixels.shape[:2]
    print(f"{found.image} ({width} x {height}) by {found.method}, stage {found.stage} ({found.key[:8]})")
    for item, overlay in zip(found.items, overlays, strict=True):
        line, *warnings = _told(item)
        print(f"{line}\n  {overlay}")
        for warning in warnings:
            print(warning, file=sys.stderr)
    print(document)
    return 0


def _told(item: Prediction) -> Iterator[str]:
    """A line about one prediction, and one for each thing that its reader should know."""
    share = 100 * item.mask.mean()
    left, top, right, bottom = (round(value) for value in item.box)
    line = f"{item.text!r}: {item.mask.sum():,} pixels ({share:.1f} %), x {left} to {right}, y {top} to {bottom} (from the {item.box_from})"
    if item.no_target_probability is not None:
        line += f", no such object: probability {item.no_target_probability:.2f}"
    yield line + (" - the network says that nothing is named" if item.names_nothing else "")
    if item.unknown_words:
        words = ", ".join(map(repr, item.unknown_words))
        yield f"warning: {item.text!r}: the network does not know {words}; it read a placeholder"
    if item.num_tokens_left_out:
        yield f"warning: {item.text!r} is too long for the network: its last {item.num_tokens_left_out} token(s) were not read"
