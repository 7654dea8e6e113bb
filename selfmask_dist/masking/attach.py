"""Attach masks to a model: its own parameters become theta, an optimizer over the scores trains the masks.

    masks = attach(model, include="vit")
    optimizer = torch.optim.SGD(masks.parameters(), lr=50, momentum=0.9)
    masks.bind(optimizer)    # step() now also rewrites theta, zero_grad() also clears theta's gradient

Theta is the leaf: forward and backward run on ordinary parameters, so any module type works and costs what
full fine-tuning costs. The frozen weights W and the scores S lie beside theta. After every backward the
scores carry their gradient (formula (*) of `core`, from theta's accumulated gradient), so gradient
accumulation, clipping and gradient scalers see them as they see any leaf.

Knows nothing of files, process groups or kinds of optimizers.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, Self, SupportsIndex

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selfmask_dist.common.tensor_names import plain_names
from selfmask_dist.masking import checks, core, first_scores, marks
from selfmask_dist.masking.families import Family
from selfmask_dist.masking.following import AfterBackward, follow_in_closure
from selfmask_dist.masking.guard import Guard
from selfmask_dist.masking.parameter import MaskedParameter
from selfmask_dist.masking.passes import Passes
from selfmask_dist.masking.pieces import Shards
from selfmask_dist.masking.reading import FINGERPRINT, STEP, MaskSet
from selfmask_dist.masking.selection import Coverage, measure_coverage

_LOG = logging.getLogger(__name__)


class AttachedMasks(MaskSet[MaskedParameter]):
    """The masks on one model. Made by `attach`."""

    def __init__(
        self,
        model: nn.Module,
        entries: Sequence[MaskedParameter],
        *,
        family: Family,
        shards: Shards,
        auto: bool,
    ) -> None:
        super().__init__(model, entries, family=family, shards=shards)
        self._attached = True
        self._guard = Guard(model, self.entries, self._write) if auto and self.is_trained else None
        self._hooks: list[Any] = []
        self._passes = Passes(family, shards)
        wholes = [whole for entry in self.entries for whole in entry.wholes]
        for whole in wholes:
            whole.num_tensors = len(wholes)
        after_backward = AfterBackward(self.pull_back)
        for entry in self.entries:
            marks.put(model, entry.name, marks.Attached(self, entry))
            if self._guard is not None and entry.theta.requires_grad:
                self._hooks.append(entry.theta.register_post_accumulate_grad_hook(after_backward))
                self._hooks.append(entry.theta.register_hook(self._guard.before_accumulate(entry)))
        self.rewrite()

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        *,
        include: str | Sequence[str] = "auto",
        exclude: str | Sequence[str] = (),
        first_layers: int | None = None,
        allow_norm: bool = False,
        family: str | Family = "threshold",
        threshold: float | None = None,
        scale: core.Scale | None = None,
        init: float | str | Mapping[str, Tensor] = 1.0,
        split_qkv: bool = False,
        other: Mapping[str, Tensor] | None = None,
        freeze: bool = True,
        shards: Shards | None = None,
        auto: bool = True,
    ) -> Self:  # the public door of the package: each choice is a keyword of its own, for completion and help
        """Put a learned mask on chosen parameters of `model`, in place (Warmerdam et al. 2024, section 3).

        Move the model to its device first; wrap it in `DistributedDataParallel` or `torch.compile` after.
        After `fully_shard`, masks are attached with an engine's `shards`.

        Args:
            include, exclude, first_layers, allow_norm: which parameters, see `selection.select`.
            family: how masks follow from scores: a name of `families`, or a `Family` with options of its own
                (`build_family`).
            threshold: mu, of a family given by name (0).
            scale: of a family given by name: gradient `through` the scale a (the authors' and the default), a
                `detached` from the graph, or `none` (Piggyback: a = 1).
            init: the scores' first value, one of `first_scores.NAMES`, or scores by parameter name (an expert
                starts from its dispatcher's).
            split_qkv: a scale each for q, k and v of a fused projection, as where they are three tensors (the
                paper's CLIP).
            other: second frozen weights by parameter name, for families that need them (`graft`); those of
                further parameters are passed over.
            freeze: make every other parameter of the model frozen; False leaves their `requires_grad` as it
                is.
            shards: how this process's tensors relate to whole parameters; None: each is whole. Where they are
                not, attaching, stepping and reading are collectives.
            auto: False leaves it to the caller to call `pull_back` after the last backward of a step.

        Raises:
            ValueError: nothing matches, a normalisation layer would be masked, scores would all start pruned,
                names or shapes of given scores differ, the model is masked already, or `threshold` or `scale`
                is given beside a `Family`, which brings its own.
        """
        family = checks.as_family(family, threshold=threshold, scale=scale)
        names = checks.choose(
            model,
            family=family,
            init=init,
            include=include,
            exclude=exclude,
            first_layers=first_layers,
            allow_norm=allow_norm,
        )
        checks.warn_where_partly_masked(model, include)
        plain = plain_names(names)
        fingerprint = init.get(FINGERPRINT) if isinstance(init, Mapping) else None
        init = checks.own_init(init, names) if isinstance(init, Mapping) else init
        seconds = checks.choose_other(model, names, other, family=family)
        shards, entries = shards or Shards(), []
        parameters = dict(model.named_parameters())
        for name in names:
            start = (
                init[name] if isinstance(init, Mapping) else first_scores.starter(init, plain[name], family)
            )
            num_segments = checks.num_segments(name, split_qkv=split_qkv)
            theta = parameters.pop(name)
            entries.append(
                MaskedParameter(name, theta, start, num_segments, shards, family, seconds.get(name))
            )
        is_trained = family.trains_scores or family.trains_weight
        for entry in entries:
            entry.theta.requires_grad_(is_trained)
        if freeze:
            marks.freeze_unmasked(model, parameters.values())
        masks = cls(model, entries, family=family, shards=shards, auto=auto)
        if isinstance(init, Mapping) and fingerprint is not None:
            try:
                masks.check_weights({FINGERPRINT: fingerprint, **init})
            except ValueError:
                masks.detach()
                raise
        _LOG.info("masks on %s (%s)", masks.coverage(), family.name)
        return masks

    # ---- training

    def bind(self, optimizer: Optimizer, *, score_step: core.ScoreStep = "plain") -> None:
        """Make `optimizer.step()` rewrite theta after it, and `zero_grad()` clear theta's gradient too.

        Args:
            score_step: `rms` normalises scores' gradients before each step (with `auto=False` in each
                `pull_back`), so that a learning rate means the same for every tensor; see `core`.

        Raises:
            ValueError: the optimizer holds none of the scores, holds theta itself, or would decay the scores;
                `rms` with an optimizer that sizes its steps itself, or with nothing to normalise; the
                masks are detached.
        """
        self._check_attached()
        checks.check_optimizer(optimizer, self.entries, self.family)
        checks.check_score_step(score_step, optimizer, self.family)
        if self._guard is not None:
            if self._guard.is_bound(optimizer):
                return
            self._guard.bind(optimizer)
        self._passes.score_step = "plain" if self._guard is not None else score_step
        if score_step == "rms" and self._guard is not None:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
        optimizer.register_step_pre_hook(lambda _, args, kwargs: follow_in_closure(self, args, kwargs))
        # it stays after detach: a step that trains nothing any more says so
        optimizer.register_step_post_hook(lambda stepped, *_: self._after_step(stepped))
        zero_grad = optimizer.zero_grad

        def zero_grad_with_theta(set_to_none: bool = True) -> None:
            zero_grad(set_to_none=set_to_none)
            self._drop_theta_gradients()

        optimizer.zero_grad = zero_grad_with_theta  # type: ignore[method-assign]  # torch has no hook for it

    @torch.no_grad()
    def pull_back(self, sums: Tensor | None = None, *, take: bool = False) -> None:
        """Set the gradient of scores, and of what else the family trains, from theta's accumulated gradient.

        It runs by itself at the end of every backward; call it where theta's gradient was written otherwise.

        Args:
            sums: `back_sums()` summed over all processes, where the caller has done so; None: done here.
            take: theta's gradient is not needed again; its memory is used where it can be.
        """
        if not self.is_trained:
            return
        if self._guard is not None:
            self._guard.check_before_pull()
            self._guard.pulled(sum(entry.theta.grad is not None for entry in self.entries))
        self._passes.pull_back(self.entries, sums, take=take)
        if self._guard is not None:
            self._guard.note_gradients()

    @torch.no_grad()
    def back_sums(self) -> Tensor:
        """Return the sums that `pull_back` needs, such as <G, theta>, over what this process holds.

        A tensor, 1-D. For masks that are sharded.
        """
        return self._passes.back_sums(self.entries)

    @torch.no_grad()
    def normalise_gradients(self) -> None:
        """Divide each scores tensor's gradient by its root mean square, in place. Collective under `shards`.

        `bind(score_step="rms")` does it. By hand: after a step's last backward (and a scaler's `unscale_`).
        """
        self._passes.normalise(self.entries)

    @property
    def has_sums(self) -> bool:
        """Return whether `pull_back` needs `back_sums` summed over processes."""
        return self.is_trained and self._passes.has_sums

    @property
    def is_trained(self) -> bool:
        """Return whether anything of these masks is trained; theta then has gradients."""
        return self.family.trains_scores or self.family.trains_weight

    @property
    def is_attached(self) -> bool:
        """Return whether these masks are on their model still."""
        return self._attached

    @torch.no_grad()
    def rewrite(self) -> None:
        """Rewrite theta in place from the scores, paper eq. 1.

        It runs by itself after a step of a bound optimizer.

        Raises:
            ValueError: the masks are detached.
        """
        self._check_attached()
        self._write()
        if self._guard is not None:
            self._guard.written()

    def _write(self) -> None:
        self._passes.rewrite(self.entries, self.step)

    def other_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the model's trainable parameters that carry no mask, such as a head."""
        thetas = {id(entry.theta) for entry in self.entries}
        return (p for p in self._model.parameters() if p.requires_grad and id(p) not in thetas)

    # ---- reading

    def sparsity(self) -> dict[str, float]:
        """Return the share of pruned weights per parameter, {name: 0 ... 1}. One device sync."""
        kept = torch.stack([torch.stack(entry.num_kept).sum() for entry in self.entries]).tolist()
        return {entry.name: 1 - k / entry.theta.numel() for entry, k in zip(self.entries, kept, strict=True)}

    def empty(self) -> list[str]:
        """Return the names of parameters with a wholly pruned tensor (their theta is zero, see `core`).

        One device sync.
        """
        fewest = torch.stack([torch.stack(entry.num_kept).min() for entry in self.entries]).tolist()
        return [entry.name for entry, kept in zip(self.entries, fewest, strict=True) if kept == 0]

    def summary(self) -> str:
        """Return what is masked, frozen and trained as it is, in a few lines for the start of a log."""
        masked = sum(entry.theta.numel() for entry in self.entries)
        others = sum(p.numel() for p in self.other_parameters())
        total = sum(p.numel() for p in self._model.parameters())
        changes = self.family.trains_weight or self.family.starts_from_weight
        frozen = total - masked - others
        others += masked if changes else 0
        return (
            f"masked   {len(self.entries):4d} parameters, {masked:,} weights ({masked / total:.1%}), "
            f"family {self.family.name}\n"
            f"frozen   {frozen:,} weights\n"
            f"matrices {self.coverage().describe_matrices()}\n"
            f"trained  {others:,} weights"
        )

    def coverage(self) -> Coverage:
        """Return which share of the model's matrices carries a mask."""
        return measure_coverage(self._model, [entry.name for entry in self.entries])

    def __repr__(self) -> str:
        state = "detached" if not self._attached else "attached"
        if self._attached and self._guard is not None:
            state = f"bound to {self._guard.bound_to}" if self._guard.bound_to else "not bound"
        return f"{type(self).__name__}({self.coverage()}; family {self.family.name}; {state})"

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "masks cannot be copied or pickled, as their hooks are on the model's own parameters; keep "
            "copy.deepcopy(masks.state_dict()), or masks.save() a file"
        )

    def check_current(self) -> None:
        """Raise a ValueError where the masks are detached, or the scores are not what training made of them;
        see `guard`.
        """
        self._check_attached()
        if self._guard is not None:
            self._guard.check_before_save()
            checks.check_finite({entry.name: entry.scores for entry in self.entries}, self.family)

    def _check_attached(self) -> None:
        if not self._attached:
            raise ValueError(
                "these masks are detached from their model: theta, and statistics that moved, are gone. Call "
                "save() and whatever else needs them before detach(), or attach masks again"
            )

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy what `state_dict` gave in and rewrite theta. Collective under `shards`.

        A state that was saved without the number of steps or the fingerprint loads without them.

        Raises:
            ValueError: names or shapes differ from the masked parameters', the scores are for other weights
                than those under these masks, or the masks are detached.
            TypeError: a value is no tensor.
        """
        self._check_attached()
        given = {key: value for key, value in state.items() if key not in (STEP, FINGERPRINT)}
        shapes = {key: shape for entry in self.entries for key, shape in entry.state_shapes().items()}
        tensors = checks.own_state(given, [entry.name for entry in self.entries], shapes)
        self.check_weights(state)
        for entry in self.entries:
            entry.load(tensors)
        self.step = int(state.get(STEP, self.step))
        self.rewrite()

    # ---- ending

    @torch.no_grad()
    def detach(self, *, restore: bool = True) -> None:
        """Take the masks off the model: hooks go, and theta becomes the frozen weight again, bit for bit.

        Buffers, such as running statistics, become what they were too, unless other masks are attached still.

        Args:
            restore: False leaves theta and buffers in place, as plain weights.
        """
        if not self._attached:
            raise ValueError("these masks are detached already")
        if restore and self._guard is not None:
            self._guard.check_in_place()
        self._attached = False
        if self._guard is not None:
            self._guard.stop()
        for hook in self._hooks:
            hook.remove()
        for entry in self.entries:
            entry.release(restore=restore)
            marks.take_off(self._model, entry.name, self)
        marks.give_buffers_back(self._model, self, restore=restore)

    # ---- hooks

    def _before_step(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        checks.check_no_closure(optimizer, (*arguments, *keywords.values()))
        if self._attached:
            self.normalise_gradients()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer) -> None:
        if not self._attached:
            checks.check_steps_others(optimizer)
        else:
            if self._guard is not None:
                checks.check_decay(optimizer, self.entries, self.family)
                self._guard.after_step(optimizer)
            self.step += 1
            self._passes.after_step(self.entries)
            if self.is_trained:
                self.rewrite()
            self._drop_theta_gradients()

    def _drop_theta_gradients(self) -> None:
        if self._guard is not None:
            self._guard.cleared()
        for entry in self.entries:
            entry.theta.grad = None


attach = AttachedMasks.attach
