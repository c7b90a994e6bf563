"""The OpenAPI description of a server: of its own model, with its own limits."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from forge_harness.security.access import PUBLIC

from .exchange import LONGEST_DEADLINE_MS
from .inputs import DEFAULT_TOKENS, MAX_ROWS
from .package import Classifier, Served
from .problems import KINDS
from .problems import MEDIA_TYPE as PROBLEM_TYPE
from .streaming import MEDIA_TYPE as EVENTS_TYPE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .route import Route

_HEADERS = {
    "X-Request-Id": {"schema": {"type": "string"}, "description": "The one sent, or a new one."},
    "X-Queue-Ms": {"schema": {"type": "number"}, "description": "Milliseconds in the queue."},
    "X-Batch-Size": {"schema": {"type": "integer"}, "description": "Requests computed together."},
}
_PARAMETERS = [
    {
        "name": "X-Request-Id",
        "in": "header",
        "description": "Ties answer and audit record to the request.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    },
    {
        "name": "X-Deadline-Ms",
        "in": "header",
        "description": "Milliseconds the client waits; the server's own deadline is the most.",
        "schema": {"type": "integer", "minimum": 1, "maximum": LONGEST_DEADLINE_MS},
    },
]
_CHANGING = ("/v1/predict", "/v1/completions")


def document(routes: Iterable[Route], served: Served) -> dict[str, Any]:
    """Returns the OpenAPI 3.1 document of the routes.

    Args:
        routes: All of the server.
        served: The model; sizes and limits in the document are its own.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"Forge Harness serving {served.name}",
            "version": version("bitnet-forge-harness"),
            "description": "Each request ends in one outcome; errors are problem documents.",
        },
        "paths": {
            route.path: {route.method.lower(): _operation(route, served)} for route in routes
        },
        "components": {
            "schemas": _schemas(served),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, served: Served) -> dict[str, Any]:
    summary = (route.handler.__doc__ or "").strip().splitlines()[0]
    operation: dict[str, Any] = {
        "operationId": route.path.strip("/").replace("/", "_").replace(".", "_"),
        "summary": summary,
        "responses": {**_answers(route), **_problems(route)},
        "x-permission": str(route.permission),
    }
    if route.permission != PUBLIC:
        operation["security"] = [{"token": []}]
    if route.path in _CHANGING:
        name = _request_name(route.path)
        operation["parameters"] = _PARAMETERS
        operation["requestBody"] = {"required": True, "content": _json(name)}
    return operation


def _request_name(path: str) -> str:
    return "PredictRequest" if path == "/v1/predict" else "CompletionRequest"


def _answers(route: Route) -> dict[str, Any]:
    match route.path:
        case "/v1/predict":
            content = _json("Prediction")
        case "/v1/completions":
            content = {**_json("Completion"), EVENTS_TYPE: {"schema": {"type": "string"}}}
        case "/metrics":
            content = {"text/plain": {"schema": {"type": "string"}}}
        case "/readyz":
            ready = {"description": "Ready.", "content": _json("State")}
            return {"200": ready, "503": {**ready, "description": "Not ready."}}
        case "/v1/drain":
            return {"202": {"description": "A drain begins.", "content": _json("State")}}
        case _:
            content = {"application/json": {"schema": {"type": "object"}}}
    answer: dict[str, Any] = {"description": "Done.", "content": content}
    if route.path in _CHANGING:
        answer["headers"] = _HEADERS
    return {"200": answer}


def _problems(route: Route) -> dict[str, Any]:
    """Returns the problems a route may answer with."""
    if route.permission == PUBLIC:
        return {}
    every = {401, 403, 405, 500, 503}
    mine = {kind.status for kind in KINDS if kind.status != 499}
    statuses = mine if route.path in _CHANGING else every
    content = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    found: dict[str, Any] = {}
    for kind in KINDS:
        if kind.status in statuses:
            before = found.get(str(kind.status), {}).get("description")
            text = f"{before} Or: {kind.title}." if before else f"{kind.title}."
            found[str(kind.status)] = {"description": text, "content": content}
    return found


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _schemas(served: Served) -> Mapping[str, Any]:
    return {
        **_predict_schemas(served),
        **_completion_schemas(served),
        "State": _object(
            {
                "state": {"enum": ["starting", "ready", "degraded", "draining", "failed"]},
                "reason": {"type": "string"},
            },
            required=["state"],
        ),
        "Problem": _object(
            {
                "type": {"type": "string", "format": "uri"},
                "title": {"type": "string"},
                "status": {"type": "integer"},
                "detail": {"type": "string"},
                "request_id": {"type": "string"},
            }
        ),
    }


def _predict_schemas(served: Served) -> dict[str, Any]:
    inputs = served.inputs if isinstance(served, Classifier) else None
    row: dict[str, Any] = {"type": "array", "items": {"type": "number"}}
    sized = row if inputs is None else {**row, "minItems": inputs, "maxItems": inputs}
    rows = {"type": "array", "items": sized, "minItems": 1, "maxItems": MAX_ROWS}
    return {
        "PredictRequest": _object(
            {"inputs": rows, "model": {"type": "string"}}, required=["inputs"]
        ),
        "Prediction": _object(
            {
                "labels": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                "logits": {"type": "array", "items": row},
                "model": {"type": "string"},
                "request_id": {"type": "string"},
            }
        ),
    }


def _completion_schemas(served: Served) -> dict[str, Any]:
    most = {} if isinstance(served, Classifier) else {"maximum": served.context}
    token = {"type": "integer", "minimum": 0}
    tokens: dict[str, Any] = {"type": "array", "items": token}
    prompt = {"oneOf": [{"type": "string", "minLength": 1}, {**tokens, "minItems": 1}]}
    choice = _object(
        {"text": {"type": "string"}, "tokens": tokens, "finish_reason": {"const": "length"}}
    )
    return {
        "CompletionRequest": _object(
            {
                "prompt": prompt,
                "max_tokens": {
                    "type": "integer",
                    "minimum": 1,
                    "default": DEFAULT_TOKENS,
                    **most,
                },
                "temperature": {"type": "number", "minimum": 0, "maximum": 100, "default": 0},
                "seed": {"type": ["integer", "null"], "minimum": 0},
                "stream": {"type": "boolean", "default": False},
                "model": {"type": "string"},
            },
            required=["prompt"],
        ),
        "Completion": _object(
            {
                "choices": {"type": "array", "items": choice, "minItems": 1, "maxItems": 1},
                "usage": _object({"prompt_tokens": token, "completion_tokens": token}),
                "model": {"type": "string"},
                "request_id": {"type": "string"},
            }
        ),
    }


def _object(properties: dict[str, Any], *, required: list[str] | None = None) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
    }
