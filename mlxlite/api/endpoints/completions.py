"""POST /v1/completions: OpenAI's text completion, of one or several prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

from mlxlite.api import writers
from mlxlite.api.constraints import CONSTRAINT_FIELDS, take_constraints
from mlxlite.api.endpoint import Endpoint
from mlxlite.api.fields import Table, no_op, reading, required, supported, unsupported
from mlxlite.api.fill_in import fill_in_tokens
from mlxlite.api.generate import Dialect
from mlxlite.api.likelihoods import EchoedPrompt, Offsets, as_text, legacy, token_id
from mlxlite.api.readers import Text, flag, integer, parse_object, text, texts
from mlxlite.api.render import encode, last_tokens
from mlxlite.api.request import Request, checked, shared_options, sole_constraint
from mlxlite.api.service import Service
from mlxlite.api.shared_fields import COMPLETION_FIELDS, UNSUPPORTED_FIELDS
from mlxlite.config.options import Config
from mlxlite.engine.sequence import Logprobs, Prompt, PromptLogprobs
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import bad_request
from mlxlite.models.interface import Model
from mlxlite.output.events import ParserEvent, TextDelta

MAX_COMPLETION_LOGPROBS = 20  # OpenAI's bound is 5, vLLM's 20

NO_LIMIT = 2**31 - 1  # output tokens
_MAX_TOKENS_NOTE = (
    "-1: what is left of the context; 0 only for a prompt's likelihoods; "
    "default 16, as OpenAI's, or `--max-tokens`"
)

FIELDS: Final[Table] = {
    "prompt": required(texts, "a string, token ids, or up to 256 of either"),
    **COMPLETION_FIELDS,
    "max_tokens": replace(COMPLETION_FIELDS["max_tokens"], note=_MAX_TOKENS_NOTE),
    **CONSTRAINT_FIELDS,
    "logprobs": supported(integer(0, MAX_COMPLETION_LOGPROBS), "how many rivals to report"),
    "n_probs": supported(integer(0, MAX_COMPLETION_LOGPROBS), "llama-server's; 0 is off"),
    "include_reasoning": no_op(flag, "a text has none"),
    "echo": supported(flag, "the prompt's text first, with `logprobs` its tokens too"),
    "best_of": unsupported(1, note="only 1"),
    "suffix": supported(text, "what follows the answer, where the tokenizer has marks for it"),
    **UNSUPPORTED_FIELDS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(Request):
    """A request for completions. The choices of prompt i are n·i to n·i + n - 1.

    `echoes` are the texts that the choices begin with, one for each prompt.
    """

    prompt_field: ClassVar[str] = "prompt"
    default_max_tokens: ClassVar[int | None] = 16  # OpenAI's
    prompts: tuple[Text, ...]
    is_echo: bool = False
    echoes: tuple[str, ...] = ()
    suffix: str = ""

    @property
    def prompt_top(self) -> int | None:
        wanted = [self.prompt_logprobs, self.sampling.get("top_logprobs") if self.is_echo else None]
        return max((num for num in wanted if num is not None), default=None)

    @property
    def fills_in(self) -> bool:
        return bool(self.suffix)

    @property
    def reports_end(self) -> bool:
        return self.is_echo  # lm-evaluation-harness drops the last token, whatever it is


def parse_completion(body: bytes) -> CompletionRequest:
    """Validate a completion's body. Raises APIError 400 naming the field at fault."""
    with reading(parse_object(body), FIELDS) as given:
        has_limit = "max_tokens" in given  # -1, llama-server's «no limit», too
        options = shared_options(given)
        if has_limit and options["max_tokens"] is None:
            options["max_tokens"] = NO_LIMIT
        is_echo = given.take("echo", False)
        wanted = [given.take("logprobs"), given.take("n_probs") or None]
        if numbers := [num for num in wanted if num is not None]:
            options["sampling"]["top_logprobs"] = max(numbers)
        num_top = options["sampling"].get("top_logprobs")
        request = CompletionRequest(
            **options,
            constraint=sole_constraint(options, take_constraints(given)),
            prompts=given.take("prompt"),
            is_echo=is_echo,
            suffix=given.take("suffix", ""),
            ignored=given.ignored,
        )
    if request.suffix and is_echo and num_top is not None:
        message = "'suffix': an echo's logprobs are of a prompt that is not the text."
        raise bad_request(message, "suffix")
    return checked(request)


def _with_echoes(
    service: Service, _exchange: Exchange, request: CompletionRequest
) -> CompletionRequest:
    model = service.need_model().model
    if not request.is_echo:
        return replace(request, echoes=("",) * len(request.prompts))
    detokenize = model.detokenize_all if request.shows_special else model.detokenize
    echoes: list[str] = []
    for prompt in request.prompts:
        if isinstance(prompt, str) and request.num_last is None:
            echoes.append(prompt)
        else:
            (tokens,) = encode(model, [prompt], "prompt")
            echoes.append(detokenize(last_tokens(tokens, request.num_last, model.context_size)))
    return replace(request, echoes=tuple(echoes))


def _render(model: Model, request: CompletionRequest, _config: Config) -> list[Prompt]:
    suffix, prompts = request.suffix, request.prompts
    if not suffix:
        return [Prompt(tokens) for tokens in encode(model, prompts, "prompt")]
    encode(model, [ids for ids in prompts if not isinstance(ids, str)], "prompt")
    return [Prompt(fill_in_tokens(model, prefix, suffix, "suffix")) for prefix in prompts]


class CompletionWriter(writers.OpenAIWriter):
    """A text completion; `echoes` are the texts that the choices begin with.

    With `echoed` their logprobs begin with those of the prompts, one for each choice.
    """

    object_name = chunk_name = "text_completion"

    def __init__(
        self,
        *args: Any,
        echoes: Sequence[str],
        echoed: Sequence[EchoedPrompt] = (),
        **rest: Any,
    ) -> None:
        super().__init__(*args, num_choices=len(echoes), **rest)
        self._echoes = echoes
        self._echoed = echoed
        self._offsets = [Offsets(len(echo)) for echo in echoes]

    def begin(self) -> bytes:
        """An echo, and the logprobs of its first token, which has none; or the prompt's ids."""
        frames: list[bytes] = []
        for i, echo in enumerate(self._echoes):
            if not (echo or self._echoed or self._prompt_tokens):
                continue
            chunk = self._first_chunk(i, {"text": echo})
            if self._echoed:
                chunk["choices"][0]["logprobs"] = self._echoed[i].json()
            frames.append(writers.frame(chunk))
        return b"".join(frames)

    def _prompt(self, index: int, part: PromptLogprobs) -> bytes:
        """A frame with the logprobs of an echo's next tokens; a whole answer keeps them."""
        super()._prompt(index, part)
        if not self._echoed:
            return b""
        offsets = self._echoed[index].offsets.of((t for t, _ in part.tokens), self._token_bytes)
        lists = legacy(part.tokens, self._spell, offsets)
        self._echoed[index].extend(lists)
        chunk = self._chunk(index, {"text": ""})
        chunk["choices"][0]["logprobs"] = lists
        return writers.frame(chunk)

    def _prompt_ids_place(self, answer: dict[str, Any]) -> dict[str, Any]:
        place: dict[str, Any] = answer["choices"][0]
        return place

    def _choice_delta(self, index: int, event: ParserEvent | None) -> dict[str, Any]:
        return {"text": event.text if isinstance(event, TextDelta) else ""}

    def _logprobs(self, index: int, drawn: Sequence[tuple[int, Logprobs]]) -> dict[str, Any]:
        """The legacy form: parallel lists, with each token's place in the text."""
        offsets = self._offsets[index].of((token for token, _ in drawn), self._token_bytes)
        return legacy(drawn, self._spell, offsets)

    def _spell(self, token: int) -> str:
        return token_id(token) if self._has_ids else as_text(token, self._token_bytes)

    def _content(self, index: int, choice: writers.Collected) -> dict[str, Any]:
        content: dict[str, Any] = {"text": self._echoes[index] + choice.text}
        first = index - index % self._num_per_prompt
        if self._has_prompt_logprobs:
            content["prompt_logprobs"] = self._prompts[first].json()
        if self._returns_tokens:
            content["prompt_token_ids"] = self._prompt_tokens[index // self._num_per_prompt]
        return content

    def _whole(self, index: int, choice: writers.Collected) -> dict[str, Any]:
        whole = super()._whole(index, choice)
        if self._echoed:
            echoed = self._echoed[index - index % self._num_per_prompt]
            whole["logprobs"] = echoed.with_more(whole["logprobs"] or {})
        return whole


def _writer(
    envelope: writers.Envelope, request: CompletionRequest, model: Model, prompts: Sequence[Prompt]
) -> CompletionWriter:
    echoes = [echo for echo in request.echoes for _ in range(request.num_choices)]
    echoed: list[EchoedPrompt] = []
    if request.is_echo and request.has_logprobs:
        echoed = [
            EchoedPrompt.of(
                prompt.tokens[0], echo, model.token_bytes, model.detokenize, has_ids=request.has_ids
            )
            for prompt, echo in zip(prompts, request.echoes, strict=True)
            for _ in range(request.num_choices)
        ]
    return CompletionWriter(
        envelope,
        model.token_bytes,
        request.stream_options,
        echoes=echoes,
        echoed=echoed,
        **request.writer_options(prompts),
    )


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
