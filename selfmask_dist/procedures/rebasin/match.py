"""Git Re-Basin: permute one network's units so that the straight line to another one stays low in loss.

    weights      max over P of  sum over layers of <W_A, P W_B P_prev^T>     (group by group, again and again)
    activations  max over P of  sum over samples of <z_A, P z_B>             (each group by itself)
    barrier = max over alpha of  L(theta(alpha)) - [(1 - alpha) L(theta_A) + alpha L(theta_B)]

Each step is a linear assignment. (Ainsworth, Hayase, Srinivasa, "Git Re-Basin: Merging Models modulo
Permutation Symmetries", ICLR 2023, arXiv 2209.04836, section 3.) In between, activations
of networks with batch normalisation lose variance; `reset_batchnorm` measures its statistics anew (Jordan et
al., "REPAIR", ICLR 2023, arXiv 2211.08403).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor, nn

from selfmask_dist.backbones.weights import check_same
from selfmask_dist.procedures.rebasin import permutation
from selfmask_dist.procedures.rebasin.permutation import Group, Permutations, Spec
from selfmask_dist.procedures.wise_ft import ALPHAS, measure_curve

_MAX_ROUNDS = 100


@torch.no_grad()
def match_weights(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], spec: Spec, *, seed: int = 0
) -> Permutations:
    """Return permutations that bring `second` next to `first` (algorithm 1), by coordinate descent.

    Args:
        first, second: states of one architecture. Running statistics are permuted with the rest, but do not
            take part in the choice.
        seed: of the order of groups in each round. It may end in a local optimum: try several.
    """
    check_same(first, second)
    generator = torch.Generator().manual_seed(seed)
    found, sets = permutation.identity(spec), permutation.together(spec)
    for _ in range(_MAX_ROUNDS):
        is_better = False
        for index in torch.randperm(len(sets), generator=generator).tolist():
            groups = sets[index]
            chosen = {group.name: found[group.name] for group in groups}
            others = permutation.apply(*_near(second, spec, groups), found, leave_out=chosen)
            gains = [_gain(first, others, group) for group in groups]
            best = _assign(gains, groups[0].blocks)
            more = _total(gains, best) - _total(gains, list(chosen.values()))
            # by more than rounding, or two equal optima would change places for ever
            if more > 1e-9 * max(float(gain.abs().max()) for gain in gains):
                found |= dict(zip(chosen, best, strict=True))
                is_better = True
        if not is_better:
            break
    return found


@torch.no_grad()
def match_activations(
    first: nn.Module, second: nn.Module, batches: Iterable[Tensor], spec: Spec
) -> Permutations:
    """Return permutations of `second`'s units by how they correlate with `first`'s on data (section 3.1).

    Activations are centred and scaled over the samples, so that strong units do not decide alone.

    Args:
        first, second: of one architecture; both run in eval mode, and are left in the mode they were in.
        batches: what they take, each (n, ...).
    """
    totals = {group.name: _Moments(group.size) for group in spec}
    with _watch(first, spec) as seen_first, _watch(second, spec) as seen_second:
        for batch in batches:
            first(batch)
            second(batch)
            for group in spec:
                totals[group.name].add(seen_first[group.name], seen_second[group.name])
    found: Permutations = {}
    for groups in permutation.together(spec):
        correlations = [totals[group.name].correlation() for group in groups]
        best = _assign(correlations, groups[0].blocks)
        found |= {group.name: order for group, order in zip(groups, best, strict=True)}
    return found


def loss_barrier(
    model: nn.Module,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    loss_fn: Callable[[nn.Module], float],
    *,
    alphas: Sequence[float] = ALPHAS,
) -> float:
    """Return how far the loss rises over the line between its ends (Frankle et al. 2020); 0 if it never does.

    Args:
        loss_fn: the loss of the model as it stands; may reset its normalisation first.
        alphas: where to look; 0 and 1 are added.
    """
    points = measure_curve(
        model,
        first,
        second,
        lambda network: {"loss": loss_fn(network)},
        alphas=sorted({0.0, 1.0, *alphas}),
    )
    start, end = points[0].values["loss"], points[-1].values["loss"]
    return max(p.values["loss"] - ((1 - p.alpha) * start + p.alpha * end) for p in points)


def has_batchnorm(model: nn.Module) -> bool:
    """Return whether the model has batch normalisation, whose statistics mixing would spoil."""
    return bool(_batchnorms(model))


@torch.no_grad()
def reset_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measure the running statistics of batch normalisation anew, as the mean over batches, in place."""
    norms = _batchnorms(model)
    momenta, modes = [norm.momentum for norm in norms], {m: m.training for m in model.modules()}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative
        norm.train()
    try:
        for batch in batches:
            model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def _batchnorms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _near(state: Mapping[str, Tensor], spec: Spec, groups: Sequence[Group]) -> tuple[dict[str, Tensor], Spec]:
    """Return the tensors that groups index, and what permutes them."""
    names = {axis.tensor for group in groups for axis in group.axes}
    touching = tuple(replace(g, axes=tuple(a for a in g.axes if a.tensor in names)) for g in spec)
    return {name: state[name] for name in names}, touching


def _gain(first: Mapping[str, Tensor], second: Mapping[str, Tensor], group: Group) -> Tensor:
    """Return (units, units): what matching unit i of one network with unit j of the other adds to their inner
    product.
    """
    gain = torch.zeros(group.size, group.size, dtype=torch.float64)
    for axis in group.axes:
        if not _is_statistic(axis.tensor):
            one, other = (permutation.rows(state, group, axis).double() for state in (first, second))
            gain += one @ other.T
    return gain


class _Moments:
    """Sums over samples from which the correlation of two networks' units follows."""

    def __init__(self, size: int) -> None:
        self._count = 0
        self._sums = torch.zeros(2, size, dtype=torch.float64)
        self._squares = torch.zeros(2, size, dtype=torch.float64)
        self._products = torch.zeros(size, size, dtype=torch.float64)

    def add(self, first: Tensor, second: Tensor) -> None:
        """Activations (units, samples) of both."""
        self._count += first.shape[1]
        for index, activations in enumerate((first, second)):
            self._sums[index] += activations.sum(dim=1)
            self._squares[index] += activations.square().sum(dim=1)
        self._products += first @ second.T

    def correlation(self) -> Tensor:
        """Return (units, units): unit i of the first network with unit j of the second."""
        if not self._count:
            raise ValueError("activations can only be matched on data; there was no batch")
        means = self._sums / self._count
        deviations = (self._squares / self._count - means.square()).clamp(min=1e-24).sqrt()
        covariance = self._products / self._count - means[0].outer(means[1])
        return covariance / deviations[0].outer(deviations[1])


@contextmanager
def _watch(model: nn.Module, spec: Spec) -> Iterator[dict[str, Tensor]]:
    """Yield what the groups' units gave in the last forward: {group: (units, samples) float64 on the CPU}."""
    seen: dict[str, Tensor] = {}
    handles = []
    for group in spec:

        def record(module: nn.Module, inputs: Any, output: Any = None, group: Group = group) -> None:
            value = inputs[0] if group.probe.is_input else output
            units = permutation.activations(value.detach(), group)
            # a copy: activations that work in place would change it
            seen[group.name] = units.to("cpu", torch.float64, copy=True)

        module = model.get_submodule(group.probe.module)
        register = module.register_forward_pre_hook if group.probe.is_input else module.register_forward_hook
        handles.append(register(record))
    was_training = model.training
    model.eval()
    try:
        yield seen
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


def _assign(gains: Sequence[Tensor], blocks: int) -> list[Tensor]:
    """For each gain (units, units) the perm of a group, which together have the largest sum of
    gain[i, perm[i]]: the best within every pair of blocks, then the best pairs.
    """
    sizes = [gain.shape[0] // blocks for gain in gains]
    within = [
        [[_best(gain[i * n : i * n + n, j * n : j * n + n]) for j in range(blocks)] for i in range(blocks)]
        for gain, n in zip(gains, sizes, strict=True)
    ]
    pairs = torch.zeros(blocks, blocks, dtype=torch.float64)
    for gain, n, best in zip(gains, sizes, within, strict=True):
        units = torch.arange(n)
        for i in range(blocks):
            for j in range(blocks):
                pairs[i, j] += gain[i * n + units, j * n + best[i][j]].sum()
    order = _best(pairs).tolist()
    return [
        torch.cat([j * n + best[i][j] for i, j in enumerate(order)])
        for n, best in zip(sizes, within, strict=True)
    ]


def _best(gain: Tensor) -> Tensor:
    return torch.from_numpy(linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1])


def _total(gains: Sequence[Tensor], permutations: Sequence[Tensor]) -> float:
    return sum(float(g[torch.arange(len(p)), p].sum()) for g, p in zip(gains, permutations, strict=True))


def _is_statistic(name: str) -> bool:
    return name.endswith((".running_mean", ".running_var"))
