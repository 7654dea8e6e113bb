"""A web server of this machine that serves ranges and stops answering."""

import datetime
import http.server
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Web(http.server.ThreadingHTTPServer):
    """Serves a folder. asked: requests for tars so far; those of `is_down` are dropped without an answer.

    certificate: a file with certificate and key, for https.
    """

    def __init__(self, folder: Path, certificate: Path | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.protocol = "http" if certificate is None else "https"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            # the handshake is the handling thread's: one that fails must not stop the server
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.folder, self.asked, self.is_down = folder, 0, range(0)
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"{self.protocol}://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Silent: a client that does not trust the certificate hangs up."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Web

    def do_HEAD(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(path.stat().st_size))
        return self.end_headers()

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
            whole = len(data)
            first, last = (int(word or whole) for word in asked.removeprefix("bytes=").split("-"))
            data = data[first : last + 1]
        self.send_response(200 if asked is None else 206)
        if asked is not None:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{whole}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def serving(folder: Path, certificate: Path | None = None) -> Iterator[Web]:
    """Serve a folder while the block lasts."""
    with Web(folder, certificate) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def write_certificate(path: Path) -> None:
    """Write a certificate of this machine's own, for 127.0.0.1, with its key: its authority is itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a server of our own")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    written = key.private_bytes(serialization.Encoding.PEM, form, plain)
    path.write_bytes(written + certificate.public_bytes(serialization.Encoding.PEM))
