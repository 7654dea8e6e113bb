"""Lottery tickets: prune a trained network by magnitude, rewind what is left to step k, train it again.

    w_T = train(w_k * m)      m := m without the smallest |w_T|      w := w_k * m      ... for each round

k = 0 is the first version (Frankle, Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, arXiv 1803.03635,
section 1); deep networks need some early k (Frankle, Dziugaite, Roy, Carbin, "Linear Mode Connectivity and
the Lottery Ticket Hypothesis", ICML 2020, arXiv 1912.05671, section 4). After r rounds that prune a share p,
(1 - p)^r of the weights is left. Pure functions on tensors by name; knows no files and no training loop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selfmask_dist.procedures.hold import FREE, ZERO, keep_largest
from selfmask_dist.procedures.wise_ft import write

Mask = dict[str, Tensor]

TrainFn = Callable[[int, dict[str, Tensor]], None]
"""(round, codes): trains the model from step k to the end under `hold.Hold(model, codes)`."""


@dataclass(frozen=True)
class Ticket:
    """A mask that one round trained with, the weights that it starts from (w_k * m) and ends with."""

    mask: Mask
    start: dict[str, Tensor]
    end: dict[str, Tensor]

    @property
    def left(self) -> float:
        """The share of the weights that the mask keeps."""
        return sum(int(m.sum()) for m in self.mask.values()) / sum(m.numel() for m in self.mask.values())


def whole(weights: Mapping[str, Tensor]) -> Mask:
    """The mask of the first round: nothing is pruned."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def prune(weights: Mapping[str, Tensor], mask: Mask, share: float, *, scope: str = "global") -> Mask:
    """The mask without a `share` of what it keeps, the smallest by magnitude.

    Args:
        scope: `global`: of all weights together (deep networks), `tensor`: of each tensor.

    Raises:
        ValueError: a share that is not above 0 and below 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to prune in a round must lie between 0 and 1, got {share}")
    return keep_largest(weights, mask, 1 - share, scope=scope)


def rewind(at_k: Mapping[str, Tensor], mask: Mask) -> dict[str, Tensor]:
    """w_k * m for the pruned names, w_k for the others."""
    return {
        name: torch.where(mask[name], tensor, 0) if name in mask else tensor.clone()
        for name, tensor in at_k.items()
    }


def codes(mask: Mask) -> dict[str, Tensor]:
    """What training has to keep at zero."""
    return {name: torch.where(kept, FREE, ZERO).to(torch.int8) for name, kept in mask.items()}


def find_tickets(
    model: nn.Module,
    names: Sequence[str],
    train_fn: TrainFn,
    *,
    at_k: Mapping[str, Tensor],
    rounds: int,
    share: float = 0.2,
    scope: str = "global",
) -> list[Ticket]:
    """Iterative magnitude pruning: `rounds` + 1 trainings, the first one of the whole network.

    Args:
        names: parameters that are pruned.
        at_k: the model's whole state after k steps of training, to which every round is rewound.
        share: pruned of what is left in each round. Frankle & Carbin: 0.2.
    """
    mask, tickets = whole({name: at_k[name] for name in names}), []
    for index in range(rounds + 1):
        start = rewind(at_k, mask)
        write(model, start)
        train_fn(index, codes(mask))
        end = {name: model.get_parameter(name).detach().clone() for name in names}
        tickets.append(Ticket(mask, start, end))
        mask = prune(end, mask, share, scope=scope)
    return tickets
