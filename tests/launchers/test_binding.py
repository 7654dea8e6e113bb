"""CPUs near a GPU, with a stand-in for nvidia-smi and for what Linux says of devices."""

import os
from pathlib import Path

import pytest

from launchers import binding


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two GPUs on two sockets of four CPUs each; as nvidia-smi and Linux write it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text(
        "#!/bin/sh\necho '0, GPU-aa, 00000000:17:00.0'\necho '1, GPU-bb, 00000000:CA:00.0'\n"
    )
    (programs / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for address, cpus in (("0000:17:00.0", "0-1,4-5"), ("0000:ca:00.0", "2-3,6-7")):
        folder = tmp_path / "bus" / "pci" / "devices" / address
        folder.mkdir(parents=True)
        (folder / "local_cpulist").write_text(f"{cpus}\n")
    return tmp_path


def test_cpus_are_those_of_the_ranks_gpu_that_it_may_use(system: Path) -> None:
    def near(rank: int, allowed: set[int], **environment: str) -> set[int]:
        return binding.cpus_near_gpu(rank, environment, allowed, system=system)

    everything = set(range(8))
    assert near(0, everything) == {0, 1, 4, 5}
    assert near(1, everything) == {2, 3, 6, 7}
    assert near(0, everything, CUDA_VISIBLE_DEVICES="1,0") == {2, 3, 6, 7}
    assert near(1, everything, CUDA_VISIBLE_DEVICES="GPU-bb,GPU-aa") == {0, 1, 4, 5}
    assert near(0, {0, 1, 2}) == {0, 1}, "what SLURM gave it stays the bound"
    assert near(0, {2, 3}) == set(), "SLURM has bound it elsewhere: nothing is changed"
    assert near(2, everything) == set()
    assert near(0, everything, CUDA_VISIBLE_DEVICES="MIG-cc") == set()


def test_nothing_is_bound_where_nobody_knows(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert binding.cpus_near_gpu(0, {}, {0, 1}, system=system) == set()
    before = os.sched_getaffinity(0)
    assert binding.bind_near_gpu(0, {}) == ""
    assert os.sched_getaffinity(0) == before


def test_a_process_and_what_it_starts_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("one CPU: there is nothing to choose")
    one = {min(before)}
    monkeypatch.setattr(binding, "cpus_near_gpu", lambda *_: one)
    try:
        assert f"1 of {len(before)} CPUs" in binding.bind_near_gpu(0, {})
        assert os.sched_getaffinity(0) == one
    finally:
        os.sched_setaffinity(0, before)
