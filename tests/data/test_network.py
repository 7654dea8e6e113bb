"""Tars on a web server that stops answering: another attempt, and then a restart of the run, not a bug."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from selfmask_dist.data import NetworkLostError, SampleError, open_source
from selfmask_dist.data import remote as remote_module
from selfmask_dist.data.build import build_index
from selfmask_dist.runs.ending.leaving import status_of
from selfmask_dist.runs.exit_status import LOST
from tests.support.tars import numbered_tars
from tests.support.tiny_run import ROOT, child_environment, write_config, write_tiny_data
from tests.support.web import Web, serving, write_certificate

pytest.importorskip("aiohttp", reason="fsspec's http needs aiohttp: selfmask_dist[remote]")
EVERYTHING = np.arange(23)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server of two tars with their index, that this process reads."""
    monkeypatch.setattr(remote_module, "_pause", lambda attempt: None)
    (tmp_path / "set").mkdir()
    build_index(numbered_tars(tmp_path / "set"))
    with serving(tmp_path) as server:
        yield server


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_short_silence_is_waited_out_and_a_long_one_ends_the_process_as_a_lost_one_does(
    web: Web, tmp_path: Path, is_cached: bool
) -> None:
    local = open_source(tmp_path / "set")
    data = open_source(f"{web.address}/set", cache=tmp_path / "cache" if is_cached else None)
    web.is_down = range(23)  # every request of the first attempt
    if is_cached:
        web.is_down = range(3)
    assert data.read_many(EVERYTHING) == local.read_many(EVERYTHING)
    web.is_down = range(10**6)
    for path in (tmp_path / "cache").glob("*.tar"):
        path.unlink()
    with pytest.raises(NetworkLostError, match=r"set/a\.tar cannot be read .* started again") as caught:
        data.read_many(EVERYTHING)
    assert status_of(caught.value) == LOST
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value), "from a worker"
    web.is_down = range(0)
    assert data.read_many(EVERYTHING) == local.read_many(EVERYTHING)
    assert not list((tmp_path / "cache").glob(".*.partial"))


def test_what_is_not_there_is_the_samples_trouble_and_not_the_networks(web: Web, tmp_path: Path) -> None:
    data = open_source(f"{web.address}/set")
    (tmp_path / "set" / "a.tar").unlink()
    with pytest.raises(SampleError, match=r"a\.tar"):
        data.read(0)
    with pytest.raises(ValueError, match=r"none/samples\.index cannot be read"):
        open_source(f"{web.address}/none")
    address = web.address
    web.shutdown()
    web.server_close()
    with pytest.raises(NetworkLostError, match=r"samples\.index"):
        open_source(f"{address}/set")


def test_https_with_an_authority_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who trusts it says so by SSL_CERT_FILE, as for every program; anybody else is told, and not sent to
    start the run again.
    """
    pytest.importorskip("cryptography")
    monkeypatch.setattr(remote_module, "_pause", lambda attempt: pytest.fail("it asks again"))
    (tmp_path / "set").mkdir()
    local = open_source(build_index(numbered_tars(tmp_path / "set")).path.parent)
    certificate = tmp_path / "own.pem"
    write_certificate(certificate)
    with serving(tmp_path, certificate) as web:
        assert web.address.startswith("https://")
        with pytest.raises(ValueError, match=r"samples\.index cannot be read .*SSL_CERT_FILE"):
            open_source(f"{web.address}/set")
        # openssl reads the variable once, when aiohttp is imported
        program = "import sys; from selfmask_dist.data import open_source; data = open_source(sys.argv[1]); "
        program += "sys.stdout.buffer.write(b''.join(data.read(i).data for i in range(len(data))))"
        environment = child_environment(PYTHONPATH=str(ROOT), SSL_CERT_FILE=str(certificate))
        command = [sys.executable, "-c", program, f"{web.address}/set"]
        read = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    assert read == b"".join(local.read(i).data for i in range(23))


def test_tars_of_one_remote_folder_by_name_and_by_pattern(tmp_path: Path) -> None:
    build_index(numbered_tars(tmp_path))
    whole = open_source(tmp_path)
    for pattern, numbers in (("a.tar", range(15)), ("{a,b}.tar", range(23)), ("[b-z].tar", range(15, 23))):
        part = open_source(f"file://{tmp_path}/{pattern}")
        assert [part.read(i).data for i in range(len(part))] == [whole.read(i).data for i in numbers]
        assert part.classes == whole.classes
    with pytest.raises(ValueError, match=r"no tar of its index is called c\.tar; there are a\.tar, b\.tar"):
        open_source(f"file://{tmp_path}/{{a,c}}.tar")
    with pytest.raises(ValueError, match="name one folder"):
        open_source(f"file://{tmp_path}/{{x,y}}/a.tar")


@pytest.mark.slow
@pytest.mark.parametrize("is_cached", [False, True])
def test_a_run_that_loses_the_network_starts_again_and_ends_in_the_same_mask(
    tmp_path: Path, is_cached: bool
) -> None:
    data = write_tiny_data(tmp_path)
    for folder in data.values():
        build_index(folder)
    environment = child_environment(PYTHONPATH=str(ROOT))
    with serving(tmp_path / "shards") as web:
        config = write_config(tmp_path / "tiny.yaml", {name: f"{web.address}/{name}" for name in data})
        masks, said = [], ""
        for name in ("whole", "cut"):
            web.asked = 0
            # a batch of twelve pictures in all four attempts; through the cache, the first tar. aiohttp asks
            # once more by itself where an open connection is closed
            web.is_down = range(0) if name == "whole" else range(8) if is_cached else range(24, 120)
            words = [
                "launch.snapshot=false",
                f"run.name={name}",
                *([f"data.cache={tmp_path / name}-cache"] if is_cached else []),
            ]
            command = [sys.executable, str(ROOT / "launchers" / "submit.py"), "--cluster", "local"]
            done = subprocess.run(
                [*command, "--config", str(config), *words],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            said = done.stderr
            masks.append((tmp_path / name / "final.mask").read_bytes())
    assert masks[0] == masks[1]
    assert "cannot be read" in said
    assert "status 77" in said or "start" in said
