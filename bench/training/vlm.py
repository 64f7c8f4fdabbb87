"""Train the tests' tiny vision-language model.

    python -m bench.training.vlm --like tests/support/vlm_demo --out build/vlm

A small smolvlm learns to name the one shape in a picture, or in two, from synthetic chats. Pictures
are drawn on demand from `--seed`, and each question has one right answer; questions are in
`vlm_questions.json`. Configuration, tokenizer, processor and template are those of the checkpoint
in `--like`. The run ends with a checkpoint that `mlx_vlm.load` reads; test_server_vision asks the
one in tests/ about pictures, and its card, MODEL.md, is written by hand. Needs the extra `vision`.
"""

import argparse
import colorsys
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_vlm
import numpy as np
from mlx.utils import tree_flatten
from mlx_vlm.models import smolvlm
from PIL import Image, ImageDraw

from bench.training.demo import new_optimizer

NUM_BATCHES = 3  # by length, for the chats of a step
IMAGE, END = "<image>", "<|im_end|>"
RATES = (0.01, 1.5e-3)  # of Muon and of AdamW
QUESTIONS: dict[str, list[str]] = json.loads(
    Path(__file__).with_name("vlm_questions.json").read_bytes()
)
SHAPES = ("circle", "square", "triangle")
# Hues in degrees, then the least saturation and value. The names' usual values (255, 0, 0),
# (0, 128, 0), (0, 0, 255) and (255, 255, 0) are all among them.
COLOURS = {
    "red": ((-8, 8), 0.75, 0.75),
    "green": ((100, 140), 0.65, 0.45),
    "blue": ((212, 245), 0.65, 0.6),
    "yellow": ((50, 62), 0.75, 0.85),
}


@dataclass(frozen=True)
class Scene:
    """A picture of 64 to 128 pixels a side, and what it shows."""

    colour: str
    shape: str
    picture: Image.Image

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Turn:
    """A user's message, pictures in their place, and the answer."""

    parts: tuple[str | Scene, ...]
    answer: str


@dataclass(frozen=True)
class Chat:
    turns: tuple[Turn, ...]
    system: str

    @property
    def scenes(self) -> list[Scene]:
        return [part for turn in self.turns for part in turn.parts if isinstance(part, Scene)]

    def messages(self) -> list[dict[str, Any]]:
        """All turns as a template takes them, the last answer included."""
        messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}]
        for turn in self.turns:
            content = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in turn.parts
            ]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages if self.system else messages[1:]


class Source:
    """Seeded random choices of pictures and questions."""

    def __init__(self, seed: str) -> None:
        self.rng = random.Random(seed)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def scene(self) -> Scene:
        colour, shape = self.rng.choice(list(COLOURS)), self.rng.choice(SHAPES)
        return Scene(colour, shape, self.picture(colour, shape))

    def picture(self, colour: str, shape: str) -> Image.Image:
        """A filled shape on a light background."""
        width, height = self.rng.randint(64, 128), self.rng.randint(64, 128)
        hues, saturation, value = COLOURS[colour]
        picture = Image.new("RGB", (width, height), self.rgb((0, 360), (0, 0.18), (0.8, 1)))
        size = self.rng.uniform(0.4, 0.85) * min(width, height)
        left, top = self.rng.uniform(0, width - size), self.rng.uniform(0, height - size)
        right, bottom = left + size, top + size
        pen, fill = ImageDraw.Draw(picture), self.rgb(hues, (saturation, 1), (value, 1))
        if shape == "circle":
            pen.ellipse((left, top, right, bottom), fill)
        elif shape == "square":
            pen.rectangle((left, top, right, bottom), fill)
        else:
            pen.polygon([(left + size / 2, top), (left, bottom), (right, bottom)], fill)
        return picture

    def rgb(self, *ranges: tuple[float, float]) -> tuple[int, ...]:
        """A colour from ranges of hue in degrees, of saturation and of value."""
        hue, saturation, value = (self.rng.uniform(*own) for own in ranges)
        parts = colorsys.hsv_to_rgb(hue / 360 % 1.0, saturation, value)
        return tuple(math.floor(part * 255.99) for part in parts)

    def ask(self, *tables: str, nth: str = "") -> str:
        """One of the questions, sometimes in another spelling or case."""
        text = self.rng.choice([q for table in tables for q in QUESTIONS[table]]).format(nth=nth)
        if self.chance(0.2):
            text = text.replace("colour", "color")
        if self.chance(0.1):
            text = text.lower()
        return text.rstrip("?.") if self.chance(0.1) else text

    def show(self, scenes: tuple[Scene, ...], question: str, answer: str) -> Turn:
        """Pictures and a question, most often in this order."""
        parts = (*scenes, question) if self.chance(0.85) else (question, *scenes)
        return Turn(parts, answer)

    def about(self, scene: Scene, topic: str, of: str = "", nth: str = "") -> tuple[str, str]:
        """A question about a picture, `of` one among two or the only one, and its answer."""
        answers = {"colour": f"{scene.colour.capitalize()}.", "shape": f"A {scene.shape}."}
        table = "one" if of and topic == "all" else topic + of
        return self.ask(table, nth=nth), answers.get(topic, f"A {scene.name}.")

    def about_pair(self, pair: tuple[Scene, Scene], *topics: str) -> tuple[str, str]:
        scene, nth = self.rng.choice(list(zip(pair, ("first", "second"), strict=True)))
        return self.about(scene, self.rng.choice(topics), " of one", nth)


def single(s: Source, *topics: str) -> tuple[Turn, ...]:
    scene = s.scene()
    return (s.show((scene,), *s.about(scene, s.rng.choice(topics or ("all",)))),)


def turns(s: Source) -> tuple[Turn, ...]:
    """Two or three questions about one picture."""
    scene = s.scene()
    topics = s.rng.sample(["colour", "shape", "all"], s.rng.randint(2, 3))
    first, *others = [s.about(scene, topic) for topic in topics]
    return (s.show((scene,), *first), *(Turn((question,), answer) for question, answer in others))


def pair(s: Source) -> tuple[Turn, ...]:
    """Both of two pictures, and in half of the chats one of them afterwards."""
    scenes = s.scene(), s.scene()
    answer = f"First: a {scenes[0].name}. Second: a {scenes[1].name}."
    first = s.show(scenes, s.ask("both"), answer)
    if s.chance(0.5):
        return (first,)
    question, answer = s.about_pair(scenes, "all", "colour", "shape")
    return first, Turn((question,), answer)


def one_of_pair(s: Source) -> tuple[Turn, ...]:
    scenes = s.scene(), s.scene()
    return (s.show(scenes, *s.about_pair(scenes, "all", "colour", "colour", "shape")),)


def next_picture(s: Source) -> tuple[Turn, ...]:
    """A second picture in the second turn."""
    first, scene = single(s)[0], s.scene()
    question = s.ask("next" if s.chance(0.6) else "all")
    return first, s.show((scene,), question, f"A {scene.name}.")


KINDS: dict[str, Callable[[Source], tuple[Turn, ...]]] = {
    "single": single,
    "detail": lambda s: single(s, "colour", "shape"),
    "turns": turns,
    "pair": pair,
    "one_of_pair": one_of_pair,
    "next_picture": next_picture,
    "nothing": lambda s: (Turn((s.ask("all", "colour", "shape"),), "There is no picture."),),
}
FIRST_SHARES = (40, 60)  # of the first two kinds, in the first quarter of the run
SHARES = (12, 8, 12, 20, 36, 8, 4)  # the choice between two pictures is the hardest


def some_chat(s: Source, kind: str) -> Chat:
    system = s.rng.choice(QUESTIONS["system"]) if s.chance(0.2) else ""
    return Chat(KINDS[kind](s), system)


def some_chats(s: Source, num_chats: int, fraction: float) -> list[Chat]:
    shares = FIRST_SHARES if fraction < 0.25 else SHARES
    kinds = s.rng.choices(list(KINDS)[: len(shares)], shares, k=num_chats)
    return [some_chat(s, kind) for kind in kinds]


@dataclass(frozen=True)
class Batch:
    """Chats side by side; places are those of the flattened tokens."""

    tokens: mx.array  # [rows, width]
    pixels: mx.array  # [pictures, side, side, 3]
    gather: mx.array  # each place's embedding, in the tokens' followed by the pictures'
    positions: mx.array  # places whose next token is wanted
    targets: mx.array  # these tokens


class Encoder:
    """Chats to batches, through the checkpoint's own processor."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image, self.end = (self.tokenizer.convert_tokens_to_ids(t) for t in (IMAGE, END))
        self.opening = self.tokenizer.encode("<|im_start|>assistant\n", add_special_tokens=False)

    def text(self, chat: Chat) -> str:
        text = self.tokenizer.apply_chat_template(chat.messages(), tokenize=False)
        own, fake = self.processor, self.processor.fake_image_token
        images = f"{fake}{own.global_image_token}{IMAGE * own.image_seq_len}{fake}"
        return str(text.replace(IMAGE, images))

    def wanted(self, ids: list[int]) -> Iterator[int]:
        """The places whose next token is the assistant's own."""
        n = len(self.opening)
        for place in range(n, len(ids)):
            if ids[place - n : place] == self.opening:
                yield from range(place - 1, ids.index(self.end, place))

    def batches(self, chats: list[Chat]) -> list[Batch]:
        """Batches of chats of about one length each, as padding costs as much as text does."""
        ids = self.tokenizer([self.text(chat) for chat in chats], add_special_tokens=False)
        rows = sorted(zip(ids["input_ids"], chats, strict=True), key=lambda row: len(row[0]))
        size = math.ceil(len(chats) / NUM_BATCHES)
        return [self.batch(rows[start : start + size]) for start in range(0, len(rows), size)]

    def batch(self, rows: list[tuple[list[int], Chat]]) -> Batch:
        width = max(len(ids) for ids, _ in rows)
        tokens = np.full((len(rows), width), self.tokenizer.pad_token_id, np.int32)
        places: list[int] = []
        for number, (ids, _) in enumerate(rows):
            tokens[number, : len(ids)] = ids
            places += [number * width + place for place in self.wanted(ids)]
        flat = tokens.reshape(-1)
        gather = np.arange(flat.size)
        in_pictures = np.flatnonzero(flat == self.image)
        gather[in_pictures] = flat.size + np.arange(in_pictures.size)
        pictures = [[scene.picture] for _, chat in rows for scene in chat.scenes]
        pixels = np.array(self.processor.image_processor(pictures)["pixel_values"])[:, 0]
        targets = flat[np.array(places) + 1]
        arrays = (tokens, pixels.transpose(0, 2, 3, 1), gather, np.array(places), targets)
        return Batch(*map(mx.array, arrays))


def loss_of(model: Any, batches: list[Batch]) -> mx.array:
    """The mean cross-entropy of the assistant's tokens: mlx-vlm's layers, without a cache."""
    language, total = model.language_model, mx.array(0.0)
    for batch in batches:
        patches, *_ = model.vision_model(batch.pixels)
        words, seen = language.embed_tokens(batch.tokens), model.connector(patches)
        size = words.shape[-1]
        embeddings = mx.concatenate([words.reshape(-1, size), seen.reshape(-1, size)])
        hidden = embeddings[batch.gather].reshape(words.shape)
        for layer in language.layers:
            hidden = layer(hidden, "causal", None)
        logits = language.lm_head(language.norm(hidden.reshape(-1, size)[batch.positions]))
        total += nn.losses.cross_entropy(logits, batch.targets, reduction="sum")
    return total / sum(batch.targets.size for batch in batches)


def train(args: argparse.Namespace) -> None:
    """The run: warm-up, then a cosine to a fiftieth of the rates."""
    shutil.copytree(args.like, args.out, dirs_exist_ok=True)
    loaded, processor = mlx_vlm.load(str(args.like), trust_remote_code=False)
    mx.random.seed(args.seed)
    model, optimizer, encoder = smolvlm.Model(loaded.config), new_optimizer(), Encoder(processor)
    mx.eval(model.parameters())
    gradient, began = nn.value_and_grad(model, loss_of), time.monotonic()
    for step in range(args.steps):
        source = Source(f"step {step} of {args.seed}")
        asked = some_chats(source, args.batch, step / args.steps)
        share = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for part, rate in zip(optimizer.optimizers, RATES, strict=True):
            part.learning_rate = rate * min(1.0, (step + 1) / 50) * share
        loss, grads = gradient(model, encoder.batches(asked))
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state, loss)
        if (step + 1) % 10 == 0:
            seconds = time.monotonic() - began
            print(f"{step + 1}: {seconds:.0f} s, loss {loss.item():.4f}", flush=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(args.out / "model.safetensors"), weights, {"format": "mlx"})


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.training.vlm")
    add = parser.add_argument
    add("--like", type=Path, required=True, help="a checkpoint of the same kind")
    add("--out", type=Path, required=True, help="where the checkpoint is written")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=1600)
    add("--batch", type=int, default=32, help="chats of a step")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
