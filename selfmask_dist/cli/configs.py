"""`selfmask configs`: the configurations that ship, each by its name and what it says of itself.

selfmask launch --config cascade_vitb32 data.train=shards/train data.test=shards/test
"""

import argparse
import re
from pathlib import Path

from selfmask_dist.common.shipped import shipped_configs
from selfmask_dist.common.text import table

# what a sentence has in parentheses to say where a method is from
_REFERENCE = re.compile(r" ?\([^()]*(?:(?:19|20)\d\d|arXiv|appendix)[^()]*\)")


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `selfmask configs` to the command line."""
    help = "list the configurations that ship; --config finds one by its name"
    command = commands.add_parser("configs", help=help, description=help)
    command.set_defaults(command=_list)


def _list(_options: argparse.Namespace) -> None:
    rows = [("NAME", "WHAT IT IS"), *((name, summary(path)) for name, path in shipped_configs().items())]
    print(table(rows, right=False))
    print("\nThe last part of a name is enough: --config threshold")


def summary(path: Path) -> str:
    """Return the first sentence of the comment that opens a file, its references left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("#").strip()
        if not line.startswith("#") or not text:
            break
        lines.append(text)
    return re.split(r"\.(?: |$)", _REFERENCE.sub("", " ".join(lines)))[0]
