"""The model card of a pushed mask: numbers, classes, licence, provenance, a picture, and how to load it."""

import json
import re
from pathlib import Path

from selfmask_dist.common.plots import why_no_pictures
from selfmask_dist.common.version import VERSION
from selfmask_dist.maskfile import MaskFile, Model
from selfmask_dist.maskfile.tools.pictures import draw_mask

_CARD = """---
library_name: selfmask_dist
tags: [self-masking-networks, image-classification]
{licence}---

# {name}

`{backbone}` under a mask: one learned bit for each weight, on frozen pretrained weights. The file takes
{num_bytes:,} bytes; the backbone is loaded by its own library and compared by its fingerprint.

{metrics}
{picture}
## Use

```python
import selfmask_dist

model, transform, classes = selfmask_dist.load("{name}")
```

```bash
selfmask predict {name} photo.jpg
```

## What it is

| | |
|---|---|
| backbone | `{backbone}` |
| fingerprint of the backbone | `{fingerprint}` |
| images | `{preprocessing}` |
{rows}
{verdict}
Written by selfmask_dist {version}. Reading `model.mask` executes nothing.
"""
_LICENCE = re.compile(r"[\w.\-]{1,50}", re.ASCII)
_MOST_CLASSES = 30  # that are written out


def write_card(file: MaskFile, name: str, *, num_bytes: int, picture: str | None) -> str:
    """Return the text of a model card.

    Args:
        name: `owner/name`.
        picture: its file beside the card; None where there is none.
    """
    model = next(iter(file.models.values()), None)
    licence = model.licence if model is not None else ""
    is_word = _LICENCE.fullmatch(licence) is not None
    return _CARD.format(
        licence=f"license: {licence.lower()}\n" if is_word else "",
        name=name,
        backbone=_cell(file.backbone or "not stated"),
        num_bytes=num_bytes,
        metrics=_metrics(file.metrics),
        picture=f"![Share of weights switched off, by layer]({picture})\n" if picture else "",
        fingerprint=_cell(file.backbone_fingerprint or "not stated"),
        preprocessing=_cell(json.dumps(file.preprocessing)) if file.preprocessing else "not stated",
        rows="\n".join(f"| {key} | {value} |" for key, value in _rows(file, model)),
        verdict=f"\n**{_cell(file.verdict)}**\n" if file.verdict else "",
        version=VERSION,
    )


def _rows(file: MaskFile, model: Model | None) -> list[tuple[str, str]]:
    rows = []
    if file.masks:
        kept = [f"{name} {mask.num_kept() / mask.num_weights():.2%}" for name, mask in file.masks.items()]
        rows.append(("weights kept, by mask", _cell(", ".join(kept[:10]))))
    if model is not None:
        shown = ", ".join(model.classes[:_MOST_CLASSES])
        more = len(model.classes) - _MOST_CLASSES
        rows.append(
            ("classes", _cell(f"{len(model.classes)}: {shown}{f' and {more} more' if more > 0 else ''}"))
        )
        rows.append(("licence", _cell(model.licence or "not stated")))
        rows += [(_cell(key.replace("_", " ")), _cell(value)) for key, value in model.provenance.items()]
    return rows


def _metrics(metrics: dict[str, float]) -> str:
    if not metrics:
        return "No metrics were stored with the mask.\n"
    rows = "\n".join(f"| {_cell(key)} | {value:.4f} |" for key, value in metrics.items())
    return f"| measured on the run's test pictures | |\n|---|---|\n{rows}\n"


def _cell(text: str) -> str:
    """Return a text that stays in a cell of a table, whatever is in it."""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return plain.replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def draw_if_possible(file: MaskFile, path: Path, *, title: str) -> bool:
    """Draw what a file's first mask prunes, where matplotlib is installed; return whether it was drawn."""
    if not file.masks or why_no_pictures() is not None:
        return False
    draw_mask(next(iter(file.masks.values())).bits, path, title=f"{title}: what the mask prunes, by layer")
    return True
