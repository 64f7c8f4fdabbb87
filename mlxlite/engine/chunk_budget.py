"""How many prompt tokens fit a step, from the measured times and memory of steps. Pure."""

from mlxlite.engine.step import SetChunkBudget, Step

TILE = 32  # rows of a matrix product's tile on a GPU: fewer tokens take as long as so many
MIN_IDLE = 256  # tokens: a prompt is computed in passes that are worth their weights
IDLE_S = 0.5  # for the prefill of a step while no sequence decodes: an arrival waits for two


def whole_tiles(num_tokens: float) -> int:
    """The most tokens, in whole tiles, at least one."""
    return max(TILE, int(num_tokens) // TILE * TILE)


class ChunkTuner:
    """Sizes the prefill of a step that also decodes, from the measured times of steps.

    The model of a step's time: the rows' decode, a pass for each chunk (or one for all first
    chunks, which are packed), and a time per prompt token. The decode is a moving average of steps
    that only decode, the pass the least of these, the time per token is fitted; `budget_s` over it
    is the number of tokens, in whole tiles; so is `IDLE_S` over it, for steps that only prefill.
    Without the pass, a small chunk would seem slow and the next one be smaller still.

    A step whose prefill exceeds the budget counts at once, because tokens cost more as the context
    grows; any other by its share of the tokens that the budget allows, because the time of the last
    few tokens of a prompt is mostly not theirs. The budget is reported only if it grows by an
    eighth or shrinks by a sixteenth, so that the command log stays short.
    """

    _WEIGHT = 0.3  # of the newest measurement: settles in about five steps
    _LEAST_WEIGHT = 0.01  # of one that is more than the least

    def __init__(self, budget_s: float) -> None:
        self._budget_s = budget_s
        self._decode_s = 0.0
        self._pass_s = 0.0
        self._token_s = 0.0
        self._num_reported = self._idle_reported = 0

    def measure(self, step: Step, device_s: float) -> SetChunkBudget | None:
        """Add one step's time; the new budgets, or None for no change."""
        if device_s <= 0.0 or step.images:  # an image's time is not a token's
            return None
        if not step.num_prefill_tokens:
            if step.rows:
                self._decode_s = self._average(self._decode_s, device_s)
                self._pass_s = self._average(self._pass_s, device_s, self._LEAST_WEIGHT)
            return None
        prefill_s = device_s - (self._decode_s if step.rows else 0.0)
        num_later = sum(chunk.start > 0 for chunk in step.chunks)
        num_passes = num_later + (num_later < len(step.chunks))
        token_s = max(prefill_s - num_passes * self._pass_s, device_s / 10)
        token_s /= step.num_prefill_tokens
        budget_s = max(self._budget_s - self._pass_s, self._budget_s / 2)
        if token_s * step.num_prefill_tokens > budget_s:
            self._token_s = max(token_s, self._average(self._token_s, token_s))
        else:
            share = min(1.0, step.num_prefill_tokens / max(1, self._num_reported))
            weight = share * self._WEIGHT
            self._token_s = self._average(self._token_s, token_s, weight, weight)
        num_tokens = whole_tiles(budget_s / self._token_s)
        idle_tokens = max(MIN_IDLE, whole_tiles(IDLE_S / self._token_s))
        if not self._is_change(num_tokens, self._num_reported) and not self._is_change(
            idle_tokens, self._idle_reported
        ):
            return None
        self._num_reported, self._idle_reported = num_tokens, idle_tokens
        return SetChunkBudget(num_tokens, idle_tokens)

    @staticmethod
    def _is_change(new: int, old: int) -> bool:
        return not (old * 15 < new * 16 and new * 8 < old * 9)

    def _average(
        self, old: float, new: float, more_weight: float = _WEIGHT, less_weight: float = _WEIGHT
    ) -> float:
        weight = more_weight if new > old else less_weight
        return new if old == 0.0 else old + weight * (new - old)


class ChunkLimit:
    """Sizes the prefill of any step by the memory of its intermediate results.

    A token that took more than the average counts at once, because it takes more as the context
    grows. `work_bytes` 0 is no limit.
    """

    FIRST = 256  # tokens, before anything is measured

    _WEIGHT = 0.3  # of a measurement that is less

    def __init__(self, work_bytes: int) -> None:
        self._work_bytes = work_bytes
        self._token_bytes = 0.0
        self._num_reported = self.FIRST

    def measure(self, token_bytes: float) -> int | None:
        """Add one step's memory of a token; the new limit in tokens, or None for no change."""
        if not self._work_bytes or token_bytes <= 0.0:
            return None
        more = token_bytes - self._token_bytes
        self._token_bytes += more if more > 0.0 else self._WEIGHT * more
        num_tokens = whole_tiles(self._work_bytes / self._token_bytes)
        if self._num_reported * 15 < num_tokens * 16 and num_tokens * 8 < self._num_reported * 9:
            return None
        self._num_reported = num_tokens
        return num_tokens
