"""Whether given scores are those of these parameters, and whether a mask can be made of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selfmask_dist.common.tensor_names import renamed
from selfmask_dist.common.text import some
from selfmask_dist.masking.families import Family

_HALVES = ("float16", "bfloat16")


def own_init(init: Mapping[str, Tensor], names: Sequence[str]) -> Mapping[str, Tensor]:
    """Return given first scores by the names of the parameters to mask, which may be wrapped otherwise."""
    given = {name: scores for name, scores in init.items() if ":" not in name}
    new_names = renamed(given, names)
    return {new_names[name]: scores for name, scores in given.items()}


def own_state(
    state: Mapping[str, Tensor], names: Sequence[str], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Return what a state has of these parameters, by their own names, without what is of all masks.

    Args:
        names: of the masked parameters.
        shapes: of every tensor that it must have, by key: `name`, or `name:part`.

    Raises:
        ValueError: names or shapes differ.
        TypeError: a value is no tensor.
    """
    check_tensors(state, "scores")
    new_names = renamed([key for key in state if ":" not in key], names)
    parts = {key: key.partition(":") for key in state if not key.startswith(":")}
    found = {f"{new_names.get(n, n)}{colon}{part}": state[key] for key, (n, colon, part) in parts.items()}
    check_same_names(set(found), set(shapes), "scores")
    for key, shape in shapes.items():
        if found[key].shape != shape:
            raise ValueError(
                f"scores of {key} have shape {tuple(found[key].shape)}, the parameter has {tuple(shape)}"
            )
    return found


def check_same_weights(found: str, expected: str, thetas: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Check that scores are loaded onto the weights that they were trained on.

    Args:
        found, expected: fingerprints of the weights here, and of those that the scores are for.
        thetas: {name: (weights here, which of them the scores prune)}.

    Raises:
        ValueError: they are others; the message says which.
    """
    if found == expected:
        return
    zeros = [int((weight[pruned] == 0).sum()) for weight, pruned in thetas.values()]
    num_pruned = sum(int(pruned.sum()) for _, pruned in thetas.values())
    text = (
        f"these scores were trained on weights with fingerprint {expected[:12]}, and the weights under the "
        f"masks here have {found[:12]}"
    )
    order = "Load the pretrained weights, attach, then load the scores; the model's own state is not needed"
    if num_pruned and sum(zeros) == num_pruned:
        raise ValueError(
            f"{text}: they are a theta. All {num_pruned:,} weights that the scores prune are zero already: "
            f"the model's state was saved with masks on, and was loaded before attach. {order}"
        )
    dtypes = {str(weight.dtype).removeprefix("torch.") for weight, _ in thetas.values()}
    half = ", the same ones in another precision" if dtypes <= set(_HALVES) else ""
    raise ValueError(
        f"{text} ({', '.join(sorted(dtypes))}): another backbone, other pretrained weights{half}, or a "
        f"model's state that was saved with masks on and loaded before attach. {order}"
    )


def check_same_names(given: set[str], expected: set[str], what: str) -> None:
    """Raise a ValueError where the names of `what` (scores, say) are not the masked parameters'."""
    if given != expected:
        missing, unknown = sorted(expected - given), sorted(given - expected)
        raise ValueError(
            f"{what} do not fit the masked parameters: missing {missing[:5]}, unknown {unknown[:5]}"
        )


def check_tensors(given: Mapping[str, Any], what: str) -> None:
    """Raise a TypeError where a value of `what` (scores, say) is no tensor."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{what} of {name} are a {type(value).__name__}; give tensors, for example "
                f"torch.as_tensor(...)"
            )


def check_finite(scores: Mapping[str, Tensor], family: Family) -> None:
    """Check scores that a mask is to be made of. One device sync.

    Raises:
        ValueError: a score is NaN or infinite; weights that are always kept have infinite ones.
    """
    kept_for_good = family.options.maskable < 1
    bad = {name: ~tensor.isfinite() & ~(tensor.isposinf() & kept_for_good) for name, tensor in scores.items()}
    counts = torch.stack([where.sum() for where in bad.values()]).tolist() if bad else []
    if found := [name for name, count in zip(bad, counts, strict=True) if count]:
        raise ValueError(
            f"{sum(counts):,} scores of {some(found)} are not finite: the loss was infinite or NaN in a "
            f"step, or they were loaded so. A mask of them would prune by chance; load earlier scores"
        )
