"""A benchmark's result is honest: a missed, unmeasured or NaN target is never a pass."""

import json
import operator
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import harness
from benchmarks.harness import Benchmark, interleave, peak_memory, ratio_to_first


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A parsed benchmark whose default results folder is temporary."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results")

    def start(*argv):
        benchmark = Benchmark("example", "An example.")
        benchmark.parse(list(argv))
        return benchmark

    return start


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_result_has_the_shared_shape_on_the_last_line_and_in_the_file(make, capsys, tmp_path):
    benchmark = make("--json")
    print("something else")
    benchmark.figure("ratio", np.float32(1.0), max=1.03)
    benchmark.figure("accuracy", torch.tensor(0.5), min=0.25, max=1.0)
    benchmark.figure("note", {"sizes": (1, 2)})
    assert benchmark.finish() == 0
    result = last_line(capsys)
    assert result["name"] == "example"
    assert result["figures"] == {"ratio": 1.0, "accuracy": 0.5, "note": {"sizes": [1, 2]}}
    assert result["targets"] == {"ratio": {"max": 1.03}, "accuracy": {"min": 0.25, "max": 1.0}}
    assert result["pass"] is True
    assert result["skipped"] is None
    assert {"cpu", "cores", "memory_gib", "gpus"} <= set(result["hardware"])
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert json.loads((tmp_path / "results" / "example.json").read_text()) == result


@pytest.mark.parametrize("value", [1.5, 0.5, float("nan"), float("inf"), None])
def test_a_missed_target_is_reported_and_fails_only_when_strict(make, capsys, value):
    for arguments, code in ((["--json"], 0), (["--json", "--strict"], 1)):
        benchmark = make(*arguments)
        benchmark.figure("good", 1)
        benchmark.figure("bad", value, min=0.9, max=1.1)
        assert benchmark.finish() == code
        captured = capsys.readouterr()
        assert json.loads(captured.out)["pass"] is False
        assert "MISSED" in captured.err


def test_a_target_that_was_never_measured_is_missed(make, capsys):
    benchmark = make("--json")
    benchmark.target("forgotten", max=1)
    benchmark.finish()
    captured = capsys.readouterr()
    assert json.loads(captured.out)["pass"] is False
    assert "not measured" in captured.err


def test_quick_results_lie_apart_and_keep_only_the_targets_that_mean_something(make, capsys, tmp_path):
    benchmark = make("--quick", "--json")
    benchmark.figure("at any size", 1.0, max=2)
    benchmark.figure("at full size", 1.0, max=0, quick=False)
    benchmark.finish()
    result = last_line(capsys)
    assert result["targets"] == {"at any size": {"max": 2}}
    assert result["pass"] is True
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["example.quick.json"]


def test_a_skipped_benchmark_says_why_passes_nothing_and_overwrites_nothing(make, capsys, tmp_path):
    benchmark = make("--json")
    benchmark.skip("no data at there")
    assert benchmark.finish() == 0
    captured = capsys.readouterr()
    assert "skipped: no data at there" in captured.err
    result = json.loads(captured.out)
    assert result["skipped"] == "no data at there"
    assert result["pass"] is False
    assert not (tmp_path / "results").exists()


def test_without_json_stdout_is_empty_and_out_is_followed(make, capsys, tmp_path):
    benchmark = make("--out", str(tmp_path / "deep" / "here.json"))
    benchmark.figure("x", 1)
    benchmark.finish()
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "deep" / "here.json").read_text())["figures"] == {"x": 1}


def test_calls_are_interleaved_and_the_warmup_is_not_counted():
    calls: list[str] = []
    seconds = interleave({name: partial(calls.append, name) for name in "ABC"}, rounds=3, warmup=2)
    assert calls == list("ABC" * 5)
    assert {name: len(times) for name, times in seconds.items()} == {"A": 3, "B": 3, "C": 3}


def test_interleaved_times_and_ratios_are_right():
    seconds = interleave(
        {"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.03)}, rounds=3, warmup=0
    )
    assert min(seconds["short"]) >= 0.01
    assert ratio_to_first(seconds)["short"] == 1.0
    assert 1.5 < ratio_to_first(seconds)["long"] < 6
    # ratios round by round are 2, 3, 4; the ratio of the medians would be 4
    assert ratio_to_first({"a": [1.0, 3.0, 2.0], "b": [2.0, 9.0, 8.0]}) == {"a": 1.0, "b": 3.0}


def test_peak_memory_is_of_the_function_alone():
    ballast = bytearray(b"x") * (200 * 2**20)  # of this process: must not show
    assert 60 <= peak_memory(operator.mul, b"x", 64 * 2**20) / 2**20 < 80
    assert len(ballast) > 0


def test_peak_memory_of_a_failing_function_is_an_error():
    with pytest.raises(RuntimeError, match="exit ended with exit code 3"):
        peak_memory(sys.exit, 3)
