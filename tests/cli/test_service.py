"""The HTTP service, for real: a server on a port of this machine, and clients that crowd it."""

import asyncio
import io
import os
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from selfmask_dist.backbones import fingerprint
from selfmask_dist.cli.service import Limits, create_app
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import eval_transform
from selfmask_dist.data.views.decode import decode
from selfmask_dist.maskfile import Mask
from selfmask_dist.maskfile.bank import MaskBank
from tests.support.models import make

PREPROCESSING = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MAX_POOL = 40  # threads of Starlette's pool
LIMITS = Limits(max_bytes=20_000, max_pixels=10_000, max_waiting=24, max_batch=8)


def picture(seed: int, *, side: int = 20, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def png_of_many_pixels() -> bytes:
    """A few bytes that state 20,000 x 20,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def eps() -> bytes:
    """PIL would give it to Ghostscript, a program that does what the picture says."""
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def make_bank() -> MaskBank:
    model, _ = make("timm_vit", dtype=torch.float32)
    weights = {name: value for name, value in model.named_parameters() if value.ndim == 2}
    bank = MaskBank(model)
    for seed, name in enumerate(("a", "b", "c")):
        generator = torch.Generator().manual_seed(seed)
        bits = {key: torch.rand(value.shape, generator=generator) > 0.3 for key, value in weights.items()}
        bank.add(name, Mask(bits, fingerprint(weights.items())))
    return bank


def weights_of_bank(bank: MaskBank) -> dict[str, torch.Tensor]:
    with bank.under(None) as encoder:
        return {key: value.detach().clone() for key, value in encoder.named_parameters() if value.ndim == 2}


class Server:
    def __init__(self, bank: MaskBank) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = uvicorn.Config(
            create_app(bank, PREPROCESSING, LIMITS), port=port, log_level="error", ws="none"
        )
        self.bank = bank
        self.url, self._server = f"http://127.0.0.1:{port}", uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))

    def __enter__(self) -> "Server":
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(make_bank()) as running:
        yield running


def expected(data: bytes, mask: str | None) -> list[float]:
    image = eval_transform(PREPROCESSING)(decode(data), np.random.default_rng(0))[0]
    embedding: list[float] = make_bank().embed(image[None], mask)[0].tolist()
    return embedding


def metric(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def test_a_picture_gets_its_embedding(server: Server) -> None:
    for mask, kind in (("a", "PNG"), (None, "JPEG"), ("c", "WEBP")):
        data = picture(1, kind=kind)
        answer = httpx.post(f"{server.url}/embed", params={"mask": mask} if mask else {}, content=data)
        assert answer.status_code == 200, answer.text
        assert answer.json()["mask"] == mask
        assert answer.json()["embedding"] == pytest.approx(expected(data, mask), abs=1e-5)
    assert httpx.get(f"{server.url}/masks").json() == {"masks": ["a", "b", "c"]}
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("params", "content", "status", "reason"),
    [
        ({"mask": "nobody"}, picture(0), 404, "no mask 'nobody'; there is a, b, c"),
        ({}, b"", 400, "no picture that can be read"),
        ({}, b"hello", 400, "no picture that can be read"),
        ({}, picture(0)[:-400], 400, "cannot be decoded"),
        ({}, picture(0, kind="JPEG")[:200], 400, "picture"),
        ({}, b"\0" * 20_001, 413, "more than 20,000 bytes"),
        ({}, picture(0, side=101, kind="JPEG"), 413, "101 x 101 pixels, at most 10,000"),
        ({}, png_of_many_pixels(), 413, "at most 10,000 are taken"),
        ({}, eps(), 400, "no picture that can be read"),
    ],
)
def test_what_cannot_be_served_is_refused_with_a_reason(
    server: Server, params: dict, content: bytes, status: int, reason: str
) -> None:
    answer = httpx.post(f"{server.url}/embed", params=params, content=content)
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["error"]


def test_a_crowd_gets_right_answers_in_common_passes_and_nothing_is_left(server: Server) -> None:
    data = [picture(seed) for seed in range(6)]
    masks = ["a", "b", "c", None]
    right = {(seed, mask): expected(data[seed], mask) for seed in range(6) for mask in masks}
    bad = {
        "broken": (b"broken", 400),
        "cut off": (data[0][:-400], 400),
        "too many bytes": (b"\0" * 30_000, 413),
        "too many pixels": (png_of_many_pixels(), 413),
    }
    passes, pictures = metric(server, "selfmask_passes_total"), metric(server, "selfmask_pictures_total")
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    outcomes: list[str] = []

    def client(turn: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            for step in range(12):
                seed, mask = (turn * 5 + step) % 6, masks[(turn + step) % 4]
                kind = (turn + step) % 6
                if kind == 4:
                    body, status = list(bad.values())[(turn + step // 6) % 4]
                    answer = http.post("/embed", content=body)
                    outcomes.append("refused" if answer.status_code == status else answer.text)
                elif kind == 5:
                    answer = http.post("/embed", params={"mask": "nobody"}, content=data[seed])
                    outcomes.append("refused" if answer.status_code == 404 else answer.text)
                else:
                    answer = http.post("/embed", params={"mask": mask} if mask else {}, content=data[seed])
                    got = answer.json().get("embedding", [])
                    same = np.allclose(got, right[seed, mask], atol=1e-5) if got else False
                    outcomes.append("right" if same else answer.text)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(client, range(16)))
    assert set(outcomes) == {"right", "refused"}
    served = metric(server, "selfmask_pictures_total") - pictures
    assert served == outcomes.count("right")
    assert metric(server, "selfmask_passes_total") - passes < served, "no two pictures shared a pass"
    assert metric(server, "selfmask_waiting") == 0
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    deadline = time.monotonic() + 30
    while len(os.listdir("/proc/self/fd")) > files + 2:  # connections close when the loop comes to it
        assert time.monotonic() < deadline, "files or connections are left open"
        time.sleep(0.02)
    # the loop keeps the threads that decode, a fixed number of them at most
    assert threading.active_count() <= max(threads, 2 + MAX_POOL)


def test_more_than_can_wait_is_told_to_come_back(server: Server) -> None:
    """Slow bodies hold their places; the next request is turned away at once, and later served."""
    release = threading.Event()

    def slow_body() -> Iterator[bytes]:
        yield picture(0)[:10]
        assert release.wait(30)
        yield picture(0)[10:]

    def slow(_turn: int) -> int:
        return httpx.post(f"{server.url}/embed", content=slow_body(), timeout=60).status_code

    with ThreadPoolExecutor(LIMITS.max_waiting) as pool:
        waiting = [pool.submit(slow, turn) for turn in range(LIMITS.max_waiting)]
        deadline = time.monotonic() + 30
        while metric(server, "selfmask_waiting") < LIMITS.max_waiting:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        answer = httpx.post(f"{server.url}/embed", content=picture(0))
        release.set()
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "1"
        assert [future.result() for future in waiting] == [200] * LIMITS.max_waiting
    assert httpx.post(f"{server.url}/embed", content=picture(0)).status_code == 200


def test_a_mask_that_is_removed_meanwhile_costs_the_others_nothing(server: Server) -> None:
    bits = {name: value > 0 for name, value in weights_of_bank(server.bank).items()}
    server.bank.add("brief", Mask(bits, fingerprint(weights_of_bank(server.bank).items())))
    release = threading.Event()

    def slow_body() -> Iterator[bytes]:
        yield picture(0)[:10]
        assert release.wait(30)
        yield picture(0)[10:]

    def slow(mask: str) -> httpx.Response:
        return httpx.post(f"{server.url}/embed", params={"mask": mask}, content=slow_body(), timeout=60)

    with ThreadPoolExecutor(8) as pool:
        waiting = {pool.submit(slow, mask): mask for mask in ["brief", "a", "brief", "b"] * 2}
        deadline = time.monotonic() + 30
        while metric(server, "selfmask_waiting") < 8:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        server.bank.remove("brief")
        release.set()
        for future, mask in waiting.items():
            answer = future.result()
            if mask == "brief":
                assert (answer.status_code, "removed" in answer.text) == (404, True), answer.text
            else:
                assert answer.json()["embedding"] == pytest.approx(expected(picture(0), mask), abs=1e-5)
    assert server.bank.names == ["a", "b", "c"]


def test_clients_that_go_away_leave_no_place_taken(server: Server) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
            client.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nabc")
    deadline = time.monotonic() + 30
    while metric(server, "selfmask_waiting"):
        assert time.monotonic() < deadline, "a place is held for ever"
        time.sleep(0.02)
