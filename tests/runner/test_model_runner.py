"""The runner: each sequence draws the same tokens in a batch as alone.

The first half is the contract of `sequence.Runner`: the same scenarios against the `FakeRunner`
that the other tests rely on and against the real one. The second half holds the real one to
mlx-lm's `generate_step`, for each kind of cache. Equality has no tolerance: random weights make
ties as unlikely as they are in life, and a wrong mask, offset or state changes tokens at once.
"""

import functools
import gc
import importlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import mlx.core as mx
import pytest
from fakes import GREEDY, FakeRunner, Run, admit, answer, drive, make_choices, make_sequence
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlxlite.engine.memory import Memory
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import FinishReason, Sequence
from mlxlite.engine.step import Add, Admission, Chunk, Command, Finish, Runner, Step, Token
from mlxlite.runner import model_runner
from mlxlite.runner.kv_cache import KVBits
from mlxlite.runner.model_runner import ModelRunner
from mlxlite.runner.row_batch import merge

VOCABULARY = 97


@pytest.fixture(scope="module", autouse=True)
def _without_compilation() -> Iterator[None]:
    """On CPU each new kernel costs seconds of a C++ compiler, and none of them is ours."""
    mx.disable_compile()
    yield
    mx.enable_compile()


# --- tiny models, one for each kind of cache --------------------------------------------------

_ATTENTION: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
_STATE_SPACE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "state_size": 8,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 4,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}
WINDOW = 12
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": _ATTENTION,  # KVCache
    "gemma3_text": _ATTENTION  # RotatingKVCache, KVCache
    | {
        "num_hidden_layers": 3,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16,
    },
    "gpt_oss": _ATTENTION  # RotatingKVCache, KVCache, attention sinks
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "deepseek_v3": _ATTENTION  # KVCache of latents
    | {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    "mamba": _STATE_SPACE,  # ArraysCache
    "mamba2": _STATE_SPACE  # ArraysCache, with masks
    | {
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
        "layer_norm_epsilon": 1e-5,
        "time_step_limit": (0.0, float("inf")),
    },
    "falcon_h1": _ATTENTION  # CacheList(ArraysCache, KVCache)
    | {"mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_heads": 4},
    "lfm2": _ATTENTION  # ArraysCache, KVCache
    | {
        "num_hidden_layers": 3,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
    },
    "llama4": {  # ChunkedKVCache, which cannot merge, and KVCache
        "text_config": _ATTENTION
        | {
            "model_type": "llama4_text",
            "num_hidden_layers": 4,
            "attention_bias": False,
            "attention_chunk_size": WINDOW,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 128,
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
            "rope_scaling": None,
            "use_qk_norm": True,
        },
    },
}


def fresh(kind: str) -> nn.Module:
    """Random weights, changed so that a small model minds its whole past: see `_sharpen`."""
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind} | MODELS[kind]))
    weights = [(name, _sharpen(name, array)) for name, array in tree_flatten(model.parameters())]
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


build = functools.cache(fresh)  # for the runner, which lays the weights out anew


@functools.cache
def untouched(kind: str) -> nn.Module:
    """The same one for mlx-lm, as it loads it."""
    return fresh(kind)


def _sharpen(name: str, array: mx.array) -> mx.array:
    """Attention that looks closely, and a state that decays slowly."""
    if name.endswith("A_log"):
        return array - 4
    return array if array.ndim < 2 or "conv" in name else array * 3


@functools.cache
def generate(kind: str, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    """The judge: mlx-lm's own greedy answer to one prompt alone."""
    steps = generate_step(mx.array(prompt), untouched(kind), max_tokens=max_tokens)
    return [int(token) for token, _ in steps]


def judge(kind: str, sequence: Sequence) -> list[int]:
    return generate(kind, sequence.prompt.tokens, sequence.max_tokens)


class Fragile(nn.Module):
    """A model that raises in its next call once its flag is set."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.is_broken = False

    @property
    def layers(self) -> list[nn.Module]:
        layers: list[nn.Module] = self.model.layers
        return layers

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        if self.is_broken:
            raise RuntimeError("out of memory")
        logits: mx.array = self.model(tokens, cache=cache)
        return logits


# --- the contract: the fake and the real one ----------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A runner under contract, how to break it for one call, and what its sequences must say."""

    runner: Runner
    expected: Callable[[Sequence], list[int]]
    set_broken: Callable[[bool], None]


def fake_subject() -> Subject:
    fault = {"is_broken": False}

    def before(step: Step | None) -> None:
        if fault["is_broken"]:
            raise RuntimeError("out of memory")

    def set_broken(is_broken: bool) -> None:
        fault["is_broken"] = is_broken

    return Subject(FakeRunner(before=before), answer, set_broken)


def real_subject() -> Subject:
    model = Fragile(build("qwen3"))

    def set_broken(is_broken: bool) -> None:
        model.is_broken = is_broken

    return Subject(ModelRunner(model), functools.partial(judge, "qwen3"), set_broken)


@pytest.fixture(params=[fake_subject, real_subject], ids=["fake", "real"])
def subject(request: pytest.FixtureRequest) -> Subject:
    made: Subject = request.param()
    return made


def one_by_one(runner: Runner, *steps: Step) -> list[tuple[int, ...]]:
    """Launch and wait for each step in turn, without lookahead."""
    tokens = []
    for step in steps:
        launched, none = runner.advance(step, None)
        assert none is None
        assert launched is not None
        assert launched.step is step
        nothing, outcome = runner.advance(None, launched)
        assert nothing is None
        assert outcome is not None
        assert outcome.failed == ()
        assert outcome.device_s >= 0.0
        assert all(type(token) is int for token in outcome.tokens)
        tokens.append(outcome.tokens)
    return tokens


def test_where_a_launch_computes_a_chunk_its_time_is_the_chunk_s():
    runner = ModelRunner(build("qwen3"))
    one, two = make_sequence(1, 5), make_sequence(2, 2701)
    first = Step(1, admitted=admit(one), chunks=(Chunk(1, 0, 4),), rows=(1,))
    decoding, _ = runner.advance(first, None)
    with_chunk = Step(2, admitted=admit(two), chunks=(Chunk(2, 0, 900),), rows=(1,))
    began_at = perf_counter()
    launched, outcome = runner.advance(with_chunk, decoding)
    launch_s = perf_counter() - began_at
    assert outcome is not None
    assert 0.0 < outcome.device_s < launch_s / 2, "it ended during the launch"
    _, outcome = runner.advance(None, launched)
    assert outcome is not None
    assert outcome.device_s >= 0.9 * launch_s
    chunk, _ = runner.advance(Step(3, chunks=(Chunk(2, 900, 1800),), rows=(1,)), None)
    began_at = perf_counter()
    last, outcome = runner.advance(Step(4, chunks=(Chunk(2, 1800, 1804),), rows=(1,)), chunk)
    last_s = perf_counter() - began_at
    assert outcome is not None
    assert outcome.device_s > last_s, "of its own launch, not of the next one"
    _, outcome = runner.advance(None, last)
    assert outcome is not None
    assert outcome.device_s < launch_s, "of four tokens and a row"
    only_rows, _ = runner.advance(Step(5, rows=(1,)), None)
    only_rows, outcome = runner.advance(Step(6, rows=(1,)), only_rows)
    assert outcome is not None
    assert outcome.device_s > 0.0
    _, outcome = runner.advance(Step(7, chunks=(Chunk(2, 1804, 2700),), rows=(1,)), only_rows)
    assert outcome is not None
    assert outcome.device_s == 0.0, "unknown: it ended during the launch"


def test_an_outcome_has_a_token_for_each_row_and_none_without_rows(subject: Subject):
    one, two = make_sequence(1, 5), make_sequence(2, 1)
    a, b = subject.expected(one), subject.expected(two)
    assert one_by_one(
        subject.runner,
        Step(1, admitted=admit(one), chunks=(Chunk(1, 0, 3),)),
        Step(2, admitted=admit(two), chunks=(Chunk(1, 3, 4),), rows=(2, 1)),
        Step(3, rows=(2, 1)),
        Step(4, rows=(1,)),
        Step(5, released=(1, 2)),
    ) == [(), (b[0], a[0]), (b[1], a[1]), (a[2],), ()]


def test_a_step_is_launched_before_the_one_in_flight_is_waited_for(subject: Subject):
    sequence = make_sequence(1, 3)
    expected = subject.expected(sequence)
    step = Step(1, admitted=admit(sequence), chunks=(Chunk(1, 0, 2),), rows=(1,))
    first, none = subject.runner.advance(step, None)
    assert none is None
    second, outcome = subject.runner.advance(Step(2, rows=(1,)), first)
    assert outcome is not None
    assert outcome.tokens == (expected[0],)
    _, outcome = subject.runner.advance(None, second)
    assert outcome is not None
    assert outcome.tokens == (expected[1],)


def test_what_the_loop_shows_of_a_step_in_flight_has_no_array_and_no_prompt():
    """asyncio's debug mode writes it to the log, and an array would be evaluated there."""
    runner = real_subject().runner
    step = Step(1, admitted=admit(make_sequence(1, 1)), rows=(1,))
    launched, _ = runner.advance(step, None)
    assert repr(launched) == "<in flight: step 1, 1 rows>"


def test_rows_keep_their_order_and_newcomers_follow(subject: Subject):
    sequences = [make_sequence(id, 1, 8) for id in (3, 1, 2)]
    a, b, c = map(subject.expected, sequences)
    assert one_by_one(
        subject.runner,
        Step(1, admitted=admit(*sequences[:2]), rows=(3, 1)),
        Step(2, admitted=admit(*sequences[2:]), rows=(3, 1, 2)),
        Step(3, released=(3,), rows=(1, 2)),
        Step(4, rows=(1, 2)),
    ) == [(a[0], b[0]), (a[1], b[1], c[0]), (b[2], c[1]), (b[3], c[2])]


@pytest.mark.parametrize("rows", [(2, 1), (1, 2, 3), (1, 1), (3,)])
def test_rows_in_another_order_or_never_admitted_are_refused(
    subject: Subject, rows: tuple[int, ...]
):
    admitted = admit(make_sequence(1, 1), make_sequence(2, 1))
    launched, _ = subject.runner.advance(Step(1, admitted=admitted, rows=(1, 2)), None)
    with pytest.raises((AssertionError, KeyError)):
        subject.runner.advance(Step(2, rows=rows), launched)


def test_a_sequence_released_in_prefill_can_no_longer_be_computed(subject: Subject):
    one, two = make_sequence(1, 30), make_sequence(2, 2)
    tokens = one_by_one(
        subject.runner,
        Step(1, admitted=admit(one), chunks=(Chunk(1, 0, 20),)),
        Step(2, released=(1,), admitted=admit(two), chunks=(Chunk(2, 0, 1),), rows=(2,)),
    )
    assert tokens == [(), (subject.expected(two)[0],)]
    with pytest.raises((AssertionError, KeyError)):
        subject.runner.advance(Step(3, chunks=(Chunk(1, 20, 29),), rows=(2, 1)), None)


def test_a_reset_drops_every_sequence_and_ignores_a_late_release(subject: Subject):
    one, two, three = (make_sequence(id, 4) for id in (1, 2, 3))
    chunks = (Chunk(1, 0, 3), Chunk(2, 0, 2))
    launched, _ = subject.runner.advance(
        Step(1, admitted=admit(one, two), chunks=chunks, rows=(1,)), None
    )
    subject.runner.reset()
    del launched
    step = Step(2, released=(1, 2), admitted=admit(three), chunks=(Chunk(3, 0, 3),), rows=(3,))
    assert one_by_one(subject.runner, step) == [(subject.expected(three)[0],)]
    for rows in ((3, 1), (3, 2)):
        subject.runner.reset()
        with pytest.raises((AssertionError, KeyError)):
            subject.runner.advance(Step(10 + rows[1], rows=rows), None)


def test_a_reset_reads_the_errors_that_an_evaluation_has_left(monkeypatch: pytest.MonkeyPatch):
    runner = ModelRunner(build("qwen3"))
    left = [RuntimeError("[METAL] Command buffer execution failed")] * 2

    def synchronize() -> None:
        if left:
            raise left.pop()

    monkeypatch.setattr(mx, "synchronize", synchronize)
    runner.reset()
    assert not left


def test_after_a_lost_step_and_a_reset_the_runner_works_again(subject: Subject):
    one, two, three = (make_sequence(id, 9) for id in (1, 2, 3))
    scheduler = Scheduler(Policy(max_rows=2))
    scheduler.apply(Add(one))
    launched, _ = subject.runner.advance(scheduler.schedule(), None)
    scheduler.apply(Add(two))
    subject.set_broken(True)
    with pytest.raises(RuntimeError, match="out of memory"):
        subject.runner.advance(scheduler.schedule(), launched)
    subject.set_broken(False)
    subject.runner.reset()
    failed: list[Command] = [Finish(id, FinishReason.ERROR) for id in scheduler.running()]
    again = [Add(replace(sequence, id=10 + sequence.id)) for sequence in (one, two, three)]
    run = drive(scheduler, subject.runner, {0: failed, 1: again})
    assert [run.tokens(10 + s.id) for s in (one, two, three)] == [
        subject.expected(s) for s in (one, two, three)
    ]


DRAWN = (
    SamplingParams(temperature=1.0, seed=11),
    SamplingParams(temperature=0.8, top_k=20, seed=12),
    GREEDY,
    SamplingParams(temperature=1.2, top_p=0.9, seed=2**63 + 5),
    SamplingParams(temperature=1.0, top_k=30, top_p=0.8, min_p=0.01, seed=14),
    SamplingParams(temperature=1.0, seed=11),
)


def test_a_seeded_sequence_draws_the_same_alone_and_in_any_batch(subject: Subject):
    sequences = [
        make_sequence(id, 1 + 5 * id, 8, sampling=sampling) for id, sampling in enumerate(DRAWN, 1)
    ]
    scheduler = Scheduler(Policy(max_rows=4, chunk_size=16, first_chunk_budget=4))
    arrivals = {2 * s.id: [Add(s)] for s in reversed(sequences)}
    together = drive(scheduler, subject.runner, arrivals)
    for sequence in sequences:
        again = replace(sequence, id=100 + sequence.id)
        alone = drive(scheduler, subject.runner, {0: [Add(again)]})
        assert together.tokens(sequence.id) == alone.tokens(again.id), sequence
    assert together.tokens(1) != together.tokens(6)  # same seed, other prompts


def assert_choices_draw_what_each_draws_alone(runner: Runner, choices: list[Sequence]) -> None:
    """Together, with a prefix cache, they compute the prompt about once; alone, without blocks."""
    policy = Policy(max_rows=3, chunk_size=10, memory=runner.memory, prefix_bytes=1 << 30)
    scheduler = Scheduler(policy)
    together = drive(scheduler, runner, {0: [Add(sequence) for sequence in choices]})
    num_prefilled = sum(step.num_prefill_tokens for step in together.steps)
    assert num_prefilled < len(choices[0].prompt.tokens) + (len(choices) - 1) * policy.block_size
    for sequence in choices:
        prompt = replace(sequence.prompt, blocks=None)
        again = replace(sequence, id=100 + sequence.id, prompt=prompt)
        alone = drive(scheduler, runner, {0: [Add(again)]})
        assert together.tokens(sequence.id) == alone.tokens(again.id), sequence.id


def test_choices_draw_what_separate_sequences_with_their_seeds_draw(subject: Subject):
    choices = make_choices(6, 90, 7, block_size=16)
    assert_choices_draw_what_each_draws_alone(subject.runner, choices)


def test_a_released_id_may_be_admitted_again_with_the_tokens_it_has_drawn(subject: Subject):
    sequence = make_sequence(1, 5, 6)
    expected = tuple(subject.expected(sequence))
    back = Admission(sequence, expected[:2])
    assert one_by_one(
        subject.runner,
        Step(1, admitted=admit(sequence), chunks=(Chunk(1, 0, 4),), rows=(1,)),
        Step(2, rows=(1,)),
        Step(3, released=(1,)),
        Step(4, admitted=(back,), chunks=(Chunk(1, 0, 3),)),
        Step(5, chunks=(Chunk(1, 3, 6),), rows=(1,)),
        Step(6, rows=(1,)),
    ) == [(expected[0],), (expected[1],), (), (), (expected[2],), (expected[3],)]


@pytest.mark.parametrize("chunk", [Chunk(1, 3, 8), Chunk(1, 1, 8)], ids=str)
def test_a_chunk_that_leaves_a_gap_or_overlaps_is_refused(subject: Subject, chunk: Chunk):
    step = Step(1, admitted=admit(make_sequence(1, 9)), chunks=(Chunk(1, 0, 2),))
    launched, _ = subject.runner.advance(step, None)
    with pytest.raises(AssertionError):
        subject.runner.advance(Step(2, chunks=(chunk,)), launched)


def test_a_row_before_the_end_of_its_prefill_is_refused(subject: Subject):
    step = Step(1, admitted=admit(make_sequence(1, 9)), chunks=(Chunk(1, 0, 7),), rows=(1,))
    with pytest.raises(AssertionError):
        subject.runner.advance(step, None)


def test_rows_get_as_many_top_logprobs_as_they_requested(subject: Subject):
    asked = (None, 0, 3, 20)
    sequences = [
        make_sequence(id, 4, sampling=SamplingParams(0.0, top_logprobs=num))
        for id, num in enumerate(asked, 1)
    ]
    chunks = tuple(Chunk(s.id, 0, 3) for s in sequences)
    step = Step(1, admitted=admit(*sequences), chunks=chunks, rows=(1, 2, 3, 4))
    launched, _ = subject.runner.advance(step, None)
    _, outcome = subject.runner.advance(None, launched)
    assert outcome is not None
    assert {id: len(found.top) for id, found in outcome.logprobs.items()} == {2: 0, 3: 3, 4: 20}
    for id, found in outcome.logprobs.items():
        assert found.drawn <= 0.0
        assert [p for _, p in found.top] == sorted((p for _, p in found.top), reverse=True)
        if found.top:
            assert found.top[0] == (outcome.tokens[id - 1], found.drawn)


# --- company changes nothing --------------------------------------------------------------------

_SHAPES = ((33, 7), (1, 22), (5, 8), (17, 5), (2, 14), (1, 3), (26, 6), (12, 14))


def ragged(seed: int) -> list[Sequence]:
    """Eight sequences of which some prompts and some answers are longer than the window."""
    tokens = random.Random(99)
    prompts = [[tokens.randrange(VOCABULARY) for _ in range(num)] for num, _ in _SHAPES]
    sequences = [
        make_sequence(id, max_tokens=max_tokens, prompt=prompt)
        for id, (prompt, (_, max_tokens)) in enumerate(zip(prompts, _SHAPES, strict=True))
    ]
    random.Random(seed).shuffle(sequences)
    return sequences


def come_and_go(seed: int, sequences: list[Sequence]) -> dict[int, list[Command]]:
    """All arrive within 20 ticks; two are cancelled some time after."""
    chance = random.Random(seed)
    log: dict[int, list[Command]] = {}
    for sequence in sequences:
        log.setdefault(chance.randrange(20), []).append(Add(sequence))
    for sequence in sequences[:2]:
        tick = 20 + chance.randrange(10)
        log.setdefault(tick, []).append(Finish(sequence.id, FinishReason.CANCELLED))
    return log


def assert_all_as_alone(run: Run, sequences: list[Sequence], kind: str) -> None:
    for sequence in sequences:
        tokens, alone = run.tokens(sequence.id), judge(kind, sequence)
        (end,) = run.ends(sequence.id)
        if end.reason is FinishReason.LENGTH:
            assert len(tokens) == sequence.max_tokens
        assert tokens == alone[: len(tokens)], sequence.id


_ROWS = (1, 3, 8)
_CHUNKS = (7, 64, 2048)
_EVERY = [(rows, chunk) for rows in _ROWS for chunk in _CHUNKS] + [(3, 1)]
_SOME = [(3, 7), (8, 64), (3, 2048)]
CASES = [
    *((kind, *case) for kind in ("qwen3", "gemma3_text") for case in _EVERY),
    *((kind, *case) for kind in MODELS if kind not in ("qwen3", "gemma3_text") for case in _SOME),
]


@pytest.mark.parametrize(("kind", "max_rows", "chunk"), CASES)
def test_tokens_are_those_of_each_sequence_alone(kind: str, max_rows: int, chunk: int):
    sequences = ragged(seed=max_rows * chunk)
    scheduler = Scheduler(Policy(max_rows, chunk_size=chunk, first_chunk_budget=chunk))
    runner = ModelRunner(build(kind))
    run = drive(scheduler, runner, come_and_go(max_rows + chunk, sequences))
    assert_all_as_alone(run, sequences, kind)
    assert max(len(step.rows) for step in run.steps) > max_rows // 2


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_caches_that_grow_past_their_first_allocation_stay_whole(kind: str):
    """mlx-lm's caches grow by 256 tokens; rows cross that line before, in and after a merge."""
    tokens = random.Random(5)
    sequences = [
        make_sequence(id, max_tokens=8, prompt=[tokens.randrange(VOCABULARY) for _ in range(num)])
        for id, num in enumerate((252, 3, 257, 256, 1))
    ]
    log: dict[int, list[Command]] = {2 * s.id: [Add(s)] for s in sequences}
    run = drive(Scheduler(Policy(max_rows=4)), ModelRunner(build(kind)), log)
    assert_all_as_alone(run, sequences, kind)


class Counting(Fragile):
    """A model that notes the shape of each input, and raises for prompts of a certain length."""

    def __init__(self, model: nn.Module, broken_length: int = 0) -> None:
        super().__init__(model)
        self.shapes: list[tuple[int, ...]] = []
        self.broken_length = broken_length

    def make_cache(self) -> list[Any]:
        cache: list[Any] = make_prompt_cache(self.model)
        return cache

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        self.shapes.append(tuple(tokens.shape))
        if tokens.shape[1] == self.broken_length:
            raise RuntimeError("this prompt and no other")
        return super().__call__(tokens, cache)


@pytest.mark.parametrize("kind", ["qwen3", "mamba2", "falcon_h1", "lfm2"])
def test_short_prompts_of_like_length_are_prefilled_in_one_pass(kind: str):
    model = Counting(build(kind))
    runner = ModelRunner(model)
    model.shapes.clear()
    sequences = [make_sequence(i, n) for i, n in enumerate((10, 9, 8, 41, 3), start=1)]
    run = drive(Scheduler(Policy(max_rows=8)), runner, {0: [Add(s) for s in sequences]})
    # 9 and 8 beside 10 waste 2 of 27 tokens; 3 beside them would waste more than a quarter
    assert model.shapes[:4] == [(1, 40), (3, 9), (1, 2), (5, 1)]
    for sequence in sequences:
        assert run.tokens(sequence.id) == judge(kind, sequence)


def test_a_prompt_that_fails_alone_affects_no_other_sequence():
    model = Counting(build("qwen3"), broken_length=21)
    sequences = [make_sequence(i, n) for i, n in enumerate((5, 22, 60, 7), start=1)]
    scheduler, runner = Scheduler(Policy(max_rows=8)), ModelRunner(model)
    run = drive(scheduler, runner, {0: [Add(s) for s in sequences]})
    (end,) = run.ends(2)
    assert end.reason is FinishReason.ERROR
    assert "this prompt and no other" in (end.error or "")
    assert run.tokens(2) == []
    for sequence in (sequences[0], sequences[2], sequences[3]):
        assert run.tokens(sequence.id) == judge("qwen3", sequence)
    scheduler.check()
    again = drive(scheduler, runner, {0: [Add(make_sequence(9, 5))]})
    assert again.tokens(9) == judge("qwen3", make_sequence(9, 5))


def test_a_sequence_whose_cache_cannot_be_made_affects_no_other(
    monkeypatch: pytest.MonkeyPatch,
):
    scheduler, runner = Scheduler(Policy(max_rows=8)), ModelRunner(build("qwen3"))
    made, new_cache = 0, runner._prefills._new_cache

    def second_fails() -> Any:
        nonlocal made
        made += 1
        if made == 2:
            raise MemoryError("no room for a cache")
        return new_cache()

    monkeypatch.setattr(runner._prefills, "_new_cache", second_fails)
    sequences = [make_sequence(i, n) for i, n in enumerate((5, 22, 60), start=1)]
    run = drive(scheduler, runner, {0: [Add(s) for s in sequences]})
    (end,) = run.ends(2)
    assert end.reason is FinishReason.ERROR
    assert end.error == "MemoryError: no room for a cache"
    for sequence in (sequences[0], sequences[2]):
        assert run.tokens(sequence.id) == judge("qwen3", sequence)
    scheduler.check()


class FailsTogether(Counting):
    """A model that raises whenever several prompts come in one pass."""

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        if tokens.shape[0] > 1 and tokens.shape[1] > 1:
            self.shapes.append(tuple(tokens.shape))
            raise RuntimeError("these prompts together")
        return super().__call__(tokens, cache)


def test_prompts_that_fail_together_are_tried_alone():
    model = FailsTogether(build("qwen3"))
    sequences = [make_sequence(i, n) for i, n in enumerate((10, 9, 8), start=1)]
    commands = {0: [Add(s) for s in sequences]}
    run = drive(Scheduler(Policy(max_rows=8)), ModelRunner(model), commands)
    assert (3, 9) in model.shapes
    for sequence in sequences:
        assert run.tokens(sequence.id) == judge("qwen3", sequence)


def test_a_prompt_that_fails_ends_all_of_its_choices_and_no_other_sequence():
    model = Counting(build("qwen3"), broken_length=21)
    choices = make_choices(5, 22, first=10)
    bystander = make_sequence(1, 60, 12)
    scheduler, runner = Scheduler(Policy(max_rows=3)), ModelRunner(model)
    run = drive(scheduler, runner, {0: [Add(bystander), *map(Add, choices)]})
    for choice in choices:
        assert [end.reason for end in run.ends(choice.id)] == [FinishReason.ERROR]
    assert run.tokens(1) == judge("qwen3", bystander)
    again = drive(scheduler, runner, {0: [Add(make_sequence(99, 5))]})
    assert again.tokens(99) == judge("qwen3", make_sequence(99, 5))


def test_a_warmed_up_runner_draws_the_same_tokens():
    runner = ModelRunner(build("qwen3"))
    runner.warm_up()
    sequences = ragged(seed=0)
    run = drive(Scheduler(Policy()), runner, {0: [Add(sequence) for sequence in sequences]})
    assert_all_as_alone(run, sequences, "qwen3")


@pytest.mark.parametrize("kind", MODELS)
def test_the_logits_of_the_test_models_depend_on_the_whole_prefix(kind: str):
    """What makes the tests above worth something: a token of the past changes the answer."""
    prompt = tuple(range(3, 3 + WINDOW // 2))
    answers = {tuple(generate(kind, (first, *prompt), 8)) for first in (0, 50, 90)}
    assert len(answers) == 3
    assert all(len(set(tokens)) > 3 for tokens in answers)


def test_the_test_models_cover_every_kind_of_cache():
    def names(cache: Any) -> set[str]:
        parts = getattr(cache, "caches", ())
        return {type(cache).__name__}.union(*map(names, parts))

    kinds = set().union(*(names(c) for kind in MODELS for c in make_prompt_cache(build(kind))))
    expected = {"KVCache", "RotatingKVCache", "ArraysCache", "CacheList", "ChunkedKVCache"}
    assert kinds == expected


# --- giving way ---------------------------------------------------------------------------------


def budget_for(runner: ModelRunner, num_rows: int, num_tokens: int) -> Memory:
    """Room for the given number of rows of that length."""
    memory = runner.memory
    return replace(memory, budget_bytes=memory.batch([num_tokens] * num_rows))


@pytest.mark.parametrize("kind", MODELS)
def test_a_sequence_preempted_for_memory_or_priority_draws_the_same_tokens(kind: str):
    runner = ModelRunner(build(kind))
    memory = budget_for(runner, 2, 40)
    sequences = [
        replace(sequence, priority=-(i // 3)) for i, sequence in enumerate(ragged(seed=len(kind)))
    ]
    log: dict[int, list[Command]] = {2 * i: [Add(s)] for i, s in enumerate(sequences)}
    policy = Policy(max_rows=3, chunk_size=16, first_chunk_budget=6, memory=memory)
    run = drive(Scheduler(policy), runner, log)
    resumed = [a for step in run.steps for a in step.admitted if a.outputs]
    assert resumed
    assert_all_as_alone(run, sequences, kind)
    assert all(end.reason is FinishReason.LENGTH for s in sequences for end in run.ends(s.id))


@pytest.mark.parametrize("kind", MODELS)
def test_choices_draw_what_each_draws_alone_for_every_kind_of_cache(kind: str):
    """Longer than the window, and the first of them runs on beside the others."""
    choices = make_choices(4, 8 * WINDOW, 9, block_size=16)
    choices[0] = replace(choices[0], max_tokens=20)
    assert_choices_draw_what_each_draws_alone(ModelRunner(build(kind)), choices)


# --- how rows join -------------------------------------------------------------------------------


def plain_cache(num_tokens: int, value: float) -> KVCache:
    cache = KVCache()
    cache.update_and_fetch(*(mx.full((1, 2, num_tokens, 8), sign * value) for sign in (1, -1)))
    return cache


def test_rows_join_at_their_ends_with_room_for_the_next_token():
    short, long = (plain_cache(5, 1.0), plain_cache(300, 2.0))
    batch = merge([[short]])
    batch[0].extend(merge([[long], [plain_cache(7, 3.0)]])[0])
    (layer,) = batch
    held = layer.keys
    assert held.shape[2] > 300, "the next token would copy all of it"
    keys, values = layer.keys_and_values()
    assert keys.shape == values.shape == (3, 2, 300, 8)
    for row, (num_tokens, value) in enumerate(((5, 1.0), (300, 2.0), (7, 3.0))):
        shown = [0.0] * (300 - num_tokens) + [value] * num_tokens
        assert keys[row, 1, :, 3].tolist() == shown
        assert values[row, 0, :, 5].tolist() == [-number for number in shown]
        assert layer.num_padding(row) == layer.left_padding[row].item() == 300 - num_tokens
        assert layer.offset[row].item() == num_tokens
    layer.update_and_fetch(mx.zeros((3, 2, 1, 8)), mx.zeros((3, 2, 1, 8)))
    assert layer.keys.shape == held.shape
    assert short.keys[0, 0, :5, 0].tolist() == [1.0] * 5


def test_rows_without_any_tokens_are_merged():
    (layer,) = merge([[KVCache()]])
    layer.extend(merge([[KVCache()], [KVCache()]])[0])
    assert layer.keys is layer.values is None
    assert layer.left_padding.tolist() == layer.offset.tolist() == [0, 0, 0]


# --- quantised caches -----------------------------------------------------------------------------


@functools.cache
def build_wide(kind: str) -> nn.Module:
    """Heads of 32 channels: the narrowest that a group of 32 divides."""
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(0)
    settings = {"model_type": kind} | MODELS[kind] | {"head_dim": 32}
    model = module.Model(module.ModelArgs.from_dict(settings))
    weights = [(name, _sharpen(name, array)) for name, array in tree_flatten(model.parameters())]
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_rows_with_quantised_caches_draw_the_same_in_a_batch_as_alone(kind: str, bits: int):
    runner = ModelRunner(build_wide(kind), kv_bits=KVBits(bits, 32))
    sequences = ragged(seed=bits)
    scheduler = Scheduler(Policy(max_rows=4, chunk_size=16, first_chunk_budget=8))
    together = drive(scheduler, runner, come_and_go(bits, sequences))
    assert max(len(step.rows) for step in together.steps) == 4
    for sequence in sequences:
        again = replace(sequence, id=100 + sequence.id)
        alone = drive(scheduler, runner, {0: [Add(again)]}).tokens(again.id)
        tokens = together.tokens(sequence.id)
        assert tokens == alone[: len(tokens)], sequence.id
    bare = ModelRunner(build_wide(kind)).memory
    assert runner.memory.layers < bare.layers  # fewer bytes a token


# --- logprobs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [1, 8])
def test_reported_logprobs_are_the_log_softmax_of_the_models_logits(max_rows: int):
    model = build("qwen3")
    sampling = SamplingParams(0.8, top_k=9, seed=4, repetition_penalty=1.3, top_logprobs=3)
    sequences = [replace(s, sampling=sampling) for s in ragged(seed=3)]
    sequences[2] = replace(sequences[2], sampling=GREEDY)
    log: dict[int, list[Command]] = {i: [Add(s)] for i, s in enumerate(sequences)}
    run = drive(Scheduler(Policy(max_rows)), ModelRunner(model), log)
    for sequence in sequences:
        events = [e for e in run.events if isinstance(e, Token) and e.id == sequence.id]
        assert len(events) == sequence.max_tokens
        if sequence.sampling is GREEDY:
            assert all(event.logprobs is None for event in events)
            continue
        prompt = sequence.prompt.tokens
        tokens = [*prompt, *(event.token for event in events)]
        logits = model(mx.array([tokens[:-1]]))[0, len(prompt) - 1 :]
        expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for event, row in zip(events, expected, strict=True):
            assert event.logprobs is not None
            assert event.logprobs.drawn == pytest.approx(row[event.token].item(), abs=1e-3)
            best = mx.argsort(-row)[:3].tolist()
            assert [id for id, _ in event.logprobs.top] == best
            found = [value for _, value in event.logprobs.top]
            assert found == pytest.approx(row[mx.array(best)].tolist(), abs=1e-3)


# --- memory -------------------------------------------------------------------------------------


def held_bytes(cache: list[Any]) -> int:
    """What one row's cache really holds."""
    return sum(layer.nbytes for layer in cache)


@pytest.mark.parametrize("kind", MODELS)
def test_the_ledger_matches_the_memory_of_live_caches(kind: str):
    """A row never holds more than the ledger counts, and no less than a block under it."""
    model = build(kind)
    memory = ModelRunner(model).memory
    assert memory.budget_bytes is None
    exact = replace(memory, block=0)
    for num_tokens, chunk in ((1, 1), (WINDOW, 5), (256, 2048), (400, 150)):
        cache = make_prompt_cache(model)
        for start in range(0, num_tokens, chunk):
            size = min(chunk, num_tokens - start)
            model(mx.zeros((1, size), mx.uint32), cache=cache)
        held = held_bytes(cache)
        model(mx.zeros((1, 1), mx.uint32), cache=cache)  # the row's own input
        mx.eval([layer.state for layer in cache])
        after = held_bytes(cache)
        assert exact.row(num_tokens) <= held, (num_tokens, chunk)
        assert after <= memory.row(num_tokens + 1), (num_tokens, chunk)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "mamba2", "falcon_h1"])
def test_a_batch_holds_no_more_than_the_ledger_counts(kind: str):
    """Measured on the device, after each of some steps; 32 KiB are for tokens and settings."""
    runner = ModelRunner(build(kind))
    lengths = (300, 20, 1, 255)
    sequences = [make_sequence(id, n, 8) for id, n in enumerate(lengths, 1)]
    chunks = tuple(Chunk(s.id, 0, len(s.prompt.tokens) - 1) for s in sequences if s.id != 3)
    before = active_bytes()
    one_by_one(runner, Step(1, admitted=admit(*sequences), chunks=chunks, rows=(1, 2, 3, 4)))
    for number in range(2, 6):
        one_by_one(runner, Step(number, rows=(1, 2, 3, 4)))
        held = active_bytes() - before
        assert held <= runner.memory.batch([n + number for n in lengths]) + 32768


@pytest.mark.parametrize("kind", MODELS)
def test_warming_up_leaves_nothing_behind(kind: str):
    runner = ModelRunner(build(kind))
    before = active_bytes()
    runner.warm_up()
    assert active_bytes() == before
    assert runner.memory == ModelRunner(build(kind)).memory


def active_bytes() -> int:
    gc.collect()
    mx.synchronize()
    return mx.get_active_memory()


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "falcon_h1", "llama4"])
def test_when_every_sequence_has_ended_no_memory_is_held(kind: str):
    runner = ModelRunner(build(kind))
    sequences = ragged(seed=1)
    before = active_bytes()
    drive(Scheduler(Policy(max_rows=3)), runner, {0: [Add(sequence) for sequence in sequences]})
    assert active_bytes() == before


def test_a_long_row_that_leaves_takes_its_memory_with_it():
    runner = ModelRunner(build("qwen3"))
    before = active_bytes()
    long, *short = (make_sequence(1, 900), make_sequence(2, 2), make_sequence(3, 2))
    chunks = (Chunk(1, 0, 899), Chunk(2, 0, 1), Chunk(3, 0, 1))
    one_by_one(runner, Step(1, admitted=admit(long, *short), chunks=chunks, rows=(1, 2, 3)))
    with_long = active_bytes() - before
    one_by_one(runner, Step(2, released=(1,), rows=(2, 3)))
    assert active_bytes() - before < with_long / 2


def test_a_prompt_that_leaves_and_a_reset_free_their_memory():
    runner = ModelRunner(build("qwen3"))
    before = active_bytes()
    admitted = admit(make_sequence(1, 900), make_sequence(2, 900))
    one_by_one(runner, Step(1, admitted=admitted, chunks=(Chunk(1, 0, 800), Chunk(2, 0, 800))))
    both = active_bytes() - before
    one_by_one(runner, Step(2, released=(1,), chunks=(Chunk(2, 800, 899),), rows=(2,)))
    assert active_bytes() - before < both
    runner.reset()
    assert active_bytes() == before


@pytest.mark.parametrize(("min_bytes", "num_trims"), [(0, 1), (1 << 40, 0)])
def test_memory_of_a_large_step_goes_back_to_the_system_once_nothing_runs(
    min_bytes: int, num_trims: int, monkeypatch: pytest.MonkeyPatch
):
    runner = ModelRunner(build("qwen3"))
    trims: list[int] = []
    monkeypatch.setattr(runner, "_trim", trims.append)
    monkeypatch.setattr(model_runner, "_MIN_TRIM_BYTES", min_bytes)
    mx.reset_peak_memory()
    sequence = make_sequence(1, 901)
    start = Step(1, admitted=admit(sequence), chunks=(Chunk(1, 0, 900),), rows=(1,))
    one_by_one(runner, start)
    assert trims == []
    one_by_one(runner, Step(2, released=(1,)))
    assert trims == [0] * num_trims


def test_a_step_reports_the_memory_of_its_prompt_tokens():
    runner = ModelRunner(build("qwen3"))
    sequence = make_sequence(1, 2000)
    start = Step(1, admitted=admit(sequence), chunks=(Chunk(1, 0, 512),))
    chunks = [Chunk(1, 512, 1024), Chunk(1, 1024, 1040), Chunk(1, 1040, 1552)]
    sizes = []
    for step in (start, *(Step(2 + i, chunks=(chunk,)) for i, chunk in enumerate(chunks))):
        launched, _ = runner.advance(step, None)
        _, outcome = runner.advance(None, launched)
        assert outcome is not None
        sizes.append(outcome.token_bytes)
    first, second, few, last = sizes
    assert 0.0 < first < second < last, "a longer context takes more"
    assert few == 0.0, "sixteen tokens are no measure"
