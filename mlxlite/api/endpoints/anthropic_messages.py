"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages, parsed and written.

The writer is a state machine: an answer is a list of blocks, of which at most one is open;
reasoning, text and calls open what they need, and an open block is closed before another begins or
the answer ends.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby
from typing import Any, Final

import orjson

from mlxlite.api import fields, readers, shared_fields
from mlxlite.api.constraints import CONSTRAINT_FIELDS, json_schema, take_constraints
from mlxlite.api.content_parts import PARTS, Content, content_of, part_of, parts_in, text_of
from mlxlite.api.conversation import Message, Role, ToolCall, message_list, turn
from mlxlite.api.endpoint import Endpoint
from mlxlite.api.fields import Kind, Use, required, supported
from mlxlite.api.generate import Dialect, in_task, parse_and_render
from mlxlite.api.left_out import leave_out
from mlxlite.api.openai_content import arguments_of, role_of
from mlxlite.api.readers import Members
from mlxlite.api.render import render_chat
from mlxlite.api.request import ChatRequest, shared_options, sole_constraint, template_kwargs
from mlxlite.api.service import Service
from mlxlite.api.tools import (
    VENDORS_ONLY,
    Tool,
    ToolUse,
    array_of,
    function_of,
    merged,
    read_tool,
)
from mlxlite.api.writers import Collected, Envelope, Shown
from mlxlite.engine.sequence import FinishReason, Usage
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import APIError, ErrorKind, bad_request
from mlxlite.http.sse import sse_event
from mlxlite.output import events

MIN_THINKING = 1024  # tokens, Anthropic's bound of a thinking budget


def _turn(value: Any, param: str, *, is_last: bool) -> list[Message | Tool]:
    """The messages of one of Anthropic's, and the tools that it adds.

    Results of tools are messages of their own.
    """
    given = readers.members(value, param)
    role = role_of(given.get("role"), f"{param}.role", Role.USER, Role.ASSISTANT, Role.SYSTEM)
    content, name = given.get("content"), f"{param}.content"
    if content is None and not (role is Role.USER and is_last):
        leave_out(name)
        return []
    if isinstance(content, str):
        return [Message(role, content)]
    blocks = [(block, f"{name}[{i}]") for i, block in enumerate(readers.array(content, name))]
    added = [tool for block in blocks for tool in _added_tools(*block)]
    blocks = [block for block in blocks if _type_of(block[0]) != "tool_addition"]
    if role is Role.ASSISTANT:
        return [_assistant(blocks)]
    if role is Role.USER:
        return [*added, *(_user(blocks, is_last=is_last) if blocks or not added else ())]
    text = text_of([block for block, _ in blocks], name)
    return [*added, Message(role, text)] if text or not added else [*added]


def _added_tools(block: Any, param: str) -> Iterable[Tool]:
    """The tool that a message defines; one that it refers to is among the request's already."""
    if _type_of(block) != "tool_addition":
        return ()
    tool: Members = Members(block, param).read("tool", readers.members)
    if tool.get("type") != "tool_definition":
        return ()
    return read_tool(TOOLS, tool.read("definition", readers.members), "custom")


Blocks = Sequence[tuple[Any, str]]  # each with its path


def _user(blocks: Blocks, *, is_last: bool) -> list[Message]:
    """Each result is a turn, and each run of other blocks."""
    turns: list[Message] = []
    for is_result, run in groupby(blocks, lambda block: _type_of(block[0]) == "tool_result"):
        if is_result:
            turns += [_tool_result(Members(*block)) for block in run]
        else:
            content = chain.from_iterable(
                part_of(block, path, is_asked=is_last) for block, path in run
            )
            turns.append(turn(Role.USER, parts_in(content)))
    return turns or [Message(Role.USER, "")]


def _type_of(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else None


def _tool_result(block: Members) -> Message:
    """A failure becomes text: templates have no field for it."""
    content = content_of(block.get("content"), block.path_of("content"), is_asked=False)
    parts = list(parts_in(content))
    if block.get("is_error") is True:
        first = parts.pop(0) if parts and isinstance(parts[0], str) else ""
        parts.insert(0, f"Error: {first}")
    return turn(Role.TOOL, parts, tool_call_id=block.text("tool_use_id"))


def _assistant(blocks: Blocks) -> Message:
    content: list[Content] = []
    calls: list[ToolCall] = []
    for block, path in blocks:
        if _type_of(block) == "tool_use":
            try:
                calls.append(_call(Members(block, path)))
            except APIError:
                leave_out(path)
        else:
            content += part_of(block, path, is_asked=False, has_pictures=False)
    thoughts: list[str] = []
    texts = [str(part) for part in parts_in(content, thoughts)]
    text = "\n".join(texts) if texts or not calls else None
    reasoning = "\n".join(thoughts) or None
    return Message(Role.ASSISTANT, text, reasoning=reasoning, tool_calls=tuple(calls))


def _call(block: Members) -> ToolCall:
    return ToolCall(block.text("id"), block.text("name"), arguments_of(block.get("input")))


_read_thinking: Final = readers.nested(
    "type",
    type=readers.one_of("disabled", "enabled", "adaptive"),
    budget_tokens=readers.integer(MIN_THINKING, 2**31 - 1),
    display=readers.hinted("summarized"),
)


def _thinking(value: Any, param: str) -> dict[str, Any]:
    thinking: dict[str, Any] = _read_thinking(value, param)
    if thinking["type"] == "enabled":
        readers.need(thinking, param, "budget_tokens")
    return thinking


def _tool(tool: Members) -> Iterable[Tool]:
    return (function_of(tool.values, tool.path, "input_schema"),)


BLOCKS: Final[fields.Kinds] = {
    "tool_use": Kind(Use.SUPPORTED, "a call of the assistant"),
    "tool_result": Kind(Use.SUPPORTED, "text, pictures, or any JSON"),
    "tool_addition": Kind(Use.SUPPORTED, "the tool that it defines is added"),
    **PARTS,
}
TOOLS: Final[fields.Kinds] = {
    "custom": Kind(Use.SUPPORTED, "a function; `type` may be absent", _tool),
    "*": VENDORS_ONLY,
}


_read_choice: Final = readers.nested(
    "type",
    type=readers.one_of("auto", "any", "tool", "none"),
    name=readers.text,
    disable_parallel_tool_use=readers.flag,
)


def _tool_choice(value: Any, param: str) -> tuple[Any, bool]:
    given = _read_choice(value, param)
    if given["type"] == "tool":
        readers.need(given, param, "name")
    words = {"any": "required", "tool": {"name": given.get("name")}}
    choice = words.get(given["type"], given["type"])
    return choice, not given.get("disable_parallel_tool_use")


_read_format: Final = readers.nested(
    "type schema", type=readers.one_of("json_schema"), schema=json_schema
)
_ALL: Final = ("all", {"type": "all"})


def _edits(value: Any, param: str) -> None:
    """Claude Code asks for all reasoning to be kept, as it is."""
    for kind, edit in readers.parts(value, param):
        if not kind.startswith("clear_thinking") or edit.get("keep") not in _ALL:
            leave_out(edit.path)


def _thread(value: Any, param: str) -> None:
    """Clients that ask to go on with a thread send it whole after this error."""
    if readers.members(value, param).get("type") == "continue":
        message = "no message threads are kept here; send the whole conversation."
        details = {"error_code": "thread_unsupported_request"}
        raise APIError(ErrorKind.UNSUPPORTED, message, param=param, extra={"details": details})
    leave_out(param)


FIELDS: Final[fields.Table] = {
    **shared_fields.GENERATION_FIELDS,
    **shared_fields.TEMPLATE_FIELDS,
    "messages": required(
        message_list(_turn), "text, image, thinking, tool_use and tool_result blocks"
    ),
    "stop": shared_fields.STOP,
    **CONSTRAINT_FIELDS,
    "system": supported(text_of, "a string or text blocks"),
    "max_tokens": required(readers.integer(1, 2**31 - 1), "required, but not to count tokens"),
    "temperature": supported(readers.number(0, 1), "0 is greedy; default: the model's, else 1"),
    "thinking": supported(
        _thinking,
        "`enable_thinking` for the chat template; `budget_tokens` is checked but not enforced",
    ),
    "output_config": supported(
        readers.nested(effort=shared_fields.effort, format=_read_format),
        "`effort` is an argument of the chat template; `format` json_schema needs the extra "
        "`grammar`",
    ),
    "metadata": fields.no_op(readers.json_object),
    **fields.no_op_each("service_tier inference_geo", readers.text),
    "cache_control": fields.no_op(readers.json_object, "prefixes are cached anyway"),
    "context_management": fields.no_op(
        readers.nested(edits=_edits), "only `clear_thinking` that keeps `all`"
    ),
    "speed": fields.hint("standard"),
    "tools": supported(array_of(TOOLS, "custom"), "functions"),
    "tool_choice": supported(
        _tool_choice, "`any` and `tool` are enforced where the model's calls are JSON"
    ),
    "mcp_servers": fields.hint([]),
    **fields.hint_each("container diagnostics"),
    "output_format": supported(_read_format, "the older name of `output_config.format`"),
    "thread": supported(_thread, "a thread cannot be continued: clients send all of it then"),
    "n": shared_fields.ONE_CHOICE,
}
COUNT_FIELDS: Final[fields.Table] = {
    **FIELDS,
    "max_tokens": replace(FIELDS["max_tokens"], is_required=False),
    "stream": fields.no_op(readers.flag),
}


def parse_messages(body: bytes) -> ChatRequest:
    """Validate a Messages body. Raises APIError 400 naming the field at fault."""
    return _request(body, FIELDS)


def parse_count_tokens(body: bytes) -> ChatRequest:
    """Validate a body that only makes a prompt. Raises APIError 400."""
    return _request(body, COUNT_FIELDS)


def _request(body: bytes, table: fields.Table) -> ChatRequest:
    with fields.reading(readers.parse_object(body), table) as given:
        options = shared_options(given)
        thinking, max_tokens = given.take("thinking", {}), options["max_tokens"]
        if max_tokens is not None and thinking.get("budget_tokens", 0) >= max_tokens:
            message = "'thinking.budget_tokens' must be less than 'max_tokens'."
            raise bad_request(message, "thinking.budget_tokens")
        is_thinking = thinking["type"] != "disabled" if thinking else None
        output, system = given.take("output_config", {}), given.take("system")
        turns: tuple[Message | Tool, ...] = given.take("messages")
        added = (one for one in turns if isinstance(one, Tool))
        tools = merged((*given.take("tools", ()), *added))
        use = ToolUse(tools, *given.take("tool_choice", ()))
        given.take("thread")
        older = given.take("output_format", {})
        wanted = ((output.get("format"), "output_config.format"), (older, "output_format"))
        formats = [(format_["schema"], name) for format_, name in wanted if format_]
        formats += take_constraints(given)
        lead = (Message(Role.SYSTEM, system),) if system else ()
        return ChatRequest(
            **options,
            constraint=sole_constraint(options, use.constraints(formats)),
            messages=lead + tuple(one for one in turns if isinstance(one, Message)),
            template_kwargs=template_kwargs(given, output.get("effort"), is_thinking),
            tools=use.callable,
            max_calls=use.max_calls,
            ignored=given.ignored,
        )


_ERROR_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def anthropic_error(error: APIError, request_id: str | None = None) -> bytes:
    """Anthropic's error object; that of a long prompt has the words that clients look for."""
    kind = "api_error" if error.status >= 500 else "invalid_request_error"
    message = error.message
    if error.code == "context_length_exceeded":
        size, most = error.extra.get("n_prompt_tokens"), error.extra.get("n_ctx")
        message = f"prompt is too long: {size} tokens > {most} maximum. {message}"
    detail: dict[str, Any] = {"type": _ERROR_TYPES.get(error.status, kind), "message": message}
    if "details" in error.extra:
        detail["details"] = error.extra["details"]
    answer: dict[str, Any] = {"type": "error", "error": detail}
    if request_id is not None:
        answer["request_id"] = request_id
    return orjson.dumps(answer)


def _end(done: events.Done) -> dict[str, str | None]:
    """The reason of an end: null for a cancelled answer, which Anthropic does not have."""
    reason, stop = None, None
    if done.reason is FinishReason.LENGTH:
        reason = "max_tokens"
    elif done.reason is FinishReason.STOP and done.num_calls:
        reason = "tool_use"
    elif done.reason is FinishReason.STOP:
        reason, stop = ("end_turn" if done.stop is None else "stop_sequence"), done.stop
    return {"stop_reason": reason, "stop_sequence": stop}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt - usage.num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached,
        "output_tokens": usage.num_output,
        "output_tokens_details": {"thinking_tokens": usage.num_reasoning},
    }


def _tool_use(id: str, name: str, input: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": input}


def _frame(kind: str, **rest: Any) -> bytes:
    return sse_event(kind, orjson.dumps({"type": kind, **rest}))


class MessagesWriter:
    """A message in Anthropic's form, of one choice.

    When a stream begins, the number of cached tokens is not known yet: the last usage has it.
    Reasoning has an empty signature, and is accepted with any.
    """

    def __init__(self, envelope: Envelope, num_prompt: int) -> None:
        self._envelope = envelope
        self._num_prompt = num_prompt
        self._num_blocks = 0
        self._kind = ""  # of the block that is open

    def _message(
        self, content: list[Any], usage: Usage, done: events.Done | None
    ) -> dict[str, Any]:
        end = {"stop_reason": None, "stop_sequence": None} if done is None else _end(done)
        return {
            "id": self._envelope.id,
            "type": "message",
            "role": "assistant",
            "model": self._envelope.model,
            "content": content,
            **end,
            "usage": _usage(usage),
        }

    def _open(self, block: Mapping[str, Any]) -> bytes:
        head, self._kind = self._close(), block["type"]
        self._num_blocks += 1
        index = self._num_blocks - 1
        return head + _frame("content_block_start", index=index, content_block=block)

    def _ensure_open(self, block: Mapping[str, Any]) -> bytes:
        return b"" if self._kind == block["type"] else self._open(block)

    def _delta(self, kind: str, **text: str) -> bytes:
        delta = {"type": kind, **text}
        return _frame("content_block_delta", index=self._num_blocks - 1, delta=delta)

    def _close(self) -> bytes:
        if not self._kind:
            return b""
        head = self._delta("signature_delta", signature="") if self._kind == "thinking" else b""
        self._kind = ""
        return head + _frame("content_block_stop", index=self._num_blocks - 1)

    def begin(self) -> bytes:
        message = self._message([], Usage(num_prompt=self._num_prompt), None)
        return _frame("message_start", message=message) + self.beat()

    def beat(self) -> bytes:
        return _frame("ping")

    def event(self, index: int, event: Shown) -> bytes:
        """The end of a call that did not parse is the end of its block too."""
        match event:
            case events.TextDelta(text) if text:
                head = self._ensure_open({"type": "text", "text": ""})
                return head + self._delta("text_delta", text=text)
            case events.ReasoningDelta(text) if text:
                head = self._ensure_open({"type": "thinking", "thinking": "", "signature": ""})
                return head + self._delta("thinking_delta", thinking=text)
            case events.ToolCallStart(id, name):
                return self._open(_tool_use(id, name, {}))
            case events.ToolCallArguments(text):
                return self._delta("input_json_delta", partial_json=text)
            case events.ToolCallEnd() | events.ToolCallInvalid():
                return self._close()
            case events.Progress():
                return self.beat()
        return b""

    def done(self, index: int, done: events.Done, total: Usage | None) -> bytes:
        last = _frame("message_delta", delta=_end(done), usage=_usage(total or done.usage))
        return self._close() + last + _frame("message_stop")

    def fail(self, error: APIError) -> bytes:
        return sse_event("error", anthropic_error(error))

    def whole(self, choices: Sequence[Collected], total: Usage) -> bytes:
        """Reasoning, then text, then calls, whatever their order was."""
        (choice,) = choices
        content: list[dict[str, Any]] = []
        if reasoning := choice.reasoning:
            content.append({"type": "thinking", "thinking": reasoning, "signature": ""})
        if text := choice.text:
            content.append({"type": "text", "text": text})
        for call in choice.calls:
            content.append(_tool_use(call.id, call.name, orjson.loads(call.arguments)))
        return orjson.dumps(self._message(content, total, choice.done))


async def _count(service: Service, exchange: Exchange, body: bytes) -> None:
    model, config = service.need_model().model, service.config

    def count(request: ChatRequest) -> int:
        return len(render_chat(model, request, config)[0].tokens)

    request, num_tokens = await parse_and_render(service, exchange, body, parse_count_tokens, count)
    service.note_ignored(exchange, request.ignored)
    exchange.respond(200, orjson.dumps({"input_tokens": num_tokens}))


ENDPOINTS: Final = (
    Endpoint(
        "POST",
        "/v1/messages",
        "A message (Anthropic's dialect)",
        Dialect(
            parse=parse_messages,
            writer=lambda envelope, _, __, prompts: MessagesWriter(
                envelope, len(prompts[0].tokens)
            ),
            id_prefix="msg_",
        ).handle,
        FIELDS,
        answer_schema="Message",
        error_body=anthropic_error,
        kinds={"tools": TOOLS, "content blocks": BLOCKS},
    ),
    Endpoint(
        "POST",
        "/v1/messages/count_tokens",
        "How many tokens a message would read",
        in_task(_count),
        COUNT_FIELDS,
        error_body=anthropic_error,
    ),
)
