"""Misuses of the service: bodies, names and methods, against a server on a port of this machine."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.faults.misuses.case import WORKS, Case, Said, Wanted, check, error
from tests.cli.serving import Server, expected, make_bank, picture
from tests.cli.test_service import LIMITS


@cache
def server() -> Server:
    """Return a server that lives as long as this process."""
    running = Server(make_bank(), LIMITS)
    running._thread.daemon = True
    return running.__enter__()


def asked(name: str, wanted: Wanted, method: str, path: str, **options: Any) -> Case:
    """One request. An answer of 500 counts as a traceback."""

    def use(_: Path) -> Said:
        import httpx

        answer = httpx.request(method, f"{server().url}{path}", timeout=20, **options)
        if answer.status_code >= 500:
            raise RuntimeError(f"{answer.status_code}: {answer.text[:200]}")
        check(httpx.get(f"{server().url}/health").json() == {"status": "ok"}, "the service is not well")
        return Said(int(answer.status_code >= 400), f"{answer.status_code}: {answer.text}")

    return Case(name, wanted, use)


def embedded(name: str, data: Callable[[], bytes], mask: str | None, **options: Any) -> Case:
    """A request that works, and whose embedding is right."""

    def use(_: Path) -> None:
        import httpx

        params = {} if mask is None else {"mask": mask}
        answer = httpx.post(f"{server().url}/embed", params=params, content=data(), timeout=20, **options)
        check(answer.status_code == 200, f"{answer.status_code}: {answer.text[:200]}")
        found, right = answer.json()["embedding"], expected(data(), mask)
        check(
            all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(found, right, strict=True)), "wrong numbers"
        )

    return Case(name, WORKS, use)


def a_crowd_of_wrong_ones(_: Path) -> None:
    """Bad and good requests at once: the good ones are right and the bad ones named."""
    import httpx

    right = {number: expected(picture(number), "a") for number in range(0, 16, 2)}

    def one(number: int) -> bool:
        body = picture(number) if number in right else b"none"
        answer = httpx.post(f"{server().url}/embed", params={"mask": "a"}, content=body, timeout=30)
        if number not in right:
            return answer.status_code == 400
        found = answer.json().get("embedding", [])
        return len(found) > 0 and all(
            math.isclose(a, b, abs_tol=1e-5) for a, b in zip(found, right[number], strict=True)
        )

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(16)))
    check(
        all(answers),
        f"wrong answers to {[number for number, is_right in enumerate(answers) if not is_right]}",
    )


def half_a_request(_: Path) -> None:
    """A client sends half a body and goes away; the place is free again."""
    import socket

    import httpx

    host, port = server().url.removeprefix("http://").split(":")
    for _turn in range(LIMITS.max_waiting + 2):
        with socket.create_connection((host, int(port)), timeout=5) as client:
            client.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nhalf")
    deadline = threading.Event()
    for _wait in range(50):
        answer = httpx.post(f"{server().url}/embed", content=picture(1), timeout=20)
        if answer.status_code == 200:
            return
        deadline.wait(0.1)
    check(False, f"places stay taken: {answer.status_code}")


def garbage(_: Path) -> None:
    """What is not HTTP gets an answer or an end, and the service goes on."""
    import socket

    import httpx

    host, port = server().url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as client:
        client.sendall(b"\x16\x03\x01\x02\x00 TLS?\r\n\r\n")
        client.recv(100)
    check(httpx.get(f"{server().url}/health").status_code == 200, "the service is gone")


JSON = {"content": json.dumps({"image": "iVBOR"}).encode(), "headers": {"content-type": "application/json"}}
FORM = {"files": {"file": ("x.png", picture(0), "image/png")}}

CASES = [
    asked("no body", error("picture"), "POST", "/embed"),
    asked("JSON for a picture", error("picture"), "POST", "/embed", **JSON),
    asked("a form with a file for a picture", error("picture"), "POST", "/embed", **FORM),
    asked("text in base64 for a picture", error("picture"), "POST", "/embed", content=b"iVBORw0KGgo="),
    asked("a picture cut off", error("picture"), "POST", "/embed", content=picture(0)[:90]),
    asked("a picture too large in bytes", error("20,000"), "POST", "/embed", content=b"\xff" * 20_001),
    asked(
        "a picture too large in pixels",
        error("10,000"),
        "POST",
        "/embed",
        content=picture(0, side=101, kind="GIF"),
    ),
    asked("a mask that is not there", error("'z'", "a, b, c"), "POST", "/embed?mask=z", content=picture(0)),
    asked("an empty name of a mask", error("''", "a, b, c"), "POST", "/embed?mask=", content=picture(0)),
    asked("a path for a mask", error("passwd"), "POST", "/embed?mask=../../etc/passwd", content=picture(0)),
    asked("a misspelt parameter", error("masks|mask"), "POST", "/embed?masks=a", content=picture(0)),
    asked("one parameter twice", error("mask"), "POST", "/embed?mask=a&mask=b", content=picture(0)),
    asked("GET in place of POST", error("405"), "GET", "/embed"),
    asked("a path that is not there", error("404"), "POST", "/embeddings", content=picture(0)),
    asked("a slash at the end", WORKS, "POST", "/embed/", content=picture(0), follow_redirects=True),
    embedded("a grey picture", lambda: picture(3), "a"),
    embedded("a wrong content type", lambda: picture(4), "b", headers={"content-type": "text/plain"}),
    embedded("a body in chunks", lambda: picture(5), None, headers={"transfer-encoding": "chunked"}),
    Case("right and wrong requests at once", WORKS, a_crowd_of_wrong_ones),
    Case("clients that go away in the middle", WORKS, half_a_request),
    Case("what is not HTTP", WORKS, garbage),
]
