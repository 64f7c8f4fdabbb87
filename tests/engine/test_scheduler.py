"""The scheduler: steps as a function of commands and tokens alone.

Every run is one of `drive`, which calls `check()` after each operation, and through a
`FakeRunner`, which asserts that the steps are ones a runner can take.
"""

import itertools
import random
from dataclasses import replace

import pytest
from fakes import (
    FakeRunner,
    Run,
    admit,
    answer,
    draw,
    drive,
    fake_logprobs,
    make_choices,
    make_sequence,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlite.engine.prefill import MAX_DEFERRALS
from mlxlite.engine.request_state import STEPS_PER_LEVEL
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import FinishReason
from mlxlite.engine.step import (
    Add,
    Chunk,
    CloseBatch,
    Command,
    Finish,
    Finished,
    Outcome,
    SetChunkBudget,
    Step,
    Token,
)

bounded = settings(derandomize=True, max_examples=150, deadline=None, database=None)
CANCELLED = FinishReason.CANCELLED


def run_all(policy: Policy, *sequences, runner: FakeRunner | None = None) -> Run:
    """Everything arrives before the first step."""
    commands: list[Command] = [Add(sequence) for sequence in sequences]
    return drive(Scheduler(policy), runner or FakeRunner(), {0: commands})


def admissions(run: Run) -> list[int]:
    return [admission.sequence.id for step in run.steps for admission in step.admitted]


def releases(run: Run) -> list[int]:
    return [id for step in run.steps for id in step.released]


# --- the queue --------------------------------------------------------------------------------


def test_the_first_arrival_is_served_first():
    run = run_all(Policy(max_rows=2), *(make_sequence(id) for id in (5, 3, 9, 1, 7)))
    assert admissions(run) == [5, 3, 9, 1, 7]


def test_the_lower_priority_number_goes_first_and_then_the_first_arrival():
    priorities = {1: 2, 2: 0, 3: -1, 4: 2, 5: 0}
    sequences = [make_sequence(id, priority=priority) for id, priority in priorities.items()]
    assert admissions(run_all(Policy(max_rows=1), *sequences)) == [3, 2, 5, 1, 4]


def test_a_late_arrival_of_a_higher_priority_preempts_the_running():
    commands = {
        0: [Add(make_sequence(1, max_tokens=6)), Add(make_sequence(2))],
        2: [Add(make_sequence(3, priority=-1))],
    }
    run = drive(Scheduler(Policy(max_rows=1)), FakeRunner(), commands)
    assert admissions(run) == [1, 3, 1, 2]
    assert run.tokens(1) == answer(make_sequence(1, max_tokens=6))


def test_a_late_arrival_of_the_same_priority_preempts_no_request():
    commands = {0: [Add(make_sequence(1, max_tokens=9))], 2: [Add(make_sequence(2))]}
    run = drive(Scheduler(Policy(max_rows=1)), FakeRunner(), commands)
    assert admissions(run) == [1, 2]


def test_no_more_than_max_rows_are_ever_outside_the_queue():
    scheduler = Scheduler(Policy(max_rows=3))
    highest = 0

    def check() -> None:
        nonlocal highest
        scheduler.check()
        highest = max(highest, scheduler.num_running)
        assert len(scheduler.running()) == scheduler.num_running <= 3

    sequences = [make_sequence(id, 1 + id, 1 + id % 5) for id in range(12)]
    run = drive(scheduler, FakeRunner(), {0: [Add(s) for s in sequences]}, check)
    assert highest == 3
    assert max(len(step.rows) for step in run.steps) == 3
    assert scheduler.num_waiting == scheduler.num_running == 0


def test_max_rows_of_one_serves_one_after_another():
    sequences = [make_sequence(id, 40, 5) for id in range(4)]
    run = run_all(Policy(max_rows=1, chunk_size=16), *sequences)
    served = [
        id for step in run.steps for id in dict.fromkeys((*(c.id for c in step.chunks), *step.rows))
    ]
    assert served == sorted(served)
    assert all(len(step.rows) <= 1 for step in run.steps)
    assert [run.tokens(s.id) for s in sequences] == [answer(s) for s in sequences]


@pytest.mark.parametrize("tick", range(9))
def test_a_newcomer_joins_at_any_step(tick: int):
    old, new = make_sequence(1, max_tokens=8), make_sequence(2, max_tokens=3)
    commands: dict[int, list[Command]] = {0: [Add(old)]}
    commands.setdefault(tick, []).append(Add(new))
    run = drive(Scheduler(Policy()), FakeRunner(), commands)
    assert run.tokens(1) == answer(old)
    assert run.tokens(2) == answer(new)
    first = next(step for step in run.steps if 2 in step.rows)
    assert first.number == tick + 1
    assert first.rows == ((1, 2) if tick < 8 else (2,))


def test_a_free_row_is_taken_in_the_step_after_the_release():
    run = run_all(Policy(max_rows=1), make_sequence(1, max_tokens=2), make_sequence(2))
    (step,) = (step for step in run.steps if step.admitted and step.admitted[0].sequence.id == 2)
    assert step.released == (1,)


# --- prefill ----------------------------------------------------------------------------------


def test_a_prompt_of_one_token_decodes_at_once():
    run = run_all(Policy(), make_sequence(1, 1, 1))
    sequence = make_sequence(1, 1, 1)
    assert run.steps[0] == Step(1, admitted=admit(sequence), rows=(1,))
    assert run.tokens(1) == answer(sequence)


def test_the_last_chunk_and_the_first_row_are_in_one_step():
    run = run_all(Policy(chunk_size=4), make_sequence(1, 10, 2))
    assert [(step.chunks, step.rows) for step in run.steps[:4]] == [
        ((Chunk(1, 0, 4),), ()),
        ((Chunk(1, 4, 8),), ()),
        ((Chunk(1, 8, 9),), (1,)),
        ((), (1,)),
    ]


def test_several_prompts_share_one_step_the_shortest_first():
    sequences = [make_sequence(1, 5), make_sequence(2, 9), make_sequence(3, 1)]
    run = run_all(Policy(chunk_size=10), *sequences)
    assert run.steps[0].chunks == (Chunk(1, 0, 4),), "the next one is whole in the next step"
    assert run.steps[0].rows == (3, 1)
    assert run.steps[1].chunks == (Chunk(2, 0, 8),)
    assert run.steps[1].rows == (3, 1, 2)


def test_a_prompt_longer_than_the_budget_takes_the_rest_of_each_step():
    sequences = [make_sequence(1, 5), make_sequence(2, 30)]
    run = run_all(Policy(chunk_size=10), *sequences)
    assert run.steps[0].chunks == (Chunk(1, 0, 4), Chunk(2, 0, 6))


def test_prompts_of_equal_length_prefill_in_queue_order():
    sequences = [make_sequence(id, 6) for id in (5, 3, 4)]
    run = run_all(Policy(chunk_size=5), *sequences)
    assert [chunk for step in run.steps for chunk in step.chunks] == [
        Chunk(id, 0, 5) for id in (5, 3, 4)
    ]


def test_the_rest_of_a_prompt_decides_its_turn_and_not_its_length():
    commands = {0: [Add(make_sequence(1, 31))], 2: [Add(make_sequence(2, 16))]}
    run = drive(Scheduler(Policy(chunk_size=10)), FakeRunner(), commands)
    assert [chunk.id for step in run.steps for chunk in step.chunks] == [1, 1, 1, 2, 2, 2]


def flood(last_tick: int, num_prompt: int, first: int = 100) -> dict[int, list[Command]]:
    """A short prompt in each tick, with one token to draw."""
    return {
        tick: [Add(make_sequence(first + tick, num_prompt, 1))] for tick in range(1, last_tick + 1)
    }


def test_a_long_prompt_among_short_ones_is_passed_over_in_no_more_than_eight_steps():
    commands = flood(120, 11) | {0: [Add(make_sequence(1, 60, 1))]}
    run = drive(Scheduler(Policy(max_rows=4, chunk_size=10)), FakeRunner(), commands)
    own = [step.number for step in run.steps if any(chunk.id == 1 for chunk in step.chunks)]
    gaps = [two - one for one, two in itertools.pairwise(own)]
    assert len(own) == 6
    assert gaps == [MAX_DEFERRALS + 1] * 4 + [1]  # the rest is shorter than the others
    assert run.tokens(1) == answer(make_sequence(1, 60, 1))


# --- priority ---------------------------------------------------------------------------------


def test_an_urgent_late_arrival_starts_in_the_next_step():
    commands: dict[int, list[Command]] = {
        0: [Add(make_sequence(id, 4, 30)) for id in range(1, 7)],
        5: [Add(make_sequence(7, 4, 3, priority=-10))],
    }
    run = drive(Scheduler(Policy(max_rows=2)), FakeRunner(), commands)
    step = run.steps[5]
    assert [admission.sequence.id for admission in step.admitted] == [7]
    assert step.released == (2,)  # the last in order of the running
    assert step.rows == (1, 7)
    for id in range(1, 7):
        assert run.tokens(id) == answer(make_sequence(id, 4, 30))


def test_the_lowest_priority_is_preempted_and_not_the_last_arrival():
    commands: dict[int, list[Command]] = {
        0: [Add(make_sequence(1, 3, 30, priority=2)), Add(make_sequence(2, 3, 30, priority=1))],
        3: [Add(make_sequence(3, 3, 5, priority=0))],
        5: [Add(make_sequence(4, 3, 5, priority=0))],
    }
    run = drive(Scheduler(Policy(max_rows=2)), FakeRunner(), commands)
    assert [step.released for step in run.steps[:6] if step.released] == [(1,), (2,)]
    assert admissions(run) == [2, 1, 3, 4, 2, 1]


@pytest.mark.parametrize("tick", [2, STEPS_PER_LEVEL + 1, 3 * STEPS_PER_LEVEL])
def test_what_runs_does_not_age_and_is_preempted_by_a_higher_level_at_any_time(tick: int):
    commands: dict[int, list[Command]] = {
        0: [Add(make_sequence(1, 1, 4 * STEPS_PER_LEVEL, priority=1))],
        tick: [Add(make_sequence(2, 1, 1, priority=0))],
    }
    run = drive(Scheduler(Policy(max_rows=1)), FakeRunner(), commands)
    assert admissions(run) == [1, 2, 1]
    assert run.tokens(1) == answer(make_sequence(1, 1, 4 * STEPS_PER_LEVEL))


@pytest.mark.parametrize(("priority", "is_preempted"), [(0, False), (-1, True)])
def test_a_request_keeps_the_level_that_it_gained_by_waiting_while_it_runs(
    priority: int, is_preempted: bool
):
    commands: dict[int, list[Command]] = {
        0: [Add(make_sequence(1, 1, STEPS_PER_LEVEL + 9))],
        1: [Add(make_sequence(2, 1, 50, priority=1))],
        STEPS_PER_LEVEL + 20: [Add(make_sequence(3, 1, 1, priority=priority))],
    }
    run = drive(Scheduler(Policy(max_rows=1)), FakeRunner(), commands)
    assert admissions(run) == ([1, 2, 3, 2] if is_preempted else [1, 2, 3])


def test_a_low_level_is_not_starved_by_a_flood_of_a_higher_one():
    commands: dict[int, list[Command]] = {
        tick: [Add(make_sequence(100 + tick, 1, 1))]
        for tick in range(0, 2 * STEPS_PER_LEVEL + 200, 2)  # a step with a row takes two ticks
    }
    commands[0].append(Add(make_sequence(2, 1, 1)))  # always one waits
    commands[4].append(Add(make_sequence(1, 1, 1, priority=1)))
    run = drive(Scheduler(Policy(max_rows=1)), FakeRunner(), commands)
    (served,) = (step.number for step in run.steps if 1 in step.rows)
    assert STEPS_PER_LEVEL < served < STEPS_PER_LEVEL + 20
    of_flood = [id for id in admissions(run) if id >= 100]
    assert of_flood == sorted(of_flood)  # first in, first out within a level


# --- tenants ----------------------------------------------------------------------------------


def arrivals_of(tenant: bytes, first: int, num: int, max_tokens: int = 40, **more) -> list[Command]:
    ids = range(first, first + num)
    return [Add(make_sequence(id, 2, max_tokens, tenant=tenant, **more)) for id in ids]


def rows_of(run: Run, first: int, last: int) -> list[tuple[int, int]]:
    """In each step, the rows of ids in `[first, last)`, and of all others."""
    counts = [sum(first <= id < last for id in step.rows) for step in run.steps]
    return [(own, len(step.rows) - own) for own, step in zip(counts, run.steps, strict=True)]


@pytest.mark.parametrize(("max_rows", "share"), [(2, 1), (5, 2), (8, 4), (16, 8)])
def test_a_tenant_with_few_requests_has_half_of_the_rows_beside_a_flood(max_rows: int, share: int):
    commands = {
        0: arrivals_of(b"many", 1000, 200),
        50: arrivals_of(b"few", 1, 40),
    }
    policy = Policy(max_rows=max_rows, first_chunk_budget=128)
    run = drive(Scheduler(policy), FakeRunner(), commands)
    both = [counts for counts in rows_of(run, 1, 1000)[55:] if counts[0] and counts[1]]
    both = both[: len(both) - 45]  # towards the end it has too few left
    assert sum(own >= share for own, _ in both) > 0.9 * len(both)
    assert sum(own for own, _ in both) >= 0.45 * sum(map(sum, both)) * 2 * share / max_rows
    for sequence in (c.sequence for batch in commands.values() for c in batch):
        assert run.tokens(sequence.id) == answer(sequence)


def test_the_first_token_of_a_small_tenant_waits_for_no_row_of_a_flood():
    commands = {0: arrivals_of(b"many", 1000, 100, 1000), 50: arrivals_of(b"few", 1, 1, 4)}
    run = drive(Scheduler(Policy(max_rows=4)), FakeRunner(), commands)
    first = next(step.number for step in run.steps if 1 in step.rows)
    added = run.steps[50].number
    assert first <= added + 3


def test_equal_shares_are_reached_once_and_no_row_is_preempted_after_that():
    tenants = [b"a", b"b", b"c"]
    commands: dict[int, list[Command]] = {
        20 * i: arrivals_of(tenant, 1000 * (i + 1), 12, 500) for i, tenant in enumerate(tenants)
    }
    run = drive(Scheduler(Policy(max_rows=9)), FakeRunner(), commands)
    assert len(run.steps[100].rows) == 9
    assert {id // 1000: 3 for id in run.steps[100].rows} == {1: 3, 2: 3, 3: 3}
    num_preempted = sum(len(step.released) for step in run.steps[:400])
    assert num_preempted <= 9


@pytest.mark.parametrize("sizes", [(30, 30), (30, 10), (10, 50)])
def test_with_one_row_tenants_are_served_equal_numbers_of_tokens(sizes: tuple[int, int]):
    commands = {0: arrivals_of(b"a", 1000, 40, sizes[0]) + arrivals_of(b"b", 2000, 40, sizes[1])}
    run = drive(Scheduler(Policy(max_rows=1)), FakeRunner(), commands)
    rows = [id // 1000 for step in run.steps[:400] for id in step.rows]
    assert abs(rows.count(1) - rows.count(2)) <= 2 * max(sizes)


def test_a_flood_that_has_waited_for_long_does_not_hold_off_a_newcomer_of_another_tenant():
    late = 3 * STEPS_PER_LEVEL
    commands = {0: arrivals_of(b"many", 1000, 600, 50), late: arrivals_of(b"few", 1, 1, 1)}
    run = drive(Scheduler(Policy(max_rows=2)), FakeRunner(), commands)
    (step,) = (step.number for step in run.steps if 1 in step.rows)
    assert step <= run.steps[late].number + 4


def test_the_sequences_of_a_large_request_do_not_hold_off_a_small_one_of_the_same_tenant():
    large: list[Command] = [Add(make_sequence(100 + i, 2, 40, number=i)) for i in range(64)]
    commands = {0: large, 10: [Add(make_sequence(1, 2, 4))]}
    run = drive(Scheduler(Policy(max_rows=4)), FakeRunner(), commands)
    assert admissions(run).index(1) <= 8
    assert [id for id in admissions(run) if id >= 100] == list(range(100, 164))


def test_a_better_priority_goes_before_any_share():
    commands = {
        0: arrivals_of(b"many", 1000, 20, 100),
        30: arrivals_of(b"few", 1, 4, 20, priority=1)
        + arrivals_of(b"many", 2000, 2, 20, priority=-1),
    }
    run = drive(Scheduler(Policy(max_rows=2)), FakeRunner(), commands)
    order = admissions(run)
    assert order.index(2000) < order.index(1)
    assert order.index(1019) < order.index(1)


@pytest.mark.parametrize("tick", range(1, 14))
def test_a_request_preempted_at_any_step_resumes_and_gives_each_token_once(tick: int):
    sequence = make_sequence(1, 20, 8, sampling=SamplingParams(seed=3, top_logprobs=1))
    commands: dict[int, list[Command]] = {0: [Add(sequence)]}
    commands[tick] = [Add(make_sequence(2, 5, 3, priority=-1))]
    policy = Policy(max_rows=1, chunk_size=5)
    run = drive(Scheduler(policy), FakeRunner(), commands)
    assert run.tokens(1) == answer(sequence)
    reported = [
        event.logprobs for event in run.events if isinstance(event, Token) and event.id == 1
    ]
    assert reported == [fake_logprobs(sequence, i, t) for i, t in enumerate(answer(sequence))]
    assert run.ends(1) == [Finished(1, FinishReason.LENGTH)]
    assert admissions(run) in ([1, 2, 1], [1, 2])
    assert admissions(run) == releases(run)


def test_a_request_preempted_with_its_last_token_in_flight_ends_and_never_resumes():
    commands: dict[int, list[Command]] = {
        0: [Add(make_sequence(1, 1, 2))],
        2: [Add(make_sequence(2, 1, 1, priority=-1))],
    }
    run = drive(Scheduler(Policy(max_rows=1)), FakeRunner(), commands)
    assert admissions(run) == releases(run) == [1, 2]
    assert run.tokens(1) == answer(make_sequence(1, 1, 2))


@pytest.mark.parametrize("tick", [3, 4, 5])
def test_a_preempted_request_that_is_cancelled_ends_once(tick: int):
    commands: dict[int, list[Command]] = {
        0: [Add(make_sequence(1, 1, 20))],
        3: [Add(make_sequence(2, 1, 9, priority=-1))],
    }
    commands.setdefault(tick, []).append(Finish(1, CANCELLED))
    runner = FakeRunner()
    run = drive(Scheduler(Policy(max_rows=1)), runner, commands)
    assert run.ends(1) == [Finished(1, CANCELLED)]
    assert sorted(admissions(run)) == sorted(releases(run)) == [1, 2]
    assert runner.num_held == 0


def test_an_end_token_returned_after_the_preemption_ends_the_sequence():
    sequence = make_sequence(1, 1, 20, eos_tokens=frozenset({25}))
    commands: dict[int, list[Command]] = {
        0: [Add(sequence)],
        3: [Add(make_sequence(2, 1, 3, priority=-1))],
    }
    run = drive(Scheduler(Policy(max_rows=1)), FakeRunner(answers={1: [3, 4, 25, 6]}), commands)
    assert run.tokens(1) == [3, 4, 25]
    assert run.ends(1) == [Finished(1, FinishReason.STOP)]
    assert admissions(run) == [1, 2]


def test_static_batching_never_preempts():
    commands: dict[int, list[Command]] = {
        0: [Add(make_sequence(1, max_tokens=9))],
        2: [Add(make_sequence(2, priority=-9))],
    }
    policy = Policy(max_rows=1, continuous=False)
    assert admissions(drive(Scheduler(policy), FakeRunner(), commands)) == [1, 2]


# --- choices ----------------------------------------------------------------------------------


def test_without_a_prefix_cache_each_choice_computes_the_prompt():
    choices = make_choices(5, 50, 5)
    run = run_all(Policy(max_rows=3, chunk_size=16), *choices)
    assert [run.tokens(s.id) for s in choices] == [answer(s) for s in choices]
    assert len({tuple(run.tokens(s.id)) for s in choices}) == 5
    assert sum(step.num_prefill_tokens for step in run.steps) == 5 * 49


def test_choices_of_a_prompt_of_one_token_need_no_prefill():
    choices = make_choices(3, 1, 4)
    run = run_all(Policy(max_rows=3), *choices)
    assert [run.tokens(s.id) for s in choices] == [answer(s) for s in choices]
    assert sum(step.num_prefill_tokens for step in run.steps) == 0


# --- ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_an_end_by_count_leaves_without_overshoot(max_tokens: int):
    sequence = make_sequence(1, max_tokens=max_tokens)
    run = run_all(Policy(), sequence)
    assert run.num_rows(1) == max_tokens
    assert run.tokens(1) == answer(sequence)
    assert run.ends(1) == [Finished(1, FinishReason.LENGTH)]
    assert releases(run) == [1]


def test_an_end_of_sequence_overshoots_by_one_row_whose_token_is_dropped():
    sequence = make_sequence(1, max_tokens=20)
    sequence = replace(sequence, eos_tokens=frozenset({25}))
    run = run_all(Policy(), sequence, runner=FakeRunner(answers={1: [3, 4, 25, 6, 7]}))
    assert run.events == [
        Token(1, 3),
        Token(1, 4),
        Token(1, 25, is_eos=True),
        Finished(1, FinishReason.STOP),
    ]
    assert run.num_rows(1) == 4
    assert releases(run) == [1]


def test_an_end_of_sequence_in_the_last_token_is_a_stop_without_overshoot():
    sequence = make_sequence(1, max_tokens=2, eos_tokens=frozenset({25}))
    run = run_all(Policy(), sequence, runner=FakeRunner(answers={1: [3, 25]}))
    assert run.ends(1) == [Finished(1, FinishReason.STOP)]
    assert run.num_rows(1) == 2


def test_a_second_end_token_in_the_overshoot_row_ends_nothing_twice():
    sequence = make_sequence(1, max_tokens=9, eos_tokens=frozenset({25}))
    run = run_all(Policy(), sequence, runner=FakeRunner(answers={1: [25, 25, 25]}))
    assert run.tokens(1) == [25]
    assert len(run.ends(1)) == 1


def test_a_cancel_in_the_queue_ends_at_once_and_never_reaches_the_runner():
    commands = {
        0: [Add(make_sequence(1)), Add(make_sequence(2)), Add(make_sequence(3))],
        1: [Finish(2, CANCELLED)],
    }
    run = drive(Scheduler(Policy(max_rows=1)), FakeRunner(), commands)
    assert run.ends(2) == [Finished(2, CANCELLED)]
    assert admissions(run) == [1, 3]
    assert releases(run) == [1, 3]


def test_a_cancel_in_prefill_frees_the_row_at_the_next_step():
    commands = {0: [Add(make_sequence(1, 1000)), Add(make_sequence(2))], 3: [Finish(1, CANCELLED)]}
    run = drive(Scheduler(Policy(max_rows=1, chunk_size=16)), FakeRunner(), commands)
    assert run.steps[3].released == (1,)
    assert [admission.sequence.id for admission in run.steps[3].admitted] == [2]
    assert run.num_rows(1) == 0
    assert run.tokens(2) == answer(make_sequence(2))


def test_a_cancel_in_decode_drops_the_token_in_flight():
    commands = {
        0: [Add(make_sequence(1, max_tokens=50)), Add(make_sequence(2, max_tokens=6))],
        3: [Finish(1, CANCELLED)],
    }
    run = drive(Scheduler(Policy()), FakeRunner(), commands)
    assert run.ends(1) == [Finished(1, CANCELLED)]
    assert run.num_rows(1) == 3
    assert run.tokens(1) == answer(make_sequence(1), 2)
    assert run.steps[3].released == (1,)
    assert run.tokens(2) == answer(make_sequence(2, max_tokens=6))


def test_a_cancel_between_the_last_launch_and_its_token_still_ends_once():
    commands = {0: [Add(make_sequence(1, max_tokens=2))], 2: [Finish(1, CANCELLED)]}
    run = drive(Scheduler(Policy()), FakeRunner(), commands)
    assert run.ends(1) == [Finished(1, CANCELLED)]
    assert len(run.tokens(1)) == 1
    assert releases(run) == [1]


def test_a_cancel_after_the_end_or_of_an_unknown_id_is_void():
    commands = {
        0: [Finish(77, CANCELLED), Add(make_sequence(1))],
        20: [Finish(1, CANCELLED), Finish(1, FinishReason.ERROR, "late")],
    }
    run = drive(Scheduler(Policy()), FakeRunner(), commands)
    assert run.ends(1) == [Finished(1, FinishReason.LENGTH)]
    assert releases(run) == [1]
    assert not run.ends(77)


def test_a_sequence_that_is_added_and_cancelled_in_one_tick_is_never_launched():
    commands = {0: [Add(make_sequence(1)), Finish(1, CANCELLED)]}
    run = drive(Scheduler(Policy()), FakeRunner(), commands)
    assert run.steps == []
    assert run.events == [Finished(1, CANCELLED)]


def test_a_sequence_that_fails_alone_costs_the_others_no_token():
    sequences = [make_sequence(id, max_tokens=6) for id in (1, 2, 3)]
    runner = FakeRunner(failing={3: ((2, "out of memory"),)})
    run = run_all(Policy(), *sequences, runner=runner)
    assert run.ends(2) == [Finished(2, FinishReason.ERROR, "out of memory")]
    assert run.tokens(2) == answer(sequences[1], 2)
    for sequence in (sequences[0], sequences[2]):
        assert run.tokens(sequence.id) == answer(sequence)
    assert sorted(releases(run)) == [1, 2, 3]
    assert runner.num_held == 0


def test_a_sequence_that_fails_in_prefill_never_gets_a_row():
    runner = FakeRunner(failing={2: ((1, "no memory"),)})
    run = run_all(Policy(chunk_size=4), make_sequence(1, 100), runner=runner)
    assert run.ends(1) == [Finished(1, FinishReason.ERROR, "no memory")]
    assert run.num_rows(1) == 0


def test_an_outcome_of_the_wrong_length_is_an_assertion_error():
    scheduler = Scheduler(Policy())
    scheduler.apply(Add(make_sequence(1)))
    step = scheduler.schedule()
    assert step is not None
    with pytest.raises(AssertionError):
        scheduler.complete(step, Outcome(()))


# --- static batching --------------------------------------------------------------------------


def test_static_batching_gathers_until_the_batch_is_full():
    scheduler = Scheduler(Policy(max_rows=3, continuous=False))
    for id in (1, 2):
        scheduler.apply(Add(make_sequence(id)))
        assert scheduler.is_gathering
        assert scheduler.schedule() is None
    scheduler.apply(Add(make_sequence(3)))
    assert not scheduler.is_gathering
    step = scheduler.schedule()
    assert step is not None
    assert step.rows == (1, 2, 3)


def test_static_batching_runs_a_partial_batch_when_the_gathering_time_is_over():
    scheduler = Scheduler(Policy(max_rows=3, continuous=False))
    scheduler.apply(CloseBatch())  # nothing gathered: it must not close the next batch
    scheduler.apply(Add(make_sequence(1)))
    assert scheduler.schedule() is None
    scheduler.apply(CloseBatch())
    assert not scheduler.is_gathering
    step = scheduler.schedule()
    assert step is not None
    assert step.rows == (1,)


def test_static_batching_runs_a_batch_to_its_end_before_the_next():
    commands: dict[int, list[Command]] = {
        0: [Add(make_sequence(1, max_tokens=2)), Add(make_sequence(2, max_tokens=7))],
        1: [Add(make_sequence(id, max_tokens=3)) for id in (3, 4, 5)],
        30: [CloseBatch()],
    }
    run = drive(Scheduler(Policy(max_rows=2, continuous=False)), FakeRunner(), commands)
    batches = [tuple(a.sequence.id for a in step.admitted) for step in run.steps if step.admitted]
    assert batches == [(1, 2), (3, 4), (5,)]
    last_row_of_2 = max(step.number for step in run.steps if 2 in step.rows)
    assert min(step.number for step in run.steps if 3 in step.rows) > last_row_of_2
    assert run.tokens(5) == answer(make_sequence(5, max_tokens=3))


def test_a_close_of_a_batch_that_runs_does_not_close_the_next_one():
    scheduler = Scheduler(Policy(max_rows=2, continuous=False))
    commands = {
        0: [Add(make_sequence(1)), Add(make_sequence(2))],
        1: [CloseBatch(), Add(make_sequence(3))],
    }
    run = drive(scheduler, FakeRunner(), commands)
    assert not run.tokens(3)
    assert scheduler.is_gathering


def test_a_gathered_batch_that_is_all_cancelled_leaves_nothing_closed():
    scheduler = Scheduler(Policy(max_rows=2, continuous=False))
    scheduler.apply(Add(make_sequence(1)))
    scheduler.apply(CloseBatch())
    scheduler.apply(Finish(1, CANCELLED))
    assert scheduler.schedule() is None
    scheduler.apply(Add(make_sequence(2)))
    assert scheduler.is_gathering


# --- determinism ------------------------------------------------------------------------------


def random_log(seed: int) -> dict[int, list[Command]]:
    chance = random.Random(seed)
    log: dict[int, list[Command]] = {}
    for id in range(20):
        tick = chance.randrange(60)
        sequence = make_sequence(
            id,
            chance.choice((1, 2, 9, 70)),
            chance.randrange(1, 12),
            eos_tokens=frozenset({0, 1}),
            priority=chance.randrange(3),
        )
        if id % 4 == 0:
            images = [(2, 9), (9, 30), (40, 41)]
            sequence = make_sequence(id, 70, 5, images=images, is_unbroken=id % 8 == 0)
        log.setdefault(tick, []).append(Add(sequence))
        if chance.random() < 0.3:
            log.setdefault(tick + chance.randrange(9), []).append(Finish(id, CANCELLED))
    for _ in range(4):
        budget = SetChunkBudget(chance.randrange(1, 50), 512)
        log.setdefault(chance.randrange(60), []).append(budget)
    return log


@pytest.mark.parametrize("seed", range(5))
def test_the_same_commands_and_tokens_give_the_same_steps(seed: int):
    policy = Policy(max_rows=4, chunk_size=32, first_chunk_budget=8)
    one, two = (drive(Scheduler(policy), FakeRunner(), random_log(seed)) for _ in range(2))
    assert one.steps == two.steps
    assert one.events == two.events


@st.composite
def policies(pick: st.DrawFn) -> Policy:
    return Policy(
        max_rows=pick(st.integers(1, 4)),
        continuous=pick(st.booleans()),
        chunk_size=pick(st.integers(1, 20)),
        first_chunk_budget=pick(st.integers(1, 20)),
    )


@st.composite
def images(pick: st.DrawFn, num_prompt: int) -> list[tuple[int, int]]:
    """Places of pictures in a prompt, none of which is its last token."""
    edges = sorted(pick(st.sets(st.integers(0, num_prompt - 1), max_size=6)))
    return list(zip(edges[::2], edges[1::2], strict=False))


@st.composite
def logs(pick: st.DrawFn) -> dict[int, list[Command]]:
    """Adds, cancels at any time (before the add too), budgets and closings, over 30 ticks."""
    ticks = st.integers(0, 30)
    log: dict[int, list[Command]] = {}
    for id in range(pick(st.integers(1, 8))):
        num_prompt = pick(st.integers(1, 30))
        places = pick(images(num_prompt))
        sequence = make_sequence(
            id,
            num_prompt,
            pick(st.integers(1, 8)),
            eos_tokens=frozenset(pick(st.sets(st.integers(0, 25), max_size=4))),
            priority=pick(st.integers(-1, 1)),
            images=places,
            is_unbroken=bool(places) and pick(st.booleans()),
        )
        log.setdefault(pick(ticks), []).append(Add(sequence))
        for tick in pick(st.lists(ticks, max_size=2)):
            log.setdefault(tick, []).append(Finish(id, CANCELLED))
    for tick, num_tokens in pick(st.lists(st.tuples(ticks, st.integers(0, 30)), max_size=3)):
        log.setdefault(tick, []).append(SetChunkBudget(num_tokens, 512))
    for tick in (*pick(st.lists(ticks, max_size=3)), *range(31, 400)):
        log.setdefault(tick, []).append(CloseBatch())  # in the end every batch is closed
    return log


@bounded
@given(policies(), logs())
def test_under_any_log_every_sequence_gets_its_tokens_and_one_end(policy, log):
    runner = FakeRunner()
    run = drive(Scheduler(policy), runner, log)
    for command in (command for tick in sorted(log) for command in log[tick]):
        if not isinstance(command, Add):
            continue
        sequence = command.sequence
        (end,) = run.ends(sequence.id)
        tokens = run.tokens(sequence.id)
        assert tokens == [draw(sequence, i) for i in range(len(tokens))]
        assert sequence.eos_tokens.isdisjoint(tokens[:-1])
        match end.reason:
            case FinishReason.LENGTH:
                assert len(tokens) == sequence.max_tokens
                assert run.num_rows(sequence.id) == sequence.max_tokens
            case FinishReason.STOP:
                assert tokens[-1] in sequence.eos_tokens
                assert run.num_rows(sequence.id) - len(tokens) in (0, 1)
            case _:
                assert end.reason is CANCELLED
                assert len(tokens) < sequence.max_tokens
        of_it = [e for e in run.events if isinstance(e, Token | Finished) and e.id == sequence.id]
        assert of_it[-1] is end
    assert sorted(admissions(run)) == sorted(releases(run))
    assert runner.num_held == 0
