"""A process is killed while it saves, again and again: what is loaded is a whole step, never a mixture.

Each trial forks a writer that saves one step after the other, kills it with SIGKILL at a random moment, and
loads: every tensor must hold the same step, which is not older than the newest one that the writer knew as
committed. Besides: files damaged at random places (a bit, a cut), a disk that is full, a folder that cannot
be written. `--ranks 4` has four processes save each checkpoint together, of which a random one is killed, and
damages any of their files; how long such a save takes is `benchmarks/parallel/checkpoint_ranks.py`.

    python -m benchmarks.faults.checkpoint_kill [--ranks 4] [--trials 1000] [--quick] --json
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.harness import Benchmark
from selfmask_dist.parallel.parts import TensorPart
from selfmask_dist.runs.checkpoint import (
    Checkpoint,
    Peers,
    Retention,
    Saver,
    committed,
    load_newest,
    step_of,
    verify,
    write_checkpoint,
)


def make(step: int) -> Checkpoint:
    names = [f"{part}/blocks.{block}" for part in ("parameters", "momentum") for block in range(4)]
    return Checkpoint({name: torch.full((64, 256), float(step)) for name in names}, {"step": step})


def step_in(loaded: Checkpoint) -> int | None:
    """The step that everything in it is of; None for a mixture."""
    steps = {loaded.values["step"]} | {int(x) for t in loaded.tensors.values() for x in t.unique().tolist()}
    return steps.pop() if len(steps) == 1 and len(loaded.tensors) == 8 else None


def kill_while_saving(folder: Path, rng: random.Random, ranks: int) -> tuple[int, int | None]:
    """One trial: (the newest step that was certainly committed, the step that is loaded)."""
    found = load_newest(folder, report=lambda text: None)
    first = (found[0].values["step"] if found else 0) + 1
    reader, writer = os.pipe()
    children = start(folder, ranks, range(first, first + 1000), writer)
    os.close(writer)
    os.read(reader, 4)  # they are about to save
    # together a save takes longer, and so does the look at the next one
    time.sleep(rng.uniform(0.0, 0.06 if ranks == 1 else 0.12))
    victim = rng.choice(children)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    children.remove(victim)
    time.sleep(0.02 if children else 0)  # what the others do then must be right too
    end(children)
    reported = b"".join(iter(lambda: os.read(reader, 1 << 16), b""))
    os.close(reader)
    known = int.from_bytes(reported[-4:], "little") if reported else first - 1
    found = load_newest(folder, report=lambda text: None)
    return known, (step_in(found[0]) if found else 0)


def start(folder: Path, ranks: int, steps: range, writer: int) -> list[int]:
    """Fork processes that save steps together; the main one writes 0, then each committed step, to a pipe."""
    store = tempfile.mktemp(prefix="checkpoint_kill_", dir=folder.parent)  # all of them make it or find it
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            try:
                save_steps(folder, Peers(rank, ranks), steps, store, writer)
            finally:
                os._exit(0)
        children.append(child)
    return children


def save_steps(folder: Path, peers: Peers, steps: range, store: str, writer: int) -> None:
    if peers.size > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        group = dist.FileStore(store, peers.size)
        dist.init_process_group("gloo", store=group, rank=peers.rank, world_size=peers.size)
        peers = replace(peers, group=dist.group.WORLD)

    def tell(path: Path, seconds: float) -> None:
        os.write(writer, step_of(path).to_bytes(4, "little"))

    saver = Saver(
        folder,
        Retention(last=2),
        peers=peers,
        on_commit=tell,
        on_failure=lambda text: None,
    )
    if peers.is_main:
        os.write(writer, bytes(4))
    for step in steps:
        saver.save(cut(make(step), peers), {"step": step}, step=step)
        saver.finish()
        if saver.is_lost:
            return


def cut(checkpoint: Checkpoint, peers: Peers) -> list[TensorPart]:
    """This process's parts: of each tensor a range, which is no whole number of rows."""
    parts = []
    for name, tensor in checkpoint.tensors.items():
        low, high = (tensor.numel() * (peers.rank + i) // peers.size for i in (0, 1))
        low, high = (value - 3 * (0 < value < tensor.numel()) for value in (low, high))
        parts.append(TensorPart(name, tensor.shape, tensor.view(-1)[low:high], low))
    return parts


def end(children: list[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def damage(folder: Path, rng: random.Random, saved: Path) -> bool:
    """Damage the newest of two checkpoints; whether the one before was loaded instead."""
    shutil.copytree(saved, folder)
    path = committed(folder)[0]
    file = rng.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    if rng.random() < 0.5:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        del data[rng.randrange(len(data)) :]
    file.write_bytes(data)
    found = load_newest(folder, report=lambda text: None)
    return found is not None and step_in(found[0]) == 1


def fails_cleanly(folder: Path, *, full: bool) -> bool:
    """Whether a save that cannot work raises OSError and leaves the checkpoint before as it was: on a file
    system of its own where this process may mount one, else by a limit on files' size or in /proc.
    """
    folder.mkdir()
    is_mounted = _mount("-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder))
    try:
        before = write_checkpoint(folder, make(1), step=1)
        target = folder
        if not full:
            if is_mounted:
                _mount("-o", "remount,ro", str(folder))
            else:
                target = Path("/proc/self/checkpoints")  # nobody can write there, root neither
        child = os.fork()
        if child == 0:
            if full and not is_mounted:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            os._exit(_status_of_saves(target))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = load_newest(folder, report=lambda text: None)
        is_whole = found is not None and step_in(found[0]) is not None and not verify(found[1])
        return status == 0 and is_whole and before in committed(folder)
    finally:
        if is_mounted:
            subprocess.run(["umount", str(folder)], check=True)


def _status_of_saves(folder: Path) -> int:
    """0 where one of a few saves raises OSError, as it must."""
    try:
        for step in range(2, 5):  # the first may still fit
            write_checkpoint(folder, make(step), step=step)
    except OSError:
        return 0
    except BaseException:
        return 2
    return 1


def _mount(*arguments: str) -> bool:
    if os.geteuid() or shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


def main() -> int:
    bench = Benchmark("checkpoint_kill", __doc__)
    bench.parser.add_argument("--trials", type=int, help="kills (1000; 100 with --quick)")
    bench.parser.add_argument("--ranks", type=int, default=1, help="processes that save together (1)")
    options = bench.parse()
    if options.ranks > 1:
        bench.name = "checkpoint_kill_ranks"
    trials = options.trials or (100 if options.quick else 1000)
    torch.set_num_threads(1)
    rng = random.Random(0)
    mixtures = older = mid_save = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(trials):
            known, loaded = kill_while_saving(folder / "kill", rng, options.ranks)
            mid_save += any((folder / "kill").glob(".*.partial"))
            mixtures += loaded is None
            older += loaded is not None and loaded < known
        both = folder / "both"
        ends = os.pipe()
        for child in start(both, options.ranks, range(1, 3), ends[1]):
            os.waitpid(child, 0)
        size = sum(file.stat().st_size for file in committed(both)[0].iterdir())
        masked = sum(tensor.numel() for tensor in make(1).tensors.values()) // 2
        damages = max(trials // 5, 20)
        caught = sum(damage(folder / f"damage-{index}", rng, both) for index in range(damages))
        full, readonly = fails_cleanly(folder / "full", full=True), fails_cleanly(folder / "ro", full=False)
    bench.figure("ranks", options.ranks)
    bench.figure("kills", trials)
    bench.figure("kills_that_left_a_half_written_directory", mid_save, min=1)
    bench.figure("mixtures_loaded", mixtures, max=0)
    bench.figure("commits_lost", older, max=0)
    bench.figure("damaged_files_caught_share", caught / damages, min=1.0)
    bench.figure("full_disk_leaves_the_last_one", float(full), min=1.0)
    bench.figure("unwritable_folder_leaves_the_last_one", float(readonly), min=1.0)
    bench.figure("bytes_per_masked_weight", size / masked)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
