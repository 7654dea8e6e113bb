"""Instance retrieval: how many pictures are found by a mildly augmented view of themselves. Needs no labels.

    R = 1/n sum_i 1[ cos(z(view of x_i), z(x_i)) > max over j != i of cos(z(view of x_i), z(x_j)) ]

with z the encoder. Of the n pictures the queries are one view of each; they, and perhaps more, are the bank,
as evaluation sees them. It is the accuracy of instance discrimination (Wu et al. 2018, arXiv 1805.01978),
with each picture a class of its own, or recall at 1 of retrieval. Whether an adapted encoder is better than
the frozen one is read from the difference of R on the same pictures and views. A tie is a miss, so that a
collapsed encoder, which gives every picture one embedding, has R = 0. Knows neither models nor files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import Crops, Distortion, Transform, multicrop_transform
from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.ranks import Alone, Ranks
from selfmask_dist.evals.search import search

MEASURE = "instance_retrieval"  # its name among other measures
# of the views' random numbers. Above every seed of a run: no training sees these views, and all runs are
# measured with the same ones
VIEW_SEED = 2**32
_ROUNDING = 1e-6  # of a cosine in float32: embeddings that differ by less are one embedding
_NOT_MEASURED = -1


def mild_view(pre: Preprocessing, *, flip: bool) -> Transform:
    """Return the transform to the view that has to find its picture: one crop of .35 to 1 of the area,
    mirrored or not, brightness, contrast and saturation changed by up to 30 %; neither grey nor blur.

    Args:
        flip: False where mirrored pictures mean something else.
    """
    return multicrop_transform(
        pre,
        crops=(Crops(1, pre.image_size, (0.35, 1.0)),),
        distortion=Distortion(
            flip=0.5 if flip else 0.0,
            color=1.0,
            brightness=0.3,
            contrast=0.3,
            saturation=0.3,
            hue=0.0,
            gray=0.0,
            blur=0.0,
        ),
        interpolation="bicubic" if pre.interpolation == "bicubic" else "bilinear",
    )


def find_own(clean: Embeddings, views: Embeddings, ranks: Ranks | None = None) -> list[bool]:
    """Return, for each picture of all ranks in the order of ids, whether its view finds it first.

    The list is the same on every rank. Collective if `ranks` is.

    Args:
        clean: this rank's pictures, the bank. views: embeddings of a view of each of them, or of some, by the
            same ids.

    Raises:
        ValueError: there are fewer than two pictures.
    """
    ranks = ranks or Alone()
    similarities, ids = search(
        clean.features, views.features, k=2, bank_ids=clean.ids, query_ids=None, ranks=ranks
    )
    margin = similarities[:, 0] - similarities[:, 1]
    hits = (ids[:, 0] == views.ids) & (margin > _ROUNDING)
    return _gather(hits, views.ids, ranks)


def _gather(hits: Tensor, ids: Tensor, ranks: Ranks) -> list[bool]:
    """Return all ranks' hits in the order of ids, which need not be without gaps."""
    longest = torch.zeros(ranks.size, dtype=torch.int64, device=ids.device)
    longest[ranks.rank] = ids.max() + 1 if len(ids) else 0
    table = torch.zeros(int(ranks.sum(longest).max()), dtype=torch.int64, device=ids.device)
    table[ids] = hits.long() - _NOT_MEASURED
    found = ranks.sum(table) + _NOT_MEASURED
    return [bool(hit) for hit in found.tolist() if hit != _NOT_MEASURED]


@dataclass(frozen=True)
class Comparison:
    """Instance retrieval of two encoders on the same pictures and views.

    before, after: shares in [0, 1]. difference: after - before. standard_error: of the difference, paired.
    """

    before: float
    after: float
    difference: float
    standard_error: float


def compare(before: Sequence[bool], after: Sequence[bool]) -> Comparison:
    """Return how two encoders' hits on the same pictures differ:

        d_i = after_i - before_i      standard error = sqrt(sum (d_i - mean d)^2 / (n (n - 1)))

    Raises:
        ValueError: they are of different numbers of pictures.
    """
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(
            f"instance retrieval is compared on the same pictures, two or more; got {len(before)} and "
            f"{len(after)}"
        )
    number = len(before)
    differences = [int(late) - int(early) for early, late in zip(before, after, strict=True)]
    mean = sum(differences) / number
    squares = sum((difference - mean) ** 2 for difference in differences)
    return Comparison(
        sum(before) / number, sum(after) / number, mean, math.sqrt(squares / (number * (number - 1)))
    )
