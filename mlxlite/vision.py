"""Image-text models: mlx-vlm's networks behind the interface of mlx-lm's, and pictures as prompts.

Two halves. The `Reader` is used in any thread: it turns a rendered chat and its pictures into a
prompt, by the checkpoint's own processor, and makes no MLX object that outlives a call. The
`VisionNetwork` lives on the lane: it looks at one picture at a time, keeps what it saw by the
picture's digest, and lets rows with pictures and rows without decode in one batch.

What a picture becomes is a few rows of input embeddings (and, for some, of the first layers'
states), which do not depend on the text around it: so a picture is looked at once, whatever prompt
it stands in. Rows differ in nothing but their offset of positions, where the model counts a
picture's rows and columns (mRoPE): one number a row.

Never: mlx-vlm's own loading of URLs and paths, code from a checkpoint, a position or a
picture left on the module, which all rows share. Imported only where mlx-vlm is there and a
checkpoint has a vision tower.
"""

import inspect
import logging
import threading
import warnings
from collections import OrderedDict, UserDict
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx_vlm
import mlx_vlm.models.cache as vlm_cache
import numpy as np
import numpy.typing as npt
from mlx import nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache
from mlx_vlm.generate.common import _chunked_prefill_enabled
from PIL import Image as PIL

from mlxlite.engine.sequence import Image, Prompt
from mlxlite.models.interface import PromptError

log = logging.getLogger("mlxlite.vision")

SEEN_BYTES = 256 << 20  # of what was seen, most; a picture of 1,000 tokens takes about 8 MB
MADE_BYTES = 128 << 20  # of what processors have made of pictures, most
# What `get_input_embeddings` may give: the embeddings, and what is understood beside them.
_FIELDS = {
    *("inputs_embeds", "visual_pos_masks", "deepstack_visual_embeds", "per_layer_inputs"),
    *("position_ids", "rope_deltas", "attention_mask_4d"),
}
_TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids"}
_TYPES = "mm_token_type_ids"  # which tokens are of a picture: for attention that looks ahead

_Tokens = npt.NDArray[np.uint32]


class Pixels(Protocol):
    """A picture: `media.Picture` is one."""

    @property
    def pixels(self) -> Any:
        """PIL's, mode RGB; decoding it may take long."""
        ...

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def digest(self) -> bytes: ...


class VisionError(ValueError):
    """A checkpoint's pictures cannot be served; the message is for the operator."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the tower reads of one picture: arrays by the processor's names, in `tokens`."""

    tokens: _Tokens
    arrays: Mapping[str, npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.tokens, *self.arrays.values()))

    def as_mlx(self) -> dict[str, mx.array]:
        return {name: mx.array(array) for name, array in self.arrays.items()}


@dataclass(frozen=True, slots=True)
class Seen:
    """What the model saw in one picture, `[n, D]`, and for its first layers, `[n, D]` each."""

    rows: mx.array
    deep: tuple[mx.array, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.rows, *self.deep))


# --- prompts ----------------------------------------------------------------------------------


class _Memo:
    """A processor's processor of images, which makes the same of the same pictures once.

    The text of a chat grows with each turn and its pictures do not. Used under the reader's lock,
    which sets `key`: the digests of the pictures that the processor has.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._made: OrderedDict[tuple[bytes, ...], Any] = OrderedDict()
        self.key: tuple[bytes, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __contains__(self, key: tuple[bytes, ...]) -> bool:
        return key in self._made

    def digests(self) -> set[bytes]:
        return {digest for key in list(self._made) for digest in key}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = self._made.pop(self.key, None)
        if made is None:
            made = self._inner(*args, **kwargs)
        self._made[self.key] = made
        while len(self._made) > 1 and sum(map(_nbytes, self._made.values())) > MADE_BYTES:
            self._made.popitem(last=False)
        return _copy(made)


def _nbytes(made: Any) -> int:
    if isinstance(made, Mapping | UserDict):
        return sum(map(_nbytes, made.values()))
    if isinstance(made, list | tuple):
        return sum(map(_nbytes, made))
    return int(getattr(made, "nbytes", 64))


def _copy(made: Any) -> Any:
    """One that may be changed, but for its arrays."""
    if isinstance(made, UserDict):
        return type(made)(_copy(made.data))
    if isinstance(made, dict):
        return {key: _copy(value) for key, value in made.items()}
    if isinstance(made, list | tuple):
        return type(made)(map(_copy, made))
    return made


class Reader:
    """Chats with pictures to prompts. From any thread, one at a time.

    `image_token` stands, in the processor's ids, where rows of a picture go.
    """

    def __init__(self, processor: Any, image_token: int, *, is_unbroken: bool) -> None:
        self._processor = processor
        self._image_token = image_token
        self._is_unbroken = is_unbroken
        self._lock = threading.Lock()
        self._memo: _Memo | None = None
        if callable(inner := getattr(processor, "image_processor", None)):
            self._memo = inner if isinstance(inner, _Memo) else _Memo(inner)
            processor.image_processor = self._memo

    def knows(self, digest: bytes) -> bool:
        """Whether a picture's pixels may well not be needed."""
        return self._memo is not None and digest in self._memo.digests()

    def read(self, text: str, lone: str, pictures: SequenceOf[Pixels]) -> Prompt:
        """A rendered chat's prompt; `lone` is a chat of one picture, rendered.

        Raises PromptError.
        """
        for picture in pictures:
            if not self.knows(picture.digest):
                _ = picture.pixels  # decoded before others have to wait
        with self._lock:
            tokens, arrays = self._process(text, pictures)
            if len(pictures) == 1:
                parts = [Inputs(tokens, arrays)]
            else:
                parts = [Inputs(*self._process(lone, [picture])) for picture in pictures]
        places = np.flatnonzero(tokens == self._image_token)
        sizes = [int((part.tokens == self._image_token).sum()) for part in parts]
        if not all(sizes) or sum(sizes) != len(places):
            raise PromptError("the chat template has not put each picture into the prompt")
        images, first = [], 0
        for picture, size, part in zip(pictures, sizes, parts, strict=True):
            span = places[first : first + size]
            place = int(span[0]), int(span[-1]) + 1
            images.append(Image(*place, picture.digest, part.nbytes, part))
            first += size
        if images[-1].stop == len(tokens):
            raise PromptError("the chat template lets the prompt end in a picture")
        layout = {k: v for k, v in arrays.items() if k == _TYPES or k.endswith("_grid_thw")}
        return Prompt(
            tuple(tokens.tolist()),
            images=tuple(images),
            layout=layout,
            unbroken=images[-1].stop if self._is_unbroken else 0,
        )

    def _images(self, pictures: SequenceOf[Pixels]) -> list[Any]:
        """The pictures for the processor; of those that it has seen together, only the sizes."""
        key = tuple(picture.digest for picture in pictures)
        if self._memo is None:
            return [picture.pixels for picture in pictures]
        self._memo.key = key
        if key in self._memo:
            return [PIL.new("RGB", picture.size) for picture in pictures]
        return [picture.pixels for picture in pictures]

    def _process(
        self, text: str, pictures: SequenceOf[Pixels]
    ) -> tuple[_Tokens, dict[str, npt.NDArray[Any]]]:
        images = self._images(pictures)
        try:
            # The template has the special tokens.
            found = self._processor(text=[text], images=images, add_special_tokens=False)
        except Exception as error:  # a foreign processor fails in any way
            reason = f"{type(error).__name__}: {error}"[:200]
            raise PromptError(f"the model's processor refused the pictures: {reason}") from error
        values = dict(found)
        tokens = np.asarray(values["input_ids"]).reshape(-1).astype(np.uint32)
        return tokens, {
            name: array
            for name, value in values.items()
            if name not in _TEXT_KEYS and (array := _array(value)) is not None
        }


def _array(value: Any) -> npt.NDArray[Any] | None:
    """A processor's value as numbers; None for what is none, or has no one shape."""
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array if array.dtype.kind in "biuf" else None


@contextmanager
def _foreign() -> Iterator[None]:
    """A foreign model fails in any way on pictures: it costs the sequence that has them."""
    try:
        yield
    except (ValueError, RuntimeError, MemoryError):
        raise
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


# --- the network ------------------------------------------------------------------------------


class _Arrays(vlm_cache.ArraysCache):
    """mlx-vlm's recurrent states, made and merged as mlx-lm's are."""

    @classmethod
    def from_state(cls, state: Any, meta_state: Any = None) -> "_Arrays":
        cache = cls(len(state))
        cache.state = list(state)
        return cache

    @classmethod
    def merge(cls, caches: SequenceOf["_Arrays"]) -> "_Arrays":
        merged = cast("_Arrays", super().merge(caches))
        merged.left_padding = None  # zeros would hide the lengths of rows padded on the right
        return merged


def _own(layer: Any) -> Any:
    """A cache of a kind that batches: mlx-vlm's copies of mlx-lm's are those."""
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
    """A batch's cache without its padding, of which the mask alone should tell.

    Some of mlx-vlm's models go ways of their own where they see padding: row by row, waiting for
    the device at each step, and past the mask where keys are quantised.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        if name == "left_padding":
            raise AttributeError(name)
        return getattr(self._layer, name)


def _unpadded(cache: SequenceOf[Any]) -> SequenceOf[Any]:
    """The same list where nothing is padded: some models replace its entries."""
    is_padded = [isinstance(getattr(c, "left_padding", None), mx.array) for c in cache]
    if not any(is_padded):
        return cache
    return [_Unpadded(c) if padded else c for c, padded in zip(cache, is_padded, strict=True)]


class VisionNetwork(nn.Module):
    """An mlx-vlm model that is called like one of mlx-lm's. Lives on the lane.

    `deltas` `[B]` are what rows add to their positions; None is nothing. `max_bytes` bounds what is
    kept of pictures. Raises VisionError for a model that cannot be served so.
    """

    def __init__(self, network: Any, *, max_bytes: int = SEEN_BYTES) -> None:
        super().__init__()
        self.network = network
        self.max_bytes = max_bytes
        self._seen: OrderedDict[bytes, Seen] = OrderedDict()
        self.num_looks = 0  # of the tower, since the start
        language = network.language_model
        self.has_positions = hasattr(language, "get_rope_index")
        if not hasattr(network, "get_input_embeddings"):
            raise VisionError("it does not make embeddings of pictures")

    @property
    def image_token(self) -> int:
        """The id that stands where rows of a picture go. Raises VisionError."""
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
        """Some leave them on the module, where the next row would find them."""
        language = self.network.language_model
        for name in ("_position_ids", "_rope_deltas"):
            if getattr(language, name, None) is not None:
                setattr(language, name, None)

    def begin(self, prompt: Prompt, tokens: _Tokens) -> "Sight":
        """One sequence with pictures; `tokens` are its prompt's, and those drawn before."""
        return Sight(self, prompt, tokens)

    # --- pictures ---------------------------------------------------------------------------

    def see(self, image: Image) -> Seen:
        """What is seen in a picture: kept from before, or else through the tower."""
        seen = self._seen.pop(image.digest, None)
        if seen is None:
            seen = self._look(image.inputs)
            self.num_looks += 1
        self._seen[image.digest] = seen
        while len(self._seen) > 1 and sum(s.nbytes for s in self._seen.values()) > self.max_bytes:
            self._seen.popitem(last=False)
        return seen

    def forget(self) -> None:
        self._seen.clear()

    def _look(self, inputs: Inputs) -> Seen:
        found = self._features(inputs)
        places = np.flatnonzero(inputs.tokens == self.image_token)
        at = mx.array(places)
        deep = getattr(found, "deepstack_visual_embeds", None)
        if deep is not None and deep[0].shape[0] != len(places):  # for all tokens, not only these
            deep = [layer[at] for layer in deep]
        return Seen(found.inputs_embeds[0, at], tuple(deep) if deep is not None else ())

    def _features(self, inputs: Inputs) -> Any:
        """What the model makes of a picture among its tokens."""
        arrays = inputs.as_mlx()
        pixels = arrays.pop("pixel_values")
        ids = mx.array(inputs.tokens[None])
        found = self.network.get_input_embeddings(ids, pixels, mask=None, **arrays)
        self._forget_positions()
        return found

    def fields(self, inputs: Inputs) -> set[str]:
        """The names of what the model makes of a picture."""
        found = self._features(inputs).to_dict()
        return {name for name, value in found.items() if value is not None}

    def is_unbroken(self, inputs: Inputs) -> bool:
        """Whether attention inside of pictures looks ahead, so that all must be one chunk."""
        return not _chunked_prefill_enabled(self.network, prefill_kwargs=inputs.as_mlx())

    def positions(self, prompt: Prompt, num_tokens: int) -> tuple[mx.array, mx.array]:
        """`[3, 1, num_tokens]` of a prompt and what follows it, and what rows add from then on."""
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
class Sight:
    """What one sequence sees while it prefills. Looks come before the chunks that need them."""

    network: VisionNetwork
    prompt: Prompt
    tokens: _Tokens
    delta: mx.array | None = None  # [1]
    _positions: mx.array | None = None
    _seen: dict[int, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.network.has_positions:
            with _foreign():
                found = self.network.positions(self.prompt, len(self.tokens))
            self._positions, self.delta = found

    def look(self, index: int) -> list[mx.array]:
        """See an image of the prompt; the arrays that this makes."""
        with _foreign():
            seen = self._seen[index] = self.network.see(self.prompt.images[index])
        return [seen.rows, *seen.deep]

    def window(self, start: int, stop: int) -> dict[str, Any]:
        """The network's arguments for the tokens `[start, stop)`."""
        inputs: dict[str, Any] = {}
        if self._positions is not None:
            inputs["position_ids"] = self._positions[:, :, start:stop]
        near = [i for i, m in enumerate(self.prompt.images) if m.start < stop and m.stop > start]
        if near:
            with _foreign():
                inputs |= self._embed(near, start, stop)
        for i in list(self._seen):  # no later chunk needs it
            if self.prompt.images[i].stop <= stop:
                del self._seen[i]
        return inputs

    def look_and_window(self, stop: int) -> dict[str, Any]:
        """All at once up to a token: where what was kept of a prompt is lost."""
        images = self.prompt.images
        for i in range(len(images)):
            if images[i].start < stop:
                self.look(i)
        return self.window(0, stop)

    def _embed(self, near: list[int], start: int, stop: int) -> dict[str, Any]:
        """Embeddings of text, with those of pictures put in their places."""
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
        if start < self.prompt.unbroken and _TYPES in self.prompt.layout:
            inputs[_TYPES] = mx.array(self.prompt.layout[_TYPES][:, start:stop])
        return inputs

    def _part(self, index: int, start: int, stop: int) -> Seen:
        """The rows of an image that stand in `[start, stop)`."""
        image = self.prompt.images[index]
        places = self.tokens[image.start : image.stop] == self.network.image_token
        skip = int(places[: max(0, start - image.start)].sum())
        num = int(places[max(0, start - image.start) : stop - image.start].sum())
        seen = self._seen[index]
        return Seen(
            seen.rows[skip : skip + num], tuple(layer[skip : skip + num] for layer in seen.deep)
        )


def _positions(shape: tuple[int, ...], cache: Any, deltas: mx.array | None) -> mx.array:
    """`[3, B, T]`: where the cache ends and on, and what each row adds."""
    ends = next((layer.offset for layer in cache or () if hasattr(layer, "offset")), 0)
    first = mx.array(ends, mx.int32).reshape(-1, 1)
    if deltas is not None:
        first = first + deltas[:, None]
    positions = first + mx.arange(shape[1], dtype=mx.int32)[None]
    return mx.broadcast_to(positions[None], (3, shape[0], shape[1]))


# --- loading ----------------------------------------------------------------------------------


def load(path: Path) -> tuple[VisionNetwork, Any]:
    """The network and its processor. Call it on the lane; raises whatever mlx-vlm raises.

    The caller has refused a checkpoint with code of its own: mlx-vlm would run it.
    """
    with warnings.catch_warnings():  # about parts for sound, which are not used
        warnings.simplefilter("ignore")
        network, processor = mlx_vlm.load(str(path), trust_remote_code=False)
    return VisionNetwork(network), processor


def reader(network: VisionNetwork, processor: Any, lone: str) -> Reader:
    """What reads pictures for this network, tried out with a small one. Call it on the lane.

    Raises VisionError for a model whose pictures cannot be served this way.
    """
    sample = _Sample(PIL.new("RGB", (64, 64), (200, 30, 30)))
    trial = Reader(processor, network.image_token, is_unbroken=False)
    try:
        prompt = trial.read(lone, lone, [sample])
    except PromptError as error:
        raise VisionError(str(error)) from error
    inputs = prompt.images[0].inputs
    fields = network.fields(inputs)
    is_unbroken = network.is_unbroken(inputs)
    if unknown := sorted(fields - _FIELDS):
        raise VisionError(f"what it makes of a picture is not understood ({', '.join(unknown)})")
    if is_unbroken and _TYPES not in inputs.arrays:
        raise VisionError("its attention looks ahead in a way that is not understood")
    if not network.has_positions and "position_ids" in fields:
        raise VisionError("it counts positions in a way that is not understood")
    sight = network.begin(prompt, np.array(prompt.tokens, np.uint32))
    sight.look(0)
    cache = network.make_cache()
    mx.eval(network(mx.array([prompt.tokens]), cache=cache, **sight.window(0, len(prompt.tokens))))
    network.forget()
    network.num_looks = 0
    return Reader(processor, network.image_token, is_unbroken=is_unbroken)


@dataclass(frozen=True, slots=True)
class _Sample:
    pixels: Any
    digest: bytes = b"sample"

    @property
    def size(self) -> tuple[int, int]:
        return cast("tuple[int, int]", self.pixels.size)
