"""What a rank needs at its highest in every stage of a run, on 1, 2, 4 and 8 processes of one machine.

A ViT of 12 blocks of width 384 (21 million masked weights, 4N = 81 MiB) under SwAV, with two crops of 16
pixels and two of 8, so that weights and not activations take the memory. The global batch stays the same.
Counted is, for each row, by how much a rank's resident memory grows at its highest over what the process had
before the model. A sharded rank needs C + S / world, where C is what it needs at any world size, stated for
each engine in `constant`: gathered blocks, buckets on their way, activations, and for bits weights and theta,
which it keeps whole. `falls` is (peak - C) x world over that of world 1: 1 is exact, 1.2 aimed at.

    resolution      a step on the two large crops alone
    step            a step on all crops; over `resolution` it tells what a second resolution costs
    apart           the same with a forward for each resolution, as it was before (a control)
    accumulate      a step in 4 micro-steps
    save, resume    the state to a checkpoint and back, from what another process wrote; and the bytes read
    finish          the mask file
    embed           pictures through the frozen encoder, by processes that train nothing
    cascade         the same under a mask: the frozen weights come back, the mask is put on from its file

`embed` and `cascade` are of processes of their own, whose weights lie in a file; its pages are counted, too.
For bits, which shares no weights, they are left out. `accumulate` is left out on 8 processes, which would
have half a picture in a micro-step. A row is a function of a rig in `ROWS`, `MICRO_ROWS` or `EMBED_ROWS`.

    python -m benchmarks.parallel.scale [--quick] --json
"""

import ctypes
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.harness import Benchmark, _high_water
from benchmarks.parallel.bytes import ENV
from selfmask_dist.backbones import find_blocks
from selfmask_dist.backbones.any_size import accept_sizes
from selfmask_dist.backbones.mapping import leave_in_files, tensors_in_files
from selfmask_dist.config.objectives import SwavConfig
from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.data import Batch
from selfmask_dist.maskfile.api import Masks, save_masks
from selfmask_dist.maskfile.rows import put_file
from selfmask_dist.masking import select
from selfmask_dist.objectives.base import Context, TrainStep
from selfmask_dist.objectives.swav import Swav
from selfmask_dist.parallel import Engine, World, build_engine, shards_weights
from selfmask_dist.parallel.fsdp import ShardedEncoder
from selfmask_dist.runs.checkpoint import Retention, Saver, loading_peers, open_newest, saving_peers
from selfmask_dist.training.state import Position, RunState
from tests.support.distributed import run_distributed
from tests.support.engine_cases import world_here

SIDES = (16, 16, 8, 8)
BATCH = 16  # pictures of a step, over all ranks
BUCKET_MB = 4.0  # a tenth of this model would be the default's 25
WIDTH, DEPTH, QUICK_DEPTH = 384, 12, 4
ENGINES = {"fsdp": {}, "bits": {}, "deepspeed": {"zero_stage": 3}}
FALLING = 1.2  # (peak - C) x world over world 1's
EXCESS = 1.1  # of a second resolution; of what a resume reads over the share


class NoMeans:
    """Telemetry of nothing, which a checkpoint asks for."""

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        assert not state


@dataclass
class Rig:
    """A run on this rank, as far as its stages need it."""

    engine: Engine
    masks: Any
    objective: Swav
    world: World
    folder: Path

    def steps(self, sides: tuple[int, ...], *, count: int = 2) -> None:
        for step in range(count):
            self.engine.forward_backward(batch_of(step, sides, self.world))
            self.engine.step()


def batch_of(step: int, sides: tuple[int, ...], world: World) -> Batch:
    """This rank's rows of pictures of noise."""
    generator = torch.Generator().manual_seed(step)
    views = tuple(torch.randn(BATCH, 3, side, side, generator=generator) for side in sides)
    ids = torch.arange(BATCH)[world.rank :: world.size]
    return Batch(tuple(view[ids] for view in views), torch.zeros_like(ids), torch.ones(len(ids)), ids, BATCH)


def make_encoder(width: int, depth: int, device: str = "cpu") -> nn.Module:
    options: dict[str, Any] = {"img_size": SIDES[0], "patch_size": 8, "num_classes": 0}
    with torch.device(device):
        return timm.create_model(
            "vit_tiny_patch16_224", embed_dim=width, depth=depth, num_heads=8, **options
        ).requires_grad_(False)


def make_rig(name: str, depth: int, folder: Path, *, width: int = WIDTH, accumulate: int = 1) -> Rig:
    torch.manual_seed(0)
    encoder = make_encoder(width, depth)
    accept_sizes(encoder, SIDES, name="vit")
    world = world_here()
    context = Context(
        world.rank,
        world.size,
        BATCH,
        world.sum,
        world.sum_with_gradient,
        num_samples=BATCH,
        all_to_all=world.all_to_all,
    )
    objective = Swav(width, SwavConfig(prototypes=64, dim=64), context)
    module = TrainStep(encoder, objective, batchnorm="frozen")
    config = EngineConfig.model_validate({"name": name, "bucket_mb": BUCKET_MB, **ENGINES[name]})
    engine = build_engine(
        module,
        encoder=encoder,
        blocks=find_blocks(encoder),
        world=world,
        config=config,
        accumulate=accumulate,
    )
    masks = engine.attach(encoder, Masks.attach, include="vit")
    groups: list[dict[str, Any]] = [
        {"params": list(masks.parameters()), "lr": 1.0},
        {"params": objective.head_parameters()},
    ]
    engine.start(torch.optim.SGD(groups, lr=0.05, momentum=0.9))
    engine.keep_unit_rows(objective.unit_rows())
    return Rig(engine, masks, objective, world, folder)


# ---- the stages


def take_resolution(rig: Rig) -> None:
    rig.steps(SIDES[:2])


def take_step(rig: Rig) -> None:
    rig.steps(SIDES)


def take_apart(rig: Rig) -> None:
    rig.engine.encoder.takes_several = False  # type: ignore[assignment]
    rig.steps(SIDES)
    rig.engine.encoder.takes_several = True  # type: ignore[assignment]


def state_of(rig: Rig) -> RunState:
    return RunState(rig.engine, rig.objective, identity={"benchmark": "scale"})


def save(rig: Rig) -> None:
    state, peers = state_of(rig), saving_peers(rig.world)
    saver = Saver(rig.folder / "checkpoints", Retention(), peers=peers)
    saver.save(state.parts(), state.values(Position(step=1), telemetry=NoMeans(), metrics={}), step=1)
    saver.finish()


def resume(rig: Rig) -> None:
    found = open_newest(rig.folder / "checkpoints", peers=loading_peers(rig.world), verify_later=True)
    assert found is not None
    state_of(rig).restore(found, telemetry=NoMeans())


def finish(rig: Rig) -> None:
    save_masks(rig.masks, rig.folder / "final.mask", is_writer=rig.world.is_main)
    dist.barrier()


# ---- without training


@dataclass
class EmbedRig:
    """An encoder that is only run, as a cascade and `selfmask eval` run it."""

    sharded: ShardedEncoder
    world: World
    folder: Path


def make_embed_rig(name: str, depth: int, folder: Path, *, width: int = WIDTH) -> EmbedRig:
    world, path = world_here(), folder / f"weights-{width}.safetensors"
    if world.is_main:
        torch.manual_seed(0)
        save_file(make_encoder(width, depth).state_dict(), path)
    dist.barrier()
    with leave_in_files():
        encoder = make_encoder(width, depth)
        encoder.load_state_dict(load_file(path))
    accept_sizes(encoder, SIDES, name="vit")
    config = EngineConfig.model_validate({"name": name, **ENGINES[name]})
    sharded = ShardedEncoder(
        encoder,
        blocks=find_blocks(encoder),
        world=world,
        config=config,
        in_file=tensors_in_files(encoder),
    )
    return EmbedRig(sharded, world, folder)


def embed(rig: EmbedRig) -> None:
    rig.sharded.encode(batch_of(0, SIDES[:1], rig.world).views[0])


def embed_under_mask(rig: EmbedRig) -> None:
    for _ in range(2):  # a second one has the first one's theta to take off
        rig.sharded.restore()
        put_file(rig.folder / "final.mask", rig.sharded, fingerprint="is looked at")
        embed(rig)


Row = Callable[[Any], None]
# in their order: a stage finds what the ones before it left in the folder
ROWS: dict[str, Row] = {
    "resolution": take_resolution,
    "step": take_step,
    "apart": take_apart,
    "save": save,
    "resume": resume,
    "finish": finish,
}
MICRO_ROWS: dict[str, Row] = {"accumulate": take_step}  # by a rig that makes 4 micro-steps
EMBED_ROWS: dict[str, Row] = {"embed": embed, "cascade": embed_under_mask}  # after `finish`
KINDS = {"whole": ROWS, "micro": MICRO_ROWS, "embed": EMBED_ROWS}
CONTROLS = {"apart"}


def kinds_of(name: str, size: int) -> list[str]:
    """Return the rigs whose rows are measured for an engine on so many processes."""
    embeds = shards_weights(EngineConfig.model_validate({"name": name, **ENGINES[name]}), World(0, 2))
    return ["whole", *(["micro"] if BATCH // size >= 4 else []), *(["embed"] if embeds else [])]


# ---- measuring


def make(kind: str, name: str, depth: int, folder: Path, **options: Any) -> Any:
    if kind == "embed":
        return make_embed_rig(name, depth, folder, **options)
    return make_rig(name, depth, folder, accumulate=4 if kind == "micro" else 1, **options)


def measure(name: str, depth: int, folder: str, kind: str) -> dict[str, dict[str, float]]:
    """Each row's peak, bytes read and seconds on this rank."""
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back at once
    rows = KINDS[kind]
    with tempfile.TemporaryDirectory() as own:
        shared: list[Any] = [own]
        dist.broadcast_object_list(shared)
        if kind == "embed":  # needs a mask file
            finish(make_rig(name, 2, Path(shared[0]), width=32))
        warm = make(kind, name, 2, Path(shared[0]), width=32)
        for row in rows.values():  # what libraries take once
            row(warm)
        del warm
        dist.barrier()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _high_water()
    rig = make(kind, name, depth, Path(folder))
    found = {}
    for label, row in rows.items():
        gc.collect()
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")
        read, start = bytes_read(), time.perf_counter()
        row(rig)
        found[label] = {
            "peak": _high_water() - before,
            "read": bytes_read() - read,
            "seconds": round(time.perf_counter() - start, 2),
        }
    return found


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar:")))


def constants(depth: int) -> dict[str, int]:
    """Bytes that a rank needs at any world size, by engine, `masked`, the number of masked weights, and
    `embed`: two gathered blocks, and the largest weight with its bits, decoded and hashed.

    fsdp: two gathered blocks, one's gradient, and its copy that is sent. bits: weights, theta, and three
    buckets, each at least as large as the largest weight. deepspeed: scores, weights, theta and gradient of a
    block at work and of the next one, and a bucket. For all: 12 MiB for activations and allocators.
    """
    model = make_encoder(WIDTH, depth, "meta")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    masked = sum(sizes[name] for name in select(model, "vit"))
    block = masked // depth
    bucket = max(int(BUCKET_MB * 2**20), 4 * max(sizes.values()))
    slack = 12 * 2**20
    return {
        "masked": masked,
        "embed": 2 * 4 * block + 6 * max(sizes.values()) + slack,
        "fsdp": 4 * 4 * block + slack,
        "bits": 4 * (masked + sum(sizes.values())) + 3 * bucket + slack,
        "deepspeed": 4 * 8 * block + bucket + slack,
    }


def report(bench: Benchmark, name: str, stated: dict[str, int], ranks: dict[int, dict[str, Any]]) -> None:
    """Record an engine's figures.

    Args:
        stated: of `constants`.
        ranks: by world size, each row's largest figures over ranks.
    """
    for row in ranks[1]:
        sizes = [size for size in ranks if row in ranks[size]]
        need = {size: ranks[size][row]["peak"] for size in sizes}
        bench.figure(f"{name}_{row}_peak", need)
        bench.figure(f"{name}_{row}_seconds", {size: ranks[size][row]["seconds"] for size in sizes})
        constant = stated["embed" if row in EMBED_ROWS else name]
        for size in sizes[1:]:
            bound = None if row in CONTROLS else FALLING
            falls = (need[size] - constant) * size / (need[1] - constant)
            bench.figure(f"{name}_{row}_world{size}_falls", falls, max=bound, quick=False)
    for size, rows in ranks.items():
        for row, bound in (("step", EXCESS), ("apart", None)):
            excess = rows[row]["peak"] / rows["resolution"]["peak"]
            bench.figure(f"{name}_{row}_world{size}_over_resolution", excess, max=bound, quick=False)
        share = rows["resume"]["read"] / (8 * stated["masked"] / size)
        bench.figure(f"{name}_resume_world{size}_read_over_share", share, max=EXCESS, quick=False)


def main() -> int:
    bench = Benchmark("engine_scale", __doc__)
    bench.parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    bench.parser.add_argument(
        "--worlds",
        nargs="+",
        type=int,
        default=None,
        help="1 is among them (1 2 4 8)",
    )
    args = bench.parse()
    depth = QUICK_DEPTH if args.quick else DEPTH
    worlds = args.worlds or ((1, 2) if args.quick else (1, 2, 4, 8))
    stated = constants(depth)
    bench.figure("masked", stated["masked"])
    bench.figure("constant", {name: stated[name] for name in (*args.engines, "embed")})
    for name in args.engines:
        ranks: dict[int, dict[str, Any]] = {}
        for size in worlds:
            with tempfile.TemporaryDirectory() as folder:
                kinds = [
                    run_distributed(measure, size, name, depth, folder, kind, timeout=1800, env=ENV)
                    for kind in kinds_of(name, size)
                ]
            ranks[size] = {
                row: {part: max(rank[row][part] for rank in of_ranks) for part in of_ranks[0][row]}
                for of_ranks in kinds
                for row in of_ranks[0]
            }
            print(
                name,
                size,
                {row: f"{v['peak'] / 2**20:.0f} MiB {v['seconds']} s" for row, v in ranks[size].items()},
                file=sys.stderr,
                flush=True,
            )
        report(bench, name, stated, ranks)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
