"""The picture of a cascade: images on a map coloured by cluster, and what each mask prunes in each layer."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from selfmask_dist.artifact import Mask

_MAX_POINTS = 2000


def draw_cascade(
    embeddings: npt.NDArray[np.float32],
    clusters: npt.NDArray[np.int64],
    masks: Mapping[str, Mask],
    path: Path,
    seed: int,
) -> None:
    """Write the picture.

    Args:
        embeddings: (n, dim), the dispatcher's; at most 2,000 at equal distances are drawn, by t-SNE.
        clusters: (n,), the router's.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = np.linspace(0, len(embeddings) - 1, min(len(embeddings), _MAX_POINTS)).round().astype(int)
    places = _map(embeddings[chosen], seed)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6), layout="constrained")
    for k in np.unique(clusters[chosen]):
        points = places[clusters[chosen] == k]
        left.scatter(*points.T, s=8, label=f"expert {k}", color=f"C{k % 10}")
    left.set(title="Test images by the expert that the router chooses (t-SNE)", xticks=[], yticks=[])
    left.legend(markerscale=2)
    names = [name for name in next(iter(masks.values())).bits if name.endswith("weight")]
    pruned = np.array(
        [[1 - float(mask.bits[name].double().mean()) for name in names] for mask in masks.values()]
    )
    image = right.imshow(pruned.T, aspect="auto", cmap="viridis", interpolation="nearest")
    right.set(
        xticks=range(len(masks)),
        xticklabels=list(masks),
        yticks=range(len(names)),
        yticklabels=[name.removesuffix(".weight") for name in names],
        title="Share of the weights that each mask prunes",
    )
    right.tick_params(axis="y", labelsize=max(3, min(9, 260 // len(names))))
    right.tick_params(axis="x", rotation=30)
    figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _map(embeddings: npt.NDArray[np.float32], seed: int) -> npt.NDArray[np.float32]:
    from sklearn.manifold import TSNE

    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    perplexity = min(30.0, max((len(unit) - 1) / 3, 1.0))
    places: npt.NDArray[np.float32] = TSNE(
        perplexity=perplexity, init="pca", random_state=seed
    ).fit_transform(unit)
    return places
