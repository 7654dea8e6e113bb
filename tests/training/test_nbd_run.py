"""The objective nbd on many ranks and all engines, and in runs: killed and resumed, with broken pictures."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from selfmask_dist.config.objectives import NbdConfig
from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.data import Batch
from selfmask_dist.evals.search import search
from selfmask_dist.masking import attach
from selfmask_dist.objectives import Context, Nbd
from selfmask_dist.objectives.base import TrainStep
from selfmask_dist.objectives.nbd import WarmupViews, Whitening
from selfmask_dist.parallel import World, build_engine
from selfmask_dist.runs.checkpoint import committed, read_checkpoint
from tests.support.distributed import run_distributed
from tests.support.engine_cases import BLOCKS
from tests.support.models import make
from tests.support.resuming import KEEP, check_resumed_equals_whole, last_state, losses_of, train
from tests.support.state import whole_buffers
from tests.support.tiny_run import write_config, write_tiny_data

NUM, DIM, STEPS, ROWS = 13, 24, 3, 6
Outcome = tuple[list[float], dict[str, Tensor], dict[str, Tensor], int]


def run_steps(kind: str) -> Outcome:
    """Losses, scores and buffers of a few steps, and how many rows of the bank this rank holds."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    world = World(rank, size)
    encoder, preset = make("timm_vit")
    encoder.requires_grad_(False)
    config = NbdConfig(dim=8, neighbours=3, warmup_steps=4, warmup_batch=5)
    context = Context(
        rank, size, ROWS, world.sum, world.sum_with_gradient, num_samples=NUM, all_to_all=world.all_to_all
    )
    objective = Nbd(DIM, config, context).double()
    engine = build_engine(
        TrainStep(encoder, objective, batchnorm="frozen"),
        encoder=encoder,
        blocks=BLOCKS["timm_vit"],
        world=world,
        config=EngineConfig(name=kind),  # type: ignore[arg-type]
    )
    masks = engine.attach(encoder, attach, include=preset)
    engine.start(torch.optim.SGD([{"name": "scores", "params": list(masks.parameters()), "lr": 1e4}]))
    objective.loss_factor = engine.loss_factor
    begin(objective, world)
    losses = []
    for step in range(STEPS):
        count = ROWS if step != 1 else ROWS - 1  # a ragged batch: one rank pads
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64)
        places = torch.arange(rank, size * -(-count // size), size)
        weights, places = (places < count).float(), places % count
        ids = (places * 2 + step) % NUM
        objective.start_step(step)
        metrics = engine.forward_backward(
            Batch((images[places],), torch.full((len(places),), -1), weights, ids, count)
        )
        losses.append(world.sum(metrics["loss"].clone()).item())
        engine.step()
        objective.after_step()
    return losses, engine.state().parameters, whole_buffers(objective, world), len(objective.bank.rows)


def begin(objective: Nbd, world: World) -> None:
    generator = torch.Generator().manual_seed(3)
    views = torch.randn(NUM, 4, DIM, generator=generator, dtype=torch.float64)[world.rank :: world.size]
    ids = torch.arange(world.rank, NUM, world.size)
    projection = torch.randn(DIM, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    objective.begin(
        views.mean(1),
        Whitening(torch.zeros(DIM, dtype=torch.float64), projection),
        WarmupViews(ids, views),
        torch.ones(len(ids), dtype=torch.bool),
        lambda bank, _, k: search(bank, bank, k=k, bank_ids=ids, query_ids=ids, ranks=world),
    )


def run_kinds(kinds: tuple[str, ...]) -> list[Outcome]:
    return [run_steps(kind) for kind in kinds]


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize(("size", "kinds"), [(2, ("ddp", "fsdp", "bits", "deepspeed")), (4, ("ddp",))])
def test_ranks_and_engines_compute_what_one_process_does_with_a_share_of_the_bank(
    size: int, kinds: tuple[str, ...]
) -> None:
    losses, scores, buffers, _ = run_steps("ddp")
    for rank, outcomes in enumerate(run_distributed(run_kinds, size, kinds, timeout=200)):
        for kind, (theirs, their_scores, their_buffers, rows) in zip(kinds, outcomes, strict=True):
            assert rows == len(range(rank, NUM, size))
            assert theirs == pytest.approx(losses, rel=1e-6 if kind == "deepspeed" else 1e-9), kind
            for name, tensor in buffers.items():
                torch.testing.assert_close(their_buffers[name], tensor, rtol=1e-5, atol=1e-7, msg=name)
            for name, tensor in scores.items():
                atol = 2e-3 if kind == "deepspeed" else 1e-7  # its scores are float32, and rates are 1e4
                torch.testing.assert_close(
                    their_scores[name], tensor, rtol=1e-5, atol=atol, check_dtype=False, msg=name
                )
    assert any((tensor <= 0).any() for tensor in scores.values()), "bits flipped"


# ---- whole runs

SMALL = ["objective.name=nbd", "nbd.dim=8", "nbd.neighbours=3", "nbd.warmup_steps=5", "nbd.warmup_batch=16"]


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def test_a_run_goes_on_bit_for_bit(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    path = write_config(tmp_path / "tiny.yaml", tiny_data, optim={"score_lr": 0.3}, eval={"final": False})
    renewed = ["nbd.views=2", "nbd.renew_every=0.5"]
    check_resumed_equals_whole(path, ["run.name=a", *SMALL, *renewed], tmp_path / "a", step=3)
    state = last_state(tmp_path / "a")
    assert len(state["buffers/bank"]) == 48
    assert "buffers/first_weight" in state
    assert not (tmp_path / "a" / "head.safetensors").exists(), "the head is thrown away"
    scores = [tensor for name, tensor in state.items() if name.startswith("parameters/")]
    assert any((tensor <= 0).any() for tensor in scores), "bits flipped"


def train_elsewhere(path: Path, overrides: list[str]) -> None:
    train(path, overrides)


@pytest.mark.distributed
def test_two_processes_see_the_same_bank_and_one_goes_on_from_it(
    tmp_path: Path, tiny_data: dict[str, str]
) -> None:
    path = write_config(tmp_path / "tiny.yaml", tiny_data, optim={"score_lr": 0.05}, eval={"final": False})
    train(path, [*KEEP, *SMALL, "run.name=one"])
    two = [*KEEP, *SMALL, "run.name=two"]
    run_distributed(train_elsewhere, 2, path, two, backend="", timeout=120.0)
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    first, second = (
        read_checkpoint(committed(tmp_path / name / "checkpoints")[-1]).tensors for name in ("one", "two")
    )
    assert torch.equal(first["buffers/neighbours"], second["buffers/neighbours"])
    torch.testing.assert_close(first["buffers/bank"], second["buffers/bank"], rtol=1e-3, atol=1e-4)


def test_a_broken_picture_is_left_out_of_the_bank_and_listed(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data", train=24, test=6)
    spoil(next(Path(data["train"]).glob("*.tar")))
    path = write_config(tmp_path / "tiny.yaml", data, eval={"final": False})
    train(path, [*KEEP, *SMALL, "run.name=a", "train.global_batch_size=8", "data.max_broken=0.2"])
    listed = [json.loads(line) for line in (tmp_path / "a" / "quarantine.jsonl").read_text().splitlines()]
    (broken,) = {entry["id"] for entry in listed}
    state = last_state(tmp_path / "a")
    assert state["buffers/present"].tolist() == [i != broken for i in range(24)]
    assert not (state["buffers/neighbours"] == broken).any()
    assert all(loss == loss for loss in losses_of(tmp_path / "a"))


def spoil(shard: Path) -> None:
    """Overwrite the first picture's bytes in the tar, after its index was made."""
    content = bytearray(shard.read_bytes())
    place = content.index(b"\x89PNG")
    content[place + 40 : place + 120] = bytes(80)
    shard.write_bytes(bytes(content))
