"""What masks leave on a model's modules: which weights are theta, and what buffers were before.

A mark lies on the module that owns a parameter and goes where the module goes. In a copy of the model, or in
a model that was saved whole, it becomes a plain record, as the masks themselves stay behind: theta is then
all that is there, and the record says so to whoever attaches masks or applies a file.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

MARK = "_is_masked"  # an attribute of scores that are parameters of the module; see `parametrized`
_ATTRIBUTE = "_selfmask_marks"  # of a module: {its parameter's name: Attached or a record}
_HELD = "_selfmask_held"  # likewise, of what a bank of masks rewrites: Held, or a record in a copy
_SAMPLE = 2**16  # values of a tensor that are looked at for a record
_PLACES = 32

Record = dict[str, Any]  # of plain values, so that a pickled model needs no class of this package


@dataclass(eq=False)
class Attached:
    """The mark of a parameter whose masks are attached; it keeps them alive, so that they can be detached.

    masks: an `AttachedMasks`.
    entry: the `MaskedParameter`.
    """

    masks: Any
    entry: Any

    def record(self) -> Record:
        """Return what a copy of the module says of the parameter."""
        entry = self.entry
        what = "theta of masks that were attached when the model was copied or saved whole"
        if not entry.shards.is_whole:
            return {"what": what}
        return record(what, entry.theta.detach(), entry.first_weight) or {}

    def __deepcopy__(self, memo: Any) -> Record:
        return self.record()

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[Record]]:
        return dict, (self.record(),)


@dataclass(eq=False)
class Held:
    """The mark of a parameter that a bank rewrites from one mask to the next.

    owner: the bank, which lives as long as the module does.
    what: returns what the parameter is now; None where it is the frozen weight.
    """

    owner: Any
    theta: Tensor
    weight: Tensor
    what: Callable[[], str | None]

    def record(self) -> Record:
        """Return what a copy of the module says of the parameter; nothing where it is the frozen weight."""
        what = self.what()
        return {} if what is None else record(what, self.theta.detach(), self.weight) or {}

    def __deepcopy__(self, memo: Any) -> Record:
        return self.record()

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[Record]]:
        return dict, (self.record(),)


@torch.no_grad()
def record(what: str, theta: Tensor, weight: Tensor) -> Record | None:
    """Return a record of a parameter that is theta now, or None where theta is the weight itself.

    It has some places where the two differ most, so that `says` notices when other weights are loaded.
    """
    theta, weight = theta.detach().flatten(), weight.detach().flatten().to(theta.device)
    for step in (max(theta.numel() // _SAMPLE, 1), 1):
        far = (theta[::step].float() - weight[::step].float()).abs()
        value, place = far.topk(min(_PLACES, far.numel()))
        place = place[value > 0] * step
        if len(place):
            return {
                "what": what,
                "places": place.tolist(),
                "theta": theta[place].float().tolist(),
                "weight": weight[place].float().tolist(),
            }
    return None


@torch.no_grad()
def says(found: Record, tensor: Tensor) -> str | None:
    """Return what a parameter is, by its record; None where other weights were loaded since."""
    if "places" not in found:
        return found.get("what")
    values = tensor.detach().flatten()
    if not all(place < values.numel() for place in found["places"]) or values.is_meta:
        return None
    now = values[torch.tensor(found["places"], device=values.device)].float().cpu()
    theta, weight = torch.tensor(found["theta"]), torch.tensor(found["weight"])
    return str(found["what"]) if bool(((now - theta).abs() < (now - weight).abs()).all()) else None


# ---- marks


def put(model: nn.Module, name: str, mark: Attached | Record | None) -> None:
    """Mark a parameter of `model`; None takes its mark off."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    marks = module.__dict__.get(_ATTRIBUTE, {})
    module.__dict__[_ATTRIBUTE] = marks
    marks.pop(attribute, None)
    if mark is not None:
        marks[attribute] = mark
    if not marks:
        del module.__dict__[_ATTRIBUTE]


def take_off(model: nn.Module, name: str, masks: Any) -> None:
    """Take the mark of a parameter off, if it is of these masks and the module is there still."""
    with suppress(AttributeError):
        owner, _, attribute = name.rpartition(".")
        mark = model.get_submodule(owner).__dict__.get(_ATTRIBUTE, {}).get(attribute)
        if isinstance(mark, Attached) and mark.masks is masks:
            put(model, name, None)


def attached(model: nn.Module) -> dict[str, Attached]:
    """Return the marks of the parameters of `model` that carry masks now, by name."""
    return {name: mark for name, mark in _marks(model) if isinstance(mark, Attached)}


def freeze_unmasked(model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Make these parameters of `model` frozen, but for theta of masks that are attached."""
    thetas = {id(mark.entry.theta) for mark in attached(model).values()}
    for parameter in parameters:
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in thetas)


def hold(model: nn.Module, name: str, held: Held) -> None:
    """Mark a parameter of `model` as one that a bank rewrites, beside what else it is marked as."""
    owner, _, attribute = name.rpartition(".")
    model.get_submodule(owner).__dict__.setdefault(_HELD, {})[attribute] = held


def holders(model: nn.Module) -> list[Any]:
    """Return the banks that rewrite parameters of `model`."""
    found = {id(mark.owner): mark.owner for _, mark in _marks(model, _HELD) if isinstance(mark, Held)}
    return list(found.values())


def left_over(model: nn.Module) -> dict[str, str]:
    """Return what each parameter is that is theta without its masks in training: a copy, a mask file was
    applied, or a bank has a mask on.
    """
    found = {}
    for name, mark in [*_marks(model), *_marks(model, _HELD)]:
        if not isinstance(mark, Attached):
            text = mark.what() if isinstance(mark, Held) else says(mark, model.get_parameter(name))
            if text is not None:
                found[name] = text
    return found


def clear(model: nn.Module) -> None:
    """Forget records, so that theta counts as plain weights."""
    for name, mark in list(_marks(model)):
        if not isinstance(mark, Attached):
            put(model, name, None)
    for module in model.modules():
        module.__dict__.pop(_HELD, None)


def _marks(model: nn.Module, kind: str = _ATTRIBUTE) -> Iterator[tuple[str, Attached | Held | Record]]:
    for module_name, module in model.named_modules():
        for attribute, mark in module.__dict__.get(kind, {}).items():
            parameter = module._parameters.get(attribute)
            is_gone = isinstance(mark, Attached) and mark.entry.theta is not parameter
            if parameter is not None and not is_gone:  # another parameter was put in its place
                yield f"{module_name}.{attribute}" if module_name else attribute, mark


# ---- buffers


@dataclass(frozen=True)
class _Before:
    """A module's buffers before masks were attached to a model that it is in, and the masks that are."""

    buffers: dict[str, Tensor]
    masks: "WeakSet[Any]"


_BUFFERS: "WeakKeyDictionary[nn.Module, _Before]" = WeakKeyDictionary()


def keep_buffers(model: nn.Module, masks: Any) -> None:
    """Keep the buffers of `model`, unless masks that are attached still have kept earlier ones."""
    for module in model.modules():
        found = _BUFFERS.get(module)
        if found is None or not found.masks:
            own = {name: buffer.detach().clone() for name, buffer in module.named_buffers(recurse=False)}
            found = _BUFFERS[module] = _Before(own, WeakSet())
        found.masks.add(masks)


def buffer_before(module: nn.Module, name: str) -> Tensor | None:
    """Return a buffer as it was before masks were attached; None where it came later."""
    found = _BUFFERS.get(module)
    return None if found is None else found.buffers.get(name)


@torch.no_grad()
def give_buffers_back(model: nn.Module, masks: Any, *, restore: bool) -> None:
    """Take masks off the list, and write buffers back where these were the last (and `restore`).

    A buffer whose shape has changed is a cache of the model's own and stays.
    """
    for module in model.modules():
        found = _BUFFERS.get(module)
        if found is None:
            continue
        found.masks.discard(masks)
        if found.masks:
            continue
        del _BUFFERS[module]
        for name, buffer in module.named_buffers(recurse=False):
            before = found.buffers.get(name)
            if restore and before is not None and before.shape == buffer.shape:
                buffer.copy_(before)


def detach(model: nn.Module, *, restore: bool = True) -> None:
    """Take every mask off a model, also those whose handle is lost; see `attach.AttachedMasks.detach`.

    Args:
        restore: False leaves theta in place, as plain weights: also in a copy of a masked model, and where a
            mask file was applied.

    Raises:
        ValueError: the model carries no masks, or it is theta and its pretrained weights are not at hand.
    """
    found = list(dict.fromkeys(mark.masks for mark in attached(model).values()))
    lost = left_over(model)
    if restore and lost:
        raise ValueError(describe_left_over(lost))
    if any(hasattr(parameter, MARK) for parameter in model.parameters()):
        raise ValueError("the masks on this model are parametrised (engine.name=deepspeed) and stay on it")
    if not found and not lost:
        raise ValueError("this model carries no masks")
    for masks in reversed(found):
        masks.detach(restore=restore)
    clear(model)


def describe_left_over(found: Mapping[str, str]) -> str:
    """Return a sentence on a model whose weights are theta, without its masks."""
    name, what = next(iter(found.items()))
    return (
        f"{len(found)} parameters of this model ({name}, ...) are not the pretrained weights: they are "
        f"{what}. Load the pretrained weights into it, or, where theta is to count as plain weights, call "
        f"selfmask_dist.detach(model, restore=False)"
    )
