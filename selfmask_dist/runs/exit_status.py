"""Exit statuses of a training process, which its launcher acts on.

Knows nothing of training and imports nothing heavy: launchers read it.
"""

OK = 0
FAILED = 1  # a bug, or something the machine did: the traceback says it
BAD_INPUT = 2  # the user's to mend; a restart would end the same
DIVERGED = 3  # the loss or the scores stopped being finite; a restart would end the same
REQUEUE = 75  # asked to stop and saved (EX_TEMPFAIL of sysexits.h): start me again
HUNG = 76  # no step for too long, stacks are dumped: start me again
LOST = 77  # another process, or a data loading worker, is gone: start me again unless another says why not


def is_restartable(status: int) -> bool:
    """Return whether a process that ended so is worth starting again: it asked for it, or a signal killed it.

    `status`: as `subprocess` gives it, negative for a signal; 128 + n, a shell's spelling of the same,
    counts too.
    """
    return status in (REQUEUE, HUNG, LOST) or status < 0 or 128 < status < 160
