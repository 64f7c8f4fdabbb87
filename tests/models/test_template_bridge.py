"""Conversations that templates refuse or cut, under the grammars of published templates.

`tests/support/templates` has short ones with the rules of their families: which roles, in which
order, with which ids and arguments.
"""

import json
import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import pytest
from checkpoints import edit, loaded, save_checkpoint
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlxlite.models import chat_template
from mlxlite.models.chat_template import ChatTemplate
from mlxlite.models.interface import PromptError
from mlxlite.models.load import LoadedModel
from mlxlite.models.template_bridge import IDS as SHORT_IDS
from mlxlite.output.tool_arguments import new_call_id

TEMPLATES = Path(__file__).parents[1] / "support" / "templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if "tool_use" not in path.stem)
NAMED = "command_r with tools"
Messages = list[dict[str, Any]]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = save_checkpoint(tmp_path_factory.mktemp("models") / "bridged")
    return loaded(edit(path / "tokenizer_config.json", bos_token="<|endoftext|>"))


@pytest.fixture(scope="module", params=[*NAMES, NAMED])
def template(
    request: pytest.FixtureRequest, model: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> ChatTemplate:
    if request.param != NAMED:
        return template_of(model, request.param)
    path = save_checkpoint(tmp_path_factory.mktemp("models") / "named")
    named = {"default": "command_r", "tool_use": "command_r_tool_use"}
    listed = [{"name": name, "template": text_of(stem)} for name, stem in named.items()]
    edit(path / "tokenizer_config.json", bos_token="<|endoftext|>", chat_template=listed)
    return loaded(path).chat_template


def text_of(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def template_of(model: LoadedModel, name: str) -> ChatTemplate:
    return ChatTemplate(model.tokenizer, text_of(name))


def rendered(
    template: ChatTemplate, messages: Messages, *, is_continuation: bool = False, **kwargs: Any
) -> str:
    prompt = template.render(messages, kwargs, is_continuation=is_continuation)
    return str(template.tokenizer.wrapper.decode(list(prompt.tokens)))


def as_it_is(
    template: ChatTemplate, messages: Messages, *, is_continuation: bool = False, **kwargs: Any
) -> str | None:
    """The template's own text; None where it refuses the messages."""
    if template.source is not None:
        kwargs["chat_template"] = template.source
    try:
        text = template.tokenizer.own.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=not is_continuation,
            continue_final_message=is_continuation,
            **kwargs,
        )
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError):
        return None
    return str(text)


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def called(*calls: tuple[str, Any], text: str = "", **fields: Any) -> dict[str, Any]:
    functions = [{"name": f"look{i}", "arguments": calls[i][1]} for i in range(len(calls))]
    made = [
        {"id": id, "type": "function", "function": function}
        for (id, _), function in zip(calls, functions, strict=True)
    ]
    return {**answer(text), "tool_calls": made, **fields}


def result(text: Any, id: str | None) -> dict[str, Any]:
    message = {"role": "tool", "content": text}
    return message if id is None else {**message, "tool_call_id": id}


# --- any conversation -------------------------------------------------------------------------

CALL_IDS = st.sampled_from(
    ["", "call_1", "call_2", "abc123XYZ", "toolu_0123456789abcdef", "functions.f:0"]
)
ARGUMENTS = st.sampled_from(
    [{}, {"k": "v"}, {"k": [1, None]}, '{"k": "v"', "[1, 2]", '"{\\"k\\": 1}"', "plain", None, 5]
)


@st.composite
def conversations(draw: st.DrawFn) -> Messages:
    """Messages as the dialects give them to a template; every text has its own number."""
    roles = draw(st.text("sssuuuuaaacccttt", min_size=1, max_size=8))
    messages: Messages = []
    for i, role in enumerate(roles):
        text = draw(st.sampled_from(["", f"word{i}.", f"word{i}.", f"word{i}.\nand more\n"]))
        match role:
            case "s":
                messages.append(system(text))
            case "u":
                messages.append(user(text))
            case "a":
                messages.append(answer(text))
            case "t":
                messages.append(result(text, draw(CALL_IDS | st.none())))
            case _:
                calls = draw(st.lists(st.tuples(CALL_IDS, ARGUMENTS), min_size=1, max_size=3))
                thought = draw(st.sampled_from([{}, {"reasoning_content": "hm"}]))
                messages.append(called(*calls, text=text, **thought))
    return messages


def texts_of(messages: Messages, *roles: str) -> Iterator[str]:
    for message in messages:
        if message["role"] in roles and message["content"].strip():
            yield message["content"].strip()


def assert_in_order(texts: Iterator[str], prompt: str) -> None:
    at = 0
    for text in texts:
        found = prompt.find(text, at)
        assert found >= 0, (text, prompt)
        at = found + len(text)


def arguments_for(template: ChatTemplate) -> dict[str, Any]:
    return {"tools": TOOLS} if template.source is None else {}


@given(messages=conversations(), is_continuation=st.booleans())
@settings(max_examples=40, deadline=None)
@example(messages=[answer("")], is_continuation=True)
@example(messages=[system("word0.")], is_continuation=False)
@example(messages=[called(("", "x")), user("word1."), result("", None)], is_continuation=False)
def test_no_conversation_is_refused_and_every_question_is_in_the_prompt(
    template: ChatTemplate, messages: Messages, is_continuation: bool
) -> None:
    last = messages[-1]
    is_continuation &= last["role"] == "assistant" and "tool_calls" not in last
    before = json.dumps(messages)
    kwargs = arguments_for(template)
    prompt = rendered(template, messages, is_continuation=is_continuation, **kwargs)
    assert_in_order(texts_of(messages, "user"), prompt)
    assert json.dumps(messages) == before


def has_words(messages: Messages) -> bool:
    """Whether nothing is blank, and all arguments are objects."""
    calls = (call for message in messages for call in message.get("tool_calls", ()))
    return all(isinstance(call["function"]["arguments"], dict) for call in calls) and all(
        message["content"] or "tool_calls" in message for message in messages
    )


def is_whole(messages: Messages, prompt: str) -> bool:
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    is_written = all(call["function"]["name"] in prompt for call in calls)
    roles = ("system", "user", "assistant", "tool")
    return is_written and all(text in prompt for text in texts_of(messages, *roles))


@given(messages=conversations().filter(has_words))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_what_a_template_takes_as_it_is_stays_as_it_is(
    template: ChatTemplate, messages: Messages
) -> None:
    kwargs = arguments_for(template)
    own = as_it_is(template, messages, **kwargs)
    if own is not None and is_whole(messages, own):
        assert rendered(template, messages, **kwargs) == own


# --- kinds of fault ---------------------------------------------------------------------------

TALK = [system("A"), user("B"), answer("C"), system("D"), user("E")]
TWO_SYSTEMS = [system("A"), system("B"), user("C")]


def test_systems_are_joined_and_late_ones_move_into_the_users_turn(model: LoadedModel) -> None:
    qwen = template_of(model, "qwen35")
    end = "<|im_start|>assistant\n<think>\n"
    assert rendered(qwen, TWO_SYSTEMS) == (
        f"<|im_start|>system\nA\n\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n{end}"
    )
    assert rendered(qwen, TALK) == (
        "<|im_start|>system\nA<|im_end|>\n<|im_start|>user\nB<|im_end|>\n"
        f"<|im_start|>assistant\nC<|im_end|>\n<|im_start|>user\nD\n\nE<|im_end|>\n{end}"
    )


def test_without_a_system_role_its_messages_begin_the_users_turns(model: LoadedModel) -> None:
    assert rendered(template_of(model, "gemma2"), [*TALK, user("F")]) == (
        "<|endoftext|><start_of_turn>user\nA\n\nB<end_of_turn>\n<start_of_turn>model\n"
        "C<end_of_turn>\n<start_of_turn>user\nD\n\nE\n\nF<end_of_turn>\n<start_of_turn>model\n"
    )


def test_an_answer_that_comes_first_is_behind_an_empty_turn(model: LoadedModel) -> None:
    assert rendered(template_of(model, "gemma3"), [answer("A"), user("B")]) == (
        "<|endoftext|><start_of_turn>user\n<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n"
        "<start_of_turn>user\nB<end_of_turn>\n<start_of_turn>model\n"
    )


def test_foreign_ids_have_nine_characters_and_results_find_their_calls(model: LoadedModel) -> None:
    talk = [user("A"), called(("toolu_01", {}), ("x", {})), result("B", "x"), result("C", None)]
    for name in ("mistral_v3", "mistral_v7"):
        first = rendered(template_of(model, name), talk)
        ids = [id for id in map(_short, ("toolu_01", "x")) if first.count(id) == 2]
        assert len(ids) == 2
        assert rendered(template_of(model, name), talk) == first


def _short(id: str) -> str:
    (message,) = SHORT_IDS.apply([result("", id)])
    assert len(message["tool_call_id"]) == 9
    assert message["tool_call_id"].isalnum()
    return str(message["tool_call_id"])


@pytest.mark.parametrize("id", ["abcDEF123", "000000000"])
def test_an_id_of_nine_letters_and_digits_stays(model: LoadedModel, id: str) -> None:
    assert _short(id) == id


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_this_server_come_back_in_every_template(model: LoadedModel, name: str) -> None:
    id = new_call_id()
    talk = [user("A"), called((id, {"k": "value"})), result("B", id), answer("C"), user("D")]
    prompt = rendered(template_of(model, name), talk)
    assert_in_order(iter(("A", "look0", "value", "B", "C", "D")), prompt)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"k": "v"', ("input", '{"k": "v"')),
        ([1, 2], ("input", "[1, 2]")),
        ("plain", ("input", "plain")),
        ('"{\\"k\\": 1}"', ("k", "1")),
        ({"k": "v"}, ("k", "v")),
    ],
)
def test_arguments_that_are_no_object_reach_the_template_as_one(
    model: LoadedModel, arguments: Any, shown: tuple[str, str]
) -> None:
    talk = [user("A"), called(("c", arguments))]
    assert "<arg_key>{}</arg_key>\n<arg_value>{}</arg_value>".format(*shown) in rendered(
        template_of(model, "glm4"), talk
    )
    assert "<parameter={}>\n{}\n</parameter>".format(*shown) in rendered(
        template_of(model, "qwen35"), talk
    )


def test_a_template_that_joins_arguments_to_its_text_gets_their_json(model: LoadedModel) -> None:
    talk = [user("A"), called(("c", {"k": "ä"})), result("B", "c")]
    assert '```json\n{"k": "ä"}\n```' in rendered(template_of(model, "deepseek_v3"), talk)


def test_calls_at_once_follow_one_another_where_one_is_allowed(model: LoadedModel) -> None:
    talk = [
        user("A"),
        called(("1", {"k": "B"}), ("2", {"k": "C"})),
        result("c", "2"),
        result("b", "1"),
    ]
    for name in ("llama31", "gpt_oss"):
        assert_in_order(iter(('"C"', "c", '"B"', "b")), rendered(template_of(model, name), talk))


def test_without_a_tool_role_calls_are_text_and_results_questions(model: LoadedModel) -> None:
    talk = [user("A"), called(("1", {"k": "v"}), text="B"), result("C", "1")]
    assert rendered(template_of(model, "phi3"), talk) == (
        "<|user|>\nA<|end|>\n<|assistant|>\nB\n\n"
        '{"name": "look0", "arguments": {"k": "v"}}<|end|>\n'
        "<|user|>\nC<|end|>\n<|assistant|>\n"
    )


def test_pictures_keep_their_places_where_turns_are_joined(model: LoadedModel) -> None:
    def picture(text: str) -> list[dict[str, Any]]:
        return [{"type": "image"}, {"type": "text", "text": text}]

    talk = [system("A"), system("B"), user(picture("C")), user("D"), user(picture("E"))]
    text = rendered(template_of(model, "mistral_v7"), talk)
    assert "[INST][IMG]C\n\nD[IMG]E[/INST]" in text
    assert "[SYSTEM_PROMPT]A\n\nB[/SYSTEM_PROMPT]" in text


def test_pictures_of_tools_are_in_users_turns_where_results_are_text(model: LoadedModel) -> None:
    """The reader is never asked here: only its presence counts."""
    picture = [{"type": "text", "text": "B"}, {"type": "image"}, {"type": "text", "text": "C"}]
    talk = [user("A"), called(("1", {})), result(picture, "1"), answer("D"), user("E")]
    reader: Any = object()
    for name, shown in (
        ("mistral_v7", ("[INST]A", "B\nC[/TOOL_RESULTS]", "[INST][IMG]", "D", "[INST]E")),
        ("qwen35", ("A", "B<|vision_start|><|image_pad|><|vision_end|>C", "D", "E")),
    ):
        template = ChatTemplate(model.tokenizer, text_of(name), image_reader=reader)
        prompt = rendered(template, talk)
        assert prompt.count("[IMG]") + prompt.count("<|image_pad|>") == 1
        assert_in_order(iter(shown), prompt)


# --- the last message -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_last_answer_is_not_continued(model: LoadedModel, name: str, blank: str) -> None:
    template = template_of(model, name)
    talk = [user("A"), answer(blank)]
    assert rendered(template, talk, is_continuation=True) == rendered(template, talk[:1])


@pytest.mark.parametrize("talk", [TALK, TWO_SYSTEMS, [answer("A"), user("B")], [user("A")]])
@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_continued_behind_any_conversation(
    model: LoadedModel, name: str, talk: Messages
) -> None:
    template = template_of(model, name)
    assert rendered(template, [*talk, answer("1, 2,")], is_continuation=True).endswith("1, 2,")


def test_a_template_that_takes_no_answer_last_begins_it(model: LoadedModel) -> None:
    source = (
        "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    )
    template = ChatTemplate(model.tokenizer, source)
    assert rendered(template, [user("A"), answer("B")], is_continuation=True) == "<user>A<answer>B"


# --- prefixes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("between", ["", "s", "ss", "u"])
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_the_beginning_of_the_next_one_wherever_it_was(
    model: LoadedModel, name: str, between: str
) -> None:
    template = template_of(model, name)

    def talks(extra: str) -> list[Messages]:
        letters = "u" + f"a{extra}u" * 3
        made = {"u": user, "a": answer, "s": system}
        talk = [made[letter](f"word{i}") for i, letter in enumerate(letters)]
        ends = [i + 1 for i, letter in enumerate(letters[:-1]) if letters[i + 1] == "a"]
        return [talk[:end] for end in (*ends, len(talk))]

    def is_growing(texts: list[Any]) -> bool:
        return all(text.startswith(start) for start, text in pairwise(texts))

    own = [as_it_is(template, talk) for talk in talks(between)]
    if None in own:
        own = [as_it_is(template, talk) for talk in talks("")]
    assert is_growing([rendered(template, talk) for talk in talks(between)]) == is_growing(own)


# --- probes -----------------------------------------------------------------------------------


def test_what_is_bridged_is_one_line_in_the_log(
    model: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlxlite.model")
    template_of(model, "qwen3").check()
    assert caplog.messages == []
    template = template_of(model, "gemma2")
    template.check()
    assert len(caplog.messages) == 1
    assert "system messages in user turns" in caplog.messages[0]
    rendered(template, TALK)
    assert len(caplog.messages) == 1


def test_a_template_that_never_ends_is_not_probed_for_long(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chat_template, "PROBE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(chat_template, "TEMPLATE_TIMEOUT_S", 0.2)
    loop = "{% set r = range(9999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"
    ChatTemplate(model.tokenizer, loop).check()
    assert "the probes of the chat template were stopped after 0.2 s" in caplog.messages


def test_a_template_that_refuses_everything_keeps_its_reason(model: LoadedModel) -> None:
    template = ChatTemplate(model.tokenizer, "{{ raise_exception('never ' ~ messages[0].role) }}")
    template.check()
    with pytest.raises(PromptError, match="refused the messages: never system"):
        template.render(TALK, {}, is_continuation=False)


def test_a_template_of_one_question_gets_all_as_one(model: LoadedModel) -> None:
    source = (
        "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}"
        "{{ messages[0].role }}:{{ messages[0].content }}"
    )
    assert rendered(ChatTemplate(model.tokenizer, source), TALK) == "user:A\n\nB\n\nC\n\nD\n\nE"


def test_content_is_in_parts_where_a_template_reads_no_strings(model: LoadedModel) -> None:
    parts = "{% for part in m.content %}[{{ part.text }}]{% endfor %}"
    template = ChatTemplate(model.tokenizer, f"{{% for m in messages %}}{parts}{{% endfor %}}")
    assert rendered(template, [user("A"), answer("B"), user("C")]) == "[A][B][C]"


# --- named templates and sidecars -------------------------------------------------------------

LISTED = [
    {"name": name, "template": "{{ messages[0].content }} " + name}
    for name in ("default", "tool_use", "rag")
]
NAMED_DICT = {entry["name"]: entry["template"] for entry in LISTED}


@pytest.mark.parametrize("given", [LISTED, NAMED_DICT])
@pytest.mark.parametrize("sidecar", ["tokenizer_config.json", "chat_template.json"])
def test_chats_with_tools_have_a_template_of_their_own(
    tmp_path: Path, given: Any, sidecar: str
) -> None:
    path = save_checkpoint(tmp_path / "model")
    edit(path / "tokenizer_config.json", chat_template=None)
    template = loaded(edit(path / sidecar, chat_template=given)).chat_template
    assert rendered(template, [user("A")]) == "A default"
    assert rendered(template, [user("A")], tools=TOOLS) == "A tool_use"


def test_a_template_alone_may_have_any_name(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model")
    edit(path / "tokenizer_config.json", chat_template={"tool_use": "{{ messages[0].content }}!"})
    assert rendered(loaded(path).chat_template, [user("A")]) == "A!"


def test_a_template_may_be_in_a_file_beside_the_tokenizer(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model")
    edit(path / "tokenizer_config.json", chat_template=None)
    edit(path / "chat_template.json", chat_template="{{ messages[0].content }} json")
    assert rendered(loaded(path).chat_template, [user("A")]) == "A json"
    (path / "chat_template.jinja").write_text("{{ messages[0].content }} jinja")
    assert rendered(loaded(path).chat_template, [user("A")]) == "A jinja"


@pytest.mark.parametrize("default", ["tokenizer_config.json", "chat_template.json"])
def test_additional_templates_join_the_default_one(tmp_path: Path, default: str) -> None:
    path = save_checkpoint(tmp_path / "model")
    edit(path / "tokenizer_config.json", chat_template=None)
    edit(path / default, chat_template="{{ messages[0].content }} default")
    (path / "additional_chat_templates").mkdir()
    more = path / "additional_chat_templates" / "tool_use.jinja"
    more.write_text("{{ messages[0].content }} {{ tools | length }} tool")
    template = loaded(path).chat_template
    assert rendered(template, [user("A")]) == "A default"
    assert rendered(template, [user("A")], tools=TOOLS) == "A 1 tool"
