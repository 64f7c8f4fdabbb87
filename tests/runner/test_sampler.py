"""Sampling: the right distribution, the right truncation, and the same draw in any company.

The second half holds what depends on the tokens so far (penalties, `min_tokens`) and the coin of
xtc to plain numpy, one row at a time, over several steps and changes of the batch.
"""

from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.runner.random import split_seed
from mlxlite.runner.sampler import Sampler, SamplerRow

GREEDY = SamplingParams(temperature=0.0)
PLAIN = SamplingParams(temperature=0.9, seed=5)
SETTINGS = (
    GREEDY,
    PLAIN,
    SamplingParams(temperature=1.3, top_k=40, seed=2**64 - 1),
    SamplingParams(temperature=0.7, top_p=0.8, seed=1),
    SamplingParams(temperature=1.1, min_p=0.05, seed=2),
    SamplingParams(temperature=1.5, top_k=7, top_p=0.9, min_p=0.02, seed=2**63),
    SamplingParams(temperature=0.8, top_k=900, top_p=0.95, seed=4),
)
Logits = npt.NDArray[np.float32]


def sampler_of(num_vocab: int, *rows: SamplerRow) -> Sampler:
    sampler = Sampler(num_vocab)
    sampler.regroup([], rows)
    return sampler


def draws(params: SamplingParams, logits: Logits, num: int, num_drawn: int = 0) -> list[int]:
    """`num` tokens of one row alone, one after another."""
    sampler = sampler_of(len(logits), SamplerRow(params, num_drawn=num_drawn))
    row = mx.array(logits)[None]
    return [int(sampler(row)[0].item()) for _ in range(num)]


def draw_among(rows: list[tuple[SamplingParams, Logits]], num: int = 1) -> list[list[int]]:
    """`num` tokens of each row, all rows in one batch."""
    sampler = sampler_of(len(rows[0][1]), *(SamplerRow(params) for params, _ in rows))
    logits = mx.array(np.stack([row for _, row in rows]))
    return np.array([sampler(logits)[0].tolist() for _ in range(num)]).T.tolist()


def random_logits(num_rows: int, num_tokens: int, scale: float = 3.0, seed: int = 0) -> Logits:
    normal = np.random.default_rng(seed).standard_normal((num_rows, num_tokens))
    return (normal * scale).astype(np.float32)


# --- distributions ----------------------------------------------------------------------------


def softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def assert_fits(tokens: npt.NDArray[np.int64], expected: npt.NDArray[np.float64]) -> None:
    """Pearson's chi-square, normalised: its z is below 5 unless the distribution is wrong."""
    counts = np.bincount(tokens, minlength=len(expected))
    assert not counts[expected == 0.0].any()
    if (expected > 0.0).sum() == 1:
        return
    is_drawn = expected > 0.0
    means = expected[is_drawn] * len(tokens)
    assert means.min() >= 5, "too few draws for the test"
    chi_square = float((((counts[is_drawn] - means) ** 2) / means).sum())
    freedom = int(is_drawn.sum()) - 1
    assert abs(chi_square - freedom) / np.sqrt(2 * freedom) < 5


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
def test_draws_of_many_seeds_follow_the_softmax_at_the_temperature(temperature: float):
    logits = random_logits(1, 9, 1.0)[0]
    rows = [SamplingParams(temperature, seed=seed) for seed in range(512)]
    tokens = np.array(draw_among([(params, logits) for params in rows], 40))
    assert_fits(tokens.ravel(), softmax(logits.astype(np.float64) / temperature))


# Settings of each group that draws, which let through all of 64 tokens alike.
KEEPING_ALL = (SamplingParams(), SamplingParams(top_k=64), SamplingParams(top_p=0.995))


@pytest.mark.parametrize("params", KEEPING_ALL, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_draws_of_one_seed_follow_the_softmax_along_the_positions(
    seed: int, params: SamplingParams
):
    """Rows at every hundredth position: one seed's first ten thousand."""
    logits = random_logits(1, 9, 1.0, seed=3)[0]
    row = replace(params, seed=seed)
    sampler = sampler_of(9, *(SamplerRow(row, num_drawn=100 * i) for i in range(100)))
    batch = mx.array(np.tile(logits, (100, 1)))
    tokens = np.array([sampler(batch)[0].tolist() for _ in range(100)])
    assert_fits(tokens.ravel(), softmax(logits.astype(np.float64)))


def test_draws_from_a_large_vocabulary_follow_the_softmax():
    logits = random_logits(1, 4096, 1.0, seed=4)[0]
    rows = [(SamplingParams(seed=seed), logits) for seed in range(64)]
    tokens = np.array(draw_among(rows, 150)).ravel()
    order = np.argsort(softmax(logits.astype(np.float64)))
    bucket = np.empty(4096, np.int64)
    bucket[order] = np.arange(4096) // 64  # tokens of like probability together
    expected = np.bincount(bucket, weights=softmax(logits.astype(np.float64)))
    assert_fits(bucket[tokens], expected)


def test_a_token_without_a_chance_is_never_drawn_however_many_there_are():
    """The noise is finite: 64 draws over a million tokens 80 below the best are all the best."""
    logits = np.full(1 << 20, -40.0, np.float32)
    logits[77] = 40.0
    rows = mx.broadcast_to(mx.array(logits), (4, logits.size))
    for first in range(0, 64, 4):
        draws = [SamplerRow(SamplingParams(seed=first + i)) for i in range(4)]
        assert sampler_of(logits.size, *draws)(rows)[0].tolist() == [77] * 4


@pytest.mark.parametrize("params", KEEPING_ALL, ids=str)
def test_different_seeds_and_positions_are_uncorrelated(params: SamplingParams):
    num_tokens, num_seeds, num_positions = 64, 256, 64
    logits = np.zeros(num_tokens, np.float32)
    rows = [(replace(params, seed=seed), logits) for seed in range(num_seeds)]
    tokens = np.array(draw_among(rows, num_positions))  # [seed, position]
    pairs = {
        "next seed": (tokens[1:], tokens[:-1]),
        "next position": (tokens[:, 1:], tokens[:, :-1]),
        "next seed, previous position": (tokens[1:, :-1], tokens[:-1, 1:]),
        "far seed": (tokens[128:], tokens[:128]),
        "far position": (tokens[:, 32:], tokens[:, :32]),
    }
    for name, (one, two) in pairs.items():
        mean = one.size / num_tokens
        assert abs(int((one == two).sum()) - mean) < 5 * np.sqrt(mean), name
        offset = (one - two) % num_tokens  # no other shift is favoured either
        assert_fits(offset.ravel(), np.full(num_tokens, 1 / num_tokens))


# --- truncation -------------------------------------------------------------------------------


def kept(params: SamplingParams, logits: Logits) -> set[int]:
    """The plain reference: temperature, top_k, top_p over what is left, min_p; ties are kept."""
    scores = logits.astype(np.float64) / params.temperature
    ranked = np.sort(scores)[::-1]
    if params.top_k:
        ranked = ranked[: params.top_k]
    probabilities = softmax(ranked)
    before = np.cumsum(probabilities) - probabilities
    is_kept = (before < params.top_p) if params.top_p < 1.0 else np.ones(len(ranked), bool)
    lowest = ranked[is_kept][-1]
    if params.min_p:
        lowest = max(lowest, ranked[0] + np.log(params.min_p))
    return set(np.flatnonzero(scores >= lowest).tolist())


def random_settings(chance: np.random.Generator, num: int, max_k: int) -> list[SamplingParams]:
    """Any mixture of the three; each is off in a third of the rows."""
    return [
        SamplingParams(
            temperature=float(chance.uniform(0.8, 2.0)),
            top_k=int(chance.integers(1, max_k + 1)) if chance.random() < 0.67 else 0,
            top_p=float(chance.uniform(0.05, 0.99)) if chance.random() < 0.67 else 1.0,
            min_p=float(chance.uniform(0.01, 0.5)) if chance.random() < 0.67 else 0.0,
        )
        for _ in range(num)
    ]


def drawn(settings: list[SamplingParams], logits: Logits, num: int) -> list[set[int]]:
    """What each row draws in 64 seeds times `num` positions, all in one batch."""
    rows = [
        (SamplingParams(p.temperature, p.top_p, p.top_k, p.min_p, seed), row)
        for p, row in zip(settings, logits, strict=True)
        for seed in range(64)
    ]
    tokens = np.array(draw_among(rows, num)).reshape(len(settings), -1)
    return [set(row.tolist()) for row in tokens]


@pytest.mark.parametrize("seed", range(6))
def test_exactly_the_tokens_of_the_reference_are_drawn_whatever_the_settings_per_row(seed: int):
    chance = np.random.default_rng(seed)
    settings = random_settings(chance, 12, max_k=20)
    logits = chance.uniform(-1.5, 1.5, (12, 14)).astype(np.float32)
    # The rarest token has a chance of about e**-3.75 / 14: 6400 draws miss it once in 10**4.
    expected = [kept(p, row) for p, row in zip(settings, logits, strict=True)]
    assert drawn(settings, logits, 100) == expected


@pytest.mark.parametrize("seed", range(3))
def test_exactly_the_tokens_of_the_reference_are_drawn_where_every_row_has_a_top_k(seed: int):
    chance = np.random.default_rng(seed)
    settings = [
        SamplingParams(p.temperature, p.top_p, p.top_k or 5, p.min_p)
        for p in random_settings(chance, 12, max_k=9)
    ]
    logits = chance.uniform(-1.5, 1.5, (12, 14)).astype(np.float32)
    expected = [kept(p, row) for p, row in zip(settings, logits, strict=True)]
    assert drawn(settings, logits, 100) == expected


def shares(params: SamplingParams, logits: Logits) -> npt.NDArray[np.float64]:
    """The plain reference: the chance of each token, given all the cuts, where none are tied."""
    shares = softmax(logits.astype(np.float64) / params.temperature)
    shares[list(set(range(len(logits))) - kept(params, logits))] = 0.0
    shares /= shares.sum()
    above = np.flatnonzero(shares > params.xtc_threshold)
    if not params.xtc_probability or len(above) < 2:
        return shares
    cut = shares.copy()
    cut[above[shares[above] > shares[above].min()]] = 0.0
    cut /= cut.sum()
    return params.xtc_probability * cut + (1 - params.xtc_probability) * shares


# Groups by their top_k for 80 tokens: full or wide, narrow, wide, full or wide.
COMBINATIONS = [
    SamplingParams(1.1, top_p, top_k, min_p, xtc_probability=xtc, xtc_threshold=0.018)
    for top_k in (0, 2, 30, 64, 65, 79, 80, 10**6)
    for top_p in (1.0, 0.6, 0.95)
    for min_p in (0.0, 0.35)
    for xtc in (0.0, 0.5)
]


@pytest.mark.parametrize("seed", range(3))
def test_every_combination_of_cuts_follows_the_distribution_of_the_reference(seed: int):
    """All in one batch; what the reference cuts is not drawn once, and nothing else is missing."""
    logits = np.random.default_rng(seed).uniform(-1.0, 1.0, (len(COMBINATIONS), 80))
    logits = logits.astype(np.float32)
    rows = [
        (replace(params, seed=seed * 1000 + i), row)
        for params, row in zip(COMBINATIONS, logits, strict=True)
        for i in range(16)
    ]
    tokens = np.array(draw_among(rows, 250)).reshape(len(COMBINATIONS), -1)
    for params, row, own in zip(COMBINATIONS, logits, tokens, strict=True):
        assert_fits(own, shares(params, row))


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
def test_a_top_p_over_many_negligible_tokens_follows_the_reference(top_p: float):
    """The wide group does not sort shares that are too small to count."""
    chance = np.random.default_rng(3)
    logits = np.concatenate([chance.uniform(-1, 1, 20), chance.uniform(-18, -7, 1980)])
    logits = chance.permutation(logits).astype(np.float32)
    rows = [(SamplingParams(top_p=top_p, seed=seed), logits) for seed in range(32)]
    tokens = np.array(draw_among(rows, 60)).ravel()
    assert_fits(tokens, shares(rows[0][0], logits))


@pytest.mark.parametrize("top_p", [1e-6, 1e-40, 1e-60])
def test_a_top_p_of_next_to_nothing_leaves_the_best(top_p: float):
    logits = random_logits(1, 200)[0]
    for top_k in (0, 20, 150):
        params = SamplingParams(top_k=top_k, top_p=top_p)
        assert draws(params, logits, 10) == [int(logits.argmax())] * 10


# --- ties -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(top_k=1), {1}),
        (SamplingParams(top_p=0.6), {1, 2, 3}),
        (SamplingParams(top_p=1e-6), {1}),
        (SamplingParams(min_p=1.0), {1}),
    ],
    ids=str,
)
def test_a_token_tied_with_the_last_one_kept_is_kept(params: SamplingParams, expected: set[int]):
    logits = np.array([[0.0, 2.0, 1.0, 1.0, 0.0, -1.0]], np.float32)
    assert drawn([params], logits, 20) == [expected]


def test_a_small_top_k_keeps_exactly_k_of_tied_tokens():
    logits = np.array([[0.0, 2.0, 1.0, 1.0, 0.0, -1.0]], np.float32)
    assert drawn([SamplingParams(top_k=2)], logits, 20) == [{1, 2}]
    for top_k in (2, 20, 64):  # also where more are tied than the head has
        (tokens,) = drawn([SamplingParams(top_k=top_k)], np.zeros((1, 300), np.float32), 40)
        assert len(tokens) == top_k


def test_a_large_top_k_keeps_what_is_tied_with_its_last():
    logits = np.where(np.arange(100) % 10 == 0, 2.0, 0.0).astype(np.float32)
    assert drawn([SamplingParams(top_k=70)], logits[None], 60) == [set(range(100))]


def test_a_top_k_of_1_is_greedy_also_where_tokens_are_tied():
    logits = np.zeros(300, np.float32)
    logits[[55, 77, 299]] = 1.0
    params = SamplingParams(top_k=1, seed=3)
    assert draws(params, logits, 5) == [55] * 5
    for company in SETTINGS:
        assert draw_among([(company, logits), (params, logits)], 5)[1] == [55] * 5


def test_a_top_k_beyond_the_vocabulary_keeps_everything():
    logits = random_logits(1, 6, 0.5)
    for top_k in (6, 7, 64, 65, 2**31 - 1):
        assert drawn([SamplingParams(top_k=top_k)], logits, 10) == [set(range(6))]


@pytest.mark.parametrize("num_tokens", [2, 63, 64, 65])
@pytest.mark.parametrize("top_k", [2, 63, 64, 65])
def test_a_vocabulary_about_as_large_as_the_head_is_cut_as_any_other(top_k: int, num_tokens: int):
    logits = random_logits(1, num_tokens, 0.3, seed=top_k)
    params = SamplingParams(top_k=top_k)
    assert drawn([params], logits, 40) == [kept(params, logits[0])]


# --- greedy -----------------------------------------------------------------------------------


def test_greedy_is_argmax_alone_and_in_any_batch():
    logits = random_logits(7, 500)
    best = logits.argmax(axis=1).tolist()
    assert [draws(GREEDY, row, 1)[0] for row in logits] == best
    assert draw_among([(GREEDY, row) for row in logits], 1) == [[token] for token in best]
    for params in SETTINGS:
        rows = [(GREEDY, logits[0]), (params, logits[1]), (GREEDY, logits[2])]
        tokens = draw_among(rows, 3)
        assert tokens[0] == [best[0]] * 3
        assert tokens[2] == [best[2]] * 3


def test_a_greedy_tie_is_broken_by_the_lowest_id_alone_and_in_a_batch():
    logits = np.array([0.0, 3.0, 1.0, 3.0, 3.0], np.float32)
    assert draws(GREEDY, logits, 1) == [1]
    for params in SETTINGS:
        assert draw_among([(params, logits), (GREEDY, logits)])[1] == [1]


# --- company ----------------------------------------------------------------------------------


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_a_row_draws_the_same_whatever_path_the_other_rows_force(params: SamplingParams):
    mine, other = random_logits(2, 1500, seed=7)
    alone = draws(params, mine, 25)
    for company in SETTINGS:
        assert draw_among([(params, mine), (company, other)], 25)[0] == alone
        assert draw_among([(company, other), (params, mine)], 25)[1] == alone
    everybody = [*((company, other) for company in SETTINGS), (params, mine)]
    assert draw_among(everybody, 25)[-1] == alone


def test_a_row_draws_the_same_at_each_index_and_batch_size():
    mine, other = random_logits(2, 300, seed=8)
    alone = draws(PLAIN, mine, 10)
    for num_rows in (1, 2, 3, 8, 17):
        for index in {0, num_rows // 2, num_rows - 1}:
            rows = [(SamplingParams(seed=100 + i), other) for i in range(num_rows)]
            rows[index] = (PLAIN, mine)
            assert draw_among(rows, 10)[index] == alone


@pytest.mark.parametrize("seed", [77, 280, 427, 614])
def test_a_row_that_does_not_truncate_keeps_its_tail_beside_rows_that_do(seed: int):
    """A float32 sum of many small chances is 1 too early; top_p 1 must keep what follows too.

    Each rare token has a chance of 2.5 to 3 ulps, which the sum rounds up to 3; alone, these seeds
    draw one of the last of them.
    """
    mine = np.log(np.linspace(2.9, 2.55, 1 << 17) * 2.0**-24 / 0.988).astype(np.float32)
    mine[0] = 0.0
    row = (SamplingParams(seed=seed), mine)
    company = (SamplingParams(top_k=5, top_p=0.5), mine)
    assert draw_among([row, company])[0] == draws(*row, 1)


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_a_draw_depends_on_how_many_were_drawn_before_not_on_the_sampler(params: SamplingParams):
    logits = random_logits(1, 400, seed=9)[0]
    whole = draws(params, logits, 80)  # more than are computed ahead
    for num_drawn in (1, 5, 31, 32, 33, 79):
        assert draws(params, logits, 80 - num_drawn, num_drawn) == whole[num_drawn:]


def test_two_seeds_that_share_half_their_bits_draw_differently():
    logits = np.zeros(1000, np.float32)
    seeds = (0, 1, 2**32, 2**63, 2**32 + 1, 2**64 - 1)
    answers = {tuple(draws(SamplingParams(seed=seed), logits, 8)) for seed in seeds}
    assert len(answers) == len(seeds)


# --- extreme logits ---------------------------------------------------------------------------


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_where_one_token_is_possible_it_is_drawn(params: SamplingParams):
    logits = np.full(200, -np.inf, np.float32)
    logits[123] = -3.0
    assert draws(params, logits, 20) == [123] * 20
    rows = [(params, logits), *((company, random_logits(1, 200)[0]) for company in SETTINGS)]
    assert draw_among(rows, 20)[0] == [123] * 20


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_an_impossible_token_is_never_drawn(params: SamplingParams):
    """As a grammar's mask leaves them: nearly all are -inf, fewer are possible than top_k."""
    logits = np.full((1, 200), -np.inf, np.float32)
    logits[0, [7, 50, 199]] = (1.0, 0.5, 0.8)
    assert set(draws(params, logits[0], 60)) <= {7, 50, 199}
    rows = [(params, logits[0]), *((company, random_logits(1, 200)[0]) for company in SETTINGS)]
    assert set(draw_among(rows, 60)[0]) <= {7, 50, 199}


@pytest.mark.parametrize("company", SETTINGS, ids=str)
@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_an_infinite_logit_wins(params: SamplingParams, company: SamplingParams):
    logits = random_logits(1, 200)[0]
    logits[123] = np.inf
    assert draws(params, logits, 3) == [123] * 3
    rows = [(params, logits), (company, random_logits(1, 200)[0])]
    assert draw_among(rows, 3)[0] == [123] * 3


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
def test_magnitudes_do_not_matter(params: SamplingParams, scale: float):
    logits = random_logits(1, 100, scale)[0]
    tokens = draws(params, logits, 10)
    assert all(0 <= token < 100 for token in tokens)
    if scale > 1:
        assert tokens == [int(logits.argmax())] * 10


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits_draw_as_their_values_in_float32(
    params: SamplingParams, dtype: mx.Dtype
):
    half = mx.array(random_logits(2, 700, seed=11)).astype(dtype)
    one, two = (sampler_of(700, SamplerRow(params), SamplerRow(PLAIN)) for _ in range(2))
    for _ in range(10):
        assert one(half)[0].tolist() == two(half.astype(mx.float32))[0].tolist()


def test_a_low_temperature_is_nearly_greedy():
    logits = random_logits(1, 100)[0]
    assert draws(SamplingParams(temperature=1e-5), logits, 20) == [int(logits.argmax())] * 20


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_a_vocabulary_of_one_leaves_no_choice(params: SamplingParams):
    assert draws(params, np.zeros(1, np.float32), 3) == [0, 0, 0]
    assert draw_among([(p, np.zeros(1, np.float32)) for p in (params, *SETTINGS)]) == [[0]] * 8


# --- penalties, biases and min_tokens ---------------------------------------------------------

EOS = frozenset({3, 11})


def adjusted(params: SamplingParams, logits: Logits, tokens: list[int], num_drawn: int) -> Logits:
    """The plain reference: what a row's scores are after its prompt and what it has drawn."""
    scores = logits.astype(np.float32).copy()
    window = params.repetition_context_size
    output = tokens[len(tokens) - num_drawn :]
    context, output = (part[-window:] if window else part for part in (tokens, output))
    for id in set(context):
        factor = np.float32(params.repetition_penalty)
        scores[id] = scores[id] / factor if scores[id] > 0 else scores[id] * factor
    for id in set(output):
        scores[id] -= np.float32(params.frequency_penalty) * output.count(id)
        scores[id] -= np.float32(params.presence_penalty)
    for id, bias in params.logit_bias:
        scores[id] += np.float32(bias)
    if num_drawn < params.min_tokens:
        scores[list(EOS)] = -np.inf
    return scores


@dataclass
class Row:
    """A row and what it has drawn, alone: the reference's side."""

    params: SamplingParams
    prompt: list[int]
    outputs: list[int] = field(default_factory=list)

    @property
    def draw(self) -> SamplerRow:
        tokens = tuple(self.prompt + self.outputs)
        return SamplerRow(self.params, tokens, len(self.outputs), EOS)

    def expected(self, logits: Logits) -> int:
        """The next token: the reference's best, or what a sampler draws from its scores."""
        tokens = self.prompt + self.outputs
        scores = adjusted(self.params, logits, tokens, len(self.outputs))
        if self.params.temperature == 0.0:
            return int(scores.argmax())
        plain = SamplingParams(self.params.temperature, seed=self.params.seed)
        return draws(plain, scores, 1, len(self.outputs))[0]


WINDOWS = (0, 1, 4, 7)
PENALTIES = tuple(
    SamplingParams(temperature, seed=window, repetition_context_size=window, **penalty)
    for temperature in (0.0, 0.9)
    for window in WINDOWS
    for penalty in (
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5, "frequency_penalty": 0.6},
        {"repetition_penalty": 0.8, "presence_penalty": -0.7, "frequency_penalty": 0.3},
    )
)


@pytest.mark.parametrize("seed", range(6))
def test_penalties_are_those_of_the_reference_while_rows_join_and_leave(seed: int):
    """Random companies of penalised and other rows, changed every few steps, some resumed."""
    chance = np.random.default_rng(seed)
    num_vocab = 23
    rows: list[Row] = []
    sampler = Sampler(num_vocab)
    for _ in range(12):
        keep = [i for i in range(len(rows)) if chance.random() < 0.6]
        joining = []
        for _ in range(chance.integers(0 if keep else 1, 4)):
            is_penalised = chance.random() < 0.6
            params = PENALTIES[chance.integers(len(PENALTIES))] if is_penalised else GREEDY
            prompt = chance.integers(0, num_vocab, chance.integers(1, 12)).tolist()
            outputs = chance.integers(0, num_vocab, chance.choice((0, 0, 2, 9))).tolist()
            joining.append(Row(params, prompt, outputs))
        sampler.regroup(keep, [row.draw for row in joining])
        rows = [rows[i] for i in keep] + joining
        for _ in range(chance.integers(1, 6)):
            logits = chance.normal(0, 1.5, (len(rows), num_vocab)).astype(np.float32)
            tokens = sampler(mx.array(logits))[0].tolist()
            assert tokens == [row.expected(own) for row, own in zip(rows, logits, strict=True)]
            for row, token in zip(rows, tokens, strict=True):
                row.outputs.append(token)


@pytest.mark.parametrize("window", WINDOWS)
def test_rows_that_leave_take_their_counts_with_them_and_none_is_penalised_for_another(window: int):
    penalised = SamplingParams(0.0, repetition_penalty=2.0, repetition_context_size=window)
    logits = mx.array(np.array([[3.0, 2.0, 1.0]] * 2, np.float32))
    sampler = sampler_of(3, SamplerRow(penalised, (0,)), SamplerRow(GREEDY, (0,)))
    assert sampler(logits)[0].tolist() == [1, 0]
    sampler.regroup([1], [])  # no row is penalised now
    assert sampler(logits[:1])[0].tolist() == [0]
    sampler.regroup([0], [SamplerRow(penalised, (0, 0))])
    assert sampler(logits)[0].tolist() == [0, 1]


def test_a_logit_bias_of_a_hundred_forces_and_forbids():
    logits = random_logits(1, 50)[0]
    best = int(logits.argmax())
    for base in (GREEDY, PLAIN, SamplingParams(top_k=5, top_p=0.9, seed=3)):
        forced = replace(base, logit_bias=((17, 100.0),))
        assert draws(forced, logits, 20) == [17] * 20
        forbidden = replace(base, logit_bias=((best, -100.0), (17, -100.0)))
        assert not {best, 17} & set(draws(forbidden, logits, 60))


@pytest.mark.parametrize("num_drawn", [0, 2, 5, 9])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_forbids_the_end_for_exactly_that_many_tokens(
    temperature: float, num_drawn: int
):
    params = SamplingParams(temperature, min_tokens=5)
    logits = np.zeros((1, 20), np.float32)
    logits[0, 11] = 50.0
    sampler = sampler_of(20, SamplerRow(params, (1, 2), num_drawn, EOS | {10**6}))
    tokens = [int(sampler(mx.array(logits))[0].item()) for _ in range(8)]
    held = max(0, 5 - num_drawn)
    assert 11 not in tokens[:held]
    assert 3 not in tokens[:held]
    assert tokens[held:] == [11] * (8 - held)


def test_min_tokens_of_one_row_affects_no_other_row():
    logits = np.zeros(20, np.float32)
    logits[11] = 50.0
    rows = [
        SamplerRow(GREEDY, eos_tokens=EOS),
        SamplerRow(SamplingParams(0.0, min_tokens=2), eos_tokens=EOS),
        SamplerRow(SamplingParams(0.0, min_tokens=2), eos_tokens=frozenset({4})),
    ]
    sampler = sampler_of(20, *rows)
    batch = mx.array(np.stack([logits] * 3))
    assert [sampler(batch)[0].tolist() for _ in range(3)] == [[11, 0, 11], [11, 0, 11], [11] * 3]


# --- xtc --------------------------------------------------------------------------------------


def hashed(x: np.uint64) -> np.uint64:
    """ "lowbias32" again, in 64-bit arithmetic."""
    mask = 0xFFFFFFFF
    y = int(x) & mask
    y = (y ^ (y >> 16)) * 0x7FEB352D & mask
    y = (y ^ (y >> 15)) * 0x846CA68B & mask
    return np.uint64(y ^ (y >> 16))


def coin(seed: int, num_drawn: int) -> float:
    """What xtc throws for one token, in (0, 1)."""
    low, high = split_seed(seed)
    position = hashed(np.uint64((high + num_drawn) & 0xFFFFFFFF))
    bits = hashed(position ^ np.uint64(low) ^ np.uint64(0x58544321))
    return (int(bits) >> 9) * 2.0**-23 + 2.0**-24


def without_best(scores: Logits, threshold: float) -> Logits:
    """The plain reference: of the tokens above the threshold only the least likely stays."""
    shares = softmax(scores.astype(np.float64))
    above = np.flatnonzero(shares > threshold)
    cut = scores.copy()
    if len(above) > 1:
        cut[above[shares[above] > shares[above].min()]] = -np.inf
    return cut


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_xtc_cuts_what_the_reference_cuts_given_the_same_coin(probability: float, threshold: float):
    params = SamplingParams(seed=77, xtc_probability=probability, xtc_threshold=threshold)
    logits = random_logits(1, 12, 1.2, seed=5)[0]
    expected = [
        draws(
            SamplingParams(seed=77),
            without_best(logits, threshold) if coin(77, i) < probability else logits,
            1,
            i,
        )[0]
        for i in range(60)
    ]
    assert draws(params, logits, 60) == expected


def test_xtc_is_applied_with_its_probability():
    throws = np.array([coin(seed, i) for seed in range(40) for i in range(50)])
    for probability in (0.1, 0.5, 0.9):
        assert abs((throws < probability).mean() - probability) < 0.05


# --- logprobs ---------------------------------------------------------------------------------


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    scores = logits.astype(np.float64)
    return scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())


@pytest.mark.parametrize("num_top", range(21))
def test_the_top_logprobs_are_sorted_and_those_of_the_logits(num_top: int):
    params = SamplingParams(0.7, seed=1, repetition_penalty=3.0, top_k=2, top_logprobs=num_top)
    logits = random_logits(1, 40, seed=num_top)
    sampler = sampler_of(40, SamplerRow(params, (1, 2, 3)))
    tokens, logprobs = sampler(mx.array(logits))
    assert logprobs is not None
    expected = log_softmax(logits[0])
    order = np.argsort(-expected)[:num_top]
    assert logprobs.rows == (0,)
    assert logprobs.top_ids.tolist() == [order.tolist()]
    np.testing.assert_allclose(logprobs.top.tolist(), [expected[order]], atol=1e-5)
    np.testing.assert_allclose(logprobs.drawn.tolist(), expected[tokens.tolist()], atol=1e-5)


def test_logprobs_are_reported_only_for_rows_that_request_them():
    asking = SamplingParams(0.0, top_logprobs=3)
    logits = random_logits(4, 30)
    sampler = sampler_of(
        30, *(SamplerRow(p) for p in (GREEDY, asking, PLAIN, replace(asking, seed=4)))
    )
    tokens, logprobs = sampler(mx.array(logits))
    assert logprobs is not None
    assert logprobs.rows == (1, 3)
    for place, row in enumerate((1, 3)):
        expected = log_softmax(logits[row])
        assert logprobs.top_ids[place, 0].item() == tokens[row].item() == logits[row].argmax()
        np.testing.assert_allclose(logprobs.drawn[place].item(), expected.max(), atol=1e-5)
    sampler.regroup([0, 2], [])
    assert sampler(mx.array(logits[[0, 2]]))[1] is None


def test_more_top_logprobs_than_the_vocabulary_has_are_all_of_it():
    sampler = sampler_of(5, SamplerRow(SamplingParams(0.0, top_logprobs=20)))
    logits = random_logits(1, 5)
    _, logprobs = sampler(mx.array(logits))
    assert logprobs is not None
    assert logprobs.top_ids.tolist() == [np.argsort(-logits[0]).tolist()]


def test_logprobs_of_half_precision_logits_are_taken_in_float32():
    logits = mx.array(random_logits(1, 300)).astype(mx.bfloat16)
    _, logprobs = sampler_of(300, SamplerRow(SamplingParams(0.0, top_logprobs=5)))(logits)
    assert logprobs is not None
    expected = np.sort(log_softmax(np.array(logits.astype(mx.float32))[0]))[::-1][:5]
    np.testing.assert_allclose(logprobs.top.tolist(), [expected], atol=1e-5)


# --- everything in mixed company --------------------------------------------------------------

OTHERS = (
    SamplingParams(0.8, seed=21, repetition_penalty=1.4),
    SamplingParams(0.0, presence_penalty=0.9, frequency_penalty=0.4, repetition_context_size=4),
    SamplingParams(0.8, seed=22, logit_bias=((5, 3.0), (6, -100.0))),
    SamplingParams(0.0, logit_bias=((5, 3.0),)),
    SamplingParams(1.0, seed=23, min_tokens=6),
    SamplingParams(0.0, min_tokens=3),
    SamplingParams(1.2, seed=24, xtc_probability=0.7, xtc_threshold=0.05),
    SamplingParams(0.9, seed=25, top_k=12, top_p=0.9, top_logprobs=4),
    SamplingParams(0.9, seed=26, typical_p=0.6),
    SamplingParams(1.4, seed=27, top_n_sigma=1.0, top_k=20),
    SamplingParams(1.0, seed=28, dynatemp_range=0.5, dynatemp_exponent=2.0, top_p=0.9),
    SamplingParams(1.0, seed=29, top_n_sigma=1.5, typical_p=0.8, xtc_probability=0.5, min_p=0.01),
    SamplingParams(1.0, seed=30, allowed_token_ids=tuple(range(5, 25))),
    SamplingParams(0.0, bad_words=((7,), (8, 9), (1, 2, 3))),
    SamplingParams(2.0, seed=31, bad_words=((5,), *((i, j) for i in range(9) for j in range(9)))),
    SamplingParams(1.0, top_p=0.0),
)


@pytest.mark.parametrize("params", SETTINGS + OTHERS, ids=str)
def test_every_setting_draws_the_same_in_a_batch_of_all_the_others(params: SamplingParams):
    logits = random_logits(16, 60, 2.0, seed=13)
    mine = SamplerRow(params, (1, 5, 5, 9), 1, EOS)
    alone = sampler_of(60, mine)
    expected = [alone(mx.array(logits[i : i + 1]))[0].item() for i in range(12)]
    company = [SamplerRow(p, (2, 5, 5), 2, EOS) for p in (*SETTINGS, *OTHERS)]
    together = sampler_of(60, *company)
    other = random_logits(1, 60)[0]
    for _ in range(3):  # the others have begun before, and half of them leave in the middle
        together(mx.array(np.stack([other] * len(company))))
    together.regroup(range(len(company)), [mine])
    tokens: list[int] = []
    for i in range(12):
        if i == 6:
            together.regroup([*range(0, len(company), 2), len(company)], [])
            company = company[::2]
        rows = np.stack([other] * len(company) + [logits[i]])
        tokens.append(together(mx.array(rows))[0].tolist()[-1])
    assert tokens == expected


GROUPS = (
    SamplingParams(
        0.8, top_k=5, xtc_probability=0.5, repetition_penalty=1.3, repetition_context_size=3
    ),
    SamplingParams(0.8, top_k=64, min_p=0.1, logit_bias=((3, 2.0), (7, -100.0))),
    SamplingParams(1.2, top_k=70, top_p=0.9, presence_penalty=0.5, min_tokens=5),
    SamplingParams(1.2, top_k=66, xtc_probability=0.5, xtc_threshold=0.02),
    SamplingParams(1.0, top_p=0.8, min_p=0.02, frequency_penalty=0.7, repetition_context_size=6),
    SamplingParams(0.9, min_p=0.05, xtc_probability=0.9, xtc_threshold=0.03, min_tokens=4),
    SamplingParams(1.0, top_k=1, repetition_penalty=1.5, top_logprobs=2),
    SamplingParams(1.2, top_n_sigma=1.2, typical_p=0.7, repetition_penalty=1.2),
    SamplingParams(1.0, dynatemp_range=0.8, top_k=70, bad_words=((1,), (2, 3), (4, 5, 6, 7))),
    SamplingParams(1.5, allowed_token_ids=(1, 2, 3, 5, 8, 13), bad_words=((1, 1), (2, 2, 2))),
    SamplingParams(0.0, bad_words=tuple((i, i) for i in range(20)), presence_penalty=0.3),
)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_every_row_of_a_changing_batch_draws_what_it_draws_alone(seed: int, is_tied: bool):
    """Random settings come and go, with random logits, of which many are tied in half the cases."""
    chance = np.random.default_rng(seed)
    settings = SETTINGS + OTHERS + GROUPS
    together = Sampler(90)
    alone: list[Sampler] = []
    for _ in range(9):
        keep = [i for i in range(len(alone)) if chance.random() < 0.7]
        joining = []
        for _ in range(chance.integers(0 if keep else 1, 5)):
            params = replace(
                settings[chance.integers(len(settings))], seed=int(chance.integers(99))
            )
            tokens = tuple(chance.integers(0, 90, chance.integers(1, 12)).tolist())
            joining.append(SamplerRow(params, tokens, int(chance.integers(len(tokens))), EOS))
        together.regroup(keep, joining)
        alone = [alone[i] for i in keep] + [sampler_of(90, draw) for draw in joining]
        for _ in range(chance.choice([1, 3, 40])):
            logits = chance.normal(0, 1.5, (len(alone), 90)).astype(np.float32)
            batch = mx.array(np.round(logits) if is_tied else logits)
            expected = [sampler(batch[i : i + 1])[0].item() for i, sampler in enumerate(alone)]
            assert together(batch)[0].tolist() == expected


def test_sampling_is_lazy():
    """Nothing is computed before its value is read: the logits stay without memory."""
    settings = SETTINGS + OTHERS + GROUPS
    sampler = sampler_of(5000, *(SamplerRow(params, (1, 2, 3), 1, EOS) for params in settings))
    logits = mx.random.normal((len(settings), 5000))
    before = mx.get_active_memory()
    tokens = [sampler(logits)[0] for _ in range(3)]
    assert mx.get_active_memory() - before < logits.nbytes / 4
    mx.eval(tokens)
    assert mx.get_active_memory() - before >= logits.nbytes
