"""Generation requests: the record that every dialect's body becomes, and the shared fields. Pure.

A dialect adds its own fields to `GENERATION_FIELDS`, reads a body by the table, takes the shared
fields with `shared_options` and its own by hand. Past the parsers there are no dicts with string
keys until an answer is built, except `sampling`, which only `SamplingParams` reads, and the input
of the model's own template (`Message.as_template`, `template_kwargs`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, Self, TypeVar

from mlxlite.api.conversation import Message, Role
from mlxlite.api.fields import Given
from mlxlite.api.left_out import leave_out
from mlxlite.api.shared_fields import SAMPLING_FIELDS
from mlxlite.api.tools import Tool
from mlxlite.api.writers import StreamOptions
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.sequence import Prompt
from mlxlite.http.errors import bad_request
from mlxlite.output.constraint import Constraint
from mlxlite.vision.images import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """How an answer is generated and given. None: the request does not set it.

    `sampling` are the fields of `SamplingParams` that the request sets.
    """

    prompt_field: ClassVar[str] = "messages"  # the field that an error about the prompt names
    default_max_tokens: ClassVar[int | None] = None  # None: what is left of the context
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
    prompt_logprobs: int | None = None  # of each of the prompt's tokens, with so many rivals
    shows_stop: bool = False  # the stop string is a part of the text
    shows_special: bool = False  # special tokens too
    has_ids: bool = False  # logprobs name tokens by their ids
    returns_tokens: bool = False
    num_last: int | None = None  # the prompt's tokens that are used: the last ones
    max_predict_ms: int | None = None  # after which an answer of more than a line ends
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

    @property
    def prompt_top(self) -> int | None:
        """How many of the best tokens are wanted at each place of the prompt; None: no place."""
        return self.prompt_logprobs

    @property
    def fills_in(self) -> bool:
        """Whether the answer is the middle of a text."""
        return False

    @property
    def reports_end(self) -> bool:
        """Whether the token that ends an answer is among those with logprobs."""
        return False

    @property
    def needs_usage(self) -> bool:
        """Whether the usage is wanted with every token."""
        return self.stream_options.has_extras or self.max_predict_ms is not None

    def writer_options(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The arguments of OpenAI's writers that requests set alike."""
        needs_prompts = self.returns_tokens or self.stream_options.continuous_usage
        return {
            "num_per_prompt": self.num_choices,
            "has_logprobs": self.has_logprobs,
            "has_prompt_logprobs": self.prompt_logprobs is not None,
            "has_ids": self.has_ids,
            "prompts": prompts if needs_prompts else (),
            "returns_tokens": self.returns_tokens,
        }

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
    shows_reasoning: bool = True

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(source for message in self.messages for source in message.sources)

    def without_sources(self) -> Self:
        if not self.sources:
            return self
        return replace(self, messages=tuple(replace(one, parts=()) for one in self.messages))

    @property
    def asked_sources(self) -> tuple[Source, ...]:
        """The pictures that the user asks about, see `asked_index`: of the user's last message,
        unless an answer comes after it, or a tool's result before it.
        """
        roles = [None, *(message.role for message in self.messages)]
        last = max((i for i, role in enumerate(roles) if role is Role.USER), default=0)
        before = roles[last - 1]
        if last == 0 or Role.ASSISTANT in roles[last:] or (before and before.is_result):
            return ()
        return self.messages[last - 1].sources

    @property
    def is_continuation(self) -> bool:
        """True if the last message is to be continued: an assistant's is, unless forbidden."""
        last = self.messages[-1]
        is_open = last.role is Role.ASSISTANT and not last.tool_calls
        return is_open if self.continue_final is None else self.continue_final


# Fields whose attributes have other names, and what is as good as none.
_ATTRIBUTES: Final = {
    "include_stop_str_in_output": ("shows_stop", False),
    "skip_special_tokens": ("shows_special", False),
    "return_tokens_as_token_ids": ("has_ids", False),
    "return_token_ids": ("returns_tokens", False),
    "truncate_prompt_tokens": ("num_last", None),
    "t_max_predict_ms": ("max_predict_ms", None),
}


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
    if words := given.take("bad_words"):
        sampling["bad_words"] = words  # as texts; `render.with_bad_words` makes them tokens
    same = ("model", "ignore_eos", "priority", "return_progress", "cache_prompt", "cache_salt")
    given_as_named = given.take_each(dict.fromkeys((*same, "thinking_budget", "prompt_logprobs")))
    return {
        **given_as_named,
        **{attribute: given.take(name, off) for name, (attribute, off) in _ATTRIBUTES.items()},
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


R = TypeVar("R", bound=Request)


def checked(request: R) -> R:
    """A request whose answer can be given. Raises APIError 400."""
    if request.max_tokens == 0 and request.prompt_top is None:
        message = "'max_tokens' must be at least 1, but for the likelihoods of a prompt."
        raise bad_request(message, "max_tokens")
    if request.is_stream and request.prompt_logprobs is not None:
        raise bad_request("'prompt_logprobs' cannot be streamed.", "prompt_logprobs")
    return request


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
