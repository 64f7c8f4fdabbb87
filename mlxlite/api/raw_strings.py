"""The lengths of a JSON body's strings, found before it is decoded. Pure.

Decoding takes up to six times a body: its copy, and four bytes for each character of a string that
has one beyond the basic plane. So a text that no context could hold is refused by its raw bytes.
Strings are found by their quotes: any other part of a body has a quote now and then, but for
arrays of numbers. Base64 may be an image, or a file of an earlier turn: it has no bound, and takes
no more than three times its body.
"""

import re

MAX_RAW_BYTES = 12  # of one character: two escapes
_LAST_QUOTE = re.compile(rb'.*(?<!\\)"', re.DOTALL)
_PIECE = 1 << 20
# With the head of a data URI, and the escapes of "/" and of line ends.
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_:;,.\\"
_NUMBERS = b"0123456789+-.eE, \t\r\n[]{}:"
_BYTES_PER_NUMBER = 64  # at most, on the average: no text of blanks or of one digit passes for them


def too_long(body: bytes, max_text: int) -> int:
    """The least bytes of a string that is longer than `max_text`; 0 if there is none."""
    start = 0  # behind the last quote
    while len(body) - start > max_text:
        stop = start + max_text
        if body.rfind(b'"', start, stop) >= 0:
            # An escaped backslash at the end of a string hides its quote, not that of the next.
            if (last := _LAST_QUOTE.match(body, start, stop)) is not None:
                start = last.end()
                continue
            return max_text + 1
        end = body.find(b'"', stop)
        end = len(body) if end < 0 else end
        if not (_is_numbers(body, start, end) or _is_base64(body, start, end)):
            return end - start
        start = end + 1
    return 0


def _is_base64(body: bytes, start: int, end: int) -> bool:
    if body.endswith(b"\\", start, end):  # the quote is escaped: the string goes on
        return False
    for at in range(start, end, _PIECE):
        piece = body[at : min(at + _PIECE, end)]
        if piece.translate(None, _BASE64) or b"\\u" in piece:
            return False
    return True


def _is_numbers(body: bytes, start: int, end: int) -> bool:
    for at in range(start, end, _PIECE):
        piece = body[at : min(at + _PIECE, end)]
        if piece.translate(None, _NUMBERS) or piece.count(b",") < len(piece) // _BYTES_PER_NUMBER:
            return False
    return True
