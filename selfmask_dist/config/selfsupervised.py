"""The keys of training without labels: SwAV, its crops, and the cascade. `config_sections` has the rules."""

from typing import Annotated, Literal

from pydantic import Field

from selfmask_dist.config.sections import Counts, Fraction, Section, efficiency, orchestration, science

Scale = Annotated[tuple[Fraction, Fraction], Field(strict=False)]
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


class CropsConfig(Section):
    """The views of one image, where there are no labels. Flips follow data.flip."""

    global_count: int = science(
        2, "Large crops; the first two give SwAV's assignments. Paper: 2.", unit="crops", ge=2
    )
    global_size: int | None = science(
        None, "Their side; null: the backbone's image size. Paper: 224.", unit="pixels", ge=1
    )
    global_scale: Scale = science((0.14, 1.0), "Their area. Paper: 0.14 to 1.", unit="fraction of the image")
    local_count: int = science(
        6, "Small crops; 0 for simclr, moco_v2 and moco_v3. Paper: 6.", unit="crops", ge=0
    )
    local_size: int = science(96, "Their side. Paper: 96.", unit="pixels", ge=1)
    local_scale: Scale = science(
        (0.05, 0.14), "Their area. Paper: 0.05 to 0.14.", unit="fraction of the image"
    )
    color: float = science(
        1.0,
        "Strength of the random changes of brightness, contrast, saturation and hue; 0: none. Paper: 1.",
        unit="times SwAV's",
        ge=0,
        le=2,
    )
    gray: float = science(
        0.2, "Share of the crops without colour. Paper: 0.2.", unit="probability", ge=0, le=1
    )
    blur: float = science(
        0.5, "Share of the crops that are blurred. Paper: 0.5.", unit="probability", ge=0, le=1
    )
    on_device: bool = efficiency(
        True,
        "Flips, colours and blur for a whole batch on the training device, where the workers would do them "
        "one by one. The same pixels up to rounding.",
    )


class SwavConfig(Section):
    """The SwAV objective (objective.name=swav). Projector and prototypes train with optim.head_lr."""

    prototypes: int = science(
        500, "Clusters that crops are assigned to. Paper: 500.", unit="prototypes", ge=2
    )
    dim: int = science(128, "Length of the projected embeddings. Paper: 128.", unit="dimensions", ge=2)
    temperature: float = science(0.1, "Softmax of predictions. Paper: 0.1.", unit="cosine similarity", gt=0)
    epsilon: float = science(
        0.05, "Smoothness of the assignments. Paper: 0.05.", unit="cosine similarity", ge=0.005
    )
    sinkhorn_iterations: int = science(
        3, "Rounds that even out the prototypes' use. Paper: 3.", unit="rounds", ge=1
    )
    queue_length: int = science(
        0,
        "Older images that take part in the assignments, over all processes: for batches of fewer images "
        "than prototypes. 0: none. Paper: 512.",
        unit="images",
        ge=0,
    )
    queue_start_epoch: float = science(
        0.0, "The queue fills from here on, and is used when full. Paper: 30 of 150.", unit="epochs", ge=0
    )
    freeze_steps: int = science(
        0, "Prototypes stay as they are for so long. The authors' code: 5005 of 117,188.", unit="steps", ge=0
    )


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
        "many as keep 90 % of the processes busy.",
        unit="groups",
        ge=0,
    )
    store_dtype: Literal["float32", "float16"] = orchestration("float32", "Of the embeddings on disk.")
