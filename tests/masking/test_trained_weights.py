"""Families whose weights are trained or quantised, against the published formulas written with autograd."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from selfmask_dist import Masks, apply_masks, attach
from selfmask_dist.maskfile import MaskFileError, read_mask_file
from selfmask_dist.masking import Family, build_family
from selfmask_dist.masking.families import FAMILIES
from selfmask_dist.masking.parametrized import parametrized_attach
from tests.masking.test_masking import batch, gradient, loss_of
from tests.support.distributed import run_distributed
from tests.support.engine_cases import Case, Outcome, run_case, run_cases
from tests.support.models import make, scores_of

WEIGHTS = ["*.attn.qkv.weight", "*.mlp.fc1.weight", "*.mlp.fc1.bias"]
KEEP, PENALTY, TAU, BLOCK = 0.3, 5.0, 0.4, (8, 5)


class As(torch.autograd.Function):
    """The value given, with the gradient passed on to the first argument as it is."""

    @staticmethod
    def forward(ctx, carrier: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def largest(ranked: Tensor, share: float) -> Tensor:
    """Ones at the round(share * N) largest, of equal ones the first."""
    order = ranked.detach().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(ranked.numel(), dtype=ranked.dtype)
    mask[order[: round(share * ranked.numel())]] = 1
    return mask.view_as(ranked)


# ---- theta of one tensor, by name of the family: from scores or a latent s, the weight w, small numbers n


def twn(s: Tensor, w: Tensor, n: Tensor, v: Tensor) -> Tensor:
    kept = s.abs() > 0.7 * s.abs().mean()
    return As.apply(s, kept * s.sign() * s.abs()[kept].mean())


def ttq(s: Tensor, w: Tensor, n: Tensor, v: Tensor) -> Tensor:
    delta = 0.05 * s.abs().max()
    above, below = (s > delta).detach(), (s < -delta).detach()
    mean = [  # each scale's gradient is divided by the number of weights that it stands for
        size.detach() + (size - size.detach()) / part.sum().clamp(min=1)
        for size, part in zip(n, (above, below), strict=True)
    ]
    theta = torch.where(above, mean[0], torch.where(below, -mean[1], torch.zeros_like(s)))
    factor = torch.where(above, n[0], torch.where(below, n[1], torch.ones_like(s))).detach()
    return theta + factor * (s - s.detach())


def binary_connect(s: Tensor, w: Tensor, n: Tensor, v: Tensor) -> Tensor:
    return As.apply(s, torch.where(s >= 0, 1.0, -1.0).to(s.dtype) * s.abs().mean())


def binary_connect_published(s: Tensor, w: Tensor, n: Tensor, v: Tensor) -> Tensor:
    return As.apply(s, torch.where(s >= 0, 1.0, -1.0).to(s.dtype))


def multi_prize(s: Tensor, w: Tensor, n: Tensor, v: Tensor) -> Tensor:
    mask = largest(s.abs(), KEEP)
    alpha = (mask * w).norm(p=1) / mask.norm(p=1)
    return alpha * mask * w.sign() + (s.abs() - s.abs().detach()) * w


def graft(s: Tensor, w: Tensor, n: Tensor, v: Tensor) -> Tensor:
    return w + As.apply(s, (s > 0).to(s.dtype)) * (v - w)


def neural_wirings(s: Tensor, w: Tensor, n: Tensor, v: Tensor) -> Tensor:
    return As.apply(s, s * largest(s.abs(), KEEP))


def movement(s: Tensor, w: Tensor, n: Tensor, v: Tensor) -> Tensor:
    return w * As.apply(s, largest(s, KEEP))


def soft_movement(s: Tensor, w: Tensor, n: Tensor, v: Tensor) -> Tensor:
    return w * As.apply(s, (s.sigmoid() > TAU).to(s.dtype))


def joint(s: Tensor, w: Tensor, n: Tensor, v: Tensor) -> Tensor:
    mask = As.apply(s, (s > 0).to(s.dtype))
    return w * mask * (1 / mask.mean()).sqrt()


def block_movement(s: Tensor, w: Tensor, n: Tensor, v: Tensor) -> Tensor:
    rows, columns = len(w), w[0].numel()
    across = -(-columns // BLOCK[1])
    grid = As.apply(n, largest(n, KEEP)).view(-1, across)
    wide = grid.repeat_interleave(BLOCK[0], 0)[:rows].repeat_interleave(BLOCK[1], 1)[:, :columns]
    return w * wide.reshape(w.shape)


Reference = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CASES: dict[str, tuple[Reference, Family]] = {
    "twn": (twn, build_family("twn")),
    "ttq": (ttq, build_family("ttq")),
    "binary_connect": (binary_connect, build_family("binary_connect")),
    "binary_connect as published": (binary_connect_published, build_family("binary_connect", scale="none")),
    "multi_prize": (multi_prize, build_family("multi_prize", keep=KEEP)),
    "graft": (graft, build_family("graft")),
    "neural_wirings": (neural_wirings, build_family("neural_wirings", keep=KEEP)),
    "movement": (movement, build_family("movement", keep=KEEP)),
    "soft_movement": (soft_movement, build_family("soft_movement", threshold=TAU, penalty=PENALTY)),
    "joint": (joint, build_family("joint")),
    "block_movement": (
        block_movement,
        build_family("block_movement", keep=KEEP, block_rows=BLOCK[0], block_columns=BLOCK[1]),
    ),
}


def second(model: nn.Module) -> dict[str, Tensor]:
    """Another set of weights, as fine-tuning might leave it."""
    generator = torch.Generator().manual_seed(11)
    return {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in model.named_parameters()
    }


def attached(
    model: nn.Module, family: Family, *, include: Any = WEIGHTS, split_qkv: bool = True, **more: Any
) -> Masks:
    """Masks with scores that prune something."""
    other: dict[str, Any] = {"other": second(model)} if family.needs_other else {}
    masks = attach(model, include=include, family=family, init=1.0, split_qkv=split_qkv, **other, **more)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for entry in masks.entries:
            if not family.starts_from_weight:
                entry.scores.copy_(
                    torch.rand(entry.scores.shape, generator=generator, dtype=torch.float64) - 0.5
                )
            if entry.numbers is not None and family.name == "block_movement":
                entry.numbers.copy_(torch.rand(entry.numbers.shape, generator=generator, dtype=torch.float64))
    masks.rewrite()
    return masks


def trained_of(masks: Masks) -> Iterator[nn.Parameter]:
    yield from masks.parameters()
    yield from masks.weight_parameters()


@pytest.mark.parametrize("name", CASES)
def test_theta_gradients_and_a_step_equal_the_published_formulas(name: str) -> None:
    formula, family = CASES[name]
    model, _ = make("timm_vit")
    original = copy.deepcopy(model)
    masks = attached(model, family)
    weights = {key: p.detach().clone() for key, p in original.named_parameters()}
    others = second(original)
    scores = {e.name: e.scores.detach().clone().requires_grad_() for e in masks.entries}
    numbers = {
        e.name: (e.numbers if e.numbers is not None else torch.zeros(e.num_segments, 1)).detach().clone()
        for e in masks.entries
    }
    for number in numbers.values():
        number.requires_grad_()
    trained = {e.name: weights[e.name].clone().requires_grad_() for e in masks.entries}

    def theta_of(entry: Any) -> Tensor:
        parts = [t.chunk(entry.num_segments) for t in (scores[entry.name], trained[entry.name])]
        rest = others[entry.name].chunk(entry.num_segments)
        return torch.cat(
            [formula(s, w, n, v) for s, w, n, v in zip(*parts, numbers[entry.name], rest, strict=True)]
        )

    thetas = {entry.name: theta_of(entry) for entry in masks.entries}
    for entry in masks.entries:
        torch.testing.assert_close(entry.theta.detach(), thetas[entry.name].detach(), rtol=1e-12, atol=1e-15)
    images, labels = batch()
    expected_loss = loss_of(functional_call(original, thetas, (images,)), labels)
    loss = loss_of(model(images), labels)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    if family.name == "soft_movement":
        parts = [part for e in masks.entries for part in scores[e.name].chunk(e.num_segments)]
        expected_loss = expected_loss + PENALTY * torch.stack([p.sigmoid().mean() for p in parts]).mean()
    optimizer = torch.optim.SGD(trained_of(masks), lr=0.01)
    masks.bind(optimizer)
    expected_loss.backward()
    loss.backward()
    checked = 0
    for entry in masks.entries:
        of_entry = ((entry.scores, scores), (entry.numbers, numbers), (entry.weight, trained))
        for found, expected in of_entry:
            if isinstance(found, nn.Parameter) and found.requires_grad:
                torch.testing.assert_close(
                    gradient(found), gradient(expected[entry.name]), rtol=1e-9, atol=1e-13
                )
                checked += int(gradient(found).abs().max() > 0)
                with torch.no_grad():
                    expected[entry.name].sub_(0.01 * gradient(expected[entry.name]))
                    if family.name == "binary_connect" and found is entry.scores:
                        expected[entry.name].clamp_(-1, 1)
                    if family.name == "ttq" and found is entry.numbers:
                        expected[entry.name].clamp_(min=0)
    assert checked >= len(masks.entries)
    optimizer.step()
    for entry in masks.entries:
        torch.testing.assert_close(entry.theta.detach(), theta_of(entry).detach(), rtol=1e-9, atol=1e-13)


# ---- values as published


def one(values: list[Any], family: Family, **options: Any) -> tuple[nn.Linear, Masks]:
    layer = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values]))
    return layer, attach(layer, include="weight", family=family, **options)


def test_ternary_values_by_hand() -> None:
    layer, _ = one([0.1, -0.2, 0.9, -1.0, 0.0, 0.6], build_family("twn"))
    # mean |L| = 2.8 / 6, delta = 0.3267: three are kept, their mean is 2.5 / 3
    assert layer.weight.detach().tolist()[0] == pytest.approx([0, 0, 2.5 / 3, -2.5 / 3, 0, 2.5 / 3])
    layer, masks = one([0.01, -0.2, 0.9, -1.0, 0.04, 0.6], build_family("ttq"))
    # delta = 0.05: p = (0.9 + 0.6) / 2, n = (0.2 + 1) / 2
    assert layer.weight.detach().tolist()[0] == pytest.approx([0, -0.6, 0.75, -0.6, 0, 0.75])
    numbers = masks.entries[0].numbers
    assert numbers is not None
    optimizer = torch.optim.SGD([numbers], lr=1.0)
    masks.bind(torch.optim.SGD(masks.parameters(), lr=0.0))
    layer(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])).sum().backward()
    optimizer.step()  # means over two weights each: dL/dp = (3 + 6) / 2, dL/dn = -(2 + 4) / 2
    assert numbers.detach().tolist()[0] == pytest.approx([0.75 - 4.5, 0.6 + 3])
    assert gradient(masks.entries[0].scores).tolist()[0] == pytest.approx([1, 1.2, 2.25, 2.4, 5, 4.5])


def test_scales_of_ttq_stay_above_zero_and_latents_of_binary_connect_within_one() -> None:
    layer, masks = one([0.01, -0.2, 0.9], build_family("ttq"))
    optimizer = torch.optim.SGD(masks.parameters(), lr=10.0)
    masks.bind(optimizer)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert masks.entries[0].numbers is not None
    assert masks.entries[0].numbers.min() == 0
    layer, masks = one([0.5, -0.5], build_family("binary_connect", scale="none"))
    assert layer.weight.detach().tolist() == [[1, -1]]
    optimizer = torch.optim.SGD(masks.parameters(), lr=10.0, weight_decay=1e-4)  # a latent weight may decay
    masks.bind(optimizer)
    layer(torch.tensor([[1.0, -1.0]])).sum().backward()
    optimizer.step()
    assert masks.entries[0].scores.detach().tolist() == [[-1, 1]]
    assert layer.weight.detach().tolist() == [[-1, 1]]


def test_grafting_ends_at_the_two_models_bit_for_bit() -> None:
    model, _ = make("timm_vit", dtype=torch.float32)
    first, other = copy.deepcopy(model.state_dict()), second(model)
    masks = attach(model, include="vit", family="graft", other=other)
    for score, expected in ((1.0, other), (-1.0, first)):
        masks.load_state_dict({name: torch.full_like(s, score) for name, s in scores_of(masks).items()})
        for entry in masks.entries:
            assert torch.equal(entry.theta.detach(), expected[entry.name])


def test_the_cubic_schedule_is_the_published_one() -> None:
    family = build_family("movement", keep=0.2, keep_schedule="cubic", keep_steps=10, keep_warmup=4)
    expected = [1.0] * 5 + [0.2 + 0.8 * (1 - (t - 4) / 10) ** 3 for t in range(5, 14)] + [0.2] * 3
    assert [family.share(step) for step in range(17)] == pytest.approx(expected)
    soft = build_family("soft_movement", threshold=0.1, keep_schedule="cubic", keep_steps=10)
    layer, masks = one([1.0, 1.0], soft)
    with torch.no_grad():
        masks.entries[0].scores.copy_(torch.tensor([[-3.0, 3.0]]))  # sigmoid 0.047 and 0.953
    kept = []
    for masks.step in (0, 1, 2, 5, 10):
        masks.rewrite()
        kept.append(int((layer.weight != 0).sum()))
    assert kept == [2, 2, 1, 1, 1], "tau rises to 0.049 at the second step"


def test_blocks_may_be_rows_and_heads() -> None:
    """Whole rows, and heads: 12 rows of q, k and v each."""
    model, _ = make("timm_vit", dtype=torch.float32)
    family = build_family("block_movement", keep=0.5, block_rows=12, block_columns=0)
    masks = attach(model, include="*attn.qkv.weight", family=family, split_qkv=True)
    for entry in masks.entries:
        assert entry.numbers is not None
        assert entry.numbers.shape == (3, 2)
        is_kept = entry.theta.detach().view(6, -1).any(dim=1)
        assert is_kept.tolist() == [True, False] * 3, "ties go to the first"


# ---- what is refused


def test_what_does_not_fit_is_refused() -> None:
    model, _ = make("timm_vit", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"give the second one as other="):
        attach(model, include="vit", family="graft")
    with pytest.raises(ValueError, match="has no second weights"):
        attach(model, include="vit", family="twn", other=second(model))
    with pytest.raises(ValueError, match="have nothing for blocks"):
        attach(model, include="vit", family="graft", other={})
    with pytest.raises(ValueError, match="set it between 0 and 1"):
        build_family("soft_movement", threshold=0.0)
    with pytest.raises(ValueError, match=r"set mask\.keep_scope=tensor"):
        build_family("block_movement", keep_scope="global")
    for family in (CASES[name][1] for name in CASES):
        more = {"other": second(model)} if family.needs_other else {}
        with pytest.raises(ValueError, match=r"engine\.name=bits.*use ddp or fsdp"):
            run_case(Case(engine="bits", masks={"family": family, **more}))
        with pytest.raises(ValueError, match=r"engine\.name=deepspeed.*use ddp or fsdp"):
            parametrized_attach(model, include="vit", family=family)


# ---- files


@pytest.mark.parametrize("name", CASES)
def test_the_mask_file_gives_theta_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    _, family = CASES[name]
    model, _ = make("timm_vit", dtype=torch.float32)
    fresh, backbone = copy.deepcopy(model), copy.deepcopy(model)
    masks = attached(model, family)
    optimizer = torch.optim.SGD(trained_of(masks), lr=0.05, momentum=0.9)
    masks.bind(optimizer)
    images, labels = batch(dtype=torch.float32)
    for _ in range(2):
        loss_of(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    masks.save(tmp_path / "a.mask")
    apply_masks(fresh, tmp_path / "a.mask")
    mask = read_mask_file(tmp_path / "a.mask").masks["default"]
    assert mask.kind == family.form
    for entry in masks.entries:
        applied = fresh.get_parameter(entry.name).detach()
        assert torch.equal(applied.view(torch.int32), entry.theta.detach().view(torch.int32)), entry.name
        assert torch.equal(mask.bits[entry.name], masks.masks()[entry.name])
    assert torch.equal(fresh.eval()(images), model.eval()(images))
    assert mask.blocks == (
        {"blocks.0.attn.qkv.weight": BLOCK, "blocks.1.attn.qkv.weight": BLOCK}
        | {
            f"blocks.{i}.mlp.fc1.{part}": (8, 5 if part == "weight" else 1)
            for i in (0, 1)
            for part in ("weight", "bias")
        }
        if name == "block_movement"
        else {}
    )
    again = attached(copy.deepcopy(backbone), family)
    again.load_state_dict(masks.state_dict())
    again.detach()
    for entry, copied in zip(masks.entries, again.entries, strict=True):
        assert torch.equal(entry.scores, copied.scores)
        assert torch.equal(entry.weight, copied.weight)
        assert torch.equal(copied.theta, backbone.get_parameter(entry.name)), "the pretrained weights again"
    other, _ = make("timm_vit", seed=9, dtype=torch.float32)
    with pytest.raises(MaskFileError, match="wrong backbone"):
        apply_masks(other, tmp_path / "a.mask")


# ---- engines


def engine_case(name: str, engine: str, **options: Any) -> Case:
    family = CASES[name][1]
    other = {"other": second(make("timm_vit")[0])} if family.needs_other else {}
    masks = {"family": family, "include": WEIGHTS, **other}
    return Case(engine=engine, options=options, masks=masks, lr=0.5, steps=3)


@pytest.mark.distributed
def test_two_processes_equal_one() -> None:
    names = [name for name in CASES if name != "binary_connect as published"]
    cases = [engine_case(name, "fsdp") for name in names]
    cases += [engine_case(name, "ddp") for name in ("ttq", "joint", "block_movement")]
    # small numbers and a second set of weights, beside weights that wait on the CPU
    cases += [engine_case(name, "fsdp", cpu_offload=True) for name in ("ttq", "graft", "block_movement")]
    outcomes: list[Outcome] = run_distributed(run_cases, 2, cases, timeout=240)[0]
    for case, outcome in zip(cases, outcomes, strict=True):
        reference = run_case(Case(**{**vars(case), "engine": "ddp", "options": {}}))
        assert reference.losses[-1] != reference.losses[0]
        assert set(outcome.state.parameters) == set(reference.state.parameters)
        for key, value in reference.state.parameters.items():
            torch.testing.assert_close(outcome.state.parameters[key], value, rtol=1e-9, atol=1e-12)
        assert outcome.losses == pytest.approx(reference.losses, rel=1e-10), case
        assert all(torch.equal(outcome.masks[key], mask) for key, mask in reference.masks.items())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ttq", "joint"])
def test_compiled_blocks_train_the_same_weights(name: str) -> None:
    plain, compiled = (run_case(engine_case(name, "ddp", compile=compile)) for compile in (False, True))
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-9)
    for key, value in plain.state.parameters.items():
        torch.testing.assert_close(compiled.state.parameters[key], value, rtol=1e-8, atol=1e-11)


def test_every_family_here_is_in_the_table() -> None:
    assert {family.name for _, family in CASES.values()} == {
        name for name, family in FAMILIES.items() if not family.is_mask
    }
