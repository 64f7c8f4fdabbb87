"""Generation: a request's body to sequences in the engine, and their outputs to one answer.

`Dialect` is how one endpoint reads a body and writes an answer; the way from one to the other is
the same for all of them and is here. Streamed or not, an answer is made of the same events.
"""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import time
from typing import Any, Protocol, TypeVar

from mlxlite.api.render import complete, output_parser, render_chat
from mlxlite.api.request import ChatRequest, Request
from mlxlite.api.service import Ready, Running, Service
from mlxlite.api.writers import Collected, Envelope, Writer
from mlxlite.config.options import Config
from mlxlite.engine.engine import EngineFailed, QueueFull
from mlxlite.engine.sequence import FinishReason, Prompt, Usage
from mlxlite.engine.sequence import Sequence as EngineSequence
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import APIError, Cause, bad, later, our_fault
from mlxlite.models.interface import Model
from mlxlite.output.events import Done, Event
from mlxlite.output.generation import Generation
from mlxlite.vision.images import Source

log = logging.getLogger("mlxlite.api")
T = TypeVar("T")


class HasSources(Protocol):
    """A request that may have images."""

    @property
    def sources(self) -> tuple[Source, ...]: ...


R = TypeVar("R", bound=HasSources)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One endpoint's way to ask for a generation, and to answer it.

    `parse` and `render` run in a thread; `resume` too, between them: it completes a request from
    what the service has stored. `ended` is called once the answer is complete.
    """

    parse: Callable[[bytes], Any]
    writer: Callable[[Envelope, Any, Model, Sequence[Prompt]], Writer]
    id_prefix: str
    render: Callable[[Model, Any, Config], Sequence[Prompt]] = render_chat
    resume: Callable[[Service, Exchange, Any], Any] | None = None
    ended: Callable[[Service, Exchange, str, Any, Any], None] | None = None

    def handle(self, service: Service, exchange: Exchange, body: bytes) -> None:
        """Answer a request; an `endpoint.Handler`. Raises APIError where there is no model yet."""
        in_task(service, exchange, partial(_generate, service, self, exchange, body))


def in_task(service: Service, exchange: Exchange, work: Callable[[], Any]) -> None:
    """Await `work` in a task, as it waits for threads. Raises APIError 503 without a model."""
    service.need_model()
    exchange.is_kept = True

    async def task() -> None:
        try:
            await work()
        except APIError as error:
            exchange.fail(error)
        finally:
            exchange.release(is_read=True)

    service.spawn(task(), lambda _: exchange.abandon(our_fault()))


def context_exceeded(num_prompt: int, context_size: int, param: str = "messages") -> APIError:
    """The form that the launching app, llama-server's clients and LiteLLM each recognise."""
    message = (
        f"the request exceeds the available context size. This model's maximum context length is "
        f"{context_size} tokens, and the prompt has {num_prompt}; the answer needs at least one."
    )
    extra = {"n_prompt_tokens": num_prompt, "n_ctx": context_size}
    return APIError(Cause.CONTEXT_EXCEEDED, message, param=param, extra=extra)


async def _generate(service: Service, dialect: Dialect, exchange: Exchange, body: bytes) -> None:
    """Parse, render, and hand the sequences to the engine. Raises APIError."""
    ready = service.need_model()
    request, prompts = await _prepare(service, dialect, exchange, ready.model, body)
    if exchange.is_lost or exchange.is_answered:
        return
    service.need_model()  # the phase may have changed while the prompt was rendered
    service.note_ignored(exchange, request.ignored)
    service.check_model(request.model)
    _start(service, dialect, exchange, ready, request, prompts)


async def _prepare(
    service: Service, dialect: Dialect, exchange: Exchange, model: Model, body: bytes
) -> tuple[Any, list[Prompt]]:
    config, tenant = service.config, service.tenant(exchange)

    def parse(body: bytes) -> Any:
        request = dialect.parse(body)
        return request if dialect.resume is None else dialect.resume(service, exchange, request)

    def render(request: Any) -> list[Prompt]:
        prompts = dialect.render(model, request, config)
        return [complete(model, prompt, request, tenant, config) for prompt in prompts]

    return await parse_and_render(service, body, parse, render)


async def parse_and_render(
    service: Service, body: bytes, parse: Callable[[bytes], R], render: Callable[[R], T]
) -> tuple[R, T]:
    """A body's request and what is rendered of it, by the threads for that. Raises APIError.

    Images may have to be fetched: a request that has some is parsed among the short ones, and
    rendered in a thread that may take long.
    """

    def work() -> tuple[R, T | None]:
        request = parse(body)
        return request, None if request.sources else render(request)

    request, rendered = await service.in_thread(len(body), work)
    if rendered is None:
        rendered = await service.in_thread(len(body), render, request, has_images=True)
    return request, rendered


def _start(
    service: Service,
    dialect: Dialect,
    exchange: Exchange,
    ready: Ready,
    request: Any,
    prompts: Sequence[Prompt],
) -> None:
    model, sequences = ready.model, _sequences(service, ready, request, prompts)
    id = dialect.id_prefix + secrets.token_hex(12)
    envelope = Envelope(id, int(time()), model.id, f"fp_{model.fingerprint}")
    writer = dialect.writer(envelope, request, model, prompts)
    answer = Answer(
        exchange,
        writer,
        num_choices=len(sequences),
        num_per_prompt=request.num_choices,
        is_stream=request.is_stream,
    )
    is_chat = isinstance(request, ChatRequest)
    make_parser = output_parser(model, request, prompts[0]) if is_chat else None
    generations = [
        Generation(
            sequence,
            detokenize=model.detokenize,
            write=answer.choice(i),
            finish=partial(ready.engine.finish, sequence.id),
            stop=request.stop,
            parser=make_parser() if make_parser is not None else None,
            guard=service.config.repetition_guard,
        )
        for i, sequence in enumerate(sequences)
    ]
    try:
        ready.engine.add(sequences, generations)
    except QueueFull:
        message = "the request queue is full; try again later"
        raise later(Cause.QUEUE_FULL, message, retry_after_s=1) from None
    except EngineFailed as error:
        raise later(Cause.UNAVAILABLE, str(error), retry_after_s=30) from None
    service.running[exchange] = Running(id, tuple(sequence.id for sequence in sequences))

    def ended() -> None:
        """A choice that still runs is not wanted any more."""
        service.cancel(service.running.pop(exchange))
        if dialect.ended is not None:
            dialect.ended(service, exchange, id, request, writer)

    exchange.on_end = ended
    answer.start()


def _sequences(
    service: Service, ready: Ready, request: Request, prompts: Sequence[Prompt]
) -> list[EngineSequence]:
    """One sequence for each choice of each prompt. Raises APIError."""
    model, size, config = ready.model, ready.card.context_size, service.config
    if request.num_choices * len(prompts) > config.max_queue:
        raise bad(f"at most {config.max_queue} choices on this server", "n")
    sampling = request.sampling_params(model.defaults, secrets.randbits(64))
    for id, _ in sampling.logit_bias:
        if id >= model.num_vocab:
            raise bad(f"the model has no token {id}", "logit_bias")
    eos_tokens = frozenset(request.stop_tokens)
    sequences: list[EngineSequence] = []
    for prompt in prompts:
        num_left = size - len(prompt.tokens)
        if num_left < 1:
            raise context_exceeded(len(prompt.tokens), size, request.prompt_field)
        wanted = request.max_tokens or config.max_tokens or num_left
        first = service.num_sequences + 1
        sequences += [
            EngineSequence(
                id=first + i,
                prompt=prompt,
                sampling=replace(sampling, seed=(sampling.seed + i) % 2**64),
                max_tokens=min(wanted, num_left),
                eos_tokens=eos_tokens if request.ignore_eos else eos_tokens | model.eos_tokens,
                priority=request.priority,
                wants_progress=request.is_stream and request.return_progress and i == 0,
                wants_usage=request.stream_options.has_extras,
            )
            for i in range(request.num_choices)
        ]
        service.num_sequences += request.num_choices
    return sequences


class Answer:
    """Writes the events of one request's generations to its exchange: as frames, or as one body."""

    def __init__(
        self,
        exchange: Exchange,
        writer: Writer,
        *,
        num_choices: int,
        num_per_prompt: int,
        is_stream: bool,
    ) -> None:
        self._exchange = exchange
        self._writer = writer
        self._is_stream = is_stream
        self._num_per_prompt = num_per_prompt
        self._choices = [Collected() for _ in range(num_choices)]
        self._num_left = num_choices

    def start(self) -> None:
        """A stream's head leaves at once: the client knows that it is in the queue."""
        if self._is_stream:
            self._exchange.start_stream()
            self._exchange.write(self._writer.begin())

    def choice(self, index: int) -> Callable[[Event], None]:
        """The receiver of one generation's events."""
        return partial(self._take, index)

    def _take(self, index: int, event: Event) -> None:
        if self._exchange.is_ended:  # another choice has failed, and this one is on its way out
            return
        if isinstance(event, Done):
            self._choices[index].take(event)
            self._num_left -= 1
            self._log(event)
            self._done(index, event)
        elif self._is_stream:
            self._exchange.write(self._writer.event(index, event))
        else:
            self._choices[index].take(event)

    def _done(self, index: int, done: Done) -> None:
        """One choice has ended; with the last one, or the first that failed, the answer does."""
        has_failed = done.reason is FinishReason.ERROR
        total = None
        if self._num_left == 0:
            dones = [choice.done for choice in self._choices if choice.done is not None]
            total = total_usage(dones, self._num_per_prompt)
        try:
            self._write_end(index, done, total, has_failed=has_failed)
        except Exception:
            if has_failed:  # not even the error could be written
                self._exchange.abandon(failure(done))
                self._exchange.end()
            raise
        if has_failed or total is not None:
            if self._is_stream:
                self._exchange.end_stream()
            self._exchange.end()

    def _write_end(self, index: int, done: Done, total: Usage | None, *, has_failed: bool) -> None:
        """The end of a choice; `total` is there with the last one."""
        if self._is_stream and has_failed:
            self._exchange.write(self._writer.fail(failure(done)))
        elif self._is_stream:
            self._exchange.write(self._writer.done(index, done, total))
        elif has_failed:
            self._exchange.fail(failure(done))
        elif total is not None:
            self._exchange.respond(200, self._writer.whole(self._choices, total))

    def _log(self, done: Done) -> None:
        usage = done.usage
        log.info(
            "%s in %d (+%d cached) queue %.2fs ttft %.2fs out %d itl %.0fms %s",
            self._exchange.request_id,
            usage.num_prompt - usage.num_cached,
            usage.num_cached,
            usage.queue_s,
            usage.queue_s + usage.prefill_s,
            usage.num_output,
            usage.decode_s * 1000 / max(1, usage.num_output - 1),
            done.reason.value,
        )


def failure(done: Done) -> APIError:
    """A sequence that ended with an error, as an error answer."""
    return APIError(Cause.MODEL_FAILED, done.error or "the model failed")


def total_usage(dones: Sequence[Done], num_per_prompt: int | None = None) -> Usage:
    """One answer's usage: a prompt counts once, whatever the number of its choices (all)."""
    usages = [done.usage for done in dones]
    prompts = usages[:: num_per_prompt or len(usages)]
    return replace(
        usages[0],
        num_prompt=sum(usage.num_prompt for usage in prompts),
        num_cached=sum(usage.num_cached for usage in prompts),
        num_output=sum(usage.num_output for usage in usages),
        num_reasoning=sum(usage.num_reasoning for usage in usages),
        decode_s=max(usage.decode_s for usage in usages),
    )
