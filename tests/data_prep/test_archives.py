"""Publishers' archives from a web server of this machine: whole, stopped, not the published one."""

import hashlib
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from data_prep.prepared.archives import Archive, bring_archives
from tests.support.web import serving


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder of archives: a tar with a folder, and a zip whose files lie in no folder."""
    folder = tmp_path / "published"
    (folder / "train" / "deep").mkdir(parents=True)
    (folder / "train" / "deep" / "a.txt").write_text("a" * 5000)
    with tarfile.open(folder / "train.tar.gz", "w:gz") as tar:
        tar.add(folder / "train", "train")
    with zipfile.ZipFile(folder / "Lists.zip", "w") as file:
        file.writestr("one.txt", "one")
    return folder


def test_archives_are_downloaded_checked_unpacked_and_deleted(published: Path, tmp_path: Path) -> None:
    md5 = hashlib.md5((published / "train.tar.gz").read_bytes()).hexdigest()
    there = tmp_path / "originals"
    there.mkdir()
    with serving(published) as web:
        archives = (
            Archive(f"{web.address}/train.tar.gz", "train", md5),
            Archive(f"{web.address}/Lists.zip", "Lists"),
        )
        # the first half is there already, from a call that was killed
        whole = (published / "train.tar.gz").read_bytes()
        (there / ".train.tar.gz.partial").write_bytes(whole[: len(whole) // 2])
        bring_archives(archives, there)
    assert (there / "train" / "deep" / "a.txt").read_text() == "a" * 5000
    assert (there / "Lists" / "one.txt").read_text() == "one"
    assert sorted(path.name for path in there.iterdir()) == ["Lists", "train"]
    bring_archives(archives, there)  # the server is gone: nothing is asked of it


def test_an_archive_that_was_put_there_is_used_and_stays(published: Path, tmp_path: Path) -> None:
    there = tmp_path / "originals"
    there.mkdir()
    shutil.copy(published / "train.tar.gz", there)
    bring_archives((Archive("http://nowhere.invalid/train.tar.gz", "train"),), there)
    assert (there / "train.tar.gz").exists()
    assert (there / "train" / "deep" / "a.txt").exists()


def test_what_is_not_the_published_file_is_refused(published: Path, tmp_path: Path) -> None:
    there = tmp_path / "originals"
    there.mkdir()
    shutil.copy(published / "train.tar.gz", there)
    with pytest.raises(ValueError, match=r"train\.tar\.gz is not the published file .*delete it"):
        bring_archives((Archive("http://nowhere.invalid/train.tar.gz", "train", "0" * 32),), there)
    with pytest.raises(ValueError, match=r"holds no train\.json; delete it"):
        bring_archives((Archive("http://nowhere.invalid/train.tar.gz", "train.json"),), there)
    (there / "train.tar.gz").write_bytes(b"<html>sign in</html>")
    with pytest.raises(ValueError, match=r"cannot be unpacked .*delete it"):
        bring_archives((Archive("http://nowhere.invalid/train.tar.gz", "train"),), there)
    with serving(published) as web, pytest.raises(OSError, match=r"none\.zip cannot be downloaded: .*404"):
        bring_archives((Archive(f"{web.address}/none.zip", "none"),), there)
    assert not (there / "train").exists()
