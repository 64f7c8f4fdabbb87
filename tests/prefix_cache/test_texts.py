"""A warm prefix cache gives the same tokens as a cold one, for each kind of KV cache.

Conversations go on, branch off, are edited in the middle, come at once and are cancelled; blocks
are small, so that hits end inside windows, inside extents and at checkpoints.
"""

import random
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import mlx.core as mx
import pytest
from fakes import Run, drive, make_sequence

from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import FinishReason, Sequence
from mlxlite.engine.step import Add, Command, Finish
from mlxlite.prefix_cache.hashing import blocks_of
from mlxlite.runner.model_runner import ModelRunner
from tests.runner.test_model_runner import MODELS, VOCABULARY, build, generate

BLOCK = 4
PLENTY = 1 << 30


@pytest.fixture(scope="module", autouse=True)
def _without_compilation() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


def cacheable(sequence: Sequence, heads: SequenceOf[int] = (), scope: int = 0) -> Sequence:
    """The same sequence, with its prompt in blocks."""
    tokens = sequence.prompt.tokens
    blocks = blocks_of(tokens, scope, BLOCK, tuple(heads))
    return replace(sequence, prompt=replace(sequence.prompt, blocks=blocks))


class Chat:
    """A scheduler and a runner; prompts run one at a time."""

    def __init__(self, kind: str, *, num_bytes: int = PLENTY, max_rows: int = 4, chunk: int = 2048):
        self.kind = kind
        self.runner = ModelRunner(build(kind))
        memory = self.runner.memory
        policy = Policy(
            max_rows,
            chunk_size=chunk,
            first_chunk_budget=chunk,
            memory=memory,
            prefix_bytes=num_bytes,
            block_size=BLOCK,
        )
        self.scheduler = Scheduler(policy)
        self.num_sequences = 0
        self.num_computed = 0

    def sequence(
        self, prompt: SequenceOf[int], max_tokens: int, heads: SequenceOf[int] = ()
    ) -> Sequence:
        self.num_sequences += 1
        made = make_sequence(self.num_sequences, max_tokens=max_tokens, prompt=list(prompt))
        return cacheable(made, heads)

    def drive(self, log: Mapping[int, SequenceOf[Command]]) -> Run:
        run = drive(self.scheduler, self.runner, log)
        self.num_computed = sum(step.num_prefill_tokens for step in run.steps)
        return run

    def ask(
        self, prompt: SequenceOf[int], max_tokens: int = 8, heads: SequenceOf[int] = ()
    ) -> list[int]:
        sequence = self.sequence(prompt, max_tokens, heads)
        tokens = self.drive({0: [Add(sequence)]}).tokens(sequence.id)
        assert tokens == generate(self.kind, sequence.prompt.tokens, max_tokens)
        return tokens


def some_tokens(chance: random.Random, low: int, high: int) -> list[int]:
    return [chance.randrange(VOCABULARY) for _ in range(chance.randint(low, high))]


@pytest.mark.parametrize("chunk", [5, 2048])
@pytest.mark.parametrize("kind", MODELS)
def test_a_conversation_with_edits_has_the_tokens_of_a_cold_cache(kind: str, chunk: int):
    chance = random.Random(len(kind) * chunk)
    chat = Chat(kind, chunk=chunk)
    turns = [some_tokens(chance, 9, 30)]
    for _ in range(9):
        prompt = [token for turn in turns for token in turn]
        heads = [sum(map(len, turns[:i])) for i in range(1, len(turns))]
        answer = chat.ask(prompt, chance.randint(1, 9), heads)
        if chance.random() < 0.3:  # an edit in the middle
            at = chance.randrange(len(turns))
            turns[at] = some_tokens(chance, 1, 9)
        elif chance.random() < 0.3 and len(turns) > 2:  # back to an earlier turn
            del turns[chance.randrange(1, len(turns)) :]
        turns += [answer, some_tokens(chance, 1, 9)]
    assert chat.scheduler.prefix.stats.num_hit > 0


@pytest.mark.parametrize("kind", MODELS)
def test_concurrent_prompts_with_a_shared_prefix_have_the_tokens_of_each_alone(kind: str):
    chance = random.Random(7)
    chat = Chat(kind, max_rows=3, chunk=16)
    shared = some_tokens(chance, 70, 70)
    sequences = [
        chat.sequence(
            shared[: chance.choice([30, 68, 70])] + some_tokens(chance, 1, 9), chance.randint(1, 9)
        )
        for _ in range(12)
    ]
    log: dict[int, list[Command]] = {}
    for sequence in sequences:
        log.setdefault(chance.randrange(12), []).append(Add(sequence))
    for sequence in sequences[:3]:
        end = Finish(sequence.id, FinishReason.CANCELLED)
        log.setdefault(12 + chance.randrange(12), []).append(end)
    run = chat.drive(log)
    for sequence in sequences:
        tokens = run.tokens(sequence.id)
        alone = generate(kind, sequence.prompt.tokens, sequence.max_tokens)
        assert tokens == alone[: len(tokens)]
        if run.ends(sequence.id)[0].reason is FinishReason.LENGTH:
            assert tokens == alone


@pytest.mark.parametrize("kind", MODELS)
def test_a_small_cache_evicts_and_gives_no_wrong_tokens(kind: str):
    chance = random.Random(3)
    chat = Chat(kind, num_bytes=60_000)
    roots = [some_tokens(chance, 20, 40) for _ in range(4)]
    for _ in range(16):
        at = chance.randrange(len(roots))
        answer = chat.ask(roots[at], chance.randint(1, 6))
        roots[at] = (roots[at] + answer + some_tokens(chance, 1, 6))[:90]
    assert chat.scheduler.prefix.stats.num_evicted > 0
