"""The README's command on a real SLURM of four virtual nodes: a whole cascade, preempted in the middle.

`configs/cascade_vitb32.yaml` with a small backbone, few steps and real scanned digits runs once undisturbed
on local processes, and once on the cluster, where a job of a higher partition takes its nodes while the
dispatcher trains and while the experts do. Both must end with the same file, bit for bit.

    python benchmarks/cascade_slurm.py [--quick] --json
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.cascade_real import COMMON, DIGITS, digits_settings
from benchmarks.harness import Benchmark
from tests import slurm
from tests.tiny_run import ROOT, events_of, submit, wait_until

CONFIG = ROOT / "configs" / "cascade_vitb32.yaml"
# the config's own values that a CPU and 16 pixels cannot have
SMALL = ["engine.precision=float32", "engine.device=cpu", "engine.threads=1", "swav.freeze_steps=0"]
SMALL += ["mask.split_qkv=false", "swav.queue_length=64", "eval.knn_every=0", "cascade.clusters=[4]"]
SMALL += ["swav.queue_start_epoch=1", "backbone.pretrained=false"]


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
        base = [*digits_settings(folder), *COMMON, *DIGITS, *SMALL]
        base += [f"train.epochs={epochs}", f"run.dir={folder}", "launch.snapshot=false"]
        calm = submit(CONFIG, *base, "run.name=calm", nodes=options.nodes, timeout=1200)
        if calm.returncode:
            raise RuntimeError(calm.stderr)
        start = time.perf_counter()
        stormy([*base, "run.name=stormy"], folder / "stormy", options.nodes)
        seconds = time.perf_counter() - start
        runs = [folder / "calm", folder / "stormy"]
        bundles = [run / "cascade.mask" for run in runs]
        finished = (runs[1] / "result.json").exists()
        same = finished and bundles[0].read_bytes() == bundles[1].read_bytes()
        stages = [runs[1], runs[1] / "dispatcher", *(runs[1] / f"expert-{k}" for k in range(4))]
        preempted = {stage.name: sum(e["event"] == "preempted" for e in events_of(stage)) for stage in stages}
        bench.figure("finished", float(finished), min=1.0)
        bench.figure("bundle_bit_identical", float(same), min=1.0)
        bench.figure("preempted", preempted)
        bench.figure("preempted_stages", sum(count > 0 for count in preempted.values()), min=2)
        bench.figure("seconds", seconds)
        bench.figure("views", json.loads((runs[1] / "result.json").read_text())["views"] if finished else {})
    if not was_up:
        slurm.down()
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
