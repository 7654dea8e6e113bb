"""What a run leaves beside its numbers, written and read: a mask file or weights, and a head.

save(...)                        final.mask where bits say all, else encoder or finetuned.safetensors;
                                 head.safetensors
outcome = read_outcome(folder)   where these are
outcome.put_on(encoder)          the pretrained encoder becomes the one that training ended with
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from selfmask_dist import objectives
from selfmask_dist.backbones import Backbone
from selfmask_dist.common import names
from selfmask_dist.common.files import replacing, sha256
from selfmask_dist.config import Config, load_config
from selfmask_dist.evals.progress import from_main
from selfmask_dist.maskfile import add_numbers
from selfmask_dist.maskfile.api import Masks, apply_masks, save_masks
from selfmask_dist.masking import Family
from selfmask_dist.parallel import Engine
from selfmask_dist.runs.checkpoint import OpenCheckpoint, Peers, open_newest
from selfmask_dist.training.build import lora_options
from selfmask_dist.training.finetune import load_trained, save_changed


@dataclass(frozen=True)
class Trainable:
    """What a run trains: masks on the encoder (and on a masked head), or plain weights.

    summary: says it to the user.
    weights: names of the backbone's weights that are trained as they are.
    statistics: the backbone's running statistics before training, by name.
    """

    masks: Masks | None
    head_masks: Masks | None
    summary: str
    weights: tuple[str, ...] = ()
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


# ---- writing


@dataclass(frozen=True)
class Saved:
    """What training left in its folder.

    sizes: in bytes, for `result.json`; on the main rank, which wrote the files.
    identity: tells these files from any others; the same on every rank.
    mask: the mask file; None where there is none.
    """

    sizes: dict[str, Any]
    identity: str
    mask: Path | None

    def add_numbers(self, metrics: Mapping[str, float], *, verdict: str) -> None:
        """Add what was measured to the mask file, and what speaks against it. On the main rank."""
        if self.mask is None or not (metrics or verdict):
            return
        self.sizes["mask"] |= _mask_bytes(
            add_numbers(self.mask, metrics=metrics, verdict=verdict), self.sizes["mask"]["masked_weights"]
        )


def save(
    config: Config,
    trained: Trainable,
    backbone: Backbone,
    objective: objectives.Objective,
    directory: Path,
    *,
    engine: Engine,
) -> Saved:
    """Write the mask file (or the trained weights, as theta) and the head, without any numbers yet.

    Collective: every rank must call; the first one writes.
    """
    sizes: dict[str, Any] = {}
    written: list[Path] = []
    mask, is_main = None, engine.world.is_main
    if trained.masks is not None and is_in_mask_file(trained.masks.family):
        num_weights = sum(entry.theta.numel() for entry in trained.masks.entries)
        mask = directory / names.MASK
        mask_bytes = save_masks(
            trained.masks,
            mask,
            is_writer=is_main,
            backbone=backbone.spec.name,
            backbone_fingerprint=backbone.spec.fingerprint,
            preprocessing=backbone.spec.preprocessing.to_dict(),
        )
        sizes["mask"] = {
            "masked_weights": num_weights,
            "active": 1 - sum(_pruned(trained.masks)) / num_weights,
            **_mask_bytes(mask_bytes, num_weights),
            "weight_bytes": num_weights * 4,
        }
        written.append(mask)
    else:
        sizes["weights"] = _save_weights(config, trained, engine, directory)
        sizes["stored_bytes"] = sizes["weights"]["bytes"]
        written.append(directory / sizes["weights"]["file"])
    if trained.head_masks is not None:
        save_masks(trained.head_masks, directory / "head.mask", is_writer=is_main)
        written.append(directory / "head.mask")
    with engine.gathered(objective):
        head = {name: tensor.clone() for name, tensor in _plain(objective.kept_state()).items()}
    if head and is_main:
        with replacing(directory / names.HEAD) as partial:
            save_file(head, partial)
    written += [directory / names.HEAD] if head else []
    identity = " ".join(sha256(path) for path in written) if is_main else None
    return Saved(sizes, from_main(identity, engine.world), mask)


def _mask_bytes(mask_bytes: int, num_weights: int) -> dict[str, Any]:
    return {"bytes": mask_bytes, "bits_per_weight": mask_bytes * 8 / num_weights}


def _save_weights(config: Config, trained: Trainable, engine: Engine, directory: Path) -> dict[str, Any]:
    """Write the encoder, or what fine-tuning changed of it where that is less; return sizes. Collective."""
    section, buffers = config.finetune, dict(engine.encoder.named_buffers())
    moved = [name for name, before in trained.statistics.items() if not torch.equal(buffers[name], before)]
    is_part = trained.masks is None and (section.train != "all" or bool(section.freeze or section.peft))
    path = directory / (names.FINETUNED if is_part else names.ENCODER)
    weights, num_trained = dict[str, Tensor](), 0
    for name, tensor in engine.each_whole_weight({*trained.weights, *moved} if is_part else None):
        num_trained += tensor.numel() if name in trained.weights else 0
        if engine.world.is_main:  # the others hold one at a time
            weights[name] = tensor.cpu()
    if engine.world.is_main and is_part:
        lora = lora_options(config) if section.train == "lora" else None
        peft = {"settings": dict(section.peft), "seed": config.seed} if section.peft else None
        save_changed(weights, path, lora=lora, peft=peft)
    elif engine.world.is_main:
        with replacing(path) as partial:
            save_file(_plain(weights), partial)
    if trained.masks is not None:
        num_trained = sum(entry.theta.numel() for entry in trained.masks.entries)
    return {
        "trained": num_trained,
        "file": path.name,
        "bytes": path.stat().st_size if engine.world.is_main else 0,
    }


def _pruned(masks: Masks) -> list[float]:
    sparsity = masks.sparsity()
    return [sparsity[entry.name] * entry.theta.numel() for entry in masks.entries]


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def is_in_mask_file(family: Family) -> bool:
    """Return whether a mask file says all of what was trained: theta = [a] * W * M on frozen weights, or
    another form that files hold.
    """
    return family.form != "threshold" or (family.is_mask and not family.trains_weight)


# ---- reading


@dataclass(frozen=True)
class Outcome:
    """Where a run's folder has what its training left; None for what it did not leave.

    mask: the mask file. weights: the whole encoder, or the part that fine-tuning changed. head: the
    objective's head.
    """

    folder: Path
    mask: Path | None
    weights: Path | None
    head: Path | None

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """Return the configuration that the run was started with."""
        return load_config(self.folder / names.CONFIG, overrides)

    def result(self) -> dict[str, Any]:
        """Return the run's `result.json`.

        Raises:
            ValueError: the run has not finished.
        """
        path = self.folder / names.RESULT
        if not path.exists():
            left = self.mask or self.weights
            has = f"it has {left.name} and no" if left else "it has no"
            raise ValueError(f"{self.folder} is not finished: {has} {path.name} yet")
        result: dict[str, Any] = json.loads(path.read_text())
        return result

    def put_on(self, encoder: nn.Module) -> None:
        """Put the mask or the weights onto the pretrained encoder, in place.

        Raises:
            ValueError: they are of another network, or the run left neither.
        """
        if self.mask is not None:
            apply_masks(encoder, self.mask)
        elif self.weights is not None:
            load_trained(encoder, self.weights)
        else:
            raise ValueError(f"{self.folder} holds neither a mask nor weights")

    def head_state(self) -> dict[str, Tensor]:
        """Return the head's tensors by their names in the objective; none where no head was kept."""
        return {} if self.head is None else load_file(self.head)


def read_outcome(folder: Path) -> Outcome:
    """Return what the training of a run left in its folder: nothing, where it is not a run's or not done."""

    def find(*choices: str) -> Path | None:
        return next((folder / name for name in choices if (folder / name).exists()), None)

    return Outcome(folder, find(names.MASK), find(names.FINETUNED, names.ENCODER), find(names.HEAD))


def open_last_checkpoint(folder: Path, peers: Peers | None = None) -> OpenCheckpoint:
    """Return the newest valid checkpoint of another run. Nothing in its folder is changed.

    Collective, where `peers` are given: every one of them must call.

    Raises:
        ValueError: there is none; the message says what is wrong with those that are there.
    """
    problems: list[str] = []
    found = open_newest(folder / names.CHECKPOINTS, peers=peers, report=problems.append, set_aside=False)
    if found is None:
        raise ValueError("; ".join([f"{folder} has no valid checkpoint", *problems]))
    return found
