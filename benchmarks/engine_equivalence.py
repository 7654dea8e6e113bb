"""Every engine at several world sizes against one process: losses and masks after 20 steps.

Three small networks: a conv net whose batch normalisation is synchronised, a timm ViT of width 26 (rows that
do not divide by 4) and an open_clip tower. Learning rates prune 10 % of the weights or more. float64 is the
proof; float32 is reported beside it, as a score that lands on the threshold may round either way. DeepSpeed
keeps float32 partitions, so it appears there only. bf16 is compared with one process of the same engine.

    python benchmarks/engine_equivalence.py [--quick] --json
"""

import os
import sys
from pathlib import Path

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


def case_of(family: str, name: str, dtype: torch.dtype, steps: int, **options: object) -> Case:
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


def run_everywhere(cases: list[Case], world_size: int, env: dict[str, str]) -> list[Outcome]:
    """The last rank's outcomes; a failure of one engine must not hide the others'."""
    return run_distributed(run_cases, world_size, cases, timeout=540, env=env)[-1]


def main() -> int:
    bench = Benchmark("engine_equivalence", __doc__)
    options = bench.parse()
    steps = 6 if options.quick else 20
    worlds = (2,) if options.quick else (1, 2, 4)
    names = [name for name in OPTIONS if not (options.quick and name.startswith("deepspeed"))]
    env = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for dtype, label in ((torch.float64, "float64"), (torch.float32, "float32")):
        references = [run_case(case_of(family, "ddp", dtype, steps)) for family in FAMILIES]
        if dtype == torch.float64:
            pruned = min(1 - reference.active for reference in references)
            bench.figure("least_pruned", pruned, min=0.1, quick=False)
        for name in names:
            if name.startswith("deepspeed") and dtype == torch.float64:
                continue
            for size in worlds:
                cases = [case_of(family, name, dtype, steps) for family in FAMILIES]
                loss, bits = worst(run_everywhere(cases, size, env), references)
                is_promised = dtype == torch.float64
                key = f"{label}_{name}_world{size}"
                bench.figure(f"{key}_loss", loss, max=1e-6 if is_promised else None)
                bench.figure(f"{key}_mask", bits, max=1e-5 if is_promised else None)
    for name in ("fsdp", "bits"):
        cases = [case_of(f, name, torch.float32, steps, precision="bf16") for f in ("odd_vit", "open_clip")]
        loss, bits = worst(run_everywhere(cases, 2, env), run_everywhere(cases, 1, env))
        bench.figure(f"bf16_{name}_world2_loss", loss)
        bench.figure(f"bf16_{name}_world2_mask", bits)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
