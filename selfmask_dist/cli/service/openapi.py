"""The service in OpenAPI's form, for programs that make clients out of it. Knows no requests."""

from typing import Any

from selfmask_dist.cli.service.limits import Limits
from selfmask_dist.common.version import VERSION

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {"error": {"type": "string", "description": "The cause, and the way out."}},
}
_CLASS = {
    "type": "object",
    "required": ["class", "index", "probability", "logit"],
    "properties": {
        "class": {"type": "string"},
        "index": {"type": "integer", "minimum": 0},
        "probability": {"type": "number", "minimum": 0, "maximum": 1},
        "logit": {"type": "number"},
    },
}
_ROUTE = {
    "type": "object",
    "required": ["expert", "shares"],
    "description": "Of a cascade: which expert the picture went to, and the share of each.",
    "properties": {
        "expert": {"type": "integer", "minimum": 0},
        "shares": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}},
    },
}
_REFUSALS = {
    400: "a parameter, or a body that is no picture",
    404: "there is no such mask",
    408: "the request did not arrive in time",
    413: "the picture is too large",
    415: "the body is encoded",
    431: "the request's head is too large",
    503: "later: too many requests, or no answer in time (Retry-After)",
    507: "no memory for this picture",
}


def describe(limits: Limits) -> dict[str, Any]:
    """Return the document of `GET /openapi.json`.

    Args:
        limits: those that a client has to know are written into it.
    """
    masks = {"type": "array", "items": {"type": "string"}}
    numbers = {"type": "array", "items": {"type": "number"}}
    counts = {"type": "object", "additionalProperties": {"type": "integer"}}
    mask = {"type": "string", "nullable": True}
    route = {"$ref": "#/components/schemas/Route"}
    cascades = _cascades()
    top = {"type": "array", "items": {"$ref": "#/components/schemas/Class"}}
    return {
        "openapi": "3.0.3",
        "info": {"title": "Masks of one backbone", "version": VERSION},
        "paths": {
            "/embed": {
                "post": _post(
                    "The embedding of a picture.",
                    [
                        _query(
                            "mask", "Under which mask or cascade; without it, the frozen backbone.", _string()
                        )
                    ],
                    {"mask": mask, "embedding": numbers, "route": route},
                    limits,
                    optional=("route",),
                )
            },
            "/predict": {
                "post": _post(
                    "The most likely classes of a picture, by the head that came with a mask.",
                    [
                        _query("mask", "May be left out where one mask alone has a head.", _string()),
                        _query("top", "How many classes; 5.", {"type": "integer", "minimum": 1}),
                        _query("logits", "With the logits of all classes.", {"type": "boolean"}),
                    ],
                    {"mask": mask, "top": top, "logits": numbers, "route": route},
                    limits,
                    optional=("logits", "route"),
                )
            },
            "/masks": _get(
                "The masks and cascades, and the number of classes of those with a head.",
                {"masks": masks, "classes": counts, "cascades": cascades},
            ),
            "/health": _get("Whether the encoder works.", {"status": _string()}, refusals=(503,)),
            "/metrics": {
                "get": {
                    "summary": "Counters in Prometheus' text format.",
                    "responses": {
                        "200": {"description": "", "content": {"text/plain": {"schema": _string()}}}
                    },
                }
            },
        },
        "components": {"schemas": {"Error": _ERROR, "Class": _CLASS, "Route": _ROUTE}},
    }


def _cascades() -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": {
            "type": "object",
            "required": ["mode", "experts"],
            "properties": {"mode": _string(), "experts": {"type": "integer", "minimum": 1}},
        },
    }


def _string() -> dict[str, Any]:
    return {"type": "string"}


def _query(name: str, text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": text, "schema": schema}


def _answer(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    schema = {"type": "object", "required": required, "properties": properties}
    return {"description": "", "content": {"application/json": {"schema": schema}}}


def _refusal(status: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Error"}
    return {"description": _REFUSALS[status], "content": {"application/json": {"schema": schema}}}


def _post(
    text: str,
    parameters: list[dict[str, Any]],
    properties: dict[str, Any],
    limits: Limits,
    *,
    optional: tuple[str, ...] = (),
) -> dict[str, Any]:
    picture = {"schema": {"type": "string", "format": "binary", "maxLength": limits.max_bytes}}
    return {
        "summary": text,
        "parameters": parameters,
        "requestBody": {
            "required": True,
            "description": f"The picture's own bytes, at most {limits.max_bytes:,}, of at most "
            f"{limits.max_pixels:,} pixels: JPEG, PNG, WebP, GIF, BMP, TIFF or PPM.",
            "content": {"application/octet-stream": picture, "image/*": picture},
        },
        "responses": {
            "200": _answer(properties, optional),
            **{str(status): _refusal(status) for status in _REFUSALS},
        },
    }


def _get(text: str, properties: dict[str, Any], *, refusals: tuple[int, ...] = ()) -> dict[str, Any]:
    responses = {"200": _answer(properties, ("classes", "cascades"))}
    return {
        "get": {
            "summary": text,
            "responses": responses | {str(status): _refusal(status) for status in refusals},
        }
    }
