"""Masks as a method of peft: `get_peft_model(model, SelfMaskConfig(target_modules=[...]))`.

    theta = a * W * M, M = 1[S > mu]        dL/dS = a * G * W - <G, theta> / (2 * sum M)      (`masking.core`)

Importing this registers the method by peft's own extension points, after which `get_peft_model`,
`save_pretrained`, `PeftModel.from_pretrained`, `add_adapter`, `set_adapter` and `merge_and_unload` work with
it. Each adapter has scores for the weights of its modules, and one of them is on at a time. `save_mask_file`
and `add_mask_file` go from an adapter to a mask file and back. Knows no training loop.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn

from selfmask_dist.maskfile import Mask, MaskFile, MaskFileError, read_mask_file, write_mask_file
from selfmask_dist.maskfile.reading import fingerprints
from selfmask_dist.masking import core

METHOD = "SELFMASK"
_PREFIX = "selfmask_"


def _register_type() -> Any:
    """Return the method's member of peft's enumeration, which peft asks for and has no call to make."""
    if METHOD not in PeftType.__members__:
        member = str.__new__(PeftType, METHOD)
        member._name_, member._value_ = METHOD, METHOD
        PeftType._member_map_[METHOD] = member
        PeftType._value2member_map_[METHOD] = member
        PeftType._member_names_.append(METHOD)
        type.__setattr__(PeftType, METHOD, member)
    return PeftType(METHOD)


_TYPE = _register_type()


@dataclass
class SelfMaskConfig(PeftConfig):
    """Which weights are under a mask, and how scores become one.

    target_modules, exclude_modules: names or a regular expression, as in peft's other methods; of linear and
        convolutional layers. modules_to_save: trained whole beside the masks, for example a classifier.
    threshold: mu. init: the first score of every weight; above mu all weights start kept.
    scaled: theta = a W M; False: W M.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    threshold: float = field(default=0.0)
    init: float = field(default=1.0)
    scaled: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _TYPE
        if isinstance(self.target_modules, list):
            self.target_modules = sorted(self.target_modules)
        if not self.init > self.threshold:
            raise ValueError(
                f"init={self.init} is not above threshold={self.threshold}: every weight would "
                "start switched off"
            )


class _ScoredTheta(torch.autograd.Function):
    """Scores to theta with the straight-through gradient, for one whole weight."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, weight: Tensor, threshold: float, scaled: bool) -> Tensor:
        mask = core.binarize(scores, threshold)
        theta = core.materialize(weight, mask, scaled=scaled)
        ctx.save_for_backward(weight, theta, core.count_kept(mask))
        ctx.scaled, ctx.dtype = scaled, scores.dtype
        return theta

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, theta, kept = ctx.saved_tensors
        grad = grad.contiguous()
        found = core.pullback(
            grad,
            weight,
            scale=core.scale_factor(kept, weight.numel(), weight.dtype) if ctx.scaled else None,
            grad_dot_theta=core.inner_product(grad, theta) if ctx.scaled else None,
            num_kept=kept,
            out=torch.empty_like(weight, dtype=ctx.dtype),
        )
        return found, None, None, None


class SelfMaskLayer(nn.Module, BaseTunerLayer):
    """A layer whose weight is seen through the mask of the adapter that is on."""

    base_layer: Any  # whatever has a weight
    adapter_layer_names = ("selfmask_scores",)
    other_param_names = ("selfmask_configs",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SelfMaskConfig) -> None:
        super().__init__()
        weight = getattr(base_layer, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or weight.ndim < 2:
            raise ValueError(
                f"target_modules matches a {type(base_layer).__name__}, which has no matrix of weights; name "
                "linear or convolutional layers"
            )
        self.base_layer = base_layer
        self.selfmask_scores = nn.ParameterDict({})
        self.selfmask_configs: dict[str, SelfMaskConfig] = {}
        self.merged_adapters: list[str] = []
        self._frozen: Tensor | None = None  # W, while theta is in its place
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SelfMaskConfig, **_: Any) -> None:
        """Add the scores of an adapter."""
        weight = self.base_layer.weight
        scores = torch.full(weight.shape, config.init, dtype=torch.float32, device=weight.device)
        self.selfmask_scores[adapter_name] = nn.Parameter(scores)
        self.selfmask_configs[adapter_name] = config
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def mask(self, adapter_name: str) -> Tensor:
        """Return M of an adapter, bool, of the weight's shape."""
        threshold = self.selfmask_configs[adapter_name].threshold
        return core.binarize(self.selfmask_scores[adapter_name].detach(), threshold)

    def frozen_weight(self) -> Tensor:
        """Return W, whether theta is in its place or not."""
        weight: Tensor = self.base_layer.weight if self._frozen is None else self._frozen
        return weight.detach()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put theta in the place of W; `unmerge` puts W back bit for bit."""
        adapter_names = check_adapters_to_merge(self, adapter_names)
        if not adapter_names:
            return
        if len(adapter_names) > 1 or self.merged_adapters:
            raise ValueError(f"one mask is merged at a time, not {[*self.merged_adapters, *adapter_names]}")
        (name,) = adapter_names
        if name not in self.selfmask_scores:
            return
        weight, config = self.base_layer.weight, self.selfmask_configs[name]
        self._frozen = weight.detach().clone()
        weight.copy_(core.materialize(self._frozen, self.mask(name), scaled=config.scaled))
        self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put W back."""
        if self._frozen is not None:
            self.base_layer.weight.copy_(self._frozen)
        self._frozen = None
        self.merged_adapters.clear()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.selfmask_scores]
        if self.disable_adapters or self.merged or not active:
            result: Tensor = self.base_layer(x, *args, **kwargs)
            return result
        if len(active) > 1:
            raise ValueError(f"one mask is on at a time, not {active}; call set_adapter with one name")
        (name,) = active
        config = self.selfmask_configs[name]
        theta = _ScoredTheta.apply(
            self.selfmask_scores[name], self.base_layer.weight, config.threshold, config.scaled
        )
        found: Tensor = torch.func.functional_call(self.base_layer, {"weight": theta}, (x, *args), kwargs)
        return found


class SelfMaskModel(BaseTuner):
    """peft's side of the method: which modules become `SelfMaskLayer`."""

    prefix: str = _PREFIX
    tuner_layer_cls = SelfMaskLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (peft's own form)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, SelfMaskLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = SelfMaskLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


register_peft_method(name=METHOD.lower(), config_cls=SelfMaskConfig, model_cls=SelfMaskModel, prefix=_PREFIX)


# ---- mask files


def _layers(model: Any) -> Iterator[tuple[str, SelfMaskLayer]]:
    """Yield the masked layers by their names in the model that peft was given."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, module in base.named_modules():
        if isinstance(module, SelfMaskLayer):
            yield name.replace(".base_layer", ""), module


def save_mask_file(
    model: Any, path: str | Path, *, adapter: str = "default", backbone: str = "", **about: Any
) -> int:
    """Write an adapter to a mask file, for `apply_masks` and banks; return its bytes.

    Args:
        model: what `get_peft_model` returned.
        backbone: the frozen model's name, `timm:...`, for readers.
        about: of `MaskFile`: preprocessing, metrics, models.

    Raises:
        ValueError: the model has no masks of that name.
    """
    layers = {f"{name}.weight": layer for name, layer in _layers(model) if adapter in layer.selfmask_scores}
    if not layers:
        raise ValueError(f"the model has no masks called {adapter!r}")
    config = next(iter(layers.values())).selfmask_configs[adapter]
    own, rounded = fingerprints(
        ((name, layers[name].frozen_weight().cpu()) for name in sorted(layers)), with_rounded=True
    )
    mask = Mask(
        bits={name: layer.mask(adapter).cpu() for name, layer in layers.items()},
        weights_fingerprint=own,
        scaled=config.scaled,
        threshold=config.threshold,
        rounded=rounded,
    )
    return write_mask_file(path, MaskFile({"default": mask}, backbone=backbone, **about))


@torch.no_grad()
def add_mask_file(model: Any, path: str | Path, *, adapter: str) -> None:
    """Put a mask file on a peft model as one more adapter: scores of 1 where a weight is kept, else -1.

    Args:
        model: what `get_peft_model` returned; its masked layers must be those of the file.

    Raises:
        MaskFileError: the file is damaged, holds other than one mask of single bits, or is of other weights.
    """
    file = read_mask_file(path)
    (name,) = file.masks if len(file.masks) == 1 else (None,)
    layers = {f"{layer_name}.weight": layer for layer_name, layer in _layers(model)}
    mask = file.masks[name] if name is not None else None
    if mask is None or mask.kind != "threshold" or mask.statistics or mask.num_segments:
        raise MaskFileError(
            f"{path} holds other than one mask of single bits, which alone peft's adapter can be"
        )
    if mask.bits.keys() != layers.keys():
        odd = sorted(mask.bits.keys() ^ layers.keys())
        raise MaskFileError(f"{path} masks other parameters than the model: {odd[:5]}")
    own, _ = fingerprints(
        ((key, layers[key].frozen_weight().cpu()) for key in sorted(layers)), with_rounded=False
    )
    if own != mask.weights_fingerprint and own not in mask.rounded.values():
        raise MaskFileError(
            f"{path}: wrong backbone: it was trained on weights of another fingerprint than the model's"
        )
    known = next(iter(layers.values())).selfmask_configs
    config = SelfMaskConfig(
        target_modules=next(iter(known.values())).target_modules, init=1.0, scaled=mask.scaled
    )
    model.add_adapter(adapter, config)
    for key, layer in layers.items():
        signs = mask.bits[key].to(layer.selfmask_scores[adapter].device)
        layer.selfmask_scores[adapter].copy_(signs.float() * 2 - 1)
