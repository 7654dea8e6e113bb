"""What a run is: one frozen, validated object, made from

    defaults < YAML file < key=value overrides

The keys stand in `config_sections`. Knows nothing of torch, and does not look whether a backbone, a folder or
a parameter exists: that is checked where it is used.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from selfmask_dist import (
    config_help,
    config_loading,
    config_masks,
    config_sections,
    config_selfsupervised,
    config_yaml,
)
from selfmask_dist.config_loading import ConfigError, Conflict, ConflictError
from selfmask_dist.config_sections import Section, science

__all__ = ["Config", "ConfigError", "describe", "load_config", "to_yaml"]


class Config(Section):
    """A run, whole: the same object on every rank, and saved with the run."""

    seed: int = science(0, "Seed of sample order, augmentation and new heads.", ge=0, le=2**32 - 1)
    method: Literal["mask", "cascade", "finetune", "probe", "frozen"] = science(
        "mask",
        "What is trained. mask: binary masks on frozen weights. cascade: a dispatcher's mask, a router and "
        "one expert's mask for each of its clusters. finetune: all weights (baseline). probe: a "
        "linear probe on frozen features (baseline). frozen: nothing, k-NN on frozen features (baseline). "
        "Keys that only another method uses are ignored, so that one file serves them all.",
    )
    backbone: config_sections.BackboneConfig = Field(default_factory=config_sections.BackboneConfig)
    mask: config_masks.MaskConfig = Field(default_factory=config_masks.MaskConfig)
    data: config_sections.DataConfig = Field(default_factory=config_sections.DataConfig)
    objective: config_sections.ObjectiveConfig = Field(default_factory=config_sections.ObjectiveConfig)
    crops: config_selfsupervised.CropsConfig = Field(default_factory=config_selfsupervised.CropsConfig)
    swav: config_selfsupervised.SwavConfig = Field(default_factory=config_selfsupervised.SwavConfig)
    cascade: config_selfsupervised.CascadeConfig = Field(default_factory=config_selfsupervised.CascadeConfig)
    optim: config_sections.OptimConfig = Field(default_factory=config_sections.OptimConfig)
    train: config_sections.TrainConfig = Field(default_factory=config_sections.TrainConfig)
    eval: config_sections.EvalConfig = Field(default_factory=config_sections.EvalConfig)
    engine: config_sections.EngineConfig = Field(default_factory=config_sections.EngineConfig)
    checkpoint: config_sections.CheckpointConfig = Field(default_factory=config_sections.CheckpointConfig)
    run: config_sections.RunConfig = Field(default_factory=config_sections.RunConfig)
    launch: config_sections.LaunchConfig = Field(default_factory=config_sections.LaunchConfig)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if conflicts := [
            *_backbone_conflicts(self),
            *_objective_conflicts(self),
            *config_masks.conflicts(
                self.mask,
                method=self.method,
                engine=self.engine.name,
                objective=self.objective.name,
                head=self.objective.head,
            ),
            *_number_conflicts(self),
        ]:
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


def _number_conflicts(config: Config) -> Iterator[Conflict]:
    train, warmup = config.train, config.optim.warmup_epochs
    if warmup > train.epochs:
        yield Conflict(
            ("optim.warmup_epochs", "train.epochs"),
            f"optim.warmup_epochs ({warmup:g}) is longer than train.epochs ({train.epochs:g})",
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
