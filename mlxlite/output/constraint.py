"""Constraints on an answer, as requests ask for them: a text's form, tools to call, or either."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum


class Kind(Enum):
    """How a constraint is written."""

    JSON = "json"  # a JSON Schema
    REGEX = "regex"
    CHOICE = "choice"  # a JSON array of strings
    GRAMMAR = "grammar"  # GBNF or Lark


@dataclass(frozen=True, slots=True)
class TextConstraint:
    """A schema, expression or grammar that an answer must match, as llguidance reads it."""

    kind: Kind
    text: str
    path: str = field(default="", compare=False)  # of a schema, in the request

    @property
    def num_chars(self) -> int:
        return len(self.text)

    def schemas(self) -> Iterator[tuple[str, str]]:
        """The JSON Schemas in it, each with its path."""
        if self.kind is Kind.JSON:
            yield self.text, self.path

    def with_schemas(self, texts: Iterator[str]) -> "TextConstraint":
        return replace(self, text=next(texts)) if self.kind is Kind.JSON else self


@dataclass(frozen=True, slots=True)
class ToolSchema:
    """A tool's name, and the JSON Schema of its arguments as text."""

    name: str
    parameters: str
    path: str = field(default="", compare=False)  # of the schema, in the request


@dataclass(frozen=True, slots=True)
class CallConstraint:
    """Calls of these tools: one or more, or after any text where they are not forced.

    With an `answer` it is calls alone, or a text that matches. `strict` are the fields that ask for
    arguments to match where no call is forced.
    """

    tools: tuple[ToolSchema, ...]
    is_single: bool = False
    is_forced: bool = True
    answer: TextConstraint | None = None
    strict: tuple[str, ...] = field(default=(), compare=False)

    @property
    def num_chars(self) -> int:
        num = sum(len(tool.name) + len(tool.parameters) for tool in self.tools)
        return num + (self.answer.num_chars if self.answer is not None else 0)

    def schemas(self) -> Iterator[tuple[str, str]]:
        """The JSON Schemas in it, each with its path."""
        yield from ((tool.parameters, tool.path) for tool in self.tools)
        if self.answer is not None:
            yield from self.answer.schemas()

    def with_schemas(self, texts: Iterator[str]) -> "CallConstraint":
        tools = tuple(replace(tool, parameters=next(texts)) for tool in self.tools)
        answer = self.answer.with_schemas(texts) if self.answer is not None else None
        return replace(self, tools=tools, answer=answer)

    def unenforced(self) -> "CallConstraint | None":
        """The same without what `strict` asks for; None if nothing is left to enforce."""
        if self.answer is None:
            return None
        tools = tuple(replace(tool, parameters=ANY_ARGUMENTS) for tool in self.tools)
        return replace(self, tools=tools, strict=())


Constraint = TextConstraint | CallConstraint
ANY_ARGUMENTS = '{"type":"object"}'


class ConstraintError(ValueError):
    """A constraint cannot be enforced; the message is for the client."""
