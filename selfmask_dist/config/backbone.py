"""The section of the frozen network under the mask."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from selfmask_dist.config.fields import NonEmpty, Positive, Section, Strings, science


class BackboneConfig(Section):
    """The frozen network under the mask."""

    name: NonEmpty = science(
        "timm:vit_tiny_patch16_224",
        "timm:<model>[.<tag>], open_clip:<model>[/<pretrained tag>], of which the image tower is the "
        "encoder, or hf:<organisation>/<model> and hf:<folder> of transformers.",
    )
    pretrained: bool = science(
        True,
        "Published weights of that name, downloaded or from the cache; false: random weights. Ignored where "
        "backbone.weights is set.",
    )
    weights: NonEmpty | None = science(
        None,
        "Weights from a local file: safetensors, or a state dict that torch.load reads with weights_only.",
    )
    weights_key: NonEmpty | None = science(
        None,
        "Which network of the file backbone.weights, where it holds several: a key or a prefix, for example "
        "student (DINO) or encoder_k (MoCo). null: teacher, encoder_q, or the only one that fits.",
    )
    random: Literal["library", "signed_constant", "kaiming_normal"] = science(
        "library",
        "Random weights (pretrained=false) of convolutions and linear layers. library: as timm or open_clip "
        "draws them. signed_constant: +s or -s, s = (2 / fan_in)^(1/2). kaiming_normal: normal, standard "
        "deviation s (both: Ramanujan et al. 2020; mask.scale then adds their factor for the share kept).",
    )
    activations: Literal["library", "sign"] = science(
        "library",
        "library: as the network is built. sign: +1 or -1 in place of its rectifiers, gradients straight "
        "through where the input is within -1 and 1 (binary networks).",
    )
    image_size: int | None = science(
        None, "Side of the square images the encoder sees; null: as in pretraining.", unit="pixels", ge=1
    )
    kwargs: dict[str, JsonValue] = science(
        {},
        "Further arguments of timm.create_model or open_clip.create_model, for example "
        "{drop_path_rate: 0.1}; of hf: entries of the model's configuration.",
    )
    remove: Strings = science(
        (), "Modules replaced by the identity, by full name: [layer4] gives a ResNet's features of layer3."
    )
    pool: Literal["model", "class", "mean", "both", "attention"] = science(
        "model",
        "How patches become one embedding. model: as the network does by itself. class: the class token. "
        "mean: the mean of all patches, or of the last map. both: class token and mean, one after the "
        "other. attention: the network's own attention pooling (SigLIP, CLIP's ResNets). All but model and "
        "attention leave out CLIP's projection.",
    )
    mean: Annotated[tuple[float, float, float], Field(strict=False)] | None = science(
        None, "Mean of each colour channel; null: as in pretraining.", unit="pixel value in 0..1"
    )
    std: Annotated[tuple[Positive, Positive, Positive], Field(strict=False)] | None = science(
        None,
        "Standard deviation of each colour channel; null: as in pretraining.",
        unit="pixel value in 0..1",
    )
    crop_pct: float | None = science(
        None,
        "Share of the resized image that the evaluation view's centre crop keeps; null: as in pretraining.",
        unit="fraction of the short side",
        gt=0,
    )
    batchnorm: Literal["train", "sync", "frozen"] = science(
        "train",
        "Batch normalisation while training. train: statistics of the batch, and the running ones move "
        "(Paper; they are saved with the mask); each process has its own rows' statistics, and the first "
        "one's are kept. sync: statistics of the whole global batch. frozen: the pretrained running "
        "statistics. Without effect "
        "on networks that have none.",
    )
