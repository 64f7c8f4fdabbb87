"""Text completions: prompts, choices, logprobs, echoes, cancels.

Over HTTP, around a scripted runner that repeats the characters of its prompt: each text, count and
place is known in advance.
"""

import json
from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
from helpers import ENDLESS, EOS, Answer, FakeModel, Wire, in_a_loop, request, serving, until
from server_cases import COMPLETIONS, PROMPT, ids, stream


async def complete(wire: Wire, prompt: Any, **fields: Any) -> Answer:
    return await wire.post(COMPLETIONS, {"prompt": prompt, **fields})


def fold(chunks: SequenceOf[Any]) -> Any:
    """A whole completion from its stream: texts and logprobs joined, the last reason and usage."""
    choices: dict[int, dict[str, Any]] = {}
    for choice in [choice for chunk in chunks for choice in chunk["choices"]]:
        silent = {"index": choice["index"], "text": "", "logprobs": None, "finish_reason": None}
        own = choices.setdefault(choice["index"], silent)
        own["text"] += choice["text"]
        assert own["finish_reason"] is None, "a choice ends once"
        own |= {name: choice[name] for name in ("finish_reason", "stop_reason") if name in choice}
        for name, values in (choice["logprobs"] or {}).items():
            own["logprobs"] = own["logprobs"] or {}
            own["logprobs"].setdefault(name, []).extend(values)
    (usage,) = [chunk["usage"] for chunk in chunks[-1:]]
    return [choices[index] for index in sorted(choices)], usage


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("hello", ["hello"]),
        (["one", "three", "x"], ["one", "three", "x"]),
        (ids("hello"), ["hello"]),
        ([ids("one"), ids("three")], ["one", "three"]),
        ([ids("one"), "three"], ["one", "three"]),
        ("🙂 日本", ["🙂 日本"]),
    ],
)
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"echo": True},
        {"logprobs": 2},
        {"stop": "e"},
        {"max_tokens": 2},
        {"stream_options": {"include_usage": True}},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ],
    ids=repr,
)
def test_a_completion_is_the_fold_of_its_stream(
    prompt: Any, texts: list[str], n: int, fields: dict[str, Any]
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(enable_prefix_caching=False) as served, await served.wire() as wire:
            asked = {"prompt": prompt, "n": n, **fields}
            whole = dict(asked)
            whole.pop("stream_options", None)
            answer = await wire.post(COMPLETIONS, whole)
            chunks = await stream(wire, COMPLETIONS, asked)
            assert answer.status == 200
            assert "x-mlxlite-ignored" not in answer
            choices, usage = fold(chunks)
            assert choices == answer.json["choices"]
            assert usage == answer.json["usage"]
            for i, choice in enumerate(choices):
                own = texts[i // n]
                answered = own[:2] if "max_tokens" in fields else own
                answered = answered.partition("e")[0] if "stop" in fields else answered
                is_cut = "max_tokens" in fields and len(own) >= 2
                assert choice["text"] == (own if "echo" in fields else "") + answered
                assert choice["finish_reason"] == ("length" if is_cut else "stop")
            assert usage["prompt_tokens"] == sum(map(len, texts)), "each prompt counts once"

    test()


@in_a_loop
async def test_a_completions_envelope_is_its_own() -> None:
    async with serving() as served, await served.wire() as wire:
        answer = (await complete(wire, "hello", model="any")).json
        assert answer["id"].startswith("cmpl-")
        assert answer["object"] == "text_completion"
        assert answer["model"] == "fake"
        assert answer["usage"]["completion_tokens"] == 6
        assert answer["timings"]["predicted_n"] == 6
        for chunk in await stream(wire, COMPLETIONS, {"prompt": "hello"}):
            assert chunk["object"] == "text_completion"
            assert chunk["id"].startswith("cmpl-")


@in_a_loop
async def test_the_choices_of_a_prompt_stand_together_and_differ_by_their_seeds() -> None:
    async with serving() as served, await served.wire() as wire:
        answer = await complete(wire, ["abc", "xyz"], n=3, seed=0, temperature=1, max_tokens=9)
        found = [choice["text"] for choice in answer.json["choices"]]
        assert found == ["abc", "bc", "c", "xyz", "yz", "z"]
        assert [choice["index"] for choice in answer.json["choices"]] == list(range(6))
        assert answer.json["usage"]["prompt_tokens"] == 6
        assert answer.json["usage"]["completion_tokens"] == 2 * (4 + 3 + 2)


@in_a_loop
async def test_logprobs_have_the_legacy_form_and_their_places_in_the_text() -> None:
    async with serving() as served, await served.wire() as wire:
        answer = await complete(wire, ["日本a", "xy"], logprobs=2)
        first, other = [choice["logprobs"] for choice in answer.json["choices"]]
        assert first["tokens"][:3] == ["日", "本", "a"]
        assert first["token_logprobs"][:3] == [-0.5, -1.5, -2.5]
        assert first["text_offset"][:3] == [0, 1, 2]
        assert first["top_logprobs"][2] == {"a": -2.5, "b": -3.5}
        assert other["text_offset"][:2] == [0, 1], "each choice's own"
        none = await complete(wire, "xy", logprobs=0)
        assert none.json["choices"][0]["logprobs"]["top_logprobs"] == [{}, {}]
        silent = await complete(wire, "xy")
        assert silent.json["choices"][0]["logprobs"] is None


@in_a_loop
async def test_an_echo_of_token_ids_is_their_text_and_precedes_the_answer() -> None:
    async with serving() as served, await served.wire() as wire:
        answer = await complete(wire, ids("abc"), echo=True, max_tokens=1)
        assert answer.json["choices"][0]["text"] == "abca"
        served.runner.hold()
        body = json.dumps({"prompt": ["ab", "xy"], "echo": True, "stream": True}).encode()
        await wire.send(request("POST", COMPLETIONS, body))
        await wire.head()
        firsts = [(await wire.frame()).json["choices"][0] for _ in range(2)]
        assert [(choice["index"], choice["text"]) for choice in firsts] == [(0, "ab"), (1, "xy")]
        served.runner.release()
        await wire.rest()


@in_a_loop
async def test_a_text_has_the_tokens_that_the_tokenizer_puts_before_it_and_ids_have_not() -> None:
    async with serving(FakeModel(bos=ord("^"))) as served, await served.wire() as wire:
        assert (await complete(wire, "ab")).json["choices"][0]["text"] == "^ab"
        assert (await complete(wire, ids("ab"))).json["choices"][0]["text"] == "ab"
        assert (await complete(wire, "")).error["param"] == "prompt"


@in_a_loop
async def test_running_usage_counts_the_tokens_of_its_own_choice() -> None:
    async with serving() as served, await served.wire() as wire:
        options = {"include_usage": True, "continuous_usage_stats": True}
        value = {"prompt": "hello", "stream_options": options}
        chunks = await stream(wire, COMPLETIONS, value)
        texts = [c for c in chunks if c["choices"] and c["choices"][0]["text"]]
        assert [c["usage"]["completion_tokens"] for c in texts] == [1, 2, 3, 4, 5]
        assert {c["usage"]["prompt_tokens"] for c in texts} == {5}
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [EOS + 1]}, "prompt"),
        ({"prompt": [[5], [EOS + 1]]}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "echo": True, "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x" * (1 << 18), "echo": True, "logprobs": 4}, "echo"),
        ({"prompt": "x" * (1 << 18), "prompt_logprobs": 4, "max_tokens": 0}, "prompt_logprobs"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "logit_bias": {str(EOS + 1): 1}}, "logit_bias"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_completion_that_cannot_be_is_a_400_that_names_the_field(
    fields: dict[str, Any], param: str
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            for stream in (False, True):
                answer = await wire.post(COMPLETIONS, {**fields, "stream": stream})
                assert answer.status == 400
                assert answer.error["param"] == param
            assert served.num_live == 0
            assert (await complete(wire, "hello")).status == 200

    test()


@in_a_loop
async def test_as_many_prompts_as_there_may_be_are_answered_in_their_order() -> None:
    async with serving(max_batch_size=64) as served, await served.wire() as wire:
        prompts = [f"{i}." for i in range(256)]
        answer = await complete(wire, prompts)
        assert [choice["text"] for choice in answer.json["choices"]] == prompts
        assert answer.json["usage"]["prompt_tokens"] == sum(map(len, prompts))


@in_a_loop
async def test_a_prompt_that_is_too_long_is_named_as_the_prompt() -> None:
    async with serving(FakeModel(context_size=32)) as served, await served.wire() as wire:
        answer = await complete(wire, ["short", "x" * 32])
        assert answer.status == 400
        assert answer.error["code"] == "context_length_exceeded"
        assert answer.error["param"] == "prompt"
        assert served.num_live == 0, "nor is the short one begun"
        assert (await complete(wire, "x" * 31, max_tokens=5)).json["usage"]["total_tokens"] == 32


@in_a_loop
async def test_a_chats_fields_are_ignored_in_a_completion_and_named() -> None:
    async with serving() as served, await served.wire() as wire:
        answer = await complete(wire, "hello", messages=[], tools=[{}], zeta=1)
        assert answer.status == 200
        assert answer["x-mlxlite-ignored"] == "messages,tools,zeta"


@in_a_loop
async def test_a_completion_shares_its_prefix_and_can_be_cancelled_like_a_chat() -> None:
    async with serving(kv_block_size=4) as served, await served.wire() as wire:
        for num_cached in (0, 39):
            usage = (await complete(wire, PROMPT)).json["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == num_cached
        usage = (await complete(wire, PROMPT, cache_prompt=False)).json["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        usage = (await complete(wire, PROMPT, cache_salt="other")).json["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
        body = json.dumps({"prompt": ["ab" + ENDLESS, "cd" + ENDLESS], "stream": True}).encode()
        await wire.send(request("POST", COMPLETIONS, body))
        await wire.head()
        id = (await wire.frame()).json["id"]
        async with await served.wire() as control:
            cancelled = await control.post("/v1/cancel", {"id": id})
            assert cancelled.json["cancelled_count"] == 1
        frames = await wire.rest()
        ends = [c["finish_reason"] for f in frames[:-1] for c in f.json["choices"]]
        assert [end for end in ends if end] == ["abort", "abort"]
        await until(lambda: served.num_live == 0)


@in_a_loop
async def test_a_disconnect_ends_every_prompt_of_its_request() -> None:
    async with serving() as served:
        wire = await served.wire()
        prompts = [f"{i}{ENDLESS}" for i in range(3)]
        await wire.send(request("POST", COMPLETIONS, json.dumps({"prompt": prompts}).encode()))
        await until(lambda: len(served.runner.num_drawn) == 3)
        wire.abort()
        await until(lambda: served.num_live == 0)
