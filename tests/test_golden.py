"""Golden runs: tiny trainings give the masks, losses and files that tests/golden.json holds, bit by bit.

Only what outlives a reorganisation is used: the command line, configuration keys, the public API, and the
files of a run's folder. Other processors and versions round otherwise, so golden.json has a fingerprint of
some reference computations too. Where this machine's is the same, every bit must be equal; where it is not,
losses and shares of kept weights must be close, and the test says that it compared no more than that.

    python -m tests.test_golden --write     # make golden.json anew

Changing a value in golden.json needs a sentence in docs/decisions.md that says why.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from selfmask_dist import apply_masks
from selfmask_dist.cli import main
from selfmask_dist.maskfile import drop_models
from selfmask_dist.runs.checkpoint import read_checkpoint
from tests.support.distributed import run_distributed

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).with_name("golden.json")
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "opencv-python-headless")
LOSS_TOLERANCE, KEPT_TOLERANCE = 1e-3, 0.01  # on other machines: relative, and of all masked weights

COMMON = (
    "backbone.image_size=16 backbone.crop_pct=1.0 train.epochs=2 train.global_batch_size=12 "
    "optim.score_lr=50 optim.weight_lr=0.01 eval.knn_k=[5] eval.knn_every=0 eval.final=false "
    "eval.frozen_baseline=false eval.probe=false engine.device=cpu engine.workers=0 engine.threads=1 "
    "run.progress=false run.log_every=1"
)
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}),
    "resnet": ("resnet18", {"channels": [8, 8, 8, 16], "stem_width": 8}),
}
VIEWS = "crops.global_scale=[0.4,1.0] crops.local_size=8"
TWO_VIEWS = f"{VIEWS} crops.local_count=0"
SWAV = (
    f"objective.name=swav {VIEWS} crops.local_count=1 swav.prototypes=8 swav.dim=8 swav.queue_length=12 "
    "optim.score_lr=20"
)
MOVING = "mask.keep_schedule=cubic mask.keep_from=0.1 mask.keep_until=0.7"
RANKED = "mask.init=kaiming_uniform mask.scale=detached"
BIASES = "mask.exclude=['*.bias']"

# name: backbone, settings; each of one process
CASES = {
    "threshold": ("vit", "eval.final=true eval.frozen_baseline=true eval.probe=true eval.knn_every=1"),
    "threshold_resnet": ("resnet", "mask.init=magnitude mask.maskable=0.5 optim.warmup_epochs=0.5"),
    "threshold_normal": ("vit", "mask.init=normal mask.split_qkv=true optim.clip_norm=0.5 seed=3"),
    "masked_head": ("vit", "objective.head=masked optim.kind=adamw optim.score_lr=0.3"),
    "piggyback": ("resnet", "mask.threshold=0.005 mask.init=0.01 mask.scale=none optim.score_lr=0.25"),
    "edge_popup": ("resnet", f"{RANKED} mask.keep_scope=global optim.score_lr=1"),
    "edge_popup_random": ("", f"{RANKED} mask.keep=0.3 backbone.random=signed_constant"),
    "topk": ("vit", "mask.init=magnitude mask.scale=detached mask.keep_schedule=linear"),
    "random": ("vit", "mask.scale=detached"),
    "magnitude": ("resnet", "mask.scale=none"),
    "neural_wirings": ("vit", f"{BIASES} train.accumulate=2"),
    "movement": ("vit", f"{BIASES} {MOVING} mask.keep=0.3 mask.init=0 optim.score_lr=10"),
    "soft_movement": (
        "vit",
        f"{BIASES} {MOVING} mask.threshold=0.5 mask.penalty=100 mask.init=0 optim.score_lr=10",
    ),
    "block_movement": ("vit", f"{BIASES} {MOVING} mask.block_rows=8 mask.block_columns=8 optim.score_lr=1"),
    "joint": ("vit", BIASES),
    "multi_prize": ("vit", f"{BIASES} mask.keep=0.8 mask.init=kaiming_uniform mask.split_qkv=true"),
    "binary_connect": ("vit", f"{BIASES} mask.scale=detached"),
    "twn": ("vit", BIASES),
    "ttq": ("vit", f"{BIASES} optim.weight_lr=0.1"),
    "finetune": ("vit", "method=finetune optim.weight_lr=0.05"),
    "graft": ("vit", f"{BIASES} mask.graft_from={{folder}}/finetune optim.score_lr=500"),
    "lora": ("vit", "method=finetune finetune.train=lora"),
    "swav": ("vit", SWAV),
    "simclr": ("vit", f"objective.name=simclr {TWO_VIEWS} simclr.dim=8 simclr.hidden=16"),
    "moco_v2": ("resnet", f"objective.name=moco_v2 {TWO_VIEWS} moco_v2.dim=8 moco_v2.queue_length=24"),
    "moco_v3": ("vit", f"objective.name=moco_v3 {TWO_VIEWS} moco_v3.dim=8 moco_v3.hidden=16"),
    "dino": ("vit", f"objective.name=dino {VIEWS} crops.local_count=1 dino.outputs=16 dino.hidden=16"),
    "nbd": (
        "resnet",
        "objective.name=nbd nbd.dim=8 nbd.neighbours=3 nbd.warmup_steps=5 nbd.warmup_batch=16 "
        "nbd.renew_every=1 optim.score_lr=0.1",
    ),
    "cascade": (
        "vit",
        f"method=cascade {SWAV} cascade.clusters=[2] cascade.components=4 cascade.restarts=2",
    ),
}
FAMILIES = dict.fromkeys(("threshold_resnet", "threshold_normal", "masked_head"), "threshold") | {
    "edge_popup_random": "edge_popup"
}
# the same of two processes
PAIRS = {
    "ddp": ("vit", ""),
    "fsdp": ("vit", "engine.name=fsdp"),
    "bits": ("vit", "engine.name=bits"),
    "fsdp_topk": ("resnet", f"engine.name=fsdp mask.family=topk {RANKED} backbone.batchnorm=sync"),
}
DEEPSPEED = {f"deepspeed_{n}": ("vit", f"engine.name=deepspeed engine.zero_stage={n}") for n in (2, 3)}
NEEDS = {"graft": "finetune"}
SLOW = ("lora",)  # peft takes seconds to import
ALL = CASES | PAIRS | DEEPSPEED
BUNDLED: dict[str, tuple[str | None, ...]] = {  # masks in a file
    "final.mask": (None,),
    "cascade.mask": ("dispatcher", "expert-0", "expert-1"),
}


def write_inputs(folder: Path) -> None:
    """Tars of very noisy pictures of three greys, and weights of the backbones, the same everywhere."""
    rng = np.random.default_rng(0)
    colours = np.array([(140, 120, 110), (110, 140, 120), (120, 110, 140)])
    for split, number in (("train", 48), ("test", 12)):
        (folder / split).mkdir()
        with tarfile.open(folder / split / "0.tar", "w") as tar:
            for index in range(number):
                pixels = np.clip(colours[index % 3] + rng.integers(-110, 111, (16, 16, 3)), 0, 255)
                buffer = io.BytesIO()
                Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
                for ending, data in (("cls", str(index % 3).encode()), ("png", buffer.getvalue())):
                    info = tarfile.TarInfo(f"{index:03d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    for name in BACKBONES:
        weights = make_backbone(name).state_dict()
        for key, value in weights.items():
            if value.is_floating_point() and "running" not in key:
                noise = torch.from_numpy(rng.integers(-1000, 1001, tuple(value.shape)) / 1000).float()
                # by fan-in; gains near 1, biases near 0
                mean = float(value.ndim == 1 and key.endswith("weight"))
                weights[key] = mean + noise / (value[0].numel() ** 0.5 if value.ndim > 1 else 10)
        save_file(weights, folder / f"{name}.safetensors")


def make_backbone(name: str) -> torch.nn.Module:
    model, options = BACKBONES[name]
    return timm.create_model(model, num_classes=0, **options | ({"img_size": 16} if name == "vit" else {}))


def arguments_of(name: str, backbone: str, keys: str, folder: Path) -> list[str]:
    """The command line of a case; its run goes into `folder`, which holds the inputs."""
    model, options = BACKBONES[backbone or "resnet"]
    weights = f"backbone.weights={folder / backbone}.safetensors" if backbone else "backbone.pretrained=false"
    common = f"{COMMON} {weights} backbone.name=timm:{model} run.dir={folder} run.name={name}".split()
    common += [f"data.train={folder}/train", f"data.test={folder}/test"]
    common.append(f"backbone.kwargs={json.dumps(options)}")
    if name in CASES and "objective.name" not in keys and "method=" not in keys:
        common.append(f"mask.family={FAMILIES.get(name, name)}")
    return ["train", *common, *keys.format(folder=folder).split()]


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def trained(checkpoint: Path) -> str:
    """A hash of all tensors of a checkpoint, scores and momentum among them, whatever their names are.

    A mask shows only on which side of its threshold a score is: errors in scores that flip no bit show here.
    """
    state = read_checkpoint(checkpoint).tensors
    assert state
    return digest(*sorted(hashlib.sha256(tensor.numpy().tobytes()).digest() for tensor in state.values()))


def file_digest(path: Path) -> str:
    """A hash of a file; of a mask file, as it is without the head that a supervised run adds to it.

    Without its head it is, bit for bit, the file that was written before heads were (docs/mask_format.md).
    """
    if path.suffix != ".mask":
        return digest(path.read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        alone = Path(shutil.copy(path, folder))
        drop_models(alone)
        return digest(alone.read_bytes())


def record(run: Path, backbone: str) -> dict[str, Any]:
    """All that must stay: losses, the result, hashes of files, of the backbone under each mask, of scores."""
    losses = {}
    for path in sorted(run.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        losses[str(path.relative_to(run))] = [line["loss"] for line in lines if "loss" in line]
    paths = [path for path in sorted(run.rglob("*")) if path.suffix in (".mask", ".safetensors", ".npy")]
    paths = [path for path in paths if not {"embeddings", "checkpoints"} & set(path.parts)]
    under = {}
    for path in paths if backbone else ():
        for name in BUNDLED.get(path.name, ()):
            model = make_backbone(backbone)
            model.load_state_dict(load_file(run.parent / f"{backbone}.safetensors"))
            apply_masks(model, path, name=name)
            tensors = [value.numpy().tobytes() for _, value in sorted(model.state_dict().items())]
            under[f"{path.relative_to(run)}:{name or ''}"] = digest(*tensors)
    result = json.loads((run / "result.json").read_text())
    result.pop("verdict")  # sentences about the numbers
    return {
        "losses": losses,
        "result": result,
        "files": {str(path.relative_to(run)): file_digest(path) for path in paths},
        "weights_under_mask": under,
        "trained": {str(path.relative_to(run)): trained(path) for path in sorted(run.rglob("step-*"))},
    }


def numerics() -> dict[str, str]:
    """What rounding depends on: versions of packages, and the bits of some computations."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    images, weight = torch.randn(12, 3, 16, 16, generator=draw), torch.randn(8, 3, 3, 3, generator=draw)
    images.requires_grad_()
    maps = F.conv2d(images, weight, stride=2)
    rows = maps.flatten(1)[:, :128].reshape(12, 4, 32)
    attended = F.scaled_dot_product_attention(rows, rows, rows)
    normed = F.gelu(F.layer_norm(attended @ torch.randn(32, 96, generator=draw), (96,)))
    small = F.interpolate(images, size=8, mode="bicubic", antialias=True)
    chances = F.softmax(normed.flatten(1) @ torch.randn(384, 3, generator=draw), dim=1)
    loss = (
        chances.clamp_min(1e-6).log().mean()
        + small.exp().mean()
        + F.batch_norm(maps, None, None, training=True).std()
    )
    loss.backward()
    eigen = torch.linalg.eigh(torch.cov(rows.detach().flatten(0, 1).T.double()))
    assert images.grad is not None
    tensors = [loss, images.grad, maps, normed, small, chances, *eigen]
    torch.set_num_threads(threads)
    picture = Image.fromarray((images[0].detach() * 99).to(torch.uint8).permute(1, 2, 0).numpy())
    resized = picture.resize((11, 11), Image.Resampling.BICUBIC).tobytes()
    return {**found, "bits": digest(resized, *(tensor.detach().numpy().tobytes() for tensor in tensors))}


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {key: leaf for name in value for key, leaf in flatten(value[name], f"{path}/{name}").items()}


def check(name: str, found: dict[str, Any]) -> None:
    """Compare a run with golden.json: every bit, or what can be compared where rounding differs."""
    golden = json.loads(GOLDEN.read_text())
    expected, here = golden["cases"][name], numerics()
    if here == golden["numerics"]:
        old, new = flatten(expected), flatten(found)
        changed = {key: (old.get(key), new.get(key)) for key in old | new if old.get(key) != new.get(key)}
        assert not changed, f"{name} is no longer what {GOLDEN.name} says; was, is: {changed}"
        return
    print(f"{name}: only losses and shares are compared, as {here} is not {golden['numerics']}")
    assert list(found["files"]) == list(expected["files"])
    # one bit that flips otherwise changes all later steps, and one image's cluster what experts see
    early = {path: losses[: len(losses) // 2] for path, losses in expected["losses"].items()}
    early = {path: losses for path, losses in early.items() if losses and "expert" not in path}
    assert early
    for path, losses in early.items():
        assert len(found["losses"][path]) == len(expected["losses"][path])
        assert found["losses"][path][: len(losses)] == pytest.approx(losses, rel=LOSS_TOLERANCE)
    for key, share in ((key, share) for key, share in flatten(expected["result"]).items() if "active" in key):
        assert flatten(found["result"])[key] == pytest.approx(share, abs=KEPT_TOLERANCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("golden")
    write_inputs(path)
    return path


def run_here(name: str, folder: Path) -> dict[str, Any]:
    backbone, keys = CASES[name]
    if name in NEEDS and not (folder / NEEDS[name]).exists():
        run_here(NEEDS[name], folder)
    if not (folder / name).exists():
        assert main(arguments_of(name, backbone, keys, folder)) == 0
    return record(folder / name, backbone)


def child_environment(**more: str) -> dict[str, str]:
    """This process's, with ninja for DeepSpeed, and compiled modules kept: that saves seconds a process."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    cache = str(Path(tempfile.gettempdir()) / "selfmask-pycache")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    common = {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": cache, "PATH": path, "OMP_NUM_THREADS": "1"}
    return {**kept, **common, "GLOO_SOCKET_IFNAME": "lo", **more}


def run_pairs(names: Iterable[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Run cases with two processes, which take one case after the other, as importing torch takes longest."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [f"{name}:{one.getsockname()[1]}" for name, one in zip(names, sockets, strict=True)]
    common = child_environment(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    command = [sys.executable, "-m", "tests.test_golden", "--ranks", str(folder), *ports]
    ranks = []
    for number in ("0", "1"):
        with (folder / f"rank-{number}.log").open("w") as log:
            environment = {**common, "RANK": number, "LOCAL_RANK": number}
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    try:
        statuses = [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert statuses == [0, 0], (folder / "rank-0.log").read_text()[-3000:]
    return {name: record(folder / name, ALL[name][0]) for name in names}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]
)
def test_one_process(name: str, folder: Path) -> None:
    check(name, run_here(name, folder))


def run_in_turn(folder: Path) -> None:
    """A rank's part of all pairs; the processes meet once and stay together."""
    for name, (backbone, keys) in PAIRS.items():
        assert main(arguments_of(name, backbone, keys, folder)) == 0, name


@pytest.mark.distributed
def test_two_processes(folder: Path) -> None:
    run_distributed(run_in_turn, 2, folder, backend="", timeout=240.0)
    for name, (backbone, _) in PAIRS.items():
        check(name, record(folder / name, backbone))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed(name: str, folder: Path) -> None:
    """Each stage has processes of its own: DeepSpeed keeps the first process group it sees."""
    check(name, run_pairs([name], folder)[name])


@pytest.mark.distributed
@pytest.mark.slow
def test_the_launcher(folder: Path) -> None:
    """Two processes that launchers/submit.py starts give what two started by hand give."""
    _, *arguments = arguments_of("ddp", *PAIRS["ddp"], folder)
    command = [sys.executable, str(ROOT / "launchers" / "submit.py"), "--cluster=local", "--nodes=2"]
    subprocess.run(
        [*command, *arguments, "run.name=launched"], check=True, timeout=300, env=child_environment()
    )
    check("ddp", record(folder / "launched", "vit"))


def run_ranks(folder: Path, cases: list[str]) -> None:
    """This process's part of several runs, each with a port of its own to meet at."""
    for name, port in (case.split(":") for case in cases):
        os.environ["MASTER_PORT"] = port
        if status := main(arguments_of(name, *ALL[name], folder)):
            sys.exit(status)


def write() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_inputs(folder)
        cases = {name: run_here(name, folder) for name in CASES}
        cases |= run_pairs(PAIRS, folder)
        for name in DEEPSPEED:
            cases |= run_pairs([name], folder)
    GOLDEN.write_text(json.dumps({"numerics": numerics(), "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    elif sys.argv[1:2] == ["--ranks"]:
        run_ranks(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(__doc__)
