"""A cascade over HTTP: embeddings and classes of its modes, and which expert each picture went to."""

import argparse
import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch

from selfmask_dist.cascade.model import Cascade, load_cascade
from selfmask_dist.cli import serve
from selfmask_dist.cli.service import Limits
from selfmask_dist.data import eval_transform
from selfmask_dist.data.views.decode import decode
from selfmask_dist.maskfile import Head, Model, add_models
from selfmask_dist.maskfile.bank import MaskBank
from tests.cli.serving import PREPROCESSING, Server, picture
from tests.maskfile.test_bank import write_cascade
from tests.support.models import make

PICTURES = [picture(seed) for seed in range(24)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The service over a cascade `birds` with a head in its mode conditional; the same cascade beside it."""
    folder = tmp_path_factory.mktemp("cascade")
    model, preset = make("timm_vit", dtype=torch.float32)
    path = write_cascade(model, preset, folder).rename(folder / "birds.mask")
    alone = load_cascade(path, copy.deepcopy(model))
    images = torch.stack(
        [eval_transform(PREPROCESSING)(decode(one), np.random.default_rng(0))[0] for one in PICTURES]
    )
    head = Head("linear", torch.randn(4, 24, generator=torch.Generator().manual_seed(0)))
    add_models(path, {"conditional": Model(head, ("a", "b", "c", "d"))})
    bank = MaskBank(model)
    options = argparse.Namespace(masks=[path])
    cascades, models = serve._cascades(options, bank), serve._models(options)
    with Server(bank, Limits(max_batch=8), models=models, cascades=cascades) as server:
        yield SimpleNamespace(server=server, cascade=alone, images=images, head=head)


def ask(server: Server, route: str, number: int) -> dict:
    answer = httpx.post(f"{server.url}/{route}", content=PICTURES[number], verify=False)
    assert answer.status_code == 200, answer.text
    found: dict = answer.json()
    return found


def test_every_picture_goes_to_its_expert(served: SimpleNamespace) -> None:
    cascade: Cascade = served.cascade
    features, routes = cascade.routed(served.images)
    assert len({route.expert for route in routes}) == 2, "else the routes could be equal by chance"
    assert torch.equal(features, cascade.embed(served.images))
    assert [route.expert for route in routes] == cascade.route(served.images).tolist()
    words = ["embed?mask=birds", "embed?mask=birds/unconditional", "embed?mask=birds/expert-1", "embed"]
    with ThreadPoolExecutor(8) as pool:  # several kinds come together into one pass
        asked = [(word, number) for number in range(24) for word in words]
        answers = list(pool.map(lambda one: ask(served.server, *one), asked))
    wide = cascade.embed(served.images, mode="unconditional")
    for (word, number), answer in zip(asked, answers, strict=True):
        if "birds" not in word or "expert" in word:
            assert "route" not in answer
            continue
        assert answer["route"]["expert"] == routes[number].expert
        assert answer["route"]["shares"] == pytest.approx(routes[number].shares, abs=1e-4)
        expected = wide[number] if "unconditional" in word else features[number]
        assert answer["embedding"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_its_classes_and_where_a_picture_went(served: SimpleNamespace) -> None:
    features, routes = served.cascade.routed(served.images[:1])
    answer = ask(served.server, "predict?logits=true", 0)  # one alone has a head
    assert answer["mask"] == "birds"
    assert answer["route"]["expert"] == routes[0].expert
    assert answer["logits"] == pytest.approx(served.head.logits(features)[0].tolist(), abs=1e-4)
    listed = httpx.get(f"{served.server.url}/masks", verify=False).json()
    assert listed["masks"] == ["birds/dispatcher", "birds/expert-0", "birds/expert-1"]
    assert listed["classes"] == {"birds": 4}
    assert listed["cascades"] == {
        "birds": {"mode": "conditional", "experts": 2},
        "birds/unconditional": {"mode": "unconditional", "experts": 2},
    }
    described = httpx.get(f"{served.server.url}/openapi.json", verify=False).json()
    assert answer["route"].keys() == described["components"]["schemas"]["Route"]["properties"].keys()
    nobody = httpx.post(f"{served.server.url}/embed?mask=bees", content=PICTURES[0], verify=False)
    assert nobody.status_code == 404
    assert "there is birds, birds/unconditional, birds/dispatcher" in nobody.json()["error"]


def test_a_cascade_that_lost_a_mask_is_gone(served: SimpleNamespace) -> None:
    served.server.bank.remove("birds/expert-1")
    answer = httpx.post(f"{served.server.url}/embed?mask=birds", content=PICTURES[0], verify=False)
    assert (answer.status_code, "'birds' was removed meanwhile" in answer.json()["error"]) == (404, True)
    assert "cascades" not in httpx.get(f"{served.server.url}/masks", verify=False).json()
