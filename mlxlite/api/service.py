"""What the endpoints share: the server's phase, its models, its threads, and the running answers.

The endpoints work on this and never on the server. It holds no socket and no MLX object; all of it
but `in_thread` belongs to the event loop.
"""

import asyncio
import logging
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any, TypeVar
from urllib.parse import quote

from mlxlite.api.stored_responses import StoredResponses
from mlxlite.api.threads import Lane, Work
from mlxlite.config.options import Config
from mlxlite.engine.engine import Engine
from mlxlite.errors import trace_of
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import APIError, ErrorKind, not_supported, retry_later, truncate
from mlxlite.metrics import Metrics
from mlxlite.models.interface import Model

log = logging.getLogger("mlxlite.api")

_MAX_IGNORED_NAMES = 256  # logged once each; bounds the table
_MAX_SHOWN_NAMES = 32  # in one answer, each of at most so many characters
_MAX_IGNORED_NAME = 64
_INDEX = re.compile(r"\[[0-9]+\]")  # of an item in a path: one line of the log for all of them
T = TypeVar("T")


class Phase(Enum):
    """A server's life; requests for the model need READY."""

    NEW = "new"
    LOADING = "loading"
    READY = "ready"
    FAILED = "error"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A served model as `/v1/models` lists it. `created` is in Unix seconds."""

    id: str
    created: int
    context_size: int

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "mlx",
            "max_model_len": self.context_size,
        }

    def as_anthropic_json(self) -> dict[str, Any]:
        created = datetime.fromtimestamp(self.created, UTC)
        return {
            "type": "model",
            "id": self.id,
            "display_name": self.id,
            "created_at": created.isoformat().replace("+00:00", "Z"),
            "max_input_tokens": self.context_size,
        }


@dataclass(frozen=True, slots=True)
class Ready:
    """A loaded model and the engine that runs it."""

    model: Model
    engine: Engine
    card: ModelCard


@dataclass(frozen=True, slots=True)
class Running:
    id: str
    sequence_ids: tuple[int, ...]


class Service:
    """The state behind the endpoints."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self.config = config
        self.metrics = metrics
        self.phase = Phase.NEW
        self.ready: Ready | None = None  # once the model is loaded
        self.stored_responses = StoredResponses()
        self.tasks: set[asyncio.Task[None]] = set()
        self.running: dict[Exchange, Running] = {}
        self.num_sequences = 0  # so far; the next one's id follows
        self._lanes: dict[Work, Lane] = {}
        self._ignored_names: set[str] = set()
        self._priority_limits = config.priority_limits()
        self._first_key = config.api_keys()[:1]

    def need_model(self) -> Ready:
        """The loaded model. Raises APIError 503 where there is none (yet)."""
        if self.phase is Phase.READY and self.ready is not None:
            return self.ready
        message, retry_after_s = {
            Phase.DRAINING: ("the server is shutting down", 5),
            Phase.FAILED: ("the model has failed; see /health", 30),
        }.get(self.phase, ("the model is loading", 2))
        raise retry_later(ErrorKind.UNAVAILABLE, message, retry_after_s)

    def check_model(self, wanted: str | None) -> None:
        """Any name stands for the served model, unless `--strict-model-id`."""
        served = self.need_model().model.id
        if self.config.strict_model_id and wanted not in (None, served):
            message = f"the model {truncate(str(wanted))!r} does not exist here; see /v1/models"
            raise APIError(ErrorKind.NO_MODEL, message, param="model")

    def start_threads(self) -> None:
        self._lanes = {work: Lane(work) for work in Work}

    def stop_threads(self) -> None:
        for lane in self._lanes.values():
            lane.close()

    async def in_thread(
        self, exchange: Exchange, kind: Work, work: Callable[..., T], *args: Any
    ) -> T:
        """Call `work` in a thread. Raises Dropped once the client has disconnected."""
        lane = self._lanes[kind]
        return await lane.run(exchange.key, lambda: not exchange.is_lost, work, *args)

    def spawn(
        self, coroutine: Coroutine[Any, Any, None], on_error: Callable[[BaseException], None]
    ) -> None:
        """Run a task; an exception that ends it is logged and passed to `on_error`."""

        def done(task: asyncio.Task[None]) -> None:
            self.tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                log.error("a task died: %s", trace_of(error))
                on_error(error)

        task = asyncio.get_running_loop().create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(done)

    def tenant(self, exchange: Exchange) -> bytes:
        """Requests of one tenant share cached prefixes: all, or those of one API key."""
        return exchange.key if self.config.prefix_cache_scope == "key" else b""

    def priority_limit(self, exchange: Exchange) -> int:
        """The best priority that a request of this key may have."""
        return self._priority_limits[exchange.key.decode()]

    def check_first_key(self, exchange: Exchange) -> None:
        """Raises APIError 403 for what concerns all keys, if a key but the first asks for it."""
        if exchange.key.decode() not in (self._first_key or ("",)):
            message = "only the first of this server's API keys may do this: it concerns all keys"
            raise APIError(ErrorKind.NOT_FIRST_KEY, message, hint="the first of --api-key")

    def cancel(self, running: Running) -> None:
        if self.ready is not None:
            for id in running.sequence_ids:
                self.ready.engine.cancel(id)

    def note_ignored(
        self, exchange: Exchange, names: tuple[str, ...], *, is_limited: bool = False
    ) -> None:
        """Name what the answer is served without in a header, and once each in the log.

        `is_limited`: the priority is above the key's. Raises APIError 400 where nothing may be left
        out.
        """
        if names and self.config.strict_fields:
            name = truncate(names[0])
            message = f"'{name}' would be left out, which this server's --strict-fields refuses."
            raise not_supported(message, name)
        names += ("priority",) * is_limited
        if not names:
            return
        self.metrics.ignored_fields(len(names))
        # Quoted, then cut: clients bound a response's head (Node: 16 KiB).
        shown = [quote(name, safe="[]/:")[:_MAX_IGNORED_NAME] for name in names[:_MAX_SHOWN_NAMES]]
        exchange.extra_headers.append(("x-mlxlite-ignored", ",".join(shown)))
        for name in dict.fromkeys(_INDEX.sub("[]", name) for name in shown):
            if name not in self._ignored_names and len(self._ignored_names) < _MAX_IGNORED_NAMES:
                self._ignored_names.add(name)
                log.warning("left out of a request: %s (logged once)", name)
