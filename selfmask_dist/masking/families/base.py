"""A mask family: how theta follows from what is trained, and what gradient goes back to it.

    before     measure, rank       numbers of the whole tensor that the mask depends on, where there are any
    theta      write, finish       in place; what `write` returns is summed over ranks before `finish`
    gradient   back_sums, pull_back

Every method works on the piece of one scaled tensor that this process holds (`Segment`), elementwise, so that
a family inherits sharding, preemption, files and evaluation. Sums travel for all tensors in one collective.
A new family overrides what differs; `docs/methods.md` has a worked example.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from selfmask_dist.masking import core
from selfmask_dist.masking.pieces import Segment


@dataclass(frozen=True)
class FamilyOptions:
    """The keys of the config's mask section that families read.

    keep: share of the weights that families which rank keep at the end of their schedule.
    keep_scope: ranked within each tensor, or over all of them together.
    keep_schedule, keep_steps: the kept share goes from 1 to `keep` in so many steps, linearly or as
        keep + (1 - keep) (1 - t)^3 (Zhu and Gupta 2017, "To prune, or not to prune").
    keep_warmup: steps before that, in which all is kept.
    penalty: of movement pruning's soft form, on sigmoid(S).
    block_rows, block_columns: of block movement pruning; 0 means all of a tensor's.
    maskable, maskable_by: the share of weights that may be pruned, chosen at random or by largest magnitude
        within each tensor; all others are always kept (scores of +infinity).
    seed: of random first scores and random choices.
    """

    threshold: float = 0.0
    scale: core.Scale = "through"
    keep: float = 0.5
    keep_scope: Literal["tensor", "global"] = "tensor"
    keep_schedule: Literal["constant", "linear", "cubic"] = "constant"
    keep_steps: int = 0
    keep_warmup: int = 0
    penalty: float = 0.0
    block_rows: int = 32
    block_columns: int = 32
    maskable: float = 1.0
    maskable_by: Literal["random", "magnitude"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scale not in get_args(core.Scale):
            raise ValueError(f"scale {self.scale!r} is not one of {', '.join(get_args(core.Scale))}")


class Family:
    """The base of all families: theta = W * M, or a * W * M, of a mask M that a subclass defines.

    form: the kind of mask that files hold of it, see `maskfile.forms`.
    is_mask: theta = [a] * W * M on frozen weights, so that one bit a weight says it all: engine `bits` sends
        it and mask files hold it.
    has_threshold: what is kept has scores above `options.threshold`.
    ranks: the mask depends on the order of all of a tensor; see `ranked`.
    trains_scores: False where scores are fixed, or small numbers stand for them.
    trains_weight: W is trained too.
    starts_from_weight: the tensor called scores is a latent weight and starts as W.
    moves_scores: `after_step` does something.
    measures_largest: `measure` gives numbers of which the largest over ranks is meant, not the sum.
    needs_other: a second set of frozen weights is given when it is attached.
    reads_scores: `pull_back` reads the scores.
    """

    name: ClassVar[str] = ""
    form: ClassVar[str] = "threshold"
    is_mask: ClassVar[bool] = True
    has_threshold: ClassVar[bool] = False
    ranks: ClassVar[bool] = False
    trains_scores: ClassVar[bool] = True
    trains_weight: ClassVar[bool] = False
    starts_from_weight: ClassVar[bool] = False
    moves_scores: ClassVar[bool] = False
    measures_largest: ClassVar[bool] = False
    needs_other: ClassVar[bool] = False
    reads_scores: ClassVar[bool] = False

    def __init__(self, options: FamilyOptions | None = None) -> None:
        self.options = options or FamilyOptions()

    @property
    def is_scaled(self) -> bool:
        """Return whether theta has the factor a = (N / sum M)^(1/2)."""
        return self.options.scale != "none"

    @property
    def has_back_sums(self) -> bool:
        """Return whether `back_sums` gives something."""
        return False

    @property
    def needs_scores(self) -> bool:
        """Return whether `gradient` reads the scores."""
        return self.reads_scores or self.options.maskable < 1

    # ---- what is trained

    def first_scores(self, name: str, weight: Tensor) -> Tensor | None:
        """Return a whole parameter's first scores, in its shape, or None where they are the usual ones."""
        return weight if self.starts_from_weight else None

    def first_numbers(self, shape: torch.Size, weight: Tensor) -> Tensor | None:
        """Return the first value of the small tensor trained with each segment of a whole parameter, 1-D.

        Args:
            shape: of one segment; all segments of a parameter have equally many numbers.
            weight: the whole segment's.
        """
        return None

    # ---- before theta is written

    def measure(self, segment: Segment) -> Tensor | None:
        """Return sums over the piece, 1-D, that `mask` and `write` need of the whole segment.

        They are summed over ranks and then lie in `segment.whole.measured`.
        """
        return None

    def ranked(self, segment: Segment) -> Tensor:
        """Return what families that rank keep the largest of, in the shape of the piece."""
        raise NotImplementedError(f"{type(self).__name__} ranks and does not say what")

    def share(self, step: int) -> float:
        """Return the share that is kept in the forward of step `step` (from 0), for families that rank."""
        return self.options.keep + (1 - self.options.keep) * self.left(step)

    def left(self, step: int) -> float:
        """Return what is left of the schedule at a step: 1 at its begin, 0 from its end on."""
        options = self.options
        if options.keep_schedule == "constant":
            return 0.0
        passed = max(step - options.keep_warmup, 0)
        if passed >= options.keep_steps:
            return 0.0
        left = 1 - passed / options.keep_steps
        return left if options.keep_schedule == "linear" else left**3

    def block(self, shape: torch.Size) -> tuple[int, int] | None:
        """Return how many rows and columns of a tensor share a bit; None where each weight has its own."""
        return None

    def distance(self, segment: Segment) -> Tensor | None:
        """Return how far the piece's scores are from where the mask switches, for statistics, or None."""
        return None

    # ---- theta

    def mask(self, segment: Segment) -> Tensor:
        """Return which weights of the piece are kept (nonzero), as bools."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it keeps")

    def write(self, segment: Segment) -> Tensor:
        """Write theta but for what needs sums over ranks; returns those sums, 1-D float64.

        The first is the number of kept weights.
        """
        segment.theta.copy_(self.mask(segment))
        num_kept = core.count_kept(segment.theta)
        segment.theta.mul_(segment.weight)
        return num_kept.view(1)

    def finish(self, segment: Segment) -> None:
        """Make theta what it is, with the sums of the whole tensor at hand (`whole.sums`, `whole.scale`)."""
        if self.is_scaled:
            core.multiply(segment.theta, segment.whole.scale)

    # ---- gradients

    def back_sums(self, segment: Segment, grad: Tensor) -> Tensor:
        """Return sums over the piece, 1-D, that `pull_back` needs of the whole segment; `grad` is G."""
        raise NotImplementedError(f"{type(self).__name__} says that it has back sums")

    def pull_back(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        """Write dL/dS of the piece into `out`, from G and the summed `back_sums`.

        Here: straight through, a as a constant, dL/dS = a * G * W.
        """
        scale = segment.whole.scale if self.is_scaled else None
        core.pullback(
            grad, segment.weight, scale=scale, grad_dot_theta=None, num_kept=segment.whole.kept, out=out
        )

    def shift(self, segment: Segment, back: Tensor) -> Tensor:
        """Return the one number, 0-d, by which `pull_back` with `back` differs from `pull_back` with None.

        Families that have it can send the sums that the score step `rms` needs along with `back_sums`; for
        others these sums are a collective of their own.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what back sums add to a gradient")

    def pull_back_weight(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        """Write dL/dW into `out`, for families that train W."""
        raise NotImplementedError(f"{type(self).__name__} trains weights and has no gradient for them")

    def pull_back_numbers(self, segment: Segment, back: Tensor | None, out: Tensor) -> None:
        """Write the gradient of `segment.numbers` into `out`, from sums alone."""
        raise NotImplementedError(f"{type(self).__name__} trains numbers and has no gradient for them")

    def after_step(self, segment: Segment) -> None:
        """Change scores in place after a step of the optimizer, before theta is written."""

    # ---- for the frame

    def gradient(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        """Write dL/dS as `pull_back` does, with no gradient for weights that are always kept."""
        self.pull_back(segment, grad, back, out)
        if self.options.maskable < 1:
            out.masked_fill_(segment.scores.isposinf(), 0)
