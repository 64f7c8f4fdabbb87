"""Stored responses: found until deleted or dropped, within bounds."""

from hypothesis import given
from hypothesis import strategies as st

from mlxlite.api.conversation import Message, Role, ToolCall
from mlxlite.api.stored_responses import MAX_CONVERSATIONS, StoredResponses
from mlxlite.vision.images import Source


def turn(text: str) -> tuple[Message, ...]:
    return (Message(Role.USER, text),)


def test_a_conversation_is_found_until_it_is_deleted() -> None:
    kept = StoredResponses()
    assert kept.load("resp_1") is kept.body("resp_1") is None
    kept.store("resp_1", turn("hello"), b"{}")
    assert kept.load("resp_1") == turn("hello")
    assert kept.body("resp_1") == b"{}"
    assert kept.delete("resp_1")
    assert not kept.delete("resp_1")
    assert (len(kept), kept.num_bytes) == (0, 0)


def test_the_oldest_conversations_are_dropped_when_there_are_too_many() -> None:
    kept = StoredResponses(max_entries=2)
    for i in range(3):
        kept.store(f"resp_{i}", turn("x"))
    assert [kept.load(f"resp_{i}") for i in range(3)] == [None, turn("x"), turn("x")]
    assert kept.num_bytes == 2


def test_conversations_are_kept_up_to_the_bounds() -> None:
    kept = StoredResponses()
    for i in range(MAX_CONVERSATIONS + 1):
        kept.store(f"resp_{i}", ())
    assert len(kept) == 1024
    kept.store("resp_x", turn("x" * (64 * 2**20)))
    kept.store("resp_y", turn("x" * (64 * 2**20 + 1)))
    assert kept.load("resp_x") is not None
    kept.store("resp_z", turn("x"))
    assert (len(kept), kept.num_bytes) == (1, 1)


def test_the_oldest_conversations_are_dropped_when_they_are_too_large() -> None:
    kept = StoredResponses(max_bytes=10)
    kept.store("resp_0", turn("éé"), b"1234")
    kept.store("resp_1", turn("1"))
    assert (len(kept), kept.num_bytes) == (2, 9)
    kept.store("resp_2", turn("123"))
    assert kept.load("resp_0") is None
    assert kept.num_bytes == 4
    kept.store("resp_3", turn("x" * 11))
    assert kept.load("resp_3") is None
    assert len(kept) == 2  # it did not cost the others their place


def test_a_conversation_that_is_put_again_is_counted_once() -> None:
    kept = StoredResponses()
    kept.store("resp_0", turn("12345"))
    kept.store("resp_0", turn("123"))
    assert (len(kept), kept.num_bytes) == (1, 3)


def test_all_text_of_a_conversation_counts() -> None:
    call = ToolCall("12", "345", {"a": ["bc", {"d": 1}], "e": "f"})
    message = Message(Role.ASSISTANT, "xy", reasoning="z", tool_calls=(call,))
    kept = StoredResponses()
    kept.store("resp_0", (message, Message(Role.TOOL, "r", name="n", tool_call_id="id")))
    assert kept.num_bytes == 5 + 6 + 3 + 4


def test_the_pictures_of_a_conversation_count_and_are_bounded() -> None:
    shown = Message(Role.USER, "", parts=(Source(bytes(100), None, "p"),))
    kept = StoredResponses(max_bytes=250)
    for i in range(3):
        kept.store(f"resp_{i}", (shown,))
    assert (len(kept), kept.num_bytes) == (2, 202)
    kept.store("resp_3", (shown,) * 3)
    assert kept.load("resp_3") is None
    assert len(kept) == 2


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.text(max_size=8), st.booleans())))
def test_the_bounds_hold_whatever_is_put_and_deleted(
    calls: list[tuple[str, str, bool]],
) -> None:
    kept, held = StoredResponses(max_entries=3, max_bytes=24), dict[str, str]()
    for id, text, is_deletion in calls:
        if is_deletion:
            assert kept.delete(id) == (held.pop(id, None) is not None)
        else:
            kept.store(id, turn(text))
            held.pop(id, None)
            if len(text.encode()) <= 24:
                held[id] = text
            while len(held) > 3 or sum(len(text.encode()) for text in held.values()) > 24:
                held.pop(next(iter(held)))
        assert {id: kept.load(id) for id in "abcdef"} == {
            id: turn(held[id]) if id in held else None for id in "abcdef"
        }
        assert kept.num_bytes == sum(len(text.encode()) for text in held.values())
