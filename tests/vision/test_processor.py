"""Prompts with images, by a fake processor: token ranges, cached results, refusals."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlxlite.vision import processor
from mlxlite.vision.images import ImageError
from mlxlite.vision.processor import Reader

IMAGE = 9  # the token that marks an image's rows
PATCHES = {"small": 1, "large": 3}  # rows of an image, by its digest


@dataclass
class FakeImage:
    digest: bytes
    num_decoded: int = 0

    @property
    def size(self) -> tuple[int, int]:
        return PATCHES[self.digest.decode()], 1

    @property
    def pixels(self) -> Any:
        self.num_decoded += 1
        return Image.new("RGB", self.size)


@dataclass
class FakeProcessor:
    """Each `i` of a text is an image as many tokens long as it is wide; other characters are 1."""

    num_calls: int = 0
    image_processor: Any = field(init=False)

    def __post_init__(self) -> None:
        self.image_processor = self._read_images

    def _read_images(self, images: Sequence[Any]) -> dict[str, Any]:
        self.num_calls += 1
        return {"pixel_values": np.zeros((len(images), 2)), "sizes": [i.size for i in images]}

    def __call__(self, *, text: list[str], images: Sequence[Any], **_: Any) -> dict[str, Any]:
        found = self.image_processor(images)
        widths = iter([width for width, _ in found.pop("sizes")])
        tokens = [t for c in text[0] for t in ([IMAGE] * next(widths) if c == "i" else [1])]
        return {"input_ids": [tokens], "attention_mask": [[1] * len(tokens)], **found}


def read(text: str, *digests: bytes, reader: Reader | None = None) -> Any:
    reader = reader or Reader(FakeProcessor(), IMAGE, is_unbroken=False)
    return reader.read(text, "i.", [FakeImage(digest) for digest in digests])


def test_the_range_of_an_image_is_that_of_its_tokens():
    prompt = read("a i b i.", b"large", b"small")
    assert prompt.tokens == (1, 1, 9, 9, 9, 1, 1, 1, 9, 1)
    assert [(i.start, i.stop, i.digest) for i in prompt.images] == [
        (2, 5, b"large"),
        (8, 9, b"small"),
    ]
    assert prompt.min_first_chunk == 0


def test_each_image_has_inputs_of_its_own():
    first, second = read("a i b i.", b"large", b"small").images
    assert first.inputs.tokens.tolist() == [9, 9, 9, 1]
    assert second.inputs.tokens.tolist() == [9, 1]
    assert first.inputs.arrays["pixel_values"].shape == (1, 2)


def test_bidirectional_attention_makes_all_images_one_chunk():
    reader = Reader(FakeProcessor(), IMAGE, is_unbroken=True)
    assert read("a i b.", b"large", reader=reader).min_first_chunk == 5


def test_a_processed_image_is_not_decoded_again():
    inner = FakeProcessor()
    reader = Reader(inner, IMAGE, is_unbroken=False)
    first, again = FakeImage(b"large"), FakeImage(b"large")
    assert not reader.knows(b"large")
    before = reader.read("i.", "i.", [first])
    assert reader.knows(b"large")
    after = reader.read("i. and more", "i.", [again])
    assert (inner.num_calls, again.num_decoded) == (1, 0)
    assert after.images[0].inputs.arrays.keys() == before.images[0].inputs.arrays.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a text", "has not put each picture into the prompt"),
        ("an i", "lets the prompt end in a picture"),
        ("an i and i.", "refused the pictures: StopIteration"),
    ],
)
def test_a_template_that_does_not_match_its_images_is_an_image_error(text: str, message: str):
    with pytest.raises(ImageError, match=message) as caught:
        read(text, b"small")
    assert caught.value.param is None


def test_the_cached_results_are_bounded(monkeypatch: pytest.MonkeyPatch):
    class Processor:
        image_processor = staticmethod(lambda images: {"pixel_values": np.zeros(1000)})

    monkeypatch.setattr(processor, "MADE_BYTES", 20_000)
    reader = Reader(Processor(), 0, is_unbroken=False)
    cache = reader._cache
    assert cache is not None
    for i in range(5):
        cache.key = (b"%d" % i,)
        made = cache([])
        made.pop("pixel_values")  # the processor may modify the result
        assert "pixel_values" in cache([])
    assert cache.digests() == {b"3", b"4"}
