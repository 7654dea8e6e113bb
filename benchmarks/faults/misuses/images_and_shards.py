"""Pictures of unusual kinds and their right pixels, and misuses of shards, their labels and indexes."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.faults.misuses.case import WORKS, Case, Said, Wanted, check, error, selfmask, told, warning
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import eval_transform, open_source
from selfmask_dist.data.views.decode import decode
from tests.support.tars import labelled, picture, write_tar

RED, BLUE = (200, 30, 40), (20, 40, 190)
PRE = Preprocessing(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(
    colour: tuple[int, ...] = RED, *, mode: str = "RGB", size: tuple[int, int] = (32, 24)
) -> Image.Image:
    return Image.new(mode, size, colour)


def shows(name: str, make: Callable[[], bytes], colour: tuple[int, int, int] = RED, near: int = 6) -> Case:
    """A picture whose every pixel is to be this colour, and of which a view can be made."""

    def use(_: Path) -> None:
        image = decode(make())
        found = np.asarray(image).reshape(-1, 3).astype(int)
        check(np.abs(found - colour).max() <= near, f"{found[0].tolist()} in place of {colour}")
        view = eval_transform(PRE)(image, np.random.default_rng(0))[0]
        check(view.shape == (3, 16, 16) and bool(view.isfinite().all()), "no view of it")

    return Case(name, WORKS, use)


def refused(name: str, make: Callable[[], bytes], *names: str) -> Case:
    def use(_: Path) -> None:
        decode(make())

    return Case(name, error(*names), use)


def turned() -> bytes:
    """Wider than high as stored, and to be shown higher than wide."""
    exif = Image.Exif()
    exif[274] = 6
    return saved(plain(size=(40, 20)), "JPEG", exif=exif)


def turned_converted(folder: Path) -> Said:
    (folder / "src" / "a").mkdir(parents=True)
    (folder / "src" / "a" / "0.jpg").write_bytes(turned())
    (folder / "src" / "b").mkdir()
    (folder / "src" / "b" / "1.jpg").write_bytes(picture(1))
    return told(selfmask("data", "convert", "folder", folder / "src", folder / "out"))


def cmyk() -> bytes:
    return saved(plain().convert("CMYK"), "JPEG", quality=95)


def many(kind: str) -> Callable[[], bytes]:
    """A film of two frames, of which the first is red."""
    rest = [plain(BLUE)]
    return lambda: saved(
        plain(),
        kind,
        save_all=True,
        append_images=rest,
        duration=100,
        **({"lossless": True} if kind == "WEBP" else {}),
    )


def clear(kind: str) -> Callable[[], bytes]:
    """Red that is wholly transparent keeps its colour."""
    return lambda: saved(
        plain((*RED, 0), mode="RGBA"), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {})
    )


def palette_with_transparency() -> bytes:
    return saved(plain().quantize(4), "PNG", transparency=0)


def deep_png() -> bytes:
    """Sixteen bits for each of three channels, which PIL has no writer for."""
    import struct
    import zlib

    row = b"\0" + struct.pack(">HHH", *(value * 257 for value in RED)) * 32
    parts = [
        b"IHDR" + struct.pack(">IIBBBBB", 32, 24, 16, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(row * 24),
        b"IEND",
    ]
    chunks = (struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def with_rubbish() -> bytes:
    return saved(plain(), "JPEG", quality=95) + b"\0" * 999


def missing_end() -> bytes:
    return saved(plain(), "PNG")[:-12]


# ---- shards


def opened(
    name: str, wanted: Wanted, members: list[tuple[str, bytes]], right: list[int] | None = None
) -> Case:
    """A tar of these members is opened, and its labels are to be these."""

    def use(folder: Path) -> None:
        write_tar(folder / "x.tar", members)
        source = open_source(folder)
        if right is not None:
            found = [int(source.read(row).label) for row in range(len(source))]
            check(found == right, f"labels {found} in place of {right}")

    return Case(name, wanted, use)


def label(data: bytes, kind: str = "cls") -> list[tuple[str, bytes]]:
    return [("0.cls", b"0"), ("0.jpg", picture(0)), (f"1.{kind}", data), ("1.jpg", picture(1))]


def indexed(name: str, wanted: Wanted, spoil: Callable[[Path], None]) -> Case:
    """An indexed folder of two tars that something happens to before it is opened."""

    def use(folder: Path) -> None:
        place = folder / "shards"
        place.mkdir()
        members = labelled([f"{number}" for number in range(6)])
        write_tar(place / "a.tar", members[:6])
        write_tar(place / "b.tar", members[6:])
        told(selfmask("data", "index", place))
        spoil(place)
        source = open_source(place)
        check(len(source) == 6, f"{len(source)} samples")
        for row in range(len(source)):
            check(source.read(row).data == picture(row), f"sample {row} has other bytes")

    return Case(name, wanted, use)


def cut_index(place: Path) -> None:
    path = place / "samples.index"
    path.write_bytes(path.read_bytes()[:-9])


def text_index(place: Path) -> None:
    (place / "samples.index").write_text("0 1 2")


def swapped_tars(place: Path) -> None:
    (place / "a.tar").rename(place / "c.tar")
    (place / "b.tar").rename(place / "a.tar")
    (place / "c.tar").rename(place / "b.tar")


def no_index(place: Path) -> None:
    (place / "samples.index").unlink()


def one_tar_less(place: Path) -> None:
    (place / "b.tar").unlink()


def one_tar_more(place: Path) -> None:
    write_tar(place / "c.tar", labelled(["9"]))


def grown_tar(place: Path) -> None:
    with tarfile.open(place / "b.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("9.cls"))


def backup_beside(place: Path) -> None:
    shutil.copy(place / "a.tar", place / "a.tar.bak")
    (place / "notes.txt").write_text("x")


def path_for_shards(name: str, wanted: Wanted, make: Callable[[Path], Any]) -> Case:
    def use(folder: Path) -> None:
        open_source(make(folder))

    return Case(name, wanted, use)


def parquet(folder: Path) -> Path:
    (folder / "train-00000.parquet").write_bytes(b"PAR1" + b"\0" * 99)
    return folder


def a_picture(folder: Path) -> Path:
    (folder / "x.jpg").write_bytes(picture(0))
    return folder / "x.jpg"


def half_downloaded(folder: Path) -> Path:
    write_tar(folder / "x.tar", labelled(["0", "1"]))
    (folder / "x.tar").rename(folder / "x.tar.part")
    return folder


def other_description(folder: Path) -> Path:
    write_tar(folder / "x.tar", labelled(["0", "1"]))
    (folder / "dataset.json").write_text(json.dumps({"name": "mine"}))
    return folder


CASES = [
    shows("one pixel", lambda: saved(plain(size=(1, 1)), "PNG")),
    shows("a CMYK JPEG", cmyk, near=12),
    shows("a grey JPEG", lambda: saved(plain((90,), mode="L"), "JPEG", quality=95), (90, 90, 90)),
    shows("an animated GIF", many("GIF")),
    shows("an animated WebP", many("WEBP")),
    shows("an animated PNG", many("PNG")),
    shows("a TIFF of several pages", many("TIFF")),
    shows("a wholly transparent PNG", clear("PNG")),
    shows("a wholly transparent WebP", clear("WEBP")),
    shows("a palette with transparency", palette_with_transparency),
    shows("16 bits in each of three channels", deep_png),
    shows("bytes after the end of a JPEG", with_rubbish),
    shows("a progressive JPEG", lambda: saved(plain(), "JPEG", progressive=True, quality=95)),
    shows("a JPEG whose name says PNG", lambda: saved(plain(), "JPEG", quality=95)),
    shows("a BMP turned upside down", lambda: saved(plain(), "BMP")),
    shows("a PNG whose end mark is missing, and no pixel", missing_end),
    refused("an SVG drawing", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
    refused("a pointer of Git LFS", lambda: b"version https://git-lfs.github.com/spec/v1\n", "not a picture"),
    refused(
        "a HEIC picture of a telephone", lambda: b"\0\0\0\x18ftypheic" + b"\0" * 99, "not a picture|HEIC"
    ),
    Case("a picture that EXIF says to turn", warning("EXIF|orientation"), turned_converted),
    opened("a label with an underscore", error("'1_0'|1_0"), label(b"1_0"), None),
    opened("a label with a plus", error(r"\+1"), label(b"+1"), None),
    opened("a label in Arabic digits", error("1.cls|'1'|label"), label("\u0663".encode()), None),
    opened("a label with a decimal point", error(r"1\.0"), label(b"1.0"), None),
    opened("a label with a line end", WORKS, label(b"1\r\n"), [0, 1]),
    opened("a label in words", error("cat"), label(b"cat"), None),
    opened(
        "a label that is a text in JSON", error('"?1"?', "label|json"), label(b'{"label": "1"}', "json"), None
    ),
    opened("a label that is true in JSON", error("[Tt]rue"), label(b'{"label": true}', "json"), None),
    opened("a label of one element in JSON", error(r"\[1\]"), label(b'{"label": [1]}', "json"), None),
    opened("JSON that is cut off", error("1", "json|JSON"), label(b'{"label": 1', "json"), None),
    opened(
        "one key in two tars' worth of one tar",
        error("'?0'?", "twice|more than once|again"),
        [*labelled(["0"]), *labelled(["0"])],
        None,
    ),
    opened(
        "a label without its picture", error("1", "picture|image"), [*labelled(["0"]), ("1.cls", b"1")], None
    ),
    indexed("an index cut short", error("samples.index"), cut_index),
    indexed("text for an index", error("samples.index"), text_index),
    indexed("two tars with their names swapped", error("a.tar|b.tar|index"), swapped_tars),
    indexed("no index", WORKS, no_index),
    indexed("a tar less than indexed", error("b.tar|index"), one_tar_less),
    indexed("a tar more than indexed", error("c.tar|index"), one_tar_more),
    indexed("a tar that grew after it was indexed", error("b.tar"), grown_tar),
    indexed("other files beside the tars", WORKS, backup_beside),
    path_for_shards("a folder of Parquet files", error("tar", "parquet|Parquet|convert"), parquet),
    path_for_shards("a picture for shards", error("x.jpg", "tar"), a_picture),
    path_for_shards("a tar that is half downloaded", error("tar", "part|no "), half_downloaded),
    path_for_shards("another dataset.json beside the tars", error("dataset.json"), other_description),
    path_for_shards("a number for a path", error("int", "no path"), lambda _: 3),
    path_for_shards("an empty path", error("path|empty"), lambda _: ""),
]
