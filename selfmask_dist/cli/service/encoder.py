"""The one place where pictures are computed: views that wait at the same time go through the bank together.

A pass that fails is made again in halves, so that one picture's failure, or memory that does not hold all of
them, is not every picture's. Knows nothing of HTTP but the status of a refusal.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import torch
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from selfmask_dist.cascade.model import Route
from selfmask_dist.cli.service.limits import Limits
from selfmask_dist.cli.service.refusal import RefusedError, is_out_of_memory
from selfmask_dist.cli.service.routes import ServedCascade
from selfmask_dist.maskfile import Head, Model
from selfmask_dist.maskfile.bank import MaskBank

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What a picture gave. numbers: its embedding or logits. route: of a cascade."""

    numbers: list[float]
    route: Route | None = None


@dataclass(eq=False)
class _Job:
    picture: Tensor  # (3, size, size), on the CPU
    mask: str | None
    has_head: bool  # whether its mask's logits are wanted, not the embedding
    done: "asyncio.Future[Answer]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Encoder:
    """Passes over the pictures that wait, one after another, while `running`.

    pictures, passes: how many were computed. seconds: that took. failure: why the last pass gave nothing.
    """

    def __init__(
        self,
        bank: MaskBank,
        limits: Limits,
        models: Mapping[str, Model],
        cascades: Mapping[str, ServedCascade],
    ) -> None:
        self._bank, self._limits, self._models, self._cascades = bank, limits, models, cascades
        self._device = next(bank.encoder.parameters()).device
        self._heads: dict[str, tuple[Head, Head]] = {}  # as they came, and on the device
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None
        self.pictures = self.passes = 0
        self.seconds = 0.0
        self.failure = ""

    @property
    def is_alive(self) -> bool:
        """Return whether pictures that come are computed."""
        return self._worker is not None and not self._worker.done()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Compute what comes, until the block ends."""
        self._worker = asyncio.create_task(self._work())
        try:
            yield
        finally:
            self._worker.cancel()
            with suppress(asyncio.CancelledError):
                await self._worker

    async def embed(self, picture: Tensor, mask: str | None, *, has_head: bool = False) -> Answer:
        """Return the embedding of a view (3, size, size) under a mask or cascade, or the logits of its head.

        Raises:
            RefusedError: the mask is gone, memory does not hold the pass, or the encoder fails.
        """
        job = _Job(picture, mask, has_head)
        await self._jobs.put(job)
        return await job.done

    async def _work(self) -> None:
        """Run one pass after another, each over the pictures that have come together by then."""
        while True:
            jobs = [await self._jobs.get()]
            if len(jobs) < self._limits.max_batch:
                await asyncio.sleep(self._limits.wait_ms / 1000)
            while len(jobs) < self._limits.max_batch and not self._jobs.empty():
                jobs.append(self._jobs.get_nowait())
            for job in jobs:
                if not job.done.done() and self._is_gone(job.mask):
                    job.done.set_exception(_mask_is_gone(job.mask))
            jobs = [job for job in jobs if not job.done.done()]  # the client of another went away
            if jobs:
                await self._settle(jobs)

    async def _settle(self, jobs: list[_Job]) -> None:
        start = time.perf_counter()
        outcomes = await run_in_threadpool(self._embed, jobs)
        self.seconds += time.perf_counter() - start
        refused = [outcome for outcome in outcomes if isinstance(outcome, RefusedError)]
        self.pictures += len(jobs) - len(refused)
        self.failure = refused[-1].reason if len(refused) == len(jobs) else ""
        for job, outcome in zip(jobs, outcomes, strict=True):
            if job.done.done():
                continue
            if isinstance(outcome, RefusedError):
                job.done.set_exception(outcome)
            else:
                job.done.set_result(outcome)

    def _is_gone(self, mask: str | None) -> bool:
        if mask is not None and mask in self._cascades:
            return self._cascades[mask].is_gone(self._bank)
        return mask is not None and mask not in self._bank

    def _embed(self, jobs: list[_Job]) -> list[Answer | RefusedError]:
        """Return an embedding or a refusal for each; a pass that fails is made in halves."""
        try:
            return self._pass(jobs)
        except Exception as error:
            if len(jobs) == 1:
                return [self._named(error, jobs[0])]
        # what the failed pass held is free by here, as its frames are gone
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(jobs) // 2
        return self._embed(jobs[:half]) + self._embed(jobs[half:])

    def _pass(self, jobs: list[_Job]) -> list[Answer | RefusedError]:
        images = torch.stack([job.picture for job in jobs]).to(self._device)
        groups: dict[str | None, list[int]] = {}  # by cascade; all that are under masks go together
        for number, job in enumerate(jobs):
            groups.setdefault(job.mask if job.mask in self._cascades else None, []).append(number)
        outcomes: dict[int, Answer | RefusedError] = {}
        for name, numbers in groups.items():
            part = [jobs[number] for number in numbers]
            features, routes = self._features(name, part, images if len(groups) == 1 else images[numbers])
            outcomes |= dict(zip(numbers, self._answers(part, features, routes), strict=True))
        self.passes += 1
        return [outcomes[number] for number in range(len(jobs))]

    def _features(
        self, cascade: str | None, jobs: list[_Job], images: Tensor
    ) -> tuple[Tensor, list[Route] | None]:
        """Return embeddings (n, dim), float32, under a cascade or each job's mask; and a cascade's routes."""
        if cascade is None:
            return self._bank.embed(images, [job.mask for job in jobs]).float(), None
        features, routes = self._cascades[cascade].embed(images)
        return features.float(), routes

    def _answers(
        self, jobs: list[_Job], found: Tensor, routes: list[Route] | None
    ) -> list[Answer | RefusedError]:
        is_finite = found.isfinite().all(dim=1).tolist()
        rows = found.tolist()
        for mask in {job.mask for job in jobs if job.has_head and job.mask is not None}:
            asked = [n for n, job in enumerate(jobs) if job.has_head and job.mask == mask]
            logits = self._head(mask).logits(found[asked])
            for number, row, finite in zip(
                asked, logits.tolist(), logits.isfinite().all(dim=1).tolist(), strict=True
            ):
                rows[number], is_finite[number] = row, is_finite[number] and finite
        ways: Sequence[Route | None] = routes or [None] * len(jobs)
        return [
            Answer(row, route) if finite else _not_finite(job.mask)
            for job, row, route, finite in zip(jobs, rows, ways, is_finite, strict=True)
        ]

    def _head(self, mask: str) -> Head:
        """Return a mask's head on the encoder's device, where it stays until another takes its place."""
        model = self._models.get(mask)
        if model is None or model.head is None:
            raise RefusedError(404, f"the head of the mask {mask!r} was removed meanwhile")
        if mask not in self._heads or self._heads[mask][0] is not model.head:
            self._heads[mask] = (model.head, model.head.to(self._device))
        return self._heads[mask][1]

    def _named(self, error: Exception, job: _Job) -> RefusedError:
        if isinstance(error, RefusedError):
            return error
        if is_out_of_memory(error):
            return RefusedError(507, "the encoder has no memory for one picture now; try again later")
        if self._is_gone(job.mask):
            return _mask_is_gone(job.mask)
        _LOG.error("the encoder fails: %s: %s", type(error).__name__, error)
        return RefusedError(
            503, f"the encoder fails ({type(error).__name__}: {error}); tell who runs the service"
        )


def _mask_is_gone(mask: str | None) -> RefusedError:
    return RefusedError(404, f"the mask {mask!r} was removed meanwhile")


def _not_finite(mask: str | None) -> RefusedError:
    under = "the frozen backbone" if mask is None else f"the mask {mask!r}"
    return RefusedError(
        503, f"the embedding under {under} is not finite; tell who runs the service: weights may be damaged"
    )
