"""Targets out of shards: into the index, batches and views, and by name where one is missing or wrong."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfmask_dist import data
from selfmask_dist.common.pictures import read_label_map
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data.build import build_index
from selfmask_dist.data.targets import IGNORED
from selfmask_dist.data.views.dense import DenseTransform
from tests.support.targets import CLASSES, write_targets
from tests.support.tars import picture, write_tar

PRE = Preprocessing(8, (0.0,) * 3, (1.0,) * 3, crop_pct=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_targets(tmp_path_factory.mktemp("targets"), train=12, test=4)["train"]


def rows(path: Path, abouts: list[object]) -> Path:
    """A tar whose samples have these contents in .json."""
    members = []
    for number, about in enumerate(abouts):
        members += [(f"{number}.jpg", picture(number)), (f"{number}.json", json.dumps(about).encode())]
    return write_tar(path / "a.tar", members)


def test_the_index_has_them_and_a_walk_finds_the_same(folder: str, tmp_path: Path) -> None:
    mapped = data.open_source(folder, require_labels=False)
    (tmp_path / "a.tar").symlink_to(Path(folder) / "a.tar")
    walked = data.open_source(tmp_path, require_labels=False)
    assert mapped.index.path is not None
    assert walked.index.path is None
    assert mapped.identity["targets"] == walked.identity["targets"]
    kinds: dict[data.TargetKind, int] = {"multilabel": 3, "regression": 1}
    for kind, width in kinds.items():
        targets = data.open_targets(mapped, kind)
        assert len(targets.outputs) == width
        ids = np.array([5, 0, 7])
        assert torch.equal(targets.of(mapped, ids), data.open_targets(walked, kind).of(walked, ids))
    part = data.Subset(mapped, np.array([7, 5]))
    found = data.open_targets(mapped, "multilabel").of(part, np.array([1, 0]))
    assert found.tolist() == [[1, 0, 1], [1, 1, 1]]  # the bits of 5 and 7
    assert data.open_targets(mapped, "multilabel").outputs == tuple(CLASSES)
    assert data.open_targets(mapped, "regression").outputs == ("value",)
    kept = mapped.index.keep(np.arange(len(mapped)) % 2 == 1, num_rejected=0).targets
    assert kept.values is not None
    assert kept.values.row(2).tolist() == [8.0]  # the side of sample 5


def test_statistics_of_the_training_part(folder: str) -> None:
    source = data.open_source(folder, require_labels=False)
    summary = data.open_targets(source, "regression").summary(source)
    sides = np.array([3 + i % 10 for i in range(12)])
    assert summary.mean is not None
    assert summary.deviation is not None
    assert summary.mean.item() == pytest.approx(sides.mean())
    assert summary.deviation.item() == pytest.approx(sides.std())


@pytest.mark.parametrize(
    ("abouts", "kind", "complaint"),
    [
        ([{"labels": [0]}, {"labels": "red"}], "multilabel", "sample '1' has no list of labels"),
        ([{"labels": [0]}, {"labels": [1, 1]}], "multilabel", "sample '1' has no list of labels"),
        ([{"labels": []}], "multilabel", "no image has any label"),
        ([{"value": 1.5}, {"value": None}], "regression", "sample '1' has no numbers"),
        ([{"value": 1.5}, {"value": True}], "regression", "sample '1' has no numbers"),
        ([{"values": [1, 2]}, {"values": [1]}], "regression", "sample '1' has other numbers than the 2"),
        ([{"value": 1}], "dense", "which classes its label maps have"),
    ],
)
def test_a_sample_without_is_named(
    tmp_path: Path, abouts: list[object], kind: data.TargetKind, complaint: str
) -> None:
    source = data.open_source(rows(tmp_path, abouts), require_labels=False)
    with pytest.raises(ValueError, match=complaint):
        data.open_targets(source, kind)


def test_the_index_names_and_leaves_out_samples_without_any(tmp_path: Path) -> None:
    rows(tmp_path, [{"labels": [0, 2]}, {"labels": [-1]}, {"labels": []}])
    built = build_index(tmp_path, budget=0.5, classes=["a", "b", "c"])
    assert [reject.key for reject in built.rejects if reject.is_lost] == ["1"]
    source = data.open_source(tmp_path, require_labels=False)
    targets = data.open_targets(source, "multilabel")
    assert targets.of(source, np.arange(2)).tolist() == [[1, 0, 1], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"sample '0' has label 2, and there are 2 classes"):
        data.Targets("multilabel", ("a", "b")).check(source, "data.test")


def test_batches_hold_targets_on_any_number_of_ranks(folder: str) -> None:
    source = data.open_source(folder, require_labels=False)
    targets = data.open_targets(source, "multilabel")
    for ranks in (1, 2):
        found: dict[int, list[float]] = {}
        for rank in range(ranks):
            loader = data.train_loader(
                source, data.train_transform(PRE), global_batch_size=6, seed=0, rank=rank, world_size=ranks
            ).with_targets(targets)
            for batch in loader:
                assert batch.targets is not None
                found |= dict(zip(batch.ids.tolist(), batch.targets.tolist(), strict=True))
        assert found == {i: [float((i >> c) & 1) for c in range(3)] for i in range(12)}


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "PNG")
    return buffer.getvalue()


def test_picture_and_map_are_cut_and_mirrored_alike() -> None:
    # each pixel's class is its colour: after any cut and flip without resizing the two must agree
    values = np.random.default_rng(0).integers(0, 9, (8, 8), dtype=np.uint8)
    image = Image.fromarray(np.repeat(values[..., None], 3, axis=2))
    labels = Image.fromarray(values)
    flips = set()
    for seed in range(12):
        view, found = DenseTransform(PRE, (1.0, 1.0), True).pair(image, labels, np.random.default_rng(seed))
        if not torch.equal((view[0] * 255).round().long(), found):
            pytest.fail(f"seed {seed}")
        flips.add(bool(torch.equal(found, torch.from_numpy(values).long())))
    assert flips == {True, False}
    plain = data.train_transform(PRE, crop_scale=(0.2, 0.5))(image, np.random.default_rng(3))[0]
    view, found = DenseTransform(PRE, (0.2, 0.5), True).pair(image, labels, np.random.default_rng(3))
    assert torch.equal(view, plain)  # the picture is what training without maps sees
    assert set(found.unique().tolist()) <= set(values.ravel().tolist())


def test_outside_of_the_picture_nothing_counts() -> None:
    pre = Preprocessing(8, (0.0,) * 3, (1.0,) * 3, crop_pct=2.0)
    image, labels = Image.new("RGB", (4, 4)), Image.new("L", (4, 4), 1)
    _, found = DenseTransform(pre).pair(image, labels, np.random.default_rng(0))
    assert (found[2:6, 2:6] == 1).all()
    assert (found == IGNORED).sum() == 64 - 16


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"no picture", "cannot be decoded"),
        (png(np.zeros((4, 4, 3), dtype=np.uint8)), "one byte a pixel"),
        (png(np.zeros((4, 5), dtype=np.uint8)), "5 x 4 pixels, and the picture 4 x 4"),
        (png(np.full((4, 4), 7, dtype=np.uint8)), "value 7, and there are 3 classes"),
    ],
)
def test_a_bad_map_is_named(content: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_label_map(content, (4, 4), 3)


def test_black_and_white_maps_and_palettes_are_read() -> None:
    values = np.array([[0, 1], [1, 0]], dtype=np.uint8)
    white = io.BytesIO()
    Image.fromarray(values.astype(bool)).save(white, "PNG")
    palette = Image.fromarray(values)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    coloured = io.BytesIO()
    palette.save(coloured, "PNG")
    for buffer in (white, coloured):
        assert np.array_equal(np.asarray(read_label_map(buffer.getvalue(), (2, 2), 2)), values)
