"""Grammars: a constraint becomes masks, or an error that a client can read.

With the demo's own tokenizer, and no model: a text is walked token by token, and each token must be
allowed at its place.
"""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxlite.config.options import Config
from mlxlite.engine.sequence import Matcher
from mlxlite.models.load import LoadedModel, load
from mlxlite.output.call_syntax import JSON_TOOLS
from mlxlite.output.constraint import (
    CallConstraint,
    Constraint,
    ConstraintError,
    Kind,
    TextConstraint,
    ToolSchema,
)
from mlxlite.output.grammar import MAX_COMPILED, MAX_GRAMMAR_CHARS, MISSING, Grammars

pytest.importorskip("llguidance", reason="structured output is the extra `grammar`")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load(Config())[1]


@pytest.fixture
def grammars(model: LoadedModel) -> Grammars:
    return new_grammars(model)


def new_grammars(model: LoadedModel, **changes: Any) -> Grammars:
    tokenizer = model.tokenizer.wrapper
    settings: dict[str, Any] = {
        "num_vocab": model.num_vocab,
        "eos_tokens": model.eos_tokens,
        "think": (tuple(tokenizer.think_start_tokens), tuple(tokenizer.think_end_tokens)),
        "syntax": JSON_TOOLS,
    }
    return Grammars(tokenizer.get_chat_template.__self__, **settings | changes)


def matcher_of(grammars: Grammars, kind: Kind | None, text: Any, **kw: Any) -> Matcher:
    kw = {"is_thinking": False, **kw}
    return grammars.compile(constraint_of(kind, text), **kw).matcher()


def constraint_of(kind: Kind | None, text: Any) -> Constraint:
    """Of text, or of what JSON text is made of; a constraint of calls has no kind."""
    if isinstance(text, CallConstraint):
        return text
    assert kind is not None
    return TextConstraint(kind, text if isinstance(text, str) else json.dumps(text))


def allowed(model: LoadedModel, matcher: Matcher) -> set[int]:
    mask = np.zeros((model.num_vocab + 31) // 32, np.uint32)
    matcher.fill(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return {int(token) for token in np.flatnonzero(bits[: model.num_vocab])}


def takes(model: LoadedModel, matcher: Matcher, tokens: Iterable[int]) -> bool:
    """Whether each token is allowed at its place; those before the first other are accepted."""
    for token in tokens:
        if token not in allowed(model, matcher):
            return False
        matcher.accept((token,))
        assert matcher.error is None
    return True


def matches(model: LoadedModel, matcher: Matcher, text: str) -> bool:
    """Whether a text is a whole answer."""
    tokens = model.encode(text, add_special=False)
    return takes(model, matcher, tokens) and model.eos_tokens <= allowed(model, matcher)


# --- kinds --------------------------------------------------------------------------------------

GO = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
CALLS = CallConstraint((ToolSchema("go", json.dumps(GO)), ToolSchema("stay", '{"type": "object"}')))


def call(name: str = "go", arguments: Any = None) -> str:
    given = {"n": 1} if arguments is None else arguments
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': given})}\n</tool_call>"


KINDS: list[tuple[Kind | None, Any, list[str], list[str]]] = [
    (
        Kind.JSON,
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        ['{"a": 1}', '{"a":1}', '{\n  "a": 12\n}', '{"a": 1, "b": [null]}'],
        ['{"a": "x"}', "{}", '{"b": 1}', "1", '{"a": 1', '{"a": 1}}', "", '{"a":        1}'],
    ),
    (Kind.JSON, {"const": "é <b> 世"}, ['"é <b> 世"'], ['"é"', "é <b> 世"]),
    (Kind.REGEX, "[ab]+c?", ["a", "abc", "bbbb"], ["", "c", "abcd", "x"]),
    (Kind.REGEX, r"\d{3}-\d{2}", ["123-45"], ["123-4", "123-456"]),
    (Kind.CHOICE, ["yes", "no", "not yet"], ["yes", "no", "not yet"], ["y", "not", "yesno", ""]),
    (Kind.CHOICE, ['a "quoted" \\ one\n'], ['a "quoted" \\ one\n'], ["a"]),
    (
        Kind.GRAMMAR,
        'root ::= "<" ("a" | root)* ">"',
        ["<>", "<a>", "<<a>a<<>>>"],
        ["", "<", "a", "<>>", "<b>"],
    ),
    (Kind.GRAMMAR, 'start: ("one" | N) "!"\nN: /[0-9]+/', ["one!", "42!"], ["one", "!", "42"]),
    (
        None,
        CALLS,
        [
            call(),
            f"{call()}\n{call()}",
            call("stay", {"x": [1]}),
            f"\n{call()}{call('stay', {})}",
        ],
        [
            "",
            "Hello.",
            f"Hello. {call()}",
            call("go", {"n": "x"}),
            call("go", {}),
            call("fly"),
            call("stay", [1]),
            "<tool_call>\n</tool_call>",
            call()[: -len("</tool_call>")],
        ],
    ),
    (None, replace(CALLS, is_single=True), [call()], [f"{call()}\n{call()}"]),
    (
        None,
        replace(CALLS, is_forced=False),
        ["", "Hello.", call(), f"Hello.\n\n{call()}{call()}", "1 < 2 <tool> {}"],
        [call("go", {"n": "x"}), f"Hello. {call('fly')}", f"Hi {call()[:-12]}"],
    ),
]


@pytest.mark.parametrize(("kind", "text", "right", "wrong"), KINDS)
def test_each_kind_lets_through_what_matches_and_nothing_else(
    model: LoadedModel,
    grammars: Grammars,
    kind: Kind | None,
    text: Any,
    right: list[str],
    wrong: list[str],
):
    for answer in right:
        assert matches(model, matcher_of(grammars, kind, text), answer), answer
    for answer in wrong:
        assert not matches(model, matcher_of(grammars, kind, text), answer), answer


def test_a_call_whose_markers_are_ordinary_tokens_must_match_as_well(
    model: LoadedModel, grammars: Grammars
):
    """The marker parser reads text: it does not depend on the tokens that a marker is made of."""
    text = call("go", {"n": "x"})
    spelt = [token for char in text for token in model.encode(char, add_special=False)]
    assert model.detokenize(spelt) == text
    matcher = matcher_of(grammars, None, replace(CALLS, is_forced=False))
    assert not takes(model, matcher, spelt)


def test_a_models_calls_that_are_no_json_cannot_be_enforced(model: LoadedModel):
    grammars = new_grammars(model, syntax=None)
    with pytest.raises(ConstraintError, match="format of this model's tool calls"):
        matcher_of(grammars, None, CALLS)


def test_white_space_in_json_is_bounded(model: LoadedModel, grammars: Grammars):
    matcher = matcher_of(grammars, Kind.JSON, {"type": "array"})
    for text, is_right in (("[\n" + " " * 24 + "1]", True), ("[" + " " * 5 + "1]", False)):
        matcher = matcher_of(grammars, Kind.JSON, {"type": "array"})
        assert matches(model, matcher, text) is is_right, text


# --- the end ------------------------------------------------------------------------------------


def test_the_answer_may_end_only_where_the_grammar_accepts(model: LoadedModel, grammars: Grammars):
    matcher = matcher_of(grammars, Kind.REGEX, "a(bc)?")
    can_end = []
    for char in "abc":
        can_end.append(model.eos_tokens <= allowed(model, matcher))
        assert can_end[-1] or not model.eos_tokens & allowed(model, matcher)
        assert takes(model, matcher, model.encode(char, add_special=False))
    can_end.append(model.eos_tokens <= allowed(model, matcher))
    assert can_end == [False, True, False, True]


def test_when_it_is_complete_only_the_end_may_follow(model: LoadedModel, grammars: Grammars):
    matcher = matcher_of(grammars, Kind.CHOICE, ["no"])
    assert takes(model, matcher, model.encode("no", add_special=False))
    assert allowed(model, matcher) == model.eos_tokens


@pytest.mark.parametrize("num_ends", [1, 2])
def test_tokens_after_the_end_are_harmless(model: LoadedModel, grammars: Grammars, num_ends: int):
    matcher = matcher_of(grammars, Kind.REGEX, "a+")
    assert takes(model, matcher, model.encode("a", add_special=False))
    matcher.accept((min(model.eos_tokens),) * num_ends)
    matcher.accept(model.encode("anything at all", add_special=False))
    assert matcher.error is None
    assert allowed(model, matcher) == model.eos_tokens


@pytest.mark.parametrize("end", [0, 1])
def test_every_end_token_ends_a_constrained_answer(
    model: LoadedModel, grammars: Grammars, end: int
):
    matcher = matcher_of(grammars, Kind.REGEX, "a+")
    assert takes(model, matcher, [*model.encode("a", add_special=False)])
    assert takes(model, matcher, [sorted(model.eos_tokens)[end]])
    assert allowed(model, matcher) == model.eos_tokens


def test_a_token_that_was_not_allowed_is_an_error_and_never_an_exception(
    model: LoadedModel, grammars: Grammars
):
    matcher = matcher_of(grammars, Kind.REGEX, "a+")
    matcher.accept(model.encode("b", add_special=False))
    allowed(model, matcher)
    assert matcher.error
    assert len(matcher.error) <= 300
    assert "\n" not in matcher.error


# --- reasoning ----------------------------------------------------------------------------------


def test_matching_begins_where_the_reasoning_ends(model: LoadedModel, grammars: Grammars):
    matcher = matcher_of(grammars, Kind.CHOICE, ["no"], is_thinking=True)
    thought = model.encode("Well, yes! <think> no </th", add_special=False)
    assert takes(model, matcher, thought)
    assert takes(model, matcher, model.encode("</think>", add_special=False))
    assert not matches(model, matcher, "yes")
    assert matches(model, matcher, "no")


def test_an_answer_does_not_end_inside_its_reasoning(model: LoadedModel, grammars: Grammars):
    matcher = matcher_of(grammars, Kind.CHOICE, ["no"], is_thinking=True)
    assert not model.eos_tokens & allowed(model, matcher)
    assert takes(model, matcher, model.encode("Well", add_special=False))
    assert not model.eos_tokens & allowed(model, matcher)


def test_a_resumed_matcher_has_the_same_state(model: LoadedModel, grammars: Grammars):
    """As after a preemption: all tokens at once, those of the reasoning too."""
    tokens = model.encode("Hm.</think>ab", add_special=False)
    whole = matcher_of(grammars, Kind.REGEX, "(a|b){3}c", is_thinking=True)
    whole.accept(tokens)
    slow = matcher_of(grammars, Kind.REGEX, "(a|b){3}c", is_thinking=True)
    assert takes(model, slow, tokens)
    assert allowed(model, whole) == allowed(model, slow)
    assert not matches(model, slow, "c")
    assert matches(model, whole, "ac")


@pytest.mark.parametrize("budget", [0, 1, 3])
@pytest.mark.parametrize("is_constrained", [False, True])
def test_a_budget_closes_the_reasoning_with_the_models_own_mark(
    model: LoadedModel, grammars: Grammars, budget: int, is_constrained: bool
):
    constraint = TextConstraint(Kind.CHOICE, '["no"]') if is_constrained else None
    matcher = grammars.compile(constraint, is_thinking=True, budget=budget).matcher()
    (end,) = model.tokenizer.wrapper.think_end_tokens
    (word,) = model.encode("a", add_special=False)
    for _ in range(budget):
        assert word in allowed(model, matcher)
        matcher.accept((word,))
    assert allowed(model, matcher) == {end}
    matcher.accept((end,))
    if is_constrained:
        assert matches(model, matcher, "no")
    else:
        assert len(allowed(model, matcher)) == model.num_vocab


def test_a_budget_is_met_by_reasoning_that_the_model_begins(model: LoadedModel, grammars: Grammars):
    matcher = grammars.compile(None, is_thinking=False, budget=2).matcher()
    assert len(allowed(model, matcher)) == model.num_vocab
    matcher.accept(tuple(model.tokenizer.wrapper.think_start_tokens))
    matcher.accept(model.encode("a", add_special=False) * 2)
    assert allowed(model, matcher) == set(model.tokenizer.wrapper.think_end_tokens)


def test_reasoning_that_ends_within_its_budget_leaves_the_answer_free(
    model: LoadedModel, grammars: Grammars
):
    matcher = grammars.compile(None, is_thinking=True, budget=2).matcher()
    matcher.accept(tuple(model.tokenizer.wrapper.think_end_tokens))
    matcher.accept(model.encode("a", add_special=False) * 5)
    assert len(allowed(model, matcher)) == model.num_vocab


def test_without_marks_around_reasoning_there_is_no_budget(model: LoadedModel):
    grammars = new_grammars(model, think=((), ()))
    with pytest.raises(ConstraintError, match="no marks around its reasoning"):
        grammars.compile(None, is_thinking=False, budget=3)


# --- errors -------------------------------------------------------------------------------------

DEEP = '{"type":"array","items":' * 3000 + "{}" + "}" * 3000
ALIASES = {f"a{i}": {"$ref": f"#/$defs/a{(i + 1) % 50}"} for i in range(50)}
REFUSED: dict[str, tuple[Kind, str]] = {
    "no JSON": (Kind.JSON, "{"),
    "half a character": (Kind.JSON, '{"const": "\\ud800"}'),
    "a type that is none": (Kind.JSON, '{"type": "nonsense"}'),
    "a reference to itself": (Kind.JSON, '{"$ref": "#"}'),
    "references in a circle": (Kind.JSON, json.dumps({"$ref": "#/$defs/a0", "$defs": ALIASES})),
    "a reference to nothing": (Kind.JSON, '{"$ref": "#/$defs/none"}'),
    "a reference to the network": (Kind.JSON, '{"$ref": "http://localhost:1/x"}'),
    "a reference to a file": (Kind.JSON, '{"$ref": "file:///etc/passwd"}'),
    "all of itself": (Kind.JSON, '{"allOf": [{"$ref": "#"}, {"type": "integer"}]}'),
    "deep": (Kind.JSON, DEEP),
    "many words": (Kind.JSON, json.dumps({"enum": [f"e{i}" for i in range(20_000)]})),
    "many products": (
        Kind.JSON,
        json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"a{i}{j}": {"type": "string"}}} for j in range(4)]}
                    for i in range(12)
                ]
            }
        ),
    ),
    "nothing can match": (Kind.JSON, '{"type": "integer", "minimum": 3, "maximum": 2}'),
    "an open group": (Kind.REGEX, "("),
    "a back reference": (Kind.REGEX, r"(a)\1"),
    "looking around": (Kind.REGEX, "(?=a)b"),
    "a long word": (Kind.REGEX, "a" * 200_000),
    "longer than is read": (Kind.REGEX, "a" * 300_000),
    "a schema longer than is read": (Kind.JSON, json.dumps({"title": "x" * 300_000})),
    "choices longer than are read": (Kind.CHOICE, json.dumps(["x" * 300_000])),
    "a rule that is not there": (Kind.GRAMMAR, "root ::= nothing"),
    "a term that is not there": (Kind.GRAMMAR, "start: nothing"),
    "no grammar": (Kind.GRAMMAR, "%%%"),
    "a rule of itself": (Kind.GRAMMAR, "root ::= root root | root"),
    "a term of itself": (Kind.GRAMMAR, "start: start"),
    "a tool's schema": (
        None,
        CallConstraint((ToolSchema("f", '{"type": "nonsense"}'),)),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused_with_a_short_reason(grammars: Grammars, name: str):
    kind, text = REFUSED[name]
    with pytest.raises(ConstraintError) as caught:
        grammars.compile(constraint_of(kind, text), is_thinking=False)
    reason = str(caught.value)
    assert 5 < len(reason) <= 300
    assert "\n" not in reason
    assert "/work/" not in reason
    assert "root:" not in reason, "a file was read"


@pytest.mark.parametrize("name", ["a reference to itself", "a rule of itself", "a term of itself"])
def test_a_grammar_that_nothing_matches_is_refused_with_that_reason(grammars: Grammars, name: str):
    kind, text = REFUSED[name]
    with pytest.raises(ConstraintError, match=r"nothing|no answer|empty|never"):
        grammars.compile(constraint_of(kind, text), is_thinking=False)


def test_a_grammar_of_the_maximum_length_is_read(grammars: Grammars):
    schema = {"type": "null", "title": ""}
    schema["title"] = "x" * (MAX_GRAMMAR_CHARS - len(json.dumps(schema)))
    assert len(json.dumps(schema)) == MAX_GRAMMAR_CHARS
    assert matcher_of(grammars, Kind.JSON, schema)


UNSUPPORTED: dict[str, Any] = {
    "not": {"type": "string"},
    "if": {"type": "string"},
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {"a": {}},
    "uniqueItems": True,
    "contains": {"type": "string"},
    "minContains": 2,
    "propertyNames": {"pattern": "a"},
    "unevaluatedProperties": False,
    "unevaluatedItems": False,
    "oneOf": [
        {"properties": {"a": {"type": "integer"}}},
        {"properties": {"b": {"type": "integer"}}},
    ],
    "format": "nonsense",
    "pattern": "(?=a)b",
    "minProperties": 2,
}
BESIDE: dict[str, Any] = {
    "minProperties": {"properties": {"a": {}, "b": {}}},
    "format": {"type": "string"},
    "pattern": {"type": "string"},
}


@pytest.mark.parametrize("keyword", UNSUPPORTED)
@pytest.mark.parametrize("is_inside", [False, True])
def test_a_keyword_that_only_refines_is_left_out_and_named(
    grammars: Grammars, keyword: str, is_inside: bool
):
    schema: Any = {"title": "T", keyword: UNSUPPORTED[keyword], **BESIDE.get(keyword, {})}
    rest = {"properties": {"pattern": {"type": "string"}}}  # a name, no keyword
    schema = {"type": "object", **rest, **schema} if "type" not in schema else schema
    if is_inside:
        schema = {"type": "object", "properties": {"a": {"type": "array", "items": schema}}}
    constraint = TextConstraint(Kind.JSON, json.dumps(schema), "response_format.schema")
    found = grammars.compile(constraint, is_thinking=False)
    assert found.left_out == (f"response_format.schema:{keyword}",)
    again = grammars.compile(replace(constraint, path="other"), is_thinking=False)
    assert again.left_out == (f"other:{keyword}",), "the name is the request's, not the cache's"
    assert found.matcher().error is None


@pytest.mark.parametrize("keyword", ["not", "if", "dependentRequired", "uniqueItems", "contains"])
def test_a_schema_of_which_nothing_would_be_left_is_refused(grammars: Grammars, keyword: str):
    schema = {"title": "T", "$comment": "c", keyword: UNSUPPORTED[keyword]}
    with pytest.raises(ConstraintError, match=f"nothing is left.*{keyword}"):
        matcher_of(grammars, Kind.JSON, schema)


@pytest.mark.parametrize("keyword", ["$dynamicRef", "$recursiveRef"])
def test_a_dynamic_reference_is_refused_for_it_is_a_meaning(grammars: Grammars, keyword: str):
    schema = {"type": "object", "properties": {"a": {keyword: "#a"}}}
    with pytest.raises(ConstraintError, match=re.escape(keyword)):
        matcher_of(grammars, Kind.JSON, schema)


def test_what_is_left_of_a_schema_is_enforced(model: LoadedModel, grammars: Grammars):
    item = {"type": "integer", "not": {"const": 3}}
    schema = {"type": "array", "items": item, "uniqueItems": True, "maxItems": 2}
    for text, is_right in (("[1,3]", True), ('["a"]', False), ("[1,2,3]", False)):
        assert matches(model, matcher_of(grammars, Kind.JSON, schema), text) is is_right, text


def test_of_several_tools_each_keyword_is_named_in_its_own(grammars: Grammars):
    schemas = ({"propertyNames": {"pattern": "a"}}, {}, {"not": {}, "minProperties": 1})
    tools = tuple(
        ToolSchema(f"f{i}", json.dumps({"type": "object", **schema}), f"tools[{i}].parameters")
        for i, schema in enumerate(schemas)
    )
    found = grammars.compile(CallConstraint(tools), is_thinking=False)
    assert found.left_out == ("tools[0].parameters:propertyNames", "tools[2].parameters:not")


def test_references_in_a_tools_schema_are_its_own(model: LoadedModel, grammars: Grammars):
    node = {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
        "required": ["v"],
        "additionalProperties": False,
    }
    schema = {
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/node"}},
        "required": ["n"],
        "$defs": {"node": node},
    }
    constraint = CallConstraint((ToolSchema("go", json.dumps(schema)),))
    right, wrong = {"n": {"v": 1, "next": {"v": 2}}}, {"n": {"v": 1, "next": {"v": "2"}}}
    assert matches(model, matcher_of(grammars, None, constraint), call("go", right))
    assert not matches(model, matcher_of(grammars, None, constraint), call("go", wrong))


# --- calls, or an answer that matches -----------------------------------------------------------

EITHER: list[tuple[Kind, Any, list[str], list[str]]] = [
    (Kind.JSON, GO, ['{"n": 1}', '{"n":22}'], ['{"n": "x"}', "Hello."]),
    (Kind.REGEX, "a+/b", ["a/b", "aaa/b"], ["ab", "<tool_call>"]),
    (Kind.CHOICE, ["yes", "no"], ["yes", "no"], ["maybe", "yes "]),
    (Kind.GRAMMAR, 'root ::= "<" ("a" | root)* ">"', ["<a>", "<<>a>"], ["<", "b"]),
    (Kind.GRAMMAR, 'start: "one" | N\nN: /[0-9]+/', ["one", "42"], ["two", ""]),
]


@pytest.mark.parametrize(("kind", "text", "right", "wrong"), EITHER)
def test_an_answer_is_calls_or_a_text_that_matches(
    model: LoadedModel,
    grammars: Grammars,
    kind: Kind,
    text: Any,
    right: list[str],
    wrong: list[str],
):
    answer = constraint_of(kind, text)
    assert isinstance(answer, TextConstraint)
    constraint = replace(CALLS, is_forced=False, answer=answer)
    for whole in (call(), call("stay", {}) + call(), *right):
        assert matches(model, matcher_of(grammars, None, constraint), whole), whole
    for bad in (call("go", {}), f"{right[0]}{call()}", *wrong):
        assert not matches(model, matcher_of(grammars, None, constraint), bad), bad


# Grammars whose cost is in their use: either refused, or each mask is made within the fuel, and
# what runs out of it is an error of that matcher alone.
COSTLY: dict[str, tuple[Kind, Any]] = {
    "an exponential automaton": (Kind.REGEX, "(a|b)*a(a|b){18}c"),
    "a wide window": (Kind.REGEX, "(.*a){40}.{500}"),
    "counts of counts": (Kind.REGEX, "((a{0,100}){0,100}){0,100}"),
    "alternatives": (Kind.REGEX, "(a|aa|aaa)+$"),
    "many must": (
        Kind.JSON,
        {
            "type": "object",
            "properties": {f"p{i}": {"type": "string", "minLength": i} for i in range(1000)},
            "required": [f"p{i}" for i in range(1000)],
        },
    ),
    "a long array": (Kind.JSON, {"type": "array", "minItems": 100_000}),
    "long strings": (Kind.JSON, {"type": "string", "minLength": 1_000_000}),
    "a pattern of counts": (Kind.JSON, {"type": "string", "pattern": "(a{0,1000}){0,1000}b"}),
    "ambiguous rules": (Kind.GRAMMAR, 'root ::= "a" | root root | root root root'),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_grammar_runs_within_its_bounds_or_fails_with_a_reason(
    model: LoadedModel, grammars: Grammars, name: str
):
    try:
        matcher = matcher_of(grammars, *COSTLY[name])
    except ConstraintError:
        return
    for _ in range(20):
        tokens = allowed(model, matcher)
        if (reason := matcher.error) is not None:
            assert 0 < len(reason) <= 300
            return
        assert tokens
        matcher.accept((max(tokens - model.eos_tokens or tokens),))


def test_a_refused_constraint_leaves_the_others_alone(model: LoadedModel, grammars: Grammars):
    for kind, text in REFUSED.values():
        if constraint_of(kind, text).num_chars < 1000:
            with pytest.raises(ConstraintError):
                matcher_of(grammars, kind, text)
    assert matches(model, matcher_of(grammars, Kind.REGEX, "a+"), "aa")


def test_without_llguidance_the_error_names_the_missing_extra(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    for name in ("llguidance", "llguidance.hf"):
        monkeypatch.setitem(sys.modules, name, None)
    grammars = new_grammars(model)
    with pytest.raises(ConstraintError) as caught:
        matcher_of(grammars, Kind.REGEX, "a")
    assert str(caught.value) == MISSING
    assert "pip install 'mlxlite[grammar]'" in MISSING


def test_a_budget_of_reasoning_needs_no_llguidance(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
):
    for name in ("llguidance", "llguidance.hf"):
        monkeypatch.setitem(sys.modules, name, None)
    matcher = new_grammars(model).compile(None, is_thinking=True, budget=0).matcher()
    assert allowed(model, matcher) == set(model.tokenizer.wrapper.think_end_tokens)


# --- what is kept -------------------------------------------------------------------------------


def test_a_constraint_is_compiled_once_and_the_oldest_are_forgotten(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
):
    compiled: list[str] = []
    real = Grammars._compile

    def counted(self: Grammars, constraint: Constraint) -> Any:
        compiled.append(constraint.text)
        return real(self, constraint)

    monkeypatch.setattr(Grammars, "_compile", counted)

    def ask(*numbers: int) -> list[str]:
        compiled.clear()
        for i in numbers:
            matcher_of(grammars, Kind.REGEX, f"a{i}")
        return compiled

    assert len(ask(*range(MAX_COMPILED))) == MAX_COMPILED
    assert ask(*range(MAX_COMPILED), 0) == []
    assert ask(MAX_COMPILED) == [f"a{MAX_COMPILED}"]
    assert ask(0) == [], "it was asked for last"
    assert ask(1) == ["a1"], "it was the oldest"
    assert len(grammars._compiled) == MAX_COMPILED


def test_kinds_of_one_text_are_not_mistaken_for_each_other(model: LoadedModel, grammars: Grammars):
    text = '["a"]'
    assert matches(model, matcher_of(grammars, Kind.CHOICE, text), "a")
    assert not matches(model, matcher_of(grammars, Kind.REGEX, text), '["a"]')
    assert matches(model, matcher_of(grammars, Kind.REGEX, text), '"')


def test_matchers_of_one_grammar_are_independent(model: LoadedModel, grammars: Grammars):
    grammar = grammars.compile(TextConstraint(Kind.CHOICE, '["no", "yes"]'), is_thinking=False)
    first, second = grammar.matcher(), grammar.matcher()
    assert takes(model, first, model.encode("no", add_special=False))
    assert matches(model, second, "yes")
    assert matches(model, grammar.matcher(), "no")
    first.accept(model.encode("wrong", add_special=False))
    second.accept(model.encode("wrong", add_special=False))
    assert grammar.matcher().error is None


def test_tokens_that_the_layer_has_and_the_vocabulary_has_not_are_never_allowed(model: LoadedModel):
    """The last layer may be wider than the vocabulary, and no multiple of 32."""
    wide = model.num_vocab + 45
    matcher = matcher_of(new_grammars(model, num_vocab=wide), Kind.REGEX, "(.|\n)*")
    mask = np.zeros((wide + 31) // 32, np.uint32)
    matcher.fill(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert bits[: model.num_vocab].sum() > 1000
    assert not bits[model.num_vocab :].any()


# --- anything -----------------------------------------------------------------------------------

_LEAVES = st.sampled_from(
    [None, True, False, 0, 1, -1, 0.5, 1e308, 2**70, "", "a", "string", "object", "#", "^a", "é\0"]
)
_KEYWORDS = st.sampled_from(
    [
        *("type", "properties", "required", "items", "prefixItems", "enum", "const", "$ref"),
        *("anyOf", "allOf", "oneOf", "$defs", "minimum", "maximum", "minLength", "maxLength"),
        *("pattern", "format", "multipleOf", "minItems", "maxItems", "additionalProperties"),
        *("patternProperties", "x-guidance", "$id", "$schema", "a"),
    ]
)
ANY_SCHEMA = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYWORDS, inner, max_size=4),
    max_leaves=12,
)
_PARTS = (
    "a",
    "(",
    ")",
    "[",
    "]",
    "{",
    "2",
    ",",
    "}",
    "*",
    "+",
    "?",
    "|",
    ".",
    "\\",
    "^",
    "$",
    "&",
    "~",
)
ANY_REGEX = st.lists(st.sampled_from((*_PARTS, "é", "\n", "/", "(?i)", "\\b")), min_size=1).map(
    "".join
)
_RULES = (
    "root",
    "start",
    " ::= ",
    ": ",
    '"a"',
    "/a+/",
    "|",
    "(",
    ")",
    "*",
    "\n",
    "%json ",
    "{}",
    "%",
    "<[1]>",
)
ANY_GRAMMAR = st.lists(st.sampled_from(_RULES), min_size=1).map("".join)


@given(
    st.tuples(st.just(Kind.JSON), st.dictionaries(_KEYWORDS, ANY_SCHEMA, max_size=4))
    | st.tuples(st.just(Kind.REGEX), ANY_REGEX)
    | st.tuples(st.just(Kind.GRAMMAR), ANY_GRAMMAR | st.text(min_size=1))
    | st.tuples(st.just(Kind.CHOICE), st.lists(st.text(), min_size=1)),
)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_constraint_is_compiled_and_used_or_refused_with_a_reason(
    model: LoadedModel, grammars: Grammars, asked: tuple[Kind, Any]
) -> None:
    try:
        matcher = matcher_of(grammars, *asked)
    except ConstraintError as error:
        reason = str(error)
    else:
        for _ in range(4):
            tokens = allowed(model, matcher)
            if matcher.error is not None:
                break
            assert tokens, "nothing may follow, not even the end"
            matcher.accept((min(tokens - model.eos_tokens or tokens),))
        reason = matcher.error or "none"
    assert 0 < len(reason) <= 300
    assert "\n" not in reason
