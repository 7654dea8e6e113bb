"""Shards that are elsewhere (http, s3, ... through fsspec): read in ranges, or whole through a node's cache.

Knows shards by address, and nothing of samples. The cache is a folder of whole shards that all processes of a
node share: a shard is fetched under a temporary name by one process while the others wait, then renamed; the
ones used longest ago make room.

    size of the cache <= max_bytes,  as long as one shard fits

What a server answers badly is one sample's trouble; a server that does not answer at all, after several
attempts, is `NetworkLostError`: nothing is wrong with the data or the run, which is to be started again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from selfmask_dist.common.files import replacing
from selfmask_dist.common.optional import MissingLibraryError, install_command, require

_ATTEMPTS = 4
_PASSING = (408, 425, 429)  # of the statuses 400 to 499, those that may be another one in a moment
_EXTRA = "fsspec[http,s3]"  # what selfmask_dist[remote] installs
_EXTRA_HOLDS = ("http", "https", "s3")  # the protocols that are readable with it
T = TypeVar("T")


class NetworkLostError(RuntimeError):
    """Shards cannot be reached for now; the message names one. A restart may find them again."""


class _LostError(OSError):
    """The same of one request, which is worth another attempt."""


class _NoRangesError(OSError):
    """A server sends whole files where ranges are asked for; asking again changes nothing."""


class _UntrustedError(OSError):
    """A server's certificate is not known here; asking again changes nothing."""


def is_remote(path: str) -> bool:
    """Return whether a path is an address such as s3://bucket/folder."""
    return "://" in path


class RangeStorage:
    """Reads the bytes of one sample at a time. Good where samples are far apart or disks are small."""

    def __init__(self, urls: Sequence[str], options: dict[str, Any] | None = None) -> None:
        self._urls, self._options = list(urls), dict(options or {})

    def read_many(
        self, shards: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]
    ) -> list[bytes | OSError]:
        """Ask for all ranges at once: where fsspec can do that, the network's latency is waited for once.

        What fails is asked for again, up to four times. Returns the bytes, or the last error, of each.

        Raises:
            NetworkLostError: the last error is of the network, and not of one shard.
        """
        found: list[bytes | OSError] = [OSError("not read")] * len(shards)
        waiting = list(range(len(shards)))
        for attempt in range(_ATTEMPTS):
            answers = self._fetch(
                [self._urls[shards[i]] for i in waiting],
                [offsets[i] for i in waiting],
                [lengths[i] for i in waiting],
            )
            for i, answer in zip(waiting, answers, strict=True):
                found[i] = answer
            waiting = [i for i in waiting if _is_worth_another_attempt(found[i])]
            if not waiting:
                break
            if attempt < _ATTEMPTS - 1:
                _pause(attempt)
        _raise_lost(found)
        return found

    def _fetch(
        self, urls: Sequence[str], offsets: Sequence[int], lengths: Sequence[int]
    ) -> list[bytes | OSError]:
        files, _ = _file_system(urls[0], self._options)
        ends = [offset + length for offset, length in zip(offsets, lengths, strict=True)]
        answers = files.cat_ranges(list(urls), list(offsets), ends, on_error="return")
        return [
            _checked(url, answer, length) for url, answer, length in zip(urls, answers, lengths, strict=True)
        ]

    def close(self) -> None:
        """fsspec keeps its own connections, one set for each process."""


class CachedStorage:
    """Reads from whole shards in a folder on this node's disk, fetched when they are first needed.

    sizes: bytes of each shard; one that arrives with another size is refused.
    max_bytes: of the folder. Raises ValueError where a single shard would not fit.
    """

    def __init__(
        self,
        urls: Sequence[str],
        sizes: Sequence[int],
        *,
        folder: str | Path,
        max_bytes: int,
        options: dict[str, Any] | None = None,
    ) -> None:
        if sizes and max(sizes) > max_bytes:
            raise ValueError(
                f"the cache may hold {max_bytes} bytes and the largest shard has {max(sizes)}; allow more,"
                " or read in ranges"
            )
        self._urls, self._sizes, self._options = list(urls), list(sizes), dict(options or {})
        self.folder, self.max_bytes = Path(folder), max_bytes

    def read_many(
        self, shards: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]
    ) -> list[bytes | OSError]:
        """Read from local copies, each fetched first where it is absent; returns bytes or an error each.

        Raises:
            NetworkLostError: one that is absent cannot be fetched, as its server is not to be reached.
        """
        found: list[bytes | OSError] = []
        for place in zip(shards, offsets, lengths, strict=True):
            try:
                found.append(self._read(*place))
            except OSError as error:
                found.append(error)
                _raise_lost(found[-1:])
        return found

    def _read(self, shard: int, offset: int, length: int) -> bytes:
        while True:
            path = self.path(shard)
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # another process made room between the look and the opening
            try:
                return os.pread(descriptor, length, offset)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """Nothing is held open."""

    def path(self, shard: int) -> Path:
        """Return the path of the local copy, which is fetched first where it is absent."""
        path = self.folder / self._name(shard)
        if not path.exists():
            self._fetch(shard, path)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)  # used now: the last to go
        return path

    def _name(self, shard: int) -> str:
        url = self._urls[shard]
        return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{url.rpartition('/')[2]}"

    def _fetch(self, shard: int, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if path.exists():
                return  # another process was faster
            self._make_room(self._sizes[shard])
            url, size = self._urls[shard], self._sizes[shard]
            with replacing(path, sync=True) as partial:
                _with_attempts(lambda: self._copy(url, partial))
                if (found := partial.stat().st_size) != size:
                    raise OSError(f"{url} has {found} bytes, and {size} were indexed")

    def _copy(self, url: str, target: Path) -> None:
        files, remote = _file_system(url, self._options)
        source: BinaryIO
        with _naming_lost(url):
            source = files.open(remote, "rb")
        with source, open(target, "wb") as file:
            while True:
                with _naming_lost(url):
                    chunk = source.read(1 << 20)
                if not chunk:
                    break
                file.write(chunk)  # whose errors are this node's own, such as a full disk

    def _make_room(self, size: int) -> None:
        for left_over in self.folder.glob(".*.partial"):  # of a process that was killed: the lock is ours
            left_over.unlink()
        kept = sorted(
            (path.stat().st_mtime_ns, path.stat().st_size, path)
            for path in self.folder.iterdir()
            if not path.name.startswith(".")
        )
        total = sum(length for _, length, _ in kept)
        for _, length, path in kept:
            if total + size <= self.max_bytes:
                break
            path.unlink()
            total -= length

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the process ends, however it ends
            yield


def fetch_bytes(url: str, options: dict[str, Any] | None = None) -> bytes:
    """Return the bytes of a whole small file.

    Raises:
        NetworkLostError: its server is not to be reached.
        ValueError: it cannot be had.
    """

    def fetch() -> bytes:
        files, path = _file_system(url, options or {})
        with _naming_lost(url):
            data: bytes = files.cat_file(path)
        return data

    try:
        return _with_attempts(fetch)
    except _LostError as error:
        raise NetworkLostError(str(error)) from error
    except _UntrustedError as error:
        raise ValueError(str(error)) from error
    except OSError as error:
        raise ValueError(
            f"{url} cannot be read ({error}); index the data where it lies, with selfmask data index, and"
            " copy the index with its tars"
        ) from error


def _file_system(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and the path that the address has in it.

    Raises:
        MissingLibraryError: fsspec, or the library that it needs for this protocol, is not installed.
    """
    protocol = url.partition("://")[0]
    is_held = protocol in _EXTRA_HOLDS
    fsspec = require("fsspec", _EXTRA if is_held else "fsspec", extra="remote", needed_by=url)
    try:
        files, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:  # fsspec is there, and for example s3fs is not
        package = _EXTRA if is_held else f"fsspec[{protocol}]"
        held = " (the extra `remote` of selfmask_dist holds it)" if is_held else ""
        raise MissingLibraryError(
            f"{url} cannot be opened: {error}; bring it in with `{install_command(package)}`{held}"
        ) from error
    return files, path


def _checked(url: str, answer: Any, length: int) -> bytes | OSError:
    """Return what a file system answered in one of the two ways that a storage may: bytes, or an OSError."""
    if isinstance(answer, BaseException):
        return _named(url, answer)
    if len(answer) > length:
        return _NoRangesError(f"{url}: its server does not serve ranges; read whole shards through a cache")
    return bytes(answer)


def _named(url: str, error: BaseException) -> OSError:
    """Return an error of a file system as one that tells whether the network or the file is at fault."""
    of_the_file = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    status = getattr(error, "status", None)  # aiohttp's, whose errors are no OSErrors for the most part
    is_refusal = isinstance(status, int) and 400 <= status < 500 and status not in _PASSING
    if isinstance(error, OSError) and (isinstance(error, of_the_file) or not _leaves_machine(url)):
        return error
    told = f"{url} cannot be read ({type(error).__name__}: {error})"
    if isinstance(error, ssl.SSLCertVerificationError) or hasattr(error, "certificate_error"):  # aiohttp's
        return _UntrustedError(
            f"{told}; a server of your own is trusted where the environment variable SSL_CERT_FILE names a "
            "file with its authority's certificate"
        )
    return OSError(told) if is_refusal else _LostError(told)


def _leaves_machine(url: str) -> bool:
    """Return whether an address leads over a network, and not to this machine's files or memory."""
    return not url.startswith(("file://", "local://", "memory://"))


@contextmanager
def _naming_lost(url: str) -> Iterator[None]:
    try:
        yield
    except (MissingLibraryError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise _named(url, error) from error


def _raise_lost(found: Sequence[bytes | OSError]) -> None:
    lost = next((answer for answer in found if isinstance(answer, _LostError)), None)
    if lost is not None:
        raise NetworkLostError(
            f"{lost}; after {_ATTEMPTS} attempts. The run is to be started again"
        ) from lost


def _is_worth_another_attempt(answer: bytes | OSError) -> bool:
    """Return whether to ask again: networks fail now and then, but a file that is absent stays absent."""
    return isinstance(answer, OSError) and not isinstance(
        answer, FileNotFoundError | _NoRangesError | _UntrustedError
    )


def _pause(attempt: int) -> None:
    time.sleep(0.1 * 4**attempt)


def _with_attempts(fn: Callable[[], T]) -> T:
    for attempt in range(_ATTEMPTS):
        try:
            return fn()
        except OSError as error:
            if attempt == _ATTEMPTS - 1 or not _is_worth_another_attempt(error):
                raise
            _pause(attempt)
    raise AssertionError
