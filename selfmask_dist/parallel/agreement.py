"""One process finds out for all, and each makes sure that it speaks of the same thing. Knows no models."""

import torch.distributed as dist

from selfmask_dist.parallel.world import World


def take_from_main(world: World, found: str, *, sample: str, what: str) -> str:
    """Return what the main rank found out. Collective: every rank must call.

    Args:
        found: on the main rank; others need none.
        sample: a cheap digest of what `found` is about, from each rank's own copy of it.
        what: it is, for the message.

    Raises:
        ValueError: this rank's sample is not the main rank's.
    """
    if world.size == 1:
        return found
    said = [found, sample]
    dist.broadcast_object_list(said, src=0)
    if said[1] != sample:
        raise ValueError(
            f"{what} of rank {world.rank} differ from those of rank 0: nodes see different files, or one was "
            f"read while it was being written. Give all nodes the same file"
        )
    return said[0]
