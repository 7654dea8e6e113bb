"""`POST /predict` under bad clients and under too many: right classes, bounded memory, nothing but refusals.

The soak of `benchmarks.faults.service_soak` with what it does not have: two masks that came with heads of
different numbers of classes, asked for in turn, so that masks and heads are swapped all the time; logits and
the first class of every answer held against those computed here; bad clients that ask `/predict`; and at the
end an overload: more clients than the service lets wait, each asking again as soon as it is answered. These
may be answered right, or 503 with `Retry-After`, and nothing else.

    python -m benchmarks.models.predict_soak [--seconds 300] [--quick] --json
"""

import asyncio
import multiprocessing
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.faults.service_soak import Question, pictures, report_figures, soak
from benchmarks.harness import Benchmark
from benchmarks.models.overload import Answers, ask_all, run_overload
from selfmask_dist.maskfile import Head, Model, add_models
from tests.cli.served import MASKS, Served, write_service

CLASSES = (37, 200)  # of the masks' heads
NUM_CROWDING = 400  # clients of the overload; the service lets 256 requests wait
MIB = 2**20


def write_questions(folder: Path) -> list[Question]:
    """Write a service whose masks have heads; returns pictures with right logits under each mask."""
    bank, preprocessing = write_service(folder)
    heads = {}
    for number, (name, count) in enumerate(zip(MASKS, CLASSES, strict=True)):
        draw = torch.Generator().manual_seed(number)
        dim = bank.embed(torch.zeros(1, 3, preprocessing.image_size, preprocessing.image_size), None).shape[1]
        heads[name] = Head("linear", torch.randn(count, dim, generator=draw))
        model = Model(heads[name], tuple(f"{name} {index}" for index in range(count)))
        add_models(folder / f"{name}.mask", {"default": model})
    questions = []
    for data, image in pictures(preprocessing):
        for name, head in heads.items():
            logits = head.logits(bank.embed(image[None], name))[0].numpy()
            questions.append(Question(data, f"/predict?mask={name}&logits=true", "logits", logits))
    return questions


class Overload:
    """The last part of the soak. answers: of the clients. memory: the service's highest, MiB."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.answers = Answers()
        self.memory = 0.0
        self.right_after = False

    def __call__(self, served: Served, questions: list[Question]) -> None:
        """Send too many clients for so long; then ask once more."""
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        arguments = (served.port, questions, NUM_CROWDING, self.seconds, theirs)
        process = multiprocessing.get_context("spawn").Process(target=run_overload, args=arguments)
        process.start()
        while not ours.poll(1.0):
            self.memory = max(self.memory, served.memory() / MIB)
        self.answers = ours.recv()
        process.join()
        self.right_after = asyncio.run(ask_all(served.port, questions[:1], 1, 0.0)).right == 1


def main() -> int:
    bench = Benchmark("predict_soak", __doc__)
    bench.parser.add_argument("--seconds", type=float, help="of the storm: 300, or 20 with --quick")
    options = bench.parse()
    seconds = options.seconds or (20 if options.quick else 300)
    overload = Overload(seconds / 5)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), seconds, write=write_questions, route="predict", then=overload)
    report_figures(bench, found, seconds)
    answers = overload.answers
    for problem in answers.wrong[:20]:
        print(problem, file=sys.stderr)
    bench.figure("overload: clients", NUM_CROWDING)
    bench.figure("overload: seconds", overload.seconds)
    bench.figure("overload: answered right", answers.right, min=100, quick=False)
    bench.figure("overload: refused with 503 and Retry-After", answers.refused, min=1, quick=False)
    bench.figure("overload: answered otherwise", len(answers.wrong), max=0)
    bench.figure("overload: longest answer, seconds", answers.longest, max=70)
    bench.figure("overload: memory_mib_highest", overload.memory, max=2 * found.memory[1])
    bench.figure("overload: answered right afterwards", int(overload.right_after), min=1)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
