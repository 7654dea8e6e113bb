"""What saving the mask takes of a rank at the end of a run, beyond what it holds anyway.

A ViT of 16 blocks of width 512 (50 million masked weights) with random scores, under ddp, fsdp and bits, on
1, 2 and 4 processes of one machine. Counted is the growth of a rank's resident memory at its highest while
`save_masks` runs, in bytes for each masked weight: of the rank that writes, and of the largest other one. A
whole mask takes 1 (a bool each), whole frozen weights 4. The file must be the same under every engine and
number of processes.

    python -m benchmarks.parallel.finish [--quick] --json
"""

import ctypes
import gc
import hashlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist

from benchmarks.harness import Benchmark, _high_water
from selfmask_dist.backbones import find_blocks
from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.maskfile.api import Masks, save_masks
from selfmask_dist.parallel import build_engine
from tests.support.distributed import run_distributed
from tests.support.engine_cases import Step, world_here

ENGINES = ("ddp", "fsdp", "bits")
WIDTH, DEPTH, QUICK_DEPTH = 512, 16, 4
# for each weight, over what one parameter takes: the writer keeps the coded bits of all, the others nothing
MOST = {"writer": 0.3, "others": 0.05}
ONE_PARAMETER_BYTES = 14 * 2**20  # gathered, hashed and coded, of the largest (a million weights)


def growth(path: str, masks: Masks, *, is_writer: bool) -> int:
    """The bytes by which this process grows at its highest while it saves. Collective."""
    gc.collect()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _high_water()
    save_masks(masks, path, is_writer=is_writer)
    return _high_water() - before


def make(name: str, width: int, depth: int) -> Masks:
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 16, "patch_size": 8, "num_classes": 0, "num_heads": 8}
    encoder = timm.create_model("vit_tiny_patch16_224", embed_dim=width, depth=depth, **options)
    engine = build_engine(
        Step(encoder, width, torch.float32, "frozen"),
        encoder=encoder,
        blocks=find_blocks(encoder),
        world=world_here(),
        config=EngineConfig.model_validate({"name": name}),
    )
    masks: Masks = engine.attach(encoder, Masks.attach, include="vit")
    with torch.no_grad():
        for number, entry in enumerate(masks.entries):  # the same bits, whatever a rank holds of them
            generator = torch.Generator().manual_seed(number)
            entry.fill(torch.rand(entry.theta.shape, generator=generator) - 0.1)
    engine.start(torch.optim.SGD(masks.parameters(), lr=0.1))
    engine.refresh()
    return masks


def measure(name: str, depth: int, folder: str) -> dict[str, Any]:
    """Growth and seconds of this rank, the masked weights, and the file's hash."""
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back at once
    is_writer = dist.get_rank() == 0
    growth(f"{folder}/warm.mask", make(name, 64, 2), is_writer=is_writer)  # what libraries take once
    masks = make(name, WIDTH, depth)
    start = time.perf_counter()
    most = growth(f"{folder}/final.mask", masks, is_writer=is_writer)
    return {
        "growth": most,
        "seconds": time.perf_counter() - start,
        "weights": sum(entry.theta.numel() for entry in masks.entries),
        "file": hashlib.sha256(Path(f"{folder}/final.mask").read_bytes()).hexdigest() if is_writer else "",
    }


def main() -> int:
    bench = Benchmark("finish_memory", __doc__)
    is_quick = bench.parse().quick
    depth, worlds = (QUICK_DEPTH, (1, 2)) if is_quick else (DEPTH, (1, 2, 4))
    files = set()
    for name in ENGINES:
        for size in worlds:
            with tempfile.TemporaryDirectory() as folder:
                writer, *others = run_distributed(measure, size, name, depth, folder, timeout=600)
            files.add(writer["file"])
            weights = writer["weights"]
            roles = {"writer": [writer], "others": others}
            for role, ranks in roles.items():
                if ranks:
                    most = max(rank["growth"] for rank in ranks) / weights
                    bench.figure(
                        f"{name}_world{size}_{role}",
                        round(most, 3),
                        max=MOST[role] + ONE_PARAMETER_BYTES / weights,
                    )
            bench.figure(f"{name}_world{size}_seconds", round(writer["seconds"], 2))
            print(
                name,
                size,
                {role: [r["growth"] >> 20 for r in ranks] for role, ranks in roles.items()},
                file=sys.stderr,
            )
    bench.figure("different_files", len(files), max=1)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
