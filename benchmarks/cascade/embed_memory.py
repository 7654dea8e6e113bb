"""What a rank needs to embed with a backbone and its masks: held whole by a bank, and cut over ranks.

Each rank loads a ViT-S/16 (22 million weights) from its file and embeds a picture frozen and under two masks,
on CPU processes of one machine: with a `MaskBank`, as ddp does, and with a `ShardedEncoder`, as fsdp does.
Counted is the growth of a rank's own memory at its highest (pages of the weights' file are left out: the
system takes them back). What falls with the number of processes is told by the difference of 2 and 4, in
which activations, gathered blocks and buffers of the network cancel (one process gathers nothing):
(peak of one of 2 - peak of one of 4) / (model (1/2 - 1/4)), 1 where all of the model is cut.

    python -m benchmarks.cascade.embed_memory [--quick] --json
"""

import ctypes
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Benchmark
from benchmarks.parallel.memory import OwnMemory, resident, write_model
from selfmask_dist import attach
from selfmask_dist.backbones import load_backbone
from selfmask_dist.backbones.mapping import tensors_in_files
from selfmask_dist.config.backbone import BackboneConfig
from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.maskfile.bank import MaskBank
from selfmask_dist.maskfile.rows import put_file
from selfmask_dist.parallel.fsdp import ShardedEncoder
from tests.support.distributed import run_distributed
from tests.support.engine_cases import world_here

_VIEWS = (None, "a", "b", None)
_MIB = 2**20


def write_masks(folder: Path, name: str) -> None:
    """Write two masks that prune a tenth."""
    backbone = load_backbone(section(folder, name))
    masks = attach(backbone.encoder, include="vit")
    for seed, view in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for scores in masks.parameters():
                scores.copy_(torch.rand(scores.shape, generator=generator) - 0.1)
        masks.rewrite()
        masks.save(folder / f"{view}.mask", backbone_fingerprint=backbone.spec.fingerprint)


def section(folder: Path, name: str) -> BackboneConfig:
    """Return the backbone's settings."""
    return BackboneConfig(name=f"timm:{name}", weights=str(folder / "weights.safetensors"))


def embed(folder: Path, name: str, is_sharded: bool) -> dict[str, Any]:
    """Embed under each view on this rank; its own memory over what it was before, and the embeddings."""
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back at once
    config, world = EngineConfig(name="fsdp"), world_here()
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    small = load_backbone(BackboneConfig(name="timm:test_vit", pretrained=False))
    # what libraries take once
    ShardedEncoder(small.encoder, blocks=small.spec.blocks, world=world, config=config).encode(
        images[:, :, :160, :160]
    )
    gc.collect()
    before = resident("RssAnon")
    own = OwnMemory()
    own.start()
    backbone = load_backbone(section(folder, name), in_file=is_sharded)
    found = []
    if is_sharded:
        sharded = ShardedEncoder(
            backbone.encoder,
            blocks=backbone.spec.blocks,
            world=world,
            config=config,
            in_file=tensors_in_files(backbone.encoder),
        )
        for view in _VIEWS:
            sharded.restore()
            if view is not None:
                put_file(folder / f"{view}.mask", sharded, fingerprint=backbone.spec.fingerprint)
            found.append(sharded.encode(images).numpy())
    else:
        bank = MaskBank(backbone.encoder)
        for view in _VIEWS:
            if view is not None:
                bank.add(view, folder / f"{view}.mask")
            found.append(bank.embed(images, view).numpy())
    return {"peak": own.finish() - before, "embeddings": found}


def main() -> int:
    bench = Benchmark("cascade_embed_memory", __doc__)
    is_quick = bench.parse().quick
    name = "vit_tiny_patch16_224" if is_quick else "vit_small_patch16_224"
    worlds = (1, 2, 4)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = write_model(folder / "weights.safetensors", name)
        write_masks(folder, name)
        bench.figure("model, MiB", model / _MIB)
        first, peaks = None, {}
        for size in worlds:
            for label, is_sharded in (("whole", False), ("sharded", True)):
                ranks = run_distributed(embed, size, folder, name, is_sharded, timeout=500)
                peak = max(rank["peak"] for rank in ranks)
                bench.figure(f"{label}, world {size}: peak / model", peak / model)
                if not is_sharded:
                    first = first or ranks[0]["embeddings"]
                    continue
                peaks[size] = peak
                if size == 4:
                    share = (peaks[2] - peak) / (model / 4)
                    bench.figure("share of the model that falls from world 2 to 4", share, min=0.8)
                differences = [
                    float((torch.from_numpy(found) - torch.from_numpy(whole)).abs().max())
                    for rank in ranks
                    for found, whole in zip(rank["embeddings"], first or [], strict=True)
                ]
                bench.figure(f"sharded, world {size}: largest difference", max(differences), max=1e-4)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
