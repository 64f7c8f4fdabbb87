"""Embeddings: inputs, passes, streams beside them. Real models: `test_openai_sdk`.

Over HTTP, around a scripted runner that repeats the characters of its prompt: each text, count and
place is known in advance.
"""

import base64
import json
import struct
import threading
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
import pytest
from helpers import (
    ENDLESS,
    EOS,
    NUM_DIMENSIONS,
    FakeModel,
    ScriptedRunner,
    Wire,
    in_a_loop,
    request,
    serving,
    until,
)
from server_cases import EMBEDDINGS, ids

from mlxlite.engine.embeddings import EMBED_TOKENS
from mlxlite.engine.step import Part


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
        ({"input": ["a"] * 2049}, "input"),
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
