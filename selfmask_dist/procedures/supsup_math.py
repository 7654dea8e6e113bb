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
and each score can be taken relative to that of `reference` images of all tasks. Knows no training loop.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from selfmask_dist import maskfile

Method = Literal["one-shot", "binary", "each"]
METHODS: tuple[Method, ...] = ("one-shot", "binary", "each")


@dataclass(frozen=True)
class _Packed:
    """A task's mask, eight weights to a byte, and tensors that the task has for itself (its head)."""

    mask: maskfile.Mask  # without its bits
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
        self._tasks: dict[str, _Packed] = {}
        self._known: dict[tuple[str, ...], dict[str, float]] = {}  # the reference's gradients, by tasks left
        self._mixed: tuple[dict[str, float], dict[str, Tensor]] | None = None  # the last superposition

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def names(self) -> list[str]:
        return list(self._tasks)

    def add(self, task: str, mask: maskfile.Mask, *, own: Mapping[str, Tensor] | None = None) -> None:
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
        self._tasks[task] = _Packed(replace(mask, bits={}, num_segments=segments), bits, kept)
        self._known.clear()

    def stored_bytes(self, task: str) -> int:
        """What the task takes in memory: a bit for each masked weight, and what it has for itself."""
        packed = self._find(task)
        own = sum(tensor.numel() * tensor.element_size() for tensor in packed.own.values())
        return sum(len(bits) for bits in packed.bits.values()) + own

    def theta(self, task: str) -> dict[str, Tensor]:
        """The weights under a task's mask and what it has for itself, by name."""
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
        """Class logits (n, classes) of images under one task's mask."""
        with torch.no_grad():
            output: Tensor = functional_call(self._model, self.theta(task), (images,))
        return output

    @torch.no_grad()
    def superpose(self, alphas: Mapping[str, float]) -> dict[str, Tensor]:
        """theta(alpha), by name; tasks that are not named have alpha = 0. One theta at a time in memory."""
        total: dict[str, Tensor] = {}
        for task, alpha in alphas.items():
            for name, tensor in self.theta(task).items():
                total[name] = total[name].add_(tensor, alpha=alpha) if name in total else tensor * alpha
        return total

    def entropy_gradient(self, images: Tensor, alphas: Mapping[str, float]) -> dict[str, float]:
        """dH/dalpha_t for each task named in `alphas`, H being the mean over the images (n, ...).

        Of the masks alone: what tasks have for themselves is part of theta(alpha), and of no direction.
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
        """H under one task's mask, the mean over the images."""
        return float(entropy(self.logits(task, images)).mean())

    def infer(self, images: Tensor, *, method: Method = "one-shot") -> Inference:
        """The task that images (n, ...) are of, all of one task.

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
        """-dH/dalpha at alpha uniform over `tasks`, less the reference's."""
        alphas = dict.fromkeys(tasks, 1 / len(tasks))
        key = tuple(tasks)
        if key not in self._known:
            parts = [(len(batch), self.entropy_gradient(batch, alphas)) for batch in self._reference]
            count = sum(number for number, _ in parts)
            self._known[key] = {t: sum(n * found[t] for n, found in parts) / max(count, 1) for t in tasks}
        gradient = self.entropy_gradient(images, alphas)
        return {task: self._known[key][task] - gradient[task] for task in tasks}

    def _find(self, task: str) -> _Packed:
        if task not in self._tasks:
            raise ValueError(f"there is no task {task!r}; there are {self.names[:5]}")
        return self._tasks[task]

    def _parameters(self) -> set[str]:
        first = next(iter(self._tasks.values()))
        return {*first.bits, *first.own}


def entropy(logits: Tensor) -> Tensor:
    """H of softmax(logits), in nats: (n, classes) -> (n,)."""
    return -(logits.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1)


def _ordered(scores: Mapping[str, float]) -> list[str]:
    """Tasks from the highest score on; of equal ones the earlier task comes first."""
    return sorted(scores, key=lambda task: -scores[task])
