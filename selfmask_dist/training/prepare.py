"""What trains, made ready on an engine: masks or free weights, the optimizer's groups, entries to hold.

attach masks (or free weights) -> one named group for each kind of parameter -> optimizer -> engine starts
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from selfmask_dist import data, objectives
from selfmask_dist.backbones import Backbone
from selfmask_dist.backbones.weights import read_state_dict
from selfmask_dist.common.names import ENCODER
from selfmask_dist.config import Config
from selfmask_dist.evals.embed import embed_views
from selfmask_dist.evals.search import search
from selfmask_dist.maskfile.api import Masks, attach
from selfmask_dist.masking import Family, build_family
from selfmask_dist.objectives.nbd import Nbd, Search, WarmupViews, Whitening
from selfmask_dist.parallel import Engine, World
from selfmask_dist.parallel.lean.sgd import LeanSGD
from selfmask_dist.parallel.pca import fit_pca
from selfmask_dist.runs.checkpoint import loading_peers
from selfmask_dist.runs.context import RunContext
from selfmask_dist.training.additions.methods import METHOD, trained_names
from selfmask_dist.training.build import mild_crops
from selfmask_dist.training.finetune import choose_weights
from selfmask_dist.training.habits.layer_rates import describe_rates, with_layer_rates
from selfmask_dist.training.hold import Hold
from selfmask_dist.training.saving import Trainable, open_last_checkpoint, read_outcome

_OF_SCORES = ("scores", "head_scores")  # groups by name up to a dot: layer rates add .depthN


def prepare(
    config: Config,
    engine: Engine,
    objective: objectives.Objective,
    *,
    num_steps: int = 1,
    blocks: Sequence[str] = (),
) -> Trainable:
    """Attach masks or free the weights, build the optimizer with one named group for each kind of parameter,
    and start the engine.

    Args:
        num_steps: of the whole training.
        blocks: names of the encoder's repeated blocks, for `optim.layer_decay`.
    """
    groups: list[dict[str, Any]] = []
    masks = head_masks = None
    names: list[str] = []
    if config.method == "mask":
        masks, head_masks = _attach_masks(config, engine, objective, groups, num_steps=num_steps)
        summary = masks.summary()
    else:
        section = config.finetune
        if section.peft:
            names = trained_names(engine.encoder, str(section.peft[METHOD]))
        else:
            names = choose_weights(engine.encoder, section.train, freeze=section.freeze)
        weights = engine.free(engine.encoder, names)
        groups.append(_weight_group(config, weights))
        count = sum(parameter.numel() for parameter in weights)
        summary = f"trained  {count:,} weights of the backbone ({len(names)} tensors)"
    if head_masks is None and (head := objective.head_parameters()):
        group = {
            "name": "head",
            "params": head,
            "base_lr": config.optim.head_lr,
            "weight_decay": config.optim.head_weight_decay,
        }
        groups.append(group)
        summary += f"\nhead     {sum(p.numel() for p in head):,} weights"
    if (decay := config.optim.layer_decay) is not None:
        groups = with_layer_rates(groups, engine.encoder, masks, blocks=blocks, decay=decay)
        summary += f"\n{describe_rates(groups, decay)}"
    for group in groups:
        group["lr"] = group["base_lr"]
    optimizer = _build_optimizer(config, groups)
    optimizer.register_step_pre_hook(partial(_hold, objective))
    optimizer.register_step_pre_hook(_wait)
    engine.keep_unit_rows(objective.unit_rows())
    engine.start(optimizer)
    if (heads := objective.teacher_parameters()) is not None:
        objective.teacher = engine.keep_teacher(heads)
    statistics = {name: buffer.clone() for name, buffer in engine.encoder.named_buffers()} if names else {}
    return Trainable(masks, head_masks, summary, tuple(names), statistics)


def _attach_masks(
    config: Config,
    engine: Engine,
    objective: objectives.Objective,
    groups: list[dict[str, Any]],
    *,
    num_steps: int,
) -> tuple[Masks, Masks | None]:
    """Masks on the encoder and, where it is to have one, on the head; what they train goes into `groups`."""
    section = config.mask
    head_masks = None
    family = mask_family(config, num_steps=num_steps)
    attach_masks = partial(engine.attach, attach_fn=attach, init=section.init)
    masks = attach_masks(
        engine.encoder,
        family=family,
        first_layers=section.first_layers,
        include=section.include,
        exclude=section.exclude,
        split_qkv=section.split_qkv,
        allow_norm=section.allow_norm,
        **_second_weights(config, family),
    )
    groups += _mask_groups(config, masks)
    if config.objective.head == "masked":
        of_head = type(family)(replace(family.options, maskable=1.0))  # which is of the backbone
        head_masks = attach_masks(objective, family=of_head, include="head.*")
        parameters = list(head_masks.parameters())
        groups.append({"name": "head_scores", "params": parameters, "base_lr": config.optim.score_lr})
    return masks, head_masks


def mask_family(config: Config, *, num_steps: int) -> Family:
    """Return the family of masks, with its options.

    Args:
        num_steps: of the whole training, which a schedule of the kept share follows.
    """
    section = config.mask
    return build_family(
        section.family,
        threshold=section.threshold,
        scale=section.scale,
        keep=section.keep,
        keep_scope=section.keep_scope,
        keep_schedule=section.keep_schedule,
        keep_steps=round((section.keep_until - section.keep_from) * num_steps),
        keep_warmup=round(section.keep_from * num_steps),
        penalty=section.penalty,
        block_rows=section.block_rows,
        block_columns=section.block_columns,
        maskable=section.maskable,
        maskable_by=section.maskable_by,
        seed=config.seed,
    )


def _mask_groups(config: Config, masks: Masks) -> list[dict[str, Any]]:
    """Return groups of scores, weights and small numbers; latent weights are trained as weights are."""
    groups = []
    numbers = [entry.numbers for entry in masks.entries if entry.numbers is not None]
    of_numbers = {id(number) for number in numbers}
    scores = [parameter for parameter in masks.parameters() if id(parameter) not in of_numbers]
    if scores and masks.family.starts_from_weight:
        groups.append(_weight_group(config, scores))
    elif scores:
        groups.append({"name": "scores", "params": scores, "base_lr": config.optim.score_lr})
    if weights := list(masks.weight_parameters()):
        groups.append(_weight_group(config, weights))
    if numbers:  # scales of weights, or scores of blocks; without weight decay
        rate = config.optim.weight_lr if masks.family.starts_from_weight else config.optim.score_lr
        groups.append({"name": "numbers", "params": numbers, "base_lr": rate})
    return groups


def _second_weights(config: Config, family: Family) -> dict[str, Any]:
    """Return the argument `other` of attach, for families that have second frozen weights.

    Raises:
        ValueError: they are not named, or cannot be read.
    """
    if not family.needs_other:
        return {}
    if config.mask.graft_from is None:
        raise ValueError(
            "mask.graft_from is not set: give the fine-tuned weights that mask.family=graft chooses from, "
            "the folder of a finished run of method=finetune or a file"
        )
    path = Path(config.mask.graft_from)
    if path.is_dir():
        weights = read_outcome(path).weights
        if weights is None or weights.name != ENCODER:
            raise ValueError(
                f"mask.graft_from: {path} has no {ENCODER}; name the folder of a finished run of "
                "method=finetune, or a file of weights"
            )
        path = weights
    return {"other": read_state_dict(path, setting="mask.graft_from")}


def _weight_group(config: Config, weights: list[nn.Parameter]) -> dict[str, Any]:
    """Return the optimizer's group of the backbone's weights."""
    return {
        "name": "weights",
        "params": weights,
        "base_lr": config.optim.weight_lr,
        "weight_decay": config.optim.weight_decay,
    }


def _build_optimizer(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    optim = config.optim
    if optim.kind == "adamw":
        # weight decay is each group's own; torch's default for AdamW would pull the scores to the threshold
        return torch.optim.AdamW(groups, betas=(optim.momentum, optim.beta2), weight_decay=0.0)
    if "bf16" in (config.engine.weights, config.engine.momentum):
        for group in groups:
            is_of_scores = group["name"].partition(".")[0] in _OF_SCORES
            group["in_bf16"] = config.engine.momentum == "bf16" and is_of_scores
        return LeanSGD(groups, momentum=optim.momentum, seed=config.seed)
    return torch.optim.SGD(groups, momentum=optim.momentum)


def _hold(objective: objectives.Objective, *_: Any) -> None:
    for parameter in objective.held_parameters():
        parameter.grad = None


def _wait(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Drop the gradient of groups whose time has not come, so that they gather no momentum either."""
    for group in optimizer.param_groups:
        if group["lr"] == 0:
            for parameter in group["params"]:
                parameter.grad = None


def hold_weights(config: Config, engine: Engine) -> None:
    """Keep what `procedure.hold` says, from the engine's present weights on.

    Raises:
        ValueError: the file cannot be read, or does not fit the encoder.
    """
    path = config.procedure.hold
    if path is None:
        return
    try:
        codes = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"procedure.hold: {path} cannot be read: {error}") from error
    Hold(engine.encoder, codes).bind(engine.optimizer)


def load_first_state(engine: Engine, run: Path, *, fingerprint: str) -> None:
    """Load scores, heads and running statistics of a finished run, without its momentum. Collective.

    Raises:
        ValueError: it has no checkpoint, one of another backbone, or one of other parameters.
    """
    try:
        checkpoint = open_last_checkpoint(run, loading_peers(engine.world))
    except ValueError as error:
        raise ValueError(f"mask.init_from: {error}") from error
    if checkpoint.values["identity"]["backbone"] != fingerprint:
        raise ValueError(f"mask.init_from: {run} was trained on another backbone or other weights")
    engine.load(checkpoint, step=0, parts=("parameters", "statistics"))


# ---- the bank of objective.name=nbd


def search_bank(world: World) -> Search:
    """Return the search for neighbours in a bank whose rows are dealt to ranks in turn."""

    def nearest(bank: Tensor, present: Tensor, k: int) -> tuple[Tensor, Tensor]:
        ids = torch.arange(len(bank), device=bank.device) * world.size + world.rank
        return search(bank[present], bank, k=k, bank_ids=ids[present], query_ids=ids, ranks=world)

    return nearest


def begin_bank(
    config: Config,
    context: RunContext,
    backbone: Backbone,
    objective: Nbd,
    train: data.Source,
    quarantine: data.Quarantine,
) -> None:
    """Give the objective features of every picture under the encoder as it stands, and let it warm up.

    One pass over the data, the encoder in eval mode: each picture as evaluations see it, its mirror image
    (both count double) and `nbd.frozen_views` mild crops. Collective: every rank must call.
    """
    world, preprocessing = context.world, backbone.spec.preprocessing
    context.writer.message(
        f"bank     frozen features of {len(train):,} pictures, {config.nbd.frozen_views} crops each"
    )
    one = data.eval_transform(preprocessing)
    crops = config.nbd.frozen_views
    loader = data.eval_loader(
        train,
        data.Joined(one, mild_crops(config, preprocessing, count=crops)) if crops else one,
        batch_size=max(config.eval.batch_size // (2 + crops), 1),
        rank=world.rank,
        world_size=world.size,
        workers=data.Workers(config.engine.workers, config.engine.worker_kind),
        quarantine=quarantine,
    )
    drawn = objective.warmup_draws[0].unique()
    drawn = drawn[drawn % world.size == world.rank]
    paced = context.paced_check()
    found = embed_views(
        backbone.encoder, loader, world=world, flip=config.data.flip, keep=drawn, on_batch=paced
    )
    present = torch.ones(len(found.means), dtype=torch.bool, device=world.device)
    present[found.broken // world.size] = False
    seen = found.means[present]
    pca = fit_pca([seen], num_components=objective.dim, all_reduce=world.sum, at_most=True)
    variance = pca.explained_variance
    scale = (variance + config.nbd.shrinkage * variance.mean()).rsqrt()
    whitening = Whitening(pca.mean.float(), (pca.components.T * scale).float())
    views = WarmupViews(drawn.to(world.device), found.kept)
    objective.begin(found.means, whitening, views, present, search_bank(world))
