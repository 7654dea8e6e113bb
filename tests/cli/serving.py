"""The HTTP service for real: a server on a port of this machine, and raw sockets to it."""

import asyncio
import functools
import io
import json
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import httpx
import numpy as np
import torch
from PIL import Image

from selfmask_dist.backbones import fingerprint
from selfmask_dist.cli.service import Limits, create_app
from selfmask_dist.cli.service.routes import ServedCascade
from selfmask_dist.cli.service.server import make_server
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import eval_transform
from selfmask_dist.data.views.decode import decode
from selfmask_dist.maskfile import Mask, Model
from selfmask_dist.maskfile.bank import MaskBank
from tests.support.models import make

PREPROCESSING = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def picture(seed: int, *, side: int = 20, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def plain(width: int, height: int, *, mode: str = "RGB", kind: str = "PNG") -> bytes:
    """A picture of one colour, which takes few bytes."""
    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, kind)
    return out.getvalue()


def make_bank() -> MaskBank:
    model, _ = make("timm_vit", dtype=torch.float32)
    weights = {name: value for name, value in model.named_parameters() if value.ndim == 2}
    bank = MaskBank(model)
    for seed, name in enumerate(("a", "b", "c")):
        generator = torch.Generator().manual_seed(seed)
        bits = {key: torch.rand(value.shape, generator=generator) > 0.3 for key, value in weights.items()}
        bank.add(name, Mask(bits, fingerprint(weights.items())))
    return bank


@functools.cache
def _bank_of_expected() -> MaskBank:
    return make_bank()


def expected(data: bytes, mask: str | None) -> list[float]:
    image = eval_transform(PREPROCESSING)(decode(data), np.random.default_rng(0))[0]
    embedding: list[float] = _bank_of_expected().embed(image[None], mask)[0].tolist()
    return embedding


class Server:
    """The service in a thread of this process."""

    def __init__(
        self,
        bank: MaskBank,
        limits: Limits,
        *,
        preprocessing: Preprocessing = PREPROCESSING,
        models: dict[str, Model] | None = None,
        cascades: dict[str, ServedCascade] | None = None,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.bank, self.url = bank, f"http://127.0.0.1:{self.port}"
        app = create_app(bank, preprocessing, limits, models, cascades)
        self._server = make_server(app, limits, port=self.port)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))

    def __enter__(self) -> "Server":
        self._thread.start()
        until(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()

    @property
    def num_connections(self) -> int:
        return len(self._server.server_state.connections)

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:  # httpx loads certificates for each
            text = answer.read().decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, flags=re.MULTILINE)
        return float(found[1]) if found else 0.0

    def serves(self) -> bool:
        """Whether a well-behaved client gets the right answer now."""
        answer = httpx.post(
            f"{self.url}/embed", params={"mask": "a"}, content=picture(1), timeout=30, verify=False
        )
        return answer.status_code == 200 and np.allclose(
            answer.json()["embedding"], expected(picture(1), "a"), atol=1e-5
        )


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    reason: str  # of a refusal


class Listening(Protocol):
    """What can be connected to."""

    port: int


class Client:
    """A socket to the service, which sends what it is told to and no more."""

    def __init__(self, server: Listening, *sent: bytes, receive_buffer: int | None = None) -> None:
        self._socket, self._received = socket.socket(), b""
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.settimeout(30)
        self._socket.connect(("127.0.0.1", server.port))
        for data in sent:
            self.send(data)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def half_close(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def dribble(self, data: bytes = b"a", *, every: float = 0.02) -> float:
        """Send a byte now and then until the service closes; returns the seconds that took."""
        start = time.monotonic()
        try:
            while time.monotonic() < start + 30:
                self._socket.sendall(data)
                time.sleep(every)
        except OSError:
            pass
        return time.monotonic() - start

    def rest(self) -> bytes:
        """All that comes until the service closes."""
        try:
            while more := self._socket.recv(65536):
                self._received += more
        except ConnectionResetError:
            pass
        return self._received

    def answer(self) -> Answer:
        """The next answer, read to its stated length."""
        while b"\r\n\r\n" not in self._received:
            self._receive()
        head, _, body = self._received.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers["content-length"])
        while len(body) < length:
            body += self._receive()
        self._received = body[length:]
        return Answer(int(first.split()[1]), headers, json.loads(body[:length]).get("error", ""))

    def _receive(self) -> bytes:
        more = self._socket.recv(65536)
        assert more, f"the connection was closed after {self._received!r}"
        self._received += more
        return more


def post(length: int, *headers: str) -> bytes:
    """The head of a request with a body."""
    lines = ["POST /embed HTTP/1.1", "Host: x", f"Content-Length: {length}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def chunked(*headers: str) -> bytes:
    """The head of a request with a body in chunks."""
    lines = ["POST /embed HTTP/1.1", "Host: x", "Transfer-Encoding: chunked", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
