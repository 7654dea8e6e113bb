"""Masks by name: pushed to a folder that serves as hub, pulled bit for bit, refused where they are unsafe."""

import hashlib
import http.server
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import selfmask_dist
from selfmask_dist.cli import main
from selfmask_dist.models.hub import open_hub, pull
from selfmask_dist.models.repository import HubError, check_listing
from tests.models.cases import pictures_of

REPO = "us/trees"


@pytest.fixture
def hub(linear_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder hub with one repository."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    selfmask_dist.push_to_hub(linear_run, REPO, hub=tmp_path / "hub")
    return tmp_path / "hub"


def test_a_round_trip_gives_equal_bits(
    hub: Path, linear_run: Path, hard_data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = selfmask_dist.load(linear_run)
    images = torch.stack([here.transform(path) for path in pictures_of(hard_data)[:8]])
    monkeypatch.setenv("SELFMASK_HUB", str(hub))
    for there in (selfmask_dist.from_pretrained(REPO), selfmask_dist.load(REPO)):
        assert torch.equal(there(images), here(images))
        assert torch.equal(there.model.embed(images), here.model.embed(images))
        assert there.classes == here.classes
    pulled = pull(REPO)
    assert (pulled / "model.mask").read_bytes() == (linear_run / "final.mask").read_bytes()
    card = (pulled / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: selfmask_dist\n")
    assert "license: cc-by-4.0\n" in card
    assert f"| head | {here.metrics['head']:.4f} |" in card
    assert "| classes | 3: ash, birch, white, oak |" in card
    assert (pulled / "sparsity.png").exists()


def test_the_commands(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], linear_run: Path
) -> None:
    where = ["--hub", f"file://{hub}"]
    assert main(["hub", "push", str(linear_run / "final.mask"), "them/other", *where]) == 0
    capsys.readouterr()
    assert main(["hub", "list", *where]) == 0
    assert capsys.readouterr().out.split() == ["them/other", REPO]
    assert main(["hub", "list", "us", *where]) == 0
    assert capsys.readouterr().out.split() == [REPO]
    assert main(["hub", "pull", REPO, "--out", str(tmp_path / "new"), *where]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "README.md",
        "manifest.json",
        "model.mask",
        "sparsity.png",
    ]
    for words, reason in (
        (["hub", "pull", REPO, "--out", str(tmp_path / "new"), *where], "is not empty"),
        (["hub", "pull", "us/nothing", *where], "there is no repository us/nothing"),
        (["hub", "pull", "../us", *where], "no name of a repository"),
        (["hub", "push", str(tmp_path), "us/x", *where], "holds no mask file"),
    ):
        assert main(words) == 2
        assert reason in capsys.readouterr().err


def test_a_push_takes_the_place_of_an_earlier_one(hub: Path, linear_run: Path) -> None:
    (hub / REPO / "stale.txt").write_text("old")
    selfmask_dist.push_to_hub(linear_run, REPO, hub=hub)
    assert not (hub / REPO / "stale.txt").exists()
    assert [path.name for path in (hub / "us").iterdir()] == ["trees"], "nothing temporary is left"


def _rewrite_manifest(repo: Path, change: Callable[[dict], object]) -> None:
    stated = json.loads((repo / "manifest.json").read_text())
    change(stated)
    (repo / "manifest.json").write_text(json.dumps(stated))


def _flip(repo: Path) -> None:
    data = bytearray((repo / "model.mask").read_bytes())
    data[len(data) // 2] ^= 1
    (repo / "model.mask").write_bytes(data)


def _pickled(repo: Path) -> None:
    """A pickle under the mask's name, with a manifest that agrees."""

    class Evil:
        def __reduce__(self) -> tuple:
            return (os.system, ("touch /tmp/selfmask-was-here",))

    data = pickle.dumps(Evil())
    (repo / "model.mask").write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _rewrite_manifest(repo, lambda stated: stated["files"].update({"model.mask": entry}))


def _linked(repo: Path) -> None:
    shutil.move(repo / "model.mask", repo.parent / "elsewhere")
    (repo / "model.mask").symlink_to("../elsewhere")


def _linked_whole(repo: Path) -> None:
    shutil.move(repo, repo.parent / "elsewhere")
    repo.symlink_to("elsewhere")


def _piped(repo: Path) -> None:
    (repo / "README.md").unlink()
    os.mkfifo(repo / "README.md")


def _torch_file_below(repo: Path) -> None:
    (repo / "sub").mkdir()
    (repo / "sub" / "x.PT").write_text("x")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (_flip, "model.mask is not the file that manifest.json lists"),
    "a pickle as mask": (_pickled, "model.mask is not a mask file"),
    "a pickle beside it": (lambda repo: (repo / "weights.pkl").write_bytes(b""), "programs execute"),
    "code beside it": (lambda repo: (repo / "model.py").write_text("x"), "programs execute"),
    "a torch file in a folder": (
        _torch_file_below,
        "programs execute",
    ),
    "a link": (_linked, "holds the link model.mask"),
    "a linked repository": (_linked_whole, "is a link to another place"),
    "a pipe": (_piped, "README.md is no plain file"),
    "no manifest": (lambda repo: (repo / "manifest.json").unlink(), "has no manifest.json"),
    "no mask": (lambda repo: (repo / "model.mask").unlink(), "has no plain file model.mask"),
    "a path out of it": (
        lambda repo: _rewrite_manifest(
            repo, lambda stated: stated["files"].update({"../../x": stated["files"]["model.mask"]})
        ),
        "a manifest.json that cannot be",
    ),
    "another format": (
        lambda repo: _rewrite_manifest(repo, lambda stated: stated.update(format=2)),
        "format 2; this selfmask_dist reads 1",
    ),
    "no JSON": (lambda repo: (repo / "manifest.json").write_text("[" * 9999), "cannot be"),
    "a manifest too large": (
        lambda repo: (repo / "manifest.json").write_bytes(b" " * (2**20 + 1)),
        "more than 1,048,576 bytes",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_or_unsafe_is_refused(damage: str, hub: Path, tmp_path: Path) -> None:
    change, reason = DAMAGE[damage]
    change(hub / REPO)
    with pytest.raises(HubError, match=reason):
        pull(REPO, hub=hub)
    assert not (tmp_path / "cache" / "selfmask_dist").exists(), "nothing of it is kept"
    assert not Path("/tmp/selfmask-was-here").exists()


@pytest.mark.parametrize("name", ["../x.mask", "/etc/passwd", "a/../../b", "a\\..\\b", "a\0b"])
def test_a_listing_with_a_way_out_is_refused(name: str) -> None:
    with pytest.raises(HubError, match="leads out of it"):
        check_listing(["README.md", name], REPO)


def test_a_changed_cache_is_not_believed(hub: Path) -> None:
    place = pull(REPO, hub=hub)
    expected = (place / "model.mask").read_bytes()
    (place / "model.mask").write_bytes(b"changed")
    assert (pull(REPO, hub=hub) / "model.mask").read_bytes() == expected


class _HubServer(http.server.ThreadingHTTPServer):
    """As much of Hugging Face's protocol as fetching and listing take, over a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.folder = folder


class _HubHandler(http.server.BaseHTTPRequestHandler):
    server: _HubServer
    commit = "c" * 40

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        headers, data = {"X-Repo-Commit": self.commit}, b""
        if path.startswith("api/models"):
            repo = self.server.folder / "/".join(path.split("/")[2:4])
            files = [{"rfilename": one.name} for one in sorted(repo.iterdir()) if one.is_file()]
            about = {"id": REPO, "modelId": REPO, "sha": self.commit, "siblings": files, "tags": []}
            data = json.dumps(about if path.count("/") > 1 else [about]).encode()
            headers["Content-Type"] = "application/json"
        else:
            name_of_repo, _, rest = path.partition("/resolve/")
            data = (self.server.folder / name_of_repo / rest.partition("/")[2]).read_bytes()
            headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def server(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the server is on this machine
    with _HubServer(hub) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_hugging_faces_protocol(hub: Path, server: str, tmp_path: Path) -> None:
    """Fetching and listing for real, from a small server; pushing to a server is not tested here."""
    assert open_hub(server).repositories(None) == [REPO]
    place = pull(REPO, hub=server, out=tmp_path / "out")
    assert (place / "model.mask").read_bytes() == (hub / REPO / "model.mask").read_bytes()
    (hub / REPO / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(HubError, match="programs execute"):
        pull(REPO, hub=server)
