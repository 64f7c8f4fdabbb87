"""Connections: keep-alive, pipelines, request ids, clients that disconnect.

The server runs in this process around a scripted runner, with real sockets. A debugging loop
refuses tasks, transports and errors that are left behind.
"""

import asyncio
import json
from collections.abc import Callable

import pytest
from helpers import (
    ENDLESS,
    Served,
    Wire,
    chat_body,
    chat_request,
    in_a_loop,
    request,
    serving,
    text_of,
    until,
)
from server_cases import CHAT

from mlxlite.http.connection import MAX_AT_ONCE, MAX_PIPELINED_BYTES

pytestmark = pytest.mark.usefixtures("no_server_thread_is_left")


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


# --- clients that disconnect --------------------------------------------------------------------


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
