"""What the tests and benchmarks of engines run on every rank: a tiny model trained for some steps."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfmask_dist.backbones.any_size import accept_sizes
from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.data import Batch
from selfmask_dist.masking import attach, measure
from selfmask_dist.objectives.parts import encode_views
from selfmask_dist.parallel import (
    Engine,
    EngineState,
    World,
    build_engine,
    synchronise_batchnorm,
)
from tests.support.models import make

OF_STEP = ("accumulate", "clip_norm", "score_step")
ROWS = 8  # of the global batch; divisible by every world size used here
CLASSES = 5
BLOCKS = {
    "timm_vit": ("blocks.0", "blocks.1"),
    "odd_vit": ("blocks.0", "blocks.1"),
    "open_clip": ("transformer.resblocks.0",),
    "conv": (),
}
WIDTHS = {"odd_vit": 26, "timm_vit": 24, "open_clip": 16, "conv": 16}


@dataclass(frozen=True)
class Case:
    """One training run; `options` are those of `engine_keys`."""

    family: str = "timm_vit"
    engine: str = "ddp"
    options: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    steps: int = 4
    lr: float = 20.0
    views: int = 1
    sides: tuple[int, ...] = ()  # of the views in pixels, by resolution: an encoder for several sizes
    batchnorm: str = "frozen"
    masked_head: bool = False
    is_reversed: bool = False  # the same rows in another order: equal but for rounding
    start: int = 0  # first step: batches are a function of the step
    state: EngineState | None = None


@dataclass
class Outcome:
    losses: list[float]
    masks: dict[str, Tensor]
    state: EngineState
    frozen_before: str
    frozen_after: str
    active: float


class Step(nn.Module):
    """Batch -> (rank's share of the loss, metrics), with a linear head on the encoder."""

    def __init__(self, encoder: nn.Module, width: int, dtype: torch.dtype, batchnorm: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, CLASSES, dtype=dtype)
        generator = torch.Generator().manual_seed(5)
        for parameter in self.head.parameters():
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        self.train()
        if batchnorm == "frozen":
            encoder.eval()

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = torch.zeros((), dtype=self.head.weight.dtype, device=batch.labels.device)
        is_mixed = len({view.shape for view in batch.views}) > 1
        features = encode_views(self.encoder, batch.views).chunk(len(batch.views)) if is_mixed else None
        for index, view in enumerate(batch.views):
            feature = self.encoder(view) if features is None else features[index]
            logits = self.head(feature.to(self.head.weight.dtype)) * 3
            losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
            loss = loss + (batch.weights.to(losses.dtype) * losses).sum() / batch.global_count
        return loss, {"loss": loss.detach()}


def batch_of(
    step: int,
    rank: int,
    size: int,
    *,
    dtype: torch.dtype,
    views: int = 1,
    sides: Sequence[int] = (),
    is_reversed: bool = False,
) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    images = tuple(
        torch.randn(ROWS, 3, side, side, generator=generator, dtype=torch.float64).to(dtype)[rank::size]
        for side in sides or [16] * views
    )
    labels = torch.randint(0, CLASSES, (ROWS,), generator=generator)[rank::size]
    ids = torch.arange(ROWS)[rank::size]
    if is_reversed:
        images, labels, ids = tuple(view.flip(0) for view in images), labels.flip(0), ids.flip(0)
    return Batch(images, labels, torch.ones(len(labels)), ids, ROWS)


def world_here() -> World:
    if not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def make_model(case: Case) -> tuple[nn.Module, str]:
    if case.family != "odd_vit":
        return make(case.family, dtype=case.dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # 26 and 78 rows do not divide by 4
        options: dict[str, Any] = {"embed_dim": 26, "depth": 2, "num_heads": 2}
        model = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=0, **options)
    return model.to(case.dtype), "vit"


def engine_keys(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `build_engine` for keys of the engine section and those of a step."""
    of_step: dict[str, Any] = {key: options[key] for key in OF_STEP if key in options}
    of_engine = {key: value for key, value in options.items() if key not in of_step}
    return {"config": EngineConfig.model_validate({"name": name, **of_engine}), **of_step}


def build(case: Case) -> tuple[Engine, Any]:
    model, preset = make_model(case)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if case.sides:
        accept_sizes(model, case.sides, name=case.family)
    if case.batchnorm == "sync":
        synchronise_batchnorm(model)
    step = Step(model, WIDTHS[case.family], case.dtype, case.batchnorm)
    engine = build_engine(
        step,
        encoder=model,
        blocks=BLOCKS[case.family],
        world=world_here(),
        **engine_keys(case.engine, case.options),
    )
    masks = engine.attach(model, attach, **{"include": preset, **case.masks})
    scores = list(masks.parameters())  # none where masks are fixed
    groups = [{"name": "scores", "params": scores, "lr": case.lr}] if scores else []
    if case.masked_head:
        head_masks = engine.attach(step.head, attach, include="weight")
        groups.append({"name": "head", "params": list(head_masks.parameters()), "lr": case.lr})
    else:
        groups.append({"name": "head", "params": list(step.head.parameters()), "lr": 0.05})
    engine.start(torch.optim.SGD(groups, momentum=0.9))
    return engine, masks


def run_case(case: Case) -> Outcome:
    """Train on this rank; every rank returns the same."""
    engine, masks = build(case)
    before = frozen_hash(masks)
    if case.state is not None:
        engine.load_state(case.state)
    losses = []
    for step in range(case.start, case.start + case.steps):
        rank, size = engine.world.rank, engine.world.size
        batch = batch_of(
            step,
            rank,
            size,
            dtype=case.dtype,
            views=case.views,
            sides=case.sides,
            is_reversed=case.is_reversed,
        )
        metrics = engine.forward_backward(batch)
        losses.append(engine.world.sum(metrics["loss"].clone()).item())
        engine.step()
    state = engine.state()
    after = frozen_hash(masks)
    return Outcome(
        losses=losses,
        masks={name: mask.clone() for name, mask in masks.masks().items()},
        state=state,
        frozen_before=before,
        frozen_after=after,
        active=measure(masks).active,
    )


def frozen_hash(masks: Any) -> str:
    digest = hashlib.sha256()
    for name, weight in masks.weights().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()


def difference(a: Outcome, b: Outcome) -> tuple[float, float]:
    """Largest relative difference of losses, and the share of mask bits that differ."""
    loss = max(abs(x - y) / abs(y) for x, y in zip(a.losses, b.losses, strict=True))
    bits = sum(int((a.masks[name] ^ b.masks[name]).sum()) for name in b.masks)
    return loss, bits / sum(mask.numel() for mask in b.masks.values())


def run_cases(cases: list[Case]) -> list[Outcome]:
    return [run_case(case) for case in cases]


def check_equal(outcome: Outcome, reference: Outcome, *, loss: float = 1e-12, bits: float = 0.0) -> None:
    different_loss, different_bits = difference(outcome, reference)
    assert different_loss <= loss, (outcome.losses, reference.losses)
    assert different_bits <= bits
    assert outcome.frozen_before == outcome.frozen_after == reference.frozen_before
    assert abs(outcome.active - reference.active) <= bits + 1e-12
    assert set(outcome.state.parameters) == set(reference.state.parameters), "only what is trained is saved"
    assert set(outcome.state.momentum) == set(reference.state.momentum)


def reference_of(case: Case) -> Outcome:
    """The same training on one process, engine ddp, without what must not change results."""
    options = {key: value for key, value in case.options.items() if key in ("clip_norm", "score_step")}
    batchnorm = "train" if case.batchnorm == "sync" else case.batchnorm
    return run_case(Case(**{**vars(case), "engine": "ddp", "options": options, "batchnorm": batchnorm}))


class Tiny(nn.Module):
    """Tensors with 5, 3, 2 and 1 rows, and a 0-row share for some rank of four."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 3)
        self.third = nn.Linear(3, 2, bias=False)
        self.last = nn.Linear(2, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = batch.views[0].mean(dim=(2, 3))
        out = self.last(self.third(self.second(self.first(pixels).tanh()).tanh()).tanh())
        loss = (out.squeeze(1) - batch.labels).square().sum() / batch.global_count
        return loss, {"loss": loss.detach()}


def train_tiny(engine_name: str, dtype: torch.dtype = torch.float64, **options: Any) -> list[float]:
    """Losses of `Tiny`, every parameter of it masked."""
    torch.manual_seed(3)
    model = Tiny().to(dtype)
    world = world_here()
    engine = build_engine(model, encoder=model, world=world, **engine_keys(engine_name, options))
    masks = engine.attach(model, attach, include="*")
    engine.start(torch.optim.SGD(masks.parameters(), lr=0.5, momentum=0.9))
    losses = []
    for step in range(5):
        metrics = engine.forward_backward(batch_of(step, world.rank, world.size, dtype=dtype))
        losses.append(world.sum(metrics["loss"].clone()).item())
        engine.step()
    return losses
