"""POST /v1/embeddings: texts to vectors."""

import base64
import logging
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import orjson

from mlxlite.api.endpoint import Endpoint
from mlxlite.api.fields import Table, no_op, reading, required, supported
from mlxlite.api.generate import check_strings, in_task
from mlxlite.api.readers import Text, integer, one_of, parse_object, text, texts
from mlxlite.api.render import context_exceeded, encode
from mlxlite.api.service import Service
from mlxlite.api.shared_fields import MODEL
from mlxlite.api.threads import Work
from mlxlite.errors import FOREIGN, trace_of
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import APIError, ErrorKind, bad_request
from mlxlite.models.interface import Model

log = logging.getLogger("mlxlite.api")

FIELDS: Final[Table] = {
    "model": MODEL,
    "input": required(texts, "a string, token ids, or up to 2,048 of either"),
    "encoding_format": supported(one_of("float", "base64"), "`float` (default) or `base64`"),
    "dimensions": supported(integer(1, 2**20), "only the first ones, normalised again"),
    "pooling": supported(
        one_of("last", "mean"), "`last` (default): the last token's state; `mean`: of all tokens"
    ),
    "user": no_op(text),
}


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts to turn into vectors of length 1."""

    inputs: tuple[Text, ...]
    model: str | None = None
    is_base64: bool = False
    dimensions: int | None = None
    is_mean: bool = False
    ignored: tuple[str, ...] = ()


def parse_embedding(body: bytes) -> EmbeddingRequest:
    """Raises APIError 400 naming the field at fault."""
    with reading(parse_object(body), FIELDS) as given:
        return EmbeddingRequest(
            model=given.take("model"),
            inputs=given.take("input"),
            is_base64=given.take("encoding_format") == "base64",
            dimensions=given.take("dimensions"),
            is_mean=given.take("pooling") == "mean",
            ignored=given.ignored,
        )


def _prepare(model: Model, body: bytes) -> tuple[EmbeddingRequest, list[tuple[int, ...]]]:
    check_strings(model, body, "input")
    request = parse_embedding(body)
    return request, encode(model, request.inputs, "input")


def embeddings(
    request: EmbeddingRequest, vectors: Sequence[Sequence[float]], model: str, num_tokens: int
) -> bytes:
    """OpenAI's list; base64 is of little-endian float32. Raises APIError."""
    size = min(map(len, vectors))
    if request.dimensions is not None and request.dimensions > size:
        raise bad_request(f"this model's vectors have {size} dimensions", "dimensions")

    def encode(vector: Sequence[float]) -> Any:
        if request.dimensions is not None:
            vector = vector[: request.dimensions]
            norm = math.hypot(*vector) or 1.0
            vector = [value / norm for value in vector]
        if not request.is_base64:
            return vector
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

    data = [
        {"object": "embedding", "index": i, "embedding": encode(vector)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return orjson.dumps({"object": "list", "data": data, "model": model, "usage": usage})


async def _embed(service: Service, exchange: Exchange, body: bytes) -> None:
    ready = service.need_model()
    request, inputs = await service.in_thread(
        exchange, Work.of(len(body)), _prepare, ready.model, body
    )
    service.note_ignored(exchange, request.ignored)
    for tokens in inputs:
        if len(tokens) > ready.card.context_size:
            raise context_exceeded(len(tokens), ready.card.context_size, "input")
    try:
        vectors = await ready.engine.embedder.embed(
            inputs, is_mean=request.is_mean, is_wanted=lambda: not exchange.is_lost
        )
    except NotImplementedError as error:
        raise APIError(ErrorKind.NOT_OFFERED, f"no embeddings: {error}") from None
    except FOREIGN as error:
        log.error("an embedding failed: %s", trace_of(error))
        kind = type(error).__name__
        raise APIError(ErrorKind.MODEL_FAILED, f"the model failed: {kind}") from None
    if vectors is not None:
        work = partial(embeddings, request, vectors, ready.model.id, sum(map(len, inputs)))
        exchange.respond(200, await service.in_thread(exchange, Work.of(len(body)), work))


ENDPOINTS: Final = (
    Endpoint(
        "POST",
        "/v1/embeddings",
        "Vectors of texts",
        in_task(_embed),
        FIELDS,
        answer_schema="Embeddings",
    ),
)
