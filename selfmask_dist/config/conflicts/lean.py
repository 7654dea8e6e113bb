"""Conflicts of what weights, scores and momentum are held in with engines, families and optimizers."""

from collections.abc import Iterator

from selfmask_dist.config.all_sections import AllSections
from selfmask_dist.config.loading import Conflict
from selfmask_dist.config.masks import FIXED_FAMILIES, OTHER_FAMILIES
from selfmask_dist.config.objectives import WITH_TEACHER


def lean_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield what does not go with numbers held in bf16: engine.weights, engine.scores, engine.momentum."""
    engine = config.engine
    if engine.weights == "bf16":
        yield from _weight_conflicts(config)
    if engine.scores == "bf16":
        yield from _score_conflicts(config)
    if engine.momentum == "bf16":
        if config.optim.kind != "sgd":
            yield Conflict(
                ("engine.momentum", "optim.kind"),
                f"engine.momentum=bf16 holds SGD's momentum, and optim.kind={config.optim.kind} keeps other "
                "numbers; set engine.momentum=float32, or optim.kind=sgd",
            )
        if engine.name == "deepspeed":
            yield Conflict(
                ("engine.momentum", "engine.name"),
                "engine.name=deepspeed keeps momentum itself, in float32; set engine.momentum=float32",
            )


def _weight_conflicts(config: AllSections) -> Iterator[Conflict]:
    engine, family = config.engine, config.mask.family
    if engine.name != "ddp":
        yield Conflict(
            ("engine.weights", "engine.name"),
            f"engine.weights=bf16 is not wired for engine.name={engine.name}; use engine.name=ddp, or "
            "engine.weights=float32",
        )
    if engine.precision != "bf16":
        yield Conflict(
            ("engine.weights", "engine.precision"),
            "engine.weights=bf16 computes in bf16 as well; set engine.precision=bf16",
        )
    if config.eval.precision != "bf16":
        yield Conflict(
            ("engine.weights", "eval.precision"),
            "engine.weights=bf16 measures the encoder as it trains it, and the frozen one is to be measured "
            "alike; set eval.precision=bf16",
        )
    if config.method != "mask":
        yield Conflict(
            ("engine.weights", "method"),
            f"engine.weights=bf16 is for method=mask, and method={config.method} would train, merge or hold "
            "rounded weights; set engine.weights=float32",
        )
    if family in (*OTHER_FAMILIES, *FIXED_FAMILIES) or ":" in family:
        yield Conflict(
            ("engine.weights", "mask.family"),
            f"engine.weights=bf16 holds frozen weights under a trained mask, and mask.family={family} is not "
            "known to be one; set engine.weights=float32",
        )
    if config.procedure.hold is not None:
        yield Conflict(
            ("engine.weights", "procedure.hold"),
            "engine.weights=bf16 would round what procedure.hold keeps; set engine.weights=float32",
        )


def _score_conflicts(config: AllSections) -> Iterator[Conflict]:
    if config.engine.weights != "bf16":
        yield Conflict(
            ("engine.scores", "engine.weights"),
            "engine.scores=bf16 needs scores that step tensor by tensor; set engine.weights=bf16 as well",
        )
    if config.optim.kind != "sgd":
        yield Conflict(
            ("engine.scores", "optim.kind"),
            f"engine.scores=bf16 rounds SGD's steps at random, and optim.kind={config.optim.kind} is none; "
            "set engine.scores=float32, or optim.kind=sgd",
        )
    if config.optim.clip_norm is not None and config.optim.score_step == "plain":
        yield Conflict(
            ("engine.scores", "optim.clip_norm"),
            "optim.clip_norm looks at the gradients of all scores together, and engine.scores=bf16 has them "
            "one tensor at a time; set optim.clip_norm=null, or optim.score_step=rms, which needs none",
        )
    if config.train.ema is not None:
        yield Conflict(
            ("engine.scores", "train.ema"),
            "train.ema averages scores over steps, and bf16 would swallow the average's own; set "
            "engine.scores=float32, or train.ema=null",
        )
    if config.objective.name in WITH_TEACHER:
        yield Conflict(
            ("engine.scores", "objective.name"),
            f"objective.name={config.objective.name} averages scores over steps, and bf16 would swallow the "
            "average's own; set engine.scores=float32",
        )
