"""One embedding of the backbone's dimension out of dispatcher D(x) and experts E_1(x) ... E_K(x) (paper 3.4).

    unconditional  e = [D, E_1, ..., E_K]            conditional  e = [D, 0, ..., E_r, ..., 0],  r = router(x)
    embedding      diag(1/s) V^T (e - mean e)

V and s are the first `dim` principal directions and deviations of e over the training samples: the embeddings
go in as the encoder gives them, not normalised; k-NN then normalises the result. The authors divide by the
singular values, which are sqrt(n - 1) s: a constant factor that cosine similarity does not see. Here the
result has variance 1. The paper's other variants have a name each, in `MODES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selfmask_dist.parallel.pca import PCA, AllReduce, alone, fit_pca, row_blocks

# mode -> which experts enter, how they are joined, and what is done to the result
MODES: dict[str, tuple[str, str, str]] = {
    "conditional": ("chosen", "concat", "whitened"),
    "unconditional": ("all", "concat", "whitened"),
    "conditional_pca": ("chosen", "concat", "pca"),
    "unconditional_pca": ("all", "concat", "pca"),
    "conditional_concat": ("chosen", "concat", "as is"),
    "unconditional_concat": ("all", "concat", "as is"),
    "conditional_add": ("chosen", "add", "as is"),
    "unconditional_add": ("all", "add", "as is"),
    "replace": ("chosen", "replace", "as is"),
}

# A chunk of samples: the dispatcher's embeddings (n, dim), the experts', and the router's choice (n,) int64.
# The experts' are K tensors (n, dim), or one tensor (n, dim) that holds each sample's chosen expert alone.
Chunk = tuple[Tensor, "Sequence[Tensor] | Tensor", Tensor]


@dataclass(frozen=True, eq=False)
class Combination:
    """How to combine; `pca` is None for the modes without one."""

    mode: str
    num_experts: int
    dim: int
    pca: PCA | None = None

    @staticmethod
    def fit(
        chunks: Iterable[Chunk], *, mode: str, num_experts: int, all_reduce: AllReduce = alone
    ) -> Combination:
        """Return a combination fitted on the training samples of all ranks, chunk by chunk.

        Collective if `all_reduce` is.

        The dimension stays the backbone's; only where the samples span fewer dimensions (fewer samples than
        dimensions), the result has as many as they span. Memory is that of one chunk and of (dim (1 + K))^2
        numbers, however many chunks there are. A rank without samples gives one chunk of no rows.

        Raises:
            ValueError: an unknown mode, NaN, or embeddings that do not fit together.
        """
        if mode not in MODES:
            raise ValueError(f"combination {mode!r} is unknown; choose from {', '.join(MODES)}")
        iterator = iter(chunks)
        first = next(iterator, None)
        if first is None:
            raise ValueError("no chunk of embeddings: a rank without samples gives one of no rows")
        plain = Combination(mode, num_experts, first[0].shape[1])
        if MODES[mode][2] == "as is":
            return plain

        def joined() -> Iterator[Tensor]:
            yield from plain._joined(*first)
            for chunk in iterator:
                yield from plain._joined(*chunk)

        pca = fit_pca(joined(), num_components=plain.dim, all_reduce=all_reduce, at_most=True)
        return replace(plain, pca=pca)

    @property
    def needs_all_experts(self) -> bool:
        """False where the chosen expert's embedding is enough: two forwards for a sample instead of K + 1."""
        return MODES[self.mode][0] == "all"

    @property
    def output_dim(self) -> int:
        """Dimensions of the combined embedding."""
        if self.pca is not None:
            return len(self.pca.components)
        return self.dim * (1 + self.num_experts) if MODES[self.mode][1] == "concat" else self.dim

    def transform(self, dispatcher: Tensor, experts: Sequence[Tensor] | Tensor, clusters: Tensor) -> Tensor:
        """Return the combined embeddings (n, output_dim), on the device of the inputs.

        Args:
            dispatcher: (n, dim).
            experts: K tensors (n, dim), or one (n, dim) with each sample's chosen expert where
                `needs_all_experts` is False.
            clusters: (n,) int64, the router's choice.
        """
        return torch.cat([self._finish(block) for block in self._joined(dispatcher, experts, clusters)])

    def _finish(self, joined: Tensor) -> Tensor:
        if self.pca is None:
            return joined
        return self.pca.transform(joined, whiten=MODES[self.mode][2] == "whitened")

    def _joined(
        self, dispatcher: Tensor, experts: Sequence[Tensor] | Tensor, clusters: Tensor
    ) -> Iterator[Tensor]:
        """Yield joined embeddings in blocks of rows, so that [D, E_1 ... E_K] never exists whole."""
        self._check(dispatcher, experts, clusters)
        width = self.dim * (1 + self.num_experts)
        rows = len(next(row_blocks(dispatcher, width)))
        for start in range(0, max(1, len(dispatcher)), max(1, rows)):
            part = slice(start, start + rows)
            parts = experts[part] if isinstance(experts, Tensor) else [expert[part] for expert in experts]
            yield self._join(dispatcher[part], parts, clusters[part])

    def _join(self, dispatcher: Tensor, experts: Sequence[Tensor] | Tensor, clusters: Tensor) -> Tensor:
        which, how, _ = MODES[self.mode]
        if which == "all":
            if how == "add":
                return torch.stack([dispatcher, *experts]).sum(dim=0)
            return torch.cat([dispatcher, *experts], dim=1)
        if isinstance(experts, Tensor):
            chosen = experts
        else:
            chosen = torch.stack(list(experts))[clusters, torch.arange(len(clusters), device=clusters.device)]
        if how == "replace":
            return chosen
        if how == "add":
            return dispatcher + chosen
        padded = dispatcher.new_zeros(len(dispatcher), self.num_experts, self.dim)
        padded[torch.arange(len(clusters), device=clusters.device), clusters] = chosen
        return torch.cat([dispatcher, padded.flatten(1)], dim=1)

    def _check(self, dispatcher: Tensor, experts: Sequence[Tensor] | Tensor, clusters: Tensor) -> None:
        shape = (len(dispatcher), self.dim)
        tensors = [experts] if isinstance(experts, Tensor) else list(experts)
        if isinstance(experts, Tensor) and self.needs_all_experts:
            raise ValueError(
                f"{self.mode} needs the embeddings of all {self.num_experts} experts, got one tensor"
            )
        if not isinstance(experts, Tensor) and len(tensors) != self.num_experts:
            raise ValueError(
                f"the combination is of {self.num_experts} experts, got embeddings of {len(tensors)}"
            )
        for tensor in (dispatcher, *tensors):
            if tensor.shape != shape:
                raise ValueError(
                    f"dispatcher and experts must give embeddings {shape}, got {tuple(tensor.shape)}"
                )
        if clusters.shape != shape[:1] or clusters.is_floating_point():
            raise ValueError(
                f"clusters must be {shape[:1]} integers, got {tuple(clusters.shape)} {clusters.dtype}"
            )
        if len(clusters) and not 0 <= int(clusters.min()) <= int(clusters.max()) < self.num_experts:
            raise ValueError(
                f"clusters go from {int(clusters.min())} to {int(clusters.max())}, experts from 0 to "
                f"{self.num_experts - 1}"
            )

    def rounded(self) -> Combination:
        """Return it with components of 11 significant bits, which float16 holds, and the rest as float32.

        That is what a file keeps, so a run's results are of this too.
        """
        if self.pca is None:
            return self
        return replace(self, pca=self.pca.rounded())

    def to(self, device: torch.device | str) -> Combination:
        """Return the same on another device: that of the embeddings it is to be given."""
        return self if self.pca is None else replace(self, pca=self.pca.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Return everything, by name; `from_tensors` makes the same combination of it."""
        pca = {} if self.pca is None else self.pca.tensors()
        return {
            "mode": torch.tensor(list(self.mode.encode()), dtype=torch.uint8),
            "num_experts": torch.tensor(self.num_experts),
            "dim": torch.tensor(self.dim),
            **{f"pca.{name}": tensor for name, tensor in pca.items()},
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Combination:
        """Return the combination that `tensors()` was asked of. Raises ValueError for an unknown mode."""
        mode = bytes(tensors["mode"].tolist()).decode()
        if mode not in MODES:
            raise ValueError(f"combination {mode!r} is unknown; choose from {', '.join(MODES)}")
        pca = {
            name.removeprefix("pca."): tensor for name, tensor in tensors.items() if name.startswith("pca.")
        }
        return Combination(
            mode, int(tensors["num_experts"]), int(tensors["dim"]), PCA.from_tensors(pca) if pca else None
        )
