"""The DeepSpeed engine: ZeRO stage 1, 2 or 3.

DeepSpeed trains parameters of the module and lays them out in flat partitions of its own, so here scores are
parameters beside the frozen weights (`masking.parametrized`) and theta is made in every forward. Stage 1 cuts
momentum over ranks, 2 gradients too, 3 scores and frozen weights too. Its checkpoints are not used: they do
not change world size; each rank's fragments of its partitions are the parts of the state, nothing frozen.
Knows nothing of objectives or architectures.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from selfmask_dist.common.optional import require
from selfmask_dist.data import Batch
from selfmask_dist.masking import core
from selfmask_dist.masking.parametrized import parametrized_attach
from selfmask_dist.parallel.engine import Engine
from selfmask_dist.parallel.moving_average import MovingAverage
from selfmask_dist.parallel.parts import PARTS, StateSource, TensorPart, TrainedParameter
from selfmask_dist.parallel.together import take_several

_MOMENTUM = "momentum_buffer"
_SHARED_MEMORY_OP = "deepspeed_shm_comm"


class DeepSpeedEngine(Engine):
    """See `Engine`. Needs a process group, of one process too, and on GPUs `ninja` on PATH."""

    def _spread(self, blocks: Sequence[str]) -> None:
        self._runner: Any = None
        self._deepspeed = _import_deepspeed(self.world.device.type)
        self._utils = self._deepspeed.utils
        if self.config.zero_stage > 1:  # gradients are cut
            # Theta is kept until backward, so resolutions share one. Recomputation makes it for each anew and
            # wants in its graph what the forward had in it.
            is_apart = self.config.checkpoint_activations or self.config.compile
            take_several(self.encoder, blocks, around=nullcontext if is_apart else parametrize.cached)

    def attach(self, model: nn.Module, attach_fn: Callable[..., Any], **options: Any) -> Any:
        masks = parametrized_attach(model, read=self._whole_parameter, **options)
        self.masks[self._name_of(model)] = masks
        return masks

    def start(self, optimizer: Optimizer) -> None:
        if "betas" in optimizer.defaults:
            raise ValueError(
                "engine.name=deepspeed is wired for SGD alone; set optim.kind=sgd, or use engine.name=fsdp"
            )
        self._normalised = frozenset(id(parameter) for parameter in self._scores())
        if self._normalised and self.clip_norm is not None:
            raise ValueError(
                "engine.name=deepspeed clips all gradients together, and with optim.score_step=rms only "
                "those besides the scores' are to be clipped; set optim.clip_norm=null, or use "
                "engine.name=fsdp"
            )
        self.trained = self._find_trained(optimizer)
        rates = [group["lr"] for group in optimizer.param_groups]
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            # DeepSpeed makes the optimizer's state by a step on zero gradients, which must move nothing
            group["lr"] = group["weight_decay"] = 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its own use of torch
            self._runner, _, _, _ = self._deepspeed.initialize(
                model=self.module, optimizer=optimizer, config=self._make_config()
            )
        for group, rate, decay in zip(self._runner.optimizer.param_groups, rates, decays, strict=True):
            group["lr"], group["weight_decay"] = rate, decay
        self.optimizer = self._runner.optimizer
        self._make_momentum()
        if self._normalised:
            inner = self.optimizer.optimizer  # type: ignore[attr-defined]
            inner.register_step_pre_hook(self._normalise_scores)

    def keep_teacher(self, heads: Sequence[nn.Parameter]) -> MovingAverage:
        raise ValueError(
            "engine.name=deepspeed lays parameters out in partitions of its own, and keeps no moving average "
            "of them (objective.name=moco_v2, moco_v3, dino); use engine.name=fsdp"
        )

    def step(self) -> None:
        """Step and clear gradients; DeepSpeed clips by its own configuration. Collective."""
        self._runner.step()
        for masks in self.masks.values():
            masks.step += 1
        self._normalise_rows()

    @torch.no_grad()
    def _normalise_rows(self) -> None:
        for parameter in self._unit_rows:
            rows = self._utils.safe_get_full_fp32_param(parameter)
            self._set(parameter, nn.functional.normalize(rows, dim=1))

    @property
    def loss_factor(self) -> float:
        return float(self.world.size)

    def _begin_micro_batch(self, *, is_last: bool) -> None:
        self._runner.set_gradient_accumulation_boundary(is_last)

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self._runner(batch)
        return loss, metrics

    def _backward(self, loss: Tensor) -> None:
        # it averages over ranks; the global gradient is a sum
        self._runner.backward(loss * self.loss_factor, scale_wrt_gas=False)

    def _finish_backward(self) -> None:
        """Do nothing: DeepSpeed has reduced everything."""

    def _parts_of(self, name: str, trained: TrainedParameter) -> list[TensorPart]:
        start, value, momentum = self._fragments(trained)
        return [
            TensorPart(f"{part}/{name}", trained.shape, tensor, start)
            for part, tensor in (("parameters", value), ("momentum", momentum))
        ]

    def _make_moments(self, trained: TrainedParameter, wanted: Collection[str]) -> None:
        if "momentum" not in wanted:
            self._fragments(trained)[2].zero_()

    @torch.no_grad()
    def load(self, source: StateSource, *, step: int, parts: Collection[str] = PARTS) -> None:
        super().load(source, step=step, parts=parts)
        # the optimizer's float32 partitions were read; the model's own tensors follow
        if self.config.zero_stage < 3:
            self.optimizer.update_lp_params()  # type: ignore[attr-defined]
            return
        for trained in self.trained.values():
            parameter: Any = trained.tensor
            parameter.ds_tensor.copy_(self._utils.safe_get_local_fp32_param(parameter))

    def _fragments(self, trained: TrainedParameter) -> tuple[int, Tensor, Tensor]:
        """Return this rank's consecutive elements of a tensor and of its momentum, flat, as views of
        DeepSpeed's partitions, and the place of their first in the whole tensor.
        """
        parameter, optimizer = trained.tensor, cast("Any", self.optimizer)
        if self.config.zero_stage < 3:
            # without one, other ranks' partitions have all of this tensor
            if (fragment := getattr(parameter, "_hp_mapping", None)) is None:
                return 0, torch.empty(0), torch.empty(0)
            momentum = fragment.get_optim_state_fragment(_MOMENTUM)
            return fragment.lp_fragment_address.start, fragment.hp_fragment.detach(), momentum
        length = cast("Any", parameter).ds_tensor.numel()  # all ranks' are equally long, the last ones padded
        start = min(length * self.world.rank, trained.shape.numel())
        length = min(length, trained.shape.numel() - start)
        group, place, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        both = flat.detach(), optimizer.optimizer.state[flat][_MOMENTUM]
        value, momentum = (tensor.narrow(0, place, length) for tensor in both)
        return start, value, momentum

    def _set(self, parameter: Any, value: Tensor) -> None:
        """Give a parameter a whole new value, in the optimizer's copy and in the model's own."""
        if self.config.zero_stage < 3:
            self._utils.safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)  # which would follow only with the next step
            return
        # DeepSpeed 0.19.8 sets whole stage 3 tensors only where their partitions need no padding
        self._utils.safe_set_local_fp32_param(parameter, self._partition(parameter, value))
        parameter.ds_tensor.copy_(self._partition(parameter, value))

    def _partition(self, parameter: Any, whole: Tensor) -> Tensor:
        """Return this rank's part of a tensor under stage 3: all are equally long, the last one is padded."""
        length: int = parameter.ds_tensor.numel()
        padding = length * self.world.size - whole.numel()
        return nn.functional.pad(whole.flatten(), (0, padding)).split(length)[self.world.rank]

    def refresh(self) -> None:
        """Do nothing: theta follows from the scores in every forward."""

    @torch.no_grad()
    def gathered(self, module: nn.Module) -> AbstractContextManager[Any]:
        cut = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_tensor")]
        return self._deepspeed.zero.GatheredParameters(cut) if cut else nullcontext()

    def each_whole_weight(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """See `Engine`; parametrised ones appear as their parts."""
        named: Mapping[str, Tensor] = dict(self.encoder.named_parameters()) | dict(
            self.encoder.named_buffers()
        )
        for name, tensor in named.items():
            if names is None or name in names:
                yield name, self._whole_parameter(tensor) if isinstance(tensor, nn.Parameter) else tensor

    @torch.no_grad()
    def _whole_parameter(self, parameter: nn.Parameter) -> Tensor:
        if self._runner is None:
            return parameter.detach()
        if not hasattr(parameter, "ds_id"):  # stages 1 and 2 leave parameters whole
            return parameter.detach()
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _make_momentum(self) -> None:
        """Give every flat partition a momentum of zero, with which the first step is as without one.

        DeepSpeed 0.19.8 links a parameter to its state after the first group's step, when the other groups
        have none yet, and later cannot find theirs.
        """
        if self.config.zero_stage == 3:
            partitions = self.optimizer.fp32_partitioned_groups_flat  # type: ignore[attr-defined]
        else:
            partitions = self.optimizer.single_partition_of_fp32_groups  # type: ignore[attr-defined]
        inner = self.optimizer.optimizer  # type: ignore[attr-defined]
        for partition in partitions:
            inner.state[partition][_MOMENTUM] = torch.zeros_like(partition)
        if self.config.zero_stage != 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()  # type: ignore[attr-defined]

    @torch.no_grad()
    def _normalise_scores(self, inner: Optimizer, *_: Any) -> None:
        """Normalise scores' gradients in the flat partitions that a step is about to use. Collective.

        DeepSpeed steps one partition after the other; each takes one small all-reduce.
        """
        flats = [flat for group in inner.param_groups for flat in group["params"] if flat.grad is not None]
        for flat in flats:
            if not (pieces := self._pieces_of(flat)):
                continue
            grads = [flat.grad.narrow(0, start, length) for _, start, length in pieces]
            squares = self.world.sum(torch.stack([core.sum_of_squares(grad) for grad in grads]))
            core.normalise(grads, squares, [size for size, _, _ in pieces])

    def _pieces_of(self, flat: Tensor) -> list[tuple[int, int, int]]:
        """Return (elements of the whole tensor, first element in `flat`, elements in it) of scores in order.

        A tensor of which this rank has nothing in `flat` is there too, as other ranks have.
        """
        optimizer: Any = self.optimizer
        if self.config.zero_stage == 3:
            group = _index(optimizer.fp32_partitioned_groups_flat, flat)
            scores: list[Any] = list(self._scores())  # with attributes of DeepSpeed's own
            places = [optimizer.grad_position[optimizer.get_param_id(one)] for one in scores]
            pieces = zip(scores, places, strict=True)
            return [(one.ds_numel, start, length) for one, (i, start, length) in pieces if i == group]
        found = []
        for parameter in optimizer.bit16_groups[_index(optimizer.single_partition_of_fp32_groups, flat)]:
            if id(parameter) in self._normalised:
                part = getattr(parameter, "_hp_mapping", None)
                place = part.get_hp_fragment_address() if part is not None else None
                found.append((parameter.numel(), *((place.start, place.numel) if place else (0, 0))))
        return found

    def _make_config(self) -> dict[str, Any]:
        micro_batch, parts = 1, self.accumulate
        bucket = max(int(self.config.bucket_mb * 2**18), 1)  # in numbers
        config: dict[str, Any] = {
            # only their product is checked: batches come from the loader
            "train_batch_size": micro_batch * parts * self.world.size,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": parts,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": self.clip_norm or 0.0,  # its default is to clip at 1
            "zero_optimization": {
                "stage": self.config.zero_stage,
                "stage3_param_persistence_threshold": 0,
                "reduce_bucket_size": bucket,
                # by default it keeps up to a billion gathered weights: all of most backbones
                "stage3_prefetch_bucket_size": bucket,
                "stage3_max_live_parameters": 2 * bucket,
                "stage3_max_reuse_distance": 0,
            },
        }
        return _overlay(config, self.config.deepspeed)


def _index(tensors: Sequence[Tensor], wanted: Tensor) -> int:
    return next(index for index, tensor in enumerate(tensors) if tensor is wanted)


def _overlay(config: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in extra.items():
        below = merged.get(key)
        merged[key] = _overlay(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _import_deepspeed(device_type: str) -> Any:
    if not dist.is_initialized():
        raise ValueError(
            "engine.name=deepspeed needs a process group; call join_world(..., needs_group=True)"
        )
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own use of torch
        deepspeed = require("deepspeed", "deepspeed", needed_by="engine.name=deepspeed")
        require("deepspeed.ops", "deepspeed")
        require("deepspeed.utils", "deepspeed")
    if device_type == "cpu":
        # a shared-memory all-reduce that it would compile for a minute when it starts; gloo does without
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OP] = False
    elif shutil.which("ninja") is None:
        raise ValueError(
            "engine.name=deepspeed builds operators when it starts and finds no ninja on PATH; pip install "
            "ninja and activate the environment (so that its bin folder is on PATH), or use engine.name=fsdp"
        )
    return deepspeed
