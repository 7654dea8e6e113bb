"""The service as a process of its own: where memory ends, how it ends itself, and what it never says."""

import re
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import httpx
import numpy as np
import pytest

from selfmask_dist import cli
from selfmask_dist.cli.service import Limits
from selfmask_dist.data import eval_transform
from selfmask_dist.data.views.decode import decode
from selfmask_dist.runs import exit_status
from tests.cli.served import Served, write_service
from tests.cli.serving import Client, chunked, picture, plain, post, until

OPTIONS = ("--head-seconds", "30", "--body-seconds", "30", "--decoders", "1")


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, list[float]]]:
    """The service, and the embedding of `picture(0)` under the mask `pets`."""
    folder = tmp_path_factory.mktemp("served")
    bank, preprocessing = write_service(folder)
    image = eval_transform(preprocessing)(decode(picture(0)), np.random.default_rng(0))[0]
    with Served(folder, *OPTIONS) as served:
        yield served, bank.embed(image[None], "pets")[0].tolist()


def ask(served: Served, data: bytes) -> httpx.Response:
    url = f"http://127.0.0.1:{served.port}/embed"
    return httpx.post(url, params={"mask": "pets"}, content=data, timeout=60, verify=False)


def test_memory_that_is_not_to_be_had_is_507_and_the_service_lives_on(
    right: tuple[Served, list[float]],
) -> None:
    served, embedding = right
    large = plain(6000, 6000)  # 144 MB decoded
    assert ask(served, large).status_code == 200
    unlimited = resource.prlimit(served.process.pid, resource.RLIMIT_AS)
    size = served.memory("VmSize") + 2**26
    resource.prlimit(served.process.pid, resource.RLIMIT_AS, (size, unlimited[1]))
    for _ in range(3):
        answer = ask(served, large)
        assert answer.status_code == 507, answer.text
        assert "no memory for a picture of 6000 x 6000 pixels now; send a smaller" in answer.json()["error"]
        assert ask(served, picture(0)).json()["embedding"] == pytest.approx(embedding, abs=1e-5)
    resource.prlimit(served.process.pid, resource.RLIMIT_AS, unlimited)
    assert ask(served, large).status_code == 200
    assert served.errors == ""


def test_it_ends_with_what_has_arrived_answered_and_the_rest_let_go(
    right: tuple[Served, list[float]],
) -> None:
    """The last test of the module's process: SIGTERM."""
    served, embedding = right
    with ExitStack() as stack, ThreadPoolExecutor(8) as pool:

        def connect(*sent: bytes) -> Client:
            return stack.enter_context(Client(served, *sent))

        for _ in range(20):
            connect()
        bodies = [connect(post(5000), b"abc") for _ in range(20)]
        connect(chunked(), b"zz\r\n")
        connect(b"\x16\x03\x01\r\n\r\n")
        data = plain(6000, 6000)
        large = [pool.submit(ask, served, data) for _ in range(7)]
        url = f"http://127.0.0.1:{served.port}/metrics"
        until(lambda: "selfmask_waiting 7" in httpx.get(url, verify=False).text)
        assert ask(served, picture(0)).json()["embedding"] == pytest.approx(embedding, abs=1e-5)
        assert served.stop() < 25, "stalled clients have 30 seconds"
        assert [future.result().status_code for future in large] == [200] * 7
        for client in bodies:
            assert "the service is stopping" in client.answer().reason
    assert served.errors == ""


def test_limits_are_in_the_docs_with_their_defaults() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--([a-z-]+)` \| (\S+) \|", text, flags=re.MULTILINE)
    limits = Limits()
    stated = {limit.name.replace("_", "-"): str(getattr(limits, limit.name)) for limit in fields(limits)}
    assert dict(rows) == stated


def test_limits_are_options_that_are_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    for line in ("--head-seconds N", "--max-connections N", "open connections; beyond", "(20971520)"):
        assert line in text
    for option, value, said in (
        ("--body-seconds", "0", "is 0.0; it must be above 0"),
        ("--max-batch", "-1", "is -1; it must be above 0"),
        ("--answer-seconds", "nan", "is nan; it must be above 0"),
        ("--wait-ms", "-1", "is -1.0; it must be 0 or more"),
    ):
        assert cli.main(["serve", option, value]) == exit_status.BAD_INPUT
        assert f"{option} {said}" in capsys.readouterr().err
