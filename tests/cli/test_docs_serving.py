"""Every line of docs/serving.md that can be run is run, in a folder that has what it names."""

import argparse
import glob
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from selfmask_dist import cli
from selfmask_dist.backbones import fingerprint
from selfmask_dist.cli import serve as serve_command
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.maskfile import Mask, MaskFile, read_mask_file, write_mask_file
from selfmask_dist.runs import exit_status
from selfmask_dist.training.build import build_backbone
from tests.maskfile.test_bank import images, random_masks, write_cascade
from tests.support.tiny_run import child_environment, write_config, write_tiny_data

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def block(title: str, language: str) -> str:
    """The one block of code in a section."""
    section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    (found,) = re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)
    return str(found)


def commands(title: str) -> list[str]:
    """Its lines, without what they say behind a #."""
    return [line.split("  #")[0].strip() for line in block(title, "bash").splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """runs/photos, runs/again and runs/cascade, mask files of their backbone, pictures and scores."""
    folder = tmp_path_factory.mktemp("serving")
    data = write_tiny_data(folder / "data")
    first = load_config(write_config(folder / "data" / "first.yaml", data))
    encoder = build_backbone(first).encoder
    torch.save(encoder.state_dict(), folder / "data" / "weights.pt")
    for seed, name in enumerate(("photos", "again")):
        config = write_config(folder / "runs" / f"{name}.yaml", data)
        weights = f"backbone.weights={folder / 'data' / 'weights.pt'}"
        run(load_config(config, [weights, f"run.name={name}", f"seed={seed}", "optim.score_lr=2000"]))
    shutil.copytree(folder / "runs" / "photos", folder / "runs" / "blocks")
    bits = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in encoder.named_parameters()}
    bits = {name: kept for name, kept in bits.items() if "mlp.fc" in name}
    for name in ("weight", "bias"):
        bits[f"blocks.0.mlp.fc1.{name}"][:5] = False
    dead_units = Mask(bits, fingerprint((name, encoder.get_parameter(name)) for name in bits))
    write_mask_file(folder / "runs" / "blocks" / "final.mask", MaskFile({"default": dead_units}))
    masks = list(random_masks(encoder, "vit").values())
    for number, name in enumerate(("pets", "birds", "seed-0", "seed-1", "seed-2")):
        write_mask_file(folder / f"{name}.mask", MaskFile({"default": masks[number % 3]}))
    (folder / "runs" / "cascade").mkdir()
    write_cascade(encoder, "vit", folder / "runs" / "cascade")
    for name in ("photo", "other"):
        pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.jpg")
    scores = {
        f"{name.removesuffix('weight')}mask_real": torch.randn_like(value)
        for name, value in encoder.named_parameters()
        if "attn" in name and value.ndim == 2
    }
    torch.save(scores, folder / "scores.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def encoder_of(place: Path) -> Any:
    return build_backbone(load_config(place / "runs" / "photos" / "config.yaml")).encoder


def test_python(place: Path) -> None:
    names: dict[str, Any] = {"encoder": encoder_of(place), "images": images(4)}
    exec(block("In Python", "python"), names)
    assert names["bank"].names == ["pets", "birds", "fungi/dispatcher", "fungi/expert-0", "fungi/expert-1"]
    embeddings = names["cascade"].embed(images(4), mode="conditional")
    assert embeddings.shape[0] == 4


def test_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = commands("On the command line")
    assert len(lines) >= 8
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "selfmask", line
        arguments = [
            path for word in words for path in (sorted(glob.glob(word)) or [word])
        ]  # as a shell does
        assert cli.main(arguments) in (0, None), f"{line}\n{capsys.readouterr().err}"
    assert {*np.load("embeddings.npz")} == {"photos", "birds"}
    assert np.load("embeddings.npz")["birds"].shape == (2, 32)
    assert list(read_mask_file("between.mask").masks) == ["0", "0.25", "0.5", "0.75", "1"]
    assert sorted(path.name for path in Path("hub").iterdir()) == sorted(
        ["README.md", "config.json", "model.safetensors", "photos.mask", "sparsity.png"]
    )
    sizes = json.loads(Path("smaller/sizes.json").read_text())
    assert 123 in sizes.values(), "five hidden units of 128 are gone"
    assert read_mask_file("imported.mask").masks["default"].threshold == 5e-3


def test_which_backbone_without_a_configuration(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        ([], "which backbone? give masks with --masks"),
        (["--masks", "pets.mask"], "pets.mask does not name its backbone"),
        (["--masks", "none.mask"], "none.mask"),
        (["--masks", "photo.jpg"], "photo.jpg"),
    ):
        assert cli.main(["embed", "photo.jpg", "--out", "x.npz", *words]) == exit_status.BAD_INPUT
        assert reason in capsys.readouterr().err
    mask = read_mask_file("pets.mask").masks["default"]
    write_mask_file("named.mask", MaskFile({"default": mask}, backbone="timm:resnet50"))
    config = serve_command._config(argparse.Namespace(config=None, masks=[Path("named.mask")]))
    assert (config.backbone.name, config.backbone.pretrained) == ("timm:resnet50", True)


def test_http(place: Path) -> None:
    install, serve, ask = commands("Over HTTP")
    assert install == "pip install -e '.[serve]'"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = shlex.split(serve.replace("8000", port))
    command = [sys.executable, "-m", "selfmask_dist.cli", *words[1:]]
    process = subprocess.Popen(command, env=child_environment())
    try:
        url, deadline = f"http://localhost:{port}", time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{url}/health").status_code == 200
                break
            except httpx.TransportError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        option, file, address = re.fullmatch(r"curl (\S+) @(\S+) '(\S+)'", ask).groups()  # type: ignore[union-attr]
        assert option == "--data-binary"
        answer = httpx.post(f"http://{address.replace('8000', port)}", content=Path(file).read_bytes())
        assert answer.json()["mask"] == "pets", answer.text
        assert len(answer.json()["embedding"]) == 32
        assert httpx.get(f"{url}/masks").json() == {"masks": ["pets", "birds"]}
        routes = re.findall(r"\| `(?:GET|POST) (/\w+)", TEXT)
        assert routes == ["/embed", "/predict", "/masks", "/health", "/openapi", "/metrics"]
        assert "selfmask_pictures_total 1" in httpx.get(f"{url}/metrics").text
    finally:
        process.terminate()
        process.wait(timeout=30)
