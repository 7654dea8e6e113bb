"""What masks of one backbone say: sparsity by layer and kind of layer, and how alike masks are.

With A and B the sets of weights that two masks prune (or keep), and the bits as numbers,

    IoU = |A n B| / |A u B|       phi = correlation of the bits       agreement: how many prune a weight

Each stands beside what chance gives: masks that prune as many weights in every layer, and are otherwise
unrelated. With n weights in a layer of which the masks prune a and b, the overlap is then hypergeometric:

    E |A n B| = sum a b / n        Var |A n B| = sum a b (n - a) (n - b) / (n^2 (n - 1))

Masks that merely prune the same layers are no more alike than chance. Pure functions on boolean tensors;
knows nothing of files or models.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

Bits = Mapping[str, Tensor]  # {parameter name: bool tensor of its shape}, true where a weight is kept

_KINDS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("bias", r"bias$"),
        ("norm", r"(^|\.)(norm|bn|ln)[^.]*\.weight$"),
        ("attention qkv", r"attn\.(qkv|in_proj|[qkv](_proj)?)[._]"),
        ("attention out", r"attn\.(out_)?proj\."),
        ("mlp in", r"mlp\.(fc1|c_fc)\."),
        ("mlp out", r"mlp\.(fc2|c_proj)\."),
    )
)


@dataclass(frozen=True)
class Pruned:
    """How many of `weights` weights are pruned; `share` is 0 ... 1."""

    name: str
    weights: int
    pruned: int

    @property
    def share(self) -> float:
        """Return pruned / weights, 0 where there are no weights."""
        return self.pruned / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class PrunedLayer(Pruned):
    """A parameter under a mask."""

    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Similarity:
    """Two masks; a value is None where it is not defined, as the IoU of two empty sets.

    `*_chance`: the value at the overlap that chance gives in layers of the same sparsity. `sigmas`: how many
    standard deviations the overlap of the pruned weights lies above that.
    """

    weights: int
    both_pruned: int
    both_pruned_chance: float
    sigmas: float | None
    iou_pruned: float | None
    iou_pruned_chance: float | None
    iou_kept: float | None
    iou_kept_chance: float | None
    phi: float | None
    phi_chance: float | None


@dataclass(frozen=True)
class Agreement:
    """`counts[k]`: weights that exactly k of the masks prune; `chance[k]`: expected of unrelated masks."""

    counts: list[int]
    chance: list[float]

    @property
    def unanimous(self) -> float | None:
        """Return the share that all masks prune, of the weights that some mask prunes."""
        some = sum(self.counts[1:])
        return self.counts[-1] / some if some else None

    @property
    def unanimous_chance(self) -> float | None:
        """Return what `unanimous` would be of unrelated masks."""
        some = sum(self.chance[1:])
        return self.chance[-1] / some if some else None


@dataclass(frozen=True)
class Tree:
    """Average linkage over the distance 1 - phi.

    `linkage`: scipy's rows [cluster, cluster, distance, size]; `order`: masks from left to right.
    """

    linkage: list[list[float]]
    order: list[int]


def kind_of(name: str, shape: Sequence[int]) -> str:
    """Return the kind of layer of a parameter, by its name (as timm and open_clip have it) and shape."""
    for kind, pattern in _KINDS:
        if pattern.search(name):
            return kind
    if len(shape) < 2:
        return "norm"  # timm's downsample.1 and the like: no other weights have one dimension
    if len(shape) > 2:
        return "downsample" if "downsample" in name else "conv"
    return "linear"


def layers_of(bits: Bits) -> list[PrunedLayer]:
    """Return every parameter's sparsity, in the mask's order."""
    return [
        PrunedLayer(
            name, mask.numel(), mask.numel() - int(mask.sum()), kind_of(name, mask.shape), tuple(mask.shape)
        )
        for name, mask in bits.items()
    ]


def kinds_of(layers: Sequence[PrunedLayer]) -> list[Pruned]:
    """Return the sparsity by kind of layer, in the order in which the kinds appear."""
    kinds = dict.fromkeys(layer.kind for layer in layers)
    return [total([layer for layer in layers if layer.kind == kind], kind) for kind in kinds]


def total(layers: Sequence[Pruned], name: str = "") -> Pruned:
    """Return the sums over layers, under a name."""
    return Pruned(name, sum(layer.weights for layer in layers), sum(layer.pruned for layer in layers))


def compare(a: Bits, b: Bits) -> Similarity:
    """Return how alike two masks over the same parameters are.

    Raises:
        ValueError: a parameter is in one of them only, or differs in shape.
    """
    check_same_parameters(a, b)
    rows = []
    for name in a:
        left, right = (~a[name]).numpy(), (~b[name]).numpy()
        counted = (np.count_nonzero(left), np.count_nonzero(right), np.count_nonzero(left & right))
        rows.append((left.size, *counted))
    n, pruned_a, pruned_b, both = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    size, count_a, count_b, overlap = float(n.sum()), pruned_a.sum(), pruned_b.sum(), float(both.sum())
    n = np.maximum(n, 1)
    expected = float((pruned_a * pruned_b / n).sum())
    spread = pruned_a * pruned_b * (n - pruned_a) * (n - pruned_b) / (n**2 * np.maximum(n - 1, 1))
    deviation = math.sqrt(float(spread.sum()))

    def values(shared: float) -> tuple[float | None, float | None, float | None]:
        union = count_a + count_b - shared
        kept = size - union
        scale = math.sqrt(count_a * (size - count_a) * count_b * (size - count_b))
        covariance = size * shared - count_a * count_b
        return _ratio(shared, union), _ratio(kept, size - shared), _ratio(covariance, scale)

    iou_pruned, iou_kept, phi = values(overlap)
    iou_pruned_chance, iou_kept_chance, phi_chance = values(expected)
    return Similarity(
        weights=int(size),
        both_pruned=int(overlap),
        both_pruned_chance=expected,
        sigmas=_ratio(overlap - expected, deviation),
        iou_pruned=iou_pruned,
        iou_pruned_chance=iou_pruned_chance,
        iou_kept=iou_kept,
        iou_kept_chance=iou_kept_chance,
        phi=phi,
        phi_chance=phi_chance,
    )


def agreement(masks: Sequence[Bits]) -> Agreement:
    """Return how many of several masks prune the same weight. Errors as in `compare`."""
    counts = np.zeros(len(masks) + 1, dtype=np.int64)
    chance = np.zeros(len(masks) + 1)
    for mask in masks[1:]:
        check_same_parameters(masks[0], mask)
    for name, first in masks[0].items():
        votes = np.zeros(tuple(first.shape), dtype=np.int16)
        unrelated = np.ones(1)  # distribution of the number of masks that prune one weight of this layer
        for mask in masks:
            pruned = (~mask[name]).numpy()
            votes += pruned
            share = float(pruned.mean()) if pruned.size else 0.0
            unrelated = np.convolve(unrelated, [1 - share, share])
        counts += np.bincount(votes.ravel(), minlength=len(counts))
        chance += first.numel() * unrelated
    return Agreement(counts.tolist(), chance.tolist())


def changes(mask: Bits, before: Bits) -> dict[str, Tensor]:
    """Return a mask of what differs from an earlier mask: its `pruned` weights are those that changed."""
    check_same_parameters(mask, before)
    return {name: ~(bits ^ before[name]) for name, bits in mask.items()}


def tree_of(phi: npt.NDArray[np.float64]) -> Tree | None:
    """Return the dendrogram of masks by their correlations (n, n), NaN: none; None for a single mask."""
    from scipy.cluster.hierarchy import leaves_list, linkage  # type: ignore[import-untyped]
    from scipy.spatial.distance import squareform  # type: ignore[import-untyped]

    if len(phi) < 2:
        return None
    distance = 1 - np.nan_to_num(phi, nan=0.0)
    np.fill_diagonal(distance, 0.0)
    rows = linkage(squareform(np.maximum(distance, 0.0), checks=False), "average", optimal_ordering=True)
    return Tree(rows.tolist(), leaves_list(rows).tolist())


def check_same_parameters(a: Bits, b: Bits) -> None:
    """Raise a ValueError where two masks are not over the same parameters."""
    apart = sorted(set(a) ^ set(b))
    if apart:
        raise ValueError(f"{len(apart)} parameters are in one mask only: {', '.join(apart[:3])}")
    for name, bits in a.items():
        if bits.shape != b[name].shape:
            raise ValueError(
                f"{name} is {tuple(bits.shape)} in one mask and {tuple(b[name].shape)} in another"
            )


def _ratio(above: float, below: float) -> float | None:
    return float(above / below) if below > 0 else None
