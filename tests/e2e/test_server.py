"""The server as its clients see it: in this process, over real sockets, around a scripted runner.

Every test runs in a debugging loop that refuses tasks, transports and errors left behind. Times are
moved by hand: `perf_counter` is a `Clock` where a test is about one.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    DONE,
    ENDLESS,
    MARKERS,
    POISON,
    Clock,
    FakeModel,
    Frame,
    ScriptedRunner,
    Served,
    Wire,
    chat_body,
    chat_request,
    connect,
    in_a_loop,
    new_server,
    pass_time,
    request,
    serving,
    slow_reader,
    stand_still,
    text_of,
    until,
)

from mlxlite.api.endpoints.chat_completions import ChatWriter
from mlxlite.api.service import Phase
from mlxlite.config.options import Config
from mlxlite.engine.memory import Memory
from mlxlite.http import connection
from mlxlite.http.connection import (
    BODY_GRACE_S,
    BODY_TIMEOUT_S,
    HEADER_TIMEOUT_S,
    HEARTBEAT_S,
    KEEP_ALIVE_S,
    MAX_AT_ONCE,
    MAX_PIPELINED_BYTES,
    MIN_BODY_RATE,
    WRITE_TIMEOUT_S,
)
from mlxlite.models.interface import LoadError, PromptError
from mlxlite.output.grammar import ConstraintError, Kind, TextConstraint

CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "f"}}
ENVELOPE_KEYS = {"message", "type", "param", "code"}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("mlxlite"):
            thread.join(5)
            assert not thread.is_alive(), f"{thread.name} lives on"


# --- loading ------------------------------------------------------------------------------------


@in_a_loop
async def test_while_the_model_loads_the_server_listens_and_health_reports_loading() -> None:
    gate = threading.Event()
    model, runner = FakeModel(), ScriptedRunner()

    def load(_config: Config) -> Any:
        assert gate.wait(20)
        return model, runner

    server = new_server(load)
    await server.start()
    try:
        async with await connect(server) as wire:
            for path in ("/health", "/v1/health"):
                answer = await wire.get(path)
                assert answer.status == 503
                assert answer.json == {"status": "loading"}
                assert "retry-after" in answer
            for answer in (
                await wire.get("/v1/models"),
                await wire.get("/v1/models/fake"),
                await wire.chat("hello"),
                await wire.post("/v1/cancel", {}),
            ):
                assert answer.status == 503
                assert answer.error["code"] == "unavailable"
                assert int(answer["retry-after"]) > 0
            assert (await wire.get("/metrics")).status == 200
            assert (await wire.get("/nowhere")).status == 404
            gate.set()
            await server.ready()
            assert (await wire.get("/health")).status == 200
            assert (await wire.get("/v1/models")).status == 200
            assert (await wire.chat("hello")).json["choices"][0]["message"]["content"] == "hello"
    finally:
        gate.set()
        await server.stop()


@in_a_loop
async def test_a_failed_load_is_raised_by_ready_and_reported_by_health() -> None:
    def load(_config: Config) -> Any:
        raise LoadError("there is no model at nowhere")

    server = new_server(load)
    await server.start()
    with pytest.raises(LoadError, match="there is no model at nowhere"):
        await server.ready()
    async with await connect(server) as wire:
        health = await wire.get("/health")
        assert health.status == 503
        assert health.json["status"] == "error"
        assert (await wire.chat("hello")).status == 503
    await server.stop()


@pytest.mark.parametrize("error", [LoadError("no"), RuntimeError("no"), MemoryError("no")])
def test_a_failed_load_leaves_nothing_behind(error: Exception) -> None:
    def load(_config: Config) -> Any:
        raise error

    @in_a_loop
    async def test() -> None:
        server = new_server(load)
        with pytest.raises(LoadError, match="no"):
            async with server:
                pytest.fail("it was never ready")
        assert server.service.phase is Phase.DRAINING
        assert not server.listener.is_serving

    test()


@in_a_loop
async def test_a_server_can_be_stopped_while_it_loads() -> None:
    gate = threading.Event()

    def load(_config: Config) -> Any:
        gate.wait(20)
        raise LoadError("too late")

    server = new_server(load)
    await server.start()
    async with await connect(server) as wire:
        assert (await wire.get("/health")).status == 503
        await server.stop()
        assert await wire.is_cut()
    gate.set()


# --- embedding ----------------------------------------------------------------------------------


@in_a_loop
async def test_an_embedded_server_leaves_signals_and_logging_alone() -> None:
    def state() -> list[object]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
        root = logging.getLogger()
        ours = logging.getLogger("mlxlite")
        return [
            *(signal.getsignal(number) for number in numbers),
            *(list(log.handlers) for log in (root, ours)),
            *(log.level for log in (root, ours)),
            ours.propagate,
            logging.raiseExceptions,
        ]

    before = state()
    async with serving() as served, await served.wire() as wire:
        assert state() == before
        assert (await wire.chat("hello")).status == 200
        assert state() == before
    assert state() == before


@in_a_loop
async def test_two_servers_in_one_process_are_independent() -> None:
    async with (
        serving(FakeModel(id="one"), api_key=("k",)) as one,
        serving(FakeModel(id="two")) as two,
        await one.wire() as wire_1,
        await two.wire() as wire_2,
    ):
        assert one.server.url != two.server.url
        assert (await wire_1.get("/v1/models")).status == 401
        assert (await wire_2.get("/v1/models")).json["data"][0]["id"] == "two"
        assert (await wire_2.chat("hello")).status == 200
        assert two.num_ended("stop") == 1
        assert one.num_ended("stop") == 0
        await wire_2.close()
        await two.server.stop()
        answer = await wire_1.get("/v1/models", x_api_key="k")
        assert answer.json["data"][0]["id"] == "one"


@in_a_loop
async def test_the_port_is_free_again_after_stop() -> None:
    async with serving() as served:
        port = served.server.port
        assert served.server.url == f"http://127.0.0.1:{port}"
        async with await served.wire() as wire:
            assert (await wire.get("/health")).status == 200
    async with serving(port=port) as served:
        assert served.server.port == port


@in_a_loop
async def test_a_port_that_is_taken_is_an_oserror_at_start() -> None:
    async with serving() as served:
        second = new_server(lambda _: pytest.fail("it loads nothing"), port=served.server.port)
        with pytest.raises(OSError, match="in use"):
            await second.start()


def test_a_unix_socket_is_for_its_owner_alone_and_removed_at_stop() -> None:
    # Not in tmp_path: a socket's path may have no more than 107 bytes.
    path = Path(f"/tmp/mlxlite-test-{os.getpid()}.sock")
    with closing(socket.socket(socket.AF_UNIX)) as stale:
        stale.bind(str(path))
    assert path.exists(), "left by a process that was killed"

    @in_a_loop
    async def test() -> None:
        async with serving(uds=str(path)) as served, await served.wire() as wire:
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            assert served.server.url == f"unix:{path}"
            second = new_server(lambda _: pytest.fail("it loads nothing"), uds=str(path))
            with pytest.raises(OSError, match="in use"):  # it must not steal the path
                await second.start()
            answer = await wire.post(CHAT, chat_body("hello"), host="anything")
            assert answer.json["choices"][0]["message"]["content"] == "hello"

    test()
    assert not path.exists()


# --- the seed's contract ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "batching"),
    [
        ({"max_batch_size": 0}, "disabled"),
        ({}, "enabled (max batch: 8, continuous: true)"),
        (
            {"max_batch_size": 4, "enable_continuous_batching": False},
            "enabled (max batch: 4, continuous: false)",
        ),
    ],
)
def test_health_reports_how_it_batches(settings: dict[str, Any], batching: str) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(**settings) as served, await served.wire() as wire:
            answer = await wire.get("/health")
            assert answer.status == 200
            assert answer.json == {"status": "ok", "batching": batching}

    test()


@in_a_loop
async def test_every_route_is_there_with_and_without_v1() -> None:
    async with serving(FakeModel(id="org/name")) as served, await served.wire() as wire:
        for prefix in ("", "/v1"):
            for path in ("/health", "/metrics", "/models", "/models/org/name", "/cache"):
                assert (await wire.get(prefix + path)).status == 200, path
            assert (await wire.get(f"{prefix}/health?full=1")).status == 200
            assert (await wire.post(f"{prefix}/chat/completions", chat_body("x"))).status == 200
            assert (await wire.post(f"{prefix}/cancel", {})).status == 200


@in_a_loop
async def test_models_lists_the_one_there_is() -> None:
    model = FakeModel(id="org/name", context_size=77)
    async with serving(model) as served, await served.wire() as wire:
        listed = (await wire.get("/v1/models")).json
        (card,) = listed["data"]
        assert listed["object"] == "list"
        assert card["id"] == "org/name"
        assert card["object"] == "model"
        assert card["owned_by"] == "mlx"
        assert isinstance(card["created"], int)
        assert card["max_model_len"] == 77
        assert (await wire.get("/v1/models/org/name")).json == card
        assert (await wire.get("/v1/models/org%2Fname")).json == card
        missing = await wire.get("/v1/models/other")
        assert missing.status == 404
        assert missing.error["code"] == "model_not_found"


@in_a_loop
async def test_metrics_are_prometheus_text_or_the_seeds_json() -> None:
    async with serving(max_batch_size=4) as served, await served.wire() as wire:
        await wire.chat("hello")
        values = (await wire.get("/metrics", accept="application/json")).json
        assert set(values) == {
            "waiting_requests",
            "running_requests",
            "max_batch_size",
            "total_requests_processed",
            "total_batches_processed",
            "avg_batch_size",
            "avg_latency_ms",
            "cache_hit_rate",
            "total_tokens_generated",
        }
        assert values["max_batch_size"] == 4
        assert values["total_requests_processed"] == 1
        assert values["total_tokens_generated"] == 6, "five characters and the end"
        text = await wire.get("/metrics")
        assert text["content-type"].startswith("text/plain; version=0.0.4")
        assert b"vllm:num_requests_running" in text.body


@in_a_loop
async def test_head_is_get_without_the_body() -> None:
    async with serving() as served, await served.wire() as wire:
        for path in ("/health", "/metrics", "/v1/models", "/v1/models/fake"):
            head = await wire.ask("HEAD", path)
            assert head.status == 200
            assert int(head["content-length"]) > 0
        assert (await wire.ask("HEAD", "/nowhere")).status == 404
        assert (await wire.get("/health")).status == 200


@in_a_loop
async def test_cancel_ends_one_stream_by_its_id_or_all_of_them() -> None:
    async with serving() as served, await served.wire() as control:
        none = await control.post("/v1/cancel", {})
        assert none.json == {"status": "no_active_generation", "cancelled_count": 0}
        wires = [await served.wire() for _ in range(3)]
        ids = []
        for wire in wires:
            await wire.open_stream(ENDLESS)
            ids.append((await wire.frame()).json["id"])
        unknown = await control.post("/v1/cancel", {"id": "chatcmpl-nobody"})
        assert unknown.json["cancelled_count"] == 0
        assert served.num_live == 3
        one = await control.post("/v1/cancel", {"id": ids[0]})
        assert one.json == {"status": "cancelled", "cancelled_count": 1}
        *_, finish, done = await wires[0].rest()
        assert finish.json["choices"][0]["finish_reason"] == "abort"
        assert done == DONE
        assert served.num_live == 2
        rest = await control.ask("POST", "/v1/cancel", b"")
        assert rest.json == {"status": "cancelled", "cancelled_count": 2}
        for wire in wires:
            await wire.rest() if wire is not wires[0] else None
            await wire.close()
        assert served.num_live == 0
        assert served.num_ended("abort") == 3


# --- answers ------------------------------------------------------------------------------------


@in_a_loop
async def test_a_stream_is_role_content_finish_done() -> None:
    async with serving() as served, await served.wire() as wire:
        head = await wire.open_stream("hello")
        assert head.status == 200
        assert head["content-type"] == "text/event-stream; charset=utf-8"
        assert head["cache-control"] == "no-cache"
        frames = await wire.rest()
        assert {frame.name for frame in frames} == {"data"}
        assert frames[-1] == DONE
        role, *texts, finish = [frame.json for frame in frames[:-1]]
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert all(set(text["choices"][0]["delta"]) == {"content"} for text in texts)
        assert text_of(frames) == "hello"
        assert finish["choices"][0]["delta"] == {}
        assert finish["choices"][0]["finish_reason"] == "stop"
        assert finish["usage"]["prompt_tokens"] == 5
        assert finish["usage"]["completion_tokens"] == 6
        assert finish["timings"]["predicted_n"] == 6
        assert len({frame.json["id"] for frame in frames[:-1]}) == 1
        assert (await wire.get("/health")).status == 200, "the connection lives on"


@in_a_loop
async def test_the_role_leaves_before_the_first_token() -> None:
    async with serving() as served, await served.wire() as wire:
        served.runner.hold()
        await wire.open_stream("hello")
        assert (await wire.frame()).json["choices"][0]["delta"]["role"] == "assistant"
        served.runner.release()
        assert text_of(await wire.rest()) == "hello"


@in_a_loop
async def test_each_token_leaves_when_it_is_there() -> None:
    async with serving() as served, await served.wire() as wire:
        served.runner.hold()
        await wire.open_stream("abcdef")
        await wire.frame()
        served.runner.allow(1)  # the prefill
        for letter in "abcdef":
            served.runner.allow(1)
            assert text_of([await wire.frame()]) == letter
        served.runner.release()
        assert (await wire.rest())[-1] == DONE


@pytest.mark.parametrize(
    ("content", "fields", "text", "reason"),
    [
        ("hello", {}, "hello", "stop"),
        ("hello", {"max_tokens": 2}, "he", "length"),
        ("hello", {"max_tokens": 6}, "hello", "stop"),
        ("hello" + ENDLESS, {"max_tokens": 8}, "hello∞he", "length"),
        ("hello world", {"stop": " "}, "hello", "stop"),
        ("hello world", {"stop_sequences": ["zz", "lo w"]}, "hel", "stop"),
        ("hello", {"stop": "o", "max_tokens": 5}, "hell", "stop"),
        ("hello", {"stop": "lot"}, "hello", "stop"),
        ('a\n\n\u2028🙂\0"data: [DONE]\\', {}, 'a\n\n\u2028🙂\0"data: [DONE]\\', "stop"),
    ],
)
def test_an_answer_is_the_fold_of_its_stream(
    content: str, fields: dict[str, Any], text: str, reason: str
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            anew = fields | {"cache_prompt": False}
            whole = (await wire.chat(content, **anew)).json
            await wire.open_stream(content, **anew)
            frames = await wire.rest()
            finish = frames[-2].json
            (choice,) = whole["choices"]
            assert choice["message"]["content"] == text_of(frames) == text
            assert choice["finish_reason"] == finish["choices"][0]["finish_reason"] == reason
            assert whole["usage"] == finish["usage"]
            assert whole["timings"].keys() == finish["timings"].keys()

    test()


@in_a_loop
async def test_usage_has_a_chunk_of_its_own_with_include_usage() -> None:
    async with serving() as served, await served.wire() as wire:
        await wire.open_stream("hello", stream_options={"include_usage": True})
        *_, finish, usage, done = await wire.rest()
        assert done == DONE
        assert finish.json["usage"] is None
        assert finish.json["timings"]["predicted_n"] == 6
        assert usage.json["choices"] == []
        assert usage.json["usage"]["total_tokens"] == 11


@in_a_loop
async def test_messages_and_template_kwargs_reach_the_model() -> None:
    async with serving() as served, await served.wire() as wire:
        history = [
            {"role": "developer", "content": "be brief"},
            {"role": "assistant", "content": "x"},
        ]
        body = {"messages": history, "chat_template_kwargs": {"enable_thinking": False}}
        assert (await wire.post(CHAT, body)).status == 200
        assert served.model.rendered == [
            (
                [{"role": "system", "content": "be brief"}, {"role": "assistant", "content": "x"}],
                {"enable_thinking": False},
                True,
            )
        ]


@in_a_loop
async def test_unknown_fields_are_named_in_a_header() -> None:
    async with serving() as served, await served.wire() as wire:
        answer = await wire.chat("x", zeta=1, alpha=2, **{"ü,\n": 3})
        assert answer["x-mlxlite-ignored"] == "alpha,zeta,%C3%BC%2C%0A"
        assert "x-mlxlite-ignored" not in await wire.chat("x")
        streamed = await wire.open_stream("x", zeta=1)
        assert streamed["x-mlxlite-ignored"] == "zeta"
        await wire.rest()
        many = await wire.chat("x", **{f"{n:04}" + "é" * 300: n for n in range(100)})
        assert len(many["x-mlxlite-ignored"]) < 8192, "proxies refuse long headers"


@in_a_loop
async def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    async with serving(FakeModel(context_size=5)) as served, await served.wire() as wire:
        fits = (await wire.chat("abcd")).json
        assert fits["choices"][0] | {"message": None} == {
            "index": 0,
            "message": None,
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
        assert fits["usage"]["total_tokens"] == 5
        for content, stream in (("abcde", False), ("abcdef", True)):
            answer = await wire.chat(content, stream=stream)
            assert answer.status == 400
            assert answer.error["type"] == "exceed_context_size_error"
            assert answer.error["n_prompt_tokens"] == len(content)
            assert answer.error["n_ctx"] == 5
            assert "the request exceeds the available context size." in answer.error["message"]
        assert (await wire.chat("abc", max_tokens=1000)).json["usage"]["total_tokens"] == 5


@in_a_loop
async def test_messages_that_the_template_refuses_are_a_400() -> None:
    model = FakeModel(render_error=PromptError("roles must alternate"))
    async with serving(model) as served, await served.wire() as wire:
        answer = await wire.chat("x")
        assert answer.status == 400
        assert answer.error["message"] == "roles must alternate"
        assert answer.error["param"] == "messages"


@pytest.mark.parametrize(
    "error", [RuntimeError("/a/path"), RecursionError("deep"), ZeroDivisionError()]
)
def test_a_template_that_fails_oddly_costs_its_request_and_nothing_else(error: Exception) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(FakeModel(render_error=error)) as served, await served.wire() as wire:
            answer = await asyncio.wait_for(wire.chat("x"), 2)
            assert answer.status == 500
            assert answer.error["code"] == "internal_error"
            assert "/a/path" not in answer.error["message"]
            served.model.render_error = None
            assert (await wire.get("/health")).status == 200
            assert (await wire.chat("x")).status == 200

    test()


# --- several choices ----------------------------------------------------------------------------

# A sequence with a temperature begins at the character of its seed: "abc", "bc", "c".
THREE: dict[str, Any] = {"n": 3, "temperature": 1, "seed": 0}


@in_a_loop
async def test_choices_differ_by_their_seeds_and_share_one_prompt() -> None:
    async with serving() as served, await served.wire() as wire:
        answer = (await wire.chat("abc", **THREE)).json
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        texts = [choice["message"]["content"] for choice in answer["choices"]]
        assert texts == ["abc", "bc", "c"]
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
        assert answer["usage"]["prompt_tokens"] == 3
        assert answer["usage"]["completion_tokens"] == 4 + 3 + 2, "the ends are counted"
        assert served.num_ended("stop") == 3
        assert (await wire.chat("abc", **THREE)).json["choices"] == answer["choices"]
        (only,) = (await wire.chat("abc", n=1)).json["choices"]
        assert only["message"]["content"] == "abc"


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_of_choices_folds_to_the_whole_answer(include_usage: bool) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            whole = (await wire.chat("abc", **THREE)).json
            options = {"stream_options": {"include_usage": True}} if include_usage else {}
            await wire.open_stream("abc", **THREE, **options)
            frames = await wire.rest()
            assert frames.count(DONE) == 1
            assert frames[-1] == DONE
            chunks = [frame.json for frame in frames[:-1]]
            assert len({chunk["id"] for chunk in chunks}) == 1
            for index, choice in enumerate(whole["choices"]):
                own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
                assert own[0]["delta"] == {"role": "assistant", "content": ""}
                reasons = [part["finish_reason"] for part in own]
                assert reasons == [None] * (len(own) - 1) + [choice["finish_reason"]]
                assert text_of(frames, index) == choice["message"]["content"]
            with_usage = [chunk for chunk in chunks if chunk.get("usage") is not None]
            assert with_usage == chunks[-1:], "the usage is sent once, at the end"
            assert chunks[-1]["usage"] == whole["usage"]
            assert (chunks[-1]["choices"] == []) is include_usage
            assert sum("timings" in chunk for chunk in chunks) == 1

    test()


@in_a_loop
async def test_choices_that_do_not_fit_together_run_one_after_another() -> None:
    async with serving(max_batch_size=1) as served, await served.wire() as wire:
        answer = (await wire.chat("abc", **THREE)).json
        assert [c["message"]["content"] for c in answer["choices"]] == ["abc", "bc", "c"]


@pytest.mark.parametrize(
    ("fields", "num_prefilled"), [({}, 99 + 2 * 3), ({"cache_prompt": False}, 3 * 99)]
)
def test_choices_of_a_prompt_are_one_prefill_with_the_prefix_cache_and_else_one_each(
    fields: dict[str, Any], num_prefilled: int
) -> None:
    @in_a_loop
    async def test() -> None:
        content = "abcdefghij" * 10
        async with serving(kv_block_size=16) as served, await served.wire() as wire:
            answer = (await wire.chat(content, **THREE, **fields)).json
            texts = [choice["message"]["content"] for choice in answer["choices"]]
            assert texts == [content, content[1:], content[2:]]
            assert answer["usage"]["prompt_tokens"] == 100
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert served.runner.num_prefill_tokens == num_prefilled

    test()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_choice_that_fails_ends_the_answer_with_one_error(stream: bool) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            served.runner.failing[2] = 5
            await wire.send(chat_request("ab" + ENDLESS, n=3, stream=stream))
            if stream:
                assert (await wire.head()).status == 200
                frames = await wire.rest()
                assert_ends_with_an_error(frames, "this sequence has failed")
                assert sum(frame.name == "error" for frame in frames) == 1
                assert frames.count(DONE) == 1
                assert len(text_of(frames, 1)) == 5
                reasons = [c["finish_reason"] for f in frames[:-3] for c in f.json["choices"]]
                assert set(reasons) == {None}
            else:
                answer = await wire.answer()
                assert answer.status == 500
                assert answer.error["message"] == "this sequence has failed"
            await until(lambda: served.num_live == 0, "the others are not wanted any more")
            assert served.num_ended("error") == 1
            assert served.num_ended("abort") == 2
            await until(lambda: not served.runner.prompts)
            assert (await wire.chat("x")).status == 200

    test()


@in_a_loop
async def test_an_ended_choice_does_not_hinder_the_failure_of_another() -> None:
    async with serving() as served, await served.wire() as wire:
        served.runner.failing[1] = 2
        await wire.open_stream("abc", **THREE)  # "c" has ended by then
        frames = await wire.rest()
        assert_ends_with_an_error(frames, "this sequence has failed")
        assert text_of(frames, 2) == "c"
        answer = await wire.chat("x")
        assert answer.status == 200


@in_a_loop
async def test_cancel_ends_every_choice_of_an_answer() -> None:
    async with serving() as served, await served.wire() as wire, await served.wire() as control:
        await wire.open_stream("ab" + ENDLESS, n=3)
        id = (await wire.frame()).json["id"]
        await until(lambda: len(served.runner.num_drawn) == 3)
        cancelled = await control.post("/v1/cancel", {"id": id})
        assert cancelled.json == {"status": "cancelled", "cancelled_count": 1}
        frames = await wire.rest()
        assert frames.count(DONE) == 1
        ends = [c for f in frames[:-1] for c in f.json["choices"] if c["finish_reason"]]
        assert sorted(c["index"] for c in ends) == [0, 1, 2]
        assert {c["finish_reason"] for c in ends} == {"abort"}
        assert frames[-2].json["usage"]["prompt_tokens"] == 3
        assert served.num_live == 0
        assert served.num_ended("abort") == 3


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("max_batch_size", [1, 2, 8])
def test_a_disconnect_ends_every_choice_of_its_request(max_batch_size: int, stream: bool) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(max_batch_size=max_batch_size) as served:
            wire = await served.wire()
            await wire.send(chat_request(ENDLESS, n=4, stream=stream))
            await until(lambda: served.runner.num_drawn.get(1, 0) > 0)
            assert served.num_live == 4
            wire.abort()
            await until(lambda: served.num_live == 0, "every choice is gone")
            assert served.num_ended("abort") == 4
            await until(lambda: not served.runner.prompts)
            async with await served.wire() as other:
                assert (await other.chat("hello")).status == 200

    test()


@in_a_loop
async def test_choices_are_queued_all_or_none() -> None:
    async with serving(max_batch_size=1, max_queue=3) as served:
        running, wire, late = await served.wire(), await served.wire(), await served.wire()
        await running.open_stream(ENDLESS)
        await until(lambda: served.runner.num_drawn.get(1, 0) > 0)
        await wire.send(chat_request("hello", n=2))
        await until(lambda: served.num_live == 3)
        assert (await late.chat("hello", n=2)).status == 429
        assert served.num_live == 3
        await running.close()
        assert len((await wire.answer()).json["choices"]) == 2
        await wire.close()
        await late.close()


@in_a_loop
async def test_more_choices_than_the_queue_can_hold_are_not_a_429() -> None:
    async with serving(max_queue=2) as served, await served.wire() as wire:
        answer = await wire.chat("hello", n=3)
        assert answer.status in (200, 400), "a 429 means that a retry may succeed"
        assert answer.status == 200 or answer.error["param"] == "n"


# --- logprobs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "fields", "tokens"),
    [
        ("héllo", {}, "héllo"),
        ("héllo", {"top_logprobs": 2}, "héllo"),
        ("héllo", {"max_tokens": 2, "top_logprobs": 1}, "hé"),
        ("hello", {"stop": "lo"}, "hello"),  # the tokens were drawn, though not all are shown
        ("abc", {**THREE, "top_logprobs": 20}, "abc"),
    ],
)
def test_logprobs_are_the_same_streamed_or_not(
    content: str, fields: dict[str, Any], tokens: str
) -> None:
    @in_a_loop
    async def test() -> None:
        fields["logprobs"] = True
        async with serving() as served, await served.wire() as wire:
            whole = (await wire.chat(content, **fields)).json
            await wire.open_stream(content, **fields)
            chunks = [frame.json for frame in await wire.rest() if frame != DONE]
            for index, choice in enumerate(whole["choices"]):
                own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
                parts = [part["logprobs"]["content"] for part in own if part["logprobs"]]
                entries = choice["logprobs"]["content"]
                assert [entry for part in parts for entry in part] == entries
                assert "".join(entry["token"] for entry in entries) == tokens[index:]
                assert [entry["logprob"] for entry in entries] == [
                    -0.5 - n for n in range(len(entries))
                ]
                num_top = fields.get("top_logprobs", 0)
                assert {len(entry["top_logprobs"]) for entry in entries} == {num_top}

    test()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_token_without_bytes_ends_its_answer_at_once(stream: bool) -> None:
    class Model(FakeModel):
        def token_bytes(self, token: int) -> bytes:
            raise KeyError(token)

    @in_a_loop
    async def test() -> None:
        async with serving(Model()) as served, await served.wire() as wire:
            await wire.send(chat_request("hello", logprobs=True, stream=stream))
            head = await asyncio.wait_for(wire.head(), 2)
            assert head.status == (200 if stream else 500)
            if stream:
                assert (await asyncio.wait_for(wire.rest(), 2))[-1] == DONE
            await until(lambda: served.num_live == 0)

    test()


@pytest.mark.parametrize("names", [("begin",), ("event", "fail"), ("done", "fail")])
def test_an_answer_that_cannot_even_fail_is_cut_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    def fail(*_: Any) -> bytes:
        raise RuntimeError("a mistake of ours")

    for name in names:
        monkeypatch.setattr(ChatWriter, name, fail)

    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            assert (await wire.open_stream("hello")).status == 200
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(wire.rest(), 2)
            await until(lambda: served.num_live == 0)
            assert not served.server.service.running
            await until(lambda: served.num_clients == 0)
            async with await served.wire() as other:
                assert (await other.chat("hello")).status == 200

    test()


@pytest.mark.parametrize(("path", "kind"), [(CHAT, "openai"), ("/v1/messages", "anthropic")])
@pytest.mark.parametrize("piece", [b"zz\r\n", b"%x\r\n" % ((1 << 20) + 1)])
def test_a_body_that_turns_into_nonsense_is_refused_in_its_own_dialect(
    path: str, kind: str, piece: bytes
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(max_body_mb=1) as served, await served.wire() as wire:
            fields = {"transfer_encoding": "chunked", "x_request_id": "mine"}
            await wire.send(request("POST", path, **fields) + b"2\r\n{}\r\n")
            await until(lambda: any(client.is_busy for client in served.clients))
            await wire.send(piece)
            answer = await wire.answer()
            assert answer.status in (400, 413)
            assert ("type" in answer.json) is (kind == "anthropic")
            assert answer["x-request-id"] == "mine"
            assert answer["connection"] == "close"
            assert await wire.is_cut()

    test()


@in_a_loop
async def test_logprobs_of_an_answer_without_tokens_are_an_empty_list() -> None:
    async with serving() as served, await served.wire() as wire:
        answer = await wire.chat("hello", logprobs=True, stop_token_ids=[ord("h")])
        (choice,) = answer.json["choices"]
        assert choice["message"]["content"] == ""
        assert choice["logprobs"] == {"content": []}


@in_a_loop
async def test_logprobs_are_null_unless_requested() -> None:
    async with serving() as served, await served.wire() as wire:
        assert (await wire.chat("hello")).json["choices"][0]["logprobs"] is None
        await wire.open_stream("hello", logprobs=False)
        chunks = [frame.json for frame in await wire.rest() if frame != DONE]
        assert all(c["logprobs"] is None for chunk in chunks for c in chunk["choices"])


# --- what ends an answer, and what steers it ----------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text", "reason", "num_tokens"),
    [
        ({"ignore_eos": True, "max_tokens": 9}, "hello", "length", 9),
        ({"stop_token_ids": [ord("l")]}, "he", "stop", 3),
        ({"stop_token_ids": [ord("z"), 2**31 - 1]}, "hello", "stop", 6),
        ({"stop_token_ids": [ord("l")], "ignore_eos": True}, "he", "stop", 3),
    ],
)
def test_end_tokens_are_the_models_and_the_requests(
    fields: dict[str, Any], text: str, reason: str, num_tokens: int
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            answer = (await wire.chat("hello", **fields)).json
            (choice,) = answer["choices"]
            assert choice["message"]["content"] == text
            assert choice["finish_reason"] == reason
            assert answer["usage"]["completion_tokens"] == num_tokens

    test()


@in_a_loop
async def test_a_bias_on_a_token_that_the_model_does_not_have_is_a_400() -> None:
    async with serving(FakeModel(num_vocab=100)) as served, await served.wire() as wire:
        assert (await wire.chat("x", logit_bias={"99": 1})).status == 200
        for id in ("100", "999999", "9" * 4000):
            answer = await wire.chat("x", logit_bias={"5": 1, id: 1})
            assert answer.status == 400
            assert answer.error["param"] == "logit_bias"
            assert id[:6] in answer.error["message"]
            assert len(answer.body) < 1000
        assert served.num_ended("stop") == 1


@in_a_loop
async def test_an_urgent_request_overtakes_the_queue_but_not_its_own_priority() -> None:
    async with serving(max_batch_size=1) as served:
        wires = [await served.wire() for _ in range(4)]
        served.runner.hold()
        for n, (wire, priority) in enumerate(zip(wires, (-10, 0, 5, -10), strict=True), 1):
            await wire.send(chat_request(f"number {n}", priority=priority))
            await until(lambda n=n: served.num_live == n)  # type: ignore[misc]
        served.runner.release()
        for n, wire in enumerate(wires, 1):
            answer = await wire.answer()
            assert answer.json["choices"][0]["message"]["content"] == f"number {n}"
            await wire.close()
        assert served.runner.admitted == [1, 4, 2, 3]


@in_a_loop
async def test_an_urgent_request_takes_the_place_of_another_which_loses_nothing() -> None:
    async with serving(max_batch_size=1) as served:
        async with await served.wire() as patient, await served.wire() as urgent:
            await patient.open_stream("patience" + ENDLESS, max_tokens=300)
            await until(lambda: served.runner.num_drawn.get(1, 0) > 10)
            assert (await urgent.chat("now", priority=-10)).status == 200
            frames = await patient.rest()
            assert text_of(frames) == (("patience" + ENDLESS) * 34)[:300]
            assert frames[-2].json["usage"]["completion_tokens"] == 300
        assert served.runner.admitted == [1, 2, 1]


# --- reasoning, tools, what must match ------------------------------------------------------------

THOUGHT = "<think>hm, a 3</think>"
CALLS = (
    '<call>{"name": "f", "arguments": {"a": "3"}}</call> '
    '<call>{"name": "g", "arguments": {}}</call>'
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "adds",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    },
    {"type": "function", "function": {"name": "g"}},
]


def marked(**settings: Any) -> FakeModel:
    return FakeModel(output_format=MARKERS, **settings)


def in_parts() -> FakeModel:
    return FakeModel(output_format=replace(MARKERS, has_json_calls=True))


def folded(frames: list[Frame]) -> dict[str, Any]:
    """A stream's message, as one that does not stream has it; calls without their ids."""
    choices = [c for f in frames if f != DONE for c in f.json["choices"]]
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    for choice in choices:
        for name in ("content", "reasoning", "reasoning_content"):
            if name in choice["delta"]:
                message[name] = message.get(name, "") + choice["delta"][name]
        for call in choice["delta"].get("tool_calls", ()):
            called = message.setdefault("tool_calls", [])
            index = call.pop("index")
            if "id" in call:
                assert index == len(called)
                called.append(call)
            else:
                assert index == len(called) - 1
                called[index]["function"]["arguments"] += call["function"]["arguments"]
    if "tool_calls" in message and not message["content"]:
        message["content"] = None
    ends = {k: choices[-1][k] for k in ("finish_reason", "stop_reason")}
    return without_ids({"message": message} | ends)


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    calls = choice["message"].get("tool_calls", ())
    ids = [call.pop("id") for call in calls]
    assert len(set(ids)) == len(ids)
    assert all(id.startswith("call_") for id in ids)
    return {k: choice[k] for k in ("message", "finish_reason", "stop_reason")}


async def told(wire: Wire, content: str, **fields: Any) -> dict[str, Any]:
    """A chat's choice, which is the same in a stream, but for the white space of arguments."""
    answer = await wire.chat(content, **fields)
    assert answer.status == 200, answer.body
    choice = without_ids(answer.json["choices"][0])
    await wire.open_stream(content, **fields)
    streamed = folded(await wire.rest())
    calls = (c["message"].get("tool_calls", ()) for c in (streamed, choice))
    for call, other in zip(*calls, strict=True):
        if json.loads(call["function"]["arguments"]) == json.loads(other["function"]["arguments"]):
            call["function"]["arguments"] = other["function"]["arguments"]
    assert streamed == choice
    return choice


@in_a_loop
async def test_reasoning_is_separate_unless_reasoning_format_keeps_it_inline() -> None:
    async with serving(marked()) as served, await served.wire() as wire:
        said = await told(wire, THOUGHT + "\n\nthree")
        assert said["message"]["content"] == "three"
        assert said["message"]["reasoning_content"] == "hm, a 3"
        assert said["message"]["reasoning"] == "hm, a 3"
        usage = (await wire.chat(THOUGHT + "three")).json["usage"]
        count = usage["completion_tokens_details"]["reasoning_tokens"]
        assert len("hm, a 3") <= count <= len(THOUGHT)
        assert usage["completion_tokens"] == len(THOUGHT + "three") + 1
        for whole in ("auto", "split", "deepseek"):
            assert await told(wire, THOUGHT + "\n\nthree", reasoning_format=whole) == said
        within = await told(wire, THOUGHT + "three", reasoning_format="none")
        assert within["message"]["content"] == THOUGHT + "three"
        assert "reasoning" not in within["message"]


@in_a_loop
async def test_reasoning_that_the_prompt_has_opened_needs_no_marker() -> None:
    async with serving(marked(is_thinking=True)) as served, await served.wire() as wire:
        message = (await told(wire, "hm</think>three"))["message"]
        assert (message["reasoning"], message["content"]) == ("hm", "three")


@in_a_loop
async def test_calls_are_read_with_the_types_of_their_schemas() -> None:
    async with serving(marked()) as served, await served.wire() as wire:
        said = await told(wire, f"{THOUGHT}Let me see. {CALLS}", tools=TOOLS)
        assert said["finish_reason"] == "tool_calls"
        assert said["message"]["content"] == "Let me see."
        assert said["message"]["reasoning"] == "hm, a 3"
        assert said["message"]["tool_calls"] == [
            {"type": "function", "function": {"name": "f", "arguments": '{"a":3}'}},
            {"type": "function", "function": {"name": "g", "arguments": "{}"}},
        ]
        assert served.model.rendered[-1][1]["tools"] == [
            TOOLS[0],
            {
                "type": "function",
                "function": {
                    "name": "g",
                    "description": "",
                    "parameters": {"type": "object", "properties": {}},
                },
            },
        ]
        assert (await told(wire, CALLS, tools=TOOLS))["message"]["content"] is None


@in_a_loop
async def test_arguments_of_json_calls_are_streamed_as_they_are_generated() -> None:
    asked: dict[str, Any] = {"tools": TOOLS, "logprobs": True, "top_logprobs": 1}
    calls = CALLS.replace('"3"', '3, "text": "ab\\n</call>"')
    async with serving(in_parts()) as served, await served.wire() as wire:
        said = await told(wire, f"Let me see. {calls}!", tools=TOOLS)
        f, g = (call["function"] for call in said["message"]["tool_calls"])
        assert f == {"name": "f", "arguments": '{"a":3,"text":"ab\\n</call>"}'}
        assert (g, said["message"]["content"]) == ({"name": "g", "arguments": "{}"}, "Let me see.!")
        whole = (await wire.chat(calls, **asked)).json["choices"][0]["logprobs"]["content"]
        await wire.open_stream(calls, **asked)
        choices = [c for f in await wire.rest() if f != DONE for c in f.json["choices"]]
        assert [
            entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]
        ] == whole
        assert len(whole) == len(calls)
        found = [call for c in choices for call in c["delta"].get("tool_calls", ())]
        pieces = [call["function"]["arguments"] for call in found if call["index"] == 0]
        assert pieces == ["", *'{"a": 3, "text": "ab\\n</call>"}'], "a character is a token here"
        await wire.open_stream(CALLS, tools=TOOLS)
        (f, _) = folded(await wire.rest())["message"]["tool_calls"]
        assert f["function"]["arguments"] == '{"a": "3"}', "with the model's own types"
        one = await told(wire, calls + ENDLESS, tools=TOOLS, parallel_tool_calls=False)
        assert [c["function"]["name"] for c in one["message"]["tool_calls"]] == ["f"]


@in_a_loop
async def test_a_streamed_call_that_breaks_is_no_call_and_the_whole_answer_is_text() -> None:
    broken = '<call>{"name": "f", "arguments": {"a": "3", !}}</call> so'
    async with serving(in_parts()) as served, await served.wire() as wire:
        choice = (await wire.chat(broken, tools=TOOLS)).json["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (broken, "stop")
        await wire.open_stream(broken, tools=TOOLS)
        streamed = folded(await wire.rest())
        (call,) = streamed["message"]["tool_calls"]
        assert call["function"] == {"name": "f", "arguments": '{"a": "3", '}
        assert streamed["message"]["content"] == "!}}</call> so"
        assert streamed["finish_reason"] == "stop"


@in_a_loop
async def test_one_call_is_the_end_where_only_one_is_wanted() -> None:
    async with serving(marked()) as served, await served.wire() as wire:
        said = await told(wire, CALLS + ENDLESS, tools=TOOLS, parallel_tool_calls=False)
        assert said["finish_reason"] == "tool_calls"
        assert [c["function"]["name"] for c in said["message"]["tool_calls"]] == ["f"]
        assert served.num_live == 0


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        (CALLS, {}),
        (CALLS, {"tools": []}),
        (CALLS, {"tools": TOOLS, "tool_choice": "none"}),
        ("<call>{no JSON</call>", {"tools": TOOLS}),
        ("<call>[]</call>", {"tools": TOOLS}),
        ('<call>{"name": "f", "arguments": 5}</call>', {"tools": TOOLS}),
        ('<call>{"name": "f", "argum', {"tools": TOOLS}),
    ],
)
def test_without_tools_or_if_it_cannot_be_read_a_call_is_text(
    content: str, fields: dict[str, Any]
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(marked()) as served, await served.wire() as wire:
            said = await told(wire, content, **fields)
            assert said["message"]["content"] == content
            assert "tool_calls" not in said["message"]
            assert said["finish_reason"] == "stop"

    test()


@in_a_loop
async def test_what_must_match_is_compiled_before_the_answer_begins() -> None:
    async with serving(marked(is_thinking=True)) as served, await served.wire() as wire:
        for path, body in (
            (CHAT, chat_body("x", guided_regex="a+", thinking_budget=5)),
            ("/v1/completions", {"prompt": "x", "guided_regex": "a+", "thinking_budget": 5}),
        ):
            assert (await wire.post(path, body)).status == 200
        chat, completion = served.model.compiled
        assert chat.constraint == completion.constraint == TextConstraint(Kind.REGEX, "a+")
        assert (chat.is_thinking, completion.is_thinking) == (True, False)
        assert chat.budget == completion.budget == 5
        await wire.chat("x", thinking_budget=0)
        assert (served.model.compiled[-1].constraint, served.model.compiled[-1].budget) == (None, 0)
        await wire.chat("x", response_format={"type": "text"}, tools=TOOLS)
        assert len(served.model.compiled) == 3, "nothing has to match"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"grammar": "?"}, "grammar"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"function": {"name": "f", "strict": True}}]}, "tools"),
        ({"thinking_budget": 5}, "thinking_budget"),
        ({"thinking_budget_tokens": 5}, "thinking_budget"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_constraint_that_cannot_be_compiled_is_a_400_with_the_reason(
    fields: dict[str, Any], param: str, stream: bool
) -> None:
    @in_a_loop
    async def test() -> None:
        model = marked(compile_error=ConstraintError("no such thing"))
        async with serving(model) as served, await served.wire() as wire:
            answer = await wire.chat("x", stream=stream, **fields)
            assert answer.status == 400
            assert answer.error["param"] == param
            assert answer.error["message"] == f"'{param}': no such thing"
            assert served.runner.admitted == []
            assert (await wire.chat("x")).status == 200

    test()


@in_a_loop
async def test_the_repetition_guard_ends_a_looping_answer_when_enabled() -> None:
    async with serving(repetition_guard=64) as served, await served.wire() as wire:
        said = await told(wire, "over and " + ENDLESS)
        assert (said["finish_reason"], said["stop_reason"]) == ("length", "repetition")
        written = said["message"]["content"]
        assert 64 <= len(written) <= 64 + 2 * 16
        assert written.startswith("over and " + ENDLESS)
        straight = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
        said = await told(wire, straight)
        assert (said["finish_reason"], said["stop_reason"]) == ("stop", None)
        assert said["message"]["content"] == straight
    async with serving() as served, await served.wire() as wire:
        said = await told(wire, "over and " + ENDLESS, max_tokens=500)
        assert (said["finish_reason"], said["stop_reason"]) == ("length", None)
        assert len(said["message"]["content"]) == 500


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "status", "type_", "code"),
    [
        (request("GET", "/nowhere"), 404, "not_found_error", "not_found"),
        (request("GET", "/v1"), 404, "not_found_error", "not_found"),
        (request("GET", "/v1/v1/health"), 404, "not_found_error", "not_found"),
        (request("GET", CHAT), 405, "invalid_request_error", "method_not_allowed"),
        (request("DELETE", "/health"), 405, "invalid_request_error", "method_not_allowed"),
        (request("POST", "/v1/models", b"{}"), 405, "invalid_request_error", "method_not_allowed"),
        (
            request("POST", CHAT, b"{}", content_type="text/plain"),
            415,
            "invalid_request_error",
            "unsupported_media_type",
        ),
        (
            request("POST", CHAT, b"{}", content_type="multipart/form-data; boundary=x"),
            415,
            "invalid_request_error",
            "unsupported_media_type",
        ),
        (request("POST", CHAT, b"{"), 400, "invalid_request_error", None),
        (request("POST", CHAT, b"\xff"), 400, "invalid_request_error", None),
        (request("POST", CHAT, b""), 400, "invalid_request_error", None),
        (request("POST", CHAT, b"{}"), 400, "invalid_request_error", None),
        (request("POST", "/v1/cancel", b"[]"), 400, "invalid_request_error", None),
        (chat_request("x", echo=True), 400, "invalid_request_error", "unsupported_parameter"),
        (chat_request("x", tools=[{}]), 400, "invalid_request_error", None),
        (  # the model has no format for them
            chat_request("x", tools=[TOOL]),
            400,
            "invalid_request_error",
            "unsupported_parameter",
        ),
        (chat_request(""), 400, "invalid_request_error", None),
    ],
    ids=lambda value: value[:60].decode("latin-1") if isinstance(value, bytes) else str(value),
)
def test_a_refusal_has_a_status_and_an_envelope_and_keeps_the_connection(
    raw: bytes, status: int, type_: str, code: str | None
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            await wire.send(raw)
            answer = await wire.answer()
            assert answer.status == status
            assert answer.error["type"] == type_
            assert answer.error["code"] == code
            assert answer["x-request-id"]
            if "connection" in answer:  # the body was not read
                assert answer["connection"] == "close"
                assert await wire.is_cut()
            else:
                assert (await wire.get("/health")).status == 200

    test()


@in_a_loop
async def test_a_405_lists_the_allowed_methods() -> None:
    async with serving() as served, await served.wire() as wire:
        assert (await wire.get(CHAT))["allow"] == "POST, OPTIONS"
        assert (await wire.ask("PUT", "/health"))["allow"] == "GET, HEAD, OPTIONS"


@in_a_loop
async def test_a_body_that_is_too_large_is_a_413_before_it_is_read() -> None:
    async with serving(max_body_mb=1) as served:
        async with await served.wire() as wire:
            await wire.send(request("POST", CHAT, content_length=str((1 << 20) + 1)))
            announced = await wire.answer()
        async with await served.wire() as wire:
            await wire.send(request("POST", CHAT, transfer_encoding="chunked"))
            await wire.send(b"%x\r\n" % ((1 << 20) + 1))
            chunked = await wire.answer()
        for answer in (announced, chunked):
            assert answer.status == 413
            assert answer.error["type"] == "invalid_request_error"
            assert answer["connection"] == "close"


@pytest.mark.parametrize(
    "raw",
    [
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/3.0\r\nHost: localhost\r\n\r\n",
        request("GET", "/health", content_length="x"),
        request("POST", CHAT, transfer_encoding="chunked") + b"zz\r\n",
        request("POST", CHAT, content_length=str(1 << 40)),
    ],
)
def test_even_an_answer_to_broken_http_has_a_request_id_and_an_envelope(raw: bytes) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            await wire.send(raw)
            answer = await wire.answer()
            assert 400 <= answer.status < 600
            assert answer.error["code"] == "malformed_request"
            assert await wire.is_cut()
            assert answer["x-request-id"]

    test()


@pytest.mark.parametrize(
    ("content_type", "origin", "status"),
    [
        ("application/json", "", 200),
        ("Application/JSON; charset=utf-8", "", 200),
        ("application/vnd.api+json", "", 200),
        ("", "", 200),
        ("application/x-www-form-urlencoded", "", 200),  # curl -d
        ("application/x-www-form-urlencoded", "http://evil.example", 415),
        ("text/plain", "http://evil.example", 415),
        ("", "http://evil.example", 415),  # fetch with a Blob that has no type
    ],
)
def test_a_foreign_page_cannot_post_without_a_preflight(
    content_type: str, origin: str, status: int
) -> None:
    """A browser asks first (preflight) for JSON alone, so a foreign page may send nothing else."""

    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            body = json.dumps(chat_body("x")).encode()
            answer = await wire.ask("POST", CHAT, body, content_type=content_type, origin=origin)
            assert answer.status == status

    test()


# --- access control -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer secre"}, 401),
        ({"authorization": "Bearer secret "}, 200),
        ({"authorization": "Bearer secret"}, 200),
        ({"authorization": "bearer second"}, 200),
        ({"authorization": "Basic secret"}, 401),
        ({"authorization": "secret"}, 401),
        ({"authorization": "Bearer s\xe9cret"}, 401),
        ({"x-api-key": "secret"}, 200),
        ({"x-api-key": "wrong"}, 401),
        ({"x-api-key": ""}, 401),
    ],
)
def test_a_key_gives_access_to_the_protected_endpoints(
    headers: dict[str, str], status: int
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(api_key=("secret", "second")) as served:
            for method, path, body in (
                ("GET", "/v1/models", None),
                ("GET", "/models/fake", None),
                ("POST", CHAT, json.dumps(chat_body("x")).encode()),
                ("POST", "/cancel", b"{}"),
            ):
                async with await served.wire() as wire:
                    answer = await wire.ask(method, path, body, **headers)
                    assert answer.status == status, path
                    if status == 401:
                        assert answer["www-authenticate"] == "Bearer"
                        assert answer.error["type"] == "authentication_error"
                        assert answer.error["code"] == "unauthorized"
                        assert answer.error["message"] == "Unauthorized"

    test()


@in_a_loop
async def test_health_metrics_and_preflights_need_no_key() -> None:
    async with serving(api_key=("secret",)) as served, await served.wire() as wire:
        for path in ("/health", "/v1/health", "/metrics"):
            assert (await wire.get(path)).status == 200
        assert (await wire.ask("OPTIONS", CHAT)).status == 204
        assert (await wire.get("/nowhere")).status == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8080", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:3000", 200),
        ("[::1]:3000", 200),
        ("app.localhost", 200),
        ("evil.example", 403),
        ("evil.example:8080", 403),
        ("127.0.0.1.evil.example", 403),
        ("notlocalhost", 403),
        ("localhost.evil.example", 403),
        ("192.168.1.5", 403),
        ("[::1", 403),
        ("0.0.0.0", 403),
    ],
)
def test_on_loopback_only_local_names_are_answered(host: str, status: int) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served:
            for method, path in (("GET", "/health"), ("OPTIONS", CHAT), ("GET", "/v1/models")):
                async with await served.wire() as wire:
                    answer = await wire.ask(method, path, host=host)
                    assert answer.status == (
                        204 if (method, status) == ("OPTIONS", 200) else status
                    )
                    if status == 403:
                        assert answer.error["code"] == "host_not_allowed"

    test()


@in_a_loop
async def test_http_1_0_may_leave_the_host_out() -> None:
    async with serving() as served, await served.wire() as wire:
        await wire.send(b"GET /health HTTP/1.0\r\n\r\n")
        assert (await wire.answer()).status == 200
        assert await wire.is_cut()


# --- pages in browsers --------------------------------------------------------------------------

ALLOWED = [
    "tauri://localhost",
    "http://localhost:5173",
    "http://127.0.0.1:8080",
    "http://localhost",
]
FOREIGN = [
    "http://evil.example",
    "https://localhost",
    "http://localhost.evil.example",
    "http://evil.example#http://localhost",
    "http://user@evil.example",
    "null",
    "localhost",
    "http://[",
    "http://[::1",
    "://",
]


@pytest.mark.parametrize("origin", ALLOWED)
def test_a_page_on_this_machine_may_call(origin: str) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(api_key=("k",)) as served, await served.wire() as wire:
            preflight = await wire.ask(
                "OPTIONS",
                CHAT,
                origin=origin,
                access_control_request_method="POST",
                access_control_request_headers="authorization, content-type, x-stainless-os",
            )
            assert preflight.status == 204
            assert preflight["access-control-allow-origin"] == origin
            assert "POST" in preflight["access-control-allow-methods"]
            assert "x-stainless-os" in preflight["access-control-allow-headers"]
            for answer in (
                await wire.get("/health", origin=origin),
                await wire.get("/nowhere", origin=origin),
                await wire.get("/v1/models", origin=origin),  # 401, and the page may read it
                await wire.ask("POST", CHAT, b"{", origin=origin, x_api_key="k"),
            ):
                assert answer["access-control-allow-origin"] == origin
                assert "x-request-id" in answer["access-control-expose-headers"]
                assert answer["vary"].lower() == "origin"

    test()


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize(
    "raw",
    [
        request("OPTIONS", CHAT, access_control_request_method="POST", origin="*"),
        request("GET", "/health", origin="*"),
        request("POST", CHAT, json.dumps(chat_body("x")).encode(), origin="*"),
        request("POST", CHAT, json.dumps(chat_body("x", stream=True)).encode(), origin="*"),
    ],
    ids=["preflight", "health", "chat", "stream"],
)
def test_a_page_of_a_foreign_origin_is_refused_by_cors_whatever_its_name(
    raw: bytes, origin: str
) -> None:
    @in_a_loop
    async def test() -> None:
        answer = None
        async with serving() as served:
            async with await served.wire() as wire:
                await wire.send(raw.replace(b"origin: *", f"origin: {origin}".encode()))
                with suppress(asyncio.IncompleteReadError, TimeoutError):
                    answer = await asyncio.wait_for(wire.answer(), 2)
            async with await served.wire() as wire:
                assert (await wire.chat("x")).status == 200, "the server serves on"
            assert served.server.service.phase is Phase.READY
            assert answer is not None, "it got no answer"
            assert answer.status in (200, 204)
            assert not [name for name, _ in answer.headers if "access-control" in name]

    test()


@in_a_loop
async def test_a_stream_has_the_cors_header_of_its_origin() -> None:
    async with serving() as served, await served.wire() as wire:
        body = json.dumps(chat_body("x", stream=True)).encode()
        await wire.send(request("POST", CHAT, body, origin="tauri://localhost"))
        assert (await wire.head())["access-control-allow-origin"] == "tauri://localhost"
        assert (await wire.rest())[-1] == DONE


# --- connections --------------------------------------------------------------------------------


@in_a_loop
async def test_a_connection_serves_one_request_after_another() -> None:
    async with serving() as served, await served.wire() as wire:
        for n in range(3):
            text = f"number {n}"
            assert (await wire.chat(text)).json["choices"][0]["message"]["content"] == text
        assert served.num_clients == 1


@in_a_loop
async def test_pipelined_requests_are_answered_in_their_order() -> None:
    async with serving() as served, await served.wire() as wire:
        await wire.send(
            chat_request("one")
            + request("GET", "/health")
            + chat_request("two", stream=True)
            + request("GET", "/nowhere")
            + chat_request("three")
        )
        assert (await wire.answer()).json["choices"][0]["message"]["content"] == "one"
        assert (await wire.answer()).json["status"] == "ok"
        assert (await wire.head()).status == 200
        assert text_of(await wire.rest()) == "two"
        assert (await wire.answer()).status == 404
        assert (await wire.answer()).json["choices"][0]["message"]["content"] == "three"


@in_a_loop
async def test_pipelining_without_end_is_bounded_and_loses_nothing() -> None:
    async with serving() as served, await served.wire() as wire:
        served.runner.hold()
        await wire.open_stream("x")
        num = 3 * MAX_PIPELINED_BYTES // len(request("GET", "/health")) + 1
        sending = asyncio.ensure_future(wire.send(request("GET", "/health") * num))
        (client,) = served.clients
        await until(lambda: not client._transport.is_reading(), "reading pauses")
        assert client.http.num_buffered < MAX_PIPELINED_BYTES + (1 << 18)
        served.runner.release()
        await wire.rest()
        for _ in range(num):
            assert (await wire.answer()).status == 200
        await sending


@in_a_loop
async def test_pipelined_requests_do_not_starve_other_connections() -> None:
    async with serving() as served, await served.wire() as wire:
        assert (await wire.get("/health")).status == 200
        (client,) = served.clients
        other = await served.wire()
        raw, num = request("GET", "/health"), 2000
        client.data_received(raw * num)  # as one read of the loop may
        assert client.http.num_buffered == (num - MAX_AT_ONCE) * len(raw)
        assert not client._transport.is_reading()
        assert (await other.get("/health")).status == 200
        assert client.http.num_buffered > 0, "the other was served in between"
        for _ in range(num):
            assert (await wire.answer()).status == 200
        assert client._transport.is_reading()
        await other.close()


@in_a_loop
async def test_a_request_may_arrive_byte_by_byte() -> None:
    async with serving() as served, await served.wire() as wire:
        for byte in chat_request("hello"):
            await wire.send(bytes([byte]))
        assert (await wire.answer()).json["choices"][0]["message"]["content"] == "hello"


@in_a_loop
async def test_a_body_may_be_chunked() -> None:
    async with serving() as served, await served.wire() as wire:
        body = json.dumps(chat_body("hello")).encode()
        fields = {"content_type": "application/json", "transfer_encoding": "chunked"}
        await wire.send(request("POST", CHAT, **fields))
        for piece in (body[:10], body[10:]):
            await wire.send(b"%x\r\n%b\r\n" % (len(piece), piece))
        await wire.send(b"0\r\n\r\n")
        assert (await wire.answer()).json["choices"][0]["message"]["content"] == "hello"


@in_a_loop
async def test_expect_100_continue_is_answered_with_100_or_the_refusal() -> None:
    async with serving(api_key=("k",)) as served:
        raw = request("POST", CHAT, json.dumps(chat_body("x")).encode(), expect="100-continue")
        head, _, body = raw.partition(b"\r\n\r\n")
        async with await served.wire() as wire:
            await wire.send(head + b"\r\nx-api-key: k\r\n\r\n")
            assert (await wire.answer()).status == 100
            await wire.send(body)
            assert (await wire.answer()).status == 200
        async with await served.wire() as wire:
            await wire.send(head + b"\r\n\r\n")
            answer = await wire.answer()
            assert answer.status == 401, "and no 100 before it"
            assert answer["connection"] == "close"


@in_a_loop
async def test_connection_close_is_obeyed_and_so_is_http_1_0() -> None:
    async with serving() as served:
        async with await served.wire() as wire:
            answer = await wire.get("/health", connection="close")
            assert answer["connection"] == "close"
            assert await wire.is_cut()
        async with await served.wire() as wire:
            body = json.dumps(chat_body("hello", stream=True)).encode()
            raw = request("POST", CHAT, body).replace(b"HTTP/1.1", b"HTTP/1.0")
            await wire.send(raw)
            assert "transfer-encoding" not in await wire.head()
            assert text_of(await wire.rest()) == "hello"


@pytest.mark.parametrize("given", ["abc-123", "x" * 128, "a b"])
def test_a_request_id_is_echoed(given: str) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            assert (await wire.get("/health", x_request_id=given))["x-request-id"] == given
            assert (await wire.get("/nowhere", x_request_id=given))["x-request-id"] == given
            await wire.send(
                request(
                    "POST",
                    CHAT,
                    json.dumps(chat_body("x", stream=True)).encode(),
                    x_request_id=given,
                )
            )
            assert (await wire.head())["x-request-id"] == given
            await wire.rest()

    test()


@in_a_loop
async def test_a_request_id_is_made_where_none_can_be_used() -> None:
    async with serving() as served, await served.wire() as wire:
        made = [
            (await wire.get("/health"))["x-request-id"],
            (await wire.get("/health"))["x-request-id"],
            (await wire.get("/health", x_request_id="x" * 129))["x-request-id"],
            (await wire.get("/health", x_request_id="\xe9"))["x-request-id"],
        ]
        assert len(set(made)) == 4
        assert all(id.startswith("req_") for id in made)


@in_a_loop
async def test_a_connection_beyond_the_maximum_is_a_503_and_the_others_stay() -> None:
    async with (
        serving(max_connections=2) as served,
        await served.wire() as one,
        await served.wire() as two,
    ):
        assert (await one.get("/health")).status == 200
        assert (await two.get("/health")).status == 200
        async with await served.wire() as three:
            refused = await three.answer()
            assert refused.status == 503
            assert refused["retry-after"] == "1"
            assert refused.error["code"] == "unavailable"
            assert refused["x-request-id"]
            assert await three.is_cut()
        assert (await one.get("/health")).status == 200
        await until(lambda: served.num_clients == 2)
        await two.close()
        await until(lambda: served.num_clients == 1)
        async with await served.wire() as four:
            assert (await four.get("/health")).status == 200


# --- time ---------------------------------------------------------------------------------------


@in_a_loop
async def _idle(clock: Clock, send: bytes, limit_s: float) -> None:
    async with serving() as served, await served.wire() as wire:
        await wire.send(send)
        await until(lambda: served.num_clients == 1)
        if send:
            (client,) = served.clients
            await until(lambda: client.http.num_buffered or client.is_busy)
        await pass_time(served, clock, limit_s - 0.1)
        assert served.num_clients == 1
        await pass_time(served, clock, 0.2)
        await until(lambda: served.num_clients == 0)
        assert await wire.is_cut()


def test_a_silent_connection_is_closed(clock: Clock) -> None:
    _idle(clock, b"", HEADER_TIMEOUT_S)


def test_a_peer_that_does_not_finish_its_head_is_cut(clock: Clock) -> None:
    _idle(clock, b"GET /health HTTP/1.1\r\nHo", HEADER_TIMEOUT_S)


def test_a_head_that_drips_has_no_more_time_than_one_that_stops(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            (await wire.get("/health"))
            (client,) = served.clients
            for num, byte in enumerate(b"GET /he", 1):
                await wire.send(bytes([byte]))
                await until(lambda num=num: client.http.num_buffered == num)
                await pass_time(served, clock, HEADER_TIMEOUT_S / 6)
            await until(lambda: served.num_clients == 0)

    test()


def test_empty_lines_before_a_request_do_not_extend_its_deadline(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            await until(lambda: served.num_clients == 1)
            for _ in range(5):
                if served.num_clients:
                    await wire.send(b"\r\n")
                    await pass_time(served, clock, HEADER_TIMEOUT_S / 3)
            assert served.num_clients == 0

    test()


def test_a_body_that_stops_gets_a_408(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            await wire.send(chat_request("hello")[:-5])
            await until(lambda: any(client.is_busy for client in served.clients))
            await pass_time(served, clock, BODY_TIMEOUT_S - 1)
            (client,) = served.clients
            before = client._deadline
            await wire.send(b"x")
            await until(lambda: client._deadline > before, "a byte buys time")
            await pass_time(served, clock, BODY_TIMEOUT_S - 1)
            assert served.num_clients == 1
            await pass_time(served, clock, 2)
            answer = await wire.answer()
            assert answer.status == 408
            assert answer["connection"] == "close"
            assert answer.error["code"] == "request_timeout"
            assert await wire.is_cut()

    test()


def test_a_body_that_drips_gets_a_408_in_the_end(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            await wire.send(request("POST", CHAT, content_length=str(1 << 20)))
            await until(lambda: any(client.is_busy for client in served.clients))
            (client,) = served.clients
            began = clock.now
            step_s = BODY_TIMEOUT_S - 1
            while clock.now - began < BODY_GRACE_S - step_s:
                before = client._num_body_bytes
                await wire.send(b" ")
                await until(lambda before=before: client._num_body_bytes > before)
                assert served.num_clients == 1
                await pass_time(served, clock, step_s)
            await wire.send(b" ")
            await pass_time(served, clock, BODY_GRACE_S + 1 - (clock.now - began))
            assert (await wire.answer()).status == 408
            assert await wire.is_cut()

    test()


def test_a_large_body_may_take_its_time(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            body = json.dumps(chat_body("hello")).encode()
            piece = b" " * 10 * MIN_BODY_RATE  # what 10 s at the least allow
            num = 3 * int(BODY_GRACE_S / 10)
            await wire.send(request("POST", CHAT, content_length=str(num * len(piece) + len(body))))
            await until(lambda: any(client.is_busy for client in served.clients))
            (client,) = served.clients
            for n in range(1, num + 1):
                await wire.send(piece)
                await until(lambda n=n: client._num_body_bytes == n * len(piece))
                await pass_time(served, clock, 10)
            await wire.send(body)
            assert (await wire.answer()).status == 200

    test()


def test_an_idle_connection_is_closed_after_the_keep_alive_time(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            assert (await wire.get("/health")).status == 200
            await pass_time(served, clock, KEEP_ALIVE_S - 1)
            assert (await wire.get("/health")).status == 200, "each request begins it anew"
            await pass_time(served, clock, KEEP_ALIVE_S - 1)
            assert served.num_clients == 1
            await pass_time(served, clock, 2)
            assert await wire.is_cut()

    test()


def test_a_model_may_take_its_time(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            served.runner.hold()
            await wire.send(chat_request("hello"))
            await until(lambda: served.num_live == 1)
            await pass_time(served, clock, 3600)
            served.runner.release()
            assert (await wire.answer()).status == 200

    test()


def test_a_silent_stream_is_kept_alive_by_comments(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            served.runner.hold()
            await wire.open_stream("hello")
            await wire.frame()
            for _ in range(3):
                await pass_time(served, clock, HEARTBEAT_S + 0.1)
                assert await wire.frame() == Frame("", "")
            served.runner.release()
            assert text_of(await wire.rest()) == "hello"
            await pass_time(served, clock, HEARTBEAT_S + 0.1)
            assert (await wire.get("/health")).status == 200, "and no comment before it"

    test()


def test_a_request_that_takes_too_long_ends_with_an_error_and_frees_its_row(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with (
            serving(request_timeout_s=30, max_batch_size=2) as served,
            await served.wire() as streamed,
            await served.wire() as whole,
        ):
            served.runner.hold()
            await streamed.open_stream("ab" + ENDLESS)
            await whole.send(chat_request(ENDLESS, n=2))  # the second of them in the queue
            await until(lambda: served.num_live == 3)
            await pass_time(served, clock, 20)
            late = await served.wire()
            await late.send(chat_request("hello"))
            await until(lambda: served.num_live == 4)
            await pass_time(served, clock, 10.5)
            served.runner.release()
            assert_ends_with_an_error(await streamed.rest(), "longer than 30 s")
            answer = await whole.answer()
            assert answer.status == 500
            assert "longer than 30 s" in answer.error["message"]
            assert (await late.answer()).json["choices"][0]["message"]["content"] == "hello"
            await late.close()
            assert served.num_ended("error") == 3
            assert served.num_live == 0
            await until(lambda: not served.runner.prompts, "the rows are free")

    test()


def test_without_a_time_limit_a_request_may_take_for_ever(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            served.runner.hold()
            await wire.send(chat_request("hello"))
            await until(lambda: served.num_live == 1)
            await pass_time(served, clock, 1e6)
            served.runner.release()
            assert (await wire.answer()).status == 200

    test()


def test_a_device_that_hangs_makes_health_fail_until_it_answers(clock: Clock) -> None:
    async def health(served: Served) -> Any:
        async with await served.wire() as wire:
            answer = await wire.get("/health")
            assert (answer.status == 200) is (answer.json["status"] == "ok")
            return answer

    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            served.runner.hold()
            await wire.send(chat_request("hello"))
            await until(lambda: served.num_live == 1)
            # The first step is dispatched; the device thread waits for it in the second call.
            await until(lambda: served.engine._scheduler.num_steps == 2)
            assert served.engine._busy_since is not None
            await pass_time(served, clock, 59)
            assert (await health(served)).status == 200
            await pass_time(served, clock, 3)
            answer = await health(served)
            assert answer.status == 503
            assert answer.json["status"] == "error"
            assert "the model has not answered for 62 s" in answer.json["reason"]
            assert "retry-after" in answer
            served.runner.release()
            assert (await wire.answer()).status == 200
            assert (await health(served)).status == 200
            await pass_time(served, clock, 1e6)
            assert (await health(served)).status == 200, "an idle device does not hang"

    test()


# --- clients that go ----------------------------------------------------------------------------


def _is_in_phase(served: Served, phase: str) -> bool:
    """Whether the second sequence has got there; the first one decodes."""
    runner = served.runner
    match phase:
        case "queue":
            return served.num_live == 2
        case "prefill":
            return runner.num_prefilled.get(2, 0) > 0
        case _:
            return runner.num_drawn.get(2, 0) > 0


@pytest.mark.parametrize(
    "leave", [Wire.abort, lambda wire: wire._writer.close()], ids=["rst", "fin"]
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("phase", ["queue", "prefill", "decode"])
def test_a_disconnect_frees_its_own_row_and_no_other(
    phase: str, stream: bool, leave: Callable[[Wire], None]
) -> None:
    @in_a_loop
    async def test() -> None:
        settings = {"max_batch_size": 1 if phase == "queue" else 2, "prefill_chunk_size": 1}
        async with serving(**settings) as served, await served.wire() as other:
            await other.open_stream(ENDLESS)
            await until(lambda: served.runner.num_drawn.get(1, 0) > 0)
            wire = await served.wire()
            content = "p" * 5000 + ENDLESS if phase == "prefill" else ENDLESS
            await wire.send(chat_request(content, stream=stream))
            await until(lambda: _is_in_phase(served, phase), phase)
            leave(wire)
            await until(lambda: served.num_live == 1, "the row is gone")
            assert served.num_ended("abort") == 1
            if phase != "decode":
                assert served.runner.num_drawn.get(2, 0) == 0
            await until(lambda: 2 not in served.runner.prompts, "the runner has let it go")
            seen = served.runner.num_drawn[1]
            await until(lambda: served.runner.num_drawn[1] > seen, "the other continues")
            await wire.close()

    test()


@in_a_loop
async def test_a_disconnect_while_its_prompt_is_rendered_prevents_its_admission() -> None:
    async with serving() as served:
        served.model.gate.clear()
        wire = await served.wire()
        await wire.send(chat_request("hello"))
        await until(lambda: any(client.is_busy for client in served.clients))
        await wire.close()
        await until(lambda: served.num_clients == 0)
        served.model.gate.set()
        async with await served.wire() as other:
            assert (await other.chat("x")).status == 200
        assert len(served.runner.num_drawn) == 1


@in_a_loop
async def test_a_disconnect_in_mid_body_is_no_error() -> None:
    async with serving() as served:
        wire = await served.wire()
        await wire.send(chat_request("hello")[:-5])
        await until(lambda: any(client.is_busy for client in served.clients))
        wire.abort()
        await until(lambda: served.num_clients == 0)
        async with await served.wire() as other:
            assert (await other.chat("x")).status == 200


# --- readers that are slow ----------------------------------------------------------------------


def test_a_slow_reader_is_disconnected_and_delays_no_other_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "MAX_UNSENT_BYTES", 1 << 18)

    @in_a_loop
    async def test() -> None:
        async with (
            serving(FakeModel(width=4096)) as served,
            await served.wire() as wire,
            slow_reader(served) as slow,
        ):
            slow.sock.sendall(chat_request(ENDLESS, stream=True))
            await wire.open_stream("hello")
            assert text_of(await wire.rest()) == "".join(char * 4096 for char in "hello")
            await until(lambda: served.num_live == 0, "the slow one is cut")
            await until(lambda: served.num_clients == 1)
            assert served.num_ended("abort") == 1
            assert (await wire.chat("x")).status == 200

    test()


def test_a_reader_that_takes_nothing_is_cut_after_a_time(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(FakeModel(width=1 << 19)) as served, slow_reader(served) as slow:
            slow.sock.sendall(chat_request("hello", stream=True))
            await until(lambda: served.num_ended("stop") == 1)
            await stand_still(served, clock, slow)
            assert slow.num_unsent > 1 << 20
            await pass_time(served, clock, WRITE_TIMEOUT_S - 1)
            assert served.num_clients == 1
            await pass_time(served, clock, 2)
            await until(lambda: served.num_clients == 0)

    test()


def test_a_reader_that_is_slow_but_never_stops_is_not_cut(clock: Clock) -> None:
    """«Without progress»: the time runs from the last byte that left, not from the first delay."""

    @in_a_loop
    async def test() -> None:
        async with serving(FakeModel(width=1 << 19)) as served, slow_reader(served) as slow:
            slow.sock.sendall(chat_request("hello"))
            await until(lambda: served.num_ended("stop") == 1)
            for _ in range(6):
                await pass_time(served, clock, WRITE_TIMEOUT_S / 3)
                assert served.num_clients == 1, "it was cut though it reads"
                num_unsent = slow.num_unsent
                while slow.num_unsent == num_unsent:
                    await slow.read()
            assert slow.num_unsent > 1 << 18, "its backlog never ran low"

    test()


def test_after_a_backlog_the_keep_alive_time_counts_again(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(FakeModel(width=1 << 19)) as served, slow_reader(served) as slow:
            slow.sock.sendall(chat_request("hello"))
            await until(lambda: served.num_ended("stop") == 1)
            assert slow.num_unsent > 1 << 20
            num_left = 5 << 19
            while num_left > 0:
                num_left -= await slow.read()
            await until(lambda: slow.num_unsent == 0)
            await pass_time(served, clock, WRITE_TIMEOUT_S + 1)
            assert served.num_clients == 1
            await pass_time(served, clock, KEEP_ALIVE_S + 1)
            await until(lambda: served.num_clients == 0, "an idle connection is closed")

    test()


# --- load ---------------------------------------------------------------------------------------


@in_a_loop
async def test_a_full_queue_is_a_429_with_a_retry_after_header() -> None:
    async with serving(max_batch_size=1, max_queue=1) as served, await served.wire() as wire:
        running, waiting = await served.wire(), await served.wire()
        await running.open_stream("a" + ENDLESS)
        await until(lambda: served.runner.num_drawn.get(1, 0) > 0)
        await waiting.open_stream("hello")
        for stream in (False, True):
            answer = await wire.chat("hello", stream=stream)
            assert answer.status == 429
            assert answer["retry-after"] == "1"
            assert answer.error["type"] == "rate_limit_error"
            assert answer.error["code"] == "queue_full"
        await running.close()
        assert text_of(await waiting.rest()) == "hello"
        assert (await wire.chat("hello")).status == 200
        await waiting.close()


@in_a_loop
async def test_many_requests_at_once_each_get_their_own_answer() -> None:
    async with serving() as served:

        async def one(n: int) -> None:
            async with await served.wire() as wire:
                text = f"number {n} " * (1 + n % 7)
                if n % 2:
                    await wire.open_stream(text)
                    frames = await wire.rest()
                    assert text_of(frames) == text
                    assert frames[-1] == DONE
                else:
                    assert (await wire.chat(text)).json["choices"][0]["message"]["content"] == text

        await asyncio.gather(*(one(n) for n in range(40)))
        assert served.num_live == 0
        assert served.num_ended("stop") == 40


# --- memory -------------------------------------------------------------------------------------


def memory_for(*lengths: int) -> Memory:
    """The memory of rows of these numbers of tokens."""
    memory = Memory(row_bytes=100, layers=((10, None),))
    return replace(memory, budget_bytes=memory.batch(lengths))


@in_a_loop
async def test_the_context_is_no_longer_than_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    runner = ScriptedRunner(memory_for(512))
    async with serving(runner=runner) as served, await served.wire() as wire:
        assert "memory limits the context to 512 tokens" in caplog.messages
        assert (await wire.get("/v1/models")).json["data"][0]["max_model_len"] == 512
        answer = await wire.chat("x" * 512)
        assert answer.status == 400
        assert answer.error["n_prompt_tokens"] == 512
        assert answer.error["n_ctx"] == 512
        answer = (await wire.chat("x" * 500 + ENDLESS, max_tokens=10_000)).json
        assert answer["usage"]["total_tokens"] == 512
        assert answer["choices"][0]["finish_reason"] == "length"


@in_a_loop
async def test_a_memory_that_holds_all_of_the_context_leaves_it_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(FakeModel(context_size=512), ScriptedRunner(memory_for(512))) as served:
        async with await served.wire() as wire:
            assert (await wire.get("/v1/models")).json["data"][0]["max_model_len"] == 512
        assert caplog.messages == []


@in_a_loop
async def test_a_memory_that_holds_no_sequence_is_no_server() -> None:
    runner = ScriptedRunner(replace(memory_for(1), budget_bytes=150))
    with pytest.raises(LoadError, match=r"insufficient memory: 0 tokens"):
        async with serving(runner=runner):
            pytest.fail("it could serve no request")


@in_a_loop
async def test_rows_that_do_not_fit_together_wait_for_one_another() -> None:
    """Two short rows fit; decoding outgrows the budget, and the preempted one loses no token."""
    runner = ScriptedRunner(memory_for(100, 100))
    async with serving(runner=runner) as served:
        text = "abcdefgh" + ENDLESS

        async def one() -> None:
            async with await served.wire() as wire:
                answer = (await wire.chat(text, max_tokens=300)).json
                assert answer["choices"][0]["message"]["content"] == (text * 40)[:300]

        await asyncio.gather(*(one() for _ in range(4)))
        assert len(runner.admitted) > 4, "no sequence was preempted"


# --- failures -----------------------------------------------------------------------------------


def assert_ends_with_an_error(frames: list[Frame], message: str) -> None:
    data, line, done = frames[-3:]
    assert data.name == "data"
    assert set(data.json["error"]) >= ENVELOPE_KEYS
    assert message in data.json["error"]["message"]
    assert line.name == "error"
    assert line.json == {"message": data.json["error"]["message"]}
    assert done == DONE


@in_a_loop
async def test_a_failed_step_ends_its_requests_with_an_error_and_later_ones_are_served() -> None:
    async with (
        serving(max_batch_size=2) as served,
        await served.wire() as streamed,
        await served.wire() as whole,
        await served.wire() as waiting,
    ):
        await streamed.open_stream(ENDLESS)
        await whole.send(chat_request(ENDLESS))
        await until(lambda: len(served.runner.num_drawn) == 2)
        await waiting.send(chat_request("hello"))
        await until(lambda: served.num_live == 3)
        served.runner.error = RuntimeError("[metal] out of memory")
        assert_ends_with_an_error(await streamed.rest(), "out of memory")
        answer = await whole.answer()
        assert answer.status == 500
        assert answer.error["code"] == "model_error"
        assert "out of memory" in answer.error["message"]
        assert (await waiting.answer()).json["choices"][0]["message"]["content"] == "hello"
        assert served.runner.num_resets == 1
        assert served.num_ended("error") == 2
        for wire in (streamed, whole):
            assert (await wire.get("/health")).status == 200
            assert (await wire.chat("x")).status == 200


@in_a_loop
async def test_a_sequence_that_fails_alone_costs_nothing_but_itself() -> None:
    async with serving() as served, await served.wire() as one, await served.wire() as other:
        await other.open_stream("x" * 30)
        await one.open_stream("he" + POISON + "llo")
        frames = await one.rest()
        assert text_of(frames) == "he"
        assert_ends_with_an_error(frames, "this sequence has failed")
        answer = await one.chat(POISON)
        assert answer.status == 500
        assert answer.error["message"] == "this sequence has failed"
        assert text_of(await other.rest()) == "x" * 30
        assert served.runner.num_resets == 0


@in_a_loop
async def test_a_runner_that_cannot_be_reset_makes_health_and_requests_fail() -> None:
    async with serving() as served, await served.wire() as wire, await served.wire() as control:
        await wire.open_stream(ENDLESS)
        await wire.frame()
        served.runner.reset_error = RuntimeError("the device is gone")
        served.runner.error = RuntimeError("the device hangs")
        assert (await wire.rest())[-1] == DONE
        await until(lambda: served.server.service.phase is Phase.FAILED)
        health = await control.get("/health")
        assert health.status == 503
        assert health.json["status"] == "error"
        assert "the device is gone" in health.json["reason"]
        answer = await control.chat("x")
        assert answer.status == 503
        assert int(answer["retry-after"]) > 0
        assert (await control.get("/metrics")).status == 200


# --- the end ------------------------------------------------------------------------------------


@in_a_loop
async def test_at_stop_an_answer_that_fits_the_grace_is_finished() -> None:
    async with serving(shutdown_grace_s=10) as served:
        port = served.server.port
        served.runner.hold()
        async with await served.wire() as streamed, await served.wire() as whole:
            await streamed.open_stream("hello")
            await whole.send(chat_request("world"))
            idle = await served.wire()
            await until(lambda: served.num_live == 2)
            stopping = asyncio.ensure_future(served.server.stop())
            assert await idle.is_cut(), "an idle connection is closed at once"
            await idle.close()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
            served.runner.release()
            frames = await streamed.rest()
            assert text_of(frames) == "hello"
            assert frames[-2].json["choices"][0]["finish_reason"] == "stop"
            assert frames[-1] == DONE
            assert (await whole.answer()).json["choices"][0]["message"]["content"] == "world"
            assert await streamed.is_cut()
            await stopping
        assert served.num_clients == 0


@in_a_loop
async def test_at_stop_an_answer_that_does_not_end_in_time_gets_an_error() -> None:
    async with serving(max_batch_size=1) as served:
        wires = [await served.wire() for _ in range(3)]
        decoding, waiting, whole = wires
        await decoding.open_stream("abc" + ENDLESS)
        await until(lambda: served.runner.num_drawn.get(1, 0) > 0)
        await waiting.open_stream("hello")
        await whole.send(chat_request("hello"))
        await until(lambda: served.num_live == 3)
        served.runner.hold()  # the device never answers again
        await served.server.stop()
        for wire in (decoding, waiting):
            assert_ends_with_an_error(await wire.rest(), "shutting down")
        answer = await whole.answer()
        assert answer.status >= 500
        assert "shutting down" in answer.error["message"]
        assert served.num_live == 0
        for wire in wires:
            assert await wire.is_cut()
            await wire.close()


@in_a_loop
async def test_at_stop_a_prompt_that_is_still_rendered_gets_an_answer_too() -> None:
    async with serving() as served, await served.wire() as wire:
        served.model.gate.clear()
        await wire.send(chat_request("hello"))
        await until(lambda: any(client.is_busy for client in served.clients))
        await served.server.stop()
        answer = await wire.answer()
        assert answer.status == 503
        assert "shutting down" in answer.error["message"]


@in_a_loop
async def test_while_it_stops_new_requests_are_sent_away() -> None:
    async with serving(shutdown_grace_s=10) as served, await served.wire() as wire:
        served.runner.hold()
        # Both on one connection: the second is read when the first is answered.
        served.model.gate.clear()
        await wire.send(chat_request("hello"))
        await until(lambda: any(client.is_busy for client in served.clients))
        stopping = asyncio.ensure_future(served.server.stop())
        await until(lambda: served.server.service.phase is Phase.DRAINING)
        served.model.gate.set()
        answer = await wire.answer()
        assert answer.status == 503
        assert int(answer["retry-after"]) > 0
        served.runner.release()
        await stopping


@in_a_loop
async def test_a_slow_reader_cannot_hold_up_the_stop() -> None:
    async with serving(FakeModel(width=1 << 19)) as served, slow_reader(served) as slow:
        slow.sock.sendall(chat_request("hello", stream=True))
        await until(lambda: served.num_ended("stop") == 1)
        await served.server.stop()
        assert served.num_clients == 0


@in_a_loop
async def test_stopping_twice_is_stopping_once() -> None:
    async with serving() as served, await served.wire() as wire:
        assert (await wire.get("/health")).status == 200
        await asyncio.gather(served.server.stop(), served.server.stop())


@in_a_loop
async def test_a_server_that_never_started_can_be_stopped() -> None:
    await new_server(lambda _: pytest.fail("it loads nothing")).stop()
