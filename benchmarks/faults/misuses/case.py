"""One misuse: what a user does, what is to come of it, and what did.

A case is a function of an empty folder. It raises, warns or returns what a command said; `judge` holds that
against the outcome that was declared with the case, before anything ran. Knows nothing of masks.
"""

import contextlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

Verdict = Literal["right", "silent", "traceback", "hang", "unclear"]
VERDICTS: tuple[Verdict, ...] = ("right", "silent", "traceback", "hang", "unclear")

# what the package raises on purpose; any other exception came out of something that nobody looked at
_MEANT = (ValueError, TypeError, OSError, ArithmeticError, ImportError)
_PATH = re.compile(r"/[^\s'\":]*/")  # folders of this machine, which no result needs
_ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Wanted:
    """The outcome that is right.

    kind: `works` (the case checks the value), `error`, or `warning` (it works, and something is said).
    names: regular expressions, each of which must be found in what is said.
    """

    kind: Literal["works", "error", "warning"]
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {', '.join(self.names)}" if self.names else self.kind


WORKS = Wanted("works")


def error(*names: str) -> Wanted:
    """An error that names these."""
    return Wanted("error", names)


def warning(*names: str) -> Wanted:
    """It works, and a warning or a note names these."""
    return Wanted("warning", names)


@dataclass(frozen=True)
class Said:
    """What a command ended with."""

    status: int
    text: str


@dataclass(frozen=True)
class Case:
    """name: what the user does. use: does it; the folder is empty. seconds: its deadline."""

    name: str
    wanted: Wanted
    use: Callable[[Path], Said | None]
    seconds: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """verdict: which column. got: what happened, in a line."""

    group: str
    name: str
    wanted: str
    verdict: Verdict
    got: str
    seconds: float


class WrongValueError(AssertionError):
    """A case worked and its result is not the right one."""


def check(is_right: object, what: str) -> None:
    """Raise WrongValueError where a result is wrong."""
    if not is_right:
        raise WrongValueError(what)


class _Late(BaseException):  # not an Exception: code that catches those must not swallow it
    pass


def run(case: Case, group: str, folder: Path) -> Outcome:
    """Run a case within its deadline, and judge it."""
    start = time.monotonic()
    try:
        with _deadline(case.seconds), _heard() as heard:
            said = case.use(folder)
        verdict, got = _judge(case.wanted, said, "\n".join(heard))
    except (_Late, subprocess.TimeoutExpired):
        verdict, got = "hang", f"not done after {case.seconds:g} s"
    except WrongValueError as wrong:
        verdict, got = "silent", f"wrong: {wrong}"
    except _MEANT as caught:
        verdict, got = _judge_error(case.wanted, f"{caught}")
    except Exception as caught:
        where = traceback.extract_tb(caught.__traceback__)[-1]
        got = f"{type(caught).__name__} at {Path(where.filename).name}:{where.lineno}: {caught}"
        verdict = "traceback"
    line = _PATH.sub(".../", " ".join(got.split()))
    return Outcome(group, case.name, str(case.wanted), verdict, line, round(time.monotonic() - start, 2))


def _judge(wanted: Wanted, said: Said | None, heard: str) -> tuple[Verdict, str]:
    text = heard if said is None else f"{said.text}\n{heard}"
    if said is not None and "Traceback (most recent call last)" in text:
        return "traceback", text[-400:]
    if said is not None and said.status:
        return _judge_error(wanted, text)
    if wanted.kind == "error":
        return "silent", f"no error; said: {text[-300:]}" if text.strip() else "no error, nothing said"
    if missing := _missing(wanted, text):
        return "silent", f"nothing of {missing}; said: {text[-300:]}"
    return "right", text[-400:] if wanted.kind == "warning" else "the right value"


def _judge_error(wanted: Wanted, text: str) -> tuple[Verdict, str]:
    if wanted.kind != "error":
        return "unclear", f"refused: {text[-400:]}"
    if missing := _missing(wanted, text):
        return "unclear", f"does not name {missing}: {text[-400:]}"
    return "right", text[-400:]


def _missing(wanted: Wanted, text: str) -> list[str]:
    flat = " ".join(text.split())
    return [name for name in wanted.names if not re.search(name, flat)]


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    def late(_signum: int, _frame: FrameType | None) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Ears(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self._heard.append(record.getMessage())


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect what is warned of, and what the package logs."""
    heard: list[str] = []
    ears, logger = _Ears(heard), logging.getLogger("selfmask_dist")
    logger.addHandler(ears)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield heard
            heard += [str(entry.message) for entry in caught if _is_ours(entry)]
    finally:
        logger.removeHandler(ears)


def _is_ours(entry: warnings.WarningMessage) -> bool:
    return "selfmask_dist" in entry.category.__module__ or "selfmask_dist" in entry.filename


# ---- commands


def selfmask(*arguments: object) -> Said:
    """Run a command of `selfmask` through its entry point, in this process."""
    from selfmask_dist.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse
            status = ended.code if isinstance(ended.code, int) else 1
        except Exception:
            return Said(1, out.getvalue() + traceback.format_exc())
    return Said(status, out.getvalue())


def shell(command: str, folder: Path, *, seconds: float = 110.0, **variables: str) -> Said:
    """Run a line of a shell in a process of its own, with `selfmask` as the command."""
    selfmask = f"{sys.executable} -m selfmask_dist.cli"
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), **variables}
    done = subprocess.run(
        ["bash", "-c", f'selfmask() {{ {selfmask} "$@"; }}; set -o pipefail; {command}'],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
    return Said(done.returncode, done.stdout + done.stderr)


def told(said: Said, *, status: int = 0) -> Said:
    """Return what a command said, after a check of how it ended."""
    check(said.status == status, f"exit status {said.status}: {said.text[-300:]}")
    return said


def distinct(cases: Sequence[Case]) -> list[Case]:
    """Return cases after a check that their names are all different."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]
    return list(cases)
