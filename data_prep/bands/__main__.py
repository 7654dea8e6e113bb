"""`python -m data_prep.bands SOURCE OUT`: convert, and print the keys of a configuration on it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.bands import convert_bands


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 2 where something cannot be converted."""
    parser = argparse.ArgumentParser(description=sys.modules["data_prep.bands"].__doc__)
    parser.add_argument(
        "source", type=Path, help="folder with train/CLASS/FILE and test/CLASS/FILE, or CLASS/FILE"
    )
    parser.add_argument("out", type=Path, help="folder for the tars")
    parser.add_argument("--max-samples-per-shard", type=int, default=1000, metavar="N")
    options = parser.parse_args(argv)
    try:
        done = convert_bands(options.source, options.out, max_samples_per_shard=options.max_samples_per_shard)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{done.num_samples} samples of {done.channels} channels in {', '.join(map(str, done.folders))}")
    for key, value in (
        ("data.channels", done.channels),
        ("backbone.mean", done.mean),
        ("backbone.std", done.std),
    ):
        text = value if isinstance(value, int) else "[" + ",".join(f"{one:g}" for one in value) + "]"
        print(f"{key}={text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
