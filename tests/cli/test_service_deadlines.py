"""Clients that stall, dribble or never end: each wait has a deadline, and others are served meanwhile."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest

from selfmask_dist.cli.service import Limits
from tests.cli.serving import Client, Server, chunked, make_bank, picture, post, until

HEAD, BODY, ANSWER, SEND = 0.4, 0.6, 0.8, 0.5
LIMITS = Limits(
    max_bytes=2_000_000,
    max_held_mib=3,
    max_waiting=8,
    head_seconds=HEAD,
    body_seconds=BODY,
    answer_seconds=ANSWER,
    send_seconds=SEND,
    idle_seconds=1,
)
SLACK = 5.0  # for a machine that does other work


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(make_bank(), LIMITS) as running:
        yield running
        until(lambda: running.num_connections == 0)


def took(start: float, least: float) -> bool:
    return least * 0.9 < time.monotonic() - start < least + SLACK


@pytest.mark.parametrize("sent", [b"", b"POST /embed HT", b"POST /embed HTTP/1.1\r\nHost: x\r\nA: "])
def test_a_head_that_stalls_is_ended(server: Server, sent: bytes) -> None:
    start = time.monotonic()
    with Client(server, sent) as client:
        assert server.serves()
        if sent:
            answer = client.answer()
            assert answer.status == 408
            assert f"head did not arrive whole within {HEAD:g} seconds" in answer.reason
        assert client.rest() == b"", "nothing was asked"
        assert took(start, HEAD)


def test_a_head_that_comes_byte_by_byte_has_the_same_deadline(server: Server) -> None:
    with Client(server, b"GET /masks HTTP/1.1\r\nHost: x\r\nA: ") as client:
        assert client.dribble() < HEAD + SLACK


def test_the_second_head_of_a_connection_has_a_deadline_of_its_own(server: Server) -> None:
    with Client(server) as client:
        for _ in range(4):
            time.sleep(HEAD / 2)  # longer than one deadline in all
            client.send(b"GET /masks HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.answer().status == 200
        client.send(b"GET /ma")
        assert client.answer().status == 408


@pytest.mark.parametrize("head", [post(5000), chunked()])
def test_a_body_that_stalls_is_ended_and_takes_no_slot(server: Server, head: bytes) -> None:
    start = time.monotonic()
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(server, head)) for _ in range(LIMITS.max_waiting + 4)]
        assert server.metric("selfmask_waiting") == 0
        assert server.serves(), "more stalled bodies than there are slots"
        for client in clients:
            answer = client.answer()
            assert answer.status == 408
            assert f"body did not arrive whole within {BODY:g} seconds" in answer.reason
            assert took(start, BODY)


def test_a_body_that_comes_byte_by_byte_has_the_same_deadline(server: Server) -> None:
    with Client(server, post(5000)) as client:
        assert client.dribble() < BODY + 2 + SLACK


def test_chunks_without_end_are_ended(server: Server) -> None:
    start, piece = time.monotonic(), b"4000\r\n" + b"\0" * 0x4000 + b"\r\n"
    with Client(server, chunked()) as client:
        client.dribble(piece, every=0.0)
        assert time.monotonic() - start < SLACK + 2
    with Client(server, chunked(), piece * 200) as client:
        answer = client.answer()
        assert (answer.status, "more than 2,000,000 bytes" in answer.reason) == (413, True)


def test_what_is_sent_after_a_refusal_is_not_read_for_ever(server: Server) -> None:
    for head in (
        post(1_900_000, "Content-Encoding: gzip"),
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",
    ):
        with Client(server, head) as client:
            assert client.answer().status in (200, 415)
            assert client.dribble() < 2 + SLACK


def test_an_answer_that_is_not_in_time_is_told(server: Server) -> None:
    with server.bank.under(None):  # the encoder is busy with something else
        start = time.monotonic()
        with Client(server, post(len(picture(0))), picture(0)) as client:
            answer = client.answer()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert f"no answer within {ANSWER:g} seconds" in answer.reason
        assert took(start, ANSWER)
        assert server.metric("selfmask_waiting") == 0
    assert server.serves()


def test_a_client_that_takes_no_answer_is_cut_off(server: Server) -> None:
    """It asks for more than the system's buffers hold, and reads nothing."""
    ask = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    start = time.monotonic()
    with Client(server, receive_buffer=4096) as client:
        try:
            while time.monotonic() < start + 30:
                client.send(ask * 1000)
        except OSError:
            pass
        assert time.monotonic() - start < 25, "it was never cut off"
    until(lambda: server.num_connections == 0)
    assert server.serves()


def test_more_connections_than_are_held_make_the_longest_waiting_give_way() -> None:
    limits = replace(LIMITS, max_connections=24, head_seconds=60, body_seconds=60)
    with Server(make_bank(), limits) as server, ExitStack() as stack:

        def connect(number: int, *sent: bytes) -> list[Client]:
            return [stack.enter_context(Client(server, *sent)) for _ in range(number)]

        silent, begun = connect(12), connect(6, b"GET /ma")
        bodies = connect(6, post(5000), b"abc")
        until(lambda: server.num_connections == limits.max_connections)
        assert server.serves(), "there is no place for a new one"
        assert silent[0].rest() == b"", "nothing was asked"
        connect(24)
        assert server.serves()
        for client in begun + bodies:
            answer = client.answer()
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert "more than 24 connections are open, and this one has waited longest" in answer.reason
        until(lambda: server.num_connections <= limits.max_connections)


def test_bodies_beyond_memory_make_the_largest_give_way(server: Server) -> None:
    large = Client(server, post(1_900_000), b"\0" * 1_500_000)
    until(lambda: server.metric("selfmask_body_bytes") == 1_500_000)
    other = Client(server, post(1_900_000), b"\0" * 1_400_000)
    until(lambda: server.metric("selfmask_body_bytes") == 2_900_000)
    third = Client(server, post(1_900_000), b"\0" * 400_000)
    with large, other, third:
        answer = large.answer()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert "bodies take all of 3 MiB, and this was the largest of those still arriving" in answer.reason
        assert server.serves()
        assert other.answer().status == third.answer().status == 408
    until(lambda: server.metric("selfmask_body_bytes") == 0)
