"""What each engine needs for a step: arithmetic on a model's size.

With N masked weights, F frozen others, w ranks, m micro-steps, p and r bytes of a gathered weight and of a
reduced gradient, and x = (w - 1) / w, a rank sends in a step

    ddp           2 x 4 N
    fsdp          m x (2 p (N + F) + r N)
    bits          x (m r N + N / 8)
    deepspeed     x 8 N (stage 1),  x (4 m N + 4 N) (2),  m x (2 (8 N + 4 F) + 4 N) (3)

Resolutions take one pass through each block together where gradients are cut (`parallel.together`), so their
number does not show; a teacher's forward gathers once more. Under hybrid sharding with groups of s ranks s
takes the place of w, and the gradients' shares are summed between groups. fsdp pads rows, for which N and F
are multiplied by `ModelSize.padded`. Times are bounds: compute and communication wholly overlapped, or one
after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from selfmask_dist.cli.plan.hardware import GIB, Hardware
from selfmask_dist.cli.plan.held import FULL, gradient_bytes, held_by
from selfmask_dist.cli.plan.model_size import ModelSize, build_on_meta, measure_size
from selfmask_dist.config import Config
from selfmask_dist.masking.passes import takes_gradients
from selfmask_dist.training.prepare import mask_family

_TEACHERS_VIEWS = {"moco_v2": 1, "moco_v3": 2, "dino": 2}
_STUDENTS_VIEWS = {"simclr": 2, "moco_v2": 1, "moco_v3": 2, "slip": 3}
_IN_MICRO_STEPS = ("supervised", "swav", "nbd")  # others hold images against the whole batch
_GROUPS_OF_NODES = (1, 2, 4, 8)  # hybrid sharding that a plan tries


@dataclass(frozen=True)
class Views:
    """What a sample costs, in images of the backbone's own size.

    student: with gradients. teacher: without. resolutions: sizes of images that the student sees.
    """

    student: float
    teacher: float
    resolutions: int


@dataclass(frozen=True)
class Estimate:
    """What one engine needs: bytes for each rank, seconds for each step.

    momentum: all that the optimizer keeps, and a teacher's averages. keys: the settings that choose it.
    gather_seconds: to gather all weights once, block by block, as an evaluation does for each batch.
    """

    engine: str
    keys: str
    weights: float
    scores: float
    momentum: float
    gradients: float
    gathered: float
    activations: float
    sent: float
    compute_seconds: float
    send_seconds: float
    gather_seconds: float = 0.0

    @property
    def memory(self) -> float:
        """Bytes of a rank, all parts together."""
        parts = (self.weights, self.scores, self.momentum, self.gradients, self.gathered, self.activations)
        return sum(parts)

    @property
    def seconds(self) -> tuple[float, float]:
        """Lower and upper bound of a step: compute and traffic wholly overlapped, or one after the other."""
        both = (self.compute_seconds, self.send_seconds)
        return max(both), sum(both)


def measure(config: Config) -> tuple[ModelSize, int]:
    """Return the size of a configuration's backbone, and the side of its images in pixels.

    Raises:
        ValueError: no such backbone, or nothing of it is masked.
    """
    encoder, image_size = build_on_meta(config)
    mask = config.mask
    size = measure_size(
        encoder,
        image_size,
        mask.include,
        exclude=mask.exclude,
        first_layers=mask.first_layers,
        allow_norm=mask.allow_norm,
    )
    return size, image_size


def plan(config: Config, hardware: Hardware) -> list[Estimate]:
    """Return an estimate for each engine, for a configuration on given hardware. Raises as `measure` does."""
    size, image_size = measure(config)
    return estimate(size, config, hardware, image_size=image_size)


def views_of(config: Config, image_size: int) -> Views:
    """Return what a sample costs under the configuration's objective."""
    name, crops = config.objective.name, config.crops
    if name == "nbd":
        return Views(config.nbd.views, 0, 1)
    large = ((crops.global_size or image_size) / image_size) ** 2
    teacher = _TEACHERS_VIEWS.get(name, 0) * large
    if name not in ("swav", "dino"):
        return Views(_STUDENTS_VIEWS[name] * large if name in _STUDENTS_VIEWS else 1.0, teacher, 1)
    small = crops.local_count * (crops.local_size / image_size) ** 2
    return Views(crops.global_count * large + small, teacher, 2 if crops.local_count else 1)


def estimate(size: ModelSize, config: Config, hardware: Hardware, *, image_size: int = 224) -> list[Estimate]:
    """Return the estimates of `plan` for a model that has been measured: the arithmetic alone."""
    reckoner = _Reckoner(size, config, hardware, views_of(config, image_size))
    if config.engine.weights == "bf16":  # the others refuse it
        return [reckoner.ddp()]
    found = [reckoner.ddp(), reckoner.fsdp(), reckoner.bits(), *(reckoner.zero(s) for s in (1, 2, 3))]
    if config.engine.shard_size is not None:
        return found
    groups = [n * hardware.gpus_per_node for n in _GROUPS_OF_NODES if n < hardware.nodes]
    # a group of one process is what ddp does
    hybrid = [reckoner.fsdp(group) for group in groups if group > 1 and not hardware.world_size % group]
    fitting = [one for one in hybrid if one.memory <= 0.9 * hardware.memory_gib * GIB]
    return [*found[:2], *fitting[:1], *found[2:]]  # the smallest groups that fit send the least


class _Reckoner:
    """The arithmetic of one model, configuration and hardware; a method for each engine."""

    def __init__(self, size: ModelSize, config: Config, hardware: Hardware, views: Views) -> None:
        self.size, self.config, self.hardware, self.views = size, config, hardware, views
        engine = config.engine
        self.n, self.f, self.w = size.masked, size.frozen, hardware.world_size
        self.m = config.train.accumulate
        self.gathered_bytes = 2.0 if engine.precision == "bf16" else FULL
        self.reduced = 2.0 if engine.reduce_dtype == "bf16" else FULL
        rows = -(-config.train.global_batch_size // (self.w * self.m))
        kept = size.kept_with_checkpoints if engine.checkpoint_activations else size.kept_per_image
        self.activations = kept * rows * views.student * self.gathered_bytes
        passes = (4 if engine.checkpoint_activations else 3) * views.student + views.teacher
        flops = passes * size.flops_per_image * rows * self.m
        self.compute = flops / (hardware.tflops * 1e12)
        self.bucket = min(engine.bucket_mb * 2**18, self.n)  # in numbers
        self.held = held_by(config)
        self.scores, self.momentum = self.held.score * self.n, self.held.moments * self.n
        self.takes_whole = takes_gradients(
            mask_family(config, num_steps=1)
        )  # scores' gradients lie where theta's lay
        self.takes_pieces = self.takes_whole and config.optim.score_step != "rms"

    def one(
        self, name: str, keys: str = "", *, send_seconds: float | None = None, **needs: float
    ) -> Estimate:
        sent = needs["sent"]
        return Estimate(
            name,
            keys or f"engine.name={name}",
            **{"gathered": 0.0, **needs},
            activations=self.activations,
            compute_seconds=self.compute,
            send_seconds=sent / self.hardware.bandwidth if send_seconds is None else send_seconds,
        )

    @staticmethod
    def second(scores_gradients: float, gone: float, *, is_taken: bool) -> float:
        """Return what scores' gradients take beside theta's, when backward is over: nothing where they are
        written over them; else they may lie where `gone` bytes were.
        """
        return 0.0 if is_taken else max(scores_gradients - gone, 0.0)

    def ddp(self) -> Estimate:
        n, f, x = self.n, self.f, (self.w - 1) / self.w
        buckets = FULL * n if self.w > 1 else 0.0  # DistributedDataParallel's copies of gradients
        gradients = gradient_bytes(self.size, self.config, world_size=self.w)
        if gradients is None:
            second = self.second(FULL * n, self.activations, is_taken=self.takes_whole)
            gradients = FULL * n + buckets + second
        return self.one(
            "ddp",
            weights=2 * self.held.weight * n + FULL * f,
            scores=self.scores,
            momentum=self.momentum,
            gradients=gradients,
            sent=2 * x * self.held.weight * n,
        )

    def fsdp(self, group: int | None = None) -> Estimate:
        engine, n, f = self.config.engine, self.n, self.f
        s = min(group or engine.shard_size or self.w, self.w)
        x, replicas = (s - 1) / s, self.w // s
        padding = self.size.padded(s)
        gathers = (2 if engine.reshard_after_forward else 1) + (1 if self.views.teacher else 0)
        held = 2 * self.size.largest_block if engine.reshard_after_forward else n + f
        gradient = (self.gathered_bytes + self.reduced) * min(self.size.largest_block, n)
        gathered = padding * (self.gathered_bytes * held + gradient)
        in_group = self.m * x * padding * (gathers * self.gathered_bytes * (n + f) + self.reduced * n)
        once = x * padding * self.gathered_bytes * (n + f)
        between = 2 * (replicas - 1) / replicas * self.reduced * n / s
        bandwidth = self.hardware.bandwidth_among(s)
        seconds = in_group / bandwidth + between / self.hardware.bandwidth
        gone = gathered + self.activations
        return self.one(
            "fsdp" if group is None else f"fsdp/{group}",
            "engine.name=fsdp" + (f" engine.shard_size={group}" if group else ""),
            send_seconds=seconds,
            weights=FULL * (2 * n + f) / s,
            scores=FULL * n / s,
            momentum=self.momentum / s,
            gradients=FULL * n / s + self.second(FULL * n / s, gone, is_taken=self.takes_pieces),
            gathered=gathered,
            sent=in_group + between,
            gather_seconds=once / bandwidth,
        )

    def bits(self) -> Estimate:
        n, f, w, x = self.n, self.f, self.w, (self.w - 1) / self.w
        sending = self.reduced * min(3 * self.bucket, n)  # one bucket being filled, two on their way
        summed = self.reduced if self.m == 1 else FULL
        is_taken = self.takes_pieces and summed == FULL  # numbers of another dtype need memory of their own
        second = self.second(FULL * n / w, sending + self.activations, is_taken=is_taken)
        return self.one(
            "bits",
            weights=FULL * (2 * n + f),
            scores=FULL * n / w,
            momentum=self.momentum / w,
            gradients=summed * n / w + sending + second,
            sent=x * (self.m * self.reduced * n + n / 8),
        )

    def zero(self, stage: int) -> Estimate:
        n, f, w, x = self.n, self.f, self.w, (self.w - 1) / self.w
        engine, block = self.config.engine, min(2 * self.size.largest_block, self.n)
        gradients = FULL * max(block, self.bucket)  # they come as theta goes
        # theta is made in the forward and kept for backward, by resolution where they cannot share it
        is_apart = stage == 1 or engine.checkpoint_activations or engine.compile
        times = self.views.resolutions if is_apart else 1
        theta = self.size.largest_block if engine.checkpoint_activations else n * times
        keys = f"engine.name=deepspeed engine.zero_stage={stage}"
        if stage < 3:
            # partitions have float32 copies of the scores
            return self.one(
                f"deepspeed-{stage}",
                keys,
                weights=FULL * (n + f + theta),
                scores=FULL * n * (1 + 1 / w),
                momentum=self.momentum / w,
                gradients=gradients,
                sent=x * FULL * n * (1 + (self.m if stage == 2 else 1)),
            )
        # it looks ahead by two buckets at most, beside the weights and scores of the module at work
        live = min(2 * self.bucket + self.size.largest_block, 2 * (n + f))
        return self.one(
            "deepspeed-3",
            keys,
            weights=FULL * ((n + f) / w + theta),
            scores=2 * FULL * n / w,
            momentum=self.momentum / w,
            gradients=FULL * n / w + gradients,
            gathered=FULL * live,
            sent=self.m * x * (2 * times * FULL * (2 * n + f) + FULL * n),
            gather_seconds=x * FULL * (2 * n + f) / self.hardware.bandwidth,
        )


def choose_with_micro_steps(
    size: ModelSize, config: Config, hardware: Hardware, *, image_size: int
) -> tuple[Estimate | None, Config]:
    """Return the engine to take, and the configuration with the fewest micro-steps that make it fit.

    They are doubled from `train.accumulate` on, where the objective allows any, up to one image a rank.
    """
    while True:
        best = choose(estimate(size, config, hardware, image_size=image_size), hardware.memory_gib)
        micro = 2 * config.train.accumulate
        is_possible = (
            config.objective.name in _IN_MICRO_STEPS
            and config.train.global_batch_size >= micro * hardware.world_size
        )
        if best is not None or not is_possible:
            return best, config
        train = config.train.model_copy(update={"accumulate": micro})
        config = config.model_copy(update={"train": train})


def bank_bytes(config: Config, hardware: Hardware) -> float:
    """Return what objective.name=nbd keeps and computes with on each rank, beside the model: bytes.

    Of each of its pictures a row, two moments, a gradient and the unit row (of a sampled softmax in place of
    it what backward needs to make the gradient); targets; and for each embedding of the global batch its
    similarity to every picture of the softmax, thrice.
    """
    section = config.nbd
    own = -(-hardware.pictures // hardware.world_size)
    rows = own * (5 * 4 * section.dim + 12 * section.neighbours + 1)
    is_exact = hardware.pictures <= section.exact_up_to
    candidates = own if is_exact else -(-section.sampled // hardware.world_size)
    # of a sample the rows are taken out, and masked where they are targets
    taken = 0 if is_exact else candidates * 3 * 4 * section.dim
    embeddings = config.train.global_batch_size * section.views // config.train.accumulate
    return rows + taken + 3 * 4.0 * embeddings * candidates


def choose(estimates: Sequence[Estimate], memory_gib: float) -> Estimate | None:
    """Return the engine to take, or None where none fits into the memory of a GPU.

    Of those that fit it is the one with the smallest upper bound of time; where several are within 3 % of it,
    the simplest, which stands first.
    """
    fitting = [e for e in estimates if e.memory <= 0.9 * memory_gib * GIB]  # a tenth for the allocator
    if not fitting:
        return None
    best = min(e.seconds[1] for e in fitting)
    return next(e for e in fitting if e.seconds[1] <= 1.03 * best)
