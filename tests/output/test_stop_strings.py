"""Stop strings: the text before the first one is given out, in time, and nothing after it.

`test_detokenizer` holds the same against a reference, for any tokens and stop strings.
"""

import pytest

from mlxlite.output.stop_strings import StopStrings


def pushes(text: str, *strings: str) -> list[str]:
    """What each character's push gives, and then the flush."""
    stops = StopStrings(strings)
    return [*map(stops.push, text), stops.flush()]


def test_text_before_a_stop_string_is_given_and_nothing_after() -> None:
    assert pushes("ab!cd", "!") == ["a", "b", "", "", "", ""]


def test_a_stop_string_at_the_very_first_token_leaves_no_text() -> None:
    stops = StopStrings(("!",))
    assert stops.push("!") == ""
    assert stops.met == "!"
    assert stops.push("a") == ""
    assert stops.flush() == ""


def test_a_stop_string_inside_one_token_cuts_that_token() -> None:
    stops = StopStrings(("he",))
    assert stops.push("the") == "t"
    assert stops.met == "he"


def test_half_a_stop_string_is_held_until_it_is_none() -> None:
    assert pushes("xabay", "abab") == ["x", "", "", "", "abay", ""]


def test_only_the_longest_possible_beginning_is_held() -> None:
    assert pushes("ababac", "abac") == ["", "", "", "ab", "", "", ""]


def test_half_a_stop_string_at_the_end_is_text() -> None:
    assert pushes("xab", "abc") == ["x", "", "", "ab"]


def test_of_two_that_begin_together_the_one_complete_first_wins() -> None:
    for strings in (("ab", "abc"), ("abc", "ab")):
        stops = StopStrings(strings)
        assert [stops.push(char) for char in "xab"] == ["x", "", ""]
        assert stops.met == "ab"


def test_a_complete_stop_string_waits_for_one_begun_before_it() -> None:
    stops = StopStrings(("bc", "abcd"))
    assert [stops.push(char) for char in "abc"] == ["", "", ""]
    assert stops.met is None
    assert stops.push("d") == ""
    assert stops.met == "abcd"


def test_a_complete_stop_string_wins_when_the_one_before_it_fails() -> None:
    stops = StopStrings(("bc", "abcd"))
    assert [stops.push(char) for char in "abcx"] == ["", "", "", "a"]
    assert stops.met == "bc"


def test_a_stop_string_may_be_met_by_the_flush() -> None:
    stops = StopStrings(("bc", "abcd"))
    assert [stops.push(char) for char in "abc"] == ["", "", ""]
    assert stops.flush() == "a"
    assert stops.met == "bc"
    assert stops.flush() == ""


def test_a_stop_string_of_characters_may_lie_across_pieces() -> None:
    assert "".join(pushes("a你好b", "你好")) == "a"


def test_without_stop_strings_all_text_is_given_at_once() -> None:
    assert pushes("ab") == ["a", "b", ""]


def test_an_empty_stop_string_is_an_assertion_error() -> None:
    with pytest.raises(AssertionError):
        StopStrings(("",))


def test_a_long_stop_string_costs_a_bounded_number_of_looks_at_each_character() -> None:
    """The worst text for a naive search: the whole stop string but for its last character."""

    class Counted(str):
        num_compared = 0

        def __getitem__(self, index: object) -> str:
            Counted.num_compared += 1
            return super().__getitem__(index)  # type: ignore[index]

    stops = StopStrings((Counted("a" * 1000 + "b"),))
    before = Counted.num_compared
    for _ in range(20_000):
        stops.push("a")
    assert Counted.num_compared - before <= 3 * 20_000
