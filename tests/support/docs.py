"""Commands of a documentation page, run as they stand there.

A fenced block of shell says behind its language how it is to be taken:

    ```sh run          runs, in the order of the page, in one folder
    ```sh slow         likewise, where slow tests run
    ```sh dry          its launchers' commands with --dry-run behind them, for another machine's sake
    ```sh not: why     does not run, for a reason

Knows no page.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.tiny_run import ROOT, child_environment

_FENCE = re.compile(r"^```(?:sh|bash)\b([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_DRY = " --cluster slurm --dry-run --plan-seconds 0"
HOW = ("run", "slow", "dry", "not")


@dataclass(frozen=True)
class Block:
    """A fenced block of shell: the line where it begins, how it is to be taken, and its commands."""

    line: int
    how: str
    reason: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order. Raises ValueError for one that does not say how it is to be taken."""
    found, text = [], page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        how, _, reason = match[1].strip().partition(":")
        if how not in HOW or (how == "not") != bool(reason.strip()):
            raise ValueError(
                f"{page.name}:{line}: ```sh {match[1].strip()} is none of run, slow, dry, not: WHY"
            )
        found.append(Block(line, how, reason.strip(), match[2]))
    return found


def script(block: Block) -> str:
    """What a shell gets of a block."""
    if block.how != "dry":
        return block.text
    lines = (line.partition("  #")[0].rstrip() for line in block.text.splitlines())
    return "\n".join(
        line + _DRY if re.match(r"python launchers/|selfmask launch", line) else line for line in lines
    )


def prepare(folder: Path) -> dict[str, str]:
    """Make a folder look like a checkout whose environment is active; returns its shell's variables."""
    (folder / "bin").mkdir()
    for name, command in (("python", ""), ("selfmask", " -m selfmask_dist.cli")):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable}{command} "$@"\n')
        program.chmod(0o755)
    for name in ("launchers", "configs"):
        (folder / name).symlink_to(ROOT / name)
    given = child_environment(
        PATH=f"{folder / 'bin'}:{os.environ['PATH']}",
        PYTHONPATH=str(ROOT),
        XDG_CONFIG_HOME=str(folder / "config"),
    )
    return {
        key: value
        for key, value in given.items()
        if key not in ("SELFMASK_SITE", "SELFMASK_DATA", "SLURM_CONF")
    }


def run(block: Block, folder: Path, environment: dict[str, str]) -> str:
    """Run a block in a folder, stopping at the first command that fails; returns what it printed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script(block)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"line {block.line}:\n{block.text}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr
