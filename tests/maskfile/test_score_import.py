"""Scores of Piggyback's code become masks: W * M of the same names, and nothing in a file is executed."""

import copy
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from selfmask_dist import apply_masks, cli
from selfmask_dist.backbones.weights import read_state_dict
from selfmask_dist.config import load_config, to_yaml
from selfmask_dist.maskfile import Mask, MaskFile, read_mask_file, write_mask_file
from selfmask_dist.maskfile.tools.score_import import import_scores
from selfmask_dist.runs import exit_status
from selfmask_dist.training.build import build_backbone
from tests.support.models import ConvNet, make

SETTINGS = ["backbone.name=timm:resnet18", "backbone.pretrained=false", "data.train=unused"]


class PiggybackConv(nn.Module):
    """As the published code has it: the weight is no parameter, so a state dict has the scores alone."""

    def __init__(self, conv: nn.Conv2d, scores: Tensor) -> None:
        super().__init__()
        self.weight, self.stride, self.padding = conv.weight.detach(), conv.stride, conv.padding
        self.mask_real = nn.Parameter(scores)

    def forward(self, images: Tensor) -> Tensor:
        mask = (self.mask_real > 5e-3).to(self.weight.dtype)
        return F.conv2d(images, mask * self.weight, None, self.stride, self.padding)


class Piggyback(nn.Module):
    """The backbone under `shared.`, a classifier beside it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.shared = copy.deepcopy(backbone)
        generator = torch.Generator().manual_seed(0)
        for name, module in list(self.shared.named_modules()):
            if isinstance(module, nn.Conv2d):
                scores = 0.01 + 0.01 * torch.randn(module.weight.shape, generator=generator)
                parent, _, attribute = name.rpartition(".")
                setattr(self.shared.get_submodule(parent), attribute, PiggybackConv(module, scores))
        self.classifier = nn.Linear(16, 3)


def embed(model: nn.Module) -> Tensor:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features: Tensor = model.eval()(images)
    return features


@pytest.mark.parametrize("kind", ["pt", "nested.pt", "safetensors"])
def test_the_mask_embeds_as_the_trained_model_did(kind: str, tmp_path: Path) -> None:
    backbone, _ = make("conv", dtype=torch.float32)
    trained = Piggyback(backbone)
    trained.shared.train()(torch.randn(4, 3, 8, 8))  # running statistics move
    state, path = trained.state_dict(), tmp_path / f"scores.{kind}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if kind == "pt" else {"epoch": 3, "model": state}, path)
    found = import_scores(read_scores(path), backbone)
    assert list(found.mask.bits) == ["conv1.weight", "conv2.weight", "downsample.0.weight"]
    assert sorted(found.left_out) == ["classifier.bias", "classifier.weight"]
    assert not found.mask.scaled
    assert found.mask.statistics
    write_mask_file(tmp_path / "file.mask", MaskFile({"default": found.mask}))
    masked = copy.deepcopy(backbone)
    apply_masks(masked, tmp_path / "file.mask")
    assert torch.equal(embed(masked), embed(trained.shared))
    assert not torch.equal(embed(masked), embed(backbone))


def test_what_does_not_fit_is_refused() -> None:
    backbone, _ = make("conv", dtype=torch.float32)
    state = Piggyback(backbone).state_dict()
    scores = {name: value for name, value in state.items() if name.endswith("mask_real")}
    for change, message in (
        (
            {"shared.conv1.mask_real": torch.zeros(8, 3, 5, 5)},
            r"has shape \(8, 3, 5, 5\), and conv1.weight of",
        ),
        ({"shared.conv1.mask_real": torch.full((8, 3, 3, 3), torch.nan)}, "not finite"),
        ({"shared.conv9.mask_real": torch.zeros(1)}, "no parameters for scores of shared.conv9.weight"),
        ({"shared.bn1.weight": torch.full((8,), 3.0)}, "bn1.weight of the file is not the backbone's"),
        ({"shared.conv2.weight": torch.zeros(16, 8, 3, 3)}, "conv2.weight of the file is not the backbone's"),
    ):
        with pytest.raises(ValueError, match=message):
            import_scores({**scores, **change}, backbone)
    with pytest.raises(ValueError, match=r"none is called \*\.mask_real, but a"):
        import_scores({"a": torch.zeros(1)}, backbone)
    kept = import_scores(
        {**scores, "shared.conv2.weight": ConvNet.get_parameter(backbone, "conv2.weight")}, backbone
    )
    assert len(kept.mask.bits) == 3, "the same frozen weights in the file are no mistake"


def read_scores(path: Path) -> dict[str, Tensor]:
    return read_state_dict(path, skip_others=True)


class Trap:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("trap",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="reading it would execute what is in it"):
        read_scores(tmp_path / "trap.pt")
    assert not (tmp_path / "trap").exists()
    (tmp_path / "noise.pt").write_bytes(b"\x80\x02nothing")
    (tmp_path / "noise.safetensors").write_bytes(b"nothing at all")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("noise.pt", "noise.safetensors", "empty.pt"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_scores(tmp_path / name)
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="holds a Tensor, not a state dict"):
        read_scores(tmp_path / "tensor.pt")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(None, SETTINGS)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    encoder = build_backbone(config).encoder
    scores = {
        f"shared.{name.removesuffix('weight')}mask_real": torch.randn(value.shape)
        for name, value in encoder.named_parameters()
        if value.ndim == 4
    }
    torch.save({**scores, "classifiers.0.weight": torch.zeros(3)}, tmp_path / "scores.pt")
    words = ["mask", "import", str(tmp_path / "scores.pt"), "-o", str(tmp_path / "file.mask")]
    assert cli.main(words) == exit_status.BAD_INPUT
    assert "give either --backbone NAME or --config" in capsys.readouterr().err
    assert cli.main([*words, "--config", str(tmp_path / "config.yaml"), "--threshold", "0.5"]) in (0, None)
    printed = capsys.readouterr().out
    assert "20 parameters, 30." in printed or "20 parameters, 31." in printed
    assert "left out, as the backbone has none of these names: classifiers.0.weight" in printed
    mask: Mask = read_mask_file(tmp_path / "file.mask").masks["default"]
    assert (mask.threshold, mask.scaled) == (0.5, False)
    assert torch.equal(mask.bits["conv1.weight"], scores["shared.conv1.mask_real"] > 0.5)
    apply_masks(encoder, tmp_path / "file.mask")
