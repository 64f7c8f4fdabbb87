"""Refused requests in the log: a line each, and no more than a bounded number."""

import logging

import pytest

from mlxlite.http.refusal_log import MAX_LINES, PERIOD_S, RefusalLog


def test_a_flood_of_refusals_is_a_bounded_number_of_lines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    refusals = RefusalLog(lambda: now)
    with caplog.at_level(logging.INFO):
        for _ in range(MAX_LINES + 5):
            refusals.note("GET", "/x", "404 not_found")
        assert len(caplog.records) == MAX_LINES
        now = PERIOD_S
        refusals.note("GET", "/y", "404 not_found")
    assert [record.getMessage() for record in caplog.records[-2:]] == [
        "5 more requests were refused",
        "GET '/y' 404 not_found",
    ]
