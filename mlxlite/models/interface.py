"""The loaded model as the code above MLX uses it: one protocol, and its exceptions."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol

from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.sequence import Grammar, Prompt
from mlxlite.output.constraint import Constraint
from mlxlite.output.formats import OutputFormat
from mlxlite.vision.fetch import Limits
from mlxlite.vision.images import LoadedImage, Source


class LoadError(Exception):
    """The model cannot be served; the message is for the operator and names the remedy."""


class PromptError(ValueError):
    """The request's messages cannot become a prompt; the message is for the client."""


class PromptTooLong(PromptError):
    """A text has more tokens than the context: at least `num_tokens`, counted in part."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"the prompt has at least {num_tokens} tokens")
        self.num_tokens = num_tokens


class CompiledGrammar(Grammar, Protocol):
    """A grammar, and what of its constraint it does not enforce: paths and keywords."""

    @property
    def left_out(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class FillMarks:
    """The tokens around the parts of a prompt whose middle is to be filled in.

    `ends` end such an answer too; `file` and `repository` precede the names of other files.
    """

    prefix: int
    suffix: int
    middle: int
    ends: frozenset[int] = frozenset()
    file: int | None = None
    repository: int | None = None


class Model(Protocol):
    """A loaded checkpoint without its network. Immutable; safe to use from any thread."""

    id: str
    fingerprint: str  # 16 hexadecimal digits, for the weights, the configuration and the adapter
    context_size: int  # most tokens of prompt and output together
    max_chars: int  # of a text: a longer one is PromptTooLong
    num_vocab: int  # width of the output layer, which may exceed the tokenizer's vocabulary
    eos_tokens: frozenset[int]
    defaults: SamplingParams  # the publisher's, for the fields that a request leaves out
    output_format: OutputFormat
    fill_marks: FillMarks | None  # None if the model fills in no middle
    vision_unavailable_reason: str | None  # None if the model takes images

    def load_images(
        self,
        sources: SequenceOf[Source],
        limits: Limits,
        is_needed: Callable[[Source], bool],
    ) -> tuple[LoadedImage | None, ...]:
        """A request's images, decoded unless they were preprocessed before. Blocks.

        None in place of one that cannot be used and is not needed. Only of a model that takes
        images. Raises `vision.images.ImageError`, Dropped.
        """

    def close(self) -> None:
        """End the processes that decode images."""

    def compile(
        self, constraint: Constraint | None, *, is_thinking: bool, budget: int | None = None
    ) -> CompiledGrammar:
        """The grammar of an answer, which applies after at most `budget` tokens of reasoning.

        Raises ConstraintError.
        """

    def is_compiled(self, constraint: Constraint) -> bool:
        """Whether a grammar was compiled lately, so that `compile` is quick."""

    def parse_calls(
        self, text: str, tools: SequenceOf[Mapping[str, Any]]
    ) -> list[tuple[str, Mapping[str, Any]]]:
        """(name, arguments) of the calls between two markers. Raises `markers.PARSE_ERRORS`."""

    def detokenize(self, tokens: SequenceOf[int]) -> str:
        """The text of token ids, without special tokens; "" for ids without a text."""

    def detokenize_all(self, tokens: SequenceOf[int]) -> str:
        """The text of token ids, with the names of special tokens."""

    def encode(self, text: str, *, add_special: bool) -> tuple[int, ...]:
        """A text's token ids. Raises PromptError when it cannot be encoded, PromptTooLong."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which need not be whole characters."""

    def render(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        *,
        is_continuation: bool,
        pictures: SequenceOf[Any] = (),
    ) -> Prompt:
        """Apply the chat template and the tokenizer. Raises PromptError, PromptTooLong.

        `pictures` are the images of the messages' parts of type image, in order; for one that
        cannot be used it raises `vision.images.ImageError`.
        """
