"""Chat messages to a prompt, through the model's chat template.

The template is the operator's or the checkpoint's, and untrusted; so are the client's messages. It
runs in transformers' Jinja sandbox, for at most TEMPLATE_TIMEOUT_S and MAX_RENDERED characters, and
no longer than its client stays. It must never take the renderer's own settings from a request.
What a template refuses or leaves out is bridged (`template_bridge`), and nothing else. Any thread
may render.
"""

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jinja2
from transformers import PreTrainedTokenizerBase

from mlxlite.engine.sequence import Prompt
from mlxlite.errors import FOREIGN, reason_of
from mlxlite.models.interface import LoadError, PromptError
from mlxlite.models.template_bridge import Bridge, Messages, user_turn, without_blank_end
from mlxlite.models.template_probe import probe
from mlxlite.models.time_limit import TookTooLong, run_with_timeout
from mlxlite.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mlxlite.vision.fetch import Limits
    from mlxlite.vision.images import LoadedImage, Source
    from mlxlite.vision.processor import Reader

log = logging.getLogger("mlxlite.model")
TEMPLATE_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 2.0  # for all probes of a template together
MAX_RENDERED = 256 << 20  # characters: four times the largest default body
NO_VISION = "this model does not see pictures"
_NAMES = ("tool_use", "default")  # of templates; others ("rag") are for other calls
_TEMPLATE_ERRORS = (jinja2.TemplateError, AssertionError, *FOREIGN)
_PROBE_TOOL = {"name": "mlxlite", "description": "", "parameters": {"type": "object"}}


class TemplateRefused(PromptError):
    """The template raised."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template and the tokenizer of its text. Safe to use from any thread."""

    tokenizer: Tokenizer
    source: str | None = field(default=None, repr=False)  # the operator's; None: the checkpoint's
    image_reader: "Reader | str" = NO_VISION  # or the reason why there is none
    _bridges: dict[bool, Bridge] = field(default_factory=dict, compare=False, repr=False)

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
        text = self._text(list(messages), template_kwargs, is_continuation)
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
        return self._apply([user_turn([{"type": "image"}])], {}, is_continuation=False)

    def check(self) -> None:
        """Probe the template, or warn of a missing one.

        Raises LoadError for the operator's if it is no Jinja.
        """
        if not self.exists:
            log.warning("the model has no chat template: chat needs --chat-template")
            return
        bridges = [str(self._bridge(has_tools=has_tools)) for has_tools in (False, True)]
        if found := "; with tools: ".join(dict.fromkeys(filter(None, bridges))):
            log.info("what the chat template does not take is bridged: %s", found)
        if self.source is None:
            return
        try:
            self.render([user_turn("Hello")], {}, is_continuation=False)
        except PromptError as error:
            if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                line, why = error.__cause__.lineno, error.__cause__.message
                raise LoadError(f"--chat-template is broken: line {line}: {why}") from error

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

    def _text(self, messages: Messages, kwargs: Mapping[str, Any], is_continuation: bool) -> str:
        """The text of messages in the first form that the template takes. Raises PromptError."""
        if is_continuation and (rest := without_blank_end(messages)) is not messages:
            messages, is_continuation = rest, False
        bridge = self._bridge(has_tools=bool(kwargs.get("tools")))
        if not messages:
            return self._apply(messages, kwargs, is_continuation)
        refusal: TemplateRefused | None = None
        for form, is_open, end in _forms(bridge, messages, is_continuation):
            try:
                return self._apply(form, kwargs, is_open) + end
            except TemplateRefused as error:
                refusal = refusal or error
        assert refusal is not None
        raise refusal

    def _bridge(self, *, has_tools: bool) -> Bridge:
        """The bridge of the template for chats with tools, or without; probed once."""
        if (bridge := self._bridges.get(has_tools)) is None:
            source = self._source(has_tools=has_tools)
            is_same = has_tools and source is self._source(has_tools=False)
            if is_same and source is not None and "tools" not in source:
                bridge = self._bridge(has_tools=False)
            else:
                bridge = self._probe(has_tools)
            self._bridges[has_tools] = bridge
        return bridge

    def _probe(self, has_tools: bool) -> Bridge:
        tools = [{"type": "function", "function": _PROBE_TOOL}]
        kwargs = {"tools": tools} if has_tools else {}

        def render(messages: Messages) -> str | None:
            try:
                return self._call(messages, kwargs, False)
            except _TEMPLATE_ERRORS:
                return None

        try:
            has_pictures = self.vision_unavailable_reason is None
            call = partial(probe, render, has_pictures=has_pictures)
            return run_with_timeout(PROBE_TIMEOUT_S, call)
        except TookTooLong as error:
            log.warning("the probes of the chat template were %s", error)
            return Bridge()

    def _source(self, *, has_tools: bool) -> str | None:
        """The text of the template that renders a chat; None for a renderer of mlx-lm's."""
        templates: Mapping[str, str] | str | None = self.tokenizer.wrapper.chat_template
        if self.source is not None:
            return self.source
        if not isinstance(templates, Mapping):
            return templates
        names = [name for name in _NAMES[not has_tools :] if name in templates]
        return templates.get(names[0] if names else min(templates, default=""))

    def _apply(self, messages: Messages, kwargs: Mapping[str, Any], is_continuation: bool) -> str:
        """The template's text, in bounded time and size. Raises PromptError."""
        call = partial(self._call, messages, kwargs, is_continuation)
        try:
            text = run_with_timeout(TEMPLATE_TIMEOUT_S, call)
        except _TEMPLATE_ERRORS as error:
            is_exhausted = isinstance(error, MemoryError | RecursionError)
            refusal = PromptError if is_exhausted else TemplateRefused
            message = f"the chat template refused the messages: {reason_of(error)}"
            raise refusal(message) from error
        except TookTooLong as error:
            log.warning("the chat template was %s", error)
            raise PromptError(f"the chat template did not end and was {error}") from None
        if len(text) > MAX_RENDERED:
            raise PromptError(f"the chat template made {len(text)} characters of the messages")
        return text

    def _call(self, messages: Messages, kwargs: Mapping[str, Any], is_continuation: bool) -> str:
        """The template's text. Raises what it raises."""
        wrapper = self.tokenizer.wrapper
        is_ours = self.source is not None or isinstance(wrapper.chat_template, Mapping)
        source = self._source(has_tools=bool(kwargs.get("tools"))) if is_ours else None
        text: str = self._renderer().apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=not is_continuation,
            continue_final_message=is_continuation,
            **kwargs,
            **({} if source is None else {"chat_template": source}),
        )
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


def _num_chars(messages: SequenceOf[Mapping[str, Any]]) -> int:
    """Characters of the messages' contents and of their parts."""
    contents = [message.get("content") or "" for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    texts = (*contents, *(part.get("text") or "" for part in parts))
    return sum(len(text) for text in texts if isinstance(text, str))


def _forms(
    bridge: Bridge, messages: Messages, is_continuation: bool
) -> Iterator[tuple[Messages, bool, str]]:
    """What to render, in this order until the template takes it.

    Messages, whether the last is to be continued, and text to be added: an answer's beginning,
    where the template does not take it as its last message.
    """
    for form in bridge.forms(messages):
        yield form, is_continuation, ""
    last, end = messages[-1], ""
    is_answer = last["role"] == "assistant" and not last.get("tool_calls")
    if is_continuation and is_answer and isinstance(last.get("content"), str):
        messages, end, is_continuation = messages[:-1] or [user_turn()], last["content"], False
        for form in bridge.forms(messages):
            yield form, False, end
    yield bridge.one_turn(messages), is_continuation, end


def _renderer_arguments() -> frozenset[str]:
    """The parameters of transformers' method that are its settings, not data of a chat."""
    names = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset({"messages", *names}) - {"tools", "documents", "kwargs"}
