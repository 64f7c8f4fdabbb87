"""What the launching app does with the server: its command line, its requests, how it stops it.

Which lines it waits for, and how a start that fails ends, is in `test_command_line`.
"""

import http.client
import json
import re
import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers import DONE, Frame, parse_frames, text_of

from mlxlite.models.locate import DEMO_PATH
from tests.e2e.test_command_line import TIMEOUT_S, Process, fails, free_port, running

KEY = "k"
ORIGIN = "tauri://localhost"
NOT_YET = ("http server listening", "server is listening", "server started", "ready to accept")
# A model is named by a file in its directory; booleans are bare.
FLAGS = (
    *("--model", str(DEMO_PATH / "model.safetensors"), "--model-id", "demo"),
    *("--ctx-size", "2048", "--api-key", KEY),
    *("--max-batch-size", "4", "--batch-timeout-ms", "100", "--enable-continuous-batching"),
    *("--kv-block-size", "16", "--enable-prefix-caching"),
)
# All that the app may put beside the messages.
BODY: dict[str, Any] = {
    "model": "demo",
    "stream": True,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.05,
    "repeat_penalty": 1.12,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "seed": 7,
    "logit_bias": {"65": 1},
    "max_output_tokens": 24,
    "n_predict": 24,
    "stop_sequences": ["never said by anyone"],
    "cache_prompt": True,
    "return_progress": True,
    "timings_per_token": True,
    "chat_template_kwargs": {"enable_thinking": False},
    "max_context_tokens": 2048,
    "ctx_len": 2048,
    "auto_compact": True,
}
TIMINGS = {
    *("prompt_n", "prompt_ms", "prompt_per_second", "cache_n"),
    *("predicted_n", "predicted_ms", "predicted_per_second"),
}


class App:
    """The app's side: the process that it started, and requests to it."""

    def __init__(self, process: Process, port: int) -> None:
        self.process = process
        self.port = port

    @contextmanager
    def send(
        self, method: str, path: str, body: Any = None, key: str | None = KEY, **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as link:
            link.request(method, path, None if body is None else json.dumps(body), headers)
            yield link.getresponse()

    def ask(
        self, method: str, path: str, body: Any = None, key: str | None = KEY, **headers: str
    ) -> tuple[int, dict[str, Any]]:
        with self.send(method, path, body, key, **headers) as answer:
            return answer.status, json.loads(answer.read())

    def chat(self, content: str = "Hello!", **fields: Any) -> tuple[int, dict[str, Any]]:
        return self.ask("POST", "/v1/chat/completions", body_of(content, **fields))

    def stream(self, messages: list[dict[str, Any]], **fields: Any) -> list[Frame]:
        """The whole text of a stream."""
        body = {"messages": messages, "stream": True, **fields}
        with self.send("POST", "/v1/chat/completions", body) as answer:
            assert answer.status == 200
            return parse_frames(answer.read().decode())

    @contextmanager
    def endless(self) -> Iterator[tuple[str, http.client.HTTPResponse]]:
        """A stream that has sent text and would run to the end of the context, and its id."""
        body = body_of("Hello!", stream=True, temperature=1, ignore_eos=True)
        with self.send("POST", "/v1/chat/completions", body) as answer:
            yield until_it_talks(answer), answer


def body_of(content: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def until_it_talks(answer: http.client.HTTPResponse) -> str:
    """Read up to the first chunk with text; the stream's id."""
    while True:
        line = answer.readline().decode()
        assert line, "the stream has ended"
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            if chunk["choices"][0]["delta"].get("content"):
                return str(chunk["id"])


def rest_of(answer: http.client.HTTPResponse) -> list[Frame]:
    return parse_frames(answer.read().decode().removeprefix("\n"))


@contextmanager
def started(path: Path, *flags: str) -> Iterator[App]:
    port = free_port()
    with running(path, *FLAGS, "--port", str(port), *flags) as process:
        process.until(f"server is listening on 127.0.0.1:{port}\n")
        yield App(process, port)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    with started(tmp_path_factory.mktemp("launched")) as app:
        yield app


def test_the_phrases_that_the_app_waits_for_are_in_the_last_two_lines_only(app: App) -> None:
    *before, first, second = app.process.stdout.splitlines()
    assert not any(word in line.lower() for line in before for word in NOT_YET)
    assert first == f"[mlx] http server listening on http://127.0.0.1:{app.port}"
    assert second == f"[mlx] server is listening on 127.0.0.1:{app.port}"


def test_the_webview_reads_health_without_a_key(app: App) -> None:
    with app.send("GET", "/health", key=None, origin=ORIGIN) as answer:
        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["vary"].lower() == "origin"
        assert json.loads(answer.read()) == {
            "status": "ok",
            "batching": "enabled (max batch: 4, continuous: true)",
        }


@pytest.mark.parametrize("path", ["/health", "/v1/chat/completions", "/v1/cancel"])
def test_a_cors_preflight_of_the_webview_is_answered(app: App, path: str) -> None:
    """A preflight has no key, and its answer must allow the header of the key."""
    method = "GET" if path == "/health" else "POST"
    wanted = {
        "access_control_request_method": method,
        "access_control_request_headers": "authorization,content-type",
    }
    with app.send("OPTIONS", path, key=None, origin=ORIGIN, **wanted) as answer:
        assert answer.status in (200, 204)
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert method in answer.headers["access-control-allow-methods"]
        assert answer.headers["access-control-allow-headers"] == "authorization,content-type"


def test_pages_of_other_origins_are_refused(app: App) -> None:
    with app.send("GET", "/health", key=None, origin="https://example.com") as answer:
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("key", [None, "wrong"])
def test_a_key_that_is_missing_or_wrong_is_unauthorized(app: App, key: str | None) -> None:
    status, answer = app.ask("POST", "/v1/chat/completions", body_of("Hello!"), key)
    assert status == 401
    error = answer["error"]
    assert error["message"] == "Unauthorized"
    assert error["type"] == "authentication_error"
    assert error["code"] == "unauthorized"


def test_the_model_has_the_id_that_it_was_given(app: App) -> None:
    status, answer = app.ask("GET", "/v1/models")
    assert (status, answer["object"]) == (200, "list")
    (model,) = answer["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("demo", "model", "mlx")
    assert isinstance(model["created"], int)


def test_the_apps_request_body_is_answered_with_the_stream_that_it_parses(app: App) -> None:
    frames = app.stream([{"role": "user", "content": "Tell me a story."}], **BODY)
    assert {frame.name for frame in frames} == {"data"}
    assert frames[-1] == DONE
    chunks = [frame.json for frame in frames[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["model"] for chunk in chunks} == {"demo"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    first, *between, last = chunks
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert not first["choices"][0]["delta"].get("content"), "the role is sent at once"
    progress = [chunk["prompt_progress"] for chunk in between if "prompt_progress" in chunk]
    assert progress
    assert {"total", "processed", "cache", "time_ms"} == set(progress[-1])
    assert progress[-1]["processed"] + progress[-1]["cache"] <= progress[-1]["total"]
    talking = [chunk for chunk in between if chunk["choices"][0]["delta"].get("content")]
    assert talking
    assert all(set(chunk["timings"]) >= TIMINGS for chunk in talking), "timings_per_token"
    assert all("usage" not in chunk for chunk in chunks[:-1]), "it would be added up"
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
    usage, timings = last["usage"], last["timings"]
    assert set(timings) >= TIMINGS
    assert timings["prompt_n"] + timings["cache_n"] == usage["prompt_tokens"]
    assert timings["predicted_n"] == usage["completion_tokens"] <= 24


def test_unknown_fields_are_listed_in_a_header_and_change_nothing(app: App) -> None:
    unknown = {"max_context_tokens": 1, "ctx_len": 1, "auto_compact": True}
    common: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
    said = text_of(app.stream(body_of("Hello!")["messages"], **common))
    with app.send("POST", "/v1/chat/completions", body_of("Hello!", **common, **unknown)) as answer:
        assert set(answer.headers["x-mlxlite-ignored"].split(",")) == set(unknown)
        assert json.loads(answer.read())["choices"][0]["message"]["content"] == said


def test_by_default_usage_and_timings_are_on_the_last_chunk_alone(app: App) -> None:
    frames = app.stream([{"role": "user", "content": "Hello!"}])
    chunks = [frame.json for frame in frames[:-1]]
    assert not any({"usage", "timings"} & set(chunk) for chunk in chunks[:-1])
    assert {"usage", "timings"} < set(chunks[-1])
    status, whole = app.chat()
    assert status == 200
    assert {"usage", "timings"} < set(whole)


def test_a_trailing_assistants_message_is_continued(app: App) -> None:
    question = {"role": "user", "content": "Count to 5."}
    fields: dict[str, Any] = {"temperature": 0}
    whole = text_of(app.stream([question], **fields))
    begun, separator, rest = whole.partition("3")
    assert separator, whole
    prefill = {"role": "assistant", "content": begun + separator}
    assert text_of(app.stream([question, prefill], **fields)) == rest


def test_a_history_with_tools_is_read(app: App) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is the weather in Paris?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": '{"temperature": 17}'},
    ]
    frames = app.stream(messages, temperature=0, max_tokens=40)
    assert "17" in text_of(frames)


def test_one_stream_is_cancelled_by_its_id(app: App) -> None:
    with app.endless() as (one, first), app.endless() as (other, second):
        assert one != other
        assert app.ask("POST", "/v1/cancel", {"id": one}) == (
            200,
            {"status": "cancelled", "cancelled_count": 1},
        )
        frames = rest_of(first)
        assert frames[-1] == DONE
        finished = frames[-2].json
        assert finished["choices"][0]["finish_reason"] not in (None, "stop", "length")
        assert {"usage", "timings"} < set(finished)
        # The other one continues.
        assert until_it_talks(second) == other
        assert app.ask("POST", "/v1/cancel", {"id": one})[1]["cancelled_count"] == 0
        assert app.ask("POST", "/v1/cancel", {"id": other})[1]["cancelled_count"] == 1
        assert rest_of(second)[-1] == DONE


def test_all_streams_are_cancelled_together(app: App) -> None:
    with app.endless() as (_, first), app.endless() as (_, second):
        assert app.ask("POST", "/v1/cancel", {}) == (
            200,
            {"status": "cancelled", "cancelled_count": 2},
        )
        assert rest_of(first)[-1] == rest_of(second)[-1] == DONE
    assert app.ask("POST", "/v1/cancel", {}) == (
        200,
        {"status": "no_active_generation", "cancelled_count": 0},
    )


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_error_for_a_too_long_prompt_has_both_token_counts(app: App, is_stream: bool) -> None:
    status, answer = app.chat("word " * 4000, stream=is_stream)
    assert status == 400
    error = answer["error"]
    assert "the request exceeds the available context size." in error["message"]
    assert error["type"] == "exceed_context_size_error"
    assert error["n_ctx"] == 2048 < error["n_prompt_tokens"]


def test_the_apps_metrics_are_the_nine_numbers(app: App) -> None:
    app.chat(max_tokens=4)
    status, metrics = app.ask("GET", "/metrics", key=None, accept="application/json")
    assert status == 200
    assert set(metrics) == {
        *("waiting_requests", "running_requests", "max_batch_size"),
        *("total_requests_processed", "total_batches_processed", "avg_batch_size"),
        *("avg_latency_ms", "cache_hit_rate", "total_tokens_generated"),
    }
    assert all(type(value) in (int, float) for value in metrics.values())
    assert metrics["max_batch_size"] == 4
    assert metrics["total_requests_processed"] >= 1
    assert metrics["total_tokens_generated"] >= 1
    assert metrics["avg_latency_ms"] > 0


def test_a_model_file_that_is_not_there_is_a_reason_on_stderr(tmp_path: Path) -> None:
    flags = [
        str(tmp_path / "model.safetensors") if flag.endswith("model.safetensors") else flag
        for flag in FLAGS
    ]
    code, reason = fails(tmp_path, *flags, "--port", str(free_port()))
    assert code != 0
    assert re.search(rf"error: .*{re.escape(str(tmp_path))}", reason)
    assert not any(word in reason.lower() for word in NOT_YET)


def test_a_term_signal_ends_all_its_streams_with_an_error_and_the_process(tmp_path: Path) -> None:
    """Soon enough that no machine is fast enough to end them at the context's end."""
    with (
        started(tmp_path, "--shutdown-grace-s", "0.1") as app,
        app.endless() as (_, first),
        app.endless() as (_, second),
    ):
        app.process.kill(signal.SIGTERM)
        for answer in (first, second):
            data, line, done = rest_of(answer)[-3:]
            assert data.name == "data"
            assert data.json["error"]["message"] == line.json["message"]
            assert line.name == "error"
            assert done == DONE
        assert app.process.wait(TIMEOUT_S) == 0
        assert app.process.stdout.count("listening") == 2
