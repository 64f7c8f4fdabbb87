"""GET /: a page with the model, its context and the base URLs to copy. It runs no script."""

from html import escape
from typing import Final

from mlxlite import __version__
from mlxlite.api.endpoint import Endpoint
from mlxlite.api.service import Service
from mlxlite.http.connection import Exchange

_HTML: Final = (
    ("content-type", "text/html; charset=utf-8"),
    ("content-security-policy", "default-src 'none'"),
    ("x-content-type-options", "nosniff"),
)
_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>mlxlite</title>
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"></head>
<body><h1>mlxlite {version}</h1>
<table>
<tr><td>model</td><td><code>{model}</code></td></tr>
<tr><td>context</td><td>{context}</td></tr>
<tr><td>OpenAI's clients</td><td><code>{base}/v1</code></td></tr>
<tr><td>Anthropic's clients</td><td><code>{base}</code></td></tr>
<tr><td>the API</td><td><a href="/openapi.json">openapi.json</a></td></tr>
<tr><td>state</td><td><a href="/health">health</a>, <a href="/metrics">metrics</a></td></tr>
</table></body></html>
"""


def page(service: Service, host: str) -> str:
    """The page; `host` is the request's, with its port."""
    ready = service.ready
    scheme = "http" if service.config.tls_cert is None else "https"
    return _PAGE.format(
        version=__version__,
        model=escape(service.config.served_id if ready is None else ready.card.id),
        context="loading" if ready is None else f"{ready.card.context_size} tokens",
        base=escape(f"{scheme}://{host}"),
    )


def _home(service: Service, exchange: Exchange, _body: bytes) -> None:
    host = exchange.head.headers.get("host") or "localhost"
    exchange.respond(200, page(service, host).encode(), _HTML)


ENDPOINTS: Final = (
    Endpoint(
        "GET",
        "/",
        "A page with the base URLs",
        _home,
        is_open=True,
        answer_schema="Text",
        media_type="text/html",
    ),
)
