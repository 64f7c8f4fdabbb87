"""Sockets and routes: bytes from clients to requests, outputs back to bytes.

The server listens before the model is there, answers what needs no model at once, and hands chats
to the engine with a sink that writes straight to the connection: streamed or not, an answer is the
fold of the same outputs. It decides who may ask (keys, Host, origins) and what they are told. It
must never wait for the model on the loop, and never lose an answer: every request gets one
response, every stream its finish or its error, also at shutdown (tested).

Reading order: `Server`: its life, who may ask, its routes.
"""

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from time import perf_counter, time
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit

from mlxlite import __version__, api, http1
from mlxlite.api import Cause
from mlxlite.config import Config
from mlxlite.connection import JSON, ChatSink, Client, Exchange, Fields, bind_unix, is_json
from mlxlite.engine import Engine, EngineFailed, EngineOptions, Lane, QueueFull
from mlxlite.metrics import Metrics
from mlxlite.request import ChatRequest, parse_cancel, parse_chat
from mlxlite.scheduler import Policy, Scheduler
from mlxlite.sequence import (
    LoadError,
    Prompt,
    PromptError,
    Runner,
    Sequence,
    ServedModel,
)

log = logging.getLogger("mlxlite.server")

MIN_CONTEXT = 16  # tokens; a server with less is of no use
LONG_BODY_BYTES = 32 << 10  # a longer body renders beside the short ones, not before them
SWEEP_S = 0.25  # how often deadlines are looked at
_FAREWELL_S = 0.3  # at shutdown: how long the last bytes may take to leave
_MAX_IGNORED_NAMES = 256  # logged once each; bounds the table
_MAX_SHOWN_NAMES = 32  # in one answer, each of at most so many characters
_MAX_IGNORED_NAME = 64
_PROMETHEUS: Final = (("content-type", "text/plain; version=0.0.4; charset=utf-8"),)

Load = Callable[[Config], tuple[ServedModel, Runner]]


class Phase(Enum):
    """A server's life; only READY answers what needs the model."""

    NEW = "new"
    LOADING = "loading"
    READY = "ready"
    FAILED = "error"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Route:
    """What is at a path: `handlers` by method; HEAD comes with GET. Open routes need no key."""

    label: str
    handlers: dict[str, Callable[[Exchange, bytes], None]]
    is_open: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        head = ("HEAD",) if "GET" in self.handlers else ()
        return (*self.handlers, *head, "OPTIONS")


@dataclass(frozen=True, slots=True)
class _Ready:
    """What there is once the model is loaded."""

    model: ServedModel
    engine: Engine
    card: api.ModelCard


class Server:
    """One model behind one listening socket, inside the running event loop.

        async with Server(Config(port=0)) as server:
            print(server.url)

    Entering returns once the model is loaded; it raises OSError when the address cannot be had and
    LoadError when the model cannot be served. Takes over neither signals nor logging; several may
    live in one process. `load` runs on the server's lane; `mlxlite.Server` has it already.
    """

    def __init__(self, config: Config, load: Load) -> None:
        self.config = config
        self.phase = Phase.NEW
        self.limits = http1.Limits(max_body_bytes=config.max_body_mb << 20)
        self._load = load
        self._keys = tuple(key.encode() for key in config.api_keys())
        self._clients: set[Client] = set()
        self._exchanges: dict[str, Exchange] = {}  # generating, by the answer's id
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_left = asyncio.Event()
        self._ignored_names: set[str] = set()
        self._num_sequences = 0
        self._ready: _Ready | None = None
        self._loaded: asyncio.Future[None] | None = None
        self._listener: asyncio.Server | None = None
        self._lane: Lane | None = None
        self._executors: tuple[ThreadPoolExecutor, ...] = ()
        self._routes = self._make_routes()
        self.metrics = Metrics(
            model_name=config.served_id,
            version=__version__,
            start_time_s=time(),
            routes=[route.label for route in self._routes.values()],
        )

    # --- life -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, then begin to load. Raises OSError when the address cannot be had."""
        loop = asyncio.get_running_loop()
        if self.config.uds is not None:
            self._listener = await loop.create_unix_server(
                lambda: Client(self), sock=bind_unix(self.config.uds)
            )
        else:
            self._listener = await loop.create_server(
                lambda: Client(self), self.config.host, self.config.port, backlog=1024
            )
        self.phase = Phase.LOADING
        self._lane = Lane()
        # One thread for short bodies, in order of arrival, and one for long ones, which take long.
        self._executors = tuple(
            ThreadPoolExecutor(1, thread_name_prefix="mlxlite-render") for _ in range(2)
        )
        self._loaded = loop.create_future()
        self._spawn(self._live(), self._died)
        self._spawn(self._sweep(), self._died)

    async def _live(self) -> None:
        """Load the model, then drive it until the server stops."""
        assert self._loaded is not None
        assert self._lane is not None
        try:
            self._ready = self._assemble(*await self._lane.run(self._load, self.config))
        except LoadError as error:
            self.phase = Phase.FAILED
            self._loaded.set_exception(error)
            return
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY
        self._loaded.set_result(None)
        await self._ready.engine.run()

    def _assemble(self, model: ServedModel, runner: Runner) -> _Ready:
        """The engine around a loaded model. Raises LoadError when no sequence would fit."""
        assert self._lane is not None
        config = self.config
        context_size = runner.memory.max_tokens(model.context_size)
        if context_size < min(MIN_CONTEXT, model.context_size):
            raise LoadError(f"insufficient memory: {context_size} tokens fit; see --memory-limit")
        if context_size < model.context_size:
            log.warning("memory limits the context to %d tokens", context_size)
        policy = Policy(
            max_rows=max(1, config.max_batch_size),
            continuous=config.enable_continuous_batching,
            chunk_size=config.prefill_chunk_size,
            memory=runner.memory,
        )
        options = EngineOptions(
            max_queue=config.max_queue,
            gather_s=config.batch_timeout_ms / 1000,
            prefill_budget_s=config.prefill_budget_ms / 1000,
            timeout_s=config.request_timeout_s or None,
        )
        engine = Engine(
            Scheduler(policy),
            runner,
            model.detokenize,
            lane=self._lane,
            observer=self.metrics,
            options=options,
        )
        return _Ready(model, engine, api.ModelCard(model.id, int(time()), context_size))

    async def ready(self) -> None:
        """Return once the model is loaded. Raises LoadError."""
        assert self._loaded is not None, "start() comes first"
        await asyncio.shield(self._loaded)

    async def stop(self) -> None:
        """Stop accepting, let answers finish within `shutdown_grace_s`, end the rest, close."""
        self.phase = Phase.DRAINING
        if self._listener is not None:
            self._listener.close()
        for client in list(self._clients):
            client.leave()
        await self._until_alone(self.config.shutdown_grace_s)
        leaving = api.later(Cause.UNAVAILABLE, "the server is shutting down", retry_after_s=5)
        for client in list(self._clients):
            client.refuse(leaving)
        if self._ready is not None:
            self._ready.engine.abort("the server is shutting down")
        await self._until_alone(_FAREWELL_S)
        for client in list(self._clients):
            client.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for executor in self._executors:
            executor.shutdown(wait=False, cancel_futures=True)
        if self._lane is not None:
            await self._lane.close(timeout_s=_FAREWELL_S)
            if self.config.uds is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.config.uds)
        if self._loaded is not None and self._loaded.done():
            self._loaded.exception()  # seen: asyncio need not warn of it
        self._ready = None  # and with it the weights

    async def _until_alone(self, timeout_s: float) -> None:
        """Return when the last client has left, or after the time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._clients:
                    self._has_left.clear()
                    await self._has_left.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        try:
            await self.ready()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    @property
    def port(self) -> int:
        """The port that is listened on: the system's choice for `port=0`."""
        assert self._listener is not None, "start() comes first"
        return int(self._listener.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        """Where the server answers, without a trailing slash."""
        if self.config.uds is not None:
            return f"unix:{self.config.uds}"
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.port}"

    def _spawn(
        self, coroutine: Coroutine[Any, Any, None], on_error: Callable[[BaseException], None]
    ) -> None:
        """Run a task whose unexpected end is not lost: logged, and told to `on_error`."""

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("a task died", exc_info=error)
                on_error(error)

        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(done)

    def _died(self, error: BaseException) -> None:
        """The engine cannot go on: nobody is left waiting, and /health says so from now on."""
        if self.phase is not Phase.DRAINING:
            self.phase = Phase.FAILED
        if self._ready is not None:
            self._ready.engine.abort("the engine has stopped")
        if self._loaded is not None and not self._loaded.done():
            self._loaded.set_exception(LoadError(f"loading failed: {error!r}"))

    async def _sweep(self) -> None:
        """Deadlines, heartbeats, and how late the loop itself is."""
        loop = asyncio.get_running_loop()
        while True:
            due_at = loop.time() + SWEEP_S
            await asyncio.sleep(SWEEP_S)
            self.metrics.loop_lag(max(0.0, loop.time() - due_at))
            now = perf_counter()
            if self._ready is not None:
                self._ready.engine.expire(now)
            for client in list(self._clients):
                client.tick(now)

    # --- who may ask ------------------------------------------------------------------------

    def admit(self, exchange: Exchange) -> None:
        """Look at a request's head, before its body is read. Raises APIError."""
        head = exchange.head
        if self.config.uds is None and self.config.is_loopback and not _is_local(head, self.config):
            # A page on the web may point its own name at 127.0.0.1 (DNS rebinding).
            message = "this server answers to localhost only; the Host header names another"
            raise api.APIError(Cause.HOST, message)
        route = self.route(head.path)
        if head.method == "OPTIONS":
            return
        if route is None:
            raise api.APIError(Cause.NOT_FOUND, f"there is nothing at {api.clip(head.path)}")
        exchange.label = route.label
        if head.method not in route.methods:
            allowed = ", ".join(route.methods)
            message = f"{api.clip(head.method)} is not possible here; use {allowed}"
            raise api.APIError(Cause.METHOD, message, headers=(("allow", allowed),))
        if not route.is_open and not self._is_authorized(head.headers):
            headers = (("www-authenticate", "Bearer"),)
            raise api.APIError(Cause.UNAUTHORIZED, "Unauthorized", headers=headers)
        if head.method == "POST" and not is_json(head.headers):
            raise api.APIError(Cause.MEDIA_TYPE, "the body must be application/json")

    def _is_authorized(self, headers: http1.Headers) -> bool:
        if not self._keys:
            return True
        scheme, _, token = headers.get("authorization").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")
        # Every key is compared, each in constant time: the time taken tells nothing.
        matches = [hmac.compare_digest(given.encode(), key) for key in self._keys]
        return any(matches)

    # --- pages in browsers ------------------------------------------------------------------

    def _is_origin_allowed(self, origin: str) -> bool:
        """Whether a page may read answers: its scheme and host count, its port does not."""
        try:
            wanted = urlsplit(origin)
        except ValueError:
            return False
        allowed = (urlsplit(item) for item in self.config.cors_origins)
        return any(
            (wanted.scheme, wanted.hostname) == (item.scheme, item.hostname) for item in allowed
        )

    def answering(self, exchange: Exchange, status: int) -> Fields:
        """Count an answer that begins; the CORS fields it carries."""
        self.metrics.http(exchange.label, exchange.head.method, status)
        origin = exchange.head.headers.get("origin")
        if not origin or not self._is_origin_allowed(origin):
            return ()
        return (
            ("access-control-allow-origin", origin),
            ("access-control-expose-headers", "x-request-id, x-mlxlite-ignored, retry-after"),
            ("vary", "origin"),
        )

    def _preflight(self, head: http1.Head, route: Route | None) -> Fields:
        """What may be sent to a path, and by which page."""
        methods = ", ".join(route.methods if route is not None else ("OPTIONS",))
        if not self._is_origin_allowed(head.headers.get("origin")):
            return (("allow", methods),)
        wanted = head.headers.get("access-control-request-headers")
        return (
            ("allow", methods),
            ("access-control-allow-methods", methods),
            ("access-control-allow-headers", wanted or "authorization, content-type, x-api-key"),
            ("access-control-max-age", "600"),
        )

    # --- routes -----------------------------------------------------------------------------

    def _make_routes(self) -> dict[str, Route]:
        return {
            "/chat/completions": Route("/v1/chat/completions", {"POST": self._chat}),
            "/models": Route("/v1/models", {"GET": self._models}),
            "/models/": Route("/v1/models/{id}", {"GET": self._model}),
            "/cancel": Route("/v1/cancel", {"POST": self._cancel}),
            "/health": Route("/health", {"GET": self._health}, is_open=True),
            "/metrics": Route("/metrics", {"GET": self._metrics}, is_open=True),
        }

    def route(self, path: str) -> Route | None:
        """The route of a path, with or without /v1; a model's id may contain slashes."""
        path = path.removeprefix("/v1")
        if path.startswith("/models/") and path != "/models/":
            return self._routes["/models/"]
        return self._routes.get(path.rstrip("/") or "/")

    def handle(self, exchange: Exchange, body: bytes) -> None:
        """Answer an admitted request. Raises APIError."""
        head = exchange.head
        route = self.route(head.path)
        if head.method == "OPTIONS":
            exchange.respond(204, b"", self._preflight(head, route))
            return
        assert route is not None
        method = "GET" if head.method == "HEAD" else head.method
        route.handlers[method](exchange, body)

    def _need_model(self) -> _Ready:
        if self.phase is Phase.READY and self._ready is not None:
            return self._ready
        message, retry_after_s = {
            Phase.DRAINING: ("the server is shutting down", 5),
            Phase.FAILED: ("the model has failed; see /health", 30),
        }.get(self.phase, ("the model is loading", 2))
        raise api.later(Cause.UNAVAILABLE, message, retry_after_s)

    def _health(self, exchange: Exchange, _body: bytes) -> None:
        engine = self._ready.engine if self._ready is not None else None
        reason = engine.trouble(perf_counter()) if engine is not None else None
        if self.phase is Phase.READY and reason is None:
            size, continuous = self.config.max_batch_size, self.config.enable_continuous_batching
            enabled = f"enabled (max batch: {size}, continuous: {str(continuous).lower()})"
            exchange.respond(200, api.health("ok", enabled if size > 0 else "disabled"))
            return
        status = Phase.FAILED.value if reason is not None else self.phase.value
        body = api.health(status, reason=reason)
        exchange.respond(503, body, (*JSON, ("retry-after", "2")))

    def _metrics(self, exchange: Exchange, _body: bytes) -> None:
        if "application/json" in exchange.head.headers.get("accept"):
            values = self.metrics.seed_json(self.config.max_batch_size)
            exchange.respond(200, api.json_body(values))
        else:
            exchange.respond(200, self.metrics.render_prometheus(), _PROMETHEUS)

    def _models(self, exchange: Exchange, _body: bytes) -> None:
        exchange.respond(200, api.model_list([self._need_model().card]))

    def _model(self, exchange: Exchange, _body: bytes) -> None:
        card = self._need_model().card
        name = exchange.head.path.removeprefix("/v1").removeprefix("/models/")
        if name != card.id:
            message = f"the model {api.clip(name)!r} does not exist here; see /v1/models"
            raise api.APIError(Cause.NO_MODEL, message, param="model")
        exchange.respond(200, api.model_card(card))

    def _cancel(self, exchange: Exchange, body: bytes) -> None:
        engine = self._need_model().engine
        wanted = parse_cancel(body).id
        found = [e for id, e in self._exchanges.items() if wanted in (None, id)]
        for other in found:
            for id in other.sequence_ids:
                engine.cancel(id)
        exchange.respond(200, api.cancelled(len(found)))

    def _chat(self, exchange: Exchange, body: bytes) -> None:
        ready = self._need_model()
        internal = api.APIError(Cause.INTERNAL, "internal error")
        self._spawn(self._chat_task(ready, exchange, body), lambda _: exchange.fail(internal))

    async def _chat_task(self, ready: _Ready, exchange: Exchange, body: bytes) -> None:
        """Parse and render off the loop, then hand the sequence over; the sink does the rest."""
        loop = asyncio.get_running_loop()
        try:
            executor = self._executors[len(body) > LONG_BODY_BYTES]
            request, prompt = await loop.run_in_executor(executor, _prepare, ready.model, body)
            if not exchange.is_lost and not exchange.is_answered:
                self._generate(ready, exchange, request, prompt)
        except api.APIError as error:
            exchange.fail(error)

    def _generate(
        self, ready: _Ready, exchange: Exchange, request: ChatRequest, prompt: Prompt
    ) -> None:
        model = ready.model
        self._need_model()  # the phase may have changed while the prompt was rendered
        self._note_ignored(exchange, request.ignored)
        sequences = self._sequences(ready, request, prompt)
        envelope = api.Envelope(
            f"chatcmpl-{secrets.token_hex(12)}", int(time()), model.id, f"fp_{model.fingerprint}"
        )
        chunks = None
        if request.is_stream:
            chunks = api.ChatChunks(
                envelope,
                num_choices=request.num_choices,
                include_usage=request.include_usage,
            )
        sink = ChatSink(
            exchange,
            envelope,
            chunks,
            num_choices=request.num_choices,
            has_logprobs=request.top_logprobs is not None,
            token_bytes=model.token_bytes,
        )
        try:
            sinks = [sink.choice(i) for i in range(len(sequences))]
            ready.engine.add(sequences, request.stop, sinks)
        except QueueFull:
            message = "the request queue is full; try again later"
            raise api.later(Cause.QUEUE_FULL, message, retry_after_s=1) from None
        except EngineFailed as error:
            raise api.later(Cause.UNAVAILABLE, str(error), retry_after_s=30) from None
        exchange.sequence_ids = tuple(sequence.id for sequence in sequences)
        self._exchanges[envelope.id] = exchange
        exchange.on_end = lambda: self._ended(envelope.id)
        sink.start()

    def _sequences(self, ready: _Ready, request: ChatRequest, prompt: Prompt) -> list[Sequence]:
        """A sequence for each choice; the first one's prefill serves them all. Raises APIError."""
        model = ready.model
        if request.num_choices > self.config.max_queue:
            raise api.bad(f"'n' must be at most {self.config.max_queue} on this server", "n")
        num_left = ready.card.context_size - len(prompt.tokens)
        if num_left < 1:
            raise api.context_exceeded(len(prompt.tokens), ready.card.context_size)
        for id, _ in request.logit_bias:
            if id >= model.num_vocab:
                raise api.bad(f"the model has no token {id}", "logit_bias")
        first = self._num_sequences + 1
        self._num_sequences += request.num_choices
        sampling = request.sampling(model.defaults, secrets.randbits(64))
        eos_tokens = frozenset(request.stop_tokens)
        return [
            Sequence(
                id=first + i,
                prompt=prompt,
                sampling=replace(sampling, seed=(sampling.seed + i) % 2**64),
                max_tokens=min(request.max_tokens or self.config.max_tokens or num_left, num_left),
                eos_tokens=eos_tokens if request.ignore_eos else eos_tokens | model.eos_tokens,
                priority=request.priority,
                fork_of=first if i else None,
            )
            for i in range(request.num_choices)
        ]

    def _ended(self, id: str) -> None:
        """An answer is complete; a choice that still runs is not wanted any more."""
        self.lost(self._exchanges.pop(id))

    def _note_ignored(self, exchange: Exchange, names: tuple[str, ...]) -> None:
        """Unknown fields: named to the client each time, logged once each."""
        if not names:
            return
        self.metrics.ignored_fields(len(names))
        # Quoted, then cut: clients bound a response's head (Node: 16 KiB).
        shown = [quote(name)[:_MAX_IGNORED_NAME] for name in names[:_MAX_SHOWN_NAMES]]
        exchange.extra_headers.append(("x-mlxlite-ignored", ",".join(shown)))
        for name in shown:
            if name not in self._ignored_names and len(self._ignored_names) < _MAX_IGNORED_NAMES:
                self._ignored_names.add(name)
                log.warning("unknown request field ignored: %s (said once)", name)

    def lost(self, exchange: Exchange) -> None:
        """Nobody waits for an answer any more."""
        if self._ready is not None:
            for id in exchange.sequence_ids:
                self._ready.engine.cancel(id)

    # --- clients ----------------------------------------------------------------------------

    def joined(self, client: Client) -> api.APIError | None:
        """Count a connection in; an error when it cannot be served."""
        self.metrics.connection_opened()
        self._clients.add(client)
        if self.phase is Phase.DRAINING:
            return api.later(Cause.UNAVAILABLE, "the server is shutting down", retry_after_s=5)
        if len(self._clients) > self.config.max_connections:
            return api.later(Cause.UNAVAILABLE, "too many connections", retry_after_s=1)
        return None

    def left(self, client: Client) -> None:
        self._clients.discard(client)
        self._has_left.set()
        self.metrics.connection_closed()


def _prepare(model: ServedModel, body: bytes) -> tuple[ChatRequest, Prompt]:
    """A chat's body to its prompt: the part of a request that costs time and needs no loop."""
    request = parse_chat(body)
    try:
        prompt = model.render(
            [message.as_template() for message in request.messages],
            request.template_kwargs,
            is_continuation=request.is_continuation,
        )
    except PromptError as error:
        raise api.bad(str(error), "messages") from error
    return request, prompt


def _is_local(head: http1.Head, config: Config) -> bool:
    """Whether the Host header names this machine; HTTP/1.0 may leave it out."""
    host = head.headers.get("host")
    if not host:
        return True
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name in ("localhost", "127.0.0.1", "::1", config.host.lower()) or name.endswith(
        ".localhost"
    )
