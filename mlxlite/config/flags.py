"""A dataclass as a command line: each field is a flag, an environment variable, a line of help.

A field is written once. Its metadata holds the help and the limits; the parser, the environment
variables (``MLXLITE_<FLAG>``), the validation and the table for the README are derived from it. A
flag beats the environment, which beats the default. An empty variable counts as unset; an empty
value of a flag (``--api-key ""``) counts as given.

Which flags exist is decided in `options`. Must never: import anything but the standard library, or
put a secret into a message. Every `ConfigError` names the flag, variable or field at fault.
"""

import argparse
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, NoReturn, TypeVar

from mlxlite import __version__

T = TypeVar("T")

ENV_PREFIX = "MLXLITE_"
_BOOLEANS = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}
_SIZE = re.compile(r"(?=.*[1-9])([0-9]{1,15}(?:\.[0-9]+)?)\s*([KMGT]?)B?", re.IGNORECASE)


class ConfigError(ValueError):
    """The configuration cannot work; the message names the flag, variable or field, and the reason.

    A program prints it on stderr and exits with `options.USAGE_STATUS`.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """What a field declares beyond its name, type and default."""

    help: str
    metavar: str
    heading: str | None = None  # of the group that begins with this flag
    short: str | None = None
    default_text: str | None = None  # how help shows a default that is not a plain value
    env_aliases: tuple[str, ...] = ()  # read after MLXLITE_<FLAG>, in this order
    minimum: float = 0  # no number here can be negative
    maximum: float = math.inf
    choices: tuple[object, ...] = ()
    pattern: re.Pattern[str] | None = None  # of a text, or of each item of a list, in full
    pattern_text: str = ""  # ... in words
    is_secret: bool = False  # messages and reprs leave out the value


def flag(default: T, metavar: str, help: str, **more: Any) -> T:
    """A field that is a flag; `more` are further members of `Flag`."""
    known = Flag(metavar=metavar, help=help, **more)
    return field(default=default, repr=not known.is_secret, metadata={"flag": known})


def switch(default: bool, help: str, **more: Any) -> bool:
    return flag(default, "true|false", help, **more)


def size(default: Any, help: str, **more: Any) -> Any:
    """A field whose text is a number of bytes, for `num_bytes`."""
    return flag(default, "SIZE", help, pattern=_SIZE, pattern_text="a size such as 12GB", **more)


def num_bytes(size: str | None) -> int | None:
    """The value of a `size`: a number with an optional KB, MB, GB or TB, powers of 1000."""
    if size is None:
        return None
    match = _SIZE.fullmatch(size)
    assert match is not None, "the field's pattern has been checked"
    number, unit = match.groups()
    return int(float(number) * 1000 ** " KMGT".index(unit.upper() or " "))


# --- a field's names ---


def meta(f: Field[Any]) -> Flag:
    flag: Flag = f.metadata["flag"]
    return flag


def _name(f: Field[Any]) -> str:
    return "--" + f.name.replace("_", "-")


def option_strings(f: Field[Any]) -> tuple[str, ...]:
    short = meta(f).short
    return (_name(f),) if short is None else (short, _name(f))


def env_names(f: Field[Any]) -> tuple[str, ...]:
    return (ENV_PREFIX + f.name.upper(), *meta(f).env_aliases)


def _negations(f: Field[Any]) -> tuple[str, ...]:
    return ("--no-" + _name(f).removeprefix("--"),) if f.type is bool else ()


def default_text(f: Field[Any]) -> str:
    text = meta(f).default_text
    if text is not None:
        return text
    if f.default in (None, ()):
        return "none"
    if isinstance(f.default, tuple):
        return ",".join(f.default)
    return str(f.default).lower() if f.type is bool else str(f.default)


# --- values ---


@dataclass(frozen=True, slots=True)
class _Kind:
    """A type of field. `read` makes a value of text, or raises `ValueError`."""

    wants: str
    types: tuple[type, ...]
    read: Callable[[str], object]


def _read_bool(raw: str) -> bool:
    value = _BOOLEANS.get(raw.strip().lower())
    if value is None:
        raise ValueError(raw)
    return value


def _read_list(raw: str) -> tuple[str, ...]:
    return tuple(item for item in (part.strip() for part in raw.split(",")) if item)


# The keys are annotations; a field of another type is our bug, a KeyError in any test.
_KINDS: dict[Any, _Kind] = {
    bool: _Kind("true or false", (bool,), _read_bool),
    int: _Kind("a whole number", (int,), int),
    float: _Kind("a finite number", (int, float), float),
    str: _Kind("text, not empty", (str,), str),
    str | None: _Kind("text, not empty, or None", (str, type(None)), lambda raw: raw or None),
    tuple[str, ...]: _Kind("a tuple of strings", (tuple,), _read_list),
}


def _has_type(value: object, types: tuple[type, ...]) -> bool:
    """False also for empty text and numbers that are not finite; a bool is not a number here."""
    if not isinstance(value, types) or isinstance(value, bool) != (types == (bool,)):
        return False
    if isinstance(value, tuple):
        return all(_has_type(item, (str,)) for item in value)
    return value != "" and not (isinstance(value, float) and not math.isfinite(value))


def complaint_of(f: Field[Any], value: Any) -> str | None:
    """What is wrong with a field's value, or None."""
    flag, kind, wants = meta(f), _KINDS[f.type], ""
    if not _has_type(value, kind.types):
        wants = kind.wants
    elif flag.choices and value not in flag.choices:
        wants = f"one of {', '.join(map(str, flag.choices))}"
    elif f.type in (int, float) and not flag.minimum <= value <= flag.maximum:
        wants = f"at least {flag.minimum}"
        if flag.maximum != math.inf:
            wants = f"between {flag.minimum} and {flag.maximum}"
    elif flag.pattern is not None and value is not None:
        items = (value,) if isinstance(value, str) else value
        value = next((item for item in items if not flag.pattern.fullmatch(item)), None)
        wants = "" if value is None else flag.pattern_text
    shown = "" if flag.is_secret else f", not {value!r}"
    return f"must be {wants}{shown}" if wants else None


def _value_of(f: Field[Any], source: str, raw: str) -> object:
    """The value of a field from the text of its flag or variable, which is the `source`."""
    try:
        value = _KINDS[f.type].read(raw)
    except ValueError:
        value = raw  # `complaint_of` refuses its type
    complaint = complaint_of(f, value)
    if complaint is not None:
        raise ConfigError(f"{source}: {complaint}")
    return value


# --- the command line and the environment ---


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parser(cls: Any) -> _Parser:
    """The parser of the fields' flags. It returns text, and only for flags that are given.

    Flags and variables are converted alike, by `_value_of`. With argparse's `type`, a bad value
    would be an error even where `--help` follows or the same flag with a good one.
    """
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
    for f in fields(cls):
        if meta(f).heading:
            group = parser.add_argument_group(meta(f).heading)
        _add_flag(group, f)
    about = parser.add_argument_group("About")
    about.add_argument("-h", "--help", action="help", help="show this and exit")
    version = f"mlxlite {__version__}"
    about.add_argument("--version", action="version", version=version, help="show it and exit")
    return parser


def _add_flag(group: argparse._ArgumentGroup, f: Field[Any]) -> None:
    flag = meta(f)
    text = f"{flag.help} (default: {default_text(f)}; env: {', '.join(env_names(f))})"
    options: dict[str, Any] = {"dest": f.name, "metavar": flag.metavar}
    if f.type is bool:
        options |= {"nargs": "?", "const": "true"}
    if f.type == tuple[str, ...]:
        options |= {"action": "append"}
    for name in _negations(f):
        group.add_argument(
            name, dest=f.name, action="store_const", const="false", help=argparse.SUPPRESS
        )
    group.add_argument(*option_strings(f), help=text.replace("%", "%%"), **options)


def values_of(cls: Any, argv: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """The values of a dataclass's fields that a command line and an environment give.

    Raises `ConfigError`, and `SystemExit(0)` after ``--help`` or ``--version``.
    """
    values: dict[str, Any] = {}
    given = _read_argv(cls, argv)
    for f in fields(cls):
        sources = {_name(f): given.get(f.name)}
        sources |= {name: environ.get(name) or None for name in env_names(f)}
        for source, raw in sources.items():
            if raw is not None:
                values[f.name] = _value_of(f, source, raw)
                break
    return values


def _read_argv(cls: Any, argv: Sequence[str]) -> dict[str, str]:
    """The text given for each field on the command line; a list's repetitions are joined."""
    known = {"-h", "--help", "--version"}
    known.update(o for f in fields(cls) for o in (*option_strings(f), *_negations(f)))
    given, rest = _parser(cls).parse_known_args(_attach_values(cls, argv, known))
    # Only the name: the text after an equals sign may be a key.
    unknown = next((arg.partition("=")[0] for arg in rest if arg.startswith("-")), None)
    if unknown is not None:
        import difflib  # for this line alone

        near = difflib.get_close_matches(unknown, known, n=1)
        raise ConfigError(f"unknown flag {unknown}" + "".join(f"; did you mean {n}?" for n in near))
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}")
    return {
        name: raw if isinstance(raw, str) else ",".join(raw) for name, raw in vars(given).items()
    }


def _attach_values(cls: Any, argv: Sequence[str], known: Collection[str]) -> list[str]:
    """`argv` with each value that begins with a dash, as a random key may, tied to its flag."""
    takes_value = {o for f in fields(cls) if f.type is not bool for o in option_strings(f)}
    attached: list[str] = []
    for arg in argv:
        is_odd_value = re.match(r"-[^-]", arg) is not None and arg not in known
        if is_odd_value and attached and attached[-1] in takes_value:
            attached[-1] += "=" + arg
        else:
            attached.append(arg)
    return attached
