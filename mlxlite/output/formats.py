"""Output formats: how a model marks reasoning and tool calls in its text.

A model has one `OutputFormat`; no other code depends on which one it is. A format is one file: a
class with these members, and its parser. A new one is named in `format_of`, which chooses by a
tokenizer's added tokens.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from mlxlite.output.harmony import HarmonyFormat
from mlxlite.output.markers import MarkerFormat
from mlxlite.output.parser import OutputParser, ParserOptions


class OutputFormat(Protocol):
    """Stateless, and safe to use from any thread."""

    @property
    def marks(self) -> Collection[str]:
        """Texts whose special tokens stay in an answer's text, for the parser."""

    @property
    def can_call_tools(self) -> bool: ...

    @property
    def has_json_calls(self) -> bool:
        """True if a call is one JSON object between two markers, which a grammar can enforce."""

    def starts_in_reasoning(self, prompt: str) -> bool:
        """True if a rendered prompt ends inside a block of reasoning."""

    def prepare(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A message with the fields that the format's templates read."""

    def parser(self, options: ParserOptions) -> OutputParser: ...


def format_of(added_tokens: Collection[str], markers: MarkerFormat) -> OutputFormat:
    """The format of a tokenizer with these added tokens; `markers` where none is recognised."""
    return HarmonyFormat() if HarmonyFormat.matches(added_tokens) else markers
