"""Weights & Biases, read back from offline runs: groups, tags, final numbers, mask, charts; no network."""

import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from selfmask_dist.cli import main
from selfmask_dist.runs import tracking
from selfmask_dist.runs.metrics import MetricsWriter
from tests.support.tiny_run import result_of, wait_until, write_config, write_tiny_data


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")


def records(folder: Path) -> list[Any]:
    """Return all records of the offline runs of a folder, in order."""
    record = import_module("wandb.proto.wandb_internal_pb2").Record
    paths = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    return [record.FromString(data) for path in paths for data in messages(path.read_bytes())]


def messages(data: bytes) -> Iterator[bytes]:
    """Yield the records of LevelDB's log format: blocks of 32 KiB; checksum, length and kind before each."""
    place, parts = 7, b""  # after wandb's own header
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def items(updates: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for record in records(folder):
        if record.WhichOneof("record_type") == "summary":
            found |= items(record.summary.update)
    return found


def keys_of_history(folder: Path) -> set[str]:
    kinds = [record for record in records(folder) if record.WhichOneof("record_type") == "history"]
    return {key for record in kinds for key in items(record.history.item)}


def run_of(folder: Path) -> Any:
    return next(record.run for record in records(folder) if record.WhichOneof("record_type") == "run")


def masks_of(folder: Path) -> list[Any]:
    """Return the artifacts that are masks; tables are artifacts too."""
    found = [
        record.artifact
        if record.WhichOneof("record_type") == "artifact"
        else record.request.log_artifact.artifact
        for record in records(folder)
    ]
    return [artifact for artifact in found if artifact.type == "mask"]


def test_a_run(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path / "data")
    path = write_config(
        tmp_path / "tiny.yaml", data, run={"wandb": "offline", "progress": False, "log_every": 1}
    )
    keys = ["--config", str(path), "train.max_steps=3", "eval.frozen_baseline=true"]
    assert main(["train", *keys, "run.name=a"]) == 0
    run, result, summary = tmp_path / "a", result_of(tmp_path / "a"), summary_of(tmp_path / "a")
    assert summary["final/adapted/knn5"] == result["adapted"]["knn5"]
    assert summary["final/frozen/knn5"] == result["frozen"]["knn5"]
    assert summary["final/mask/bytes"] == result["mask"]["bytes"]
    assert "final/verdict" in summary
    tags = {"mask", "supervised", "timm:vit_tiny_patch16_224", "threshold"}
    assert set(run_of(run).tags) == tags
    keys_there = keys_of_history(run)
    assert {"loss", "mask/active", "mask/empty"} <= keys_there
    assert not [key for key in keys_there if "blocks." in key]  # no chart for each parameter
    assert [key for key in keys_there if key.startswith("mask/pruned_by_layer")]
    (artifact,) = masks_of(run)
    assert artifact.type == "mask"
    assert [entry.path for entry in artifact.manifest.contents] == ["final.mask"]


@pytest.mark.slow
def test_a_cascade_read_back_by_wandb_itself(tmp_path: Path) -> None:
    """`wandb leet inspect` is the reader of wandb's own core; no server, and nothing stands for it."""
    data = write_tiny_data(tmp_path / "data")
    keys = [f"data.train={data['train']}", f"data.test={data['test']}", f"run.dir={tmp_path}", "run.name=c"]
    keys += ["run.wandb=offline", "run.progress=false", "run.log_every=1", "engine.device=cpu"]
    assert main(["train", "--config", "debug_cascade", *keys]) == 0
    run, result = tmp_path / "c", result_of(tmp_path / "c")
    stages = ("dispatcher", "expert-0", "expert-1")
    read = {name: by_wandb(run / name) for name in ("", *stages)}

    runs = {name: of_kind(lines, "run")[0] for name, lines in read.items()}
    assert {one["run_group"] for one in runs.values()} == {"c"}
    assert [one["display_name"] for one in runs.values()] == ["c", *(f"c/{stage}" for stage in stages)]
    assert {one["run_id"] for one in of_kind(read[""], "run")} == {runs[""]["run_id"]}, "one run, three times"
    assert [one["job_type"] for one in runs.values()] == ["cascade", *stages]
    tags = {"swav", "timm:vit_tiny_patch16_224", "threshold"}
    assert set(runs[""]["tags"]) == {"cascade", *tags}
    assert all(set(runs[stage]["tags"]) == {"mask", *tags} for stage in stages)

    summary = merged(read[""], "summary", "update")
    views = {
        f"final/views/{view}/{name}": v for view, row in result["views"].items() for name, v in row.items()
    }
    assert {name: summary[name] for name in views} == views
    assert summary["final/mask/bytes"] == result["mask"]["bytes"] == (run / "cascade.mask").stat().st_size
    assert summary["final/verdict"] == (", ".join(one["name"] for one in result["verdict"]) or "none")

    (table,) = run.glob("wandb/offline-run-*/files/media/table/final/views_*.table.json")
    rows = json.loads(table.read_text())
    assert rows["columns"] == ["view", *next(iter(result["views"].values()))]
    assert {row[0]: row[1:] for row in rows["data"]} == {
        v: list(r.values()) for v, r in result["views"].items()
    }
    (picture,) = run.glob("wandb/offline-run-*/files/media/images/final/picture_*.png")
    assert picture.read_bytes() == (run / "cascade.png").read_bytes()
    history = merged(read[""], "history", "item")
    assert history["final/picture._type"] == "image-file"
    assert history["final/views._type"] == "table-file"

    (mask,) = [one for one in of_kind(read[""], "artifact") if one["type"] == "mask"]
    assert [entry["path"] for entry in mask["manifest"]["contents"]] == ["cascade.mask"]
    for stage in stages:
        charts = {key for key in merged(read[stage], "history", "item") if not key.startswith("_")}
        assert {"loss", "mask/active"} <= charts
        assert not [key for key in charts if "blocks." in key]
        drawn = {key.partition(".")[0] for key in charts if key.startswith("mask/pruned_by_layer")}
        assert len(drawn) == 1, drawn
        (mask,) = [one for one in of_kind(read[stage], "artifact") if one["type"] == "mask"]
        assert [entry["path"] for entry in mask["manifest"]["contents"]] == ["final.mask"]
        assert len(records(run / stage)) == len(read[stage]), "the quick reader above reads as wandb does"


def by_wandb(folder: Path) -> list[dict[str, Any]]:
    """Return the records of the offline runs of a folder as wandb's own reader gives them."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        found += [json.loads(line) for line in done.stdout.splitlines()]
    return found


def of_kind(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line[kind] for line in lines if line["type"] == kind]


def merged(lines: list[dict[str, Any]], kind: str, part: str) -> dict[str, Any]:
    return {key: value for entry in of_kind(lines, kind) for key, value in entry.get(part, {}).items()}


@pytest.mark.parametrize("kind", ["refused", "silent", "no such name"])
def test_without_network_it_is_offline_at_once_and_says_how_to_upload(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if kind == "silent":
            server.listen()  # takes connections, and never answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", "http://nowhere.invalid" if kind == "no such name" else url)
        directory = tmp_path / "a"
        directory.mkdir()
        start = time.monotonic()
        writer = MetricsWriter(directory, wandb_mode="online", config={"method": "mask"})
        assert time.monotonic() - start < 10
    with writer:
        writer.scalars(1, {"loss": 1.0})
    (folder,) = directory.glob("wandb/offline-run-*")
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("wandb: offline")]
    assert line.endswith(f"; upload later with `wandb sync {folder}`")
    wait_until(lambda: "loss" in keys_of_history(directory), seconds=20)


def test_a_server_that_refuses_is_one_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import http.server
    import threading

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert tracking.why_unreachable() == ""
