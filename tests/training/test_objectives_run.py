"""Objectives without labels beside SwAV on many ranks and all engines, and in runs that go on bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.data import Batch
from selfmask_dist.masking import attach
from selfmask_dist.objectives import Context
from selfmask_dist.objectives.base import TrainStep
from selfmask_dist.parallel import EngineState, World, build_engine
from tests.objectives.test_objectives import CROPS, NAMES, ROWS, STEPS, build
from tests.support.distributed import run_distributed
from tests.support.engine_cases import BLOCKS
from tests.support.models import make
from tests.support.resuming import check_resumed_equals_whole, last_state, losses_of, train
from tests.support.state import whole_buffers
from tests.support.tiny_run import write_config, write_tiny_data

# ---- many ranks, all engines

CASES = [(name, engine, "mask") for name in NAMES for engine in ("ddp", "fsdp", "bits")] + [
    ("moco_v3", "fsdp", "finetune"),
    ("dino", "ddp", "finetune"),
    ("moco_v2", "fsdp, offloaded", "mask"),
]


def run_steps(name: str, kind: str, method: str) -> tuple[list[float], EngineState, dict[str, Tensor]]:
    kind, _, way = kind.partition(", ")
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    world = World(rank, size)
    encoder, preset = make("timm_vit")
    encoder.requires_grad_(False)
    objective = build(
        name, 24, Context(rank, size, ROWS, world.sum, world.sum_with_gradient, all_to_all=world.all_to_all)
    )
    engine = build_engine(
        TrainStep(encoder, objective, batchnorm="frozen"),
        encoder=encoder,
        blocks=BLOCKS["timm_vit"],
        world=world,
        # blocks that stay gathered must not show the student the teacher's theta
        config=EngineConfig(
            name=kind,  # type: ignore[arg-type]
            reshard_after_forward=name != "dino",
            checkpoint_activations=name == "moco_v3" and kind == "fsdp",  # computed again by the student
            cpu_offload=way == "offloaded",
            compile=way == "compiled",
        ),
    )
    groups = [{"name": "head", "params": objective.head_parameters(), "lr": 0.1}]
    if method == "mask":
        masks = engine.attach(encoder, attach, include=preset)
        groups.append({"name": "scores", "params": list(masks.parameters()), "lr": 1e5})
    else:
        groups.append({"name": "weights", "params": engine.free(encoder), "lr": 0.1})
    engine.start(torch.optim.SGD(groups, momentum=0.9))
    if (heads := objective.teacher_parameters()) is not None:
        objective.teacher = engine.keep_teacher(heads)
    losses = []
    for step in range(STEPS):
        count = ROWS if step != 1 else ROWS - 1  # a ragged batch: one rank pads
        generator = torch.Generator().manual_seed(step)
        views = torch.randn(CROPS.get(name, 2), count, 3, 16, 16, generator=generator, dtype=torch.float64)
        places = torch.arange(rank, size * -(-count // size), size)
        batch = Batch(
            tuple(view[places % count] for view in views),
            torch.full((len(places),), -1),
            (places < count).float(),
            places,
            count,
        )
        objective.start_step(step)
        metrics = engine.forward_backward(batch)
        losses.append(world.sum(metrics["loss"].clone()).item())
        for held in objective.held_parameters():
            held.grad = None
        engine.step()
    return losses, engine.state(), whole_buffers(objective, world)


def run_cases() -> list[Any]:
    return [run_steps(*case) for case in CASES]


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_two_ranks_and_all_engines_compute_what_one_process_does() -> None:
    alone = {(name, method): run_steps(name, "ddp", method) for name, _, method in CASES}
    for case, (losses, state, buffers) in zip(
        CASES, run_distributed(run_cases, 2, timeout=200)[0], strict=True
    ):
        name, _, method = case
        expected_losses, expected, expected_buffers = alone[name, method]
        assert losses == pytest.approx(expected_losses, rel=1e-9), case
        for part in ("parameters", "teacher"):
            theirs = getattr(expected, part)
            assert set(getattr(state, part)) == set(theirs), (case, part)
            for key, tensor in theirs.items():
                torch.testing.assert_close(getattr(state, part)[key], tensor, rtol=1e-6, atol=1e-9)
        assert bool(state.teacher) == (name != "simclr")
        for key, tensor in expected_buffers.items():
            torch.testing.assert_close(buffers[key], tensor, rtol=1e-7, atol=1e-9)
    for (_name, method), (_, state, _) in alone.items():
        qkv = "encoder.blocks.0.attn.qkv.weight"
        if method == "mask":
            assert 0 < (state.parameters[qkv] <= 0).double().mean() < 1, "bits flipped"
        if state.teacher:
            assert not torch.equal(state.teacher[qkv], state.parameters[qkv])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo
@pytest.mark.slow
@pytest.mark.parametrize("name", ["moco_v2", "dino"])
def test_compiled_blocks_see_the_students_and_the_teachers_theta(name: str) -> None:
    plain, compiled = (run_steps(name, kind, "mask") for kind in ("ddp", "ddp, compiled"))
    assert compiled[0] == pytest.approx(plain[0], rel=1e-9)
    for part in ("parameters", "teacher"):
        found, expected = getattr(compiled[1], part), getattr(plain[1], part)
        assert set(found) == set(expected)
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-9)


# ---- whole runs

SMALL = {
    "simclr": ["simclr.dim=8", "simclr.hidden=16"],
    "moco_v2": ["moco_v2.dim=8", "moco_v2.hidden=16", "moco_v2.queue_length=30", "moco_v2.momentum=0.9"],
    "moco_v3": ["moco_v3.dim=8", "moco_v3.hidden=16"],
    "dino": ["dino.outputs=12", "dino.hidden=16", "dino.bottleneck=8", "dino.temperature_epochs=1"],
}
RESNET = ["backbone.name=timm:test_resnet", "backbone.kwargs={}", "backbone.image_size=32"]


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("simclr", []),
        ("moco_v2", RESNET),
        ("moco_v3", ["method=finetune", "optim.kind=adamw", "optim.weight_lr=1e-3"]),
        ("dino", ["crops.local_count=2", "crops.local_size=8"]),
    ],
)
def test_a_run_goes_on_bit_for_bit(
    tmp_path: Path, tiny_data: dict[str, str], name: str, more: list[str]
) -> None:
    path = write_config(
        tmp_path / "tiny.yaml",
        tiny_data,
        objective={"name": name},
        crops={"local_count": 0, "blur": 0.0},
        optim={"score_lr": 50.0, "head_lr": 0.05},
        eval={"final": False},
    )
    overrides = ["run.name=a", *SMALL[name], *more]
    check_resumed_equals_whole(path, overrides, tmp_path / "a", step=3)
    state = last_state(tmp_path / "a")
    kept = {key.partition("/")[0] for key in state}
    assert ("teacher" in kept) == (name != "simclr")
    assert ("buffers" in kept) == (name in ("moco_v2", "dino"))
    if more == RESNET:
        assert "teacher/encoder.bn1.running_mean" in state
    assert len(losses_of(tmp_path / "a")) == 8
    assert not (tmp_path / "a" / "head.safetensors").exists(), "heads are thrown away"


def test_a_run_starts_its_teacher_from_the_scores_that_it_starts_from(
    tmp_path: Path, tiny_data: dict[str, str]
) -> None:
    path = write_config(
        tmp_path / "tiny.yaml",
        tiny_data,
        objective={"name": "moco_v3"},
        crops={"local_count": 0, "blur": 0.0},
        eval={"final": False},
    )
    train(path, ["run.name=first", "train.epochs=1", "optim.score_lr=50", *SMALL["moco_v3"]])
    more = [f"mask.init_from={tmp_path / 'first'}", "optim.score_lr=1e-9", "optim.head_lr=1e-9"]
    train(path, ["run.name=second", "train.max_steps=1", *more, *SMALL["moco_v3"]])
    first, second = last_state(tmp_path / "first"), last_state(tmp_path / "second")
    for key, tensor in second.items():
        if key.startswith("teacher/"):
            expected = first[key.replace("teacher/", "parameters/")]
            assert torch.allclose(tensor, expected, atol=1e-6), key
