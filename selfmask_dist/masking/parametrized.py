"""Masks as a parametrisation: scores are the module's parameters and theta is made anew in every forward.

    theta = a * W * M        dL/dS = a * G * W - <G, theta> / (2 * sum M)        (see `core`)

This is for optimizers that own their parameters and lay them out as they like (DeepSpeed ZeRO): what they
train must be a parameter of the module. `attach` is cheaper wherever it can be used. The module must hold
whole scores and weights while it runs. Knows nothing of files, process groups or kinds of optimizers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from selfmask_dist.masking import checks, core, first_scores, marks
from selfmask_dist.masking.families import Family
from selfmask_dist.masking.families import build as build_family
from selfmask_dist.masking.passes import measure_and_rank
from selfmask_dist.masking.pieces import Segment, Shards, Whole
from selfmask_dist.masking.reading import MaskSet
from selfmask_dist.masking.selection import Selection


class Clock:
    """The number of steps done, shared by all masks of a model."""

    step = 0


class FamilyMask(nn.Module):
    """Scores -> theta for one parameter; holds its frozen weight."""

    def __init__(self, weight: Tensor, *, family: Family, num_segments: int, clock: Clock) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.family = family
        self.num_segments = num_segments
        self.clock = clock

    def forward(self, scores: Tensor) -> Tensor:
        theta: Tensor = _Theta.apply(scores, self.weight, self.family, self.num_segments, self.clock.step)
        return theta


class _Theta(torch.autograd.Function):
    """The passes of `passes`, with all of a tensor at hand."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, weight: Tensor, family: Family, num_segments: int, step: int
    ) -> Tensor:
        theta = torch.empty_like(weight)
        segments = _segments(theta, weight, scores, num_segments)
        measure_and_rank(family, segments, Shards(), step)
        for segment in segments:
            whole = segment.whole
            whole.sums = family.write(segment)
            whole.kept = whole.sums[0]
            whole.scale = core.scale_factor(whole.kept, whole.numel, theta.dtype)
            family.finish(segment)
        # the weight itself, not theta: under ZeRO-3 it is given back after forward and gathered for backward
        ctx.save_for_backward(
            weight, theta if family.has_back_sums else None, scores if family.needs_scores else None
        )
        ctx.constants = (family, [segment.whole for segment in segments], scores.dtype)
        return theta

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight, theta, scores = ctx.saved_tensors
        family, wholes, dtype = ctx.constants
        out = torch.empty_like(weight, dtype=dtype)
        segments = _segments(
            out if theta is None else theta, weight, out if scores is None else scores, len(wholes), wholes
        )
        parts = len(wholes)
        for segment, grad_piece, out_piece in zip(segments, grad.chunk(parts), out.chunk(parts), strict=True):
            back = family.back_sums(segment, grad_piece) if family.has_back_sums else None
            family.gradient(segment, grad_piece, back, out_piece)
        return out, None, None, None, None


def _segments(
    theta: Tensor, weight: Tensor, scores: Tensor, num_segments: int, wholes: Sequence[Whole] | None = None
) -> list[Segment]:
    """Return whole segments as views; `wholes` as they were in forward."""
    thetas, weights, all_scores = (t.detach().chunk(num_segments) for t in (theta, weight, scores))
    views = list(zip(thetas, weights, all_scores, strict=True))
    wholes = wholes or [Whole(view[0].numel(), view[0].shape) for view in views]
    return [Segment(*view, whole) for view, whole in zip(views, wholes, strict=True)]


class ReadShards(Shards):
    """Every tensor is wherever its optimizer keeps it; `read` gives its whole value."""

    def __init__(self, read: Callable[[nn.Parameter], Tensor]) -> None:
        self._read = read

    def piece(self, name: str, tensor: Tensor) -> Tensor:
        return self.whole(name, tensor)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        return self._read(tensor) if isinstance(tensor, nn.Parameter) else tensor

    def whole_weight(self, name: str, weight: Tensor) -> Tensor:
        return self.whole(name, weight)


@dataclass
class ParametrizedEntry:
    """One parameter under a mask, with the names that `MaskedParameter` gives its parts."""

    name: str
    scores: nn.Parameter
    weight: nn.Parameter
    shape: torch.Size
    num_segments: int
    shards: Shards
    numbers: nn.Parameter | None = None
    wholes: list[Whole] | None = None  # as they were last looked at

    @property
    def first_weight(self) -> Tensor:
        return self.weight

    @property
    def theta(self) -> Tensor:
        """Return a stand-in of theta's shape; theta itself exists only inside a forward."""
        return torch.empty(self.shape, device="meta")

    def piece(self, tensor: Tensor) -> Tensor:
        return self.shards.piece(self.name, tensor)

    def segments(self) -> list[Segment]:
        """Return whole segments, read from wherever they are; their theta holds nothing."""
        weight, scores = self.piece(self.weight), self.piece(self.scores)
        segments = _segments(torch.empty_like(weight), weight, scores, self.num_segments, self.wholes)
        self.wholes = [segment.whole for segment in segments]
        return segments


class ParametrizedMasks(MaskSet[ParametrizedEntry]):
    """The masks on one model. Made by `parametrized_attach`."""

    def __init__(
        self,
        model: nn.Module,
        entries: Sequence[ParametrizedEntry],
        *,
        family: Family,
        shards: Shards,
        clock: Clock,
    ) -> None:
        self._clock = clock
        super().__init__(model, entries, family=family, shards=shards)

    @torch.no_grad()
    def each_mask_piece(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and mask of one parameter after the other: pieces are whole here, and read for it."""
        for entry in self.entries:  # none is measured or ranked together with another, see `_check_family`
            yield from self._pieces_of([entry])

    @property
    def step(self) -> int:
        """Return the number of steps done, which the engine counts: `bind` has no hook to do it."""
        return self._clock.step

    @step.setter
    def step(self, value: int) -> None:
        self._clock.step = value

    def bind(self, optimizer: Optimizer, *, score_step: core.ScoreStep = "plain") -> None:
        """Do nothing but what `score_step` says: theta follows from the scores in every forward.

        Raises:
            ValueError: `rms` with an optimizer that sizes its steps itself.
        """
        checks.check_score_step(score_step, optimizer, self.family)
        if score_step == "rms":
            optimizer.register_step_pre_hook(self._before_step)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        checks.check_no_closure(optimizer, (*arguments, *keywords.values()))
        grads = [entry.scores.grad for entry in self.entries if entry.scores.grad is not None]
        if grads:
            squares = torch.stack([core.sum_of_squares(grad) for grad in grads])
            core.normalise(grads, squares, [grad.numel() for grad in grads])

    def pull_back(self, sums: Tensor | None = None, *, take: bool = False) -> None:
        """Do nothing: autograd does it."""

    def rewrite(self) -> None:
        """Do nothing: theta follows from the scores in every forward."""

    def summary(self) -> str:
        """Return what is masked, in a line for the start of a log."""
        masked = sum(entry.shape.numel() for entry in self.entries)
        return (
            f"masked   {len(self.entries):4d} parameters, {masked:,} weights, family {self.family.name} "
            f"(parametrised)"
        )


def parametrized_attach(
    model: nn.Module,
    *,
    family: str | Family = "threshold",
    init: float | str | Mapping[str, Tensor] = 1.0,
    split_qkv: bool = False,
    read: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter.detach(),
    **selected: Unpack[Selection],
) -> ParametrizedMasks:
    """Put a learned mask on chosen parameters of `model`, in place; see `AttachedMasks.attach`.

    Args:
        read: gives a parameter's whole value, for optimizers that partition parameters.

    Raises:
        ValueError: as `attach`, or theta cannot be made of one parameter's scores and frozen weight alone.
    """
    family = build_family(family) if isinstance(family, str) else family
    _check_family(family)
    names = checks.choose(model, family=family, init=init, **selected)
    checks.warn_where_partly_masked(model, selected.get("include", "auto"))
    if isinstance(init, Mapping):
        init = checks.own_init(init, names)
    for parameter in model.parameters():
        if not hasattr(parameter, marks.MARK):  # scores of earlier masks
            parameter.requires_grad_(False)
    shards, entries, clock = ReadShards(read), [], Clock()
    for name in names:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = getattr(module, attribute).detach()
        num_segments = checks.num_segments(name, split_qkv=split_qkv)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        start = init[name] if isinstance(init, Mapping) else first_scores.starter(init, name, family)
        start = start(weight) if callable(start) else torch.as_tensor(start)
        scores = torch.empty(weight.shape, dtype=dtype, device=weight.device).copy_(start)
        mask = FamilyMask(weight, family=family, num_segments=num_segments, clock=clock)
        setattr(module, attribute, nn.Parameter(scores))
        parametrize.register_parametrization(module, attribute, mask, unsafe=True)
        trained = module.get_parameter(f"parametrizations.{attribute}.original")
        trained.requires_grad_(family.trains_scores)
        setattr(trained, marks.MARK, True)
        entries.append(ParametrizedEntry(name, trained, mask.weight, weight.shape, num_segments, shards))
    return ParametrizedMasks(model, entries, family=family, shards=shards, clock=clock)


def _check_family(family: Family) -> None:
    """Raise a ValueError where theta cannot be made of one parameter's scores and frozen weight alone."""
    numbers = checks.has_numbers(family)
    if not family.is_mask or family.trains_weight or family.moves_scores or numbers:
        raise ValueError(
            f"mask.family={family.name} is more than a mask on frozen weights, which engine.name=deepspeed "
            f"cannot train; use ddp or fsdp"
        )
    if family.ranks and family.options.keep_scope == "global":
        raise ValueError(
            "mask.keep_scope=global ranks all tensors together, and engine.name=deepspeed makes them one by "
            "one; use mask.keep_scope=tensor, or engine.name=ddp, fsdp or bits"
        )
