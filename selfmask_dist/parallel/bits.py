"""The 1-bit engine: every rank holds the frozen weights, so what travels after a step is mask bits.

    backward    theta's gradient -> flat buckets -> reduce-scatter, each bucket as soon as it is full
    step        each rank updates its slice of scores and momentum
    after it    one all-gather of packed bits (and of sum M), theta rewritten from bits on every rank

A rank sends 2 bytes a weight for gradients in bf16 (4 in float32) and 1/8 byte for bits, where FSDP sends 6
in bf16. Memory per weight: theta and W everywhere; gradients, scores and momentum as 1/world, and three
buckets. Knows nothing of objectives or architectures.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from selfmask_dist.masking import Family, Segment, SegmentedParameter, Shards, select
from selfmask_dist.parallel.engine import Engine, reduce_dtype
from selfmask_dist.parallel.together import take_several
from selfmask_dist.parallel.world import World

# torch 2.13 renamed these; the old names warn there. Delete when torch >= 2.13 is required.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_BITS = 8
_IN_FLIGHT = 2  # buckets on their way at once; with the one being filled, all the memory that sending takes


class BitsEngine(Engine):
    """See `Engine`."""

    _flat: "FlatShards | None" = None
    _reducer: "BucketReducer | None" = None

    def _spread(self, blocks: Sequence[str]) -> None:
        take_several(self.encoder, blocks)

    def free(self, model: nn.Module, names: Collection[str] | None = None) -> list[nn.Parameter]:
        raise ValueError(
            "engine.name=bits sends mask bits instead of weights, so it trains masks only; use ddp, fsdp or "
            "deepspeed for method=finetune"
        )

    def _shards_of(self, model: nn.Module, options: Mapping[str, Any]) -> Shards:
        if model is not self.encoder:
            return Shards()
        if self._flat is None:
            names = select(
                model,
                options.get("include", "auto"),
                exclude=options.get("exclude", ()),
                first_layers=options.get("first_layers"),
                allow_norm=options.get("allow_norm", False),
            )
            parameters = dict(model.named_parameters())
            chosen = {name: parameters[name] for name in names}
            self._flat = FlatShards(chosen, self.world, bucket_mb=self.config.bucket_mb)
        return self._flat

    def attach(self, model: nn.Module, attach_fn: Callable[..., Any], **options: Any) -> Any:
        if isinstance(options.get("family"), Family) and model is self.encoder:
            _check_family(options["family"])  # before theta is written: not all can write such pieces
        masks = super().attach(model, attach_fn, **options)
        if model is self.encoder:
            _check_family(masks.family)
            assert self._flat is not None
            thetas = {entry.name: entry.theta for entry in masks.entries}
            self._reducer = BucketReducer(self._flat, thetas, reduce_dtype(self.config))
        return masks

    def _backward(self, loss: Tensor) -> None:
        super()._backward(loss)
        if self._reducer is not None:
            # every micro-batch: gradients kept whole until the last one would take 4 bytes a weight
            self._reducer.finish()

    def _finish_backward(self) -> None:
        if self._reducer is not None:
            self._reducer.hand_over()
        super()._finish_backward()


def _check_family(family: Family) -> None:
    if not family.is_mask or family.trains_weight or not family.trains_scores:
        raise ValueError(
            f"engine.name=bits sends the bits of a trained mask on frozen weights, which "
            f"mask.family={family.name} is not; use ddp or fsdp"
        )


@dataclass
class Bucket:
    """Parameters laid end to end, padded so that every rank's chunk is a whole number of bytes of bits."""

    offsets: dict[str, int]  # where each parameter begins
    chunk: int  # elements of one rank's part
    first: int  # where this bucket's part begins in a rank's flat scores
    work: Any = None
    buffer: Tensor | None = None
    output: Tensor | None = None
    total: Tensor | None = None  # this rank's chunk of the gradient, summed over micro-batches
    pending: set[str] = field(default_factory=set)


class FlatShards(Shards):
    """Pieces of flattened parameters: bucket after bucket is cut into equal chunks, one for each rank."""

    is_whole = False

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World, *, bucket_mb: float) -> None:
        self.world = world
        self.piece_index, self.num_pieces = world.rank, world.size
        self.sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.buckets = _make_buckets(parameters, world.size, bucket_mb)
        self.bucket_of = {name: bucket for bucket in self.buckets for name in bucket.offsets}
        self.gradients: dict[str, Tensor] = {}
        num_local = sum(bucket.chunk for bucket in self.buckets)
        first = next(iter(parameters.values()))
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        # padding is never kept, so the bits of a chunk are one comparison of it
        self._scores = torch.full((num_local,), -torch.inf, dtype=dtype, device=first.device)
        self._gathered: Tensor | None = None
        self._table: Tensor | None = None

    def span(self, name: str) -> tuple[int, int]:
        """Return which elements of the flattened parameter this rank holds: (first, last + 1)."""
        bucket = self.bucket_of[name]
        start, rank = bucket.offsets[name], self.world.rank
        low = min(max(rank * bucket.chunk - start, 0), self.sizes[name])
        high = min(max((rank + 1) * bucket.chunk - start, 0), self.sizes[name])
        return low, high

    def place_of(self, name: str) -> slice:
        """Return where this rank's piece lies in its bucket's chunk."""
        bucket, (low, high) = self.bucket_of[name], self.span(name)
        begin = bucket.offsets[name] + low - self.world.rank * bucket.chunk
        return slice(begin, begin + high - low) if high > low else slice(0, 0)

    def new_scores(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        assert dtype == self._scores.dtype, f"{name} needs {dtype} scores, others {self._scores.dtype}"
        bucket, place = self.bucket_of[name], self.place_of(name)
        return self._scores[bucket.first + place.start : bucket.first + place.stop]

    def piece(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.shape != self._shapes[name]:
            return tensor  # scores, their gradients and momentum are pieces already
        low, high = self.span(name)
        return tensor.view(-1)[low:high]

    def first_row(self, name: str, theta: Tensor) -> int:
        return self.span(name)[0]

    def gradient(self, name: str, theta: Tensor) -> Tensor | None:
        return self.gradients.get(name)

    def sum(self, values: Tensor) -> Tensor:
        return self.world.sum(values)

    def sum_written(
        self,
        sums: Tensor,
        entries: Sequence[SegmentedParameter],
        *,
        threshold: float | None,
        mask_fn: Callable[[Segment], Tensor],
    ) -> Tensor:
        """Gather everyone's bits and sums together, so that sums cost no call of their own."""
        num_bytes = len(self._scores) // _BITS
        payload = torch.cat(
            [pack(self._mask(entries, threshold, mask_fn)), sums.double().view(-1).view(torch.uint8)]
        )
        gathered = payload.new_empty(self.world.size, len(payload))
        if self.world.size > 1:
            _all_gather(gathered.view(-1), payload)
        else:
            gathered[0] = payload
        self._gathered = gathered[:, :num_bytes]
        rows = gathered[:, num_bytes:].clone(memory_format=torch.contiguous_format)
        return rows.view(torch.float64).sum(0).view_as(sums)

    def _mask(
        self,
        entries: Sequence[SegmentedParameter],
        threshold: float | None,
        mask_fn: Callable[[Segment], Tensor],
    ) -> Tensor:
        """Return this rank's chunks of the mask, end to end."""
        if threshold is not None:  # one comparison of all, as padding lies below every threshold
            return self._scores > threshold
        flat = torch.zeros(len(self._scores), dtype=torch.bool, device=self._scores.device)
        for entry in entries:
            place, first = self.place_of(entry.name), self.bucket_of[entry.name].first
            piece = flat[first + place.start : first + place.stop]
            for segment, out in zip(entry.segments(), entry.split(piece), strict=True):
                out.copy_(mask_fn(segment))
        return flat

    def complete(self, entries: Sequence[SegmentedParameter], *, is_scaled: bool) -> None:
        """Rewrite all of theta from the gathered bits: M, then * W, then * a, as `core` does."""
        assert self._gathered is not None
        by_name = {entry.name: entry for entry in entries}
        for bucket in self.buckets:
            begin = bucket.first // _BITS
            chunk_bits = self._gathered[:, begin : begin + bucket.chunk // _BITS]
            mask = self._unpack(chunk_bits.reshape(-1))
            for name, start in bucket.offsets.items():
                entry = by_name[name]
                theta = entry.theta.detach().view(-1)
                theta.copy_(mask[start : start + self.sizes[name]])
                theta.mul_(entry.weight.view(-1))
                if is_scaled:
                    self._scale(entry, theta)
        self._gathered = None

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        low, high = self.span(name)
        flat = tensor.new_zeros(self.sizes[name])
        flat[low:high] = tensor
        return self.world.sum(flat).view(self._shapes[name])  # zero elsewhere, so the sum is exact

    def _scale(self, entry: SegmentedParameter, theta: Tensor) -> None:
        pieces = theta.split(-(-len(theta) // entry.num_segments))
        for piece, scale in zip(pieces, entry.scales, strict=True):
            piece.mul_(scale)

    def _unpack(self, packed: Tensor) -> Tensor:
        """Return the bits of bytes as 0 and 1 in uint8, eight for each byte."""
        if self._table is None:
            values = torch.arange(256, device=packed.device)
            self._table = ((values[:, None] >> torch.arange(_BITS, device=packed.device)) & 1).to(torch.uint8)
        return self._table.index_select(0, packed.int()).view(-1)


class BucketReducer:
    """Reduce-scatters theta's gradients bucket by bucket while backward goes on.

    Buckets leave in a fixed order, as all ranks must send the same one at the same time.
    """

    def __init__(
        self, shards: FlatShards, thetas: Mapping[str, nn.Parameter], dtype: torch.dtype | None
    ) -> None:
        self._shards = shards
        self._dtype = dtype
        self._next = 0
        for name, theta in thetas.items():
            theta.register_post_accumulate_grad_hook(lambda theta, name=name: self._take(name, theta))
        self._restart()

    @torch.no_grad()
    def finish(self) -> None:
        """Send what is left of a micro-batch and wait for it; parameters without a gradient count as zero."""
        while self._next < len(self._shards.buckets):
            self._send(self._shards.buckets[self._next])
        for bucket in self._shards.buckets:
            self._settle(bucket)
        self._restart()

    def hand_over(self) -> None:
        """Give the sums over all micro-batches since the last call to the shards, piece by piece."""
        for bucket in self._shards.buckets:
            assert bucket.total is not None, "no backward has run"
            for name in bucket.offsets:
                self._shards.gradients[name] = bucket.total[self._shards.place_of(name)]
            bucket.total = None

    @torch.no_grad()
    def _take(self, name: str, theta: Tensor) -> None:
        bucket = self._shards.bucket_of[name]
        assert theta.grad is not None
        buffer = self._buffer(bucket, theta.grad)
        start = bucket.offsets[name]
        buffer[start : start + theta.numel()] = theta.grad.reshape(-1)
        theta.grad = None
        bucket.pending.discard(name)
        buckets = self._shards.buckets
        while self._next < len(buckets) and not buckets[self._next].pending:
            self._send(buckets[self._next])

    def _buffer(self, bucket: Bucket, like: Tensor) -> Tensor:
        if bucket.buffer is None:
            length = bucket.chunk * self._shards.world.size
            bucket.buffer = torch.zeros(length, dtype=self._dtype or like.dtype, device=like.device)
        return bucket.buffer

    def _send(self, bucket: Bucket) -> None:
        if self._next >= _IN_FLIGHT:
            self._settle(self._shards.buckets[self._next - _IN_FLIGHT])
        buffer = self._buffer(bucket, self._shards._scores)
        if self._shards.world.size == 1:
            bucket.output = buffer
        else:
            bucket.output = buffer.new_empty(bucket.chunk)
            bucket.work = _reduce_scatter(bucket.output, buffer, async_op=True)
        self._next += 1

    def _settle(self, bucket: Bucket) -> None:
        """Wait for a bucket, add this rank's chunk of it to the total, and let go of the rest."""
        if bucket.work is not None:
            bucket.work.wait()
        if bucket.output is not None and bucket.total is None:
            bucket.total = bucket.output
        elif bucket.output is not None and bucket.total is not None:
            # gradients that travel as bf16 add up in float32
            bucket.total = _widened(bucket.total).add_(bucket.output)
        bucket.work = bucket.buffer = bucket.output = None

    def _restart(self) -> None:
        self._next = 0
        for bucket in self._shards.buckets:
            bucket.pending = set(bucket.offsets)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def pack(mask: Tensor) -> Tensor:
    """Return bools, of which there are a multiple of eight, as bytes; the first one is the lowest bit."""
    bits = mask.view(-1, _BITS).to(torch.uint8)
    return (bits << torch.arange(_BITS, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def _make_buckets(parameters: Mapping[str, nn.Parameter], world_size: int, bucket_mb: float) -> list[Bucket]:
    """Return buckets of about `bucket_mb` in the order of backward: the last parameters come first."""
    buckets: list[Bucket] = []
    offsets: dict[str, int] = {}
    length = first = 0
    unit = world_size * _BITS
    names = list(parameters)[::-1]
    for index, name in enumerate(names):
        parameter = parameters[name]
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()  # pieces are views of the flattened tensor
        offsets[name] = length
        length += parameter.numel()
        is_full = length * parameter.element_size() >= bucket_mb * 2**20
        if is_full or index == len(names) - 1:
            chunk = -(-length // unit) * _BITS
            buckets.append(Bucket(offsets, chunk, first))
            first += chunk
            offsets, length = {}, 0
    return buckets
