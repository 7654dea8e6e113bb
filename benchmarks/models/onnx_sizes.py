"""Whole models of the usual sizes as ONNX: what onnxruntime gives against PyTorch, opset, bytes and memory.

timm's ViT-B/32 and ResNet-50 and CLIP's ViT-B/32 image tower with random weights, each under a mask that
keeps half of them and with a head of 1,000 classes, written by `export_onnx` and run on 100 pictures of noise
one by one. Differences are relative to the largest number that comes out (or one, where that is smaller).
Each model is measured in a process of its own, whose highest resident size is `memory`.

What is in the result file, or in the one beside it that an interrupted run left, is not made again:

    python -m benchmarks.models.onnx_sizes --json
"""

import json
import multiprocessing
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, Benchmark, _high_water
from selfmask_dist.backbones import load_backbone
from selfmask_dist.config.backbone import BackboneConfig
from selfmask_dist.maskfile import Head
from selfmask_dist.models.onnx import export_onnx
from selfmask_dist.models.pictures import PictureTransform
from selfmask_dist.models.whole import Loaded, WholeModel
from tests.support.half_masks import mask_half

MODELS = {
    "ViT-B/32": "timm:vit_base_patch32_224",
    "ResNet-50": "timm:resnet50",
    "CLIP ViT-B/32": "open_clip:ViT-B-32",
}
QUICK = {"ViT": "timm:test_vit"}
CLASSES = 1000
LIMIT = 2 * 2**30  # bytes of memory
Row = dict[str, Any]


def measure(name: str, pictures: int) -> Row:
    """Export one model, compare it picture by picture, and return figures."""
    import onnxruntime

    torch.set_num_threads(1)
    start = time.perf_counter()
    backbone = load_backbone(BackboneConfig(name=name, pretrained=False))
    mask_half(backbone.encoder).detach(restore=False)
    weights = [parameter for parameter in backbone.encoder.parameters() if parameter.ndim > 1]
    off = sum(int((weight == 0).sum()) for weight in weights) / sum(map(torch.numel, weights))
    draw = torch.Generator().manual_seed(0)
    head = Head("linear", torch.randn(CLASSES, backbone.spec.dim, generator=draw))
    classes = tuple(f"class {index}" for index in range(CLASSES))
    transform = PictureTransform(backbone.spec.preprocessing)
    model = WholeModel(backbone.encoder, head)
    with tempfile.TemporaryDirectory() as folder:
        made = export_onnx(
            Loaded(model, transform, classes, torch.device("cpu"), name), Path(folder) / "x.onnx"
        )
        session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
        worst = largest = 0.0
        size = backbone.spec.preprocessing.image_size
        same = 0
        with torch.inference_mode():
            for _ in range(pictures):
                image = torch.randn(1, 3, size, size, generator=draw)
                expected = model(image)
                found = torch.from_numpy(session.run(None, {"images": image.numpy()})[0])
                scale = max(float(expected.abs().max()), 1.0)
                worst = max(worst, float((found - expected).abs().max()) / scale)
                largest = max(largest, scale)
                same += int(found.argmax() == expected.argmax())
    return {
        "difference": worst,
        "largest number": largest,
        "same class": same,
        "pictures": pictures,
        "opset": made.opset,
        "bytes": made.size,
        "weights": sum(parameter.numel() for parameter in model.encoder.parameters()),
        "share of matrices switched off": off,
        "memory": _high_water(),
        "seconds": time.perf_counter() - start,
    }


def main() -> int:
    bench = Benchmark("onnx_sizes", __doc__)
    add = bench.parser.add_argument
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--pictures", type=int, default=100)
    options = bench.parse()
    chosen = QUICK if options.quick else {name: MODELS[name] for name in options.models}
    pictures = 3 if options.quick else options.pictures
    result = Path(options.out or RESULTS / "onnx_sizes.json")
    unfinished = result.with_suffix(".partial.json")
    rows: dict[str, Row] = {}
    for path in () if options.quick else (result, unfinished):
        if path.exists():
            rows |= json.loads(path.read_text())["figures"]["rows"]
    for name, backbone in chosen.items():
        if name not in rows:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows[name] = pool.submit(measure, backbone, pictures).result()
            print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
            if not options.quick:
                unfinished.write_text(json.dumps({"figures": {"rows": rows}}))
        row = rows[name]
        bench.figure(f"{name}: largest difference", row["difference"], max=1e-4)
        bench.figure(f"{name}: pictures of the same class", row["same class"])
        bench.figure(f"{name}: opset", row["opset"])
        bench.figure(f"{name}: MiB of the file", row["bytes"] / 2**20)
        bench.figure(f"{name}: MiB of memory", row["memory"] / 2**20, max=LIMIT / 2**20)
    bench.figure("rows", rows)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
