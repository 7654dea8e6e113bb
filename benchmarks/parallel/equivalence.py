"""Every engine at several world sizes against one process: losses and masks after 20 steps.

Three small networks: a conv net whose batch normalisation is synchronised, a timm ViT of width 26 (rows that
do not divide by 4) and an open_clip tower. Learning rates prune 10 % of the weights or more. float64 is the
proof; float32 is reported beside it, as a score that lands on the threshold may round either way. DeepSpeed
keeps float32 partitions, so it appears there only. bf16 is compared with one process of the same engine.

What rounding alone does is the control: one process against itself, with the same rows in two micro-batches
(the conv net, whose statistics are of the batch, with its rows in reverse order). In exact arithmetic nothing
would change.

    python -m benchmarks.parallel.equivalence [--quick] --json
"""

import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Benchmark
from tests.support.distributed import run_distributed
from tests.support.engine_cases import Case, Outcome, difference, run_case, run_cases

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


def control_of(case: Case) -> Case:
    """The same step in other order."""
    if case.family == "conv":
        return replace(case, is_reversed=True)
    return replace(case, options={**case.options, "accumulate": 2})


def gradient_difference(one: Outcome, other: Outcome) -> float:
    """Of the scores, relative L2; after one step the momentum is the gradient."""
    names = [name for name in other.state.momentum if name.startswith("encoder.")]
    pairs = [(one.state.momentum[name], other.state.momentum[name]) for name in names]
    difference_, norm = (
        sum(float(t.double().square().sum()) for t in ts)
        for ts in zip(*((a - b, b) for a, b in pairs), strict=True)
    )
    return math.sqrt(difference_ / norm)


def check_precision(
    bench: Benchmark, dtype: torch.dtype, names: list[str], worlds: tuple[int, ...], steps: int
) -> None:
    """Engines against one process in float64 or float32."""
    is_promised, families = dtype == torch.float64, list(FAMILIES)
    label = "float64" if is_promised else "float32"
    common: dict[str, Any] = {"dtype": dtype, "steps": steps}
    cases = [case_of(family, "ddp", **common) for family in families]
    references = [run_case(case) for case in cases]
    bench.figure(f"{label}_least_pruned", min(1 - r.active for r in references), min=0.1, quick=False)
    controls = [difference(run_case(control_of(case)), r) for case, r in zip(cases, references, strict=True)]
    bench.figure(f"{label}_control_loss", dict(zip(families, [loss for loss, _ in controls], strict=True)))
    bench.figure(f"{label}_control_mask", max(bits for _, bits in controls))
    worst_loss = dict.fromkeys(families, 0.0)
    for size in worlds:
        for name, outcomes in run_everywhere(names, families, size, **common).items():
            loss, bits = worst(outcomes, references)
            for family, outcome, reference in zip(families, outcomes, references, strict=True):
                worst_loss[family] = max(worst_loss[family], difference(outcome, reference)[0])
            key = f"{label}_{name}_world{size}"
            bench.figure(f"{key}_loss", loss, max=1e-6)
            bench.figure(f"{key}_mask", bits, max=1e-5)
            frozen = {o.frozen_before for o in outcomes} | {o.frozen_after for o in outcomes}
            expected = {r.frozen_before for r in references}
            bench.figure(f"{key}_frozen_changed", len(frozen - expected), max=0)
    bench.figure(f"{label}_worst_loss", worst_loss)


def check_bf16(bench: Benchmark, names: list[str], steps: int) -> None:
    """Two processes against one of the same engine, beside the control and beside bf16 against float32."""
    common: dict[str, Any] = {"dtype": torch.float32, "precision": "bf16"}
    vits = [family for family in FAMILIES if family != "conv"]
    growth: dict[int, dict[str, float]] = {}
    for length in (1, steps):
        cases = [case_of(family, "ddp", steps=length, **common) for family in vits]
        references = [run_case(case) for case in cases]
        controls = [run_case(control_of(case)) for case in cases]
        full = [run_case(case_of(f, "ddp", steps=length, dtype=torch.float32)) for f in vits]
        one = run_everywhere(names, vits, 1, steps=length, **common)
        two = run_everywhere(names, vits, 2, steps=length, **common)
        pairs = {name: (two[name], one[name]) for name in names}
        pairs |= {"control": (controls, references), "float32": (full, references)}
        growth[length] = {name: worst(*pair)[1] for name, pair in pairs.items()}
        for name, (outcomes, others) in pairs.items():
            if length == 1:
                both = zip(outcomes, others, strict=True)
                bench.figure(f"bf16_{name}_first_gradient", max(gradient_difference(a, b) for a, b in both))
            if length == steps:
                bench.figure(f"bf16_{name}_loss", worst(outcomes, others)[0])
    bench.figure("bf16_mask_by_steps", growth)
    most = max(growth[steps][name] for name in names)
    bench.figure("bf16_mask_over_control", most / growth[steps]["control"], max=2.0, quick=False)


def main() -> int:
    bench = Benchmark("engine_equivalence", __doc__)
    is_quick = bench.parse().quick
    steps = 6 if is_quick else 20
    worlds = (2,) if is_quick else (1, 2, 4)
    names = [name for name in OPTIONS if not (is_quick and name.startswith("deepspeed"))]
    exact = [name for name in names if not name.startswith("deepspeed")]
    check_precision(bench, torch.float64, exact, worlds, steps)
    check_precision(bench, torch.float32, names, worlds, steps)
    check_bf16(bench, names, steps)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
