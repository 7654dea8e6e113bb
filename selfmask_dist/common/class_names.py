"""Names of classes as people write them: one form of each, and which of them are probably one class.

Knows no data set. Two spellings of a name are the same name where they differ by Unicode form or by blanks
around it; where they differ by case, by width or by how a number is written, that is for a person to decide.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable


def normal_name(name: str) -> str:
    """Return a class name in Unicode form NFC and without blanks around it, or around the parts of a path."""
    parts = unicodedata.normalize("NFC", name).replace("\ufeff", "").strip().split("/")
    return "/".join(part.strip() for part in parts)


def similar_names(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return every group of different names that look like one class, each group and its names in order.

    Names are alike where they are equal after compatibility normalisation (NFKC), without case, with single
    blanks and without characters that show nothing; numbers also where their values are equal (1, 01, 1.0).
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for name in names:
        groups[_key(name)].add(name)
    return sorted(tuple(sorted(group)) for group in groups.values() if len(group) > 1)


def similar_text(groups: Iterable[tuple[str, ...]]) -> str:
    """Return the groups for a message, the first five of them."""
    shown = [" and ".join(map(repr, group)) for group in groups]
    return "; ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def _key(name: str) -> str:
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    text = " ".join("".join(c for c in text if unicodedata.category(c) != "Cf").split())
    try:
        return f"number {float(text)!r}" if text[-1:].isdigit() and "_" not in text else text
    except ValueError:
        return text
