"""Embeddings of real models: a vector is what the model's own states say, however it is computed.

In batches, in parts, and alone; the demo model and the tiny random one, in float32 on CPU.
"""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import connect, in_a_loop
from mlx import nn

import mlxlite
from mlxlite.config.options import Config
from mlxlite.engine import embeddings as embeddings_module
from mlxlite.engine.step import Part
from mlxlite.models.load import load
from mlxlite.runner.model_runner import ModelRunner

NUM_LONG = 150  # tokens: three parts, of the size that the tests set
PART = 64


@pytest.fixture(scope="module", autouse=True)
def _without_compilation() -> Iterator[None]:
    """On CPU each new kernel costs seconds of a C++ compiler, and none of them is ours."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def tiny(checkpoint: Path) -> nn.Module:
    network, _ = load(Config(model=str(checkpoint)))
    return network


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings_module, "EMBED_TOKENS", PART)


def states(network: nn.Module, tokens: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The last layer's, after its norm, of one input alone and without a cache."""
    hidden = network.model(mx.array([tokens]))
    return np.array(hidden[0].astype(mx.float32))


def unit(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    scaled: np.ndarray[Any, Any] = vector / np.linalg.norm(vector)
    return scaled


def pooled(network: nn.Module, tokens: tuple[int, ...], *, is_mean: bool) -> np.ndarray[Any, Any]:
    found = states(network, tokens)
    return unit(found.mean(axis=0) if is_mean else found[-1])


def text_tokens(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((7 * seed + 3 * i * i) % 300 for i in range(length))


@pytest.mark.parametrize("is_mean", [False, True])
def test_a_vector_is_the_models_own_states_pooled(tiny: nn.Module, is_mean: bool) -> None:
    for length in (1, 2, 50):
        tokens = text_tokens(length)
        (vector,) = ModelRunner(tiny).embed([tokens], is_mean=is_mean)
        assert np.allclose(vector, pooled(tiny, tokens, is_mean=is_mean), atol=1e-5)
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("is_mean", [False, True])
def test_inputs_embedded_together_equal_those_embedded_alone(
    tiny: nn.Module, is_mean: bool
) -> None:
    runner = ModelRunner(tiny)
    inputs = [text_tokens(length, length) for length in (7, 1, 30, 2, 31, 64)]
    together = runner.embed(inputs, is_mean=is_mean)
    alone = [runner.embed([tokens], is_mean=is_mean)[0] for tokens in inputs]
    assert np.allclose(together, alone, atol=1e-5)
    assert len({tuple(vector) for vector in together}) == len(inputs)


@pytest.mark.parametrize("is_mean", [False, True])
@pytest.mark.parametrize("sizes", [(100, 100), (1, 199), (199, 1), (64, 64, 64, 8)])
def test_an_input_in_parts_equals_the_whole(
    tiny: nn.Module, sizes: tuple[int, ...], is_mean: bool
) -> None:
    runner = ModelRunner(tiny)
    tokens = text_tokens(200)
    (whole,) = runner.embed([tokens], is_mean=is_mean)
    vectors: list[list[float]] = []
    at = 0
    for size in sizes:
        assert vectors == []
        part = Part(1, at + size == len(tokens))
        vectors = runner.embed([tokens[at : at + size]], is_mean=is_mean, part=part)
        at += size
        assert (1 in runner._embedder.unfinished) is not part.is_last
    assert np.allclose(vectors[0], whole, atol=1e-4)


def test_inputs_in_parts_do_not_mix_and_can_be_dropped(tiny: nn.Module) -> None:
    runner = ModelRunner(tiny)
    inputs = {1: text_tokens(90, 1), 2: text_tokens(90, 2)}
    for id, tokens in inputs.items():
        assert runner.embed([tokens[:50]], is_mean=True, part=Part(id, False)) == []
    assert runner._embedder.unfinished.keys() == {1, 2}
    runner.drop_embedding(1)
    runner.drop_embedding(1)
    runner.drop_embedding(7)
    assert runner._embedder.unfinished.keys() == {2}
    (vector,) = runner.embed([inputs[2][50:]], is_mean=True, part=Part(2, True))
    assert np.allclose(vector, pooled(tiny, inputs[2], is_mean=True), atol=1e-4)
    runner.embed([inputs[1][:50]], is_mean=True, part=Part(3, False))
    runner.reset()
    assert runner._embedder.unfinished == {}


def test_a_model_without_accessible_states_has_no_embeddings() -> None:
    class Opaque(nn.Module):  # type: ignore[misc]
        layers: tuple[nn.Module, ...] = ()

        def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
            return mx.zeros((*tokens.shape, 7))

    with pytest.raises(NotImplementedError, match="states"):
        ModelRunner(Opaque()).embed([(1, 2)], is_mean=False)


# --- served: the demo model -----------------------------------------------------------------------


async def vectors(server: mlxlite.Server, input: Any, **fields: Any) -> np.ndarray[Any, Any]:
    async with await connect(server) as wire:
        answer = await wire.post("/v1/embeddings", {"input": input, **fields})
    assert answer.status == 200
    return np.array([item["embedding"] for item in answer.json["data"]])


@in_a_loop
async def test_the_demo_embeds_texts_of_all_lengths_as_each_alone() -> None:
    async with mlxlite.Server(Config(port=0, shutdown_grace_s=0.05)) as server:
        texts = ["Hello!", "Hi.", "What is the capital of France?", "Count to 5. " * 20]
        for pooling in ("last", "mean"):
            together = await vectors(server, texts, pooling=pooling)
            alone = [(await vectors(server, text, pooling=pooling))[0] for text in texts]
            assert np.allclose(together, alone, atol=1e-5)
            assert np.allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
            short = await vectors(server, texts, pooling=pooling, dimensions=32)
            assert np.allclose(short, [unit(vector[:32]) for vector in together], atol=1e-6)


def test_a_long_input_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    @in_a_loop
    async def test() -> None:
        async with mlxlite.Server(Config(port=0, shutdown_grace_s=0.05)) as server:
            assert server.service.ready is not None
            runner = server.service.ready.engine._runner
            assert isinstance(runner, ModelRunner)
            inputs = [list(text_tokens(NUM_LONG)), list(text_tokens(NUM_LONG - 1, 5)), [5]]
            for pooling in ("last", "mean"):
                monkeypatch.setattr(embeddings_module, "EMBED_TOKENS", PART)
                in_parts = await vectors(server, inputs, pooling=pooling)
                monkeypatch.setattr(embeddings_module, "EMBED_TOKENS", 10_000)
                whole = await vectors(server, inputs, pooling=pooling)
                assert np.allclose(in_parts, whole, atol=1e-4)
            assert runner._embedder.unfinished == {}

    test()


@pytest.mark.usefixtures("small_parts")
def test_a_disconnect_in_the_middle_of_an_input_leaves_no_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @in_a_loop
    async def test() -> None:
        async with mlxlite.Server(Config(port=0, shutdown_grace_s=0.05)) as server:
            assert server.service.ready is not None
            runner = server.service.ready.engine._runner
            assert isinstance(runner, ModelRunner)
            half_done = []
            embed = runner.embed

            def counting(*args: Any, **kwargs: Any) -> list[list[float]]:
                found = embed(*args, **kwargs)
                half_done.append(len(runner._embedder.unfinished))
                return found

            monkeypatch.setattr(runner, "embed", counting)
            tokens = tuple(text_tokens(NUM_LONG))
            is_wanted = iter([True, True, False])
            found = await server.service.ready.engine.embedder.embed(
                [tokens], is_mean=False, is_wanted=lambda: next(is_wanted)
            )
            assert found is None
            assert half_done == [1, 1]
            assert runner._embedder.unfinished == {}

    test()


@pytest.mark.usefixtures("small_parts")
@in_a_loop
async def test_the_demo_embeds_while_it_streams_and_the_stream_is_none_the_worse() -> None:
    async with mlxlite.Server(Config(port=0, shutdown_grace_s=0.05)) as server:
        body = {"messages": [{"role": "user", "content": "Tell me a story."}], "temperature": 0}
        async with await connect(server) as wire:
            alone = (await wire.post("/v1/chat/completions", body)).json
            embedding, beside = await asyncio.gather(
                vectors(server, [list(text_tokens(NUM_LONG)), "Hello!"]),
                wire.post("/v1/chat/completions", {**body, "cache_prompt": False}),
            )
            assert beside.json["choices"] == alone["choices"]
            assert embedding.shape[0] == 2


@in_a_loop
async def test_the_demos_tokens_are_the_prompt_that_a_chat_is_prefilled_with() -> None:
    async with (
        mlxlite.Server(Config(port=0, shutdown_grace_s=0.05)) as server,
        await connect(server) as wire,
    ):
        thinking = {"chat_template_kwargs": {"enable_thinking": True}}
        messages = [{"role": "user", "content": "What is 2 + 2?"}]
        begun = [*messages, {"role": "assistant", "content": "2 + 2 ="}]
        for chat, fields in (
            (messages, {}),
            (messages, thinking),
            (begun, {}),
        ):
            asked = {"messages": chat, **fields}
            counted = (await wire.post("/tokenize", asked)).json
            answer = (await wire.post("/v1/chat/completions", {**asked, "max_tokens": 1})).json
            assert answer["usage"]["prompt_tokens"] == counted["count"]
            request = {"prompt": counted["tokens"], "max_tokens": 20, "temperature": 0}
            completed = (await wire.post("/v1/completions", request)).json
            # in one text, as a completion has it
            whole = {**asked, "max_tokens": 20, "temperature": 0, "reasoning_format": "none"}
            chat = (await wire.post("/v1/chat/completions", whole)).json
            assert completed["choices"][0]["text"] == chat["choices"][0]["message"]["content"]


@in_a_loop
async def test_the_demos_text_is_there_and_back_byte_for_byte() -> None:
    async with (
        mlxlite.Server(Config(port=0, shutdown_grace_s=0.05)) as server,
        await connect(server) as wire,
    ):
        for text in ("Hello, how are you?", "  two  spaces ", "🙂 日本語 äöü", "a\n\tb\n"):
            answer = (await wire.post("/tokenize", {"content": text, "with_pieces": True})).json
            assert answer["count"] == len(answer["tokens"])
            raw = b"".join(
                piece.encode() if isinstance(piece, str) else bytes(piece)
                for piece in (token["piece"] for token in answer["tokens"])
            )
            assert raw.decode() == text
            tokens = [token["id"] for token in answer["tokens"]]
            back = await wire.post("/detokenize", {"tokens": tokens})
            assert back.json == {"content": text, "prompt": text}
        halves = [token for token in answer["tokens"] if isinstance(token["piece"], list)]
        assert halves == []
        emoji = (await wire.post("/tokenize", {"content": "🙂", "with_pieces": True})).json
        assert any(isinstance(token["piece"], list) for token in emoji["tokens"])
        raw = json.dumps({"content": "\ud800"}).encode()
        assert (await wire.ask("POST", "/tokenize", raw)).status == 400
