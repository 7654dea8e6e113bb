"""The command line: `selfmask adapt | launch | train | eval | config | configs | site | help | plan |
inspect | report | mask | embed | serve | data | status | logs | checkpoints | demo`.

A module of `cli` adds its commands to the parser and imports what a command needs (torch, the configuration)
only when it runs, so that `--help` answers at once.
"""

import argparse
import io
import os
import select
import sys
from collections.abc import Sequence
from typing import Any

from selfmask_dist.cli import adapt as adapt_command
from selfmask_dist.cli import config as config_command
from selfmask_dist.cli import configs as configs_command
from selfmask_dist.cli import data as data_command
from selfmask_dist.cli import demo as demo_command
from selfmask_dist.cli import eval as eval_command
from selfmask_dist.cli import launch as launch_command
from selfmask_dist.cli import mask as mask_command
from selfmask_dist.cli import plan as plan_command
from selfmask_dist.cli import report as report_command
from selfmask_dist.cli import serve as serve_command
from selfmask_dist.cli import status as status_command
from selfmask_dist.cli import whole_models as whole_models_command
from selfmask_dist.cli.errors import explain

_BROKEN_PIPE = 128 + 13  # what a shell reports of a program that the signal SIGPIPE ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; an error that a user can mend is one line, no traceback."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest:  # argparse ends a list of words at the first option; those after it belong to it too
        place = next((name for name in ("words", "overrides") if hasattr(options, name)), None)
        if place is None or any(word.startswith("-") for word in rest):
            parser.error(_unrecognized(rest))
        setattr(options, place, [*getattr(options, place), *rest])
    try:
        code = int(options.command(options) or 0)
        if sys.stdout is not None:  # closed by the caller
            # a reader that has gone away is found out here, not while Python shuts down
            sys.stdout.flush()
        return code
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return _BROKEN_PIPE
        if (told := explain(error)) is None:
            raise
        status, message = told
        return _fail(message, status)
    except KeyboardInterrupt:
        return 130


def _unrecognized(words: Sequence[str]) -> str:
    from selfmask_dist.config import Config
    from selfmask_dist.config import help as config_help

    return config_help.unrecognized(words, Config)


def _fail(message: str, code: int) -> int:
    from selfmask_dist.cli.train import process_name

    print(f"{process_name()}{message}", file=sys.stderr)
    return code


def _reader_is_gone() -> bool:
    """Return whether nobody reads standard output any more, as after `selfmask inspect X | head`."""
    try:
        output = sys.stdout.fileno()
    except io.UnsupportedOperation:  # replaced by a stream without a file, as in a notebook
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    # what is still in the buffer goes nowhere; else Python would complain when it flushes at exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


class _Once(argparse._StoreAction):
    """Take an option's value, and refuse a second one: the first would be passed over without a word."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        seen = namespace.__dict__.setdefault("_seen", set())
        if option_string is not None and self.dest in seen:
            parser.error(f"{option_string} is given twice; it takes one value")
        seen.add(self.dest)
        super().__call__(parser, namespace, values, option_string)


class _Parser(argparse.ArgumentParser):
    """A parser, and those of its commands, in which an option is given once; lists take several values."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)


class _Version(argparse.Action):
    """Print the version, which is looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from selfmask_dist import __version__

        print(f"selfmask_dist {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="selfmask", description="Self-Masking Networks: one frozen backbone, many masks.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands: Any = parser.add_subparsers(required=True, metavar="COMMAND")
    adapt_command.add_command(commands)
    launch_command.add_command(commands)
    _add_train(commands)
    config_command.add_commands(commands)
    configs_command.add_command(commands)
    config_command.add_site_command(commands)
    mask_command.add_inspect(commands)
    mask_command.add_command(commands)
    whole_models_command.add_commands(commands)
    serve_command.add_commands(commands)
    eval_command.add_command(commands)
    status_command.add_commands(commands)
    report_command.add_command(commands)
    plan_command.add_command(commands)
    data_command.add_command(commands)
    demo_command.add_command(commands)
    return parser


def _add_train(commands: Any) -> None:
    command = commands.add_parser(
        "train",
        help="train masks (or a baseline) in this process; `selfmask launch` starts several",
        description="Train masks (or a baseline) in this process; `selfmask launch` starts several.",
        epilog=config_command.EPILOG,
    )
    config_command.add_settings(command)
    command.add_argument(
        "--part",
        metavar="PART",
        help="of a cascade, only this: router (and all before it), expert-0, expert-1, ..., "
        "combination (and all after it)",
    )
    command.set_defaults(command=_train)


def _train(options: argparse.Namespace) -> int:
    from selfmask_dist.cli.train import train  # reads the configuration's classes, which takes a second

    return train(options)
