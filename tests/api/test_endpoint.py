"""A dialect is one file, a sampling parameter is one field: both are declared here and found."""

import gc
import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import orjson
import pytest
from helpers import in_a_loop, serving, until

from mlxlite.api.app import App
from mlxlite.api.conversation import Message, Role
from mlxlite.api.endpoint import Endpoint
from mlxlite.api.endpoints import ENDPOINTS, anthropic_messages, chat_completions, completions
from mlxlite.api.endpoints import responses as responses_endpoint
from mlxlite.api.fields import (
    Field,
    Given,
    Use,
    markdown,
    read_fields,
    reading,
    required,
    supported,
    table_of,
)
from mlxlite.api.generate import Dialect
from mlxlite.api.openapi import document
from mlxlite.api.readers import parse_object, text
from mlxlite.api.request import ChatRequest, shared_options
from mlxlite.api.service import Service
from mlxlite.api.shared_fields import COMPLETION_FIELDS, GENERATION_FIELDS, SAMPLING_FIELDS
from mlxlite.api.writers import Collected
from mlxlite.config.options import Config
from mlxlite.engine.sampling_params import SamplingParams, param
from mlxlite.engine.sequence import Usage
from mlxlite.http.errors import APIError
from mlxlite.metrics import Metrics

# --- a toy dialect ------------------------------------------------------------------------------

TOY_FIELDS: Mapping[str, Field] = {**GENERATION_FIELDS, "ask": required(text, "the question")}


def parse_toy(body: bytes) -> ChatRequest:
    with reading(parse_object(body), TOY_FIELDS) as given:
        question = Message(Role.USER, given.take("ask"))
        return ChatRequest(**shared_options(given), messages=(question,))


class ToyWriter:
    def begin(self) -> bytes:
        return b""

    def event(self, index: int, event: Any) -> bytes:
        return b""

    def done(self, index: int, done: Any, total: Usage | None) -> bytes:
        return b""

    def fail(self, error: APIError) -> bytes:
        return error.body()

    def whole(self, choices: Sequence[Collected], total: Usage) -> bytes:
        return orjson.dumps({"reply": choices[0].text, "tokens": total.num_output})


TOY = Endpoint(
    method="POST",
    path="/v1/toy",
    summary="A question and its reply",
    fields=TOY_FIELDS,
    handle=Dialect(parse=parse_toy, writer=lambda *_: ToyWriter(), id_prefix="toy-").handle,
)


@in_a_loop
async def test_a_toy_dialect_is_served_documented_and_counted() -> None:
    async with serving() as served:
        app = App(served.server.service, (*ENDPOINTS, TOY))
        served.server.listener.app = app
        async with await served.wire() as wire:
            answer = await wire.ask("POST", "/v1/toy", json.dumps({"ask": "hello"}).encode())
            assert answer.json == {"reply": "hello", "tokens": 6}
            wrong = await wire.ask("POST", "/toy", b"{}")
            assert (wrong.status, wrong.error["param"]) == (400, "ask")
            shown = (await wire.get("/openapi.json")).json["paths"]["/v1/toy"]["post"]
            assert shown["summary"] == "A question and its reply"
            assert SAMPLING_FIELDS.keys() < set(
                shown["requestBody"]["content"]["application/json"]["schema"]["properties"]
            )
    metrics = Metrics(
        model_name="m", version="v", start_time_s=0.0, routes=[e.path for e in app.endpoints]
    )
    metrics.http("/v1/toy", "POST", 200)
    assert b'"/v1/toy"' in metrics.render_prometheus()


# --- a sampling parameter -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MoreParams(SamplingParams):
    """The parameters with one more, as a change to SamplingParams would add it."""

    toy_p: float = param(1.0, "1 is off", 0, 1, is_low_open=True, aliases=("toy",))


DIALECTS = {
    "/v1/chat/completions": chat_completions.FIELDS,
    "/v1/completions": completions.FIELDS,
    "/v1/messages": anthropic_messages.FIELDS,
    "/v1/responses": responses_endpoint.FIELDS,
}


def test_a_declared_parameter_is_a_field_with_its_range_alias_schema_and_row() -> None:
    table = table_of(MoreParams)
    assert table.keys() - SAMPLING_FIELDS.keys() == {"toy_p", "toy"}
    given = read_fields({"toy": 0.5}, table)
    assert given.take_each(table) == {"toy_p": 0.5}
    with pytest.raises(APIError) as caught:
        read_fields({"toy_p": 0}, table)
    assert caught.value.param == "toy_p"
    endpoint = Endpoint(method="POST", path="/x", summary="x", fields=table, handle=lambda *_: None)
    shown = json.loads(document([endpoint]))["paths"]["/x"]["post"]["requestBody"]
    described = shown["content"]["application/json"]["schema"]["properties"]["toy_p"]
    assert described["exclusiveMinimum"] == 0
    assert "| `toy_p` | works | 1 is off |" in markdown(table)


@pytest.mark.parametrize("path", DIALECTS)
def test_every_declared_parameter_is_in_every_dialect_and_in_the_document(path: str) -> None:
    fields_of = DIALECTS[path]
    for name in table_of(SamplingParams):
        assert fields_of[name].use is Use.SUPPORTED, f"{name} is still refused in {path}"
    operation = json.loads(document(ENDPOINTS))["paths"][path]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    assert table_of(SamplingParams).keys() <= body["properties"].keys()


def test_a_parameter_that_is_no_field_of_its_own_is_known_to_be_none() -> None:
    own = {item.name for item in fields(SamplingParams) if "param" not in item.metadata}
    assert own == {"top_logprobs", "bad_words"}, "declare a Param, or requests can never set it"


# --- nothing is dropped in silence --------------------------------------------------------------


def test_a_field_that_is_read_and_not_taken_fails() -> None:
    table = {"a": supported(text, ""), "b": supported(text, "")}
    given = read_fields({"a": "x", "b": "y"}, table)
    assert given.take("a") == "x"
    with pytest.raises(AssertionError, match="'b'"):
        given.close()


def test_a_field_in_the_table_that_the_parser_does_not_read_fails_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The trap: in the table, forgotten by the parser."""
    forgotten = {**chat_completions.FIELDS, "toy_p": supported(lambda value, _: value, "")}
    monkeypatch.setattr(chat_completions, "FIELDS", forgotten)
    body = {"messages": [{"role": "user", "content": "x"}]}
    assert chat_completions.parse_chat(json.dumps(body).encode())
    with pytest.raises(AssertionError, match="toy_p"):
        chat_completions.parse_chat(json.dumps(body | {"toy_p": 0.5}).encode())


def test_only_supported_fields_are_given() -> None:
    uses = {entry.use for entry in chat_completions.FIELDS.values()}
    assert uses == set(Use) - {Use.HISTORY}, "which is for types alone"
    given = read_fields({"user": "me", "zeta": 1, "n": 2}, COMPLETION_FIELDS)
    assert isinstance(given, Given)
    assert given.ignored == ("zeta",)
    assert given.take("n") == 2
    given.close()


def test_two_endpoints_never_share_a_method_and_a_path() -> None:
    places = [(endpoint.method, endpoint.path) for endpoint in ENDPOINTS]
    assert len(set(places)) == len(places)
    app = App(Service(Config(), Metrics(model_name="m", version="v", start_time_s=0.0)), ENDPOINTS)
    assert {endpoint.path for endpoint in app.endpoints} == {r.path for r in app.routes.values()}


@in_a_loop
async def test_an_answered_request_is_freed_without_a_garbage_collection() -> None:
    """A body may hold 64 MiB: nothing of it may wait for a collection of cycles."""
    seen: list[weakref.ref[ToyWriter]] = []

    def writer(*_: Any) -> ToyWriter:
        made = ToyWriter()
        seen.append(weakref.ref(made))
        return made

    endpoint = replace(TOY, handle=Dialect(parse=parse_toy, writer=writer, id_prefix="toy-").handle)
    async with serving() as served:
        served.server.listener.app = App(served.server.service, (*ENDPOINTS, endpoint))
        async with await served.wire() as wire:
            gc.disable()
            try:
                for _ in range(3):
                    await wire.ask("POST", "/v1/toy", json.dumps({"ask": "hello"}).encode())
                await until(lambda: sum(ref() is not None for ref in seen) <= 1)
            finally:
                gc.enable()
    assert len(seen) == 3
