"""SwAV's views: torchvision's operations for given parameters, its distribution where they are drawn, and the
same pixels whether a worker finishes them or the device does.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats  # type: ignore[import-untyped]
from torchvision import transforms as tv  # type: ignore[import-untyped]
from torchvision.transforms import functional as tvf  # type: ignore[import-untyped]

from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import decode, multicrop_transform, open_source, train_loader
from selfmask_dist.data import decode as decode_function
from selfmask_dist.data.order import sample_generator
from selfmask_dist.data.views import multicrop as multicrop_module
from selfmask_dist.data.views.decode import counts
from selfmask_dist.data.views.distortion import HAS_OPENCV, distort_batch, distort_view
from selfmask_dist.data.views.multicrop import Crops, Distortion, FinishViews, draw_parameters
from selfmask_dist.data.views.single import crop_box
from tests.support.tars import numbered_tars, picture

PRE = Preprocessing(32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
CROPS = (Crops(2, 32, (0.14, 1.0)), Crops(3, 16, (0.05, 0.14)))
NOTHING = torch.tensor([[0.0, 0, 0, 1, 2, 3, 1, 1, 1, 0, 0, 0]])


def one_by_one(images: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`distort_view` on what `distort_batch` takes."""
    found = torch.empty(images.shape)
    for image, row, out in zip(images, rows.tolist(), found, strict=True):
        distort_view(image, row, out=out)
    return found


needs_opencv = pytest.mark.skipif(not HAS_OPENCV, reason="opencv-python-headless is not installed")
Distort = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(params=["batch", pytest.param("view", marks=needs_opencv)])
def distort(request: pytest.FixtureRequest) -> Distort:
    return {"batch": distort_batch, "view": one_by_one}[request.param]


def images(number: int, generator: torch.Generator) -> torch.Tensor:
    small = torch.rand(number, 3, 6, 6, generator=generator)
    return torch.nn.functional.interpolate(small, (40, 36), mode="bilinear")


def parameters(**changes: object) -> torch.Tensor:
    row = NOTHING.clone()
    for name, value in changes.items():
        place = {"flip": 0, "color": 1, "gray": 10, "sigma": 11}.get(name)
        if place is not None:
            row[0, place] = float(value)  # type: ignore[arg-type]
        elif name == "order":
            row[0, 2:6] = torch.tensor(value)
        else:
            row[0, 6:10] = torch.tensor(value)
    return row


def test_colours_equal_torchvisions_in_every_order(distort: Distort, generator: torch.Generator) -> None:
    batch = images(24, generator)
    rows, expected = [], []
    operations = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
    for n, image in enumerate(batch):
        order = torch.randperm(4, generator=generator).tolist()
        factors = [*(0.2 + 1.6 * torch.rand(3, generator=generator)).tolist(), 0.4 * (n / 24) - 0.2]
        rows.append(parameters(color=1, order=order, factors=factors))
        for operation in order:
            image = operations[operation](image, factors[operation])
        expected.append(image)
    found = distort(batch.clone(), torch.cat(rows))
    assert torch.allclose(found, torch.stack(expected), atol=2e-5)


@pytest.mark.parametrize("shift", [-0.5, -0.31, -0.001, 0.0, 0.17, 0.5])
def test_hue_where_its_formulas_meet(shift: float, distort: Distort) -> None:
    """Grey, black and white, the corners and edges of the colour cube, and channels that are equal."""
    levels = torch.tensor([0.0, 1 / 255, 0.25, 0.5, 254 / 255, 1.0])
    colors = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 12, 18)
    row = parameters(color=1, order=(3, 0, 1, 2), factors=(1, 1, 1, shift))
    expected = tvf.adjust_hue(colors[0], shift)
    assert torch.allclose(distort(colors.clone(), row)[0], expected, atol=2e-5)


def test_flip_grey_and_nothing(distort: Distort, generator: torch.Generator) -> None:
    batch = images(3, generator)
    rows = torch.cat([NOTHING, parameters(flip=1), parameters(gray=1)])
    found = distort(batch.clone(), rows)
    assert torch.equal(found[0], batch[0])
    assert torch.equal(found[1], tvf.hflip(batch[1]))
    assert torch.allclose(found[2], tvf.rgb_to_grayscale(batch[2], 3), atol=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.8, 2.0])
def test_blur_is_a_gaussian(sigma: float, distort: Distort, generator: torch.Generator) -> None:
    batch = images(2, generator)
    found = distort(batch.clone(), torch.cat([parameters(sigma=sigma)] * 2))
    inside = tvf.gaussian_blur(batch, [13, 13], [sigma, sigma])
    assert torch.allclose(found[..., 6:-6, 6:-6], inside[..., 6:-6, 6:-6], atol=1e-5)
    constant = torch.full((1, 3, 20, 20), 0.3)
    assert torch.allclose(distort(constant.clone(), parameters(sigma=sigma)), constant, atol=1e-6)


def test_blur_is_close_to_pils(distort: Distort, generator: torch.Generator) -> None:
    from PIL import ImageFilter

    pixels = (images(1, generator) * 255).byte()
    found = distort(pixels.float() / 255, parameters(sigma=1.5))[0].permute(1, 2, 0) * 255
    theirs = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(1.5))
    assert np.abs(found.numpy() - np.asarray(theirs, dtype=np.float32)).mean() < 1.5


def test_parameters_are_distributed_as_torchvisions() -> None:
    rng = np.random.Generator(np.random.Philox(key=1))
    ours = draw_parameters(Distortion(), rng.random((3000, 40)))
    jitter = tv.ColorJitter(0.8, 0.8, 0.8, 0.2)
    torch.manual_seed(1)
    theirs = [
        tv.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(3000)
    ]
    for column in range(4):
        factors = [float(draw[column + 1]) for draw in theirs]
        assert stats.ks_2samp(ours[:, 6 + column], factors).pvalue > 1e-3, column
    orders = np.array([[int("".join(map(str, o)))] for o in ours[:, 2:6].astype(int)])
    assert stats.chisquare(np.unique(orders, return_counts=True)[1]).pvalue > 1e-3
    assert len(np.unique(orders)) == 24
    for column, probability in ((0, 0.5), (1, 0.8), (10, 0.2)):
        assert abs(ours[:, column].mean() - probability) < 0.03
    sigma = ours[:, 11]
    assert abs((sigma > 0).mean() - 0.5) < 0.03
    assert stats.kstest(sigma[sigma > 0], stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(ours[:, [0, 1, 6, 7, 8, 9, 10, 11]].T) - np.eye(8)).max() < 0.08


@pytest.mark.parametrize("scale", [(0.14, 1.0), (0.05, 0.14)])
def test_crops_are_distributed_as_torchvisions(scale: tuple[float, float]) -> None:
    rng = np.random.Generator(np.random.Philox(key=2))
    size, ratio = (170, 128), (3 / 4, 4 / 3)
    ours = np.array([crop_box(size, scale=scale, ratio=ratio, u=rng.random(40)) for _ in range(2000)])
    torch.manual_seed(1)
    blank = Image.new("RGB", size)
    theirs = np.array([tv.RandomResizedCrop.get_params(blank, scale, ratio) for _ in range(2000)])
    for a, b in ((ours[:, 0], theirs[:, 1]), (ours[:, 1], theirs[:, 0])):
        assert stats.ks_2samp(a, b).pvalue > 1e-3
    for a, b in ((ours[:, 2] - ours[:, 0], theirs[:, 3]), (ours[:, 3] - ours[:, 1], theirs[:, 2])):
        assert stats.ks_2samp(a, b).pvalue > 1e-3


def test_a_crop_is_pils_to_one_level() -> None:
    image = decode(picture(2, size=(90, 70)))
    transform = multicrop_transform(PRE, crops=CROPS, on_device=True)
    *views, _ = transform(image, sample_generator(seed=0, epoch=0, sample=3))
    draws = sample_generator(seed=0, epoch=0, sample=3).random((5, 40))
    for v, view in enumerate(views):
        scale = CROPS[0].scale if v < 2 else CROPS[1].scale
        box = crop_box(image.size, scale=scale, ratio=(3 / 4, 4 / 3), u=draws[v])
        size = view.shape[-1]
        theirs = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BILINEAR), dtype=np.int16)
        assert np.abs(view.permute(1, 2, 0).numpy().astype(np.int16) - theirs).max() <= 1


def test_a_view_depends_on_seed_epoch_sample_and_its_number_only() -> None:
    image = decode(picture(2, size=(90, 70)))
    many = multicrop_transform(PRE, crops=(Crops(6, 32, (0.14, 1.0)),))
    few = multicrop_transform(PRE, crops=(Crops(4, 32, (0.14, 1.0)),))
    a, b = (t(image, sample_generator(seed=1, epoch=2, sample=3)) for t in (many, few))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=False)), "more views change no earlier one"
    views = {v.numpy().tobytes() for v in a}
    others = many(image, sample_generator(seed=1, epoch=3, sample=3))
    assert len(views | {v.numpy().tobytes() for v in others}) == 12


def test_both_paths_give_the_same_pixels(tmp_path: Path) -> None:
    data = open_source(numbered_tars(tmp_path))
    transforms = [multicrop_transform(PRE, crops=CROPS, on_device=flag) for flag in (False, True)]
    loaders = [train_loader(data, t, global_batch_size=6, seed=1) for t in transforms]
    for here, raw in zip(*loaders, strict=True):
        assert raw.views[0].dtype == torch.uint8
        there = raw.to("cpu")
        assert there.finish is None
        assert [v.shape[1:] for v in there.views] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
        for x, y in zip(here.views, there.views, strict=True):
            assert x.dtype == y.dtype == torch.float32
            assert torch.allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("library", [pytest.param("opencv", marks=needs_opencv), "torch alone"])
def test_a_batch_at_once_is_its_views_one_by_one(
    library: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "torch alone":
        monkeypatch.setattr(multicrop_module, "HAS_OPENCV", False)
    crops = (images(300, generator) * 255).byte()
    draws = np.random.Generator(np.random.Philox(key=4)).random((300, 40))
    rows = torch.from_numpy(draw_parameters(Distortion(), draws))
    finish = FinishViews(PRE.mean, PRE.std)
    assert torch.allclose(finish.at_once(crops, rows), finish.one_by_one(crops, rows), atol=3e-5)


def test_bad_crops_are_refused() -> None:
    with pytest.raises(ValueError, match=r"crop scale is \(0\.5, 0\.1\)"):
        multicrop_transform(PRE, crops=(Crops(1, 8, (0.5, 0.1)),))
    with pytest.raises(ValueError, match="0 crops"):
        multicrop_transform(PRE, crops=(Crops(0, 8, (0.1, 0.5)),))


# ---- decoders


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_fast_decoder_gives_pils_pixels(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    simplejpeg = pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
    import sys

    module = sys.modules["selfmask_dist.data.views.decode"]
    data = picture(1, size=(61, 47), mode=mode)
    counts.clear()
    fast = np.asarray(decode_function(data), dtype=np.int16)
    assert counts == {"PIL" if mode == "CMYK" else "simplejpeg": 1}
    monkeypatch.setattr(module, "simplejpeg", None)
    slow = np.asarray(decode_function(data), dtype=np.int16)
    assert np.abs(fast - slow).max() <= 1, "one level where the two libraries' versions round differently"
    assert counts["PIL"] == (2 if mode == "CMYK" else 1)
    assert json.dumps(dict(counts))
    assert simplejpeg is not None


def test_rotten_bits_inside_a_jpeg_are_noticed() -> None:
    pytest.importorskip("simplejpeg", reason="only simplejpeg notices")
    data = picture(5, size=(120, 90))
    middle = len(data) // 2
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(data[:middle] + b"\xff\xd0\xff\xd9" * 4 + data[middle + 16 :])


@pytest.mark.gpu
def test_finishing_on_a_device_waits_for_nothing_there() -> None:
    rng = np.random.default_rng(0)
    crops = torch.randint(0, 256, (16, 3, 40, 40), dtype=torch.uint8)
    parameters = torch.from_numpy(draw_parameters(Distortion(), rng.random((16, 40))))
    finish = FinishViews(PRE.mean, PRE.std)
    expected = finish.at_once(crops, parameters)
    there = crops.cuda()
    finish.at_once(there, parameters)  # allocates what it needs
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = finish.at_once(there, parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
