"""Where `Model.render` says that messages begin, for the ways in which templates begin them.

Each family is a real template cut down to its turns, over a tokenizer that has its special tokens.
The expected places are found in the text: a head is the token at which such a piece begins.
"""

import json
from typing import Any

import pytest
from checkpoints import CHAT_TEMPLATE, save_checkpoint
from tokenizers import AddedToken, Tokenizer

from mlxlite.config.options import Config
from mlxlite.models.load import Model, load

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
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    made = {}
    for name, (template, specials, eos) in FAMILIES.items():
        path = save_checkpoint(tmp_path_factory.mktemp("heads") / name, vocab_size=340)
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
        tokenizer.save(str(path / "tokenizer.json"))
        settings = json.loads((path / "tokenizer_config.json").read_text())
        settings |= {"eos_token": eos, "chat_template": template}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        made[name] = load(Config(model=str(path)))
    return made


def heads(model: Model, *talk: tuple[str, str], is_continuation: bool = False) -> tuple[int, ...]:
    """The places that `render` tells; each one is between the first token and the last."""
    prompt = model.render(dicts(talk), {}, is_continuation=is_continuation)
    assert list(prompt.heads) == sorted(set(prompt.heads))
    assert all(0 < head < len(prompt.tokens) for head in prompt.heads)
    return prompt.heads


def dicts(talk: tuple[tuple[str, str], ...]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in talk]


def places(model: Model, *pieces: str) -> tuple[int, ...]:
    """Where each piece of a prompt begins, by counting the tokens of those before it."""
    ends, text = [], ""
    for piece in pieces:
        ends.append(len(model.tokenizer.encode(text, add_special_tokens=False)))
        text += piece
    return tuple(end for end in ends if end)


def test_chatml_messages_begin_at_im_start(models: dict[str, Model]) -> None:
    model = models["chatml"]
    turns = [f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in TALK]
    assert heads(model, *TALK) == places(model, *turns, "<|im_start|>assistant\n")
    open_end = "<|im_start|>assistant\nA stream"
    talk = (*TALK[:2], ("assistant", "A stream"))
    assert heads(model, *talk, is_continuation=True) == places(model, *turns[:2], open_end)


def test_llama3_messages_begin_at_their_headers(models: dict[str, Model]) -> None:
    model = models["llama3"]
    turns = [
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"
        for role, content in TALK
    ]
    opening = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert heads(model, *TALK) == places(model, "<|begin_of_text|>", *turns, opening)


def test_gemma_messages_begin_at_their_turns(models: dict[str, Model]) -> None:
    model = models["gemma"]
    turns = [
        f"<start_of_turn>{role.replace('assistant', 'model')}\n{content}<end_of_turn>\n"
        for role, content in TALK
    ]
    assert heads(model, *TALK) == places(model, "<bos>", *turns, "<start_of_turn>model\n")


def test_harmony_messages_begin_at_their_start(models: dict[str, Model]) -> None:
    model = models["harmony"]
    turns = [f"<|start|>{role}<|message|>{content}<|end|>" for role, content in TALK]
    assert heads(model, *TALK) == places(model, *turns, "<|start|>assistant")


def test_a_single_deepseek_turn_begins_at_each_of_its_marks(models: dict[str, Model]) -> None:
    """No mark comes again, so each of them may be one."""
    model = models["deepseek"]
    expected = places(model, "<|begin|>Be brief.", "<|User|>Hello, how are you?", "<|Assistant|>")
    assert heads(model, *TALK[:2]) == expected
    assert heads(model, TALK[1]) == places(
        model, "<|begin|>", "<|User|>Hello, how are you?", "<|Assistant|>"
    )


def test_several_deepseek_turns_begin_at_their_users(models: dict[str, Model]) -> None:
    """The mark that comes again first; what lies between two of them is question and answer."""
    model = models["deepseek"]
    expected = places(
        model,
        "<|begin|>Be brief.",
        "<|User|>Hello, how are you?<|Assistant|>A stream of tokens<|end|>",
        "<|User|>日本語 🙂?<|Assistant|>",
    )
    assert heads(model, *TALK) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_a_longer_talk_keeps_the_heads_of_the_shorter_one(
    models: dict[str, Model], name: str
) -> None:
    """So what was kept at a head for one turn is found in the next one."""
    short, long = (heads(models[name], *talk) for talk in (TALK, (*TALK, *TALK[2:])))
    assert long[: len(short)] == short


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "harmony"])
def test_a_first_turn_has_the_heads_of_the_second(models: dict[str, Model], name: str) -> None:
    first, second = (heads(models[name], *talk) for talk in (TALK[:2], TALK))
    assert second[: len(first)] == first


def test_the_end_of_an_answer_is_no_head_where_it_comes_again(models: dict[str, Model]) -> None:
    model = models["gemma"]
    (end,) = model.tokenizer.encode("<end_of_turn>", add_special_tokens=False)
    prompt = model.render(dicts(TALK), {}, is_continuation=False)
    assert end in prompt.tokens
    assert end not in {prompt.tokens[head] for head in prompt.heads}


def test_a_prompt_without_special_tokens_has_no_heads(models: dict[str, Model]) -> None:
    assert heads(models["plain"], *TALK) == ()


def test_the_first_token_is_no_head_for_nothing_is_before_it(models: dict[str, Model]) -> None:
    talk = (("user", "Hello"), ("assistant", "Hi"))
    assert len(heads(models["chatml"], *talk, is_continuation=True)) == 1
