"""A model's tensors under the names of another library, cut and joined as that library has them.

    for found in translations(names of timm, tensors of transformers' model):
        found.read(held)["blocks.0.attn.qkv.weight"]     q, k and v of the model, one below the other

Values, and so fingerprints, are those that the other library's model holds. Knows tensors and `dialects`;
nothing of masks or files.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from selfmask_dist.backbones.libraries.dialects import DIALECTS, Dialect
from selfmask_dist.common.tensor_names import plain


@dataclass(frozen=True)
class TensorPiece:
    """Part `number` of `count` equal ones, along the first dimension, of the model's tensor `name`."""

    name: str
    number: int
    count: int

    def of(self, held: Mapping[str, Tensor]) -> Tensor:
        """Return a view of that part."""
        whole = held[self.name]
        return whole if self.count == 1 else whole.chunk(self.count)[self.number]


@dataclass(frozen=True)
class Translation:
    """Where other names lie in a model.

    source, target: what the names' dialect is called, and the model's.
    pieces: by each of the names, what of the model lies in it, one below the other.
    """

    source: str
    target: str
    pieces: dict[str, tuple[TensorPiece, ...]]

    def read(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's tensors under the other names; where they are cut otherwise, copies."""
        found = {}
        for name, pieces in self.pieces.items():
            parts = [piece.of(held) for piece in pieces]
            found[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found

    def write(self, held: Mapping[str, Tensor], name: str, tensor: Tensor) -> None:
        """Write what lies under one of the other names into the model's tensors, in place."""
        pieces = self.pieces[name]
        for piece, part in zip(pieces, tensor.chunk(len(pieces)), strict=True):
            piece.of(held).copy_(part)


def translations(names: Collection[str], held: Mapping[str, Tensor]) -> Iterator[Translation]:
    """Yield each way in which parameters of another library lie in a model's tensors; often none.

    Names decide alone: whether shapes and values fit is for the caller to look at.

    Args:
        names: of the other library, with or without what stands before them all.
        held: the model's tensors by their names.
    """
    models = [(dialect, atoms) for dialect in DIALECTS for atoms in _atoms_in(held, dialect)]
    for dialect in reversed(DIALECTS):  # SwiGLU in one before what would take one half for the whole
        wanted = _atoms_of(names, dialect)
        if wanted is None:
            continue
        for own, places in models:
            if own is not dialect and all(atom in places for atoms in wanted.values() for atom in atoms):
                pieces = {name: _joined(atoms, places) for name, atoms in wanted.items()}
                yield Translation(dialect.name, own.name, pieces)


def _atoms_of(names: Collection[str], dialect: Dialect) -> dict[str, tuple[str, ...]] | None:
    """Return the atoms of each name; None where one is not of the dialect, or they are of two models."""
    parsed = {name: dialect.parse(plain(name)) for name in names}
    found = {name: one for name, one in parsed.items() if one is not None}
    if len(found) < len(parsed) or len({prefix for prefix, _ in found.values()}) != 1:
        return None
    return {name: atoms for name, (_, atoms) in found.items()}


def _atoms_in(held: Mapping[str, Tensor], dialect: Dialect) -> list[dict[str, TensorPiece]]:
    """Return where each atom lies, for every model of the dialect among the tensors."""
    models: dict[str, dict[str, TensorPiece]] = {}
    for name, tensor in held.items():
        parsed = dialect.parse(plain(name))
        if parsed is None:
            continue
        prefix, atoms = parsed
        if len(atoms) == 1 or (tensor.ndim and len(tensor) % len(atoms) == 0):
            places = models.setdefault(prefix, {})
            places |= {atom: TensorPiece(name, number, len(atoms)) for number, atom in enumerate(atoms)}
    return list(models.values())


def _joined(atoms: tuple[str, ...], places: Mapping[str, TensorPiece]) -> tuple[TensorPiece, ...]:
    """Return the pieces of these atoms; the whole tensor where they are all of one, in its order."""
    pieces = tuple(places[atom] for atom in atoms)
    if pieces == tuple(TensorPiece(pieces[0].name, number, len(pieces)) for number in range(len(pieces))):
        return (TensorPiece(pieces[0].name, 0, 1),)
    return pieces
