"""The picture of a cascade: images on a map coloured by cluster, what each mask prunes in each layer, and in
how many weights each expert differs from the dispatcher."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from selfmask_dist.common.plots import pyplot
from selfmask_dist.maskfile.rows import StoredMask
from selfmask_dist.maskfile.tools.pictures import draw_shares, pruned_shares
from selfmask_dist.maskfile.tools.similarity import Bits, changes

_MAX_POINTS = 2000


def draw_cascade(
    components: npt.NDArray[np.float64],
    clusters: npt.NDArray[np.int64],
    masks: Mapping[str, StoredMask],
    path: Path,
    seed: int,
) -> None:
    """Write the picture.

    Args:
        components: (n, components), what the router clusters; at most 2,000 at equal distances are drawn, by
            t-SNE.
        clusters: (n,), the router's.
        masks: the dispatcher's first; decoded one parameter at a time.
    """
    plt = pyplot()
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
    pruned = {name: _shares(part.bits for part in mask) for name, mask in masks.items()}
    changed = {
        name: _shares(changes(part.bits, base.bits) for part, base in zip(mask, first, strict=True))
        for name, mask in masks.items()
        if mask is not first
    }
    draw_shares(middle, pruned, title="Weights that the mask prunes")
    if changed:
        draw_shares(right, changed, title="Weights that differ from the dispatcher's")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _shares(parts: Iterable[Bits]) -> dict[str, float]:
    """Return the share of pruned weights by parameter, of bits that come one parameter after the other."""
    return {name: share for bits in parts for name, share in pruned_shares(bits).items()}


def _map(components: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float32]:
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max((len(components) - 1) / 3, 1.0))
    places: npt.NDArray[np.float32] = TSNE(
        perplexity=perplexity, init="pca", random_state=seed
    ).fit_transform(components)
    return places
