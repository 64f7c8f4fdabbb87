"""POST /v1/embeddings: texts to vectors."""

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from mlxlite.api.fields import (
    Field,
    Text,
    _ignored,
    _texts,
    accepted,
    integer,
    parse_object,
    read_fields,
    text,
    works,
)
from mlxlite.api.render import _encode
from mlxlite.api.request import FIELDS
from mlxlite.http.errors import bad
from mlxlite.models.interface import Model

# --- embeddings -------------------------------------------------------------------------------


def _encoding(value: Any, param: str) -> str:
    if value not in ("float", "base64"):
        raise bad(f"'{param}' must be 'float' or 'base64'.", param)
    return str(value)


def _pooling(value: Any, param: str) -> str:
    if value not in ("last", "mean"):
        raise bad(f"'{param}' must be 'last' or 'mean'.", param)
    return str(value)


EMBEDDING_FIELDS: Final[Mapping[str, Field]] = {
    "model": FIELDS["model"],
    "input": works(_texts, "a string, token ids, or up to 256 of either"),
    "encoding_format": works(_encoding, "`float` (default) or `base64`"),
    "dimensions": works(integer(1, 2**20), "the first so many, normalised again"),
    "pooling": works(_pooling, "`last` (default): the last token's state; `mean`: of all tokens"),
    "user": accepted(text),
}


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts to turn into vectors of length 1."""

    inputs: tuple[Text, ...]
    is_base64: bool
    dimensions: int | None
    is_mean: bool
    ignored: tuple[str, ...]


def parse_embedding(body: bytes) -> EmbeddingRequest:
    """Raises APIError 400 naming the field at fault."""
    value = parse_object(body)
    read = read_fields(value, EMBEDDING_FIELDS)
    if "input" not in read:
        raise bad("'input' is required.", "input")
    return EmbeddingRequest(
        read["input"],
        read.get("encoding_format") == "base64",
        read.get("dimensions"),
        read.get("pooling") == "mean",
        _ignored(value, EMBEDDING_FIELDS),
    )


def embeddings(
    request: EmbeddingRequest, vectors: Sequence[Sequence[float]], model: str, num_tokens: int
) -> bytes:
    """OpenAI's list; base64 is of little-endian float32. Raises APIError."""
    size = min(map(len, vectors))
    if request.dimensions is not None and request.dimensions > size:
        raise bad(f"this model's vectors have {size} dimensions", "dimensions")

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


def prepare_embedding(model: Model, body: bytes) -> tuple[EmbeddingRequest, list[tuple[int, ...]]]:
    request = parse_embedding(body)
    return request, [_encode(model, text, "input") for text in request.inputs]
