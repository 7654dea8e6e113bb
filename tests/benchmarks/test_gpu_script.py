"""The GPU script in its short form on a CPU: every part runs, and what was measured is left as it goes."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_part_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[list[str]] = []
    write = gpu.Suite._write

    def write_and_look(suite: gpu.Suite) -> None:
        write(suite)
        written.append(list(json.loads((tmp_path / "gpu.json").read_text())["figures"]))

    monkeypatch.setattr(gpu.Suite, "_write", write_and_look)
    assert gpu.main(["--quick", "--out", str(tmp_path / "gpu.json")]) == 0
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    assert not [name for name in figures if name.endswith(", failed")], figures
    assert figures["parts left out for want of time"] == []
    assert {"tiny, seconds", "tiny, compiled, seconds", "views, seconds a batch", "knn, seconds"} <= set(
        figures
    )
    assert gpu.REPLACED in figures["tiny, seconds"]
    assert "lora" in figures["tiny, seconds"]
    assert len(written) == 6
    assert written[0] == [name for name in figures if name.startswith("tiny, ") and "compiled" not in name]


def test_parts_that_would_begin_too_late_are_named(tmp_path: Path) -> None:
    assert gpu.main(["--quick", "--minutes", "0", "--out", str(tmp_path / "gpu.json")]) == 0
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    assert "knn" in figures["parts left out for want of time"]
