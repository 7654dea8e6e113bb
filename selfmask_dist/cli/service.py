"""A bank of masks over HTTP: a picture in, its embedding under a named mask out.

    POST /embed?mask=NAME   the body is one encoded picture; without `mask`, the frozen backbone
    GET  /masks             names
    GET  /health            200 while the encoder's thread is alive
    GET  /metrics           Prometheus text

Requests that wait at the same time go through the encoder together, grouped by mask. What is too large, no
picture, for a mask that is not there, or more than can wait, is refused with a reason and costs nothing.
`create_app` makes an ASGI application; `selfmask serve` runs it.
"""

import asyncio
import io
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from torch import Tensor

from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.data import eval_transform
from selfmask_dist.data.views.decode import decode
from selfmask_dist.maskfile.bank import MaskBank

# PIL would hand others to programs of the machine (EPS to Ghostscript)
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass(frozen=True)
class Limits:
    """The limits of what the service takes on.

    max_bytes: of one picture as it is sent. max_pixels: of it decoded. max_waiting: requests at once, those
    being computed included. max_batch: pictures in one pass. wait_ms: how long a pass waits for company.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000
    max_waiting: int = 256
    max_batch: int = 64
    wait_ms: float = 2.0


class _RefusedError(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


@dataclass
class _Counts:
    requests: Counter[int] = field(default_factory=Counter)  # by status
    pictures: int = 0
    passes: int = 0
    seconds: float = 0.0  # in the encoder

    def text(self, waiting: int, bank: MaskBank) -> str:
        lines = [f'selfmask_requests_total{{status="{status}"}} {n}' for status, n in self.requests.items()]
        lines += [
            f"selfmask_pictures_total {self.pictures}",
            f"selfmask_passes_total {self.passes}",
            f"selfmask_encoder_seconds_total {self.seconds:.6f}",
            f"selfmask_waiting {waiting}",
            f"selfmask_masks {len(bank)}",
            f"selfmask_mask_bytes {bank.num_bytes}",
            f"selfmask_cached_bytes {bank.cached_bytes}",
            f"selfmask_layers_decoded_total {bank.layers_decoded}",
        ]
        return "\n".join(lines) + "\n"


_Job = tuple[Tensor, str | None, "asyncio.Future[list[float]]"]


class _Service:
    def __init__(self, bank: MaskBank, preprocessing: Preprocessing, limits: Limits) -> None:
        self._bank, self._limits = bank, limits
        self._transform = eval_transform(preprocessing)
        self._device = next(bank.encoder.parameters()).device
        self._counts = _Counts()
        self._waiting = 0
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def running(self, _app: Starlette) -> AsyncIterator[None]:
        """Keep the encoder's worker going for as long as the application lives."""
        self._worker = asyncio.create_task(self._work())
        try:
            yield
        finally:
            self._worker.cancel()
            with suppress(asyncio.CancelledError):
                await self._worker

    # ---- requests

    async def embed(self, request: Request) -> Response:
        """Answer `POST /embed` with an embedding, or with a reason and the status that goes with it."""
        mask = request.query_params.get("mask")
        try:
            embedding = await self._embed(request, mask)
        except _RefusedError as refused:
            headers = {"Retry-After": "1"} if refused.status == 503 else None
            return self._answer({"error": refused.reason}, refused.status, headers)
        except ClientDisconnect:
            return self._answer({"error": "the client went away"}, 499)
        return self._answer({"mask": mask, "embedding": embedding}, 200)

    async def _embed(self, request: Request, mask: str | None) -> list[float]:
        if mask is not None and mask not in self._bank:
            known = ", ".join(self._bank.names[:20]) or "none"
            raise _RefusedError(404, f"there is no mask {mask!r}; there is {known} (all: GET /masks)")
        if self._waiting >= self._limits.max_waiting:
            raise _RefusedError(503, f"{self._waiting} requests are waiting already; try again in a second")
        self._waiting += 1
        try:
            picture = await run_in_threadpool(self._prepare, await self._body(request))
            done: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
            await self._jobs.put((picture, mask, done))
            return await done
        finally:
            self._waiting -= 1

    async def _body(self, request: Request) -> bytes:
        most, body = self._limits.max_bytes, bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise _RefusedError(413, f"the picture takes more than {most:,} bytes; send a smaller one")
        return bytes(body)

    def _prepare(self, data: bytes) -> Tensor:
        """Return the picture as (3, size, size); it is decoded only when its size is known to be allowed."""
        most = self._limits.max_pixels
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
        except Image.DecompressionBombError as error:
            raise _RefusedError(
                413, f"the picture is too large: {error}; at most {most:,} are taken"
            ) from error
        except Exception as error:  # broken files make PIL's plug-ins raise almost anything
            raise _RefusedError(
                400, "the body is no picture that can be read; send a JPEG, PNG or WebP"
            ) from error
        if width * height > most:
            raise _RefusedError(413, f"the picture has {width} x {height} pixels, at most {most:,} are taken")
        try:
            return self._transform(decode(data), np.random.default_rng(0))[0]
        except ValueError as error:
            raise _RefusedError(400, f"the picture {error}") from error

    async def masks(self, _request: Request) -> Response:
        """Answer `GET /masks` with the names of the masks."""
        return JSONResponse({"masks": self._bank.names})

    async def health(self, _request: Request) -> Response:
        """Answer `GET /health`: 200 while the encoder's worker is alive, else 500."""
        is_alive = self._worker is not None and not self._worker.done()
        return JSONResponse({"status": "ok" if is_alive else "stopped"}, 200 if is_alive else 500)

    async def metrics(self, _request: Request) -> Response:
        """Answer `GET /metrics` in Prometheus' text format."""
        return PlainTextResponse(self._counts.text(self._waiting, self._bank))

    def _answer(self, content: object, status: int, headers: dict[str, str] | None = None) -> Response:
        self._counts.requests[status] += 1
        return JSONResponse(content, status, headers)

    # ---- the encoder

    async def _work(self) -> None:
        """Run one pass after another, each over the requests that have come together by then."""
        while True:
            jobs = [await self._jobs.get()]
            if len(jobs) < self._limits.max_batch:
                await asyncio.sleep(self._limits.wait_ms / 1000)
            while len(jobs) < self._limits.max_batch and not self._jobs.empty():
                jobs.append(self._jobs.get_nowait())
            for _, mask, done in jobs:
                if mask is not None and mask not in self._bank and not done.done():
                    done.set_exception(_RefusedError(404, f"the mask {mask!r} was removed meanwhile"))
            jobs = [job for job in jobs if not job[2].done()]  # the client of another went away
            if not jobs:
                continue
            try:
                found = await run_in_threadpool(self._pass, jobs)
            except Exception as error:
                for _, _, done in jobs:
                    if not done.done():
                        done.set_exception(_RefusedError(500, f"{type(error).__name__}: {error}"))
                continue
            for (_, _, done), embedding in zip(jobs, found, strict=True):
                if not done.done():
                    done.set_result(embedding)

    def _pass(self, jobs: list[_Job]) -> list[list[float]]:
        start = time.perf_counter()
        images = torch.stack([picture for picture, _, _ in jobs]).to(self._device)
        embeddings: list[list[float]] = (
            self._bank.embed(images, [mask for _, mask, _ in jobs]).float().tolist()
        )
        self._counts.pictures += len(jobs)
        self._counts.passes += 1
        self._counts.seconds += time.perf_counter() - start
        return embeddings


def create_app(bank: MaskBank, preprocessing: Preprocessing, limits: Limits | None = None) -> Starlette:
    """Return the ASGI application over a bank, whose masks may be added and removed while it serves."""
    service = _Service(bank, preprocessing, limits or Limits())
    return Starlette(
        routes=[
            Route("/embed", service.embed, methods=["POST"]),
            Route("/masks", service.masks),
            Route("/health", service.health),
            Route("/metrics", service.metrics),
        ],
        lifespan=service.running,
    )
