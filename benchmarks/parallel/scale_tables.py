"""Write the tables of docs/scale.md anew: a block that begins with `$ selfmask plan` gets what it prints.

python -m benchmarks.parallel.scale_tables
"""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

from selfmask_dist.cli import main as selfmask

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
_BLOCK = re.compile(r"^```\n\$ selfmask (plan (?:.*\\\n)*.*)\n((?:(?!```).*\n)*)```$", re.MULTILINE)


def printed(command: str) -> str:
    """Return what `selfmask` prints for the words of a command line."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = selfmask([*shlex.split(command.replace("\\\n", " ")), "--site", "none"])
    if status:
        raise ValueError(f"selfmask {command} ended with {status}")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def commands(document: str) -> list[tuple[str, str]]:
    """Return each block's command and what stands below it."""
    return _BLOCK.findall(document)


def rewritten(document: str) -> str:
    """Return the document with every block as its command prints it now."""
    return _BLOCK.sub(lambda block: f"```\n$ selfmask {block[1]}\n{printed(block[1])}```", document)


if __name__ == "__main__":
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text()))
    sys.exit(0)
