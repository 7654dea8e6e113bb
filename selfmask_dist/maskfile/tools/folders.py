"""Dense weights as timm's and transformers' own `from_pretrained` read a folder: weights and a configuration.

    timm            FOLDER/config.json, model.safetensors      create_model("local-dir:FOLDER")
    transformers    FOLDER/config.json, model.safetensors,     CLASS.from_pretrained("FOLDER")
                    preprocessor_config.json                   AutoImageProcessor.from_pretrained("FOLDER")

open_clip's folders hold both towers, and the text tower is no part of a backbone here: its visual tower's
weights lie there without a configuration. Imports none of these libraries.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from selfmask_dist.common.files import replacing, write_json
from selfmask_dist.common.preprocessing import Preprocessing

WEIGHTS = "model.safetensors"
_PILLOW = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # its numbers, in order
# of timm's own description, what its loading asks for
_KEPT = ("first_conv", "classifier", "license", "fixed_input_size", "pool_size")


def write_folder(
    encoder: nn.Module,
    folder: Path,
    *,
    library: str,
    model: str,
    preprocessing: Preprocessing,
    kwargs: Mapping[str, Any],
    is_whole: bool,
) -> bool:
    """Write an encoder's weights, and where a library reads one, a configuration; return whether it does.

    Args:
        encoder: with theta in the place of its weights.
        library: timm, open_clip or hf. model: its name there.
        kwargs: what it was built with beside its name.
        is_whole: nothing of the library's architecture was removed.
    """
    if library == "hf" and is_whole:
        inner: Any = encoder.model
        inner.save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", _processor(preprocessing))
        return True
    with replacing(folder / WEIGHTS) as partial:
        save_file({key: tensor.contiguous() for key, tensor in encoder.state_dict().items()}, partial)
    if library != "timm" or not is_whole:
        return False
    write_json(folder / "config.json", _timm(encoder, model, preprocessing, kwargs))
    return True


def _timm(
    encoder: nn.Module, model: str, preprocessing: Preprocessing, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    known: Any = getattr(encoder, "pretrained_cfg", None) or {}
    size = preprocessing.image_size
    return {
        "architecture": model.partition(".")[0],
        "num_classes": 0,
        "num_features": getattr(encoder, "num_features", None),
        "model_args": dict(kwargs),
        "pretrained_cfg": {
            **{key: known[key] for key in _KEPT if known.get(key) is not None},
            "num_classes": 0,
            "input_size": [3, size, size],
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop_pct,
            "crop_mode": preprocessing.crop_mode,
        },
    }


def _processor(preprocessing: Preprocessing) -> dict[str, Any]:
    side, resized = preprocessing.image_size, preprocessing.resize_size
    both = {"height": resized, "width": resized}
    return {
        "image_processor_type": "CLIPImageProcessor",  # the one with both a size and a crop
        "do_convert_rgb": True,
        "do_resize": True,
        "size": both if preprocessing.crop_mode == "squash" else {"shortest_edge": resized},
        "resample": _PILLOW.index(preprocessing.interpolation),
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
