"""A mask trained here, in a process that has timm or open_clip and `apply_masks`: the same embeddings."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from selfmask_dist import attach
from tests.support.tiny_run import child_environment

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "patch_size": 4, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
LIBRARIES = '''
import open_clip, timm, torch

def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=0
    )

def resnet():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=0)

def clip():
    """The whole model: the masks are of its image tower."""
    torch.manual_seed(0)
    open_clip.add_model_config("tiny_clip.json")
    return open_clip.create_model("tiny_clip")

def embed(model):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model.eval()
    with torch.no_grad():
        if hasattr(model, "encode_image"):
            return model.encode_image(images[..., :16, :16])
        return model(images if hasattr(model, "layer1") else images[..., :16, :16])

BUILD = {"vit": vit, "resnet": resnet, "clip": clip}
'''
APPLY = """
from libraries import BUILD, embed
from selfmask_dist import apply_masks

for name, build in BUILD.items():
    model = build()
    apply_masks(model, f"{name}.mask")
    torch.save(embed(model), f"{name}.pt")
"""


def train(encoder: nn.Module, name: str, folder: Path) -> None:
    """Three steps on random images, running statistics moving; leaves the trained theta in place."""
    masks = attach(encoder, include="resnet" if name == "resnet" else "vit", split_qkv=name == "clip")
    optimizer = torch.optim.SGD(masks.parameters(), lr=1e3, momentum=0.9)
    masks.bind(optimizer)
    encoder.train()
    side = 32 if name == "resnet" else 16
    for seed in range(3):
        images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(seed))
        encoder(images)[:, ::2].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    bits = masks.masks().values()
    assert sum(int((~mask).sum()) for mask in bits) > 0.01 * sum(mask.numel() for mask in bits)
    masks.save(folder / f"{name}.mask")


def test_masks_apply_with_the_libraries_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny_clip.json").write_text(json.dumps(CLIP))
    (tmp_path / "libraries.py").write_text(LIBRARIES)
    here = runpy.run_path(str(tmp_path / "libraries.py"))
    expected = {}
    for name, build in here["BUILD"].items():
        model = build()
        frozen = here["embed"](model)
        train(model.visual if name == "clip" else model, name, tmp_path)
        expected[name] = here["embed"](model)
        assert not torch.equal(expected[name], frozen), name
    script = f"import torch\n{APPLY}"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, embeddings in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), embeddings), name
