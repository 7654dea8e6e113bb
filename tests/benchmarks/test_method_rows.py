"""The comparison of methods: nothing is missing from configs, docs, rows and the table, and rows are measured
in the setting with the rates that tuning chose.
"""

import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.methods import ROWS, methods, rates, table
from benchmarks.methods.row import CONFIGS, Row, Setting
from benchmarks.methods.settings import _with_captions
from selfmask_dist.config import load_config
from selfmask_dist.config.objectives import WITH_CAPTIONS
from selfmask_dist.data import open_source
from tests.support.tiny_run import ROOT, write_tiny_data

DOCS = (ROOT / "docs" / "methods.md").read_text()
TABLE = (ROOT / "docs" / "methods_table.md").read_text()
NAMES = [row.name for row in ROWS]
TRAINS_NOTHING = {"probe", "frozen_knn"}

# what a comparison of masks with their alternatives has to have, and the rows that are it
WANTED = {
    "masks of a threshold": ("threshold", "piggyback"),
    "exactly k": ("edge_popup", "edge_popup_global", "topk", "progressive"),
    "random frozen weights": ("edge_popup_random", "edge_popup_kaiming"),
    "fixed masks": ("random_mask", "magnitude_mask"),
    "layer subsets": ("first_layers", "layers_by_name"),
    "maskable fractions": ("maskable", "maskable_random"),
    "first scores": ("threshold", "score_init", "score_init_shuffled", "score_init_normal"),
    "movement": ("movement", "soft_movement", "movement_distilled", "block_movement"),
    "quantised": ("binary_connect", "twn", "ttq", "multi_prize", "multi_prize_binary"),
    "weights beside masks": ("graft", "joint", "neural_wirings"),
    "procedures": ("packnet", "supsup", "lottery", "evolution", "wise_ft", "rebasin", "ensemble"),
    "fine-tuning": ("finetune_sgd", "finetune_adamw", "finetune_frozen_embedding"),
    "few weights": ("finetune_bias", "finetune_norm", "lora"),
    "frozen": ("probe", "frozen_knn"),
    "objectives": ("nbd", "swav", "simclr", "moco_v2", "moco_v3", "dino", "clip", "slip"),
}


@pytest.mark.parametrize("part", WANTED)
def test_every_method_has_a_row(part: str) -> None:
    assert set(WANTED[part]) <= set(NAMES)


def test_every_config_has_an_entry_and_a_row() -> None:
    run = {config for row in ROWS for config in (row.configs or (row.name,))}
    for path in CONFIGS.glob("*/*.yaml"):
        name = path.stem
        assert name in run, f"configs/methods/{name}.yaml has no row in benchmarks/method_rows"
        mention = rf"`(configs/methods/\w+/)?{name}(\.yaml)?`"
        assert re.search(mention, DOCS), f"configs/methods/{name}.yaml is not in docs/methods.md"
        load_config(path)
    for row in ROWS:
        assert all(list(CONFIGS.glob(f"*/{config}.yaml")) for config in row.configs), row.name


def test_every_row_is_in_the_table() -> None:
    sections = TABLE.split("\n## ")[1:]
    assert sections
    for section in sections:
        listed = re.findall(r"^\| (\w+)", section, re.MULTILINE)[1:]
        assert listed == NAMES, section.splitlines()[0]
        assert "failed" not in section


def test_all_rows_get_equally_many_tries() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert set(rates.STARTS) <= set(NAMES)
    for name in set(NAMES) - TRAINS_NOTHING:
        assert len(rates.tries(name)) == len(rates.FACTORS), name
    assert rates.tries("probe") == {}
    assert rates.tries("threshold")[1.0] == ("optim.score_lr=100",)
    for setting, found in rates.table().items():
        for name, entry in found.items():
            assert tuple(entry["rates"]) in rates.tries(name).values(), (setting, name)


def test_the_best_try_is_kept_and_the_others_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "CHOSEN", tmp_path / "rates.json")
    low, middle, high, highest = rates.FACTORS
    assert rates.chosen("digits", "threshold") == rates.tries("threshold")[1.0], "untuned: where it starts"
    rates.save("digits", "threshold", {low: 0.5, middle: 0.6, high: 0.7, highest: 0.7})
    assert rates.chosen("digits", "threshold") == rates.tries("threshold")[high], "of equal ones the first"
    assert rates.chosen("groceries", "threshold") == ("optim.score_lr=10",), (
        "a tenth of where the line starts"
    )
    assert rates.score({"knn20": 0.5, "head": 0.7, "probe": 1.0}) == pytest.approx(0.6)
    assert rates.score({"knn20": 0.5, "head": None}) == 0.5


def row_named(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("rows")
    data = write_tiny_data(folder / "data")
    overrides = (
        *(f"data.{split}={path}" for split, path in data.items()),
        "backbone.name=timm:vit_tiny_patch16_224",
        "backbone.pretrained=false",
        "backbone.image_size=16",
        "backbone.kwargs={patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}",
        *("train.epochs=2", "train.global_batch_size=12", "optim.warmup_epochs=0", "eval.knn_k=[20]"),
        *("eval.knn_every=0", "eval.frozen_baseline=false", "engine.workers=0", "engine.threads=1"),
        *("run.log_every=1", "run.progress=false", "run.overwrite=true"),
    )
    return Setting(overrides, folder / "runs", 3, 12, "digits", rates=("optim.weight_lr=0.125",))


@pytest.mark.parametrize("name", ["finetune_sgd", "block_movement"])
def test_a_row_is_a_run_of_its_config_in_the_setting(setting: Setting, name: str) -> None:
    outcome = row_named(name).measure(setting)
    config = load_config(setting.folder / f"{name}-3" / "config.yaml")
    assert config.optim.weight_lr == 0.125, "the setting's rates are the last word"
    assert config.seed == 3
    assert outcome.knn20 is not None
    assert outcome.head is not None
    assert outcome.step_seconds is not None
    assert outcome.active == pytest.approx(1.0 if name == "finetune_sgd" else 0.5, abs=0.02)
    assert ("dense weights left" in outcome.more) == (name == "block_movement")


def test_steps_are_timed_without_the_whole_training(setting: Setting, tmp_path: Path) -> None:
    longer = replace(setting, overrides=(*setting.overrides, "train.epochs=1000"), folder=tmp_path)
    seconds = methods._step_seconds("topk", longer)
    assert seconds is not None
    assert 0 < seconds < 2
    assert not list(tmp_path.iterdir()), "nothing is left"
    (tmp_path / "steps.jsonl").write_text('{"topk": 1.5}\n{"topk": 1.25, "swav": 3.0}\n')
    assert methods.step_rounds(tmp_path) == {"topk": [1.5, 1.25], "swav": [3.0]}
    summary = table.summarise({"topk": [None], "supsup": [None]}, methods.step_rounds(tmp_path))
    assert summary["topk"]["step_ratio"]["median"] == 1.375
    assert summary["supsup"]["step_ratio"] is None


def test_captions_are_written_beside_the_pictures(setting: Setting, tmp_path: Path) -> None:
    train = next(entry for entry in setting.overrides if entry.startswith("data.train=")).partition("=")[2]
    tar = Path(train) / "shard-000000.tar"
    folder = _with_captions(tar, tmp_path / "pairs", lambda name, number: f"{name} {number}")
    source = open_source(folder)
    assert source.has_captions
    with tarfile.open(tar) as whole:
        pictures = [m.name for m in whole if m.name.endswith(".png")]
    captions = source.read_captions(np.arange(len(source)))
    assert captions == [f"{name.split('/')[0]} {number}" for number, name in enumerate(pictures)]
    assert {row.name for row in ROWS if row.group == "objective"} >= set(WITH_CAPTIONS)


def test_numbers_over_seeds_and_failures_come_into_the_table(tmp_path: Path) -> None:
    one = {"knn20": 0.5, "probe": 0.6, "head": None, "active": 1.0, "stored_bytes": 1000}
    full: dict[str, Any] = {**one, "more": {}}
    mask = {**full, "more": {"x": 0.25}}
    found: dict[str, list[Any]] = {"finetune_sgd": [full, full], "threshold": [mask, "ValueError: no"]}
    summary = table.summarise(found, {"threshold": [1.5]})
    summary["threshold"]["rates"] = ("optim.score_lr=30", "optim.weight_lr=0.01")
    path = tmp_path / "table.md"
    table.write_table(path, ROWS, {"Digits": summary}, {"about": "About.", "Digits": "Small."})
    text = path.read_text()
    assert "| finetune_sgd | baseline | 0.500 ± 0.000 | 0.600 ± 0.000 | - |" in text
    row = "| threshold (failed 1 times) | mask family | 0.500 | 0.600 | - | 1.000 | 1,000 | 1.50 |"
    assert f"{row} score 30, weight 0.01 |" in text
    assert "- threshold: x 0.25" in text
