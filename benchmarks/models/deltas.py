"""Fine-tunes of real photographs as one-bit deltas: what is left of their accuracy, and what a swap costs.

ViT-tiny (ImageNet weights) is fine-tuned whole on three sets, with labels. Each fine-tune becomes a mask file
of kind `delta` by `import_delta`: plain (a size for each tensor by its formula), with fitted sizes, and with
fitted sizes, biases and gains. The learning rate, and which of the three, are chosen on a fifth of the
training part, from runs on 1,024 pictures of the rest; then each set is trained once more on all of the
training part and measured on the test part. Errors are standard errors, paired over the pictures. Then the
three deltas are swapped on one compiled backbone.

What is in the result file, or in the one beside it that an interrupted run left, is not made again:

    python -m benchmarks.models.deltas --json
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo
from torch import Tensor

from benchmarks.harness import RESULTS, Benchmark
from selfmask_dist import MaskBank
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.data import eval_loader, eval_transform
from selfmask_dist.maskfile import read_mask_file
from selfmask_dist.models.deltas import import_delta
from selfmask_dist.models.load import load
from selfmask_dist.models.whole import Loaded
from selfmask_dist.training.build import build_backbone, open_data
from selfmask_dist.training.whole.calibrate import Calibration

DEFAULT_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
WEIGHTS = "weights/vit_tiny_patch16_224.in1k.fp16.safetensors"
SETS = ("grocery", "clothing", "deepweeds")
RATES = (0.01, 0.03)
FORMS: dict[str, Calibration | None] = {
    "plain": None,
    "fitted sizes, biases and gains": Calibration(sign_lr=0),
    "fitted signs too": Calibration(),
}
FEW = 1024
Row = dict[str, Any]


def settings(options: Any, dataset: str, rate: float) -> list[str]:
    """The configuration of a fine-tune, without its place and what it is measured on."""
    return [
        "backbone.name=timm:vit_tiny_patch16_224",
        f"backbone.weights={options.data / WEIGHTS}",
        f"backbone.image_size={options.pixels}",
        "backbone.crop_pct=1.0",
        "backbone.mean=[0.5, 0.5, 0.5]",
        "backbone.std=[0.5, 0.5, 0.5]",
        f"data.train={options.data / dataset / 'train.tar'}",
        "data.crop_scale=[0.4, 1.0]",
        "method=finetune",
        "objective.name=supervised",
        f"optim.weight_lr={rate:g}",
        "optim.head_lr=0.1",
        "optim.clip_norm=1",
        f"optim.warmup_epochs={options.epochs / 10:g}",
        f"train.epochs={options.epochs:g}",
        "train.global_batch_size=64",
        "eval.final=false",
        "eval.frozen_baseline=false",
        "eval.knn_every=0",
        "engine.workers=0",
        "engine.threads=1",
        "run.progress=false",
        "run.log_every=50",
    ]


def few(folder: Path, options: Any, dataset: str) -> str:
    """The setting for at most 1,024 training pictures beside those held out, at equal distances."""
    source, _ = open_data(load_config(None, [*settings(options, dataset, 0.01), "data.held_out=0.2"]))
    path = folder / f"{dataset}-few.npy"
    count = min(FEW, len(source))
    np.save(path, np.arange(count) * len(source) // count)
    return f"data.subset={path}"


class Measured:
    """A fine-tune in its folder, and which pictures it gets right."""

    def __init__(self, options: Any, folder: Path, dataset: str, rate: float, *, split: str) -> None:
        test = options.data / dataset / "test.tar"
        on = (
            [f"data.test={test}"] if split == "test" else ["data.held_out=0.2", few(folder, options, dataset)]
        )
        self.folder = folder / f"{dataset}-{split.replace(' ', '-')}-{rate:g}"
        place = [f"run.dir={folder}", f"run.name={self.folder.name}"]
        chosen = [*settings(options, dataset, rate), *on, *place]
        self.config = load_config(None, chosen)
        if not (self.folder / "result.json").exists():
            again = ["run.resume=true"] if (self.folder / "checkpoints").exists() else ["run.overwrite=true"]
            run(load_config(None, [*chosen, *again]))
        self.train, self.test = open_data(self.config)
        self.loaded = load(self.folder)

    def hits(self, loaded: Loaded) -> Tensor:
        """Which pictures are right: bool (pictures,)."""
        transform = eval_transform(loaded.transform.preprocessing)
        found = []
        for batch in eval_loader(self.test, transform, batch_size=128):
            right = loaded(batch.views[0]).argmax(dim=1) == batch.labels
            found.append(right[batch.weights > 0])
        return torch.cat(found)

    def accuracy(self) -> Row:
        """The accuracy of the fine-tune."""
        right = self.hits(self.loaded).double()
        error = right.std().item() / math.sqrt(len(right))
        return {"pictures": len(right), "fine-tuned": right.mean().item(), "standard error": error}

    def form(self, options: Any, name: str) -> Row:
        """Write the delta in one of the forms; its accuracy, its share of the fine-tune's, and its size."""
        calibration, path = FORMS[name], self.folder / f"{name}.mask"
        pictures = 0 if calibration is None else min(options.pictures, len(self.train))
        found = import_delta(self.folder, path, half=True, pictures=pictures, settings=calibration)
        after = self.hits(load(path, config=self.folder / "config.yaml"))
        return compare(self.hits(self.loaded), after) | {
            "bits a weight": found.bits_per_weight,
            "bytes without the head": found.num_bytes,
            "errors of the fit": list(found.errors),
        }


def compare(before: Tensor, after: Tensor) -> Row:
    """Accuracy, its share of the fine-tune's, and the share's standard error by the delta method, paired."""
    x, y = before.double(), after.double()
    share = (y.mean() / x.mean()).item()
    error = ((y - share * x).std() / x.mean()).item() / math.sqrt(len(x))
    return {"accuracy": y.mean().item(), "share kept": share, "error of the share": error}


def swaps(options: Any, files: dict[str, Path], config: Any) -> Row:
    """Count the graphs that torch.compile makes while deltas are swapped on a compiled backbone."""
    backbone = build_backbone(config)
    bank = MaskBank(backbone.encoder)
    for delta, path in files.items():
        file = read_mask_file(path)
        bank.add(delta, next(iter(file.masks.values())))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled: Callable[[Tensor], Tensor] = torch.compile(backbone.encoder)
    images = torch.randn(8, 3, options.pixels, options.pixels, generator=torch.Generator().manual_seed(0))
    order: list[str | None] = [*files, None] * 8
    worst, after_first = 0.0, -1
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for number, name in enumerate(order):
            with bank.under(name) as encoder:
                found, expected = compiled(images), encoder(images)
            worst = max(worst, (found - expected).abs().max().item())
            if number == 0:
                after_first = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return {
        "swaps": len(order) - 1,
        "graphs of the first": after_first,
        "graphs of all": graphs,
        "compiled - eager": worst,
    }


class Store:
    """Rows by name, kept beside the result while a run goes on."""

    def __init__(self, result: Path, *, keep: bool) -> None:
        self._unfinished = result.with_suffix(".partial.json")
        self._keep = keep
        self.rows: dict[str, Row] = {}
        for path in (result, self._unfinished) if keep else ():
            if path.exists():
                self.rows |= json.loads(path.read_text())["figures"].get("rows", {})

    def row(self, key: str, make: Callable[[], Row]) -> Row:
        """Return a row, made where it is not there."""
        if key not in self.rows:
            self.rows[key] = make()
            print(key, json.dumps(self.rows[key]), file=sys.stderr, flush=True)
            if self._keep:
                self._unfinished.write_text(json.dumps({"figures": {"rows": self.rows}}))
        return self.rows[key]


def tried(options: Any, folder: Path, dataset: str, rate: float, form: str = "") -> Row:
    """A fine-tune measured on held-out pictures, or its delta in one of the forms."""
    made = Measured(options, folder, dataset, rate, split="held out")
    return made.form(options, form) if form else made.accuracy()


def choose(options: Any, store: Store, folder: Path) -> tuple[dict[str, float], str]:
    """The rate of each set, by the fine-tune's accuracy on held-out pictures, and the form: the one with the
    largest mean share kept there, the simplest of equal ones.
    """
    rates: dict[str, float] = {}
    shares = dict.fromkeys(FORMS, 0.0)
    for dataset in options.sets:
        best = -1.0
        for rate in options.rates:
            held = f"{dataset}, held out, rate {rate:g}"
            row = store.row(held, partial(tried, options, folder, dataset, rate))
            if row["fine-tuned"] > best:
                best, rates[dataset] = row["fine-tuned"], rate
        for form in FORMS:
            held = f"{dataset}, held out, {form}"
            row = store.row(held, partial(tried, options, folder, dataset, rates[dataset], form))
            shares[form] += row["share kept"]
    return rates, max(shares, key=shares.__getitem__)


def measure(options: Any, bench: Benchmark, folder: Path) -> None:
    store = Store(Path(options.out or RESULTS / "deltas.json"), keep=not options.quick)
    rates, form = choose(options, store, folder)
    bench.figure("rate chosen", rates)
    bench.figure("form chosen", form)
    files: dict[str, Path] = {}
    shares, bits = [], []
    for dataset, rate in rates.items():
        made = Measured(options, folder, dataset, rate, split="test")
        row = store.row(f"{dataset}, test", made.accuracy)
        found = {
            name: store.row(f"{dataset}, test, {name}", partial(made.form, options, name)) for name in FORMS
        }
        files[dataset] = made.folder / f"{form}.mask"
        if not files[dataset].exists():  # its row was made by an earlier run, in another folder
            made.form(options, form)
        shares.append(found[form]["share kept"])
        bits.append(found[form]["bits a weight"])
        bench.figure(f"{dataset}: fine-tuned accuracy", row["fine-tuned"])
        bench.figure(f"{dataset}: delta's accuracy", found[form]["accuracy"])
        bench.figure(f"{dataset}: share kept", found[form]["share kept"])
        bench.figure(f"{dataset}: standard error of the share", found[form]["error of the share"])
        bench.figure(
            f"{dataset}: share kept by each form", {name: one["share kept"] for name, one in found.items()}
        )
    bench.figure("smallest share kept", min(shares), min=0.99, quick=False)
    bench.figure("largest bits a weight", max(bits), max=1.1)
    swapped = store.row("swaps", partial(swaps, options, files, made.config))
    bench.figure("swaps under torch.compile", swapped["swaps"])
    again = swapped["graphs of all"] - swapped["graphs of the first"]
    bench.figure("graphs compiled by swaps", again, max=0)
    bench.figure("compiled - eager, largest", swapped["compiled - eager"], max=1e-3)
    bench.figure("epochs", options.epochs)
    bench.figure("pixels", options.pixels)
    bench.figure("pictures of the fit", options.pictures)
    bench.figure("rows", store.rows)


def main() -> int:
    bench = Benchmark("deltas", __doc__)
    add = bench.parser.add_argument
    add("--data", type=Path, default=os.environ.get("SELFMASK_SHARED_DATA", DEFAULT_DATA))
    add("--sets", nargs="+", choices=SETS, default=list(SETS))
    add("--rates", nargs="+", type=float, default=list(RATES), help="of the weights, to choose from")
    add("--epochs", type=float, default=4)
    add("--pixels", type=int, default=64)
    add("--pictures", type=int, default=768, help="training pictures that sizes are fitted on")
    add("--folder", type=Path, help="keep the runs there, and go on with what is there")
    options = bench.parse()
    options.data = Path(options.data)
    if not (options.data / WEIGHTS).is_file():
        bench.skip(f"no weights and images at {options.data}; give their folder with --data")
        return bench.finish()
    if options.quick:
        options.sets, options.rates, options.pixels = ["clothing"], [0.01], 32
        options.epochs, options.pictures = 0.1, 64
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        measure(options, bench, folder)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
