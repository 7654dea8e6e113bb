"""Small pictures and the tars that hold them, for tests."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, *, size: tuple[int, int] = (40, 30), mode: str = "RGB", kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], *, kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def labelled(keys: Iterable[str], *, classes: int = 3) -> list[tuple[str, bytes]]:
    return [
        member
        for number, key in enumerate(keys)
        for member in ((f"{key}.cls", str(number % classes).encode()), (f"{key}.jpg", picture(number)))
    ]


def numbered_tars(path: Path) -> Path:
    """Fill a folder with two tars of 23 samples; sample i holds `picture(i)` and is of class i % 3."""
    members = labelled(f"{number:03d}" for number in range(23))
    write_tar(path / "a.tar", members[:30])
    write_tar(path / "b.tar", members[30:])
    return path
