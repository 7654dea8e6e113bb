"""The HTTP service under stalled, slow, oversized, malformed and well-behaved clients: the last are served.

`selfmask serve` with its default limits, over timm's test_vit (random weights, 160 pixels) and two masks.
Well-behaved clients ask at a steady rate, now with a new connection, now with the one they have, and hold
each answer against the embedding computed here. They are alone for a fifth of the time before the bad ones
come and after those are gone; both together are what the times of the storm are compared to. Memory is the
resident size of the service's process, the median of five seconds.

    python benchmarks/faults/service_soak.py [--seconds 300] [--quick] --json
"""

import http.client
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from benchmarks.faults.service_crowd import NUM_SLOW, NUM_STALLED, Report, run_crowd
from benchmarks.harness import Benchmark
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import eval_transform
from selfmask_dist.data.views.decode import decode
from tests.cli.served import MASKS, Served, write_service

NUM_CLIENTS, INTERVAL = 4, 0.1  # well-behaved ones, and seconds between two requests of one
NUM_PICTURES = 12
TOLERANCE = 1e-4
MIB = 2**20


@dataclass(frozen=True)
class Question:
    """A picture, what is asked, and the right answer: `numbers` under `key`."""

    data: bytes
    path: str
    key: str
    numbers: np.ndarray

    def problem(self, text: bytes) -> str:
        """Return what is wrong with an answer of status 200; nothing where it is right."""
        answer = json.loads(text)
        difference = np.abs(np.array(answer[self.key]) - self.numbers).max()
        if not difference <= TOLERANCE:
            return f"{self.key} of {self.path} differ by {difference:.3g}"
        if "top" in answer and answer["top"][0]["index"] != int(self.numbers.argmax()):
            return f"the first class of {self.path} is {answer['top'][0]}"
        return ""


@dataclass
class Tally:
    """What well-behaved clients got. seconds: of each right answer."""

    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def num_asked(self) -> int:
        """Return how often they asked."""
        return len(self.seconds) + len(self.wrong)

    def percentile(self, share: float) -> float:
        """Return milliseconds that this share of the right answers took at most."""
        return float(np.quantile(self.seconds, share)) * 1000


def write_questions(folder: Path) -> list[Question]:
    """Write what the service is started with; returns pictures of several kinds with right answers."""
    bank, preprocessing = write_service(folder)
    questions = []
    for data, image in pictures(preprocessing):
        for mask in (*MASKS, None):
            path = "/embed" if mask is None else f"/embed?mask={mask}"
            embedding = bank.embed(image[None], mask)[0].numpy()
            questions.append(Question(data, path, "embedding", embedding))
    return questions


def pictures(preprocessing: Preprocessing) -> Iterator[tuple[bytes, Tensor]]:
    """Yield pictures of several kinds and sizes, and the images that the encoder sees."""
    transform, rng = eval_transform(preprocessing), np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        height, width = rng.integers(100, 700, size=2)
        small = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        out = BytesIO()
        picture = Image.fromarray(small).resize((int(width), int(height)))
        picture.save(out, ("JPEG", "PNG", "WEBP")[number % 3])
        yield out.getvalue(), transform(decode(out.getvalue()), np.random.default_rng(0))[0]


class WellBehaved:
    """Clients that ask at a steady rate, each in a thread, until `stop`."""

    def __init__(self, port: int, questions: list[Question]) -> None:
        self._port, self._questions, self._stop = port, questions, threading.Event()
        self.tally = Tally()

    def run(self, seconds: float) -> Tally:
        """Ask for so long; returns what came."""
        self.tally = Tally()
        self._stop.clear()
        threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        self._stop.set()
        for thread in threads:
            thread.join()
        return self.tally

    def _run(self, seed: int) -> None:
        rng, connection = random.Random(seed), self._connection()
        due = time.monotonic() + rng.uniform(0, INTERVAL)
        while not self._stop.wait(max(due - time.monotonic(), 0)):
            due = max(due + INTERVAL, time.monotonic())
            if rng.random() < 0.5:
                connection.close()  # the next request opens a new one
            start = time.monotonic()
            problem = self._ask(connection, rng.choice(self._questions))
            if problem:
                self.tally.wrong.append(problem)
                connection.close()
            else:
                self.tally.seconds.append(time.monotonic() - start)
        connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)

    def _ask(self, connection: http.client.HTTPConnection, question: Question) -> str:
        """Return what is wrong with the answer to a question; nothing for a right one."""
        try:
            connection.request("POST", question.path, question.data)
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            return f"{type(error).__name__}: {error}"
        if answer.status != 200:
            return f"{answer.status} {text[:200]!r}"
        return question.problem(text)


class Memory:
    """The service's resident bytes, each second, in a thread; ends with the block."""

    def __init__(self, served: Served) -> None:
        self._served, self._stop = served, threading.Event()
        self.samples: list[int] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(1.0):
            self.samples.append(self._served.memory())

    def now(self) -> float:
        """Return MiB: the median of the last five seconds."""
        return statistics.median(self.samples[-5:]) / MIB


@dataclass
class Outcome:
    """One run. memory: MiB before the storm, a minute into it (or half of it), and at its end."""

    calm: Tally
    storm: Tally
    report: Report
    memory: tuple[float, float, float]
    highest: float
    files_left: int
    stop_seconds: float
    errors: str


def soak(
    folder: Path,
    seconds: float,
    *,
    write: Callable[[Path], list[Question]] = write_questions,
    route: str = "embed",
    then: Callable[[Served, list[Question]], None] | None = None,
) -> Outcome:
    """Start the service; calm, storm, calm; stop it.

    Args:
        write: writes what the service is started with; what well-behaved clients ask.
        route: that bad clients ask.
        then: done before the service is stopped.
    """
    questions = write(folder)
    minute = min(60.0, seconds / 2)
    with Served(folder) as served:
        clients = WellBehaved(served.port, questions)
        clients.run(5)  # what is loaded at first use
        files = served.num_files()
        with Memory(served) as memory:
            calm = clients.run(seconds / 5)
            before = memory.now()
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            crowd = multiprocessing.get_context("spawn").Process(
                target=run_crowd, args=(served.port, theirs, route)
            )
            crowd.start()
            assert ours.recv() == "ready"
            time.sleep(10)  # until all of them are there
            first = clients.run(minute)
            early = memory.now()
            second = clients.run(seconds - minute)
            late = memory.now()
            ours.send("stop")
            report: Report = ours.recv()
            crowd.join()
            after = clients.run(seconds / 5)
            if then is not None:
                then(served, questions)
        left = served.num_files() - files
        return Outcome(
            calm=Tally(calm.seconds + after.seconds, calm.wrong + after.wrong),
            storm=Tally(first.seconds + second.seconds, first.wrong + second.wrong),
            report=report,
            memory=(before, early, late),
            highest=max(memory.samples) / MIB,
            files_left=left,
            stop_seconds=served.stop(),
            errors=served.errors,
        )


def report_figures(bench: Benchmark, found: Outcome, seconds: float) -> None:
    """Record what a soak found, and what is promised of it."""
    calm, storm, report = found.calm, found.storm, found.report
    for problem in [*calm.wrong, *storm.wrong][:20]:
        print(problem, file=sys.stderr)
    print(found.errors[-2000:], file=sys.stderr, end="")
    right = len(storm.seconds) / storm.num_asked
    bench.figure("seconds", seconds)
    bench.figure("stalled_clients", NUM_STALLED)
    bench.figure("slow_clients", NUM_SLOW)
    bench.figure("answered_right", right, min=1.0)
    bench.figure("answered_right_with_no_bad_clients", len(calm.seconds) / calm.num_asked, min=1.0)
    bench.figure("answers", len(storm.seconds), min=100)
    for name, tally in (("", storm), ("_with_no_bad_clients", calm)):
        bench.figure(f"p50_ms{name}", tally.percentile(0.5))
        bench.figure(f"p99_ms{name}", tally.percentile(0.99))
    bench.figure("p99_over_that_with_no_bad_clients", storm.percentile(0.99) / calm.percentile(0.99))
    bench.figure("longest_ms", max(storm.seconds) * 1000)
    for name, value in zip(("at_start", "after_a_minute", "at_the_end"), found.memory, strict=True):
        bench.figure(f"memory_mib_{name}", value)
    bench.figure("memory_mib_highest", found.highest)
    bench.figure("memory_at_the_end_over_after_a_minute", found.memory[2] / found.memory[1], max=1.1)
    bench.figure("bad_requests", report.statuses.total(), min=100)
    bench.figure("bad_requests_by_answer", dict(sorted(report.statuses.items())))
    bench.figure("bad_requests_answered_otherwise", report.unexpected.total(), max=0)
    bench.figure("answered_otherwise", dict(report.unexpected))
    bench.figure("answered_500", sum(report.statuses[key] for key in report.statuses if "500" in key), max=0)
    bench.figure("longest_held_seconds", report.held)
    for kind in ("stalled", "slow", "not reading"):
        # 30 seconds are the longest deadline; a busy machine comes to it later
        name = f"longest_held_{kind.replace(' ', '_')}_seconds"
        bench.figure(name, report.held.get(kind), max=40, quick=False)
    bench.figure("files_left_open", found.files_left, max=NUM_SLOW)
    bench.figure("lines_of_errors", len(found.errors.splitlines()), max=0)
    bench.figure("seconds_to_stop", found.stop_seconds, max=5)


def main() -> int:
    bench = Benchmark("service_soak", __doc__)
    bench.parser.add_argument("--seconds", type=float, help="of the storm: 300, or 20 with --quick")
    options = bench.parse()
    seconds = options.seconds or (20 if options.quick else 300)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), seconds)
    report_figures(bench, found, seconds)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
