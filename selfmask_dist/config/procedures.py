"""The sections of runs that are made of runs: the cascade, and the procedures over masks and weights.

Their stages are runs of their own in the run's folder.
"""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from selfmask_dist.config.fields import (
    Counts,
    NonEmpty,
    Section,
    SomeStrings,
    efficiency,
    orchestration,
    science,
)

PROCEDURES = ("packnet", "lottery", "evolution", "supsup", "wise_ft", "rebasin", "ensemble")

Alpha = Annotated[float, Field(ge=0, le=1)]
Combining = Literal[
    "conditional",
    "unconditional",
    "conditional_pca",
    "unconditional_pca",
    "conditional_concat",
    "unconditional_concat",
    "conditional_add",
    "unconditional_add",
    "replace",
]


class CascadeConfig(Section):
    """Dispatcher, router and experts (method=cascade)."""

    clusters: Counts = science(
        (5,),
        "Experts. Several numbers: the router takes the one with the smallest BIC. Paper: 5.",
        unit="clusters",
    )
    router: Literal["gmm", "kmeans"] = science(
        "gmm", "What clusters the dispatcher's embeddings. Paper: gmm (a Gaussian mixture)."
    )
    components: int = science(
        20, "Whitened principal components that are clustered. Paper: 20.", unit="components", ge=1
    )
    restarts: int = science(5, "Times the clustering starts anew; the best one stays.", unit="starts", ge=1)
    expert_epochs: Literal["equal_steps", "equal_epochs"] = science(
        "equal_steps",
        "equal_steps: an expert of a small cluster sees it more often, as many steps as the dispatcher made "
        "(Paper: round(50000 / |D_k| * 150) epochs). equal_epochs: as many epochs as the dispatcher.",
    )
    expert_queue_start: float = science(
        0.2, "An expert's queue fills from here on. Paper: 1/5.", unit="fraction of its epochs", ge=0, le=1
    )
    combinations: Annotated[tuple[Combining, ...], Field(strict=False, min_length=1)] = science(
        ("conditional", "unconditional"),
        "Embeddings made of the dispatcher's and experts', all measured and kept in the file. conditional: "
        "[D, 0 .. Er .. 0] of the chosen expert r; unconditional: [D, E1 .. EK]; both then go through a "
        "whitened PCA back to the backbone's dimension. Variants: _pca is not whitened, _concat has no PCA, "
        "_add is a sum; replace is Er alone.",
    )
    expert_groups: int = efficiency(
        0,
        "Groups of processes that train experts at the same time, each one expert after the other; 0: as "
        "many as keep 90 % of the processes busy, if an expert fits into a group's memory.",
        unit="groups",
        ge=0,
    )
    memory_gib: float | None = efficiency(
        None,
        "Memory that a process may take while an expert trains, by which groups are kept large enough "
        "(`selfmask plan` reckons the same); null: nine tenths of the GPU's, or of the machine's shared by "
        "its processes.",
        unit="GiB",
        gt=0,
    )
    store_dtype: Literal["float32", "float16"] = orchestration("float32", "Of the embeddings on disk.")


class ProcedureConfig(Section):
    """Chains of runs (method=packnet, lottery, ...); every training is one of `train.epochs`."""

    include: NonEmpty | SomeStrings = science(
        "auto",
        "packnet, lottery, and evolution's split by weights: parameters that are shared out, pruned or "
        "split; presets and patterns as in mask.include. Only those of two or more dimensions are taken.",
    )
    tasks: int = science(
        2,
        "packnet, supsup: the classes of data.train, in their order, make so many tasks of nearly equal "
        "size, which are learned one after the other.",
        unit="tasks",
        ge=1,
        le=255,
    )
    keep: float = science(
        0.5,
        "packnet: share of each tensor's free weights that a task keeps for good; the others are pruned and "
        "left to later tasks. Mallya & Lazebnik: 0.25 to 0.5.",
        unit="fraction of the free weights",
        gt=0,
        le=1,
    )
    retrain: float = science(
        0.5,
        "packnet: length of the training after pruning. Mallya & Lazebnik: half of the first one.",
        unit="fraction of train.epochs",
        gt=0,
    )
    rounds: int = science(
        3, "lottery: times that weights are pruned, each followed by a training.", unit="rounds", ge=1
    )
    prune: float = science(
        0.2,
        "lottery: share of the remaining weights that a round prunes. Frankle & Carbin: 0.2.",
        unit="fraction of the remaining weights",
        gt=0,
        lt=1,
    )
    scope: Literal["global", "tensor"] = science(
        "global", "lottery: the smallest of all weights together are pruned, or of each tensor."
    )
    rewind_steps: int = science(
        0,
        "lottery: k. Each round goes on from the state after so many steps, optimizer and order of images "
        "included; 0: from the start.",
        unit="steps",
        ge=0,
    )
    generations: int = science(
        3, "evolution: trainings, each from its parent's fit half.", unit="trainings", ge=1
    )
    split: Literal["kels", "wels"] = science(
        "kels",
        "evolution: kels: the first kernels of each layer (convolutional networks), which make a slim "
        "network. wels: a random choice of weights (any network).",
    )
    split_rate: float = science(
        0.5,
        "evolution: share of channels (kels) or weights (wels) that is kept.",
        unit="fraction",
        gt=0,
        le=1,
    )
    infer: Literal["each", "one-shot", "binary"] = science(
        "each",
        "supsup: which of the three that are measured gives the result's accuracy. each: the lowest entropy "
        "under a mask alone, a forward for each task; the surest on pretrained weights. one-shot: one "
        "gradient of the masks' superposition, for many tasks. binary: the better half of the tasks stays, "
        "again and again.",
    )
    infer_images: Counts = science(
        (16,),
        "supsup: test images, all of one task, whose task is inferred together; more are told apart better. "
        "Several numbers are all measured, and the first one is the result's.",
        unit="images",
    )
    adapt: Literal["finetune", "mask"] = science(
        "finetune", "wise_ft: what the frozen weights are adapted by: finetune, or a mask."
    )
    held_out: float = science(
        0.2,
        "wise_ft: share of each class's training images that are not trained on, and choose alpha.",
        unit="fraction of the images",
        gt=0,
        lt=1,
    )
    alphas: Annotated[tuple[Alpha, ...], Field(strict=False, min_length=1)] = science(
        (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        "wise_ft, rebasin: places on the line between two networks that are measured; 0: the frozen (first) "
        "one, 1: the adapted (second) one.",
        unit="share of the second network",
    )
    match_images: int = science(
        1024,
        "rebasin: training images at most, at equal distances through the set, on which activations are "
        "matched, losses measured and statistics of batch normalisation renewed.",
        unit="images",
        ge=1,
    )
    members: int = science(
        3, "ensemble: masks, each from a seed of its own; and as many small models.", unit="members", ge=1
    )
    small_backbone: dict[str, JsonValue] = science(
        {},
        "ensemble: keys of the backbone section, for example {name: timm:resnet10t}, of small models that "
        "are trained from random weights for comparison; empty: none are. Make them as large as a mask's "
        "file.",
    )
    hold: NonEmpty | None = science(
        None,
        "File (.safetensors) that says of each weight whether method=finetune trains it (1), keeps it (0) or "
        "keeps it at zero (2), int8 by parameter; null: all are trained. The stages write them.",
    )
    start_from: NonEmpty | None = science(
        None,
        "Folder of a run from whose newest checkpoint this one goes on as if it were its own; null: from the "
        "start. The stages set it.",
    )


def trained_by(section: ProcedureConfig, method: str) -> str:
    """Return the method of a procedure's stages, mask or finetune; without a procedure, the method itself."""
    if method in ("supsup", "ensemble") or (method == "wise_ft" and section.adapt == "mask"):
        return "mask"
    return "finetune" if method in PROCEDURES else method
