"""Output formats: how a model marks reasoning and tool calls in its text.

A model has one `OutputFormat`; no other code depends on which one it is. A format is one file: a
class with these members, and its parser. A new one is named in `format_of`, which chooses by a
tokenizer's added tokens, then by mlx-lm's markers, then by what the chat template renders.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from mlxlite.output.bare_calls import BareFormat
from mlxlite.output.call_forms import CallForm
from mlxlite.output.call_syntax import CallSyntax
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
    def syntax(self) -> CallSyntax | None:
        """How calls are written, for a grammar; None if that is not known."""

    def starts_in_reasoning(self, prompt: str) -> bool:
        """True if a rendered prompt ends inside a block of reasoning."""

    def prepare(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A message with the fields that the format's templates read."""

    def parser(self, options: ParserOptions) -> OutputParser: ...


def format_of(
    added_tokens: Collection[str], markers: MarkerFormat, form: CallForm | None = None
) -> OutputFormat:
    """The format of a tokenizer with these added tokens; `markers` where none is recognised.

    `form` is how the template writes calls that have no markers known to mlx-lm. JSON calls are
    read without their marks too: Qwen2.5-Coder has Qwen's template, and writes fences.
    """
    if HarmonyFormat.matches(added_tokens):
        return HarmonyFormat()
    if markers.has_json_calls:
        return BareFormat(markers, markers.syntax)
    return markers if form is None else form.format(markers)
