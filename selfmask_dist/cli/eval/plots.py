"""Pictures of results: lines over a number, and bars by row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


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
    """One line for each entry of `series`, over xs on a logarithmic axis; `spread` as a band around it."""
    figure, axes, close = _figure()
    for name, values in series.items():
        points = [(x, value) for x, value in zip(xs, values, strict=True) if value is not None]
        if not points:
            continue
        line = axes.plot(*zip(*points, strict=True), marker="o", label=name)[0]
        if spread is not None:
            low = [value - width for (_, value), width in zip(points, spread[name], strict=False)]
            high = [value + width for (_, value), width in zip(points, spread[name], strict=False)]
            axes.fill_between([x for x, _ in points], low, high, alpha=0.2, color=line.get_color())
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel, title=title, xticks=list(xs))
    axes.set_xticklabels([f"{x:g}" for x in xs])
    axes.minorticks_off()
    axes.legend()
    close(figure, path)


def draw_bars(
    path: Path, columns: Sequence[str], rows: Mapping[str, Sequence[float | None]], title: str
) -> None:
    """Groups of bars by column, one bar for each row."""
    figure, axes, close = _figure()
    width = 0.8 / max(1, len(rows))
    for place, (name, values) in enumerate(rows.items()):
        heights = [value if value is not None else 0.0 for value in values]
        axes.bar([x + place * width for x in range(len(columns))], heights, width, label=name)
    axes.set(title=title, xticks=[x + 0.4 - width / 2 for x in range(len(columns))])
    axes.set_xticklabels(columns)
    axes.legend()
    close(figure, path)


def _figure() -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")

    def close(figure: Any, path: Path) -> None:
        figure.savefig(path, dpi=120)
        plt.close(figure)

    return figure, axes, close
