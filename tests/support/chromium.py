"""A real browser for tests: a page as the browser understands it, and a picture of it."""

import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find() -> str:
    """The browser's path; the test skips where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is on PATH")
    return found


def _run(path: Path, *arguments: str) -> str:
    profile = path.parent / "profile"
    common = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
    ]
    done = subprocess.run(
        [find(), *common, *arguments, path.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@dataclass
class Page(HTMLParser):
    """A document: headings, tables' cells, pictures, text, and what elements it has."""

    headings: list[str] = field(default_factory=list)
    tables: list[list[list[str]]] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    elements: dict[str, int] = field(default_factory=dict)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] = self.elements.get(tag, 0) + 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("img", "meta", "br", "link"):
            self._open.append(tag)
        if tag == "h2":
            self.headings.append("")
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "img":
            self.pictures.append(dict(attrs)["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if "h2" in self._open:
            self.headings[-1] += data
        if "td" in self._open or "th" in self._open:
            cell = self.tables[-1][-1]
            cell[-1] = f"{cell[-1]} {data}".strip()


def load(path: Path) -> Page:
    """The page as the browser has it once it is loaded."""
    page = Page()
    page.feed(_run(path, "--dump-dom"))
    return page


def screenshot(path: Path, *, width: int = 1240, height: int = 3200, dark: bool = False) -> np.ndarray:
    """Pixels (height, width, 3) of the page."""
    picture = path.with_suffix(".dark.png" if dark else ".png")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    _run(path, f"--screenshot={picture}", f"--window-size={width},{height}", *scheme)
    return np.asarray(Image.open(picture).convert("RGB"))


def count_near(pixels: np.ndarray, colour: str, distance: int = 6) -> int:
    """Pixels within a distance of a colour given as #rrggbb."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels.astype(int) - wanted).max(-1) <= distance).sum())
