"""What the task of a rank does after its process failed: requeue the job, or leave that to another task.

    a process says with which status it ends (`runs.ending.notes`) -> the tasks of all ranks agree by notes
    -> one of them: scontrol requeue (or the next job of a chain), not on nodes whose device failed

Who was killed, hung or lost its device speaks for all; who only lost a peer waits for it. Knows nothing of
training.
"""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from selfmask_dist.runs.ending.device_fault import device_status
from selfmask_dist.runs.ending.notes import FOLDER_PREFIX, EndNotes, node_name
from selfmask_dist.runs.exit_status import DEVICE, FAILED, HUNG, REQUEUE, is_echo, is_restartable

from .chain import chain_of, excluded_in, submit_next
from .restarts import why_not_again

_PEER_SECONDS = 10.0  # for the task whose process was killed to speak before those that failed with it
# for a task whose process failed to speak before those that lost it: shared file systems may say for up to a
# minute that a note is not there
_LOST_SECONDS = 75.0
_DEVICE_SECONDS = 2.0  # for other nodes whose devices failed too
_DUMP_SECONDS = 5.0  # for the other processes to notice that all hang, and to dump their stacks
_END_SECONDS = 300.0  # for SLURM to end a job that is done saving, or its rank 0 to requeue it
_EXCLUDE_SECONDS = 10.0  # for SLURM to take a node out of a job that it has just requeued
_POLL_SECONDS, _LATER_POLL_SECONDS = 0.5, 3.0  # in the first seconds, and after them
_LOG_BYTES = 65536  # of the end of a log, in which an aborted process has said why

_REQUEUED_BEFORE = "pending execution"  # ESLURM_JOB_PENDING, as scontrol words it

FAILED_NOTE, CLAIMED_NOTE, REQUEUED_NOTE, HUNG_NOTE = "failed", "claimed", "requeued", "hung"


@dataclass
class Aftermath:
    """The end of one task of a job.

    environment: SLURM's variables of this task. notes: of this start of the job. log: what the process wrote.
    seen: the signals that this task got, which grows while it waits. how: `launch.requeue`. submitted: what
    submitit wrote, `slurm/` in the run's folder.
    """

    environment: Mapping[str, str]
    notes: EndNotes
    log: Path
    max_restarts: int = 0
    seen: set[int] = field(default_factory=set)
    how: Literal["auto", "requeue", "chain"] = "requeue"
    submitted: Path | None = None

    def settle(self, status: int, *, rank: int, num_ranks: int) -> None:
        """Requeue the job where that is worth it; on the other ranks, wait until that is done: srun ends all
        tasks as soon as one has ended, and a job that ends by itself is not requeued by a preemption that is
        under way.

        Args:
            status: the process's, negative for a signal.
        """
        notes = self.notes
        status = self._own_status(status, rank)
        notes.tell(rank, status, node=node_name(self.environment) if status == DEVICE else "")
        if not is_restartable(status):
            if status == FAILED:
                self._let_others_speak(num_ranks)
            notes.say(FAILED_NOTE)  # srun now ends the other tasks: they are not to take it for a preemption
            return
        if is_echo(status) and self._is_left_to_others(num_ranks):
            return
        if notes.has(FAILED_NOTE):
            return
        if self.max_restarts == 0:
            _say("not requeued: launch.max_restarts is 0")
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save: SLURM may have the node
        can_chain = self.how != "requeue" and shutil.which("sbatch") is not None
        if shutil.which("scontrol") is None and not can_chain:
            _say("no scontrol on this node: SLURM itself requeues a preempted job")
            time.sleep(_END_SECONDS)
        elif (status != REQUEUE or rank == 0) and notes.say(CLAIMED_NOTE):
            self._requeue(status)
            notes.say(REQUEUED_NOTE)
        else:
            self._wait(lambda: notes.has(REQUEUED_NOTE), _END_SECONDS)

    def _let_others_speak(self, num_ranks: int) -> None:
        """Wait for the other ranks' ends: where one was killed, hung or lost its device, its task requeues
        the job, and this rank's error may only be an echo of that.
        """
        self._wait(lambda: len(self.notes.statuses()) >= num_ranks, _PEER_SECONDS)
        if any(is_restartable(end) and not is_echo(end) for end in self.notes.statuses().values()):
            self._wait(lambda: self.notes.has(REQUEUED_NOTE), 2 * _PEER_SECONDS)

    def _own_status(self, status: int, rank: int) -> int:
        """Return why the process ended: what it said itself, or what its log says where it was aborted.

        NCCL's watchdog aborts a process whose device failed as it does one whose peer is gone.
        """
        said = self.notes.statuses().get(rank)
        if said is not None:
            return said
        if is_echo(status) and (in_log := device_status(_end_of(self.log))) is not None:
            return in_log
        return status

    def _is_left_to_others(self, num_ranks: int) -> bool:
        """Wait for the rank whose end this one only echoes. Return whether this task has nothing to do."""
        notes = self.notes

        def is_settled() -> bool:
            ends = notes.statuses()
            is_all = len(ends) >= num_ranks and all(map(is_echo, ends.values()))
            return is_all or notes.has(FAILED_NOTE) or notes.has(CLAIMED_NOTE) or signal.SIGTERM in self.seen

        self._wait(is_settled, _LOST_SECONDS)
        if notes.has(CLAIMED_NOTE):
            return False
        # another task has ended the step, and decided before that; or SLURM ends the job
        return signal.SIGTERM in self.seen or any(
            not is_restartable(end) for end in notes.statuses().values()
        )

    def _requeue(self, status: int) -> None:
        job_id = own_job_id(self.environment)
        if status == HUNG:
            self.notes.say(HUNG_NOTE)
            time.sleep(_DUMP_SECONDS)
        if status == DEVICE:
            time.sleep(_DEVICE_SECONDS)
        start = own_job_id(self.environment) if self._is_array() else chain_of(self.environment)
        if (reason := why_not_again(self.log.parent, start, status, self.max_restarts)) is not None:
            _say(f"not requeued: {reason}")
            self.notes.say(FAILED_NOTE)
            return
        is_announced, bad = signal.SIGUSR2 in self.seen, self.notes.nodes(DEVICE)
        if is_cancelled(job_id, is_announced=is_announced):
            return
        if self.how != "chain" and shutil.which("scontrol") is not None:
            is_done = requeue(job_id, without_nodes=bad)
            if is_done or self.how == "requeue":
                return
            _say("the cluster does not requeue this job: a next one goes on (launch.requeue=chain)")
        if self.submitted is not None:
            without = [*excluded_in(self.environment), *bad] if bad else []
            submit_next(self.submitted, self.environment, without)

    def _is_array(self) -> bool:
        return "SLURM_ARRAY_TASK_ID" in self.environment

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait until the condition holds, at most for some seconds."""
        start = time.monotonic()
        while not condition() and (waited := time.monotonic() - start) < seconds:
            time.sleep(_POLL_SECONDS if waited < _PEER_SECONDS else _LATER_POLL_SECONDS)


def start_notes(logs: Path, environment: Mapping[str, str]) -> EndNotes:
    """Return the notes by which the tasks of this start of the job tell each other how it ends."""
    return EndNotes(
        logs / f"{FOLDER_PREFIX}{own_job_id(environment)}-{environment.get('SLURM_RESTART_COUNT', 0)}"
    )


def own_job_id(environment: Mapping[str, str]) -> str:
    """Return what SLURM's commands call this job: the id of an array alone would mean all of its tasks."""
    if "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def is_cancelled(job_id: str, *, is_announced: bool) -> bool:
    """Return whether the job's user has ended it, and does not want it back.

    A job that got SIGTERM only was either cancelled or preempted on a cluster that does not announce
    preemptions: while it is being cancelled its state is no longer RUNNING.
    """
    if is_announced or job_state(job_id) == "RUNNING":
        return False
    _say("not requeued: the job was cancelled")
    return True


def requeue(job_id: str, *, without_nodes: Sequence[str] = ()) -> bool:
    """Ask SLURM to run this job again, and return whether it will.

    It does so by itself where the grace time of a preemption ended before the processes had saved; it then
    refuses to do it once more, which is no ban on requeues.

    Args:
        without_nodes: nodes that it is not to run on any more, beside those that it was not to before.
    """
    if without_nodes:  # SLURM ends this task as soon as it requeues the job, and there is more to say
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    done = _scontrol("requeue", job_id)
    _say(f"requeue of job {job_id}: {done.stderr.strip() or 'done'}")
    if done.returncode and _REQUEUED_BEFORE in done.stderr:
        _say("SLURM has requeued it by itself")
        return True
    if without_nodes and done.returncode == 0:
        _exclude(job_id, without_nodes)
    return done.returncode == 0


def _exclude(job_id: str, nodes: Sequence[str]) -> None:
    """Take nodes out of a job that has just been requeued: SLURM refuses it for one that runs."""
    names = [*excluded_in({"SLURM_JOB_ID": job_id}), *nodes]
    deadline, reason = time.monotonic() + _EXCLUDE_SECONDS, ""
    while time.monotonic() < deadline:
        done = _scontrol("update", f"JobId={job_id}", f"ExcNodeList={','.join(names)}")
        if done.returncode == 0:
            _say(f"job {job_id} no longer runs on {', '.join(nodes)}, whose device failed")
            return
        reason = done.stderr.strip() or done.stdout.strip()
        time.sleep(_POLL_SECONDS)
    _say(
        f"{', '.join(nodes)} has a device that failed and could not be left out ({reason}): "
        f"scontrol update JobId={job_id} ExcNodeList={','.join(names)}"
    )


def job_state(job_id: str) -> str:
    """Return the job's state as squeue names it; UNKNOWN for one that SLURM has forgotten."""
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.split() or ["UNKNOWN"])[0]


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=False)


def _end_of(log: Path) -> str:
    """Return the end of what the process of this start wrote."""
    try:
        with open(log, "rb") as stream:
            stream.seek(max(stream.seek(0, 2) - _LOG_BYTES, 0))
            return stream.read().decode(errors="replace").rpartition("---- start")[2]
    except OSError:
        return ""


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
