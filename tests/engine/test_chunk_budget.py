"""How many prompt tokens fit a step: by the time that it may take, and by its memory."""

import pytest
from fakes import FakeRunner, answer, drive, make_sequence

from mlxlite.engine.chunk_budget import MIN_IDLE, TILE, ChunkLimit, ChunkTuner
from mlxlite.engine.memory import Memory
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.step import Add, Chunk, Command, SetChunkBudget, SetChunkLimit, Step


def step_of(num_prefill: int, num_rows: int) -> Step:
    chunks = (Chunk(99, 0, num_prefill),) if num_prefill else ()
    return Step(1, chunks=chunks, rows=tuple(range(num_rows)))


def budget_of(tuner: ChunkTuner, step: Step, device_s: float) -> int | None:
    """The new budget beside rows, if there is one."""
    command = tuner.measure(step, device_s)
    return None if command is None else command.num_tokens


def test_the_tuner_fits_the_measured_rate_into_the_budget_in_whole_tiles():
    tuner = ChunkTuner(0.2)
    assert tuner.measure(step_of(1000, 0), 1.0) == SetChunkBudget(192, 480)  # of 200, and of 500


def test_the_tuner_subtracts_the_time_of_a_step_that_only_decodes():
    tuner = ChunkTuner(0.1)
    assert tuner.measure(step_of(0, 3), 0.030) is None
    # 20 ms for 50 tokens, beside the rows and a pass as long as theirs; 70 of 100 ms are left.
    assert budget_of(tuner, step_of(50, 3), 0.080) == 160  # of 175


def test_a_small_chunk_does_not_make_the_next_one_smaller_still():
    """A pass of 20 ms and 1 ms a token, whatever the chunk: 180 tokens fit, five tiles."""
    tuner = ChunkTuner(0.2)
    tuner.measure(step_of(0, 1), 0.020)
    num_tokens = 32
    for _ in range(4):
        device_s = 0.020 + 0.020 + num_tokens * 0.001
        num_tokens = budget_of(tuner, step_of(num_tokens, 1), device_s) or num_tokens
    assert num_tokens == 160


def test_the_last_tokens_of_a_prompt_hardly_change_the_budget():
    """1 ms a token, and once for four tokens 30 ms more, in which the budget would be a tile."""
    tuner = ChunkTuner(1.0)
    tuner.measure(step_of(0, 1), 0.010)
    assert budget_of(tuner, step_of(900, 1), 0.920) == 960  # of 988
    num_tokens = budget_of(tuner, step_of(4, 1), 0.054)
    assert num_tokens is None or num_tokens >= 864


def test_the_tuner_never_subtracts_more_than_nine_tenths():
    tuner = ChunkTuner(0.1)
    tuner.measure(step_of(0, 3), 1.0)
    assert budget_of(tuner, step_of(100, 3), 0.5) == 96  # 50 ms, not -500


def test_the_tuner_averages_with_three_tenths_for_a_faster_step_and_takes_a_slower_at_once():
    tuner = ChunkTuner(10.0)
    assert budget_of(tuner, step_of(1000, 0), 10.0) == 992  # 10 ms a token
    assert budget_of(tuner, step_of(1000, 0), 5.0) == 1152  # 10 - 0.3 * 5 = 8.5 ms
    assert budget_of(tuner, step_of(1000, 0), 25.0) == 384  # 25 ms


def test_the_tuner_reports_no_small_change_and_no_unknown_time():
    tuner = ChunkTuner(10.0)
    assert tuner.measure(step_of(1000, 0), 0.0) is None
    assert budget_of(tuner, step_of(1000, 0), 10.0) == 992
    assert tuner.measure(step_of(1000, 0), 10.4) is None  # 961, that is 960
    assert budget_of(tuner, step_of(1000, 0), 11.5) == 864
    assert tuner.measure(step_of(1000, 0), 9.8) is None  # less than an eighth more


def test_the_tuner_never_reports_less_than_a_tile_or_an_idle_chunk():
    tuner = ChunkTuner(0.1)
    assert tuner.measure(step_of(10, 0), 100.0) == SetChunkBudget(TILE, MIN_IDLE)


# --- the limit by memory ----------------------------------------------------------------------


def test_the_limit_fits_the_measured_memory_into_the_reserve() -> None:
    limit = ChunkLimit(1_000_000)
    assert limit.measure(2000.0) == 480  # of 500, in whole tiles
    assert limit.measure(2000.0) is None


def test_the_limit_takes_more_memory_at_once_and_averages_less() -> None:
    limit = ChunkLimit(1_000_000)
    assert limit.measure(1000.0) == 992
    assert limit.measure(4000.0) == 224
    assert limit.measure(1000.0) == 320  # 4,000 - 0.3 * 3,000


@pytest.mark.parametrize(("work_bytes", "token_bytes"), [(0, 1e9), (1000, 0.0), (1000, -5.0)])
def test_without_a_reserve_or_a_measure_there_is_no_limit(
    work_bytes: int, token_bytes: float
) -> None:
    assert ChunkLimit(work_bytes).measure(token_bytes) is None


def test_the_limit_is_never_less_than_thirty_two_tokens() -> None:
    assert ChunkLimit(1000).measure(1e9) == 32


def test_chunks_keep_to_the_limit_with_and_without_rows() -> None:
    memory = Memory(work_bytes=1)
    prompts: list[Command] = [Add(make_sequence(1, 600, 40)), Add(make_sequence(2, 600, 9))]
    commands = {0: prompts, 2: [SetChunkBudget(128, 512), SetChunkLimit(96)]}
    run = drive(Scheduler(Policy(max_rows=2, memory=memory)), FakeRunner(), commands)
    sizes = [step.num_prefill_tokens for step in run.steps]
    assert max(sizes[:1]) == ChunkLimit.FIRST
    assert 32 < max(sizes[3:]) <= 96
    assert run.tokens(2) == answer(make_sequence(2, 600, 9))
