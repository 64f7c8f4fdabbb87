"""Cuts that look at the distribution, and tokens that are forbidden: held to plain numpy.

That a row's draw is the same in any company is in `test_sampler`, for these settings too.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.runner.sampler import Sampler, SamplerRow

Floats = npt.NDArray[np.float64]
NUM_VOCAB = 200


def logits_of(seed: int, num_vocab: int = NUM_VOCAB) -> npt.NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(num_vocab) * 2).astype(np.float32)


def softmax(scores: Floats) -> Floats:
    shares: Floats = np.exp(scores - scores.max())
    return shares / shares.sum()


def frequencies(params: SamplingParams, logits: npt.NDArray[np.float32], num: int) -> Floats:
    """Of each token, over `num` seeds, beside as many rows with other settings."""
    sampler = Sampler(len(logits))
    others = [SamplerRow(SamplingParams(1.0, top_p=0.5, seed=i)) for i in range(num)]
    rows = [SamplerRow(replace(params, seed=i)) for i in range(num)]
    sampler.regroup([], rows + others)
    tokens = np.array(sampler(mx.array(np.stack([logits] * 2 * num)))[0])[:num]
    return np.bincount(tokens, minlength=len(logits)) / num


def entropy(shares: Floats) -> float:
    return float(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("typical_p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_typical_p_keeps_what_surprises_as_much_as_expected(
    seed: int, typical_p: float, temperature: float
) -> None:
    """As llama.cpp: in the order of the distance, up to and with the token that crosses it."""
    logits = logits_of(seed, 40)
    shares = softmax(logits.astype(np.float64) / temperature)
    order = np.argsort(np.abs(-np.log(shares) - entropy(shares)))
    num_kept = int(np.searchsorted(np.cumsum(shares[order]), typical_p, side="right")) + 1
    expected = np.zeros(40)
    expected[order[:num_kept]] = shares[order[:num_kept]]
    expected /= expected.sum()
    found = frequencies(SamplingParams(temperature, typical_p=typical_p), logits, 2000)
    assert set(np.flatnonzero(found)) <= set(order[:num_kept])
    np.testing.assert_allclose(found, expected, atol=0.05)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("temperature", [0.8, 3.0])
def test_top_n_sigma_cuts_by_the_scores_whatever_the_temperature(
    sigma: float, temperature: float
) -> None:
    logits = logits_of(7)
    is_kept = logits >= logits.max() - sigma * logits.std()
    found = frequencies(SamplingParams(temperature, top_n_sigma=sigma), logits, 3000)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(is_kept))
    expected = np.where(is_kept, softmax(logits.astype(np.float64) / temperature), 0)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.05)


def test_top_n_sigma_does_not_count_impossible_tokens() -> None:
    logits = logits_of(7)
    half = np.where(np.arange(NUM_VOCAB) % 2, logits, -np.inf).astype(np.float32)
    possible = logits[1::2]
    is_kept = half >= possible.max() - possible.std()
    found = frequencies(SamplingParams(5.0, top_n_sigma=1.0), half, 2000)
    assert set(np.flatnonzero(found)) == set(np.flatnonzero(is_kept))


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 3.0])
def test_a_dynamic_temperature_rises_with_the_entropy(scale: float, exponent: float) -> None:
    logits = logits_of(3, 30) * np.float32(scale)
    share = entropy(np.maximum(softmax(logits.astype(np.float64)), 1e-300)) / np.log(30)
    temperature = max(0.4 + (1.6 - 0.4) * share**exponent, 1e-3)
    expected = softmax(logits.astype(np.float64) / temperature)
    params = SamplingParams(1.0, dynatemp_range=0.6, dynatemp_exponent=exponent)
    np.testing.assert_allclose(frequencies(params, logits, 3000), expected, atol=0.05)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1.0, top_p=0.0),
        SamplingParams(1.0, typical_p=0.0),
        SamplingParams(0.0, dynatemp_range=0.5, typical_p=0.5, top_n_sigma=0.1),
        SamplingParams(1.0, top_n_sigma=1e-9),
        SamplingParams(0.5, dynatemp_range=0.5, dynatemp_exponent=100.0),
    ],
)
def test_where_a_setting_leaves_one_token_it_is_drawn(params: SamplingParams) -> None:
    found = frequencies(params, logits_of(5) * np.float32(3), 200)
    assert (found > 0).sum() == 1


@pytest.mark.parametrize("is_half", [False, True])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_only_allowed_tokens_are_drawn_in_this_row_alone(is_half: bool, penalty: float) -> None:
    allowed = (3, 50, 199)
    rows = [
        SamplerRow(SamplingParams(2.0, seed=1, allowed_token_ids=allowed)),
        SamplerRow(SamplingParams(2.0, seed=1, repetition_penalty=penalty)),
        SamplerRow(SamplingParams(0.0, allowed_token_ids=(7,), logit_bias=((7, -100.0),))),
    ]
    sampler = Sampler(NUM_VOCAB)
    sampler.regroup([], rows)
    logits = mx.array(np.stack([logits_of(2)] * 3)).astype(mx.bfloat16 if is_half else mx.float32)
    tokens = np.array([sampler(logits)[0].tolist() for _ in range(200)])
    assert set(tokens[:, 0]) <= set(allowed)
    assert len(set(tokens[:, 0])) > 1
    assert len(set(tokens[:, 1])) > 20
    assert set(tokens[:, 2]) == {7}


def follows(word: tuple[int, ...], output: list[int]) -> bool:
    return len(word) == 1 or tuple(output[-len(word) + 1 :]) == word[:-1]


@pytest.mark.parametrize("seed", range(6))
def test_bad_words_are_those_of_the_reference_while_rows_join_and_leave(seed: int) -> None:
    """The best token that would not complete a bad word, over outputs of a few common tokens."""
    chance = np.random.default_rng(seed)
    num_vocab = 6
    rows: list[SamplerRow] = []
    outputs: list[list[int]] = []
    sampler = Sampler(num_vocab)
    for _ in range(40):
        keep = [i for i in range(len(rows)) if chance.random() > 0.1]
        joining: list[SamplerRow] = []
        rows, outputs = [rows[i] for i in keep], [outputs[i] for i in keep]
        while len(rows) < 5 and chance.random() < 0.6:
            words = tuple(
                tuple(int(t) for t in chance.integers(0, num_vocab, chance.integers(1, 4)))
                for _ in range(int(chance.integers(0, 6)))
            )
            words = tuple(w for w in words if len(w) > 1 or w[0] < 3)  # something can be drawn
            num_drawn = int(chance.integers(0, 3))
            tokens = tuple(int(t) for t in chance.integers(0, num_vocab, 5))
            row = SamplerRow(SamplingParams(0.0, bad_words=words), tokens, num_drawn)
            joining.append(row)
            rows.append(row)
            outputs.append(list(tokens[len(tokens) - num_drawn :]))
        sampler.regroup(keep, joining)
        if not rows:
            continue
        for _ in range(int(chance.integers(1, 4))):
            logits = chance.standard_normal((len(rows), num_vocab)).astype(np.float32)
            drawn = sampler(mx.array(logits))[0].tolist()
            for row, output, scores, token in zip(rows, outputs, logits, drawn, strict=True):
                for word in row.params.bad_words:
                    if follows(word, output):
                        scores[word[-1]] = -np.inf
                if scores.max() > -np.inf:
                    assert token == int(scores.argmax())
                output.append(token)


def test_the_end_of_the_prompt_is_no_beginning_of_a_bad_word() -> None:
    words = ((4, 5),)
    for num_drawn, expected in ((0, 5), (1, 6)):
        sampler = Sampler(8)
        row = SamplerRow(SamplingParams(0.0, bad_words=words), (1, 4), num_drawn)
        sampler.regroup([], [row])
        assert sampler(mx.array([[0.0, 0, 0, 0, 0, 9, 8, 0]]))[0].tolist() == [expected]
