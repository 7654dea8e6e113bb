"""Pictures of what masks say: shares by layer, similarities and their dendrogram.

All pictures of shares by layer in the package are drawn by `draw_shares`: of the masks in files, of an
exported mask, of a cascade and of the demo. Long lists of layers get smaller labels, and then a label only
for every second, third, ... layer, so that labels never overlap.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfmask_dist.common.files import replacing
from selfmask_dist.common.plots import legend_beside, pyplot
from selfmask_dist.maskfile.tools.comparison import MaskResults, matrix
from selfmask_dist.maskfile.tools.similarity import Bits, layers_of

_MAX_NUMBERS = 256  # cells up to which a heat map holds its numbers in writing
_SMALLEST, _LARGEST = 5.0, 9.0  # points of a tick label
_LINE = 1.3  # height of a line of text, in units of its size
_INCHES_PER_LAYER = 0.17
_MAX_INCHES = 22.0  # of a picture's height


def pruned_shares(bits: Bits) -> dict[str, float]:
    """Return the share of pruned weights, 0 to 1, of each parameter that is no bias."""
    return {layer.name: layer.share for layer in layers_of(bits) if layer.kind != "bias"}


def draw_shares(axes: Any, shares: Mapping[str, Mapping[str, float]], *, title: str) -> None:
    """Draw a share for each layer, the first layer on top: bars for one mask, a heat map for several.

    Args:
        axes: matplotlib's.
        shares: 0 to 1, {mask: {layer: share}}; a layer that a mask lacks stays empty.
    """
    layers = list(dict.fromkeys(name for column in shares.values() for name in column))
    percent = 100 * np.array([[column.get(name, np.nan) for column in shares.values()] for name in layers])
    axes.set_title(title)
    if len(shares) == 1:
        axes.barh(range(len(layers)), percent[:, 0])
        axes.set(ylim=(len(layers) - 0.4, -0.6), xlabel="% of the layer")
        axes.spines[["top", "right"]].set_visible(False)
    else:
        image = axes.imshow(percent, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
        axes.set_xticks(range(len(shares)), list(shares), rotation=30, ha="right", rotation_mode="anchor")
        _write_numbers(axes, [[f"{value:.3g}" for value in row] for row in percent], percent)
        axes.figure.colorbar(image, ax=axes, label="% of the layer", shrink=0.6)
    _label_rows(axes, [name.removesuffix(".weight") for name in layers])


def draw_mask(bits: Bits, path: str | Path, *, title: str) -> None:
    """Write the picture of one mask: the share of pruned weights by layer."""
    shares = pruned_shares(bits)
    figure, axes = pyplot().subplots(figsize=(8, _height(len(shares))), layout="constrained")
    draw_shares(axes, {title: shares}, title=title)
    _save(figure, path)


def draw_sparsity(results: MaskResults, path: str | Path) -> None:
    """Write the picture of what masks prune: by layer on the left, by kind of layer on the right."""
    count = len(results.masks)
    shares = {
        mask.label: {layer.name: layer.share for layer in mask.layers if layer.kind != "bias"}
        for mask in results.masks
    }
    kinds = list(dict.fromkeys(kind.name for mask in results.masks for kind in mask.kinds))
    num_layers = max(len(column) for column in shares.values())
    figure, (left, right) = pyplot().subplots(
        1,
        2,
        figsize=(9 + min(0.8 * count, 8), _height(num_layers)),
        layout="constrained",
        gridspec_kw={"width_ratios": [max(2.0, 0.5 * count), 2.5]},
    )
    draw_shares(left, shares, title="Pruned weights by layer")
    for k, mask in enumerate(results.masks):
        known = {kind.name: 100 * kind.share for kind in mask.kinds}
        places = np.arange(len(kinds)) + (k - (count - 1) / 2) * 0.8 / count
        right.barh(places, [known.get(kind, 0) for kind in kinds], 0.8 / count, label=mask.label)
    right.set(yticks=range(len(kinds)), yticklabels=kinds, xlabel="% pruned", title="By kind of layer")
    right.invert_yaxis()
    right.spines[["top", "right"]].set_visible(False)
    legend_beside(right)
    _save(figure, path)


def draw_similarity(results: MaskResults, path: str | Path) -> None:
    """Write the picture of correlations in the dendrogram's order, and of the dendrogram above them.

    Raises:
        ValueError: there is one mask only.
    """
    if results.tree is None:
        raise ValueError("similarity needs two masks; there is one")
    from scipy.cluster.hierarchy import dendrogram  # type: ignore[import-untyped]

    order = results.tree.order
    names = [mask.label for mask in results.masks]
    labels = [names[i] for i in order]
    size = float(np.clip(0.62 * len(labels), 3.4, 12))
    figure, axes = pyplot().subplots(
        2,
        2,
        figsize=(2 * size + 4.5, size + 2.6),
        layout="constrained",
        height_ratios=[1.3, size],
        squeeze=False,
    )
    panels = (("phi", "Correlation (phi) of the masks"), ("iou_pruned", "IoU of the pruned weights"))
    for (above, below), (measure, title) in zip(axes.T, panels, strict=True):
        drawn = dendrogram(np.array(results.tree.linkage), no_plot=True)
        for x, y in zip(drawn["icoord"], drawn["dcoord"], strict=True):
            above.plot(x, y, color="0.35", linewidth=1)
        above.set(xlim=(0, 10 * len(labels)), xticks=[], title=title)
        above.set_ylabel("1 - phi", fontsize=8)
        above.tick_params(labelsize=8)
        above.spines[["top", "right", "bottom"]].set_visible(False)
        values = matrix(names, results.pairs, measure)[np.ix_(order, order)]
        chance = matrix(names, results.pairs, f"{measure}_chance")[np.ix_(order, order)]
        _draw_matrix(below, values, chance, labels)
    _save(figure, path)


def _draw_matrix(axes: Any, values: np.ndarray, chance: np.ndarray, labels: list[str]) -> None:
    count = len(labels)
    shown = np.where(np.eye(count, dtype=bool), np.nan, values)  # the diagonal is 1 and says nothing
    low, high = float(np.nanmin(shown, initial=0.0)), max(float(np.nanmax(shown, initial=0.0)), 1e-3)
    image = axes.imshow(shown, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    step = _label_rows(axes, labels)
    size = axes.yaxis.get_ticklabels()[0].get_fontsize()
    places = range(0, count, step)
    axes.set_xticks(places, labels[::step], rotation=35, ha="right", rotation_mode="anchor", fontsize=size)
    pairs = zip(values, chance, strict=True)
    texts = [[f"{v:.2f}\n({c:.2f})" for v, c in zip(*rows, strict=True)] for rows in pairs]
    _write_numbers(axes, texts, shown)
    axes.figure.colorbar(image, ax=axes, shrink=0.7, label="in brackets: by chance")


def _write_numbers(axes: Any, texts: Sequence[Sequence[str]], values: np.ndarray) -> None:
    """Write a text into each cell of a heat map, unless there are too many or the cell is empty."""
    if values.size > _MAX_NUMBERS:
        return
    top = float(np.nanmax(values, initial=0.0))
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "black" if value > 0.6 * top else "white"  # viridis is bright at its upper end
            axes.text(column, row, texts[row][column], ha="center", va="center", fontsize=7, color=colour)


def _label_rows(axes: Any, names: Sequence[str]) -> int:
    """Label the rows 0, 1, ... of a picture and return that every how many rows has a label."""
    points = 0.85 * axes.get_window_extent().height * 72 / axes.figure.dpi  # titles will take some of it
    room = points / max(len(names), 1)
    step = max(1, math.ceil(_LINE * _SMALLEST / room))
    size = float(np.clip(step * room / _LINE, _SMALLEST, _LARGEST))
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=size)
    return step


def _height(num_layers: int) -> float:
    """Return the height in inches of a picture that gives each layer a line, as far as that goes."""
    return float(np.clip(1.5 + _INCHES_PER_LAYER * num_layers, 4, _MAX_INCHES))


def _save(figure: Any, path: str | Path) -> None:
    with replacing(Path(path)) as partial:
        figure.savefig(partial, dpi=110, format=Path(path).suffix.removeprefix(".") or "png")
    pyplot().close(figure)
