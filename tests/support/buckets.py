"""An S3 server of this machine: moto's, a process of its own."""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def serving_bucket(log: Path) -> Iterator[dict[str, str]]:
    """Serve S3 while the block lasts; yields the variables that lead fsspec to it. Skips without moto."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: selfmask_dist[remote]")
    program = shutil.which("moto_server")
    if program is None:
        pytest.skip("moto_server is not on the path: pip install 'moto[s3,server]' in any environment")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(log, "w") as stream:
        server = subprocess.Popen([program, "-H", "127.0.0.1", "-p", str(port)], stdout=stream, stderr=stream)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.terminate()
        server.wait()
