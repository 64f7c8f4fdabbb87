"""Generation requests: what every dialect's body becomes, and the fields all share. Pure.

A dialect adds its own fields to `GENERATION_FIELDS`, reads a body by the table, takes the shared
fields with `shared_options` and its own by hand. Past the parsers there are no dicts with string
keys until an answer is built, except `sampling`, which only `SamplingParams` reads, and what
belongs to the model's own template (`Message.as_template`, `template_kwargs`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

from mlxlite.api.conversation import Message, Role, Tool
from mlxlite.api.fields import (
    Field,
    Given,
    Use,
    no_op,
    supported,
    table_of,
    unsupported,
    unsupported_each,
)
from mlxlite.api.readers import flag, integer, json_object, one_of, only, text, token_ids, wrong
from mlxlite.api.writers import StreamOptions
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.http.errors import bad, clip
from mlxlite.output.grammar import Constraint
from mlxlite.vision.images import Source

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_SALT = 128  # characters, as in vLLM
MAX_STOP_STRINGS = 16
MAX_STOP_BYTES = 1024  # each; bounds the text a stream holds back
MAX_STOP_TOKENS = 1024
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20  # OpenAI's and vLLM's
_MAX_INT = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """How an answer is generated and given. None means that the request was silent.

    `sampling` are the fields of `SamplingParams` that the request sets.
    """

    prompt_field: ClassVar[str] = "messages"  # what an error about the prompt names
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
    constraint: tuple[Constraint, str] | None = None  # and the field that it comes from
    thinking_budget: int | None = None  # tokens of reasoning, after which it is closed
    ignored: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[Source, ...]:
        """Of all images, in the order of the messages."""
        return ()

    @property
    def has_logprobs(self) -> bool:
        return self.sampling.get("top_logprobs") is not None

    def sampling_params(self, defaults: SamplingParams, seed: int) -> SamplingParams:
        """The model's defaults with what the request sets; `seed` where it sets none."""
        return replace(defaults, **{"seed": seed, **self.sampling})


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(Request):
    """A request that is a chat: messages, and the tools that may be called."""

    messages: tuple[Message, ...]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool | None = None
    tools: tuple[Tool, ...] = ()
    max_calls: int | None = None
    splits_reasoning: bool = True

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(source for message in self.messages for source in message.sources)

    @property
    def is_continuation(self) -> bool:
        """A last message that is the assistant's is continued, unless the request forbids it."""
        last = self.messages[-1]
        is_open = last.role is Role.ASSISTANT and not last.tool_calls
        return is_open if self.continue_final is None else self.continue_final


def shared_options(given: Given, max_tokens_name: str = "max_tokens") -> dict[str, Any]:
    """The arguments of `Request` that all dialects read alike. Raises APIError 400.

    `max_tokens_name` is what the dialect calls `max_tokens`.
    """
    is_stream = given.take("stream", False)
    stream_options = given.take("stream_options")
    if stream_options is not None and not is_stream:
        raise bad("'stream_options' needs 'stream': true.", "stream_options")
    max_tokens, sampling = given.take("max_tokens"), given.take_each(SAMPLING_FIELDS)
    if max_tokens is not None and sampling.get("min_tokens", 0) > max_tokens:
        raise bad(f"'min_tokens' must not be more than '{max_tokens_name}'.", "min_tokens")
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
        "ignored": given.ignored,
    }


def sole_constraint(
    options: Mapping[str, Any], constraints: list[tuple[Constraint, str]]
) -> tuple[Constraint, str] | None:
    """What the answer must match, and the field that asks for it. Raises APIError 400."""
    if not constraints:
        return None
    if len(constraints) > 1:
        names = " and ".join(f"'{name}'" for _, name in constraints)
        raise bad(f"{names} exclude each other.", constraints[1][1])
    for other, is_set in (
        ("ignore_eos", options.get("ignore_eos")),
        ("min_tokens", options["sampling"].get("min_tokens")),
    ):
        if is_set:
            raise bad(f"'{other}' cannot be had with '{constraints[0][1]}'.", other)
    return constraints[0]


def template_kwargs(
    given: Given, effort: str | None, is_thinking: bool | None = None
) -> dict[str, Any]:
    """The chat template's arguments: templates know one or the other of these names."""
    kwargs: dict[str, Any] = {}
    if effort is not None:  # as llama-server and vLLM
        kwargs = {"enable_thinking": effort != "none", "reasoning_effort": effort}
    if is_thinking is not None:
        kwargs["enable_thinking"] = is_thinking
    return {**kwargs, **given.take("chat_template_kwargs", {})}


# --- readers ----------------------------------------------------------------------------------


def _max_tokens(value: Any, param: str) -> int | None:
    """-1 is llama-server's «no limit»."""
    number: int = integer(-1, _MAX_INT)(value, param)
    if number == 0:
        raise bad(f"'{param}' must be at least 1.", param)
    return None if number == -1 else number


def _salt(value: Any, param: str) -> str:
    if len(text(value, param)) > MAX_SALT:
        raise bad(f"'{param}' is longer than {MAX_SALT} characters.", param)
    return str(value)


def _stop(value: Any, param: str) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise wrong(param, "a string or an array of strings", value)
    if len(strings) > MAX_STOP_STRINGS:
        raise bad(f"'{param}' may hold at most {MAX_STOP_STRINGS} strings.", param)
    for string in strings:
        if not text(string, param):
            raise bad(f"'{param}' must not hold an empty string.", param)
        if len(string.encode()) > MAX_STOP_BYTES:
            raise bad(f"a string in '{param}' is longer than {MAX_STOP_BYTES} bytes.", param)
    return tuple(dict.fromkeys(strings))


def _stop_tokens(value: Any, param: str) -> tuple[int, ...]:
    return token_ids(value, param, MAX_STOP_TOKENS)


def _stream_options(value: Any, param: str) -> StreamOptions:
    options = json_object(value, param)

    def is_on(name: str) -> bool:
        wanted = options.get(name)
        return wanted is not None and flag(wanted, f"{param}.{name}")

    include, continuous = is_on("include_usage"), is_on("continuous_usage_stats")
    is_on("include_obfuscation")  # OpenAI's: padding against eavesdroppers, of no use on loopback
    return StreamOptions(include, include and continuous)


# Arguments of transformers' renderer, which a template does not see.
_RESERVED_KWARGS: Final = frozenset(
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "tokenize", "padding"),
        *("add_generation_prompt", "continue_final_message", "truncation", "max_length"),
        *("return_tensors", "return_dict", "tokenizer_kwargs", "return_assistant_tokens_mask"),
    )
)


def _template_kwargs(value: Any, param: str) -> dict[str, Any]:
    kwargs = json_object(value, param)
    for name in kwargs:
        if name in _RESERVED_KWARGS or not name.isidentifier():
            raise bad(f"'{param}' may not set {clip(name)!r}.", f"{param}.{clip(name)}")
    if not isinstance(kwargs.get("enable_thinking", True), bool):
        raise wrong(f"{param}.enable_thinking", "a boolean", kwargs["enable_thinking"])
    return kwargs


def _one(value: Any, param: str) -> int:
    only(1)(value, param)
    return 1


# --- the tables -------------------------------------------------------------------------------

effort: Final = one_of(*EFFORTS)
stream_options: Final = _stream_options
SAMPLING_FIELDS: Final[Mapping[str, Field]] = table_of(SamplingParams)
TEMPLATE_FIELDS: Final[Mapping[str, Field]] = {
    "chat_template_kwargs": supported(_template_kwargs, "arguments for the chat template"),
    "chat_template": unsupported(note="a template is code: set it with --chat-template"),
}
MODEL: Final = supported(
    text, "any name is answered by the served model, whose name the answer has"
)
ONE_CHOICE: Final = Field(_one, Use.UNSUPPORTED, "an answer has one choice")
STOP: Final = supported(_stop, f"a string or up to {MAX_STOP_STRINGS}")
MAX_TOKENS: Final = supported(_max_tokens, "at least 1; default: what is left of the context")
TOP_LOGPROBS: Final = integer(0, MAX_TOP_LOGPROBS)
_BUDGET: Final = integer(0, _MAX_INT)

# What every dialect has.
GENERATION_FIELDS: Final[Mapping[str, Field]] = {
    "model": MODEL,
    **SAMPLING_FIELDS,
    "stop_sequences": replace(STOP, note="the same", alias_of="stop"),
    "stream": supported(flag, "server-sent events"),
    "ignore_eos": supported(flag, "only max_tokens and stop end the answer"),
    "stop_token_ids": supported(_stop_tokens, "end the answer like its end-of-sequence token"),
    "priority": supported(integer(-(2**31), _MAX_INT), "lower goes first; default 0"),
    "cache_prompt": supported(flag, "false: computed anew, and not kept"),
    "cache_salt": supported(_salt, "prefixes are shared only with requests of the same salt"),
}
# What OpenAI's older dialects, chat and text completions, have beside.
COMPLETION_FIELDS: Final[Mapping[str, Field]] = {
    **GENERATION_FIELDS,
    "max_tokens": MAX_TOKENS,
    **{
        alias: replace(MAX_TOKENS, note="the same", alias_of="max_tokens")
        for alias in ("max_completion_tokens", "max_output_tokens", "n_predict")
    },
    "stop": STOP,
    "n": supported(
        integer(1, MAX_CHOICES),
        f"up to {MAX_CHOICES}; one prefill, with the prefix cache",
    ),
    "stream_options": supported(_stream_options, "`include_usage`, `continuous_usage_stats`"),
    "return_progress": supported(flag, "chunks with `prompt_progress` while a stream is prefilled"),
    "timings_per_token": supported(flag, "`timings` in every chunk"),
    "thinking_budget": supported(_BUDGET, "tokens of reasoning, then the block is closed"),
    **{
        alias: supported(_BUDGET, "the same", "thinking_budget")
        for alias in ("thinking_budget_tokens", "thinking_token_budget")
    },
    **dict.fromkeys(("user", "service_tier", "safety_identifier"), no_op(text)),
    **dict.fromkeys(("prompt_cache_key", "prompt_cache_retention"), no_op(text)),
    "metadata": no_op(json_object),
    "store": no_op(flag, "nothing is stored"),
    "id_slot": no_op(integer(-1, _MAX_INT)),
}
# Fields of other servers that are refused where they ask for something, in chat and completions.
UNSUPPORTED_FIELDS: Final[Mapping[str, Field]] = {
    **unsupported_each("typical_p length_penalty", 1),
    **unsupported_each("mirostat dry_multiplier dynatemp_range n_probs n_keep", 0),
    **unsupported_each("use_beam_search include_stop_str_in_output post_sampling_probs", False),
    **unsupported_each("return_token_ids return_tokens_as_token_ids return_tokens", False),
    **unsupported_each("skip_special_tokens spaces_between_special_tokens", True),
    **unsupported_each("include_reasoning", True),
    **unsupported_each("audio prediction web_search_options moderation logits_processors"),
    **unsupported_each("bad_words allowed_token_ids prompt_logprobs truncate_prompt_tokens"),
    **unsupported_each("top_n_sigma t_max_predict_ms", -1),
}
