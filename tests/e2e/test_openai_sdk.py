"""The official `openai` client against a real model, served in this process."""

import logging
import re
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
from checkpoints import save_checkpoint
from helpers import TIMEOUT_S, in_a_loop
from live import serving
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionTokenLogprob

import mlxlite
from mlxlite.models.interface import LoadError

MODEL = "tiny"
KEY = "a-key"


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[mlxlite.Server]:
    """Its context is longer than the model was made for, so that a stream is long."""
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


def test_usage_is_in_a_last_chunk_without_choices(client: OpenAI) -> None:
    chunks = list(stream(client, stream_options={"include_usage": True}))
    assert [chunk.usage is not None for chunk in chunks].count(True) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


def test_the_clients_own_accumulator_reads_the_stream(client: OpenAI) -> None:
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


def test_a_seed_repeats_its_text_alone_and_in_a_batch(client: OpenAI) -> None:
    alone = text_of(create(client, temperature=1, seed=7, max_tokens=20))
    assert text_of(create(client, temperature=1, seed=7, max_tokens=20)) == alone
    assert text_of(create(client, temperature=1, seed=8, max_tokens=20)) != alone
    assert text_of(create(client, temperature=1, max_tokens=20)) != alone

    def one(seed: int) -> str:
        return text_of(create(client, temperature=1, seed=seed, max_tokens=20))

    with ThreadPoolExecutor(4) as pool:
        assert alone == list(pool.map(one, (1, 7, 3, 4)))[1]


def test_eight_concurrent_chats_have_the_same_bytes_as_alone(client: OpenAI) -> None:
    contents = [f"{'word ' * n}{n}" for n in range(8)]
    alone = [text_of(create(client, content, max_tokens=40)) for content in contents]
    assert len(set(alone)) > 1, "the prompt makes a difference"
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(
            lambda content: text_of(create(client, content, max_tokens=40)), contents
        )
        assert list(together) == alone


def texts_of(answer: ChatCompletion) -> list[str]:
    assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
    return [choice.message.content or "" for choice in answer.choices]


def tokens_of(answer: ChatCompletion, index: int = 0) -> list[ChatCompletionTokenLogprob]:
    logprobs = answer.choices[index].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    return logprobs.content


def test_choices_are_distinct_and_a_seed_repeats_them(client: OpenAI) -> None:
    answer = create(client, n=4, temperature=1, seed=7)
    texts = texts_of(answer)
    assert len(set(texts)) == 4
    assert texts_of(create(client, n=4, temperature=1, seed=7)) == texts
    assert texts_of(create(client, n=2, temperature=1, seed=7)) == texts[:2]
    assert [text_of(create(client, temperature=1, seed=7 + i)) for i in range(4)] == texts
    assert answer.usage is not None
    alone = create(client, max_tokens=1).usage
    assert alone is not None
    assert answer.usage.prompt_tokens == alone.prompt_tokens
    assert answer.usage.completion_tokens == 4 * 12
    assert len(set(texts_of(create(client, n=3)))) == 1, "greedy choices are alike"


def test_streamed_choices_are_the_whole_ones(client: OpenAI) -> None:
    fields = {"n": 3, "temperature": 1, "seed": 7}
    whole = create(client, **fields)
    chunks = list(stream(client, **fields))
    texts, reasons = ["", "", ""], ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] += choice.finish_reason or ""
    assert texts == texts_of(whole)
    assert reasons == ["length"] * 3
    assert [chunk.usage for chunk in chunks if chunk.usage is not None] == [whole.usage]


def test_the_clients_own_accumulator_takes_a_stream_of_choices(client: OpenAI) -> None:
    stop: dict[str, Any] = {
        "n": 2,
        "logit_bias": {"65": 100},
        "extra_body": {"stop_token_ids": [65]},
    }
    with client.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": "Hello"}], logprobs=True, **stop
    ) as events:
        final = events.get_final_completion()
    assert [choice.index for choice in final.choices] == [0, 1]
    assert [choice.finish_reason for choice in final.choices] == ["stop", "stop"]


def test_logprobs_name_the_drawn_token_and_its_rivals(client: OpenAI) -> None:
    greedy = create(client, logprobs=True, top_logprobs=3)
    entries = tokens_of(greedy)
    assert len(entries) == 12
    for entry in entries:
        assert entry.bytes is not None
        assert entry.token == bytes(entry.bytes).decode("utf-8", "replace")
        assert len(entry.top_logprobs) == 3
        best, *rest = entry.top_logprobs
        assert best.bytes == entry.bytes, "greedy draws the best"
        assert best.logprob == entry.logprob < 0
        assert all(a.logprob >= b.logprob for a, b in pairwise((best, *rest)))
    drawn = tokens_of(create(client, temperature=1, seed=3, logprobs=True))
    assert all(entry.top_logprobs == [] for entry in drawn)
    assert create(client).choices[0].logprobs is None


def test_streamed_logprobs_are_the_whole_ones(client: OpenAI) -> None:
    fields = {"n": 2, "temperature": 1, "seed": 7, "logprobs": True, "top_logprobs": 2}
    whole = create(client, **fields)
    streamed: list[list[Any]] = [[], []]
    for chunk in stream(client, **fields):
        for choice in chunk.choices:
            if choice.logprobs is not None:
                streamed[choice.index] += choice.logprobs.content
    for index in range(2):
        assert [item.model_dump() for item in streamed[index]] == [
            item.model_dump() for item in tokens_of(whole, index)
        ]


def test_a_bias_forces_a_token_or_forbids_one(client: OpenAI) -> None:
    forced = create(client, logit_bias={"65": 100}, logprobs=True)
    first, *others = tokens_of(forced)
    assert all(entry.bytes == first.bytes for entry in others)
    assert first.logprob < 0, "logprobs are of the model, before any setting"
    free: dict[str, Any] = {"temperature": 1, "seed": 7, "max_tokens": 60, "logprobs": True}
    nearby = create(client, logit_bias={"65": 4, "66": 4}, **free)
    assert first.bytes in [entry.bytes for entry in tokens_of(nearby)]
    forbidden = create(client, logit_bias={"65": -100, "66": 4}, **free)
    assert first.bytes not in [entry.bytes for entry in tokens_of(forbidden)]


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
        {"extra_body": {"repetition_penalty": 1.5}},
        {"extra_body": {"repeat_penalty": 1.5, "repeat_last_n": 4}},
        {"temperature": 1, "seed": 7, "extra_body": {"xtc_probability": 1, "xtc_threshold": 0.001}},
        {"temperature": 1, "seed": 7, "extra_body": {"top_k": 2}},
        {"temperature": 1, "seed": 7, "top_p": 0.05},
    ],
    ids=repr,
)
def test_a_setting_changes_the_outcome(client: OpenAI, fields: dict[str, Any]) -> None:
    silent = {name: value for name, value in fields.items() if name in ("temperature", "seed")}
    # A bias that makes the model repeat itself, so that there is something to penalise.
    common = {"logit_bias": {"65": 3, "66": 3}, "max_tokens": 30}
    changed = text_of(create(client, **common, **fields))
    assert changed != text_of(create(client, **common, **silent))
    assert changed == text_of(create(client, **common, **fields))


def test_a_frequency_penalty_leaves_no_token_drawn_twice_in_a_row(client: OpenAI) -> None:
    """Each repetition costs 2, and the bias lifts two tokens above the rest by a little."""
    common: dict[str, Any] = {"logit_bias": {"65": 20}, "logprobs": True, "max_tokens": 12}
    stuck = [tuple(entry.bytes or ()) for entry in tokens_of(create(client, **common))]
    assert len(set(stuck)) == 1
    freed = tokens_of(create(client, **common, frequency_penalty=2))
    assert len({tuple(entry.bytes or ()) for entry in freed}) > 1


def test_end_tokens_can_be_named_put_off_and_ignored(client: OpenAI) -> None:
    def num_tokens(**fields: Any) -> tuple[int, str]:
        answer = create(client, logit_bias={"65": 100}, extra_body=fields)
        assert answer.usage is not None
        return answer.usage.completion_tokens, answer.choices[0].finish_reason

    assert num_tokens() == (12, "length")
    assert num_tokens(stop_token_ids=[65]) == (1, "stop")
    assert num_tokens(stop_token_ids=[65], min_tokens=5) == (6, "stop")
    assert num_tokens(stop_token_ids=[65, 2**31 - 1], ignore_eos=True) == (1, "stop")


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 1, "seed": 7, "n": 3},
    {"logprobs": True, "top_logprobs": 5},
    {"temperature": 1, "seed": 8, "logprobs": True, "top_logprobs": 2},
    {"logit_bias": {"65": 4, "66": 3}, "frequency_penalty": 0.5, "logprobs": True},
    {"temperature": 0.7, "seed": 9, "top_p": 0.8, "extra_body": {"top_k": 20, "min_p": 0.01}},
    {"extra_body": {"repeat_penalty": 1.12, "repeat_last_n": 8, "min_tokens": 3}},
    {"temperature": 1, "seed": 5, "extra_body": {"xtc_probability": 0.5, "xtc_threshold": 0.01}},
]


def said(answer: ChatCompletion) -> list[tuple[str | None, list[tuple[str, int]]]]:
    """Texts, and each token with the number of rivals that were asked for."""
    return [
        (
            choice.message.content,
            [
                (entry.token, len(entry.top_logprobs))
                for entry in (choice.logprobs and choice.logprobs.content) or ()
            ],
        )
        for choice in answer.choices
    ]


def test_a_mixed_batch_gives_each_request_the_same_answer_as_alone(client: OpenAI) -> None:
    jobs = [(f"{'word ' * n}{n}", fields) for n, fields in enumerate(MIXED)]

    def one(asked: tuple[str, dict[str, Any]]) -> ChatCompletion:
        return create(client, asked[0], **{"max_tokens": 30, **asked[1]})

    alone = [one(asked) for asked in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(one, jobs))
    for fields, (a, b) in zip(MIXED, zip(alone, together, strict=True), strict=True):
        assert said(a) == said(b), fields
        for x, y in zip(a.choices, b.choices, strict=True):
            if x.logprobs is None or y.logprobs is None:
                continue
            for left, right in zip(x.logprobs.content or (), y.logprobs.content or (), strict=True):
                assert left.logprob == pytest.approx(right.logprob, abs=1e-3)


def test_top_logprobs_have_the_requested_number_in_a_mixed_batch(client: OpenAI) -> None:
    def one(num: int) -> set[int]:
        answer = create(client, logprobs=True, top_logprobs=num, max_tokens=60)
        return {len(entry.top_logprobs) for entry in tokens_of(answer)}

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, (0, 2, 5, 20))) == [{0}, {2}, {5}, {20}]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A client of a server that keeps keys and values in 8 bits."""
    path = save_checkpoint(tmp_path_factory.mktemp("models") / "wide-heads", head_dim=32)
    config = mlxlite.Config(model=str(path), port=0, kv_bits=8, kv_group_size=32)
    with (
        serving(config) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=30) as client,
    ):
        yield client


def test_a_cache_in_few_bits_batches_like_any_other(quantised: OpenAI) -> None:
    jobs = [(f"{'word ' * n}{n}", fields) for n, fields in enumerate(MIXED[:4])]

    def one(asked: tuple[str, dict[str, Any]]) -> list[str]:
        return texts_of(create(quantised, asked[0], **{"max_tokens": 30, **asked[1]}))

    alone = [one(asked) for asked in jobs]
    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(one, jobs)) == alone


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
        create(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert unsupported.value.code == "unsupported_parameter"
    assert unsupported.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as no_token:
        create(client, logit_bias={"1000000": 1})
    assert no_token.value.param == "logit_bias"
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
        assert time.monotonic() < give_up_at, "it generates on after the disconnect"
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


# --- completions, embeddings, models ------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["Hello", ["Hello", "A stream"], [5, 6, 7], [[5, 6], [7]]])
@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"echo": True}, {"logprobs": 3}])
def test_a_completion_is_the_fold_of_its_stream(
    client: OpenAI, prompt: Any, fields: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**asked, **fields)
    is_many = isinstance(prompt[0], str | list) and not isinstance(prompt, str)
    assert len(whole.choices) == (len(prompt) if is_many else 1) * fields.get("n", 1)
    texts = dict.fromkeys(range(len(whole.choices)), "")
    reasons, offsets, usage = {}, {}, None
    options: Any = {"include_usage": True}
    for chunk in client.completions.create(**asked, **fields, stream=True, stream_options=options):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
            if choice.logprobs is not None:
                assert choice.logprobs.text_offset is not None
                offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset)
    assert [texts[choice.index] for choice in whole.choices] == [c.text for c in whole.choices]
    assert [reasons[c.index] for c in whole.choices] == [c.finish_reason for c in whole.choices]
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    for choice in whole.choices:
        if "logprobs" in fields:
            assert choice.logprobs is not None
            assert choice.logprobs.top_logprobs is not None
            assert choice.logprobs.text_offset == offsets[choice.index]
            assert len(choice.logprobs.top_logprobs) == 6
        else:
            assert choice.logprobs is None


def test_embeddings_are_served_in_the_clients_default_encoding(client: OpenAI) -> None:
    texts = ["Hello", "A stream of tokens", "Hello"]
    ours = client.embeddings.create(model=MODEL, input=texts)  # in base64, which the client decodes
    floats = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert ours.usage == floats.usage
    for one, other in zip(ours.data, floats.data, strict=True):
        assert one.index == other.index
        assert len(one.embedding) == 64
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert sum(value * value for value in one.embedding) == pytest.approx(1.0, abs=1e-5)
    assert ours.data[0].embedding == pytest.approx(ours.data[2].embedding, abs=1e-5)
    short = client.embeddings.create(model=MODEL, input="Hello", dimensions=8)
    assert len(short.data[0].embedding) == 8
    mean = client.embeddings.create(model=MODEL, input=texts[1], extra_body={"pooling": "mean"})
    assert mean.data[0].embedding != pytest.approx(ours.data[1].embedding, abs=1e-3)
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input="Hello", dimensions=65)
    assert caught.value.param == "dimensions"


def test_the_model_is_listed_and_found(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    "extra",
    [
        {"return_progress": True},
        {"timings_per_token": True},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "high"},
        {"continue_final_message": False},
        {"add_generation_prompt": True},
        {"cache_prompt": False},
        {"cache_salt": "mine"},
    ],
    ids=repr,
)
def test_extension_fields_do_not_change_the_text_of_a_chat(
    client: OpenAI, extra: dict[str, Any]
) -> None:
    without = text_of(create(client))
    texts, names = [], set()
    fields: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0}
    for chunk in client.chat.completions.create(
        messages=[{"role": "user", "content": "Hello"}], stream=True, extra_body=extra, **fields
    ):
        names |= chunk.model_extra.keys() if chunk.model_extra else set()
        texts += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(texts) == without
    assert ("prompt_progress" in names) is ("return_progress" in extra)
    if "stream_options" not in extra:
        assert text_of(create(client, extra_body=extra)) == without


def test_a_message_is_continued_on_request(client: OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0}
    messages: Any = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello, how"},
    ]

    def num_prompt(**extra: Any) -> int:
        answer = client.chat.completions.create(messages=messages, extra_body=extra, **fields)
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    assert num_prompt() == num_prompt(continue_final_message=True)
    closed = num_prompt(continue_final_message=False)
    assert closed > num_prompt(), "the message's end and the next one's head"
    assert closed == num_prompt(add_generation_prompt=True)
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, extra_body={"continue_final_message": True})
    assert caught.value.param == "continue_final_message"


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


def test_two_servers_run_in_the_event_loop_of_another_program(checkpoint: Path) -> None:
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
