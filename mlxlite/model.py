"""Find, download and load a model; turn messages into prompts.

Loading happens on the lane, because it makes MLX objects; what comes back is one `Model`, whose
tokenizer and template may be used from any thread. Every way in which a model can be unusable is a
`LoadError` that says what to do about it. Nothing from a checkpoint is ever run: no remote code, no
pickle; chat templates go through transformers' sandboxed Jinja.
"""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import mlx.core as mx
from mlx import nn
from mlx_lm.utils import load_model, load_tokenizer, maybe_set_recommended_wired_limit

from mlxlite.config import Config
from mlxlite.sequence import LoadError, Prompt, PromptError, SamplingParams

log = logging.getLogger("mlxlite.model")

DEMO_PATH = Path(__file__).parent / "demo"
# Everything mlx-lm reads, and nothing that would be code.
_PATTERNS = ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tiktoken.model")
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
_UNKNOWN_CONTEXT = 32_768  # recurrent models name none; bounded all the same


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
    eos_tokens: frozenset[int]
    defaults: SamplingParams

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None or bool(self.tokenizer.has_chat_template)

    def detokenize(self, tokens: SequenceOf[int]) -> str:
        """Text of token ids, special tokens left out, spaces as the tokenizer wrote them."""
        text: str = self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def render(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        *,
        is_continuation: bool,
    ) -> Prompt:
        """Chat messages through the template and the tokenizer.

        `is_continuation` leaves the last message open, for the answer to go on from it. Raises
        PromptError when there is no template or it refuses the messages.
        """
        if not self.has_chat_template:
            raise PromptError(
                "this model has no chat template; start the server with --chat-template"
            )
        try:
            text = self._apply_template(list(messages), dict(template_kwargs), is_continuation)
        except (jinja2.TemplateError, LookupError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise PromptError(f"the chat template refused the messages: {reason[0]}") from error
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        if not tokens:
            raise PromptError("the chat template made an empty prompt of the messages")
        return Prompt(tuple(tokens))

    def _apply_template(
        self, messages: list[Any], kwargs: dict[str, Any], is_continuation: bool
    ) -> str:
        apply = self.tokenizer.apply_chat_template
        if self.chat_template is not None:
            kwargs["chat_template"] = self.chat_template
        if self.chat_template is not None or self.tokenizer.chat_template is not None:
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
    path = locate(config.model)
    settings = _read_settings(path)
    try:
        network, settings = load_model(path)
        tokenizer = load_tokenizer(path, eos_token_ids=settings.get("eos_token_id"))
    except MemoryError as error:
        raise LoadError(f"insufficient memory for the model at {path}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise LoadError(f"cannot load the model at {path}: {_first_line(error)}") from error
    model = Model(
        id=config.served_id,
        path=path,
        network=network,
        tokenizer=tokenizer,
        chat_template=_read_template(config.chat_template),
        fingerprint=_fingerprint(path),
        context_size=_context_size(settings, config.ctx_size),
        eos_tokens=frozenset(tokenizer.eos_token_ids),
        defaults=_sampling_defaults(path),
    )
    if not model.has_chat_template:
        log.warning("the model has no chat template: chat needs --chat-template")
    return model


def locate(name: str | None) -> Path:
    """The directory of a model: the demo, a directory, a file inside one, or a Hugging Face id.

    Raises LoadError.
    """
    if name is None:
        return DEMO_PATH
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    is_hub_id = name.count("/") <= 1 and not name.startswith((".", "/", "~")) and not path.suffix
    if is_hub_id or (name.count("/") == 1 and not path.parent.exists()):
        return _download(name)
    raise LoadError(f"there is no model at {name}: no such file or directory")


def _download(repo: str) -> Path:
    """A snapshot from the Hugging Face hub, resumed where it was left; obeys HF_HUB_OFFLINE."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=_PATTERNS))
    except errors.GatedRepoError:
        why = "it is gated: accept its terms on huggingface.co and set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        why = "there is no such path and no such repository (a private one needs HF_TOKEN)"
    except errors.HFValidationError:
        why = "it is neither a path that exists nor a Hugging Face id (owner/name)"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        offline = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "no network"
        why = f"it is not in the local cache, and the hub cannot be reached ({offline})"
    except (errors.HfHubHTTPError, OSError) as error:
        why = f"the download failed ({_first_line(error)}); it resumes when you try again"
    raise LoadError(f"cannot get the model {repo}: {why}")


def _read_settings(path: Path) -> dict[str, Any]:
    """config.json, after the checks that deserve a better message than the loader's."""
    settings = _read_json(path / "config.json")
    if settings is None:
        hint = " (GGUF files are not MLX models)" if any(path.glob("*.gguf")) else ""
        raise LoadError(f"{path} is not an MLX model: it has no config.json{hint}")
    if "model_type" not in settings:
        raise LoadError(f"{path} is not an MLX model: its config.json names no model_type")
    if settings.get("model_file") is not None:
        raise LoadError(f"{path} wants to run code of its own (model_file), which is never done")
    if not any(path.glob("model*.safetensors")):
        raise LoadError(f"{path} is not an MLX model: it has no model*.safetensors")
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise LoadError(f"{path} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)})")
    return settings


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None if there is none. Raises LoadError if it is broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise LoadError(f"{path} does not hold a JSON object")
    return value


def _read_template(given: str | None) -> str | None:
    """--chat-template: a path, or the template itself (which has braces, as no path does)."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"--chat-template {given}: {_first_line(error)}") from error


def _context_size(settings: Mapping[str, Any], wanted: int) -> int:
    """The model's own maximum, or what --ctx-size asks for."""
    text = settings.get("text_config") or {}
    sizes = [part[key] for part in (settings, text) for key in _CONTEXT_KEYS if key in part]
    own = next((size for size in sizes if isinstance(size, int) and size > 0), _UNKNOWN_CONTEXT)
    if wanted > own:
        log.warning("--ctx-size %d is more than the model was made for (%d)", wanted, own)
    return wanted or own


def _sampling_defaults(path: Path) -> SamplingParams:
    """generation_config.json's settings, where they are in range; OpenAI's defaults otherwise."""
    settings = _read_json(path / "generation_config.json") or {}

    def read(name: str, low: float, high: float, default: float) -> float:
        value = settings.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            log.warning("generation_config.json: %s %r is out of range, ignored", name, value)
            return default
        return float(value)

    temperature = read("temperature", 0.0, 100.0, 1.0)
    return SamplingParams(
        temperature=0.0 if settings.get("do_sample") is False else temperature,
        top_p=read("top_p", 1e-6, 1.0, 1.0),
        top_k=int(read("top_k", 0, 2**31 - 1, 0)),
        min_p=read("min_p", 0.0, 1.0, 0.0),
    )


def _fingerprint(path: Path) -> str:
    """A hash of the settings and of each weight file's size and head, which lists its tensors."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted([*path.glob("*.json"), *path.glob("model*.safetensors")]):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 16))
    return digest.hexdigest()


def _disable_compile_without_compiler() -> None:
    """MLX's CPU back end builds fused kernels with g++ at run time; without it each would fail."""
    if mx.default_device().type == mx.DeviceType.cpu and shutil.which("g++") is None:
        log.info("no g++ on this machine: fused kernels are off")
        mx.disable_compile()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
