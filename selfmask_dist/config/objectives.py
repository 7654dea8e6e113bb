"""The sections of objectives, and of the crops that those without labels see.

An objective gets its section as it is. What a section gives in epochs, its methods turn into steps. `Paper:`
gives the value of Warmerdam et al. 2024, `Published:` that of the paper a method is from. Heads train with
optim.head_lr and are thrown away.
"""

from typing import Annotated, Literal

from pydantic import Field

from selfmask_dist.config.fields import (
    NonEmpty,
    Positive,
    Scale,
    Section,
    SomeStrings,
    efficiency,
    science,
)

# those whose loss is between views of one image, so that data comes as the crops section says
VIEWS = ("swav", "simclr", "moco_v2", "moco_v3", "dino", "slip")
TWO_VIEWS = ("simclr", "moco_v2", "moco_v3", "slip")  # and no other crops
WITH_CAPTIONS = ("clip", "slip")
# no labels either, on views that its own section describes
ON_BANK = ("nbd",)
WITH_TEACHER = ("moco_v2", "moco_v3", "dino")

Temperatures = Annotated[tuple[Positive, Positive], Field(strict=False)]


class ObjectiveConfig(Section):
    """The loss (method=mask and method=finetune)."""

    name: Literal["supervised", "nbd", "swav", "simclr", "moco_v2", "moco_v3", "dino", "clip", "slip"] = (
        science(
            "supervised",
            "supervised: cross-entropy against the labels. Without labels, each with a section of its own: "
            "nbd: pictures are found in a bank of all, where frozen neighbours are partly the same. On "
            "views that the crops section describes: swav: crops predict each other's cluster. simclr: two "
            "views find each other in the batch. moco_v2: one finds the other, as a slow copy sees it, in a "
            "queue. moco_v3: the same in the batch. dino: crops predict a slow copy's outputs. With "
            "captions: clip: images and texts find each other. slip: that and simclr.",
        )
    )
    target: Literal["class", "multilabel", "regression", "dense"] = science(
        "class",
        "What objective.name=supervised is trained towards, and what is measured (docs/targets.md). class: "
        "one label an image. multilabel: several labels (.json labels), mean average precision. regression: "
        "numbers (.json value), R2 and mean absolute error. dense: a class for each pixel (.seg.png), mean "
        "intersection over union.",
    )
    regression_loss: Literal["mse", "l1"] = science(
        "mse",
        "Of objective.target=regression. mse: squared error; l1: absolute error, which outliers move less. "
        "Both of numbers in units of their deviation over the training images.",
    )
    class_weights: Literal["none", "balanced"] = science(
        "none",
        "Weights in the loss against rare classes. balanced: of objective.target=class, images of each class "
        "weigh as much as those of any other; of multilabel, images with and without a label do.",
    )
    head: Literal["linear", "masked", "clip_text"] = science(
        "linear",
        "linear: a new linear layer, trained. masked: a new linear layer of fixed random weights under a "
        "learned mask. clip_text: CLIP's embeddings of the class names, nothing to train; needs an "
        "open_clip backbone.",
    )
    head_norm: Literal["none", "l2", "batchnorm"] = science(
        "l2",
        "Features before a linear or masked head. none: as they are (Paper); those of raw ViTs are so long "
        "that optim.head_lr=0.1 explodes. l2: all scaled to one length. batchnorm: mean 0 and variance 1 "
        "over the batch, for each feature. clip_text has CLIP's own normalisation and temperature instead.",
    )
    label_smoothing: float = science(
        0.0, "Target probability that is spread evenly over all classes.", unit="probability", ge=0, lt=1
    )
    prompts: SomeStrings = science(
        ("a photo of a {}.",), "Sentences for clip_text with {} for the class name; several are averaged."
    )

    distill_from: NonEmpty | None = science(
        None,
        "Folder of a finished supervised run on the same classes, for example one of method=finetune, whose "
        "logits are learned beside the labels; null: labels alone.",
    )
    distill_weight: float = science(
        0.5,
        "Share of the loss that is learned from objective.distill_from; the labels have the rest.",
        unit="fraction of the loss",
        gt=0,
        le=1,
    )
    distill_temperature: float = science(
        2.0, "Both logits are divided by it: larger shows more of the teacher's doubts.", unit="logit", gt=0
    )


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

    def queue_start(self, steps_per_epoch: int) -> int:
        """Return the step from which on the queue fills."""
        return round(self.queue_start_epoch * steps_per_epoch)


class SimclrConfig(Section):
    """The SimCLR objective (objective.name=simclr)."""

    dim: int = science(128, "Length of the projected embeddings. Published: 128.", unit="dimensions", ge=2)
    hidden: int = science(2048, "Width of the projector's hidden layer.", unit="dimensions", ge=1)
    temperature: float = science(
        0.1, "Divides similarities. Published: 0.1 for large batches, 0.5.", unit="cosine similarity", gt=0
    )


class MocoV2Config(Section):
    """The MoCo v2 objective (objective.name=moco_v2)."""

    dim: int = science(128, "Length of the projected embeddings. Published: 128.", unit="dimensions", ge=2)
    hidden: int = science(
        2048, "Width of the projector's hidden layer. Published: 2048.", unit="dimensions", ge=1
    )
    temperature: float = science(0.2, "Divides similarities. Published: 0.2.", unit="cosine similarity", gt=0)
    momentum: float = science(
        0.999,
        "Of the teacher, a moving average of scores (or weights). Published: 0.999.",
        unit="share kept from step to step",
        ge=0,
        lt=1,
    )
    queue_length: int = science(
        65536,
        "Older keys that queries are held against, over all processes; each process keeps all of them. "
        "Published: 65536.",
        unit="images",
        ge=1,
    )


class MocoV3Config(Section):
    """The MoCo v3 objective (objective.name=moco_v3)."""

    dim: int = science(256, "Length of the projected embeddings. Published: 256.", unit="dimensions", ge=2)
    hidden: int = science(
        4096,
        "Width of the hidden layers of projector and predictor. Published: 4096.",
        unit="dimensions",
        ge=1,
    )
    temperature: float = science(0.2, "Divides similarities. Published: 0.2.", unit="cosine similarity", gt=0)
    momentum: float = science(
        0.99,
        "Of the teacher, a moving average of scores (or weights), at first; it rises to 1 along half a "
        "cosine. Published: 0.99.",
        unit="share kept from step to step",
        ge=0,
        lt=1,
    )


class DinoConfig(Section):
    """The DINO objective (objective.name=dino)."""

    outputs: int = science(
        65536, "Length of the distributions that are matched. Published: 65536.", unit="outputs", ge=2
    )
    hidden: int = science(
        2048, "Width of the head's hidden layers. Published: 2048.", unit="dimensions", ge=1
    )
    bottleneck: int = science(
        256, "Width of the head before its last layer. Published: 256.", unit="dimensions", ge=2
    )
    student_temperature: float = science(
        0.1, "Divides the student's outputs. Published: 0.1.", unit="cosine similarity", gt=0
    )
    teacher_temperature: Temperatures = science(
        (0.04, 0.07),
        "Divides the teacher's outputs, at first and after temperature_epochs; a lower one sharpens. "
        "Published: 0.04 to 0.07.",
        unit="cosine similarity",
    )
    temperature_epochs: float = science(
        30.0, "The teacher's temperature goes to its last value in so long.", unit="epochs", ge=0
    )
    center_momentum: float = science(
        0.9,
        "Of the mean output that is subtracted from the teacher's. Published: 0.9.",
        unit="share kept from step to step",
        ge=0,
        lt=1,
    )
    momentum: float = science(
        0.996,
        "Of the teacher, a moving average of scores (or weights), at first; it rises to 1 along half a "
        "cosine. Published: 0.996.",
        unit="share kept from step to step",
        ge=0,
        lt=1,
    )
    freeze_epochs: float = science(
        1.0, "The head's last layer stays as it is for so long. Published: 1.", unit="epochs", ge=0
    )

    def warmup_steps(self, steps_per_epoch: int) -> int:
        """Return the steps in which the teacher's temperature goes to its last value."""
        return round(self.temperature_epochs * steps_per_epoch)

    def freeze_steps(self, steps_per_epoch: int) -> int:
        """Return the steps for which the head's last layer stays as it is."""
        return round(self.freeze_epochs * steps_per_epoch)


class NbdConfig(Section):
    """The objective nbd (objective.name=nbd): every picture is a class, its neighbours are partly the same.

    Its head and its bank have an AdamW of their own; optim.clip_norm does not reach them. Flips follow
    data.flip. It brings other defaults: optim.score_step=rms, optim.score_reach=auto, a tenth of
    warm-up, train.global_batch_size=128, train.epochs=8 and backbone.batchnorm=frozen.
    """

    dim: int = science(
        128, "Principal directions of the frozen features that are kept.", unit="dimensions", ge=2
    )
    shrinkage: float = science(
        0.05, "Added to each direction's variance before whitening.", unit="times the mean variance", ge=0
    )
    neighbours: int = science(
        5,
        "Pictures that share a picture's target: the nearest under the frozen backbone.",
        unit="pictures",
        ge=0,
    )
    own_share: float = science(
        0.5, "Of the target, what lies on the picture itself.", unit="probability", gt=0, le=1
    )
    neighbour_temperature: float = science(
        0.05, "Softmax by which neighbours share the rest.", unit="cosine similarity", gt=0
    )
    temperature: float = science(0.1, "Softmax of predictions.", unit="cosine similarity", ge=0.01)
    frozen_views: int = science(
        3,
        "Crops of each picture, beside itself and its mirror image, that its frozen features are the mean "
        "of.",
        unit="views",
        ge=0,
    )
    views: int = science(1, "Crops of each picture in a batch.", unit="views", ge=1)
    crop_scale: Scale = science((0.35, 1.0), "Their area.", unit="fraction of the image")
    jitter: float = science(
        0.3,
        "Strength of the random changes of brightness, contrast and saturation; hue, grey and blur are "
        "left alone.",
        unit="fraction",
        ge=0,
        le=1,
    )
    warmup_steps: int = science(
        150, "Steps of head and bank alone, on frozen features, before the first.", unit="steps", ge=0
    )
    warmup_rate: float = science(3e-3, "Their learning rate (AdamW).", unit="weight per step", gt=0)
    warmup_batch: int = science(256, "Views in one of them.", unit="views", ge=1)
    rate: float = science(
        1e-3, "Learning rate of head and bank after that (AdamW), constant.", unit="weight per step", ge=0
    )
    weight_decay: float = science(1e-4, "Of head and bank.", unit="share of a weight per unit of rate", ge=0)
    bank_momentum: float = science(
        0.5,
        "Of a picture's row, what is kept when its new embedding comes in.",
        unit="share kept from step to step",
        ge=0,
        le=1,
    )
    renew_every: float | None = science(
        None,
        "After so many epochs, each time, neighbours and their shares are found anew in the bank as it then "
        "is; null: those of the frozen backbone stay.",
        unit="epochs",
        gt=0,
    )
    exact_up_to: int = science(
        100_000,
        "The softmax is over all pictures up to so many; over more it is estimated.",
        unit="pictures",
        ge=1,
    )
    sampled: int = science(
        32_768, "Pictures drawn anew in each step for that estimate.", unit="pictures", ge=1
    )


class ClipConfig(Section):
    """The text side of image-text objectives (objective.name=clip and slip)."""

    text: Literal["frozen", "trained"] = science(
        "frozen",
        "frozen: open_clip's text tower and temperature as they are. trained: both are, with optim.head_lr; "
        "the tower is then saved beside the mask (head.safetensors).",
    )


class SlipConfig(Section):
    """The SimCLR part of the SLIP objective (objective.name=slip)."""

    weight: float = science(
        1.0, "SimCLR's loss is added this many times. Published: 1.", unit="times CLIP's loss", gt=0
    )
    dim: int = science(256, "Length of the projected embeddings. Published: 256.", unit="dimensions", ge=2)
    hidden: int = science(
        4096, "Width of the projector's hidden layers. Published: 4096.", unit="dimensions", ge=1
    )
    temperature: float = science(0.1, "Divides similarities. Published: 0.1.", unit="cosine similarity", gt=0)
