"""What ships with the package is found beside it in a checkout; `make wheel-test` finds it in a wheel."""

import sys
from pathlib import Path

import pytest

import launchers.options
from selfmask_dist.common.shipped import find_config, shipped_configs, shipped_module
from selfmask_dist.config import load_config

ROOT = Path(__file__).resolve().parents[2]


def test_modules_are_those_beside_the_package() -> None:
    assert shipped_module("launchers.options") is launchers.options
    assert shipped_module("data_prep.image_folder") is sys.modules["data_prep.image_folder"]


def test_every_file_of_configs_has_a_name_and_the_last_part_of_it_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    configs = shipped_configs()
    assert set(configs.values()) == set((ROOT / "configs").rglob("*.yaml"))
    for name, path in configs.items():
        assert path == ROOT / "configs" / f"{name}.yaml"
        for text in (name, name.rpartition("/")[2], f"configs/{name}.yaml"):
            assert find_config(text) == path, text


def test_a_file_wins_over_a_name_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("threshold").mkdir()  # as a run of that name leaves it
    assert find_config("threshold") == ROOT / "configs" / "methods" / "masks" / "threshold.yaml"
    assert load_config("threshold", ["seed=5"]).mask.family == "threshold"
    Path("topk").write_text("seed: 7\n")
    assert load_config("topk").seed == 7


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"debug_cascad: .*no such file.*did you mean debug_cascade.*selfmask configs"
    ):
        load_config("debug_cascad")
