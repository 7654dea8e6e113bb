"""Pictures in files: pyplot without a display, lines over a number, and bars by row.

matplotlib is imported when something is drawn, so that what does not draw works without it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfmask_dist.common.optional import MissingLibraryError, require

_FEW_TICKS = 12  # numbers along an axis that still can be read


def pyplot() -> Any:
    """Return matplotlib.pyplot, set to draw into files on a machine without a display.

    Raises:
        MissingLibraryError: matplotlib is not installed; the message says how to install it.
    """
    matplotlib = require("matplotlib", "matplotlib", extra="report", needed_by="drawing a picture")
    matplotlib.use("Agg")
    return require("matplotlib.pyplot", "matplotlib", extra="report")


def why_no_pictures() -> str | None:
    """Return why nothing can be drawn here, as the end of a sentence; None where pictures can be drawn.

    A run asks before it draws: a library that is missing leaves out a picture, and never ends a training.
    """
    try:
        pyplot()
    except MissingLibraryError as error:
        return str(error)
    return None


@contextmanager
def figure(path: Path, *, size: tuple[float, float] = (8, 5), dpi: int = 120) -> Iterator[Any]:
    """Yield axes of a figure of `size` inches, which is written to `path` when the block ends."""
    plt = pyplot()
    drawn, axes = plt.subplots(figsize=size, layout="constrained")
    try:
        yield axes
        drawn.savefig(path, dpi=dpi)
    finally:
        plt.close(drawn)


def legend_beside(axes: Any) -> None:
    """Put the legend to the right of the axes, where it covers nothing; one entry alone needs none."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def draw_lines(
    path: Path,
    xs: Sequence[float],
    series: Mapping[str, Sequence[float | None]],
    *,
    xlabel: str,
    title: str,
    spread: Mapping[str, Sequence[float]] | None = None,
    ylabel: str = "accuracy",
) -> None:
    """Draw a line for each entry of `series` over xs, on a logarithmic axis.

    Args:
        xs: above 0, ascending.
        series: by label, a value for each x; None where one was not measured.
        spread: by label, half the height of a band around each value.
    """
    with figure(path) as axes:
        for name, values in series.items():
            points = [
                (x, value, spread[name][i] if spread else 0.0)
                for i, (x, value) in enumerate(zip(xs, values, strict=True))
                if value is not None
            ]
            if not points:
                continue
            places, means, widths = zip(*points, strict=True)
            line = axes.plot(places, means, marker="o" if len(points) <= _FEW_TICKS else None, label=name)[0]
            if spread is not None:
                low = [mean - width for mean, width in zip(means, widths, strict=True)]
                high = [mean + width for mean, width in zip(means, widths, strict=True)]
                axes.fill_between(places, low, high, alpha=0.2, color=line.get_color())
        axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
        if len(xs) <= _FEW_TICKS:  # beyond, matplotlib's own ticks at 1, 10, 100
            axes.set_xticks(list(xs))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.minorticks_off()
        legend_beside(axes)


def draw_bars(
    path: Path, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]], title: str
) -> None:
    """Draw groups of bars by column, a bar for each row with its value above it.

    Args:
        rows: by label, a value for each column; None where one was not measured, which leaves a gap.
    """
    with figure(path) as axes:
        width = 0.8 / max(1, len(rows))
        for place, (name, values) in enumerate(rows.items()):
            heights = [float("nan") if value is None else value for value in values]
            bars = axes.bar([x + place * width for x in range(len(columns))], heights, width, label=name)
            if len(rows) * len(columns) <= _FEW_TICKS:
                axes.bar_label(bars, ["" if v is None else f"{v:.3f}" for v in values], fontsize=8, padding=2)
        axes.set(title=title, ylabel="accuracy", xticks=[x + 0.4 - width / 2 for x in range(len(columns))])
        axes.set_xticklabels(columns)
        axes.spines[["top", "right"]].set_visible(False)
        legend_beside(axes)
