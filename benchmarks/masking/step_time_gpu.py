"""Masked against full fine-tuning on a GPU: step time and memory for ViT-B/32, ViT-L/14 and ResNet-50.

In bf16 autocast, compiled and not, three variants in one run and in turns: `full` (SGD with momentum on the
same weights), `masked` (this package) and `replaced` (theta computed from the scores in every forward and put
in the place of the parameters, the semantics of the authors' code). One process, random weights, images of
224 pixels. Without a GPU only `--quick` runs, with small models on the CPU: it shows that all of this works,
and its figures mean nothing.

    python -m benchmarks.masking.step_time_gpu [--batch-size 64] [--quick] --json
"""

import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.harness import Benchmark, interleave, peak_memory, ratio_to_first
from benchmarks.masking.step_time import ScaledMask
from selfmask_dist import attach

MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "vit_b32": ("vit_base_patch32_224", {}, "vit"),
    "vit_l14": ("vit_large_patch14_224", {}, "vit"),
    "rn50": ("resnet50", {}, "resnet"),
}
TINY: dict[str, tuple[str, dict[str, Any], str]] = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2}, "vit"),
    "resnet": ("test_resnet", {}, "resnet"),
}
VARIANTS = ("full", "masked", "replaced")


class Replaced(nn.Module):
    """A model whose chosen parameters are replaced by theta, made from their scores, in every forward."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.names = names
        parameters = dict(model.named_parameters())
        self.masks = nn.ModuleList(ScaledMask(parameters[name]) for name in names)
        self.scores = nn.ParameterList(torch.ones_like(parameters[name]) for name in names)

    def forward(self, images: Tensor) -> Tensor:
        pairs = zip(self.names, self.masks, self.scores, strict=True)
        thetas = {name: mask(scores) for name, mask, scores in pairs}
        output: Tensor = torch.func.functional_call(self.model, thetas, (images,))
        return output


def make_step(
    model_of: tuple[str, dict[str, Any], str], variant: str, *, size: int, side: int, compiled: bool
) -> Callable[[], None]:
    """A closure that makes one training step."""
    name, options, preset = model_of
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=0, **options).to(device).train()
    masks = attach(model, include=preset)
    names = [entry.name for entry in masks.entries]
    if variant == "masked":
        trained = list[Tensor](masks.parameters())
    else:
        masks.detach()
        if variant == "full":
            parameters = dict(model.named_parameters())
            trained = [parameters[n].requires_grad_(True) for n in names]
        else:
            model = Replaced(model, names)
            trained = list[Tensor](model.scores)
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)
    if variant == "masked":
        masks.bind(optimizer)
    # on a CPU only the tracing, without its minutes of C++
    backend = "inductor" if device.type == "cuda" else "eager"
    forward: Any = torch.compile(model, backend=backend) if compiled else model
    images = torch.randn(size, 3, side, side, device=device)
    labels = torch.arange(size, device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(forward(images).float(), labels)
        loss.backward()
        optimizer.step()

    return step


def measure_memory(model_of: tuple[str, dict[str, Any], str], variant: str, **options: Any) -> None:
    step = make_step(model_of, variant, **options)
    for _ in range(3):
        step()


def main() -> int:
    bench = Benchmark("step_time_gpu", __doc__)
    bench.parser.add_argument("--batch-size", type=int, default=64, help="images in a step (default: 64)")
    options = bench.parse()
    has_gpu = torch.cuda.is_available()
    if not (has_gpu or options.quick):
        bench.skip("needs a GPU; --quick runs small models on the CPU")
        return bench.finish()
    models, rounds = (TINY, 2) if options.quick else (MODELS, 30)
    for key, model_of in models.items():
        for mode, compiled in (("eager", False), ("compiled", True)):
            common = {"size": 4, "side": 32} if options.quick else {"size": options.batch_size, "side": 224}
            steps = {v: make_step(model_of, v, compiled=compiled, **common) for v in VARIANTS}
            times = interleave(steps, rounds=rounds, warmup=1 if options.quick else 5)
            del steps
            bench.figure(f"{key}_{mode}_seconds", {v: bench.median(t) for v, t in times.items()})
            ratios = ratio_to_first(times)
            label = f"{key}_{mode}_masked"
            bench.figure(f"{label}_over_full", ratios["masked"], max=1.03, quick=False)
            bench.figure(f"{label}_over_replaced", ratios["masked"] / ratios["replaced"])
            if options.quick and compiled:  # each needs a process of its own, which takes seconds to start
                continue
            memory = {
                v: peak_memory(measure_memory, model_of, v, compiled=compiled, **common) for v in VARIANTS
            }
            bench.figure(f"{key}_{mode}_peak_mib", {v: m / 2**20 for v, m in memory.items()})
            ratio = memory["masked"] / max(memory["full"], 1)
            bench.figure(f"{label}_memory_over_full", ratio, max=1.1, quick=False)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
