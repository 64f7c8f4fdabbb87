"""The scheduler's unit: a prompt, its images and grammar, and how its answer ended. Immutable."""

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
    CANCELLED = "cancelled"  # the client left, or asked for it
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Image:
    """A picture in a prompt: what the model sees of it stands at tokens in `[start, stop)`.

    `digest` names the picture; `inputs` are what the vision tower reads, opaque but to the lane, of
    `num_bytes`.
    """

    start: int
    stop: int
    digest: bytes
    num_bytes: int = 0
    inputs: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model reads: at least one token id. Without `blocks` the prefix cache is not used.

    `message_starts` are the positions at which its messages begin, where the renderer knows them.
    `starts_in_reasoning`: it ends inside a block of reasoning, with which the answer goes on.
    `images` stand in their order, and never at the last token; `layout` is what the network needs
    to know of them together. The first `unbroken` tokens must be prefilled at once.
    """

    tokens: tuple[int, ...]
    blocks: Blocks | None = None
    message_starts: tuple[int, ...] = ()
    images: tuple[Image, ...] = ()
    layout: Any = field(default=None, repr=False, compare=False)
    unbroken: int = 0
    starts_in_reasoning: bool = False
    grammar: "Grammar | None" = None  # what the answer must match

    def __post_init__(self) -> None:
        assert self.tokens, "a prompt has at least one token"
        assert all(image.stop < len(self.tokens) for image in self.images)

    def names(self) -> tuple[int, ...]:
        """What tells the prompt from others: its tokens and, for those of images, their digests.

        Where an image stands, words of 31 bits are spun from its digest, with a bit that no token
        has: another image of the same size differs from the first word on.
        """
        names = list(self.tokens)
        for image in self.images:
            num = image.stop - image.start
            data = hashlib.shake_128(image.digest).digest(4 * num)
            words = struct.unpack(f"<{num}I", data)
            names[image.start : image.stop] = [word | 1 << 31 for word in words]
        return tuple(names)


class Matcher(Protocol):
    """Where one sequence is in its grammar. Lives on the lane."""

    @property
    def error(self) -> str | None: ...

    def accept(self, tokens: SequenceOf[int]) -> None:
        """The sequence goes on with these."""
        ...

    def fill(self, mask: Any) -> None:
        """Set the bits of the tokens that may come next, in a row of 32-bit words."""
        ...


class Grammar(Protocol):
    """A compiled constraint."""

    def matcher(self) -> Matcher: ...


@dataclass(frozen=True, slots=True)
class Sequence:
    """The scheduler's unit: one prompt and its one answer.

    `max_tokens` is at least 1 and already within the context: prompt + output never exceed it.
    `eos_tokens` end the sequence and are no part of its text; an empty set never ends.
    Lower `priority` goes first, as in vLLM.
    """

    id: int
    prompt: Prompt
    sampling: SamplingParams
    max_tokens: int
    eos_tokens: frozenset[int] = frozenset()
    priority: int = 0
    wants_progress: bool = False  # its sink gets `Prefilled`
    wants_usage: bool = False  # its sink gets the usage with every token

    def __post_init__(self) -> None:
        assert self.max_tokens >= 1


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probabilities before any sampling setting: the drawn token's, the best ones'."""

    drawn: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


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
