"""Kinds of masks beyond bits on frozen weights: files give theta back bit for bit, or refuse."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from selfmask_dist import apply_masks
from selfmask_dist.backbones import fingerprint
from selfmask_dist.cli import main
from selfmask_dist.maskfile import (
    Mask,
    MaskFile,
    MaskFileError,
    container,
    describe_file,
    forms,
    materialize,
    read_mask_file,
    take_apart,
    verify_mask_file,
    write_mask_file,
)
from selfmask_dist.maskfile.tools.arithmetic import OPERATIONS
from tests.maskfile.test_artifact import parameter, rewrite_header
from tests.support.models import make

QKV, BIAS = "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.bias"
NAMES = (QKV, "blocks.0.mlp.fc1.weight", BIAS)


def theta_of(kind: str, weight: Tensor, bits: Tensor, parts: int) -> Tensor:
    """Theta as published, written here with arithmetic of its own."""
    generator = torch.Generator().manual_seed(7)
    trained = torch.randn(weight.shape, generator=generator).to(weight.dtype)
    if kind == "values":
        return torch.where(bits, trained, torch.zeros_like(trained))
    if kind == "graft":
        return torch.where(bits, trained, weight)
    pieces = []
    for w, m, t in zip(weight.chunk(parts), bits.chunk(parts), trained.chunk(parts), strict=True):
        kept = m.to(w.dtype)
        if kind == "threshold":
            pieces.append(w * kept * (m.numel() / m.double().sum()).sqrt().to(w.dtype))
        elif kind == "frozen_sign":
            pieces.append(w.sign() * kept * (w.abs() * kept).mean())
        elif kind == "delta":
            pieces.append(w + torch.where(t >= 0, 1.0, -1.0).to(w.dtype) * w.abs().mean())
        elif kind == "sign":
            pieces.append(torch.where(t >= 0, 1.0, -1.0).to(w.dtype) * w.abs().mean())
        else:
            pieces.append(kept * torch.where(t > 0, w.abs().mean(), -2 * w.abs().mean()))
    return torch.cat(pieces)


def parts_of(kind: Any, theta: Tensor, bits: Tensor, weight: Tensor, parts: int) -> dict[str, Tensor]:
    if kind != "delta":
        return take_apart(kind, theta, bits, weight, num_parts=parts)
    scales = torch.stack([piece.abs().mean() for piece in weight.chunk(parts)])[:, None].double()
    return {"signs": theta < weight, "scales": scales}


def mask_of(kind: Any, encoder: torch.nn.Module, *, dtype: torch.dtype = torch.float32) -> tuple[Mask, dict]:
    """(the mask, its thetas): q, k and v scaled apart, the MLP's bits in blocks."""
    generator = torch.Generator().manual_seed(3)
    weights = {name: encoder.get_parameter(name).detach().to(dtype) for name in NAMES}
    blocks = {NAMES[1]: (32, 10)} if kind not in forms.KEEPS_ALL else {}
    bits, thetas = {}, {}
    parts: dict[str, Any] = {}
    for name, weight in weights.items():
        bits[name] = torch.rand(weight.shape, generator=generator) < (2.0 if kind in forms.KEEPS_ALL else 0.6)
        if name in blocks:
            grid = torch.rand(forms.grid_shape(list(weight.shape), blocks[name]), generator=generator) < 0.5
            bits[name] = grid.repeat_interleave(32, 0)[: len(weight)].repeat_interleave(10, 1)[
                :, : weight.shape[1]
            ]
        num_parts = 3 if name == QKV else 1
        thetas[name] = theta_of(kind, weight, bits[name], num_parts)
        for part, value in parts_of(kind, thetas[name], bits[name], weight, num_parts).items():
            parts.setdefault(part, {})[name] = value
    weights_fingerprint = fingerprint(weights.items())
    return Mask(bits, weights_fingerprint, kind=kind, num_segments={QKV: 3}, blocks=blocks, **parts), thetas


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("codec", ["entropy", "packbits-zstd"])
@pytest.mark.parametrize("kind", forms.KINDS)
def test_a_file_of_each_kind_gives_theta_back_bit_for_bit(
    kind: str, codec: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    encoder, _ = make("timm_vit", dtype=torch.float32)
    encoder.to(dtype)
    mask, thetas = mask_of(kind, encoder, dtype=dtype)
    path = tmp_path / "a.mask"
    write_mask_file(path, MaskFile({"default": mask}), codec_name=codec)
    fresh = copy.deepcopy(encoder)
    apply_masks(fresh, path)
    for name, theta in thetas.items():
        applied = fresh.get_parameter(name).detach()
        assert torch.equal(applied, theta), name
        assert not torch.equal(applied, encoder.get_parameter(name))
    read = read_mask_file(path).masks["default"]
    assert all(torch.equal(read.bits[name], bits) for name, bits in mask.bits.items())
    assert verify_mask_file(path).startswith("whole; 1 masks")
    shown = describe_file(path)
    assert ("of kind" in shown) == (kind != "threshold")
    assert ("blocks of 32 x 10" in shown) == (kind not in forms.KEEPS_ALL)
    version = int.from_bytes(path.read_bytes()[8:12], "little")
    assert version == container.VERSION_WITH_FORMS


def test_what_readers_of_version_2_know_is_still_written_as_version_2(tmp_path: Path) -> None:
    write_mask_file(tmp_path / "a.mask", MaskFile({"a": Mask({"w": torch.ones(3, dtype=torch.bool)}, "x")}))
    assert (tmp_path / "a.mask").read_bytes()[8:12] == b"\2\0\0\0"


def test_sizes_are_those_of_the_parts(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(512, 512, generator=generator)
    bits, n = latent.abs() > 0.4, latent.numel()
    scales = {"w": torch.ones(1, 2, dtype=torch.float64)}

    def size(**what: Any) -> int:
        return write_mask_file(tmp_path / "a.mask", MaskFile({"a": Mask({"w": bits}, "x" * 64, **what)}))

    header = 500
    kept = int(bits.sum())
    share = kept / n
    entropy = -share * torch.tensor(share).log2() - (1 - share) * torch.tensor(1 - share).log2()
    ternary = size(kind="ternary", signs={"w": (latent < 0) & bits}, scales=scales)
    assert 8 * (ternary - header) < n * (entropy + share) * 1.01 < 2 * n
    assert 4 * kept < size(kind="values", values={"w": latent[bits]}) < 4 * kept + n / 8 + header
    grid = torch.rand(16, 16, generator=generator) < 0.5
    bits = forms.from_grid(grid, [512, 512], (32, 32))
    assert size(blocks={"w": (32, 32)}) < header + 256 / 8
    assert size() > 4 * size(blocks={"w": (32, 32)})


def test_a_theta_of_another_kind_is_refused() -> None:
    weight = torch.randn(8, 8)
    bits = torch.ones(8, 8, dtype=torch.bool)
    for kind in ("sign", "ternary", "frozen_sign"):
        with pytest.raises(MaskFileError, match=f"not what a mask of kind {kind} can hold"):
            take_apart(kind, weight, bits, weight)
    with pytest.raises(MaskFileError, match="kind graft"):
        take_apart("graft", weight + 1, ~bits, weight)
    assert torch.equal(take_apart("values", weight, bits, weight)["values"], weight.flatten())


def test_bits_that_differ_within_a_block_are_refused(tmp_path: Path) -> None:
    bits = torch.ones(8, 8, dtype=torch.bool)
    bits[3, 3] = False
    with pytest.raises(MaskFileError, match="w: bits differ within blocks of 4 x 4"):
        write_mask_file(tmp_path / "a.mask", MaskFile({"a": Mask({"w": bits}, "x", blocks={"w": (4, 4)})}))
    for block in ((0, 4), (9, 1)):
        with pytest.raises(ValueError, match="do not fit shape"):
            forms.grid_shape([8, 8], block)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("ternary", lambda e: e.__setitem__("scales", [[1.0, -0.5]]), "scale is not a number of at least 0"),
        ("ternary", lambda e: e.__setitem__("scales", [["1", 2]]), "scale is not a number"),
        ("ternary", lambda e: e.__setitem__("scales", [[1.0]]), "scales are not 1 times 2"),
        ("sign", lambda e: e.__setitem__("scales", [[1.0]] * 2), "scales are not 1 times 1"),
        ("sign", lambda e: e.pop("signs"), "inconsistent"),
        ("ternary", lambda e: e.__setitem__("signs", e["section"]), "inconsistent"),
        ("values", lambda e: e["values"].__setitem__("shape", [3]), "do not make shape"),
        ("values", lambda e: e["values"].__setitem__("dtype", "uint8"), "inconsistent"),
        ("graft", lambda e: e.pop("values"), "inconsistent"),
        ("values", lambda e: e.__setitem__("block", [2**39, 1]), "do not fit shape"),
        ("values", lambda e: e.__setitem__("block", [1, 1, 1]), "inconsistent"),
        ("values", lambda e: e.__setitem__("block", [True, 1]), "do not fit shape"),
    ],
)
def test_signed_files_with_bad_parts_are_refused(tmp_path: Path, kind: str, change, message: str) -> None:
    encoder, _ = make("timm_vit", dtype=torch.float32)
    mask, _ = mask_of(kind, encoder)
    write_mask_file(tmp_path / "a.mask", MaskFile({"default": mask}))
    rewrite_header(tmp_path / "a.mask", lambda header: change(parameter(header, 2)))
    with pytest.raises(MaskFileError, match=message):
        read_mask_file(tmp_path / "a.mask")


def test_kinds_and_scales_go_together(tmp_path: Path) -> None:
    encoder, _ = make("timm_vit", dtype=torch.float32)
    mask, _ = mask_of("sign", encoder)
    pruned = replace(mask, bits={name: bits & False for name, bits in mask.bits.items()})
    write_mask_file(tmp_path / "a.mask", MaskFile({"default": pruned}))
    with pytest.raises(MaskFileError, match="a sign mask has none to leave out"):
        read_mask_file(tmp_path / "a.mask")
    write_mask_file(tmp_path / "a.mask", MaskFile({"default": mask}))
    rewrite_header(tmp_path / "a.mask", lambda h: h["masks"]["default"].__setitem__("scale", "sqrt"))
    with pytest.raises(MaskFileError, match="kind 'sign' cannot have scale 'sqrt'"):
        read_mask_file(tmp_path / "a.mask")


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    encoder, _ = make("timm_vit", dtype=torch.float32)
    masks: dict[str, Mask] = {kind: mask_of(kind, encoder)[0] for kind in forms.KINDS}
    path = tmp_path / "a.mask"
    for kind in ("ternary", "values", "sign"):
        with pytest.raises(MaskFileError, match=f"mask 1 is of kind {kind}.*only masks of kind threshold"):
            OPERATIONS["union"]([masks[kind], masks[kind]])
    in_blocks = OPERATIONS["union"]([masks["threshold"], masks["threshold"]])
    assert in_blocks.blocks == masks["threshold"].blocks
    other = replace(masks["threshold"], blocks={})
    assert not OPERATIONS["union"]([masks["threshold"], other]).blocks
    for kind in ("sign", "values"):
        file = MaskFile({"base": other, "next": replace(masks[kind], against="base")})
        with pytest.raises(MaskFileError, match="cannot be coded against mask 'base'"):
            write_mask_file(path, file)
        with pytest.raises(MaskFileError, match="store it without them"):
            write_mask_file(path, MaskFile({"a": masks[kind]}), weights=encoder.get_parameter)
    single = replace(masks["ternary"], blocks={}, against="base")
    write_mask_file(path, MaskFile({"base": other, "next": single}))  # bits of single weights can
    assert torch.equal(read_mask_file(path).masks["next"].signs[QKV], single.signs[QKV])


def test_sign_masks_are_compared_by_their_signs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder, _ = make("timm_vit", dtype=torch.float32)
    mask, _ = mask_of("sign", encoder)
    flipped = {name: signs.clone() for name, signs in mask.signs.items()}
    flipped[BIAS][:5] = ~flipped[BIAS][:5]
    write_mask_file(tmp_path / "a.mask", MaskFile({"default": mask}))
    write_mask_file(tmp_path / "b.mask", MaskFile({"default": replace(mask, signs=flipped)}))
    assert main(["mask", "diff", str(tmp_path / "a.mask"), str(tmp_path / "b.mask")]) == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith(BIAS)).split()
    assert int(row[2]) + int(row[3]) == 5
    assert "positive" in shown
    write_mask_file(tmp_path / "b.mask", MaskFile({"default": mask_of("values", encoder)[0]}))
    assert main(["mask", "diff", str(tmp_path / "a.mask"), str(tmp_path / "b.mask")]) == 2
    assert "of kind sign" in capsys.readouterr().err


def test_zero_weights_and_pruned_parts_have_no_sign() -> None:
    """Sign(0) = 0: a kept weight that is zero stays zero, and a part without kept weights has scale 0."""
    weight = torch.tensor([[0.0, -2.0], [3.0, 1.0]])
    bits = torch.tensor([[True, True], [False, False]])
    mask = Mask(
        {"w": bits},
        "",
        kind="frozen_sign",
        num_segments={"w": 2},
        scales={"w": torch.tensor([[0.5], [0.0]], dtype=torch.float64)},
    )
    assert materialize(mask, "w", weight).tolist() == [[0.0, -0.5], [0.0, 0.0]]


@pytest.mark.parametrize("scales", [(0.5, 0.0), (0.0, 0.5), (0.0, 0.0)])
def test_a_ternary_scale_may_be_zero(scales: tuple[float, float]) -> None:
    """TTQ's p and n are trained and may reach 0: theta is then 0 or -0 where it is kept."""
    bits = torch.tensor([True, True, False, True])
    theta = torch.tensor([scales[0], -scales[1], 0.0, -scales[1]])
    parts = take_apart("ternary", theta, bits, torch.ones(4))
    assert parts["scales"].tolist() == [list(scales)]
    assert parts["signs"].tolist() == [False, True, False, True]
