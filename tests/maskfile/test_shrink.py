"""Networks cut to size compute what the whole ones did."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from selfmask_dist.backbones import fingerprint
from selfmask_dist.cli import main
from selfmask_dist.config import load_config, to_yaml
from selfmask_dist.maskfile import Mask, MaskFile, write_mask_file
from selfmask_dist.maskfile.tools.shrink import load_smaller, resize, save_smaller, shrink
from selfmask_dist.training.build import build_backbone
from tests.cli.test_mask_command import TINY
from tests.support.models import make


def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def pruned_vit() -> Any:
    """Head 0 of block 0 is fed and not read, head 1 of block 1 read and not fed; hidden units likewise."""
    model: Any = make("timm_vit")[0]
    with torch.no_grad():
        first, second = model.blocks
        first.attn.proj.weight[:, :12] = 0
        second.attn.qkv.weight[2 * 24 + 12 :] = 0  # its values' bias stays, and reaches the output
        first.mlp.fc1.weight[:30] = 0
        first.mlp.fc2.weight[:, 20:50] = 0
    return model.eval()


def test_a_vit_is_smaller_and_computes_the_same(tmp_path: Path) -> None:
    model = pruned_vit()
    before = model(images())
    num_weights = sum(p.numel() for p in model.parameters())
    left = shrink(model)
    assert left == {
        "blocks.0.attn": 1,
        "blocks.1.attn": 1,
        "blocks.0.mlp.fc1": 96 - 50,
        "blocks.1.mlp.fc1": 96,
    }
    assert model.blocks[0].attn.qkv.weight.shape == (3 * 12, 24)
    assert sum(p.numel() for p in model.parameters()) < 0.8 * num_weights
    torch.testing.assert_close(model(images()), before, rtol=1e-12, atol=1e-12)
    save_smaller(model, left, tmp_path)
    again, _ = make("timm_vit", seed=4)
    load_smaller(again, tmp_path)
    assert torch.equal(again.eval()(images()), model(images()))


def test_constants_move_into_the_next_bias() -> None:
    """Leaving them out would change the output: the test can fail."""
    model = pruned_vit()
    before = model(images())
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[:20] = 0
    assert (model(images()) - before).abs().max() > 1e-3


@pytest.mark.parametrize("act", [nn.ReLU, nn.Sigmoid])
@pytest.mark.parametrize("has_bias", [True, False])
def test_an_mlp_in_a_sequential(act: type[nn.Module], has_bias: bool) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Linear(6, 10), act(), nn.Dropout(0.5), nn.Linear(10, 8), nn.Linear(8, 3, bias=has_bias)
    )
    model.double().eval()
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[3].weight[:, 3:6] = 0
        model[3].weight[1] = 0
    x = torch.randn(5, 6, dtype=torch.float64)
    before = model(x)
    left = shrink(model)
    assert left["0"] == 4
    assert left["3"] == (7 if has_bias else 8)  # nowhere to move a constant to: it stays
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_a_layer_of_zeros_keeps_one_unit() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[2].weight.zero_()
    x = torch.randn(3, 4)
    before = model(x)
    assert shrink(model) == {"0": 1}
    assert torch.equal(model(x), before)


def test_what_cannot_be_cut_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    before = copy.deepcopy(model.state_dict())
    assert shrink(model) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_sizes_of_another_model_are_refused(tmp_path: Path) -> None:
    model = pruned_vit()
    with pytest.raises(ValueError, match="sizes are of another model"):
        resize(model, {"blocks.0.attn": 1})
    sizes = shrink(copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn has 2, and the sizes say 3"):
        resize(model, {**sizes, "blocks.0.attn": 3})
    (tmp_path / "sizes.json").write_text("[1]")
    with pytest.raises(ValueError, match="does not hold a size for each layer"):
        load_smaller(model, tmp_path)


def test_shrink_as_a_user_types_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(None, TINY)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    encoder = build_backbone(config).encoder
    name = "blocks.1.mlp.fc2.weight"
    bits = torch.ones_like(encoder.get_parameter(name), dtype=torch.bool)
    bits[:, :100] = False
    mask = Mask({name: bits}, fingerprint([(name, encoder.get_parameter(name))]), scaled=False)
    write_mask_file(tmp_path / "a.mask", MaskFile({"default": mask}))
    command = ["mask", "shrink", str(tmp_path / "a.mask"), str(tmp_path / "out")]
    assert main([*command, "--config", str(tmp_path / "config.yaml")]) == 0
    assert "blocks.1.mlp.fc1" in capsys.readouterr().out
    smaller: Any = build_backbone(config).encoder
    load_smaller(smaller, tmp_path / "out")
    assert smaller.blocks[1].mlp.fc1.out_features == 28
    with torch.no_grad():
        encoder.get_parameter(name).mul_(bits)
    pictures = images().float()
    torch.testing.assert_close(smaller.eval()(pictures), encoder.eval()(pictures), rtol=1e-5, atol=1e-5)
