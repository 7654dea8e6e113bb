"""Block movement pruning (Lagunas, Charlaix, Sanh, Rush 2021, arXiv 2109.04838).

Each block of weights has one score, so that whole blocks, rows or heads go and the network can be made
smaller.

    M = 1[block's S among the v largest of the tensor's]        theta = W * M
    dL/dS = sum over the block of G * W                         dL/dW = G * M

A tensor is seen as a matrix of its first dimension by all others; blocks of `block_rows` by `block_columns`
lie from its first corner, and 0 means all of that side. A head of a transformer is a block of its rows in q,
k and v (with `split_qkv`) and all columns. Scores are few, and the same on all ranks.
"""

from typing import ClassVar

import torch
from torch import Tensor

from selfmask_dist.masking.families.base import Family, FamilyOptions
from selfmask_dist.masking.families.movement import write_kept
from selfmask_dist.masking.pieces import Segment


def grid_of(shape: torch.Size, block: tuple[int, int]) -> tuple[int, int]:
    """Return how many blocks lie along the rows and the columns of a tensor of `shape`."""
    rows, columns = shape[0], shape[1:].numel()
    return -(-rows // block[0]), -(-columns // block[1])


def expand(grid: Tensor, block: tuple[int, int], first_row: int, shape: torch.Size) -> Tensor:
    """Return the block's value for each element of a piece, whose first row in its tensor is `first_row`."""
    rows = torch.arange(first_row, first_row + shape[0], device=grid.device) // block[0]
    columns = torch.arange(shape[1:].numel(), device=grid.device) // block[1]
    return grid[rows][:, columns].view(shape)


def sum_blocks(values: Tensor, block: tuple[int, int], first_row: int, grid: tuple[int, int]) -> Tensor:
    """Return the sums over blocks of a piece that begins with row `first_row`: of shape `grid`, elsewhere 0.

    Padded and folded, not scattered: the order of addition is the same in every run.
    """
    flat = values.reshape(len(values), values.shape[1:].numel())
    front = first_row % block[0]
    tall = -(-(front + len(flat)) // block[0])
    below = tall * block[0] - front - len(flat)
    padded = torch.nn.functional.pad(flat, (0, grid[1] * block[1] - flat.shape[1], front, below))
    sums = padded.view(tall, block[0], grid[1], block[1]).sum(dim=(1, 3))
    out = values.new_zeros(grid)
    first = first_row // block[0]
    out[first : first + tall] = sums[: grid[0] - first]
    return out


class BlockMovement(Family):
    """Hard block movement; `numbers` are the blocks' scores."""

    name: ClassVar[str] = "block_movement"
    form: ClassVar[str] = "values"
    is_mask: ClassVar[bool] = False
    trains_scores: ClassVar[bool] = False
    trains_weight: ClassVar[bool] = True

    def __init__(self, options: FamilyOptions | None = None) -> None:
        super().__init__(options)
        if self.options.keep_scope == "global":
            raise ValueError("block_movement ranks the blocks of one tensor; set mask.keep_scope=tensor")

    @property
    def is_scaled(self) -> bool:
        return False

    @property
    def has_back_sums(self) -> bool:
        return True

    def block(self, shape: torch.Size) -> tuple[int, int]:
        """Return the rows and columns of a block in a tensor of `shape`."""
        rows, columns = max(shape[0], 1), max(shape[1:].numel(), 1)
        return min(self.options.block_rows or rows, rows), min(self.options.block_columns or columns, columns)

    def first_numbers(self, shape: torch.Size, weight: Tensor) -> Tensor:
        rows, columns = grid_of(shape, self.block(shape))
        return weight.new_zeros(rows * columns, dtype=torch.promote_types(weight.dtype, torch.float32))

    def grid(self, segment: Segment) -> Tensor:
        """Return which blocks of the whole tensor are kept, bool, 2-D; ties go to the first."""
        assert segment.numbers is not None
        count = max(round(self.share(segment.whole.step) * len(segment.numbers)), 1)
        order = segment.numbers.sort(descending=True, stable=True).indices
        kept = torch.zeros_like(segment.numbers, dtype=torch.bool)
        kept[order[:count]] = True
        return kept.view(grid_of(segment.whole.shape, self.block(segment.whole.shape)))

    def mask(self, segment: Segment) -> Tensor:
        return expand(
            self.grid(segment), self.block(segment.whole.shape), first_row(segment), segment.weight.shape
        )

    def write(self, segment: Segment) -> Tensor:
        return write_kept(segment, self.mask(segment))

    def finish(self, segment: Segment) -> None:
        pass

    def back_sums(self, segment: Segment, grad: Tensor) -> Tensor:
        shape = segment.whole.shape
        block = self.block(shape)
        products = grad.double() * segment.weight
        return sum_blocks(products, block, first_row(segment), grid_of(shape, block)).view(-1)

    def pull_back_weight(self, segment: Segment, grad: Tensor, back: Tensor | None, out: Tensor) -> None:
        torch.mul(grad.to(out.dtype), self.mask(segment), out=out)

    def pull_back_numbers(self, segment: Segment, back: Tensor | None, out: Tensor) -> None:
        assert back is not None
        out.copy_(back)


def first_row(segment: Segment) -> int:
    """Return which row of the whole tensor the piece begins with; pieces are whole rows."""
    return segment.start // max(segment.whole.shape[1:].numel(), 1)
