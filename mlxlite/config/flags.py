"""What makes a dataclass a command line: each field is a flag, a variable and a line of help.

A field is written once. Its metadata carries the help, the group and the limits; the parser, the
environment variables (``MLXLITE_<FLAG>``), the validation and the README's table are derived from
it. A flag beats the environment, which beats the default. A variable that is set but empty counts
as unset; a flag that is given but empty (``--api-key ""``) is an answer: none.

It decides nothing about which flags there are (`config` does), must never import anything but the
standard library, and never puts a secret into a message. Every `ConfigError` names the flag,
variable or field at fault.
"""

import argparse
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, NoReturn, TypeVar, cast

from mlxlite import __version__

T = TypeVar("T")
ENV_PREFIX = "MLXLITE_"
_BOOLEANS = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}
_SIZE = re.compile(r"(?=.*[1-9])([0-9]{1,15}(?:\.[0-9]+)?)\s*([KMGT]?)B?", re.IGNORECASE)


class ConfigError(ValueError):
    """The configuration cannot work; the message says which flag, variable or field, and why.

    A program that meets one prints it on stderr and exits with `config.USAGE_STATUS`.
    """


def default_text(f: Field[Any]) -> str:
    flag = meta(f)
    if flag.default_text is not None:
        return flag.default_text
    match f.default:
        case None | ():
            return "none"
        case bool():
            return str(f.default).lower()
        case tuple():
            return ",".join(f.default)
        case _:
            return str(f.default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """What a field knows about itself beyond its name, type and default."""

    help: str
    group: str
    metavar: str
    short: str | None = None
    default_text: str | None = None  # how help shows a default that is not a plain value
    env_aliases: tuple[str, ...] = ()  # read after MLXLITE_<FLAG>, in this order
    minimum: float = 0  # no number here can be negative
    maximum: float = math.inf
    choices: tuple[object, ...] = ()
    item: re.Pattern[str] | None = None  # what a text, or each one of a list, must match in full
    item_text: str = ""  # ... in words
    is_secret: bool = False  # never repeat the value


def flag(default: T, group: str, metavar: str, help: str, **more: Any) -> T:
    """A field that is a flag; `more` are further members of `Flag`."""
    known = Flag(group=group, metavar=metavar, help=help, **more)
    return field(default=default, repr=not known.is_secret, metadata={"flag": known})


def size(default: Any, group: str, help: str, **more: Any) -> Any:
    more |= {"item": _SIZE, "item_text": "a size such as 12GB"}
    """A text that is a number of bytes, for `num_bytes`."""
    return flag(default, group, "SIZE", help, **more)


def num_bytes(size: str | None) -> int | None:
    """A number with an optional KB, MB, GB or TB, powers of 1000."""
    if size is None:
        return None
    match = _SIZE.fullmatch(size)
    assert match is not None, "the field's pattern has seen to it"
    number, unit = match.groups()
    return int(float(number) * 1000 ** " KMGT".index(unit.upper() or " "))


# --- a field's names ---


def meta(f: Field[Any]) -> Flag:
    flag = f.metadata["flag"]
    assert isinstance(flag, Flag)
    return flag


def _name(f: Field[Any]) -> str:
    return "--" + f.name.replace("_", "-")


def option_strings(f: Field[Any]) -> tuple[str, ...]:
    short = meta(f).short
    return (_name(f),) if short is None else (short, _name(f))


def env_names(f: Field[Any]) -> tuple[str, ...]:
    return (ENV_PREFIX + f.name.upper(), *meta(f).env_aliases)


def _negation(f: Field[Any]) -> str:
    return "--no-" + _name(f).removeprefix("--")


# --- text → values ---


@dataclass(frozen=True, slots=True)
class _Kind:
    """One type a field may have. `parse` raises `ValueError` for text that is no such value."""

    wants: str
    parse: Callable[[str], object]
    accepts: Callable[[object], bool]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_text_list(value: object) -> bool:
    return isinstance(value, tuple) and all(_is_text(item) for item in value)


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(cast("float", value))


def _parse_bool(raw: str) -> bool:
    value = _BOOLEANS.get(raw.strip().lower())
    if value is None:
        raise ValueError(raw)
    return value


def _parse_list(raw: str) -> tuple[str, ...]:
    return tuple(item for item in (part.strip() for part in raw.split(",")) if item)


# A field's annotation picks its row; a field of another type is our bug, a KeyError in any test.
_KINDS: dict[Any, _Kind] = {
    bool: _Kind("true or false", _parse_bool, lambda value: type(value) is bool),
    int: _Kind("a whole number", int, lambda value: type(value) is int),  # True is no number
    float: _Kind("a finite number", float, _is_finite),
    str: _Kind("text, not empty", str, _is_text),
    str | None: _Kind(
        "text, not empty, or None",
        lambda raw: raw or None,
        lambda value: value is None or _is_text(value),
    ),
    tuple[str, ...]: _Kind("a tuple of strings", _parse_list, _is_text_list),
}


def _convert(f: Field[Any], source: str, raw: str) -> object:
    """The value of a field from text found at `source`; raises `ConfigError` naming the source."""
    kind = _KINDS[f.type]
    try:
        value = kind.parse(raw)
    except ValueError:
        raise ConfigError(f"{source}: must be {kind.wants}{_shown(f, raw)}") from None
    complaint = complaint_of(f, value)
    if complaint is not None:
        raise ConfigError(f"{source}: {complaint}")
    return value


def complaint_of(f: Field[Any], value: Any) -> str | None:
    """What is wrong with a field's value, or None."""
    flag, kind = meta(f), _KINDS[f.type]
    if not kind.accepts(value):
        return f"must be {kind.wants}{_shown(f, value)}"
    if flag.choices and value not in flag.choices:
        return f"must be one of {', '.join(map(str, flag.choices))}{_shown(f, value)}"
    if f.type in (int, float) and not flag.minimum <= value <= flag.maximum:
        limits = f"at least {flag.minimum}"
        if flag.maximum != math.inf:
            limits = f"between {flag.minimum} and {flag.maximum}"
        return f"must be {limits}{_shown(f, value)}"
    if flag.item is not None and value is not None:
        items = (value,) if isinstance(value, str) else value
        bad = next((item for item in items if not flag.item.fullmatch(item)), None)
        return None if bad is None else f"must be {flag.item_text}{_shown(f, bad)}"
    return None


def _shown(f: Field[Any], value: object) -> str:
    return "" if meta(f).is_secret else f", not {value!r}"


# --- the command line and the environment ---


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser(cls: Any) -> _Parser:
    """The parser the fields spell out. It yields text only, and only for flags that were given."""
    parser = _Parser(
        prog="mlxlite",
        usage="mlxlite [--model PATH|ID] [--port PORT] [flag ...]",
        description="Serve an MLX language model over HTTP.",
        epilog="A flag beats its environment variable. A true|false flag may stand alone (true), "
        "take a value, or be negated: --no-enable-continuous-batching.",
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=8),
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in fields(cls):
        flag = meta(f)
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        _add_flag(groups[flag.group], f)
    about = parser.add_argument_group("About")
    about.add_argument("-h", "--help", action="help", help="show this and exit")
    about.add_argument(
        "--version", action="version", version=f"mlxlite {__version__}", help="show it and exit"
    )
    return parser


def _add_flag(group: argparse._ArgumentGroup, f: Field[Any]) -> None:
    flag = meta(f)
    text = f"{flag.help} (default: {default_text(f)}; env: {', '.join(env_names(f))})"
    options: dict[str, Any] = {"dest": f.name, "metavar": flag.metavar}
    if f.type is bool:
        options |= {"nargs": "?", "const": "true"}
        group.add_argument(
            _negation(f), dest=f.name, action="store_const", const="false", help=argparse.SUPPRESS
        )
    if f.type == tuple[str, ...]:
        options |= {"action": "append"}
    group.add_argument(*option_strings(f), help=text.replace("%", "%%"), **options)


def values_of(cls: Any, argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a dataclass that a command line and an environment give. Raises `ConfigError`.

    `SystemExit(0)` after ``--help`` or ``--version``.
    """
    values: dict[str, Any] = {}
    given = _read_argv(cls, argv)
    for f in fields(cls):
        found = _flag_text(f, given) or _env_text(f, environ)
        if found is not None:
            source, raw = found
            values[f.name] = _convert(f, source, raw)
    return values


def _read_argv(cls: Any, argv: Sequence[str]) -> dict[str, Any]:
    """The text given for each field on the command line: a string, or a list of them."""
    given, rest = _parser(cls).parse_known_args(_attach_values(cls, argv))
    if rest:
        # Only the name: what follows an equals sign may be a key.
        unknown = next((arg.partition("=")[0] for arg in rest if arg.startswith("-")), None)
        if unknown is None:
            raise ConfigError(f"unexpected argument {rest[0]!r}")
        import difflib  # for this line alone

        near = difflib.get_close_matches(unknown, _all_option_strings(cls), n=1)
        raise ConfigError(
            f"unknown flag {unknown}" + (f"; did you mean {near[0]}?" if near else "")
        )
    return vars(given)


def _attach_values(cls: Any, argv: Sequence[str]) -> list[str]:
    """`argv` with each value that begins with a dash, as a random key may, tied to its flag."""
    takes_value = {o for f in fields(cls) if f.type is not bool for o in option_strings(f)}
    known = _all_option_strings(cls)
    attached: list[str] = []
    for arg in argv:
        is_odd_value = re.match(r"-[^-]", arg) is not None and arg not in known
        if is_odd_value and attached and attached[-1] in takes_value:
            attached[-1] += "=" + arg
        else:
            attached.append(arg)
    return attached


def _all_option_strings(cls: Any) -> set[str]:
    strings = {"-h", "--help", "--version"}
    for f in fields(cls):
        strings.update(option_strings(f))
        if f.type is bool:
            strings.add(_negation(f))
    return strings


def _flag_text(f: Field[Any], given: Mapping[str, Any]) -> tuple[str, str] | None:
    """The flag and the text that was given with it, or None; a list's repetitions are joined."""
    if f.name not in given:
        return None
    raw = given[f.name]
    return _name(f), raw if isinstance(raw, str) else ",".join(raw)


def _env_text(f: Field[Any], environ: Mapping[str, str]) -> tuple[str, str] | None:
    return next(((name, environ[name]) for name in env_names(f) if environ.get(name)), None)
