"""The server against its own OpenAPI document: requests made from it, answers checked by it.

Two ways of asking. schemathesis's own cases go to every operation: boundary values of each field,
wrong types, missing fields, other methods and media types; nearly all of those that the document
allows and the server refuses are refused for a field whose schema is too general (`messages`).
So the second way fills those fields in, and leaves the rest of the body to the generator: what is
left is answered with 200, whole or as a stream, and these answers are what is checked then.
"""

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from live import serving  # noqa: E402
from schemathesis.specs.openapi import checks  # noqa: E402

import mlxlite  # noqa: E402
from mlxlite.api.endpoints import ENDPOINTS  # noqa: E402
from mlxlite.api.endpoints.chat_completions import FIELDS  # noqa: E402
from mlxlite.api.openapi import EVENTS, document, openapi_endpoint  # noqa: E402
from mlxlite.api.responses_writer import _STATUSES  # noqa: E402
from mlxlite.config.options import DEMO_ID  # noqa: E402

KEY = "a-key"
AUTHORIZATION = {"authorization": f"Bearer {KEY}"}
DOCUMENT: dict[str, Any] = json.loads(document((*ENDPOINTS, openapi_endpoint(ENDPOINTS))))
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    # The document's rules for a field are enforced; a method that it has not is a 405 with `allow`.
    checks.negative_data_rejection,
    checks.unsupported_method,
]
BOUNDED = settings(
    max_examples=8,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # explicit ones are schemathesis's boundary cases
    suppress_health_check=list(HealthCheck),
)

CHAT = [{"role": "user", "content": "Hello!"}]
FILLED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": CHAT},
    "/v1/completions": {"prompt": ["Hello", [65, 66]]},
    "/v1/responses": {"input": CHAT},
    "/v1/messages": {"messages": CHAT},
    "/v1/messages/count_tokens": {"messages": CHAT},
    "/v1/embeddings": {"input": "Hello"},
    "/detokenize": {"tokens": [65, 66]},
}
# Each of them is a 400 or a 404 for all that a generator can know.
NEVER_LEFT_IN: dict[str, str] = {
    "previous_response_id": "names a response that there is not",
    "add_generation_prompt": "false is refused without continue_final_message",
    "continue_final_message": "needs an assistant's message at the end",
    "echo": "excludes logprobs",
    "prompt_logprobs": "cannot be streamed",
    "min_tokens": "may not be above max_tokens",
    "top_logprobs": "needs logprobs",
    "dimensions": "may not be above the model's",
}


@pytest.fixture(scope="module")
def server() -> Iterator[mlxlite.Server]:
    """Its context is short, so that a request without bounds costs little."""
    config = mlxlite.Config(port=0, ctx_size=48, max_tokens=4, api_key=(KEY,), log_level="error")
    with serving(config) as server:
        yield server


def test_the_server_serves_the_document_that_is_tested_here(server: mlxlite.Server) -> None:
    with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=10) as answer:
        assert json.load(answer) == DOCUMENT


def test_the_document_is_valid_openapi() -> None:
    assert DOCUMENT["openapi"].startswith("3.1")
    SCHEMA.validate()


def test_every_route_is_in_the_document_and_nothing_else_is(server: mlxlite.Server) -> None:
    described = {
        (path, method.upper())
        for path, operations in DOCUMENT["paths"].items()
        for method in operations
    }
    routed = {
        (route.path, method) for route in server.app.routes.values() for method in route.endpoints
    }
    assert described == routed


def test_the_document_marks_the_paths_that_need_no_key(server: mlxlite.Server) -> None:
    described = {
        path: not any("security" in operation for operation in operations.values())
        for path, operations in DOCUMENT["paths"].items()
    }
    routed = {endpoint.path: endpoint.is_open for endpoint in server.app.endpoints}
    assert described == routed


def test_the_document_has_every_status_of_a_response() -> None:
    """Among them that of one which was cancelled, which no generator brings about."""
    described = DOCUMENT["components"]["schemas"]["Response"]["properties"]["status"]["enum"]
    assert set(described) == {*_STATUSES.values(), "failed"}


@SCHEMA.parametrize()
@BOUNDED
def test_no_request_gets_an_undocumented_answer(case: Any, server: mlxlite.Server) -> None:
    case.call_and_validate(base_url=server.url, headers=AUTHORIZATION, checks=CHECKS)


def properties_of(path: str) -> dict[str, dict[str, Any]]:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]
    properties = content["application/json"]["schema"]["properties"]
    assert isinstance(properties, dict)
    return properties


def described_fields(path: str) -> set[str]:
    """The fields of a body whose schema is enough for a generator to get them right."""
    return {name for name, rules in properties_of(path).items() if "type" in rules}


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        (path, media_type)
        for path in FILLED
        for media_type in DOCUMENT["paths"][path]["post"]["responses"]["200"]["content"]
    ],
)
def test_a_filled_request_gets_the_documented_answer(
    server: mlxlite.Server, path: str, media_type: str
) -> None:
    kept = described_fields(path) - set(NEVER_LEFT_IN)
    # Two names of one field may not disagree, and a generator knows none that agree.
    kept -= {name for name in kept & set(FIELDS) if FIELDS[name].alias_of in kept}
    stream = {"stream": media_type == EVENTS} if "stream" in kept else {}

    @BOUNDED
    @given(SCHEMA[path]["POST"].as_strategy())
    def ask(case: Any) -> None:
        body = {name: value for name, value in case.body.items() if name in kept}
        case.body = body | FILLED[path] | stream
        answer = case.call(base_url=server.url, headers=AUTHORIZATION)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"][0].partition(";")[0] == media_type
        case.validate_response(answer, checks=CHECKS, headers=AUTHORIZATION)

    ask()


def forbidden_values(rules: dict[str, Any]) -> Iterator[Any]:
    """What a field's schema rules out."""
    yield {"an": "object"} if "object" not in rules["type"] else ["an array"]
    if "minimum" in rules:
        yield rules["minimum"] - 1
    if "exclusiveMinimum" in rules:
        yield rules["exclusiveMinimum"]
    if "maximum" in rules:
        yield rules["maximum"] + 1


@pytest.mark.parametrize("path", FILLED)
def test_values_that_the_document_forbids_are_refused_by_the_server(
    server: mlxlite.Server, path: str
) -> None:
    """Field by field: in a generated body another field may be what is refused."""
    for name, rules in properties_of(path).items():
        if name not in described_fields(path):
            continue
        for value in forbidden_values(rules):
            body = FILLED[path] | {name: value}
            case = SCHEMA[path]["POST"].Case(body=body, media_type="application/json")
            answer = case.call(base_url=server.url, headers=AUTHORIZATION)
            assert answer.status_code == 400, (name, value)
            assert f"'{name}'" in answer.json()["error"]["message"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_stored_response_is_as_the_document_describes_it(
    server: mlxlite.Server, method: str
) -> None:
    """Its id is one that no generator can guess; so is the model's."""
    created = SCHEMA["/v1/responses"]["POST"].Case(
        body={"input": "Hello!"}, media_type="application/json"
    )
    id = created.call(base_url=server.url, headers=AUTHORIZATION).json()["id"]
    for operation in (
        SCHEMA["/v1/responses/{id}"][method].Case(path_parameters={"id": id}),
        SCHEMA["/v1/models/{id}"]["GET"].Case(path_parameters={"id": DEMO_ID}),
    ):
        answer = operation.call(base_url=server.url, headers=AUTHORIZATION)
        assert answer.status_code == 200
        operation.validate_response(answer, checks=CHECKS, headers=AUTHORIZATION)


def test_without_its_key_every_path_that_needs_one_answers_as_described(
    server: mlxlite.Server,
) -> None:
    for result in SCHEMA.get_all_operations():
        operation = result.ok()
        body = {"body": {}, "media_type": "application/json"} if operation.body else {}
        ids = {"id": "x"} if "{id}" in operation.path else {}
        case = operation.Case(path_parameters=ids, **body)
        answer = case.call(base_url=server.url)
        needs_key = "security" in DOCUMENT["paths"][operation.path][operation.method]
        assert (answer.status_code == 401) == needs_key, operation.label
        case.validate_response(answer, checks=CHECKS[:4])
