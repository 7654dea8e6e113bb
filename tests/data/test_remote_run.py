"""A run whose tars lie elsewhere, through a cache on its node: killed, and without a network for a while."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from selfmask_dist.data.build import build_index
from tests.support.buckets import serving_bucket
from tests.support.tiny_run import (
    child_environment,
    events_of,
    rank_process,
    steps_of,
    submit,
    submit_command,
    wait_until,
    write_config,
    write_tiny_data,
)
from tests.support.web import serving, write_certificate

pytestmark = pytest.mark.slow
fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")


@contextmanager
def elsewhere(kind: str, shards: Path, tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Serve a folder of tars; yields its address, and the variables of a process that reads it."""
    if kind == "s3":
        with serving_bucket(tmp_path / "server.log") as variables:
            code = "import sys, fsspec; f = fsspec.filesystem('s3'); f.mkdir('bucket'); "
            code += "f.put(sys.argv[1], 'bucket/set', recursive=True)"
            command = [sys.executable, "-W", "ignore", "-c", code, str(shards)]
            subprocess.run(command, env={**os.environ, **variables}, check=True)
            yield "s3://bucket/set", variables
        return
    pytest.importorskip("aiohttp", reason="fsspec's http needs aiohttp")
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to sign a certificate with")
    certificate = write_certificate(tmp_path / "certificate.pem")
    with serving(shards, certificate=certificate) as web:
        web.is_down = range(12)  # of the first start: no attempt of its processes gets a tar
        yield web.address.replace("http:", "https:"), {"SSL_CERT_FILE": str(certificate)}


@pytest.mark.parametrize("kind", ["s3", "https"])
def test_a_run_through_a_cache_is_killed_and_ends_in_the_mask_of_local_files(
    kind: str, tmp_path: Path
) -> None:
    data = write_tiny_data(tmp_path)
    for folder in data.values():
        build_index(folder)
    sections = {"train": {"epochs": 20, "global_batch_size": 12}, "optim": {"score_lr": 300.0}}
    here = write_config(tmp_path / "here" / "tiny.yaml", data, **sections)
    assert submit(here, nodes=2, timeout=600).returncode == 0
    with elsewhere(kind, tmp_path / "shards", tmp_path) as (address, variables):
        there = {name: f"{address}/{name}" for name in data}
        config = write_config(tmp_path / "there" / "tiny.yaml", there, **sections)
        keys = ["run.name=run", "checkpoint.every_steps=5", "launch.snapshot=false"]
        keys.append(f"data.cache={tmp_path / 'cache'}")
        launcher = subprocess.Popen(
            submit_command(config, *keys, nodes=2),
            env={**child_environment(), **variables},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        run = config.parent / "run"
        try:
            wait_until(lambda: len(steps_of(run)) > 20 or launcher.poll() is not None, 600)
            os.kill(rank_process(config.parent, 1, "run"), signal.SIGKILL)
            _, said = launcher.communicate(timeout=600)
        finally:
            launcher.kill()
    assert launcher.returncode == 0, said
    starts = [event["event"] for event in events_of(run)].count("start")
    assert starts >= 2
    if kind == "https":
        assert "cannot be read" in said, "the network was gone, which is a restart"
    assert list((tmp_path / "cache").rglob("*.tar"))
    assert (run / "final.mask").read_bytes() == (here.parent / "run" / "final.mask").read_bytes()
    assert steps_of(run) == steps_of(here.parent / "run"), "no step twice, none left out"
