"""Likelihoods of prompts: those of mlx-lm's model called directly on the whole prompt.

The tolerance is that of float32 sums in another order: chunks and padding change it. The rest of
the mechanism, which places are reported when, is the scheduler's, in `tests/engine`.
"""

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from fakes import GREEDY, Run, admit, drive, make_sequence
from runner.test_model_runner import VOCABULARY, build, come_and_go, ragged, untouched

from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import FinishReason, Logprobs, Prompt, Sequence
from mlxlite.engine.step import Add, Chunk, Command, Scored, Step
from mlxlite.prefix_cache.hashing import blocks_of
from mlxlite.runner import model_runner
from mlxlite.runner.likelihoods import best
from mlxlite.runner.model_runner import ModelRunner


def scores(run: Run, id: int) -> list[tuple[int, Logprobs]]:
    """What a sequence was told of its prompt, in order and without a gap."""
    found: list[tuple[int, Logprobs]] = []
    for event in run.events:
        if isinstance(event, Scored) and event.id == id:
            assert event.logprobs.start == len(found) + 1
            found += event.logprobs.tokens
    return found


def expected(kind: str, tokens: SequenceOf[int]) -> np.ndarray:
    """Log-probabilities `[T - 1, V]` by mlx-lm's model, of a whole prompt at once."""
    logits = untouched(kind)(mx.array([tokens]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[:-1]


def assert_scored(kind: str, sequence: Sequence, found: list[tuple[int, Logprobs]]) -> None:
    tokens = sequence.prompt.tokens
    assert [token for token, _ in found] == list(tokens[1:])
    for values, (token, item) in zip(expected(kind, tokens), found, strict=True):
        assert item.drawn == pytest.approx(values[token], abs=1e-4)
        higher, as_high = (sum(values >= values[token] + d) for d in (1e-4, -1e-4))
        assert higher < item.rank <= as_high
        assert len(item.top) == sequence.prompt_top
        np.testing.assert_allclose(
            [value for _, value in item.top], np.sort(values)[::-1][: len(item.top)], atol=1e-4
        )
        for id, value in item.top:
            assert value == pytest.approx(values[id], abs=1e-4)
            if id == token:
                assert value == item.drawn, "lm-evaluation-harness compares them"
        if item.rank <= len(item.top):
            assert item.top[item.rank - 1][0] == token


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt_oss", "mamba", "lfm2", "llama4"])
@pytest.mark.parametrize(("max_rows", "chunk"), [(1, 64), (8, 7), (8, 2048)])
def test_a_prompts_likelihoods_are_those_of_the_model(kind: str, max_rows: int, chunk: int) -> None:
    tops = (None, 0, 1, 5)
    sequences = [replace(s, prompt_top=tops[i % 4]) for i, s in enumerate(ragged(seed=chunk))]
    scheduler = Scheduler(Policy(max_rows, chunk_size=chunk, first_chunk_budget=chunk))
    runner = ModelRunner(build(kind))
    run = drive(scheduler, runner, come_and_go(chunk, sequences))
    for sequence in sequences:
        found = scores(run, sequence.id)
        if sequence.prompt_top is None:
            assert not found
        elif run.ends(sequence.id)[0].reason is FinishReason.LENGTH:
            assert_scored(kind, sequence, found)


def test_likelihoods_do_not_change_the_text_and_hardly_differ_in_a_batch() -> None:
    sequences = [replace(s, prompt_top=2) for s in ragged(seed=3)]
    together = drive(
        Scheduler(Policy(8)), ModelRunner(build("qwen3")), {0: list(map(Add, sequences))}
    )
    for sequence in sequences:
        alone = drive(Scheduler(Policy(1)), ModelRunner(build("qwen3")), {0: [Add(sequence)]})
        plain = Add(replace(sequence, prompt_top=None))
        text = drive(Scheduler(Policy(1)), ModelRunner(build("qwen3")), {0: [plain]})
        id = sequence.id
        assert text.tokens(id) == alone.tokens(id) == together.tokens(id)
        pairs = zip(scores(alone, id), scores(together, id), strict=True)
        for (token, mine), (other, theirs) in pairs:
            assert token == other
            assert mine.drawn == pytest.approx(theirs.drawn, abs=1e-5)
            assert [i for i, _ in mine.top] == [i for i, _ in theirs.top]


def test_a_prompt_with_likelihoods_uses_no_prefix_but_leaves_one() -> None:
    tokens = tuple(random.Random(1).randrange(VOCABULARY) for _ in range(70))
    prompt = Prompt(tokens, blocks_of(tokens, 0, 16))
    sequences = [Sequence(i, prompt, GREEDY, 2, prompt_top=1) for i in range(2)]
    log: dict[int, list[Command]] = {0: [Add(sequences[0])], 20: [Add(sequences[1])]}
    log[40] = [Add(replace(sequences[1], id=3, prompt_top=None))]
    run = drive(Scheduler(Policy(prefix_bytes=1 << 20)), ModelRunner(build("qwen3")), log)
    hits = [admission.hit.num_tokens for step in run.steps for admission in step.admitted]
    assert hits == [0, 0, 64]
    assert len(scores(run, 0)) == len(scores(run, 1)) == 69
    assert run.tokens(0) == run.tokens(1) == run.tokens(3)


def test_a_chunk_without_likelihoods_never_shares_a_pass_with_one_that_has_them() -> None:
    shapes: list[tuple[int, ...]] = []

    model, scored = build("qwen3"), make_sequence(1, 9)
    runner = ModelRunner(model)
    forward = type(runner._prefills)._forward

    def watch(self: object, group: list[Chunk]) -> object:
        shapes.append(tuple(chunk.is_scored for chunk in group))
        return forward(self, group)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(runner._prefills), "_forward", watch)
        admitted = admit(replace(scored, prompt_top=1), make_sequence(2, 9), make_sequence(3, 9))
        chunks = (Chunk(1, 0, 8, is_scored=True), Chunk(2, 0, 8), Chunk(3, 0, 8))
        launched, _ = runner.advance(Step(1, admitted=admitted, chunks=chunks), None)
        _, outcome = runner.advance(None, launched)
    assert sorted(shapes) == [(False, False), (True,)]
    assert outcome is not None
    assert list(outcome.scored) == [1]


def test_a_step_holds_no_more_logits_than_its_memory_has_room_for() -> None:
    runner = ModelRunner(build("qwen3"), work_bytes=64 * VOCABULARY * 16 * 4)
    assert runner.memory.max_scored == 64
    policy = Policy(8, memory=runner.memory)
    sequences = [replace(make_sequence(i, 150, 1), prompt_top=1) for i in range(3)]
    run = drive(Scheduler(policy), runner, {0: list(map(Add, sequences))})
    sizes = [sum(c.stop - c.start for c in s.chunks if c.is_scored) for s in run.steps]
    assert max(sizes) == 64
    assert sum(sizes) == 3 * 149
    assert model_runner._LOGIT_BYTES == 16


@pytest.mark.parametrize("num", [0, 1, 3, 7])
def test_the_best_of_some_values_are_in_order(num: int) -> None:
    values = np.random.default_rng(0).permutation(14).reshape(2, 7).astype(np.float32)
    ids, top = best(mx.array(values), num)
    assert np.array(ids).tolist() == np.argsort(-values, axis=-1)[:, :num].tolist()
    assert np.array(top).tolist() == np.sort(values, axis=-1)[:, ::-1][:, :num].tolist()
