"""Access control: which requests may enter, by their Host, API key, origin and media type. Pure.

Keys are compared in constant time, all of them. Cross-origin pages get CORS fields only for the
configured origins; on loopback the Host header must name this machine (DNS rebinding).
"""

import hmac
import re
from urllib.parse import urlsplit

from mlxlite.config.options import Config
from mlxlite.http.connection import Fields
from mlxlite.http.errors import APIError, ErrorKind, truncate
from mlxlite.http.parser import Head, Headers

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/?#\\]+)(?::[0-9]{0,5})?")  # a name, a port
_EXPOSED = "x-request-id, request-id, x-mlxlite-ignored, retry-after"
_DEFAULT_HEADERS = "authorization, content-type, x-api-key"
# Names by which a container's programs reach the machine that runs it.
_CONTAINER_HOSTS = ("host.docker.internal", "host.containers.internal")
_SIMPLE_TYPES = ("", "application/x-www-form-urlencoded", "text/plain")  # need no preflight


class Access:
    """The rules of one configuration."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._keys = tuple(key.encode() for key in config.api_keys())

    @property
    def num_keys(self) -> int:
        return len(self._keys)

    def check_host(self, head: Head) -> None:
        """Raises APIError 403 where the Host header names another machine."""
        if self._config.uds is None and self._config.is_loopback and not self._is_local(head):
            host = truncate(head.headers.get("host"))
            message = (
                f"the host {host!r} is not allowed: start the server with --allowed-hosts and "
                "this name, or call it as localhost"
            )
            raise APIError(ErrorKind.HOST, message, hint="--allowed-hosts")

    def _is_local(self, head: Head) -> bool:
        if "host" not in head.headers:
            return True
        if (match := _HOST.fullmatch(head.headers.get("host"))) is None:
            return False
        name = match[1].strip("[]").lower()
        known = ("localhost", "127.0.0.1", "::1", self._config.host.lower(), *_CONTAINER_HOSTS)
        allowed = {item.lower() for item in self._config.allowed_hosts}
        return name in known or name.endswith(".localhost") or bool({name, "*"} & allowed)

    def key_of(self, headers: Headers) -> bytes:
        """The API key of a request; empty where none is needed. Raises APIError 401."""
        if not self._keys:
            return b""
        scheme, _, token = headers.get("authorization").partition(" ")
        given = headers.get("x-api-key")
        given = token.strip() if scheme.lower() == "bearer" else given
        # Every key is compared, each in constant time: the time taken discloses nothing.
        matches = [key for key in self._keys if hmac.compare_digest(given.encode(), key)]
        if not matches:
            fields = (("www-authenticate", "Bearer"),)
            hint = "--api-key, as Authorization: Bearer or x-api-key"
            raise APIError(ErrorKind.UNAUTHORIZED, "Unauthorized", headers=fields, hint=hint)
        return matches[0]

    def cors(self, headers: Headers) -> Fields:
        """The fields that let a page of an allowed origin read the answer."""
        origin = headers.get("origin")
        if not origin or not self._is_origin_allowed(origin):
            return ()
        return (
            ("access-control-allow-origin", origin),
            ("access-control-expose-headers", _EXPOSED),
            ("vary", "origin"),
        )

    def preflight(self, headers: Headers, methods: tuple[str, ...]) -> Fields:
        """The answer to OPTIONS: the methods of a path, and the headers that a page may send."""
        allowed = ", ".join(methods)
        if not self._is_origin_allowed(headers.get("origin")):
            return (("allow", allowed),)
        wanted = headers.get("access-control-request-headers")
        return (
            ("allow", allowed),
            ("access-control-allow-methods", allowed),
            ("access-control-allow-headers", wanted or _DEFAULT_HEADERS),
            ("access-control-max-age", "600"),
        )

    def is_foreign(self, headers: Headers) -> bool:
        """Whether a page sent the request whose origin is not allowed."""
        return "origin" in headers and not self._is_origin_allowed(headers.get("origin"))

    def _is_origin_allowed(self, origin: str) -> bool:
        """The scheme and host of an origin count, its port does not.

        A host of `*` is any, but not of the web's schemes: then every page could call.
        """
        if origin == "null":  # of sandboxed pages and files
            return "null" in self._config.cors_origins
        try:
            wanted = urlsplit(origin)
        except ValueError:
            return False
        allowed = (urlsplit(item) for item in self._config.cors_origins)
        return any(
            wanted.scheme == item.scheme
            and (
                wanted.hostname == item.hostname
                or (item.hostname == "*" and item.scheme not in ("http", "https"))
            )
            for item in allowed
        )

    def check_body_type(self, headers: Headers) -> None:
        """Raises APIError 415 where a body may not be taken for JSON.

        curl's -d sends x-www-form-urlencoded, and some clients send no type or text/plain. A web
        page can send these without a preflight: not one of another origin.
        """
        if (coding := headers.get("content-encoding").lower()) not in ("", "identity"):
            message = f"a body in {truncate(coding)!r} cannot be read; send it uncompressed"
            raise APIError(ErrorKind.MEDIA_TYPE, message, param="content-encoding")
        media_type = headers.get("content-type").partition(";")[0].strip().lower()
        is_simple = media_type in _SIMPLE_TYPES and not self.is_foreign(headers)
        if not (is_simple or media_type == "application/json" or media_type.endswith("+json")):
            raise APIError(ErrorKind.MEDIA_TYPE, "the body must be application/json")
