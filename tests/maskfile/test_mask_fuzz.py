"""A short run of `benchmarks/maskfile/fuzz.py`: no mutated file crashes the reader or passes for another."""

from benchmarks.maskfile.fuzz import MAX_MEMORY, fuzz


def test_mutated_files_are_refused_or_say_what_they_are() -> None:
    found = fuzz(900, seed=1)
    assert found["crashed"] == found["malformed"] == found["wrong"] == 0
    assert found["refused"] > 600
    assert found["read"] > 30, "a mutation that is signed again may be a valid file"
    assert found["largest_mib"] * 2**20 < MAX_MEMORY
