"""The scheduler: a pure function of the commands and tokens it has been given.

It decides which requests leave the queue, which prompt tokens are prefilled, which rows decode and
which requests are preempted. It never reads a clock, a socket, MLX or anything whose order is not
fixed, so the same commands and outcomes give the same steps (tested), and a run can be replayed.

    events = scheduler.apply(command)        arrivals, cancels, stop strings, budgets
    step   = scheduler.schedule()            what to launch now; None: nothing to do
    events = scheduler.complete(step, outcome)

`schedule` may be called again before the step it returned is complete (one step of lookahead).
Ends that are known by count leave the next step without overshoot; an end that is only known from
a token overshoots by one row, whose token `complete` drops.

Where decoding outgrows the memory, the last request in order is preempted: it goes back to the
queue with its tokens, and resumes without losing or repeating one.

Its parts: `request_table` holds the requests by place, `capacity` the limits on what runs
together, `prefix_sharing` the use of the prefix cache, `prefill` the share of a step's prompt
tokens. Their invariants hold after every operation and are asserted by `check()`.
"""

from dataclasses import dataclass, field

from mlxlite.engine.capacity import Capacity
from mlxlite.engine.chunk_budget import ChunkLimit
from mlxlite.engine.memory import Memory
from mlxlite.engine.prefill import prefill_order, share
from mlxlite.engine.prefix_sharing import PrefixSharing
from mlxlite.engine.request_state import RequestState
from mlxlite.engine.request_table import RequestTable
from mlxlite.engine.sequence import FinishReason, Logprobs, Sequence
from mlxlite.engine.step import (
    Add,
    Chunk,
    ClearCache,
    CloseBatch,
    Command,
    DiskFailed,
    EncodeImage,
    Event,
    Fetched,
    Finish,
    Finished,
    Outcome,
    SetChunkBudget,
    SetChunkLimit,
    Step,
    StepFailed,
    Token,
    Written,
)
from mlxlite.prefix_cache.index import PrefixCache
from mlxlite.prefix_cache.operations import CacheOp


@dataclass(frozen=True, slots=True)
class Policy:
    """What never changes while the scheduler lives.

    `max_rows` requests run together. Not `continuous` is static batching: a batch is gathered
    until it is full or `CloseBatch` is applied, and runs to its end before the next one starts.
    `chunk_size` prompt tokens are prefilled in a step without rows.
    """

    max_rows: int = 8
    continuous: bool = True
    chunk_size: int = 2048
    # Before anything is measured: small enough that a slow machine's first stream does not stall.
    first_chunk_budget: int = 32
    first_idle_budget: int = 512  # without rows
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
        self._idle_budget = min(policy.first_idle_budget, policy.chunk_size)
        self._chunk_limit = policy.chunk_size
        if policy.memory.work_bytes:
            self._chunk_limit = min(ChunkLimit.FIRST, policy.chunk_size)
        self._requests = RequestTable()
        self._capacity = Capacity(policy.max_rows, policy.memory)
        self._num_arrivals = 0
        self.num_steps = 0
        self._is_batch_closed = False
        self.prefix = _prefix_cache(policy)
        can_store = policy.prefix_bytes > 0
        self._sharing = PrefixSharing(
            self.prefix, can_store=can_store, can_wait=can_store and policy.continuous
        )

    def __repr__(self) -> str:
        return (
            f"<Scheduler waiting={len(self._requests.queue)} "
            f"prefilling={list(self._requests.prefilling)} "
            f"decoding={list(self._requests.decoding)} steps={self.num_steps}>"
        )

    @property
    def num_waiting(self) -> int:
        return len(self._requests.queue) + len(self._requests.leaving)

    def waiting(self) -> list[Sequence]:
        """The sequences in the queue that have no token yet."""
        return [state.sequence for state in self._requests.queue if not state.num_launched]

    @property
    def num_running(self) -> int:
        return self._requests.num_running

    @property
    def num_bytes(self) -> int:
        """What the running requests hold once their next rows and chunks have run."""
        return self._capacity.num_bytes(self._requests.running())

    @property
    def is_gathering(self) -> bool:
        """Static batching waits for more arrivals, or for `CloseBatch`."""
        return (
            not self._policy.continuous
            and not self._is_batch_closed
            and 0 < len(self._requests.queue) < self._policy.max_rows
            and self.num_running == 0
        )

    def running(self) -> tuple[int, ...]:
        """Ids of the requests that have left the queue."""
        requests = self._requests
        return (*requests.prefilling, *requests.decoding, *requests.leaving)

    # --- commands ---------------------------------------------------------------------------

    def apply(self, command: Command) -> list[Event]:
        """Take one command; the events it causes at once. A finish of an unknown id is void."""
        match command:
            case Add(sequence):
                self._add(sequence)
            case Finish(id, reason, error):
                if state := self._requests.states.get(id):
                    return [self._finish(state, reason, error)]
            case SetChunkBudget(num_tokens, idle_tokens):
                self._chunk_budget = max(1, min(num_tokens, self._policy.chunk_size))
                self._idle_budget = max(1, min(idle_tokens, self._policy.chunk_size))
            case SetChunkLimit(num_tokens):
                self._chunk_limit = max(1, min(num_tokens, self._policy.chunk_size))
            case StepFailed(error):
                return self._fail_running(error)
            case CloseBatch():
                self._is_batch_closed = self.is_gathering
            case Fetched(payload):
                self.prefix.fetched(payload)
            case Written(payload):
                self.prefix.written(payload)
            case DiskFailed(payload):
                self.prefix.unstored(payload)
            case ClearCache():
                self.prefix.clear()
        return []

    def _add(self, sequence: Sequence) -> None:
        self._requests.add(RequestState(sequence, self.num_steps, self._num_arrivals))
        self._num_arrivals += 1

    def _fail_running(self, error: str) -> list[Event]:
        states = [self._requests.states[id] for id in self.running()]
        self.prefix.forget_held()
        return [self._fail(state, error) for state in states]

    def _fail(self, state: RequestState, error: str) -> Finished:
        """End a request whose cache is unusable, so that nothing of it may be stored."""
        self._requests.remove(state)
        return Finished(state.id, FinishReason.ERROR, error)

    def _finish(
        self, state: RequestState, reason: FinishReason, error: str | None = None
    ) -> Finished:
        self._sharing.store(state)
        self._requests.remove(state)
        return Finished(state.id, reason, error)

    # --- steps ------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """Decide the next step and count its work as launched.

        In this order: preempt for what runs, because its growth precedes newcomers; admit, so that
        newcomers are in this step; images and chunks before rows, because a prompt that is computed
        decodes at once. The prefix cache may hold what all these leave.
        """
        for state in self._capacity.overflow(self._requests.running()):
            self._preempt(state)
        entering = self._admit()
        before = self.prefix.take_ops()
        admitted = tuple(self._sharing.admission(state) for state in entering)
        images, chunks = self._prefill()
        rows = self._rows()
        after = self._prefix_ops()
        released = self._requests.take_released()
        if not (released or images or chunks or rows or before or after):
            assert not admitted, "an admitted request always has an image, a chunk or a row"
            return None
        self.num_steps += 1
        work = tuple(images), tuple(chunks), after, rows
        return Step(self.num_steps, before, released, admitted, *work)

    def _preempt(self, state: RequestState) -> None:
        self._sharing.store(state)
        self._requests.preempt(state, self.num_steps)

    def _admit(self) -> list[RequestState]:
        """Admit the next of the queue while there is room, or others make it."""
        if not self._policy.continuous and (self.num_running or self.is_gathering):
            return []
        self._is_batch_closed = False
        entering: list[RequestState] = []
        passed: set[int] = set()  # they wait for a prefix, and hold back no other
        requests = self._requests
        while state := requests.queue.next(self.num_steps, requests.running(), passed):
            if self._sharing.must_wait(state, requests.prefilling):
                passed.add(state.id)
                continue
            if not self._reserve(state):
                break
            requests.admit(state, self.num_steps)
            entering.append(state)
        return entering

    def _reserve(self, state: RequestState) -> bool:
        """Make room by preempting others if that frees enough, none of them otherwise."""
        victims = self._capacity.victims_for(
            state,
            self._requests.running(),
            self.num_steps,
            may_preempt=self._policy.continuous,
        )
        for victim in victims or ():
            self._preempt(victim)
        return victims is not None

    def _prefill(self) -> tuple[list[EncodeImage], list[Chunk]]:
        """The images and chunks of this step.

        The rows' next tokens wait for a step's chunks, so beside rows these are held to the
        measured budget; so they are while a last token is in flight, which a launch may delay. A
        prompt that is computed joins the rows of this same step.
        """
        has_rows = bool(self._requests.decoding)
        budget = self._chunk_budget if has_rows else self._idle_budget
        budget = min(budget, self._chunk_limit)
        states = prefill_order(self._requests.prefilling.values())
        most = self._policy.memory.max_scored
        images, chunks = share(states, budget, has_rows=has_rows, max_scored=most)
        has_chunk = {chunk.id for chunk in chunks}
        for chunk in chunks:
            state = self._requests.states[chunk.id]
            self._requests.queue.charge(state, 0, chunk.stop - chunk.start)
        for state in states:
            is_computed = not state.num_to_prefill
            if state.id in has_chunk and (is_computed or state.num_computed in state.stops):
                self._sharing.store(state)
            if is_computed:
                self._requests.decode(state)
        return images, chunks

    def _rows(self) -> tuple[int, ...]:
        states = [state for state in self._requests.decoding.values() if state.has_row]
        for state in states:
            state.num_launched += 1
            state.num_computed += 1  # the row's input; its output is in no cache yet
            self._requests.queue.charge(state, 1)
        return tuple(state.id for state in states)

    def _prefix_ops(self) -> tuple[CacheOp, ...]:
        """Shrink the prefix cache to the memory that running requests leave."""
        if (budget := self._policy.memory.budget_bytes) is not None:
            self.prefix.shrink(budget - self.num_bytes)
        return self.prefix.take_ops()

    # --- tokens -----------------------------------------------------------------------------

    def complete(self, step: Step, outcome: Outcome) -> list[Event]:
        """Take a launched step's tokens. Rows of ended requests are overshoot: dropped."""
        events: list[Event] = []
        for id, error in outcome.failed:
            if state := self._requests.states.get(id):
                events.append(self._fail(state, error))
        self.prefix.lose(outcome.lost)
        for id, logprobs in outcome.scored.items():
            if state := self._requests.states.get(id):
                events += state.score(logprobs)
        assert len(outcome.tokens) == len(step.rows)
        for id, token in zip(step.rows, outcome.tokens, strict=True):
            if state := self._requests.states.get(id):
                events.extend(self._take(state, token, outcome.logprobs.get(id)))
        return events

    def _take(self, state: RequestState, token: int, logprobs: Logprobs | None) -> list[Event]:
        state.outputs.append(token)
        sequence = state.sequence
        is_eos = token in sequence.eos_tokens
        events: list[Event] = [Token(sequence.id, token, is_eos, logprobs)]
        if is_eos:
            events.append(self._finish(state, FinishReason.STOP))
        elif len(state.outputs) == sequence.max_tokens:
            events.append(self._finish(state, FinishReason.LENGTH))
        else:
            self._requests.requeue(state)
        return events

    def check(self) -> None:
        """Assert the invariants of all parts. Tests call it after every operation."""
        self.prefix.check()
        self._requests.check()
        self._capacity.check(self._requests.prefilling.values(), self._requests.decoding.values())


def _prefix_cache(policy: Policy) -> PrefixCache:
    memory = policy.memory
    prefix = PrefixCache(
        memory.token_bytes,
        memory.state_bytes if memory.has_state else None,
        block_size=policy.block_size,
        num_bytes=policy.prefix_bytes,
        disk_bytes=policy.prefix_disk_bytes,
    )
    prefix.to_token = policy.prefix_to_token
    return prefix
