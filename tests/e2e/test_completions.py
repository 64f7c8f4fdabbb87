"""Endpoints other than chats, and newer fields of chats: over HTTP, around fakes.

A prompt is characters, which the scripted runner repeats, so every text, count and place here is
known in advance. Real models are in `test_embeddings` and `test_openai_sdk`.
"""

import base64
import json
import struct
import threading
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import pytest
from helpers import (
    DONE,
    ENDLESS,
    EOS,
    NUM_DIMENSIONS,
    Answer,
    FakeModel,
    ScriptedRunner,
    Wire,
    chat_body,
    connect,
    in_a_loop,
    new_server,
    request,
    serving,
    until,
)

import mlxlite
from mlxlite.config.options import Config
from mlxlite.engine.embeddings import EMBED_TOKENS
from mlxlite.engine.sequence import Prompt
from mlxlite.engine.step import Part
from mlxlite.models.interface import Model

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
PROMPT = "It was a bright cold day in April, and so"[:40]


async def complete(wire: Wire, prompt: Any, **fields: Any) -> Answer:
    return await wire.post(COMPLETIONS, {"prompt": prompt, **fields})


async def stream(wire: Wire, path: str, value: Any) -> list[Any]:
    """The chunks of a stream that ends well."""
    body = json.dumps({**value, "stream": True}).encode()
    await wire.send(request("POST", path, body))
    assert (await wire.head()).status == 200
    frames = await wire.rest()
    assert frames[-1] == DONE
    assert frames.count(DONE) == 1
    return [frame.json for frame in frames[:-1]]


def fold(chunks: SequenceOf[Any]) -> Any:
    """A whole completion from its stream: texts and logprobs joined, the last reason and usage."""
    choices: dict[int, dict[str, Any]] = {}
    for choice in [choice for chunk in chunks for choice in chunk["choices"]]:
        silent = {"index": choice["index"], "text": "", "logprobs": None, "finish_reason": None}
        own = choices.setdefault(choice["index"], silent)
        own["text"] += choice["text"]
        assert own["finish_reason"] is None, "a choice ends once"
        own["finish_reason"] = choice["finish_reason"]
        for name, values in (choice["logprobs"] or {}).items():
            own["logprobs"] = own["logprobs"] or {}
            own["logprobs"].setdefault(name, []).extend(values)
    (usage,) = [chunk["usage"] for chunk in chunks[-1:]]
    return [choices[index] for index in sorted(choices)], usage


# --- completions --------------------------------------------------------------------------------


def ids(text: str) -> list[int]:
    return list(map(ord, text))


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
                said = own[:2] if "max_tokens" in fields else own
                said = said.partition("e")[0] if "stop" in fields else said
                is_cut = "max_tokens" in fields and len(own) >= 2
                assert choice["text"] == (own if "echo" in fields else "") + said
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
        said = [choice["text"] for choice in answer.json["choices"]]
        assert said == ["abc", "bc", "c", "xyz", "yz", "z"]
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
        said = [(await wire.frame()).json["choices"][0] for _ in range(2)]
        assert [(choice["index"], choice["text"]) for choice in said] == [(0, "ab"), (1, "xy")]
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
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt[1]"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [EOS + 1]}, "prompt"),
        ({"prompt": [[5], [EOS + 1]]}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "echo"),
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


# --- chats: what a stream emits on demand -------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("n", [1, 3])
def test_progress_rises_to_the_prompts_end_before_the_first_token(path: str, n: int) -> None:
    @in_a_loop
    async def test() -> None:
        settings: Any = {"prefill_chunk_size": 8, "kv_block_size": 4}
        async with serving(**settings) as served, await served.wire() as wire:
            asked = {"return_progress": True, "n": n, "prompt": PROMPT} | chat_body(PROMPT)
            asked.pop("messages" if path == COMPLETIONS else "prompt")
            for num_cached in (0, 16):
                chunks = await stream(wire, path, asked)
                told = [c["prompt_progress"] for c in chunks if "prompt_progress" in c]
                kinds = ["prompt_progress" in c for c in chunks]
                says = [any(_text(choice) for choice in c["choices"]) for c in chunks]
                assert kinds.index(True) < says.index(True)
                assert True not in kinds[says.index(True) :], "none after the first token"
                assert {(p["total"], p["cache"]) for p in told} == {(40, num_cached)}
                processed = [p["processed"] for p in told]
                assert processed == sorted(set(processed))
                assert num_cached < processed[0]
                assert processed[-1] == 39, "the last prompt token is computed with the first row"
                times = [p["time_ms"] for p in told]
                assert times == sorted(times)
                assert times[0] >= 0
                assert len(processed) > 1
                # The next time, half of the prompt is known.
                asked = json.loads(json.dumps(asked).replace(PROMPT[16:], PROMPT[16:][::-1]))

    test()


def _text(choice: Mapping[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["delta"].get("content", ""))


@in_a_loop
async def test_a_preempted_prompt_reports_no_progress_of_its_second_prefill() -> None:
    async with serving(max_batch_size=1) as served, await served.wire() as wire:
        served.runner.hold()
        await wire.open_stream("abc" + ENDLESS, priority=1, max_tokens=12, return_progress=True)
        served.runner.allow(6)
        await until(lambda: served.runner.num_drawn.get(1, 0) >= 4)
        async with await served.wire() as urgent:
            await urgent.send(
                request("POST", CHAT, json.dumps(chat_body("xyz", priority=0)).encode())
            )
            await until(lambda: served.num_live == 2)
            served.runner.release()
            assert (await urgent.answer()).status == 200
        chunks = [frame.json for frame in (await wire.rest())[:-1]]
        assert served.runner.admitted == [1, 2, 1], "it was preempted"
        says = [bool(_text(choice)) for c in chunks for choice in c["choices"]]
        told = ["prompt_progress" in c for c in chunks]
        assert True in told
        assert True not in told[says.index(True) :]
        assert all(c["prompt_progress"]["processed"] <= 4 for c in chunks if "prompt_progress" in c)


@in_a_loop
async def test_only_a_stream_that_requests_progress_has_it() -> None:
    async with serving() as served, await served.wire() as wire:
        for fields in ({}, {"return_progress": False}):
            chunks = await stream(wire, CHAT, chat_body("hello", **fields))
            assert not any("prompt_progress" in chunk for chunk in chunks)
        answer = await wire.chat("hello", return_progress=True)
        assert "prompt_progress" not in answer.json


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("extra", [{}, {"logprobs": True, "top_logprobs": 1}])
def test_timings_and_usage_of_each_token_add_up(path: str, n: int, extra: dict[str, Any]) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            options = {"include_usage": True, "continuous_usage_stats": True}
            asked: dict[str, Any] = {
                "prompt": "hello",
                **chat_body("hello"),
                **{"timings_per_token": True, "stream_options": options, "n": n},
                **(extra if path == CHAT else {}),
            }
            asked.pop("messages" if path == COMPLETIONS else "prompt")
            chunks = await stream(wire, path, asked)
            for index in range(n):
                own = [c for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
                texts = [c for c in own if _text(c["choices"][0])]
                assert [c["timings"]["predicted_n"] for c in texts] == [1, 2, 3, 4, 5]
                assert [c["usage"]["completion_tokens"] for c in texts] == [1, 2, 3, 4, 5]
                assert {c["timings"]["prompt_n"] + c["timings"]["cache_n"] for c in texts} == {5}
                times = [c["timings"]["predicted_ms"] for c in texts]
                assert times == sorted(times)
            assert chunks[-1]["choices"] == []
            assert chunks[-1]["usage"]["completion_tokens"] == 6 * n
            plain = await stream(wire, path, {**asked, "timings_per_token": False})
            assert not any("timings" in c for c in plain if c["choices"] and _text(c["choices"][0]))

    test()


@in_a_loop
async def test_continuous_usage_needs_include_usage() -> None:
    async with serving() as served, await served.wire() as wire:
        options = {"continuous_usage_stats": True}
        chunks = await stream(wire, CHAT, chat_body("hello", stream_options=options))
        assert [("usage" in chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


# --- chats: what reaches the template -----------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kwargs"),
    [
        ({}, {}),
        ({"reasoning_effort": None}, {}),
        (
            {"reasoning_effort": "none"},
            {"enable_thinking": False, "reasoning_effort": "none"},
        ),
        ({"reasoning_effort": "low"}, {"enable_thinking": True, "reasoning_effort": "low"}),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
            {"enable_thinking": False, "reasoning_effort": "high"},
        ),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"reasoning_effort": "x", "a": 1}},
            {"enable_thinking": False, "reasoning_effort": "x", "a": 1},
        ),
    ],
)
def test_an_effort_reaches_the_template(fields: dict[str, Any], kwargs: dict[str, Any]) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            assert (await wire.chat("hello", n=2, **fields)).status == 200
            assert served.model.rendered[-1][1] == kwargs
            await stream(wire, CHAT, chat_body("hello", **fields))
            assert served.model.rendered[-1][1] == kwargs

    test()


@pytest.mark.parametrize(
    ("fields", "is_continuation"),
    [
        ({}, True),
        ({"continue_final_message": True}, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, True),
        ({"continue_final_message": False}, False),
        ({"add_generation_prompt": True}, False),
    ],
)
@pytest.mark.parametrize("n", [1, 3])
def test_a_request_sets_whether_its_last_message_is_continued(
    fields: dict[str, Any], is_continuation: bool, n: int
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            messages = [*chat_body("x")["messages"], {"role": "assistant", "content": "hello"}]
            answer = await wire.post(CHAT, {"messages": messages, "n": n, **fields})
            assert [c["message"]["content"] for c in answer.json["choices"]] == ["hello"] * n
            assert served.model.rendered[-1][2] is is_continuation

    test()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"cache_salt": "x" * 129}, "cache_salt"),
    ],
)
def test_a_chat_that_cannot_be_is_a_400_that_names_the_field(
    fields: dict[str, Any], param: str
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            answer = await wire.chat("hello", **fields)
            assert answer.status == 400
            assert answer.error["param"] == param
            assert served.model.rendered == []

    test()


class Joined(FakeModel):
    """Its prompt is all messages, as a real template's is."""

    def render(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        *,
        is_continuation: bool,
    ) -> Prompt:
        super().render(messages, template_kwargs, is_continuation=is_continuation)
        return Prompt(tuple(map(ord, "|".join(m["content"] for m in messages))))


@pytest.mark.parametrize("as_parts", [False, True])
def test_a_billing_header_hides_no_prefix_and_is_seen_by_no_model(as_parts: bool) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(Joined(), kv_block_size=4) as served, await served.wire() as wire:
            found = []
            for i in range(2):
                parts = [f"x-anthropic-billing-header: cch={i}{i}{i};", PROMPT]
                content: Any = [{"type": "text", "text": part} for part in parts]
                system = {"role": "system", "content": content if as_parts else "\n".join(parts)}
                messages = [system, {"role": "user", "content": "hello"}]
                answer = await wire.post(CHAT, {"messages": messages})
                found.append(answer.json["usage"]["prompt_tokens_details"]["cached_tokens"])
            assert found == [0, 45], "of 46, all but the last"
            shown = [messages[0]["content"] for messages, _, _ in served.model.rendered]
            assert shown == [PROMPT, PROMPT]
            counted = await wire.post("/tokenize", {"messages": messages})
            assert counted.json["count"] == 46

    test()


# --- embeddings ---------------------------------------------------------------------------------


async def embed(wire: Wire, input: Any, **fields: Any) -> list[list[float]]:
    """The vectors, which have the length 1."""
    answer = await wire.post(EMBEDDINGS, {"input": input, **fields})
    assert answer.status == 200
    assert answer.json["object"] == "list"
    data = answer.json["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    if fields.get("encoding_format") == "base64":
        found = [decoded(item["embedding"]) for item in data]
    else:
        found = [item["embedding"] for item in data]
    assert [np.linalg.norm(vector) for vector in found] == pytest.approx([1.0] * len(found))
    return found


def decoded(text: str) -> list[float]:
    raw = base64.b64decode(text, validate=True)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def letters(text: str) -> list[float]:
    """The scripted runner's mean."""
    counts = np.bincount([ord(char) % NUM_DIMENSIONS for char in text], minlength=NUM_DIMENSIONS)
    vector: list[float] = (counts / np.linalg.norm(counts)).tolist()
    return vector


@in_a_loop
async def test_an_embedding_is_openais_list() -> None:
    async with serving() as served, await served.wire() as wire:
        answer = await wire.post(EMBEDDINGS, {"input": ["ab", "c"], "model": "any", "user": "me"})
        assert answer.json["model"] == "fake"
        assert answer.json["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        assert "x-mlxlite-ignored" not in answer
        assert (await embed(wire, ids("ab"))) == [letters("b")]
        assert (await embed(wire, "ab", pooling="mean")) == [pytest.approx(letters("ab"))]
        assert (await embed(wire, "ab", pooling="last")) == [letters("b")]
        assert await embed(wire, "ab", encoding_format="base64") == [letters("b")]
        many = ["x" * 300, "a", "bcd" * 100, "ef"] * 3
        found = await embed(wire, many, pooling="mean")
        assert np.allclose(found, [letters(text) for text in many]), "in the order of the inputs"
        ignored = await wire.post(EMBEDDINGS, {"input": "x", "zeta": 1, "truncate": True})
        assert ignored["x-mlxlite-ignored"] == "truncate,zeta"


@in_a_loop
async def test_the_tokens_of_one_embedding_pass_are_bounded() -> None:
    async with serving() as served, await served.wire() as wire:
        lengths = [1, 1, 3, 100, 101, 200, 300, EMBED_TOKENS, EMBED_TOKENS + 1, 5 * EMBED_TOKENS]
        inputs = [chr(97 + i) * length for i, length in enumerate(lengths)]
        assert await embed(wire, inputs, pooling="mean") == [letters(text) for text in inputs]
        sizes = [int(line.split()[1]) for line in served.runner.log]
        assert max(sizes) <= EMBED_TOKENS
        assert sum(sizes) == sum(lengths)
        assert served.runner.embedding == {}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a"] * 257}, "input"),
        ({"input": ["a", []]}, "input[1]"),
        ({"input": [EOS + 1]}, "input"),
        ({"input": "x" * 65}, "input"),
        ({"input": ["a", "x" * 65]}, "input"),
        ({"input": "x", "dimensions": NUM_DIMENSIONS + 1}, "dimensions"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "pooling": "max"}, "pooling"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_an_embedding_that_cannot_be_is_a_400_that_names_the_field(
    fields: dict[str, Any], param: str
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(FakeModel(context_size=64)) as served, await served.wire() as wire:
            answer = await wire.post(EMBEDDINGS, fields)
            assert answer.status == 400
            assert answer.error["param"] == param
            assert await embed(wire, "x" * 64), "a whole context is not too long"

    test()


@in_a_loop
async def test_steps_run_between_the_parts_of_an_embedding_input() -> None:
    async with serving() as served, await served.wire() as wire, await served.wire() as other:
        await wire.open_stream("ab" + ENDLESS)
        await until(lambda: served.runner.num_drawn.get(1, 0) > 2)
        served.runner.log.clear()
        await embed(other, ["x" * 4 * EMBED_TOKENS, *"abc", "y" * 400, "z" * 401])
        parts = " ".join(line.split()[0] for line in served.runner.log).split("embed")
        assert len(parts) == 4 + 1 + 2 + 1
        assert all("step" in between for between in parts[1:-1])
        wire.abort()
        await until(lambda: served.num_live == 0)


@in_a_loop
async def test_concurrent_embeddings_delay_a_stream_no_more_than_one() -> None:
    async with serving() as served, await served.wire() as wire:
        await wire.open_stream("ab" + ENDLESS)
        await until(lambda: served.runner.num_drawn.get(1, 0) > 2)
        most_half_done = 0

        def count() -> None:
            nonlocal most_half_done
            most_half_done = max(most_half_done, len(served.runner.embedding))

        served.runner.before_embed = count
        served.runner.log.clear()
        body = json.dumps({"input": "x" * 3 * EMBED_TOKENS}).encode()
        wires = [await served.wire() for _ in range(6)]
        for other in wires:
            await other.send(request("POST", EMBEDDINGS, body))
        for other in wires:
            assert (await other.answer()).status == 200
            await other.close()
        parts = " ".join(line.split()[0] for line in served.runner.log).split("embed")
        assert len(parts) == 6 * 3 + 1
        assert all("step" in between for between in parts[1:-1]), "one part between two steps"
        assert most_half_done <= 1, "and the states of one input at a time"
        wire.abort()
        await until(lambda: served.num_live == 0)


@in_a_loop
async def test_a_disconnect_in_mid_embedding_leaves_nothing_behind() -> None:
    gate, num_calls = threading.Event(), 0

    def wait_in_the_second_part() -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 2:
            assert gate.wait(20)

    async with serving() as served:
        served.runner.before_embed = wait_in_the_second_part
        wire = await served.wire()
        body = json.dumps({"input": "x" * 5 * EMBED_TOKENS}).encode()
        await wire.send(request("POST", EMBEDDINGS, body))
        await until(lambda: num_calls == 2)
        wire.abort()
        await until(lambda: served.num_clients == 0)
        gate.set()
        await until(lambda: served.runner.log[-1] == "drop")
        assert num_calls == 2
        assert served.runner.embedding == {}


class NoStates(ScriptedRunner):
    """Of a model that does not show its states."""

    def embed(
        self, inputs: SequenceOf[tuple[int, ...]], *, is_mean: bool, part: Part | None = None
    ) -> list[list[float]]:
        raise NotImplementedError("this model does not show its last states")


@in_a_loop
async def test_embeddings_of_a_model_without_hidden_states_are_a_501() -> None:
    async with serving(runner=NoStates()) as served, await served.wire() as wire:
        answer = await wire.post(EMBEDDINGS, {"input": "x"})
        assert answer.status == 501
        assert answer.error["type"] == "not_supported_error"
        assert answer.error["code"] == "not_supported"
        assert "states" in answer.error["message"]
        assert (await wire.chat("hello")).status == 200


@pytest.mark.parametrize("num_parts", [1, 3])
def test_an_embedding_that_fails_is_a_500_and_affects_no_other_request(num_parts: int) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:

            def fail() -> None:
                if len(served.runner.log) == num_parts:
                    raise RuntimeError("the device has a secret")

            served.runner.before_embed = fail
            answer = await wire.post(EMBEDDINGS, {"input": "x" * (num_parts * EMBED_TOKENS)})
            assert answer.status == 500
            assert "secret" not in answer.error["message"]
            assert (await wire.chat("hello")).status == 200
            served.runner.before_embed = lambda: None
            assert await embed(wire, "x")
            await until(lambda: served.runner.embedding == {}, "the parts before are dropped")

    test()


# --- tokenize and detokenize --------------------------------------------------------------------


class Halves(FakeModel):
    """A token is a byte, as in byte-level vocabularies."""

    num_vocab = 256

    def encode(self, text: str, *, add_special: bool) -> tuple[int, ...]:
        return tuple(text.encode())

    def detokenize(self, tokens: SequenceOf[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])


@pytest.mark.parametrize("text", ["", "hello", "a🙂 日本\n\0", " "])
@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_tokens_there_and_back_in_both_dialects(text: str, prefix: str) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            for name in ("content", "prompt"):
                told = (await wire.post(f"{prefix}/tokenize", {name: text})).json
                assert told == {
                    "tokens": ids(text),
                    "count": len(text),
                    "max_model_len": served.model.context_size,
                }
                back = (await wire.post(f"{prefix}/detokenize", {"tokens": told["tokens"]})).json
                assert back[name] == text

    test()


@in_a_loop
async def test_pieces_of_half_characters_are_lists_of_bytes() -> None:
    async with serving(Halves()) as served, await served.wire() as wire:
        asked = {"content": "aé", "with_pieces": True, "return_token_strs": True}
        told = (await wire.post("/tokenize", asked)).json
        assert told["tokens"] == [
            {"id": 97, "piece": "a"},
            {"id": 0xC3, "piece": [0xC3]},
            {"id": 0xA9, "piece": [0xA9]},
        ]
        assert told["token_strs"] == ["a", "\ufffd", "\ufffd"]
        half = await wire.post("/detokenize", {"tokens": [97, 0xC3]})
        assert half.json["content"] == "a\ufffd"


@in_a_loop
async def test_special_tokens_are_added_only_on_request() -> None:
    async with serving(FakeModel(bos=ord("^"))) as served, await served.wire() as wire:
        for fields, expected in (
            ({}, "ab"),
            ({"add_special": False}, "ab"),
            ({"add_special": True}, "^ab"),
            ({"add_special_tokens": True}, "^ab"),
        ):
            told = await wire.post("/tokenize", {"content": "ab", **fields})
            assert told.json["tokens"] == ids(expected)


@in_a_loop
async def test_what_cannot_be_tokens_or_text_is_a_400_that_names_it() -> None:
    async with serving() as served, await served.wire() as wire:
        for path, value, param in (
            ("/tokenize", {}, "content"),
            ("/tokenize", {"content": "x", "parse_special": False}, "parse_special"),
            ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
            ("/detokenize", {}, "tokens"),
            ("/detokenize", {"tokens": [EOS + 1]}, "tokens"),
            ("/detokenize", {"tokens": [5, "a"]}, "tokens[1]"),
        ):
            answer = await wire.post(path, value)
            assert (answer.status, answer.error["param"]) == (400, param)
        for path in ("/tokenize", "/detokenize", COMPLETIONS, EMBEDDINGS):
            raw = rb'{"content":"\ud800","prompt":"\ud800","input":"\ud800","tokens":["\ud800"]}'
            answer = await wire.ask("POST", path, raw)
            assert answer.status == 400
        ignored = await wire.post("/detokenize", {"tokens": [97], "zeta": 1})
        assert ignored["x-mlxlite-ignored"] == "zeta"
        ignored = await wire.post("/tokenize", {"content": "a", "zeta": 1})
        assert ignored["x-mlxlite-ignored"] == "zeta"


# --- routes ---------------------------------------------------------------------------------------

ROUTES: dict[str, tuple[str, ...]] = {
    "/chat/completions": ("POST",),
    "/completions": ("POST",),
    "/embeddings": ("POST",),
    "/tokenize": ("POST",),
    "/detokenize": ("POST",),
    "/models": ("GET",),
    "/models/fake": ("GET",),
    "/cache": ("GET", "DELETE"),
    "/cancel": ("POST",),
    "/health": ("GET",),
    "/metrics": ("GET",),
    "/status": ("GET",),
    "/version": ("GET",),
}
OPEN = ("/health", "/metrics", "/version")
NEED_NO_MODEL = OPEN
BODIES: dict[str, Any] = {
    "/chat/completions": chat_body("hello"),
    "/completions": {"prompt": "hello"},
    "/embeddings": {"input": "hello"},
    "/tokenize": {"content": "hello"},
    "/detokenize": {"tokens": [104]},
    "/cancel": {},
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def methods_of(path: str) -> set[str]:
    return {*ROUTES[path], *(["HEAD"] if "GET" in ROUTES[path] else [])}


async def ask(wire: Wire, method: str, path: str, route: str, **headers: str) -> Answer:
    body = json.dumps(BODIES[route]).encode() if method == "POST" and route in BODIES else None
    return await wire.ask(method, path, body, **headers)


@in_a_loop
async def test_the_routes_here_are_the_ones_there_are() -> None:
    async with serving() as served:
        table = {path.replace("/models/{id}", "/models/fake") for path in served.server.app.routes}
        assert ROUTES.keys() <= table


@pytest.mark.parametrize("prefix", ["", "/v1"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_route_serves_its_methods_and_lists_them_for_others(route: str, prefix: str) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            path = prefix + route
            allowed = {*methods_of(route), "OPTIONS"}
            options = await wire.ask("OPTIONS", path)
            assert options.status == 204
            assert set(options["allow"].split(", ")) == allowed
            for method in METHODS:
                for query in ("", "?beta=true&x=/v1/y"):
                    answer = await ask(wire, method, path + query, route)
                    if method in allowed:
                        assert answer.status == 200
                    else:
                        assert answer.status == 405
                        assert set(answer["allow"].split(", ")) == allowed
            if "GET" in ROUTES[route]:
                head, got = await wire.ask("HEAD", path), await wire.get(path)
                assert head["content-type"] == got["content-type"]
                assert head.body == b""

    test()


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_needs_the_key_unless_it_is_open(route: str) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(api_key=("s3cret",)) as served:
            for method in ROUTES[route]:
                for key in ("", "Bearer s3cre", "Bearer s3cret"):
                    async with await served.wire() as wire:  # which a 401 before a body closes
                        answer = await ask(wire, method, route, route, authorization=key)
                        is_let_in = route in OPEN or key == "Bearer s3cret"
                        assert answer.status == (200 if is_let_in else 401)

    test()


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_that_needs_the_model_is_a_503_while_it_loads(route: str) -> None:
    @in_a_loop
    async def test() -> None:
        gate = threading.Event()

        def load(_config: Config) -> tuple[Model, ScriptedRunner]:
            assert gate.wait(20)
            return FakeModel(), ScriptedRunner()

        server = new_server(load)
        await server.start()
        try:
            async with await connect(server) as wire:
                for method in ROUTES[route]:
                    answer = await ask(wire, method, route, route)
                    is_there = route in NEED_NO_MODEL and route != "/health"
                    assert answer.status == (200 if is_there else 503)
                    assert is_there or "retry-after" in answer
        finally:
            gate.set()
            await server.ready()
            await server.stop()

    test()


@pytest.mark.parametrize("route", BODIES)
def test_a_body_is_a_json_object(route: str) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            body = json.dumps(BODIES[route]).encode()
            async with await served.wire() as refused:  # before its body is read, and closed
                answer = await refused.ask("POST", route, body, content_type="text/plain")
                assert answer.status == 415
                assert answer.error["code"] == "unsupported_media_type"
            for raw in (b"", b"  ", b"[]", b"null", b"{", b'"x"'):
                answer = await wire.ask("POST", route, raw)
                is_cancel = route == "/cancel" and not raw.strip()
                assert answer.status == (200 if is_cancel else 400)
                assert is_cancel or answer.error["type"] == "invalid_request_error"

    test()


@in_a_loop
async def test_status_reports_queue_rows_model_and_versions() -> None:
    async with serving(max_queue=7, max_batch_size=2) as served, await served.wire() as wire:
        idle = (await wire.get("/v1/status")).json
        assert idle["queue"] == {"waiting": 0, "max": 7}
        assert idle["rows"] == {"running": 0, "max": 2, "steps": 0}
        assert idle["model"]["id"] == "fake"
        assert idle["model"]["fingerprint"] == "fp_0123456789abcdef"
        assert idle["versions"]["mlxlite"] == mlxlite.__version__
        async with await served.wire() as busy:
            await busy.open_stream("ab" + ENDLESS, n=5)
            await until(lambda: served.runner.num_drawn.get(2, 0) > 0)
            now = (await wire.get("/v1/status")).json
            assert now["queue"]["waiting"] == 3
            assert now["rows"]["running"] == 2
            assert now["rows"]["steps"] > 0
            busy.abort()
        await until(lambda: served.num_live == 0)
        assert (await wire.get("/version")).json == {"version": mlxlite.__version__}


@pytest.mark.parametrize("stream", [False, True])
def test_a_strict_server_answers_to_its_models_name_alone(stream: bool) -> None:
    @in_a_loop
    async def test() -> None:
        bodies = {CHAT: chat_body("hello"), COMPLETIONS: {"prompt": "hello"}}
        async with serving(strict_model_id=True) as served, await served.wire() as wire:
            for path, value in bodies.items():
                for name in ("other", "", "fake ", "org/fake"):
                    answer = await wire.post(path, {**value, "model": name, "stream": stream})
                    assert answer.status == 404
                    assert answer.error["code"] == "model_not_found"
                    assert answer.error["param"] == "model"
                for named in ({"model": "fake"}, {"model": None}, {}):
                    answer = await wire.post(path, {**value, **named, "stream": stream})
                    assert answer.status == 200
            assert served.num_live == 0
        async with serving() as served, await served.wire() as wire:
            for path, value in bodies.items():
                answer = await wire.post(path, {**value, "model": "other", "stream": stream})
                assert answer.status == 200
                text = answer.body.decode()
                assert '"model":"fake"' in text
                assert "other" not in text

    test()
