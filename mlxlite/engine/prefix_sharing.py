"""How requests share prefixes: what a request stores, waits for and skips. Pure.

Decides when the scheduler's requests use the prefix cache; what the cache keeps is its own
decision. Never holds back a request for a prefix that nothing computes or fetches any more.
"""

from collections.abc import Iterable, Mapping

from mlxlite.engine.request_state import RequestState
from mlxlite.engine.step import Admission
from mlxlite.prefix_cache.hashing import Blocks, checkpoint_positions, num_common
from mlxlite.prefix_cache.index import PrefixCache
from mlxlite.prefix_cache.operations import Hit

# A prompt waits for another one's prefill when it so saves at least this many tokens.
MIN_SHARED = 64


class PrefixSharing:
    """Stores and looks up the prefixes of requests in `cache`.

    `can_store`: prefixes are stored at all. `can_wait`: a request may wait for one.
    """

    def __init__(self, cache: PrefixCache, *, can_store: bool, can_wait: bool) -> None:
        self._cache = cache
        self._can_store = can_store
        self._can_wait = can_wait

    def store(self, state: RequestState) -> None:
        """Keep what a running request has computed, for later ones with the same prefix."""
        if state.is_running and self._can_store and (blocks := state.blocks()) is not None:
            self._cache.insert(state.id, blocks, state.num_computed)

    def admission(self, state: RequestState) -> Admission:
        """Look up the cached prefix of an admitted request; call after preemption is final."""
        hit, blocks, least = Hit(), state.blocks(), state.sequence.prompt.min_first_chunk
        if blocks is not None:
            limit = state.num_tokens - 1
            if state.is_scored:  # a place whose likelihoods are wanted must be computed
                limit = min(limit, state.num_scored)
            hit = self._cache.enter(blocks, limit, least)
        state.resume(hit.num_tokens)
        if blocks is not None and self._cache.has_checkpoints:
            positions = checkpoint_positions(blocks, state.num_tokens)
            state.stops |= {position for position in positions if position >= least}
        return Admission(state.sequence, tuple(state.outputs), hit)

    def must_wait(self, state: RequestState, prefilling: Mapping[int, RequestState]) -> bool:
        """Whether another request is computing this prompt's prefix, or it is read from disk."""
        blocks = state.sequence.prompt.blocks
        if blocks is None or not self._can_wait or state.is_scored:
            return False
        if state.waits_for is not None:
            id, num_tokens = state.waits_for
            if id in prefilling and prefilling[id].num_computed < num_tokens:
                return True
            state.waits_for = None
        hit = self._cache.match(blocks, state.num_tokens - 1)
        if hit.num_tokens < state.sequence.prompt.min_first_chunk:
            hit = Hit()  # the rest of its first chunk could not be computed alone
        if hit.missing and self._cache.fetch(hit.missing):
            return True
        return self._joins(state, blocks, hit.num_tokens + MIN_SHARED, prefilling.values())

    def _joins(
        self, state: RequestState, blocks: Blocks, least: int, others: Iterable[RequestState]
    ) -> bool:
        """Wait for the first of `others` that will compute at least `least` common tokens."""
        for other in others:
            common = _num_sharable(state, blocks, other)
            if common > other.num_computed and common >= least:
                other.stops.add(common)
                state.waits_for = other.id, common
                return True
        return False


def _num_sharable(state: RequestState, blocks: Blocks, other: RequestState) -> int:
    """Tokens of whole blocks that `other` prefills and both can go on from; 0 if there are none."""
    own, others = state.sequence.prompt, other.sequence.prompt
    if others.blocks is None:
        return 0
    most = (min(state.num_tokens, other.num_tokens) - 1) // blocks.size * blocks.size
    common = min(num_common(blocks, others.blocks), most)
    return common if common >= max(own.min_first_chunk, others.min_first_chunk) else 0
