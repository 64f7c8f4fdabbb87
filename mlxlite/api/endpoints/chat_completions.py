"""POST /v1/chat/completions: OpenAI's chat, parsed and written."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from mlxlite.api.constraints import (
    CONSTRAINT_FIELDS,
    ToolUse,
    function_list,
    take_constraints,
    tool_choice,
    tool_list,
)
from mlxlite.api.conversation import Role
from mlxlite.api.endpoint import Endpoint
from mlxlite.api.fields import (
    Field,
    Given,
    read_fields,
    supported,
    unsupported,
    unsupported_each,
)
from mlxlite.api.generate import Dialect
from mlxlite.api.openai_content import messages_of
from mlxlite.api.readers import flag, one_of, parse_object
from mlxlite.api.request import (
    COMPLETION_FIELDS,
    MAX_TOP_LOGPROBS,
    TEMPLATE_FIELDS,
    TOP_LOGPROBS,
    UNSUPPORTED_FIELDS,
    ChatRequest,
    effort,
    shared_options,
    sole_constraint,
    template_kwargs,
)
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

FIELDS: Final[Mapping[str, Field]] = {
    "messages": supported(
        messages_of,
        "string, null or parts: text, and images of users and tools; every role; tool history",
    ),
    **COMPLETION_FIELDS,
    **CONSTRAINT_FIELDS,
    **TEMPLATE_FIELDS,
    "reasoning_effort": supported(
        effort, "an argument of the chat template; `none` also sets `enable_thinking` to false"
    ),
    "reasoning_format": supported(
        one_of("auto", "none", "split", "deepseek"), "`none`: in the content; else apart from it"
    ),
    "continue_final_message": supported(flag, "a trailing assistant message is continued anyway"),
    "add_generation_prompt": supported(flag, "false only with `continue_final_message`"),
    "logprobs": supported(flag, "of the drawn tokens, before any sampling setting"),
    "top_logprobs": supported(TOP_LOGPROBS, f"0 to {MAX_TOP_LOGPROBS}"),
    "tools": supported(tool_list, "functions; how they are called is the model's own format"),
    "tool_choice": supported(
        tool_choice, "`required` and a name are enforced where the model's calls are JSON"
    ),
    "functions": supported(function_list, "the older form of `tools`"),
    "function_call": supported(tool_choice, "the older form of `tool_choice`"),
    "parallel_tool_calls": supported(flag, "false: the answer ends after its first call"),
    "modalities": unsupported(["text"]),
    "verbosity": unsupported("medium"),
    **unsupported_each("echo", False),
    **UNSUPPORTED_FIELDS,
}


def parse_chat(body: bytes) -> ChatRequest:
    """Validate a chat completion's body. Raises APIError 400 naming the field at fault."""
    given = read_fields(parse_object(body), FIELDS, "messages")
    options = shared_options(given)
    options["sampling"] |= _logprobs(given)
    use = _tool_use(given)
    request = ChatRequest(
        **options,
        constraint=sole_constraint(options, take_constraints(given) + use.constraints()),
        messages=given.take("messages"),
        template_kwargs=template_kwargs(given, given.take("reasoning_effort")),
        continue_final=_continues(given),
        tools=use.callable,
        max_calls=use.max_calls,
        splits_reasoning=given.take("reasoning_format") != "none",
    )
    given.close()
    if request.continue_final and request.messages[-1].role is not Role.ASSISTANT:
        message = "'continue_final_message' needs an assistant's message at the end."
        raise bad(message, "continue_final_message")
    return request


def _logprobs(given: Given) -> dict[str, Any]:
    wanted, num_top = given.take("logprobs", False), given.take("top_logprobs", 0)
    if num_top and not wanted:
        raise bad("'top_logprobs' needs 'logprobs': true.", "top_logprobs")
    return {"top_logprobs": num_top} if wanted else {}


def _tool_use(given: Given) -> ToolUse:
    """Tools and their choice, by their newer or their older names. Raises APIError 400."""
    taken: dict[str, Any] = {}
    for name, old in (("tools", "functions"), ("tool_choice", "function_call")):
        value, older = given.take(name), given.take(old)
        if value is not None and older is not None and value != older:
            raise bad(f"'{old}' and its newer form '{name}' disagree.", old)
        taken |= {name: value, old: older}
    param = "function_call" if taken["tool_choice"] is None else "tool_choice"
    return ToolUse(
        tools=taken["tools"] or taken["functions"] or (),
        choice=taken[param] or "auto",
        is_parallel=given.take("parallel_tool_calls", True),
        param=param,
    )


def _continues(given: Given) -> bool | None:
    """Whether the last message is to be continued; None: where it is the assistant's."""
    wanted, prompted = given.take("continue_final_message"), given.take("add_generation_prompt")
    if wanted and prompted:
        message = "'continue_final_message' and 'add_generation_prompt' exclude each other."
        raise bad(message, "continue_final_message")
    if prompted is False and not wanted:
        message = "'add_generation_prompt': false is only possible with 'continue_final_message'."
        raise bad(message, "add_generation_prompt")
    return False if prompted else wanted


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


def _writer(
    envelope: Envelope, request: ChatRequest, model: Model, prompts: Sequence[Prompt]
) -> ChatWriter:
    return ChatWriter(
        envelope,
        model.token_bytes,
        request.stream_options,
        num_choices=request.num_choices,
        has_logprobs=request.has_logprobs,
    )


ENDPOINTS: Final = (
    Endpoint(
        method="POST",
        path="/v1/chat/completions",
        summary="A chat completion",
        fields=FIELDS,
        required=("messages",),
        answer_schema="ChatCompletion",
        handle=Dialect(parse=parse_chat, writer=_writer, id_prefix="chatcmpl-").handle,
    ),
)
