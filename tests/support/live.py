"""A real server with a real model in this process, for the tests that drive a client against it."""

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from helpers import TIMEOUT_S

import mlxlite


@contextmanager
def serving(config: mlxlite.Config) -> Iterator[mlxlite.Server]:
    """A server in a thread that has a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-loop")
    thread.start()

    def call(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    try:
        server = mlxlite.Server(config)
        call(server.__aenter__())
        try:
            yield server
        finally:
            call(server.__aexit__(None, None, None))
            call(loop.shutdown_default_executor())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(TIMEOUT_S)
        loop.close()


@dataclass(frozen=True)
class Site:
    """A server, and how to ask it."""

    server: mlxlite.Server

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON."""
        status, answer, _ = self.post_with_headers(path, body)
        return status, answer

    def post_with_headers(self, path: str, body: Any) -> tuple[int, Any, Mapping[str, str]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = {"content-type": "application/json"}
        request = urllib.request.Request(self.server.url + path, data, head)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer), answer.headers
        except urllib.error.HTTPError as error:
            with closing(error):
                return error.code, json.load(error), error.headers

    def chat(self, *parts: Any, **fields: Any) -> tuple[int, Any]:
        messages = [{"role": "user", "content": list(parts)}]
        body = {"messages": messages, "max_tokens": 8, "temperature": 0, **fields}
        return self.post("/v1/chat/completions", body)

    def is_serving(self) -> bool:
        status, answer = self.chat({"type": "text", "text": "Hello"})
        return status == 200 and answer["usage"]["completion_tokens"] == 8
