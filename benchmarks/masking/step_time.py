"""What a training step costs under masks, relative to full fine-tuning of the same parameters.

Variants, interleaved in one run: `full` (SGD with momentum on the weights), `masked` (theta as the leaf, this
package) and `parametrized` (each masked parameter recomputed from scores in the forward through
torch.nn.utils.parametrize, the plain way, kept here for comparison). ViT-S/16 and ResNet-50, one and four
views per step, random weights, 32 images of 128 pixels in a step.

    python benchmarks/masking/step_time.py [--quick] --json
"""

import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.harness import Benchmark, interleave, peak_memory, ratio_to_first
from selfmask_dist import attach

MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "vit": ("vit_small_patch16_224", {"img_size": 128}, "vit"),
    "resnet": ("resnet50", {}, "resnet"),
}
VARIANTS = ("full", "masked", "parametrized")
IMAGE_SIZE = 128


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor) -> Tensor:
        return (scores > 0).to(scores.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class ScaledMask(nn.Module):
    """Scores to theta, recomputed in every forward."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", weight.detach().clone())

    def forward(self, scores: Tensor) -> Tensor:
        mask = StraightThrough.apply(scores)
        return self.weight * torch.sqrt(1 / mask.mean()) * mask


def make_step(kind: str, variant: str, *, views: int, batch_size: int) -> Callable[[], None]:
    """A closure that makes one training step."""
    name, options, preset = MODELS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options)
    masks = attach(model, include=preset)
    names = [entry.name for entry in masks.entries]
    if variant != "masked":
        masks.detach()
    parameters = dict(model.named_parameters())
    if variant == "masked":
        trained = list[Tensor](masks.parameters())
    elif variant == "full":
        trained = [parameters[n].requires_grad_(True) for n in names]
    else:
        trained = [_parametrize(model, n) for n in names]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)
    if variant == "masked":
        masks.bind(optimizer)
    images = [torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE) for _ in range(views)]
    labels = torch.arange(batch_size)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        loss = torch.stack([nn.functional.cross_entropy(model(view), labels) for view in images]).sum()
        loss.backward()
        optimizer.step()

    return step


def _parametrize(model: nn.Module, name: str) -> Tensor:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    weight = getattr(module, attribute).detach().clone()
    setattr(module, attribute, nn.Parameter(torch.ones_like(weight)))
    parametrize.register_parametrization(module, attribute, ScaledMask(weight), unsafe=True)
    scores = module.get_parameter(f"parametrizations.{attribute}.original")
    assert scores.requires_grad
    return scores


def main() -> int:
    bench = Benchmark("step_time", __doc__)
    options = bench.parse()
    images, rounds = (4, 3) if options.quick else (32, 15)  # images in a step, over all views
    limits = {("vit", 1): 1.03, ("resnet", 1): 1.05, ("vit", 4): 1.05, ("resnet", 4): 1.05}
    for (kind, views), limit in limits.items():
        key, batch_size = f"{kind}_{views}_views", images // views
        steps = {v: make_step(kind, v, views=views, batch_size=batch_size) for v in VARIANTS}
        times = interleave(steps, rounds=rounds, warmup=1)
        del steps
        bench.figure(f"{key}_seconds", {v: bench.median(t) for v, t in times.items()})
        ratios = ratio_to_first(times)
        # four images a step are too little work for the bounds to mean anything
        bench.figure(f"{key}_masked_over_full", ratios["masked"], max=limit, quick=False)
        bench.figure(f"{key}_parametrized_over_full", ratios["parametrized"])
        # what means something at any size: this way beats the plain one
        bench.figure(f"{key}_masked_over_parametrized", ratios["masked"] / ratios["parametrized"], max=1.0)
        if options.quick:
            continue
        memory = {
            v: peak_memory(_measure_memory, kind, v, views=views, batch_size=batch_size) for v in VARIANTS
        }
        bench.figure(f"{key}_peak_mib", {v: m / 2**20 for v, m in memory.items()})
        bench.figure(f"{key}_masked_memory_over_full", memory["masked"] / memory["full"])
    return bench.finish()


def _measure_memory(kind: str, variant: str, *, views: int, batch_size: int) -> None:
    step = make_step(kind, variant, views=views, batch_size=batch_size)
    for _ in range(3):
        step()


if __name__ == "__main__":
    sys.exit(main())
