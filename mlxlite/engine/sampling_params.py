"""Sampling parameters: how one sequence's tokens are drawn, and how requests set them.

A field of `SamplingParams` that declares a `Param` is thereby a field of every dialect's requests,
with its range, its aliases, its JSON Schema and its row in the documentation. What a parameter does
is in `runner.sampler`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_CONTEXT_SIZE = 8192  # tokens that penalties look back on, kept for each row
_MAX_INT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Param:
    """How requests set one parameter: a number in `[low, high]`, or token ids with such numbers.

    `convert` maps the number to the parameter's value, None for the default; it raises ValueError
    with the rest of a sentence.
    """

    note: str
    low: float
    high: float
    is_low_open: bool = False
    convert: Callable[[int], int | None] | None = None
    aliases: tuple[str, ...] = ()


def param(default: Any, note: str, low: float, high: float, **rest: Any) -> Any:
    """A dataclass field that requests can set; `rest` are the other fields of `Param`."""
    return field(default=default, metadata={"param": Param(note, low, high, **rest)})


def _top_k(number: int) -> int:
    """-1 is vLLM's «off»."""
    return max(number, 0)


def _seed(number: int) -> int | None:
    """-1 is llama-server's «random»."""
    return None if number == -1 else number % 2**64


def _context_size(number: int) -> int:
    """-1 is llama-server's «all of them»."""
    if number == 0:
        raise ValueError("must be at least 1, or -1 for all.")
    return max(number, 0)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence's tokens are drawn.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0, `repetition_penalty` 1 and the other
    penalties 0 are off. A draw is a function of (`seed`, number of tokens drawn before) alone,
    whatever else is in the batch.

    Repetition looks at prompt and output, presence and frequency at the output alone (vLLM), each
    at the last `repetition_context_size` tokens of them; 0 is all. `bad_words` are the tokens of
    words that the output must not hold. `top_logprobs` None asks for no logprobs, 0 for the drawn
    token's alone; each dialect has its own fields for it.
    """

    temperature: float = param(1.0, "0 is greedy; default: the model's, else 1", 0, 100)
    top_p: float = param(1.0, "0 is greedy; default: the model's, else 1 (off)", 0, 1)
    top_k: int = param(
        0,
        "0 or -1 is off; default: the model's, else off",
        -1,
        _MAX_INT,
        convert=_top_k,
    )
    min_p: float = param(0.0, "0 is off; default: the model's, else off", 0, 1)
    seed: int = param(
        0,
        "64 bits; -1 is random; the same draw alone or in a batch",
        -(2**63),
        2**64 - 1,
        convert=_seed,
    )
    repetition_penalty: float = param(
        1.0,
        "over prompt and output; 1 is off",
        0,
        100,
        is_low_open=True,
        aliases=("repeat_penalty",),
    )
    presence_penalty: float = param(0.0, "over the output", -2, 2)
    frequency_penalty: float = param(0.0, "over the output", -2, 2)
    repetition_context_size: int = param(
        0,
        "how many of the last tokens penalties look at; default, and -1: all",
        -1,
        MAX_CONTEXT_SIZE,
        convert=_context_size,
        aliases=("repeat_last_n",),
    )
    logit_bias: tuple[tuple[int, float], ...] = param((), "token id to -100..100", -100, 100)
    typical_p: float = param(
        1.0,
        "keeps this share of the tokens whose surprise is nearest to the expected; 1 is off",
        0,
        1,
        aliases=("typ_p",),
    )
    top_n_sigma: float = param(
        0.0,
        "keeps what is within so many standard deviations of the best; -1, 0: off",
        -1,
        100,
    )
    dynatemp_range: float = param(
        0.0, "the temperature varies by this with the entropy over the vocabulary; 0 is off", 0, 100
    )
    dynatemp_exponent: float = param(1.0, "of the entropy's share", 0, 100)
    xtc_probability: float = param(0.0, "0 is off", 0, 1)
    xtc_threshold: float = param(0.1, "default 0.1", 0, 1)
    min_tokens: int = param(
        0, "neither end-of-sequence token nor stop string before this many tokens", 0, _MAX_INT
    )
    allowed_token_ids: tuple[int, ...] = param(
        (), "no other token is drawn, nor an end that is not among them", 0, _MAX_INT
    )
    bad_words: tuple[tuple[int, ...], ...] = ()
    top_logprobs: int | None = None

    @property
    def is_shaped(self) -> bool:
        """Whether a cut or the temperature depends on the whole distribution."""
        return self.typical_p < 1.0 or self.top_n_sigma > 0.0 or self.dynatemp_range > 0.0

    @property
    def has_penalty(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
