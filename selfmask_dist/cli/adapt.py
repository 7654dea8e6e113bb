"""`selfmask adapt PHOTOS`: from a folder of pictures without labels to a mask, and whether to use it.

    PHOTOS/ -> OUT/shards/train (once) -> selfmask launch --config nbd -> OUT/adapt: mask, decision, report

Scores that travel too far destroy a network's features, a convolutional one's sooner, which instance
retrieval shows without labels: then a smaller optim.score_reach is tried, and a smaller one yet
(OUT/adapt-lower, OUT/adapt-lowest). The same command again goes on where it was stopped, or says that it is
done.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from selfmask_dist.common import names
from selfmask_dist.common.shipped import shipped_module
from selfmask_dist.common.text import count, positive, some

BACKBONE = "timm:vit_small_patch14_dinov2.lvd142m"
# runs by name, and their optim.score_reach; the next one is made where this one is no better than frozen
RUNS = {"adapt": "auto", "adapt-lower": 0.3, "adapt-lowest": 0.1}
_ASKED_TO_STOP = (128 + signal.SIGINT, 128 + signal.SIGTERM)
_BATCH, _EPOCHS = 128, 8  # the defaults of objective.name=nbd
_FEWEST_STEPS = 100


def add_command(commands: Any) -> None:
    """Add `adapt` to the command line."""
    command = commands.add_parser(
        "adapt",
        help="learn a mask from a folder of pictures without labels",
        description="Learn a mask from the pictures in a folder, in whatever folders below it and without "
        "labels, and say whether the adapted backbone is to be used in place of the frozen one. The same "
        "command again goes on, or says that it is done.",
    )
    command.add_argument("photos", metavar="PHOTOS", help="folder of pictures")
    command.add_argument("--out", metavar="DIR", help="where everything goes (runs/NAME-adapted)")
    command.add_argument(
        "--backbone",
        metavar="NAME",
        help=f"timm's or open_clip's (backbone.name of the site file, else {BACKBONE})",
    )
    command.add_argument("--nodes", type=positive, default=1, metavar="N", help="as of selfmask launch (1)")
    command.add_argument(
        "--cluster", choices=("auto", "slurm", "local"), default="local", help="where to (local)"
    )
    command.add_argument("--site", metavar="FILE", help="as of selfmask launch")
    command.add_argument("words", nargs="*", metavar="key=value", help="settings over those of --config nbd")
    command.set_defaults(command=_adapt)


def _adapt(options: argparse.Namespace) -> int:
    from selfmask_dist.config.site import find_site
    from selfmask_dist.config.yaml import flow

    site = find_site(options.site)
    photos = Path(options.photos)
    if not photos.is_dir():
        raise ValueError(f"{photos} is no folder; give one with pictures in it")
    out = Path(options.out or Path("runs") / f"{photos.resolve().name}-adapted")
    shards, number = prepare(photos, out / "shards")
    # the configuration that ships names another backbone and its size, and would win over the site's
    backbone = {"name": options.backbone} if options.backbone else site.given.values.get("backbone") or {}
    backbone = {"name": BACKBONE, **backbone}
    places = {"data.train": str(shards), "run.dir": str(out)}
    places |= {f"backbone.{key}": value for key, value in backbone.items()}
    shared = [f"{key}={flow(value)}" for key, value in places.items()]
    # a batch of 128 pictures of 224 pixels at once would not fit into a laptop; the result is the same
    micro_steps = f"train.accumulate={max(4 // options.nodes, 1)}"
    rates = ("optim.score_lr", "optim.score_reach", "optim.score_lr_choices")
    has_rate = any(word.partition("=")[0] in rates for word in options.words)
    for name, reach in list(RUNS.items())[: 1 if has_rate else None]:  # a rate that is given is the only one
        folder = out / name
        settings = [*settings_for(number), f"run.name={name}", micro_steps]
        settings.append(f"optim.score_reach={'null' if has_rate else reach}")
        print(f"{folder}: {' '.join(settings)}", flush=True)
        if (folder / names.CONFIG).exists():
            settings.append("run.resume=true")
        place = ["--cluster", options.cluster, "--nodes", str(options.nodes)]
        place.append(f"--site={site.path or 'none'}")
        launch = ["launch", *place, "--config", "nbd", *shared, *settings, *options.words]
        if status := _selfmask(*launch):
            if status in _ASKED_TO_STOP:
                print("the same command again goes on where it was stopped", flush=True)
            return status
        if not (folder / names.RESULT).exists():
            print(f"submitted; `selfmask status {folder}` follows it, and the same command again goes on")
            return 0
        if json.loads((folder / names.RESULT).read_text())["retrieval"]["decision"] != "frozen":
            break
    return _selfmask("report", str(folder))


def _selfmask(*words: str) -> int:
    """Run a command of `selfmask`, and return its exit status. It is told to stop where this process is."""
    command = [sys.executable, "-m", "selfmask_dist.cli", *words]
    with subprocess.Popen(command) as process:
        # Ctrl-C reaches both from the terminal; the command saves, and this process waits for that
        before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN)}
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def prepare(photos: Path, out: Path) -> tuple[Path, int]:
    """Write the pictures as tars below `out`, once, and return the tars' folder and the pictures' number.

    Broken files are left out, named, and listed in `rejects.jsonl`.

    Raises:
        ValueError: there are none, or others than when the tars were written.
    """
    image_folder = shipped_module("data_prep.image_folder")
    (done,) = image_folder.convert_folder_once(photos, out, layout="unlabelled", skip_broken=True)
    print(f"{done.folder}: {count(done.num_samples)} pictures")
    if rejected := _rejects(done.folder / "rejects.jsonl"):
        print(f"  left out: {len(rejected)} files that are no pictures or broken: {some(rejected)}")
    return done.folder, int(done.num_samples)


def settings_for(num_pictures: int) -> list[str]:
    """Return the length of training for a number of pictures, as overrides: at least a hundred steps."""
    epochs = max(_EPOCHS, math.ceil(_FEWEST_STEPS / math.ceil(num_pictures / _BATCH)))
    return [
        f"train.epochs={epochs}",
        f"optim.warmup_epochs={epochs / 10:g}",
        f"eval.knn_every={epochs / 4:g}",  # instance retrieval, four times
    ]


def _rejects(path: Path) -> list[str]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [str(json.loads(line)["path"]) for line in lines]
