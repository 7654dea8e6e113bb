"""Heads and class names in a mask file: bit for bit, bounded, and taken off without a trace."""

import io
import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from selfmask_dist.config.objectives import ObjectiveConfig
from selfmask_dist.maskfile import (
    Head,
    Mask,
    MaskFile,
    MaskFileError,
    Model,
    add_models,
    add_numbers,
    container,
    describe_file,
    drop_models,
    read_mask_file,
    write_mask_file,
)
from selfmask_dist.maskfile.file import read_about
from selfmask_dist.objectives.supervised import Supervised
from selfmask_dist.training.whole.keep import head_of


def random_head(kind: str, norm: str) -> Head:
    draw = torch.Generator().manual_seed(0)
    parts = {"weight": torch.randn(3, 5, generator=draw)}
    if kind == "linear":
        parts["bias"] = torch.randn(3, generator=draw)
    if norm == "batchnorm":
        parts |= {"mean": torch.randn(5, generator=draw), "var": torch.rand(5, generator=draw)}
    scale = 8.0 if norm == "l2" or kind == "cosine" else 1.0
    return Head(kind, norm=norm, scale=scale, target="class", **parts)


def model_of(kind: str = "linear", norm: str = "l2") -> Model:
    about = {"written_by": "a test"}
    return Model(random_head(kind, norm), ("a", "b", "ç"), {"name": "timm:x"}, "token", "mit", about)


def mask_file(**parts: Any) -> MaskFile:
    bits = torch.rand(7, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    return MaskFile({"default": Mask({"w": bits}, "f" * 64)}, "timm:x", metrics={"head": 0.5}, **parts)


@pytest.mark.parametrize(
    ("kind", "norm"), [("linear", "none"), ("linear", "l2"), ("linear", "batchnorm"), ("cosine", "none")]
)
def test_a_file_holds_a_head_bit_for_bit(kind: str, norm: str, tmp_path: Path) -> None:
    path, model = tmp_path / "x.mask", model_of(kind, norm)
    assert write_mask_file(path, mask_file(models={"default": model})) == path.stat().st_size
    for file in (read_mask_file(path), read_about(path)):
        found = file.models["default"]
        assert found.head is not None
        assert model.head is not None
        assert replace(found, head=None, classes=()) == replace(model, head=None, classes=())
        assert found.classes == model.classes
        assert (found.head.kind, found.head.norm, found.head.scale) == (kind, norm, model.head.scale)
        tensors = model.head.tensors()
        assert found.head.tensors().keys() == tensors.keys()
        assert all(torch.equal(part, tensors[name]) for name, part in found.head.tensors().items())


def test_adding_and_writing_give_the_same_file_and_dropping_the_one_before(tmp_path: Path) -> None:
    alone, whole, added = (tmp_path / f"{name}.mask" for name in ("alone", "whole", "added"))
    models = {"default": model_of(), "other": replace(model_of(), head=None, classes=())}
    write_mask_file(alone, mask_file())
    write_mask_file(whole, mask_file(models=models))
    write_mask_file(added, mask_file())
    for _ in range(2):  # the second time in place of what is there
        add_models(added, models)
        assert added.read_bytes() == whole.read_bytes()
    add_numbers(added, metrics={"head": 0.25})
    assert read_mask_file(added).models["default"].classes == ("a", "b", "ç")
    add_numbers(added, metrics={"head": 0.5})
    drop_models(added)
    assert added.read_bytes() == alone.read_bytes()


def test_logits_are_those_of_training(tmp_path: Path) -> None:
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(2)).to(torch.float32)
    for norm in ("none", "l2", "batchnorm"):
        objective = Supervised(5, 3, ObjectiveConfig(head_norm=norm)).eval()
        if objective.norm is not None:
            objective.norm.running_mean += 0.3
            objective.norm.running_var *= 2
        assert torch.equal(
            head_of(objective).logits(features), objective.predict(torch.nn.Identity(), features)
        )
    text = torch.nn.functional.normalize(torch.randn(3, 5), dim=1)
    objective = Supervised(
        5, 3, ObjectiveConfig(head="clip_text"), text_embeddings=text, logit_scale=99.5
    ).eval()
    head = head_of(objective)
    assert torch.equal(head.logits(features), objective.predict(torch.nn.Identity(), features))
    assert head.logits(features.half()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"takes features of length 5, the encoder gives 4"):
        head.logits(features[:, :4])


@pytest.mark.parametrize(
    "parts",
    [
        {"kind": "tree"},
        {"norm": "layer"},
        {"weight": torch.zeros(3)},
        {"weight": torch.zeros(0, 5)},
        {"weight": torch.full((3, 5), float("nan"))},
        {"weight": torch.zeros(3, 5, dtype=torch.float64)},
        {"bias": torch.zeros(4)},
        {"norm": "batchnorm"},
        {"mean": torch.zeros(5), "var": torch.zeros(5)},
        {"norm": "batchnorm", "mean": torch.zeros(5), "var": -torch.ones(5)},
        {"kind": "cosine", "bias": torch.zeros(3)},
        {"scale": 0.0},
        {"scale": float("inf")},
    ],
)
def test_a_head_that_cannot_be_is_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="head"):
        Head(**{"kind": "linear", "weight": torch.zeros(3, 5), **parts})


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header and sign the file again, so that checksums hold."""

    def changed(header: dict[str, Any]) -> dict[str, Any]:
        change(header["models"]["default"])
        return header

    container.rewrite_header(path, changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.update(classes=["a", "b"]),
        lambda model: model.update(classes=["a", "b", 3]),
        lambda model: model.update(classes=["a", "b", "x" * 1001]),
        lambda model: model.update(classes=None),
        lambda model: model.update(head=[]),
        lambda model: model["head"].update(scale="8"),
        lambda model: model["head"].update(scale=True),
        lambda model: model["head"].update(kind="os.system"),
        lambda model: model["head"]["arrays"][0].update(shape=[3, 10**9]),
        lambda model: model["head"]["arrays"][0].update(shape=[2**39, 2**39]),
        lambda model: model["head"]["arrays"][0].update(section=[10**9, 4, 0]),
        lambda model: model["head"]["arrays"][0].update(name="evil"),
        lambda model: model["head"]["arrays"].append(model["head"]["arrays"][0] | {"name": "mean"}),
        lambda model: model["head"].pop("arrays"),
        lambda model: model.update(provenance={str(n): "" for n in range(51)}),
        lambda model: model.update(provenance={"a": ["b"]}),
        lambda model: model.update(backbone={"kwargs": "x" * 10_000}),
        lambda model: model.update(licence=None),
    ],
)
def test_a_strangers_model_is_refused_and_not_believed(
    change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    path = tmp_path / "x.mask"
    write_mask_file(path, mask_file(models={"default": model_of()}))
    rewritten(path, change)
    with pytest.raises(MaskFileError, match=r"x\.mask"):
        read_mask_file(path)
    with pytest.raises(MaskFileError, match=r"x\.mask"):
        read_about(path)


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.mask"
    write_mask_file(path, mask_file(models={"default": model_of()}))
    data = path.read_bytes()
    for place in range(0, len(data), 37):
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(MaskFileError):
            read_mask_file(path)


def test_a_text_too_long_is_not_written(tmp_path: Path) -> None:
    model = Model(random_head("linear", "none"), ("a", "b", "c" * 1001))
    with pytest.raises(MaskFileError, match="cannot be stored"):
        write_mask_file(tmp_path / "x.mask", mask_file(models={"default": model}))


def test_what_is_shown_of_it_stays_in_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.mask"
    model = Model(random_head("linear", "none"), ("a\n\x1b[2Jb", "b", "c"), licence="mit\nVERDICT: fine")
    write_mask_file(path, mask_file(models={"default": model}))
    line = next(line for line in describe_file(path).splitlines() if line.startswith("model"))
    assert line == "model 'default': a linear head of 3 classes (a  [2Jb, b, c) licence mit VERDICT: fine"


def test_an_old_reader_passes_it_over(tmp_path: Path) -> None:
    """The version stays 2, and what an older reader takes of the header is where it was."""
    path = tmp_path / "x.mask"
    write_mask_file(path, mask_file(models={"default": model_of()}))
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<8sIQ", data)
    header = json.load(io.BytesIO(zstandard.ZstdDecompressor().decompress(data[52 : 52 + length])))
    assert (magic, version) == (b"SELFMASK", 2)
    assert header.keys() - {"models"} == {"backbone", "preprocessing", "metrics", "masks", "order", "tensors"}
    assert header["tensors"] == []
