"""A checkpoint's tokenizer: text to token ids, token ids to text and to bytes, and its formats.

Wraps mlx-lm's tokenizer. Lookups that are slow there (added tokens, the decoder) happen once, at
load. Immutable after that, so that any thread may use it. It must never tokenize a text that cannot
fit the context: that takes 170 bytes of memory for each character of 60 MiB of "a a a".
"""

import json
import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from mlxlite import wanted
from mlxlite.models.interface import FillMarks, PromptError, PromptTooLong
from mlxlite.models.tool_probe import CallParser, call_form, own_parser, templates_of
from mlxlite.output.call_syntax import syntax_of
from mlxlite.output.formats import OutputFormat, format_of
from mlxlite.output.grammar import Grammars
from mlxlite.output.markers import MarkerFormat

_PIECE_CHARS = 64 << 10  # tokenized at a time where tokens are only counted
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # sentencepiece's byte fallback


class Tokenizer:
    """Text and token ids of one checkpoint. Safe to use from any thread.

    `wrapper` is mlx-lm's TokenizerWrapper, `own` transformers' tokenizer in it. `shown` are the
    special tokens that are part of the text, because markers consist of them. Texts of more than
    `max_tokens` are refused. `source` is the operator's chat template, None for the checkpoint's;
    `parser` reads calls where mlx-lm has found none for the tokenizer.
    """

    def __init__(
        self,
        wrapper: Any,
        max_tokens: int,
        source: str | None = None,
        parser: CallParser | None = None,
    ) -> None:
        self.wrapper = wrapper
        self.max_tokens = max_tokens
        self.own = wrapper.get_chat_template.__self__
        self.eos_tokens: frozenset[int] = frozenset(wrapper.eos_token_ids)
        self.added_tokens: frozenset[int] = frozenset(wrapper.added_tokens_decoder)
        self.call_parser = own_parser(wrapper) or parser
        self.output_format = _output_format(wrapper, source, self.call_parser)
        self.shown = _shown(wrapper, self.output_format)
        self._decode = self._decoder(skip_special_tokens=True)
        self._decode_all = self._decoder(skip_special_tokens=False)
        backend = getattr(wrapper, "backend_tokenizer", None)
        # Of the vocabulary; transformers' method builds a dict of all added tokens at each call.
        self._piece = wrapper.convert_ids_to_tokens if backend is None else backend.id_to_token
        vocab = wrapper.get_vocab()
        self._longest = max(map(len, vocab), default=1)  # characters of one token
        self.max_chars = self._longest * (max_tokens + 1)  # of any text that is not refused
        self.fill_marks = fill_marks_of(vocab)
        is_byte_level = "ByteLevel" in str(getattr(backend, "decoder", ""))
        self._byte_alphabet = _byte_alphabet() if is_byte_level else None

    def _decoder(self, *, skip_special_tokens: bool) -> Callable[[list[int]], str]:
        """Token ids to text; by the Rust decoder directly if transformers adds nothing to it."""
        is_plain = isinstance(self.own, PreTrainedTokenizerFast) and all(
            getattr(type(self.own), name) is getattr(PreTrainedTokenizerFast, name)
            for name in ("decode", "_decode")
        )
        if is_plain:
            decode = partial(self.own.backend_tokenizer.decode)
        else:
            decode = partial(self.wrapper.decode, clean_up_tokenization_spaces=False)
        return partial(decode, skip_special_tokens=skip_special_tokens)

    def encode(self, text: str, *, add_special: bool) -> tuple[int, ...]:
        """A text's token ids. Raises PromptError, PromptTooLong, Dropped."""
        self.check_length(len(text))
        try:
            if len(text) > max(self.max_tokens, _PIECE_CHARS):
                self._check_pieces(text)
            return tuple(self.wrapper.encode(text, add_special_tokens=add_special))
        except (TypeError, UnicodeError) as error:
            raise PromptError("the text holds half a character (a lone surrogate)") from error

    def check_length(self, num_chars: int) -> None:
        """Raises PromptTooLong for a text whose length alone shows that it does not fit."""
        if (least := num_chars // self._longest) > self.max_tokens:
            raise PromptTooLong(least)

    def _check_pieces(self, text: str) -> None:
        """Count tokens piece by piece, which holds the memory of one. A cut may add some."""
        num_tokens, most = 0, self.max_tokens
        for start in range(0, len(text), _PIECE_CHARS):
            wanted.check()
            piece = text[start : start + _PIECE_CHARS]
            num_tokens += len(self.wrapper.encode(piece, add_special_tokens=False))
            most += self._longest
            if num_tokens > most:
                raise PromptTooLong(num_tokens)

    def detokenize(self, tokens: SequenceOf[int]) -> str:
        """The text of token ids, without special tokens except those in `shown`."""
        if not self.shown or self.shown.keys().isdisjoint(tokens):
            return self._decode(list(tokens))
        pieces: list[str] = []
        plain: list[int] = []
        for token in tokens:
            if token in self.shown:
                pieces += [self._decode(plain), self.shown[token]]
                plain = []
            else:
                plain.append(token)
        return "".join((*pieces, self._decode(plain)))

    def detokenize_all(self, tokens: SequenceOf[int]) -> str:
        """The text of token ids, with the names of special tokens."""
        return self._decode_all(list(tokens))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which need not be whole characters; its name if it is special."""
        piece = self._piece(token)
        if piece is None:
            return b""  # the output layer may be wider than the vocabulary
        if token in self.added_tokens:
            return str(piece).encode()
        if self._byte_alphabet is not None:
            if not all(char in self._byte_alphabet for char in piece):
                return str(piece).encode()  # a byte-level decoder keeps such a piece as it is
            return bytes(self._byte_alphabet[char] for char in piece)
        if _BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()

    def parse_calls(
        self, text: str, tools: SequenceOf[Mapping[str, Any]]
    ) -> list[tuple[str, Mapping[str, Any]]]:
        """(name, arguments) of the calls in a text. Raises the errors of mlx-lm's parser."""
        assert self.call_parser is not None, "the format has a reader of its own"
        found = self.call_parser.parse(text, list(tools))
        calls = found if isinstance(found, list) else [found]
        return [(str(call["name"]), _object(call.get("arguments") or {})) for call in calls]


# The marks of a prefix, a suffix and a middle, in this order of the prompt, and those that may end
# the middle or begin a file and a repository.
_FILL_MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # CodeLlama
    ("<PRE>", "<SUF>", "<MID>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
)
_FILL_ENDS = (
    *("<|fim_pad|>", "<fim_pad>", "<|repo_name|>", "<repo_name>", "<reponame>", "<|file_sep|>"),
    *("<file_sep>", "<|file_separator|>", "<EOT>", "\u2581<EOT>", "<|cursor|>"),
)
_FILE_MARKS = ("<|file_sep|>", "<file_sep>", "<|file_separator|>")
_REPOSITORY_MARKS = ("<|repo_name|>", "<repo_name>", "<reponame>")


def fill_marks_of(vocab: Mapping[str, int]) -> FillMarks | None:
    """The marks of a vocabulary, by the names that models give them."""
    for marks in _FILL_MARKS:
        if all(mark in vocab for mark in marks):
            prefix, suffix, middle = (vocab[mark] for mark in marks)
            return FillMarks(
                prefix,
                suffix,
                middle,
                ends=frozenset(vocab[end] for end in _FILL_ENDS if end in vocab),
                file=next((vocab[mark] for mark in _FILE_MARKS if mark in vocab), None),
                repository=next((vocab[mark] for mark in _REPOSITORY_MARKS if mark in vocab), None),
            )
    return None


def _object(arguments: Any) -> Mapping[str, Any]:
    """Arguments as an object, which some models write as a string. Raises ValueError."""
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(value, dict):
        raise ValueError("the arguments are no object")
    return value


def _byte_alphabet() -> Mapping[str, int]:
    """GPT-2's characters for bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}


# --- the output format ------------------------------------------------------------------------


def make_grammars(tokenizer: Tokenizer, num_vocab: int) -> Grammars:
    """The compiler of constraints."""
    wrapper = tokenizer.wrapper
    return Grammars(
        tokenizer.own,
        num_vocab=num_vocab,
        eos_tokens=tokenizer.eos_tokens,
        think=(tuple(wrapper.think_start_tokens or ()), tuple(wrapper.think_end_tokens or ())),
        syntax=tokenizer.output_format.syntax,
    )


def _output_format(wrapper: Any, source: str | None, parser: CallParser | None) -> OutputFormat:
    """The format that a checkpoint's markers, template and added tokens show."""
    own = wrapper.get_chat_template.__self__
    added = {token.content for token in wrapper.added_tokens_decoder.values()}
    think = (wrapper.think_start or "", wrapper.think_end or "")
    if parser is None:
        arguments = {"tokenize": False, "chat_template": source}
        if source is None and own.chat_template is None:
            return format_of(added, MarkerFormat(*think))
        form = call_form(
            lambda messages, tools: own.apply_chat_template(messages, tools, **arguments)
        )
        return format_of(added, MarkerFormat(*think), form)
    is_json = parser.name == "json_tools"
    syntax = syntax_of(parser.name, "\n".join(templates_of(wrapper, source)))
    return format_of(added, MarkerFormat(*think, parser.start, parser.end, is_json, syntax))


def _shown(wrapper: Any, output_format: OutputFormat) -> dict[int, str]:
    """The special tokens of which the format's marks consist."""
    return {
        id: token.content
        for id, token in wrapper.added_tokens_decoder.items()
        if token.special and any(token.content in mark for mark in output_format.marks)
    }
