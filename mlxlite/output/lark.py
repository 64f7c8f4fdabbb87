"""Writes llguidance's Lark grammars: literals, JSON values, and texts up to a mark. Pure.

A special token of the tokenizer is written as a token, all else as text: no text can be mistaken
for one. A text that is followed by a mark ends at the first one, and cannot hold it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from itertools import takewhile
from typing import Any

from mlxlite.output.schemas import resolved, types_of

# Any JSON text's white space, but bounded: enough to indent.
JSON_OPTIONS: Mapping[str, Any] = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"(\x20|\x0A[\x20\x09]{0,24})?",
    "lenient": True,  # what it lacks is a warning: see output/schemas
}
# Of strings that are read as Python's: the escapes that mean the same there.
_PYTHON_OPTIONS: Mapping[str, Any] = {**JSON_OPTIONS, "json_allowed_escapes": 'nrt"\\'}
_NOT_PADDED = (r"~(/\s/ ANY)", r"~(ANY /\s/)")  # parsers strip some of it


class Unwritable(ValueError):
    """A format has no way to write this; the message is for the client."""


class Lark:
    """The rules of one grammar, and the keywords that they leave out, by schema.

    `special` are the ids of the tokens that match no text, by their own.
    """

    def __init__(self, special: Mapping[str, int]) -> None:
        self.left_out: list[tuple[int, str]] = []
        self.place = 0  # of the schema that is being written
        self.forbidden: tuple[str, ...] = ()  # in every text
        self._special = special
        self._rules: list[str] = [r"ANY: /(.|\n)*/", r"gap: /[ \n]{0,4}/"]
        self._names: dict[str, str] = {}
        texts = sorted(special, key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(map(re.escape, texts))})") if texts else None

    def source(self, start: str) -> str:
        return "\n".join((f"start: {start}", *self._rules))

    def leave_out(self, keyword: str) -> None:
        self.left_out.append((self.place, keyword))

    def rule(self, expression: str, options: str = "", *, is_term: bool = False) -> str:
        """The name of a rule; the same for the same expression."""
        key = options + expression
        if (name := self._names.get(key)) is None:
            name = f"{'T' if is_term else 'r'}{len(self._names)}"
            self._names[key] = name
            self._rules.append(f"{name}{options}: {expression}")
        return name

    def named(self, key: str) -> tuple[str, bool]:
        """The name of a rule that may hold itself, and whether it is new: then `define` it."""
        is_new = key not in self._names
        return self._names.setdefault(key, f"r{len(self._names)}"), is_new

    def define(self, name: str, expression: str) -> None:
        self._rules.append(f"{name}: {expression}")

    # --- literals ---------------------------------------------------------------------------------

    def literal(self, text: str) -> str:
        """A text, with its special tokens as tokens."""
        parts = self._marks.split(text) if self._marks is not None else [text]
        special = self._special
        return " ".join(
            f"<[{special[part]}]>" if part in special else quoted(part) for part in parts if part
        )

    def starts_with_token(self, text: str) -> bool:
        return self.literal(text).startswith("<[")

    def words(self, *marks: str) -> str:
        """A terminal: any text without these marks."""
        return self.rule(_free_of(marks), is_term=True)

    def up_to(self, mark: str) -> str:
        """Any text, then the mark; the text may not hold it, spelt out or as a token."""
        words = self.words(mark)
        if self.starts_with_token(mark):
            return f"{words} {self.literal(mark)}"
        return self.rule(self.rule(f"{words} {quoted(mark)}", is_term=True), "[lazy]")

    # --- values -----------------------------------------------------------------------------------

    def json(self, schema: Any, root: Any, *, is_python: bool = False) -> str:
        """A JSON value; `root` is what references in its schema are relative to."""
        value = {**schema} if isinstance(schema, Mapping) else {}
        if schema is False:
            raise Unwritable("a schema is false")
        if value is not root and '"$ref"' in json.dumps(value):
            value = {**_moved(value), "$defs": {"root": _moved(root)}}
        value["x-guidance"] = _PYTHON_OPTIONS if is_python else JSON_OPTIONS
        return self.rule(f"%json {json.dumps(value)}")

    def text(
        self, schema: Any, root: Any, end: str, *, forbidden: Iterable[str] = (), but: str = ""
    ) -> str:
        """A string as it is, up to `end`, with neither that nor anything `forbidden` in it.

        `but` is an expression of texts that a reader would not take for strings. Leaves out what
        cannot be enforced on such a text. Raises Unwritable.
        """
        marks = tuple(filter(None, (end.strip(), *forbidden, *self.forbidden)))
        terms = [_free_of(marks), *self._matching(schema, root, marks)]
        term = " & ".join(terms) + (f" & ~({but})" if but else "")
        if self.starts_with_token(end):
            return f"{self.rule(term, is_term=True)} {self.literal(end)}"
        cut = next((i for i in range(len(end)) if self.starts_with_token(end[i:])), len(end))
        word, rest = end[:cut], end[cut:]
        value = self.rule(term, is_term=True)
        lazy = self.rule(self.rule(f"{value} {quoted(word)}", is_term=True), "[lazy]")
        return f"{lazy} {self.literal(rest)}" if rest else lazy

    def _matching(self, schema: Any, root: Any, marks: SequenceOf[str]) -> list[str]:
        """Expressions of the texts that a string's schema allows."""
        schema = resolved(schema, root)
        rules = schema if isinstance(schema, Mapping) else {}
        choices = [rules["const"]] if "const" in rules else rules.get("enum")
        if isinstance(choices, list):
            texts = [text for text in choices if isinstance(text, str) and text == text.strip()]
            texts = [text for text in texts if text and not any(mark in text for mark in marks)]
            if not texts:
                raise Unwritable("none of a schema's values can be written")
            return [f"({' | '.join(map(quoted, texts))})"]
        found: list[str] = []
        least, most = count(rules.get("minLength")), count(rules.get("maxLength"))
        if least or most is not None:
            found.append(rf"/(.|\n){{{least or 0},{'' if most is None else most}}}/")
        if isinstance(pattern := rules.get("pattern"), str):
            if (regex := _searched(pattern)) is None:
                self.leave_out("pattern")
            else:
                found.append(regex)
        for name in ("format", "anyOf", "oneOf", "allOf", "not", "if"):
            if name in rules:
                self.leave_out(name)
        return [*found, *_NOT_PADDED] if found else []

    def sequence(self, items: SequenceOf[tuple[str, bool]], separator: str) -> str:
        """Items in order, each with whether it is required, and a separator between two."""
        first = more = '""'
        for item, is_required in reversed(items):
            one, other = f"{item} {more}", f"{separator} {item} {more}"
            if not is_required:
                one, other = f"{one} | {first}", f"{other} | {more}"
            first, more = self.rule(one), self.rule(other)
        return first


def count(value: Any) -> int | None:
    """A bound of a schema; None for what is none."""
    return value if type(value) is int and value >= 0 else None


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _free_of(marks: Iterable[str]) -> str:
    """A regex of the texts without these marks, each cut before a second first character.

    Such a text is pieces: beginnings of marks that another follows, or that do not go on; a
    complement would say the same, and takes a hundred times the work.
    """
    marks = tuple(filter(None, marks))
    firsts = {mark[0] for mark in marks}
    cut = {m[0] + "".join(takewhile(lambda char: char not in firsts, m[1:])) for m in marks}
    if not cut:
        return r"/(.|\n)*/"
    starts = {mark[:i] for mark in cut for i in range(1, len(mark))}
    starts = {start for start in starts if not any(start.startswith(mark) for mark in cut)}
    following: dict[str, set[str]] = {start: set() for start in starts}
    for mark in cut:
        for i in range(1, len(mark)):
            if mark[:i] in following:
                following[mark[:i]].add(mark[i])
    other = f"[^{''.join(map(_class_char, sorted(firsts)))}]"
    if not starts:
        return f"/{other}*/"
    begun = "|".join(map(_regex_of, sorted(starts)))
    missed = "|".join(
        f"{_regex_of(start)}[^{''.join(map(_class_char, sorted(nexts | firsts)))}]"
        for start, nexts in sorted(following.items())
    )
    return f"/({other}|({begun})*({missed}))*({begun})*/"


def _class_char(char: str) -> str:
    return f"\\x{{{ord(char):x}}}"


def _regex_of(text: str) -> str:
    return "".join(char if char.isalnum() else _class_char(char) for char in text)


def _moved(schema: Any) -> Any:
    """A schema whose references are relative to the definition `root`."""
    match schema:
        case dict():
            return {
                key: f"#/$defs/root{value[1:]}"
                if key == "$ref" and isinstance(value, str) and value.startswith("#")
                else _moved(value)
                for key, value in schema.items()
            }
        case list():
            return [_moved(item) for item in schema]
        case _:
            return schema


def _searched(pattern: str) -> str | None:
    """A regex of the texts in which a pattern is found; None if it cannot be written as one."""
    is_start, is_end = pattern.startswith("^"), pattern.endswith("$") and pattern[-2:] != "\\$"
    core = pattern[is_start : len(pattern) - is_end]
    if (is_start or is_end) and _has_alternatives(core):
        return None
    core = re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", core).replace("\n", "\\n")
    before, after = "" if is_start else r"(.|\n)*", "" if is_end else r"(.|\n)*"
    return f"/{before}({core}){after}/"


def _has_alternatives(pattern: str) -> bool:
    """True if a pattern is several outside of all groups."""
    depth, is_class = 0, False
    for char in re.sub(r"\\.", "", pattern, flags=re.DOTALL):
        if is_class:
            is_class = char != "]"
        elif char == "[":
            is_class = True
        elif char == "|" and not depth:
            return True
        else:
            depth += (char == "(") - (char == ")")
    return False


def is_string(schema: Any, root: Any) -> bool:
    """True if a schema has strings alone."""
    return types_of(schema, root) == {"string"}
