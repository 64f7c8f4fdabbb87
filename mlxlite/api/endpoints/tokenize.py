"""POST /tokenize and /detokenize: text or a chat to token ids, and token ids to text."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import orjson

from mlxlite.api.endpoint import Endpoint
from mlxlite.api.fields import Table, reading, required, supported, unsupported
from mlxlite.api.generate import check_strings, in_task, parse_and_render
from mlxlite.api.likelihoods import TokenBytes
from mlxlite.api.openai_content import messages_of
from mlxlite.api.readers import flag, parse_object, text, token_ids
from mlxlite.api.render import prompt_error, render_chat
from mlxlite.api.request import ChatRequest
from mlxlite.api.service import Service
from mlxlite.api.shared_fields import MODEL, TEMPLATE_FIELDS
from mlxlite.api.threads import Work
from mlxlite.config.options import Config
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import bad_request
from mlxlite.models.interface import Model, PromptError

TOKENIZE_FIELDS: Final[Table] = {
    "model": MODEL,
    "content": supported(text, "text (llama-server's name)"),
    "prompt": supported(text, "text (vLLM's name)", "content"),
    "messages": supported(messages_of, "or a chat, as the model would read it"),
    "chat_template_kwargs": TEMPLATE_FIELDS["chat_template_kwargs"],
    "add_generation_prompt": supported(flag, "after a chat; default true"),
    "add_special": supported(flag, "special tokens around a text; default false"),
    "add_special_tokens": supported(flag, "the same", "add_special"),
    "with_pieces": supported(flag, "each token with its text"),
    "return_token_strs": supported(flag, "the tokens' texts in `token_strs`"),
    "parse_special": unsupported(True, note="special tokens in a text are always read as such"),
}
DETOKENIZE_FIELDS: Final[Table] = {
    "model": MODEL,
    "tokens": required(token_ids, "token ids"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeRequest(ChatRequest):
    """A text to turn into tokens, or else a chat."""

    content: str | None
    add_special: bool
    with_pieces: bool
    with_strings: bool


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Raises APIError 400 naming the field at fault."""
    with reading(parse_object(body), TOKENIZE_FIELDS) as given:
        if ("content" in given) == ("messages" in given):
            raise bad_request("one of 'content', 'prompt' and 'messages' is required.", "content")
        return TokenizeRequest(
            model=given.take("model"),
            content=given.take("content"),
            messages=given.take("messages", ()),
            template_kwargs=given.take("chat_template_kwargs", {}),
            continue_final=True if given.take("add_generation_prompt") is False else None,
            add_special=given.take("add_special", False),
            with_pieces=given.take("with_pieces", False),
            with_strings=given.take("return_token_strs", False),
            ignored=given.ignored,
        )


def _tokens(model: Model, config: Config, request: TokenizeRequest) -> tuple[int, ...]:
    if request.content is None:
        return render_chat(model, request, config)[0].tokens
    try:
        return model.encode(request.content, add_special=request.add_special)
    except PromptError as error:
        raise prompt_error(model, error, "content") from error


def tokenized(
    request: TokenizeRequest, tokens: Sequence[int], context_size: int, token_bytes: TokenBytes
) -> bytes:
    """The fields of llama-server and of vLLM together."""

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

    model: str | None
    tokens: tuple[int, ...]
    ignored: tuple[str, ...]


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Raises APIError 400 naming the field at fault."""
    with reading(parse_object(body), DETOKENIZE_FIELDS) as given:
        return DetokenizeRequest(given.take("model"), given.take("tokens"), given.ignored)


def detokenized(text: str) -> bytes:
    return orjson.dumps({"content": text, "prompt": text})


def _detokenize(model: Model, body: bytes) -> tuple[DetokenizeRequest, str]:
    check_strings(model, body, "tokens")
    request = parse_detokenize(body)
    for token in request.tokens:
        if token >= model.num_vocab:
            raise bad_request(f"the model has no token {token}", "tokens")
    return request, model.detokenize(request.tokens)


async def _answer_tokens(service: Service, exchange: Exchange, body: bytes) -> None:
    ready = service.need_model()
    tokens_of = partial(_tokens, ready.model, service.config)
    request, tokens = await parse_and_render(
        service, exchange, body, parse_tokenize, tokens_of, "content"
    )
    service.note_ignored(exchange, request.ignored)
    work = partial(tokenized, request, tokens, ready.card.context_size, ready.model.token_bytes)
    exchange.respond(200, await service.in_thread(exchange, Work.of(len(body)), work))


async def _answer_text(service: Service, exchange: Exchange, body: bytes) -> None:
    model = service.need_model().model
    request, text = await service.in_thread(exchange, Work.of(len(body)), _detokenize, model, body)
    service.note_ignored(exchange, request.ignored)
    exchange.respond(200, detokenized(text))


ENDPOINTS: Final = (
    Endpoint("POST", "/tokenize", "A text's tokens", in_task(_answer_tokens), TOKENIZE_FIELDS),
    Endpoint("POST", "/detokenize", "Tokens' text", in_task(_answer_text), DETOKENIZE_FIELDS),
)
