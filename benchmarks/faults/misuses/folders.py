"""Misuses of folders of pictures: their layout, names, contents, and what converters make of them."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.misuses.case import WORKS, Case, Said, Wanted, check, error, selfmask, told, warning
from tests.support.tars import picture

Tree = dict[str, bytes]


def write(folder: Path, tree: Tree) -> Path:
    for name, data in tree.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def pictures(*names: str, first: int = 0) -> Tree:
    """Two pictures in each folder, all different."""
    return {
        f"{name}/{number}.jpg": picture(first + 10 * place + number)
        for place, name in enumerate(names)
        for number in range(2)
    }


def counts(out: Path) -> dict[str, dict[str, int]]:
    """Return pictures by split and class, as written."""
    found = sorted(out.rglob("dataset.json"))
    return {
        path.parent.relative_to(out).as_posix(): json.loads(path.read_text())["samples_per_class"]
        for path in found
    }


def converted(
    name: str, wanted: Wanted, tree: Tree, right: dict[str, dict[str, int]] | None = None, *options: str
) -> Case:
    """`selfmask data convert folder` of a tree; `right` are the counts by split and class."""

    def use(folder: Path) -> Said:
        write(folder / "src", tree)
        said = selfmask("data", "convert", "folder", folder / "src", folder / "out", *options)
        if right is not None:
            told(said)
            check(counts(folder / "out") == right, f"wrote {counts(folder / 'out')}")
        return said

    return Case(name, wanted, use)


def manifest(name: str, wanted: Wanted, text: str | bytes, right: Any = None, *options: str) -> Case:
    """`selfmask data convert csv` of a list over a/0.jpg, a/1.jpg, b/0.jpg, b/1.jpg."""

    def use(folder: Path) -> Said:
        write(folder / "src", pictures("a", "b"))
        (folder / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        said = selfmask(
            "data", "convert", "csv", folder / "list.csv", folder / "src", folder / "out", *options
        )
        if right is not None:
            told(said)
            check(counts(folder / "out") == right, f"wrote {counts(folder / 'out')}")
        return said

    return Case(name, wanted, use)


def with_links(name: str, wanted: Wanted, link: Callable[[Path], None]) -> Case:
    def use(folder: Path) -> Said:
        write(folder / "src", pictures("a", "b"))
        link(folder)
        return selfmask("data", "convert", "folder", folder / "src", folder / "out")

    return Case(name, wanted, use)


def class_is_a_link(folder: Path) -> None:
    os.symlink(folder / "src" / "a", folder / "src" / "c")


def picture_is_a_link(folder: Path) -> None:
    os.symlink(folder / "src" / "a" / "0.jpg", folder / "src" / "b" / "9.jpg")


def source(name: str, wanted: Wanted, make: Callable[[Path], Path]) -> Case:
    """Something in place of the folder of pictures."""
    return Case(
        name, wanted, lambda folder: selfmask("data", "convert", "folder", make(folder), folder / "out")
    )


def a_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        for name, data in pictures("a", "b").items():
            archive.writestr(name, data)
    return folder / "x.zip"


def a_tar_of_a_tree(folder: Path) -> Path:
    with tarfile.open(folder / "x.tar.gz", "w:gz") as archive:
        for name, data in pictures("a", "b").items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return folder / "x.tar.gz"


def onto_itself(folder: Path) -> Said:
    write(folder / "src", pictures("a", "b"))
    return selfmask("data", "convert", "folder", folder / "src", folder / "src")


def overwrite_foreign(folder: Path) -> Said:
    """--overwrite on a folder that holds no earlier conversion."""
    write(folder / "src", pictures("a", "b"))
    write(folder / "out", {"thesis.tex": b"mine"})
    said = selfmask("data", "convert", "folder", folder / "src", folder / "out", "--overwrite")
    check((folder / "out" / "thesis.tex").exists(), "the user's file is gone")
    return said


def moved_while_written(folder: Path) -> Said:
    """A conversion to a path whose middle is a file."""
    write(folder / "src", pictures("a", "b"))
    (folder / "file").touch()
    return selfmask("data", "convert", "folder", folder / "src", folder / "file" / "out")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
HTML = b"<!DOCTYPE html><html><head><title>404</title></head></html>"
AB = {"a": 2, "b": 2}
TRAIN_TEST = {"train": AB, "test": AB}
LIST = "path,label\na/0.jpg,a\na/1.jpg,a\nb/0.jpg,b\nb/1.jpg,b\n"


def split(train: str, test: str) -> Tree:
    return {**pictures(f"{train}/a", f"{train}/b"), **pictures(f"{test}/a", f"{test}/b", first=50)}


CASES = [
    converted("an empty class", error("/c", "without pictures"), {**pictures("a", "b"), "c/.keep": b""}),
    converted(
        "a class that is empty in one split",
        error("test/b", "without pictures"),
        {**pictures("train/a", "train/b", "test/a"), "test/b/.keep": b""},
    ),
    converted("splits with years", error("train2017", "--layout"), split("train2017", "val2017")),
    converted("splits with a word before", error("seg_train", "--layout"), split("seg_train", "seg_test")),
    converted(
        "splits with a word after", error("train_images", "--layout"), split("train_images", "test_images")
    ),
    converted(
        "splits in another case with a blank", error("Test Set", "--layout"), split("Train Set", "Test Set")
    ),
    converted(
        "splits with years, told so",
        WORKS,
        split("train2017", "val2017"),
        {"train": AB, "val": AB},
        "--layout",
        "splits",
    ),
    converted(
        "splits one folder deeper",
        error("--layout"),
        {
            **pictures("images/train/a", "images/train/b"),
            **pictures("images/test/a", "images/test/b", first=50),
        },
    ),
    converted(
        "labels beside pictures",
        error("labels", "without pictures|not pictures"),
        {**pictures("images"), "labels/0.txt": b"0 .5 .5 1 1"},
    ),
    converted("a flat folder", error("outside of class folders"), {"0.jpg": picture(0), "1.jpg": picture(1)}),
    converted(
        "a class called test with pictures in it",
        warning("test", "a class"),
        pictures("test", "cat"),
        {".": {"cat": 2, "test": 2}},
    ),
    converted(
        "names beyond ASCII, blanks and signs",
        WORKS,
        pictures("Äpfel & Öl", "北京 🐕", "a,b;c"),
        {".": {"Äpfel & Öl": 2, "北京 🐕": 2, "a,b;c": 2}},
    ),
    converted("a name with a line break", error("line break|printable|name"), pictures("a\nb", "c")),
    converted(
        "keys with dots and blanks",
        WORKS,
        {"a/x.v1.2.jpg": picture(0), "a/x.v1.3.jpg": picture(1), "b/y z.jpg": picture(2)},
        {".": {"a": 2, "b": 1}},
    ),
    converted(
        "one name with two extensions",
        WORKS,
        {"a/x.jpg": picture(0), "a/x.png": picture(1, kind="PNG"), "b/y.jpg": picture(2)},
        {".": {"a": 2, "b": 1}},
    ),
    converted(
        "one name in two cases",
        WORKS,
        {"a/x.jpg": picture(0), "a/X.JPG": picture(1), "b/y.jpg": picture(2)},
        {".": {"a": 2, "b": 1}},
    ),
    converted(
        "a pointer of Git LFS for a picture",
        error(r"a/9\.jpg", "LFS|not a picture"),
        {**pictures("a", "b"), "a/9.jpg": LFS},
    ),
    converted(
        "a web page for a picture",
        error(r"a/9\.jpg", "not a picture"),
        {**pictures("a", "b"), "a/9.jpg": HTML},
    ),
    converted("a picture of no bytes", error(r"a/9\.jpg", "0 bytes"), {**pictures("a", "b"), "a/9.jpg": b""}),
    converted(
        "a picture cut off in the middle",
        error(r"a/9\.jpg", "truncated|decoded"),
        {**pictures("a", "b"), "a/9.jpg": picture(9)[:600]},
    ),
    converted(
        "the same, left out when told",
        warning("1"),
        {**pictures("a", "b"), "a/9.jpg": picture(9)[:600]},
        {".": AB},
        "--skip-broken",
    ),
    converted(
        "checkpoints of a notebook beside pictures",
        warning("hidden"),
        {**pictures("a", "b"), "a/.ipynb_checkpoints/0-checkpoint.jpg": picture(0)},
        {".": AB},
    ),
    converted(
        "resource forks of a Mac",
        warning("hidden"),
        {**pictures("a", "b"), "a/._0.jpg": b"\0\5\x16\7"},
        {".": AB},
    ),
    converted(
        "a folder of a Synology",
        warning("@eaDir"),
        {**pictures("a", "b"), "a/@eaDir/0.jpg/SYNO.jpg": picture(3)},
        {".": AB},
    ),
    converted(
        "annotations beside pictures in a class",
        error(r"0\.xml", "--skip-broken"),
        {**pictures("a", "b"), "a/0.xml": b"<annotation/>"},
    ),
    converted(
        "one picture under two names in one class",
        warning("more than once"),
        {**pictures("a", "b"), "a/7.jpg": picture(0)},
    ),
    converted(
        "one picture under two classes",
        warning("several labels"),
        {**pictures("a", "b"), "b/7.jpg": picture(0)},
    ),
    converted(
        "a picture of test in train",
        warning("in train too|in test too"),
        {**split("train", "test"), "test/a/7.jpg": picture(0)},
    ),
    converted(
        "a class of test that train lacks",
        warning("c", "none in the training"),
        {**split("train", "test"), **pictures("test/c", first=90)},
    ),
    converted(
        "classes in two Unicode forms",
        warning("Unicode"),
        {
            "train/caf\u00e9/0.jpg": picture(1),
            "train/b/0.jpg": picture(2),
            "test/cafe\u0301/0.jpg": picture(3),
            "test/b/0.jpg": picture(4),
        },
    ),
    converted(
        "classes that differ by a blank at the end",
        warning("without blanks", "'a '"),
        {**pictures("a", "b"), "a /7.jpg": picture(7)},
    ),
    converted("one class alone", warning("one class"), pictures("a")),
    converted(
        "splits under two names of one",
        error("val", "valid"),
        {
            **pictures("train/a", "train/b"),
            **pictures("val/a", "val/b", first=40),
            **pictures("valid/a", "valid/b", first=70),
        },
    ),
    converted("a short side below 1", error("short side"), pictures("a", "b"), None, "--short-side", "0"),
    converted(
        "a quality above 100",
        error("quality"),
        pictures("a", "b"),
        None,
        "--short-side",
        "20",
        "--quality",
        "900",
    ),
    converted("shards of no pictures", error("--"), pictures("a", "b"), None, "--shard-size", "0"),
    converted("workers below 1", error("--workers"), pictures("a", "b"), None, "--workers", "-2"),
    converted(
        "a split that is not there", error("'tset'", "train"), split("train", "test"), None, "--split", "tset"
    ),
    with_links("a class folder that is a link to another", warning("several labels"), class_is_a_link),
    with_links(
        "a picture that is a link to one of another class", warning("several labels"), picture_is_a_link
    ),
    source("a zip for a folder", error("zip", "no such folder|unpack|is no folder"), a_zip),
    source(
        "an archive of pictures for a folder",
        error("tar.gz", "no such folder|unpack|is no folder"),
        a_tar_of_a_tree,
    ),
    Case("a folder onto itself", error("inside"), onto_itself),
    Case(
        "--overwrite on somebody's folder",
        error("thesis.tex|earlier conversion|not empty|holds"),
        overwrite_foreign,
    ),
    Case("a path through a file", error("file"), moved_while_written),
    manifest("a list with semicolons", WORKS, LIST.replace(",", ";"), {"train": AB}),
    manifest("a list as Excel writes it in UTF-16", WORKS, LIST.encode("utf-16"), {"train": AB}),
    manifest(
        "a list with Windows' paths", WORKS, LIST.replace("a/", "a\\").replace("b/", "b\\"), {"train": AB}
    ),
    manifest("a list without its header", error("path", "label|column"), LIST.partition("\n")[2]),
    manifest(
        "a list of other names for columns",
        error("--path-column|--label-column"),
        LIST.replace("path,label", "bild,klasse"),
    ),
    manifest(
        "a list with columns in capitals", WORKS, LIST.replace("path,label", "Path,LABEL"), {"train": AB}
    ),
    manifest("a list of pictures that are not there", error(r"c/0\.jpg"), LIST + "c/0.jpg,c\n"),
    manifest(
        "a list that names one picture twice, under two labels", error(r"a/0\.jpg"), LIST + "a/0.jpg,b\n"
    ),
    manifest("a list with an empty label", error("line 5", "-1"), LIST.replace("b/1.jpg,b", "b/1.jpg,")),
    manifest("a list with a line too short", error("line 5|:5"), LIST.replace("b/1.jpg,b", "b/1.jpg")),
    manifest(
        "a list with a comma in a class, quoted",
        WORKS,
        LIST.replace(",b\n", ',"b, c"\n'),
        {"train": {"a": 2, "b, c": 2}},
    ),
    manifest("a list with a path that leads out", error(r"\.\./"), LIST + "../../secret.jpg,a\n"),
    manifest(
        "a list with splits in capitals",
        WORKS,
        "path,label,split\na/0.jpg,a,TRAIN\na/1.jpg,a,Test\nb/0.jpg,b,TRAIN\nb/1.jpg,b,Test\n",
        {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}},
    ),
    manifest(
        "a list with a split that is misspelt",
        warning("trian", "did you mean train"),
        "path,label,split\na/0.jpg,a,train\nb/0.jpg,b,trian\n",
    ),
    manifest(
        "numbers for labels, of which two are one",
        error("007", "--similar-classes"),
        LIST.replace(",a\n", ",007\n").replace(",b\n", ",7\n"),
    ),
    manifest("an empty list", error("empty|no rows|no lines|nothing|no pictures"), "path,label\n"),
]
