"""The body of a cancel."""

import pytest

from mlxlite.api.endpoints.admin import parse_cancel
from mlxlite.http.errors import APIError


@pytest.mark.parametrize(
    ("body", "id"),
    [
        (b"", None),
        (b" ", None),
        (b"{}", None),
        (b'{"id": null}', None),
        (b'{"id": "chatcmpl-1"}', "chatcmpl-1"),
    ],
)
def test_a_cancel_names_one_answer_or_means_all(body: bytes, id: str | None) -> None:
    assert parse_cancel(body) == (id, ())


def test_the_unknown_fields_of_a_cancel_are_named() -> None:
    assert parse_cancel(b'{"id": "a", "other": 1}') == ("a", ("other",))


@pytest.mark.parametrize("body", [b"[]", b"null", b"{", b'"x"', b'{"id": 5}', b'{"id": []}'])
def test_a_broken_cancel_is_a_400(body: bytes) -> None:
    with pytest.raises(APIError) as caught:
        parse_cancel(body)
    assert caught.value.status == 400
