"""The masking core against independent formulas: parity, theorems, hooks and guards."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from selfmask_dist.masking import attach, binarize, build_family, materialize, measure
from selfmask_dist.masking.core import Scale, ScoreStep
from tests.support.models import FAMILIES, make, scores_of

RATES: dict[ScoreStep, float] = {"plain": 20.0, "rms": 0.15}  # of the theorems' runs


class StraightThrough(torch.autograd.Function):
    """1[S > mu] whose gradient passes unchanged; written here independently of the package."""

    @staticmethod
    def forward(ctx, scores: Tensor, threshold: float) -> Tensor:
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def reference_theta(weight: Tensor, scores: Tensor, threshold: float, scale: str, parts: int = 1) -> Tensor:
    """Theta by autograd: the published definition, with the scale inside the graph, detached, or left out."""
    pieces = []
    for w, s in zip(weight.chunk(parts), scores.chunk(parts), strict=True):
        mask = StraightThrough.apply(s, threshold)
        factor = (1 / mask.mean()).sqrt()
        factor = {"through": factor, "detached": factor.detach(), "none": torch.ones(())}[scale]
        pieces.append(w * factor * mask)
    return torch.cat(pieces)


def random_scores(model: nn.Module, names: list[str], kept: float, seed: int = 1) -> dict[str, Tensor]:
    """Scores of which a share `kept` lies above zero, exactly to one weight."""
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    scores = {}
    for name in names:
        uniform = torch.rand(parameters[name].numel(), generator=generator, dtype=torch.float64)
        cut = uniform.sort().values[min(int((1 - kept) * len(uniform)), len(uniform) - 1)]
        scores[name] = (uniform - cut + 1e-9).view(parameters[name].shape)
    return scores


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def batch(seed: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(0, 10, (6,), generator=generator)


def loss_of(features: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(features[:, :10] * 3, labels)


@pytest.mark.parametrize("split_qkv", [False, True])
@pytest.mark.parametrize("scale", ["through", "detached", "none"])
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_and_step_equal_autograd(family: str, kept: float, scale: Scale, split_qkv: bool) -> None:
    model, preset = make(family)
    original = copy.deepcopy(model)
    masks = attach(model, include=preset, family=build_family("threshold", scale=scale), split_qkv=split_qkv)
    names = list(scores_of(masks))
    scores = random_scores(original, names, kept)
    masks.load_state_dict(scores)

    reference = {name: value.clone().requires_grad_() for name, value in scores.items()}
    weights = dict(original.named_parameters())
    parts = {n: 3 if split_qkv and ("qkv" in n or "in_proj" in n) else 1 for n in names}
    theta = {n: reference_theta(weights[n].detach(), reference[n], 0.0, scale, parts[n]) for n in names}
    images, labels = batch()
    expected_loss = loss_of(functional_call(original, theta, (images,)), labels)
    expected_loss.backward()

    optimizer = torch.optim.SGD(masks.parameters(), lr=0.01, momentum=0.9)
    masks.bind(optimizer)
    loss = loss_of(model(images), labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    for entry in masks.entries:
        expected = gradient(reference[entry.name])
        assert expected.abs().max() > 0
        assert (gradient(entry.scores) - expected).abs().max() <= 1e-6 * expected.abs().max(), entry.name

    expected_scores = {name: value.detach() - 0.01 * gradient(value) for name, value in reference.items()}
    optimizer.step()
    for entry in masks.entries:
        torch.testing.assert_close(entry.scores.detach(), expected_scores[entry.name], rtol=1e-9, atol=1e-12)
        new_theta = reference_theta(
            weights[entry.name].detach(), entry.scores.detach(), 0.0, scale, parts[entry.name]
        )
        torch.testing.assert_close(entry.theta.detach(), new_theta, rtol=1e-12, atol=0)


def test_the_term_through_the_scale_matters() -> None:
    """Leaving the second term of formula (*) out is far outside the tolerance of the parity test."""
    model, preset = make("timm_vit")
    through = attach(model, include=preset)
    scores = random_scores(model, list(scores_of(through)), 0.5)
    through.load_state_dict(scores)
    images, labels = batch()
    loss_of(model(images), labels).backward()
    name = "blocks.0.mlp.fc1.weight"
    with_term = next(gradient(e.scores).clone() for e in through.entries if e.name == name)
    through.detach()
    detached = attach(model, include=preset, family=build_family("threshold", scale="detached"))
    detached.load_state_dict(scores)
    loss_of(model(images), labels).backward()
    without = next(gradient(e.scores) for e in detached.entries if e.name == name)
    difference = with_term - without
    assert difference.std() <= 1e-12  # one number per tensor
    assert difference.abs().mean() > 1e-5 * without.abs().max()


def train(
    model: nn.Module,
    preset: str,
    *,
    steps: int = 12,
    lr: float = 1.0,
    score_step: ScoreStep = "plain",
    loss_scale: Callable[[int], float] = lambda step: 1.0,
    **options,
) -> tuple[dict, list[float]]:
    """Train at `lr` times the rate that suits a kind of score step."""
    masks = attach(model, include=preset, **options)
    optimizer = torch.optim.SGD(masks.parameters(), lr=lr * RATES[score_step], momentum=0.9)
    masks.bind(optimizer, score_step=score_step)
    losses = []
    for step in range(steps):
        images, labels = batch(seed=step, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = loss_of(model(images), labels)
        (loss_scale(step) * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    return masks.masks(), losses


def num_different(a: dict[str, Tensor], b: dict[str, Tensor]) -> int:
    return sum(int((a[name] ^ b[name]).sum()) for name in a)


@pytest.mark.parametrize("score_step", RATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_theorem_1_shifting_init_and_threshold_changes_no_mask(family: str, score_step: ScoreStep) -> None:
    # in float64 the shift rounds at 1e-16 of a score: no score of this run comes that near to the threshold
    model, preset = make(family)
    base, losses = train(model, preset, init=1.0, score_step=score_step)
    assert sum(int((~m).sum()) for m in base.values()) > 50, "the run must prune something"
    model, _ = make(family)
    family_of_it = build_family("threshold", threshold=2.5)
    shifted, shifted_losses = train(model, preset, init=3.5, family=family_of_it, score_step=score_step)
    assert num_different(base, shifted) == 0
    assert shifted_losses == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("score_step", RATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_theorem_2_scaling_init_and_learning_rate_changes_no_bit(family: str, score_step: ScoreStep) -> None:
    """A power of two scales exactly in floating point, so losses and masks are equal bit for bit, in float32
    too.
    """
    model, preset = make(family, dtype=torch.float32)
    base, losses = train(model, preset, init=1.0, score_step=score_step)
    assert sum(int((~m).sum()) for m in base.values()) > 50
    model, _ = make(family, dtype=torch.float32)
    scaled, scaled_losses = train(model, preset, init=4.0, lr=4.0, score_step=score_step)
    assert num_different(base, scaled) == 0
    assert scaled_losses == losses
    model, _ = make(family, dtype=torch.float32)
    other, _ = train(model, preset, init=4.0, score_step=score_step)
    assert num_different(base, other) > 0, "scaling the scores alone must change the masks"


@pytest.mark.parametrize("family", FAMILIES)
def test_under_rms_the_size_of_the_loss_changes_no_bit(family: str) -> None:
    """Nor does a size that changes from step to step: of a sum in place of a mean, or of a loss scaler."""
    sizes = {"one": lambda step: 2.0**-6, "moving": lambda step: 2.0 ** (step % 5)}
    model, preset = make(family, dtype=torch.float32)
    base, losses = train(model, preset, score_step="rms")
    assert sum(int((~m).sum()) for m in base.values()) > 50
    for loss_scale in sizes.values():
        model, _ = make(family, dtype=torch.float32)
        found, found_losses = train(model, preset, score_step="rms", loss_scale=loss_scale)
        assert num_different(base, found) == 0
        assert found_losses == losses
        model, _ = make(family, dtype=torch.float32)
        plain, _ = train(model, preset, loss_scale=loss_scale)
        model, _ = make(family, dtype=torch.float32)
        assert num_different(plain, train(model, preset)[0]) > 0, "a plain step is not invariant"


def of_linear(score_step: ScoreStep, *, scale: str, gains: tuple[float, ...], whole: bool = True) -> Tensor:
    """The mask of a weight, each half of it times a gain, whose loss is linear in theta."""
    draw = torch.Generator().manual_seed(4)
    weight = torch.randn(16, 12, generator=draw, dtype=torch.float64)
    rows = [gain * half for gain, half in zip(gains, weight.chunk(2), strict=True)]
    parts = [torch.cat(rows)] if whole else rows
    model = nn.ParameterList([nn.Parameter(part.clone()) for part in parts])
    masks = attach(model, include="*", family=build_family("threshold", scale=scale))
    optimizer = torch.optim.SGD(masks.parameters(), lr=0.5 if score_step == "rms" else 2.0, momentum=0.9)
    masks.bind(optimizer, score_step=score_step)
    for _ in range(6):
        optimizer.zero_grad()
        direction = torch.randn(16, 12, generator=draw, dtype=torch.float64)
        (torch.cat(list(model)) * direction).sum().backward()
        optimizer.step()
    return torch.cat(list(masks.masks().values()))


def test_under_rms_the_size_of_a_tensors_weights_drops_out() -> None:
    """Of all its weights alike, and with it the scale a; not of a part of them, nor how tensors are cut."""
    base = of_linear("rms", scale="detached", gains=(1, 1))
    assert 20 < int(base.sum()) < 172
    assert torch.equal(of_linear("rms", scale="detached", gains=(8, 8)), base)
    assert torch.equal(of_linear("rms", scale="none", gains=(1, 1)), base)
    assert not torch.equal(of_linear("rms", scale="detached", gains=(8, 1)), base)
    assert not torch.equal(of_linear("rms", scale="detached", gains=(1, 1), whole=False), base)
    plain = of_linear("plain", scale="none", gains=(1, 1))
    assert torch.equal(of_linear("plain", scale="none", gains=(1, 1), whole=False), plain)
    plain = of_linear("plain", scale="detached", gains=(1, 1))
    assert not torch.equal(of_linear("plain", scale="detached", gains=(8, 8)), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_weights_never_move_and_detach_restores_them(family: str) -> None:
    model, preset = make(family, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = attach(model, include=preset)
    optimizer = torch.optim.SGD(masks.parameters(), lr=20.0, momentum=0.9)
    masks.bind(optimizer)
    for step in range(10):
        images, labels = batch(seed=step, dtype=torch.float32)
        loss_of(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    masked = {entry.name for entry in masks.entries}
    for name, parameter in model.named_parameters():
        if name not in masked:
            assert torch.equal(parameter, before[name]), name
            assert parameter.grad is None
    assert all(torch.equal(entry.weight, before[entry.name]) for entry in masks.entries)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    masks.detach()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="detached already"):
        masks.detach()
    attach(model, include=preset)  # and can be masked again


def test_gradient_accumulation_equals_one_batch() -> None:
    images, labels = batch()
    grads = []
    for parts in (1, 3):
        model, preset = make("timm_vit")
        masks = attach(model, include=preset)
        masks.load_state_dict(random_scores(model, list(scores_of(masks)), 0.7))
        for chunk, chunk_labels in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            (loss_of(model(chunk), chunk_labels) / parts).backward()
        grads.append([entry.scores.grad for entry in masks.entries])
    for one, three in zip(*grads, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-10, atol=1e-14)


def test_several_forwards_before_one_backward() -> None:
    """Multi-crop: the gradient of a sum over views is the sum of the views' gradients."""
    images, labels = batch()
    model, preset = make("timm_vit")
    masks = attach(model, include=preset)
    masks.load_state_dict(random_scores(model, list(scores_of(masks)), 0.7))
    (loss_of(model(images), labels) + loss_of(model(images.flip(-1)), labels)).backward()
    together = [gradient(entry.scores).clone() for entry in masks.entries]
    model.zero_grad()
    for entry in masks.entries:
        entry.scores.grad = None
    loss_of(model(images), labels).backward()
    loss_of(model(images.flip(-1)), labels).backward()
    for entry, expected in zip(masks.entries, together, strict=True):
        torch.testing.assert_close(entry.scores.grad, expected, rtol=1e-10, atol=1e-14)


def test_clipping_sees_the_scores_gradient_right_after_backward() -> None:
    model, preset = make("timm_vit")
    masks = attach(model, include=preset)
    parameters = list(masks.parameters())
    images, labels = batch()
    loss_of(model(images), labels).backward()
    norm = nn.utils.clip_grad_norm_(parameters, 1e-3)
    assert norm > 1e-3
    clipped = torch.stack([gradient(p).norm() for p in parameters]).norm()
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


def test_zero_grad_discards_a_gradient_that_was_not_stepped() -> None:
    model, preset = make("timm_vit")
    masks = attach(model, include=preset)
    optimizer = torch.optim.SGD(masks.parameters(), lr=1.0)
    masks.bind(optimizer)
    images, labels = batch()
    loss_of(model(images), labels).backward()
    expected = [gradient(p).clone() for p in masks.parameters()]
    loss_of(model(images * 100), labels).backward()
    optimizer.zero_grad()
    assert all(p.grad is None for p in masks.parameters())
    loss_of(model(images), labels).backward()
    for parameter, grad in zip(masks.parameters(), expected, strict=True):
        assert torch.equal(gradient(parameter), grad)


@pytest.mark.parametrize("wrap", [torch.compile], ids=["compile"])
@pytest.mark.slow
def test_compiled_model_trains_the_same_masks(wrap: Callable) -> None:
    runs = []
    for compiled in (False, True):
        model, preset = make("timm_vit", dtype=torch.float32)
        masks = attach(model, include=preset)
        optimizer = torch.optim.SGD(masks.parameters(), lr=20.0, momentum=0.9)
        masks.bind(optimizer)
        forward = wrap(model) if compiled else model
        losses = []
        for step in range(5):
            images, labels = batch(seed=step, dtype=torch.float32)
            loss = loss_of(forward(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
    assert runs[0][0] != runs[0][-1]


def test_autocast_trains_float32_scores() -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    masks = attach(model, include=preset)
    optimizer = torch.optim.SGD(masks.parameters(), lr=20.0, momentum=0.9)
    masks.bind(optimizer)
    images, labels = batch(dtype=torch.float32)
    before = [p.detach().clone() for p in masks.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model(images), labels)
    loss.backward()
    optimizer.step()
    assert all(p.dtype == torch.float32 for p in masks.parameters())
    assert all(not torch.equal(p, b) for p, b in zip(masks.parameters(), before, strict=True))


def test_bfloat16_weights_keep_float32_scores() -> None:
    model, preset = make("timm_vit", dtype=torch.bfloat16)
    masks = attach(model, include=preset)
    images, labels = batch(dtype=torch.bfloat16)
    loss_of(model(images).float(), labels).backward()
    for entry in masks.entries:
        assert entry.scores.dtype == torch.float32
        assert gradient(entry.scores).isfinite().all()
        assert entry.theta.dtype == torch.bfloat16


def test_an_empty_mask_gives_zero_theta_and_finite_gradients() -> None:
    model, preset = make("timm_vit")
    masks = attach(model, include=preset)
    state = masks.state_dict()
    state["blocks.0.attn.qkv.bias"] = torch.full_like(state["blocks.0.attn.qkv.bias"], -1.0)
    masks.load_state_dict(state)
    images, labels = batch()
    loss_of(model(images), labels).backward()
    assert masks.empty() == ["blocks.0.attn.qkv.bias"]
    assert measure(masks).empty == ("blocks.0.attn.qkv.bias",)
    for entry in masks.entries:
        assert entry.theta.isfinite().all()
        assert gradient(entry.scores).isfinite().all()
        assert entry.theta.any() or entry.name == "blocks.0.attn.qkv.bias"


def test_materialize_from_bits_equals_theta_bit_for_bit() -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    masks = attach(model, include=preset)
    masks.load_state_dict(random_scores(model, list(scores_of(masks)), 0.6))
    for entry in masks.entries:
        assert torch.equal(materialize(entry.weight, binarize(entry.scores, 0.0)), entry.theta)


def test_statistics_count_what_changed() -> None:
    model, preset = make("conv")
    masks = attach(model, include=preset)
    before = masks.masks()
    state = {name: scores.clone() for name, scores in scores_of(masks).items()}
    state["conv1.weight"].view(-1)[:54] = -0.05
    masks.load_state_dict(state)
    total = sum(m.numel() for m in before.values())
    statistics = measure(masks, before=before, band=0.1)
    assert statistics.flips == 54 / total
    assert statistics.near_threshold == 54 / total
    assert statistics.active == 1 - 54 / total
    assert statistics.active_by_parameter["conv1.weight"] == 1 - 54 / state["conv1.weight"].numel()
    assert masks.sparsity()["conv1.weight"] == pytest.approx(54 / state["conv1.weight"].numel())


def test_moved_statistics_are_those_that_moved() -> None:
    model, preset = make("conv")
    masks = attach(model, include=preset)
    assert masks.moved_statistics() == {}
    model.get_submodule("bn2").eval()
    model(batch()[0])
    assert set(masks.moved_statistics()) == {
        f"{module}.{name}"
        for module in ("bn1", "downsample.1")
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }


class TestSelection:
    def test_presets_mask_what_the_paper_masks(self) -> None:
        vit, _ = make("timm_vit")
        names = {entry.name for entry in attach(vit, include="vit").entries}
        kinds = {name.split(".", 2)[2] for name in names}
        assert kinds == {
            f"{layer}.{kind}"
            for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
            for kind in ("weight", "bias")
        }
        tower, _ = make("open_clip")
        kinds = {entry.name.split(".", 3)[3] for entry in attach(tower, include="vit").entries}
        assert kinds == {"attn.in_proj_weight", "attn.in_proj_bias"} | {
            f"{layer}.{kind}"
            for layer in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")
            for kind in ("weight", "bias")
        }
        conv, _ = make("conv")
        names = {entry.name for entry in attach(conv, include="resnet").entries}
        assert names == {"conv1.weight", "conv2.weight", "downsample.0.weight"}

    def test_auto_takes_the_family(self) -> None:
        for family, (_, preset) in FAMILIES.items():
            model, _ = make(family)
            auto = [entry.name for entry in attach(model).entries]
            model, _ = make(family)
            assert auto == [entry.name for entry in attach(model, include=preset).entries]

    def test_a_norm_named_by_a_pattern_is_refused_unless_asked_for(self) -> None:
        model, _ = make("conv")
        with pytest.raises(ValueError, match=r"normalisation layers: bn1\.bias.*allow_norm=True"):
            attach(model, include=["*conv*.weight", "bn*"])
        assert not getattr(model.get_parameter("conv1.weight"), "_post_accumulate_grad_hooks", None), (
            "a refusal must change nothing"
        )
        masks = attach(model, include=["bn*"], allow_norm=True)
        assert [entry.name for entry in masks.entries] == ["bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"]

    def test_no_match_names_the_nearest(self) -> None:
        model, _ = make("timm_vit")
        with pytest.raises(
            ValueError, match=r"'blocks.0.attn.qvk.weight' matches no parameter; nearest: blocks.0.attn.qkv"
        ):
            attach(model, include="blocks.0.attn.qvk.weight")
        with pytest.raises(ValueError, match=r"nearest: resnet.*presets are auto, vit"):
            attach(model, include="resnets")
        with pytest.raises(ValueError, match="exclude 'nothing' matches no parameter"):
            attach(model, exclude="nothing")
        with pytest.raises(ValueError, match="no parameter is left"):
            attach(model, exclude="*")

    def test_bad_arguments(self) -> None:
        model, _ = make("timm_vit")
        with pytest.raises(ValueError, match="not above threshold"):
            attach(model, init=0.0)
        with pytest.raises(ValueError, match="not one of through"):
            build_family("threshold", scale="sqrt")
        with pytest.raises(ValueError, match="init do not fit the masked parameters: missing"):
            attach(model, init={"blocks.0.attn.qkv.weight": torch.ones(72, 24)})
        masks = attach(model)
        with pytest.raises(ValueError, match="carries a mask already"):
            attach(model)
        with pytest.raises(ValueError, match="holds none of these"):
            masks.bind(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0))
        with pytest.raises(ValueError, match=r"weight_decay=0\.1 on the scores"):
            masks.bind(torch.optim.SGD(masks.parameters(), lr=1.0, weight_decay=0.1))
        with pytest.raises(ValueError, match="holds theta itself"):
            masks.bind(torch.optim.SGD([*masks.parameters(), *model.parameters()], lr=1.0))
        bad = {**masks.state_dict(), "blocks.0.attn.qkv.bias": torch.ones(3)}
        with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.bias have shape \(3,\)"):
            masks.load_state_dict(bad)

    def test_other_parameters_and_freeze(self) -> None:
        model, preset = make("timm_vit")
        masks = attach(model, include=preset)
        assert not list(masks.other_parameters())
        model.cls_token.requires_grad_(True)
        assert [p.shape for p in masks.other_parameters()] == [model.cls_token.shape]
        assert "masked     16 parameters" in masks.summary()


def test_attach_takes_threshold_and_scale_by_name() -> None:
    by_name, built = (nn.Sequential(nn.Linear(6, 5)) for _ in range(2))
    built.load_state_dict(by_name.state_dict())
    masks = attach(by_name, include="*weight", threshold=0.5, scale="none")
    family = build_family("threshold", threshold=0.5, scale="none")
    assert masks.family.options == family.options
    attach(built, include="*weight", family=family)
    assert torch.equal(by_name.state_dict()["0.weight"], built.state_dict()["0.weight"])
    with pytest.raises(ValueError, match="threshold given beside a built family"):
        attach(nn.Sequential(nn.Linear(6, 5)), include="*weight", family=family, threshold=0.1)
