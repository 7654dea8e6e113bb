"""Masks written on rows of a backbone that is cut over processes: values of `apply_masks`, and off again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfmask_dist import apply_masks, attach
from selfmask_dist.backbones.mapping import tensors_in_files
from selfmask_dist.backbones.spec import Backbone
from selfmask_dist.config.sections import EngineConfig
from selfmask_dist.maskfile import MaskFile, MaskFileError, read_mask_file, write_mask_file
from selfmask_dist.maskfile.file import read_about
from selfmask_dist.maskfile.rows import put_file, read_by_parameter, stored_masks
from selfmask_dist.parallel.fsdp import ShardedEncoder
from tests.backbones.test_weights_in_file import FAMILIES, load, write_files
from tests.support.distributed import run_distributed
from tests.support.engine_cases import world_here


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def write_mask(
    model: str, weights: Path, path: Path, *, seed: int, stated: bool = True, **options: Any
) -> None:
    """A mask of random bits, with running statistics that moved, and its file."""
    backbone: Backbone = load(model, weights)
    masks = attach(backbone.encoder, include=FAMILIES[model][2], **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for scores in masks.parameters():
            scores.add_(torch.rand(scores.shape, generator=generator) - 0.3 - scores.mean().round())
        for name, buffer in backbone.encoder.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.01 * seed)
    masks.rewrite()
    masks.save(path, backbone_fingerprint=backbone.spec.fingerprint if stated else "")


@torch.no_grad()
def expected(family: str, weights: Path, mask: Path | None) -> Tensor:
    encoder = load(family, weights).encoder
    if mask is not None:
        apply_masks(encoder, mask)
    features: Tensor = encoder(images())
    return features


def _embed_sharded(family: str, weights: Path, masks: list[Path | None], in_file: bool) -> dict[str, Any]:
    backbone = load(family, weights, in_file=in_file)
    there = tensors_in_files(backbone.encoder)
    sharded = ShardedEncoder(
        backbone.encoder,
        blocks=backbone.spec.blocks,
        world=world_here(),
        config=EngineConfig(name="fsdp"),
        in_file=there,
    )
    found = []
    for mask in masks:
        sharded.restore()
        if mask is not None:
            put_file(mask, sharded, fingerprint=backbone.spec.fingerprint)
        found.append(sharded.encode(images()).numpy())
    kept = sum(tensor.numel() for tensor in sharded._frozen.values()) / backbone.spec.num_parameters
    return {"found": found, "in file": len(there), "kept": kept}


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["timm_vit", "resnet", "open_clip"])
def test_views_of_a_sharded_encoder_are_those_of_a_whole_one(family: str, tmp_path: Path) -> None:
    weights = write_files(tmp_path)[family]
    paths = [tmp_path / "first.mask", tmp_path / "second.mask"]
    write_mask(family, weights, paths[0], seed=1, split_qkv=family == "timm_vit")
    write_mask(family, weights, paths[1], seed=2, stated=False, family="twn")
    assert {read_mask_file(path).masks["default"].kind for path in paths} == {"threshold", "ternary"}
    order = [None, paths[0], paths[1], None, paths[0]]
    wanted = [expected(family, weights, path) for path in order]
    assert not torch.allclose(wanted[0], wanted[1], atol=1e-2), "masks change something"
    for in_file in (True, False):
        for rank in run_distributed(_embed_sharded, 2, family, weights, order, in_file):
            for found, expected_ in zip(rank["found"], wanted, strict=True):
                assert torch.allclose(torch.from_numpy(found), expected_, rtol=1e-5, atol=1e-6)
            assert (rank["in file"] > 0) == in_file
            if in_file:  # but of resampled positions
                assert rank["kept"] < 0.03, "no frozen copy where the file has the weights"
            else:
                assert 0.3 < rank["kept"] < 0.7, "of half of the rows"


def _put_wrong(family: str, weights: Path, mask: Path) -> str:
    backbone = load(family, weights)
    sharded = ShardedEncoder(
        backbone.encoder, blocks=backbone.spec.blocks, world=world_here(), config=EngineConfig(name="fsdp")
    )
    with pytest.raises(MaskFileError) as error:
        put_file(mask, sharded, fingerprint=backbone.spec.fingerprint)
    return str(error.value)


@pytest.mark.distributed
def test_a_mask_of_other_weights_is_refused(tmp_path: Path) -> None:
    files = write_files(tmp_path)
    write_mask("resnet", files["resnet"], tmp_path / "resnet.mask", seed=1)
    vit = "open_clip"
    message = run_distributed(_put_wrong, 1, vit, files[vit], tmp_path / "resnet.mask")[0]
    assert "another architecture" in message
    file = read_mask_file(tmp_path / "resnet.mask")
    mask = file.masks["default"]
    mask = type(mask)(**{**vars(mask), "weights_fingerprint": "0" * 64})
    write_mask_file(tmp_path / "other.mask", type(file)({"default": mask}))
    message = run_distributed(_put_wrong, 1, "resnet", files["resnet"], tmp_path / "other.mask")[0]
    assert "wrong backbone" in message


def test_a_file_is_read_parameter_by_parameter_as_it_is_read_whole(tmp_path: Path) -> None:
    weights = write_files(tmp_path)["resnet"]
    path = tmp_path / "one.mask"
    write_mask("resnet", weights, path, seed=1)
    whole = read_mask_file(path).masks["default"]
    parts = list(read_by_parameter(path))
    assert [list(part.bits) for part in parts] == [[name] for name in whole.bits]
    for part in parts:
        for name, bits in part.bits.items():
            assert torch.equal(bits, whole.bits[name])
    assert whole.statistics
    assert parts[0].statistics.keys() == whole.statistics.keys()
    assert not any(part.statistics for part in parts[1:])
    data = bytearray(path.read_bytes())
    data[-40] ^= 1  # in a section
    path.write_bytes(data)
    with pytest.raises(MaskFileError, match="damaged"):
        list(read_by_parameter(path))


def test_masks_go_from_file_to_file_by_parameter(tmp_path: Path) -> None:
    """A bundle of masks that stay in their files is, to the byte, that of masks in memory."""
    weights = write_files(tmp_path)["resnet"]
    paths = {name: tmp_path / f"{name}.mask" for name in ("base", "other")}
    for seed, path in enumerate(paths.values()):
        write_mask("resnet", weights, path, seed=seed)
    whole = {name: read_mask_file(path).masks["default"] for name, path in paths.items()}
    stored = {name: stored_masks(path)["default"] for name, path in paths.items()}
    about: dict[str, Any] = {"tensors": {"router.n": torch.arange(3)}, "backbone": "one"}
    shells = {name: mask.without_bits() for name, mask in stored.items()}
    for name, masks, parts in (("whole", whole, None), ("parts", shells, stored)):
        masks = {"base": masks["base"], "other": replace(masks["other"], against="base")}
        write_mask_file(tmp_path / name, MaskFile(masks, **about), parts=parts)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()

    beside = read_about(tmp_path / "parts", with_tensors=True)
    assert (beside.masks, beside.backbone) == ({}, "one")
    assert torch.equal(beside.tensors["router.n"], torch.arange(3))
    found = stored_masks(tmp_path / "parts")
    assert list(found) == ["base", "other"]
    for name, mask in whole.items():
        assert found[name].parameters == tuple(mask.bits)
        for part in found[name]:  # also of the one that is stored against the other
            for key, bits in part.bits.items():
                assert torch.equal(bits, mask.bits[key]), (name, key)
    with pytest.raises(MaskFileError, match=r"holds no mask 'third'; it has \['base', 'other'\]"):
        next(read_by_parameter(tmp_path / "parts", name="third"))
