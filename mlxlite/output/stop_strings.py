"""Stop strings, found in text that arrives in pieces; and the guard against repetition. Pure."""

from array import array


class _StopSearch:
    """One stop string, looked for in text that comes in pieces (Knuth-Morris-Pratt).

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
        """The lowest decides: what begins first, then what is complete, then the shortest."""
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


class LoopGuard:
    """Notices when an answer's last `num_tokens` are one piece of a few tokens, repeated."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._tail = array("I")
        self._num_seen = 0

    def push(self, token: int) -> bool:
        """Whether it is one. Looks now and then: a token costs next to nothing."""
        self._tail.append(token)
        self._num_seen += 1
        if self._num_seen % 16 or len(self._tail) < self._num_tokens:
            return False
        del self._tail[: -self._num_tokens]
        most = min(MAX_PERIOD, self._num_tokens // 4)
        return any(self._tail[:-n] == self._tail[n:] for n in range(1, most + 1))
