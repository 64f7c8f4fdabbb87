"""Work that runs ends when its client leaves: the next request of its lane does not wait for it."""

import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_vlm")
pytest.importorskip("PIL")

import bombs
import tiny_vlms
from live import Site, serving
from pictures import shown, text, uri
from PIL import Image

import mlxlite
from mlxlite.models import chat_template
from mlxlite.vision import decoder

pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter")

MIB = 1 << 20
FREE_S = 0.5  # until a lane whose clients have left is free, and the next request answered
SLOW = {  # images whose decoding takes many seconds
    "JPEG of padding": lambda: bombs.jpeg_with(b"\xff" * (18 * MIB)),
    "JPEG of markers": lambda: bombs.jpeg_with(b"\xff\xe5\0\2" * (4 * MIB)),
    "PNG of empty chunks": lambda: bombs.png(8, 8, bombs.png_chunk(b"abCd", b"") * 1_700_000),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vlm") / "seer"
    tiny_vlms.save(path, "qwen3_vl")
    return path


@pytest.fixture(scope="module")
def seer(checkpoint: Path) -> Iterator[Site]:
    with serving(config(checkpoint, allow_remote_images=True)) as server:
        yield Site(server)


def config(path: Path | None = None, **settings: Any) -> mlxlite.Config:
    model = {} if path is None else {"model": str(path)}
    return mlxlite.Config(port=0, **model, **settings)


def small_png(seed: int) -> str:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (seed, 0, 0)).save(out, "PNG")
    return uri(out.getvalue())


@contextmanager
def asked(site: Site, *parts: Any) -> Iterator[None]:
    """A chat's client that has sent its request, and leaves at the end."""
    host, port = site.server.url.removeprefix("http://").split(":")
    body = json.dumps({"messages": [{"role": "user", "content": list(parts)}]}).encode()
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        yield


def answered_in(site: Site, *parts: Any) -> float:
    began_at = time.monotonic()
    status, _ = site.chat(*parts, max_tokens=1)
    assert status == 200
    return time.monotonic() - began_at


@pytest.mark.parametrize("name", SLOW)
def test_clients_that_leave_in_mid_decode_free_both_threads_for_images(
    seer: Site, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, is_sent = SLOW[name](), threading.Semaphore(0)
    write = decoder._Child.write

    def spy(child: decoder._Child, written: bytes, deadline: float) -> None:
        write(child, written, deadline)
        if len(written) == len(data):
            is_sent.release()

    answered_in(seer, shown(small_png(1)), text("What?"))
    monkeypatch.setattr(decoder._Child, "write", spy)
    slow = shown(uri(data))
    with asked(seer, slow), asked(seer, slow):
        assert is_sent.acquire(timeout=20)
        assert is_sent.acquire(timeout=20)
    assert answered_in(seer, shown(small_png(2)), text("What?")) < FREE_S


def test_clients_that_leave_in_mid_fetch_free_both_threads_for_images(
    seer: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, is_over = threading.Semaphore(0), threading.Event()
    resolve = socket.getaddrinfo

    def hang(host: Any, *args: Any, **more: Any) -> Any:
        if host != "slow.example":
            return resolve(host, *args, **more)
        has_begun.release()
        is_over.wait(20)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    remote = shown("http://slow.example/x.png")
    with asked(seer, remote), asked(seer, remote):
        assert has_begun.acquire(timeout=20)
        assert has_begun.acquire(timeout=20)
    taken_s = answered_in(seer, shown(small_png(3)), text("What?"))
    is_over.set()
    assert taken_s < FREE_S


def test_no_decoder_outlives_its_server(checkpoint: Path) -> None:
    with serving(config(checkpoint)) as server:
        answered_in(Site(server), shown(small_png(4)), text("What?"))
        ready = server.service.ready
        assert ready is not None
        (child,) = ready.model.chat_template.image_reader._decoder._idle  # type: ignore[attr-defined]
    assert child.has_ended


LOOPS = {  # templates that take long for a message that says so
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "grows": "{% set ns = namespace(x='') %}{% for i in range(99999) %}{% for j in range(999) %}"
    "{% set ns.x = (ns.x ~ 'a')[:9] %}{% endfor %}{% endfor %}",
    "recurs": "{% macro m(n) %}{% for i in range(99) %}{{ m(n - 1) if n else '' }}{% endfor %}"
    "{% endmacro %}{{ m(9) }}",
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_client_that_leaves_in_mid_template_frees_the_thread(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun = threading.Semaphore(0)
    limited = chat_template.run_with_timeout

    def spy(timeout_s: float, call: Any) -> Any:
        has_begun.release()
        return limited(timeout_s, call)

    template = "{% if 'loop' in messages[0].content %}" + LOOPS[name] + "{% endif %}User: Hi"
    with serving(config(chat_template=template)) as server:
        site = Site(server)
        answered_in(site, text("Hello"))
        monkeypatch.setattr(chat_template, "run_with_timeout", spy)
        with asked(site, text("loop")):
            assert has_begun.acquire(timeout=20)
        assert answered_in(site, text("Hello")) < FREE_S
