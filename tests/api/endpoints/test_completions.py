"""Completions: requests and answers. Pure.

The fields that a completion shares with a chat have their cases in `api_requests`. What prompts
share with the inputs of embeddings and tokenize is here too.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from api_requests import CASES, Accepted, LeftOut, Refused, Works, body, refused
from dialects import token_bytes
from openai.types import Completion
from tables import arrived, with_value

from mlxlite.api.answer import failure, total_usage
from mlxlite.api.endpoints.chat_completions import FIELDS
from mlxlite.api.endpoints.completions import FIELDS as COMPLETION_FIELDS
from mlxlite.api.endpoints.completions import (
    NO_LIMIT,
    CompletionRequest,
    CompletionWriter,
    parse_completion,
)
from mlxlite.api.endpoints.embeddings import FIELDS as EMBEDDING_FIELDS
from mlxlite.api.endpoints.embeddings import parse_embedding
from mlxlite.api.endpoints.tokenize import (
    DETOKENIZE_FIELDS,
    TOKENIZE_FIELDS,
    parse_detokenize,
    parse_tokenize,
)
from mlxlite.api.fields import Field, Use, markdown
from mlxlite.api.likelihoods import MIN_LOGPROB
from mlxlite.api.readers import MAX_PROMPTS
from mlxlite.api.writers import (
    Collected,
    Envelope,
    StreamOptions,
    Writer,
    stream_failure,
    timings_json,
    usage_json,
)
from mlxlite.engine.sequence import FinishReason, Logprobs, Usage
from mlxlite.http.errors import APIError
from mlxlite.output.events import Done, Progress, TextDelta

ENVELOPE = Envelope("cmpl-1", 1_700_000_000, "org/model", "fp_0123456789abcdef")
USAGE = Usage(num_prompt=10, num_cached=4, num_output=5, queue_s=1.0, prefill_s=0.5, decode_s=2.0)
DONE = Done(FinishReason.STOP, USAGE)
SILENT = CompletionRequest(prompts=("hello",))
_LIMITS = (
    *("max_tokens", "max_completion_tokens", "max_output_tokens"),
    *("n_predict", "num_predict", "max_new_tokens"),
)
# a completion's, unlike a chat's
OWN = ("prompt", "logprobs", "n_probs", "include_reasoning", "echo", "best_of", "suffix", *_LIMITS)

NOT_ITS = (
    *("messages", "chat_template_kwargs", "reasoning_effort", "continue_final_message"),
    *("add_generation_prompt", "top_logprobs", "reasoning_format", "tool_choice", "tools"),
    *("function_call", "functions", "modalities", "verbosity", "chat_template"),
    *("parallel_tool_calls", "enable_thinking", "thinking"),
)


def parse(**fields: Any) -> CompletionRequest:
    return parse_completion(body(**{"prompt": "hello", **fields}))


def refusal(**fields: Any) -> APIError:
    return refused(parse_completion, body(**{"prompt": "hello", **fields}))


# --- prompts and inputs -------------------------------------------------------------------------

TEXTS: list[tuple[Any, Any]] = [
    ("hello", ("hello",)),
    (" ", (" ",)),
    (["hello"], ("hello",)),
    (["a", "b", "a"], ("a", "b", "a")),
    ([0, 5, 2**31 - 1], ((0, 5, 2**31 - 1),)),
    ([5.0], ((5,),)),
    ([[1, 2], [3]], ((1, 2), (3,))),
    ([[1, 2], "b"], ((1, 2), "b")),
    (["a"] * MAX_PROMPTS, ("a",) * MAX_PROMPTS),
    ([7] * 1000, ((7,) * 1000,)),
]

NO_TEXTS: list[tuple[Any, str]] = [
    ("", ""),
    ([], ""),
    (["a"] * (MAX_PROMPTS + 1), ""),
    ([[1]] * (MAX_PROMPTS + 1), ""),
    (5, ""),
    (True, ""),
    ({}, ""),
    ([""], "[0]"),
    (["a", ""], "[1]"),
    ([[]], "[0]"),
    (["a", []], "[1]"),
    (["a", 5], "[1]"),
    (["a", None], "[1]"),
    ([5, "a"], "[1]"),
    ([5, [5]], "[1]"),
    ([[5], [-1]], "[1][0]"),
    ([[5, "a"]], "[0][1]"),
    ([[[5]]], "[0][0]"),
    ([-1], "[0]"),
    ([2**31], "[0]"),
    ([1.5], "[0]"),
    ([True], "[0]"),
    ([None], "[0]"),
    ([{}], "[0]"),
]


@pytest.mark.parametrize(("value", "texts"), TEXTS)
def test_texts_are_strings_and_token_ids_one_or_many(value: Any, texts: Any) -> None:
    assert parse(prompt=value).prompts == texts
    assert parse_embedding(body(input=value)).inputs == texts


@pytest.mark.parametrize(("value", "where"), NO_TEXTS, ids=lambda value: repr(value)[:30])
def test_what_is_no_text_is_a_400_that_names_its_place(value: Any, where: str) -> None:
    for name, error in (
        ("prompt", refusal(prompt=value)),
        ("input", refused(parse_embedding, body(input=value))),
    ):
        assert error.param == f"{name}{where}"
        assert name in error.message
        assert len(error.message) < 300


@pytest.mark.parametrize("fields", [{}, {"prompt": None}, {"messages": [], "input": "x"}])
def test_a_completion_needs_its_prompt(fields: dict[str, Any]) -> None:
    error = refused(parse_completion, body(**fields))
    assert error.param == "prompt"
    assert "required" in error.message


PARSERS = (parse_completion, parse_embedding, parse_tokenize, parse_detokenize)


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b" \n", b"[]", b"null", b"5", b"{", b"{'a': 1}", b"\xff"),
        rb'{"prompt":"\ud800","input":"\ud800"}',
        rb'{"content":"\udc00x","tokens":[]}',
        b'{"prompt":[NaN],"input":[NaN]}',
        b'{"prompt":' + b"[" * 10_000,
    ],
    ids=lambda raw: repr(raw)[:30] if isinstance(raw, bytes) else None,
)
def test_a_body_that_is_no_json_object_is_a_400(parser: Callable[[bytes], Any], raw: bytes) -> None:
    error = refused(parser, raw)
    assert error.type == "invalid_request_error"
    assert len(error.message) < 300


# --- the table of completions -------------------------------------------------------------------

_FLAG_WRONG: list[Any] = [0, 1, "true", "", [], {}]

OWN_CASES: dict[str, Works | Accepted | Refused] = {
    **{
        name: replace(
            CASES[name],  # type: ignore[type-var]
            right=[(1, 1), (4096, 4096), (20.0, 20), (-1, NO_LIMIT), (NO_LIMIT, NO_LIMIT)],
        )
        for name in _LIMITS
    },
    "prompt": Works("prompts", TEXTS, [value for value, where in NO_TEXTS if not where]),
    "logprobs": Works(
        "top_logprobs", [(0, 0), (5, 5), (20, 20), (5.0, 5)], [-1, 21, 1.5, "5", True, [], {}]
    ),
    "n_probs": CASES["n_probs"],
    "include_reasoning": Accepted([True, False], _FLAG_WRONG),
    "echo": Works("is_echo", [(True, True), (False, False)], _FLAG_WRONG),
    "best_of": Refused([1, 1.0], [2, 0, True, "1", []]),
    "suffix": Works("suffix", [("", ""), ("x", "x")], [False, 0, []]),
}

COMPLETION_CASES = {
    name: case for name, case in CASES.items() if name not in (*NOT_ITS, *OWN)
} | OWN_CASES


def _cases(kind: type[Any], values: str) -> list[tuple[str, Any, Any]]:
    return [
        (name, case, value)
        for name, case in COMPLETION_CASES.items()
        if isinstance(case, kind) and not (isinstance(case, LeftOut) and values == "asking")
        for value in getattr(case, values)
    ]


def _also(case: Works) -> dict[str, Any]:
    return {name: value for name, value in case.also.items() if name in COMPLETION_FIELDS}


@pytest.mark.parametrize("name", COMPLETION_FIELDS)
def test_every_field_of_a_completion_has_a_case_of_its_use(name: str) -> None:
    kinds = {
        Use.SUPPORTED: Works,
        Use.NO_OP: Accepted,
        Use.UNSUPPORTED: Refused,
        Use.HINT: LeftOut,
    }
    assert name in COMPLETION_CASES, f"a new field: give {name} its values here"
    assert type(COMPLETION_CASES[name]) is kinds[COMPLETION_FIELDS[name].use]


def test_there_is_no_case_without_a_field_of_a_completion() -> None:
    assert COMPLETION_CASES.keys() == COMPLETION_FIELDS.keys()
    assert FIELDS.keys() - COMPLETION_FIELDS.keys() == set(NOT_ITS)


@pytest.mark.parametrize(("name", "case", "pair"), _cases(Works, "right"))
def test_a_field_that_works_arrives(name: str, case: Works, pair: tuple[Any, Any]) -> None:
    value, expected = pair
    request = parse(**_also(case), **{name: value})
    assert arrived(request, case.attribute) == expected
    assert type(arrived(request, case.attribute)) is type(expected)
    without = parse(**_also(case))
    assert request == with_value(without, case.attribute, expected), "and nothing else does"


@pytest.mark.parametrize(
    ("name", "case", "value"), _cases(Works, "wrong") + _cases(Accepted, "wrong")
)
def test_a_wrong_value_is_a_400_that_names_the_field(
    name: str, case: Works | Accepted, value: Any
) -> None:
    error = refusal(**(_also(case) if isinstance(case, Works) else {}), **{name: value})
    assert error.param == name
    assert f"'{name}'" in error.message
    assert error.code is None


@pytest.mark.parametrize(
    ("name", "_case", "value"), _cases(Accepted, "right") + _cases(Refused, "neutral")
)
def test_a_neutral_value_changes_nothing(name: str, _case: Any, value: Any) -> None:
    assert parse(**{name: value}) == SILENT


@pytest.mark.parametrize(("name", "_case", "value"), _cases(Refused, "asking"))
def test_an_unsupported_value_is_a_400_that_names_its_field(
    name: str, _case: Any, value: Any
) -> None:
    error = refusal(**{name: value})
    assert error.code == "unsupported_parameter"
    assert error.param == name


@pytest.mark.parametrize("name", [name for name in COMPLETION_FIELDS if name != "prompt"])
def test_null_means_not_given(name: str) -> None:
    assert parse(**{name: None}) == SILENT


@pytest.mark.parametrize("name", NOT_ITS)
def test_a_chats_own_fields_are_unknown_to_a_completion(name: str) -> None:
    assert parse(**{name: "x"}) == replace(SILENT, ignored=(name,))


@pytest.mark.parametrize(
    ("fields", "num_top"),
    [
        ({}, None),
        ({"echo": True}, None),
        ({"logprobs": 3}, None),
        ({"echo": True, "logprobs": 0}, 0),
        ({"echo": True, "logprobs": 3}, 3),
        ({"prompt_logprobs": 2}, 2),
        ({"prompt_logprobs": 2, "echo": True, "logprobs": 1}, 2),
        ({"prompt_logprobs": 0, "echo": True, "logprobs": 1}, 1),
    ],
)
def test_the_likelihoods_of_a_prompt_are_wanted_by_either_field(
    fields: dict[str, Any], num_top: int | None
) -> None:
    assert parse(**fields).prompt_top == num_top
    if num_top is None:
        assert refusal(**fields, max_tokens=0).param == "max_tokens"
    else:
        assert parse(**fields, max_tokens=0).max_tokens == 0


def test_prompt_logprobs_are_not_streamed_but_an_echo_is() -> None:
    assert refusal(prompt_logprobs=1, stream=True).param == "prompt_logprobs"
    assert parse(echo=True, logprobs=1, stream=True).prompt_top == 1


def test_stream_options_without_a_stream_are_left_out() -> None:
    for stream in ({}, {"stream": False}, {"stream": None}):
        request = parse(**stream, stream_options={"include_usage": True})
        assert request.ignored == ("stream_options",)


def test_min_tokens_are_at_most_max_tokens() -> None:
    assert refusal(min_tokens=6, max_tokens=5).param == "min_tokens"
    assert parse(min_tokens=5, max_tokens=5).sampling["min_tokens"] == 5


TABLES: dict[str, Mapping[str, Field]] = {
    "completions": COMPLETION_FIELDS,
    "embeddings": EMBEDDING_FIELDS,
    "tokenize": TOKENIZE_FIELDS,
    "detokenize": DETOKENIZE_FIELDS,
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_table_in_the_readme_has_a_row_for_every_field(table: Mapping[str, Field]) -> None:
    rows = markdown(table).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(table)
    assert all(row.count("|") == 4 for row in rows), "a pipe in a note would break the table"


# --- what a completion returns ------------------------------------------------------------------


def writer(*echoes: str, num_choices: int = 1, **options: bool) -> Writer:
    echoes = echoes or ("",) * num_choices
    return CompletionWriter(ENVELOPE, token_bytes, StreamOptions(**options), echoes=echoes)


def payloads_of(frames: bytes) -> list[Any]:
    """What a stream's frames say, the one at the end left out."""
    blocks = [block.removeprefix(b"data: ") for block in frames.split(b"\n\n")]
    assert blocks.pop() == b""
    assert not any(b"\n" in block for block in blocks)
    return [json.loads(block) for block in blocks if block != b"[DONE]"]


def whole(*choices: Collected, echoes: tuple[str, ...] = ()) -> Any:
    total = total_usage([choice.done for choice in choices if choice.done is not None])
    raw = writer(*echoes, num_choices=len(choices)).whole(choices, total)
    Completion.model_validate_json(raw, strict=True)
    return json.loads(raw)


def test_a_whole_completion_has_every_key_that_openais_document_requires() -> None:
    assert whole(Collected(["hel", "lo"], done=DONE)) == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "org/model",
        "system_fingerprint": "fp_0123456789abcdef",
        "choices": [
            {
                "index": 0,
                "text": "hello",
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": usage_json(USAGE),
        "timings": timings_json(USAGE),
    }


@pytest.mark.parametrize("text", ["", "\0", '"\n', "🙂", "\u2028", "data: [DONE]\n\n"])
@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_is_text_and_a_finish_with_usage_and_timings(
    text: str, include_usage: bool
) -> None:
    completion = writer("echo " + text, include_usage=include_usage)
    frames = completion.begin() + completion.event(0, TextDelta(text))
    frames += completion.done(0, DONE, USAGE)
    assert frames.endswith(b"data: [DONE]\n\n")
    chunks = payloads_of(frames)
    for chunk in chunks:
        assert chunk["object"] == "text_completion"
        assert chunk["id"] == "cmpl-1"
    echo, piece, finish, *rest = chunks
    assert [c["choices"][0]["text"] for c in (echo, piece, finish)] == ["echo " + text, text, ""]
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert finish["timings"] == timings_json(USAGE)
    Completion.model_validate(finish, strict=True)
    if include_usage:
        assert [chunk["usage"] for chunk in (echo, piece, finish)] == [None] * 3
        assert [(chunk["choices"], chunk["usage"]) for chunk in rest] == [([], usage_json(USAGE))]
    else:
        assert finish["usage"] == usage_json(USAGE)
        assert rest == []


def test_only_an_echo_is_sent_before_the_first_token() -> None:
    assert writer(num_choices=3).begin() == b""
    chunks = payloads_of(writer("a", "", "b").begin())
    echoes = [(chunk["choices"][0]["index"], chunk["choices"][0]["text"]) for chunk in chunks]
    assert echoes == [(0, "a"), (2, "b")]


def test_usage_and_timings_are_in_every_text_chunk_on_request() -> None:
    delta = TextDelta("x", usage=replace(USAGE, num_output=2))
    (chunk,) = payloads_of(writer().event(0, delta))
    assert chunk.keys().isdisjoint({"usage", "timings"})
    options = {"include_usage": True, "continuous_usage": True, "timings_per_token": True}
    (chunk,) = payloads_of(writer(**options).event(0, delta))
    assert delta.usage is not None
    assert chunk["usage"] == usage_json(delta.usage)
    assert chunk["timings"] == timings_json(delta.usage)


def test_progress_is_llama_servers_object_in_a_chunk_without_text() -> None:
    (chunk,) = payloads_of(writer(num_choices=2).event(1, Progress(7, USAGE)))
    assert chunk["prompt_progress"] == {"total": 10, "cache": 4, "processed": 7, "time_ms": 500.0}
    assert chunk["choices"][0] == {
        "index": 1,
        "text": "",
        "logprobs": None,
        "finish_reason": None,
    }


def drawn(text: str) -> list[tuple[int, Logprobs]]:
    """A token for each byte, with itself and an X as its rivals."""
    return [(byte, Logprobs(-0.5, ((byte, -0.5), (88, -1.5)))) for byte in text.encode()]


def test_logprobs_have_the_legacy_form() -> None:
    (choice,) = whole(Collected(["abc"], drawn=drawn("abc"), done=DONE))["choices"]
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"a": -0.5, "X": -1.5}, {"b": -0.5, "X": -1.5}, {"c": -0.5, "X": -1.5}],
        "text_offset": [0, 1, 2],
    }


def test_the_logprobs_of_a_stream_add_up_to_those_of_the_whole_answer() -> None:
    completion = writer(num_choices=2)
    deltas = [("a", drawn("a")), ("", drawn("b")), ("bcd", drawn("cd"))]
    folded: dict[str, list[Any]] = {}
    for text, tokens in deltas:
        completion.event(
            0, TextDelta("xyz", logprobs=tuple(drawn("xyz")))
        )  # the other choice's are its own
        (chunk,) = payloads_of(completion.event(1, TextDelta(text, logprobs=tuple(tokens))))
        for name, values in chunk["choices"][0]["logprobs"].items():
            folded.setdefault(name, []).extend(values)
    (choice,) = whole(Collected(["abcd"], drawn=drawn("abcd"), done=DONE))["choices"]
    assert folded == choice["logprobs"]


def test_an_offset_is_where_a_tokens_text_begins_even_if_it_is_half_a_character() -> None:
    text = "a🙂b"
    (choice,) = whole(Collected([text], drawn=drawn(text), done=DONE))["choices"]
    assert choice["text"] == text
    offsets = choice["logprobs"]["text_offset"]
    assert text[offsets[-1] :] == "b"
    assert offsets[:2] == [0, 1]
    assert offsets == sorted(offsets)


def test_a_logprob_of_minus_infinity_is_a_finite_number_in_json() -> None:
    item = Logprobs(-math.inf, ((97, -math.inf), (98, -20_000.0)))
    (choice,) = whole(Collected(["a"], drawn=[(97, item)], done=DONE))["choices"]
    assert choice["logprobs"]["token_logprobs"] == [MIN_LOGPROB]
    assert choice["logprobs"]["top_logprobs"] == [{"a": MIN_LOGPROB, "b": MIN_LOGPROB}]


def test_a_completion_that_fails_in_mid_stream_sends_the_error_in_both_forms() -> None:
    error = failure(Done(FinishReason.ERROR, USAGE, "out of memory"))
    assert writer().fail(error) == stream_failure(error)


def test_usage_counts_each_prompt_once_and_every_output() -> None:
    first = Done(FinishReason.STOP, Usage(num_prompt=10, num_cached=4, num_output=5, decode_s=1.0))
    other = Done(FinishReason.STOP, Usage(num_prompt=3, num_cached=0, num_output=7, decode_s=2.0))
    total = total_usage([first, first, other, other], 2)
    assert (total.num_prompt, total.num_cached, total.num_output) == (13, 4, 24)
    assert total.decode_s == 2.0
