"""A request that is not served: the status, and a sentence that says the cause and the way out."""

import torch


class RefusedError(Exception):
    """Why a request is not served.

    status: of HTTP. 503 stands for "later": its answer carries `Retry-After`.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers that go with the status."""
        return {"Retry-After": "1"} if self.status == 503 else {}


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or what it came from, is memory that was not to be had."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        # torch's allocator for the CPU raises a RuntimeError
        if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
            return True
        error = error.__cause__
    return False
