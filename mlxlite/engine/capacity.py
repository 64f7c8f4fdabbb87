"""Which requests fit together: a limit on rows and a budget of bytes. Pure.

Memory is admitted before it is allocated: what rows and prompts hold after the next step, padding
counted, fits the budget. Never moves a request: it names the victims, and the scheduler preempts
them. One request alone always fits: the server has refused those that do not.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter

from mlxlite.engine.memory import Memory
from mlxlite.engine.request_state import RequestState


def _yields(
    victim: RequestState, newcomer: RequestState, num_rows: Mapping[bytes, int], step: int
) -> bool:
    """Whether a running request makes room for a better priority, or for its tenant's share.

    Ages count as they were when it was admitted: what runs does not age. Two rows between tenants,
    or one would preempt the other in turn.
    """
    own, other = victim.sequence, newcomer.sequence
    if other.priority < own.priority:
        return newcomer.level(step) < victim.level(victim.admitted)
    has_more = num_rows[own.tenant] - num_rows[other.tenant] >= 2
    return has_more and other.priority == own.priority


@dataclass(frozen=True, slots=True)
class Capacity:
    """At most `max_rows` requests run, in `memory.budget_bytes`."""

    max_rows: int
    memory: Memory

    def num_bytes(self, running: Iterable[RequestState]) -> int:
        """Bytes held after the next step; a prompt counts as the padded row it will be."""
        if self.memory.budget_bytes is None:
            return 0
        return self.memory.batch(max(state.length, state.num_tokens) + 1 for state in running)

    def fits(self, running: list[RequestState]) -> bool:
        budget = self.memory.budget_bytes
        return budget is None or len(running) <= 1 or self.num_bytes(running) <= budget

    def overflow(self, running: list[RequestState]) -> list[RequestState]:
        """The requests to preempt, last in order first, because decoding outgrew the budget."""
        kept, victims = sorted(running, key=attrgetter("key")), []
        while not self.fits(kept):
            victims.append(kept.pop())
        return victims

    def victims_for(
        self, newcomer: RequestState, running: list[RequestState], step: int, *, may_preempt: bool
    ) -> list[RequestState] | None:
        """The requests to preempt for a newcomer: of lower priority, or of a tenant with more rows.

        Empty if there is room; None if preemption does not make enough. The worst priority goes
        first, then the tenant with the most rows, and of its requests the last in order.
        """
        kept, victims = list(running), []
        num_rows = Counter(state.sequence.tenant for state in running)

        def rank(state: RequestState) -> tuple[int, int, tuple[int, int]]:
            return state.sequence.priority, num_rows[state.sequence.tenant], state.key

        while len(kept) >= self.max_rows or not self.fits([*kept, newcomer]):
            yielding = [state for state in kept if _yields(state, newcomer, num_rows, step)]
            if not may_preempt or not yielding:
                return None
            victim = max(yielding, key=rank)
            kept.remove(victim)
            num_rows[victim.sequence.tenant] -= 1
            victims.append(victim)
        return victims

    def check(self, prefilling: Iterable[RequestState], decoding: Iterable[RequestState]) -> None:
        """Assert that what the launched steps hold is within the limits."""
        prompts, rows = list(prefilling), list(decoding)
        assert len(prompts) + len(rows) <= self.max_rows
        held = self.memory.batch(state.length for state in rows)
        held += sum(self.memory.row(state.num_computed) for state in prompts)
        budget = self.memory.budget_bytes
        assert budget is None or len(prompts) + len(rows) <= 1 or held <= budget
