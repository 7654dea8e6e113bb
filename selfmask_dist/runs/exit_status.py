"""Exit statuses of a training process, which its launcher acts on.

Knows nothing of training and imports nothing heavy: launchers read it.
"""

import errno
import signal

OK = 0
FAILED = 1  # a bug, or something the machine did: the traceback says it
BAD_INPUT = 2  # the user's to mend; a restart would end the same
DIVERGED = 3  # the loss or the scores stopped being finite; a restart would end the same
REQUEUE = 75  # asked to stop and saved (EX_TEMPFAIL of sysexits.h): start me again
HUNG = 76  # no step for too long, stacks are dumped: start me again
LOST = 77  # another process, a data loading worker or the network is gone: start me again, unless another
# says why not
DEVICE = 78  # this process's device failed (uncorrectable memory error, ...): start me again on other nodes

# a path that does not fit: the message says all there is to say
WRONG_PATH = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
WRONG_PLACE = (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY)  # likewise, without a type
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def is_restartable(status: int) -> bool:
    """Return whether a process that ended so is worth starting again: it asked for it, or a signal killed it.

    `status`: as `subprocess` gives it, negative for a signal; 128 + n, a shell's spelling of the same,
    counts too.
    """
    return status in (REQUEUE, HUNG, LOST, DEVICE) or status < 0 or 128 < status < 160


def is_echo(status: int) -> bool:
    """Return whether a process that ended so may only be a victim of another one's end: it says so (`LOST`),
    or it was aborted, as NCCL's watchdog does to a process that waits for a peer that is gone.
    """
    return status in (LOST, -signal.SIGABRT, 128 + signal.SIGABRT)


def plain_status(error: BaseException) -> int | None:
    """Return the status of an error whose message says all there is to say, None where a traceback is due."""
    if isinstance(error, ArithmeticError):
        return DIVERGED
    if isinstance(error, (ValueError, *WRONG_PATH)):
        return BAD_INPUT
    if isinstance(error, OSError) and (
        error.errno in NO_SPACE or (error.errno in WRONG_PLACE and error.filename is not None)
    ):
        return BAD_INPUT
    return None
