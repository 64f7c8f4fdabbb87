"""How one sequence's tokens are drawn."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence's tokens are drawn.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1, `min_p` 0, `repetition_penalty` 1 and the other
    penalties 0 are off. A draw is a function of (`seed`, number of tokens drawn before) alone,
    whatever else is in the batch.

    Repetition looks at prompt and output, presence and frequency at the output alone (vLLM), each
    at the last `penalty_window` tokens of them; 0 is all. `top_logprobs` None asks for no logprobs,
    0 for the drawn token's alone.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0  # [0, 2**64)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    min_tokens: int = 0  # no end-of-sequence token before so many
    top_logprobs: int | None = None

    @property
    def has_penalty(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )
