"""A ViT-H/14 through its whole life on one machine of 24 GB, each stage by the project's own commands.

632 million random weights in a file, pictures of 28 and 14 pixels, processes over gloo with engine=fsdp:

    train     four processes, SwAV on two resolutions; the launcher gets SIGTERM in its second step, all save
    resume    two processes go on to the end and leave the mask file and its k-NN
    verify    `selfmask mask verify`
    cascade   four processes: a dispatcher, two experts, their bundle
    embed     four processes, `selfmask eval` of the bundle: every view embeds all pictures

Polled is the anonymous memory (RssAnon) of every rank, all through; pages of the weights' file are not in it,
as the system takes them back when memory is short. What Python and its libraries take is none of the
planner's numbers: compared is by how much a rank grows from a tenth of the depth to the whole depth, with by
how much the plan says. Where the memory that is free does not hold the whole depth, it is cut, to 400 million
weights at least, and `arithmetic` says why. At a tenth of the depth the same run is made without shards by
one process, and masks are compared bit by bit.

    python -m benchmarks.parallel.huge [--quick] [--memory-gib N] --json
"""

import json
import multiprocessing
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import GIB, Benchmark
from benchmarks.parallel.polling import available_bytes, command
from selfmask_dist.cli.plan.hardware import Hardware
from selfmask_dist.cli.plan.model_size import ModelSize
from selfmask_dist.cli.plan.stages import reckon_evaluating, reckon_saving
from selfmask_dist.cli.plan.steps import Estimate, estimate, measure
from selfmask_dist.config import Config, load_config
from selfmask_dist.maskfile import read_mask_file
from tests.support.tiny_run import (
    events_of,
    steps_of,
    submit_command,
    write_config,
    write_tiny_data,
)

MODEL, DEPTH, TENTH = "vit_huge_patch14_clip_224", 32, 3
LEAST_WEIGHTS = 400e6
RANKS, RESUME_RANKS, STEPS, STOP_AFTER = 4, 2, 3, 1
PICTURES = {"train": 48, "test": 16}
PROCESS_GIB = 0.5  # Python, torch, gloo's buffers and activations of a process, for the choice of the depth
WITHIN = 0.10  # of the planner's number
SETTINGS: dict[str, Any] = {
    "objective": {"name": "swav"},
    "crops": {"global_size": 28, "local_size": 14, "local_count": 2, "blur": 0},
    "swav": {"prototypes": 16, "dim": 32},
    "train": {"epochs": 1, "global_batch_size": 8, "max_steps": STEPS},
    "optim": {"score_lr": 5000.0},
    "eval": {"knn_k": [5], "knn_every": 0, "frozen_baseline": False, "probe": False, "retrieval": False},
    "engine": {"name": "fsdp", "device": "cpu", "workers": 0, "threads": 1},
    "checkpoint": {"every_minutes": 0, "keep_last": 1, "stop_seconds": 1200},
    "launch": {"snapshot": False, "max_restarts": 0},
    "cascade": {"clusters": [2], "components": 4, "combinations": ["conditional"]},
    "run": {"log_every": 1},
}


# ---- what is run


def write_weights(path: Path, depth: int) -> None:
    """Write a file of random weights, in a process of its own that gives its memory back."""
    process = multiprocessing.get_context("spawn").Process(target=_write_weights, args=(str(path), depth))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the weights could not be written: status {process.exitcode}")


def _write_weights(path: str, depth: int) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    with torch.device("meta"):  # timm's own first values take minutes
        model = timm.create_model(MODEL, num_classes=0, depth=depth, img_size=28)
    state = {name: torch.empty(one.shape) for name, one in model.state_dict().items()}
    for name, tensor in state.items():
        if tensor.ndim > 1:
            tensor.uniform_(-0.035, 0.035)  # a standard deviation of 0.02
        else:
            tensor.fill_(float("norm" in name and name.endswith("weight")))
    save_file(state, path)


def write_settings(folder: Path, data: dict[str, str], depth: int) -> Path:
    backbone = {
        "name": f"timm:{MODEL}",
        "weights": str(folder / f"weights-{depth}.safetensors"),
        "image_size": 28,
        "crop_pct": 1.0,
        "kwargs": {"depth": depth},
    }
    folder.mkdir(parents=True, exist_ok=True)
    return write_config(folder / f"depth-{depth}.yaml", data, backbone=backbone, **SETTINGS)


# ---- a life


@dataclass
class Stage:
    """What a stage took: seconds, each rank's highest anonymous bytes, and the least memory left."""

    seconds: float
    peaks: dict[int, int]
    available: float


class Record:
    """The stages of all depths as they are done, in a file, so that an interrupted benchmark goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._all: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __contains__(self, key: str) -> bool:
        return key in self._all

    def __getitem__(self, key: str) -> Any:
        return self._all[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._all[key] = value
        self._path.write_text(json.dumps(self._all, indent=1))

    def add(self, depth: int, name: str, stage: Stage) -> None:
        mib = {rank: peak >> 20 for rank, peak in sorted(stage.peaks.items())}
        left = stage.available / GIB
        print(
            f"{depth} {name}: {stage.seconds:.0f} s, MiB {mib}, left {left:.1f}", file=sys.stderr, flush=True
        )
        self[f"{depth}/{name}"] = asdict(stage)

    def stages(self, depth: int) -> dict[str, Stage]:
        found = {key.partition("/")[2]: one for key, one in self._all.items() if key.startswith(f"{depth}/")}
        return {
            name: Stage(one["seconds"], {int(r): v for r, v in one["peaks"].items()}, one["available"])
            for name, one in found.items()
        }


def train_and_resume(config: Path, depth: int, record: Record) -> None:
    run, words = config.parent / "life", ["run.name=life"]
    if f"{depth}/train" not in record:
        shutil.rmtree(run, ignore_errors=True)
        watch, seconds, _ = command(
            submit_command(config, *words, nodes=RANKS),
            stop_when=lambda: max(steps_of(run), default=0) >= STOP_AFTER,
        )
        if not any(event["event"] == "preempted" for event in events_of(run)):
            raise RuntimeError(f"{run} was not preempted")
        record.add(depth, "train", Stage(seconds, watch.peak(), watch.least_available))
    if f"{depth}/resume" not in record:
        watch, seconds, _ = command(submit_command(config, *words, "run.resume=true", nodes=RESUME_RANKS))
        verify(run / "final.mask")
        shutil.rmtree(run / "checkpoints")
        record.add(depth, "resume", Stage(seconds, watch.peak(), watch.least_available))


def cascade_and_embed(config: Path, depth: int, record: Record) -> None:
    run, words = config.parent / "cascade", ["run.name=cascade", "method=cascade", "train.max_steps=1"]
    if f"{depth}/bundle" not in record:
        shutil.rmtree(run, ignore_errors=True)
        watch, _, status = command(submit_command(config, *words, nodes=RANKS), stop_when=lambda: False)
        if status:  # somebody else on this machine stopped it
            print("stopped from outside, goes on", file=sys.stderr, flush=True)
            more, _, _ = command(submit_command(config, *words, "run.resume=true", nodes=RANKS))
            watch.samples += more.samples
        verify(run / "cascade.mask")
        for part, (begin, end) in spans_of(run).items():
            peaks = watch.peak(begin, end, after_lowest=part.startswith("embed"))
            record.add(depth, part, Stage(end - begin, peaks, watch.least_available))
        record[f"bundle of {depth}"] = json.loads((run / "result.json").read_text())["mask"]
    if f"{depth}/embed" not in record:
        shutil.rmtree(run / "again", ignore_errors=True)
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={RANKS}",
        ]
        bundle = [str(run / "cascade.mask"), "knn", "--k", "5", "--out", str(run / "again")]
        watch, seconds, _ = command([*torchrun, "-m", "selfmask_dist.cli", "eval", *bundle])
        record.add(depth, "embed", Stage(seconds, watch.peak(), watch.least_available))


def verify(path: Path) -> None:
    command([sys.executable, "-m", "selfmask_dist.cli", "mask", "verify", str(path)])


def spans_of(run: Path) -> dict[str, tuple[float, float]]:
    """Return begin and end of each stage of a cascade, as its events have them."""
    times = {(e["event"], e.get("stage"), e.get("what")): e["time"] for e in events_of(run)}
    own = {part: events_of(run / part) for part in ("dispatcher", "expert-0", "expert-1")}
    spans = {part: (events[0]["time"], events[-1]["time"]) for part, events in own.items()}
    spans["embed dispatcher"] = (spans["dispatcher"][1], times["stage", "embedded", "dispatcher"])
    trained = max(spans["expert-0"][1], spans["expert-1"][1])
    spans["embed experts"] = (trained, times["stage", "embedded", "expert-1"])
    combined = max(t for (name, stage, _), t in times.items() if stage == "combined")
    spans["bundle"] = (combined, max(times.values()))
    return spans


# ---- against the plan


@dataclass(frozen=True)
class Plan:
    """The planner's numbers for one depth."""

    config: Config
    size: ModelSize
    image_size: int

    @staticmethod
    def of(path: Path) -> "Plan":
        config = load_config(path)
        return Plan(config, *measure(config))

    def engine(self, ranks: int) -> Estimate:
        hardware = Hardware(gpus_per_node=ranks, pictures=PICTURES["train"])
        estimates = estimate(self.size, self.config, hardware, image_size=self.image_size)
        return next(one for one in estimates if one.engine == "fsdp")

    def step(self, ranks: int) -> float:
        """Bytes of a rank in a run without saves on the way: of a step, or of the save behind it."""
        engine = self.engine(ranks)
        hardware = Hardware(gpus_per_node=ranks, pictures=PICTURES["train"])
        staged = reckon_saving(self.size, self.config, hardware, 1.0).of_rank
        return max(engine.memory, engine.weights + engine.scores + engine.momentum + staged)

    def embedding(self, ranks: int) -> float:
        hardware = Hardware(gpus_per_node=ranks, pictures=PICTURES["train"])
        return reckon_evaluating(self.size, self.config, hardware, self.engine(ranks)).memory

    def of_stage(self, stage: str) -> float:
        if stage in ("embed", "embed dispatcher", "embed experts"):
            return self.embedding(RANKS)
        return self.step(RESUME_RANKS if stage == "resume" else RANKS)


def choose_depth(folder: Path, data: dict[str, str], memory_gib: float, given: int | None) -> tuple[int, str]:
    """Return the most blocks that fit, or those that are given, and how that was reckoned.

    Raises:
        RuntimeError: less than `LEAST_WEIGHTS` would fit.
    """
    depth = given or DEPTH
    while True:
        plan = Plan.of(write_settings(folder, data, depth))
        weights = plan.size.masked + plan.size.frozen
        need = {ranks: ranks * (plan.step(ranks) / GIB + PROCESS_GIB) for ranks in (RANKS, RESUME_RANKS)}
        ranks, most = max(need.items(), key=lambda item: item[1])
        if given is None and weights < LEAST_WEIGHTS:
            raise RuntimeError(f"{memory_gib:.1f} GiB hold less than {LEAST_WEIGHTS / 1e6:.0f} M weights")
        if given is not None or most <= memory_gib:
            per_weight = ranks * plan.step(ranks) / weights
            return depth, (
                f"{depth} of {DEPTH} blocks, {weights / 1e6:.0f} M weights: {ranks} processes x "
                f"({plan.step(ranks) / GIB:.2f} GiB of the plan, {per_weight:.1f} bytes a weight over all, + "
                f"{PROCESS_GIB} GiB of a process) = {most:.1f} GiB of {memory_gib:.1f} that may be taken"
            )
        # a block takes the same of each depth, and a process what it takes without any
        depth -= max(int(depth * (most - memory_gib) / most), 1)


def compare(bench: Benchmark, depth: int, plans: dict[int, Plan], record: Record) -> None:
    tenths = record.stages(TENTH)
    for stage, whole in record.stages(depth).items():
        tenth = tenths[stage]
        bench.figure(f"{stage}_seconds", round(whole.seconds, 1))
        bench.figure(f"{stage}_peak_mib", {r: v >> 20 for r, v in sorted(whole.peaks.items())})
        bench.figure(f"{stage}_peak_mib_of_a_tenth", {r: v >> 20 for r, v in sorted(tenth.peaks.items())})
        if stage == "bundle":  # the main rank alone codes masks: not in the plan
            continue
        grown = [whole.peaks[rank] - tenth.peaks[rank] for rank in whole.peaks]
        planned = plans[depth].of_stage(stage) - plans[TENTH].of_stage(stage)
        bench.figure(f"{stage}_planned_growth_mib", round(planned / 2**20))
        for label, one in (("most", max(grown)), ("least", min(grown))):
            ratio = one / planned
            bench.figure(f"{stage}_{label}_over_plan", ratio, min=1 - WITHIN, max=1 + WITHIN, quick=False)


def differing_bits(first: Path, second: Path) -> int:
    """Return how many bits of two masks differ."""
    (one,), (other,) = (read_mask_file(path).masks.values() for path in (first, second))
    return sum(int((one.bits[name] != other.bits[name]).sum()) for name in one.bits)


def check_identity(bench: Benchmark, config: Path, record: Record) -> None:
    """One process, unsharded (ddp), against shards: of one process, and of four and then two."""
    runs, key = config.parent, "identity"
    if key not in record:
        for name, engine in (("unsharded", "ddp"), ("one-shard", "fsdp")):
            shutil.rmtree(runs / name, ignore_errors=True)
            command(submit_command(config, f"run.name={name}", f"engine.name={engine}", nodes=1))
        masks = {name: runs / name / "final.mask" for name in ("unsharded", "one-shard", "life")}
        (mask,) = read_mask_file(masks["unsharded"]).masks.values()
        record[key] = {
            "one_process": differing_bits(masks["unsharded"], masks["one-shard"]),
            "four_then_two": differing_bits(masks["unsharded"], masks["life"]),
            "weights": mask.num_weights(),
            "pruned": mask.num_weights() - mask.num_kept(),
        }
    found = record[key]
    bench.figure("tenth_masked_weights", found["weights"])
    bench.figure("tenth_pruned_weights", found["pruned"], min=1)
    bench.figure("tenth_differing_bits_of_one_process", found["one_process"], max=0)
    bench.figure("tenth_differing_bits_of_four_then_two", found["four_then_two"], max=0)


def main() -> int:
    bench = Benchmark("huge", __doc__)
    bench.parser.add_argument("--memory-gib", type=float, help="for all processes (what is free, less 3)")
    bench.parser.add_argument("--depth", type=int, help="blocks (what fits)")
    bench.parser.add_argument(
        "--folder", type=Path, help="keeps weights, runs and what is done; goes on there"
    )
    bench.parser.add_argument("--parts", nargs="+", default=["life", "cascade"], choices=("life", "cascade"))
    args = bench.parse()
    folder: Path = args.folder or Path(tempfile.mkdtemp(prefix="huge-"))
    folder.mkdir(parents=True, exist_ok=True)
    record = Record(folder / "stages.json")
    if "data" not in record:
        record["data"] = write_tiny_data(folder / "data", **PICTURES)
    if "depth" not in record:
        memory_gib = args.memory_gib or available_bytes() / GIB - 3
        given = 6 if args.quick else args.depth
        record["depth"] = choose_depth(folder, record["data"], memory_gib, given)
    depth, arithmetic = record["depth"]
    bench.figure("arithmetic", arithmetic)
    print(arithmetic, file=sys.stderr, flush=True)
    configs = {
        blocks: write_settings(folder / str(blocks), record["data"], blocks) for blocks in (TENTH, depth)
    }
    plans = {blocks: Plan.of(config) for blocks, config in configs.items()}
    for blocks, config in configs.items():
        weights = config.parent / f"weights-{blocks}.safetensors"
        if not weights.exists():
            write_weights(weights, blocks)
        train_and_resume(config, blocks, record)
    check_identity(bench, configs[TENTH], record)
    for blocks, config in configs.items() if "cascade" in args.parts else ():
        cascade_and_embed(config, blocks, record)
    size = plans[depth].size
    bench.figure("weights", size.masked + size.frozen, min=LEAST_WEIGHTS, quick=False)
    bench.figure("masked", size.masked)
    bench.figure("processes", {"train": RANKS, "resume": RESUME_RANKS})
    bench.figure("parts", args.parts)
    if "cascade" in args.parts:
        bench.figure("bundle", record[f"bundle of {depth}"])
    left = min(one.available for one in record.stages(depth).values())
    bench.figure("least_memory_left_gib", round(left / GIB, 2))
    compare(bench, depth, plans, record)
    if args.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
