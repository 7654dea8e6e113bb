"""`selfmask adapt PHOTOS/`, as a newcomer types it: 2,000 real pictures in one folder, and three broken ones.

The command is typed in an empty folder, with a site file that names a backbone with its weights and the size
of pictures. It is killed (SIGKILL to all of its processes) in the middle of the conversion, and once more in
the middle of training; the same command again goes on to the end, and once more says that it is done. With
`--calm` it is also typed for the same pictures without a kill, and both masks have to be the same bits.

    python -m benchmarks.faults.adapt_kill [--quick] [--calm] --json
"""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import IO

from benchmarks.harness import Benchmark
from selfmask_dist.maskfile import read_mask_file
from tests.support.tiny_run import ROOT, child_environment, events_of, steps_of, wait_until

PICTURES, QUICK_PICTURES = 2000, 30
BROKEN = ("cut.jpg", "empty.jpg", "letter.jpg")
_DEFAULT_DATA = ROOT.parent / "shared" / "data"
_STEPS_BEFORE_THE_KILL = 20
_SITE = """\
backbone: {backbone}
nbd: {{dim: {dim}}}
engine: {{device: cpu, threads: 1, workers: 1}}
checkpoint: {{every_steps: 5}}
site:
  weights: {{"timm:vit_tiny_patch16_224": {weights}}}
"""
_NAME = '"timm:vit_tiny_patch16_224"'
_BACKBONE = f"{{name: {_NAME}, image_size: 32}}"
_QUICK_BACKBONE = (
    f"{{name: {_NAME}, pretrained: false, image_size: 16, crop_pct: 1.0, "
    "kwargs: {patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}}"
)
_PICTURES_OF = "grocery/train.tar"
_WEIGHTS = "weights/vit_tiny_patch16_224.in1k.fp16.safetensors"


def write_photos(tar: Path, folder: Path, number: int) -> None:
    """Write pictures of a tar into one flat folder, and three files more that are none."""
    folder.mkdir(parents=True)
    with tarfile.open(tar) as shard:
        for index, member in enumerate(sorted(shard.getmembers(), key=lambda one: one.name)[:number]):
            content = shard.extractfile(member)
            assert content is not None
            (folder / f"IMG_{index:04d}.jpg").write_bytes(content.read())
    (folder / "cut.jpg").write_bytes((folder / "IMG_0000.jpg").read_bytes()[:900])
    (folder / "empty.jpg").touch()
    (folder / "letter.jpg").write_text("Dear all, the pictures are attached.\n")


def start(folder: Path, output: IO[bytes]) -> subprocess.Popen[bytes]:
    """Type the command in a folder, with processes that can be killed together."""
    command = [sys.executable, "-m", "selfmask_dist.cli", "adapt", "PHOTOS/"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = child_environment(SELFMASK_SITE=str(folder.parent / "site.yaml"), PYTHONPATH=path)
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)


def type_it(folder: Path) -> tuple[int, str, float]:
    """Type the command and wait; return its exit status, what it printed and its seconds."""
    with open(folder / "said", "w+b") as output:
        begin = time.perf_counter()
        status = start(folder, output).wait()
        seconds = time.perf_counter() - begin
        output.seek(0)
        return status, output.read().decode(errors="replace"), seconds


def kill_when(folder: Path, condition: object) -> None:
    """Type the command, and kill all of its processes as soon as the condition holds."""
    assert callable(condition)
    with open(os.devnull, "wb") as output:
        process = start(folder, output)
        try:
            wait_until(lambda: condition() or process.poll() is not None, 900)
        finally:
            for signum in (signal.SIGSTOP, signal.SIGKILL):  # none is to see another one's end
                for pid in _processes_in(folder):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signum)
        if process.wait() >= 0:
            raise RuntimeError(f"the command ended by itself, with status {process.returncode}")


def _processes_in(folder: Path) -> list[int]:
    """Return the processes that work in a folder: the command, the launcher, ranks and their workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "cwd").resolve() == folder.resolve():
                found.append(int(path.name))
    return found


def finished(folder: Path) -> Path:
    """Return the run that the report is of."""
    (report,) = (folder / "runs" / "PHOTOS-adapted").glob("adapt*/report.html")
    return report.parent


def is_as_the_calm(run: Path, calm: Path) -> bool:
    """Return whether two runs have the same masks; their files' headers name other folders."""
    own, theirs = (read_mask_file(one / "final.mask").masks["default"].bits for one in (run, calm))
    return own.keys() == theirs.keys() and all(own[name].equal(bits) for name, bits in theirs.items())


def main() -> int:
    bench = Benchmark("adapt_kill", __doc__)
    bench.parser.add_argument(
        "--data", type=Path, default=os.environ.get("SELFMASK_SHARED_DATA", _DEFAULT_DATA)
    )
    bench.parser.add_argument("--calm", action="store_true", help="compare with a run that is not killed")
    options = bench.parse()
    data = Path(options.data).resolve()
    if not data.is_dir():
        bench.skip(f"no shared data at {data}: set SELFMASK_SHARED_DATA to its folder")
        return bench.finish()
    number = QUICK_PICTURES if options.quick else PICTURES
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        backbone, dim = (_QUICK_BACKBONE, 8) if options.quick else (_BACKBONE, 128)
        site = _SITE.format(backbone=backbone, dim=dim, weights=data / _WEIGHTS)
        (base / "site.yaml").write_text(site)
        _measure(bench, base / "stormy", data, number)
        if options.calm:
            _compare(bench, base, data, number)
    return bench.finish()


def _measure(bench: Benchmark, folder: Path, data: Path, number: int) -> None:
    """Type the command, with a kill in the conversion, a kill in the training, to its end, and once more."""
    write_photos(data / _PICTURES_OF, folder / "PHOTOS", number)
    out = folder / "runs" / "PHOTOS-adapted"
    kill_when(folder, lambda: any(path.stat().st_size for path in out.glob("shards/**/*.tar*")))
    bench.figure("killed_in_the_conversion", float(not list(out.glob("adapt*"))), min=1.0)
    kill_when(folder, lambda: saved_step(out / "adapt") >= _STEPS_BEFORE_THE_KILL)
    status, said, seconds = type_it(folder)
    if status:
        raise RuntimeError(said[-4000:])
    run = finished(folder)
    result = json.loads((run / "result.json").read_text())
    resumed = [event["step"] for event in events_of(out / "adapt") if event["event"] == "resume"]
    steps = steps_of(out / "adapt")
    bench.figure("pictures", number)
    bench.figure("seconds_after_the_kills", seconds)
    bench.figure("says", plain(said))
    bench.figure("resumed_at_steps", resumed)
    bench.figure("resumed_and_not_begun_anew", float(bool(resumed) and resumed[0] > 0), min=1.0)
    bench.figure("steps", int(json.loads((out / "adapt" / "result.json").read_text())["steps"]))
    bench.figure("logged_steps", steps)  # every 20th
    bench.figure("each_logged_step_once", float(steps == sorted(set(steps))), min=1.0)
    bench.figure("mask_bytes", (run / "final.mask").stat().st_size, min=1)
    bench.figure("report_bytes", (run / "report.html").stat().st_size, min=1)
    bench.figure("counts_the_pictures", float(f"{number:,} pictures" in said), min=1.0)
    bench.figure("names_the_broken", float(all(one in said for one in BROKEN)), min=1.0)
    bench.figure("decision", result["retrieval"]["decision"])
    before = (run / "final.mask").read_bytes()
    status, said, seconds = type_it(folder)
    bench.figure("when_done_exit_status", status, max=0)
    bench.figure("when_done_seconds", seconds)
    bench.figure("when_done_says", plain(said))
    bench.figure("when_done_says_so", float("finished: nothing is left to do" in said), min=1.0)
    bench.figure("when_done_mask_untouched", float((run / "final.mask").read_bytes() == before), min=1.0)


def _compare(bench: Benchmark, base: Path, data: Path, number: int) -> None:
    write_photos(data / _PICTURES_OF, base / "calm" / "PHOTOS", number)
    status, said, seconds = type_it(base / "calm")
    if status:
        raise RuntimeError(said[-4000:])
    same = is_as_the_calm(finished(base / "stormy"), finished(base / "calm"))
    bench.figure("undisturbed_seconds", seconds)
    bench.figure("masks_bit_identical_to_the_undisturbed", float(same), min=1.0)


def saved_step(run: Path) -> int:
    """Return the step of a run's newest checkpoint; 0 where there is none."""
    latest = run / "checkpoints" / "latest"
    return int(latest.read_text().strip().rpartition("-")[2]) if latest.exists() else 0


def plain(text: str) -> list[str]:
    """Return the lines of what was printed, without the steps' own."""
    lines = [line.rstrip() for line in io.StringIO(text)]
    return [line for line in lines if line and not re.match(r"\s*(step|epoch)\s*\d", line)]


if __name__ == "__main__":
    sys.exit(main())
