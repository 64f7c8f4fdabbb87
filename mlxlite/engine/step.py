"""The records that pass between engine, scheduler and runner; no behaviour of their own.

A request (an HTTP call) becomes one or more sequences. A sequence enters the scheduler as a
command, leaves it in steps, and its results are tokens and events:

    command ─▶ Scheduler ─▶ Step ─▶ Runner ─▶ Outcome ─▶ Scheduler ─▶ event

Everything here is immutable (`Token` by convention only, because there is one for each token) and
free of MLX, sockets and clocks, so a log of commands and outcomes replays a run exactly. Ranges are
`[start, stop)`; counts are `num_*`.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from mlxlite.engine.memory import Memory
from mlxlite.engine.sequence import FinishReason, Logprobs, PromptLogprobs, Sequence, Usage
from mlxlite.prefix_cache.operations import CacheOp, Hit, Stored


class Status(Enum):
    """A sequence goes down the list; preempted, back to WAITING; to FINISHED from any status."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    LEAVING = "leaving"  # preempted, the token of its last launched row not yet returned
    FINISHED = "finished"


# --- commands: everything that reaches the scheduler from outside, in one order ---------------


@dataclass(frozen=True, slots=True)
class Add:
    """A new sequence. Its id has never been used before."""

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class Finish:
    """End a sequence from outside: a disconnect, a cancel, a stop string, a failure."""

    id: int
    reason: FinishReason
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SetChunkBudget:
    """Limit the prompt tokens of a step, from the measured prefill rate.

    `num_tokens` is for a step that also decodes, `idle_tokens` for one that only prefills.
    """

    num_tokens: int
    idle_tokens: int


@dataclass(frozen=True, slots=True)
class SetChunkLimit:
    """Limit the prompt tokens of any step, from the measured memory of steps."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The device step raised and the runner lost its caches: fail every running sequence."""

    error: str


@dataclass(frozen=True, slots=True)
class CloseBatch:
    """Static batching: the gathering time is over, run the batch as it is."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A payload of the prefix cache has been read from disk."""

    payload: int


@dataclass(frozen=True, slots=True)
class Written:
    """A payload of the prefix cache has been written to disk."""

    payload: int


@dataclass(frozen=True, slots=True)
class DiskFailed:
    """A payload of the prefix cache could not be written to disk or read from it."""

    payload: int


@dataclass(frozen=True, slots=True)
class ClearCache:
    """Drop all cached prefixes."""


Command = (
    Add
    | Finish
    | StepFailed
    | SetChunkBudget
    | SetChunkLimit
    | CloseBatch
    | Fetched
    | Written
    | DiskFailed
    | ClearCache
)


# --- steps: what one tick launches ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence leaves the queue.

    `outputs` are the tokens drawn before a preemption. Its prefill starts after its `hit`.
    """

    sequence: Sequence
    outputs: tuple[int, ...] = ()
    hit: Hit = field(default_factory=Hit)

    @property
    def num_tokens(self) -> int:
        """Prompt and outputs; all but the last must be in the cache to draw the next."""
        return len(self.sequence.prompt.tokens) + len(self.outputs)


@dataclass(frozen=True, slots=True)
class EncodeImage:
    """Run the vision tower on image number `image` of one admitted sequence."""

    id: int
    image: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prefill the tokens `[start, stop)` of one admitted sequence.

    A prompt of n tokens is prefilled up to n - 1: the last one is the input of the first decode
    row, so that sampling happens in one place and the output layer never runs over a whole prompt.
    A chunk that `is_scored` returns the likelihoods of the prompt's tokens `[start + 1, stop]`.
    """

    id: int
    start: int
    stop: int
    is_scored: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One tick's work, in the order of the fields.

    `rows` are the sequences that decode one token each, in order of joining; a sequence's first row
    may be in the step of its last chunk. The prefix cache's operations run twice: `before` the
    release, for the sequences that are released, and `after` the chunks, for those that go on.
    """

    number: int
    before: tuple[CacheOp, ...] = ()
    released: tuple[int, ...] = ()
    admitted: tuple[Admission, ...] = ()
    images: tuple[EncodeImage, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    after: tuple[CacheOp, ...] = ()
    rows: tuple[int, ...] = ()

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of a step: a token for each of its rows, in their order.

    `logprobs` is by id, for the rows that request them. A failed sequence has no meaningful token.
    Times in seconds, 0 if not known: `device_s` is how long the device had this step to itself;
    the device thread spent `build_s` on the graph, `dispatch_s` on the dispatch and `wait_s`
    waiting for the tokens. `token_bytes` is the memory of a prompt token's intermediate results.
    `scored` are the results of the scored chunks, by id.
    """

    tokens: tuple[int, ...] = ()
    logprobs: Mapping[int, Logprobs] = field(default_factory=dict)
    failed: tuple[tuple[int, str], ...] = ()  # (id, reason)
    device_s: float = 0.0
    build_s: float = 0.0
    dispatch_s: float = 0.0
    wait_s: float = 0.0
    token_bytes: float = 0.0
    lost: tuple[int, ...] = ()  # payloads of the prefix cache that turned out to be missing
    scored: Mapping[int, PromptLogprobs] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of a long input that is embedded in several calls under one `id`."""

    id: int
    is_last: bool


class Launched(Protocol):
    """A dispatched step; made and read by the runner alone."""

    @property
    def step(self) -> Step: ...


class Runner(Protocol):
    """The model, as the engine sees it. Calls are made on the device thread, one at a time."""

    @property
    def memory(self) -> Memory:
        """What sequences hold by length, and the budget for them."""

    def advance(
        self, step: Step | None, in_flight: Launched | None
    ) -> tuple[Launched | None, Outcome | None]:
        """Dispatch `step`, then wait for `in_flight`, the step launched before it.

        A sequence that fails alone is reported in the outcome of its step. Raises if the whole
        step fails; the caller then ends every sequence and calls `reset`.
        """
        ...

    def reset(self) -> None:
        """Free every sequence and all of the prefix cache that is in memory."""

    def embed(
        self, inputs: SequenceOf[tuple[int, ...]], *, is_mean: bool, part: Part | None = None
    ) -> list[list[float]]:
        """Vectors of length 1 for inputs of like length; with `part` only for the last part.

        Raises NotImplementedError for a model whose hidden states are not accessible.
        """
        ...

    def drop_embedding(self, id: int) -> None:
        """Free an input of which no further part will be passed."""

    def files(self, on_event: Callable[[Command], None]) -> SequenceOf[tuple[int, Stored]]:
        """List stored prefixes; `on_event` is called from the I/O thread with later results."""


# --- events: what the scheduler returns --------------------------------------------------------


@dataclass(slots=True)  # a frozen one takes five times as long to create
class Token:
    """One more output token. An end-of-sequence token is counted but has no text.

    `usage` is as of this token, for the sink of a sequence that wants it.
    """

    id: int
    token: int
    is_eos: bool = False
    logprobs: Logprobs | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """The likelihoods of a part of a prompt: in order, complete before the first `Token`."""

    id: int
    logprobs: PromptLogprobs


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a sequence; `error` is set for FinishReason.ERROR and DISPLACED."""

    id: int
    reason: FinishReason
    error: str | None = None
    usage: Usage = field(default_factory=Usage)  # set for its sink


Event = Token | Scored | Finished


# --- what the engine delivers -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prefilled:
    """`num_computed` tokens of a prompt are in the cache, where the sequence wants progress."""

    num_computed: int
    usage: Usage


class Sink(Protocol):
    """The receiver of one sequence's tokens: called on the loop thread, must not block.

    A sink that raises fails its sequence, and is called once more, with that `Finished`.
    """

    def __call__(self, output: "Token | Scored | Prefilled | Finished") -> None: ...


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
