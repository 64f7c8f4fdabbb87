"""The live requests, each in the one place that its status names. Pure bookkeeping.

Moves requests between the queue, the prefilling, the decoding and the leaving, and remembers which
ids the runner must release. Never decides which request moves.

Invariants, asserted by `check()`: a live request is in exactly one place, in that of its status;
an id is released once for each time it was admitted.
"""

from mlxlite.engine.fair_queue import FairQueue
from mlxlite.engine.request_state import RequestState
from mlxlite.engine.step import Status


class RequestTable:
    """Requests by id. A dict's order is that of entering: for `decoding` the runner's row order."""

    def __init__(self) -> None:
        self.states: dict[int, RequestState] = {}
        self.queue = FairQueue()
        self.prefilling: dict[int, RequestState] = {}
        self.decoding: dict[int, RequestState] = {}
        self.leaving: dict[int, RequestState] = {}
        self._released: list[int] = []

    @property
    def num_running(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def running(self) -> list[RequestState]:
        """Requests that hold memory in the runner."""
        return [*self.prefilling.values(), *self.decoding.values()]

    def add(self, state: RequestState) -> None:
        assert state.id not in self.states, f"sequence {state.id} was added twice"
        self.states[state.id] = state
        self.queue.arrive(state)

    def admit(self, state: RequestState, step: int) -> None:
        """From the queue to the prefilling, before `step`."""
        self.queue.remove(state)
        state.status = Status.PREFILL
        state.admitted = step
        state.num_deferred = 0
        self.prefilling[state.id] = state

    def decode(self, state: RequestState) -> None:
        """From the prefilling to the decoding."""
        state.status = Status.DECODE
        self.decoding[state.id] = self.prefilling.pop(state.id)

    def preempt(self, state: RequestState, step: int) -> None:
        """From the running to the queue, or to the leaving while a launched row is in flight."""
        self._release(state)
        state.resume(0)
        state.stop_running(step)
        state.status = Status.LEAVING
        self.leaving[state.id] = state
        self.requeue(state)

    def requeue(self, state: RequestState) -> None:
        """From the leaving to the queue, if the token of the last launched row has come back."""
        if state.status is Status.LEAVING and len(state.outputs) == state.num_launched:
            del self.leaving[state.id]
            state.status = Status.WAITING
            self.queue.push(state)

    def remove(self, state: RequestState) -> None:
        """Finish a request, in whatever place it is."""
        match state.status:
            case Status.WAITING:
                self.queue.remove(state)
            case Status.LEAVING:
                del self.leaving[state.id]
            case _:
                self._release(state)
        state.status = Status.FINISHED
        self.queue.leave(state)
        del self.states[state.id]

    def take_released(self) -> tuple[int, ...]:
        """The ids to release in the next step, once."""
        released, self._released = tuple(self._released), []
        return released

    def _release(self, state: RequestState) -> None:
        self._released.append(state.id)
        self.prefilling.pop(state.id, None)
        self.decoding.pop(state.id, None)

    def check(self) -> None:
        """Assert the module's invariants."""
        self.queue.check()
        waiting = [state.id for state in self.queue]
        places = [*waiting, *self.prefilling, *self.decoding, *self.leaving]
        assert sorted(places) == sorted(self.states)
        assert len(set(self._released)) == len(self._released)
        for id in waiting:
            assert self.states[id].status is Status.WAITING
            assert self.states[id].num_computed == 0
            assert self.states[id].num_launched == len(self.states[id].outputs)
        for state in self.prefilling.values():
            assert state.status is Status.PREFILL
            assert state.num_launched == len(state.outputs)
            assert 0 <= state.num_computed < state.num_tokens
        for state in self.decoding.values():
            assert state.status is Status.DECODE
            assert state.num_computed == state.length - 1
        for state in self.leaving.values():
            assert state.status is Status.LEAVING
            assert state.num_computed == 0
            assert len(state.outputs) < state.num_launched
        for state in self.states.values():
            assert len(state.outputs) <= state.num_launched <= state.sequence.max_tokens
