"""POST /v1/chat/completions: OpenAI's chat, parsed and written."""

from collections.abc import Sequence
from typing import Any, Final

from mlxlite.api import fields, shared_fields, writers
from mlxlite.api.constraints import CONSTRAINT_FIELDS, take_constraints
from mlxlite.api.content_parts import PARTS
from mlxlite.api.conversation import Role, ToolCall
from mlxlite.api.endpoint import Endpoint
from mlxlite.api.fields import hint, required, supported, unsupported
from mlxlite.api.generate import Dialect
from mlxlite.api.openai_content import messages_of
from mlxlite.api.readers import describes, flag, one_of, parse_object, wrong
from mlxlite.api.request import (
    ChatRequest,
    checked,
    logprobs_option,
    shared_options,
    sole_constraint,
    template_kwargs,
)
from mlxlite.api.tools import (
    CHAT_TOOLS,
    Tool,
    ToolUse,
    free_text,
    function_list,
    tool_choice,
    tool_list,
)
from mlxlite.engine.sequence import Logprobs, Prompt
from mlxlite.http.errors import bad_request
from mlxlite.models.interface import Model
from mlxlite.output import events


@describes(type=["boolean", "integer"], minimum=0, maximum=shared_fields.MAX_TOP_LOGPROBS)
def _logprobs(value: Any, param: str) -> int | bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, int | float):
        raise wrong(param, "a boolean or an integer", value)
    number: int = shared_fields.TOP_LOGPROBS(value, param)
    return number


FIELDS: Final[fields.Table] = {
    "messages": required(
        messages_of,
        "string, null or parts: text, and images of users and tools; every role; tool history",
    ),
    **shared_fields.COMPLETION_FIELDS,
    **CONSTRAINT_FIELDS,
    **shared_fields.TEMPLATE_FIELDS,
    "reasoning_effort": supported(
        shared_fields.effort,
        "an argument of the chat template; `none` also sets `enable_thinking` to false",
    ),
    "thinking": supported(shared_fields.thinking, "`enable_thinking`, in the words of others"),
    "reasoning_format": supported(
        one_of("auto", "none", "split", "deepseek", "deepseek-legacy"),
        "`none`: in the content; else apart from it",
    ),
    "continue_final_message": supported(flag, "a trailing assistant message is continued anyway"),
    "add_generation_prompt": supported(flag, "false only with `continue_final_message`"),
    "logprobs": supported(
        _logprobs, "of the drawn tokens, before any sampling setting; a number is `top_logprobs`"
    ),
    "n_probs": supported(shared_fields.TOP_LOGPROBS, "llama-server's `top_logprobs`; 0 is off"),
    "include_reasoning": supported(flag, "false: reasoning is generated and not shown"),
    "top_logprobs": supported(shared_fields.TOP_LOGPROBS, f"0 to {shared_fields.MAX_TOP_LOGPROBS}"),
    "tools": supported(tool_list, "how they are called is the model's own format"),
    "tool_choice": supported(
        tool_choice, "`required` and a name are enforced; needs the extra `grammar`"
    ),
    "functions": supported(function_list, "the older form of `tools`"),
    "function_call": supported(tool_choice, "the older form of `tool_choice`"),
    "parallel_tool_calls": supported(flag, "false: the answer ends after its first call"),
    "modalities": unsupported(["text"]),
    "verbosity": hint("medium"),
    **fields.unsupported_each("echo", False),
    **shared_fields.UNSUPPORTED_FIELDS,
}


def parse_chat(body: bytes) -> ChatRequest:
    """Validate a chat completion's body. Raises APIError 400 naming the field at fault."""
    with fields.reading(parse_object(body), FIELDS) as given:
        options, (use, has_functions) = shared_options(given), _tool_use(given)
        options["sampling"] |= _logprobs_options(given)
        request = ChatRequest(
            **options,
            constraint=sole_constraint(options, use.constraints(take_constraints(given))),
            messages=given.take("messages"),
            template_kwargs=template_kwargs(
                given, given.take("reasoning_effort"), given.take("thinking")
            ),
            continue_final=_continues(given),
            tools=use.callable,
            max_calls=use.max_calls,
            has_functions=has_functions,
            shows_reasoning=given.take("include_reasoning", True),
            splits_reasoning=given.take("reasoning_format") != "none",
            ignored=given.ignored,
        )
    if request.continue_final and request.messages[-1].role is not Role.ASSISTANT:
        message = "'continue_final_message' needs an assistant's message at the end."
        raise bad_request(message, "continue_final_message")
    return checked(request)


def _logprobs_options(given: fields.Given) -> dict[str, Any]:
    wanted, num_probs = given.take("logprobs", False), given.take("n_probs", 0)
    is_wanted, needed = wanted is not False or num_probs > 0, "'logprobs': true"
    options = logprobs_option(given, is_wanted=is_wanted, needed=needed)
    numbers = [num for num in (wanted, num_probs) if not isinstance(num, bool)]
    return {name: max(num, *numbers) for name, num in options.items()}


def _tool_use(given: fields.Given) -> tuple[ToolUse, bool]:
    """The tools, and whether they are in the older form, `functions`."""
    taken: dict[str, Any] = {}
    for name, old in (("tools", "functions"), ("tool_choice", "function_call")):
        value, older = given.take(name), given.take(old)
        if value is not None and older is not None and value != older:
            raise bad_request(f"'{old}' and its newer form '{name}' disagree.", old)
        taken |= {name: value, old: older}
    param = "function_call" if taken["tool_choice"] is None else "tool_choice"
    is_parallel = given.take("parallel_tool_calls", True)
    has_functions = bool(taken["functions"]) and taken["tools"] is None
    use = ToolUse(
        tools=taken["tools"] or taken["functions"] or (),
        choice=taken[param] or "auto",
        is_parallel=is_parallel and not has_functions,  # that form has one call
        param=param,
    )
    return use, has_functions


def _continues(given: fields.Given) -> bool | None:
    """Whether the last message is to be continued; None: where it is the assistant's."""
    wanted, prompted = given.take("continue_final_message"), given.take("add_generation_prompt")
    if wanted and prompted:
        message = "'continue_final_message' and 'add_generation_prompt' exclude each other."
        raise bad_request(message, "continue_final_message")
    if prompted is False and not wanted:
        message = "'add_generation_prompt': false is only possible with 'continue_final_message'."
        raise bad_request(message, "add_generation_prompt")
    return False if prompted else wanted


class ChatWriter(writers.OpenAIWriter):
    """A chat completion: each choice has a chunk of its role, its text, and one that ends it.

    A call of a tool of free text has its text in one chunk. Where the request has `functions`, the
    older form of `tools`, so has the answer.
    """

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(
        self,
        *args: Any,
        tools: Sequence[Tool] = (),
        has_functions: bool = False,
        shows_reasoning: bool = True,
        num_choices: int = 1,
        **rest: Any,
    ) -> None:
        self._free_text = frozenset(tool.name for tool in tools if tool.is_free_text)
        self._has_functions = has_functions
        self._shows_reasoning = shows_reasoning
        self._open_tools = [""] * num_choices  # of each choice, the tool called last
        super().__init__(*args, num_choices=num_choices, **rest)

    def begin(self) -> bytes:
        role = {"delta": {"role": "assistant", "content": ""}}
        choices = range(len(self._num_calls))
        return b"".join(writers.frame(self._first_chunk(i, role)) for i in choices)

    def event(self, index: int, event: writers.Shown) -> bytes:
        if isinstance(event, events.ReasoningDelta) and not (
            self._shows_reasoning or event.logprobs or event.tokens
        ):
            return b""
        if isinstance(event, events.ToolCallStart):
            self._open_tools[index] = event.name
        if self._open_tools[index] not in self._free_text:
            return super().event(index, event)
        match event:
            case events.ToolCallArguments() if not event.logprobs:
                return b""
            case events.ToolCallEnd(arguments):
                delta = self._call_delta(index, {"custom": {"input": free_text(arguments)}})
                return writers.frame(self._chunk(index, {"delta": delta}))
        return super().event(index, event)

    def _choice(self, *args: Any, **rest: Any) -> dict[str, Any]:
        choice = super()._choice(*args, **rest)
        if self._has_functions and choice["finish_reason"] == "tool_calls":
            choice["finish_reason"] = "function_call"
        return choice

    def _choice_delta(self, index: int, event: events.ParserEvent | None) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        match event:
            case events.TextDelta(text):
                delta = {"content": text}
            case events.ReasoningDelta(text) if self._shows_reasoning:
                delta = {"reasoning_content": text, "reasoning": text}
            case events.ToolCallStart(id, name):
                delta = self._call_delta(index, self._call(ToolCall(id, name, "")))
            case events.ToolCallArguments(text) if self._open_tools[index] not in self._free_text:
                delta = self._call_delta(index, {"function": {"arguments": text}})
        return {"delta": delta}

    def _call_delta(self, index: int, call: dict[str, Any]) -> dict[str, Any]:
        if self._has_functions:
            return {"function_call": call["function"]}
        return {"tool_calls": [{"index": self._num_calls[index] - 1} | call]}

    def _call(self, call: ToolCall) -> dict[str, Any]:
        if call.name not in self._free_text:
            return call.as_json()
        custom = {"name": call.name, "input": free_text(call.arguments)}
        return {"id": call.id, "type": "custom", "custom": custom}

    def _logprobs(self, index: int, drawn: Sequence[tuple[int, Logprobs]]) -> dict[str, Any]:
        content = writers.logprobs_json(drawn, self._token_bytes, has_ids=self._has_ids)
        return {"content": content}

    def _content(self, index: int, choice: writers.Collected) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": choice.text if choice.text or not choice.calls else None,
            "refusal": None,
        }
        if (reasoning := choice.reasoning) and self._shows_reasoning:
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        calls = [self._call(call) for call in choice.calls]
        if calls and self._has_functions:
            message["function_call"] = calls[0]["function"]
        elif calls:
            message["tool_calls"] = calls
        return {"message": message}

    def _more(self) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self._has_prompt_logprobs:
            more["prompt_logprobs"] = self._prompts[0].json()
        if self._returns_tokens:
            more["prompt_token_ids"] = self._prompt_tokens[0]
        return more


def _writer(
    envelope: writers.Envelope, request: ChatRequest, model: Model, prompts: Sequence[Prompt]
) -> ChatWriter:
    return ChatWriter(
        envelope,
        model.token_bytes,
        request.stream_options,
        num_choices=request.num_choices,
        tools=request.tools,
        has_functions=request.has_functions,
        shows_reasoning=request.shows_reasoning,
        **request.writer_options(prompts),
    )


ENDPOINTS: Final = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        "A chat completion",
        Dialect(parse=parse_chat, writer=_writer, id_prefix="chatcmpl-").handle,
        FIELDS,
        answer_schema="ChatCompletion",
        kinds={"tools": CHAT_TOOLS, "content parts": PARTS},
    ),
)
