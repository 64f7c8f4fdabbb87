"""POST /v1/chat/completions: OpenAI's chat, parsed and written."""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from mlxlite.api.constraints import tools_of
from mlxlite.api.conversation import Role
from mlxlite.api.fields import markdown, parse_object, read_fields
from mlxlite.api.render import cacheable, render
from mlxlite.api.request import FIELDS, ChatRequest, check_together, options_of
from mlxlite.api.writers import (
    Choice,
    Envelope,
    StreamOptions,
    TokenBytes,
    call_json,
    finish_reason,
    frame,
    logprobs_json,
    stream_failure,
    timings_json,
    usage_json,
)
from mlxlite.config.options import Config
from mlxlite.engine.sequence import Prompt, Usage
from mlxlite.http.errors import APIError, bad
from mlxlite.http.sse import SSE_DONE, sse_data
from mlxlite.models.interface import Model
from mlxlite.output.events import (
    Arguments,
    Broken,
    Call,
    Channel,
    Closed,
    Delta,
    Done,
    Opened,
    Progress,
)


class ChatWriter:
    """A chat completion. Each choice has its role's chunk, its text's, and one that finishes it.

    The frame around a piece of text never changes, so it is built once for each choice: a token
    costs one JSON string.
    """

    def __init__(
        self,
        envelope: Envelope,
        token_bytes: TokenBytes,
        options: StreamOptions | None = None,
        *,
        num_choices: int = 1,
        has_logprobs: bool = False,
    ) -> None:
        self._envelope = envelope
        self._token_bytes = token_bytes
        self._options = options or StreamOptions()
        self._num_choices = num_choices
        self._has_logprobs = has_logprobs
        mark = "\0"
        self._frames = [
            sse_data(orjson.dumps(self._chunk(i, {"content": mark}))).split(orjson.dumps(mark))
            for i in range(num_choices)
        ]
        self._num_calls = [0] * num_choices

    def _chunk(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = self._envelope.as_json("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self._options.include_usage else chunk

    def begin(self) -> bytes:
        role = {"role": "assistant", "content": ""}
        return b"".join(frame(self._chunk(i, role)) for i in range(self._num_choices))

    def delta(self, index: int, delta: Delta) -> bytes:
        options = self._options
        is_content = delta.channel is Channel.CONTENT and not delta.calls and delta.part is None
        if isinstance(delta.part, Closed | Broken) and not delta.logprobs:
            return b""  # OpenAI has no word for the end of a call
        has_extras = delta.logprobs or options.continuous_usage or options.timings_per_token
        if is_content and not has_extras:
            head, tail = self._frames[index]
            return head + orjson.dumps(delta.text) + tail
        chunk = self._chunk(index, self._said(index, delta))
        if delta.logprobs:
            content = logprobs_json(delta.logprobs, self._token_bytes)
            chunk["choices"][0]["logprobs"] = {"content": content}
        return frame(self._with_usage(chunk, delta.usage))

    def _said(self, index: int, delta: Delta) -> dict[str, Any]:
        if delta.channel is Channel.REASONING:
            return {"reasoning_content": delta.text, "reasoning": delta.text}
        match delta.part:
            case Opened(id, name):
                self._num_calls[index] += 1
                opening = {"index": self._num_calls[index] - 1} | call_json(Call(id, name, ""))
                return {"tool_calls": [opening]}
            case Arguments(text):
                more = {"index": self._num_calls[index] - 1, "function": {"arguments": text}}
                return {"tool_calls": [more]}
            case Closed() | Broken():
                return {}
        if not delta.calls:
            return {"content": delta.text}
        first = self._num_calls[index]
        self._num_calls[index] += len(delta.calls)
        calls = [{"index": i} | call_json(call) for i, call in enumerate(delta.calls, first)]
        return {"tool_calls": calls}

    def _with_usage(self, chunk: dict[str, Any], usage: Usage | None) -> dict[str, Any]:
        if usage is not None and self._options.continuous_usage:
            chunk["usage"] = usage_json(usage)
        if usage is not None and self._options.timings_per_token:
            chunk["timings"] = timings_json(usage)
        return chunk

    def progress(self, index: int, progress: Progress) -> bytes:
        """llama-server's `prompt_progress`."""
        usage = progress.usage
        chunk = self._chunk(index, {})
        chunk["prompt_progress"] = {
            "total": usage.num_prompt,
            "cache": usage.num_cached,
            "processed": progress.num_computed,
            "time_ms": round(usage.prefill_s * 1000, 3),
        }
        return frame(chunk)

    def done(self, index: int, done: Done, total: Usage | None) -> bytes:
        """The last finish chunk carries the usage and timings of all.

        With `include_usage` only the separate chunk has the usage, or clients that add up would
        count it twice; the timings stay.
        """
        chunk = self._chunk(index, {}, finish_reason(done))
        chunk["choices"][0]["stop_reason"] = done.stop  # vLLM's
        if total is None:
            return frame(chunk)
        chunk["timings"] = timings_json(total)
        if not self._options.include_usage:
            chunk["usage"] = usage_json(total)
            return frame(chunk) + SSE_DONE
        last = self._envelope.as_json("chat.completion.chunk") | {"choices": []}
        return frame(chunk) + frame(last | {"usage": usage_json(total)}) + SSE_DONE

    def fail(self, error: APIError) -> bytes:
        return stream_failure(error)

    def whole(self, choices: Sequence[Choice], total: Usage) -> bytes:
        for choice in choices:
            if self._has_logprobs:
                choice.logprobs = logprobs_json(choice.drawn, self._token_bytes)
        answer = self._envelope.as_json("chat.completion")
        answer |= {"choices": [choice.as_json(i) for i, choice in enumerate(choices)]}
        answer |= {"usage": usage_json(total), "timings": timings_json(total)}
        return orjson.dumps(answer)


def parse_chat(body: bytes) -> ChatRequest:
    """Validate a chat completion's body. Raises APIError 400 naming the field at fault."""
    return chat_of(parse_object(body))


def chat_of(value: dict[str, Any]) -> ChatRequest:
    """The same for a parsed one."""
    read = read_fields(value, FIELDS)
    check_together(read)
    if read.get("top_logprobs") and not read.get("logprobs"):
        raise bad("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
    if "messages" not in read:
        raise bad("'messages' is required.", "messages")
    kwargs = dict(read.get("chat_template_kwargs", {}))
    if (effort := read.get("reasoning_effort")) is not None:
        # As llama-server and vLLM: templates know one or the other of these.
        kwargs = {"enable_thinking": effort != "none", "reasoning_effort": effort} | kwargs
    top_logprobs = read.get("top_logprobs", 0) if read.get("logprobs") else None
    request = ChatRequest(
        **options_of(value, read, FIELDS),
        top_logprobs=top_logprobs,
        messages=read["messages"],
        template_kwargs=kwargs,
        continue_final=_continues(read),
        tools=tools_of(read),
        max_calls=1 if read.get("parallel_tool_calls") is False else None,
        splits_reasoning=read.get("reasoning_format", "auto") != "none",
    )
    if request.continue_final and request.messages[-1].role is not Role.ASSISTANT:
        message = "'continue_final_message' needs an assistant's message at the end."
        raise bad(message, "continue_final_message")
    return request


def _continues(read: Mapping[str, Any]) -> bool | None:
    """What the request says of its last message. Raises APIError 400."""
    wanted, prompted = read.get("continue_final_message"), read.get("add_generation_prompt")
    if wanted and prompted:
        message = "'continue_final_message' and 'add_generation_prompt' exclude each other."
        raise bad(message, "continue_final_message")
    if prompted is False and not wanted:
        message = "'add_generation_prompt': false is only possible with 'continue_final_message'."
        raise bad(message, "add_generation_prompt")
    return False if prompted else wanted


def field_table() -> str:
    """`FIELDS` as the README's Markdown table."""
    return markdown(FIELDS)


def prepare_chat(
    model: Model, body: bytes, tenant: bytes, config: Config, *, is_patient: bool = False
) -> tuple[ChatRequest, Prompt]:
    """A chat's body to its prompt: the part of a request that costs time and needs no loop."""
    request = parse_chat(body)
    prompt = render(model, request, config, is_patient=is_patient)
    return request, cacheable(model, prompt, request, tenant, config)
