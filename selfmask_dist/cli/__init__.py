"""The command line: `selfmask launch | train | eval | config | configs | plan | inspect | report | mask | embed |
serve | data | status | logs | checkpoints | demo`.

Imports what a command needs only when it runs, so that `--help` answers at once.
"""

import argparse
import errno
import sys
from collections.abc import Sequence

from selfmask_dist.cli import configs, data, launch, report
from selfmask_dist.cli import eval as eval_command
from selfmask_dist.cli import mask as mask_command
from selfmask_dist.cli import serve as serve_command
from selfmask_dist.cli.train import process_name, train
from selfmask_dist.config import describe, load_config, to_yaml
from selfmask_dist.runs import exit_status, status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(options, "words")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse ends a list of words at the first option; those after it belong to it too
        options.words += rest
    try:
        return int(options.command(options) or 0)
    except (ValueError, FileNotFoundError) as error:
        print(f"{process_name()}error: {error}", file=sys.stderr)
        return exit_status.BAD_INPUT
    except ArithmeticError as error:  # training diverged: the message says it all
        print(f"{process_name()}stopped: {error}", file=sys.stderr)
        return exit_status.DIVERGED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"{process_name()}error: {error}; make room and go on with run.resume=true", file=sys.stderr)
        return exit_status.BAD_INPUT
    except KeyboardInterrupt:
        return 130


def _config(options: argparse.Namespace) -> None:
    print(to_yaml(load_config(options.config, options.overrides)), end="")


def _inspect(options: argparse.Namespace) -> None:
    from selfmask_dist.maskfile import describe_file

    if len(options.paths) == 1:
        print(describe_file(options.paths[0]))
        return
    from selfmask_dist.maskfile.tools.comparison import masks, read_subjects, table

    print(table(masks(read_subjects(options.paths))))


def _plan(options: argparse.Namespace) -> None:
    from selfmask_dist.cli.plan import Hardware, describe

    given = ("nodes", "gpus_per_node", "memory_gib", "tflops", "within_node_gbs", "between_nodes_gbs")
    hardware = Hardware(**{name: getattr(options, name) for name in given})
    print(describe(load_config(options.config, options.overrides), hardware))


def _demo(options: argparse.Namespace) -> int:
    from selfmask_dist.cli.demo import run_demo

    return run_demo(options.out, num_processes=options.processes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selfmask", description="Self-Masking Networks: one frozen backbone, many masks."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, function, help in (
        ("train", train, "train masks (or a baseline) in this process; `selfmask launch` starts several"),
        ("config", _config, "print the resolved configuration"),
    ):
        command = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=describe(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--config", metavar="FILE", help="YAML file; without it, the defaults")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="settings over the file's, see below"
        )
        if function is train:
            command.add_argument(
                "--part",
                metavar="PART",
                help="of a cascade, only this: router (and all before it), expert-0, expert-1, ..., "
                "combination (and all after it)",
            )
        command.set_defaults(command=function)
    inspect = commands.add_parser(
        "inspect", help="show what a mask file holds, or how alike several masks are"
    )
    inspect.add_argument(
        "paths", nargs="+", metavar="FILE", help="mask files; of several, also runs' folders"
    )
    inspect.set_defaults(command=_inspect)
    mask_command.add_command(commands)
    serve_command.add_commands(commands)
    eval_command.add_command(commands)
    status.add_commands(commands)
    report.add_command(commands)
    plan = commands.add_parser("plan", help="memory, traffic and time of each engine, reckoned without a GPU")
    plan.add_argument("--config", metavar="FILE", help="YAML file; without it, the defaults")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="settings over the file's")
    for name, kind, default, meaning in (
        ("nodes", int, 1, "machines"),
        ("gpus-per-node", int, 1, "GPUs in each"),
        ("memory-gib", float, 80.0, "memory of a GPU"),
        ("tflops", float, 300.0, "TFLOP/s that training reaches on one"),
        ("within-node-gbs", float, 300.0, "GB/s that one sends inside a node"),
        ("between-nodes-gbs", float, 25.0, "GB/s that one sends to other nodes"),
    ):
        help = f"{meaning} ({default:g})"
        plan.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=help)
    plan.set_defaults(command=_plan)
    data.add_command(commands)
    launch.add_command(commands)
    configs.add_command(commands)
    demo = commands.add_parser(
        "demo", help="learn a mask on real scanned digits, with two processes, in minutes"
    )
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="where everything goes (runs/demo)")
    demo.add_argument("--processes", type=int, default=2, metavar="N", help="training processes (2)")
    demo.set_defaults(command=_demo)
    return parser

