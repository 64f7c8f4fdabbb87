"""Text to tokens and back, their bytes, and what a tokenizer marks in an answer."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import IM_END, NUM_TOKENS, loaded, save_checkpoint
from tokenizers import Tokenizer

from mlxlite import wanted
from mlxlite.config.options import Config
from mlxlite.models import tokenizer
from mlxlite.models.interface import FillMarks, PromptTooLong
from mlxlite.models.load import LoadedModel, load
from mlxlite.models.tokenizer import Tokenizer as OwnTokenizer
from mlxlite.models.tokenizer import fill_marks_of
from mlxlite.output.bare_calls import BareFormat
from mlxlite.output.call_syntax import JSON_TOOLS
from mlxlite.output.constraint import CallConstraint, ConstraintError
from mlxlite.output.detokenizer import Detokenizer
from mlxlite.output.markers import PARSE_ERRORS, MarkerFormat

# --- text to tokens ---------------------------------------------------------------------------


class Counted:
    """A tokenizer's wrapper that counts the characters of each text."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self.sizes: list[int] = []

    def encode(self, text: str, **options: Any) -> Any:
        self.sizes.append(len(text))
        return self._wrapper.encode(text, **options)


@pytest.fixture
def small(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> OwnTokenizer:
    """A tokenizer for texts of 1,000 tokens, which counts them in pieces of 500 characters."""
    monkeypatch.setattr(tokenizer, "_PIECE_CHARS", 500)
    made = OwnTokenizer(model.tokenizer.wrapper, 1000)
    made.wrapper = Counted(made.wrapper)
    return made


@pytest.mark.parametrize("text", ["a ", "7", "\n", "模", "🙂", "!?", "Hello, "])
def test_a_text_that_cannot_fit_is_never_tokenized_whole(small: OwnTokenizer, text: str) -> None:
    with pytest.raises(PromptTooLong) as caught:
        small.encode(text * 5000, add_special=False)
    assert caught.value.num_tokens > 1000
    assert max(small.wrapper.sizes, default=0) <= 500
    assert sum(small.wrapper.sizes) < 12_000, "it stops once the context is exceeded"


@pytest.mark.parametrize("text", ["a ", "7", "\n", "模", "🙂", "Hello, "])
def test_a_long_text_that_fits_has_the_same_tokens(small: OwnTokenizer, text: str) -> None:
    own = small.wrapper._wrapper
    whole = tuple(own.encode(text, add_special_tokens=False))
    many = text * (990 // len(whole))
    expected = tuple(own.encode(many, add_special_tokens=False))
    assert small.encode(many, add_special=False) == expected


@pytest.mark.parametrize("num_pieces", [1, 3, 6])
def test_no_further_piece_is_tokenized_once_the_client_has_left(
    small: OwnTokenizer, num_pieces: int
) -> None:
    small.max_tokens = 3900

    def is_wanted() -> bool:
        return len(small.wrapper.sizes) < num_pieces

    with pytest.raises(wanted.Dropped):
        wanted.call_while(is_wanted, lambda: small.encode(" " * 4000, add_special=False))
    assert small.wrapper.sizes == [500] * num_pieces


def test_a_text_of_too_many_characters_is_refused_by_its_length(small: OwnTokenizer) -> None:
    with pytest.raises(PromptTooLong):
        small.encode("a" * 10_000_000, add_special=False)
    assert small.wrapper.sizes == []


# --- tokens to text ---------------------------------------------------------------------------

TEXTS = ["Hello, how are you?", " a  b ", "äöüß 日本語 🙂🙃", "it 's , fine .", "\n\n\tx\n", "▁ ☃"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_its_tokens(model: LoadedModel, text: str) -> None:
    assert model.detokenize(model.tokenizer.wrapper.encode(text, add_special_tokens=False)) == text


def test_special_tokens_and_unknown_ids_have_no_text(model: LoadedModel) -> None:
    tokens = model.tokenizer.wrapper.encode("Hello", add_special_tokens=False)
    assert model.detokenize([IM_END, *tokens, IM_END, NUM_TOKENS + 1000]) == "Hello"
    assert model.detokenize([]) == ""


def test_any_sequence_of_ids_can_be_decoded(model: LoadedModel) -> None:
    assert model.detokenize((5, 6)) == model.detokenize([5, 6])


def save_metaspace_tokenizer(path: Path) -> None:
    """A tokenizer that decodes as Llama 2's does: "▁" for a space, bytes for what it lacks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    words = ["▁Hello", "▁there", "▁", "Hello", ",", "!", "▁a", "b", "."]
    vocab = {word: id for id, word in enumerate(["<unk>", *(f"<0x{b:02X}>" for b in range(256))])}
    vocab |= {word: len(vocab) + number for number, word in enumerate(words)}
    merges = [("▁", "Hello"), ("▁", "there"), ("▁", "a")]
    pieces = {piece for pair in merges for piece in pair} - set(vocab)
    vocab |= {piece: len(vocab) + number for number, piece in enumerate(sorted(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.save(str(path / "tokenizer.json"))


def test_a_sentencepiece_tokenizer_streams_with_the_right_spaces(copy: Path) -> None:
    save_metaspace_tokenizer(copy)
    model = loaded(copy)
    ids = model.tokenizer.wrapper.convert_tokens_to_ids

    def streamed(tokens: list[str], prompt: list[str]) -> str:
        stream = Detokenizer(model.detokenize, ids(prompt))
        return "".join([*(stream.push(id) for id in ids(tokens)), stream.flush()])

    tokens = ["▁Hello", ",", "▁there", "!", "▁", "▁a", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "b"]
    assert streamed(tokens, []) == "Hello, there!  a🙂b"  # a text begins without its space
    assert streamed(tokens, ["▁a", "."]) == " Hello, there!  a🙂b"  # within one it stays
    assert streamed(["▁there", "<|im_end|>", "▁a"], ["▁Hello"]) == " there a"


def save_with_odd_pieces(path: Path) -> None:
    """Byte-level pieces that are empty, or hold characters which stand for no byte."""
    settings = json.loads((path / "tokenizer.json").read_text())
    odd = ("", "\u2603", "\ufffd", "\ud7ff", "\U0001f600\u0120")
    for piece in odd:
        settings["model"]["vocab"][piece] = len(settings["model"]["vocab"])
    settings["added_tokens"] = [
        token | {"id": token["id"] + len(odd)} for token in settings["added_tokens"]
    ]
    (path / "tokenizer.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("save", [None, save_metaspace_tokenizer, save_with_odd_pieces])
def test_any_ids_stream_as_text_and_as_they_are_decoded_at_once(copy: Path, save: Any) -> None:
    """Bytes that are no UTF-8, empty pieces, special tokens, ids beyond the tokenizer.

    Only a tokenizer with a token for each byte takes back what it decoded: one invalid byte makes
    the whole run of bytes around it invalid.
    """
    if save is not None:
        save(copy)
    model, rng = loaded(copy), random.Random(1)
    odd = [
        id
        for id in range(NUM_TOKENS)
        if model.token_bytes(id)[:1] >= b"\x80" or not model.token_bytes(id)
    ]
    for _ in range(200):
        ids = rng.choices(odd, k=6) + rng.choices(range(NUM_TOKENS + 9), k=14)
        rng.shuffle(ids)
        stream = Detokenizer(model.detokenize, [])
        text = "".join([*(stream.push(id) for id in ids), stream.flush()])
        assert text.encode().decode() == text
        assert text == model.detokenize(ids) or save is save_metaspace_tokenizer
        assert all(isinstance(model.token_bytes(id), bytes) for id in ids)


# --- tokens to bytes --------------------------------------------------------------------------


def bytes_of(model: LoadedModel, text: str) -> list[bytes]:
    return [
        model.token_bytes(id)
        for id in model.tokenizer.wrapper.encode(text, add_special_tokens=False)
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_texts_tokens_are_the_texts(model: LoadedModel, text: str) -> None:
    assert b"".join(bytes_of(model, text)).decode() == text


def test_a_token_may_be_half_a_character(model: LoadedModel) -> None:
    pieces = bytes_of(model, "\U0001f9ff")  # not in the corpus: it has no token of its own
    assert len(pieces) > 1
    assert b"".join(pieces) == "\U0001f9ff".encode()


def test_every_byte_is_some_token(model: LoadedModel) -> None:
    assert {bytes([byte]) for byte in range(256)} <= set(map(model.token_bytes, range(NUM_TOKENS)))


def test_a_special_token_is_its_name_and_an_id_beyond_the_tokenizer_nothing(
    model: LoadedModel,
) -> None:
    assert model.token_bytes(IM_END) == b"<|im_end|>"
    assert model.num_vocab == NUM_TOKENS
    assert model.token_bytes(NUM_TOKENS) == b""
    assert model.token_bytes(2**31 - 1) == b""


def test_an_output_layer_may_be_wider_than_the_tokenizer(tmp_path: Path) -> None:
    wide = loaded(save_checkpoint(tmp_path / "wide", vocab_size=NUM_TOKENS + 61))
    assert wide.num_vocab == NUM_TOKENS + 61
    assert wide.token_bytes(NUM_TOKENS + 60) == b""


def test_an_added_token_that_is_not_special_is_its_text(copy: Path) -> None:
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_tokens(["日本 x"])
    tokenizer.save(str(copy / "tokenizer.json"))
    assert loaded(copy).token_bytes(NUM_TOKENS) == "日本 x".encode()


def test_a_piece_that_is_not_written_in_the_byte_alphabet_is_its_text(copy: Path) -> None:
    """A byte-level decoder lets such a piece through as it is."""
    settings = json.loads((copy / "tokenizer.json").read_text())
    id = len(settings["model"]["vocab"])
    settings["model"]["vocab"]["a ☃"] = id
    settings["added_tokens"] = [
        token | {"id": token["id"] + 1} for token in settings["added_tokens"]
    ]
    (copy / "tokenizer.json").write_text(json.dumps(settings))
    model = loaded(copy)
    assert model.detokenize([id]) == "a ☃"
    assert model.token_bytes(id) == "a ☃".encode()


def test_sentencepiece_tokens_are_words_with_their_spaces_and_single_bytes(copy: Path) -> None:
    save_metaspace_tokenizer(copy)
    model = loaded(copy)

    def said(*pieces: str) -> list[bytes]:
        return list(
            map(model.token_bytes, model.tokenizer.wrapper.convert_tokens_to_ids(list(pieces)))
        )

    assert said("▁Hello", "▁", "b", ".") == [b" Hello", b" ", b"b", b"."]
    assert b"".join(said("<0xF0>", "<0x9F>", "<0x99>", "<0x82>")).decode() == "🙂"
    assert said("<0x00>", "<0xFF>", "<|im_end|>") == [b"\0", b"\xff", b"<|im_end|>"]


def test_many_added_tokens_do_not_make_a_token_slow(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma adds 6,000; transformers makes a dict of them at each access."""
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<unused{number}>" for number in range(6000)])
    tokenizer.save(str(copy / "tokenizer.json"))
    model = loaded(copy)
    own = type(model.tokenizer.wrapper.get_chat_template.__self__)
    looked = property(lambda _: pytest.fail("they are looked at once, when the model is loaded"))
    monkeypatch.setattr(own, "added_tokens_decoder", looked)
    assert model.token_bytes(5)
    assert model.detokenize([5])


# --- marks in an answer -----------------------------------------------------------------------


def test_the_marks_around_reasoning_are_part_of_the_text(thinker: Path, model: LoadedModel) -> None:
    """They are special tokens, which are left out of a text otherwise."""
    assert model.output_format == MarkerFormat()
    assert model.tokenizer.shown == {}
    thinking = loaded(thinker)
    assert thinking.output_format == MarkerFormat("<think>", "</think>")
    assert thinking.tokenizer.shown == {NUM_TOKENS: "<think>", NUM_TOKENS + 1: "</think>"}
    words = thinking.encode("a b", add_special=False)
    end = min(thinking.eos_tokens)
    assert thinking.detokenize([NUM_TOKENS, *words, NUM_TOKENS + 1, *words, end]) == (
        "<think>a b</think>a b"
    )


def test_a_budget_or_calls_without_markers_in_the_model_are_refused(
    model: LoadedModel, thinker: Path
) -> None:
    with pytest.raises(ConstraintError, match="no marks around its reasoning"):
        model.compile(None, is_thinking=False, budget=5)
    assert loaded(thinker).compile(None, is_thinking=False, budget=5).matcher().error is None
    calls = CallConstraint(())
    with pytest.raises(ConstraintError, match="tool calls cannot be enforced"):
        model.compile(calls, is_thinking=False)


def test_a_model_of_mlx_lms_calls_reads_them() -> None:
    _, demo = load(Config())
    markers = MarkerFormat("<think>", "</think>", "<tool_call>", "</tool_call>", True, JSON_TOOLS)
    assert demo.output_format == BareFormat(markers, JSON_TOOLS)
    one = '{"name": "f", "arguments": {"a": 1}}'
    assert demo.parse_calls(one, []) == [("f", {"a": 1})]
    assert demo.parse_calls('{"name": "f", "arguments": "{\\"a\\": 1}"}', []) == [("f", {"a": 1})]
    for broken in ("", "{", '{"arguments": {}}', '{"name": "f", "arguments": [1]}'):
        with pytest.raises(PARSE_ERRORS):
            demo.parse_calls(broken, [])


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("<|fim_prefix|> <|fim_suffix|> <|fim_middle|>", FillMarks(0, 1, 2)),
        ("<fim_prefix> <fim_suffix> <fim_middle> <fim_pad>", FillMarks(0, 1, 2, frozenset({3}))),
        (
            "<|fim_suffix|> <|fim_prefix|> <|fim_middle|> <|file_sep|> <|repo_name|>",
            FillMarks(1, 0, 2, frozenset({3, 4}), 3, 4),
        ),
        ("\u2581<PRE> \u2581<MID> \u2581<SUF>", FillMarks(0, 2, 1)),
        ("<|fim_prefix|> <|fim_middle|> <fim_suffix>", None),
        ("a b c", None),
    ],
)
def test_the_marks_of_a_middle_are_found_by_their_names(
    names: str, expected: FillMarks | None
) -> None:
    assert fill_marks_of({name: i for i, name in enumerate(names.split())}) == expected
