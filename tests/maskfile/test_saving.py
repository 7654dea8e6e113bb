"""Masks that leave parameter by parameter: the same file, and nothing whole on a rank. Limits of a file."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from selfmask_dist import attach
from selfmask_dist.maskfile import (
    Mask,
    MaskFile,
    MaskFileError,
    add_numbers,
    container,
    file,
    from_masks,
    read_mask_file,
    verify_mask_file,
    write_mask_file,
)
from selfmask_dist.maskfile.api import save_masks
from selfmask_dist.masking import build_family
from tests.maskfile.test_artifact import rewrite_header, trained
from tests.support.distributed import run_distributed
from tests.support.engine_cases import Case, build
from tests.support.models import make

# ---- parameter by parameter


@pytest.mark.parametrize(
    "options",
    [
        {"split_qkv": True},
        {"family": build_family("twn"), "exclude": ["*bias"]},
        {"family": build_family("multi_prize", keep=0.8), "exclude": ["*bias"]},
        {"family": build_family("joint"), "exclude": ["*bias"]},
    ],
    ids=["threshold", "ternary", "frozen signs", "trained weights"],
)
@pytest.mark.parametrize("against_weights", [False, True])
def test_the_file_is_that_of_the_whole_mask(options: dict, against_weights: bool, tmp_path: Path) -> None:
    model, preset = make("timm_vit", dtype=torch.float32)
    masks = attach(model, include=preset, **options)
    with torch.no_grad():
        for entry in masks.entries:
            generator = torch.Generator().manual_seed(len(entry.name))
            entry.fill(torch.rand(entry.theta.shape, generator=generator) - 0.3)
    masks.rewrite()
    mask = from_masks(masks, with_rounded=True)
    weights = masks.first_weights().__getitem__ if against_weights else None
    write_mask_file(tmp_path / "whole.mask", MaskFile({"default": mask}), weights=weights)
    masks.save(tmp_path / "parts.mask", against_weights=against_weights)
    assert (tmp_path / "parts.mask").read_bytes() == (tmp_path / "whole.mask").read_bytes()


class Watched:
    """Counts the tensors of some size that are alive at a time, of those it is shown."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref[Tensor]] = []
        self.most = 0

    def see(self, tensor: Tensor) -> Tensor:
        shown = tensor.clone()  # not what the model holds
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(shown)]
        self.most = max(self.most, len(self.alive))
        return shown


def _save_watched(folder: str, engine: str) -> tuple[int, int]:
    """(whole tensors that were alive at a time, parameters) on this rank, which saves with the others."""
    _, masks = build(Case(engine=engine, dtype=torch.float32))
    watched, shards = Watched(), type(masks.shards)
    whole, whole_weight = shards.whole, shards.whole_weight
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "whole", lambda *a: watched.see(whole(*a)))
        patch.setattr(shards, "whole_weight", lambda *a: watched.see(whole_weight(*a)))
        gc.disable()  # counted is what is let go by itself
        save_masks(masks, Path(folder) / f"{engine}.mask", is_writer=dist.get_rank() == 0)
        gc.enable()
    return watched.most, len(masks.entries)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["fsdp", "bits"])
def test_no_rank_holds_more_than_a_parameter_and_the_next(engine: str, tmp_path: Path) -> None:
    for most, parameters in run_distributed(_save_watched, 2, str(tmp_path), engine):
        assert parameters > 10
        assert most <= 4
    assert read_mask_file(tmp_path / f"{engine}.mask").masks["default"].num_weights() > 1000


def _save_into_nothing(folder: str) -> str:
    _, masks = build(Case(engine="fsdp", dtype=torch.float32))
    try:
        save_masks(masks, Path(folder) / "missing" / "a.mask", is_writer=dist.get_rank() == 0)
    except FileNotFoundError as error:
        return f"raised {type(error).__name__}"
    return "went on"


@pytest.mark.distributed
def test_a_writer_that_fails_leaves_nobody_waiting(tmp_path: Path) -> None:
    assert run_distributed(_save_into_nothing, 2, str(tmp_path)) == ["raised FileNotFoundError", "went on"]


# ---- numbers that come later


def test_numbers_added_make_the_file_that_would_have_been_written_with_them(tmp_path: Path) -> None:
    _, _, masks = trained("conv")
    bare, whole = tmp_path / "bare.mask", tmp_path / "whole.mask"
    save_masks(masks, bare, backbone="timm:x")
    numbers: dict[str, Any] = {"metrics": {"knn20": 0.1 + 0.2, "probe": 1 / 3}, "verdict": "keep the frozen"}
    save_masks(masks, whole, backbone="timm:x", **numbers)
    before = bare.read_bytes()
    with pytest.raises(MaskFileError, match=r"not finite numbers are not stored: \{'probe': nan\}"):
        add_numbers(bare, metrics={"probe": float("nan")})
    assert bare.read_bytes() == before
    assert add_numbers(bare, **numbers) == whole.stat().st_size
    assert bare.read_bytes() == whole.read_bytes()
    add_numbers(bare, metrics={})
    assert bare.read_bytes() == before, "and back"
    bare.write_bytes(before[:-40] + bytes([before[-40] ^ 1]) + before[-39:])
    with pytest.raises(MaskFileError, match="damaged or cut short"):
        add_numbers(bare, **numbers)
    assert sorted(tmp_path.iterdir()) == [bare, whole], "nothing half written is left"


# ---- limits


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "MAX_WEIGHTS", 10_000)
    monkeypatch.setattr(file, "WEIGHTS_PER_BYTE", 50)


def test_masks_of_huge_backbones_can_be_read() -> None:
    """Five masks of a ViT-g/14, and one of 22 billion weights, that prune 1 %: .08 bits a weight."""
    for weights in (5 * 1.0e9, 22e9):
        assert file._limit(int(weights * 0.08 / 8)) > weights
    assert file._limit(1000) == file.MAX_WEIGHTS == 4 * 10**9, "a small file takes what it always did"


@pytest.mark.usefixtures("small_limits")
def test_a_file_of_many_masks_is_read_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.mask"
    generator = torch.Generator().manual_seed(0)
    masks = {f"{k}": Mask({"w": torch.rand(90, 100, generator=generator) > 0.5}, "x") for k in range(5)}
    write_mask_file(path, MaskFile(masks))
    assert container.read(path).num_bytes < 45_000 / 8 * 1.02, "nothing is added to it"
    found = read_mask_file(path)
    assert all(torch.equal(found.masks[k].bits["w"], mask.bits["w"]) for k, mask in masks.items())


@pytest.mark.usefixtures("small_limits")
def test_a_mask_that_prunes_nothing_yet_is_read_too(tmp_path: Path) -> None:
    """Its bits take no bytes: the file is filled up with zeros to what a reader asks of it."""
    path, bits = tmp_path / "a.mask", torch.ones(90, 100, dtype=torch.bool)
    write_mask_file(path, MaskFile({f"{k}": Mask({"w": bits}, "x") for k in range(5)}))
    assert container.read(path).num_bytes == 45_000 // 50
    assert read_mask_file(path).masks["3"].num_kept() == 9_000
    assert verify_mask_file(path) == "whole; 5 masks of 45,000 weights in all"
    add_numbers(path, metrics={"knn": 0.5})
    assert read_mask_file(path).metrics == {"knn": 0.5}
    write_mask_file(path, MaskFile({"one": Mask({"w": bits}, "x")}))
    assert container.read(path).num_bytes < 10, "below the limit files are as they were"


@pytest.mark.usefixtures("small_limits")
def test_a_header_that_states_more_than_the_file_is_worth_is_refused(tmp_path: Path) -> None:
    path, bits = tmp_path / "a.mask", torch.ones(90, 100, dtype=torch.bool)
    write_mask_file(path, MaskFile({f"{k}": Mask({"w": bits}, "x") for k in range(5)}))

    def more(header: dict[str, Any]) -> None:
        header["masks"] |= {f"{k}": header["masks"]["0"] for k in range(5, 8)}
        header["order"] = sorted(header["masks"])

    rewrite_header(path, more)
    with pytest.raises(MaskFileError, match=r"holds 72,000 values, more than the limit of 45,000"):
        read_mask_file(path)
    assert len(read_mask_file(path, max_weights=72_000).masks) == 8, "who asks for it gets it"

    def larger(header: dict[str, Any]) -> None:
        header["masks"]["0"]["parameters"][0] |= {"shape": [101, 100], "kept": [10_100]}

    rewrite_header(path, larger)
    with pytest.raises(MaskFileError, match=r"one of its arrays holds 10,100 values, more than .* 10,000"):
        read_mask_file(path, max_weights=10**9)
    with pytest.raises(MaskFileError, match="one of its arrays holds 20,000 values"):
        write_mask_file(path, MaskFile({"a": Mask({"w": bits.new_ones(200, 100)}, "x")}))
