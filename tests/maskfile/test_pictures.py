"""Pictures can be read: labels do not overlap, and a legend covers no bar."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from selfmask_dist.common.plots import pyplot
from selfmask_dist.maskfile.tools.comparison import ComparedMask, masks
from selfmask_dist.maskfile.tools.pictures import draw_mask, draw_shares, draw_similarity, draw_sparsity


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that were drawn, kept open."""
    plt = pyplot()
    monkeypatch.setattr(plt, "close", lambda _: None)
    yield plt
    monkeypatch.undo()
    plt.close("all")


def compared(num_masks: int, num_layers: int) -> list[ComparedMask]:
    generator = torch.Generator().manual_seed(0)
    return [
        ComparedMask(
            f"a task with a long name, seed {k}",
            {
                f"blocks.{i}.mlp.fc1.weight": torch.rand(8, 9, generator=generator) > 0.3
                for i in range(num_layers)
            },
            Path("x"),
        )
        for k in range(num_masks)
    ]


def check_rows_apart(axes: Any) -> None:
    axes.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(boxes) > 3
    for one, other in itertools.pairwise(sorted(boxes, key=lambda box: box.y0)):
        assert one.y1 <= other.y0 + 1, "labels overlap"


@pytest.mark.parametrize("num_layers", [5, 60, 400])
@pytest.mark.parametrize("num_masks", [1, 3])
def test_labels_of_layers_do_not_overlap(
    figures: Any, tmp_path: Path, num_layers: int, num_masks: int
) -> None:
    draw_sparsity(masks(compared(num_masks, num_layers)), tmp_path / "a.png")
    left, right = figures.gcf().axes[:2]
    check_rows_apart(left)
    assert left.get_yticklabels()[0].get_text() == "blocks.0.mlp.fc1"
    legend = right.get_legend()
    assert (legend is None) == (num_masks == 1)
    if legend is not None:
        assert legend.get_window_extent().x0 >= right.get_window_extent().x1 - 1, "the legend covers bars"


def test_labels_of_many_masks_do_not_overlap(figures: Any, tmp_path: Path) -> None:
    draw_similarity(masks(compared(90, 1)), tmp_path / "a.png")
    check_rows_apart(figures.gcf().axes[2])


def test_bars_are_the_shares_that_are_pruned(figures: Any, tmp_path: Path) -> None:
    bits = {"a.weight": torch.tensor([[True, False], [False, False]]), "a.bias": torch.tensor([False])}
    draw_mask(bits, tmp_path / "a.png", title="a")
    axes = figures.gcf().axes[0]
    assert [bar.get_width() for bar in axes.patches] == [75.0], "the bias is left out"
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_layer_that_a_mask_lacks_stays_empty(figures: Any) -> None:
    _, axes = figures.subplots()
    draw_shares(axes, {"a": {"x.weight": 0.5}, "b": {"x.weight": 0.0004, "y.weight": 1.0}}, title="t")
    assert [text.get_text() for text in axes.texts] == ["50", "0.04", "100"]
