"""A web server of this machine that serves ranges and stops answering, and fsspec's http without aiohttp.

`install` lets every Python process with the folder on its path read http:// with urllib, from real sockets.
"""

import http.server
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FILES = """
import io
import urllib.error
import urllib.request

from fsspec.spec import AbstractFileSystem


class WebFiles(AbstractFileSystem):
    protocol = "http"

    @classmethod
    def _strip_protocol(cls, path):
        return path

    def _get(self, url, headers):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                raise FileNotFoundError(url) from None
            raise OSError(f"status {error.code}") from None

    def cat_file(self, path, start=None, end=None, **kwargs):
        return self._get(path, {} if start is None else {"Range": f"bytes={start}-{end - 1}"})

    def _open(self, path, mode="rb", **kwargs):
        return io.BytesIO(self._get(path, {}))
"""


class Web(http.server.ThreadingHTTPServer):
    """Serves a folder. asked: requests for tars so far; those of `is_down` are dropped without an answer."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.asked, self.is_down = folder, 0, range(0)
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        with self.server.lock:
            number, self.server.asked = self.server.asked, self.server.asked + self.path.endswith(".tar")
        if self.path.endswith(".tar") and number in self.server.is_down:
            self.close_connection = True
            return
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, asked = path.read_bytes(), self.headers.get("Range")
        if asked is not None:
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            data = data[first : last + 1]
        self.send_response(200 if asked is None else 206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def serving(folder: Path, *, certificate: Path | None = None) -> Iterator[Web]:
    """Serve a folder while the block lasts; over TLS with a file that holds a certificate and its key."""
    with Web(folder) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def write_certificate(path: Path) -> Path:
    """Write a certificate of this machine, signed by itself, and its key; SSL_CERT_FILE=path trusts it."""
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=127.0.0.1",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{path}.key", "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.key").read_text())
    return path


def install(folder: Path) -> Path:
    """Write a package that tells fsspec of it, and return the folder to put on the path."""
    described = folder / "selfmask_web-0.dist-info"
    described.mkdir(parents=True)
    (folder / "selfmask_web.py").write_text(_FILES)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: selfmask-web\nVersion: 0\n")
    (described / "entry_points.txt").write_text("[fsspec.specs]\nhttp = selfmask_web:WebFiles\n")
    return folder
