"""Which requests fit together: a limit on rows and a budget of bytes. Pure.

Memory is admitted before it is allocated: what rows and prompts hold after the next step, padding
counted, fits the budget. Never moves a request: it names the victims, and the scheduler preempts
them. One request alone always fits: the server has refused those that do not.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from mlxlite.engine.memory import Memory
from mlxlite.engine.request_state import RequestState


def _key(state: RequestState) -> tuple[int, int]:
    return state.key


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
        if self.fits(running):
            return []
        kept, victims = sorted(running, key=_key), []
        while not self.fits(kept):
            victims.append(kept.pop())
        return victims

    def victims_for(
        self, newcomer: RequestState, running: list[RequestState], *, may_preempt: bool
    ) -> list[RequestState] | None:
        """The lower-priority requests to preempt for a newcomer, last in order first.

        Empty if there is room; None if preemption does not make enough.
        """
        kept, victims = sorted(running, key=_key), []
        while len(kept) >= self.max_rows or not self.fits([*kept, newcomer]):
            victim = kept.pop()
            is_higher = newcomer.sequence.priority < victim.sequence.priority
            if not (may_preempt and is_higher and newcomer.key < victim.key):
                return None
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
