"""`selfmask mask ...` as a user types it."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfmask_dist import apply_masks
from selfmask_dist.backbones import fingerprint
from selfmask_dist.cli import main
from selfmask_dist.config import load_config, to_yaml
from selfmask_dist.maskfile import Mask, MaskFile, read_mask_file, write_mask_file
from selfmask_dist.maskfile.tools.export import two_of_four
from selfmask_dist.runs import exit_status
from selfmask_dist.training.build import build_backbone

TINY = [
    "backbone.name=timm:vit_tiny_patch16_224",
    "backbone.pretrained=false",
    "backbone.image_size=16",
    "backbone.kwargs={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}",
    "data.train=unused",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """config.yaml of a tiny backbone, and a.mask, b.mask, both.mask of it."""
    path = tmp_path_factory.mktemp("masks")
    config = load_config(None, TINY)
    (path / "config.yaml").write_text(to_yaml(config))
    encoder = build_backbone(config).encoder
    weights = {name: value for name, value in encoder.named_parameters() if value.ndim == 2}
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name, share in (("a", 0.1), ("b", 0.9)):
        bits = {
            key: torch.rand(value.shape, generator=generator) > share * (value.abs() > value.abs().median())
            for key, value in weights.items()
        }
        masks[name] = Mask(bits, fingerprint(weights.items()))
        write_mask_file(path / f"{name}.mask", MaskFile({"default": masks[name]}, metrics={"knn20": 0.5}))
    write_mask_file(path / "both.mask", MaskFile(masks))
    return path


def run(*arguments: object) -> int:
    return main(["mask", *map(str, arguments)])


def test_diff_counts_what_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("diff", folder / "a.mask", f"{folder / 'both.mask'}:b") == 0
    first, second = (read_mask_file(folder / f"{name}.mask").masks["default"] for name in "ab")
    only_first = sum(int((first.bits[name] & ~second.bits[name]).sum()) for name in first.bits)
    last = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("all "))
    assert last.split()[1:3] == [f"{first.num_weights():,}", f"{only_first:,}"]


@pytest.mark.parametrize("how", ["majority", "intersection", "union"])
def test_merge_combines(folder: Path, tmp_path: Path, how: str) -> None:
    assert run("merge", folder / "a.mask", folder / "b.mask", "--how", how, "--out", tmp_path / "m.mask") == 0
    first, second = (read_mask_file(folder / f"{name}.mask").masks["default"] for name in "ab")
    merged = read_mask_file(tmp_path / "m.mask").masks["default"]
    for name, bits in merged.bits.items():
        both, any_of = first.bits[name] & second.bits[name], first.bits[name] | second.bits[name]
        assert torch.equal(bits, both if how == "intersection" else any_of)


def test_merge_collects(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.mask"
    assert run("merge", folder / "a.mask", folder / "b.mask", "--how", "collect", "--out", out) == 0
    assert list(read_mask_file(out).masks) == ["a", "b"]
    marked = tmp_path / "marked.mask"
    write_mask_file(marked, replace(read_mask_file(folder / "b.mask"), verdict="keep the frozen backbone"))
    assert run("merge", folder / "a.mask", marked, "--how", "collect", "--out", out) == 0
    assert read_mask_file(out).verdict == "keep the frozen backbone"
    assert run("merge", folder / "a.mask", folder / "a.mask", "--how", "collect", "--out", out) == 2
    assert "two masks have one name" in capsys.readouterr().err


def test_convert_there_and_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read_mask_file(folder / "b.mask")
    config = folder / "config.yaml"
    plain, small, back = (tmp_path / f"{name}.mask" for name in ("plain", "small", "back"))
    assert run("convert", folder / "b.mask", plain, "--codec", "packbits-zstd") == 0
    assert run("convert", plain, small, "--against-weights", "--config", config) == 0
    assert small.stat().st_size < (folder / "b.mask").stat().st_size < plain.stat().st_size
    assert run("convert", small, back) == exit_status.BAD_INPUT
    assert "cannot be read without them" in capsys.readouterr().err
    assert run("convert", small, back, "--config", config) == 0
    after = read_mask_file(back)
    assert after.metrics == before.metrics
    for name, bits in before.masks["default"].bits.items():
        assert torch.equal(after.masks["default"].bits[name], bits)
    assert run("convert", plain, small, "--against-weights") == exit_status.BAD_INPUT
    assert "--config RUN/config.yaml" in capsys.readouterr().err


def test_verify_names_the_bad_ones(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", folder / "a.mask", folder / "both.mask") == 0
    bad = bytearray((folder / "a.mask").read_bytes())
    bad[-40] ^= 1
    (tmp_path / "bad.mask").write_bytes(bad)
    capsys.readouterr()
    assert run("verify", folder / "a.mask", tmp_path / "bad.mask", tmp_path / "none.mask") == 1
    whole, broken, missing = capsys.readouterr().out.splitlines()
    assert whole.endswith("a.mask: whole; 1 masks of 24,576 weights in all"), whole
    assert "bad.mask is damaged" in broken
    assert "none.mask" in missing


def test_exported_weights_load_with_timm_alone(folder: Path, tmp_path: Path) -> None:
    """A fresh process without this package: the embeddings of the applied mask, bit for bit."""
    assert run("export", folder / "b.mask", tmp_path, "--config", folder / "config.yaml") == 0
    card = (tmp_path / "README.md").read_text()
    assert "| knn20 | 0.5000 |" in card
    assert (tmp_path / "sparsity.png").stat().st_size > 5000
    from_card = card.partition("```python\n")[2].partition("```")[0]
    script = (
        f"import sys, torch\n{from_card}\n"
        "images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))\n"
        "torch.save(model.eval()(images), 'features.pt')\n"
        "assert 'selfmask_dist' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    encoder = build_backbone(load_config(folder / "config.yaml")).encoder
    apply_masks(encoder, tmp_path / "b.mask")
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.load(tmp_path / "features.pt"), encoder(images))
    assert load_file(tmp_path / "model.safetensors").keys() == encoder.state_dict().keys()


def test_two_of_four_counts_groups_in_a_row() -> None:
    weight = torch.tensor([[1.0, 0, 0, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1]])
    assert two_of_four({"w": weight, "odd": torch.zeros(3, 3), "bias": torch.zeros(8)}) == 0.5
    assert two_of_four({}) == 0.0
