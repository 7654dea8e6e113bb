"""Every command of docs/models.md is run, in a folder that has what it names."""

import csv
import io
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch

import selfmask_dist
from selfmask_dist.cli import main
from selfmask_dist.config import load_config
from selfmask_dist.training.build import build_backbone
from tests.models.cases import CLASSES, pictures_of, train
from tests.support.models import make
from tests.support.tiny_run import child_environment

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def block(title: str, language: str) -> str:
    """The one block of code in a section."""
    section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    (found,) = re.findall(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)
    return str(found)


@pytest.fixture
def place(
    linear_run: Path, hard_data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """runs/pets, photo.jpg, other.jpg and a folder of pictures."""
    shutil.copytree(linear_run, tmp_path / "runs" / "pets", ignore=shutil.ignore_patterns("checkpoints"))
    pictures = pictures_of(hard_data)
    for name, picture in zip(("photo.jpg", "other.jpg", "pictures/a.png"), pictures, strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(picture, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_load(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    exec(block("Load", "python"), names)
    assert names["classes"] == CLASSES
    assert names["logits"].shape == (1, 3)
    assert names["embeddings"].shape == (1, 32)
    assert capsys.readouterr().out.startswith("photo.jpg ('")


def test_with_peft(place: Path) -> None:
    pytest.importorskip("peft")  # the extra `lora`
    frozen, other = (make("timm_vit", dtype=torch.float32)[0].eval() for _ in range(2))
    names: dict = {"frozen": frozen, "other": other}
    exec(block("With peft", "python"), names)
    images = torch.zeros(1, 3, 16, 16)
    assert torch.equal(names["again"](images), names["dense"](images))


def test_masks_beside_a_lora() -> None:
    peft = pytest.importorskip("peft")
    from selfmask_dist import SelfMaskConfig

    frozen = make("timm_vit", dtype=torch.float32)[0].eval()
    names: dict = {"frozen": frozen, "targets": ["attn.qkv"], "peft": peft, "SelfMaskConfig": SelfMaskConfig}
    exec(block("Masks beside a LoRA", "python"), names)
    images = torch.zeros(1, 3, 16, 16)
    assert torch.equal(names["model"](images), make("timm_vit", dtype=torch.float32)[0].eval()(images))
    assert names["name"] == "pets"


def test_predict(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = block("Predict", "bash").splitlines()
    assert main(shlex.split(first)[1:]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["picture"] for row in rows] == ["photo.jpg"] * 3 + ["other.jpg"] * 3
    assert main(shlex.split(second)[1:]) == 0
    (found,) = json.loads(Path("classes.json").read_text())
    assert found["picture"] == "pictures/a.png"
    list_pictures, _, rest = third.partition(" | ")
    command, _, _ = rest.partition(" > ")
    listed = subprocess.run(shlex.split(list_pictures), capture_output=True, text=True, check=True)
    monkeypatch.setattr("sys.stdin", io.StringIO(listed.stdout))
    assert main(shlex.split(command)[1:]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["picture"], row["class"]) == ("pictures/a.png", found["top"][0]["class"])


def test_push_and_pull(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in block("Push and pull", "bash").splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    said = capsys.readouterr().out
    assert "us/pets\n" in said
    assert Path("pulled/model.mask").read_bytes() == Path("runs/pets/final.mask").read_bytes()
    assert said.splitlines()[-1].startswith("photo.jpg,1,")


def test_a_fine_tuned_network_as_a_mask(
    place: Path, hard_data: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(place / "runs", hard_data, "finetuned", "method=finetune", "optim.weight_lr=0.01")
    capsys.readouterr()
    for line in block("A fine-tuned network as a mask", "bash").splitlines():
        assert main(shlex.split(line)[1:]) == 0, line
    said = capsys.readouterr().out
    found = re.search(r"\(([\d.]+) bits a weight\)", said)
    assert found is not None
    assert float(found[1]) > 1, "and more, as the tiny network's biases weigh more than its matrices' bits"
    assert said.splitlines()[-1].startswith("photo.jpg,1,")
    tuned, rounded = (
        selfmask_dist.load(folder),
        selfmask_dist.load("finetuned.mask", config=folder / "config.yaml"),
    )
    images = torch.stack([tuned.transform(path) for path in pictures_of(hard_data)])
    frozen = build_backbone(load_config(folder / "config.yaml")).encoder(images)
    exact = tuned.model.embed(images)
    error = (rounded.model.embed(images) - exact).norm() / (frozen - exact).norm()
    assert error < 1, "it is nearer to the fine-tuned network than the frozen one is"


def test_serve(place: Path) -> None:
    serve, ask = block("Serve", "bash").splitlines()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "selfmask_dist.cli", *shlex.split(serve.replace("8000", port))[1:]]
    # the file alone says which backbone
    Path("runs/pets/config.yaml").unlink()
    process = subprocess.Popen(command, env=child_environment())
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                assert httpx.get(f"http://localhost:{port}/health").status_code == 200
                break
            except httpx.TransportError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        file, address = re.fullmatch(r"curl --data-binary @(\S+) '(\S+)'", ask).groups()  # type: ignore[union-attr]
        answer = httpx.post(
            f"http://{address.replace('8000', port)}", content=Path(file).read_bytes(), timeout=60
        )
        assert {one["class"] for one in answer.json()["top"]} == {*CLASSES}
        assert len(answer.json()["top"]) == 3, answer.text
        assert "drop" in httpx.get(f"http://localhost:{port}/").text
    finally:
        process.terminate()
        process.wait(timeout=30)
