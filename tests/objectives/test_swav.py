"""SwAV: loss, assignments and gradients against numpy in float64, world 1 = 2 = 4, queue, whole runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfmask_dist.backbones.any_size import accept_sizes
from selfmask_dist.config.objectives import SwavConfig
from selfmask_dist.data import Batch
from selfmask_dist.objectives import Context, Swav
from selfmask_dist.objectives.swav import encode_views, sinkhorn
from selfmask_dist.parallel import World
from selfmask_dist.runs.checkpoint import load_newest
from tests.support.distributed import run_distributed
from tests.support.models import make, open_clip_tower, timm_vit
from tests.support.state import load_whole_buffers, whole_buffers
from tests.training.test_run import losses_of, metrics_of, run_here, settings, shards  # noqa: F401 (a fixture)

ROWS, VIEWS, IN_DIM, STEPS = 8, 4, 10, 5
OPTIONS: dict[str, Any] = {"prototypes": 6, "dim": 5, "temperature": 0.1, "epsilon": 0.05}


# ---- the formula, on its own


def numpy_sinkhorn(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """As in the paper's algorithm, with all of its normalisations: (rows, prototypes) -> the same."""
    q = np.exp(scores / epsilon).T
    num_prototypes, rows = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * num_prototypes
        q /= q.sum(axis=0, keepdims=True) * rows
    return (q * rows).T


def numpy_loss(
    embeddings: np.ndarray, prototypes: np.ndarray, queue: np.ndarray | None, config: SwavConfig
) -> float:
    """embeddings: (views, rows, dim), unit; queue: (2, length, dim)."""
    scores = embeddings @ prototypes.T
    total = 0.0
    for i in range(2):
        known = scores[i] if queue is None else np.concatenate([scores[i], queue[i] @ prototypes.T])
        targets = numpy_sinkhorn(known, config.epsilon, config.sinkhorn_iterations)[: len(scores[i])]
        for v in range(len(scores)):
            if v == i:
                continue
            logits = scores[v] / config.temperature
            shifted = logits - logits.max(axis=1, keepdims=True)
            log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
            total -= float((targets * log_p).sum(axis=1).mean()) / (len(scores) - 1)
    return total / 2


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def views_of(step: int, *, rows: int = ROWS) -> tuple[Tensor, ...]:
    """ "Images" that the encoder below only flattens: (rows, 10, 1, 1)."""
    generator = torch.Generator().manual_seed(step)
    return tuple(
        torch.randn(rows, IN_DIM, 1, 1, generator=generator, dtype=torch.float64) for _ in range(VIEWS)
    )


def batch_of(step: int, *, rank: int = 0, size: int = 1, rows: int = ROWS) -> Batch:
    views = tuple(view[rank::size] for view in views_of(step, rows=rows))
    count = len(views[0])
    return Batch(views, torch.full((count,), -1), torch.ones(count), torch.arange(rows)[rank::size], rows)


def objective_of(context: Context | None = None, **changes: Any) -> Swav:
    return Swav(IN_DIM, SwavConfig(**(OPTIONS | changes)), context or Context(0, 1, ROWS)).double()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(9)
        weight = torch.randn(IN_DIM, IN_DIM, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight


def expected_losses(objective: Swav, *, queue_start: int | None = None, length: int = 0) -> list[float]:
    """Of the first steps without any update, the queue kept as a plain list."""
    weight = Encoder().weight.detach().numpy()
    projector, bias = (p.detach().numpy() for p in objective.projector.parameters())
    prototypes = objective.prototypes.weight.detach().numpy()
    losses, queue = [], np.zeros((2, 0, OPTIONS["dim"]))
    for step in range(STEPS):
        features = np.stack([view.flatten(1).numpy() @ weight for view in views_of(step)])
        embeddings = unit(features @ projector.T + bias)
        used = queue[:, :length] if length and queue.shape[1] >= length else None
        losses.append(numpy_loss(embeddings, prototypes, used, objective.config))
        if queue_start is not None and step >= queue_start:
            queue = np.concatenate([embeddings[:2], queue], axis=1)
    return losses


# ---- one process


@pytest.mark.parametrize("epsilon", [0.05, 0.03])
def test_assignments_are_the_papers(epsilon: float) -> None:
    scores = torch.from_numpy(unit(np.random.default_rng(0).normal(size=(20, 7))))
    ours = sinkhorn(scores, epsilon=epsilon, iterations=3)
    assert np.abs(ours.numpy() - numpy_sinkhorn(scores.numpy(), epsilon, 3)).max() < 1e-14
    many = sinkhorn(scores, epsilon=epsilon, iterations=300)
    assert torch.allclose(many.sum(0), torch.full((7,), 20 / 7).double(), atol=1e-6), "prototypes used alike"


def test_rows_without_weight_change_nothing_and_extremes_stay_finite() -> None:
    scores = torch.from_numpy(unit(np.random.default_rng(0).normal(size=(6, 4)))).float()
    more = torch.cat([scores, torch.ones(2, 4)])
    weights = torch.tensor([1.0] * 6 + [0.0] * 2)
    assert torch.equal(sinkhorn(more, weights, epsilon=0.05)[:6], sinkhorn(scores, epsilon=0.05))
    extreme = torch.tensor([[1.0, -1.0, -1.0, -1.0]] * 5)  # exp((1 + 1) / 0.005) has 174 digits
    assert sinkhorn(extreme, epsilon=0.005).isfinite().all()


@pytest.mark.parametrize(("length", "start"), [(0, None), (16, 1)])
def test_loss_is_the_independent_formula(length: int, start: int | None) -> None:
    objective, encoder = objective_of(queue_length=length, queue_start_epoch=start or 0), Encoder()
    losses, used = [], []
    for step in range(STEPS):
        objective.start_step(step)
        used.append(objective.is_queue_used)
        loss, metrics = objective(encoder, batch_of(step))
        losses.append(loss.item())
        assert metrics["queue"] == used[-1]
    assert used == ([False] * 5 if not length else [False, False, False, True, True])
    assert losses == pytest.approx(expected_losses(objective, queue_start=start, length=length), abs=1e-12)


def test_gradients_are_those_of_the_formula() -> None:
    objective, encoder = objective_of(), Encoder()
    loss, _ = objective(encoder, batch_of(0))
    loss.backward()
    projector, bias = objective.projector.parameters()
    targets = []  # constants of the formula
    with torch.no_grad():
        flat = [view.flatten(1) @ encoder.weight @ projector.T + bias for view in views_of(0)]
        for z in flat[:2]:
            scores = nn.functional.normalize(z, dim=1) @ objective.prototypes.weight.T
            targets.append(torch.from_numpy(numpy_sinkhorn(scores.numpy(), 0.05, 3)))

    def formula(weight: Tensor, prototypes: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i, target in enumerate(targets):
            for v, view in enumerate(views_of(0)):
                if v != i:
                    z = view.flatten(1) @ weight @ projector.T + bias
                    logits = (z / z.norm(dim=1, keepdim=True)) @ prototypes.T / 0.1
                    total = total - (target * logits.log_softmax(1)).sum() / ROWS / (VIEWS - 1) / 2
        return total

    inputs = (encoder.weight, objective.prototypes.weight)
    expected = torch.autograd.grad(formula(*inputs), inputs)
    for parameter, grad in zip(inputs, expected, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, grad, atol=1e-13)


def test_frozen_prototypes_have_a_gradient_of_zero() -> None:
    objective, encoder = objective_of(freeze_steps=2), Encoder()
    for step, expected in enumerate((True, True, False)):
        objective.zero_grad()
        objective.start_step(step)
        objective(encoder, batch_of(step))[0].backward()
        assert objective.prototypes.weight.grad is not None
        assert bool((objective.prototypes.weight.grad == 0).all()) is expected
        assert bool(objective.held_parameters()) is expected
        assert objective.projector.weight.grad is not None
        assert objective.projector.weight.grad.any()


def test_each_resolution_is_one_forward() -> None:
    shapes = []

    class Spy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            shapes.append(tuple(images.shape))
            return images.mean(dim=(2, 3))

    views = (
        *(torch.full((3, 3, 8, 8), float(v)) for v in range(2)),
        *(torch.full((3, 3, 4, 4), 2.0 + v) for v in range(6)),
    )
    features = encode_views(Spy(), views)
    assert shapes == [(6, 3, 8, 8), (18, 3, 4, 4)]
    assert features[:, 0].tolist() == [float(v) for v in range(8) for _ in range(3)]


def test_a_ragged_batch_and_broken_rows_stay_out_of_the_queue() -> None:
    objective, encoder = objective_of(queue_length=16), Encoder()
    objective.start_step(0)
    batch = batch_of(0)
    batch.weights[3] = 0
    objective(encoder, batch)
    assert objective.queue.any(dim=2).sum(dim=1).tolist() == [7, 7]
    before = objective.queue.clone()
    objective(encoder, batch_of(1, rows=5))
    assert torch.equal(objective.queue, before)


def test_collapse_and_the_queues_jump_are_said_once() -> None:
    objective = objective_of()
    fine = {"loss": 1.0, "concentration": 0.4, "queue": 0.0}
    assert objective.remarks(fine) == []
    assert "queue came in" in objective.remarks({"loss": 1.5, "concentration": 0.4, "queue": 1.0})[0]
    assert objective.remarks({"loss": 1.6, "concentration": 0.4, "queue": 1.0}) == []
    assert "collapsed" in objective.remarks({"loss": 1.8, "concentration": 0.9999, "queue": 1.0})[0]
    same = Batch(
        (torch.ones(ROWS, IN_DIM, 1, 1).double(),) * VIEWS,
        torch.zeros(ROWS),
        torch.ones(ROWS),
        torch.arange(ROWS),
        ROWS,
    )
    _, metrics = objective(Encoder(), same)
    assert metrics["concentration"] == pytest.approx(1.0)


def test_a_loss_that_says_that_nothing_is_learned_is_said_once() -> None:
    objective = objective_of()
    flat = {"loss": float(np.log(6)) + 0.001, "concentration": 0.99, "queue": 0.0}
    said = [
        objective.remarks(values) for values in (flat, flat, flat | {"loss": 1.7}, flat, flat, flat, flat)
    ]
    assert [len(remarks) for remarks in said] == [0, 0, 0, 0, 0, 1, 0], "three logged means in a row"
    assert "the loss stays at 1.793" in said[5][0]
    assert "swav.epsilon" in said[5][0]


def test_a_step_makes_no_all_reduce_beside_sinkhorns() -> None:
    shapes = []

    def all_reduce(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    objective = objective_of(Context(0, 1, ROWS, all_reduce))
    _, metrics = objective(Encoder(), batch_of(0))
    assert shapes == [(2 * 6 + 5 + 1,), (2, 1, 6), (2, 1, 6)], "the mean embedding travels with the first"
    projector, bias = (parameter.detach() for parameter in objective.projector.parameters())
    features = views_of(0)[0].flatten(1) @ Encoder().weight.detach()
    mean = unit((features @ projector.T + bias).numpy()).mean(axis=0)
    assert metrics["concentration"] == pytest.approx(np.linalg.norm(mean))


def test_numbers_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="queue_length 10 is not divisible by world size 4; set it to 8"):
        objective_of(Context(0, 4, ROWS), queue_length=10)
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.005"):
        objective_of(epsilon=0.001)


# ---- crops of other sizes


@pytest.mark.parametrize("build", [timm_vit, open_clip_tower])
def test_vision_transformers_take_small_crops(build: Any) -> None:
    encoder = build().eval()
    images, small = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)
    before = encoder(images)
    accept_sizes(encoder, [16, 8], name="a ViT")
    assert torch.equal(encoder(images), before)
    assert encoder(small).shape == before.shape
    with pytest.raises(ValueError, match="cannot take crops of 2 pixels"):
        accept_sizes(encoder, [2], name="a ViT")
    assert torch.equal(encoder(images), before), "nothing of the encoder is left changed by a refusal"


# ---- many ranks


def _losses_here(length: int) -> tuple[list[float], Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    world = World(rank, size)

    def all_reduce(tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    context = Context(rank, size, ROWS, all_reduce, all_to_all=world.all_to_all)
    objective = objective_of(context, queue_length=length, queue_start_epoch=1)
    encoder, losses = Encoder(), []
    for step in range(STEPS):
        objective.start_step(step)
        loss, _ = objective(encoder, batch_of(step, rank=rank, size=size))
        loss.backward()
        losses.append(all_reduce(loss.detach().clone()).item())
    assert encoder.weight.grad is not None
    buffers = whole_buffers(objective, world)
    assert list(buffers) == ["queue", "queue_rows"]
    whole = buffers["queue"].clone()
    objective.queue.zero_()
    load_whole_buffers(objective, buffers)
    assert torch.equal(whole_buffers(objective, world)["queue"], whole)
    return losses, torch.cat([all_reduce(encoder.weight.grad).flatten(), whole.flatten()])


@pytest.mark.distributed
@pytest.mark.parametrize("length", [0, 16])
def test_any_number_of_ranks_computes_the_same(length: int) -> None:
    alone = run_distributed(_losses_here, 1, length)[0]
    for world_size in (2, 4):
        losses, tensors = run_distributed(_losses_here, world_size, length)[0]
        assert losses == pytest.approx(alone[0], rel=1e-12)
        assert torch.allclose(tensors, alone[1], atol=1e-12), "gradients and queue"


# ---- whole runs

SWAV = (
    "objective.name=swav",
    "crops.local_count=2",
    "crops.local_size=8",
    "crops.blur=0",
    "swav.prototypes=10",
    "swav.dim=8",
    "swav.queue_length=32",
    "swav.queue_start_epoch=0.5",
    "swav.freeze_steps=2",
    "optim.head_lr=0.15",
    "optim.head_weight_decay=1e-6",
    "train.epochs=3",
)


def _run_rank(overrides: list[str]) -> None:
    from selfmask_dist.cli.train import run
    from selfmask_dist.config import load_config

    run(load_config(None, overrides))


def prototypes_of(run: Path) -> Tensor:
    found = load_newest(run / "checkpoints")
    assert found is not None
    return found[0].tensors["parameters/objective.prototypes.weight"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "engine",
    [
        "ddp",
        "fsdp",
        "bits",
        "deepspeed",
        pytest.param("deepspeed engine.zero_stage=3", marks=pytest.mark.slow),
    ],
)
def test_a_run_without_labels_does_not_depend_on_ranks_or_engine(
    shards: Path,  # noqa: F811
    tmp_path: Path,
    engine: str,
) -> None:
    alone = run_here(settings(shards, tmp_path, *SWAV, "run.name=alone"))
    lines = [line for line in metrics_of(alone) if "loss" in line]
    assert lines[-1]["queue"] == pytest.approx(1.0)
    assert sum(line["mask/flips"] for line in lines) > 0
    assert not (alone / "head.safetensors").exists(), "projector and prototypes are thrown away"
    assert "head" not in json.loads((alone / "result.json").read_text())["adapted"]
    assert torch.allclose(prototypes_of(alone).norm(dim=1), torch.ones(10))
    keys = f"engine.name={engine}".split()
    run_distributed(_run_rank, 2, settings(shards, tmp_path, *SWAV, "run.name=two", *keys), backend="")
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(alone), rel=2e-4)
    assert torch.allclose(prototypes_of(tmp_path / "two"), prototypes_of(alone), atol=1e-3)


def test_a_run_starts_from_another_ones_masks_on_a_subset(shards: Path, tmp_path: Path) -> None:  # noqa: F811
    first = run_here(settings(shards, tmp_path, *SWAV, "run.name=first"))
    np.save(tmp_path / "subset.npy", np.arange(0, 60, 3))
    more = [f"mask.init_from={first}", f"data.subset={tmp_path / 'subset.npy'}", "eval.final=false"]
    second = run_here(settings(shards, tmp_path, *SWAV, *more, "run.name=second", "optim.score_lr=1e-9"))
    assert "adapted" not in json.loads((second / "result.json").read_text())
    assert len(losses_of(second)) == 3 * 2, "20 images in batches of 16, three epochs"
    ours, theirs = (load_newest(run / "checkpoints") for run in (second, first))
    assert ours is not None
    assert theirs is not None
    for name, tensor in theirs[0].tensors.items():
        if name.startswith("parameters/encoder"):
            assert torch.allclose(ours[0].tensors[name], tensor, atol=1e-6), name
    np.save(tmp_path / "subset.npy", np.array([60]))
    with pytest.raises(ValueError, match=r"names samples 60 to 60; data.train has 0 to 59"):
        run_here(settings(shards, tmp_path, *SWAV, *more, "run.name=third"))


def test_masks_on_a_conv_net_train_on_crops() -> None:
    encoder, preset = make("conv", dtype=torch.float32)
    from selfmask_dist import attach

    masks = attach(encoder, include=preset)
    objective = Swav(16, SwavConfig(**OPTIONS), Context(0, 1, 4))
    optimizer = torch.optim.SGD(masks.parameters(), lr=1.0, momentum=0.9)
    masks.bind(optimizer)
    generator = torch.Generator().manual_seed(0)
    views = tuple(torch.randn(4, 3, size, size, generator=generator) for size in (16, 16, 8, 8))
    batch = Batch(views, torch.zeros(4), torch.ones(4), torch.arange(4), 4)
    losses = []
    for _ in range(30):
        loss, _ = objective(encoder, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
