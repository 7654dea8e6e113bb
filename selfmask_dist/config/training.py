"""The sections of what images a run has, how long it trains and on how changed ones, what besides masks it
trains, and by which optimizer.
"""

from typing import Any, Literal

from pydantic import JsonValue, field_validator

from selfmask_dist.config.fields import (
    NonEmpty,
    Positive,
    Rates,
    Scale,
    Section,
    SomeStrings,
    Strings,
    efficiency,
    science,
)


class DataConfig(Section):
    """The images: a folder of WebDataset tars, one tar, a pattern such as `a-{000..041}.tar`, a list, an
    address, or a folder of pictures, which `selfmask launch` converts.
    """

    train: NonEmpty | None = science(
        None, "Folder of tars to train on, also the bank of the k-NN. Every run needs it."
    )
    test: NonEmpty | None = science(
        None,
        "Folder of tars to measure on. Every run needs it or data.held_out, but those of method=mask and "
        "method=finetune whose objective takes no labels: without they measure instance retrieval alone (see "
        "eval.retrieval).",
    )
    held_out: float | None = science(
        None,
        "Measure on this share of data.train and do not train on it, in place of data.test. Which images "
        "follows from their keys alone; data.subset and data.test_subset then number what is in each part.",
        unit="fraction of the images",
        gt=0,
        lt=1,
    )
    subset: NonEmpty | None = science(
        None, "File (.npy) with the numbers of the training images to use; null: all. A cascade writes them."
    )
    test_subset: NonEmpty | None = science(
        None, "File (.npy) with the numbers of the test images to use; null: all. PackNet writes them."
    )
    cache: NonEmpty | None = efficiency(
        None,
        "Folder on each node's own disk for whole copies of tars that are read from an address (s3://, "
        "https://, hf://), shared by the node's processes; null: samples are read in ranges.",
    )
    cache_gb: float = efficiency(
        100.0, "Size of data.cache; the tars used longest ago make room.", unit="GB", gt=0
    )
    channels: int = science(
        3,
        "Channels of the pictures. 3: RGB. Others are members .npy of tars (python -m data_prep.bands makes "
        "them of TIFF files), or grey pictures for 1; backbone.mean and backbone.std must be given, the stem "
        "is inflated, and views are cropped, resized and mirrored, without distortions of colour and blur.",
        unit="channels",
        ge=1,
        le=16,
    )
    crop_scale: Scale = science(
        (0.2, 1.0), "Smallest and largest area of the random resized crop.", unit="fraction of the image"
    )
    sampling: Literal["shuffled", "balanced"] = science(
        "shuffled",
        "Which training images an epoch has. shuffled: each once. balanced: each class equally often, so "
        "that images of rare classes come several times and some of common ones not at all; an epoch is as "
        "long. For objective.name=supervised with objective.target=class.",
    )
    flip: bool = science(True, "Mirror training images left to right with probability 1/2.")
    augment: bool = science(
        True, "Crop and flip training images at random; false: the evaluation's resize and centre crop."
    )
    max_broken: float = science(
        0.001,
        "Training images that may turn out unreadable in an epoch. They get weight 0 and are listed in the "
        "run's quarantine.jsonl; more than this stop the run.",
        unit="fraction of the images",
        ge=0,
        lt=1,
    )

    @field_validator("train", "test", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        """Take a list of paths too, kept as one text with `::` between them, as the reader takes it."""
        is_list = isinstance(value, list | tuple) and value and all(isinstance(part, str) for part in value)
        return "::".join(value) if is_list else value


class TrainConfig(Section):
    """How long, and how many images at once."""

    epochs: float = science(
        10.0, "Length of training and of the schedule; may be a fraction.", unit="epochs", gt=0
    )
    global_batch_size: int = science(
        64, "Images in one optimizer step, over all processes and micro-steps together.", unit="images", ge=1
    )
    max_steps: int | None = science(
        None, "Stop after so many steps at the latest, for a quick look; null: do not.", unit="steps", ge=1
    )
    keep: Literal["last", "best"] = science(
        "last",
        "What a run leaves. last: what it trained at its end. best: the best state of those measured while "
        "training (eval.knn_every) and at the end, by train.keep_by; checkpoints then hold that state too, "
        "about half as much again.",
    )
    keep_by: Literal["instance_retrieval", "accuracy", "loss"] | None = science(
        None,
        "What train.keep=best and train.patience go by. instance_retrieval: see eval.retrieval; needs no "
        "labels. accuracy, loss: of the head on train.validation. null: with train.validation accuracy, or "
        "loss where objective.target is another than class; else instance_retrieval.",
    )
    validation: float | None = science(
        None,
        "Share of data.train that a supervised run is not trained on, for train.keep_by and the monitor; "
        "never data.test. Which images follows from their keys alone. null: none.",
        unit="fraction of the images",
        gt=0,
        lt=1,
    )
    patience: int | None = science(
        None,
        "With train.keep=best: end the training after so many measurements (eval.knn_every) in a row that "
        "were no better than the best one. null: train to the end.",
        unit="measurements",
        ge=1,
    )
    ema: float | None = science(
        None,
        "Evaluate and save a moving average of what is trained (scores, weights, heads), which keeps this "
        "share of itself at each step; at step t no more than (1 + t) / (10 + t), so that it forgets the "
        "start. null: what is trained itself. For objective.name=supervised; not with engine.name=deepspeed.",
        unit="share kept from step to step",
        gt=0,
        lt=1,
    )
    accumulate: int = efficiency(
        1,
        "Micro-steps whose gradients are summed into one step: more need less memory. Each has batch "
        "statistics of its own, so a network with batch normalisation in train mode does see a difference.",
        unit="micro-steps per step",
        ge=1,
    )


class AugmentConfig(Section):
    """Stronger changes of training images, beside the crop and flip of the section data.

    Their parameters follow from (seed, epoch, sample), so a run is the same on any number of processes.
    """

    mixup: float = science(
        0.0,
        "Mix each image and its target with another one of the global batch; the share is drawn from "
        "Beta(a, a) with this a. 0: never. Zhang et al. 2018 (arXiv 1710.09412): 0.2; DeiT: 0.8.",
        unit="a of Beta(a, a)",
        ge=0,
    )
    cutmix: float = science(
        0.0,
        "Paste a rectangle of another image of the global batch, whose area is drawn from Beta(a, a), and "
        "mix targets by area. 0: never. Yun et al. 2019 (arXiv 1905.04899): 1.",
        unit="a of Beta(a, a)",
        ge=0,
    )
    mix_probability: float = science(
        1.0,
        "Share of the images that augment.mixup or augment.cutmix change.",
        unit="probability",
        ge=0,
        le=1,
    )
    mix_switch: float = science(
        0.5,
        "Where both are set: share of the mixed images that take augment.cutmix.",
        unit="probability",
        ge=0,
        le=1,
    )
    randaugment: int = science(
        0,
        "So many operations of RandAugment (Cubuk et al. 2020, arXiv 1909.13719) after crop and flip, each "
        "drawn from torchvision's 14. 0: none. Published: 2.",
        unit="operations",
        ge=0,
    )
    randaugment_magnitude: int = science(
        9, "How strong they are; torchvision's scale of 31 levels.", unit="level", ge=0, le=30
    )
    erase: float = science(
        0.0,
        "Share of the images of which a random rectangle (2 to 33 % of the area) becomes the mean colour "
        "(Zhong et al. 2017, arXiv 1708.04896). Published: 0.5; DeiT: 0.25.",
        unit="probability",
        ge=0,
        le=1,
    )

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def changes_pictures(self) -> bool:
        """Whether images are changed one by one."""
        return self.randaugment > 0 or self.erase > 0


class FinetuneConfig(Section):
    """Which weights of the backbone are trained (method=finetune): baselines to compare masks with."""

    train: Literal["all", "bias", "norm", "lora"] = science(
        "all",
        "all: every weight. bias: bias terms alone (BitFit). norm: gain and bias of normalisation layers. "
        "lora: low-rank additions to frozen matrices, through peft (pip install 'selfmask_dist[lora]').",
    )
    peft: dict[str, JsonValue] = science(
        {},
        "Any method of peft in place of finetune.train: {method: VERA, r: 16}, with its own arguments; "
        "without target_modules, those of finetune.lora_targets=auto.",
    )
    freeze: Strings = science(
        (),
        "Glob patterns over parameter names that stay frozen; `embedding` is the patch embedding or the stem "
        "(Kumar et al. 2022).",
    )
    lora_rank: int = science(8, "lora: rank of each addition.", unit="dimensions", ge=1)
    lora_alpha: float = science(
        16.0, "lora: an addition is scaled by alpha / rank.", unit="times the rank", gt=0
    )
    lora_targets: SomeStrings = science(
        ("auto",),
        "lora: glob patterns over names of modules. auto: q and v of attention; where q, k and v are one "
        "matrix, that one; in networks without attention, convolutions.",
    )


class OptimConfig(Section):
    """The optimizer; a learning rate for each kind of parameter. Scores never have weight decay."""

    kind: Literal["sgd", "adamw"] = science(
        "sgd",
        "sgd: with momentum (Paper). adamw: steps of about one learning rate whatever the gradient's size, "
        "so rates are far smaller (weights 1e-5 to 1e-3, scores near 0.1); not with engine.name=deepspeed.",
    )
    score_lr: float = science(
        50.0,
        "Peak learning rate of the scores (method=mask): larger flips more weights per step. Paper: 50 for "
        "ResNets, 10 for CLIP ViT-B/32.",
        unit="score per unit of gradient (optim.score_step=rms: per step)",
        gt=0,
    )
    score_step: Literal["plain", "rms"] = science(
        "plain",
        "How large a step of scores is. plain: the rate times the gradient (Paper). rms: each tensor's "
        "gradient is first divided by its root mean square over the whole tensor, so that optim.score_lr "
        "means the same for every tensor, and is small (.001 to .01). It holds for all that optim.score_lr "
        "trains, a masked head's scores too; weights and heads keep plain steps. Not with optim.kind=adamw, "
        "which sizes its steps itself.",
    )
    score_reach: Positive | Literal["auto"] | None = science(
        None,
        "How far the whole training can carry a score, in place of score_lr: the rate is set at the start so "
        "that a score whose gradient stays one root mean square large and of one sign goes so many times the "
        "way from mask.init to mask.threshold. The same number then serves trainings of any length. auto: "
        "1.2; 0.4 where convolutions hold most weights, 0.15 where some of these are depthwise. Needs "
        "optim.score_step=rms and optim.kind=sgd. null: score_lr.",
        unit="way from mask.init to mask.threshold",
    )
    score_lr_choices: Rates | None = science(
        None,
        "Learning rates of the scores to choose from, in place of score_lr: each is tried for a tenth of the "
        "training from the same start, and the run begins with the one of the highest instance retrieval; "
        "where the middle one ties with it, with that. For objectives without labels. null: score_lr.",
        unit="score per unit of gradient",
    )
    layer_decay: float | None = science(
        None,
        "Lower learning rates in lower layers: with L blocks, what block l = 1 ... L trains has its rate "
        "times this to the power L + 1 - l, what lies before the blocks L + 1; the head has its whole rate "
        "(ELECTRA, BEiT, MAE: 0.65 to 0.75 for fine-tuning). For scores, weights and LoRA. null: one rate.",
        unit="factor from block to block",
        gt=0,
        le=1,
    )
    weight_lr: float = science(
        0.01,
        "Peak learning rate of the backbone's weights (method=finetune, and families of masks that train "
        "them).",
        unit="weight per unit of gradient",
        gt=0,
    )
    head_lr: float = science(
        0.1, "Peak learning rate of a linear head.", unit="weight per unit of gradient", gt=0
    )
    momentum: float = science(
        0.9,
        "Momentum of every group; AdamW's beta_1. Paper: 0.9.",
        unit="share kept from step to step",
        ge=0,
        lt=1,
    )
    beta2: float = science(
        0.999, "AdamW's average of squared gradients.", unit="share kept from step to step", ge=0, lt=1
    )
    head_weight_decay: float = science(
        0.0,
        "L2 penalty on a linear head; with AdamW decoupled from the gradient.",
        unit="gradient per unit of weight",
        ge=0,
    )
    weight_decay: float = science(
        0.0,
        "L2 penalty on the backbone's weights, where they are trained; with AdamW decoupled from the "
        "gradient.",
        unit="gradient per unit of weight",
        ge=0,
    )
    schedule: Literal["cosine", "constant"] = science(
        "cosine",
        "Learning rates after warm-up. cosine: to zero at the end of train.epochs. constant: unchanged.",
    )
    warmup_epochs: float = science(
        0.0, "Learning rates rise linearly from zero for so long. Paper: 40 for ResNets.", unit="epochs", ge=0
    )
    head_first_epochs: float = science(
        0.0,
        "The head alone is trained for so long, then all: gradients through a head that knows nothing yet "
        "distort the features (Kumar et al. 2022, arXiv 2202.10054). In a cascade only the dispatcher does, "
        "as experts start from its head. Paper: 0.",
        unit="epochs",
        ge=0,
    )
    clip_norm: float | None = science(
        None,
        "The gradient of all trained parameters together is scaled down to this norm; null: never. With "
        "optim.score_step=rms of all but the scores, whose gradients have one size anyway.",
        unit="L2 norm of the gradient",
        gt=0,
    )
