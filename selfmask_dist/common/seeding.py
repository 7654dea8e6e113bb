"""Random numbers that follow from a seed and a purpose, so that no state has to be saved and ranks agree."""

import hashlib

import torch


def named_generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by (seed, purpose) alone: the same numbers on every rank and device."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
