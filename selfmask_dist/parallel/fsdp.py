"""The sharded engine: PyTorch's FSDP2 on the plain encoder, block by block, masks on the shards.

`fully_shard` cuts every parameter of the encoder along its rows; masks are attached after it, so theta, the
frozen weight, the scores and their momentum all lie as the same piece on the same rank. Only theta is
gathered: a rank sends what full fine-tuning sends, plus one small all-reduce a step, of sum M for all tensors
at once; <G, theta> travels with the heads' gradients. (Sum M depends on <G, theta> through the step, so the
two cannot be one.) Heads and objectives are replicated.

A backbone whose weights are left in their file is cut block by block: each process copies its rows, and none
holds more than its share and a block. Knows nothing of objectives or architectures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.masking import Shards
from selfmask_dist.parallel.engine import Engine, reduce_dtype
from selfmask_dist.parallel.together import take_several
from selfmask_dist.parallel.world import World


class FSDPEngine(Engine):
    """See `Engine`. Needs a process group, of one process too."""

    def _spread(self, blocks: Sequence[str]) -> None:
        self._mesh = _make_mesh(self.world.size, self.config.shard_size, self.world.device.type)
        self._row_shards = RowShards(self._mesh, self.world.device)
        is_bf16 = self.config.precision == "bf16"
        is_cuda = self.world.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=is_cuda) if self.config.cpu_offload else OffloadPolicy()
        shared: dict[str, Any] = {"mesh": self._mesh, "offload_policy": offload}
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if is_bf16 else None,
            # without one FSDP2 would reduce in param_dtype
            reduce_dtype=reduce_dtype(self.config) or (torch.float32 if is_bf16 else None),
        )
        self.encoder.forward = _owning(self.encoder.forward)
        take_several(self.encoder, blocks)
        for name in blocks:
            block = self.encoder.get_submodule(name)
            _widen(block)
            fully_shard(
                block,
                reshard_after_forward=self.config.reshard_after_forward,
                mp_policy=policy,
                **shared,
            )
        if is_bf16:
            policy = replace(policy, output_dtype=torch.float32)  # embeddings, for objectives
        _widen(self.encoder)
        # always resharded: after an evaluation it would keep its gathered theta, and miss the next rewrite
        fully_shard(self.encoder, reshard_after_forward=True, mp_policy=policy, **shared)

    def _shards_of(self, model: nn.Module, options: Mapping[str, Any]) -> Shards:
        return self._row_shards if model is self.encoder else Shards()

    @property
    def loss_factor(self) -> float:
        return float(self.world.size)

    def _begin_micro_batch(self, *, is_last: bool) -> None:
        assert isinstance(self.encoder, FSDPModule)
        # Every micro-batch is reduced to this rank's rows: what waited whole for the last one would take 4
        # bytes a weight. Replicas of a hybrid mesh hold the same rows, and can wait for one another.
        self.encoder.set_requires_all_reduce(is_last)

    def _autocast(self) -> torch.autocast:
        # the mixed precision policy casts: inputs and gathered theta to bf16, embeddings back to float32
        return torch.autocast(self.world.device.type, enabled=False)

    def _backward(self, loss: Tensor) -> None:
        # FSDP2 averages over ranks and the global gradient is a sum; heads get the factor taken off again
        (loss * self.loss_factor).backward()

    def _finish_backward(self) -> None:
        for parameter in self._replicated:
            if parameter.grad is not None:
                parameter.grad.div_(self.world.size)
        super()._finish_backward()

    def refresh(self) -> None:
        for module in self.encoder.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # or a block that stays gathered would keep its old theta
        super().refresh()


def _widen(module: nn.Module) -> None:
    """Turn half-precision weights, which a file may hold, into float32. Called before each block is cut."""
    for parameter in module.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def _owning(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward whose output is no view.

    An in-place operation on a view would drop the hook by which FSDP2 learns of backward.
    """

    def owning_forward(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return output.clone() if isinstance(output, Tensor) and output._is_view() else output

    return owning_forward


class RowShards(Shards):
    """Pieces as FSDP2 cuts them: torch.chunk along the rows, over the last axis of the mesh."""

    is_whole = False

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self._group = mesh.get_group(mesh.ndim - 1)
        self._rank = dist.get_rank(self._group)
        self._size = dist.get_world_size(self._group)
        self.piece_index, self.num_pieces = self._rank, self._size
        self.copies = mesh.size() // self._size
        self._device = device
        self._like: dict[str, DTensor] = {}  # each parameter's frozen weight, for its placement

    def new_scores(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        # a plain tensor: the optimizer's arithmetic then costs nothing for being sharded
        assert isinstance(weight, DTensor), f"{name} is not sharded; attach masks after fully_shard"
        self._like[name] = weight
        return torch.empty_like(weight.to_local(), dtype=dtype)

    def piece(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def first_row(self, name: str, theta: Tensor) -> int:
        return min(self._rank * -(-len(theta) // self._size), len(theta))

    def sum(self, values: Tensor) -> Tensor:
        if self._size == 1:
            return values
        summed = values.to(self._device)
        dist.all_reduce(summed, group=self._group)
        return summed.to(values.device)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            like = self._like[name]
            tensor = DTensor.from_local(
                tensor.detach(),
                like.device_mesh,
                like.placements,
                run_check=False,
                shape=like.shape,
                stride=like.stride(),
            )
        return self.whole_weight(name, tensor)

    def whole_weight(self, name: str, weight: Tensor) -> Tensor:
        moved = weight.to(self._device)
        return moved.full_tensor() if isinstance(moved, DTensor) else moved  # buffers are whole


def _make_mesh(world_size: int, shard_size: int | None, device_type: str) -> DeviceMesh:
    if not dist.is_initialized():
        raise ValueError("engine.name=fsdp needs a process group; call join_world(..., needs_group=True)")
    if shard_size is None or shard_size == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    if world_size % shard_size:
        raise ValueError(
            f"engine.shard_size {shard_size} does not divide the {world_size} processes; set it to a "
            f"divisor, or to null to shard over all"
        )
    shape = (world_size // shard_size, shard_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


# ---- an encoder that is only run


class ShardedEncoder:
    """An encoder that is only run, never trained: cut into rows over all ranks as the engine cuts it.

        sharded = ShardedEncoder(encoder, blocks=..., world=world, config=config.engine)
        features = sharded.encode(images)     # collective: each block is gathered when it is its turn
        sharded.restore()                     # after somebody wrote to the rows: the frozen weights again

    It computes in float32 whatever the engine's precision is, so its embeddings are those of a whole encoder,
    to rounding. Needs a process group. Collective: every rank must make one.

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
