"""The prefix cache as clients see it: usage and timings, the scope of sharing, numbers.

Prompts are characters and blocks are of four, so every count here can be done by hand: of a prompt
of 40 that is known to its end, 39 are cached, because one token at least is computed. The last
test has two servers around the demo model, of which one caches nothing.
"""

import gc
import json
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    DONE,
    ENDLESS,
    TIMEOUT_S,
    Answer,
    FakeModel,
    Frame,
    Served,
    Wire,
    chat_body,
    connect,
    in_a_loop,
    serving,
    text_of,
    until,
)

import mlxlite
from tests.test_metrics import parse

CHAT, CACHE = "/v1/chat/completions", "/v1/cache"
BLOCK = 4
PROMPT = "It was a bright cold day in April, and so"[:40]
KEYS = ("key-of-ann", "key-of-bob")


@asynccontextmanager
async def caching(model: FakeModel | None = None, **settings: Any) -> AsyncIterator[Served]:
    async with serving(model, kv_block_size=BLOCK, **settings) as served:
        yield served


async def cached(wire: Wire, content: str = PROMPT, key: str = "", **fields: Any) -> int:
    """A chat's `cached_tokens`, which its timings must agree with."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = await wire.post(CHAT, chat_body(content, **fields), **headers)
    assert answer.status == 200
    assert "x-mlxlite-ignored" not in answer
    return cached_of(answer.json)


def cached_of(answer: Mapping[str, Any]) -> int:
    usage, timings = answer["usage"], answer["timings"]
    num = usage["prompt_tokens_details"]["cached_tokens"]
    assert isinstance(num, int)
    assert timings["cache_n"] == num
    assert timings["prompt_n"] == usage["prompt_tokens"] - num
    return num


async def streamed(wire: Wire, content: str = PROMPT, **fields: Any) -> list[Frame]:
    assert (await wire.open_stream(content, **fields)).status == 200
    frames = await wire.rest()
    assert frames[-1] == DONE
    return frames


async def numbers(wire: Wire, **headers: str) -> dict[str, Any]:
    answer = await wire.get(CACHE, **headers)
    assert answer.status == 200
    found: dict[str, Any] = answer.json
    return found


async def sample(wire: Wire, name: str, **labels: str) -> float:
    """A value in /metrics."""
    answer = await wire.get("/metrics")
    families = parse(answer.body)
    found = [
        value
        for (sample, key), value in families[name].samples.items()
        if sample == name and labels.items() <= dict(key).items()
    ]
    (value,) = found
    return value


# --- usage and timings --------------------------------------------------------------------------


@in_a_loop
async def test_an_equal_chat_reports_its_cached_tokens() -> None:
    async with caching() as served, await served.wire() as wire:
        assert await cached(wire) == 0
        num_before = served.runner.num_prefill_tokens
        assert await cached(wire) == 39
        assert served.runner.num_prefill_tokens - num_before == 0, "the 40th is the row's own"
        assert await cached(wire, PROMPT[:20] + "something else") == 20
        assert await cached(wire, PROMPT[1:]) == 0


@in_a_loop
async def test_cached_tokens_are_equal_in_the_last_chunk_and_the_usage_chunk() -> None:
    async with caching() as served, await served.wire() as wire:
        for expected in (0, 39):
            frames = await streamed(wire)
            assert text_of(frames) == PROMPT
            assert cached_of(frames[-2].json) == expected
        frames = await streamed(wire, stream_options={"include_usage": True})
        *_, finish, usage, _ = frames
        assert cached_of(usage.json | {"timings": finish.json["timings"]}) == 39
        assert await cached(wire) == 39, "and streamed or not is one cache"


@in_a_loop
async def test_progress_is_reported_for_a_fully_cached_prompt() -> None:
    async with caching() as served, await served.wire() as wire:
        for cache, processed in ((0, 39), (39, 39)):
            frames = await streamed(wire, return_progress=True)
            told = [f.json["prompt_progress"] for f in frames if "prompt_progress" in f.value]
            assert (told[-1]["total"], told[-1]["cache"]) == (40, cache)
            assert told[-1]["processed"] == processed


@in_a_loop
async def test_the_next_turn_hits_the_cached_answer() -> None:
    async with caching() as served, await served.wire() as wire:
        answer = await wire.chat(PROMPT)
        said = answer.json["choices"][0]["message"]["content"]
        assert said == PROMPT
        assert await cached(wire, PROMPT + said + "and then?") == 80


@in_a_loop
async def test_several_choices_count_their_prompt_once() -> None:
    async with caching() as served, await served.wire() as wire:
        for expected in (0, 39):
            answer = await wire.chat(PROMPT, n=3)
            assert len(answer.json["choices"]) == 3
            assert answer.json["usage"]["prompt_tokens"] == 40
            assert cached_of(answer.json) == expected
        frames = await streamed(wire, n=3)
        assert cached_of(frames[-2].json) == 39
        assert [text_of(frames, i) for i in range(3)] == [PROMPT] * 3


@in_a_loop
async def test_with_the_cache_switched_off_nothing_is_found_and_nothing_kept() -> None:
    async with caching(enable_prefix_caching=False) as served, await served.wire() as wire:
        for _ in range(3):
            assert await cached(wire) == 0
        assert cached_of((await streamed(wire))[-2].json) == 0
        found = await numbers(wire)
        assert found.pop("object") == "prefix_cache"
        assert set(found.values()) == {0}
        for name in ("queries", "hits"):
            assert await sample(wire, f"vllm:prefix_cache_{name}_total") == 0
        for where in ("memory", "disk"):
            assert await sample(wire, "mlxlite:prefix_cache_bytes", where=where) == 0


# --- what a request may ask for -----------------------------------------------------------------


@in_a_loop
async def test_a_request_may_opt_out_of_the_cache() -> None:
    async with caching() as served, await served.wire() as wire:
        assert await cached(wire, cache_prompt=False) == 0
        assert (await numbers(wire))["bytes"] == 0
        assert await cached(wire, cache_prompt=True) == 0, "nothing was written"
        before = await numbers(wire)
        assert await cached(wire, cache_prompt=False) == 0, "nothing is read"
        assert await numbers(wire) == before
        assert await cached(wire, cache_prompt=None) == 39, "null is the default"


@in_a_loop
async def test_a_salt_separates_and_an_empty_one_is_none() -> None:
    async with caching() as served, await served.wire() as wire:
        assert await cached(wire) == 0
        for salt in ("a", "b", "ab", "ü" * 128):
            assert await cached(wire, cache_salt=salt) == 0, salt
            assert await cached(wire, cache_salt=salt) == 39, salt
        for none in ("", None):
            assert await cached(wire, cache_salt=none) == 39


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("cache_salt", value) for value in (5, True, ["a"], {}, "a" * 129, "ü" * 129)),
        *(("cache_prompt", value) for value in (1, 0, "true", [], {})),
    ],
)
def test_a_wrong_cache_field_is_a_400_that_names_it(name: str, value: Any) -> None:
    @in_a_loop
    async def test() -> None:
        async with caching() as served, await served.wire() as wire:
            answer = await wire.chat(PROMPT, **{name: value})
            assert answer.status == 400
            assert answer.error["param"] == name
            assert name in answer.error["message"]
            assert served.runner.admitted == []

    test()


@in_a_loop
async def test_half_a_character_is_no_salt() -> None:
    async with caching() as served, await served.wire() as wire:
        body = json.dumps(chat_body(PROMPT, cache_salt="a\ud800")).encode()
        assert (await wire.ask("POST", CHAT, body)).status == 400


# --- the scope of sharing -----------------------------------------------------------------------


@in_a_loop
async def test_keys_do_not_share_when_prefixes_are_each_keys_own() -> None:
    settings: dict[str, Any] = {"api_key": KEYS, "prefix_cache_scope": "key"}
    async with caching(**settings) as served, await served.wire() as wire:
        ann, bob = KEYS
        assert await cached(wire, key=ann) == 0
        assert await cached(wire, key=bob) == 0
        assert await cached(wire, key=ann) == 39
        assert await cached(wire, key=bob) == 39
        assert await cached(wire, key=ann, cache_salt=bob) == 0, "a salt is no way in"


@in_a_loop
async def test_a_key_is_the_same_whichever_header_brings_it() -> None:
    settings: dict[str, Any] = {"api_key": KEYS, "prefix_cache_scope": "key"}
    async with caching(**settings) as served, await served.wire() as wire:
        assert await cached(wire, key=KEYS[0]) == 0
        answer = await wire.post(CHAT, chat_body(PROMPT), x_api_key=KEYS[0])
        assert cached_of(answer.json) == 39
        answer = await wire.post(CHAT, chat_body(PROMPT), x_api_key=KEYS[1])
        assert cached_of(answer.json) == 0


@pytest.mark.parametrize("scope", ["shared", None])
def test_keys_share_the_cache_by_default(scope: str | None) -> None:
    settings: dict[str, Any] = {"api_key": KEYS} | ({"prefix_cache_scope": scope} if scope else {})

    @in_a_loop
    async def test() -> None:
        async with caching(**settings) as served, await served.wire() as wire:
            assert await cached(wire, key=KEYS[0]) == 0
            assert await cached(wire, key=KEYS[1]) == 36, "among strangers by whole blocks only"

    test()


@in_a_loop
async def test_without_keys_the_key_scope_is_shared_by_all_requests() -> None:
    async with caching(prefix_cache_scope="key") as served, await served.wire() as wire:
        assert await cached(wire) == 0
        assert await cached(wire, key="any") == 39


@in_a_loop
async def test_only_the_first_key_may_forget_the_prefixes_of_all() -> None:
    async with caching(api_key=KEYS) as served, await served.wire() as wire:
        await cached(wire, key=KEYS[0])
        for key, status, num_cached in ((KEYS[1], 403, 36), (KEYS[0], 200, 0)):
            answer = await wire.ask("DELETE", CACHE, authorization=f"Bearer {key}")
            assert answer.status == status
            assert await cached(wire, key=KEYS[0]) == num_cached


# --- the route ----------------------------------------------------------------------------------


@in_a_loop
async def test_the_cache_endpoint_reports_its_numbers() -> None:
    async with caching(prefix_cache_bytes="1MB") as served, await served.wire() as wire:
        empty = await numbers(wire)
        assert empty == {
            "object": "prefix_cache",
            "bytes": 0,
            "max_bytes": 1_000_000,
            "disk_bytes": 0,
            "max_disk_bytes": 0,
            "queried_tokens": 0,
            "hit_tokens": 0,
            "hit_rate": 0.0,
            "evictions": 0,
            "disk_loads": 0,
        }
        for _ in range(2):
            await wire.chat(PROMPT)
        full = await numbers(wire)
        assert 0 < full["bytes"] <= 1_000_000
        assert (full["queried_tokens"], full["hit_tokens"]) == (78, 39)
        assert full["hit_rate"] == pytest.approx(39 / 78)
        assert full.keys() == empty.keys()
        assert await numbers(wire) == full, "asking changes nothing"
        assert (await wire.get("/cache")).json == full


@in_a_loop
async def test_a_small_cache_counts_its_evictions() -> None:
    async with caching(prefix_cache_bytes="8KB") as served, await served.wire() as wire:
        for i in range(6):
            await wire.chat(f"{i}{PROMPT}")
        found = await numbers(wire)
        assert found["evictions"] > 0
        assert found["bytes"] <= found["max_bytes"] == 8000
        name = "mlxlite:prefix_cache_evictions_total"
        assert await sample(wire, name) == found["evictions"]


@in_a_loop
async def test_a_cleared_cache_is_empty_and_keeps_its_counters() -> None:
    async with caching() as served, await served.wire() as wire:
        for _ in range(2):
            await wire.chat(PROMPT)
        before = await numbers(wire)
        answer = await wire.ask("DELETE", CACHE)
        assert answer.status == 200
        assert answer.json == before | {"status": "cleared"}, "what was there"
        assert await cached(wire) == 0
        assert await cached(wire) == 39
        await wire.ask("DELETE", CACHE)
        stats = served.engine.cache_stats
        await until(lambda: stats.num_bytes == 0, "an idle engine clears too")
        after = await numbers(wire)
        assert (after["bytes"], after["hit_tokens"], after["evictions"]) == (0, 78, 0)
        assert (await wire.ask("DELETE", CACHE)).status == 200, "and empty it can be cleared too"


@in_a_loop
async def test_clearing_the_cache_does_not_affect_a_running_chat() -> None:
    async with caching() as served, await served.wire() as wire, await served.wire() as other:
        assert await cached(wire, PROMPT + ENDLESS, max_tokens=1) == 0
        await wire.open_stream(PROMPT + ENDLESS)
        frames = [await wire.frame() for _ in range(5)]
        assert (await other.ask("DELETE", CACHE)).status == 200
        stats = served.engine.cache_stats
        await until(lambda: stats.num_bytes == 0, "cleared while it runs")
        await other.post("/v1/cancel", {})
        frames += await wire.rest()
        answer, whole = text_of(frames), PROMPT + ENDLESS
        assert answer == (whole * len(answer))[: len(answer)]
        assert cached_of(frames[-2].json) == 40, "it was found before"


@in_a_loop
async def test_the_cache_endpoint_requires_a_key() -> None:
    async with caching(api_key=KEYS) as served, await served.wire() as wire:
        for method in ("GET", "HEAD", "DELETE"):
            for headers in ({}, {"authorization": "Bearer nobody"}):
                answer = await wire.ask(method, CACHE, **headers)
                assert answer.status == 401
                assert answer["www-authenticate"] == "Bearer"
            answer = await wire.ask(method, CACHE, authorization=f"Bearer {KEYS[0]}")
            assert answer.status == 200


@in_a_loop
async def test_a_refused_clearing_clears_nothing() -> None:
    async with caching(api_key=KEYS) as served, await served.wire() as wire:
        await cached(wire, key=KEYS[0])
        assert (await wire.ask("DELETE", CACHE)).status == 401
        assert await cached(wire, key=KEYS[0]) == 36


@in_a_loop
async def test_the_cache_endpoint_lists_its_methods() -> None:
    async with caching() as served, await served.wire() as wire:
        for path in (CACHE, "/cache"):
            for method, body in (("POST", b"{}"), ("PUT", b"{}"), ("PATCH", None)):
                async with await served.wire() as another:  # an unread body closes the connection
                    answer = await another.ask(method, path, body)
                assert answer.status == 405
                assert answer["allow"] == "GET, DELETE, HEAD, OPTIONS"
                assert answer.error["code"] == "method_not_allowed"
            answer = await wire.get(path)
            head = await wire.ask("HEAD", path)
            assert (head.status, head.body) == (200, b"")
            assert head["content-length"] == answer["content-length"]
            assert head["content-type"] == "application/json"


@in_a_loop
async def test_a_page_may_clear_the_cache_only_from_an_allowed_origin() -> None:
    async with caching() as served, await served.wire() as wire:
        headers = {"access_control_request_method": "DELETE"}
        answer = await wire.ask("OPTIONS", CACHE, origin="http://localhost:3000", **headers)
        assert "DELETE" in answer["access-control-allow-methods"]
        answer = await wire.ask("OPTIONS", CACHE, origin="http://evil.example", **headers)
        assert "access-control-allow-methods" not in answer
        assert "access-control-allow-origin" not in answer


# --- metrics ------------------------------------------------------------------------------------


@in_a_loop
async def test_the_metrics_agree_with_the_route_and_the_answers() -> None:
    async with caching() as served, await served.wire() as wire:
        total = 0
        for content in (PROMPT, PROMPT, PROMPT[:12] + "another way", PROMPT):
            total += await cached(wire, content)
        found = await numbers(wire)
        assert total == found["hit_tokens"] == 39 + 12 + 39
        assert await sample(wire, "vllm:prefix_cache_hits_total") == total
        queried = await sample(wire, "vllm:prefix_cache_queries_total")
        assert queried == found["queried_tokens"]
        held = await sample(wire, "mlxlite:prefix_cache_bytes", where="memory")
        assert held == found["bytes"] > 0
        assert await sample(wire, "mlxlite:prefix_cache_bytes", where="disk") == 0
        assert await sample(wire, "vllm:prompt_tokens_cached_total") == total
        seed = (await wire.get("/metrics", accept="application/json")).json
        assert seed["cache_hit_rate"] == pytest.approx(total / (3 * 40 + 23))


# --- with a real model --------------------------------------------------------------------------


@asynccontextmanager
async def demo(**settings: Any) -> AsyncIterator[Wire]:
    config = mlxlite.Config(port=0, shutdown_grace_s=0.05, **settings)
    async with mlxlite.Server(config) as server, await connect(server) as wire:
        yield wire


def files(path: Path) -> list[Path]:
    return list(path.rglob("*.safetensors"))


def files_are_written() -> None:
    """The files' thread ends once its server is gone and all that was asked of it is done."""
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "mlxlite-store":
            thread.join(TIMEOUT_S / 4)
            assert not thread.is_alive()


async def two_turns(wire: Wire) -> list[Answer]:
    """A chat, and one that continues it. Both are greedy."""
    messages = [{"role": "user", "content": "Hello, how are you? Tell me a story, please."}]
    answers = []
    for then in ("What is 2 + 2?", ""):
        body = {"messages": messages, "temperature": 0, "max_tokens": 64}
        answers.append(await wire.post(CHAT, body))
        assert answers[-1].status == 200
        messages += [
            answers[-1].json["choices"][0]["message"],
            {"role": "user", "content": then},
        ]
    return answers


def text(answer: Answer) -> str:
    found = answer.json["choices"][0]["message"]["content"]
    assert isinstance(found, str)
    return found


@in_a_loop
async def test_a_second_turn_is_found_and_reads_as_without_a_cache() -> None:
    async with demo() as wire, demo(enable_prefix_caching=False) as plain:
        warm, cold = await two_turns(wire), await two_turns(plain)
        assert [text(a) for a in warm] == [text(a) for a in cold]
        assert all(map(text, warm))
        assert [cached_of(a.json) for a in cold] == [0, 0]
        first, second = (cached_of(a.json) for a in warm)
        assert first == 0
        usage = warm[0].json["usage"]
        known = usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens"] // 16 * 16 <= second <= known
        assert second % 16 == 0
        assert second > 0
        again = await two_turns(wire)
        assert [text(a) for a in again] == [text(a) for a in cold]
        assert cached_of(again[1].json) >= second


@in_a_loop
async def test_what_is_kept_in_files_is_found_after_a_restart_and_reads_the_same(
    tmp_path: Path,
) -> None:
    settings = {"prefix_cache_dir": str(tmp_path / "prefixes")}
    async with demo(**settings) as wire:
        before = await two_turns(wire)
        found = await numbers(wire)
        assert 0 < found["disk_bytes"] <= found["max_disk_bytes"] == 10_000_000_000
    files_are_written()
    async with demo(**settings) as wire:
        assert (await numbers(wire))["disk_bytes"] > 0
        after = await two_turns(wire)
        assert [text(a) for a in after] == [text(a) for a in before]
        assert cached_of(after[0].json) > 0
        assert cached_of(after[1].json) >= cached_of(before[1].json)
        found = await numbers(wire)
        assert found["disk_loads"] > 0
        assert await sample(wire, "mlxlite:prefix_cache_disk_loads_total") == found["disk_loads"]
        assert files(tmp_path)
        assert (await wire.ask("DELETE", CACHE)).json["status"] == "cleared"
        assert await cached(wire, "Hello!", cache_prompt=False, max_tokens=1) == 0
        found = await numbers(wire)
        assert found["disk_bytes"] == found["bytes"] == 0
    files_are_written()
    assert not files(tmp_path)
