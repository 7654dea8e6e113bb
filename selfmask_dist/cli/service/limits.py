"""What the service takes on at most: one number for each thing that a client could make it hold or do.

Knows nothing of HTTP. Each field is an option of `selfmask serve`, with its text.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any


def _limit(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Limits:
    """The bounds of the service. Raises ValueError for one that is not above 0."""

    max_bytes: int = _limit(20 * 2**20, "bytes of one body")
    max_pixels: int = _limit(50_000_000, "pixels of one picture")
    max_waiting: int = _limit(256, "requests that have arrived and wait for their answers")
    max_batch: int = _limit(64, "pictures in one pass of the encoder")
    wait_ms: float = _limit(2.0, "milliseconds that a pass waits for company")
    max_connections: int = _limit(
        512, "open connections; beyond, the one that sent nothing whole for longest"
    )
    max_held_mib: int = _limit(
        512, "MiB of bodies in memory; beyond, the largest that is still arriving goes"
    )
    max_decode_mib: int = _limit(1536, "MiB for large pictures while they are decoded")
    decoders: int = _limit(0, "threads that decode pictures, 0 for one a core")
    head_seconds: float = _limit(10.0, "seconds for a request's line and headers together")
    body_seconds: float = _limit(30.0, "seconds for a whole body")
    answer_seconds: float = _limit(60.0, "seconds from a request's arrival to its answer")
    send_seconds: float = _limit(30.0, "seconds for a client to take a whole answer")
    idle_seconds: int = _limit(5, "seconds that a connection is kept between requests")

    def __post_init__(self) -> None:
        for limit in fields(self):
            value, can_be_zero = getattr(self, limit.name), limit.name in ("wait_ms", "decoders")
            if not math.isfinite(value) or value < 0 or (value == 0 and not can_be_zero):
                least = "0 or more" if can_be_zero else "above 0"
                raise ValueError(f"--{limit.name.replace('_', '-')} is {value}; it must be {least}")
