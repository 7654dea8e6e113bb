"""All that a GPU has to say, in one script of eight minutes at most, the most wanted first.

    steps    time and peak of a step of ViT-B/32, ViT-L/14 and ResNet-50 in bf16: masks in every mode
             (`masking.lean_steps`), full fine-tuning with SGD and AdamW, LoRA, and the authors' way, which
             puts theta in place of the parameters in every forward; as it is, then compiled
    syncs    how often a step of the engine makes the device wait, by `torch.cuda.set_sync_debug_mode`
    swap     from one mask to another in a `MaskBank`
    views    crops of a batch finished on the device
    knn      a search in bf16 and in float32

The result file is written after each part, so that a run that is cut off leaves what was measured; a part
that would begin after `--minutes` is named as left out. Without a GPU only `--quick` runs, with tiny models
on the CPU: it shows that all of this works, and its figures mean nothing.

    python -m benchmarks.gpu [--minutes 8] [--batch-size 64] [--quick] --json
"""

import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import RESULTS, Benchmark, interleave
from benchmarks.masking import step_time_gpu
from benchmarks.masking.lean_steps import MODES, TINY, Model, make_step
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import Crops, Distortion, multicrop_transform
from selfmask_dist.evals.search import search
from selfmask_dist.maskfile.bank import MaskBank
from selfmask_dist.maskfile.fit import from_masks
from selfmask_dist.masking import attach

REPLACED = "replaced in every forward"
LARGE = (
    ("vit_b32", Model("vit_base_patch32_224", side=224)),
    ("vit_l14", Model("vit_large_patch14_224", side=224)),
    ("rn50", Model("resnet50", include="resnet", side=224)),
)


class Suite:
    """The parts, and what they share."""

    def __init__(self, bench: Benchmark) -> None:
        self.bench = bench
        self.options = bench.args
        self.quick: bool = bench.args.quick
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._end = time.monotonic() + 60 * bench.args.minutes
        self._left_out: list[str] = []

    def run(self) -> None:
        """Run every part for which there is time, and write what is known after each."""
        models = (("tiny", TINY),) if self.quick else LARGE
        parts: dict[str, Callable[[], None]] = {}
        for compiled in (False, True):
            for key, model in models:
                name = f"{key}, compiled" if compiled else key
                parts[name] = partial(self.steps, name, model, compiled=compiled)
            if not compiled:
                parts |= {"syncs": self.syncs, "swap": self.swap, "views": self.views, "knn": self.knn}
        for name, part in parts.items():
            if time.monotonic() > self._end:
                self._left_out.append(name)
                continue
            try:
                part()
            except (RuntimeError, ValueError) as error:  # the other parts are worth having without it
                self.bench.figure(f"{name}, failed", str(error)[:500])
            self._clear()
            self._write()
        self.bench.figure("parts left out for want of time", self._left_out)

    def steps(self, name: str, model: Model, *, compiled: bool) -> None:
        """Time and peak of a step in every mode."""
        size = 2 if self.quick else self.options.batch_size
        modes = [mode for mode in MODES if mode != "masked float32"]
        modes = ["full sgd", *(mode for mode in modes if mode != "full sgd")]
        if compiled:  # compiling takes most of the time
            modes = ["full sgd", "masked bf16 compute", "masked bf16 weights"]
        seconds: dict[str, list[float]] = {}
        peaks: dict[str, float] = {}
        for mode in [*modes, *([] if compiled else [REPLACED])]:
            if seconds and time.monotonic() > self._end:
                self._left_out.append(f"{name}, {mode}")
                continue
            step = self._step(mode, model, size, compiled=compiled)
            # one model at a time: several of them with their state would not fit beside each other
            seconds |= interleave({mode: step}, rounds=2 if self.quick else 15, warmup=1 if self.quick else 3)
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                step()
                peaks[mode] = torch.cuda.max_memory_allocated() / 2**20
            del step
            self._clear()
        medians = {mode: self.bench.median(times) for mode, times in seconds.items()}
        self.bench.figure(f"{name}, seconds", medians)
        self.bench.figure(f"{name}, images a second", {m: size / value for m, value in medians.items()})
        self.bench.figure(f"{name}, peak MiB", peaks)
        for mode in medians:
            if mode.startswith("masked"):
                ratio = medians[mode] / medians["full sgd"]
                self.bench.figure(f"{name}, {mode} / full sgd, time", ratio, max=1.0, quick=False)
            if mode.startswith("masked") and peaks:
                self.bench.figure(f"{name}, {mode} / full sgd, peak", peaks[mode] / peaks["full sgd"])

    def _step(self, mode: str, model: Model, size: int, *, compiled: bool) -> Callable[[], None]:
        if mode == REPLACED:
            kwargs: dict[str, Any] = dict(model.kwargs)
            kwargs |= {"img_size": model.side} if model.include == "vit" else {}
            of = (model.name, kwargs, model.include)
            return step_time_gpu.make_step(of, "replaced", size=size, side=model.side, compiled=False)
        # on a CPU without the minutes of C++ that compiling takes
        more = ["engine.compile=true"] if compiled and self.device == "cuda" else []
        return make_step(mode, model, size=size, device=self.device, more=more)

    def syncs(self) -> None:
        """Warnings of torch's own count of synchronising calls, in three steps."""
        for mode in ("masked bf16 compute", "masked bf16 weights"):
            step = make_step(mode, TINY, size=4, device=self.device)
            step()
            if self.device == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as found:
                    warnings.simplefilter("always")
                    for _ in range(3):
                        step()
            finally:
                if self.device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
            waits = [str(one.message) for one in found if "synchroniz" in str(one.message)]
            self.bench.figure(f"{mode}, waits of the device a step", len(waits) / 3)

    def swap(self) -> None:
        """From one mask to another on a ViT-B/32."""
        model = TINY if self.quick else LARGE[0][1]
        encoder = model.build().to(self.device).eval()
        found = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            masks = attach(encoder, include=model.include)
            with torch.no_grad():
                for entry in masks.entries:
                    entry.scores.copy_(torch.randn_like(entry.scores) + 1)
            masks.rewrite()
            found.append(from_masks(masks))
            masks.detach()
        bank = MaskBank(encoder)
        for index, mask in enumerate(found):
            bank.add(str(index), mask)
        images = torch.zeros(1, 3, model.side, model.side, device=self.device)

        def there_and_back() -> None:
            for name in ("0", "1"):
                with bank.under(name), torch.no_grad():
                    encoder(images)

        def without() -> None:
            for _ in range(2):
                with torch.no_grad():
                    encoder(images)

        rounds = 3 if self.quick else 30
        times = interleave({"swap": there_and_back, "alone": without}, rounds=rounds, warmup=2)
        both = zip(times["swap"], times["alone"], strict=True)
        self.bench.figure("swap, milliseconds", 500 * self.bench.median(a - b for a, b in both))

    def views(self) -> None:
        """Crops of a batch, begun on the CPU, finished on the device or there as well."""
        half = (0.5, 0.5, 0.5)
        pre = Preprocessing(32 if self.quick else 224, half, half)
        transform = multicrop_transform(
            pre, crops=(Crops(2, pre.image_size, (0.2, 1.0)),), distortion=Distortion(), on_device=True
        )
        rng = np.random.default_rng(0)
        image = Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8))
        samples = [transform(image, np.random.default_rng(i)) for i in range(4 if self.quick else 64)]
        parts = [torch.stack(part) for part in zip(*samples, strict=True)]
        finish = transform.finish
        assert finish is not None
        ways = dict.fromkeys(("cpu", self.device))

        def on(way: str) -> None:
            finish((*(part.to(way) for part in parts[:-1]), parts[-1]))

        times = interleave({way: partial(on, way) for way in ways}, rounds=2 if self.quick else 5)
        self.bench.figure("views, seconds a batch", {way: self.bench.median(t) for way, t in times.items()})

    def knn(self) -> None:
        """The twenty nearest of a bank."""
        rows, queries = (2_000, 100) if self.quick else (1_000_000, 10_000)
        generator = torch.Generator(self.device).manual_seed(0)
        bank, asked = (
            torch.randn(n, 128 if self.quick else 768, device=self.device, generator=generator)
            for n in (rows, queries)
        )
        ways = {p: partial(search, bank, asked, k=20, precision=p) for p in ("float32", "bf16")}
        times = interleave(ways, rounds=1 if self.quick else 2)
        self.bench.figure("knn, seconds", {way: self.bench.median(found) for way, found in times.items()})
        self.bench.figure("knn, rows and queries", [rows, queries])

    def _clear(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _write(self) -> None:
        """Leave what is known so far."""
        path = self.options.out or RESULTS / f"gpu{'.quick' if self.quick else ''}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**self.bench.result(), "complete": False}, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    bench = Benchmark("gpu", __doc__)
    bench.parser.add_argument("--minutes", type=float, default=8, help="begin no part later (default: 8)")
    bench.parser.add_argument("--batch-size", type=int, default=64, help="images in a step (default: 64)")
    options = bench.parse(argv)
    if not (torch.cuda.is_available() or options.quick):
        bench.skip("needs a GPU; --quick runs tiny models on the CPU")
        return bench.finish()
    Suite(bench).run()
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
