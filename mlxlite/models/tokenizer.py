"""A checkpoint's tokenizer: text to token ids, token ids to text and to bytes, and its formats.

Wraps mlx-lm's tokenizer. What is slow to look up there (added tokens, the decoder) is looked up
once, at load. Immutable after that, so that any thread may use it.
"""

import json
import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from mlxlite.models.interface import PromptError
from mlxlite.output.grammar import Grammars
from mlxlite.output.harmony import MARKS
from mlxlite.output.markers import Markers

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # sentencepiece's byte fallback


class Tokenizer:
    """Text and token ids of one checkpoint. Safe to use from any thread.

    `wrapper` is mlx-lm's TokenizerWrapper. `shown` are the special tokens that are part of the
    text, because markers consist of them.
    """

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.eos_tokens: frozenset[int] = frozenset(wrapper.eos_token_ids)
        self.added_tokens: frozenset[int] = frozenset(wrapper.added_tokens_decoder)
        self.markers = _markers(wrapper)
        self.shown = _shown(wrapper, self.markers)
        self._decode = _decoder(wrapper)
        self._piece = _speller(wrapper)
        self._byte_alphabet = _byte_alphabet(wrapper)

    def encode(self, text: str, *, add_special: bool) -> tuple[int, ...]:
        """A text's token ids. Raises PromptError."""
        try:
            return tuple(self.wrapper.encode(text, add_special_tokens=add_special))
        except (TypeError, UnicodeError) as error:
            raise PromptError("the text holds half a character (a lone surrogate)") from error

    def detokenize(self, tokens: SequenceOf[int]) -> str:
        """The text of token ids, with the tokenizer's own spaces.

        Special tokens are left out, except those in `shown`.
        """
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
        """(name, arguments) of the calls in a text, by mlx-lm's parser, whose errors it raises."""
        found = self.wrapper.tool_parser(text, list(tools))
        calls = found if isinstance(found, list) else [found]
        return [(str(call["name"]), _object(call.get("arguments") or {})) for call in calls]


def _object(arguments: Any) -> Mapping[str, Any]:
    """Arguments as an object; some models write it as text. Raises ValueError."""
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(value, dict):
        raise ValueError("the arguments are no object")
    return value


def _decoder(wrapper: Any) -> Callable[[list[int]], str]:
    """Token ids to text; by the Rust decoder directly if transformers adds nothing to it."""
    own = wrapper.get_chat_template.__self__  # transformers' tokenizer, behind mlx-lm's wrapper
    is_plain = isinstance(own, PreTrainedTokenizerFast) and all(
        getattr(type(own), name) is getattr(PreTrainedTokenizerFast, name)
        for name in ("decode", "_decode")
    )
    if is_plain:
        return partial(own.backend_tokenizer.decode, skip_special_tokens=True)
    return partial(wrapper.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _speller(wrapper: Any) -> Callable[[int], str | None]:
    """A token's entry in the vocabulary; None for an id that has none."""
    backend = getattr(wrapper, "backend_tokenizer", None)
    # transformers' own method builds a dict of all added tokens at each call
    spell: Callable[[int], str | None] = (
        wrapper.convert_ids_to_tokens if backend is None else backend.id_to_token
    )
    return spell


def _byte_alphabet(wrapper: Any) -> Mapping[str, int] | None:
    """GPT-2's characters for bytes, if the tokenizer's decoder is byte-level; else None."""
    backend = getattr(wrapper, "backend_tokenizer", None)
    if backend is None or "ByteLevel" not in str(backend.decoder):
        return None
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


# --- the output format ------------------------------------------------------------------------


def make_grammars(tokenizer: Any, num_vocab: int) -> Grammars:
    """The compiler of constraints; calls can only be enforced where they are JSON in markers."""
    calls: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    if _has_json_calls(tokenizer):
        calls = (tokenizer.tool_call_start_tokens, tokenizer.tool_call_end_tokens)
    return Grammars(
        tokenizer.get_chat_template.__self__,  # transformers' own, as in _decoder
        num_vocab=num_vocab,
        eos_tokens=frozenset(tokenizer.eos_token_ids),
        think=(tuple(tokenizer.think_start_tokens or ()), tuple(tokenizer.think_end_tokens or ())),
        call_markers=calls,
    )


def _markers(tokenizer: Any) -> Markers:
    """What mlx-lm has found out about the tokenizer's model."""
    has_parser = tokenizer.tool_parser is not None
    return Markers(
        tokenizer.think_start or "",
        tokenizer.think_end or "",
        (tokenizer.tool_call_start or "") if has_parser else "",
        (tokenizer.tool_call_end or "") if has_parser else "",
        _has_json_calls(tokenizer),
        {t.content for t in tokenizer.added_tokens_decoder.values()} >= MARKS,
    )


def _has_json_calls(tokenizer: Any) -> bool:
    """Whether a call is one JSON object between two markers, by mlx-lm's parser of them."""
    return getattr(tokenizer.tool_parser, "__module__", "").endswith(".json_tools")


def _shown(tokenizer: Any, markers: Markers) -> dict[int, str]:
    """The special tokens of which markers consist."""
    texts = [markers.think_start, markers.think_end, markers.call_start, markers.call_end]
    texts += MARKS if markers.is_harmony else ()
    found: dict[int, str] = {}
    for id, token in tokenizer.added_tokens_decoder.items():
        if token.special and any(token.content in text for text in texts if text):
            found[id] = token.content
    return found
