"""The section of masks: which parameters carry one, and of which family.

Knows nothing of torch, and so of families only their names; a test holds them to those of `masking.families`.
"""

from typing import Literal

from selfmask_dist.config.fields import NonEmpty, Section, SomeStrings, Strings, science

# weights under these are trained or quantised: no masks on frozen weights
LATENT_FAMILIES = ("twn", "ttq", "binary_connect", "neural_wirings")
BESIDE_FAMILIES = ("movement", "soft_movement", "joint", "block_movement")  # scores and weights are trained
OTHER_FAMILIES = (*LATENT_FAMILIES, *BESIDE_FAMILIES, "multi_prize", "graft")
MASK_FAMILIES = ("threshold", "piggyback", "edge_popup", "topk", "random", "magnitude", *OTHER_FAMILIES)
FIXED_FAMILIES = ("random", "magnitude")  # nothing of them is trained
RANKING_FAMILIES = (  # what mask.keep speaks to
    "edge_popup",
    "topk",
    *FIXED_FAMILIES,
    "multi_prize",
    "neural_wirings",
    "movement",
    "block_movement",
)
THRESHOLD_FAMILIES = ("threshold", "piggyback", "joint", "graft")


class MaskConfig(Section):
    """Which parameters carry a mask M, by which rule, and the scale a of theta = a * W * M."""

    family: NonEmpty = science(
        "threshold",
        "How masks follow from scores: " + ", ".join(MASK_FAMILIES) + "; or module:Class, a family of your "
        "own. docs/methods.md has an entry for each.",
    )
    include: NonEmpty | SomeStrings = science(
        "auto",
        "Parameters to mask: presets and glob patterns over parameter names. structure: weights and biases "
        "of all layers inside the repeated blocks; matrices: without biases; stem, pool: the layers before "
        "and after the blocks. vit, resnet, clip_visual: the paper's rules. auto: vit or resnet where that "
        "takes 95 % of the weights of matrices, else structure. docs/backbones.md has what each covers.",
    )
    exclude: Strings = science((), "Glob patterns over parameter names that are taken out again.")
    first_layers: int | None = science(
        None,
        "Mask only the first so many of the layers that include and exclude leave; null: all.",
        unit="layers",
        ge=1,
    )
    maskable: float = science(
        1.0,
        "Share of each tensor's weights that may be pruned; the others are always kept (Paper, appendix F).",
        unit="fraction of the weights",
        gt=0,
        le=1,
    )
    maskable_by: Literal["random", "magnitude"] = science(
        "random", "Which these are: chosen at random, or the largest in magnitude."
    )
    threshold: float = science(
        0.0,
        "mu: a weight is kept where its score is greater. Paper: 0; Piggyback: 0.005. soft_movement: tau, "
        "which sigmoid(score) must exceed at the end of mask.keep_schedule, for example 0.1.",
        unit="score",
    )
    keep: float = science(
        0.5,
        "Share of the weights (block_movement: of the blocks) that families which rank keep, exactly: "
        + ", ".join(RANKING_FAMILIES)
        + ".",
        unit="fraction of the weights",
        gt=0,
        le=1,
    )
    keep_scope: Literal["tensor", "global"] = science(
        "tensor", "mask.keep is of each tensor, or of all tensors ranked together."
    )
    keep_schedule: Literal["constant", "linear", "cubic"] = science(
        "constant",
        "constant: mask.keep from the start. linear, cubic: the share goes from 1 to mask.keep in straight "
        "line, or fast at first (keep + (1 - keep) (1 - t)^3).",
    )
    keep_until: float = science(
        0.5,
        "When a linear or cubic mask.keep_schedule arrives.",
        unit="fraction of train.epochs",
        gt=0,
        le=1,
    )
    keep_from: float = science(
        0.0,
        "Until when all is kept, before a linear or cubic mask.keep_schedule begins.",
        unit="fraction of train.epochs",
        ge=0,
        lt=1,
    )
    penalty: float = science(
        0.0,
        "soft_movement: lambda, the weight of mean sigmoid(score) in the loss; it rises with the schedule.",
        unit="loss",
        ge=0,
    )
    block_rows: int = science(
        32, "block_movement: rows of weights that share a score; 0: all of a tensor's.", unit="rows", ge=0
    )
    block_columns: int = science(
        32, "block_movement: columns of a block; 0: all, so that blocks are rows.", unit="columns", ge=0
    )
    graft_from: NonEmpty | None = science(
        None,
        "graft: the fine-tuned weights: the folder of a finished run of method=finetune or a file that "
        "backbone.weights would take. That family needs it.",
    )
    init: float | Literal["normal", "magnitude", "shuffled_magnitude", "kaiming_uniform"] = science(
        1.0,
        "First scores: a number for all (Paper: 1; only its distance to the threshold, relative to "
        "optim.score_lr, matters; Piggyback: 0.01), or one number each: normal (half of it, mean 1 above "
        "the threshold), magnitude (|W| / mean |W| above it), shuffled_magnitude, kaiming_uniform "
        "(edge-popup's).",
        unit="score",
    )
    scale: Literal["through", "detached", "none"] = science(
        "through",
        "a = (N / sum M)^(1/2) for each tensor. through: gradients flow through it (the authors' code; where "
        "the number kept is fixed there is none). detached: it scales, and gradients do not see it. none: "
        "a = 1 (Piggyback).",
    )
    split_qkv: bool = science(
        False,
        "A scale each for q, k and v of a fused projection, as where they are three tensors (Paper's CLIP).",
    )
    init_from: NonEmpty | None = science(
        None,
        "Folder of a finished run whose newest checkpoint gives the first scores, heads and running "
        "statistics in place of mask.init; the optimizer starts afresh.",
    )
    allow_norm: bool = science(
        False, "Let patterns mask normalisation layers, which destroys the features; false: refuse."
    )

    @property
    def way_to_threshold(self) -> float:
        """How far scores start from where their weights are switched off; 1 where it differs by score."""
        if isinstance(self.init, float) and self.family in ("threshold", "piggyback"):
            return abs(self.init - self.threshold)
        return 1.0
