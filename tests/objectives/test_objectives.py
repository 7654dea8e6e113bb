"""Objectives without labels beside SwAV: loss, gradients and teachers against plain formulas in float64."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfmask_dist.config import ConfigError, load_config
from selfmask_dist.config.objectives import DinoConfig, MocoV2Config, MocoV3Config, SimclrConfig
from selfmask_dist.data import Batch
from selfmask_dist.masking import Shards, attach
from selfmask_dist.objectives import (
    Context,
    Dino,
    MocoV2,
    MocoV3,
    Objective,
    Simclr,
)
from selfmask_dist.objectives.parts import GlobalBatchNorm
from selfmask_dist.parallel import World
from selfmask_dist.parallel.moving_average import MovingAverage
from selfmask_dist.parallel.parts import KeptParts, TrainedParameter
from tests.support.models import make
from tests.support.state import averages_of

ROWS, IN_DIM, STEPS, LR = 6, 7, 4, 0.3
CROPS = {"dino": 4}
Weights = dict[str, Tensor]


def build(name: str, in_dim: int = IN_DIM, context: Context | None = None) -> Objective:
    context = replace(context or Context(0, 1, ROWS), num_steps=STEPS)
    if name == "simclr":
        return Simclr(in_dim, SimclrConfig(dim=5, hidden=8, temperature=0.2), context).double()
    if name == "moco_v2":
        v2 = MocoV2Config(dim=5, hidden=8, temperature=0.2, momentum=0.9, queue_length=10)
        return MocoV2(in_dim, v2, context).double()
    if name == "moco_v3":
        v3 = MocoV3Config(dim=5, hidden=8, momentum=0.9)
        return MocoV3(in_dim, v3, context).double()
    config = DinoConfig(
        outputs=6, hidden=8, bottleneck=4, momentum=0.9, temperature_epochs=2, freeze_epochs=1
    )
    return Dino(in_dim, config, context).double()  # epochs of one step


NAMES = ("simclr", "moco_v2", "moco_v3", "dino")


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(9)
        self.weight = nn.Parameter(torch.randn(IN_DIM, IN_DIM, generator=generator, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight


def batch_of(step: int, *, views: int = 2, rows: int = ROWS) -> Batch:
    generator = torch.Generator().manual_seed(step)
    images = tuple(
        torch.randn(rows, IN_DIM, 1, 1, generator=generator, dtype=torch.float64) for _ in range(views)
    )
    return Batch(images, torch.full((rows,), -1), torch.ones(rows), torch.arange(rows), rows)


def whole(parameters: dict[str, nn.Parameter]) -> dict[str, TrainedParameter]:
    return {name: TrainedParameter(p, name, p.shape, Shards()) for name, p in parameters.items()}


# ---- plain formulas: weights by name in, the loss of a step out


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def layers(
    x: Tensor, w: Weights, name: str, count: int, *, smooth: bool = False, norm: bool = False
) -> Tensor:
    """Linear layers with a nonlinearity between them; with `norm`, over the rows after each."""
    for index in range(count):
        x = x @ w[f"{name}.layers.{index}.weight"].T
        x = x if norm else x + w[f"{name}.layers.{index}.bias"]
        if norm:
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
            if f"{name}.norms.{index}.weight" in w:
                x = x * w[f"{name}.norms.{index}.weight"] + w[f"{name}.norms.{index}.bias"]
        if index < count - 1:
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) if smooth else x.clamp(min=0)
    return x


def simclr(w: Weights, _teacher: Weights, views: list[Tensor], _state: dict[str, Any]) -> Tensor:
    z = unit(torch.cat([layers(v @ w["encoder"], w, "projector", 2) for v in views]))
    n, total = len(views[0]), torch.zeros(())
    for i in range(2 * n):
        others = [(z[i] @ z[k] / 0.2).exp() for k in range(2 * n) if k != i]
        total = total - torch.log((z[i] @ z[(i + n) % (2 * n)] / 0.2).exp() / sum(others))
    return total / (2 * n)


def moco_v2(w: Weights, teacher: Weights, views: list[Tensor], state: dict[str, Any]) -> Tensor:
    state["momentum"] = 0.9
    q = unit(layers(views[0] @ w["encoder"], w, "projector", 2))
    k = unit(layers(views[1] @ teacher["encoder"], teacher, "projector", 2))
    total = torch.zeros(())
    for i in range(len(q)):
        positive = (q[i] @ k[i] / 0.2).exp()
        total = total - torch.log(positive / (positive + sum((q[i] @ n / 0.2).exp() for n in state["queue"])))
    state["queue"] = [*k, *state["queue"]][:10]
    return total / len(q)


def moco_v3(w: Weights, teacher: Weights, views: list[Tensor], state: dict[str, Any]) -> Tensor:
    state["momentum"] = 1 - 0.1 * (math.cos(math.pi * state["step"] / STEPS) + 1) / 2
    q = [layers(v @ w["encoder"], w, "projector", 3, norm=True) for v in views]
    q = [unit(layers(v, w, "predictor", 2, norm=True)) for v in q]
    k = [unit(layers(v @ teacher["encoder"], teacher, "projector", 3, norm=True)) for v in views]
    total = torch.zeros(())
    for one, other in ((q[0], k[1]), (q[1], k[0])):
        for i in range(len(one)):
            all_keys = sum((one[i] @ key / 0.2).exp() for key in other)
            total = total - 2 * 0.2 * torch.log((one[i] @ other[i] / 0.2).exp() / all_keys) / len(one)
    return total


def dino(w: Weights, teacher: Weights, views: list[Tensor], state: dict[str, Any]) -> Tensor:
    state["momentum"] = 1 - 0.1 * (math.cos(math.pi * state["step"] / STEPS) + 1) / 2

    def outputs(weights: Weights, view: Tensor) -> Tensor:
        bottleneck = unit(layers(view @ weights["encoder"], weights, "projector", 3, smooth=True))
        return bottleneck @ unit(weights["last"]).T

    temperature = (0.04, 0.055, 0.07, 0.07)[state["step"]]
    t = [outputs(teacher, view) for view in views[:2]]
    total, pairs = torch.zeros(()), 0
    for i in range(2):
        p = ((t[i] - state["center"]) / temperature).exp()
        p = p / p.sum(1, keepdim=True)
        for v, view in enumerate(views):
            if v != i:
                s = (outputs(w, view) / 0.1).exp()
                total = total - (p * torch.log(s / s.sum(1, keepdim=True))).sum(1).mean()
                pairs += 1
    state["center"] = 0.9 * state["center"] + 0.1 * torch.cat(t).mean(0)
    return total / pairs


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "simclr": simclr,
    "moco_v2": moco_v2,
    "moco_v3": moco_v3,
    "dino": dino,
}


@pytest.mark.parametrize("name", NAMES)
def test_losses_steps_and_teachers_are_those_of_the_formula(name: str) -> None:
    encoder, objective = Encoder(), build(name)
    parameters = {"encoder": encoder.weight, **dict(objective.named_parameters())}
    w = {key: value.detach().clone() for key, value in parameters.items()}
    averages = {key: value.clone() for key, value in w.items()}
    state: dict[str, Any] = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    state["momentum"] = 0.0
    heads = objective.teacher_parameters()
    teacher = None
    if heads is not None:
        kept = {key: p for key, p in parameters.items() if key == "encoder" or any(p is h for h in heads)}
        teacher = objective.teacher = MovingAverage(whole(kept), {}, lambda: None)
    optimizer = torch.optim.SGD(parameters.values(), lr=LR)
    for step in range(STEPS):
        batch = batch_of(step, views=CROPS.get(name, 2))
        objective.start_step(step)
        loss, metrics = objective(encoder, batch)
        optimizer.zero_grad()
        loss.backward()
        for held in objective.held_parameters():
            held.grad = None
        optimizer.step()
        if teacher is not None:
            teacher.update()

        variables = {key: value.clone().requires_grad_() for key, value in w.items()}
        state["step"] = step
        expected = FORMULAS[name](variables, averages, [v.flatten(1) for v in batch.views], state)
        grads = torch.autograd.grad(expected, list(variables.values()), allow_unused=True)
        for (key, value), grad in zip(w.items(), grads, strict=True):
            if grad is not None and not (name == "dino" and key == "last" and step == 0):
                w[key] = value - LR * grad
            averages[key] = state["momentum"] * averages[key] + (1 - state["momentum"]) * w[key]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-11), step
        assert metrics["loss"].item() == loss.item()
        for key, value in parameters.items():
            assert torch.allclose(value, w[key], rtol=0, atol=1e-11), (step, key)
    if teacher is not None:
        for key, value in averages_of(teacher).items():
            assert torch.allclose(value, averages[key], rtol=0, atol=1e-11), key
            assert not torch.allclose(value, w[key], rtol=0, atol=1e-6) or not parameters[key].any(), key


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_weight_change_nothing(name: str) -> None:
    objective, encoder, views = build(name, context=Context(0, 1, 8)), Encoder(), CROPS.get(name, 2)
    batch = batch_of(0, views=views)
    loss, _ = objective(encoder, batch)
    loss.backward()
    assert encoder.weight.grad is not None
    expected = encoder.weight.grad.clone()
    encoder.zero_grad()
    broken = tuple(torch.cat([view, 100 * torch.ones(2, IN_DIM, 1, 1)]) for view in batch.views)
    weights = torch.tensor([1.0] * ROWS + [0.0] * 2)
    again = build(name, context=Context(0, 1, 8))
    more, metrics = again(encoder, Batch(broken, torch.zeros(8), weights, torch.arange(8), ROWS))
    more.backward()
    assert more.item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(encoder.weight.grad, expected, rtol=0, atol=1e-12)
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("name", NAMES)
def test_equal_and_huge_features_stay_finite(name: str) -> None:
    for scale in (0.0, 1e30):
        objective, encoder = build(name).float(), Encoder().float()
        images = tuple(torch.full((ROWS, IN_DIM, 1, 1), scale) for _ in range(CROPS.get(name, 2)))
        loss, metrics = objective(
            encoder, Batch(images, torch.zeros(ROWS), torch.ones(ROWS), torch.arange(ROWS), ROWS)
        )
        loss.backward()
        assert loss.isfinite()
        assert all(value.isfinite() for value in metrics.values())


def test_moco_v2s_queue_takes_whole_batches_and_leaves_broken_keys_empty() -> None:
    objective = build("moco_v2")
    before = objective.queue.clone()  # type: ignore[operator]
    batch = batch_of(0)
    batch.weights[2] = 0
    objective(Encoder(), batch)
    assert objective.queue[:ROWS].any(dim=1).tolist() == [True, True, False, True, True, True]  # type: ignore[index]
    assert torch.equal(objective.queue[ROWS:], before[: 10 - ROWS])  # type: ignore[index]
    filled = objective.queue.clone()  # type: ignore[operator]
    ragged = batch_of(1, rows=4)
    loss, _ = objective(Encoder(), ragged)
    assert torch.equal(objective.queue, filled)  # type: ignore[arg-type]
    assert loss.isfinite()


def test_collapses_are_said_once() -> None:
    fine = {"loss": 1.0, "concentration": 0.4, "target_entropy": 0.5, "output_entropy": 0.7}
    for name in NAMES:
        assert build(name).remarks(fine) == []
    for name, trivial in (
        ("simclr", math.log(2 * ROWS - 1)),
        ("moco_v2", math.log(11)),
        ("moco_v3", 4 * 0.2 * math.log(ROWS)),
    ):
        objective = build(name)
        said = [objective.remarks(fine | {"loss": trivial}) for _ in range(4)]
        assert [len(texts) for texts in said] == [0, 0, 1, 0], "three logged means in a row"
        assert "learns nothing" in said[2][0]
        assert "collapsed" in objective.remarks(fine | {"concentration": 0.9999})[0]
        assert objective.remarks(fine | {"concentration": 0.9999}) == []
    objective = build("dino")
    assert "same for all outputs" in objective.remarks(fine | {"target_entropy": 0.9999})[0]
    assert "all images have one output" in objective.remarks(fine | {"output_entropy": 0.001})[0]
    assert objective.remarks(fine | {"target_entropy": 0.9999, "output_entropy": 0.001}) == []


def test_batch_normalisation_is_torchs() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64) + 1000
    ours, theirs = GlobalBatchNorm(3, Context()).double(), nn.BatchNorm1d(3).double()
    expected = torch.stack([theirs(view) for view in x])
    assert torch.allclose(ours(x, torch.ones(5)), expected, atol=1e-9)


# ---- teachers under masks


def test_a_teachers_theta_is_made_from_the_moving_average_of_scores() -> None:
    model, preset = make("conv")
    masks = attach(model, include=preset)
    entries = {entry.name: entry for entry in masks.entries}
    trained = whole({name: entry.scores for name, entry in entries.items()})
    statistics = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    teacher = MovingAverage(trained, statistics, masks.rewrite)
    teacher.momentum = 0.75
    averages = {name: entry.scores.detach().clone() for name, entry in entries.items()}
    for _ in range(3):
        for name, entry in entries.items():
            entry.scores.data.add_(torch.randn(entry.scores.shape, dtype=torch.float64))
            averages[name] = 0.75 * averages[name] + 0.25 * entry.scores.detach()
        masks.rewrite()
        teacher.update()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores = {name: entry.scores.detach().clone() for name, entry in entries.items()}
    with teacher(), torch.no_grad():
        for name, entry in entries.items():
            mask = (averages[name] > 0).double()
            expected = (mask.numel() / mask.sum()).sqrt() * entry.weight * mask
            assert torch.allclose(entry.theta, expected, atol=1e-12), name
            assert not torch.equal(entry.theta, before[name]), name
        model.train()
        model(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, before[name]), f"{name} is bit for bit as it was"
    assert all(torch.equal(entry.scores, scores[name]) for name, entry in entries.items())
    assert not torch.equal(averages_of(teacher)["bn1.running_mean"], before["bn1.running_mean"]), (
        "its own moved"
    )
    entry = masks.entries[0]
    entry.scores.data.view(-1)[0] = torch.inf  # always kept
    for momentum in (0.0, 0.5, 1.0):
        teacher.momentum = momentum
        teacher.update()
        assert not averages_of(teacher)[entry.name].isnan().any()
    assert averages_of(teacher)[entry.name].view(-1)[0] == torch.inf
    with pytest.raises(ValueError, match=r"do not fit what is trained: \['odd'\]"):
        teacher.load(KeptParts([]), [*averages_of(teacher), "odd"], World())


def test_under_autocast_the_student_computes_with_its_own_weights() -> None:
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    teacher = MovingAverage(whole(dict(layer.named_parameters())), {}, lambda: None)
    layer.weight.data.add_(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
    expected.float().sum().backward()
    assert layer.weight.grad is not None
    grad = layer.weight.grad.clone()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), teacher():
            older = layer(x)
        output = layer(x)
    output.float().sum().backward()
    assert torch.equal(output, expected)
    assert not torch.equal(older, expected)
    assert torch.equal(layer.weight.grad, grad)


# ---- settings


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["objective.name=simclr"], "set crops.global_count=2 and crops.local_count=0"),
        (["objective.name=moco_v3", "crops.local_count=0", "crops.global_count=3"], "on two views"),
        (["objective.name=dino", "train.accumulate=2"], "set train.accumulate=1"),
        (["objective.name=dino", "engine.name=deepspeed"], "use engine.name=fsdp"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(overrides: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(None, overrides)
