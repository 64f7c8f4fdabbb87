"""The loaded model as everything above MLX sees it, and how it can fail: protocols and errors."""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol

from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.sequence import Grammar, Prompt
from mlxlite.output.events import Detokenizer
from mlxlite.output.grammar import Constraint
from mlxlite.output.markers import Markers


class LoadError(Exception):
    """The model cannot be served; the message is for the operator and says what to do."""


class PromptError(ValueError):
    """The request's messages cannot become a prompt; the message is for the client."""


class ServedModel(Protocol):
    """What is known of the loaded model, and its tokenizer. Safe to use from any thread."""

    @property
    def id(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Changes when the weights or the configuration do: 16 hexadecimal digits."""
        ...

    @property
    def context_size(self) -> int:
        """Most tokens in prompt and output together."""
        ...

    @property
    def num_vocab(self) -> int: ...

    @property
    def eos_tokens(self) -> frozenset[int]: ...

    @property
    def defaults(self) -> SamplingParams:
        """The publisher's sampling settings, for requests that are silent."""
        ...

    @property
    def detokenize(self) -> Detokenizer: ...

    @property
    def markers(self) -> Markers: ...

    @property
    def blind(self) -> str | None:
        """Why it sees no pictures; None: it does."""
        ...

    def knows(self, digest: bytes) -> bool:
        """Whether a picture has been read before, so that its pixels may not be needed again."""
        ...

    def compile(
        self, constraint: Constraint | None, *, is_thinking: bool, budget: int | None = None
    ) -> Grammar:
        """What an answer must match, from where its reasoning ends, after at most `budget` tokens.

        Raises ConstraintError.
        """
        ...

    def parse_calls(
        self, text: str, tools: SequenceOf[Mapping[str, Any]]
    ) -> list[tuple[str, Mapping[str, Any]]]:
        """(name, arguments) of the calls between two markers. Raises ValueError for none."""
        ...

    def encode(self, text: str, *, add_special: bool) -> tuple[int, ...]:
        """A text's token ids. Raises PromptError when it cannot be encoded."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """What one token writes, which need not be whole characters."""
        ...

    def render(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        *,
        is_continuation: bool,
        pictures: SequenceOf[Any] = (),
    ) -> Prompt:
        """Chat messages through the template and the tokenizer. Raises PromptError.

        `pictures` are those of the messages' parts of type image, in their order; for one of these
        it raises `vision.images.ImageError`.
        """
        ...
