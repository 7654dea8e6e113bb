"""Pixels: equal to torchvision's, bit for bit for given parameters, in distribution where they are drawn."""

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats  # type: ignore[import-untyped]
from torchvision import transforms as tv  # type: ignore[import-untyped]
from torchvision.transforms import functional as tvf  # type: ignore[import-untyped]

from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import decode, eval_transform, train_transform
from selfmask_dist.data.order import sample_generator
from selfmask_dist.data.views.single import random_crop_box
from tests.support.tars import picture

PRE = Preprocessing(24, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (24, 24), (200, 90), (7, 5), (31, 64)])
@pytest.mark.parametrize(
    ("interpolation", "crop_pct", "crop_mode"),
    [
        ("bicubic", 0.875, "center"),
        ("bilinear", 0.9, "center"),
        ("lanczos", 1.0, "center"),
        ("bicubic", 1.15, "center"),
        ("bicubic", 0.9, "squash"),
    ],
)
def test_eval_view_equals_torchvision(
    size: tuple[int, int], interpolation: str, crop_pct: float, crop_mode: str
) -> None:
    pre = Preprocessing(24, PRE.mean, PRE.std, interpolation, crop_pct, crop_mode)
    image = decode(picture(1, size=size))
    short = math.floor(24 / crop_pct)
    pipeline = tv.Compose(
        [
            tv.Resize(
                (short, short) if crop_mode == "squash" else short, tv.InterpolationMode(interpolation)
            ),
            tv.CenterCrop(24),
            tv.ToTensor(),
            tv.Normalize(pre.mean, pre.std),
        ]
    )
    (view,) = eval_transform(pre)(image, np.random.default_rng(0))
    assert view.dtype == torch.float32
    assert torch.equal(view, pipeline(image))


@pytest.mark.parametrize("flip", [True, False])
def test_train_view_equals_torchvision_with_the_same_parameters(flip: bool) -> None:
    image = decode(picture(2, size=(50, 37)))
    transform = train_transform(PRE, crop_scale=(0.3, 0.9), flip=flip)
    flips = 0
    for sample in range(20):
        rng = sample_generator(seed=0, epoch=0, sample=sample)
        left, top, right, bottom = random_crop_box(
            image.size, scale=(0.3, 0.9), ratio=(3 / 4, 4 / 3), rng=rng
        )
        box = top, left, bottom - top, right - left
        expected = tvf.resized_crop(image, *box, [24, 24], tv.InterpolationMode.BICUBIC)
        if flip and rng.random() < 0.5:
            expected, flips = tvf.hflip(expected), flips + 1
        expected = tvf.normalize(tvf.to_tensor(expected), list(PRE.mean), list(PRE.std))
        (view,) = transform(image, sample_generator(seed=0, epoch=0, sample=sample))
        assert torch.equal(view, expected)
    assert (4 < flips < 16) if flip else flips == 0


@pytest.mark.parametrize("size", [(128, 170), (300, 128)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (0.9, 1.0)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int], scale: tuple[float, float]) -> None:
    ratio, draws = (3 / 4, 4 / 3), 3000
    rng = np.random.Generator(np.random.Philox(key=1))
    ours = np.array([random_crop_box(size, scale=scale, ratio=ratio, rng=rng) for _ in range(draws)])
    left, top, width, height = ours[:, 0], ours[:, 1], ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]
    assert ours.min() >= 0
    assert (ours.max(axis=0) <= [*size, *size]).all()
    torch.manual_seed(1)
    blank = Image.new("RGB", size)
    theirs = [tv.RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(draws)]
    top_, left_, height_, width_ = np.array(theirs).T
    for name, a, b in (
        ("area", width * height, width_ * height_),
        ("ratio", width / height, width_ / height_),
        ("left", left, left_),
        ("top", top, top_),
    ):
        assert stats.ks_2samp(a, b).pvalue > 1e-3, name


@pytest.mark.parametrize("size", [(1000, 3), (3, 1000)])
def test_a_picture_too_narrow_for_any_crop_gives_torchvisions_central_one(size: tuple[int, int]) -> None:
    rng = np.random.Generator(np.random.Philox(key=1))
    left, top, right, bottom = random_crop_box(size, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3), rng=rng)
    theirs = tv.RandomResizedCrop.get_params(Image.new("RGB", size), [0.9, 1.0], [3 / 4, 4 / 3])
    assert (top, left, bottom - top, right - left) == theirs


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("P", "PNG"),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("1", "PNG"),
        ("RGBA", "WEBP"),
    ],
)
def test_other_modes_become_rgb(mode: str, kind: str) -> None:
    data = picture(3, mode=mode, kind=kind)
    image = decode(data)
    assert image.mode == "RGB"
    assert image.tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_deep_and_transparent_pictures_keep_their_contents() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)).save(buffer, "PNG")
    grey = np.asarray(decode(buffer.getvalue()))
    assert (grey[..., 0].ravel() == np.arange(0, 65536, 64) >> 8).all(), "16 bits are scaled, not clipped"
    buffer = io.BytesIO()
    palette = Image.open(io.BytesIO(picture(1, mode="P", kind="PNG")))
    palette.save(buffer, "PNG", transparency=bytes(range(256)))
    assert decode(buffer.getvalue()).tobytes() == palette.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"no picture", "not a picture"), (picture(1)[:-300], "cannot be decoded"), (b"", "not a picture")],
)
def test_broken_bytes_do_not_decode(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(data)


def test_bad_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match=r"crop_scale is \(0\.5, 0\.2\)"):
        train_transform(PRE, crop_scale=(0.5, 0.2))
    with pytest.raises(ValueError, match="crop_ratio"):
        train_transform(PRE, crop_ratio=(0, 1))


# ---- preprocessing


def test_preprocessing_survives_json() -> None:
    assert Preprocessing.from_dict(json.loads(json.dumps(PRE.to_dict()))) == PRE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interpolation": "cubic"}, "interpolation is 'cubic'; choose from"),
        ({"mean": (0.5, 0.5)}, "mean has 2 channels and std 3"),
        ({"std": (1.0, 0.0, 1.0)}, "std is"),
        ({"image_size": 0}, "image_size is 0"),
        ({"crop_pct": 0.0}, "crop_pct is 0"),
        ({"crop_mode": "border"}, "crop_mode is 'border'"),
        ({"crop_pc": 1.0}, "unknown key 'crop_pc'; did you mean 'crop_pct'"),
    ],
)
def test_bad_preprocessing_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict(PRE.to_dict() | change)
    with pytest.raises(ValueError, match="lacks mean, std"):
        Preprocessing.from_dict({"image_size": 3})
