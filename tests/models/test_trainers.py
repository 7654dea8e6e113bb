"""The trainers of others, as docs/models.md has them: masks trained, kept in checkpoints, as good as ours."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from selfmask_dist import attach
from tests.models.test_docs_models import block

DIM, CLASSES, RATE = 32, 3, 150.0


def pictures(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise whose mean colour is the class."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % CLASSES
    images = torch.randn(number, 3, 16, 16, generator=draw)
    images[torch.arange(number), labels] += 0.12
    return images, labels


TRAIN, TEST = pictures(96, 1), pictures(60, 2)


def frozen() -> nn.Module:
    torch.manual_seed(3)
    small: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": DIM, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="avg", **small).eval()


def accuracy(forward: Any) -> float:
    with torch.inference_mode():
        return float((forward(TEST[0]).argmax(1) == TEST[1]).float().mean())


def own_loop() -> float:
    torch.manual_seed(0)
    backbone, head = frozen(), nn.Linear(DIM, CLASSES)
    masks = attach(backbone, include="vit")
    groups = [{"params": masks.parameters(), "lr": RATE}, {"params": head.parameters(), "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    masks.bind(optimizer)
    for _ in range(4):
        for rows in torch.randperm(96).split(16):
            loss = nn.functional.cross_entropy(head(backbone(TRAIN[0][rows])), TRAIN[1][rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return accuracy(lambda images: head(backbone(images)))


def rows(part: tuple[Tensor, Tensor]) -> list[dict[str, Tensor]]:
    return [{"pixel_values": image, "labels": label} for image, label in zip(*part, strict=True)]


@pytest.mark.filterwarnings("ignore")
def test_hugging_faces_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("peft", "transformers", "accelerate"):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    code = block("In Hugging Face's Trainer", "python")
    assert len(code.splitlines()) <= 40
    backbone = frozen()
    before = copy.deepcopy(backbone.state_dict())
    names: dict[str, Any] = {
        "frozen": backbone,
        "dim": DIM,
        "classes": CLASSES,
        "rate": RATE,
        "train": rows(TRAIN),
        "test": rows(TEST),
    }
    exec(code, names)
    model = names["model"].eval()
    found = accuracy(lambda images: model(images)["logits"])
    assert found > 0.6, "a third is chance"
    assert abs(found - own_loop()) < 0.25, "three standard errors of sixty pictures"
    assert any((scores <= 0).any() for scores in names["scores"]), "bits flipped"
    unloaded = model.backbone.unload().state_dict()
    assert all(torch.equal(unloaded[name], value) for name, value in before.items())


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    names: dict[str, Any] = {}
    exec(block("In Lightning", "python"), names)
    torch.manual_seed(0)
    module = names["Adapted"](frozen(), DIM, CLASSES, RATE)
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    batches = DataLoader(TensorDataset(*TRAIN), batch_size=16, shuffle=True)
    trainer = lightning.Trainer(max_epochs=4, **options)
    trainer.fit(module, batches)
    found = accuracy(lambda images: module.head(module.backbone(images)))
    assert found > 0.6
    assert abs(found - own_loop()) < 0.25
    scores = {name: tensor.clone() for name, tensor in module.masks.state_dict().items() if "." in name}
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = names["Adapted"](frozen(), DIM, CLASSES, RATE)
    lightning.Trainer(max_epochs=4, **options).fit(again, batches, ckpt_path=tmp_path / "last.ckpt")
    for name, tensor in again.masks.state_dict().items():
        if name in scores:
            assert torch.equal(tensor, scores[name]), name
    images = TEST[0]
    assert torch.equal(again.backbone.eval()(images), module.backbone.eval()(images))
