"""Connections that hold nothing without a deadline: uvicorn's HTTP/1.1 protocol with a time for each wait.

    connected, or answered -> head -> body -> arrived -> answered

    head      head_seconds, then 408
    body      body_seconds, then 408 (bodies.py)
    arrived   answer_seconds, then 503 (app.py)
    answered  send_seconds from the first byte that the client does not take, then it is cut off

A deadline is for the whole of a thing, not for each piece: a client that sends a byte now and then meets it
too. Among more than `max_connections`, the one that has waited longest without a whole request gives way.
What is no HTTP is answered with its cause. uvicorn itself has a time between requests only
(https://github.com/Kludex/uvicorn/issues/157; delete this when it has those). Knows nothing of pictures.
"""

import asyncio
import json
import sys
from collections import Counter
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from selfmask_dist.cli.service.limits import Limits

MAX_HEAD = 65_536  # bytes of a request's line and headers
_REST_SECONDS = 2.0  # for what is still being sent of a body whose request was refused
_MOST_CHUNKS = 4096  # of a body without many bytes
_BYTES_OF_CHUNK = 512  # a larger one may have one more for each of these


class _Connection(h11.Connection):
    """Refuses a body in very many chunks, each of which costs as much as a large one."""

    _chunks = _bytes = 0

    def next_event(self) -> Any:
        """Return what h11 finds next."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._bytes += len(event.data)
            if self._chunks > _MOST_CHUNKS + self._bytes // _BYTES_OF_CHUNK:
                raise h11.RemoteProtocolError(
                    f"the body comes in chunks of {self._bytes // self._chunks} bytes; send chunks of 1,024"
                    " bytes and more"
                )
        return event


class Crowd:
    """All connections, and which of them have no whole request here, by when their wait began."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: set[GuardedProtocol] = set()
        self._waiting: dict[GuardedProtocol, None] = {}

    def opened(self, connection: "GuardedProtocol") -> None:
        """Count a new connection; where it is one too many, close the one that has waited longest."""
        self._open.add(connection)
        self.waits(connection)
        if len(self._open) > self.most:
            longest = next(iter(self._waiting))
            self.lost(longest)
            longest.give_way()

    def waits(self, connection: "GuardedProtocol") -> None:
        """Note that a connection begins to wait for a request."""
        self._waiting.pop(connection, None)
        self._waiting[connection] = None

    def arrived(self, connection: "GuardedProtocol") -> None:
        """Note that a connection's request is here."""
        self._waiting.pop(connection, None)

    def lost(self, connection: "GuardedProtocol") -> None:
        """Count a connection no longer."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)


class GuardedProtocol(H11Protocol):
    """One connection; `guarded` makes the class that has its limits."""

    limits: Limits
    requests: Counter[int]
    crowd: Crowd

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _Connection(h11.SERVER, MAX_HEAD)
        self._phase = ""
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first head, and count the connection."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` tells of every byte that cannot be sent
        self._follow()
        self.crowd.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End all deadlines."""
        self._phase = "lost"
        self.crowd.lost(self)
        self._set_receiving(None)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        if self._sending is not None:
            self._sending.cancel()

    # ---- receiving

    def data_received(self, data: bytes) -> None:
        """Take what has come, and set the deadline of the phase that this leads to."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._follow()

    def eof_received(self) -> None:
        """Tell a client that ends in the middle of a request what is missing."""
        if self._phase == "body" or (self._phase == "head" and self._has_begun):
            self.conn.receive_data(b"")  # h11 says what is missing
            self.handle_events()

    def on_response_complete(self) -> None:
        """Start the deadline of the next head, or of the rest of a body that is not wanted."""
        super().on_response_complete()
        self._follow()

    @property
    def _has_begun(self) -> bool:
        """Return whether a part of a head is here."""
        return bool(self.conn.trailing_data[0])

    def _follow(self) -> None:
        """Set the deadline of the phase that the connection is in, where it is a new one."""
        phase = "arrived"
        if self.conn.their_state is h11.IDLE:
            phase = "head"
        elif self.conn.their_state is h11.SEND_BODY:
            phase = "body" if self.conn.our_state is h11.SEND_RESPONSE else "rest"
        if phase == self._phase or self._phase == "lost":
            return
        self._phase = phase
        self._set_receiving({"head": self.limits.head_seconds, "rest": _REST_SECONDS}.get(phase))
        if phase == "head":
            self.crowd.waits(self)
        elif phase == "arrived":
            self.crowd.arrived(self)

    def _set_receiving(self, seconds: float | None) -> None:
        if self._receiving is not None:
            self._receiving.cancel()
        self._receiving = None if seconds is None else self.loop.call_later(seconds, self._is_late)

    def _is_late(self) -> None:
        if self._phase == "head" and self._has_begun:
            self._refuse(
                408,
                f"the request's head did not arrive whole within {self.limits.head_seconds:g} seconds;"
                " send it at once",
            )
        else:  # nothing was asked, or it is answered
            self.transport.close()

    # ---- refusing

    def give_way(self) -> None:
        """Close the connection in favour of a newer one."""
        if self._phase == "head" and not self._has_begun:
            self.transport.close()
        else:
            self._refuse(
                503,
                f"more than {self.crowd.most} connections are open, and this one has waited longest without a"
                " whole request; try again in a second, and send it at once",
            )

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, as uvicorn calls it, with the cause that h11 found."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError):
            msg = str(error)
            if error.error_status_hint == 431:
                self._refuse(
                    431, f"the request's head takes more than {MAX_HEAD:,} bytes; send shorter headers"
                )
                return
        self._refuse(400, f"this is no HTTP/1.1 request that can be read: {msg}; mend the client")

    def _refuse(self, status: int, reason: str) -> None:
        """Answer without the application, which is told that its client is gone, and close."""
        if self.transport.is_closing():
            return
        is_in_app = self.cycle is not None and not self.cycle.response_complete
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.requests[status] += not is_in_app  # which counts it as gone
            body = json.dumps({"error": reason}).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
                *([("retry-after", "1")] if status == 503 else []),
            ]
            phrase = HTTPStatus(status).phrase.encode()
            for event in (
                h11.Response(status_code=status, headers=headers, reason=phrase),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        if is_in_app:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def shutdown(self) -> None:
        """Answer what has arrived, as uvicorn does, and close what has not."""
        if self._phase == "body":
            self._refuse(503, "the service is stopping; try again later")
        else:
            super().shutdown()

    # ---- sending

    def pause_writing(self) -> None:
        """Start the deadline of sending, as the client does not take what there is."""
        super().pause_writing()
        if self._sending is None:
            self._sending = self.loop.call_later(self.limits.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """End the deadline of sending, as all is sent."""
        super().resume_writing()
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None


def guarded(limits: Limits, requests: Counter[int]) -> type[GuardedProtocol]:
    """Return the protocol of one server's connections.

    Args:
        requests: counts what is refused before the application sees it, by status.
    """
    shared = {"limits": limits, "requests": requests, "crowd": Crowd(limits.max_connections)}
    return type("Guarded", (GuardedProtocol,), shared)
