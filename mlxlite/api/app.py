"""The application behind HTTP: finds a request's endpoint, checks its access, runs it.

Implements `http.connection.Application`. A path is found with or without /v1; the rest of a path
with `{id}` may contain slashes, as models' names do.
"""

from collections.abc import Sequence

from mlxlite.api.access import Access, is_json
from mlxlite.api.endpoint import Endpoint
from mlxlite.api.openapi import openapi_endpoint
from mlxlite.api.service import Service
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import APIError, ErrorKind, truncate

_ID = "{id}"


class Route:
    """The endpoints of one path, by method; HEAD is answered as GET without a body."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.path = endpoints[0].path
        self.endpoints = {endpoint.method: endpoint for endpoint in endpoints}
        head = ("HEAD",) if "GET" in self.endpoints else ()
        self.methods = (*self.endpoints, *head, "OPTIONS")

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

    def find(self, path: str) -> Route | None:
        path = path.removeprefix("/v1")
        for template, route in self.routes.items():
            prefix = template.removesuffix(_ID)
            if prefix != template and path.startswith(prefix) and path != prefix:
                fixed = self.routes.get(path)
                return route if fixed is None else fixed
        return self.routes.get(path.rstrip("/") or "/")

    def on_head(self, exchange: Exchange) -> None:
        """Find the endpoint and check access, before the body is read. Raises APIError."""
        head = exchange.head
        exchange.extra_headers += self._access.cors(head.headers)
        self._access.check_host(head)
        route = self.find(head.path)
        if head.method == "OPTIONS":
            exchange.route = route
            return
        if route is None:
            raise APIError(ErrorKind.NOT_FOUND, f"there is nothing at {truncate(head.path)}")
        exchange.label = route.path
        exchange.error_body = next(iter(route.endpoints.values())).error_body
        exchange.route = endpoint = route.endpoint(head.method)
        if not endpoint.is_open:
            exchange.key = self._access.key_of(head.headers)
        if head.method == "POST" and not is_json(head.headers):
            raise APIError(ErrorKind.MEDIA_TYPE, "the body must be application/json")

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
