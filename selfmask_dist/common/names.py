"""The names of the files and folders in a run's folder, each said once.

`runs.folder` makes the folder; `docs/architecture.md` says who writes and who reads each of them.
"""

# every run
CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
STATUS = "status.json"
OWNER = "owner.json"
SUBMITTED = "submitted.json"
RESULT = "result.json"
FROZEN = "frozen.json"
RETRIEVAL = "retrieval.json"
SCORE_LR = "score_lr.json"
QUARANTINE = "quarantine.jsonl"
CHECKPOINTS = "checkpoints"
LOGS = "logs"
STACKS = "stacks"
PROFILE = "profile"
REPORT = "report.html"
EMBEDDINGS = "embeddings"
EVAL = "eval"
MEASURING = "measuring"  # a run's own evaluation, while it lasts


def trial(rate: float | str) -> str:
    """Return the folder in which a learning rate is tried; or of a pattern, as "*"."""
    return f"trial-{rate}"


# what training leaves
MASK = "final.mask"
HEAD = "head.safetensors"
TEXT_HEAD = "text.safetensors"  # class names as CLIP embeds them, where there is no mask file to hold them
MODEL = "model.json"  # classes and how the backbone is built, where there is no mask file to hold them
ENCODER = "encoder.safetensors"  # of a fine-tuning run: the whole network
FINETUNED = "finetuned.safetensors"  # of one that changes a part: that part

# a cascade
DISPATCHER = "dispatcher"
ROUTER = "router"
COMBINATION = "combination"
VIEWS = "views.json"
CASCADE_MASK = "cascade.mask"
CASCADE_PICTURE = "cascade.png"
CLUSTER_SIZES = "sizes.json"  # in the router's folder


def expert(index: int | str) -> str:
    """Return the folder of a cascade's expert number `index`, from 0; or of a pattern, as "*"."""
    return f"expert-{index}"
