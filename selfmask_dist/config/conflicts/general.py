"""Conflicts of the backbone, the objective and its views, the engine, and numbers that exclude each other."""

from collections.abc import Iterator

from selfmask_dist.config.all_sections import AllSections
from selfmask_dist.config.loading import Conflict
from selfmask_dist.config.objectives import TWO_VIEWS, WITH_CAPTIONS, WITH_TEACHER

_LONGEST_NAME = 200  # file systems allow 255


ACCUMULATING = ("supervised", "swav", "nbd")  # objectives that go through a batch in micro-steps


def backbone_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield names without weights, weights that are drawn and loaded, and half of a normalisation."""
    backbone = config.backbone
    library, _, model = backbone.name.partition(":")
    if library not in ("timm", "open_clip", "hf") or not model:
        yield Conflict(
            ("backbone.name",),
            f"backbone.name {backbone.name!r} is neither timm:<model> nor open_clip:<model>[/<pretrained "
            "tag>] nor hf:<model or folder>",
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


def run_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield a folder of runs that a shell would have expanded, and names that are no folder within it."""
    place, name = config.run.dir, config.run.name
    if "$" in place or place.startswith("~"):
        yield Conflict(
            ("run.dir",),
            f"run.dir {place!r} is taken as it is written, without variables or ~; write the whole path, or "
            "give it on the command line, where the shell expands it",
        )
    if config.run.resume and config.run.overwrite:
        yield Conflict(
            ("run.resume", "run.overwrite"),
            "run.resume=true goes on with a run and run.overwrite=true deletes it; set one of them",
        )
    parts = name.split("/")
    if not name.isprintable() or name != name.strip() or any(part in ("", ".", "..") for part in parts):
        yield Conflict(
            ("run.name",),
            f"run.name {name!r} is no folder within run.dir; take letters, digits, - and _ (run.dir says "
            "where runs go)",
        )
    if any(len(part.encode()) > _LONGEST_NAME for part in parts):
        yield Conflict(
            ("run.name",),
            f"run.name has {len(name.encode())} bytes, and a folder may have {_LONGEST_NAME}, to which "
            "seeds and files add; shorten it",
        )


def data_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield two places to measure on."""
    if config.data.held_out is not None and config.data.test is not None:
        yield Conflict(
            ("data.held_out", "data.test"),
            f"data.held_out={config.data.held_out:g} measures on a part of data.train, and data.test names "
            "other images; set one of them to null",
        )


def objective_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield objectives and heads that the backbone or the method cannot have."""
    objective = config.objective
    if objective.head == "clip_text" and not config.backbone.name.startswith("open_clip:"):
        yield Conflict(
            ("objective.head", "backbone.name"),
            f"objective.head=clip_text needs CLIP's text tower, which {config.backbone.name} does not have; "
            "use a backbone open_clip:<model>/<tag>, or objective.head=linear",
        )
    needs_text = objective.head == "clip_text" or objective.name in WITH_CAPTIONS
    if needs_text and config.backbone.pool not in ("model", "attention"):
        keys = ("objective.name", "objective.head", "backbone.pool")
        yield Conflict(
            keys,
            f"backbone.pool={config.backbone.pool} leaves out CLIP's projection to the space of texts, which "
            f"objective.name={objective.name} with objective.head={objective.head} needs; set "
            "backbone.pool=model",
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
    if config.method == "cascade" and objective.name in ("supervised", *WITH_CAPTIONS):
        yield Conflict(
            ("method", "objective.name"),
            f"method=cascade trains without labels or captions; set objective.name=nbd or swav in place of "
            f"{objective.name}",
        )


def view_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield objectives without the views, captions, whole batch or teacher that they need."""
    name, crops = config.objective.name, config.crops
    if name in TWO_VIEWS and (crops.global_count != 2 or crops.local_count):
        yield Conflict(
            ("objective.name", "crops.global_count", "crops.local_count"),
            f"objective.name={name} is on two views of an image; set crops.global_count=2 and "
            "crops.local_count=0",
        )
    if name in WITH_CAPTIONS and not config.backbone.name.startswith("open_clip:"):
        yield Conflict(
            ("objective.name", "backbone.name"),
            f"objective.name={name} needs CLIP's text tower, which {config.backbone.name} does not have; use "
            "a backbone open_clip:<model>/<tag>",
        )
    if name not in ACCUMULATING and config.train.accumulate > 1:
        yield Conflict(
            ("objective.name", "train.accumulate"),
            f"objective.name={name} holds images against the whole batch, which micro-steps would cut; set "
            "train.accumulate=1 (engine.checkpoint_activations=true saves memory)",
        )
    if name in WITH_TEACHER and config.engine.name == "deepspeed":
        yield Conflict(
            ("objective.name", "engine.name"),
            f"objective.name={name} has a teacher, a moving average that engine.name=deepspeed does not "
            "keep; use engine.name=fsdp",
        )


def engine_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield what an engine does not train, and what low-rank additions leave without effect."""
    engine = config.engine.name
    if config.optim.kind == "adamw" and engine == "deepspeed":
        yield Conflict(
            ("optim.kind", "engine.name"),
            "optim.kind=adamw is not wired for engine.name=deepspeed; use engine.name=fsdp or optim.kind=sgd",
        )
    if config.method == "finetune" and config.finetune.peft:
        yield from _peft_conflicts(config)
    if config.method == "finetune" and config.finetune.train == "lora":
        if engine == "deepspeed":
            yield Conflict(
                ("finetune.train", "engine.name"),
                "finetune.train=lora is not wired for engine.name=deepspeed; use engine.name=ddp or fsdp",
            )
        if config.finetune.freeze:
            yield Conflict(
                ("finetune.train", "finetune.freeze"),
                "finetune.train=lora trains additions alone; choose them by finetune.lora_targets and leave "
                "finetune.freeze empty",
            )


def _peft_conflicts(config: AllSections) -> Iterator[Conflict]:
    section = config.finetune
    if section.train != "all":
        yield Conflict(
            ("finetune.peft", "finetune.train"),
            f"finetune.peft and finetune.train={section.train} both say what is trained; leave one out",
        )
    if section.freeze:
        yield Conflict(
            ("finetune.peft", "finetune.freeze"),
            "finetune.peft trains what its method adds; choose where by its target_modules and leave "
            "finetune.freeze empty",
        )
    if not section.peft.get("method"):
        yield Conflict(("finetune.peft",), "finetune.peft names no method; write {method: VERA, r: 16}")
    if config.engine.name != "ddp":
        yield Conflict(
            ("finetune.peft", "engine.name"),
            f"finetune.peft is not wired for engine.name={config.engine.name}; use engine.name=ddp",
        )


def number_conflicts(config: AllSections) -> Iterator[Conflict]:
    """Yield lengths, batches and areas that leave nothing, or come in the wrong order."""
    train, warmup, first = config.train, config.optim.warmup_epochs, config.optim.head_first_epochs
    if warmup > train.epochs:
        yield Conflict(
            ("optim.warmup_epochs", "train.epochs"),
            f"optim.warmup_epochs ({warmup:g}) is longer than train.epochs ({train.epochs:g})",
        )
    if first and first + warmup > train.epochs:
        yield Conflict(
            ("optim.head_first_epochs", "optim.warmup_epochs", "train.epochs"),
            f"optim.head_first_epochs ({first:g}) and optim.warmup_epochs ({warmup:g}) leave nothing of "
            f"train.epochs ({train.epochs:g})",
        )
    headless = {
        "supervised": ("objective.head", config.objective.head == "clip_text"),
        "clip": ("clip.text", config.clip.text == "frozen"),
        "nbd": ("nbd.warmup_steps", True),
    }
    key, has_no_head = headless.get(config.objective.name, ("", False))
    if first and has_no_head:
        yield Conflict(
            ("optim.head_first_epochs", key),
            "optim.head_first_epochs: there is no head to train first, as "
            + (
                "objective.name=nbd trains its own before the first step (nbd.warmup_steps)"
                if config.objective.name == "nbd"
                else f"the text tower stays as it is ({key})"
            ),
        )
    if first and config.engine.name == "deepspeed":
        yield Conflict(
            ("optim.head_first_epochs", "engine.name"),
            "engine.name=deepspeed updates head and masks in one partition, where masks cannot wait; set "
            "another engine, or mask.init_from a run with a tiny optim.score_lr",
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
        ("nbd.crop_scale", config.nbd.crop_scale),
    ):
        if smallest > largest:
            yield Conflict((key,), f"{key}: the smaller area comes first: [{largest:g}, {smallest:g}]")
