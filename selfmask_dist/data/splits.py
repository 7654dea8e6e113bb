"""What a training and a test source have in common and should not, or lack and should have.

Knows sources by their labels and checksums, and reads no picture. For callers to say before anything trains.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from selfmask_dist.common.text import some
from selfmask_dist.data.source import Source, TarSource
from selfmask_dist.data.subset import Subset

_ROWS = 1 << 20  # labels that are counted together


def count_labels(source: Source) -> npt.NDArray[np.int64]:
    """Return how many samples have no label, and after that how many have each label, (1 + classes,) int64.

    Looks through the labels a part at a time. Labels beyond the named classes have entries too.
    """
    counts = np.zeros(1 + len(source.classes), dtype=np.int64)
    for start in range(0, len(source), _ROWS):
        found = np.bincount(source.labels_of(slice(start, start + _ROWS)) + 1, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return counts


def untrained_classes(train: Source, test: Source) -> tuple[str, ...]:
    """Return the names of the classes that have test samples and no training sample, in order.

    Both sources must number one list of classes. A probe or a k-NN can never answer these classes.
    """
    size = max(len(train.classes), len(test.classes))
    counts = np.zeros((2, size), dtype=np.int64)
    for row, source in zip(counts, (train, test), strict=True):
        found = count_labels(source)[1 : 1 + size]
        row[: len(found)] = found
    names = test.classes if len(test.classes) >= len(train.classes) else train.classes
    return tuple(names[place] for place in np.flatnonzero((counts[1] > 0) & (counts[0] == 0)))


def shared_samples(train: Source, test: Source) -> npt.NDArray[np.int64]:
    """Return the numbers of the test samples whose bytes are those of a training sample, (found,) int64.

    Bytes are compared by length and crc32; none are found where a source has no saved index with checksums.
    """
    ours, theirs = _contents(train), _contents(test)
    if ours is None or theirs is None:
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(np.isin(theirs, ours))


def notes_on_splits(train: Source, test: Source) -> list[str]:
    """Return sentences for a person on what is wrong between the splits; nothing where all is well.

    A test source that is the training source, sample for sample, is taken to be meant and gives no note on
    shared pictures.
    """
    notes = []
    untrained = untrained_classes(train, test)
    if untrained:
        places = {name: place for place, name in enumerate(test.classes)}
        affected = int(np.isin(test.labels, [places[name] for name in untrained]).sum())
        notes.append(
            f"{len(untrained)} of {len(test.classes)} classes, with {affected} of {len(test)} test images,"
            f" have no training image: {some(untrained)}. Are their names written in another way there?"
        )
    if train.identity == test.identity:
        return notes
    shared = shared_samples(train, test)
    if len(shared):
        named = some([test.where(int(place)) for place in shared[:6]])
        notes.append(
            f"{len(shared)} of {len(test)} test images are training images too, byte for byte: {named}"
        )
    return notes


def _contents(source: Source) -> npt.NDArray[np.uint64] | None:
    """Return a number for the bytes of each sample; None where nothing is known of them."""
    if isinstance(source, Subset):
        whole = _contents(source.source)
        return None if whole is None else whole[source.indices]
    if not isinstance(source, TarSource) or not source.index.has_crc32:
        return None
    return source.index.length.astype(np.uint64) << np.uint64(32) | source.index.crc32.astype(np.uint64)
