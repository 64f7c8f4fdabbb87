"""Generation: a request's body to sequences in the engine, and their outputs to one answer.

`Dialect` is how one endpoint reads a body and writes an answer; the way from one to the other is
the same for all of them and is here.
"""

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import time
from typing import Any, TypeVar

from mlxlite.api.answer import Answer, queue_full
from mlxlite.api.endpoint import Handler
from mlxlite.api.left_out import collecting
from mlxlite.api.raw_strings import MAX_RAW_BYTES, too_long
from mlxlite.api.readers import MAX_VALUES
from mlxlite.api.render import (
    complete,
    context_exceeded,
    output_parser,
    render_chat,
    with_bad_words,
)
from mlxlite.api.request import ChatRequest, Request
from mlxlite.api.service import Ready, Running, Service
from mlxlite.api.threads import Work
from mlxlite.api.writers import Envelope, Writer
from mlxlite.config.options import Config
from mlxlite.engine.engine import EngineFailed, QueueFull
from mlxlite.engine.sequence import Prompt
from mlxlite.engine.sequence import Sequence as EngineSequence
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import APIError, ErrorKind, bad_request, internal_error, retry_later
from mlxlite.models.interface import Model
from mlxlite.output.generation import Generation, GenerationOptions
from mlxlite.wanted import Dropped

T = TypeVar("T")
R = TypeVar("R", bound=Request)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One endpoint's way to ask for a generation, and to answer it.

    `parse`, `resume` and `render` run in a thread, in this order; `resume` completes a request from
    the service's stored responses. `ended` is called once the answer is complete.
    """

    parse: Callable[[bytes], Any]
    writer: Callable[[Envelope, Any, Model, Sequence[Prompt]], Writer]
    id_prefix: str
    prompt_field: str = "messages"  # in the error about a body that is not decoded
    render: Callable[[Model, Any, Config], Sequence[Prompt]] = render_chat
    resume: Callable[[Service, Exchange, Any], Any] | None = None
    ended: Callable[[Service, Exchange, str, Any, Any], None] | None = None

    @property
    def handle(self) -> Handler:
        return in_task(partial(_generate, self))


def in_task(work: Callable[[Service, Exchange, bytes], Awaitable[None]]) -> Handler:
    """A handler that runs `work` as a task, and raises APIError 503 while there is no model."""

    def handle(service: Service, exchange: Exchange, body: bytes) -> None:
        service.need_model()
        exchange.is_kept = True
        service.spawn(task(service, exchange, body), lambda _: exchange.abandon(internal_error()))

    async def task(service: Service, exchange: Exchange, body: bytes) -> None:
        try:
            await work(service, exchange, body)
        except APIError as error:
            exchange.fail(error)
        except Dropped:
            pass
        finally:
            exchange.release(is_read=True)

    return handle


async def _generate(dialect: Dialect, service: Service, exchange: Exchange, body: bytes) -> None:
    ready = service.need_model()
    model, config, tenant = ready.model, service.config, service.tenant(exchange)

    def parse(body: bytes) -> Any:
        request = with_bad_words(model, dialect.parse(body))
        return request if dialect.resume is None else dialect.resume(service, exchange, request)

    def render(request: Any) -> list[Prompt]:
        prompts = dialect.render(model, request, config)
        return [complete(model, prompt, request, tenant, config) for prompt in prompts]

    request, prompts = await parse_and_render(
        service, exchange, body, parse, render, dialect.prompt_field
    )
    if exchange.is_lost or exchange.is_answered:
        return
    if dialect.resume is None:  # else the messages are stored
        request = request.without_sources()
    service.need_model()  # the phase may have changed while the prompt was rendered
    is_limited = request.priority < service.priority_limit(exchange)
    service.note_ignored(exchange, request.ignored, is_limited=is_limited)
    service.check_model(request.model)
    _start(dialect, service, exchange, ready, request, prompts)


async def parse_and_render(
    service: Service,
    exchange: Exchange,
    body: bytes,
    parse: Callable[[bytes], R],
    render: Callable[[R], T],
    prompt_field: str = "messages",
) -> tuple[R, T]:
    """Read and render a body in the service's threads. Raises APIError, Dropped.

    Images may have to be fetched and a grammar be compiled: such a request is parsed among those of
    its size, and rendered where it may take long.
    """
    model = service.need_model().model

    def render_all(request: R) -> tuple[R, T]:
        with collecting() as left_out:
            rendered = render(request)
        return replace(request, ignored=(*request.ignored, *left_out)), rendered

    def work() -> tuple[R, T | None]:
        check_strings(model, body, prompt_field)
        request = parse(body)
        return (request, None) if slow_work(model, request) else render_all(request)

    request, rendered = await service.in_thread(exchange, Work.of(len(body)), work)
    if rendered is not None:
        return request, rendered
    kind = slow_work(model, request) or Work.GRAMMAR  # compiled in the meantime
    return await service.in_thread(exchange, kind, render_all, request)


def check_strings(model: Model, body: bytes, field: str) -> None:
    """Raises APIError for a body with a text that no prompt can hold, before it is decoded."""
    most = MAX_RAW_BYTES * model.max_chars
    if num_bytes := too_long(body, most):
        least = model.context_size * num_bytes // most
        raise context_exceeded(least, model.context_size, field, is_least=True)


def slow_work(model: Model, request: Request) -> Work | None:
    """What a request needs that may take long; None if nothing."""
    if request.sources:
        return Work.IMAGES
    if request.constraint is None or model.is_compiled(request.constraint[0]):
        return None
    return Work.GRAMMAR


def _start(
    dialect: Dialect,
    service: Service,
    exchange: Exchange,
    ready: Ready,
    request: Any,
    prompts: Sequence[Prompt],
) -> None:
    model, sequences = ready.model, _sequences(service, exchange, ready, request, prompts)
    id = dialect.id_prefix + secrets.token_hex(12)
    envelope = Envelope(id, int(time()), model.id, f"fp_{model.fingerprint}")
    writer = dialect.writer(envelope, request, model, prompts)
    num_per_prompt, is_stream = request.num_choices, request.is_stream
    answer = Answer(
        exchange, writer, len(sequences), num_per_prompt=num_per_prompt, is_stream=is_stream
    )
    is_chat = isinstance(request, ChatRequest)
    make_parser = output_parser(model, request, prompts[0]) if is_chat else None
    options = _generation_options(request)
    generations = [
        Generation(
            sequence,
            detokenize=model.detokenize_all if request.shows_special else model.detokenize,
            write=answer.choice(i),
            finish=partial(ready.engine.finish, sequence.id),
            stop=request.stop,
            parser=make_parser() if make_parser is not None else None,
            guard=service.config.repetition_guard,
            options=options,
        )
        for i, sequence in enumerate(sequences)
    ]
    try:
        ready.engine.add(sequences, generations)
    except QueueFull:
        raise queue_full() from None
    except EngineFailed as error:
        raise retry_later(ErrorKind.UNAVAILABLE, str(error), retry_after_s=30) from None
    service.running[exchange] = Running(id, tuple(sequence.id for sequence in sequences))

    def ended() -> None:
        service.cancel(service.running.pop(exchange))  # of a failed answer, choices may still run
        if dialect.ended is not None:
            dialect.ended(service, exchange, id, request, writer)

    exchange.on_end = ended
    answer.start()


def _generation_options(request: Request) -> GenerationOptions:
    limit_ms = request.max_predict_ms
    return GenerationOptions(
        is_silent=request.max_tokens == 0,
        reports_end=request.reports_end,
        reports_tokens=request.returns_tokens,
        shows_stop=request.shows_stop,
        min_tokens=request.sampling.get("min_tokens", 0),
        max_decode_s=None if limit_ms is None else limit_ms / 1000,
        stop_tokens=frozenset(request.stop_tokens),
    )


def _check_likelihoods(request: Request, prompts: Sequence[Prompt]) -> None:
    """Raises APIError 400 where those of the prompts cannot be had."""
    if request.prompt_top is None:
        return
    param = "echo" if request.prompt_logprobs is None else "prompt_logprobs"
    if any(prompt.images for prompt in prompts):
        raise bad_request(f"'{param}': an image has no likelihood.", param)
    num_places = sum(len(prompt.tokens) for prompt in prompts)
    num_numbers = num_places * (request.prompt_top + 1)
    if num_numbers * (request.num_choices if request.is_stream else 1) > MAX_VALUES:
        message = f"'{param}': at most {MAX_VALUES} likelihoods in an answer, rivals counted."
        raise bad_request(message, param)


def _sequences(
    service: Service,
    exchange: Exchange,
    ready: Ready,
    request: Request,
    prompts: Sequence[Prompt],
) -> list[EngineSequence]:
    model, size, config = ready.model, ready.card.context_size, service.config
    if request.num_choices * len(prompts) > config.max_queue:
        raise bad_request(f"at most {config.max_queue} choices on this server", "n")
    sampling = request.sampling_params(model.defaults, secrets.randbits(64))
    biased = {"logit_bias": [id for id, _ in sampling.logit_bias]}
    for param, ids in (biased | {"allowed_token_ids": sampling.allowed_token_ids}).items():
        for id in ids:
            if id >= model.num_vocab:
                raise bad_request(f"the model has no token {id}", param)
    eos_tokens = frozenset(request.stop_tokens)
    eos_tokens |= frozenset() if request.ignore_eos else model.eos_tokens
    if request.fills_in and model.fill_marks is not None and not request.ignore_eos:
        eos_tokens |= model.fill_marks.ends
    _check_likelihoods(request, prompts)
    priority = max(request.priority, service.priority_limit(exchange))
    sequences: list[EngineSequence] = []
    for prompt in prompts:
        num_left = size - len(prompt.tokens)
        if num_left < 1:
            raise context_exceeded(len(prompt.tokens), size, request.prompt_field)
        wanted = config.max_tokens or request.default_max_tokens or num_left
        wanted = wanted if request.max_tokens is None else max(1, request.max_tokens)
        first = service.num_sequences + 1
        sequences += [
            EngineSequence(
                id=first + i,
                prompt=prompt,
                sampling=replace(sampling, seed=(sampling.seed + i) % 2**64),
                max_tokens=min(wanted, num_left),
                eos_tokens=eos_tokens,
                priority=priority,
                tenant=exchange.key,
                number=len(sequences) + i,
                wants_progress=request.is_stream and request.return_progress and i == 0,
                wants_usage=request.needs_usage,
                prompt_top=request.prompt_top if i == 0 or request.is_stream else None,
            )
            for i in range(request.num_choices)
        ]
        service.num_sequences += request.num_choices
    return sequences
