"""The sections that every run has: eval, engine, checkpoint, run and launch.

Each key has its default, effect, unit and bounds, and the group it belongs to (see `fields`). `Paper:` gives
the value of Warmerdam et al. 2024. Knows nothing of files, overrides or torch.
"""

from typing import Literal

from pydantic import JsonValue

from selfmask_dist.config.fields import (
    Counts,
    NonEmpty,
    Section,
    StepSpan,
    Strings,
    efficiency,
    orchestration,
    science,
)


class EvalConfig(Section):
    """What is measured: with labels on data.test, without on training images (retrieval)."""

    knn_k: Counts = science(
        (20, 200),
        "Neighbours of the k-NN classifier; each gives an accuracy, the first is the one watched while "
        "training.",
        unit="neighbours",
    )
    knn_temperature: float = science(
        0.1,
        "A neighbour's vote weighs exp(similarity / temperature): smaller favours the nearest.",
        unit="cosine similarity",
        gt=0,
    )
    retrieval: bool | None = science(
        None,
        "Measure instance retrieval, which needs no labels: how many training images are found by a mildly "
        "augmented view of themselves. Frozen against adapted it decides whether the mask is worth using "
        "(docs/unlabelled.md). null: where the objective takes no labels.",
    )
    retrieval_samples: int = science(
        600,
        "Training images of that measure at most, at equal distances through data.train.",
        unit="images",
        ge=2,
    )
    retrieval_bank: int | None = science(
        None,
        "Training images, at equal distances and those above among them, of which each has to find its own; "
        "null: those above alone. More make the measure harder: where the frozen backbone's is near 1, it "
        "cannot rise.",
        unit="images",
        ge=2,
    )
    knn_every: float = orchestration(
        1.0,
        "Time from one measurement (k-NN, instance retrieval) to the next while training; 0: none.",
        unit="epochs",
        ge=0,
    )
    monitor_samples: int = orchestration(
        5000, "Images at most in the bank, and in the queries, of those measurements.", unit="images", ge=1
    )
    probe: bool = orchestration(
        True, "Measure a linear probe on unaugmented features as well (method=probe always does)."
    )
    final: bool = orchestration(True, "Measure what was trained at the end.")
    frozen_baseline: bool = orchestration(
        True, "Measure the frozen backbone before training, to compare with."
    )
    batch_size: int = efficiency(256, "Images a process embeds at once.", unit="images", ge=1)
    precision: Literal["float32", "bf16"] = science(
        "float32",
        "Of the backbone while it embeds images that are measured, or that a cascade divides among experts; "
        "what is reckoned with embeddings stays as it is. bf16: faster on GPUs, and numbers differ a little. "
        "While a run trains under fsdp, engine.precision=bf16 holds for its measurements in any case.",
    )
    keep_embeddings: bool = orchestration(False, "Keep measuring/ once its numbers are written: embeddings.")
    search_mib: float | None = efficiency(
        None,
        "Memory of the k-NN search beyond bank and queries. null: 256, or what is needed, of what is free.",
        unit="MiB",
        gt=0,
    )

    def measures_retrieval(self, objective: str) -> bool:
        """Return whether instance retrieval is measured, in a run with this objective."""
        return objective != "supervised" if self.retrieval is None else self.retrieval

    def steps_between(self, steps_per_epoch: int) -> int:
        """Return the steps from one look of the monitor to the next; 0: it never looks."""
        return max(round(self.knn_every * steps_per_epoch), 1) if self.knn_every else 0


class EngineConfig(Section):
    """How the work is computed."""

    name: Literal["ddp", "fsdp", "bits", "deepspeed"] = efficiency(
        "ddp",
        "ddp: each process holds everything, gradients are summed. fsdp: weights, scores and momentum are "
        "cut over the processes (FSDP2). bits: weights are held by all, scores and momentum are cut, and "
        "mask "
        "bits travel instead of weights. deepspeed: ZeRO, see zero_stage. `selfmask plan` compares them.",
    )
    precision: Literal["float32", "bf16"] = science(
        "float32",
        "Of forward and backward; scores and their updates are float32 always. bf16: faster on GPUs; "
        "some of the mask's bits come out different, the more the higher optim.score_lr is.",
    )
    weights: Literal["float32", "bf16"] = science(
        "float32",
        "What matrices and kernels under masks are held in, the frozen weight and theta. bf16: half their "
        "bytes, and scores step tensor by tensor, so that their gradients never exist together; needs "
        "engine.name=ddp, engine.precision=bf16, eval.precision=bf16.",
    )
    scores: Literal["float32", "bf16"] = science(
        "float32",
        "What scores are held in. bf16: each step is rounded at random, so that small ones are not lost; "
        "needs engine.weights=bf16.",
    )
    momentum: Literal["float32", "bf16"] = science(
        "float32", "What the momentum of scores is held in (optim.kind=sgd); it is reckoned in float32."
    )
    reduce_dtype: Literal["float32", "bf16"] = science(
        "float32", "Of gradients while they are summed over processes (fsdp, bits). bf16: half the bytes."
    )
    compile: bool = efficiency(
        False, "torch.compile on each of the backbone's blocks: slow first steps, then faster ones."
    )
    channels_last: bool = efficiency(
        False,
        "Images enter the backbone with their channels last in memory, and its activations stay so: faster "
        "convolutions. Without effect on ViTs.",
    )
    checkpoint_activations: bool = efficiency(
        False,
        "Keep only each block's input and compute the rest again in backward: less memory, a third slower.",
    )
    reshard_after_forward: bool = efficiency(
        True, "fsdp: give gathered weights back after each block's forward; false: keep them until backward."
    )
    shard_size: int | None = efficiency(
        None,
        "fsdp: cut over groups of so many processes, which hold the same pieces as the other groups, for "
        "example one node; null: over all.",
        unit="processes",
        ge=1,
    )
    cpu_offload: bool = efficiency(
        False,
        "fsdp: weights, scores and momentum wait in the CPU's memory: slow, for models that do not fit.",
    )
    bucket_mb: float = efficiency(
        25.0, "bits: gradients are sent in pieces of this size while backward goes on.", unit="MiB", gt=0
    )
    zero_stage: Literal[1, 2, 3] = efficiency(
        2, "deepspeed: 1 cuts the optimizer's state over the processes, 2 gradients too, 3 weights too."
    )
    deepspeed: dict[str, JsonValue] = efficiency(
        {}, "deepspeed: keys of its own JSON configuration, over those made from this one."
    )
    device: Literal["auto", "cpu", "cuda"] = efficiency("auto", "auto: cuda where there is one, else cpu.")
    workers: int = efficiency(
        2,
        "Workers that decode images for one training process; 0: it does so itself.",
        unit="workers",
        ge=0,
    )
    worker_kind: Literal["process", "thread"] = efficiency(
        "process",
        "process: start in seconds and share nothing; thread: start at once and share memory, good where "
        "reading waits for a network or processes are few.",
    )
    threads: int | None = efficiency(
        None, "CPU threads of a training process; null: torch's choice.", unit="threads", ge=1
    )


class CheckpointConfig(Section):
    """What a preempted or killed run goes on from. Trained tensors only; frozen weights are never saved."""

    every_minutes: float = orchestration(
        10.0, "Time from one checkpoint to the next; 0: not by time.", unit="minutes", ge=0
    )
    every_steps: int = orchestration(
        0, "Steps from one checkpoint to the next, besides; 0: not by steps.", unit="steps", ge=0
    )
    keep_last: int = orchestration(2, "Newest checkpoints that stay.", unit="checkpoints", ge=1)
    keep_every: int = orchestration(
        0, "Checkpoints at multiples of so many steps stay too; 0: none.", unit="steps", ge=0
    )
    keep_best: NonEmpty | None = orchestration(
        None,
        "The checkpoint with the highest value of this metric (for example monitor/knn20) stays; null: none.",
    )
    asynchronous: bool = orchestration(
        True, "Write in the background; training waits only while its tensors are copied."
    )
    stop_seconds: float = orchestration(
        60.0,
        "Longest time from SIGUSR2 or SIGTERM to the end of a process; one that has not saved by then ends "
        "without, to be requeued. Less than launch.signal_seconds.",
        unit="seconds",
        gt=0,
    )
    hang_minutes: float = orchestration(
        30.0,
        "A process in which nothing moves for so long after its first step writes its stacks and ends, to be "
        "requeued; ten times as long before; 0: never. Collectives time out a quarter later.",
        unit="minutes",
        ge=0,
    )


class RunConfig(Section):
    """Where results go, and what is shown."""

    dir: NonEmpty = orchestration("runs", "Folder of all runs.")
    name: NonEmpty = orchestration(
        "run", "Folder of this run in run.dir: config.yaml, metrics.jsonl, masks, ..."
    )
    overwrite: bool = orchestration(False, "Replace an earlier run of that name; false: refuse to start.")
    resume: bool = orchestration(
        False,
        "Go on with an unfinished run of that name from its newest checkpoint. The launcher's restarts do so "
        "by themselves.",
    )
    wandb: Literal["off", "offline", "online"] = orchestration(
        "off", "Weights & Biases. offline: logs stay in the run's folder until wandb sync."
    )
    wandb_project: NonEmpty = orchestration("selfmask", "Project of the wandb run.")
    log_every: int = orchestration(
        10, "Steps from one line of metrics.jsonl to the next; each waits for the device.", unit="steps", ge=1
    )
    profile: StepSpan | None = orchestration(
        None,
        "[first, end]: the steps first to end - 1 are traced with torch's profiler, on every rank, into "
        "the run's folder profile/; a few steps suffice, as a trace grows by megabytes with each.",
        unit="steps",
    )
    whole_model: bool = orchestration(
        True,
        "A supervised run writes its head, class names and how the backbone is built into final.mask (or "
        "model.json), so that the file alone predicts; false: the mask alone.",
    )
    licence: NonEmpty | None = orchestration(
        None, "Licence of the mask, kept in its file and shown on its model card, for example cc-by-4.0."
    )
    progress: bool = orchestration(
        True, "A progress bar with images/s, time left and the share of waiting for data."
    )


class LaunchConfig(Section):
    """The processes that launchers/submit.py starts."""

    processes_per_node: int = orchestration(
        1, "Training processes on each node; 0: one for each GPU.", unit="processes", ge=0
    )
    master_port: int | None = orchestration(
        None,
        "TCP port at which the processes meet; null: a free one, or one derived from the SLURM job's id.",
        unit="port number",
        ge=1,
        le=65535,
    )
    max_restarts: int = orchestration(
        100,
        "Restarts from the newest checkpoint after failures: a killed, lost or hung process, a failed "
        "device. Preemptions and time limits are not counted; 0: no restart at all, after those neither.",
        unit="restarts",
        ge=0,
    )
    requeue: Literal["auto", "requeue", "chain"] = orchestration(
        "auto",
        "SLURM: how a job that saved or failed goes on. requeue: the same job (scontrol requeue). chain: the "
        "job submits a next one, which waits for its end (sbatch --dependency=afterany). auto: requeue, and "
        "chain where the cluster refuses it.",
    )
    fabric_check: bool = orchestration(
        False,
        "Measure the bandwidth between neighbouring nodes before training, in seconds, and name slow ones.",
    )
    snapshot: bool = orchestration(
        True, "Start from a copy of the code in the run's folder, which later edits do not change."
    )
    environment: dict[str, NonEmpty] = orchestration(
        {}, "Environment variables of every process, for example {NCCL_DEBUG: INFO}."
    )
    bind: bool = orchestration(
        True, "SLURM: keep each process, with its data workers, on the CPUs that are near its GPU."
    )
    container: Strings = orchestration(
        (), "Command that each process is started with, for example [apptainer, exec, --nv, image.sif]."
    )
    container_python: NonEmpty | None = orchestration(
        None, "The Python inside of launch.container, for example python; null: the one that submits."
    )
    setup: Strings = orchestration(
        (), "SLURM: lines of shell in the batch script, before the processes start."
    )
    srun: dict[str, JsonValue] | Strings = orchestration(
        {},
        "SLURM: any further srun option, for example {container-image: image.sqsh, cpu-bind: cores}, or a "
        "list, [--mpi=none]. true: the option alone.",
    )
    partition: NonEmpty | None = orchestration(None, "SLURM: partition; null: the cluster's default.")
    account: NonEmpty | None = orchestration(None, "SLURM: account the job is charged to.")
    qos: NonEmpty | None = orchestration(None, "SLURM: quality of service.")
    constraint: NonEmpty | None = orchestration(
        None, "SLURM: features the nodes must have, for example a100|h100."
    )
    hours: float = orchestration(
        24.0,
        "SLURM: time limit of one start; the job saves before it ends and is requeued.",
        unit="hours",
        gt=0,
    )
    signal_seconds: int = orchestration(
        90, "SLURM: how long before the time limit the job is told to save.", unit="seconds", ge=1
    )
    gpus_per_node: int | None = orchestration(
        None, "SLURM: GPUs asked for on each node; null: none are asked for.", unit="GPUs", ge=1
    )
    cpus_per_process: int | None = orchestration(
        None, "SLURM: CPUs for each process; null: the cluster's default.", unit="CPUs", ge=1
    )
    memory_gb: int | None = orchestration(
        None, "SLURM: memory on each node; null: the cluster's default.", unit="GB", ge=1
    )
    exclusive: bool = orchestration(False, "SLURM: whole nodes, shared with no other job.")
    mail: NonEmpty | None = orchestration(
        None, "SLURM: address that is written to when the job ends or fails."
    )
    sbatch: dict[str, JsonValue] = orchestration(
        {},
        "SLURM: any further sbatch option, for example {nodelist: n1}. true: the option alone; false, null: "
        "without it, so that {requeue: false} is a job that SLURM may not requeue.",
    )
