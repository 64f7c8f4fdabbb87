"""Tokenize and detokenize, in llama-server's and vLLM's dialects.

Over HTTP, around a scripted runner that repeats the characters of its prompt: each text, count and
place is known in advance.
"""

from collections.abc import Sequence as SequenceOf

import pytest
from helpers import EOS, FakeModel, in_a_loop, serving
from server_cases import COMPLETIONS, EMBEDDINGS, ids


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
                found = (await wire.post(f"{prefix}/tokenize", {name: text})).json
                assert found == {
                    "tokens": ids(text),
                    "count": len(text),
                    "max_model_len": served.model.context_size,
                }
                back = (await wire.post(f"{prefix}/detokenize", {"tokens": found["tokens"]})).json
                assert back[name] == text

    test()


@in_a_loop
async def test_pieces_of_half_characters_are_lists_of_bytes() -> None:
    async with serving(Halves()) as served, await served.wire() as wire:
        asked = {"content": "aé", "with_pieces": True, "return_token_strs": True}
        found = (await wire.post("/tokenize", asked)).json
        assert found["tokens"] == [
            {"id": 97, "piece": "a"},
            {"id": 0xC3, "piece": [0xC3]},
            {"id": 0xA9, "piece": [0xA9]},
        ]
        assert found["token_strs"] == ["a", "\ufffd", "\ufffd"]
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
            answer = await wire.post("/tokenize", {"content": "ab", **fields})
            assert answer.json["tokens"] == ids(expected)


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
