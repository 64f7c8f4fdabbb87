"""Sockets and routes: bytes from clients to requests, outputs back to bytes.

The server listens before the model is there, answers what needs no model at once, and hands chats
to the engine with a sink that writes straight to the connection: streamed or not, an answer is the
fold of the same outputs. It decides who may ask (keys, Host, origins) and what they are told. It
must never wait for the model on the loop, and never lose an answer: every request gets one
response, every stream its finish or its error, also at shutdown (tested).

What is said at which path is in `routes`. Reading order: `Server`: its life, who may ask, clients.
"""

import asyncio
import contextlib
import hmac
import logging
import os
import socket
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from time import perf_counter, time
from typing import Any, Self
from urllib.parse import urlsplit

from mlxlite import __version__
from mlxlite.api.access import _is_local, is_json
from mlxlite.api.app import Routes
from mlxlite.api.endpoint import Route
from mlxlite.api.service import ModelCard, Phase, Ready
from mlxlite.config.options import Config
from mlxlite.engine.device_thread import Lane
from mlxlite.engine.engine import Engine, EngineOptions
from mlxlite.engine.memory import _prefix_bytes
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.step import Runner
from mlxlite.errors import trace_of
from mlxlite.http.connection import HEADER_TIMEOUT_S, Client, Exchange, Fields
from mlxlite.http.errors import APIError, Cause, clip, later
from mlxlite.http.listener import _ACCEPT_AT_ONCE, _BACKLOG, _tls, bind_unix
from mlxlite.http.parser import Head, Limits
from mlxlite.metrics import Metrics
from mlxlite.models.interface import LoadError, Model

log = logging.getLogger("mlxlite.server")
MIN_CONTEXT = 16  # tokens; a server with less is of no use
SWEEP_S = 0.25  # how often deadlines are looked at
_FAREWELL_S = 0.3  # at shutdown: how long the last bytes may take to leave
Load = Callable[[Config], tuple[Model, Runner]]


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
        self.limits = Limits(max_body_bytes=config.max_body_mb << 20)
        self._load = load
        self._keys = tuple(key.encode() for key in config.api_keys())
        self._clients: set[Client] = set()
        self.num_held_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._has_left = asyncio.Event()
        self.served: Ready | None = None
        self._loaded: asyncio.Future[None] | None = None
        self._listener: asyncio.Server | None = None
        self._lane: Lane | None = None
        self.executors: tuple[Executor, ...] = ()
        self._routes = Routes(self)
        self.metrics = Metrics(
            model_name=config.served_id,
            version=__version__,
            start_time_s=time(),
            routes=[route.label for route in self._routes.table.values()],
        )

    # --- life -------------------------------------------------------------------------------

    async def start(self, listener: socket.socket | None = None) -> None:
        """Listen, then begin to load.

        `listener` is a TCP socket that listens already, instead of the configuration's address.
        Raises OSError when the address cannot be had, ConfigError for an unusable certificate.
        """
        loop = asyncio.get_running_loop()
        await self._listen(listener)
        self.phase = Phase.LOADING
        self._lane = Lane()
        # One thread for short bodies, in order of arrival, one for long ones, which take long, and
        # some for pictures, which may have to be fetched.
        self.executors = tuple(
            ThreadPoolExecutor(num, thread_name_prefix="mlxlite-render") for num in (1, 1, 2)
        )
        self._loaded = loop.create_future()
        self.spawn(self._live(), self._died)
        self.spawn(self._sweep(), self._died)

    async def _listen(self, listener: socket.socket | None) -> None:
        config, loop = self.config, asyncio.get_running_loop()
        tls = _tls(config)
        handshake_s = None if tls is None else HEADER_TIMEOUT_S
        if config.uds is not None:
            sock = bind_unix(config.uds, int(config.uds_mode, 8))
            self._listener = await loop.create_unix_server(
                lambda: Client(self),
                sock=sock,
                backlog=_ACCEPT_AT_ONCE,
                ssl=tls,
                ssl_handshake_timeout=handshake_s,
            )
        elif listener is not None:
            self._listener = await loop.create_server(
                lambda: Client(self),
                sock=listener,
                backlog=_ACCEPT_AT_ONCE,
                ssl=tls,
                ssl_handshake_timeout=handshake_s,
            )
        else:
            self._listener = await loop.create_server(
                lambda: Client(self),
                config.host,
                config.port,
                backlog=_ACCEPT_AT_ONCE,
                ssl=tls,
                ssl_handshake_timeout=handshake_s,
            )
        for listening in self._listener.sockets:
            with socket.fromfd(listening.fileno(), listening.family, listening.type) as same:
                same.listen(_BACKLOG)

    async def _live(self) -> None:
        """Load the model, then drive it until the server stops."""
        assert self._loaded is not None
        assert self._lane is not None
        try:
            self.served = self._assemble(*await self._lane.run(self._load, self.config))
        except LoadError as error:
            self.phase = Phase.FAILED
            self._loaded.set_exception(error)
            return
        if self.phase is Phase.LOADING:
            self.phase = Phase.READY
        self._loaded.set_result(None)
        await self.served.engine.run()

    def _assemble(self, model: Model, runner: Runner) -> Ready:
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
            prefix_bytes=_prefix_bytes(config, runner.memory),
            prefix_disk_bytes=config.prefix_disk_bytes(),
            block_size=config.kv_block_size,
            # Who shares with strangers could else find out their prompts, token by token.
            prefix_to_token=len(self._keys) < 2 or config.prefix_cache_scope == "key",
        )
        options = EngineOptions(
            max_queue=config.max_queue,
            gather_s=config.batch_timeout_ms / 1000,
            prefill_budget_s=config.prefill_budget_ms / 1000,
            timeout_s=config.request_timeout_s or None,
            guard=config.repetition_guard,
        )
        scheduler = Scheduler(policy)
        engine = Engine(
            scheduler,
            runner,
            model.detokenize,
            lane=self._lane,
            observer=self.metrics,
            options=options,
        )
        scheduler.prefix.restore(runner.files(engine.command_from_thread))
        return Ready(model, engine, ModelCard(model.id, int(time()), context_size))

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
        leaving = later(Cause.UNAVAILABLE, "the server is shutting down", retry_after_s=5)
        for client in list(self._clients):
            client.refuse(leaving)
        if self.served is not None:
            self.served.engine.abort("the server is shutting down")
        await self._until_alone(_FAREWELL_S)
        for client in list(self._clients):
            client.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for executor in self.executors:
            executor.shutdown(wait=False, cancel_futures=True)
        if self._lane is not None:
            await self._lane.close(timeout_s=_FAREWELL_S)
            if self.config.uds is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.config.uds)
        if self._loaded is not None and self._loaded.done():
            self._loaded.exception()  # seen: asyncio need not warn of it
        self.served = None  # and with it the weights

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
        scheme = "http" if self.config.tls_cert is None else "https"
        return f"{scheme}://{host}:{self.port}"

    def spawn(
        self, coroutine: Coroutine[Any, Any, None], on_error: Callable[[BaseException], None]
    ) -> None:
        """Run a task whose unexpected end is not lost: logged, and told to `on_error`."""

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("a task died: %s", trace_of(error))
                on_error(error)

        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(done)

    def _died(self, error: BaseException) -> None:
        """The engine cannot go on: nobody is left waiting, and /health says so from now on."""
        if self.phase is not Phase.DRAINING:
            self.phase = Phase.FAILED
        if self.served is not None:
            self.served.engine.abort("the engine has stopped")
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
            if self.served is not None:
                self.served.engine.expire(now)
            for client in list(self._clients):
                client.tick(now)

    # --- who may ask ------------------------------------------------------------------------

    def admit(self, exchange: Exchange) -> None:
        """Look at a request's head, before its body is read. Raises APIError."""
        head = exchange.head
        if self.config.uds is None and self.config.is_loopback and not _is_local(head, self.config):
            # A page on the web may point its own name at 127.0.0.1 (DNS rebinding).
            message = "this server answers to localhost only; the Host header names another"
            raise APIError(Cause.HOST, message)
        route = self._routes.find(head.path)
        if head.method == "OPTIONS":
            return
        if route is None:
            raise APIError(Cause.NOT_FOUND, f"there is nothing at {clip(head.path)}")
        exchange.label = route.label
        exchange.error_body = route.error_body
        if head.method not in route.methods:
            allowed = ", ".join(route.methods)
            message = f"{clip(head.method)} is not possible here; use {allowed}"
            raise APIError(Cause.METHOD, message, headers=(("allow", allowed),))
        if not route.is_open and not self._is_authorized(exchange):
            headers = (("www-authenticate", "Bearer"),)
            raise APIError(Cause.UNAUTHORIZED, "Unauthorized", headers=headers)
        if head.method == "POST" and not is_json(head.headers):
            raise APIError(Cause.MEDIA_TYPE, "the body must be application/json")

    def _is_authorized(self, exchange: Exchange) -> bool:
        """Compare keys, and note which one it was."""
        if not self._keys:
            return True
        scheme, _, token = exchange.head.headers.get("authorization").partition(" ")
        given = exchange.head.headers.get("x-api-key")
        given = token.strip() if scheme.lower() == "bearer" else given
        # Every key is compared, each in constant time: the time taken tells nothing.
        matches = [key for key in self._keys if hmac.compare_digest(given.encode(), key)]
        exchange.key = matches[0] if matches else b""
        return bool(matches)

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
            (
                "access-control-expose-headers",
                "x-request-id, request-id, x-mlxlite-ignored, retry-after",
            ),
            ("vary", "origin"),
        )

    def _preflight(self, head: Head, route: Route | None) -> Fields:
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

    # --- clients ----------------------------------------------------------------------------

    def handle(self, exchange: Exchange, body: bytes) -> None:
        """Answer an admitted request. Raises APIError."""
        head = exchange.head
        route = self._routes.find(head.path)
        if head.method == "OPTIONS":
            exchange.respond(204, b"", self._preflight(head, route))
            return
        assert route is not None
        method = "GET" if head.method == "HEAD" else head.method
        route.handlers[method](exchange, body)

    def lost(self, exchange: Exchange) -> None:
        """Nobody waits for an answer any more."""
        self._routes.lost(exchange)

    def joined(self, client: Client) -> APIError | None:
        """Count a connection in; an error when it cannot be served."""
        self.metrics.connection_opened()
        self._clients.add(client)
        if self.phase is Phase.DRAINING:
            return later(Cause.UNAVAILABLE, "the server is shutting down", retry_after_s=5)
        if len(self._clients) > self.config.max_connections:
            return later(Cause.UNAVAILABLE, "too many connections", retry_after_s=1)
        return None

    def make_room(self) -> None:
        """Refuse the largest body that is still on its way; whoever says little is never it."""
        largest = max(self._clients, key=lambda client: client.num_waiting_bytes)
        if largest.num_waiting_bytes:
            message = "too much is being sent at a time; try again later"
            largest.refuse(later(Cause.UNAVAILABLE, message, retry_after_s=5))

    def left(self, client: Client) -> None:
        self._clients.discard(client)
        self._has_left.set()
        self.metrics.connection_closed()
