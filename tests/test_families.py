"""Mask families against independent formulas, exact selection over ranks, and every engine."""

from typing import Any

import pytest
import torch
from torch import Tensor

from selfmask_dist.masking import Family, build_family, ranking
from selfmask_dist.masking.shards import Shards
from selfmask_dist.parallel.world import World
from tests.distributed import run_distributed
from tests.engine_cases import Case, check_equal, run_case, run_cases, world_here

# ---- exact selection


class SumShards(Shards):
    """Pieces in the order of ranks, without an engine."""

    is_whole = False

    def __init__(self, world: World) -> None:
        self.world = world
        self.place, self.num_places = world.rank, world.size

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


def families_case(engine: str, family: Family, **options: Any) -> Case:
    return Case(engine=engine, masks={"family": family, **options}, lr=5.0)


KINDS: dict[str, tuple[Family, dict[str, Any]]] = {
    "edge_popup": (build_family("edge_popup", keep=0.3), {"init": "kaiming_uniform", "split_qkv": True}),
    "ties": (build_family("topk", keep=0.37, scale="none"), {"init": 1.0}),
    "global": (build_family("edge_popup", keep=0.2, keep_scope="global"), {"init": "normal"}),
    "progressive": (
        build_family("topk", keep=0.2, keep_schedule="cubic", keep_steps=3),
        {"init": "shuffled_magnitude"},
    ),
    "maskable": (build_family("threshold", maskable=0.5), {"init": 0.01, "first_layers": 3}),
}
SHARDED = [
    families_case(engine, family, **options)
    for engine in ("fsdp", "bits")
    for family, options in KINDS.values()
]


@pytest.mark.distributed
def test_families_on_two_processes_equal_one() -> None:
    fixed = [families_case(engine, build_family("random", keep=0.4)) for engine in ("ddp", "fsdp")]
    cases = [*SHARDED, *fixed]
    for case, outcome in zip(cases, run_distributed(run_cases, 2, cases, timeout=240)[0], strict=True):
        reference = run_case(Case(**{**vars(case), "engine": "ddp"}))
        assert 0 < reference.active < 0.9, case
        check_equal(outcome, reference)
