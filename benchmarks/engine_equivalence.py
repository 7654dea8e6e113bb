"""Every engine at several world sizes against one process: losses and masks after 20 steps.

Three small networks: a conv net whose batch normalisation is synchronised, a timm ViT of width 26 (rows that
do not divide by 4) and an open_clip tower. Learning rates prune 10 % of the weights or more. float64 is the
proof; float32 is reported beside it, as a score that lands on the threshold may round either way. DeepSpeed
keeps float32 partitions, so it appears there only. bf16 is compared with one process of the same engine.

    python -m benchmarks.engine_equivalence [--quick] --json
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Benchmark
from tests.distributed import run_distributed
from tests.engine_cases import Case, Outcome, difference, run_case, run_cases

FAMILIES = {"conv": 60.0, "odd_vit": 40.0, "open_clip": 40.0}
OPTIONS = {
    "ddp": ("ddp", {}),
    "fsdp": ("fsdp", {}),
    "bits": ("bits", {}),
    "deepspeed1": ("deepspeed", {"zero_stage": 1}),
    "deepspeed2": ("deepspeed", {"zero_stage": 2}),
    "deepspeed3": ("deepspeed", {"zero_stage": 3}),
}


def case_of(family: str, name: str, *, dtype: torch.dtype, steps: int, **options: Any) -> Case:
    engine, more = OPTIONS[name]
    return Case(
        family=family,
        engine=engine,
        options={**more, **options},
        dtype=dtype,
        steps=steps,
        lr=FAMILIES[family],
        batchnorm="sync",
    )


def worst(outcomes: list[Outcome], references: list[Outcome]) -> tuple[float, float]:
    pairs = [difference(one, other) for one, other in zip(outcomes, references, strict=True)]
    return max(loss for loss, _ in pairs), max(bits for _, bits in pairs)


def run_everywhere(
    names: list[str], families: list[str], world_size: int, **options: Any
) -> dict[str, list[Outcome]]:
    """The last rank's outcomes for each engine, one for each family; all in one group of processes."""
    cases = [case_of(family, name, **options) for name in names for family in families]
    env = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # ninja, for deepspeed
    outcomes = run_distributed(run_cases, world_size, cases, timeout=1500, env=env)[-1]
    count = len(families)
    return {name: outcomes[i * count : (i + 1) * count] for i, name in enumerate(names)}


def main() -> int:
    bench = Benchmark("engine_equivalence", __doc__)
    is_quick = bench.parse().quick
    steps = 6 if is_quick else 20
    worlds = (2,) if is_quick else (1, 2, 4)
    names = [name for name in OPTIONS if not (is_quick and name.startswith("deepspeed"))]
    families = list(FAMILIES)
    for dtype, label in ((torch.float64, "float64"), (torch.float32, "float32")):
        is_promised = dtype == torch.float64
        common: dict[str, Any] = {"dtype": dtype, "steps": steps}
        references = [run_case(case_of(family, "ddp", **common)) for family in families]
        pruned = min(1 - reference.active for reference in references)
        bench.figure(f"{label}_least_pruned", pruned, min=0.1, quick=False)
        chosen = [name for name in names if not (is_promised and name.startswith("deepspeed"))]
        for size in worlds:
            for name, outcomes in run_everywhere(chosen, families, size, **common).items():
                loss, bits = worst(outcomes, references)
                key = f"{label}_{name}_world{size}"
                bench.figure(f"{key}_loss", loss, max=1e-6 if is_promised else None)
                bench.figure(f"{key}_mask", bits, max=1e-5)
                frozen = {o.frozen_before for o in outcomes} | {o.frozen_after for o in outcomes}
                expected = {r.frozen_before for r in references}
                bench.figure(f"{key}_frozen_changed", len(frozen - expected), max=0)
    common = {"dtype": torch.float32, "steps": steps, "precision": "bf16"}
    vits = [family for family in families if family != "conv"]
    chosen = [name for name in names if name != "ddp"]
    one = run_everywhere(chosen, vits, 1, **common)
    for name, outcomes in run_everywhere(chosen, vits, 2, **common).items():
        loss, bits = worst(outcomes, one[name])
        bench.figure(f"bf16_{name}_world2_loss", loss)
        bench.figure(f"bf16_{name}_world2_mask", bits)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
