"""What a chat template shows of tool calls, read from what it renders. Pure.

A call is looked for in the text of a conversation that has one: as a JSON object, in an array, in a
fence or between marks, or as `[name(key=value)]`. Text around it that is also around an answer
without calls belongs to the template.
"""

import json
import re
from dataclasses import dataclass

from mlxlite.output.bare_calls import BareFormat, json_calls, python_calls
from mlxlite.output.call_syntax import CallSyntax, json_object, pythonic
from mlxlite.output.markers import MarkerFormat

_MARK = r"<[^<>\s]{1,40}>|\[/?[A-Z_]{2,30}\]|```[a-z_]{0,16}"
_BEFORE = re.compile(rf"(?:{_MARK})\s*\Z")
_AFTER = re.compile(rf"\s*(?:{_MARK})")
_MAX_NESTED = 4  # braces before the name of a call


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template writes a call. The default is for one that shows tools, and no calls."""

    key: str = "arguments"  # of the arguments, in JSON
    before: str = ""
    after: str = ""
    is_array: bool = False
    is_python: bool = False

    @property
    def has_marks(self) -> bool:
        return bool(self.before and self.after) and "`" not in self.before

    def syntax(self) -> CallSyntax:
        opening, closing, separator = "", "", "\n"
        if self.is_array or self.is_python:
            opening, closing, separator = "[", "]", ", "
        call = pythonic if self.is_python else json_object(self.key)
        if self.has_marks:
            begin, end = self.before.strip(), self.after.strip()
            is_listed = self.is_array or self.is_python
            return CallSyntax(
                begin,
                end,
                call,
                separator=separator if is_listed else None,
                opening=opening,
                closing=closing,
                is_loose=True,
            )
        if "`" in self.before:
            opening, closing = self.before.lstrip() + opening, closing + "\n```"
        return CallSyntax("", "", call, separator=separator, opening=opening, closing=closing)

    def format(self, markers: MarkerFormat) -> BareFormat:
        """The format of a model with this template; `markers` has those of its reasoning."""
        syntax = self.syntax()
        if self.has_marks:
            is_plain = self.key == "arguments" and not (self.is_array or self.is_python)
            markers = MarkerFormat(
                markers.think_start,
                markers.think_end,
                syntax.begin,
                syntax.end,
                has_json_calls=is_plain,
                parse=python_calls if self.is_python else json_calls,
            )
        return BareFormat(markers, syntax)


def form_of(with_call: str, name: str, with_text: str, text: str) -> CallForm:
    """How a call of `name` is written in `with_call`; `with_text` has `text` in its place."""
    at = with_text.rfind(text)
    around = _around(with_text, at, at + len(text)) if at >= 0 else ("", "")
    place = with_call.rfind(f"[{name}(")
    if place >= 0 and (stop := with_call.find(")]", place)) >= 0:
        before, after = _own(with_call, place, stop + 2, around)
        return CallForm(before=before, after=after, is_python=True)
    start = with_call.rfind(name)
    for _ in range(_MAX_NESTED):
        start = with_call.rfind("{", 0, max(start, 0))
        if start < 0:
            break
        try:
            value, stop = json.JSONDecoder().raw_decode(with_call, start)
            json_calls(json.dumps(value))
        except ValueError:
            continue
        return _json_form(with_call, start, stop, value, around)
    return CallForm()


def _json_form(
    text: str, start: int, stop: int, value: "dict[str, object]", around: tuple[str, str]
) -> CallForm:
    inner = value.get("function", value)
    key = "parameters" if isinstance(inner, dict) and "parameters" in inner else "arguments"
    before, after = text[:start].rstrip(), text[stop:].lstrip()
    is_array = before.endswith("[") and after.startswith("]")
    if is_array:
        start, stop = len(before) - 1, len(text) - len(after) + 1
    before, after = _own(text, start, stop, around)
    return CallForm(key, before, after, is_array)


def _own(text: str, start: int, stop: int, around: tuple[str, str]) -> tuple[str, str]:
    """The marks around a place that are not around every answer."""
    before, after = _around(text, start, stop)
    return (
        "" if before.strip() == around[0].strip() else before,
        "" if after.strip() == around[1].strip() else after,
    )


def _around(text: str, start: int, stop: int) -> tuple[str, str]:
    before, after = _BEFORE.search(text, max(start - 80, 0), start), _AFTER.match(text, stop)
    return (before[0] if before else "", after[0] if after else "")
