"""Lottery tickets: prune a trained network by magnitude, rewind what is left to step k, train it again.

    w_T = train(w_k * m)      m := m without the smallest |w_T|      w := w_k * m      ... for each round

k = 0 is the first version (Frankle, Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, arXiv 1803.03635,
section 1); deep networks need some early k (Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and
the Lottery Ticket Hypothesis", ICML 2020, arXiv 1912.05671, section 4). After r rounds that prune a share p,
(1 - p)^r of the weights is left. The equations come first, as pure functions on tensors by name; the run is
below them.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from selfmask_dist.common import names
from selfmask_dist.procedures.packnet import packable
from selfmask_dist.training.build import build_backbone
from selfmask_dist.training.chain import Chain, share_of
from selfmask_dist.training.hold import FREE, ZERO, keep_largest

Ticket = dict[str, Tensor]
"""{parameter name: bool tensor of its shape}, True where a weight is left."""


def whole(weights: Mapping[str, Tensor]) -> Ticket:
    """Return the mask of the first round, which prunes nothing."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def prune(weights: Mapping[str, Tensor], mask: Ticket, share: float, *, scope: str = "global") -> Ticket:
    """Return the mask without a `share` of what it keeps, the smallest by magnitude.

    Args:
        scope: `global`: of all weights together (deep networks), `tensor`: of each tensor.

    Raises:
        ValueError: a share that is not above 0 and below 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to prune in a round must lie between 0 and 1, got {share}")
    return keep_largest(weights, mask, 1 - share, scope=scope)


def rewind(at_k: Mapping[str, Tensor], mask: Ticket) -> dict[str, Tensor]:
    """Return w_k * m for the pruned names, and w_k for the others."""
    return {
        name: torch.where(mask[name], tensor, 0) if name in mask else tensor.clone()
        for name, tensor in at_k.items()
    }


def hold_codes(mask: Ticket) -> dict[str, Tensor]:
    """Return the codes (see `training.hold`) by which training keeps the pruned weights at zero."""
    return {name: torch.where(kept, FREE, ZERO).to(torch.int8) for name, kept in mask.items()}


# ---- the run


def run_lottery(chain: Chain) -> dict[str, Any]:
    """Train `procedure.rounds` + 1 times; `ticket.safetensors` holds the last mask's start, w_k * m."""
    section, config = chain.config.procedure, chain.config
    encoder = build_backbone(config).encoder
    mask = whole({name: encoder.get_parameter(name) for name in packable(encoder, section.include)})
    start: dict[str, Any] = {}
    if section.rewind_steps:
        chain.train(
            "rewind",
            train={"max_steps": section.rewind_steps},
            eval={"frozen_baseline": False, "final": False, "knn_every": 0.0},
        )
        start = {"start_from": str(chain.folder / "rewind")}
    rounds = []
    for index in range(section.rounds + 1):
        codes = chain.once(f"round-{index}-codes.safetensors", hold_codes, mask)
        result = chain.train(f"round-{index}", procedure={"hold": str(codes), **start})
        rounds.append({"left": share_of(mask), **result["adapted"]})
        if index < section.rounds:
            end = load_file(chain.folder / f"round-{index}" / names.ENCODER)
            mask = prune(end, mask, section.prune, scope=section.scope)
    at_k = load_file(chain.folder / "rewind" / names.ENCODER) if start else encoder.state_dict()
    chain.once("ticket.safetensors", rewind, at_k, mask)
    total = sum(kept.numel() for kept in mask.values())
    num_kept = sum(int(kept.sum()) for kept in mask.values())
    others = sum(p.numel() for p in encoder.parameters()) - total
    return {
        "rounds": rounds,
        "adapted": {key: value for key, value in rounds[-1].items() if key != "left"},
        "active": (num_kept + others) / (total + others),
        # a bit for each weight, and the values of those that are left
        "stored_bytes": math.ceil(total / 8) + 4 * (num_kept + others),
    }
