"""The keys of objectives without labels beside SwAV. `config_sections` has the rules.

`Published:` gives the value of the paper that a method is from. Heads train with optim.head_lr and are thrown
away.
"""

from typing import Annotated, Literal

from pydantic import Field

from selfmask_dist.config.sections import Positive, Section, science

# those whose loss is between views of one image, so that data comes as the crops section says
VIEWS = ("swav", "simclr", "moco_v2", "moco_v3", "dino", "slip")
TWO_VIEWS = ("simclr", "moco_v2", "moco_v3", "slip")  # and no other crops
WITH_CAPTIONS = ("clip", "slip")
WITH_TEACHER = ("moco_v2", "moco_v3", "dino")

Temperatures = Annotated[tuple[Positive, Positive], Field(strict=False)]


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
