"""Who runs next: a pure function of the commands and tokens it has been given.

The scheduler decides which sequences leave the queue, which prompt tokens are prefilled, which rows
decode and who must give way. It never reads a clock, a socket, MLX or anything whose order is not
fixed, so the same commands and outcomes give the same steps (tested), and a run can be replayed.

    events = scheduler.apply(command)        arrivals, cancels, stop strings, budgets
    step   = scheduler.schedule()            what to launch now; None: nothing to do
    events = scheduler.complete(step, outcome)

`schedule` may be called again before the step it returned is complete (one step of lookahead).
Ends that are known by count leave the next step without overshoot; an end that is only known from
a token overshoots by one row, whose token `complete` drops.

Memory is admitted before it is allocated: a step is only made if what its rows and prompts hold,
padding counted, fits the budget. Where decoding outgrows it, the last in order gives way: it goes
back to the queue with its tokens, and resumes without losing or repeating one.

Invariants, asserted by `check()` and tested after every operation:
- a sequence is in exactly one of waiting, prefilling, decoding, leaving, or unknown;
- no more than `max_rows` sequences prefill or decode, and what they hold fits the budget;
- launched tokens never exceed `max_tokens`; computed never exceeds what there is, less one;
- an id the runner has seen is released once for each time it was admitted.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from mlxlite.engine.memory import Memory
from mlxlite.engine.prefill import State, by_turn, share
from mlxlite.engine.sequence import FinishReason, Logprobs, Sequence
from mlxlite.engine.step import (
    Add,
    Admission,
    Chunk,
    ClearCache,
    CloseBatch,
    Command,
    Event,
    Fetched,
    Finish,
    Finished,
    Look,
    Lost,
    Outcome,
    SetChunkBudget,
    Status,
    Step,
    Token,
    Unstored,
)
from mlxlite.prefix_cache.hashing import num_common, pauses
from mlxlite.prefix_cache.index import PrefixCache
from mlxlite.prefix_cache.operations import CacheOp, Hit

# A waiting sequence gains one priority level on the newcomers in so many steps, so that low levels
# progress: about half a minute at 30 steps a second.
STEPS_PER_LEVEL = 1000
# A prompt waits for another one's prefill when it so saves at least this many tokens.
MIN_SHARED = 64


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
    memory: Memory = field(default_factory=Memory)
    prefix_bytes: int = 0  # of the prefix cache; it yields to what runs
    prefix_disk_bytes: int = 0
    block_size: int = 16
    prefix_to_token: bool = True  # whether hits may end inside of a block

    def __post_init__(self) -> None:
        assert self.max_rows >= 1
        assert self.chunk_size >= 1
        assert self.first_chunk_budget >= 1


class Scheduler:
    """See the module's docstring for the calling order."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._chunk_budget = min(policy.first_chunk_budget, policy.chunk_size)
        self._states: dict[int, State] = {}
        self._queue: list[tuple[tuple[int, int], int]] = []  # (key, id), sorted
        self._prefilling: dict[int, State] = {}  # in order of admission
        self._decoding: dict[int, State] = {}  # in order of joining: the runner's row order
        self._leaving: dict[int, State] = {}
        self._released: list[int] = []
        self._num_arrivals = 0
        self.num_steps = 0
        self._is_batch_closed = False
        self.prefix = PrefixCache(
            policy.memory,
            block_size=policy.block_size,
            num_bytes=policy.prefix_bytes,
            disk_bytes=policy.prefix_disk_bytes,
        )
        self.prefix.to_token = policy.prefix_to_token

    def __repr__(self) -> str:
        return (
            f"<Scheduler waiting={len(self._queue)} prefilling={list(self._prefilling)} "
            f"decoding={list(self._decoding)} steps={self.num_steps}>"
        )

    @property
    def num_waiting(self) -> int:
        return len(self._queue) + len(self._leaving)

    @property
    def num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_bytes(self) -> int:
        """What the running sequences hold once their next rows and chunks have run."""
        return self._num_bytes((*self._decoding.values(), *self._prefilling.values()))

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
        return (*self._prefilling, *self._decoding, *self._leaving)

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
            case Lost(error):
                return self._lose(error)
            case CloseBatch():
                self._is_batch_closed = self.is_gathering
            case Fetched(payload):
                self.prefix.fetched(payload)
            case Unstored(payload):
                self.prefix.unstored(payload)
            case ClearCache():
                self.prefix.clear()
        return []

    def _lose(self, error: str) -> list[Event]:
        states = [self._states[id] for id in self.running()]
        self.prefix.forget_held()
        return [self._finish(s, FinishReason.ERROR, error, is_intact=False) for s in states]

    def _add(self, sequence: Sequence) -> None:
        assert sequence.id not in self._states, f"sequence {sequence.id} was added twice"
        aged = sequence.priority * STEPS_PER_LEVEL + self.num_steps
        state = State(sequence, (aged, self._num_arrivals))
        self._num_arrivals += 1
        self._states[sequence.id] = state
        insort(self._queue, (state.key, sequence.id))

    def _finish(
        self,
        state: State,
        reason: FinishReason,
        error: str | None = None,
        *,
        is_intact: bool = True,
    ) -> Finished:
        id = state.sequence.id
        if is_intact:
            self._keep(state)
        match state.status:
            case Status.WAITING:
                del self._queue[bisect_left(self._queue, (state.key, id))]
            case Status.LEAVING:
                del self._leaving[id]
            case _:
                self._released.append(id)
                self._prefilling.pop(id, None)
                self._decoding.pop(id, None)
        state.status = Status.FINISHED
        del self._states[id]
        return Finished(id, reason, error)

    # --- steps ------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """Decide the next step and count its work as launched.

        In this order: make room for what runs, because its growth comes before newcomers; admit,
        so that who comes now is in this step; looks and chunks before rows, because a prompt that
        is through decodes at once. The prefix cache has what all these leave.
        """
        self._shrink()
        entering = self._admit()
        before = self.prefix.take_ops()
        admitted = tuple(self._admission(state) for state in entering)
        looks, chunks = self._prefill()
        rows = self._rows()
        after = self._prefix_ops()
        released, self._released = tuple(self._released), []
        if not (released or looks or chunks or rows or before or after):
            assert not admitted, "an admitted sequence always has a look, a chunk or a row"
            return None
        self.num_steps += 1
        work = tuple(looks), tuple(chunks), after, rows
        return Step(self.num_steps, before, released, admitted, *work)

    # --- prefixes ---------------------------------------------------------------------------

    def _keep(self, state: State) -> None:
        """What a sequence has computed is there for the next one that begins like it."""
        is_running = state.status in (Status.PREFILL, Status.DECODE)
        if is_running and self._policy.prefix_bytes and (blocks := state.blocks()) is not None:
            self.prefix.insert(state.sequence.id, blocks, state.num_launched_tokens)

    def _prefix_ops(self) -> tuple[CacheOp, ...]:
        """The prefix cache yields to what runs."""
        if (budget := self._policy.memory.budget_bytes) is not None:
            self.prefix.shrink(budget - self.num_bytes)
        return self.prefix.take_ops()

    def _is_waiting_for_prefix(self, state: State) -> bool:
        """Whether somebody is computing what this prompt begins with, or it comes from disk."""
        blocks = state.sequence.prompt.blocks
        is_off = not self._policy.prefix_bytes or not self._policy.continuous
        if blocks is None or is_off:
            return False
        if state.waits_for is not None:
            other = self._prefilling.get(state.waits_for[0])
            if other is not None and other.num_computed < state.waits_for[1]:
                return True
            state.waits_for = None
        limit, unbroken = state.num_tokens - 1, state.sequence.prompt.unbroken
        hit = self.prefix.match(blocks, limit)
        if hit.num_tokens < unbroken:
            hit = Hit()  # it could not be gone on from
        if hit.missing and self.prefix.fetch(hit.missing):
            return True
        for id, other in self._prefilling.items():
            theirs = other.sequence.prompt.blocks
            if theirs is None:
                continue
            most = min(limit, other.num_tokens - 1) // blocks.size * blocks.size
            common = min(num_common(blocks, theirs), most)
            if common < max(unbroken, other.sequence.prompt.unbroken):
                continue
            if common > other.num_computed and common >= hit.num_tokens + MIN_SHARED:
                other.stops.add(common)
                state.waits_for = id, common
                return True
        return False

    # --- room -------------------------------------------------------------------------------

    def _num_bytes(self, running: Iterable[State]) -> int:
        """What these hold; a prompt counts as the padded row it will be."""
        memory = self._policy.memory
        if memory.budget_bytes is None:
            return 0
        return memory.batch(max(state.length, state.num_tokens) + 1 for state in running)

    def _fits(self, newcomer: State, running: list[State]) -> bool:
        """Whether there is room for one more beside these."""
        budget = self._policy.memory.budget_bytes
        if budget is None or not running:
            return True  # alone everything fits: the server has seen to it
        return self._num_bytes([*running, newcomer]) <= budget

    def _shrink(self) -> None:
        """Preempt the last in order until what has grown by decoding fits the budget."""
        budget = self._policy.memory.budget_bytes
        while budget is not None and self.num_running > 1 and self.num_bytes > budget:
            running = (*self._prefilling.values(), *self._decoding.values())
            self._preempt(max(running, key=lambda state: state.key))

    def _preempt(self, state: State) -> None:
        """Back to the queue, once the row that is in flight has brought its token."""
        id = state.sequence.id
        self._keep(state)
        self._prefilling.pop(id, None)
        self._decoding.pop(id, None)
        self._released.append(id)
        state.resume(0)
        state.status = Status.LEAVING
        self._leaving[id] = state
        self._requeue(state)

    def _requeue(self, state: State) -> None:
        if state.status is Status.LEAVING and len(state.outputs) == state.num_launched:
            del self._leaving[state.sequence.id]
            state.status = Status.WAITING
            insort(self._queue, (state.key, state.sequence.id))

    # --- admission --------------------------------------------------------------------------

    def _admit(self) -> list[State]:
        """Take from the head of the queue who has a place; make one for who may preempt."""
        if not self._policy.continuous and (self.num_running or self.is_gathering):
            return []
        self._is_batch_closed = False
        entering: list[State] = []
        for _, id in list(self._queue):
            state = self._states[id]
            if self._is_waiting_for_prefix(state):
                continue
            if not self._has_place(state):
                break
            self._enter(state)
            entering.append(state)
        return entering

    def _has_place(self, state: State) -> bool:
        """Whether there is a place, if need be made by those who rank lower: by all or none."""
        running = [*self._prefilling.values(), *self._decoding.values()]
        running.sort(key=lambda running: running.key)
        victims: list[State] = []
        while len(running) >= self._policy.max_rows or not self._fits(state, running):
            victim = running.pop()
            is_higher = state.sequence.priority < victim.sequence.priority
            if not (self._policy.continuous and is_higher and state.key < victim.key):
                return False
            victims.append(victim)
        for victim in victims:
            self._preempt(victim)
        return True

    def _enter(self, state: State) -> None:
        id = state.sequence.id
        del self._queue[bisect_left(self._queue, (state.key, id))]
        state.status = Status.PREFILL
        state.num_deferred = 0
        self._prefilling[id] = state

    def _admission(self, state: State) -> Admission:
        """Once it is sure who else enters and who leaves: what it need not compute."""
        hit, blocks, unbroken = Hit(), state.blocks(), state.sequence.prompt.unbroken
        if blocks is not None:
            hit = self.prefix.enter(blocks, state.num_tokens - 1, unbroken)
        state.resume(hit.num_tokens)
        if blocks is not None and self.prefix.has_checkpoints:
            state.stops |= {at for at in pauses(blocks, state.num_tokens) if at >= unbroken}
        return Admission(state.sequence, tuple(state.outputs), hit)

    # --- looks, chunks and rows -------------------------------------------------------------

    def _prefill(self) -> tuple[list[Look], list[Chunk]]:
        """What this step looks at and prefills: shortest first, none starved.

        While rows decode, their next token waits for the step's chunks, so these are held to the
        measured budget. A prompt that is through joins the rows of this same step.
        """
        is_anybody_decoding = any(state.has_row for state in self._decoding.values())
        budget = self._chunk_budget if is_anybody_decoding else self._policy.chunk_size
        states = by_turn(self._prefilling.values())
        looks, chunks = share(states, budget, is_anybody_decoding=is_anybody_decoding)
        has_chunk = {chunk.id for chunk in chunks}
        for state in states:
            id = state.sequence.id
            is_through = not state.num_to_prefill
            if id in has_chunk and (is_through or state.num_computed in state.stops):
                self._keep(state)
            if is_through:
                state.status = Status.DECODE
                self._decoding[id] = self._prefilling.pop(id)
        return looks, chunks

    def _rows(self) -> tuple[int, ...]:
        rows = tuple(id for id, state in self._decoding.items() if state.has_row)
        for id in rows:
            self._decoding[id].num_launched += 1
        return rows

    # --- tokens -----------------------------------------------------------------------------

    def complete(self, step: Step, outcome: Outcome) -> list[Event]:
        """Take a launched step's tokens. Rows of ended sequences are overshoot: dropped."""
        events: list[Event] = []
        for id, error in outcome.failed:
            if state := self._states.get(id):
                events.append(self._finish(state, FinishReason.ERROR, error, is_intact=False))
        self.prefix.lose(outcome.lost)
        assert len(outcome.tokens) == len(step.rows)
        for id, token in zip(step.rows, outcome.tokens, strict=True):
            if state := self._states.get(id):
                events.extend(self._take(state, token, outcome.logprobs.get(id)))
        return events

    def _take(self, state: State, token: int, logprobs: Logprobs | None) -> list[Event]:
        state.outputs.append(token)
        # Beside the row's own input: its output is in no cache yet.
        state.num_computed += state.status is Status.DECODE
        sequence = state.sequence
        is_eos = token in sequence.eos_tokens
        events: list[Event] = [Token(sequence.id, token, is_eos, logprobs)]
        if is_eos:
            events.append(self._finish(state, FinishReason.STOP))
        elif len(state.outputs) == sequence.max_tokens:
            events.append(self._finish(state, FinishReason.LENGTH))
        else:
            self._requeue(state)
        return events

    # --- books ------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the module's invariants. Tests call it after every operation."""
        self.prefix.check()
        waiting = [id for _, id in self._queue]
        places = [*waiting, *self._prefilling, *self._decoding, *self._leaving]
        assert self._queue == sorted(self._queue)
        assert sorted(places) == sorted(self._states)
        assert len(set(self._released)) == len(self._released)
        assert self.num_running <= self._policy.max_rows
        budget = self._policy.memory.budget_bytes
        assert budget is None or self.num_running <= 1 or self._num_launched_bytes() <= budget
        for state in self._states.values():
            assert 0 <= state.num_computed < state.num_tokens
            assert len(state.outputs) <= state.num_launched <= state.sequence.max_tokens
        self._check_places()

    def _num_launched_bytes(self) -> int:
        memory = self._policy.memory
        rows = memory.batch(state.length for state in self._decoding.values())
        prompts = sum(memory.row(state.num_computed) for state in self._prefilling.values())
        return rows + prompts

    def _check_places(self) -> None:
        for _, id in self._queue:
            assert self._states[id].status is Status.WAITING
            assert self._states[id].num_computed == 0
        for state in self._prefilling.values():
            assert state.status is Status.PREFILL
            assert state.num_launched == len(state.outputs)
        for state in self._decoding.values():
            assert state.status is Status.DECODE
            assert state.num_to_prefill == 0
        for id, state in self._leaving.items():
            assert state.status is Status.LEAVING
            assert len(state.outputs) < state.num_launched
            assert id not in self._decoding
