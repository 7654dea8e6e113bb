"""The application behind guarded connections, on a port. Knows nothing of pictures."""

import resource

import uvicorn
from starlette.applications import Starlette

from selfmask_dist.cli.service.connections import MAX_HEAD, guarded
from selfmask_dist.cli.service.limits import Limits

_BACKLOG = 128  # connections that the system holds until they are accepted, at once
_OTHER_FILES = 64


def make_server(
    app: Starlette, limits: Limits, *, host: str = "127.0.0.1", port: int = 8000
) -> uvicorn.Server:
    """Return a server of what `create_app` made; its `run` ends at SIGTERM, with what had arrived answered.

    Raises:
        ValueError: this process may not open as many files as `max_connections` needs.
    """
    _allow_files(limits.max_connections + _BACKLOG + _OTHER_FILES, limits.max_connections)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=guarded(limits, app.state.requests),
        ws="none",
        log_level="error",  # a warning for each malformed request is a way to fill a disk
        access_log=False,
        backlog=_BACKLOG,
        timeout_keep_alive=limits.idle_seconds,
        h11_max_incomplete_event_size=MAX_HEAD,
    )
    return uvicorn.Server(config)


def _allow_files(number: int, connections: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= number:
        return
    if hard != resource.RLIM_INFINITY and hard < number:
        raise ValueError(
            f"--max-connections {connections} needs {number} open files, and this process may have {hard};"
            f" ask for fewer, or raise the limit (ulimit -n {number})"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
