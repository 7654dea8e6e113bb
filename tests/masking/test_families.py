"""Mask families against independent formulas, exact selection over ranks, every engine, and whole runs."""

import copy
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from selfmask_dist import apply_masks, attach
from selfmask_dist.backbones.random_weights import randomise
from selfmask_dist.cli.train import run
from selfmask_dist.config import ConfigError, load_config
from selfmask_dist.config import yaml as config_yaml
from selfmask_dist.config.masks import FIXED_FAMILIES, MASK_FAMILIES
from selfmask_dist.maskfile import read_mask_file
from selfmask_dist.masking import Family, build_family, first_scores, measure, ranking
from selfmask_dist.masking.families import FAMILIES
from selfmask_dist.masking.parametrized import parametrized_attach
from selfmask_dist.masking.pieces import Shards
from selfmask_dist.parallel.world import World
from tests.support.distributed import run_distributed
from tests.support.engine_cases import Case, build, check_equal, run_case, run_cases, world_here
from tests.support.models import make, scores_of
from tests.support.tiny_run import ROOT, events_of, write_config, write_tiny_data

# ---- exact selection


class SumShards(Shards):
    """Pieces in the order of ranks, without an engine."""

    is_whole = False

    def __init__(self, world: World) -> None:
        self.world = world
        self.piece_index, self.num_pieces = world.rank, world.size

    def sum(self, values: Tensor) -> Tensor:
        return self.world.sum(values)


def ranked_tensors() -> list[Tensor]:
    """Continuous values, many ties, only ties, zeros of both signs, infinities, and few elements."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1003, generator=generator)
    return [
        normal,
        (normal * 3).round(),
        torch.full((40,), -2.5),
        torch.tensor([0.0, -0.0] * 9),
        torch.cat([normal[:50], torch.full((7,), torch.inf), -normal[:5] * 1e-40]),
        torch.tensor([1.0, 3.0, 2.0]),
    ]


def cut_in(tensor: Tensor, size: int) -> list[Tensor]:
    """Uneven consecutive pieces; some ranks hold nothing of a small tensor."""
    bounds = [0, *sorted((tensor.numel() * (rank * rank + 1)) // (size * size) for rank in range(1, size))]
    ends = [*bounds[1:], tensor.numel()]
    return [tensor[a:b] for a, b in zip(bounds, ends, strict=True)]


def by_sorting(tensor: Tensor, count: int) -> Tensor:
    """The `count` largest; of equal ones those with the smaller index."""
    order = sorted(range(tensor.numel()), key=lambda i: (-tensor[i].item(), i))
    mask = torch.zeros(tensor.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask


SHARES = (0.001, 0.3, 0.5, 0.77, 1.0)


def select_on_ranks() -> list[list[Tensor]]:
    """Masks of all tensors for every share and dtype: ranked alone, then all together."""
    world = world_here()
    results = []
    for dtype in (torch.float32, torch.float64):
        tensors = [tensor.to(dtype) for tensor in ranked_tensors()]
        pieces = [cut_in(tensor, world.size)[world.rank] for tensor in tensors]
        for share in SHARES:
            sizes = [tensor.numel() for tensor in tensors]
            alone = [max(round(share * size), 1) for size in sizes]
            for counts, groups in (
                (alone, list(range(len(sizes)))),
                ([max(round(share * sum(sizes)), 1)], [0] * len(sizes)),
            ):
                shards = Shards() if world.size == 1 else SumShards(world)
                cuts = ranking.select(pieces, counts, groups, shards)
                masks = [
                    cut.write(piece, out=torch.empty_like(piece)).bool()
                    for cut, piece in zip(cuts, pieces, strict=True)
                ]
                results.append(masks)
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 3])
def test_selection_equals_sorting(size: int) -> None:
    """On every rank, with ties, for each tensor by itself and for all as one."""
    of_ranks = [select_on_ranks()] if size == 1 else run_distributed(select_on_ranks, size)
    case = 0
    for dtype in (torch.float32, torch.float64):
        tensors = [tensor.to(dtype) for tensor in ranked_tensors()]
        for share in SHARES:
            found = [torch.cat(parts) for parts in zip(*(masks[case] for masks in of_ranks), strict=True)]
            for mask, tensor in zip(found, tensors, strict=True):
                assert torch.equal(mask, by_sorting(tensor, max(round(share * tensor.numel()), 1)))
            parts_of_all = zip(*(masks[case + 1] for masks in of_ranks), strict=True)
            together = torch.cat([torch.cat(parts) for parts in parts_of_all])
            whole = torch.cat(tensors)
            assert torch.equal(together, by_sorting(whole, max(round(share * len(whole)), 1)))
            case += 2


# ---- engines

KINDS: dict[str, dict[str, Any]] = {
    "edge_popup": {
        "family": build_family("edge_popup", keep=0.3),
        "init": "kaiming_uniform",
        "split_qkv": True,
    },
    "ties": {"family": build_family("topk", keep=0.37, scale="none"), "init": 1.0},
    "global": {"family": build_family("edge_popup", keep=0.2, keep_scope="global"), "init": "normal"},
    "progressive": {
        "family": build_family("topk", keep=0.2, keep_schedule="cubic", keep_steps=3),
        "init": "shuffled_magnitude",
    },
    "maskable": {
        "family": build_family("threshold", maskable=0.5),
        "init": 0.01,
        "first_layers": 3,
    },
    "random": {"family": build_family("random", keep=0.4)},
}
SHARDED = [
    Case(engine=engine, masks=masks, lr=5.0)
    for engine in ("fsdp", "bits", "ddp")
    for kind, masks in KINDS.items()
    if (engine, kind) != ("bits", "random") and (engine != "ddp" or kind in ("edge_popup", "random"))
]
DEEPSPEED = [
    Case(engine="deepspeed", masks=KINDS[kind], lr=5.0, dtype=torch.float32, options={"zero_stage": stage})
    for kind, stage in (("edge_popup", 3), ("progressive", 2), ("maskable", 3), ("random", 3))
]
ENV = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # with ninja


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_families_on_two_processes_equal_one() -> None:
    cases = [*SHARDED, *DEEPSPEED]
    outcomes = run_distributed(run_cases, 2, cases, timeout=300, env=ENV)[1]
    for case, outcome in zip(cases, outcomes, strict=True):
        reference = run_case(Case(**{**vars(case), "engine": "ddp", "options": {}}))
        assert 0 < reference.active < 0.9, case
        is_double = case.dtype == torch.float64
        check_equal(outcome, reference, loss=1e-12 if is_double else 1e-5, bits=0.0 if is_double else 1e-4)


def refuse_fixed_masks() -> str:
    try:
        build(Case(engine="bits", masks=KINDS["random"]))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def test_bits_refuses_masks_that_are_not_trained() -> None:
    assert "mask.family=random is not; use ddp or fsdp" in refuse_fixed_masks()


# ---- formulas


class StraightThrough(torch.autograd.Function):
    """Any 0/1 function of the scores whose gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
        return mask.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def reference_theta(weight: Tensor, scores: Tensor, family: Family) -> Tensor:
    """The published definition by autograd, for one scaled tensor."""
    options = family.options
    ranked = {"edge_popup": scores.abs(), "magnitude": weight.abs()}.get(family.name, scores)
    if family.name in ("threshold", "piggyback"):
        kept = ranked > options.threshold
    else:
        count = max(round(options.keep * weight.numel()), 1)
        kept = by_sorting(ranked.detach().flatten(), count).view_as(weight)
    mask = StraightThrough.apply(ranked, kept)
    if options.scale == "none":
        return weight * mask
    factor = (mask.numel() / mask.sum()).sqrt()
    return weight * mask * (factor if family.name == "threshold" else factor.detach())


def batch() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)


FORMULAS: dict[str, tuple[Family, float | str]] = {
    "threshold": (build_family("threshold", threshold=0.2), "normal"),
    "maskable": (build_family("threshold", threshold=0.9, maskable=0.4), "magnitude"),
    "largest maskable": (build_family("piggyback", scale="none", maskable=0.3, maskable_by="magnitude"), 1.0),
    "piggyback": (build_family("piggyback", threshold=1.1, scale="none"), "magnitude"),
    "edge_popup": (build_family("edge_popup", keep=0.3), "kaiming_uniform"),
    "unscaled edge_popup": (build_family("edge_popup", keep=0.3, scale="none"), "kaiming_uniform"),
    "topk": (build_family("topk", keep=0.6, maskable=0.7), "shuffled_magnitude"),
    "random": (build_family("random", keep=0.5), 1.0),
    "magnitude": (build_family("magnitude", keep=0.5, scale="none"), 1.0),
}


@pytest.mark.parametrize("split_qkv", [False, True])
@pytest.mark.parametrize("kind", FORMULAS)
def test_theta_and_gradient_equal_autograd(kind: str, split_qkv: bool, tmp_path: Path) -> None:
    """Attached and parametrised, and from the mask file on a fresh model."""
    family, init = FORMULAS[kind]
    model, preset = make("timm_vit")
    original, parametrised = copy.deepcopy(model), copy.deepcopy(model)
    masks = attach(model, include=preset, family=family, init=init, split_qkv=split_qkv)
    first = scores_of(masks)
    leaves = {name: scores.clone().requires_grad_() for name, scores in first.items()}
    weights = dict(original.named_parameters())
    parts = {name: 3 if split_qkv and "qkv" in name else 1 for name in leaves}
    expected = {
        name: torch.cat(
            [
                reference_theta(*pair, family)
                for pair in zip(
                    weights[name].detach().chunk(parts[name]), leaves[name].chunk(parts[name]), strict=True
                )
            ]
        )
        for name in leaves
    }
    for entry in masks.entries:
        torch.testing.assert_close(entry.theta.detach(), expected[entry.name].detach(), rtol=1e-12, atol=0)

    loss = functional_call(original, expected, (batch(),)).square().sum()
    others = parametrized_attach(parametrised, include=preset, family=family, init=init, split_qkv=split_qkv)
    torch.testing.assert_close(parametrised(batch()).square().sum(), loss, rtol=1e-10, atol=0)
    if family.trains_scores:
        loss.backward()
        model(batch()).square().sum().backward()
        parametrised(batch()).square().sum().backward()
        for entry, other in zip(masks.entries, others.entries, strict=True):
            wanted = leaves[entry.name].grad
            assert wanted is not None
            wanted = wanted.masked_fill(first[entry.name].isposinf(), 0)
            assert wanted.abs().max() > 0
            for scores in (entry.scores, other.scores):
                torch.testing.assert_close(
                    scores.grad, wanted, rtol=1e-7, atol=1e-9 * float(wanted.abs().max())
                )
    else:
        assert not list(masks.parameters())
        assert not list(others.parameters())
        assert not any(entry.theta.requires_grad for entry in masks.entries)

    masks.save(tmp_path / "a.mask")
    fresh, _ = make("timm_vit")
    apply_masks(fresh, tmp_path / "a.mask")
    for entry in masks.entries:
        assert torch.equal(fresh.get_parameter(entry.name), entry.theta.detach())
    assert all(torch.equal(mask, others.masks()[name]) for name, mask in masks.masks().items())


def test_exactly_k_are_kept_along_the_schedule() -> None:
    """At every step, whatever the scores do."""
    family = build_family("topk", keep=0.25, keep_schedule="linear", keep_steps=4)
    assert [family.share(step) for step in (0, 1, 2, 4, 9)] == [1, 0.8125, 0.625, 0.25, 0.25]
    cubic = build_family("topk", keep=0.2, keep_schedule="cubic", keep_steps=2)
    assert [cubic.share(step) for step in (0, 1, 2)] == pytest.approx([1, 0.2 + 0.8 / 8, 0.2])
    model, preset = make("timm_vit")
    masks = attach(model, include=preset, family=family, init="normal")
    optimizer = torch.optim.SGD(masks.parameters(), lr=3.0, momentum=0.9)
    masks.bind(optimizer)
    for step in range(6):
        for entry in masks.entries:
            count = round(family.share(step) * entry.theta.numel())
            assert int(masks.masks()[entry.name].sum()) == count == sum(int(k) for k in entry.num_kept)
            assert torch.count_nonzero(entry.theta) <= count
        model(batch()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_global_ranking_keeps_exactly_k_of_all() -> None:
    model, preset = make("timm_vit")
    family = build_family("edge_popup", keep=0.3, keep_scope="global")
    masks = attach(model, include=preset, family=family, init="normal")
    scores = torch.cat([entry.scores.detach().flatten() for entry in masks.entries])
    kept = torch.cat([mask.flatten() for mask in masks.masks().values()])
    assert int(kept.sum()) == round(0.3 * len(kept))
    assert scores[kept].abs().min() > scores[~kept].abs().max()
    shares = [float(mask.double().mean()) for mask in masks.masks().values()]
    assert max(shares) - min(shares) > 0.01, "layers keep different shares"


# ---- first scores, always kept weights, layers


def test_first_scores_are_what_they_are_called() -> None:
    weight = torch.randn(64, 50, generator=torch.Generator().manual_seed(1))
    weight[0, 0] = 0

    def start(kind: str | float, seed: int = 0, name: str = "a") -> Tensor:
        return first_scores.first_scores(kind, name, weight, threshold=0.5, seed=seed)

    torch.testing.assert_close(start("magnitude"), 0.5 + weight.abs() / weight.abs().mean())
    shuffled = start("shuffled_magnitude")
    assert torch.equal(shuffled.flatten().sort().values, start("magnitude").flatten().sort().values)
    assert abs(torch.corrcoef(torch.stack([shuffled.flatten(), weight.abs().flatten()]))[0, 1]) < 0.1
    assert (start("normal") > 0.5).all()
    assert start("normal").mean().item() == pytest.approx(1.5, abs=0.05)
    bound = 1 / 50**0.5
    assert start("kaiming_uniform").abs().max() <= bound
    assert start("kaiming_uniform").std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert torch.equal(start("normal"), start("normal"))
    assert not torch.equal(start("normal"), start("normal", seed=1))
    assert not torch.equal(start("normal"), start("normal", name="b"))
    zeros = first_scores.first_scores("magnitude", "bias", torch.zeros(7), threshold=0.0, seed=0)
    assert torch.equal(zeros, torch.ones(7))
    with pytest.raises(ValueError, match="init 'nomal' is neither a number nor one of normal, magnitude"):
        attach(make("timm_vit")[0], init="nomal")


@pytest.mark.parametrize("by", ["random", "magnitude"])
def test_weights_that_are_always_kept_stay(by: str) -> None:
    model, preset = make("timm_vit")
    family = build_family("threshold", maskable=0.3, maskable_by=by)
    masks = attach(model, include=preset, family=family, init=0.01)
    fixed = {name: scores.isposinf() for name, scores in scores_of(masks).items()}
    optimizer = torch.optim.SGD(masks.parameters(), lr=50.0, momentum=0.9)
    masks.bind(optimizer)
    for _ in range(3):
        model(batch()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for entry in masks.entries:
        always = fixed[entry.name]
        assert int((~always).sum()) == round(0.3 * always.numel())
        assert masks.masks()[entry.name][always].all()
        assert entry.scores[always].isposinf().all()
        assert entry.scores[~always].isfinite().all()
        if by == "magnitude":
            assert entry.weight[~always].abs().min() >= entry.weight[always].abs().max()
    found = measure(masks)
    assert 0.7 < found.active < 0.99
    assert found.num_nonfinite == 0


def test_the_first_layers_are_those_of_the_model() -> None:
    model, preset = make("timm_vit")
    names = [entry.name for entry in attach(model, include=preset, first_layers=3).entries]
    layers = ("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1")
    assert names == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    with pytest.raises(ValueError, match="first_layers 9 is not from 1 to 8"):
        attach(make("timm_vit")[0], include=preset, first_layers=9)


def test_random_weights_are_signed_constants() -> None:
    model, _ = make("conv")
    randomise(model, "signed_constant", seed=3)
    again, _ = make("conv")
    randomise(again, "signed_constant", seed=3)
    weight = model.get_parameter("conv1.weight").detach()
    fan_in = weight[0].numel()
    torch.testing.assert_close(weight.abs(), torch.full_like(weight, (2 / fan_in) ** 0.5))
    assert 0.3 < (weight > 0).double().mean() < 0.7
    assert torch.equal(weight, again.get_parameter("conv1.weight"))
    norm = model.get_parameter("bn1.weight"), model.get_parameter("bn1.bias")
    assert (norm[0] == 1).all()
    assert (norm[1] == 0).all()
    masks = attach(
        model, include="conv1.weight", family=build_family("edge_popup", keep=0.25), init="kaiming_uniform"
    )
    theta = masks.entries[0].theta.detach()
    kept = int(masks.masks()["conv1.weight"].sum())
    published = (2 / (fan_in * kept / theta.numel())) ** 0.5  # their scaled signed Kaiming constant
    torch.testing.assert_close(theta[theta != 0].abs().unique().mean().item(), published)
    randomise(again, "kaiming_normal", seed=3)
    deviation = again.get_parameter("conv2.weight").std().item()
    assert deviation == pytest.approx((2 / again.get_parameter("conv2.weight")[0].numel()) ** 0.5, rel=0.2)
    with pytest.raises(ValueError, match="random weights 'uniform' are not one of"):
        randomise(model, "uniform", seed=0)


# ---- names, refusals, configuration


class NoFamily:
    pass


def test_families_are_found_by_name() -> None:
    assert set(FAMILIES) >= set(MASK_FAMILIES)
    assert set(MASK_FAMILIES) >= set(FAMILIES)
    fixed = {name for name, family in FAMILIES.items() if not (family.trains_scores or family.trains_weight)}
    assert fixed == set(FIXED_FAMILIES)
    for name, message in (
        ("edge_pop", "did you mean edge_popup"),
        ("nowhere:Family", "cannot be imported: No module named 'nowhere'"),
        ("tests.masking.test_families:Missing", "cannot be imported"),
        ("tests.masking.test_families:NoFamily", "no subclass of"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(make("timm_vit")[0], family=name)
    with pytest.raises(ValueError, match="piggyback has no scale"):
        attach(make("timm_vit")[0], family="piggyback")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mask.family=edgepopup"], "did you mean edge_popup"),
        (["mask.family=edge_popup"], "gives all scores one rank"),
        (["mask.family=piggyback"], "set mask.scale=none in place of through"),
        (["mask.family=topk", "mask.init=normal", "mask.keep=0.2", "mask.maskable=0.5"], "always kept"),
        (["mask.family=random", "engine.name=bits"], "use ddp, fsdp or deepspeed"),
        (["mask.family=random", "objective.head=masked"], "set objective.head=linear"),
        (["mask.family=magnitude", "mask.maskable=0.5"], "ranks all weights"),
        (["mask.family=random", "mask.keep_schedule=cubic"], "is fixed"),
        (["mask.keep_scope=global", "engine.name=deepspeed"], "set mask.keep_scope=tensor"),
        (["backbone.random=signed_constant"], "set backbone.pretrained=false"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_starts(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_deepspeed_refuses_what_it_cannot_make_from_one_tensor() -> None:
    family = build_family("topk", keep_scope="global")
    with pytest.raises(ValueError, match="keep_scope=global ranks all tensors together"):
        parametrized_attach(make("timm_vit")[0], family=family, init="normal")


# ---- runs


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


RUNS: dict[str, dict[str, Any]] = {
    "progressive": {
        "family": "edge_popup",
        "keep": 0.3,
        "keep_schedule": "cubic",
        "keep_until": 0.8,
        "init": "normal",
    },
    "global": {"family": "topk", "keep": 0.4, "keep_scope": "global", "init": "magnitude", "maskable": 0.7},
    "piggyback": {"family": "piggyback", "threshold": 0.005, "init": 0.01, "scale": "none"},
    "random": {"family": "random", "keep": 0.5},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_taken_up_again_ends_as_if_nothing_had_been(
    name: str, tmp_path: Path, tiny_data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint in the middle of the schedule, as after a kill."""
    settings = {
        "mask": RUNS[name],
        "checkpoint": {"every_steps": 3, "asynchronous": False},
        "optim": {"score_lr": 9.0},
    }
    config = load_config(write_config(tmp_path / "a.yaml", tiny_data, run={"name": "a"}, **settings))
    result = run(config)
    finished = tmp_path / "a"
    mask, lines = (finished / "final.mask").read_bytes(), (finished / "metrics.jsonl").read_text()
    keep = RUNS[name].get("keep")
    low, high = (0.2, 0.999) if keep is None else (keep - 1e-3, keep + 1e-3)
    assert low <= result["mask"]["active"] <= high

    (finished / "result.json").unlink()
    (finished / "final.mask").unlink()
    newest, *_ = sorted((finished / "checkpoints").glob("step*"), reverse=True)
    shutil.rmtree(newest)
    monkeypatch.setenv("SELFMASK_RESTARTS", "1")
    run(config)
    assert [event["step"] for event in events_of(finished) if event["event"] == "resume"] == [6]
    assert (finished / "final.mask").read_bytes() == mask
    again = [json.loads(line)["loss"] for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert again == [json.loads(line)["loss"] for line in lines.splitlines()]

    file = read_mask_file(finished / "final.mask")
    kept = sum(int(bits.sum()) for bits in file.masks["default"].bits.values())
    assert kept == round(result["mask"]["active"] * result["mask"]["masked_weights"])


def test_the_new_family_of_the_docs_is_one_file_and_one_line(
    tmp_path: Path, tiny_data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    section = text[text.index("### A new family in one file") :]
    code, lines = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "yaml"))
    assert code is not None
    assert lines is not None
    (tmp_path / "above_mean.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    sections = config_yaml.parse(lines[1]).value
    result = run(load_config(write_config(tmp_path / "new.yaml", tiny_data, run={"name": "new"}, **sections)))
    bits = read_mask_file(tmp_path / "new" / "final.mask").masks["default"].bits
    assert 0.3 < result["mask"]["active"] < 0.7
    assert all(0 < int(b.sum()) < b.numel() for b in bits.values()), "of no tensor all lie above the mean"


def test_every_family_has_a_config_and_an_entry() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    configs = [load_config(path) for path in (ROOT / "configs" / "methods").glob("*/*.yaml")]
    used = {config.mask.family for config in configs}
    headings = " ".join(line for line in text.splitlines() if line.startswith("###"))
    for name in FAMILIES:
        assert name in used, f"{name} has no config in configs/methods"
        assert name in headings, f"{name} has no entry in docs/methods.md"
