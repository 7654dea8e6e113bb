"""Pictures of any number of channels, multi-band TIFF files or .npy arrays, to tars of .npy members.

    convert_bands(SOURCE, OUT)        SOURCE/train/forest/a.tif -> OUT/train/shard-000000.tar: forest/a.npy

Values stay as deep as they are; mean and standard deviation of each channel are those of the training part.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfmask_dist.common.files import replacing
from selfmask_dist.data.views.bands import Bands, read_npy, read_tiff, scaled

ENDINGS = (".tif", ".tiff", ".npy")


@dataclass(frozen=True)
class ConvertedBands:
    """What was written. folders: of each part. mean, std: of each channel of the training part, for values
    scaled to 0..1 (float32 ones as they are).
    """

    folders: tuple[Path, ...]
    channels: int
    num_samples: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def convert_bands(source: Path, out: Path, *, max_samples_per_shard: int = 1000) -> ConvertedBands:
    """Convert SOURCE/part/class/file, or SOURCE/class/file as the part train, and return what was written.

    The same files give the same bytes.

    Raises:
        ValueError: there are no such files, one cannot be read, they are not all of one number of channels,
            two files would become one sample, or OUT holds shards already.
    """
    parts = {path.name: path for path in sorted(source.iterdir()) if path.name in ("train", "test", "val")}
    parts = parts or {"train": source}
    if "train" not in parts:
        raise ValueError(f"{source} has {', '.join(parts)} and no folder train")
    statistics, count, number = _Statistics(), 0, 0
    for name, folder in parts.items():
        target = out / name
        if any(target.glob("*.tar")):
            raise ValueError(f"{target} holds shards already; remove them, or choose another folder")
        target.mkdir(parents=True, exist_ok=True)
        files = _files(folder)
        for number, start in enumerate(range(0, len(files), max_samples_per_shard)):
            part = files[start : start + max_samples_per_shard]
            with replacing(target / f"shard-{number:06d}.tar") as partial, tarfile.open(partial, "w") as tar:
                for key, bands in _read(folder, part):
                    statistics.add(bands, key, is_counted=name == "train")
                    _add(tar, f"{key}.npy", bands)
                    count += 1
    mean, std = statistics.result()
    return ConvertedBands(tuple(out / name for name in parts), len(mean), count, mean, std)


def _files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not found:
        raise ValueError(f"{folder} holds no {', '.join(ENDINGS)}")
    if loose := [path for path in found if path.parent == folder]:
        raise ValueError(f"{loose[0]} lies in no folder, which would name its class")
    keys = [_key(folder, path) for path in found]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{folder}: several files would become the sample {twice}; rename them")
    return found


def _key(folder: Path, path: Path) -> str:
    """Return class and name of a sample; dots would end a WebDataset key."""
    inner = path.relative_to(folder).with_suffix("")
    return "/".join((*inner.parts[:-1], inner.name.replace(".", "_")))


def _read(folder: Path, files: list[Path]) -> Iterator[tuple[str, Bands]]:
    for path in files:
        read = read_npy if path.suffix.lower() == ".npy" else read_tiff
        try:
            yield _key(folder, path), read(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} {error}") from error


def _add(tar: tarfile.TarFile, name: str, bands: Bands) -> None:
    held = io.BytesIO()
    np.save(held, bands, allow_pickle=False)
    about = tarfile.TarInfo(name)
    about.size = held.tell()
    held.seek(0)
    tar.addfile(about, held)


class _Statistics:
    """Sums over pixels, in float64."""

    def __init__(self) -> None:
        self._sums = np.zeros((2, 0))
        self._count = 0

    def add(self, bands: Bands, key: str, *, is_counted: bool) -> None:
        """Take in the pixels of one sample, or only look at how many channels it has."""
        channels = bands.shape[2]
        if not self._sums.size:
            self._sums = np.zeros((2, channels))
        if channels != self._sums.shape[1]:
            raise ValueError(f"{key} has {channels} channels, and others have {self._sums.shape[1]}")
        if is_counted:
            values = scaled(bands).reshape(-1, channels).astype(np.float64)
            self._sums += [values.sum(axis=0), np.square(values).sum(axis=0)]
            self._count += len(values)

    def result(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of each channel; a channel without any spread has 1."""
        mean, square = self._sums / max(self._count, 1)
        std = np.sqrt(np.maximum(square - mean**2, 0))
        std = np.where(std > 1e-12, std, 1.0)
        return tuple(mean.round(6).tolist()), tuple(np.maximum(std, 1e-6).round(6).tolist())
