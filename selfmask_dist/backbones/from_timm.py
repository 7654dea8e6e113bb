"""timm models as encoders: the model itself, without its classifier.

Knows timm's registry, its way of converting checkpoints and its preprocessing records; nothing of masks or
data.
"""

import difflib
from typing import Any

import timm
import timm.data
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import Tensor, nn

from selfmask_dist.backbones.spec import BackboneSettings, BuiltEncoder
from selfmask_dist.backbones.structure import remove_modules
from selfmask_dist.backbones.weights import convert, drop_modules, load_exactly, read_state_dict
from selfmask_dist.common.preprocessing import Preprocessing

# set by load_backbone itself, or at odds with an encoder of RGB images
_RESERVED = ("pretrained", "num_classes", "in_chans", "features_only", "checkpoint_path")


def build(name: str, section: BackboneSettings) -> BuiltEncoder:
    """Build a timm model with `num_classes=0`; errors as in `load_backbone`.

    Args:
        name: what follows `timm:` in `section.name`.
    """
    _check_name(name)
    kwargs: dict[str, Any] = dict(section.kwargs)
    if reserved := sorted(set(kwargs) & set(_RESERVED)):
        raise ValueError(f"backbone.kwargs must not set {', '.join(reserved)}: load_backbone does")
    image_size = _agreed_image_size(section.image_size, kwargs)
    cfg = get_pretrained_cfg(name)
    if image_size is not None and cfg is not None and cfg.fixed_input_size:
        kwargs["img_size"] = image_size
    model = _create(name, section.pretrained and section.weights is None, kwargs)
    remove_modules(model, section.remove)
    if section.weights is not None:
        _load_local(model, name, section)
    return BuiltEncoder(model, _preprocessing(model, image_size))


def _check_name(name: str) -> None:
    architecture, tag = split_model_name_tag(name)
    known = timm.list_models()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=5)
        hint = f"near: {', '.join(near)}" if near else "timm.list_models() names them all"
        raise ValueError(f"timm has no model {architecture!r}; {hint}")
    tags = [tagged.partition(".")[2] for tagged in timm.list_models(f"{architecture}.*", include_tags=True)]
    if tag and tag not in tags:
        raise ValueError(
            f"timm's {architecture} has no pretrained tag {tag!r}; its tags: {', '.join(tags) or 'none'}"
        )


def _agreed_image_size(image_size: int | None, kwargs: dict[str, Any]) -> int | None:
    given = kwargs.get("img_size")
    if given is not None and image_size is not None and given != image_size:
        raise ValueError(
            f"backbone.image_size is {image_size}, backbone.kwargs.img_size is {given}; give one of them"
        )
    return image_size if image_size is not None else given


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Any:
    try:
        if not pretrained:
            return timm.create_model(name, pretrained=False, num_classes=0, **kwargs)
        # with the classifier: timm loads strictly only where the number of classes is the checkpoint's
        model: Any = timm.create_model(name, pretrained=True, **kwargs)
    except TypeError as error:
        raise ValueError(f"timm's {name} does not take these backbone.kwargs: {error}") from error
    except Exception as error:
        if not pretrained:
            raise ValueError(f"cannot build timm's {name} with backbone.kwargs {kwargs}: {error}") from error
        raise ValueError(
            f"cannot load the pretrained weights of timm's {name}: {error}\nWithout access to the hub, set "
            f"backbone.weights to a local file; backbone.pretrained=false gives random weights"
        ) from error
    model.reset_classifier(0)
    return model


def _load_local(model: Any, name: str, section: BackboneSettings) -> None:
    path, removed = section.weights, section.remove
    assert path is not None
    state = read_state_dict(path, own=[set(model.state_dict())], key=section.weights_key)
    classifiers = model.pretrained_cfg.get("classifier") or ()
    dropped = [classifiers] if isinstance(classifiers, str) else list(classifiers)
    state = drop_modules(state, [*dropped, *removed])
    source, target = f"weights file {path}", f"timm's {name}"
    try:
        converted = convert(model, name, state)
    except Exception as error:  # timm's converters stumble over weights of another family
        load_exactly(model, state, source=source, target=target)
        raise ValueError(f"{source} cannot be converted for {target}: {error}") from error
    converted = drop_modules(converted, [*dropped, *removed])
    load_exactly(model, converted, source=source, target=target, changed=_resampled_kernels(state, converted))


def _resampled_kernels(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    # timm would silently resample a patch embedding of another patch size: that is another model, not another
    # image size
    return {
        name: tuple(tensor.shape)
        for name, tensor in before.items()
        if tensor.ndim == 4 and "pos" not in name and name in after and after[name].shape != tensor.shape
    }


def _preprocessing(model: nn.Module, image_size: int | None) -> Preprocessing:
    cfg = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg)
    return Preprocessing(
        image_size=image_size if image_size is not None else cfg["input_size"][-1],
        mean=cfg["mean"],
        std=cfg["std"],
        interpolation=cfg["interpolation"],
        crop_pct=cfg["crop_pct"],
        crop_mode=cfg["crop_mode"],
    )
