"""POST /v1/completions: OpenAI's text completion, of one or several prompts."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

from mlxlite.api import writers
from mlxlite.api.constraints import CONSTRAINT_FIELDS, take_constraints
from mlxlite.api.endpoint import Endpoint
from mlxlite.api.fields import Table, reading, required, supported, unsupported
from mlxlite.api.generate import Dialect
from mlxlite.api.readers import Text, flag, integer, parse_object, texts
from mlxlite.api.render import encode
from mlxlite.api.request import Request, shared_options, sole_constraint
from mlxlite.api.service import Service
from mlxlite.api.shared_fields import COMPLETION_FIELDS, UNSUPPORTED_FIELDS
from mlxlite.config.options import Config
from mlxlite.engine.sequence import Logprobs, Prompt
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import bad_request
from mlxlite.models.interface import Model
from mlxlite.output.events import ParserEvent, TextDelta

MAX_COMPLETION_LOGPROBS = 20  # OpenAI's bound is 5, vLLM's 20

FIELDS: Final[Table] = {
    "prompt": required(texts, "a string, token ids, or up to 256 of either"),
    **COMPLETION_FIELDS,
    **CONSTRAINT_FIELDS,
    "logprobs": supported(integer(0, MAX_COMPLETION_LOGPROBS), "how many rivals to report"),
    "echo": supported(flag, "the prompt's text first; not together with `logprobs`"),
    "best_of": unsupported(1, note="only 1"),
    "suffix": unsupported("", note="no fill-in-the-middle"),
    **UNSUPPORTED_FIELDS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(Request):
    """A request for completions. The choices of prompt i are n·i to n·i + n - 1.

    `echoes` are the texts that the choices begin with, one for each prompt.
    """

    prompt_field: ClassVar[str] = "prompt"
    prompts: tuple[Text, ...]
    is_echo: bool = False
    echoes: tuple[str, ...] = ()


def parse_completion(body: bytes) -> CompletionRequest:
    """Validate a completion's body. Raises APIError 400 naming the field at fault."""
    with reading(parse_object(body), FIELDS) as given:
        options = shared_options(given)
        is_echo, num_logprobs = given.take("echo", False), given.take("logprobs")
        if is_echo and num_logprobs is not None:
            message = "'echo' cannot have 'logprobs': those of a prompt are not computed."
            raise bad_request(message, "echo")
        if num_logprobs is not None:
            options["sampling"]["top_logprobs"] = num_logprobs
        return CompletionRequest(
            **options,
            constraint=sole_constraint(options, take_constraints(given)),
            prompts=given.take("prompt"),
            is_echo=is_echo,
            ignored=given.ignored,
        )


def _with_echoes(
    service: Service, _exchange: Exchange, request: CompletionRequest
) -> CompletionRequest:
    model = service.need_model().model
    if not request.is_echo:
        return replace(request, echoes=("",) * len(request.prompts))
    echoes = (
        text if isinstance(text, str) else model.detokenize(*encode(model, [text], "prompt"))
        for text in request.prompts
    )
    return replace(request, echoes=tuple(echoes))


def _render(model: Model, request: CompletionRequest, _config: Config) -> list[Prompt]:
    return [Prompt(tokens) for tokens in encode(model, request.prompts, "prompt")]


class CompletionWriter(writers.OpenAIWriter):
    """A text completion; `echoes` are the texts that the choices begin with."""

    object_name = chunk_name = "text_completion"

    def __init__(
        self,
        envelope: writers.Envelope,
        token_bytes: writers.TokenBytes,
        options: writers.StreamOptions,
        *,
        echoes: Sequence[str],
    ) -> None:
        super().__init__(envelope, token_bytes, options, num_choices=len(echoes))
        self._echoes = echoes
        # The offset of the next token's text; a decoder holds an incomplete character.
        self._num_chars = [len(echo) for echo in echoes]
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in echoes]

    def begin(self) -> bytes:
        chunks = (self._chunk(i, {"text": echo}) for i, echo in enumerate(self._echoes) if echo)
        return b"".join(map(writers.frame, chunks))

    def _choice_delta(self, index: int, event: ParserEvent | None) -> dict[str, Any]:
        return {"text": event.text if isinstance(event, TextDelta) else ""}

    def _logprobs(self, index: int, drawn: Sequence[tuple[int, Logprobs]]) -> dict[str, Any]:
        """The legacy form: parallel lists, with each token's place in the text."""
        offsets = []
        for token, _ in drawn:
            offsets.append(self._num_chars[index])
            self._num_chars[index] += len(self._decoders[index].decode(self._token_bytes(token)))
        return {
            "tokens": [self._spell(token) for token, _ in drawn],
            "token_logprobs": [max(item.drawn, writers.MIN_LOGPROB) for _, item in drawn],
            "top_logprobs": [
                {self._spell(token): max(value, writers.MIN_LOGPROB) for token, value in item.top}
                for _, item in drawn
            ],
            "text_offset": offsets,
        }

    def _spell(self, token: int) -> str:
        return self._token_bytes(token).decode("utf-8", "replace")

    def _content(self, index: int, choice: writers.Collected) -> dict[str, Any]:
        return {"text": self._echoes[index] + choice.text}


def _writer(
    envelope: writers.Envelope, request: CompletionRequest, model: Model, _prompts: Sequence[Prompt]
) -> CompletionWriter:
    echoes = [echo for echo in request.echoes for _ in range(request.num_choices)]
    return CompletionWriter(envelope, model.token_bytes, request.stream_options, echoes=echoes)


ENDPOINTS: Final = (
    Endpoint(
        "POST",
        "/v1/completions",
        "A text completion",
        Dialect(
            parse=parse_completion,
            writer=_writer,
            id_prefix="cmpl-",
            prompt_field="prompt",
            render=_render,
            resume=_with_echoes,
        ).handle,
        FIELDS,
        answer_schema="Completion",
    ),
)
