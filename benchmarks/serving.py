"""Many masks on one resident backbone: time of a swap, of mixed batches, and memory of a mask.

A swap puts another mask on in place: from its decoded bits, and from its coded ones. It is compared with what
one does without masks, loading the other task's state dict: from memory (`load_state_dict`), and from its
file (safetensors). A mixed batch names a mask for each image and is grouped by mask; against it, the images
go through one by one, each with its swap. Masks are made up: 0.7 % of the weights pruned at random, as many
as in trained masks of a ViT.

    python benchmarks/serving.py [--masks 64] [--device cuda] [--quick] --json
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.harness import Benchmark, interleave
from selfmask_dist.artifact import Mask
from selfmask_dist.backbones import fingerprint, load_backbone
from selfmask_dist.bank import MaskBank
from selfmask_dist.masking import select

PRUNED = 0.007


def random_mask(encoder: nn.Module, names: list[str], seed: int, weights_fingerprint: str) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: encoder.get_parameter(name).shape for name in names}
    bits = {name: torch.rand(shape, generator=generator) >= PRUNED for name, shape in shapes.items()}
    return Mask(bits, weights_fingerprint)


def main() -> int:
    bench = Benchmark("serving", __doc__)
    bench.parser.add_argument("--masks", type=int, default=64, help="in the mixed batch")
    bench.parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    bench.parser.add_argument("--rounds", type=int, default=7)
    options = bench.parse()
    name = "timm:vit_tiny_patch16_224" if options.quick else "timm:vit_base_patch32_224"
    num_masks = 8 if options.quick else options.masks
    encoder = load_backbone(name, pretrained=False).encoder
    names = select(encoder, include="vit")
    state = {key: value.clone() for key, value in encoder.state_dict().items()}
    weights = fingerprint((key, encoder.get_parameter(key)) for key in names)
    encoder.to(options.device)
    bank = MaskBank(encoder, cache_mib=64 * num_masks)
    for seed in range(num_masks):
        bank.add(f"mask-{seed}", random_mask(encoder, names, seed, weights))
    images = torch.randn(num_masks, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(
        options.device
    )
    turn = [0]

    def swap() -> None:
        turn[0] += 1
        with bank.under(f"mask-{turn[0] % num_masks}"):
            pass

    def swap_coded() -> None:
        bank._decoded.clear()
        swap()

    every = [f"mask-{seed}" for seed in range(num_masks)]
    half = [f"mask-{seed % (num_masks // 8)}" for seed in range(num_masks)]

    def one_by_one(given: list[str]) -> None:
        for row, mask in enumerate(given):
            bank.embed(images[row : row + 1], mask)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.safetensors"
        save_file(state, path)
        seconds = interleave(
            {
                "load_state_dict": lambda: encoder.load_state_dict(state),
                "load_file": lambda: encoder.load_state_dict(load_file(path, device=options.device)),
                "swap_coded": swap_coded,
                "swap_decoded": swap,  # those of the mixed batches below are decoded by now
            },
            rounds=options.rounds,
        )
        bank.embed(images, every)  # all decoded
        seconds |= interleave(
            {
                "swap_decoded": swap,
                "load_state_dict": lambda: encoder.load_state_dict(state),
                "mixed, a mask each": lambda: bank.embed(images, every),
                "one by one, a mask each": lambda: one_by_one(every),
                "mixed, 8 images a mask": lambda: bank.embed(images, half),
                "one by one, 8 images a mask": lambda: one_by_one(half),
            },
            rounds=options.rounds,
        )
    medians = {key: bench.median(values) for key, values in seconds.items()}
    num_weights = sum(encoder.get_parameter(key).numel() for key in names)
    bench.figure("backbone", name)
    bench.figure("device", options.device)
    bench.figure("masks", num_masks)
    for key, value in medians.items():
        bench.figure(f"{key}_ms", 1e3 * value)
    on_gpu = options.device != "cpu"
    bench.target("swap_decoded_ms", max=1.0 if on_gpu else None)
    bench.figure("swap_decoded / load_state_dict", medians["swap_decoded"] / medians["load_state_dict"])
    bench.figure("swap_decoded / load_file", medians["swap_decoded"] / medians["load_file"], max=1.0)
    bench.figure("swap_coded / load_file", medians["swap_coded"] / medians["load_file"])
    for case in ("a mask each", "8 images a mask"):
        ratio = medians[f"mixed, {case}"] / medians[f"one by one, {case}"]
        bench.figure(f"mixed / one by one, {case}", ratio, max=1.05)
    bench.figure("bytes_per_mask", bank.num_bytes / num_masks)
    bench.figure("bits_per_weight", 8 * bank.num_bytes / num_masks / num_weights)
    bench.figure("GiB_of_10000_masks", 10_000 * bank.num_bytes / num_masks / 2**30, max=10)
    bench.figure("cached_bytes_per_mask", bank.cached_bytes / num_masks)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
