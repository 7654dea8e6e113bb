"""The README's command on a real SLURM of four virtual nodes: a whole cascade, preempted in the middle.

`configs/cascade_vitb32.yaml` with a small backbone, few steps and real scanned digits runs once undisturbed
on local processes, and once on the cluster, where a job of a higher partition takes its nodes while the
dispatcher trains and while the experts do. Both must end with the same file, bit for bit. Then the same with
`--experts-array`, as three jobs of two nodes: the middle one is an array with a task for each expert, two of
which are preempted.

    python benchmarks/faults/cascade_slurm.py [--quick] --json
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.cascade.real import COMMON, OF_OBJECTIVE, digits_settings
from benchmarks.harness import Benchmark
from tests.support import slurm
from tests.support.tiny_run import ROOT, events_of, submit, wait_until

CONFIG = ROOT / "configs" / "cascade_vitb32.yaml"
# the config's own values that a CPU and 16 pixels cannot have
SMALL = ["engine.precision=float32", "engine.device=cpu", "engine.threads=1", "train.global_batch_size=64"]
SMALL += ["mask.split_qkv=false", "nbd.dim=16", "nbd.warmup_steps=10", "eval.knn_every=0"]
SMALL += ["cascade.clusters=[4]", "backbone.pretrained=false", "optim.warmup_epochs=0"]


def array(overrides: list[str], run: Path) -> None:
    """As three jobs on SLURM, the experts two at a time; two of them are preempted."""
    options = ["--experts-array", "launch.exclusive=true"]
    done = submit(CONFIG, *options, *overrides, nodes=2, cluster="slurm")
    if done.returncode:
        raise RuntimeError(done.stderr)
    experts = slurm.submitted_job(done.stdout, "expert-0")
    for name in ("expert-0", "expert-1"):
        wait_until(lambda name=name: (run / name / "metrics.jsonl").exists(), 1200)  # type: ignore[misc]
    slurm.preempt(f"{experts}_0", f"{experts}_1", seconds=600)  # the other two may come first
    slurm.wait_for_end(slurm.submitted_job(done.stdout, "combination"), 1200)


def stormy(overrides: list[str], run: Path, nodes: int) -> None:
    """On SLURM, preempted while the dispatcher and while the experts train."""
    done = submit(CONFIG, *overrides, "launch.exclusive=true", nodes=nodes, cluster="slurm")
    if done.returncode:
        raise RuntimeError(done.stderr)
    job = slurm.submitted_job(done.stdout)
    for name in ("dispatcher", "expert-1"):
        wait_until(lambda name=name: (run / name / "metrics.jsonl").exists(), 600)  # type: ignore[misc]
        time.sleep(1.0)
        slurm.preempt(job)
    slurm.wait_for_end(job, 1200)


def preemptions(run: Path) -> dict[str, int]:
    """How often each of a cascade's trainings, and the rest of it, was preempted."""
    stages = [run, run / "dispatcher", *(run / f"expert-{k}" for k in range(4))]
    return {stage.name: sum(event["event"] == "preempted" for event in events_of(stage)) for stage in stages}


def main() -> int:
    bench = Benchmark("cascade_slurm", __doc__)
    bench.parser.add_argument("--nodes", type=int, default=4)
    bench.parser.add_argument("--epochs", type=float, default=4)
    options = bench.parse()
    if reason := slurm.why_not():
        bench.skip(reason)
        return bench.finish()
    was_up = slurm.is_up()
    os.environ["SLURM_CONF"] = str(slurm.up())
    epochs = 2.0 if options.quick else options.epochs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = [*digits_settings(folder), *COMMON, *OF_OBJECTIVE["nbd"]["digits"], *SMALL]
        base += [f"train.epochs={epochs}", f"run.dir={folder}", "launch.snapshot=false"]
        for name, nodes in (("calm", options.nodes), ("calm-two", 2)):
            in_turn = ["cascade.expert_groups=1"] if nodes == 2 else []
            calm = submit(CONFIG, *base, *in_turn, f"run.name={name}", nodes=nodes, timeout=1200)
            if calm.returncode:
                raise RuntimeError(calm.stderr)
        start = time.perf_counter()
        stormy([*base, "run.name=stormy"], folder / "stormy", options.nodes)
        seconds = time.perf_counter() - start
        array([*base, "run.name=array"], folder / "array")
        runs = [folder / "calm", folder / "stormy"]
        bundles = [run / "cascade.mask" for run in runs]
        finished = (runs[1] / "result.json").exists()
        same = finished and bundles[0].read_bytes() == bundles[1].read_bytes()
        preempted = preemptions(runs[1])
        bench.figure("finished", float(finished), min=1.0)
        bench.figure("bundle_bit_identical", float(same), min=1.0)
        bench.figure("preempted", preempted)
        bench.figure("preempted_stages", sum(count > 0 for count in preempted.values()), min=2)
        pair = [folder / name / "cascade.mask" for name in ("calm-two", "array")]
        is_done = (folder / "array" / "result.json").exists()
        same = is_done and pair[0].read_bytes() == pair[1].read_bytes()
        bench.figure("array_finished", float(is_done), min=1.0)
        bench.figure("array_bundle_bit_identical", float(same), min=1.0)
        in_array = preemptions(folder / "array")
        bench.figure("array_preempted", in_array)
        bench.figure("array_tasks_preempted", sum(count > 0 for count in in_array.values()), min=2)
        bench.figure("seconds", seconds)
        bench.figure("views", json.loads((runs[1] / "result.json").read_text())["views"] if finished else {})
    if not was_up:
        slurm.down()
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
