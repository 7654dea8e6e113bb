"""The helper is right about wrong programs: an error, a death or a hang is named and leaves nothing."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.distributed import DistributedError, run_distributed

pytestmark = pytest.mark.distributed


def _sum_of_ranks(start: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = start + dist.get_rank()
    dist.all_reduce(total)
    return dist.get_rank(), total


def _rank_one_raises() -> None:
    if dist.get_rank() == 1:
        raise KeyError("a wrong name")
    dist.barrier()


def _rank_one_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    time.sleep(60)


def _rank_one_hangs(pid_folder: str) -> None:
    with open(f"{pid_folder}/{dist.get_rank()}", "w") as file:
        file.write(str(os.getpid()))
    if dist.get_rank() == 0:
        dist.barrier()
    time.sleep(60)


def _environment() -> tuple[str, str]:
    dist.init_process_group("gloo")
    return os.environ["FLAG"], os.environ["WORLD_SIZE"]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_every_rank_answers_in_order_and_the_group_works():
    answers = run_distributed(_sum_of_ranks, 3, torch.tensor([1.0, 2.0]))
    assert [rank for rank, _ in answers] == [0, 1, 2]
    for _, total in answers:
        assert total.tolist() == [3 * 1.0 + 3, 3 * 2.0 + 3]


def test_an_error_in_one_rank_is_raised_with_its_traceback_and_does_not_wait_for_the_others():
    start = time.monotonic()
    with pytest.raises(
        DistributedError, match=r"(?s)^rank 1 failed:.*_rank_one_raises.*KeyError: 'a wrong name'"
    ) as caught:
        run_distributed(_rank_one_raises, 2, timeout=30)
    assert "rank 0" not in str(caught.value)  # it only waited
    assert time.monotonic() - start < 15


def test_a_rank_that_dies_is_reported_with_its_exit_code():
    with pytest.raises(DistributedError, match="rank 1 died with exit code 7"):
        run_distributed(_rank_one_dies, 2, timeout=30)


def test_a_hang_ends_in_time_names_the_place_and_leaves_no_process(tmp_path):
    with pytest.raises(  # on a busy machine rank 0 may be told that rank 1 was ended, before it is itself
        DistributedError, match=r"(?s)rank 0 (hangs|failed):.*barrier.*rank 1 hangs:.*in _rank_one_hangs"
    ):
        run_distributed(_rank_one_hangs, 2, str(tmp_path), timeout=2)
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert not any(_is_alive(pid) for pid in pids)


def test_without_a_backend_the_ranks_can_make_their_group_from_the_environment(monkeypatch):
    monkeypatch.setenv("FLAG", "the caller's")
    assert run_distributed(_environment, 2, backend="") == [("the caller's", "2")] * 2
    assert run_distributed(_environment, 1, backend="", env={"FLAG": "mine"}) == [("mine", "1")]
