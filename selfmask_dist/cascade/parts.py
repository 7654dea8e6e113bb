"""The embeddings of a cascade's dispatcher and experts, read side by side from their stores and combined.

    parts = Parts.open(folders, clusters)                   # each store's folder is listed once
    Combination.fit(parts.slices(rank, world_size), ...)    # this rank's samples, chunk by chunk
    combine_to_store(combination, parts, store, ...)        # the chunks that a store lacks

Files and seconds are linear in the samples: nothing is opened or looked for again for each chunk. Also the
table of clusters, which only the main rank holds whole. Knows neither models nor a run's folder.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selfmask_dist.cascade.combine import Combination
from selfmask_dist.cascade.router import Router
from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.store import EmbeddingStore
from selfmask_dist.parallel import World

_WINDOW = 2**22  # rows of a table that travel at once
Rows = tuple[Tensor, list[Tensor], Tensor]  # as `Combination` takes them


@dataclass(frozen=True)
class Parts:
    """Complete stores of the same samples, and each sample's cluster.

    stores: the dispatcher's first, then the experts'. clusters: (samples,) of an integer type, a mapped file
    mostly; or the router, which finds them from the dispatcher's embeddings. device: where embeddings are
    combined.
    """

    stores: Sequence[EmbeddingStore]
    clusters: npt.NDArray[np.integer] | Router
    device: torch.device | str = "cpu"

    @staticmethod
    def open(folders: Sequence[Path], clusters: Path, *, device: torch.device | str = "cpu") -> "Parts":
        """Open the stores in `folders`, the dispatcher's first, and map the .npy file `clusters`.

        Raises:
            StoreError: a store lacks chunks, or is none.
        """
        stores = [EmbeddingStore.open(folder) for folder in folders]
        return Parts(stores, np.load(clusters, mmap_mode="r", allow_pickle=False), device)

    def slices(self, rank: int = 0, world_size: int = 1) -> Iterator[Rows]:
        """Yield this rank's samples, a chunk or less at a time."""
        for parts in zip(*(store.chunks(rank, world_size) for store in self.stores), strict=True):
            yield self._rows(parts)

    def chunk(self, chunk: int) -> tuple[Rows, Tensor]:
        """Return the samples of a chunk, and their labels."""
        parts = [store.read_chunk(chunk) for store in self.stores]
        return self._rows(parts), parts[0].labels

    def _rows(self, parts: Sequence[Embeddings]) -> Rows:
        first, *others = [part.features.to(self.device) for part in parts]
        if isinstance(self.clusters, Router):
            return first, others, self.clusters.to(self.device).assign(first)
        ids = parts[0].ids.numpy()
        clusters = torch.from_numpy(np.asarray(self.clusters[ids], dtype=np.int64))
        return first, others, clusters.to(self.device)


def combine_to_store(
    combination: Combination,
    parts: Parts,
    store: EmbeddingStore,
    *,
    rank: int = 0,
    world_size: int = 1,
    report: Callable[[str], None] = lambda _: None,
    on_chunk: Callable[[], None] = lambda: None,
) -> None:
    """Make the chunks of this rank that the store of a combination lacks.

    Args:
        store: its chunks are those of the parts' stores.
        report: gets one sentence for each damaged chunk.
        on_chunk: called after each chunk.
    """
    combination = combination.to(parts.device)
    for chunk in store.missing(rank, world_size, report=report):
        rows, labels = parts.chunk(chunk)
        store.write_chunk(chunk, combination.transform(*rows), labels)
        on_chunk()


# ---- the table of clusters


def gather_slices(own: Tensor, total: int, world: World) -> npt.NDArray[np.int16] | None:
    """Return a table of `total` numbers on the main rank and None on the others. Collective.

    Windows of it are summed over ranks, so that no other rank holds more than one and its own part.

    Args:
        own: (n,) int16, this rank's part, as `EmbeddingStore.chunks` cuts samples into parts.
    """
    start = total * world.rank // world.size
    table = np.empty(total, dtype=np.int16) if world.is_main else None
    for first in range(0, total, _WINDOW):
        window = torch.zeros(
            min(_WINDOW, total - first), dtype=torch.int32
        )  # neither gloo nor NCCL has int16
        low, high = max(first, start), min(first + len(window), start + len(own))
        if low < high:
            window[low - first : high - first] = own[low - start : high - start]
        window = world.sum(window.to(world.device)).cpu()
        if table is not None:
            table[first : first + len(window)] = window.numpy()
    return table


def write_table(path: Path, table: npt.NDArray[np.int16]) -> None:
    """Write a table as a .npy file of int64, without a copy of that size in memory."""
    written = np.lib.format.open_memmap(path, mode="w+", dtype=np.int64, shape=table.shape)
    written[:] = table
    written.flush()


def members(table: npt.NDArray[np.int16], num_clusters: int) -> list[npt.NDArray[np.int64]]:
    """Return the samples of each cluster, ascending, by one sort of the table."""
    order = np.argsort(table, kind="stable")
    ends = np.cumsum(np.bincount(table, minlength=num_clusters))
    return np.split(order, ends[:-1])
