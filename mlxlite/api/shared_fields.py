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
from mlxlite.api.readers import (
    array,
    describes,
    flag,
    integer,
    json_object,
    nested,
    number,
    one_of,
    text,
    token_ids,
    wrong,
)
from mlxlite.api.writers import StreamOptions
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.http.errors import bad_request, truncate

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
MAX_SALT = 128  # characters, as in vLLM
MAX_STOP_STRINGS = 64  # vLLM has no bound; each is looked for at every token
MAX_STOP_BYTES = 1024  # each; bounds the text a stream holds back
MAX_STOP_TOKENS = 1024
MAX_BAD_WORDS = 256
MAX_CHOICES = 128  # OpenAI's
MAX_TOP_LOGPROBS = 20  # OpenAI's and vLLM's
_MAX_INT = 2**31 - 1


def _max_tokens(value: Any, param: str) -> int | None:
    """-1 is llama-server's «no limit»."""
    found: int = integer(-1, _MAX_INT)(value, param)
    if found == 0:
        raise bad_request(f"'{param}' must be at least 1.", param)
    return None if found == -1 else found


def _max_tokens_or_none(value: Any, param: str) -> int | None:
    """0 is an answer without output, for the likelihoods of its prompt."""
    is_none = not isinstance(value, bool) and value == 0
    return 0 if is_none else _max_tokens(value, param)


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


def _bad_words(value: Any, param: str) -> tuple[str, ...]:
    words = array(value, param, " of strings")
    if len(words) > MAX_BAD_WORDS:
        raise bad_request(f"'{param}' may hold at most {MAX_BAD_WORDS} strings.", param)
    for word in words:
        if not text(word, param).strip() or len(word.encode()) > MAX_STOP_BYTES:
            message = f"a string in '{param}' must have 1 to {MAX_STOP_BYTES} bytes, not all blank."
            raise bad_request(message, param)
    return tuple(dict.fromkeys(words))


@describes(type="boolean")
def _negated(value: Any, param: str) -> bool:
    return not flag(value, param)


@describes(type="integer", minimum=-1)
def _num_last(value: Any, param: str) -> int:
    found: int = integer(-1, _MAX_INT)(value, param)
    if found == 0:
        raise bad_request(f"'{param}' must be at least 1, or -1.", param)
    return found


@describes(type="integer", minimum=-1)
def _milliseconds(value: Any, param: str) -> int | None:
    found: int = integer(-1, _MAX_INT)(value, param)
    return found if found > 0 else None


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
    leave_out(param, truncate(value))
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
    "max_tokens": supported(
        _max_tokens_or_none, "-1, and by default: what is left; 0 only for a prompt's likelihoods"
    ),
    **aliases("max_tokens", MAX_TOKENS, _MAX_TOKENS_ELSEWHERE),
    "prompt_logprobs": supported(
        integer(0, MAX_TOP_LOGPROBS), "of the prompt's tokens, with their rivals; no stream"
    ),
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
    "bad_words": supported(
        _bad_words, f"up to {MAX_BAD_WORDS} strings that the output does not hold, as tokens"
    ),
    "include_stop_str_in_output": supported(flag, "true: the stop string is a part of the text"),
    "skip_special_tokens": supported(_negated, "false: special tokens are a part of the text"),
    "spaces_between_special_tokens": no_op(flag, "the tokenizer's own spaces"),
    "return_token_ids": supported(flag, "`token_ids` and `prompt_token_ids`, as vLLM"),
    "return_tokens_as_token_ids": supported(flag, "logprobs name tokens `token_id:5`"),
    "truncate_prompt_tokens": supported(
        _num_last, "only the last so many tokens of the prompt; -1: as many as fit"
    ),
    "t_max_predict_ms": supported(
        _milliseconds, "an answer that has a line ends after so long; -1 and 0 are off"
    ),
    "n_keep": no_op(integer(-1, _MAX_INT), "a context is never shifted"),
    "id_slot": no_op(integer(-1, _MAX_INT)),
}
# Fields of other servers that are refused or left out where they ask for something.
UNSUPPORTED_FIELDS: Final[Table] = {
    **hint_each("length_penalty", 1),  # of beam search alone
    **hint_each("prediction web_search_options moderation"),
    "mirostat": unsupported(0, note="its state is no function of the seed and the tokens"),
    "dry_multiplier": unsupported(0, note="its breakers are texts, which tokens do not end with"),
    **no_op_each("dry_base dry_allowed_length dry_penalty_last_n", number(-1, _MAX_INT)),
    "dry_sequence_breakers": no_op(array),
    **no_op_each("mirostat_tau mirostat_eta", number(0, _MAX_INT)),
    "use_beam_search": unsupported(False),
    "post_sampling_probs": unsupported(False, note="likelihoods are the model's own"),
    "return_tokens": unsupported(False, note="vLLM's `return_token_ids` works"),
    **unsupported_each("audio logits_processors"),
}
