"""The loaded model as the code above MLX uses it, and its errors: one protocol, two exceptions."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol

from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.sequence import Grammar, Prompt
from mlxlite.output.detokenizer import Detokenize
from mlxlite.output.formats import OutputFormat
from mlxlite.output.grammar import Constraint


class LoadError(Exception):
    """The model cannot be served; the message is for the operator and names the remedy."""


class PromptError(ValueError):
    """The request's messages cannot become a prompt; the message is for the client."""


class Model(Protocol):
    """A loaded checkpoint without its network. Immutable; safe to use from any thread."""

    @property
    def id(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, for the weights, the configuration and the adapter."""
        ...

    @property
    def context_size(self) -> int:
        """Maximum number of tokens of prompt and output together."""
        ...

    @property
    def num_vocab(self) -> int:
        """Width of the output layer, which may exceed the tokenizer's vocabulary."""
        ...

    @property
    def eos_tokens(self) -> frozenset[int]: ...

    @property
    def defaults(self) -> SamplingParams:
        """The publisher's sampling settings, for the fields that a request leaves out."""
        ...

    @property
    def detokenize(self) -> Detokenize: ...

    @property
    def output_format(self) -> OutputFormat: ...

    @property
    def vision_unavailable_reason(self) -> str | None:
        """Why the model cannot take images; None if it can."""
        ...

    def is_image_cached(self, digest: bytes) -> bool:
        """Whether an image was preprocessed before, so that its pixels may not be needed again."""
        ...

    def compile(
        self, constraint: Constraint | None, *, is_thinking: bool, budget: int | None = None
    ) -> Grammar:
        """The grammar of an answer, which applies after at most `budget` tokens of reasoning.

        Raises ConstraintError.
        """
        ...

    def parse_calls(
        self, text: str, tools: SequenceOf[Mapping[str, Any]]
    ) -> list[tuple[str, Mapping[str, Any]]]:
        """(name, arguments) of the tool calls between two markers. Raises ValueError for none."""
        ...

    def encode(self, text: str, *, add_special: bool) -> tuple[int, ...]:
        """A text's token ids. Raises PromptError when it cannot be encoded."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which need not be whole characters."""
        ...

    def render(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        *,
        is_continuation: bool,
        pictures: SequenceOf[Any] = (),
    ) -> Prompt:
        """Apply the chat template and the tokenizer. Raises PromptError.

        `pictures` are the images of the messages' parts of type image, in order; for one that
        cannot be used it raises `vision.images.ImageError`.
        """
        ...
