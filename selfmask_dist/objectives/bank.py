"""Rows for every picture of a data set, dealt to ranks in turn: rank r of W holds pictures r, r + W, ...

A rank keeps and updates its own rows alone, so memory falls as 1/W. What a batch needs of other ranks' rows
travels: targets of its pictures (a few numbers each), and two sums for each of its embeddings.

`AdamW` is here as four lines on plain tensors, because the rows are no parameters of the module: an engine
would hold all of them on every rank. Knows neither encoders nor process groups.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from selfmask_dist.objectives.base import Context

BETAS, EPS = (0.9, 0.999), 1e-8  # torch.optim.AdamW's


class AdamW:
    """Steps of AdamW on tensors that no optimizer holds; the moments are part of a run's state.

    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, as torch.optim.AdamW has it.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.first = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        self.second = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        self.num_updates = 0

    @torch.no_grad()
    def step(
        self, tensors: Mapping[str, Tensor], grads: Mapping[str, Tensor], *, rate: float, decay: float
    ) -> None:
        """Move every tensor in place by its gradient."""
        self.num_updates += 1
        first_left, second_left = (1 - beta**self.num_updates for beta in BETAS)
        for name, tensor in tensors.items():
            first, second, grad = self.first[name], self.second[name], grads[name]
            first.lerp_(grad, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            tensor.mul_(1 - rate * decay)
            tensor.addcdiv_(first, (second / second_left).sqrt_().add_(EPS), value=-rate / first_left)


class ShardedBank:
    """This rank's rows (n, dim) of a bank of N pictures, and each picture's targets among the N.

    neighbours: (n, k) int64, pictures; shares: (n, k) float32, what of a target's mass lies on each; the rest
        is the picture's own. present: (n,) bool, false where a picture could not be read: such a row is
        nobody's target and no one is held against it.
    """

    def __init__(self, num_pictures: int, dim: int, num_neighbours: int, context: Context) -> None:
        self.num_pictures, self.context = num_pictures, context
        own = len(range(context.rank, num_pictures, context.world_size))
        self.rows = torch.zeros(own, dim)
        self.neighbours = torch.zeros(own, num_neighbours, dtype=torch.int64)
        self.shares = torch.zeros(own, num_neighbours)
        self.present = torch.ones(own, dtype=torch.bool)

    def own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return which pictures `ids` are this rank's, bool of the same shape, and their places among its
        rows: 0 where they are not.
        """
        is_own = ids % self.context.world_size == self.context.rank
        return is_own, torch.where(is_own, ids // self.context.world_size, 0)

    def targets_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the targets of pictures `ids` (B,): pictures (B, 1 + k) and shares (B, 1 + k) that sum to 1.

        The first is the picture itself. Collective: every rank must call, with the same ids.
        """
        is_own, places = self.own(ids)
        width = self.neighbours.shape[1]
        table = torch.zeros(
            len(ids), 2 * width, dtype=torch.float64, device=ids.device
        )  # ids are exact in it
        if len(self.rows):
            found = torch.cat([self.neighbours[places].double(), self.shares[places].double()], dim=1)
            table = found * is_own[:, None]
        table = self.context.all_reduce(table)
        shares = table[:, width:].to(self.shares.dtype)
        others = table[:, :width].round().long()
        return (
            torch.cat([ids[:, None], others], dim=1),
            torch.cat([1 - shares.sum(1, keepdim=True), shares], dim=1),
        )

    def sums(
        self,
        embeddings: Tensor,
        targets: Tensor,
        shares: Tensor,
        *,
        temperature: float,
        candidates: Tensor | None = None,
    ) -> Tensor:
        """Return this rank's part of two sums for each unit embedding: over all ranks they are

            sum_j exp((z . a_j - 1) / temperature)        and        sum_j q(j) z . a_j / temperature

        with a_j the unit rows of the bank. exp takes at most 1, so no maximum has to be agreed on.

        Args:
            embeddings: (B, V, dim), V views of each picture. targets, shares: (B, 1 + k), see `targets_of`.
            candidates: pictures (m,) drawn from all N without replacement, the same on every rank; the
                first sum is then an estimate from them, equal in expectation, and exact on the targets.
                None: all of them.

        Returns:
            (2, B, V) float64.
        """
        is_own, places = self.own(targets)
        flat = embeddings.flatten(0, 1)
        num, views = embeddings.shape[:2]
        if not len(self.rows):
            return (flat.sum(1) * 0).double().view(1, num, views).expand(2, -1, -1)
        # a sample's rows alone are put to unit length; all of them where all are needed
        unit = F.normalize(self.rows, dim=1) if candidates is None else None
        of_targets = F.normalize(self.rows[places], dim=2) if unit is None else unit[places]
        # (B, V, 1 + k), of this rank's targets alone
        on_targets = torch.einsum("bvd,btd->bvt", embeddings, of_targets) / temperature
        positive = (on_targets * (shares * is_own)[:, None]).sum(2, dtype=torch.float64)
        if unit is not None:
            similar = flat @ unit.T
            mass = ((similar - 1) / temperature).exp()
            mass = torch.where(self.present, mass, 0) if not self.present.all() else mass
            total = mass.sum(1, dtype=torch.float64).view(num, views)
            return torch.stack([total, positive])
        assert candidates is not None
        chosen = candidates[candidates % self.context.world_size == self.context.rank]
        drawn = chosen // self.context.world_size
        of_drawn = F.normalize(self.rows[drawn], dim=1)
        mass = ((embeddings @ of_drawn.T - 1) / temperature).exp()  # (B, V, m')
        counts = self.present[drawn].expand(num, -1).clone()
        for column in targets.T:  # targets count exactly, and so not as candidates
            counts &= chosen[None] != column[:, None]
        exact = ((on_targets - 1 / temperature).exp() * (is_own & self.present[places])[:, None]).sum(
            2, dtype=torch.float64
        )
        drawn_sum = (mass * counts[:, None]).sum(2, dtype=torch.float64)
        return torch.stack([exact + drawn_sum * (self.num_pictures / len(candidates)), positive])

    @torch.no_grad()
    def move_towards(self, ids: Tensor, embeddings: Tensor, kept: float) -> None:
        """Set the rows of these pictures (B,) to unit(kept unit(row) + (1 - kept) embedding)."""
        is_own, places = self.own(ids)
        if not is_own.any():
            return
        places, towards = places[is_own], embeddings[is_own]
        moved = kept * F.normalize(self.rows[places], dim=1) + (1 - kept) * towards
        self.rows[places] = F.normalize(moved, dim=1)


def draw_candidates(num_pictures: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` of `num_pictures` numbers, drawn without replacement, ascending: (count,) int64."""
    return torch.randperm(num_pictures, generator=generator)[:count].sort().values


def flat_sum(context: Context, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the sums over ranks of tensors of one dtype, in one collective: every rank must call."""
    total = context.all_reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    parts = total.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
