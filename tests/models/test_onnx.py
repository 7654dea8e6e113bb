"""Whole models as ONNX: what onnxruntime computes is what PyTorch does, for any number of pictures."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import selfmask_dist
from selfmask_dist.cli import main
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.maskfile import Head
from selfmask_dist.models.onnx import export_onnx
from selfmask_dist.models.pictures import PictureTransform
from selfmask_dist.models.whole import CascadeEncoder, Loaded, WholeModel
from tests.support.half_masks import mask_half

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: selfmask_dist[export]")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: selfmask_dist[export]")
SIZE = 32


def vit() -> nn.Module:
    options: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": SIZE}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)


def clip_tower() -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": SIZE}
    config = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=config)
    return model.visual


MODELS: dict[str, Any] = {
    "vit": vit,
    "resnet": lambda: timm.create_model("resnet18", num_classes=0, channels=(8, 8, 8, 16), stem_width=8),
    "clip": clip_tower,
}


def whole(encoder: nn.Module, *, head: bool = True) -> Loaded:
    encoder = encoder.eval()
    with torch.inference_mode():
        dim = encoder(torch.zeros(1, 3, SIZE, SIZE)).shape[1]
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(5, *shape, generator=generator) for shape in ((dim,), ()))
    linear = Head("linear", weight, bias) if head else None
    preprocessing = Preprocessing(SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    classes = ("a", "b", "ä", "d", "e") if head else ()
    place = torch.device("cpu")
    return Loaded(WholeModel(encoder, linear), PictureTransform(preprocessing), classes, place, "x")


def outputs(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.parametrize("kind", MODELS)
def test_a_hundred_pictures_give_what_pytorch_gives(kind: str, tmp_path: Path) -> None:
    encoder = MODELS[kind]()
    masks = mask_half(encoder)
    masks.detach(restore=False)
    loaded = whole(encoder)
    images = torch.randn(100, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    made = export_onnx(loaded, tmp_path / "deep" / "m.onnx")
    expected = loaded(images)
    assert expected.std() > 0.1
    scale = max(expected.abs().max().item(), 1.0)
    for batch in (images, images[:1], images[40:57]):
        found = outputs(made.path, batch)
        assert (found - loaded(batch)).abs().max() <= 1e-4 * scale
    assert torch.equal(outputs(made.path, images).argmax(1), expected.argmax(1))
    assert made.difference < 1e-4
    assert made.size == made.path.stat().st_size
    assert [path.name for path in made.path.parent.iterdir()] == ["m.onnx"]


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    made = export_onnx(whole(vit()), tmp_path / "m.onnx", opset=18)
    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == ["a", "b", "ä", "d", "e"]
    assert Preprocessing.from_dict(json.loads(about["preprocessing"])).image_size == SIZE
    assert [put.name for put in session.get_outputs()] == ["logits"]
    assert session.get_inputs()[0].shape[1:] == [3, SIZE, SIZE]
    assert made.opset == 18
    bare = export_onnx(whole(vit(), head=False), tmp_path / "bare.onnx")
    session = onnxruntime.InferenceSession(str(bare.path), providers=["CPUExecutionProvider"])
    assert [put.name for put in session.get_outputs()] == ["embeddings"]


def test_units_that_are_off_can_be_left_out(tmp_path: Path) -> None:
    encoder = vit()
    with torch.no_grad():
        for block in encoder.blocks:  # type: ignore[union-attr]
            block.mlp.fc2.weight[:, 40:] = 0
    loaded = whole(encoder)
    large, small = (export_onnx(loaded, tmp_path / f"{s}.onnx", smaller=s) for s in (False, True))
    assert large.size - small.size > 40_000, "88 units of 65 numbers in each of two blocks"
    images = torch.randn(4, 3, SIZE, SIZE)
    torch.testing.assert_close(outputs(small.path, images), loaded(images), rtol=1e-4, atol=1e-4)
    blocks: Any = loaded.model.encoder.blocks
    assert blocks[0].mlp.fc1.out_features == 128, "the model itself stays"


def test_what_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_bytes(b"an earlier one")
    with pytest.raises(ValueError, match="other numbers than PyTorch"):
        export_onnx(whole(vit()), tmp_path / "m.onnx", tolerance=-1.0)

    class Changing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            features = images.flatten(1)[:, :4]
            return features if float(images.sum()) > 0 else -features  # no graph can say this

    with pytest.raises(ValueError, match="cannot be written as ONNX by torch"):
        export_onnx(whole(Changing(), head=False), tmp_path / "m.onnx")
    cascade = CascadeEncoder.__new__(CascadeEncoder)
    nn.Module.__init__(cascade)
    loaded = whole(vit())
    loaded.model.encoder = cascade
    with pytest.raises(ValueError, match=r"is a cascade.*name one of its masks"):
        export_onnx(loaded, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == b"an earlier one"
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_run_becomes_a_file_by_one_command(
    linear_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "trees.onnx"
    assert main(["onnx", str(linear_run), str(out)]) == 0
    said = capsys.readouterr().out
    assert f"{out}: " in said
    assert "opset 20" in said
    loaded = selfmask_dist.load(linear_run)
    size = loaded.transform.preprocessing.image_size
    images = torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(outputs(out, images), loaded(images), rtol=1e-4, atol=1e-4)
