"""Whole models in a mask file: the header's key `models`, and arrays behind all other sections.

A file without the key has the same bytes as before there was one, and taking the key off a file gives back
the file that was written without it, bit for bit. A reader that does not know the key passes it over.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfmask_dist.maskfile import container
from selfmask_dist.maskfile.container import Container, Sections
from selfmask_dist.maskfile.mask import MaskFileError
from selfmask_dist.maskfile.model.part import PARTS, Head, Model

KEY = "models"
MAX_TEXT = 1000  # characters of a class's name, and of each other text
MAX_SETTINGS = 10_000  # characters of the backbone's settings, as JSON
_MAX_PROVENANCE = 50  # texts


def describe(models: Mapping[str, Model], sections: Sections) -> dict[str, Any]:
    """Add the heads' arrays to the sections and return the header's entry.

    Raises:
        MaskFileError: a text is longer than a reader takes.
    """
    found = {}
    for name, model in models.items():
        head = model.head
        found[name] = {
            "head": None
            if head is None
            else {
                "kind": head.kind,
                "norm": head.norm,
                "scale": head.scale,
                **({} if head.target == "class" else {"target": head.target}),
                "arrays": [
                    container.describe_array(key, tensor.cpu(), sections)
                    for key, tensor in head.tensors().items()
                ],
            },
            "classes": list(model.classes),
            "backbone": model.backbone,
            "pooling": model.pooling,
            "licence": model.licence,
            "provenance": model.provenance,
        }
        try:
            _check_texts(found[name])
        except ValueError as error:
            raise MaskFileError(f"the model {name!r} cannot be stored: {error}") from error
    return found


def entries(header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the header's descriptions of all arrays of models."""
    heads = [model["head"] for model in header.get(KEY, {}).values()]
    return [entry for head in heads if head is not None for entry in head["arrays"]]


def parse(whole: Container) -> dict[str, Model]:
    """Return the models of an open file by name.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: what the header states cannot be.
    """
    found = {}
    for name, stated in whole.header.get(KEY, {}).items():
        _check_texts(stated)
        found[name] = Model(
            head=None if stated["head"] is None else _head(stated["head"], whole),
            classes=tuple(stated["classes"]),
            backbone=dict(stated["backbone"]),
            pooling=stated["pooling"],
            licence=stated["licence"],
            provenance=dict(stated["provenance"]),
        )
    return found


def _head(stated: Mapping[str, Any], whole: Container) -> Head:
    arrays = {entry["name"]: container.parse_array(entry, whole) for entry in stated["arrays"]}
    if unknown := arrays.keys() - set(PARTS):
        raise ValueError(f"a head has arrays of unknown names: {sorted(unknown)[:5]}")
    scale = stated["scale"]
    if type(scale) not in (int, float):
        raise ValueError("a head's scale is no number")
    target = stated.get("target", "class")
    return Head(stated["kind"], norm=stated["norm"], scale=float(scale), target=target, **arrays)


def _check_texts(stated: Mapping[str, Any]) -> None:
    """Raise ValueError for what is no text, or longer than any use of it."""
    provenance = stated["provenance"]
    if len(provenance) > _MAX_PROVENANCE:
        raise ValueError(f"its provenance has {len(provenance)} texts, at most {_MAX_PROVENANCE} are taken")
    texts = (stated["pooling"], stated["licence"], *stated["classes"], *provenance, *provenance.values())
    for text in texts:
        if not isinstance(text, str) or len(text) > MAX_TEXT:
            raise ValueError(f"{str(text)[:50]!r} is no text of at most {MAX_TEXT} characters")
    if len(json.dumps(stated["backbone"])) > MAX_SETTINGS:
        raise ValueError(f"the backbone's settings take more than {MAX_SETTINGS} characters")


# ---- files that are there


def add_models(path: str | Path, models: Mapping[str, Model]) -> int:
    """Write a mask file anew with models behind its masks, in place of those it has; return its bytes.

    It is the file that `write_mask_file` would have written with them, and is replaced in one rename.

    Raises:
        MaskFileError: as in `read_mask_file`, for header and checksums; or a text is too long.
    """
    old = container.open_part(Path(path))
    num_kept = _without(old)
    sections = Sections(start=num_kept)
    described = describe(models, sections)

    def change(header: dict[str, Any]) -> dict[str, Any]:
        rest = {key: value for key, value in header.items() if key != KEY}
        return {**rest, **({KEY: described} if described else {})}

    return container.rewrite_header(Path(path), change, num_kept=num_kept, more=sections.parts)


def drop_models(path: str | Path) -> int:
    """Write a mask file anew without models: the masks alone, bit for bit as without them; return its bytes.

    Raises:
        MaskFileError: as in `read_mask_file`, for header and checksums.
    """
    return add_models(path, {})


def _without(whole: Container) -> int:
    """Return how many bytes of the sections belong to anything but models.

    All of them where models do not come last, as this writer puts them.
    """
    try:
        own = [entry["section"] for entry in entries(whole.header)]
        start = min((offset for offset, _, _ in own), default=whole.num_bytes)
        length = sum(length for _, length, _ in own)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MaskFileError(f"a mask file has an inconsistent entry {KEY!r}: {error}") from error
    return start if start >= 0 and start + length == whole.num_bytes else whole.num_bytes
