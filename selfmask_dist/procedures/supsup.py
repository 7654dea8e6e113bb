"""SupSup as a run: a mask for each task on one frozen network, and whose the test images are.

Tasks share their labels: output k of the network is the k-th class of whichever task is asked for. Each
mask is a `method=mask` run with a head of its own; images are then taken `procedure.infer_images` at a time,
all of one task, and their task is inferred in every way that `procedures.supsup` knows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from selfmask_dist import data, maskfile
from selfmask_dist.common.seeding import named_generator
from selfmask_dist.config import Config
from selfmask_dist.maskfile import Mask, MaskFile
from selfmask_dist.procedures.classifier import HEAD, Classifier, load_images, open_classifier
from selfmask_dist.procedures.supsup_math import METHODS, Supermasks
from selfmask_dist.runs.life import Life
from selfmask_dist.training.build import build_backbone, open_data
from selfmask_dist.training.chain import Chain, Task, Tensors, class_tasks, mean_of, other_seed

_FILE = "supermasks.mask"
_NUM_REFERENCE = 32  # training images of each task, at most, that scores are held against


def run_supsup(chain: Chain) -> dict[str, Any]:
    """Learn every task's mask, then infer; `supermasks.mask` holds all masks, without the heads."""
    config = chain.config
    train, test = open_data(config)
    tasks = class_tasks(chain, train, test)
    if len(tasks[0].classes) < 2 or len(tasks) < 2:
        raise ValueError(
            f"procedure.tasks is {len(tasks)} for {len(train.classes)} classes; inferring tasks takes two or "
            "more of them, with two or more classes in a task"
        )
    backbone = {**chain.frozen_backbone(), "batchnorm": "frozen"}
    results = [
        chain.train(
            task.name, method="mask", seed=other_seed(config.seed, index), data=task.data, backbone=backbone
        )
        for index, task in enumerate(tasks)
    ]
    path = chain.file(_FILE, lambda file: _bundle(config, chain.folder, tasks, file))
    found = {
        str(size): chain.measure(f"inferred-{size}.json", partial(_infer, config, tasks, size, chain.folder))
        for size in config.procedure.infer_images
    }
    first = found[str(config.procedure.infer_images[0])]
    chosen = first[config.procedure.infer]
    return {
        "tasks": [
            {"classes": [train.classes[c] for c in task.classes], "active": result["mask"]["active"]}
            | result["adapted"]
            for task, result in zip(tasks, results, strict=True)
        ],
        "inferred": found,
        "adapted": mean_of([result["adapted"] for result in results])
        | {"head": first["known"]["head"], "head_inferred": chosen["head"], "inferred": chosen["tasks"]},
        "active": float(np.mean([result["mask"]["active"] for result in results])),
        "stored_bytes": path.stat().st_size,
        "stored_bits": 8 * path.stat().st_size,
    }


def _bundle(config: Config, folder: Path, tasks: Sequence[Task], path: Path) -> None:
    """One mask file of all tasks; later masks as flips of the first one's bits where that is smaller."""
    spec = build_backbone(config).spec
    masks = {task.name: _mask(folder, task) for task in tasks}
    first = tasks[0].name
    file = MaskFile(
        {name: mask if name == first else replace(mask, against=first) for name, mask in masks.items()},
        backbone=spec.name,
        backbone_fingerprint=spec.fingerprint,
        preprocessing=spec.preprocessing.to_dict(),
    )
    maskfile.write_mask_file(path, file)


def _mask(folder: Path, task: Task) -> Mask:
    return next(iter(maskfile.read_mask_file(folder / task.name / "final.mask").masks.values()))


def _infer(
    config: Config, tasks: Sequence[Task], size: int, folder: Path, life: Life
) -> dict[str, dict[str, float]]:
    """By method: how often the task of `size` images is inferred, and the accuracy with what was inferred."""
    train, test = open_data(config)
    width = len(tasks[0].classes)
    network = open_classifier(config, train.classes[:width]).to(life.world.device)
    of_tasks = [_images_of(train, task) for task in tasks]
    number = min(_NUM_REFERENCE, *(len(source) for source in of_tasks))
    # the same on every rank, as scores are compared that ranks compute apart
    reference = [
        images
        for source in of_tasks
        for images, _ in load_images(
            network, data.evenly_spaced(source, number), config.eval.batch_size, life.world.device
        )
    ]
    store = Supermasks(network, reference=reference)
    for task in tasks:
        store.add(task.name, _mask(folder, task), own=_shared_head(folder / task.name / HEAD, task, width))
    # images, groups; right images with the known task; by method: groups inferred right, right images
    counts = torch.zeros(3 + 2 * len(METHODS), dtype=torch.float64, device=life.world.device)
    for group in _groups(test, tasks, size, config.seed, life):
        if group is not None:
            counts += _count(store, tasks, *group, network=network).to(counts.device)
        life.check()
    num_images, num_groups, known, *inferred = life.world.sum(counts).tolist()
    pairs = zip(METHODS, inferred[::2], inferred[1::2], strict=True)
    return {"known": {"tasks": 1.0, "head": known / num_images}} | {
        name: {"tasks": hits / num_groups, "head": right / num_images} for name, hits, right in pairs
    }


def _images_of(source: data.Source, task: Task) -> data.Source:
    return data.Subset(source, np.flatnonzero(np.isin(source.labels, task.classes)))


def _shared_head(path: Path, task: Task, width: int) -> Tensors:
    """The rows of a task's head for its own classes, by their place in the task.

    A task with fewer classes than the others is given rows of classes that it never met, and learned to
    leave out.
    """
    head = {f"objective.{name}": tensor for name, tensor in load_file(path).items()}
    rows = list(task.classes)
    num_classes = len(head["objective.head.weight"])
    rows += [c for c in range(num_classes) if c not in rows][: width - len(rows)]
    chosen = torch.tensor([int(row) for row in rows])
    return {
        name: tensor[chosen] if name.startswith("objective.head.") else tensor
        for name, tensor in head.items()
    }


def _groups(
    test: data.Source, tasks: Sequence[Task], size: int, seed: int, life: Life
) -> Iterator[tuple[int, data.Source] | None]:
    """(task, `size` of its images, by chance) for this rank; None where the other ranks have one more."""
    found: list[tuple[int, data.Source]] = []
    for index, task in enumerate(tasks):
        places = np.flatnonzero(np.isin(test.labels, task.classes))
        order = torch.randperm(len(places), generator=named_generator(seed, f"groups of {task.name}"))
        places = places[order.numpy()]
        found += [(index, data.Subset(test, places[i : i + size])) for i in range(0, len(places), size)]
    rank, ranks = life.world.rank, life.world.size
    rounds = -(-len(found) // ranks)
    for _, group in zip_longest(range(rounds), found[rank::ranks]):
        yield group


def _count(
    store: Supermasks, tasks: Sequence[Task], truth: int, source: data.Source, *, network: Classifier
) -> Tensor:
    device = next(network.parameters()).device
    images, labels = next(load_images(network, source, len(source), device))
    places = torch.searchsorted(torch.from_numpy(tasks[truth].classes).to(device), labels)
    known = store.logits(tasks[truth].name, images).argmax(dim=1)
    counts = [len(labels), 1, int((known == places).sum())]
    for method in METHODS:
        is_right = store.infer(images, method=method).task == tasks[truth].name
        # under another task's mask an image gets one of that task's classes
        counts += [int(is_right), counts[2] if is_right else 0]
    return torch.tensor(counts, dtype=torch.float64)
