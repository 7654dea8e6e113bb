"""open_clip's visual towers as encoders, and the text tower beside them: prompts -> embeddings.

Knows open_clip's registry, checkpoints and preprocessing records; nothing of masks or data.
"""

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.factory import get_model_config
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.pretrained import get_pretrained_cfg
from open_clip.transformer import VisionTransformer
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from selfmask_dist.backbones.spec import BackboneSettings, BuiltEncoder, TextParts
from selfmask_dist.backbones.structure import remove_modules
from selfmask_dist.backbones.weights import convert, drop_modules, load_exactly, read_state_dict
from selfmask_dist.common.preprocessing import Preprocessing

_PROMPTS_AT_ONCE = 256
_PREPROCESS_KEYS = ("mean", "std", "interpolation", "resize_mode")
_VISUAL, _TRUNK = "visual.", "trunk."


def build(name: str, section: BackboneSettings) -> BuiltEncoder:
    """Build the visual tower of `<model>[/<tag>]`, and the text tower beside it.

    Errors are those of `load_backbone`.
    With local weights or none, a tag still chooses the preprocessing and the activation (OpenAI's weights
    need QuickGELU).

    Args:
        name: what follows `open_clip:` in `section.name`.
    """
    model_name, _, tag = name.partition("/")
    _check_name(model_name, tag)
    weights, image_size, remove = section.weights, section.image_size, section.remove
    is_from_hub = section.pretrained and weights is None
    if is_from_hub and not tag:
        raise ValueError(
            f"open_clip:{model_name} names no pretrained weights; write open_clip:{model_name}/<tag> with "
            f"one of {', '.join(_tags(model_name)) or 'no tags'}, or set backbone.weights=PATH or "
            "backbone.pretrained=false"
        )
    model_kwargs = _with_configs(model_name, dict(section.kwargs), image_size)
    clip = _create(model_name, tag, is_from_hub, model_kwargs)
    trunk_name = model_kwargs["vision_cfg"].get("timm_model_name")
    if image_size is not None and trunk_name:
        with _quiet_root_logger():
            clip.visual.set_input_size(image_size)  # resamples the weights that are in
    remove_modules(clip.visual, remove)
    has_text_weights = True
    if weights is not None:
        has_text_weights = _load_local(clip, model_name, trunk_name, section)
    encoder = clip.visual
    preprocessing = _preprocessing(encoder, image_size)
    if not has_text_weights:
        return BuiltEncoder(encoder, preprocessing)
    del clip.visual  # what is left is the text side: a mask or a move of the encoder cannot reach it
    text = TextTower(clip, model_name, model_kwargs["text_cfg"].get("context_length"))
    parts = TextParts(TextEncoder(clip), text.tokenize)
    return BuiltEncoder(encoder, preprocessing, text, float(clip.logit_scale.detach().exp()), parts)


def build_on_meta(model_name: str, kwargs: dict[str, Any], image_size: int | None) -> tuple[nn.Module, int]:
    """Return the visual tower that `build` makes, without storage, and the side of its images in pixels.

    Args:
        kwargs, image_size: those of the configuration, as `build` takes them.

    Raises:
        ValueError: open_clip has no such model, or does not take these arguments.
    """
    _check_name(model_name, "")
    model_kwargs = _with_configs(model_name, dict(kwargs), image_size)
    with torch.device("meta"):
        tower: Any = _create(model_name, "", False, model_kwargs).visual
        if image_size is not None and model_kwargs["vision_cfg"].get("timm_model_name"):
            with _quiet_root_logger():
                tower.set_input_size(image_size)
    size = tower.image_size
    return tower, image_size or int(size if isinstance(size, int) else size[0])


class TextTower:
    """open_clip's frozen text tower: prompts -> L2-normalised embeddings (len(prompts), dim), on the CPU."""

    def __init__(self, clip: Any, model_name: str, context_length: int | None) -> None:
        self._clip = clip.float().eval().requires_grad_(False)
        self._model_name = model_name
        self._context_length = context_length
        self._tokenizer: Any = None

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """Raises ValueError for no prompts, or for a tokenizer that a hub out of reach holds."""
        if not prompts:
            raise ValueError("text_embeddings needs one prompt or more")
        parts = [prompts[i : i + _PROMPTS_AT_ONCE] for i in range(0, len(prompts), _PROMPTS_AT_ONCE)]
        return torch.cat(
            [self._clip.encode_text(self.tokenize(part), normalize=True).float() for part in parts]
        )

    def tokenize(self, texts: list[str]) -> Tensor:
        """Return tokens (n, context length); long texts are cut.

        Raises:
            ValueError: the tokenizer is on a hub that cannot be reached.
        """
        if self._tokenizer is None:
            try:
                with _quiet_root_logger():
                    self._tokenizer = open_clip.get_tokenizer(
                        self._model_name, context_length=self._context_length
                    )
            except Exception as error:
                raise ValueError(
                    f"cannot load the tokenizer of open_clip's {self._model_name}: {error}"
                ) from error
        tokens: Tensor = self._tokenizer(texts)
        return tokens


class TextEncoder(nn.Module):
    """The text side of an open_clip model as a module: tokens (n, length) -> embeddings (n, dim)."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, tokens: Tensor) -> Tensor:
        embeddings: Tensor = self.clip.encode_text(tokens)
        return embeddings


class AnySizeVisionTransformer(VisionTransformer):
    """open_clip's tower, its position embedding resampled for the grid at hand; see `any_size`."""

    def _embeds(self, x: Tensor) -> Tensor:
        patch_height, patch_width = self.patch_size
        grid = (x.shape[-2] // patch_height, x.shape[-1] // patch_width)
        if grid == tuple(self.grid_size):
            return super()._embeds(x)
        own = self.positional_embedding
        resampled = resample_abs_pos_embed(own[None], new_size=list(grid), old_size=list(self.grid_size))[0]
        # as a plain entry: assigning a tensor to a parameter's name is refused
        self._parameters["positional_embedding"] = resampled
        try:
            return super()._embeds(x)
        finally:
            self._parameters["positional_embedding"] = own


def _check_name(model_name: str, tag: str) -> None:
    known = open_clip.list_models()
    if model_name not in known:
        near = difflib.get_close_matches(model_name, known, n=5)
        hint = f"near: {', '.join(near)}" if near else "open_clip.list_models() names them all"
        raise ValueError(f"open_clip has no model {model_name!r}; {hint}")
    if tag and tag not in _tags(model_name):
        raise ValueError(
            f"open_clip's {model_name} has no pretrained tag {tag!r}; its tags: "
            f"{', '.join(_tags(model_name)) or 'none'}"
        )


def _tags(model_name: str) -> list[str]:
    return list(open_clip.list_pretrained_tags_by_model(model_name))


def _with_configs(model_name: str, kwargs: dict[str, Any], image_size: int | None) -> dict[str, Any]:
    """Return the constructor's arguments, with the registered tower configurations under those given."""
    registered = get_model_config(model_name)
    # the towers' own base weights are never fetched: a CLIP checkpoint replaces both, or neither is wanted
    vision = {**registered["vision_cfg"], **kwargs.get("vision_cfg", {}), "timm_model_pretrained": False}
    text = {**registered["text_cfg"], **kwargs.get("text_cfg", {}), "hf_model_pretrained": False}
    if image_size is not None and "timm_model_name" not in vision:
        vision["image_size"] = image_size
    return {**kwargs, "vision_cfg": vision, "text_cfg": text}


def _create(model_name: str, tag: str, is_from_hub: bool, model_kwargs: dict[str, Any]) -> Any:
    tag_cfg = get_pretrained_cfg(model_name, tag) if tag else {}
    if tag_cfg.get("quick_gelu"):
        # open_clip itself only warns, and computes something else
        model_kwargs.setdefault("quick_gelu", True)
    try:
        with _quiet_root_logger():
            return open_clip.create_model(
                model_name,
                pretrained=tag if is_from_hub else None,
                device=None,  # where it is built; parameters may be without storage yet
                force_quick_gelu=bool(model_kwargs.get("quick_gelu")),
                force_preprocess_cfg={key: tag_cfg[key] for key in _PREPROCESS_KEYS if key in tag_cfg},
                pretrained_text=False,
                **model_kwargs,
            )
    except TypeError as error:
        raise ValueError(f"open_clip's {model_name} does not take these backbone.kwargs: {error}") from error
    except Exception as error:
        if not is_from_hub:
            raise ValueError(f"cannot build open_clip's {model_name}: {error}") from error
        raise ValueError(
            f"cannot load the pretrained weights {tag} of open_clip's {model_name}: {error}\nWithout access "
            "to the hub, set backbone.weights to a local file; backbone.pretrained=false gives random weights"
        ) from error


def _load_local(clip: Any, model_name: str, trunk_name: str | None, section: BackboneSettings) -> bool:
    """Load a whole CLIP model, or a visual tower alone; returns whether the file had a text tower."""
    path, removed = section.weights, section.remove
    assert path is not None
    source, target = f"weights file {path}", f"open_clip's {model_name}"
    own = [set(clip.state_dict()), set(clip.visual.state_dict())]
    state = read_state_dict(path, own=own, key=section.weights_key)
    state = convert_state_dict(clip, state)  # names of other projects' releases
    is_whole = any(name.startswith(_VISUAL) for name in state)
    if is_whole:
        state = _convert_text(clip, state)
    visual = {name.removeprefix(_VISUAL): value for name, value in state.items() if name.startswith(_VISUAL)}
    visual = drop_modules(_convert_visual(clip, trunk_name, visual if is_whole else state), removed)
    if not is_whole:
        load_exactly(clip.visual, visual, source=source, target=f"the visual tower of {target}")
        return False
    state = drop_modules(state, ["visual"]) | {f"{_VISUAL}{name}": value for name, value in visual.items()}
    load_exactly(clip, state, source=source, target=target)
    return True


def _convert_visual(clip: Any, trunk_name: str | None, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert position embeddings of another image size, by the rule of the library that the tower is from.

    Where the file is of another model the rules fail; its tensors are then left as they are, to be listed.
    """
    with suppress(Exception), _quiet_root_logger():
        if trunk_name is None:
            prefixed = {f"{_VISUAL}{name}": value for name, value in state.items()}
            resize_pos_embed(prefixed, clip)
            return {name.removeprefix(_VISUAL): value for name, value in prefixed.items()}
        trunk = {n.removeprefix(_TRUNK): value for n, value in state.items() if n.startswith(_TRUNK)}
        converted = convert(clip.visual.trunk, trunk_name, trunk)
        return drop_modules(state, ["trunk"]) | {f"{_TRUNK}{name}": v for name, v in converted.items()}
    return state


def _convert_text(clip: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Apply open_clip's own conversions to what is not the visual tower, as its `load_checkpoint` does."""
    if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(clip, name, None)
        if name in state and own is not None and state[name].numel() == own.numel():
            state[name] = state[name].reshape(own.shape)
    state.pop("text.transformer.embeddings.position_ids", None)  # written by transformers before 4.31
    with suppress(Exception), _quiet_root_logger():  # fails on another model's file; shapes are then listed
        resize_text_pos_embed(state, clip)
    return state


def _preprocessing(visual: nn.Module, image_size: int | None) -> Preprocessing:
    cfg: dict[str, Any] = visual.preprocess_cfg  # type: ignore[assignment]  # set by open_clip.create_model
    modes = {"shortest": "center", "squash": "squash"}
    if cfg["resize_mode"] not in modes:
        raise ValueError(
            f"open_clip's resize mode {cfg['resize_mode']!r} is not supported; {', '.join(modes)} are"
        )
    size = cfg["size"] if isinstance(cfg["size"], int) else cfg["size"][-1]
    return Preprocessing(
        image_size=image_size if image_size is not None else size,
        mean=cfg["mean"],
        std=cfg["std"],
        interpolation=cfg["interpolation"],
        crop_pct=1.0,
        crop_mode=modes[cfg["resize_mode"]],
    )


@contextmanager
def _quiet_root_logger() -> Iterator[None]:
    # open_clip logs through the root logger, which configures logging for the whole process on first use, and
    # reports "No pretrained weights loaded" where local weights follow
    root, handler = logging.getLogger(), logging.NullHandler()
    was_disabled = root.disabled
    root.addHandler(handler)
    root.disabled = True
    try:
        yield
    finally:
        root.disabled = was_disabled
        root.removeHandler(handler)
