"""How formats write tool calls, for a grammar that enforces them: one `CallSyntax` each. Pure.

mlx-lm's parsers read what is written here (tested for each of them): the marks are theirs, the
white space is that of the templates. A tool, argument or value that a format cannot write raises
Unwritable; an optional argument of that kind is left out.
"""

import json
import keyword
import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol

from mlxlite.output.constraint import ToolSchema
from mlxlite.output.lark import Lark, Unwritable, count, is_string, quoted
from mlxlite.output.schemas import resolved, types_of

_WORD = re.compile(r"\w+")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_DASHED = re.compile(r"[\w-]+")
_TAGGED = re.compile(r"[^\s\"'<>=|]+")
_ANY_KEY = r"/[A-Za-z_][A-Za-z0-9_]{0,63}/"
_KEYWORDS = frozenset((*keyword.kwlist, "true", "false", "null"))


class Writes(Protocol):
    """The expression of one call of a tool. Raises Unwritable."""

    def __call__(self, tool: ToolSchema, lark: Lark, /) -> str: ...


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """Calls between marks; `begin` and `end` are "" where there is none.

    Calls of one group are separated by `separator`; None: a group is one call, and several follow
    each other. `inner` are marks inside a call. `lead` may come before everything, as it may around
    any text; `before_text` comes before an answer that is no call.
    """

    begin: str
    end: str
    call: Writes
    separator: str | None = None
    opening: str = ""  # after `begin`
    closing: str = ""  # before `end`
    is_loose: bool = False  # white space at the marks
    inner: tuple[str, ...] = ()
    lead: tuple[str, str] | None = None
    before_text: str = ""
    is_single: bool = False  # an answer ends with its first call

    @property
    def can_follow_text(self) -> bool:
        """True if the beginning of a call is a mark that a text can be kept from writing."""
        return bool(self.begin)

    def calls(
        self,
        tools: SequenceOf[ToolSchema],
        lark: Lark,
        *,
        is_single: bool,
        is_each_needed: bool = False,
    ) -> str:
        """The expression of one or more calls without the first `begin`.

        Raises Unwritable if no tool can be called, or where each is needed one cannot.
        """
        bodies, lark.forbidden = [], (self.end,)
        for lark.place, tool in enumerate(tools):
            try:
                bodies.append(lark.rule(self.call(tool, lark)))
            except Unwritable as error:
                if is_each_needed or (not bodies and tool is tools[-1]):
                    raise Unwritable(f"the tool {tool.name!r}: {error}") from None
                lark.leave_out(f"no call of {tool.name}")
        one, gap = f"({' | '.join(bodies)})", " gap " if self.is_loose else " "
        is_single = is_single or self.is_single
        several = one
        if self.separator is not None and not is_single:
            several = f"{one} ({_join(lark.literal(self.separator))} {one})*"
        opening, closing = lark.literal(self.opening), lark.literal(self.closing)
        first = _join(opening, gap, several, gap, closing, lark.literal(self.end))
        group = lark.rule(first)
        if self.separator is not None or is_single:
            return group
        return f"{group} (gap {_join(lark.literal(self.begin))} {group})*"


def _join(*parts: str) -> str:
    return " ".join(part.strip() for part in parts if part.strip())


# --- arguments ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Argument:
    name: str
    schema: Any
    is_required: bool


@dataclass(frozen=True, slots=True)
class Arguments:
    """The members of an object's schema; `is_open` if it names none, and any may be given."""

    all: tuple[Argument, ...]
    is_open: bool
    root: Any


def arguments_of(schema: Any, root: Any, lark: Lark) -> Arguments:
    """Names what the object's schema says beyond its members. Raises Unwritable."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping):
        return Arguments((), is_open=True, root=root)
    given, required = schema.get("properties"), schema.get("required")
    properties = dict(given) if isinstance(given, Mapping) else {}
    names = (
        [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    )
    for name in names:
        properties.setdefault(name, {})
    for name in _UNWRITTEN:
        if name in schema:
            lark.leave_out(name)
    found = tuple(Argument(name, value, name in names) for name, value in properties.items())
    is_open = not found and schema.get("additionalProperties", True) is not False
    return Arguments(found, is_open, root)


_UNWRITTEN = (
    *("anyOf", "oneOf", "allOf", "not", "if", "minProperties", "maxProperties", "propertyNames"),
    *("patternProperties", "dependentRequired", "dependentSchemas", "enum", "const"),
)


def _written(arguments: Arguments, write: Callable[[Argument], str]) -> list[tuple[str, bool]]:
    """Each argument's expression; optional ones that cannot be written are left out."""
    found = []
    for argument in arguments.all:
        try:
            found.append((write(argument), argument.is_required))
        except Unwritable:
            if argument.is_required:
                raise
    return found


def _checked(name: str, pattern: "re.Pattern[str]") -> str:
    if not pattern.fullmatch(name):
        raise Unwritable(f"{name!r} cannot be written in this model's format of calls")
    return name


# --- JSON -----------------------------------------------------------------------------------------


def json_object(key: str) -> Writes:
    """{"name": …, KEY: {…}}"""

    def write(tool: ToolSchema, lark: Lark) -> str:
        root = json.loads(tool.parameters)
        schema = {
            "type": "object",
            "properties": {"name": {"const": tool.name}, key: root},
            "required": ["name", key],
            "additionalProperties": False,
        }
        return lark.json(schema, root)

    return write


@dataclass(frozen=True, slots=True)
class Headed:
    """A name, then the arguments as one JSON object."""

    before: str
    between: str
    after: str = ""
    names: "re.Pattern[str]" = _TAGGED

    def __call__(self, tool: ToolSchema, lark: Lark) -> str:
        before = lark.literal(self.before + _checked(tool.name, self.names) + self.between)
        root = json.loads(tool.parameters)
        return _join(before, lark.json(root, root), lark.literal(self.after))


def pythonic(tool: ToolSchema, lark: Lark) -> str:
    """NAME(key=value, …), the values as JSON that Python reads too."""
    root = json.loads(tool.parameters)
    arguments = arguments_of(root, root, lark)

    def write(argument: Argument) -> str:
        name = _checked(argument.name, _IDENTIFIER)
        if name in _KEYWORDS or "." in name:
            raise Unwritable(f"{name!r} is no name of an argument")
        return f"{quoted(name + '=')} {lark.json(argument.schema, root, is_python=True)}"

    inner = lark.sequence(_written(arguments, write), quoted(", "))
    if arguments.is_open:
        one = f"{_ANY_KEY} {quoted('=')} {lark.json({}, {}, is_python=True)}"
        inner = lark.rule(f"({one} ({quoted(', ')} {one})*)?")
    return f"{quoted(_checked(tool.name, _IDENTIFIER) + '(')} {inner} {quoted(')')}"


# --- tags -----------------------------------------------------------------------------------------

_NULL = r"/\s*[nN][uU][lL][lL]\s*/"
_LIKE_JSON = rf'/\s*(-?[0-9]|[\[{{"]|-?Infinity)(.|\n)*/ | /\s*(true|false|null|NaN)\s*/ | {_NULL}'


@dataclass(frozen=True, slots=True)
class Tagged:
    """A call whose arguments have a tag each: strings as they are, all else as JSON.

    `is_text` says which values a parser takes as they are; a text is none of `but`, and holds none
    of `forbidden`.
    """

    before_name: str
    after_name: str
    before_key: str
    after_key: str  # `{type}` is the value's
    after_value: str
    tail: str
    is_text: Callable[[Any, Any], bool]
    forbidden: tuple[str, ...]
    but: str = ""
    is_bare_json: bool = False  # a call without arguments is {"name": …, "arguments": {}}

    def __call__(self, tool: ToolSchema, lark: Lark) -> str:
        root = json.loads(tool.parameters)
        arguments = arguments_of(root, root, lark)
        items = _written(arguments, lambda argument: self._argument(argument, root, lark))
        head = lark.literal(self.before_name + _checked(tool.name, _TAGGED) + self.after_name)
        required = [item if needed else f"({item})?" for item, needed in items]
        if arguments.is_open:
            end = self.after_value
            value = lark.text({}, {}, end, forbidden=self.forbidden, but=self.but)
            after = lark.literal(self.after_key.replace("{type}", "string"))
            required = [f"({_join(lark.literal(self.before_key), _ANY_KEY, after, value)})*"]
        body = _join(head, *required, lark.literal(self.tail))
        if not self.is_bare_json or any(needed for _, needed in items):
            return body
        empty = json_object("arguments")(ToolSchema(tool.name, _NO_ARGUMENTS), lark)
        if not items and not arguments.is_open:
            return empty
        some = [_join(*required[:i], item, *required[i + 1 :]) for i, (item, _) in enumerate(items)]
        if arguments.is_open:
            some = [required[0].removesuffix("*") + "+"]
        full = (_join(head, one, lark.literal(self.tail)) for one in some)
        return " | ".join((*full, empty))

    def _argument(self, argument: Argument, root: Any, lark: Lark) -> str:
        is_text = self.is_text(argument.schema, root)
        kinds = types_of(argument.schema, root)
        kind = "string" if is_text else next(iter(sorted(kinds)), "object")
        after_key = self.after_key.replace("{type}", kind)
        before = lark.literal(self.before_key + _checked(argument.name, _TAGGED) + after_key)
        if is_text:
            but = "" if "null" in kinds else self.but
            value = lark.text(
                argument.schema, root, self.after_value, forbidden=self.forbidden, but=but
            )
            return _join(before, value)
        value = lark.json(argument.schema, root, is_python=True)
        return _join(before, value, lark.literal(self.after_value))


_NO_ARGUMENTS = '{"type":"object","additionalProperties":false}'


def _is_typed_string(schema: Any, root: Any) -> bool:
    """As glm47 and longcat decide."""
    return isinstance(schema, Mapping) and schema.get("type") == "string"


def _may_be_string(schema: Any, root: Any) -> bool:
    """As minimax_m2 and minicpm5 decide: a string comes last, but nothing comes before it."""
    kinds = types_of(schema, root)
    return not kinds or "string" in kinds


def _is_qwen_string(schema: Any, root: Any) -> bool:
    if isinstance(schema, Mapping) and isinstance(schema.get("type"), list):
        return False
    return _may_be_string(schema, root)


# --- Gemma ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gemma:
    """call:NAME{key:value,…}, with a mark of its own around strings.

    `is_flat`: mlx-lm's parser of the older form reads no value with a brace or comma in it.
    """

    quote: str
    is_flat: bool = False

    def __call__(self, tool: ToolSchema, lark: Lark) -> str:
        root = json.loads(tool.parameters)
        name = _checked(tool.name, _WORD if self.is_flat else _DASHED)
        return _join(lark.literal(f"call:{name}"), self._object(root, root, lark))

    def _object(self, schema: Any, root: Any, lark: Lark) -> str:
        arguments = arguments_of(schema, root, lark)

        def write(argument: Argument) -> str:
            key = lark.literal(_checked(argument.name, _WORD) + ":")
            return _join(key, self._value(argument.schema, root, lark))

        inner = lark.sequence(_written(arguments, write), quoted(","))
        if arguments.is_open:
            one = f"{_ANY_KEY} {quoted(':')} {self._any(lark)}"
            inner = lark.rule(f"({one} ({quoted(',')} {one})*)?")
        return f"{quoted('{')} {inner} {quoted('}')}"

    def _value(self, schema: Any, root: Any, lark: Lark) -> str:
        if isinstance(schema, Mapping) and isinstance(ref := schema.get("$ref"), str):
            name, is_new = lark.named(f"{ref} {lark.place}")
            if is_new:
                lark.define(name, self._value(resolved(schema, root), root, lark))
            return name
        rules = schema if isinstance(schema, Mapping) else {}
        if isinstance(branches := rules.get("anyOf", rules.get("oneOf")), list) and branches:
            return f"({' | '.join(self._value(branch, root, lark) for branch in branches)})"
        kinds = types_of(rules, root)
        if not kinds:
            return self._any(lark)
        return f"({' | '.join(self._of(kind, rules, root, lark) for kind in sorted(kinds))})"

    def _of(self, kind: str, rules: Mapping[str, Any], root: Any, lark: Lark) -> str:
        if kind == "string":
            forbidden = (self.quote, *("{}" if self.is_flat else ()))
            value = lark.text(rules, root, self.quote, forbidden=forbidden)
            return _join(lark.literal(self.quote), value)
        if kind not in ("object", "array"):
            return lark.json({**rules, "type": kind}, root)
        if self.is_flat:
            raise Unwritable("this model's format of calls has no objects and arrays")
        if kind == "object":
            return self._object(rules, root, lark)
        for name in ("prefixItems", "uniqueItems", "contains"):
            if name in rules:
                lark.leave_out(name)
        item = self._value(rules.get("items", {}), root, lark)
        least, most = count(rules.get("minItems")) or 0, count(rules.get("maxItems"))
        if most == 0:
            return quoted("[]")
        rest = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        many = f"{item} ({quoted(',')} {item}){rest}"
        return f"{quoted('[')} {many if least else f'({many})?'} {quoted(']')}"

    def _any(self, lark: Lark) -> str:
        """Any value."""
        plain = lark.json({"type": ["number", "boolean", "null"]}, {})
        mark = lark.literal(self.quote)
        forbidden = (self.quote, *("{}" if self.is_flat else ()))
        text = f"{mark} {lark.text({}, {}, self.quote, forbidden=forbidden)}"
        if self.is_flat:
            return f"({plain} | {text})"
        name, is_new = lark.named("any value of gemma")
        if is_new:
            one, comma = f"{_ANY_KEY} {quoted(':')} {name}", quoted(",")
            entries = f"{quoted('{')} ({one} ({comma} {one})*)? {quoted('}')}"
            items = f"{quoted('[')} ({name} ({comma} {name})*)? {quoted(']')}"
            lark.define(name, f"{plain} | {text} | {entries} | {items}")
        return name


# --- the formats ----------------------------------------------------------------------------------


def _qwen3_coder() -> CallSyntax:
    call = Tagged(
        *("<function=", ">\n", "<parameter=", ">\n", "\n</parameter>\n", "</function>\n"),
        _is_qwen_string,
        ("</function>",),
        _NULL,
    )
    return CallSyntax("<tool_call>", "</tool_call>", call, opening="\n")


def _glm(begin: str, end: str, key: str, value: str, *, is_bare_json: bool = False) -> CallSyntax:
    after_key = f"</{key}>\n<{value}>"
    call = Tagged(
        *("", "\n", f"<{key}>", after_key, f"</{value}>\n", ""),
        _is_typed_string,
        (f"<{key}>",),
        is_bare_json=is_bare_json,
    )
    inner = (f"<{key}>", f"</{key}>", f"<{value}>", f"</{value}>")
    return CallSyntax(begin, end, call, inner=inner)


def _minimax() -> CallSyntax:
    call = Tagged(
        *('<invoke name="', '">\n', '<parameter name="', '">', "</parameter>\n", "</invoke>\n"),
        _may_be_string,
        ("</invoke>",),
        _NULL,
    )
    return CallSyntax(
        "<minimax:tool_call>", "</minimax:tool_call>", call, separator="", opening="\n"
    )


def _muse_spark() -> CallSyntax:
    end, value = "</atem:function_calls>", "</atem:parameter>"
    call = Tagged(
        *('<atem:invoke name="', '">\n', '<atem:parameter name="', '">'),
        *(f"{value}\n", "</atem:invoke>\n"),
        is_string,
        ("</atem:invoke>",),
        _LIKE_JSON,
    )
    return CallSyntax("<atem:function_calls>", end, call, separator="", opening="\n")


def _minicpm5() -> CallSyntax:
    call = Tagged(
        *('"', '">', '<param name="', '">', "</param>", ""),
        _may_be_string,
        (),
        _NULL,
    )
    return CallSyntax("<function name=", "</function>", call)


def _kimi_k2() -> CallSyntax:
    call_marks = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")
    call = Headed(call_marks[0] + "functions.", ":0" + call_marks[1], call_marks[2])
    begin, end = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    return CallSyntax(begin, end, call, separator="", inner=call_marks)


def _kimi_k3() -> CallSyntax:
    begin, end = "<|open|>tools<|sep|>", "<|close|>tools<|sep|>"
    call = Tagged(
        *('<|open|>call tool="', '" index="1"<|sep|>', '<|open|>argument key="'),
        *('" type="{type}"<|sep|>', "<|close|>argument<|sep|>", "<|close|>call<|sep|>"),
        is_string,
        ("<|open|>", "<|close|>"),
    )
    return CallSyntax(begin, end, call, separator="", inner=("<|open|>", "<|close|>", "<|sep|>"))


def mistral(*, has_headers: bool) -> CallSyntax:
    """`[TOOL_CALLS]` before each NAME[ARGS]{…}, or before one array of JSON calls."""
    if has_headers:
        return CallSyntax(
            "[TOOL_CALLS]", "", Headed("", "[ARGS]", names=_DASHED), inner=("[ARGS]",)
        )
    call = json_object("arguments")
    return CallSyntax("[TOOL_CALLS]", "", call, separator=", ", opening="[", closing="]")


_HARMONY = "<|channel|>commentary to=functions."
HARMONY = CallSyntax(
    "",
    "",
    Headed(_HARMONY, " <|constrain|>json<|message|>"),
    lead=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    before_text="<|channel|>final<|message|>",
    is_single=True,  # `<|call|>` ends the answer
)
JSON_TOOLS = CallSyntax("<tool_call>", "</tool_call>", json_object("arguments"), is_loose=True)


def syntax_of(parser: str, template: str) -> CallSyntax | None:
    """The syntax that one of mlx-lm's parsers reads; None of a parser that is not known here."""
    glm = _glm("<tool_call>", "</tool_call>", "arg_key", "arg_value")
    syntaxes: Mapping[str, CallSyntax] = {
        "function_gemma": CallSyntax(
            *("<start_function_call>", "<end_function_call>"),
            Gemma("<escape>", is_flat=True),
            inner=("<escape>",),
        ),
        "gemma4": CallSyntax("<|tool_call>", "<tool_call|>", Gemma('<|"|>'), inner=('<|"|>',)),
        "glm47": glm,
        "json_tools": JSON_TOOLS,
        "kimi_k2": _kimi_k2(),
        "kimi_k3": _kimi_k3(),
        "laguna": glm,
        "longcat": _glm(
            *("<longcat_tool_call>", "</longcat_tool_call>"),
            *("longcat_arg_key", "longcat_arg_value"),
            is_bare_json=True,
        ),
        "minicpm5": _minicpm5(),
        "minimax_m2": _minimax(),
        "mistral": mistral(has_headers="[ARGS]" in template),
        "muse_spark": _muse_spark(),
        "pythonic": CallSyntax(
            *("<|tool_call_start|>", "<|tool_call_end|>"),
            pythonic,
            separator=", ",
            opening="[",
            closing="]",
        ),
        "qwen3_coder": _qwen3_coder(),
    }
    return syntaxes.get(parser)
