"""Lottery tickets as a run: rounds of training and pruning, each from the state at step k."""

import math
from typing import Any

from safetensors.torch import load_file

from selfmask_dist.procedures import lottery_math as lottery
from selfmask_dist.procedures import packnet_math as packnet
from selfmask_dist.training.build import build_backbone
from selfmask_dist.training.chain import Chain, share_of
from selfmask_dist.training.finetune import WHOLE


def run_lottery(chain: Chain) -> dict[str, Any]:
    """Train `procedure.rounds` + 1 times; `ticket.safetensors` holds the last mask's start, w_k * m."""
    section, config = chain.config.procedure, chain.config
    encoder = build_backbone(config).encoder
    names = packnet.packable(encoder, section.include)
    start: dict[str, Any] = {}
    if section.rewind_steps:
        chain.train(
            "rewind",
            train={"max_steps": section.rewind_steps},
            eval={"frozen_baseline": False, "final": False, "knn_every": 0.0},
        )
        start = {"start_from": str(chain.folder / "rewind")}
    mask, rounds = lottery.whole({name: encoder.get_parameter(name) for name in names}), []
    for index in range(section.rounds + 1):
        codes = chain.once(f"round-{index}-codes.safetensors", lottery.codes, mask)
        result = chain.train(f"round-{index}", procedure={"hold": str(codes), **start})
        rounds.append({"left": share_of(mask), **result["adapted"]})
        if index < section.rounds:
            end = load_file(chain.folder / f"round-{index}" / WHOLE)
            mask = lottery.prune(end, mask, section.prune, scope=section.scope)
    at_k = load_file(chain.folder / "rewind" / WHOLE) if start else encoder.state_dict()
    chain.once("ticket.safetensors", lottery.rewind, at_k, mask)
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
