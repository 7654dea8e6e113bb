"""Weights that training leaves as they are, entry by entry, and the choice of entries by magnitude.

    g := g * 1[code = FREE]      before the step, so that clipping and moments see only what is trained
    w := w_0 where code = HELD,  0 where code = ZERO      after the step, whatever decay and momentum did

Codes are int8 tensors of a parameter's shape. Parameters without a code are trained whole. Knows nothing of
files or of where codes come from.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

HELD, FREE, ZERO = 0, 1, 2
"""An entry keeps its value to the bit; is trained; is zero and stays so."""

Codes = Mapping[str, Tensor]


class Hold:
    """Keeps what `codes` say of `model` from the moment it is made.

    Args:
        codes: {parameter name: int8 tensor of its shape with HELD, FREE and ZERO}.

    Raises:
        ValueError: a name that the model lacks, another shape, other codes, or a parameter that is cut over
            processes.
    """

    def __init__(self, model: nn.Module, codes: Codes) -> None:
        parameters = dict(model.named_parameters())
        self._held: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # parameter, is fixed, its values there
        self._hooks: list[Any] = []
        for name, code in codes.items():
            _check(name, code, parameters.get(name))
            parameter, code = parameters[name], code.to(parameters[name].device)
            is_free = code == FREE
            with torch.no_grad():
                parameter.masked_fill_(code == ZERO, 0)
            self._held.append((parameter, ~is_free, parameter.detach()[~is_free]))
            if parameter.requires_grad:
                factor = is_free.to(parameter.dtype)
                self._hooks.append(parameter.register_hook(lambda grad, factor=factor: grad * factor))

    def bind(self, optimizer: Optimizer) -> None:
        """Restore the fixed entries after each of the optimizer's steps."""
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: self.restore()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the fixed entries back: to be called where weights were loaded by other means as well."""
        for parameter, is_fixed, values in self._held:
            parameter.masked_scatter_(is_fixed, values)

    def remove(self) -> None:
        """Train everything again from here on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def keep_largest(
    weights: Mapping[str, Tensor],
    candidates: Mapping[str, Tensor],
    share: float,
    *,
    scope: str = "tensor",
) -> dict[str, Tensor]:
    """Return the `share` of the candidates with the largest magnitude, as bool masks.

    Args:
        weights, candidates: tensors and bool masks of the same names and shapes.
        share: 0 to 1; `round(share * candidates)` are kept. Of equal magnitudes the first entry is kept.
        scope: `tensor`: that share of each tensor; `global`: of all of them together.

    Raises:
        ValueError: a share outside 0 to 1, an unknown scope, or nothing to choose from.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of weights to keep must lie in 0 to 1, got {share}")
    if scope not in ("tensor", "global"):
        raise ValueError(f"scope must be tensor or global, got {scope!r}")
    if not candidates:
        raise ValueError("no weights to choose from; name at least one parameter")
    if scope == "tensor":
        return {name: _largest(weights[name], allowed, share) for name, allowed in candidates.items()}
    flat = torch.cat([weights[name].flatten() for name in candidates])
    allowed = torch.cat([mask.flatten() for mask in candidates.values()])
    kept = _largest(flat, allowed, share).split([mask.numel() for mask in candidates.values()])
    return {name: part.view(mask.shape) for (name, mask), part in zip(candidates.items(), kept, strict=True)}


def _largest(weight: Tensor, allowed: Tensor, share: float) -> Tensor:
    number = round(share * int(allowed.sum()))
    sizes = weight.detach().abs().masked_fill(~allowed, -1).flatten()
    order = sizes.argsort(descending=True, stable=True)  # stable: the same choice on every machine
    kept = torch.zeros_like(allowed).flatten()
    kept[order[:number]] = True
    return kept.view(allowed.shape)


def _check(name: str, code: Tensor, parameter: nn.Parameter | None) -> None:
    if parameter is None:
        raise ValueError(f"{name} is to be held, and the model has no such parameter")
    if type(parameter.data) is not Tensor:
        raise ValueError(f"{name} is cut over processes; weights can be held with engine.name=ddp only")
    if code.shape != parameter.shape:
        raise ValueError(f"codes of {name} are {tuple(code.shape)}, the parameter {tuple(parameter.shape)}")
    if unknown := set(code.unique().tolist()) - {HELD, FREE, ZERO}:
        raise ValueError(f"codes of {name} hold {sorted(unknown)}; known are 0 (held), 1 (free), 2 (zero)")
