"""Mask files: what is applied equals what was trained, and nothing damaged or foreign gets in."""

import copy
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfmask_dist import Masks, apply_masks, attach, codec
from selfmask_dist.artifact import Mask, MaskFile, MaskFileError, from_masks, read_mask_file, write_mask_file
from tests.models import FAMILIES, make


def trained(family: str, **options) -> tuple[nn.Module, nn.Module, Masks]:
    """(the untouched backbone, the masked model, its masks) with about a third pruned."""
    model, preset = make(family, dtype=torch.float32)
    backbone = copy.deepcopy(model)
    masks = attach(model, include=preset, **options)
    generator = torch.Generator().manual_seed(3)
    masks.load_state_dict(
        {
            name: torch.rand(scores.shape, generator=generator) - 0.3
            for name, scores in masks.state_dict().items()
        }
    )
    model(torch.randn(8, 3, 16, 16, generator=generator))  # moves running statistics where there are some
    return backbone, model, masks


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "options", [{}, {"scale": "none"}, {"split_qkv": True}], ids=["scaled", "unscaled", "split"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_applied_backbone_equals_the_trained_model_bit_for_bit(
    family: str, options: dict, tmp_path: Path
) -> None:
    backbone, model, masks = trained(family, **options)
    size = masks.save(tmp_path / "task.mask", backbone="timm:x", metrics={"knn": 0.5})
    assert size == (tmp_path / "task.mask").stat().st_size
    assert not torch.equal(backbone.eval()(images()), model.eval()(images()))
    file = apply_masks(backbone, tmp_path / "task.mask")
    assert torch.equal(backbone(images()), model(images()))
    assert (file.backbone, file.metrics) == ("timm:x", {"knn": 0.5})
    for name, bits in masks.masks().items():
        assert torch.equal(file.masks["default"].bits[name], bits)
    has_norm_statistics = family == "conv"
    assert bool(file.masks["default"].statistics) == has_norm_statistics


def test_a_prefixed_model_takes_the_mask(tmp_path: Path) -> None:
    """A whole CLIP model holds the tower under `visual.`, DistributedDataParallel under `module.`."""
    backbone, model, masks = trained("open_clip")
    masks.save(tmp_path / "task.mask")
    whole = nn.ModuleDict({"visual": backbone, "logit_head": nn.Linear(2, 2)})
    apply_masks(whole, tmp_path / "task.mask")
    assert torch.equal(whole["visual"](images()), model(images()))
    twice = nn.ModuleDict({"a": backbone, "b": copy.deepcopy(backbone)})
    with pytest.raises(MaskFileError, match="more than once"):
        apply_masks(twice, tmp_path / "task.mask")


def test_any_damaged_byte_is_an_error(tmp_path: Path) -> None:
    _, _, masks = trained("conv")
    path = tmp_path / "task.mask"
    masks.save(path)
    good = path.read_bytes()
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(MaskFileError):
            read_mask_file(path)
    for length in range(0, len(good), 97):
        path.write_bytes(good[:length])
        with pytest.raises(MaskFileError):
            read_mask_file(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(MaskFileError, match="damaged or cut short"):
        read_mask_file(path)


def test_a_wrong_backbone_is_refused_and_left_alone(tmp_path: Path) -> None:
    _, _, masks = trained("timm_vit")
    masks.save(tmp_path / "task.mask")
    other, _ = make("timm_vit", seed=9, dtype=torch.float32)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(MaskFileError, match=r"wrong backbone: .* fingerprint"):
        apply_masks(other, tmp_path / "task.mask")
    with pytest.raises(MaskFileError, match=r"lacks 16 masked parameters: .*another architecture"):
        apply_masks(make("conv", dtype=torch.float32)[0], tmp_path / "task.mask")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    backbone, _, masks = trained("timm_vit")
    apply_masks(backbone, tmp_path / "task.mask")
    with pytest.raises(MaskFileError, match="with no mask applied yet"):
        apply_masks(backbone, tmp_path / "task.mask")


def test_half_precision_weights_are_the_same_backbone(tmp_path: Path) -> None:
    """The fingerprint is of values, so a backbone stored in float16 and loaded in float32 keeps it."""
    half = make("timm_vit", dtype=torch.float16)[0]
    masks = attach(copy.deepcopy(half).float(), include="vit")
    masks.save(tmp_path / "task.mask")
    apply_masks(half, tmp_path / "task.mask")


def test_several_masks_in_one_file(tmp_path: Path) -> None:
    backbone, model, masks = trained("timm_vit")
    first = from_masks(masks)
    masks.load_state_dict({name: torch.ones_like(scores) for name, scores in masks.state_dict().items()})
    write_mask_file(tmp_path / "two.mask", MaskFile(masks={"first": first, "all": from_masks(masks)}))
    with pytest.raises(MaskFileError, match=r"several masks; name one of \['all', 'first'\]"):
        apply_masks(backbone, tmp_path / "two.mask")
    with pytest.raises(MaskFileError, match="no mask 'third'"):
        apply_masks(backbone, tmp_path / "two.mask", name="third")
    apply_masks(backbone, tmp_path / "two.mask", name="all")
    assert torch.equal(backbone(images()), model(images()))


def rewrite_header(path: Path, change) -> None:
    """Change the header and sign the file again: damage that the checksum does not see."""
    import hashlib

    data = path.read_bytes()[:-32]
    magic, version, length = struct.unpack_from("<8sIQ", data)
    header = json.loads(data[20 : 20 + length])
    change(header)
    encoded = json.dumps(header).encode()
    body = (
        struct.pack("<8sIQ", magic, header.pop("__version__", version), len(encoded))
        + encoded
        + data[20 + length :]
    )
    path.write_bytes(body + hashlib.sha256(body).digest())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.__setitem__("__version__", 9), "format version 9.*upgrade"),
        (lambda h: h.pop("masks"), "inconsistent header"),
        (lambda h: h["masks"]["default"].__setitem__("kind", "pickle"), "unknown mask kind"),
        (lambda h: h["masks"]["default"]["parameters"][0].__setitem__("shape", [10**12]), "expected for"),
        (lambda h: h["masks"]["default"]["parameters"][0].__setitem__("shape", [-1]), "bad shape"),
        (
            lambda h: h["masks"]["default"]["parameters"][0].__setitem__("section", [0, 10**9]),
            "outside the file",
        ),
        (lambda h: h["masks"]["default"]["parameters"][0].__setitem__("kept", [1]), "count of kept weights"),
        (lambda h: h["masks"]["default"]["parameters"][0].__setitem__("codec", "zip"), "unknown mask codec"),
    ],
)
def test_a_signed_file_with_a_bad_header_is_refused(tmp_path: Path, change, message: str) -> None:
    _, _, masks = trained("conv")
    masks.save(tmp_path / "task.mask")
    rewrite_header(tmp_path / "task.mask", change)
    with pytest.raises(MaskFileError, match=message):
        read_mask_file(tmp_path / "task.mask")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x.mask").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(MaskFileError, match="not a mask file"):
        read_mask_file(tmp_path / "x.mask")
    with pytest.raises(FileNotFoundError):
        read_mask_file(tmp_path / "none.mask")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, masks = trained("conv")
    masks.save(tmp_path / "task.mask")
    before = (tmp_path / "task.mask").read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        masks.save(tmp_path / "task.mask", metrics={"knn": 1.0})
    assert [p.name for p in tmp_path.iterdir()] == ["task.mask"]
    assert (tmp_path / "task.mask").read_bytes() == before


@pytest.mark.parametrize("num_bits", [0, 1, 7, 8, 9, 1000])
def test_codec_round_trip(num_bits: int) -> None:
    bits = np.random.default_rng(num_bits).random(num_bits) < 0.9
    data = codec.encode(bits)
    assert np.array_equal(codec.decode(data, num_bits), bits)
    with pytest.raises(ValueError, match="expected"):
        codec.decode(data, num_bits + 8)
    with pytest.raises(ValueError, match="decompressed"):
        codec.decode(b"not zstd", num_bits)


def test_codec_is_small_where_masks_are_sparse() -> None:
    bits = np.random.default_rng(0).random(1_000_000) < 0.99
    assert len(codec.encode(bits)) * 8 < 0.12 * bits.size  # entropy 0.081


def test_a_mask_may_be_stored_as_the_flips_of_another(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    first = Mask({"w": torch.rand(300, 400, generator=generator) > 0.3}, "x" * 64)
    bits = first.bits["w"].clone()
    bits.view(-1)[::97] ^= True
    second = Mask({"w": bits}, "x" * 64)
    apart = write_mask_file(tmp_path / "apart.mask", MaskFile({"b": first, "a": second}))
    flips = MaskFile({"b": first, "a": replace(second, against="b")}, tensors={"router.n": torch.arange(3)})
    together = write_mask_file(tmp_path / "together.mask", flips)
    assert together < 0.7 * apart
    read = read_mask_file(tmp_path / "together.mask")
    assert list(read.masks) == ["b", "a"], "a base before its users, whatever their names"
    assert torch.equal(read.masks["a"].bits["w"], bits)
    assert torch.equal(read.masks["b"].bits["w"], first.bits["w"])
    assert torch.equal(read.tensors["router.n"], torch.arange(3))
