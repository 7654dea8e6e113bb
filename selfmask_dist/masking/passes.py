"""The two passes over the tensors under a mask: scores to theta, and theta's gradient to what is trained.

    forward    measure, rank -> write -> sum over ranks, all tensors at once -> finish
    backward   back sums -> sum over ranks -> pull back -> where asked for, put to unit size

A `Family` says what happens to a piece; this says when, and to which pieces together. Knows nothing of
modules, optimizers or process groups.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfmask_dist.masking import core, ranking
from selfmask_dist.masking.families.base import Family
from selfmask_dist.masking.parameter import MaskedParameter
from selfmask_dist.masking.pieces import Segment, Shards


@dataclass(frozen=True)
class Pull:
    """One scaled tensor's piece on the way back: G in, gradients out."""

    segment: Segment
    grad: Tensor
    scores: Tensor | None
    weight: Tensor | None
    numbers: Tensor | None


class Passes:
    """Both passes for one family and one way of sharding."""

    def __init__(self, family: Family, shards: Shards) -> None:
        self.family = family
        self.shards = shards
        self._sizes: dict[str, Tensor] = {}  # N of every segment on the device, by a group's first entry
        self._lengths: list[int] = []  # of the newest back sums
        self.score_step: core.ScoreStep = "plain"  # rms: `pull_back` normalises too

    # ---- forward

    def rewrite(self, entries: Sequence[MaskedParameter], step: int) -> None:
        """Write theta, as it is to be in the forward of step `step`. Collective under `shards`."""
        is_global = self.family.options.keep_scope == "global"
        if is_global:
            measure_and_rank(
                self.family, [s for entry in entries for s in entry.segments()], self.shards, step
            )
        for group in self._groups(entries):
            self._rewrite(group, step, is_measured=is_global)
        self.shards.complete(entries, is_scaled=self.family.is_scaled)

    def after_step(self, entries: Sequence[MaskedParameter]) -> None:
        """Let a family change its scores after the optimizer's step."""
        if self.family.moves_scores:
            for entry in entries:
                for segment in entry.segments():
                    self.family.after_step(segment)

    def _groups(self, entries: Sequence[MaskedParameter]) -> Iterator[Sequence[MaskedParameter]]:
        """Yield the entries to work on together."""
        # all at once: one collective, and on a GPU few small kernels. On a CPU one by one: a tensor stays in
        # the cache from its first pass to its last
        if not self.shards.is_whole or entries[0].theta.device.type != "cpu":
            yield entries
        else:
            yield from ([entry] for entry in entries)

    def _rewrite(self, entries: Sequence[MaskedParameter], step: int, *, is_measured: bool) -> None:
        segments = [segment for entry in entries for segment in entry.segments()]
        if not is_measured:
            measure_and_rank(self.family, segments, self.shards, step)
        written = torch.stack([self.family.write(segment) for segment in segments])
        threshold = self.family.options.threshold if self.family.has_threshold else None
        sums = self.shards.sum_written(written, entries, threshold=threshold, mask_fn=self.family.mask)
        kept, sizes = sums[:, 0], self._segment_sizes(entries, sums.device)
        scales = {
            dtype: core.scale_factor(kept, sizes, core.scale_dtype(dtype)).unbind()
            for dtype in {e.theta.dtype for e in entries}
        }
        numbers = zip(segments, sums.unbind(), kept.unbind(), strict=True)
        for index, (segment, of_segment, num_kept) in enumerate(numbers):
            whole = segment.whole
            whole.sums, whole.kept, whole.scale = of_segment, num_kept, scales[segment.theta.dtype][index]
            self.family.finish(segment)

    def _segment_sizes(self, entries: Sequence[MaskedParameter], device: torch.device) -> Tensor:
        key = entries[0].name
        if key not in self._sizes or self._sizes[key].device != device:
            sizes = [size for entry in entries for size in entry.segment_sizes()]
            self._sizes[key] = torch.tensor(sizes, dtype=torch.float64, device=device)
        return self._sizes[key]

    # ---- backward

    @property
    def has_sums(self) -> bool:
        """Return whether `pull_back` needs sums over processes."""
        return not self.shards.is_whole and (self.family.has_back_sums or self._sends_squares)

    @property
    def _sends_squares(self) -> bool:
        """Return whether squares for the score step `rms` can be summed together with back sums."""
        is_rms = self.score_step == "rms" and _trains_scores(self.family)
        is_shifted = type(self.family).shift is not Family.shift
        return is_rms and (not self.family.has_back_sums or is_shifted)

    def back_sums(self, entries: Sequence[MaskedParameter]) -> Tensor:
        """Return the sums of what this process holds, 1-D, where tensors are in pieces.

        First what the family needs, then, under the score step `rms`, three numbers for each segment.
        """
        assert not self.shards.is_whole, "a missing gradient would leave a gap"
        sums = []
        if self.family.has_back_sums:
            for entry, grad in self._gradients(entries):
                parts = zip(entry.segments(), entry.split(grad), strict=True)
                sums += [self.family.back_sums(segment, part) for segment, part in parts]
        self._lengths = [len(part) for part in sums]
        if self._sends_squares:
            sums += [self._moments(pull) for pull in self._pulls(entries)]
        return torch.cat(sums).double()

    def _moments(self, pull: Pull) -> Tensor:
        """Return sum(u^2), sum(u) and the count of u over the piece, where dL/dS = u + one number.

        Of a family without back sums u is dL/dS itself. Weights that are always kept have no u.
        """
        assert pull.scores is not None
        self.family.gradient(pull.segment, pull.grad, None, pull.scores)
        count = pull.scores.new_tensor(pull.scores.numel(), dtype=torch.float64)
        if self.family.options.maskable < 1:
            count -= pull.segment.scores.isposinf().sum()
        total = pull.scores.sum(dtype=torch.float64)
        return torch.stack([core.sum_of_squares(pull.scores), total, count])

    def pull_back(
        self, entries: Sequence[MaskedParameter], sums: Tensor | None, *, take: bool = False
    ) -> None:
        """Set gradients of all that is trained, from theta's.

        Args:
            sums: `back_sums()` summed over all processes, where the caller has done so.
            take: theta's gradients are not needed any more. Where scores alone are trained, theirs are then
                written into the same memory, and theta has none.
        """
        if self.has_sums and sums is None:
            sums = self.shards.sum(self.back_sums(entries))
        squares = None
        for group in self._groups(entries):
            if pulls := self._pulls(group, take=take and not self._sends_squares):
                squares = self._pull_back(pulls, sums)
        if self.score_step == "rms":
            if squares is not None:
                squares = torch.stack([s.sum() for s in squares.split([e.num_segments for e in entries])])
            self.normalise(entries, squares)

    def score_gradient(self, entry: MaskedParameter, grad: Tensor) -> Tensor:
        """Return dL/dS of one whole entry from G, in float32 or float64: a tensor of its own, or G's memory.

        For masks on frozen weights that are stepped tensor by tensor, with G not needed again.
        """
        assert self.shards.is_whole, "a piece lacks the sums over all"
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        out = (
            grad
            if grad.dtype == dtype and takes_gradients(self.family)
            else torch.empty_like(grad, dtype=dtype)
        )
        for segment, part, target in zip(entry.segments(), entry.split(grad), entry.split(out), strict=True):
            back = self.family.back_sums(segment, part) if self.family.has_back_sums else None
            self.family.gradient(segment, part, back, target)
        return out

    def _pull_back(self, pulls: Sequence[Pull], sums: Tensor | None) -> Tensor | None:
        """Pull back; returns the sum of squares of each segment's dL/dS, where `sums` have them."""
        backs: Sequence[Tensor | None] = [None] * len(pulls)
        if self.family.has_back_sums:
            if sums is None:
                backs = [self.family.back_sums(p.segment, p.grad) for p in pulls]
            else:
                backs = sums[: sum(self._lengths)].split(self._lengths)
        for pull, back in zip(pulls, backs, strict=True):
            if pull.scores is not None:
                self.family.gradient(pull.segment, pull.grad, back, pull.scores)
            if pull.weight is not None:
                self.family.pull_back_weight(pull.segment, pull.grad, back, pull.weight)
            if pull.numbers is not None:
                self.family.pull_back_numbers(pull.segment, back, pull.numbers)
        if sums is None or not self._sends_squares:
            return None
        squared, total, count = sums[sum(self._lengths) :].double().view(len(pulls), 3).unbind(1)
        if not self.family.has_back_sums:
            return squared
        parts = [self.family.shift(p.segment, b) for p, b in zip(pulls, backs, strict=True) if b is not None]
        shifts = torch.stack(parts).double()
        return squared + 2 * shifts * total + shifts.square() * count

    def normalise(self, entries: Sequence[MaskedParameter], squares: Tensor | None = None) -> None:
        """Put the gradient of each tensor of scores to a root mean square of one, in place (`rms`).

        The mean is over a whole parameter: of a fused q, k and v with a scale each too, as a key's bias has a
        gradient of rounding alone. Collective under `shards` unless `squares` are given.

        Args:
            squares: sum of squares of each whole scores gradient, where the caller has them.
        """
        scores = [e for e in entries if e.scores.grad is not None and _trains_scores(self.family)]
        numbers = [e.numbers for e in entries if e.numbers is not None and not self.family.starts_from_weight]
        numbers = [n for n in numbers if n.grad is not None]  # the same on all ranks, and whole
        grads = [e.piece(e.scores.grad) for e in scores if e.scores.grad is not None]
        if scores and squares is None:
            squares = self.shards.sum(torch.stack([core.sum_of_squares(grad) for grad in grads]))
        sums = [] if squares is None else list(squares.unbind())
        sizes = [sum(entry.segment_sizes()) for entry in scores] + [n.numel() for n in numbers]
        for number in numbers:
            assert number.grad is not None
            grads.append(number.grad)
            sums.append(core.sum_of_squares(number.grad))
        if not grads:
            return
        core.normalise(grads, torch.stack(sums), sizes)

    def _pulls(self, entries: Sequence[MaskedParameter], *, take: bool = False) -> list[Pull]:
        """Return what is to be pulled back; with `take` into the memory of G, where it can be."""
        take = take and takes_gradients(self.family)
        pulls: list[Pull] = []
        for entry, grad in self._gradients(entries):
            segments = entry.segments()
            if take and entry.numbers is None and _is_alike(grad, entry.scores):
                entry.scores.grad, entry.theta.grad = grad, None
            outs = [_gradient_of(entry, tensor) for tensor in (entry.scores, entry.weight)]
            numbers: Any = [None] * len(segments)
            if entry.numbers is not None:
                numbers = _gradient(entry.numbers).unbind()
            parts = zip(segments, entry.split(grad), *outs, numbers, strict=True)
            pulls += [Pull(*part) for part in parts]
        return pulls

    def _gradients(self, entries: Sequence[MaskedParameter]) -> Iterator[tuple[MaskedParameter, Tensor]]:
        """Yield each entry with this process's piece of G.

        A whole theta without a gradient is left out; a piece without one counts as zero.
        """
        for entry in entries:
            grad = self.shards.gradient(entry.name, entry.theta)
            if grad is not None:
                yield entry, entry.piece(grad)
            elif not self.shards.is_whole:
                yield entry, torch.zeros_like(entry.piece(entry.scores))


def takes_gradients(family: Family) -> bool:
    """Return whether scores' gradients may be written over G, so that both take the memory of one.

    dL/dS is elementwise in all families here, of others it is not known; and G must not be needed again, for
    weights or small numbers that are trained as well.
    """
    is_elementwise = type(family).pull_back.__module__.startswith("selfmask_dist.")
    has_numbers = type(family).first_numbers is not Family.first_numbers
    return is_elementwise and not family.trains_weight and not has_numbers


def _is_alike(grad: Tensor, scores: Tensor) -> bool:
    """Return whether a piece of theta's gradient can be the gradient of the scores as it lies."""
    return (
        scores.requires_grad
        and grad.dtype == scores.dtype
        and grad.shape == scores.shape
        and grad.stride() == scores.stride()
    )


def _trains_scores(family: Family) -> bool:
    """Return whether what an entry calls scores is trained, and is no latent weight."""
    return family.trains_scores and not family.starts_from_weight


def measure_and_rank(family: Family, segments: Sequence[Segment], shards: Shards, step: int) -> None:
    """Find what `mask` and `write` need of whole tensors: sums and cuts. Collective under `shards`."""
    for segment in segments:
        segment.whole.step = step
    if type(family).measure is not Family.measure:
        measured = [family.measure(segment) for segment in segments]
        rows = torch.stack([row for row in measured if row is not None])
        if not shards.is_whole:
            rows = _largest(rows, shards) if family.measures_largest else shards.sum(rows.double())
        for segment, row in zip(segments, rows.unbind(), strict=True):
            segment.whole.measured = row
    if family.ranks:
        sizes = [segment.whole.numel for segment in segments]
        is_global = family.options.keep_scope == "global"
        groups = [0] * len(segments) if is_global else list(range(len(segments)))
        share = family.share(step)
        counts = [max(round(share * size), 1) for size in ([sum(sizes)] if is_global else sizes)]
        cuts = ranking.select([family.ranked(s) for s in segments], counts, groups, shards)
        for segment, cut in zip(segments, cuts, strict=True):
            segment.whole.cut = cut


def _largest(rows: Tensor, shards: Shards) -> Tensor:
    """Return the largest of each number over pieces. Collective: every rank must call."""
    table = rows.new_zeros(shards.num_pieces, *rows.shape)
    table[shards.piece_index] = rows
    return shards.sum(table).amax(dim=0)


def _gradient(parameter: Tensor) -> Tensor:
    """Return where a parameter's gradient is to be written."""
    if parameter.grad is None:
        parameter.grad = torch.empty_like(parameter)
    return parameter.grad


def _gradient_of(entry: MaskedParameter, tensor: Tensor) -> Sequence[Tensor | None]:
    """Return views of the gradient of the scores or the weight, one for each segment; None: not trained."""
    if not tensor.requires_grad:
        return [None] * entry.num_segments
    return entry.split(entry.piece(_gradient(tensor)))
