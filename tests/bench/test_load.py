"""The load generator: what it counts of an answer, however it is split, and what a client does.

Servers here are a few lines of asyncio with fixed answers; nothing is timed.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import orjson
import pytest
from helpers import in_a_loop

from bench import load
from bench.load import Answer
from bench.plan import Plan, Request, Stream


def frame(text: str) -> bytes:
    return b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n' % text.encode()


USAGE = (
    b'data: {"choices":[],"usage":{"completion_tokens": 3,'
    b'"prompt_tokens_details":{"cached_tokens":7}}}\n\ndata: [DONE]\n\n'
)
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
BODY = ROLE + frame("a") + b": keepalive 1/2\n\n" + frame('\\"') + frame("c") + USAGE
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))


def body_json(text: str, num: int) -> bytes:
    message = {"role": "assistant", "content": text}
    return orjson.dumps({"choices": [{"message": message}], "usage": {"completion_tokens": num}})


ONE_PIECE = body_json("hello", 3)
ANSWERS = {
    "chunked": STREAM
    + b"transfer-encoding: chunked\r\n\r\n"
    + chunked(ROLE, frame("a"), frame('\\"'), frame("c"), USAGE),
    "closed by the server": STREAM.replace(b"1.1", b"1.0") + b"\r\n" + BODY,
    "counted": STREAM + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
}


def taken(data: bytes, size: int) -> Answer:
    answer = Answer(Stream(0, 0.0), keeps_lines=True)
    for n, start in enumerate(range(0, len(data), size)):
        answer.take(data[start : start + size], float(n))
    return answer


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("size", [1, 2, 7, 100_000])
def test_an_answer_counts_alike_however_it_is_split(name: str, size: int) -> None:
    answer = taken(ANSWERS[name], size)
    assert answer.is_whole
    stream = answer.stream
    assert (len(stream.token_s), stream.num_tokens, stream.num_cached) == (3, 3, 7)
    assert stream.error is None
    assert answer.text == 'a"c'


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_not_whole_before_its_last_bytes(name: str) -> None:
    data = ANSWERS[name].replace(b"data: [DONE]\n\n", b"") if "closed" in name else ANSWERS[name]
    assert not taken(data[:-1], 50).is_whole


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize("is_chunked", [True, False])
def test_an_answer_in_one_piece_has_its_tokens_at_its_end(size: int, is_chunked: bool) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
    if is_chunked:
        data = head + b"transfer-encoding: chunked\r\n\r\n"
        data += chunked(ONE_PIECE[:20], ONE_PIECE[20:])
    else:
        data = head + b"content-length: %d\r\n\r\n" % len(ONE_PIECE) + ONE_PIECE
    answer = taken(data, size)
    assert answer.is_whole
    assert answer.stream.num_tokens == 3
    assert answer.stream.token_s == [answer.stream.ended_s]
    assert answer.text == "hello"


def test_reasoning_is_text_and_empty_content_is_not() -> None:
    thought = b'data: {"choices":[{"delta":{"role": "assistant", "reasoning": "hm"}}]}\n\n'
    data = STREAM + b"\r\n" + ROLE + thought + b"data: [DONE]\n\n"
    assert len(taken(data, 100_000).stream.token_s) == 1


def test_a_server_without_usage_is_counted_by_its_frames() -> None:
    data = STREAM + b"\r\n" + frame("a") + frame("b") + b"data: [DONE]\n\n"
    assert taken(data, 100_000).stream.num_tokens == 2


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 400 Bad\r\ncontent-length: 4\r\n\r\nno, \x80",
        STREAM + b'\r\ndata: {"error":{"message":"oh"}}\n\ndata: [DONE]\n\n',
        STREAM + b"\r\n" + ROLE + b"data: [DONE]\n\n",
    ],
    ids=["status", "mid-stream", "no text"],
)
def test_what_is_no_answer_is_an_error(data: bytes) -> None:
    assert taken(data, 100_000).stream.error


def test_a_connection_that_breaks_off_is_an_error_unless_the_client_left() -> None:
    for left_s in (None, 1.0):
        answer = taken(ANSWERS["chunked"][:-8], 100_000)
        answer.stream.left_s = left_s
        answer.close("gone")
        assert (answer.stream.error is None) == (left_s is not None)


# --- clients ----------------------------------------------------------------------------------

Serve = Callable[[Any, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[tuple[int, list[Any]]]:
    """A server that hands each request's body to `serve`; its port, and the bodies so far."""
    bodies: list[Any] = []
    tasks: set[asyncio.Task[Any] | None] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length: ")[2].split()[0])
                bodies.append(orjson.loads(await reader.readexactly(length)))
                await serve(bodies[-1], writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, load.HOST, 0)
    async with server:
        yield server.sockets[0].getsockname()[1], bodies
        await asyncio.gather(*(task for task in tasks if task is not None))


async def streamed(body: Any, writer: asyncio.StreamWriter) -> None:
    writer.write(ANSWERS["chunked"])


async def endless(body: Any, writer: asyncio.StreamWriter) -> None:
    """Frames until the client is gone."""
    writer.write(STREAM + b"\r\n")
    while not writer.is_closing():
        writer.write(frame("x"))
        await writer.drain()
        await asyncio.sleep(0)


def ask(text: str = "hi", **more: Any) -> Request:
    return Request(text, (), 3, **more)


async def load_on(port: int, plan: Plan, model: str | None = None) -> list[Stream]:
    return await load.run({"port": port, "model": model, "plan": plan.as_json()})


@in_a_loop
async def test_each_client_sends_its_requests_one_after_the_other() -> None:
    async with serving(streamed) as (port, bodies):
        streams = await load_on(port, Plan([[ask("a"), ask("b")], [ask("c")]]), model="m")
    assert [stream.num_tokens for stream in streams] == [3, 3, 3]
    assert sorted(body["messages"][0]["content"] for body in bodies) == ["a", "b", "c"]
    assert {body["model"] for body in bodies} == {"m"}
    first = [stream for stream in streams if stream.client == 0]
    assert first[0].ended_s is not None
    assert first[1].sent_s >= first[0].ended_s


@in_a_loop
async def test_a_next_turn_sends_the_earlier_messages_and_answers() -> None:
    async with serving(streamed) as (port, bodies):
        await load_on(port, Plan([[ask("a"), ask("b", is_next_turn=True), ask("c")]]))
    sent = [[(m["role"], m["content"]) for m in body["messages"]] for body in bodies]
    assert sent[1] == [("user", "a"), ("assistant", 'a"c'), ("user", "b")]
    assert sent[2] == [("user", "c")]


@in_a_loop
async def test_a_client_leaves_after_the_tokens_of_its_request() -> None:
    async with serving(endless) as (port, _):
        (stream,) = await load_on(port, Plan([[ask(leave_after_tokens=5), ask("never")]]))
    assert len(stream.token_s) >= 5
    assert stream.left_s is not None
    assert stream.error is None


@in_a_loop
async def test_a_client_leaves_without_an_answer_at_its_time() -> None:
    async def silent(body: Any, writer: asyncio.StreamWriter) -> None:
        pass

    async with serving(silent) as (port, _):
        plan = Plan([[ask(is_streamed=False, leave_after_s=0.0)]])
        (stream,) = await load_on(port, plan)
    assert stream.left_s is not None
    assert (stream.token_s, stream.error) == ([], None)


@in_a_loop
async def test_later_clients_start_when_the_first_are_under_way_and_cut_them_at_their_end() -> None:
    async def by_name(body: Any, writer: asyncio.StreamWriter) -> None:
        await (endless if body["messages"][0]["content"] == "long" else streamed)(body, writer)

    async with serving(by_name) as (port, _):
        plan = Plan([[ask("long")]], [[ask("short")]], after_tokens=4, is_cut=True)
        long, short = await load_on(port, plan)
    assert long.token_s[3] <= short.sent_s
    assert long.left_s is not None
    assert (short.num_tokens, short.left_s) == (3, None)
    assert (long.error, short.error) == (None, None)


@in_a_loop
async def test_a_server_that_closes_after_each_answer_gets_a_new_connection() -> None:
    async def once(body: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(ANSWERS["closed by the server"])
        writer.close()

    async with serving(once) as (port, bodies):
        streams = await load_on(port, Plan([[ask("a"), ask("b")]]))
    assert len(bodies) == 2
    assert [stream.error for stream in streams] == [None, None]


@pytest.mark.parametrize("is_late", [False, True])
def test_a_handshake_is_timed_only_with_connects_late(
    is_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected_s: list[float] = []
    connect = load.Client.connect

    async def noted(client: load.Client) -> None:
        connected_s.append(perf_counter())
        await connect(client)

    monkeypatch.setattr(load.Client, "connect", noted)

    @in_a_loop
    async def test() -> None:
        async with serving(streamed) as (port, _):
            streams = await load_on(port, Plan([[ask()], [ask()]], connects_late=is_late))
        assert [stream.error for stream in streams] == [None, None]
        assert len(connected_s) == 2
        if is_late:
            assert min(connected_s) >= streams[0].sent_s
        else:
            assert max(connected_s) <= streams[0].sent_s

    test()


@in_a_loop
async def test_a_client_that_gets_no_connection_is_a_failed_request() -> None:
    async with serving(streamed) as (port, _):
        pass
    (stream,) = await load_on(port, Plan([[ask()]], connects_late=True))
    assert stream.error is not None
    assert "connection" in stream.error


@in_a_loop
async def test_an_open_loop_sends_no_earlier_than_its_times_and_waits_for_no_answer() -> None:
    answered = asyncio.Event()

    async def held(body: Any, writer: asyncio.StreamWriter) -> None:
        if len(bodies) == 3:
            answered.set()
        await answered.wait()
        writer.write(ANSWERS["chunked"])

    async with serving(held) as (port, bodies):
        plan = Plan([[ask(at_s=0.01)], [ask(at_s=0.005)], [ask()]])
        begun_at = perf_counter()
        streams = await load_on(port, plan)
    for stream in streams:
        assert stream.sent_s - begun_at >= (0.01, 0.005, 0.0)[stream.client] - 0.001
    assert all(stream.num_tokens == 3 for stream in streams)
