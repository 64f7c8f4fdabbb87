"""Rendered chats with images to prompts: the checkpoint's own processor, run once per image.

Decides the token range of each image in the prompt and the arrays that are its input to the vision
tower. Thread-safe; holds no MLX object. It must never decode an image that has been processed
before: a chat's text grows with each turn, its images stay the same.
"""

import threading
from collections import OrderedDict, UserDict
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image as PIL

from mlxlite.engine.sequence import Image, Prompt
from mlxlite.vision.decoder import Decoder
from mlxlite.vision.fetch import Limits
from mlxlite.vision.images import ImageError, LoadedImage, Source, load

MADE_BYTES = 128 << 20  # of cached image processor results, at most
TOKEN_TYPES = "mm_token_type_ids"  # marks image tokens, for bidirectional attention in images
_TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids"}

Tokens: TypeAlias = npt.NDArray[np.uint32]


class ImageInput(Protocol):
    """The part of `images.LoadedImage` that is used here."""

    @property
    def pixels(self) -> Any:
        """PIL's, mode RGB; decoding it may take long. Raises ImageError."""

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def digest(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Inputs:
    """One image's input to the vision tower: arrays by the processor's names, and its tokens."""

    tokens: Tokens
    arrays: Mapping[str, npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.tokens, *self.arrays.values()))


class _ImageProcessor:
    """A processor's image processor, with its results cached by the images' digests.

    Used under the reader's lock. The reader sets `key`, the digests of the images, before each
    call, because the processor passes only pixels on.
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
    """A deep copy that shares its arrays: the processor modifies the result."""
    if isinstance(made, UserDict):
        return type(made)(_copy(made.data))
    if isinstance(made, dict):
        return {key: _copy(value) for key, value in made.items()}
    if isinstance(made, list | tuple):
        return type(made)(map(_copy, made))
    return made


class Reader:
    """Makes prompts of rendered chats with images, one at a time.

    `image_token` is the id of image rows in the processor's output. `is_unbroken` is for models
    with bidirectional attention in images: the prompt up to the last image must be one chunk.
    """

    def __init__(self, processor: Any, image_token: int, *, is_unbroken: bool) -> None:
        self._processor = processor
        self._image_token = image_token
        self._is_unbroken = is_unbroken
        self._lock = threading.Lock()
        self._decoder = Decoder()
        self.close = self._decoder.close
        self._cache: _ImageProcessor | None = None
        if callable(inner := getattr(processor, "image_processor", None)):
            self._cache = inner if isinstance(inner, _ImageProcessor) else _ImageProcessor(inner)
            processor.image_processor = self._cache

    def knows(self, digest: bytes) -> bool:
        """Whether an image's result is cached, so that its pixels are probably not needed."""
        return self._cache is not None and digest in self._cache.digests()

    def load(
        self,
        sources: SequenceOf[Source],
        limits: Limits,
        is_needed: Callable[[Source], bool],
    ) -> tuple[LoadedImage | None, ...]:
        """Images in order, decoded unless their results are cached. Raises ImageError, Dropped."""
        return load(sources, limits, self._decoder, is_known=self.knows, is_needed=is_needed)

    def read(self, text: str, lone: str, images: SequenceOf[ImageInput]) -> Prompt:
        """The prompt of a rendered chat; `lone` is a rendered chat of one image.

        Raises ImageError, also for a template that omits an image or ends in one.
        """
        for image in images:
            if not self.knows(image.digest):
                _ = image.pixels  # decoded outside the lock
        with self._lock:
            tokens, arrays = self._process(text, images)
            if len(images) == 1:
                parts = [Inputs(tokens, arrays)]
            else:
                parts = [Inputs(*self._process(lone, [image])) for image in images]
        places = np.flatnonzero(tokens == self._image_token)
        sizes = [int((part.tokens == self._image_token).sum()) for part in parts]
        if not all(sizes) or sum(sizes) != len(places):
            raise ImageError("the chat template has not put each picture into the prompt")
        placed, first = [], 0
        for image, size, part in zip(images, sizes, parts, strict=True):
            span = places[first : first + size]
            place = int(span[0]), int(span[-1]) + 1
            placed.append(Image(*place, image.digest, part.nbytes, part))
            first += size
        if placed[-1].stop == len(tokens):
            raise ImageError("the chat template lets the prompt end in a picture")
        layout = {k: v for k, v in arrays.items() if k == TOKEN_TYPES or k.endswith("_grid_thw")}
        return Prompt(
            tuple(tokens.tolist()),
            images=tuple(placed),
            layout=layout,
            min_first_chunk=placed[-1].stop if self._is_unbroken else 0,
        )

    def _pixels(self, images: SequenceOf[ImageInput]) -> list[Any]:
        """What the processor gets: blank images of the same sizes where its results are kept."""
        if self._cache is not None:
            self._cache.key = tuple(image.digest for image in images)
            if self._cache.key in self._cache:
                return [PIL.new("RGB", image.size) for image in images]
        return [image.pixels for image in images]

    def _process(
        self, text: str, images: SequenceOf[ImageInput]
    ) -> tuple[Tokens, dict[str, npt.NDArray[Any]]]:
        pixels = self._pixels(images)
        try:
            # The template adds the special tokens.
            found = self._processor(text=[text], images=pixels, add_special_tokens=False)
        except Exception as error:  # a foreign processor may raise any error
            reason = f"{type(error).__name__}: {error}"[:200]
            raise ImageError(f"the model's processor refused the pictures: {reason}") from error
        values = dict(found)
        tokens = np.asarray(values["input_ids"]).reshape(-1).astype(np.uint32)
        return tokens, {
            name: array
            for name, value in values.items()
            if name not in _TEXT_KEYS and (array := _array(value)) is not None
        }


def _array(value: Any) -> npt.NDArray[Any] | None:
    """A processor's value as an array of numbers; None if it is not one, or ragged."""
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    return array if array.dtype.kind in "biuf" else None
