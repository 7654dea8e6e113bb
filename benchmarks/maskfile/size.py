"""Bytes of a mask file: against the entropy of its bits, general compressors, LoRA and fine-tuned weights.

Masks of real trainings (`--runs`; without it, the digits of `selfmask demo`, which takes minutes), and
made-up ones: independent bits over the shapes of ViT-B/32 and ResNet-50, kept as often as stated. The bound
is the sum over parameters of size * H(share kept); coding by the magnitude of the weights can go below it.
Compressors get all parameters' packed bits in one stream, which is their best case.

    python benchmarks/maskfile/size.py [--runs DIR ...] [--quick] --json
"""

import bz2
import lzma
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

from benchmarks.harness import Benchmark
from selfmask_dist.backbones import load_backbone
from selfmask_dist.cli.demo import run_demo
from selfmask_dist.config import load_config
from selfmask_dist.config.backbone import BackboneConfig
from selfmask_dist.maskfile import Mask, MaskFile, codec, read_mask_file, write_mask_file
from selfmask_dist.masking import select
from selfmask_dist.training.build import build_backbone

LORA_RANK = 8
PEERS: dict[str, Callable[[bytes], bytes]] = {
    "packed": lambda data: data,
    "gzip": lambda data: zlib.compress(data, 9),
    "bz2": lambda data: bz2.compress(data, 9),
    "lzma": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "zstd": lambda data: zstandard.ZstdCompressor(level=19).compress(data),
}
# (backbone, preset, lowest and highest share kept over the layers)
SYNTHETIC = {
    "ViT-B/32, 98.7 to 99.9 % kept": ("timm:vit_base_patch32_224", "vit", 0.987, 0.999),
    "ResNet-50, 1 to 20 % kept": ("timm:resnet50", "resnet", 0.01, 0.20),
}


def entropy_bytes(bits: Mapping[str, Tensor]) -> float:
    total = 0.0
    for tensor in bits.values():
        share = float(tensor.double().mean())
        total += tensor.numel() * sum(-p * np.log2(p) for p in (share, 1 - share) if p > 0)
    return total / 8


ClassesOf = Callable[[str, np.ndarray], np.ndarray]


def entropy_given(bits: Mapping[str, Tensor], classes_of: ClassesOf) -> float:
    """Bytes if every class of places had its own share of ones and stating it cost nothing: a bound."""
    total = 0.0
    for name, tensor in bits.items():
        array = tensor.numpy().reshape(len(tensor), -1)
        classes = np.broadcast_to(classes_of(name, array), array.shape).reshape(-1)
        sizes = np.bincount(classes)
        ones = np.bincount(classes, weights=array.reshape(-1), minlength=len(sizes))[sizes > 0]
        shares = np.stack([ones, sizes[sizes > 0] - ones]) / sizes[sizes > 0]
        terms = np.where(shares > 0, shares * np.log2(np.where(shares > 0, shares, 1)), 0.0)
        total -= float((sizes[sizes > 0] * terms.sum(axis=0)).sum())
    return total / 8


def contexts(weights: Mapping[str, Tensor]) -> dict[str, ClassesOf]:
    """What both sides may know of a place, each with at most 16 classes."""

    def matrix(name: str) -> np.ndarray:
        weight: np.ndarray = weights[name].float().numpy()
        return weight.reshape(len(weight), -1)

    def by_share(pruned: np.ndarray) -> np.ndarray:  # sixteenths of the rows or columns, most pruned last
        ranks = np.argsort(np.argsort(pruned, kind="stable"), kind="stable")
        classes: np.ndarray = ranks * 16 // len(ranks)
        return classes

    def neighbours(_name: str, bits: np.ndarray) -> np.ndarray:
        above, left = np.ones_like(bits), np.ones_like(bits)
        above[1:], left[:, 1:] = bits[:-1], bits[:, :-1]
        classes: np.ndarray = 2 * above.astype(np.int64) + left
        return classes

    return {
        "magnitude": lambda name, _bits: codec.magnitude_classes(matrix(name)).astype(np.int64),
        "sign": lambda name, _bits: (matrix(name) > 0).astype(np.int64),
        "row": lambda _name, bits: by_share((~bits).sum(axis=1))[:, None],
        "column": lambda _name, bits: by_share((~bits).sum(axis=0))[None, :],
        "neighbours": neighbours,
    }


def trained(run: Path) -> tuple[Mask, dict[str, Tensor]]:
    """A run's mask and the frozen weights under it."""
    mask = next(iter(read_mask_file(run / "final.mask").masks.values()))
    encoder = build_backbone(load_config(run / "config.yaml")).encoder
    return mask, {name: value.detach() for name, value in encoder.named_parameters() if name in mask.bits}


def synthetic(name: str, preset: str, low: float, high: float) -> tuple[Mask, dict[str, Tensor]]:
    encoder = load_backbone(BackboneConfig(name=name, pretrained=False)).encoder
    names = select(encoder, include=preset)
    parameters = dict(encoder.named_parameters())
    generator = torch.Generator().manual_seed(0)
    shares = torch.linspace(low, high, len(names)).tolist()
    bits = {
        name: torch.rand(parameters[name].shape, generator=generator) < share
        for name, share in zip(names, shares, strict=True)
    }
    return Mask(bits, "0" * 64), {name: parameters[name].detach() for name in names}


def seconds(fn: Callable[[], Any], rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(mask: Mask, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Bits per weight, ratios to the entropy, and millions of mask bits per second on one thread."""
    num_weights, bound = mask.num_weights(), entropy_bytes(mask.bits)
    arrays = {name: bits.numpy() for name, bits in mask.bits.items()}
    coded = {name: codec.encode(array) for name, array in arrays.items()}
    classes = {name: codec.magnitude_classes(weights[name].float().numpy()) for name in arrays}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.mask"
        file = write_mask_file(path, MaskFile({"default": mask}))
        with_weights = write_mask_file(path, MaskFile({"default": mask}), weights=weights.__getitem__)
        plain = write_mask_file(path, MaskFile({"default": mask}), codec_name="packbits-zstd")
    found = {
        "weights": num_weights,
        "kept": mask.num_kept() / num_weights,
        "entropy_bits_per_weight": 8 * bound / num_weights,
        "file_bits_per_weight": 8 * file / num_weights,
        "file_bytes": file,
        "coded_bits / entropy": sum(map(len, coded.values())) / bound,
        "file / entropy": file / bound,
        "file_coded_by_weights / entropy": with_weights / bound,
        "file_plain / entropy": plain / bound,
        "fp16_weights_zstd / file": len(
            PEERS["zstd"](b"".join(weight.half().numpy().tobytes() for weight in weights.values()))
        )
        / file,
    }
    matrices = {name: bits for name, bits in mask.bits.items() if bits.ndim > 1}
    alone = entropy_bytes(matrices)
    for name, classes_of in contexts(weights).items():
        found[f"entropy of matrices given {name} / entropy"] = entropy_given(matrices, classes_of) / alone
    found |= speeds(arrays, coded, classes, num_weights)
    packed = b"".join(np.packbits(array, axis=None).tobytes() for array in arrays.values())
    for name, compress in PEERS.items():
        found[f"{name} / file"] = len(compress(packed)) / file
    return found


def speeds(
    arrays: Mapping[str, np.ndarray],
    coded: Mapping[str, bytes],
    classes: Mapping[str, np.ndarray],
    num_weights: int,
) -> dict[str, float]:
    by_weights = {name: codec.encode(array, classes=classes[name]) for name, array in arrays.items()}

    def decode(data: Mapping[str, bytes], classes: Mapping[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            codec.decode(data[name], array.size, classes=classes.get(name))

    def encode(classes: Mapping[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            codec.encode(array, classes=classes.get(name))

    times = {
        "encode": seconds(lambda: encode({})),
        "decode": seconds(lambda: decode(coded, {})),
        "encode_by_weights": seconds(lambda: encode(classes)),
        "decode_by_weights": seconds(lambda: decode(by_weights, classes)),
    }
    return {f"{name}_mbits_per_s": num_weights / taken / 1e6 for name, taken in times.items()}


def lora_bytes(name: str) -> int:
    """LoRA of rank 8 on q and v of every block, in float16."""
    encoder = load_backbone(BackboneConfig(name=name, pretrained=False)).encoder
    widths = [
        parameter.shape[1] for key, parameter in encoder.named_parameters() if key.endswith("qkv.weight")
    ]
    return sum(2 * 2 * LORA_RANK * width * 2 for width in widths)


def main() -> int:
    bench = Benchmark("mask_size", __doc__)
    bench.parser.add_argument(
        "--runs", type=Path, nargs="+", default=[], metavar="DIR", help="folders of runs with a final.mask"
    )
    options = bench.parse()
    torch.set_num_threads(1)
    masks: dict[str, Callable[[], tuple[Mask, dict[str, Tensor]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        runs = options.runs
        if not runs and not options.quick:
            if run_demo(Path(folder) / "demo"):
                raise SystemExit("the demo's training failed; its own output says why")
            runs = [Path(folder) / "demo" / "mask"]
        for run in runs:
            masks[f"trained: {run.name}"] = lambda run=run: trained(run)  # type: ignore[misc]
        for name, settings in SYNTHETIC.items():
            if not options.quick or "ResNet" in name:
                masks[name] = lambda settings=settings: synthetic(*settings)  # type: ignore[misc]
        for name, load in masks.items():
            found = measure(*load())
            for key, value in found.items():
                bench.figure(f"{name}: {key}", value)
            bench.target(f"{name}: coded_bits / entropy", max=1.02)
            for key in ("encode", "decode", "encode_by_weights", "decode_by_weights"):
                if found["weights"] > 1e6:  # below it, what every parameter costs by itself is most of it
                    bench.target(f"{name}: {key}_mbits_per_s", min=50)
            if name.startswith("ViT-B/32"):
                bench.figure(
                    "LoRA r=8 of q and v in fp16 / ViT-B/32 file",
                    lora_bytes("timm:vit_base_patch32_224") / found["file_bytes"],
                    min=1.0,
                )
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
