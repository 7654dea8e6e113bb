"""`selfmask plan`: what each engine needs and costs for a configuration, reckoned without a GPU.

The encoder is built on the meta device (shapes without storage), one forward counts FLOPs and what backward
keeps, and the rest is arithmetic. With N masked weights, F frozen others, w ranks, p and r bytes of a
gathered weight and of a reduced gradient, and x = (w - 1) / w, a rank sends in a step

    ddp         2 x 4 N                          fsdp   x (2 p (N + F) + r N)
    bits        x (r N + N / 8)                  deepspeed  x 8 N (stages 1, 2),  x (2 (8 N + 4 F) + 4 N) (3)

Times are bounds: compute and communication wholly overlapped, or one after the other. Knows nothing of runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfmask_dist.cli.config import add_settings
from selfmask_dist.common import text

if TYPE_CHECKING:  # torch and the configuration are imported when the command runs: `--help` must not wait
    from selfmask_dist.cli.model_size import ModelSize
    from selfmask_dist.config import Config

GIB = 2**30
# images of full size that one sample costs; one elsewhere. A teacher's forward costs a third of a step's
_SMALL = 6 * (96 / 224) ** 2
_CROPS = {
    "nbd": 1,  # nbd.views of them
    "swav": 2 + _SMALL,
    "simclr": 2,
    "moco_v2": 1 + 1 / 3,
    "moco_v3": 2 + 2 / 3,
    "dino": 2 + _SMALL + 2 / 3,
    "slip": 3,
}


@dataclass(frozen=True)
class Hardware:
    """What is assumed of the machines, and of the data.

    pictures: in data.train, which objective.name=nbd keeps a bank of. memory_gib: of a GPU. tflops: what
    training reaches on one. The bandwidths are what one GPU can send, in GB/s.
    """

    pictures: int = 1_000_000
    nodes: int = 1
    gpus_per_node: int = 1
    memory_gib: float = 80.0
    tflops: float = 300.0  # that training reaches, not the data sheet's peak
    within_node_gbs: float = 300.0
    between_nodes_gbs: float = 25.0

    @property
    def world_size(self) -> int:
        """The number of processes, one for each GPU."""
        return self.nodes * self.gpus_per_node

    @property
    def bandwidth(self) -> float:
        """Bytes per second over the slowest link that a rank sends on."""
        return 1e9 * (self.within_node_gbs if self.nodes == 1 else self.between_nodes_gbs)


@dataclass(frozen=True)
class Estimate:
    """What one engine needs: bytes for each rank, seconds for each step."""

    engine: str
    weights: float
    scores: float
    momentum: float
    gradients: float
    gathered: float
    activations: float
    sent: float
    compute_seconds: float
    send_seconds: float

    @property
    def memory(self) -> float:
        """Bytes of a rank, all parts together."""
        parts = (self.weights, self.scores, self.momentum, self.gradients, self.gathered, self.activations)
        return sum(parts)

    @property
    def seconds(self) -> tuple[float, float]:
        """Lower and upper bound of a step: compute and traffic wholly overlapped, or one after the other."""
        both = (self.compute_seconds, self.send_seconds)
        return max(both), sum(both)


def plan(config: Config, hardware: Hardware) -> list[Estimate]:
    """Return an estimate for each engine, for a configuration on given hardware.

    Raises:
        ValueError: no such backbone, or nothing of it is masked.
    """
    from selfmask_dist.cli.model_size import build_on_meta, measure_size

    encoder, image_size = build_on_meta(config)
    mask = config.mask
    size = measure_size(
        encoder,
        image_size,
        mask.include,
        exclude=mask.exclude,
        first_layers=mask.first_layers,
        allow_norm=mask.allow_norm,
    )
    return estimate(size, config, hardware)


def estimate(size: ModelSize, config: Config, hardware: Hardware) -> list[Estimate]:
    """Return the estimates of `plan` for a model that has been measured: the arithmetic alone."""
    engine, w = config.engine, hardware.world_size
    n, f, full = size.masked, size.frozen, 4.0
    gathered_bytes = 2.0 if engine.precision == "bf16" else full
    reduced = 2.0 if engine.reduce_dtype == "bf16" else full
    x = (w - 1) / w
    rows = -(-config.train.global_batch_size // (w * config.train.accumulate))
    crops = _CROPS.get(config.objective.name, 1.0) * (
        config.nbd.views if config.objective.name == "nbd" else 1
    )
    kept = size.kept_with_checkpoints if engine.checkpoint_activations else size.kept_per_image
    activations = kept * rows * crops * gathered_bytes
    passes = 4 if engine.checkpoint_activations else 3
    flops = passes * size.flops_per_image * rows * config.train.accumulate * crops
    compute = flops / (hardware.tflops * 1e12)
    gathers = 2 if engine.reshard_after_forward else 1
    held = 2 * size.largest_block if engine.reshard_after_forward else n + f
    block = min(2 * size.largest_block, n)
    bucket = min(engine.bucket_mb * 2**18, n)  # in numbers
    gathered = gathered_bytes * held + (gathered_bytes + reduced) * min(size.largest_block, n)

    def second(scores_gradients: float, gone: float) -> float:
        """Scores get their gradients when backward is over: they may lie where `gone` bytes were."""
        return max(scores_gradients - gone, 0.0)

    def one(name: str, **needs: float) -> Estimate:
        needs = {"gathered": 0.0, **needs, "activations": activations, "compute_seconds": compute}
        return Estimate(name, **needs, send_seconds=needs["sent"] / hardware.bandwidth)

    buckets = full * n if w > 1 else 0.0  # DistributedDataParallel's copies of gradients
    sending = reduced * min(3 * bucket, n)  # bits: one bucket being filled, two on their way
    zero_gradients = full * max(block, bucket)  # they come as theta goes
    # stage 3 looks ahead by two buckets at most, beside the weights and scores of the module at work
    zero_live = min(2 * bucket + size.largest_block, 2 * (n + f))
    return [
        one("ddp", weights=full * (2 * n + f), scores=full * n, momentum=full * n,
            gradients=full * n + buckets + second(full * n, activations), sent=2 * x * full * n),
        one("fsdp", weights=full * (2 * n + f) / w, scores=full * n / w, momentum=full * n / w,
            gradients=full * n / w + second(full * n / w, gathered + activations), gathered=gathered,
            sent=x * (gathers * gathered_bytes * (n + f) + reduced * n)),
        one("bits", weights=full * (2 * n + f), scores=full * n / w, momentum=full * n / w,
            gradients=reduced * n / w + sending + second(full * n / w, sending + activations),
            sent=x * (reduced * n + n / 8)),
        # theta is made in the forward and kept for backward; partitions have float32 copies of the scores
        one("deepspeed-1", weights=full * (2 * n + f), scores=full * n * (1 + 1 / w), momentum=full * n / w,
            gradients=zero_gradients, sent=2 * x * full * n),
        one("deepspeed-2", weights=full * (2 * n + f), scores=full * n * (1 + 1 / w), momentum=full * n / w,
            gradients=zero_gradients, sent=2 * x * full * n),
        one("deepspeed-3", weights=full * ((n + f) / w + n), scores=2 * full * n / w, momentum=full * n / w,
            gradients=full * n / w + zero_gradients, gathered=full * zero_live,
            sent=x * (2 * full * (2 * n + f) + full * n)),
    ]  # fmt: skip


def bank_bytes(config: Config, hardware: Hardware) -> float:
    """Return what objective.name=nbd keeps and computes with on each rank, beside the model: bytes.

    Of each of its pictures a row, two moments, a gradient and the unit row (of a sampled softmax in place of
    it what backward needs to make the gradient); targets; and for each embedding of the global batch its
    similarity to every picture of the softmax, thrice.
    """
    section = config.nbd
    own = -(-hardware.pictures // hardware.world_size)
    rows = own * (5 * 4 * section.dim + 12 * section.neighbours + 1)
    is_exact = hardware.pictures <= section.exact_up_to
    candidates = own if is_exact else -(-section.sampled // hardware.world_size)
    # of a sample the rows are taken out, and masked where they are targets
    taken = 0 if is_exact else candidates * 3 * 4 * section.dim
    embeddings = config.train.global_batch_size * section.views // config.train.accumulate
    return rows + taken + 3 * 4.0 * embeddings * candidates


def choose(estimates: Sequence[Estimate], memory_gib: float) -> Estimate | None:
    """Return the engine to take, or None where none fits into the memory of a GPU.

    Of those that fit it is the one with the smallest upper bound of time; where several are within 3 % of it,
    the simplest, which stands first.
    """
    fitting = [e for e in estimates if e.memory <= 0.9 * memory_gib * GIB]  # a tenth for the allocator
    if not fitting:
        return None
    best = min(e.seconds[1] for e in fitting)
    return next(e for e in fitting if e.seconds[1] <= 1.03 * best)


def describe(config: Config, hardware: Hardware) -> str:
    """Return the plan as text: what is assumed, a line for each engine, and the engine to take."""
    estimates = plan(config, hardware)
    rows = [
        [
            "engine",
            "weights",
            "scores",
            "momentum",
            "grads",
            "gathered",
            "activ.",
            "GiB/rank",
            "GB sent",
            "step, s",
        ]
    ]
    for e in estimates:
        parts = (e.weights, e.scores, e.momentum, e.gradients, e.gathered, e.activations, e.memory)
        low, high = e.seconds
        times = [f"{e.sent / 1e9:.2f}", f"{low:.4f} - {high:.4f}"]
        rows.append([e.engine, *(f"{part / GIB:.2f}" for part in parts), *times])
    best = choose(estimates, hardware.memory_gib)
    if best is None:
        advice = "no engine fits: use more GPUs, train.accumulate or engine.checkpoint_activations=true"
    else:
        name, _, stage = best.engine.partition("-")
        advice = f"take engine.name={name}" + (f" engine.zero_stage={stage}" if stage else "")
    if config.objective.name == "nbd":
        advice = (
            f"objective.name=nbd: {bank_bytes(config, hardware) / GIB:.2f} GiB on each rank for the bank of "
            f"{hardware.pictures:,} pictures and its softmax, beside the above\n{advice}"
        )
    return (
        f"{config.backbone.name} on {hardware.nodes} x {hardware.gpus_per_node} GPUs of "
        f"{hardware.memory_gib:g} GiB, {config.engine.precision}, "
        f"global batch {config.train.global_batch_size}\n"
        f"assumed: {hardware.tflops:g} TFLOP/s, {hardware.within_node_gbs:g} GB/s within a node, "
        f"{hardware.between_nodes_gbs:g} GB/s between nodes\n\n{text.table(rows)}\n\n{advice}"
    )


def _above_zero(word: str) -> float:
    """Return a number above 0. Raises argparse's error, of which it makes a message."""
    if not 0 < float(word) < float("inf"):
        raise argparse.ArgumentTypeError(f"{word} is not a number above 0")
    return float(word)


_OPTIONS = (
    ("pictures", int, "images in data.train, for objective.name=nbd"),
    ("nodes", text.positive, "machines"),
    ("gpus_per_node", text.positive, "GPUs in each"),
    ("memory_gib", _above_zero, "memory of a GPU"),
    ("tflops", _above_zero, "TFLOP/s that training reaches on one"),
    ("within_node_gbs", _above_zero, "GB/s that one sends inside a node"),
    ("between_nodes_gbs", _above_zero, "GB/s that one sends to other nodes"),
)


def add_command(commands: Any) -> None:
    """Add `plan` to the command line."""
    command = commands.add_parser(
        "plan", help="memory, traffic and time of each engine, reckoned without a GPU"
    )
    add_settings(command)
    for name, kind, meaning in _OPTIONS:
        default = getattr(Hardware, name)
        option = f"--{name.replace('_', '-')}"
        command.add_argument(option, type=kind, default=default, metavar="N", help=f"{meaning} ({default:g})")
    command.set_defaults(command=_plan)


def _plan(options: argparse.Namespace) -> None:
    from selfmask_dist.config import load_config
    from selfmask_dist.config.site import find_site

    hardware = Hardware(**{name: getattr(options, name) for name, _, _ in _OPTIONS})
    config = load_config(options.config, options.overrides, site=find_site(options.site))
    print(describe(config, hardware))
