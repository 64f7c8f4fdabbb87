"""Tokens to text: whatever the tokens, the text is that of all of them, cut at the stop string.

Four tokenizers read the same properties: two fakes (bytes; sentencepiece's words) and two real
small ones built here with the tokenizers library (byte-level BPE; BPE with byte fallback).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from mlxlite.output.detokenizer import MAX_UNREAD, NUM_KEPT, Detokenize, Detokenizer
from mlxlite.output.stop_strings import StopStrings

bounded = settings(derandomize=True, max_examples=200, deadline=None, database=None)

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # three emoji joined by ZWJ
TEXTS = (
    "plain words, and  two spaces\n\tand a tab",
    f"family {FAMILY} flag \U0001f1e9\U0001f1ea tone \U0001f44d\U0001f3fd.",
    "e\u0301 o\u0308 \u0915\u094d\u0937 \u0e01\u0e33",  # combining marks
    "你好、世界。日本語のテキスト",
    "naïve — “quoted” … \u00a0\u3000x",
    "a genuine \ufffd replacement \ufffd\ufffd",
)


# --- tokenizers -------------------------------------------------------------------------------


def bytes_to_text(tokens: Sequence[int]) -> str:
    """Ids 0 to 255 are bytes, 256 and above are special tokens."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


WORDS = ("▁", "▁the", "▁a", "b", "▁▁", "c", ".", "你", "\ufffd", "▁of\n", "", "<s>", "</s>")


def words_to_text(tokens: Sequence[int]) -> str:
    """sentencepiece: "▁" is a space, one at the start of the text is stripped."""
    pieces = (WORDS[token] for token in tokens if not WORDS[token].startswith("<"))
    return "".join(pieces).replace("▁", " ").removeprefix(" ")


def words_to_stripped_text(tokens: Sequence[int]) -> str:
    """The same of a decoder that strips all the spaces at the start."""
    pieces = (WORDS[token] for token in tokens if not WORDS[token].startswith("<"))
    return "".join(pieces).replace("▁", " ").lstrip(" ")


def build_byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def build_byte_fallback() -> Tokenizer:
    """As in Llama 2: words with "▁", and a token for each byte for what is no word."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnop."]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    return tokenizer


BYTE_BPE = build_byte_bpe()
BYTE_FALLBACK = build_byte_fallback()


def byte_bpe_to_text(tokens: Sequence[int]) -> str:
    return str(BYTE_BPE.decode(list(tokens), skip_special_tokens=True))


def byte_fallback_to_text(tokens: Sequence[int]) -> str:
    return str(BYTE_FALLBACK.decode(list(tokens), skip_special_tokens=True))


# --- the reference, and ways to run it --------------------------------------------------


def cut(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """What begins first wins; of those that begin there, the shortest."""
    found = [(text.find(string), len(string), string) for string in stop if string in text]
    if not found:
        return text, None
    start, _, string = min(found)
    return text[:start], string


def all_at_once(
    detokenize: Detokenize,
    tokens: Sequence[int],
    stop: Sequence[str] = (),
    prompt_tail: Sequence[int] = (),
) -> tuple[str, str | None]:
    num_prompt = len(detokenize(prompt_tail))
    return cut(detokenize([*prompt_tail, *tokens])[num_prompt:], stop)


def streamed(
    detokenize: Detokenize,
    tokens: Sequence[int],
    stop: Sequence[str] = (),
    prompt_tail: Sequence[int] = (),
) -> tuple[str, str | None]:
    pieces, met = run(detokenize, tokens, stop, prompt_tail)
    return "".join(pieces), met


def pushes(detokenize: Detokenize, tokens: Sequence[int], *stop: str) -> list[str]:
    """What each push gives, and then the flush."""
    return run(detokenize, tokens, stop)[0]


def run(
    detokenize: Detokenize,
    tokens: Sequence[int],
    stop: Sequence[str] = (),
    prompt_tail: Sequence[int] = (),
) -> tuple[list[str], str | None]:
    """The text of each push and of the flush, as a generation passes it on; the string met."""
    detokenizer, stops = Detokenizer(detokenize, prompt_tail), StopStrings(tuple(stop))
    pieces = [stops.push(detokenizer.push(token)) for token in tokens]
    pieces.append(stops.push(detokenizer.flush()) + stops.flush())
    return pieces, stops.met


@dataclass
class Recorder:
    """A detokenizer that notes how many tokens it was asked for in each push."""

    detokenize: Detokenize
    sizes: list[int] = field(default_factory=list)

    def __call__(self, tokens: Sequence[int]) -> str:
        self.sizes.append(len(tokens))
        return self.detokenize(tokens)


# --- properties -------------------------------------------------------------------------------

# Bytes that are near to characters: cut ones, overlong ones, surrogates, lone continuations.
NEAR_TEXT = st.one_of(
    st.sampled_from(TEXTS).map(lambda text: list(text.encode())),
    st.sampled_from([*FAMILY, "你", "é", "a", "b", "ab", " ", "\ufffd"]).map(
        lambda text: list(text.encode())
    ),
    st.sampled_from([[0xC0, 0xAF], [0xED, 0xA0, 0x80], [0xF4, 0x90], [0xE4, 0xBD], [0xFF], [0x80]]),
    st.integers(0, 300).map(lambda token: [token]),
)
BYTES = st.lists(NEAR_TEXT, max_size=30).map(
    lambda parts: [byte for part in parts for byte in part]
)
SHORT_STOPS = st.lists(st.text("ab ", min_size=1, max_size=4), max_size=4)
STOPS = st.one_of(
    SHORT_STOPS,
    st.lists(
        st.sampled_from(["世", "\u200d", FAMILY, "\ufffd", ", ", "and ", "e\u0301"]), max_size=3
    ),
)
WORD_TOKENS = st.lists(st.integers(0, len(WORDS) - 1), max_size=60)
SPACES = st.lists(st.sampled_from([0, 0, 0, 4, 3, 1, 11]), max_size=120)
WORD_STOPS = st.lists(
    st.sampled_from([" ", "  ", "the", " the a", "a the", "b", "bc", "cb", ".", "\n", "你"]),
    max_size=4,
)


@given(BYTES, STOPS)
@bounded
def test_bytes_stream_to_the_text_of_all_of_them(tokens: list[int], stop: list[str]) -> None:
    assert streamed(bytes_to_text, tokens, stop) == all_at_once(bytes_to_text, tokens, stop)


@given(st.lists(st.sampled_from([97, 98, 32, 256]), max_size=60), SHORT_STOPS)
@bounded
def test_overlapping_stop_strings_give_what_begins_first(
    tokens: list[int], stop: list[str]
) -> None:
    assert streamed(bytes_to_text, tokens, stop) == all_at_once(bytes_to_text, tokens, stop)


@given(st.lists(st.sampled_from([0x80, 0xFF, 0xE4, 0xBD, 0xF0]), max_size=150), BYTES)
@bounded
def test_a_long_run_of_invalid_bytes_loses_nothing(run: list[int], tokens: list[int]) -> None:
    assert streamed(bytes_to_text, run + tokens) == all_at_once(bytes_to_text, run + tokens)


@pytest.mark.parametrize("detokenize", [words_to_text, words_to_stripped_text])
@given(
    tokens=st.one_of(WORD_TOKENS, SPACES),
    stop=WORD_STOPS,
    prompt_tail=st.one_of(st.just([]), WORD_TOKENS),
)
@bounded
def test_words_keep_their_spaces(
    detokenize: Detokenize, tokens: list[int], stop: list[str], prompt_tail: list[int]
) -> None:
    if not detokenize(prompt_tail[-NUM_KEPT:]).strip(" "):
        prompt_tail = []  # a prompt that shows nothing is as none
    expected = all_at_once(detokenize, tokens, stop, prompt_tail)
    assert streamed(detokenize, tokens, stop, prompt_tail) == expected


@given(st.lists(st.integers(0, BYTE_BPE.get_vocab_size() - 1), max_size=80), STOPS)
@bounded
def test_a_real_byte_level_bpe_streams_to_its_own_text(tokens: list[int], stop: list[str]) -> None:
    assert streamed(byte_bpe_to_text, tokens, stop) == all_at_once(byte_bpe_to_text, tokens, stop)


@given(st.text("abp. \n你é\u3000\U0001f44d", max_size=40), SHORT_STOPS)
@bounded
def test_byte_fallback_streams_any_text(text: str, stop: list[str]) -> None:
    tokens = BYTE_FALLBACK.encode(text).ids
    expected = all_at_once(byte_fallback_to_text, tokens, stop)
    assert streamed(byte_fallback_to_text, tokens, stop) == expected


@given(st.text("ab 你\U0001f44d", min_size=1, max_size=30), st.text("ab 你", max_size=20))
@bounded
def test_byte_fallback_streams_after_a_prompt_of_any_length(prompt: str, text: str) -> None:
    tail = BYTE_FALLBACK.encode(prompt).ids
    tokens = BYTE_FALLBACK.encode(text).ids
    expected = all_at_once(byte_fallback_to_text, tokens, (), tail)
    if byte_fallback_to_text(tail[-NUM_KEPT:]).strip(" "):
        assert streamed(byte_fallback_to_text, tokens, (), tail) == expected


@given(st.lists(st.integers(1, 270), max_size=120))
@bounded
def test_byte_fallback_of_any_tokens_loses_no_word(tokens: list[int]) -> None:
    # An invalid byte spoils its whole run when decoded at once, but a stream has shown the
    # run's beginning already: only the text outside of runs can be compared.
    text, _ = streamed(byte_fallback_to_text, tokens)
    words = [chr(ord("a") + token - 258) for token in tokens if 258 <= token < 274]
    runs = [chr(token - 1) for token in tokens if token <= 128]
    letters = "abcdefghijklmnop"
    kept = [char for char in text if char in letters]
    assert len(words) <= len(kept) <= len(words) + len([c for c in runs if c in letters])


@given(BYTES, STOPS)
@bounded
def test_nothing_is_given_out_that_is_taken_back(tokens: list[int], stop: list[str]) -> None:
    """Each push extends a beginning of the final text: no half characters, no half stops."""
    text, _ = all_at_once(bytes_to_text, tokens, stop)
    so_far = ""
    for piece in pushes(bytes_to_text, tokens, *stop):
        so_far += piece
        assert text.startswith(so_far)


@given(BYTES, STOPS, st.integers(1, 5))
@bounded
def test_the_answer_does_not_depend_on_the_split_into_tokens(
    tokens: list[int], stop: list[str], size: int
) -> None:
    """The same bytes, `size` of them to a token."""
    chunks = [tokens[start : start + size] for start in range(0, len(tokens), size)]

    def detokenize(tokens: Sequence[int]) -> str:
        return bytes_to_text([byte for number in tokens for byte in chunks[number]])

    expected = streamed(bytes_to_text, tokens, stop)
    assert streamed(detokenize, range(len(chunks)), stop) == expected


# --- characters -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_each_character_is_emitted_with_its_last_byte(text: str) -> None:
    if "\ufffd" in text:
        return  # has a wait of its own, below
    for char, given_by in zip(text, pushes_by_char(text), strict=True):
        assert given_by == [*[""] * (len(char.encode()) - 1), char]


def pushes_by_char(text: str) -> list[list[str]]:
    detokenizer = Detokenizer(bytes_to_text)
    return [[detokenizer.push(byte) for byte in char.encode()] for char in text]


def test_byte_fallback_gives_each_character_with_its_last_byte() -> None:
    tokens = BYTE_FALLBACK.encode("ab你\U0001f44d").ids
    given = pushes(byte_fallback_to_text, tokens)
    assert [piece for piece in given if piece] == ["a", "b", "你", "\U0001f44d"]
    assert given[-1] == ""


def test_an_invalid_byte_is_emitted_before_the_text_that_follows() -> None:
    assert pushes(bytes_to_text, b"a\xffb") == ["a", "", "\ufffdb", ""]


def test_an_invalid_byte_after_a_byte_fallback_character_is_one_replacement() -> None:
    # The tokens of 你, then 0xFF, then "a"; decoded at once they are four replacements and "a".
    given = pushes(byte_fallback_to_text, [1 + 0xE4, 1 + 0xBD, 1 + 0xA0, 1 + 0xFF, 258])
    assert given == ["", "", "你", "", "\ufffda", ""]


def test_a_prompt_whose_tail_begins_inside_a_character_spoils_no_byte_fallback_run() -> None:
    byte_tokens = [1 + byte for byte in "你".encode()]
    for num_before in range(NUM_KEPT):
        prompt = [258] * num_before + byte_tokens * NUM_KEPT
        assert streamed(byte_fallback_to_text, byte_tokens, (), prompt) == ("你", None)


def test_a_byte_fallback_run_recovers_from_an_invalid_byte_and_repeats_nothing() -> None:
    """Decoded at once the run is replacements to its end; the window is cut after 33 of them."""
    tokens = [1 + 0xFF, *(1 + byte for byte in ("\U0001f44d" * 10).encode())]
    expected = "\ufffd" * (MAX_UNREAD + 1) + "\U0001f44d" * 2
    assert streamed(byte_fallback_to_text, tokens) == (expected, None)


def test_half_a_character_at_the_end_is_emitted_by_the_flush() -> None:
    assert pushes(bytes_to_text, b"a\xe4\xbd") == ["a", "", "", "\ufffd"]


def test_a_genuine_replacement_character_waits_for_what_follows() -> None:
    assert pushes(bytes_to_text, "\ufffd".encode()) == ["", "", "", "\ufffd"]
    assert pushes(bytes_to_text, "\ufffdx".encode()) == ["", "", "", "\ufffdx", ""]


def test_endless_invalid_bytes_are_emitted_after_a_bounded_wait() -> None:
    detokenizer = Detokenizer(bytes_to_text)
    num_given = 0
    for num_pushed in range(1, 500):
        num_given += len(detokenizer.push(0xFF))
        assert num_pushed - num_given <= 3


def test_tokens_that_never_end_with_a_character_are_emitted_too() -> None:
    """Each token is the end of one character and the beginning of the next."""
    data = ("你" * 300).encode()

    def detokenize(tokens: Sequence[int]) -> str:
        return b"".join(data[1 + 3 * i : 4 + 3 * i] for i in tokens).decode(errors="replace")

    expected = detokenize(range(299))
    given = pushes(detokenize, range(299))
    assert "".join(given) == expected
    assert max(map(len, given[2:])) <= 3
    assert min(map(len, given[2:-1])) == 1


# --- spaces -----------------------------------------------------------------------------------


def test_the_first_word_has_a_space_after_a_prompt_and_none_without() -> None:
    the = WORDS.index("▁the")
    assert Detokenizer(words_to_text).push(the) == "the"
    assert Detokenizer(words_to_text, [the]).push(the) == " the"


def test_words_keep_their_space_after_special_tokens() -> None:
    the, special = WORDS.index("▁the"), WORDS.index("</s>")
    assert pushes(words_to_text, [the, special, special, the]) == ["the", "", "", " the", ""]


def test_a_space_before_special_tokens_is_not_forgotten() -> None:
    space, the, special = (WORDS.index(word) for word in ("▁", "▁the", "<s>"))
    tokens = [special, space, *[special] * 100, the]
    assert "".join(pushes(words_to_text, tokens)) == " the"


# --- stop strings over bytes --------------------------------------------------------------------


def test_a_stop_string_of_characters_may_lie_across_the_bytes_of_tokens() -> None:
    assert streamed(bytes_to_text, "a你好b".encode(), ("你好",)) == ("a", "你好")


def test_a_replacement_character_can_be_a_stop_string() -> None:
    assert streamed(bytes_to_text, b"a\xffb", ("\ufffd",)) == ("a", "\ufffd")


# --- bounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("detokenize", "tokens"),
    [
        (bytes_to_text, list(b"some ordinary text " * 100)),
        (bytes_to_text, [0xFF] * 2000),
        (bytes_to_text, [97] + [256] * 2000),
        (bytes_to_text, [256] * 2000),
        (bytes_to_text, [0xE4, *[256] * 2000, 0xBD]),
        (words_to_text, [WORDS.index("▁")] * 2000),
        (words_to_stripped_text, [WORDS.index("▁the")] + [WORDS.index("▁")] * 2000),
        (words_to_text, [WORDS.index("")] * 2000),
        (words_to_text, [WORDS.index("\ufffd")] * 2000),
        (byte_fallback_to_text, [0x100] * 2000),
        (byte_fallback_to_text, [1 + byte for byte in "你".encode()] * 600),
    ],
)
def test_a_push_decodes_a_bounded_number_of_tokens(
    detokenize: Detokenize, tokens: list[int]
) -> None:
    recorder = Recorder(detokenize)
    detokenizer = Detokenizer(recorder, [0] * 5000)
    for token in tokens:
        recorder.sizes.clear()
        detokenizer.push(token)
        assert max(recorder.sizes) <= 2 * MAX_UNREAD + 2
        assert len(recorder.sizes) <= 5


def test_ordinary_text_is_decoded_a_few_tokens_at_a_time() -> None:
    recorder = Recorder(bytes_to_text)
    detokenizer = Detokenizer(recorder)
    for byte in b"ordinary text":
        detokenizer.push(byte)
    assert max(recorder.sizes) == 3  # a word, the space before it and the word before that
