"""The official `anthropic` client, and `openai`'s responses, against the demo model."""

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")

from helpers import TIMEOUT_S  # noqa: E402
from live import serving  # noqa: E402

import mlxlite  # noqa: E402
from mlxlite.config.options import DEMO_ID  # noqa: E402

KEY = "a-key"
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}
ABOUT = {"name": "get_weather", "description": "Get the weather in a city."}
TOOL = {**ABOUT, "input_schema": WEATHER}
FUNCTION = {"type": "function", **ABOUT, "parameters": WEATHER}

QUESTION = "What is the weather in Paris?"
RESULT = '{"temperature": 21, "sky": "sunny"}'


@pytest.fixture(scope="module")
def server() -> Iterator[mlxlite.Server]:
    with serving(mlxlite.Config(port=0, api_key=(KEY,), shutdown_grace_s=0.1)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: mlxlite.Server) -> Iterator[Any]:
    """It sends its key as x-api-key."""
    with anthropic.Anthropic(base_url=server.url, api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def responses(server: mlxlite.Server) -> Iterator[Any]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30
    ) as client:
        yield client.responses


def asking(content: str = "Count to 5.", **fields: Any) -> dict[str, Any]:
    """The client's arguments; greedy, which its newest types leave to the body's own fields."""
    return {
        "model": DEMO_ID,
        "max_tokens": 40,
        "messages": [{"role": "user", "content": content}],
        "extra_body": {"temperature": 0},
        **fields,
    }


def text_of(message: Any) -> str:
    (block,) = message.content
    assert block.type == "text"
    return str(block.text)


# --- messages -------------------------------------------------------------------------------------


def test_create_answers_with_a_message(client: Any) -> None:
    message = client.messages.create(**asking())
    assert message.type == "message"
    assert message.role == "assistant"
    assert message.model == DEMO_ID
    assert message.id.startswith("msg_")
    assert message._request_id.startswith("req_")
    assert "3" in text_of(message)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert 0 < message.usage.output_tokens < 40
    type(message).model_validate_json(message.model_dump_json(), strict=True)


def test_max_tokens_bounds_the_answer(client: Any) -> None:
    message = client.messages.create(**asking(max_tokens=3))
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 3


def test_a_stream_is_the_same_message_in_pieces(client: Any) -> None:
    whole = client.messages.create(**asking())
    with client.messages.stream(**asking()) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 1
    assert "".join(pieces) == text_of(final) == text_of(whole)
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == whole.usage.output_tokens
    type(final).model_validate_json(final.model_dump_json(), strict=True)


def test_a_stream_counts_the_prompt_once(client: Any) -> None:
    """The number of cached tokens, unknown in the first event, is corrected by the last one."""
    wanted = client.messages.count_tokens(model=DEMO_ID, messages=asking()["messages"])
    for _ in range(2):
        with client.messages.stream(**asking()) as stream:
            usage = stream.get_final_message().usage
        total = usage.input_tokens + (usage.cache_read_input_tokens or 0)
        assert total == wanted.input_tokens


def test_raw_events_have_anthropics_order(client: Any) -> None:
    kinds = [event.type for event in client.messages.create(**asking(stream=True))]
    distinct = list(dict.fromkeys(kinds))
    assert [kind for kind in distinct if kind != "ping"] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_a_stop_sequence_ends_the_message_before_it_and_is_named(client: Any) -> None:
    text = text_of(client.messages.create(**asking()))
    before, stop, _ = text.partition("4")
    assert stop
    fields = asking(stop_sequences=["never said", stop])
    message = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        final = stream.get_final_message()
    for answer in (message, final):
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
        assert text_of(answer) == before


def test_a_system_prompt_is_read_as_text_or_as_blocks(client: Any) -> None:
    def num_tokens(**fields: Any) -> int:
        messages = asking()["messages"]
        return int(
            client.messages.count_tokens(model=DEMO_ID, messages=messages, **fields).input_tokens
        )

    blocks = [
        {"type": "text", "text": "You are brief.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "You are kind."},
    ]
    as_blocks = num_tokens(system=blocks)
    assert as_blocks == num_tokens(system="You are brief.\nYou are kind.") > num_tokens()
    assert client.messages.create(**asking(system=blocks)).content


def test_counted_tokens_are_those_of_the_prompt(client: Any) -> None:
    counted = client.messages.count_tokens(model=DEMO_ID, messages=asking()["messages"])
    usage = client.messages.create(**asking(max_tokens=1)).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_conversation_is_of_blocks_and_strings(client: Any) -> None:
    first = client.messages.create(**asking("Hello!"))
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hello!"}]},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "Repeat the word banana."},
    ]
    assert "banana" in text_of(client.messages.create(**asking(messages=messages))).lower()


def test_a_trailing_assistants_message_is_continued(client: Any) -> None:
    whole = text_of(client.messages.create(**asking()))
    begun, separator, rest = whole.partition("3")
    messages = [*asking()["messages"], {"role": "assistant", "content": begun + separator}]
    assert text_of(client.messages.create(**asking(messages=messages))) == rest


def test_a_history_with_tools_and_thoughts_is_read(client: Any) -> None:
    messages = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I should look.", "signature": "x"},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": '{"temperature": 17}'}
            ],
        },
    ]
    assert "17" in text_of(client.messages.create(**asking(messages=messages)))


def test_a_prefix_that_was_read_before_is_counted_as_cached(client: Any) -> None:
    system = "You are an assistant. " * 20
    first = client.messages.create(**asking(system=system, max_tokens=1)).usage
    second = client.messages.create(**asking(system=system, max_tokens=1)).usage
    assert second.cache_read_input_tokens > 0
    assert first.input_tokens + first.cache_read_input_tokens == (
        second.input_tokens + second.cache_read_input_tokens
    )


def test_eight_concurrent_streams_have_the_same_text_as_alone(client: Any) -> None:
    words = ("banana", "window", "river", "python") * 2
    said: dict[int, str] = {}

    def one(index: int) -> None:
        with client.messages.stream(**asking(f"Repeat the word {words[index]}.")) as stream:
            said[index] = stream.get_final_text()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(words))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, word in enumerate(words):
        alone = client.messages.create(**asking(f"Repeat the word {word}."))
        assert said[i] == text_of(alone)


# --- errors ---------------------------------------------------------------------------------------


def detail_of(error: Any) -> dict[str, Any]:
    """Anthropic's error object, which has the request's id beside it."""
    assert error.body["type"] == "error"
    assert error.body["request_id"] == error.request_id
    assert error.request_id
    detail = error.body["error"]
    assert isinstance(detail, dict)
    return detail


def test_a_wrong_key_is_an_authentication_error(server: mlxlite.Server, client: Any) -> None:
    with pytest.raises(anthropic.AuthenticationError) as refused:
        client.with_options(api_key="wrong").messages.create(**asking())
    assert detail_of(refused.value)["type"] == "authentication_error"


def test_a_bearer_token_is_as_good_as_an_api_key(server: mlxlite.Server) -> None:
    with anthropic.Anthropic(
        base_url=server.url, auth_token=KEY, api_key=None, max_retries=0
    ) as client:
        assert client.messages.create(**asking(max_tokens=1)).content


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"extra_body": {"temperature": 2}}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "nobody", "content": "Hello!"}]}, "messages[0].role"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"thread": {"type": "continue"}}}, "thread"),
    ],
    ids=["temperature", "no messages", "a role", "max_tokens", "a thread"],
)
def test_a_request_that_cannot_be_is_a_bad_request(
    client: Any, fields: dict[str, Any], named: str
) -> None:
    for is_stream in (False, True):
        with pytest.raises(anthropic.BadRequestError) as refused:
            client.messages.create(**asking(**fields, stream=is_stream))
        detail = detail_of(refused.value)
        assert detail["type"] == "invalid_request_error"
        if named == "thread":
            assert detail["details"] == {"error_code": "thread_unsupported_request"}
        else:
            assert f"'{named}'" in detail["message"]


def test_a_too_long_prompt_is_an_error_in_anthropics_wording(client: Any) -> None:
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.messages.create(**asking("word " * 20_000))
    assert detail_of(refused.value)["message"].startswith("prompt is too long: ")


def test_what_is_not_there_is_a_not_found_error(client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.models.retrieve("nope")


def test_another_model_is_not_found_where_the_operator_is_strict() -> None:
    config = mlxlite.Config(port=0, strict_model_id=True)
    with (
        serving(config) as server,
        anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0) as client,
    ):
        with pytest.raises(anthropic.NotFoundError) as refused:
            client.messages.create(**asking(model="claude"))
        assert detail_of(refused.value)["type"] == "not_found_error"
        assert client.messages.create(**asking(max_tokens=1)).model == DEMO_ID


def test_a_stream_that_is_closed_early_frees_its_row(server: mlxlite.Server, client: Any) -> None:
    body = {"temperature": 1, "ignore_eos": True}
    with client.messages.stream(**asking(max_tokens=8000, extra_body=body)) as stream:
        next(iter(stream.text_stream))
        assert num_running(server) == 1
    give_up_at = time.monotonic() + TIMEOUT_S
    while num_running(server) != 0:
        assert time.monotonic() < give_up_at, "it generates on after the disconnect"


def cancel(server: mlxlite.Server, id: str) -> None:
    request = urllib.request.Request(
        f"{server.url}/v1/cancel",
        json.dumps({"id": id}).encode(),
        {"content-type": "application/json", "x-api-key": KEY},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert json.load(answer) == {"status": "cancelled", "cancelled_count": 1}


def test_a_message_that_is_cancelled_ends_without_a_reason(
    server: mlxlite.Server, client: Any
) -> None:
    body = {"temperature": 1, "ignore_eos": True}
    with client.messages.stream(**asking(max_tokens=8000, extra_body=body)) as stream:
        next(iter(stream.text_stream))
        cancel(server, stream.current_message_snapshot.id)
        final = stream.get_final_message()
    assert text_of(final)
    assert final.stop_reason is None
    assert 0 < final.usage.output_tokens < 8000


def num_running(server: mlxlite.Server) -> int:
    request = urllib.request.Request(
        f"{server.url}/metrics", headers={"accept": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        return int(json.load(answer)["running_requests"])


# --- openai's responses ---------------------------------------------------------------------------


def create(responses: Any, said: Any = "Count to 5.", **fields: Any) -> Any:
    return responses.create(
        **{"model": DEMO_ID, "input": said, "temperature": 0, "max_output_tokens": 40, **fields}
    )


def test_a_response_has_its_text_and_usage(responses: Any) -> None:
    answer = create(responses)
    assert answer.status == "completed"
    assert answer.model == DEMO_ID
    assert "3" in answer.output_text
    (item,) = answer.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    type(answer).model_validate_json(answer.model_dump_json(), strict=True)


def test_a_response_that_is_cut_is_incomplete(responses: Any) -> None:
    answer = create(responses, max_output_tokens=3)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 3


def test_a_streamed_response_is_the_same_in_pieces(responses: Any) -> None:
    whole = create(responses)
    events = list(create(responses, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(pieces) == whole.output_text == events[-1].response.output_text


def test_the_clients_own_accumulator_reads_the_stream(responses: Any) -> None:
    with responses.stream(
        model=DEMO_ID, input="Count to 5.", temperature=0, max_output_tokens=40
    ) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert final.status == "completed"
    assert "".join(pieces) == final.output_text == create(responses).output_text


def test_a_response_that_is_cancelled_ends_as_such(server: mlxlite.Server, responses: Any) -> None:
    body = {"ignore_eos": True}
    events = create(responses, stream=True, temperature=1, max_output_tokens=8000, extra_body=body)
    created = next(events).response
    cancel(server, created.id)
    *_, last = events
    assert last.type == "response.incomplete"
    assert (last.response.id, last.response.status) == (created.id, "cancelled")


def test_a_response_continues_an_earlier_one(responses: Any) -> None:
    question, follow_up = "Hello!", "Repeat the word banana."
    first = create(responses, question)
    second = create(responses, follow_up, previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert "banana" in second.output_text.lower()
    written_out = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": follow_up},
    ]
    same = create(responses, written_out)
    assert (same.output_text, same.usage.input_tokens) == (
        second.output_text,
        second.usage.input_tokens,
    )
    # The client's own output items are an input, too.
    again = create(responses, [written_out[0], *first.output, written_out[2]])
    assert again.output_text == same.output_text


def test_a_streamed_response_can_be_continued_too(responses: Any) -> None:
    with responses.stream(model=DEMO_ID, input="Hello!", temperature=0) as stream:
        first = stream.get_final_response()
    second = create(responses, "Repeat the word river.", previous_response_id=first.id)
    assert "river" in second.output_text.lower()
    assert (
        second.usage.input_tokens > create(responses, "Repeat the word river.").usage.input_tokens
    )


def test_a_stored_response_can_be_had_again_until_it_is_deleted(responses: Any) -> None:
    answer = create(responses, metadata={"a": "b"})
    assert responses.retrieve(answer.id) == answer
    assert answer.metadata == {"a": "b"}
    responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(answer.id)
    with pytest.raises(openai.NotFoundError) as gone:
        create(responses, previous_response_id=answer.id)
    assert gone.value.param == "previous_response_id"


def test_a_response_that_is_not_to_be_stored_is_not(responses: Any) -> None:
    answer = create(responses, store=False)
    with pytest.raises(openai.NotFoundError):
        responses.retrieve(answer.id)


def test_instructions_are_not_kept_for_the_next_response(responses: Any) -> None:
    told = create(responses, "Hello!", instructions="You are an assistant. Be kind.")
    assert told.usage.input_tokens > create(responses, "Hello!").usage.input_tokens
    follow_up = "Count to 3."
    written_out = [
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": told.output_text},
        {"role": "user", "content": follow_up},
    ]
    after = create(responses, follow_up, previous_response_id=told.id)
    assert after.usage.input_tokens == create(responses, written_out).usage.input_tokens


def test_responses_errors_are_the_clients_own_exceptions(responses: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        create(responses, temperature=-1)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as unsupported:
        create(responses, tools=[{"type": "web_search"}], tool_choice={"type": "web_search"})
    assert unsupported.value.param == "tool_choice.type"
    search = responses.with_raw_response.create(
        model="tiny", input="hello", tools=[{"type": "web_search"}], max_output_tokens=1
    )
    assert search.headers["x-mlxlite-ignored"] == "tools[0]:web_search"
    with pytest.raises(openai.BadRequestError) as too_long:
        create(responses, "word " * 20_000)
    assert too_long.value.code == "context_length_exceeded"


# --- tools --------------------------------------------------------------------------------------


def message_of(client: Any, is_stream: bool, **fields: Any) -> Any:
    asked = asking(**fields, tools=[TOOL])
    if not is_stream:
        return client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        return stream.get_final_message()


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_message_calls_a_tool_and_answers_with_its_result(client: Any, is_stream: bool) -> None:
    asked = [{"role": "user", "content": QUESTION}]
    message = message_of(client, is_stream, messages=asked)
    (use,) = message.content
    assert (message.stop_reason, use.name, use.input) == (
        "tool_use",
        TOOL["name"],
        {"city": "Paris"},
    )
    asked += [
        {"role": "assistant", "content": [use.model_dump(exclude_none=True)]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": use.id, "content": RESULT}],
        },
    ]
    message = message_of(client, is_stream, messages=asked)
    assert message.stop_reason == "end_turn"
    assert text_of(message) == "It is 21 degrees and sunny in Paris."


def test_arguments_are_streamed_as_they_are_generated(client: Any, responses: Any) -> None:
    asked = asking(QUESTION, tools=[TOOL])
    with client.messages.stream(**asked) as stream:
        told = [event.partial_json for event in stream if event.type == "input_json"]
        (use,) = stream.get_final_message().content
    assert len(told) > 3
    assert json.loads("".join(told)) == use.input == {"city": "Paris"}
    with responses.stream(model=DEMO_ID, input=QUESTION, tools=[FUNCTION], temperature=0) as stream:
        kind = "response.function_call_arguments.delta"
        told = [event.delta for event in stream if event.type == kind]
        (call,) = stream.get_final_response().output
    assert len(told) > 3
    assert "".join(told) == call.arguments == '{"city": "Paris"}'


def test_arguments_that_are_cut_are_what_there_is(client: Any, responses: Any) -> None:
    whole = client.messages.create(**asking(QUESTION, tools=[TOOL]))
    for num in range(1, whole.usage.output_tokens):
        asked = asking(QUESTION, tools=[TOOL], max_tokens=num)
        with client.messages.stream(**asked) as stream:
            message = stream.get_final_message()
        assert message.stop_reason == "max_tokens"
        inputs = [block.input for block in message.content if block.type == "tool_use"]
        assert all(given in ({}, {"city": "Paris"}) for given in inputs)
        with responses.stream(
            model=DEMO_ID, input=QUESTION, tools=[FUNCTION], temperature=0, max_output_tokens=num
        ) as stream:
            last = list(stream)[-1]
        assert last.type == "response.incomplete"
        calls = [item for item in last.response.output if item.type == "function_call"]
        assert all('{"city": "Paris"}'.startswith(call.arguments) for call in calls)
    assert [call.status for call in calls] == ["completed"]
    assert inputs == [{"city": "Paris"}]


def response_of(responses: Any, is_stream: bool, asked: Any, **fields: Any) -> Any:
    given = {"model": DEMO_ID, "input": asked, "tools": [FUNCTION], "temperature": 0, **fields}
    if not is_stream:
        return responses.create(**given)
    with responses.stream(**given) as stream:
        return stream.get_final_response()


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_response_calls_a_tool_and_is_continued_with_its_output(
    responses: Any, is_stream: bool
) -> None:
    first = response_of(responses, is_stream, QUESTION)
    (call,) = first.output
    assert (call.type, call.name) == ("function_call", FUNCTION["name"])
    assert json.loads(call.arguments) == {"city": "Paris"}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": RESULT}
    asked = [{"role": "user", "content": QUESTION}, call.model_dump(exclude_none=True), output]
    asked[1].pop("parsed_arguments", None)
    told = response_of(responses, is_stream, [output], previous_response_id=first.id)
    again = response_of(responses, is_stream, asked)
    assert told.output_text == again.output_text == "It is 21 degrees and sunny in Paris."
    assert told.usage.input_tokens == again.usage.input_tokens
