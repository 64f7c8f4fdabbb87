"""Pictures and conversations for the tiny vision-language model: one shape of one colour a picture.

A picture is drawn when it is asked for, from a random source: the shape's place, size and shade,
the background and the picture's own size vary. A conversation is a list of turns whose questions
are about one picture, about two, about the second picture of a chat or about none; each has one
right answer, so that accuracy is a count of equal strings. Held-out items are those of another
seed: there is no picture that could be met twice.
"""

import colorsys
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle")


@dataclass(frozen=True)
class Shades:
    """What is called by a colour's name: hues in degrees, then the least saturation and value."""

    hues: tuple[float, float]
    saturation: float
    value: float


# The names' usual values (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 0) are all among them.
COLOURS = {
    "red": Shades((-8, 8), 0.75, 0.75),
    "green": Shades((100, 140), 0.65, 0.45),
    "blue": Shades((212, 245), 0.65, 0.6),
    "yellow": Shades((50, 62), 0.75, 0.85),
}
ABOUT_ALL = (
    "What is in the picture?",
    "What is in this picture?",
    "What is in the image?",
    "What's in this image?",
    "What is this?",
    "What do you see?",
    "What can you see in the picture?",
    "Describe the picture.",
    "Describe this image.",
    "Which colour and which shape?",
    "Which shape is it, and which colour?",
    "Name the colour and the shape.",
)
ABOUT_COLOUR = (
    "What colour is it?",
    "Which colour is it?",
    "Which colour?",
    "What is the colour?",
    "And the colour?",
    "What colour is the shape?",
)
ABOUT_SHAPE = (
    "What shape is it?",
    "Which shape is it?",
    "Which shape?",
    "What is the shape?",
    "And the shape?",
    "What shape do you see?",
)
ABOUT_BOTH = (
    "What is in the pictures?",
    "What is in these pictures?",
    "What do you see in the two pictures?",
    "Describe both pictures.",
    "Describe the pictures.",
    "Name the first and the second.",
)
ABOUT_ONE = (
    "What is in the {nth} picture?",
    "What is in the {nth} image?",
    "What is the {nth} one?",
    "Describe the {nth} picture.",
    "And the {nth}?",
)
COLOUR_OF_ONE = ("What colour is the {nth} one?", "Which colour has the {nth} picture?")
SHAPE_OF_ONE = ("What shape is the {nth} one?", "Which shape is in the {nth} picture?")
ABOUT_NEXT = ("And this?", "And this one?", "What about this one?", "And now?")
SYSTEM = ("You are a helpful assistant.", "Answer in a few words.", "You describe pictures.")
NO_PICTURE = "There is no picture."


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and the picture."""

    colour: str
    shape: str
    picture: Image.Image

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Turn:
    """What a user sends, pictures in their place, and the answer."""

    parts: tuple[str | Scene, ...]
    answer: str


@dataclass(frozen=True)
class Chat:
    """The turns of a conversation of one kind."""

    kind: str
    turns: tuple[Turn, ...]
    system: str = ""
    scenes: tuple[Scene, ...] = field(init=False)

    def __post_init__(self) -> None:
        parts = [part for turn in self.turns for part in turn.parts]
        scenes = tuple(part for part in parts if isinstance(part, Scene))
        object.__setattr__(self, "scenes", scenes)

    def messages(self, num_turns: int, with_answer: bool) -> list[dict[str, Any]]:
        """The first so many turns as a template takes them, the last answer in or out."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns[:num_turns]:
            content = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in turn.parts
            ]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages if with_answer else messages[:-1]


class Source:
    """A random source with the draws that pictures and chats need."""

    def __init__(self, seed: str) -> None:
        self.rng = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def scene(self) -> Scene:
        colour, shape = self.rng.choice(list(COLOURS)), self.rng.choice(SHAPES)
        return Scene(colour, shape, draw(self.rng, colour, shape))

    def ask(self, questions: tuple[str, ...], nth: str = "") -> str:
        """One of the questions, now and then as somebody in a hurry would type it."""
        text = self.rng.choice(questions).format(nth=nth)
        if self.chance(0.2):
            text = text.replace("colour", "color")
        if self.chance(0.1):
            text = text.lower()
        return text.rstrip("?.") if self.chance(0.1) else text


def draw(rng: random.Random, colour: str, shape: str) -> Image.Image:
    """A picture of 64 to 128 pixels a side with a filled shape on a light background."""
    width, height = rng.randint(64, 128), rng.randint(64, 128)
    picture = Image.new("RGB", (width, height), background(rng))
    size = rng.uniform(0.4, 0.85) * min(width, height)
    left, top = rng.uniform(0, width - size), rng.uniform(0, height - size)
    box = (left, top, left + size, top + size)
    fill = shade(rng, COLOURS[colour])
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse(box, fill)
    elif shape == "square":
        pen.rectangle(box, fill)
    else:
        pen.polygon([(left + size / 2, top), (left, top + size), (left + size, top + size)], fill)
    return picture


def background(rng: random.Random) -> tuple[int, int, int]:
    """A light grey or a light tint."""
    return to_rgb(rng.uniform(0, 360), rng.uniform(0, 0.18), rng.uniform(0.8, 1.0))


def shade(rng: random.Random, shades: Shades) -> tuple[int, int, int]:
    saturation, value = rng.uniform(shades.saturation, 1.0), rng.uniform(shades.value, 1.0)
    return to_rgb(rng.uniform(*shades.hues), saturation, value)


def to_rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(hue / 360 % 1.0, saturation, value)
    return math.floor(red * 255.99), math.floor(green * 255.99), math.floor(blue * 255.99)


# --- turns ------------------------------------------------------------------------------------


def about(s: Source, scene: Scene, topic: str) -> tuple[str, str]:
    """A question about a picture and its answer."""
    if topic == "colour":
        return s.ask(ABOUT_COLOUR), f"{scene.colour.capitalize()}."
    if topic == "shape":
        return s.ask(ABOUT_SHAPE), f"A {scene.shape}."
    return s.ask(ABOUT_ALL), f"A {scene.name}."


def about_pair(s: Source, pair: tuple[Scene, Scene], topic: str) -> tuple[str, str]:
    """A question about two pictures or one of them, and its answer."""
    if topic == "both":
        return s.ask(ABOUT_BOTH), f"First: a {pair[0].name}. Second: a {pair[1].name}."
    which = s.rng.randint(0, 1)
    nth, scene = ("first", "second")[which], pair[which]
    if topic == "colour":
        return s.ask(COLOUR_OF_ONE, nth), f"{scene.colour.capitalize()}."
    if topic == "shape":
        return s.ask(SHAPE_OF_ONE, nth), f"A {scene.shape}."
    return s.ask(ABOUT_ONE, nth), f"A {scene.name}."


def show(s: Source, scenes: tuple[Scene, ...], question: str) -> tuple[str | Scene, ...]:
    """Pictures and a question, most often in this order."""
    return (*scenes, question) if s.chance(0.85) else (question, *scenes)


def single(s: Source) -> tuple[Turn, ...]:
    scene = s.scene()
    question, answer = about(s, scene, "all")
    return (Turn(show(s, (scene,), question), answer),)


def detail(s: Source) -> tuple[Turn, ...]:
    scene = s.scene()
    question, answer = about(s, scene, s.rng.choice(["colour", "shape"]))
    return (Turn(show(s, (scene,), question), answer),)


def turns(s: Source) -> tuple[Turn, ...]:
    """Two or three questions about one picture."""
    scene = s.scene()
    topics = s.rng.sample(["colour", "shape", "all"], 3)[: s.rng.randint(2, 3)]
    asked = [about(s, scene, topic) for topic in topics]
    first = Turn(show(s, (scene,), asked[0][0]), asked[0][1])
    return (first, *(Turn((question,), answer) for question, answer in asked[1:]))


def pair(s: Source) -> tuple[Turn, ...]:
    """Both of two pictures, and now and then one of them afterwards."""
    scenes = s.scene(), s.scene()
    question, answer = about_pair(s, scenes, "both")
    first = Turn(show(s, scenes, question), answer)
    if s.chance(0.5):
        return (first,)
    return first, Turn(*as_text(about_pair(s, scenes, s.rng.choice(["all", "colour", "shape"]))))


def one_of_pair(s: Source) -> tuple[Turn, ...]:
    scenes = s.scene(), s.scene()
    question, answer = about_pair(s, scenes, s.rng.choice(["all", "colour", "colour", "shape"]))
    return (Turn(show(s, scenes, question), answer),)


def as_text(asked: tuple[str, str]) -> tuple[tuple[str, ...], str]:
    return (asked[0],), asked[1]


def next_picture(s: Source) -> tuple[Turn, ...]:
    """A second picture in the second turn."""
    first, scene = single(s)[0], s.scene()
    question = s.ask(ABOUT_NEXT) if s.chance(0.6) else s.ask(ABOUT_ALL)
    return first, Turn(show(s, (scene,), question), f"A {scene.name}.")


def nothing(s: Source) -> tuple[Turn, ...]:
    """A question about a picture that is not there."""
    return (Turn((s.ask(s.rng.choice([ABOUT_ALL, ABOUT_COLOUR, ABOUT_SHAPE])),), NO_PICTURE),)


KINDS: dict[str, Callable[[Source], tuple[Turn, ...]]] = {
    "single": single,
    "detail": detail,
    "turns": turns,
    "pair": pair,
    "one_of_pair": one_of_pair,
    "next_picture": next_picture,
    "nothing": nothing,
}
FIRST_SHARES = {"single": 40, "detail": 60}
SHARES = {  # what needs the right one of two pictures is the hardest
    "single": 12,
    "detail": 8,
    "turns": 12,
    "pair": 20,
    "one_of_pair": 36,
    "next_picture": 8,
    "nothing": 4,
}


def chat(s: Source, kind: str) -> Chat:
    system = s.rng.choice(SYSTEM) if s.chance(0.2) else ""
    return Chat(kind, KINDS[kind](s), system)


def shares_at(fraction: float) -> dict[str, int]:
    """The shares at a fraction of the run: seeing comes first, and short chats are cheap."""
    return FIRST_SHARES if fraction < 0.25 else SHARES


def chats(s: Source, num_chats: int, shares: dict[str, int]) -> list[Chat]:
    """Chats of all kinds in their shares."""
    kinds = s.rng.choices(list(shares), weights=list(shares.values()), k=num_chats)
    return [chat(s, kind) for kind in kinds]
