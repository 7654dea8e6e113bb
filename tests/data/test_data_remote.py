"""Remote shards: the same samples in ranges and through a cache that keeps its bound and survives kills."""

import contextlib
import functools
import http.server
import multiprocessing
import os
import pickle
import shutil
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from selfmask_dist.data import SampleError, open_source
from selfmask_dist.data.build import build_index
from selfmask_dist.data.remote import CachedStorage
from tests.support.resuming import KEEP, check_resumed_equals_whole, losses_of, train
from tests.support.tars import numbered_tars, picture
from tests.support.tiny_run import write_config, write_tiny_data

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")


@pytest.fixture
def url(tmp_path: Path) -> str:
    folder = tmp_path / "there"
    folder.mkdir()
    build_index(numbered_tars(folder))
    return f"file://{folder}"


@pytest.mark.parametrize("is_cached", [False, True])
def test_remote_samples_are_the_local_ones(url: str, tmp_path: Path, is_cached: bool) -> None:
    cache = tmp_path / "cache" if is_cached else None
    data = open_source(url, cache=cache)
    local = open_source(url.removeprefix("file://"))
    assert data.identity == local.identity
    copy = pickle.loads(pickle.dumps(data))
    for i in (0, 22, 5):
        assert copy.read(i) == data.read(i) == local.read(i)
    if cache is not None:
        assert len([path for path in cache.iterdir() if path.suffix == ".tar"]) == 2


def test_the_cache_keeps_its_bound_and_drops_what_was_used_longest_ago(tmp_path: Path) -> None:
    there, cache = tmp_path / "there", tmp_path / "cache"
    there.mkdir()
    for number in range(4):
        (there / f"{number}.tar").write_bytes(bytes([number]) * 1000)
    urls = [f"file://{there}/{number}.tar" for number in range(4)]
    storage = CachedStorage(urls, [1000] * 4, folder=cache, max_bytes=2500)
    (cache).mkdir()
    (cache / ".x.tar.partial").write_bytes(b"of a process that was killed")
    held = []
    for shard in (0, 1, 0, 2, 0, 3):
        assert storage.read_many([shard], [10], [5]) == [bytes([shard]) * 5]
        held.append(sorted(path.name[-5] for path in cache.glob("*.tar")))
        assert sum(path.stat().st_size for path in cache.iterdir()) <= 2500
    assert held == [["0"], ["0", "1"], ["0", "1"], ["0", "2"], ["0", "2"], ["0", "3"]]
    with pytest.raises(ValueError, match="largest shard has 1000"):
        CachedStorage(urls, [1000] * 4, folder=cache, max_bytes=999)


def test_what_arrives_otherwise_than_indexed_is_refused(url: str, tmp_path: Path) -> None:
    data = open_source(url, cache=tmp_path / "cache")
    tar = Path(url.removeprefix("file://")) / "a.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-512])
    with pytest.raises(SampleError, match=r"a\.tar has \d+ bytes, and \d+ were indexed"):
        data.read(0)
    tar.write_bytes(whole.replace(picture(0), picture(0)[:-2] + b"xx"))
    with pytest.raises(SampleError, match="crc32"):
        data.read(0)
    assert data.read(1).data == picture(1)


def test_a_remote_folder_without_an_index_is_told(tmp_path: Path) -> None:
    numbered_tars(tmp_path)
    with pytest.raises(ValueError, match=r"samples\.index cannot be read.*selfmask data index"):
        open_source(f"file://{tmp_path}")


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """A web server that serves ranges, as object stores do; each first request for a tar fails."""

    serves_ranges = True
    asked: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        if asked is None or not self.serves_ranges:
            return super().do_GET()
        if self.path not in self.asked:
            self.asked.add(self.path)
            return self.send_error(503)
        first, last = map(int, asked.removeprefix("bytes=").split("-"))
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def log_message(self, *_: object) -> None:
        """Silent."""


def test_a_real_web_server_in_ranges_and_through_the_cache(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp", reason="fsspec's http needs aiohttp")
    there = url.removeprefix("file://")
    local = open_source(there)
    handler = functools.partial(_Ranges, directory=there)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        everything = np.arange(23)
        assert open_source(address).read_many(everything) == local.read_many(everything)
        assert len(_Ranges.asked) == 2, "both tars failed once and were asked for again"
        cached = open_source(address, cache=tmp_path / "cache")
        assert cached.read_many(everything) == local.read_many(everything)
        monkeypatch.setattr(_Ranges, "serves_ranges", False)
        with pytest.raises(SampleError, match="does not serve ranges"):
            open_source(address).read(0)
        server.shutdown()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A bucket on an S3 server of this machine, whose address is in the environment."""
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: selfmask_dist[remote]")
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip("moto_server is not on the path: pip install 'moto[s3,server]' in any environment")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    for name, value in {"ENDPOINT_URL": address, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        yield "bucket"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_real_s3_server_in_ranges_and_through_the_cache(url: str, bucket: str, tmp_path: Path) -> None:
    local = open_source(url.removeprefix("file://"))
    files = fsspec.filesystem("s3")
    files.put(url.removeprefix("file://"), f"{bucket}/set", recursive=True)
    address, everything = f"s3://{bucket}/set", np.arange(23)
    ranges, cached = open_source(address), open_source(address, cache=tmp_path / "cache")
    for data in (ranges, cached, pickle.loads(pickle.dumps(ranges))):
        assert data.identity == local.identity
        assert data.read_many(everything) == local.read_many(everything)
    files.rm(f"{bucket}/set/a.tar")
    fsspec.filesystem("s3").invalidate_cache()
    with pytest.raises(SampleError, match=r"a\.tar"):
        ranges.read(0)
    assert cached.read(0) == local.read(0), "it is here"
    with pytest.raises(ValueError, match=r"s3://bucket/none/samples\.index cannot be read"):
        open_source(f"s3://{bucket}/none")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_run_from_s3_through_the_nodes_cache_goes_on_bit_for_bit(bucket: str, tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path)
    files = fsspec.filesystem("s3")
    for name, folder in data.items():
        build_index(folder)
        files.put(str(folder), f"{bucket}/{name}", recursive=True)
    path = write_config(tmp_path / "tiny.yaml", {name: f"s3://{bucket}/{name}" for name in data})
    cache = tmp_path / "node"
    keys = ["run.name=a", f"data.cache={cache}", "data.cache_gb=1", "engine.workers=2"]
    check_resumed_equals_whole(path, keys, tmp_path / "a", step=3)
    assert sorted(file.name.partition("-")[2] for file in cache.glob("*.tar"))
    local = write_config(tmp_path / "local.yaml", {name: str(folder) for name, folder in data.items()})
    train(local, [*KEEP, "run.name=b", "engine.workers=2"])
    assert losses_of(tmp_path / "b") == losses_of(tmp_path / "a")


def test_memory_file_system_in_ranges() -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/set/a.tar", bytes(range(200)))
    from selfmask_dist.data.remote import RangeStorage

    assert RangeStorage(["memory://set/a.tar"]).read_many([0], [20], [3]) == [bytes([20, 21, 22])]


def test_a_protocol_without_its_library_is_told_with_the_command_that_brings_it() -> None:
    fsspec.register_implementation(
        "absent", "absent_library.Files", errtxt="Install absent_library to read absent://", clobber=True
    )
    with pytest.raises(ValueError, match=r"absent://a.* Install absent_library .* 'fsspec\[absent\]'`"):
        open_source("absent://a/b")


def _read_all(storage: CachedStorage) -> bool:
    """Read every shard some times over, in an order of this process's own. In a process."""
    orders = np.random.default_rng(os.getpid()).integers(0, 6, 60)
    return all(storage.read_many([shard], [0], [4]) == [bytes([shard]) * 4] for shard in orders.tolist())


def test_several_processes_share_a_cache_that_holds_a_third_of_the_tars(tmp_path: Path) -> None:
    there, cache = tmp_path / "there", tmp_path / "cache"
    there.mkdir()
    for number in range(6):
        (there / f"{number}.tar").write_bytes(bytes([number]) * 1000)
    urls = [f"file://{there}/{number}.tar" for number in range(6)]
    storage = CachedStorage(urls, [1000] * 6, folder=cache, max_bytes=2000)
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which these processes do not use
        with context.Pool(3) as pool:
            assert pool.map(_read_all, [storage] * 3) == [True] * 3
    assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= 2000
    assert not list(cache.glob(".*.partial"))
