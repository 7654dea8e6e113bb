"""A cascade on one backbone: dispatcher, router, experts and combinations, in one file and in use.

    cascade = load_cascade("cascade.mask", encoder)
    cascade.embed(images, mode="conditional")       # two forwards for each image, grouped by expert

Its masks are put on by a `MaskBank`, which may hold others too. Knows nothing of training, files' layout or
process groups.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfmask_dist import maskfile
from selfmask_dist.cascade import MODES, Combination, Router
from selfmask_dist.common.names import DISPATCHER, ROUTER, expert
from selfmask_dist.maskfile import Mask, MaskFile, MaskFileError
from selfmask_dist.maskfile.bank import MaskBank
from selfmask_dist.maskfile.rows import StoredMask


@dataclass(frozen=True)
class Route:
    """Where the router sent an image. expert: its number. shares: of each expert's cluster, summing to 1."""

    expert: int
    shares: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {"expert": self.expert, "shares": list(self.shares)}


class Cascade:
    """See the module's docstring. Made by `load_cascade`.

    Attributes:
        router: dispatcher's embeddings -> cluster.
        combinations: by mode: `conditional`, `unconditional` and what else the run made.

    Args:
        encode: (name of a mask, images) -> embeddings (n, dim) under it.
    """

    def __init__(
        self,
        encode: Callable[[str, Tensor], Tensor],
        router: Router,
        combinations: Mapping[str, Combination],
    ) -> None:
        self.router = router
        self.combinations = dict(combinations)
        self._encode_under = encode

    @torch.no_grad()
    def embed(self, images: Tensor, *, mode: str = "conditional") -> Tensor:
        """Return embeddings (n, dim) of images (n, 3, H, W), on their device.

        Args:
            mode: `conditional`: dispatcher and the expert that the router chose, two forwards an image.
                `unconditional`: all experts. `dispatcher`: its embedding alone. Others that the file has:
                `cascade.MODES`.

        Raises:
            ValueError: another mode.
        """
        self._check(mode)
        features = self._encode(DISPATCHER, images)
        if mode == DISPATCHER:
            return features
        return self._combined(images, features, self.router.to(images.device).assign(features), mode)

    @torch.no_grad()
    def routed(self, images: Tensor, *, mode: str = "conditional") -> tuple[Tensor, list[Route]]:
        """Return the embeddings (n, dim) of `embed`, and where the router sent each image.

        The shares are the router's probabilities: zeros and ones where it is k-means. In modes that use all
        experts the route says which cluster an image is nearest to.

        Raises:
            ValueError: another mode.
        """
        self._check(mode)
        features = self._encode(DISPATCHER, images)
        router = self.router.to(images.device)
        clusters = router.assign(features)
        routes = [
            Route(expert, tuple(shares))
            for expert, shares in zip(clusters.tolist(), router.probabilities(features).tolist(), strict=True)
        ]
        if mode == DISPATCHER:
            return features, routes
        return self._combined(images, features, clusters, mode), routes

    def _check(self, mode: str) -> None:
        if mode not in (*self.combinations, DISPATCHER):
            known = ", ".join((*self.combinations, DISPATCHER))
            raise ValueError(f"this cascade has no mode {mode!r}; it has {known}")

    def _combined(self, images: Tensor, features: Tensor, clusters: Tensor, mode: str) -> Tensor:
        """Return the embeddings of a mode, of the dispatcher's and the clusters (n,)."""
        combination = self.combinations[mode].to(images.device)
        if combination.needs_all_experts:
            experts = [self._encode(expert(k), images) for k in range(self.router.num_clusters)]
            return combination.transform(features, experts, clusters)
        chosen = torch.empty_like(features)
        for k in clusters.unique().tolist():
            rows = (clusters == k).nonzero().flatten()
            chosen[rows] = self._encode(expert(k), images[rows])
        return combination.transform(features, chosen, clusters)

    @torch.no_grad()
    def route(self, images: Tensor) -> Tensor:
        """Return the cluster (n,) int64 of each image."""
        return self.router.to(images.device).assign(self._encode(DISPATCHER, images))

    def _encode(self, name: str, images: Tensor) -> Tensor:
        return self._encode_under(name, images).float()


def save_cascade(
    path: str | Path,
    masks: Mapping[str, Mask] | Mapping[str, StoredMask],
    router: Router,
    combinations: Mapping[str, Combination],
    **about: Any,
) -> int:
    """Write a cascade to one mask file and return its bytes.

    Experts are stored as flips of the dispatcher's bits where that is smaller, combinations as
    `Combination.rounded` has them.

    Args:
        masks: those that lie in files are decoded, and coded again, one parameter at a time.
        about: of `MaskFile`: backbone, backbone_fingerprint, preprocessing, metrics.
    """
    parts = {name: mask for name, mask in masks.items() if isinstance(mask, StoredMask)}
    shells = {
        name: mask.without_bits() if isinstance(mask, StoredMask) else mask for name, mask in masks.items()
    }
    ordered = {DISPATCHER: shells[DISPATCHER]} | {
        name: replace(mask, against=DISPATCHER) for name, mask in shells.items() if name != DISPATCHER
    }
    tensors = {f"{ROUTER}.{name}": tensor for name, tensor in router.tensors().items()}
    for mode, combination in combinations.items():
        for name, tensor in combination.tensors().items():
            # its matrix is the largest part of the file
            small = tensor.half() if name == "pca.components" else tensor.float()
            tensors[f"{mode}.{name}"] = small if tensor.dtype == torch.float64 else tensor
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    return maskfile.write_mask_file(path, MaskFile(masks=ordered, tensors=tensors, **about), parts=parts)


def load_cascade(path: str | Path, backbone: nn.Module | MaskBank, *, name: str = "cascade") -> Cascade:
    """Return a cascade from its file, on a backbone with the frozen weights (a timm or open_clip encoder).

    Args:
        backbone: or a bank, which takes the masks in as `NAME/dispatcher`, `NAME/expert-0`, ...

    Raises:
        MaskFileError: the file is damaged, holds no cascade, or does not fit the backbone.
        ValueError: the bank has masks of these names; it is left as it was.
    """
    masks, router, combinations = read_cascade(path)
    bank = backbone if isinstance(backbone, MaskBank) else MaskBank(backbone)
    added: list[str] = []
    try:
        for part, mask in masks.items():
            bank.add(f"{name}/{part}", mask)
            added.append(f"{name}/{part}")
    except ValueError:
        for key in added:
            bank.remove(key)
        raise
    return Cascade(lambda part, images: bank.embed(images, f"{name}/{part}"), router, combinations)


def modes_of(file: MaskFile) -> list[str]:
    """Return the modes of the combinations that a cascade's file holds."""
    parts = dict.fromkeys(name.partition(".")[0] for name in file.tensors)
    return [part for part in parts if part in MODES]


def read_cascade(path: str | Path) -> tuple[dict[str, Mask], Router, dict[str, Combination]]:
    """Return masks by name, router and combinations by mode of a cascade's file.

    Raises:
        MaskFileError: the file is damaged, or holds no cascade.
    """
    file = maskfile.read_mask_file(path)
    return file.masks, *read_router(file, file.masks, path)


def read_router(
    file: MaskFile, masks: Collection[str], path: str | Path
) -> tuple[Router, dict[str, Combination]]:
    """Return router and combinations by mode of a cascade's file.

    Args:
        file: without its masks, perhaps, whose names are `masks`.

    Raises:
        MaskFileError: the file holds no cascade.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor.double() if tensor.is_floating_point() else tensor
    if ROUTER not in parts or DISPATCHER not in masks:
        raise MaskFileError(f"{path} holds {', '.join(masks)} and no router: it is no cascade")
    router = Router.from_tensors(parts.pop(ROUTER))
    missing = [k for k in range(router.num_clusters) if expert(k) not in masks]
    if missing:
        raise MaskFileError(f"{path} lacks the masks of experts {missing}")
    combinations = {mode: Combination.from_tensors(tensors) for mode, tensors in parts.items()}
    return router, combinations
