"""Bad clients of the HTTP service: they stall, dribble, send too much, or send what is none.

`run_crowd` keeps them going in a process of its own and says what each kind was answered. Knows nothing of
right answers.
"""

import asyncio
import base64
import io
import random
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from PIL import Image

NUM_STALLED, NUM_SLOW, NUM_ASKING = 256, 64, 4  # the last of each of `payloads`
_SLOW_EVERY = 0.5  # seconds between two bytes
_PAUSE = 1.0  # seconds between two requests of one who asks, on average
_HEAD = b"POST /embed?mask=pets HTTP/1.1\r\nHost: soak\r\n"
_QUESTION = b"GET /metrics HTTP/1.1\r\nHost: soak\r\n\r\n"
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Payload:
    """All that a client sends, and the statuses that it may be answered with."""

    sent: bytes
    allowed: tuple[int, ...]
    half_close: bool = False


@dataclass
class Report:
    """What was answered. held: the longest that one of a kind was kept, seconds."""

    statuses: Counter[str] = field(default_factory=Counter)  # "kind status"
    unexpected: Counter[str] = field(default_factory=Counter)
    held: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, status: str, seconds: float) -> None:
        """Count one client's end."""
        self.statuses[f"{kind} {status}"] += 1
        self.held[kind] = max(self.held.get(kind, 0.0), seconds)


def _encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def _post(body: bytes, *, length: int | None = None, headers: bytes = b"") -> bytes:
    stated = len(body) if length is None else length
    return _HEAD + headers + b"Content-Length: %d\r\n\r\n" % stated + body


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _on(route: str, sent: bytes) -> bytes:
    """Return a request of `/embed` as one of another route."""
    return sent.replace(b"POST /embed?", b"POST /%s?" % route.encode(), 1)


def payloads(route: str = "embed") -> dict[str, dict[str, Payload]]:
    """Return, by kind, what is sent by those who ask for too much or in no right way."""
    return {
        kind: {name: replace(one, sent=_on(route, one.sent)) for name, one in choice.items()}
        for kind, choice in _payloads().items()
    }


def _payloads() -> dict[str, dict[str, Payload]]:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    png, jpeg = _encoded(noise), _encoded(noise, "JPEG", progressive=True)
    deep = Image.fromarray(rng.integers(0, 2**16, (64, 64), dtype=np.uint16)).resize((2000, 2000))
    floats = Image.fromarray(np.zeros((9000, 9000), np.float32))
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    huge = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
    form = b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\n' + png + b"\r\n--x--\r\n"
    part = b"100000\r\n" + b"\0" * 2**20 + b"\r\n"
    too_large, bad = (413,), (400,)
    return {
        "oversized": {
            "stated bytes": Payload(_post(b"\0" * 2**16, length=2**40), too_large),
            "chunked bytes": Payload(_CHUNKED + part * 21, too_large),
            "pixels": Payload(_post(huge + _chunk(b"IDAT", zlib.compress(b""))), too_large),
        },
        "thin": {
            "high": Payload(_post(_encoded(Image.new("RGB", (1, 60_000)))), too_large),
            "wide": Payload(_post(_encoded(Image.new("RGB", (60_000, 1)))), too_large),
        },
        "deep": {
            "16 bits": Payload(_post(_encoded(deep, compress_level=1)), (200,)),
            "floats": Payload(_post(_encoded(floats, "TIFF", compression="tiff_deflate")), too_large),
        },
        "malformed": {
            "no HTTP": Payload(b"\x16\x03\x01\x02\0\x01\r\n\r\n", bad),
            "long head": Payload(_HEAD + b"A: " + b"a" * 70_000, (431,)),
            "two lengths": Payload(_post(png, headers=b"Content-Length: 1\r\n"), bad),
            "bad chunk": Payload(_CHUNKED + b"zz\r\n", bad),
            "tiny chunks": Payload(_CHUNKED + b"1\r\na\r\n" * 20_000, bad),
            "ends early": Payload(_post(png[:500], length=5000), bad, half_close=True),
            "cut off": Payload(_post(png[:-300]), bad),
            "cut off JPEG": Payload(_post(jpeg[: len(jpeg) // 3]), bad),
            "empty": Payload(_post(b""), bad),
            "form": Payload(_post(form, headers=b"Content-Type: multipart/form-data; boundary=x\r\n"), bad),
            "JSON": Payload(_post(b'{"image": "' + base64.b64encode(png)), bad),
            "base64": Payload(_post(base64.b64encode(png)), bad),
            "gzip": Payload(_post(png, headers=b"Content-Encoding: gzip\r\n"), (415,)),
            "many blocks": Payload(_post(png[:33] + _chunk(b"teXt", b"") * 100_000 + png[33:]), bad),
            "many scans": Payload(_post(jpeg[:-2] + scan * 2000 + jpeg[-2:]), bad),
            "no mask": Payload(_post(png).replace(b"mask=pets", b"mask=nobody"), (404,)),
        },
    }  # fmt: skip


class _Crowd:
    def __init__(self, port: int, route: str) -> None:
        self._port, self._route, self.report = port, route, Report()
        self._rng = random.Random(0)

    async def stalled(self, turn: int) -> None:
        """Send nothing, a part of a head, a part of a body, or questions whose answers are not read."""
        reads = turn % 16 != 15
        starts = (b"", _HEAD, _post(b"a" * 1000, length=10**6))
        reader, writer = await self._connect(is_narrow=not reads)
        writer.write(_on(self._route, starts[turn % 3]) if reads else _QUESTION * 1000)
        await writer.drain()
        if reads:
            await self._until_closed("stalled", reader)
        else:
            await self._until_cut_off(writer)
        writer.transport.abort()

    async def slow(self, turn: int) -> None:
        """Send a byte now and then, of a head or of a body."""
        reader, writer = await self._connect()
        if turn % 2:
            writer.write(_on(self._route, _post(b"", length=10**6)))
        writer.write(b"" if turn % 2 else _on(self._route, _HEAD) + b"A: ")

        async def dribble() -> None:
            while True:
                await asyncio.sleep(_SLOW_EVERY)
                writer.write(b"a")
                await writer.drain()

        dribbling = asyncio.create_task(dribble())
        await self._until_closed("slow", reader)
        dribbling.cancel()
        await asyncio.gather(dribbling, return_exceptions=True)
        writer.transport.abort()

    def asking(self, kind: str, choice: dict[str, Payload]) -> Callable[[int], Coroutine[Any, Any, None]]:
        """Return a client that sends one of several payloads whole, and reads the answer."""

        async def ask(_turn: int) -> None:
            await asyncio.sleep(self._rng.uniform(0, 2 * _PAUSE))
            name = self._rng.choice(sorted(choice))
            payload, start = choice[name], time.monotonic()
            reader, writer = await self._connect()
            try:
                writer.write(payload.sent)
                if payload.half_close:
                    writer.write_eof()
                async with asyncio.timeout(100):  # wait_for may swallow that the crowd ends (Python 3.11)
                    answer = await reader.read(4096)
            except OSError as error:
                answer = type(error).__name__.encode()
            status = answer[9:12].decode() if answer.startswith(b"HTTP/1.1 ") else f"none: {answer!r}"
            self.report.add(kind, status, time.monotonic() - start)
            if status not in map(str, payload.allowed):
                self.report.unexpected[f"{kind}, {name}: {status}"] += 1
            writer.transport.abort()

        return ask

    async def keep_going(self, client: Callable[[int], Coroutine[Any, Any, None]], turn: int) -> None:
        """Start a client anew whenever it has ended."""
        await asyncio.sleep(self._rng.uniform(0, 5))
        while True:
            try:
                await client(turn)
            except OSError as error:
                self.report.statuses[f"{client.__name__} {type(error).__name__}"] += 1
            await asyncio.sleep(self._rng.uniform(0, 0.5))

    async def _connect(self, *, is_narrow: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        connection = socket.socket()
        if is_narrow:  # small buffers on both sides, which a few answers fill
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self._port))
        except BaseException:
            connection.close()
            raise
        return await asyncio.open_connection(sock=connection, limit=4096 if is_narrow else 2**16)

    async def _until_closed(self, kind: str, reader: asyncio.StreamReader) -> None:
        start, status = time.monotonic(), "closed"
        try:
            while data := await reader.read(4096):
                if data.startswith(b"HTTP/1.1 "):
                    status = data[9:12].decode()
        except OSError:
            status = "cut off"
        self.report.add(kind, status, time.monotonic() - start)

    async def _until_cut_off(self, writer: asyncio.StreamWriter) -> None:
        """Read nothing; only what is sent tells that the other side has ended."""
        start = time.monotonic()
        while not writer.transport.is_closing():
            await asyncio.sleep(_SLOW_EVERY)
            writer.write(_QUESTION)
        self.report.add("not reading", "cut off", time.monotonic() - start)


async def _all(port: int, pipe: Connection, route: str) -> Report:
    crowd, asking = _Crowd(port, route), payloads(route)
    pipe.send("ready")
    tasks = [crowd.keep_going(crowd.stalled, turn) for turn in range(NUM_STALLED)]
    tasks += [crowd.keep_going(crowd.slow, turn) for turn in range(NUM_SLOW)]
    for kind, choice in asking.items():
        tasks += [crowd.keep_going(crowd.asking(kind, choice), turn) for turn in range(NUM_ASKING)]
    running = [asyncio.create_task(task) for task in tasks]
    while not pipe.poll():
        await asyncio.sleep(0.2)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return crowd.report


def run_crowd(port: int, pipe: Connection, route: str = "embed") -> None:
    """Say "ready", keep all bad clients going until something comes through the pipe, and send a `Report`."""
    pipe.send(asyncio.run(_all(port, pipe, route)))
