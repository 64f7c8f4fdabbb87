"""Models, health, metrics, status, cache, cancel, version: answers about the server itself."""

from collections.abc import Callable
from time import perf_counter
from typing import Any, Final

import orjson

from mlxlite import __version__
from mlxlite.api.endpoint import Endpoint, Handler
from mlxlite.api.fields import Table, reading, supported
from mlxlite.api.readers import parse_object, text
from mlxlite.api.service import ModelCard, Phase, Ready, Service
from mlxlite.config.options import Config
from mlxlite.http.connection import JSON, Exchange
from mlxlite.http.errors import APIError, ErrorKind, truncate
from mlxlite.prefix_cache.operations import CacheStats

_PROMETHEUS: Final = (("content-type", "text/plain; version=0.0.4; charset=utf-8"),)
CANCEL_FIELDS: Final[Table] = {"id": supported(text, "which; default: all")}


def _json(answer: Callable[[Service], dict[str, Any]]) -> Handler:
    """A handler of what needs neither the request's path nor its body."""

    def handle(service: Service, exchange: Exchange, _body: bytes) -> None:
        exchange.respond(200, orjson.dumps(answer(service)))

    return handle


def model_list(card: ModelCard) -> dict[str, Any]:
    """OpenAI's list; `models` is Codex's, which takes an empty one for «use your own settings»."""
    return {"object": "list", "data": [card.as_json()], "models": []}


def anthropic_model_list(card: ModelCard) -> dict[str, Any]:
    return {
        "data": [card.as_anthropic_json()],
        "first_id": card.id,
        "last_id": card.id,
        "has_more": False,
    }


def _is_anthropic(exchange: Exchange) -> bool:
    return "anthropic-version" in exchange.head.headers


def _models(service: Service, exchange: Exchange, _body: bytes) -> None:
    """In Anthropic's form for its clients, which send the version of it."""
    list_ = anthropic_model_list if _is_anthropic(exchange) else model_list
    exchange.respond(200, orjson.dumps(list_(service.need_model().card)))


def _model(service: Service, exchange: Exchange, _body: bytes) -> None:
    card, name = service.need_model().card, exchange.path_rest
    if name != card.id:
        message = f"the model {truncate(name)!r} does not exist here; see /v1/models"
        raise APIError(ErrorKind.NO_MODEL, message, param="model")
    shown = card.as_anthropic_json() if _is_anthropic(exchange) else card.as_json()
    exchange.respond(200, orjson.dumps(shown))


def _health(service: Service, exchange: Exchange, _body: bytes) -> None:
    engine = service.ready.engine if service.ready is not None else None
    reason = engine.unhealthy_reason(perf_counter()) if engine is not None else None
    is_ok = service.phase is Phase.READY and reason is None
    body: dict[str, Any] = {"status": "ok", "batching": _batching(service)}
    if not is_ok:
        status = Phase.FAILED if reason is not None else service.phase
        body = {"status": status.value} | ({} if reason is None else {"reason": reason})
    headers = JSON if is_ok else (*JSON, ("retry-after", "2"))
    exchange.respond(200 if is_ok else 503, orjson.dumps(body), headers)


def _batching(service: Service) -> str:
    size = service.config.max_batch_size
    continuous = str(service.config.enable_continuous_batching).lower()
    return f"enabled (max batch: {size}, continuous: {continuous})" if size > 0 else "disabled"


def _metrics(service: Service, exchange: Exchange, _body: bytes) -> None:
    metrics = service.metrics
    if service.ready is not None:
        load = service.ready.engine.load
        metrics.prefix_cache(service.ready.engine.cache_stats)
        metrics.memory(load.num_bytes, load.max_bytes)
    if "application/json" in exchange.head.headers.get("accept"):
        exchange.respond(200, orjson.dumps(metrics.seed_json(service.config.max_batch_size)))
    else:
        exchange.respond(200, metrics.render_prometheus(), _PROMETHEUS)


def status(ready: Ready, config: Config) -> dict[str, Any]:
    load, max_rows = ready.engine.load, max(1, config.max_batch_size)
    return {
        "object": "status",
        "model": ready.card.as_json() | {"fingerprint": f"fp_{ready.model.fingerprint}"},
        "queue": {"waiting": load.num_waiting, "max": config.max_queue},
        "rows": {"running": load.num_running, "max": max_rows, "steps": load.num_steps},
        "memory": {"bytes": load.num_bytes, "max_bytes": load.max_bytes},
        "prefix_cache": cache_stats(ready.engine.cache_stats),
        "versions": {"mlxlite": __version__},
    }


def cache_stats(stats: CacheStats) -> dict[str, Any]:
    asked, hit = stats.num_asked, stats.num_hit
    return {
        "object": "prefix_cache",
        "bytes": stats.num_bytes,
        "max_bytes": stats.max_bytes,
        "disk_bytes": stats.disk_bytes,
        "max_disk_bytes": stats.max_disk_bytes,
        "queried_tokens": asked,
        "hit_tokens": hit,
        "hit_rate": hit / asked if asked else 0.0,
        "evictions": stats.num_evicted,
        "disk_loads": stats.num_from_disk,
    }


def _cache(service: Service) -> dict[str, Any]:
    return cache_stats(service.need_model().engine.cache_stats)


def _clear_cache(service: Service, exchange: Exchange, _body: bytes) -> None:
    """Clears memory at the next step, and files soon after; the answer is the state before.

    For the first key alone: without their prefixes all keys wait.
    """
    service.check_first_key(exchange)
    before = _cache(service)
    service.need_model().engine.clear_cache()
    exchange.respond(200, orjson.dumps(before | {"status": "cleared"}))


def parse_cancel(body: bytes) -> tuple[str | None, tuple[str, ...]]:
    """The id in `{"id": "chatcmpl-…"}`, if any, and the unknown fields; an empty body is `{}`.

    Raises APIError 400.
    """
    with reading(parse_object(body) if body.strip() else {}, CANCEL_FIELDS) as given:
        return given.take("id"), given.ignored


def _cancel(service: Service, exchange: Exchange, body: bytes) -> None:
    """A key may cancel its own answers only; those of others are as unknown to it."""
    service.need_model()
    wanted, ignored = parse_cancel(body)
    service.note_ignored(exchange, ignored)
    found = [
        running
        for other, running in service.running.items()
        if other.key == exchange.key and wanted in (None, running.id)
    ]
    for running in found:
        service.cancel(running)
    state = "cancelled" if found else "no_active_generation"
    exchange.respond(200, orjson.dumps({"status": state, "cancelled_count": len(found)}))


ENDPOINTS: Final = (
    Endpoint(
        "GET",
        "/v1/models",
        "The served model, as a list; in Anthropic's form with `anthropic-version`",
        _models,
    ),
    Endpoint("GET", "/v1/models/{id}", "The served model", _model),
    Endpoint("GET", "/v1/cache", "The prefix cache in numbers", _json(_cache)),
    Endpoint("DELETE", "/v1/cache", "Forget all prefixes (the first key alone)", _clear_cache),
    Endpoint("POST", "/v1/cancel", "End answers", _cancel, CANCEL_FIELDS),
    Endpoint(
        "GET",
        "/v1/status",
        "Queue, rows, memory, cache",
        _json(lambda service: status(service.need_model(), service.config)),
    ),
    Endpoint(
        "GET",
        "/version",
        "The server's version",
        _json(lambda _: {"version": __version__}),
        is_open=True,
    ),
    Endpoint("GET", "/health", "Whether it can answer", _health, is_open=True),
    Endpoint(
        "GET",
        "/metrics",
        "For Prometheus",
        _metrics,
        is_open=True,
        answer_schema="Text",
        media_type="text/plain",
    ),
)
