"""A held-out part of the training images: by their keys alone, in place of a test split."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.image_folder import convert_image_folder
from selfmask_dist.config import ConfigError, load_config
from selfmask_dist.data import Source, hold_out, open_source
from selfmask_dist.training.build import open_data, open_train, open_what_there_is
from tests.support.tars import labelled, picture, write_tar


def keys(source: Source) -> set[str]:
    return {source.key(index) for index in range(len(source))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two tars of 40 samples of three classes."""
    members = labelled(f"{number:03d}" for number in range(40))
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", members[:30])
    write_tar(tmp_path / "tars" / "b.tar", members[30:])
    return tmp_path / "tars"


def test_the_part_follows_from_keys_alone(folder: Path, tmp_path: Path) -> None:
    train, held = hold_out(open_source(folder), 0.25)
    assert keys(train) | keys(held) == keys(open_source(folder))
    assert not keys(train) & keys(held)
    assert 4 <= len(held) <= 16
    # in one tar, in the opposite order, and among others
    turned = [*labelled(f"{number:03d}" for number in range(60))]
    pairs = [turned[start : start + 2] for start in range(0, len(turned), 2)][::-1]
    other = write_tar(tmp_path / "turned.tar", [member for pair in pairs for member in pair])
    assert keys(hold_out(open_source(other), 0.25)[1]) & keys(open_source(folder)) == keys(held)
    # a larger share holds out these and more
    assert keys(held) < keys(hold_out(open_source(folder), 0.5)[1])
    counts = [len(hold_out(open_source(other), share)[1]) for share in (0.1, 0.5, 0.9)]
    assert counts == sorted(counts)
    assert abs(counts[1] - 30) < 12


def test_a_share_that_leaves_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"leaves 40 to train on and 0 to measure on; set data.held_out"):
        hold_out(open_source(folder), 1e-9)


def test_a_run_measures_on_it_and_does_not_train_on_it(folder: Path, tmp_path: Path) -> None:
    settings = [f"data.train={folder}", "data.held_out=0.25"]
    train, test = open_data(load_config(None, settings))
    assert not keys(train) & keys(test)
    assert keys(train) | keys(test) == keys(open_source(folder))
    assert train.classes == test.classes
    assert set(np.asarray(test.labels)) <= {0, 1, 2}
    assert keys(open_train(load_config(None, settings))) == keys(train)
    # a subset is of what is trained on, and cannot bring back what is held out
    np.save(tmp_path / "some.npy", np.arange(0, len(train), 2))
    part, same = open_data(load_config(None, [*settings, f"data.subset={tmp_path}/some.npy"]))
    assert keys(part) < keys(train)
    assert keys(same) == keys(test)


def test_pictures_without_labels_are_held_out_too(tmp_path: Path) -> None:
    for number in range(30):
        path = tmp_path / "photos" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture(number))
    convert_image_folder(tmp_path / "photos", tmp_path / "tars", layout="unlabelled", progress=False)
    settings = [f"data.train={tmp_path / 'tars'}", "objective.name=nbd", "data.held_out=0.3"]
    train, test = open_what_there_is(load_config(None, settings))
    assert test is not None
    assert len(train) + len(test) == 30
    assert not keys(train) & keys(test)


def test_two_places_to_measure_on_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.held_out=0.1 measures on a part .* set one of them to null"):
        load_config(None, ["data.held_out=0.1", "data.test=elsewhere"])
    for share in (0, 1, 1.5):
        with pytest.raises(ConfigError, match=r"data\.held_out"):
            load_config(None, [f"data.held_out={json.dumps(share)}"])
