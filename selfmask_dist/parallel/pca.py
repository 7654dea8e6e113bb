"""Principal components from summed moments: one pass over the data, and no rank ever holds all of it.

    mean = 1/n sum x        C = 1/(n - 1) sum (x - mean)(x - mean)^T        C v_i = lambda_i v_i
    transform(x) = (x - mean) V,  whitened: component i divided by sqrt(lambda_i)

The moments are float64 and taken around the mean of every rank's first chunk, so a mean that is large beside
the deviation costs no digits. A component's sign is the one that makes its largest entry positive, as
scikit-learn has it. The memory is that of a (dim, dim) matrix, however many samples there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]  # sums a tensor over all ranks and returns the sum

_BLOCK_BYTES = 32 * 2**20
_EPS = torch.finfo(torch.float64).eps


def alone(tensor: Tensor) -> Tensor:
    """Return the tensor itself: the `all_reduce` of a single process."""
    return tensor


def row_blocks(tensor: Tensor, width: int) -> Iterator[Tensor]:
    """Yield `tensor` in blocks of rows such that (rows, width) float64 takes at most 32 MiB."""
    return iter(tensor.split(max(1, _BLOCK_BYTES // (8 * width))))


@dataclass(frozen=True, eq=False)
class PCA:
    """The first principal components of a data set.

    mean: (dim,). components: (num_components, dim), orthonormal rows. explained_variance: (num_components,),
    the lambda_i, largest first. All float64. num_samples: what it was fitted on.
    """

    mean: Tensor
    components: Tensor
    explained_variance: Tensor
    num_samples: int

    @property
    def rank(self) -> int:
        """How many of the components have a variance that is more than rounding."""
        floor = 10 * len(self.mean) * _EPS * self.explained_variance[0]
        return int((self.explained_variance > floor).sum())

    def truncated(self, num_components: int) -> PCA:
        """Return its first `num_components` components."""
        return replace(
            self,
            components=self.components[:num_components].clone(),
            explained_variance=self.explained_variance[:num_components].clone(),
        )

    def transform(self, samples: Tensor, *, whiten: bool) -> Tensor:
        """Return components (n, num_components) of `samples` (n, dim); whitened ones have variance 1 in the
        data of the fit. Computed in float64, returned as float64 for float64 samples and else as float32.

        Raises ValueError where whitening would blow up rounding: a component without variance.
        """
        if samples.ndim != 2 or samples.shape[1] != len(self.mean):
            raise ValueError(f"the PCA was fitted on (n, {len(self.mean)}), got {tuple(samples.shape)}")
        projection = self.components.T
        if whiten:
            self.check_whitening()
            projection = projection / self.explained_variance.sqrt()
        dtype = torch.float64 if samples.dtype == torch.float64 else torch.float32
        result = samples.new_empty(len(samples), projection.shape[1], dtype=dtype)
        start = 0
        for block in row_blocks(samples, len(self.mean)):
            result[start : start + len(block)] = (block.double() - self.mean) @ projection
            start += len(block)
        return result

    def check_whitening(self) -> None:
        """Raise ValueError unless every component has a variance to divide by."""
        if self.rank < len(self.explained_variance):
            raise ValueError(
                f"the embeddings span only {self.rank} dimensions, so {len(self.explained_variance)} "
                f"components cannot be whitened; take at most {self.rank}, or more different images"
            )

    def rounded(self) -> PCA:
        """Return it with components as float16 and the rest as float32 hold them; still float64 tensors."""
        return replace(
            self,
            mean=self.mean.float().double(),
            components=self.components.half().double(),
            explained_variance=self.explained_variance.float().double(),
        )

    def to(self, device: torch.device | str) -> PCA:
        """Return the same on another device."""
        return replace(
            self,
            mean=self.mean.to(device),
            components=self.components.to(device),
            explained_variance=self.explained_variance.to(device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return everything, by name; `from_tensors` makes the same PCA of it."""
        return {
            "mean": self.mean,
            "components": self.components,
            "explained_variance": self.explained_variance,
            "num_samples": torch.tensor(self.num_samples),
        }

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> PCA:
        """Return the PCA that `tensors()` was asked of."""
        return PCA(
            tensors["mean"],
            tensors["components"],
            tensors["explained_variance"],
            int(tensors["num_samples"]),
        )


def fit_pca(
    chunks: Iterable[Tensor], *, num_components: int, all_reduce: AllReduce = alone, at_most: bool = False
) -> PCA:
    """Return the first `num_components` principal components of all ranks' chunks (n, dim) of any float type.

    Collective if `all_reduce` is: every rank gives at least one chunk, of no rows where it has no samples.
    Ranks get equal results where their hardware is alike.

    Args:
        at_most: take fewer components where the samples span fewer dimensions, instead of raising.

    Raises:
        ValueError: on every rank alike, for NaN, samples that do not vary, or fewer samples or dimensions
            than components.
    """
    num_samples, mean, covariance = _moments(chunks, all_reduce)
    if num_components < 1:
        raise ValueError(f"num_components is {num_components}; it must be at least 1")
    if not at_most and num_components > min(num_samples, len(mean)):
        raise ValueError(
            f"PCA to {num_components} components needs as many samples and dimensions, got {num_samples} "
            f"samples of {len(mean)} dimensions; take at most {min(num_samples, len(mean))} components"
        )
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1).T
    if values[0] <= (len(mean) * _EPS * mean.abs().max()) ** 2:
        raise ValueError(
            f"all {num_samples} embeddings are the same vector, so they have no components; the encoder may "
            "have collapsed"
        )
    largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
    pca = PCA(mean, vectors * largest.sign(), values, num_samples)
    return pca.truncated(min(num_components, pca.rank) if at_most else num_components)


def _moments(chunks: Iterable[Tensor], all_reduce: AllReduce) -> tuple[int, Tensor, Tensor]:
    """Return number, mean (dim,) and covariance (dim, dim) of all ranks' samples."""
    iterator = iter(chunks)
    chunk = next(iterator, None)
    if chunk is None:
        raise ValueError("no chunk of samples: a rank without samples gives one of shape (0, dim)")
    if chunk.ndim != 2 or chunk.shape[1] == 0:
        raise ValueError(f"a chunk must be a matrix (samples, dim), got shape {tuple(chunk.shape)}")
    dim = chunk.shape[1]
    first = chunk.new_zeros(dim + 2, dtype=torch.float64)  # sum of the shifted samples, bad rows, rows
    first[:dim], first[-1] = chunk.sum(dim=0, dtype=torch.float64), len(chunk)
    first = all_reduce(first)
    shift = first[:dim] / first[-1].clamp(min=1)

    first = torch.zeros_like(first)
    second = first.new_zeros(dim, dim)
    while chunk is not None:
        if chunk.shape[1:] != (dim,):
            raise ValueError(f"chunks differ: (n, {dim}) and {tuple(chunk.shape)}")
        for block in row_blocks(chunk, dim):
            shifted = block.double() - shift
            second.addmm_(shifted.T, shifted)
            first[:dim] += shifted.sum(dim=0)
            first[dim] += (~block.isfinite()).any(dim=1).sum()
            first[-1] += len(block)
        chunk = next(iterator, None)
    # the errors come after the sums, so that they come on every rank and none is left waiting
    first, second = all_reduce(first), all_reduce(second)
    num_bad, num_samples = int(first[dim]), int(first[-1])
    if num_bad:
        raise ValueError(f"{num_bad} of {num_samples} embeddings hold NaN or infinity")
    if num_samples < 2:
        raise ValueError(f"PCA needs at least two samples, got {num_samples}")
    delta = first[:dim] / num_samples
    covariance = second.sub_(num_samples * torch.outer(delta, delta)).div_(num_samples - 1)
    return num_samples, shift + delta, covariance
