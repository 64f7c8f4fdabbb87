"""One sequence: a prompt with its images and grammar, its limits, how it ended. Immutable."""

import hashlib
import struct
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.prefix_cache.hashing import Blocks


class FinishReason(Enum):
    """Why a sequence ended. The values are OpenAI's, where OpenAI has one."""

    STOP = "stop"  # end-of-sequence token, or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"  # by the client, or by its disconnect
    DISPLACED = "displaced"  # from a full queue, by one with a better claim to a place
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Image:
    """An image in a prompt: its features replace the tokens in `[start, stop)`.

    `digest` identifies the image; `inputs` are the vision tower's, of `num_bytes`; only the device
    thread may look into them.
    """

    start: int
    stop: int
    digest: bytes
    num_bytes: int = 0
    inputs: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens of a prompt, at least one. Without `blocks` the prefix cache is not used.

    `message_starts` are the positions at which its messages begin, where the renderer knows them.
    `starts_in_reasoning`: the prompt ends inside a block of reasoning, which the answer continues.
    `images` are in order of position, none at the last token; `layout` is the network's input about
    all of them. The first `min_first_chunk` tokens must be prefilled in one chunk.
    """

    tokens: tuple[int, ...]
    blocks: Blocks | None = None
    message_starts: tuple[int, ...] = ()
    images: tuple[Image, ...] = ()
    layout: Any = field(default=None, repr=False, compare=False)
    min_first_chunk: int = 0
    starts_in_reasoning: bool = False
    grammar: "Grammar | None" = None  # what the answer must match

    def __post_init__(self) -> None:
        assert self.tokens, "a prompt has at least one token"
        assert all(image.stop < len(self.tokens) for image in self.images)

    def cache_tokens(self) -> tuple[int, ...]:
        """The tokens as the prefix cache's keys see them: those of images replaced by digests.

        At an image, words of 31 bits are derived from its digest, with a bit that no token has:
        another image of the same size differs from the first word on.
        """
        tokens = list(self.tokens)
        for image in self.images:
            num = image.stop - image.start
            data = hashlib.shake_128(image.digest).digest(4 * num)
            words = struct.unpack(f"<{num}I", data)
            tokens[image.start : image.stop] = [word | 1 << 31 for word in words]
        return tuple(tokens)


class Matcher(Protocol):
    """The state of one sequence in its grammar. Lives on the device thread."""

    @property
    def error(self) -> str | None: ...

    def accept(self, tokens: SequenceOf[int]) -> None:
        """Advance by the next tokens of the sequence."""
        ...

    def fill(self, mask: Any) -> None:
        """Set the bits of the tokens that may be next, in a row of 32-bit words."""
        ...


class Grammar(Protocol):
    """A compiled constraint."""

    def matcher(self) -> Matcher: ...


@dataclass(frozen=True, slots=True)
class Sequence:
    """One prompt and its one answer: what the scheduler schedules.

    `max_tokens` is at least 1 and already within the context: prompt + output never exceed it.
    `eos_tokens` end the sequence and are no part of its text; an empty set never ends it.
    Lower `priority` goes first, as in vLLM; within it tenants have equal shares of the rows and of
    the queue. `number` counts the sequences of one request from 0.
    """

    id: int
    prompt: Prompt
    sampling: SamplingParams
    max_tokens: int
    eos_tokens: frozenset[int] = frozenset()
    priority: int = 0
    tenant: bytes = b""
    number: int = 0
    wants_progress: bool = False  # its sink gets `Prefilled`
    wants_usage: bool = False  # its sink gets the usage with every token
    prompt_top: int | None = None  # its sink gets `PromptLogprobs`, with so many best tokens

    def __post_init__(self) -> None:
        assert self.max_tokens >= 1

    @property
    def num_to_score(self) -> int:
        """Places of the prompt whose next token's likelihood is wanted: the first ones."""
        return 0 if self.prompt_top is None else len(self.prompt.tokens) - 1


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probabilities before any sampling parameter: of the drawn and the best tokens."""

    drawn: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first
    rank: int = 0  # of a prompt's token: how many are at least as likely, itself included


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """The prompt's tokens from index `start` on (the first token has none), with their logprobs."""

    start: int
    tokens: tuple[tuple[int, Logprobs], ...]

    def after(self, num_known: int) -> "PromptLogprobs":
        """Without those of the first `num_known` places, which have been delivered."""
        num = max(0, num_known + 1 - self.start)
        return PromptLogprobs(self.start + num, self.tokens[num:])


# --- what leaves the engine towards a request -------------------------------------------------


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts and times of one sequence, in tokens and seconds."""

    num_prompt: int = 0
    num_cached: int = 0
    num_output: int = 0
    num_reasoning: int = 0  # of the output
    queue_s: float = 0.0
    prefill_s: float = 0.0  # from leaving the queue to the first token
    decode_s: float = 0.0  # from the first token to the last
