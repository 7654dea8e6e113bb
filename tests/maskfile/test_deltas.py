"""A fine-tuned network as one bit a weight: the published formula, the file's size, and what is refused."""

import copy
from pathlib import Path

import pytest
import torch

from selfmask_dist import MaskBank, apply_masks
from selfmask_dist.maskfile import MaskFile, MaskFileError, write_mask_file
from selfmask_dist.maskfile.tools.deltas import delta_mask
from tests.support.models import make


def test_theta_is_the_formulas_and_a_bank_swaps_it(tmp_path: Path) -> None:
    frozen, _ = make("timm_vit", dtype=torch.float32)
    tuned = copy.deepcopy(frozen)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "blocks.0.mlp" not in name:  # some are left as they were
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=draw))
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    mask = delta_mask(before, tuned.state_dict())
    path = tmp_path / "x.mask"
    write_mask_file(path, MaskFile({"default": mask}))
    images = torch.randn(2, 3, 16, 16, generator=draw)
    bank = MaskBank(copy.deepcopy(frozen))
    bank.add("x", path)
    plain = bank.embed(images, None)
    apply_masks(frozen, path)
    for name, value in frozen.state_dict().items():
        w, target = before[name], tuned.state_dict()[name]
        if torch.equal(w, target):
            expected = w
        elif w.ndim < 2:
            expected = target
        else:
            delta = target.double() - w.double()
            expected = w + torch.where(delta < 0, -1.0, 1.0) * delta.abs().mean().float()
        assert torch.equal(value, expected), name
    assert torch.equal(bank.embed(images, "x"), frozen.eval()(images))
    assert torch.equal(bank.embed(images, None), plain)


def test_a_large_matrix_takes_a_bit_a_weight(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    frozen = {"w": torch.randn(512, 768, generator=draw), "b": torch.zeros(512)}
    tuned = {"w": frozen["w"] + 0.01 * torch.randn(512, 768, generator=draw), "b": torch.ones(512)}
    size = write_mask_file(tmp_path / "x.mask", MaskFile({"default": delta_mask(frozen, tuned)}))
    assert 1.0 < 8 * size / frozen["w"].numel() < 1.1


def test_what_is_no_delta_is_refused() -> None:
    frozen = {"w": torch.ones(2, 3), "b": torch.zeros(2)}
    for tuned, reason in (
        ({"w": torch.ones(2, 3)}, "is another one: b are in one alone"),
        ({"w": torch.ones(3, 2), "b": torch.zeros(2)}, "is another one: w"),
        (frozen, "no matrix differs"),
        ({"w": torch.full((2, 3), torch.inf), "b": torch.zeros(2)}, "w is not finite"),
    ):
        with pytest.raises(MaskFileError, match=reason):
            delta_mask(frozen, tuned)
