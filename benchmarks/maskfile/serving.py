"""Many masks on one resident backbone: time of a swap, of mixed batches, and memory of a mask.

A swap puts another mask on in place: from its decoded bits, and from its coded ones. It is compared with what
one does without masks, loading the other task's state dict: from memory (`load_state_dict`), and from its
file (safetensors); and with copying thetas in that were made before (`copy_theta`), which takes a backbone's
memory for each mask. A mixed batch names a mask for each image and is grouped by mask; against it, the images
go through one by one, each with its swap.

Where the cache does not hold all masks, how much of a mask is decoded anew for a swap: by layers, as the bank
gives them up, and by whole masks (reckoned), with masks in turn and with some asked for more than others.

Masks are made up, as often kept as the paper's on CLIP's ViT-B/32: 98.7 % in the first layer to 99.9 % in the
last, at random places.

    python benchmarks/maskfile/serving.py [--masks 64] [--device cuda] [--quick] --json
"""

import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.harness import Benchmark, interleave
from selfmask_dist import maskfile
from selfmask_dist.backbones import fingerprint, load_backbone
from selfmask_dist.config.backbone import BackboneConfig
from selfmask_dist.maskfile import Mask
from selfmask_dist.maskfile.bank import MaskBank
from selfmask_dist.masking import select

MOST_PRUNED, LEAST_PRUNED = 0.013, 0.001
CACHES = {  # masks, for how many of them there is room, whether they come in turn
    "2 in turn, room for 1.5": (2, 1.5, True),
    "8 in turn, room for 4": (8, 4.0, True),
    "8 by rank, room for 4": (8, 4.0, False),
}


def random_mask(encoder: nn.Module, names: list[str], seed: int, weights_fingerprint: str) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    bits: dict[str, Tensor] = {}
    for name, share in zip(names, np.linspace(MOST_PRUNED, LEAST_PRUNED, len(names)), strict=True):
        kept = torch.ones(encoder.get_parameter(name).shape, dtype=torch.bool)
        places = torch.randint(kept.numel(), (round(share * kept.numel()),), generator=generator)
        kept.view(-1)[places] = False
        bits[name] = kept
    return Mask(bits, weights_fingerprint)


def requests_in_turn(num_masks: int, count: int) -> list[int]:
    return [turn % num_masks for turn in range(count)]


def requests_by_rank(num_masks: int, count: int) -> list[int]:
    """The second is asked for half as often as the first, the third a third as often (Zipf)."""
    shares = 1 / np.arange(1, num_masks + 1)
    drawn = np.random.default_rng(0).choice(num_masks, count, p=shares / shares.sum())
    return [int(mask) for mask in drawn]


def decoded_by_whole_masks(requests: Sequence[int], capacity: int) -> float:
    """Masks decoded for each swap where whole masks come and go, the one used last for longest first."""
    cached: OrderedDict[int, None] = OrderedDict()
    decoded = swaps = 0
    for before, mask in zip([-1, *requests], requests, strict=False):
        swaps += mask != before
        decoded += mask not in cached
        cached[mask] = None
        cached.move_to_end(mask)
        while len(cached) > capacity:
            cached.popitem(last=False)
    return decoded / swaps


def decoded_by_layers(bank: MaskBank, requests: Sequence[int], num_layers: int) -> float:
    """The same of a bank, in masks."""
    before, swaps = bank.layers_decoded, 0
    for last, mask in zip([-1, *requests], requests, strict=False):
        swaps += mask != last
        with bank.under(f"mask-{mask}"):
            pass
    return (bank.layers_decoded - before) / num_layers / swaps


def measure_cache(bench: Benchmark, encoder: nn.Module, make: Callable[[int], Mask], size: float) -> None:
    for kind, (num_masks, room, in_turn) in CACHES.items():
        requests = (requests_in_turn if in_turn else requests_by_rank)(num_masks, 40)
        bank = MaskBank(encoder, cache_mib=size * room / 2**20)
        masks = [make(number) for number in range(num_masks)]
        for number, mask in enumerate(masks):
            bank.add(f"mask-{number}", mask)
        by_layers = decoded_by_layers(bank, requests, len(masks[0].bits))
        bench.figure(f"{kind}: decoded a swap, by layers", by_layers)
        bench.figure(f"{kind}: decoded a swap, by whole masks", decoded_by_whole_masks(requests, int(room)))
        with bank.under(None):
            pass


def measure_swaps(
    bench: Benchmark, bank: MaskBank, thetas: dict[str, Tensor], num_masks: int, device: str, rounds: int
) -> None:
    encoder = bank.encoder
    parameters = dict(encoder.named_parameters())
    state = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    turn = [0]

    def swap() -> None:
        turn[0] += 1
        with bank.under(f"mask-{turn[0] % num_masks}"):
            pass

    def swap_coded() -> None:
        bank.forget_decoded()
        swap()

    @torch.no_grad()
    def copy_theta() -> None:
        for key, theta in thetas.items():
            parameters[key].copy_(theta)

    def load(state_of: Callable[[], dict[str, Tensor]]) -> Callable[[], object]:
        return lambda: encoder.load_state_dict(state_of())

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.safetensors"
        save_file({key: value.cpu() for key, value in state.items()}, path)
        seconds = interleave(
            {
                "load_state_dict": load(lambda: state),
                "load_file": load(lambda: load_file(path, device=device)),
                "copy_theta": copy_theta,
                "swap_coded": swap_coded,
            },
            rounds=rounds,
        )
        for _ in range(num_masks):
            swap()  # all decoded
        seconds["swap_decoded"] = interleave({"load": load(lambda: state), "swap": swap}, rounds=rounds)[
            "swap"
        ]
    medians = {key: bench.median(values) for key, values in seconds.items()}
    for key, value in medians.items():
        bench.figure(f"{key}_ms", 1e3 * value)
    bench.target("swap_decoded_ms", max=1.0 if device != "cpu" else None)
    for first, second, most in (
        ("swap_decoded", "load_state_dict", None),
        ("swap_decoded", "load_file", 1.0),
        ("swap_decoded", "copy_theta", None),
        ("swap_coded", "load_file", None),
    ):
        bench.figure(f"{first} / {second}", medians[first] / medians[second], max=most)


def measure_batches(bench: Benchmark, bank: MaskBank, num_masks: int, device: str, rounds: int) -> None:
    images = torch.randn(num_masks, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(device)
    every = [f"mask-{seed}" for seed in range(num_masks)]
    few = [f"mask-{seed % (num_masks // 8)}" for seed in range(num_masks)]

    def one_by_one(given: list[str]) -> None:
        for row, mask in enumerate(given):
            bank.embed(images[row : row + 1], mask)

    seconds = interleave(
        {
            "mixed, a mask each": lambda: bank.embed(images, every),
            "one by one, a mask each": lambda: one_by_one(every),
            "mixed, 8 images a mask": lambda: bank.embed(images, few),
            "one by one, 8 images a mask": lambda: one_by_one(few),
        },
        rounds=rounds,
        warmup=0,  # seconds each, and the masks are decoded by now
    )
    medians = {key: bench.median(values) for key, values in seconds.items()}
    for key, value in medians.items():
        bench.figure(f"{key}_ms", 1e3 * value)
    for case in ("a mask each", "8 images a mask"):
        ratio = medians[f"mixed, {case}"] / medians[f"one by one, {case}"]
        bench.figure(f"mixed / one by one, {case}", ratio, max=1.05, quick=False)


def main() -> int:
    bench = Benchmark("serving", __doc__)
    bench.parser.add_argument("--masks", type=int, default=64, help="in the mixed batch")
    bench.parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    bench.parser.add_argument("--rounds", type=int, default=7, help="of swaps; of batches at most 3")
    options = bench.parse()
    name = "timm:vit_tiny_patch16_224" if options.quick else "timm:vit_base_patch32_224"
    num_masks = 8 if options.quick else options.masks
    encoder = load_backbone(BackboneConfig(name=name, pretrained=False)).encoder
    names = select(encoder, include="vit")
    weights = fingerprint((key, encoder.get_parameter(key)) for key in names)
    encoder.to(options.device)
    first = random_mask(encoder, names, 0, weights)
    thetas = {key: maskfile.materialize(first, key, encoder.get_parameter(key).detach()) for key in names}
    bank = MaskBank(encoder, cache_mib=1024)
    for seed in range(num_masks):
        bank.add(f"mask-{seed}", random_mask(encoder, names, seed, weights))
    bench.figure("backbone", name)
    bench.figure("device", options.device)
    bench.figure("masks", num_masks)
    measure_swaps(bench, bank, thetas, num_masks, options.device, options.rounds)
    measure_batches(bench, bank, num_masks, options.device, min(options.rounds, 3))
    num_weights = sum(encoder.get_parameter(key).numel() for key in names)
    per_mask, decoded = bank.num_bytes / num_masks, bank.cached_bytes / num_masks
    bench.figure("bytes_per_mask", per_mask)
    bench.figure("bits_per_weight", 8 * per_mask / num_weights)
    bench.figure("state dict / mask, bytes", sum(v.nbytes for v in encoder.state_dict().values()) / per_mask)
    bench.figure("GB_of_10000_masks", 10_000 * per_mask / 1e9, max=10)
    bench.figure("decoded_bytes_per_mask", decoded)
    with bank.under(None) as frozen:  # what remains is of small banks on the same encoder
        measure_cache(bench, frozen, lambda seed: random_mask(frozen, names, seed, weights), decoded)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
