"""The blocks of shell in docs/quickstart.md and docs/cluster.md are run, in order; see `support.docs`."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.docs import Block, blocks, prepare, run, script
from tests.support.published_trees import tree
from tests.support.tiny_run import ROOT, SETTINGS

QUICKSTART, CLUSTER = (ROOT / "docs" / f"{name}.md" for name in ("quickstart", "cluster"))
# what a place says once, so that commands need no network and take seconds; it stands below their own keys
SITE = {
    "backbone": {
        **SETTINGS["backbone"],
        "kwargs": {"patch_size": 56, "embed_dim": 32, "depth": 2, "num_heads": 2},
    },
    "engine": {"device": "cpu", "workers": 0, "threads": 1},
    "eval": {"knn_k": [2], "probe": False},
    "nbd": {"dim": 8, "warmup_steps": 5},
    "run": {"progress": False},
    "train": {"global_batch_size": 4},
}


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A checkout with an environment, as the pages' commands expect them, and its shell's variables."""
    environment = prepare(tmp_path)
    path = tmp_path / "config" / "selfmask" / "site.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**SITE, "backbone": {**SITE["backbone"], "image_size": 224}}))
    return tmp_path, environment


@pytest.mark.parametrize("page", [QUICKSTART, CLUSTER], ids=lambda page: page.stem)
def test_every_block_says_how_it_is_taken(page: Path) -> None:
    found = blocks(page)
    assert len(found) >= 4
    assert page.read_text().count("\n```sh") + page.read_text().count("\n```bash") == len(found)


def test_a_block_that_does_not_say_it_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for mark in ("", "sometimes", "not:", "run: why"):
        page.write_text(f"text\n\n```sh {mark}\nls\n```\n")
        with pytest.raises(ValueError, match=r"page\.md:3: .* is none of run, slow, dry"):
            blocks(page)
    page.write_text("```bash dry\ncd .  # here\nselfmask launch --nodes 2  # two\n```\n")
    assert (
        script(blocks(page)[0]).splitlines()[1].startswith("selfmask launch --nodes 2 --cluster slurm --dry")
    )


def test_a_command_that_fails_is_told_with_its_line(place: tuple[Path, dict[str, str]]) -> None:
    with pytest.raises(AssertionError, match="line 7:\nfalse"):
        run(Block(7, "run", "", "false\necho on\n"), *place)


@pytest.mark.slow
def test_the_commands_of_the_cluster_page(place: tuple[Path, dict[str, str]]) -> None:
    folder, environment = place
    (folder / "config" / "selfmask" / "site.yaml").unlink()
    shown = [run(block, folder, environment) for block in blocks(CLUSTER) if block.how != "not"]
    assert (folder / "config" / "selfmask" / "site.yaml").exists()
    assert "#SBATCH --nodes=4" in shown[1]
    (line,) = [line for line in shown[-1].splitlines() if "H100" in line]
    assert f"    {line}\n" in CLUSTER.read_text(), "what the page shows of the planner"


@pytest.mark.slow
def test_the_commands_of_the_quick_start(place: tuple[Path, dict[str, str]]) -> None:
    folder, environment = place
    rng = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for index in range(20):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"IMG_{index:04d}.jpg")
    for split in ("train", "test"):
        tree(folder / "pets" / split, 8)
    for block in blocks(QUICKSTART):
        if block.how != "not":
            run(block, folder, environment)
    assert (folder / "runs" / "pets" / "report.html").exists()
    with np.load(folder / "embeddings.npz") as arrays:
        assert [array.shape for array in arrays.values()] == [(1, 32)]
