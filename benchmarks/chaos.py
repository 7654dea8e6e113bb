"""Random ranks are killed (SIGKILL) or told to stop (SIGUSR2, SIGTERM) at random; masks stay bit-identical.

Runs of two local nodes; the moments fall into start-up, training, saving and evaluation alike. Every run must
end by itself with the masks of the run that nobody disturbed.

    python benchmarks/chaos.py [--kills 100] [--quick] --json
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Benchmark
from tests.tiny_run import (
    child_environment,
    rank_process,
    steps_of,
    submit,
    submit_command,
    write_config,
    write_tiny_data,
)

_NUM_NODES = 2
_SIGNALS = (signal.SIGKILL, signal.SIGUSR2, signal.SIGTERM)
_KILLS_PER_RUN = 5


def disturb(config: Path, name: str, kills: int, longest: float, rng: random.Random) -> tuple[int, list[int]]:
    """One run with `kills` signals, each up to `longest` seconds after the one before; (its exit status, the
    steps at which they came).
    """
    run = config.parent / name
    moments: list[int] = []
    with subprocess.Popen(
        submit_command(config, f"run.name={name}", nodes=_NUM_NODES),
        env=child_environment(),
        stderr=subprocess.DEVNULL,
    ) as launcher:
        while len(moments) < kills and launcher.poll() is None:
            time.sleep(rng.uniform(0.5, longest))
            with contextlib.suppress(AssertionError, OSError):  # nobody there at this moment
                os.kill(rank_process(config.parent, rng.randrange(_NUM_NODES), name), rng.choice(_SIGNALS))
                moments.append(max(steps_of(run), default=0))
        return launcher.wait(600), moments


def main() -> int:
    bench = Benchmark("chaos", __doc__)
    bench.parser.add_argument("--kills", type=int, help="100, or 4 with --quick")
    options = bench.parse()
    kills = options.kills or (4 if options.quick else 100)
    rng = random.Random(0)
    done, runs, identical, clean = 0, 0, 0, 0
    moments: list[int] = []
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        data = write_tiny_data(folder / "data")
        config = write_config(
            folder / "tiny.yaml",
            data,
            optim={"score_lr": 300.0},
            train={"epochs": 60, "global_batch_size": 12},
            eval={"knn_every": 2, "knn_k": [5], "batch_size": 4},
            checkpoint={"every_steps": 10},
        )
        started = time.perf_counter()
        calm = submit(config, "run.name=calm", nodes=_NUM_NODES, timeout=600)
        if calm.returncode:
            raise RuntimeError(calm.stderr)
        length = time.perf_counter() - started
        expected = (folder / "calm" / "final.mask").read_bytes()
        while done < kills:
            number = min(_KILLS_PER_RUN, kills - done)
            status, steps = disturb(config, f"storm-{runs}", number, max(length, 2.0), rng)
            mask = folder / f"storm-{runs}" / "final.mask"
            clean += status == 0
            identical += mask.exists() and mask.read_bytes() == expected
            done, runs, moments = done + len(steps), runs + 1, moments + steps
    bench.figure("signals", done, min=kills)
    bench.figure("runs", runs)
    bench.figure("runs_that_ended_by_themselves_share", clean / runs, min=1.0)
    bench.figure("runs_with_bit_identical_masks_share", identical / runs, min=1.0)
    bench.figure("signals_before_the_first_step", sum(step == 0 for step in moments))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
