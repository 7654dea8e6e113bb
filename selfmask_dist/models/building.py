"""The backbone of a whole model: by a run's configuration, or by what its mask file says.

A mask file may be a stranger's. Of its settings only plain ones are followed: numbers, and a few words for
how a network is built. Paths, addresses and names that a library would look up elsewhere are refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from selfmask_dist.backbones import Backbone, load_backbone
from selfmask_dist.common import names
from selfmask_dist.config import Config, load_config
from selfmask_dist.config.backbone import BackboneConfig
from selfmask_dist.maskfile import MaskFile, Model
from selfmask_dist.training.whole.keep import pooling_of

_NAME = re.compile(r"(timm|open_clip):[\w.\-]+(/[\w.\-]+)?", re.ASCII)
_WORD = re.compile(r"[\w.\-]{1,40}", re.ASCII)
# arguments that are words for how a network is built
_WORDS = {
    "global_pool",
    "pool_type",
    "class_token",
    "act_layer",
    "norm_layer",
    "attn_pool",
    "final_ln_after_pool",
}
_MAX_NUMBER = 100_000


@dataclass(frozen=True)
class Settings:
    """How a backbone is built. seed: of random weights. source: says where the settings are from."""

    section: BackboneConfig
    seed: int
    source: str


def settings_for(
    path: Path, file: MaskFile | None, model: Model | None, *, config: Path | None, weights: Path | None
) -> Settings:
    """Return how to build the backbone of a mask file, or of a run's folder.

    What is nearest counts: a configuration that was given, the one in the run's folder, the file's own
    settings, and last the file's name of a pretrained backbone.

    Args:
        path: the file or folder.
        weights: the backbone's weights, in place of those that settings name.

    Raises:
        ValueError: nothing says which backbone, or a stranger's file asks for what is not followed.
    """
    folder = path if path.is_dir() else path.parent
    chosen = config or (folder / names.CONFIG if (folder / names.CONFIG).exists() else None)
    given: dict[str, Any] = {} if weights is None else {"weights": str(weights), "weights_key": None}
    if chosen is not None:
        whole: Config = load_config(chosen)
        section = whole.backbone.model_copy(update=given)
        return Settings(section, whole.seed, str(chosen))
    if model is not None and model.backbone:
        return _of_file(path, model.backbone, given)
    if file is not None and file.backbone:
        check_settings({"name": file.backbone}, path)
        return Settings(BackboneConfig(name=file.backbone, **given), 0, str(path))
    raise ValueError(f"{path} does not name its backbone; give the configuration of its run (config=)")


def _of_file(path: Path, stated: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    values = dict(stated)
    seed = values.pop("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"{path}: the seed {str(seed)[:50]!r} of its backbone is no number")
    check_settings(values, path)
    if "weights" in values and "weights" not in given:
        raise ValueError(
            f"the backbone of {path} was loaded from a file called {Path(str(values['weights'])).name!r}, "
            "which is not part of it; give its path (weights=, --weights)"
        )
    try:
        return Settings(BackboneConfig(**{**values, **given}), seed, str(path))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"{path} has settings of its backbone that cannot be: {first['loc']}: {first['msg']}"
        ) from error


def check_settings(values: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError where settings out of a file would make a library look elsewhere or run code."""
    name = values.get("name")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(
            f"{path} names the backbone {str(name)[:80]!r}, which is no plain timm:<model> or "
            "open_clip:<model>/<tag>: such a name is followed only from a configuration (config=, --config)"
        )
    for key, value in dict(values.get("kwargs") or {}).items():
        _check_argument(key, value, path)


def _check_argument(key: str, value: Any, path: Path) -> None:
    if isinstance(value, dict) and key in ("vision_cfg", "text_cfg", "embed_args"):
        for inner, one in value.items():
            _check_argument(inner, one, path)
        return
    parts = value if isinstance(value, list) else [value]
    is_plain = all(
        part is None
        or isinstance(part, bool)
        or (isinstance(part, int | float) and abs(part) <= _MAX_NUMBER)
        or (isinstance(part, str) and key in _WORDS and _WORD.fullmatch(part) is not None)
        for part in parts
    )
    if not is_plain or _WORD.fullmatch(key) is None or key.startswith(("pretrained", "checkpoint", "cache")):
        raise ValueError(
            f"{path} asks for a backbone with {str(key)[:40]}={str(value)[:60]!r}, which a file may not; "
            "give the configuration of its run where you trust it (config=, --config)"
        )


def build(settings: Settings, *, fingerprint: str, pooling: str = "") -> Backbone:
    """Return the frozen backbone, after a look at whether it is the one that was trained on.

    Args:
        fingerprint, pooling: as the file states them; empty: not stated.

    Raises:
        ValueError: it is another one, or cannot be built.
    """
    backbone = load_backbone(settings.section, seed=settings.seed, dense=pooling == "map")
    if fingerprint and backbone.spec.fingerprint != fingerprint:
        raise ValueError(
            f"wrong backbone: {settings.section.name}, built as {settings.source} says, has fingerprint "
            f"{backbone.spec.fingerprint[:12]}, and the mask was trained on {fingerprint[:12]}; give the "
            "same pretrained weights (weights=, --weights)"
        )
    if pooling and pooling_of(backbone.encoder) != pooling:
        raise ValueError(
            f"wrong backbone: {settings.section.name} pools by {pooling_of(backbone.encoder)!r} here, and "
            f"the model was trained with {pooling!r}; set it in backbone.kwargs"
        )
    return backbone
