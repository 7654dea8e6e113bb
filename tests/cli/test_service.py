"""The HTTP service, for real: a server on a port of this machine, and clients that crowd it."""

import os
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

from selfmask_dist.backbones import fingerprint
from selfmask_dist.cli.service import Limits
from selfmask_dist.maskfile import Mask
from selfmask_dist.maskfile.bank import MaskBank
from tests.cli.serving import Client, Server, expected, make_bank, picture, post, until

MAX_POOL = 40  # threads of Starlette's pool
LIMITS = Limits(max_bytes=20_000, max_pixels=10_000, max_waiting=24, max_batch=8)


def png_of_many_pixels() -> bytes:
    """A few bytes that state 20,000 x 20,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def eps() -> bytes:
    """PIL would give it to Ghostscript, a program that does what the picture says."""
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def weights_of_bank(bank: MaskBank) -> dict[str, torch.Tensor]:
    with bank.under(None) as encoder:
        return {key: value.detach().clone() for key, value in encoder.named_parameters() if value.ndim == 2}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(make_bank(), LIMITS) as running:
        yield running


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
    passes, pictures = server.metric("selfmask_passes_total"), server.metric("selfmask_pictures_total")
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    outcomes: list[str] = []

    def client(turn: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60, verify=False) as http:
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
    served = server.metric("selfmask_pictures_total") - pictures
    assert served == outcomes.count("right")
    assert server.metric("selfmask_passes_total") - passes < served, "no two pictures shared a pass"
    assert server.metric("selfmask_waiting") == 0
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    deadline = time.monotonic() + 30
    while len(os.listdir("/proc/self/fd")) > files + 2:  # connections close when the loop comes to it
        assert time.monotonic() < deadline, "files or connections are left open"
        time.sleep(0.02)
    # the loop keeps the threads that decode, a fixed number of them at most
    assert threading.active_count() <= max(threads, 2 + MAX_POOL)


def test_more_than_can_wait_is_told_to_come_back(server: Server) -> None:
    """While the encoder is taken, requests that have arrived fill the slots; the next one is turned away."""

    def ask(seed: int) -> httpx.Response:
        return httpx.post(f"{server.url}/embed", content=picture(seed), timeout=60)

    with ThreadPoolExecutor(LIMITS.max_waiting) as pool:
        with server.bank.under(None):
            waiting = [pool.submit(ask, seed) for seed in range(LIMITS.max_waiting)]
            until(lambda: server.metric("selfmask_waiting") == LIMITS.max_waiting)
            answer = ask(0)
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert "24 requests are waiting already; try again" in answer.json()["error"]
        assert [future.result().status_code for future in waiting] == [200] * LIMITS.max_waiting
    assert ask(0).status_code == 200


def test_a_mask_that_is_removed_meanwhile_costs_the_others_nothing(server: Server) -> None:
    bits = {name: value > 0 for name, value in weights_of_bank(server.bank).items()}
    server.bank.add("brief", Mask(bits, fingerprint(weights_of_bank(server.bank).items())))

    def ask(mask: str) -> httpx.Response:
        return httpx.post(f"{server.url}/embed", params={"mask": mask}, content=picture(0), timeout=60)

    with ThreadPoolExecutor(9) as pool:
        with server.bank.under(None):
            first = pool.submit(ask, "a")  # its pass waits for the encoder, and the others for the pass
            until(lambda: server.metric("selfmask_waiting") == 1)
            waiting = {pool.submit(ask, mask): mask for mask in ["brief", "a", "brief", "b"] * 2}
            until(lambda: server.metric("selfmask_waiting") == 9)
            server.bank.remove("brief")
        assert first.result().status_code == 200
        for future, mask in waiting.items():
            answer = future.result()
            if mask == "brief":
                assert (answer.status_code, "removed" in answer.text) == (404, True), answer.text
            else:
                assert answer.json()["embedding"] == pytest.approx(expected(picture(0), mask), abs=1e-5)
    assert server.bank.names == ["a", "b", "c"]


def test_clients_that_go_away_leave_no_place_taken(server: Server) -> None:
    """Neither in the middle of a body nor while their answers are computed."""
    for _ in range(5):
        with Client(server, post(5000), b"abc"):
            pass
    with server.bank.under(None):
        clients = [Client(server, post(len(picture(0))), picture(0)) for _ in range(5)]
        until(lambda: server.metric("selfmask_waiting") == 5)
        for client in clients:
            client.half_close()
        until(lambda: server.metric("selfmask_waiting") == 0)
    until(lambda: server.metric("selfmask_body_bytes") == 0)
    for client in clients:
        with client:
            assert client.rest() == b""
    assert server.metric('selfmask_requests_total{status="499"}') == 10
