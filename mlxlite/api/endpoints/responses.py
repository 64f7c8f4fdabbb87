"""POST /v1/responses, GET and DELETE of a stored one: OpenAI's Responses, parsed and written.

A request may continue a stored response by `previous_response_id`. The writer is a state machine
like that of Anthropic's Messages: items instead of blocks, of which at most one is open.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import orjson

from mlxlite.api.constraints import ToolUse, response_format
from mlxlite.api.conversation import (
    SHOWS,
    Message,
    Role,
    Tool,
    ToolCall,
    array_of,
    bounded,
    function_of,
    turn,
)
from mlxlite.api.endpoint import Endpoint
from mlxlite.api.fields import (
    Field,
    Given,
    no_op,
    read_fields,
    supported,
    unsupported,
    unsupported_each,
)
from mlxlite.api.generate import Dialect
from mlxlite.api.openai_content import NO_PICTURES, input_image, role_of, said_of, texts_of
from mlxlite.api.readers import (
    Reader,
    flag,
    integer,
    json_object,
    need,
    nested,
    of_kind,
    one_of,
    only,
    parse,
    parse_object,
    parts,
    shallow,
    text,
    unsupported_type,
    wrong,
)
from mlxlite.api.request import (
    GENERATION_FIELDS,
    MAX_TOKENS,
    ONE_CHOICE,
    STOP,
    TEMPLATE_FIELDS,
    TOP_LOGPROBS,
    ChatRequest,
    effort,
    shared_options,
    sole_constraint,
    stream_options,
    template_kwargs,
)
from mlxlite.api.service import Service
from mlxlite.api.writers import Choice, Envelope, TokenBytes, logprobs_json, parts_of, retold
from mlxlite.engine.sequence import FinishReason, Prompt, Usage
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import APIError, Cause, bad, clip
from mlxlite.http.sse import sse_event
from mlxlite.models.interface import Model
from mlxlite.output.events import (
    Arguments,
    Broken,
    Call,
    CallPart,
    Channel,
    Closed,
    Delta,
    Done,
    Opened,
    Progress,
)

MAX_METADATA = 16  # pairs, OpenAI's bound

# --- requests ---------------------------------------------------------------------------------


def _arguments(value: Any, param: str) -> Any:
    """The parsed object, or a model's own broken call as its text."""
    try:
        arguments = parse((text(value, param) or "{}").encode())
    except ValueError:
        return value
    return arguments if isinstance(arguments, dict) else value


def _input(value: Any, param: str) -> tuple[Message, ...]:
    """A string is what the user says; items are turns, or parts of an assistant's one."""
    if isinstance(value, str):
        return (Message(Role.USER, value),)
    if isinstance(value, list):  # the easy form of a message has no type
        value = [{"type": "message"} | item if isinstance(item, dict) else item for item in value]
    turns: list[Message] = []
    for kind, item, name in parts(value, param):
        reader = _ITEMS.get(kind)
        if reader is None:
            raise unsupported_type(kind, name)
        _add(turns, reader(item, name))
    if not turns:
        raise bad(f"'{param}' must hold at least one message.", param)
    return tuple(bounded(turns))


def _add(turns: list[Message], new: Message | None) -> None:
    """Reasoning, what is then said, and the calls after it are one turn, as in a chat."""
    if new is None:
        return
    last = turns[-1] if turns else new
    is_next = new.reasoning is None and (last.content is None or new.content is None)
    is_next = is_next and not (last.tool_calls and new.content is not None)
    if not turns or not last.role is new.role is Role.ASSISTANT or not is_next:
        turns.append(new)
        return
    content = last.content if new.content is None else new.content
    turns[-1] = replace(last, content=content, tool_calls=last.tool_calls + new.tool_calls)


def _item_message(item: Mapping[str, Any], param: str) -> Message:
    roles = (Role.USER, Role.ASSISTANT, Role.SYSTEM, Role.DEVELOPER)
    role = role_of(item.get("role"), f"{param}.role", *roles)
    pictures = _PICTURES if role in SHOWS else NO_PICTURES
    return turn(role, said_of(item.get("content"), f"{param}.content", pictures))


def _item_call(item: Mapping[str, Any], param: str) -> Message:
    id, name = (text(item.get(key), f"{param}.{key}") for key in ("call_id", "name"))
    arguments = _arguments(item.get("arguments"), f"{param}.arguments")
    return Message(Role.ASSISTANT, None, tool_calls=(ToolCall(id, name, arguments),))


def _item_output(item: Mapping[str, Any], param: str) -> Message:
    output = said_of(item.get("output"), f"{param}.output", _PICTURES)
    id = text(item.get("call_id"), f"{param}.call_id")
    return turn(Role.TOOL, output, tool_call_id=id)


def _item_reasoning(item: Mapping[str, Any], param: str) -> Message | None:
    """The thoughts, else their summary; what is encrypted only OpenAI can read."""
    for name in ("content", "summary"):
        if item.get(name) is not None and (said := texts_of(item[name], f"{param}.{name}")):
            return Message(Role.ASSISTANT, None, reasoning=said)
    return None


_PICTURES: Final[Mapping[str, Reader]] = {"input_image": input_image}
_ITEMS: Final[Mapping[str, Callable[[Mapping[str, Any], str], Message | None]]] = {
    "message": _item_message,
    "function_call": _item_call,
    "function_call_output": _item_output,
    "reasoning": _item_reasoning,
}
_LOGPROBS: Final = "message.output_text.logprobs"


def _include(value: Any, param: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise wrong(param, "an array of strings", value)
    for i, name in enumerate(value):
        if text(name, f"{param}[{i}]") not in (_LOGPROBS, "reasoning.encrypted_content"):
            message = f"{clip(name)!r} is not supported in '{param}'."
            raise APIError(Cause.UNSUPPORTED, message, param=param)
    return tuple(value)


def _metadata(value: Any, param: str) -> dict[str, str]:
    pairs = json_object(value, param)
    if len(pairs) > MAX_METADATA:
        raise bad(f"'{param}' may hold at most {MAX_METADATA} pairs.", param)
    return {name: text(item, f"{param}.{clip(name)}") for name, item in pairs.items()}


def _tool(value: Any, param: str) -> Tool:
    """Flat; of OpenAI's own tools only OpenAI has what they do."""
    return function_of(of_kind("function", value, param), param)


def _tool_choice(value: Any, param: str) -> Any:
    """In a chat's words: a word, or the name of a function."""
    if isinstance(value, str):
        return one_of("none", "auto", "required")(value, param)
    return {"name": text(of_kind("function", value, param).get("name"), f"{param}.name")}


_FORMAT: Final[Mapping[str, Reader]] = {
    "type": one_of("text", "json_object", "json_schema"),
    "name": text,
    "description": text,
    "schema": shallow,  # it is repeated even where the type has no use for it
    "strict": flag,
}


def _format(value: Any, param: str) -> dict[str, Any]:
    """What is echoed of it."""
    wanted: dict[str, Any] = nested(_FORMAT, "type")(value, param)
    need(wanted, param, *(("name", "schema") if wanted["type"] == "json_schema" else ()))
    return wanted


FIELDS: Final[Mapping[str, Field]] = {
    **GENERATION_FIELDS,
    **TEMPLATE_FIELDS,
    "input": supported(
        _input, "a string or items: messages, images in them, calls and their outputs, reasoning"
    ),
    "instructions": supported(text, "a system message before all others"),
    "previous_response_id": supported(text, "the conversation to continue, if still stored"),
    "store": supported(flag, "default true; the oldest are dropped first"),
    "max_output_tokens": replace(MAX_TOKENS, alias_of="max_tokens"),
    "stop": STOP,
    "stream_options": supported(stream_options, "no padding"),
    "include": supported(_include, f"`{_LOGPROBS}`; `reasoning.encrypted_content` is accepted"),
    "top_logprobs": supported(TOP_LOGPROBS, f"needs `{_LOGPROBS}` in `include`"),
    "reasoning": supported(
        nested(
            {"effort": effort, "mode": only("standard")}
            | dict.fromkeys(("summary", "generate_summary", "context"), only("auto"))
        ),
        "`effort` is an argument of the chat template",
    ),
    "text": supported(
        nested({"format": _format, "verbosity": only("medium")}),
        "`format`: text, json_object, json_schema; needs the extra `grammar`; no `verbosity`",
    ),
    "metadata": supported(_metadata, "repeated in the answer"),
    "truncation": unsupported("disabled", note="a prompt that is too long is refused"),
    "background": unsupported(False),
    "tools": supported(array_of(_tool), "functions; OpenAI's own tools are refused"),
    "tool_choice": supported(
        _tool_choice, "`required` and a name are enforced where the model's calls are JSON"
    ),
    "parallel_tool_calls": supported(flag, "false: the answer ends after its first call"),
    "max_tool_calls": supported(integer(1, 2**31 - 1), "it bounds calls of OpenAI's own tools"),
    "context_management": unsupported([]),
    **unsupported_each("conversation prompt moderation"),
    "n": ONE_CHOICE,
    "prompt_cache_options": no_op(json_object),
    **dict.fromkeys(
        ("user", "safety_identifier", "prompt_cache_key"), supported(text, "repeated in the answer")
    ),
    **dict.fromkeys(("service_tier", "prompt_cache_retention"), no_op(text)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesRequest(ChatRequest):
    """A response as asked for; `echo` is what its answer repeats."""

    instructions: str | None = None
    previous_response_id: str | None = None
    is_stored: bool = True
    echo: Mapping[str, Any] = field(default_factory=dict)

    @property
    def conversation(self) -> tuple[Message, ...]:
        """What a later response goes on from, but for the answer: instructions are not kept."""
        return self.messages[1:] if self.instructions else self.messages

    def after(self, history: Sequence[Message]) -> "ResponsesRequest":
        """The same request in a conversation: instructions come first, then what was said."""
        lead = self.messages[:1] if self.instructions else ()
        return replace(self, messages=(*lead, *history, *self.conversation))


def parse_responses(body: bytes) -> ResponsesRequest:
    """Validate a Responses body. Raises APIError 400 naming the field at fault."""
    value = parse_object(body)
    given = read_fields(value, FIELDS, "input")
    options = shared_options(given, "max_output_tokens")
    options["sampling"] |= _logprobs(given)
    instructions, reasoning = given.take("instructions"), given.take("reasoning", {})
    wanted = given.take("text", {}).get("format", {"type": "text"})
    schema = response_format({**wanted, "json_schema": wanted}, "text.format")
    formats = [] if schema is None else [(schema, "text.format")]
    choice, is_parallel = given.take("tool_choice", "auto"), given.take("parallel_tool_calls", True)
    use = ToolUse(given.take("tools", ()), choice, is_parallel)
    lead = (Message(Role.SYSTEM, instructions),) if instructions else ()
    request = ResponsesRequest(
        **options,
        constraint=sole_constraint(options, formats + use.constraints()),
        messages=lead + given.take("input"),
        template_kwargs=template_kwargs(given, reasoning.get("effort")),
        continue_final=False,  # a trailing assistant's message is history here
        tools=use.callable,
        max_calls=use.max_calls,
        instructions=instructions,
        previous_response_id=given.take("previous_response_id"),
        is_stored=given.take("store", True),
    )
    own = {
        "parallel_tool_calls": is_parallel,
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "text": {"format": wanted, "verbosity": "medium"},
        "tool_choice": choice if isinstance(choice, str) else {"type": "function"} | choice,
        "tools": value.get("tools") or [],
    }
    request = replace(request, echo=_echo(request, given, own))
    given.close()
    return request


def _logprobs(given: Given) -> dict[str, Any]:
    is_wanted, num_top = _LOGPROBS in given.take("include", ()), given.take("top_logprobs", 0)
    if num_top and not is_wanted:
        raise bad(f"'top_logprobs' needs {_LOGPROBS!r} in 'include'.", "top_logprobs")
    return {"top_logprobs": num_top} if is_wanted else {}


def _echo(request: ResponsesRequest, given: Given, own: Mapping[str, Any]) -> dict[str, Any]:
    """The request as the answer repeats it; null where the model's default holds."""
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


# --- answers ----------------------------------------------------------------------------------

_STATUSES: Final = {
    FinishReason.STOP: "completed",
    FinishReason.LENGTH: "incomplete",
    FinishReason.CANCELLED: "cancelled",
}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": usage.num_cached, "cache_write_tokens": 0},
        "output_tokens": usage.num_output,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning},
        "total_tokens": usage.num_prompt + usage.num_output,
    }


_TEXT_EVENTS: Final = {  # how an item's text is told
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


@dataclass(slots=True)
class _Item:
    """A message, reasoning or a call of the answer, as far as it is written."""

    kind: str
    id: str
    call: Call | None = None
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    status: str = "in_progress"
    broken: str = ""  # what the model wrote, where it is no call after all

    def said(self) -> dict[str, Any]:
        text = "".join(self.texts)
        if self.call is not None:
            return {"name": self.call.name, "arguments": text}
        logprobs = {"logprobs": self.logprobs} if self.kind == "message" else {}
        return {"text": text, **logprobs}

    def part(self) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", **self.said()}
        return {"type": "output_text", "annotations": [], **self.said()}

    def as_json(self) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": self.status}
        if self.call is not None:
            return {**item, "call_id": self.call.id, **self.said()}
        item["content"] = [] if self.status == "in_progress" else [self.part()]
        if self.kind == "reasoning":
            return {**item, "summary": []}
        return {**item, "role": "assistant"}


class ResponsesWriter:
    """A response, streamed or whole.

    Once it has ended, `body` is what a client gets that asks for it again, and `answer` what a
    later response goes on from; there is none when it has failed.
    """

    def __init__(
        self, envelope: Envelope, token_bytes: TokenBytes, request: ResponsesRequest
    ) -> None:
        self.body: bytes | None = None
        self.answer: Message | None = None
        self._envelope = envelope
        self._token_bytes = token_bytes
        self._echo = request.echo
        self._items: list[_Item] = []
        self._open_kind = ""  # of the last item, if it is open
        self._logprobs: list[dict[str, Any]] = []  # drawn since the last text of a message
        self._num_events = 0

    def _event(self, kind: str, **rest: Any) -> bytes:
        payload = {"type": kind, "sequence_number": self._num_events, **rest}
        self._num_events += 1
        return sse_event(kind, orjson.dumps(payload))

    def _response(self, status: str, **rest: Any) -> dict[str, Any]:
        return {
            "id": self._envelope.id,
            "object": "response",
            "created_at": self._envelope.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._envelope.model,
            "output": [item.as_json() for item in self._items],
            "usage": None,
            **self._echo,
            **rest,
        }

    def _item(self, kind: str) -> bytes:
        """An event of the last item."""
        kind, index = f"response.output_item.{kind}", len(self._items) - 1
        return self._event(kind, output_index=index, item=self._items[-1].as_json())

    def _about(self, kind: str, **rest: Any) -> bytes:
        """An event of what is in the last item."""
        item, index = self._items[-1], len(self._items) - 1
        place = {} if item.call is not None else {"content_index": 0}
        return self._event(kind, item_id=item.id, output_index=index, **place, **rest)

    def _add(self, kind: str, id: str, call: Call | None = None) -> bytes:
        """A new item, once the one that is open is closed."""
        head = self._close("completed")
        self._items.append(_Item(kind, id, call))
        self._open_kind = kind
        return head + self._item("added")

    def _open(self, kind: str, prefix: str) -> bytes:
        """An item with a part for text, unless it is open."""
        if self._open_kind == kind:
            return b""
        number = sum(item.kind == kind for item in self._items)
        id = prefix + self._envelope.id.removeprefix("resp_") + (f"_{number}" if number else "")
        head, part = self._add(kind, id), self._items[-1].part()
        return head + self._about("response.content_part.added", part=part)

    def _tell(self, text: str, **rest: Any) -> bytes:
        """More text of what is open."""
        self._items[-1].texts.append(text)
        return self._about(f"{_TEXT_EVENTS[self._open_kind]}.delta", delta=text, **rest)

    def _say(self, text: str) -> bytes:
        head = self._open("message", "msg_")
        logprobs, self._logprobs = self._logprobs, []
        self._items[-1].logprobs += logprobs
        return head + self._tell(text, logprobs=logprobs)

    def _part(self, part: CallPart) -> bytes:
        match part:
            case Opened(id, name):
                call = Call(id, name, "")
                return self._add("function_call", "fc_" + id.removeprefix("call_"), call)
            case Arguments(text):
                return self._tell(text)
            case Closed(call):
                self._items[-1].call = call
                return self._close("completed")
            case Broken(text):
                self._items[-1].broken = text
                return self._close("incomplete")

    def _close(self, status: str) -> bytes:
        """The end of what is open, if anything is."""
        if not self._open_kind:
            return b""
        item = self._items[-1]
        frames = self._about(f"{_TEXT_EVENTS[self._open_kind]}.done", **item.said())
        if item.call is None:
            frames += self._about("response.content_part.done", part=item.part())
        item.status, self._open_kind = status, ""
        return frames + self._item("done")

    def begin(self) -> bytes:
        created = self._event("response.created", response=self._response("in_progress"))
        return created + self._event("response.in_progress", response=self._response("in_progress"))

    def delta(self, index: int, delta: Delta) -> bytes:
        self._logprobs += logprobs_json(delta.logprobs, self._token_bytes)
        frames = b""
        if delta.text and delta.channel is Channel.REASONING:
            frames = self._open("reasoning", "rs_") + self._tell(delta.text)
        elif delta.text or (self._logprobs and self._open_kind == "message"):
            frames = self._say(delta.text)
        return frames + b"".join(map(self._part, parts_of(delta)))

    def progress(self, index: int, progress: Progress) -> bytes:
        """The dialect has no word for it."""
        return b""

    def _end(self, done: Done, usage: Usage) -> dict[str, Any]:
        """The finished response, which is remembered, and all its items as one turn."""
        status = _STATUSES[done.reason]
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        response = self._response(status, incomplete_details=details, usage=_usage(usage))
        self.body = orjson.dumps(response)
        texts, made = dict.fromkeys(_TEXT_EVENTS, ""), list[Call]()
        for item in self._items:
            if item.broken:  # for the model, what it has written is text
                texts["message"] += item.broken
            elif item.call is not None:
                made.append(item.call)
            else:
                texts[item.kind] += "".join(item.texts)
        calls = tuple(ToolCall(call.id, call.name, orjson.loads(call.arguments)) for call in made)
        said, thought = texts["message"] or (None if calls else ""), texts["reasoning"] or None
        self.answer = Message(Role.ASSISTANT, said, reasoning=thought, tool_calls=calls)
        return response

    def done(self, index: int, done: Done, total: Usage | None) -> bytes:
        """An empty answer has its message too; one that was cancelled ends as incomplete."""
        has_completed = done.reason is FinishReason.STOP
        head = b"" if self._items else self._open("message", "msg_")
        if self._logprobs and self._open_kind == "message":
            head += self._say("")
        head += self._close("completed" if has_completed else "incomplete")
        response = self._end(done, total or done.usage)
        kind = "response.completed" if has_completed else "response.incomplete"
        return head + self._event(kind, response=response)

    def fail(self, error: APIError) -> bytes:
        """Told twice, as OpenAI does: some clients know the one event, some the other."""
        if self._open_kind:
            self._items[-1].status = "incomplete"
        detail = {"code": error.code, "message": error.message, "param": error.param}
        reason = {"code": "server_error", "message": error.message}
        response = self._response("failed", error=reason)
        self.body = orjson.dumps(response)
        return self._event("error", **detail) + self._event("response.failed", response=response)

    def whole(self, choices: Sequence[Choice], total: Usage) -> bytes:
        """What a stream would have ended with."""
        (choice,) = choices
        assert choice.done is not None
        for delta in retold(choice):
            self.delta(0, delta)
        self.done(0, choice.done, total)
        assert self.body is not None
        return self.body


def _writer(
    envelope: Envelope, request: ResponsesRequest, model: Model, _prompts: Sequence[Prompt]
) -> ResponsesWriter:
    return ResponsesWriter(envelope, model.token_bytes, request)


# --- stored responses -------------------------------------------------------------------------


def _stored_id(exchange: Exchange, id: str) -> str:
    """A response's id among those of its API key: no other key can find it."""
    return f"{exchange.key.hex()}/{id}"


def _resume(service: Service, exchange: Exchange, request: ResponsesRequest) -> ResponsesRequest:
    """The request in the conversation that it continues. Raises APIError 404."""
    if (id := request.previous_response_id) is None:
        return request
    history = service.stored_responses.load(_stored_id(exchange, id))
    if history is None:
        message = f"there is no response {clip(id)!r} here (any more)"
        raise APIError(Cause.NOT_FOUND, message, param="previous_response_id")
    return request.after(history)


def _store(
    service: Service,
    exchange: Exchange,
    id: str,
    request: ResponsesRequest,
    writer: ResponsesWriter,
) -> None:
    if request.is_stored and writer.body is not None and writer.answer is not None:
        messages = (*request.conversation, writer.answer)
        service.stored_responses.store(_stored_id(exchange, id), messages, writer.body)


def _missing(id: str) -> APIError:
    return APIError(Cause.NOT_FOUND, f"there is no response {clip(id)!r} here")


def _get(service: Service, exchange: Exchange, _body: bytes) -> None:
    service.need_model()
    id = exchange.head.path.rpartition("/")[2]
    if (body := service.stored_responses.body(_stored_id(exchange, id))) is None:
        raise _missing(id)
    exchange.respond(200, body)


def _delete(service: Service, exchange: Exchange, _body: bytes) -> None:
    id = exchange.head.path.rpartition("/")[2]
    if not service.stored_responses.delete(_stored_id(exchange, id)):
        raise _missing(id)
    exchange.respond(200, orjson.dumps({"id": id, "object": "response", "deleted": True}))


ENDPOINTS: Final = (
    Endpoint(
        method="POST",
        path="/v1/responses",
        summary="A response (OpenAI's newer dialect)",
        fields=FIELDS,
        required=("input",),
        answer_schema="Response",
        handle=Dialect(
            parse=parse_responses, writer=_writer, id_prefix="resp_", resume=_resume, ended=_store
        ).handle,
    ),
    Endpoint(
        method="GET",
        path="/v1/responses/{id}",
        summary="A stored response",
        answer_schema="Response",
        handle=_get,
    ),
    Endpoint(
        method="DELETE",
        path="/v1/responses/{id}",
        summary="Forget a stored response",
        handle=_delete,
    ),
)
