"""What an engine is: how one training step runs on many processes. One file per engine, chosen by its name.

    engine = build_engine(module, encoder=..., blocks=..., world=world, config=config)   # wraps and shards
    masks = engine.attach(encoder, attach, include="vit")            # or engine.free(encoder): train weights
    optimizer = SGD(masks.parameters(), ...)
    engine.start(optimizer)
    for batch in batches:
        engine.forward_backward(batch)
        engine.step()

The module maps a batch to (this rank's share of the global loss, metrics); gradients are summed over ranks.
An engine knows neither objectives nor architectures. Any one at any world size loads another's state.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.data import Batch
from selfmask_dist.masking import Shards
from selfmask_dist.masking.core import ScoreStep
from selfmask_dist.masking.reading import norm_statistics
from selfmask_dist.parallel.batchnorm import NormStatistics
from selfmask_dist.parallel.blocks import prepare_blocks
from selfmask_dist.parallel.moving_average import MovingAverage
from selfmask_dist.parallel.parts import (
    ADAMW_SLOTS,
    MOMENTS,
    PARTS,
    SGD_SLOTS,
    EngineState,
    KeptParts,
    StateSource,
    TensorPart,
    TrainedParameter,
    by_part,
    check_fits,
    empty_moment,
    gather,
    whole_parts,
)
from selfmask_dist.parallel.world import World


class Engine:
    """The replicated part that all engines share; a subclass says how the encoder is spread over ranks.

    Args:
        module: batch -> (rank's share of the loss, metrics). It holds the encoder and the objective.
        encoder: the part of it that masks go on, already on its device (fsdp moves it there itself).
            Everything else is replicated.
        blocks: names of the encoder's repeated blocks, each wrapped by itself.
        accumulate: micro-steps of a step.
        clip_norm: the largest L2 norm of a step's gradient; None for any.
        score_step: `rms` puts each scores tensor's gradient to a root mean square of one, see
            `masking.core.step_factors`. Clipping then leaves scores out.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        encoder: nn.Module,
        blocks: Sequence[str],
        world: World,
        config: EngineConfig,
        accumulate: int = 1,
        clip_norm: float | None = None,
        score_step: ScoreStep = "plain",
    ) -> None:
        self.module = module
        self.encoder = encoder
        self.world = world
        self.config = config
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.score_step: ScoreStep = score_step
        self.masks: dict[str, Any] = {}  # by the name of the model they are on
        self.trained: dict[str, TrainedParameter] = {}
        self.optimizer: Optimizer
        self.teacher: MovingAverage | None = None
        self._statistics = NormStatistics(module)
        self._replicated: list[nn.Parameter] = []  # whose gradients this class sums over ranks
        self._unit_rows: Sequence[nn.Parameter] = ()
        self._normalised: frozenset[int] = frozenset()  # ids of tensors whose gradient has a size of one
        prepare_blocks(encoder, blocks, config)
        self._spread(blocks)

    @property
    def loss_factor(self) -> float:
        """What a rank's loss is multiplied by before backward, and gradients of heads with it."""
        return 1.0

    # ---- setting up

    def attach(self, model: nn.Module, attach_fn: Callable[..., Any], **options: Any) -> Any:
        """Put masks on the encoder or on another part of the module. Collective: every rank must call.

        Args:
            attach_fn: `masking.attach` or a subclass's; gets `options`.
        """
        masks = attach_fn(model, shards=self._shards_of(model, options), auto=False, **options)
        self.masks[self._name_of(model)] = masks
        return masks

    def free(self, model: nn.Module, names: Collection[str] | None = None) -> list[nn.Parameter]:
        """Make weights of `model` trainable, all of them or those of these names, and return them."""
        found = []
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(names is None or name in names)
            found += [parameter] if parameter.requires_grad else []
        return found

    def keep_unit_rows(self, parameters: Sequence[nn.Parameter]) -> None:
        """Put the rows of these replicated parameters, such as prototypes, to unit length after each step."""
        self._unit_rows = parameters

    def start(self, optimizer: Optimizer) -> None:
        """Take the optimizer over. Every parameter that will be trained is in it. Collective."""
        self.optimizer = optimizer
        self.trained = self._find_trained(optimizer)
        self._normalised = frozenset(id(parameter) for parameter in self._scores())
        for masks in self.masks.values():
            is_normalised = any(id(parameter) in self._normalised for parameter in masks.parameters())
            masks.bind(optimizer, score_step=self.score_step if is_normalised else "plain")
        inside = {id(parameter) for parameter in self.encoder.parameters()}
        self._replicated = [p for p in self.module.parameters() if p.requires_grad and id(p) not in inside]

    def keep_teacher(self, heads: Sequence[nn.Parameter]) -> MovingAverage:
        """Keep a moving average of what is trained of the encoder, and of these parameters. After `start`."""
        inside = f"{self._name_of(self.encoder)}."
        chosen = {id(parameter) for parameter in heads}
        kept = {
            name: trained
            for name, trained in self.trained.items()
            if name.startswith(inside) or id(trained.tensor) in chosen
        }
        statistics = {f"{inside}{name}": buffer for name, buffer in norm_statistics(self.encoder)}
        teacher = self.teacher = MovingAverage(kept, statistics, self.refresh)
        self.optimizer.register_step_post_hook(lambda *_: teacher.update())
        return teacher

    # ---- a step

    def forward_backward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute gradients of the global loss, and return this rank's share of each metric. Collective."""
        metrics: dict[str, Tensor] = {}
        self._statistics.broadcast(self.world)
        micro_batches = batch.split(self.accumulate)
        for index, micro_batch in enumerate(micro_batches):
            self._begin_micro_batch(is_last=index == len(micro_batches) - 1)
            with self._autocast():
                loss, values = self._forward(micro_batch.to(self.world.device))
            self._backward(loss)
            for name, value in values.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        self._finish_backward()
        return metrics

    def step(self) -> None:
        """Clip, step the optimizer, rewrite theta, clear gradients. Collective: every rank must call."""
        if self.clip_norm is not None:
            self.clip(self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._normalise_rows()

    @torch.no_grad()
    def _normalise_rows(self) -> None:
        for parameter in self._unit_rows:
            parameter.copy_(nn.functional.normalize(parameter, dim=1))

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale gradients down to one global L2 norm, and return the norm before. Collective.

        Gradients that `score_step` normalises have one size anyway, and are left as they are.
        """
        squares: dict[bool, list[Tensor]] = {False: [], True: []}
        shards, grads = Shards(), []
        for trained in self.trained.values():
            if trained.tensor.grad is None or id(trained.tensor) in self._normalised:
                continue
            piece = trained.piece(trained.tensor.grad)
            grads.append(piece)
            squares[trained.shards.is_whole].append(piece.double().square().sum())
            shards = shards if trained.shards.is_whole else trained.shards
        if not grads:
            return torch.zeros(())
        zero = torch.zeros((), dtype=torch.float64, device=grads[0].device)
        total = shards.sum(sum(squares[False], zero)) + sum(squares[True], zero)
        factor = (max_norm / (total.sqrt() + 1e-6)).clamp(max=1)
        for grad in grads:
            grad.mul_(factor.to(grad.dtype))
        return total.sqrt()

    # ---- state

    @property
    def masks_step(self) -> int:
        """The steps that masks have made."""
        return max((masks.step for masks in self.masks.values()), default=0)

    def parts(self) -> list[TensorPart]:
        """Return this process's parts of the state as part/name, views in one order on all ranks."""
        found = [part for name, trained in self.trained.items() for part in self._parts_of(name, trained)]
        found += self._statistics.parts(self.world)
        return found + (self.teacher.parts(self.world) if self.teacher is not None else [])

    def load(self, source: StateSource, *, step: int, parts: Collection[str] = PARTS) -> None:
        """Go on from a state of any engine and world size. Collective: every rank must call.

        Args:
            step: steps that masks have made.
            parts: what is read of the state; momentum and teacher begin anew where they are left out.

        Raises:
            ValueError: names or shapes are not those of what is trained here.
        """
        shapes = by_part({key: one for key, one in source.shapes.items() if key.partition("/")[0] in parts})
        check_fits(shapes["parameters"], {name: trained.shape for name, trained in self.trained.items()})
        for name, trained in self.trained.items():
            self._make_moments(trained, {part for part in MOMENTS if name in shapes[part]})
            for own in self._parts_of(name, trained):
                if name in shapes[own.name.partition("/")[0]]:
                    source.read_into(own)
        self._statistics.check_names(shapes["statistics"])
        for own in self._statistics.parts(self.world):
            source.read_into(own)
        if self.teacher is not None:
            self.teacher.load(source if shapes["teacher"] else None, shapes["teacher"], self.world)
        for masks in self.masks.values():
            masks.step = step
        self.refresh()

    def state(self) -> EngineState:
        """Return what is trained, whole, by parameter name. Collective: every rank must call."""
        return EngineState(**by_part(gather(self.parts(), self.world)), step=self.masks_step)

    def load_state(self, state: EngineState) -> None:
        """Go on from whole tensors; see `load`. Collective: every rank must call."""
        tensors = {f"{part}/{name}": one for part in PARTS for name, one in getattr(state, part).items()}
        self.load(KeptParts(whole_parts(tensors)), step=state.step)

    @torch.no_grad()
    def whole_weights(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return the encoder's tensors as they stand, whole, by name: all, or those of these names.

        Collective: every rank must call.
        """
        return dict(self.each_whole_weight(names))

    @torch.no_grad()
    def each_whole_weight(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield those one after the other. Collective: every rank must go through to the end."""
        shards = self._shards_of(self.encoder, {})
        for name, tensor in self.encoder.state_dict().items():
            if names is None or name in names:
                yield name, shards.whole_weight(name, tensor)

    def refresh(self) -> None:
        """Make theta follow what was written into the trained tensors. Collective: every rank must call."""
        for masks in self.masks.values():
            masks.rewrite()

    # ---- what engines override

    def gathered(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Return a context in which a head's parameters are whole on every rank. Collective."""
        return nullcontext()

    def _spread(self, blocks: Sequence[str]) -> None:
        """Shard the encoder, before masks are attached."""

    def _shards_of(self, model: nn.Module, options: Mapping[str, Any]) -> Shards:
        return Shards()

    def _begin_micro_batch(self, *, is_last: bool) -> None:
        """Decide whether the coming backward reduces gradients."""

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = self.module(batch)
        return loss, metrics

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def _finish_backward(self) -> None:
        """Sum over ranks what backward left on each, and pull masks' gradients back.

        One collective carries the gradients of all that is replicated and sums of sharded masks: <G, theta>,
        and under score_step=rms the squares.
        """
        grads = [p.grad for p in self._replicated if p.grad is not None]
        sharded = [masks for masks in self.masks.values() if masks.has_sums]
        sums = [masks.back_sums() / masks.shards.copies for masks in sharded]
        if self.world.size > 1 and (grads or sums):
            _sum_together(self.world, [*grads, *sums])
        for masks in self.masks.values():
            masks.pull_back(sums.pop(0) if masks.has_sums else None, take=True)

    def _scores(self) -> list[nn.Parameter]:
        """Return the tensors whose gradients are normalised: scores, but no weights that stand for them."""
        if self.score_step == "plain":
            return []
        chosen = [masks for masks in self.masks.values() if not masks.family.starts_from_weight]
        return [parameter for masks in chosen for parameter in masks.parameters()]

    def _slots(self) -> dict[str, str]:
        return ADAMW_SLOTS if "betas" in self.optimizer.defaults else SGD_SLOTS

    def _parts_of(self, name: str, trained: TrainedParameter) -> list[TensorPart]:
        """Return this process's part of a trained tensor, and those of the optimizer's state of it."""
        own = self.optimizer.state.get(trained.tensor, {})
        tensors = {part: own[slot] for part, slot in self._slots().items() if own.get(slot) is not None}
        return [
            trained.part(f"{part}/{name}", tensor, self.world)
            for part, tensor in {"parameters": trained.tensor, **tensors}.items()
        ]

    def _make_moments(self, trained: TrainedParameter, wanted: Collection[str]) -> None:
        """Make the optimizer's state of a tensor anew, to be read into; `wanted` are names of `MOMENTS`."""
        self.optimizer.state.pop(trained.tensor, None)
        for part, slot in self._slots().items():
            if part in wanted:
                self.optimizer.state[trained.tensor][slot] = empty_moment(
                    self.optimizer, part, trained.tensor
                )

    # ---- shared parts

    def _autocast(self) -> torch.autocast:
        is_bf16 = self.config.precision == "bf16"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=is_bf16)

    def _name_of(self, model: nn.Module) -> str:
        return next(name for name, module in self.module.named_modules() if module is model)

    def _find_trained(self, optimizer: Optimizer) -> dict[str, TrainedParameter]:
        """Return what the optimizer holds: scores by their parameter's name, the rest by their own."""
        held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        found: dict[str, TrainedParameter] = {}
        for prefix, masks in self.masks.items():
            for entry in masks.entries:
                first_row = masks.shards.first_row(entry.name, entry.theta)
                name = f"{prefix}.{entry.name}"
                # no parameter's name has a colon
                for tensor, key in ((entry.scores, name), (entry.weight, f"{name}:weight")):
                    if held.pop(id(tensor), None) is not None:
                        found[key] = TrainedParameter(
                            tensor, entry.name, entry.theta.shape, masks.shards, first_row
                        )
                if entry.numbers is not None and held.pop(id(entry.numbers), None) is not None:
                    found[f"{name}:numbers"] = TrainedParameter(
                        entry.numbers, entry.name, entry.numbers.shape, Shards()
                    )
        whole, inside = Shards(), {id(p) for p in self.encoder.parameters()}
        for name, parameter in self.module.named_parameters():
            if held.pop(id(parameter), None) is not None:
                shards = self._shards_of(self.encoder, {}) if id(parameter) in inside else whole
                first_row = shards.first_row(name, parameter)
                found[name] = TrainedParameter(parameter, name, parameter.shape, shards, first_row)
        assert not held, f"{len(held)} tensors of the optimizer belong neither to the module nor to its masks"
        return found


def reduce_dtype(config: EngineConfig) -> torch.dtype | None:
    """Return the dtype that gradients are reduced in; None for their own."""
    return torch.bfloat16 if config.reduce_dtype == "bf16" else None


def _sum_together(world: World, tensors: Sequence[Tensor]) -> None:
    """Sum tensors over ranks, in place, in one collective of the first one's dtype."""
    parts = [tensor.reshape(-1).to(world.device, tensors[0].dtype) for tensor in tensors]
    flat = world.sum(torch.cat(parts))
    for tensor, summed in zip(tensors, flat.split([len(part) for part in parts]), strict=True):
        tensor.copy_(summed.view_as(tensor))
