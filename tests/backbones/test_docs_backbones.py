"""What docs/backbones.md shows works as it stands there, and its table is that of the measured rows."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.backbones.cases import CASES
from benchmarks.backbones.coverage import is_right, is_silent, main, table

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "backbones.md").read_text()
ROWS = ROOT / "benchmarks" / "results" / "coverage.json"


EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_each_example_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[number], "docs/backbones.md", "exec"), {})
    assert all(path.stat().st_size > 0 for path in tmp_path.glob("*.mask"))
    assert (tmp_path / "tiny.mask").exists() == ("tiny.mask" in EXAMPLES[number])


def test_the_table_is_that_of_the_rows() -> None:
    rows = json.loads(ROWS.read_text())["figures"]["rows"]
    assert table(rows) in PAGE
    assert not [name for name, row in rows.items() if is_silent(row)]
    # its embeddings differ by 2e-7 from one place in memory to another; the page says so
    assert [name for name, row in rows.items() if not is_right(row)] == ["timm:xcit_nano_12_p16_224"]
    assert set(rows) <= set(CASES)


def test_a_row_that_is_left_out_without_a_word_is_silent() -> None:
    row = {"share": 0.5, "left_out": ["blocks.0.mlp.fc1_g.weight"], "said": False}
    assert is_silent(row)
    assert not is_silent(row | {"said": True})
    assert not is_silent(row | {"refused": "by name"})
    assert is_silent({"failed": "it"})
    assert not is_right(row | {"changes": True, "equal": False, "detached": True})


@pytest.mark.slow
def test_one_architecture_from_attaching_to_a_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "part.json"
    arguments = ["coverage", "--only", "timm:convnext_atto", "timm:resnetv2_50x1_bit", "--out", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 0
    rows = json.loads(out.read_text())["figures"]["rows"]
    assert rows["timm:convnext_atto"]["rule"] == "structure"
    assert rows["timm:convnext_atto"]["share"] > 0.95
    assert "stages.0.blocks.0" in rows["timm:resnetv2_50x1_bit"]["refused"]
    assert all(is_right(row) and not is_silent(row) for row in rows.values())
    monkeypatch.setattr("sys.argv", ["coverage", "--markdown", "--out", str(out)])
    assert main() == 0
    assert "| `timm:convnext_atto` | structure | " in capsys.readouterr().out
