"""Pictures in files, and a run that goes on where there is nothing to draw with."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfmask_dist.common.plots import draw_bars, draw_lines, why_no_pictures


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def _rows_near(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.flatnonzero((np.abs(pixels - np.array(colour)).max(-1) <= 8).sum(1))


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def test_lines_have_gaps_and_many_places_no_smear_of_ticks(tmp_path: Path) -> None:
    draw_lines(
        tmp_path / "few.png", [1, 5, 20], {"a": [0.1, None, 0.3], "b": [None] * 3},
        xlabel="k", title="few", spread={"a": [0.01, 0.0, 0.02]},
    )  # fmt: skip
    draw_lines(
        tmp_path / "many.png", range(1, 65), {"a": [1 / i for i in range(1, 65)]}, xlabel="d", title=""
    )
    for name in ("few", "many"):
        assert len(_rows_near(_pixels(tmp_path / f"{name}.png"), BLUE)) > 100
    # under the axis of the many stand three labels, with paper between them
    labels = _pixels(tmp_path / "many.png")[545:565].min(-1).min(0) < 128
    assert 2 <= int((np.diff(labels.astype(int)) == 1).sum()) < 16


def test_the_legend_covers_no_bar(tmp_path: Path) -> None:
    """Bars that fill their axes leave the legend its place beside them."""
    draw_bars(tmp_path / "bars.png", ["x", "y"], {"frozen": [1.0, 1.0], "masked": [1.0, None]}, "title")
    pixels = _pixels(tmp_path / "bars.png")
    blue = (np.abs(pixels - np.array(BLUE)).max(-1) <= 8).sum(0)
    tall = np.flatnonzero(blue > 300)
    assert len(tall) > 100
    assert len(np.unique(blue[tall])) <= 4, "every column of a bar is whole"
    assert np.flatnonzero(blue).max() > tall.max() + 50, "the legend stands to the right"


def test_without_matplotlib_a_run_is_told_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert why_no_pictures() is None
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reason = why_no_pictures()
    assert reason is not None
    assert "matplotlib" in reason
    assert "install" in reason
    with pytest.raises(ValueError, match="matplotlib"):
        draw_bars(tmp_path / "bars.png", ["x"], {"a": [1.0]}, "title")
