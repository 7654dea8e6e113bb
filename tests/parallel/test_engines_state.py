"""What is saved under one engine and world size goes on under any other: the next losses are the same."""

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.engine_cases import Case, EngineState, reference_of, run_case

pytestmark = [
    pytest.mark.distributed,
    # torch names the type of its own storage when a state crosses processes
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
ENV = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # ninja, for deepspeed
KINDS = ("ddp", "fsdp", "bits", "deepspeed-2", "deepspeed-3")
WORLDS = (1, 2, 4)
Start = tuple[str, int]  # kind, world size


def case_of(kind: str, **more: object) -> Case:
    engine, _, stage = kind.partition("-")
    return Case(
        engine=engine,
        family="conv",
        batchnorm="sync",
        dtype=torch.float32,  # DeepSpeed's partitions are
        options={"zero_stage": int(stage)} if stage else {},
        **more,  # type: ignore[arg-type]
    )


def save(kinds: list[str]) -> dict[str, EngineState]:
    return {kind: run_case(case_of(kind, steps=2)).state for kind in kinds}


def resume(states: dict[Start, EngineState], pairs: list[tuple[Start, str]]) -> list[list[float]]:
    return [run_case(case_of(kind, state=states[saved], start=2, steps=2)).losses for saved, kind in pairs]


def check(pairs: list[tuple[Start, Start]]) -> None:
    whole = reference_of(case_of("ddp")).losses
    assert whole[2] != whole[0]
    states: dict[Start, EngineState] = {}
    for size in WORLDS:
        kinds = sorted({kind for (kind, world), _ in pairs if world == size})
        saved = run_distributed(save, size, kinds, timeout=300, env=ENV)[0]
        states |= {(kind, size): state for kind, state in saved.items()}
    for size in WORLDS:
        here = [(saved, kind) for saved, (kind, world) in pairs if world == size]
        found = run_distributed(resume, size, states, here, timeout=600, env=ENV)[-1]
        for (saved, kind), losses in zip(here, found, strict=True):
            assert losses == pytest.approx(whole[2:], rel=1e-5), (saved, kind, size)


def test_a_state_moves_from_each_engine_to_the_next() -> None:
    """Every engine and every world size saves once or more, and takes over once or more."""
    check(
        [
            ((a, WORLDS[i % 3]), (b, WORLDS[(i + 1) % 3]))
            for i, (a, b) in enumerate(zip(KINDS, (*KINDS[1:], KINDS[0]), strict=True))
        ]
    )


@pytest.mark.slow
def test_a_state_moves_between_every_two_engines() -> None:
    """Every pair of engines once, every pair of world sizes among them."""
    check(
        [
            ((a, WORLDS[(i + j) % 3]), (b, WORLDS[(i + 2 * j) % 3]))
            for i, a in enumerate(KINDS)
            for j, b in enumerate(KINDS)
        ]
    )


@pytest.mark.slow
def test_a_state_moves_between_all_engines_at_all_world_sizes() -> None:
    check([((a, m), (b, n)) for a in KINDS for m in WORLDS for b in KINDS for n in WORLDS])
