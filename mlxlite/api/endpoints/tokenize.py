"""POST /tokenize and /detokenize: text to token ids and back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from mlxlite.api.conversation import Message
from mlxlite.api.fields import (
    Field,
    _ignored,
    _token_ids,
    flag,
    parse_object,
    read_fields,
    refused,
    text,
    works,
    wrong,
)
from mlxlite.api.openai_content import messages_of
from mlxlite.api.render import render
from mlxlite.api.request import FIELDS, ChatRequest
from mlxlite.api.writers import TokenBytes
from mlxlite.config.options import Config
from mlxlite.http.errors import bad
from mlxlite.models.interface import Model, PromptError

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


def _ids(value: Any, param: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise wrong(param, "an array of token ids", value)
    return _token_ids(value, param)


DETOKENIZE_FIELDS: Final[Mapping[str, Field]] = {
    "model": FIELDS["model"],
    "tokens": works(lambda value, param: _ids(value, param), "token ids"),
}


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


def prepare_tokens(
    model: Model, body: bytes, config: Config, *, is_patient: bool = False
) -> tuple[TokenizeRequest, tuple[int, ...]]:
    request = parse_tokenize(body)
    if request.content is None:
        chat = ChatRequest(
            messages=request.messages,
            template_kwargs=request.template_kwargs,
            continue_final=True if request.is_open else None,
        )
        return request, render(model, chat, config, is_patient=is_patient).tokens
    try:
        return request, model.encode(request.content, add_special=request.add_special)
    except PromptError as error:
        raise bad(str(error), "content") from error


def prepare_detokenized(model: Model, body: bytes) -> tuple[DetokenizeRequest, str]:
    request = parse_detokenize(body)
    for token in request.tokens:
        if token >= model.num_vocab:
            raise bad(f"the model has no token {token}", "tokens")
    return request, model.detokenize(request.tokens)
