"""Fields of vLLM's and llama-server's dialects over HTTP, and llama-server's `/infill`.

Around a scripted runner that repeats the characters of its prompt.
"""

import json
from typing import Any

import pytest
from helpers import ENDLESS, EOS, MARKERS, FakeModel, Wire, chat_body, in_a_loop, serving
from server_cases import CHAT, COMPLETIONS, ids, stream

from mlxlite.models.interface import FillMarks

MARKS = FillMarks(ord("<"), ord("|"), ord(">"), frozenset({ord("!")}), ord("#"), ord("@"))


async def complete(wire: Wire, prompt: Any, **fields: Any) -> Any:
    answer = await wire.post(COMPLETIONS, {"prompt": prompt, **fields})
    assert answer.status == 200, answer.body
    return answer.json


async def first(wire: Wire, prompt: Any, **fields: Any) -> Any:
    return (await complete(wire, prompt, **fields))["choices"][0]


@in_a_loop
async def test_the_stop_string_is_a_part_of_the_text_where_it_is_asked_for() -> None:
    async with serving() as served, await served.wire() as wire:
        assert (await first(wire, "hello", stop="ll"))["text"] == "he"
        choice = await first(wire, "hello", stop="ll", include_stop_str_in_output=True)
        assert (choice["text"], choice["stop_reason"]) == ("hell", "ll")
        chunks = await stream(
            wire, COMPLETIONS, {"prompt": "hello", "stop": "ll", "include_stop_str_in_output": True}
        )
        assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == "hell"


@in_a_loop
async def test_a_stop_token_of_the_request_is_its_stop_reason() -> None:
    async with serving() as served, await served.wire() as wire:
        assert (await first(wire, "hello", stop_token_ids=ids("o")))["stop_reason"] == ord("o")
        assert (await first(wire, "hello"))["stop_reason"] is None
        chat = await wire.post(CHAT, chat_body("hello", stop_token_ids=ids("l")))
        assert chat.json["choices"][0]["stop_reason"] == ord("l")


@in_a_loop
async def test_no_stop_string_counts_before_min_tokens() -> None:
    async with serving() as served, await served.wire() as wire:
        for num, text in ((0, ""), (1, "abc"), (3, "abc"), (4, "abcabc")):
            choice = await first(wire, "abcabcabc", stop="a", min_tokens=num)
            assert choice["text"] == text
        choice = await first(wire, "abababab", stop="ab", min_tokens=3)
        assert choice["text"] == "abab", "the one that begins within the first three is passed over"


@in_a_loop
async def test_token_ids_of_prompt_and_output_are_returned() -> None:
    async with serving() as served, await served.wire() as wire:
        choice = await first(wire, ["ab", "xyz"], return_token_ids=True)
        assert choice["prompt_token_ids"] == ids("ab")
        assert choice["token_ids"] == [*ids("ab"), EOS]
        chat = (await wire.post(CHAT, chat_body("ab", return_token_ids=True))).json
        assert chat["prompt_token_ids"] == ids("ab")
        assert chat["choices"][0]["token_ids"] == [*ids("ab"), EOS]
        for path, asked in ((COMPLETIONS, {"prompt": "ab"}), (CHAT, chat_body("ab"))):
            chunks = await stream(wire, path, {**asked, "return_token_ids": True})
            choices = [choice for chunk in chunks for choice in chunk["choices"]]
            found = [id for choice in choices for id in choice.get("token_ids", ())]
            assert found == [*ids("ab"), EOS]
            place = choices[0] if path == COMPLETIONS else chunks[0]
            assert place["prompt_token_ids"] == ids("ab")


@in_a_loop
async def test_logprobs_name_tokens_by_their_ids_where_it_is_asked_for() -> None:
    async with serving() as served, await served.wire() as wire:
        asked = {"logprobs": 1, "echo": True, "return_tokens_as_token_ids": True, "max_tokens": 1}
        choice = await first(wire, "ab", **asked)
        assert choice["logprobs"]["tokens"] == ["token_id:97", "token_id:98", "token_id:97"]
        chat = await wire.post(
            CHAT, chat_body("ab", logprobs=2, return_tokens_as_token_ids=True, max_tokens=1)
        )
        (token,) = chat.json["choices"][0]["logprobs"]["content"]
        assert (token["token"], token["bytes"]) == ("token_id:97", [97])
        assert len(token["top_logprobs"]) == 2


@in_a_loop
async def test_only_the_end_of_a_prompt_is_used() -> None:
    async with serving() as served, await served.wire() as wire:
        answer = await complete(wire, "abcdef", truncate_prompt_tokens=2, echo=True)
        assert answer["choices"][0]["text"] == "efef"
        assert answer["usage"]["prompt_tokens"] == 2
    async with serving(model=FakeModel(context_size=8)) as served, await served.wire() as wire:
        answer = await complete(wire, "x" * 50, truncate_prompt_tokens=-1)
        assert answer["usage"]["prompt_tokens"] == 7


@in_a_loop
async def test_special_tokens_are_shown_where_it_is_asked_for() -> None:
    async with serving() as served, await served.wire() as wire:
        prompt = [*ids("a"), EOS, *ids("b")]
        asked: dict[str, Any] = {"ignore_eos": True, "max_tokens": 3}
        assert (await first(wire, prompt, **asked))["text"] == "ab"
        shown = await first(wire, prompt, **asked, skip_special_tokens=False)
        assert shown["text"] == "a<end>b"


@in_a_loop
async def test_n_probs_are_top_logprobs() -> None:
    async with serving() as served, await served.wire() as wire:
        choice = await first(wire, "ab", n_probs=2)
        assert choice["logprobs"]["top_logprobs"][0] == {"a": -0.5, "b": -1.5}
        assert (await first(wire, "ab", n_probs=0))["logprobs"] is None


@in_a_loop
async def test_reasoning_is_hidden_where_it_is_asked_for() -> None:
    model = FakeModel(output_format=MARKERS)
    async with serving(model=model) as served, await served.wire() as wire:
        text = "<think>deep</think>hi"
        chat = await wire.post(CHAT, chat_body(text, include_reasoning=False))
        message = chat.json["choices"][0]["message"]
        assert message["content"] == "hi"
        assert "reasoning" not in message
        assert chat.json["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
        for shown in (True, False):
            body = chat_body(text, include_reasoning=shown)
            deltas = [c["choices"][0]["delta"] for c in await stream(wire, CHAT, body)]
            assert any(d.get("reasoning") for d in deltas) == shown
            assert "".join(d.get("content") or "" for d in deltas) == "hi"


@in_a_loop
async def test_an_answer_that_has_a_line_ends_when_its_time_is_over() -> None:
    async with serving() as served, await served.wire() as wire:
        asked = {"max_tokens": 2000, "t_max_predict_ms": 1}
        choice = await first(wire, "a\nb" + ENDLESS, **asked)
        assert choice["finish_reason"] == "length"
        assert 2 <= len(choice["text"]) < 2000
        silent = await first(wire, "ab", **asked)
        assert silent["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [EOS + 1]}, "allowed_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"suffix": "x"}, "suffix"),
        ({"mirostat": 2}, "mirostat"),
        ({"dry_multiplier": 0.8}, "dry_multiplier"),
    ],
)
def test_what_cannot_be_is_a_400_that_names_its_field(fields: dict[str, Any], param: str) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            answer = await wire.post(COMPLETIONS, {"prompt": "x", **fields})
            assert (answer.status, answer.error["param"]) == (400, param)

    test()


@in_a_loop
async def test_bad_words_reach_the_sampler_as_tokens() -> None:
    async with serving() as served, await served.wire() as wire:
        await wire.post(COMPLETIONS, {"prompt": "ab", "bad_words": ["x", "yz"]})
        (id,) = served.runner.admitted
        assert served.runner._scripts[id].sampling.bad_words == ((120,), (121, 122))


# --- the middle of a text -----------------------------------------------------------------------


@in_a_loop
async def test_a_suffix_makes_a_prompt_of_prefix_suffix_and_middle() -> None:
    async with serving(model=FakeModel(fill_marks=MARKS)) as served, await served.wire() as wire:
        answer = await complete(wire, ["ab", ids("xy")], suffix="cd", max_tokens=-1)
        assert [c["text"] for c in answer["choices"]] == ["<ab|cd>", "<xy|cd>"]
        echo = await first(wire, "a!b", suffix="cd", echo=True, max_tokens=-1)
        assert echo["text"] == "a!b<a", "a mark ends the middle"
        both = await wire.post(
            COMPLETIONS, {"prompt": "a", "suffix": "b", "echo": True, "logprobs": 1}
        )
        assert (both.status, both.error["param"]) == (400, "suffix")


@in_a_loop
async def test_infill_has_llama_servers_form() -> None:
    async with serving(model=FakeModel(fill_marks=MARKS)) as served, await served.wire() as wire:
        asked = {
            "input_prefix": "ab",
            "input_suffix": "cd",
            "input_extra": [{"filename": "f", "text": "t"}],
            "prompt": "m",
        }
        answer = (await wire.post("/infill", asked)).json
        assert answer["content"] == "@myproject\n#f\nt\n#filename\n<ab|cd>m"
        assert answer["stop"] is True
        assert answer["stop_type"] == "eos"
        assert answer["tokens_evaluated"] == len(answer["content"])
        limited = (await wire.post("/infill", {"input_prefix": "ab", "n_predict": 2})).json
        assert (limited["content"], limited["stop_type"]) == ("<a", "limit")
        word = (await wire.post("/infill", {"input_prefix": "ab", "stop": "b"})).json
        assert (word["stop_type"], word["stopping_word"]) == ("word", "b")
        body = json.dumps({**asked, "stream": True}).encode()
        head = await wire.ask("POST", "/infill", body)
        parts = [json.loads(line[6:]) for line in head.body.decode().split("\n\n") if line]
        assert "".join(part["content"] for part in parts) == answer["content"]
        assert [part["stop"] for part in parts] == [False] * (len(parts) - 1) + [True]


@in_a_loop
async def test_a_model_without_marks_fills_in_no_middle() -> None:
    async with serving() as served, await served.wire() as wire:
        answer = await wire.post("/infill", {"input_prefix": "a"})
        assert (answer.status, answer.error["param"]) == (400, "input_prefix")
