"""What would fail minutes or hours later, said before anything starts.

Every check looks at the configuration, the file system or the cluster, and yields complaints that end with
the way out. Knows nothing of training and reads no image.
"""

import os
import re
import shutil
import socket
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from selfmask_dist.config import Config
from selfmask_dist.config.site import is_data_name
from selfmask_dist.runs.folder import check_start
from selfmask_dist.runs.owner import check_free
from selfmask_dist.runs.submitted import waiting_job

from .local import visible_gpus
from .site import read_partitions

_FREE_BYTES = 2**30  # for checkpoints, masks and logs of a run


def preflight(
    config: Config,
    *,
    cluster: str,
    num_nodes: int,
    least_nodes: int | None = None,
    is_dry: bool = False,
    coming: Collection[str] = (),
) -> None:
    """Check what would fail later.

    Args:
        least_nodes: a job may get any number of nodes from this one on, up to `num_nodes`.
        coming: folders of tars that are made before the run starts.
        is_dry: nothing will be submitted, so that SLURM's programs may be missing here.

    Raises:
        ValueError: with every complaint, one to a line.
    """
    complaints = [*_run_folder(config), *_files(config)]
    for nodes in range(least_nodes or num_nodes, num_nodes + 1):
        complaints += _batch(config, cluster, nodes)
    if least_nodes is not None and cluster != "slurm":
        complaints.append(f"--nodes {least_nodes}:{num_nodes} is for SLURM; give one number here")
    complaints = list(dict.fromkeys(complaints))
    missing = [*_data(config, coming), *_absent(config)]
    if is_dry:  # another machine may have them
        for complaint in missing:
            print(f"note: {complaint}", file=sys.stderr)
    else:
        complaints += missing
    complaints += [*_patches(config), *_cascade(config), *_times(config, cluster)]
    complaints += [*(_slurm(config, num_nodes, is_dry) if cluster == "slurm" else _here(config))]
    if complaints:
        raise ValueError("\n       ".join(complaints))


def _run_folder(config: Config) -> Iterator[str]:
    run = (Path(config.run.dir) / config.run.name).absolute()
    parent = next(folder for folder in (run, *run.parents) if folder.exists())
    if not parent.is_dir():
        yield f"{parent} is a file; set run.dir to a folder"
        return
    if not os.access(parent, os.W_OK | os.X_OK):
        yield f"{parent} is not writable; set run.dir to a folder that is"
    if shutil.disk_usage(parent).free < _FREE_BYTES:
        yield f"less than 1 GiB is free at {parent}; make room, or set run.dir to another disk"
    # a launcher that was itself started again, as a job that SLURM requeued, goes on with its run
    is_restart = os.environ.get("SELFMASK_RESTARTS", "0") != "0"
    if (job := waiting_job(run)) is not None and not is_restart:
        yield (
            f"SLURM job {job} is to make {run} and waits for its turn; let it, or `scancel {job}` first, or "
            f"set run.name to another name"
        )
        return
    try:
        check_free(run)
        check_start(config, is_restart=is_restart)
    except ValueError as error:
        yield str(error)


def _data(config: Config, coming: Collection[str]) -> Iterator[str]:
    needs_test = config.needs_labels and config.data.held_out is None
    for key, text in (("data.train", config.data.train), ("data.test", config.data.test)):
        if text is None and key == "data.test" and not needs_test:
            continue  # a part of the training images is, or what needs no labels
        if text in coming:
            continue
        if text is None:
            instead = ", or a share of the training images as data.held_out" if key == "data.test" else ""
            yield f"{key} is not set; give a folder of tars or of pictures{instead}"
        elif any(sign in text for sign in "*?[{") or "::" in text:
            continue  # a pattern, which the reader resolves
        elif "://" in text:
            continue  # elsewhere; opening it says what is wrong
        elif is_data_name(text):
            yield (
                f"{key}: no data set {text} is found; say its place once in a site file (site: {{data: "
                f"{{{text}: FOLDER}}}}; `selfmask site init` writes one), put it into $SELFMASK_DATA/{text}, "
                f"or set {key} to a folder of tars"
            )
        elif not Path(text).exists():
            yield f"{key}: there is no {text} on this machine"
        elif Path(text).is_dir() and not any(Path(text).glob("*.tar")):
            yield f"{key}: {text} has no tars and no pictures in it; name a folder that has"
    if config.data.subset is not None and not Path(config.data.subset).is_file():
        yield f"data.subset: there is no file {config.data.subset}; unset, all images are used"


def _absent(config: Config) -> Iterator[str]:
    """Yield which files and programs of the configuration this machine does not have."""
    weights, container, first = config.backbone.weights, config.launch.container, config.mask.init_from
    if weights is not None and not Path(weights).is_file():
        yield f"backbone.weights: there is no file {weights}"
    if first is not None and not any(Path(first, "checkpoints").glob("step-*")):
        yield f"mask.init_from: {first} has no checkpoints; name the folder of a finished run"
    if container and shutil.which(container[0]) is None:
        yield f"launch.container: there is no program {container[0]} on this machine"
    if config.launch.container_python is not None and not container:
        yield "launch.container_python is the Python inside of launch.container, and that is not set"


def _files(config: Config) -> Iterator[str]:
    weights = config.backbone.weights
    if weights is not None and Path(weights).is_file() and not _looks_like_weights(Path(weights)):
        yield (
            f"backbone.weights: {weights} is neither safetensors nor what torch.save writes (a Git LFS "
            f"pointer, a web page, half a download?); fetch it again"
        )
    for name in config.launch.environment:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            yield f"launch.environment: {name!r} is not the name of a variable"
    if config.run.wandb == "online" and not _has_wandb_key():
        yield "run.wandb=online and no key is found; run `wandb login`, or set run.wandb=offline"


def _looks_like_weights(path: Path) -> bool:
    """Tell by the first bytes: a state dict is a zip file or a pickle; safetensors begins with its header's
    length.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    if path.suffix != ".safetensors":
        return start.startswith((b"PK", b"\x80"))
    return start.endswith(b"{") and int.from_bytes(start[:8], "little") + 8 <= path.stat().st_size


def _has_wandb_key() -> bool:
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return "WANDB_API_KEY" in os.environ or (netrc.is_file() and "wandb" in netrc.read_text(errors="replace"))


def _batch(config: Config, cluster: str, num_nodes: int) -> Iterator[str]:
    per_node = config.launch.processes_per_node or config.launch.gpus_per_node
    if not per_node:
        if cluster == "slurm":
            yield (
                "launch.processes_per_node=0 means one for each GPU and launch.gpus_per_node is not set; "
                "set it"
            )
        return
    batch, world_size = config.train.global_batch_size, num_nodes * per_node
    if batch % world_size:
        near = max(round(batch / world_size), 1) * world_size
        yield (
            f"global batch {batch} is not divisible by {world_size} processes; set train.global_batch_size="
            f"{near}"
        )
    elif batch // world_size < config.train.accumulate:
        yield (
            f"train.accumulate={config.train.accumulate} leaves micro-steps without an image: each of "
            f"{world_size} processes has {batch // world_size} in a batch"
        )

    queue = config.swav.queue_length
    if config.objective.name == "swav" and queue % world_size:
        near = max(round(queue / world_size), 1) * world_size
        yield f"swav.queue_length {queue} is not divisible by {world_size} processes; set it to {near}"


def _cascade(config: Config) -> Iterator[str]:
    section = config.cascade
    if config.method == "cascade" and section.router == "kmeans" and len(section.clusters) > 1:
        yield "cascade.clusters has several numbers, among which only cascade.router=gmm can choose"


def _times(config: Config, cluster: str) -> Iterator[str]:
    launch, section = config.launch, config.checkpoint
    if cluster != "slurm":
        return
    if not section.every_steps and 0 < launch.hours * 60 <= section.every_minutes:
        yield (
            f"launch.hours={launch.hours:g} ends a start before the first checkpoint "
            f"(checkpoint.every_minutes={section.every_minutes:g}); save more often"
        )
    if launch.signal_seconds <= section.stop_seconds:
        yield (
            f"launch.signal_seconds={launch.signal_seconds} leaves less than checkpoint.stop_seconds="
            f"{section.stop_seconds:g} for saving; set it higher"
        )
    if launch.signal_seconds >= launch.hours * 3600:
        yield (
            f"launch.signal_seconds={launch.signal_seconds} is longer than launch.hours={launch.hours:g}: "
            f"the job would be told to stop at once"
        )


def _patches(config: Config) -> Iterator[str]:
    """Compare sizes with the patch that a backbone's name tells; the training process asks the backbone."""
    section = config.backbone
    named = re.search(r"patch(\d+)|ViT-[A-Za-z]+-(\d+)", section.name)
    tower = section.kwargs.get("vision_cfg")  # open_clip's own arguments lie one deeper
    given = (tower if isinstance(tower, dict) else section.kwargs).get("patch_size")
    patch = given if isinstance(given, int) else int(named[1] or named[2]) if named else 0
    size = section.image_size
    if patch and size is not None and size % patch:
        near = [n for n in (size // patch * patch, (size // patch + 1) * patch) if n]
        yield (
            f"backbone.image_size={size} is not a multiple of {patch}, the patch size of {section.name}; set "
            f"it to {' or '.join(map(str, near))}"
        )


def _here(config: Config) -> Iterator[str]:
    launch = config.launch
    gpus = len(visible_gpus()) if launch.gpus_per_node else 0
    wanted, processes = launch.gpus_per_node, launch.processes_per_node
    if wanted and (config.engine.device == "cpu" or gpus < wanted):
        use = "engine.device=cpu uses none" if config.engine.device == "cpu" else f"it has {gpus}"
        yield (
            f"launch.gpus_per_node={wanted} is asked for, and this is one machine, and {use}. Leave it out "
            f"(all GPUs here are used), or start from a login node of a cluster (--cluster slurm)"
        )
    elif wanted and processes not in (0, wanted):
        yield (
            f"launch.gpus_per_node={wanted} and launch.processes_per_node={processes}: here a process uses "
            f"one GPU; set launch.processes_per_node={wanted}"
        )
    port = config.launch.master_port
    if port is None:
        return
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            yield f"launch.master_port={port} cannot be used ({error.strerror}); unset, a free one is taken"


def _slurm(config: Config, num_nodes: int, is_dry: bool) -> Iterator[str]:
    launch = config.launch
    if shutil.which("sbatch") is None and not is_dry:
        yield "there is no sbatch on this machine; start from a login node of the cluster, or --cluster local"
        return
    if config.engine.device == "cuda" and launch.gpus_per_node is None:
        yield "engine.device=cuda and no GPU is asked for; set launch.gpus_per_node"
    partitions = {part.name: part for part in read_partitions()}
    if not partitions:
        return  # the cluster does not say; sbatch will
    default = next((part.name for part in partitions.values() if part.is_default), None)
    name = launch.partition or default
    if name is not None and name not in partitions:
        yield f"launch.partition={name} does not exist; there are {', '.join(sorted(partitions))}"
        return
    part = None if name is None else partitions[name]
    if part is not None and num_nodes > part.nodes:
        yield f"--nodes {num_nodes}: partition {name} has {part.nodes}"
    if part is None or config.engine.device == "cpu":
        return
    if part.gpus and launch.gpus_per_node is None:
        yield (
            f"partition {name} has {part.gpus} GPUs a node and launch.gpus_per_node=null asks for none; "
            f"leave it out, or set engine.device=cpu to mean it"
        )
    elif launch.gpus_per_node is not None and 0 < part.gpus < launch.gpus_per_node:
        yield f"launch.gpus_per_node={launch.gpus_per_node}: nodes of partition {name} have {part.gpus}"
