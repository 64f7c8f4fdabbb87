"""Tokens to text for one sequence: whole characters only, each emitted once.

The texts of all pushes and the flush together are the text of all tokens decoded at once. A push
decodes at most `2 * MAX_UNREAD + 2` tokens at a time. Tested.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

# Token ids to text, special tokens left out; "" for ids without a text.
Detokenize = Callable[[SequenceOf[int]], str]

REPLACEMENT = "\ufffd"  # what every detokenizer writes for bytes that are no character (yet)
# An unfinished character is at most three bytes. Byte-level tokenizers write one replacement for
# them, byte-fallback ones (Llama 2, Gemma) one for each.
MAX_HALF = 3
# Unread tokens after which the window is cut though its text is not whole. A whole character comes
# within four tokens, so this is met only by invalid bytes, tokens that begin and end inside a
# character, and long runs of spaces.
MAX_UNREAD = 32
# Tokens that survive the cut. MAX_HALF replacements stand for at most nine bytes, so for at most
# nine tokens; the prompt's tail is read as far back as this too (vLLM: 5, +1 for the space).
NUM_KEPT = 16


class Detokenizer:
    """One sequence's tokens in, its text out: the offsets of vLLM and TGI.

    More tokens must only extend the text of `detokenize`, replacement characters excepted: a
    transformers tokenizer needs `clean_up_tokenization_spaces=False`. `prompt_tail` is the end of
    the prompt, any length: with it the first word keeps the space that a sentencepiece tokenizer
    strips at the start of a text.

    Each push decodes a window of the last tokens: *context*, whose text has been emitted and which
    keeps the space of the next word, then *unread* ones. The window restarts only where its text is
    whole: a byte-fallback tokenizer decodes bytes by the run, and a window that began inside a
    character would make the whole run invalid.
    """

    def __init__(self, detokenize: Detokenize, prompt_tail: SequenceOf[int] = ()) -> None:
        self._detokenize = detokenize
        self._tokens: list[int] = []
        self._num_context = 0  # tokens
        self._context_text = ""
        self._text = ""  # of the whole window
        self._num_emitted = 0  # characters of it
        tail = list(prompt_tail[-NUM_KEPT:])
        for skip in range(min(MAX_HALF, len(tail) - 1) + 1):  # begin at a whole character
            text = detokenize(tail[skip:])
            if text.strip(" ") and not text.startswith(REPLACEMENT):
                self._restart(tail[skip:], text)
                return
        self._restart(tail, detokenize(tail))

    def push(self, token: int) -> str:
        """The text that one more token completes."""
        self._tokens.append(token)
        text = self._decode()
        if text == self._text and not self._detokenize((token, token)):
            # A special token. (Twice, because a lone "▁" at the start of a text is empty too, but
            # keeps the next "▁".)
            self._tokens.pop()
            return ""
        num_half = len(text) - len(text.rstrip(REPLACEMENT))
        num_ready = max(self._num_emitted, len(text) - min(num_half, MAX_HALF))
        ready = text[self._num_emitted : num_ready]
        self._text, self._num_emitted = text, num_ready
        if not num_half and self._advance():
            return ready
        if len(self._tokens) - self._num_context > MAX_UNREAD:
            ready += self._shorten()
        return ready

    def flush(self) -> str:
        """The end of the tokens: the text of bytes that did not become a character."""
        ready = self._text[self._num_emitted :]
        self._num_emitted = len(self._text)
        return ready

    def _decode(self) -> str:
        text = self._detokenize(self._tokens)
        if text.startswith(self._context_text):
            return text
        # An invalid byte has turned the run of bytes before it, emitted long ago, into
        # replacements (byte fallback): decode the unread tokens without the run.
        return self._context_text + self._detokenize(self._tokens[self._num_context :])

    def _restart(self, context: list[int], text: str) -> None:
        self._tokens, self._num_context = context, len(context)
        self._text = self._context_text = text
        self._num_emitted = len(text)

    def _advance(self) -> bool:
        """Make the unread tokens the context, unless they would not keep a word's space."""
        unread = self._tokens[self._num_context :]
        text = self._detokenize(unread)
        if not text.strip(" "):
            return False
        self._restart(unread, text)
        return True

    def _shorten(self) -> str:
        """Drop all but the context and the last unread tokens; the text that cannot be held."""
        held = self._text[self._num_emitted :]
        del self._tokens[self._num_context : -NUM_KEPT]
        self._text = self._decode()
        if self._text.endswith(held):
            self._num_emitted = len(self._text) - len(held)
            return ""
        # A run of bytes (byte fallback) that is valid without its beginning: the held text is of
        # the invalid run, and the text goes on from here.
        unread = self._tokens[self._num_context :]
        self._restart(unread, self._detokenize(unread))
        return held
