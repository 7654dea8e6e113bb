"""A folder that is converted once, and found again by the next run that needs it.

    OUT/SPLIT/shard-000000.tar ..., dataset.json       what the converter wrote
    OUT/SPLIT.source.json                              the folder it was made of, and a digest of its files

The listing is every file's path, size and time: pictures that were added, removed or changed since are
noticed. Nothing is converted anew by itself, as runs may have been trained on the tars. Knows no layout: the
converter is handed in.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selfmask_dist.common.files import write_json
from selfmask_dist.common.text import count

from ..folder_tree import look_below
from ..shards import Conversion

_DESCRIPTION = "dataset.json"
INDEX_NAME = "samples.index"


def convert_once(
    src: Path, out: Path, split: str, *, layout: str, convert: Callable[[bool], list[Conversion]]
) -> list[Conversion]:
    """Return what `convert` wrote to `out/split`, now or in an earlier call with the same pictures.

    A conversion that was killed goes on; one that another process is doing is waited for.

    Args:
        src: the folder of pictures; of its files, the listing is remembered.
        layout: what the folders in it were taken for.
        convert: writes `out/split`, where it is told to, over what half a renaming left there.

    Raises:
        ValueError: the folder's files, or what they are taken for, are no longer those that `out/split` was
            made of; it is there and not by this function; or `convert` raises it.
    """
    out.mkdir(parents=True, exist_ok=True)
    target, record = out / split, out / f"{split}.source.json"
    with _locked(out / f".{split}.lock"):
        now = {"source": str(src.resolve()), "layout": layout, **_listing(src)}
        before = json.loads(record.read_text()) if record.exists() else None
        if (found := is_described(target)) is not None:
            _check_is_the_same(src, target, before, now)
            return [found]
        write_json(record, now)
        # shards with visible names and without a description: it was killed while it gave them their names
        return convert(target.exists() and any(target.glob("shard-*.tar")))


def make_index(folder: Path, *, has_labels: bool) -> None:
    """Write the index of tars that were just converted, where it is absent: without it every process of a run
    walks all of their headers, and there are no checksums.
    """
    if not (folder / INDEX_NAME).exists():
        from selfmask_dist.data.build import (
            build_index,
        )  # imports torch, which a run that finds all is spared

        build_index(folder, decode_check=False, require_labels=has_labels)


def _listing(src: Path) -> dict[str, int | str]:
    found = look_below(src)
    digest = hashlib.sha256()
    for path in found.files:
        status = path.stat()
        entry = (os.fsencode(path.relative_to(src)), status.st_size, status.st_mtime_ns)
        digest.update(repr(entry).encode())
    for path, reason in found.broken:
        digest.update(repr((os.fsencode(path.relative_to(src)), reason)).encode())
    return {"files": len(found.files) + len(found.broken), "listing": digest.hexdigest()}


def _check_is_the_same(
    src: Path, target: Path, before: dict[str, int | str] | None, now: dict[str, int | str]
) -> None:
    if before == now:
        return
    if before is None:
        raise ValueError(
            f"{target} holds tars and no {target.name}.source.json beside it, which would say of what they "
            f"were made; train on them as they are, or remove the folder to convert {src} again"
        )
    if before["source"] != now["source"]:
        what = f"were made of {before['source']}"
    elif before["layout"] != now["layout"]:
        what = f"were made with the layout {before['layout']!r}, and {now['layout']!r} is asked for"
    elif before["files"] != now["files"]:
        what = f"were made when it had {count(int(before['files']))} files, and now it has {now['files']}"
    else:
        what = f"were made before some of its {now['files']} files changed"
    raise ValueError(
        f"{src}: the tars in {target} {what}; remove {target} to convert it anew (a run that was trained on "
        f"them cannot go on then), or train on the tars as they are with data.train={target}"
    )


def is_described(target: Path) -> Conversion | None:
    """Return the conversion that a folder holds; None where there is none, or it has not come to its end."""
    if not (target / _DESCRIPTION).exists():
        return None
    described = json.loads((target / _DESCRIPTION).read_text())
    rejects = target / "rejects.jsonl"
    lost = len(rejects.read_text().splitlines()) if rejects.exists() else 0
    return Conversion(target, tuple(described["classes"]), int(described["num_samples"]), lost)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the process ends, however it ends
        yield
