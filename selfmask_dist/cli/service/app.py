"""The ASGI application: routes, slots for requests that have arrived, and the time until their answers.

A request takes one of `max_waiting` slots when all of it is here, and gives it back with its answer, at its
deadline, or when its client goes away. Whatever is refused costs nothing else. Knows nothing of sockets.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from selfmask_dist.cli.service import openapi, page
from selfmask_dist.cli.service.bodies import Bodies
from selfmask_dist.cli.service.encoder import Encoder
from selfmask_dist.cli.service.limits import Limits
from selfmask_dist.cli.service.pictures import Pictures
from selfmask_dist.cli.service.refusal import RefusedError, is_out_of_memory
from selfmask_dist.common.preprocessing import Preprocessing
from selfmask_dist.maskfile import Model
from selfmask_dist.maskfile.bank import MaskBank
from selfmask_dist.models.whole import ranked

_LOG = logging.getLogger(__name__)
_ROUTES = (
    "POST /embed, GET /masks, GET /health, GET /metrics, POST /predict, GET /openapi.json and GET /, a page"
)
_TOP = 5  # classes of an answer, where a request does not say how many


def create_app(
    bank: MaskBank,
    preprocessing: Preprocessing,
    limits: Limits | None = None,
    models: Mapping[str, Model] | None = None,
) -> Starlette:
    """Return the ASGI application over a bank, whose masks may be added and removed while it serves.

    Its `state.requests` counts answers by status. The limits on connections, heads and sending are those of
    `server.make_server`, which runs it.

    Args:
        models: heads and class names by the name of their mask, for `/predict`.
    """
    service = _Service(bank, preprocessing, limits or Limits(), models or {})
    app = Starlette(
        routes=[
            Route("/", service.page),
            Route("/openapi.json", service.openapi),
            Route("/embed", service.embed, methods=["POST"]),
            Route("/predict", service.predict, methods=["POST"]),
            Route("/masks", service.masks),
            Route("/health", service.health),
            Route("/metrics", service.metrics),
        ],
        exception_handlers={HTTPException: service.not_here},
        lifespan=service.running,
    )
    app.state.requests = service.requests
    return app


class _Service:
    def __init__(
        self, bank: MaskBank, preprocessing: Preprocessing, limits: Limits, models: Mapping[str, Model]
    ) -> None:
        self._bank, self._limits, self._models = bank, limits, models
        self._bodies = Bodies(limits)
        self._pictures = Pictures(preprocessing, limits)
        self._encoder = Encoder(bank, limits, models)
        self._waiting = 0
        self.requests: Counter[int] = Counter()  # by status

    @asynccontextmanager
    async def running(self, _app: Starlette) -> AsyncIterator[None]:
        """Keep the encoder going for as long as the application lives."""
        try:
            async with self._encoder.running():
                yield
        finally:
            self._pictures.close()

    async def embed(self, request: Request) -> Response:
        """Answer `POST /embed` with an embedding, or with a reason and the status that goes with it."""
        return await self._guarded(self._embed, request)

    async def predict(self, request: Request) -> Response:
        """Answer `POST /predict` with classes, or with a reason and the status that goes with it."""
        return await self._guarded(self._predict, request)

    async def _guarded(
        self, work: Callable[[Request], Awaitable[dict[str, object]]], request: Request
    ) -> Response:
        try:
            return self._answer(await work(request), 200)
        except RefusedError as refused:
            return self._answer({"error": refused.reason}, refused.status, refused.headers)
        except ClientDisconnect:
            return self._answer({"error": "the client went away"}, 499)
        except Exception as error:
            if is_out_of_memory(error):
                return self._answer(
                    {"error": "there is no memory for this request; send a smaller picture"}, 507
                )
            _LOG.error("a request failed: %s: %s", type(error).__name__, error)
            reason = f"the service fails on this request ({type(error).__name__}: {error}); tell who runs it"
            return self._answer({"error": reason}, 503)

    async def _embed(self, request: Request) -> dict[str, object]:
        mask = self._mask(_parameters(request, ("mask",)).get("mask"))
        return {"mask": mask, "embedding": await self._picture(request, mask, has_head=False)}

    async def _predict(self, request: Request) -> dict[str, object]:
        given = _parameters(request, ("mask", "top", "logits"))
        mask = self._mask(given.get("mask", next(iter(self._models)) if len(self._models) == 1 else None))
        if mask is None or mask not in self._models:
            known = ", ".join(list(self._models)[:20]) or "none"
            what = "name a mask" if mask is None else f"the mask {mask!r} has no head, only embeddings"
            raise RefusedError(400, f"{what}; classes are known of {known}")
        top, with_logits = _number(given.get("top", str(_TOP))), given.get("logits", "false")
        if with_logits not in ("true", "false"):
            raise RefusedError(400, f"`logits` is {with_logits[:50]!r}; it is true or false")
        head = self._models[mask].head
        target = "class" if head is None else head.target
        if target == "dense":
            raise RefusedError(400, f"the head of {mask!r} is of patches, not of pictures")
        logits = await self._picture(request, mask, has_head=True)
        found = ranked("", torch.tensor(logits), self._models[mask].classes, top, target=target).to_dict()
        answer = {"mask": mask, **{key: value for key, value in found.items() if key != "picture"}}
        return {**answer, "logits": logits} if with_logits == "true" else answer

    async def _picture(self, request: Request, mask: str | None, *, has_head: bool) -> list[float]:
        """Return what the encoder, or a mask's head, makes of the picture that a request brings."""
        data = await self._bodies.read(request)
        try:
            if self._waiting >= self._limits.max_waiting:
                raise RefusedError(
                    503, f"{self._waiting} requests are waiting already; try again in a second"
                )
            self._waiting += 1
            try:
                content_type = request.headers.get("content-type", "")
                return await self._in_time(
                    self._compute(data, content_type, mask, has_head=has_head), request
                )
            finally:
                self._waiting -= 1
        finally:
            self._bodies.release(data)

    def _mask(self, mask: str | None) -> str | None:
        """Return the mask that a request names, once it is known to be there; None: the frozen backbone."""
        if mask is not None and mask not in self._bank:
            known = ", ".join(self._bank.names[:20]) or "none"
            raise RefusedError(404, f"there is no mask {mask[:100]!r}; there is {known} (all: GET /masks)")
        return mask

    async def _compute(
        self, data: bytes, content_type: str, mask: str | None, *, has_head: bool
    ) -> list[float]:
        picture = await self._pictures.view(data, content_type)
        return await self._encoder.embed(picture, mask, has_head=has_head)

    async def _in_time(self, work: Coroutine[Any, Any, list[float]], request: Request) -> list[float]:
        """Return what `work` gives; it is dropped at its deadline, and when its client goes away."""
        answer, gone = asyncio.create_task(work), asyncio.create_task(_until_gone(request))
        try:
            await asyncio.wait(
                (answer, gone), timeout=self._limits.answer_seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if answer.done():
                return answer.result()
            if gone.done():
                raise ClientDisconnect
            raise RefusedError(
                503,
                f"there was no answer within {self._limits.answer_seconds:g} seconds, as {self._waiting}"
                " requests are waiting; try again later",
            )
        finally:
            answer.cancel()
            gone.cancel()

    async def masks(self, _request: Request) -> Response:
        """Answer `GET /masks` with the names of the masks, and the number of classes of those with a head."""
        classes = {name: len(model.classes) for name, model in self._models.items() if name in self._bank}
        return JSONResponse({"masks": self._bank.names, **({"classes": classes} if classes else {})})

    async def page(self, _request: Request) -> Response:
        """Answer `GET /` with a page for trying the service in a browser."""
        return HTMLResponse(page.HTML, headers=page.HEADERS)

    async def openapi(self, _request: Request) -> Response:
        """Answer `GET /openapi.json` with a description of the service in OpenAPI's form."""
        return JSONResponse(openapi.describe(self._limits))

    async def health(self, _request: Request) -> Response:
        """Answer `GET /health`: 200 while the encoder works, else 503."""
        if not self._encoder.is_alive:
            return JSONResponse({"status": "stopped"}, 503)
        if self._encoder.failure:
            return JSONResponse({"status": self._encoder.failure}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, _request: Request) -> Response:
        """Answer `GET /metrics` in Prometheus' text format."""
        lines = [f'selfmask_requests_total{{status="{status}"}} {n}' for status, n in self.requests.items()]
        lines += [
            f"selfmask_pictures_total {self._encoder.pictures}",
            f"selfmask_passes_total {self._encoder.passes}",
            f"selfmask_encoder_seconds_total {self._encoder.seconds:.6f}",
            f"selfmask_waiting {self._waiting}",
            f"selfmask_body_bytes {self._bodies.held}",
            f"selfmask_masks {len(self._bank)}",
            f"selfmask_mask_bytes {self._bank.num_bytes}",
            f"selfmask_cached_bytes {self._bank.cached_bytes}",
            f"selfmask_layers_decoded_total {self._bank.layers_decoded}",
        ]
        return PlainTextResponse("\n".join(lines) + "\n")

    async def not_here(self, request: Request, error: Exception) -> Response:
        """Answer a path or a method that is not served."""
        assert isinstance(error, HTTPException)
        reason = f"{request.method[:20]} {request.url.path[:100]} is not served; there are {_ROUTES}"
        return self._answer({"error": reason}, error.status_code, dict(error.headers or {}))

    def _answer(self, content: object, status: int, headers: dict[str, str] | None = None) -> Response:
        self.requests[status] += 1
        return JSONResponse(content, status, headers)


def _parameters(request: Request, known: tuple[str, ...]) -> dict[str, str]:
    """Return a request's parameters by name. Raises RefusedError for one that is unknown, or there twice."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            only = "the only one is" if len(known) == 1 else "there are"
            raise RefusedError(
                400, f"there is no parameter {name[:50]!r}; {only} {', '.join(f'`{one}`' for one in known)}"
            )
        if name in found:
            number = len(request.query_params.getlist(name))
            what = f"{number} masks are named" if name == "mask" else f"`{name}` is given {number} times"
            raise RefusedError(400, f"{what}; ask for one with each picture")
        found[name] = value
    return found


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < len(text) < 10 or int(text) < 1:
        raise RefusedError(400, f"`top` is {text[:50]!r}; it is a number of classes, 1 or more")
    return int(text)


async def _until_gone(request: Request) -> None:
    """Return when the client of a request that has arrived closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
