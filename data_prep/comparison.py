"""What splits have in common and should not: the same picture twice, or a class that nothing trains.

Knows what was written, and not how. Pictures are compared by a digest of their bytes as they stand in the
tars, so that a copy under another name is found and two encodings of one picture are not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from selfmask_dist.common.text import some

# of each picture: a digest of its bytes, its class (None without a label) and its path in the source
Contents = Sequence[tuple[str, str | None, str]]


def notes_on_split(contents: Contents) -> list[str]:
    """Return notes on pictures that a split holds more than once, apart for those with several labels."""
    groups: dict[str, list[tuple[str | None, str]]] = defaultdict(list)
    for digest, class_name, name in contents:
        groups[digest].append((class_name, name))
    repeated = [group for group in groups.values() if len(group) > 1]
    several = [group for group in repeated if len({class_name for class_name, _ in group}) > 1]
    once = [group for group in repeated if len({class_name for class_name, _ in group}) == 1]
    notes = []
    if several:
        shown = [" and ".join(f"{name} ({label})" for label, name in group[:3]) for group in several]
        notes.append(f"{len(several)} pictures are there under several labels, byte for byte: {some(shown)}")
    if once:
        shown = [" and ".join(name for _, name in group[:3]) for group in once]
        notes.append(f"{len(once)} pictures are there more than once, byte for byte: {some(shown)}")
    return notes


def notes_on_pair(contents: Contents, other: str, others: Contents) -> list[str]:
    """Return notes on pictures of a split that another one holds too."""
    there = {digest: (class_name, name) for digest, class_name, name in others}
    shared = [(name, label, *there[digest]) for digest, label, name in contents if digest in there]
    if not shared:
        return []
    relabelled = sum(label != label_there for _, label, label_there, _ in shared)
    shown = [f"{name} is {name_there}" for name, _, _, name_there in shared]
    under = f", {relabelled} of them under another label" if relabelled else ""
    return [
        f"{len(shared)} of {len(contents)} pictures are in {other} too, byte for byte{under}: {some(shown)}"
    ]


def notes_on_classes(contents: Contents, trained: Iterable[str | None]) -> list[str]:
    """Return a note that names the classes which have pictures here and none in the training split."""
    counts = Counter(class_name for _, class_name, _ in contents if class_name is not None)
    untrained = sorted(counts.keys() - set(trained))
    if not untrained:
        return []
    pictures = sum(counts[name] for name in untrained)
    return [
        f"{len(untrained)} of {len(counts)} classes, with {pictures} pictures, have none in the training"
        f" split: {some(untrained)}"
    ]
