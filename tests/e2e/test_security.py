"""Access control, secrets in answers, and secrets in logs.

A real process at log level debug gets requests of every kind, valid and invalid; then all of its
output is searched for secrets. The other tests run in this process.
"""

import asyncio
import hmac
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fakehub import Hub
from helpers import (
    DONE,
    ENDLESS,
    FakeModel,
    Wire,
    chat_body,
    chat_request,
    in_a_loop,
    new_server,
    request,
    serving,
    text_of,
    until,
)
from server_cases import ALLOWED, CHAT, FOREIGN

from mlxlite.config.flags import ConfigError
from mlxlite.config.options import Config
from tests.e2e.test_command_line import GONE_S, Process, fails, free_port, running
from tests.e2e.test_faults import assert_one_line

# --- what a process emits ------------------------------------------------------------------------

KEYS = {"flag": "sk-flag-0a1b2c3d4e", "file": "sk-file-5f6a7b8c9d", "second": "sk-file-2222222222"}
WRONG = "sk-wrong-e1f2a3b4c5"
HUB_TOKEN = "hf_a1b2c3d4e5f6a7b8c9"
WORD = "xyzzy"  # in every text of a client, and in nothing that may be logged
PROMPT = f"Repeat {WORD} and nothing else."
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": PROMPT, "parameters": {"type": "object"}},
}
CALLS: tuple[tuple[str, str, Any], ...] = (
    ("POST", CHAT, chat_body(PROMPT, max_tokens=4)),
    ("POST", CHAT, chat_body(PROMPT, max_tokens=4, stream=True, stop=[WORD])),
    ("POST", CHAT, chat_body(PROMPT, max_tokens=4, tools=[TOOL], user=WORD, metadata={"a": WORD})),
    ("POST", CHAT, chat_body(PROMPT, max_tokens=4, unknown_field=WORD)),
    ("POST", CHAT, chat_body(PROMPT, max_tokens=4, chat_template_kwargs={"a": WORD})),
    ("POST", CHAT, chat_body(PROMPT, max_tokens=4, cache_salt=WORD)),
    ("POST", CHAT, chat_body(PROMPT, temperature=WORD)),
    ("POST", CHAT, chat_body(PROMPT, verbosity=WORD)),
    ("POST", CHAT, chat_body(PROMPT, chat_template=WORD)),
    ("POST", CHAT, chat_body(PROMPT, response_format={"type": WORD})),
    ("POST", CHAT, chat_body(PROMPT, max_tokens=4, guided_regex=f"({WORD}")),
    ("POST", CHAT, chat_body(PROMPT + "\ud800")),
    ("POST", CHAT, chat_body(WORD * 20_000)),
    ("POST", CHAT, {"messages": WORD}),
    ("POST", CHAT, {"messages": [{"role": WORD, "content": PROMPT}]}),
    ("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 4, "echo": True}),
    ("POST", "/v1/messages", {**chat_body(PROMPT), "max_tokens": 4, "system": PROMPT}),
    ("POST", "/v1/messages/count_tokens", chat_body(PROMPT)),
    ("POST", "/v1/responses", {"input": PROMPT, "max_output_tokens": 16, "instructions": PROMPT}),
    ("GET", f"/v1/responses/{WORD}", None),
    ("POST", "/v1/embeddings", {"input": [PROMPT, PROMPT]}),
    ("POST", "/tokenize", {"content": PROMPT, "with_pieces": True}),
    ("POST", "/detokenize", {"tokens": [1, 2, 3]}),
    ("POST", "/v1/cancel", {"id": WORD}),
    ("GET", "/v1/models", None),
    ("GET", f"/v1/models/{WORD}", None),
    ("GET", "/v1/status", None),
    ("GET", "/v1/cache", None),
    ("GET", "/openapi.json", None),
    ("GET", "/version", None),
    ("GET", "/health", None),
    ("GET", "/metrics", None),
    ("GET", f"/nowhere/{WORD}", None),
    ("DELETE", CHAT, None),
    ("DELETE", "/v1/cache", None),
)


def credentials() -> Iterator[dict[str, str]]:
    for key in (*KEYS.values(), WRONG, WRONG + "é", ""):
        yield {"authorization": f"Bearer {key}"}
        yield {"x-api-key": key}
    yield {"authorization": f"Basic {KEYS['flag']}"}
    yield {"authorization": KEYS["flag"]}
    yield {"authorization": f"Bearer {KEYS['flag'][:-1]}"}
    yield {}


def ask(
    port: int, method: str, path: str, body: Any, headers: dict[str, str]
) -> tuple[int, list[tuple[str, str]], str]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as link:
        data = None if body is None else json.dumps(body)
        raw = {name: value.encode("latin-1") for name, value in headers.items()}
        link.request(method, path, data, raw | {"content-type": "application/json"})
        answer = link.getresponse()
        return answer.status, answer.getheaders(), answer.read().decode()


def test_at_debug_neither_a_key_nor_a_prompt_nor_a_path_is_logged(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Logs, metrics, every answer; answers may repeat the client's own text."""
    home = tmp_path / "secret-home"
    shutil.copytree(checkpoint, home / "tiny")
    keys = tmp_path / "keys"
    keys.write_text(f"{KEYS['file']}\n{KEYS['second']}\n")
    port = free_port()
    flags = ("--model", str(home / "tiny"), "--port", str(port), "--log-level", "debug")
    flags += ("--api-key-file", str(keys), "--prefix-cache-dir", str(tmp_path / "prefixes"))
    variables = {"MLXLITE_API_KEY": KEYS["flag"]}
    right = {"authorization": f"Bearer {KEYS['second']}"}
    answered: list[str] = []
    with running(tmp_path, *flags, variables=variables) as process:
        process.until("server is listening")
        for headers in credentials():
            status, fields, body = ask(port, "POST", CHAT, chat_body(PROMPT, max_tokens=2), headers)
            given = [headers.get("x-api-key"), headers.get("authorization", "").partition(" ")[2]]
            is_right = any(key in given for key in KEYS.values())
            is_right &= not headers.get("authorization", "").startswith("Basic")
            assert status == (200 if is_right else 401), headers
            answered += [*map(str, fields), body]
        statuses = set()
        for method, path, body in CALLS * 2:
            status, fields, text = ask(port, method, path, body, right)
            assert status < 500, (path, text)
            statuses.add(status)
            answered += [*map(str, fields), text]
        assert {200, 400, 404, 405} <= statuses
        answered += [ask(port, "GET", "/metrics", None, {"accept": "application/json"})[2]]
        process.kill(signal.SIGTERM)
        assert process.wait(GONE_S) == 0
        logged = process.stdout + process.stderr
    assert " INFO mlxlite.api: req_" in logged
    for secret in (*KEYS.values(), WRONG):
        assert secret not in logged
        assert not [text for text in answered if secret in text]
    assert WORD not in logged, "no log level includes text of clients"
    assert not [text for text in answered if str(tmp_path) in text or "secret-home" in text]


def test_at_debug_the_hubs_token_is_not_logged(checkpoint: Path, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    with Hub({"owner/tiny": files}) as hub:
        variables = {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hub"),
            "HF_TOKEN": HUB_TOKEN,
        }
        flags = ("--port", "0", "--model", "owner/tiny", "--log-level", "debug")
        with running(tmp_path, *flags, variables=variables) as process:
            process.until("server is listening")
            assert any(HUB_TOKEN in (call.authorization or "") for call in hub.calls)
            assert HUB_TOKEN not in process.stdout + process.stderr
            loud = [line for line in process.stderr.splitlines() if " DEBUG " in line]
            assert all(" DEBUG mlxlite" in line for line in loud)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_a_reachable_host_is_refused_without_a_key(tmp_path: Path, host: str) -> None:
    code, reason = fails(tmp_path, "--port", "0", "--host", host)
    assert code == 2
    assert_one_line(reason, "API key" if host else "--host")


# --- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["first", "second", "third", "wrong", "first ", "", "é"])
def test_every_key_is_compared_in_constant_time_whichever_it_is(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def note(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", note)

    @in_a_loop
    async def test() -> None:
        async with serving(api_key=("first", "second", "third")) as served:
            async with await served.wire() as wire:
                status = (await wire.get("/v1/models", x_api_key=given)).status
            assert status == (200 if given.strip() in ("first", "second", "third") else 401)

    test()
    assert [key for _, key in compared] == [b"first", b"second", b"third"]


def test_keys_of_flag_environment_and_file_are_all_accepted(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("of-the-file\r\n\nanother-of-the-file\n")
    config = Config.from_args(
        ["--api-key-file", str(file), "--api-key", "of-the-flag"], {"MLX_API_KEY": "unused"}
    )
    assert config.api_keys() == ("of-the-flag", "of-the-file", "another-of-the-file")
    config = Config.from_args(["--api-key-file", str(file)], {"MLX_API_KEY": "of-the-variable"})
    assert config.api_keys()[0] == "of-the-variable"
    assert "of-the" not in repr(config)


# --- the Host header -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("localhost:65535", 200),
        ("localhost:", 200),
        ("[::1]", 200),
        ("[::1]:80", 200),
        ("127.0.0.1", 200),
        ("localhost.evil.com", 403),
        ("localhost.evil.com:8080", 403),
        ("127.0.0.1.evil", 403),
        ("127.0.0.1.nip.io", 403),
        ("evil.com@localhost", 403),
        ("localhost:80@evil.com", 403),
        ("localhost:80:80", 403),
        ("localhost:evil", 403),
        ("localhost/evil.com", 403),
        ("localhost#evil.com", 403),
        ("localhost\\evil.com", 403),
        ("localhost%2eevil.com", 403),
        ("localhost,evil.com", 403),
        ("localhost evil.com", 403),
        ("[::1].evil.com", 403),
        ("[::1]evil.com", 403),
        ("[::ffff:1.2.3.4]", 403),
        ("[::2]", 403),
        ("::1", 403),
        ("0", 403),
        ("127.0.0.2", 403),
        ("xn--localhost-evil", 403),
        ("l\u00f6calhost", 403),
    ],
)
def test_a_host_header_that_is_not_this_machines_is_refused(host: str, status: int) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            answer = await wire.get("/health", host=host)
            assert answer.status == status or (status == 403 and answer.status == 400)

    test()


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        (b"", 400),
        (b"host: \r\n", 403),
        (b"host: localhost\r\nhost: localhost\r\n", 400),
        (b"host: localhost\r\nhost: evil.com\r\n", 400),
        (b"host: evil.com\r\nhost: localhost\r\n", 400),
        (b"host: localhost\r\nx-forwarded-host: evil.com\r\n", 200),
        (b"host: evil.com\r\nx-forwarded-host: localhost\r\n", 403),
    ],
)
def test_one_host_header_counts_and_no_other(fields: bytes, status: int) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            await wire.send(b"GET /health HTTP/1.1\r\n" + fields + b"\r\n")
            assert (await wire.answer()).status == status

    test()


@in_a_loop
async def test_with_a_public_host_the_key_decides_and_not_the_name() -> None:
    async with serving(host="0.0.0.0", api_key=("k",)) as served, await served.wire() as wire:
        assert (await wire.get("/v1/models", host="box.example", x_api_key="k")).status == 200
        assert (await wire.get("/v1/models", host="box.example")).status == 401


# --- pages in browsers ---------------------------------------------------------------------------


@pytest.mark.parametrize("origins", ["*", "http://*", "localhost", "http://a b"])
def test_a_wildcard_is_no_origin(origins: str) -> None:
    if origins == "http://*":
        config = Config.from_args(["--cors-origins", origins], {})
        assert config.cors_origins == ("http://*",), "the host of that name, and no other"
        return
    with pytest.raises(ConfigError, match="--cors-origins"):
        Config.from_args(["--cors-origins", origins], {})


@pytest.mark.parametrize("origin", [*ALLOWED, *FOREIGN, "http://*", "*", "http://evil"])
def test_no_answer_has_a_wildcard_or_lets_credentials_in(origin: str) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(cors_origins=("http://localhost", "http://*")) as served:
            for method, path, body in (
                ("OPTIONS", CHAT, None),
                ("GET", "/health", None),
                ("POST", CHAT, json.dumps(chat_body("x")).encode()),
            ):
                async with await served.wire() as wire:
                    answer = await wire.ask(
                        method,
                        path,
                        body,
                        origin=origin,
                        access_control_request_method="POST",
                        access_control_request_private_network="true",
                    )
                assert "access-control-allow-credentials" not in answer
                assert "access-control-allow-private-network" not in answer
                if "access-control-allow-origin" in answer:
                    assert answer["access-control-allow-origin"] == origin
                    assert origin.startswith(("http://localhost", "http://*"))
                    assert "origin" in answer["vary"].lower()

    test()


# --- TLS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cert.pem and key.pem for localhost, and both in both.pem."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    path = tmp_path_factory.mktemp("tls")
    make = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    make += ["-nodes", "-days", "2", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    make += ["-keyout", str(path / "key.pem"), "-out", str(path / "cert.pem")]
    subprocess.run(make, check=True, capture_output=True)
    both = (path / "key.pem").read_text() + (path / "cert.pem").read_text()
    (path / "both.pem").write_text(both)
    lock = [openssl, "pkey", "-in", str(path / "key.pem"), "-aes256", "-passout", "pass:x"]
    subprocess.run([*lock, "-out", str(path / "locked.pem")], check=True, capture_output=True)
    other = [openssl, "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"]
    subprocess.run([*other, "-out", str(path / "other.pem")], check=True, capture_output=True)
    return path


def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate / "cert.pem"))


async def secure_wire(port: int, certificate: Path) -> Wire:
    streams = await asyncio.open_connection("localhost", port, ssl=trusting(certificate))
    return Wire(*streams)


@pytest.mark.parametrize("files", [("cert.pem", "key.pem"), ("both.pem", None)])
def test_with_a_certificate_every_answer_is_over_tls(
    certificate: Path, files: tuple[str, str | None]
) -> None:
    cert, key = (name and str(certificate / name) for name in files)

    @in_a_loop
    async def test() -> None:
        large = FakeModel(width=1 << 17)
        async with serving(large, tls_cert=cert, tls_key=key) as served:
            port = served.server.port
            assert served.server.url == f"https://127.0.0.1:{port}"
            async with await secure_wire(port, certificate) as wire:
                assert (await wire.get("/health")).status == 200
                await wire.open_stream("hello")
                frames = await wire.rest()
                assert len(text_of(frames)) == 5 << 17
                assert frames[-1] == DONE
                answer = await wire.chat("hello")
                assert len(answer.json["choices"][0]["message"]["content"]) == 5 << 17
                await wire.open_stream(ENDLESS)
                await wire.frame()
                assert served.num_live == 1
            await until(lambda: served.num_live == 0, "a disconnect frees the row")
            async with await secure_wire(port, certificate) as wire:
                await wire.send(request("POST", CHAT, b"{", connection="close"))
                assert (await wire.answer()).status == 400

    test()


@pytest.mark.parametrize(
    ("cert", "key"),
    [
        ("nowhere.pem", None),
        ("cert.pem", None),
        ("cert.pem", "nowhere.pem"),
        ("cert.pem", "other.pem"),
        ("cert.pem", "locked.pem"),
        ("key.pem", "key.pem"),
        ("cert.pem", "cert.pem"),
    ],
)
def test_an_unusable_certificate_is_refused_before_the_socket_listens(
    certificate: Path, cert: str, key: str | None
) -> None:
    """A key with a password too: there is no prompt for it."""

    @in_a_loop
    async def test() -> None:
        path = None if key is None else str(certificate / key)
        server = new_server(
            lambda _: pytest.fail("it loads nothing"),
            tls_cert=str(certificate / cert),
            tls_key=path,
        )
        with pytest.raises(ConfigError, match="--tls-cert"):
            await server.start()

    test()


def test_a_tls_key_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="--tls-key needs --tls-cert"):
        Config(tls_key="key.pem")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_a_tls_server_answers_nothing_else_and_ends_its_streams_when_it_stops(
    certificate: Path, tmp_path: Path
) -> None:
    port = free_port()
    flags = ("--port", str(port), "--tls-cert", str(certificate / "both.pem"))
    with running(tmp_path, *flags) as process:
        process.until(f"server is listening on 127.0.0.1:{port}\n")
        assert f"http server listening on https://127.0.0.1:{port}\n" in process.stdout
        with socket.create_connection(("127.0.0.1", port), 20) as plain:
            plain.sendall(request("GET", "/health"))
            assert plain.recv(1000) == b""
        old = trusting(certificate)
        old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        link = http.client.HTTPSConnection("localhost", port, context=old)
        with closing(link), pytest.raises((ssl.SSLError, ConnectionError)):
            link.connect()
        link = http.client.HTTPSConnection("localhost", port, context=trusting(certificate))
        with closing(link):
            body = chat_body("Hello", stream=True, ignore_eos=True, temperature=1)
            link.request("POST", CHAT, json.dumps(body))
            answer = link.getresponse()
            assert answer.read(1000)
            process.kill(signal.SIGTERM)
            assert answer.read().endswith(b"data: [DONE]\n\n")
            assert process.wait(GONE_S) == 0
        assert "ssl" not in process.stderr.lower(), "what peers do wrong is no news"
        assert "Traceback" not in process.stderr


# --- Unix sockets --------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "expected"), [(None, 0o600), ("660", 0o660), ("0666", 0o666)])
def test_a_unix_socket_has_its_configured_mode_whatever_the_umask(
    mode: str | None, expected: int
) -> None:
    # Not in tmp_path: a socket's path may have no more than 107 bytes.
    path = Path(f"/tmp/mlxlite-mode-{os.getpid()}.sock")
    settings = {} if mode is None else {"uds_mode": mode}

    @in_a_loop
    async def test() -> None:
        mask = os.umask(0o077)
        try:
            async with serving(uds=str(path), **settings) as served:
                assert stat.S_IMODE(os.stat(path).st_mode) == expected
                assert os.umask(0o077) == 0o077, "the process's own is as it was"
                async with await served.wire() as wire:
                    await wire.send(chat_request("hello"))
                    assert (await wire.answer()).status == 200
        finally:
            os.umask(mask)

    test()
    assert not path.exists()


def test_a_unix_socket_that_a_killed_process_left_is_taken_over(tmp_path: Path) -> None:
    path = Path(f"/tmp/mlxlite-kill-{os.getpid()}.sock")
    (tmp_path / "second").mkdir()

    def listening(process: Process) -> None:
        process.until(f"unix:{path}")

    try:
        with running(tmp_path, "--uds", str(path)) as process:
            listening(process)
            process.kill(signal.SIGKILL)
            process.wait()
        assert path.exists()
        with running(tmp_path / "second", "--uds", str(path)) as process:
            listening(process)
            process.kill(signal.SIGTERM)
            assert process.wait(GONE_S) == 0
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)
