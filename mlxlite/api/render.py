"""Requests to prompts: the part of a request that costs time and needs no event loop. Pure.

Renders through the model's template or tokenizer, compiles what the answer must match, and cuts the
prompt into blocks for the prefix cache, which decides whose prefixes a request may share. Raises
APIError for all that is the client's mistake; holds nothing.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mlxlite import wanted
from mlxlite.api.content_parts import BAD_IMAGE, IMAGE_OMITTED, TEXT_ONLY, TOO_MANY, image_errors
from mlxlite.api.conversation import Message
from mlxlite.api.left_out import leave_out
from mlxlite.api.readers import MAX_VALUES, Text
from mlxlite.api.request import ChatRequest, R, Request
from mlxlite.config.options import Config
from mlxlite.engine.sequence import Grammar, Prompt
from mlxlite.http.errors import APIError, ErrorKind, bad_request, not_supported
from mlxlite.models.interface import Model, PromptError, PromptTooLong
from mlxlite.output.constraint import CallConstraint, ConstraintError
from mlxlite.output.parser import OutputParser, ParserOptions
from mlxlite.prefix_cache.hashing import blocks_of
from mlxlite.vision.fetch import Limits
from mlxlite.vision.images import ImageError, LoadedImage


def render_chat(model: Model, request: ChatRequest, config: Config) -> list[Prompt]:
    """A chat's one prompt; loads its images, which may take long. Raises APIError."""
    turns, pictures = _pictures(model, request, config)
    messages: list[Mapping[str, Any]] = [
        model.output_format.prepare(message.as_template()) for message in turns
    ]
    arguments = _with_tools(model, request)
    more = {"pictures": pictures} if pictures else {}
    is_continuation = request.is_continuation
    try:
        return [model.render(messages, arguments, is_continuation=is_continuation, **more)]
    except PromptError as error:
        raise prompt_error(model, error, request.prompt_field) from error
    except ImageError as error:  # also of one that is decoded only now
        raise bad_request(f"{BAD_IMAGE}: {error}", error.param or request.prompt_field) from error


def _pictures(
    model: Model, request: ChatRequest, config: Config
) -> tuple[tuple[Message, ...], tuple[LoadedImage, ...]]:
    """The messages with what stands for the pictures that cannot be used, and the others, loaded.

    Only a picture that the user asks about is a demand.
    """
    if not (sources := request.sources):
        return request.messages, ()
    asked = {id(source) for source in request.asked_sources}
    history = [source for source in sources if id(source) not in asked]
    if (reason := model.vision_unavailable_reason) is not None:
        if asked:
            raise not_supported(f"{BAD_IMAGE}: {reason}", request.asked_sources[0].param)
        stand_ins = dict.fromkeys(map(id, history), TEXT_ONLY)
    else:
        surplus = history[: max(0, len(sources) - config.max_images)]
        stand_ins = dict.fromkeys(map(id, surplus), TOO_MANY)
    seen = [source for source in sources if id(source) not in stand_ins]
    loaded: Sequence[LoadedImage | None] = ()
    if seen:
        with image_errors():
            loaded = model.load_images(seen, _limits(config), lambda source: id(source) in asked)
    lost = (id(source) for source, image in zip(seen, loaded, strict=True) if image is None)
    stand_ins |= dict.fromkeys(lost, IMAGE_OMITTED)
    for source in sources:
        if id(source) in stand_ins:
            leave_out(source.param)
    turns = tuple(message.without(stand_ins) for message in request.messages)
    return turns, tuple(image for image in loaded if image is not None)


def _limits(config: Config) -> Limits:
    return Limits(
        max_images=config.max_images,
        max_pixels=config.max_image_pixels,
        max_bytes=config.max_image_mb << 20,
        allow_remote=config.allow_remote_images,
    )


def _with_tools(model: Model, request: ChatRequest) -> Mapping[str, Any]:
    if not request.tools:
        return request.template_kwargs
    if not model.output_format.can_call_tools:
        message = "this model's template has no format for tools that this server knows"
        raise not_supported(message, "tools")
    return {**request.template_kwargs, "tools": [tool.as_template() for tool in request.tools]}


def output_parser(model: Model, request: ChatRequest, prompt: Prompt) -> Callable[[], OutputParser]:
    """The factory of the parsers of a chat's answers."""
    tools = [tool.as_template() for tool in request.tools]
    constraint, _ = request.constraint or (None, "")
    options = ParserOptions(
        starts_in_reasoning=prompt.starts_in_reasoning,
        splits_reasoning=request.splits_reasoning,
        schemas={tool.name: tool.parameters for tool in request.tools} or None,
        parse_calls=partial(model.parse_calls, tools=tools),
        max_calls=request.max_calls,
        is_strict=isinstance(constraint, CallConstraint) and bool(constraint.strict),
    )
    return partial(model.output_format.parser, options)


def complete(
    model: Model, prompt: Prompt, request: Request, tenant: bytes, config: Config
) -> Prompt:
    """A prompt with the grammar of its answer, and with blocks unless the cache is not to be used.

    Raises APIError for a constraint that cannot be enforced.
    """
    prompt = _cut(prompt, request, model.context_size)
    grammar, blocks = _grammar(model, prompt, request), None
    if config.enable_prefix_caching and request.cache_prompt:
        scope = _cache_scope(model, tenant, request.cache_salt, config)
        blocks = blocks_of(
            prompt.cache_tokens(), scope, config.kv_block_size, prompt.message_starts
        )
    return replace(prompt, grammar=grammar, blocks=blocks)


def _grammar(model: Model, prompt: Prompt, request: Request) -> Grammar | None:
    """The grammar of an answer; names what it does not enforce. Raises APIError."""
    constraint, param = request.constraint or (None, "thinking_budget")
    budget, is_thinking = request.thinking_budget, prompt.starts_in_reasoning
    if isinstance(constraint, CallConstraint) and constraint.strict:
        try:
            model.compile(constraint, is_thinking=is_thinking, budget=budget)
        except ConstraintError:  # the client loses nothing that it cannot check
            for name in constraint.strict:
                leave_out(name)
            constraint = constraint.unenforced()
    if constraint is None and budget is None:
        return None
    try:
        grammar = model.compile(constraint, is_thinking=is_thinking, budget=budget)
    except ConstraintError as error:
        raise bad_request(f"'{param}': {error}", param) from error
    for name in grammar.left_out:
        leave_out(name)
    return grammar


def last_tokens(tokens: tuple[int, ...], num: int | None, context_size: int) -> tuple[int, ...]:
    """The last `num` tokens, None for all; -1 leaves room for one more in the context."""
    num = context_size - 1 if num == -1 else num
    return tokens if num is None else tokens[max(0, len(tokens) - num) :]


def _cut(prompt: Prompt, request: Request, context_size: int) -> Prompt:
    tokens = last_tokens(prompt.tokens, request.num_last, context_size)
    if len(tokens) == len(prompt.tokens):
        return prompt
    if prompt.images:
        message = "'truncate_prompt_tokens': a prompt with images is not cut."
        raise bad_request(message, "truncate_prompt_tokens")
    return replace(prompt, tokens=tokens, message_starts=())


def with_bad_words(model: Model, request: R) -> R:
    """A request with its bad words as tokens, with a space before them and without, as vLLM."""
    if not (texts := request.sampling.get("bad_words")):
        return request
    found: dict[tuple[int, ...], None] = {}
    try:
        for word in texts:
            bare, spaced = (
                model.encode(space + word.lstrip(), add_special=False) for space in ("", " ")
            )
            found[bare] = None
            if len(spaced) == len(bare) and spaced[:1] != bare[:1]:
                found[spaced] = None
    except PromptError as error:
        raise prompt_error(model, error, "bad_words") from error
    words = tuple(word for word in found if word)
    return replace(request, sampling={**request.sampling, "bad_words": words})


def encode(model: Model, texts: Sequence[Text], param: str) -> list[tuple[int, ...]]:
    """Token ids of texts, with the tokenizer's special tokens. Raises APIError."""
    encoded: list[tuple[int, ...]] = []
    num_left = MAX_VALUES  # as many as a body may hold as ids
    for text in texts:
        wanted.check()
        encoded.append(_encode(model, text, param))
        num_left -= len(encoded[-1])
        if num_left < 0 and len(encoded) > 1:
            raise bad_request(f"'{param}' has more than {MAX_VALUES} tokens in all", param)
    return encoded


def _encode(model: Model, text: Text, param: str) -> tuple[int, ...]:
    if not isinstance(text, str):
        for token in text:
            if token >= model.num_vocab:
                raise bad_request(f"the model has no token {token}", param)
        return text
    try:
        tokens = model.encode(text, add_special=True)
    except PromptError as error:
        raise prompt_error(model, error, param) from error
    if not tokens:
        raise bad_request(f"'{param}' has no tokens", param)
    return tokens


def prompt_error(model: Model, error: PromptError, param: str) -> APIError:
    if isinstance(error, PromptTooLong):
        return context_exceeded(error.num_tokens, model.context_size, param, is_least=True)
    return bad_request(str(error), param)


def context_exceeded(
    num_prompt: int, context_size: int, param: str = "messages", *, is_least: bool = False
) -> APIError:
    """The error in the form that llama-server's clients and LiteLLM each recognise."""
    message = (
        f"the request exceeds the available context size. This model's maximum context length is "
        f"{context_size} tokens, and the prompt has {'at least ' * is_least}{num_prompt}; the "
        "answer needs at least one."
    )
    extra = {"n_prompt_tokens": num_prompt, "n_ctx": context_size}
    return APIError(ErrorKind.CONTEXT_EXCEEDED, message, param=param, extra=extra)


def _cache_scope(model: Model, tenant: bytes, salt: str, config: Config) -> int:
    """64 bits that only equal keys and values share: the model's, its cache's, the tenant's.

    A cryptographic hash, so that no request can choose a salt that leads into another's scope.
    """
    digest = hashlib.blake2b(digest_size=8)
    kept = f"{model.fingerprint} {config.kv_bits} {config.kv_group_size}"
    for part in (kept.encode(), tenant, salt.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little")
