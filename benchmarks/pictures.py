"""The pictures of README and docs, made anew from what the code gives today, into docs/images.

demo             `selfmask demo`: its own picture                              5 minutes
report           `selfmask report` of the demo's mask, as Chromium shows it    after the demo: seconds
cascade          benchmarks.cascade.real on digits, the first seed             half an hour
mask_similarity  benchmarks.maskfile.similarity                                ten minutes

    python -m benchmarks.pictures [demo report cascade mask_similarity] [--keep DIR]

Look at a picture before it is committed. Without a browser the report is left out, and said so.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTH, HEIGHT = 1180, 1640  # of the report's picture


def run(*words: str, folder: Path) -> None:
    """Run a module of this checkout in `folder`, so that the paths in pictures are short and no machine's."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    subprocess.run([sys.executable, "-m", *words], cwd=folder, env=environment, check=True)


def draw_demo(folder: Path, image: Path) -> None:
    """Train the demo, or take the one that is there, and copy its picture."""
    if not (folder / "runs" / "demo" / "demo.png").exists():
        run("selfmask_dist.cli", "demo", folder=folder)
    shutil.copy(folder / "runs" / "demo" / "demo.png", image)


def draw_report(folder: Path, image: Path) -> None:
    """Take a picture of the top of the report on the demo's mask."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        print(f"report is left out: none of {', '.join(BROWSERS)} is on PATH", file=sys.stderr)
        return
    draw_demo(folder, IMAGES / "demo.png")
    run("selfmask_dist.cli", "report", "runs/demo/mask", folder=folder)
    page = folder / "runs" / "demo" / "mask" / "report.html"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += [f"--user-data-dir={folder / 'browser'}", f"--window-size={WIDTH},{HEIGHT}"]
    subprocess.run([browser, *options, f"--screenshot={image}", page.as_uri()], check=True, timeout=120)


def draw_cascade(folder: Path, image: Path) -> None:
    """Train a cascade on digits and copy its picture."""
    run("benchmarks.cascade.real", "--seeds", "1", "--picture", str(image), folder=folder)


def draw_mask_similarity(folder: Path, image: Path) -> None:
    """Train nine masks for three tasks and copy the picture of how alike they are."""
    run("benchmarks.maskfile.similarity", "--pictures", str(folder), folder=folder)
    shutil.copy(folder / "mask_similarity.png", image)


PICTURES: dict[str, Callable[[Path, Path], None]] = {
    "demo": draw_demo,
    "report": draw_report,
    "cascade": draw_cascade,
    "mask_similarity": draw_mask_similarity,
}


def main() -> int:
    """Make the pictures that are asked for; all of them, where none is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help=", ".join(PICTURES))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work there, and go on with what is there")
    options = parser.parse_args()
    if unknown := [name for name in options.pictures if name not in PICTURES]:
        parser.error(f"there is no picture {', '.join(unknown)}; choose from {', '.join(PICTURES)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = (options.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.pictures or PICTURES:
            PICTURES[name](folder, IMAGES / f"{name}.png")
            print(IMAGES / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
