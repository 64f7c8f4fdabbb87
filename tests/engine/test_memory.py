"""The memory ledger: launched work always fits, and a preempted request loses nothing.

The sums are done again here, from the steps alone, because `check()` is the scheduler's own word.
The last tests take everything together: thousands of requests with choices, priorities, cancels
and little memory, and every operation is followed by `check()`.
"""

import random

import pytest
from fakes import FakeRunner, Run, answer, draw, drive, make_choices, make_sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlite.engine.memory import Memory
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import FinishReason, Sequence
from mlxlite.engine.step import (
    Add,
    CloseBatch,
    Command,
    Finish,
    Finished,
    SetChunkBudget,
    Step,
    Token,
)

CANCELLED = FinishReason.CANCELLED
Log = dict[int, list[Command]]


def tokens_only(budget: int | None) -> Memory:
    """A byte a token, so that sums are lengths."""
    return Memory(budget, 0, ((1, None),), block=0)


def peaks(policy: Policy, log: Log, scheduler: Scheduler | None = None) -> tuple[Run, list[int]]:
    """A run, and what its rows and prompts held after each step, counted from the steps alone.

    A row's cache has its prompt and what it has drawn, all padded to the longest; a prompt's has
    its chunks so far. 0 where one runs alone, which may.
    """
    runner = FakeRunner()
    held: list[int] = []
    computed: dict[int, int] = {}

    def count(step: Step) -> None:
        for id in step.released:
            computed.pop(id, None)
        for admission in step.admitted:
            computed[admission.sequence.id] = 0
        for chunk in step.chunks:
            computed[chunk.id] = chunk.stop
        for id in step.rows:
            computed[id] += 1
        rows = [computed[id] for id in step.rows]
        prompts = [num for id, num in computed.items() if id not in step.rows]
        memory = policy.memory
        total = memory.batch(rows) + sum(map(memory.row, prompts))
        held.append(total if len(computed) > 1 else 0)

    run = drive(scheduler or Scheduler(policy), runner, log)
    for step in run.steps:
        count(step)
    assert runner.num_held == 0
    return run, held


def admissions(run: Run) -> list[int]:
    return [admission.sequence.id for step in run.steps for admission in step.admitted]


# --- arithmetic -------------------------------------------------------------------------------


def test_a_row_may_hold_a_block_more_than_its_tokens_and_its_constant_part():
    memory = Memory(None, 100, ((3, None),), block=16)
    assert [memory.row(n) for n in (0, 1, 16, 17)] == [148, 151, 196, 199]


def test_a_window_holds_no_more_than_its_tokens():
    memory = Memory(None, 0, ((10, None), (1, 20)), block=16)
    assert [memory.row(n) for n in (1, 4, 5, 10**6)] == [187, 220, 230, 10**7 + 180]


def test_a_model_without_a_growing_cache_holds_the_same_at_any_length():
    memory = Memory(500, 100)
    assert memory.row(1) == memory.row(10**6) == 100
    assert memory.max_tokens(10**6) == 10**6
    assert memory.batch([1, 7, 10**6]) == 300


def test_rows_are_padded_to_the_longest():
    memory = Memory(None, 7, ((2, None), (1, 8)), block=4)
    assert memory.batch([]) == 0
    assert memory.batch([5]) == memory.row(5)
    assert memory.batch(iter((1, 9, 3))) == 3 * memory.row(9) == 3 * (7 + 26 + 8)


@pytest.mark.parametrize("layers", [((3, None),), ((3, None), (5, 40)), ((5, 40),)])
def test_the_longest_that_fits_alone_is_found(layers: tuple[tuple[int, int | None], ...]):
    for budget in (0, 99, 147, 148, 149, 150, 151, 300, 301, 1000, 5003):
        memory = Memory(budget, 100, layers, block=16)
        for wanted in (1, 15, 16, 17, 1000):
            fitting = (n for n in range(1, wanted + 1) if memory.row(n) <= budget)
            assert memory.max_tokens(wanted) == max(fitting, default=0), (budget, wanted)


def test_without_a_limit_everything_that_is_wanted_fits():
    assert Memory(None, 1, ((10**9, None),)).max_tokens(12345) == 12345


# --- room -------------------------------------------------------------------------------------


def test_admission_waits_for_memory_and_not_only_for_a_row():
    log: Log = {0: [Add(make_sequence(id, 10, 2)) for id in (1, 2, 3, 4, 5)]}
    run, held = peaks(Policy(max_rows=5, memory=tokens_only(27)), log)
    assert max(len(step.rows) for step in run.steps) == 2
    assert max(held) <= 27
    assert admissions(run) == [1, 2, 3, 4, 5]  # none was preempted


def test_no_request_overtakes_the_one_that_waits_for_memory():
    """Or a long prompt would wait for ever: short ones always fit."""
    log: Log = {
        0: [Add(make_sequence(1, 10, 9)), Add(make_sequence(2, 30, 2))],
        1: [Add(make_sequence(3, 2, 2))],
    }
    run, held = peaks(Policy(max_rows=5, memory=tokens_only(40)), log)
    assert admissions(run) == [1, 2, 3]
    assert max(held) <= 40


def test_growth_preempts_the_last_in_order_and_loses_no_token():
    sequences = [make_sequence(id, 5, 30) for id in (1, 2, 3)]
    log: Log = {0: [Add(sequence) for sequence in sequences]}
    run, held = peaks(Policy(memory=tokens_only(60)), log)
    assert max(held) <= 60
    assert [step.released for step in run.steps if step.released][:2] == [(3,), (2,)]
    for sequence in sequences:
        assert run.tokens(sequence.id) == answer(sequence)
        assert run.ends(sequence.id) == [Finished(sequence.id, FinishReason.LENGTH)]
    assert {a.outputs for s in run.steps for a in s.admitted if a.sequence.id == 3} > {()}


def test_growth_preempts_the_lowest_priority():
    log: Log = {
        0: [
            Add(make_sequence(1, 5, 30, priority=2)),
            Add(make_sequence(2, 5, 30, priority=1)),
            Add(make_sequence(3, 5, 30)),
        ]
    }
    run, _ = peaks(Policy(memory=tokens_only(60)), log)
    assert [step.released for step in run.steps if step.released][:2] == [(1,), (2,)]


def test_a_single_request_always_runs_even_over_the_budget():
    """The server refuses what never fits; what it has let in must not hang."""
    log: Log = {0: [Add(make_sequence(1, 30, 20)), Add(make_sequence(2, 30, 20))]}
    run, _ = peaks(Policy(chunk_size=7, memory=tokens_only(10)), log)
    for id in (1, 2):
        assert run.tokens(id) == answer(make_sequence(id, 30, 20))
    assert max(len(step.rows) for step in run.steps) == 1


def test_a_short_prompt_that_joins_a_row_that_has_grown_is_padded_to_it():
    """Unpadded the two fit, 9 and 23 tokens in 40; joined they are twice the longer."""
    log: Log = {0: [Add(make_sequence(1, 14, 20))], 1: [Add(make_sequence(2, 9, 3))]}
    policy = Policy(first_chunk_budget=1, memory=tokens_only(40))
    run, held = peaks(policy, log)
    assert max(held) <= 40
    assert run.tokens(1) == answer(make_sequence(1, 14, 20))
    assert run.tokens(2) == answer(make_sequence(2, 9, 3))


def test_an_urgent_request_makes_room_by_preempting():
    log: Log = {
        0: [Add(make_sequence(id, 10, 12)) for id in (1, 2, 3)],
        4: [Add(make_sequence(4, 20, 2, priority=-1))],
    }
    run, held = peaks(Policy(memory=tokens_only(60)), log)
    (step,) = (s for s in run.steps if any(a.sequence.id == 4 for a in s.admitted))
    assert step.released == (3, 2)
    assert max(held) <= 60
    for id in (1, 2, 3):
        assert run.tokens(id) == answer(make_sequence(id, 10, 12))


def test_an_urgent_request_that_would_not_fit_even_so_preempts_no_request():
    """It fits beside neither; the first is of its own level and stays: the second can as well."""
    log: Log = {
        0: [Add(make_sequence(1, 35, 5, priority=-1)), Add(make_sequence(2, 5, 30))],
        2: [Add(make_sequence(3, 42, 2, priority=-1))],
    }
    run, _ = peaks(Policy(memory=tokens_only(84)), log)
    left = min(step.number for step in run.steps if 2 in step.released)
    (came,) = (s.number for s in run.steps if any(a.sequence.id == 3 for a in s.admitted))
    assert left == came


# --- choices ----------------------------------------------------------------------------------


def test_choices_together_never_exceed_the_budget():
    choices = make_choices(3, 21, 30)
    log: Log = {0: [Add(sequence) for sequence in choices]}
    for budget in (35, 60, 100):
        run, held = peaks(Policy(memory=tokens_only(budget)), log)
        assert max(held) <= budget
        assert [run.tokens(s.id) for s in choices] == [answer(s) for s in choices]


def test_choices_in_little_memory_have_the_same_tokens():
    choices = make_choices(8, 9, 12)
    others = [make_sequence(100 + i, 5, 9) for i in range(3)]
    log: Log = {0: [Add(s) for s in choices], 3: [Add(s) for s in others]}
    for budget in (25, 40, 70, 100):
        policy = Policy(chunk_size=4, memory=tokens_only(budget))
        run, _ = peaks(policy, log)
        assert [run.tokens(s.id) for s in (*choices, *others)] == [
            answer(s) for s in (*choices, *others)
        ]


# --- everything together ----------------------------------------------------------------------


def crowd(chance: random.Random, num: int, last_tick: int) -> Log:
    """Requests of one to four sequences, some cancelled, of any priority, at any time."""
    log: Log = {}
    id = 0
    for _ in range(num):
        tick = chance.randrange(last_tick)
        num_choices = chance.choice((1, 1, 1, 2, 4))
        num_prompt, max_tokens = chance.choice((1, 2, 5, 17, 40)), chance.randrange(1, 15)
        prompt = [chance.randrange(26) for _ in range(num_prompt)]
        priority = chance.choice((0, 0, 0, -1, 1, -10))
        eos = frozenset(chance.sample(range(26), chance.choice((0, 2))))
        for i in range(num_choices):
            id += 1
            sequence = make_sequence(
                id,
                max_tokens=max_tokens,
                prompt=prompt,
                sampling=SamplingParams(seed=i, top_logprobs=chance.choice((None, 2))),
                eos_tokens=eos,
                priority=priority,
            )
            log.setdefault(tick, []).append(Add(sequence))
            if chance.random() < 0.15:
                late = tick + chance.randrange(30)
                log.setdefault(late, []).append(Finish(id, CANCELLED))
    for _ in range(num // 10):
        log.setdefault(chance.randrange(last_tick), []).append(
            SetChunkBudget(chance.randrange(40), 512)
        )
    return log


def added(log: Log) -> list[Sequence]:
    return [c.sequence for tick in sorted(log) for c in log[tick] if isinstance(c, Add)]


def assert_all_were_served(run: Run, scheduler: Scheduler, log: Log) -> None:
    tokens: dict[int, list[int]] = {s.id: [] for s in added(log)}
    ends: dict[int, Finished] = {}
    for event in run.events:
        assert event.id not in ends, f"{event} after {ends.get(event.id)}"
        if isinstance(event, Token):
            tokens[event.id].append(event.token)
        else:
            ends[event.id] = event
    assert tokens.keys() == ends.keys()
    for sequence in added(log):
        mine, end = tokens[sequence.id], ends[sequence.id]
        assert mine == [draw(sequence, i) for i in range(len(mine))]
        assert sequence.eos_tokens.isdisjoint(mine[:-1])
        if end.reason is FinishReason.LENGTH:
            assert len(mine) == sequence.max_tokens
        else:
            assert end.reason is CANCELLED or mine[-1] in sequence.eos_tokens
    assert scheduler.running() == ()
    assert scheduler.num_waiting == scheduler.num_bytes == 0


def left_behind(scheduler: Scheduler) -> list[str]:
    """Names of the scheduler's collections that still have an entry."""
    found = {**vars(scheduler), **vars(scheduler._requests)}
    assert {"states", "queue", "prefilling", "decoding", "leaving", "_released"} <= found.keys()
    return [name for name, value in found.items() if isinstance(value, dict | list) and value]


@pytest.mark.parametrize("seed", range(8))
def test_a_crowd_in_little_memory_is_served_to_the_last(seed: int):
    chance = random.Random(seed)
    log = crowd(chance, 250, 1500)
    budget, block = chance.choice((60, 150, 400)), chance.choice((0, 8))
    memory = Memory(budget, 2, ((1, None), (1, 12)), block)
    policy = Policy(chance.choice((2, 4, 8)), chunk_size=32, first_chunk_budget=8, memory=memory)
    scheduler = Scheduler(policy)
    run, held = peaks(policy, log, scheduler=scheduler)
    assert max(held) <= budget
    assert_all_were_served(run, scheduler, log)
    assert left_behind(scheduler) == []
    if seed < 2:
        again = drive(Scheduler(policy), FakeRunner(), log)
        assert again.steps == run.steps
        assert again.events == run.events


@st.composite
def policies(pick: st.DrawFn) -> Policy:
    budget = pick(st.one_of(st.none(), st.integers(1, 120)))
    layers = pick(st.sampled_from((((1, None),), ((1, 6),), ((1, None), (2, 6)))))
    return Policy(
        max_rows=pick(st.integers(1, 4)),
        continuous=pick(st.sampled_from((True, True, False))),
        chunk_size=pick(st.integers(1, 20)),
        first_chunk_budget=pick(st.integers(1, 20)),
        memory=Memory(budget, pick(st.integers(0, 3)), layers, pick(st.sampled_from((0, 4)))),
    )


@settings(derandomize=True, max_examples=150, deadline=None, database=None)
@given(policies(), st.integers(0, 2**32), st.integers(1, 10))
def test_under_any_policy_every_sequence_gets_its_tokens_and_one_end(policy, seed, num):
    log = crowd(random.Random(seed), num, 25)
    for tick in range(25, 500):
        log.setdefault(tick, []).append(CloseBatch())  # in the end every batch is closed
    scheduler, runner = Scheduler(policy), FakeRunner()
    run = drive(scheduler, runner, log)
    assert_all_were_served(run, scheduler, log)
    assert left_behind(scheduler) == []
    assert runner.num_held == 0
