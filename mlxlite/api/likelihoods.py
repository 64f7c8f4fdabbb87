"""The likelihoods of prompts as JSON, in vLLM's form and in OpenAI's legacy form. Pure.

A long prompt has a million numbers, and making them JSON takes seconds: they are serialised in the
parts in which they come, so that no call takes long.
"""

import codecs
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Final

import orjson

from mlxlite.engine.sequence import Logprobs, PromptLogprobs

MIN_LOGPROB = -9999.0  # for tokens that are impossible: JSON has no infinity (vLLM's figure)
TokenBytes = Callable[[int], bytes]
LEGACY: Final = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class JSONList:
    """A list that is serialised in parts."""

    def __init__(self, items: Sequence[Any] = ()) -> None:
        self._parts: list[bytes] = []
        self.extend(items)

    def extend(self, items: Sequence[Any]) -> None:
        if items:
            self._parts.append(orjson.dumps(items)[1:-1])

    @classmethod
    def joined(cls, *lists: "JSONList") -> "JSONList":
        made = cls()
        made._parts = [part for items in lists for part in items._parts]
        return made

    def json(self) -> orjson.Fragment:
        return orjson.Fragment(b"[" + b",".join(self._parts) + b"]")


def token_id(token: int) -> str:
    """vLLM's name of a token whose text may not be unique."""
    return f"token_id:{token}"


def as_text(token: int, token_bytes: TokenBytes) -> str:
    return token_bytes(token).decode("utf-8", "replace")


def by_token(part: PromptLogprobs, token_bytes: TokenBytes) -> list[dict[str, Any]]:
    """vLLM's `prompt_logprobs`: for each place the prompt's token, then the best ones."""

    def entry(token: int, logprob: float, rank: int) -> dict[str, Any]:
        text = as_text(token, token_bytes)
        return {"logprob": max(logprob, MIN_LOGPROB), "rank": rank, "decoded_token": text}

    places: list[dict[str, Any]] = []
    for token, item in part.tokens:
        best = {str(id): entry(id, value, i + 1) for i, (id, value) in enumerate(item.top)}
        places.append(best | {str(token): entry(token, item.drawn, item.rank)})
    return places


def legacy(
    drawn: Iterable[tuple[int, Logprobs]], spell: Callable[[int], str], offsets: Sequence[int]
) -> dict[str, list[Any]]:
    """OpenAI's parallel lists."""
    pairs = list(drawn)
    tops: list[dict[str, float]] = [{} for _ in pairs]
    for top, (_, item) in zip(tops, pairs, strict=True):
        for id, value in item.top:
            top.setdefault(spell(id), max(value, MIN_LOGPROB))  # of equal texts the best counts
    return {
        "tokens": [spell(token) for token, _ in pairs],
        "token_logprobs": [max(item.drawn, MIN_LOGPROB) for _, item in pairs],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


class Offsets:
    """Where in a text each token's own text begins; a decoder holds an incomplete character.

    A token that is not `is_shown` has no text.
    """

    def __init__(self, start: int = 0, is_shown: Callable[[int], bool] = lambda _: True) -> None:
        self._num_chars = start
        self._is_shown = is_shown
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, tokens: Iterable[int], token_bytes: TokenBytes) -> list[int]:
        offsets: list[int] = []
        for token in tokens:
            offsets.append(max(0, self._num_chars))
            if self._is_shown(token):
                self._num_chars += len(self._decoder.decode(token_bytes(token)))
        return offsets


class EchoedPrompt:
    """One prompt's legacy lists, in parts; its first token has no likelihood."""

    def __init__(self, offsets: Offsets, token: int, name: str, token_bytes: TokenBytes) -> None:
        self.offsets = offsets
        first = (name, None, None, *offsets.of([token], token_bytes))
        self._lists = {name: JSONList([value]) for name, value in zip(LEGACY, first, strict=True)}

    @classmethod
    def of(
        cls,
        token: int,
        text: str,
        token_bytes: TokenBytes,
        detokenize: Callable[[Sequence[int]], str],
        *,
        has_ids: bool = False,
    ) -> "EchoedPrompt":
        """Of a prompt's first token and its text, where special tokens are not shown.

        A sentencepiece tokenizer puts a space before a text: it is in the first token alone.
        """
        is_shown = cache(lambda token: bool(detokenize((token, token))))
        own = token_bytes(token)
        is_spaced = is_shown(token) and own.startswith(b" ") and not text.startswith(" ")
        name = token_id(token) if has_ids else as_text(token, token_bytes)
        return cls(Offsets(-is_spaced, is_shown), token, name, token_bytes)

    def extend(self, lists: Mapping[str, Sequence[Any]]) -> None:
        for name, items in lists.items():
            self._lists[name].extend(items)

    def json(self) -> dict[str, orjson.Fragment]:
        return {name: items.json() for name, items in self._lists.items()}

    def with_more(self, lists: Mapping[str, Sequence[Any]]) -> dict[str, orjson.Fragment]:
        """The lists of the prompt, and then those of an answer."""
        return {
            name: JSONList.joined(items, JSONList(lists.get(name, ()))).json()
            for name, items in self._lists.items()
        }
