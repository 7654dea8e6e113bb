"""Slow nodes are named before a run begins."""

from pathlib import Path

import pytest
import torch.distributed as dist

from selfmask_dist.parallel import World
from selfmask_dist.runs.speed.fabric import check_fabric, slow_nodes
from tests.support.distributed import run_distributed
from tests.support.tiny_run import events_of, submit, write_config, write_tiny_data


@pytest.mark.parametrize(
    ("speeds", "slow"),
    [
        ([10.0, 9.0, 11.0, 10.0], []),
        ([10.0, 2.0, 2.0, 10.0], ["c"]),  # both of its pairs
        ([10.0, 2.0, 10.0, 10.0], []),  # one link, and neither node alone
        ([2.0, 10.0, 10.0, 10.0], ["a"]),
        ([10.0, 10.0, 10.0, 2.0], ["e"]),
        ([2.0, 2.0, 10.0, 10.0, 10.0], ["b"]),  # its neighbour at the end is explained by it
    ],
)
def test_a_node_is_slow_where_all_its_pairs_are(speeds: list[float], slow: list[str]) -> None:
    hosts = list("abcdef")[: len(speeds) + 1]
    assert slow_nodes(hosts, dict(enumerate(speeds))) == slow


def _check() -> tuple[dict[str, float], int, dict[str, float]]:
    world = World(dist.get_rank(), dist.get_world_size())
    pairs, _ = check_fabric(world, ranks_per_node=1)
    return pairs, dist.get_world_size(), check_fabric(world, ranks_per_node=3)[0]


@pytest.mark.distributed
def test_every_pair_of_neighbours_is_measured() -> None:
    for pairs, size, one_node in run_distributed(_check, world_size=3):
        assert size == 3  # the group of all is as it was
        assert one_node == {}
        assert pairs
        assert all(speed > 0 for speed in pairs.values())


def test_two_local_nodes_check_their_fabric_at_the_start(tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.yaml", write_tiny_data(tmp_path / "data"))
    done = submit(config, "launch.fabric_check=true", "train.epochs=1", nodes=2)
    assert done.returncode == 0, done.stderr
    (found,) = [event for event in events_of(tmp_path / "run") if event["event"] == "fabric"]
    assert found["slow"] == []
    assert len(found["gigabytes_per_second"]) == 1
    assert "GB/s between neighbour nodes" in done.stderr
