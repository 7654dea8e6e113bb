"""An encoder that is only run, never trained: cut into rows over all ranks as the fsdp engine cuts it.

    sharded = ShardedEncoder(encoder, blocks=..., world=world, config=config.engine)
    features = sharded.encode(images)     # collective: each block is gathered when it is its turn
    sharded.restore()                     # after somebody wrote to the rows: the frozen weights again

It computes in float32 whatever the engine's precision is, so its embeddings are those of a whole encoder, to
rounding. Knows nothing of masks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.parallel.fsdp import FSDPEngine
from selfmask_dist.parallel.world import World


def shards_weights(config: EngineConfig, world: World) -> bool:
    """Return whether an evaluation must not hold the encoder whole either: the engine cuts it over ranks, or
    keeps it in the CPU's memory.
    """
    cuts = config.name == "fsdp" or (config.name == "deepspeed" and config.zero_stage == 3)
    return cuts and (world.size > 1 or config.cpu_offload)


class ShardedEncoder:
    """See the module's docstring. Needs a process group. Collective: every rank must make one.

    Args:
        encoder: on the CPU or in its file; it is cut in place, block by block, and moved to the device.
        blocks: names of its repeated blocks.
        in_file: the parameters that lie in a file, whole, of which `restore` reads its rows again. Of the
            others each rank keeps a frozen copy of its rows.
        keeps_frozen: whether `restore` will be asked for.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        blocks: Sequence[str],
        world: World,
        config: EngineConfig,
        in_file: Mapping[str, Tensor] | None = None,
        keeps_frozen: bool = True,
    ) -> None:
        plain = {
            "name": "fsdp",
            "precision": "float32",
            "compile": False,
            "checkpoint_activations": False,
            # or a block would stay gathered and miss what is written to its rows
            "reshard_after_forward": True,
        }
        encoder.eval().requires_grad_(False)
        engine = FSDPEngine(
            encoder, encoder=encoder, blocks=blocks, world=world, config=config.model_copy(update=plain)
        )
        self._encoder = encoder
        self._shards = engine._shards_of(encoder, {})
        self._parameters = dict(encoder.named_parameters())
        self._buffers = dict(encoder.named_buffers())
        self._first_buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        self._in_file = dict(in_file or {}) if keeps_frozen else {}
        self._frozen: dict[str, Tensor] = {}
        for name in self._parameters.keys() - self._in_file.keys() if keeps_frozen else ():
            self._frozen[name] = self._rows(name)[0].clone()
        self._is_written = False

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return embeddings (n, dim) of images (n, 3, H, W) on the world's device; every rank gives some."""
        features: Tensor = self._encoder(images)
        return features

    @torch.no_grad()
    def restore(self) -> None:
        """Write the frozen weights and statistics over whatever the rows and buffers hold."""
        if not self._is_written:
            return
        for name, whole in self._in_file.items():
            rows, first = self._rows(name)
            rows.copy_(whole[first : first + len(rows)])
        for name, frozen in self._frozen.items():
            self._rows(name)[0].copy_(frozen)
        for name, buffer in self._buffers.items():
            buffer.copy_(self._first_buffers[name])
        self._is_written = False

    # ---- what masks write to, see `maskfile.rows`

    def shape(self, name: str) -> torch.Size | None:
        """Return the shape of a whole parameter; None where there is none of that name."""
        return self._parameters[name].shape if name in self._parameters else None

    def rows(self, name: str) -> tuple[Tensor, int]:
        """Return this rank's rows of a parameter, which may be written to, and which is the first of them."""
        self._is_written = True
        return self._rows(name)

    def _rows(self, name: str) -> tuple[Tensor, int]:
        parameter = self._parameters[name]
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        return local.detach(), self._shards.first_row(name, parameter)

    def whole(self, name: str) -> Tensor:
        """Return a whole parameter on the world's device. Collective: every rank must call."""
        return self._shards.whole_weight(name, self._parameters[name].detach())

    def buffer(self, name: str) -> Tensor | None:
        """Return a buffer, whole on every rank; None where there is none of that name."""
        self._is_written = True
        return self._buffers.get(name)
