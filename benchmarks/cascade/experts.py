"""How busy experts keep the processes, by the plan and measured, with clusters of very different sizes.

Plan: clusters of random sizes (Dirichlet, as skewed as 1 : 1000), 1 to 64 processes. Measured: four experts
on two groups of one process each; pictures of four colours, half of them of one. `equal_steps` is the paper's
rule, by which an expert of a small cluster trains as long as one of a large; with `equal_epochs` their
times differ and the longest comes first.

    python benchmarks/cascade/experts.py [--quick] --json
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Benchmark
from selfmask_dist.cascade.plan import choose_num_groups, expert_epochs, share_out, utilisation
from tests.support.cascade_cases import settings, write_shards
from tests.support.tiny_run import events_of, submit

_SAMPLES, _BATCH, _EPOCHS = 50_000, 64, 150
_KINDS = ("equal_steps", "equal_epochs")


def simulate(kind: str, plans: int) -> dict[str, Any]:
    """Busy shares of random plans, and what share of them trains experts side by side."""
    rng = np.random.default_rng(0)
    busy, at_once, steps = [], 0, []
    for _ in range(plans):
        num_experts, world_size = int(rng.integers(2, 9)), int(2 ** rng.integers(0, 7))
        shares = rng.dirichlet(np.full(num_experts, 0.5))
        sizes = np.maximum(np.round(shares * _SAMPLES), _BATCH).astype(int)
        total = int(sizes.sum())
        costs = [expert_epochs(total, s, _EPOCHS, kind=kind) * np.ceil(s / _BATCH) for s in sizes.tolist()]
        number = choose_num_groups(costs, world_size, _BATCH)
        busy.append(utilisation(costs, share_out(costs, number)))
        at_once += number > 1
        steps.append(max(costs) / min(costs))
    return {
        "busy at least": min(busy),
        "busy on average": statistics.mean(busy),
        "plans side by side": at_once / plans,
        "longest expert / shortest, median": statistics.median(steps),
    }


def measure(folder: Path, shards: Path, kind: str, epochs: float) -> dict[str, Any]:
    """One cascade on two processes: the share of their time from the first expert's start to the last one's
    end that they spend within an expert's run."""
    name = f"run.name={kind}"
    more = ["cascade.clusters=[4]", "cascade.router=kmeans", "cascade.expert_groups=2", "eval.probe=false"]
    more += [f"cascade.expert_epochs={kind}", f"train.epochs={epochs}", "launch.snapshot=false", name]
    config = folder / "empty.yaml"
    config.write_text("{}\n")
    done = submit(config, *settings(shards, folder, *more), nodes=2, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr)
    run = folder / kind
    planned = next(event for event in events_of(run) if event["event"] == "experts")
    spans = []
    for k in range(4):
        times = {event["event"]: event["time"] for event in events_of(run / f"expert-{k}")}
        spans.append((times["start"], times["end"]))
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    steps = [json.loads((run / f"expert-{k}" / "result.json").read_text())["steps"] for k in range(4)]
    return {
        "clusters": planned["sizes"],
        "steps": steps,
        "groups": planned["groups"],
        "busy by the plan": utilisation(planned["steps"], planned["groups"]),
        "busy measured": sum(end - start for start, end in spans) / (2 * whole),
        "seconds": whole,
    }


def main() -> int:
    bench = Benchmark("cascade_experts", __doc__)
    options = bench.parse()
    plans, epochs = (100, 4.0) if options.quick else (2000, 40.0)
    for kind in _KINDS:
        for name, value in simulate(kind, plans).items():
            bench.figure(f"{kind}, plans: {name}", value, min=0.9 if name == "busy at least" else None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_shards(folder, train=512)
        for kind in _KINDS:
            for what, value in measure(folder, shards, kind, epochs).items():
                target = 0.9 if what == "busy measured" else None
                bench.figure(f"{kind}, two groups: {what}", value, min=target, quick=False)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
