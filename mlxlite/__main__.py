"""The command line: flags, the listening socket, signals, exit codes.

    python -m mlxlite [--model PATH|ID] [--port PORT] …

Exit codes: 0 after SIGTERM, SIGINT or SIGHUP (a terminal that is closed), 1 when the server cannot
start (the reason is on stderr), 2 for a bad command line; a second signal is 130, at once. A SIGHUP
that was ignored from the start (nohup) stays ignored.

Imports are inside the functions, each as late as it can be: `--help` waits for none of them, and
the listening socket for none of the model's.
"""

import contextlib
import errno
import gc
import os
import signal
import sys
from typing import TYPE_CHECKING

from mlxlite.config.flags import ConfigError
from mlxlite.config.options import USAGE_STATUS, Config, parse_args

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable
    from typing import Any

    from mlxlite.server import Server

_EXIT_FAILED = 1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_EXIT_AT_ONCE = 130
_OTHER_FILES = 128  # beside connections: weights, prefixes, a download's or an image's
_REPEAT_S = 10.0  # between two log lines with the same text
# Between the device thread and the event loop: the default, 5 ms, is a whole step.
_SWITCH_S = 0.0002


def main() -> None:
    """The console script."""
    for number in _stop_signals():  # until there is a loop, and something to end
        signal.signal(number, lambda *_: os._exit(0))
    config = parse_args(sys.argv[1:], os.environ)
    sys.setswitchinterval(_SWITCH_S)
    try:
        listener = _listen(config)
    except OSError as error:
        sys.exit(_cannot_listen(config, error))

    import asyncio

    _configure_logging(config)
    _raise_file_limit(config.max_connections)
    code = asyncio.run(_serve(config, listener))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the launching process may have exited
            stream.flush()
    # The device thread may be inside a kernel that cannot be interrupted: do not wait for it.
    os._exit(code)


def _listen(config: Config) -> "socket.socket | None":
    """Open the listening socket before heavy imports, so that early clients queue.

    None where the host has several addresses, among which asyncio chooses. Raises OSError.
    """
    import socket

    if config.uds is not None:
        return None
    # As bytes, where possible: the codec of other names' letters is not loaded for an address.
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


def _configure_logging(config: Config) -> None:
    import logging
    import warnings

    level = getattr(logging, config.log_level.upper())
    logging.basicConfig(
        # At debug other packages log what they send, perhaps a token for the hub.
        level=max(level, logging.INFO),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("mlxlite").setLevel(level)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # Pillow warns of odd images, which are the clients': no log, nor a growing list of warnings.
    warnings.filterwarnings("ignore", module=r"PIL\.")


async def _serve(config: Config, listener: "socket.socket | None") -> int:
    """Run until a signal; the exit code."""
    import asyncio

    from mlxlite.server import LoadError, Server

    stopping = _stop_event()
    asyncio.get_running_loop().set_exception_handler(_no_files_handler())
    try:
        server = Server(config)
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
            gc.freeze()  # what is loaded stays: no collection looks at it again
            _announce(server)
            await stopped
    ready.cancel()
    stopped.cancel()
    await server.stop()
    return code


def _stop_event() -> "asyncio.Event":
    """Set by the first SIGTERM, SIGINT or SIGHUP; the second one exits at once."""
    import asyncio

    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            os._exit(_EXIT_AT_ONCE)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in _stop_signals():
        loop.add_signal_handler(number, stop)
    return stopping


def _stop_signals() -> list[signal.Signals]:
    """The signals that end the process: a hangup not where it was ignored from the start."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [n for n in _STOP_SIGNALS if n != signal.SIGHUP or not is_ignored]


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


def _no_files_handler() -> "Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]":
    """Logs now and then, in one line, that no connection can be accepted; asyncio tries again."""
    import logging

    log = logging.getLogger("mlxlite")
    logged_at = -_REPEAT_S

    def handle(loop: "asyncio.AbstractEventLoop", context: "dict[str, Any]") -> None:
        nonlocal logged_at
        error = context.get("exception")
        numbers = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
        if not (isinstance(error, OSError) and error.errno in numbers):
            loop.default_exception_handler(context)
        elif loop.time() - logged_at >= _REPEAT_S:
            logged_at = loop.time()
            log.warning("no connection can be accepted for now: %s", error.strerror)

    return handle


def _announce(server: "Server") -> None:
    """Print the two lines by which the launching app knows that it may send requests."""
    if server.config.model is None:
        print(
            "mlxlite: no --model given, serving the built-in demo: a toy with 1.8M parameters "
            "to try the API with, not a useful model",
            file=sys.stderr,
        )
    address = server.url.removeprefix("http://").removeprefix("https://")
    with contextlib.suppress(OSError):  # stdout may be closed
        print(f"[mlx] http server listening on {server.url}")
        print(f"[mlx] server is listening on {address}", flush=True)


def _fail(message: str, code: int = _EXIT_FAILED) -> int:
    print(f"mlxlite: error: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    main()
