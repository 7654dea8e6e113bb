"""A run's own evaluation is killed at random, again and again, and goes on under other numbers of processes.

Two runs: one that is trained by one process and killed (SIGKILL, or told to stop by SIGTERM) only after its
mask is there, and one that only measures a frozen backbone. Each start has one or two processes and ends at
a random moment of the evaluation, of which one rank is killed. In the end the numbers must be, to the bit,
those of the runs that nobody disturbed, and so must the mask file. After every kill the mask must be whole.

    python -m benchmarks.faults.evaluation_kill [--kills 20] [--quick] --json
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.harness import Benchmark
from selfmask_dist.maskfile import read_mask_file
from tests.support.tiny_run import child_environment, result_of, write_config, write_tiny_data

METHODS = {"adapted": "mask", "frozen": "frozen"}
MOST_CHUNKS = 9  # that a start embeds before it is killed; there are 54
SECONDS = 180.0  # that a start may take, on a busy machine


def start(config: Path, method: str, name: str, size: int) -> list[subprocess.Popen[bytes]]:
    """Start a run, or go on with it, with so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [f"method={method}", f"run.name={name}", "run.dir=" + str(config.parent)]
    words += ["run.resume=true"] if (config.parent / name).exists() else []
    command = [sys.executable, "-m", "selfmask_dist.cli", "train", "--config", str(config), *words]
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    found = []
    for rank in range(size):
        ranks = {**common, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment = child_environment(OMP_NUM_THREADS="1", **(ranks if size > 1 else {}))
        found.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
    return found


def run_calm(config: Path, method: str, name: str) -> None:
    """Run to the end."""
    (process,) = start(config, method, name, 1)
    if process.wait(SECONDS):
        raise RuntimeError(f"{name} failed")


def wait(condition, processes: list[subprocess.Popen[bytes]]) -> None:
    """Until the condition holds or a process has ended."""
    deadline = time.monotonic() + SECONDS
    while not condition() and all(process.poll() is None for process in processes):
        if time.monotonic() > deadline:
            raise RuntimeError("nothing happens")
        time.sleep(0.02)


def strike(config: Path, method: str, name: str, size: int, rng: random.Random) -> str:
    """One start, and its end; what ended it."""
    run, processes = config.parent / name, start(config, method, name, size)
    embedded, aim = set(run.glob("measuring/*/*/*")), rng.randint(1, MOST_CHUNKS)
    # the evaluation of this start has begun: it has read what is there, and has made some more
    wait(lambda: len(set(run.glob("measuring/*/*/*")) - embedded) >= aim, processes)
    time.sleep(rng.uniform(0, 0.05))
    chosen = rng.choice(processes)
    kind = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    is_over = all(process.poll() is not None for process in processes)
    if not is_over:
        with contextlib.suppress(ProcessLookupError):
            os.kill(chosen.pid, kind)
    for process in processes:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:  # it waits for the one that is gone
            process.kill()
            process.wait()
    return "end" if is_over else signal.Signals(kind).name


def is_whole(run: Path, calm: Path) -> bool:
    """Whether the mask is there, can be read, and has the bits of the calm run's."""
    own, theirs = (read_mask_file(folder / "final.mask").masks["default"].bits for folder in (run, calm))
    return all(own[name].equal(bits) for name, bits in theirs.items())


def main() -> int:
    bench = Benchmark("evaluation_kill", __doc__)
    bench.parser.add_argument("--kills", type=int, help="of each run: 20, or 3 with --quick")
    options = bench.parse()
    kills = options.kills or (3 if options.quick else 20)
    rng, moments = random.Random(0), Counter[str]()
    masks_whole = struck = 0
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(
            Path(folder) / "tiny.yaml",
            write_tiny_data(Path(folder) / "data", train=120, test=48),
            train={"epochs": 1, "global_batch_size": 24},
            optim={"score_lr": 300.0},
            eval={"knn_every": 0, "frozen_baseline": False, "probe": True, "batch_size": 4},
            run={"log_every": 10},
        )
        for what, method in METHODS.items():
            run, calm = Path(folder) / what, Path(folder) / f"calm-{what}"
            run_calm(config, method, calm.name)
            size, ends = 1, 0
            for _ in range(kills):
                end = strike(config, method, what, size, rng)
                moments[end] += 1
                struck += end != "end"
                ends += end == "end"
                if end != "end" and what == "adapted":
                    masks_whole += is_whole(run, calm)
                print(f"{what}: {size} processes, {end}", file=sys.stderr, flush=True)
                if (run / "result.json").exists():
                    break
                size = rng.choice([1, 2])
            for process in start(config, method, what, 2):
                process.wait(SECONDS)
            same = result_of(run) == result_of(calm)
            if what == "adapted":
                same &= (run / "final.mask").read_bytes() == (calm / "final.mask").read_bytes()
                bench.figure("masks_whole_after_a_kill", masks_whole, min=struck)
            bench.figure(f"{what}_numbers_are_the_same", int(same), min=1)
            bench.figure(
                f"{what}_folder_of_the_evaluation_is_gone", int(not (run / "measuring").exists()), min=1
            )
    bench.figure("kills", struck, min=2)
    bench.figure("moments", dict(moments))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
