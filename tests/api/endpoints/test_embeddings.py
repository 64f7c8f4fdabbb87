"""Embeddings: requests and answers. Pure."""

import base64
import json
import struct
from dataclasses import replace
from typing import Any

import pytest
from api_requests import body, refused
from openai.types import CreateEmbeddingResponse

from mlxlite.api.endpoints.embeddings import EmbeddingRequest, embeddings, parse_embedding
from mlxlite.http.errors import APIError


def test_an_embedding_request_defaults_to_floats_of_the_last_token() -> None:
    silent = EmbeddingRequest(("hello",))
    assert parse_embedding(body(input="hello")) == silent
    neutral = {"encoding_format": "float", "pooling": "last", "user": "me", "dimensions": None}
    assert parse_embedding(body(input="hello", **neutral)) == silent
    assert parse_embedding(body(input="hello", model="any")) == replace(silent, model="any")
    asking = {"encoding_format": "base64", "pooling": "mean", "dimensions": 5.0, "zeta": 1}
    assert parse_embedding(body(input="hello", **asking)) == EmbeddingRequest(
        ("hello",), is_base64=True, dimensions=5, is_mean=True, ignored=("zeta",)
    )


WRONG_IN_EMBEDDINGS: dict[str, list[Any]] = {
    "encoding_format": ["", "int8", "Float", 5, True, ["float"], {}],
    "pooling": ["", "max", 5, True, ["last"], {}],
    "dimensions": [0, -1, 1.5, "5", True, [], {}, 2**21],
    "user": [5, True, [], {}],
    "model": [5, True, [], {}],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in WRONG_IN_EMBEDDINGS.items() for value in values],
)
def test_a_wrong_value_of_an_embedding_is_a_400_that_names_the_field(name: str, value: Any) -> None:
    error = refused(parse_embedding, body(**{"input": "x", name: value}))
    assert error.param == name
    assert f"'{name}'" in error.message


@pytest.mark.parametrize("fields", [{}, {"input": None}, {"content": "x"}])
def test_an_embedding_needs_its_input(fields: dict[str, Any]) -> None:
    error = refused(parse_embedding, body(**fields))
    assert error.param == "input"
    assert "required" in error.message


VECTORS = [[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]


def embedded(**fields: Any) -> list[Any]:
    request = parse_embedding(body(input=["a", "b"], **fields))
    raw = embeddings(request, VECTORS, "org/model", 7)
    answer = json.loads(raw)
    assert answer["object"] == "list"
    assert answer["model"] == "org/model"
    assert answer["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [(item["object"], item["index"]) for item in answer["data"]] == [
        ("embedding", 0),
        ("embedding", 1),
    ]
    if not request.is_base64:
        CreateEmbeddingResponse.model_validate_json(raw, strict=True)
    return [item["embedding"] for item in answer["data"]]


def decoded(text: str) -> list[float]:
    raw = base64.b64decode(text, validate=True)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def test_base64_is_the_same_floats() -> None:
    assert embedded() == VECTORS
    for text, vector in zip(embedded(encoding_format="base64"), VECTORS, strict=True):
        assert decoded(text) == pytest.approx(vector, abs=1e-7)


def test_fewer_dimensions_are_the_first_ones_normalised_again() -> None:
    assert embedded(dimensions=3) == VECTORS
    first, other = embedded(dimensions=2)
    assert first == pytest.approx([0.6, 0.8])
    assert other == [0.0, 0.0], "there is no direction in what is left"
    assert embedded(dimensions=1)[0] == [1.0]
    (short, _) = embedded(dimensions=1, encoding_format="base64")
    assert decoded(short) == [1.0]


def test_more_dimensions_than_there_are_is_a_400() -> None:
    request = parse_embedding(body(input=["a", "b"], dimensions=4))
    with pytest.raises(APIError) as caught:
        embeddings(request, VECTORS, "org/model", 7)
    assert caught.value.status == 400
    assert caught.value.param == "dimensions"
    assert "3" in caught.value.message
