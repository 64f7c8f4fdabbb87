"""The answer of OpenAI's Responses: items and events, made of a generation's events. Pure.

A state machine: an answer is a list of items, of which at most one is open; reasoning, text and
calls open what they need, and an open item is closed before another begins or the answer ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import orjson

from mlxlite.api.conversation import Message, Role, ToolCall
from mlxlite.api.likelihoods import TokenBytes
from mlxlite.api.tools import Tool, free_text
from mlxlite.api.writers import Collected, Envelope, Shown, logprobs_json
from mlxlite.engine.sequence import FinishReason, Usage
from mlxlite.http.errors import APIError
from mlxlite.http.sse import sse_event
from mlxlite.output import events

_STATUSES: Final = {
    FinishReason.STOP: "completed",
    FinishReason.LENGTH: "incomplete",
    FinishReason.CANCELLED: "cancelled",
}
_TEXT_EVENTS: Final = {  # of an item's text, by the item's type
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
    "custom_tool_call": "response.custom_tool_call_input",
}


@dataclass(slots=True)
class _Item:
    """A message, reasoning or a call of the answer, as far as it is written."""

    kind: str
    id: str
    call: ToolCall | None = None
    tool: Tool | None = None  # of the call, if the request has it
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    status: str = "in_progress"
    invalid_text: str = ""  # the text that the model wrote for a call that did not parse

    def content(self) -> dict[str, Any]:
        text = "".join(self.texts)
        if self.kind == "custom_tool_call":
            return {"input": text}
        if self.call is not None:
            return {"name": self._names()["name"], "arguments": text}
        logprobs = {"logprobs": self.logprobs} if self.kind == "message" else {}
        return {"text": text, **logprobs}

    def _names(self) -> dict[str, str]:
        assert self.call is not None
        if self.tool is None:
            return {"name": self.call.name}
        space = {"namespace": self.tool.namespace} if self.tool.namespace else {}
        return {"name": self.tool.own_name, **space}

    def part(self) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", **self.content()}
        return {"type": "output_text", "annotations": [], **self.content()}

    def as_json(self) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": self.status}
        if self.call is not None:
            return {**item, "call_id": self.call.id, **self._names(), **self.content()}
        item["content"] = [] if self.status == "in_progress" else [self.part()]
        if self.kind == "reasoning":
            return {**item, "summary": []}
        return {**item, "role": "assistant"}


class ResponsesWriter:
    """A response, streamed or whole.

    Once it has ended, `body` is the answer to later requests for it, and `answer` the message that
    a later response continues; there is none when it has failed.
    """

    def __init__(
        self,
        envelope: Envelope,
        token_bytes: TokenBytes,
        echo: Mapping[str, Any],
        tools: Sequence[Tool] = (),
    ) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self.body: bytes | None = None
        self.answer: Message | None = None
        self._envelope = envelope
        self._token_bytes = token_bytes
        self._echo = echo
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

    def _item_event(self, kind: str) -> bytes:
        kind, index = f"response.output_item.{kind}", len(self._items) - 1
        return self._event(kind, output_index=index, item=self._items[-1].as_json())

    def _content_event(self, kind: str, **rest: Any) -> bytes:
        item, index = self._items[-1], len(self._items) - 1
        place = {} if item.call is not None else {"content_index": 0}
        return self._event(kind, item_id=item.id, output_index=index, **place, **rest)

    def _add(
        self, kind: str, id: str, call: ToolCall | None = None, tool: Tool | None = None
    ) -> bytes:
        head = self._close("completed")
        self._items.append(_Item(kind, id, call, tool))
        self._open_kind = kind
        return head + self._item_event("added")

    def _start_call(self, call: ToolCall) -> bytes:
        tool, number = self._tools.get(call.name), call.id.removeprefix("call_")
        if tool is not None and tool.is_free_text:
            return self._add("custom_tool_call", "ctc_" + number, call, tool)
        return self._add("function_call", "fc_" + number, call, tool)

    def _open(self, kind: str, prefix: str) -> bytes:
        """An item with a part for text, unless it is open."""
        if self._open_kind == kind:
            return b""
        number = sum(item.kind == kind for item in self._items)
        id = prefix + self._envelope.id.removeprefix("resp_") + (f"_{number}" if number else "")
        head, part = self._add(kind, id), self._items[-1].part()
        return head + self._content_event("response.content_part.added", part=part)

    def _text_delta(self, text: str, **rest: Any) -> bytes:
        """Append to the open item; the delta event of its text."""
        self._items[-1].texts.append(text)
        return self._content_event(f"{_TEXT_EVENTS[self._open_kind]}.delta", delta=text, **rest)

    def _message_delta(self, text: str) -> bytes:
        head = self._open("message", "msg_")
        logprobs, self._logprobs = self._logprobs, []
        self._items[-1].logprobs += logprobs
        return head + self._text_delta(text, logprobs=logprobs)

    def _pending_logprobs(self) -> bytes:
        """An empty delta for the logprobs of tokens without text."""
        has_some = bool(self._logprobs) and self._open_kind == "message"
        return self._message_delta("") if has_some else b""

    def _close(self, status: str) -> bytes:
        if not self._open_kind:
            return b""
        item = self._items[-1]
        frames = self._content_event(f"{_TEXT_EVENTS[self._open_kind]}.done", **item.content())
        if item.call is None:
            frames += self._content_event("response.content_part.done", part=item.part())
        item.status, self._open_kind = status, ""
        return frames + self._item_event("done")

    def begin(self) -> bytes:
        kinds = ("response.created", "response.in_progress")
        return b"".join(self._event(k, response=self._response("in_progress")) for k in kinds)

    def event(self, index: int, event: Shown) -> bytes:
        if not isinstance(event, events.Delta):
            return b""  # the dialect has no event for progress
        self._logprobs += logprobs_json(event.logprobs, self._token_bytes)
        match event:
            case events.TextDelta(text) if text:
                return self._message_delta(text)
            case events.ReasoningDelta(text) if text:
                return self._open("reasoning", "rs_") + self._text_delta(text)
            case events.ToolCallStart(id, name):
                return self._pending_logprobs() + self._start_call(ToolCall(id, name, ""))
            case events.ToolCallArguments(text):
                is_free = self._open_kind == "custom_tool_call"  # its text follows in one delta
                return b"" if is_free else self._text_delta(text)
            case events.ToolCallEnd(arguments):
                item = self._items[-1]
                assert item.call is not None
                item.call = replace(item.call, arguments=orjson.loads(arguments))
                is_free = self._open_kind == "custom_tool_call"
                last = self._text_delta(free_text(arguments)) if is_free else b""
                return last + self._close("completed")
            case events.ToolCallInvalid(text):
                self._items[-1].invalid_text = text
                return self._close("incomplete")
        return self._pending_logprobs()

    def _finish(self, done: events.Done, usage: Usage) -> dict[str, Any]:
        """The finished response, which is stored, and all its items as one message."""
        status = _STATUSES[done.reason]
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        response = self._response(status, incomplete_details=details, usage=_usage(usage))
        self.body = orjson.dumps(response)
        texts, calls = dict.fromkeys(_TEXT_EVENTS, ""), list[ToolCall]()
        for item in self._items:
            if item.invalid_text:  # it is text to the model
                texts["message"] += item.invalid_text
            elif item.call is not None:
                calls.append(item.call)
            else:
                texts[item.kind] += "".join(item.texts)
        content = texts["message"] or (None if calls else "")
        reasoning = texts["reasoning"] or None
        self.answer = Message(Role.ASSISTANT, content, reasoning=reasoning, tool_calls=tuple(calls))
        return response

    def pieces(self) -> dict[str, Message]:
        """The items of the answer as parts of its message, by their ids."""
        found: dict[str, Message] = {}
        for item in self._items:
            text = "".join(item.texts)
            match item.kind:
                case "message":
                    found[item.id] = Message(Role.ASSISTANT, text)
                case "reasoning":
                    found[item.id] = Message(Role.ASSISTANT, None, reasoning=text)
                case _ if item.call is not None and not item.invalid_text:
                    found[item.id] = Message(Role.ASSISTANT, None, tool_calls=(item.call,))
        return found

    def beat(self) -> bytes:
        """Sign of life in the dialect's own words: clients count events, not comments."""
        return self._event("response.in_progress", response=self._response("in_progress"))

    def done(self, index: int, done: events.Done, total: Usage | None) -> bytes:
        """The last frames: an empty answer has a message too, a cancelled one ends incomplete."""
        status = "completed" if done.reason is FinishReason.STOP else "incomplete"
        head = b"" if self._items else self._open("message", "msg_")
        head += self._pending_logprobs() + self._close(status)
        response = self._finish(done, total or done.usage)
        return head + self._event(f"response.{status}", response=response)

    def fail(self, error: APIError) -> bytes:
        """Two events, as OpenAI sends them: some clients read the first, some the second."""
        if self._open_kind:
            self._items[-1].status = "incomplete"
        detail = {"code": error.code, "message": error.message, "param": error.param}
        reason = {"code": "server_error", "message": error.message}
        response = self._response("failed", error=reason)
        self.body = orjson.dumps(response)
        return self._event("error", **detail) + self._event("response.failed", response=response)

    def whole(self, choices: Sequence[Collected], total: Usage) -> bytes:
        """The response that a stream would have ended with: reasoning, then text, then calls."""
        (choice,) = choices
        assert choice.done is not None
        self.event(0, events.ReasoningDelta(choice.reasoning))
        self.event(0, events.TextDelta(choice.text, logprobs=tuple(choice.drawn)))
        for call in choice.calls:
            self.event(0, events.ToolCallStart(call.id, call.name))
            self.event(0, events.ToolCallArguments(call.arguments))
            self.event(0, events.ToolCallEnd(call.arguments))
        self.done(0, choice.done, total)
        assert self.body is not None
        return self.body


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt,
        "input_tokens_details": {"cached_tokens": usage.num_cached, "cache_write_tokens": 0},
        "output_tokens": usage.num_output,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning},
        "total_tokens": usage.num_prompt + usage.num_output,
    }
