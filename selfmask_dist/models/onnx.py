"""A whole model as an ONNX file: theta = a W M as dense weights, with its head, for any number of pictures.

    images float32 (batch, 3, size, size) -> logits (batch, classes); embeddings (batch, dim) without a head

The file says in its metadata how pictures become images and what the classes are called, so that it needs
nothing of this project. Before it is left it is run by onnxruntime and compared with PyTorch.
"""

import copy
import json
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfmask_dist.common.optional import require
from selfmask_dist.maskfile.tools.shrink import shrink
from selfmask_dist.models.whole import CascadeEncoder, Loaded

OPSET = 20
TOLERANCE = 1e-4  # of the largest number that comes out, or of one where that is smaller
_CHECKED = (1, 3)  # pictures at once
_IN_ONE_FILE = 1 << 30  # bytes of weights; a protobuf ends at twice that, and larger ones lie beside it


@dataclass(frozen=True)
class Exported:
    """What `export_onnx` wrote.

    difference: the largest between what onnxruntime and PyTorch give, over the larger of one and the largest
    number. size: bytes of the file, and of the one with weights that may lie beside it.
    """

    path: Path
    opset: int
    size: int
    difference: float


def export_onnx(
    loaded: Loaded,
    path: str | Path,
    *,
    opset: int = OPSET,
    smaller: bool = False,
    tolerance: float = TOLERANCE,
) -> Exported:
    """Write a whole model as ONNX, check it against PyTorch, and return what was written.

    Metadata of the file: `classes`, `preprocessing`, `metrics` and `provenance` as JSON, `licence`, `name`.

    Args:
        loaded: what `load` gave.
        path: replaced only by a file that was checked.
        opset: of ONNX's operators.
        smaller: leave out heads and hidden units that do nothing, see `maskfile.tools.shrink`.
        tolerance: the largest difference, relative to the largest number that comes out where that exceeds 1.

    Raises:
        MissingLibraryError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: it is a cascade, it cannot be expressed in ONNX, or the file computes something else.
    """
    if isinstance(loaded.model.encoder, CascadeEncoder):
        raise ValueError(
            f"{loaded.name} is a cascade, which puts one mask after the other on its backbone; name one of "
            "its masks (mask=, --mask)"
        )
    path = Path(path)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx onnxscript onnxruntime", extra="export", needed_by="an ONNX file")
    model = copy.deepcopy(loaded.model).float().cpu().requires_grad_(False).eval()
    whole = copy.deepcopy(model) if smaller else model
    if smaller:
        shrink(model.encoder)
    size = loaded.transform.preprocessing.image_size
    generator = torch.Generator().manual_seed(0)
    channels = len(loaded.transform.preprocessing.mean)
    images = torch.randn(max(_CHECKED), channels, size, size, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        made = Path(folder) / path.name
        _write(model, images, made, opset)
        _describe(made, loaded)
        difference = _compare(whole, images, made)
        if not difference <= tolerance:
            raise ValueError(
                f"{loaded.name}: as ONNX it gives other numbers than PyTorch (by {difference:.2g}, at most "
                f"{tolerance:g} was asked for); nothing was written. Another opset may do better"
            )
        files = sorted(
            Path(folder).iterdir(), key=lambda file: file == made
        )  # the one that is asked for last
        total = sum(file.stat().st_size for file in files)
        for file in files:
            os.replace(file, path.parent / file.name)
    return Exported(path, opset, total, difference)


def _write(model: torch.nn.Module, images: Tensor, path: Path, opset: int) -> None:
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporter warns of its own parts
            torch.onnx.export(
                model,
                (images[:2],),
                str(path),
                dynamo=True,
                input_names=["images"],
                output_names=["logits" if getattr(model, "head", None) is not None else "embeddings"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
                opset_version=opset,
                external_data=weights > _IN_ONE_FILE,
                verbose=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ValueError(
            f"this backbone cannot be written as ONNX by torch {torch.__version__}: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _describe(path: Path, loaded: Loaded) -> None:
    import onnx

    about: dict[str, Any] = {
        "name": loaded.name,
        "classes": json.dumps(list(loaded.classes), ensure_ascii=False),
        "preprocessing": json.dumps(loaded.transform.preprocessing.to_dict()),
        "metrics": json.dumps(loaded.metrics),
        "provenance": json.dumps(loaded.provenance, ensure_ascii=False),
        "licence": loaded.licence,
    }
    model = onnx.load(str(path), load_external_data=False)
    for key, value in about.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    model.producer_name = "selfmask_dist"
    onnx.save(model, str(path))


def _compare(model: torch.nn.Module, images: Tensor, path: Path) -> float:
    """Return the largest difference over batches of several sizes, relative to the largest number above 1."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for count in _CHECKED:
        with torch.inference_mode():
            expected = model(images[:count])
        found = torch.from_numpy(session.run(None, {"images": images[:count].numpy()})[0])
        if found.shape != expected.shape:
            raise ValueError(f"as ONNX it gives {tuple(found.shape)} for {tuple(expected.shape)}")
        scale = max(float(expected.abs().max()), 1.0)
        difference = float((found - expected).abs().max()) / scale
        worst = difference if difference != difference else max(worst, difference)
    return worst
