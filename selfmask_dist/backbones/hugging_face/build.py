"""Vision models of transformers as encoders: `hf:<organisation>/<model>` of the hub, or `hf:<folder>`.

The image tower alone is built (CLIP's with its projection). Preprocessing is that of the model's
`preprocessor_config.json`. Knows transformers' classes, configurations and files; nothing of masks or data.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from selfmask_dist.backbones.hugging_face.encoder import TransformersEncoder, side_of
from selfmask_dist.backbones.hugging_face.images import read_preprocessing
from selfmask_dist.backbones.spec import BackboneSettings, BuiltEncoder
from selfmask_dist.backbones.structure import remove_modules
from selfmask_dist.backbones.weights import read_state_dict
from selfmask_dist.common.text import some

_LOG = logging.getLogger(__name__)
# the image tower of models with a text tower; others are what AutoModel makes of their configuration
_TOWERS = {
    "clip": "CLIPVisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
}


def build(name: str, section: BackboneSettings) -> BuiltEncoder:
    """Build the image tower of `<organisation>/<model>` or of a local folder.

    Its configuration always comes from there; weights do where `section.pretrained` says so and no local file
    is named. `section.kwargs` are further entries of the configuration. Errors are those of `load_backbone`.

    Args:
        name: what follows `hf:` in `section.name`.
    """
    source = _folder_of(name)
    config = _read_config(source, name, dict(section.kwargs))
    with _quiet():
        if section.weights is not None:
            model = _load_file(config, name, section)
        elif section.pretrained:
            model = _load(config, source, f"transformers' {name}")
        else:
            model = _class_of(config)._from_config(config)
    model = model.float()
    remove_modules(model, section.remove)
    encoder = TransformersEncoder(model)
    given = section.mean is not None and section.image_size is not None
    size = side_of(config)
    preprocessing = read_preprocessing(
        source,
        name,
        model_size=size[0] if size else None,
        image_size=section.image_size,
        may_be_missing=given or not section.pretrained,
    )
    return BuiltEncoder(encoder, preprocessing)


def _folder_of(name: str) -> str:
    """Return what transformers takes: a folder that is there, or a name on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith(("/", "./", "../", "~")):
        raise ValueError(f"backbone.name hf:{name}: there is no folder {path}")
    return name


def _read_config(source: str, name: str, kwargs: dict[str, Any]) -> Any:
    try:
        config: Any = transformers.AutoConfig.from_pretrained(source)
    except Exception as error:  # the hub, damaged files and unknown kinds of models raise almost anything
        raise ValueError(
            f"cannot read the configuration of transformers' {name}: {str(error)[:300]}\nWithout access to "
            f"the hub, give the folder that the model was saved to: backbone.name=hf:/path/to/folder"
        ) from error
    if getattr(config, "vision_config", None) is not None:
        if config.model_type not in _TOWERS:
            raise ValueError(
                f"transformers' {name} is a {config.model_type}, of which no image tower can be taken; "
                f"known are {', '.join(_TOWERS)} and models of images alone"
            )
        tower = config.vision_config
        tower.architectures = [_TOWERS[config.model_type]]
        config = tower
    if unknown := sorted(key for key in kwargs if not hasattr(config, key)):
        raise ValueError(f"backbone.kwargs: the configuration of transformers' {name} has no {some(unknown)}")
    config.update(kwargs)
    return config


def _class_of(config: Any) -> Any:
    """Return the class of the image tower alone that a configuration describes."""
    named = (config.architectures or [""])[0]
    if named in _TOWERS.values():
        return getattr(transformers, named)
    try:
        return transformers.models.auto.modeling_auto.MODEL_MAPPING[type(config)]
    except KeyError as error:
        raise ValueError(f"transformers has no model for a configuration of {config.model_type}") from error


def _load(config: Any, source: str | None, target: str, state: dict[str, Tensor] | None = None) -> nn.Module:
    """Return the model with all of its weights from the hub, a folder or `state`.

    A pooling layer that the weights do not have is left out of the model.

    Raises:
        ValueError: weights are missing, of other shapes, or cannot be read.
    """
    kind = _class_of(config)
    options: list[dict[str, Any]] = [{}]
    if "add_pooling_layer" in signature(kind.__init__).parameters:
        options.append({"add_pooling_layer": False})
    for option in options:
        try:
            model, report = kind.from_pretrained(
                source,
                config=config,
                state_dict=state,
                output_loading_info=True,
                dtype=torch.float32,
                **option,
            )
        except Exception as error:
            raise ValueError(
                f"cannot load the weights of {target}: {str(error)[:300]}\nWithout access to the hub, set "
                f"backbone.name to a local folder, or backbone.weights to a file; backbone.pretrained=false "
                f"gives random weights"
            ) from error
        missing = sorted(report["missing_keys"])
        if not missing or not all(key.startswith("pooler.") for key in missing):
            break
        _LOG.info("%s: its weights have no pooling layer; the class token is the embedding", target)
    _check_report(model, report, target)
    return model


def _check_report(model: nn.Module, report: dict[str, Any], target: str) -> None:
    """Check what transformers says of loaded weights; heads and other towers may be left out of the model."""
    if wrong := sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])):
        raise ValueError(
            f"the weights do not fit {target}: {some(wrong, 10)} are missing or of another shape. Set "
            f"backbone.name and backbone.kwargs to the model that the weights are of"
        )
    own = {name for name, _ in model.named_children()} - {"pooler"}
    others = sorted(report["unexpected_keys"])
    if wrong := [key for key in others if key.split(".")[0] in own]:
        raise ValueError(
            f"the weights do not fit {target}: {some(wrong, 10)} are in the weights and not in the model"
        )
    if others:
        _LOG.info("%s: left out of the weights are %s", target, some(others))


def _load_file(config: Any, name: str, section: BackboneSettings) -> nn.Module:
    assert section.weights is not None
    with torch.device("meta"):
        own = set(_class_of(config)._from_config(config).state_dict())
    state = read_state_dict(section.weights, own=[own], key=section.weights_key)
    return _load(config, None, f"transformers' {name} from the weights file {section.weights}", state)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reports and bars: what they say of missing weights is an error here."""
    from transformers.utils import logging as theirs

    level, has_bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if has_bar:
            theirs.enable_progress_bar()
