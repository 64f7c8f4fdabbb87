"""What is at which path, and what is said there: requests to sequences, outputs to answers.

A handler gets an admitted request, which it answers at once, or hands to the engine with a sink
that writes straight to the connection. Streamed or not, an answer is the fold of the same outputs.
It must never wait for the model on the loop, and never drop a field in silence.

`Home` is what the routes need of the server; who may ask, and what a client's leaving means, is the
server's. What a chat does not need (Anthropic's dialect, Responses, the document of all fields) is
imported when it is first asked for, and until then takes no memory.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from time import perf_counter, time
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import quote

from mlxlite.api.conversation import Message
from mlxlite.api.endpoint import Route
from mlxlite.api.endpoints import admin
from mlxlite.api.endpoints.admin import (
    cache_stats,
    cancelled,
    health,
    json_body,
    model_card,
    model_list,
    parse_cancel,
    version,
)
from mlxlite.api.endpoints.anthropic_messages import prepare_count, prepare_messages
from mlxlite.api.endpoints.chat_completions import ChatWriter, prepare_chat
from mlxlite.api.endpoints.completions import CompletionWriter, prepare_completion
from mlxlite.api.endpoints.embeddings import embeddings, prepare_embedding
from mlxlite.api.endpoints.responses import prepare_response
from mlxlite.api.endpoints.tokenize import (
    detokenized,
    prepare_detokenized,
    prepare_tokens,
    tokenized,
)
from mlxlite.api.generate import AnswerSink, context_exceeded
from mlxlite.api.render import HasPictures, listener
from mlxlite.api.request import Options
from mlxlite.api.service import Phase, Ready
from mlxlite.api.stored_responses import Conversations
from mlxlite.api.writers import Envelope, Writer
from mlxlite.config.options import Config
from mlxlite.engine.engine import EngineFailed, QueueFull
from mlxlite.engine.sequence import Prompt, Sequence
from mlxlite.errors import FOREIGN, bearable, trace_of
from mlxlite.http.connection import JSON, Exchange
from mlxlite.http.errors import APIError, Cause, bad, clip, later, our_fault
from mlxlite.metrics import Metrics
from mlxlite.output.harmony import AnyChannels

log = logging.getLogger("mlxlite.routes")
LONG_BODY_BYTES = 32 << 10  # a longer body renders beside the short ones, not before them
_MAX_IGNORED_NAMES = 256  # logged once each; bounds the table
_MAX_SHOWN_NAMES = 32  # in one answer, each of at most so many characters
_MAX_IGNORED_NAME = 64
T = TypeVar("T")
_PROMETHEUS: Final = (("content-type", "text/plain; version=0.0.4; charset=utf-8"),)


class Home(Protocol):
    """The server, as its routes see it."""

    config: Config
    phase: Phase
    metrics: Metrics

    served: Ready | None
    executors: tuple[Executor, ...]  # for short bodies, for long ones, for pictures

    def spawn(
        self, coroutine: Coroutine[Any, Any, None], on_error: Callable[[BaseException], None]
    ) -> None:
        """Run a task whose unexpected end is not lost."""
        ...


class Routes:
    """The table of paths, and their handlers, which may raise APIError."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._config = home.config
        self._exchanges: dict[str, Exchange] = {}  # generating, by the answer's id
        self._ignored_names: set[str] = set()
        self._num_sequences = 0
        self._conversations = Conversations()
        self.table = self._make_table()

    # --- routes -----------------------------------------------------------------------------

    def _make_table(self) -> dict[str, Route]:
        return {
            "/chat/completions": Route("/v1/chat/completions", {"POST": self._chat}),
            "/completions": Route("/v1/completions", {"POST": self._completions}),
            "/messages": Route(
                "/v1/messages", {"POST": self._messages}, error_body=_anthropic_error
            ),
            "/messages/count_tokens": Route(
                "/v1/messages/count_tokens",
                {"POST": self._count_tokens},
                error_body=_anthropic_error,
            ),
            "/responses": Route("/v1/responses", {"POST": self._responses}),
            "/responses/": Route(
                "/v1/responses/{id}", {"GET": self._response, "DELETE": self._forget}
            ),
            "/embeddings": Route("/v1/embeddings", {"POST": self._embeddings}),
            "/tokenize": Route("/tokenize", {"POST": self._tokenize}),
            "/detokenize": Route("/detokenize", {"POST": self._detokenize}),
            "/models": Route("/v1/models", {"GET": self._models}),
            "/models/": Route("/v1/models/{id}", {"GET": self._model}),
            "/cache": Route("/v1/cache", {"GET": self._cache, "DELETE": self._clear_cache}),
            "/cancel": Route("/v1/cancel", {"POST": self._cancel}),
            "/health": Route("/health", {"GET": self._health}, is_open=True),
            "/metrics": Route("/metrics", {"GET": self._metrics}, is_open=True),
            "/status": Route("/v1/status", {"GET": self._status}),
            "/openapi.json": Route("/openapi.json", {"GET": self._openapi}, is_open=True),
            "/version": Route("/version", {"GET": self._version}, is_open=True),
        }

    def find(self, path: str) -> Route | None:
        """The route of a path, with or without /v1; a model's id may contain slashes."""
        path = path.removeprefix("/v1")
        for prefix in ("/models/", "/responses/"):
            if path.startswith(prefix) and path != prefix:
                return self.table[prefix]
        return self.table.get(path.rstrip("/") or "/")

    def _need_model(self) -> Ready:
        if self._home.phase is Phase.READY and self._home.served is not None:
            return self._home.served
        message, retry_after_s = {
            Phase.DRAINING: ("the server is shutting down", 5),
            Phase.FAILED: ("the model has failed; see /health", 30),
        }.get(self._home.phase, ("the model is loading", 2))
        raise later(Cause.UNAVAILABLE, message, retry_after_s)

    def _health(self, exchange: Exchange, _body: bytes) -> None:
        engine = self._home.served.engine if self._home.served is not None else None
        reason = engine.trouble(perf_counter()) if engine is not None else None
        if self._home.phase is Phase.READY and reason is None:
            size = self._config.max_batch_size
            continuous = str(self._config.enable_continuous_batching).lower()
            enabled = f"enabled (max batch: {size}, continuous: {continuous})"
            exchange.respond(200, health("ok", enabled if size > 0 else "disabled"))
            return
        status = Phase.FAILED.value if reason is not None else self._home.phase.value
        body = health(status, reason=reason)
        exchange.respond(503, body, (*JSON, ("retry-after", "2")))

    def _metrics(self, exchange: Exchange, _body: bytes) -> None:
        if (served := self._home.served) is not None:
            load = served.engine.load
            self._home.metrics.prefix_cache(served.engine.cache_stats)
            self._home.metrics.memory(load.num_bytes, load.max_bytes)
        if "application/json" in exchange.head.headers.get("accept"):
            values = self._home.metrics.seed_json(self._config.max_batch_size)
            exchange.respond(200, json_body(values))
        else:
            exchange.respond(200, self._home.metrics.render_prometheus(), _PROMETHEUS)

    def _models(self, exchange: Exchange, _body: bytes) -> None:
        exchange.respond(200, model_list([self._need_model().card]))

    def _model(self, exchange: Exchange, _body: bytes) -> None:
        card = self._need_model().card
        name = exchange.head.path.removeprefix("/v1").removeprefix("/models/")
        if name != card.id:
            message = f"the model {clip(name)!r} does not exist here; see /v1/models"
            raise APIError(Cause.NO_MODEL, message, param="model")
        exchange.respond(200, model_card(card))

    def _cache(self, exchange: Exchange, _body: bytes) -> None:
        exchange.respond(200, cache_stats(self._need_model().engine.cache_stats))

    def _clear_cache(self, exchange: Exchange, _body: bytes) -> None:
        """Memory at the next step, files as soon as the disk is at it."""
        engine = self._need_model().engine
        body = cache_stats(engine.cache_stats, is_cleared=True)
        engine.clear_cache()
        exchange.respond(200, body)

    def _cancel(self, exchange: Exchange, body: bytes) -> None:
        engine = self._need_model().engine
        wanted = parse_cancel(body).id
        found = [e for id, e in self._exchanges.items() if wanted in (None, id)]
        for other in found:
            for id in other.sequence_ids:
                engine.cancel(id)
        exchange.respond(200, cancelled(len(found)))

    def _status(self, exchange: Exchange, _body: bytes) -> None:
        ready = self._need_model()
        exchange.respond(
            200,
            admin.status(
                ready.card,
                ready.engine.load,
                ready.engine.cache_stats,
                max_rows=max(1, self._config.max_batch_size),
                max_queue=self._config.max_queue,
                fingerprint=f"fp_{ready.model.fingerprint}",
            ),
        )

    def _openapi(self, exchange: Exchange, _body: bytes) -> None:
        from mlxlite.api.openapi import document

        exchange.respond(200, document())

    def _version(self, exchange: Exchange, _body: bytes) -> None:
        exchange.respond(200, version())

    # --- what the model answers -------------------------------------------------------------

    def _chat(self, exchange: Exchange, body: bytes) -> None:
        self._answer(exchange, body, self._begin_chat)

    def _completions(self, exchange: Exchange, body: bytes) -> None:
        self._answer(exchange, body, self._begin_completion)

    def _messages(self, exchange: Exchange, body: bytes) -> None:
        self._answer(exchange, body, self._begin_message)

    def _count_tokens(self, exchange: Exchange, body: bytes) -> None:
        self._answer(exchange, body, self._count_message)

    def _responses(self, exchange: Exchange, body: bytes) -> None:
        self._answer(exchange, body, self._begin_response)

    def _response(self, exchange: Exchange, _body: bytes) -> None:
        self._need_model()
        id = exchange.head.path.rpartition("/")[2]
        if (body := self._conversations.body(_own(exchange, id))) is None:
            raise APIError(Cause.NOT_FOUND, f"there is no response {clip(id)!r} here")
        exchange.respond(200, body)

    def _forget(self, exchange: Exchange, _body: bytes) -> None:
        id = exchange.head.path.rpartition("/")[2]
        if not self._conversations.delete(_own(exchange, id)):
            raise APIError(Cause.NOT_FOUND, f"there is no response {clip(id)!r} here")
        from mlxlite.api.endpoints.responses import deleted

        exchange.respond(200, deleted(id))

    def _embeddings(self, exchange: Exchange, body: bytes) -> None:
        self._answer(exchange, body, self._embed)

    def _tokenize(self, exchange: Exchange, body: bytes) -> None:
        self._answer(exchange, body, self._count)

    def _detokenize(self, exchange: Exchange, body: bytes) -> None:
        self._answer(exchange, body, self._decode)

    def _answer(
        self,
        exchange: Exchange,
        body: bytes,
        begin: Callable[[Ready, Exchange, bytes], Coroutine[Any, Any, None]],
    ) -> None:
        """Answer in a task of its own, because it waits for a thread."""
        ready = self._need_model()

        exchange.is_kept = True

        async def task() -> None:
            try:
                await begin(ready, exchange, body)
            except APIError as error:
                exchange.fail(error)
            finally:
                exchange.release(is_read=True)

        self._home.spawn(task(), lambda _: exchange.abandon(our_fault()))

    async def _off_loop(self, body: bytes, work: Callable[..., T], *args: Any) -> T:
        """Parse and render in a thread: short bodies in order of arrival, others beside."""
        loop = asyncio.get_running_loop()
        executor = self._home.executors[len(body) > LONG_BODY_BYTES]
        try:
            return await loop.run_in_executor(executor, partial(_carry, work, *args))
        except HasPictures:
            patient = partial(_carry, work, *args, is_patient=True)
            return await loop.run_in_executor(self._home.executors[2], patient)

    async def _begin_chat(self, ready: Ready, exchange: Exchange, body: bytes) -> None:
        tenant = self._tenant(exchange)
        request, prompt = await self._off_loop(
            body, prepare_chat, ready.model, body, tenant, self._config
        )

        def write(envelope: Envelope) -> Writer:
            return ChatWriter(
                envelope,
                ready.model.token_bytes,
                request.stream_options,
                num_choices=request.num_choices,
                has_logprobs=request.top_logprobs is not None,
            )

        listen = listener(ready.model, request, prompt)
        self._generate(ready, exchange, request, [prompt], "chatcmpl-", write, listen=listen)

    async def _begin_message(self, ready: Ready, exchange: Exchange, body: bytes) -> None:
        tenant = self._tenant(exchange)
        request, prompt = await self._off_loop(
            body, prepare_messages, ready.model, body, tenant, self._config
        )

        from mlxlite.api.endpoints.anthropic_messages import MessagesWriter

        def write(envelope: Envelope) -> Writer:
            return MessagesWriter(envelope, len(prompt.tokens))

        listen = listener(ready.model, request, prompt)
        self._generate(ready, exchange, request, [prompt], "msg_", write, listen=listen)

    async def _count_message(self, ready: Ready, exchange: Exchange, body: bytes) -> None:
        request, num_tokens = await self._off_loop(
            body, prepare_count, ready.model, body, self._config
        )
        self._note_ignored(exchange, request.ignored)
        from mlxlite.api.endpoints.anthropic_messages import token_count

        exchange.respond(200, token_count(num_tokens))

    async def _begin_response(self, ready: Ready, exchange: Exchange, body: bytes) -> None:
        tenant = self._tenant(exchange)

        def recall(id: str) -> tuple[Message, ...] | None:
            return self._conversations.get(_own(exchange, id))

        request, prompt = await self._off_loop(
            body, prepare_response, ready.model, body, tenant, self._config, recall
        )
        from mlxlite.api.endpoints.responses import ResponsesWriter

        writers: list[ResponsesWriter] = []

        def write(envelope: Envelope) -> Writer:
            writers.append(ResponsesWriter(envelope, ready.model.token_bytes, request))
            return writers[0]

        def keep(id: str) -> None:
            (writer,) = writers
            if request.is_stored and writer.body is not None and writer.answer is not None:
                said = (*request.conversation, writer.answer)
                self._conversations.put(_own(exchange, id), said, writer.body)

        listen = listener(ready.model, request, prompt)
        self._generate(ready, exchange, request, [prompt], "resp_", write, keep, listen)

    async def _begin_completion(self, ready: Ready, exchange: Exchange, body: bytes) -> None:
        tenant = self._tenant(exchange)
        request, prompts, echoes = await self._off_loop(
            body, prepare_completion, ready.model, body, tenant, self._config
        )

        def write(envelope: Envelope) -> Writer:
            return CompletionWriter(
                envelope, ready.model.token_bytes, request.stream_options, echoes=echoes
            )

        self._generate(ready, exchange, request, prompts, "cmpl-", write)

    async def _embed(self, ready: Ready, exchange: Exchange, body: bytes) -> None:
        request, inputs = await self._off_loop(body, prepare_embedding, ready.model, body)
        self._note_ignored(exchange, request.ignored)
        for tokens in inputs:
            if len(tokens) > ready.card.context_size:
                raise context_exceeded(len(tokens), ready.card.context_size, "input")
        try:
            vectors = await ready.engine.embedder.embed(
                inputs, is_mean=request.is_mean, is_wanted=lambda: not exchange.is_lost
            )
        except NotImplementedError as error:
            raise APIError(Cause.NOT_OFFERED, f"no embeddings: {error}") from None
        except FOREIGN as error:
            log.error("an embedding failed: %s", trace_of(error))
            kind = type(error).__name__
            raise APIError(Cause.MODEL_FAILED, f"the model failed: {kind}") from None
        if vectors is not None:
            num_tokens = sum(map(len, inputs))
            answer = await self._off_loop(
                body, embeddings, request, vectors, ready.model.id, num_tokens
            )
            exchange.respond(200, answer)

    async def _count(self, ready: Ready, exchange: Exchange, body: bytes) -> None:
        request, tokens = await self._off_loop(
            body, prepare_tokens, ready.model, body, self._config
        )
        self._note_ignored(exchange, request.ignored)
        size = ready.card.context_size
        answer = await self._off_loop(
            body, tokenized, request, tokens, size, ready.model.token_bytes
        )
        exchange.respond(200, answer)

    async def _decode(self, ready: Ready, exchange: Exchange, body: bytes) -> None:
        request, written = await self._off_loop(body, prepare_detokenized, ready.model, body)
        self._note_ignored(exchange, request.ignored)
        exchange.respond(200, detokenized(written))

    def _tenant(self, exchange: Exchange) -> bytes:
        """Whose prefixes a request may find: everybody's, or those of its own API key."""
        return exchange.key if self._config.prefix_cache_scope == "key" else b""

    def _check_model(self, served: str, wanted: str | None) -> None:
        """Any name is answered by the served model, unless the operator is strict."""
        if self._config.strict_model_id and wanted not in (None, served):
            message = f"the model {clip(str(wanted))!r} does not exist here; see /v1/models"
            raise APIError(Cause.NO_MODEL, message, param="model")

    def _generate(
        self,
        ready: Ready,
        exchange: Exchange,
        request: Options,
        prompts: list[Prompt],
        kind: str,
        write: Callable[[Envelope], Writer],
        then: Callable[[str], None] | None = None,
        listen: Callable[[], AnyChannels] | None = None,
    ) -> None:
        """Hand a request's sequences over; their sink answers it. Raises APIError.

        The answer's id begins with `kind`; `then` is called with it when all is said.
        """
        if exchange.is_lost or exchange.is_answered:
            return
        self._need_model()  # the phase may have changed while the prompt was rendered
        self._note_ignored(exchange, request.ignored)
        model = ready.model
        self._check_model(model.id, request.model)
        sequences = self._sequences(ready, request, prompts)
        fingerprint = f"fp_{model.fingerprint}"
        id = kind + secrets.token_hex(12)
        sink = AnswerSink(
            exchange,
            write(Envelope(id, int(time()), model.id, fingerprint)),
            num_choices=len(sequences),
            num_per_prompt=request.num_choices,
            is_stream=request.is_stream,
        )
        try:
            sinks = [sink.choice(i) for i in range(len(sequences))]
            options = request.stream_options
            ready.engine.add(
                sequences,
                request.stop,
                sinks,
                wants_progress=request.is_stream and request.return_progress,
                wants_usage=options.continuous_usage or options.timings_per_token,
                listen=listen,
            )
        except QueueFull:
            message = "the request queue is full; try again later"
            raise later(Cause.QUEUE_FULL, message, retry_after_s=1) from None
        except EngineFailed as error:
            raise later(Cause.UNAVAILABLE, str(error), retry_after_s=30) from None
        exchange.sequence_ids = tuple(sequence.id for sequence in sequences)
        self._exchanges[id] = exchange
        exchange.on_end = lambda: self._ended(id, then)
        sink.start()

    def _sequences(self, ready: Ready, request: Options, prompts: list[Prompt]) -> list[Sequence]:
        """One for each choice; those of one prompt share its `Prompt` object. Raises APIError."""
        model, size = ready.model, ready.card.context_size
        if request.num_choices * len(prompts) > self._config.max_queue:
            raise bad(f"at most {self._config.max_queue} choices on this server", "n")
        for id, _ in request.logit_bias:
            if id >= model.num_vocab:
                raise bad(f"the model has no token {id}", "logit_bias")
        sampling = request.sampling(model.defaults, secrets.randbits(64))
        eos_tokens = frozenset(request.stop_tokens)
        sequences: list[Sequence] = []
        for prompt in prompts:
            num_left = size - len(prompt.tokens)
            if num_left < 1:
                raise context_exceeded(len(prompt.tokens), size, request.prompt_field)
            first = self._num_sequences + 1
            wanted = request.max_tokens or self._config.max_tokens or num_left
            sequences += [
                Sequence(
                    id=first + i,
                    prompt=prompt,
                    sampling=replace(sampling, seed=(sampling.seed + i) % 2**64),
                    max_tokens=min(wanted, num_left),
                    eos_tokens=eos_tokens if request.ignore_eos else eos_tokens | model.eos_tokens,
                    priority=request.priority,
                )
                for i in range(request.num_choices)
            ]
            self._num_sequences += request.num_choices
        return sequences

    def _ended(self, id: str, then: Callable[[str], None] | None) -> None:
        """An answer is complete; a choice that still runs is not wanted any more."""
        self.lost(self._exchanges.pop(id))
        if then is not None:
            then(id)

    def _note_ignored(self, exchange: Exchange, names: tuple[str, ...]) -> None:
        """Unknown fields: named to the client each time, logged once each."""
        if not names:
            return
        self._home.metrics.ignored_fields(len(names))
        # Quoted, then cut: clients bound a response's head (Node: 16 KiB).
        shown = [quote(name)[:_MAX_IGNORED_NAME] for name in names[:_MAX_SHOWN_NAMES]]
        exchange.extra_headers.append(("x-mlxlite-ignored", ",".join(shown)))
        for name in shown:
            if name not in self._ignored_names and len(self._ignored_names) < _MAX_IGNORED_NAMES:
                self._ignored_names.add(name)
                log.warning("unknown request field ignored: %s (said once)", name)

    def lost(self, exchange: Exchange) -> None:
        """Nobody waits for an answer any more."""
        if self._home.served is not None:
            for id in exchange.sequence_ids:
                self._home.served.engine.cancel(id)


def _carry(work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call `work` in a thread; whatever it raises can be carried back."""
    try:
        return work(*args, **kwargs)
    except BaseException as error:
        if (bare := bearable(error)) is error:
            raise
        raise bare from error


def _own(exchange: Exchange, id: str) -> str:
    """A response's id among those of its API key: nobody else's can be asked for."""
    return f"{exchange.key.hex()}/{id}"


def _anthropic_error(error: APIError, request_id: str) -> bytes:
    from mlxlite.api.endpoints.anthropic_messages import anthropic_error

    return anthropic_error(error, request_id)
