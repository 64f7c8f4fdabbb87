"""How the prompt tokens of a step are shared among the sequences that prefill. Pure.

A prompt is computed in chunks, and a chunk ends where the budget does, where something is to be
kept, or before a picture that has not been looked at. To look is work of its own kind: the vision
tower cannot be cut into pieces, so while rows decode a step has one look, or chunks, never both.
Where attention inside of pictures looks ahead, all tokens up to the last picture are one chunk.

The shortest prompt goes first, but none is passed over more often than `MAX_DEFERRALS`. The last
chunk of a long one is a short one, for in its step the rows that decode wait for it to join them
too: the copy of a batch that is padded to its length.
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from mlxlite.engine.sequence import Sequence
from mlxlite.engine.step import Chunk, Look, Status
from mlxlite.prefix_cache.hashing import Blocks, extended

# The shortest prompt goes first, but none is passed over in more steps than this.
MAX_DEFERRALS = 8


@dataclass(slots=True)
class State:
    """One live sequence. `num_launched` rows are in steps so far, `outputs` have come back.

    `num_computed` tokens of the present stay are in the runner's cache or in a step: of the prompt
    and, after a preemption, of the outputs. `num_seen` of its pictures need no look any more.
    """

    sequence: Sequence
    key: tuple[int, int]  # priority with ageing, then order of arrival: the lowest goes first
    status: Status = Status.WAITING
    start: int = 0  # what it had when it was admitted
    num_computed: int = 0
    num_seen: int = 0
    num_launched: int = 0
    num_deferred: int = 0
    outputs: list[int] = field(default_factory=list)
    stops: set[int] = field(default_factory=set)  # where its prefill pauses, to be kept so far
    waits_for: tuple[int, int] | None = None  # (id, tokens that it will have computed)

    def blocks(self) -> Blocks | None:
        """Of prompt and outputs."""
        blocks = self.sequence.prompt.blocks
        return extended(blocks, self.outputs) if blocks and self.outputs else blocks

    @property
    def num_launched_tokens(self) -> int:
        """What the runner has computed, or will have with the steps that it has been given."""
        if self.status is Status.DECODE:
            return len(self.sequence.prompt.tokens) + self.num_launched - 1
        return self.num_computed

    @property
    def num_tokens(self) -> int:
        return len(self.sequence.prompt.tokens) + len(self.outputs)

    @property
    def num_to_prefill(self) -> int:
        """The last token is the first row's input, so it is never prefilled."""
        return self.num_tokens - 1 - self.num_computed

    @property
    def length(self) -> int:
        """Tokens in the cache once its next row has run."""
        return len(self.sequence.prompt.tokens) + self.num_launched

    @property
    def has_row(self) -> bool:
        return self.num_launched < self.sequence.max_tokens

    @property
    def wants_look(self) -> bool:
        """Whether its next token cannot be computed before a picture is looked at."""
        prompt = self.sequence.prompt
        if self.num_seen == len(prompt.images):
            return False
        return prompt.images[self.num_seen].start < max(self.num_computed + 1, prompt.unbroken)

    @property
    def is_new(self) -> bool:
        """Whether it has had no chunk and needs no pause: it may be one chunk."""
        return (
            self.num_computed == self.start and not self.stops and not self.sequence.prompt.images
        )

    @property
    def is_long(self) -> bool:
        """Whether it has had a chunk and may be cut anywhere."""
        return self.num_computed > max(self.start, self.sequence.prompt.unbroken)

    def resume(self, num_computed: int) -> None:
        """It begins after so many tokens, which are there already."""
        self.start = self.num_computed = num_computed
        images = self.sequence.prompt.images
        self.num_seen = sum(image.stop <= num_computed for image in images)

    def num_ready(self, budget: int) -> int:
        """Tokens of its next chunk: to where it is kept, or to the next picture."""
        prompt = self.sequence.prompt
        if self.num_computed < prompt.unbroken:
            return prompt.unbroken - self.num_computed if budget else 0
        ends = [stop for stop in self.stops if stop > self.num_computed]
        ends += [image.start for image in prompt.images[self.num_seen :]]
        return min(budget, self.num_to_prefill, *(end - self.num_computed for end in ends))


def by_turn(states: Iterable[State]) -> list[State]:
    """Who was passed over too often, then the shortest, then the first in order."""

    def turn(state: State) -> tuple[bool, int, tuple[int, int]]:
        return state.num_deferred < MAX_DEFERRALS, state.num_to_prefill, state.key

    return sorted(states, key=turn)


def share(
    states: SequenceOf[State], budget: int, *, is_anybody_decoding: bool
) -> tuple[list[Look], list[Chunk]]:
    """What these look at and prefill in this step, in their order; counted as done in them."""
    looks: list[Look] = []
    chunks: list[Chunk] = []
    # Rows wait while a long prompt's is put beside theirs: its last chunk is a short one.
    whole, most_last = budget, max(1, budget // 4) if is_anybody_decoding else budget
    for state in states:
        id = state.sequence.id
        num_looks = len(looks)
        while state.wants_look and not (is_anybody_decoding and (looks or chunks)):
            looks.append(Look(id, state.num_seen))
            state.num_seen += 1
        if is_anybody_decoding and looks:
            budget = 0
        num_tokens = 0 if state.wants_look else state.num_ready(budget)
        if num_tokens == state.num_to_prefill > most_last and state.is_long:
            num_tokens -= most_last
        elif num_tokens < state.num_to_prefill <= whole and state.is_new and chunks:
            num_tokens = 0  # one pass in the next step rather than one in this and one in that
        if num_tokens:
            start = state.num_computed
            state.num_computed += num_tokens
            budget = max(0, budget - num_tokens)
            chunks.append(Chunk(id, start, state.num_computed))
        if num_tokens or len(looks) > num_looks:
            state.num_deferred = 0
        elif state.num_to_prefill:
            state.num_deferred += 1
    return looks, chunks
