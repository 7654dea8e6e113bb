"""A save and a resume on four ranks, beside those of before: gathered whole, written by one, read by all.

A ViT-B (86 million masked weights, 0.68 GB of scores and momentum) under fsdp on four processes.

    gathered   every rank holds the whole state; rank 0 writes it with torch.distributed.checkpoint and hashes
               the file; at a resume every rank hashes and reads all of it
    parts      every rank copies, writes and hashes its own elements; at a resume it reads its own elements
               and hashes what it reads

Seconds are of the slowest rank, memory is the highest of a rank above where it stood, bytes are what a rank
read of files (`/proc/self/io`). Two and three ranks resume the checkpoint of four as well. Besides: what
torch.distributed.checkpoint reads where four ranks take their rows from tensors that one process saved.

    python -m benchmarks.parallel.checkpoint_ranks [--quick] --json
"""

import contextlib
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, zeros

from benchmarks.harness import Benchmark
from selfmask_dist import attach
from selfmask_dist.backbones import find_blocks
from selfmask_dist.common.files import sha256
from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.data import Batch
from selfmask_dist.parallel import Engine, World, build_engine
from selfmask_dist.parallel.parts import MOMENTS, EngineState
from selfmask_dist.runs.checkpoint import Retention, Saver, loading_peers, open_newest, saving_peers
from tests.support.distributed import run_distributed
from tests.support.engine_cases import CLASSES, Step, world_here

RANKS, OTHER_RANKS, IMAGE_SIZE, MB = 4, (2, 3), 32, 1e6
Figures = dict[str, float]


def build(model: str) -> Engine:
    """An engine with momentum: one step is made."""
    world = world_here()
    torch.manual_seed(0)
    encoder = timm.create_model(model, img_size=IMAGE_SIZE, num_classes=0)
    encoder.requires_grad_(False)
    width: Any = encoder.num_features
    step = Step(encoder, width, torch.float32, "frozen")
    engine = build_engine(
        step,
        encoder=encoder,
        blocks=find_blocks(encoder),
        world=world,
        config=EngineConfig.model_validate({"name": "fsdp"}),
    )
    masks = engine.attach(encoder, attach, include="vit")
    parameters = [*masks.parameters(), *step.head.parameters()]
    engine.start(torch.optim.SGD(parameters, lr=1e-3, momentum=0.9))
    labels = (torch.arange(RANKS) % CLASSES)[world.rank :: world.size]
    images = torch.randn(len(labels), 3, IMAGE_SIZE, IMAGE_SIZE)
    engine.forward_backward(Batch((images,), labels, torch.ones(len(labels)), labels, RANKS))
    engine.step()
    return engine


class Cost:
    """Seconds, highest memory above the start, and bytes read of files, of this process within a block."""

    def __enter__(self) -> "Cost":
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size begins anew
        self._memory, self._read = _memory("VmRSS"), _bytes_read()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.peak = _memory("VmHWM") - self._memory
        self.read = _bytes_read() - self._read

    def figures(self, name: str) -> Figures:
        return {
            f"{name}_seconds": self.seconds,
            f"{name}_peak_mb": self.peak / MB,
            f"{name}_read_mb": self.read / MB,
        }


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about having no process group, which is the intent
        yield


def save_gathered(engine: Engine, folder: Path) -> Figures:
    """As checkpoints were written until 2026-11-30."""
    with Cost() as copied:
        state = engine.state()
        tensors = {
            f"{part}/{name}": one for part in parts_of(state) for name, one in getattr(state, part).items()
        }
    with Cost() as written:
        if engine.world.is_main:
            with quiet():
                writer = dcp.FileSystemWriter(
                    folder, single_file_per_rank=True, sync_files=True, thread_count=1
                )
                dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
            hashes = {path.name: sha256(path) for path in folder.iterdir()}
            (folder / "manifest.json").write_text(json.dumps(hashes))
        dist.barrier()
    held = sum(tensor.nbytes for tensor in tensors.values())
    wrote = sum(path.stat().st_size for path in folder.iterdir()) if engine.world.is_main else 0
    return {
        "gathered_stall_seconds": copied.seconds,
        "gathered_save_seconds": copied.seconds + written.seconds,
        "gathered_save_peak_mb": max(copied.peak, held + written.peak) / MB,
        "gathered_written_mb": wrote / MB,
    }


def parts_of(state: EngineState) -> tuple[str, ...]:
    return ("parameters", "statistics", *(part for part in MOMENTS if getattr(state, part)))


def resume_gathered(engine: Engine, folder: Path) -> Figures:
    with Cost() as cost:
        for _ in range(
            2 if engine.world.is_main else 1
        ):  # it looked for the newest, and then read it as all did
            for path in folder.glob("[_.]*"):
                sha256(path)
            reader = dcp.FileSystemReader(folder)
            entries: Any = reader.read_metadata().state_dict_metadata
            tensors = {key: torch.empty(one.size, dtype=one.properties.dtype) for key, one in entries.items()}
            with quiet():
                dcp.load(tensors, storage_reader=reader, no_dist=True)
        found: dict[str, dict[str, Tensor]] = {part: {} for part in ("parameters", "statistics", *MOMENTS)}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            found[part][name] = tensor
        engine.load_state(EngineState(**found, step=1))
    return cost.figures("gathered_resume")


def save_parts(engine: Engine, folder: Path) -> Figures:
    saver = Saver(folder, Retention(), peers=saving_peers(engine.world))
    figures: Figures = {}
    for name in ("first", "next"):  # the first one makes the buffer that all later ones reuse
        with Cost() as cost:
            saver.save(engine.parts(), {}, step=1)
            stalled = time.perf_counter() - cost._start
            saver.finish()
        figures |= {f"parts_stall_seconds_{name}": stalled, f"parts_save_seconds_{name}": cost.seconds}
        figures |= {f"parts_save_peak_mb_{name}": cost.peak / MB}
    path = next(folder.glob(f"*/rank-{engine.world.rank:05d}.safetensors"))
    return figures | {"parts_written_mb": path.stat().st_size / MB}


def resume_parts(engine: Engine, folder: Path) -> Figures:
    with Cost() as cost:
        opened = open_newest(folder, peers=loading_peers(engine.world), verify_later=True)
        assert opened is not None
        engine.load(opened, step=1)
        opened.confirm()
    return cost.figures("parts_resume") | {"parts_resume_tensors_mb": opened.bytes_read / MB}


def resume_with_dcp(folder: Path, world: World) -> Figures:
    """What torch.distributed.checkpoint reads where each rank takes its rows of what one process saved."""
    mesh = init_device_mesh("cpu", (world.size,))
    reader = dcp.FileSystemReader(folder)
    entries: Any = reader.read_metadata().state_dict_metadata
    rows = {key: one for key, one in entries.items() if one.size and one.size[0] >= world.size}
    tensors = {
        key: zeros(one.size, dtype=one.properties.dtype, device_mesh=mesh, placements=[Shard(0)])
        for key, one in rows.items()
    }
    with Cost() as cost, quiet():
        dcp.load(tensors, storage_reader=reader)
    return {"dcp_rows_read_mb": cost.read / MB}


def measure(model: str, name: str) -> Figures:
    folder, world = Path(name), world_here()
    engine = build(model)
    own = sum(part.tensor.nbytes for part in engine.parts())
    figures = {"own_mb": own / MB}
    figures |= save_gathered(engine, folder / "gathered") | resume_gathered(engine, folder / "gathered")
    before = {part.name: part.tensor.clone() for part in engine.parts()}
    figures |= save_parts(engine, folder / "parts") | resume_parts(engine, folder / "parts")
    same = all(torch.equal(part.tensor, before[part.name]) for part in engine.parts())
    figures |= resume_with_dcp(folder / "gathered", world)
    return figures | {"state_is_the_same": float(same)}


def resume_elsewhere(model: str, name: str) -> Figures:
    """Resume what other processes saved, at the number of ranks that are here."""
    engine = build(model)
    own = sum(part.tensor.nbytes for part in engine.parts())
    return {"own_mb": own / MB} | resume_parts(engine, Path(name) / "parts")


def main() -> int:
    bench = Benchmark("checkpoint_ranks", __doc__)
    options = bench.parse()
    model = "vit_small_patch16_224" if options.quick else "vit_base_patch16_224"
    bench.figure("ranks", RANKS)
    bench.figure("model", model)
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_distributed(measure, RANKS, model, folder, timeout=550.0)
        for size in OTHER_RANKS:
            others = run_distributed(resume_elsewhere, size, model, folder, timeout=550.0)
            ratio = max(rank["parts_resume_read_mb"] / rank["own_mb"] for rank in others)
            bench.figure(f"parts_read_over_share_by_{size}", ratio, max=1.1)
    highest = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
    for key, value in highest.items():
        if key != "state_is_the_same":
            bench.figure(key, value)
    bench.figure("state_is_the_same", min(rank["state_is_the_same"] for rank in ranks), min=1.0)
    share = highest["own_mb"]
    bench.figure("parts_written_over_share", highest["parts_written_mb"] / share, max=1.1)
    bench.figure("parts_tensors_read_over_share", highest["parts_resume_tensors_mb"] / share, max=1.1)
    bench.figure("parts_verified_and_read_over_share", highest["parts_resume_read_mb"] / share, max=1.1)
    bench.figure("gathered_read_over_share", highest["gathered_resume_read_mb"] / share)
    bench.figure("dcp_rows_read_over_share", highest["dcp_rows_read_mb"] / share)
    bench.figure(
        "save_seconds_over_gathered", highest["parts_save_seconds_next"] / highest["gathered_save_seconds"]
    )
    bench.figure(
        "save_peak_over_gathered",
        highest["parts_save_peak_mb_first"] / highest["gathered_save_peak_mb"],
        max=0.4,
    )
    bench.figure(
        "resume_peak_over_gathered",
        highest["parts_resume_peak_mb"] / highest["gathered_resume_peak_mb"],
        max=0.4,
    )
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
