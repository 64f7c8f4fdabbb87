"""The command line: flags, the listening socket, signals, exit codes.

    python -m mlxlite [--model PATH|ID] [--port PORT] …

Exit codes: 0 after SIGTERM, SIGINT or SIGHUP (a terminal that is closed), 1 when the server cannot
start (the reason is on stderr), 2 for a bad command line; a second signal is 130, at once. A SIGHUP
that was ignored from the start (nohup) stays ignored.

Standard streams may be closed, full, unread or gone at any time, which changes neither the start
nor the exit code. No write to them may block the event loop: once it runs, threads write.

Imports are inside the functions, each as late as it can be: `--help` waits for none of them, and
the listening socket for none of the model's.
"""

import contextlib
import errno
import gc
import io
import os
import select
import signal
import sys
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, TextIO, cast

from mlxlite.config.flags import ConfigError
from mlxlite.config.options import USAGE_STATUS, Config, parse_args

if TYPE_CHECKING:
    import asyncio
    import socket
    import threading
    from collections.abc import Callable
    from typing import Any

    from mlxlite.server import Server

_EXIT_FAILED = 1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_EXIT_AT_ONCE = 130
_OTHER_FILES = 128  # beside connections: weights, prefixes, a download's or an image's
_MAX_WAITING = 1 << 20  # bytes for a standard stream that is not read
_PATIENCE_S = 0.15  # at the end: for a stream to take the next line; a launcher waits for 2 s
_FAILED_PATIENCE_S = 1.0  # for the reason of a start that fails
_REPEAT_S = 10.0  # between two log lines with the same text
# Between the device thread and the event loop: the default, 5 ms, is a whole step.
_SWITCH_S = 0.0002


def main() -> None:
    """The console script."""
    for number in _stop_signals():  # until there is a loop, and something to end
        signal.signal(number, lambda *_: os._exit(0))
    streams = _replace_standard_streams()
    config = parse_args(sys.argv[1:], os.environ)
    sys.setswitchinterval(_SWITCH_S)
    try:
        listener = _listen(config)
    except OSError as error:
        sys.exit(_cannot_listen(config, error))

    import asyncio

    for stream in streams:
        stream.start()
    _configure_logging(config)
    config = replace(config, max_connections=_raise_file_limit(config.max_connections))
    try:
        code = asyncio.run(_serve(config, listener, streams[-1]))
    except Exception:  # a bug of ours: the interpreter would end before the thread has written it
        import traceback

        traceback.print_exc()
        code = _EXIT_FAILED
    for stream in streams:
        stream.drain(_FAILED_PATIENCE_S if code else _PATIENCE_S)
    # The device thread may be inside a kernel that cannot be interrupted: do not wait for it.
    os._exit(code)


class _StandardStream(io.TextIOBase):
    """stdout or stderr. Raises nothing, and blocks nothing once it is started.

    Until `start`, a line is written when `write` returns: the reason for a start that fails. After
    it, a daemon thread writes; lines beyond `_MAX_WAITING` bytes are dropped and counted, and a
    line with their number follows once the stream takes lines again.
    """

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lines: deque[bytes] = deque()
        self._num_waiting = 0  # bytes
        self._num_dropped = 0
        self._num_reported = 0
        self._changed: threading.Condition | None = None
        self.on_dropped: Callable[[int], None] | None = None  # gets the number of all

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        """Nothing: a handler of logging calls it for every line."""

    def write(self, text: str) -> int:
        data = text.encode(self.encoding, self.errors)
        if self._changed is None:
            _write_all(self._fd, data)
            return len(text)
        with self._changed:
            if self._num_waiting + len(data) > _MAX_WAITING:
                self._drop()
            else:
                self._append(data)
        return len(text)

    def _append(self, data: bytes) -> None:
        assert self._changed is not None
        self._lines.append(data)
        self._num_waiting += len(data)
        self._changed.notify_all()

    def _drop(self) -> None:
        self._num_dropped += 1
        if self.on_dropped is not None:
            self.on_dropped(self._num_dropped)

    def start(self) -> None:
        """From now on a thread writes."""
        import threading

        self._changed = threading.Condition()
        threading.Thread(target=self._run, args=(self._changed,), daemon=True).start()

    def _run(self, changed: "threading.Condition") -> None:
        while True:
            with changed:
                changed.wait_for(lambda: self._lines)
                data = self._lines[0]
            is_written = _write_all(self._fd, data)
            with changed:
                self._num_waiting -= len(self._lines.popleft())
                if not is_written:
                    self._drop()
                elif not self._lines and (num := self._num_dropped - self._num_reported):
                    self._num_reported = self._num_dropped
                    self._append(f"mlxlite: {num} lines were dropped here\n".encode())
                changed.notify_all()

    def drain(self, patience_s: float) -> None:
        """Return when all lines are written, or the stream takes none for `patience_s`."""
        assert self._changed is not None
        with self._changed:
            while self._lines and self._changed.wait(patience_s):
                pass


def _write_all(fd: int, data: bytes) -> bool:
    """Whether the stream took all bytes; False if it is full for good, or its reader has gone."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:  # the launching process made it so
            select.select([], [fd], [])
        except OSError:
            return False
    return True


def _replace_standard_streams() -> tuple[_StandardStream, _StandardStream]:
    """Make stdout and stderr safe to write to. A socket must not get the number of a closed one."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
    out, err = _StandardStream(1), _StandardStream(2)
    sys.stdout, sys.stderr = cast("TextIO", out), cast("TextIO", err)
    return out, err


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


async def _serve(config: Config, listener: "socket.socket | None", stderr: _StandardStream) -> int:
    """Run until a signal; the exit code."""
    import asyncio

    from mlxlite.server import LoadError, Server

    stopping = _stop_event()
    asyncio.get_running_loop().set_exception_handler(_no_files_handler())
    try:
        server = Server(config)
        stderr.on_dropped = server.metrics.records_dropped
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


def _raise_file_limit(max_connections: int) -> int:
    """Allow an open file for each connection; how many connections there can be.

    By default macOS allows a process 256 files. Where the limit cannot be raised, connections are
    fewer: beyond it they would wait, and weights or images could not be opened.
    """
    import logging
    import resource

    wanted = max_connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return max_connections
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    num_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if num_files >= wanted:
        return max_connections
    num = max(1, num_files - _OTHER_FILES, num_files // 4)
    text = "%d open files are too few for %d connections: %d are accepted"
    logging.getLogger("mlxlite").warning(text, num_files, max_connections, num)
    return num


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
    print(f"[mlx] http server listening on {server.url}")
    print(f"[mlx] server is listening on {address}")


def _fail(message: str, code: int = _EXIT_FAILED) -> int:
    print(f"mlxlite: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
