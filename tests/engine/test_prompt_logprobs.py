"""Likelihoods of prompts: which places of a prompt are reported, and how many a step computes."""

import random
from dataclasses import replace

import pytest
from fakes import FakeRunner, Run, drive, fake_prompt_logprobs, make_sequence

from mlxlite.engine.memory import MAX_SCORED, Memory
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import FinishReason, Logprobs, Prompt, Sequence
from mlxlite.engine.step import Add, Command, Finish, Scored, SetChunkBudget, Token
from mlxlite.prefix_cache.hashing import blocks_of


def scored_sequence(id: int, num_prompt: int, max_tokens: int = 4, **rest: int) -> Sequence:
    plain = make_sequence(id, num_prompt, max_tokens, **rest)  # type: ignore[arg-type]
    tokens = plain.prompt.tokens
    return replace(plain, prompt=Prompt(tokens, blocks_of(tokens, 0, 16)), prompt_top=2)


def scores(run: Run, id: int) -> list[tuple[int, Logprobs]]:
    found: list[tuple[int, Logprobs]] = []
    for event in run.events:
        if isinstance(event, Token) and event.id == id:
            break
        if isinstance(event, Scored) and event.id == id:
            assert event.logprobs.start == len(found) + 1, "in order, each once"
            found += event.logprobs.tokens
    return found


def assert_whole(run: Run, sequence: Sequence) -> None:
    """Complete before the first token, and nothing after it."""
    whole = list(fake_prompt_logprobs(sequence, 1, len(sequence.prompt.tokens)).tokens)
    assert scores(run, sequence.id) == whole
    events = [e for e in run.events if isinstance(e, Scored) and e.id == sequence.id]
    assert sum(len(event.logprobs.tokens) for event in events) == len(whole)


@pytest.mark.parametrize("num_prompt", [1, 2, 9, 300])
def test_every_token_of_a_prompt_but_the_first_is_reported_before_the_answer(
    num_prompt: int,
) -> None:
    sequence = scored_sequence(1, num_prompt)
    run = drive(Scheduler(Policy()), FakeRunner(), {0: [Add(sequence)]})
    assert_whole(run, sequence)


@pytest.mark.parametrize("tick", range(1, 14))
@pytest.mark.parametrize("prefix_bytes", [0, 1 << 20])
def test_a_prompt_preempted_at_any_step_is_reported_once(tick: int, prefix_bytes: int) -> None:
    sequence = scored_sequence(1, 40, 8)
    commands: dict[int, list[Command]] = {0: [Add(sequence)]}
    commands[tick] = [Add(make_sequence(2, 5, 3, priority=-1))]
    policy = Policy(1, chunk_size=5, prefix_bytes=prefix_bytes, memory=Memory(layers=((1, None),)))
    run = drive(Scheduler(policy), FakeRunner(memory=policy.memory), commands)
    assert_whole(run, sequence)


@pytest.mark.parametrize("seed", range(6))
def test_of_prompts_in_any_company_each_is_reported_and_no_step_computes_too_many(
    seed: int,
) -> None:
    chance = random.Random(seed)
    commands: dict[int, list[Command]] = {}
    sequences: list[Sequence] = []
    for id in range(20):
        sequence = scored_sequence(id, chance.choice((1, 9, 70, 400)), priority=id % 3)
        sequence = replace(sequence, prompt_top=chance.choice((None, 1)))
        sequences.append(sequence)
        tick = chance.randrange(40)
        commands.setdefault(tick, []).append(Add(sequence))
        if id % 5 == 0:
            finish = Finish(id, FinishReason.CANCELLED)
            commands.setdefault(tick + chance.randrange(9), []).append(finish)
        commands.setdefault(tick, []).append(SetChunkBudget(chance.randrange(1, 500), 2048))
    policy = Policy(4, chunk_size=2048, prefix_bytes=1 << 20, memory=Memory(layers=((1, None),)))
    run = drive(Scheduler(policy), FakeRunner(memory=policy.memory), commands)
    for sequence in sequences:
        if sequence.prompt_top is None:
            assert not scores(run, sequence.id)
        elif run.ends(sequence.id)[0].reason is FinishReason.LENGTH:
            assert_whole(run, sequence)
    sizes = [sum(c.stop - c.start for c in s.chunks if c.is_scored) for s in run.steps]
    assert 100 < max(sizes) <= MAX_SCORED
    assert max(step.num_prefill_tokens for step in run.steps) > MAX_SCORED


def test_what_a_step_may_score_is_bounded_by_the_memory_of_its_logits() -> None:
    assert Memory(work_bytes=0, logit_bytes=1000).max_scored == MAX_SCORED
    assert Memory(work_bytes=400_000, logit_bytes=1000).max_scored == 100
    assert Memory(work_bytes=10**9, logit_bytes=1000).max_scored == MAX_SCORED
    assert Memory(work_bytes=1, logit_bytes=1000).max_scored == 16
