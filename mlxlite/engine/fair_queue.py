"""The waiting requests, and which of them is next: a level's rows are shared equally by tenants.

A tenant's own requests go by key: priority with ageing, then arrival. Among the tenants' first ones
the best level is next; within it the tenant with the fewest rows, then the one that has been served
least. Ageing lifts no request above the best priority that waits, or a tenant whose many requests
wait long would so hold off all others. A tenant is forgotten with its last live request. Pure.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from collections.abc import Sequence as SequenceOf

from mlxlite.engine.request_state import RequestState
from mlxlite.engine.sequence import Sequence

_TOKENS_PER_ROW = 32  # of a prompt that are computed in about the time of one row's token


def _key(state: RequestState) -> tuple[tuple[int, int], int]:
    return state.key, state.id


class FairQueue:
    """Requests in order; `served` is what each tenant's requests have had, in prefilled tokens."""

    def __init__(self) -> None:
        self._waiting: dict[bytes, list[RequestState]] = {}  # by tenant, sorted by key
        self._num_live: Counter[bytes] = Counter()
        self._served: dict[bytes, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[RequestState]:
        return (state for line in self._waiting.values() for state in line)

    def arrive(self, state: RequestState) -> None:
        """Count and queue a new request. A new tenant has been served as little as any other."""
        tenant = state.sequence.tenant
        if not self._num_live[tenant]:
            self._served[tenant] = min(self._served.values(), default=0)
        self._num_live[tenant] += 1
        self.push(state)

    def leave(self, state: RequestState) -> None:
        """A request that is not queued has ended."""
        tenant = state.sequence.tenant
        self._num_live[tenant] -= 1
        if not self._num_live[tenant]:
            del self._num_live[tenant], self._served[tenant]

    def push(self, state: RequestState) -> None:
        insort(self._waiting.setdefault(state.sequence.tenant, []), state, key=_key)

    def remove(self, state: RequestState) -> None:
        line = self._waiting[state.sequence.tenant]
        del line[bisect_left(line, _key(state), key=_key)]
        if not line:
            del self._waiting[state.sequence.tenant]

    def charge(self, state: RequestState, num_rows: int, num_prefilled: int = 0) -> None:
        self._served[state.sequence.tenant] += num_rows * _TOKENS_PER_ROW + num_prefilled

    def next(
        self, step: int, running: Iterable[RequestState], passed: Collection[int]
    ) -> RequestState | None:
        """The request to admit before `step`, of those whose ids are not in `passed`."""
        firsts = [
            next((state for state in line if state.id not in passed), None)
            for line in self._waiting.values()
        ]
        waiting = [state for state in firsts if state is not None]
        if len(waiting) < 2:
            return waiting[0] if waiting else None
        best = min(state.sequence.priority for state in waiting)
        num_rows = Counter(state.sequence.tenant for state in running)

        def order(state: RequestState) -> tuple[int, int, int, tuple[int, int]]:
            tenant = state.sequence.tenant
            level = max(best, state.level(step))
            return level, num_rows[tenant], self._served[tenant], state.key

        return min(waiting, key=order)

    def check(self) -> None:
        """Assert that each tenant's requests are in order, and that only live ones are counted."""
        for tenant, line in self._waiting.items():
            assert line
            assert line == sorted(line, key=_key)
            assert len(line) <= self._num_live[tenant]
        assert self._served.keys() == self._num_live.keys()


def displaced(
    arrivals: SequenceOf[Sequence], waiting: Iterable[Sequence], num_free: int
) -> list[Sequence] | None:
    """The waiting sequences whose places in a full queue go to one request's; None if none do.

    A sequence makes room for a better priority, and inside a priority for a tenant with fewer
    places: those of the worst priority first, then of the tenant with the most, then the latest.
    """
    kept, leaving = list(waiting), list[Sequence]()
    num_places = Counter(sequence.tenant for sequence in kept)

    def rank(sequence: Sequence) -> tuple[int, int, int]:
        return sequence.priority, num_places[sequence.tenant], sequence.id

    for i, arrival in enumerate(arrivals):
        if i >= num_free:
            num_own = num_places[arrival.tenant] + 1
            yielding = [
                sequence
                for sequence in kept
                if (sequence.priority, num_places[sequence.tenant]) > (arrival.priority, num_own)
            ]
            if not yielding:
                return None
            leaving.append(max(yielding, key=rank))
            kept.remove(leaving[-1])
            num_places[leaving[-1].tenant] -= 1
        num_places[arrival.tenant] += 1
    return leaving
