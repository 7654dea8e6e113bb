"""Every key of a run, section by section, before it is known whether the sections go together."""

from typing import Literal

from pydantic import Field

from selfmask_dist.config.backbone import BackboneConfig
from selfmask_dist.config.fields import Section, science
from selfmask_dist.config.masks import MaskConfig
from selfmask_dist.config.objectives import (
    ClipConfig,
    CropsConfig,
    DinoConfig,
    MocoV2Config,
    MocoV3Config,
    NbdConfig,
    ObjectiveConfig,
    SimclrConfig,
    SlipConfig,
    SwavConfig,
)
from selfmask_dist.config.procedures import CascadeConfig, ProcedureConfig
from selfmask_dist.config.sections import (
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    LaunchConfig,
    RunConfig,
)
from selfmask_dist.config.training import AugmentConfig, DataConfig, FinetuneConfig, OptimConfig, TrainConfig


class AllSections(Section):
    """Every key of a run, each section checked by itself; `Config` checks them together as well."""

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
    backbone: BackboneConfig = Field(default_factory=BackboneConfig)
    mask: MaskConfig = Field(default_factory=MaskConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    crops: CropsConfig = Field(default_factory=CropsConfig)
    swav: SwavConfig = Field(default_factory=SwavConfig)
    nbd: NbdConfig = Field(default_factory=NbdConfig)
    simclr: SimclrConfig = Field(default_factory=SimclrConfig)
    moco_v2: MocoV2Config = Field(default_factory=MocoV2Config)
    moco_v3: MocoV3Config = Field(default_factory=MocoV3Config)
    dino: DinoConfig = Field(default_factory=DinoConfig)
    clip: ClipConfig = Field(default_factory=ClipConfig)
    slip: SlipConfig = Field(default_factory=SlipConfig)
    cascade: CascadeConfig = Field(default_factory=CascadeConfig)
    procedure: ProcedureConfig = Field(default_factory=ProcedureConfig)
    finetune: FinetuneConfig = Field(default_factory=FinetuneConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    run: RunConfig = Field(default_factory=RunConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
