"""`selfmask config` and `selfmask help`: the configuration of a run, and what its keys mean."""

import argparse
import difflib
import sys
import textwrap
from typing import Any

EPILOG = (
    "`selfmask help` lists the sections of a configuration, `selfmask help optim` the keys of one section, "
    "`selfmask help packnet` what a method reads, and `selfmask help all` every key."
)


def add_commands(commands: Any) -> None:
    """Add `config` and `help` to the command line."""
    command = commands.add_parser(
        "config",
        help="print the resolved configuration",
        description="Print the resolved configuration: every key with its value, and behind it where it was "
        "given if it is not a default: the site's file, the run's file, or the command line.",
        epilog=EPILOG,
    )
    add_settings(command)
    command.set_defaults(command=_config)
    helper = commands.add_parser(
        "help",
        help="what the keys of a configuration mean: all sections, or one section, key or method",
        description="Explain the configuration.",
        epilog=EPILOG,
    )
    helper.add_argument(
        "topic",
        nargs="?",
        metavar="TOPIC",
        help="a section (optim), a key (optim.score_lr), a method (packnet, or method=packnet), or all; "
        "without it, the list of sections",
    )
    helper.set_defaults(command=_help)


def add_settings(command: argparse.ArgumentParser) -> None:
    """Add the arguments of a command that reads a configuration: a file, and settings over it."""
    command.add_argument("--config", metavar="FILE", help="YAML file; without it, the defaults")
    add_site(command)
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings over the file's, for example train.epochs=3",
    )


def add_site(command: argparse.ArgumentParser) -> None:
    """Add the argument that names a site file."""
    command.add_argument(
        "--site",
        metavar="FILE",
        help="what this place says once for all its runs, below their own configuration; without it, "
        "$SELFMASK_SITE, ./site.yaml or ~/.config/selfmask/site.yaml; none: none",
    )


def _config(options: argparse.Namespace) -> None:
    from selfmask_dist.config import to_yaml
    from selfmask_dist.config.config import load_with_places
    from selfmask_dist.config.conflicts.unread import unread
    from selfmask_dist.config.site import find_site

    config, places = load_with_places(options.config, options.overrides, site=find_site(options.site))
    print(to_yaml(config, places), end="")
    for note in unread(config, options.overrides):
        print(f"note: {note}", file=sys.stderr)


def _help(options: argparse.Namespace) -> None:
    print(explain(options.topic).rstrip("\n"))


def explain(topic: str | None) -> str:
    """Return the help on a section, a key or a method; on all sections in a line each for None.

    Raises:
        ValueError: there is no such topic; the message names the nearest ones.
    """
    from selfmask_dist.config import Config
    from selfmask_dist.config import help as config_help

    if topic is None:
        lines = [*textwrap.wrap(f"Methods: {', '.join(methods())}.", 100), "", *textwrap.wrap(EPILOG, 100)]
        return "\n".join([config_help.overview(Config), "", *lines])
    if topic == "all":
        return config_help.describe(Config)
    name = topic.removeprefix("method=")
    sections, keys = config_help.sections(Config), [key for key, _ in config_help.fields(Config)]
    is_method = name in methods() and (name != topic or name not in sections)
    if not is_method and name in sections:
        inside = [key for key in keys if key.startswith(f"{name}.")]
        also = (
            f"\nThere is a method of this name too: selfmask help method={name}\n"
            if name in methods()
            else ""
        )
        return f"{name}: {sections[name]}\n\n{config_help.describe_keys(Config, inside)}{also}"
    if is_method:
        return _explain_method(name)
    if topic in keys:
        return config_help.describe_keys(Config, [topic])
    near = difflib.get_close_matches(topic, [*sections, *keys, *methods()], n=4, cutoff=0.5)
    inside = [key for key in keys if key.endswith(f".{topic}")]  # score_lr: optim.score_lr
    hint = f"did you mean {' or '.join(dict.fromkeys([*inside, *near][:4]))}?" if inside or near else ""
    raise ValueError(f"there is no help on {topic!r}; {hint or 'selfmask help lists the sections'}")


def methods() -> list[str]:
    """Return the values that `method` takes."""
    from selfmask_dist.config.conflicts.unread import READS
    from selfmask_dist.config.procedures import PROCEDURES

    return [*READS, *PROCEDURES]


def _explain_method(name: str) -> str:
    """Return the sections that a method reads, and the keys that are for it alone."""
    from selfmask_dist.config import Config
    from selfmask_dist.config import help as config_help
    from selfmask_dist.config.conflicts.unread import ALWAYS, READS
    from selfmask_dist.config.procedures import PROCEDURES, ProcedureConfig, trained_by

    stage = trained_by(ProcedureConfig(), name)
    reads = [*ALWAYS, *READS[stage], *(["procedure"] if name in PROCEDURES else [])]
    table = [
        f"  {section:12s}{meaning}"
        for section, meaning in config_help.sections(Config).items()
        if section in reads
    ]
    intro = f"method={name} reads these sections"
    if name in PROCEDURES:
        intro = f"method={name} is a chain of runs of method={stage}, and reads these sections"
    if "simclr" in reads:
        intro += "; of those of the objectives, the one that objective.name names"
    own = config_help.named_by(Config, name) if name in PROCEDURES else []
    parts = [config_help.describe_keys(Config, ["method"]), f"{intro}:\n", *table]
    if own:
        parts += ["\nKeys that are for it:\n", config_help.describe_keys(Config, own)]
    return "\n".join(parts)


def add_site_command(commands: Any) -> None:
    """Add `site` to the command line."""
    command = commands.add_parser(
        "site",
        help="write or show the site file: partition, GPUs, data sets and folders, said once for all runs",
        description="The site file holds what this place says once for all of its runs.",
    )
    command.add_argument(
        "action", choices=("init", "show"), help="init: write one by looking; show: print it"
    )
    command.add_argument(
        "--out",
        metavar="FILE",
        help="of init: where to (~/.config/selfmask/site.yaml); - for standard output",
    )
    command.set_defaults(command=_site)


def _site(options: argparse.Namespace) -> None:
    from pathlib import Path

    from selfmask_dist.common.files import write_text
    from selfmask_dist.common.shipped import shipped_module
    from selfmask_dist.config.site import config_home, find_site

    if options.action == "show":
        site = find_site()
        if site.path is None:
            raise ValueError("there is no site file; `selfmask site init` writes one")
        print(f"# {site.path}\n{site.path.read_text()}", end="")
        return
    text = shipped_module("launchers.site").describe_site()
    if options.out == "-":
        print(text, end="")
        return
    path = Path(options.out) if options.out else config_home()
    if path.exists():
        raise ValueError(f"{path} is there already; change it, or write to another file with --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    print(f"{path}\n\n{text}", end="")
