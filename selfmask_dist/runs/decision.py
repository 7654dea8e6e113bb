"""Whether an adapted encoder is to be used, read from instance retrieval: a decision without a label.

    difference d = adapted - frozen, with its paired standard error se

    d >= 0.10 and d > 2 se      adapted   use it
    0 < d                       neutral   not shown to help: some of these were worse, so measure it first
    d <= 0                      frozen    keep the frozen backbone

The boundary of ten points is the one that accepted no encoder wrongly where both were tried; a difference of
two standard errors alone accepts neutral ones too. 2 se matters with few pictures only: se is at most
1/sqrt(n), so that from 400 pictures on ten points are above it.

The boundary at zero is not moved by the standard error, as the two mistakes there do not cost the same. No
encoder that was better by its accuracy failed to raise its instance retrieval, and every one that training
had destroyed lowered it. So one that raises nothing has nothing that speaks for it, and the frozen backbone
costs nothing: the burden of proof is the mask's. docs/unlabelled.md has the cases. Knows no torch and no
file.
"""

from collections.abc import Mapping
from typing import Any, Literal

from selfmask_dist.common.text import count, number

Decision = Literal["adapted", "neutral", "frozen"]

RISE = 0.10
STANDARD_ERRORS = 2.0
_SAID = {
    "adapted": "use what was trained",
    "neutral": "neutral, so keep the frozen backbone unless a measure on your task prefers what was trained",
    "frozen": "keep the frozen backbone",
}


def decide(difference: float, standard_error: float) -> Decision:
    """Return which encoder to use by the rise of instance retrieval, in [-1, 1], and its standard error."""
    if difference <= 0:
        return "frozen"
    if difference >= RISE and difference > STANDARD_ERRORS * standard_error:
        return "adapted"
    return "neutral"


def decision_text(retrieval: Any) -> str:
    """Return a decision with its numbers in one sentence; empty where nothing was decided.

    Args:
        retrieval: what `result.json` holds under that name.
    """
    if not isinstance(retrieval, Mapping) or retrieval.get("decision") not in _SAID:
        return ""
    before, after = number(retrieval.get("frozen")), number(retrieval.get("adapted"))
    error, pictures = number(retrieval.get("standard_error")), number(retrieval.get("pictures"))
    if before is None or after is None or error is None or pictures is None:
        return ""
    decision = retrieval["decision"]
    difference = after - before
    way = "rose" if difference > 0 else "fell" if difference < 0 else "stayed"
    why = {
        "adapted": "",
        "neutral": f" (a rise of {100 * RISE:.0f} points and of {STANDARD_ERRORS:.0f} standard errors says "
        "that it helps)",
        "frozen": " (what raises nothing is not worth using)",
    }
    moved = f" by {100 * abs(difference):.1f} points, from {100 * before:.1f} to {100 * after:.1f}"
    moved = moved if difference else f" at {100 * before:.1f}"
    return (
        f"{_SAID[decision]}: instance retrieval {way}{moved} % of {count(pictures)} training pictures, "
        f"standard error {100 * error:.1f}{why[decision]}"
    )


def mark_of(retrieval: Any) -> str:
    """Return what a mask file is marked with: the decision against it; empty where there is none."""
    is_against = isinstance(retrieval, Mapping) and retrieval.get("decision") == "frozen"
    return decision_text(retrieval) if is_against else ""
