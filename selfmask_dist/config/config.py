"""What a run is: one frozen, validated object, made from

    defaults < YAML file < key=value overrides

The keys stand in `config_sections`. Knows nothing of torch, and does not look whether a backbone, a folder or
a parameter exists: that is checked where it is used.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from selfmask_dist.config import backbone as config_backbone
from selfmask_dist.config import help as config_help
from selfmask_dist.config import loading as config_loading
from selfmask_dist.config import masks as config_masks
from selfmask_dist.config import objectives as config_objectives
from selfmask_dist.config import procedures as config_procedures
from selfmask_dist.config import sections as config_sections
from selfmask_dist.config import selfsupervised as config_selfsupervised
from selfmask_dist.config import training as config_training
from selfmask_dist.config import yaml as config_yaml
from selfmask_dist.config.loading import ConfigError, Conflict, ConflictError
from selfmask_dist.config.sections import Section, science

__all__ = ["Config", "ConfigError", "describe", "load_config", "to_yaml"]


class Config(Section):
    """A run, whole: the same object on every rank, and saved with the run."""

    seed: int = science(0, "Seed of sample order, augmentation and new heads.", ge=0, le=2**32 - 1)
    method: Literal[
        "mask",
        "cascade",
        "finetune",
        "probe",
        "frozen",
        "packnet",
        "lottery",
        "evolution",
        "supsup",
        "wise_ft",
        "rebasin",
        "ensemble",
    ] = science(
        "mask",
        "What is trained. mask: binary masks on frozen weights. cascade: a dispatcher's mask, a router "
        "and one expert's mask for each of its clusters. finetune: weights, see finetune (baselines). "
        "probe: a linear probe on frozen features (baseline). frozen: nothing, k-NN on frozen features "
        "(baseline). packnet, lottery, evolution, supsup, wise_ft, rebasin, ensemble: chains of mask or "
        "finetune runs, see procedure. "
        "Keys that only another method uses are ignored, so that one file serves them all.",
    )
    backbone: config_backbone.BackboneConfig = Field(default_factory=config_backbone.BackboneConfig)
    mask: config_masks.MaskConfig = Field(default_factory=config_masks.MaskConfig)
    data: config_sections.DataConfig = Field(default_factory=config_sections.DataConfig)
    objective: config_sections.ObjectiveConfig = Field(default_factory=config_sections.ObjectiveConfig)
    crops: config_selfsupervised.CropsConfig = Field(default_factory=config_selfsupervised.CropsConfig)
    swav: config_selfsupervised.SwavConfig = Field(default_factory=config_selfsupervised.SwavConfig)
    simclr: config_objectives.SimclrConfig = Field(default_factory=config_objectives.SimclrConfig)
    moco_v2: config_objectives.MocoV2Config = Field(default_factory=config_objectives.MocoV2Config)
    moco_v3: config_objectives.MocoV3Config = Field(default_factory=config_objectives.MocoV3Config)
    dino: config_objectives.DinoConfig = Field(default_factory=config_objectives.DinoConfig)
    clip: config_objectives.ClipConfig = Field(default_factory=config_objectives.ClipConfig)
    slip: config_objectives.SlipConfig = Field(default_factory=config_objectives.SlipConfig)
    cascade: config_selfsupervised.CascadeConfig = Field(default_factory=config_selfsupervised.CascadeConfig)
    procedure: config_procedures.ProcedureConfig = Field(default_factory=config_procedures.ProcedureConfig)
    finetune: config_training.FinetuneConfig = Field(default_factory=config_training.FinetuneConfig)
    optim: config_training.OptimConfig = Field(default_factory=config_training.OptimConfig)
    train: config_sections.TrainConfig = Field(default_factory=config_sections.TrainConfig)
    eval: config_sections.EvalConfig = Field(default_factory=config_sections.EvalConfig)
    engine: config_sections.EngineConfig = Field(default_factory=config_sections.EngineConfig)
    checkpoint: config_sections.CheckpointConfig = Field(default_factory=config_sections.CheckpointConfig)
    run: config_sections.RunConfig = Field(default_factory=config_sections.RunConfig)
    launch: config_sections.LaunchConfig = Field(default_factory=config_sections.LaunchConfig)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        checks = (
            _backbone_conflicts,
            _objective_conflicts,
            _views_conflicts,
            _mask_conflicts,
            _procedure_conflicts,
            _engine_conflicts,
            _number_conflicts,
        )
        if conflicts := [conflict for check in checks for conflict in check(self)]:
            raise ConflictError(conflicts)
        return self


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run: defaults, then the YAML file, then `key=value` overrides.

    Args:
        path: a YAML file: one of `configs/`, or the `config.yaml` of an earlier run; None for the defaults.
        overrides: dotted keys with YAML values, `optim.score_lr=10` or `eval.knn_k=[20]`; a later one wins.

    Raises:
        ConfigError: with every problem of file and overrides, each with its place and the way out.
    """
    return config_loading.load(Config, path, overrides)


def to_yaml(config: Config) -> str:
    """Every key with its value as YAML in ASCII, by section and group; loading it gives an equal Config."""
    return config_yaml.dump(config.model_dump(mode="json"), config_help.groups(Config), config_help.GROUPS)


def describe(width: int | None = None) -> str:
    """All keys for `--help` by group: name, type, default, unit and effect.

    `width`: columns; None for the terminal's, 100 at most.
    """
    return config_help.describe(Config, width)


# ---- values that are fine one by one and not together


def _backbone_conflicts(config: Config) -> Iterator[Conflict]:
    backbone = config.backbone
    library, _, model = backbone.name.partition(":")
    if library not in ("timm", "open_clip") or not model:
        yield Conflict(
            ("backbone.name",),
            f"backbone.name {backbone.name!r} is neither timm:<model> nor open_clip:<model>[/<pretrained "
            "tag>]",
        )
    names_weights = "/" in model or ":" in model  # a tag, or hf-hub:<organisation>/<model> and the like
    wants_weights = backbone.pretrained and backbone.weights is None
    if library == "open_clip" and model and wants_weights and not names_weights:
        yield Conflict(
            ("backbone.name", "backbone.pretrained"),
            f"backbone.name {backbone.name!r} names no pretrained weights; write open_clip:{model}/<tag>, "
            "give a file as backbone.weights, or set backbone.pretrained=false for random weights",
        )
    if backbone.random != "library" and (wants_weights or backbone.weights is not None):
        yield Conflict(
            ("backbone.random", "backbone.pretrained"),
            f"backbone.random={backbone.random} draws weights, and pretrained ones are asked for; set "
            "backbone.pretrained=false and backbone.weights=null",
        )
    if (backbone.mean is None) != (backbone.std is None):
        yield Conflict(
            ("backbone.mean", "backbone.std"),
            "backbone.mean and backbone.std go together: set both or neither",
        )


def _objective_conflicts(config: Config) -> Iterator[Conflict]:
    objective = config.objective
    if objective.head == "clip_text" and not config.backbone.name.startswith("open_clip:"):
        yield Conflict(
            ("objective.head", "backbone.name"),
            f"objective.head=clip_text needs CLIP's text tower, which {config.backbone.name} does not have; "
            "use a backbone open_clip:<model>/<tag>, or objective.head=linear",
        )
    if objective.head == "masked" and config.method == "finetune":
        yield Conflict(
            ("method", "objective.head"),
            "method=finetune trains weights and has no masked head; set objective.head=linear",
        )
    if missing := [prompt for prompt in objective.prompts if "{}" not in prompt]:
        yield Conflict(
            ("objective.prompts",), f"objective.prompts: {missing[0]!r} has no {{}} where the class name goes"
        )
    if objective.distill_from is not None and objective.name != "supervised":
        yield Conflict(
            ("objective.distill_from", "objective.name"),
            f"objective.distill_from teaches classes, and objective.name={objective.name} has none; set "
            "objective.name=supervised, or objective.distill_from=null",
        )
    if config.method == "cascade" and objective.name != "swav":
        yield Conflict(
            ("method", "objective.name"),
            f"method=cascade trains without labels; set objective.name=swav in place of {objective.name}",
        )


def _views_conflicts(config: Config) -> Iterator[Conflict]:
    name, crops = config.objective.name, config.crops
    if name in config_objectives.TWO_VIEWS and (crops.global_count != 2 or crops.local_count):
        yield Conflict(
            ("objective.name", "crops.global_count", "crops.local_count"),
            f"objective.name={name} is on two views of an image; set crops.global_count=2 and "
            "crops.local_count=0",
        )
    if name in config_objectives.WITH_CAPTIONS and not config.backbone.name.startswith("open_clip:"):
        yield Conflict(
            ("objective.name", "backbone.name"),
            f"objective.name={name} needs CLIP's text tower, which {config.backbone.name} does not have; use "
            "a backbone open_clip:<model>/<tag>",
        )
    if name not in ("supervised", "swav") and config.train.accumulate > 1:
        yield Conflict(
            ("objective.name", "train.accumulate"),
            f"objective.name={name} holds images against the whole batch, which micro-steps would cut; set "
            "train.accumulate=1 (engine.checkpoint_activations=true saves memory)",
        )
    if name in config_objectives.WITH_TEACHER and config.engine.name == "deepspeed":
        yield Conflict(
            ("objective.name", "engine.name"),
            f"objective.name={name} has a teacher, a moving average that engine.name=deepspeed does not "
            "keep; use engine.name=fsdp",
        )


def _mask_conflicts(config: Config) -> Iterable[Conflict]:
    return config_masks.conflicts(
        config.mask,
        method=config_procedures.trained_by(config.procedure, config.method),
        engine=config.engine.name,
        objective=config.objective.name,
        head=config.objective.head,
    )


def _procedure_conflicts(config: Config) -> Iterable[Conflict]:
    return config_procedures.conflicts(
        config.procedure,
        method=config.method,
        engine=config.engine.name,
        objective=config.objective.name,
        head=config.objective.head,
        head_norm=config.objective.head_norm,
        finetune=config.finetune.train,
        family=config.mask.family,
        max_steps=config.train.max_steps,
    )


def _engine_conflicts(config: Config) -> Iterator[Conflict]:
    engine = config.engine.name
    if config.optim.kind == "adamw" and engine == "deepspeed":
        yield Conflict(
            ("optim.kind", "engine.name"),
            "optim.kind=adamw is not wired for engine.name=deepspeed; use engine.name=fsdp or optim.kind=sgd",
        )
    if config.method == "finetune" and config.finetune.train == "lora":
        if engine == "deepspeed":
            yield Conflict(
                ("finetune.train", "engine.name"),
                "finetune.train=lora is not wired for engine.name=deepspeed; use engine.name=ddp or fsdp",
            )
        if config.finetune.freeze:
            yield Conflict(
                ("finetune.train", "finetune.freeze"),
                "finetune.train=lora trains additions alone; choose them by finetune.lora_targets and leave "
                "finetune.freeze empty",
            )


def _number_conflicts(config: Config) -> Iterator[Conflict]:
    train, warmup, first = config.train, config.optim.warmup_epochs, config.optim.head_first_epochs
    if warmup > train.epochs:
        yield Conflict(
            ("optim.warmup_epochs", "train.epochs"),
            f"optim.warmup_epochs ({warmup:g}) is longer than train.epochs ({train.epochs:g})",
        )
    if first and first + warmup > train.epochs:
        yield Conflict(
            ("optim.head_first_epochs", "optim.warmup_epochs", "train.epochs"),
            f"optim.head_first_epochs ({first:g}) and optim.warmup_epochs ({warmup:g}) leave nothing of "
            f"train.epochs ({train.epochs:g})",
        )
    headless = {
        "supervised": ("objective.head", config.objective.head == "clip_text"),
        "clip": ("clip.text", config.clip.text == "frozen"),
    }
    key, has_no_head = headless.get(config.objective.name, ("", False))
    if first and has_no_head:
        yield Conflict(
            ("optim.head_first_epochs", key),
            f"optim.head_first_epochs: with the text tower as it is ({key}) there is no head to train first",
        )
    if first and config.engine.name == "deepspeed":
        yield Conflict(
            ("optim.head_first_epochs", "engine.name"),
            "engine.name=deepspeed updates head and masks in one partition, where masks cannot wait; set "
            "another engine, or mask.init_from a run with a tiny optim.score_lr",
        )
    if train.accumulate > train.global_batch_size:
        yield Conflict(
            ("train.accumulate", "train.global_batch_size"),
            f"train.accumulate ({train.accumulate}) leaves micro-steps without an image: "
            f"train.global_batch_size is {train.global_batch_size}",
        )
    for key, (smallest, largest) in (
        ("data.crop_scale", config.data.crop_scale),
        ("crops.global_scale", config.crops.global_scale),
        ("crops.local_scale", config.crops.local_scale),
    ):
        if smallest > largest:
            yield Conflict((key,), f"{key}: the smaller area comes first: [{largest:g}, {smallest:g}]")


def flat_science(config: Config) -> dict[str, Any]:
    """Return the keys that change results, dotted, with their values."""
    flat: dict[str, Any] = {"seed": config.seed, "method": config.method}
    for section, values in config:
        for name, info in getattr(type(values), "model_fields", {}).items():
            if (info.json_schema_extra or {}).get("group") == "science":
                flat[f"{section}.{name}"] = getattr(values, name)
    return flat
