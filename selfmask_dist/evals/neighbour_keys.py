"""A neighbour as one integer: sorted, such keys are neighbours from the nearest, of equal ones by id.

    key = ~bits(similarity) * 2^32 + id      bits: of a float32, turned so that they rise with it

So one sort of integers decides everything, ties included, on one rank and over ranks alike.
"""

import torch
from torch import Tensor

NO_ID = 2**31 - 1
_MAGNITUDE = 2**31 - 1  # all bits of a float32 but its sign
_ID = 2**32 - 1


def encode(sims: Tensor, ids: Tensor) -> Tensor:
    """Keys, int64, of similarities (float32) and ids from 0 to `NO_ID`."""
    bits = (sims + 0.0).view(torch.int32)  # -0 and 0 are equal
    rising = bits ^ ((bits >> 31) & _MAGNITUDE)  # the larger a negative number's bits, the smaller it is
    return ((~rising).long() << 32) | ids


def decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities, float32, and ids, int64."""
    rising = ~(keys >> 32).int()
    bits = rising ^ ((rising >> 31) & _MAGNITUDE)
    return bits.view(torch.float32), keys & _ID


def sort_rows(keys: Tensor) -> None:
    """Sort each row of keys (m, n), in place: the nearest first."""
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=1)  # vectorised: a tenth of torch's time
    else:
        keys.copy_(keys.sort(dim=1).values)


NO_KEY = int(encode(torch.tensor([-torch.inf]), torch.tensor([NO_ID])))  # farther than every neighbour
