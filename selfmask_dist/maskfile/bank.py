"""One backbone in memory and many masks of it, each put on in place when it is asked for.

    bank = MaskBank(encoder)
    bank.add("pets", "pets.mask")
    bank.embed(images, ["pets", "birds", None, "pets"])    # each image under its own mask

    coded bits of every mask, as small as its file -> decoded layers, for the masks used last -> theta

Knows nothing of cascades, training, the command line or HTTP.
"""

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import RLock
from typing import NoReturn, SupportsIndex

import torch
from torch import Tensor, nn

from selfmask_dist.common.text import some
from selfmask_dist.maskfile import codec
from selfmask_dist.maskfile.file import read_mask_file
from selfmask_dist.maskfile.fit import fit, warn_of_verdict, weights_of
from selfmask_dist.maskfile.forms import materialize
from selfmask_dist.maskfile.layers import Change, Layer, decoded
from selfmask_dist.maskfile.mask import Mask, MaskFileError
from selfmask_dist.maskfile.rewrite import rewrite
from selfmask_dist.masking import core, marks

CACHE_MIB = 512
_HALF_WRITTEN = object()


@dataclass(frozen=True)
class _Coded:
    """A mask as it waits: coded bits by parameter, and what does not change by coding."""

    sections: dict[str, bytes]
    scales: dict[str, tuple[float, ...]]  # a of each scaled part along the first dimension
    signs: dict[str, bytes]  # of the kept weights, where the kind has any
    rest: Mask  # without bits and signs

    @property
    def statistics(self) -> dict[str, Tensor]:
        return self.rest.statistics

    @property
    def num_bytes(self) -> int:
        arrays = (*self.statistics.values(), *self.rest.scales.values(), *self.rest.values.values())
        sections = (*self.sections.values(), *self.signs.values())
        return sum(tensor.nbytes for tensor in arrays) + sum(map(len, sections))


class MaskBank:
    """See the module's docstring. Several threads may use one bank: one of them has the encoder at a time.

    Args:
        backbone: the encoder with its frozen weights; it is put in eval mode, its parameters are rewritten.
        cache_mib: memory for decoded layers, on the backbone's device; one mask more while it is put on.

    Attributes:
        cached_bytes: what decoded layers take now.
        layers_decoded: how often a layer's bits were decoded so far.
    """

    def __init__(self, backbone: nn.Module, *, cache_mib: float = CACHE_MIB) -> None:
        self._encoder = backbone.eval()
        self._tensors: dict[str, Tensor] = {}  # what masks write, by their names for it
        self._frozen: dict[str, Tensor] = {}
        self._fingerprints: dict[frozenset[str], str] = {}  # of the frozen weights of these names
        self._coded: dict[str, _Coded] = {}
        self._decoded: OrderedDict[str, dict[str, Layer]] = OrderedDict()  # the mask used last at the end
        self._cache_bytes = cache_mib * 2**20
        self.cached_bytes = 0
        self.layers_decoded = 0
        self._current: object = None  # a mask's name, or what is no name
        self._versions: dict[str, int] = {}  # of what masks write, after the last change of masks
        self._is_replaced = False  # by a later bank on the same encoder
        self._changed: list[str] = []  # what others have written to
        self._lock = RLock()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "a MaskBank cannot be copied or pickled, as it holds its encoder and a thread's lock; build "
            "another one on a copy of the encoder (under bank.under(None)) and add the mask files to it"
        )

    @property
    def encoder(self) -> nn.Module:
        """Return the backbone, under whichever mask is on; to compute with it, take `under`."""
        return self._encoder

    def __len__(self) -> int:
        return len(self._coded)

    def __contains__(self, name: str) -> bool:
        return name in self._coded

    @property
    def names(self) -> list[str]:
        """Return the names of the masks, in the order in which they came."""
        return list(self._coded)

    @property
    def num_bytes(self) -> int:
        """Return the bytes that the coded masks take, without the backbone and the decoded ones."""
        return sum(coded.num_bytes for coded in list(self._coded.values()))

    @torch.no_grad()
    def add(self, name: str, mask: Mask | str | Path) -> None:
        """Take a mask in, from memory or from a file that holds one.

        Raises:
            MaskFileError: it does not fit the backbone, the file is damaged or holds several masks.
            ValueError: there is a mask of that name.
        """
        for other in marks.holders(self._encoder):
            if other is not self:
                other.give_up()
        with self._lock:
            if name in self._coded:
                raise ValueError(f"the bank holds a mask {name!r} already; remove it, or take another name")
            self._put(None)
            if not isinstance(mask, Mask):
                file = read_mask_file(mask, weights=weights_of(self._encoder))
                if len(file.masks) != 1:
                    raise MaskFileError(f"{mask} holds the masks {sorted(file.masks)}, not one")
                warn_of_verdict(file, mask)
                mask = next(iter(file.masks.values()))
            known = self._fingerprints.get(frozenset(mask.bits))
            fitting = fit(self._encoder, mask, known=known)
            for key, tensor in fitting.tensors.items():
                if key not in self._frozen:
                    self._tensors[key] = tensor
                    self._frozen[key] = tensor.detach().clone(memory_format=torch.contiguous_format)
                    self._versions[key] = tensor._version
                    if key in mask.bits:
                        held = marks.Held(self, tensor, self._frozen[key], self._what_is_on)
                        marks.hold(self._encoder, fitting.names[key], held)
            self._fingerprints[frozenset(mask.bits)] = fitting.fingerprint
            self._coded[name] = _Coded(
                sections={key: codec.encode(bits.numpy()) for key, bits in mask.bits.items()},
                scales={key: self._scales(mask, key) for key in mask.bits},
                signs={key: codec.encode(signs[mask.bits[key]].numpy()) for key, signs in mask.signs.items()},
                rest=copy.deepcopy(replace(mask, bits={}, signs={})),
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
            self.cached_bytes -= sum(layer.num_bytes for layer in self._decoded.pop(name, {}).values())

    def give_up(self) -> None:
        """Give the encoder back as it is frozen, for another bank; this one says so when it is used again."""
        with self._lock:
            if not self._is_replaced:
                self._put(None)
            self._is_replaced = True

    def forget_decoded(self) -> None:
        """Empty the cache of decoded layers; the mask that is on stays on."""
        with self._lock:
            self._decoded.clear()
            self.cached_bytes = 0

    @contextmanager
    def under(self, name: str | None) -> Iterator[nn.Module]:
        """Yield the encoder under a mask, or as it is frozen; other threads wait until the block ends.

        Raises:
            ValueError: there is no mask of that name.
        """
        with self._lock:
            self._put(name)
            yield self._encoder

    @torch.no_grad()
    def embed(self, images: Tensor, names: str | Sequence[str | None] | None) -> Tensor:
        """Return the embeddings (n, dim) of images (n, 3, H, W) on the backbone's device.

        Args:
            names: the mask of all images, or one for each; None is the frozen backbone. Images under one mask
                go through together.

        Raises:
            ValueError: a mask that is not there (nothing is then computed), not as many names as images, or
                images of another shape, dtype or device than the encoder takes; the encoder was changed.
            TypeError: the images are no tensor.
        """
        self._check_images(images)
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

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images are a {type(images).__name__}; give a tensor (n, 3, H, W)")
        if images.ndim != 4:
            raise ValueError(f"images have shape {tuple(images.shape)}; give (n, 3, H, W), n of them at once")
        own = next((p for p in self._encoder.parameters() if p.is_floating_point()), images)
        fits = images.dtype == own.dtype or torch.is_autocast_enabled(own.device.type)
        if not images.is_floating_point() or not fits or images.device != own.device:
            raise ValueError(
                f"images are {images.dtype} on {images.device}, the encoder is {own.dtype} on {own.device}; "
                f"give it normalised pixels, images.to(device, dtype)"
            )

    # ---- putting a mask on

    def _what_is_on(self) -> str | None:
        if self._current is None:
            return None
        what = f"mask {self._current!r}" if isinstance(self._current, str) else "a mask"
        return f"theta of {what}, which a MaskBank has on (within bank.under(None) it is off)"

    def _check_encoder(self) -> None:
        """Check that the encoder is as this bank left it.

        Raises:
            ValueError: another bank took it over, it was moved or converted, its weights were changed, or
                masks are attached to it.
        """
        if self._is_replaced:
            raise ValueError(
                "another MaskBank was made on this encoder and has taken it over. Use that one, or one bank "
                "for all masks (load_cascade takes a bank too)"
            )
        if self._encoder.training:
            self._encoder.eval()
        changed = []
        for key, tensor in self._tensors.items():
            frozen = self._frozen[key]
            if tensor.dtype != frozen.dtype or tensor.device != frozen.device:
                raise ValueError(
                    f"{key} is {tensor.dtype} on {tensor.device} now and was {frozen.dtype} on "
                    f"{frozen.device} when the bank took its masks: move or convert the encoder first, and "
                    f"make the bank then"
                )
            if tensor._version != self._versions[key] and self._current is not _HALF_WRITTEN:
                changed.append(key)
        self._changed = self._changed or self._find_changed(changed)
        if self._changed:
            raise ValueError(
                f"{some(self._changed)} of the bank's encoder were changed by others: masks are attached to "
                f"it, a state was loaded or an optimizer steps it. Its masks are of other weights; build "
                f"another bank"
            )

    @torch.no_grad()
    def _find_changed(self, written: Sequence[str]) -> list[str]:
        """Return what was written to and has other values: what took its values back may write."""
        if not written:
            return []
        before = {key: self._tensors[key].detach().clone() for key in written}
        self._write(self._current if isinstance(self._current, str) else None)
        changed = [key for key, tensor in before.items() if not torch.equal(self._tensors[key], tensor)]
        for key in changed:
            self._tensors[key].copy_(before[key])
        return changed

    def _note_versions(self) -> None:
        self._versions = {key: tensor._version for key, tensor in self._tensors.items()}

    def _check(self, name: str | None) -> None:
        if name is not None and name not in self._coded:
            known = ", ".join(list(self._coded)[:10]) or "none"
            raise ValueError(f"the bank has no mask {name!r}; it has {known}")

    def _put(self, name: str | None) -> None:
        self._check(name)
        self._check_encoder()
        if name != self._current:
            self._write(name)

    @torch.no_grad()
    def _write(self, name: str | None) -> None:
        coded = None if name is None else self._coded[name]
        written = {} if coded is None else {**coded.sections, **coded.statistics}
        self._current = _HALF_WRITTEN  # were it cut off here, nothing must be taken for what is on
        for key in self._frozen.keys() - written.keys():
            self._tensors[key].copy_(self._frozen[key])
        if coded is not None and name is not None:
            if coded.rest.kind == "threshold":
                rewrite(
                    [
                        Change(self._tensors[key], self._frozen[key], layer, coded.scales[key])
                        for key, layer in self._layers(name, coded).items()
                    ]
                )
            else:
                self._materialize(coded)
            for key, statistic in coded.statistics.items():
                self._tensors[key].copy_(statistic)
        self._note_versions()
        self._current = name

    def _scales(self, mask: Mask, key: str) -> tuple[float, ...]:
        bits, dtype = mask.bits[key], self._frozen[key].dtype
        if not mask.scaled or mask.kind != "threshold":
            return (1.0,)
        parts = bits.chunk(mask.num_segments.get(key, 1))
        return tuple(core.scale_factor(core.count_kept(part), part.numel(), dtype).item() for part in parts)

    def _materialize(self, coded: _Coded) -> None:
        """Write theta of another kind than threshold: decoded anew for each swap, parameter by parameter."""
        for key, section in coded.sections.items():
            weight, signs = self._frozen[key], {}
            bits = torch.from_numpy(codec.decode(section, weight.numel())).view(weight.shape)
            if key in coded.signs:
                kept = codec.decode(coded.signs[key], int(bits.sum()))
                signs[key] = torch.zeros_like(bits).masked_scatter_(bits, torch.from_numpy(kept))
            mask = replace(coded.rest, bits={key: bits}, signs=signs)
            self._tensors[key].copy_(materialize(mask, key, weight))

    def _layers(self, name: str, coded: _Coded) -> dict[str, Layer]:
        """Return a mask's layers, from the cache or decoded into it.

        Where room is short, the mask that was on longest ago gives up its layers one by one and keeps those
        that are not in the way: whole masks would leave room for up to one of them empty.
        """
        kept = self._decoded.setdefault(name, {})
        self._decoded.move_to_end(name)
        for key, section in coded.sections.items():
            if key not in kept:
                weight = self._frozen[key]
                kept[key] = decoded(codec.decode(section, weight.numel()), weight)
                self.cached_bytes += kept[key].num_bytes
                self.layers_decoded += 1
        layers = dict(kept)
        while self.cached_bytes > self._cache_bytes:
            oldest, held = next(iter(self._decoded.items()))
            if held:
                _, layer = held.popitem()
                self.cached_bytes -= layer.num_bytes
            else:
                del self._decoded[oldest]
        return layers
