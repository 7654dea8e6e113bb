"""SupSup: many tasks as masks on one fixed network, and which task an image is of, from the output's entropy.

    theta(alpha) = sum_t alpha_t theta_t          H(alpha) = entropy of softmax(f(x; theta(alpha)))

Under its own mask the network is sure of itself, so the task whose weight in the superposition lowers H most
is the one: with G = dH/dtheta, one backward gives every task's gradient at once,

    dH/dalpha_t = <G, theta_t>

One-shot: the largest -dH/dalpha_t at alpha = 1/T. Binary: the better half stays, alpha is uniform over it,
until one is left, log2 T steps. (Wortsman et al., "Supermasks in Superposition", NeurIPS 2020, arXiv
2006.14769, section 3.) The network may be random or pretrained. Masks are learned like any other
mask, one run or `attach` for each task; a task costs its mask's bits. Knows no training loop.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from selfmask_dist import artifact

Method = Literal["one-shot", "binary"]


@dataclass(frozen=True)
class _Packed:
    """A task's mask, eight weights to a byte, and tensors that the task has for itself (its head)."""

    mask: artifact.Mask  # without its bits
    bits: dict[str, npt.NDArray[np.uint8]]
    own: dict[str, Tensor]


@dataclass(frozen=True)
class Inference:
    """The task that was found; `scores`: -dH/dalpha of the last step, by the tasks that were left in it."""

    task: str
    scores: dict[str, float]
    steps: int


class Supermasks:
    """Masks of one network, by the name of their task.

    Args:
        model: holds the frozen weights, and ends in class logits (n, classes) of a number of classes that all
            tasks share. Put in eval mode; its parameters are not written to.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model.eval()
        self._tasks: dict[str, _Packed] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def names(self) -> list[str]:
        return list(self._tasks)

    def add(self, task: str, mask: artifact.Mask, *, own: Mapping[str, Tensor] | None = None) -> None:
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
        places = {name: full[id(p)] for name, p in artifact.check_fits(self._model, mask).items()}
        names = {*places.values(), *(own or {})}
        if self._tasks and names != self._parameters():
            raise ValueError(
                f"task {task!r} changes other parameters than the tasks before it: "
                f"{sorted(names ^ self._parameters())[:3]}; superposed masks lie on the same ones"
            )
        bits = {places[name]: np.packbits(tensor.cpu().numpy().ravel()) for name, tensor in mask.bits.items()}
        segments = {places[name]: number for name, number in mask.num_segments.items()}
        kept = {name: tensor.detach().clone() for name, tensor in (own or {}).items()}
        self._tasks[task] = _Packed(replace(mask, bits={}, num_segments=segments), bits, kept)

    def stored_bytes(self, task: str) -> int:
        """What the task takes in memory: a bit for each masked weight, and what it has for itself."""
        packed = self._find(task)
        own = sum(tensor.numel() * tensor.element_size() for tensor in packed.own.values())
        return sum(len(bits) for bits in packed.bits.values()) + own

    @torch.no_grad()
    def theta(self, task: str) -> dict[str, Tensor]:
        """The weights under a task's mask, by name."""
        packed, theta = self._find(task), {}
        for name, bits in packed.bits.items():
            weight = self._model.get_parameter(name)
            flat = np.unpackbits(bits, count=weight.numel()).astype(bool)
            mask = replace(packed.mask, bits={name: torch.from_numpy(flat).view(weight.shape)})
            theta[name] = artifact.materialize(mask, name, weight)
        return {**theta, **packed.own}

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
        """dH/dalpha_t for each task named in `alphas`, H being the mean over the images (n, ...)."""
        theta = {name: t.requires_grad_() for name, t in self.superpose(alphas).items()}
        value = entropy(functional_call(self._model, theta, (images,))).mean()
        grads = dict(zip(theta, torch.autograd.grad(value, list(theta.values())), strict=True))
        return {
            task: sum(float((grads[name] * part).sum()) for name, part in self.theta(task).items())
            for task in alphas
        }

    def infer(self, images: Tensor, *, method: Method = "one-shot") -> Inference:
        """The task that images (n, ...) are of, all of one task.

        Raises:
            ValueError: no tasks, or an unknown method.
        """
        if not self._tasks:
            raise ValueError("there are no tasks to choose from; add masks first")
        if method not in ("one-shot", "binary"):
            raise ValueError(f"method must be one-shot or binary, got {method!r}")
        left, steps = self.names, 0
        scores = dict.fromkeys(left, 0.0)
        while steps == 0 or len(left) > 1:
            gradient = self.entropy_gradient(images, dict.fromkeys(left, 1 / len(left)))
            scores = {task: -value for task, value in gradient.items()}
            order = sorted(left, key=lambda task: -scores[task])  # stable: of equal ones the earlier task
            left = order[: 1 if method == "one-shot" else math.ceil(len(order) / 2)]
            steps += 1
        return Inference(left[0], scores, steps)

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


def is_new(inference: Inference, *, margin: float = 1.0) -> bool:
    """Whether no task stands out: softmax of the one-shot scores is nearly uniform (scenario GNu).

    Args:
        margin: the largest share must exceed (1 + margin) / tasks to count as known.
    """
    shares = torch.tensor(list(inference.scores.values()), dtype=torch.float64).softmax(dim=0)
    return float(shares.max()) <= (1 + margin) / len(shares)
