"""The size of a model, measured on the meta device, which has shapes without storage.

One forward counts FLOPs and the numbers that autograd keeps for backward. Knows nothing of engines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from selfmask_dist.backbones import find_blocks, load_backbone
from selfmask_dist.common.optional import require
from selfmask_dist.config import Config
from selfmask_dist.masking import select


@dataclass(frozen=True)
class ModelSize:
    """What a plan needs to know of a model; sizes are counts of numbers, not bytes."""

    masked: int
    frozen: int
    largest_block: int  # weights of it, or of everything outside blocks where that is more
    flops_per_image: float  # of a forward
    kept_per_image: int  # numbers that backward keeps
    kept_with_checkpoints: int  # the same with activation checkpointing
    dim: int = 0  # of an embedding
    shapes: tuple[tuple[int, int], ...] = ()  # (rows, numbers) of every parameter

    def padded(self, num_pieces: int) -> float:
        """Return by which factor cutting along rows into so many equal pieces makes the model larger.

        FSDP2 gathers tensors padded to a multiple of the pieces: 1,152 rows over 1,024 ranks become 2,048.
        """
        total = sum(numbers for _, numbers in self.shapes)
        if not total:
            return 1.0
        return sum(-(-rows // num_pieces) * num_pieces * (n / rows) for rows, n in self.shapes) / total


def build_on_meta(config: Config) -> tuple[nn.Module, int]:
    """Return the encoder without storage, and the side of its images in pixels.

    Raises:
        ValueError: the backbone's name is not one of timm's, open_clip's or transformers'.
    """
    section = config.backbone
    family, _, name = section.name.partition(":")
    kwargs: dict[str, Any] = dict(section.kwargs)
    with torch.device("meta"):
        if family == "timm":
            import timm

            if name.split(".")[0] not in timm.list_models():
                raise ValueError(f"timm has no model {name!r}; see timm.list_models()")
            cfg: dict[str, Any] = vars(timm.create_model(name, num_classes=0))["pretrained_cfg"]
            size = section.image_size or int(cfg["input_size"][-1])
            if section.image_size and "vit" in name:
                kwargs["img_size"] = section.image_size
            return timm.create_model(name, num_classes=0, **kwargs), size
        if family == "open_clip":
            require("open_clip", "open_clip_torch", needed_by=f"backbone.name={section.name}")
            from selfmask_dist.backbones import from_open_clip

            return from_open_clip.build_on_meta(name.partition("/")[0], kwargs, section.image_size)
        if family == "hf" and name:
            backbone = load_backbone(section.model_copy(update={"pretrained": False, "weights": None}))
            return backbone.encoder.to("meta"), backbone.spec.preprocessing.image_size
    raise ValueError(
        f"backbone {section.name!r} is not timm:<model>, open_clip:<model>[/<tag>] or hf:<model or folder>"
    )


def measure_size(
    encoder: nn.Module, image_size: int, include: Sequence[str] | str, **options: Any
) -> ModelSize:
    """Return the size of a model on the meta device, counted by one forward of two images in train mode.

    Args:
        include, options: which parameters are masked, as in `masking.select`.
    """
    names = set(select(encoder, include, **options))
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_(name in names)
    sizes = {name: parameter.numel() for name, parameter in encoder.named_parameters()}
    blocks = find_blocks(encoder)
    block_sizes = [sum(p.numel() for p in encoder.get_submodule(name).parameters()) for name in blocks]
    ledger = _Ledger(encoder, blocks)
    rows = 2
    images = torch.empty(rows, 3, image_size, image_size, device="meta")
    encoder.train()
    with FlopCounterMode(display=False) as counter, ledger:
        features = encoder(images)
    return ModelSize(
        masked=sum(sizes[name] for name in names),
        frozen=sum(sizes.values()) - sum(sizes[name] for name in names),
        largest_block=max([*block_sizes, sum(sizes.values()) - sum(block_sizes)]),
        flops_per_image=counter.get_total_flops() / rows,
        kept_per_image=ledger.total() // rows,
        kept_with_checkpoints=ledger.with_checkpoints() // rows,
        dim=features.shape[-1],
        shapes=tuple((max(len(p), 1) if p.ndim else 1, p.numel()) for p in encoder.parameters()),
    )


class _Ledger(torch.autograd.graph.saved_tensors_hooks):
    """Counts the numbers that autograd keeps for backward, by block; a tensor kept twice counts once."""

    def __init__(self, encoder: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__(self._keep, lambda tensor: tensor)
        self._parameters = {id(p) for p in encoder.parameters()}
        self._seen: dict[int, Tensor] = {}  # by storage; holds them, so that no id is used twice
        self._kept: dict[str, int] = {"": 0}
        self._inputs: dict[str, int] = {}
        self._block = ""
        for name in blocks:
            module = encoder.get_submodule(name)
            module.register_forward_pre_hook(lambda _, args, name=name: self._enter(name, args))
            module.register_forward_hook(lambda *_: self._enter("", ()))

    def total(self) -> int:
        return sum(self._kept.values())

    def with_checkpoints(self) -> int:
        inside = [n for name, n in self._kept.items() if name]
        return self._kept[""] + sum(self._inputs.values()) + max(inside, default=0)

    def _enter(self, name: str, args: tuple[Any, ...]) -> None:
        self._block = name
        if name:
            self._kept.setdefault(name, 0)
            self._inputs[name] = sum(a.numel() for a in args if isinstance(a, Tensor))

    def _keep(self, tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if id(base) not in self._parameters and id(base) not in self._seen:
            self._seen[id(base)] = base
            self._kept[self._block] += tensor.numel()
        return tensor
