"""Who runs next: a pure function of the commands and tokens it has been given.

The scheduler decides which sequences leave the queue, which prompt tokens are prefilled and which
rows decode. It never reads a clock, a socket, MLX or anything whose order is not fixed, so the same
commands and outcomes give the same steps (tested), and a run can be replayed from its log.

    events = scheduler.apply(command)        arrivals, cancels, stop strings, budgets
    step   = scheduler.schedule()            what to launch now; None: nothing to do
    events = scheduler.complete(step, outcome)

`schedule` may be called again before the step it returned is complete (one step of lookahead).
Ends that are known by count leave the next step without overshoot; an end that is only known from
a token overshoots by one row, whose token `complete` drops.

Invariants, asserted by `check()` and tested after every operation:
- a sequence is in exactly one of waiting, prefilling, decoding, or unknown;
- no more than `max_rows` sequences are outside the queue;
- launched tokens never exceed `max_tokens`; computed never exceeds prompt - 1;
- an id the runner has seen is released exactly once.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

from mlxlite.sequence import (
    Add,
    Chunk,
    CloseBatch,
    Command,
    Event,
    Finish,
    Finished,
    FinishReason,
    Outcome,
    Sequence,
    SetChunkBudget,
    Status,
    Step,
    Token,
)


@dataclass(frozen=True, slots=True)
class Policy:
    """What never changes while the scheduler lives.

    `max_rows` sequences run together. Not `continuous` is static batching: a batch is gathered
    until it is full or `CloseBatch` comes, and runs to its end before the next one starts.
    `chunk_size` prompt tokens are prefilled in a step while nobody decodes.
    """

    max_rows: int = 8
    continuous: bool = True
    chunk_size: int = 2048
    # Before anything is measured: small enough that a slow machine's first stream does not stall.
    first_chunk_budget: int = 128

    def __post_init__(self) -> None:
        assert self.max_rows >= 1
        assert self.chunk_size >= 1
        assert self.first_chunk_budget >= 1


@dataclass(slots=True)
class _State:
    """One live sequence: `num_computed` prompt tokens, `num_launched` rows are in steps so far."""

    sequence: Sequence
    arrival: int
    status: Status = Status.WAITING
    num_computed: int = 0
    num_launched: int = 0
    num_output: int = 0

    @property
    def key(self) -> tuple[int, int]:
        return (self.sequence.priority, self.arrival)

    @property
    def num_to_prefill(self) -> int:
        """The last prompt token is the first row's input, so it is never prefilled."""
        return len(self.sequence.prompt.tokens) - 1 - self.num_computed


class Scheduler:
    """See the module's docstring for the calling order."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._chunk_budget = min(policy.first_chunk_budget, policy.chunk_size)
        self._states: dict[int, _State] = {}
        self._queue: list[tuple[int, int, int]] = []  # (priority, arrival, id), sorted
        self._prefilling: dict[int, _State] = {}  # in order of admission
        self._decoding: dict[int, _State] = {}  # in order of joining: the runner's row order
        self._released: list[int] = []
        self._num_arrivals = 0
        self._num_steps = 0
        self._is_batch_closed = False

    def __repr__(self) -> str:
        return (
            f"<Scheduler waiting={len(self._queue)} prefilling={list(self._prefilling)} "
            f"decoding={list(self._decoding)} steps={self._num_steps}>"
        )

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def is_gathering(self) -> bool:
        """Static batching waits for more arrivals, or for `CloseBatch`."""
        return (
            not self._policy.continuous
            and not self._is_batch_closed
            and 0 < len(self._queue) < self._policy.max_rows
            and self.num_running == 0
        )

    def running(self) -> tuple[int, ...]:
        """Ids of the sequences that have left the queue."""
        return (*self._prefilling, *self._decoding)

    # --- commands ---------------------------------------------------------------------------

    def apply(self, command: Command) -> list[Event]:
        """Take one command; the events it causes at once. A finish of an unknown id is void."""
        match command:
            case Add(sequence):
                self._add(sequence)
            case Finish(id, reason, error):
                if id in self._states:
                    return [self._finish(self._states[id], reason, error)]
            case SetChunkBudget(num_tokens):
                self._chunk_budget = max(1, min(num_tokens, self._policy.chunk_size))
            case CloseBatch():
                self._is_batch_closed = self.is_gathering
        return []

    def _add(self, sequence: Sequence) -> None:
        assert sequence.id not in self._states, f"sequence {sequence.id} was added twice"
        state = _State(sequence, self._num_arrivals)
        self._num_arrivals += 1
        self._states[sequence.id] = state
        insort(self._queue, (*state.key, sequence.id))

    def _finish(self, state: _State, reason: FinishReason, error: str | None = None) -> Finished:
        id = state.sequence.id
        if state.status is Status.WAITING:
            del self._queue[bisect_left(self._queue, (*state.key, id))]
        else:
            self._released.append(id)
            self._prefilling.pop(id, None)
            self._decoding.pop(id, None)
        state.status = Status.FINISHED
        del self._states[id]
        return Finished(id, reason, error)

    # --- steps ------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """Decide the next step and count its work as launched."""
        released, self._released = tuple(self._released), []
        admitted = self._admit()
        chunks = self._chunk()
        rows = self._rows()
        if not (released or chunks or rows):
            assert not admitted, "an admitted sequence always has a chunk or a row"
            return None
        self._num_steps += 1
        return Step(self._num_steps, released, admitted, chunks, rows)

    def _admit(self) -> tuple[Sequence, ...]:
        """Move the head of the queue into the free places."""
        if not self._policy.continuous and (self.num_running or self.is_gathering):
            return ()
        self._is_batch_closed = False
        num_free = self._policy.max_rows - self.num_running
        taken, self._queue = self._queue[:num_free], self._queue[num_free:]
        for _, _, id in taken:
            state = self._states[id]
            state.status = Status.PREFILL
            self._prefilling[id] = state
        return tuple(self._states[id].sequence for _, _, id in taken)

    def _chunk(self) -> tuple[Chunk, ...]:
        """Share this step's prefill tokens among the prompts, in order of admission.

        While rows decode, their next token waits for the chunks of the step, so these are held
        to the measured budget. A prompt that is through joins the rows of this same step.
        """
        is_anybody_decoding = any(map(_has_row, self._decoding.values()))
        budget = self._chunk_budget if is_anybody_decoding else self._policy.chunk_size
        chunks: list[Chunk] = []
        for id, state in list(self._prefilling.items()):
            num_tokens = min(budget, state.num_to_prefill)
            if num_tokens:
                start = state.num_computed
                state.num_computed += num_tokens
                budget -= num_tokens
                chunks.append(Chunk(id, start, state.num_computed))
            if not state.num_to_prefill:
                state.status = Status.DECODE
                self._decoding[id] = self._prefilling.pop(id)
        return tuple(chunks)

    def _rows(self) -> tuple[int, ...]:
        rows = tuple(id for id, state in self._decoding.items() if _has_row(state))
        for id in rows:
            self._decoding[id].num_launched += 1
        return rows

    def complete(self, step: Step, outcome: Outcome) -> list[Event]:
        """Take a launched step's tokens. Rows of ended sequences are overshoot: dropped."""
        events: list[Event] = []
        for id, error in outcome.failed:
            if state := self._states.get(id):
                events.append(self._finish(state, FinishReason.ERROR, error))
        assert len(outcome.tokens) == len(step.rows)
        for id, token in zip(step.rows, outcome.tokens, strict=True):
            if state := self._states.get(id):
                events.extend(self._take(state, token))
        return events

    def _take(self, state: _State, token: int) -> list[Event]:
        state.num_output += 1
        sequence = state.sequence
        is_eos = token in sequence.eos_tokens
        events: list[Event] = [Token(sequence.id, token, is_eos)]
        if is_eos:
            events.append(self._finish(state, FinishReason.STOP))
        elif state.num_output == sequence.max_tokens:
            events.append(self._finish(state, FinishReason.LENGTH))
        return events

    # --- books ------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the module's invariants. Tests call it after every operation."""
        waiting = [id for _, _, id in self._queue]
        assert self._queue == sorted(self._queue)
        assert sorted([*waiting, *self._prefilling, *self._decoding]) == sorted(self._states)
        assert len(set(self._released)) == len(self._released)
        assert not set(self._released) & set(self._states)
        assert self.num_running <= self._policy.max_rows
        for state in self._states.values():
            assert 0 <= state.num_computed < len(state.sequence.prompt.tokens)
            assert state.num_output <= state.num_launched <= state.sequence.max_tokens
        for id in waiting:
            assert self._states[id].status is Status.WAITING
        for state in self._prefilling.values():
            assert state.status is Status.PREFILL
            assert state.num_launched == 0
        for state in self._decoding.values():
            assert state.status is Status.DECODE
            assert state.num_to_prefill == 0


def _has_row(state: _State) -> bool:
    return state.num_launched < state.sequence.max_tokens
