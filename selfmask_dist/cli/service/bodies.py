"""Bodies as they arrive: each within a time and a size, all of them within one amount of memory.

A body counts from its first byte until its request is answered. Where all of them would take more than
`max_held_mib`, the largest that is still arriving gives way: what has arrived is served, and a client that
sends much and slowly does not keep others out. Knows nothing of pictures.
"""

import asyncio
from dataclasses import dataclass, field

from starlette.requests import Request

from selfmask_dist.cli.service.limits import Limits
from selfmask_dist.cli.service.refusal import RefusedError


@dataclass(eq=False)
class _Arriving:
    deadline: asyncio.Timeout
    data: bytearray = field(default_factory=bytearray)
    gave_way: bool = False


class Bodies:
    """The bodies in memory. `held`: their bytes, those that have arrived included."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._most = limits.max_held_mib * 2**20
        self._arriving: set[_Arriving] = set()
        self.held = 0

    async def read(self, request: Request) -> bytes:
        """Return a whole body, which counts as held until it is given to `release`.

        Raises:
            RefusedError: it is encoded, too large or late, or memory is short.
            ClientDisconnect: its client went away.
        """
        self._check_headers(request)
        try:
            async with asyncio.timeout(self._limits.body_seconds) as deadline:
                arriving = _Arriving(deadline)
                self._arriving.add(arriving)
                async for chunk in request.stream():
                    self._take(arriving, chunk)
        except TimeoutError:
            raise self._late(arriving) from None
        except BaseException:
            self._drop(arriving)
            raise
        if arriving.gave_way:
            raise self._late(arriving)
        self._arriving.remove(arriving)
        return bytes(arriving.data)

    def release(self, data: bytes) -> None:
        """Count a body that `read` returned no longer."""
        self.held -= len(data)

    def _check_headers(self, request: Request) -> None:
        """Refuse what the headers tell before anything of the body is read."""
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise RefusedError(
                415, f"the body is encoded as {encoding[:50]!r}; send the picture's own bytes, without it"
            )
        if int(request.headers.get("content-length", 0)) > self._limits.max_bytes:
            raise self._too_large()

    def _too_large(self) -> RefusedError:
        most = self._limits.max_bytes
        return RefusedError(413, f"the picture takes more than {most:,} bytes; send a smaller one")

    def _take(self, arriving: _Arriving, chunk: bytes) -> None:
        if arriving.gave_way:
            raise TimeoutError
        if len(arriving.data) + len(chunk) > self._limits.max_bytes:
            raise self._too_large()
        arriving.data += chunk
        self.held += len(chunk)
        while self.held > self._most:
            largest = max(self._arriving, key=lambda one: len(one.data))
            self._drop(largest)
            largest.gave_way = True
            if largest is arriving:
                raise TimeoutError
            largest.deadline.reschedule(0)  # wakes it

    def _drop(self, arriving: _Arriving) -> None:
        if arriving in self._arriving:
            self._arriving.remove(arriving)
            self.held -= len(arriving.data)
            arriving.data = bytearray()

    def _late(self, arriving: _Arriving) -> RefusedError:
        self._drop(arriving)
        if arriving.gave_way:
            return RefusedError(
                503,
                f"bodies take all of {self._limits.max_held_mib} MiB, and this was the largest of those still"
                " arriving; try again, or send a smaller picture",
            )
        return RefusedError(
            408,
            f"the body did not arrive whole within {self._limits.body_seconds:g} seconds; send it faster,"
            " or a smaller picture",
        )
