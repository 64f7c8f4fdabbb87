"""Bytes that rows, windows and states hold, by their length in tokens. Pure arithmetic."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

MAX_SCORED = 256  # places whose logits are in memory together; a larger pass is hardly faster
_MIN_SCORED = 16


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory that sequences hold, by length. Sizes in bytes.

    A row of n tokens holds `row_bytes` and, for each of `layers` (bytes per token, most tokens kept
    or None), the bytes of its tokens and, as mlx-lm's caches grow by blocks, of up to `block` more.
    `budget_bytes` is the limit for all sequences, without weights and reserve; None is no limit.
    `work_bytes` is the reserve, for the intermediate results of a step; 0 is no limit.
    `logit_bytes` are what a step's logits of one place take while likelihoods are computed.
    """

    budget_bytes: int | None = None
    row_bytes: int = 0
    layers: tuple[tuple[int, int | None], ...] = ()
    block: int = 256
    work_bytes: int = 0
    logit_bytes: int = 0

    @property
    def has_state(self) -> bool:
        """Whether some layer keeps a window or a state, which cannot be cut to a shorter prefix."""
        return self.row_bytes > 0 or any(most is not None for _, most in self.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in the layers that keep all tokens."""
        return sum(token_bytes for token_bytes, most in self.layers if most is None)

    @property
    def max_scored(self) -> int:
        """Prompt tokens of one step whose logits are computed: half the reserve of two steps."""
        if not (self.work_bytes and self.logit_bytes):
            return MAX_SCORED
        return max(_MIN_SCORED, min(MAX_SCORED, self.work_bytes // 4 // self.logit_bytes))

    def state_bytes(self, num_tokens: int) -> int:
        """Bytes of the windows and states after `num_tokens` tokens."""
        windows = [(size, most) for size, most in self.layers if most is not None]
        return self.row_bytes + sum(size * min(num_tokens, most) for size, most in windows)

    def row(self, num_tokens: int) -> int:
        """The most bytes that one row of `num_tokens` tokens holds."""
        size = num_tokens + self.block
        held = (token_bytes * min(size, most or size) for token_bytes, most in self.layers)
        return self.row_bytes + sum(held)

    def batch(self, lengths: Iterable[int]) -> int:
        """Bytes of rows that decode together: all are padded to the longest."""
        sizes = list(lengths)
        return len(sizes) * self.row(max(sizes)) if sizes else 0

    def max_tokens(self, wanted: int) -> int:
        """The longest sequence that fits alone: at most `wanted`, 0 if none does."""
        if self.budget_bytes is None:
            return wanted
        return max(0, bisect_right(range(wanted + 1), self.budget_bytes, key=self.row) - 1)


# Of what sequences may hold, for the prefix cache by default: it yields to them.
PREFIX_SHARE = 0.9
_DEFAULT_PREFIX_BYTES = 1 << 30  # where there is no limit to have a share of


def prefix_bytes(memory: Memory, wanted: int | None) -> int:
    """The prefix cache's limit in bytes, within the budget; a share of it if `wanted` is None."""
    budget = memory.budget_bytes
    if wanted is None:
        return _DEFAULT_PREFIX_BYTES if budget is None else int(budget * PREFIX_SHARE)
    return wanted if budget is None else min(wanted, budget)
