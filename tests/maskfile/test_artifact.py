"""Mask files: what is applied equals what was trained, and nothing damaged or foreign gets in."""

import copy
import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zstandard
from torch import Tensor, nn

from selfmask_dist import Masks, apply_masks, attach
from selfmask_dist.maskfile import (
    MarkedMaskWarning,
    Mask,
    MaskFile,
    MaskFileError,
    container,
    describe_file,
    from_masks,
    read_mask_file,
    write_mask_file,
)
from selfmask_dist.maskfile.api import save_masks
from selfmask_dist.maskfile.bank import MaskBank
from selfmask_dist.maskfile.tools.arithmetic import OPERATIONS
from selfmask_dist.masking import build_family
from tests.support.models import FAMILIES, make, scores_of


def trained(architecture: str, /, **options) -> tuple[nn.Module, nn.Module, Masks]:
    """(the untouched backbone, the masked model, its masks) with about a third pruned."""
    model, preset = make(architecture, dtype=torch.float32)
    backbone = copy.deepcopy(model)
    masks = attach(model, include=preset, **options)
    generator = torch.Generator().manual_seed(3)
    masks.load_state_dict(
        {
            name: torch.rand(scores.shape, generator=generator) - 0.3
            for name, scores in scores_of(masks).items()
        }
    )
    model(torch.randn(8, 3, 16, 16, generator=generator))  # moves running statistics where there are some
    return backbone, model, masks


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "options",
    [{}, {"family": build_family("threshold", scale="none")}, {"split_qkv": True}],
    ids=["scaled", "unscaled", "split"],
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
    masks.load_state_dict({name: torch.ones_like(scores) for name, scores in scores_of(masks).items()})
    write_mask_file(tmp_path / "two.mask", MaskFile(masks={"first": first, "all": from_masks(masks)}))
    with pytest.raises(MaskFileError, match=r"several masks; name one of \['all', 'first'\]"):
        apply_masks(backbone, tmp_path / "two.mask")
    with pytest.raises(MaskFileError, match="no mask 'third'"):
        apply_masks(backbone, tmp_path / "two.mask", name="third")
    apply_masks(backbone, tmp_path / "two.mask", name="all")
    assert torch.equal(backbone(images()), model(images()))


def rewrite_header(path: Path, change) -> None:
    """Change the header and sign the file again: damage that the checksum does not see."""
    whole = container.read(path)
    header = whole.header
    change(header)
    version = header.pop("__version__", container.VERSION)
    coded = zstandard.compress(json.dumps(header).encode())
    prefix = struct.pack("<8sIQ", container.MAGIC, version, len(coded))
    data = path.read_bytes()
    sections = data[len(data) - 32 - whole.num_bytes : -32]
    body = prefix + hashlib.sha256(prefix + coded).digest() + coded + sections
    path.write_bytes(body + hashlib.sha256(body).digest())


def parameter(header: dict, place: int = 0) -> dict:
    entry: dict = header["masks"]["default"]["parameters"][place]
    return entry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.__setitem__("__version__", 9), "format version 9.*upgrade"),
        (lambda h: h.__setitem__("__version__", 1), "format version 1.*first release"),
        (lambda h: h.pop("masks"), "inconsistent header"),
        (lambda h: h.__setitem__("order", []), "order and masks name different masks"),
        (lambda h: h["masks"]["default"].__setitem__("kind", "pickle"), "unknown mask kind"),
        (lambda h: parameter(h).__setitem__("shape", [10**12]), "more than the limit of 4,000,000,000"),
        (lambda h: parameter(h).__setitem__("shape", [2**32, 2**32]), "more than the limit"),
        (lambda h: parameter(h).__setitem__("shape", [3, 5]), "inconsistent"),
        (lambda h: parameter(h).__setitem__("shape", [-1]), "bad shape"),
        (lambda h: parameter(h).__setitem__("shape", "8"), "bad shape"),
        (lambda h: parameter(h).__setitem__("section", [0, 10**9, 0]), "outside the file"),
        (lambda h: parameter(h).__setitem__("section", parameter(h, 1)["section"]), "inconsistent"),
        (lambda h: parameter(h).__setitem__("kept", [1]), "count of kept weights"),
        (lambda h: parameter(h).__setitem__("kept", []), "count of kept weights"),
        (lambda h: parameter(h).__setitem__("codec", "zip"), "unknown mask codec"),
        (lambda h: parameter(h).__setitem__("context", "mask"), "inconsistent"),
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


def test_one_parameter_is_read_without_the_others(tmp_path: Path) -> None:
    _, _, masks = trained("conv")
    path = tmp_path / "task.mask"
    first = from_masks(masks)
    second = replace(first, bits={name: ~bits for name, bits in first.bits.items()}, against="first")
    write_mask_file(path, MaskFile({"first": first, "second": second}))
    entry = container.open_part(path).header["masks"]["second"]["parameters"][-1]
    assert entry["context"] == "mask"
    damaged = bytearray(path.read_bytes())
    start = len(damaged) - 32 - container.open_part(path).num_bytes
    offset, length, checksum = container.open_part(path).header["masks"]["second"]["parameters"][0]["section"]
    damaged[start + offset] ^= 1
    assert length
    path.write_bytes(damaged)
    with pytest.raises(MaskFileError, match="checksum"):
        read_mask_file(path)
    part = container.open_part(path)
    assert part.section(entry["section"]), "the section is whole, though the file is not"
    with pytest.raises(ValueError, match="is damaged"):
        part.section([offset, length, checksum])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_coded_against_the_weights_is_read_with_the_backbone_alone(
    family: str, tmp_path: Path
) -> None:
    backbone, model, masks = trained(family)
    pruned_by_size = {  # the larger a weight, the likelier it is pruned, as in trained masks
        name: torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
        - weight.abs() / weight.abs().max()
        for name, weight in masks.weights().items()
    }
    masks.load_state_dict(pruned_by_size)
    alone = masks.save(tmp_path / "alone.mask")
    assert masks.save(tmp_path / "with.mask", against_weights=True) < alone
    with pytest.raises(
        MaskFileError, match=r"with\.mask: it was made smaller .* cannot be read without them"
    ):
        read_mask_file(tmp_path / "with.mask")
    other, _ = make(family, seed=9, dtype=torch.float32)
    with pytest.raises(MaskFileError, match="wrong backbone"):
        apply_masks(other, tmp_path / "with.mask")
    with pytest.raises(MaskFileError, match=r"holds 0 parameters called .* another architecture"):
        apply_masks(nn.Linear(2, 2), tmp_path / "with.mask")
    apply_masks(nn.ModuleDict({"visual": backbone}), tmp_path / "with.mask")
    assert torch.equal(backbone.eval()(images()), model.eval()(images()))


def test_a_file_larger_than_the_limit_is_refused_before_it_is_made(tmp_path: Path) -> None:
    """All weights kept take no bytes: nothing but the limit stands against a small file of many masks."""
    bits = torch.ones(1000, 1000, dtype=torch.bool)
    size = write_mask_file(tmp_path / "a.mask", MaskFile({f"{k}": Mask({"w": bits}, "x") for k in range(50)}))
    assert size < 2000
    with pytest.raises(MaskFileError, match=r"50,000,000 values, more than the limit of 49,999,999"):
        read_mask_file(tmp_path / "a.mask", max_weights=49_999_999)


def test_a_header_that_would_grow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, masks = trained("conv")
    masks.save(tmp_path / "a.mask")
    monkeypatch.setattr(container, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(MaskFileError, match=r"states a size of \d+ bytes, the limit is 1000"):
        read_mask_file(tmp_path / "a.mask")
    with pytest.raises(MaskFileError, match="the format allows 1,000"):
        masks.save(tmp_path / "b.mask")


def test_a_mask_may_be_stored_against_another(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    first = Mask({"w": torch.rand(300, 400, generator=generator) > 0.3}, "x" * 64)
    bits = first.bits["w"].clone()
    bits.view(-1)[::97] ^= True
    second = Mask({"w": bits}, "x" * 64)
    apart = write_mask_file(tmp_path / "apart.mask", MaskFile({"b": first, "a": second}))
    beside = MaskFile({"b": first, "a": replace(second, against="b")}, tensors={"router.n": torch.arange(3)})
    together = write_mask_file(tmp_path / "together.mask", beside)
    assert together < 0.6 * apart
    read = read_mask_file(tmp_path / "together.mask")
    assert list(read.masks) == ["b", "a"], "a base before its users, whatever their names"
    assert torch.equal(read.masks["a"].bits["w"], bits)
    assert torch.equal(read.masks["b"].bits["w"], first.bits["w"])
    assert torch.equal(read.tensors["router.n"], torch.arange(3))


def test_arithmetic_of_masks() -> None:
    bits = [torch.tensor(row, dtype=torch.bool) for row in ([1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0])]
    masks = [Mask({"w": row}, "x") for row in bits]
    expected = {"intersection": [1, 0, 0, 0], "union": [1, 1, 1, 0], "majority": [1, 1, 0, 0]}
    assert {name: fn(masks).bits["w"].int().tolist() for name, fn in OPERATIONS.items()} == expected
    assert OPERATIONS["majority"](masks[:2]).bits["w"].int().tolist() == [1, 1, 1, 0], "half is enough"
    with pytest.raises(MaskFileError, match="mask 2 is of other weights than mask 1"):
        OPERATIONS["union"]([masks[0], replace(masks[1], weights_fingerprint="y")])
    with pytest.raises(MaskFileError, match="no mask"):
        OPERATIONS["union"]([])


def test_a_mask_that_is_marked_says_so_where_it_is_put_on(tmp_path: Path) -> None:
    backbone, model, masks = trained("timm_vit")
    plain, marked = tmp_path / "plain.mask", tmp_path / "marked.mask"
    save_masks(masks, plain)
    save_masks(masks, marked, verdict="keep the frozen backbone: it fell")
    assert "verdict" not in container.read(plain).header, "without a mark the bytes are as they were"
    assert read_mask_file(plain).verdict == ""
    file = read_mask_file(marked)
    assert file.verdict == "keep the frozen backbone: it fell"
    assert "\nVERDICT: keep the frozen backbone: it fell\n" in describe_file(marked)
    assert write_mask_file(tmp_path / "again.mask", file) == marked.stat().st_size, "a copy keeps the mark"
    assert (tmp_path / "again.mask").read_bytes() == marked.read_bytes()
    bank = MaskBank(copy.deepcopy(backbone))
    with pytest.warns(MarkedMaskWarning, match=r"marked\.mask: keep the frozen backbone"):
        bank.add("task", marked)
    with pytest.warns(MarkedMaskWarning, match=r"marked\.mask: keep the frozen backbone"):
        apply_masks(backbone, marked)
    assert torch.equal(backbone(images()), model(images())), "it is put on nonetheless"
    foul = replace(file, verdict="one\ntwo \x1b[31mred" + "e" * 1000)
    write_mask_file(marked, foul)
    assert read_mask_file(marked).verdict.startswith("one two [31mred")
    assert len(read_mask_file(marked).verdict) == 500
