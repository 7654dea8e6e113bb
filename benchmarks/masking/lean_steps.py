"""The training steps that `lean` compares: each mode through the engine, beside full fine-tuning and LoRA."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from selfmask_dist.backbones import find_blocks
from selfmask_dist.cli.plan.hardware import Hardware
from selfmask_dist.cli.plan.model_size import measure_size
from selfmask_dist.cli.plan.steps import estimate
from selfmask_dist.config import Config, load_config
from selfmask_dist.data import Batch
from selfmask_dist.masking import attach
from selfmask_dist.parallel import World, build_engine
from selfmask_dist.parallel.lean.sgd import LeanSGD
from selfmask_dist.training.finetune import add_lora, choose_weights

with contextlib.suppress(ImportError):  # what it takes is not to count as LoRA's
    import peft  # noqa: F401

_BF16 = ("engine.precision=bf16", "eval.precision=bf16")
_HALF = (*_BF16, "engine.weights=bf16")
MODES: dict[str, tuple[str, ...]] = {
    "masked float32": (),
    "masked bf16 compute": _BF16,
    "masked bf16 weights": _HALF,
    "masked bf16 weights, momentum": (*_HALF, "engine.momentum=bf16"),
    "masked bf16 weights, momentum, scores": (*_HALF, "engine.momentum=bf16", "engine.scores=bf16"),
    "full sgd": ("method=finetune", *_BF16),
    "full adamw": ("method=finetune", "optim.kind=adamw", *_BF16),
    "lora": ("method=finetune", "finetune.train=lora", *_BF16),
}
# bytes for each masked weight: W + theta + scores + momentum + gradient; of full fine-tuning the weight,
# moments, gradient
FLOORS = {
    "masked float32": 4 + 4 + 4 + 4 + 4,
    "masked bf16 compute": 4 + 4 + 4 + 4 + 4,
    "masked bf16 weights": 2 + 2 + 4 + 4,
    "masked bf16 weights, momentum": 2 + 2 + 4 + 2,
    "masked bf16 weights, momentum, scores": 2 + 2 + 2 + 2,
    "full sgd": 4 + 4 + 4,
    "full adamw": 4 + 8 + 4,
    "lora": 4,
}


@dataclass(frozen=True)
class Model:
    """A timm model, what is masked of it, and its images' side in pixels."""

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    include: str = "vit"
    side: int = 64

    def build(self) -> nn.Module:
        """Return the model with random weights and without a head."""
        size: dict[str, Any] = {"img_size": self.side} if self.include == "vit" else {}
        model: nn.Module = timm.create_model(self.name, num_classes=0, **size, **self.kwargs)
        return model


SMALL = Model("vit_small_patch16_224")
TINY = Model("vit_tiny_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 2}, side=32)


class Step(nn.Module):
    """Batch -> (loss, metrics)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = nn.functional.cross_entropy(self.encoder(batch.views[0]).float(), batch.labels)
        return loss, {"loss": loss.detach()}


def config_of(mode: str, model: Model, *, size: int, more: Sequence[str] = ()) -> Config:
    """Return the configuration of a mode; `more` are keys of its own."""
    keys = [
        f"train.global_batch_size={size}",
        f"backbone.name=timm:{model.name}",
        f"mask.include={model.include}",
    ]
    return load_config(None, [*keys, *MODES[mode], *more])


def make_step(
    mode: str, model: Model = SMALL, *, size: int = 1, device: str = "cpu", more: Sequence[str] = ()
) -> Callable[[], None]:
    """Return a closure that makes one training step of a mode, with `size` images."""
    config = config_of(mode, model, size=size, more=more)
    torch.manual_seed(0)
    encoder = model.build().to(device).requires_grad_(False).train()
    if mode == "lora":
        add_lora(encoder, rank=8, alpha=16.0)
    engine = build_engine(
        Step(encoder),
        encoder=encoder,
        blocks=find_blocks(encoder),
        world=World(device=torch.device(device)),
        config=config.engine,
    )
    group: dict[str, Any] = {"lr": 1e-4}
    if mode.startswith("masked"):
        masks = engine.attach(encoder, attach, include=model.include)
        group |= {"params": list(masks.parameters()), "in_bf16": config.engine.momentum == "bf16"}
    else:
        kind: Literal["all", "lora"] = "lora" if mode == "lora" else "all"
        group["params"] = engine.free(encoder, choose_weights(encoder, kind))
    optimizer: torch.optim.Optimizer
    if config.optim.kind == "adamw":
        optimizer = torch.optim.AdamW([group])
    elif "bf16" in (config.engine.weights, config.engine.momentum):
        optimizer = LeanSGD([group], momentum=0.9, seed=0)
    else:
        optimizer = torch.optim.SGD([group], momentum=0.9)
    engine.start(optimizer)
    images = torch.randn(size, 3, model.side, model.side, device=device)
    labels = torch.arange(size, device=device)
    batch = Batch((images,), labels, torch.ones(size, device=device), labels, size)

    def step() -> None:
        engine.forward_backward(batch)
        engine.step()

    return step


def run_steps(mode: str, model: Model, **options: Any) -> None:
    """Make three steps of a mode."""
    step = make_step(mode, model, **options)
    for _ in range(3):
        step()


def planned_bytes(mode: str, model: Model, *, size: int = 1) -> tuple[float, int]:
    """Return what the planner says a process needs in a mode, and the number of masked weights."""
    found = measure_size(model.build().to("meta"), model.side, model.include)
    config = config_of(mode, model, size=size)
    first = estimate(found, config, Hardware(gpus_per_node=1), image_size=model.side)[0]
    assert first.engine == "ddp"
    return first.memory, found.masked
