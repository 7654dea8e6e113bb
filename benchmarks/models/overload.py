"""More clients of the HTTP service than it lets wait, each asking again as soon as it is answered."""

import asyncio
import random
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from benchmarks.faults.service_soak import Question

_LONGEST = 120.0  # seconds until a client gives up


@dataclass
class Answers:
    """What came. right: answers that are. refused: 503 with Retry-After. wrong: what neither is."""

    right: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    longest: float = 0.0


async def _ask(port: int, question: Question, answers: Answers) -> None:
    start = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST {question.path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(question.data)}\r\n\r\n".encode() + question.data)
        async with asyncio.timeout(_LONGEST):
            answer = await reader.read(-1)
    finally:
        writer.transport.abort()
    answers.longest = max(answers.longest, time.monotonic() - start)
    head_lines, _, body = answer.partition(b"\r\n\r\n")
    status = head_lines[9:12]
    if status == b"200":
        problem = question.problem(body)
        if problem:
            answers.wrong.append(problem)
        else:
            answers.right += 1
    elif status == b"503" and b"\r\nretry-after:" in head_lines.lower():
        answers.refused += 1
    else:
        answers.wrong.append(f"{head_lines[:200]!r} {body[:200]!r}")


async def ask_all(port: int, questions: list[Question], clients: int, seconds: float) -> Answers:
    """Return what so many clients are answered for so long, each of them once at least."""
    answers, end, rng = Answers(), time.monotonic() + seconds, random.Random(0)

    async def client() -> None:
        while True:
            try:
                await _ask(port, rng.choice(questions), answers)
            except (OSError, TimeoutError) as error:
                answers.wrong.append(f"{type(error).__name__}: {error}")
            if time.monotonic() >= end:
                return
            await asyncio.sleep(0.05)

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def run_overload(
    port: int, questions: list[Question], clients: int, seconds: float, pipe: Connection
) -> None:
    """Send `Answers` of `ask_all` through the pipe."""
    pipe.send(asyncio.run(ask_all(port, questions, clients, seconds)))
