"""The nouns: what the modules say to one another, and nothing that does anything.

A request (an HTTP call) becomes one or more sequences. A sequence enters the scheduler as a
command, leaves it in steps, and comes back as tokens and events:

    command ─▶ Scheduler ─▶ Step ─▶ Runner ─▶ Outcome ─▶ Scheduler ─▶ event

Everything here is immutable (tokens and deltas by rule: there is one for each token) and free of
MLX, sockets and clocks, so a log of commands and outcomes replays a run exactly. Ranges are
`[start, stop)`; counts are `num_*`.
"""

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from mlxlite.blocks import NO_HIT, Blocks, CacheOp, Hit, Stored


class FinishReason(Enum):
    """Why a sequence ended. The values are OpenAI's, where OpenAI has one."""

    STOP = "stop"  # end-of-sequence token, or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"  # the client left, or asked for it
    ERROR = "error"


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

    `heads` are the positions at which its messages begin, as far as the renderer can tell. `images`
    stand in their order, and never at the last token; `layout` is what the network needs to know of
    them together. The first `unbroken` tokens must be prefilled at once.
    """

    tokens: tuple[int, ...]
    blocks: Blocks | None = None
    heads: tuple[int, ...] = ()
    images: tuple[Image, ...] = ()
    layout: Any = field(default=None, repr=False, compare=False)
    unbroken: int = 0
    is_thinking: bool = False  # it ends inside a block of reasoning, which the answer goes on with
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
    Lower `priority` goes first, as in vLLM. `fork_of` names a sequence with the same prompt, added
    before: one prefill serves them all.
    """

    id: int
    prompt: Prompt
    sampling: SamplingParams
    max_tokens: int
    eos_tokens: frozenset[int] = frozenset()
    priority: int = 0
    fork_of: int | None = None

    def __post_init__(self) -> None:
        assert self.max_tokens >= 1


class Status(Enum):
    """Where a sequence is: down the list; preempted, back to WAITING; FINISHED from anywhere."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    LEAVING = "leaving"  # preempted, its last launched token still to come
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Memory:
    """What sequences hold, by length: the ledger's arithmetic. Sizes in bytes.

    A row of n tokens holds `row_bytes` and, for each of `layers`, (bytes per token, most tokens
    kept or None) what its tokens take and, as mlx-lm's caches grow by blocks, up to `block` tokens
    more. `budget_bytes` is what there is for all of them, beside weights and reserve; None is no
    limit.
    """

    budget_bytes: int | None = None
    row_bytes: int = 0
    layers: tuple[tuple[int, int | None], ...] = ()
    block: int = 256

    @property
    def has_state(self) -> bool:
        """Whether some layer keeps a window or a state, from which nothing can be cut off."""
        return self.row_bytes > 0 or any(most is not None for _, most in self.layers)

    @property
    def token_bytes(self) -> int:
        """What a token takes in the layers that keep all tokens."""
        return sum(token_bytes for token_bytes, most in self.layers if most is None)

    def state_bytes(self, num_tokens: int) -> int:
        """What the windows and states hold after so many tokens."""
        windows = [(size, most) for size, most in self.layers if most is not None]
        return self.row_bytes + sum(size * min(num_tokens, most) for size, most in windows)

    def row(self, num_tokens: int) -> int:
        """The most that one row of so many tokens holds."""
        size = num_tokens + self.block
        held = (token_bytes * min(size, most or size) for token_bytes, most in self.layers)
        return self.row_bytes + sum(held)

    def batch(self, lengths: Iterable[int]) -> int:
        """Rows that decode together are all padded to the longest."""
        sizes = list(lengths)
        return len(sizes) * self.row(max(sizes)) if sizes else 0

    def max_tokens(self, wanted: int) -> int:
        """The longest sequence that fits alone: at most `wanted`, 0 if none does."""
        if self.budget_bytes is None:
            return wanted
        return max(0, bisect_right(range(wanted + 1), self.budget_bytes, key=self.row) - 1)


# --- commands: everything that reaches the scheduler from outside, in one order ---------------


@dataclass(frozen=True, slots=True)
class Add:
    """A new sequence. Its id has never been used before."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Finish:
    """End a sequence from outside: a lost client, a cancel, a stop string, a failure."""

    id: int
    reason: FinishReason
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SetChunkBudget:
    """The measured prefill rate allows this many prompt tokens in a step that also decodes."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class Lost:
    """A whole step is lost, and with it all that the runner held: end what has left the queue."""

    error: str


@dataclass(frozen=True, slots=True)
class CloseBatch:
    """Static batching: the gathering time is over, run what is there."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A payload of the prefix cache has come from disk."""

    payload: int


@dataclass(frozen=True, slots=True)
class Unstored:
    """A payload of the prefix cache could not be written to disk, or read from it."""

    payload: int


@dataclass(frozen=True, slots=True)
class ClearCache:
    """Forget all prefixes."""


Command = Add | Finish | Lost | SetChunkBudget | CloseBatch | Fetched | Unstored | ClearCache


# --- steps: what one tick launches ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence leaves the queue.

    `outputs` are the tokens it had drawn before a preemption. A fork may begin from the `stem` of
    the sequence with this id: then its prompt is computed but for the last token. Any other begins
    after its `hit`.
    """

    sequence: Sequence
    outputs: tuple[int, ...] = ()
    stem: int | None = None
    hit: Hit = NO_HIT

    @property
    def num_tokens(self) -> int:
        """Prompt and outputs: what must be in the cache, but for the last, to draw the next."""
        return len(self.sequence.prompt.tokens) + len(self.outputs)


@dataclass(frozen=True, slots=True)
class Look:
    """Run the vision tower on image number `image` of one admitted sequence."""

    id: int
    image: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prefill the tokens `[start, stop)` of one admitted sequence.

    n tokens are prefilled up to n - 1: the last one is the input of the first decode row, so that
    sampling happens in one place and the output layer never runs over a whole prompt.
    """

    id: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Step:
    """One tick's work, in the order of the fields.

    `rows` are the sequences that decode one token each, in order of joining; a sequence's first row
    may be in the step of its last chunk. A stem is the prompt cache of a sequence that has forks:
    kept when it joins, dropped when its last fork has been admitted. The prefix cache is worked on
    twice: `before` for those who are then released, `after` the chunks for those who go on.
    """

    number: int
    before: tuple[CacheOp, ...] = ()
    released: tuple[int, ...] = ()
    admitted: tuple[Admission, ...] = ()
    dropped_stems: tuple[int, ...] = ()
    looks: tuple[Look, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    after: tuple[CacheOp, ...] = ()
    kept_stems: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probabilities before any sampling setting: the drawn token's, the best ones'."""

    drawn: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step brought: a token for each of its rows, in their order.

    `logprobs` is by id, for the rows that asked. A failed sequence has no meaningful token.
    Times in seconds, 0 if not known: `device_s` is how long the device had this step to itself;
    the lane spent `build_s` on its graph, `dispatch_s` on handing it over, `wait_s` on its tokens.
    """

    tokens: tuple[int, ...] = ()
    logprobs: Mapping[int, Logprobs] = field(default_factory=dict)
    failed: tuple[tuple[int, str], ...] = ()  # (id, reason)
    device_s: float = 0.0
    build_s: float = 0.0
    dispatch_s: float = 0.0
    wait_s: float = 0.0
    lost: tuple[int, ...] = ()  # payloads of the prefix cache that are not there after all


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of a long input that is embedded in several calls under one `id`."""

    id: int
    is_last: bool


class Launched(Protocol):
    """A step that the device is working on; made and read by the runner alone."""

    @property
    def step(self) -> Step: ...


class Runner(Protocol):
    """The model, as the engine sees it. Every call is made on the lane, one at a time."""

    @property
    def memory(self) -> Memory:
        """What sequences hold, and how much there is for them."""

    @property
    def is_slow_to_launch(self) -> bool:
        """Whether a launch takes about as long as the step: what is in flight is told before."""

    def advance(
        self, step: Step | None, in_flight: Launched | None
    ) -> tuple[Launched | None, Outcome | None]:
        """Dispatch `step`, then wait for `in_flight`, the step launched before it.

        A sequence that fails alone is reported in the outcome of its step. Raises when a whole
        step is lost; the caller then ends every sequence and calls `reset`.
        """
        ...

    def reset(self) -> None:
        """Forget every sequence and free what they held, the prefix cache in memory too."""

    def embed(
        self, inputs: SequenceOf[tuple[int, ...]], *, is_mean: bool, part: Part | None = None
    ) -> list[list[float]]:
        """Vectors of length 1 for inputs of like length; of one input's `part` none but the last.

        Raises NotImplementedError for a model whose states cannot be had.
        """
        ...

    def drop_embedding(self, id: int) -> None:
        """Forget an input whose last part will not come."""

    def files(self, tell: Callable[[Command], None]) -> SequenceOf[tuple[int, Stored]]:
        """What the prefix cache has on disk; `tell` hears, on any thread, what comes of it."""


# --- events: what the scheduler tells the outside ---------------------------------------------


@dataclass(slots=True)  # to make a frozen one takes five times as long
class Token:
    """One more output token. An end-of-sequence token is counted but carries no text."""

    id: int
    token: int
    is_eos: bool = False
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a sequence; `error` is set for FinishReason.ERROR."""

    id: int
    reason: FinishReason
    error: str | None = None


Event = Token | Finished


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


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is."""

    num_waiting: int
    num_running: int
    num_bytes: int  # of keys, values and states, by the ledger
    max_bytes: int | None
    num_steps: int


@dataclass(frozen=True, slots=True)
class Markers:
    """How a model marks what is no content, in its text; "" for what it does not know."""

    think_start: str = ""
    think_end: str = ""
    call_start: str = ""
    call_end: str = ""  # "" with a `call_start`: a call goes on to the end
    has_json_calls: bool = False  # between them is {"name": …, "arguments": {…}}
    is_harmony: bool = False  # gpt-oss's: see `harmony`


class Channel(Enum):
    """What a piece of an answer's text is."""

    CONTENT = "content"
    REASONING = "reasoning"


@dataclass(frozen=True, slots=True)
class Call:
    """The model calls a tool. `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Opened:
    """A call begins; its arguments follow while the model writes them."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of the call that is open, as JSON."""

    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The call that was open is this one."""

    call: Call


@dataclass(frozen=True, slots=True)
class Broken:
    """What was open is no call: so much of the answer's text has been told as one.

    What follows of it is told as text. An answer that does not stream has all of it as text.
    """

    text: str


CallPart = Opened | Arguments | Closed | Broken


@dataclass(slots=True)  # to make a frozen one takes five times as long
class Delta:
    """More text of a sequence. `num_output` counts its tokens so far; `usage` is as of now.

    `logprobs` are (token id, its logprobs) of the tokens drawn since the last delta, where the
    sequence asked for them; what a token's text is may still be held back.
    """

    text: str
    num_output: int
    logprobs: tuple[tuple[int, Logprobs], ...] = ()
    usage: Usage | None = None
    channel: Channel = Channel.CONTENT
    calls: tuple[Call, ...] = ()  # after the text
    part: CallPart | None = None  # of a call that is told in parts, without text or calls


@dataclass(frozen=True, slots=True)
class Progress:
    """So many tokens of a prompt are computed, for a sequence whose sink wants to know."""

    num_computed: int
    usage: Usage


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a sequence's answer: nothing follows."""

    reason: FinishReason
    usage: Usage = field(default_factory=Usage)
    error: str | None = None
    stop: str | None = None  # the stop string that was met
    num_calls: int = 0


Output = Delta | Progress | Done


class Sink(Protocol):
    """Where a sequence's outputs go: called on the loop thread, must not block or raise."""

    def __call__(self, output: Output) -> None: ...


class Detokenizer(Protocol):
    """Token ids to text, special tokens left out; ids that no text belongs to give ""."""

    def __call__(self, tokens: SequenceOf[int]) -> str: ...
