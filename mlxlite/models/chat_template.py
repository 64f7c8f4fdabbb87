"""Chat messages to a prompt, through the model's chat template.

The template is the operator's or the checkpoint's, and untrusted; so are the client's messages. It
runs in transformers' Jinja sandbox, for at most TEMPLATE_TIMEOUT_S and MAX_RENDERED characters, and
no longer than its client stays. It must never take the renderer's own settings from a request.
Immutable: any thread may render.
"""

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jinja2
from transformers import PreTrainedTokenizerBase

from mlxlite.engine.sequence import Prompt
from mlxlite.errors import FOREIGN, reason_of
from mlxlite.models.interface import LoadError, PromptError
from mlxlite.models.time_limit import TookTooLong, run_with_timeout
from mlxlite.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlxlite.vision.fetch import Limits
    from mlxlite.vision.images import LoadedImage, Source
    from mlxlite.vision.processor import Reader

log = logging.getLogger("mlxlite.model")
TEMPLATE_TIMEOUT_S = 10.0
MAX_RENDERED = 256 << 20  # characters: four times the largest default body
NO_VISION = "this model does not see pictures"
_PROBE = "mlxlite"  # a word that no template contains by itself
_TEMPLATE_ERRORS = (jinja2.TemplateError, AssertionError, *FOREIGN)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template and the tokenizer of its text. Safe to use from any thread."""

    tokenizer: Tokenizer
    source: str | None = None  # the operator's template; None is the checkpoint's own
    needs_parts: bool = False  # the template reads content only as an array of parts
    image_reader: "Reader | str" = NO_VISION  # or the reason why there is none

    @property
    def exists(self) -> bool:
        return self.source is not None or bool(self.tokenizer.wrapper.has_chat_template)

    @property
    def vision_unavailable_reason(self) -> str | None:
        return self.image_reader if isinstance(self.image_reader, str) else None

    def load_images(
        self,
        sources: "SequenceOf[Source]",
        limits: "Limits",
        is_needed: "Callable[[Source], bool]",
    ) -> "tuple[LoadedImage | None, ...]":
        """Raises PromptError where no image can be read; ImageError, Dropped."""
        if isinstance(self.image_reader, str):
            raise PromptError(self.image_reader)
        return self.image_reader.load(sources, limits, is_needed)

    def close(self) -> None:
        if not isinstance(self.image_reader, str):
            self.image_reader.close()

    def render(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        *,
        is_continuation: bool,
        pictures: SequenceOf[Any] = (),
    ) -> Prompt:
        """Chat messages to a prompt; `pictures` are those of the messages, in order.

        `is_continuation` leaves the last message open, for the answer to go on from it. Raises
        PromptTooLong; PromptError without a template, for messages that it refuses, and for a
        template argument that is a setting of the renderer; ImageError for an image that cannot be
        used.
        """
        if not self.exists:
            raise PromptError(
                "this model has no chat template; start the server with --chat-template"
            )
        if template_kwargs and (reserved := _renderer_arguments().intersection(template_kwargs)):
            raise PromptError(f"a request may not set the template argument {min(reserved)!r}")
        self.tokenizer.check_length(_num_chars(messages))
        text = self._apply(list(messages), dict(template_kwargs), is_continuation)
        if not pictures:
            prompt = Prompt(self._encode(text))
        elif isinstance(self.image_reader, str):
            raise PromptError(self.image_reader)
        else:
            prompt = self.image_reader.read(text, self.render_one_image(), pictures)
        return replace(
            prompt,
            message_starts=self._message_starts(prompt.tokens),
            starts_in_reasoning=self.tokenizer.output_format.starts_in_reasoning(text),
        )

    def render_one_image(self) -> str:
        """The text of a chat that is one image. Raises PromptError."""
        return self._apply([_user([{"type": "image"}])], {}, is_continuation=False)

    def check(self) -> None:
        """Warn of a missing template. Raises LoadError for the operator's if it is no Jinja."""
        if self.source is None:
            if not self.exists:
                log.warning("the model has no chat template: chat needs --chat-template")
            return
        try:
            self.render([_user("Hello")], {}, is_continuation=False)
        except PromptError as error:
            if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                line, why = error.__cause__.lineno, error.__cause__.message
                raise LoadError(f"--chat-template is broken: line {line}: {why}") from error

    def omits_strings(self) -> bool:
        """Whether the template drops content that is a string, as some image models' do."""
        if not self.exists:
            return False
        try:
            return _PROBE not in self._apply([_user(_PROBE)], {}, is_continuation=False)
        except PromptError:
            return True

    def _encode(self, text: str) -> tuple[int, ...]:
        tokens = self.tokenizer.encode(text, add_special=False)
        if not tokens:
            raise PromptError("the chat template made an empty prompt of the messages")
        return tokens

    def _message_starts(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The positions at which messages begin, found by the special tokens that begin them.

        That is the first special token which occurs again (<|im_start|>, <start_of_turn>); where
        none does, each one that does not end an answer.
        """
        special = self.tokenizer.added_tokens
        places = [i for i, token in enumerate(tokens) if token in special]
        counts = Counter(tokens[i] for i in places)
        start = next((tokens[i] for i in places if counts[tokens[i]] > 1), None)
        if start is not None:
            return tuple(i for i in places if i and tokens[i] == start)
        return tuple(i for i in places if i and tokens[i] not in self.tokenizer.eos_tokens)

    def _apply(self, messages: list[Any], kwargs: dict[str, Any], is_continuation: bool) -> str:
        """The template's text, in bounded time and size. Raises PromptError."""
        if self.needs_parts:
            messages = [_in_parts(message) for message in messages]
        if self.source is not None:
            kwargs["chat_template"] = self.source
        apply = partial(
            self._renderer().apply_chat_template,
            messages,
            tokenize=False,
            add_generation_prompt=not is_continuation,
            continue_final_message=is_continuation,
            **kwargs,
        )
        try:
            text: str = run_with_timeout(TEMPLATE_TIMEOUT_S, apply)
        except _TEMPLATE_ERRORS as error:
            reason = reason_of(error)
            raise PromptError(f"the chat template refused the messages: {reason}") from error
        except TookTooLong as error:
            log.warning("the chat template was %s", error)
            raise PromptError(f"the chat template did not end and was {error}") from None
        if len(text) > MAX_RENDERED:
            raise PromptError(f"the chat template made {len(text)} characters of the messages")
        return text

    def _renderer(self) -> Any:
        """transformers' tokenizer for Jinja, mlx-lm's wrapper for the renderers that it brings.

        The wrapper would set enable_thinking where the request does not, whatever the template's
        default is.
        """
        wrapper = self.tokenizer.wrapper
        has_jinja = wrapper.chat_template is not None
        is_jinja = has_jinja and "chat_template_type" not in wrapper.init_kwargs
        return self.tokenizer.own if self.source is not None or is_jinja else wrapper


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _num_chars(messages: SequenceOf[Mapping[str, Any]]) -> int:
    """Characters of the messages' contents and of their parts."""
    contents = [message.get("content") or "" for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    texts = (*contents, *(part.get("text") or "" for part in parts))
    return sum(len(text) for text in texts if isinstance(text, str))


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return dict(message)


def _renderer_arguments() -> frozenset[str]:
    """The parameters of transformers' method that are its settings, not data of a chat."""
    names = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset({"messages", *names}) - {"tools", "documents", "kwargs"}
