"""SupSup: many tasks as masks on one fixed network, and which task images are of, from the output's entropy.

    theta(alpha) = sum_t alpha_t theta_t          H(alpha) = entropy of softmax(f(x; theta(alpha)))

Under its own mask the network is sure of itself, so the task whose weight in the superposition lowers H most
is the one: with G = dH/dtheta, one backward gives every task's gradient at once,

    dH/dalpha_t = <G, theta_t>

One-shot: the largest -dH/dalpha_t at alpha = 1/T. Binary: the better half stays, alpha is uniform over it,
until one is left, log2 T steps. (Wortsman et al., "Supermasks in Superposition", NeurIPS 2020, arXiv
2006.14769, section 3.) Each: the lowest entropy under a mask alone, T forwards, for which gradients stand.

The paper's networks are random: under a wrong mask nothing is left. Masks of a pretrained network have most
weights in common, and two things of other sizes than the images' own stand in the gradients: heads that tasks
have for themselves, and what a mask does to any image. So heads are superposed and left out of the gradient,
and each score can be taken relative to that of `reference` images of all tasks.

`Supermasks` is all of this and knows no training loop. The run below it learns a mask for each task, as a
`method=mask` run with a head of its own. Its tasks share their labels: output k of the network is the k-th
class of whichever task is asked for. Test images are then taken `procedure.infer_images` at a time, all of
one task, and their task is inferred in each of the three ways.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from selfmask_dist import data, maskfile
from selfmask_dist.common.names import HEAD, MASK
from selfmask_dist.common.seeding import named_generator
from selfmask_dist.config import Config
from selfmask_dist.maskfile import Mask, MaskFile
from selfmask_dist.procedures.classifier import Classifier, load_images, open_classifier
from selfmask_dist.runs.context import RunContext
from selfmask_dist.training.build import build_backbone, open_data
from selfmask_dist.training.chain import Chain, Task, Tensors, class_tasks, mean_of, other_seed

Method = Literal["one-shot", "binary", "each"]
METHODS: tuple[Method, ...] = ("one-shot", "binary", "each")


@dataclass(frozen=True)
class _PackedMask:
    """A task's mask, eight weights to a byte, and tensors that the task has for itself (its head)."""

    mask: Mask  # without its bits
    bits: dict[str, npt.NDArray[np.uint8]]
    own: dict[str, Tensor]


@dataclass(frozen=True)
class Inference:
    """The task that was found; `scores`: -dH/dalpha (each: -H) of the last step, by the tasks left in it.
    `steps`: times that images passed the network.
    """

    task: str
    scores: dict[str, float]
    steps: int


class Supermasks:
    """Masks of one network, by the name of their task.

    Args:
        model: holds the frozen weights, and ends in class logits (n, classes) of a number of classes that all
            tasks share. Put in eval mode; its parameters are not written to.
        reference: batches of images, equally many of each task: one-shot and binary then ask how much more
            the images lower the entropy than these do. Without, the scores stand as they are.
    """

    def __init__(self, model: nn.Module, *, reference: Sequence[Tensor] = ()) -> None:
        self._model = model.eval()
        self._reference = tuple(reference)
        self._tasks: dict[str, _PackedMask] = {}
        self._known: dict[tuple[str, ...], dict[str, float]] = {}  # the reference's gradients, by tasks left
        self._mixed: tuple[dict[str, float], dict[str, Tensor]] | None = None  # the last superposition

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def names(self) -> list[str]:
        """The tasks, in the order in which they came."""
        return list(self._tasks)

    def add(self, task: str, mask: Mask, *, own: Mapping[str, Tensor] | None = None) -> None:
        """Take in a task's mask, and further parameters of the model that the task has for itself.

        Raises:
            ValueError: the name is taken, the mask is of other weights or has running statistics of its own,
                or masks differ in what they mask.
        """
        if task in self._tasks:
            raise ValueError(f"there is a task {task!r} already; take another name")
        if mask.statistics:
            raise ValueError(
                f"the mask of task {task!r} brings running statistics of its own, which cannot be "
                f"superposed; learn it with backbone.batchnorm=frozen"
            )
        full = {id(p): name for name, p in self._model.named_parameters()}
        places = {name: full[id(p)] for name, p in maskfile.check_fits(self._model, mask).items()}
        names = {*places.values(), *(own or {})}
        if self._tasks and names != self._parameters():
            raise ValueError(
                f"task {task!r} changes other parameters than the tasks before it: "
                f"{sorted(names ^ self._parameters())[:3]}; superposed masks lie on the same ones"
            )
        bits = {places[name]: np.packbits(tensor.cpu().numpy().ravel()) for name, tensor in mask.bits.items()}
        segments = {places[name]: number for name, number in mask.num_segments.items()}
        device = next(self._model.parameters()).device
        kept = {name: tensor.detach().clone().to(device) for name, tensor in (own or {}).items()}
        self._tasks[task] = _PackedMask(replace(mask, bits={}, num_segments=segments), bits, kept)
        self._known.clear()

    def stored_bytes(self, task: str) -> int:
        """Return what the task takes in memory: a bit for each masked weight, and what it has for itself."""
        packed = self._find(task)
        own = sum(tensor.numel() * tensor.element_size() for tensor in packed.own.values())
        return sum(len(bits) for bits in packed.bits.values()) + own

    def theta(self, task: str) -> dict[str, Tensor]:
        """Return the weights under a task's mask and what it has for itself, by name."""
        return {**self._masked(task), **self._find(task).own}

    @torch.no_grad()
    def _masked(self, task: str) -> dict[str, Tensor]:
        packed, theta = self._find(task), {}
        for name, bits in packed.bits.items():
            weight = self._model.get_parameter(name)
            flat = np.unpackbits(bits, count=weight.numel()).astype(bool)
            mask = replace(packed.mask, bits={name: torch.from_numpy(flat).view(weight.shape)})
            theta[name] = maskfile.materialize(mask, name, weight)
        return theta

    def logits(self, task: str, images: Tensor) -> Tensor:
        """Return class logits (n, classes) of images under one task's mask."""
        with torch.no_grad():
            output: Tensor = functional_call(self._model, self.theta(task), (images,))
        return output

    @torch.no_grad()
    def superpose(self, alphas: Mapping[str, float]) -> dict[str, Tensor]:
        """Return theta(alpha), by name; other tasks have alpha = 0. One theta at a time is in memory."""
        total: dict[str, Tensor] = {}
        for task, alpha in alphas.items():
            for name, tensor in self.theta(task).items():
                total[name] = total[name].add_(tensor, alpha=alpha) if name in total else tensor * alpha
        return total

    def entropy_gradient(self, images: Tensor, alphas: Mapping[str, float]) -> dict[str, float]:
        """Return dH/dalpha_t for each task named in `alphas`, H being the mean over the images (n, ...).

        It is of the masks alone: what tasks have for themselves is part of theta(alpha), and of no direction.
        """
        if self._mixed is None or self._mixed[0] != dict(alphas):
            self._mixed = dict(alphas), self.superpose(alphas)
        mixed = self._mixed[1]
        masked = next(iter(self._tasks.values())).bits
        leaves = {name: mixed[name].detach().requires_grad_() for name in masked}
        value = entropy(functional_call(self._model, {**mixed, **leaves}, (images,))).mean()
        grads = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
        with torch.no_grad():
            return {
                task: sum(float((grads[name] * part).sum()) for name, part in self._masked(task).items())
                for task in alphas
            }

    @torch.no_grad()
    def mean_entropy(self, images: Tensor, task: str) -> float:
        """Return H under one task's mask, the mean over the images."""
        return float(entropy(self.logits(task, images)).mean())

    def infer(self, images: Tensor, *, method: Method = "one-shot") -> Inference:
        """Return the task that images (n, ...) are of, all of one task.

        Raises:
            ValueError: no tasks, or an unknown method.
        """
        if not self._tasks:
            raise ValueError("there are no tasks to choose from; add masks first")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if method == "each":
            scores = {task: -self.mean_entropy(images, task) for task in self.names}
            return Inference(_ordered(scores)[0], scores, len(scores))
        left, steps = self.names, 0
        while steps == 0 or len(left) > 1:
            scores = self._scores(images, left)
            order = _ordered(scores)
            left = order[: 1 if method == "one-shot" else math.ceil(len(order) / 2)]
            steps += 1
        return Inference(left[0], scores, steps)

    def _scores(self, images: Tensor, tasks: Sequence[str]) -> dict[str, float]:
        """Return -dH/dalpha at alpha uniform over `tasks`, less the reference's."""
        alphas = dict.fromkeys(tasks, 1 / len(tasks))
        key = tuple(tasks)
        if key not in self._known:
            parts = [(len(batch), self.entropy_gradient(batch, alphas)) for batch in self._reference]
            count = sum(number for number, _ in parts)
            self._known[key] = {t: sum(n * found[t] for n, found in parts) / max(count, 1) for t in tasks}
        gradient = self.entropy_gradient(images, alphas)
        return {task: self._known[key][task] - gradient[task] for task in tasks}

    def _find(self, task: str) -> _PackedMask:
        if task not in self._tasks:
            raise ValueError(f"there is no task {task!r}; there are {self.names[:5]}")
        return self._tasks[task]

    def _parameters(self) -> set[str]:
        first = next(iter(self._tasks.values()))
        return {*first.bits, *first.own}


def entropy(logits: Tensor) -> Tensor:
    """Return H of softmax(logits), in nats: (n, classes) -> (n,)."""
    return -(logits.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)


def _ordered(scores: Mapping[str, float]) -> list[str]:
    """Return tasks from the highest score on; of equal ones the earlier task comes first."""
    return sorted(scores, key=lambda task: -scores[task])


# ---- the run

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
    """Write one mask file of all tasks; later masks are flips of the first one's bits if that is smaller."""
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
    return next(iter(maskfile.read_mask_file(folder / task.name / MASK).masks.values()))


def _infer(
    config: Config, tasks: Sequence[Task], size: int, folder: Path, context: RunContext
) -> dict[str, dict[str, float]]:
    """Return by method how often the task of `size` images is inferred, and the accuracy with that task."""
    train, test = open_data(config)
    width = len(tasks[0].classes)
    network = open_classifier(config, train.classes[:width]).to(context.world.device)
    of_tasks = [_images_of(train, task) for task in tasks]
    number = min(_NUM_REFERENCE, *(len(source) for source in of_tasks))
    # the same on every rank, as scores are compared that ranks compute apart
    reference = [
        images
        for source in of_tasks
        for images, _ in load_images(
            network, data.evenly_spaced(source, number), config.eval.batch_size, context.world.device
        )
    ]
    store = Supermasks(network, reference=reference)
    for task in tasks:
        store.add(task.name, _mask(folder, task), own=_shared_head(folder / task.name / HEAD, task, width))
    # images, groups; right images with the known task; by method: groups inferred right, right images
    counts = torch.zeros(3 + 2 * len(METHODS), dtype=torch.float64, device=context.world.device)
    check = context.paced_check()
    for group in _groups(test, tasks, size, config.seed, context):
        if group is not None:
            counts += _count(store, tasks, *group, network=network).to(counts.device)
        check()
    num_images, num_groups, known, *inferred = context.world.sum(counts).tolist()
    pairs = zip(METHODS, inferred[::2], inferred[1::2], strict=True)
    return {"known": {"tasks": 1.0, "head": known / num_images}} | {
        name: {"tasks": hits / num_groups, "head": right / num_images} for name, hits, right in pairs
    }


def _images_of(source: data.Source, task: Task) -> data.Source:
    return data.Subset(source, np.flatnonzero(np.isin(source.labels, task.classes)))


def _shared_head(path: Path, task: Task, width: int) -> Tensors:
    """Return the rows of a task's head for its own classes, by their place in the task.

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
    test: data.Source, tasks: Sequence[Task], size: int, seed: int, context: RunContext
) -> Iterator[tuple[int, data.Source] | None]:
    """Yield (task, `size` of its images, by chance) for this rank; None where other ranks have one more."""
    found: list[tuple[int, data.Source]] = []
    for index, task in enumerate(tasks):
        samples = np.flatnonzero(np.isin(test.labels, task.classes))
        order = torch.randperm(len(samples), generator=named_generator(seed, f"groups of {task.name}"))
        samples = samples[order.numpy()]
        found += [(index, data.Subset(test, samples[i : i + size])) for i in range(0, len(samples), size)]
    rank, ranks = context.world.rank, context.world.size
    rounds = -(-len(found) // ranks)
    for _, group in zip_longest(range(rounds), found[rank::ranks]):
        yield group


def _count(
    store: Supermasks, tasks: Sequence[Task], truth: int, source: data.Source, *, network: Classifier
) -> Tensor:
    device = next(network.parameters()).device
    images, labels = next(load_images(network, source, len(source), device))
    within = torch.searchsorted(torch.from_numpy(tasks[truth].classes).to(device), labels)
    known = store.logits(tasks[truth].name, images).argmax(dim=1)
    counts = [len(labels), 1, int((known == within).sum())]
    for method in METHODS:
        is_right = store.infer(images, method=method).task == tasks[truth].name
        # under another task's mask an image gets one of that task's classes
        counts += [int(is_right), counts[2] if is_right else 0]
    return torch.tensor(counts, dtype=torch.float64)
