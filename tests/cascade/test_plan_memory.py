"""Groups of processes that are kept large enough for an expert's state."""

import pytest
import torch

from selfmask_dist.cascade import run as run_module
from selfmask_dist.cascade.plan import choose_num_groups
from selfmask_dist.cascade.run import choose_by_memory
from selfmask_dist.cli.plan.experts import bytes_of_a_process
from selfmask_dist.config import load_config

VIT = (
    "method=cascade",
    "objective.name=swav",
    "backbone.name=timm:vit_base_patch16_224",
    "backbone.pretrained=false",
    "train.global_batch_size=64",
    "engine.name=fsdp",
)
SIZES = [1000, 1000, 1000, 1000]


def test_memory_bounds_the_number_of_groups() -> None:
    asked: list[int] = []

    def has_room(num_processes: int) -> bool:
        asked.append(num_processes)
        return num_processes >= 16

    assert choose_num_groups([100.0] * 4, 32, 64) == 4
    assert choose_num_groups([100.0] * 4, 32, 64, has_room_fn=has_room) == 2
    assert asked == [8, 16], "from the smallest groups on"
    assert choose_num_groups([100.0] * 4, 32, 64, has_room_fn=lambda _: False) == 1


def test_groups_follow_from_what_the_planner_reckons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "num_processes", lambda: 16)
    config = load_config(None, list(VIT))
    needs = {size: bytes_of_a_process(config, size, 1000) for size in (4, 8, 16)}
    assert all(need is not None and need > 2**28 for need in needs.values())
    assert needs[4] > 1.5 * needs[8], "state and activations are cut over the group"  # type: ignore[operator]
    cpu = torch.device("cpu")

    def chosen(gib: float, *more: str) -> tuple[int, str]:
        changed = load_config(None, [*VIT, f"cascade.memory_gib={gib}", *more])
        return choose_by_memory(changed, SIZES, cpu, bytes_of_a_process)

    assert chosen(1000) == (4, "")
    between = ((needs[4] or 0) + (needs[8] or 0)) / 2 / 2**30
    number, text = chosen(between)
    assert number == 2
    assert f"4 process(es) needs {(needs[4] or 0) / 2**30:.1f} GiB" in text
    assert "experts train in 2 group(s) of 8" in text
    number, text = chosen(0.01)
    assert number == 1
    assert "experts train in 1 group(s) of 16; that, too, may be short" in text
    number, text = chosen(between, "cascade.expert_groups=4")
    assert number == 4, "what was asked for is not changed"
    assert "cascade.expert_groups=4 may be too many" in text


def test_a_backbone_that_the_planner_does_not_know_bounds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "num_processes", lambda: 16)
    config = load_config(None, [*VIT, "cascade.memory_gib=0.01"])
    assert choose_by_memory(config, SIZES, torch.device("cpu"), lambda *_: None) == (4, "")
    unknown = config.model_copy(
        update={"backbone": config.backbone.model_copy(update={"name": "timm:no_such_model"})}
    )
    assert bytes_of_a_process(unknown, 4, 1000) is None
