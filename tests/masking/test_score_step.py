"""The score step `rms` in a loop of one's own: the formula, when it happens, and what it refuses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfmask_dist import attach
from selfmask_dist.masking import AttachedMasks, build_family, core
from selfmask_dist.masking.parametrized import parametrized_attach
from tests.support.models import make

Bind = Callable[[Any, torch.optim.Optimizer], None]


def by_hand(masks: AttachedMasks, optimizer: torch.optim.Optimizer) -> None:
    masks.bind(optimizer)


def by_bind(masks: AttachedMasks, optimizer: torch.optim.Optimizer) -> None:
    masks.bind(optimizer, score_step="rms")


def images_of(seed: int, count: int = 6) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(features: Tensor) -> Tensor:
    return nn.functional.cross_entropy(features[:, :8] * 3, torch.arange(len(features)) % 8)


def scores_after(
    bind: Bind,
    *,
    steps: int = 3,
    parts: int = 1,
    attach_fn: Any = attach,
    momentum: float = 0.9,
    **options: Any,
) -> list[Tensor]:
    """The scores after some steps at rate .1, with micro-batches."""
    model, preset = make("timm_vit")
    masks = attach_fn(model, include=preset, **options)
    optimizer = torch.optim.SGD(masks.parameters(), lr=0.1, momentum=momentum)
    bind(masks, optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        for part in images_of(step, 8).chunk(parts):
            (loss_of_part(model, part) / parts).backward()
        if bind is by_hand:
            masks.normalise_gradients()
        optimizer.step()
    return [parameter.detach().clone() for parameter in masks.parameters()]


def loss_of_part(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).square().mean()


@pytest.mark.parametrize("bind", [by_hand, by_bind])
@pytest.mark.parametrize(
    "options", [{}, {"split_qkv": True}, {"family": build_family("piggyback", scale="none"), "init": 1.0}]
)
def test_the_step_is_that_of_the_formula(bind: Bind, options: dict[str, Any]) -> None:
    """S <- S - rate * (momentum), with g / sqrt(mean(g^2)) of each whole parameter, in plain torch."""
    model, preset = make("timm_vit")
    masks = attach(model, include=preset, **options)
    optimizer = torch.optim.SGD(masks.parameters(), lr=0.1, momentum=0.9)
    masks.bind(optimizer)  # plain: its gradients are replaced by hand
    for step in range(3):
        optimizer.zero_grad()
        loss_of_part(model, images_of(step, 8)).backward()
        for parameter in masks.parameters():
            assert parameter.grad is not None
            parameter.grad = parameter.grad / parameter.grad.pow(2).mean().sqrt()
        optimizer.step()
    found = scores_after(bind, **options)
    for score, expected in zip(found, masks.parameters(), strict=True):
        torch.testing.assert_close(score, expected.detach(), rtol=1e-12, atol=1e-14)
    assert min(float((score - 1).abs().max()) for score in found) > 0.1


def test_accumulated_micro_batches_are_one_batch() -> None:
    for one, two in zip(scores_after(by_bind), scores_after(by_bind, parts=2), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_parametrised_masks_step_alike() -> None:
    for one, two in zip(
        scores_after(by_bind), scores_after(by_bind, attach_fn=parametrized_attach), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["graft", "multi_prize", "joint", "block_movement"])
def test_what_a_family_trains_at_the_scores_rate_is_normalised(name: str) -> None:
    """Scores, or the blocks' scores in their place; trained weights keep their gradient."""
    model, preset = make("timm_vit")
    weights = {n: p.detach() + 0.1 for n, p in model.named_parameters()}
    options: dict[str, Any] = {"other": weights} if name == "graft" else {}
    if name == "multi_prize":
        options["init"] = "kaiming_uniform"
    masks = attach(model, include=preset, exclude="*.bias", family=build_family(name, keep=0.7), **options)
    loss_of(model(images_of(0))).backward()
    before = {id(w): w.grad.clone() for w in masks.weight_parameters() if w.grad is not None}
    masks.normalise_gradients()
    sizes = [float(p.grad.square().mean()) for p in masks.parameters() if p.grad is not None]
    assert len(sizes) == len(masks.entries)
    assert sizes == pytest.approx([1.0] * len(sizes), rel=1e-9)
    assert all(torch.equal(w.grad, before[id(w)]) for w in masks.weight_parameters() if w.grad is not None)
    assert bool(before) == masks.family.trains_weight


# ---- gradients that are zero, or would be


def test_a_gradient_of_zeros_stays_zero() -> None:
    grads = [torch.zeros(4), torch.tensor([3.0, -4.0]), torch.zeros(0)]
    core.normalise(grads, torch.stack([core.sum_of_squares(grad) for grad in grads]), [4, 2, 0])
    assert torch.equal(grads[0], torch.zeros(4))
    assert grads[1].tolist() == pytest.approx([3 / 12.5**0.5, -4 / 12.5**0.5])
    nothing = [torch.zeros(3)]
    core.normalise(nothing, torch.zeros(1, dtype=torch.float64), [3])
    assert torch.equal(nothing[0], torch.zeros(3))


def test_sizes_beyond_float32_are_no_limit() -> None:
    grads = [torch.full((1000,), 1e-30), torch.full((1000,), 1e25)]
    for grad in grads:
        core.normalise([grad], core.sum_of_squares(grad).view(1), [1000])
        assert torch.allclose(grad, torch.ones(1000))


class SplitAttention(nn.Module):
    """Attention with a key's own bias, which changes nothing: its gradient is rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.q(tokens), self.k(tokens), self.v(tokens))


def test_rounding_is_not_made_a_step() -> None:
    """In exact arithmetic the gradient of a key's bias is zero; its size must not become that of others."""
    torch.manual_seed(0)
    model = SplitAttention()
    masks = attach(model, include="*")
    tokens = torch.randn(64, 7, 12)
    model(tokens).pow(3).mean().backward()
    gradients = {entry.name: entry.scores.grad for entry in masks.entries}
    noise = gradients["k.bias"]
    assert noise is not None
    assert (
        0
        < noise.square().mean().sqrt()
        < 1e-6 * max(float(g.abs().max()) for g in gradients.values() if g is not None)
    )
    masks.normalise_gradients()
    sizes = {name: float(grad.square().mean().sqrt()) for name, grad in gradients.items() if grad is not None}
    assert sizes.pop("k.bias") < 0.1
    assert list(sizes.values()) == pytest.approx([1.0] * len(sizes), rel=1e-5)


# ---- other parts of a loop


def test_gradients_are_clipped_before_and_scaled_before() -> None:
    """Clipping and a gradient scaler come before the step, and change nothing of the scores' steps."""
    expected = scores_after(by_bind)
    model, preset = make("timm_vit")
    masks = attach(model, include=preset)
    optimizer = torch.optim.SGD(masks.parameters(), lr=0.1, momentum=0.9)
    masks.bind(optimizer, score_step="rms")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of_part(model, images_of(step, 8))).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(masks.parameters(), 1e-4)
        scaler.step(optimizer)
        scaler.update()
    for score, want in zip(masks.parameters(), expected, strict=True):
        torch.testing.assert_close(score.detach(), want, rtol=1e-9, atol=1e-9)


def test_what_cannot_be_is_refused() -> None:
    model, preset = make("timm_vit")
    masks = attach(model, include=preset)
    with pytest.raises(ValueError, match="AdamW gives each element's a size of its own"):
        masks.bind(torch.optim.AdamW(masks.parameters(), weight_decay=0.0), score_step="rms")
    optimizer = torch.optim.SGD(masks.parameters(), lr=0.1)
    wrong: Any = "unit"
    with pytest.raises(ValueError, match="score_step 'unit' is not one of plain, rms"):
        masks.bind(optimizer, score_step=wrong)
    masks.bind(optimizer, score_step="rms")

    def closure() -> float:
        loss = loss_of(model(images_of(0)))
        loss.backward()
        return loss.item()

    with pytest.raises(ValueError, match="call backward first and step\\(\\) without a closure"):
        optimizer.step(closure)


def test_detached_masks_leave_the_optimizer_alone() -> None:
    model, preset = make("timm_vit")
    before = copy.deepcopy(model.state_dict())
    masks = attach(model, include=preset)
    optimizer = torch.optim.SGD(masks.parameters(), lr=0.1)
    masks.bind(optimizer, score_step="rms")
    loss_of(model(images_of(0))).backward()
    masks.detach()
    grads = [p.grad.clone() for p in masks.parameters() if p.grad is not None]
    with pytest.raises(ValueError, match="detached from their model"):
        optimizer.step()
    after = [p.grad for p in masks.parameters() if p.grad is not None]
    assert all(torch.equal(one, two) for one, two in zip(grads, after, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
