"""The two settings of the comparison, as overrides: digits, and photographs of groceries.

Each has a second form whose test images are held out from the training ones: learning rates are chosen there.
Each has the same pictures with captions for the objectives that read them: templates over class names, and a
backbone with a text tower. Digits get a CLIP model of the size of the other backbone, trained on digits 0-4
with captions; groceries the same ViT-tiny, beside a text tower of random weights.
"""

import contextlib
import csv
import io
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.cascade.real import WEIGHTS, digits_settings
from data_prep.image_folder import convert_image_folder
from selfmask_dist.backbones import load_backbone
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.config.backbone import BackboneConfig
from selfmask_dist.config.yaml import flow

BATCH = 64
COMMON = (
    f"train.global_batch_size={BATCH}",
    "optim.warmup_epochs=1",
    "eval.knn_k=[20]",
    "eval.knn_every=0",
    "eval.frozen_baseline=false",
    "engine.device=cpu",
    "engine.workers=0",
    "engine.threads=1",
    "run.log_every=10",
    "run.progress=false",
    "run.overwrite=true",
)
_DIGITS = (
    "data.crop_scale=[0.7, 1.0]",
    "data.flip=false",
    *("crops.global_scale=[0.6, 1.0]", "crops.local_count=2", "crops.local_size=8"),
    *("crops.local_scale=[0.25, 0.6]", "crops.color=0.4", "crops.gray=0", "crops.blur=0"),
)
_PHOTOS = (
    "data.crop_scale=[0.4, 1.0]",
    *("crops.global_scale=[0.25, 1.0]", "crops.local_count=2", "crops.local_size=32"),
    "crops.local_scale=[0.08, 0.25]",
)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_OF_NUMBERS = ("a photo of the number {}", "the number {} by hand", "a scan of a {}")
_OF_GROCERIES = ("a photo of {}", "{} in a shop", "a photo of a {} on a shelf")
_CLIP_KWARGS = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 16, "layers": 4, "width": 64, "head_width": 16, "patch_size": 4},
    "text_cfg": {"context_length": 16, "width": 64, "heads": 4, "layers": 2},
}
_TRUNK_KWARGS: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "none"},
    "text_cfg": {"context_length": 24, "width": 128, "heads": 4, "layers": 2},
}

Forms = tuple[tuple[str, ...], tuple[str, ...]]  # of a setting: its overrides, and those for captions


def digits(folder: Path, epochs: float, *, held_out: bool = False) -> Forms:
    """The small ViT of digits 0-4 on digits 5-9; what it needs is made in `folder` once."""
    keys = ("backbone.", "data.train=", "data.test=")
    with _silence():
        backbone = [setting for setting in digits_settings(folder) if setting.startswith(keys)]
    shards = folder / "shards" / "new"
    if held_out:
        shards = folder / "shards" / "held-out"
        _hold_out_digits(folder / "digits", shards)
    own = (*backbone, *_data(shards / "train", shards / "test"), *_DIGITS, f"train.epochs={epochs}")
    pairs = [
        _with_captions(shards / split / "shard-000000.tar", folder / "pairs" / shards.name / split, _digit)
        for split in ("train", "test")
    ]
    captioned = (*_clip_backbone(_CLIP_KWARGS, _digits_clip(folder), 16), *_data(*pairs))
    return own, (*captioned, "clip.text=frozen", *_DIGITS)


def groceries(folder: Path, data: Path, epochs: float, size: int, *, held_out: bool = False) -> Forms:
    """ViT-tiny on photographs of groceries; `held_out` measures on their validation split."""
    tars = [data / "grocery" / f"{split}.tar" for split in ("train", "val" if held_out else "test")]
    own = (
        "backbone.name=timm:vit_tiny_patch16_224",
        f"backbone.weights={data / WEIGHTS['vit']}",
        *_preprocessing(size),
        *_data(*tars),
        *_PHOTOS,
        f"train.epochs={epochs}",
    )
    names = _grocery_names(data / "grocery" / "classes.csv")
    pairs = [_with_captions(tar, folder / "pairs" / tar.stem, names) for tar in tars]
    captioned = (
        *_clip_backbone(_TRUNK_KWARGS, _grocery_clip(folder, data / WEIGHTS["vit"]), size),
        *_preprocessing(size),
        *_data(*pairs),
        "clip.text=trained",  # its weights are random
    )
    return own, captioned


def _data(train: Path, test: Path) -> tuple[str, str]:
    return f"data.train={train}", f"data.test={test}"


def _preprocessing(size: int) -> tuple[str, ...]:
    return (
        f"backbone.image_size={size}",
        "backbone.crop_pct=1.0",
        "backbone.mean=[0.5, 0.5, 0.5]",
        "backbone.std=[0.5, 0.5, 0.5]",
    )


def _hold_out_digits(folder: Path, shards: Path) -> None:
    """Shards of the training images of digits 5-9, every fifth of them for testing."""
    if (shards / "test").exists():
        return
    shutil.rmtree(folder / "held-out", ignore_errors=True)
    for label in sorted((folder / "new" / "train").iterdir()):
        for index, picture in enumerate(sorted(label.iterdir())):
            target = folder / "held-out" / ("test" if index % 5 == 0 else "train") / label.name
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, target)
    with _silence():
        convert_image_folder(folder / "held-out", shards)


# ---- captions


def _digit(class_name: str, number: int) -> str:
    return _OF_NUMBERS[number % len(_OF_NUMBERS)].format(_NUMBERS[int(class_name)])


def _grocery_names(classes: Path) -> Callable[[str, int], str]:
    with classes.open() as file:
        coarse = {row["class_name"]: row["coarse_class_name"] for row in csv.DictReader(file)}

    def caption(class_name: str, number: int) -> str:
        name = f"{class_name}, {coarse[class_name]}".replace("-", " ").lower()
        return _OF_GROCERIES[number % len(_OF_GROCERIES)].format(name)

    return caption


def _with_captions(tar: Path, folder: Path, caption: Callable[[str, int], str]) -> Path:
    """A copy of a tar with a `.txt` beside each picture; `folder` is made once."""
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with tarfile.open(tar) as source, tarfile.open(partial / "shard-000000.tar", "w") as target:
        number = 0
        for member in source:
            file = source.extractfile(member)
            assert file is not None, member.name
            target.addfile(member, file)
            key, _, ending = member.name.rpartition(".")
            if ending in ("png", "jpg"):
                text = caption(key.split("/")[0], number).encode()
                entry = tarfile.TarInfo(f"{key}.txt")
                entry.size = len(text)
                target.addfile(entry, io.BytesIO(text))
                number += 1
    partial.rename(folder)
    return folder


# ---- backbones with a text tower


def _clip_backbone(kwargs: dict[str, object], weights: Path, size: int) -> tuple[str, ...]:
    inline = flow(kwargs)
    return (
        "backbone.name=open_clip:ViT-B-32",
        "backbone.pretrained=true",
        f"backbone.kwargs={inline}",
        f"backbone.weights={weights}",
        f"backbone.image_size={size}",
    )


def _digits_clip(folder: Path) -> Path:
    """A CLIP model trained from random weights on digits 0-4 and captions, as one file."""
    path = folder / "clip" / "digits.safetensors"
    if path.exists():
        return path
    old = folder / "shards" / "old"
    pairs = [
        _with_captions(old / split / "shard-000000.tar", folder / "pairs" / "old" / split, _digit)
        for split in ("train", "test")
    ]
    settings = (
        *COMMON,
        *("backbone.name=open_clip:ViT-B-32", "backbone.pretrained=false", "backbone.image_size=16"),
        f"backbone.kwargs={flow(_CLIP_KWARGS)}",
        *_data(*pairs),
        *_DIGITS,
        *("method=finetune", "objective.name=clip", "clip.text=trained", "train.epochs=30"),
        *("optim.kind=adamw", "optim.weight_lr=1e-3", "optim.head_lr=1e-3", "eval.probe=false"),
        *(f"run.dir={folder / 'clip'}", "run.name=pretrain"),
    )
    with _silence():
        run(load_config(None, settings))
    state = load_file(folder / "clip" / "pretrain" / "encoder.safetensors")
    text = load_file(folder / "clip" / "pretrain" / "head.safetensors")
    whole = {f"visual.{name}": tensor for name, tensor in state.items()}
    whole |= {
        name.removeprefix("text.clip."): tensor
        for name, tensor in text.items()
        if name.startswith("text.clip.")
    }
    save_file(whole | {"logit_scale": text["log_scale"]}, path)
    return path


def _grocery_clip(folder: Path, weights: Path) -> Path:
    """The photographs' ViT-tiny as image tower of a CLIP model whose text tower is random, as one file."""
    path = folder / "clip" / "groceries.safetensors"
    if path.exists():
        return path
    built = load_backbone(BackboneConfig(name="open_clip:ViT-B-32", pretrained=False, kwargs=_TRUNK_KWARGS))
    vit = load_backbone(BackboneConfig(name="timm:vit_tiny_patch16_224", weights=str(weights))).encoder
    assert built.text is not None
    whole = {f"visual.trunk.{name}": tensor for name, tensor in vit.state_dict().items()}
    whole |= {name.removeprefix("clip."): t for name, t in built.text.module.state_dict().items()}
    missing = {f"visual.{name}" for name in built.encoder.state_dict()} - set(whole)
    assert not missing, missing
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.clone(tensor).contiguous() for name, tensor in whole.items()}, path)
    return path


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
