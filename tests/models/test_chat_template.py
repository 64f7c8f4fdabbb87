"""Chat messages to prompts, hostile templates, and the positions at which messages begin."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CHAT_TEMPLATE, HELLO, THINKING, complaint, edit, loaded, save_checkpoint
from tokenizers import AddedToken, Tokenizer

from mlxlite.engine.sequence import Prompt
from mlxlite.models import chat_template
from mlxlite.models.chat_template import ChatTemplate
from mlxlite.models.interface import PromptError, PromptTooLong
from mlxlite.models.load import LoadedModel


def prompt_text(model: LoadedModel, prompt: Prompt) -> str:
    """The text of a prompt, special tokens included."""
    return str(model.tokenizer.wrapper.decode(list(prompt.tokens)))


def rendered(model: LoadedModel, *messages: tuple[str, Any], **kwargs: Any) -> str:
    dicts = [{"role": role, "content": content} for role, content in messages]
    return prompt_text(model, model.render(dicts, kwargs, is_continuation=False))


def continued(model: LoadedModel, *messages: tuple[str, Any]) -> str:
    dicts = [{"role": role, "content": content} for role, content in messages]
    return prompt_text(model, model.render(dicts, {}, is_continuation=True))


# --- messages to prompts ----------------------------------------------------------------------


def test_messages_become_a_prompt_that_is_open_for_the_answer(model: LoadedModel) -> None:
    assert rendered(model, ("system", "Be brief."), ("user", "Hello")) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_continuation_leaves_the_last_turn_open(model: LoadedModel) -> None:
    text = continued(model, ("user", "Count"), ("assistant", "1, 2,"))
    assert text.endswith("<|im_start|>assistant\n1, 2,")


def test_a_continuation_may_begin_with_nothing(model: LoadedModel) -> None:
    text = continued(model, ("user", "Count"), ("assistant", ""))
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_continuation_keeps_the_space_at_its_end(model: LoadedModel) -> None:
    assert continued(model, ("user", "Count"), ("assistant", "1, ")).endswith("assistant\n1, ")


def test_a_continuation_may_repeat_an_earlier_message(model: LoadedModel) -> None:
    text = continued(model, ("user", "yes"), ("assistant", "yes"))
    assert text == "<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\nyes"


def test_text_parts_reach_the_template_unjoined(checkpoint: Path, model: LoadedModel) -> None:
    template = "{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}"
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}]
    assert rendered(loaded(checkpoint, chat_template=template), ("user", parts)) == "[Hello][you]"


def test_messages_are_left_as_they_were(model: LoadedModel) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hi"},
    ]
    before = json.dumps(messages)
    model.render(messages, {}, is_continuation=True)
    assert json.dumps(messages) == before


def test_what_a_message_lacks_is_undefined_to_the_template(checkpoint: Path) -> None:
    template = "{{ messages[0].content }}{{ messages[0].name is defined }}"
    model = loaded(checkpoint, chat_template=template)
    messages = [{"role": "user", "content": "x", "name": None}]
    assert prompt_text(model, model.render(messages, {}, is_continuation=False)) == "xFalse"


def test_a_literal_template_replaces_the_models_own(checkpoint: Path) -> None:
    model = loaded(checkpoint, chat_template="Q: {{ messages[0].content }} A:")
    assert rendered(model, ("user", "Hello")) == "Q: Hello A:"


def test_a_template_may_be_a_file(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("Frage: {{ messages[0].content }} – Antwort:", encoding="utf-8")
    model = loaded(checkpoint, chat_template=str(path))
    assert rendered(model, ("user", "Hallo")) == "Frage: Hallo – Antwort:"


def test_a_template_file_that_is_not_there_is_refused(checkpoint: Path) -> None:
    text = complaint(checkpoint, chat_template="no/such.jinja")
    assert "--chat-template no/such.jinja" in text
    assert "give a path or a template's text" in text


def test_a_template_that_can_never_work_is_refused_at_the_start(checkpoint: Path) -> None:
    text = complaint(checkpoint, chat_template="{{ messages }}\n{% if %}")
    assert "--chat-template is broken: line 2: " in text


def test_a_model_without_a_template_loads_with_a_warning_and_cannot_chat(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(copy / "tokenizer_config.json", chat_template=None)
    model = loaded(copy)
    assert not model.chat_template.exists
    assert len(caplog.messages) == 1
    with pytest.raises(PromptError, match=r"no chat template; .*--chat-template"):
        model.render(HELLO, {}, is_continuation=False)


def test_a_model_without_a_template_can_be_given_one(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(copy / "tokenizer_config.json", chat_template=None)
    model = loaded(copy, chat_template=CHAT_TEMPLATE)
    assert model.chat_template.exists
    assert rendered(model, ("user", "Hi")).startswith("<|im_start|>user\nHi")
    assert caplog.messages == []


def test_a_renderer_that_mlx_lm_has_beats_a_template(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", chat_template_type="deepseek_v32", chat_template="{{ 1 }}")
    text = rendered(loaded(copy), ("user", "Hello"))
    assert "Hello" in text
    assert text != "1"


def test_messages_that_render_to_no_text_are_refused(checkpoint: Path) -> None:
    model = loaded(checkpoint, chat_template="{{ '' }}")
    with pytest.raises(PromptError, match="empty prompt"):
        model.render(HELLO, {}, is_continuation=False)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('Roles must alternate.') }}", "Roles must alternate."),
        ("{{ nonesuch() }}", "'nonesuch' is undefined"),
        ("{{ 1 + messages[0].content }}", "unsupported operand"),
        ("{{ messages[0].content.nonesuch.more }}", "no attribute 'nonesuch'"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_template_that_raises_refuses_the_messages_with_its_reason(
    checkpoint: Path, template: str, why: str
) -> None:
    model = loaded(checkpoint, chat_template=template)
    with pytest.raises(PromptError, match=re.escape(why)) as caught:
        model.render(HELLO, {}, is_continuation=False)
    assert "the chat template refused the messages: " in str(caught.value)


def test_half_a_character_is_refused(model: LoadedModel) -> None:
    with pytest.raises(PromptError, match="surrogate"):
        model.render([{"role": "user", "content": "a\ud800b"}], {}, is_continuation=False)


@pytest.mark.parametrize(
    "content",
    [
        "x" * 50_000_000,
        [{"type": "text", "text": "x" * 25_000_000}] * 2,
        [{"type": "text", "text": "x"}, {"type": "text", "text": "x" * 50_000_000}],
    ],
    ids=["text", "parts", "one of two"],
)
def test_messages_that_cannot_fit_are_refused_before_they_are_rendered(
    model: LoadedModel, content: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatTemplate, "_apply", None)
    with pytest.raises(PromptTooLong):
        rendered(model, ("user", content))


def test_no_messages_are_refused(model: LoadedModel) -> None:
    with pytest.raises(PromptError, match="at least one message"):
        model.render([], {}, is_continuation=False)


@pytest.mark.parametrize("is_from_checkpoint", [True, False])
@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['json'].codecs.open('/etc/passwd').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ ('' | attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% for _ in range(10 ** 9) %}x{% endfor %}",
    ],
)
def test_a_hostile_template_cannot_leave_the_sandbox(
    copy: Path, escape: str, is_from_checkpoint: bool
) -> None:
    if is_from_checkpoint:
        edit(copy / "tokenizer_config.json", chat_template=escape)
    model = loaded(copy, **({} if is_from_checkpoint else {"chat_template": escape}))
    with pytest.raises(PromptError):
        model.render(HELLO, {}, is_continuation=False)


# --- template arguments -----------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, THINKING])
def test_thinking_is_undefined_until_the_request_defines_it(
    thinker: Path, template: str | None
) -> None:
    model = loaded(thinker, chat_template=template)
    assert model.tokenizer.wrapper.has_thinking
    assert rendered(model, ("user", "x")) == "[silent]x"
    assert rendered(model, ("user", "x"), enable_thinking=True) == "[True]x"
    assert rendered(model, ("user", "x"), enable_thinking=False) == "[False]x"


def test_a_prompt_that_ends_inside_reasoning_is_marked_so(thinker: Path) -> None:
    template = "{{ messages[0].content }}"
    model = loaded(thinker, chat_template=template)

    def is_thinking(content: str) -> bool:
        messages = [{"role": "user", "content": content}]
        return model.render(messages, {}, is_continuation=False).starts_in_reasoning

    assert is_thinking("x<think>")
    assert is_thinking("x<think>\n")
    assert not is_thinking("x")
    assert not is_thinking("x<think>y</think>")


def test_arguments_of_the_request_reach_the_template(checkpoint: Path) -> None:
    template = "{{ messages[0].content }} {{ mood.of }} {{ tools | length }}"
    model = loaded(checkpoint, chat_template=template)
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert rendered(model, ("user", "x"), mood={"of": "joy"}, tools=tools) == "x joy 1"


@pytest.mark.parametrize(
    "name",
    [
        "chat_template",
        "messages",
        "conversation",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "self",
    ],
)
def test_a_request_cannot_bring_a_template_or_steer_the_renderer(
    model: LoadedModel, name: str
) -> None:
    with pytest.raises(PromptError, match=f"may not set the template argument '{name}'"):
        model.render(HELLO, {name: "{{ 7 * 6 }}", "mood": "joy"}, is_continuation=False)


# --- threads ----------------------------------------------------------------------------------


def test_eight_threads_may_render_at_once(copy: Path) -> None:
    """With a tokenizer that is saved with truncation and padding: transformers resets them in use.

    Both would spoil a prompt, and the reset is what other threads have been seen to trip over.
    """
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tokenizer["padding"] = {
        "strategy": {"Fixed": 999},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = loaded(copy)
    barrier = threading.Barrier(8)
    results: list[set[Prompt] | BaseException] = []

    def render_often() -> None:
        prompts = set()
        barrier.wait()
        try:
            for _ in range(50):
                prompts.add(model.render(HELLO * 10, {}, is_continuation=False))
        except BaseException as error:
            results.append(error)
        else:
            results.append(prompts)

    threads = [threading.Thread(target=render_often) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{model.render(HELLO * 10, {}, is_continuation=False)}] * 8
    assert 8 < len(model.render(HELLO * 10, {}, is_continuation=False).tokens) < 999


# --- templates that do not end ----------------------------------------------------------------

SPIN = "{% set r = range(9999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}"
SPIN += "{% endfor %}{% endfor %}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "TEMPLATE_TIMEOUT_S", 1.0)  # a busy machine renders in less


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("template", "why"),
    [
        (SPIN, "did not end"),
        ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% for x in [1] recursive %}{{ loop([x]) }}{% endfor %}", "recursion"),
        ("{{ 'x' * 10**15 }}", "MemoryError"),
        ("{{ '%1000000000000000d' | format(1) }}", "MemoryError"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "unsafe"),
        ("{{ messages[0]['__class__'].mro() }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
    ],
)
def test_a_hostile_template_is_refused_in_bounded_time(
    checkpoint: Path, template: str, why: str
) -> None:
    model = loaded(checkpoint, chat_template=template)
    with pytest.raises(PromptError, match=why):
        model.render([{"role": "user", "content": "x"}], {}, is_continuation=False)


def test_a_template_that_makes_too_much_text_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED", 1000)
    template = "{% for i in range(n) %}x{% endfor %}"
    model = loaded(checkpoint, chat_template=template)
    model.render([{"role": "user", "content": "x"}], {"n": 1000}, is_continuation=False)
    with pytest.raises(PromptError, match="made 1001 characters of the messages"):
        model.render([{"role": "user", "content": "x"}], {"n": 1001}, is_continuation=False)


# --- where messages begin ---------------------------------------------------------------------
# Each family is a real template cut down to its turns, over a tokenizer with its special tokens.
# The expected places are found in the text: a message starts at the token that begins its piece.

LLAMA3 = (
    "<|begin_of_text|>{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DEEPSEEK = (
    "<|begin|>{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# template, its special tokens, the one that ends an answer
FAMILIES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "chatml": (CHAT_TEMPLATE, (), "<|im_end|>"),
    "llama3": (
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    "gemma": (GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "deepseek": (DEEPSEEK, ("<|begin|>", "<|User|>", "<|Assistant|>", "<|end|>"), "<|end|>"),
    "harmony": (HARMONY, ("<|start|>", "<|message|>", "<|end|>"), "<|end|>"),
    "plain": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
        (),
        "<|im_end|>",
    ),
}
TALK = (
    ("system", "Be brief."),
    ("user", "Hello, how are you?"),
    ("assistant", "A stream of tokens"),
    ("user", "日本語 🙂?"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    made = {}
    for name, (template, specials, eos) in FAMILIES.items():
        path = save_checkpoint(tmp_path_factory.mktemp("models") / name, vocab_size=340)
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
        tokenizer.save(str(path / "tokenizer.json"))
        settings = json.loads((path / "tokenizer_config.json").read_text())
        settings |= {"eos_token": eos, "chat_template": template}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        made[name] = loaded(path)
    return made


def message_starts(
    model: LoadedModel, *talk: tuple[str, str], is_continuation: bool = False
) -> tuple[int, ...]:
    """The positions that `render` finds; each one is between the first token and the last."""
    prompt = model.render(dicts(talk), {}, is_continuation=is_continuation)
    assert list(prompt.message_starts) == sorted(set(prompt.message_starts))
    assert all(0 < start < len(prompt.tokens) for start in prompt.message_starts)
    return prompt.message_starts


def dicts(talk: tuple[tuple[str, str], ...]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in talk]


def places(model: LoadedModel, *pieces: str) -> tuple[int, ...]:
    """Where each piece of a prompt begins, by counting the tokens of those before it."""
    ends, text = [], ""
    for piece in pieces:
        ends.append(len(model.tokenizer.wrapper.encode(text, add_special_tokens=False)))
        text += piece
    return tuple(end for end in ends if end)


def test_chatml_messages_begin_at_im_start(models: dict[str, LoadedModel]) -> None:
    model = models["chatml"]
    turns = [f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in TALK]
    assert message_starts(model, *TALK) == places(model, *turns, "<|im_start|>assistant\n")
    open_end = "<|im_start|>assistant\nA stream"
    talk = (*TALK[:2], ("assistant", "A stream"))
    assert message_starts(model, *talk, is_continuation=True) == places(model, *turns[:2], open_end)


def test_llama3_messages_begin_at_their_headers(models: dict[str, LoadedModel]) -> None:
    model = models["llama3"]
    turns = [
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
        for role, content in TALK
    ]
    opening = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert message_starts(model, *TALK) == places(model, "<|begin_of_text|>", *turns, opening)


def test_gemma_messages_begin_at_their_turns(models: dict[str, LoadedModel]) -> None:
    model = models["gemma"]
    turns = [
        f"<start_of_turn>{role.replace('assistant', 'model')}\n{content}<end_of_turn>\n"
        for role, content in TALK
    ]
    assert message_starts(model, *TALK) == places(model, "<bos>", *turns, "<start_of_turn>model\n")


def test_harmony_messages_begin_at_their_start(models: dict[str, LoadedModel]) -> None:
    model = models["harmony"]
    turns = [f"<|start|>{role}<|message|>{content}<|end|>" for role, content in TALK]
    assert message_starts(model, *TALK) == places(model, *turns, "<|start|>assistant")


def test_a_single_deepseek_turn_begins_at_each_of_its_marks(models: dict[str, LoadedModel]) -> None:
    """No mark is repeated, so each of them may be one."""
    model = models["deepseek"]
    expected = places(model, "<|begin|>Be brief.", "<|User|>Hello, how are you?", "<|Assistant|>")
    assert message_starts(model, *TALK[:2]) == expected
    assert message_starts(model, TALK[1]) == places(
        model, "<|begin|>", "<|User|>Hello, how are you?", "<|Assistant|>"
    )


def test_several_deepseek_turns_begin_at_their_users(models: dict[str, LoadedModel]) -> None:
    """The mark that is repeated first; between two of them are a question and its answer."""
    model = models["deepseek"]
    expected = places(
        model,
        "<|begin|>Be brief.",
        "<|User|>Hello, how are you?<|Assistant|>A stream of tokens<|end|>",
        "<|User|>日本語 🙂?<|Assistant|>",
    )
    assert message_starts(model, *TALK) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_a_longer_talk_keeps_the_message_starts_of_the_shorter_one(
    models: dict[str, LoadedModel], name: str
) -> None:
    """So what was cached at a message start for one turn is found in the next one."""
    short, long = (message_starts(models[name], *talk) for talk in (TALK, (*TALK, *TALK[2:])))
    assert long[: len(short)] == short


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "harmony"])
def test_a_first_turn_has_the_message_starts_of_the_second(
    models: dict[str, LoadedModel], name: str
) -> None:
    first, second = (message_starts(models[name], *talk) for talk in (TALK[:2], TALK))
    assert second[: len(first)] == first


def test_the_end_of_an_answer_is_no_message_start_where_it_occurs_again(
    models: dict[str, LoadedModel],
) -> None:
    model = models["gemma"]
    (end,) = model.tokenizer.wrapper.encode("<end_of_turn>", add_special_tokens=False)
    prompt = model.render(dicts(TALK), {}, is_continuation=False)
    assert end in prompt.tokens
    assert end not in {prompt.tokens[start] for start in prompt.message_starts}


def test_a_prompt_without_special_tokens_has_no_message_starts(
    models: dict[str, LoadedModel],
) -> None:
    assert message_starts(models["plain"], *TALK) == ()


def test_the_first_token_is_no_message_start_for_nothing_is_before_it(
    models: dict[str, LoadedModel],
) -> None:
    talk = (("user", "Hello"), ("assistant", "Hi"))
    assert len(message_starts(models["chatml"], *talk, is_continuation=True)) == 1
