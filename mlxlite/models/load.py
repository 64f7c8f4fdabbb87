"""Load a checkpoint: the network for the runner, and the `Model` for everything else.

Runs on the device thread, because it makes MLX objects. No other thread may use the network; the
`Model` holds no reference to it.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx_lm
from mlx import nn
from mlx_lm import tokenizer_utils
from mlx_lm.utils import load_adapters, load_model, load_tokenizer

from mlxlite.config.options import Config
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.errors import reason_of
from mlxlite.models.chat_template import NO_VISION, ChatTemplate
from mlxlite.models.fingerprint import fingerprint_of
from mlxlite.models.interface import LoadError, PromptError
from mlxlite.models.locate import locate, read_json, read_settings, read_sidecar, read_template
from mlxlite.models.memory import Budget, DeviceMemory, pictures_share
from mlxlite.models.tokenizer import Tokenizer, make_grammars
from mlxlite.models.tool_probe import CallParser, templates_of

if TYPE_CHECKING:
    from mlxlite.vision.processor import Reader

log = logging.getLogger("mlxlite.model")
# The names of the longest sequence in configurations, most frequent first.
_CONTEXT_KEYS = (
    *("max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length"),
    *("n_positions", "n_ctx", "model_max_length"),
)
_UNKNOWN_CONTEXT = 32_768  # where config.json has none of them, as of recurrent models


class LoadedModel:
    """An `interface.Model`; its methods are those of the tokenizer, the template and grammars."""

    def __init__(
        self,
        *,
        id: str,
        path: Path,
        fingerprint: str,
        context_size: int,
        num_vocab: int,
        defaults: SamplingParams,
        chat_template: ChatTemplate,
    ) -> None:
        self.id = id
        self.path = path
        self.fingerprint = fingerprint
        self.context_size = context_size
        self.num_vocab = num_vocab
        self.defaults = defaults
        self.chat_template = chat_template
        self.render = chat_template.render
        self.vision_unavailable_reason = chat_template.vision_unavailable_reason
        self.load_images = chat_template.load_images
        self.close = chat_template.close
        self.tokenizer = tokenizer = chat_template.tokenizer
        self.eos_tokens = tokenizer.eos_tokens
        self.output_format = tokenizer.output_format
        self.max_chars = tokenizer.max_chars
        self.encode = tokenizer.encode
        self.fill_marks = tokenizer.fill_marks
        self.detokenize = tokenizer.detokenize
        self.detokenize_all = tokenizer.detokenize_all
        self.token_bytes = tokenizer.token_bytes
        self.parse_calls = tokenizer.parse_calls
        grammars = make_grammars(tokenizer, num_vocab)
        self.compile, self.is_compiled = grammars.compile, grammars.is_compiled


def load(config: Config) -> tuple[nn.Module, LoadedModel]:
    """Find, download if necessary, and load the model that `config` names.

    Call it on the device thread. Raises LoadError.
    """
    source = read_template(config.chat_template)
    path = locate(config.model)
    settings = read_settings(path)
    generation = read_json(path / "generation_config.json") or {}
    adapter = Path(config.adapter_path).expanduser() if config.adapter_path else None
    if adapter is not None:  # adapters are mlx-lm's, for mlx-lm's networks
        settings |= {"vision_config": None}
    memory_of(config).check_weights(path.glob("model*.safetensors"))
    network, wrapper, processor = _load_parts(path, generation, settings)
    if adapter is not None:
        _apply_adapter(network, adapter)
    has_vision = not isinstance(processor, str)
    context_size = _context_size(settings, config.ctx_size)
    # A prompt that is too long is counted to the end, for the client to shorten it, up to a bound.
    tokenizer = Tokenizer(wrapper, 2 * context_size, source, _call_parser(wrapper, source))
    template = ChatTemplate(tokenizer, source)
    if has_vision:
        processor = _make_reader(network, processor, template)
    template = replace(template, image_reader=processor)
    template.check()
    # mlx-vlm reads all safetensors files, mlx-lm those of the model's name.
    weights = path.glob("*.safetensors" if has_vision else "model*.safetensors")
    return network, LoadedModel(
        id=config.served_id,
        path=path,
        fingerprint=fingerprint_of(path, weights, adapter),
        context_size=context_size,
        num_vocab=int(network(mx.array([[0]])).shape[-1]),
        defaults=_sampling_defaults(generation),
        chat_template=template,
    )


def _call_parser(wrapper: Any, source: str | None) -> CallParser | None:
    """mlx-lm's parser for the operator's template, or for one of several: it looks at neither."""
    for template in templates_of(wrapper, source):
        seen = SimpleNamespace(chat_template=template, get_vocab=wrapper.get_vocab)
        if template and (name := tokenizer_utils._infer_tool_parser(seen)) is not None:
            found = import_module(f"mlx_lm.tool_parsers.{name}")
            return CallParser(found.parse_tool_call, found.tool_call_start, found.tool_call_end)
    return None


def _load_parts(
    path: Path, generation: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[nn.Module, Any, Any]:
    """The network, the tokenizer, and the processor or the reason why there is none.

    Raises LoadError.
    """
    try:
        network, processor = _load_vision(path, settings)
        if network is None:
            network, _ = load_model(path)
        eos = generation.get("eos_token_id")
        # Without the first, transformers may prompt on the terminal.
        extra: dict[str, Any] = {"trust_remote_code": False}
        if template := read_sidecar(path):
            extra["chat_template"] = template
        tokenizer = load_tokenizer(
            path,
            extra,
            eos_token_ids=settings.get("eos_token_id") if eos is None else eos,
        )
    except Exception as error:  # of any kind: tokenizers raises a bare Exception
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
    """An image-text model's network and processor; None and the reason for text only."""
    if not isinstance(settings.get("vision_config"), Mapping):
        return None, NO_VISION
    if not _has_mlx_vlm():
        return None, f"{NO_VISION} here: pip install 'mlxlite[vision]'"
    from mlxlite.vision.network import load

    try:
        return load(path)
    except Exception as error:  # as above; mlx-lm may be able to load it
        log.warning("pictures are off: mlx-vlm cannot load it: %s", reason_of(error))
        return None, f"{NO_VISION}: mlx-vlm cannot load it"


def _make_reader(network: nn.Module, processor: Any, template: ChatTemplate) -> "Reader | str":
    """The reader of images, tested on one image; or the reason why images cannot be read."""
    from mlxlite.vision.network import make_reader

    try:
        if not template.exists:
            raise PromptError("it has no chat template")
        return make_reader(network, processor, template.render_one_image())
    except Exception as error:  # of a foreign network, on its first image
        log.warning("pictures are off: %s", reason_of(error))
        return f"{NO_VISION}: {reason_of(error)}"


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


def memory_of(config: Config) -> DeviceMemory:
    """The memory of the default device. Call on the device thread."""
    return DeviceMemory(mx, config.memory_limit_bytes(), config.wired_limit_bytes())


def memory_budget(network: nn.Module, memory: DeviceMemory) -> Budget:
    """The budget beside a loaded network. Raises LoadError when nothing is left."""
    num_layers = len(getattr(network, "layers", ())) or 1
    most_pictures = getattr(network, "max_bytes", 0)
    if most_pictures:
        network.max_bytes = pictures_share(memory.limit, most_pictures)
    return memory.budget(num_layers, most_pictures)


def _context_size(settings: Mapping[str, Any], wanted: int) -> int:
    """Tokens: --ctx-size, or else the model's own maximum."""
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
