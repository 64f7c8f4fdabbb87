"""The request fields that dialects share: their readers, and the tables that dialects extend. Pure.

`GENERATION_FIELDS` is in every dialect; `request.shared_options` takes its fields.
"""

from typing import Any, Final

from mlxlite.api.fields import (
    Table,
    aliases,
    hint_each,
    no_op,
    no_op_each,
    supported,
    table_of,
    unsupported,
    unsupported_each,
)
from mlxlite.api.left_out import leave_out
from mlxlite.api.readers import flag, integer, json_object, nested, one_of, text, token_ids, wrong
from mlxlite.api.writers import StreamOptions
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.http.errors import bad_request, truncate

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_SALT = 128  # characters, as in vLLM
MAX_STOP_STRINGS = 64  # vLLM has no bound; each is looked for at every token
MAX_STOP_BYTES = 1024  # each; bounds the text a stream holds back
MAX_STOP_TOKENS = 1024
MAX_CHOICES = 128  # OpenAI's
MAX_TOP_LOGPROBS = 20  # OpenAI's and vLLM's
_MAX_INT = 2**31 - 1


def _max_tokens(value: Any, param: str) -> int | None:
    """-1 is llama-server's «no limit»."""
    number: int = integer(-1, _MAX_INT)(value, param)
    if number == 0:
        raise bad_request(f"'{param}' must be at least 1.", param)
    return None if number == -1 else number


def _salt(value: Any, param: str) -> str:
    if len(text(value, param)) > MAX_SALT:
        raise bad_request(f"'{param}' is longer than {MAX_SALT} characters.", param)
    return str(value)


def _stop(value: Any, param: str) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        raise wrong(param, "a string or an array of strings", value)
    if len(strings) > MAX_STOP_STRINGS:
        raise bad_request(f"'{param}' may hold at most {MAX_STOP_STRINGS} strings.", param)
    for string in strings:
        if not text(string, param):
            raise bad_request(f"'{param}' must not hold an empty string.", param)
        if len(string.encode()) > MAX_STOP_BYTES:
            raise bad_request(
                f"a string in '{param}' is longer than {MAX_STOP_BYTES} bytes.", param
            )
    return tuple(dict.fromkeys(strings))


def _stop_tokens(value: Any, param: str) -> tuple[int, ...]:
    return token_ids(value, param, MAX_STOP_TOKENS)


# The last is OpenAI's padding against eavesdroppers, of no use on loopback.
_STREAM_OPTIONS: Final = nested(
    include_usage=flag, continuous_usage_stats=flag, include_obfuscation=flag
)


def stream_options(value: Any, param: str) -> StreamOptions:
    options: dict[str, bool] = _STREAM_OPTIONS(value, param)
    include = options.get("include_usage", False)
    return StreamOptions(include, include and options.get("continuous_usage_stats", False))


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
            raise bad_request(
                f"'{param}' may not set {truncate(name)!r}.", f"{param}.{truncate(name)}"
            )
    if not isinstance(kwargs.get("enable_thinking", True), bool):
        raise wrong(f"{param}.enable_thinking", "a boolean", kwargs["enable_thinking"])
    return kwargs


def effort(value: Any, param: str) -> str | None:
    """How long a model may reason; a word that no template has is left out."""
    if text(value, param) in EFFORTS:
        return str(value)
    leave_out(f"{param}: {truncate(value)}")
    return None


def thinking(value: Any, param: str) -> bool:
    """Whether to reason, in the words of GLM and DeepSeek: a flag, or a type."""
    if isinstance(value, bool):
        return value
    types = one_of("enabled", "disabled", "adaptive")
    return bool(nested("type", type=types)(value, param)["type"] != "disabled")


SAMPLING_FIELDS: Final[Table] = table_of(SamplingParams)
TEMPLATE_FIELDS: Final[Table] = {
    "enable_thinking": supported(flag, "the same in `chat_template_kwargs`"),
    "chat_template_kwargs": supported(_template_kwargs, "arguments for the chat template"),
    "chat_template": unsupported(note="a template is code: set it with --chat-template"),
}
MODEL: Final = supported(
    text, "any name is answered by the served model, whose name the answer has"
)
ONE_CHOICE: Final = unsupported(1, note="an answer has one choice")
STOP: Final = supported(_stop, f"a string or up to {MAX_STOP_STRINGS}")
MAX_TOKENS: Final = supported(_max_tokens, "at least 1; default: what is left of the context")
_MAX_TOKENS_ELSEWHERE: Final = (
    "max_completion_tokens max_output_tokens max_new_tokens n_predict num_predict"
)
TOP_LOGPROBS: Final = integer(0, MAX_TOP_LOGPROBS)
BUDGET: Final = supported(integer(0, _MAX_INT), "tokens of reasoning, then the block is closed")

GENERATION_FIELDS: Final[Table] = {
    "model": MODEL,
    **SAMPLING_FIELDS,
    **aliases("stop", STOP, "stop_sequences"),
    "stream": supported(flag, "server-sent events"),
    "ignore_eos": supported(flag, "only max_tokens and stop end the answer"),
    "stop_token_ids": supported(_stop_tokens, "end the answer like its end-of-sequence token"),
    "priority": supported(integer(-(2**31), _MAX_INT), "lower goes first; default 0"),
    "cache_prompt": supported(flag, "false: computed anew, and not kept"),
    "cache_salt": supported(_salt, "prefixes are shared only with requests of the same salt"),
}
# Of OpenAI's older dialects: chat and text completions.
COMPLETION_FIELDS: Final[Table] = {
    **GENERATION_FIELDS,
    "max_tokens": MAX_TOKENS,
    **aliases("max_tokens", MAX_TOKENS, _MAX_TOKENS_ELSEWHERE),
    "stop": STOP,
    "n": supported(
        integer(1, MAX_CHOICES), f"up to {MAX_CHOICES}; one prefill, with the prefix cache"
    ),
    "stream_options": supported(stream_options, "`include_usage`, `continuous_usage_stats`"),
    "return_progress": supported(flag, "chunks with `prompt_progress` while a stream is prefilled"),
    "timings_per_token": supported(flag, "`timings` in every chunk"),
    "thinking_budget": BUDGET,
    **aliases("thinking_budget", BUDGET, "thinking_budget_tokens thinking_token_budget"),
    **no_op_each("user service_tier safety_identifier", text),
    **no_op_each("prompt_cache_key prompt_cache_retention", text),
    "metadata": no_op(json_object),
    "store": no_op(flag, "nothing is stored"),
    "id_slot": no_op(integer(-1, _MAX_INT)),
}
# Fields of other servers that are refused or left out where they ask for something.
UNSUPPORTED_FIELDS: Final[Table] = {
    **unsupported_each("typical_p", 1),
    **hint_each("length_penalty", 1),  # of beam search alone
    **hint_each("prediction web_search_options moderation"),
    **unsupported_each("mirostat dry_multiplier dynatemp_range n_probs n_keep", 0),
    **unsupported_each("use_beam_search include_stop_str_in_output post_sampling_probs", False),
    **unsupported_each("return_token_ids return_tokens_as_token_ids return_tokens", False),
    **unsupported_each("skip_special_tokens spaces_between_special_tokens", True),
    **unsupported_each("include_reasoning", True),
    **unsupported_each("audio logits_processors"),
    **unsupported_each("bad_words allowed_token_ids prompt_logprobs truncate_prompt_tokens"),
    **unsupported_each("top_n_sigma t_max_predict_ms", -1),
}
