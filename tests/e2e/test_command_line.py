"""`python -m mlxlite` as the app that launches it sees it: stdout, stderr, signals, exit codes."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import DONE, parse_frames, text_of

from mlxlite import __version__

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0  # of a start: a slow machine imports for long
GONE_S = 2.0  # the app that launched us kills what is still there then
KEY = "a-key"


class Process:
    """A running `python -m mlxlite`; its output is collected as it arrives.

    `prefix` is a command that runs it, `variables` are added to its environment.
    """

    def __init__(
        self,
        stderr: Path,
        *args: str,
        prefix: tuple[str, ...] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("MLX", "HF_"))}
        self._stderr = stderr
        self.stdout = ""
        with stderr.open("wb") as file:
            self._popen = subprocess.Popen(
                [*prefix, sys.executable, "-m", "mlxlite", *args],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                cwd=ROOT,
                env=environ | {"HF_HUB_OFFLINE": "1"} | dict(variables or {}),
            )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        while piece := os.read(self._popen.stdout.fileno(), 4096):
            self.stdout += piece.decode()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def until(self, text: str) -> None:
        """Return once stdout has `text`."""
        give_up_at = time.monotonic() + TIMEOUT_S
        while text not in self.stdout:
            assert self._popen.poll() is None, self.stderr
            assert time.monotonic() < give_up_at, self.stderr
            time.sleep(0.01)

    def kill(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """The exit code; `stdout` is complete then."""
        code = self._popen.wait(timeout_s)
        self._reader.join(TIMEOUT_S)
        return code

    def close(self) -> None:
        self._popen.kill()
        self.wait()
        assert self._popen.stdout is not None
        self._popen.stdout.close()


@contextmanager
def running(tmp_path: Path, *args: str, **more: Any) -> Iterator[Process]:
    process = Process(tmp_path / "stderr", *args, **more)
    try:
        yield process
    finally:
        process.close()


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def ask(
    port: int, path: str, body: Any = None, key: str | None = None
) -> tuple[int, dict[str, Any]]:
    """Status and JSON of one request."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as link:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        data = None if body is None else json.dumps(body)
        link.request("GET" if body is None else "POST", path, data, headers)
        answer = link.getresponse()
        return answer.status, json.loads(answer.read())


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"}], **fields}


def until_it_listens(process: Process, port: int) -> None:
    give_up_at = time.monotonic() + TIMEOUT_S
    while True:
        assert process._popen.poll() is None, process.stderr
        assert time.monotonic() < give_up_at
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.01)


def test_the_launching_app_sees_the_lines_and_statuses_it_waits_for(
    checkpoint: Path, tmp_path: Path
) -> None:
    port = free_port()
    model = str(checkpoint / "model.safetensors")
    flags = ("--model", model, "--port", str(port), "--model-id", "m", "--ctx-size", "256")
    with running(tmp_path, *flags, "--api-key", KEY) as process:
        until_it_listens(process, port)
        while True:
            said = process.stdout
            status, health = ask(port, "/health")
            if status == 200:
                break
            assert (status, health) == (503, {"status": "loading"})
            assert said == "", "something was printed before it was ready"
            time.sleep(0.02)
        process.until(f"server is listening on 127.0.0.1:{port}\n")
        assert health["status"] == "ok"
        assert ask(port, "/v1/chat/completions", chat())[0] == 401
        assert ask(port, "/v1/models")[0] == 401
        assert ask(port, "/v1/models", key=KEY)[1]["data"][0]["id"] == "m"
        status, answer = ask(port, "/v1/chat/completions", chat(temperature=0), KEY)
        assert status == 200
        assert answer["model"] == "m"
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == 256
        process.kill(signal.SIGTERM)
        assert process.wait(GONE_S) == 0
        assert process.stdout == (
            f"[mlx] http server listening on http://127.0.0.1:{port}\n"
            f"[mlx] server is listening on 127.0.0.1:{port}\n"
        )
        assert "Traceback" not in process.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_mid_stream_ends_the_stream_properly_and_the_process_soon(
    checkpoint: Path, tmp_path: Path, number: signal.Signals
) -> None:
    port = free_port()
    flags = ("--model", str(checkpoint), "--port", str(port), "--ctx-size", "1000000")
    with running(tmp_path, *flags) as process:
        process.until("server is listening")
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as link:
            link.request(
                "POST", "/v1/chat/completions", json.dumps(chat(stream=True, temperature=0))
            )
            answer = link.getresponse()
            start = answer.read(2000)
            started_at = time.monotonic()
            process.kill(number)
            frames = parse_frames((start + answer.read()).decode())
        assert process.wait(TIMEOUT_S) == 0
        took_s = time.monotonic() - started_at
        assert took_s < GONE_S
        assert frames[-1] == DONE
        assert text_of([frame for frame in frames if frame.name == "data"])
        assert "shutting down" in frames[-3].json["error"]["message"]
        assert frames[-2].name == "error"
        assert "Traceback" not in process.stderr


def test_a_signal_while_it_loads_ends_it_at_once(checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path, "--model", str(checkpoint), "--port", str(port)) as process:
        until_it_listens(process, port)
        process.kill(signal.SIGTERM)
        assert process.wait(GONE_S) == 0
        assert process.stdout == ""


def fails(tmp_path: Path, *args: str, **more: Any) -> tuple[int, str]:
    """Exit code and stderr of a start that fails; stdout stays empty."""
    with running(tmp_path, *args, **more) as process:
        code = process.wait()
        assert process.stdout == ""
        assert "Traceback" not in process.stderr
        return code, process.stderr


def test_a_port_that_is_taken_is_exit_1_with_the_reason(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as sock:
        port = sock.getsockname()[1]
        code, reason = fails(tmp_path, "--port", str(port))
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in reason
    assert "in use" in reason


def test_a_model_that_does_not_exist_is_exit_1_with_the_reason(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere" / "model.safetensors")
    code, reason = fails(tmp_path, "--port", "0", "--model", missing)
    assert code == 1
    assert f"there is no model at {missing}" in reason


def test_kv_bits_that_the_model_does_not_support_are_exit_1_with_the_reason(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Its heads have 16 channels, and the smallest group of channels is 32."""
    flags = ("--port", "0", "--model", str(checkpoint), "--kv-bits", "8", "--kv-group-size", "32")
    code, reason = fails(tmp_path, *flags)
    assert code == 1
    assert "this model cannot run with --kv-bits 8" in reason
    assert "unhandled" not in reason
    assert "\n" not in reason.partition("mlxlite: error: ")[2].strip(), "one line"


@pytest.mark.parametrize("limit", ["1KB", "500KB"])
def test_too_little_memory_is_exit_1_with_the_words_that_the_app_looks_for(
    checkpoint: Path, tmp_path: Path, limit: str
) -> None:
    """Less than the weights, and enough for them but for no sequence."""
    flags = ("--port", "0", "--model", str(checkpoint), "--memory-limit", limit)
    code, reason = fails(tmp_path, *flags)
    assert code == 1
    assert "insufficient memory" in reason
    assert "--memory-limit" in reason


def test_an_adapter_that_does_not_exist_is_exit_1_with_the_reason(
    checkpoint: Path, tmp_path: Path
) -> None:
    missing = str(tmp_path / "nowhere")
    flags = ("--port", "0", "--model", str(checkpoint), "--adapter-path", missing)
    code, reason = fails(tmp_path, *flags)
    assert code == 1
    assert f"--adapter-path {missing}: there is no adapter_config.json" in reason


def test_a_key_file_that_cannot_be_read_is_a_bad_command_line(tmp_path: Path) -> None:
    code, reason = fails(tmp_path, "--port", "0", "--api-key-file", str(tmp_path / "keys"))
    assert code == 2
    assert "--api-key-file" in reason
    assert "No such file" in reason


def test_an_unknown_flag_is_exit_2_with_a_suggestion(tmp_path: Path) -> None:
    code, reason = fails(tmp_path, "--modle", "x")
    assert code == 2
    assert "unknown flag --modle" in reason
    assert "did you mean --model" in reason


def test_version_is_a_line_on_stdout(tmp_path: Path) -> None:
    with running(tmp_path, "--version") as process:
        assert process.wait() == 0
        assert process.stdout == f"mlxlite {__version__}\n"
        assert re.fullmatch(r"\d+\.\d+\.\d+\S*", __version__)


# --- start --------------------------------------------------------------------------------------


_LOADED = """
import gc, os, sys
import mlxlite.__main__ as program

before = gc.get_threshold()

def announce(server):
    is_enabled = gc.isenabled() and gc.get_threshold() == before
    os.write(1, f"{is_enabled} {gc.get_freeze_count()}".encode())
    os._exit(0)

program._announce = announce
sys.argv = ["mlxlite", "--port", "0"]
program.main()
"""


def test_what_is_loaded_is_out_of_the_collector_s_way() -> None:
    done = subprocess.run([sys.executable, "-c", _LOADED], capture_output=True, text=True)
    is_enabled, num_frozen = done.stdout.split()
    assert is_enabled == "True"
    assert int(num_frozen) > 10_000
