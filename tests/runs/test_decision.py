"""The decision by instance retrieval: its boundaries, its words, and what a mask is marked with."""

import pytest

from selfmask_dist.runs.decision import decide, decision_text, mark_of


@pytest.mark.parametrize(
    ("difference", "error", "decision"),
    [
        (0.36, 0.021, "adapted"),
        (0.10, 0.02, "adapted"),  # the boundary is part of it
        (0.0999, 0.001, "neutral"),  # however sure it is
        (0.12, 0.07, "neutral"),  # few pictures: ten points are chance
        (0.001, 0.02, "neutral"),
        (0.0, 0.0, "frozen"),  # a mask that changes nothing
        (-0.001, 0.02, "frozen"),  # within the error, but nothing speaks for the mask
        (-0.3, 0.02, "frozen"),
    ],
)
def test_boundaries(difference: float, error: float, decision: str) -> None:
    assert decide(difference, error) == decision


def entry(frozen: float, adapted: float, decision: str) -> dict[str, object]:
    return {
        "pictures": 600,
        "frozen": frozen,
        "adapted": adapted,
        "difference": adapted - frozen,
        "standard_error": 0.021,
        "decision": decision,
    }


def test_a_decision_says_its_numbers_and_only_one_against_the_mask_marks_it() -> None:
    good = entry(0.248, 0.612, "adapted")
    assert decision_text(good) == (
        "use what was trained: instance retrieval rose by 36.4 points, from 24.8 to 61.2 % of 600 training "
        "pictures, standard error 2.1"
    )
    assert mark_of(good) == mark_of(entry(0.25, 0.29, "neutral")) == ""
    bad = entry(0.248, 0.003, "frozen")
    assert mark_of(bad) == decision_text(bad)
    assert mark_of(bad).startswith("keep the frozen backbone: instance retrieval fell by 24.5 points")
    assert "rise of 10 points" in decision_text(entry(0.25, 0.29, "neutral"))
    assert "stayed at 25.0 %" in decision_text(entry(0.25, 0.25, "frozen"))


@pytest.mark.parametrize("damaged", [None, {}, [], {"decision": "frozen"}, {"decision": 3, "frozen": 0.1}])
def test_nothing_is_said_of_what_was_not_decided(damaged: object) -> None:
    assert decision_text(damaged) == mark_of(damaged) == ""
