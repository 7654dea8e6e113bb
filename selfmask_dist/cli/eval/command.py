"""`selfmask eval RUN|MASK|BUNDLE ... [KIND ...] [key=value ...]`.

Imports torch only when it runs. With several processes (torchrun) each embeds and searches its part.
"""

import argparse
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

EPILOG = """\
kinds: knn, probe, lowshot, zeroshot, labelfree, targets (several labels, numbers: docs/targets.md), all (the
default: whatever the data and the backbone allow).

A RUN is evaluated on its own data, and its embeddings and results stay in its folder. A mask file takes
its backbone's settings from the config.yaml beside it, or from --config and key=value. Several masks or
fine-tuned runs of one backbone are compared, and their mean is measured as well; give --out then.
"""


def add_command(commands: Any) -> None:
    """Add `eval` to the command line."""
    parser = commands.add_parser(
        "eval",
        help="k-NN, probes, low-shot and more of a run, masks or a cascade, from embeddings made once",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RUN|MASK|BUNDLE|KIND|key=value",
        help="folders of runs or mask files; kinds of evaluation; settings over the run's",
    )
    parser.add_argument("--data", metavar="DIR", help="folder with train and test in it (the run's own data)")
    parser.add_argument("--out", metavar="DIR", help="where embeddings/ and eval/ go (beside the subject)")
    parser.add_argument("--config", metavar="FILE", help="YAML file with the backbone's settings")
    parser.add_argument("--k", metavar="N,N", help="neighbours (1,5,10,20,100,200 and eval.knn_k)")
    parser.add_argument(
        "--precision", choices=("float32", "bf16"), default="float32", help="of the search (float32)"
    )
    parser.add_argument(
        "--memory-mib", type=float, metavar="N", help="of the search in MiB (eval.search_mib)"
    )
    parser.add_argument("--tries", type=int, default=5, metavar="N", help="low-shot: draws of a share (5)")
    parser.add_argument(
        "--c", type=float, default=1.0, help="low-shot: strength of regularisation as scikit-learn's C (1)"
    )
    parser.add_argument("--epochs", type=int, default=300, metavar="N", help="probe by SGD: epochs (300)")
    parser.set_defaults(command=_eval)


def _eval(options: argparse.Namespace) -> int:
    from selfmask_dist.cli.eval.kinds import KINDS, EvalOptions
    from selfmask_dist.cli.eval.settings import read_config
    from selfmask_dist.cli.eval.subject import open_subject
    from selfmask_dist.cli.eval.targets import refuse_dense
    from selfmask_dist.parallel import join_world

    paths, kinds, overrides = sort_words(options.words, KINDS)
    config = read_config(paths[0], options.config, overrides, data=options.data)
    refuse_dense(config)
    choices = EvalOptions(
        ks=_numbers(options.k),
        precision=options.precision,
        memory_mib=options.memory_mib or config.eval.search_mib,
        tries=options.tries,
        c=options.c,
        epochs=options.epochs,
    )
    engine = config.engine
    with join_world(engine.device, threads=engine.threads, needs_group=engine.name == "fsdp") as world:
        report = _say if world.is_main else (lambda _: None)
        out = Path(options.out) if options.out else None
        is_changed = bool(options.config) or any(word.startswith("backbone.") for word in overrides)
        subject = open_subject(paths, config, world, out=out, report=report, trusts_files=not is_changed)
        measure_all(subject, kinds, choices, report=report)
    return 0


def measure_all(subject: Any, kinds: Sequence[str], choices: Any, *, report: Any) -> None:
    """Measure each kind, print its table and write its files; without kinds, all that the subject allows."""
    from selfmask_dist.cli.eval.kinds import KINDS
    from selfmask_dist.cli.eval.results import UnavailableError, format_table, join, write_results

    found = []
    for kind in kinds or KINDS:
        started = time.perf_counter()
        try:
            results = KINDS[kind](subject, choices)
        except UnavailableError as error:
            if kinds:
                raise
            report(f"{kind}: left out: {error}")
            continue
        seconds = time.perf_counter() - started
        if subject.world.is_main:
            path = write_results(results, subject, seconds)
            report(f"\n{format_table(results)}\n{path}, {seconds:.1f} s")
        if results.baseline is not None:  # masks are not compared with the frozen backbone
            found.append(results)
    if len(found) > 1:
        report(f"\n{format_table(join(found))}")


def sort_words(words: Sequence[str], kinds: Collection[str]) -> tuple[list[Path], list[str], list[str]]:
    """Return the subjects' paths, the kinds (none stands for all) and the settings among words.

    Raises:
        ValueError: a word is none of them, or there is no subject.
    """
    overrides = [word for word in words if "=" in word]
    rest = [word for word in words if "=" not in word]
    named = [word for word in rest if word in kinds]
    paths = [Path(word) for word in rest if word not in kinds and word != "all"]
    for path in paths:
        if not path.exists():
            raise ValueError(
                f"{path} is neither a file or folder nor a kind of evaluation; kinds are "
                f"{', '.join(kinds)}, all"
            )
    if not paths:
        raise ValueError("name what to evaluate: the folder of a run, or a mask file")
    return paths, [] if "all" in rest else list(dict.fromkeys(named)), overrides


def _numbers(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--k takes numbers with commas between them, got {text!r}") from None


def _say(text: str) -> None:
    print(text, flush=True, file=sys.stdout)
