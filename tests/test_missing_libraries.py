"""Masks are learned, applied and used where libraries that only some commands need are not installed.

What does need one says which command installs it. One process hides all of them at once, and so shows it for
each: importing torch takes seconds.
"""

import json
import subprocess
import sys
import time

import pytest

from tests.support.tiny_run import child_environment, write_config, write_tiny_data

# the import names of what neither a loop of one's own nor a run under ddp on a timm model needs
HIDDEN = (
    *("deepspeed", "wandb", "submitit", "open_clip", "webdataset", "einops"),
    *(
        "transformers",
        "matplotlib",
        "jinja2",
        "peft",
        "fsspec",
        "starlette",
        "uvicorn",
        "cv2",
        "simplejpeg",
        "isal",
        "tifffile",
    ),
)
HIDE = f"""
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
"""
USE = """
import json, traceback
from pathlib import Path

config = sys.argv[1]
results = {}

def step(fn):
    try:
        results[fn.__name__] = fn() or "works"
    except BaseException as error:
        results[fn.__name__] = f"{type(error).__name__}: {error}"
        traceback.print_exc()

def attach_and_apply():
    import timm, torch
    from selfmask_dist import apply_masks, attach
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    masks = attach(model)
    optimizer = torch.optim.SGD(masks.parameters(), lr=1e3)
    masks.bind(optimizer)
    model(torch.ones(2, 3, 32, 32))[:, ::2].sum().backward()
    optimizer.step()
    masks.save("loop.mask")
    fresh = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    fresh.load_state_dict(state)
    apply_masks(fresh, "loop.mask")
    assert torch.equal(fresh(torch.ones(2, 3, 32, 32)), model(torch.ones(2, 3, 32, 32)))

def run_under_ddp():
    from selfmask_dist.cli import main
    assert main(["train", "--config", config]) == 0
    assert Path("run/final.mask").stat().st_size

def embed():
    from selfmask_dist.cli import main
    pictures = sorted(map(str, Path("data/images/test/red").glob("*.png")))
    command = ["embed", "--config", config, "--masks", "run/final.mask", "--out", "embeddings.safetensors"]
    assert main([*command, *pictures]) == 0

def told(*overrides):
    from selfmask_dist.cli.train import run
    from selfmask_dist.config import load_config
    try:
        run(load_config(config, ["run.name=other", "run.overwrite=true", *overrides]))
    except ValueError as error:
        return str(error)
    raise AssertionError("it ran")

def deepspeed():
    return told("engine.name=deepspeed")

def wandb():
    return told("run.wandb=offline")

def open_clip():
    return told("backbone={name: open_clip:ViT-B-32, pretrained: false}", "backbone.kwargs={}")

def transformers():
    return told("backbone={name: hf:google/vit, pretrained: false}", "backbone.kwargs={}")

def submitit():
    from selfmask_dist.config import load_config
    from launchers.slurm import batch_scripts
    try:
        batch_scripts(load_config(config), num_nodes=1)
    except ValueError as error:
        return str(error)

for fn in (attach_and_apply, run_under_ddp, embed, deepspeed, wandb, open_clip, transformers, submitit):
    step(fn)
Path("results.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hidden")
    data = write_tiny_data(folder / "data", train=24)
    config = write_config(folder / "tiny.yaml", data, train={"epochs": 1})
    done = subprocess.run(
        [sys.executable, "-c", HIDE + USE, str(config)],
        cwd=folder,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    found: dict[str, str] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize("what", ["attach_and_apply", "run_under_ddp", "embed"])
def test_it_works_without_them(what: str, results: dict[str, str]) -> None:
    assert results[what] == "works"


@pytest.mark.parametrize(
    ("library", "needed_by", "package"),
    [
        ("deepspeed", "engine.name=deepspeed", "deepspeed"),
        ("wandb", "run.wandb=offline", "wandb"),
        ("open_clip", "backbone.name=open_clip:ViT-B-32", "open_clip_torch"),
        ("transformers", "backbone.name=hf:google/vit", "transformers"),
        ("submitit", "--cluster slurm", "submitit"),
    ],
)
def test_a_missing_one_is_named_with_the_command_that_installs_it(
    library: str, needed_by: str, package: str, results: dict[str, str]
) -> None:
    said = results[library]
    assert said.startswith(f"{needed_by} needs {library}, which is not installed; bring it in with `")
    assert " pip install " in said
    assert said.endswith(f" {package}`")


def test_importing_the_package_loads_nothing_and_takes_no_time() -> None:
    code = (
        "import sys, time; before = set(sys.modules); start = time.perf_counter(); import selfmask_dist; "
        "print(time.perf_counter() - start, *{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    seconds = []
    for _ in range(3):  # the first one may compile; the machine may be busy
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        taken, *modules = done.stdout.split()
        seconds.append(float(taken))
        assert not {"torch", "numpy", "pydantic", *HIDDEN} & set(modules)
    assert min(seconds) < 0.3


def test_help_takes_no_time() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "selfmask_dist.cli", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2, "0.2 s on an idle machine; torch alone takes 2"
