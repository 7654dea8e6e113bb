"""Checkpoints: what is loaded is a whole step or nothing, damage is named, and a run goes on bit for bit."""

import gc
import json
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import timm  # noqa: F401 (so that the ranks' server has it too)
import torch
from safetensors.torch import load_file

from selfmask_dist.cli import main
from selfmask_dist.cli.train import run
from selfmask_dist.config import load_config
from selfmask_dist.maskfile import read_mask_file
from selfmask_dist.parallel.parts import whole_parts
from selfmask_dist.runs import checkpoint
from selfmask_dist.runs.checkpoint import (
    Checkpoint,
    CheckpointError,
    Retention,
    Saver,
    committed,
    load_newest,
    prune,
    read_checkpoint,
    saving,
    verify,
    write_checkpoint,
)
from tests.support.distributed import run_distributed
from tests.support.tiny_run import write_config, write_tiny_data


def make(step: int, **metrics: float) -> Checkpoint:
    """Every tensor and the values hold the step, so a mixture of two shows."""
    tensors = {f"parameters/{name}": torch.full((7, 11), float(step)) for name in "abc"}
    tensors["statistics/n"] = torch.tensor(step)
    tensors["momentum/half"] = torch.full((3,), step, dtype=torch.bfloat16)
    return Checkpoint(tensors, {"step": step, "metrics": metrics})


def step_in(loaded: Checkpoint) -> int:
    steps = {
        int(value) for tensor in loaded.tensors.values() for value in tensor.reshape(-1).float().tolist()
    }
    assert steps == {loaded.values["step"]}
    return steps.pop()


# ---- one process writing files


def test_what_is_read_is_what_was_written(tmp_path: Path, generator: torch.Generator) -> None:
    tensors = {
        "float32": torch.randn(5, 3, generator=generator),
        "float64": torch.randn(2, generator=generator).double(),
        "int64": torch.tensor(2**60 + 1),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    values = {"position": {"step": 3}, "share": 0.1}
    path = write_checkpoint(tmp_path, Checkpoint(tensors, values), step=3)
    loaded = read_checkpoint(path)
    assert loaded.values == values
    assert set(loaded.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded.tensors[name].dtype == tensor.dtype
        assert torch.equal(
            loaded.tensors[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )


def test_the_newest_is_loaded_and_a_step_saved_twice_gets_a_fresh_directory(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    paths = [write_checkpoint(tmp_path, make(step), step=step) for step in (1, 2, 2)]
    assert len({*paths}) == 3
    found = load_newest(tmp_path)
    assert found is not None
    assert found[1] == paths[-1]
    assert step_in(found[0]) == 2


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "tensors.json", "values.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "empty"])
def test_damage_is_named_set_aside_and_the_one_before_is_loaded(
    tmp_path: Path, name: str, damage: str
) -> None:
    write_checkpoint(tmp_path, make(1), step=1)
    path = write_checkpoint(tmp_path, make(2), step=2)
    data = bytearray((path / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
    (path / name).write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
    if damage == "delete":
        (path / name).unlink()
    if damage == "empty":
        (path / name).write_bytes(b"")
    assert any(name in problem for problem in verify(path))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read_checkpoint(path)
    said: list[str] = []
    found = load_newest(tmp_path, report=said.append)
    assert found is not None
    assert step_in(found[0]) == 1
    assert "step-000000002" in said[0]
    assert name in said[0]
    assert [aside.name for aside in tmp_path.glob("invalid-*")] == [Path(said[1].split()[4]).name]


def test_every_single_bit_of_a_small_file_counts(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, make(2), step=2)
    for name in ("values.json", "manifest.json"):
        data = (path / name).read_bytes()
        for index in range(0, len(data), 7):
            (path / name).write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
            assert verify(path), (name, index)
        (path / name).write_bytes(data)
    assert not verify(path)


def test_what_was_not_committed_is_not_loaded(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path, make(1), step=1)
    second = write_checkpoint(tmp_path, make(2), step=2)
    (tmp_path / "latest").write_text(first.name + "\n")  # killed between the two renames of step 2
    shutil.copytree(second, tmp_path / ".step-000000003.partial")
    assert committed(tmp_path) == [first]
    prune(tmp_path, Retention(last=5))
    assert {path.name for path in tmp_path.iterdir()} == {"latest", first.name}


@pytest.mark.parametrize("pointer", [b"step-000000009\n", b"\xff\xfe", b"", None])
def test_a_damaged_pointer_costs_nothing(tmp_path: Path, pointer: bytes | None) -> None:
    path = write_checkpoint(tmp_path, make(1), step=1)
    if pointer is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_bytes(pointer)
    assert committed(tmp_path) == [path]


def test_retention(tmp_path: Path) -> None:
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.3), (5, 0.4), (6, 0.5)):
        write_checkpoint(tmp_path, make(step, knn=score), step=step)
    prune(tmp_path, Retention(last=1, every=4, metric="knn"))
    assert [checkpoint.step_of(path) for path in committed(tmp_path)] == [6, 4, 2]
    prune(tmp_path, Retention(last=1, metric="no such"))
    assert [checkpoint.step_of(path) for path in committed(tmp_path)] == [6]


def test_a_failed_save_is_reported_and_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    saver = Saver(tmp_path, Retention(), on_failure=said.append)
    saver.save(whole_parts(make(1).tensors), make(1).values, step=1)
    saver.finish()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_text", full)
    saver.save(whole_parts(make(2).tensors), make(2).values, step=2)
    saver.finish()
    assert "step 2 could not be saved" in said[0]
    assert "No space left" in said[0]
    found = load_newest(tmp_path)
    assert found is not None
    assert step_in(found[0]) == 1
    assert not list(tmp_path.glob(".step-*"))


def test_the_memory_of_a_copied_state_is_given_back(tmp_path: Path) -> None:
    """A measurement behind the last save does not lie beside it; and one may save again."""
    saver = Saver(tmp_path, Retention(), on_failure=pytest.fail)
    saver.save(whole_parts(make(1).tensors), make(1).values, step=1)
    copied = weakref.ref(saver._staging._buffer)
    assert copied() is not None
    saver.close()
    gc.collect()
    assert copied() is None
    saver.save(whole_parts(make(2).tensors), make(2).values, step=2)
    saver.close()
    found = load_newest(tmp_path)
    assert found is not None
    assert step_in(found[0]) == 2


def test_a_full_disk_inside_the_writer_is_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(tmp_path, make(1), step=1)
    assert committed(tmp_path) == []


# ---- a run that goes on


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def config_of(folder: Path, data: dict[str, str], **sections: Any) -> Path:
    optim = {"score_lr": 500.0, "head_lr": 0.05, **sections.pop("optim", {})}
    train = {"epochs": 3, "global_batch_size": 12, **sections.pop("train", {})}
    return write_config(folder / "tiny.yaml", data, optim=optim, train=train, **sections)


def train(path: Path, overrides: list[str]) -> None:
    run(load_config(path, overrides))


def train_on(world_size: int, path: Path, overrides: list[str]) -> None:
    if world_size == 1:
        train(path, overrides)
    else:
        run_distributed(train, world_size, path, overrides, backend="", timeout=240.0)


def outcome(folder: Path) -> dict[str, Any]:
    masks = read_mask_file(folder / "final.mask").masks["default"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "masks": masks,
        "mask bytes": (folder / "final.mask").read_bytes(),
        "head": load_file(folder / "head.safetensors"),
        "losses": [(line["step"], line["loss"]) for line in lines if "loss" in line],
    }


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["losses"] == second["losses"]
    assert first["mask bytes"] == second["mask bytes"]
    for name, tensor in first["head"].items():
        assert torch.equal(tensor, second["head"][name]), name


def cut_back(folder: Path, step: int) -> None:
    """As if the run had been killed when `step` was the newest checkpoint."""
    for path in committed(folder / "checkpoints"):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)
    for name in ("result.json", "final.mask", "head.safetensors"):
        (folder / name).unlink()


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, tiny_data: dict[str, str], world_size: int
) -> None:
    path = config_of(tmp_path, tiny_data)
    keep = ["checkpoint.every_steps=1", "checkpoint.keep_last=100", "run.log_every=2", "run.name=a"]
    train_on(world_size, path, keep)
    expected = outcome(tmp_path / "a")
    # in an epoch, at its end, and where a log line is half full; other ranks only add other sums
    for step in (11, 4, 1) if world_size == 1 else (5,):
        cut_back(tmp_path / "a", step)
        train_on(world_size, path, [*keep, "run.resume=true"])
        assert_same(outcome(tmp_path / "a"), expected)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 64
    path.write_bytes(data)


def test_nothing_of_a_checkpoint_that_is_damaged_in_one_ranks_file_reaches_the_masks(
    tmp_path: Path, tiny_data: dict[str, str]
) -> None:
    path = config_of(tmp_path, tiny_data)
    keep = ["checkpoint.every_steps=1", "checkpoint.keep_last=100", "engine.name=bits", "run.name=a"]
    train_on(2, path, keep)
    expected, checkpoints = outcome(tmp_path / "a"), tmp_path / "a" / "checkpoints"
    cut_back(tmp_path / "a", 5)
    flip_a_byte(committed(checkpoints)[0] / "rank-00001.safetensors")
    (committed(checkpoints)[1] / "rank-00000.safetensors").write_bytes(b"short")
    train_on(2, path, [*keep, "run.resume=true"])
    assert_same(outcome(tmp_path / "a"), expected)
    events = [json.loads(line) for line in (tmp_path / "a" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [3]
    assert not any(event["event"] == "failed" for event in events)
    notes = [event["text"] for event in events if event["event"] == "note" and "checkpoint" in event["text"]]
    assert len(notes) == 1
    assert "rank-00001.safetensors is not what was written (checksum): going on from" in notes[0]
    assert len(list(checkpoints.glob("invalid-*"))) == 2
    # none is left: the run begins anew, with other processes
    cut_back(tmp_path / "a", 2)
    for one in committed(checkpoints):
        flip_a_byte(one / "rank-00001.safetensors")
    train(path, [*keep, "run.resume=true", "engine.name=ddp"])
    torch.testing.assert_close(outcome(tmp_path / "a")["losses"], expected["losses"], rtol=1e-6, atol=1e-7)
    assert len(list(checkpoints.glob("invalid-*"))) == 4


def test_batch_norm_statistics_and_a_masked_head_are_part_of_the_state(
    tmp_path: Path, tiny_data: dict[str, str]
) -> None:
    backbone = {"name": "timm:test_resnet", "kwargs": {}, "image_size": 32}
    path = config_of(tmp_path, tiny_data, backbone=backbone, objective={"head": "masked"})
    keep = ["checkpoint.every_steps=1", "checkpoint.keep_last=100", "run.name=a"]
    train(path, keep)
    expected = outcome(tmp_path / "a")
    cut_back(tmp_path / "a", 5)
    train(path, [*keep, "run.resume=true"])
    assert_same(outcome(tmp_path / "a"), expected)


@pytest.mark.parametrize(
    "starts",
    [
        pytest.param(((4, "ddp"), (2, "ddp"), (1, "ddp"), (4, "ddp")), id="4-2-1-4", marks=pytest.mark.slow),
        pytest.param(
            ((2, "ddp"), (2, "fsdp"), (2, "bits"), (2, "ddp")), id="ddp-fsdp-bits-ddp", marks=pytest.mark.slow
        ),
        pytest.param(((1, "bits"), (4, "fsdp"), (2, "bits"), (1, "ddp")), id="both"),
    ],
)
def test_another_world_size_and_engine_go_on_with_the_same_samples(
    tmp_path: Path, tiny_data: dict[str, str], starts: tuple[tuple[int, str], ...]
) -> None:
    path = config_of(tmp_path, tiny_data, optim={"score_lr": 20.0})
    keep = ["checkpoint.every_steps=1", "checkpoint.keep_last=100"]
    train_on(1, path, [*keep, "run.name=whole"])
    expected = outcome(tmp_path / "whole")
    for index, (world_size, engine) in enumerate(starts):
        if index:
            cut_back(tmp_path / "a", 3 * index)
        train_on(
            world_size, path, [*keep, "run.name=a", f"engine.name={engine}", f"run.resume={bool(index)}"]
        )
    steps, losses = zip(*outcome(tmp_path / "a")["losses"], strict=True)
    assert steps == tuple(range(1, 13))
    # atol: rounding of logits near 1, where the loss itself is near 0.01
    torch.testing.assert_close(
        torch.tensor(losses, dtype=torch.float64),
        torch.tensor([loss for _, loss in expected["losses"]], dtype=torch.float64),
        rtol=1e-6,
        atol=1e-7,
    )


def test_frozen_weights_are_not_saved(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    train(config_of(tmp_path, tiny_data), ["run.name=a"])
    loaded = read_checkpoint(committed(tmp_path / "a" / "checkpoints")[0])
    names = {name for name in loaded.tensors if name.startswith("parameters/")}
    assert "parameters/encoder.blocks.0.attn.qkv.weight" in names  # its scores
    assert not any("norm" in name or "pos_embed" in name or "patch_embed" in name for name in names)
    assert set(loaded.tensors) == names | {name.replace("parameters/", "momentum/") for name in names}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (["optim.score_lr=7"], r"optim\.score_lr=500"),
        (["seed=3"], "seed=0"),
        (["train.global_batch_size=6"], r"train\.global_batch_size=12"),
    ],
)
def test_a_resume_with_other_science_is_refused(
    tmp_path: Path,
    tiny_data: dict[str, str],
    change: list[str],
    complaint: str,
) -> None:
    path = config_of(tmp_path, tiny_data, train={"max_steps": 1})
    train(path, ["run.name=a"])
    with pytest.raises(ValueError, match=complaint):
        train(path, ["run.name=a", "run.resume=true", *change])


def test_another_backbone_is_refused(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    path = config_of(tmp_path, tiny_data, train={"max_steps": 2})
    train(path, ["run.name=a"])
    (tmp_path / "a" / "result.json").unlink()
    newest = committed(tmp_path / "a" / "checkpoints")[0]
    loaded = read_checkpoint(newest)
    loaded.values["identity"]["backbone"] = "0" * 64
    write_checkpoint(newest.parent, loaded, step=2)
    with pytest.raises(ValueError, match="another run: backbone was '0000"):
        train(path, ["run.name=a", "run.resume=true"])


def test_changed_training_data_is_refused_and_the_change_named(
    tmp_path: Path, tiny_data: dict[str, str]
) -> None:
    path = config_of(tmp_path, tiny_data, train={"max_steps": 2})
    train(path, ["run.name=a"])
    (tmp_path / "a" / "result.json").unlink()
    newest = committed(tmp_path / "a" / "checkpoints")[0]
    loaded = read_checkpoint(newest)
    loaded.values["data"]["data"]["labels"] = "0" * 16
    write_checkpoint(newest.parent, loaded, step=2)
    with pytest.raises(ValueError, match=r"training data is not what it was .*its labels changed"):
        train(path, ["run.name=a", "run.resume=true"])


def test_a_finished_run_is_not_trained_again(tmp_path: Path, tiny_data: dict[str, str]) -> None:
    path = config_of(tmp_path, tiny_data, train={"max_steps": 1})
    train(path, ["run.name=a"])
    before = (tmp_path / "a" / "final.mask").stat().st_mtime_ns
    train(path, ["run.name=a", "run.resume=true"])
    assert (tmp_path / "a" / "final.mask").stat().st_mtime_ns == before


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        write_checkpoint(folder, make(step), step=step)
    assert main(["checkpoints", "list", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("step-") == 3
    assert main(["checkpoints", "verify", str(tmp_path)]) == 0
    (folder / "step-000000002" / "values.json").write_text("{}")
    assert main(["checkpoints", "verify", str(tmp_path)]) == 1
    assert "values.json has 2 bytes" in capsys.readouterr().out
    assert main(["checkpoints", "prune", str(tmp_path), "--keep", "1"]) == 0
    assert [path.name for path in committed(folder)] == ["step-000000003"]
    assert main(["checkpoints", "list", str(tmp_path / "no")]) == 2
