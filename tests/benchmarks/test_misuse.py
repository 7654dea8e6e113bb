"""Misuses that went wrong once, each with the outcome that is right; `benchmarks.faults.misuse` has all.

And that the judging of them is not blind.
"""

import importlib
from pathlib import Path

import pytest

from benchmarks.faults.misuses import GROUPS
from benchmarks.faults.misuses.case import WORKS, Case, Said, check, distinct, error, run, warning

ONCE_WRONG = {
    "python_loops": (
        "a batch's gradient thrown away by hand",
        "scores' gradients zeroed in place",
        "clip_grad_norm_ on the model's parameters",
        "an infinite loss, then save",
        "L-BFGS with a closure",
        "weight decay set after bind",
        "the optimizer deep-copied",
        "training goes on after detach",
        "rewrite after detach",
        "load_state_dict after detach",
        "bind after detach",
        "save after detach, with moved statistics",
        "include names a module",
        "include is an empty list",
        "include is None",
        "attach to a state dict",
        "a model made under inference_mode",
        "attach under inference_mode",
        "a dynamically quantised model",
        "weights with a NaN",
        "a state of numpy arrays",
        "a state with a NaN, then save",
    ),
    "python_models": (
        "torch's prune on a masked layer",
        "a bank pickled",
        "two banks on one encoder",
        "attach while a bank has a mask on",
        "apply_masks while a bank has a mask on",
        "a copy of an encoder while a bank has a mask on",
        "other weights loaded under a bank",
        "the encoder of a bank converted",
        "pictures as bytes to a bank",
        "one picture without a batch to a bank",
        "train() on the encoder of a bank",
        "the arguments of apply_masks swapped",
        "a safetensors file for a mask",
        "an empty file for a mask",
        "a metric that is NaN",
    ),
    "settings": (
        "a name that is a whole path",
        "a name that leads out of the folder",
        "a name of 300 letters",
        "tabs for indents",
        "an environment variable",
        "a run's folder for a file",
        "two files for one run",
        "a family's key for another family",
        "an objective's key for another",
        "a method's key for another method",
    ),
    "commands": (
        "an unwritable folder for runs",
        "an unwritable folder for a report",
        "a file for a run's folder",
        "resume and overwrite at once",
        "resume without the checkpoints",
        "merge of one mask",
        "merge onto its own input",
        "data index with a budget in percent",
        "data index with workers below 1",
        "plan on less than a GPU",
        "RANK left over, and no number",
        "RANK left over alone",
        "a backbone's argument that does not fit",
        "a start that fails, and the name again",
        "a procedure that fails in its first link, and the name again",
    ),
    "folders": (
        "splits with years",
        "splits with a word before",
        "splits with years, told so",
        "a name with a line break",
        "one class alone",
        "a list with a split that is misspelt",
    ),
    "images_and_shards": ("a picture that EXIF says to turn", "an empty path", "a number for a path"),
}


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in ONCE_WRONG.items() for name in names])
def test_it_comes_out_as_declared(module: str, name: str, tmp_path: Path) -> None:
    cases = {case.name: case for case in importlib.import_module(f"benchmarks.faults.misuses.{module}").CASES}
    outcome = run(cases[name], module, tmp_path)
    assert outcome.verdict == "right", f"wanted {outcome.wanted}, got {outcome.got}"


@pytest.mark.slow
def test_peft_before_and_under_masks(tmp_path: Path) -> None:
    cases = importlib.import_module("benchmarks.faults.misuses.python_models").CASES
    for case in cases:
        if "PEFT" in case.name or "peft" in case.name:
            assert run(case, "peft", tmp_path).verdict == "right", case.name


def test_names_of_cases_are_distinct() -> None:
    for module in GROUPS.values():
        assert distinct(importlib.import_module(f"benchmarks.faults.misuses.{module}").CASES)


def fails(_: Path) -> None:
    raise ValueError("x is wrong")


def breaks(_: Path) -> None:
    raise KeyError("x")


def is_wrong(_: Path) -> None:
    check(False, "2 in place of 1")


def never_ends(_: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("case", "verdict"),
    [
        (Case("named", error("x"), fails), "right"),
        (Case("not named", error("y"), fails), "unclear"),
        (Case("refused", WORKS, fails), "unclear"),
        (Case("not meant", error("x"), breaks), "traceback"),
        (Case("a wrong value", WORKS, is_wrong), "silent"),
        (Case("no error", error("x"), lambda _: None), "silent"),
        (Case("no warning", warning("x"), lambda _: None), "silent"),
        (Case("said", warning("x"), lambda _: Said(0, "note: x")), "right"),
        (
            Case(
                "a command's traceback", error("x"), lambda _: Said(1, "Traceback (most recent call last): x")
            ),
            "traceback",
        ),
        (Case("a command's status", error("x"), lambda _: Said(0, "x")), "silent"),
        (Case("endless", error("x"), never_ends, seconds=0.2), "hang"),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_the_judge_tells_outcomes_apart(case: Case, verdict: str, tmp_path: Path) -> None:
    assert run(case, "group", tmp_path).verdict == verdict
