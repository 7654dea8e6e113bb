"""This package beside the authors' own code: the same masks from the same batches, and the time of a step.

The authors publish github.com/alvitawa/UnsupervisedMasking without a licence, so nothing of it is here:
clone it and give the path of its `subnetworks/subnetworks/submasking.py`. Their `SubmaskedModel` in its
`replace` mode recomputes theta in every forward; scores, threshold and the gradient through the scale are the
same.

    python benchmarks/masking/authors_parity.py --authors .../submasking.py [--quick] --json
"""

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.harness import Benchmark, interleave, ratio_to_first
from selfmask_dist import attach
from selfmask_dist.masking import select

Step = Callable[[int], float]


def batch(step: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 3, 96, 96, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(0, 100, (size,), generator=generator)


def build(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=100, depth=4)
    return model.to(dtype)


def make_steps(
    authors: ModuleType, *, size: int, dtype: torch.dtype, lr: float
) -> tuple[dict[str, Step], Any, Any]:
    """One training step of each, and what holds their masks."""
    ours = build(dtype)
    theirs = copy.deepcopy(ours)
    names = set(select(ours, "vit"))
    masks = attach(ours, include="vit")
    submasked = authors.SubmaskedModel(
        theirs,
        parameter_selection=lambda name, _: "mask" if name in names else "freeze",
        scores_init=authors.normal_scores_init(1.0, 0.0),
        shell_mode="replace",
    )
    own = torch.optim.SGD(masks.parameters(), lr=lr, momentum=0.9)
    masks.bind(own)
    their = torch.optim.SGD(submasked.scores.values(), lr=lr, momentum=0.9)

    def stepper(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        def step(index: int) -> float:
            images, labels = batch(index, size, dtype)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            return loss.item()

        return step

    return {"ours": stepper(ours, own), "authors": stepper(submasked, their)}, masks, submasked


def main() -> int:
    bench = Benchmark("authors_parity", __doc__)
    bench.parser.add_argument("--authors", type=Path, help="their submasking.py")
    options = bench.parse()
    if options.authors is None or not options.authors.is_file():
        bench.skip("needs the authors' submasking.py; clone their repository and give --authors PATH")
        return bench.finish()
    spec = importlib.util.spec_from_file_location("submasking", options.authors)
    assert spec is not None
    assert spec.loader is not None
    authors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(authors)

    steps, masks, submasked = make_steps(authors, size=8, dtype=torch.float64, lr=200.0)
    losses = {name: [step(index) for index in range(20)] for name, step in steps.items()}
    pairs = zip(losses["ours"], losses["authors"], strict=True)
    bench.figure("max_relative_loss_difference", max(abs(a - b) / abs(b) for a, b in pairs), max=1e-9)
    theirs = {name: scores > 0 for name, scores in submasked.scores.items()}
    own = masks.masks()
    different = sum(int((bits ^ theirs[name.replace(".", "_")]).sum()) for name, bits in own.items())
    bench.figure("masked_weights", sum(bits.numel() for bits in own.values()))
    bench.figure("pruned", sum(int((~bits).sum()) for bits in own.values()), min=1)
    bench.figure("different_mask_bits", different, max=0)

    size, rounds = (4, 5) if options.quick else (16, 15)
    steps, _, _ = make_steps(authors, size=size, dtype=torch.float32, lr=1.0)
    counters = iter(range(10**6))
    calls = {name: lambda step=step: step(next(counters)) for name, step in steps.items()}
    ratios = ratio_to_first(interleave(calls, rounds=rounds))
    bench.figure("authors_step_time_over_ours", ratios["authors"], min=1.0)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
