"""Models, health, metrics, status, cache, cancel, version: answers about the server itself."""

from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final

import orjson

from mlxlite import __version__
from mlxlite.api.endpoint import Endpoint
from mlxlite.api.fields import Table, read_fields, supported
from mlxlite.api.readers import parse_object, text
from mlxlite.api.service import ModelCard, Phase, Service
from mlxlite.engine.step import Load
from mlxlite.http.connection import JSON, Exchange
from mlxlite.http.errors import APIError, ErrorKind, truncate
from mlxlite.prefix_cache.operations import CacheStats

_PROMETHEUS: Final = (("content-type", "text/plain; version=0.0.4; charset=utf-8"),)
CANCEL_FIELDS: Final[Table] = {"id": supported(text, "which; default: all")}


def model_list(cards: list[ModelCard]) -> bytes:
    return orjson.dumps({"object": "list", "data": [card.as_json() for card in cards]})


def _models(service: Service, exchange: Exchange, _body: bytes) -> None:
    exchange.respond(200, model_list([service.need_model().card]))


def _model(service: Service, exchange: Exchange, _body: bytes) -> None:
    card = service.need_model().card
    name = exchange.head.path.removeprefix("/v1").removeprefix("/models/")
    if name != card.id:
        message = f"the model {truncate(name)!r} does not exist here; see /v1/models"
        raise APIError(ErrorKind.NO_MODEL, message, param="model")
    exchange.respond(200, orjson.dumps(card.as_json()))


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


def status(
    card: ModelCard,
    load: Load,
    cache: CacheStats,
    *,
    max_rows: int,
    max_queue: int,
    fingerprint: str,
) -> bytes:
    return orjson.dumps(
        {
            "object": "status",
            "model": card.as_json() | {"fingerprint": fingerprint},
            "queue": {"waiting": load.num_waiting, "max": max_queue},
            "rows": {"running": load.num_running, "max": max_rows, "steps": load.num_steps},
            "memory": {"bytes": load.num_bytes, "max_bytes": load.max_bytes},
            "prefix_cache": cache_stats(cache),
            "versions": {"mlxlite": __version__},
        }
    )


def _status(service: Service, exchange: Exchange, _body: bytes) -> None:
    ready, config = service.need_model(), service.config
    body = status(
        ready.card,
        ready.engine.load,
        ready.engine.cache_stats,
        max_rows=max(1, config.max_batch_size),
        max_queue=config.max_queue,
        fingerprint=f"fp_{ready.model.fingerprint}",
    )
    exchange.respond(200, body)


def _version(_service: Service, exchange: Exchange, _body: bytes) -> None:
    exchange.respond(200, orjson.dumps({"version": __version__}))


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


def _cache(service: Service, exchange: Exchange, _body: bytes) -> None:
    exchange.respond(200, orjson.dumps(cache_stats(service.need_model().engine.cache_stats)))


def _clear_cache(service: Service, exchange: Exchange, _body: bytes) -> None:
    """Clears memory at the next step, and files soon after; the answer is the state before."""
    engine = service.need_model().engine
    body = cache_stats(engine.cache_stats) | {"status": "cleared"}
    engine.clear_cache()
    exchange.respond(200, orjson.dumps(body))


@dataclass(frozen=True, slots=True)
class CancelRequest:
    id: str | None


def parse_cancel(body: bytes) -> CancelRequest:
    """Of `{}` or `{"id": "chatcmpl-…"}`; an empty body is `{}`. Raises APIError 400."""
    given = read_fields(parse_object(body) if body.strip() else {}, CANCEL_FIELDS)
    return CancelRequest(given.take("id"))


def _cancel(service: Service, exchange: Exchange, body: bytes) -> None:
    service.need_model()
    wanted = parse_cancel(body).id
    found = [running for running in service.running.values() if wanted in (None, running.id)]
    for running in found:
        service.cancel(running)
    state = "cancelled" if found else "no_active_generation"
    exchange.respond(200, orjson.dumps({"status": state, "cancelled_count": len(found)}))


ENDPOINTS: Final = (
    Endpoint("GET", "/v1/models", "The served model, as a list", _models),
    Endpoint("GET", "/v1/models/{id}", "The served model", _model),
    Endpoint("GET", "/v1/cache", "The prefix cache in numbers", _cache),
    Endpoint("DELETE", "/v1/cache", "Forget all prefixes", _clear_cache),
    Endpoint("POST", "/v1/cancel", "End answers", _cancel, fields=CANCEL_FIELDS),
    Endpoint("GET", "/v1/status", "Queue, rows, memory, cache", _status),
    Endpoint("GET", "/version", "The server's version", _version, is_open=True),
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
