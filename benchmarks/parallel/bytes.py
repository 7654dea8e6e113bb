"""Bytes of a step's collectives, counted, and what a rank keeps at several world sizes.

Every collective of torch.distributed passes the dispatcher, where it is counted: what is gathered by its
result, what is scattered by its input, what is reduced twice (a ring sends it twice). Full fine-tuning of the
same parameters under FSDP is the yardstick. A ViT with 4 blocks of width 192 on CPU processes; for peak
memory against the planner's number, 6 blocks of width 512 (19 million weights).

    python -m benchmarks.parallel.bytes [--quick] --json
"""

import ctypes
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.harness import Benchmark, _high_water
from selfmask_dist.backbones import find_blocks
from selfmask_dist.cli.plan.hardware import Hardware
from selfmask_dist.cli.plan.model_size import measure_size
from selfmask_dist.cli.plan.steps import estimate
from selfmask_dist.config import load_config
from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.masking import attach, select
from selfmask_dist.parallel import Engine, build_engine
from tests.support.distributed import run_distributed
from tests.support.engine_cases import ROWS, Step, batch_of, world_here

SMALL, LARGE = (192, 4), (512, 6)  # width, blocks
BUCKET_MB = 4.0
ENV = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # ninja, for deepspeed


class Traffic(TorchDispatchMode):
    """Calls and bytes of collectives by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.name()
            kind = "gather" if "gather" in name else "scatter" if "scatter" in name else "reduce"
            leaves = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
            largest = max((t.numel() * t.element_size() for t in leaves), default=0)
            self.calls[kind] += 1
            self.bytes[kind] += largest * (2 if kind == "reduce" else 1)
        return func(*args, **(kwargs or {}))


def make_encoder(size: tuple[int, int]) -> torch.nn.Module:
    torch.manual_seed(0)
    width, depth = size
    options: dict[str, Any] = {"img_size": 16, "patch_size": 4, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", embed_dim=width, depth=depth, num_heads=8, **options)


def make_engine(
    name: str, *, is_full: bool = False, size: tuple[int, int] = SMALL, **keys: Any
) -> tuple[Engine, Any]:
    encoder = make_encoder(size)
    names = set(select(encoder, "vit"))
    encoder.requires_grad_(False)
    step = Step(encoder, size[0], torch.float32, "frozen")
    score_step = keys.pop("score_step", "plain")
    engine = build_engine(
        step,
        encoder=encoder,
        blocks=find_blocks(encoder),
        world=world_here(),
        config=EngineConfig.model_validate({"name": name, **keys}),
        score_step=score_step,
    )
    if is_full:
        masks = None
        trained = [p.requires_grad_() for n, p in encoder.named_parameters() if n in names]
    else:
        masks = engine.attach(encoder, attach, include="vit")
        trained = list(masks.parameters())
    engine.start(torch.optim.SGD([*trained, *step.head.parameters()], lr=1e-3, momentum=0.9))
    return engine, masks


def count(name: str, is_full: bool, keys: dict[str, Any]) -> dict[str, Any]:
    """What one step sends, by kind, and the bytes of state this rank keeps."""
    engine, masks = make_engine(name, is_full=is_full, **keys)
    rank, size = dist.get_rank(), dist.get_world_size()
    for step in range(2):  # the first one also sets things up
        traffic = Traffic()
        batch = batch_of(step, rank, size, dtype=torch.float32)
        with traffic:
            engine.forward_backward(batch)
            engine.step()
    kept = _kept(engine, masks) if masks is not None else {}
    masked = sum(e.theta.numel() for e in masks.entries) if masks is not None else 0
    return {
        "calls": dict(traffic.calls),
        "sent": dict(traffic.bytes),
        "kept": kept,
        "masked": masked,
        "tensors": len(masks.entries) if masks is not None else 0,
    }


def _kept(engine: Engine, masks: Any) -> dict[str, int]:
    """Bytes of masked parameters' tensors on this rank."""
    if engine.config.name == "deepspeed":  # stage 3: all of them are partitions
        from deepspeed.utils import safe_get_local_optimizer_state

        pieces = {
            "weights": [e.weight.ds_tensor for e in masks.entries],
            "scores": [e.scores.ds_tensor for e in masks.entries],
            "momentum": [safe_get_local_optimizer_state(e.scores, "momentum_buffer") for e in masks.entries],
        }
    else:
        pieces = {
            "weights": [e.piece(e.weight) for e in masks.entries],
            "scores": [e.scores for e in masks.entries],
            "momentum": [engine.optimizer.state[e.scores]["momentum_buffer"] for e in masks.entries],
        }
    return {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in pieces.items()}


def peak(name: str, keys: dict[str, Any]) -> int:
    """Bytes by which this rank's resident memory grows in three steps, over what it was without a model."""
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back at once
    rank, size = dist.get_rank(), dist.get_world_size()
    engine, _ = make_engine(name, size=SMALL, **keys)  # what libraries take once
    engine.forward_backward(batch_of(0, rank, size, dtype=torch.float32))
    engine.step()
    del engine, _
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _high_water()
    engine, _ = make_engine(name, size=LARGE, **keys)
    Path("/proc/self/clear_refs").write_text("5")  # building it whole is not the step's need
    for step in range(3):
        engine.forward_backward(batch_of(step, rank, size, dtype=torch.float32))
        engine.step()
    return _high_water() - before


def vote_share(rounds: int) -> float:
    """The trainer's all-reduce of three numbers, as a share of a ddp step."""
    engine, _ = make_engine("ddp")
    rank, size = dist.get_rank(), dist.get_world_size()
    shares = []
    for step in range(rounds + 2):
        start = time.perf_counter()
        metrics = engine.forward_backward(batch_of(step, rank, size, dtype=torch.float32))
        dist.barrier()  # or the wait for a slower rank would count as the vote's
        middle = time.perf_counter()
        values = torch.zeros(3, dtype=torch.float64)
        values[0] = metrics["loss"]
        engine.world.sum(values).tolist()
        end = time.perf_counter()
        engine.step()
        if step >= 2:
            shares.append((end - middle) / (time.perf_counter() - start))
    return statistics.median(shares)


def check_memory(bench: Benchmark, worlds: tuple[int, ...]) -> None:
    """Peak memory of a rank against the planner's number.

    Buckets of 4 MiB, as 25 MiB, the default, is a third of this model; gloo copies each one on its way.
    """
    with torch.device("meta"):
        shape = measure_size(make_encoder(LARGE), 16, "vit")
    config = load_config(None, [f"train.global_batch_size={ROWS}", f"engine.bucket_mb={BUCKET_MB}"])
    labels = ("ddp", "fsdp", "bits", "deepspeed-1", "deepspeed-2", "deepspeed-3")
    for size in worlds:
        planned = {e.engine: e.memory for e in estimate(shape, config, Hardware(gpus_per_node=size))}
        for label in labels[:3] if bench.args.quick else labels:
            name, _, stage = label.partition("-")
            keys = {"bucket_mb": BUCKET_MB, **({"zero_stage": int(stage)} if stage else {})}
            measured = max(run_distributed(peak, size, name, keys, timeout=120, env=ENV))
            key = f"{label}_world{size}_peak"
            bench.figure(f"{key}_bytes", {"measured": measured, "planned": round(planned[label])})
            bench.figure(f"{key}_over_plan", measured / planned[label], min=0.85, max=1.15)


def check_score_step(
    bench: Benchmark, label: str, keys: dict[str, Any], plain: dict[str, dict[str, Any]]
) -> None:
    """What optim.score_step=rms sends beyond a plain step: three numbers a tensor, and no call."""
    for name, before in plain.items():
        rms = run_distributed(count, 2, name, False, {**keys, "score_step": "rms"}, timeout=120)[0]
        calls = sum(rms["calls"].values()) - sum(before["calls"].values())
        more = sum(rms["sent"].values()) - sum(before["sent"].values())
        bench.figure(f"{label}_{name}_rms_more_calls", calls, max=0)
        bench.figure(f"{label}_{name}_rms_more_bytes_per_tensor", more / rms["tensors"], max=24)


def check_kept(bench: Benchmark, worlds: tuple[int, ...]) -> None:
    """Scores, momentum and frozen weights of a rank fall as one over the world."""
    for label, name, keys in (
        ("fsdp", "fsdp", {}),
        ("bits", "bits", {}),
        ("deepspeed3", "deepspeed", {"zero_stage": 3}),
    ):
        kept = {
            w: run_distributed(count, w, name, False, keys, timeout=120, env=ENV)[0]["kept"] for w in worlds
        }
        bench.figure(f"{label}_kept_bytes", kept)
        parts = ("scores", "momentum") if label == "bits" else ("weights", "scores", "momentum")
        times_world = [w * sum(kept[w][part] for part in parts) for w in worlds]
        bench.figure(f"{label}_kept_times_world", max(times_world) / times_world[0], max=1.05)


def main() -> int:
    bench = Benchmark("engine_bytes", __doc__)
    options = bench.parse()
    modes: dict[str, dict[str, Any]] = {"float32": {}, "bf16": {"precision": "bf16", "reduce_dtype": "bf16"}}
    for label, keys in modes.items():
        full = run_distributed(count, 2, "fsdp", True, keys)[0]
        fsdp = run_distributed(count, 2, "fsdp", False, keys)[0]
        bits = run_distributed(count, 2, "bits", False, keys)[0]
        bench.figure(
            f"{label}_calls", {"full_fsdp": full["calls"], "fsdp": fsdp["calls"], "bits": bits["calls"]}
        )
        bench.figure(
            f"{label}_bytes", {"full_fsdp": full["sent"], "fsdp": fsdp["sent"], "bits": bits["sent"]}
        )
        ratio = sum(fsdp["sent"].values()) / sum(full["sent"].values())
        bench.figure(f"{label}_fsdp_over_full", ratio, max=1.01)
        per_weight = sum(bits["sent"].values()) / bits["masked"]
        bench.figure(f"{label}_bits_bytes_per_weight", per_weight, max=2.2 if label == "bf16" else None)
        # <G, theta> travels with the heads; sum M is a call under fsdp, part of the gather under bits
        more = {
            n: c["calls"]["reduce"] - full["calls"].get("reduce", 0)
            for n, c in (("fsdp", fsdp), ("bits", bits))
        }
        bench.figure(f"{label}_fsdp_more_reductions", more["fsdp"], max=1)
        bench.figure(f"{label}_bits_more_reductions", more["bits"], max=0)
        bench.figure(f"{label}_bits_gathers", bits["calls"]["gather"], max=1)
        check_score_step(bench, label, keys, {"fsdp": fsdp, "bits": bits})
    check_kept(bench, (1, 2) if options.quick else (1, 2, 4))
    check_memory(bench, (2,) if options.quick else (2, 4))
    bench.figure("vote_share_of_step", run_distributed(vote_share, 2, 5 if options.quick else 30)[0])
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
