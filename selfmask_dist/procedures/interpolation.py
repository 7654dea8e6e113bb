"""Masks on the way from one run's to another's, by the scores that the runs' checkpoints still have.

    M_t = 1[(1 - t) S_a + t S_b > (1 - t) mu_a + t mu_b]        t from 0 to 1

At 0 and 1 these are the two runs' masks, bit for bit. Between two masks alone there is no such way: bits say
nothing of how close a weight was to the threshold. Knows nothing of backbones or configurations.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from selfmask_dist.backbones import weights
from selfmask_dist.common.names import MASK
from selfmask_dist.maskfile import Mask, MaskFile, read_mask_file
from selfmask_dist.maskfile.tools.arithmetic import check_same_backbone
from selfmask_dist.masking import binarize
from selfmask_dist.training.saving import open_last_checkpoint

_SCORES = "parameters/encoder."  # where a checkpoint has the encoder's (`state`, `parallel.engine`)


@dataclass(frozen=True)
class ScoredMask:
    """A mask and the scores it was made from, by parameter; `file` says where it comes from."""

    mask: Mask
    scores: dict[str, Tensor]
    file: MaskFile


def read_scored_mask(run: Path) -> ScoredMask:
    """Return the mask and the scores of a finished run's folder.

    Raises:
        FileNotFoundError: it has no final.mask.
        ValueError: it has no valid checkpoint, or the newest does not have the scores of that mask.
    """
    path = run / MASK
    if not path.exists():
        raise FileNotFoundError(f"{run} holds no {MASK}: give folders of finished runs that learned a mask")
    file = read_mask_file(path)
    mask = next(iter(file.masks.values()))
    if mask.kind != "threshold":
        raise ValueError(
            f"{path} is of kind {mask.kind}, whose weights are more than kept or not: scores alone do not "
            "lead from one to another"
        )
    checkpoint = open_last_checkpoint(run)
    scores = {
        key.removeprefix(_SCORES): checkpoint.read(key)
        for key in checkpoint.shapes
        if key.startswith(_SCORES) and key.removeprefix(_SCORES) in mask.bits
    }
    for name, bits in mask.bits.items():
        if name not in scores or not torch.equal(binarize(scores[name], mask.threshold), bits):
            raise ValueError(
                f"{checkpoint.path} does not have the scores of {path}: they differ at {name}; the newest "
                f"checkpoint must be of the run's last step, and its mask one of scores above a threshold"
            )
    return ScoredMask(mask, scores, file)


def interpolate(first: ScoredMask, second: ScoredMask, at: float) -> Mask:
    """Return the mask at `at` of the way from the first to the second, with running statistics in between.

    Raises:
        MaskFileError: the masks are of different weights or scales.
        ValueError: `at` is not from 0 to 1, or only one of the runs moved running statistics.
    """
    if not 0 <= at <= 1:
        raise ValueError(f"there is a way from 0 to 1 between two masks, and {at:g} is not on it")
    a, b = first.mask, second.mask
    check_same_backbone([a, b])
    if a.statistics.keys() != b.statistics.keys():
        raise ValueError("only one of the runs moved running statistics: what lies between is not defined")
    threshold = (1 - at) * a.threshold + at * b.threshold
    of_first, of_second = ({name: end.scores[name] for name in a.bits} for end in (first, second))
    between = weights.interpolate(of_first, of_second, at)
    return Mask(
        {name: binarize(scores, threshold) for name, scores in between.items()},
        a.weights_fingerprint,
        scaled=a.scaled,
        num_segments=dict(a.num_segments),
        statistics=weights.interpolate(a.statistics, b.statistics, at),
        threshold=threshold,
    )
