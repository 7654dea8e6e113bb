"""Errors that a user can mend, in one line: what is said in place of a traceback, and the exit status."""

from selfmask_dist.runs.exit_status import NO_SPACE, plain_status


def explain(error: BaseException) -> tuple[int, str] | None:
    """Return exit status and message of an error that a user can mend; None where a traceback is due."""
    status = plain_status(error)
    if status is None:
        return None
    if isinstance(error, ArithmeticError):  # training diverged: the message says it all
        return status, f"stopped: {error}"
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return status, f"error: {error}; make room and go on with run.resume=true"
    return status, f"error: {_reason(error)}"


def _reason(error: BaseException) -> str:
    """Return the error in words; the operating system's own errors name the path first."""
    if not isinstance(error, OSError) or error.filename is None:
        return str(error)
    where = error.filename if error.filename2 is None else f"{error.filename} -> {error.filename2}"
    if isinstance(error, IsADirectoryError):
        return f"{where} is a folder; name a file"
    return f"{where}: {(error.strerror or 'cannot be used').lower()}"
