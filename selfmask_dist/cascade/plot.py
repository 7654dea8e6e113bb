"""The picture of a cascade: images on a map coloured by cluster, what each mask prunes in each layer, and in
how many weights each expert differs from the dispatcher."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from selfmask_dist.maskfile import Mask

_MAX_POINTS = 2000


def draw_cascade(
    components: npt.NDArray[np.float64],
    clusters: npt.NDArray[np.int64],
    masks: Mapping[str, Mask],
    path: Path,
    seed: int,
) -> None:
    """Write the picture.

    Args:
        components: (n, components), what the router clusters; at most 2,000 at equal distances are drawn, by
            t-SNE.
        clusters: (n,), the router's.
        masks: the dispatcher's first.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = np.linspace(0, len(components) - 1, min(len(components), _MAX_POINTS)).round().astype(int)
    places = _map(components[chosen], seed)
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(16, 6), layout="constrained", width_ratios=(1.2, 1, 1)
    )
    size = float(np.clip(6000 / len(chosen), 6, 30))
    for k in np.unique(clusters):
        points = places[clusters[chosen] == k]
        label = f"expert {k}: {np.mean(clusters == k):.0%}"
        left.scatter(*points.T, s=size, label=label, color=f"C{k % 10}", linewidths=0)
    left.set(title="Test images by the expert that the router chooses\n(t-SNE of the router's components)")
    left.set(xticks=[], yticks=[])
    left.legend(
        loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False, markerscale=(40 / size) ** 0.5
    )
    first = next(iter(masks.values()))
    layers = [name for name in first.bits if name.endswith("weight")]
    pruned = [[1 - float(mask.bits[name].double().mean()) for mask in masks.values()] for name in layers]
    changed = [
        [float((mask.bits[name] != first.bits[name]).double().mean()) for mask in list(masks.values())[1:]]
        for name in layers
    ]
    rows = [name.removesuffix(".weight") for name in layers]
    _draw_shares(middle, pruned, rows, list(masks), "Weights that the mask prunes")
    _draw_shares(right, changed, rows, list(masks)[1:], "Weights that differ from the dispatcher's")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_shares(
    axes: Any, values: list[list[float]], rows: list[str], columns: list[str], title: str
) -> None:
    """Layers by masks, in percent; each cell with its number where there is room."""
    percent = 100 * np.array(values)
    image = axes.imshow(percent, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    axes.set(title=title, xticks=range(len(columns)), xticklabels=columns)
    axes.set(yticks=range(len(rows)), yticklabels=rows)
    axes.tick_params(axis="y", labelsize=max(3, min(9, 260 // len(rows))))
    axes.tick_params(axis="x", rotation=30)
    if percent.size <= 160:
        for (row, column), value in np.ndenumerate(percent):
            is_bright = value > 0.6 * percent.max()
            colour = "black" if is_bright else "white"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=colour)
    axes.figure.colorbar(image, ax=axes, format="%g %%")


def _map(components: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float32]:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max((len(components) - 1) / 3, 1.0))
    places: npt.NDArray[np.float32] = TSNE(
        perplexity=perplexity, init="pca", random_state=seed
    ).fit_transform(components)
    return places
