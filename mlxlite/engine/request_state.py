"""The scheduler's record of one request: its place in the order, and how far it has been computed.

Decides nothing about other requests, and never changes but through the scheduler and the sharing of
the prefill. Invariants: at most `max_tokens` rows are launched, and the last known token is never
prefilled, because it is the input of the next row.
"""

from dataclasses import dataclass, field

from mlxlite.engine.sequence import PromptLogprobs, Sequence
from mlxlite.engine.step import Scored, Status
from mlxlite.prefix_cache.hashing import Blocks, extended

# A waiting request gains one priority level on newcomers in so many steps, so that low levels
# progress: about half a minute at 30 steps a second.
STEPS_PER_LEVEL = 1000
STEPS_PER_SEQUENCE = 32  # about what a short answer takes: so much later is a request's next one


@dataclass(slots=True)
class RequestState:
    """One live sequence: `num_launched` rows are in steps so far, of which `outputs` came back.

    `num_computed` tokens since the last admission are in the runner's cache or in a step: of the
    prompt, of the outputs after a preemption, and each row's input; the first `start` of them were
    a prefix hit.
    Of its images `num_encoded` need no run of the vision tower any more.
    """

    sequence: Sequence
    since: int  # the step of its arrival, later by the levels that it would have gained running
    arrival: int
    status: Status = Status.WAITING
    start: int = 0
    num_computed: int = 0
    num_encoded: int = 0
    num_launched: int = 0
    admitted: int = 0  # the step before which it last left the queue
    num_deferred: int = 0  # steps without a part of its prompt, since the last one with one
    outputs: list[int] = field(default_factory=list)
    stops: set[int] = field(default_factory=set)  # where a chunk ends, to store the prefix so far
    waits_for: tuple[int, int] | None = None  # (id, tokens that it will have computed)
    num_scored: int = 0  # places of the prompt whose likelihoods have come back

    @property
    def id(self) -> int:
        return self.sequence.id

    @property
    def key(self) -> tuple[int, int]:
        """The order in a tenant's queue, the lowest first: priority with ageing, then arrival.

        Each further sequence of a request queues as if it had arrived some steps later.
        """
        late = self.sequence.number * STEPS_PER_SEQUENCE
        return self.sequence.priority * STEPS_PER_LEVEL + self.since + late, self.arrival

    def level(self, step: int) -> int:
        """Its priority, less what it has gained by waiting."""
        return self.sequence.priority - (step - self.since) // STEPS_PER_LEVEL

    def stop_running(self, step: int) -> None:
        """Only waiting ages: take back the levels that it gained since its admission."""
        self.since += (step - self.admitted) // STEPS_PER_LEVEL * STEPS_PER_LEVEL
        self.admitted = step

    @property
    def is_running(self) -> bool:
        return self.status in (Status.PREFILL, Status.DECODE)

    @property
    def num_tokens(self) -> int:
        return len(self.sequence.prompt.tokens) + len(self.outputs)

    @property
    def num_to_prefill(self) -> int:
        return self.num_tokens - 1 - self.num_computed

    @property
    def length(self) -> int:
        """Tokens in the cache once its next row has run."""
        return len(self.sequence.prompt.tokens) + self.num_launched

    @property
    def has_row(self) -> bool:
        return self.num_launched < self.sequence.max_tokens

    @property
    def needs_encoding(self) -> bool:
        """Whether an image must be encoded before the next token can be computed."""
        prompt = self.sequence.prompt
        if self.num_encoded == len(prompt.images):
            return False
        return prompt.images[self.num_encoded].start < max(
            self.num_computed + 1, prompt.min_first_chunk
        )

    @property
    def is_scored(self) -> bool:
        """Whether likelihoods are wanted of its next chunk."""
        return max(self.num_computed, self.num_scored) < self.sequence.num_to_score

    @property
    def is_new(self) -> bool:
        """Whether it has had no chunk, and one chunk can be all of it."""
        is_begun = self.num_computed > self.start
        return not (is_begun or self.stops or self.sequence.prompt.images)

    @property
    def is_long(self) -> bool:
        """Whether it has had a chunk and may be cut anywhere."""
        return self.num_computed > max(self.start, self.sequence.prompt.min_first_chunk)

    def blocks(self) -> Blocks | None:
        """The prefix cache's keys of prompt and outputs; None if the cache is not used."""
        blocks = self.sequence.prompt.blocks
        return extended(blocks, self.outputs) if blocks and self.outputs else blocks

    def score(self, logprobs: PromptLogprobs) -> list[Scored]:
        """Take a chunk's likelihoods; after a preemption some come again."""
        new = logprobs.after(self.num_scored)
        self.num_scored += len(new.tokens)
        return [Scored(self.id, new)] if new.tokens else []

    def resume(self, num_computed: int) -> None:
        """Begin after the first `num_computed` tokens, which are in the cache."""
        self.start = self.num_computed = num_computed
        images = self.sequence.prompt.images
        self.num_encoded = sum(image.stop <= num_computed for image in images)

    def num_ready(self, budget: int) -> int:
        """Tokens of the next chunk: up to the budget, the next stop or the next image."""
        prompt = self.sequence.prompt
        if self.num_computed < prompt.min_first_chunk:
            return prompt.min_first_chunk - self.num_computed if budget else 0
        ends = [stop for stop in self.stops if stop > self.num_computed]
        ends += [image.start for image in prompt.images[self.num_encoded :]]
        return min(budget, self.num_to_prefill, *(end - self.num_computed for end in ends))
