"""Lower learning rates in lower layers (Clark et al. 2020, ELECTRA; BEiT and MAE for fine-tuning).

    rate of depth d = base rate * decay^(L + 1 - d)

with d = 0 for what lies before the L blocks (stem, embeddings), d = l in block l, and d = L + 1 behind them
and for the head. Scores take it as weights do: with optim.score_step=rms all tensors' gradients have one
size, so a step of lower layers is that much shorter.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from selfmask_dist.maskfile.api import Masks

# of open_clip's and CLIP's towers: the last matrix, which they register as a parameter before all modules
_BEHIND_THE_BLOCKS = ("proj",)


def layer_depths(names: Sequence[str], blocks: Sequence[str]) -> dict[str, int]:
    """Return each parameter's depth by name.

    Args:
        names: of the encoder's parameters in the order that it registers them, which is that of its layers.
        blocks: names of the repeated blocks, from the lowest.

    Raises:
        ValueError: there are no blocks to count.
    """
    if not blocks:
        raise ValueError(
            "optim.layer_decay counts the repeated blocks of the backbone, and none are known of this one; "
            "set optim.layer_decay=null"
        )
    number = {block: place for place, block in enumerate(blocks, start=1)}
    depths: dict[str, int] = {}
    highest = 0
    for name in names:
        inside = [number[prefix] for prefix in _prefixes(name) if prefix in number]
        if inside:
            highest = max(highest, inside[0])
            depths[name] = inside[0]
        elif name in _BEHIND_THE_BLOCKS or highest == len(blocks):
            depths[name] = len(blocks) + 1
        else:  # the stem, or what stands between two blocks and works on what the lower one gives
            depths[name] = highest
    return depths


def with_layer_rates(
    groups: Sequence[dict[str, Any]],
    encoder: nn.Module,
    masks: Masks | None,
    *,
    blocks: Sequence[str],
    decay: float,
) -> list[dict[str, Any]]:
    """Return the optimizer's groups with those of the encoder cut by depth, each with its own base rate.

    Args:
        groups: with `name`, `params` and `base_lr`; those of heads stay whole.
        masks: on the encoder; None where its weights are trained.
        decay: `optim.layer_decay`.
    """
    names = {_plain(name): parameter for name, parameter in encoder.named_parameters()}
    depths = layer_depths([*names], blocks)
    by_id = {id(parameter): depths[name] for name, parameter in names.items()}
    for entry in masks.entries if masks is not None else ():
        own = [entry.scores, entry.weight, entry.numbers]
        by_id |= {id(tensor): depths[entry.name] for tensor in own if tensor is not None}
    found = []
    for group in groups:
        if not all(id(parameter) in by_id for parameter in group["params"]):
            found.append(group)
            continue
        for depth in sorted({by_id[id(parameter)] for parameter in group["params"]}):
            part = [parameter for parameter in group["params"] if by_id[id(parameter)] == depth]
            rate = group["base_lr"] * decay ** (len(blocks) + 1 - depth)
            found.append({**group, "name": f"{group['name']}.depth{depth}", "params": part, "base_lr": rate})
    return found


def describe_rates(groups: Sequence[Mapping[str, Any]], decay: float) -> str:
    """Return a line for the user: the lowest and the highest rate."""
    rates = [group["base_lr"] for group in groups if re.search(r"\.depth\d+$", group["name"])]
    return (
        f"rates    {len(rates)} by depth, {min(rates):.3g} to {max(rates):.3g} (optim.layer_decay={decay:g})"
    )


def _plain(name: str) -> str:
    """Return a parameter's own name, which deepspeed's parametrisations make longer."""
    return re.sub(r"\bparametrizations\.([^.]+)\.original\d*$", r"\1", name)


def _prefixes(name: str) -> list[str]:
    """Return the names of the modules around a parameter, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]
