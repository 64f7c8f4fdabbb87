"""The lengths of a JSON body's strings, in its raw bytes."""

import json
import random
from time import perf_counter
from typing import Any

import pytest

from mlxlite.api.raw_strings import too_long

MOST = 1000


def found(value: Any, **options: Any) -> int:
    return too_long(json.dumps(value, **options).encode(), MOST)


@pytest.mark.parametrize(
    "text",
    [
        "word " * 300,
        " " * 1500,
        "a" * 1500 + "\U0001f600",
        "\U0001f600" + "a" * 1500,
        '"' * 1500,
        '\\"' * 700,
        "a" * 1500 + '"\U0001f600',
        "7" * 1500 + '"',
        "1,2," * 500 + "\u6a21",
        "\n" * 1500 + " ",
    ],
)
@pytest.mark.parametrize("is_ascii", [True, False])
@pytest.mark.parametrize("num_before", [0, 1, 999, 5000])
def test_a_text_beyond_the_bound_is_found(text: str, is_ascii: bool, num_before: int) -> None:
    value = {"a": [1] * num_before, "b": ["", "\\", "x" * 500], "c": [text, "z"]}
    assert found(value, ensure_ascii=is_ascii) > MOST


def test_a_file_in_base64_is_no_text_also_as_php_writes_it() -> None:
    data = "data:image/png;base64," + "aB3+/" * 900 + "=="
    assert found({"url": data, "data": data[22:], "text": "word"}) == 0
    assert too_long(json.dumps({"url": data}).replace("/", "\\/").encode(), MOST) == 0


def test_arrays_of_numbers_are_no_text_however_they_are_written() -> None:
    ids = list(range(40_000, 45_000))
    vector = [random.Random(i).random() for i in range(500)]
    for indent in (None, 4):
        assert found({"tokens": ids, "v": vector, "t": "word"}, indent=indent) == 0


def test_no_body_of_short_strings_is_refused() -> None:
    rng = random.Random(1)
    alphabet = 'a "\\\n/,1\u00e9\u6a21\U0001f600'
    for _ in range(300):
        texts = ["".join(rng.choices(alphabet, k=rng.randrange(80))) for _ in range(300)]
        texts += ["\\" * rng.randrange(40) for _ in range(100)]
        assert found({"a": texts, "b": dict.fromkeys(texts, 1)}, ensure_ascii=False) == 0
        assert found(texts) == 0


@pytest.mark.parametrize("text", ['\\"', '"\\"",', "\\\\", '"\\\\\\"' * 64 + '",'])
def test_the_scan_takes_less_than_decoding_would_whatever_the_quotes(text: str) -> None:
    body = b'["' + text.encode() * ((16 << 20) // len(text)) + b'"]'
    began_at = perf_counter()
    too_long(body, 1 << 20)
    assert perf_counter() - began_at < 5
