"""Pictures of what masks say: sparsity by layer, and the matrix of similarities with its dendrogram."""

from pathlib import Path
from typing import Any

import numpy as np

from selfmask_dist.maskfile.tools.comparison import MaskResults, matrix

_MAX_NUMBERS = 16  # masks up to which a matrix holds its numbers in writing


def draw_sparsity(results: MaskResults, path: str | Path) -> None:
    """Write the picture: layers from top to bottom, a column for each mask; beside it, kinds of layers."""
    plt = _pyplot()
    names = [layer.name for layer in results.masks[0].layers if layer.kind != "bias"]
    rows = [{layer.name: layer.share for layer in mask.layers} for mask in results.masks]
    shares = np.array([[row.get(name, np.nan) for row in rows] for name in names])
    kinds = list(dict.fromkeys(kind.name for mask in results.masks for kind in mask.kinds))
    count, labels = len(results.masks), [mask.label for mask in results.masks]
    height = float(np.clip(0.2 * len(names) + 1.5, 4, 14))
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(8 + min(0.8 * count, 8), height),
        layout="constrained",
        gridspec_kw={"width_ratios": [max(1.5, 0.5 * count), 2.5]},
    )
    image = left.imshow(100 * shares, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    left.set(
        xticks=range(count),
        yticks=range(len(names)),
        yticklabels=[name.removesuffix(".weight") for name in names],
        title="Pruned weights by layer",
    )
    left.set_xticks(range(count), labels, rotation=30, ha="right", rotation_mode="anchor")
    left.tick_params(axis="y", labelsize=float(np.clip(72 * 0.7 * height / max(len(names), 1), 4, 9)))
    figure.colorbar(image, ax=left, label="% of the layer", shrink=0.6)
    for k, mask in enumerate(results.masks):
        known = {kind.name: 100 * kind.share for kind in mask.kinds}
        places = np.arange(len(kinds)) + (k - (count - 1) / 2) * 0.8 / count
        right.barh(places, [known.get(kind, 0) for kind in kinds], 0.8 / count, label=mask.label)
    right.set(yticks=range(len(kinds)), yticklabels=kinds, xlabel="% pruned", title="By kind of layer")
    right.invert_yaxis()
    right.spines[["top", "right"]].set_visible(False)
    if count > 1:
        right.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_similarity(results: MaskResults, path: str | Path) -> None:
    """Write the picture: correlations in the dendrogram's order, and the dendrogram above them.

    Raises:
        ValueError: there is one mask only.
    """
    if results.tree is None:
        raise ValueError("similarity needs two masks; there is one")
    from scipy.cluster.hierarchy import dendrogram  # type: ignore[import-untyped]

    plt = _pyplot()
    order = results.tree.order
    names = [mask.label for mask in results.masks]
    labels = [names[i] for i in order]
    size = float(np.clip(0.62 * len(labels), 3.4, 12))
    figure, axes = plt.subplots(
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
        _draw_matrix(figure, below, values, chance, labels)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_matrix(figure: Any, axes: Any, values: np.ndarray, chance: np.ndarray, labels: list[str]) -> None:
    count = len(labels)
    apart = values[~np.eye(count, dtype=bool)]
    top = max(float(np.nanmax(apart, initial=0.0)), 1e-3)  # the diagonal is 1 and says nothing
    shown = np.where(np.eye(count, dtype=bool), np.nan, values)
    image = axes.imshow(
        shown, aspect="auto", cmap="viridis", vmin=min(0.0, float(np.nanmin(apart, initial=0.0))), vmax=top
    )
    axes.set_xticks(range(count), labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), labels)
    axes.tick_params(labelsize=8)
    if count <= _MAX_NUMBERS:
        for i in range(count):
            for j in range(count):
                if i != j and np.isfinite(values[i, j]):
                    colour = "white" if values[i, j] < 0.6 * top else "black"
                    text = f"{values[i, j]:.2f}\n({chance[i, j]:.2f})"
                    axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.7, label="in brackets: by chance")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
