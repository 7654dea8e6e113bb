"""A mask as others use it: dense weights, the mask itself, a model card and a picture, in one folder.

    FOLDER/model.safetensors    theta = a * W * M of the whole encoder, under its library's names
    FOLDER/config.json          by which timm and transformers load the folder by themselves (`folders`)
    FOLDER/NAME.mask            the mask alone, for those who have the backbone
    FOLDER/README.md            model card: metrics, provenance, how to load it
    FOLDER/sparsity.png         what is pruned, by layer

Knows nothing of training or hubs.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from selfmask_dist.backbones import Backbone
from selfmask_dist.common.files import write_text
from selfmask_dist.common.version import VERSION
from selfmask_dist.maskfile import Mask, MaskFile, apply_mask, write_mask_file
from selfmask_dist.maskfile.tools.folders import WEIGHTS, write_folder
from selfmask_dist.maskfile.tools.pictures import draw_mask

_CARD = """---
library_name: {library}
tags: [self-masking-networks, image-feature-extraction]
---

# {name}: {backbone}, adapted by a mask

The pretrained weights of `{backbone}` with {pruned:.2%} of {weights:,} masked weights switched off and
{rest}.
The mask alone takes {mask_bytes:,} bytes ({bits:.3f} bits per weight), `model.safetensors` {dense_bytes:,}.

{metrics}
![Share of weights switched off, by layer](sparsity.png)

## Use

```python
{usage}
```

or, on the pretrained backbone, with `selfmask_dist` installed: `apply_masks(model, "{name}.mask")`.

| | |
|---|---|
| backbone | `{backbone}` |
| fingerprint of the frozen weights under the mask | `{fingerprint}` |
| fingerprint of the backbone | `{backbone_fingerprint}` |
| images | {preprocessing} |
| groups of four weights in a row of which two are zero (2:4) | {two_of_four:.2%} |
| written by | selfmask_dist {version} |
"""


def export(
    folder: Path,
    name: str,
    mask: Mask,
    file: MaskFile,
    backbone: Backbone,
    *,
    kwargs: Mapping[str, Any] | None = None,
    is_whole: bool = True,
) -> list[Path]:
    """Write the folder and return its files. Existing ones of the same names are replaced.

    Args:
        kwargs: what the model was built with beside its name, for card and configuration.
        is_whole: nothing of the library's architecture was removed.

    Raises:
        MaskFileError: the mask is not of this backbone.
    """
    encoder = copy.deepcopy(backbone.encoder)
    apply_mask(encoder, mask)
    folder.mkdir(parents=True, exist_ok=True)
    dense, card = folder / WEIGHTS, folder / "README.md"
    alone, picture = folder / f"{name}.mask", folder / "sparsity.png"
    library, _, model = backbone.spec.name.partition(":")
    loads_itself = write_folder(
        encoder,
        folder,
        library=library,
        model=model,
        preprocessing=backbone.spec.preprocessing,
        kwargs=kwargs or {},
        is_whole=is_whole,
    )
    mask_bytes = write_mask_file(
        alone,
        MaskFile(
            {"default": mask},
            backbone=file.backbone or backbone.spec.name,
            backbone_fingerprint=backbone.spec.fingerprint,
            preprocessing=file.preprocessing,
            metrics=file.metrics,
            models=dict(file.models) if len(file.masks) == 1 else {},
        ),
    )
    draw_mask(mask.bits, picture, title=f"{name}: what the mask prunes, by layer")
    parameters = dict(encoder.named_parameters())
    write_text(
        card,
        _CARD.format(
            library={"hf": "transformers"}.get(library, library),
            name=name,
            backbone=backbone.spec.name,
            pruned=1 - mask.num_kept() / mask.num_weights(),
            weights=mask.num_weights(),
            mask_bytes=mask_bytes,
            bits=8 * mask_bytes / mask.num_weights(),
            dense_bytes=dense.stat().st_size,
            metrics=_metrics(file.metrics),
            usage=_usage(model, kwargs or {}, library=library, of=encoder if loads_itself else None),
            fingerprint=mask.weights_fingerprint,
            backbone_fingerprint=backbone.spec.fingerprint,
            preprocessing=f"`{json.dumps(file.preprocessing)}`" if file.preprocessing else "not stated",
            rest=_RESTS[mask.kind],
            two_of_four=two_of_four({key: parameters[key] for key in mask.bits}),
            version=VERSION,
        ),
    )
    return [dense, *([folder / "config.json"] if loads_itself else []), alone, card, picture]


def two_of_four(parameters: dict[str, Tensor]) -> float:
    """Return the share of groups of four weights in a row that hold two zeros or more.

    Hardware for 2:4 sparsity takes such groups. Rows whose length four does not divide are left out; the
    share is 0 where none is left.
    """
    good = total = 0
    for weight in parameters.values():
        if weight.ndim >= 2 and weight.flatten(1).shape[1] % 4 == 0:
            zeros = (weight.detach().flatten(1).unflatten(1, (-1, 4)) == 0).sum(dim=-1)
            good, total = good + int((zeros >= 2).sum()), total + zeros.numel()
    return good / total if total else 0.0


def _metrics(metrics: dict[str, float]) -> str:
    if not metrics:
        return "No metrics were stored with the mask.\n"
    rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in metrics.items())
    return f"| measured in training | |\n|---|---|\n{rows}\n"


_RESTS = {
    "threshold": "the rest scaled, after *Self-Masking Networks for Unsupervised Adaptation* "
    "(arXiv 2409.07577)",
    "frozen_sign": "of the rest only the signs, all of one size in each tensor",
    "sign": "the rest of one size in each tensor, with trained signs",
    "ternary": "the rest of one positive and one negative value in each tensor",
    "values": "the rest trained",
    "graft": "the rest replaced by fine-tuned ones",
    "delta": "to every weight of a tensor one size added, or taken away",
}


def _usage(model: str, kwargs: Mapping[str, Any], *, library: str, of: Any) -> str:
    """Return how the folder is loaded. of: the encoder, where its library loads the folder by itself."""
    if of is not None and library == "hf":
        kind = type(of.model).__name__
        return f'from transformers import {kind}\n\nmodel = {kind}.from_pretrained(".")'
    if of is not None and library == "timm":
        return 'import timm\n\nmodel = timm.create_model("local-dir:.", pretrained=True)'
    given = "".join(f", {key}={value!r}" for key, value in kwargs.items())
    load = 'model.load_state_dict(load_file("model.safetensors"))'
    if library == "hf":
        given = f", kwargs={dict(kwargs)!r}" if kwargs else ""
        return (
            "from selfmask_dist.backbones import load_backbone\n\n"
            f'encoder = load_backbone("hf:{model}", weights="model.safetensors"{given}).encoder'
        )
    if library == "timm":
        return (
            "import timm\nfrom safetensors.torch import load_file\n\n"
            f'model = timm.create_model("{model}", num_classes=0{given})\n{load}'
        )
    return (
        "import open_clip\nfrom safetensors.torch import load_file\n\n"
        f'model = open_clip.create_model("{model.partition("/")[0]}"{given}).visual\n{load}'
    )
