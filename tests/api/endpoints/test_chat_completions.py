"""A chat's fields: every field of the table, right and wrong, and what known clients send."""

from dataclasses import replace
from typing import Any

import pytest
from api_requests import (
    CASES,
    SILENT,
    Accepted,
    LeftOut,
    Refused,
    Works,
    function_tool,
    parse,
    refusal,
)
from tables import arrived, with_value

from mlxlite.api.endpoints.chat_completions import FIELDS
from mlxlite.api.fields import Use, markdown

# --- the table ----------------------------------------------------------------------------------

# What each kind of field does, one parameter a value.
WORKING = [
    (name, case, *pair)
    for name, case in CASES.items()
    if isinstance(case, Works)
    for pair in case.right
]

WRONG = [
    (name, case, value)
    for name, case in CASES.items()
    if not isinstance(case, Refused)
    for value in case.wrong
]

PASSING = [
    (name, value)
    for name, case in CASES.items()
    if not isinstance(case, Works)
    for value in (case.right if isinstance(case, Accepted) else case.neutral)
]

ASKING = [
    (name, value) for name, case in CASES.items() if type(case) is Refused for value in case.asking
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name, case in CASES.items()
        if type(case) is LeftOut
        for value in case.asking
    ],
)
def test_a_hint_is_left_out_by_name(name: str, value: Any) -> None:
    assert parse(**{name: value}) == replace(SILENT, ignored=(name,))


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_the_table_has_a_case_of_its_use(name: str) -> None:
    kinds = {
        Use.SUPPORTED: Works,
        Use.NO_OP: Accepted,
        Use.UNSUPPORTED: Refused,
        Use.HINT: LeftOut,
    }
    assert name in CASES, f"a new field: give {name} its values in `CASES`"
    assert type(CASES[name]) is kinds[FIELDS[name].use]


def test_there_is_no_case_without_a_field() -> None:
    assert CASES.keys() == FIELDS.keys()


@pytest.mark.parametrize(("name", "case", "value", "expected"), WORKING)
def test_a_field_that_works_arrives(name: str, case: Works, value: Any, expected: Any) -> None:
    request = parse(**case.also, **{name: value})
    assert arrived(request, case.attribute) == expected
    assert type(arrived(request, case.attribute)) is type(expected)
    without = parse(**case.also)
    if name == "functions" and value:  # that form has one call, and answers in its words
        without = replace(without, max_calls=1, has_functions=True)
    assert request == with_value(without, case.attribute, expected), "and nothing else does"


@pytest.mark.parametrize(("name", "case", "value"), WRONG)
def test_a_wrong_value_is_a_400_that_names_the_field(
    name: str, case: Works | Accepted, value: Any
) -> None:
    error = refusal(**(case.also if isinstance(case, Works) else {}), **{name: value})
    assert error.param == name
    assert f"'{name}'" in error.message
    assert error.type == "invalid_request_error"
    assert error.code is None


@pytest.mark.parametrize(("name", "value"), PASSING)
def test_a_neutral_value_changes_nothing(name: str, value: Any) -> None:
    assert parse(**{name: value}) == SILENT


@pytest.mark.parametrize(("name", "value"), ASKING)
def test_an_unsupported_value_is_a_400_that_names_its_field(name: str, value: Any) -> None:
    error = refusal(**{name: value})
    assert error.code == "unsupported_parameter"
    assert error.param == name
    assert f"'{name}'" in error.message


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "messages"])
def test_null_means_not_given(name: str) -> None:
    assert parse(**{name: None}) == SILENT


def test_null_messages_are_missing_messages() -> None:
    assert refusal(messages=None).param == "messages"
    assert refusal(b"{}").param == "messages"
    assert "required" in refusal(b"{}").message


def test_an_alias_means_the_field_it_stands_for() -> None:
    aliases = {name: entry.alias_of for name, entry in FIELDS.items() if entry.alias_of}
    assert aliases == {
        "max_completion_tokens": "max_tokens",
        "max_output_tokens": "max_tokens",
        "n_predict": "max_tokens",
        "num_predict": "max_tokens",
        "max_new_tokens": "max_tokens",
        "stop_sequences": "stop",
        "repeat_penalty": "repetition_penalty",
        "repeat_last_n": "repetition_context_size",
        "typ_p": "typical_p",
        "thinking_budget_tokens": "thinking_budget",
        "thinking_token_budget": "thinking_budget",
    }
    for name, meant in aliases.items():
        value = {"stop": "x", "typical_p": 0.5}.get(meant, 5)
        assert parse(**{name: value}) == parse(**{meant: value})
        own, other = CASES[name], CASES[meant]
        assert isinstance(own, Works)
        assert isinstance(other, Works)
        assert (own.attribute, own.right) == (other.attribute, other.right), "the same values"


# --- what known clients send --------------------------------------------------------------------


def test_all_that_the_launching_app_sends_is_accepted() -> None:
    request = parse(
        model="m",
        stream=True,
        n_predict=512,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        min_p=0.05,
        seed=7,
        repeat_penalty=1.12,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        logit_bias={"42": -1.5},
        cache_prompt=True,
        chat_template_kwargs={"enable_thinking": False},
        stop_sequences=["</s>", "User:"],
    )
    assert request == replace(
        SILENT,
        model="m",
        is_stream=True,
        max_tokens=512,
        sampling={
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
            "min_p": 0.05,
            "seed": 7,
            "repetition_penalty": 1.12,
            "presence_penalty": 0.1,
            "frequency_penalty": -0.2,
            "logit_bias": ((42, -1.5),),
        },
        template_kwargs={"enable_thinking": False},
        stop=("</s>", "User:"),
        cache_prompt=True,
        ignored=(),
    )


def test_unknown_fields_are_ignored_and_named() -> None:
    request = parse(zeta=1, n_cache_reuse=0, alpha=None)
    assert request == replace(SILENT, ignored=("alpha", "n_cache_reuse", "zeta"))


@pytest.mark.parametrize(
    "body",
    [
        {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.7},
        {"stream": False, "max_completion_tokens": 1000},  # to name a chat
        {"stream": True, "stop": ["<end>"], "seed": 0, "top_k": 40, "min_p": 0.0, "top_p": 0.9},
        {
            "stream": True,
            "tools": [function_tool("f")],
            "tool_choice": "auto",
            "frequency_penalty": 1.1,
        },
    ],
)
def test_all_that_open_webui_sends_is_known(body: dict[str, Any]) -> None:
    """Written from its source (`generate_chat_completion`), not captured."""
    system = {"role": "system", "content": "You are a helpful assistant."}
    user = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
    assert parse(model="demo", messages=[system, user], **body).ignored == ()


def test_the_readmes_table_has_a_row_for_every_field() -> None:
    rows = markdown(FIELDS).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(FIELDS)
    assert all(row.count("|") == 4 for row in rows), "a pipe in a note would break the table"
