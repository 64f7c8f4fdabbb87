"""Image-text models: mlx-vlm's networks behind the interface of mlx-lm's.

`VisionNetwork` lives on the device thread: it encodes one image at a time, caches the features by
the image's digest, and decodes rows with images and rows without in one batch. An image becomes
rows of input embeddings (and, for some models, of the first layers' states), which do not depend on
the text around it: so it is encoded once for all prompts. Rows differ only in their position
offset, one number a row, for models whose positions count an image's rows and columns (mRoPE).

It must never use mlx-vlm's own loading of URLs and paths, run code from a checkpoint, or leave a
position or an image on the module, which all rows share.
"""

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx_vlm
import mlx_vlm.models.cache as vlm_cache
import numpy as np
from mlx import nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_vlm.generate.common import _chunked_prefill_enabled
from PIL import Image as PIL

from mlxlite.engine.sequence import Image, Prompt
from mlxlite.vision.images import ImageError
from mlxlite.vision.processor import TOKEN_TYPES, Inputs, Reader, Tokens

FEATURE_BYTES = 256 << 20  # of cached features, at most; 1,000 tokens take about 8 MB
# The supported fields of a `get_input_embeddings` result.
_FIELDS = {
    *("inputs_embeds", "visual_pos_masks", "deepstack_visual_embeds", "per_layer_inputs"),
    *("position_ids", "rope_deltas", "attention_mask_4d"),
}


class VisionError(ValueError):
    """A checkpoint's images cannot be served; the message is for the operator."""


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """An image's features: embeddings `[n, D]`, and for the first layers `[n, D]` each."""

    rows: mx.array
    deep: tuple[mx.array, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.rows, *self.deep))


def _as_mlx(inputs: Inputs) -> dict[str, mx.array]:
    return {name: mx.array(array) for name, array in inputs.arrays.items()}


@contextmanager
def _foreign() -> Iterator[None]:
    """Turn any error of a foreign model into one that fails only its sequence."""
    try:
        yield
    except (ValueError, RuntimeError, MemoryError):
        raise
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


# --- the network ------------------------------------------------------------------------------


class _Arrays(vlm_cache.ArraysCache):
    """mlx-vlm's recurrent states, created and merged like mlx-lm's."""

    @classmethod
    def from_state(cls, state: Any, meta_state: Any = None) -> "_Arrays":
        cache = cls(len(state))
        cache.state = list(state)
        return cache

    @classmethod
    def merge(cls, caches: SequenceOf["_Arrays"]) -> "_Arrays":
        merged = cast("_Arrays", super().merge(caches))
        merged.left_padding = None  # zeros would override the lengths of right-padded rows
        return merged


def _own(layer: Any) -> Any:
    """The batchable mlx-lm cache for one of mlx-vlm's copies. Raises VisionError."""
    if type(layer) is vlm_cache.KVCache:
        return KVCache()
    if type(layer) is vlm_cache.RotatingKVCache:
        return RotatingKVCache(layer.max_size, layer.keep)
    if type(layer) is vlm_cache.ArraysCache:
        return _Arrays(len(layer.cache))
    if type(layer).__module__ == vlm_cache.__name__:
        raise VisionError(f"its {type(layer).__name__} is of no kind that this server keeps")
    return layer


class _Unpadded:
    """A batch's cache that hides its padding, which the mask already covers.

    Some of mlx-vlm's models branch on padding: they loop over rows, synchronise with the device at
    each step, and ignore the mask if keys are quantised.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        if name == "left_padding":
            raise AttributeError(name)
        return getattr(self._layer, name)


def _unpadded(cache: SequenceOf[Any]) -> SequenceOf[Any]:
    """Hide padding; without any, return the same list, whose entries some models replace."""
    is_padded = [isinstance(getattr(c, "left_padding", None), mx.array) for c in cache]
    if not any(is_padded):
        return cache
    return [_Unpadded(c) if padded else c for c, padded in zip(cache, is_padded, strict=True)]


class VisionNetwork(nn.Module):
    """An mlx-vlm model with the interface of mlx-lm's. Lives on the device thread.

    `deltas` `[B]` are the rows' position offsets; None is 0. `max_bytes` bounds the cached
    features. Raises VisionError for an unsupported model.
    """

    def __init__(self, network: Any, *, max_bytes: int = FEATURE_BYTES) -> None:
        super().__init__()
        self.network = network
        self.max_bytes = max_bytes
        self._cached: OrderedDict[bytes, ImageFeatures] = OrderedDict()
        self.num_encoded = 0  # images encoded since the start
        language = network.language_model
        self.has_positions = hasattr(language, "get_rope_index")
        if not hasattr(network, "get_input_embeddings"):
            raise VisionError("it does not make embeddings of pictures")

    @property
    def image_token(self) -> int:
        """The id that marks the rows of images. Raises VisionError."""
        config = self.network.config
        for name in ("image_token_id", "image_token_index"):
            if isinstance(token := getattr(config, name, None), int):
                return token
        raise VisionError("its config.json names no token for pictures")

    @property
    def layers(self) -> list[nn.Module]:
        return cast("list[nn.Module]", self.network.language_model.layers)

    def make_cache(self) -> list[Any]:
        return [_own(layer) for layer in make_prompt_cache(self.network.language_model)]

    def __call__(
        self, tokens: mx.array, cache: Any = None, deltas: mx.array | None = None, **inputs: Any
    ) -> mx.array:
        """Logits `[B, T, V]` for token ids `[B, T]`, or for the embeddings in `inputs`."""
        language = self.network.language_model
        if self.has_positions and "position_ids" not in inputs:
            inputs["position_ids"] = _positions(tokens.shape, cache, deltas)
        cache = _unpadded(cache) if cache is not None else None
        logits = language(tokens, cache=cache, **inputs).logits
        self._forget_positions()
        return cast("mx.array", logits)

    def states(self, tokens: mx.array, cache: Any = None) -> mx.array:
        """The last layer's states `[B, T, D]`. Raises NotImplementedError."""
        inner = getattr(self.network.language_model, "model", None)
        if not isinstance(inner, nn.Module):
            raise NotImplementedError("this model does not show its last states")
        inputs: dict[str, Any] = {}
        if self.has_positions:
            inputs["position_ids"] = _positions(tokens.shape, cache, None)
        return cast("mx.array", inner(tokens, cache=cache, **inputs))

    def _forget_positions(self) -> None:
        """Some models leave positions on the module, where the next row would use them."""
        language = self.network.language_model
        for name in ("_position_ids", "_rope_deltas"):
            if getattr(language, name, None) is not None:
                setattr(language, name, None)

    def begin(self, prompt: Prompt, tokens: Tokens) -> "ImagePrefill":
        """Start one sequence's prefill; `tokens` are its prompt's and those sampled before."""
        return ImagePrefill(self, prompt, tokens)

    # --- images -----------------------------------------------------------------------------

    def features(self, image: Image) -> ImageFeatures:
        """An image's features, from the cache or the vision tower."""
        features = self._cached.pop(image.digest, None)
        if features is None:
            features = self._encode(image.inputs)
            self.num_encoded += 1
        self._cached[image.digest] = features
        while (
            len(self._cached) > 1 and sum(f.nbytes for f in self._cached.values()) > self.max_bytes
        ):
            self._cached.popitem(last=False)
        return features

    def forget(self) -> None:
        self._cached.clear()

    def _encode(self, inputs: Inputs) -> ImageFeatures:
        found = self._features(inputs)
        places = np.flatnonzero(inputs.tokens == self.image_token)
        at = mx.array(places)
        deep = getattr(found, "deepstack_visual_embeds", None)
        if deep is not None and deep[0].shape[0] != len(
            places
        ):  # of all tokens, not only the image's
            deep = [layer[at] for layer in deep]
        return ImageFeatures(found.inputs_embeds[0, at], tuple(deep) if deep is not None else ())

    def _features(self, inputs: Inputs) -> Any:
        arrays = _as_mlx(inputs)
        pixels = arrays.pop("pixel_values")
        ids = mx.array(inputs.tokens[None])
        found = self.network.get_input_embeddings(ids, pixels, mask=None, **arrays)
        self._forget_positions()
        return found

    def fields(self, inputs: Inputs) -> set[str]:
        """The names of the fields that the model computes for an image."""
        found = self._features(inputs).to_dict()
        return {name for name, value in found.items() if value is not None}

    def is_unbroken(self, inputs: Inputs) -> bool:
        """Whether attention in images is bidirectional, so that they must be in one chunk."""
        return not _chunked_prefill_enabled(self.network, prefill_kwargs=_as_mlx(inputs))

    def positions(self, prompt: Prompt, num_tokens: int) -> tuple[mx.array, mx.array]:
        """Positions `[3, 1, num_tokens]` of a prompt and later tokens, and their offset `[1]`."""
        rope = self.network.language_model.get_rope_index
        known = inspect.signature(rope).parameters
        layout = {k: mx.array(v) for k, v in prompt.layout.items() if k in known}
        found, delta = rope(mx.array([prompt.tokens]), **layout)
        self._forget_positions()
        num_prompt = len(prompt.tokens)
        shape = (3, 1, num_prompt)
        found = mx.broadcast_to(found if found.ndim == 3 else found[None], shape)
        delta = mx.array(delta).reshape(-1)[:1].astype(mx.int32)
        later = mx.broadcast_to(
            mx.arange(num_prompt, num_tokens) + delta, (3, 1, num_tokens - num_prompt)
        )
        return mx.concatenate([found.astype(mx.int32), later.astype(mx.int32)], axis=2), delta


@dataclass(slots=True)
class ImagePrefill:
    """The images of one sequence in prefill; `encode` precedes the chunks that need an image."""

    network: VisionNetwork
    prompt: Prompt
    tokens: Tokens
    delta: mx.array | None = None  # [1]
    _positions: mx.array | None = None
    _encoded: dict[int, ImageFeatures] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.network.has_positions:
            with _foreign():
                found = self.network.positions(self.prompt, len(self.tokens))
            self._positions, self.delta = found

    def encode(self, index: int) -> list[mx.array]:
        """Encode an image of the prompt; return the arrays to evaluate."""
        with _foreign():
            features = self._encoded[index] = self.network.features(self.prompt.images[index])
        return [features.rows, *features.deep]

    def window(self, start: int, stop: int) -> dict[str, Any]:
        """The network's arguments for the tokens `[start, stop)`."""
        inputs: dict[str, Any] = {}
        if self._positions is not None:
            inputs["position_ids"] = self._positions[:, :, start:stop]
        near = [i for i, m in enumerate(self.prompt.images) if m.start < stop and m.stop > start]
        if near:
            with _foreign():
                inputs |= self._embed(near, start, stop)
        for i in list(self._encoded):  # no later chunk needs it
            if self.prompt.images[i].stop <= stop:
                del self._encoded[i]
        return inputs

    def encode_and_window(self, stop: int) -> dict[str, Any]:
        """Encode all images before `stop`: for a prompt whose cached prefix was lost."""
        images = self.prompt.images
        for i in range(len(images)):
            if images[i].start < stop:
                self.encode(i)
        return self.window(0, stop)

    def _embed(self, near: list[int], start: int, stop: int) -> dict[str, Any]:
        """Embeddings of text, with images' features at their tokens."""
        chunk = self.tokens[start:stop]
        network = self.network.network
        found = network.get_input_embeddings(mx.array(chunk[None]), None)
        self.network._forget_positions()
        is_image = chunk == self.network.image_token
        wanted = [self._part(i, start, stop) for i in near]
        rows = mx.concatenate([part.rows for part in wanted]).astype(found.inputs_embeds.dtype)
        embeds = found.inputs_embeds
        embeds[0, mx.array(np.flatnonzero(is_image))] = rows
        inputs = {"inputs_embeds": embeds}
        if (layered := getattr(found, "per_layer_inputs", None)) is not None:
            inputs["per_layer_inputs"] = layered
        if wanted[0].deep:
            inputs["visual_pos_masks"] = mx.array(is_image[None])
            layers = zip(*(part.deep for part in wanted), strict=True)
            inputs["deepstack_visual_embeds"] = [mx.concatenate(list(layer)) for layer in layers]
        if start < self.prompt.min_first_chunk and TOKEN_TYPES in self.prompt.layout:
            inputs[TOKEN_TYPES] = mx.array(self.prompt.layout[TOKEN_TYPES][:, start:stop])
        return inputs

    def _part(self, index: int, start: int, stop: int) -> ImageFeatures:
        """The features of an image's tokens in `[start, stop)`."""
        image = self.prompt.images[index]
        places = self.tokens[image.start : image.stop] == self.network.image_token
        skip = int(places[: max(0, start - image.start)].sum())
        num = int(places[max(0, start - image.start) : stop - image.start].sum())
        features = self._encoded[index]
        return ImageFeatures(
            features.rows[skip : skip + num],
            tuple(layer[skip : skip + num] for layer in features.deep),
        )


def _positions(shape: tuple[int, ...], cache: Any, deltas: mx.array | None) -> mx.array:
    """`[3, B, T]`: from the cache's end on, plus each row's offset."""
    ends = next((layer.offset for layer in cache or () if hasattr(layer, "offset")), 0)
    first = mx.array(ends, mx.int32).reshape(-1, 1)
    if deltas is not None:
        first = first + deltas[:, None]
    positions = first + mx.arange(shape[1], dtype=mx.int32)[None]
    return mx.broadcast_to(positions[None], (3, shape[0], shape[1]))


# --- loading ----------------------------------------------------------------------------------


def load(path: Path) -> tuple[VisionNetwork, Any]:
    """The network and its processor. Call it on the device thread; raises any error of mlx-vlm.

    The caller must refuse a checkpoint with code of its own: mlx-vlm would run it.
    """
    with warnings.catch_warnings():  # about audio parts, which are not used
        warnings.simplefilter("ignore")
        network, processor = mlx_vlm.load(str(path), trust_remote_code=False)
    return VisionNetwork(network), processor


def make_reader(network: VisionNetwork, processor: Any, lone: str) -> Reader:
    """The reader for this network, tested with a small image. Call it on the device thread.

    Raises VisionError for an unsupported model.
    """
    sample = _Sample(PIL.new("RGB", (64, 64), (200, 30, 30)))
    trial = Reader(processor, network.image_token, is_unbroken=False)
    try:
        prompt = trial.read(lone, lone, [sample])
    except ImageError as error:
        raise VisionError(str(error)) from error
    inputs = prompt.images[0].inputs
    fields = network.fields(inputs)
    is_unbroken = network.is_unbroken(inputs)
    if unknown := sorted(fields - _FIELDS):
        raise VisionError(f"what it makes of a picture is not understood ({', '.join(unknown)})")
    if is_unbroken and TOKEN_TYPES not in inputs.arrays:
        raise VisionError("its attention looks ahead in a way that is not understood")
    if not network.has_positions and "position_ids" in fields:
        raise VisionError("it counts positions in a way that is not understood")
    prefill = network.begin(prompt, np.array(prompt.tokens, np.uint32))
    prefill.encode(0)
    cache = network.make_cache()
    mx.eval(
        network(mx.array([prompt.tokens]), cache=cache, **prefill.window(0, len(prompt.tokens)))
    )
    network.forget()
    network.num_encoded = 0
    return Reader(processor, network.image_token, is_unbroken=is_unbroken)


@dataclass(frozen=True, slots=True)
class _Sample:
    pixels: Any
    digest: bytes = b"sample"

    @property
    def size(self) -> tuple[int, int]:
        return cast("tuple[int, int]", self.pixels.size)
