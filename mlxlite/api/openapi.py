"""The OpenAPI 3.1 document, made of the endpoints and their tables of fields. Pure.

What a field may hold is described by its reader, so that the document and the parser cannot differ
(tested: generated requests never find an answer that is not in here).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from mlxlite import __version__
from mlxlite.api.endpoint import JSON, Endpoint
from mlxlite.api.fields import Table, Use
from mlxlite.api.readers import schema
from mlxlite.api.service import Service
from mlxlite.http.connection import Exchange

EVENTS: Final = "text/event-stream"


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": properties}


_STRING: Final = {"type": "string"}
_STRING_OR_NULL: Final = {"type": ["string", "null"]}
_COUNT: Final = {"type": "integer", "minimum": 0}
_LIST: Final = {"type": "array", "items": {"type": "object"}}
_USAGE: Final = _object(
    "prompt_tokens total_tokens",
    **dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT),
)


def _completion(kind: str) -> dict[str, Any]:
    choice = _object("index finish_reason logprobs", index=_COUNT, finish_reason=_STRING)
    return _object(
        "id object created model choices usage",
        id=_STRING,
        object={"const": kind},
        created=_COUNT,
        model=_STRING,
        choices={"type": "array", "items": choice},
        usage=_USAGE,
    )


SCHEMAS: Final[Mapping[str, Any]] = {
    "Object": {"type": "object"},
    "Text": _STRING,
    "ChatCompletion": _completion("chat.completion"),
    "Completion": _completion("text_completion"),
    "Response": _object(
        "id object created_at model status output",
        id=_STRING,
        object={"const": "response"},
        status={"enum": ["completed", "incomplete", "cancelled", "failed"]},
        output=_LIST,
    ),
    "Message": _object(
        "id type role content model stop_reason usage",
        id=_STRING,
        type={"const": "message"},
        role={"const": "assistant"},
        content=_LIST,
        stop_reason=_STRING_OR_NULL,
    ),
    "Embeddings": _object(
        "object data model usage", object={"const": "list"}, data=_LIST, usage=_USAGE
    ),
    "Error": _object(
        "error",
        error=_object(
            "message type",
            **dict.fromkeys(("message", "type"), _STRING),
            **dict.fromkeys(("param", "code"), _STRING_OR_NULL),
        ),
    ),
}
_ERRORS: Final = tuple(map(str, (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 501, 503)))


def openapi_endpoint(endpoints: Sequence[Endpoint]) -> Endpoint:
    """`/openapi.json`, which describes these endpoints and itself."""

    def handle(_service: Service, exchange: Exchange, _body: bytes) -> None:
        exchange.respond(200, document((*endpoints, own)))

    own = Endpoint("GET", "/openapi.json", "This document", handle, is_open=True)
    return own


def document(endpoints: Sequence[Endpoint]) -> bytes:
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    keys = {"key": {"type": "http", "scheme": "bearer"}}
    components = {"schemas": SCHEMAS, "securitySchemes": keys}
    about = {"openapi": "3.1.0", "info": {"title": "mlxlite", "version": __version__}}
    return orjson.dumps({**about, "paths": paths, "components": components})


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    answer: dict[str, Any] = {endpoint.media_type: {"schema": _ref(endpoint.answer_schema)}}
    if endpoint.is_stream:
        answer[EVENTS] = {}  # a schema would be of the whole stream, or of each event: tools differ
    error = {"description": "An error", "content": {JSON: {"schema": _ref("Error")}}}
    responses = {"200": {"description": "The answer", "content": answer}}
    responses |= dict.fromkeys(_ERRORS, error)
    if endpoint.path == "/health":
        responses["503"] = {"description": "Not now", "content": answer}
    shown: dict[str, Any] = {"summary": endpoint.summary, "responses": responses}
    if not endpoint.is_open:
        shown["security"] = [{"key": []}, {}]
    if "{id}" in endpoint.path:
        shown["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": _STRING}]
    if endpoint.fields is not None:
        schema = _body(endpoint.fields)
        is_required, content = bool(schema["required"]), {JSON: {"schema": schema}}
        shown["requestBody"] = {"required": is_required, "content": content}
    return shown


def _body(fields: Table) -> dict[str, Any]:
    properties = {
        name: schema(entry.read) | {"description": entry.note}
        for name, entry in fields.items()
        if entry.use is not Use.UNSUPPORTED
    }
    required = [name for name, entry in fields.items() if entry.is_required]
    for name in required:  # null is as good as absent
        if "type" in (rules := properties[name]):
            rules["type"] = [kind for kind in rules["type"] if kind != "null"]
    return {"type": "object", "required": required, "properties": properties}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
