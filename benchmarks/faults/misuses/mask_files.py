"""Mask files that came to harm on their way, or are not for this model, in each place that reads one."""

import gzip
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.faults.misuses.case import WORKS, Case, Said, Wanted, check, error, selfmask, told
from benchmarks.faults.misuses.shared import finished
from selfmask_dist import MaskBank, apply_masks, attach
from selfmask_dist.maskfile import MaskFileError, read_mask_file
from tests.support.models import make
from tests.support.tars import picture


def mask() -> Path:
    return finished() / "final.mask"


def spoilt(name: str, wanted: Wanted, spoil: Callable[[bytes], bytes]) -> Case:
    """A mask file with other bytes, in inspect, verify, embed, diff and Python, which are to agree."""

    def use(folder: Path) -> Said:
        path = folder / "x.mask"
        path.write_bytes(spoil(mask().read_bytes()))
        commands = (
            ("mask", "verify", path),
            ("mask", "diff", path, mask()),
            ("mask", "merge", path, mask(), "--out", folder / "y.mask"),
            (
                "embed",
                mask(),
                "--config",
                finished() / "config.yaml",
                "--masks",
                path,
                "--out",
                folder / "x.npz",
            ),
        )
        for command in commands:
            said = selfmask(*command)
            check(
                said.status and "Traceback" not in said.text,
                f"{command[:2]}: {said.status} {said.text[-200:]}",
            )
        try:
            read_mask_file(path)
        except MaskFileError:
            return selfmask("inspect", path)
        return Said(0, "read_mask_file took it")

    return Case(name, wanted, use)


def flipped(place: int) -> Callable[[bytes], bytes]:
    def spoil(data: bytes) -> bytes:
        at = place if place >= 0 else len(data) + place
        return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]

    return spoil


def of_version_9(data: bytes) -> bytes:
    """A file that a later release wrote, whole."""
    body = data[:8] + b"\x09\0\0\0" + data[12:-32]
    return body + hashlib.sha256(body).digest()


def every_length(_: Path) -> None:
    """The file is cut at each of its bytes."""
    data, path = mask().read_bytes(), _ / "x.mask"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        try:
            read_mask_file(path)
        except MaskFileError:
            continue
        check(False, f"{length} of {len(data)} bytes were taken for a mask")


def another_kind_of_file(write: Callable[[Path], None]) -> Callable[[Path], Said]:
    def use(folder: Path) -> Said:
        write(folder / "x.mask")
        return selfmask("inspect", folder / "x.mask")

    return use


def weights(path: Path) -> None:
    save_file({"a": torch.zeros(3)}, path)


def checkpoint(path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, path)


def another_backbone(folder: Path) -> Said:
    """The mask of another seed's weights, of the same architecture."""
    run, other = finished(), folder / "config.yaml"
    text = (run / "config.yaml").read_text()
    check("seed: 0\n" in text, "no seed in the configuration")
    other.write_text(text.replace("seed: 0\n", "seed: 5\n"))
    (folder / "x.jpg").write_bytes(picture(0))
    return selfmask(
        "embed", folder / "x.jpg", "--config", other, "--masks", mask(), "--out", folder / "x.npz"
    )


def another_architecture(folder: Path) -> Said:
    (folder / "x.jpg").write_bytes(picture(0))
    (folder / "c.yaml").write_text(
        "backbone: {name: 'timm:test_resnet', pretrained: false, image_size: 32}\n"
    )
    config = folder / "c.yaml"
    return selfmask(
        "embed", folder / "x.jpg", "--config", config, "--masks", mask(), "--out", folder / "x.npz"
    )


def colon_in_its_name(folder: Path) -> Said:
    shutil.copy(mask(), folder / "a:b.mask")
    return told(selfmask("mask", "diff", folder / "a:b.mask", mask()))


def blank_and_umlaut(folder: Path) -> Said:
    shutil.copy(mask(), folder / "maß e.mask")
    return told(selfmask("inspect", folder / "maß e.mask"))


def one_name_twice(folder: Path) -> Said:
    (folder / "a").mkdir()
    shutil.copy(mask(), folder / "a" / "x.mask")
    shutil.copy(mask(), folder / "x.mask")
    out = folder / "y.mask"
    return selfmask(
        "mask", "merge", folder / "x.mask", folder / "a" / "x.mask", "--how", "collect", "--out", out
    )


def other_size_of_image(folder: Path) -> None:
    """Weights that do not depend on the image's size take the mask of another size."""
    import timm

    kwargs: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    small = make("timm_vit", dtype=torch.float32)[0]
    masks = attach(small, include="vit")
    masks.save(folder / "x.mask")
    masks.detach()
    large = timm.create_model("vit_tiny_patch16_224", img_size=32, **kwargs)
    state = {name: value for name, value in small.state_dict().items() if name != "pos_embed"}
    large.load_state_dict(state, strict=False)
    apply_masks(large, folder / "x.mask")
    theta = large.get_parameter("blocks.0.mlp.fc1.weight")
    check(torch.equal(theta, small.get_parameter("blocks.0.mlp.fc1.weight")), "theta is another")


def trained_further(folder: Path) -> None:
    """The backbone was fine-tuned after the mask was made."""
    model = make("timm_vit", dtype=torch.float32)[0]
    masks = attach(model, include="vit")
    masks.save(folder / "x.mask")
    masks.detach()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc2.weight")[3, 3] += 1e-3
    MaskBank(model).add("x", folder / "x.mask")


def replaced_while_served(folder: Path) -> None:
    """The file is overwritten after a bank took it in; the bank goes on with what it read."""
    model = make("timm_vit", dtype=torch.float32)[0]
    masks = attach(model, include="vit")
    masks.save(folder / "x.mask")
    masks.detach()
    bank = MaskBank(model)
    bank.add("x", folder / "x.mask")
    images = torch.zeros(1, 3, 16, 16)
    before = bank.embed(images, "x").clone()
    (folder / "x.mask").write_bytes(b"")
    bank.forget_decoded()
    check(torch.equal(bank.embed(images, "x"), before), "another embedding")


CASES = [
    spoilt("a bit flipped in the header", error("damaged"), flipped(60)),
    spoilt("a bit flipped in the last section", error("damaged"), flipped(-40)),
    spoilt("a bit flipped in the checksum", error("damaged"), flipped(-1)),
    spoilt(
        "line ends converted as text",
        error("damaged|not a mask|inconsistent"),
        lambda d: d.replace(b"\n", b"\r\n") + b"\n",
    ),
    spoilt("a byte order mark in front", error("not a mask file"), lambda d: b"\xef\xbb\xbf" + d),
    spoilt("two files behind each other", error("damaged"), lambda d: d + d),
    spoilt("bytes appended", error("damaged"), lambda d: d + b"\0" * 8),
    spoilt("a version of the future", error("version 9", "upgrade"), of_version_9),
    spoilt("the first half alone", error("damaged|cut short"), lambda d: d[: len(d) // 2]),
    spoilt("the magic alone", error("cut short"), lambda d: d[:8]),
    spoilt("zeros of the same length", error("not a mask file"), lambda d: b"\0" * len(d)),
    spoilt("compressed with gzip", error("gzip"), gzip.compress),
    spoilt(
        "a pointer of Git LFS", error("Git LFS"), lambda _: b"version https://git-lfs.github.com/spec/v1\n"
    ),
    spoilt("a web page", error("web page"), lambda _: b"<!DOCTYPE html><html>404</html>" * 9),
    Case("cut at each seventh byte", WORKS, every_length),
    Case("weights in safetensors", error("safetensors"), another_kind_of_file(weights)),
    Case("a checkpoint of torch.save", error("torch.save"), another_kind_of_file(checkpoint)),
    Case("the mask of another seed", error("wrong backbone|another backbone"), another_backbone),
    Case("the mask of another architecture", error("another architecture"), another_architecture),
    Case("a colon in its name", WORKS, colon_in_its_name),
    Case("a blank and an umlaut in its name", WORKS, blank_and_umlaut),
    Case("two files of one name, collected", error("x"), one_name_twice),
    Case("a model of another image size", WORKS, other_size_of_image),
    Case("a backbone that was trained further", error("wrong backbone"), trained_further),
    Case("the file emptied while a bank has it", WORKS, replaced_while_served),
]
