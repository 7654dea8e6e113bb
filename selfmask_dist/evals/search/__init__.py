"""Exact nearest neighbours of a bank that ranks share: `rounds` between them, `local` within one's part."""

from selfmask_dist.evals.search.local import Precision
from selfmask_dist.evals.search.rounds import (
    MEMORY_MIB,
    BankOptions,
    Plan,
    SearchOptions,
    search,
    search_rounds,
)

__all__ = [
    "MEMORY_MIB",
    "BankOptions",
    "Plan",
    "Precision",
    "SearchOptions",
    "search",
    "search_rounds",
]
