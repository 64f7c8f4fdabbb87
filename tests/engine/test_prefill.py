"""Chunks and image encodings of a step; `FakeRunner` asserts the contract of steps."""

from fakes import FakeRunner, drive, make_sequence

from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import FinishReason
from mlxlite.engine.step import Add, Chunk, Command, EncodeImage, Finish

CANCELLED = FinishReason.CANCELLED


def steps_of(log: dict[int, list[Command]], **policy: int):
    return drive(Scheduler(Policy(**policy)), FakeRunner(), log).steps


def test_the_tokens_before_an_image_are_prefilled_before_it_is_encoded():
    steps = steps_of({0: [Add(make_sequence(1, 20, 1, images=[(5, 9)]))]})
    assert [(step.images, step.chunks) for step in steps if step.chunks] == [
        ((), (Chunk(1, 0, 5),)),
        ((EncodeImage(1, 0),), (Chunk(1, 5, 19),)),
    ]


def test_an_image_at_the_beginning_is_encoded_in_the_first_step():
    steps = steps_of({0: [Add(make_sequence(1, 20, 1, images=[(0, 9)]))]})
    assert steps[0].images == (EncodeImage(1, 0),)
    assert steps[0].chunks == (Chunk(1, 0, 19),)


def test_while_others_decode_a_step_has_one_image_or_chunks():
    log = {
        0: [Add(make_sequence(1, 3, 60))],
        5: [Add(make_sequence(id, 30, 1, images=[(1, 4), (4, 9), (20, 22)])) for id in (2, 3)],
    }
    steps = [step for step in steps_of(log) if 1 in step.rows and step.number > 5]
    assert sum(len(step.images) for step in steps) == 6
    for step in steps:
        assert len(step.images) + bool(step.chunks) <= 1


def test_no_decoding_row_misses_a_step_for_an_image():
    log = {
        0: [Add(make_sequence(1, 3, 40))],
        5: [Add(make_sequence(2, 30, 1, images=[(1, 4), (4, 9), (20, 22)]))],
    }
    steps = steps_of(log)
    assert all(1 in step.rows for step in steps[1:40])


def test_where_attention_looks_ahead_all_images_are_encoded_and_then_prefilled_in_one_chunk():
    images = [(3, 40), (50, 90)]
    log: dict[int, list[Command]] = {
        0: [Add(make_sequence(1, 3, 60))],
        5: [Add(make_sequence(2, 120, 1, images=images, is_unbroken=True))],
    }
    steps = steps_of(log, chunk_size=32, first_chunk_budget=8)
    work = [(s.images, s.chunks) for s in steps if s.number > 5 and (s.images or s.chunks)]
    assert work[:4] == [
        ((EncodeImage(2, 0),), ()),
        ((EncodeImage(2, 1),), ()),
        ((), (Chunk(2, 0, 90),)),
        ((), (Chunk(2, 90, 98),)),
    ]


def test_a_short_prompt_is_not_delayed_by_anothers_images():
    images = [(i, i + 2) for i in range(0, 40, 2)]
    log: dict[int, list[Command]] = {
        0: [Add(make_sequence(1, 3, 80))],
        5: [Add(make_sequence(2, 60, 1, images=images))],
        7: [Add(make_sequence(3, 4, 1))],
    }
    steps = steps_of(log)
    assert next(step.number for step in steps if 3 in step.rows) <= 9


def test_the_image_of_a_cancelled_request_is_never_encoded():
    log: dict[int, list[Command]] = {
        0: [Add(make_sequence(1, 40, 1, images=[(20, 30)]))],
        1: [Finish(1, CANCELLED)],
    }
    assert not any(step.images for step in steps_of(log, chunk_size=4))


def test_the_last_chunk_of_a_long_prompt_is_short_where_rows_wait_for_it_to_join():
    def chunks_of(num_prompt: int, *others: Add) -> list[int]:
        log: dict[int, list[Command]] = {
            0: list(others),
            5: [Add(make_sequence(2, num_prompt, 1))],
        }
        steps = steps_of(log, chunk_size=160, first_chunk_budget=160)
        return [c.stop - c.start for step in steps for c in step.chunks if c.id == 2]

    neighbour = Add(make_sequence(1, 3, 60))
    assert chunks_of(421, neighbour) == [160, 160, 68, 32], "which is a tile, the least"
    assert chunks_of(381, neighbour) == [160, 160, 28, 32]
    assert chunks_of(350, neighbour) == [160, 160, 29]
    assert chunks_of(161, neighbour) == [160], "a short one is not held up"
    assert chunks_of(421) == [160, 160, 100], "no row waits for this one"


def test_a_pass_takes_whole_tiles_of_the_budget():
    """First chunks are one pass together; what goes on with a prompt is a pass of its own."""
    shorts = [Add(make_sequence(id, 9, 1)) for id in range(2, 7)]
    log: dict[int, list[Command]] = {0: [Add(make_sequence(1, 3, 60))], 5: [*shorts]}
    steps = steps_of(log, chunk_size=64, first_chunk_budget=64)
    sizes = [[c.stop - c.start for c in step.chunks] for step in steps if len(step.chunks) > 1]
    assert sizes == [[8] * 5], "40 tokens are two tiles"
    log = {0: [Add(make_sequence(1, 3, 60))], 5: [Add(make_sequence(id, 101, 1)) for id in (2, 3)]}
    steps = steps_of(log, chunk_size=64, first_chunk_budget=64)
    num_tiles = [sum(-(-(c.stop - c.start) // 32) for c in step.chunks) for step in steps]
    assert max(num_tiles) == 2
