"""Chat messages to a prompt, through the model's chat template.

The template is the operator's or the checkpoint's, and untrusted; the messages are the client's. It
runs in transformers' Jinja sandbox. It must never run longer than TEMPLATE_TIMEOUT_S, produce more
than MAX_RENDERED characters, or take the renderer's own settings from a request. Immutable, so that
any thread may render.
"""

import inspect
import logging
from collections import Counter
from collections.abc import Mapping
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
    from mlxlite.vision.processor import Reader

log = logging.getLogger("mlxlite.model")
TEMPLATE_TIMEOUT_S = 10.0
MAX_RENDERED = 256 << 20  # characters: four times the largest default body
NO_VISION = "this model does not see pictures"
_HELLO = [{"role": "user", "content": "Hello"}]
_ONE_IMAGE: list[Any] = [{"role": "user", "content": [{"type": "image"}]}]
_PROBE = "mlxlite"  # a word that no template contains by itself
_TEMPLATE_ERRORS = (jinja2.TemplateError, AssertionError, *FOREIGN)


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template and the tokenizer of its text. Safe to use from any thread.

    `source` is the operator's template; None is the checkpoint's own. With `needs_parts` the
    template reads content only as an array of parts. `image_reader` turns a rendered chat and its
    images into a prompt, or is the reason why there is no reader.
    """

    tokenizer: Tokenizer
    source: str | None = None
    needs_parts: bool = False
    image_reader: "Reader | str" = NO_VISION

    @property
    def exists(self) -> bool:
        return self.source is not None or bool(self.tokenizer.wrapper.has_chat_template)

    @property
    def vision_unavailable_reason(self) -> str | None:
        """Why images cannot be rendered; None if they can."""
        return self.image_reader if isinstance(self.image_reader, str) else None

    def is_image_cached(self, digest: bytes) -> bool:
        """Whether an image was preprocessed before, so that its pixels may not be needed again."""
        return not isinstance(self.image_reader, str) and self.image_reader.knows(digest)

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
        PromptError when there is no template, when it refuses the messages, and for a template
        argument that is a setting of the renderer; ImageError for an image that cannot be used.
        """
        if not self.exists:
            raise PromptError(
                "this model has no chat template; start the server with --chat-template"
            )
        if template_kwargs and (reserved := _renderer_arguments().intersection(template_kwargs)):
            raise PromptError(f"a request may not set the template argument {min(reserved)!r}")
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
        return self._apply(_ONE_IMAGE, {}, is_continuation=False)

    def check(self) -> None:
        """Report at load what would fail in each request: no template, or one that is no Jinja.

        Raises LoadError.
        """
        if self.source is None:
            if not self.exists:
                log.warning("the model has no chat template: chat needs --chat-template")
            return
        try:
            self.render(_HELLO, {}, is_continuation=False)
        except PromptError as error:
            if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                line, why = error.__cause__.lineno, error.__cause__.message
                raise LoadError(f"--chat-template is broken: line {line}: {why}") from error

    def omits_strings(self) -> bool:
        """Whether the template drops content that is a string, as some of image models do."""
        if not self.exists:
            return False
        messages = [{"role": "user", "content": _PROBE}]
        try:
            return _PROBE not in self._apply(messages, {}, is_continuation=False)
        except PromptError:
            return True

    def _encode(self, text: str) -> tuple[int, ...]:
        try:
            tokens = self.tokenizer.wrapper.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeError) as error:
            raise PromptError("the messages hold half a character (a lone surrogate)") from error
        if not tokens:
            raise PromptError("the chat template made an empty prompt of the messages")
        return tuple(tokens)

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
        apply = partial(self._apply_unbounded, messages, kwargs, is_continuation)
        try:
            text = run_with_timeout(TEMPLATE_TIMEOUT_S, apply)
        except _TEMPLATE_ERRORS as error:
            reason = reason_of(error)
            raise PromptError(f"the chat template refused the messages: {reason}") from error
        except TookTooLong as error:
            log.warning("the chat template was %s", error)
            raise PromptError(f"the chat template did not end and was {error}") from None
        if len(text) > MAX_RENDERED:
            raise PromptError(f"the chat template made {len(text)} characters of the messages")
        return text

    def _apply_unbounded(
        self, messages: list[Any], kwargs: dict[str, Any], is_continuation: bool
    ) -> str:
        wrapper = self.tokenizer.wrapper
        apply = wrapper.apply_chat_template
        if self.source is not None:
            kwargs["chat_template"] = self.source
        is_jinja = (
            wrapper.chat_template is not None
            and "chat_template_type" not in wrapper.init_kwargs  # a renderer of mlx-lm's
        )
        if self.source is not None or is_jinja:
            # transformers' own method, reached through a bound one that the wrapper passes on: the
            # wrapper would set enable_thinking where the request is silent, templates know better.
            apply = wrapper.get_chat_template.__self__.apply_chat_template
        text: str = apply(
            messages,
            tokenize=False,
            add_generation_prompt=not is_continuation,
            continue_final_message=is_continuation,
            **kwargs,
        )
        return text


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return dict(message)


def _renderer_arguments() -> frozenset[str]:
    """The parameters of transformers' method that are its own settings and no data of a chat."""
    names = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset({"messages", *names}) - {"tools", "documents", "kwargs"}
