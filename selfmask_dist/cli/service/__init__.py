"""A bank of masks over HTTP: a picture in, its embedding or its classes under a named mask out.

    POST /embed?mask=NAME   the body is one encoded picture; without `mask`, the frozen backbone
    POST /predict?mask=NAME classes, where the mask came with a head
    GET  /masks             names
    GET  /health            200 while the encoder works
    GET  /metrics           Prometheus text
    GET  /openapi.json      this, for programs; GET / is a page for people

What each part bounds, from the wire to the encoder:

    connections   open sockets; the time for a request's head, and for a client to take its answer
    bodies        bytes of one body and of all; the time for a body
    app           requests that have arrived and wait; the time until their answer
    pictures      pixels, pieces and memory of a picture, by its header, before it is decoded
    encoder       pictures in one pass; a pass that memory cannot hold is made in smaller ones

`create_app` makes an ASGI application; `server.make_server` runs it behind the first part, which another ASGI
server would leave out.
"""

import importlib
from typing import TYPE_CHECKING, Any

from selfmask_dist.cli.service.limits import Limits

if TYPE_CHECKING:
    from selfmask_dist.cli.service.app import create_app

__all__ = ["Limits", "create_app"]


def __getattr__(name: str) -> Any:
    # imported when it is asked for: the command line reads the limits and must not wait seconds for torch
    if name == "create_app":
        return importlib.import_module("selfmask_dist.cli.service.app").create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
