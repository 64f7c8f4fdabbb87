"""The official `openai` client against a real model, served in this process."""

import asyncio
import logging
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from helpers import TIMEOUT_S, in_a_loop
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion

import mlxlite
from mlxlite.sequence import LoadError

MODEL = "tiny"
KEY = "a-key"


@contextmanager
def serving(config: mlxlite.Config) -> Iterator[mlxlite.Server]:
    """A server in a thread that has a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-loop")
    thread.start()

    def call(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    try:
        server = mlxlite.Server(config)
        call(server.__aenter__())
        yield server
        call(server.__aexit__(None, None, None))
        call(loop.shutdown_default_executor())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(TIMEOUT_S)
        loop.close()


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[mlxlite.Server]:
    """Its context is longer than the model was made for, so that a stream goes on for long."""
    settings: dict[str, Any] = {"model": str(checkpoint), "model_id": MODEL, "api_key": (KEY,)}
    config = mlxlite.Config(**settings, port=0, ctx_size=100_000, shutdown_grace_s=0.1)
    with serving(config) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: mlxlite.Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


def create(client: OpenAI, content: str = "Hello", **fields: Any) -> ChatCompletion:
    fields = {"model": MODEL, "max_tokens": 12, "temperature": 0, **fields}
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": content}], **fields
    )
    assert isinstance(answer, ChatCompletion)
    return answer


def text_of(answer: ChatCompletion) -> str:
    text = answer.choices[0].message.content
    assert text is not None
    return text


def stream(client: OpenAI, content: str = "Hello", **fields: Any) -> Any:
    fields = {"model": MODEL, "max_tokens": 12, "temperature": 0, **fields}
    return client.chat.completions.create(
        messages=[{"role": "user", "content": content}], stream=True, **fields
    )


def metric(server: mlxlite.Server, name: str, label: str = "") -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    (value,) = re.findall(rf"^{re.escape(name)}\{{[^}}]*{label}[^}}]*\}} (\S+)$", text, re.M)
    return float(value)


def test_create_answers_with_the_words_usage_and_reason(client: OpenAI) -> None:
    answer = create(client)
    assert answer.model == MODEL
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    ChatCompletion.model_validate_json(answer.model_dump_json(), strict=True)


def test_a_stream_is_the_same_answer_in_pieces(client: OpenAI) -> None:
    whole = create(client)
    chunks = list(stream(client))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text_of(whole)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].timings["predicted_n"] == 12


def test_usage_comes_in_a_last_chunk_without_choices(client: OpenAI) -> None:
    chunks = list(stream(client, stream_options={"include_usage": True}))
    assert [chunk.usage is not None for chunk in chunks].count(True) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


def test_the_clients_own_accumulator_takes_our_stream(client: OpenAI) -> None:
    stop = text_of(create(client))[5:8]
    whole = create(client, stop=stop)
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=12,
        temperature=0,
        stop=stop,
    ) as events:
        assert any(event.type == "content.delta" for event in events)
        final = events.get_final_completion()
    assert final.choices[0].message.content == text_of(whole)
    assert final.choices[0].finish_reason == "stop"
    assert final.usage == whole.usage


def test_a_stop_string_ends_the_answer_before_it(client: OpenAI) -> None:
    text = text_of(create(client, max_tokens=30))
    stop = text[len(text) // 2 :][:3]
    answer = create(client, max_tokens=30, stop=[stop])
    assert answer.choices[0].finish_reason == "stop"
    assert text_of(answer) == text[: text.index(stop)]
    assert "".join(
        chunk.choices[0].delta.content or "" for chunk in stream(client, max_tokens=30, stop=stop)
    ) == text_of(answer)


def test_max_tokens_bounds_the_answer(client: OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        fields = {"max_tokens": openai.omit, name: 5}
        answer = create(client, **fields)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        assert answer.choices[0].finish_reason == "length"


def test_a_seed_repeats_its_text_alone_and_in_company(client: OpenAI) -> None:
    alone = text_of(create(client, temperature=1, seed=7, max_tokens=20))
    assert text_of(create(client, temperature=1, seed=7, max_tokens=20)) == alone
    assert text_of(create(client, temperature=1, seed=8, max_tokens=20)) != alone
    assert text_of(create(client, temperature=1, max_tokens=20)) != alone

    def one(seed: int) -> str:
        return text_of(create(client, temperature=1, seed=seed, max_tokens=20))

    with ThreadPoolExecutor(4) as pool:
        assert alone == list(pool.map(one, (1, 7, 3, 4)))[1]


def test_eight_at_once_each_get_the_bytes_they_get_alone(client: OpenAI) -> None:
    contents = [f"{'word ' * n}{n}" for n in range(8)]
    alone = [text_of(create(client, content, max_tokens=40)) for content in contents]
    assert len(set(alone)) > 1, "the prompt makes a difference"
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(
            lambda content: text_of(create(client, content, max_tokens=40)), contents
        )
        assert list(together) == alone


def test_errors_are_the_clients_own_exceptions(server: mlxlite.Server, client: OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("nope")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, temperature=-1)
    assert refused.value.param == "temperature"
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as unsupported:
        create(client, n=2)
    assert unsupported.value.code == "unsupported_parameter"
    assert unsupported.value.param == "n"
    with pytest.raises(openai.BadRequestError) as too_long:
        create(client, "x " * 100_000)
    assert too_long.value.code == "context_length_exceeded"


def test_models_can_be_listed_and_retrieved(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "mlx"


def test_a_stream_that_is_closed_early_frees_its_row(
    server: mlxlite.Server, client: OpenAI
) -> None:
    def num_aborted() -> float:
        return metric(server, "vllm:request_success_total", 'finished_reason="abort"')

    before = num_aborted()
    with stream(client, max_tokens=90_000) as chunks:
        for chunk in chunks:
            if chunk.choices[0].delta.content:
                break
        assert metric(server, "vllm:num_requests_running") == 1
    give_up_at = time.monotonic() + TIMEOUT_S
    while metric(server, "vllm:num_requests_running") != 0:
        assert time.monotonic() < give_up_at, "it goes on generating for nobody"
    assert num_aborted() == before + 1


def test_a_raw_response_has_its_request_id(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=1,
        extra_headers={"x-request-id": "mine-1"},
        extra_body={"nobody_knows": 1},
    )
    assert raw.request_id == "mine-1"
    assert raw.headers["x-mlxlite-ignored"] == "nobody_knows"
    assert create(client, max_tokens=1)._request_id.startswith("req_")


# --- embedding ------------------------------------------------------------------------------------


def _state() -> list[object]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    root = logging.getLogger()
    return [*map(signal.getsignal, numbers), list(root.handlers), root.level]


@in_a_loop
async def _embed(checkpoint: Path) -> None:
    before = _state()
    config = mlxlite.Config(model=str(checkpoint), port=0)
    async with mlxlite.Server(config) as one, mlxlite.Server(config) as two:
        assert _state() == before
        texts = []
        for server in (one, two):
            base_url = f"{server.url}/v1"
            async with AsyncOpenAI(base_url=base_url, api_key="-", max_retries=0) as client:
                answer = await client.chat.completions.create(
                    model="any",
                    messages=[{"role": "user", "content": "Hello"}],
                    max_tokens=8,
                    temperature=0,
                )
                assert answer.model == checkpoint.name
                texts.append(answer.choices[0].message.content)
        assert one.url != two.url
        assert texts[0] == texts[1]
    assert _state() == before


def test_two_servers_are_embedded_in_somebody_elses_loop(checkpoint: Path) -> None:
    _embed(checkpoint)


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@in_a_loop
async def test_a_model_that_is_not_there_is_a_loaderror_and_the_port_is_free_again() -> None:
    port = free_port()
    for _ in range(2):
        with pytest.raises(LoadError, match="no such file"):
            async with mlxlite.Server(mlxlite.Config(model="/nowhere/at/all", port=port)):
                pytest.fail("there is no model")
