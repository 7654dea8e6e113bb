"""What `engine.precision=bf16` and `engine.channels_last` save of a masked training step on this device.

A ResNet-50 and a ViT-S/16 under masks, 16 images of 96 pixels in a step, random weights; the four ways in
turn, as ratios to float32 with images as they come.

    python benchmarks/masking/precision.py [--quick] --json
"""

import sys
from collections.abc import Callable

import timm
import torch

from benchmarks.harness import Benchmark, interleave, ratio_to_first
from selfmask_dist import attach

MODELS = {"resnet50": ("resnet50", {}, "resnet"), "vit_s": ("vit_small_patch16_224", {"img_size": 96}, "vit")}
WAYS = {
    "float32": (torch.float32, torch.contiguous_format),
    "float32, channels last": (torch.float32, torch.channels_last),
    "bf16": (torch.bfloat16, torch.contiguous_format),
    "bf16, channels last": (torch.bfloat16, torch.channels_last),
}


def make_step(kind: str, way: str, *, batch_size: int, device: torch.device) -> Callable[[], None]:
    """A closure that makes one training step."""
    name, options, preset = MODELS[kind]
    dtype, layout = WAYS[way]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options).to(device)  # type: ignore[arg-type]
    masks = attach(model, include=preset)
    optimizer = torch.optim.SGD(masks.parameters(), lr=1e-4, momentum=0.9)
    masks.bind(optimizer)
    images = torch.randn(batch_size, 3, 96, 96, device=device).contiguous(memory_format=layout)
    labels = torch.arange(batch_size, device=device)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            features = model(images)
        torch.nn.functional.cross_entropy(features.float(), labels).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> int:
    bench = Benchmark("precision", __doc__)
    options = bench.parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch_size, rounds = (4, 3) if options.quick else (16, 9)
    bench.figure("device", str(device))
    for kind in MODELS:
        steps = {way: make_step(kind, way, batch_size=batch_size, device=device) for way in WAYS}
        times = interleave(steps, rounds=rounds, warmup=1)
        bench.figure(f"{kind}, seconds", {way: bench.median(found) for way, found in times.items()})
        for way, ratio in ratio_to_first(times).items():
            if way != "float32":
                bench.figure(f"{kind}, {way} / float32", ratio)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
