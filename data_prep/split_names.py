"""Names of splits and of classes as people write them, and what is done where two of them may be one.

Knows neither folders nor lists.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable

from selfmask_dist.common.class_names import normal_name, similar_names, similar_text

_SYNONYMS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
SPLIT_OF = {synonym: split for split, synonyms in _SYNONYMS.items() for synonym in synonyms}


def split_of(name: str) -> str | None:
    """Return train, val or test for a name that means it, in any case; None for another name."""
    return SPLIT_OF.get(normal_name(name).casefold())


def resembles_split(name: str) -> str | None:
    """Return train, val or test for a name that one of their words is in, such as train2017 or Test Set.

    Such a name may be a class's as well: a test tube. None where there is none, or where it is one exactly.
    """
    words = re.findall(r"[a-z]+", normal_name(name).casefold())
    meant = [SPLIT_OF.get(word.removesuffix("set"), SPLIT_OF.get(word)) for word in words]
    return next((split for split in meant if split is not None), None)


def misspelt_split(name: str) -> str | None:
    """Return the usual name of a split that another one is nearly spelt like; None where it is not."""
    if split_of(name) is not None:
        return None
    return next(iter(difflib.get_close_matches(name.casefold(), SPLIT_OF, n=1, cutoff=0.8)), None)


def settle_classes(
    found: Iterable[str], similar: str, *, order: Iterable[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Return the class that each written name stands for, and notes on names that were joined.

    Args:
        found: names as they are written, most important first.
        order: names that a published list of classes has; it decides that what it lists apart is apart.
        similar: what names are that differ by case or the like: "refuse", "merge" or "keep".

    Raises:
        ValueError: such names are there and `similar` is "refuse", or a name is empty.
    """
    order = list(order)
    written = list(dict.fromkeys([*order, *found]))
    class_of = {name: normal_name(name) for name in written}
    if "" in class_of.values():
        raise ValueError("a class has an empty name; name it, or leave its pictures out")
    if bad := [name for name in written if any(unicodedata.category(sign) == "Cc" for sign in name)]:
        raise ValueError(f"the name of a class has a line break or another control character: {bad[0]!r}")
    notes = []
    joined = [name for name in written if class_of[name] != name]
    if joined:
        shown = similar_text([(name, class_of[name]) for name in joined])
        notes.append(f"names are written in one Unicode form and without blanks around them: {shown}")
    groups = similar_names(class_of.values())
    told_apart = {class_of[name] for name in order}
    if kept := [group for group in groups if similar != "merge" and set(group) <= told_apart]:
        notes.append(f"classes are kept apart, as the list of classes has them: {similar_text(kept)}")
        groups = [group for group in groups if group not in kept]
    if groups and similar == "refuse":
        raise ValueError(
            f"classes have names that look like one ({similar_text(groups)}); rename them, or say what they"
            " are with --similar-classes merge, or keep"
        )
    if groups and similar == "merge":
        first = {name: place for place, name in reversed(list(enumerate(class_of.values())))}
        chosen = {name: min(group, key=lambda one: first[one]) for group in groups for name in group}
        class_of = {name: chosen.get(normal, normal) for name, normal in class_of.items()}
        notes.append(f"classes were joined: {similar_text(groups)}")
    return class_of, notes
