"""What the converters' command lines share: options, errors, the summary and the index. Knows no layout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from .options import SIMILAR, ConversionOptions
from .prepared.once import INDEX_NAME
from .shards import Conversion


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that shape the output, the same for every converter."""
    parser.add_argument(
        "--max-samples-per-shard", type=int, default=ConversionOptions.max_samples_per_shard, metavar="N"
    )
    parser.add_argument(
        "--short-side", type=int, metavar="PX", help="shrink larger pictures to this short side"
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=ConversionOptions.quality,
        metavar="Q",
        help="JPEG quality of shrunk ones",
    )
    parser.add_argument(
        "--skip-broken", action="store_true", help="list unreadable files in rejects.jsonl, go on"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion in OUT")
    parser.add_argument(
        "--similar-classes",
        choices=SIMILAR,
        default=ConversionOptions.similar_classes,
        help="what classes are whose names differ only by case or the like: an error, one class, or several",
    )
    parser.add_argument(
        "--num-workers", type=int, default=ConversionOptions.num_workers, metavar="N", help="processes (1)"
    )


def run_converter(
    fn: Callable[..., list[Conversion]], parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> int:
    """Convert, print what was written, and return the exit status.

    Args:
        fn: the converter; its parameters are called as the parser's arguments.
    """
    try:
        done = fn(**vars(parser.parse_args(argv)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    describe(done)
    return 0


def describe(done: Sequence[Conversion]) -> None:
    """Print what was written, and what is to be done next."""
    for conversion in done:
        rejected = f", {conversion.num_rejected} left out (rejects.jsonl)" if conversion.num_rejected else ""
        kind = "targets" if conversion.has_targets else "classes"
        counts = f"{conversion.num_samples} samples, {len(conversion.classes)} {kind}"
        print(f"{conversion.folder}: {counts}{rejected}")
        for note in conversion.notes:
            print(f"  note: {note}")
        is_whole = conversion.has_targets
        is_whole |= all(class_name is not None for _, class_name, _ in conversion.contents)
        if not (conversion.folder / INDEX_NAME).exists():
            print(f"  next: selfmask data index {'' if is_whole else '--unlabelled '}{conversion.folder}")
