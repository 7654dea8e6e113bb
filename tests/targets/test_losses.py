"""Objectives of targets: losses against hand formulas, rows of ranks, and heads in files."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfmask_dist.config import load_config
from selfmask_dist.config.objectives import ObjectiveConfig
from selfmask_dist.data import Batch, TargetSummary
from selfmask_dist.data.targets import IGNORED
from selfmask_dist.objectives.supervised import L2_LENGTH
from selfmask_dist.objectives.targets import Dense, Multilabel, Regression
from selfmask_dist.training.whole.keep import head_of

DIM, OUTPUTS, ROWS = 12, 3, 8


class Patches(nn.Module):
    """Images (n, 3, 4, 4) to (n, 2, 2, DIM): each quarter's pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return F.unfold(images, 2, stride=2).transpose(1, 2).unflatten(1, (2, 2))


def batch_of(targets: Tensor, generator: torch.Generator, *, size: int = 2) -> Batch:
    return Batch(
        views=(torch.randn(ROWS, 3, size, size, generator=generator, dtype=torch.float64),),
        labels=torch.full((ROWS,), -1),
        weights=torch.ones(ROWS),
        ids=torch.arange(ROWS),
        global_count=ROWS,
        targets=targets,
    )


def part(batch: Batch, rows: slice) -> Batch:
    assert batch.targets is not None
    return Batch(
        (batch.views[0][rows],),
        batch.labels[rows],
        batch.weights[rows],
        batch.ids[rows],
        batch.global_count,
        targets=batch.targets[rows],
    )


def with_weights(objective: Multilabel | Regression | Dense, generator: torch.Generator) -> None:
    assert objective.head is not None
    nn.init.normal_(objective.head.weight, std=0.3, generator=generator)
    nn.init.normal_(objective.head.bias, generator=generator)


def logits_of(objective: Multilabel | Regression | Dense, features: Tensor, length: float) -> Tensor:
    assert objective.head is not None
    return F.linear(F.normalize(features, dim=-1) * length, objective.head.weight, objective.head.bias)


def test_several_labels_by_hand(generator: torch.Generator) -> None:
    targets = (torch.rand(ROWS, OUTPUTS, generator=generator) < 0.4).float()
    batch = batch_of(targets, generator)
    config = ObjectiveConfig(target="multilabel", class_weights="balanced")
    objective = Multilabel(DIM, OUTPUTS, config).double()
    with_weights(objective, generator)
    shares = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64)
    objective.know(TargetSummary(("a", "b", "c"), 100, shares, shares))
    loss, metrics = objective(nn.Flatten(), batch)
    logits = logits_of(objective, batch.views[0].flatten(1), L2_LENGTH)
    chance = torch.sigmoid(logits)
    weight = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    by_hand = -(weight * targets * chance.log() + (1 - targets) * (1 - chance).log())
    torch.testing.assert_close(loss, by_hand.mean(), rtol=1e-6, atol=0)
    assert metrics["label_accuracy"] == pytest.approx(
        float(((logits > 0) == (targets > 0)).double().mean().detach())
    )
    shares[1] = 0
    with pytest.raises(ValueError, match="class 'b'"):
        objective.know(TargetSummary(("a", "b", "c"), 100, shares, shares))
    assert "weight_of_yes" not in objective.state_dict()


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_numbers_by_hand(generator: torch.Generator, kind: str) -> None:
    scale = torch.tensor([1.0, 100.0, 1e-3])
    targets = 5 * scale + scale * torch.randn(ROWS, OUTPUTS, generator=generator)
    batch = batch_of(targets, generator)
    config = ObjectiveConfig.model_validate({"target": "regression", "regression_loss": kind})
    objective = Regression(DIM, OUTPUTS, config).double()
    with_weights(objective, generator)
    mean, deviation = targets.double().mean(dim=0), targets.double().std(dim=0, correction=0)
    objective.know(TargetSummary(("a", "b", "c"), ROWS, mean, deviation))
    loss, metrics = objective(nn.Flatten(), batch)
    outputs = logits_of(objective, batch.views[0].flatten(1), L2_LENGTH / 2)
    errors = outputs - (targets.double() - mean) / deviation
    torch.testing.assert_close(loss, (errors**2 if kind == "mse" else errors.abs()).mean())
    answers = objective.predict(nn.Flatten(), batch.views[0])
    torch.testing.assert_close(answers, outputs * deviation + mean)
    assert metrics["absolute_error"] == pytest.approx(float((answers - targets).abs().mean().detach()))
    # the head in a file gives the same numbers
    head = head_of(objective.float())
    assert head.target == "regression"
    features = batch.views[0].flatten(1).float()
    assert torch.equal(head.logits(features), objective.predict(nn.Identity(), features))
    assert head.out_std is not None
    with pytest.raises(ValueError, match="out_std"):
        type(head)("linear", head.weight, head.bias, out_mean=head.out_mean, target="regression")


def test_label_maps_by_hand(generator: torch.Generator) -> None:
    targets = torch.randint(OUTPUTS, (ROWS, 4, 4), generator=generator)
    targets[:, 0, 1] = IGNORED
    targets[3] = IGNORED  # a picture of which nothing counts
    batch = batch_of(targets, generator, size=4)
    objective = Dense(DIM, OUTPUTS, ObjectiveConfig(target="dense", label_smoothing=0.1)).double()
    with_weights(objective, generator)
    loss, metrics = objective(Patches(), batch)
    logits = logits_of(objective, Patches()(batch.views[0]), L2_LENGTH).permute(0, 3, 1, 2)
    pixels = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
    losses, right = [], []
    for i in range(ROWS):
        counted = targets[i] != IGNORED
        if not counted.any():
            losses.append(torch.zeros((), dtype=torch.float64))
            right.append(0.0)
            continue
        rows = pixels[i].permute(1, 2, 0)[counted]
        losses.append(F.cross_entropy(rows, targets[i][counted], label_smoothing=0.1))
        right.append(float((rows.argmax(dim=1) == targets[i][counted]).double().mean()))
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert metrics["pixel_accuracy"] == pytest.approx(sum(right) / ROWS)
    torch.testing.assert_close(objective.predict(Patches(), batch.views[0]), pixels)
    with pytest.raises(ValueError, match="dense=True"):
        objective(nn.Flatten(), batch)


def test_ranks_add_up_and_rows_without_weight_count_nothing(generator: torch.Generator) -> None:
    batch = batch_of((torch.rand(ROWS, OUTPUTS, generator=generator) < 0.4).float(), generator)
    objective = Multilabel(DIM, OUTPUTS, ObjectiveConfig(target="multilabel")).double()
    with_weights(objective, generator)
    whole, _ = objective(nn.Flatten(), batch)
    parts = [objective(nn.Flatten(), part(batch, slice(r, None, 2)))[0] for r in (0, 1)]
    torch.testing.assert_close(whole, parts[0] + parts[1])
    batch.weights[2] = 0
    before, _ = objective(nn.Flatten(), batch)
    assert batch.targets is not None
    batch.targets[2] = 1 - batch.targets[2]
    assert torch.equal(before, objective(nn.Flatten(), batch)[0])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["objective.target=multilabel", "objective.label_smoothing=0.1"], "set it to 0"),
        (["objective.target=regression", "objective.name=nbd"], "learns without targets"),
        (["objective.target=dense", "backbone.pool=mean"], "needs one a patch"),
        (["objective.target=dense", "objective.head_norm=batchnorm"], "has patches"),
        (["objective.target=dense", "objective.head=masked"], "set it to linear"),
        (["objective.target=regression", "method=packnet"], "one class an image"),
        (["objective.target=dense", "objective.class_weights=balanced"], "class or multilabel"),
        (["objective.target=multilabel", "objective.distill_from=x"], "teaches one class"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        load_config(None, settings)
