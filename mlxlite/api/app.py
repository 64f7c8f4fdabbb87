"""The application behind HTTP: finds a request's endpoint, checks its access, runs it.

Implements `http.connection.Application`. A path is found with or without /v1; the rest of a path
with `{id}` may contain slashes, as models' names do.
"""

import re
from collections.abc import Sequence

from mlxlite.api.access import Access
from mlxlite.api.endpoint import Endpoint
from mlxlite.api.openapi import openapi_endpoint
from mlxlite.api.service import Service
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import APIError, ErrorBody, ErrorKind, error_body, truncate

_ID = "{id}"
_SLASHES = re.compile("//+")


def normal(path: str) -> str:
    """A path without /v1, however often clients put it there, and without doubled slashes."""
    path = _SLASHES.sub("/", path)
    while path.startswith("/v1/") or path == "/v1":
        path = path[3:]
    return path or "/"


class Route:
    """The endpoints of one path, by method; HEAD is answered as GET without a body."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.path = endpoints[0].path
        self.endpoints = {endpoint.method: endpoint for endpoint in endpoints}
        head = ("HEAD",) if "GET" in self.endpoints else ()
        self.methods = (*self.endpoints, *head, "OPTIONS")
        self.error_body = endpoints[0].error_body

    def endpoint(self, method: str) -> Endpoint:
        """Raises APIError 405."""
        if method not in self.methods:
            allowed = ", ".join(self.methods)
            message = f"{truncate(method)} is not possible here; use {allowed}"
            raise APIError(ErrorKind.METHOD, message, headers=(("allow", allowed),))
        return self.endpoints["GET" if method == "HEAD" else method]


class App:
    """Endpoints, and the service that they share."""

    def __init__(self, service: Service, endpoints: Sequence[Endpoint]) -> None:
        self._service = service
        self._access = Access(service.config)
        self.endpoints = (*endpoints, openapi_endpoint(endpoints))
        paths = dict.fromkeys(endpoint.path for endpoint in self.endpoints)
        self.routes = {
            path.removeprefix("/v1"): Route([e for e in self.endpoints if e.path == path])
            for path in paths
        }

    def find(self, path: str) -> tuple[Route | None, str]:
        """The route of a path, and the rest of the path where the route has one."""
        path = normal(path)
        for template, route in self.routes.items():
            prefix = template.removesuffix(_ID)
            if prefix != template and path.startswith(prefix) and path != prefix:
                fixed = self.routes.get(path)
                return (route, path.removeprefix(prefix)) if fixed is None else (fixed, "")
        return self.routes.get(path.rstrip("/") or "/"), ""

    def _dialect(self, path: str) -> ErrorBody:
        """The form of errors at a path without a route: that of the endpoint above it."""
        above = normal(path)
        while above and above not in self.routes:
            above = above.rpartition("/")[0]
        return error_body if not above else self.routes[above].error_body

    def on_head(self, exchange: Exchange) -> None:
        """Find the endpoint and check access, before the body is read. Raises APIError."""
        head = exchange.head
        exchange.extra_headers += self._access.cors(head.headers)
        route, exchange.path_rest = self.find(head.path)
        exchange.error_body = self._dialect(head.path) if route is None else route.error_body
        self._access.check_host(head)
        if self._access.is_foreign(head.headers):
            exchange.note_refusal("origin not allowed · --cors-origins")
        if head.method == "OPTIONS":
            exchange.route = route
            return
        if route is None:
            raise APIError(ErrorKind.NOT_FOUND, f"there is nothing at {truncate(head.path)}")
        exchange.label = route.path
        exchange.route = endpoint = route.endpoint(head.method)
        if not endpoint.is_open:
            exchange.key = self._access.key_of(head.headers)
        if head.method == "POST":
            self._access.check_body_type(head.headers)

    def on_body(self, exchange: Exchange, body: bytes) -> None:
        """Answer an admitted request. Raises APIError."""
        if exchange.head.method == "OPTIONS":
            methods = ("OPTIONS",) if exchange.route is None else exchange.route.methods
            headers = self._access.preflight(exchange.head.headers, methods)
            exchange.respond(204, b"", headers)
        else:
            exchange.route.handle(self._service, exchange, body)

    def on_disconnect(self, exchange: Exchange) -> None:
        """Cancel the sequences of a request whose client has disconnected."""
        if (running := self._service.running.get(exchange)) is not None:
            self._service.cancel(running)
