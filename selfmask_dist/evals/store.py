"""Embeddings on disk, in chunks: made once, by any number of ranks, and read by every evaluation.

    store/manifest.json       what is in it: samples, dim, dtype, chunk size, provenance
    store/00000.safetensors   features (rows, dim), labels (rows,) int64, ids (rows,) int64, sha256 (32,)

Chunk c holds samples c * chunk_size up to the next chunk's first, and is written by rank c % world_size under
a temporary name, then renamed. Where chunks begin and which samples are encoded together does not depend on
the number of ranks: a run that was killed goes on under another number, keeps what is there, and ends with
the same bytes. A chunk's sha256 covers the manifest, its number and its tensors, so one that rotted, was cut
short, or came from another store is found, named and made again.

Knows neither models, evaluations nor process groups: an encoder is a function, rank and world are integers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from selfmask_dist.data import Source, Subset, Transform, Workers, eval_loader
from selfmask_dist.evals.embeddings import Embeddings

MAX_CHUNKS = 4096
"""About which number of chunks a store keeps to: 100 million samples make chunks of 24,000."""
DTYPES = {"float16": torch.float16, "float32": torch.float32}


class StoreError(ValueError):
    """A store that is not what is asked for, not complete, or damaged."""


@dataclass(frozen=True)
class EmbeddingStore:
    """A folder of chunks; `create` or `open` one.

    provenance: where the embeddings come from, in strings: the encoder's fingerprint, the data's, the view.
    """

    path: Path
    num_samples: int
    dim: int
    dtype: str
    chunk_size: int
    provenance: Mapping[str, str]

    @staticmethod
    def create(
        path: str | Path,
        *,
        num_samples: int,
        dim: int,
        provenance: Mapping[str, str],
        dtype: str = "float32",
        chunk_size: int = 4096,
    ) -> EmbeddingStore:
        """Make a store, or go on with the one at `path`. Every rank may call, in any order.

        Raises:
            StoreError: there is one already with other contents; the message names the difference.
        """
        if min(num_samples, dim, chunk_size) < 1 or dtype not in DTYPES:
            raise StoreError(
                f"a store needs at least one sample, dimension and row per chunk and a dtype of "
                f"{', '.join(DTYPES)}; got {num_samples}, {dim}, {chunk_size} and {dtype}"
            )
        wanted = EmbeddingStore(Path(path), num_samples, dim, dtype, chunk_size, dict(provenance))
        if (wanted.path / "manifest.json").exists():
            wanted._check_same(_read_manifest(wanted.path))
        else:
            wanted.path.mkdir(parents=True, exist_ok=True)
            # the same bytes from every rank, under a name of its own until they are whole
            _write(
                wanted.path / "manifest.json", wanted._manifest, partial=f".manifest.{uuid4().hex}.partial"
            )
        return wanted

    @staticmethod
    def describe(path: str | Path) -> EmbeddingStore | None:
        """Return what a store says of itself, complete or not; None where there is none."""
        return _read_manifest(Path(path)) if (Path(path) / "manifest.json").exists() else None

    @staticmethod
    def open(
        path: str | Path, *, dim: int | None = None, provenance: Mapping[str, str] | None = None
    ) -> EmbeddingStore:
        """Open a complete store for reading; chunks are verified as they are read.

        Args:
            dim: what it must be, where given. provenance: the same, for the entries that are given.

        Raises:
            StoreError: no store, chunks missing, or another dim or provenance than asked for.
        """
        store = _read_manifest(Path(path))
        expected = {**store.provenance, **(provenance or {})}
        replace(store, dim=store.dim if dim is None else dim, provenance=expected)._check_same(store)
        there = store._listing()
        # a file system may show an old listing for a while: a name that is not in it is asked for
        missing = [
            chunk
            for chunk in range(store.num_chunks)
            if chunk not in there and not store._chunk_path(chunk).exists()
        ]
        if missing:
            raise StoreError(
                f"{path} lacks {len(missing)} of {store.num_chunks} chunks, the first is "
                f"{store._chunk_path(missing[0]).name}; run the embedding again to make them"
            )
        return store

    def __len__(self) -> int:
        return self.num_samples

    @property
    def num_chunks(self) -> int:
        """How many chunks the whole store has, made or not."""
        return math.ceil(self.num_samples / self.chunk_size)

    def chunk_range(self, chunk: int) -> range:
        """Return the ids of a chunk's samples."""
        assert 0 <= chunk < self.num_chunks, (chunk, self.num_chunks)
        return range(chunk * self.chunk_size, min((chunk + 1) * self.chunk_size, self.num_samples))

    def missing(
        self, rank: int = 0, world_size: int = 1, *, report: Callable[[str], None] = lambda _: None
    ) -> list[int]:
        """Return which of this rank's chunks are to be made; damaged ones are reported. It reads the others
        whole.
        """
        chunks, there = [], self._listing()
        for chunk in range(rank, self.num_chunks, world_size):
            if chunk not in there:
                chunks.append(chunk)
                continue
            try:
                self.read_chunk(chunk)
            except StoreError as error:
                report(f"{error}; it is made again")
                chunks.append(chunk)
        return chunks

    def write_chunk(self, chunk: int, features: Tensor, labels: Tensor) -> None:
        """Write the samples of `chunk_range(chunk)`: features (rows, dim), labels (rows,), -1 = none.

        Raises:
            StoreError: features of another dimension, not finite, or too large for the store's dtype.
        """
        ids = torch.tensor(self.chunk_range(chunk))
        if features.shape != (len(ids), self.dim) or labels.shape != ids.shape:
            raise StoreError(
                f"chunk {chunk} of {self.path} takes features {(len(ids), self.dim)} and labels "
                f"({len(ids)},), got {tuple(features.shape)} and {tuple(labels.shape)}"
            )
        stored = features.detach().cpu().to(DTYPES[self.dtype]).contiguous()
        bad = (~stored.isfinite()).any(dim=1).nonzero().flatten()
        if len(bad):
            fits = features[bad[0]].isfinite().all()
            why = f"do not fit into {self.dtype}; use float32" if fits else "are not finite"
            raise StoreError(
                f"embeddings of {len(bad)} samples {why}; the first is sample {int(ids[bad[0]])}"
            )
        tensors = {"features": stored, "labels": labels.cpu().long().contiguous(), "ids": ids}
        tensors["sha256"] = self._digest(chunk, tensors)
        # always the same name: what a killed run left behind is written over by whoever makes the chunk
        _write(self._chunk_path(chunk), save(tensors), partial=f".{chunk:05d}.partial")

    def read_chunk(self, chunk: int) -> Embeddings:
        """Return a chunk's samples, verified.

        Raises:
            StoreError: naming the file, where it is missing or damaged.
        """
        path = self._chunk_path(chunk)
        try:
            tensors = load(path.read_bytes())
            is_good = torch.equal(tensors["sha256"], self._digest(chunk, tensors))
        except FileNotFoundError:
            raise StoreError(f"chunk {path} is missing; run the embedding again to make it") from None
        except (SafetensorError, KeyError):
            is_good = False
        if not is_good:
            raise StoreError(f"chunk {path} is damaged or of another store (its checksum does not match)")
        return Embeddings(tensors["features"], tensors["labels"], tensors["ids"])

    def chunks(self, rank: int = 0, world_size: int = 1) -> Iterator[Embeddings]:
        """Yield this rank's samples as in `read_slice`, a chunk or less at a time."""
        start, stop = (self.num_samples * place // world_size for place in (rank, rank + 1))
        for chunk in range(start // self.chunk_size, math.ceil(stop / self.chunk_size)):
            first = self.chunk_range(chunk).start
            part = slice(max(0, start - first), stop - first)
            rows = self.read_chunk(chunk)
            yield Embeddings(rows.features[part], rows.labels[part], rows.ids[part])

    def read_slice(self, rank: int = 0, world_size: int = 1) -> Embeddings:
        """Return this rank's samples: the same number on every rank but for one, neighbours together."""
        parts = list(self.chunks(rank, world_size))
        if not parts:
            dtype = DTYPES[self.dtype]
            none = torch.empty(0, dtype=torch.int64)
            return Embeddings(torch.empty(0, self.dim, dtype=dtype), none, none)
        return Embeddings(
            torch.cat([part.features for part in parts]),
            torch.cat([part.labels for part in parts]),
            torch.cat([part.ids for part in parts]),
        )

    def _listing(self) -> set[int]:
        """Return the chunks that lie in the folder, by one reading of it."""
        stems = (name.partition(".") for name in os.listdir(self.path))
        return {int(stem) for stem, _, ending in stems if ending == "safetensors" and stem.isdecimal()}

    def _chunk_path(self, chunk: int) -> Path:
        return self.path / f"{chunk:05d}.safetensors"

    @property
    def _manifest(self) -> bytes:
        fields = {name: getattr(self, name) for name in _FIELDS}
        return (json.dumps({"version": 1, **fields}, sort_keys=True, indent=2) + "\n").encode()

    def _digest(self, chunk: int, tensors: Mapping[str, Tensor]) -> Tensor:
        digest = hashlib.sha256(self._manifest + f"chunk {chunk}".encode())
        for name in ("features", "labels", "ids"):
            digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
        return torch.from_numpy(np.frombuffer(digest.digest(), dtype=np.uint8).copy())

    def _check_same(self, found: EmbeddingStore) -> None:
        """Raise StoreError unless `found` is the store that this one describes."""
        differences = [
            f"its {name} is {getattr(found, name)} and {getattr(self, name)} is asked for"
            for name in _FIELDS
            if name != "provenance" and getattr(found, name) != getattr(self, name)
        ]
        names = sorted({*self.provenance, *found.provenance})
        differences += [
            f"its {name} is {found.provenance.get(name, 'not stated')} and "
            f"{self.provenance.get(name, 'none')} is asked for"
            for name in names
            if found.provenance.get(name) != self.provenance.get(name)
        ]
        if differences:
            raise StoreError(
                f"{self.path} holds other embeddings: {'; '.join(differences)}; delete it or choose another "
                "folder"
            )


_FIELDS = ("num_samples", "dim", "dtype", "chunk_size", "provenance")


def chunk_size_for(num_samples: int, batch_size: int) -> int:
    """Return the rows of a store's chunk: whole batches, and a function of the data alone, as bytes are then.

    A store has 64 chunks or fewer of one batch, chunks of at most 16 batches up to `MAX_CHUNKS` of them, and
    that many larger ones above: the files and the calls of the file system do not grow any further.
    """
    batches = math.ceil(num_samples / batch_size)
    return batch_size * max(min(num_samples // (64 * batch_size), 16), batches // MAX_CHUNKS, 1)


def embed_to_store(
    encode_fn: Callable[[Tensor], Tensor],
    source: Source,
    transform: Transform,
    store: EmbeddingStore,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int | Workers = 0,
    device: torch.device | str = "cpu",
    all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    on_batch: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Make the chunks that a store lacks. Collective if `all_reduce` is, or if `encode_fn` is.

    Args:
        encode_fn: images (n, 3, H, W) on `device` -> embeddings (n, dim); in eval mode.
        batch_size: images encoded together; divides the store's chunk size, so that the grouping, on which
            the last bits of an embedding depend, is the same under any number of ranks.
        all_reduce: sums over ranks. With it every rank encodes and calls `on_batch` equally often; ranks
            that share nothing (an array of jobs) leave it out.
        on_batch: called after each batch: the place to stop at.
        report: gets one sentence for each damaged chunk.

    Raises:
        StoreError: the source has another number of samples than the store, or an embedding is not finite.
    """
    if len(source) != store.num_samples:
        raise StoreError(f"{store.path} is of {store.num_samples} samples, the source has {len(source)}")
    if batch_size < 1 or store.chunk_size % batch_size:
        raise StoreError(
            f"batch size {batch_size} does not divide the store's chunk size {store.chunk_size}; take a "
            "power of two"
        )
    missing = store.missing(rank, world_size, report=report)
    num_batches = torch.zeros(world_size, dtype=torch.int64, device=device)
    num_batches[rank] = sum(math.ceil(len(store.chunk_range(chunk)) / batch_size) for chunk in missing)
    # until every rank has looked, none goes on to write
    num_batches = all_reduce(num_batches)
    padding = int(num_batches.max() - num_batches[rank])
    if not num_batches.any():
        return
    # a rank with less to do first encodes some samples again, for encoders that are collective (fsdp)
    again = np.arange(padding * batch_size, dtype=np.int64) % len(source)
    ids = np.concatenate([again, *(np.array(store.chunk_range(chunk)) for chunk in missing)])
    workers = Workers(num_workers) if isinstance(num_workers, int) else num_workers
    batches = eval_loader(Subset(source, ids), transform, batch_size=batch_size, workers=workers)
    chunks, chunk = iter(missing), -1
    parts: list[tuple[Tensor, Tensor]] = []
    try:
        for number, batch in enumerate(batches):
            with torch.no_grad():
                features = _to_host(encode_fn(batch.to(device).views[0]).float())
            if number >= padding:
                chunk = chunk if parts else next(chunks)
                parts.append((features, batch.labels))
                if sum(len(labels) for _, labels in parts) == len(store.chunk_range(chunk)):
                    if features.is_pinned():
                        torch.cuda.current_stream(device).synchronize()  # the chunk's copies have arrived
                    store.write_chunk(chunk, *(torch.cat(part) for part in zip(*parts, strict=True)))
                    parts = []
            on_batch()
    finally:
        batches.close()


def _to_host(features: Tensor) -> Tensor:
    """Return features on the CPU; out of a GPU they are on their way when this returns.

    A copy that waits would leave the GPU without work after each batch.
    """
    if features.device.type != "cuda":
        return features.cpu()
    host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    return host.copy_(features, non_blocking=True)


def _read_manifest(path: Path) -> EmbeddingStore:
    try:
        fields: dict[str, Any] = json.loads((path / "manifest.json").read_bytes())
        version = fields["version"]
        store = EmbeddingStore(path, **{name: fields[name] for name in _FIELDS})
    except FileNotFoundError:
        raise StoreError(f"{path} is no embedding store: it has no manifest.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path}/manifest.json cannot be read ({error}); delete the folder and embed again"
        ) from error
    if version != 1:
        raise StoreError(f"{path} has format version {version}, this selfmask_dist reads 1; upgrade it")
    return store


def _write(path: Path, data: bytes, *, partial: str) -> None:
    """Whole or not at all, and to stay."""
    with open(path.with_name(partial), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    path.with_name(partial).replace(path)
