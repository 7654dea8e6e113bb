"""Classes over HTTP: the run's own number to the picture, bounds as everywhere, and a page in a browser."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import selfmask_dist
from selfmask_dist.cli.service import Limits
from selfmask_dist.maskfile import Head, Model, read_mask_file
from selfmask_dist.maskfile.bank import MaskBank
from selfmask_dist.models.building import build, settings_for
from tests.cli.serving import Server
from tests.models.cases import CLASSES, head_accuracy, pictures_of
from tests.support.devtools import Browser

ODD_NAMES = ("<b>bold</b>", "a & b", "x" * 60, "ok")


@pytest.fixture(scope="module")
def server(linear_run: Path) -> Iterator[Server]:
    """The run's mask as `trees`, the same under another head as `odd`, and one without a head."""
    path = linear_run / "final.mask"
    file = read_mask_file(path)
    (model,) = file.models.values()
    settings = settings_for(path, file, model, config=None, weights=None)
    backbone = build(settings, fingerprint=file.backbone_fingerprint)
    bank = MaskBank(backbone.encoder)
    for name in ("trees", "odd", "bare"):
        bank.add(name, path)
    odd = Head(
        "cosine", torch.randn(4, backbone.spec.dim, generator=torch.Generator().manual_seed(0)), scale=9
    )
    models = {"trees": model, "odd": Model(odd, ODD_NAMES)}
    limits = Limits(max_bytes=20_000, max_batch=8)
    with Server(bank, limits, preprocessing=backbone.spec.preprocessing, models=models) as running:
        yield running


def test_every_test_picture_gets_the_runs_class(
    server: Server, linear_run: Path, hard_data: dict[str, str]
) -> None:
    pictures = pictures_of(hard_data)
    with httpx.Client(base_url=server.url) as client:

        def ask(path: Path) -> dict:
            answer = client.post("/predict?mask=trees&logits=true", content=path.read_bytes())
            assert answer.status_code == 200, answer.text
            found: dict = answer.json()
            return found

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, pictures))
    right = sum(
        one["top"][0]["class"] == path.parent.name for one, path in zip(answers, pictures, strict=True)
    )
    assert right / len(pictures) == head_accuracy(linear_run)
    loaded = selfmask_dist.load(linear_run)
    expected = loaded(torch.stack([loaded.transform(path) for path in pictures]))
    assert np.allclose([one["logits"] for one in answers], expected, atol=1e-5)
    assert [len(one["top"]) for one in answers] == [len(CLASSES)] * len(pictures), (
        "five, where there are five"
    )
    assert sum(one["probability"] for one in answers[0]["top"]) == pytest.approx(1)


def test_masks_with_other_heads_and_embeddings_share_a_pass(
    server: Server, hard_data: dict[str, str]
) -> None:
    data = pictures_of(hard_data)[0].read_bytes()
    paths = ["/predict?mask=trees", "/predict?mask=odd&top=2", "/embed?mask=bare", "/embed"] * 6
    with httpx.Client(base_url=server.url) as client, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda path: client.post(path, content=data).json(), paths))
    for first, answer in zip(answers[:4] * 6, answers, strict=True):
        assert answer.keys() == first.keys()
        assert answer.get("top", [{"class": ""}])[0]["class"] == first.get("top", [{"class": ""}])[0]["class"]
    assert len(answers[1]["top"]) == 2
    assert server.metric("selfmask_passes_total") < server.metric("selfmask_pictures_total")
    assert httpx.get(f"{server.url}/masks").json() == {
        "masks": ["trees", "odd", "bare"],
        "classes": {"trees": 3, "odd": 4},
    }


@pytest.mark.parametrize(
    ("query", "content", "status", "reason"),
    [
        ("mask=none", None, 404, "there is no mask 'none'"),
        ("", None, 400, "name a mask; classes are known of trees, odd"),
        (
            "mask=bare",
            None,
            400,
            "the mask 'bare' has no head, only embeddings; classes are known of trees, odd",
        ),
        ("mask=trees&top=0", None, 400, "`top` is '0'; it is a number of classes"),
        ("mask=trees&top=many", None, 400, "`top` is 'many'"),
        ("mask=trees&top=99999999999", None, 400, "`top` is"),
        ("mask=trees&logits=1", None, 400, "it is true or false"),
        ("mask=trees&mask=odd", None, 400, "2 masks are named"),
        ("mask=trees&top=1&top=2", None, 400, "`top` is given 2 times"),
        ("mask=trees&k=3", None, 400, "no parameter 'k'; there are `mask`, `top`, `logits`"),
        ("mask=trees", b"hello", 400, "no picture that can be read"),
        ("mask=trees", b"\0" * 20_001, 413, "more than 20,000 bytes"),
    ],
)
def test_what_is_refused(
    server: Server, hard_data: dict[str, str], query: str, content: bytes | None, status: int, reason: str
) -> None:
    data = pictures_of(hard_data)[0].read_bytes() if content is None else content
    answer = httpx.post(f"{server.url}/predict?{query}", content=data)
    assert (answer.status_code, reason in answer.json()["error"]) == (status, True), answer.text


def test_the_description_names_every_route_and_what_answers_hold(
    server: Server, hard_data: dict[str, str]
) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    assert {*described["paths"]} == {"/embed", "/predict", "/masks", "/health", "/metrics"}
    data = pictures_of(hard_data)[0].read_bytes()
    for path, methods in described["paths"].items():
        method = "post" if "post" in methods else "get"
        query = {"mask": "trees"} if method == "post" else {}
        answer = httpx.request(method, f"{server.url}{path}", params=query, content=data if query else None)
        ((kind, content),) = methods[method]["responses"]["200"]["content"].items()
        assert answer.headers["content-type"].startswith(kind)
        if kind == "application/json":
            schema = content["schema"]
            assert {*schema["required"]} <= answer.json().keys() <= schema["properties"].keys()
        stated = {one["name"] for one in methods[method].get("parameters", [])}
        unknown = httpx.post(f"{server.url}{path}?x=1", content=data)
        if method == "post":
            assert all(f"`{name}`" in unknown.json()["error"] for name in stated)


def test_the_page_in_a_browser(server: Server, hard_data: dict[str, str], tmp_path: Path) -> None:
    picture = pictures_of(hard_data)[0]
    answer = httpx.post(f"{server.url}/predict?mask=trees", content=picture.read_bytes()).json()
    with Browser(tmp_path) as browser:
        browser.open(server.url)
        assert browser.wait("document.querySelector('#mask').options.length") == 2
        browser.give_file("#file", picture)
        found = "[...document.querySelectorAll('#classes tr')].map(row => row.cells[0].innerText)"
        browser.wait("document.querySelectorAll('#classes tr').length === 3")
        assert browser.value(found) == [one["class"] for one in answer["top"]]
        shown = browser.value("document.querySelector('#classes tr').cells[2].innerText")
        assert shown == f"{100 * answer['top'][0]['probability']:.1f} %"
        assert browser.value("document.querySelector('#drop img').naturalWidth") == 16
        browser.screenshot(tmp_path / "page.png")
        pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
        bars = (np.abs(pixels - np.array([0x2F, 0x6F, 0xD6])).max(-1) < 8).sum()
        assert bars > 500, "the bars are drawn"
        # another mask, whose names a page must not take for markup
        browser.value("mask.value = 'odd'; mask.dispatchEvent(new Event('change'))")
        browser.wait("document.querySelectorAll('#classes tr').length === 4")
        assert sorted(browser.value(found)) == sorted(ODD_NAMES)
        assert browser.value("document.querySelectorAll('#classes b').length") == 0
        text = tmp_path / "text.png"
        text.write_text("no picture")
        browser.give_file("#file", text)
        said = browser.wait(
            "document.querySelector('#said.bad') && document.querySelector('#said').innerText"
        )
        assert "no picture that can be read" in said
        # the refusal itself, and nothing of a policy that is broken or a file that is not there
        assert [
            text for text in browser.errors if "status of 400" not in text and "favicon" not in text
        ] == []
    if folder := os.environ.get("SELFMASK_PAGE_PICTURES"):
        (tmp_path / "page.png").rename(Path(folder) / "page.png")
