"""Pictures over HTTP, against a real server with a tiny random model that sees."""

import base64
import io
import json
import socket
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_vlm")
pytest.importorskip("PIL")

import tiny_vlms
from anthropic import Anthropic
from live import Site, serving
from openai import OpenAI
from pictures import COLOURS, SHAPES, draw, shown, text, uri
from pictures import chequered as picture

import mlxlite
import mlxlite.vision.processor

# Of mlx-vlm's audio front end, which gemma4 makes whether or not there is any audio.
pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter")


def png(seed: int = 1, *size: int) -> bytes:
    out = io.BytesIO()
    picture(seed, *size).save(out, "PNG")
    return out.getvalue()


def site(path: Path, **settings: Any) -> mlxlite.Config:
    return mlxlite.Config(model=str(path), port=0, kv_block_size=4, **settings)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vlm") / "seer"
    tiny_vlms.save(path, "qwen3_vl")
    return path


@pytest.fixture(scope="module")
def seer(checkpoint: Path) -> Iterator[Site]:
    with serving(site(checkpoint, allow_remote_images=True)) as server:
        yield Site(server)


# --- every dialect ----------------------------------------------------------------------------


def test_the_official_clients_show_the_same_picture_and_read_the_same_answer(seer: Site):
    with OpenAI(base_url=f"{seer.server.url}/v1", api_key="-", max_retries=0) as client:
        chat = client.chat.completions.create(
            model="seer",
            messages=[{"role": "user", "content": [shown(uri(png())), text("What is it?")]}],  # type: ignore[list-item, misc]
            max_tokens=9,
            temperature=0,
        )
        said = chat.choices[0].message.content
        response = client.responses.create(
            model="seer",
            input=[
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": uri(png()), "detail": "auto"},
                        {"type": "input_text", "text": "What is it?"},
                    ],
                }
            ],
            max_output_tokens=9,
            temperature=0,
        )
        stream = client.chat.completions.create(
            model="seer",
            messages=[{"role": "user", "content": [shown(uri(png())), text("What is it?")]}],  # type: ignore[list-item, misc]
            max_tokens=9,
            temperature=0,
            stream=True,
        )
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    with Anthropic(base_url=seer.server.url, api_key="-", max_retries=0) as anthropic:
        source: Any = {
            "type": "base64",
            "media_type": "image/png",
            "data": base64.b64encode(png()).decode(),
        }
        message = anthropic.messages.create(
            model="seer",
            max_tokens=9,
            extra_body={"temperature": 0},
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": source},
                        {"type": "text", "text": "What is it?"},
                    ],
                }
            ],
        )
    assert said
    assert said == response.output_text == streamed == message.content[0].text  # type: ignore[union-attr]
    assert chat.usage is not None
    assert response.usage is not None
    assert (
        chat.usage.prompt_tokens
        == response.usage.input_tokens
        == message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
    )


def test_tokens_are_counted_as_they_are_computed(seer: Site):
    parts = [shown(uri(png())), text("What is it?")]
    _, answer = seer.chat(*parts)
    num = answer["usage"]["prompt_tokens"]
    _, tokens = seer.post("/tokenize", {"messages": [{"role": "user", "content": parts}]})
    assert len(tokens["tokens"]) == num
    source = {"type": "base64", "media_type": "image/png", "data": uri(png()).split(",")[1]}
    content = [{"type": "image", "source": source}, text("What is it?")]
    _, counted = seer.post(
        "/v1/messages/count_tokens",
        {"model": "seer", "messages": [{"role": "user", "content": content}]},
    )
    assert counted["input_tokens"] == num


def test_a_second_turn_about_a_picture_reports_it_as_cached(seer: Site):
    parts = [shown(uri(png(7, 128, 128))), text("What is it?")]
    _, first = seer.chat(*parts)
    said = first["choices"][0]["message"]["content"]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "And?"},
    ]
    body = {"messages": messages, "max_tokens": 4, "temperature": 0}
    _, second = seer.post("/v1/chat/completions", body)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > first["usage"]["prompt_tokens"] - 8


def test_a_schema_binds_an_answer_about_a_picture(seer: Site):
    pytest.importorskip("llguidance")
    status, answer = seer.chat(
        shown(uri(png())), text("What is it?"), guided_choice=["cat", "dog"], max_tokens=20
    )
    assert status == 200
    assert answer["choices"][0]["message"]["content"] in ("cat", "dog")


# --- what is refused --------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of one colour that is small until it is decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x01\x00\x00\x00\x00"
    squeezed = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    rows = b"".join(squeezed.compress(row) for _ in range(height)) + squeezed.flush()
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg() -> bytes:
    out = io.BytesIO()
    picture(1, 200, 200).save(out, "JPEG")
    return out.getvalue()


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
HOSTILE = {
    "a bomb": lambda: uri(bomb(20_000, 20_000)),
    "a truncated JPEG": lambda: uri(jpeg()[:1500], "image/jpeg"),
    "an SVG": lambda: uri(SVG, "image/svg+xml"),
    "an SVG declared as a PNG": lambda: uri(SVG),
    "50 MB": lambda: uri(bytes(37 << 20)),
    "no base64": lambda: "data:image/png;base64,%%%",
    "nothing": lambda: "data:image/png;base64,",
    "a file": lambda: "file:///etc/passwd",
    "a path": lambda: "/etc/passwd",
    "this machine": lambda: "http://127.0.0.1/x.png",
    "this machine by name": lambda: "http://localhost/x.png",
    "this machine in another spelling": lambda: "http://[::ffff:7f00:1]/x.png",
    "this machine as a number": lambda: "http://2130706433/x.png",
    "a cloud's metadata": lambda: "http://169.254.169.254/latest/meta-data/",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_picture_is_refused_by_its_place_and_the_server_serves_on(seer: Site, name: str):
    status, answer = seer.chat(text("Look: "), shown(HOSTILE[name]()))
    assert 400 <= status < 500
    assert answer["error"]["param"].startswith("messages[0].content[1]")
    assert answer["error"]["message"]
    assert "root:" not in json.dumps(answer)
    assert seer.is_serving()


def test_a_url_is_not_fetched_unless_the_operator_allows_it(checkpoint: Path):
    with serving(site(checkpoint)) as server:
        status, answer = Site(server).chat(shown("https://example.com/x.png"))
    assert status == 400
    assert "--allow-remote-images" in answer["error"]["message"]


def test_pictures_that_take_long_hold_up_no_text(seer: Site, monkeypatch: pytest.MonkeyPatch):
    asked, go_on = threading.Semaphore(0), threading.Event()
    load = mlxlite.vision.processor.load

    def slow(*args: Any, **more: Any) -> Any:
        asked.release()
        go_on.wait(30)
        return load(*args, **more)

    monkeypatch.setattr("mlxlite.vision.processor.load", slow)
    answers: list[int] = []

    def ask() -> None:
        answers.append(seer.chat(shown(uri(png())), text("What is it?"))[0])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert asked.acquire(timeout=30)
    assert asked.acquire(timeout=30)  # both threads for pictures are busy
    assert seer.is_serving()
    go_on.set()
    for thread in threads:
        thread.join()
    assert answers == [200] * 4


def test_too_many_pictures_are_refused_by_number(seer: Site):
    status, answer = seer.chat(*[shown(uri(png(1, 8, 8)))] * 17)
    assert status == 400
    assert "16" in answer["error"]["message"]


@pytest.mark.parametrize("kind", ["input_audio", "file", "video_url"])
def test_other_media_are_refused_by_the_parts_type(seer: Site, kind: str):
    status, answer = seer.chat({"type": kind, kind: {}})
    assert status == 400
    assert answer["error"]["param"] == "messages[0].content[0].type"
    assert kind in answer["error"]["message"]


def test_more_pictures_than_the_context_holds_are_a_context_error(checkpoint: Path):
    with serving(site(checkpoint, ctx_size=64)) as server:
        status, answer = Site(server).chat(*[shown(uri(png(i, 256, 256))) for i in range(4)])
    assert status == 400
    assert answer["error"]["type"] == "exceed_context_size_error"


def test_a_text_model_refuses_pictures_in_every_dialect():
    with serving(mlxlite.Config(port=0)) as server:
        blind = Site(server)
        image = {"type": "input_image", "image_url": uri(png())}
        source = {"type": "base64", "media_type": "image/png", "data": uri(png()).split(",")[1]}
        asked = {
            "/v1/chat/completions": {
                "messages": [{"role": "user", "content": [shown(uri(png()))]}]
            },
            "/v1/responses": {"input": [{"role": "user", "content": [image]}]},
            "/v1/messages": {
                "model": "x",
                "max_tokens": 5,
                "messages": [{"role": "user", "content": [{"type": "image", "source": source}]}],
            },
            "/tokenize": {"messages": [{"role": "user", "content": [shown(uri(png()))]}]},
        }
        for path, body in asked.items():
            status, answer = blind.post(path, body)
            assert status == 400, path
            assert "does not see" in answer["error"]["message"]
            assert answer["error"]["message"].startswith("Could not process image")


def test_a_picture_in_a_history_costs_a_text_model_no_conversation():
    """In each dialect, of a user's earlier turn and of a tool's result, or next to it."""
    image = {"type": "input_image", "image_url": uri(png())}
    source = {"type": "base64", "media_type": "image/png", "data": uri(png()).split(",")[1]}
    block = {"type": "image", "source": source}
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    use = {"type": "tool_use", "id": "c", "name": "look", "input": {}}
    done = {"type": "tool_result", "tool_use_id": "c", "content": [block]}
    begun = {"role": "assistant", "content": "A shape."}
    asked: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {
            "messages": [
                *({"role": "user", "content": [shown(uri(png()))]}, begun),
                *({"role": "user", "content": "And?"}, {"role": "assistant", "tool_calls": [call]}),
                {"role": "tool", "tool_call_id": "c", "content": "It is beside this."},
                {"role": "user", "content": [shown(uri(png()))]},
            ]
        },
        "/v1/responses": {
            "input": [
                *({"role": "user", "content": [image]}, begun),
                {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": [image]},
            ]
        },
        "/v1/messages": {
            "max_tokens": 5,
            "messages": [
                *({"role": "user", "content": [block]}, begun),
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": [use]},
                {"role": "user", "content": [done]},
            ],
        },
    }
    with serving(mlxlite.Config(port=0)) as server:
        site = Site(server)
        for path, body in asked.items():
            status, answer, headers = site.post_with_headers(path, body)
            assert status == 200, answer
            assert len(headers["x-mlxlite-ignored"].split(",")) == 2
        for path in ("/v1/chat/completions", "/v1/messages"):
            messages = {"messages": asked[path]["messages"]}
            _, seen = site.post("/tokenize", messages) if "chat" in path else (0, None)
            if seen is not None:
                _, back = site.post("/detokenize", {"tokens": seen["tokens"]})
                sentence = "[image omitted: this model reads text only]"
                assert back["content"].count(sentence) == 2


def test_a_picture_of_a_history_that_cannot_be_used_is_left_out(seer: Site):
    """It is broken, may not be fetched, or is one of too many; the newest are seen."""
    old = [
        *([shown("data:image/png;base64,AAAA")], [shown("http://127.0.0.1:9/x.png")]),
        [shown(uri(b"\x89PNG\r\n\x1a\n cut"))],
        [shown(uri(png(n))) for n in range(20)],
    ]
    turns = [
        {"role": role, "content": content}
        for parts in old
        for role, content in (("user", parts), ("assistant", "yes"))
    ]
    question = {"role": "user", "content": [shown(uri(png())), text("What is it?")]}
    body = {"messages": [*turns, question], "max_tokens": 2}
    status, answer, headers = seer.post_with_headers("/v1/chat/completions", body)
    assert status == 200, answer
    names = headers["x-mlxlite-ignored"].split(",")
    assert len(names) == 24 - 16
    assert all(name.startswith("messages[") for name in names)
    broken = {"messages": [*turns[:6], question], "max_tokens": 2}
    status, answer, headers = seer.post_with_headers("/v1/chat/completions", broken)
    assert status == 200, answer
    assert len(headers["x-mlxlite-ignored"].split(",")) == 3
    lost = {"messages": [*turns, {"role": "user", "content": old[2]}], "max_tokens": 2}
    status, answer = seer.post("/v1/chat/completions", lost)
    assert status == 400
    assert answer["error"]["message"].startswith("Could not process image")


def test_a_disconnect_in_mid_picture_leaves_the_server_serving(seer: Site):
    body = json.dumps(
        {"messages": [{"role": "user", "content": [shown(uri(png(9, 640, 640))), text("?")]}]}
    ).encode()
    host, port = seer.server.url.removeprefix("http://").split(":")
    for sent in (len(body) // 2, len(body)):
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body[:sent])
    assert seer.is_serving()


def test_a_checkpoint_that_mlx_vlm_cannot_load_still_serves_its_text(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(path: Path) -> Any:
        raise KeyError("vision_tower.patch_embed")

    monkeypatch.setattr("mlxlite.vision.network.load", fail)
    with serving(site(checkpoint)) as server:
        assert Site(server).is_serving()
        status, answer = Site(server).chat(shown(uri(png())))
    assert status == 400
    assert "does not see pictures: mlx-vlm cannot load it" in answer["error"]["message"]


def test_a_network_whose_first_picture_fails_still_serves_its_text(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(self: Any, inputs: Any) -> Any:
        raise ValueError("shapes (1, 2) and (3, 4)")

    monkeypatch.setattr("mlxlite.vision.network.VisionNetwork.fields", fail)
    with serving(site(checkpoint)) as server:
        assert Site(server).is_serving()
        status, answer = Site(server).chat(shown(uri(png())))
    assert status == 400
    assert "does not see pictures: shapes" in answer["error"]["message"]


# --- a model that was taught to see -----------------------------------------------------------

DEMO = Path(__file__).parents[1] / "support" / "vlm_demo"


def shown_picture(colour: str, shape: str) -> dict[str, Any]:
    out = io.BytesIO()
    draw(colour, shape).save(out, "PNG")
    return shown(uri(out.getvalue()))


@pytest.fixture(scope="module")
def painter() -> Iterator[OpenAI]:
    with (
        serving(site(DEMO)) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client,
    ):
        yield client


def answers(client: OpenAI, *turns: Any) -> str:
    """The answer to a chat's last turn, streamed and not: they are the same."""
    messages: list[Any] = [
        {"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)
    ]
    asked: dict[str, Any] = {"model": "-", "messages": messages, "temperature": 0, "max_tokens": 40}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    stream = client.chat.completions.create(stream=True, **asked)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert streamed == whole
    return streamed


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_picture_is_named_by_its_colour_and_shape(painter: OpenAI, colour: str, shape: str):
    said = answers(painter, [shown_picture(colour, shape), text("What is in the picture?")])
    assert said == f"A {colour} {shape}."


def test_two_pictures_are_distinguished(painter: OpenAI):
    both = [shown_picture("red", "circle"), shown_picture("blue", "square")]
    said = answers(painter, [*both, text("What is in the pictures?")])
    assert said == "First: a red circle. Second: a blue square."
    said = answers(painter, [*reversed(both), text("What is in the pictures?")])
    assert said == "First: a blue square. Second: a red circle."


def test_a_later_turn_is_answered_about_an_earlier_picture(painter: OpenAI):
    first = [shown_picture("green", "triangle"), text("What colour is it?")]
    assert answers(painter, first) == "Green."
    assert answers(painter, first, "Green.", "And the shape?") == "A triangle."


def test_many_at_once_are_each_shown_their_own_picture(painter: OpenAI):
    asked = [(colour, shape) for colour in COLOURS for shape in SHAPES]

    def ask(what: tuple[str, str]) -> str:
        return answers(painter, [shown_picture(*what), text("What is in the picture?")])

    with ThreadPoolExecutor(len(asked)) as pool:
        said = list(pool.map(ask, asked))
    assert said == [f"A {colour} {shape}." for colour, shape in asked]
