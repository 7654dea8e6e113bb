"""Attach masks to a model: its own parameters become theta, and an optimizer over the scores trains the
masks.

    masks = attach(model, include="vit")
    optimizer = torch.optim.SGD(masks.parameters(), lr=50, momentum=0.9)
    masks.bind(optimizer)                  # step() now also rewrites theta, zero_grad() also clears its
    gradient

Theta is the leaf: forward and backward run on ordinary parameters, so any module type works and costs what
full fine-tuning costs. The frozen weights W and the scores S lie beside theta. After every backward the
scores carry their gradient (formula (*) of `core`, from theta's accumulated gradient), so gradient
accumulation, clipping and gradient scalers see them as they see any leaf.

Knows nothing of files, process groups or kinds of optimizers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selfmask_dist.masking import checks, core
from selfmask_dist.masking.parameter import MaskedParameter, Segment
from selfmask_dist.masking.reading import MaskSet
from selfmask_dist.masking.shards import Shards


@dataclass(frozen=True)
class Pull:
    """One scaled tensor's piece on the way back: G in, dL/dS out."""

    segment: Segment
    grad: Tensor
    out: Tensor
    scale: Tensor
    num_kept: Tensor


class Masks(MaskSet[MaskedParameter]):
    """The masks on one model. Made by `attach`."""

    def __init__(
        self,
        model: nn.Module,
        entries: Sequence[MaskedParameter],
        *,
        threshold: float,
        scale: core.Scale,
        shards: Shards,
        auto: bool,
    ) -> None:
        super().__init__(model, entries, threshold=threshold, scale=scale, shards=shards)
        self._attached = True
        self._is_pull_queued = False
        self._hooks: list[Any] = []
        self._sizes: dict[str, Tensor] = {}  # N of every segment on the device, by a group's first entry
        for entry in self.entries:
            setattr(entry.theta, checks.MARK, True)
            if auto:
                self._hooks.append(entry.theta.register_post_accumulate_grad_hook(self._after_accumulate))
        self.rewrite()

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        *,
        include: str | Sequence[str] = "auto",
        exclude: str | Sequence[str] = (),
        threshold: float = 0.0,
        init: float | Mapping[str, Tensor] = 1.0,
        scale: core.Scale = "through",
        split_qkv: bool = False,
        allow_norm: bool = False,
        freeze: bool = True,
        shards: Shards | None = None,
        auto: bool = True,
    ) -> Self:
        """Put a learned mask on chosen parameters of `model`, in place (Warmerdam et al. 2024, section 3).

        Move the model to its device first; wrap it in `DistributedDataParallel` or `torch.compile` after.
        After `fully_shard`, masks are attached with an engine's `shards`.

        Args:
            include, exclude, allow_norm: which parameters, see `selection.select`.
            threshold: mu.
            init: the scores' first value, or scores by parameter name (an expert starts from its
                dispatcher's).
            scale: gradient `through` the scale a (the authors'), a `detached` from the graph, or `none`
                (Piggyback: a = 1).
            split_qkv: a scale each for q, k and v of a fused projection, as where they are three tensors (the
                paper's CLIP).
            freeze: make every other parameter of the model frozen; False leaves their `requires_grad` as it
                is.
            shards: how this process's tensors relate to whole parameters; None: each is whole. Where they are
                not, attaching, stepping and reading are collectives.
            auto: False leaves it to the caller to call `pull_back` after the last backward of a step.

        Raises:
            ValueError: nothing matches, a normalisation layer would be masked, scores would all start pruned,
                names or shapes of given scores differ, or the model is masked already.
        """
        names = checks.choose(
            model,
            include,
            exclude=exclude,
            allow_norm=allow_norm,
            init=init,
            threshold=threshold,
            scale=scale,
        )
        shards, entries = shards or Shards(), []
        parameters = dict(model.named_parameters())
        for name in names:
            start = init[name] if isinstance(init, Mapping) else init
            num_segments = checks.num_segments(name, split_qkv=split_qkv)
            entries.append(MaskedParameter(name, parameters.pop(name), start, num_segments, shards))
        for entry in entries:
            entry.theta.requires_grad_(True)
        if freeze:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
        return cls(model, entries, threshold=threshold, scale=scale, shards=shards, auto=auto)

    # ---- training

    def bind(self, optimizer: Optimizer) -> None:
        """Make `optimizer.step()` rewrite theta after it, and `optimizer.zero_grad()` clear theta's gradient
        too.

        Raises:
            ValueError: the optimizer holds none of the scores, holds theta itself, or would decay the scores.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(entry.scores) in held for entry in self.entries):
            raise ValueError(
                "the optimizer holds none of these masks' scores; build it over masks.parameters()"
            )
        if thetas := [entry.name for entry in self.entries if id(entry.theta) in held]:
            raise ValueError(
                f"the optimizer holds theta itself ({thetas[0]} and {len(thetas) - 1} more), which a step "
                f"would overwrite; "
                f"give it masks.parameters() and, for the rest of the model, masks.other_parameters()"
            )
        scores = {id(entry.scores) for entry in self.entries}
        for group in optimizer.param_groups:
            if group.get("weight_decay") and any(id(parameter) in scores for parameter in group["params"]):
                raise ValueError(
                    f"weight_decay={group['weight_decay']} on the scores would pull them to the threshold; "
                    f"give them a parameter group with weight_decay=0"
                )
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._after_step()))
        zero_grad = optimizer.zero_grad

        def zero_grad_with_theta(set_to_none: bool = True) -> None:
            zero_grad(set_to_none=set_to_none)
            self._drop_theta_gradients()

        optimizer.zero_grad = zero_grad_with_theta  # type: ignore[method-assign]  # torch has no hook for it

    @torch.no_grad()
    def pull_back(self, dots: Tensor | None = None) -> None:
        """Set each score's gradient from theta's accumulated gradient, formula (*) of `core`.

        Runs by itself at the end of every backward; call it where theta's gradient was written by other
        means.

        Args:
            dots: `inner_products()` summed over all processes, where the caller has done so; None: it is done
                here.
        """
        for group in self._groups():
            if pulls := self._pulls(group):
                self._pull_back(pulls, dots)

    @torch.no_grad()
    def inner_products(self) -> Tensor:
        """<G, theta> of every scaled tensor, of what this process holds of it, where masks are sharded."""
        assert not self.shards.is_whole, "a missing gradient would leave a gap"
        pulls = self._pulls(self.entries)
        return torch.stack([core.inner_product(p.grad, p.segment.theta) for p in pulls]).double()

    @torch.no_grad()
    def rewrite(self) -> None:
        """Rewrite theta in place from the scores, paper eq. 1. Runs by itself after a bound optimizer's
        step.
        """
        for group in self._groups():
            self._rewrite(group)
        self.shards.complete(self.entries, is_scaled=self.scale != "none")

    def _groups(self) -> Iterator[list[MaskedParameter]]:
        """Entries to work on together."""
        # all at once: one collective, and on a GPU few small kernels. On a CPU one by one: a tensor stays in
        # the cache from its first pass to its last
        if not self.shards.is_whole or self.entries[0].theta.device.type != "cpu":
            yield self.entries
        else:
            yield from ([entry] for entry in self.entries)

    def _rewrite(self, entries: list[MaskedParameter]) -> None:
        segments: list[Segment] = []
        num_kept = []
        for entry in entries:
            for segment in entry.segments():
                num_kept.append(core.write_mask(segment.scores, self.threshold, out=segment.theta))
                segment.theta.mul_(segment.weight)
                segments.append(segment)
        kept = self.shards.sum_kept(torch.stack(num_kept), entries, self.threshold)
        sizes = self._segment_sizes(entries, kept.device)
        scales = {
            dtype: core.scale_factor(kept, sizes, dtype).unbind()
            for dtype in {e.theta.dtype for e in entries}
        }
        index = 0
        for entry in entries:
            part = slice(index, index + entry.num_segments)
            entry.num_kept = list(kept.unbind()[part])
            entry.scales = list(scales[entry.theta.dtype][part])
            if self.scale != "none":
                for segment, scale in zip(segments[part], entry.scales, strict=True):
                    segment.theta.mul_(scale)
            index += entry.num_segments

    def _pulls(self, entries: Sequence[MaskedParameter]) -> list[Pull]:
        """What is to be pulled back; a whole theta without a gradient is left out, a piece counts as zero."""
        pulls: list[Pull] = []
        for entry in entries:
            grad = self.shards.gradient(entry.name, entry.theta)
            if grad is None and self.shards.is_whole:
                continue
            if entry.scores.grad is None:
                entry.scores.grad = torch.empty_like(entry.scores)
            out = entry.piece(entry.scores.grad)
            grad = torch.zeros_like(out) if grad is None else entry.piece(grad)
            segments = entry.segments()
            pieces = zip(
                segments, entry.split(grad), entry.split(out), entry.scales, entry.num_kept, strict=True
            )
            pulls += [Pull(*parts) for parts in pieces]
        return pulls

    def _pull_back(self, pulls: Sequence[Pull], dots: Tensor | None) -> None:
        terms: Sequence[Tensor | None] = [None] * len(pulls)
        if self.scale == "through":
            if dots is None:
                dots = torch.stack([core.inner_product(p.grad, p.segment.theta) for p in pulls])
                dots = dots if self.shards.is_whole else self.shards.sum(dots.double())
            terms = dots.unbind()
        for pull, term in zip(pulls, terms, strict=True):
            core.pullback(
                pull.grad,
                pull.segment.weight,
                scale=None if self.scale == "none" else pull.scale,
                grad_dot_theta=term,
                num_kept=pull.num_kept,
                out=pull.out,
            )

    def _segment_sizes(self, entries: list[MaskedParameter], device: torch.device) -> Tensor:
        key = entries[0].name
        if key not in self._sizes or self._sizes[key].device != device:
            sizes = [size for entry in entries for size in entry.segment_sizes()]
            self._sizes[key] = torch.tensor(sizes, dtype=torch.float64, device=device)
        return self._sizes[key]

    def other_parameters(self) -> Iterator[nn.Parameter]:
        """The model's trainable parameters that carry no mask, such as a head."""
        thetas = {id(entry.theta) for entry in self.entries}
        return (p for p in self._model.parameters() if p.requires_grad and id(p) not in thetas)

    # ---- reading

    def sparsity(self) -> dict[str, float]:
        """The share of pruned weights per parameter, {name: 0 ... 1}. One device sync."""
        kept = torch.stack([torch.stack(entry.num_kept).sum() for entry in self.entries]).tolist()
        return {entry.name: 1 - k / entry.theta.numel() for entry, k in zip(self.entries, kept, strict=True)}

    def empty(self) -> list[str]:
        """Names of parameters with a wholly pruned tensor (their theta is zero, see `core`). One device
        sync.
        """
        fewest = torch.stack([torch.stack(entry.num_kept).min() for entry in self.entries]).tolist()
        return [entry.name for entry, kept in zip(self.entries, fewest, strict=True) if kept == 0]

    def summary(self) -> str:
        """What is masked, frozen and trained as it is, in a few lines for the start of a log."""
        masked = sum(entry.theta.numel() for entry in self.entries)
        others = sum(p.numel() for p in self.other_parameters())
        total = sum(p.numel() for p in self._model.parameters())
        return (
            f"masked   {len(self.entries):4d} parameters, {masked:,} weights ({masked / total:.1%})\n"
            f"frozen   {total - masked - others:,} weights\n"
            f"trained  {others:,} weights"
        )

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy scores (of the parameters' shapes) in and rewrite theta. Collective under `shards`.

        Raises:
            ValueError: names or shapes differ from the masked parameters'.
        """
        checks.check_same_names(set(state), {entry.name for entry in self.entries}, "scores")
        for entry in self.entries:
            if state[entry.name].shape != entry.theta.shape:
                raise ValueError(
                    f"scores of {entry.name} have shape {tuple(state[entry.name].shape)}, "
                    f"the parameter has {tuple(entry.theta.shape)}"
                )
        for entry in self.entries:
            entry.fill(state[entry.name])
        self.rewrite()

    # ---- ending

    @torch.no_grad()
    def detach(self, *, restore: bool = True) -> None:
        """Take the masks off the model: hooks go, and theta becomes the frozen weight again, bit for bit.

        Args:
            restore: False leaves theta in place, as plain weights.
        """
        if not self._attached:
            raise ValueError("these masks are detached already")
        self._attached = False
        for hook in self._hooks:
            hook.remove()
        for entry in self.entries:
            if restore:
                entry.theta.copy_(entry.weight)
            entry.theta.grad = None
            entry.theta.requires_grad_(False)
            delattr(entry.theta, checks.MARK)

    # ---- hooks

    def _after_accumulate(self, _theta: Tensor) -> None:
        if not self._is_pull_queued:
            self._is_pull_queued = True
            _at_end_of_backward(self._first_callback)

    def _first_callback(self) -> None:
        # queued a second time: DistributedDataParallel writes its reduced gradients in a callback that may
        # come after ours
        _at_end_of_backward(self._second_callback)

    def _second_callback(self) -> None:
        self._is_pull_queued = False
        self.pull_back()

    def _after_step(self) -> None:
        if self._attached:
            self.rewrite()
            self._drop_theta_gradients()

    def _drop_theta_gradients(self) -> None:
        for entry in self.entries:
            entry.theta.grad = None


attach = Masks.attach


def _at_end_of_backward(callback: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)
