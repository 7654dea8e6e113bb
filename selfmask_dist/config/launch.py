"""The section of what launchers start and ask a cluster for. Knows no launcher."""

from typing import Literal

from pydantic import JsonValue

from selfmask_dist.config.fields import NonEmpty, Section, Strings, orchestration


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
    container: Strings = orchestration(
        (), "Command that each process is started with, for example [apptainer, exec, --nv, image.sif]."
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
        {}, "SLURM: any further sbatch option, for example {nodelist: n1}."
    )
