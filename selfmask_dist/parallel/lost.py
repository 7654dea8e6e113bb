"""Is an error this process's own, or the echo of another that is gone?

    killed, hung or unreachable peer -> a collective fails here, with an error that names no cause

Such an error says nothing against the run: it may be started again. torch gives gloo's errors no type of
their own, so they are known by their words.
"""

import torch.distributed as dist

_GLOO = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "No route to host",
    "Timed out waiting",
    "Application timeout caused pair closure",
    "Socket closed",
)
_OWN_FAULTS = ("invalid usage", "invalid argument")  # what NCCL says of a program that is wrong


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` is a collective's (or the first meeting's) that failed because of another process or
    the network.
    """
    text = str(error)
    if isinstance(error, dist.DistError):  # NCCL, and the store at which processes meet
        return not any(fault in text.lower() for fault in _OWN_FAULTS)
    return isinstance(error, RuntimeError) and any(words in text for words in _GLOO)
