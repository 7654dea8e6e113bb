"""Is an error the device's fault, or the program's? Told by the words that CUDA and NCCL use.

A device that fails is not mended by starting the run on it again: its node is to be left out. A program that
reads beyond its memory fails on every node. Knows texts alone, and imports nothing: launchers read it too.
"""

import re

from selfmask_dist.runs.exit_status import DEVICE, FAILED

# of CUDA's runtime, of its driver in the kernel's log (NVRM: Xid), and of NCCL; in lower case
_FAULTS = (
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "or a hardware error",  # peer memory over NVLink
    "hardware stack error",
    "unspecified launch failure",
    "device(s) is/are busy or unavailable",
    "system not yet initialized",  # NVSwitch's fabric manager is not up
    "cuda error: unknown error",
    "cuda unknown error",
    "gpu is lost",
    "fallen off the bus",
    "unhandled cuda error",  # NCCL's own, on the rank whose CUDA call failed
)
_XID = re.compile(r"nvrm: xid|\bxid \d+")
# a kernel's assertion or address, and what does not fit: the same on the next node. They win over NCCL's
# "unhandled cuda error", which only wraps them
_BUGS = (
    "device-side assert",
    "an illegal memory access",
    "an illegal instruction",
    "misaligned address",
    "no kernel image is available",
    "out of memory",
)
_CUDA = ("cuda", "nccl", "xid")


def device_status(text: str) -> int | None:
    """Return `DEVICE` where a text names a fault of the device, `FAILED` where it names a bug that shows on
    the device, and None where it speaks of neither.

    NCCL's "unhandled system error" is neither: it is what ranks say whose peer, or whose network, is gone.
    """
    lowered = text.lower()
    if not any(word in lowered for word in _CUDA):
        return None
    if any(words in lowered for words in _BUGS):
        return FAILED
    if any(words in lowered for words in _FAULTS) or _XID.search(lowered):
        return DEVICE
    return None
