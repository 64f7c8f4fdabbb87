"""One server's life: listen, load, serve, drain, stop. The composition root.

The server listens before the model is loaded, and answers at once what needs no model. It must
never wait for the model on the event loop, and never lose an answer: every request gets one
response, every stream its finish or its error, also at shutdown (tested).
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, time
from typing import TYPE_CHECKING, Self

from mlxlite import __version__
from mlxlite.api.app import App
from mlxlite.api.endpoints import ENDPOINTS
from mlxlite.api.service import ModelCard, Phase, Ready, Service
from mlxlite.config.flags import ConfigError
from mlxlite.config.options import Config
from mlxlite.engine.device_thread import DeviceThread
from mlxlite.engine.engine import Engine, EngineOptions
from mlxlite.engine.memory import prefix_bytes
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.step import Runner
from mlxlite.errors import FOREIGN, reason_of
from mlxlite.http.errors import ErrorKind, retry_later
from mlxlite.http.listener import Address, Listener, TLSError, tls_context
from mlxlite.metrics import Metrics
from mlxlite.models.interface import LoadError as LoadError  # part of the public interface
from mlxlite.models.interface import Model

if TYPE_CHECKING:
    from ssl import SSLContext

    from mlxlite.prefix_cache.disk import Store

log = logging.getLogger("mlxlite.server")

MIN_CONTEXT = 16  # tokens; a server with less is of no use
SWEEP_S = 0.25  # between two checks of the deadlines
_FAREWELL_S = 0.3  # at shutdown: how long the last bytes may take to leave

Load = Callable[[Config], tuple[Model, Runner]]


def load(config: Config) -> tuple[Model, Runner]:
    """A model and the runner that drives it, warmed up. Call on the device thread.

    Raises LoadError.
    """
    with _file_limit_kept():
        from mlxlite.models.load import load as load_model
        from mlxlite.models.load import memory_budget, memory_of
    from mlxlite.runner import cpu
    from mlxlite.runner.kv_cache import KVBits
    from mlxlite.runner.model_runner import ModelRunner, return_freed_memory

    kv_bits = KVBits(config.kv_bits, config.kv_group_size) if config.kv_bits else None
    try:
        cpu.disable_compile_without_compiler()
        network, model = load_model(config)
        store = _open_store(config, model.fingerprint)
        if config.memory_limit is not None:
            return_freed_memory()
        budget = memory_budget(network, memory_of(config))
        cpu.optimize_for_cpu(network)
        runner = ModelRunner(
            network,
            kv_bits=kv_bits,
            memory_bytes=budget.sequences,
            work_bytes=budget.work,
            store=store,
        )
        runner.warm_up()
    except FOREIGN as error:  # of a foreign network, on the first tokens that it gets
        log.debug("the model cannot run", exc_info=error)
        reason = reason_of(error)
        if isinstance(error, MemoryError) or "allocate" in reason:
            raise LoadError(f"insufficient memory to run the model ({reason})") from None
        flags = f" with --kv-bits {config.kv_bits}" if kv_bits is not None else ""
        raise LoadError(f"this model cannot run{flags}: {reason}") from None
    return model, runner


@contextlib.contextmanager
def _file_limit_kept() -> Iterator[None]:
    """For the first import of mlx-lm: it sets the limit of open files to 2,048 of at most 4,096.

    That fails where 4,096 are not allowed, and elsewhere takes files from connections.
    """
    import resource

    set_limit = resource.setrlimit
    resource.setrlimit = lambda _resource, _limits: None
    try:
        yield
    finally:
        resource.setrlimit = set_limit


def _open_store(config: Config, fingerprint: str) -> "Store | None":
    """The prefix cache's files, if there is a directory for them. Raises LoadError."""
    from mlxlite.prefix_cache.disk import Store

    if config.prefix_cache_dir is None or not config.prefix_disk_bytes():
        return None
    path = Path(config.prefix_cache_dir).expanduser()
    kept = f"kv{config.kv_bits}g{config.kv_group_size}b{config.kv_block_size}"
    try:
        label = f"{fingerprint}-{kept}-mlxlm{version('mlx-lm')}"
        return Store(path, label, config.prefix_disk_bytes())
    except OSError as error:
        raise LoadError(f"--prefix-cache-dir {path}: {error.strerror or error}") from None


class Server:
    """One model behind one listening socket, inside the running event loop.

        async with Server(Config(port=0)) as server:
            print(server.url)

    Entering returns once the model is loaded; it raises OSError when the address cannot be had and
    LoadError when the model cannot be served. Takes over neither signals nor logging; several may
    live in one process. `load` runs on the device thread.
    """

    def __init__(self, config: Config, load: Load = load) -> None:
        self.config = config
        self._load = load
        self._loaded: asyncio.Future[None] | None = None
        self._device_thread: DeviceThread | None = None
        self.metrics = Metrics(
            model_name=config.served_id,
            version=__version__,
            start_time_s=time(),
            routes=list(dict.fromkeys([*(e.path for e in ENDPOINTS), "/openapi.json"])),
        )
        self.service = Service(config, self.metrics)
        self.app = App(self.service, ENDPOINTS)
        self.listener = Listener(
            self.app,
            self.metrics,
            max_body_bytes=config.max_body_mb << 20,
            max_connections=config.max_connections,
        )

    async def start(self, sock: socket.socket | None = None) -> None:
        """Listen, then begin to load.

        `sock` is a TCP socket that listens already, instead of the configuration's address. Raises
        OSError when the address cannot be had, ConfigError for an unusable certificate.
        """
        config = self.config
        address = Address(config.host, config.port, config.uds, int(config.uds_mode, 8), sock)
        await self.listener.start(address, _tls(config))
        self.service.phase = Phase.LOADING
        self._device_thread = DeviceThread()
        self.service.start_threads()
        self._loaded = asyncio.get_running_loop().create_future()
        self.service.spawn(self._live(), self._failed)
        self.service.spawn(self._sweep(), self._failed)

    async def _live(self) -> None:
        """Load the model, then drive it until the server stops."""
        assert self._loaded is not None
        assert self._device_thread is not None
        try:
            model, runner = await self._device_thread.run(self._load, self.config)
            ready = await self._assemble(model, runner, self._device_thread)
        except LoadError as error:
            self.service.phase = Phase.FAILED
            self._loaded.set_exception(error)
            return
        self.service.ready = ready
        if self.service.phase is Phase.LOADING:
            self.service.phase = Phase.READY
        self._loaded.set_result(None)
        await ready.engine.run()

    async def _assemble(self, model: Model, runner: Runner, device_thread: DeviceThread) -> Ready:
        """The engine around a loaded model. Raises LoadError when no sequence would fit."""
        context_size = runner.memory.max_tokens(model.context_size)
        if context_size < min(MIN_CONTEXT, model.context_size):
            raise LoadError(f"insufficient memory: {context_size} tokens fit; see --memory-limit")
        if context_size < model.context_size:
            log.warning("memory limits the context to %d tokens", context_size)
        scheduler = Scheduler(_policy(self.config, runner))
        engine = Engine(
            scheduler,
            runner,
            device_thread=device_thread,
            observer=self.metrics,
            options=_engine_options(self.config),
        )
        files = await device_thread.run(runner.files, engine.command_from_thread)
        scheduler.prefix.restore(files)
        return Ready(model, engine, ModelCard(model.id, int(time()), context_size))

    async def ready(self) -> None:
        """Return once the model is loaded. Raises LoadError."""
        assert self._loaded is not None, "start() comes first"
        await asyncio.shield(self._loaded)

    async def stop(self) -> None:
        """Stop accepting, let answers finish within `shutdown_grace_s`, end the rest, close."""
        self.service.phase = Phase.DRAINING
        self.listener.drain()
        await self.listener.until_empty(self.config.shutdown_grace_s)
        leaving = retry_later(ErrorKind.UNAVAILABLE, "the server is shutting down", retry_after_s=5)
        self.listener.refuse_all(leaving)
        if self.service.ready is not None:
            self.service.ready.engine.abort("the server is shutting down")
        await self.listener.until_empty(_FAREWELL_S)
        self.listener.abort_all()
        for task in self.service.tasks:
            task.cancel()
        await asyncio.gather(*self.service.tasks, return_exceptions=True)
        self.service.stop_threads()
        if self._device_thread is not None:
            await self._device_thread.close(timeout_s=_FAREWELL_S)
            self.listener.unlink()
        if self._loaded is not None and self._loaded.done():
            self._loaded.exception()  # retrieved: asyncio need not warn of it
        if self.service.ready is not None:
            self.service.ready.model.close()
        self.service.ready = None  # and with it the weights

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
        return self.listener.port

    @property
    def url(self) -> str:
        """Where the server answers, without a trailing slash."""
        if self.config.uds is not None:
            return f"unix:{self.config.uds}"
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        scheme = "http" if self.config.tls_cert is None else "https"
        return f"{scheme}://{host}:{self.port}"

    def _failed(self, error: BaseException) -> None:
        """The engine cannot go on: end all answers with an error; /health is 503 from now on."""
        if self.service.phase is not Phase.DRAINING:
            self.service.phase = Phase.FAILED
        if self.service.ready is not None:
            self.service.ready.engine.abort("the engine has stopped")
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
            if self.service.ready is not None:
                self.service.ready.engine.expire(now)
            self.listener.tick(now)


def _policy(config: Config, runner: Runner) -> Policy:
    return Policy(
        max_rows=max(1, config.max_batch_size),
        continuous=config.enable_continuous_batching,
        chunk_size=config.prefill_chunk_size,
        memory=runner.memory,
        prefix_bytes=prefix_bytes(runner.memory, config.prefix_bytes())
        if config.enable_prefix_caching
        else 0,
        prefix_disk_bytes=config.prefix_disk_bytes(),
        block_size=config.kv_block_size,
        # A client that shares its cache with strangers could find out their prompts token by token.
        prefix_to_token=len(config.api_keys()) < 2 or config.prefix_cache_scope == "key",
    )


def _engine_options(config: Config) -> EngineOptions:
    return EngineOptions(
        max_queue=config.max_queue,
        gather_s=config.batch_timeout_ms / 1000,
        prefill_budget_s=config.prefill_budget_ms / 1000,
        timeout_s=config.request_timeout_s or None,
    )


def _tls(config: Config) -> "SSLContext | None":
    """Raises ConfigError for a certificate or key that cannot be used."""
    if config.tls_cert is None:
        return None
    try:
        return tls_context(config.tls_cert, config.tls_key)
    except TLSError as error:
        flags = f"--tls-cert {config.tls_cert}"
        if config.tls_key is not None:
            flags += f" --tls-key {config.tls_key}"
        raise ConfigError(f"{flags}: {error}") from None
