"""The server's description of itself: an OpenAPI 3.1 document, from the tables of fields. Pure.

What a field may hold comes from its reader, so that the document cannot say what the parser does
not (tested: generated requests never find an answer that is not in here).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from mlxlite import __version__
from mlxlite.api.endpoints.anthropic_messages import COUNT_FIELDS, MESSAGES_FIELDS
from mlxlite.api.endpoints.completions import COMPLETION_FIELDS
from mlxlite.api.endpoints.embeddings import EMBEDDING_FIELDS
from mlxlite.api.endpoints.responses import RESPONSES_FIELDS
from mlxlite.api.endpoints.tokenize import DETOKENIZE_FIELDS, TOKENIZE_FIELDS
from mlxlite.api.fields import Field, Use, schema, text, works
from mlxlite.api.request import FIELDS

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
_CANCEL_FIELDS: Final[Mapping[str, Field]] = {"id": works(text, "which; default: all")}


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path; `answer` names what a 200 holds, `needs` fields are required."""

    path: str
    method: str
    summary: str
    answer: str
    table: Mapping[str, Field] | None = None
    needs: tuple[str, ...] = ()
    is_stream: bool = False
    is_open: bool = False
    media_type: str = JSON


OPERATIONS: Final[Sequence[Operation]] = (
    Operation(
        "/v1/chat/completions",
        "post",
        "A chat completion",
        "ChatCompletion",
        FIELDS,
        ("messages",),
        is_stream=True,
    ),
    Operation(
        "/v1/completions",
        "post",
        "A text completion",
        "Completion",
        COMPLETION_FIELDS,
        ("prompt",),
        is_stream=True,
    ),
    Operation(
        "/v1/responses",
        "post",
        "A response (OpenAI's newer dialect)",
        "Response",
        RESPONSES_FIELDS,
        ("input",),
        is_stream=True,
    ),
    Operation("/v1/responses/{id}", "get", "A stored response", "Response"),
    Operation("/v1/responses/{id}", "delete", "Forget a stored response", "Object"),
    Operation(
        "/v1/messages",
        "post",
        "A message (Anthropic's dialect)",
        "Message",
        MESSAGES_FIELDS,
        ("messages", "max_tokens"),
        is_stream=True,
    ),
    Operation(
        "/v1/messages/count_tokens",
        "post",
        "How many tokens a message would read",
        "Object",
        COUNT_FIELDS,
        ("messages",),
    ),
    Operation(
        "/v1/embeddings", "post", "Vectors of texts", "Embeddings", EMBEDDING_FIELDS, ("input",)
    ),
    Operation("/tokenize", "post", "A text's tokens", "Object", TOKENIZE_FIELDS),
    Operation("/detokenize", "post", "Tokens' text", "Object", DETOKENIZE_FIELDS, ("tokens",)),
    Operation("/v1/models", "get", "The served model, as a list", "Object"),
    Operation("/v1/models/{id}", "get", "The served model", "Object"),
    Operation("/v1/cancel", "post", "End answers", "Object", _CANCEL_FIELDS),
    Operation("/v1/cache", "get", "The prefix cache in numbers", "Object"),
    Operation("/v1/cache", "delete", "Forget all prefixes", "Object"),
    Operation("/v1/status", "get", "Queue, rows, memory, cache", "Object"),
    Operation("/version", "get", "The server's version", "Object", is_open=True),
    Operation("/openapi.json", "get", "This document", "Object", is_open=True),
    Operation("/health", "get", "Whether it can answer", "Object", is_open=True),
    Operation("/metrics", "get", "For Prometheus", "Text", is_open=True, media_type="text/plain"),
)


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required.split(), "properties": properties}


_STRING: Final = {"type": "string"}
_STRING_OR_NULL: Final = {"type": ["string", "null"]}
_COUNT: Final = {"type": "integer", "minimum": 0}
_LIST: Final = {"type": "array", "items": {"type": "object"}}
_USAGE: Final = _object(
    "prompt_tokens total_tokens",
    prompt_tokens=_COUNT,
    completion_tokens=_COUNT,
    total_tokens=_COUNT,
)
_CHOICES: Final = {
    "type": "array",
    "items": _object("index finish_reason logprobs", index=_COUNT, finish_reason=_STRING),
}
SCHEMAS: Final[Mapping[str, Any]] = {
    "Object": {"type": "object"},
    "Text": _STRING,
    "ChatCompletion": _object(
        "id object created model choices usage",
        id=_STRING,
        object={"const": "chat.completion"},
        created=_COUNT,
        model=_STRING,
        choices=_CHOICES,
        usage=_USAGE,
    ),
    "Completion": _object(
        "id object created model choices usage",
        id=_STRING,
        object={"const": "text_completion"},
        created=_COUNT,
        model=_STRING,
        choices=_CHOICES,
        usage=_USAGE,
    ),
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
            message=_STRING,
            type=_STRING,
            param=_STRING_OR_NULL,
            code=_STRING_OR_NULL,
        ),
    ),
}
_ERRORS: Final = (
    "400",
    "401",
    "403",
    "404",
    "405",
    "408",
    "413",
    "415",
    "429",
    "500",
    "501",
    "503",
)


def document() -> bytes:
    """The document, as JSON."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    return orjson.dumps(
        {
            "openapi": "3.1.0",
            "info": {"title": "mlxlite", "version": __version__},
            "paths": paths,
            "components": {
                "schemas": SCHEMAS,
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
        }
    )


def _operation(operation: Operation) -> dict[str, Any]:
    answer = {operation.media_type: {"schema": _ref(operation.answer)}}
    if operation.is_stream:
        answer[EVENTS] = {}  # a schema would be of the whole stream, or of each event: tools differ
    error = {"description": "An error", "content": {JSON: {"schema": _ref("Error")}}}
    shown: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {"200": {"description": "The answer", "content": answer}}
        | dict.fromkeys(_ERRORS, error),
    }
    if operation.path == "/health":
        shown["responses"]["503"] = {"description": "Not now", "content": answer}
    if not operation.is_open:
        shown["security"] = [{"key": []}, {}]
    if "{id}" in operation.path:
        id = {"name": "id", "in": "path", "required": True, "schema": _STRING}
        shown["parameters"] = [id]
    if operation.table is not None:
        body = {"schema": _body(operation.table, operation.needs)}
        is_needed = bool(operation.needs)
        shown["requestBody"] = {"required": is_needed, "content": {JSON: body}}
    return shown


def _body(table: Mapping[str, Field], needs: tuple[str, ...]) -> dict[str, Any]:
    properties = {
        name: schema(entry.read) | {"description": entry.note}
        for name, entry in table.items()
        if entry.use is not Use.REFUSED
    }
    for name in needs:  # null is as good as absent
        if "type" in (rules := properties[name]):
            rules["type"] = [kind for kind in rules["type"] if kind != "null"]
    return {"type": "object", "required": list(needs), "properties": properties}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}
