"""What OpenAI's clients may ask of a chat: JSON to dataclasses, every field checked. Pure.

Nothing is dropped in silence. Every field this server knows is in one table, `FIELDS`, with what
becomes of it (see `fields`). Fields that are not in the table are in `Options.ignored`, for the
client to be told.

Past `parse_chat` there are no dicts with string keys until an answer is built, except what belongs
to the model's own template (`Message.as_template`, `template_kwargs`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Final

from mlxlite.api.constraints import (
    choice,
    constraint_of,
    function_list,
    grammar,
    json_schema,
    regex,
    response_format,
    structured_outputs,
    tool_choice,
    tool_list,
    tools_of,
)
from mlxlite.api.conversation import Message, Role, Tool
from mlxlite.api.fields import (
    Field,
    Use,
    _one,
    accepted,
    flag,
    integer,
    json_object,
    number,
    refused,
    refused_each,
    text,
    works,
    wrong,
)
from mlxlite.api.openai_content import messages_of
from mlxlite.api.writers import StreamOptions
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.http.errors import APIError, bad, clip
from mlxlite.output.grammar import Constraint
from mlxlite.vision.images import Source


def template_kwargs(
    read: Mapping[str, Any], effort: str | None, is_thinking: bool | None = None
) -> dict[str, Any]:
    """What the template is told, as a chat's `reasoning_effort` tells it."""
    kwargs: dict[str, Any] = {}
    if effort is not None:
        kwargs = {"enable_thinking": effort != "none", "reasoning_effort": effort}
    if is_thinking is not None:
        kwargs["enable_thinking"] = is_thinking
    kwargs |= read.get("chat_template_kwargs", {})
    return kwargs


def chat_options(
    value: Mapping[str, Any], read: Mapping[str, Any], table: Mapping[str, Field], format_name: str
) -> dict[str, Any]:
    """What a chat takes of fields read, where those about tools and format are called as its own.

    `format_name` is what the client calls `response_format`. Raises APIError 400.
    """
    try:
        options = options_of(value, read, table)
    except APIError as error:
        message = error.message.replace("'response_format'", f"'{format_name}'")
        raise bad(message, error.param) from None
    if (found := options["constraint"]) is not None and found[1] == "response_format":
        options["constraint"] = (found[0], format_name)
    most = 1 if read.get("parallel_tool_calls") is False else None
    return options | {"tools": tools_of(read), "max_calls": most}


MAX_STOP_STRINGS = 16
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20  # OpenAI's and vLLM's


def _reasoning_format(value: Any, param: str) -> str:
    if value not in ("auto", "none", "split", "deepseek"):
        raise bad(f"'{param}' must be 'auto', 'none', 'split' or 'deepseek'.", param)
    return str(value)


def _top_k(value: Any, param: str) -> int:
    """-1 is vLLM's «off»."""
    number: int = integer(-1, 2**31 - 1)(value, param)
    return max(number, 0)


def _seed(value: Any, param: str) -> int | None:
    """-1 is llama-server's «random»."""
    number: int = integer(-(2**63), 2**64 - 1)(value, param)
    return None if number == -1 else number


def _max_tokens(value: Any, param: str) -> int | None:
    """-1 is llama-server's «no limit»."""
    number: int = integer(-1, 2**31 - 1)(value, param)
    if number == 0:
        raise bad(f"'{param}' must be at least 1.", param)
    return None if number == -1 else number


def _salt(value: Any, param: str) -> str:
    if len(text(value, param)) > MAX_SALT:
        raise bad(f"'{param}' is longer than {MAX_SALT} characters.", param)
    return str(value)


def _effort(value: Any, param: str) -> str:
    if value not in EFFORTS:
        raise bad(f"'{param}' must be one of {', '.join(EFFORTS)}.", param)
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


def _stream_options(value: Any, param: str) -> StreamOptions:
    options = json_object(value, param)

    def is_on(name: str) -> bool:
        wanted = options.get(name)
        return wanted is not None and flag(wanted, f"{param}.{name}")

    include, continuous = is_on("include_usage"), is_on("continuous_usage_stats")
    is_on("include_obfuscation")  # OpenAI's: padding against eavesdroppers, of no use on loopback
    return StreamOptions(include, include and continuous)


def _template_kwargs(value: Any, param: str) -> dict[str, Any]:
    kwargs = json_object(value, param)
    for name in kwargs:
        if name in _RESERVED_KWARGS or not name.isidentifier():
            raise bad(f"'{param}' may not set {clip(name)!r}.", f"{param}.{clip(name)}")
    if not isinstance(kwargs.get("enable_thinking", True), bool):
        raise wrong(f"{param}.enable_thinking", "a boolean", kwargs["enable_thinking"])
    return kwargs


def _penalty_window(value: Any, param: str) -> int:
    """-1 is llama-server's «all of them»."""
    number: int = integer(-1, MAX_PENALTY_WINDOW)(value, param)
    if number == 0:
        raise bad(f"'{param}' must be at least 1, or -1 for all.", param)
    return max(number, 0)


def _logit_bias(value: Any, param: str) -> tuple[tuple[int, float], ...]:
    """OpenAI's map of token ids, which are strings in JSON, to -100..100."""
    if value == []:
        return ()
    bias = json_object(value, param)
    if len(bias) > MAX_LOGIT_BIAS:
        raise bad(f"'{param}' may hold at most {MAX_LOGIT_BIAS} tokens.", param)
    for name in bias:
        if not (name.isascii() and name.isdigit() and len(name) <= 10):
            raise bad(f"'{param}' must be keyed by token ids, not {clip(name)!r}.", param)
    read = number(-100, 100)
    return tuple((int(name), read(item, f"{param}.{name}")) for name, item in bias.items())


def _token_ids(value: Any, param: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise wrong(param, "an array of integers", value)
    if len(value) > MAX_LOGIT_BIAS:
        raise bad(f"'{param}' may hold at most {MAX_LOGIT_BIAS} tokens.", param)
    read = integer(0, 2**31 - 1)
    return tuple(read(item, f"{param}[{i}]") for i, item in enumerate(value))


# --- the table --------------------------------------------------------------------------------

_integer_from_0 = integer(0, 2**31 - 1)
_NEEDS = "; needs the extra `grammar`"
_TOKENS_NOTE = "at least 1; default: what is left of the context"
FIELDS: Final[Mapping[str, Field]] = {
    "model": works(text, "any name is answered by the served model, which the answer names"),
    "messages": works(
        messages_of,
        "string, null or parts: text, and pictures of users and tools; every role; tool history",
    ),
    "max_tokens": works(_max_tokens, _TOKENS_NOTE),
    "max_completion_tokens": works(_max_tokens, "the same", "max_tokens"),
    "max_output_tokens": works(_max_tokens, "the same", "max_tokens"),
    "n_predict": works(_max_tokens, "the same", "max_tokens"),
    "temperature": works(number(0, 100), "0 is greedy; default: the model's, else 1"),
    "top_p": works(number(0, 1, is_low_open=True), "default: the model's, else 1 (off)"),
    "top_k": works(_top_k, "0 or -1 is off; default: the model's, else off"),
    "min_p": works(number(0, 1), "0 is off; default: the model's, else off"),
    "seed": works(_seed, "64 bits; -1 is random; the same draw alone or in a batch"),
    "stop": works(_stop, f"a string or up to {MAX_STOP_STRINGS}"),
    "stop_sequences": works(_stop, "the same", "stop"),
    "stream": works(flag, "server-sent events"),
    "stream_options": works(_stream_options, "`include_usage`, `continuous_usage_stats`"),
    "return_progress": works(flag, "chunks with `prompt_progress` while a stream is prefilled"),
    "timings_per_token": works(flag, "`timings` in every chunk"),
    "reasoning_effort": works(
        _effort, "handed to the chat template; `none` also sets `enable_thinking` to false"
    ),
    "continue_final_message": works(flag, "a trailing assistant message is continued anyway"),
    "add_generation_prompt": works(flag, "false only with `continue_final_message`"),
    "chat_template_kwargs": works(_template_kwargs, "handed to the chat template"),
    **dict.fromkeys(
        (
            "user",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
        ),
        accepted(text),
    ),
    "metadata": accepted(json_object),
    "store": accepted(flag, "nothing is stored"),
    "parallel_tool_calls": works(flag, "false: the answer ends after its first call"),
    "n": works(
        integer(1, MAX_CHOICES),
        f"up to {MAX_CHOICES}; with the prefix cache one prefill serves them all",
    ),
    "presence_penalty": works(number(-2, 2), "over the output"),
    "frequency_penalty": works(number(-2, 2), "over the output"),
    "repetition_penalty": works(
        number(0, 100, is_low_open=True), "over prompt and output; 1 is off"
    ),
    "repeat_penalty": works(number(0, 100, is_low_open=True), "the same", "repetition_penalty"),
    "repetition_context_size": works(
        _penalty_window, "the last so many tokens count for penalties; default: all"
    ),
    "repeat_last_n": works(_penalty_window, "the same; -1 is all", "repetition_context_size"),
    "logit_bias": works(_logit_bias, "token id to -100..100"),
    "xtc_probability": works(number(0, 1), "0 is off"),
    "xtc_threshold": works(number(0, 1), "default 0.1"),
    "logprobs": works(flag, "of the drawn tokens, before any sampling setting"),
    "top_logprobs": works(integer(0, MAX_TOP_LOGPROBS), f"0 to {MAX_TOP_LOGPROBS}"),
    "min_tokens": works(integer(0, 2**31 - 1), "no end before so many tokens"),
    "ignore_eos": works(flag, "only max_tokens and stop end the answer"),
    "stop_token_ids": works(_token_ids, "end the answer like its end-of-sequence token"),
    "priority": works(integer(-(2**31), 2**31 - 1), "lower goes first; default 0"),
    "cache_prompt": works(flag, "false: computed anew, and not kept"),
    "cache_salt": works(_salt, "prefixes are shared only with requests of the same salt"),
    "response_format": works(response_format, "text, json_object, json_schema" + _NEEDS),
    "structured_outputs": works(structured_outputs, "json, regex, choice or grammar" + _NEEDS),
    "json_schema": works(json_schema, "a schema (llama-server)" + _NEEDS),
    "grammar": works(grammar, "GBNF or Lark (llama-server)" + _NEEDS),
    "guided_json": works(json_schema, "vLLM's older names" + _NEEDS),
    "guided_regex": works(regex, "the same"),
    "guided_choice": works(choice, "the same"),
    "guided_grammar": works(grammar, "the same"),
    "tools": works(tool_list, "functions; how they are called is the model's own format"),
    "tool_choice": works(
        tool_choice, "`required` and a name are enforced where the model's calls are JSON"
    ),
    "functions": works(function_list, "the older form of `tools`"),
    "function_call": works(tool_choice, "the older form of `tool_choice`"),
    "thinking_budget": works(_integer_from_0, "tokens of reasoning, then the block is closed"),
    "thinking_budget_tokens": works(_integer_from_0, "the same", "thinking_budget"),
    "thinking_token_budget": works(_integer_from_0, "the same", "thinking_budget"),
    "reasoning_format": works(_reasoning_format, "`none`: in the content; else apart from it"),
    "id_slot": accepted(integer(-1, 2**31 - 1)),
    "modalities": refused(["text"]),
    "verbosity": refused("medium"),
    "chat_template": refused(note="a template is code: set it with --chat-template"),
    **refused_each("typical_p length_penalty", 1),
    **refused_each("mirostat dry_multiplier dynatemp_range n_probs n_keep", 0),
    **refused_each("echo use_beam_search include_stop_str_in_output post_sampling_probs", False),
    **refused_each("return_token_ids return_tokens_as_token_ids return_tokens", False),
    **refused_each("skip_special_tokens spaces_between_special_tokens include_reasoning", True),
    **refused_each("audio prediction web_search_options moderation logits_processors"),
    **refused_each("bad_words allowed_token_ids prompt_logprobs truncate_prompt_tokens"),
    **refused_each("top_n_sigma t_max_predict_ms", -1),
}
EFFORT: Final = FIELDS["reasoning_effort"].read
ONE_CHOICE: Final = Field(_one, Use.REFUSED, "an answer has one choice")
OWN: Final[Mapping[str, Field]] = {
    name: FIELDS[name]
    for name in (
        *("min_p", "seed", "repetition_penalty", "repeat_penalty", "repetition_context_size"),
        *("repeat_last_n", "presence_penalty", "frequency_penalty", "logit_bias"),
        *("xtc_probability", "xtc_threshold", "min_tokens", "ignore_eos", "stop_token_ids"),
        *("priority", "cache_prompt", "cache_salt", "chat_template_kwargs", "chat_template"),
    )
}
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_SALT = 128  # characters, as in vLLM
MAX_STOP_BYTES = 1024  # each; bounds the text a stream holds back
MAX_LOGIT_BIAS = 1024  # tokens (vLLM has no bound, OpenAI's is about 300)
MAX_PENALTY_WINDOW = 8192  # tokens, kept for each row


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How an answer is generated and given. None means that the request was silent."""

    prompt_field: ClassVar[str] = "messages"  # what an error about the prompt names
    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    min_tokens: int = 0
    top_logprobs: int | None = None  # None: no logprobs at all
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

    def sampling(self, defaults: SamplingParams, seed: int) -> SamplingParams:
        """What the request says, else the model's defaults; `seed` where it names none."""

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        return SamplingParams(
            temperature=given(self.temperature, defaults.temperature),
            top_p=given(self.top_p, defaults.top_p),
            top_k=given(self.top_k, defaults.top_k),
            min_p=given(self.min_p, defaults.min_p),
            seed=given(self.seed, seed) % 2**64,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            penalty_window=self.penalty_window,
            logit_bias=self.logit_bias,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            min_tokens=self.min_tokens,
            top_logprobs=self.top_logprobs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(Options):
    """A chat completion as asked for."""

    messages: tuple[Message, ...]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool | None = None
    tools: tuple[Tool, ...] = ()  # those that may be called
    max_calls: int | None = None
    splits_reasoning: bool = True

    @property
    def sources(self) -> tuple[Source, ...]:
        """Of all pictures, in the order of the messages."""
        return tuple(source for message in self.messages for source in message.sources)

    @property
    def is_continuation(self) -> bool:
        """The last message is an assistant's: the answer goes on from it, unless told not to."""
        last = self.messages[-1]
        is_open = last.role is Role.ASSISTANT and not last.tool_calls
        return is_open if self.continue_final is None else self.continue_final


def options_of(
    value: Mapping[str, Any], read: Mapping[str, Any], table: Mapping[str, "Field"]
) -> dict[str, Any]:
    """What `Options` takes, but for `top_logprobs`, of fields that were read."""
    stream_options = replace(
        read.get("stream_options") or StreamOptions(),
        timings_per_token=read.get("timings_per_token", False),
    )
    renamed = {
        "is_stream": read.get("stream", False),
        "stream_options": stream_options,
        "num_choices": read.get("n", 1),
        "stop_tokens": read.get("stop_token_ids", ()),
        "penalty_window": read.get("repetition_context_size", 0),
        "constraint": constraint_of(read),
        "ignored": tuple(sorted(name for name in value if name not in table)),
    }
    same = {item.name for item in fields(Options)} & set(read) - {"top_logprobs"}
    return {name: read[name] for name in same} | renamed


def check_together(read: Mapping[str, Any]) -> None:
    """What single fields of `Options` cannot know of one another. Raises APIError 400."""
    if read.get("stream_options") is not None and not read.get("stream"):
        raise bad("'stream_options' needs 'stream': true.", "stream_options")
    if read.get("min_tokens", 0) > (read.get("max_tokens") or math.inf):
        raise bad("'min_tokens' must not be more than 'max_tokens'.", "min_tokens")


# What steers the renderer and not the template: transformers' own arguments.
_RESERVED_KWARGS: Final = frozenset(
    [
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "tokenize",
        "padding",
        "continue_final_message",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "tokenizer_kwargs",
        "return_assistant_tokens_mask",
    ]
)
