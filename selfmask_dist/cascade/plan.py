"""How long experts train, and which group of processes trains which.

    epochs of expert k = round(N / |D_k| * epochs)      equal steps for every expert (paper 3.4)

Groups of equal size take experts in turn, longest first, each to the group with the least to do. A group is
never so small that an expert's state does not fit into its processes' memory, where that is known: where an
engine cuts the state, 8 processes hold four times as much of it each as 32 do.
"""

from collections.abc import Callable, Sequence


def expert_epochs(num_samples: int, cluster_size: int, epochs: float, *, kind: str) -> float:
    """Return the epochs over a cluster of `cluster_size` of `num_samples` images; at least one.

    kind: `equal_steps` (the paper's formula) or `equal_epochs`.
    """
    if kind == "equal_epochs":
        return epochs
    return float(max(round(num_samples / cluster_size * epochs), 1))


def share_out(costs: Sequence[float], num_groups: int) -> list[list[int]]:
    """Return the experts of each group, in the order in which it trains them."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    loads = [0.0] * num_groups
    for expert in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        group = min(range(num_groups), key=lambda g: (loads[g], g))
        groups[group].append(expert)
        loads[group] += costs[expert]
    return groups


def utilisation(costs: Sequence[float], groups: Sequence[Sequence[int]]) -> float:
    """Return the share of all processes' time that is spent training until the last group is done."""
    loads = [sum(costs[k] for k in group) for group in groups]
    return sum(loads) / (len(loads) * max(loads))


def choose_num_groups(
    costs: Sequence[float],
    world_size: int,
    global_batch_size: int,
    *,
    wanted: int = 0,
    at_least: float = 0.9,
    has_room_fn: Callable[[int], bool] = lambda _: True,
) -> int:
    """Return the largest number of groups that keeps a share `at_least` of the processes busy, or 1.

    Args:
        wanted: this many; 0 to choose.
        has_room_fn: whether an expert fits into the memory of a group of so many processes; asked from the
            smallest groups on, until one has room. One group is taken whatever it says.

    Raises:
        ValueError: `wanted` groups do not divide the processes, or a group's processes the global batch.
    """

    def fits(number: int) -> bool:
        return world_size % number == 0 and global_batch_size % (world_size // number) == 0

    possible = [number for number in range(1, world_size + 1) if fits(number)]
    if wanted:
        if wanted not in possible:
            raise ValueError(
                f"cascade.expert_groups is {wanted}; {world_size} processes with a global batch of "
                f"{global_batch_size} can form {', '.join(map(str, possible))} group(s)"
            )
        return wanted
    busy = [n for n in possible if n <= len(costs) and utilisation(costs, share_out(costs, n)) >= at_least]
    return next((number for number in reversed(busy) if number == 1 or has_room_fn(world_size // number)), 1)
