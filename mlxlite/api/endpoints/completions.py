"""Requests without a chat: completions, embeddings, tokenize, detokenize. Pure.

Each is a table of fields and a parser, as a chat is (`request`), and a way to answer: JSON bytes
out of dataclasses. A prompt is text or token ids; a request may hold several.
"""

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import orjson

from mlxlite.api.fields import (
    Field,
    Text,
    _texts,
    flag,
    integer,
    parse_object,
    read_fields,
    refused,
    works,
)
from mlxlite.api.render import _encode, cacheable
from mlxlite.api.request import FIELDS, Options, check_together, options_of
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
from mlxlite.http.errors import APIError, bad
from mlxlite.http.sse import SSE_DONE
from mlxlite.models.interface import Model
from mlxlite.output.events import Delta, Done, Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(Options):
    """A completion as asked for. The choices of prompt i are n·i to n·i + n - 1."""

    prompt_field: ClassVar[str] = "prompt"
    prompts: tuple[Text, ...]
    is_echo: bool = False


def prepare_completion(
    model: Model, body: bytes, tenant: bytes, config: Config
) -> tuple[CompletionRequest, list[Prompt], list[str]]:
    """A completion's prompts, and the text that each choice begins with."""
    request = parse_completion(body)
    prompts, echoes = [], []
    for text in request.prompts:
        tokens = _encode(model, text, "prompt")
        echo = ""
        if request.is_echo:
            echo = text if isinstance(text, str) else model.detokenize(tokens)
        prompts.append(cacheable(model, Prompt(tokens), request, tenant, config))
        echoes += [echo] * request.num_choices
    return request, prompts, echoes


MAX_COMPLETION_LOGPROBS = 20  # OpenAI's bound is 5, vLLM's 20
# --- completions ------------------------------------------------------------------------------

_NOT_IN_COMPLETIONS = frozenset(
    (
        *("messages", "chat_template_kwargs", "reasoning_effort", "continue_final_message"),
        *("add_generation_prompt", "top_logprobs", "tool_choice", "tools", "reasoning_format"),
        *("function_call", "functions", "modalities", "verbosity", "chat_template"),
        "parallel_tool_calls",
    )
)
COMPLETION_FIELDS: Final[Mapping[str, Field]] = {
    "prompt": works(_texts, "a string, token ids, or up to 256 of either"),
    **{name: entry for name, entry in FIELDS.items() if name not in _NOT_IN_COMPLETIONS},
    "logprobs": works(integer(0, MAX_COMPLETION_LOGPROBS), "how many rivals to report"),
    "echo": works(flag, "the prompt's text first; not together with `logprobs`"),
    "best_of": refused(1, note="only 1"),
    "suffix": refused("", note="no fill-in-the-middle"),
}


def parse_completion(body: bytes) -> CompletionRequest:
    """Validate a completion's body. Raises APIError 400 naming the field at fault."""
    value = parse_object(body)
    read = read_fields(value, COMPLETION_FIELDS)
    if "prompt" not in read:
        raise bad("'prompt' is required.", "prompt")
    check_together(read)
    if read.get("echo") and read.get("logprobs") is not None:
        raise bad("'echo' cannot have 'logprobs': those of a prompt are not computed.", "echo")
    return CompletionRequest(
        **options_of(value, read, COMPLETION_FIELDS),
        top_logprobs=read.get("logprobs"),
        prompts=read["prompt"],
        is_echo=read.get("echo", False),
    )


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
