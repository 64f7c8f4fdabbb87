"""POST /v1/responses, GET and DELETE of a stored one: OpenAI's Responses, parsed and written.

A request may continue a stored response by `previous_response_id`. The writer is a state machine
like that of Anthropic's Messages: items instead of blocks, of which at most one is open.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import orjson

from mlxlite.api import fields, readers, shared_fields
from mlxlite.api.constraints import CONSTRAINT_FIELDS, response_format, take_constraints
from mlxlite.api.content_parts import PARTS, content_of, parts_in
from mlxlite.api.conversation import (
    IMAGE_ROLES,
    Message,
    Role,
    ToolCall,
    asked_index,
    is_instruction,
    last_index,
    turn,
)
from mlxlite.api.endpoint import Endpoint
from mlxlite.api.fields import Kind, Use, required, supported, unsupported
from mlxlite.api.generate import Dialect
from mlxlite.api.left_out import leave_out
from mlxlite.api.openai_content import arguments_of, role_of
from mlxlite.api.readers import Members
from mlxlite.api.request import (
    ChatRequest,
    logprobs_option,
    shared_options,
    sole_constraint,
    template_kwargs,
)
from mlxlite.api.responses_writer import ResponsesWriter
from mlxlite.api.service import Service
from mlxlite.api.tools import (
    FREE_TEXT,
    READ_FREE_TEXT,
    READ_FUNCTION,
    VENDORS_ONLY,
    Tool,
    ToolUse,
    allowed_tools,
    array_of,
    merged,
    name_in,
    read_tool,
)
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import APIError, ErrorKind, bad_request, truncate

MAX_METADATA = 16  # pairs, OpenAI's bound


@dataclass(frozen=True, slots=True)
class Reference:
    """An item of an earlier answer, by its id."""

    id: str
    param: str


Piece = Message | Reference


@dataclass(frozen=True, slots=True)
class Input:
    """What the conversation goes on with, and the tools that it adds."""

    pieces: tuple[Piece, ...]
    tools: tuple[Tool, ...] = ()


def _input(value: Any, param: str) -> Input:
    if isinstance(value, str):
        return Input((Message(Role.USER, value),))
    answered, found = last_index(readers.array(value, param), _is_answer), list[Piece | Tool]()
    asked = asked_index(value, _is_answer, _is_result)
    for i, one in enumerate(value):
        try:
            found += _read_item(one, f"{param}[{i}]", is_last=i == asked)
        except APIError:
            if is_instruction(one) or (i > answered and _is_message(one)):
                raise
            leave_out(f"{param}[{i}]")
    pieces = tuple(one for one in found if not isinstance(one, Tool))
    if not pieces:
        raise bad_request(f"'{param}' must hold at least one message.", param)
    return Input(pieces, merged(one for one in found if isinstance(one, Tool)))


def _read_item(value: Any, param: str, *, is_last: bool) -> Iterable[Piece | Tool]:
    item = readers.members(value, param)
    kind = _ITEMS.get(type_ := item.text("type", "message"), _ITEMS["*"])
    if kind.read is not None:
        return list(kind.read(item, is_last=is_last))
    leave_out(param, truncate(type_))
    return ()


def _is_message(value: Any) -> bool:
    """Whether it is one, or nothing that has a type."""
    return not isinstance(value, dict) or value.get("type") in (None, "message")


def _is_answer(item: Mapping[str, Any]) -> bool:
    calls = ("function_call", "custom_tool_call", "reasoning")
    return item.get("role") == "assistant" or item.get("type") in calls


def _is_result(item: Mapping[str, Any]) -> bool:
    return str(item.get("type")).endswith("_call_output")


def _turns(pieces: Sequence[Piece], find: Callable[[str], Message | None]) -> tuple[Message, ...]:
    """The messages of a conversation. Raises APIError 404 for an item that is not stored."""
    turns: list[Message] = []
    for piece in pieces:
        if isinstance(piece, Message):
            _add(turns, piece)
        elif (found := find(piece.id)) is not None:
            _add(turns, found)
        else:
            message = f"there is no item {truncate(piece.id)!r} here (any more)"
            raise APIError(ErrorKind.NOT_FOUND, message, param=piece.param)
    return tuple(turns)


def _add(turns: list[Message], new: Message) -> None:
    """Reasoning, the content after it, and the calls after that are one turn, as in a chat."""
    last = turns[-1] if turns else new
    is_next = new.reasoning is None and (last.content is None or new.content is None)
    is_next = is_next and not (last.tool_calls and new.content is not None)
    if not turns or not last.role is new.role is Role.ASSISTANT or not is_next:
        turns.append(new)
        return
    content = last.content if new.content is None else new.content
    turns[-1] = replace(last, content=content, tool_calls=last.tool_calls + new.tool_calls)


def _message(item: Members, *, is_last: bool) -> Iterable[Message]:
    roles = (Role.USER, Role.ASSISTANT, Role.SYSTEM, Role.DEVELOPER)
    role = role_of(item.get("role"), item.path_of("role"), *roles)
    is_asked, thoughts = role.is_instruction or (role is Role.USER and is_last), list[str]()
    if is_asked and item.get("content") is None:
        raise bad_request(f"'{item.path}.content' is required.", item.path_of("content"))
    content = content_of(
        item.get("content"),
        item.path_of("content"),
        is_asked=is_asked,
        has_pictures=role in IMAGE_ROLES,
    )
    message = turn(role, parts_in(content, thoughts))
    return (replace(message, reasoning="\n".join(thoughts) or None),)


def _call(item: Members, *, is_last: bool) -> Iterable[Message]:
    name = name_in(item.text("namespace", ""), item.text("name"))
    call = ToolCall(item.text("call_id"), name, arguments_of(item.get("arguments")))
    return (Message(Role.ASSISTANT, None, tool_calls=(call,)),)


def _custom_call(item: Members, *, is_last: bool) -> Iterable[Message]:
    name = name_in(item.text("namespace", ""), item.text("name"))
    call = ToolCall(item.text("call_id"), name, {FREE_TEXT: item.text("input", "")})
    return (Message(Role.ASSISTANT, None, tool_calls=(call,)),)


def _call_output(item: Members, *, is_last: bool) -> Iterable[Message]:
    output = content_of(item.get("output"), item.path_of("output"), is_asked=False)
    return (turn(Role.TOOL, parts_in(output), tool_call_id=item.text("call_id")),)


def _reasoning(item: Members, *, is_last: bool) -> Iterable[Message]:
    """The reasoning, else its summary; the encrypted form is readable for OpenAI alone."""
    for name in ("content", "summary"):
        parts = content_of(item.get(name), item.path_of(name), is_asked=False)
        if text := "\n".join(part for part in parts if isinstance(part, str)):
            return (Message(Role.ASSISTANT, None, reasoning=text),)
    return ()


def _reference(item: Members, *, is_last: bool) -> Iterable[Reference]:
    return (Reference(item.text("id"), item.path),)


def _more_tools(item: Members, *, is_last: bool) -> Iterable[Tool]:
    tools: tuple[Tool, ...] = item.read("tools", _tool_list)
    return tools


def _namespace(group: Members) -> Iterable[Tool]:
    """Its functions; the first shows the description of them all."""
    name, about, path = group.text("name"), group.text("description", ""), group.path_of("tools")
    for i, item in enumerate(readers.array(group.get("tools"), path)):
        for tool in read_tool(_IN_NAMESPACE, readers.members(item, f"{path}[{i}]")):
            yield tool.in_namespace(name, about)
            about = ""


_IN_NAMESPACE: Final[fields.Kinds] = {
    "function": READ_FUNCTION,
    "custom": READ_FREE_TEXT,
    "*": VENDORS_ONLY,
}
TOOLS: Final[fields.Kinds] = {
    **_IN_NAMESPACE,
    "namespace": Kind(
        Use.SUPPORTED, "its tools, as `<namespace>__<name>` for the model", _namespace
    ),
    "*": VENDORS_ONLY,
}
_tool_list: Final = array_of(TOOLS, None)

_ITEMS: Final[fields.Kinds] = {
    "message": Kind(Use.SUPPORTED, "of every role; its `type` may be absent", _message),
    "function_call": Kind(Use.SUPPORTED, "a call of the assistant", _call),
    "function_call_output": Kind(Use.SUPPORTED, "text, pictures, or any JSON", _call_output),
    "custom_tool_call": Kind(Use.SUPPORTED, "a call with free text", _custom_call),
    "custom_tool_call_output": Kind(Use.SUPPORTED, "text, pictures, or any JSON", _call_output),
    "reasoning": Kind(Use.SUPPORTED, "its text or its summary", _reasoning),
    "item_reference": Kind(Use.SUPPORTED, "an item of a stored response; else 404", _reference),
    **dict.fromkeys(
        ("additional_tools", "tool_search_output"),
        Kind(Use.SUPPORTED, "its `tools` are added to those of the request", _more_tools),
    ),
    "*": Kind(Use.HISTORY, "left out and named"),
}
_LOGPROBS: Final = "message.output_text.logprobs"


def _include(value: Any, param: str) -> tuple[str, ...]:
    names = readers.array(value, param, " of strings")
    for i, name in enumerate(names):
        if readers.text(name, f"{param}[{i}]") not in (_LOGPROBS, "reasoning.encrypted_content"):
            leave_out(param, truncate(name))
    return tuple(names)


def _metadata(value: Any, param: str) -> dict[str, str]:
    pairs = readers.json_object(value, param)
    if len(pairs) > MAX_METADATA:
        raise bad_request(f"'{param}' may hold at most {MAX_METADATA} pairs.", param)
    return {name: readers.text(item, f"{param}.{truncate(name)}") for name, item in pairs.items()}


def _tool_choice(value: Any, param: str) -> Any:
    """What a vendor alone runs cannot be demanded."""
    if isinstance(value, str):
        return readers.one_of("none", "auto", "required")(value, param)
    choice = readers.members(value, param)
    match choice.text("type"):
        case "function" | "custom":
            return {"name": _chosen_name(choice)}
        case "allowed_tools":
            return allowed_tools(choice, _chosen_name)
    raise readers.unsupported_type(choice.text("type"), param)


def _chosen_name(choice: Members) -> str:
    return name_in(choice.text("namespace", ""), choice.text("name", "?"))


_read_format: Final = readers.nested(
    "type",
    type=readers.one_of("text", "json_object", "json_schema"),
    name=readers.text,
    description=readers.text,
    schema=readers.shallow,  # repeated even where the type does not use it
    strict=readers.flag,
)


def _format(value: Any, param: str) -> dict[str, Any]:
    wanted: dict[str, Any] = _read_format(value, param)
    if wanted["type"] == "json_schema":
        readers.need(wanted, param, "name", "schema")
    return wanted


_MAX_ECHO_DEPTH = readers.MAX_DEPTH + 10  # of a schema, in a tool, in a namespace
FIELDS: Final[fields.Table] = {
    **shared_fields.GENERATION_FIELDS,
    **shared_fields.TEMPLATE_FIELDS,
    "reasoning_effort": supported(shared_fields.effort, "the same as `reasoning.effort`"),
    "input": required(
        _input, "a string or items: messages, images in them, calls and their outputs, reasoning"
    ),
    "instructions": supported(readers.text, "a system message before all others"),
    "previous_response_id": supported(
        readers.text, "the conversation to continue, if still stored"
    ),
    "store": supported(readers.flag, "default true; the oldest are dropped first"),
    "max_output_tokens": replace(shared_fields.MAX_TOKENS, alias_of="max_tokens"),
    "max_tokens": shared_fields.MAX_TOKENS,
    **fields.aliases("max_tokens", shared_fields.MAX_TOKENS, "max_completion_tokens"),
    **CONSTRAINT_FIELDS,
    "stop": shared_fields.STOP,
    "stream_options": supported(shared_fields.stream_options, "no padding"),
    "include": supported(_include, f"`{_LOGPROBS}`; `reasoning.encrypted_content` is accepted"),
    "top_logprobs": supported(shared_fields.TOP_LOGPROBS, f"needs `{_LOGPROBS}` in `include`"),
    "reasoning": supported(
        readers.nested(
            effort=shared_fields.effort,
            mode=readers.hinted("standard"),
            **dict.fromkeys(("summary", "generate_summary", "context"), readers.hinted("auto")),
        ),
        "`effort` is an argument of the chat template",
    ),
    "text": supported(
        readers.nested(format=_format, verbosity=readers.hinted("medium")),
        "`format`: text, json_object, json_schema; needs the extra `grammar`; no `verbosity`",
    ),
    "metadata": supported(_metadata, "repeated in the answer"),
    "truncation": fields.hint("disabled", note="a prompt that is too long is refused"),
    "background": unsupported(False),
    "tools": supported(_tool_list, "functions, free text, namespaces of both"),
    "tool_choice": supported(
        _tool_choice, "`required` and a name are enforced where the model's calls are JSON"
    ),
    "parallel_tool_calls": supported(readers.flag, "false: the answer ends after its first call"),
    "max_tool_calls": supported(
        readers.integer(1, 2**31 - 1), "it bounds calls of OpenAI's own tools"
    ),
    "context_management": fields.hint([]),
    **fields.hint_each("moderation"),
    **fields.unsupported_each("conversation prompt"),
    "n": shared_fields.ONE_CHOICE,
    "prompt_cache_options": fields.no_op(readers.json_object),
    "client_metadata": fields.no_op(readers.json_object, "what Codex says of itself"),
    **dict.fromkeys(
        ("user", "safety_identifier", "prompt_cache_key"),
        supported(readers.text, "repeated in the answer"),
    ),
    **fields.no_op_each("service_tier prompt_cache_retention", readers.text),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesRequest(ChatRequest):
    """A request for a response; `echo` are the members that the answer repeats.

    `messages` have no references to stored items, which `pieces` has.
    """

    prompt_field: ClassVar[str] = "input"
    pieces: tuple[Piece, ...] = ()
    instructions: str | None = None
    previous_response_id: str | None = None
    is_stored: bool = True
    echo: Mapping[str, Any] = field(default_factory=dict)

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The messages that a later response continues: instructions are not kept."""
        return self.messages[1:] if self.instructions else self.messages

    def after(
        self, history: Sequence[Message], find: Callable[[str], Message | None] = lambda id: None
    ) -> "ResponsesRequest":
        """The same request in a conversation: instructions first, then the history.

        `find` returns a stored item. Raises APIError 404 for one that is gone.
        """
        lead = self.messages[:1] if self.instructions else ()
        return replace(self, messages=(*lead, *history, *_turns(self.pieces, find)))


def parse_responses(body: bytes) -> ResponsesRequest:
    """Validate a Responses body. Raises APIError 400 naming the field at fault."""
    value = readers.parse_object(body)
    with fields.reading(value, FIELDS) as given:
        options = shared_options(given, "max_output_tokens")
        is_wanted, needed = _LOGPROBS in given.take("include", ()), f"{_LOGPROBS!r} in 'include'"
        options["sampling"] |= logprobs_option(given, is_wanted=is_wanted, needed=needed)
        instructions, reasoning = given.take("instructions"), given.take("reasoning", {})
        effort = given.take("reasoning_effort") or reasoning.get("effort")
        wanted = given.take("text", {}).get("format", {"type": "text"})
        schema = response_format(wanted, "text.format")
        formats = [] if schema is None else [(schema, "text.format")]
        formats += take_constraints(given)
        choice, is_parallel = (
            given.take("tool_choice", "auto"),
            given.take("parallel_tool_calls", True),
        )
        asked: Input = given.take("input")
        use = ToolUse(merged((*given.take("tools", ()), *asked.tools)), choice, is_parallel)
        lead = (Message(Role.SYSTEM, instructions),) if instructions else ()
        known = [piece for piece in asked.pieces if isinstance(piece, Message)]
        request = ResponsesRequest(
            **options,
            constraint=sole_constraint(options, use.constraints(formats)),
            messages=lead + _turns(known, lambda id: None),
            pieces=asked.pieces,
            template_kwargs=template_kwargs(given, effort),
            continue_final=False,  # a trailing assistant's message is history here
            tools=use.callable,
            max_calls=use.max_calls,
            instructions=instructions,
            previous_response_id=given.take("previous_response_id"),
            is_stored=given.take("store", True),
        )
        for name in ("tools", "tool_choice"):  # repeated in the answer, unread members too
            readers.shallow({name: value.get(name)}, name, _MAX_ECHO_DEPTH)
        own = {
            "parallel_tool_calls": is_parallel,
            "reasoning": {"effort": effort, "summary": None},
            "text": {"format": wanted, "verbosity": "medium"},
            "tool_choice": value.get("tool_choice") or choice,
            "tools": value.get("tools") or [],
        }
        return replace(request, echo=_echo(request, given, own), ignored=given.ignored)


def _echo(request: ResponsesRequest, given: fields.Given, own: Mapping[str, Any]) -> dict[str, Any]:
    """The members that repeat the request; null where the model's default holds."""
    return {
        "instructions": request.instructions,
        "previous_response_id": request.previous_response_id,
        "temperature": request.sampling.get("temperature"),
        "top_p": request.sampling.get("top_p"),
        "max_tool_calls": given.take("max_tool_calls"),
        "user": given.take("user"),
        "safety_identifier": given.take("safety_identifier"),
        "prompt_cache_key": given.take("prompt_cache_key"),
        "background": False,
        "max_output_tokens": request.max_tokens,
        "metadata": given.take("metadata", {}),
        "parallel_tool_calls": own["parallel_tool_calls"],
        "reasoning": own["reasoning"],
        "service_tier": "default",
        "store": request.is_stored,
        "text": own["text"],
        "tool_choice": own["tool_choice"],
        "top_logprobs": request.sampling.get("top_logprobs", 0),
        "truncation": "disabled",
        "tools": own["tools"],
    }


def _stored_id(exchange: Exchange, id: str) -> str:
    """Ids are apart for each API key: no other key can find a response."""
    return f"{exchange.key.hex()}/{id}"


def _resume(service: Service, exchange: Exchange, request: ResponsesRequest) -> ResponsesRequest:
    stored, history = service.stored_responses, tuple[Message, ...]()
    if (id := request.previous_response_id) is not None:
        found = stored.load(_stored_id(exchange, id))
        if found is None:
            message = f"there is no response {truncate(id)!r} here (any more)"
            raise APIError(ErrorKind.NOT_FOUND, message, param="previous_response_id")
        history = found
    return request.after(history, lambda item: stored.item(_stored_id(exchange, item)))


def _store(
    service: Service,
    exchange: Exchange,
    id: str,
    request: ResponsesRequest,
    writer: ResponsesWriter,
) -> None:
    if request.is_stored and writer.body is not None and writer.answer is not None:
        messages = (*request.conversation, writer.answer)
        items = {_stored_id(exchange, item): one for item, one in writer.pieces().items()}
        service.stored_responses.store(_stored_id(exchange, id), messages, writer.body, items)


def _missing(id: str) -> APIError:
    return APIError(ErrorKind.NOT_FOUND, f"there is no response {truncate(id)!r} here")


def _get(service: Service, exchange: Exchange, _body: bytes) -> None:
    service.need_model()
    id = exchange.path_rest
    if (body := service.stored_responses.body(_stored_id(exchange, id))) is None:
        raise _missing(id)
    exchange.respond(200, body)


def _delete(service: Service, exchange: Exchange, _body: bytes) -> None:
    id = exchange.path_rest
    if not service.stored_responses.delete(_stored_id(exchange, id)):
        raise _missing(id)
    exchange.respond(200, orjson.dumps({"id": id, "object": "response", "deleted": True}))


ENDPOINTS: Final = (
    Endpoint(
        "POST",
        "/v1/responses",
        "A response (OpenAI's newer dialect)",
        Dialect(
            parse=parse_responses,
            writer=lambda envelope, request, model, _: ResponsesWriter(
                envelope, model.token_bytes, request.echo, request.tools
            ),
            id_prefix="resp_",
            prompt_field="input",
            resume=_resume,
            ended=_store,
        ).handle,
        FIELDS,
        answer_schema="Response",
        kinds={"tools": TOOLS, "input items": _ITEMS, "content parts": PARTS},
    ),
    Endpoint("GET", "/v1/responses/{id}", "A stored response", _get, answer_schema="Response"),
    Endpoint("DELETE", "/v1/responses/{id}", "Forget a stored response", _delete),
)
