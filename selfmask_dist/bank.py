"""One backbone in memory and many masks of it, each put on in place when it is asked for.

    bank = MaskBank(encoder)
    bank.add("pets", "pets.mask")
    bank.embed(images, ["pets", "birds", None, "pets"])    # each image under its own mask

    coded bits of every mask, as small as its file -> decoded, for those used last -> theta, in the encoder

Knows nothing of training, the command line or HTTP.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

import numpy as np
import torch
from torch import Tensor, nn

from selfmask_dist import artifact
from selfmask_dist.artifact import Mask, MaskFileError, codec
from selfmask_dist.cascade_model import Cascade, cascade_parts
from selfmask_dist.masking import core

CACHE_MIB = 512
_SPARSE = 32  # a parameter whose rare value takes less than one place in so many is kept as its places


@dataclass(frozen=True)
class _Coded:
    """A mask as it waits: coded bits by parameter, and what does not change by coding."""

    sections: dict[str, bytes]
    scales: dict[str, list[Tensor]]  # a of each scaled part along the first dimension, 0-d
    statistics: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        arrays = sum(tensor.numel() * tensor.element_size() for tensor in self.statistics.values())
        return arrays + sum(len(section) for section in self.sections.values())


@dataclass(frozen=True)
class _Decoded:
    """The bits of one parameter, on the backbone's device: places of the rare value, or all bits packed."""

    places: Tensor | None  # int32
    rare: bool
    packed: Tensor | None  # uint8, eight bits each
    num_bytes: int


class MaskBank:
    """See the module's docstring. Several threads may use one bank: one of them has the encoder at a time.

    Args:
        backbone: the encoder with its frozen weights; it is put in eval mode, its parameters are rewritten.
        cache_mib: memory for decoded masks, on the backbone's device.
    """

    def __init__(self, backbone: nn.Module, *, cache_mib: float = CACHE_MIB) -> None:
        self._encoder = backbone.eval()
        self._tensors: dict[str, Tensor] = {}  # what masks write, by their names for it
        self._frozen: dict[str, Tensor] = {}
        self._coded: dict[str, _Coded] = {}
        self._decoded: OrderedDict[str, dict[str, _Decoded]] = OrderedDict()
        self._cache_bytes = cache_mib * 2**20
        self._current: str | None = None
        self._lock = RLock()

    @property
    def encoder(self) -> nn.Module:
        """The backbone, under whichever mask is on; to compute with it, take `under`."""
        return self._encoder

    def __len__(self) -> int:
        return len(self._coded)

    def __contains__(self, name: str) -> bool:
        return name in self._coded

    @property
    def names(self) -> list[str]:
        return list(self._coded)

    @property
    def num_bytes(self) -> int:
        """What the coded masks take, without the backbone and the decoded ones."""
        return sum(coded.num_bytes for coded in self._coded.values())

    @property
    def cached_bytes(self) -> int:
        """What the decoded masks take."""
        return sum(_size(decoded) for decoded in self._decoded.values())

    @torch.no_grad()
    def add(self, name: str, mask: Mask | str | Path) -> None:
        """Take a mask in, from memory or from a file that holds one.

        Raises:
            MaskFileError: it does not fit the backbone, the file is damaged or holds several masks.
            ValueError: there is a mask of that name.
        """
        with self._lock:
            if name in self._coded:
                raise ValueError(f"the bank holds a mask {name!r} already; remove it, or take another name")
            self._put(None)
            if not isinstance(mask, Mask):
                file = artifact.read_mask_file(mask, weights=artifact.weights_of(self._encoder))
                if len(file.masks) != 1:
                    raise MaskFileError(f"{mask} holds the masks {sorted(file.masks)}, not one")
                mask = next(iter(file.masks.values()))
            if mask.kind != "threshold":
                raise MaskFileError(
                    f"{name} is of kind {mask.kind}; a bank holds masks of kind threshold, put this one on a "
                    f"backbone of its own with apply_masks"
                )
            for key, tensor in artifact.check_fits(self._encoder, mask).items():
                if key not in self._frozen:
                    self._tensors[key], self._frozen[key] = tensor, tensor.detach().clone()
            self._coded[name] = _Coded(
                sections={key: codec.encode(bits.numpy()) for key, bits in mask.bits.items()},
                scales={key: self._scales(mask, key) for key in mask.bits},
                statistics={key: tensor.clone() for key, tensor in mask.statistics.items()},
            )

    def remove(self, name: str) -> None:
        """Forget a mask.

        Raises:
            ValueError: there is none of that name.
        """
        with self._lock:
            self._check(name)
            if self._current == name:
                self._put(None)
            del self._coded[name]
            self._decoded.pop(name, None)

    @contextmanager
    def under(self, name: str | None) -> Iterator[nn.Module]:
        """The encoder under a mask, or as it is frozen; other threads wait until the block ends.

        Raises:
            ValueError: there is no mask of that name.
        """
        with self._lock:
            self._put(name)
            yield self._encoder

    @torch.no_grad()
    def embed(self, images: Tensor, names: str | Sequence[str | None] | None) -> Tensor:
        """Embeddings (n, dim) of images (n, 3, H, W) on the backbone's device.

        Args:
            names: the mask of all images, or one for each; None is the frozen backbone. Images under one mask
                go through together.

        Raises:
            ValueError: a mask that is not there (nothing is then computed), or not as many names as images.
        """
        if names is None or isinstance(names, str):
            with self.under(names) as encoder:
                features: Tensor = encoder(images)
                return features
        if len(names) != len(images):
            raise ValueError(f"{len(images)} images came with {len(names)} names of masks")
        for name in set(names):
            self._check(name)
        with self._lock:
            first = self._current  # it is on already
            found: Tensor | None = None
            for name in sorted(Counter(names), key=lambda name: (name != first, name or "")):
                rows = torch.tensor([row for row, given in enumerate(names) if given == name])
                rows = rows.to(images.device)
                part = self.embed(images[rows], name)
                found = part.new_empty(len(images), *part.shape[1:]) if found is None else found
                found[rows] = part
        if found is None:
            raise ValueError("there are no images")
        return found

    def add_cascade(self, name: str, path: str | Path) -> Cascade:
        """Take a cascade's masks in as `NAME/dispatcher`, `NAME/expert-0`, ...; returns it on this bank.

        Raises:
            MaskFileError: as in `load_cascade` and `add`.
        """
        masks, router, combinations = cascade_parts(path)
        added: list[str] = []
        try:
            for part, mask in masks.items():
                self.add(f"{name}/{part}", mask)
                added.append(f"{name}/{part}")
        except ValueError:
            for key in added:
                self.remove(key)
            raise
        return Cascade(lambda part, images: self.embed(images, f"{name}/{part}"), masks, router, combinations)

    # ---- putting a mask on

    def _check(self, name: str | None) -> None:
        if name is not None and name not in self._coded:
            known = ", ".join(list(self._coded)[:10]) or "none"
            raise ValueError(f"the bank has no mask {name!r}; it has {known}")

    @torch.no_grad()
    def _put(self, name: str | None) -> None:
        if name == self._current:
            return
        self._check(name)
        coded = None if name is None else self._coded[name]
        written = {} if coded is None else {**coded.sections, **coded.statistics}
        self._current = None  # were it cut off half way, nothing must be taken for what is on
        for key in self._frozen.keys() - written.keys():
            self._tensors[key].copy_(self._frozen[key])
        if coded is not None and name is not None:
            for key, decoded in self._decode(name).items():
                _write(self._tensors[key], self._frozen[key], decoded, coded.scales[key])
            for key, statistic in coded.statistics.items():
                self._tensors[key].copy_(statistic)
        self._current = name

    def _scales(self, mask: Mask, key: str) -> list[Tensor]:
        weight = self._frozen[key]
        if not mask.scaled:
            return [weight.new_ones(())]
        parts = mask.bits[key].chunk(mask.num_segments.get(key, 1))
        factors = [core.scale_factor(core.count_kept(part), part.numel(), weight.dtype) for part in parts]
        return [factor.to(weight.device) for factor in factors]

    def _decode(self, name: str) -> dict[str, _Decoded]:
        """A mask's bits out of the cache, or decoded into it; those used longest ago make room."""
        if name in self._decoded:
            self._decoded.move_to_end(name)
            return self._decoded[name]
        decoded = {
            key: _decode(section, self._frozen[key]) for key, section in self._coded[name].sections.items()
        }
        self._decoded[name] = decoded
        while self.cached_bytes > self._cache_bytes and self._decoded:
            self._decoded.popitem(last=False)
        return decoded


def _size(decoded: Mapping[str, _Decoded]) -> int:
    return sum(part.num_bytes for part in decoded.values())


def _decode(section: bytes, weight: Tensor) -> _Decoded:
    bits = codec.decode(section, weight.numel())
    ones = int(np.count_nonzero(bits))
    rare = ones < bits.size - ones
    if min(ones, bits.size - ones) * _SPARSE <= bits.size and bits.size < 2**31:
        places = torch.from_numpy(np.flatnonzero(bits == rare).astype(np.int32)).to(weight.device)
        return _Decoded(places, rare, None, places.numel() * 4)
    packed = torch.from_numpy(np.packbits(bits)).to(weight.device)
    return _Decoded(None, rare, packed, packed.numel())


def _write(theta: Tensor, weight: Tensor, decoded: _Decoded, scales: list[Tensor]) -> None:
    """theta = a * W * M in place."""
    for part, source, scale in zip(theta.chunk(len(scales)), weight.chunk(len(scales)), scales, strict=True):
        torch.mul(source, scale, out=part)
    flat = theta.view(-1)
    if decoded.packed is not None:
        bits = (decoded.packed[:, None] >> torch.arange(7, -1, -1, device=theta.device)) & 1
        flat.mul_(bits.view(-1)[: flat.numel()].to(flat.dtype))
    elif decoded.places is not None and decoded.rare:
        places = decoded.places.long()
        values = flat[places]
        flat.zero_()
        flat[places] = values
    elif decoded.places is not None:
        flat.index_fill_(0, decoded.places.long(), 0.0)
