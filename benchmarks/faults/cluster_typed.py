"""The README's cascade by the command exactly as it is typed, on four virtual nodes; a case of `cluster`.

    python launchers/submit.py --nodes 4 --config configs/cascade_vitb32.yaml

The configuration is the published one, word by word: five experts, eight loading workers, bf16, 256 pictures
a step, `data.train: inat21`. What a place may say stands in a site file: where that data set is (here scanned
digits of 16 pixels), a file of weights for the backbone's name, one process a node, and a tower small enough
for two cores (`backbone.kwargs`, which the published file leaves open). Nothing says how many GPUs a job asks
for: the nodes do. They are empty files, so the processes compute on the CPU.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import Benchmark
from selfmask_dist.cli.demo import NEW_DIGITS, OLD_DIGITS, write_digits
from selfmask_dist.cli.train import run as train
from selfmask_dist.config import load_config
from tests.support import slurm
from tests.support.tiny_run import ROOT, child_environment, events_of, wait_until

COMMAND = ["launchers/submit.py", "--nodes", "4", "--config", "configs/cascade_vitb32.yaml"]
_NAME = "open_clip:ViT-B-32-quickgelu/openai"
_TOWER = (
    "{vision_cfg: {layers: 3, width: 64, head_width: 16, patch_size: 4}, "
    "text_cfg: {layers: 1, width: 32, heads: 2}, embed_dim: 32}"
)
_SITE = """\
backbone: {{image_size: 16, crop_pct: 1.0, kwargs: {tower}}}
engine: {{threads: 1}}
launch: {{processes_per_node: 1, exclusive: true}}
run: {{dir: {runs}}}
site:
  data: {{inat21: {data}}}
  weights: {{"{name}": {weights}}}
"""


def write_site(folder: Path, runs: str = "runs") -> Path:
    """Write pictures, weights and a site file that names them, once; runs go to `folder`/`runs`."""
    for name, digits in (("old", OLD_DIGITS), ("inat21", NEW_DIGITS)):
        if not (folder / "sets" / name / "test").exists():
            write_digits(folder / "pictures" / name, folder / "sets" / name, list(digits))
    weights = folder / "pretrain" / "encoder.safetensors"
    if not weights.exists():
        _pretrain(folder)
    site = folder / f"{runs}.yaml"
    data = folder / "sets" / "inat21"
    site.write_text(_SITE.format(tower=_TOWER, runs=folder / runs, data=data, name=_NAME, weights=weights))
    return site


def _pretrain(folder: Path) -> None:
    """Train the small tower on the other five digits: what is frozen then knows digits."""
    old = folder / "sets" / "old"
    words = [
        *(f"backbone.name={_NAME}", "backbone.pretrained=false", f"backbone.kwargs={_TOWER}"),
        *("backbone.image_size=16", "backbone.crop_pct=1.0", "method=finetune"),
        *(f"data.train={old / 'train'}", f"data.test={old / 'test'}", "data.crop_scale=[0.7, 1.0]"),
        *("data.flip=false", "train.epochs=20", "train.global_batch_size=64", "optim.weight_lr=0.05"),
        *("optim.head_lr=0.05", "optim.warmup_epochs=2", "eval.knn_every=0", "eval.probe=false"),
        *("eval.frozen_baseline=false", "engine.workers=0", "engine.threads=1", "engine.device=cpu"),
        *(f"run.dir={folder}", "run.name=pretrain", "run.progress=false"),
    ]
    train(load_config(None, words))


def launch(site: Path, *options: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Type the command in a checkout, with `options` behind it."""
    return subprocess.run(
        [sys.executable, *COMMAND, *options],
        cwd=ROOT,
        env=child_environment(SELFMASK_SITE=str(site)),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def asked_of_slurm(script: str) -> dict[str, int]:
    """Return the numbers that a batch script asks for, by sbatch's options."""
    return {
        name: int(value) for name, value in re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", script, re.MULTILINE)
    }


def typed(bench: Benchmark, folder: Path) -> None:
    """Run it undisturbed on local processes, and on SLURM with two preemptions, and compare the bundles."""
    calm_site, site = write_site(folder, "calm"), write_site(folder, "stormy")
    calm = launch(calm_site, "--cluster", "local", timeout=2400)
    if calm.returncode:
        raise RuntimeError(calm.stderr[-4000:])
    _asked(bench, folder)
    done = launch(site)
    if done.returncode:
        raise RuntimeError(done.stderr)
    job, run = slurm.submitted_job(done.stdout), folder / "stormy" / "cascade_vitb32"
    bench.figure("typed_gres_of_the_job", slurm.job_field(job, "TresPerNode"))
    bench.figure(
        "typed_job_holds_gpus", float(slurm.job_field(job, "TresPerNode").endswith("gpu:8")), min=1.0
    )
    for stage in ("dispatcher", "expert-1"):
        wait_until(lambda stage=stage: (run / stage / "metrics.jsonl").exists(), 1200)  # type: ignore[misc]
        slurm.preempt(job)
    state = slurm.wait_for_end(job, 2400)
    ended = state == "COMPLETED" and (run / "result.json").exists()
    ours, theirs = (folder / name / "cascade_vitb32" / "cascade.mask" for name in ("stormy", "calm"))
    preempted = {
        path.name: sum(event["event"] == "preempted" for event in events_of(path))
        for path in (run, run / "dispatcher", *(run / f"expert-{k}" for k in range(5)))
    }
    table = (run / "logs" / "rank-0.log").read_text(errors="replace")
    bench.figure("typed_finished", float(ended), min=1.0)
    bench.figure(
        "typed_bundle_bit_identical", float(ended and ours.read_bytes() == theirs.read_bytes()), min=1.0
    )
    bench.figure("typed_table_printed", float("conditional" in table and "frozen" in table), min=1.0)
    bench.figure("typed_preempted", preempted)
    bench.figure("typed_dispatcher_preempted", preempted["dispatcher"], min=1)
    bench.figure("typed_experts_preempted", sum(preempted[f"expert-{k}"] for k in range(5)), min=1)
    bench.figure("typed_views", _views(run) if ended else {})


def _asked(bench: Benchmark, folder: Path) -> None:
    """Record what the batch script asks for where the site says nothing of GPUs, CPUs and processes."""
    plain = folder / "plain.yaml"
    plain.write_text(f"run: {{dir: {folder / 'plain'}}}\n")
    asked = asked_of_slurm(launch(plain, "--dry-run", "--plan-seconds", "0").stdout)
    bench.figure("typed_asked", {key: asked[key] for key in sorted(asked)})
    bench.figure("typed_gpus_asked", asked["gpus-per-node"], min=slurm.GPUS, max=slurm.GPUS)
    bench.figure("typed_processes_asked", asked["ntasks-per-node"], min=slurm.GPUS, max=slurm.GPUS)
    bench.figure("typed_cpus_asked", asked["cpus-per-task"], min=9, max=9)  # eight workers, and the process


def _views(run: Path) -> dict[str, dict[str, float]]:

    views: dict[str, dict[str, float]] = json.loads((run / "result.json").read_text())["views"]
    return views
