"""The scheduler with a prefix cache: what is computed, waited for and stored.

Everything runs over a `FakeRunner`, which holds each saved payload's tokens against the true ones,
and `check()` follows every operation. Prefilled tokens are counted from the steps alone.
"""

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import pytest
from fakes import FakeRunner, Run, answer, draw, drive, make_choices, make_sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlite.engine.memory import Memory
from mlxlite.engine.prefix_sharing import MIN_SHARED
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import FinishReason, Sequence
from mlxlite.engine.step import (
    Add,
    ClearCache,
    CloseBatch,
    Command,
    DiskFailed,
    Fetched,
    Finish,
    Finished,
    Launched,
    Outcome,
    SetChunkBudget,
    Step,
    StepFailed,
)
from mlxlite.prefix_cache.hashing import CHECKPOINT_STRIDE, blocks_of
from mlxlite.prefix_cache.operations import Hit, Save

BLOCK = 16
PLENTY = 1 << 30
SLICEABLE = Memory(layers=((64, None),))
STATEFUL = Memory(row_bytes=500, layers=((64, None), (32, 48)))
both = pytest.mark.parametrize("memory", [SLICEABLE, STATEFUL], ids=["sliceable", "stateful"])
CANCELLED = FinishReason.CANCELLED
Log = dict[int, list[Command]]


class Counting(FakeRunner):
    """Adds up what it keeps: rows and prefixes must never be more than there is."""

    scheduler: Scheduler

    def __init__(self, memory: Memory, **kwargs: object) -> None:
        super().__init__(memory=memory, **kwargs)  # type: ignore[arg-type]
        self.checkpoints: set[int] = set()

    def prefix_bytes(self) -> int:
        total = 0
        for id, (start, tokens) in self.kept.items():
            total += len(tokens) * self.memory.token_bytes
            if id in self.checkpoints:
                total += self.memory.state_bytes(start + len(tokens))
        return total

    def advance(
        self, step: Step | None, in_flight: Launched | None
    ) -> tuple[Launched | None, Outcome | None]:
        if step is not None:
            ops = (*step.before, *step.after)
            saved = {op.checkpoint for op in ops if isinstance(op, Save)}
            self.checkpoints |= {id for id in saved if id is not None}
        got = super().advance(step, in_flight)
        stats = self.scheduler.prefix.stats
        assert self.prefix_bytes() <= stats.num_bytes <= stats.max_bytes
        if (budget := self.memory.budget_bytes) is not None:
            assert stats.num_bytes <= max(0, budget - self.scheduler.num_bytes)
        return got


class Server:
    """A scheduler and a runner that live through several drives."""

    def __init__(
        self, memory: Memory, runner: Counting | None = None, *, num_bytes: int = PLENTY, **policy
    ) -> None:
        self.memory = memory
        self.runner = runner or Counting(memory)
        policy = {"block_size": BLOCK, "first_chunk_budget": 2048} | policy
        made = Policy(memory=memory, prefix_bytes=num_bytes, **policy)
        self.scheduler = self.runner.scheduler = Scheduler(made)
        self.num_asked = 0
        self.run = Run()

    def sequence(
        self, prompt: SequenceOf[int], max_tokens: int = 1, starts: SequenceOf[int] = (), **kwargs
    ) -> Sequence:
        self.num_asked += 1
        return cacheable(
            make_sequence(self.num_asked, max_tokens=max_tokens, prompt=prompt, **kwargs), starts
        )

    def drive(self, log: Log) -> Run:
        self.run = drive(self.scheduler, self.runner, log)
        assert self.runner.num_held == 0
        return self.run

    def ask(self, *sequences: Sequence) -> Run:
        """All of them at once; each has the tokens that it has alone."""
        run = self.drive({0: [Add(sequence) for sequence in sequences]})
        for sequence in sequences:
            tokens = run.tokens(sequence.id)
            assert tokens == [draw(sequence, i) for i in range(len(tokens))]
            assert len(run.ends(sequence.id)) == 1
        return run

    @property
    def num_prefilled(self) -> int:
        return sum(step.num_prefill_tokens for step in self.run.steps)

    def hit(self, sequence: Sequence) -> int:
        """What its last admission found."""
        return [h for s in self.run.steps for h in hits(s, sequence.id)][-1]


def hits(step: Step, id: int) -> list[int]:
    return [a.hit.num_tokens for a in step.admitted if a.sequence.id == id]


def cacheable(sequence: Sequence, starts: SequenceOf[int] = (), scope: int = 0) -> Sequence:
    blocks = blocks_of(sequence.prompt.tokens, scope, BLOCK, tuple(starts))
    return replace(sequence, prompt=replace(sequence.prompt, blocks=blocks))


def text(seed: int, num: int) -> list[int]:
    return random.Random(seed).choices(range(1000), k=num)


def order(run: Run) -> list[int]:
    return [a.sequence.id for step in run.steps for a in step.admitted]


# --- one after another ------------------------------------------------------------------------


@both
@pytest.mark.parametrize("num", [17, 33, 100, 160, 161, 1000])
def test_the_second_of_two_equal_prompts_computes_only_what_is_not_stored(memory, num: int):
    server = Server(memory)
    one, two = server.sequence(text(1, num)), server.sequence(text(1, num))
    server.ask(one)
    assert server.hit(one) == 0
    assert server.num_prefilled == num - 1
    server.ask(two)
    hit = num - 1 if memory.has_state else min(num - 1, num // BLOCK * BLOCK)
    assert server.hit(two) == hit
    assert server.num_prefilled == num - 1 - hit
    stats = server.scheduler.prefix.stats
    assert (stats.num_asked, stats.num_hit) == (2 * (num - 1), hit)


@both
def test_a_prompt_of_one_token_does_not_use_the_prefix_cache(memory: Memory):
    server = Server(memory)
    for _ in range(3):
        server.ask(server.sequence([5]))
    assert server.scheduler.prefix.stats.num_asked == 0


@both
def test_prompts_without_blocks_neither_read_nor_write(memory: Memory):
    server = Server(memory)
    bare = [make_sequence(100 + i, prompt=text(1, 200), max_tokens=3) for i in range(2)]
    server.ask(bare[0])
    assert server.scheduler.prefix.stats.num_bytes == 0
    assert server.runner.kept == {}
    server.ask(server.sequence(text(1, 200), 3))
    server.ask(bare[1])
    assert server.hit(bare[1]) == 0
    assert server.num_prefilled == 199
    assert server.scheduler.prefix.stats.num_hit == 0


@both
def test_a_cache_of_no_bytes_stores_nothing(memory: Memory):
    server = Server(memory, num_bytes=0)
    for _ in range(3):
        server.ask(server.sequence(text(1, 200), 3))
        assert server.num_prefilled == 199
    assert server.runner.kept == {}
    assert all(not step.before and not step.after for step in server.runner.steps)


@both
@pytest.mark.parametrize("continuous", [True, False])
def test_prompts_of_other_scopes_find_nothing(memory: Memory, continuous: bool):
    server = Server(memory, continuous=continuous, max_rows=1)
    for scope in range(3):
        bare = make_sequence(100 + scope, prompt=text(1, 200))
        server.ask(cacheable(bare, scope=scope))
        assert server.num_prefilled == 199


ENDS = ("count", "eos", "stop")


def first_turn(memory: Memory, end: str) -> tuple[Server, list[int]]:
    """A prompt of 40 and an answer of 24, however it ends; what the next turn begins with."""
    prompt, eos = text(1, 40), 25
    tokens = [i % 20 for i in range(100)]
    if end == "eos":
        tokens[23] = eos
    server = Server(memory, Counting(memory, answers={1: tokens}))
    sequence = server.sequence(prompt, 24 if end == "count" else 100, eos_tokens=frozenset({eos}))
    log: Log = {0: [Add(sequence)]}
    if end == "stop":  # a stop string is met while the next row is in flight
        log[25] = [Finish(sequence.id, FinishReason.STOP)]
    run = server.drive(log)
    (finished,) = run.ends(sequence.id)
    assert finished.reason is (FinishReason.LENGTH if end == "count" else FinishReason.STOP)
    turns = run.tokens(sequence.id)
    assert len(turns) == 24
    assert run.num_rows(sequence.id) == (24 if end == "count" else 25)
    return server, prompt + turns


@both
@pytest.mark.parametrize("end", ENDS)
def test_an_answer_is_not_computed_again_in_the_next_turn(memory: Memory, end: str):
    server, turns = first_turn(memory, end)
    turn = server.sequence([*turns, *text(2, 30)])
    server.ask(turn)
    computed = len(turns) - (end == "count")  # the last token's row has overshot, or is none
    assert server.hit(turn) == (computed if memory.has_state else computed // BLOCK * BLOCK)


@both
def test_an_edited_answer_is_not_a_hit(memory: Memory):
    server, turns = first_turn(memory, "eos")
    turn = server.sequence([*turns[:50], 999, *turns[51:], *text(2, 30)])
    server.ask(turn)
    assert server.hit(turn) == (39 if memory.has_state else 50)


@both
@pytest.mark.parametrize("chunk_size", [50, 2048])
def test_a_conversation_computes_each_turn_once(memory: Memory, chunk_size: int):
    server = Server(memory, chunk_size=chunk_size)
    prompt: list[int] = []
    starts: list[int] = []
    for turn in range(10):
        new = text(turn, 30 + 37 * turn)
        starts.append(len(prompt))
        prompt += new
        sequence = server.sequence(prompt, 20 + turn, starts)
        run = server.ask(sequence)
        allowed = CHECKPOINT_STRIDE if memory.has_state else BLOCK
        assert server.num_prefilled <= len(new) + allowed
        if turn:  # and what the last answer was is there but for its last token
            assert server.num_prefilled <= len(new) + BLOCK
        prompt += run.tokens(sequence.id)


@both
def test_a_conversation_whose_last_turn_is_rewritten_hits_up_to_its_message_start(memory: Memory):
    """A template may leave out earlier reasoning: the tokens before the last start are the same."""
    server = Server(memory)
    prompt, starts = text(0, 700), (300, 650)
    server.ask(server.sequence(prompt, 5, starts))
    again = server.sequence([*prompt[:650], *text(3, 80)], 5, (300, 650))
    server.ask(again)
    assert server.hit(again) == 650
    again = server.sequence([*prompt[:300], *text(4, 80)], 5, (300,))
    server.ask(again)
    assert server.hit(again) == 300


def test_a_very_long_prompt_has_a_checkpoint_in_each_stride():
    server = Server(STATEFUL, chunk_size=700)
    prompt = text(0, 3 * CHECKPOINT_STRIDE + 100)
    server.ask(server.sequence(prompt))
    for num in (2 * CHECKPOINT_STRIDE + 50, 3 * CHECKPOINT_STRIDE - 1):
        other = server.sequence([*prompt[:num], *text(1, 50)])
        server.ask(other)
        assert server.hit(other) == 2 * CHECKPOINT_STRIDE


# --- at once ----------------------------------------------------------------------------------


def family(server: Server, num: int = 8, shared: int = 1500, **kwargs) -> list[Sequence]:
    """Requests with one new beginning and tails of their own."""
    return [
        server.sequence([*text(0, shared), *text(100 + i, 20 + i)], 3, **kwargs) for i in range(num)
    ]


@both
@pytest.mark.parametrize("chunk_size", [7, 100, 512, 2048])
@pytest.mark.parametrize("max_rows", [2, 8])
def test_a_prefix_that_many_share_is_computed_once(memory, chunk_size: int, max_rows: int):
    server = Server(memory, chunk_size=chunk_size, max_rows=max_rows)
    sequences = family(server)
    run = server.ask(*sequences)
    assert server.num_prefilled <= 1.2 * 1520
    for sequence in sequences:
        assert run.tokens(sequence.id) == answer(sequence)


@both
def test_requests_that_arrive_while_the_prefix_is_computed_wait_for_it_too(memory: Memory):
    server = Server(memory, chunk_size=100)
    sequences = family(server)
    log: Log = {}
    for i, sequence in enumerate(sequences):
        log.setdefault(2 * i, []).append(Add(sequence))
    run = server.drive(log)
    assert server.num_prefilled <= 1.2 * 1520
    for sequence in sequences:
        assert run.tokens(sequence.id) == answer(sequence)


@both
@pytest.mark.parametrize("tick", [0, 1, 3, 7, 14])
@pytest.mark.parametrize("how", ["cancelled", "failed", "timed out", "preempted"])
def test_no_request_waits_for_a_prefix_for_ever(memory: Memory, how: str, tick: int):
    failing = {tick + 1: ((1, "no memory"),)} if how == "failed" else {}
    runner = Counting(memory, failing=failing)
    server = Server(memory, runner, chunk_size=100, max_rows=1 if how == "preempted" else 8)
    sequences = family(server)
    log: Log = {0: [Add(sequence) for sequence in sequences]}
    urgent = server.sequence(text(9, 40), 3, priority=-1)
    match how:
        case "cancelled":
            log.setdefault(tick + 1, []).append(Finish(1, CANCELLED))
        case "preempted":
            log.setdefault(tick + 1, []).append(Add(urgent))
        case "timed out":
            log.setdefault(tick + 1, []).append(Finish(1, FinishReason.ERROR, "timeout"))
    run = server.drive(log)
    survivors = sequences if how == "preempted" else sequences[1:]
    for sequence in survivors:
        assert run.tokens(sequence.id) == answer(sequence)
    if how != "failed":
        assert server.num_prefilled <= 1.2 * 1520 + 40 + 160  # what was kept is gone on from
    else:  # what a failed one has computed is not trusted
        assert server.num_prefilled <= 1.2 * 1520 + 100 * (tick + 2)


@both
def test_a_chain_of_leaders_that_are_all_cancelled_ends(memory: Memory):
    server = Server(memory, chunk_size=100)
    sequences = family(server)
    log: Log = {0: [Add(sequence) for sequence in sequences]}
    for i, sequence in enumerate(sequences[:-1]):
        log[2 * i + 1] = [Finish(sequence.id, CANCELLED)]
    run = server.drive(log)
    assert run.tokens(sequences[-1].id) == answer(sequences[-1])
    assert server.num_prefilled <= 1.2 * 1520


@both
def test_a_request_that_shares_nothing_overtakes_those_that_wait(memory: Memory):
    server = Server(memory, chunk_size=100)
    sequences = family(server)
    other = server.sequence(text(9, 60), 3)
    run = server.drive({0: [Add(s) for s in (*sequences, other)]})
    assert order(run)[:2] == [1, other.id]
    first = next(step for step in run.steps if other.id in step.rows)
    assert first.number == 1
    assert server.num_prefilled <= 1.2 * 1520 + 60


@both
def test_a_request_that_shares_little_does_not_wait(memory: Memory):
    server = Server(memory, chunk_size=100)
    one = server.sequence(text(0, 48) + text(1, 500))
    two = server.sequence(text(0, 48) + text(2, 500))
    run = server.ask(one, two)
    assert order(run) == [1, 2]
    assert len(run.steps[0].admitted) == 2


@both
def test_requests_that_waited_for_a_prefix_keep_their_order(memory: Memory):
    server = Server(memory, chunk_size=100, max_rows=3)
    priorities = (0, 2, 0, -1, 1)
    made = family(server, 5)
    sequences = [replace(s, priority=p) for s, p in zip(made, priorities, strict=True)]
    run = server.drive({0: [Add(s) for s in sequences]})
    assert order(run) == [4, 1, 3, 5, 2]
    for sequence in sequences:
        assert run.tokens(sequence.id) == answer(sequence)


@both
def test_arrival_order_holds_among_prompts_with_a_shared_prefix(memory: Memory):
    server = Server(memory, chunk_size=64, max_rows=2)
    one = [server.sequence([*text(0, 300), *text(50 + i, 9)], 3) for i in range(5)]
    two = [server.sequence([*text(1, 300), *text(70 + i, 9)], 3) for i in range(5)]
    mixed = [s for pair in zip(one, two, strict=True) for s in pair]
    run = server.ask(*mixed)
    for group in (one, two):
        ids = [s.id for s in group]
        assert [id for id in order(run) if id in ids] == ids
    assert server.num_prefilled <= 2 * (300 + 5 * (9 + BLOCK) + BLOCK)


@both
def test_an_urgent_request_waits_for_the_prefix_and_for_no_other_request(memory: Memory):
    server = Server(memory, chunk_size=100, max_rows=2)
    one = server.sequence([*text(0, 600), 1], 3)
    urgent = replace(server.sequence([*text(0, 600), 2], 3), priority=-1)
    later = server.sequence(text(5, 50), 30)
    run = server.drive({0: [Add(one)], 1: [Add(urgent), Add(later)]})
    assert server.hit(urgent) >= 592
    assert server.num_prefilled <= 601 + 2 * BLOCK + 50
    assert run.tokens(urgent.id) == answer(urgent)
    ends = [event.id for event in run.events if isinstance(event, Finished)]
    assert ends.index(urgent.id) < ends.index(later.id)


@both
def test_a_cache_too_small_for_the_shared_prefix_blocks_no_request(memory: Memory):
    server = Server(memory, num_bytes=5000, chunk_size=100)
    sequences = family(server)
    run = server.ask(*sequences)
    for sequence in sequences:
        assert run.tokens(sequence.id) == answer(sequence)


# --- what was begun is kept -------------------------------------------------------------------


@both
@pytest.mark.parametrize("reason", [CANCELLED, FinishReason.ERROR])
def test_a_long_prompt_that_ended_at_four_fifths_resumes_from_there(memory, reason):
    server = Server(memory, chunk_size=100)
    one, two = server.sequence(text(0, 3000)), server.sequence(text(0, 3000))
    server.drive({0: [Add(one)], 24: [Finish(one.id, reason, "timeout")]})
    num = server.num_prefilled  # with states, one chunk ends at a stride
    assert 2300 <= num <= 2400
    server.ask(two)
    assert server.hit(two) >= 0.75 * 3000
    assert server.hit(two) == num // BLOCK * BLOCK or memory.has_state
    assert server.hit(two) == num or not memory.has_state


@both
def test_a_preempted_prompt_resumes_from_its_last_chunk(memory: Memory):
    server = Server(memory, chunk_size=100, max_rows=1)
    one, urgent = server.sequence(text(0, 3000), 3), server.sequence(text(1, 40), 3, priority=-1)
    run = server.drive({0: [Add(one)], 24: [Add(urgent)]})
    assert order(run) == [one.id, urgent.id, one.id]
    assert 2300 <= server.hit(one) <= 2400
    assert run.tokens(one.id) == answer(one)
    assert server.num_prefilled == 2999 + 39


@both
def test_a_preempted_row_resumes_from_its_last_token(memory: Memory):
    server = Server(memory, max_rows=1)
    one, urgent = server.sequence(text(0, 100), 90), server.sequence(text(1, 40), 3, priority=-1)
    run = server.drive({0: [Add(one)], 60: [Add(urgent)]})
    assert order(run) == [one.id, urgent.id, one.id]
    assert server.hit(one) >= 100 + 59 - BLOCK
    assert run.tokens(one.id) == answer(one)


@both
def test_a_cancel_after_a_preemption_leaves_the_stored_prefix(memory: Memory):
    server = Server(memory, chunk_size=100, max_rows=1)
    one, urgent = server.sequence(text(0, 3000)), server.sequence(text(1, 40), 30, priority=-1)
    server.drive({0: [Add(one)], 24: [Add(urgent)], 27: [Finish(one.id, CANCELLED)]})
    again = server.sequence(text(0, 3000))
    server.ask(again)
    assert 2300 <= server.hit(again) <= 2400


@both
def test_a_cancel_before_the_first_chunk_stores_nothing(memory: Memory):
    """BUG: with states, a checkpoint of no tokens is saved (test_prefix.py has it alone)."""
    server = Server(memory, chunk_size=20)
    short, long = server.sequence(text(1, 30)), server.sequence(text(0, 3000))
    server.drive({0: [Add(short), Add(long)], 1: [Finish(long.id, CANCELLED)]})
    saves = [op for s in server.run.steps for op in (*s.before, *s.after) if isinstance(op, Save)]
    assert all(save.id != long.id for save in saves)


# --- memory -----------------------------------------------------------------------------------


@both
def test_the_cache_yields_to_rows(memory: Memory):
    memory = replace(memory, budget_bytes=120_000, block=0)
    server = Server(memory)
    for i in range(8):
        server.ask(server.sequence(text(i, 200)))
    before = server.scheduler.prefix.stats.num_bytes
    assert before > 80_000
    big = server.sequence(text(99, 1000), 300)
    run = server.ask(big)
    assert run.tokens(big.id) == answer(big)  # and never gave way itself
    assert order(run) == [big.id]
    assert server.scheduler.prefix.stats.num_evicted > 0


@both
def test_a_request_over_the_budget_leaves_the_cache_nothing(memory: Memory):
    memory = replace(memory, budget_bytes=20_000, block=0)
    server = Server(memory)
    server.ask(server.sequence(text(0, 100)))
    assert server.scheduler.prefix.stats.num_bytes > 0
    server.ask(server.sequence(text(1, 1000), 3))
    assert server.scheduler.prefix.stats.num_bytes <= 20_000


# --- loss -------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("where", ["lost_in_wait", "lost_in_launch"])
def test_nothing_is_found_after_a_failed_step(memory: Memory, where: str):
    """As the engine does it: the device is gone, so is all that it held."""
    lost: set[int] = set()
    server = Server(memory, Counting(memory, **{where: lost}), chunk_size=100)
    scheduler, runner, prompt = server.scheduler, server.runner, text(0, 500)
    server.ask(server.sequence(prompt))
    assert runner.kept
    victim = server.sequence([*prompt, *text(1, 900)])
    scheduler.apply(Add(victim))
    one, two = scheduler.schedule(), scheduler.schedule()
    scheduler.check()
    assert one is not None
    assert two is not None
    assert hits(one, victim.id) >= [496]
    lost.add(one.number if where == "lost_in_wait" else two.number)
    launched, _ = runner.advance(one, None)
    with pytest.raises(RuntimeError):
        runner.advance(two, launched)
    runner.reset()
    events = scheduler.apply(StepFailed("gone"))
    scheduler.check()
    assert [event.id for event in events] == [victim.id]
    assert scheduler.prefix.stats.num_bytes == 0
    found = []
    for _ in range(2):
        sequence = server.sequence(prompt)
        server.ask(sequence)
        found.append(server.hit(sequence))
    assert found[0] == 0
    assert found[1] >= 496 - BLOCK


@both
def test_a_missing_payload_is_not_found(memory: Memory):
    server = Server(memory)
    prompt = text(0, 300)
    one = server.sequence(prompt, 5)
    scheduler, runner = server.scheduler, server.runner
    scheduler.apply(Add(one))
    step = scheduler.schedule()
    assert step is not None
    launched, _ = runner.advance(step, None)
    lost = tuple(runner.kept)
    assert lost
    _, outcome = runner.advance(None, launched)
    assert outcome is not None
    runner.kept.clear()
    assert one.prompt.blocks is not None
    assert scheduler.prefix.match(one.prompt.blocks, 299).num_tokens >= 288
    scheduler.complete(step, replace(outcome, lost=lost))
    scheduler.check()
    assert scheduler.prefix.match(one.prompt.blocks, 299) == Hit()
    assert scheduler.prefix.stats.num_bytes == 0
    run = server.drive({0: []})
    assert [*outcome.tokens, *run.tokens(one.id)] == answer(one)
    for _ in range(2):  # and the end of it was kept again
        again = server.sequence(prompt)
        server.ask(again)
    assert server.hit(again) >= 288


@both
@pytest.mark.parametrize("tick", range(8))
def test_a_cleared_cache_is_empty_and_blocks_no_request(memory: Memory, tick: int):
    server = Server(memory, chunk_size=100)
    sequences = family(server, shared=400)
    log: Log = {0: [Add(sequence) for sequence in sequences]}
    log.setdefault(tick, []).append(ClearCache())
    run = server.drive(log)
    for sequence in sequences:
        assert run.tokens(sequence.id) == answer(sequence)
    server.drive({0: [ClearCache()]})
    assert server.scheduler.prefix.stats.num_bytes == 0
    assert server.runner.kept == {}
    again = server.sequence(text(0, 400))
    server.ask(again)
    assert server.hit(again) == 0


# --- static batching -------------------------------------------------------------------


@both
def test_static_batches_hit_the_prefixes_of_earlier_ones(memory: Memory):
    server = Server(memory, continuous=False, max_rows=3)
    server.ask(*family(server, 3, 400))
    assert server.num_prefilled == sum(400 + 20 + i - 1 for i in range(3))  # none waits
    again = family(server, 3, 400)
    server.ask(*again)
    for sequence in again:
        assert server.hit(sequence) >= 400
    assert server.num_prefilled < 100


@both
def test_in_a_static_batch_each_choice_computes_the_prompt(memory: Memory):
    server = Server(memory, continuous=False, max_rows=3)
    choices = make_choices(3, 200, 4, block_size=BLOCK)
    run = server.drive({0: [Add(choice) for choice in choices]})
    assert [run.tokens(s.id) for s in choices] == [answer(s) for s in choices]
    assert server.num_prefilled == 3 * 199


# --- choices ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("num_prompt", [65, 200, 1500, 3000])
@pytest.mark.parametrize("max_rows", [1, 3, 8])
def test_choices_share_one_prefill_but_for_the_last_block(
    memory: Memory, num_prompt: int, max_rows: int
):
    server = Server(memory, max_rows=max_rows)
    choices = make_choices(4, num_prompt, 5, block_size=BLOCK)
    run = server.drive({0: [Add(choice) for choice in choices]})
    assert [run.tokens(s.id) for s in choices] == [answer(s) for s in choices]
    assert len({tuple(run.tokens(s.id)) for s in choices}) == 4
    assert server.hit(choices[0]) == 0
    in_blocks = (num_prompt - 1) // BLOCK * BLOCK
    assert all(server.hit(s) >= in_blocks for s in choices[1:])
    assert server.num_prefilled <= num_prompt - 1 + 3 * (num_prompt - 1 - in_blocks)


@both
def test_choices_do_not_compute_a_cached_prefix_of_their_prompt(memory: Memory):
    server = Server(memory, chunk_size=100)
    server.ask(server.sequence(text(0, 400), 3))
    choices = choices_of(4, [*text(0, 400), *text(1, 60)])
    run = server.drive({0: [Add(choice) for choice in choices]})
    assert [run.tokens(s.id) for s in choices] == [answer(s) for s in choices]
    assert server.hit(choices[0]) >= 399 - BLOCK
    assert server.num_prefilled <= 60 + 4 * BLOCK + 3 * MIN_SHARED


@both
def test_choices_wait_with_the_first_one_for_a_prefix(memory: Memory):
    server = Server(memory, chunk_size=100)
    one = server.sequence([*text(0, 800), 1], 3)
    choices = choices_of(3, [*text(0, 800), *text(1, 90)])
    run = server.drive({0: [Add(s) for s in (one, *choices)]})
    assert [run.tokens(s.id) for s in (one, *choices)] == [answer(s) for s in (one, *choices)]
    assert server.num_prefilled <= 800 + 90 + 4 * BLOCK


@both
def test_other_sequences_run_while_choices_wait_for_the_first_one(memory: Memory):
    server = Server(memory, max_rows=2, chunk_size=10)
    choices = make_choices(3, 100, 2, block_size=BLOCK)
    others = [make_sequence(10 + i, 2, 2) for i in range(3)]
    run = server.drive({0: [Add(sequence) for sequence in (*choices, *others)]})
    assert order(run) == [1, 10, 11, 12, 2, 3]
    assert server.num_prefilled <= 99 + 2 * 3 + 3


@both
@pytest.mark.parametrize("tick", range(12))
@pytest.mark.parametrize("id", [1, 2, 3, 4])
def test_a_choice_that_is_cancelled_at_any_step_costs_the_others_no_token(
    memory: Memory, id: int, tick: int
):
    server = Server(memory, max_rows=2, chunk_size=40)
    choices = make_choices(4, 150, 4, block_size=BLOCK)
    log: Log = {0: [Add(choice) for choice in choices]}
    log.setdefault(tick, []).append(Finish(id, CANCELLED))
    run = server.drive(log)
    others = [s for s in choices if s.id != id]
    assert [run.tokens(s.id) for s in others] == [answer(s) for s in others]
    assert server.num_prefilled <= 149 + 4 * BLOCK  # what the cancelled one computed is kept


@both
@pytest.mark.parametrize("tick", range(1, 14))
def test_a_choice_that_is_preempted_at_any_step_loses_no_token(memory: Memory, tick: int):
    server = Server(memory, max_rows=1, chunk_size=40)
    choices = make_choices(4, 150, 6, block_size=BLOCK)
    urgent = make_sequence(50, 9, 3, priority=-1)
    log: Log = {0: [Add(choice) for choice in choices], tick: [Add(urgent)]}
    run = server.drive(log)
    for sequence in (*choices, urgent):
        assert run.tokens(sequence.id) == answer(sequence)
        assert len(run.ends(sequence.id)) == 1
    assert server.num_prefilled <= 149 + 5 * BLOCK + 8


@both
def test_a_choice_that_arrives_when_the_first_one_decodes_does_not_wait_for_its_end(memory: Memory):
    server = Server(memory)
    one, two = make_choices(2, 100, 300, block_size=BLOCK)
    run = server.drive({0: [Add(one)], 9: [Add(two)]})
    assert run.tokens(2) == answer(two)
    assert min(step.number for step in run.steps if 2 in step.rows) < 20
    assert server.num_prefilled <= 99 + 3


@both
@pytest.mark.parametrize("budget", [40_000, 80_000, 200_000])
def test_choices_beside_their_stored_prompt_fit_the_budget(memory: Memory, budget: int):
    """`Counting` holds rows and kept prefixes together against the budget."""
    server = Server(replace(memory, budget_bytes=budget, block=0), max_rows=4, chunk_size=64)
    choices = make_choices(8, 150, 40, block_size=BLOCK)
    run = server.drive({0: [Add(choice) for choice in choices]})
    assert [run.tokens(s.id) for s in choices] == [answer(s) for s in choices]


def choices_of(num: int, prompt: SequenceOf[int], first: int = 50) -> list[Sequence]:
    """Choices of this prompt."""
    one = cacheable(make_sequence(first, max_tokens=6, prompt=prompt)).prompt
    return [replace(choice, prompt=one) for choice in make_choices(num, max_tokens=6, first=first)]


# --- disk -------------------------------------------------------------------------------------


def drive_with_disk(server: Server, log: Log, delay: int = 2, max_ticks: int = 3000) -> Run:
    """`drive` with a disk that takes the given number of ticks."""
    scheduler, runner, run = server.scheduler, server.runner, Run()
    in_flight: Launched | None = None
    coming: list[tuple[int, int]] = []
    for tick in range(max_ticks):
        commands = list(log.get(tick, ()))
        for id in [id for due, id in coming if due <= tick]:
            if id in runner.files:
                runner.kept[id] = runner.files[id]
                commands.append(Fetched(id))
            else:
                commands.append(DiskFailed(id))
        coming = [(due, id) for due, id in coming if due > tick]
        for command in commands:
            run.events += scheduler.apply(command)
            scheduler.check()
        step = scheduler.schedule()
        scheduler.check()
        if step is None and in_flight is None:
            if tick >= max(log) and not coming:
                server.run = run
                assert runner.num_held == 0
                return run
            continue
        if step is not None:
            run.steps.append(step)
        launched, outcome = runner.advance(step, in_flight)
        if in_flight is not None and outcome is not None:
            run.events += scheduler.complete(in_flight.step, outcome)
            scheduler.check()
        in_flight = launched
        coming += [(tick + delay, id) for id in runner.fetching]
        runner.fetching.clear()
    raise AssertionError(f"no end: {scheduler}")


def forget_memory(server: Server) -> None:
    """What a reset leaves: the disk."""
    server.runner.reset()
    server.scheduler.apply(StepFailed("reset"))
    server.scheduler.check()
    assert server.runner.kept == {}


@both
def test_a_prefix_on_disk_is_waited_for_and_used(memory: Memory):
    server = Server(memory, prefix_disk_bytes=PLENTY)
    prompt = text(0, 400)
    drive_with_disk(server, {0: [Add(server.sequence(prompt))]})
    forget_memory(server)
    again, other = server.sequence(prompt, 3), server.sequence(text(5, 50), 3)
    run = drive_with_disk(server, {0: [Add(again), Add(other)]})
    assert server.hit(again) >= 384
    assert order(run) == [
        other.id,
        again.id,
    ]  # a request that needs nothing from disk does not wait
    assert run.tokens(again.id) == answer(again)
    assert server.scheduler.prefix.stats.num_from_disk > 0


@both
def test_a_prefix_that_cannot_be_read_from_disk_is_computed(memory: Memory):
    server = Server(memory, prefix_disk_bytes=PLENTY)
    prompt = text(0, 400)
    drive_with_disk(server, {0: [Add(server.sequence(prompt))]})
    forget_memory(server)
    server.runner.files.clear()
    again = server.sequence(prompt, 3)
    run = drive_with_disk(server, {0: [Add(again)]})
    assert server.hit(again) == 0
    assert run.tokens(again.id) == answer(again)


@both
def test_static_batches_do_not_wait_for_the_disk(memory: Memory):
    server = Server(memory, prefix_disk_bytes=PLENTY, continuous=False, max_rows=1)
    prompt = text(0, 400)
    drive_with_disk(server, {0: [Add(server.sequence(prompt))]})
    forget_memory(server)
    again = server.sequence(prompt, 3)
    run = drive_with_disk(server, {0: [Add(again)]})
    assert server.hit(again) == 0
    assert run.tokens(again.id) == answer(again)


@both
@pytest.mark.parametrize("num", [2, 3, 5])
def test_requests_that_wait_for_the_disk_do_not_evict_one_anothers_prefixes_for_ever(
    memory, num: int
):
    """BUG: each fetch evicts what the other has on its way, so none is ever admitted."""
    server = Server(memory, num_bytes=70_000, prefix_disk_bytes=PLENTY)
    prompts = [text(i, 500) for i in range(num)]
    for prompt in prompts:
        drive_with_disk(server, {0: [Add(server.sequence(prompt))]})
    forget_memory(server)
    sequences = [server.sequence(prompt, 3) for prompt in prompts]
    run = drive_with_disk(server, {0: [Add(s) for s in sequences]})
    for sequence in sequences:
        assert run.tokens(sequence.id) == answer(sequence)
    assert any(server.hit(sequence) for sequence in sequences)


# --- everything together ----------------------------------------------------------------------


def crowd(chance: random.Random, num: int, last_tick: int, blocked: float = 0.9) -> Log:
    """Requests that begin alike, go on, have choices, are cancelled, stopped and preempted."""
    log: Log = {}
    roots = [text(i, chance.choice((20, 90, 150))) for i in range(3)]
    prompts: list[list[int]] = list(roots)
    id = 0
    for _ in range(num):
        tick, first = chance.randrange(last_tick), id + 1
        prompt = [*chance.choice(prompts), *text(chance.randrange(99), chance.randrange(1, 40))]
        prompts = [*prompts[-9:], prompt[:250]]
        prompt = prompt[: chance.choice((300, 300, 60))]
        starts = sorted(chance.sample(range(len(prompt)), min(2, len(prompt))))
        priority = chance.choice((0, 0, 0, -1, 1, -10))
        max_tokens, has_blocks = chance.randrange(1, 20), chance.random() < blocked
        for _ in range(chance.choice((1, 1, 1, 1, 3))):
            id += 1
            sequence = make_sequence(
                id,
                max_tokens=max_tokens,
                prompt=prompt,
                eos_tokens=frozenset(chance.sample(range(26), 1)),
                priority=priority,
            )
            if has_blocks:
                sequence = cacheable(sequence, starts, first % 7 == 0)
            log.setdefault(tick, []).append(Add(sequence))
            if chance.random() < 0.2:
                reason = chance.choice((CANCELLED, FinishReason.STOP, FinishReason.ERROR))
                late = tick + chance.randrange(30)
                log.setdefault(late, []).append(Finish(id, reason))
    for _ in range(num // 10):
        log.setdefault(chance.randrange(last_tick), []).append(
            SetChunkBudget(chance.randrange(80), 512)
        )
    if chance.random() < 0.5:
        log.setdefault(chance.randrange(last_tick), []).append(ClearCache())
    return log


def sequences_of(log: Log) -> list[Sequence]:
    return [c.sequence for tick in sorted(log) for c in log[tick] if isinstance(c, Add)]


def assert_served(run: Run, log: Log) -> None:
    """Every sequence got the tokens that it gets alone, and one end."""
    ends: dict[int, Finished] = {}
    tokens: dict[int, list[int]] = {s.id: [] for s in sequences_of(log)}
    for event in run.events:
        assert event.id not in ends
        if isinstance(event, Finished):
            ends[event.id] = event
        else:
            tokens[event.id].append(event.token)
    assert ends.keys() == tokens.keys()
    for sequence in sequences_of(log):
        mine = tokens[sequence.id]
        assert mine == [draw(sequence, i) for i in range(len(mine))]
        if ends[sequence.id].reason is FinishReason.LENGTH:
            assert len(mine) == sequence.max_tokens


@both
@pytest.mark.parametrize("seed", range(3))
def test_a_crowd_with_a_cache_is_served_to_the_last_and_leaves_nothing(memory: Memory, seed: int):
    chance = random.Random(seed)
    budget = chance.choice((None, 150_000, 400_000))
    memory = replace(memory, budget_bytes=budget, block=chance.choice((0, 32)))
    server = Server(
        memory, num_bytes=chance.choice((30_000, 200_000, PLENTY)), max_rows=6, chunk_size=128
    )
    log = crowd(chance, 180, 700)
    run = server.drive(log)
    assert len(sequences_of(log)) > 200
    assert_served(run, log)
    assert server.scheduler.prefix.stats.num_hit > 0
    server.drive({0: [ClearCache()]})
    assert server.scheduler.prefix.stats.num_bytes == 0
    assert server.runner.kept == {}


@both
@pytest.mark.parametrize("seed", range(2))
def test_a_crowd_with_a_disk_is_served_to_the_last_and_leaves_nothing(memory: Memory, seed: int):
    """BUG: fetches that evict one another never end, and names on disk fill the memory."""
    chance = random.Random(seed)
    memory = replace(memory, budget_bytes=chance.choice((None, 200_000)), block=0)
    server = Server(memory, num_bytes=40_000, prefix_disk_bytes=400_000, max_rows=6, chunk_size=128)
    log = crowd(chance, 120, 500)
    run = drive_with_disk(server, log)
    assert_served(run, log)
    drive_with_disk(server, {0: [ClearCache()]})
    assert server.scheduler.prefix.stats.num_bytes == 0
    assert server.scheduler.prefix.stats.disk_bytes == 0
    assert server.runner.kept == server.runner.files == {}


@both
@pytest.mark.parametrize("seed", range(2))
def test_the_same_commands_give_the_same_steps_and_hits(memory: Memory, seed: int):
    memory = replace(memory, budget_bytes=200_000, block=0)

    def once() -> tuple[Run, int]:
        server = Server(memory, num_bytes=60_000, max_rows=5, chunk_size=64)
        return server.drive(crowd(random.Random(seed), 60, 250)), server.num_prefilled

    (one, num_one), (two, num_two) = once(), once()
    assert one.steps == two.steps
    assert one.events == two.events
    assert num_one == num_two
    assert any(a.hit != Hit() for step in one.steps for a in step.admitted)


@st.composite
def servers(pick: st.DrawFn) -> Server:
    budget = pick(st.one_of(st.none(), st.integers(20_000, 200_000)))
    memory = replace(
        pick(st.sampled_from((SLICEABLE, STATEFUL))),
        budget_bytes=budget,
        block=pick(st.sampled_from((0, 16))),
    )
    return Server(
        memory,
        num_bytes=pick(st.sampled_from((0, 5000, 40_000, PLENTY))),
        max_rows=pick(st.integers(1, 4)),
        continuous=pick(st.sampled_from((True, True, False))),
        chunk_size=pick(st.integers(1, 200)),
        first_chunk_budget=pick(st.integers(1, 200)),
    )


@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(servers(), st.integers(0, 2**32), st.integers(1, 10))
def test_under_any_policy_a_cache_changes_no_token(server: Server, seed: int, num: int):
    log = crowd(random.Random(seed), num, 40)
    for tick in range(60, 400, 5):
        log.setdefault(tick, []).append(CloseBatch())  # in the end every batch is closed
    run = server.drive(log)
    assert_served(run, log)
