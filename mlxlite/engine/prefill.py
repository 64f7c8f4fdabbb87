"""How the prompt tokens of a step are shared among the requests that prefill. Pure.

A prompt is computed in chunks. A chunk ends at the budget, where the prefix is stored, or before an
image that has not been encoded. An image is work of its own kind: the vision tower cannot be cut
into pieces, so while rows decode a step has one image or chunks, never both. Where attention inside
of images looks ahead, all tokens up to the last image are one chunk.

A chunk whose likelihoods are wanted has logits, so a step has few tokens of such chunks.

The shortest prompt goes first, but none is passed over more often than `MAX_DEFERRALS`. The last
chunk of a long prompt is a short one, because the decoding rows wait in its step for the copy of a
batch that is padded to its length.
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

from mlxlite.engine.chunk_budget import TILE
from mlxlite.engine.memory import MAX_SCORED
from mlxlite.engine.request_state import RequestState
from mlxlite.engine.step import Chunk, EncodeImage

# The shortest prompt goes first, but none is passed over in more steps than this.
MAX_DEFERRALS = 8


def prefill_order(states: Iterable[RequestState]) -> list[RequestState]:
    """Starved requests first, then the shortest remaining prompt, then arrival."""

    def turn(state: RequestState) -> tuple[bool, int, tuple[int, int]]:
        return state.num_deferred < MAX_DEFERRALS, state.num_to_prefill, state.key

    return sorted(states, key=turn)


def share(
    states: SequenceOf[RequestState],
    budget: int,
    *,
    has_rows: bool,
    max_scored: int = MAX_SCORED,
) -> tuple[list[EncodeImage], list[Chunk]]:
    """The images and chunks of the next step for `states`, in their order; counted as computed.

    `budget` is in tokens, of which a pass takes whole tiles: each chunk that goes on with a prompt,
    and all first chunks together. `max_scored` may be scored. `has_rows` if other requests decode
    in the step.
    """
    images: list[EncodeImage] = []
    chunks: list[Chunk] = []
    num_packed, tile = 0, TILE if budget >= TILE else 1
    most, most_last = budget, max(tile, budget // 4 // tile * tile) if has_rows else budget
    max_scored = num_left = min(budget, max_scored)
    for state in states:
        num_images, is_scored = len(images), state.is_scored
        while state.needs_encoding and not (has_rows and (images or chunks)):
            images.append(EncodeImage(state.id, state.num_encoded))
            state.num_encoded += 1
        if has_rows and images:
            budget = 0
        left, whole = (min(budget, num_left), max_scored) if is_scored else (budget, most)
        num_tokens = 0 if state.needs_encoding else state.num_ready(left)
        if num_tokens == state.num_to_prefill > most_last and state.is_long:
            num_tokens -= most_last
        elif num_tokens < state.num_to_prefill <= whole and state.is_new and chunks:
            num_tokens = 0  # one pass in the next step rather than one in this and one in that
        if num_tokens:
            is_packed = state.num_computed == state.start == 0 and not is_scored
            chunks.append(_launch(state, num_tokens, is_scored=is_scored))
            num_before, num_packed = num_packed, num_packed + num_tokens * is_packed
            cost = _tiles(num_packed, tile) - _tiles(num_before, tile)
            budget = max(0, budget - (cost if is_packed else _tiles(num_tokens, tile)))
            num_left -= num_tokens * is_scored
        if num_tokens or len(images) > num_images:
            state.num_deferred = 0
        elif state.num_to_prefill:
            state.num_deferred += 1
    return images, chunks


def _tiles(num_tokens: int, tile: int) -> int:
    return -(-num_tokens // tile) * tile


def _launch(state: RequestState, num_tokens: int, *, is_scored: bool) -> Chunk:
    start = state.num_computed
    state.num_computed += num_tokens
    return Chunk(state.id, start, state.num_computed, is_scored)
