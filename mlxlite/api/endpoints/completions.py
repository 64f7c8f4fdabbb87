"""POST /v1/completions: OpenAI's text completion, of one or several prompts."""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import orjson

from mlxlite.api.constraints import CONSTRAINT_FIELDS, take_constraints
from mlxlite.api.endpoint import Endpoint
from mlxlite.api.fields import Field, read_fields, supported, unsupported
from mlxlite.api.generate import Dialect
from mlxlite.api.readers import Text, flag, integer, parse_object, texts
from mlxlite.api.render import encode
from mlxlite.api.request import (
    COMPLETION_FIELDS,
    UNSUPPORTED_FIELDS,
    Request,
    shared_options,
    sole_constraint,
)
from mlxlite.api.service import Service
from mlxlite.api.writers import (
    MIN_LOGPROB,
    Choice,
    Envelope,
    StreamOptions,
    TokenBytes,
    finish_reason,
    frame,
    stream_failure,
    timings_json,
    usage_json,
)
from mlxlite.config.options import Config
from mlxlite.engine.sequence import Logprobs, Prompt, Usage
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import APIError, bad
from mlxlite.http.sse import SSE_DONE
from mlxlite.models.interface import Model
from mlxlite.output.events import Delta, Done, Progress

MAX_COMPLETION_LOGPROBS = 20  # OpenAI's bound is 5, vLLM's 20

FIELDS: Final[Mapping[str, Field]] = {
    "prompt": supported(texts, "a string, token ids, or up to 256 of either"),
    **COMPLETION_FIELDS,
    **CONSTRAINT_FIELDS,
    "logprobs": supported(integer(0, MAX_COMPLETION_LOGPROBS), "how many rivals to report"),
    "echo": supported(flag, "the prompt's text first; not together with `logprobs`"),
    "best_of": unsupported(1, note="only 1"),
    "suffix": unsupported("", note="no fill-in-the-middle"),
    **UNSUPPORTED_FIELDS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(Request):
    """A completion as asked for. The choices of prompt i are n·i to n·i + n - 1.

    `echoes` are the texts that the choices begin with, one for each prompt.
    """

    prompt_field: ClassVar[str] = "prompt"
    prompts: tuple[Text, ...]
    is_echo: bool = False
    echoes: tuple[str, ...] = ()


def parse_completion(body: bytes) -> CompletionRequest:
    """Validate a completion's body. Raises APIError 400 naming the field at fault."""
    given = read_fields(parse_object(body), FIELDS, "prompt")
    options = shared_options(given)
    is_echo, num_logprobs = given.take("echo", False), given.take("logprobs")
    if is_echo and num_logprobs is not None:
        raise bad("'echo' cannot have 'logprobs': those of a prompt are not computed.", "echo")
    if num_logprobs is not None:
        options["sampling"]["top_logprobs"] = num_logprobs
    request = CompletionRequest(
        **options,
        constraint=sole_constraint(options, take_constraints(given)),
        prompts=given.take("prompt"),
        is_echo=is_echo,
    )
    given.close()
    return request


def _with_echoes(
    service: Service, _exchange: Exchange, request: CompletionRequest
) -> CompletionRequest:
    model = service.need_model().model
    if not request.is_echo:
        return replace(request, echoes=("",) * len(request.prompts))
    echoes = (
        text if isinstance(text, str) else model.detokenize(encode(model, text, "prompt"))
        for text in request.prompts
    )
    return replace(request, echoes=tuple(echoes))


def _render(model: Model, request: CompletionRequest, _config: Config) -> list[Prompt]:
    return [Prompt(encode(model, text, "prompt")) for text in request.prompts]


class CompletionWriter:
    """A text completion, streamed or whole; `echoes` is the text that each choice begins with."""

    def __init__(
        self,
        envelope: Envelope,
        token_bytes: TokenBytes,
        options: StreamOptions,
        *,
        echoes: Sequence[str],
    ) -> None:
        self._envelope = envelope
        self._token_bytes = token_bytes
        self._options = options
        self._echoes = echoes
        # Where the next token's text begins; a decoder holds what is half a character so far.
        self._num_chars = [len(echo) for echo in echoes]
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in echoes]

    def _chunk(self, index: int, written: str, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "text": written, "logprobs": None, "finish_reason": reason}
        chunk = self._envelope.as_json("text_completion") | {"choices": [choice]}
        return chunk | {"usage": None} if self._options.include_usage else chunk

    def begin(self) -> bytes:
        chunks = (self._chunk(i, echo) for i, echo in enumerate(self._echoes) if echo)
        return b"".join(map(frame, chunks))

    def delta(self, index: int, delta: Delta) -> bytes:
        chunk = self._chunk(index, delta.text)
        if delta.logprobs:
            chunk["choices"][0]["logprobs"] = self._logprobs(index, delta.logprobs)
        if delta.usage is not None and self._options.continuous_usage:
            chunk["usage"] = usage_json(delta.usage)
        if delta.usage is not None and self._options.timings_per_token:
            chunk["timings"] = timings_json(delta.usage)
        return frame(chunk)

    def _logprobs(
        self, index: int, logprobs: Sequence[tuple[int, Logprobs]]
    ) -> dict[str, list[Any]]:
        """The legacy form: parallel lists, and each token's place in the text."""
        offsets = []
        for token, _ in logprobs:
            offsets.append(self._num_chars[index])
            self._num_chars[index] += len(self._decoders[index].decode(self._token_bytes(token)))
        return {
            "tokens": [self._spell(token) for token, _ in logprobs],
            "token_logprobs": [max(item.drawn, MIN_LOGPROB) for _, item in logprobs],
            "top_logprobs": [
                {self._spell(token): max(value, MIN_LOGPROB) for token, value in item.top}
                for _, item in logprobs
            ],
            "text_offset": offsets,
        }

    def _spell(self, token: int) -> str:
        return self._token_bytes(token).decode("utf-8", "replace")

    def progress(self, index: int, progress: Progress) -> bytes:
        chunk = self._chunk(index, "")
        usage = progress.usage
        chunk["prompt_progress"] = {
            "total": usage.num_prompt,
            "cache": usage.num_cached,
            "processed": progress.num_computed,
            "time_ms": round(usage.prefill_s * 1000, 3),
        }
        return frame(chunk)

    def done(self, index: int, done: Done, total: Usage | None) -> bytes:
        chunk = self._chunk(index, "", finish_reason(done))
        if total is None:
            return frame(chunk)
        chunk["timings"] = timings_json(total)
        if not self._options.include_usage:
            chunk["usage"] = usage_json(total)
            return frame(chunk) + SSE_DONE
        last = self._envelope.as_json("text_completion") | {"choices": []}
        return frame(chunk) + frame(last | {"usage": usage_json(total)}) + SSE_DONE

    def fail(self, error: APIError) -> bytes:
        return stream_failure(error)

    def whole(self, choices: Sequence[Choice], total: Usage) -> bytes:
        answer = self._envelope.as_json("text_completion")
        answer["choices"] = [
            {
                "index": i,
                "text": self._echoes[i] + "".join(choice.texts),
                "logprobs": self._logprobs(i, choice.drawn) if choice.drawn else None,
                "finish_reason": finish_reason(choice.done),
            }
            for i, choice in enumerate(choices)
        ]
        answer |= {"usage": usage_json(total), "timings": timings_json(total)}
        return orjson.dumps(answer)


def _writer(
    envelope: Envelope, request: CompletionRequest, model: Model, _prompts: Sequence[Prompt]
) -> CompletionWriter:
    echoes = [echo for echo in request.echoes for _ in range(request.num_choices)]
    return CompletionWriter(envelope, model.token_bytes, request.stream_options, echoes=echoes)


ENDPOINTS: Final = (
    Endpoint(
        method="POST",
        path="/v1/completions",
        summary="A text completion",
        fields=FIELDS,
        required=("prompt",),
        answer_schema="Completion",
        handle=Dialect(
            parse=parse_completion,
            writer=_writer,
            id_prefix="cmpl-",
            render=_render,
            resume=_with_echoes,
        ).handle,
    ),
)
