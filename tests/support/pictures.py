"""Images for the tests: one filled shape of a plain colour, as the tiny trained model knows them.

They are drawn here and not with what the model was trained on, so that the two can disagree.
"""

import base64
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")


def draw(
    colour: str,
    shape: str,
    size: tuple[int, int] = (96, 96),
    box: tuple[int, int, int, int] = (24, 20, 76, 72),
    background: str = "white",
) -> Image.Image:
    """A picture of a shape that fills a box (left, top, right, bottom)."""
    picture = Image.new("RGB", size, background)
    pen = ImageDraw.Draw(picture)
    left, top, right, bottom = box
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        assert shape == "triangle"
        pen.polygon([((left + right) // 2, top), (left, bottom), (right, bottom)], fill=colour)
    return picture


def chequered(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """An image of 16 fields in random colours."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


# --- parts of messages -------------------------------------------------------------------------


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def shown(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}
