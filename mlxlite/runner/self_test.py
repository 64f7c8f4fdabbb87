"""Whether a model computes rows together as it computes each alone: a few passes at the start.

What a cache's kind allows, a model may still get wrong: some ignore the lengths of rows that are
prefilled in one pass, some count padding as positions. Two rows of unlike length are packed and
merged, and their next logits compared with those of each alone. What differs, or raises, is not
used for this model.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx

from mlxlite.errors import FOREIGN, summary_of
from mlxlite.runner.kv_cache import Cache
from mlxlite.runner.row_batch import merge

log = logging.getLogger("mlxlite.runner")
_LENGTHS: Final = (5, 29)  # of the rows' prompts
# Most difference of logits, of their standard deviation: 16 bits round differently in a batch.
_TOLERANCES: Final = {mx.float32: 1e-2, mx.float16: 0.05, mx.bfloat16: 0.05}


@dataclass(frozen=True, slots=True)
class Abilities:
    """What rows may do together: be prefilled in one pass, decode in one."""

    can_pack: bool = True
    can_merge: bool = True


def abilities_of(
    model: Callable[..., Any], new_cache: Callable[[], Cache], num_vocab: int, claimed: Abilities
) -> Abilities:
    """What of the claimed abilities holds. Raises what the model raises for a row alone."""
    prompts = [[(7 + 13 * i * (n + 1)) % num_vocab for i in range(n)] for n in _LENGTHS]
    caches = [_prefilled(model, new_cache(), prompt) for prompt in prompts]
    others = [_prefilled(model, new_cache(), prompt) for prompt in prompts]
    wanted = mx.concatenate([_next(model, cache, 1) for cache in caches])
    can_merge = claimed.can_merge and _holds(
        "decode together", wanted, lambda: _next(model, merge(others), len(prompts))
    )

    def packed() -> mx.array:
        rows = _packed(model, [new_cache() for _ in prompts], prompts)
        return mx.concatenate([_next(model, cache, 1) for cache in rows])

    can_pack = claimed.can_pack and _holds("prefill together", wanted, packed)
    return Abilities(can_pack, can_merge)


def _holds(what: str, wanted: mx.array, compute: Callable[[], mx.array]) -> bool:
    try:
        found = compute()
        spread = mx.std(wanted.astype(mx.float32), axis=-1, keepdims=True)
        off = mx.abs(found.astype(mx.float32) - wanted.astype(mx.float32)) / spread
        most: Any = mx.max(off).item()
    except FOREIGN as error:
        log.warning("this model's rows cannot %s: %s", what, summary_of(error))
        return False
    is_right: bool = most <= _TOLERANCES.get(wanted.dtype, 0.05)
    if not is_right:
        log.warning("this model's rows cannot %s: logits are off by %.2f std", what, most)
    return is_right


def _prefilled(model: Callable[..., Any], cache: Cache, prompt: list[int]) -> Cache:
    model(mx.array([prompt]), cache=cache)
    return cache


def _next(model: Callable[..., Any], cache: Cache, num_rows: int) -> mx.array:
    """The logits `[B, V]` of one more token for each row."""
    logits: mx.array = model(mx.array([[3]] * num_rows), cache=cache)
    return logits[:, -1]


def _packed(
    model: Callable[..., Any], caches: list[Cache], prompts: list[list[int]]
) -> list[Cache]:
    """The caches of prompts that are prefilled in one pass, padded on the right."""
    longest, merged = max(map(len, prompts)), merge(caches)
    lengths = [len(prompt) for prompt in prompts]
    padding = [longest - length for length in lengths]
    for layer in merged:
        layer.prepare(lengths=lengths, right_padding=padding)
    tokens = [prompt + [0] * pad for prompt, pad in zip(prompts, padding, strict=True)]
    model(mx.array(tokens), cache=merged)
    for layer in merged:
        layer.finalize()
    return [[layer.extract(i) for layer in merged] for i in range(len(prompts))]
