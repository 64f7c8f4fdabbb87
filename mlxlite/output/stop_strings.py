"""Stop strings in text that arrives in pieces, and the guard against repetition. Pure."""

from array import array


class StopStrings:
    """Passes text on up to the first stop string; holds the end that may become one.

    `met` is the stop string that was found, perhaps only by `flush`: the one that begins first
    counts, so a complete one waits while another, begun before it, may be completed. Of those that
    begin at the same place the shortest counts. None of them is empty. If it `is_shown`, the stop
    string is a part of the text.
    """

    def __init__(self, strings: tuple[str, ...] = (), *, is_shown: bool = False) -> None:
        self._is_shown = is_shown
        assert all(strings), "empty stop strings are refused at parsing"
        self.met: str | None = None
        self._searches = tuple(_StopSearch(string) for string in dict.fromkeys(strings))
        self._held = ""  # text that has been searched and may be the beginning of a stop string
        self._num_emitted = 0  # characters before `_held`

    def push(self, text: str) -> str:
        """The text that is surely before any stop string; "" once one was met."""
        if self.met is not None:
            return ""
        if not text or not self._searches:
            return text
        for search in self._searches:
            search.push(text)
        self._held += text
        first = min(self._searches, key=_StopSearch.rank)
        return self._cut(first) if first.is_met else self._release(first.start)

    def flush(self) -> str:
        """The end of the text: the held text, up to a stop string."""
        met = [search for search in self._searches if search.is_met]
        if met and self.met is None:
            return self._cut(min(met, key=_StopSearch.rank))
        return self._release(self._num_emitted + len(self._held))

    def _release(self, stop: int) -> str:
        """The held text up to the position `stop`."""
        num = stop - self._num_emitted
        ready, self._held = self._held[:num], self._held[num:]
        self._num_emitted = stop
        return ready

    def _cut(self, search: "_StopSearch") -> str:
        text = self._release(search.start + self._is_shown * len(search.string))
        self._held, self.met = "", search.string
        return text


class _StopSearch:
    """One stop string, searched in text that comes in pieces (Knuth-Morris-Pratt).

    `start` is the position in the text where the stop string begins (`is_met`), or else where the
    longest text that may still become it begins: the end of the text, if there is none.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.is_met = False
        self._position = 0
        self._num_matched = 0
        self._borders = _borders(string)

    @property
    def start(self) -> int:
        return self._position - self._num_matched

    def rank(self) -> tuple[int, bool, int]:
        """The lowest counts: the first to begin, then a complete one, then the shortest."""
        return self.start, not self.is_met, len(self.string)

    def push(self, text: str) -> None:
        if self.is_met:
            return
        string, borders, matched = self.string, self._borders, self._num_matched
        if not matched and string[0] not in text:  # nearly always
            self._position += len(text)
            return
        for char in text:
            while matched and char != string[matched]:
                matched = borders[matched - 1]
            matched += char == string[matched]
            self._position += 1
            if matched == len(string):
                self.is_met = True
                break
        self._num_matched = matched


def _borders(string: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    length = 0
    for char in string[1:]:
        while length and char != string[length]:
            length = borders[length - 1]
        length += char == string[length]
        borders.append(length)
    return borders


MAX_PERIOD = 64  # tokens
_CHECK_EVERY = 16  # tokens: a check costs microseconds


class RepetitionGuard:
    """Detects that an answer's last `num_tokens` repeat one short piece; 0 detects nothing."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._tail = array("I")
        self._num_seen = 0

    def push(self, token: int) -> bool:
        """One more token; True if a check is due and finds a repetition."""
        if not self._num_tokens:
            return False
        self._tail.append(token)
        self._num_seen += 1
        if self._num_seen % _CHECK_EVERY or len(self._tail) < self._num_tokens:
            return False
        del self._tail[: -self._num_tokens]
        most = min(MAX_PERIOD, self._num_tokens // 4)
        return any(self._tail[:-n] == self._tail[n:] for n in range(1, most + 1))
