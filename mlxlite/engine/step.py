"""The nouns: what the modules say to one another, and nothing that does anything.

A request (an HTTP call) becomes one or more sequences. A sequence enters the scheduler as a
command, leaves it in steps, and comes back as tokens and events:

    command ─▶ Scheduler ─▶ Step ─▶ Runner ─▶ Outcome ─▶ Scheduler ─▶ event

Everything here is immutable (tokens and deltas by rule: there is one for each token) and free of
MLX, sockets and clocks, so a log of commands and outcomes replays a run exactly. Ranges are
`[start, stop)`; counts are `num_*`.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from mlxlite.engine.memory import Memory
from mlxlite.engine.sequence import FinishReason, Logprobs, Sequence, Usage
from mlxlite.prefix_cache.operations import NO_HIT, CacheOp, Hit, Stored


class Status(Enum):
    """Where a sequence is: down the list; preempted, back to WAITING; FINISHED from anywhere."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    LEAVING = "leaving"  # preempted, its last launched token still to come
    FINISHED = "finished"


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

    `outputs` are the tokens it had drawn before a preemption. It begins after its `hit`.
    """

    sequence: Sequence
    outputs: tuple[int, ...] = ()
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
    may be in the step of its last chunk. The prefix cache is worked on twice: `before` for the
    sequences that are then released, `after` the chunks for those that go on.
    """

    number: int
    before: tuple[CacheOp, ...] = ()
    released: tuple[int, ...] = ()
    admitted: tuple[Admission, ...] = ()
    looks: tuple[Look, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    after: tuple[CacheOp, ...] = ()
    rows: tuple[int, ...] = ()

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks)


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
    """One more output token. An end-of-sequence token is counted but carries no text.

    `usage` is as of this token, for the sink of a sequence that wants it.
    """

    id: int
    token: int
    is_eos: bool = False
    logprobs: Logprobs | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a sequence; `error` is set for FinishReason.ERROR."""

    id: int
    reason: FinishReason
    error: str | None = None
    usage: Usage = field(default_factory=Usage)  # set for its sink


Event = Token | Finished


# --- what the engine delivers -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prefilled:
    """`num_computed` tokens of a prompt are in the cache, where the sequence wants progress."""

    num_computed: int
    usage: Usage


class Sink(Protocol):
    """The receiver of one sequence's tokens: called on the loop thread, must not block.

    One that raises fails its sequence, and is called once more, with the `Finished` of that.
    """

    def __call__(self, output: Token | Prefilled | Finished) -> None: ...


class SinkFailed(Exception):
    """A sink cannot go on; the message is for the client."""


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the engine is."""

    num_waiting: int
    num_running: int
    num_bytes: int  # of keys, values and states, by the ledger
    max_bytes: int | None
    num_steps: int
