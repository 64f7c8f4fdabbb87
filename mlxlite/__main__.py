"""The command line, and the composition root: the only file that knows both runner and server.

    python -m mlxlite [--model PATH|ID] [--port PORT] …

Exit codes: 0 after SIGTERM, SIGINT or SIGHUP (a terminal that is closed), 1 when the server cannot
start (the reason is on stderr), 2 for a bad command line; a second signal is 130, at once. A SIGHUP
that was ignored from the start (nohup) stays so.

Imports are inside the functions, each as late as it can be: `--help` waits for none of them, and
the listening socket for none of the model's.
"""

import contextlib
import errno
import gc
import os
import signal
import sys
from functools import cache
from typing import TYPE_CHECKING

from mlxlite.config.flags import ConfigError
from mlxlite.config.options import USAGE_STATUS, Config, parse_args

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable, Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    from mlxlite.engine.engine import Engine
    from mlxlite.engine.step import Runner
    from mlxlite.models.interface import Model
    from mlxlite.prefix_cache.disk import Store
    from mlxlite.server import Server

_EXIT_FAILED = 1
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_EXIT_AT_ONCE = 130
_OTHER_FILES = 128  # beside connections: weights, prefixes, what a download or a picture needs
_REPEAT_S = 10.0  # between two lines of a log that say the same
# Between the lane, on which the device waits, and a loop that publishes: 5 ms is a whole step.
_SWITCH_S = 0.0002
# Between two rounds of giving free memory back at least, and as long again at most: pages that are
# taken again cost whoever comes next. And when work is done: how long ago, and how much the process
# has grown by since the last round.
_TRIM_S = 60.0
_REST_S, _GROWN_BYTES = 0.005, 32 << 20
# Objects between two collections while it loads, which makes 90,000 that stay and few others; those
# leave 0.5 MiB of holes where none is collected before the end.
_LOADING_THRESHOLD = 20_000


def load(config: Config) -> "tuple[Model, Runner]":
    """A model and the runner that drives it, warmed up. Runs on the lane; raises LoadError."""
    with _eased_imports():
        return _load(config)


def _load(config: Config) -> "tuple[Model, Runner]":
    import logging

    from mlxlite.errors import FOREIGN, reason_of
    from mlxlite.models.interface import LoadError
    from mlxlite.models.load import load as load_model
    from mlxlite.models.load import memory_budget
    from mlxlite.runner.cpu import disable_compile_without_compiler
    from mlxlite.runner.kv_cache import KVBits
    from mlxlite.runner.model_runner import ModelRunner

    _forget_scans()
    kv_bits = KVBits(config.kv_bits, config.kv_group_size) if config.kv_bits else None
    try:
        disable_compile_without_compiler()
        network, model = load_model(config)
        store = _open_store(config, model.fingerprint)
        budget = memory_budget(network, config.memory_limit_bytes())
        runner = ModelRunner(network, kv_bits=kv_bits, memory_bytes=budget, store=store)
        runner.warm_up()
    except FOREIGN as error:  # of a foreign network, on the first tokens that it gets
        logging.getLogger("mlxlite").debug("the model cannot run", exc_info=error)
        reason = reason_of(error)
        if isinstance(error, MemoryError) or "allocate" in reason:
            raise LoadError(f"insufficient memory to run the model ({reason})") from None
        flags = f" with --kv-bits {config.kv_bits}" if kv_bits is not None else ""
        raise LoadError(f"this model cannot run{flags}: {reason}") from None
    return model, runner


def _open_store(config: Config, fingerprint: str) -> "Store | None":
    """The prefix cache's files, if there is a place for them. Raises LoadError."""
    from importlib.metadata import version
    from pathlib import Path

    from mlxlite.models.interface import LoadError
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


class _Scanner:
    """Finds transformers' scanner of its own sources, and lets it remember what it has scanned.

    transformers reads the 1,600 files of its models twice when it is imported, for what it keeps
    of the first time is an lru_cache of 128 folders of 550; and it looks at each of their lines
    for the last `__all__`, which stands at the end. Together 0.4 s of each start.
    """

    def find_spec(
        self, name: str, path: "Sequence[str] | None", target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != "transformers.utils.import_utils":
            return None
        from importlib.machinery import PathFinder, SourceFileLoader

        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            execute = spec.loader.exec_module
            spec.loader.exec_module = _remembering(execute)  # type: ignore
        return spec


def _remembering(execute: "Callable[[ModuleType], None]") -> "Callable[[ModuleType], None]":
    def exec_module(module: "ModuleType") -> None:
        execute(module)
        scan = getattr(module, "create_import_structure_from_path", None)
        if (bare := getattr(scan, "__wrapped__", None)) is not None:
            module.create_import_structure_from_path = cache(bare)  # type: ignore[attr-defined]
        fetch = getattr(module, "fetch__all__", None)
        if callable(fetch):
            module.fetch__all__ = (  # type: ignore[attr-defined]
                lambda content: fetch(content[content.rfind("\n__all__") + 1 :])
            )

    return exec_module


class _Lazily:
    """Finds sentencepiece, which transformers imports and few tokenizers use.

    It is run by who uses it, and until then its memory, about 1 MiB, is saved.
    """

    def find_spec(
        self, name: str, path: "Sequence[str] | None", target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name != "sentencepiece":
            return None
        from importlib.machinery import PathFinder
        from importlib.util import LazyLoader

        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


@contextlib.contextmanager
def _eased_imports() -> "Iterator[None]":
    """While transformers is imported: spare what it does twice, and what nobody may need."""
    finders: list[_Scanner | _Lazily] = []
    if "transformers" not in sys.modules:
        finders = [_Scanner(), _Lazily()]
    sys.meta_path[:0] = finders
    try:
        yield
    finally:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in finders]


def _forget_scans() -> None:
    """What has been made of them stays; a scan that is wanted again is made again."""
    scanner = sys.modules.get("transformers.utils.import_utils")
    scan = getattr(scanner, "create_import_structure_from_path", None)
    if (clear := getattr(scan, "cache_clear", None)) is not None:
        clear()


@cache
def server_class() -> "Callable[[Config], Server]":
    """`mlxlite.Server`: the server with this file's `load` already given."""
    from mlxlite.server import Server as Base

    class Server(Base):
        __doc__ = Base.__doc__

        def __init__(self, config: Config) -> None:
            super().__init__(config, load)

    return Server


def main() -> None:
    """The console script."""
    for number in _heeded():  # until there is a loop, and something to end
        signal.signal(number, lambda *_: os._exit(0))
    thresholds = gc.get_threshold()
    gc.set_threshold(_LOADING_THRESHOLD)
    config = parse_args(sys.argv[1:], os.environ)
    sys.setswitchinterval(_SWITCH_S)
    try:
        listener = _listen(config)
    except OSError as error:
        sys.exit(_cannot_listen(config, error))

    import asyncio
    import logging
    import warnings

    level = getattr(logging, config.log_level.upper())
    logging.basicConfig(
        # At debug other packages tell what they send, a token for the hub perhaps: not here.
        level=max(level, logging.INFO),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("mlxlite").setLevel(level)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # What Pillow says of odd pictures is the clients' doing: no log, nor a list of all it has said.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    _raise_file_limit(config.max_connections)
    code = asyncio.run(_serve(config, listener, thresholds))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever launched us may be gone
            stream.flush()
    # The lane may be inside a kernel that cannot be interrupted: do not wait for it.
    os._exit(code)


def _listen(config: Config) -> "socket.socket | None":
    """A port before the rest is even imported: whoever asks waits, and is not turned away.

    None where there is a choice of addresses, which asyncio makes. Raises OSError.
    """
    import socket

    if config.uds is not None:
        return None
    # As bytes, where it can be: the codec of other names' letters is not loaded for an address.
    host = config.host.encode() if config.host.isascii() else config.host
    found = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    if len(found) != 1:
        return None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio does
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(address)
    listener.listen(1024)
    return listener


def _cannot_listen(config: Config, error: OSError) -> int:
    address = config.uds or f"{config.host}:{config.port}"
    return _fail(f"cannot listen on {address}: {error.strerror or error}")


async def _serve(
    config: Config, listener: "socket.socket | None", thresholds: tuple[int, int, int]
) -> int:
    """Run until a signal; the exit code. `thresholds` are the collector's once all is loaded."""
    import asyncio

    from mlxlite.models.interface import LoadError

    stopping = _stop_signals()
    asyncio.get_running_loop().set_exception_handler(_no_files())
    try:
        server = server_class()(config)
        await server.start(listener)
    except ConfigError as error:
        return _fail(str(error), USAGE_STATUS)
    except OSError as error:
        return _cannot_listen(config, error)
    ready = asyncio.ensure_future(server.ready())
    stopped = asyncio.ensure_future(stopping.wait())
    await asyncio.wait((ready, stopped), return_when=asyncio.FIRST_COMPLETED)
    code = 0
    if ready.done():
        try:
            ready.result()
        except LoadError as error:
            code = _fail(str(error))
        else:
            gc.collect()
            gc.freeze()  # what is loaded is for good: no collection looks at it again
            gc.set_threshold(*thresholds)
            _announce(server)
            assert server.service.ready is not None
            trimming = asyncio.ensure_future(
                _give_memory_back(_trimmer(), server.service.ready.engine)
            )
            await stopped
            trimming.cancel()
    ready.cancel()
    stopped.cancel()
    await server.stop()
    return code


async def _give_memory_back(trim: "Callable[[], object] | None", engine: "Engine") -> None:
    """Now, when work is done, and now and then; from a thread, in about 10 ms for 100 MiB."""
    import asyncio
    from itertools import chain, repeat

    # The first work is part of the start, and the first after it need not wait.
    rounds = chain(((0.0, 0), (0.0, _GROWN_BYTES)), repeat((_TRIM_S, _GROWN_BYTES)))
    least_s, grown_bytes = next(rounds)
    while trim is not None:
        engine.rests.clear()
        await asyncio.to_thread(trim)
        least_bytes = _resident_bytes() + grown_bytes
        await asyncio.sleep(least_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_rest(engine, least_bytes), _TRIM_S)
            least_s, grown_bytes = next(rounds)


async def _rest(engine: "Engine", least_bytes: int) -> None:
    """Return when there has been work, for a moment no more, and so much is resident."""
    import asyncio

    num_steps = -1
    while engine.num_live or engine.load.num_steps != num_steps or _resident_bytes() < least_bytes:
        await engine.rests.wait()
        engine.rests.clear()
        num_steps = engine.load.num_steps
        await asyncio.sleep(_REST_S)


def _resident_bytes() -> int:
    """0 where Linux's files do not tell."""
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _trimmer() -> "Callable[[], object] | None":
    """glibc's malloc_trim, where there is one.

    MLX's CPU back end takes an array's memory from malloc, and arrays of all sizes, freed by other
    threads than made them, leave pages that malloc keeps: 120 MiB in 8 minutes of mixed traffic,
    and growing.
    """
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else lambda: trim(0)


def _stop_signals() -> "asyncio.Event":
    """Set by the first SIGTERM, SIGINT or SIGHUP; the second one exits at once."""
    import asyncio

    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            os._exit(_EXIT_AT_ONCE)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in _heeded():
        loop.add_signal_handler(number, stop)
    return stopping


def _heeded() -> "list[signal.Signals]":
    """What ends it: a hangup not where it was ignored from the start (`nohup`)."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [n for n in _ENDING if n != signal.SIGHUP or not is_ignored]


def _raise_file_limit(max_connections: int) -> None:
    """Each connection is an open file, of which macOS by default allows a process 256."""
    import logging
    import resource

    wanted = max_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < wanted:
        log = logging.getLogger("mlxlite")
        log.warning("%d open files are too few for %d connections", most, max_connections)


def _no_files() -> "Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]":
    """Tells in one line, now and then, that no connection can be accepted; asyncio tries again."""
    import logging

    log = logging.getLogger("mlxlite")
    said_at = -_REPEAT_S

    def tell(loop: "asyncio.AbstractEventLoop", context: "dict[str, Any]") -> None:
        nonlocal said_at
        error = context.get("exception")
        numbers = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
        if not (isinstance(error, OSError) and error.errno in numbers):
            loop.default_exception_handler(context)
        elif loop.time() - said_at >= _REPEAT_S:
            said_at = loop.time()
            log.warning("no connection can be accepted for now: %s", error.strerror)

    return tell


def _announce(server: "Server") -> None:
    """The two lines by which the app that launches us knows that it may send requests."""
    if server.config.model is None:
        print(
            "mlxlite: no --model given, serving the built-in demo: a toy with 1.8M parameters "
            "to try the API with, not a useful model",
            file=sys.stderr,
        )
    address = server.url.removeprefix("http://").removeprefix("https://")
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"[mlx] http server listening on {server.url}")
        print(f"[mlx] server is listening on {address}", flush=True)


def _fail(message: str, code: int = _EXIT_FAILED) -> int:
    print(f"mlxlite: error: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
