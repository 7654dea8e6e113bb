"""What an evaluation of one encoder has done so far, in a folder: a restart goes on and ends with the same
numbers.

    measuring/adapted/numbers.json   what is measured, and the numbers that are there
    measuring/adapted/<split>/       the embeddings of a split (`evals.store`)

Which samples are encoded together does not depend on the number of ranks, and a store keeps float32 as it
came, so a run that goes on under another number of them finds its numbers to the bit. What was begun for
another encoder, other data or another way to compute is thrown away. Knows neither encoders nor measures.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from selfmask_dist.common.files import write_json
from selfmask_dist.data import Source, Transform, Workers
from selfmask_dist.evals.embed import NonFiniteEmbeddingsError
from selfmask_dist.evals.embeddings import Embeddings
from selfmask_dist.evals.store import EmbeddingStore, embed_to_store
from selfmask_dist.parallel import World

_NUMBERS = "numbers.json"
_MOST_BATCHES = 16  # of a chunk, which is lost where a process ends in the middle of it


class Progress:
    """See the module's docstring. Every method is a collective: every rank must call.

    Args:
        path: the folder; its parent need not exist.
        about: what the numbers depend on, in strings: the encoder, the data, how it is computed.
        batch_size: images that are encoded together. Where an earlier start began with another one, chunks
            stay as long as they were, if they hold whole batches of this one.
        report: gets one sentence where something that was there is made again.
    """

    def __init__(
        self,
        path: Path,
        world: World,
        *,
        about: Mapping[str, str],
        batch_size: int,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._path = path
        self._world = world
        self._batch_size = batch_size
        self._report = report
        begun = self._begin(dict(about)) if world.is_main else None
        self._state: dict[str, Any] = from_main(begun, world)
        self._about = dict(about)

    def once(self, what: str, measure_fn: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return numbers by name: those of an earlier start, or what `measure_fn` finds, which is kept."""
        numbers = self._state["numbers"]
        if what not in numbers:
            numbers[what] = measure_fn()
            if self._world.is_main:
                write_json(self._path / _NUMBERS, self._state, sync=True)
        return dict(numbers[what])

    def embed(
        self,
        split: str,
        encode_fn: Callable[[Tensor], Tensor],
        source: Source,
        transform: Transform,
        *,
        dim: int,
        workers: Workers,
        on_batch: Callable[[], None],
    ) -> Embeddings:
        """Return this rank's embeddings (n, dim) of a split on its device; those that are not there are made.

        Args:
            encode_fn: images (n, 3, H, W) -> (n, dim), the encoder in eval mode.
            on_batch: called after each batch on all ranks equally often: the place to stop at.

        Raises:
            NonFiniteEmbeddingsError: on every rank, where an embedding on any of them is not finite.
        """
        path, batch = self._path / split, self._state["batch_size"]
        store = EmbeddingStore.create(
            path,
            num_samples=len(source),
            dim=dim,
            provenance=self._about,
            # a function of the data alone: so are the samples that are encoded together
            chunk_size=batch * min(max(len(source) // (64 * batch), 1), _MOST_BATCHES),
        )
        embed_to_store(
            _all_finite(encode_fn, split, self._world),
            source,
            transform,
            store,
            batch_size=self._batch_size,
            rank=self._world.rank,
            world_size=self._world.size,
            num_workers=workers,
            device=self._world.device,
            all_reduce=self._world.sum,
            on_batch=on_batch,
            report=self._report,
        )
        self._world.barrier()
        rows = EmbeddingStore.open(path).read_slice(self._world.rank, self._world.size)
        return rows.to(self._world.device)

    def _begin(self, about: dict[str, str]) -> dict[str, Any]:
        """Return what an earlier start left in the folder, or begin there."""
        path = self._path / _NUMBERS
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            changed = sorted(
                name for name in {*about, *found["about"]} if found["about"].get(name) != about.get(name)
            )
            if not changed and found["batch_size"] % self._batch_size:
                changed = ["batch size"]  # chunks would not hold whole batches
        except (OSError, ValueError, KeyError, TypeError):
            found, changed = {}, []
        if found and not changed:
            return found
        if found:
            self._report(f"{self._path} was begun with another {', '.join(changed)}: it is measured anew")
        shutil.rmtree(self._path, ignore_errors=True)
        self._path.mkdir(parents=True)
        state = {"about": about, "batch_size": self._batch_size, "numbers": {}}
        write_json(path, state, sync=True)
        return state


def from_main(value: Any, world: World) -> Any:
    """Return the main rank's value on every rank. Collective: every rank must call."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _all_finite(
    encode_fn: Callable[[Tensor], Tensor], split: str, world: World
) -> Callable[[Tensor], Tensor]:
    """Return an encoder that raises on every rank where its output on any of them is not finite."""
    batches = 0

    def encode(images: Tensor) -> Tensor:
        nonlocal batches
        features = encode_fn(images)
        bad = (~features.isfinite()).any(dim=1).sum()
        if number := int(world.sum(bad)):  # a rank alone would leave the others waiting
            raise NonFiniteEmbeddingsError(
                f"embeddings of {number} samples of data.{split} are not finite, in batch {batches} of those "
                f"that ranks encode together"
            )
        batches += 1
        return features

    return encode
