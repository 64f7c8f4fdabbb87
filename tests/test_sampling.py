"""Sampling: the right distribution, the right truncation, and the same draw in any company."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlxlite.sampling import Draw, Sampler
from mlxlite.sequence import SamplingParams

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


def draws(params: SamplingParams, logits: Logits, num: int, num_drawn: int = 0) -> list[int]:
    """`num` tokens of one row alone, one after another."""
    sampler = Sampler([Draw(params, num_drawn)])
    row = mx.array(logits)[None]
    return [int(sampler(row).item()) for _ in range(num)]


def draw_among(rows: list[tuple[SamplingParams, Logits]], num: int = 1) -> list[list[int]]:
    """`num` tokens of each row, all rows in one batch."""
    sampler = Sampler([Draw(params, 0) for params, _ in rows])
    logits = mx.array(np.stack([row for _, row in rows]))
    return np.array([sampler(logits).tolist() for _ in range(num)]).T.tolist()


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


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_draws_of_one_seed_follow_the_softmax_along_the_positions(seed: int):
    logits = random_logits(1, 9, 1.0, seed=3)[0]
    tokens = np.array(draws(SamplingParams(seed=seed), logits, 1500))
    assert_fits(tokens, softmax(logits.astype(np.float64)))


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
        sampler = Sampler([Draw(SamplingParams(seed=first + i), 0) for i in range(4)])
        assert sampler(rows).tolist() == [77] * 4


def test_different_seeds_and_positions_are_uncorrelated():
    num_tokens, num_seeds, num_positions = 64, 256, 64
    logits = np.zeros(num_tokens, np.float32)
    rows = [(SamplingParams(seed=seed), logits) for seed in range(num_seeds)]
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


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(top_k=2), {1, 2, 3}),
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


def test_a_top_k_beyond_the_vocabulary_keeps_everything():
    logits = random_logits(1, 6, 0.5)
    for top_k in (6, 7, 64, 65, 2**31 - 1):
        assert drawn([SamplingParams(top_k=top_k)], logits, 10) == [set(range(6))]


# --- greedy -----------------------------------------------------------------------------------


def test_greedy_is_argmax_alone_and_in_any_company():
    logits = random_logits(7, 500)
    best = logits.argmax(axis=1).tolist()
    assert [draws(GREEDY, row, 1)[0] for row in logits] == best
    assert draw_among([(GREEDY, row) for row in logits], 1) == [[token] for token in best]
    for params in SETTINGS:
        rows = [(GREEDY, logits[0]), (params, logits[1]), (GREEDY, logits[2])]
        tokens = draw_among(rows, 3)
        assert tokens[0] == [best[0]] * 3
        assert tokens[2] == [best[2]] * 3


def test_a_greedy_tie_goes_to_the_lowest_id_alone_and_in_company():
    logits = np.array([0.0, 3.0, 1.0, 3.0, 3.0], np.float32)
    assert draws(GREEDY, logits, 1) == [1]
    for params in SETTINGS:
        assert draw_among([(params, logits), (GREEDY, logits)])[1] == [1]


# --- company ----------------------------------------------------------------------------------


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_a_row_draws_the_same_whatever_path_its_company_forces(params: SamplingParams):
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
def test_a_row_that_does_not_truncate_keeps_its_tail_in_company_that_does(seed: int):
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
    whole = draws(params, logits, 12)
    for num_drawn in (1, 5, 11):
        assert draws(params, logits, 12 - num_drawn, num_drawn) == whole[num_drawn:]


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
    one, two = (Sampler([Draw(params, 0), Draw(PLAIN, 0)]) for _ in range(2))
    for _ in range(10):
        assert one(half).tolist() == two(half.astype(mx.float32)).tolist()


def test_a_low_temperature_is_nearly_greedy():
    logits = random_logits(1, 100)[0]
    assert draws(SamplingParams(temperature=1e-5), logits, 20) == [int(logits.argmax())] * 20


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_a_vocabulary_of_one_leaves_no_choice(params: SamplingParams):
    assert draws(params, np.zeros(1, np.float32), 3) == [0, 0, 0]
    assert draw_among([(p, np.zeros(1, np.float32)) for p in (params, *SETTINGS)]) == [[0]] * 8
