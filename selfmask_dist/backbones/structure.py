"""What a model is made of, read from its module tree alone: repeated blocks, removed parts, modes.

Knows no architecture by name, and nothing of masks, files or process groups.
"""

import difflib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# modules built from other modules, yet too small to be a block: attention, MLPs, normalised convolutions
_LAYER_PACKAGES = ("torch.nn.", "timm.layers.")


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the repeated blocks in the order of the forward, as they are registered.

    Blocks are the innermost stacked modules of the model's own making.

    A stack is a Sequential, ModuleList or ModuleDict, or any module whose children all have one type. So ViTs
    give ("blocks.0", ...), ResNets ("layer1.0", ...), Swin and ConvNeXt ("stages.0.blocks.0", ...), and
    open_clip's towers ("transformer.resblocks.0", ...). No block lies inside another. Empty where nothing is
    stacked (VGG).
    """
    return tuple(_blocks_below(model, ""))


def _blocks_below(module: nn.Module, prefix: str) -> list[str]:
    names = []
    is_stack = _is_stack(module)
    for child_name, child in module.named_children():
        inner = _blocks_below(child, f"{prefix}{child_name}.")
        if inner:
            names += inner
        elif is_stack and _is_composite(child):
            names.append(f"{prefix}{child_name}")
    return names


def _is_stack(module: nn.Module) -> bool:
    if isinstance(module, _CONTAINERS):
        return True
    types = [type(child) for child in module.children()]
    return len(types) > 1 and len(set(types)) == 1


def _is_composite(module: nn.Module) -> bool:
    is_layer = f"{type(module).__module__}.".startswith(_LAYER_PACKAGES)
    return any(True for _ in module.children()) and not is_layer and not isinstance(module, _CONTAINERS)


def remove_modules(model: nn.Module, names: Sequence[str]) -> None:
    """Put `nn.Identity` in the place of each named module.

    Raises:
        ValueError: the model has no such module.
    """
    known = [name for name, _ in model.named_modules() if name]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or [
                child for child, _ in model.named_children()
            ]
            raise ValueError(
                f"backbone.remove names {name!r}, which the model does not have; near: {', '.join(near)}"
            )
        model.set_submodule(name, nn.Identity())


@torch.no_grad()
def run_on_meta(model: nn.Module, shape: Sequence[int]) -> Any:
    """Return what the model's forward of images (n, 3, H, W) returns, as tensors without storage.

    Nothing is read or computed.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # float32: a file's half precision is not what the model will compute in
    on_meta = {
        name: torch.empty_like(t, device="meta", dtype=torch.float32 if t.is_floating_point() else t.dtype)
        for name, t in tensors.items()
    }
    return torch.func.functional_call(model, on_meta, (torch.empty(*shape, device="meta"),))


def set_train_mode(encoder: nn.Module, *, batchnorm: Literal["train", "frozen"] = "train") -> None:
    """Put the encoder in train mode, with a policy for BatchNorm's running statistics.

    Args:
        batchnorm: "train" normalises by the batch and moves the running statistics, frozen weights or not;
            "frozen" keeps BatchNorm layers in eval mode: they use their statistics and do not move them.

    Raises:
        ValueError: another policy.
    """
    if batchnorm not in ("train", "frozen"):
        raise ValueError(f"batchnorm policy {batchnorm!r} is not one of train, frozen")
    encoder.train()
    if batchnorm == "frozen":
        for module in encoder.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
