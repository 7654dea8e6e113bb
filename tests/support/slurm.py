"""A real SLURM of four virtual nodes on this machine, for tests and benchmarks.

    python -m tests.support.slurm up    # as root, with slurm-wlm and munge; prints what to export
    python -m tests.support.slurm down

One slurmctld and one slurmd per node, each at its own port. Two partitions: `low`, whose jobs are requeued
when `high` needs their nodes; preempted jobs get SIGUSR2 first and have a grace time. Each node claims 72
CPUs and 8 GPUs, which are empty files: what a job asks for is granted, and its processes find no device. Adds
the nodes' names to /etc/hosts. Knows nothing of training.
"""

import argparse
import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4")
CPUS, GPUS = 72, 8  # that each node claims to have: no task is bound to any, and the GPUs are empty files
FOLDER = Path(tempfile.gettempdir()) / "selfmask-slurm"
_CONTROL_PORT, _NODE_PORTS = 16817, (17001, 17002, 17003, 17004)
_START_SECONDS = 30.0
_WAITING = ("PENDING", "COMPLETING", "CONFIGURING", "REQUEUED")
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")

_CONFIGURATION = """\
ClusterName=selfmask
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
SlurmctldPort={control_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=100000,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{preempt_signal}
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_ports[0]}-{node_ports[3]}]
PartitionName=DEFAULT Nodes=n[1-4] MaxTime=INFINITE State=UP
PartitionName=low Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Default=NO PriorityTier=10 PreemptMode=OFF
SlurmdParameters=config_overrides
"""
_DEVICES = "AutoDetect=off\nNodeName=n[1-4] Name=gpu File={folder}/devices/nvidia[0-{last}]\n"


def why_not() -> str:
    """Why the cluster cannot be started here; empty where it can."""
    if missing := [name for name in _PROGRAMS if _program(name) is None]:
        return f"no SLURM here: {', '.join(missing)} not found (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "starting SLURM's daemons needs root"


def is_up() -> bool:
    if not (FOLDER / "slurm.conf").exists():
        return False
    done = _run("scontrol", "ping", check=False)
    return done.returncode == 0 and "is UP" in done.stdout


def up() -> Path:
    """Start the cluster, anew where it is not running; returns the value for SLURM_CONF.

    Raises:
        RuntimeError: it cannot be started, or its nodes do not come up.
    """
    if reason := why_not():
        raise RuntimeError(reason)
    configuration = FOLDER / "slurm.conf"
    with open(FOLDER.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be starting it
        if is_up():
            return configuration
        down()
        _check_ports()
        try:
            _start(configuration)
        except BaseException:
            down()
            raise
    return configuration


def _start(configuration: Path) -> None:
    for name in ("state", "log", "devices", *(f"spool/{node}" for node in NODES)):
        (FOLDER / name).mkdir(parents=True)
    host = socket.gethostname()
    version = _run("slurmctld", "-V").stdout.split()[-1]
    is_new = tuple(int(part) for part in version.split(".")[:2]) >= (23, 2)
    preempt_signal = (
        "PreemptParameters=send_user_signal" if is_new else "SlurmctldParameters=preempt_send_user_signal"
    )
    values = {"host": host, "folder": FOLDER, "preempt_signal": preempt_signal, "cpus": CPUS, "gpus": GPUS}
    ports = {"control_port": _CONTROL_PORT, "node_ports": _NODE_PORTS}
    configuration.write_text(_CONFIGURATION.format(**values, **ports))
    (FOLDER / "gres.conf").write_text(_DEVICES.format(folder=FOLDER, last=GPUS - 1))
    for index in range(GPUS):
        (FOLDER / "devices" / f"nvidia{index}").touch()
    _name_nodes()
    _start_munge()
    _run("slurmctld", "-c")
    for node in NODES:
        _run("slurmd", "-c", "-N", node)
    _wait_for_nodes()


def down() -> None:
    """Stop the daemons of the cluster by their pid files, end what still runs of its jobs, and forget it."""
    for path in FOLDER.glob("slurm*.pid"):
        _end(path)
    for pid in _steps():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(FOLDER, ignore_errors=True)


def _check_ports() -> None:
    """Raises RuntimeError where another cluster, or one whose folder was deleted, has this one's ports."""
    for port in (_CONTROL_PORT, *_NODE_PORTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                daemons = [f"{name} {pid}" for pid, name in _processes().items() if name.startswith("slurm")]
                raise RuntimeError(
                    f"port {port} is taken, maybe by another cluster on this machine; these run here: "
                    f"{', '.join(daemons) or 'no daemons of SLURM'}. Stop that first"
                ) from None


def _steps() -> list[int]:
    """The processes of this cluster's jobs: slurmstepd, and all that came from them."""
    mine = f"SLURM_CONF={FOLDER / 'slurm.conf'}".encode()
    found = []
    for pid, name in _processes().items():
        with contextlib.suppress(OSError):
            if name == "slurmstepd" and mine in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    for pid in found:  # grows as it is walked
        with contextlib.suppress(OSError):
            for path in Path(f"/proc/{pid}/task").glob("*/children"):
                found += [int(child) for child in path.read_text().split()]
    return found


def _processes() -> dict[int, str]:
    """The living ones' names, by id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            pid = int(path.parent.name)
            if _is_alive(pid):
                found[pid] = path.read_text().strip()
    return found


def submitted_job(text: str, part: str = "") -> str:
    """The id of the job that `launchers/submit.py` said it submitted, of several the first with this part."""
    found = re.search(rf"^submitted job (\d+).*{part}", text, re.MULTILINE)
    assert found is not None, text
    return found.group(1)


def job_state(job: str) -> str:
    """As squeue names it; empty for a job that is not known."""
    return _run(
        "squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T", check=False
    ).stdout.strip()


def job_field(job: str, name: str) -> str:
    """A field of a job that SLURM has not forgotten yet, such as ExcNodeList."""
    words = _run("scontrol", "show", "--oneliner", "job", job).stdout.split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


def requeue_refusal(job: str) -> str:
    """What SLURM says to a requeue of a job that may not be; empty, and the job is requeued, where it may."""
    done = _run("scontrol", "requeue", job, check=False)
    return done.stderr.strip() if done.returncode else ""


@contextlib.contextmanager
def nodes_taken(nodes: int = 4, seconds: float = 120.0) -> Iterator[str]:
    """Have nodes in the hands of a job of the higher partition, whose id is yielded; it ends with `with`."""
    command = [
        "sbatch",
        "--parsable",
        "--partition=high",
        f"--nodes={nodes}",
        "--exclusive",
        "--output=/dev/null",
    ]
    higher = _run(*command, "--wrap=sleep 600").stdout.strip()
    try:
        _wait(lambda: job_state(higher) == "RUNNING", seconds)
        yield higher
    finally:  # else every test that follows finds the nodes taken
        _run("scancel", higher)


def preempt(*jobs: str, nodes: int = 4, seconds: float = 120.0) -> None:
    """Take the nodes away from running jobs by one of a higher partition until they have left them; then let
    them start again at once (SLURM would wait for two minutes).
    """
    with nodes_taken(nodes, seconds):
        for job in jobs:
            wait_for_state(job, "PENDING", seconds)
    start_again(*jobs, seconds=seconds)


def start_again(*jobs: str, seconds: float = 120.0) -> None:
    """Spare requeued jobs the minute or two that SLURM lets them wait."""
    for job in jobs:
        wait_for_state(job, "PENDING", seconds)
    time.sleep(1.1)  # a node refuses a start that was granted in the second in which it ended the one before
    for job in jobs:  # once: each update begins the wait anew
        _run("scontrol", "update", f"JobId={job}", "StartTime=now")
    for job in jobs:
        _wait(lambda job=job: job_state(job) not in _WAITING, seconds)  # type: ignore[misc]


def fail_node(node: str) -> None:
    """As SLURM does with a node that does not answer any more; it stays away until `resume_node`."""
    for state in ("DOWN", "DRAIN"):  # its slurmd lives, and would bring a node back that is only down
        _run("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")


def resume_node(node: str) -> None:
    _run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)  # it may be back already
    _wait(lambda: not re.search("down|drain|drng", _node_state(node)), 60.0)


def _node_state(node: str) -> str:
    return _run("sinfo", "--noheader", f"--nodes={node}", "--format=%t").stdout


def cancel(job: str) -> None:
    _run("scancel", job)


def kill(job: str) -> None:
    """End every process of a job at once, without a word to them, as where a machine dies. `scancel` with the
    signal KILL would send SIGTERM first.
    """
    found = []
    for pid in _processes():
        with contextlib.suppress(OSError):
            if f"SLURM_JOB_ID={job}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    for signum in (signal.SIGSTOP, signal.SIGKILL):  # none is to see another one's end
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
    cancel(job)


def sbatch(command: str, output: Path, *options: str) -> str:
    """Submit a line of a shell as a job, past the launcher; returns its id."""
    arguments = ["--parsable", f"--output={output}", *options, "--wrap", command]
    return _run("sbatch", *arguments).stdout.strip()


def wait_for_state(job: str, state: str, seconds: float = 120.0) -> None:
    _wait(lambda: job_state(job) == state, seconds)


def wait_for_end(job: str, seconds: float = 300.0) -> str:
    """Wait until a job has ended for good; returns its state."""
    _wait(lambda: job_state(job) not in ("RUNNING", *_WAITING), seconds)
    return job_state(job)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"SLURM did not get there in {seconds:.0f} s:\n{_run('squeue', check=False).stdout}"
            )
        time.sleep(0.2)


def _wait_for_nodes() -> None:
    deadline = time.monotonic() + _START_SECONDS
    while (
        _run("sinfo", "--noheader", "--partition=low", "--format=%D %t", check=False).stdout.strip()
        != "4 idle"
    ):
        if time.monotonic() > deadline:
            log = (FOLDER / "log" / "slurmctld.log").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"SLURM's nodes are not idle after {_START_SECONDS:.0f} s:\n{log}")
        time.sleep(0.2)


def _name_nodes() -> None:
    """A job's processes meet on the first node by name, so the names must resolve."""
    hosts = Path("/etc/hosts")
    known = hosts.read_text().split()
    if missing := [node for node in NODES if node not in known]:
        with open(hosts, "a") as stream:
            stream.write(f"127.0.0.1 {' '.join(missing)}\n")


def _start_munge() -> None:
    if _run("munge", "-n", check=False).returncode == 0:
        return
    for folder in ("/run/munge", "/var/log/munge", "/var/lib/munge"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.chown(folder, "munge", "munge")
    _run("runuser", "-u", "munge", "--", str(_program("munged")), "--force")
    deadline = time.monotonic() + _START_SECONDS
    while _run("munge", "-n", check=False).returncode:
        if time.monotonic() > deadline:
            raise RuntimeError("munged does not answer; see /var/log/munge/munged.log")
        time.sleep(0.1)


def _end(pid_file: Path) -> None:
    try:
        pid = int(pid_file.read_text())
    except (ValueError, OSError):
        return
    if not _processes().get(pid, "").startswith("slurm"):
        return  # the file is old, and the number another process's by now
    os.kill(pid, signal.SIGTERM)
    for _ in range(100):
        if not _is_alive(pid):
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a container without an init leaves its orphans unreaped


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


def _run(name: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [_program(name) or name, *arguments],
        env={**os.environ, "SLURM_CONF": str(FOLDER / "slurm.conf")},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if check and done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description="A SLURM of four virtual nodes on this machine.")
    parser.add_argument("action", choices=("up", "down"))
    action = parser.parse_args().action
    if action == "down":
        down()
        return 0
    try:
        print(f"export SLURM_CONF={up()}")
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
