"""Models, health, status, cache, cancel, version: answers about the server itself."""

from collections.abc import Mapping
from dataclasses import dataclass

import orjson

from mlxlite import __version__
from mlxlite.api.fields import parse_object, text
from mlxlite.api.service import ModelCard
from mlxlite.engine.step import Load
from mlxlite.prefix_cache.operations import CacheStats


def model_list(cards: list[ModelCard]) -> bytes:
    return orjson.dumps({"object": "list", "data": [card.as_json() for card in cards]})


def model_card(card: ModelCard) -> bytes:
    return orjson.dumps(card.as_json())


def health(status: str, batching: str | None = None, reason: str | None = None) -> bytes:
    body = {"status": status, "batching": batching, "reason": reason}
    return orjson.dumps({name: value for name, value in body.items() if value is not None})


def cache_stats(stats: CacheStats, *, is_cleared: bool = False) -> bytes:
    """The prefix cache in numbers; what was there, where it is cleared."""
    asked, hit = stats.num_asked, stats.num_hit
    body = {
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
    return orjson.dumps(body | ({"status": "cleared"} if is_cleared else {}))


def status(
    card: ModelCard,
    load: Load,
    cache: CacheStats,
    *,
    max_rows: int,
    max_queue: int,
    fingerprint: str,
) -> bytes:
    """What the server is at: queue, rows, memory, cache, versions."""
    return orjson.dumps(
        {
            "object": "status",
            "model": card.as_json() | {"fingerprint": fingerprint},
            "queue": {"waiting": load.num_waiting, "max": max_queue},
            "rows": {"running": load.num_running, "max": max_rows, "steps": load.num_steps},
            "memory": {"bytes": load.num_bytes, "max_bytes": load.max_bytes},
            "prefix_cache": orjson.Fragment(cache_stats(cache)),
            "versions": {"mlxlite": __version__},
        }
    )


def version() -> bytes:
    return orjson.dumps({"version": __version__})


def cancelled(num_cancelled: int) -> bytes:
    status = "cancelled" if num_cancelled else "no_active_generation"
    return orjson.dumps({"status": status, "cancelled_count": num_cancelled})


def json_body(value: Mapping[str, float | int]) -> bytes:
    """Plain numbers as JSON (the seed's metrics)."""
    return orjson.dumps(value)


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Which stream to end; None is all of them."""

    id: str | None


def parse_cancel(body: bytes) -> CancelRequest:
    """`{}` or `{"id": "chatcmpl-…"}`; an empty body is `{}`. Raises APIError 400."""
    value = parse_object(body) if body.strip() else {}
    id = value.get("id")
    return CancelRequest(None if id is None else text(id, "id"))
