"""Likelihoods of prompts over HTTP: `prompt_logprobs`, and `echo` with `logprobs`.

First around a scripted runner, whose numbers encode their places; then a real model, by the way
that lm-evaluation-harness reads the answers, against mlx-lm's model in this process.
"""

from typing import Any

import pytest
from helpers import FakeModel, Wire, chat_body, in_a_loop, serving
from server_cases import CHAT, COMPLETIONS, ids, stream


async def complete(wire: Wire, prompt: Any, **fields: Any) -> Any:
    answer = await wire.post(COMPLETIONS, {"prompt": prompt, **fields})
    assert answer.status == 200, answer.body
    return answer.json


def assert_legacy(logprobs: Any, tokens: str, num_prompt: int, num_top: int) -> None:
    """The lists of a prompt and its answer, as the scripted runner makes them."""
    assert logprobs["tokens"] == list(tokens)
    values = [None, *(-float(place) for place in range(1, num_prompt))]
    values += [-0.5 - place for place in range(len(tokens) - num_prompt)]
    assert logprobs["token_logprobs"] == values
    assert logprobs["text_offset"] == list(range(len(tokens)))
    tops = [None, *({chr(ord(t) + i): v - i for i in range(num_top)} for t, v in
                    list(zip(tokens, values, strict=True))[1:])]  # fmt: skip
    assert logprobs["top_logprobs"] == tops


@pytest.mark.parametrize("prompt", ["hello", "x", ids("hello"), "日本 🙂"])
@pytest.mark.parametrize("num_top", [0, 1, 3])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize("chunk", [2, 2048])
def test_an_echo_with_logprobs_covers_the_prompt_and_then_the_output(
    prompt: Any, num_top: int, max_tokens: int, chunk: int
) -> None:
    @in_a_loop
    async def test() -> None:
        asked = {"echo": True, "logprobs": num_top, "max_tokens": max_tokens}
        text = prompt if isinstance(prompt, str) else "hello"
        async with serving(prefill_chunk_size=chunk) as served, await served.wire() as wire:
            answer = await complete(wire, [prompt, "zz"], **asked)
            for own, choice in zip((text, "zz"), answer["choices"], strict=True):
                assert choice["text"] == own + own[:max_tokens]
                end = "" if max_tokens <= len(own) else "\0"  # the end has no text, but a logprob
                if not end:
                    assert_legacy(choice["logprobs"], choice["text"], len(own), num_top)
                else:
                    assert choice["logprobs"]["tokens"] == [*own, *own, ""]
            assert answer["usage"]["prompt_tokens"] == len(text) + 2
            if max_tokens == 0:
                assert answer["usage"]["completion_tokens"] == 0
                assert {c["finish_reason"] for c in answer["choices"]} == {"length"}
            chunks = await stream(wire, COMPLETIONS, {"prompt": [prompt, "zz"], **asked})
            for index, choice in enumerate(answer["choices"]):
                parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
                assert "".join(part["text"] for part in parts) == choice["text"]
                for name, values in choice["logprobs"].items():
                    found = [v for part in parts for v in (part["logprobs"] or {}).get(name, ())]
                    assert found == values

    test()


@in_a_loop
async def test_every_choice_begins_with_its_prompts_likelihoods_which_are_computed_once() -> None:
    async with serving() as served, await served.wire() as wire:
        asked = {"echo": True, "logprobs": 1, "max_tokens": 2, "n": 3, "seed": 0, "temperature": 1}
        answer = await complete(wire, ["abcd", "xyz"], **asked)
        assert served.runner.num_scored == 3 + 2
        for i, choice in enumerate(answer["choices"]):
            own = ("abcd", "xyz")[i // 3]
            assert choice["text"].startswith(own)
            values = choice["logprobs"]["token_logprobs"]
            assert values[: len(own)] == [None, -1.0, -2.0, -3.0][: len(own)]
            assert len(values) == len(choice["logprobs"]["tokens"])


@in_a_loop
async def test_prompt_logprobs_have_vllms_form() -> None:
    async with serving(prefill_chunk_size=2) as served, await served.wire() as wire:
        answer = await complete(wire, ["abc", "x"], prompt_logprobs=2, max_tokens=1, n=2)
        first, same, other, _ = [choice["prompt_logprobs"] for choice in answer["choices"]]

        def entry(text: str, logprob: float, rank: int) -> dict[str, Any]:
            return {"logprob": logprob, "rank": rank, "decoded_token": text}

        assert first == [
            None,
            {"98": entry("b", -1.0, 1), "99": entry("c", -2.0, 2)},
            {"99": entry("c", -2.0, 1), "100": entry("d", -3.0, 2)},
        ]
        assert same == first
        assert other == [None]
        chat = await wire.post(CHAT, chat_body("abc", prompt_logprobs=0, max_tokens=0))
        places = [None, {"98": entry("b", -1.0, 1)}, {"99": entry("c", -2.0, 1)}]
        assert chat.json["prompt_logprobs"] == places
        assert chat.json["choices"][0]["message"]["content"] == ""
        assert chat.json["usage"]["completion_tokens"] == 0
        refused = await wire.post(CHAT, chat_body("abc", prompt_logprobs=1, stream=True))
        assert (refused.status, refused.error["param"]) == (400, "prompt_logprobs")


@in_a_loop
async def test_an_echo_leaves_special_tokens_and_a_first_space_out_of_its_offsets() -> None:
    async with serving(model=FakeModel(bos=0x2B3F)) as served, await served.wire() as wire:
        hidden = served.server.service.need_model().model
        shown = type(hidden).detokenize
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                type(hidden),
                "detokenize",
                lambda self, tokens: shown(self, [t for t in tokens if t != 0x2B3F]),
            )
            answer = await complete(wire, "abc", echo=True, logprobs=1, max_tokens=0)
        (choice,) = answer["choices"]
        assert choice["logprobs"]["tokens"] == ["\u2b3f", "a", "b", "c"]
        assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]


@in_a_loop
async def test_without_max_tokens_a_completion_has_sixteen_tokens() -> None:
    endless = "abcdefgh" * 10
    async with serving() as served, await served.wire() as wire:
        for limit, num in (({}, 16), ({"n_predict": -1}, 80), ({"max_tokens": -1}, 80)):
            answer = await complete(wire, endless, **limit)
            assert len(answer["choices"][0]["text"]) == num
    async with serving(max_tokens=20) as served, await served.wire() as wire:
        assert len((await complete(wire, endless))["choices"][0]["text"]) == 20
