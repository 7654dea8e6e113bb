"""What an encoder's repeated blocks get before an engine spreads them: recomputed activations, compiling."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from selfmask_dist.config.sections import EngineConfig


def prepare_blocks(encoder: nn.Module, blocks: Sequence[str], config: EngineConfig) -> None:
    """Checkpoint activations, then compile, block by block; where there are no blocks, the whole encoder."""
    for name in blocks or ("",):
        block = encoder.get_submodule(name)
        # on the instance's forward, not the module: names of parameters stay, hooks stay outside the graph
        if config.checkpoint_activations:
            block.forward = _checkpointed(block.forward)
        if config.compile:
            block.forward = torch.compile(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    def recomputing_forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return recomputing_forward
