"""Names of one model's tensors, compared without what wrappers put in front of them or between.

`torch.compile`, DistributedDataParallel, FSDP, activation checkpointing and PEFT keep a model under a name of
their own, and so does any module that holds it as an attribute. `plain` drops the wrappers that are known by
name; `placements` finds a model's names inside another's, however deep it lies.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

# wherever they stand: a block, or one layer, may be wrapped by itself
_WRAPPERS = frozenset(
    (
        "module",  # DataParallel, DistributedDataParallel, AveragedModel
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "base_layer",  # PEFT, around one layer
    )
)
_PEFT = "base_model.model."


def plain(name: str) -> str:
    """Return a tensor's name without the wrappers' parts of it; `module.blocks.0.w` gives `blocks.0.w`."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts).removeprefix(_PEFT) or name


def plain_names(names: Collection[str]) -> dict[str, str]:
    """Return {name: plain name}; every name as it is where two of them would become one."""
    found = {name: plain(name) for name in names}
    return found if len(set(found.values())) == len(found) else {name: name for name in names}


@dataclass(frozen=True)
class Placement:
    """One way in which a model's names lie among others: without `cut` in front, below `prefix`."""

    held: Mapping[str, Sequence[str]] = field(repr=False)  # names as they are, by their plain form
    exact: frozenset[str] = field(repr=False)
    cut: str = ""
    prefix: str = ""
    is_raw: bool = False

    def find(self, name: str) -> str | None:
        """Return the name among the others, or None where it is not there, or there more than once."""
        if self.is_raw and name in self.exact:
            return name
        found = self.held.get(self.prefix + plain(name).removeprefix(self.cut), ())
        return found[0] if len(found) == 1 else None


def placements(names: Sequence[str], held: Iterable[str]) -> list[Placement]:
    """Return every way in which all of `names` lie in `held`; none, or several, is for the caller to judge.

    Names that are there as they are come alone. Otherwise the fewest leading parts of `names` are taken off
    with which they are found: a mask of `backbone.blocks.0.w` fits a model with `blocks.0.w`.
    """
    exact = frozenset(held)
    table: dict[str, list[str]] = {}
    for name in exact:
        table.setdefault(plain(name), []).append(name)
    if not names:
        return []
    if all(name in exact for name in names):
        return [Placement(table, exact, is_raw=True)]
    wanted = [plain(name) for name in names]
    for cut in _leading(wanted):
        tails = [name.removeprefix(cut) for name in wanted]
        prefixes = [
            key.removesuffix(tails[0]) for key in table if key == tails[0] or key.endswith(f".{tails[0]}")
        ]
        found = [
            Placement(table, exact, cut, prefix)
            for prefix in sorted(prefixes)
            if all(len(table.get(prefix + tail, ())) == 1 for tail in tails)
        ]
        if found:
            return [placement for placement in found if not placement.prefix] or found
    return []


def _leading(names: Sequence[str]) -> list[str]:
    """Return what may be taken off in front of all names, the shortest first; never a numbered block."""
    cuts = [""]
    for part in names[0].split(".")[:-2]:
        longer = f"{cuts[-1]}{part}."
        if part.isdigit() or not all(name.startswith(longer) for name in names):
            break
        cuts.append(longer)
    return cuts


def renamed(given: Collection[str], names: Sequence[str]) -> dict[str, str]:
    """Return {name of `given`: name of `names`} where they fit in one way; else names stay as they are.

    Names that `names` has not are left as they are too, for the caller to report.
    """
    found = placements(names, given)
    places = {found[0].find(name): name for name in names} if len(found) == 1 else {}
    return {name: places.get(name, name) for name in given}
