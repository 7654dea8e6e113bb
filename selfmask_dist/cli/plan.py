"""`selfmask plan`: what each engine needs and costs for a configuration, reckoned without a GPU.

The encoder is built on the meta device (shapes without storage), one forward counts FLOPs and what backward
keeps, and the rest is arithmetic. With N masked weights, F frozen others, w ranks, p and r bytes of a
gathered weight and of a reduced gradient, and x = (w - 1) / w, a rank sends in a step

    ddp         2 x 4 N                          fsdp   x (2 p (N + F) + r N)
    bits        x (r N + N / 8)                  deepspeed  x 8 N (stages 1, 2),  x (2 (8 N + 4 F) + 4 N) (3)

Times are bounds: compute and communication wholly overlapped, or one after the other. Knows nothing of runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from selfmask_dist.backbones import find_blocks
from selfmask_dist.config import Config
from selfmask_dist.masking import select

GIB = 2**30
# images of full size that one sample costs; one elsewhere. A teacher's forward costs a third of a step's
_SMALL = 6 * (96 / 224) ** 2
_CROPS = {
    "swav": 2 + _SMALL,
    "simclr": 2,
    "moco_v2": 1 + 1 / 3,
    "moco_v3": 2 + 2 / 3,
    "dino": 2 + _SMALL + 2 / 3,
    "slip": 3,
}


@dataclass(frozen=True)
class Hardware:
    """What is assumed of the machines; bandwidths are what one GPU can send, in GB/s."""

    nodes: int = 1
    gpus_per_node: int = 1
    memory_gib: float = 80.0
    tflops: float = 300.0  # that training reaches, not the data sheet's peak
    within_node_gbs: float = 300.0
    between_nodes_gbs: float = 25.0

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def bandwidth(self) -> float:
        return 1e9 * (self.within_node_gbs if self.nodes == 1 else self.between_nodes_gbs)


@dataclass(frozen=True)
class Shape:
    """What counts of a model, from meta tensors; sizes in numbers, not bytes."""

    masked: int
    frozen: int
    largest_block: int  # weights of it, or of everything outside blocks where that is more
    flops_per_image: float  # of a forward
    kept_per_image: int  # numbers that backward keeps
    kept_with_checkpoints: int  # the same with activation checkpointing


@dataclass(frozen=True)
class Estimate:
    """One engine. Bytes for each rank, seconds for each step."""

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
        parts = (self.weights, self.scores, self.momentum, self.gradients, self.gathered, self.activations)
        return sum(parts)

    @property
    def seconds(self) -> tuple[float, float]:
        """Lower and upper bound of a step."""
        both = (self.compute_seconds, self.send_seconds)
        return max(both), sum(both)


def build_on_meta(config: Config) -> tuple[nn.Module, int]:
    """The encoder without storage, and the side of its images.

    Raises:
        ValueError: the backbone's name is not one of timm's or open_clip's.
    """
    section = config.backbone
    family, _, name = section.name.partition(":")
    kwargs: dict[str, Any] = dict(section.kwargs)
    with torch.device("meta"):
        if family == "timm":
            import timm

            if name.split(".")[0] not in timm.list_models():
                raise ValueError(f"timm has no model {name!r}; see timm.list_models()")
            cfg: dict[str, Any] = vars(timm.create_model(name, num_classes=0))["pretrained_cfg"]
            size = section.image_size or int(cfg["input_size"][-1])
            if section.image_size and "vit" in name:
                kwargs["img_size"] = section.image_size
            return timm.create_model(name, num_classes=0, **kwargs), size
        if family == "open_clip":
            import open_clip

            base = open_clip.get_model_config(name.partition("/")[0])
            if base is None:
                raise ValueError(f"open_clip has no model {name!r}; see open_clip.list_models()")
            clip = open_clip.create_model(name.partition("/")[0], load_weights=False, device="meta", **kwargs)
            return clip.visual, section.image_size or int(base["vision_cfg"]["image_size"])
    raise ValueError(f"backbone {section.name!r} is not timm:<model> or open_clip:<model>[/<tag>]")


def measure_shape(encoder: nn.Module, image_size: int, include: Sequence[str] | str, **options: Any) -> Shape:
    """Count a model on the meta device by one forward in train mode."""
    names = set(select(encoder, include, **options))
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in names)
    sizes = {name: parameter.numel() for name, parameter in encoder.named_parameters()}
    blocks = find_blocks(encoder)
    block_sizes = [sum(p.numel() for p in encoder.get_submodule(name).parameters()) for name in blocks]
    ledger = _Ledger(encoder, blocks)
    rows = 2
    images = torch.empty(rows, 3, image_size, image_size, device="meta")
    encoder.train()
    with FlopCounterMode(display=False) as counter, ledger:
        encoder(images)
    return Shape(
        masked=sum(sizes[name] for name in names),
        frozen=sum(sizes.values()) - sum(sizes[name] for name in names),
        largest_block=max([*block_sizes, sum(sizes.values()) - sum(block_sizes)]),
        flops_per_image=counter.get_total_flops() / rows,
        kept_per_image=ledger.total() // rows,
        kept_with_checkpoints=ledger.with_checkpoints() // rows,
    )


class _Ledger(torch.autograd.graph.saved_tensors_hooks):
    """Numbers that autograd keeps, block by block; a tensor kept twice counts once."""

    def __init__(self, encoder: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__(self._keep, lambda tensor: tensor)
        self._parameters = {id(p) for p in encoder.parameters()}
        self._seen: dict[int, Tensor] = {}  # by storage; holds them, so that no id is used twice
        self._kept: dict[str, int] = {"": 0}
        self._inputs: dict[str, int] = {}
        self._block = ""
        for name in blocks:
            module = encoder.get_submodule(name)
            module.register_forward_pre_hook(lambda _, args, name=name: self._enter(name, args))
            module.register_forward_hook(lambda *_: self._enter("", ()))

    def total(self) -> int:
        return sum(self._kept.values())

    def with_checkpoints(self) -> int:
        inside = [n for name, n in self._kept.items() if name]
        return self._kept[""] + sum(self._inputs.values()) + max(inside, default=0)

    def _enter(self, name: str, args: tuple[Any, ...]) -> None:
        self._block = name
        if name:
            self._kept.setdefault(name, 0)
            self._inputs[name] = sum(a.numel() for a in args if isinstance(a, Tensor))

    def _keep(self, tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if id(base) not in self._parameters and id(base) not in self._seen:
            self._seen[id(base)] = base
            self._kept[self._block] += tensor.numel()
        return tensor


def plan(config: Config, hardware: Hardware) -> list[Estimate]:
    """An estimate for each engine, for a configuration on given hardware.

    Raises:
        ValueError: no such backbone, or nothing of it is masked.
    """
    encoder, image_size = build_on_meta(config)
    mask = config.mask
    shape = measure_shape(
        encoder,
        image_size,
        mask.include,
        exclude=mask.exclude,
        first_layers=mask.first_layers,
        allow_norm=mask.allow_norm,
    )
    return estimate(shape, config, hardware)


def estimate(shape: Shape, config: Config, hardware: Hardware) -> list[Estimate]:
    """The arithmetic of `plan`, for a model that has been measured."""
    engine, w = config.engine, hardware.world_size
    n, f, full = shape.masked, shape.frozen, 4.0
    gathered_bytes = 2.0 if engine.precision == "bf16" else full
    reduced = 2.0 if engine.reduce_dtype == "bf16" else full
    x = (w - 1) / w
    rows = -(-config.train.global_batch_size // (w * config.train.accumulate))
    crops = _CROPS.get(config.objective.name, 1.0)
    kept = shape.kept_with_checkpoints if engine.checkpoint_activations else shape.kept_per_image
    activations = kept * rows * crops * gathered_bytes
    passes = 4 if engine.checkpoint_activations else 3
    flops = passes * shape.flops_per_image * rows * config.train.accumulate * crops
    compute = flops / (hardware.tflops * 1e12)
    gathers = 2 if engine.reshard_after_forward else 1
    held = 2 * shape.largest_block if engine.reshard_after_forward else n + f
    block = min(2 * shape.largest_block, n)
    bucket = min(engine.bucket_mb * 2**18, n)  # in numbers
    gathered = gathered_bytes * held + (gathered_bytes + reduced) * min(shape.largest_block, n)

    def second(scores_gradients: float, gone: float) -> float:
        """Scores get their gradients when backward is over: they may lie where `gone` bytes were."""
        return max(scores_gradients - gone, 0.0)

    def one(name: str, *, weights: float, scores: float, momentum: float, gradients: float, sent: float,
            gathered: float = 0.0) -> Estimate:  # fmt: skip
        return Estimate(
            name,
            weights,
            scores,
            momentum,
            gradients,
            gathered,
            activations,
            sent,
            compute,
            sent / hardware.bandwidth,
        )

    buckets = full * n if w > 1 else 0.0  # DistributedDataParallel's copies of gradients
    sending = reduced * min(3 * bucket, n)  # bits: one bucket being filled, two on their way
    zero_gradients = full * max(block, bucket)  # they come as theta goes
    # stage 3 looks ahead by two buckets at most, beside the weights and scores of the module at work
    zero_live = min(2 * bucket + shape.largest_block, 2 * (n + f))
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


def choose(estimates: Sequence[Estimate], memory_gib: float) -> Estimate | None:
    """The engine to take: of those that fit, the least upper bound of time; the simpler one where alike."""
    fitting = [e for e in estimates if e.memory <= 0.9 * memory_gib * GIB]  # a tenth for the allocator
    if not fitting:
        return None
    best = min(e.seconds[1] for e in fitting)
    return next(e for e in fitting if e.seconds[1] <= 1.03 * best)


def describe(config: Config, hardware: Hardware) -> str:
    """The plan as text."""
    estimates = plan(config, hardware)
    lines = [
        f"{config.backbone.name} on {hardware.nodes} x {hardware.gpus_per_node} GPUs of "
        f"{hardware.memory_gib:g} GiB, {config.engine.precision}, "
        f"global batch {config.train.global_batch_size}",
        f"assumed: {hardware.tflops:g} TFLOP/s, {hardware.within_node_gbs:g} GB/s within a node, "
        f"{hardware.between_nodes_gbs:g} GB/s between nodes",
        "",
        f"{'engine':<12}{'weights':>9}{'scores':>9}{'momentum':>9}{'grads':>9}{'gathered':>9}{'activ.':>9}"
        f"{'GiB/rank':>10}{'GB sent':>9}{'step, s':>18}",
    ]
    for e in estimates:
        parts = (e.weights, e.scores, e.momentum, e.gradients, e.gathered, e.activations)
        low, high = e.seconds
        lines.append(
            f"{e.engine:<12}" + "".join(f"{part / GIB:9.2f}" for part in parts)
            + f"{e.memory / GIB:10.2f}{e.sent / 1e9:9.2f}{low:9.4f} - {high:.4f}"
        )  # fmt: skip
    best = choose(estimates, hardware.memory_gib)
    if best is None:
        lines.append(
            "\nno engine fits: use more GPUs, train.accumulate or engine.checkpoint_activations=true"
        )
    else:
        name, _, stage = best.engine.partition("-")
        keys = f"engine.name={name}" + (f" engine.zero_stage={stage}" if stage else "")
        lines.append(f"\ntake {keys}")
    return "\n".join(lines)
