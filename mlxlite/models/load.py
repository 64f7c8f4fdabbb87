"""Find, download and load a model; turn messages into prompts.

Loading happens on the lane, because it makes MLX objects; what comes back is one `Model`, whose
tokenizer and template may be used from any thread. Every way in which a model can be unusable is a
`LoadError` that says what to do about it. Nothing from a checkpoint is ever run: no remote code, no
pickle; chat templates go through transformers' sandboxed Jinja.
"""

import hashlib
import inspect
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import mlx.core as mx
import mlx_lm
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.utils import (
    load_adapters,
    load_model,
    load_tokenizer,
    maybe_set_recommended_wired_limit,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlxlite.config.options import Config
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.sequence import Grammar, Prompt
from mlxlite.errors import FOREIGN, reason_of
from mlxlite.models.interface import LoadError, PromptError
from mlxlite.models.locate import locate, read_json, read_settings, read_template
from mlxlite.models.time_limit import TookTooLong, within
from mlxlite.output.grammar import Constraint, Grammars
from mlxlite.output.harmony import MARKS
from mlxlite.output.markers import Markers
from mlxlite.runner.cpu import has_compiler, is_cpu

if TYPE_CHECKING:
    from mlxlite.vision.processor import Reader

log = logging.getLogger("mlxlite.model")
LONE_PICTURE: list[Any] = [{"role": "user", "content": [{"type": "image"}]}]
_PROBE = "mlxlite"  # a word that no template says by itself
BLIND = "this model does not see pictures"
# The names under which configurations keep their longest sequence, by how often they are seen.
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_positions",
    "n_ctx",
    "model_max_length",
)
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # sentencepiece's byte fallback
_UNKNOWN_CONTEXT = 32_768  # recurrent models name none; bounded all the same
_TEMPLATE_ERRORS = (jinja2.TemplateError, AssertionError, *FOREIGN)
# A template is the operator's or the checkpoint's; what it works on is the client's.
TEMPLATE_TIMEOUT_S = 10.0
MAX_RENDERED = 256 << 20  # characters: four times the largest default body


@dataclass(frozen=True, slots=True)
class Model:
    """Implements `sequence.ServedModel`, plus the network itself for the runner."""

    id: str
    path: Path
    network: nn.Module
    tokenizer: Any  # mlx_lm's TokenizerWrapper
    chat_template: str | None  # the operator's, over the checkpoint's own
    fingerprint: str
    context_size: int
    num_vocab: int
    decode: Callable[[list[int]], str]
    piece: Callable[[int], str | None]  # a token as the vocabulary spells it
    added_tokens: frozenset[int]
    markers: Markers
    shown: Mapping[int, str]  # special tokens that are markers, and so part of the text
    byte_alphabet: Mapping[str, int] | None  # of a byte-level tokenizer: its characters' bytes
    eos_tokens: frozenset[int]
    defaults: SamplingParams
    grammars: Grammars
    sight: "Reader | str"  # what reads pictures, or why nothing does
    wants_parts: bool = False  # its template knows content only as an array of parts

    @property
    def blind(self) -> str | None:
        """See `served.ServedModel`."""
        return self.sight if isinstance(self.sight, str) else None

    def knows(self, digest: bytes) -> bool:
        """See `served.ServedModel`."""
        return not isinstance(self.sight, str) and self.sight.knows(digest)

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None or bool(self.tokenizer.has_chat_template)

    def detokenize(self, tokens: SequenceOf[int]) -> str:
        """Text of token ids, spaces as the tokenizer wrote them, special tokens left out.

        Those that are markers are not: see `channels`.
        """
        if not self.shown or self.shown.keys().isdisjoint(tokens):
            return self.decode(list(tokens))
        pieces: list[str] = []
        plain: list[int] = []
        for token in tokens:
            if token in self.shown:
                pieces += [self.decode(plain), self.shown[token]]
                plain = []
            else:
                plain.append(token)
        return "".join((*pieces, self.decode(plain)))

    def compile(
        self, constraint: Constraint | None, *, is_thinking: bool, budget: int | None = None
    ) -> Grammar:
        """See `served.ServedModel`."""
        return self.grammars.compile(constraint, is_thinking=is_thinking, budget=budget)

    def parse_calls(
        self, text: str, tools: SequenceOf[Mapping[str, Any]]
    ) -> list[tuple[str, Mapping[str, Any]]]:
        """(name, arguments) of the calls in a text, by mlx-lm's parser. Raises what that does."""
        found = self.tokenizer.tool_parser(text, list(tools))
        calls = found if isinstance(found, list) else [found]
        return [(str(call["name"]), _object(call.get("arguments") or {})) for call in calls]

    def encode(self, text: str, *, add_special: bool) -> tuple[int, ...]:
        """A text's token ids. Raises PromptError."""
        try:
            return tuple(self.tokenizer.encode(text, add_special_tokens=add_special))
        except (TypeError, UnicodeError) as error:
            raise PromptError("the text holds half a character (a lone surrogate)") from error

    def token_bytes(self, token: int) -> bytes:
        """What one token writes, which need not be whole characters; its name if it is special."""
        piece = self.piece(token)
        if piece is None:
            return b""  # the output layer may be wider than the vocabulary
        if token in self.added_tokens:
            return str(piece).encode()
        if self.byte_alphabet is not None:
            if not all(char in self.byte_alphabet for char in piece):
                return str(piece).encode()  # as its decoder has it
            return bytes(self.byte_alphabet[char] for char in piece)
        if _BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()

    def render(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        *,
        is_continuation: bool,
        pictures: SequenceOf[Any] = (),
    ) -> Prompt:
        """Chat messages through the template and the tokenizer, or the processor with `pictures`.

        `is_continuation` leaves the last message open, for the answer to go on from it. Raises
        PromptError when there is no template, when it refuses the messages, and for a template
        argument that would steer the renderer instead.
        """
        if not self.has_chat_template:
            raise PromptError(
                "this model has no chat template; start the server with --chat-template"
            )
        if template_kwargs and (reserved := _renderer_arguments().intersection(template_kwargs)):
            raise PromptError(f"a request may not set the template argument {min(reserved)!r}")
        text = self._apply(list(messages), dict(template_kwargs), is_continuation)
        start = self.markers.think_start
        is_thinking = bool(start) and text.rstrip().endswith(start)
        if pictures:
            if isinstance(self.sight, str):
                raise PromptError(self.sight)
            prompt = self.sight.read(text, self._apply(LONE_PICTURE, {}, False), pictures)
        else:
            prompt = Prompt(self._encode(text))
        return replace(prompt, heads=self._heads(list(prompt.tokens)), is_thinking=is_thinking)

    def _encode(self, text: str) -> tuple[int, ...]:
        """A rendered chat's tokens. Raises PromptError."""
        try:
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeError) as error:
            raise PromptError("the messages hold half a character (a lone surrogate)") from error
        if not tokens:
            raise PromptError("the chat template made an empty prompt of the messages")
        return tuple(tokens)

    def _heads(self, tokens: list[int]) -> tuple[int, ...]:
        """Where messages begin, by the special tokens that templates begin them with.

        That is the first special token which comes again (<|im_start|>, <start_of_turn>); where
        none does, any that does not end an answer may be it.
        """
        marks = self.added_tokens
        found = [i for i, token in enumerate(tokens) if token in marks]
        counts = Counter(tokens[i] for i in found)
        mark = next((tokens[i] for i in found if counts[tokens[i]] > 1), None)
        if mark is not None:
            return tuple(i for i in found if i and tokens[i] == mark)
        return tuple(i for i in found if i and tokens[i] not in self.eos_tokens)

    def _apply(self, messages: list[Any], kwargs: dict[str, Any], is_continuation: bool) -> str:
        """The template's text. Raises PromptError."""
        if self.wants_parts:
            messages = [_in_parts(message) for message in messages]
        try:
            apply = partial(self._apply_template, messages, kwargs, is_continuation)
            text = within(TEMPLATE_TIMEOUT_S, apply)
        except _TEMPLATE_ERRORS as error:
            reason = reason_of(error)
            raise PromptError(f"the chat template refused the messages: {reason}") from error
        except TookTooLong as error:
            log.warning("the chat template was %s", error)
            raise PromptError(f"the chat template did not end and was {error}") from None
        if len(text) > MAX_RENDERED:
            raise PromptError(f"the chat template made {len(text)} characters of the messages")
        return text

    def _apply_template(
        self, messages: list[Any], kwargs: dict[str, Any], is_continuation: bool
    ) -> str:
        apply = self.tokenizer.apply_chat_template
        if self.chat_template is not None:
            kwargs["chat_template"] = self.chat_template
        is_jinja = (
            self.tokenizer.chat_template is not None
            and "chat_template_type" not in self.tokenizer.init_kwargs  # a renderer of mlx-lm's
        )
        if self.chat_template is not None or is_jinja:
            # transformers' own method, reached through a bound one that the wrapper passes on: the
            # wrapper would set enable_thinking where the request is silent, templates know better.
            apply = self.tokenizer.get_chat_template.__self__.apply_chat_template
        text: str = apply(
            messages,
            tokenize=False,
            add_generation_prompt=not is_continuation,
            continue_final_message=is_continuation,
            **kwargs,
        )
        return text


# --- loading ----------------------------------------------------------------------------------


def load(config: Config) -> Model:
    """Find, download where needed, and load what `config` names. Call it on the lane.

    Raises LoadError.
    """
    _disable_compile_without_compiler()
    maybe_set_recommended_wired_limit()
    template = read_template(config.chat_template)
    path = locate(config.model)
    settings = read_settings(path)
    generation = read_json(path / "generation_config.json") or {}
    adapter = Path(config.adapter_path).expanduser() if config.adapter_path else None
    if adapter is not None:  # mlx-lm's, for mlx-lm's models
        settings |= {"vision_config": None}
    network, tokenizer, processor = _load_parts(path, generation, settings)
    if adapter is not None:
        _apply_adapter(network, adapter)
    model = Model(
        id=config.served_id,
        path=path,
        network=network,
        tokenizer=tokenizer,
        chat_template=template,
        fingerprint=_fingerprint(path, adapter, network),  # after the adapter, which it covers
        context_size=_context_size(settings, config.ctx_size),
        num_vocab=(num_vocab := int(network(mx.array([[0]])).shape[-1])),
        decode=_decoder(tokenizer),
        piece=_speller(tokenizer),
        added_tokens=frozenset(tokenizer.added_tokens_decoder),
        markers=(markers := _markers(tokenizer)),
        shown=_shown(tokenizer, markers),
        byte_alphabet=_byte_alphabet(tokenizer),
        eos_tokens=frozenset(tokenizer.eos_token_ids),
        defaults=_sampling_defaults(generation),
        grammars=_grammars(tokenizer, num_vocab),
        sight=processor if isinstance(processor, str) else BLIND,
    )
    if not isinstance(processor, str):
        model = replace(model, wants_parts=_wants_parts(model))
        model = replace(model, sight=_sight(model, processor))
    if template is not None:
        _check_template(model)
    elif not model.has_chat_template:
        log.warning("the model has no chat template: chat needs --chat-template")
    return model


def _load_parts(
    path: Path, generation: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[nn.Module, Any, Any]:
    """The network, the tokenizer, the processor or why there is none. Raises LoadError."""
    try:
        network, processor = _load_vision(path, settings)
        if network is None:
            network, _ = load_model(path)
        eos = generation.get("eos_token_id")
        tokenizer = load_tokenizer(
            path,
            {"trust_remote_code": False},  # else transformers may ask the terminal, and wait
            eos_token_ids=settings.get("eos_token_id") if eos is None else eos,
        )
    except Exception as error:  # a foreign file is wrong in any way; tokenizers raises bare ones
        reason = reason_of(error)
        if isinstance(error, MemoryError) or "allocate" in reason:
            raise LoadError(
                f"insufficient memory for the model at {path} ({reason}): "
                "choose a smaller one, or one with fewer bits"
            ) from error
        needs = f"mlx-lm {mlx_lm.__version__} supports the model"
        if isinstance(settings.get("vision_config"), Mapping) and not _has_mlx_vlm():
            needs += ", or pip install 'mlxlite[vision]' for its pictures"
        raise LoadError(
            f"cannot load the model at {path}: {reason.rstrip('.')}; check that the download is "
            f"complete and that {needs}"
        ) from error
    return network, tokenizer, processor


def _has_mlx_vlm() -> bool:
    return find_spec("mlx_vlm") is not None and find_spec("PIL") is not None


def _load_vision(path: Path, settings: Mapping[str, Any]) -> tuple[nn.Module | None, Any]:
    """An image-text model's network and processor; None where text is all that can be served."""
    if not isinstance(settings.get("vision_config"), Mapping):
        return None, BLIND
    if not _has_mlx_vlm():
        return None, f"{BLIND} here: pip install 'mlxlite[vision]'"
    from mlxlite.vision.network import load

    try:
        return load(path)
    except Exception as error:  # as above; what mlx-lm makes of it is still to be seen
        log.warning("pictures are off: mlx-vlm cannot load it: %s", reason_of(error))
        return None, f"{BLIND}: mlx-vlm cannot load it"


def _sight(model: Model, processor: Any) -> "Reader | str":
    """What reads pictures for this model, tried out; or why nothing does."""
    from mlxlite.vision.network import make_reader

    try:
        if not model.has_chat_template:
            raise PromptError("it has no chat template")
        lone = model._apply(LONE_PICTURE, {}, False)
        return make_reader(model.network, processor, lone)
    except Exception as error:  # a foreign network, on the first picture it gets
        log.warning("pictures are off: %s", reason_of(error))
        return f"{BLIND}: {reason_of(error)}"


def _wants_parts(model: Model) -> bool:
    """Whether the template leaves out content that is a string, as some of image models do."""
    if not model.has_chat_template:
        return False
    try:
        return _PROBE not in model._apply([{"role": "user", "content": _PROBE}], {}, False)
    except PromptError:
        return True


def _in_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return dict(message)


def _apply_adapter(network: nn.Module, path: Path) -> None:
    """Put a LoRA adapter on the network. Raises LoadError."""
    if not (path / "adapter_config.json").is_file():
        raise LoadError(f"--adapter-path {path}: there is no adapter_config.json in it")
    try:
        load_adapters(network, str(path))
        mx.eval(network.parameters())
    except Exception as error:  # as in _load_parts
        raise LoadError(f"--adapter-path {path}: {reason_of(error)}") from error
    network.eval()  # adapters bring dropout


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Token ids to text, by the tokenizer's own decode where transformers adds nothing to it."""
    own = tokenizer.get_chat_template.__self__  # transformers' tokenizer, as in _apply_template
    is_plain = isinstance(own, PreTrainedTokenizerFast) and all(
        getattr(type(own), name) is getattr(PreTrainedTokenizerFast, name)
        for name in ("decode", "_decode")
    )
    if is_plain:
        return partial(own.backend_tokenizer.decode, skip_special_tokens=True)
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _object(arguments: Any) -> Mapping[str, Any]:
    """Arguments as an object; some models write it as text. Raises ValueError."""
    value = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(value, dict):
        raise ValueError("the arguments are no object")
    return value


def _markers(tokenizer: Any) -> Markers:
    """What mlx-lm has found out about the tokenizer's model."""
    has_parser = tokenizer.tool_parser is not None
    return Markers(
        tokenizer.think_start or "",
        tokenizer.think_end or "",
        (tokenizer.tool_call_start or "") if has_parser else "",
        (tokenizer.tool_call_end or "") if has_parser else "",
        _has_json_calls(tokenizer),
        {t.content for t in tokenizer.added_tokens_decoder.values()} >= MARKS,
    )


def _has_json_calls(tokenizer: Any) -> bool:
    """Whether a call is one JSON object between two markers, by mlx-lm's parser of them."""
    return getattr(tokenizer.tool_parser, "__module__", "").endswith(".json_tools")


def _grammars(tokenizer: Any, num_vocab: int) -> Grammars:
    """What compiles constraints; calls can only be enforced where they are JSON in markers."""
    calls: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    if _has_json_calls(tokenizer):
        calls = (tokenizer.tool_call_start_tokens, tokenizer.tool_call_end_tokens)
    return Grammars(
        tokenizer.get_chat_template.__self__,  # transformers' own, as in _apply_template
        num_vocab=num_vocab,
        eos_tokens=frozenset(tokenizer.eos_token_ids),
        think=(tuple(tokenizer.think_start_tokens or ()), tuple(tokenizer.think_end_tokens or ())),
        call_markers=calls,
    )


def _shown(tokenizer: Any, markers: Markers) -> dict[int, str]:
    """The special tokens of which markers consist."""
    texts = [markers.think_start, markers.think_end, markers.call_start, markers.call_end]
    texts += MARKS if markers.is_harmony else ()
    found: dict[int, str] = {}
    for id, token in tokenizer.added_tokens_decoder.items():
        if token.special and any(token.content in text for text in texts if text):
            found[id] = token.content
    return found


def _speller(tokenizer: Any) -> Callable[[int], str | None]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # transformers' own method builds a dict of all added tokens at each call
    spell: Callable[[int], str | None] = (
        tokenizer.convert_ids_to_tokens if backend is None else backend.id_to_token
    )
    return spell


def _byte_alphabet(tokenizer: Any) -> Mapping[str, int] | None:
    """GPT-2's characters for bytes, if the tokenizer's decoder is byte-level; None if not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or "ByteLevel" not in str(backend.decoder):
        return None
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


def memory_budget(config: Config, network: nn.Module) -> int:
    """Bytes that sequences may hold: the limit, less the weights and a reserve for the work.

    What is kept of pictures has its part too, which the network is told.

    The default limit is what the device recommends, or 70 % of the RAM on a CPU. The reserve is a
    tenth of the limit, at most 2 GiB: activations of a prefill chunk, and the copy of a layer's
    cache that is made when a row joins. Raises LoadError when nothing is left.
    """
    limit = config.memory_limit_bytes() or _device_limit()
    mx.clear_cache()
    weights = mx.get_active_memory()
    pictures = min(getattr(network, "max_bytes", 0), limit // 20)
    if pictures:
        network.max_bytes = pictures
    budget = limit - weights - pictures - min(limit // 10, 2 << 30)
    if budget <= 0:
        raise LoadError(
            f"insufficient memory: the weights take {weights / 1e9:.2f} GB of a limit of "
            f"{limit / 1e9:.2f} GB; choose a smaller model or a larger --memory-limit"
        )
    return budget


def _device_limit() -> int:
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if recommended is not None:
        return int(recommended)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 7 // 10


def _check_template(model: Model) -> None:
    """Find a template that can never work at the start, not in each request. Raises LoadError."""
    try:
        model.render([{"role": "user", "content": "Hello"}], {}, is_continuation=False)
    except PromptError as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            line, why = error.__cause__.lineno, error.__cause__.message
            raise LoadError(f"--chat-template is broken: line {line}: {why}") from error


def _context_size(settings: Mapping[str, Any], wanted: int) -> int:
    """The model's own maximum, or what --ctx-size asks for."""
    parts = [part for part in (settings, settings.get("text_config")) if isinstance(part, Mapping)]
    sizes = [part[key] for part in parts for key in _CONTEXT_KEYS if key in part]
    own = next((size for size in sizes if isinstance(size, int) and size > 0), _UNKNOWN_CONTEXT)
    if wanted > own:
        log.warning("--ctx-size %d is more than the model was made for (%d)", wanted, own)
    return wanted or own


def _sampling_defaults(settings: Mapping[str, Any]) -> SamplingParams:
    """generation_config.json's settings, where they are in range; OpenAI's defaults otherwise."""

    def read(name: str, low: float, high: float, default: float) -> float:
        value = settings.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:
            log.warning("generation_config.json: %s %.40r is out of range, ignored", name, value)
            return default
        return float(value)

    temperature = read("temperature", 0.0, 100.0, 1.0)
    return SamplingParams(
        temperature=0.0 if settings.get("do_sample") is False else temperature,
        top_p=read("top_p", 1e-6, 1.0, 1.0),
        top_k=int(read("top_k", 0, 2**31 - 1, 0)),
        min_p=read("min_p", 0.0, 1.0, 0.0),
    )


def _fingerprint(path: Path, adapter: Path | None, network: nn.Module) -> str:
    """A hash of config.json and of every weight, which are read once, where they are.

    A weight's part is the exact sum of its words, each row's counted by its place.
    """
    digest = hashlib.blake2b((path / "config.json").read_bytes(), digest_size=8)
    if adapter is not None:
        digest.update((adapter / "adapter_config.json").read_bytes())  # its scale is no weight
    weights: dict[str, mx.array] = {}
    tree_flatten(network.parameters(), destination=weights)
    sums = [_sum_of_words(array) for array in weights.values()]
    mx.eval(sums)
    for (name, array), total in zip(weights.items(), sums, strict=True):
        digest.update(f"{name} {array.dtype} {array.shape} {total.item()}\n".encode())
    return digest.hexdigest()


def _sum_of_words(array: mx.array) -> mx.array:
    """An exact sum, modulo 2**32, of an array's bits."""
    if not array.size:
        return mx.array(0, mx.uint32)
    num_rows = array.shape[0] if array.ndim > 1 else 1
    word = {1: mx.uint8, 2: mx.uint16}.get(array.dtype.size, mx.uint32)
    rows = mx.sum(array.reshape(num_rows, -1).view(word), axis=1).astype(mx.uint32)
    return mx.sum(rows * (2 * mx.arange(num_rows, dtype=mx.uint32) + 1))


def _disable_compile_without_compiler() -> None:
    """MLX's CPU back end builds fused kernels with g++ at run time; without it each would fail."""
    if is_cpu() and not has_compiler():
        log.info("no g++ on this machine: fused kernels are off")
        mx.disable_compile()


def _renderer_arguments() -> frozenset[str]:
    """What transformers' method takes for itself (the template among it), and not as data."""
    names = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset({"messages", *names}) - {"tools", "documents", "kwargs"}
