"""Listening sockets: TCP, TLS and Unix sockets, and how many connections may wait on them."""

import errno
import os
import socket
import stat
from typing import TYPE_CHECKING

from mlxlite.config.flags import ConfigError
from mlxlite.config.options import Config

if TYPE_CHECKING:
    from ssl import SSLContext


def bind_unix(path: str, mode: int = 0o600) -> socket.socket:
    """A Unix socket of this mode. Raises OSError, as when a server answers there."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
    except FileNotFoundError:
        pass
    except ConnectionRefusedError:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):  # a file is refused in the same words
            raise OSError(errno.EEXIST, "there is a file that is no socket", path) from None
        os.unlink(path)  # left by a process that was killed
    else:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path)
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o777 & ~mode)
    try:
        listener.bind(path)
    finally:
        os.umask(mask)
    return listener


# Connections that wait, and those that are taken in one turn of the loop. asyncio has one number
# for both, and where no file descriptor is left it reports as many errors in each of its retries.
_BACKLOG = 1024
_ACCEPT_AT_ONCE = 8


def _tls(config: Config) -> "SSLContext | None":
    """TLS 1.2 and 1.3 with Python's own choice of ciphers. Raises ConfigError."""
    if config.tls_cert is None:
        return None
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A password is never asked for: there may be nobody at the terminal.
        context.load_cert_chain(config.tls_cert, config.tls_key, password=lambda: "")
    except OSError as error:  # ssl.SSLError too
        flags = f"--tls-cert {config.tls_cert}"
        if config.tls_key is not None:
            flags += f" --tls-key {config.tls_key}"
        raise ConfigError(f"{flags}: {error.strerror or error}") from None
    return context
