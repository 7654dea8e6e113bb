"""Weights as named tensors: read from a file without executing it, loaded strictly, mixed, fingerprinted.

`read_state_dict` is the package's one reader of state dicts that others wrote. Of architectures only
`convert` knows something, through timm; nothing here knows hubs, masks or process groups.
"""

import math
import pickle
import sys
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfmask_dist.backbones.checkpoint import KNOWN, choose, open_known
from selfmask_dist.backbones.mapping import FilePages
from selfmask_dist.common.fingerprint import digest

_NESTED_UNDER = ("state_dict", "model")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_COUNTER = "num_batches_tracked"  # BatchNorm counts steps; no forward pass reads it
_MAX_LISTED = 10
_RUNS, _RUN_LENGTH = 64, 16  # of values that `sample_of` reads of a tensor
_LOOKS_AT_VALUES: ContextVar[bool] = ContextVar("looks_at_values", default=True)


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 (hex) over names, shapes and little-endian float32 values, sorted by name.

    The same for fp16 and fp32 copies of equal values and on any device. `num_batches_tracked` is left out.
    """
    return digest(FilePages().one_by_one(dict(named)))


def sample_of(named: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 (hex) over names, shapes and some values of each tensor: 64 runs of 16, far apart.

    It tells other weights, and files that were cut or not yet written to their end, from the right ones. A
    single value that differs may escape it, which `fingerprint` sees; that one reads every value.
    """
    return digest((f"{name} {tuple(named[name].shape)}", _some_values(named[name])) for name in sorted(named))


def _some_values(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if len(flat) <= _RUNS * _RUN_LENGTH:
        return flat
    starts = torch.linspace(0, len(flat) - _RUN_LENGTH, _RUNS, dtype=torch.float64, device="cpu").long()
    return flat[(starts[:, None] + torch.arange(_RUN_LENGTH, device="cpu")).reshape(-1)]


@contextmanager
def trusting_values() -> Iterator[None]:
    """Let `load_exactly` not look at every value: another process of the run does, at the same file."""
    token = _LOOKS_AT_VALUES.set(False)
    try:
        yield
    finally:
        _LOOKS_AT_VALUES.reset(token)


def read_state_dict(
    path: str | Path,
    *,
    setting: str = "backbone.weights",
    skip_others: bool = False,
    own: Sequence[Collection[str]] = (),
    key: str | None = None,
) -> dict[str, Tensor]:
    """Read a state dict onto the CPU, from safetensors or from what `torch.load(weights_only=True)` takes.

    Nothing in the file is executed. Dicts nested under known keys ("state_dict", "teacher") are opened, known
    prefixes ("module.", "encoder_q.") go, and of several networks one is taken; see `checkpoint`.

    Args:
        setting: what named the file, for messages: a key of the config or an argument.
        skip_others: pass over entries that are no tensors in place of refusing the file.
        own: names of the model that the weights are for, in one set or several that the file may have.
        key: which network of the file, by its key or prefix (`backbone.weights_key`).

    Raises:
        ValueError: no such file, unreadable, or not a state dict.
    """
    path = Path(path)
    if not path.is_file():
        found = "a directory" if path.is_dir() else "not there"
        raise ValueError(f"weights file {path} is {found}; set {setting} to a .safetensors or .pth file")
    try:
        content = _load(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"weights file {path} cannot be read: it is damaged, or it holds more than tensors (a whole "
            "model, perhaps) and reading it would execute what is in it. Where you trust it, write its "
            "tensors alone: torch.save(model.state_dict(), 'weights.pt')"
        ) from error
    except Exception as error:  # a damaged file makes the two readers raise almost anything
        raise ValueError(
            f"weights file {path} cannot be read: {str(error)[:200]}. Expected safetensors, or a state dict "
            "saved by torch.save that torch.load(weights_only=True) accepts; the file may be damaged or only "
            "partly downloaded"
        ) from error
    source = f"weights file {path}"
    choice = choose(content, own, key=key, source=source) if own and isinstance(content, Mapping) else None
    if choice is not None:
        _check_is_state_dict(choice.level, path)
        return choice.state
    content = open_known(content, _NESTED_UNDER if own else KNOWN, source=source)
    if skip_others and isinstance(content, Mapping):
        content = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    _check_is_state_dict(content, path)
    return _without_wrapper_prefixes(content)


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    # mapped like safetensors: what is read once needs no memory of its own; older formats cannot be
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _check_is_state_dict(content: Any, path: Path) -> None:
    if not isinstance(content, Mapping):
        raise ValueError(f"weights file {path} holds a {type(content).__name__}, not a state dict")
    if not content:
        raise ValueError(f"weights file {path} holds an empty state dict")
    others = [
        key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if others:
        keys = ", ".join(f"{key!r} ({type(content[key]).__name__})" for key in others[:_MAX_LISTED])
        raise ValueError(
            f"weights file {path} is not a state dict: {len(others)} of its {len(content)} entries are not a "
            f"name with a tensor: {keys}. A state dict may also lie under 'state_dict', 'model', 'teacher' "
            f"and other known keys"
        )


def _without_wrapper_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = list(state)
    while prefix := next((p for p in _WRAPPER_PREFIXES if all(name.startswith(p) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, state.values(), strict=True))


def drop_modules(state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the state dict without the tensors that belong to the named modules."""
    prefixes = tuple(f"{name}." for name in names)
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def convert(model: nn.Module, name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict by the rule of a timm model's family.

    Such rules rename tensors of old releases and resample position embeddings of another image size.

    Args:
        model: the timm model that the result is for.
        name: its name in timm's registry, with or without a tag.

    Raises:
        Exception: whatever timm's converter raises over weights of another family.
    """
    from timm.models import model_entrypoint, split_model_name_tag  # takes seconds

    entrypoint = model_entrypoint(split_model_name_tag(name)[0])
    filter_fn = getattr(sys.modules[entrypoint.__module__], "checkpoint_filter_fn", None)
    return filter_fn(dict(state), model) if filter_fn else state


def load_exactly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    target: str,
    changed: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Copy a state dict into a module with exactly its names and shapes, converting to the module's dtypes.

    Args:
        source, target: what the file and the model are called in messages.
        changed: shapes that tensors of this file had before a conversion that must not change them; counted
            as differences.

    Raises:
        ValueError: names or shapes differ (all differences in one message, the first 10 of each kind by
            name), or values are not finite.
    """
    own = module.state_dict()
    # files written by other tools leave the counter out
    state = {name: value for name, value in own.items() if name.endswith(_COUNTER)} | dict(state)
    shapes = {name: tuple(value.shape) for name, value in state.items()} | dict(changed or {})
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    differing = [
        f"{name}: file {shapes[name]}, model {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and shapes[name] != tuple(value.shape)
    ]
    if missing or unexpected or differing:
        raise ValueError(
            f"{source} does not fit {target}:\n"
            + _listing("only in the model", missing)
            + _listing("only in the file", unexpected)
            + _listing("different shape", differing)
            + "Set backbone.name, backbone.kwargs and backbone.image_size to the model that the weights are "
            "of; backbone.remove takes modules out of the model"
        )
    module.load_state_dict(state, strict=True)
    if not _LOOKS_AT_VALUES.get():
        return
    whole = FilePages().one_by_one(module.state_dict())
    bad = [name for name, value in whole if not value.isfinite().all()]
    if bad:
        raise ValueError(
            f"{source} holds values that are not finite:\n{_listing('not finite', bad)}The file is damaged"
        )


@torch.no_grad()
def write(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors by name into the model's own, which may be more than these.

    Raises:
        ValueError: a name that the model does not have.
    """
    own = model.state_dict()
    if unknown := sorted(set(tensors) - set(own)):
        raise ValueError(f"the model has no {unknown[0]} (and {len(unknown) - 1} more)")
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def interpolate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return (1 - alpha) first + alpha second, in new tensors, each computed in float64.

    At 0 and 1 the result equals that end to the bit. Whole numbers (counters of batches) are those of the
    nearer end.

    Args:
        alpha: 0 to 1; beyond lies extrapolation, which is allowed.

    Raises:
        ValueError: names or shapes differ, or alpha is not finite.
    """
    check_same(first, second)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha}")
    if alpha in (0, 1):  # a product would turn an infinity into NaN
        return {name: tensor.clone() for name, tensor in (second if alpha else first).items()}
    return {
        name: _between(tensor, second[name], alpha)
        if tensor.is_floating_point()
        else (second[name] if alpha >= 0.5 else tensor).clone()
        for name, tensor in first.items()
    }


def check_same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Check that two state dicts have the same names and shapes.

    Raises:
        ValueError: they do not; the message names the first difference.
    """
    if names := sorted(set(first) ^ set(second)):
        raise ValueError(f"two models with other parameters cannot be mixed: only one has {names[0]}")
    for name, tensor in first.items():
        if tensor.shape != second[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in one model and {tuple(second[name].shape)} in the "
                f"other; only models of one architecture can be mixed"
            )


def _between(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    return (first.double() * (1 - alpha) + second.double() * alpha).to(first.dtype)


def _listing(kind: str, entries: Sequence[str]) -> str:
    if not entries:
        return ""
    more = f"; and {len(entries) - _MAX_LISTED} more" if len(entries) > _MAX_LISTED else ""
    return f"  {kind} ({len(entries)}): {'; '.join(entries[:_MAX_LISTED])}{more}\n"
