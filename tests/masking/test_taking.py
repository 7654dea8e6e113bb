"""Scores' gradients in the memory of theta's: the same bits, and no second tensor."""

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from selfmask_dist.masking import attach, build_family
from selfmask_dist.masking.families.base import Family
from selfmask_dist.masking.families.threshold import Threshold
from selfmask_dist.masking.pieces import Segment
from tests.support.models import make

MATRICES: dict[str, Any] = {"include": ["blocks.*.attn.*.weight", "blocks.*.mlp.*.weight"]}
IN_PLACE: dict[str, tuple[dict[str, Any], float | str]] = {
    "threshold": ({}, "normal"),
    "threshold, some always kept": ({"maskable": 0.4, "maskable_by": "magnitude"}, "normal"),
    "piggyback": ({"threshold": 0.9, "scale": "none"}, "magnitude"),
    "edge_popup": ({"keep": 0.3}, "kaiming_uniform"),
    "topk": ({"keep": 0.6}, "shuffled_magnitude"),
    "binary_connect": ({}, 1.0),
    "twn": ({}, 1.0),
}
NOT_IN_PLACE: dict[str, tuple[dict[str, Any], float | str]] = {
    "ttq": ({}, 1.0),
    "joint": ({}, 1.0),
    "movement": ({"keep": 0.4}, 0.0),
    "soft_movement": ({"threshold": 0.5, "penalty": 3.0}, 0.0),
}


def gradients(
    family: Family, init: float | str, *, take: bool
) -> tuple[dict[str, Tensor], dict[str, bool], int]:
    """Gradients of all that is trained, where those of scores lie, and how many thetas keep theirs."""
    model, _ = make("timm_vit")
    model = model.float()
    masks = attach(model, family=family, init=init, auto=False, **MATRICES)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    for half in images.split([1, 2]):
        model(half).square().sum().backward()
    before = {e.name: e.theta.grad.data_ptr() for e in masks.entries if e.theta.grad is not None}
    masks.pull_back(take=take)
    found = {str(i): p.grad for i, p in enumerate(masks.parameters()) if p.grad is not None}
    shared = {
        e.name: e.scores.grad.data_ptr() == before[e.name] for e in masks.entries if e.scores.grad is not None
    }
    return found, shared, sum(e.theta.grad is not None for e in masks.entries)


@pytest.mark.parametrize("kind", [*IN_PLACE, *NOT_IN_PLACE])
def test_the_gradient_is_the_same_in_the_memory_of_thetas(kind: str) -> None:
    options, init = (IN_PLACE | NOT_IN_PLACE)[kind]
    family = build_family(kind.partition(",")[0], **options)
    (kept, apart, left), (taken, shared, gone) = (
        gradients(copy.deepcopy(family), init, take=take) for take in (False, True)
    )
    assert kept
    assert taken.keys() == kept.keys()
    for name, gradient in kept.items():
        assert torch.equal(taken[name], gradient), name
    assert not any(apart.values())
    assert left > 0
    if kind in IN_PLACE:
        assert all(shared.values())
        assert gone == 0
    else:  # a second gradient is made from the same G
        assert not any(shared.values())
        assert gone == left


class Backwards(Threshold):
    """Reads G again after it has written: allowed to whoever writes a family."""

    name: ClassVar[str] = "backwards"

    def pull_back(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        out.zero_()
        out.add_(grad)


def test_a_family_of_ones_own_has_memory_of_its_own() -> None:
    found, shared, left = gradients(Backwards(), "normal", take=True)
    assert not any(shared.values())
    assert left == len(shared)
    assert all(gradient.any() for gradient in found.values())
