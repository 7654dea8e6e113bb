"""Bytes of a step's collectives, counted, and what a rank keeps at several world sizes.

Every collective of torch.distributed passes the dispatcher, where it is counted: what is gathered by its
result, what is scattered by its input, what is reduced twice (a ring sends it twice). Full fine-tuning of the
same parameters under FSDP is the yardstick. A ViT with 4 blocks of width 192 on CPU processes.

    python -m benchmarks.engine_bytes [--quick] --json
"""

import sys
from collections import Counter
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks.harness import Benchmark
from selfmask_dist.backbones import find_blocks
from selfmask_dist.masking import attach, select
from selfmask_dist.parallel import Engine, EngineOptions, build_engine
from tests.distributed import run_distributed
from tests.engine_cases import Step, batch_of, world_here

WIDTH = 192


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


def make_engine(name: str, *, is_full: bool, precision: str, reduce_dtype: str) -> tuple[Engine, Any]:
    torch.manual_seed(0)
    encoder = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, depth=4, embed_dim=WIDTH, num_classes=0
    )
    names = set(select(encoder, "vit"))
    encoder.requires_grad_(False)
    step = Step(encoder, WIDTH, torch.float32, "frozen")
    options = EngineOptions(name=name, precision=precision, reduce_dtype=reduce_dtype)
    engine = build_engine(
        step, encoder=encoder, blocks=find_blocks(encoder), world=world_here(), options=options
    )
    if is_full:
        masks = None
        trained = [p.requires_grad_() for n, p in encoder.named_parameters() if n in names]
    else:
        masks = engine.attach(encoder, attach, include="vit")
        trained = list(masks.parameters())
    engine.start(torch.optim.SGD([*trained, *step.head.parameters()], lr=1e-3, momentum=0.9))
    return engine, masks


def count(name: str, is_full: bool, precision: str, reduce_dtype: str) -> dict[str, Any]:
    """What one step sends, by kind, and the bytes of state this rank keeps."""
    engine, masks = make_engine(name, is_full=is_full, precision=precision, reduce_dtype=reduce_dtype)
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
    }


def _kept(engine: Engine, masks: Any) -> dict[str, int]:
    momentum = [engine.optimizer.state[e.scores]["momentum_buffer"] for e in masks.entries]
    pieces = {
        "weights": [e.piece(e.weight) for e in masks.entries],
        "scores": [e.scores for e in masks.entries],
        "momentum": momentum,
    }
    return {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in pieces.items()}


def main() -> int:
    bench = Benchmark("engine_bytes", __doc__)
    options = bench.parse()
    modes = {"float32": ("float32", "float32"), "bf16": ("bf16", "bf16")}
    for label, (precision, reduce_dtype) in modes.items():
        full = run_distributed(count, 2, "fsdp", True, precision, reduce_dtype)[0]
        fsdp = run_distributed(count, 2, "fsdp", False, precision, reduce_dtype)[0]
        bits = run_distributed(count, 2, "bits", False, precision, reduce_dtype)[0]
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
        # <G, theta> is one call; sum M another under fsdp, and part of the one gather under bits
        bench.figure(
            f"{label}_fsdp_more_reductions", fsdp["calls"]["reduce"] - full["calls"].get("reduce", 0)
        )
        bench.figure(f"{label}_bits_reductions", bits["calls"]["reduce"] - 1)  # without the heads'
        bench.figure(f"{label}_bits_gathers", bits["calls"]["gather"], max=1)
    worlds = (2,) if options.quick else (1, 2, 4)
    kept: dict[str, dict[int, dict[str, int]]] = {}
    for name in ("fsdp", "bits"):
        kept[name] = {}
        for size in worlds:
            kept[name][size] = run_distributed(count, size, name, False, "float32", "float32")[0]["kept"]
        parts = ("weights", "scores", "momentum") if name == "fsdp" else ("scores", "momentum")
        first = worlds[0]
        ratios = [
            sum(kept[name][w][p] for p in parts) * w / (first * sum(kept[name][first][p] for p in parts))
            for w in worlds
        ]
        bench.figure(f"{name}_kept_times_world", max(ratios), max=1.05)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
