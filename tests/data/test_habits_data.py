"""Mixed, erased and otherwise changed pictures: as published, and the same on any number of ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats  # type: ignore[import-untyped]
from timm.data import mixup as timm_mixup
from torchvision.transforms import v2  # type: ignore[import-untyped]

from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import (
    Batch,
    Mixing,
    Quarantine,
    Source,
    Stronger,
    Workers,
    open_source,
    train_loader,
    train_transform,
)
from selfmask_dist.data.order import partner_distance, sample_generator
from selfmask_dist.data.views.mix import cut_box
from selfmask_dist.data.views.stronger import LEVELS, OPERATIONS, erased_box, operate
from tests.support.tars import labelled, numbered_tars, write_tar

PRE = Preprocessing(24, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
BOTH = Mixing(0.4, 1.0, probability=0.8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(numbered_tars(tmp_path_factory.mktemp("tars")))


def batches(
    source: Source, mixing: Mixing | None, *, size: int, world: int = 1, first: int = 0, **more: Any
) -> list[Batch]:
    """Return the global batches of epoch 1 from number `first` on, put together from all ranks."""
    by_rank = []
    for rank in range(world):
        loader = train_loader(
            source, train_transform(PRE), global_batch_size=size, seed=5, rank=rank, world_size=world, **more
        )
        if mixing is not None:
            loader.with_mixing(mixing)
        loader.set_epoch(1, first_step=first)
        by_rank.append(list(loader))
        loader.close()
    return [joined(parts) for parts in zip(*by_rank, strict=True)]


def joined(parts: tuple[Batch, ...]) -> Batch:
    """Return the rows of a global batch in its order, without padding."""

    def whole(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tensors, dim=1).flatten(0, 1)[: parts[0].global_count]

    first = parts[0]
    mixed = first.mixed
    if mixed is not None:
        others = [part.mixed for part in parts if part.mixed is not None]
        mixed = type(mixed)(whole([one.labels for one in others]), whole([one.shares for one in others]))
    return Batch(
        views=(whole([part.views[0] for part in parts]),),
        labels=whole([part.labels for part in parts]),
        weights=whole([part.weights for part in parts]),
        ids=whole([part.ids for part in parts]),
        global_count=first.global_count,
        mixed=mixed,
    )


def check_equal(found: list[Batch], wanted: list[Batch]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.mixed is not None
        assert other.mixed is not None
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.views[0][one.weights > 0], other.views[0][other.weights > 0])
        assert torch.equal(one.weights, other.weights)
        assert torch.equal(one.mixed.labels, other.mixed.labels)
        assert torch.equal(one.mixed.shares, other.mixed.shares)


# ---- mixup and CutMix


def test_a_row_is_mixed_with_the_row_half_a_batch_away(source: Source) -> None:
    plain = batches(source, None, size=8)[0]
    mixup, cutmix = (batches(source, mixing, size=8)[0] for mixing in (Mixing(0.4), Mixing(cutmix=1.0)))
    others = plain.views[0].roll(-4, dims=0)
    for mixed in (mixup, cutmix):
        assert mixed.mixed is not None
        assert torch.equal(mixed.labels, plain.labels)
        assert torch.equal(mixed.mixed.labels, plain.labels.roll(-4))
        assert len(mixed.mixed.shares.unique()) > 4, "each picture has a share of its own"
    assert mixup.mixed is not None
    assert cutmix.mixed is not None
    shares = mixup.mixed.shares[:, None, None, None]
    torch.testing.assert_close(mixup.views[0], shares * plain.views[0] + (1 - shares) * others)
    is_own, is_other = cutmix.views[0] == plain.views[0], cutmix.views[0] == others
    assert (is_own | is_other).all()
    kept = (is_own & ~is_other).any(dim=1) | (is_own & is_other).all(dim=1)
    torch.testing.assert_close(kept.float().mean(dim=(1, 2)), cutmix.mixed.shares, atol=0.02, rtol=0)


@pytest.mark.parametrize("size", [8, 6, 12])
def test_mixed_pictures_do_not_depend_on_ranks_workers_or_a_resume(source: Source, size: int) -> None:
    alone = batches(source, BOTH, size=size)
    assert alone[-1].global_count < size or len(source) % size == 0
    for world in (2, size // 2, size):
        check_equal(batches(source, BOTH, size=size, world=world), alone)
    check_equal(batches(source, BOTH, size=size, first=2), alone[2:])
    check_equal(batches(source, BOTH, size=size, world=2, workers=Workers(2, "thread")), alone)


def test_ranks_mostly_hold_both_of_a_pair() -> None:
    assert [partner_distance(count) for count in (1, 2, 3, 8, 12, 64, 96)] == [1, 1, 1, 4, 4, 32, 32]
    for count in (64, 256, 1024):
        assert all(partner_distance(count) % world == 0 for world in (2, 4, 8, 16, 32))


@pytest.mark.parametrize("world", [2, 4])
def test_a_partner_that_cannot_be_read_leaves_its_row_as_it_is(tmp_path: Path, world: int) -> None:
    members = labelled(f"{number:03d}" for number in range(8))
    at = next(index for index, (name, _) in enumerate(members) if name.endswith("003.jpg"))
    members[at] = (members[at][0], b"no picture")
    source = open_source(write_tar(tmp_path / "a.tar", members))

    def read(world: int) -> Batch:
        quarantine = Quarantine(tmp_path / "q.jsonl", num_samples=8, budget=0.9, rank=0)
        return batches(source, Mixing(0.4), size=8, world=world, quarantine=quarantine)[0]

    alone = read(1)
    assert alone.mixed is not None
    row = int((alone.weights == 0).nonzero())
    shares = alone.mixed.shares
    assert shares[(row + 4) % 8] == 1
    assert (shares < 1).sum() == 6
    check_equal([read(world)], [alone])


def test_shares_and_rectangles_are_those_of_timm() -> None:
    rng = np.random.default_rng(0)
    own, other = torch.zeros(3, 4, 4), torch.ones(3, 4, 4)
    for a in (0.2, 1.0, 3.0):
        shares = [Mixing(mixup=a)(own, other, rng)[1] for _ in range(300)]
        assert stats.kstest(shares, stats.beta(a, a).cdf).pvalue > 0.01
    for share in (0.1, 0.5, 0.93):
        for seed in range(20):
            np.random.seed(seed)  # noqa: NPY002 (timm draws from it)
            top, bottom, left, right = timm_mixup.rand_bbox((1, 3, 24, 30), share)
            np.random.seed(seed)  # noqa: NPY002 (timm draws from it)
            down, right_at = np.random.randint(0, 24), np.random.randint(0, 30)  # noqa: NPY002
            place = (down + 0.5) / 24, (right_at + 0.5) / 30
            found = cut_box(24, 30, share, place)
            assert found[:2] == (top, left)
            assert 0 <= found[2] - bottom <= 1, "of odd sides older versions of timm leave one pixel out"
            assert 0 <= found[3] - right <= 1


def test_a_share_of_pictures_is_mixed_and_some_by_cutmix() -> None:
    rng = np.random.default_rng(1)
    own, other = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    found = [Mixing(1.0, 1.0, probability=0.5, switch=0.25)(own, other, rng)[0] for _ in range(400)]
    is_mixed = [bool(view.any()) for view in found]
    is_cut = [
        mixed and set(view.unique().tolist()) <= {0.0, 1.0}
        for mixed, view in zip(is_mixed, found, strict=True)
    ]
    assert 0.4 < np.mean(is_mixed) < 0.6
    assert 0.15 < sum(is_cut) / sum(is_mixed) < 0.35


def test_a_batch_is_split_with_what_it_is_mixed_with(source: Source) -> None:
    batch = batches(source, BOTH, size=8)[0]
    parts = batch.split(2)
    assert batch.mixed is not None
    found = [part.mixed for part in parts if part.mixed is not None]
    assert torch.equal(torch.cat([one.shares for one in found]), batch.mixed.shares)
    assert torch.equal(torch.cat([one.labels for one in found]), batch.mixed.labels)
    assert len(found[0].shares) == len(parts[0].ids) == 4


# ---- RandAugment and erasing


@pytest.mark.parametrize("level", [0, 9, 30])
def test_operations_are_torchvisions(level: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = v2.RandAugment(magnitude=level, num_magnitude_bins=LEVELS)
    names = [*theirs._AUGMENTATION_SPACE]
    assert [name.lower() for name in names] == [name.replace("_", "") for name in OPERATIONS]
    for name, ours in zip(names, OPERATIONS, strict=True):
        magnitudes_fn, is_signed = theirs._AUGMENTATION_SPACE[name]
        magnitudes = magnitudes_fn(LEVELS, 24, 30)
        for sign in (1, -1) if is_signed else (1,):
            magnitude = 0.0 if magnitudes is None else sign * float(magnitudes[level])
            wanted = theirs._apply_image_or_video_transform(
                image, name, magnitude, interpolation=theirs.interpolation, fill=theirs._fill
            )
            found = operate(image, ours, level, is_negative=sign < 0)
            assert np.array_equal(np.asarray(found), np.asarray(wanted)), (name, sign)


def test_crop_and_flip_stay_the_same_and_the_rest_follows_from_the_sample() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))

    def view(stronger: Stronger | None, sample: int = 3) -> torch.Tensor:
        rng = sample_generator(seed=1, epoch=2, sample=sample)
        return train_transform(PRE, stronger=stronger)(image, rng)[0]

    plain = view(None)
    assert torch.equal(view(Stronger()), plain)
    erased = view(Stronger(erase=1.0))
    is_erased = (erased != plain).any(dim=0)
    assert 0.02 * 24**2 * 0.8 < is_erased.sum() < 0.33 * 24**2 * 1.2
    assert not erased[:, is_erased].any(), "the mean colour"
    changed = view(Stronger(2, 30, 0.5))
    assert torch.equal(view(Stronger(2, 30, 0.5)), changed)
    assert any(not torch.equal(view(Stronger(2, 30), s), view(None, s)) for s in range(4))


def test_erased_rectangles_are_spread_over_the_view() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([erased_box(32, 48, rng) for _ in range(500)])
    areas = boxes[:, 2] * boxes[:, 3] / (32 * 48)
    assert areas[areas > 0].min() > 0.015
    assert areas.max() < 0.35
    assert 0.15 < areas.mean() < 0.2
    assert (boxes[:, 0] + boxes[:, 2] <= 32).all()
    assert (boxes[:, 1] + boxes[:, 3] <= 48).all()
