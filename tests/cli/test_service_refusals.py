"""What the service does not take: refused before the work is done, by name, with the way out; never a 500."""

import base64
import io
import json
import logging
import struct
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from selfmask_dist.cli.service import Limits
from selfmask_dist.maskfile.bank import MaskBank
from tests.cli.serving import Client, Server, chunked, expected, make_bank, picture, plain, post

LIMITS = Limits(max_decode_mib=100, max_bytes=2**21, max_pixels=20_000_000)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(make_bank(), LIMITS) as running:
        yield running


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def many_chunks() -> bytes:
    data = picture(0)
    return data[:33] + chunk(b"teXt", b"") * 100_000 + data[33:]


def many_pixel_chunks() -> bytes:
    data = picture(0)
    return data[:33] + chunk(b"IDAT", b"") * 100_000 + data[33:]


def many_markers() -> bytes:
    data = picture(0, kind="JPEG")
    return data[:2] + b"\xff\xec\0\2" * 200_000 + data[2:]


def many_scans() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * 1000 + data[-2:]


def many_tiles() -> bytes:
    number, tags = (
        200_000,
        [(256, 2000), (257, 2000), (258, 8), (259, 1), (262, 1), (277, 1), (322, 1), (323, 1)],
    )
    end = 8 + 2 + 12 * (len(tags) + 2) + 4
    entries = [(tag, 4, 1, value) for tag, value in tags] + [(324, 4, number, end), (325, 4, number, end)]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + b"\0" * 4 + b"\x08\0\0\0" * number


def deep(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((height, width), 0.5, np.float32)).save(out, "TIFF", compression="tiff_deflate")
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        pytest.param(plain(1, 60_000), 413, "1 x 60000 pixels; its sides may differ 100 times", id="thin"),
        pytest.param(plain(60_000, 1), 413, "60000 x 1 pixels; its sides may differ 100 times", id="wide"),
        pytest.param(plain(5000, 5000, mode="1"), 413, "5000 x 5000 pixels, at most 20,000,000", id="bomb"),
        pytest.param(deep(3000, 3000), 413, "of mode F and takes 18", id="deep"),
        pytest.param(plain(1, 60_000, mode="I;16"), 413, "may differ 100 times", id="thin and deep"),
        pytest.param(many_chunks(), 400, "too many small blocks; save it anew", id="chunks"),
        pytest.param(many_pixel_chunks(), 400, "too many small blocks; save it anew", id="pixel chunks"),
        pytest.param(many_markers(), 400, "too many small blocks; save it anew", id="markers"),
        pytest.param(many_scans(), 400, "is a JPEG of 1,006 scans", id="scans"),
        pytest.param(many_tiles(), 400, "more than 100,000 strips or tiles", id="tiles"),
        pytest.param(b"P6\n#" + b"a" * 2_000_000, 400, "too many small blocks", id="comment"),
        pytest.param(b"P3\n9 9\n255\n" + b"0 " * 600_000, 400, "text of more than 1,048,576", id="numbers"),
        pytest.param(b"\0" * (2**21 + 1), 413, "more than 2,097,152 bytes; send a smaller one", id="bytes"),
    ],
)
def test_work_is_known_before_it_is_done(server: Server, data: bytes, status: int, reason: str) -> None:
    start = time.process_time()
    answer = httpx.post(f"{server.url}/embed", content=data, timeout=30)
    assert (answer.status_code, reason in answer.json()["error"]) == (status, True), answer.text
    assert time.process_time() - start < 1, (
        "of both sides; without bounds one of these takes 2 seconds and more"
    )


FORM = b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\n' + picture(0) + b"\r\n--x--\r\n"


@pytest.mark.parametrize(
    ("content", "headers", "status", "reason"),
    [
        (b"", {}, 400, "the body is empty, no picture"),
        (FORM, {"Content-Type": "multipart/form-data; boundary=x"}, 400, "multipart/form-data, a form"),
        (b"--nonsense", {"Content-Type": "multipart/form-data"}, 400, "multipart/form-data, a form"),
        (b'{"image": "', {"Content-Type": "application/json"}, 400, "looks like JSON"),
        (json.dumps([[0] * 30] * 30).encode(), {}, 400, "looks like JSON"),
        (base64.b64encode(picture(0)), {}, 400, "looks like base64 text"),
        (b"data:image/png;base64," + base64.b64encode(picture(0)), {}, 400, "is a data URL"),
        (b"\x1f\x8b\x08" + b"\0" * 100, {}, 400, "is compressed by gzip"),
        (b"%PDF-1.7\n", {}, 400, "is a PDF"),
        (b"<svg/>", {}, 400, "is HTML, SVG or XML"),
        (b"\0\0\0\x1cftypheic" + b"\0" * 100, {}, 400, "is AVIF, HEIC or a film"),
        (picture(0), {"Content-Encoding": "gzip"}, 415, "encoded as 'gzip'; send the picture's own bytes"),
        (picture(0), {"Content-Encoding": "x" * 999}, 415, "encoded as 'xxx"),
    ],
)  # fmt: skip
def test_other_encodings_are_named(
    server: Server, content: bytes, headers: dict, status: int, reason: str
) -> None:
    answer = httpx.post(f"{server.url}/embed", content=content, headers=headers)
    assert (answer.status_code, reason in answer.json()["error"]) == (status, True), answer.text
    assert "send the" in answer.json()["error"], "the way out"


def test_what_curl_calls_a_form_is_still_a_picture(server: Server) -> None:
    """`curl --data-binary` names this type where it is told none."""
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Content-Encoding": "identity"}
    answer = httpx.post(f"{server.url}/embed", content=picture(0), headers=headers)
    assert answer.json()["embedding"] == pytest.approx(expected(picture(0), None), abs=1e-5)


@pytest.mark.parametrize(
    ("request_line", "status", "reason"),
    [
        ("POST /embed?masks=a", 400, "no parameter 'masks'; the only one is `mask`"),
        ("POST /embed?mask=a&mask=b", 400, "2 masks are named"),
        ("POST /embed?mask=" + "x" * 5000, 404, "there is no mask 'xxx"),
        ("GET /embed", 405, "GET /embed is not served; there are POST /embed, GET /masks"),
        ("GET /elsewhere", 404, "GET /elsewhere is not served; there are POST /embed"),
    ],
)
def test_other_questions_are_told_what_there_is(
    server: Server, request_line: str, status: int, reason: str
) -> None:
    with Client(
        server, f"{request_line} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode()
    ) as client:
        answer = client.answer()
    assert (answer.status, reason in answer.reason) == (status, True), answer
    assert len(answer.reason) < 400


POST = b"POST /embed HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "reason"),
    [
        (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", 400, "no HTTP/1.1 request"),
        (b"GET /masks HTTP/1.1\r\nHost x\r\n\r\n", 400, "no HTTP/1.1 request"),
        (b"GET /masks HTTP/1.1\r\n\r\n", 400, "Missing mandatory Host"),
        (post(5, "Content-Length: 6"), 400, "conflicting Content-Length"),
        (POST + b"Content-Length: 1e3\r\n\r\n", 400, "bad Content-Length"),
        (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", 400, "Content-Length"),
        (POST + b"Transfer-Encoding: gzip\r\n\r\n", 400, "Only Transfer-Encoding: chunked"),
        (POST + b"A: " + b"a" * 70_000, 431, "more than 65,536 bytes; send shorter"),
        (chunked() + b"zz\r\n", 400, "illegal chunk header"),
        (chunked() + b"1\r\na\r\n" * 10_000, 400, "comes in chunks of 1 bytes; send chunks of 1,024"),
    ],
)  # fmt: skip
def test_what_is_no_http_is_told_why(server: Server, sent: bytes, status: int, reason: str) -> None:
    with Client(server, sent) as client:
        answer = client.answer()
        assert (answer.status, reason in answer.reason) == (status, True), answer
        assert client.rest() == b""


def test_a_body_that_ends_early_is_told_how_much_was_missing(server: Server) -> None:
    for head, reason in (
        (post(5000), "received 3 bytes, expected 5000"),
        (chunked(), "peer closed connection"),
    ):
        with Client(server, head, b"3\r\n" if b"chunked" in head else b"abc") as client:
            client.half_close()
            answer = client.answer()
            assert (answer.status, reason in answer.reason) == (400, True), answer


def test_what_follows_a_body_of_a_wrong_length_is_told_too(server: Server) -> None:
    data = picture(0)
    with Client(server, post(100) + data) as client:
        assert "picture" in client.answer().reason
        answer = client.answer()
        assert (answer.status, "no HTTP/1.1 request" in answer.reason) == (400, True), answer


def test_a_bad_chunk_after_a_refusal_ends_the_connection_quietly(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with Client(server, chunked("Content-Encoding: gzip"), b"4\r\nabcd\r\n") as client:
        assert client.answer().status == 415
        client.send(b"zz\r\n")
        assert client.rest() == b""
    with Client(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 50) as client:
        for _ in range(50):
            assert client.answer().status == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_deep_pictures_and_many_pieces_that_are_allowed_are_served(server: Server) -> None:
    out = io.BytesIO()
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(out, "PNG")
    large = plain(2400, 2400, kind="JPEG")  # in the threads of large ones
    for data in (deep(20, 20), out.getvalue(), large, plain(30, 3000), plain(20, 20, mode="P", kind="GIF")):
        answer = httpx.post(f"{server.url}/embed", content=data, timeout=30)
        assert answer.status_code == 200, answer.text
        assert answer.json()["embedding"] == pytest.approx(expected(data, None), abs=1e-5)


def test_large_pictures_wait_for_memory_and_small_ones_do_not_wait_for_them(server: Server) -> None:
    large = plain(2400, 2400, mode="RGBA")  # 44 MiB of 100 each
    with ThreadPoolExecutor(8) as pool:
        ask = lambda: httpx.post(f"{server.url}/embed", content=large, timeout=60)  # noqa: E731
        waiting = [pool.submit(ask) for _ in range(8)]
        assert server.serves()
        assert [future.result().status_code for future in waiting] == [200] * 8


class Greedy(nn.Module):
    """An encoder for which memory holds two pictures and no bright one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        means = images.mean(dim=(1, 2, 3))
        if len(images) > 2 or means.max() > 0.9:
            torch.empty(2**50)  # more than any machine gives
        if means.min() < -0.9:
            raise KeyError("black")
        pixels = images.mean(dim=(2, 3)) * self.weight
        return torch.where(pixels.abs() < 0.01, torch.nan, pixels)


def test_what_memory_does_not_hold_is_refused_by_name_and_costs_the_others_nothing() -> None:
    encoder = Greedy()

    def of(grey: int) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (16, 16), (grey,) * 3).save(out, "PNG")
        return out.getvalue()

    with Server(MaskBank(encoder), Limits(wait_ms=300)) as server, ThreadPoolExecutor(6) as pool:
        greys = (60, 255, 90, 0, 200, 127)
        asked = [pool.submit(httpx.post, f"{server.url}/embed", content=of(grey)) for grey in greys]
        answers = {grey: future.result() for grey, future in zip(greys, asked, strict=True)}
        assert {grey: answer.status_code for grey, answer in answers.items()} == {
            60: 200,
            255: 507,
            90: 200,
            0: 503,
            200: 200,
            127: 503,
        }
        assert "no memory for one picture" in answers[255].json()["error"]
        assert "the encoder fails (KeyError: 'black')" in answers[0].json()["error"]
        assert "is not finite" in answers[127].json()["error"]
        assert answers[90].json()["embedding"] == pytest.approx([90 / 127.5 - 1] * 3, abs=1e-5)
        assert max(encoder.sizes) > 2, "they came together"
        assert httpx.post(f"{server.url}/embed", content=of(255)).status_code == 507
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, "no memory" in health.json()["status"]) == (503, True)
        assert httpx.post(f"{server.url}/embed", content=of(60)).status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == 200
