"""Requests without a chat: completions, embeddings, tokenize, detokenize. Pure.

Each is a table of fields and a parser, as a chat is (`request`), and a way to answer: JSON bytes
out of dataclasses. A prompt is text or token ids; a request may hold several.
"""

import base64
import codecs
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import orjson

from mlxlite.api import (
    MIN_LOGPROB,
    APIError,
    Choice,
    Envelope,
    StreamOptions,
    TokenBytes,
    bad,
    finish_reason,
    frame,
    stream_failure,
    timings_json,
    usage_json,
)
from mlxlite.fields import (
    Field,
    accepted,
    flag,
    integer,
    parse_object,
    read_fields,
    refused,
    text,
    works,
    wrong,
)
from mlxlite.http1 import SSE_DONE
from mlxlite.messages import Message, messages_of
from mlxlite.request import FIELDS, Options, check_together, options_of
from mlxlite.sequence import Delta, Done, Logprobs, Progress, Usage

MAX_PROMPTS = 256  # in one request
MAX_COMPLETION_LOGPROBS = 20  # OpenAI's bound is 5, vLLM's 20

Text = str | tuple[int, ...]  # a prompt, or its token ids


def _token_ids(value: list[Any], param: str) -> tuple[int, ...]:
    read = integer(0, 2**31 - 1)
    return tuple(read(item, f"{param}[{i}]") for i, item in enumerate(value))


def _one_text(value: Any, param: str) -> Text:
    if isinstance(value, list):
        value = _token_ids(value, param)
    elif not isinstance(value, str):
        raise wrong(param, "a string or an array of token ids", value)
    if not value:
        raise bad(f"'{param}' must not be empty.", param)
    return value if isinstance(value, tuple) else str(value)


def _texts(value: Any, param: str) -> tuple[Text, ...]:
    """A string, token ids, or an array of either."""
    is_one = isinstance(value, str) or (
        isinstance(value, list) and bool(value) and not isinstance(value[0], str | list)
    )
    if is_one:
        return (_one_text(value, param),)
    if not isinstance(value, list):
        raise wrong(param, "a string or an array", value)
    if not 0 < len(value) <= MAX_PROMPTS:
        raise bad(f"'{param}' must hold 1 to {MAX_PROMPTS} items, not {len(value)}.", param)
    return tuple(_one_text(item, f"{param}[{i}]") for i, item in enumerate(value))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(Options):
    """A completion as asked for. The choices of prompt i are n·i to n·i + n - 1."""

    prompt_field: ClassVar[str] = "prompt"
    prompts: tuple[Text, ...]
    is_echo: bool = False


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


# --- embeddings -------------------------------------------------------------------------------


def _encoding(value: Any, param: str) -> str:
    if value not in ("float", "base64"):
        raise bad(f"'{param}' must be 'float' or 'base64'.", param)
    return str(value)


def _pooling(value: Any, param: str) -> str:
    if value not in ("last", "mean"):
        raise bad(f"'{param}' must be 'last' or 'mean'.", param)
    return str(value)


EMBEDDING_FIELDS: Final[Mapping[str, Field]] = {
    "model": FIELDS["model"],
    "input": works(_texts, "a string, token ids, or up to 256 of either"),
    "encoding_format": works(_encoding, "`float` (default) or `base64`"),
    "dimensions": works(integer(1, 2**20), "the first so many, normalised again"),
    "pooling": works(_pooling, "`last` (default): the last token's state; `mean`: of all tokens"),
    "user": accepted(text),
}


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """Texts to turn into vectors of length 1."""

    inputs: tuple[Text, ...]
    is_base64: bool
    dimensions: int | None
    is_mean: bool
    ignored: tuple[str, ...]


def parse_embedding(body: bytes) -> EmbeddingRequest:
    """Raises APIError 400 naming the field at fault."""
    value = parse_object(body)
    read = read_fields(value, EMBEDDING_FIELDS)
    if "input" not in read:
        raise bad("'input' is required.", "input")
    return EmbeddingRequest(
        read["input"],
        read.get("encoding_format") == "base64",
        read.get("dimensions"),
        read.get("pooling") == "mean",
        _ignored(value, EMBEDDING_FIELDS),
    )


def _ignored(value: Mapping[str, Any], table: Mapping[str, Field]) -> tuple[str, ...]:
    return tuple(sorted(name for name in value if name not in table))


def embeddings(
    request: EmbeddingRequest, vectors: Sequence[Sequence[float]], model: str, num_tokens: int
) -> bytes:
    """OpenAI's list; base64 is of little-endian float32. Raises APIError."""
    size = min(map(len, vectors))
    if request.dimensions is not None and request.dimensions > size:
        raise bad(f"this model's vectors have {size} dimensions", "dimensions")

    def encode(vector: Sequence[float]) -> Any:
        if request.dimensions is not None:
            vector = vector[: request.dimensions]
            norm = math.hypot(*vector) or 1.0
            vector = [value / norm for value in vector]
        if not request.is_base64:
            return vector
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

    data = [
        {"object": "embedding", "index": i, "embedding": encode(vector)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return orjson.dumps({"object": "list", "data": data, "model": model, "usage": usage})


# --- tokenize ---------------------------------------------------------------------------------

TOKENIZE_FIELDS: Final[Mapping[str, Field]] = {
    "model": FIELDS["model"],
    "content": works(text, "text (llama-server's name)"),
    "prompt": works(text, "text (vLLM's name)", "content"),
    "messages": works(messages_of, "or a chat, as the model would read it"),
    "chat_template_kwargs": FIELDS["chat_template_kwargs"],
    "add_generation_prompt": works(flag, "after a chat; default true"),
    "add_special": works(flag, "special tokens around a text; default false"),
    "add_special_tokens": works(flag, "the same", "add_special"),
    "with_pieces": works(flag, "each token with its text"),
    "return_token_strs": works(flag, "the tokens' texts in `token_strs`"),
    "parse_special": refused(True, note="special tokens in a text are always read as such"),
}
DETOKENIZE_FIELDS: Final[Mapping[str, Field]] = {
    "model": FIELDS["model"],
    "tokens": works(lambda value, param: _ids(value, param), "token ids"),
}


def _ids(value: Any, param: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise wrong(param, "an array of token ids", value)
    return _token_ids(value, param)


@dataclass(frozen=True, slots=True)
class TokenizeRequest:
    """A text, or a chat, to turn into tokens."""

    content: str | None
    messages: tuple[Message, ...]
    template_kwargs: Mapping[str, Any]
    is_open: bool  # a chat does not end with the generation prompt
    add_special: bool
    with_pieces: bool
    with_strings: bool
    ignored: tuple[str, ...]


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Raises APIError 400 naming the field at fault."""
    value = parse_object(body)
    read = read_fields(value, TOKENIZE_FIELDS)
    if ("content" in read) == ("messages" in read):
        raise bad("one of 'content', 'prompt' and 'messages' is required.", "content")
    return TokenizeRequest(
        read.get("content"),
        read.get("messages", ()),
        read.get("chat_template_kwargs", {}),
        read.get("add_generation_prompt") is False,
        read.get("add_special", False),
        read.get("with_pieces", False),
        read.get("return_token_strs", False),
        _ignored(value, TOKENIZE_FIELDS),
    )


def tokenized(
    request: TokenizeRequest, tokens: Sequence[int], context_size: int, token_bytes: TokenBytes
) -> bytes:
    """llama-server's and vLLM's fields together."""

    def piece(token: int) -> Any:
        raw = token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return list(raw)

    ids: list[Any] = list(tokens)
    if request.with_pieces:
        ids = [{"id": token, "piece": piece(token)} for token in tokens]
    answer = {"tokens": ids, "count": len(tokens), "max_model_len": context_size}
    if request.with_strings:
        answer["token_strs"] = [token_bytes(t).decode("utf-8", "replace") for t in tokens]
    return orjson.dumps(answer)


@dataclass(frozen=True, slots=True)
class DetokenizeRequest:
    """Token ids to turn into text."""

    tokens: tuple[int, ...]
    ignored: tuple[str, ...]


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Raises APIError 400 naming the field at fault."""
    value = parse_object(body)
    read = read_fields(value, DETOKENIZE_FIELDS)
    if "tokens" not in read:
        raise bad("'tokens' is required.", "tokens")
    return DetokenizeRequest(read["tokens"], _ignored(value, DETOKENIZE_FIELDS))


def detokenized(written: str) -> bytes:
    return orjson.dumps({"content": written, "prompt": written})
