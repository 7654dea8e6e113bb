"""Which sample goes where, and with which randomness: pure functions of (seed, epoch) without state to save.

Knows neither files nor tensors. Philox is a counter-based generator, so every stream is an address,

    key = (seed, epoch), counter = (0, 0, purpose, sample),

and no stream depends on the number of ranks or workers. An epoch's order pi: blocks of neighbouring samples
are permuted, the result is cut into C canonical streams, each stream is shuffled within windows, and the
streams are dealt out in turn. The global batch of step t is pi[tG : (t+1)G], with G/C samples of each stream,
the same at any world size; rank r of W takes its rows r, r+W, r+2W, ..., which are C/W streams. Reads so stay
within few blocks at a time. A rank makes the windows of its streams as it comes to them (`EpochOrder`), and a
resume makes the one that it stands in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

# the third counter word: streams of different purposes never meet
_ORDER, _AUGMENTATION, _MIXING = 0, 1, 2
_BLOCK, _MIN_BLOCKS = 256, 1024  # samples in a block of a large data set; blocks in a small one
_WINDOW = 4096  # samples of a stream that are shuffled together; a power of two


class Order(Protocol):
    """Numbers of samples by their places in an epoch; an array of them is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, places: Ids, /) -> Ids: ...


@dataclass(frozen=True)
class RankBatch:
    """One rank's rows of one global batch.

    ids: (rows,) int64, sample indices in the source; a padding row repeats a sample of the same batch, so
        that batch statistics meet no foreign pixels.
    weights: (rows,) float32, 1 for a sample and 0 for padding.
    global_count: samples in the global batch over all ranks, padding not counted.
    """

    ids: Ids
    weights: npt.NDArray[np.float32]
    global_count: int
    epoch: int  # addresses the augmentations
    partners: Ids | None = None  # (rows,) the samples that rows are mixed with, where they were asked for


class EpochOrder:
    """A permutation of 0..num_samples-1 for an epoch, of which only the windows in use are ever made.

    Small data sets have small blocks, down to single samples, and are shuffled as a whole; a million samples
    have blocks of 256. What G leaves over at the end of the epoch comes last.
    Sorts Philox's raw words, whose stream numpy guarantees for ever; `Generator.permutation` may change.

    It holds 8 bytes a block (3 MB for 100 million samples) and two windows of the streams (4 MB at most).
    Indexing takes places in the order, (n,), and gives sample numbers, (n,) int64.
    """

    def __init__(self, num_samples: int, *, seed: int, epoch: int, global_batch_size: int = 1) -> None:
        self._num_samples, self._seed, self._epoch = num_samples, seed, epoch
        self._blocks = _PermutedBlocks(num_samples, _philox(seed, epoch, _ORDER, 0))
        self._streams = num_streams(global_batch_size)
        self._per_stream = num_samples // global_batch_size * (global_batch_size // self._streams)
        self._windows: dict[int, tuple[Ids, npt.NDArray[np.bool_]]] = {}  # rows by stream, and which are made

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, places: Ids) -> Ids:
        found = np.empty(places.shape, dtype=np.int64)
        dealt = places < self._streams * self._per_stream
        found[~dealt] = self._blocks[places[~dealt]]
        turns, streams = np.divmod(places[dealt], self._streams)
        numbers = turns // _WINDOW
        shuffled = np.empty(len(turns), dtype=np.int64)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            window = self._window(number, np.unique(streams[here]))
            shuffled[here] = window[streams[here], turns[here] % _WINDOW]
        found[dealt] = shuffled
        return found

    def _window(self, number: int, streams: Ids) -> Ids:
        """Return window `number` of all streams, (streams, window), with at least the rows asked for made."""
        if number not in self._windows:
            if len(self._windows) > 1:  # the two newest: a batch may lie across their border
                del self._windows[next(iter(self._windows))]
            shape = self._streams, min(_WINDOW, self._per_stream - number * _WINDOW)
            self._windows[number] = np.empty(shape, dtype=np.int64), np.zeros(self._streams, dtype=bool)
        window, is_made = self._windows[number]
        for stream in streams[~is_made[streams]].tolist():
            first = stream * self._per_stream + number * _WINDOW
            place = np.arange(window.shape[1], dtype=np.uint64)
            # sorted by 30 random bits, and by the place in the window where those are equal
            noise = self._words(self._blocks.num_words + first, len(place)) >> np.uint64(34)
            keys = noise << np.uint64(_WINDOW.bit_length() - 1) | place
            keys.sort()
            within = (keys & np.uint64(_WINDOW - 1)).astype(np.int64)
            window[stream] = self._blocks[first + within]
            is_made[stream] = True
        return window

    def _words(self, first: int, count: int) -> npt.NDArray[np.uint64]:
        """Return `count` words of the epoch's stream of them from word `first` on: a counter gives four."""
        words = _philox(self._seed, self._epoch, _ORDER, 0, draws=first // 4)
        raw: npt.NDArray[np.uint64] = words.random_raw(first % 4 + count)
        return raw[first % 4 :]


class SourceOrder:
    """The order of an evaluation: 0..num_samples-1, without an array of them."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, places: Ids) -> Ids:
        return places.astype(np.int64, copy=False)


def epoch_order(num_samples: int, *, seed: int, epoch: int, global_batch_size: int = 1) -> Ids:
    """Return the whole of an `EpochOrder`, of shape (num_samples,): 8 bytes a sample."""
    order = EpochOrder(num_samples, seed=seed, epoch=epoch, global_batch_size=global_batch_size)
    step = num_streams(global_batch_size) * _WINDOW  # one window of each stream
    parts = [order[np.arange(start, min(start + step, num_samples))] for start in range(0, num_samples, step)]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def num_streams(global_batch_size: int) -> int:
    """Return C, the largest divisor of the global batch up to 64: a function of the batch, not of ranks."""
    return max(c for c in range(1, min(64, global_batch_size) + 1) if global_batch_size % c == 0)


class _PermutedBlocks:
    """All samples with the blocks in random order, and neighbours within a block still together.

    num_words: that were drawn for it.
    """

    def __init__(self, num_samples: int, words: np.random.Philox) -> None:
        self._length = min(_BLOCK, max(1, num_samples // _MIN_BLOCKS))
        self.num_words = -(-num_samples // self._length)
        shuffled = np.argsort(words.random_raw(self.num_words), kind="stable")
        self._starts = shuffled.astype(np.int64, copy=False) * self._length
        self._lacking = -num_samples % self._length  # samples that the last block is short of
        # where the last block ends in the new order: what comes after it has moved forward by these
        last = int(np.flatnonzero(shuffled == self.num_words - 1)[0]) if self.num_words else 0
        self._short_end = (last + 1) * self._length - self._lacking

    def __getitem__(self, places: Ids) -> Ids:
        places = places + self._lacking * (places >= self._short_end)
        found: Ids = self._starts[places // self._length] + places % self._length
        return found


def sample_generator(*, seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Return the generator of one sample's augmentation in one epoch; takes about 10 us."""
    return np.random.Generator(_philox(seed, epoch, _AUGMENTATION, sample))


def mixing_generator(*, seed: int, epoch: int, sample: int) -> np.random.Generator:
    """Return the generator of how one sample is mixed with its partner in one epoch."""
    return np.random.Generator(_philox(seed, epoch, _MIXING, sample))


def partner_distance(count: int) -> int:
    """Return how many rows lie between partners in a global batch of `count`: the partner of row i is row
    i + it, counted around.

    The largest power of two that divides the batch, up to half of it: where that is a multiple of the number
    of ranks, as it mostly is, a rank has its rows' partners itself and reads nothing twice.
    """
    return min(count & -count, max(count // 2, 1))


def num_steps(num_samples: int, *, global_batch_size: int) -> int:
    """Return the number of global batches in an epoch; the last one may be smaller."""
    return -(-num_samples // global_batch_size)


def rank_batch(
    order: Order,
    step: int,
    *,
    epoch: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    with_partners: bool = False,
) -> RankBatch:
    """Return the rows of `rank` in the global batch of `step`.

    order: of the epoch, or `SourceOrder` for an evaluation.
    A smaller last batch is padded to equal rows on all ranks, and no further: one rank alone never pads.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    first = step * global_batch_size
    count = min(global_batch_size, len(order) - first)
    assert count > 0, (step, global_batch_size, len(order))
    rows = np.arange(rank, world_size * -(-count // world_size), world_size)
    partners = order[first + (rows + partner_distance(count)) % count] if with_partners else None
    return RankBatch(
        ids=order[first + rows % count],
        partners=partners,
        weights=(rows < count).astype(np.float32),
        global_count=count,
        epoch=epoch,
    )


def _philox(seed: int, epoch: int, purpose: int, sample: int, *, draws: int = 0) -> np.random.Philox:
    """Return the generator at an address, after `draws` counters of four words each."""
    # the draws advance the lowest counter words, so two samples' streams are 2^128 draws apart
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=np.array([draws, 0, purpose, sample], dtype=np.uint64))
