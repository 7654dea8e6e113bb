"""What comes of misuse: of the Python interface, commands, data, mask files and the service.

Each case in `benchmarks/faults/misuses` states the outcome that is right before it is tried: it works, with a
value that is checked; an error that names something; or a warning that does. What came of it is one of

    right      the outcome that was stated
    silent     an error or a warning was due and nothing was said, or it worked with a wrong value
    traceback  an exception that nobody meant, or a command that ended in one
    hang       not done by its deadline (a minute, where nothing else is stated)
    unclear    an error that does not name what is wrong, or one where it was to work

Cases of a group run in one process, two groups at a time; a process that hangs or dies is ended and the
group goes on with its next case.

    python -m benchmarks.faults.misuse [--groups settings commands] [--cases WORD] [--quick] --json
"""

import importlib
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.faults.misuses import GROUPS
from benchmarks.faults.misuses.case import VERDICTS, Case, Outcome, distinct, run
from benchmarks.harness import Benchmark
from selfmask_dist.common.text import table

_START_SECONDS = 180.0  # for a process to import torch, on a machine that others use too
_GRACE_SECONDS = 20.0  # beyond a case's own deadline, before its process is ended
_WIDTH = 60


def cases_of(group: str) -> list[Case]:
    """Return the cases of a group; their names are all different."""
    module = importlib.import_module(f"benchmarks.faults.misuses.{GROUPS[group]}")
    return distinct(module.CASES)


def _work(connection: Connection, group: str, names: Sequence[str]) -> None:
    """Run cases of a group in this process, and send the outcome of each."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="disabled")
    cases = {case.name: case for case in cases_of(group)}
    connection.send(None)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="misuse-", ignore_cleanup_errors=True) as folder:
            connection.send(run(cases[name], group, Path(folder)))
    connection.close()


def run_group(group: str, cases: Sequence[Case]) -> list[Outcome]:
    """Return the outcomes of cases of one group, in order."""
    found: list[Outcome] = []
    context = multiprocessing.get_context("spawn")
    while len(found) < len(cases):
        ours, theirs = context.Pipe(duplex=False)
        left = [case.name for case in cases[len(found) :]]
        process = context.Process(target=_work, args=(theirs, group, left))
        process.start()
        theirs.close()
        try:
            if not ours.poll(_START_SECONDS):
                raise RuntimeError(f"the process of {group} does not start")
            ours.recv()
            while len(found) < len(cases) and ours.poll(cases[len(found)].seconds + _GRACE_SECONDS):
                found.append(ours.recv())
                _say(found[-1])
            reason = ("hang", "its process did not answer")
        except EOFError:
            process.join(10)
            reason = ("traceback", f"its process ended with {process.exitcode}")
        if len(found) < len(cases):
            case = cases[len(found)]
            found.append(Outcome(group, case.name, str(case.wanted), *reason, case.seconds))  # type: ignore[arg-type]
            _say(found[-1])
        process.kill()
        process.join()
    return found


def _say(outcome: Outcome) -> None:
    print(f"{outcome.verdict:9s}  {outcome.group}: {outcome.name}", file=sys.stderr, flush=True)


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return a row for each group, and one for each case that is not right."""
    rows = [("group", "cases", *VERDICTS)]
    for group in [*dict.fromkeys(outcome.group for outcome in outcomes), ""]:
        of_group = [outcome for outcome in outcomes if group in ("", outcome.group)]
        counts = Counter(outcome.verdict for outcome in of_group)
        rows.append((group or "all", str(len(of_group)), *(str(counts[name]) for name in VERDICTS)))
    text = table(rows, right=[False, *([True] * (len(VERDICTS) + 1))])
    if wrong := [outcome for outcome in outcomes if outcome.verdict != "right"]:
        listed = [(one.verdict, f"{one.group}: {one.name}", one.wanted, one.got[:_WIDTH]) for one in wrong]
        text += "\n\n" + table([("verdict", "case", "wanted", "got"), *listed], right=False)
    return text


def main() -> int:
    bench = Benchmark("misuse", __doc__)
    bench.parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="all")
    bench.parser.add_argument(
        "--cases", default="", metavar="WORD", help="only those with this in their name"
    )
    options = bench.parse()
    chosen = {}
    for group in options.groups:
        cases = [case for case in cases_of(group) if options.cases in case.name]
        chosen[group] = cases[::15] if options.quick else cases
    chosen = {group: cases for group, cases in chosen.items() if cases}
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run_group, chosen, chosen.values()))
    outcomes = [outcome for result in results for outcome in result]
    print(summary(outcomes), file=sys.stderr, flush=True)
    counts = Counter(outcome.verdict for outcome in outcomes)
    is_whole = not options.cases and len(options.groups) == len(GROUPS)
    bench.figure("cases", len(outcomes), min=70 if is_whole else None, quick=False)
    for verdict in VERDICTS:
        bench.figure(verdict, counts[verdict], max=None if verdict == "right" else 0)
    bench.figure(
        "by_group",
        {g: {v: sum(o.verdict == v for o in outcomes if o.group == g) for v in VERDICTS} for g in chosen},
    )
    bench.figure("not_right", [vars(outcome) for outcome in outcomes if outcome.verdict != "right"])
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
