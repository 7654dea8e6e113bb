"""What a rank needs at start: a backbone built whole and then cut, against one that stays in its file.

Each rank loads a ViT-L/16 (303 million weights, 1.2 GB as safetensors) and shards it under fsdp, on CPU
processes of one machine. Counted is the growth of a rank's resident memory at its highest, pages of the file
among it, in units of the model; `own` leaves the file's pages out (the system takes those back when memory is
short). What is kept is read when the engine is ready.

    python -m benchmarks.parallel.memory [--quick] --json
"""

import ctypes
import gc
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from benchmarks.harness import Benchmark, _high_water
from selfmask_dist.backbones import load_backbone
from selfmask_dist.config.backbone import BackboneConfig
from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.parallel import build_engine
from tests.support.distributed import run_distributed
from tests.support.engine_cases import Step, world_here


def write_model(path: Path, name: str) -> int:
    """Save a model with random weights; returns its bytes."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0)
    save_file(model.state_dict(), path)
    return sum(tensor.nbytes for tensor in model.state_dict().values())


class OwnMemory(threading.Thread):
    """The highest RssAnon while it runs, looked at every 2 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(0.002):
            self.most = max(self.most, resident("RssAnon"))

    def finish(self) -> int:
        self._stopping.set()
        self.join()
        return self.most


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def start(name: str, path: str, in_file: bool) -> dict[str, Any]:
    """Load and shard on this rank; bytes over what it was before."""
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back at once
    warm_up()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, own_before = _high_water(), resident("RssAnon")
    own = OwnMemory()
    own.start()
    backbone = load_backbone(BackboneConfig(name=f"timm:{name}", weights=str(path)), in_file=in_file)
    step = Step(backbone.encoder, backbone.spec.dim, torch.float32, "frozen")
    build_engine(
        step,
        encoder=backbone.encoder,
        blocks=backbone.spec.blocks,
        world=world_here(),
        config=EngineConfig(name="fsdp"),
    )
    most_own = own.finish()
    gc.collect()
    return {
        "peak": _high_water() - before,
        "own_peak": most_own - own_before,
        "kept": resident("VmRSS") - before,
        "fingerprint": backbone.spec.fingerprint,
    }


def warm_up() -> None:
    """What libraries take once."""
    backbone = load_backbone(BackboneConfig(name="timm:test_vit", pretrained=False))
    step = Step(backbone.encoder, backbone.spec.dim, torch.float32, "frozen")
    config = EngineConfig(name="fsdp")
    build_engine(
        step, encoder=backbone.encoder, blocks=backbone.spec.blocks, world=world_here(), config=config
    )


def main() -> int:
    bench = Benchmark("engine_memory", __doc__)
    is_quick = bench.parse().quick
    name = "vit_small_patch16_224" if is_quick else "vit_large_patch16_224"
    worlds = (1, 2) if is_quick else (1, 2, 4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        model_bytes = write_model(path, name)
        bench.figure("model_bytes", model_bytes)
        fingerprints = set()
        for size in worlds:
            for label, in_file in (("whole", False), ("in_file", True)):
                ranks = run_distributed(start, size, name, str(path), in_file, timeout=300)
                fingerprints |= {rank["fingerprint"] for rank in ranks}
                for part in ("peak", "own_peak", "kept"):
                    most = max(rank[part] for rank in ranks) / model_bytes
                    # a share, the pages it was copied from, and a block: what one rank of `size` may hold
                    limit = 2 / size + 0.2 if in_file and part == "peak" else None
                    bench.figure(f"{label}_world{size}_{part}", most, max=limit, quick=False)
        bench.figure("fingerprints", len(fingerprints), max=1)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
