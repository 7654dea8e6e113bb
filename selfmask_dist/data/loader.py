"""Source, order and views joined into batches: made in this process, in DataLoader workers or in threads.

Knows neither models nor process groups: rank and world size are integers. A batch is a pure function

    batch(seed, epoch, step, rank, world_size)

of its plan (`order.rank_batch`), which the parent makes and a worker carries out, so the number of workers
changes no pixel, and nothing is to be saved for a resume but (epoch, step) and what data it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from selfmask_dist.data.batch import Batch
from selfmask_dist.data.indexing.index import difference
from selfmask_dist.data.order import (
    EpochOrder,
    Order,
    RankBatch,
    SourceOrder,
    num_steps,
    rank_batch,
)
from selfmask_dist.data.planned import PlannedBatches
from selfmask_dist.data.quarantine import Quarantine
from selfmask_dist.data.source import SampleError, Source
from selfmask_dist.data.targets import Targets
from selfmask_dist.data.views.dense import DenseTransform
from selfmask_dist.data.views.mix import Mixing
from selfmask_dist.data.views.single import Transform
from selfmask_dist.data.workers import (
    START_METHOD,
    Workers,
    ahead,
    die_with_parent,
    naming_lost_workers,
    start_worker_server,
    without_worker_advice,
)

IN_THIS_PROCESS = Workers()


def train_loader(
    source: Source,
    transform: Transform,
    *,
    global_batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    workers: Workers = IN_THIS_PROCESS,
    quarantine: Quarantine | None = None,
) -> BatchLoader:
    """Return a loader of shuffled batches, at epoch 0; `set_epoch` moves on with the same workers.

    global_batch_size: samples per step over all ranks; a multiple of world_size.
    quarantine: takes samples that cannot be read, whose rows get weight 0; without it they raise.
    Raises ValueError for a batch size that the ranks cannot share equally, or a negative seed.
    """
    if global_batch_size < 1 or global_batch_size % world_size:
        near = max(1, round(global_batch_size / world_size)) * world_size
        raise ValueError(
            f"global batch {global_batch_size} is not divisible by world size {world_size};"
            f" set train.global_batch_size to {near}"
        )
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or above")
    plans = _Plans(len(source), global_batch_size, rank, world_size, seed, shuffle=True)
    return BatchLoader(source, transform, plans, workers=workers, quarantine=quarantine)


def eval_loader(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: Workers = IN_THIS_PROCESS,
    seed: int = 0,
    quarantine: Quarantine | None = None,
) -> BatchLoader:
    """Return a loader of each sample exactly once over all ranks, in the source's order. Rank r of W gets the
    samples r, r+W, r+2W, ...

    seed: of a transform that draws; the same views each time.
    batch_size: rows per rank. Rows of weight 0 pad the last batch and are to be left out.
    quarantine: takes samples that cannot be read, whose rows get weight 0 too; without it they raise.
    """
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}; it must be at least 1")
    plans = _Plans(len(source), batch_size * world_size, rank, world_size, seed=seed, shuffle=False)
    return BatchLoader(source, transform, plans, workers=workers, quarantine=quarantine)


class BatchLoader:
    """Iterates over one rank's batches of the current epoch. `len` is the number of batches in a full epoch.

    Workers start with the first iteration and stay for the following epochs, until `close` or garbage
    collection. A sample that cannot be read or decoded raises SampleError naming shard and key, with any
    number of workers.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        plans: _Plans,
        *,
        workers: Workers,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._dataset = PlannedBatches(source, transform, plans.seed, is_tolerant=quarantine is not None)
        self._identity = source.identity
        self._quarantine = quarantine
        self._plans = plans
        self._step = 0  # of the next batch
        self._workers = workers
        self._num_threads = workers.num if workers.kind == "thread" else 0
        self._dataloader: DataLoader[Batch | SampleError] | None = None
        if workers.num > self._num_threads:
            start_worker_server()

    def __len__(self) -> int:
        return len(self._plans)

    def with_captions(self) -> BatchLoader:
        """Make the batches hold each sample's caption, and return this loader. To be called before the first
        iteration. A sample without a caption then counts as one that cannot be read.

        Raises ValueError where no sample has a caption.
        """
        if not self._dataset.source.has_captions:
            raise ValueError(
                "no training image has a caption; image-text shards hold a .txt beside each picture. Where "
                "they do, make their index again: selfmask data index"
            )
        assert self._dataloader is None, "workers have their copy of the data set already"
        self._dataset.captions = True
        return self

    def with_mixing(self, mixing: Mixing) -> BatchLoader:
        """Make the batches hold pictures mixed with others of their global batch, and return this loader. To
        be called before the first iteration.
        """
        assert self._dataloader is None, "workers have their copy of the data set already"
        self._dataset.mixing, self._plans.with_partners = mixing, True
        return self

    def with_targets(self, targets: Targets) -> BatchLoader:
        """Make the batches hold each sample's targets, and return this loader. To be called before the first
        iteration. Label maps go with a `DenseTransform`, which changes picture and map alike.
        """
        assert self._dataloader is None, "workers have their copy of the data set already"
        assert (targets.kind == "dense") == isinstance(self._dataset.transform, DenseTransform), targets.kind
        self._dataset.targets = targets
        return self

    def set_epoch(self, epoch: int, *, first_step: int = 0) -> None:
        """Make the next iteration that of `epoch`, from batch `first_step` on: a resume skips nothing."""
        assert epoch >= 0, epoch
        assert 0 <= first_step <= len(self), (first_step, len(self))
        if self._quarantine is not None:
            self._quarantine.start_epoch(epoch, first_step=first_step)
        self._plans.epoch, self._plans.first_step, self._step = epoch, first_step, first_step

    def state_dict(self) -> dict[str, Any]:
        """Return where the next batch is, in a few integers, and what data it was; the same on every rank.

        Batches count when they are handed out, whatever the workers prepared beyond them.
        """
        epoch, step = self._plans.epoch, self._step
        if step == len(self):
            epoch, step = epoch + 1, 0
        return {
            "epoch": epoch,
            "step": step,
            "seed": self._plans.seed,
            "global_batch_size": self._plans.global_batch_size,
            "data": dict(self._identity),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError where data, seed or batch size are not what they were when `state` was saved; the
        message names the difference.
        """
        changed = difference(state["data"], self._identity)
        if changed is not None:
            raise ValueError(
                f"the training data is not what it was when this state was saved: {changed}; bring the old"
                " data back, or start a new run"
            )
        for name in ("seed", "global_batch_size"):
            if state[name] != getattr(self._plans, name):
                raise ValueError(
                    f"{name} was {state[name]} when this state was saved and is {getattr(self._plans, name)};"
                    " set it back, or start a new run"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called, with any number of ranks and workers; raises as `check_state`
        does.
        """
        self.check_state(state)
        self.set_epoch(state["epoch"], first_step=state["step"])

    def __iter__(self) -> Iterator[Batch]:
        self._step = self._plans.first_step
        for batch in self._batches():
            if isinstance(batch, SampleError):
                self.close()
                raise batch
            if self._quarantine is not None:
                self._quarantine.record(batch.failures, step=self._step)
            self._step += 1
            yield batch

    def _batches(self) -> Iterator[Batch | SampleError]:
        if self._num_threads:
            return ahead(self._load, self._plans, num_threads=self._num_threads)
        with without_worker_advice():
            if self._dataloader is None:
                self._dataloader = self._make_dataloader()
            return naming_lost_workers(self._dataloader)

    def _load(self, plan: RankBatch) -> Batch | SampleError:
        """Make one batch in a thread and pin it, as the DataLoader, which is not used here, would do."""
        batch = self._dataset[plan]
        return batch.pin_memory() if self._workers.pin_memory and isinstance(batch, Batch) else batch

    def close(self) -> None:
        """Stop the workers; a later iteration starts new ones."""
        workers = getattr(self._dataloader, "_iterator", None)
        if workers is not None:
            # torch does this when the iterator is collected; where a traceback made it part of a reference
            # cycle, its queues are gone by then, no worker can be told to stop, and each costs a wait of 5 s
            workers._shutdown_workers()
        self._dataloader = None

    def _make_dataloader(self) -> DataLoader[Batch | SampleError]:
        with_workers = self._workers.num > 0
        return DataLoader(
            self._dataset,
            batch_size=None,  # a plan is a whole batch: the worker assembles it, nothing is left to collate
            sampler=self._plans,
            collate_fn=_unchanged,
            num_workers=self._workers.num,
            persistent_workers=with_workers,
            multiprocessing_context=START_METHOD if with_workers else None,
            worker_init_fn=die_with_parent,
            pin_memory=self._workers.pin_memory,
            # its own: the DataLoader would draw its workers' base seed from the global generator
            generator=torch.Generator(),
        )


def _unchanged(batch: Any) -> Any:
    return batch


class _Plans(Sampler[RankBatch]):
    """Makes the epoch's plans for one rank, in the parent, as the DataLoader asks for them."""

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        *,
        shuffle: bool,
    ) -> None:
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.epoch, self.first_step = 0, 0
        self.with_partners = False

    def __len__(self) -> int:
        return num_steps(self.num_samples, global_batch_size=self.global_batch_size)

    def __iter__(self) -> Iterator[RankBatch]:
        epoch = self.epoch
        order: Order = SourceOrder(self.num_samples)
        if self.shuffle:
            order = EpochOrder(
                self.num_samples, seed=self.seed, epoch=epoch, global_batch_size=self.global_batch_size
            )
        for step in range(self.first_step, len(self)):
            yield rank_batch(
                order,
                step,
                epoch=epoch,
                global_batch_size=self.global_batch_size,
                rank=self.rank,
                world_size=self.world_size,
                with_partners=self.with_partners,
            )
