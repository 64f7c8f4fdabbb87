"""Generation requests: the record that every dialect's body becomes, and the shared fields. Pure.

A dialect adds its own fields to `GENERATION_FIELDS`, reads a body by the table, takes the shared
fields with `shared_options` and its own by hand. Past the parsers there are no dicts with string
keys until an answer is built, except `sampling`, which only `SamplingParams` reads, and the input
of the model's own template (`Message.as_template`, `template_kwargs`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from mlxlite.api.conversation import Message, Role
from mlxlite.api.fields import Given
from mlxlite.api.left_out import leave_out
from mlxlite.api.shared_fields import SAMPLING_FIELDS
from mlxlite.api.tools import Tool
from mlxlite.api.writers import StreamOptions
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.http.errors import bad_request
from mlxlite.output.constraint import Constraint
from mlxlite.vision.images import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """How an answer is generated and given. None: the request does not set it.

    `sampling` are the fields of `SamplingParams` that the request sets.
    """

    prompt_field: ClassVar[str] = "messages"  # the field that an error about the prompt names
    model: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    ignore_eos: bool = False
    stop_tokens: tuple[int, ...] = ()
    num_choices: int = 1
    priority: int = 0
    stop: tuple[str, ...] = ()
    is_stream: bool = False
    stream_options: StreamOptions = field(default_factory=StreamOptions)
    return_progress: bool = False
    cache_prompt: bool = True
    cache_salt: str = ""
    constraint: tuple[Constraint, str] | None = None  # and its field
    thinking_budget: int | None = None  # tokens of reasoning, after which it is closed
    ignored: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[Source, ...]:
        return ()

    def without_sources(self) -> Self:
        """The same without its images, once they are read: an answer may take long."""
        return self

    @property
    def has_logprobs(self) -> bool:
        return self.sampling.get("top_logprobs") is not None

    def sampling_params(self, defaults: SamplingParams, seed: int) -> SamplingParams:
        """The model's defaults with the request's parameters; `seed` where it sets none."""
        return replace(defaults, **{"seed": seed, **self.sampling})


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(Request):
    """A chat: messages, and the tools that may be called."""

    messages: tuple[Message, ...]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool | None = None
    tools: tuple[Tool, ...] = ()
    max_calls: int | None = None
    has_functions: bool = False  # tools in OpenAI's older form, which calls are answered in
    splits_reasoning: bool = True

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(source for message in self.messages for source in message.sources)

    def without_sources(self) -> Self:
        if not self.sources:
            return self
        return replace(self, messages=tuple(replace(one, parts=()) for one in self.messages))

    @property
    def asked_sources(self) -> tuple[Source, ...]:
        """The pictures that the user asks about: of the messages after the assistant's last."""
        roles = [message.role for message in self.messages]
        num_old = len(roles) - roles[::-1].index(Role.ASSISTANT) if Role.ASSISTANT in roles else 0
        asked = (m for m in self.messages[num_old:] if m.role is Role.USER)
        return tuple(source for message in asked for source in message.sources)

    @property
    def is_continuation(self) -> bool:
        """True if the last message is to be continued: an assistant's is, unless forbidden."""
        last = self.messages[-1]
        is_open = last.role is Role.ASSISTANT and not last.tool_calls
        return is_open if self.continue_final is None else self.continue_final


def shared_options(given: Given, max_tokens_name: str = "max_tokens") -> dict[str, Any]:
    """The arguments of `Request` that all dialects read alike, but `ignored`.

    Raises APIError 400.
    """
    is_stream = given.take("stream", False)
    stream_options = given.take("stream_options")
    if stream_options is not None and not is_stream:
        leave_out("stream_options")
    max_tokens, sampling = given.take("max_tokens"), given.take_each(SAMPLING_FIELDS)
    if max_tokens is not None and sampling.get("min_tokens", 0) > max_tokens:
        raise bad_request(f"'min_tokens' must not be more than '{max_tokens_name}'.", "min_tokens")
    same = ("model", "ignore_eos", "priority", "return_progress", "cache_prompt", "cache_salt")
    return {
        **given.take_each(dict.fromkeys((*same, "thinking_budget"))),
        "sampling": sampling,
        "max_tokens": max_tokens,
        "stop": given.take("stop", ()),
        "stop_tokens": given.take("stop_token_ids", ()),
        "num_choices": given.take("n", 1),
        "is_stream": is_stream,
        "stream_options": replace(
            stream_options or StreamOptions(),
            timings_per_token=given.take("timings_per_token", False),
        ),
    }


def logprobs_option(given: Given, *, is_wanted: bool, needed: str) -> dict[str, Any]:
    """The sampling parameter of `top_logprobs`, which needs another field. Raises APIError 400."""
    num_top = given.take("top_logprobs", 0)
    if num_top and not is_wanted:
        raise bad_request(f"'top_logprobs' needs {needed}.", "top_logprobs")
    return {"top_logprobs": num_top} if is_wanted else {}


def sole_constraint(
    options: Mapping[str, Any], constraints: list[tuple[Constraint, str]]
) -> tuple[Constraint, str] | None:
    """The one constraint of a request, and its field. Raises APIError 400."""
    if not constraints:
        return None
    if len(constraints) > 1:
        names = " and ".join(f"'{name}'" for _, name in constraints)
        raise bad_request(f"{names} exclude each other.", constraints[1][1])
    for other, given in (("ignore_eos", options), ("min_tokens", options["sampling"])):
        if given.get(other):
            raise bad_request(f"'{other}' cannot be had with '{constraints[0][1]}'.", other)
    return constraints[0]


def template_kwargs(
    given: Given, effort: str | None, is_thinking: bool | None = None
) -> dict[str, Any]:
    """The chat template's arguments: templates know one or the other of these names."""
    kwargs: dict[str, Any] = {}
    if effort is not None:  # as llama-server and vLLM
        kwargs = {"enable_thinking": effort != "none", "reasoning_effort": effort}
    for wanted in (is_thinking, given.take("enable_thinking")):
        if wanted is not None:
            kwargs["enable_thinking"] = wanted
    return {**kwargs, **given.take("chat_template_kwargs", {})}
