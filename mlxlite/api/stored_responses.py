"""Stored responses: the messages up to each answer, for requests that continue it. Pure.

Bounded by number and by bytes; never on disk.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlxlite.api.conversation import Message

MAX_CONVERSATIONS = 1024
MAX_CONVERSATION_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class _Kept:
    messages: tuple[Message, ...]
    body: bytes
    items: Mapping[str, Message]
    num_bytes: int


class StoredResponses:
    """Answers by id, with the messages before them; the oldest are dropped when there are many.

    Messages that several answers share, images too, are counted for each of them.
    """

    def __init__(
        self, max_entries: int = MAX_CONVERSATIONS, max_bytes: int = MAX_CONVERSATION_BYTES
    ) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._answer_of: dict[str, str] = {}  # by the id of an item
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def load(self, id: str) -> tuple[Message, ...] | None:
        """The messages up to this answer, the answer included."""
        kept = self._kept.get(id)
        return None if kept is None else kept.messages

    def body(self, id: str) -> bytes | None:
        kept = self._kept.get(id)
        return None if kept is None else kept.body

    def item(self, id: str) -> Message | None:
        """An item of a stored answer, as a part of its message."""
        answer = self._answer_of.get(id)
        return None if answer is None else self._kept[answer].items[id]

    def store(
        self,
        id: str,
        messages: Sequence[Message],
        body: bytes = b"",
        items: Mapping[str, Message] | None = None,
    ) -> None:
        """Store one more; one that is larger than the bound is dropped, and evicts no other."""
        self.delete(id)
        items = items or {}
        sizes = (message.num_bytes for message in (*messages, *items.values()))
        kept = _Kept(tuple(messages), body, items, sum(sizes) + len(body))
        if kept.num_bytes > self._max_bytes:
            return
        self._kept[id] = kept
        self._answer_of |= dict.fromkeys(items, id)
        self.num_bytes += kept.num_bytes
        while len(self._kept) > self._max_entries or self.num_bytes > self._max_bytes:
            self.delete(next(iter(self._kept)))

    def delete(self, id: str) -> bool:
        if (kept := self._kept.pop(id, None)) is None:
            return False
        self.num_bytes -= kept.num_bytes
        for item in kept.items:
            del self._answer_of[item]
        return True
