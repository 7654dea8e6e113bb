"""Watches a training loop that is not the package's own, so that masks cannot stand still without a word.

    after each writing of theta    the versions of scores and theta are noted
    before each pull back          neither may have changed since: an optimizer that is not bound, or a write
    after each step                scores got a gradient, and theta is still the model's own parameter

Costs a comparison of integers for each tensor and a walk over the model's parameters where a theta got no
gradient; no device sync in a loop that is right. Engines call `pull_back` themselves and are not watched.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from selfmask_dist.common.text import some
from selfmask_dist.masking.checks import ForgottenBindWarning, UnusedGradientWarning
from selfmask_dist.masking.parameter import MaskedParameter

_STEPS_BEFORE_WARNING = {False: 2, True: 20}  # with none bound, and with one that was never stepped
_WATCHING: "weakref.WeakSet[Guard]" = weakref.WeakSet()
_HOOK: list[Any] = []  # torch's handle, while there is a guard


class Guard:
    """The watch over the masks on one model.

    Args:
        write: writes theta from the scores.
    """

    def __init__(
        self, model: nn.Module, entries: Sequence[MaskedParameter], write: Callable[[], None]
    ) -> None:
        self._model = model
        self._entries = entries
        self._write = write
        self._versions: list[tuple[list[int], int]] = []  # of what is trained, and of theta
        self._bound: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self.bound_to = ""  # the kind of the newest bound optimizer
        self._stepped_by = ""  # an optimizer that is not bound and holds scores
        self._num_pulled = -1  # thetas with a gradient, since the last step; -1: no backward
        self._num_backwards = 0  # in which scores had a gradient, since theta was written
        self._is_fresh = False  # scores had a gradient since another optimizer's last step
        self._num_foreign_steps = 0
        self._num_steps = 0
        self._gradients: dict[int, list[int]] = {}  # versions after the last pull back, theta's first
        self._has_warned = False
        self._places = [_place(model, entry.name) for entry in self._entries]
        self._samples = _Samples([entry.theta for entry in entries])
        _WATCHING.add(self)
        if not _HOOK:
            _HOOK.append(register_optimizer_step_post_hook(_after_any_step))

    def stop(self) -> None:
        """Watch no longer."""
        _WATCHING.discard(self)
        if not _WATCHING and _HOOK:
            _HOOK.pop().remove()

    # ---- what happens

    def bind(self, optimizer: Optimizer) -> None:
        """Take note that theta follows this optimizer's steps."""
        self._bound.add(optimizer)
        self.bound_to = type(optimizer).__name__

    def is_bound(self, optimizer: Optimizer) -> bool:
        """Return whether theta follows this optimizer's steps already."""
        return optimizer in self._bound

    def written(self) -> None:
        """Take note that theta follows from the scores now."""
        self._versions = [(_versions_of(entry), entry.theta._version) for entry in self._entries]
        self._stepped_by, self._num_backwards, self._num_foreign_steps = "", 0, 0
        self._samples.take()

    def pulled(self, num_entries: int) -> None:
        """Take note that so many thetas had a gradient in a backward."""
        self._num_pulled = max(self._num_pulled, num_entries)
        self._is_fresh = num_entries > 0
        self._num_backwards += self._is_fresh

    def note_gradients(self) -> None:
        """Take note of the gradients as they are after pulling back."""
        self._gradients = {
            id(entry): _versions_of_gradients(entry)
            for entry in self._entries
            if entry.theta.grad is not None
        }

    def cleared(self) -> None:
        """Take note that gradients were cleared."""
        self._num_pulled = -1
        self._gradients = {}

    def before_accumulate(self, entry: MaskedParameter) -> Callable[[Tensor], None]:
        """Return a hook that runs before theta's gradient grows.

        Where the caller has cleared the gradients of the scores, by None or zeros, theta's goes too: else it
        would still hold the batches that were to be forgotten.
        """

        def hook(_gradient: Tensor) -> None:
            if entry.theta.grad is None or id(entry) not in self._gradients:
                return
            versions = self._gradients[id(entry)][1:]
            gradients = [parameter.grad for parameter in _trained(entry)]
            changed = [g for g, v in zip(gradients, versions, strict=True) if g is None or g._version != v]
            # the look into a tensor is a sync; gradients are changed in place and then added to by few
            if len(changed) == len(gradients) > 0 and not any(g is not None and g.any() for g in changed):
                entry.theta.grad = None

        return hook

    # ---- what is wrong

    def check_before_pull(self) -> None:
        """Check that theta is what the scores say, where they say it.

        Raises:
            ValueError: scores changed and theta did not follow, theta was written by others, or it lies on
                another device or in another dtype than its weight.
        """
        for entry in self._entries:
            theta, weight = entry.theta, entry.weight
            if theta.device != weight.device or theta.dtype != weight.dtype:
                raise ValueError(
                    f"{entry.name} is {theta.dtype} on {theta.device} now and was {weight.dtype} on "
                    f"{weight.device} when its mask was attached: the model was moved or converted after it. "
                    f"Detach the masks, move or convert the model, and attach them then"
                )
        self._check_scores("")
        self._check_theta()
        if self._samples.have_changed():
            raise ValueError(
                f"theta of these {len(self._entries)} tensors was written to past autograd, by way of .data: "
                f"adapters were merged into the weights (PEFT's merge_adapter), or an average was copied "
                f"into the model and not taken back. The next step would undo it. Do that before attach, or "
                f"call masks.rewrite() to have theta back"
            )

    def check_before_save(self) -> None:
        """Check that the scores are what training made of them.

        Raises:
            ValueError: scores changed and theta did not follow, or they had gradients and nothing was bound.
        """
        self.check_in_place()
        self._check_scores("; a mask of them would not be what was trained")
        if self._num_backwards > 1 and not (self._bound and self._num_steps):
            who = "no optimizer is bound that would step their scores"
            if self._bound:
                who = (
                    f"the {self.bound_to} that is bound to them was never stepped (a copy of it, or a later "
                    f"one, is perhaps)"
                )
            raise ValueError(
                f"these masks had gradients in {self._num_backwards} backwards, and {who}: the mask would be "
                f"as it was attached. Call masks.bind(optimizer) before the loop, for the optimizer that is "
                f"stepped, or masks.rewrite() after changing scores otherwise"
            )

    def check_in_place(self) -> None:
        """Check that each theta is the model's own parameter still.

        Raises:
            ValueError: another one is in its place.
        """
        own = {id(parameter) for parameter in self._model.parameters()}
        held = [parameters.get(key) for parameters, key in self._places]
        pairs = zip(self._entries, held, strict=True)
        if lost := [e.name for e, found in pairs if id(e.theta) not in own or found is not e.theta]:
            raise ValueError(
                f"{some(lost)} carry masks, and the model has other parameters in their place: after attach, "
                f"it was loaded with load_state_dict(assign=True), converted, or its modules were replaced, "
                f"sharded, pruned or parametrised (torch.nn.utils). Do that first and attach then; "
                f"masks.load_state_dict() brings scores back, and detach(restore=False) takes these masks off"
            )

    def _are_in_place(self) -> bool:
        pairs = zip(self._entries, self._places, strict=True)
        return all(parameters.get(key) is entry.theta for entry, (parameters, key) in pairs)

    def _check_scores(self, so: str) -> None:
        changed = [
            entry.name
            for entry, (versions, _) in zip(self._entries, self._versions, strict=True)
            if _versions_of(entry) != versions
        ]
        if not changed and not self._stepped_by:
            return
        who = f"by {self._stepped_by}, which is not bound" if self._stepped_by else "by other means"
        bound = f" (bound is another {self.bound_to})" if self.bound_to else ""
        raise ValueError(
            f"the scores of {some(changed) or 'these masks'} were changed {who}{bound}, and theta did not "
            f"follow{so}. Call masks.bind(optimizer) for the optimizer that steps them, or masks.rewrite() "
            f"each time after they are changed"
        )

    @torch.no_grad()
    def _check_theta(self) -> None:
        """Check theta where something was written to it; what wrote the same values may have."""
        entries = [
            entry
            for entry, (_, version) in zip(self._entries, self._versions, strict=True)
            if entry.theta._version != version
        ]
        if not entries:
            return
        found = [entry.theta.detach().clone() for entry in entries]
        self._write()
        changed = [
            entry for entry, theta in zip(entries, found, strict=True) if not torch.equal(entry.theta, theta)
        ]
        if changed:
            for entry, theta in zip(entries, found, strict=True):
                entry.theta.detach().copy_(theta)
            raise ValueError(
                f"{some([entry.name for entry in changed])} carry masks and were written to by others: a "
                f"state dict was loaded into the model, or an optimizer steps the model's parameters. "
                f"Optimizers take masks.parameters(); after loading, call masks.load_state_dict() with the "
                f"scores that belong to it, or masks.rewrite() for those that are there"
            )

    def after_step(self, optimizer: Optimizer) -> None:
        """Check that a bound optimizer's step trained something of these masks.

        Raises:
            ValueError: it did not, with the cause.
        """
        self._num_steps += 1
        num_pulled, self._num_pulled = self._num_pulled, -1
        self._warn_of_changed_gradients()
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trained = [entry for entry in self._entries if any(id(p) in held for p in _trained(entry))]
        if not trained or (num_pulled == len(self._entries) and self._are_in_place()):
            return
        self.check_in_place()
        if not any(entry.theta.requires_grad for entry in trained):
            raise ValueError(
                f"no score of these {len(trained)} tensors can get a gradient: requires_grad of "
                f"{trained[0].name} and all others was set to False after attach (requires_grad_(False) on "
                f"the model, or a wrapper such as PEFT). Do that before attach; to pause masks, set "
                f"requires_grad_(False) on masks.parameters()"
            )
        if num_pulled > 0 or any(_has_gradient(p) for entry in trained for p in _trained(entry)):
            return
        is_empty = all(p.grad is None for group in optimizer.param_groups for p in group["params"])
        if is_empty and self._num_steps == 1:
            return  # a step on nothing, as before a schedule's first step
        raise ValueError(
            f"no score of these {len(trained)} tensors got a gradient since the last step, so the step "
            f"trained none of them. The loss does not come from this model: it was computed with a copy of "
            f"it (copy.deepcopy, a model saved and loaded whole), under no_grad, or its gradients were "
            f"cleared before the step. Attach masks to the model that is trained; to pause masks, set "
            f"requires_grad_(False) on masks.parameters()"
        )

    def _warn_of_changed_gradients(self) -> None:
        """Warn, once, where theta's gradient was changed after the scores' was made of it."""
        for entry in self._entries if not self._has_warned else ():
            before = self._gradients.get(id(entry), [])
            now = _versions_of_gradients(entry) if entry.theta.grad is not None else before
            if before and now[0] != before[0] and now[1:] == before[1:]:
                self._has_warned = True
                warnings.warn(
                    f"the gradient of {entry.name} was changed between backward and step, by "
                    f"clip_grad_norm_(model.parameters()) for example, and the step takes no notice: the "
                    f"gradients of the scores were made of it before. Change those of masks.parameters()",
                    UnusedGradientWarning,
                    stacklevel=5,
                )

    def after_foreign_step(self, optimizer: Optimizer) -> None:
        """Take note of a step of an optimizer that is not bound; warn where it should be."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(p) in held for entry in self._entries for p in _trained(entry)):
            self._stepped_by = type(optimizer).__name__
        elif self._is_fresh and not (self._bound and self._num_steps):
            self._is_fresh = False
            self._num_foreign_steps += 1
            limit = _STEPS_BEFORE_WARNING[bool(self._bound)]
            if self._num_foreign_steps == limit:
                bound = f"the {self.bound_to} that is bound was never stepped" if self._bound else ""
                warnings.warn(
                    f"masks on {len(self._entries)} tensors get gradients, {type(optimizer).__name__} steps "
                    f"other parameters, and {bound or 'no optimizer is bound to the masks'}: they stay as "
                    f"they are. Build an optimizer over masks.parameters() and call masks.bind(optimizer)",
                    ForgottenBindWarning,
                    stacklevel=4,
                )


class _Samples:
    """A few values of each tensor, to notice what was written to it by way of `.data`, which leaves no trace.

    On a CPU they are looked at in every step; elsewhere, where a look waits for the device, in one of 64.
    """

    _NUM_VALUES, _EVERY = 8, 64

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._before: list[Tensor] = []
        self._num_looks = 0

    @torch.no_grad()
    def take(self) -> None:
        """Keep the values as they are, where the next look is one that counts."""
        is_free = all(tensor.device.type == "cpu" for tensor in self._tensors)
        is_due = is_free or self._num_looks % self._EVERY == 0
        self._before = [piece.clone() for piece in self._pieces()] if is_due else []

    @torch.no_grad()
    def have_changed(self) -> bool:
        """Return whether the values differ from those that were kept."""
        self._num_looks += 1
        if not self._before:
            return False
        return not all(map(torch.equal, self._pieces(), self._before))

    def _pieces(self) -> list[Tensor]:
        return [tensor.detach().reshape(-1)[: self._NUM_VALUES] for tensor in self._tensors]


def _place(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the dictionary that a module keeps a parameter in, and its key there."""
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner)._parameters, attribute


def _after_any_step(optimizer: Optimizer, *_: Any) -> None:
    for guard in list(_WATCHING):
        if not guard.is_bound(optimizer):
            guard.after_foreign_step(optimizer)


def _versions_of(entry: MaskedParameter) -> list[int]:
    """Return how often each trained tensor was written to, scores first; `data` writes are not counted."""
    tensors = (entry.scores, entry.weight, entry.numbers)
    return [tensor._version for tensor in tensors if tensor is not None]


def _versions_of_gradients(entry: MaskedParameter) -> list[int]:
    """Return how often each gradient was written to, theta's first; -1 where there is none."""
    gradients = [entry.theta.grad, *(parameter.grad for parameter in _trained(entry))]
    return [-1 if gradient is None else gradient._version for gradient in gradients]


def _trained(entry: MaskedParameter) -> list[nn.Parameter]:
    tensors = (entry.scores, entry.weight, entry.numbers)
    return [t for t in tensors if isinstance(t, nn.Parameter) and t.requires_grad]


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())
