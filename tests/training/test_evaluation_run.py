"""A run's own evaluation: the mask is there before it, and a stop in the middle costs no number."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from selfmask_dist.cli import main
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.evals.store import EmbeddingStore
from selfmask_dist.maskfile import read_mask_file
from selfmask_dist.runs.preempt import Preempted
from tests.support.distributed import run_distributed
from tests.support.tiny_run import events_of, write_config, write_tiny_data


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    return write_config(
        folder / "tiny.yaml",
        write_tiny_data(folder / "data"),
        optim={"score_lr": 200.0},
        eval={"knn_every": 0, "frozen_baseline": True, "probe": True, "batch_size": 4},
    )


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """The run that nobody disturbed."""
    return train(config, "run.name=whole")


def train(config: Path, *overrides: str) -> Path:
    run(load_config(config, overrides))
    return next(
        Path(config.parent / o.removeprefix("run.name=")) for o in overrides if o.startswith("run.name=")
    )


def _train_rank(config: Path, *overrides: str) -> None:
    train(config, *overrides)


def chunks_of(folder: Path) -> dict[str, int]:
    """The chunks that are there, and when each was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("*/*.safetensors")}


@contextmanager
def stopped_at(folder: Path, *, chunks: int) -> Iterator[None]:
    """SIGTERM to this process once so many chunks are in a folder; the block must end by it."""
    is_over = threading.Event()

    def watch() -> None:
        while len(chunks_of(folder)) < chunks and not is_over.is_set():
            time.sleep(0.0005)
        if not is_over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with pytest.raises(Preempted):
            yield
    finally:
        is_over.set()
        watcher.join()


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.distributed
def test_an_evaluation_that_was_stopped_goes_on_under_another_number_of_processes(
    config: Path, whole: Path
) -> None:
    folder = config.parent / "stopped"
    with stopped_at(folder / "measuring" / "adapted", chunks=3):
        train(config, "run.name=stopped")
    assert not (folder / "result.json").exists()
    assert (folder / "frozen.json").read_bytes() == (whole / "frozen.json").read_bytes()
    assert not (folder / "measuring" / "frozen").exists(), "its numbers are written"
    first = read_mask_file(folder / "final.mask")
    expected = read_mask_file(whole / "final.mask")
    assert first.metrics == {}
    assert first.masks["default"].weights_fingerprint == expected.masks["default"].weights_fingerprint
    for name, bits in expected.masks["default"].bits.items():
        assert bits.equal(first.masks["default"].bits[name])
    made = chunks_of(folder / "measuring" / "adapted")
    assert 3 <= len(made) < 15

    more = ("run.name=stopped", "run.resume=true", "eval.keep_embeddings=true")
    run_distributed(_train_rank, 2, config, *more, backend="")
    assert json_of(folder / "result.json") == json_of(whole / "result.json")
    assert (folder / "final.mask").read_bytes() == (whole / "final.mask").read_bytes()
    kept = chunks_of(folder / "measuring" / "adapted")
    assert made.items() <= kept.items(), "what was embedded is not embedded again"
    assert not (whole / "measuring").exists()
    assert main(["train", "--config", str(config), *more[:2]]) == 0
    assert not (folder / "measuring").exists(), "whoever was killed on the way to deleting it"
    resumed = [event["step"] for event in events_of(folder) if event["event"] == "resume"]
    assert resumed == [8], "and nothing is trained again"


def test_a_stop_while_the_frozen_backbone_is_measured(config: Path, whole: Path) -> None:
    folder = config.parent / "frozen"
    with stopped_at(folder / "measuring" / "frozen", chunks=2):
        train(config, "run.name=frozen")
    assert not (folder / "frozen.json").exists()
    made = chunks_of(folder / "measuring" / "frozen")
    with stopped_at(folder / "measuring" / "frozen", chunks=len(made) + 2):
        train(config, "run.name=frozen", "run.resume=true")
    assert made.items() <= chunks_of(folder / "measuring" / "frozen").items()
    train(config, "run.name=frozen", "run.resume=true")
    assert json_of(folder / "result.json") == json_of(whole / "result.json")
    assert not (folder / "measuring").exists()


def test_what_was_measured_of_another_mask_is_not_taken(
    config: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = config.parent / "other"
    with stopped_at(folder / "measuring" / "adapted", chunks=3):
        train(config, "run.name=other")
    numbers = folder / "measuring" / "adapted" / "numbers.json"
    state = json_of(numbers)
    state["about"]["mask or weights"] = "of another training"
    numbers.write_text(json.dumps(state | {"numbers": {"knn": {"knn5": 2.0}}}))
    train(config, "run.name=other", "run.resume=true")
    assert "was begun with another mask or weights: it is measured anew" in capsys.readouterr().err
    assert json_of(folder / "result.json") == json_of(whole / "result.json")


def test_numbers_that_are_there_are_not_measured_again(config: Path, whole: Path) -> None:
    """A batch size that does not fit chunks begins anew; one that does goes on with them."""
    folder = config.parent / "smaller"
    with stopped_at(folder / "measuring" / "adapted", chunks=14):
        train(config, "run.name=smaller")
    made = chunks_of(folder / "measuring" / "adapted")
    train(config, "run.name=smaller", "run.resume=true", "eval.batch_size=2", "eval.keep_embeddings=true")
    assert made.items() <= chunks_of(folder / "measuring" / "adapted").items()
    assert set(json_of(folder / "measuring/adapted/numbers.json")["numbers"]) == {"knn", "probe", "head"}
    (folder / "result.json").unlink()
    state = json_of(folder / "measuring/adapted/numbers.json")
    state["numbers"]["knn"]["knn5"] = 0.125
    (folder / "measuring/adapted/numbers.json").write_text(json.dumps(state))
    train(config, "run.name=smaller", "run.resume=true")
    assert json_of(folder / "result.json")["adapted"]["knn5"] == 0.125
    assert not (folder / "measuring").exists()


def test_a_run_is_measured_in_bf16_where_it_is_asked_to(config: Path) -> None:
    """Masks are those of a run that is measured in float32; what is embedded is rounded to bf16."""
    short = ("train.max_steps=2", "eval.probe=false", "eval.keep_embeddings=true")
    plain = train(config, *short, "run.name=in-float32")
    folder = train(config, *short, "run.name=in-bf16", "eval.precision=bf16")
    numbers, masks = [json_of(one / "result.json") for one in (plain, folder)], []
    assert numbers[0]["adapted"].keys() == numbers[1]["adapted"].keys() >= {"knn5", "head"}
    for one in (plain, folder):
        masks.append(read_mask_file(one / "final.mask").masks["default"].bits)
    assert all(bits.equal(masks[1][name]) for name, bits in masks[0].items())
    for view in ("frozen", "adapted"):
        stores = [EmbeddingStore.open(one / "measuring" / view / "test") for one in (plain, folder)]
        assert [store.provenance["precision"] for store in stores] == ["float32", "bf16"]
        expected, found = (store.read_slice().features for store in stores)
        assert not found.equal(expected)
        assert (found - expected).norm() < 0.02 * expected.norm()
