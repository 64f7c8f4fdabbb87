"""POST /infill: llama-server's middle of a file, for editors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import orjson

from mlxlite.api import writers
from mlxlite.api.endpoint import Endpoint
from mlxlite.api.fields import Table, aliases, no_op, reading, supported
from mlxlite.api.fill_in import fill_in_tokens
from mlxlite.api.generate import Dialect
from mlxlite.api.readers import array, integer, members, parse_object, text
from mlxlite.api.request import Request, shared_options
from mlxlite.api.shared_fields import GENERATION_FIELDS, MAX_TOKENS, STOP, UNSUPPORTED_FIELDS
from mlxlite.config.options import Config
from mlxlite.engine.sequence import FinishReason, Prompt, Usage
from mlxlite.http.errors import APIError, bad_request
from mlxlite.http.sse import sse_comment, sse_data
from mlxlite.models.interface import Model
from mlxlite.output import events

MAX_FILES = 256


def _files(value: Any, param: str) -> tuple[tuple[str, str], ...]:
    if len(array(value, param, " of objects")) > MAX_FILES:
        raise bad_request(f"'{param}' may hold at most {MAX_FILES} files.", param)
    items = [members(item, f"{param}[{i}]") for i, item in enumerate(value)]
    return tuple((item.text("filename", "tmp"), item.text("text")) for item in items)


FIELDS: Final[Table] = {
    "input_prefix": supported(text, "the text before the answer"),
    "input_suffix": supported(text, "the text after it"),
    "input_extra": supported(_files, "other files, which come first: `filename` and `text`"),
    "prompt": supported(text, "how the answer begins"),
    **GENERATION_FIELDS,
    "stop": STOP,
    "max_tokens": MAX_TOKENS,
    **aliases("max_tokens", MAX_TOKENS, "n_predict"),
    "samplers": no_op(array, "their order is fixed"),
    "id_slot": no_op(integer(-1, 2**31 - 1)),
    **UNSUPPORTED_FIELDS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class InfillRequest(Request):
    """A text with a gap. `files` are names and texts of others, `begun` the gap's beginning."""

    prompt_field: ClassVar[str] = "input_prefix"
    prefix: str = ""
    suffix: str = ""
    files: tuple[tuple[str, str], ...] = ()
    begun: str = ""

    @property
    def fills_in(self) -> bool:
        return True


def parse_infill(body: bytes) -> InfillRequest:
    """Validate an infill's body. Raises APIError 400 naming the field at fault."""
    with reading(parse_object(body), FIELDS) as given:
        return InfillRequest(
            **shared_options(given),
            prefix=given.take("input_prefix", ""),
            suffix=given.take("input_suffix", ""),
            files=given.take("input_extra", ()),
            begun=given.take("prompt", ""),
            ignored=given.ignored,
        )


def _render(model: Model, request: InfillRequest, _config: Config) -> list[Prompt]:
    prefix, suffix = request.prefix, request.suffix
    more: dict[str, Any] = {"files": request.files, "begun": request.begun}
    return [Prompt(fill_in_tokens(model, prefix, suffix, "input_prefix", **more))]


_STOP_TYPES: Final = {FinishReason.LENGTH: "limit", FinishReason.CANCELLED: "none"}


class InfillWriter:
    """llama-server's own form: the text in `content`, and how it ended in the last part."""

    def __init__(self, model: str) -> None:
        self._model = model

    def begin(self) -> bytes:
        return b""

    def beat(self) -> bytes:
        return sse_comment()

    def event(self, index: int, event: writers.Shown) -> bytes:
        if not isinstance(event, events.TextDelta):
            return b""
        return writers.frame({"index": index, "content": event.text, "stop": False})

    def done(self, index: int, done: events.Done, total: Usage | None) -> bytes:
        return writers.frame(self._end(done, total or done.usage, ""))

    def fail(self, error: APIError) -> bytes:
        return sse_data(error.body())

    def whole(self, choices: Sequence[writers.Collected], total: Usage) -> bytes:
        (choice,) = choices
        assert choice.done is not None
        return orjson.dumps(self._end(choice.done, total, choice.text))

    def _end(self, done: events.Done, usage: Usage, content: str) -> dict[str, Any]:
        stop_type = "word" if done.stop is not None else _STOP_TYPES.get(done.reason, "eos")
        return {
            "index": 0,
            "content": content,
            "model": self._model,
            "stop": True,
            "stop_type": stop_type,
            "stopping_word": done.stop or "",
            "tokens_predicted": usage.num_output,
            "tokens_evaluated": usage.num_prompt,
            "tokens_cached": usage.num_prompt + usage.num_output,
            "truncated": False,
            "timings": writers.timings_json(usage),
        }


def _writer(
    envelope: writers.Envelope, _request: InfillRequest, _model: Model, _prompts: Sequence[Prompt]
) -> InfillWriter:
    return InfillWriter(envelope.model)


ENDPOINTS: Final = (
    Endpoint(
        "POST",
        "/infill",
        "The middle of a text",
        Dialect(
            parse=parse_infill,
            writer=_writer,
            id_prefix="infill-",
            prompt_field="input_prefix",
            render=_render,
        ).handle,
        FIELDS,
    ),
)
